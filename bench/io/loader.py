"""Latent loading, images/s: `latent_batches` and webdataset's own loader on the same tars, in rotation.

The case "features" is 256 px with an encoder's features beside the latents, 16 x 16 patches of 768 values and a class
token, in float16 and in int8: what REPA reads.

Both yield shuffled float32 batches (B, 2C, h, w) with labels and a random choice of the mirror image; the files are in
the page cache. webdataset runs as its documentation suggests: shuffled shards, a shuffle buffer, in this process or in
a DataLoader with workers. Every figure is the median of `--rounds`. With --cpu-time, rates are per second of CPU time
of this process, for cores that others use as well, and webdataset has no workers.

Further lines: the time to the first batch of epoch 100, of these images, of as many as ImageNet has (the same files,
listed again and again) and of 10^9 (the order alone), and the memory of the process after one epoch and after ten more.

    python -m bench.io.loader [--rounds 5] [--workers 2] [--seconds 2] [--cpu-time]
"""

import hashlib
import itertools
import math
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import webdataset as wds

from bench.record import compared, parser, record, rotate
from fastdit.data.features import FEATURE_DTYPES, FeatureManifest, FeatureWriter, publish_features
from fastdit.data.latents import LatentSpec
from fastdit.data.loader import latent_batches
from fastdit.data.manifest import Manifest
from fastdit.data.order import Order
from fastdit.data.writer import write_keyed

WIDTH, FEATURE_SAMPLES = 768, 512
CASES = {"quickstart": (8, 8, 8), "256px": (8, 32, 32)}  # name: moments of one orientation (2C, h, w)
SAMPLES, BATCH = 8192, 256
MANY, IMAGENET, EPOCH = 10**9, 1_281_167, 100


