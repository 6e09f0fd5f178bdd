"""The faults of `reliability.md` section 3 that one machine can run: a table of small functions.

Each puts load on and hurts something; `Run.finish` then lets everything end, and the oracle judges.
What a scenario expects beyond the oracle's zeroes, it says by `expect`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.request import urlopen
from uuid import UUID

import psycopg2
import redis
import tritonclient.grpc as tritonclient

from ops.embedded.process import StackError
from tests.chaos import broker, crashing, disks, network
from tests.chaos.client import Refused, ask, form
from tests.chaos.flood import Flood
from tests.chaos.journal import Holds
from tests.chaos.oracle import Due, Item, Verdict
from tests.chaos.s3 import WEIGHTS, Fault, FaultyS3
from tests.chaos.world import LEASE, PRODUCT, Run

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
DIGIT = {"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 64], "data": [0.0] * 64}]}
"""A request for the model `digits`."""
FLOOD_DEADLINE = 2.0
"""Seconds that each request of a flood is good for."""
ANY = ("worker", "gateway", "redis", "postgres", "triton")


class Skip(Exception):
    """Not on this machine; the message says why."""


@contextlib.contextmanager
def _skipped(impossible: type[Exception]) -> Iterator[None]:
    """What is impossible here is skipped."""
    try:
        yield
    except impossible as error:
        raise Skip(str(error)) from error


Expect = Callable[[Run, Verdict], Iterator[str]]


@dataclass(frozen=True, slots=True)
class Scenario:
    """`fault`: its number in `reliability.md`. `expect` tells problems the oracle doesn't know."""

    fault: str
    name: str
    play: Callable[[Run], None]
    expect: Sequence[Expect] = ()
    short: bool = False
    """Part of `make test`."""


SCENARIOS: list[Scenario] = []


def scenario(
    fault: str, name: str, *expect: Expect, short: bool = False
) -> Callable[[Callable[[Run], None]], Callable[[Run], None]]:
    def add(play: Callable[[Run], None]) -> Callable[[Run], None]:
        SCENARIOS.append(Scenario(fault, name, play, expect, short))
        return play

    return add


# What may be expected


def resumes(seconds: float) -> Expect:
    """After each kill, where work is left, the next commit comes so soon."""

    def check(run: Run, verdict: Verdict) -> Iterator[str]:
        # The short profile runs beside other tests: its clock is not to be trusted.
        longest = verdict.recovered(1)
        if run.long and longest is not None and longest > seconds:
            yield f"it took {longest:.1f} s to resume, not {seconds:g}"

    return check


def once(_: Run, verdict: Verdict) -> Iterator[str]:
    """Nothing is run a second time."""
    if verdict.again:
        yield f"{verdict.again} items were run more than once"


def taken_over(run: Run, verdict: Verdict) -> Iterator[str]:
    """Others ran what somebody had in hand. Whether that one notices when it wakes up, or tries to
    commit and is refused, is a race."""
    if not verdict.again:
        yield "nobody took over"
    if not verdict.refused:
        run.notes.append("no stale commit was tried: each noticed first that it was late")


def kills(_: Run, verdict: Verdict) -> Iterator[str]:
    """Somebody died, or nothing was tested."""
    if not verdict.kills:
        yield "nobody died"


def survives(*names: str) -> Expect:
    """These are the processes that they were."""

    def check(run: Run, _: Verdict) -> Iterator[str]:
        for name in names:
            if run.pids[name] != run.stack.pid(name):
                yield f"{name} died"

    return check


def no_5xx(run: Run, _: Verdict) -> Iterator[str]:
    found = {status: n for status, n in run.client.statuses.items() if status >= 500}
    if found:
        yield f"clients saw {found}"


# F1: processes killed


@scenario("F1", "any part killed, one batch", kills, resumes(10), short=True)
def any_part(run: Run) -> None:
    """Worker, gateway, Redis, Postgres or Triton, every 5 s, while a batch runs."""
    run.batch(run.pick(2000, 20_000), delay_ms=run.pick(700, 500))
    run.trickle(run.pick(60, 800), rate=run.pick(5, 8))
    run.going(16)
    run.storm(ANY, kills=run.pick(6, 60), every=run.pick(3, 5))


