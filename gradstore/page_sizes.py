"""Sizes of the pages of a Parquet file, read from the headers of the pages themselves.

The footer repeats what its pages hold, but nothing makes it tell the truth, and Arrow takes the memory that a page asks
for. A header is a struct of Thrift's compact protocol: fields 2 and 3 are the page's bytes without and with
compression, and the first member of the struct that describes its kind (fields 5, 7 or 8) is the number of values.
"""

from collections.abc import Iterator
from typing import BinaryIO

_HEADER_BYTES = 1 << 16
"""Most bytes of a header that are read: statistics in it hold two values."""
_DEEPEST = 8
_MOST_PAGES = 100_000
"""Of one column and row group."""
_STOP, _TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(13)


def page_sizes(file: BinaryIO, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """(bytes without compression, values) of each page between two places of a file; ValueError for what is no page."""
    for _ in range(_MOST_PAGES):
        if start >= stop:
            return
        file.seek(start)
        reader = _Compact(file.read(min(_HEADER_BYTES, stop - start)))
        fields = reader.struct()
        size, compressed = fields.get(2), fields.get(3)
        if not isinstance(size, int) or not isinstance(compressed, int) or size < 0 or compressed < 0:
            raise ValueError("the header of a page has no sizes")
        kinds = (fields.get(number) for number in (5, 7, 8))
        values = next((kind.get(1) for kind in kinds if isinstance(kind, dict)), 0)
        if not isinstance(values, int) or values < 0:
            raise ValueError("the header of a page has no number of values")
        yield size, values
        start += reader.place + compressed
    raise ValueError(f"a column has more than {_MOST_PAGES} pages")


class _Compact:
    """Reader of Thrift's compact protocol: whole numbers and structs are kept, the rest is skipped."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.place = 0
        """Bytes read so far."""

    def struct(self, depth: int = 0) -> dict[int, object]:
        """Field number -> whole number or struct; None for a field of another type."""
        fields: dict[int, object] = {}
        number = 0
        while (head := self._byte()) & 0x0F:
            step = head >> 4
            number = number + step if step else self._signed()
            fields[number] = self._value(head & 0x0F, depth)
        return fields

    def _value(self, kind: int, depth: int) -> object:
        if kind in (_TRUE, _FALSE):
            return None
        if kind in (_I16, _I32, _I64):
            return self._signed()
        if kind == _STRUCT and depth < _DEEPEST:
            return self.struct(depth + 1)
        if kind == _BINARY:
            self._skip(self._varint())
        elif kind in (_BYTE, _DOUBLE):
            self._skip(1 if kind == _BYTE else 8)
        else:  # A page's header has no lists, sets or maps.
            raise ValueError(f"the header of a page has a field of type {kind}")
        return None

    def _byte(self) -> int:
        self._skip(1)
        return self._data[self.place - 1]

    def _skip(self, n: int) -> None:
        self.place += n
        if self.place > len(self._data):
            raise ValueError("the header of a page is cut off")

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("the header of a page has a number without end")

    def _signed(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
