"""gelu: y = gelu(x + bias), tanh approximation (Hendrycks & Gimpel 2016), and gelu_linear (activation.py).

gelu(u) = u sigmoid(2 sqrt(2/pi) (u + 0.044715 u^3)): one exponential, no tanh.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation import activation, activation_backward, activation_forward
from .activation_fp8 import activation_fp8_backward, activation_fp8_forward, register_fp8
from .runtime import tl, triton


def gelu_eager(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition: tanh-GELU of x + bias."""
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@triton.jit
def _gelu(u):
    """gelu(u) and its derivative. 1 - gate is computed as gate * power, which does not cancel."""
    square = u * u
    power = tl.exp(tl.minimum(u * (-1.5957691216057308 - 0.07135481282553 * square), 80.0))
    gate = 1.0 / (1.0 + power)
    d_gate = gate * gate * power * (1.5957691216057308 + 0.21406443847659 * square)
    return u * gate, gate + u * d_gate


@triton.jit
def _gelu_forward(x, bias, y, M, x_row, BIAS: tl.constexpr, HALVES: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
                  ROWS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    activation_forward(_gelu, x, bias, y, M, x_row, BIAS, HALVES, D, C, ROWS, STEPS, STAGES)


@triton.jit
def _gelu_backward(d_y, x, bias, d_x, y, partial, M, dy_row, x_row, BIAS: tl.constexpr, KEEP: tl.constexpr,
                   HALVES: tl.constexpr, D: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
                   STAGES: tl.constexpr):  # fmt: skip
    activation_backward(_gelu, d_y, x, bias, d_x, y, partial, M, dy_row, x_row,
                        BIAS, KEEP, HALVES, D, C, ROWS, STEPS, STAGES)  # fmt: skip


GELU, GELU_LINEAR = activation(
    "gelu", gelu_eager, _gelu_forward, _gelu_backward,
    shapes=((3, 41, 72), (1, 16, 1536), (5, 41, 64), (1, 256, 96)), real=((256, 256, 1536), (256, 256, 4608)),
)  # fmt: skip
gelu, gelu_linear = GELU.public, GELU_LINEAR.public


@triton.jit
def _gelu_fp8_forward(
    x, bias, rows, columns, scale, most, M, PAIRS, x_row, BIAS: tl.constexpr, HALVES: tl.constexpr, D: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    activation_fp8_forward(_gelu, x, bias, rows, columns, scale, most, M, PAIRS, x_row,
                           BIAS, HALVES, D, C, ROWS, STEPS, STAGES)  # fmt: skip


@triton.jit
def _gelu_fp8_backward(
    d_y, x, bias, rows, partial, columns, scale, most, M, PAIRS, dy_row, x_row, BIAS: tl.constexpr,
    HALVES: tl.constexpr, D: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    activation_fp8_backward(_gelu, d_y, x, bias, rows, partial, columns, scale, most, M, PAIRS, dy_row, x_row,
                            BIAS, HALVES, D, C, ROWS, STEPS, STAGES)  # fmt: skip


def _backward_eager(d_y: Tensor, u: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(d_y, u, approximate="tanh")


gelu_fp8 = register_fp8("gelu", _gelu_fp8_forward, _gelu_fp8_backward, gelu_eager, _backward_eager, halves=1)
