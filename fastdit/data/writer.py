"""Atomic writing of shards: they are written to <out>.partial, synced to disk, then renamed to <out>.

Any number of processes write shards independently; `publish` merges them. The bytes depend on the samples alone: the
tar files contain no times and no owners. A shard has its name only once it is complete.
"""

import hashlib
import io
import secrets
import shutil
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastdit.data.images import Skipped, Unusable
from fastdit.data.latents import channel_statistics, channel_sums
from fastdit.data.manifest import DTYPES, SAMPLE, Manifest, Shard, class_counts
from fastdit.files import sha256, sync

SHARD_SIZE = 2048  # images: 67 MB at 256 px in float16, 626 files for ImageNet
TAR_OVERHEAD = 2304  # bytes per sample in addition to its array: two tar headers, the npy header, the label, padding


def check_out(out: str | Path, overwrite: bool = False) -> Path:
    """The absolute path of an output folder; raises a ValueError if it exists and may not be replaced.

    An empty folder may always be replaced. With `overwrite`, a folder with a manifest may be, too.
    """
    out = Path(out).resolve()
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return out
    if not overwrite:
        raise ValueError(f"out={out} exists; choose another folder, or replace it with --overwrite")
    if not (out / "manifest.json").is_file():
        raise ValueError(f"out={out} exists and has no manifest.json, so it is not replaced; choose another folder")
    return out


def partial_folder(out: Path) -> Path:
    """The folder in which `out` is written before it is renamed."""
    return out.with_name(out.name + ".partial")


def prepare(out: Path) -> Path:
    """Creates an empty `partial_folder(out)`."""
    partial = partial_folder(out)
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed run
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"out={out} cannot be created ({error.strerror}); choose another folder") from error
    return partial


