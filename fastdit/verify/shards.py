"""Checks of a folder of latent shards."""

import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fastdit.data.features import FOLDER
from fastdit.data.latents import channel_statistics, channel_sums, rounded, scale_remarks
from fastdit.data.manifest import DTYPES, Manifest, Shard, class_counts
from fastdit.errors import counted
from fastdit.files import TarHeader, tar_members
from fastdit.verify.checkpoints import check_autoencoder
from fastdit.verify.features import verify_features
from fastdit.verify.files import check_array, check_counts, check_shard, read_index, sample_bytes
from fastdit.verify.findings import Findings


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
    sums, images, spec = np.zeros((3, manifest.latents.shape[0])), 0, manifest.latents
    for number, shard in enumerate(tqdm(manifest.shards, unit="shard", disable=None)):
        data = check_shard(folder, shard, found)
        if data is not None and index is not None:
            for own in check_samples(manifest, index[index["shard"] == number], data, shard, found):
                sums, images = sums + own, images + 1
    if images == len(manifest) and not found.counts["sample"]:
        mean, std = channel_statistics(sums / images, spec)
        for name, own, said in (
            ("means", mean, np.array(manifest.channel_mean)),
            ("standard deviations", std, np.array(manifest.channel_std)),
        ):
            if own.shape != said.shape or not np.allclose(own, said, rtol=1e-5, atol=1e-6):
                line = f"the channel {name} are {rounded(own)}, but the manifest says {rounded(said)}"
                found.add("statistics", line)
        for line in scale_remarks(mean, std, spec.scale, spec.vae):
            found.add("scale", line)
        size = sum(shard.bytes for shard in manifest.shards) / 2**20
        say(
            f"{folder}: {counted(len(manifest), 'image')} of {counted(manifest.num_classes, 'class', 'classes')} in "
            f"{counted(len(manifest.shards), 'shard')}, {size:.1f} MiB, latents {'x'.join(map(str, spec.shape))}, "
            f"mean {rounded(mean)}, standard deviation {rounded(std)}"
        )
    if (folder / FOLDER).exists():
        verify_features(folder / FOLDER, found, say, index, manifest.listing)


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
    manifest: Manifest, rows: np.ndarray, data: np.ndarray, shard: Shard, found: Findings
) -> Iterator[np.ndarray]:
    """Check all samples of a shard: the tar structure, checksums, finite values, standard deviations >= 0.

    Yields the `channel_sums` of each good one.
    """
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
            yield channel_sums(array)


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
    found.add("files", f"{shard.name}: a tar reader finds {counted(len(arrays), 'sample')} and "
              f"{counted(len(labels), 'label')}, not {shard.samples} of each; a header is damaged")  # fmt: skip
    return None
