"""JSON, YAML and arrays from files that anyone may have written: reading runs nothing, never blocks and stays small."""

import errno
import hashlib
import io
import json
import math
import os
import re
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, TextIO

import numpy as np
import yaml

YAML_BYTES, JSON_BYTES = 1 << 17, 1 << 26  # PyYAML reads 100 kB in a second
HEADER_BYTES = 1 << 20  # of the records before a member of a tar file
SAMPLING = "sampling.json"  # how the images in a folder were sampled
DEPTH = 50  # levels of lists and objects; a config has four


PLAIN = {  # YAML 1.2's core schema, and underscores as in 400_000; all else is text, such as 1:30, 2026-11-27 and yes
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+(_[0-9]+)*|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}


class _Written:
    """A number that YAML writes in another way than Python, such as 010 or 1.10; `str` gives it as it was written."""

    text: str

    def __repr__(self) -> str:
        return self.text


class _Whole(_Written, int):
    pass


class _Real(_Written, float):
    pass


class _Loader(yaml.SafeLoader):
    """Plain values only, and no aliases: a few lines of them can stand for 10^9 values."""

    yaml_implicit_resolvers = {}  # instead of those of YAML 1.1, where 010 is 8 and 1:30 is 90
    levels = 0

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = set()
        for name in (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if name in names:  # PyYAML would take the last one
                raise yaml.constructor.ConstructorError(None, None, f"{name} is there twice", node.start_mark)
            names.add(name)
        return super().construct_mapping(node, deep)

    def number(self, node: yaml.ScalarNode) -> int | float:
        text = node.value.lower()
        if node.tag.endswith("int"):
            value, kind = int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)), _Whole
        else:
            value, kind = float(text.replace(".inf", "inf").replace(".nan", "nan")), _Real
        if str(value) == node.value:
            return value
        written = kind(value)
        written.text = node.value
        return written

    def compose_node(self, parent, index):
        self.levels += 1
        alias = self.check_event(yaml.AliasEvent)
        if alias or self.levels > DEPTH:
            problem = "aliases (*name) are not supported" if alias else f"more than {DEPTH} levels"
            raise yaml.composer.ComposerError(None, None, problem, self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else."""

    def number(self, value: _Written) -> yaml.ScalarNode:
        return self.represent_scalar(f"tag:yaml.org,2002:{'int' if isinstance(value, int) else 'float'}", value.text)


for kind, pattern in PLAIN.items():
    for owner in (_Loader, _Dumper):
        owner.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(rf"(?:{pattern})\Z"), None)
for kind, number in (("int", _Whole), ("float", _Real)):
    _Loader.add_constructor(f"tag:yaml.org,2002:{kind}", _Loader.number)
    _Dumper.add_representer(number, _Dumper.number)


def read_bytes(path: Path, most: int) -> bytes:
    """The contents of a regular file of at most `most` bytes; ValueError for any other file that exists.

    A pipe would block, and a device never ends.
    """
    check_regular(path, most)
    return path.read_bytes()


def read_large(path: Path, most: int) -> np.ndarray:
    """Like `read_bytes`, but returns a read-only array (n,) uint8. NumPy uses large pages, so it takes half as long."""
    check_regular(path, most)
    data = np.fromfile(path, np.uint8)
    data.flags.writeable = False
    return data


def check_regular(path: Path, most: int) -> None:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a regular file")
    if status.st_size > most:
        raise ValueError(f"{path} has {status.st_size} bytes, more than the {most} that are read")


def read_text(path: Path, most: int = JSON_BYTES) -> str:
    """Like `read_bytes`, but returns text. Raises a ValueError if it is not UTF-8."""
    try:
        return read_bytes(path, most).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def read_json(path: Path, kind: type = dict) -> Any:
    """The value in a JSON file; ValueError that names the file unless it can be read and is a `kind`."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path} is damaged: it contains a {type(value).__name__}")
    level = [value]
    for _ in range(DEPTH):
        level = [v for parent in level for v in (parent.values() if isinstance(parent, dict) else parent)
                 if isinstance(v, dict | list)]  # fmt: skip
    if level:
        raise ValueError(f"{path} is damaged: it has more than {DEPTH} levels")
    return value


