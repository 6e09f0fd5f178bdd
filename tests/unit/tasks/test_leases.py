"""Leases: what is called off, why, and what is renewed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast
from uuid import uuid4

from errors import Cancelled, DeadlineExceeded, ModelFailed, Overran, TidegateError, Unavailable
from storage.chunks import Chunks
from storage.lifecycle import ChunkKind, JobKind
from storage.work import Claim
from tasks.leases import Leases

CLAIM = Claim(
    id=1,
    token=1,
    kind=ChunkKind.INFER,
    job_id=uuid4(),
    job_kind=JobKind.INFER,
    tenant_id=uuid4(),
    seq=1,
    model="m",
    version="",
    attempts=1,
    last=False,
    items=1,
    first_line=1,
    byte_start=0,
    byte_end=0,
    duplicates=(),
    remaining=100.0,
    input=None,
    input_key=None,
    endpoint="",
    file_key="",
    outcome=None,
)


class Book:
    """As much of `Chunks` as leases use."""

    def __init__(self) -> None:
        self.taken: set[int] = set()
        self.renewed: list[int] = []

    def renew(self, claims: Sequence[Claim]) -> None:
        self.renewed = [claim.id for claim in claims]

    def lost(self, claims: Sequence[Claim]) -> list[Claim]:
        return [claim for claim in claims if claim.id in self.taken]


def leases(book: Book, now: list[float]) -> Leases:
    made = Leases(cast("Chunks", book), every=1000, attempt_timeout=50, clock=lambda: now[0])
    made._thread = cast("Any", object())  # rounds are the test's
    return made


def test_what_somebody_else_has_by_now_is_called_off_and_its_neighbour_is_not() -> None:
    book = Book()
    held = leases(book, [0.0])
    with held.holding([CLAIM, replace(CLAIM, id=2)]) as (one, two):
        book.taken = {1}
        held.look()
        assert (one.token.cancelled, two.token.cancelled) == (True, False)
        assert isinstance(one.blame(Cancelled("by Triton")), Cancelled)
        assert isinstance(two.blame(ModelFailed("no")), ModelFailed)


def test_what_takes_too_long_is_called_off_and_not_renewed() -> None:
    book, now = Book(), [0.0]
    held = leases(book, now)
    with held.holding([CLAIM]) as (one,):
        now[0] = 49.9
        held.look()
        held.renew()
        assert (one.token.cancelled, book.renewed) == (False, [1])
        now[0] = 50
        held.look()
        held.renew()
        assert (one.token.cancelled, book.renewed) == (True, [])
        assert isinstance(one.blame(Cancelled("by Triton")), Overran)


def test_what_is_past_its_jobs_deadline_is_called_off() -> None:
    book, now = Book(), [0.0]
    held = leases(book, now)
    with held.holding([replace(CLAIM, remaining=10)]) as (one,):
        now[0] = 10
        held.look()
        assert isinstance(one.blame(Cancelled("by Triton")), DeadlineExceeded)


def test_a_time_limit_that_is_not_ours_is_nobodys_fault() -> None:
    held = leases(Book(), [0.0])
    with held.holding([CLAIM]) as (one,):
        assert isinstance(one.blame(DeadlineExceeded("Triton's own")), Unavailable)


def test_a_drained_process_calls_off_what_it_runs_and_what_it_still_takes() -> None:
    held = leases(Book(), [0.0])
    with held.holding([CLAIM]) as (one,):
        held.drain()
        with held.holding([replace(CLAIM, id=2)]) as (two,):
            reasons: list[TidegateError] = [
                which.blame(Cancelled("by Triton")) for which in (one, two)
            ]
    assert all(isinstance(reason, Unavailable) for reason in reasons)


def test_what_has_just_been_committed_is_not_lost() -> None:
    book = Book()
    held = leases(book, [0.0])

    def committed_meanwhile(claims: Sequence[Claim]) -> list[Claim]:
        ending.__exit__(None, None, None)
        return list(claims)

    book.lost = committed_meanwhile  # type: ignore[method-assign]
    ending = held.holding([CLAIM])
    (one,) = ending.__enter__()
    held.look()
    assert not one.token.cancelled
