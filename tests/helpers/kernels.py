"""What the tests of the fused ops share; the comparison itself is the benchmark's (bench/kernels/compare.py)."""

from typing import Any

import torch
from torch import Tensor

from bench.kernels.compare import cast, compare, run  # noqa: F401

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())  # the interpreter truncates


def strided(kwargs: dict[str, Any], how: str) -> dict[str, Any]:
    """The same values in other memory: "offset" (inside wider rows, unaligned), or "transposed" (last stride not 1)."""
    out = {}
    for key, value in kwargs.items():
        if isinstance(value, Tensor) and value.dim() > 1:
            wanted = value.requires_grad
            value = value.detach()
            if how == "offset":
                value = torch.nn.functional.pad(value, (3, 5))[..., 3:-5]
            else:
                value = value.transpose(-1, -2).contiguous().transpose(-1, -2)
            value.requires_grad_(wanted)
        out[key] = value
    return out
