"""The parts of the embedded stack that need no server."""

import json
import os
import shlex
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ops.embedded import Ports, Process, StackError, credentials, envfile, leftovers, rabbitmq
from ops.embedded.backoff import Backoff
from ops.embedded.process import Child, launcher
from ops.embedded.stack import Stack


@pytest.fixture
def taken() -> Iterator[int]:
    """A port somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_taken_port_is_refused_with_the_setting_that_changes_it(taken: int) -> None:
    with pytest.raises(StackError, match=rf"port {taken} for redis .*TIDEGATE_REDIS_PORT"):
        Ports(redis=taken).resolved()


def test_free_ports_are_distinct_and_no_clients() -> None:
    ports = Ports().resolved()
    found = [getattr(ports, name) for name in Ports.__dataclass_fields__]
    lowest_of_clients = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])

    assert len(set(found)) == len(found)
    assert max(found) < lowest_of_clients


def test_one_port_for_two_processes_is_refused() -> None:
    port = Ports().resolved().redis
    with pytest.raises(StackError, match="TIDEGATE_PORT, TIDEGATE_REDIS_PORT"):
        Ports(gateway=port, redis=port).resolved()


def test_ports_come_from_the_environment() -> None:
    ports = Ports.from_environ({"TIDEGATE_PORT": "0", "TIDEGATE_REDIS_PORT": "7000"})

    assert ports == Ports(gateway=0, flower=5555, redis=7000)


@pytest.mark.parametrize("text", ["http", "-1", "65536", "²"])
def test_a_port_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(StackError, match="TIDEGATE_PORT"):
        Ports.from_environ({"TIDEGATE_PORT": text})


def test_credentials_are_made_once_for_their_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "secrets.json"
    made = credentials.load_or_make(path)

    assert credentials.load_or_make(path) == made
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert made.derived("rabbitmq") != made.derived("erlang") != made.secret
    prefix, live, public, private = made.api_key.split("_")
    assert (prefix, live, len(public), len(private)) == ("tg", "live", 8, 43)


def test_damaged_credentials_say_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "secrets.json"
    path.write_text("{}")

    with pytest.raises(StackError, match="restore the file"):
        credentials.load_or_make(path)


def test_lost_credentials_are_not_replaced_under_existing_data(tmp_path: Path) -> None:
    (tmp_path / "postgres").mkdir()

    with pytest.raises(StackError, match=r"secrets\.json is missing"):
        Stack(tmp_path).open()


def test_an_unknown_broker_is_refused_by_the_name_of_its_setting(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="TIDEGATE_BROKER='kafka': redis or rabbitmq"):
        Stack(tmp_path, environ={"TIDEGATE_BROKER": "kafka"}).open()


def test_a_rabbitmq_that_is_not_installed_is_refused_with_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rabbitmq, "BIN", tmp_path)
    with pytest.raises(StackError, match="apt-get install rabbitmq-server"):
        Stack(tmp_path / "var", environ={"TIDEGATE_BROKER": "rabbitmq"}).open()


def test_the_env_file_means_the_same_to_a_shell_and_to_us(tmp_path: Path) -> None:
    path = tmp_path / "tidegate.env"
    values = {"A": "plain", "B": 'it\'s $HOME `date` # "quoted"', "C": ""}
    envfile.write(path, values)
    script = f"set -a; . {shlex.quote(str(path))}; exec {shlex.quote(sys.executable)} -c "
    dump = "import json, os; print(json.dumps({k: os.environ[k] for k in 'ABC'}))"
    shell = subprocess.run(
        ["sh", "-c", script + shlex.quote(dump)], capture_output=True, timeout=30
    )

    assert envfile.read(path) == values
    assert json.loads(shell.stdout) == values
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_restarts_come_later_and_later_and_then_not_at_all() -> None:
    backoff = Backoff(first=0.5, most=3.0, limit=5, window=60.0)

    assert [backoff.died(100.0) for _ in range(5)] == [100.5, 101.0, 102.0, 103.0, None]


def test_deaths_long_ago_do_not_count() -> None:
    backoff = Backoff(limit=2, window=60.0)

    assert backoff.died(0.0) == 0.5
    assert backoff.died(60.0) == 60.5
    assert backoff.died(119.9) is None


def test_a_second_stack_on_a_folder_is_refused(tmp_path: Path) -> None:
    with Stack(tmp_path) as first:
        first.open()
        with pytest.raises(StackError, match=rf"already running on {tmp_path}: pid {os.getpid()},"):
            Stack(tmp_path).open()


def test_a_child_and_its_group_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    command = ["sh", "-c", "echo $$ >&2; exec sleep 60"]
    script = (
        "import subprocess, time; from ops.embedded.process import launcher;"
        f"subprocess.Popen([*launcher(), *{command!r}]); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    assert parent.stderr is not None
    pid = int(parent.stderr.readline())
    assert leftovers.birth(pid) is not None
    parent.kill()
    # The pipe closes when its last holder, the child, is gone.
    assert parent.stderr.read() == ""
    parent.stderr.close()
    parent.wait(timeout=10)


def test_only_processes_that_are_verifiably_ours_are_ended(tmp_path: Path) -> None:
    ours, reused = (subprocess.Popen(["sleep", "60"], start_new_session=True) for _ in range(2))
    record = tmp_path / "pids.json"
    known = {str(ours.pid): leftovers.birth(ours.pid), str(reused.pid): 1}
    record.write_text(json.dumps(known))

    try:
        assert leftovers.end(record, patience=0.1) == [ours.pid]
        assert ours.wait(timeout=10) == -9
        assert reused.poll() is None
    finally:
        reused.kill()
        reused.wait(timeout=10)


def test_finishing_a_child_kills_its_whole_group(tmp_path: Path) -> None:
    command = ["sh", "-c", "sleep 60 & echo $!; exit 3"]
    child = Child(Process("x", command, dict(os.environ)), tmp_path / "x.log", tmp_path)
    while child.alive() or not child.log.read_text():
        os.sched_yield()
    grandchild = int(child.log.read_text())

    assert child.finish() == 3
    while leftovers.birth(grandchild) is not None:
        os.sched_yield()


def test_the_launcher_says_why_it_could_not() -> None:
    failed = subprocess.run([*launcher("same"), "/no/such"], capture_output=True, timeout=30)

    assert failed.returncode != 0
    assert b"FileNotFoundError" in failed.stderr
