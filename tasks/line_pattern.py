"""Lines that are alike: read by a pattern and parsed many at once, where reading each by itself
costs more than running it.

Most files are written by a program: their lines are one text, but for the custom_id, the shapes and
the numbers. A pattern is made of a line that was read with all care. What matches it is, by JSON's
grammar, the same document with another string and other arrays in these places; and where the
shapes are those of a line that the model takes, only data is left to be looked at: brackets, commas
and numbers, those of a whole pack by one call each. Whatever is unusual in any way is given back,
to be read with all care as well: what is wrong with a line is said in one place only.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import orjson

from inference import packing
from inference.tensors import InferRequest, Tensor, datatype, element_count
from tasks.formats import Member, Pack

MOST_PATTERNS = 4
"""Of one range. What comes in more forms is read line by line."""
MOST_KINDS = 1000
"""Shapes of one range that are kept in mind."""

_KEYS: Final = re.compile(rb'"(custom_id|shape|data)"[ \t]*:[ \t]*')
_VALUES: Final[Mapping[bytes, re.Pattern[bytes]]] = {
    b"custom_id": re.compile(rb'"[^"]*"'),
    b"shape": re.compile(rb"\[[0-9, ]*\]"),
    b"data": re.compile(rb"\[[-+0-9.eE, \[\]]*\]"),
}
# Printable ASCII without quote and backslash: a string that means what it says.
_GROUPS: Final[Mapping[bytes, bytes]] = {
    b"custom_id": rb'"([ !#-\[\]-~]{1,512})"',
    b"shape": rb"(\[[0-9, ]*\])",
}
_DATA: Final[Mapping[str, bytes]] = {
    "i": rb"(\[[-0-9, \[\]]*\])",
    "u": rb"(\[[-0-9, \[\]]*\])",
    "f": rb"(\[[-+0-9.eE, \[\]]*\])",
}
_NUMERALS: Final = b"0123456789+-.eE "
_BRACKETS: Final = b"[]"

Found = re.Match[bytes]
Key = bytes | tuple[bytes, ...]
"""Shapes as they are written, of one input or several."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """Lines of one pattern and one key."""

    request: InferRequest
    """Of the first one, which the model takes."""
    rows: int | None
    """Of one line in a pack; None: it must go alone."""
    most: int
    """Lines in one pack."""
    frames: tuple[bytes, ...]
    """Each input's data without its numbers: brackets and commas."""


@dataclass(slots=True)
class Bundle:
    """Lines of one kind, up to a pack of them."""

    pattern: _Pattern
    kind: _Kind
    numbers: list[int] = field(default_factory=list)
    found: list[Found] = field(default_factory=list)

    @property
    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Their numbers and texts."""
        return zip(self.numbers, [found.string for found in self.found], strict=True)

    def pack(self) -> Pack | None:
        """None where there is something about the data: it is for the lines to say."""
        kind, count = self.kind, len(self.numbers)
        columns = [[found[at] for found in self.found] for at in self.pattern.data]
        inputs = []
        for tensor, frame, column in zip(kind.request.inputs, kind.frames, columns, strict=True):
            data = _numbers(column, tensor, frame)
            if data is None:
                return None
            shape = tensor.shape
            if kind.rows is not None:
                shape = (shape[0] * count, *shape[1:])
            inputs.append(Tensor(tensor.name, tensor.datatype, shape, data))
        name = kind.request.id
        fields = zip(
            self.numbers,
            [found[self.pattern.custom_id].decode() for found in self.found],
            itertools.repeat(kind.rows or 1),
            itertools.repeat(name),
        )
        request = replace(kind.request, inputs=tuple(inputs), id=name if count == 1 else "")
        members = list(map(Member._make, fields))
        return Pack(request, members, count * (kind.rows or 1))


def _numbers(column: Sequence[bytes], tensor: Tensor, frame: bytes) -> bytes | None:
    """The data of several tensors like this one, as `tensors.pack_json` makes it."""
    text, count = b",".join(column), len(column)
    if text.translate(None, _NUMERALS) != b",".join([frame] * count):
        return None
    # Each begins and ends with a bracket. Where those are all there is, none can be in two parts.
    nested = frame.count(b"[") > 1
    if nested and any(data.translate(None, _NUMERALS) != frame for data in column):
        return None
    try:
        values = orjson.loads(b"[" + text.translate(None, _BRACKETS) + b"]")
    except orjson.JSONDecodeError:
        return None
    dtype = datatype(tensor.datatype).dtype
    if dtype is None or len(values) != count * element_count(tensor.shape):
        return None
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            floats = np.array(values, dtype=dtype)
        return floats.tobytes() if np.isfinite(floats).all() else None
    # Of whole numbers numpy makes this, unless one is out of its range.
    integers = np.array(values)
    limits = np.iinfo(dtype)
    if (
        integers.dtype != np.int64
        or integers.min() < limits.min
        or int(integers.max()) > limits.max
    ):
        return None
    return integers.astype(dtype).tobytes()


class _Pattern:
    """The text that lines have in common, and their kinds."""

    def __init__(self, expression: bytes, names: Sequence[bytes]):
        """`names` are those of the expression's groups."""
        self.match = re.compile(expression).fullmatch
        self.kinds: dict[Key, _Kind] = {}
        self.open: dict[Key, Bundle] = {}
        self.custom_id = names.index(b"custom_id") + 1
        self.data = [at for at, name in enumerate(names, start=1) if name == b"data"]
        self._shapes = [at for at, name in enumerate(names, start=1) if name == b"shape"]

    @classmethod
    def of(cls, text: bytes, request: InferRequest) -> _Pattern | None:
        """None for a line that is no pattern for others."""
        dtypes = [datatype(tensor.datatype).dtype for tensor in request.inputs]
        if b"\\" in text or any(dtype is None or dtype.kind not in _DATA for dtype in dtypes):
            return None
        kinds = iter([dtype.kind for dtype in dtypes if dtype is not None])
        names: list[bytes] = []
        expression: list[bytes] = []
        emptied: list[bytes] = []
        at = 0
        for key in _KEYS.finditer(text):
            value = _VALUES[key[1]].match(text, key.end())
            if value is None:
                return None
            names.append(key[1])
            fixed = text[at : value.start()]
            at = value.end()
            # A key too many is noticed below.
            group = _DATA[next(kinds, "f")] if key[1] == b"data" else _GROUPS[key[1]]
            expression += re.escape(fixed), group
            emptied += fixed, b'""' if key[1] == b"custom_id" else b"[]"
        expression.append(re.escape(text[at:]))
        emptied.append(text[at:])
        if len(names) != 1 + 2 * len(dtypes) or not _is_emptied(b"".join(emptied), text):
            return None
        return cls(b"".join(expression), names)

    def key(self, found: Found) -> Key:
        return found.group(*self._shapes)

    def frames(self, found: Found) -> tuple[bytes, ...]:
        return tuple(found[at].translate(None, _NUMERALS) for at in self.data)


