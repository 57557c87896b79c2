"""Extract latent shards from a folder of images: decode in threads, encode each image and its mirror image, write.

Each process writes whole shards, and every batch has the same size (the last one is padded), so the files are
byte-identical for any number of processes. Each file is written by one process; rank 0 merges the parts.
"""

import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastdit.data.images import ImageFolder, Skipped, list_images, load_crop, remarks, to_pixels
from fastdit.data.latents import LatentCodec
from fastdit.data.loader import permutation
from fastdit.data.manifest import DTYPES, Manifest
from fastdit.data.writer import SHARD_SIZE, ShardWriter, check_out, discard, part_path, partial_folder, prepare, publish
from fastdit.distributed import Ranks, one_thread
from fastdit.errors import is_no_space, out_of_memory_says
from fastdit.lock import FolderLock
from fastdit.registry import check

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_OTHER_FAILED = "another process of this extraction has failed; see its message"
TAR_OVERHEAD = 2304  # bytes per sample in addition to its moments: two tar headers, the npy header, the label, padding


def extract_features(
    *,
    images: str | Path,
    out: str | Path,
    vae: str | Path,
    image_size: int = 256,
    batch_size: int = 32,
    dtype: str = "float16",
    precision: str = "float32",
    workers: int | None = None,
    shard_size: int = SHARD_SIZE,
    overwrite: bool = False,
    ranks: Ranks | None = None,
) -> Manifest:
    """Writes shards to `out` with the moments of each image under `images` (see `list_images`) and of its mirror image.

    `vae`: a folder or a hub name; it computes in `precision`, and the moments are stored as `dtype`. `workers`:
    decoding threads of this process (None: its share of the cores). `ranks`: this process among those that share the
    work (None: a single process, on a GPU if there is one); all must see the same `out`. The images are shuffled once,
    in a fixed order, so that each shard mixes the classes for readers that shuffle only the shards.

    `out` appears once it is complete, and is replaced only with `overwrite`. Unreadable images are skipped and listed
    in <out>/skipped.txt. Raises a one-line ValueError for too many of them (see `Skipped`), invalid arguments, or a
    full disk.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ranks = ranks or Ranks(rank=0, local_rank=0, world=1, device=torch.device(device))
    out = check_out(out, overwrite)
    folder = list_images(images)
    if out.is_relative_to(folder.root.resolve()):
        raise ValueError(f"out={out} lies inside images={images}, where it would become a class; write it elsewhere")
    check(dtype, DTYPES, "dtype")
    check(precision, PRECISIONS, "precision")
    workers = workers if workers is not None else _cores_per_process()
    for key, value in (("batch_size", batch_size), ("workers", workers), ("shard_size", shard_size)):
        if value < 1:
            raise ValueError(f"{key}={value} must be at least 1")
    codec = LatentCodec.load(vae, PRECISIONS[precision], ranks.device)
    codec.check_image_size(image_size)
    latents = codec.spec(image_size)
    _check_space(out, len(folder) * (4 * int(np.prod(latents.shape)) * DTYPES[dtype].itemsize + TAR_OVERHEAD))
    about = Manifest(latents, dtype, class_names=folder.class_names, images=len(folder))
    shards = -(-len(folder) // shard_size)
    partial, held = partial_folder(out), ExitStack()
    if ranks.is_main:
        held.enter_context(FolderLock(out.with_name(f"{out.name}.writing"), "out"))
    try:
        if ranks.is_main:
            for line in remarks(folder):
                print(line, file=sys.stderr)
            prepare(out)
        ranks.barrier()
        if not partial.is_dir():
            raise ValueError(f"out={out} is not visible to rank {ranks.rank}; write to a disk that all processes share")
        start = time.perf_counter()
        with out_of_memory_says(f"--batch-size={batch_size} is too large for {ranks.device}: use a smaller one"):
            _extract_share(folder, partial, codec, ranks, about, batch_size, workers, shard_size)
        _wait_for_parts(partial, shards)  # not a collective: processes may finish many minutes apart
        ranks.barrier()
        if ranks.is_main:
            about = publish(partial, out, about, shards, overwrite, folder.ignored)
            rate = len(folder) / (time.perf_counter() - start)
            skipped = f", {about.skipped} unreadable images listed in skipped.txt" if about.skipped else ""
            print(f"{out}: {len(about)} images in {shards} shards, {rate:.1f} images/s{skipped}", file=sys.stderr)
        ranks.barrier()
        return Manifest.load(out)
    except BaseException as error:
        gone = not partial.is_dir()
        discard(partial)
        if isinstance(error, OSError) and is_no_space(error):
            raise ValueError(f"no space left for out={out}; free some or write elsewhere") from error
        if isinstance(error, OSError) and gone and ranks.world > 1:
            raise ValueError(_OTHER_FAILED) from error
        raise
    finally:
        held.close()


def _extract_share(
    folder: ImageFolder,
    partial: Path,
    codec: LatentCodec,
    ranks: Ranks,
    about: Manifest,
    batch_size: int,
    workers: int,
    shard_size: int,
) -> None:
    """Writes this process's shards: rank, rank + world, rank + 2 world, ... Decoding, encoding and writing overlap."""
    order = permutation(0, 0, len(folder)).tolist()
    own = [order[i : i + shard_size] for i in range(0, len(order), shard_size)][ranks.rank :: ranks.world]
    total = sum(map(len, own))
    unreadable = Skipped(len(folder))
    writing: deque[Future] = deque()
    with (
        ThreadPoolExecutor(workers, thread_name_prefix="decode") as decoders,
        ThreadPoolExecutor(1, thread_name_prefix="write") as writers,  # a single thread keeps the order
        tqdm(total=total, unit="image", smoothing=0.05, disable=None if ranks.is_main else True) as progress,
    ):
        paths = ((key, folder.root / folder.paths[key]) for keys in own for key in keys)
        crops = _crops(paths, about.latents.image_size, decoders, ahead=2 * batch_size + 2 * workers)

        def submit(work, *args) -> None:
            writing.append(writers.submit(work, *args))
            while len(writing) > 2:
                writing.popleft().result()

        try:
            for i, keys in enumerate(own):
                writer = ShardWriter(partial, ranks.rank + i * ranks.world, about.dtype)
                skipped: list[str] = []
                readable: list[tuple[int, np.ndarray]] = []
                for remaining in reversed(range(len(keys))):
                    key, crop = next(crops)
                    if isinstance(crop, np.ndarray):
                        readable.append((key, crop))
                    else:
                        unreadable.add(folder.paths[key], str(crop))
                        skipped.append(unreadable.lines[-1])
                    if readable and (len(readable) == batch_size or not remaining):
                        moments = encode_both(codec, [crop for _, crop in readable], batch_size, ranks.device)
                        batch = [key for key, _ in readable]
                        submit(_write, writer, batch, moments, [folder.labels[key] for key in batch])
                        readable = []
                    progress.update()
                submit(writer.close, skipped)
            while writing:
                writing.popleft().result()
        except BaseException:
            decoders.shutdown(wait=False, cancel_futures=True)
            raise


def _crops(
    paths: Iterable[tuple[int, Path]], size: int, decoders: ThreadPoolExecutor, ahead: int
) -> Iterator[tuple[int, np.ndarray | ValueError]]:
    """Yields each path's key and its crop, or the error if it is unreadable, in order; decodes `ahead` images ahead."""
    pending: deque[tuple[int, Future]] = deque()
    paths = iter(paths)
    while True:
        while len(pending) < ahead and (following := next(paths, None)) is not None:
            pending.append((following[0], decoders.submit(load_crop, following[1], size)))
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


def _wait_for_parts(partial: Path, shards: int) -> None:
    missing = [part_path(partial, number) for number in range(shards)]
    while missing := [path for path in missing if not path.exists()]:
        if not partial.is_dir():
            raise ValueError(_OTHER_FAILED)
        time.sleep(0.2)


def _check_space(out: Path, size: int) -> None:
    parent = next(folder for folder in out.parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if free < size:
        raise ValueError(
            f"out={out} needs about {size / 2**30:.2f} GiB, but {parent} has {free / 2**30:.2f} GiB free; "
            "free some or write elsewhere"
        )


def _cores_per_process() -> int:
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
