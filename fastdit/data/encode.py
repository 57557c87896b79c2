"""Images to shards: decode in threads, encode each image and its mirror image, write. The three overlap."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastdit.data.images import Size, Skipped, read_image, to_pixels
from fastdit.data.latents import LatentCodec
from fastdit.data.manifest import Manifest
from fastdit.data.progress import Progress
from fastdit.data.sources import ImageSource
from fastdit.data.writer import ShardWriter
from fastdit.distributed import Ranks, one_thread


def extract_share(
    source: ImageSource,
    progress: Progress,
    own: list[int],
    codec: LatentCodec,
    ranks: Ranks,
    about: Manifest,
    batch_size: int,
    workers: int,
    shard_size: int,
    adm_exact: bool,
) -> None:
    """Writes the shards with the numbers `own`, and records each in `progress`."""
    share = [source.order[number * shard_size : (number + 1) * shard_size] for number in own]
    unreadable = Skipped(len(source))
    writing: deque[Future] = deque()
    with (
        ThreadPoolExecutor(workers, thread_name_prefix="decode") as decoders,
        ThreadPoolExecutor(1, thread_name_prefix="write") as writers,  # a single thread keeps the order
        tqdm(total=sum(map(len, share)), unit="image", smoothing=0.05, disable=None if ranks.is_main else True) as bar,
    ):
        read = partial(_read, source, about.latents.image_size, adm_exact)
        crops = _ahead(read, (key for keys in share for key in keys), decoders, ahead=2 * batch_size + 2 * workers)

        def submit(work, *args) -> None:
            writing.append(writers.submit(work, *args))
            while len(writing) > 2:
                writing.popleft().result()

        try:
            for number, keys in zip(own, share, strict=True):
                writer = ShardWriter(progress.partial, number, about.dtype)
                skipped: list[str] = []
                counts: Counter[str] = Counter()
                readable: list[tuple[int, np.ndarray]] = []
                for remaining in reversed(range(len(keys))):
                    key, found = next(crops)
                    if isinstance(found, ValueError):
                        unreadable.add(source.paths[key], str(found))
                        skipped.append(unreadable.lines[-1])
                    else:
                        crop, treatments = found
                        readable.append((key, crop))
                        counts.update(treatments)
                    if readable and (len(readable) == batch_size or not remaining):
                        moments = encode_both(codec, [crop for _, crop in readable], batch_size, ranks.device)
                        batch = [key for key, _ in readable]
                        submit(_write, writer, batch, moments, [source.labels[key] for key in batch])
                        readable = []
                    bar.update()
                submit(_finish, progress, number, writer, skipped, counts)
            while writing:
                writing.popleft().result()
        except BaseException:
            decoders.shutdown(wait=False, cancel_futures=True)
            raise


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


def encode_both(codec: LatentCodec, crops: list[np.ndarray], batch_size: int, device: torch.device) -> Tensor:
    """n crops (H, W, 3) uint8 -> moments (batch_size, 2, 2C, h, w) of the images and their mirror images, on `device`.

    The batch is padded to `batch_size` with the last crop: the last bits of a matrix product depend on its shape.
    """
    crops = crops + crops[-1:] * (batch_size - len(crops))
    batch = torch.from_numpy(np.stack(crops))
    if device.type == "cuda":
        batch = batch.pin_memory()
    pixels = to_pixels(batch.to(device, non_blocking=True))
    with one_thread(device):
        moments = torch.stack([codec.encode(pixels), codec.encode(pixels.flip(-1))], dim=1)
    return moments


def _write(writer: ShardWriter, keys: list[int], moments: Tensor, labels: list[int]) -> None:
    for key, array, label in zip(keys, moments.cpu().numpy(), labels, strict=False):  # without the padding
        writer.add(key, array, label)


def _finish(progress: Progress, number: int, writer: ShardWriter, skipped: list[str], counts: Counter[str]) -> None:
    progress.finish(number, writer.close(skipped, counts))