def make(folder: Path, shape: tuple[int, int, int], samples: int = SAMPLES) -> Manifest:
    rng = np.random.default_rng(0)
    spec = LatentSpec((shape[0] // 2, *shape[1:]), 1.0, shift=0.0, vae="bench", codec="", image_size=8 * shape[1])
    about = Manifest(spec, dtype="float16", class_names=tuple(map(str, range(10))), images=samples)
    latents = ((i, rng.random((2, *shape), dtype=np.float32), i % 10) for i in range(samples))
    write_keyed(latents, folder, about, shard_size=1024)
    return Manifest.load(folder)


def make_features(folder: Path, latents: Manifest, dtype: str) -> FeatureManifest:
    rng, index = np.random.default_rng(1), latents.index()
    about = FeatureManifest("bench", "", (16, 16), WIDTH, True, dtype=dtype, precision="float32")
    folder.with_suffix(".partial").mkdir()
    writer = FeatureWriter(folder.with_suffix(".partial"), 0, dtype)
    for row in index:
        writer.add(int(row["key"]), rng.standard_normal((2, about.tokens, WIDTH), np.float32), int(row["label"]))
    publish_features(folder.with_suffix(".partial"), folder, about, [writer.close()])
    return FeatureManifest.load(folder)


def ours(manifest: Manifest, verify: bool, features: FeatureManifest | None = None) -> Iterator[torch.Tensor]:
    batches = latent_batches(manifest, global_batch=BATCH, seed=0, verify=verify, features=features)
    try:
        for each in batches:
            assert features is None or each.features.shape == (BATCH, 16, 16, WIDTH)
            yield each.moments
    finally:
        batches.close()


def choose_mirror(sample: tuple[np.ndarray, int]) -> tuple[np.ndarray, int]:
    return sample[0][random.getrandbits(1)], sample[1]


def collate(samples: list[tuple[np.ndarray, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    moments, labels = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(moments)).float(), torch.tensor(labels)


def theirs(manifest: Manifest, workers: int) -> Iterator[torch.Tensor]:
    urls = [str(manifest.folder / shard.name) for shard in manifest.shards]
    data = wds.WebDataset(urls, shardshuffle=len(urls)).shuffle(1000).decode().to_tuple("moments.npy", "cls")
    data = data.map(choose_mirror).batched(BATCH, collation_fn=collate, partial=False).repeat()
    loader = data if not workers else torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers)
    for moments, _ in loader:
        yield moments


def rate(make_loader: Callable[[], Iterator[torch.Tensor]], seconds: float, clock=time.perf_counter) -> float:
    """Images/s after four batches of warm-up, over at least `seconds`."""
    loader = make_loader()
    for moments in itertools.islice(loader, 4):
        assert moments.shape[0] == BATCH and moments.dtype == torch.float32
    images, start = 0, clock()
    while (elapsed := clock() - start) < seconds:
        images += len(next(loader))
    loader.close()
    return images / elapsed


def repeated(manifest: Manifest, least: int) -> Manifest:
    """The folder with its images listed so many times that there are at least so many."""
    rows, times = manifest.index(), math.ceil(least / len(manifest))
    index = np.tile(rows, times)
    index["key"] = np.arange(len(index))
    index["shard"] += np.repeat(np.arange(times, dtype=np.uint32) * len(manifest.shards), len(rows))
    np.save(manifest.folder / "index.npy", index)
    digest = hashlib.sha256((manifest.folder / "index.npy").read_bytes()).hexdigest()
    return replace(manifest, shards=manifest.shards * times, index_sha256=digest)


def first_batch_ms(manifest: Manifest, clock) -> float:
    """Milliseconds to the first batch of epoch EPOCH, from the manifest on."""
    start = clock()
    far = latent_batches(manifest, global_batch=BATCH, seed=0, start_step=EPOCH * len(manifest) // BATCH, prefetch=0)
    next(far)
    found = clock() - start
    far.close()
    return round(1000 * found, 2)


def order_ms(clock) -> float:
    """Milliseconds to the order of a batch in a set of MANY images."""
    start = clock()
    Order(0, [MANY])(EPOCH * MANY + np.arange(BATCH))
    return round(1000 * (clock() - start), 2)


def memory_mib(manifest: Manifest) -> list[float]:
    """Resident memory of this process after one epoch, and after ten more."""
    batches, found = ours(manifest, verify=True), []
    for epochs in (1, 10):
        for _ in range(epochs * SAMPLES // BATCH):
            next(batches)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found.append(round(pages * resource.getpagesize() / 2**20, 1))
    batches.close()
    return found


def with_features(arguments) -> None:
    """The case "features"."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = make(Path(folder) / "latents", CASES["256px"], FEATURE_SAMPLES)
        runs = {"fastdit": lambda: rate(lambda: ours(manifest, True), arguments.seconds)}
        for dtype in FEATURE_DTYPES:
            about = make_features(Path(folder) / dtype, manifest, dtype)
            runs[f"fastdit, {dtype}"] = lambda about=about: rate(lambda: ours(manifest, True, about), arguments.seconds)
        for name, figures in compared(rotate(runs, arguments.rounds)).items():
            record("loader", arguments.out, case="features", loader=name, **figures)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--workers", type=int, default=2, help="of webdataset's DataLoader")
    options.add_argument("--seconds", type=float, default=2.0, help="measured per loader and round")
    options.add_argument("--cpu-time", action="store_true", help="rates per second of CPU time, without workers")
    options.add_argument("--cases", nargs="+", choices=[*CASES, "features"], default=[*CASES, "features"])
    arguments = options.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    if "features" in arguments.cases:
        with_features(arguments)
    for case, shape in ((case, CASES[case]) for case in arguments.cases if case in CASES):
        with tempfile.TemporaryDirectory() as folder:
            manifest = make(Path(folder) / "latents", shape)
            loaders = {
                "fastdit": lambda m=manifest: ours(m, verify=True),
                "fastdit, crc32 unchecked": lambda m=manifest: ours(m, verify=False),
                "webdataset, no workers": lambda m=manifest: theirs(m, 0),
                f"webdataset, {arguments.workers} workers": lambda m=manifest: theirs(m, arguments.workers),
            }
            if arguments.cpu_time:
                loaders.popitem()
            runs = {name: lambda make=make: rate(make, arguments.seconds, clock) for name, make in loaders.items()}
            found = compared(rotate(runs, arguments.rounds))
            first = f"first_batch_of_epoch_{EPOCH}"
            more = {f"{first}_ms": first_batch_ms(manifest, clock), "memory_mib": memory_mib(manifest),
                    f"order_of_{MANY:.0e}_images_ms": order_ms(clock)}  # fmt: skip
            large = repeated(manifest, IMAGENET)
            times = [first_batch_ms(large, clock) for _ in range(arguments.rounds)]
            more[f"{first}_of_{len(large)}_images_ms"] = statistics.median(times)
            more["spread_ms"] = [min(times), max(times)]
        for name, figures in found.items():
            record("loader", arguments.out, case=case, loader=name, clock=clock.__name__, **figures)
        record("loader", arguments.out, case=case, loader="fastdit", clock=clock.__name__, **more)


if __name__ == "__main__":
    main()
