"""Checks of a folder of features (data/features.py)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fastdit.data.features import FOLDER, FeatureManifest, is_finite, moments, same_images
from fastdit.data.latents import rounded
from fastdit.errors import counted
from fastdit.verify.files import check_array, check_counts, check_shard, read_index, sample_bytes
from fastdit.verify.findings import Findings


def verify_features(
    folder: Path, found: Findings, say: Callable[[str], None], latents: np.ndarray | None = None, listing: str = ""
) -> None:
    """Check a folder of features, and that they are of the images of the latents: by their index and `listing`."""
    try:
        manifest = FeatureManifest.load(folder)
    except ValueError as error:
        return found.add("manifest", str(error))
    index, sums, images = read_index(manifest, found), np.zeros(2), 0
    if index is not None and check_counts(manifest, index, found):
        index = None
    same = index is None or latents is None or same_images(index, latents)
    if not same or not manifest.same_listing(listing):
        found.add("index", f"{folder} has the features of other images than the latents, or in another order")
    for number, shard in enumerate(tqdm(manifest.shards, unit="shard", disable=None)):
        data = check_shard(folder, shard, found)
        for i, row in enumerate(() if data is None or index is None else index[index["shard"] == number]):
            both = sample_bytes(data, row, manifest.record.itemsize, f"{FOLDER}/{shard.name}", found)
            if both is None:
                continue
            array = np.frombuffer(both.tobytes(), manifest.record.base).reshape(2, *manifest.record.shape)
            if i == 0:
                check_array(data, row, array, f"{FOLDER}/{shard.name}", found)
            if is_finite(array):
                sums, images = sums + moments(array), images + 1
            else:
                found.add("sample", f"{FOLDER}/{shard.name}: sample {row['key']:09d} has values that are not finite")
    if images == len(manifest) and images:
        mean, square = sums / images
        std = max(square - mean**2, 0) ** 0.5
        if not np.allclose([mean, std], [manifest.mean, manifest.std], rtol=1e-5, atol=1e-6):
            said = rounded([manifest.mean, manifest.std])
            found.add("statistics", f"{folder}: mean and deviation are {rounded([mean, std])}, not {said}")
        size, (rows, columns) = sum(shard.bytes for shard in manifest.shards) / 2**20, manifest.grid
        say(
            f"{folder}: features of {counted(len(manifest), 'image')}, {manifest.encoder}, {rows} x {columns} patches "
            f"of {manifest.dim} values as {manifest.dtype}, {size:.1f} MiB, mean {mean:.2f}, "
            f"standard deviation {std:.2f}"
        )
