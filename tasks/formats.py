"""What a batch reads and writes, apart from how it is run.

A format cuts a file into ranges, reads a range as packs (requests the model takes as they are, and
what each stands for), and makes one output file of what the ranges came to. Errors are lines of
JSON whatever the format; `batches` writes those, and runs the packs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    """Its line in the file, from 1, or its row, from 0."""
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
    rows: int
    """All of them together."""

    @property
    def items(self) -> int:
        return len(self.members)

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
            Pack(replace(self.request, inputs=inputs, id=member.request_id), (member,), member.rows)
            for member, inputs in zip(self.members, columns, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Refused:
    """An item that can't be run, or several that lie together, for one reason."""

    number: int
    custom_id: str | None
    code: str
    message: str
    items: int = 1


@dataclass(frozen=True, slots=True)
class Planned:
    """What reading a file in came to."""

    ranges: list[ChunkPlan]
    layout: Mapping[str, Any] | None = None
    """What every range has to know of the file."""
    staged: str | None = None
    """Key of the object that the ranges lie in, where that is not the file itself."""


Dropped = Callable[[ChunkOutput], Iterable[Refused]]


def nothing(part: ChunkOutput) -> Iterable[Refused]:
    """Every answer of the part has its place."""
    return ()


@dataclass(frozen=True, slots=True)
class Output:
    """An output file, about to be put together."""

    blocks: Iterable[bytes]
    dropped: Dropped = nothing
    """Answers of a part that have no place in it."""


@dataclass(frozen=True, slots=True)
class Source:
    """The input file, for as long as somebody wants what is made of it."""

    objects: ObjectStore
    key: str
    wanted: CancelToken
    staging: str = ""
    """Key for what is made of the file before it is run."""

    def blocks(self, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Bytes `start` to `end`, going on where the store stumbles. Raises `Cancelled`."""
        for block in objects.steadily(self.objects, self.key, start, end):
            self.wanted.check()
            yield block

    def size(self) -> int:
        return self.objects.size(self.key)

    def stage(self, blocks: Iterable[bytes]) -> str:
        """Store these; under which key."""
        self.objects.put(self.staging, blocks)
        return self.staging


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

    @property
    def suffix(self) -> str:
        """Of the output file's name."""

    def plan(self, source: Source, limits: Limits) -> Planned:
        """Cut the file into ranges. Raises `FileErrors`."""

    def pieces(
        self, source: Source, whole: ChunkPlan, each: int, limits: Limits
    ) -> list[ChunkPlan]:
        """A range again, as ranges of `each` items."""

    def read(
        self,
        source: Source,
        claim: Claim,
        spec: ModelSpec,
        limits: Limits,
        enough: Callable[[], bool],
    ) -> Iterator[Pack | Refused | ChunkPlan]:
        """Every item of a range once: in packs of up to `max_batch_size` rows and `pack_bytes`
        bytes, of which only those not yet full are kept; or refused. Once it is `enough`, which is
        asked now and then, what has been read is handed out, and then, as the last, what has not:
        at least one item has been read by then."""

    def undone(
        self, source: Source, part: Range, limits: Limits, code: str, message: str
    ) -> Iterator[Refused]:
        """The items of a range that was not run, for this reason."""

    def writer(self, claim: Claim, spec: ModelSpec) -> Writer:
        """For the answers of one range."""

    def output(self, source: Source, parts: Sequence[ChunkOutput], objects: ObjectStore) -> Output:
        """The output file, of the ranges' objects (`output_key`), in their order. A part that was
        not run, or of which nothing was answered, has none."""

    def refused_line(self, claim: Claim, item: Refused) -> bytes:
        """The line of the error file for what was not run."""

    def failed_line(self, claim: Claim, member: Member, error: TidegateError) -> bytes:
        """The line of the error file for what the model failed at."""
