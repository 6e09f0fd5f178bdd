"""`Stack`: the processes of one folder of state, from the first start to the last stop."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType

import psutil

from ops.embedded import credentials, envfile, leftovers, postgres, product, rabbitmq, redis, triton
from ops.embedded.backoff import Backoff
from ops.embedded.ports import HOST, Ports
from ops.embedded.process import POLL, Child, Process, StackError

ROOT = Path(__file__).resolve().parents[2]
WATCH = 0.2
"""Seconds between two looks at processes that run."""
FLOWER_USER = "tidegate"
BROKERS = ("redis", "rabbitmq")


class Interrupted(Exception):
    """Somebody asked to stop before everything had started."""


def never() -> bool:
    return False


def silent(_: str) -> None:
    pass


class Stack:
    """Everything of one deployment, with its state in the folder `var`.

    Lifecycle: `start`, then `watch` where dead processes should come back, then `stop`; as a
    context manager, `stop` at the end. `start` and `stop` may be called again and again, for
    everything or for single processes. Not thread-safe, and to be used from a thread that
    outlives the processes: when the thread that started them ends, the kernel ends them.
    """

    def __init__(
        self,
        var: Path,
        ports: Ports | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        tell: Callable[[str], None] = silent,
    ):
        """`ports`: any free ones by default. `environ`: what the processes inherit, by default
        this process's environment; TIDEGATE_* settings in it reach the product, and
        TIDEGATE_BROKER=rabbitmq asks for RabbitMQ beside Redis. `tell` is given a line for
        everything that happens."""
        self.var = var.resolve()
        self._asked_ports = ports or Ports()
        self._inherited = os.environ if environ is None else environ
        self._tell = tell
        self._lock: int | None = None
        self._children: dict[str, Child] = {}
        self.ports = Ports()
        """Where everything listens. Known once opened."""
        self.env: dict[str, str] = {}
        """TIDEGATE_* for clients of the stack and for the product's processes. Known once
        opened."""
        self.processes: dict[str, Process] = {}
        """What can be started, by name. Known once opened; `add` to it."""
        self._settings: dict[str, str] = {}

    # Lifecycle

    def open(self) -> None:
        """Take the folder, end what an earlier stack left, and define what there is to start.

        `start` does so itself; to be called before `add`. Raises StackError when another stack
        has the folder, or a port is taken.
        """
        if self._lock is not None:
            return
        self.var.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._take_lock()
        try:
            for pid in leftovers.end(self.var / "pids.json"):
                self._tell(f"killed pid {pid}, left by an earlier run")
            self._keep_old_logs()
            if not (self.var / "secrets.json").exists() and (self.var / "postgres").exists():
                raise StackError(
                    f"{self.var / 'secrets.json'} is missing, and the data beside it is locked with"
                    f" the passwords in it: restore it, or remove {self.var} and start afresh"
                )
            self.ports = self._asked_ports.resolved()
            self._define()
        except BaseException:
            self._close()
            raise
        (self.var / "lock").write_text(f"pid {os.getpid()}, {self.env['TIDEGATE_URL']}")
        envfile.write(self.var / "tidegate.env", self.env)

    def start(
        self, only: Collection[str] | None = None, *, interrupted: Callable[[], bool] = never
    ) -> None:
        """Start what does not run yet, or of that only the processes named; wait until ready.

        Each starts when those it comes after are ready, as far as they are asked for.
        Raises StackError when one cannot, and Interrupted as soon as `interrupted()`.
        """
        self.open()
        if unknown := set(only or ()) - set(self.processes):
            raise StackError(f"no such process: {', '.join(sorted(unknown))}")
        waiting = [
            process
            for name, process in self.processes.items()
            if (only is None or name in only) and not self.alive(name)
        ]
        starting: list[Child] = []
        while waiting or starting:
            if interrupted():
                raise Interrupted
            unready = {p.name for p in waiting} | {child.process.name for child in starting}
            for process in [p for p in waiting if unready.isdisjoint(p.after)]:
                waiting.remove(process)
                starting.append(self._spawn(process))
            for child in [child for child in starting if self._is_ready(child)]:
                starting.remove(child)
                took = time.monotonic() - child.started
                self._tell(f"  {child.process.name:<12} ready  {took:5.1f} s")
            time.sleep(POLL)

    def add(self, process: Process) -> None:
        """Make one more process known, to be started by `start`."""
        if process.name in self.processes:
            raise StackError(f"there is a process {process.name} already")
        self.processes[process.name] = process

    def add_worker(self, name: str, *arguments: str) -> None:
        """Make one more GPU worker known. `arguments` go to `celery worker`."""
        self.add(product.worker(self._settings, *arguments, name=name))

    def watch(self, interrupted: Callable[[], bool]) -> None:
        """Start again what dies, until `interrupted()`.

        Raises StackError with the end of its log when a process dies again and again.
        """
        backoffs = {name: Backoff() for name in self._children}
        latest = dict(self._children)
        reviving: set[str] = set()
        due: dict[str, float] = {}
        while not interrupted():
            now = time.monotonic()
            for name, child in list(self._children.items()):
                if name not in reviving:
                    if not child.alive():
                        self._bury(name)
                    continue
                with contextlib.suppress(StackError):  # Then it is buried, too.
                    if self._is_ready(child):
                        reviving.remove(name)
                        self._tell(f"{name} is ready again")
            for name in sorted(backoffs.keys() - self._children.keys() - due.keys()):
                reviving.discard(name)
                again = backoffs[name].died(now)
                if again is None:
                    raise StackError(f"{name} dies again and again. {_log_of(latest[name])}")
                self._tell(f"{name} {_cause(latest[name])}; again in {again - now:.1f} s")
                due[name] = again
            for name in [name for name, when in due.items() if when <= now]:
                del due[name]
                reviving.add(name)
                latest[name] = self._spawn(self.processes[name])
            time.sleep(WATCH)

    def stop(self, *names: str, hurry: Callable[[], bool] = never) -> None:
        """Stop everything, the highest tier first, or only the processes named. Idempotent.

        Each may take its time to end in order, unless `hurry()`; then it is killed.
        """
        chosen = [child for name, child in self._children.items() if not names or name in names]
        for tier in sorted({child.process.tier for child in chosen}, reverse=True):
            group = [child for child in chosen if child.process.tier == tier]
            asked = time.monotonic()
            for child in group:
                child.signal(child.process.stop_signal)
            while group:
                for child in list(group):
                    name, took = child.process.name, time.monotonic() - asked
                    alive = child.alive()
                    if alive and took < child.process.stop_timeout and not hurry():
                        continue
                    group.remove(child)
                    self._bury(name)
                    self._tell(f"  {name:<12} {'killed' if alive else 'stopped'} {took:4.1f} s")
                time.sleep(POLL)
        if not names:
            self._close()

    def __enter__(self) -> Stack:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    # Single processes

    def alive(self, name: str) -> bool:
        child = self._children.get(name)
        return child is not None and child.alive()

    def pid(self, name: str) -> int:
        """The process id of a process that runs."""
        if not self.alive(name):
            raise StackError(f"{name} does not run")
        return self._children[name].pid

    def family(self, name: str) -> list[psutil.Process]:
        """A process that runs, and all that descend from it: a worker is one for each lane."""
        top = psutil.Process(self.pid(name))
        return [top, *top.children(recursive=True)]

    def kill(self, name: str) -> None:
        """Kill a process, and its children, as a crash would. `start` brings it back."""
        self.pid(name)
        self._bury(name)

    def log(self, name: str) -> Path:
        return self.var / "logs" / f"{name}.log"

    # Inside

    def _take_lock(self) -> None:
        lock = os.open(self.var / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            owner = (self.var / "lock").read_text()
            raise StackError(f"already running on {self.var}: {owner}") from None
        (self.var / "lock").write_text(f"pid {os.getpid()}, starting")
        self._lock = lock

    def _define(self) -> None:
        made = credentials.load_or_make(self.var / "secrets.json")
        ports = self.ports
        objects = self.var / "objects"
        objects.mkdir(mode=0o700, exist_ok=True)
        self.env = {
            "TIDEGATE_URL": f"http://{HOST}:{ports.gateway}",
            "TIDEGATE_API_KEY": made.api_key,
            "TIDEGATE_METRICS_URL": f"http://{HOST}:{ports.metrics}/metrics",
            "TIDEGATE_FLOWER_URL": f"http://{HOST}:{ports.flower}",
            "TIDEGATE_FLOWER_USER": FLOWER_USER,
            "TIDEGATE_FLOWER_PASSWORD": made.flower,
            "TIDEGATE_TRITON_URL": f"{HOST}:{ports.triton_grpc}",
            "TIDEGATE_TRITON_HTTP_URL": f"http://{HOST}:{ports.triton_http}",
            "TIDEGATE_TRITON_METRICS_URL": f"http://{HOST}:{ports.triton_metrics}/metrics",
            "TIDEGATE_DATABASE_URL": postgres.url(ports.postgres, made.postgres),
            "TIDEGATE_REDIS_URL": redis.url(ports.redis, made.redis),
            "TIDEGATE_OBJECTS_URL": _bucket(self._inherited) or objects.as_uri(),
            "TIDEGATE_SECRET": made.secret,
        }
        bare = {"PATH": self._inherited.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}
        broker: list[Process] = []
        if self._broker() == "rabbitmq":
            password, cookie = made.derived("rabbitmq"), made.derived("erlang")
            broker = rabbitmq.processes(self.var / "rabbitmq", ports, password, cookie, bare)
            self.env["TIDEGATE_BROKER_URL"] = rabbitmq.url(ports.rabbitmq, password)
        ours = {**_inheritable(self._inherited), **self.env, "PYTHONUNBUFFERED": "1"}
        self._settings = ours
        # Triton first: it takes longest.
        table = [
            triton.process(
                self.var / "triton",
                ROOT / "ops" / "models",
                triton.Environment.of(ROOT / ".venv-triton"),
                http=ports.triton_http,
                grpc=ports.triton_grpc,
                metrics=ports.triton_metrics,
                env=bare,
            ),
            *broker,
            redis.process(self.var / "redis", ports.redis, made.redis, bare),
            postgres.process(
                self.var / "postgres", ports.postgres, made.postgres, bare, self._tell
            ),
            *product.setup(ours),
            product.gateway(ours, ports.gateway, ports.metrics),
            product.worker(ours),
            product.sweeper(ours),
            product.flower(ours, ports.flower, FLOWER_USER, made.flower),
        ]
        self.processes = {process.name: process for process in table}

    def _broker(self) -> str:
        chosen = self._inherited.get("TIDEGATE_BROKER") or BROKERS[0]
        if chosen not in BROKERS:
            raise StackError(f"TIDEGATE_BROKER={chosen!r}: {' or '.join(BROKERS)}, please")
        return chosen

    def _close(self) -> None:
        if self._lock is None:
            return
        for name in ("tidegate.env", "pids.json"):
            (self.var / name).unlink(missing_ok=True)
        os.close(self._lock)
        self._lock = None

    def _spawn(self, process: Process) -> Child:
        if process.name in self._children:
            self._bury(process.name)
        child = Child(process, self.log(process.name), ROOT)
        self._children[process.name] = child
        self._record()
        return child

    def _bury(self, name: str) -> None:
        self._children.pop(name).finish()
        self._record()

    def _record(self) -> None:
        pids = (child.pid for child in self._children.values())
        leftovers.record(self.var / "pids.json", pids)

    def _is_ready(self, child: Child) -> bool:
        """Raises StackError when it never will be."""
        process = child.process
        if not child.alive():
            self._bury(process.name)
            if process.once and child.finish() == 0:
                return True
            raise StackError(f"{process.name} {_cause(child)} while starting. {_log_of(child)}")
        runs = time.monotonic() - child.started
        if process.once or runs < process.settle:
            problem: object = "it has not ended"
        else:
            assert process.ready is not None
            try:
                process.ready()
                return True
            except Exception as error:  # Whatever a probe raises means: not yet.
                problem = error
        if runs > process.ready_timeout:
            self._bury(process.name)
            raise StackError(
                f"{process.name} was not ready within {process.ready_timeout:g} s: {problem}."
                f" {_log_of(child)}"
            )
        return False

    def _keep_old_logs(self) -> None:
        """Each run has its own logs, and those of the run before stay readable."""
        logs = self.var / "logs"
        logs.mkdir(mode=0o700, exist_ok=True)
        for log in logs.glob("*.log"):
            log.replace(log.with_suffix(".log.1"))


def _bucket(environ: Mapping[str, str]) -> str:
    """The S3 bucket that somebody asks for. Not a folder: that would be the one of another stack,
    whose `tidegate.env` was read in."""
    url = environ.get("TIDEGATE_OBJECTS_URL", "")
    return url if url.startswith("s3://") else ""


def _inheritable(environ: Mapping[str, str]) -> dict[str, str]:
    """Without what would redirect the libraries of the product, unseen."""
    return {
        name: value for name, value in environ.items() if not re.match("PG|PYTHON|FLOWER_", name)
    }


def _cause(child: Child) -> str:
    status = child.finish()
    return f"ended with status {status}" if status >= 0 else f"was killed by signal {-status}"


def _log_of(child: Child) -> str:
    return f"The end of {child.log}:\n{child.tail()}"
