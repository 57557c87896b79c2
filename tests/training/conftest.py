"""The run that the others are compared with, and latents with features."""

import shutil
import sys

import pytest

from helpers import ROOT
from helpers.runs import losses, run_command


@pytest.fixture(scope="session")
def whole(world):
    """The losses of an uninterrupted run in world/whole, started by the command that a user types."""
    done = run_command(sys.executable, ROOT / "train.py", "--config", world / "config.yaml", f"run_dir={world}/whole")
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(world / "whole")


@pytest.fixture(scope="session")
def featured(world, tmp_path_factory):
    """The world's latents, with features beside them: the override that names them."""
    from fastdit.data.extract import extract_features
    from helpers.extraction import TinyEncoder

    out = tmp_path_factory.mktemp("featured") / "latents"
    shutil.copytree(world / "latents", out)
    extract_features(images=world / "images", out=out, vae=world / "vae", image_size=32, encoder=TinyEncoder())
    return f"data.shards={out}"
