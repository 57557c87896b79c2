"""Mutations of random bytes, text, arrays, tensors, pickles and images: (bytes, random.Random) -> bytes."""

import copy
import json
import math
import random
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from chaos import contents

NUMBERS = [0, 1, 2, 7, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]
CANARY = Path("canary")  # of payloads; in the working directory


# any bytes ------------------------------------------------------------------------------------------------------------


def flipped(data: bytes, draw: random.Random) -> bytes:
    """Up to 8 bits, often near the beginning, where the headers are."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        changed[place(data, draw)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def place(data: bytes, draw: random.Random) -> int:
    return draw.randrange(min(len(data), draw.choice((64, 512, len(data)))))


def shortened(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.choice((0, place(data, draw), draw.randrange(len(data)), len(data) - 1))]


def spliced(data: bytes, draw: random.Random) -> bytes:
    """A part is removed, repeated, moved, or overwritten by another part, zeros or noise."""
    start, size, at = place(data, draw), draw.choice((1, 4, 16, 512, 4096)), place(data, draw)
    part = data[start : start + size]
    kind = draw.randrange(5)
    if kind == 0:
        return data[:start] + data[start + size :]
    if kind == 1:
        return data[:at] + part * draw.choice((1, 2, 50)) + data[at:]
    new = (part, bytes(len(part)), draw.randbytes(len(part)))[kind - 2]
    return data[:at] + new + data[at + len(new) :]


def numbered(data: bytes, draw: random.Random) -> bytes:
    """A field of 1, 2, 4 or 8 bytes, such as a length, becomes an extreme number, or one more or less."""
    at, size = place(data, draw), draw.choice((1, 2, 4, 8))
    order = draw.choice(("little", "big"))
    near = int.from_bytes(data[at : at + size], order) + draw.choice((-1, 1))
    value = draw.choice((*NUMBERS, near)) % (1 << 8 * size)
    return data[:at] + value.to_bytes(size, order) + data[at + size :]


def replaced(data: bytes, draw: random.Random) -> bytes:
    """Something else in the file's place: a payload, most of the time."""
    kinds = {**contents.TEXT, **contents.BINARY}
    cheap = [name for name in kinds if name != "zip bomb"]  # 3 MB that every case would write
    return kinds[draw.choice((*cheap, "pickle", "pickled object array", "pickle in an npz"))](CANARY)


RAW = [flipped, flipped, shortened, spliced, numbered]


def raw(data: bytes, draw: random.Random) -> bytes:
    if not data:
        return draw.randbytes(draw.choice((1, 8, 512)))
    return draw.choice(RAW if draw.random() < 0.96 else [replaced])(data, draw)


# text and trees -------------------------------------------------------------------------------------------------------

VALUES = [
    None, True, 0, -1, 1, 2**31, 2**63, 10**12, 10**400, 1e308, -1e308, 1e-320, 0.5, math.nan, math.inf, -math.inf,
    "", "x", "../../x", "/etc/passwd", "/dev/zero", "a\0b", "a\nb", "\ud800", "\u202e\u0430", "x" * 100_000, "1e999",
    "nan", "9" * 5000, [], {}, [[]], [None], [1] * 10_000, {"a": 1}, {"name": {}}, ["x", 1, None, {}], [1e999],
    "synthetic:1",
]  # fmt: skip


def nested(draw: random.Random) -> object:
    value: object = 1
    for _ in range(draw.choice((10, 60, 900))):
        value = draw.choice(([value], {"a": value}))
    return value


def leaves(tree: object, path: tuple = ()) -> Iterator[tuple]:
    if path:
        yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from leaves(value, (*path, key))


def grown(tree: object, draw: random.Random) -> object:
    """One value of nested lists and objects becomes another one, moves, is doubled or goes."""
    tree = copy.deepcopy(tree)
    paths = list(leaves(tree))
    if not paths or draw.random() < 0.02:
        return draw.choice(VALUES)
    *parents, last = draw.choice(paths)
    node = tree
    for key in parents:
        node = node[key]
    kind = draw.random()
    if kind < 0.1:
        del node[last]
    elif kind < 0.2:
        value = copy.deepcopy(node[last])
        node.append(value) if isinstance(node, list) else node.update({draw.choice(("x", "name", f"{last}")): value})
    elif kind < 0.3:
        node[last] = [node[last]] if draw.random() < 0.5 else {f"{last}": node[last]}
    elif kind < 0.35:
        node[last] = nested(draw)
    elif isinstance(node[last], int | float) and kind < 0.5:
        node[last] = draw.choice((-node[last], node[last] + 1, node[last] * 2, float(node[last]) + 0.5))
    else:
        node[last] = copy.deepcopy(draw.choice(VALUES))
    return tree