def _is_emptied(emptied: bytes, text: bytes) -> bool:
    """Is this the text's document with its custom_id and its inputs' shapes and data empty, and
    nothing else? Then these places are what one takes them for."""
    document: dict[str, Any] = orjson.loads(text)
    body = document["body"]
    inputs = [one | {"shape": [], "data": []} for one in body["inputs"]]
    wanted = document | {"custom_id": "", "body": body | {"inputs": inputs}}
    try:
        return bool(orjson.loads(emptied) == wanted)
    except orjson.JSONDecodeError:
        return False


class Alike:
    """The patterns of one range, and the bundles that are not full yet."""

    def __init__(self, max_rows: int, max_bytes: int, max_line: int):
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._max_line = max_line
        self._patterns: list[_Pattern] = []
        self._given_up = 0

    def take(self, number: int, text: bytes) -> bool | Bundle:
        """Keep a line that is like one that was learnt: False where it is not; the bundle, where
        it is full with this line."""
        if len(text) > self._max_line:
            return False
        for pattern in self._patterns:
            found = pattern.match(text)
            if found is not None:
                break
        else:
            return False
        key = pattern.key(found)
        bundle = pattern.open.get(key)
        if bundle is None:
            kind = pattern.kinds.get(key)
            if kind is None:
                return False
            bundle = pattern.open[key] = Bundle(pattern, kind)
        bundle.numbers.append(number)
        bundle.found.append(found)
        if len(bundle.numbers) >= bundle.kind.most:
            return pattern.open.pop(key)
        return True

    def learn(self, text: bytes, request: InferRequest) -> None:
        """Those that are like this one, which the model takes, need not be read any more."""
        for pattern in self._patterns:
            found = pattern.match(text)
            if found is not None:
                if len(pattern.kinds) < MOST_KINDS:
                    self._keep(pattern, found, request)
                return
        if len(self._patterns) + self._given_up >= MOST_PATTERNS:
            return
        made = _Pattern.of(text, request)
        found = made.match(text) if made is not None else None
        if made is None or found is None:
            self._given_up += 1
            return
        self._keep(made, found, request)
        self._patterns.append(made)

    def _keep(self, pattern: _Pattern, found: Found, request: InferRequest) -> None:
        rows = packing.rows_of(request) if self._max_rows > 1 else None
        size = sum(len(tensor.data) for tensor in request.inputs)
        most = 1 if rows is None else min(self._max_rows // rows, self._max_bytes // max(1, size))
        kind = _Kind(request, rows, max(1, most), pattern.frames(found))
        # Of one shape, but in another form than the one before: whichever comes last is expected.
        pattern.kinds[pattern.key(found)] = kind

    def rest(self) -> Iterator[Bundle]:
        for pattern in self._patterns:
            yield from pattern.open.values()
            pattern.open.clear()
