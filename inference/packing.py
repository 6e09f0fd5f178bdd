"""Many small requests as few large ones, and their answers cut apart again.

Triton batches by itself, but each request costs it, gRPC and us a fixed price; rows of one
request cost nearly nothing. Requests are merged where the model cannot tell the difference: same
inputs but for the first dimension, same outputs wanted, no parameter that means anything to it.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from errors import BadTensor
from inference.tensors import (
    InferRequest,
    InferResult,
    Tensor,
    bytes_offsets,
    check_raw,
    element_count,
)

SCHEDULING = frozenset({"priority", "timeout"})
"""Parameters that are for Triton's queue, not for the model: equal ones may share a request."""


class UnsplittableError(Exception):
    """The model's answer has no row per row asked: run the members of this pack one by one."""


@dataclass(frozen=True, slots=True)
class Member:
    """One request in a pack: its place among those given to `plan`, its rows, its id."""

    index: int
    rows: int
    id: str


@dataclass(frozen=True, slots=True)
class Pack:
    """One request to send, and the requests it stands for, in the order of its rows."""

    request: InferRequest
    members: tuple[Member, ...]

    @property
    def merged(self) -> bool:
        return len(self.members) > 1


def plan(
    requests: Sequence[InferRequest], max_batch_size: int, max_bytes: int | None = None
) -> list[Pack]:
    """Merge compatible requests of one batching model into packs; every request is in one pack.

    A pack has at most `max_batch_size` rows and `max_bytes` bytes of tensors, unless one request
    alone has more. `max_batch_size` 0 means that nothing is merged.
    """
    open_groups: dict[Hashable, _Group] = {}
    groups: list[_Group] = []
    for index, request in enumerate(requests):
        rows = rows_of(request) if max_batch_size > 1 else None
        size = sum(len(tensor.data) for tensor in request.inputs)
        member = Member(index, rows or 0, request.id)
        key = None if rows is None else signature(request)
        group = None if key is None else open_groups.get(key)
        if (
            group is None
            or group.rows + member.rows > max_batch_size
            or (max_bytes is not None and group.size + size > max_bytes)
        ):
            group = _Group([], [], 0, 0)
            groups.append(group)
            if key is not None:
                open_groups[key] = group
        group.requests.append(request)
        group.members.append(member)
        group.rows += member.rows
        group.size += size
    return [Pack(merge(group.requests), tuple(group.members)) for group in groups]


def single(request: InferRequest, index: int) -> Pack:
    """A request that goes alone."""
    return Pack(request, (Member(index, 0, request.id),))


def split(pack: Pack, result: InferResult) -> list[InferResult]:
    """The result of each member, in their order, with its own id.

    Raises UnsplittableError where an output does not have one row per row of the pack.
    """
    if not pack.merged:
        return [replace(result, id=pack.members[0].id)]
    shares = cut(result.outputs, [member.rows for member in pack.members])
    return [
        replace(result, outputs=outputs, id=member.id)
        for member, outputs in zip(pack.members, shares, strict=True)
    ]


def cut(tensors: Sequence[Tensor], rows: Sequence[int]) -> list[tuple[Tensor, ...]]:
    """Tensors as the tensors of several members, who have so many `rows` each.

    Raises UnsplittableError where one does not have as many rows as they have together.
    """
    cuts = [0, *itertools.accumulate(rows)]
    columns = [_cut(tensor, cuts) for tensor in tensors]
    return [tuple(column[at] for column in columns) for at in range(len(rows))]


@dataclass(slots=True)
class _Group:
    requests: list[InferRequest]
    members: list[Member]
    rows: int
    size: int


def rows_of(request: InferRequest) -> int | None:
    """The rows of a request that may share a pack; None if it must go alone."""
    if not request.inputs or not request.parameters.keys() <= SCHEDULING:
        return None
    counts = {tensor.shape[0] if tensor.shape else 0 for tensor in request.inputs}
    rows = counts.pop()
    return rows if rows > 0 and not counts else None


def signature(request: InferRequest) -> Hashable:
    """Requests of one signature may share a pack."""
    return (
        request.model,
        request.version,
        tuple((tensor.name, tensor.datatype, tensor.shape[1:]) for tensor in request.inputs),
        request.outputs,
        frozenset(request.parameters.items()),
    )


def merge(requests: Sequence[InferRequest]) -> InferRequest:
    """One request of several of one signature; it has no id where it stands for more than one."""
    first = requests[0]
    if len(requests) == 1:
        return first
    inputs = []
    for column in zip(*(request.inputs for request in requests), strict=True):
        shape = (sum(tensor.shape[0] for tensor in column), *column[0].shape[1:])
        data = b"".join(tensor.data for tensor in column)
        inputs.append(replace(column[0], shape=shape, data=data))
    return replace(first, inputs=tuple(inputs), id="")


def check_rows(tensor: Tensor, rows: int) -> None:
    """Raises UnsplittableError unless the tensor has a row for each of so many."""
    if not tensor.shape or tensor.shape[0] != rows:
        raise UnsplittableError(f"tensor {tensor.name!r} has shape {tensor.shape} for {rows} rows")
    try:
        check_raw(tensor)
    except BadTensor as error:
        raise UnsplittableError(error.message) from error


def _cut(tensor: Tensor, cuts: Sequence[int]) -> list[Tensor]:
    """One output as the outputs of the members: rows `cuts[i]` to `cuts[i + 1]` for member i."""
    total = cuts[-1]
    check_rows(tensor, total)
    width = element_count(tensor.shape[1:])
    if tensor.datatype == "BYTES":
        offsets = bytes_offsets(tensor)
        at = [offsets[row * width] for row in cuts]
    else:
        row_size = len(tensor.data) // total
        at = [row * row_size for row in cuts]
    view = memoryview(tensor.data)
    return [
        replace(tensor, shape=(last - first, *tensor.shape[1:]), data=view[begin:end])
        for (first, last), (begin, end) in zip(
            itertools.pairwise(cuts), itertools.pairwise(at), strict=True
        )
    ]
