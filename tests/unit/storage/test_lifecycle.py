"""The transition tables hold together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from storage.lifecycle import (
    CHUNK_MOVES,
    JOB_MOVES,
    ChunkState,
    JobState,
    chunk_sources,
    sources,
)


def test_every_state_has_its_moves() -> None:
    assert set(JOB_MOVES) == set(JobState)
    assert set(CHUNK_MOVES) == set(ChunkState)


def test_the_terminal_states_are_the_ones_we_publish() -> None:
    assert {state for state in JobState if state.terminal} == {
        JobState.SUCCEEDED,
        JobState.FAILED,
        JobState.CANCELED,
        JobState.EXPIRED,
    }


@given(st.sampled_from(JobState), st.data())
def test_from_every_job_state_some_way_leads_to_an_end(
    state: JobState, data: st.DataObject
) -> None:
    for _ in range(len(JobState)):
        if state.terminal:
            return
        state = data.draw(st.sampled_from(sorted(JOB_MOVES[state])))
    assert state.terminal


@given(st.sampled_from(JobState))
def test_sources_are_the_moves_read_backwards(target: JobState) -> None:
    assert set(sources(target)) == {state for state in JobState if target in JOB_MOVES[state]}


@given(st.sampled_from(ChunkState))
def test_sources_of_chunks_are_the_moves_read_backwards(target: ChunkState) -> None:
    assert set(chunk_sources(target)) == {
        state for state in ChunkState if target in CHUNK_MOVES[state]
    }


@given(st.sampled_from(JobState), st.data())
def test_no_job_comes_back_to_a_state_it_has_left(state: JobState, data: st.DataObject) -> None:
    left = []
    while not state.terminal:
        left.append(state)
        state = data.draw(st.sampled_from(sorted(JOB_MOVES[state])))
        assert state not in left


@given(st.sampled_from(ChunkState), st.data())
def test_a_chunk_runs_before_it_is_done(state: ChunkState, data: st.DataObject) -> None:
    before = None
    for _ in range(10):
        if state.terminal:
            assert (state is ChunkState.DONE) <= (before in (None, ChunkState.RUNNING))
            return
        before, state = state, data.draw(st.sampled_from(sorted(CHUNK_MOVES[state])))


def test_whatever_is_open_can_be_called_off_or_run_out_of_time() -> None:
    still_open = {state for state in ChunkState if not state.terminal}
    for end in (ChunkState.CANCELED, ChunkState.EXPIRED, ChunkState.DEAD):
        assert set(chunk_sources(end)) == still_open


def test_a_batch_that_gathers_its_files_is_past_the_moment_to_cancel_it() -> None:
    assert JobState.CANCELED not in JOB_MOVES[JobState.FINALIZING]
    assert JobState.SUCCEEDED not in JOB_MOVES[JobState.CANCELLING]


@given(st.sampled_from(ChunkState))
def test_a_terminal_chunk_is_no_source_of_anything(target: ChunkState) -> None:
    assert not any(state.terminal for state in chunk_sources(target))
