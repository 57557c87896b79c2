"""Samples of shards by their places in the index, checked."""

import os
from collections import OrderedDict

import numpy as np

from fastdit.data.features import is_finite
from fastdit.data.manifest import ShardFolder

try:
    from isal.isal_zlib import crc32  # eight times as fast as zlib's
except ImportError:  # there is no wheel for this platform
    from zlib import crc32

OPEN_FILES = 512  # per reader; the usual limit is 1,024 per process
STRETCHES = 256  # of files that are remembered as requested; the system may have dropped older ones from memory


class ShardReader:
    """Reads by offset, not through a memory map: a failing disk or truncated file raises an error, not SIGBUS."""

    def __init__(self, manifest: ShardFolder, verify: bool = True, block: int = 0):
        self.manifest, self.verify, self.block = manifest, verify, block
        self.ahead: OrderedDict[tuple[int, int], None] = OrderedDict()  # stretches that the system was asked to read
        self.files: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor, least recently used first
        largest = max((shard.bytes for shard in manifest.shards), default=1)
        self.most = max(1, min(OPEN_FILES, manifest.cache.most // (4 * largest)))  # open ones stay in the cache

    def fill(self, samples: np.ndarray, mirrored: np.ndarray, out: np.ndarray) -> dict[int, str]:
        """Fill out (n, ...) with one orientation of each sample (n,); returns what is wrong with those that are bad."""
        faults, data, size = {}, memoryview(out.reshape(-1).view(np.uint8)), out[:1].nbytes
        checks = np.take_along_axis(samples["crc32"], mirrored[:, None], 1)[:, 0].tolist()
        places = zip(samples["shard"].tolist(), (samples["offset"].astype(np.int64) + mirrored * size).tolist(),
                     checks, strict=True)  # fmt: skip
        for i, (shard, offset, check) in enumerate(places):
            own = data[i * size : (i + 1) * size]
            if self.block:
                self.read_ahead(shard, offset, 2 * self.block * size)
            complete = os.preadv(self.file(shard), (own,), offset) == size
            if not complete or (self.verify and crc32(own) != check):
                faults[i] = "is damaged: its bytes do not match its crc32"
        if not is_finite(out):
            for i in range(len(out)):
                if i not in faults and not is_finite(out[i : i + 1]):
                    faults[i] = "has values that are not finite"
        for i, reason in faults.items():
            path = self.manifest.folder / self.manifest.shards[int(samples["shard"][i])].name
            faults[i] = f"sample {int(samples['key'][i]):09d} of {path} {reason}"
        return faults

    def read_ahead(self, shard: int, offset: int, size: int) -> None:
        """Have the system read the `size` bytes around an offset at once: about one block of data.block."""
        stretch = shard, offset // size
        if stretch not in self.ahead and hasattr(os, "posix_fadvise"):  # macOS has none
            os.posix_fadvise(self.file(shard), stretch[1] * size, size, os.POSIX_FADV_WILLNEED)
        self.ahead[stretch] = None
        self.ahead.move_to_end(stretch)
        if len(self.ahead) > STRETCHES:
            self.ahead.popitem(last=False)

    def file(self, shard: int) -> int:
        if shard in self.files:
            self.files.move_to_end(shard)
        else:
            if len(self.files) >= self.most:
                os.close(self.files.popitem(last=False)[1])
            self.files[shard] = self.manifest.open_shard(shard)
        return self.files[shard]

    def close(self) -> None:
        while self.files:
            os.close(self.files.popitem()[1])
