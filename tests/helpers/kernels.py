"""What the tests of the fused ops share; the comparison itself is the benchmark's (bench/kernels/compare.py)."""

import importlib.util
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.kernels.compare import cast, compare, run  # noqa: F401

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())  # the interpreter truncates


def speed_up_the_interpreter() -> None:
    """Make calls of device functions twice as fast: Triton patches triton.language again in each of them.

    The launch has already done so, and for Triton's own device functions the patches of the first call stay.
    """
    from triton.runtime.interpreter import InterpretedFunction

    patch_and_call = InterpretedFunction.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn in self.rewritten_fn:
            return self.rewrite()(*args, **kwargs)
        return patch_and_call(self, *args, **kwargs)

    InterpretedFunction.__call__ = call


def round_to_fp8_correctly() -> None:
    """As a GPU does: to nearest, ties to even, saturating. The interpreter truncates, or rounds halves up, and
    overflows."""
    import triton.language as tl
    from triton.runtime import interpreter

    formats = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
    convert = interpreter._convert_float

    def exact(value: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.float32 and target in formats:
            most = torch.finfo(formats[target]).max
            rounded = torch.from_numpy(np.ascontiguousarray(value)).clamp(-most, most).to(formats[target])
            return rounded.view(torch.uint8).numpy().reshape(value.shape)
        return convert(value, source, target, rounding)

    interpreter._convert_float = exact


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    speed_up_the_interpreter()
    round_to_fp8_correctly()


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
