"""For the tests of evaluation: made-up weights and pictures, a small extractor, and the command."""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from fastdit.cli import main
from fastdit.evaluation import features
from fastdit.evaluation.features import Extractor


def made_up(network: nn.Module) -> dict[str, Tensor]:
    """A state dict that keeps the scale of what flows through, from NumPy's generator: the same everywhere."""
    random = np.random.default_rng(0)
    weights = {}
    for name, tensor in sorted(network.state_dict().items()):
        values = random.standard_normal(tuple(tensor.shape), np.float32)
        if tensor.ndim > 1:
            values *= (2 / tensor[0].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            values = 1 + 0.1 * np.abs(values)
        else:
            values = 0.1 * values
        weights[name] = torch.zeros_like(tensor) if "num_batches" in name else torch.from_numpy(np.asarray(values))
    return weights


def pictures(count: int, style: str = "discs", seed: int = 0, size: int = 48) -> np.ndarray:
    """uint8 (count, size, size, 3): soft discs or stripes in random colors and places."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    out = []
    for _ in range(count):
        a, b, angle, *colors = random.random(9)
        if style == "discs":
            mask = 1 / (1 + np.exp(40 * (np.hypot(x - a, y - b) - 0.15 - 0.2 * angle)))
        else:
            mask = 0.5 + 0.5 * np.sin((6 + 10 * a) * 2 * np.pi * (x * np.cos(3 * angle) + y * np.sin(3 * angle)) + b)
        front, back = np.array(colors[:3]), np.array(colors[3:])
        out.append(255 * (mask[..., None] * front + (1 - mask[..., None]) * back))
    return np.round(out).astype(np.uint8)


def write_pngs(out: Path, images: np.ndarray) -> None:
    out.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(out / f"{i:03}.png")


def tiny(path: str | None, device: torch.device) -> Extractor:
    """Mean colors of 4 x 4 cells, with made-up classes: 48 features of a picture."""
    return Extractor("efficientnet-lite0", "FD (tiny)", "0" * 64, 48, lambda x: F.adaptive_avg_pool2d(x, 4).flatten(1),
                     lambda x: x / 255, (torch.eye(10, 48), 0.0), device)  # fmt: skip


def use_tiny() -> None:
    """In a process of its own: `tiny` instead of EfficientNet-Lite0."""
    features.FEATURES["efficientnet-lite0"] = tiny


def evaluate(samples: Path, *argv, out: Path | None = None) -> dict:
    """The result that `fastdit evaluate` appends to `out`."""
    out = out or samples.parent / "results.jsonl"
    main(["evaluate", str(samples), *map(str, argv), "--out", str(out), "--device", "cpu"])
    return json.loads(out.read_text().splitlines()[-1])
