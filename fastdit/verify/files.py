"""Checks that folders of latents and of features share: files, index, checksums of the samples."""

import hashlib
import zlib
from pathlib import Path
from tarfile import BLOCKSIZE

import numpy as np

from fastdit.data.manifest import Shard, ShardFolder
from fastdit.files import read_array
from fastdit.verify.findings import Findings


def read_index(manifest: ShardFolder, found: Findings) -> np.ndarray | None:
    """The index, or None with a finding; tar files that the manifest does not name are findings, too."""
    folder = manifest.folder
    for path in sorted(set(folder.glob("*.tar")) - {folder / shard.name for shard in manifest.shards}):
        found.add("files", f"{path} is not in the manifest")
    try:
        return manifest.index()
    except ValueError as error:
        found.add("index", str(error))
        return None


def check_counts(manifest: ShardFolder, index: np.ndarray, found: Findings) -> bool:
    """Return True if the index has other numbers of samples than the shards, or a key twice."""
    path, before = manifest.folder / "index.npy", found.counts["index"]
    counts = np.bincount(index["shard"], minlength=len(manifest.shards)).tolist()
    if counts != [shard.samples for shard in manifest.shards]:
        found.add("index", f"{path} and the manifest have different numbers of samples per shard")
    if len(np.unique(index["key"])) != len(index):
        found.add("index", f"{path} has a duplicate key")
    return found.counts["index"] > before


def check_shard(folder: Path, shard: Shard, found: Findings) -> np.ndarray | None:
    """The memory-mapped bytes of the shard, or None if it has the wrong size."""
    path = folder / shard.name
    size = path.stat().st_size if path.is_file() else None
    if size != shard.bytes:
        state = "is missing" if size is None else f"has {size} bytes instead of {shard.bytes}"
        found.add("files", f"{path} {state}")
        return None
    data = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)  # an empty file cannot be mapped
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        found.add("files", f"{path} is damaged: its SHA-256 is not the one in the manifest")
    return data


def sample_bytes(
    data: np.ndarray, row: np.void, size: int, name: str, found: Findings, orientations: int = 2
) -> np.ndarray | None:
    """All orientations of a sample, `size` bytes each; None with a finding if they do not match their checksums."""
    start = int(row["offset"])
    views = data[start : start + orientations * size]
    if [zlib.crc32(views[:size]), zlib.crc32(views[-size:])] == row["crc32"].tolist():
        if len(views) == orientations * size:
            return views
    found.add("sample", f"{name}: sample {row['key']:09d} is damaged: its bytes do not match their CRC-32")
    return None


def check_array(data: np.ndarray, row: np.void, like: np.ndarray, name: str, found: Findings) -> None:
    """A finding unless the .npy file of a sample, which lies at the start of a block, has the shape and type of `like`.

    Its bytes are those of other shapes as well, if the manifest is not true.
    """
    offset = int(row["offset"])
    try:
        held = read_array(data[offset // BLOCKSIZE * BLOCKSIZE : offset + like.nbytes])
    except ValueError as error:
        return found.add("sample", f"{name}: sample {row['key']:09d} is damaged: {error}")
    if (held.shape, held.dtype) != (like.shape, like.dtype):
        found.add("sample", f"{name}: sample {row['key']:09d} has {held.dtype} of shape {held.shape}, but the manifest "
                  f"says {like.dtype} of {like.shape}")  # fmt: skip
