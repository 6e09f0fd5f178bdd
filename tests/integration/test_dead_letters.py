"""Dead letters on a real Postgres: splitting what keeps failing, giving up, running again."""

from __future__ import annotations

import threading
from uuid import UUID, uuid4

import pytest

from errors import Gone, KeyReused, ModelNotReady, NotFound, Overran, TidegateError
from storage.dead_letters import DeadLetters, LetterFilter
from storage.idempotency import Once
from storage.lifecycle import ChunkKind
from storage.work import ChunkPlan, Claim, Done, Fate
from tests.conftest import Ledger
from tests.integration.test_ledger import claimed, lapse, planned, released, submit, submit_batch


@pytest.fixture
def letters(ledger: Ledger) -> DeadLetters:
    return DeadLetters(ledger.database)


def die(ledger: Ledger, claims: list[Claim], error: TidegateError | None = None) -> None:
    """Bury what was claimed."""
    fates = ledger.chunks.retry(claims, error or Gone("away for good"), 0)
    assert set(fates.values()) == {Fate.DEAD}


def listed(ledger: Ledger, letters: DeadLetters, **chosen: object) -> list[int]:
    rows = letters.list(
        ledger.tenant,
        after=None,
        limit=100,
        chosen=LetterFilter(**chosen),  # type: ignore[arg-type]
    )
    return [row.id for row in rows]


# Splitting


def test_a_split_chunk_becomes_pieces_with_attempts_of_their_own(ledger: Ledger) -> None:
    job_id, (chunk,) = planned(ledger, 4)
    for _ in range(2):
        lapse(ledger)
        ledger.backlog.sweep()
        (chunk,) = claimed(ledger)
    assert chunk.last
    pieces = [ChunkPlan(1, line, line * 10, (line + 1) * 10) for line in range(1, 5)]
    assert ledger.chunks.split(chunk, pieces)

    again = claimed(ledger)
    assert [(one.items, one.attempts, one.last) for one in again] == [(1, 1, False)] * 4
    assert sorted(one.first_line for one in again) == [1, 2, 3, 4]
    assert len({one.key("x") for one in again}) == 4
    assert ledger.chunks.commit([Done(one, 1, 0) for one in again]) == {one.id for one in again}
    row = ledger.jobs.get(ledger.tenant, job_id)
    assert (row.state, row.items_total, row.items_ok) == ("finalizing", 4, 4)


def test_the_answers_of_a_split_chunk_stand_between_their_neighbours(ledger: Ledger) -> None:
    _, (first, second) = planned(ledger, 2, 1)
    assert ledger.chunks.split(first, [ChunkPlan(1, 1, 10, 20), ChunkPlan(1, 2, 20, 30)])
    for claim in [second, *claimed(ledger)]:
        ledger.chunks.commit([Done(claim, 1, 0, output_key=f"line-{claim.first_line}")])
    (final,) = claimed(ledger)
    keys = [part.output_key for part in ledger.chunks.chunk_outputs(final)]
    assert keys == ["line-1", "line-2", "line-3"]


def test_a_stale_owner_splits_nothing(ledger: Ledger) -> None:
    _, (stale,) = planned(ledger, 2)
    lapse(ledger)
    ledger.chunks.claim([stale.id], "second")
    assert not ledger.chunks.split(stale, [ChunkPlan(1, 1, 10, 20), ChunkPlan(1, 2, 20, 30)])


def test_what_failed_once_shares_no_hint_and_its_last_attempt_runs_alone(ledger: Ledger) -> None:
    submit(ledger, 5)
    (first, *_) = claimed(ledger)
    for attempt in (1, 2):
        ledger.chunks.retry([first], Overran("too slow"), 0)
        submit(ledger, 5)
        hints = ledger.backlog.release(ledger.group)
        (mine,) = [hint for hint in hints if first.id in hint.ids]
        assert (mine.ids, mine.alone) == ((first.id,), attempt == 2)
        assert [len(hint.ids) for hint in hints if hint is not mine] == [5]
        (first,) = ledger.chunks.claim(mine.ids, "w")


# Giving up


def test_an_error_that_would_come_again_is_given_up_at_once(ledger: Ledger) -> None:
    (job_id,) = submit(ledger)
    (claim,) = claimed(ledger)
    assert ledger.chunks.retry([claim], NotFound("no such model"), 0) == {claim.id: Fate.DEAD}
    assert ledger.jobs.get(ledger.tenant, job_id).error["code"] == "not_found"


