"""A folder of digits, and a run of eight steps on it, whose discriminator starts in the third."""

from pathlib import Path

import pytest

from fastdit.autoencoder.config import AutoencoderConfig
from fastdit.autoencoder.loop import train_autoencoder
from fastdit.config import config_from
from helpers.data import write_digits

SMALL = {
    "data": {"image_size": 16, "val_fraction": 0.3},
    "model": {"channels": [4, 8], "layers": 1, "norm_groups": 4, "attention": False, "latent_channels": 3},
    "loss": {"kl_weight": 1e-4},
    "discriminator": {"weight": 0.5, "start": 3, "channels": 4, "layers": 1},
    "training": {"steps": 8, "global_batch": 8, "lr": 3e-3, "precision": "fp32", "compile": False, "log_every": 1,
                 "checkpoint_every": 2, "keep_checkpoints": 0, "evaluate_every": 4, "evaluate_images": 20,
                 "evaluate_features": "", "sheet_images": 4},
}  # fmt: skip


def small(images: Path, run_dir: Path, *overrides: str) -> AutoencoderConfig:
    tree = SMALL | {"data": SMALL["data"] | {"images": str(images)}, "run_dir": str(run_dir)}
    return config_from(tree, "the test", overrides, AutoencoderConfig)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("pictures") / "images", 90)


@pytest.fixture(scope="session")
def whole(images, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("vae") / "whole"
    train_autoencoder(small(images, run_dir), device="cpu")
    return run_dir
