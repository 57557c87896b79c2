"""Latent loading, images/s: `latent_batches` and webdataset's own loader on the same tars, by turns in one run.

Both give shuffled float32 batches (B, 2C, h, w) with labels and a random choice of the mirror; the files are in the
page cache. webdataset runs as its documentation has it: shuffled shards, a shuffle buffer, in this process or in a
DataLoader with workers. Every figure is the median of `--rounds`.

    python bench/loader.py [--rounds 5] [--workers 2] [--seconds 2]
"""

import argparse
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from record import record

from fastdit.data.shards import Manifest, latent_batches
from fastdit.data.writer import write_shards

CASES = {  # name: moments of one orientation (2C, h, w), samples, batch
    "quickstart": ((8, 8, 8), 8192, 256),
    "256px": ((8, 32, 32), 8192, 256),
}


def make(folder: Path, shape: tuple[int, int, int], samples: int) -> Manifest:
    rng = np.random.default_rng(0)
    about = Manifest(
        vae="bench", codec="", scale=1.0, shift=0.0, image_size=8 * shape[1], dtype="float16",
        latent_shape=(shape[0] // 2, *shape[1:]), class_names=tuple(map(str, range(10))), images=samples,
    )  # fmt: skip
    latents = ((rng.random((2, *shape), dtype=np.float32), i % 10) for i in range(samples))
    write_shards(latents, folder, about, shard_size=1024)
    return Manifest.load(folder)


def ours(manifest: Manifest, batch: int, verify: bool) -> Iterator[torch.Tensor]:
    batches = latent_batches(manifest, global_batch=batch, seed=0, verify=verify)
    try:
        for each in batches:
            yield each.moments
    finally:
        batches.close()


def choose_mirror(sample: tuple[np.ndarray, int]) -> tuple[np.ndarray, int]:
    return sample[0][random.getrandbits(1)], sample[1]


def collate(samples: list[tuple[np.ndarray, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    moments, labels = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(moments)).float(), torch.tensor(labels)


def theirs(manifest: Manifest, batch: int, workers: int) -> Iterator[torch.Tensor]:
    urls = [str(manifest.folder / shard.name) for shard in manifest.shards]
    data = wds.WebDataset(urls, shardshuffle=len(urls)).shuffle(1000).decode().to_tuple("moments.npy", "cls")
    data = data.map(choose_mirror).batched(batch, collation_fn=collate, partial=False).repeat()
    loader = data if not workers else torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers)
    for moments, _ in loader:
        yield moments


def rate(make_loader: Callable[[], Iterator[torch.Tensor]], batch: int, seconds: float) -> float:
    """Images/s after four batches of warm-up, over at least `seconds`."""
    loader = make_loader()
    for moments in itertools.islice(loader, 4):
        assert moments.shape[0] == batch and moments.dtype == torch.float32
    images, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        images += len(next(loader))
    loader.close()
    return images / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="of webdataset's DataLoader")
    parser.add_argument("--seconds", type=float, default=2.0, help="measured per loader and round")
    arguments = parser.parse_args()
    for case, (shape, samples, batch) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            manifest = make(Path(folder) / "latents", shape, samples)
            loaders = {
                "fastdit": lambda m=manifest, b=batch: ours(m, b, verify=True),
                "fastdit, crc32 unchecked": lambda m=manifest, b=batch: ours(m, b, verify=False),
                "webdataset, no workers": lambda m=manifest, b=batch: theirs(m, b, 0),
                f"webdataset, {arguments.workers} workers": lambda m=manifest, b=batch: theirs(m, b, arguments.workers),
            }
            rates: dict[str, list[float]] = {name: [] for name in loaders}
            for _ in range(arguments.rounds):
                for name, make_loader in loaders.items():
                    rates[name].append(rate(make_loader, batch, arguments.seconds))
            start = time.perf_counter()
            far = latent_batches(manifest, global_batch=batch, seed=0, start_step=35 * samples // batch)
            next(far)
            first = time.perf_counter() - start
            far.close()
        medians = {name: statistics.median(each) for name, each in rates.items()}
        for name, median in medians.items():
            spread = [round(min(rates[name])), round(max(rates[name]))]
            ratio = round(medians["fastdit"] / median, 2)
            record("loader", case=case, loader=name, images_per_s=round(median), spread=spread, fastdit_over_this=ratio)
        record("loader", case=case, loader="fastdit", first_batch_of_epoch_35_ms=round(1000 * first, 1))


if __name__ == "__main__":
    main()
