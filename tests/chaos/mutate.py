"""The mutations of a file by its name, also of archives, whose members are mutated in turn."""

import gzip
import io
import random
import re
import zipfile
from collections.abc import Callable

from chaos.mutations import (
    NUMBERS,
    csv_text,
    jpeg,
    json_text,
    jsonl_text,
    npy,
    pickled,
    png,
    raw,
    safetensors,
    yaml_text,
)
from chaos.pictures import member, pax

Mutation = Callable[[bytes, random.Random], bytes]
HEADER = {
    "name": (0, 100), "mode": (100, 8), "uid": (108, 8), "size": (124, 12), "mtime": (136, 12), "sum": (148, 8),
    "type": (156, 1), "link": (157, 100), "magic": (257, 6), "prefix": (345, 155),
}  # fmt: skip
NEGATIVE = [(-size).to_bytes(12, "big", signed=True) for size in (1, 512, 1024, 1536, 2048)]
TAR_VALUES = {
    "size": [
        b"0", b"77777777777", b"-1", b"\x80" + b"\xff" * 11, b"\xff" * 12, *NEGATIVE, b"x", b"00000001000",
        b"\0" * 12, b"1",
    ],
    "type": [bytes([c]) for c in b"0123456789LKxgSDMVNX\0A\xff"],
    "name": [
        b"", b"../x.png", b"/tmp/x.png", b".", b"..", b"a" * 100, b"\xff\xfe.png", b"a\nb.png", b"000000.cls",
        b".cls",
    ],
}


def headers(data: bytes) -> list[int]:
    """The places of the headers of a tar file's members, by their magic."""
    return [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]


def tar(data: bytes, draw: random.Random) -> bytes:
    """A field of a header, with its sum made right; a member that is mutated, repeated, replaced or hostile."""
    places = headers(data)
    kind = draw.random()
    if kind < 0.15 or not places:
        return raw(data, draw)
    at = draw.choice(places)
    if kind < 0.5:
        field = draw.choice((*HEADER, "size", "size", "name", "type"))
        start, length = HEADER[field]
        value = draw.choice(TAR_VALUES.get(field, [b"", b"\xff" * length, b"7" * length, draw.randbytes(length)]))
        head = bytearray(data[at : at + 512])
        head[start : start + length] = value[:length].ljust(length, b"\0")
        if field != "sum":
            head[148:156] = b"        "
            head[148:156] = b"%06o\0 " % sum(head)
        return data[:at] + bytes(head) + data[at + 512 :]
    end = next((place for place in places if place > at), len(data.rstrip(b"\0")) + 511 & ~511)
    if kind < 0.65:  # a member's own content
        name = data[at : at + 100].rstrip(b"\0").decode("latin1")
        size = int(data[at + 124 : at + 135] or b"0", 8)
        return (
            data[: at + 512]
            + same_size(by_name(name)(data[at + 512 : at + 512 + size], draw), size)
            + data[at + 512 + size :]
        )
    if kind < 0.8:
        hostile = [
            pax("path", "../x.png"),
            pax("size", draw.choice(("-5", "-512", "-1024", "-1536", "x", "9" * 30, "1e9"))),
            pax("linkpath", "/x"),
            pax("GNU.sparse.map", "0,9999999999999"),
            pax("GNU.sparse.major", "1") + member("x.png"),
            pax("mtime", "nan"),
            member("././@LongLink", b"a" * 5000, b"L"),
            member("x.cls", b"", b"S"),
            member("x.png", b"", b"2", "/etc/passwd"),
            member("x.png", size=10**12),
            member("x.cls", b"9" * 9000),
            member("x.json", b"[" * 50_000),
            member("d", b"", b"5"),
            pax("hdrcharset", "BINARY"),
            bytes(512),
        ]
        return data[:at] + draw.choice(hostile) + data[at:]
    if kind < 0.9:
        return data[:at] + data[at:end] * draw.choice((0, 2, 40)) + data[end:]
    other = draw.choice(places)
    return data[:at] + data[other : other + 512] + data[at + 512 :]


def same_size(data: bytes, size: int) -> bytes:
    return data[:size].ljust(size, b"\0")


def packed(data: bytes, draw: random.Random) -> bytes:
    """Within gzip, or of its own bytes."""
    if draw.random() < 0.2:
        return raw(data, draw)
    return gzip.compress(tar(gzip.decompress(data), draw), 1)


def zipped(data: bytes, draw: random.Random) -> bytes:
    """The directory, the local headers or the members of a zip file."""
    kind = draw.random()
    if kind < 0.2:
        return raw(data, draw)
    if kind < 0.55:
        marks = [m.start() for m in re.finditer(rb"PK[\1\3\5\6]{1,2}[\2\4\6\7]", data)]
        at = draw.choice(marks) + 4 + 2 * draw.randrange(21)
        width = draw.choice((2, 4))
        return data[:at] + (draw.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, "little") + data[at + width :]
    out, name = io.BytesIO(), ""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        parts = [(info.filename, archive.read(info)) for info in archive.infolist()]
    i = draw.randrange(len(parts))
    name, part = parts[i]
    if kind < 0.85:
        parts[i] = (name, by_name(name)(part, draw))
    elif kind < 0.9:
        parts.append((name, by_name(name)(part, draw)))
    else:
        parts[i] = (draw.choice(("../x.npy", "/x.npy", "", "a\0b.npy", "x" * 60_000, f"{name}/", "\u202e.npy")), part)
    with zipfile.ZipFile(out, "w", draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, part in parts:
            archive.writestr(name, part)
    return out.getvalue()


IMAGES = {"png": png, "jpg": jpeg, "jpeg": jpeg, "jfif": jpeg}
KINDS: dict[str, Mutation] = {
    **IMAGES,
    "json": json_text,
    "yaml": yaml_text,
    "csv": csv_text,
    "jsonl": jsonl_text,
    "npy": npy,
    "npz": zipped,
    "zip": zipped,
    "pt": zipped,
    "pkl": pickled,
    "safetensors": safetensors,
    "tar": tar,
    "gz": packed,
}


def by_name(name: str) -> Mutation:
    """The mutation for a file of this name."""
    base = name.rpartition("/")[2]
    if base.startswith(("data_batch", "batches.meta", "train", "meta", "test_batch")) and "." not in base.replace(
        ".meta", ""
    ):
        return pickled
    return KINDS.get(base.rpartition(".")[2].lower(), raw)


def mutate(name: str, data: bytes, draw: random.Random) -> bytes:
    """One to three mutations of a file."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        try:
            data = by_name(name)(data, draw)
        except Exception:  # its structure is gone already, and any parser may have failed
            data = raw(data, draw)
    return data