def json_text(data: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.2:
        return raw(data, draw)
    if draw.random() < 0.05:
        return data.replace(b"{", b'{"format": 1, "format": 2, ', 1)
    return json.dumps(grown(json.loads(data), draw), ensure_ascii=draw.random() < 0.8).encode(errors="surrogatepass")


YAML = [
    "&a [*a]", "!!binary x", "2024-99-99", "1:1:1", "{<<: 1}", "? 1", "!!int ''", "!!float ''", "!!bool x", "0x_",
    "!!timestamp x", "!!set [1]", "!!omap {a: 1}", "!!pairs 1", "!!null x", "{[1]: 2}", "{{a: 1}: 2}", "=", "!x 1",
]  # fmt: skip


def yaml_text(data: bytes, draw: random.Random) -> bytes:
    import yaml

    if draw.random() < 0.3:
        return raw(data, draw)
    if draw.random() < 0.1:
        line = draw.choice((contents.tag(CANARY).strip(), *YAML))
        return data + b"\n" + draw.choice((b"data: ", b"x: ", b"")) + line.encode() + b"\n"
    return yaml.safe_dump(grown(yaml.safe_load(data), draw)).encode(errors="surrogatepass")


FIELDS = [
    "", "/dev/zero", "/dev/stdin", "../" * 20 + "etc/passwd", "a\0b", "9" * 5000, "-1", "1.5", "100000", "99999", '"',
    "\r", "\u0663", "\ufeff", "a" * 200_000, ".", "/", "nan", "None", "{}", "\x85", "\ud800",
]  # fmt: skip


def csv_text(data: bytes, draw: random.Random) -> bytes:
    """One field of one line becomes another, or a line is repeated or goes."""
    if draw.random() < 0.2:
        return raw(data, draw)
    lines = data.split(b"\n")
    i = draw.randrange(len(lines))
    if draw.random() < 0.2:
        lines[i : i + 1] = [lines[i]] * draw.choice((0, 2, 300))
    else:
        fields = lines[i].split(b",")
        fields[draw.randrange(len(fields))] = draw.choice(FIELDS).encode(errors="surrogatepass")
        lines[i] = b",".join(fields)
    return b"\n".join(lines)


def jsonl_text(data: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.2:
        return raw(data, draw)
    lines = data.split(b"\n")
    i = draw.randrange(len(lines) - 1)
    lines[i] = json_text(lines[i], draw)
    return b"\n".join(lines)


# arrays, tensors, pickles ---------------------------------------------------------------------------------------------

DTYPES = [
    "'<f4'", "'<f8'", "'<f2'", "'>f4'", "'|O'", "'|u1'", "'<i8'", "'|b1'", "'<c16'", "'<U9'", "'|V8'", "'<M8[s]'",
    "'|S0'", "'<f4' * 9", "[('a', '<f4')]", "[('a', '|O')]", "[('shard', '<u4')]", "{}", "()", "None", "1", "'('",
    "['a']", "'<f4', (2**40,)", "('<f4', (100000, 100000))",
]  # fmt: skip
SHAPES = [
    "()", "(0,)", "(-1,)", "(1,)", "(2**62, 4)", "(10**15,)", "(2147483647,)", "(1, 4, 0, 8)", "(True,)", "('a',)",
    "(1.5,)", "None", "1", "(" * 50 + ")" * 50, "(4, 8, 8)", "(8, 8, 4)", "(1, 8, 8, 8)", "(4294967296, 4294967296)",
    "(" + "1, " * 33 + ")", "(" + "9" * 5000 + ",)",
]  # fmt: skip


def npy(data: bytes, draw: random.Random) -> bytes:
    """The header of a .npy file: dtype, shape, order, version, length; or its values."""
    kind = draw.random()
    if kind < 0.25 or not data.startswith(b"\x93NUMPY"):
        return raw(data, draw)
    size = struct.unpack("<H", data[8:10])[0]
    header, values = data[10 : 10 + size].decode("latin1"), data[10 + size :]
    if kind < 0.5:
        header = re.sub(r"'descr': .*?, 'fortran", lambda _: f"'descr': {draw.choice(DTYPES)}, 'fortran", header)
    elif kind < 0.75:
        header = re.sub(r"'shape': .*?\), ?", lambda _: f"'shape': {draw.choice(SHAPES)}, ", header)
    elif kind < 0.8:
        header = header.replace("False", draw.choice(("True", "1", "None", "'x'")))
    elif kind < 0.9:
        number = draw.choice((np.nan, np.inf, -np.inf, -1e30, 3e38, 70_000, -1))
        array = (
            np.frombuffer(values, re.search(r"<[fi]\d", header)[0]).copy() if re.search(r"'<[fi]\d'", header) else None
        )
        if array is not None and len(array):
            with np.errstate(all="ignore"):
                array[draw.randrange(len(array))] = (
                    number if array.dtype.kind == "f" else draw.choice((-1, 2**30, 99_999))
                )
            values = array.tobytes()
    else:
        values = draw.choice((values[:-1], values + b"x", b"", contents.object_npy(CANARY)))
    start = data[:6] + draw.choice((data[6:8],) * 9 + (b"\x02\0", b"\x03\0", b"\x09\0"))
    length = draw.choice((len(header),) * 20 + (0, 65535, len(header) - 1)) % 65536
    return start + struct.pack("<H", length) + header.encode("latin1") + values


def safetensors(data: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.3:
        return raw(data, draw)
    size = struct.unpack("<Q", data[:8])[0]
    header, values = json.loads(data[8 : 8 + size]), data[8 + size :]
    kind = draw.random()
    entry = header[draw.choice([key for key in header if key != "__metadata__"])]
    if kind < 0.2:
        entry["dtype"] = draw.choice(
            ("F64", "BF16", "F8_E4M3", "F8_E8M0", "F4", "BOOL", "U8", "I64", "C64", "X", "", "F16")
        )
    elif kind < 0.4:
        entry["shape"] = draw.choice(
            ([], [0], [-1], [2**63], [2**32, 2**32], [1] * 70, [entry["shape"]], "x", [1.5], [4, 16])
        )
    elif kind < 0.6:
        entry["data_offsets"] = draw.choice(
            ([0, 0], [8, 4], [0, 2**64 - 1], [-1, 3], [0], [2**63, 2**63], [1, 2], [0, 4, 8])
        )
    else:
        header = grown(header, draw)
    text = json.dumps(header).encode(errors="surrogatepass")
    return (
        struct.pack("<Q", draw.choice((len(text),) * 9 + (*NUMBERS,)[:2])) + text + draw.choice((values,) * 9 + (b"",))
    )


OPCODES = [
    b"c", b"R", b"(", b".", b"0", b"1", b"2", b"}", b"]", b"u", b"s", b"b", b"o", b"i", b"e", b"a", b"t", b"\x81",
    b"\x93", b"r\xff\xff\xff\x7f", b"j\0\0\0\x10", b"X\xff\xff\xff\x7f", b"T\xff\xff\xff\x7f",
    b"\x8b\xff\xff\xff\x7f", b"cos\nsystem\n", b"cnumpy\nndarray\n", b"cbuiltins\neval\n", b"I9999999999\n",
    b"F1e999\n", b"N", b"\x82\1", b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"Ppid\n", b"Q",
]  # fmt: skip


def pickled(data: bytes, draw: random.Random) -> bytes:
    """Opcodes that allocate, call, refer or build, at random places of a pickle."""
    if draw.random() < 0.4:
        return raw(data, draw)
    at = place(data, draw)
    return (
        data[:at] + b"".join(draw.choices(OPCODES, k=draw.choice((1, 1, 3)))) + data[at + draw.choice((0, 1, 2, 5)) :]
    )


# images ---------------------------------------------------------------------------------------------------------------


def png(data: bytes, draw: random.Random) -> bytes:
    """A chunk of a PNG, with its checksum made right; or its pixels become a bomb."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        size = struct.unpack(">I", data[at : at + 4])[0]
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    kind = draw.random()
    if kind < 0.25 or not chunks or not data.startswith(b"\x89PNG"):
        return raw(data, draw)
    i = draw.randrange(len(chunks))
    name, part = chunks[i]
    if kind < 0.5:
        i, (name, part) = 0, chunks[0]
        chunks[i] = (name, numbered(part, draw) if part else part)
    elif kind < 0.75:
        chunks[i] = (name, raw(part, draw))
    elif kind < 0.85:
        chunks[i:i] = [draw.choice(chunks)]
    elif kind < 0.95:
        bomb = zlib.compress(bytes(1 << 24), 1)
        chunks.insert(
            1,
            draw.choice(
                (
                    (b"zTXt", b"a\0\0" + bomb),
                    (b"iCCP", b"a\0\0" + bomb),
                    (b"acTL", b"\xff" * 8),
                    (b"eXIf", b"II*\0" + draw.randbytes(60)),
                    (b"PLTE", b"abc"),
                    (b"tRNS", b"\0\1"),
                )
            ),
        )
    else:
        chunks[i] = (draw.choice((b"IHDR", b"IDAT", b"IEND", b"PLTE", b"fdAT", b"teSt")), part)
    return data[:8] + b"".join(
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks
    )


def jpeg(data: bytes, draw: random.Random) -> bytes:
    """A segment's length or one of its fields."""
    marks = [m.start() for m in re.finditer(rb"\xff[\xc0-\xcf\xda\xdb\xdd\xe0-\xef\xfe]", data)]
    if draw.random() < 0.4 or not marks:
        return raw(data, draw)
    at = draw.choice(marks) + 2 + draw.randrange(24)
    return data[:at] + draw.randbytes(2) + data[at + 2 :]
