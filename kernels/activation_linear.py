"""gelu_linear, swiglu_linear: an activation and the linear after it, keeping only what goes into the activation.

A linear keeps its input for the weight's gradient; that input is the widest tensor of a block. Here the activation's
backward pass, which reads x anyway, writes y = activation(x + bias) once more, one extra write in place of an
activation held from forward to backward: a third of a block's memory.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .gelu import OP as GELU
from .gelu import backward as gelu_backward
from .runtime import Op, check, random_inputs, use_triton
from .swiglu import OP as SWIGLU
from .swiglu import backward as swiglu_backward

ACTIVATIONS = {"gelu": (GELU.eager, GELU.triton, gelu_backward),
               "swiglu": (SWIGLU.eager, SWIGLU.triton, swiglu_backward)}  # fmt: skip


class _ActivationLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, bias: Tensor | None, weight: Tensor, out_bias: Tensor | None, activation: str
    ) -> Tensor:
        y = ACTIVATIONS[activation][1](x, bias)
        return F.linear(y, weight.to(y.dtype), None if out_bias is None else out_bias.to(y.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, bias, weight, out_bias, ctx.activation = inputs
        ctx.out_bias = None if out_bias is None else out_bias.dtype
        ctx.save_for_backward(x, bias, weight)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple:
        x, bias, weight = ctx.saved_tensors
        d_y = d_out @ weight.to(d_out.dtype)
        d_x, y, d_bias = ACTIVATIONS[ctx.activation][2](d_y, x, bias, keep=True)
        rows = d_out.reshape(-1, d_out.shape[-1])
        d_weight = (rows.T @ y.reshape(-1, y.shape[-1])).to(weight.dtype)
        d_out_bias = None if ctx.out_bias is None else rows.sum(0, dtype=torch.float32).to(ctx.out_bias)
        return d_x, d_bias, d_weight, d_out_bias, None


def _make(name: str, doc: str) -> tuple[Callable, Callable, Callable]:
    def eager(x: Tensor, bias: Tensor | None, weight: Tensor, out_bias: Tensor | None = None) -> Tensor:
        return F.linear(ACTIVATIONS[name][0](x, bias), weight, out_bias)

    def fused(x: Tensor, bias: Tensor | None, weight: Tensor, out_bias: Tensor | None = None) -> Tensor:
        return _ActivationLinear.apply(x, bias, weight, out_bias, name)

    def public(x: Tensor, bias: Tensor | None, weight: Tensor, out_bias: Tensor | None = None) -> Tensor:
        if bias is not None:
            check("bias", bias, x.shape[-1])
        check("weight", weight, weight.shape[0], x.shape[-1] // (2 if name == "swiglu" else 1))
        return (fused if use_triton(f"{name}_linear", x.device.type, x.dtype) else eager)(x, bias, weight, out_bias)

    for fn in (eager, fused, public):
        fn.__name__, fn.__doc__ = f"{name}_linear", doc
    return eager, fused, public


gelu_linear_eager, gelu_linear_triton, gelu_linear = _make(
    "gelu",
    "linear(gelu(x + bias)): x (..., D), bias (D,) or None, weight (E, D), out_bias (E,) or None -> (..., E).",
)
swiglu_linear_eager, swiglu_linear_triton, swiglu_linear = _make(
    "swiglu",
    "linear(swiglu(x + bias)): x (..., 2D), bias (2D,) or None, weight (E, D), out_bias (E,) or None -> (..., E).",
)


def _inputs(wide: int) -> Callable[..., dict[str, Any]]:
    def inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        n, t, d = shape
        return random_inputs(
            seed, dtype, device, x=(n, t, wide * d), bias=(wide * d,), weight=(d // 2, d), out_bias=(d // 2,)
        )

    return inputs


GELU_LINEAR = Op(
    "gelu_linear", gelu_linear_eager, gelu_linear_triton, gelu_linear, _inputs(1),
    tiny=(2, 3, 6), shapes=((3, 41, 72),), real=(), minimum_bytes=GELU.minimum_bytes,
)  # fmt: skip
SWIGLU_LINEAR = Op(
    "swiglu_linear", swiglu_linear_eager, swiglu_linear_triton, swiglu_linear, _inputs(2),
    tiny=(2, 3, 6), shapes=((3, 41, 72),), real=(), minimum_bytes=SWIGLU.minimum_bytes,
)  # fmt: skip
