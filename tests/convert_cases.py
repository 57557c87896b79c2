"""Official-like files made on the spot from the recorded weights of dit.npz, for the tests of conversion and verify."""

import argparse
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"
SIZE = ["--heads", "4"]  # of the recorded network: hidden size 48 is no known one


def golden(name: str) -> dict[str, torch.Tensor]:
    """All numeric arrays of a golden file."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files if file[key].dtype.kind in "fiu"}


def golden_weights() -> dict[str, torch.Tensor]:
    """The recorded state dict: 2 blocks of 48, 4 heads, 10 classes, 8 x 8 latents, learned sigma."""
    return {key.removeprefix("weights/"): v for key, v in golden("dit").items() if key.startswith("weights/")}


def moved(state: dict[str, torch.Tensor], by: float) -> dict[str, torch.Tensor]:
    """Other weights of the same network; the fixed table stays."""
    return {name: tensor if name == "pos_embed" else tensor + by for name, tensor in state.items()}


def training_file(path: Path, prefix: str = "module.", **args) -> Path:
    """{model, ema, opt, args} as the official scripts leave it; the EMA is the recorded network."""
    ema = golden_weights()
    model = {prefix + name: tensor for name, tensor in moved(ema, 0.25).items()}
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 1e-4}]}
    torch.save({"model": model, "ema": ema, "opt": optimizer, "args": argparse.Namespace(**args)}, path)
    return path
