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
def test_a_terminal_chunk_is_no_source_of_anything(target: ChunkState) -> None:
    assert not any(state.terminal for state in chunk_sources(target))
