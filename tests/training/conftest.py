"""The run that the others are compared with."""

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
