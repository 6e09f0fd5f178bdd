"""What a batch reads and writes, apart from how it is run.

A format cuts a file into ranges, reads a range as packs (requests the model takes as they are, and
what each stands for), and makes one output file of what the ranges came to. Errors are lines of
JSON whatever the format; `batches` writes those, and runs the packs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from errors import TidegateError
from inference import packing
from inference.client import CancelToken
from inference.metadata import ModelSpec
from inference.tensors import InferRequest, InferResult
from storage import objects
from storage.objects import ObjectStore
from storage.work import ChunkOutput, ChunkPlan, Claim


@dataclass(frozen=True, slots=True)
class Limits:
    """How a file is cut, how long it may be, and how large a request."""

    chunk_items: int
    chunk_bytes: int
    max_lines: int
    max_line_bytes: int
    pack_bytes: int = 1 << 24
    """Most bytes of tensors in one pack, unless one row alone has more."""


class FileErrors(Exception):
    """The file as a whole can't be used; `errors` is OpenAI's `errors.data`."""

    def __init__(self, errors: list[dict[str, Any]]):
        super().__init__(errors[0]["message"])
        self.errors = errors


class Range(Protocol):
    """Items of the input file that lie together: a claim, a plan or an output of one has it."""

    @property
    def items(self) -> int: ...
    @property
    def first_line(self) -> int: ...
    @property
    def byte_start(self) -> int: ...
    @property
    def byte_end(self) -> int: ...


class Member(NamedTuple):
    """One item in a pack."""

    number: int
    """Its line, or row, in the file, from 1."""
    custom_id: str | None
    """What the client calls it."""
    rows: int = 1
    """How many rows of the pack are its own."""
    request_id: str = ""
    """The `id` of its request: its answer has the same."""


@dataclass(frozen=True, slots=True)
class Pack:
    """One request to send, and the items it stands for, in the order of its rows."""

    request: InferRequest
    members: Sequence[Member]

    def shares(self, result: InferResult) -> list[InferResult]:
        """The answer's part of each member. Raises `UnsplittableError`."""
        if len(self.members) == 1:
            return [replace(result, id=self.members[0].request_id)]
        columns = packing.cut(result.outputs, [member.rows for member in self.members])
        return [
            replace(result, outputs=outputs, id=member.request_id)
            for member, outputs in zip(self.members, columns, strict=True)
        ]

    def alone(self) -> list[Pack]:
        """One pack a member: for what the model fails at as a whole."""
        if len(self.members) == 1:
            return [self]
        columns = packing.cut(self.request.inputs, [member.rows for member in self.members])
        return [
            Pack(replace(self.request, inputs=inputs, id=member.request_id), (member,))
            for member, inputs in zip(self.members, columns, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Refused:
    """An item that can't be run."""

    number: int
    custom_id: str | None
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Source:
    """The input file, for as long as somebody wants what is made of it."""

    objects: ObjectStore
    key: str
    wanted: CancelToken

    def blocks(self, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Bytes `start` to `end`, going on where the store stumbles. Raises `Cancelled`."""
        for block in objects.steadily(self.objects, self.key, start, end):
            self.wanted.check()
            yield block

    def size(self) -> int:
        return self.objects.size(self.key)


class Writer(Protocol):
    """Makes one object of what one range's items came to. Packs may come in any order."""

    def answered(self, pack: Pack, result: InferResult) -> Sequence[tuple[Member, TidegateError]]:
        """Keep an answer; those members whose part of it has no form in this format. Of a pack of
        several members it has a row for every row; of a single one it may have any shape."""

    def missing(self, member: Member) -> None:
        """This one has no answer: it was refused, or failed."""

    def close(self) -> Sequence[bytes]:
        """All that was kept, in the order of the items, to be stored as this range's object;
        nothing where there is none."""


class Format(Protocol):
    """One kind of input file and the output file that goes with it. Stateless."""

    suffix: str
    """Of the output file's name."""

    def plan(self, source: Source, limits: Limits) -> list[ChunkPlan]:
        """Cut the file into ranges. Raises `FileErrors`."""

    def pieces(self, source: Source, claim: Claim, each: int, limits: Limits) -> list[ChunkPlan]:
        """A range again, as ranges of `each` items."""

    def read(
        self, source: Source, claim: Claim, spec: ModelSpec, limits: Limits
    ) -> Iterator[Pack | Refused]:
        """Every item of a range once: in packs of up to `max_batch_size` rows and `pack_bytes`
        bytes, of which only those not yet full are kept; or refused."""

    def names(
        self, source: Source, items: Range, limits: Limits
    ) -> Iterator[tuple[int, str | None]]:
        """Number and custom_id of every item of a range that was not run."""

    def writer(self, claim: Claim, spec: ModelSpec) -> Writer:
        """For the answers of one range."""

    def output(
        self, source: Source, parts: Sequence[ChunkOutput], objects: ObjectStore
    ) -> Iterable[bytes]:
        """The output file, of the ranges' objects (`output_key`), in their order. A part that was
        not run, or of which nothing was answered, has none."""
