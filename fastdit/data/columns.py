"""Images in tables: CIFAR's Python archives (Krizhevsky 2009) and the Parquet files of Hugging Face data sets."""

import io
import json
import pickle
import pickletools
import tarfile
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastdit.data.images import Opened, skip_line
from fastdit.data.sources import LABEL_KEYS, ImageSource, numbered, of_one_split, version_of
from fastdit.files import TarHeader, tar_members

UNPACKED = 1 << 30  # bytes; CIFAR has 2^28
SPLITS = {"train": ("data_batch_", "train"), "test": ("test",)}  # of CIFAR's archives: how the names of files begin
CACHED_GROUPS = 4  # of rows, decoded; of 100 to 1,000 images each


class _Array:
    """A pickled NumPy array, and the function that would create it; `__setstate__` gets its contents."""

    def __init__(self, *_):
        self.state: tuple = ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def uint8(self) -> np.ndarray:
        _, shape, dtype, fortran, data = self.state
        if dtype.args[0] not in ("u1", b"u1"):
            raise ValueError(f"an array of {dtype.args[0]}, not of bytes")
        return np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")


class _Dtype:
    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state: tuple) -> None:
        pass


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1")  # how Python 3 writes bytes in protocol 2


class _Inert(pickle.Unpickler):
    """Reads numbers, text, containers and arrays. The names in a pickle reach only the three stand-ins above."""

    NAMES = {
        **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.NAMES:
            raise ValueError(f"it asks for {module}.{name}, which no CIFAR archive needs; it was not run")
        return self.NAMES[module, name]


def unpickled(data: bytes) -> Any:
    """The value of a pickle; see _Inert. ValueError for a memo that takes more memory than the pickle."""
    for code, place, _ in pickletools.genops(data):
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and place > len(data):
            raise ValueError(f"it puts a value in place {place} of its memo")
    return _Inert(io.BytesIO(data), encoding="bytes").load()


def is_packed(file: Path) -> bool:
    with file.open("rb") as raw:
        return raw.read(2) == b"\x1f\x8b"  # gzip


def packed_files(file: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of the regular files in a tar file, packed or not; ValueError if they exceed UNPACKED."""
    total = 0
    with tarfile.open(file, "r:gz" if is_packed(file) else "r:", tarinfo=TarHeader) as tar:
        for member in tar_members(tar):
            total += member.size
            if total > UNPACKED:  # before it is decompressed: a small file can hold a thousand times its size
                raise ValueError(f"its files hold more than {UNPACKED} bytes")
            if member.isreg():
                yield member.name, tar.extractfile(member).read()


def cifar(file: Path, split: str = "") -> ImageSource:
    """The images of a split in cifar-10-python.tar.gz or cifar-100-python.tar.gz (fine labels); no pickle is run.

    `split`: a key of SPLITS, by default train.
    """
    which = {"": "training", "train": "training", "test": "test"}[split]
    batches, names, ignored = [], None, []
    try:
        for path, data in packed_files(file):
            name = Path(path).name
            if not path.startswith(("cifar-10-batches-py/", "cifar-100-python/")):
                raise ValueError(f"it holds {path}; of the compressed tar files only CIFAR's are read")
            if name.startswith(SPLITS[split or "train"]) or name in ("meta", "batches.meta"):
                stored = unpickled(data)
                stored = {k.decode() if isinstance(k, bytes) else k: v for k, v in stored.items()}
                if "meta" in name:
                    names = stored.get("label_names") or stored["fine_label_names"]
                else:
                    batches.append((name, stored["data"].uint8(), stored.get("labels") or stored["fine_labels"]))
            else:
                ignored.append(skip_line(path, f"not of the {which} images"))
        batches.sort(key=lambda batch: batch[0])
        pixels = np.concatenate([data for _, data, _ in batches]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = [int(label) for *_, part in batches for label in part]
        names = tuple(name.decode() if isinstance(name, bytes) else name for name in names)
        if len(labels) != len(pixels) or not 0 <= min(labels) <= max(labels) < len(names):
            raise ValueError(f"{len(pixels)} images, {len(labels)} labels, {len(names)} class names")
    except Exception as error:  # tarfile, zlib, pickle and NumPy raise all kinds of errors on damaged files
        raise ValueError(f"images={file / split} cannot be read as CIFAR ({type(error).__name__}: {error}); copy it "
                         "again, or decompress it if it is another archive") from None  # fmt: skip
    paths = [f"image {i}" for i in range(len(labels))]
    return ImageSource(f"CIFAR-{len(names)}'s {which} images", file / split, paths, labels, names,
                       lambda i: Image.fromarray(pixels[i]), [version_of(file)], tuple(ignored))  # fmt: skip


def parquet(root: Path, files: Sequence[Path]) -> ImageSource:
    """Parquet files with a column of images, and one of labels if there are classes; see `of_one_split`.

    Images are read group of rows by group of rows, each of which is decoded as a whole.
    """
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"images={root} is Parquet, which needs pyarrow; run pip install pyarrow") from None
    train, ignored = of_one_split(root, files)
    paths, values, places, chunks = [], [], [], []
    try:
        opened = [ParquetFile(file) for file in train]
        schema = opened[0].schema_arrow
        rows, size = sum(table.metadata.num_rows for table in opened), sum(file.stat().st_size for file in train)
        if rows > size:
            raise ValueError(f"{rows} rows in {size} bytes cannot hold images")
        features = json.loads((schema.metadata or {}).get(b"huggingface", "{}")).get("info", {}).get("features", {})
        features = {name: f for name, f in features.items() if isinstance(f, dict)}
        image = _column(schema.names, features, "Image", ("image", "img", "jpg", "png"))
        label = _column(schema.names, features, "ClassLabel", LABEL_KEYS)
        if image is None:
            raise ValueError(f"the columns are {', '.join(schema.names)}; one must be named image")
        for number, table in enumerate(opened):
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                chunks.append(range(len(paths), len(paths) + rows))
                paths += [f"{train[number].name}, image {len(paths) + row}" for row in range(rows)]
                places += [(number, group, row) for row in range(rows)]
                values += table.read_row_group(group, [label])[0].to_pylist() if label else [None] * rows
        names = tuple(map(str, features.get(label, {}).get("names") or ()))
    except Exception as error:  # pyarrow raises all kinds of errors on damaged files
        raise ValueError(f"images={root} cannot be read as Parquet ({error}); copy it again") from None
    if not names:
        labels, names = numbered(values, paths, f"images={root}")
    elif all(isinstance(value, int) and 0 <= value < len(names) for value in values):
        labels = values
    else:
        raise ValueError(f"images={root} has rows without a label of 0 to {len(names) - 1}; remove them")
    lock = threading.Lock()

    @lru_cache(CACHED_GROUPS)
    def column(number: int, group: int):
        return opened[number].read_row_group(group, [image])[0]

    def read(i: int) -> Opened:
        number, group, row = places[i]
        try:
            with lock:
                cell = column(number, group)[row].as_py()
        except Exception as error:  # of as many kinds as above
            raise ValueError(f"{train[number]} cannot be read as Parquet ({error}); copy it again") from None
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not data or not isinstance(data, bytes):
            raise ValueError("there are no bytes in this row")
        return io.BytesIO(data)

    return ImageSource("Parquet files", root, paths, labels, names, read, [*map(version_of, train)], tuple(ignored),
                       chunks)  # fmt: skip


def _column(names: Sequence[str], features: dict, kind: str, usual: Sequence[str]) -> str | None:
    """The column whose Hugging Face type is `kind`, or that has a usual name; of several, the one with both.

    ValueError where that leaves more than one. Of columns without that type, the first usual name counts.
    """
    types = {name: features.get(name, {}).get("_type", "Value") for name in names}
    typed = [name for name in names if types[name] == kind]
    named = [name for name in usual if types.get(name) in (kind, "Value")]
    found = [name for name in named if name in typed][:1] or typed + named[:1]
    if len(found) > 1:
        raise ValueError(f"each of the columns {', '.join(found)} may be the {usual[0]}; rename the one to use to "
                         f"{usual[0]}")  # fmt: skip
    return found[0] if found else None
