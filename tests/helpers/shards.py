"""Shards of samples without keys."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastdit.data.manifest import Manifest
from fastdit.data.writer import SHARD_SIZE, write_keyed


def write_shards(
    samples: Iterable[tuple[np.ndarray, int]], out: str | Path, about: Manifest, shard_size: int = SHARD_SIZE
) -> Manifest:
    """Pairs of moments (orientations, 2C, h, w) and label; their keys are 0, 1, ..."""
    keyed = ((key, *sample) for key, sample in enumerate(samples))
    return write_keyed(keyed, out, replace(about, images=0), shard_size=shard_size)
