"""Latent loading, images/s: `latent_batches` and webdataset's own loader on the same tars, in rotation.

The case "features" is 256 px with an encoder's features beside the latents, 16 x 16 patches of 768 values and a class
token, in float16 and in int8: what REPA reads.

Both yield shuffled float32 batches (B, 2C, h, w) with labels and a random choice of the mirror image; the files are in
the page cache. webdataset runs as its documentation suggests: shuffled shards, a shuffle buffer, in this process or in
a DataLoader with workers. Every figure is the median of `--rounds`.

    python -m bench.io.loader [--rounds 5] [--workers 2] [--seconds 2]
"""

import itertools
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset as wds

from bench.record import compared, parser, record, rotate
from fastdit.data.features import FEATURE_DTYPES, FeatureManifest, FeatureWriter, publish_features
from fastdit.data.latents import LatentSpec
from fastdit.data.loader import latent_batches
from fastdit.data.manifest import Manifest
from fastdit.data.writer import write_shards

WIDTH, FEATURE_SAMPLES = 768, 512
CASES = {"quickstart": (8, 8, 8), "256px": (8, 32, 32)}  # name: moments of one orientation (2C, h, w)
SAMPLES, BATCH = 8192, 256


def make(folder: Path, shape: tuple[int, int, int], samples: int = SAMPLES) -> Manifest:
    rng = np.random.default_rng(0)
    spec = LatentSpec((shape[0] // 2, *shape[1:]), 1.0, shift=0.0, vae="bench", codec="", image_size=8 * shape[1])
    about = Manifest(spec, dtype="float16", class_names=tuple(map(str, range(10))), images=samples)
    latents = ((rng.random((2, *shape), dtype=np.float32), i % 10) for i in range(samples))
    write_shards(latents, folder, about, shard_size=1024)
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


def rate(make_loader: Callable[[], Iterator[torch.Tensor]], seconds: float) -> float:
    """Images/s after four batches of warm-up, over at least `seconds`."""
    loader = make_loader()
    for moments in itertools.islice(loader, 4):
        assert moments.shape[0] == BATCH and moments.dtype == torch.float32
    images, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        images += len(next(loader))
    loader.close()
    return images / elapsed


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
    options.add_argument("--cases", nargs="+", choices=[*CASES, "features"], default=[*CASES, "features"])
    arguments = options.parse_args()
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
            runs = {name: lambda make=make: rate(make, arguments.seconds) for name, make in loaders.items()}
            found = compared(rotate(runs, arguments.rounds))
            start = time.perf_counter()
            far = latent_batches(manifest, global_batch=BATCH, seed=0, start_step=35 * SAMPLES // BATCH)
            next(far)
            first = time.perf_counter() - start
            far.close()
        for name, figures in found.items():
            record("loader", arguments.out, case=case, loader=name, **figures)
        ms = round(1000 * first, 1)
        record("loader", arguments.out, case=case, loader="fastdit", first_batch_of_epoch_35_ms=ms)


if __name__ == "__main__":
    main()
