"""`python -m ops.embedded up`, as a person runs it: it starts, stops, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from ops.embedded import Ports, envfile
from tests.e2e.helpers import Http, answered_ints, ended, flower, ints, until

pytestmark = pytest.mark.stack

SHARED_MEMORY = Path("/dev/shm")


def command(var: Path) -> list[str]:
    return [sys.executable, "-m", "ops.embedded", "up", "--var", str(var)]


def environment(**variables: str) -> dict[str, str]:
    """Any free ports, unless `variables` say otherwise."""
    return os.environ | {"TIDEGATE_PORT": "0", "TIDEGATE_FLOWER_PORT": "0"} | variables


@dataclass(frozen=True)
class Running:
    """A stack that somebody started at a terminal, with its log."""

    process: subprocess.Popen[bytes]
    log: Path
    env: dict[str, str]

    @property
    def server(self) -> Http:
        return Http.keyed(self.env["TIDEGATE_URL"], self.env["TIDEGATE_API_KEY"])

    def tree(self) -> list[psutil.Process]:
        """It, and every process below it."""
        top = psutil.Process(self.process.pid)
        return [top, *top.children(recursive=True)]


@contextmanager
def up(var: Path, root: Path) -> Iterator[Running]:
    """A stack that is ready; stopped at the end, if it was not before."""
    log = var.with_name(f"{var.name}.log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            command(var), cwd=root, env=environment(), stdout=output, stderr=subprocess.STDOUT
        )
    try:
        until(
            lambda: (process.poll(), log.read_text()),
            60,
            lambda seen: seen[0] is not None or "Ready in" in seen[1],
        )
        assert process.poll() is None, log.read_text()
        yield Running(process, log, envfile.read(var / "tidegate.env"))
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(timeout=60)


def left(tree: list[psutil.Process]) -> list[str]:
    """Which of these processes still run."""
    found = []
    for one in tree:
        try:
            if one.is_running() and one.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{one.pid} {' '.join(one.cmdline())}")
        except psutil.NoSuchProcess:
            pass
    return found


def listening(tree: list[psutil.Process]) -> set[int]:
    """The ports on which these processes listen."""
    return {
        connection.laddr.port
        for one in tree
        for connection in one.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


def shared_memory(tree: list[psutil.Process]) -> set[Path]:
    """The named regions that these processes share."""
    mapped = {Path(region.path) for one in tree for region in one.memory_maps()}
    return {path for path in mapped if path.parent == SHARED_MEMORY}


def answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@dataclass(frozen=True)
class Ended:
    """A stack that was asked to stop, and what was there before and after."""

    var: Path
    key: str
    job: dict[str, Any]
    status: int
    output: str
    processes: list[str]
    ports: set[int]
    ports_left: set[int]
    shared_memory: set[Path]
    shared_memory_left: set[Path]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Ended:
    """The first run: one job, then SIGTERM."""
    var = tmp_path_factory.mktemp("terminal") / "var"
    with up(var, root) as running:
        job = running.server.post("/v1/jobs", {"model": "identity", "input": ints(4, 2)}).json()
        job = ended(running.server, job["id"])
        tree = running.tree()
        ports, regions = listening(tree), shared_memory(tree)
        running.process.send_signal(signal.SIGTERM)
        status = running.process.wait(timeout=60)
        return Ended(
            var=var,
            key=running.env["TIDEGATE_API_KEY"],
            job=job,
            status=status,
            output=running.log.read_text(),
            processes=left(tree),
            ports=ports,
            ports_left={port for port in ports if answers(port)},
            shared_memory=regions,
            shared_memory_left={region for region in regions if region.exists()},
        )


@pytest.fixture(scope="module")
def second(first: Ended, root: Path) -> Iterator[Running]:
    """The second run, on what the first one left."""
    with up(first.var, root) as running:
        yield running


def test_one_signal_stops_everything(first: Ended) -> None:
    assert first.status == 0, first.output
    assert first.processes == []
    assert len(first.ports) >= 7
    assert first.ports_left == set()
    assert first.shared_memory
    assert first.shared_memory_left == set()


def test_nothing_had_to_be_killed(first: Ended) -> None:
    stopping = first.output.partition("Stopping")[2]

    assert "stopped" in stopping
    assert [line for line in stopping.splitlines() if "killed" in line] == []


def test_a_run_from_start_to_stop_logs_no_traceback(first: Ended) -> None:
    logs = list((first.var / "logs").glob("*.log*"))

    assert {"gateway.log", "worker.log", "sweeper.log"} <= {log.name for log in logs}
    assert [log.name for log in logs if "Traceback" in log.read_text(errors="replace")] == []


def test_the_terminal_says_where_everything_is(first: Ended) -> None:
    for word in ("Gateway   http://127.0.0.1:", "Flower    http://127.0.0.1:", str(first.var)):
        assert word in first.output
    assert first.key not in first.output


def test_everything_listens_on_this_machine_only(second: Running) -> None:
    addresses = {
        # IPv4 loopback as an IPv6 socket says it.
        connection.laddr.ip.removeprefix("::ffff:")
        for one in second.tree()
        for connection in one.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }

    # RabbitMQ's port mapper, where there is one, takes both.
    assert addresses - {"::1"} == {"127.0.0.1"}


def test_flower_knows_the_worker_from_the_start(second: Running) -> None:
    until(lambda: flower(second.env).get("/api/workers").json(), 10)


def test_the_next_start_finds_what_the_last_one_left(first: Ended, second: Running) -> None:
    assert second.env["TIDEGATE_API_KEY"] == first.key
    assert second.server.get(first.job["urls"]["self"]).json() == first.job
    result = second.server.get(first.job["urls"]["result"])
    assert (result.status, answered_ints(result.json())) == (200, [4, 2])


def test_a_second_start_on_the_same_folder_is_refused(
    first: Ended, second: Running, root: Path
) -> None:
    again = subprocess.run(
        command(first.var), cwd=root, env=environment(), capture_output=True, text=True, timeout=60
    )

    assert again.returncode == 1
    assert f"already running on {first.var}" in again.stderr
    assert f"pid {second.process.pid}" in again.stderr
    assert "Traceback" not in again.stderr
    assert second.server.get("/readyz").status == 200


@pytest.mark.parametrize("variable", ["TIDEGATE_PORT", "TIDEGATE_POSTGRES_PORT"])
def test_a_taken_port_is_refused_by_the_name_of_its_setting(
    tmp_path: Path, root: Path, variable: str
) -> None:
    with socket.create_server(("127.0.0.1", Ports().resolved().gateway)) as holder:
        port = holder.getsockname()[1]
        told = subprocess.run(
            command(tmp_path / "var"),
            cwd=root,
            env=environment(**{variable: str(port)}),
            capture_output=True,
            text=True,
            timeout=60,
        )

    assert told.returncode == 1
    assert f"port {port}" in told.stderr
    assert f"{variable}=<port>" in told.stderr
    assert "Traceback" not in told.stderr


def test_a_supervisor_that_is_killed_leaves_nothing_running(second: Running) -> None:
    tree = second.tree()
    ports = listening(tree)
    assert len(tree) > 8
    second.process.kill()
    second.process.wait(timeout=10)

    until(lambda: left(tree), 20, lambda found: not found)
    assert {port for port in ports if answers(port)} == set()