def test_a_store_that_stays_away_does_not_keep_a_batch_from_its_end(ledger: Ledger) -> None:
    job_id, (chunk,) = planned(ledger, 1)
    ledger.chunks.commit([Done(chunk, 1, 0)])
    (final,) = claimed(ledger)
    assert final.kind is ChunkKind.FINALIZE
    ledger.chunks.retry([final], ModelNotReady("away"), 0)
    ledger.sql("UPDATE jobs SET deadline_at = now() - interval '30 s' WHERE id = :id", id=job_id)
    assert ledger.backlog.sweep().expired == 0
    ledger.sql(
        "UPDATE jobs SET deadline_at = now() - interval '2 min',"
        " finalizing_at = now() - interval '2 min' WHERE id = :id",
        id=job_id,
    )
    assert ledger.backlog.sweep().expired == 1
    assert ledger.jobs.get(ledger.tenant, job_id).state == "failed"


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_batch_that_is_ended_long_after_its_deadline_still_gets_its_files(
    ledger: Ledger, cancelled: bool
) -> None:
    """Nobody swept for minutes: what had finished by then is not thrown away."""
    job_id, (one, _two) = planned(ledger, 3, 2)
    ledger.chunks.commit([Done(one, 3, 0, output_key="a")])
    ledger.sql("UPDATE jobs SET deadline_at = now() - interval '5 min' WHERE id = :id", id=job_id)
    if cancelled:
        ledger.jobs.cancel(ledger.tenant, job_id)
    ledger.backlog.sweep()
    (final,) = claimed(ledger)
    assert final.kind is ChunkKind.FINALIZE
    assert ledger.chunks.commit_files(final, None, None, ok=3, failed=2)
    state = ledger.jobs.get(ledger.tenant, job_id).state
    assert state == ("canceled" if cancelled else "expired")


# Listing and redriving


def test_a_dead_letter_says_what_died_and_why(ledger: Ledger, letters: DeadLetters) -> None:
    job_id, (one, _two) = planned(ledger, 3, 2)
    die(ledger, [one])
    (letter,) = listed(ledger, letters)
    row = letters.get(ledger.tenant, letter)
    assert (row.job_id, row.item_count, row.first_line, row.error["code"]) == (
        job_id,
        3,
        1,
        "gone",
    )
    assert listed(ledger, letters, job_id=job_id, model="digits", code="gone") == [letter]
    for other in ({"job_id": uuid4()}, {"model": "x"}, {"code": "x"}, {"redriven": True}):
        assert listed(ledger, letters, **other) == []


def test_a_redriven_job_runs_again_as_a_new_one_and_the_old_one_stays_as_it_ended(
    ledger: Ledger, letters: DeadLetters
) -> None:
    (old,) = submit(ledger)
    (claim,) = claimed(ledger)
    die(ledger, [claim])
    new = letters.redrive(ledger.tenant, claim.id)
    assert letters.redrive(ledger.tenant, claim.id) == new

    (again,) = claimed(ledger)
    assert (again.job_id, again.attempts, again.input) == (new, 1, b"input")
    ledger.chunks.commit([Done(again, 1, 0, output=b"answer")])
    assert ledger.jobs.get(ledger.tenant, old).state == "failed"
    row = ledger.jobs.get(ledger.tenant, new)
    assert (row.state, row.redrive_of) == ("succeeded", old)
    assert listed(ledger, letters, redriven=True) == [claim.id]


def test_a_redriven_batch_runs_its_dead_lines_only(ledger: Ledger, letters: DeadLetters) -> None:
    old, (one, two, three) = planned(ledger, 3, 2, 4)
    die(ledger, [one, three])
    ledger.chunks.commit([Done(two, 2, 0)])
    made = letters.redrive_all(ledger.tenant, LetterFilter(job_id=old), limit=10)
    assert (made.letters, made.gone, made.more) == (2, (), False)
    (new,) = made.jobs

    again = [claim for claim in claimed(ledger) if claim.job_id == new]
    assert [(c.items, c.first_line, c.byte_start) for c in again] == [(3, 1, 10), (4, 6, 60)]
    ledger.chunks.commit([Done(claim, claim.items, 0) for claim in again])
    row = ledger.jobs.get(ledger.tenant, new)
    assert (row.state, row.items_total, row.items_ok) == ("finalizing", 7, 7)
    assert letters.redrive_all(ledger.tenant, LetterFilter(), limit=10).jobs == ()


def test_a_batch_whose_file_could_not_be_read_in_starts_afresh(
    ledger: Ledger, letters: DeadLetters
) -> None:
    submit_batch(ledger)
    (plan,) = claimed(ledger)
    die(ledger, [plan])
    new = letters.redrive(ledger.tenant, plan.id)
    (again,) = claimed(ledger)
    assert (again.job_id, again.kind) == (new, ChunkKind.PLAN)
    assert ledger.chunks.commit_plan(again, [ChunkPlan(1, 1, 0, 10)])


