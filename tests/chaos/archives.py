"""Hostile archives and lists of images, and what an unfinished extraction left."""

import gzip
import json
import pickle
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from chaos import contents
from chaos.contents import Payload
from chaos.corpus import Case, Good, copied
from chaos.pictures import MEMBERS, member
from helpers.sources import cifar_of


def cases(good: Good) -> Iterator[Case]:
    for name, data in MEMBERS.items():
        yield Case("archives of images", f"WebDataset with {name}", partial(dataset, good, data))
    for name, make in ARCHIVES.items():
        yield Case("archives of images", name, partial(archive, good, make))
    for name, make in LISTS.items():
        yield Case("lists of images", name, partial(archive, good, make))
    for name, content in {**contents.TEXT, **contents.SPECIAL}.items():
        for file in ("settings.json", "shard-00000.part", "failed"):
            made = partial(unfinished, good, file, content, name in contents.TEXT)
            yield Case("unfinished extraction", f"{name} in {file}", made)


def extract(good: Good, source: Path, out: Path) -> list[list[str]]:
    return [["extract_features.py", "--images", f"{source}", "--out", f"{out}/latents", "--vae", f"{good.world}/vae",
             "--image-size", "32", "--workers", "1"]]  # fmt: skip


def dataset(good: Good, data: bytes, folder: Path) -> list[list[str]]:
    path = folder / "out" / "images" / "a.tar"
    path.parent.mkdir(parents=True)
    images = sorted((good.root / "images" / "0").iterdir())
    whole = b"".join(member(f"{i:09d}.png", p.read_bytes()) + member(f"{i:09d}.cls") for i, p in enumerate(images))
    path.write_bytes(whole + data + member("999999999.png", images[0].read_bytes()) + bytes(1024))
    return extract(good, path.parent, folder / "out") + extract(good, path, folder / "out")


def archive(good: Good, make: Callable[[Path, Path], Path], folder: Path) -> list[list[str]]:
    copied(good, "images", folder)
    return extract(good, make(folder / "out", folder / "canary"), folder / "out")


def cifar(*batch: bytes) -> Callable[[Path, Path], Path]:
    """CIFAR-10 of one batch, the pickle."""

    def make(out: Path, canary: Path) -> Path:
        data = batch[0] if batch else pickle.dumps({b"data": Payload(canary), b"labels": [0]}, protocol=2)
        return cifar_of(out / "cifar-10-python.tar.gz", data)

    return make


def tar_bomb(name: str) -> Callable[[Path, Path], Path]:
    """A compressed tar whose member has 16 GiB."""

    def make(out: Path, canary: Path) -> Path:
        block = gzip.compress(bytes(1 << 28), 1)  # gzip streams may follow each other
        header = gzip.compress(member("cifar-10-batches-py/data_batch_1", b"", size=16 << 30))
        (out / name).write_bytes(header + 64 * block)
        return out / name if name.startswith("cifar") else beside(out)

    return make


def beside(out: Path) -> Path:
    """ImageNet's validation archive of one image, to whose devkit its reader turns."""
    (out / "val.tar").write_bytes(member("ILSVRC2012_val_00000001.JPEG") + bytes(1024))
    return out / "val.tar"


def devkit(meta: bytes) -> Callable[[Path, Path], Path]:
    def make(out: Path, canary: Path) -> Path:
        path = out / "ILSVRC2012_devkit_t12.tar.gz"
        truth = member("kit/data/ILSVRC2012_validation_ground_truth.txt", b"1\n")
        path.write_bytes(gzip.compress(member("kit/data/meta.mat", meta) + truth + bytes(1024)))
        return beside(out)

    return make


def parquet(rows: int = 4, groups: int = 1, **metadata: object) -> Callable[[Path, Path], Path]:
    """Parquet of the good images; `metadata`: of the Hugging Face features."""

    def make(out: Path, canary: Path) -> Path:
        import pyarrow
        from pyarrow import parquet

        images = [path.read_bytes() for path in sorted((out / "images" / "0").iterdir())]
        cells = (images * rows)[:rows] if rows < 100 else [b""] * rows
        table = pyarrow.table({"image": cells, "label": [0] * rows})
        if metadata:
            table = table.replace_schema_metadata({"huggingface": json.dumps(metadata) if "raw" not in metadata
                                                   else metadata["raw"]})  # fmt: skip
        parquet.write_table(table, out / "train.parquet", compression="zstd")
        return out / "train.parquet"

    return make


