"""Shards of samples without keys, and the batches of a folder of latents."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastdit.data.loader import Batch, latent_batches
from fastdit.data.manifest import Manifest
from fastdit.data.writer import SHARD_SIZE, write_keyed


def write_shards(
    samples: Iterable[tuple[np.ndarray, int]], out: str | Path, about: Manifest, shard_size: int = SHARD_SIZE
) -> Manifest:
    """Pairs of moments (orientations, 2C, h, w) and label; their keys are 0, 1, ..."""
    keyed = ((key, *sample) for key, sample in enumerate(samples))
    return write_keyed(keyed, out, replace(about, images=0), shard_size=shard_size)


def take(manifest: Manifest, steps: int, **options) -> list[Batch]:
    """The first `steps` batches of `latent_batches`, which is then closed."""
    batches = latent_batches(manifest, **options)
    try:
        return [next(batches) for _ in range(steps)]
    finally:
        batches.close()
