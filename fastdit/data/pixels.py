"""Batches of images, decoded by threads, in an order that is a pure function of (seed, position), as in loader.py."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdit.data.images import Crop, Size, Skipped, center_crop, load_crop, random_crop, width_height
from fastdit.data.loader import read_ahead
from fastdit.data.order import Order, held_out_rows, mirrors, uniform
from fastdit.data.sources import ImageSource

CROPS = 2, 3, 4  # of order.uniform: the side of a random crop, its place in x, and in y


class PixelBatch(NamedTuple):
    """This process's part of one global batch: uint8 (n, H, W, 3)."""

    step: int
    images: Tensor


class PixelReader:
    """Decodes images of a source with `workers` threads.

    `rows`: the images that are used, by their number in the source. All crops together are kept in memory if they take
    at most `cache_bytes`. An image that cannot be read is replaced by the next one that can, the same on any number of
    processes; ValueError if these are too many (data/images.py: Skipped).
    """

    def __init__(
        self, source: ImageSource, rows: np.ndarray, size: Size, *, workers: int, cache_bytes: float = 0,
        say: Callable[[str], None] = print,
    ):  # fmt: skip
        self.source, self.rows, self.size, self.say = source, rows, size, say
        self.threads = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self.skipped, self.bad = Skipped(len(rows)), set()
        width, height = width_height(size)
        self.shape = height, width, 3
        fits = len(rows) * height * width * 3 <= cache_bytes
        self.cache = np.empty((len(rows), *self.shape), np.uint8) if fits else None  # memory is taken as it is written
        self.known = np.zeros(len(rows), bool)

    def read(self, images: np.ndarray, crops: Iterable[Crop] | None = None) -> np.ndarray:
        """The crops, uint8 (n, H, W, 3), of images by their position in `rows` (n,); by default center crops.

        `crops`: how each image is cropped; such crops are not kept in memory.
        """
        if self.cache is None or crops:
            out = np.empty((len(images), *self.shape), np.uint8)
            self._decode(images, out, np.arange(len(images)), crops)
            return out
        missing = np.unique(images[~self.known[images]])
        self._decode(missing, self.cache, missing)
        self.known[missing] = True
        return self.cache[images]

    def _decode(self, images: np.ndarray, out: np.ndarray, places: np.ndarray, crops: Iterable[Crop] | None = None):
        crops = list(crops or repeat(center_crop, len(images)))
        read = self.threads.map(self._try, images, crops)
        for place, image, crop, found in zip(places, images, crops, read, strict=True):
            while isinstance(found, ValueError):
                if image not in self.bad:
                    self.bad.add(image)
                    self.skipped.add(self.source.paths[self.rows[image]], str(found))
                    self.say(f"{self.skipped.lines[-1]}: cannot be read; the next image takes its place")
                image = (image + 1) % len(self.rows)
                found = self._try(image, crop)
            out[place] = found

    def _try(self, image: int, crop: Crop) -> np.ndarray | ValueError:
        try:
            return load_crop(self.source.open(int(self.rows[image])), self.size, crop=crop)
        except (ValueError, OSError) as error:
            return ValueError(f"{type(error).__name__}: {error}" if isinstance(error, OSError) else str(error))

    def close(self) -> None:
        self.threads.shutdown(cancel_futures=True)


class _Batches:
    def __init__(self, reader: PixelReader, global_batch: int, rows: slice, seed: int, hflip: bool, pin_memory: bool,
                 crop_fraction: float | None):  # fmt: skip
        self.crop_fraction = crop_fraction
        self.reader, self.global_batch, self.own = reader, global_batch, np.arange(global_batch)[rows]
        self.seed, self.hflip, self.pin_memory = seed, hflip, pin_memory
        self.order = Order(seed, [len(reader.rows)])

    def batch(self, step: int) -> PixelBatch:
        images, epochs = self.order(step * self.global_batch + self.own)
        crops = None
        if self.crop_fraction:
            draws = np.stack([uniform(self.seed, epochs, images, use) for use in CROPS], 1)  # (n, 3)
            crops = [partial(random_crop, draws=draw.tolist(), least=self.crop_fraction) for draw in draws]
        pixels = self.reader.read(images, crops)  # (n, H, W, 3)
        if self.hflip:
            mirrored = mirrors(self.seed, epochs, images) > 0
            pixels[mirrored] = pixels[mirrored][:, :, ::-1]
        tensor = torch.from_numpy(pixels)
        return PixelBatch(step, tensor.pin_memory() if self.pin_memory else tensor)

    def close(self) -> None:
        self.reader.close()


def pixel_batches(
    reader: PixelReader,
    *,
    global_batch: int,
    rows: slice = slice(None),
    seed: int,
    start_step: int = 0,
    hflip: bool = True,
    prefetch: int = 4,
    pin_memory: bool = False,
    crop_fraction: float | None = None,
) -> Iterator[PixelBatch]:
    """Infinite iterator over batches from `start_step` on; see `latent_batches`. Closing it closes the reader.

    Position p is the (p mod n)-th image of epoch p // n, so that images, crops and mirroring depend only on
    (seed, position). `crop_fraction`: of `random_crop`; None: center crops.
    """
    batches = _Batches(reader, global_batch, rows, seed, hflip, pin_memory, crop_fraction)
    return read_ahead(batches, start_step, prefetch)


def split_rows(source: ImageSource, fraction: float, key: str) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the images to train on, and of a `fraction` that is held out by a hash of the number."""
    every = np.arange(len(source), dtype=np.int64)
    if not fraction:
        return every, every[:0]
    held = held_out_rows(every, fraction)
    if held.all() or not held.any():
        raise ValueError(f"{key}={fraction} holds out {held.sum()} of {len(every)} images; use "
                         f"{'a smaller' if held.all() else 'a larger'} fraction")  # fmt: skip
    return every[~held], every[held]
