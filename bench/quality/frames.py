"""A color data set that any machine makes: frames of 16 games, one per level, an autoencoder, and latents.

    python -m bench.quality.frames --out procgen        # 40 minutes on two cores

    train.tar, held_out.tar    2,000 and 200 frames of 64 px per game, of disjoint levels, as WebDatasets
    frames.json                what they are, with the SHA-256 of each set's pixels, and the autoencoder's PSNR
    vae, latents, held         an autoencoder to 16 x 16 x 4 trained on train.tar, and the latents of both sets
    latents/features           EfficientNet-Lite0's features of the frames, for training.align=repa; 5.3 GB

What exists is kept, so a stopped run continues. The library is procgen's for Linux on x86-64, which pip downloads;
without a network: `--wheel FILE`.
"""

import argparse
import hashlib
import io
import json
import os
import tarfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench.quality import procgen
from fastdit.data.archives import open_images
from fastdit.data.extract import extract_features
from fastdit.data.features import FOLDER
from fastdit.data.images import read_image, to_pixels
from fastdit.evaluation.encoders import load_encoder
from fastdit.files import read_json, replace_text, replacing
from fastdit.quickstart.small_vae import psnr, small_vae, train_vae

Render = Callable[[str, str, int], Iterable[np.ndarray]]  # (class, split, count) -> uint8 (H, W, 3)
SETS = {"train": 2000, "held_out": 200}  # frames per class
ABOUT = "frames.json"


AUTOENCODER = {"channels": (16, 24, 48), "steps": 3000, "batch_size": 16, "lr": 3e-3, "kl_weight": 1e-4}
EVERY = 4  # every fourth frame trains the autoencoder


def write_frames(out: Path, classes: Sequence[str], counts: dict[str, int], render: Render) -> dict[str, dict]:
    """One tar file of PNG images and class names per set; what they hold. Threads render one class each."""
    about = {}
    for split, count in counts.items():

        def rendered(name: str, split: str = split, count: int = count) -> tuple[bytes, list[bytes]]:
            frames = [*render(name, split, count)]
            return hashlib.sha256(np.stack(frames).tobytes()).digest(), [_png(frame) for frame in frames]

        digest = hashlib.sha256()
        with (
            replacing(out / f"{split}.tar") as raw,
            tarfile.open(fileobj=raw, mode="w") as tar,
            ThreadPoolExecutor(os.cpu_count()) as pool,
        ):
            for name, (own, images) in zip(classes, pool.map(rendered, classes), strict=True):
                digest.update(own)
                for i, image in enumerate(images):
                    _add(tar, f"{name}-{i:05d}.png", image)
                    _add(tar, f"{name}-{i:05d}.cls", name.encode())
        about[split] = {"images_per_class": count, "pixels_sha256": digest.hexdigest()}
    return about


def _png(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, format="PNG")
    return file.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)  # without a time and an owner
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def read_set(file: Path, every: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Every `every`-th image of a set, uint8 (N, H, W, 3), and its labels (N,)."""
    source = open_images(file)
    chosen = range(0, len(source), every)
    return np.stack([read_image(source.open(i), None)[0] for i in chosen]), np.array(source.labels)[chosen]


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_autoencoder(out: Path, channels: Sequence[int], steps: int, **settings) -> float:
    """Train one on out/train.tar, write it to out/vae, and return its PSNR on out/held_out.tar in dB."""
    device = best_device()
    pixels = to_pixels(torch.from_numpy(read_set(out / "train.tar", EVERY)[0]))
    pixels = pixels.to(device, memory_format=torch.channels_last)
    vae = small_vae(pixels.shape[-1], channels).to(device, memory_format=torch.channels_last)
    start, losses = time.perf_counter(), []

    def on_step(step: int, loss: float) -> None:
        losses.append(loss)
        if step % 100 == 0:
            recent, seconds = np.mean(losses[-100:]), time.perf_counter() - start
            print(f"autoencoder: step {step}/{steps} loss {recent:.4f} {seconds:.0f} s", flush=True)

    with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):  # or the first step's weights would stay
        train_vae(vae, pixels, steps=steps, **settings, on_step=on_step)
    held = to_pixels(torch.from_numpy(read_set(out / "held_out.tar")[0]))
    quality = psnr(vae, held.to(device))
    vae.save_pretrained(out / "vae")
    return quality


def make(
    out: Path, classes: Sequence[str], counts: dict[str, int], render: Render, size: int, autoencoder: dict
) -> None:
    """All that `out` lacks; images have `size` pixels per side."""
    out.mkdir(parents=True, exist_ok=True)
    about = read_json(out / ABOUT) if (out / ABOUT).is_file() else write_frames(out, classes, counts, render)
    if not (out / "vae").is_dir():
        replace_text(out / ABOUT, json.dumps(about, indent=1))
        about["autoencoder"] = {"psnr_db": round(make_autoencoder(out, **autoencoder), 2)}
        replace_text(out / ABOUT, json.dumps(about, indent=1))
    for split, name in (("train", "latents"), ("held_out", "held")):
        images = {"images": out / f"{split}.tar", "out": out / name, "vae": out / "vae", "image_size": size}
        if not (out / name).is_dir():
            extract_features(**images)
        if split == "train" and not (out / name / FOLDER).is_dir():
            encoder = load_encoder("efficientnet-lite0", best_device())
            extract_features(**images, encoder=encoder, feature_dtype="int8", precision="bfloat16")
    print(json.dumps(about))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("procgen"), help="the data set's folder")
    options.add_argument("--wheel", type=Path, help="procgen's wheel, instead of a download")
    given = options.parse_args()

    render = partial(procgen.frames, procgen.unpack(given.out / "procgen", given.wheel))
    make(given.out, procgen.GAMES, SETS, render, procgen.SIZE, AUTOENCODER)


if __name__ == "__main__":
    main()
