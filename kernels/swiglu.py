"""swiglu: y = silu(a + bias_a) (v + bias_v), a, v the halves of x (Shazeer 2020), and swiglu_linear (activation.py)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation import activation, activation_backward, activation_forward
from .activation_fp8 import activation_fp8_backward, activation_fp8_forward, register_fp8
from .runtime import tl, triton


def swiglu_eager(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition: silu of the first half times the second, after the bias."""
    a, v = (x if bias is None else x + bias).chunk(2, dim=-1)
    return F.silu(a) * v


@triton.jit
def _silu(a):
    """silu(a) and its derivative. 1 - gate is computed as gate * power, which does not cancel."""
    power = tl.exp(tl.minimum(-a, 80.0))
    gate = 1.0 / (1.0 + power)
    silu = a * gate
    return silu, gate + silu * (power * gate)


@triton.jit
def _swiglu_forward(x, bias, y, M, x_row, BIAS: tl.constexpr, HALVES: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
                    ROWS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    activation_forward(_silu, x, bias, y, M, x_row, BIAS, HALVES, D, C, ROWS, STEPS, STAGES)


@triton.jit
def _swiglu_backward(d_y, x, bias, d_x, y, partial, M, dy_row, x_row, BIAS: tl.constexpr, KEEP: tl.constexpr,
                     HALVES: tl.constexpr, D: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
                     STAGES: tl.constexpr):  # fmt: skip
    activation_backward(_silu, d_y, x, bias, d_x, y, partial, M, dy_row, x_row,
                        BIAS, KEEP, HALVES, D, C, ROWS, STEPS, STAGES)  # fmt: skip


SWIGLU, SWIGLU_LINEAR = activation(
    "swiglu", swiglu_eager, _swiglu_forward, _swiglu_backward, halves=2, real=((256, 256, 3072),)
)
swiglu, swiglu_linear = SWIGLU.public, SWIGLU_LINEAR.public


@triton.jit
def _swiglu_fp8_forward(
    x, bias, rows, columns, scale, most, M, PAIRS, x_row, BIAS: tl.constexpr, HALVES: tl.constexpr, D: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    activation_fp8_forward(_silu, x, bias, rows, columns, scale, most, M, PAIRS, x_row,
                           BIAS, HALVES, D, C, ROWS, STEPS, STAGES)  # fmt: skip


@triton.jit
def _swiglu_fp8_backward(
    d_y, x, bias, rows, partial, columns, scale, most, M, PAIRS, dy_row, x_row, BIAS: tl.constexpr,
    HALVES: tl.constexpr, D: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    activation_fp8_backward(_silu, d_y, x, bias, rows, partial, columns, scale, most, M, PAIRS, dy_row, x_row,
                            BIAS, HALVES, D, C, ROWS, STEPS, STAGES)  # fmt: skip


def _backward_eager(d_y: Tensor, u: Tensor) -> Tensor:
    a, v = u.chunk(2, dim=-1)
    return torch.cat([torch.ops.aten.silu_backward(d_y * v, a), d_y * F.silu(a)], dim=-1)


swiglu_fp8 = register_fp8("swiglu", _swiglu_fp8_forward, _swiglu_fp8_backward, swiglu_eager, _backward_eager, halves=2)