def named(name: str, content: bytes | Callable[[Path, Path], bytes | None]) -> Callable[[Path, Path], Path]:
    def make(out: Path, canary: Path) -> Path:
        data = content if isinstance(content, bytes) else content(out / name, canary)
        if data is not None:
            (out / name).write_bytes(data)
        return out / name

    return make


def cut(make: Callable[[Path, Path], Path], at: float) -> Callable[[Path, Path], Path]:
    def shorter(out: Path, canary: Path) -> Path:
        path = make(out, canary)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * at)])
        return path

    return shorter


def features(value: object) -> Callable[[Path, Path], Path]:
    return parquet(info={"features": value})


FAR = b"\x80\x02" + b"K\x00r\xff\xff\xff\x7f" + b"."  # puts a number in place 2^31 - 1 of the memo
STATE = pickle.dumps({b"data": np.zeros((1, 3072), np.float64), b"labels": [0]}, protocol=2)
ARCHIVES = {
    "CIFAR with a payload": cifar(),
    "CIFAR with a memo of 2^31 places": cifar(FAR),
    "CIFAR of other arrays": cifar(STATE),
    "CIFAR of nothing": cifar(pickle.dumps(None, protocol=2)),
    "CIFAR with a string of 2^31 bytes": cifar(b"\x80\x02X" + struct.pack("<I", 2**31 - 1) + b"a."),
    "CIFAR that holds itself": cifar(b"\x80\x02}q\x00(U\x04dataq\x01h\x00u."),
    "CIFAR of 16 GiB": tar_bomb("cifar-10-python.tar.gz"),
    "devkit of 16 GiB": tar_bomb("ILSVRC2012_devkit_t12.tar.gz"),
    "devkit with a payload": devkit(pickle.dumps(Payload(Path("canary")), protocol=2)),
    "devkit with a MATLAB file of 2^31 elements": devkit(
        b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\x01IM" + struct.pack("<II", 14, 2**31 - 1) + bytes(64)
    ),
    "Parquet of 10^7 rows of nothing": parquet(rows=10_000_000),
    "Parquet whose features are a list": features([1]),
    "Parquet whose features are numbers": features({"image": 1, "label": 2}),
    "Parquet whose class names are a number": features({"label": {"_type": "ClassLabel", "names": 5}}),
    "Parquet whose metadata is nested": parquet(raw="[" * 20_000),
    "Parquet cut short": cut(parquet(), 0.7),
    "Parquet of zeros": named("train.parquet", b"PAR1" + bytes(1000) + b"\xff\xff\xff\x7fPAR1"),
    "Parquet of 1 TiB": named("train.parquet", lambda path, canary: contents.enormous(path)),
    "tar of 1 TiB": named("a.tar", lambda path, canary: contents.enormous(path)),
    "FIFO": named("a.tar", lambda path, canary: contents.SPECIAL["FIFO"](path)),
}
LISTS = {
    "a pickle": named("a.csv", contents.TEXT["pickle"](Path("canary"))),
    "a list of 1 TiB": named("a.csv", lambda path, canary: contents.enormous(path)),
    "a FIFO": named("a.csv", lambda path, canary: contents.SPECIAL["FIFO"](path)),
    "paths to devices": named("a.csv", b"path,label\n/dev/zero,1\n/dev/stdin,1\n/proc/self/mem,1\n"),
    "paths to no images": named("a.csv", b"path,label\n/etc/passwd,1\n../../../etc/shadow,1\n"),
    "a field of 10^6 bytes": named("a.csv", b"path,label\n" + b"a" * 1_000_000 + b",1\n"),
    "zeros": named("a.csv", b"path,label\n" + bytes(1000)),
    "nested lines": named("a.jsonl", b"[" * 20_000 + b"\n" + b'{"path":' * 20_000 + b"\n"),
    "lines of other types": named("a.jsonl", b'{"path": 5}\n[1]\nnull\n{"path": "a", "label": {"a": [1]}}\n'),
    "labels of 10^5 digits": named("a.jsonl", b'{"path": "images/0/a.png", "label": ' + b"9" * 100_000 + b"}\n"),
    "label 10^15": named("a.jsonl", b'{"path": "images/0/a.png", "label": 1000000000000000}\n'),
}


def unfinished(good: Good, file: str, content, plain: bool, folder: Path) -> list[list[str]]:
    out = folder / "out"
    (out / "latents.partial").mkdir(parents=True)
    (out / "latents.writing").mkdir()
    (out / "latents.partial" / "shard-00000.tar").write_bytes(bytes(1024))
    path = out / "latents.writing" / file
    path.write_bytes(content(folder / "canary")) if plain else content(path)
    return extract(good, good.root / "images", out)