def sealed(tree: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with an entry `sha256`: the digest of all other entries."""
    others = {key: value for key, value in tree.items() if key != "sha256"}
    return others | {"sha256": hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()}


def read_array(data: bytes | np.ndarray) -> np.ndarray:
    """The array in the bytes of a .npy file, read-only and not copied; ValueError if it is not one, or not complete.

    Pickles are refused.
    """
    try:
        file = io.BytesIO(data[:HEADER_BYTES])
        shape, fortran, dtype = array_header(file)
        if dtype.hasobject:
            raise ValueError("Object arrays cannot be loaded when allow_pickle=False")  # as NumPy says it
        if min(shape, default=0) < 0:
            raise ValueError(f"its shape is {shape}")
        array = np.frombuffer(data, dtype, math.prod(shape), file.tell())
        return array.reshape(shape, order="F" if fortran else "C")
    except Exception as error:  # numpy raises all kinds of errors on damaged headers
        raise ValueError(f"it is not an array: {error}") from None


def array_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order (whether it is Fortran's) and type of the array in a .npy file, whose data follow."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


class TarHeader(tarfile.TarInfo):
    """A header that does not make `tarfile` read a part backwards, or gibibytes of names: ValueError otherwise."""

    LONG = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
            tarfile.GNUTYPE_LONGLINK)  # what comes before a member, and is read at once  # fmt: skip

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "TarHeader":
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in cls.LONG and header.size > HEADER_BYTES):
            raise ValueError(f"the header of {header.name} says {header.size} bytes")
        return header


def tar_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of an open tar file, which keeps none; ValueError for a size that leads back: it would never end."""
    while (member := tar.next()) is not None:
        if member.size < 0 or tar.offset <= member.offset:
            raise ValueError(f"{member.name} has {member.size} bytes")
        tar.members.clear()
        yield member


def map_array(path: Path, most: int) -> tuple[np.ndarray, str]:
    """The array in a .npy file of at most `most` bytes, mapped into memory, and the file's SHA-256.

    ValueError for what `read_bytes` and `read_array` refuse.
    """
    check_regular(path, most)
    digest = sha256(path)
    try:
        return np.lib.format.open_memmap(path, mode="r"), digest
    except Exception as error:
        raise ValueError(f"{path} is not an array: {error}") from None


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Writes what the system still holds of a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_to(path: Path) -> TextIO:
    """A regular file, open to append lines; ValueError for a link, which could lead elsewhere, and for a pipe."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a pipe that nobody reads
            raise ValueError(f"{path} is not a regular file; remove it") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is not a regular file; remove it")
    return open(descriptor, "a", buffering=1)


def as_json(record: dict, indent: int | None = None) -> str:
    """JSON on one line, or with `indent`. NaN and infinity become null, because JSON does not have them."""
    return json.dumps(_without_nan(record), indent=indent, allow_nan=False) + "\n"


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append_json(path: str | Path, record: dict) -> None:
    """Appends one line of JSON to a file; ValueError as in `append_to`."""
    with append_to(Path(path)) as file:
        file.write(as_json(record))


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A place beside `out` for a new file or folder, which gets its name if the block ends without an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{out.name}.", suffix=".partial", dir=out.parent) as folder:
        stage = Path(folder) / out.name
        yield stage
        use_umask(*Path(folder).rglob("*"))
        os.rename(stage, out)


def use_umask(*paths: Path) -> None:
    """Give files and folders the permissions that the umask asks for; safetensors leaves 0600."""
    umask = os.umask(0)
    os.umask(umask)
    for path in paths:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that is complete, or, after an OSError, as it was before. A link in its place is not followed."""
    temporary = path.with_name(f"{path.name}.partial")
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def replace_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


def read_yaml(path: Path) -> Any:
    """The value in a YAML file; ValueError that names the file if it cannot be read."""
    text = read_text(path, YAML_BYTES)
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or not valid YAML: {error}") from None


def parse_yaml(text: str) -> Any:
    """The value of YAML text; ValueError if it is not valid, or has tags, aliases, too many levels or a key twice.

    `str` of a number gives its text, such as 010, for keys whose values are text.
    """
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # PyYAML raises all kinds of errors on values that do not fit their tags
        raise ValueError(" ".join(str(error).split())) from None


def yaml_text(value: Any) -> str:
    """YAML that `parse_yaml` and any other reader of YAML 1.1 or 1.2 read as `value`, in the order of its keys."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def yaml_line(value: Any) -> str:
    """The value as YAML on one line, in the form that an override has after its `=`."""
    line = yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=math.inf)
    return line.removesuffix("...\n").strip()