@scenario("F1", "200 kills of random workers", kills, resumes(LEASE + 7))
def workers_killed(run: Run) -> None:
    """Two workers side by side, batches and single jobs."""
    total = run.pick(4000, 100_000)
    with run.world.another("worker-1"):
        for _ in range(9):
            run.behind(lambda: run.batch(total // 10, delay_ms=500))
        run.trickle(total // 10, rate=run.pick(20, 30), threads=4)
        run.going(16)
        run.storm(("worker", "worker-1"), kills=run.pick(10, 200), every=2)
        run.verdict = run.finish(within=600)


@scenario(
    "F1", "batch lanes killed, their workers not", kills, survives(*PRODUCT), resumes(LEASE + 10)
)
def lanes_killed(run: Run) -> None:
    """Each worker starts its own again, later each time."""
    run.batch(run.pick(1500, 15_000), delay_ms=500)
    run.trickle(run.pick(100, 1000), rate=20)
    for _ in run.world.each(range(run.pick(4, 30)), "killing lanes"):
        run.going(16)
        run.kill_lane("worker")
    run.drain()


# F2: processes that die at one point


def _dies_at(run: Run, point: crashing.Point) -> None:
    """A process kills itself there, comes back, and does so again."""
    deaths = run.pick(2, 5)
    # A sweeper comes by twice a second, work or none.
    passage = run.rng.randint(2, 5) if point.process == "sweeper" else run.rng.randint(1, 2)
    with run.dying(point.process, point.name, passage, deaths) as notes:
        until = time.monotonic() + run.pick(40, 60)
        while _count(notes) < deaths and time.monotonic() < until:
            if not run.unended():
                # Each batch goes by all points.
                run.batch(96, delay_ms=50)
                for _ in range(4):
                    run.job()
            time.sleep(0.1)
            run.world.revive()
        run.drain()


def _count(notes: Path) -> int:
    return len(notes.read_text().split()) if notes.exists() else 0


SHORT_POINTS = ("claimed, not run", "stored, not committed", "committed, not acknowledged")
SCENARIOS += [
    Scenario(
        "F2",
        f"{point.process} dies: {point.name}",
        functools.partial(_dies_at, point=point),
        (kills,),
        short=point.name in SHORT_POINTS,
    )
    for point in crashing.POINTS
    if point.process != "gateway"
]


# F3: gateways that die with a job in their hands


def _gateway_dies(run: Run, point: str) -> None:
    """Clients send again under the key they had: it is the same job."""
    deaths = run.pick(3, 15)
    with run.dying("gateway", point, run.rng.randint(8, 12), deaths) as notes:
        run.trickle(run.pick(100, 600), rate=60, threads=8)
        while run.submitting:
            run.world.revive()
            time.sleep(0.05)
        if not _count(notes):
            run.problems.append("the gateway never died")
        run.drain()


SCENARIOS += [
    Scenario(
        "F3",
        f"gateway dies: {point.name}",
        functools.partial(_gateway_dies, point=point.name),
        (kills,),
    )
    for point in crashing.POINTS
    if point.process == "gateway"
]


# F4: Redis


@scenario("F4", "FLUSHALL under load", survives(*PRODUCT), short=True)
def flushed(run: Run) -> None:
    """Everything Redis knows is gone, again and again."""
    run.batch(run.pick(1200, 6000), delay_ms=250)
    run.trickle(run.pick(60, 300), rate=20)
    run.going(16)
    for _ in range(run.pick(4, 15)):
        with run.world.redis() as client:
            client.flushall()
        time.sleep(run.rng.uniform(0.2, 1.2))


@scenario("F4", "Redis killed", kills, survives(*PRODUCT), resumes(10))
def redis_killed(run: Run) -> None:
    run.batch(run.pick(800, 5000), delay_ms=500)
    run.going(16)
    run.storm(("redis",), kills=run.pick(3, 12), every=2)


@scenario("F4", "Redis 10 s away", survives(*PRODUCT))
def redis_away(run: Run) -> None:
    """Jobs are accepted meanwhile, and soon."""
    run.batch(2000, delay_ms=250)
    run.going(16)
    with run.world.without("redis"):
        run.trickle(100, rate=12)
        time.sleep(10)
        took = sorted(took for _, took in run.client.submits)
        refused = sum(status != 202 for status, _ in run.client.submits)
        if refused:
            run.problems.append(f"{refused} submits were refused while Redis was away")
        if took and took[int(0.99 * (len(took) - 1))] > 1.0:
            run.problems.append(f"accepting took {took[int(0.99 * (len(took) - 1))]:.2f} s (p99)")
    run.going(16, within=10)


@scenario("F4", "Redis pauses", survives(*PRODUCT))
def redis_paused(run: Run) -> None:
    run.batch(2000, delay_ms=250)
    run.trickle(100, rate=10)
    for _ in range(3):
        run.going(16)
        with run.world.redis() as client:
            client.execute_command("CLIENT", "PAUSE", "4000")
        time.sleep(5)


@scenario("F4", "Redis full", survives("gateway", "sweeper"))
def redis_full(run: Run) -> None:
    run.batch(2000, delay_ms=250)
    run.trickle(150, rate=12)
    run.going(16)
    with run.world.redis() as client:
        client.config_set("maxmemory", "1")
        time.sleep(8)
        client.config_set("maxmemory", "512mb")
    run.going(16, within=15)


# F5, F10: networks


@contextlib.contextmanager
def _apart(run: Run) -> Iterator[network.Namespace]:
    """The worker runs in a network namespace of its own."""
    with _skipped(network.Impossible), network.namespace(run.world.env) as inside:
        command = _prefixed(inside.prefix)
        with run.world.altered("worker", env=inside.env, command=command):
            yield inside


def _prefixed(prefix: Sequence[str]) -> Callable[[Sequence[str | Path]], Sequence[str | Path]]:
    return lambda words: [*prefix, *words]


def _cut_off(run: Run, services: Sequence[str]) -> None:
    with _apart(run) as inside:
        run.batch(1200, delay_ms=250)
        run.going(32)
        with inside.cut(*services):
            # What was on its way has arrived, or never will; then one lease more.
            time.sleep(LEASE + 1)
            before = run.committed
            time.sleep(8)
            if "postgres" in services and run.committed > before:
                run.problems.append("a worker that is cut off committed")
        run.going(16, within=30)
        run.drain()


SCENARIOS += [
    Scenario(
        "F10" if len(services) > 1 else "F5",
        f"worker cut off from {', '.join(services)}",
        functools.partial(_cut_off, services=services),
    )
    for services in (*((name,) for name in network.SERVICES), network.SERVICES)
]


# F6: Postgres


@scenario("F6", "Postgres killed", kills, survives(*PRODUCT), resumes(10))
def postgres_killed(run: Run) -> None:
    run.batch(run.pick(800, 5000), delay_ms=500)
    run.trickle(run.pick(50, 300), rate=10)
    run.going(16)
    run.storm(("postgres",), kills=run.pick(4, 20), every=2)


@scenario("F6", "connections cut while committing", survives(*PRODUCT))
def backends_terminated(run: Run) -> None:
    """Whether the commit before the cut counts, nobody was told."""
    run.batch(run.pick(1000, 4000), delay_ms=200)
    run.trickle(run.pick(100, 400), rate=30)
    until = time.monotonic() + 60
    while (run.unended() or run.submitting) and time.monotonic() < until:
        run.world.journal.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
            " AND application_name = 'tidegate' AND random() < 0.5"
        )
        time.sleep(run.rng.uniform(0.1, 0.5))


# F7: Triton


@scenario("F7", "Triton killed", kills, survives(*PRODUCT))
def triton_killed(run: Run) -> None:
    run.batch(run.pick(1000, 4000), delay_ms=600)
    run.going(16)
    run.storm(("triton",), kills=run.pick(3, 8), every=3)


@scenario("F7", "Triton's server stopped for 10 s", survives(*PRODUCT))
def triton_frozen(run: Run) -> None:
    """The server alone. Where the processes of Python models stop as well, if only for 3 s, Triton
    2.51 takes them for dead, and when they come back answers requests with what others asked for:
    to any client of its own, and nobody behind it can tell."""
    run.batch(1500, delay_ms=300)
    run.going(16)
    with run.frozen("triton", children=False):
        time.sleep(10)
    run.going(16, within=30)


@scenario("F7", "a model 20 times slower", once, survives(*PRODUCT))
def triton_slow(run: Run) -> None:
    """Slower than a lease is long: it is renewed."""
    run.batch(320, delay_ms=100)
    run.batch(64, delay_ms=int((LEASE + 2) * 1000))


@scenario("F7", "a model unloaded and loaded again", resumes(10), survives(*PRODUCT), short=True)
def model_unloaded(run: Run) -> None:
    """Who waits is told at once; what was accepted waits for it; other models answer on. Recovery:
    from the model's return to the next commit."""
    run.batch(run.pick(400, 3000), delay_ms=200)
    run.trickle(run.pick(30, 300), rate=run.pick(20, 8))
    back: list[float] = []
    with tritonclient.InferenceServerClient(run.world.env["TIDEGATE_TRITON_URL"]) as triton:
        for _ in range(run.pick(1, 6)):
            run.going(16)
            triton.unload_model("identity")
            try:
                until = time.monotonic() + run.rng.uniform(1, run.pick(2, 6))
                while time.monotonic() < until:
                    _refused_while_away(run)
                    time.sleep(0.1)
            finally:
                triton.load_model("identity")
            back.append(run.resumed(within=20))
        run.trickle(run.pick(10, 40), rate=20)
        run.verdict = replace(run.finish(), recovery=back)


def _refused_while_away(run: Run) -> None:
    """Realtime for a model that is not loaded, and for one that is."""
    reply = run.client.realtime("identity", ask(1))
    if reply.status != 503 or "Retry-After" not in reply.headers:
        run.problems.append(f"a model that is away answered {reply.status} {reply.body[:200]!r}")
    reply = run.client.realtime("digits", DIGIT)
    if reply.status != 200:
        run.problems.append(f"another model answered {reply.status} {reply.body[:200]!r}")


# F8: the object store


@contextlib.contextmanager
def _objects_at(run: Run, url: str, holds: Holds, **settings: str) -> Iterator[list[float]]:
    """The product keeps its objects elsewhere meanwhile. Judged before that ends, with the
    recovery that was noted in the list; the processes have to live through it."""
    noted: list[float] = []
    before, run.world.holds = run.world.holds, holds
    try:
        with run.world.altered(*PRODUCT, env={"TIDEGATE_OBJECTS_URL": url, **settings}):
            run.pids = {name: run.stack.pid(name) for name in PRODUCT}
            yield noted
            verdict = replace(run.finish(), recovery=noted)
            died = survives(*PRODUCT)(run, verdict)
            run.verdict = replace(verdict, problems=(*verdict.problems, *died))
    finally:
        run.world.holds = before


@scenario("F8", "30 % of writes to the store fail", survives("gateway", "sweeper"))
def flaky_store(run: Run) -> None:
    """Half of those after they succeeded."""
    with run.world.altered("worker", env={"CHAOS_STORE": "0.3"}):
        run.batch(run.pick(300, 1500), delay_ms=20)
        run.drain()


@scenario("F8", "S3 fails at 10 %, 50 % and all of what it is asked")
def s3_fails(run: Run) -> None:
    """Before or after it did what it was asked, slowly, or in the middle of an answer. Large and
    small, everything is kept there."""
    small = {"TIDEGATE_INLINE_BYTES": "1"}
    with (
        contextlib.closing(FaultyS3(run.world.seed)) as s3,
        _objects_at(run, s3.url, s3.holds, **small) as recovery,
    ):
        for s3.rate, lines in ((0.1, run.pick(200, 1600)), (0.5, run.pick(64, 480))):
            run.batch(lines, delay_ms=20)
            run.trickle(lines // 8, rate=10)
            run.drain()
        if unseen := s3.weights.keys() - {Fault.HANGING} - s3.faults.keys():
            run.problems.append(f"never happened: {', '.join(fault.value for fault in unseen)}")
        s3.rate = 0.0
        run.batch(run.pick(320, 960), delay_ms=400)
        run.going(16)
        s3.rate, s3.weights = 1.0, {Fault.BUSY: 1}
        status = run.client.once("POST", "/v1/files", *form(b"{}")).status
        if status != 503:
            run.problems.append(f"a file that cannot be stored was answered with {status}")
        time.sleep(run.pick(2, 8))
        s3.rate, s3.weights = 0.1, WEIGHTS
        recovery.append(run.resumed(within=60))
        run.drain()


# F9: clocks


@contextlib.contextmanager
def _clock(run: Run, offset: str) -> Iterator[Path]:
    """A second worker whose clock is wrong. Gives the file that says by how much."""
    if not FAKETIME.exists():
        raise Skip(f"{FAKETIME} is not there: apt-get install faketime")
    file = run.stack.var / "chaos-clock"
    file.write_text(f"{offset}\n")
    env = {
        **run.stack.processes["worker"].env,
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    with run.world.another("skewed", env=env):
        yield file
        # It did its share: what it was told about its commits, it said under its process id.
        said = {f"pid {process.pid}" for process in run.stack.family("skewed")}
        if not any(entry.worker in said for entry in run.world.journal.entries(run.since)):
            run.problems.append("the worker whose clock is wrong did nothing")


def _skewed(run: Run, offset: str) -> None:
    with _clock(run, offset):
        run.batch(640, delay_ms=500)
        run.trickle(60, rate=15)
        run.drain()


SCENARIOS += [
    Scenario(
        "F9",
        f"a worker's clock {offset} s",
        functools.partial(_skewed, offset=offset),
        (once, survives(*PRODUCT)),
    )
    for offset in ("+60", "-60", "+3600", "-3600")
]


@scenario("F9", "a worker's clock steps back mid-lease", once, survives(*PRODUCT))
def clock_steps(run: Run) -> None:
    with _clock(run, "+0") as file:
        run.batch(1280, delay_ms=1000)
        for offset in ("-90", "+0", "-3600", "+600"):
            run.going(16)
            file.write_text(f"{offset}\n")
            time.sleep(1)
        run.drain()


# F11: a worker that was away without knowing


@scenario("F11", "a worker stopped for 3 leases", taken_over, short=True)
def worker_frozen(run: Run) -> None:
    """Another one takes over; what the first wakes up with is stale."""
    with run.world.another("worker-1"):
        run.batch(run.pick(600, 3000), delay_ms=1000)
        for _ in range(run.pick(1, 4)):
            run.going(32)
            with run.frozen("worker"):
                time.sleep(3 * LEASE)
            time.sleep(1)
        run.drain()


# F12: no room


@scenario("F12", "the object store's disk is full")
def disk_full(run: Run) -> None:
    """What cannot be stored is not accepted, and what was accepted waits for room."""
    folder = run.stack.var / "small"
    with (
        _skipped(disks.Impossible),
        disks.small(folder, 8 * disks.MIB),
        _objects_at(run, folder.as_uri(), lambda key: (folder / key).exists()) as recovery,
    ):
        run.batch(800, delay_ms=300)
        run.going(16)
        with disks.full(folder):
            status = run.client.once("POST", "/v1/files", *form(bytes(100_000))).status
            if status != 503:
                run.problems.append(f"a file that cannot be stored was answered with {status}")
            time.sleep(5)
        recovery.append(run.resumed(within=40))


@contextlib.contextmanager
def _cramped(run: Run, name: str, room: int) -> Iterator[Path]:
    """The disk of a store has little room meanwhile. Gives its folder."""
    folder = run.stack.var / name
    with contextlib.ExitStack() as disk:
        with run.world.without(name), _skipped(disks.Impossible):
            disk.enter_context(disks.cramped(folder, room))
        yield folder
        with run.world.without(name):
            disk.close()


def _answers_with(run: Run, allowed: set[int], seconds: float) -> None:
    """What is submitted meanwhile is refused in words, or accepted and kept."""
    before = len(run.client.submits)
    time.sleep(seconds)
    statuses = {status for status, _ in run.client.submits[before:]}
    if not statuses <= allowed:
        run.problems.append(f"submits were answered with {statuses - allowed}")


@scenario("F12", "Postgres' disk is full", survives(*PRODUCT), resumes(10))
def ledger_full(run: Run) -> None:
    """First its tables find no room: it refuses, and so do we. Then its log: it ends itself, and
    does not come up again before there is some."""
    back: list[float] = []
    with _cramped(run, "postgres", 48 * disks.MIB) as folder:
        run.batch(run.pick(800, 3000), delay_ms=250)
        run.trickle(run.pick(100, 400), rate=12)
        run.going(16)
        for _ in range(run.pick(1, 3)):
            with disks.full(folder):
                _answers_with(run, {202, 503}, run.pick(3, 5))
            back.append(run.resumed(within=40))
        if 503 not in {status for status, _ in run.client.submits}:
            run.problems.append("nothing was refused: was there room?")
        with disks.full(folder), _without_a_log(run):
            _answers_with(run, {202, 503}, run.pick(2, 8))
        back.append(run.resumed(within=40))
        run.drain()
    run.verdict = replace(run.finish(), recovery=back)


@contextlib.contextmanager
def _without_a_log(run: Run) -> Iterator[None]:
    """Postgres' log is full to its last byte, which it does not survive, nor a start meanwhile."""
    text = "SELECT pg_logical_emit_message(false, 'chaos', %s)"

    def ended() -> bool:
        with contextlib.suppress(psycopg2.Error):
            run.world.journal.sql(text, "x" * disks.MIB, patience=0)
        return not run.stack.alive("postgres")

    run.world.wanted.remove("postgres")
    try:
        run.until(ended, 30, "Postgres ends without room for its log")
        with contextlib.suppress(StackError):
            run.stack.start(only=("postgres",))
        yield
    finally:
        run.world.wanted.add("postgres")


@scenario("F12", "Redis' disk is full", survives(*PRODUCT), resumes(10))
def hints_full(run: Run) -> None:
    """It takes no command that writes. Jobs are accepted: they need none."""
    back: list[float] = []
    with _cramped(run, "redis", 48 * disks.MIB) as folder:
        # As some keep theirs.
        with run.world.redis() as client:
            client.config_set("appendonly", "yes")
        run.batch(run.pick(800, 3000), delay_ms=250)
        run.trickle(run.pick(100, 400), rate=12)
        for _ in range(run.pick(1, 3)):
            run.going(16)
            with disks.full(folder):
                run.until(lambda: _refuses_writes(run), 10, "Redis writes on")
                _answers_with(run, {202}, run.pick(3, 6))
                reply = run.client.realtime("identity", ask(1))
                if reply.status != 503:
                    run.problems.append(f"realtime was answered {reply.status} {reply.body!r}")
            back.append(run.resumed(within=40))
        run.drain()
    run.verdict = replace(run.finish(), recovery=back)


def _refuses_writes(run: Run) -> bool:
    with run.world.redis() as client, contextlib.suppress(redis.RedisError):
        client.set("tidegate:chaos", "x", px=1000)
        return False
    return True


# F13: poison


def _poison(run: Run, value: int, lines: int, singles: int) -> None:
    """One item in a hundred hurts who runs it: it is put aside after 3 attempts of its own."""
    settings = {
        "TIDEGATE_MAX_ATTEMPTS": "3",
        "TIDEGATE_ATTEMPT_TIMEOUT": str(2 * LEASE),
        "CHAOS_GRACE": "3",
    }
    poison = Item(value, Due.ERROR)
    with run.world.altered(*PRODUCT, env=settings):
        items = run.items(lines)
        for name in run.rng.sample(sorted(items), max(1, lines // 100)):
            items[name] = poison
        run.client.batch(items)
        bad = [run.client.job(poison) for _ in range(max(1, singles // 100))]
        for _ in range(singles):
            run.job()
        run.drain(within=run.pick(240, 400))
        for (tried,) in run.world.journal.sql(
            "SELECT attempts FROM chunks WHERE job_id = ANY(%s::uuid[])", list(map(str, bad))
        ):
            if tried != 3:
                run.problems.append(f"poison was tried {tried} times, not 3")


@scenario("F13", "poison that kills its worker, 1 %", short=True)
def poison_kills(run: Run) -> None:
    _poison(run, crashing.KILLS, run.pick(64, 400), run.pick(30, 100))


@scenario("F13", "poison that hangs its worker, 1 %")
def poison_hangs(run: Run) -> None:
    _poison(run, crashing.HANGS, run.pick(64, 200), run.pick(30, 100))


# F14: too much


@scenario("F14", "more submitted than is done", survives(*PRODUCT))
def overload(run: Run) -> None:
    """Sixteen clients submit as fast as they can, each job slower than that; the queue in the
    broker stays small, and realtime is answered."""
    waits: list[int] = []
    run.trickle(run.pick(500, 4000), rate=10_000, threads=16, delay_ms=20)
    run.batch(1000, delay_ms=50)
    until = time.monotonic() + run.pick(5, 20)
    longest = 0
    while time.monotonic() < until and run.submitting:
        longest = max(longest, run.world.journal.hints())
        waits.append(run.client.realtime("identity", ask(1)).status)
        time.sleep(0.1)
    if longest > 200:
        run.problems.append(f"{longest} messages waited in the broker")
    if waits and waits.count(200) < 0.9 * len(waits):
        run.problems.append(f"realtime was answered {waits.count(200)} times of {len(waits)}")


@contextlib.contextmanager
def _little_capacity(run: Run) -> Iterator[None]:
    """The model runs two batches of four at a time, so that this machine can ask for more."""
    with tritonclient.InferenceServerClient(run.world.env["TIDEGATE_TRITON_URL"]) as triton:
        config = triton.get_model_config("identity", as_json=True)["config"]
        config["max_batch_size"] = 4
        config["instance_group"] = [{"name": "two", "count": 2, "kind": "KIND_CPU"}]
        config["dynamic_batching"].pop("preferred_batch_size", None)
        triton.load_model("identity", config=json.dumps(config))
        try:
            # A worker remembers for a while how much a model takes at once.
            with run.world.altered("worker"):
                run.pids["worker"] = run.stack.pid("worker")
                yield
        finally:
            run.pids["worker"] = run.stack.pid("worker")
            triton.unload_model("identity")
            triton.load_model("identity")


@scenario("F14", "2, 5 and 10 times as much asked as can be done", survives(*PRODUCT))
def flooded(run: Run) -> None:
    """For ten minutes, and then it is as before. How many are answered in time is noted, and not
    judged: other work on the machine has a part in it. Batches go on meanwhile."""
    flood = Flood(
        run.world.env["TIDEGATE_URL"],
        "/v2/models/identity/infer",
        {"Authorization": f"Bearer {run.world.env['TIDEGATE_API_KEY']}"},
        json.dumps(ask(1, delay_ms=100)).encode(),
        deadline=FLOOD_DEADLINE,
    )
    with _little_capacity(run):
        with _batches(run):
            run.going(16)
            normal = _flooded(run, flood)
        run.drain()
    run.verdict = replace(run.finish(), recovery=[normal])


@contextlib.contextmanager
def _batches(run: Run) -> Iterator[None]:
    """One after the other, meanwhile."""
    over = threading.Event()

    def submit() -> None:
        while not over.wait(0.2):
            if not run.unended():
                run.batch(480, delay_ms=100)

    run.behind(submit)
    try:
        yield
    finally:
        over.set()


def _flooded(run: Run, flood: Flood) -> float:
    """The floods. Seconds from their end until all is as before."""
    peak = flood.crowd(16, run.pick(5, 20))
    run.notes.append(f"16 clients: {peak}")
    for times in (2, 5, 10):
        before = run.committed
        tally = flood.flow(times * peak.goodput, run.pick(6, 200))
        share = tally.goodput / peak.goodput
        run.notes.append(f"{times} times that: {tally}; {share:.0%} of what it was")
        if odd := tally.statuses.keys() - {0, 200, 429, 503, 504}:
            run.problems.append(f"a flood was answered with {odd}")
        if run.committed == before:
            run.problems.append("the batch stood still")
    began = time.monotonic()
    while (calm := flood.flow(peak.goodput / 4, 2)).statuses[200] < 0.95 * calm.sent:
        if time.monotonic() - began > 30:
            run.problems.append(f"30 s after the flood: {calm}")
            break
    return time.monotonic() - began


# F15: messages


@scenario(
    "F15", "messages repeated, reordered, stale, unknown, forged", survives(*PRODUCT), short=True
)
def messages(run: Run) -> None:
    """A message is only a hint: nothing happens that the ledger does not want."""
    run.batch(run.pick(400, 2500), delay_ms=600)
    run.trickle(run.pick(40, 200), rate=20)
    publisher = broker.Publisher(run.world.env)
    until = time.monotonic() + run.pick(5, 25)
    while time.monotonic() < until and (run.unended() or run.submitting):
        chunks = [row[0] for row in run.world.journal.sql("SELECT id FROM chunks ORDER BY id")]
        publisher.repeat(chunks, run.rng)
        publisher.forge(run.rng)
        time.sleep(0.3)
    publisher.close()


# F16: one key


@scenario("F16", "200 requests with one idempotency key, gateway killed", short=False)
def one_key(run: Run) -> None:
    """They are one job. The same key with another body is refused."""
    key = f"one-{run.rng.random()}"
    item = Item(4711)
    found: list[UUID] = []
    for _ in range(16):
        run.behind(lambda: found.extend(run.client.job(item, key=key) for _ in range(12)))
    time.sleep(0.2)
    run.crash("gateway")
    while run.submitting:
        time.sleep(0.1)
    if len(set(found)) != 1:
        run.problems.append(f"one key made {len(set(found))} jobs")
    try:
        run.client.job(Item(4712), key=key)
        run.problems.append("the key was taken for another body")
    except Refused as refused:
        if " 422 " not in str(refused):
            run.problems.append(f"the key with another body: {refused}")


# F17: restarts in order


@scenario("F17", "rolling restarts", once, no_5xx)
def rolling(run: Run) -> None:
    """Who is asked to stop ends what it has; nothing is run twice."""
    run.trickle(run.pick(150, 900), rate=15, threads=4)
    run.batch(run.pick(600, 8000), delay_ms=600)
    with run.world.another("worker-1"):
        for _ in range(run.pick(1, 5)):
            for name in ("worker", "gateway", "sweeper", "worker-1"):
                run.stack.stop(name)
                run.stack.start(only=(name,))
        run.drain()


# F18: called off, or late


@scenario("F18", "cancelled and late in every state")
def called_off(run: Run) -> None:
    """At any moment, the commit's included: one end, and no result after the cancel."""
    with run.world.without("worker"):
        queued = [run.job(Due.EITHER) for _ in range(10)]
        waiting = [run.client.batch(run.items(32, due=Due.EITHER)) for _ in range(2)]
        for job in queued[:5]:
            run.client.cancel(job)
        run.client.cancel(waiting[0], batch=True)
    count = run.pick(60, 300)

    def race(number: int) -> None:
        delay = run.rng.choice((0, 0, 20, 200))
        job = run.job(Due.EITHER, delay_ms=delay)
        time.sleep(run.rng.uniform(0, 0.15))
        run.client.cancel(job)

    def many() -> None:
        for number in range(count // 4):
            race(number)

    for _ in range(4):
        run.behind(many)

    def batches() -> None:
        for moment in (0.0, 0.1, 0.3, 0.6, 1.0, 1.5, 2.0):
            job = run.client.batch(run.items(320, due=Due.EITHER), delay_ms=400)
            time.sleep(moment)
            run.client.cancel(job, batch=True)

    def late() -> None:
        for _ in range(20):
            run.job(Due.EITHER, within=run.rng.uniform(0.3, 1.5), delay_ms=run.rng.randint(0, 1500))
        for window in (1, 2):
            run.client.batch(run.items(640, due=Due.EITHER), window=window, delay_ms=400)

    run.behind(batches)
    run.behind(late)
    run.batch(200, delay_ms=20)


@scenario("F18", "a running job called off: its slot at Triton", resumes(1.0), short=True)
def freed(run: Run) -> None:
    """Seconds from the request to cancel until Triton says that the call has ended."""
    url = f"{run.world.env['TIDEGATE_TRITON_HTTP_URL']}/v2/models/identity/stats"

    def running() -> bool:
        return bool(run.world.journal.sql("SELECT 1 FROM chunks WHERE state = 'running'"))

    def ended() -> int:
        with urlopen(url, timeout=5) as reply:
            (model,) = json.load(reply)["model_stats"]
        counts = model["inference_stats"]
        return int(counts["success"]["count"] + counts["fail"]["count"])

    took: list[float] = []
    for _ in range(run.pick(3, 50)):
        before = ended()
        job = run.job(Due.EITHER, delay_ms=60_000)
        run.until(running, 20, "nobody runs the job")
        # Claimed is not yet called: the call is what is to be ended.
        time.sleep(run.rng.uniform(0.1, 0.5))
        began = time.monotonic()
        run.client.cancel(job)
        while ended() == before and time.monotonic() - began < 10:
            time.sleep(0.01)
        took.append(time.monotonic() - began)
    run.verdict = replace(run.finish(), recovery=took)