def test_what_is_not_kept_any_more_is_not_run_again(ledger: Ledger, letters: DeadLetters) -> None:
    old, (one,) = planned(ledger, 1)
    die(ledger, [one])
    (single,) = submit(ledger)
    claims = [claim for claim in claimed(ledger) if claim.job_id == single]
    die(ledger, claims)
    ledger.sql("UPDATE files SET deleted_at = now()")
    ledger.sql("UPDATE jobs SET purged_at = now() WHERE id = :id", id=single)
    for claim in (one, *claims):
        with pytest.raises(Gone):
            letters.redrive(ledger.tenant, claim.id)
    made = letters.redrive_all(ledger.tenant, LetterFilter(), limit=10)
    assert (made.jobs, made.gone) == ((), (one.id, claims[0].id))
    assert ledger.jobs.get(ledger.tenant, old).state == "finalizing"


def test_a_letter_redriven_by_many_at_once_becomes_one_job(
    ledger: Ledger, letters: DeadLetters
) -> None:
    submit(ledger)
    (claim,) = claimed(ledger)
    die(ledger, [claim])
    made: list[UUID] = []
    threads = [
        threading.Thread(target=lambda: made.append(letters.redrive(ledger.tenant, claim.id)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 6
    assert len(set(made)) == 1
    assert len(released(ledger)) == 1


def test_letters_that_somebody_else_redrives_right_now_do_not_stand_before_the_others(
    ledger: Ledger, letters: DeadLetters
) -> None:
    submit(ledger, 5)
    claims = claimed(ledger)
    die(ledger, claims)
    oldest, *others = (claim.id for claim in claims)
    with ledger.database.transaction() as elsewhere:
        elsewhere.exec_driver_sql(f"SELECT FROM chunks WHERE id = {oldest} FOR UPDATE")
        made = letters.redrive_all(ledger.tenant, LetterFilter(), limit=2)
        assert (made.letters, made.more) == (2, True)
        made = letters.redrive_all(ledger.tenant, LetterFilter(), limit=2)
        assert (made.letters, made.more) == (2, False)
    assert listed(ledger, letters, redriven=True) == sorted(others, reverse=True)


def test_an_input_that_is_being_taken_away_is_gone_and_is_not_waited_for(
    ledger: Ledger, letters: DeadLetters
) -> None:
    submit(ledger)
    (claim,) = claimed(ledger)
    die(ledger, [claim])
    job = str(claim.job_id)
    with ledger.database.transaction() as retention:
        retention.exec_driver_sql("SELECT FROM jobs WHERE id = %s FOR UPDATE", (job,))
        with pytest.raises(Gone):
            letters.redrive(ledger.tenant, claim.id)
    assert letters.redrive(ledger.tenant, claim.id)


def once(ledger: Ledger, fingerprint: bytes = b"asked") -> Once:
    return Once(ledger.tenant, "POST /redrive", "key", fingerprint, ttl=86_400)


def test_a_bulk_redrive_sent_again_under_its_key_answers_the_same(
    ledger: Ledger, letters: DeadLetters
) -> None:
    submit(ledger, 3)
    claims = claimed(ledger)
    die(ledger, claims[:2])
    first = letters.redrive_all(ledger.tenant, LetterFilter(), limit=10, once=once(ledger))
    die(ledger, claims[2:])
    again = letters.redrive_all(ledger.tenant, LetterFilter(), limit=10, once=once(ledger))
    assert again == first
    assert (first.again, again.again) == (False, True)
    assert len(first.jobs) == 2
    with pytest.raises(KeyReused):
        letters.redrive_all(ledger.tenant, LetterFilter(), limit=5, once=once(ledger, b"other"))
    assert len(letters.redrive_all(ledger.tenant, LetterFilter(), limit=10).jobs) == 1


def test_a_redrive_sent_again_under_its_key_is_the_same_and_another_one_is_refused(
    ledger: Ledger, letters: DeadLetters
) -> None:
    submit(ledger)
    (claim,) = claimed(ledger)
    die(ledger, [claim])
    new = letters.redrive(ledger.tenant, claim.id, once=once(ledger))
    assert letters.redrive(ledger.tenant, claim.id, once=once(ledger)) == new
    with pytest.raises(KeyReused):
        letters.redrive(ledger.tenant, claim.id, 5.0, once=once(ledger, b"other"))


def test_another_tenants_letters_are_not_found(ledger: Ledger, letters: DeadLetters) -> None:
    submit(ledger)
    (claim,) = claimed(ledger)
    die(ledger, [claim])
    for call in (letters.get, letters.redrive):
        with pytest.raises(NotFound):
            call(uuid4(), claim.id)
    assert letters.redrive_all(uuid4(), LetterFilter(), limit=10).letters == 0
    for missing in (letters.get, letters.redrive):
        with pytest.raises(NotFound):
            missing(ledger.tenant, 2**60)
