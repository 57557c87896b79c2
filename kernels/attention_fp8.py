"""attention between FP8 linears: its kernels write the output and the gradient as `fp8_cast` would round them.

The forward pass also writes the unrounded output, which the backward pass reads. The backward pass takes the two
kernels on every GPU: in the one for a whole head, the registers are full (bench/LOG.md).
"""

import torch
from torch import Tensor

from .attention import check_length, launch_backward, launch_forward
from .runtime import triton_op, unit_stride
from .tiles import sum_chunks


def _heads(qkv: Tensor) -> tuple[Tensor, ...]:
    """(N, T, 3, H, D) -> q, k, v (N, H, T, D)"""
    return unit_stride(qkv).permute(2, 0, 3, 1, 4).unbind()


@triton_op("fastdit::attention_fp8")
def _op(qkv: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return launch_forward(*_heads(qkv), qkv.shape[-1] ** -0.5, factor)


@triton_op("fastdit::attention_backward_fp8")
def _op_backward(
    d_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return launch_backward(d_out, *_heads(qkv), out, lse, qkv.shape[-1] ** -0.5, factor)


def attention_fp8_forward(qkv: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """qkv (N, T, 3, H, D), T and D even -> out (N, T, H, D), lse for the backward pass, and out (N T, H D) as
    `fp8_cast` rounds it to e4m3 with `factor` (1,): rows, columns, max |out| by part. It needs Triton."""
    check_length(qkv.shape[1])
    return _op(qkv, factor)


def attention_fp8_backward(
    d_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of qkv (N T, 3 H D) as `fp8_cast_and_sum` returns it in e5m2, d_out (N, T, H, D)."""
    rows, columns, most, partial = _op_backward(d_out, qkv, out, lse, factor)
    return rows, columns, most, sum_chunks(partial, torch.float32)[0]
