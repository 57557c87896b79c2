"""gate_residual: x' = x + gate (branch + bias), where no norm follows. It uses the kernels of gate_residual_adaln.

The forward pass reads x and branch and writes x'; the backward pass reads d_x' and branch and writes d_branch. d_x is
d_x' itself.
"""

from typing import Any

import torch
from torch import Tensor

from .gate_residual_adaln import finish, launch_backward, launch_forward
from .runtime import Op, check, random_inputs, triton_op, unit_stride, use_triton


def gate_residual_eager(x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition: x + gate (branch + bias), gate (N, D)."""
    branch = branch if bias is None else branch + bias
    return (x + gate[:, None] * branch).to(x.dtype)


@triton_op("fastdit::gate_residual")
def gate_residual_triton(x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None = None) -> Tensor:
    x, branch, gate = unit_stride(x), unit_stride(branch), unit_stride(gate)
    x_out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch_forward(x, branch, gate, unit_stride(bias), x_out)
    return x_out


@triton_op("fastdit::gate_residual_backward")
def _op_backward(d_out: Tensor, branch: Tensor, gate: Tensor, has_bias: bool) -> tuple[Tensor, Tensor]:
    """-> d_branch (N, T, D) and the fp32 partial sums (N, chunks, 1 or 2, D): gate, d_out."""
    d_out, branch, gate = unit_stride(d_out), unit_stride(branch), unit_stride(gate)
    d_branch = torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
    partial = launch_backward(d_out, branch, gate, d_branch, has_bias)
    return d_branch, partial


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _grad(ctx: Any, d_out: Tensor) -> tuple:
    branch, gate, bias = ctx.saved_tensors
    d_branch, partial = _op_backward(d_out, branch, gate, bias is not None)
    d_gate, _, d_bias = finish(partial, gate, bias, 0)
    return d_out, d_branch, d_gate, d_bias


gate_residual_triton.register_autograd(_grad, setup_context=_setup)


def gate_residual(x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None = None) -> Tensor:
    """x + gate (branch + bias) -> x's dtype.

    x, branch (N, T, D); gate (N, D), any strides; bias (D,) of the linear that computed the branch, added here so that
    its gradient needs no extra pass. ValueError if a shape is wrong.
    """
    check("branch", branch, *x.shape)
    check("gate", gate, x.shape[0], x.shape[2])
    check("bias", bias, x.shape[2])
    fused = use_triton("gate_residual", x.device.type, x.dtype, branch.dtype, gate.dtype)
    return (gate_residual_triton if fused else gate_residual_eager)(x, branch, gate, bias)


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    n, t, d = shape
    values = random_inputs(seed, dtype, device, x=(n, t, d), branch=(n, t, d), modulation=(n, 6 * d), bias=(d,))
    return values | {"gate": values.pop("modulation").chunk(6, dim=1)[2]}


def minimum_bytes(shape: tuple[int, int, int], size: int) -> tuple[int, int]:
    n, t, d = shape
    tokens, vectors = n * t * d * size, n * d * size
    return 3 * tokens + vectors + d * size, 3 * tokens + 2 * vectors + d * size


GATE_RESIDUAL = Op(
    "gate_residual", gate_residual_eager, gate_residual_triton, gate_residual, inputs,
    tiny=(2, 3, 5), shapes=((2, 19, 72), (1, 32, 8)), real=((256, 256, 1152),), minimum_bytes=minimum_bytes,
    writes=(("x_out",), ("d_branch", "partial"), ("out",)), variants=({"bias": None},),
)  # fmt: skip
