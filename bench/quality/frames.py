"""A color data set that any machine makes: frames of 16 games, one per level, an autoencoder, and latents.

    python -m bench.quality.frames --out procgen        # 40 minutes on two cores

    train.tar, held_out.tar    2,000 and 200 frames of 64 px per game, of disjoint levels, as WebDatasets
    frames.json                what they are, with the SHA-256 of each set's pixels, and the autoencoder's PSNR
    autoencoder, vae           the training of an autoencoder to 16 x 16 x 4 on train.tar, and the result
    latents, held              the latents of both sets
    latents/features           EfficientNet-Lite0's features of the frames, for training.align=repa; 5.3 GB

What exists is kept, so a stopped run continues. The library is procgen's for Linux on x86-64, which pip downloads;
without a network: `--wheel FILE`.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench.quality import procgen
from fastdit.autoencoder.config import AutoencoderConfig
from fastdit.autoencoder.loop import train_autoencoder
from fastdit.autoencoder.monitor import ABOUT as MEASURED
from fastdit.config import config_from
from fastdit.data.archives import open_images
from fastdit.data.extract import extract_features
from fastdit.data.features import FOLDER
from fastdit.data.images import read_image
from fastdit.evaluation.encoders import load_encoder
from fastdit.files import read_json, replace_text, replacing

Render = Callable[[str, str, int], Iterable[np.ndarray]]  # (class, split, count) -> uint8 (H, W, 3)
SETS = {"train": 2000, "held_out": 200}  # frames per class
ABOUT = "frames.json"


AUTOENCODER = {
    "data": {"hflip": False},
    "model": {"channels": [16, 24, 48], "layers": 1, "norm_groups": 4, "attention": False},
    "loss": {"reconstruction": "l1", "kl_weight": 1e-4},
    "training": {"steps": 3000, "global_batch": 16, "lr": 3e-3, "betas": [0.9, 0.999], "warmup_steps": 150,
                 "lr_schedule": {"name": "linear", "final": 0.02}, "ema_decay": 0.99, "precision": "bf16",
                 "compile": False, "log_every": 100, "evaluate_images": 3200, "evaluate_features": ""},
}  # of fastdit train-vae  # fmt: skip


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


def make_autoencoder(out: Path, size: int, settings: dict) -> float:
    """Train one on out/train.tar, write it to out/vae, and return its PSNR on out/held_out.tar in dB."""
    places = [f"run_dir={out / 'autoencoder'}", f"data.images={out / 'train.tar'}", f"data.image_size={size}",
              f"data.val_images={out / 'held_out.tar'}"]  # fmt: skip
    run = out / "autoencoder"
    vae = train_autoencoder(config_from(settings, "AUTOENCODER", places, AutoencoderConfig), resume=run.is_dir())
    shutil.copytree(vae, out / "vae")
    return read_json(vae / MEASURED)["psnr"]


def make(
    out: Path, classes: Sequence[str], counts: dict[str, int], render: Render, size: int, autoencoder: dict
) -> None:
    """All that `out` lacks; images have `size` pixels per side."""
    out.mkdir(parents=True, exist_ok=True)
    about = read_json(out / ABOUT) if (out / ABOUT).is_file() else write_frames(out, classes, counts, render)
    if not (out / "vae").is_dir():
        replace_text(out / ABOUT, json.dumps(about, indent=1))
        about["autoencoder"] = {"psnr_db": round(make_autoencoder(out, size, autoencoder), 2)}
        replace_text(out / ABOUT, json.dumps(about, indent=1))
    for split, name in (("train", "latents"), ("held_out", "held")):
        images = {"images": out / f"{split}.tar", "out": out / name, "vae": out / "vae", "image_size": size}
        if not (out / name).is_dir():
            extract_features(**images)
        if not (out / name / FOLDER).is_dir():
            encoder = load_encoder("efficientnet-lite0", best_device())
            extract_features(**images, encoder=encoder, feature_dtype="int8")
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
