"""Images to shards: decode in threads, encode each image and its mirror image, write. The three overlap."""

import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastdit.data.images import Size, Skipped, read_image, to_pixels
from fastdit.data.progress import Progress
from fastdit.data.sources import ImageSource
from fastdit.data.writer import TarWriter
from fastdit.distributed import Ranks, one_thread


class Encodes(Protocol):
    """LatentCodec, or the encoder of features."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) in [-1, 1] -> one float32 array per image (N, ...)."""


def extract_share(
    source: ImageSource,
    progress: Progress,
    shards: dict[int, list[int]],
    codec: Encodes,
    writer_of: Callable[[Path, int], TarWriter],
    ranks: Ranks,
    size: Size,
    batch_size: int,
    workers: int,
    adm_exact: bool,
    skip: bool = True,
) -> None:
    """Writes each of `shards`, which have the images with these keys, and records it in `progress`.

    `writer_of(folder, number)` writes what `codec` makes of the images. Without `skip`, an image that cannot be read is
    a ValueError.
    """
    own, share = [*shards], [*shards.values()]
    unreadable = Skipped(len(source))
    writing: deque[Future] = deque()
    with (
        ThreadPoolExecutor(workers, "decode", initializer=_yield_to_encoder) as decoders,
        ThreadPoolExecutor(1, thread_name_prefix="write") as writers,  # a single thread keeps the order
        tqdm(total=sum(map(len, share)), unit="image", smoothing=0.05, disable=None if ranks.is_main else True) as bar,
    ):
        read = partial(_read, source, size, adm_exact)
        crops = _ahead(read, (key for keys in share for key in keys), decoders, ahead=2 * batch_size + 2 * workers)

        def submit(work, *args) -> None:
            writing.append(writers.submit(work, *args))
            while len(writing) > 2:
                writing.popleft().result()

        try:
            for number, keys in zip(own, share, strict=True):
                writer = writer_of(progress.partial, number)
                skipped: list[str] = []
                counts: Counter[str] = Counter()
                readable: list[tuple[int, np.ndarray]] = []
                for remaining in reversed(range(len(keys))):
                    key, found = next(crops)
                    if isinstance(found, ValueError):
                        if not skip:
                            path = source.paths[key]
                            raise ValueError(f"{path} has a latent, but cannot be read now: {found}; restore it")
                        unreadable.add(source.paths[key], str(found))
                        skipped.append(unreadable.lines[-1])
                    else:
                        crop, treatments = found
                        readable.append((key, crop))
                        counts.update(treatments)
                    if readable and (len(readable) == batch_size or not remaining):
                        arrays = encode_both(codec, [crop for _, crop in readable], batch_size, ranks.device)
                        batch = [key for key, _ in readable]
                        submit(_write, writer, batch, arrays, [source.labels[key] for key in batch])
                        readable = []
                    bar.update()
                submit(_finish, progress, number, writer, skipped, counts)
            while writing:
                writing.popleft().result()
        except BaseException:
            decoders.shutdown(wait=False, cancel_futures=True)
            raise


def _yield_to_encoder() -> None:
    """Lower the priority of this thread: if all cores are busy, the thread that encodes or launches kernels runs."""
    if sys.platform == "linux":  # elsewhere priorities are those of processes
        os.nice(10)


def _read(source: ImageSource, size: Size, adm_exact: bool, key: int) -> tuple[np.ndarray, tuple[str, ...]]:
    try:
        opened = source.open(key)
    except OSError as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return read_image(opened, size, adm_exact)


def _ahead(
    work: Callable[[int], Any], keys: Iterable[int], threads: ThreadPoolExecutor, ahead: int
) -> Iterator[tuple[int, Any]]:
    """Yields each key and work(key), or the ValueError that it raised, in order; `ahead` of them are under way."""
    pending: deque[tuple[int, Future]] = deque()
    keys = iter(keys)
    while True:
        while len(pending) < ahead and (following := next(keys, None)) is not None:
            pending.append((following, threads.submit(work, following)))
        if not pending:
            return
        key, future = pending.popleft()
        try:
            yield key, future.result()
        except ValueError as error:
            yield key, error


def encode_both(codec: Encodes, crops: list[np.ndarray], batch_size: int, device: torch.device) -> Tensor:
    """n crops (H, W, 3) uint8 -> arrays (batch_size, 2, ...) of the images and their mirror images, on `device`.

    The batch is padded to `batch_size` with the last crop: the last bits of a matrix product depend on its shape.
    """
    crops = crops + crops[-1:] * (batch_size - len(crops))
    batch = torch.from_numpy(np.stack(crops))
    if device.type == "cuda":
        batch = batch.pin_memory()
    pixels = to_pixels(batch.to(device, non_blocking=True))
    with one_thread(device):
        return torch.stack([codec.encode(pixels), codec.encode(pixels.flip(-1))], dim=1)


def _write(writer: TarWriter, keys: list[int], arrays: Tensor, labels: list[int]) -> None:
    for key, array, label in zip(keys, arrays.cpu().numpy(), labels, strict=False):  # without the padding
        writer.add(key, array, label)


def _finish(progress: Progress, number: int, writer: TarWriter, skipped: list[str], counts: Counter[str]) -> None:
    progress.finish(number, writer.close(skipped, counts))
