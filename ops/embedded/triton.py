"""Triton: the server binary of the `nvidia-pytriton` wheel, in an environment of its own."""

from __future__ import annotations

import hashlib
import json
import secrets
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ops.embedded import probes
from ops.embedded.ports import HOST
from ops.embedded.process import Process, StackError

SHARED_MEMORY = Path("/dev/shm")
GPU = Path("/dev/nvidiactl")
RESTRICTED = "shared-memory,trace,logging"
"""APIs that nobody needs here."""
UNFORGED = "model-repository"
"""Loading and unloading models, the code of new ones among them: by gRPC alone, which is what
workers and operators speak. Nobody can be talked into sending it, as with an address of HTTP."""

_ASK = """
import json, sys, sysconfig
print(json.dumps({
    "version": "%d.%d" % sys.version_info[:2], "home": sys.base_prefix,
    "libraries": sysconfig.get_config_var("LIBDIR"), "packages": sysconfig.get_path("purelib"),
}))
"""


@dataclass(frozen=True, slots=True)
class Environment:
    """Triton's virtual environment, as its own interpreter describes it."""

    folder: Path
    version: str
    home: str
    libraries: str
    packages: str

    @classmethod
    def of(cls, folder: Path) -> Environment:
        try:
            asked = subprocess.run(
                [folder / "bin" / "python", "-I", "-c", _ASK],
                capture_output=True,
                check=True,
                timeout=30,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise StackError(f"Triton is not installed in {folder}: run `make install`") from error
        return cls(folder, **json.loads(asked.stdout))

    @property
    def server(self) -> Path:
        return Path(self.packages) / "pytriton" / "tritonserver"

    def variables(self) -> dict[str, str]:
        """For the server, and for the stubs: programs of its own with a Python interpreter inside.

        A stub finds its interpreter's library (`libpython`), its standard library and the
        packages by these alone.
        """
        return {
            "PATH": f"{self.folder}/bin:/usr/bin:/bin",
            "LD_LIBRARY_PATH": f"{self.packages}/nvidia_pytriton.libs:{self.libraries}",
            "PYTHONHOME": self.home,
            "PYTHONPATH": self.packages,
            # One thread per model instance; instances are what scales.
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }


def process(
    folder: Path,
    models: Path,
    environment: Environment,
    *,
    http: int,
    grpc: int,
    metrics: int,
    env: Mapping[str, str],
    name: str = "triton",
) -> Process:
    """The server of the model repository `models`, with its working files in `folder`."""
    # Distinct for every stack and server of this machine, and the same at its next start.
    mark = hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    prefix = f"tidegate-{mark}-"
    backends = folder / "backends"

    def clean() -> None:
        for region in SHARED_MEMORY.glob(f"{prefix}*"):
            region.unlink(missing_ok=True)

    def prepare() -> None:
        clean()
        _link_backend(environment, backends)

    # Nobody has the key: it is on the command line, but new at every start and kept nowhere.
    key = f"tidegate-admin={secrets.token_urlsafe(16)}"
    return Process(
        name=name,
        command=[
            environment.server / "bin" / "tritonserver",
            f"--model-repository={models}",
            "--model-control-mode=explicit",
            # All there are, as without control; a model can then be unloaded and loaded again.
            "--load-model=*",
            "--disable-auto-complete-config",
            f"--backend-directory={backends}",
            f"--backend-config=python,shm-region-prefix-name={prefix}",
            *(f"--{kind}-address={HOST}" for kind in ("http", "grpc", "metrics")),
            *(f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"),
            f"--http-restricted-api={RESTRICTED},{UNFORGED}:{key}",
            f"--grpc-restricted-protocol={RESTRICTED}:{key}",
            f"--allow-gpu-metrics={str(GPU.exists()).lower()}",
            # It takes a second per stub to unload. By then nobody asks it anything, so don't wait:
            # what is left of its process group is killed.
            "--exit-timeout-secs=1",
            "--log-verbose=0",
        ],
        env={**env, **environment.variables()},
        prepare=prepare,
        ready=lambda: check(f"http://{HOST}:{http}"),
        clean=clean,
        # Its stubs end with it.
        orphan_signal=signal.SIGTERM,
    )


def check(url: str) -> None:
    """Raise unless the server at `url` is ready and its models give real answers.

    Ready is not enough: with an unsuitable NumPy every answer is empty, and no error.
    """
    probes.expect(f"{url}/v2/health/ready", 200)
    text = {"name": "TEXT", "shape": [1, 1], "datatype": "BYTES", "data": ["tide"]}
    image = {"name": "image", "shape": [1, 64], "datatype": "FP32", "data": [0.0] * 64}
    echoed = _infer(url, "identity", text)["TEXT_OUT"]
    odds = _infer(url, "digits", image)["probabilities"]
    if echoed != ["tide"] or len(odds) != 10:
        raise probes.NotReady(
            f"its models answer without content (TEXT_OUT={echoed}, probabilities={odds}):"
            " is NumPy 2 in Triton's environment?"
        )


def _infer(url: str, model: str, tensor: Mapping[str, object]) -> dict[str, list[object]]:
    answer = probes.post(f"{url}/v2/models/{model}/infer", {"inputs": [tensor]})
    return {output["name"]: output["data"] for output in answer["outputs"]}


def _link_backend(environment: Environment, backends: Path) -> None:
    """Put the Python backend together: the wheel keeps one stub per Python version elsewhere."""
    stub = "python_backend_stubs/" + environment.version + "/triton_python_backend_stub"
    parts = [
        environment.server / "backends" / "python" / "libtriton_python.so",
        environment.server / "backends" / "python" / "triton_python_backend_utils.py",
        environment.server / stub,
    ]
    (backends / "python").mkdir(parents=True, exist_ok=True)
    for part in parts:
        if not part.exists():
            raise StackError(f"Triton's Python backend lacks {part}: run `make clean install`")
        link = backends / "python" / part.name
        link.unlink(missing_ok=True)
        link.symlink_to(part)
