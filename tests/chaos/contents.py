"""What a hostile file may hold: each entry of CONTENTS replaces a file; `canary` is made if its payload runs."""

import io
import json
import os
import pickle
import shutil
import socket
import struct
import zipfile
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def torch_file(path: Path, content, zipped: bool = True) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)


def alias_bomb(levels: int = 30) -> str:
    """YAML whose value has 2^levels leaves."""
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, levels)]
    return "\n".join([*lines, f"data: *a{levels - 1}", ""])


def merge_bomb(levels: int = 30) -> str:
    lines = ["m0: &m0 {a: 1}"] + [f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}]}}" for i in range(1, levels)]
    return "\n".join([*lines, f"data: *m{levels - 1}", ""])


def tag(canary: Path) -> str:
    return f'!!python/object/apply:os.system ["touch {canary}"]\n'


def npy(descr: str, shape: tuple, data: bytes = b"") -> bytes:
    """A .npy file whose header says anything."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data


def object_npy(canary: Path) -> bytes:
    return npy("'|O'", (1,), pickle.dumps(np.array([Payload(canary)], object)))


def npz(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def zip_bomb(name: str, start: bytes, gib: int = 3) -> bytes:
    """A zip of one member that begins with `start` and goes on with `gib` GiB of zeros; it has 3 MB."""
    deflate = zlib.compressobj(wbits=-15)
    first = deflate.compress(start) + deflate.flush(zlib.Z_FULL_FLUSH)
    block = deflate.compress(bytes(1 << 26)) + deflate.flush(zlib.Z_FULL_FLUSH)  # decodes to the same anywhere
    data, size = first + 16 * gib * block + deflate.flush(), len(start) + (gib << 30)
    common = struct.pack("<HHHHHIIIHH", 20, 0, zipfile.ZIP_DEFLATED, 0, 0x21, 0, len(data), size, len(name), 0)
    local = b"PK\x03\x04" + common + name.encode() + data
    entry = b"PK\x01\x02" + struct.pack("<H", 20) + common + struct.pack("<HHHII", 0, 0, 0, 0, 0) + name.encode()
    return local + entry + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(entry), len(local), 0)


@cache
def array_bomb() -> bytes:
    """An npz whose x has 3 GiB."""
    return zip_bomb("x.npy", npy("'<f4'", (3 << 28,)))


def safetensors(header: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def enormous(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)


def listening(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the address of a socket is limited to 107 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)


DEEP = 20_000
TEXT = {
    "pickle": lambda canary: pickle.dumps(Payload(canary), protocol=2),
    "YAML tag": lambda canary: tag(canary).encode(),
    "YAML aliases": lambda canary: alias_bomb().encode(),
    "YAML merges": lambda canary: merge_bomb().encode(),
    "nested lists": lambda canary: b"[" * DEEP + b"]" * DEEP,
    "nested objects": lambda canary: b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "null": lambda canary: b"null",
    "a list": lambda canary: b'[1, "a", null]',
    "an object": lambda canary: b'{"step": "x", "files": {"a": {"bytes": 1e999}}, "format": 1}',
    "a number of 10^5 digits": lambda canary: b"9" * 100_000,
    "nothing": lambda canary: b"",
    "bytes that are not UTF-8": lambda canary: b"\xff\xfe{}\x80" * 100,
}
BINARY = {
    "pickle": lambda canary: pickle.dumps(Payload(canary), protocol=2),
    "pickled object array": object_npy,
    "pickle in an npz": lambda canary: npz({f"{n}.npy": object_npy(canary) for n in ("x", "t", "y", "out", "arr_0")}),
    "zip bomb": lambda canary: array_bomb(),
    "array of 10^15 numbers": lambda canary: npy("'<f4'", (10**15,)),
    "array header of 10^6 brackets": lambda canary: npy("'<f4'", "(" * 60_000),
    "nothing": lambda canary: b"",
    "zeros": lambda canary: bytes(1 << 16),
    "header of 10^12 bytes": lambda canary: safetensors(b"{}", 10**12),
    "nested header": lambda canary: safetensors(b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    "tensors of 10^15 bytes": lambda canary: safetensors(
        json.dumps({"a": {"dtype": "F32", "shape": [2**48], "data_offsets": [0, 2**50]}}).encode()
    ),
}
SPECIAL = {
    "FIFO": os.mkfifo,
    "socket": listening,
    "folder": Path.mkdir,
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "device": lambda path: os.mknod(path, 0o644 | 0o020000, os.makedev(1, 5)),  # /dev/zero; needs privileges
    "1 TiB of zeros": enormous,
}
