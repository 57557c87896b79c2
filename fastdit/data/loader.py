"""Batches of latents in an order that is a pure function of (seed, position).

Every process can read every sample, so the images in a batch depend neither on the number of processes nor on the step
at which a run resumes.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import count
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fastdit.data.features import FeatureManifest, class_token_of, unpacked
from fastdit.data.manifest import AGAIN, DTYPES, Manifest
from fastdit.data.mixture import Mixture
from fastdit.data.order import WINDOW, held_out_rows, mirrors
from fastdit.data.reader import ShardReader
from fastdit.data.synthetic import Synthetic
from fastdit.errors import counted


class Batch(NamedTuple):
    """This process's part of one global batch: moments (n, 2C, h, w) float32, unscaled; labels y (n,) int64.

    `features` (n, rows, columns, D) float16: of the patches of the same images in the same orientation, if asked for;
    and `class_token` (n, D), if the encoder has one.
    """

    step: int
    moments: Tensor
    y: Tensor
    features: Tensor | None = None
    class_token: Tensor | None = None


def latent_batches(
    manifest: Manifest,
    *,
    global_batch: int,
    rows: slice = slice(None),
    seed: int,
    start_step: int = 0,
    hflip: bool = True,
    verify: bool = True,
    prefetch: int = 4,
    pin_memory: bool = False,
    skip_damaged: Callable[[str], None] | None = None,
    features: FeatureManifest | None = None,
) -> Iterator[Batch]:
    """Infinite iterator over batches from `start_step` on; a background thread reads `prefetch` batches ahead.

    Step k uses positions k * global_batch to (k + 1) * global_batch - 1; `rows` selects this process's part of them.
    The images at the positions are those of an `Order`. Each epoch has its own permutation and, with `hflip`, its own
    choice of mirrored images; both depend only on (seed, epoch). Close the iterator to stop the thread.
    With `features`, batches have those of the same images. Raises a ValueError immediately if latents or features are
    missing, do not belong together or are fewer than `global_batch`, or if `hflip` is set and there are no mirror
    images; and during iteration if `verify` is set and a sample's bytes do not match its crc32.
    """
    manifest.check(global_batch=global_batch, hflip=hflip)
    if global_batch < 1 or start_step < 0:
        raise ValueError(f"global_batch={global_batch} must be positive and start_step={start_step} not negative")
    check_cache(manifest, features)
    if isinstance(manifest, Synthetic):
        reader = _Generator(manifest, global_batch, rows, pin_memory)
    else:
        reader = _Reader(manifest, features, global_batch, rows, seed, hflip, verify, pin_memory, skip_damaged)
    return read_ahead(reader, start_step, prefetch)


def check_cache(manifest: Manifest, features: FeatureManifest | None = None) -> None:
    """Raises a ValueError if data.cache_gib has no room for the shards that are read again and again."""
    block, least = manifest.block, 0.0
    for folder in (part for each in (manifest, features) if each for part in getattr(each, "parts", (each,))):
        sizes = [shard.bytes for shard in folder.shards if folder.url]
        if block and sizes:  # those of a window of blocks, not all
            least += min(sum(sizes), WINDOW * (block * len(sizes) / len(folder) + 1) * max(sizes))
        else:
            least += sum(sizes)
    if least > manifest.cache.most:
        what, remedy = (f"data.block={block}", "") if block else ("a full shuffle", ", or data.block=4096")
        raise ValueError(f"data.cache_gib={manifest.cache.gib:g} is less than the {least / 2**30:.3g} GiB of shards "
                         f"that {what} reads at a time; set more{remedy}")  # fmt: skip


class Reads(Protocol):
    """What `read_ahead` reads from; a batch is a named tuple of its step and tensors, or None."""

    def batch(self, step: int) -> NamedTuple: ...

    def close(self) -> None: ...


def read_ahead(reader: Reads, start_step: int, prefetch: int) -> Iterator[Any]:
    """The batches from `start_step` on; a thread reads `prefetch` of them ahead. Closing it closes the reader."""
    steps = count(start_step)
    pool = ThreadPoolExecutor(1, thread_name_prefix="latents")
    try:
        pending = deque(pool.submit(reader.batch, next(steps)) for _ in range(prefetch + 1))
        while True:
            batch = pending.popleft().result()  # re-raises the thread's exceptions
            pending.append(pool.submit(reader.batch, next(steps)))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)  # waits for the batch that is being read
        reader.close()


def on_device(batches: Iterator[Any], device: torch.device) -> Iterator[Any]:
    """The batches, moved to `device`. On a GPU, a separate stream copies the next batch while this one is in use."""
    if device.type != "cuda":
        return (yield from batches)
    stream = torch.cuda.Stream(device)

    def moved() -> NamedTuple:
        batch = next(batches)
        with torch.cuda.stream(stream):
            return type(batch)(batch[0], *(t if t is None else t.to(device, non_blocking=True) for t in batch[1:]))

    try:
        ahead = moved()
        while True:
            batch, current = ahead, torch.cuda.current_stream(device)
            current.wait_stream(stream)  # before the next copy starts, so that it waits for this batch only
            for tensor in batch[1:]:
                if tensor is not None:
                    tensor.record_stream(current)
            ahead = moved()
            yield batch
    finally:
        batches.close()


def moments_shape(manifest: Manifest) -> tuple[int, int, int]:
    """(2C, h, w)"""
    channels, height, width = manifest.latents.shape
    return 2 * channels, height, width


class _Reader:
    """Reads batches of latents, and of features if there are any."""

    def __init__(
        self, manifest: Manifest, features: FeatureManifest | None, global_batch: int, rows: slice, seed: int, hflip,
        verify, pin_memory, skip_damaged,
    ):  # fmt: skip
        self.manifest, self.seed, self.skip_damaged, self.damaged = manifest, seed, skip_damaged, set()
        self.hflip, self.pin_memory = hflip, pin_memory
        self.global_batch, self.rows = global_batch, np.arange(global_batch)[rows]
        self.index = manifest.index()
        labels = self.index["label"]
        if labels.min() < 0 or labels.max() >= max(manifest.num_classes, 1):
            raise ValueError(
                f"{manifest.folder / 'index.npy'} has labels {labels.min()} to {labels.max()}, but the manifest names "
                f"{counted(manifest.num_classes, 'class', 'classes')}; {AGAIN}"
            )
        self.latents, self.features = ShardReader(manifest, verify, manifest.block), None
        self.order = manifest.order(seed)
        if features is not None:
            self.features, self.feature_index = ShardReader(features, verify, manifest.block), features.check(manifest)

    def take(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """The images of a step, damaged ones replaced, as rows of the index, their moments, and features if any."""
        images, epochs = self.order(step * self.global_batch + self.rows)
        mirrored = mirrors(self.seed, epochs, images) if self.hflip else np.zeros_like(images)
        array = np.empty((len(images), *moments_shape(self.manifest)), DTYPES[self.manifest.dtype])
        features = None if self.features is None else np.empty(len(images), self.features.manifest.record)
        faults = self.read(images, mirrored, array, features)
        for i in sorted(faults):
            fault = faults[i]
            while fault:
                if self.skip_damaged is None or len(self.damaged) == len(self.index):
                    raise ValueError(f"{fault}; {AGAIN}, or set data.skip_damaged=true")
                if images[i] not in self.damaged:
                    self.damaged.add(images[i])
                    self.skip_damaged(f"{fault}; it is left out")
                images[i] = (images[i] + 1) % len(self.index)  # the same one in every epoch and on any process
                one = slice(i, i + 1)
                own = None if features is None else features[one]
                fault = self.read(images[one], mirrored[one], array[one], own).get(0)
        return images, array, features

    def batch(self, step: int) -> Batch:
        images, array, features = self.take(step)
        y = torch.from_numpy(self.index["label"][images].astype(np.int64))
        tensors = [torch.from_numpy(array).float(), y]
        if features is not None:
            tensors += parts_of(features, self.features.manifest)
        return Batch(step, *(t.pin_memory() if self.pin_memory else t for t in tensors))

    def read(
        self, images: np.ndarray, mirrored: np.ndarray, array: np.ndarray, features: np.ndarray | None
    ) -> dict[int, str]:
        """Fill the arrays with one orientation of each image; returns what is wrong with those that are bad."""
        faults = self.latents.fill(self.index[images], mirrored, array)
        if features is not None:
            faults = self.features.fill(self.feature_index[images], mirrored, features) | faults
        return faults

    def close(self) -> None:
        for reader in filter(None, (self.latents, self.features)):
            reader.close()


class _Generator:
    """Makes batches of generated latents. There is nothing to shuffle or to mirror: all images are random alike."""

    def __init__(self, manifest: Synthetic, global_batch: int, rows: slice, pin_memory: bool):
        self.manifest, self.global_batch, self.rows, self.pin_memory = manifest, global_batch, rows, pin_memory

    def batch(self, step: int) -> Batch:
        keys = self.manifest.keys(step * self.global_batch, self.global_batch)[self.rows]
        tensors = map(torch.from_numpy, (self.manifest.moments(keys), self.manifest.labels(keys)))
        return Batch(step, *(t.pin_memory() if self.pin_memory else t for t in tensors))

    def close(self) -> None:
        pass


def read_moments(manifest: Manifest, rows: np.ndarray, mirrored: bool = False) -> Tensor:
    """Moments (n, 2C, h, w) float32, unscaled, of rows of the index; without damaged ones.

    `mirrored`: those of the mirror images, if there are any.
    """
    if isinstance(manifest, Synthetic):
        return torch.from_numpy(manifest.moments(rows["key"], mirrored))
    views = np.full(len(rows), int(mirrored and manifest.orientations == 2))
    array = np.empty((len(rows), *moments_shape(manifest)), DTYPES[manifest.dtype])
    with closing(ShardReader(manifest)) as reader:
        faults = reader.fill(rows, views, array)
    return torch.from_numpy(np.delete(array, [*faults], axis=0)).float()


def parts_of(array: np.ndarray, manifest: FeatureManifest) -> list[Tensor]:
    """Stored features of n images, one orientation each -> patches (n, rows, columns, D), class token (n, D) if any."""
    patches = math.prod(manifest.grid)
    parts = [unpacked(array, slice(patches)).unflatten(1, manifest.grid)]
    return parts + ([unpacked(array, slice(patches, None))[:, 0]] if manifest.class_token else [])


def read_class_tokens(features: FeatureManifest, keys: np.ndarray) -> Tensor:
    """The class tokens (n, D) of the images with these keys, not mirrored, as `class_token_of` gives them."""
    index = features.index()
    order = np.argsort(index["key"], kind="stable")
    rows = index[order[np.searchsorted(index["key"], keys, sorter=order)]]
    array = np.empty(len(rows), features.record)
    with closing(ShardReader(features)) as reader:
        faults = reader.fill(rows, np.zeros(len(rows), int), array)
    if faults:
        raise ValueError(f"{faults[min(faults)]}; {AGAIN}")
    return class_token_of(*parts_of(array, features))


def sample_keys(manifest: Manifest, seed: int, global_batch: int, step: int) -> list[int]:
    """The keys of the samples in the global batch of a step, in its order."""
    if isinstance(manifest, Synthetic):
        return manifest.keys(step * global_batch, global_batch).tolist()
    images, _ = manifest.order(seed)(step * global_batch + np.arange(global_batch))
    return manifest.index()["key"][images].tolist()


def replaced_keys(
    manifest: Manifest, features: FeatureManifest | None, *, global_batch: int, seed: int, step: int, hflip: bool
) -> dict[int, int]:
    """What `skip_damaged` took in place of the damaged samples of a global batch: keys by keys of `sample_keys`.

    The batch is read again.
    """
    if isinstance(manifest, Synthetic):
        return {}
    reader = _Reader(manifest, features, global_batch, slice(None), seed, hflip, True, False, lambda fault: None)
    with closing(reader):
        taken = manifest.index()["key"][reader.take(step)[0]].tolist()
    pairs = zip(sample_keys(manifest, seed, global_batch, step), taken, strict=True)
    return {key: other for key, other in pairs if key != other}


def split(manifest: Manifest, fraction: float) -> tuple[Manifest, Manifest | None]:
    """The images to train on, and a `fraction` of all images that is held out; None for fraction 0.

    An image is held out by a hash of its key, whatever the seed of the run and the number of images are.
    """
    if not fraction:
        return manifest, None
    if isinstance(manifest, Synthetic):
        return manifest, manifest.others(fraction)
    if isinstance(manifest, Mixture):
        trains, rests = zip(*(split(part, fraction) for part in manifest.parts), strict=True)
        return manifest.of(trains), manifest.of(rests)
    held_out = held_out_rows(manifest.index()["key"], fraction)
    train, rest = (replace(manifest, rows=np.flatnonzero(rows)) for rows in (~held_out, held_out))
    if not len(rest) or not len(train):
        raise ValueError(f"data.val_fraction={fraction} holds out {len(rest)} of the {len(manifest)} images in "
                         f"{manifest.folder}; use {'a larger' if not len(rest) else 'a smaller'} fraction")  # fmt: skip
    return train, rest
