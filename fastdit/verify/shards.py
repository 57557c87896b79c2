"""Checks of a folder of latent shards."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fastdit.data.features import FOLDER
from fastdit.data.latents import scale_remarks
from fastdit.data.manifest import DTYPES, Manifest, Shard, class_counts
from fastdit.files import TarHeader, tar_members
from fastdit.verify.checkpoints import check_autoencoder
from fastdit.verify.features import verify_features
from fastdit.verify.files import check_array, check_counts, check_shard, read_index, sample_bytes
from fastdit.verify.findings import Findings, rounded


class ChannelStatistics:
    """Mean and standard deviation of the scaled latents per channel, as the manifest stores them."""

    def __init__(self, manifest: Manifest):
        self.manifest, self.images, self.sums = manifest, 0, np.zeros((3, manifest.latents.shape[0]))

    def add(self, array: np.ndarray) -> None:
        mean, std = np.split(array, 2, axis=1)  # (2 or 1, C, h, w) each
        self.sums += np.stack([m.mean(axis=(0, 2, 3)) for m in (mean, mean**2, std**2)])
        self.images += 1

    @property
    def mean(self) -> np.ndarray:
        latents = self.manifest.latents
        return (self.sums[0] / self.images - np.array(latents.shift)) * np.array(latents.scale)

    @property
    def std(self) -> np.ndarray:
        mean, square, variance = self.sums / self.images
        return np.sqrt(square - mean**2 + variance) * abs(np.array(self.manifest.latents.scale))

    def compare(self, found: Findings) -> None:
        for name, own, stored in (
            ("means", self.mean, "channel_mean"),
            ("standard deviations", self.std, "channel_std"),
        ):
            said = np.array(getattr(self.manifest, stored))
            if own.shape != said.shape or not np.allclose(own, said, rtol=1e-5, atol=1e-6):
                said = rounded(said)
                found.add("statistics", f"the channel {name} are {rounded(own)}, but the manifest says {said}")
        for line in scale_remarks(self.mean, self.std, self.manifest.latents.scale, self.manifest.latents.vae):
            found.add("scale", line)


def verify_shards(folder: Path, found: Findings, say: Callable[[str], None]) -> None:
    """Check a folder of latents, and the features in it if there are any."""
    try:
        manifest = Manifest.load(folder)
    except ValueError as error:
        return found.add("manifest", str(error))
    check_autoencoder(manifest.latents, Path(manifest.latents.vae), str(folder), True, found, say)
    index = read_index(manifest, found)
    if index is not None and check_index(manifest, index, found):
        index = None  # its offsets cannot be trusted
    statistics = ChannelStatistics(manifest)
    for number, shard in enumerate(tqdm(manifest.shards, unit="shard", disable=None)):
        data = check_shard(folder, shard, found)
        if data is not None and index is not None:
            check_samples(manifest, index[index["shard"] == number], data, shard, found, statistics)
    if statistics.images == len(manifest) and not found.counts["sample"]:
        statistics.compare(found)
        size = sum(shard.bytes for shard in manifest.shards) / 2**20
        say(
            f"{folder}: {len(manifest)} images of {manifest.num_classes} classes in {len(manifest.shards)} shards, "
            f"{size:.1f} MiB, latents {'x'.join(map(str, manifest.latents.shape))}, mean "
            f"{rounded(statistics.mean)}, standard deviation {rounded(statistics.std)}"
        )
    if (folder / FOLDER).exists():
        verify_features(folder / FOLDER, found, say, index)


def check_index(manifest: Manifest, index: np.ndarray, found: Findings) -> bool:
    """Return True if the index does not match the shards."""
    wrong, labels = check_counts(manifest, index, found), index["label"]
    last = max(manifest.num_classes, 1) - 1  # without classes, all labels are 0
    for row in index[(labels < 0) | (labels > last)]:
        found.add("labels", f"sample {row['key']:09d} has label {row['label']}, not one of 0..{last}")
    if not found.counts["labels"]:
        if class_counts(labels, manifest.num_classes) != manifest.class_counts:
            found.add("labels", "the class counts in the manifest differ from the index")
    return wrong


def check_samples(
    manifest: Manifest, rows: np.ndarray, data: np.ndarray, shard: Shard, found: Findings, statistics: ChannelStatistics
) -> None:
    """Check all samples of a shard: the tar structure, checksums, finite values, standard deviations >= 0."""
    labels = tar_labels(data, shard, found)
    dtype, (channels, height, width) = DTYPES[manifest.dtype], manifest.latents.shape
    size = dtype.itemsize * 2 * channels * height * width
    for i, row in enumerate(rows):
        key = f"{int(row['key']):09d}"
        if labels is not None and labels.get(key) != row["label"]:
            line = f"{shard.name}: sample {key} has label {labels.get(key)} in the tar, {row['label']} in the index"
            found.add("sample", line)
        views = sample_bytes(data, row, size, shard.name, found, manifest.orientations)
        if views is None:
            continue
        array = views.view(dtype).reshape(-1, 2 * channels, height, width)
        if i == 0:
            check_array(data, row, array, shard.name, found)
        array = array.astype(np.float64)
        if not np.isfinite(array).all():
            found.add("sample", f"{shard.name}: sample {key} has values that are not finite")
        elif (array[:, channels:] < 0).any():
            found.add("sample", f"{shard.name}: sample {key} has negative standard deviations")
        else:
            statistics.add(array)


def tar_labels(data: np.ndarray, shard: Shard, found: Findings) -> dict[str, int] | None:
    """Key -> label as webdataset reads them; None if the tar cannot be read."""
    labels, arrays = {}, set()
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:", tarinfo=TarHeader) as tar:
            for member in tar_members(tar):
                key, _, kind = member.name.partition(".")
                if not member.isfile() or "/" in key:
                    raise ValueError(f"{member.name} is a link, a folder or a device, or in another folder")
                if kind == "cls":
                    labels[key] = int(tar.extractfile(member).read(20))
                else:
                    arrays.add(key)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        found.add("files", f"{shard.name} is not a complete tar: {error}")
        return None
    if len(labels) == len(arrays & labels.keys()) == shard.samples:
        return labels
    found.add("files", f"{shard.name}: a tar reader finds {len(arrays)} samples and {len(labels)} labels, not "
              f"{shard.samples} of each; a header is damaged")  # fmt: skip
    return None
