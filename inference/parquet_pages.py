"""What the pages of a Parquet file say of themselves, looked at before somebody believes it.

A page begins with a header that tells its size, and how large it is without compression. The
library makes room for as much before it reads on: three bytes that are wrong, or meant so, cost it
gigabytes. So headers are walked through first. They are in Thrift's compact protocol, of which this
reads two numbers and passes over the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from errors import BadFile, Unsupported

MAX_PAGE: Final = 128 << 20
"""Bytes of one, without compression; writers make them of about one MiB."""
_WINDOW: Final = 1 << 16
"""Bytes that are read at a time, and most of one header."""

Read = Callable[[int, int], bytes]
"""(where, how many) to bytes; fewer at the file's end."""

_BOOLEANS: Final = (1, 2)
_BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 3, 7, 8, 9, 10, 12
_INTEGERS: Final = (4, 5, 6)
_UNCOMPRESSED, _COMPRESSED = 2, 3
_DEPTH: Final = 8


def check(read: Read, start: int, size: int) -> None:
    """The pages of one column of one row group, which lie in `size` bytes from `start` on. Raises
    `BadFile` where they don't; `Unsupported` for one larger than `MAX_PAGE`."""
    at, end = start, start + size
    window, begin = b"", at
    while at < end:
        if at + _WINDOW // 2 > begin + len(window) < end:
            window, begin = read(at, min(_WINDOW, end - at)), at
        try:
            header = _Header(window, at - begin)
        except (IndexError, RecursionError):
            raise BadFile("the header of a page of the Parquet file cannot be read") from None
        compressed, uncompressed = header.sizes
        at = begin + header.at + compressed
        if compressed < 0 or uncompressed < 0 or at > end:
            raise BadFile("a page of the Parquet file is larger than its column")
        if uncompressed > MAX_PAGE:
            raise Unsupported(
                f"a page of the Parquet file takes {uncompressed} bytes in memory, more than "
                f"{MAX_PAGE}; write it with smaller pages"
            )


class _Header:
    """One header, from `at` on; then `at` is behind it."""

    __slots__ = ("_data", "at", "sizes")

    def __init__(self, data: bytes, at: int):
        self._data = data
        self.at = at
        numbers = self._struct(_DEPTH)
        self.sizes = (numbers.get(_COMPRESSED, -1), numbers.get(_UNCOMPRESSED, -1))

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while shift < 70:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
        raise IndexError

    def _struct(self, depth: int) -> dict[int, int]:
        """Its integers, by the numbers of their fields."""
        if not depth:
            raise IndexError
        numbers: dict[int, int] = {}
        field = 0
        while byte := self._byte():
            delta, kind = byte >> 4, byte & 0x0F
            field = field + delta if delta else _signed(self._varint())
            if kind in _INTEGERS:
                numbers[field] = _signed(self._varint())
            elif kind not in _BOOLEANS:
                self._pass(kind, depth - 1)
        return numbers

    def _pass(self, kind: int, depth: int) -> None:
        if kind in _BOOLEANS or kind == _BYTE:
            self.at += 1
        elif kind in _INTEGERS:
            self._varint()
        elif kind == _DOUBLE:
            self.at += 8
        elif kind == _BINARY:
            length = self._varint()
            self.at += length
        elif kind in (_LIST, _SET):
            byte = self._byte()
            count = byte >> 4 if byte < 0xF0 else self._varint()
            if count > len(self._data):
                raise IndexError
            for _ in range(count):
                self._pass(byte & 0x0F, depth)
        elif kind == _STRUCT:
            self._struct(depth)
        else:
            # A map: no header has one.
            raise IndexError


def _signed(number: int) -> int:
    """Zigzag."""
    return (number >> 1) ^ -(number & 1)
