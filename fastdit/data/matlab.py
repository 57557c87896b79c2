"""Structures in MATLAB's version 5 files ("MAT-File Format", MathWorks), read without SciPy, which damage can crash."""

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

MATRIX, PACKED = 14, 15  # types of elements; the other ones that are read are in NUMBERS and TEXT
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
TEXT = {1: "latin1", 2: "latin1", 4: "utf-16", 16: "utf-8", 17: "utf-16"}
STRUCT, CHAR = 2, 4  # classes of arrays


class Array(NamedTuple):
    """An array: its class, name and number of entries, and the elements that hold them."""

    kind: int
    name: str
    count: int
    parts: list[tuple[int, bytes]]


def structures(data: bytes, name: str, most: int) -> list[dict[str, str | float | None]]:
    """The fields of each entry of the structure array `name` in a file: text, a number, or None for anything else.

    ValueError if it is not there, and struct.error or zlib.error if it is damaged; `most`: bytes of a packed element.
    """
    order = ">" if data[126:128] == b"MI" else "<"
    for kind, part in _elements(data[128:], order):
        if kind == PACKED:
            kind, part = next(_elements(zlib.decompressobj().decompress(part, most), order), (0, b""))
        array = _array(part, order) if kind == MATRIX else None
        if array and array.name == name and array.kind == STRUCT:
            return list(_entries(array, order))
    raise ValueError(f"it has no structure {name}")


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Type and contents of the elements in a row."""
    at = 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        if kind >> 16:  # the short form: up to four bytes beside the tag
            kind, size = kind & 0xFFFF, kind >> 16
            start, at = at + 4, at + 8
            if size > 4:
                raise ValueError(f"a short element of {size} bytes")
        else:
            start = at + 8
            at = start + size + (-size % 8 if kind != PACKED else 0)
        if start + size > len(data):
            raise ValueError(f"an element of {size} bytes, of which {len(data) - start} are there")
        yield kind, data[start : start + size]


def _array(data: bytes, order: str) -> Array | None:
    """None for an empty element, which stands for an empty array."""
    if not data:
        return None
    (_, flags), (_, sides), (_, name), *parts = _elements(data, order)
    count = int(np.prod(np.frombuffer(sides, f"{order}i4").astype(object)))
    return Array(struct.unpack_from(f"{order}I", flags)[0] & 0xFF, name.decode("latin1"), count, parts)


def _entries(array: Array, order: str) -> Iterator[dict[str, str | float | None]]:
    (_, length), (_, names), *values = array.parts
    width = struct.unpack(f"{order}i", length)[0]
    if width < 1:
        raise ValueError(f"names of {width} bytes")
    fields = [names[i : i + width].partition(b"\0")[0].decode("latin1") for i in range(0, len(names), width)]
    if not fields or len(values) != array.count * len(fields):
        raise ValueError(f"{len(values)} values for {array.count} entries of {len(fields)} fields")
    for start in range(0, len(values), len(fields)):
        own = values[start : start + len(fields)]
        yield {field: _value(part, order) for field, (_, part) in zip(fields, own, strict=True)}


def _value(data: bytes, order: str) -> str | float | None:
    array = _array(data, order)
    if not array or len(array.parts) != 1:
        return None
    [(kind, part)] = array.parts
    if array.kind == CHAR and kind in TEXT:
        return part.decode(TEXT[kind] + ({"<": "-le", ">": "-be"}[order] if TEXT[kind] == "utf-16" else ""))
    if array.count == 1 and kind in NUMBERS:
        return np.frombuffer(part, f"{order}{NUMBERS[kind]}")[0].item()
    return None
