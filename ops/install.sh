#!/bin/sh
# Make the two environments: .venv (everything of ours) and .venv-triton (a server, see
# requirements/triton.in). From exact versions with hashes; wheels only, so nothing is compiled.
set -eu
cd "$(dirname "$0")/.."

# A Python that can make environments, and whose library Triton's Python backend can load. 3.13 and
# later have no build of the NumPy which that backend needs.
CHECK='
import ctypes, os, sys, sysconfig
version = "%d.%d" % sys.version_info[:2]
hint = "on Debian: apt-get install python%s-venv libpython%s" % (version, version)
if version not in ("3.11", "3.12"):
    sys.exit("it is Python " + version)
try:
    import ensurepip, ssl, venv
except ImportError as error:
    sys.exit("%s; %s" % (error, hint))
library = "libpython%s.so.1.0" % version
if not os.path.exists(os.path.join(sysconfig.get_config_var("LIBDIR"), library)):
    try:
        ctypes.CDLL(library)
    except OSError:
        sys.exit("it has no %s; %s" % (library, hint))
print(getattr(sys, "_base_executable", sys.executable))
'

find_python() {
    refused=""
    for name in python3.12 python3.11 python3; do
        IFS=:
        for folder in $PATH; do
            unset IFS
            [ -x "$folder/$name" ] || continue
            if found=$("$folder/$name" -I -c "$CHECK" 2>&1); then
                echo "$found"
                return
            fi
            refused="$refused
  $folder/$name: $(echo "$found" | tail -n 1)"
        done
        unset IFS
    done
    echo "Tidegate needs Python 3.11 or 3.12 with its venv module and shared library.${refused:-
  There is no python3 on the PATH.}" >&2
    return 1
}

[ "$(uname -s)" = Linux ] || {
    echo "The embedded stack runs on Linux only; elsewhere use docker-compose.yml." >&2
    exit 1
}
python=$(find_python)
echo "Installing into .venv and .venv-triton with $python"
rm -rf .venv .venv-triton

export PIP_DISABLE_PIP_VERSION_CHECK=1
"$python" -m venv .venv
pip="$PWD/.venv/bin/python -m pip --quiet"

# uv is several times faster than pip, but does not read pip's settings.
export UV_SYSTEM_CERTS=1 UV_PYTHON_DOWNLOADS=never
if [ -n "${PIP_INDEX_URL:-}" ]; then export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}"; fi
uv="$PWD/.venv/bin/uv --quiet"

with_uv() {
    $pip install --require-hashes --only-binary :all: -r requirements/uv.txt || return 1
    $uv venv --python "$python" .venv-triton || return 1
    $uv pip install --python .venv-triton --no-deps --require-hashes --only-binary :all: \
        -r requirements/triton.txt &
    $uv pip install --python .venv --require-hashes --only-binary :all: -r requirements/dev.txt ||
        { wait; return 1; }
    wait $!
}

with_pip() {
    "$python" -m venv .venv-triton
    $pip --python .venv-triton install --no-deps --require-hashes --only-binary :all: \
        -r requirements/triton.txt
    $pip install --require-hashes --only-binary :all: -r requirements/dev.txt
}

with_uv || { echo "uv could not install; trying pip" >&2; with_pip; }
