"""Cutting a file of lines into ranges: one pass over the file, that looks at no more than it must.

A line that is wrong is left to its range, which puts it in the error file; what is noticed here is
what only a view of the whole file shows: its size, whether it holds JSON at all, and custom_ids
that are given twice. For these a number of 64 bits is kept of each; who shares one with another is
looked at once more, and word by word.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from storage.work import ChunkPlan
from tasks.batch_lines import BadLine, read_custom_id, read_document
from tasks.formats import FileErrors, Limits

Lines = Iterable[tuple[int, bytes]]
"""Pairs of a line's offset and its text."""

SUSPECTS = 1_000_000
"""Most numbers that one more look at the file is about: what bounds its memory."""

# In a text with no backslash, and with this key once, it is the custom_id, if anything is.
_CUSTOM_ID: Final = re.compile(rb'"custom_id"[ \t]*:[ \t]*"([ !#-\[\]-~]{1,512})"').search


def plan_file(read: Callable[[], Lines], limits: Limits) -> list[ChunkPlan]:
    """The ranges of the file whose lines `read` reads, from the first on; blank lines are passed
    over. Raises `FileErrors`."""
    plans: list[ChunkPlan] = []
    marks = array("q")
    has_json = False
    first_error: dict[str, Any] | None = None
    chunk = _Chunk()
    number = total = 0
    for number, (offset, text) in enumerate(read(), start=1):
        if chunk.full(offset, limits):
            plans.append(chunk.cut(offset))
            chunk = _Chunk()
        if not text.strip():
            continue
        if chunk.items == 0:
            chunk.start, chunk.first_line = offset, number
        chunk.items += 1
        chunk.end = offset + len(text)
        total += 1
        if total > limits.max_lines:
            raise FileErrors(
                [_file_error("too_many_lines", number, f"over {limits.max_lines} lines")]
            )
        if not has_json:
            try:
                if len(text) <= limits.max_line_bytes:
                    read_custom_id(read_document(text))
                has_json = True
            except BadLine as error:
                first_error = first_error or _file_error(error.reason, number, error.message)
                has_json = error.reason != "invalid_json"
        mark = _mark(text, limits)
        if mark is not None:
            marks.append(mark)
    if chunk.items:
        plans.append(chunk.cut(chunk.end))
    if not plans:
        raise FileErrors([_file_error("empty_file", None, "the file has no lines")])
    if not has_json:
        raise FileErrors([first_error or _file_error("invalid_json", 1, "no line is JSON")])
    suspects = _repeated(marks)
    del marks
    for at in range(0, len(suspects), SUSPECTS):
        some = frozenset(suspects[at : at + SUSPECTS].tolist())
        plans = _with_duplicates(plans, _duplicates(read(), some, limits))
    return plans


def _mark(text: bytes, limits: Limits) -> int | None:
    """A number for the line's custom_id: the same for the same one. None where it has none."""
    found = _CUSTOM_ID(text)
    if found is not None and b"\\" not in text and text.count(b'"custom_id"') == 1:
        return hash(found[1])
    custom_id = _careful(text, limits)
    return None if custom_id is None else hash(custom_id.encode())


def _careful(text: bytes, limits: Limits) -> str | None:
    """The custom_id of a line that has one, and is JSON."""
    if len(text) > limits.max_line_bytes:
        return None
    try:
        return read_custom_id(read_document(text))
    except BadLine:
        return None


def _repeated(marks: array[int]) -> npt.NDArray[np.int64]:
    """The numbers that are there more than once. Sorts them in place: there may be many."""
    numbers = np.frombuffer(marks, dtype=np.int64)
    numbers.sort()
    return np.unique(numbers[1:][numbers[1:] == numbers[:-1]])


def _duplicates(lines: Lines, suspects: frozenset[int], limits: Limits) -> Iterator[int]:
    """The numbers of lines whose custom_id an earlier line has."""
    seen: set[str] = set()
    for number, (_, text) in enumerate(lines, start=1):
        if text.strip() and _mark(text, limits) in suspects:
            custom_id = _careful(text, limits)
            if custom_id is None:
                continue
            if custom_id in seen:
                yield number
            seen.add(custom_id)


def _with_duplicates(plans: list[ChunkPlan], numbers: Iterable[int]) -> list[ChunkPlan]:
    ends = [plan.first_line for plan in plans[1:]]
    found: dict[int, list[int]] = {}
    at = 0
    for number in numbers:
        while at < len(ends) and number >= ends[at]:
            at += 1
        found.setdefault(at, []).append(number)
    return [
        replace(plan, duplicates=tuple(sorted((*plan.duplicates, *found[at]))))
        if at in found
        else plan
        for at, plan in enumerate(plans)
    ]


def _file_error(code: str, line: int | None, message: str) -> dict[str, Any]:
    return {"code": code, "line": line, "message": message, "param": None}


@dataclass(slots=True)
class _Chunk:
    items: int = 0
    first_line: int = 0
    start: int = 0
    end: int = 0

    def full(self, offset: int, limits: Limits) -> bool:
        return self.items >= limits.chunk_items or (
            self.items > 0 and offset - self.start >= limits.chunk_bytes
        )

    def cut(self, end: int) -> ChunkPlan:
        return ChunkPlan(self.items, self.first_line, self.start, end)
