"""Made-up weights and pictures for the tests of evaluation."""

import numpy as np
import torch
from torch import Tensor, nn


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
