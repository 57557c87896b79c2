"""Evaluation: images/s and peak memory of each feature network, and seconds of each metric.

Every network runs in a process of its own, on one thread of a CPU or on the GPU, as `fastdit evaluate` runs it; the
first block warms it up. Inception and DINOv2 have made-up weights, which change no time. The metrics run on one thread
and get random features of EfficientNet-Lite0's dimension. On a CPU, the seconds are those of this process alone, so
other processes disturb them little.

    python -m bench.io.evaluate [--images 128] [--size 256] [--features efficientnet-lite0 ...] [--count 10000]
"""

import hashlib
import multiprocessing
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from bench.record import parser, record, significant
from fastdit.evaluation import features
from fastdit.evaluation.metrics import METRICS, Features
from fastdit.evaluation.networks import InceptionV3

DIM = 1280


def with_weights(name: str, folder: Path) -> str:
    """What --features takes: the name, and where weights were written for it."""
    if name == "inception-v3":
        torch.save(InceptionV3().state_dict(), folder / "inception.pth")
        features.INCEPTION_HASH = hashlib.sha256((folder / "inception.pth").read_bytes()).hexdigest()
        return f"{name}={folder / 'inception.pth'}"
    if name == "dinov2-vit-l14":
        from transformers import Dinov2Config, Dinov2Model

        large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
        Dinov2Model(Dinov2Config(**large, image_size=518)).save_pretrained(folder)
        return f"{name}={folder}"
    return name


def extraction(name: str, images: int, size: int, device: str) -> dict:
    """Images/s of a feature network after a block of warm-up, and the peak memory of this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        extractor = features.load_features(with_weights(name, Path(folder)), device)
    pixels = np.random.default_rng(0).integers(0, 256, (images, size, size, 3), np.uint8)
    extractor(pixels[: features.BLOCK])
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    extractor(pixels)
    rate = images / (clock() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    gpu = {"gpu_peak_gib": significant(torch.cuda.max_memory_allocated() / 2**30)} if device == "cuda" else {}
    return {"images_per_s": significant(rate), "process_peak_gib": significant(peak), **gpu}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=128)
    options.add_argument("--size", type=int, default=256, help="pixels per side")
    options.add_argument("--count", type=int, default=10000, help="features in both sets, for the metrics")
    options.add_argument("--features", nargs="*", default=["efficientnet-lite0", "inception-v3", "dinov2-vit-l14"])
    arguments = options.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in arguments.features:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(extraction, name, arguments.images, arguments.size, device).result()
        record("evaluate", arguments.out, features=name, size=arguments.size, device=device, threads=1, **found)
    values = np.random.default_rng(0).standard_normal((2, arguments.count, DIM), np.float32)
    probabilities = np.full((arguments.count, 1000), 1e-3)
    samples, reference = (Features(each, probabilities, spatial=each) for each in values)
    torch.set_num_threads(1)
    for name, metric in METRICS.items():
        start = time.process_time()
        try:
            metric(samples, reference, 0)
        except ValueError as error:  # too few features
            print(f"{name}: {error}", file=sys.stderr)
            continue
        seconds = significant(time.process_time() - start)
        record("evaluate", arguments.out, metric=name, count=arguments.count, dim=DIM, threads=1, seconds=seconds)


if __name__ == "__main__":
    main()