class TarWriter:
    """Writes shard `number` to `folder`, each sample with its label; `close` returns what `publish` needs of it."""

    kind = ""  # of the arrays, part of their file names

    def __init__(self, folder: Path, number: int):
        self.number = number
        self.path = folder / f"shard-{number:05d}.tar"
        self.writing = self.path.with_suffix(f".{secrets.token_hex(4)}")  # a killed run's orphan may still write
        self.rows: list[tuple] = []
        self.sums: np.ndarray | int = 0  # float64, over images: what the manifest's statistics are made from
        self.tar = tarfile.open(self.writing, "w", format=tarfile.USTAR_FORMAT)

    def store(self, key: int, array: np.ndarray, label: int) -> None:
        """Appends the array (2, ...) of an image and its mirror image, or (1, ...) without the mirror image."""
        file = io.BytesIO()
        np.save(file, array)
        offset = self._append(f"{key:09d}.{self.kind}.npy", file.getvalue()) + file.tell() - array.nbytes
        self._append(f"{key:09d}.cls", str(label).encode())
        checks = [zlib.crc32(view) for view in array]  # of one orientation, the index has it twice
        self.rows.append((self.number, offset, [checks[0], checks[-1]], int(key), int(label)))

    def _append(self, name: str, data: bytes) -> int:
        """Writes one tar member; returns the offset of its data."""
        info = tarfile.TarInfo(name)  # time and owner are 0; a WebDataset key ends at the first dot of the name
        info.size = len(data)
        offset = self.tar.offset + tarfile.BLOCKSIZE
        self.tar.addfile(info, io.BytesIO(data))
        return offset

    def close(self, skipped: Iterable[str] = (), counts: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Completes the tar file; the part's JSON contents: shard, rows, sums, skipped images, counts of treatments."""
        self.tar.close()
        sync(self.writing)
        shard = Shard(self.path.name, len(self.rows), self.writing.stat().st_size, sha256(self.writing))
        self.writing.rename(self.path)
        sums = np.asarray(self.sums).tolist()  # JSON keeps Python floats exactly
        about = {"skipped": [*skipped], "counts": {**(counts or {})}}
        return {"shard": asdict(shard), "rows": self.rows, "sums": sums, **about}


class ShardWriter(TarWriter):
    """Writes latents."""

    kind = "moments"

    def __init__(self, folder: Path, number: int, dtype: str):
        super().__init__(folder, number)
        self.dtype = DTYPES[dtype]

    def add(self, key: int, moments: np.ndarray, label: int) -> None:
        """Appends the moments (2 or 1, 2C, h, w) as `store` does; ValueError if they overflow the dtype."""
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(moments, dtype=self.dtype)
        if not np.isfinite(array).all():
            raise Unusable(
                f"the latent of image {key} is not finite as {self.dtype.name}; "
                "extract with --dtype float32 and --precision float32"
            )
        self.store(key, array, label)
        self.sums = self.sums + channel_sums(array)


def write_index(partial: Path, parts: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, str]:
    """Merges the rows of all shards into index.npy; the rows (n,) and the SHA-256 of the file."""
    index = np.array([(*r[:2], tuple(r[2]), *r[3:]) for part in parts for r in part["rows"]], dtype=SAMPLE)
    file = io.BytesIO()
    np.save(file, index)
    _write(partial / "index.npy", file.getvalue())
    return index, hashlib.sha256(file.getvalue()).hexdigest()


def move_into_place(partial: Path, out: Path, manifest: str, overwrite: bool = False) -> None:
    """Completes `partial` with the text of its manifest and renames it to `out`."""
    _write(partial / "manifest.json", manifest.encode())
    sync(partial)
    check_out(out, overwrite)
    old = out.with_name(out.name + ".replaced")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    partial.rename(out)
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def publish(
    partial: Path,
    out: Path,
    about: Manifest,
    parts: Sequence[Mapping[str, Any]],
    overwrite: bool = False,
    ignored: Iterable[str] = (),
) -> Manifest:
    """Merges the parts of all shards into the index, manifest and list of skipped images, then renames to `out`.

    `about` describes the latents; the counts, statistics, shards and checksums are filled in here.
    """
    index, digest = write_index(partial, parts)
    if not len(index):
        raise Unusable(f"none of the images ({about.images:,}) could be read; repair them or choose another folder")
    average = sum(np.array(part["sums"]) for part in parts if part["rows"]) / len(index)
    mean, std = channel_statistics(average, about.latents)
    skipped = Skipped(about.images)  # each process counted its own; this is the total
    for line in (line for part in parts for line in part["skipped"]):
        skipped.add(*line.split("\t", 1))
    if skipped.lines or ignored:
        text = "".join(f"{line}\n" for line in [*skipped.lines, *ignored])
        _write(partial / "skipped.txt", text.encode(errors="backslashreplace"))
    counts = sum((Counter(part["counts"]) for part in parts), Counter())
    manifest = replace(
        about,
        skipped=len(skipped.lines),
        counts=dict(sorted(counts.items())),
        class_counts=class_counts(index["label"], about.num_classes),
        channel_mean=tuple(mean.tolist()),
        channel_std=tuple(std.tolist()),
        shards=tuple(Shard(**part["shard"]) for part in parts),
        index_sha256=digest,
        folder=out,
    )
    move_into_place(partial, out, manifest.to_json(), overwrite)
    return manifest


def write_keyed(
    samples: Iterable[tuple[int, np.ndarray, int]],
    out: str | Path,
    about: Manifest,
    *,
    shard_size: int = SHARD_SIZE,
    overwrite: bool = False,
    write_more: Callable[[Path], None] | None = None,
) -> Manifest:
    """Writes samples of key, moments (orientations, 2C, h, w) and label, in a single process; `about` describes them.

    Keys must differ. `about.images` is kept, and 0 is their number. `overwrite`: see `check_out`. `write_more` gets the
    folder after its shards, and before it appears.
    """
    out = check_out(out, overwrite)
    partial = prepare(out)
    try:
        parts = write_tars(samples, lambda number: ShardWriter(partial, number, about.dtype), shard_size)
        if write_more:
            write_more(partial)
        images = about.images or sum(len(part["rows"]) for part in parts)
        return publish(partial, out, replace(about, images=images), parts, overwrite)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_tars(
    samples: Iterable[tuple[int, np.ndarray, int]], writer_of: Callable[[int], Any], shard_size: int = SHARD_SIZE
) -> list[dict[str, Any]]:
    """Writes samples of key, array and label with the writers of shards 0, 1, ...; what `publish` needs of them."""
    parts: list[dict[str, Any]] = []
    count = 0
    for sample in samples:
        if count % shard_size == 0:
            writer = writer_of(len(parts))
        writer.add(*sample)
        count += 1
        if count % shard_size == 0:
            parts.append(writer.close())
    if count % shard_size:
        parts.append(writer.close())
    return parts


def write_synced(path: Path, data: bytes) -> None:
    """Writes a file that is there in full or not at all, also after a power failure."""
    new = path.with_suffix(".new")
    _write(new, data)
    new.rename(path)
    sync(path.parent)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    sync(path)
