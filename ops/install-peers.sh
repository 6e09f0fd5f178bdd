#!/bin/sh
# Make .venv-peers: the model servers that `make bench-peers` measures Tidegate beside. With the
# Python of .venv, from exact versions with hashes, wheels only, as install.sh does.
set -eu
cd "$(dirname "$0")/.."

echo "Installing into .venv-peers"
rm -rf .venv-peers
export UV_SYSTEM_CERTS=1 UV_PYTHON_DOWNLOADS=never
if [ -n "${PIP_INDEX_URL:-}" ]; then export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}"; fi
if .venv/bin/uv --quiet venv --python .venv/bin/python .venv-peers &&
    .venv/bin/uv --quiet pip install --python .venv-peers --require-hashes --only-binary :all: \
        -r requirements/peers.txt; then
    exit 0
fi
echo "uv could not install; trying pip" >&2
rm -rf .venv-peers
.venv/bin/python -m venv .venv-peers
.venv-peers/bin/python -m pip --quiet install --disable-pip-version-check --require-hashes \
    --only-binary :all: -r requirements/peers.txt
