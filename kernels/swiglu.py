"""swiglu: y = silu(a + bias_a) (v + bias_v), a, v the halves of x (Shazeer 2020), and swiglu_linear (activation.py)."""

import torch.nn.functional as F
from torch import Tensor

from .activation import activation, activation_backward, activation_forward
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
