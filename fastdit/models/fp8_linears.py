"""FP8 products of the blocks' linears, and what lies between them: see fp8.py for the factors.

The kernels of the norm, the activation and attention round what they compute for the linears themselves.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdit.kernels import (
    attention_fp8_backward,
    attention_fp8_forward,
    fp8_cast,
    fp8_cast_and_sum,
    fp8_transpose,
    gate_residual_adaln_backward,
    gate_residual_adaln_fp8,
    gelu_fp8,
    largest,
    swiglu_fp8,
)
from fastdit.kernels.fp8 import FORWARD, GRADIENT
from fastdit.kernels.runtime import use_triton
from fastdit.models.layers import Attention, Linear, Mlp

INPUT, WEIGHT, OUTPUT = range(3)  # what is rounded for a linear: input, weight, and the gradient of the output
ACTIVATIONS = {"gelu_tanh": gelu_fp8, "swiglu": swiglu_fp8}


class Rounded(NamedTuple):
    """The input of a linear in FP8, as `fp8_cast` returns it. `whole` (..., D) stands for the unrounded input.

    The gradient belongs to `whole`; its values are not read, so its memory may be one element.
    """

    whole: Tensor
    rows: Tensor
    columns: Tensor
    magnitudes: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.whole.shape


def rounded(x: Tensor | Rounded, linear: Linear) -> Rounded:
    """The input of `linear`, if a kernel has not rounded it before."""
    if isinstance(x, Rounded):
        return x
    rows = x.detach().reshape(-1, x.shape[-1])
    return Rounded(x, *fp8_cast(rows, linear.scale[INPUT, :1], FORWARD))


class _NormAndRound(torch.autograd.Function):
    """`gate_residual_adaln` that writes h in FP8 only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None,
        factor: Tensor, rms: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        x, stats, rows, magnitudes = gate_residual_adaln_fp8(x, branch, gate, shift, scale, bias, factor, 1e-6, rms)
        columns = fp8_transpose(rows)
        ctx.shift_dtype, ctx.rms = shift.dtype, rms
        ctx.save_for_backward(x, branch, gate, scale, bias, stats)
        ctx.mark_non_differentiable(rows, columns, magnitudes)
        return x, branch.new_empty(1).expand(branch.shape), rows, columns, magnitudes

    @staticmethod
    def backward(ctx: Any, d_x: Tensor, d_h: Tensor, *_: None) -> tuple:
        return *gate_residual_adaln_backward(d_x, d_h, *ctx.saved_tensors, ctx.shift_dtype, ctx.rms), None, None


def norm_and_round(
    linear: Linear, x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None,
    norm: str,
) -> tuple[Tensor, Rounded]:  # fmt: skip
    """`kernels.gate_residual_adaln`, with h as the input of `linear`."""
    factor = linear.scale[INPUT, :1]
    x, *parts = _NormAndRound.apply(x, branch, gate, shift, scale, bias, factor, norm == "rms")
    return x, Rounded(*parts)


def product(
    a: Tensor, b: Tensor, a_inverse: Tensor, b_inverse: Tensor, dtype: torch.dtype, fast: bool = False,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """a (M, K) b (N, K)^T in FP8, times both inverse factors (1,), plus bias (N,) -> (M, N).

    `fast` sums in lower precision.
    """
    if bias is not None and dtype == torch.float32:  # no such product
        return product(a, b, a_inverse, b_inverse, dtype, fast) + bias
    bias = None if bias is None else bias.to(dtype)
    return torch._scaled_mm(a, b.T, a_inverse, b_inverse, bias=bias, out_dtype=dtype, use_fast_accum=fast)


def gradients(
    rows: Tensor, columns: Tensor, y_most: Tensor, saved: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype,
    out: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of a linear's input (`shape`, `dtype`), weight and magnitudes, from that of its output in FP8.

    `saved`: columns of the input and of the weight, their magnitudes, inverse factors. `out`: of the product.
    """
    x_columns, w_columns, x_most, w_most, inverse = saved
    of_x, of_w, of_y = (inverse[i, :1] for i in range(3))
    d_x = product(rows, w_columns, of_y, of_w, out).view(shape).to(dtype)
    return d_x, product(columns, x_columns, of_y, of_x, torch.float32), largest(x_most, w_most, y_most)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Tensor, columns: Tensor, x_most: Tensor, weight: Tensor, bias: Tensor | None,
        magnitudes: Tensor, scale: Tensor, inverse: Tensor, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        w_rows, w_columns, w_most = fp8_cast(weight, scale[WEIGHT, :1], FORWARD)
        ctx.shape, ctx.dtype, ctx.biased = x.shape, x.dtype, bias is not None
        ctx.save_for_backward(scale, columns, w_columns, x_most, w_most, inverse)
        y = product(rows, w_rows, inverse[INPUT, :1], inverse[WEIGHT, :1], dtype, True, bias)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple:
        scale, *saved = ctx.saved_tensors
        d_y, d_bias = d_y.reshape(-1, d_y.shape[-1]), None
        if ctx.biased:
            *parts, d_bias = fp8_cast_and_sum(d_y, scale[OUTPUT, :1], GRADIENT)
        else:
            parts = fp8_cast(d_y, scale[OUTPUT, :1], GRADIENT)
        d_x, d_w, of_all = gradients(*parts, saved, ctx.shape, ctx.dtype, d_y.dtype)
        return d_x, None, None, None, d_w, d_bias, of_all, None, None, None


class _Attend(torch.autograd.Function):
    """Attention of the projection to queries, keys and values, which rounds its output and its gradient itself."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Tensor, columns: Tensor, x_most: Tensor, weight: Tensor, bias: Tensor | None,
        magnitudes: Tensor, scale: Tensor, inverse: Tensor, factor: Tensor, heads: int, dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        w_rows, w_columns, w_most = fp8_cast(weight, scale[WEIGHT, :1], FORWARD)
        qkv = product(rows, w_rows, inverse[INPUT, :1], inverse[WEIGHT, :1], dtype, True, bias)
        n, tokens, dim = x.shape
        qkv = qkv.view(n, tokens, 3, heads, dim // heads)
        out, lse, *parts = attention_fp8_forward(qkv, factor)
        ctx.shape, ctx.dtype, ctx.biased = x.shape, x.dtype, bias is not None
        ctx.save_for_backward(qkv, out, lse, scale, columns, w_columns, x_most, w_most, inverse)
        ctx.mark_non_differentiable(*parts)
        return out.new_empty(1).expand(x.shape), *parts

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, *_: None) -> tuple:
        qkv, out, lse, scale, *saved = ctx.saved_tensors
        *parts, d_bias = attention_fp8_backward(d_out.reshape(out.shape), qkv, out, lse, scale[OUTPUT, :1])
        d_x, d_w, of_all = gradients(*parts, saved, ctx.shape, ctx.dtype, d_out.dtype)
        return d_x, None, None, None, d_w, d_bias if ctx.biased else None, of_all, *[None] * 5


def fuses(attn: Attention) -> bool:
    """Whether the kernels of attention can round for the linears before and after it."""
    pairs = attn.qkv.in_features // attn.num_heads % 2 == 0
    ours = attn.backend == "triton" and use_triton("attention_packed", attn.qkv.weight.device.type)
    return pairs and ours and attn.qk_norm == "none"


def attend(attn: Attention, x: Tensor | Rounded) -> Rounded:
    """Attention up to the input of its last linear."""
    x, qkv = rounded(x, attn.qkv), attn.qkv
    return Rounded(*_Attend.apply(
        *x, qkv.weight, qkv.bias, qkv.magnitudes, qkv.scale, qkv.inverse, attn.proj.scale[INPUT, :1], attn.num_heads,
        output_dtype(x.whole),
    ))  # fmt: skip


def multiply(linear: Linear, x: Tensor | Rounded, bias: Tensor | None) -> Tensor:
    """x W^T + bias."""
    x = rounded(x, linear)
    return _Linear.apply(
        *x, linear.weight, bias, linear.magnitudes, linear.scale, linear.inverse, output_dtype(x.whole)
    )  # fmt: skip


def output_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


class _Mlp(torch.autograd.Function):
    """fc2(activation(fc1(x) + bias)), in which the activation itself rounds its output and its gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Tensor, x_columns: Tensor, x_most: Tensor, w1: Tensor, bias: Tensor | None,
        w2: Tensor, magnitudes1: Tensor, magnitudes2: Tensor, scale1: Tensor, inverse1: Tensor, scale2: Tensor,
        inverse2: Tensor, dtype: torch.dtype, kind: str,
    ) -> Tensor:  # fmt: skip
        w_rows, w1_columns, w1_most = fp8_cast(w1, scale1[WEIGHT, :1], FORWARD)
        hidden = product(rows, w_rows, inverse1[INPUT, :1], inverse1[WEIGHT, :1], dtype, True)
        rows, a_columns, a_most = ACTIVATIONS[kind].forward(hidden, bias, scale2[INPUT, :1])
        w_rows, w2_columns, w2_most = fp8_cast(w2, scale2[WEIGHT, :1], FORWARD)
        y = product(rows, w_rows, inverse2[INPUT, :1], inverse2[WEIGHT, :1], dtype, True)
        ctx.shape, ctx.dtype, ctx.kind = x.shape, x.dtype, kind
        ctx.save_for_backward(hidden, bias, scale1, scale2, x_columns, w1_columns, x_most, w1_most, inverse1,
                              a_columns, w2_columns, a_most, w2_most, inverse2)  # fmt: skip
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple:
        hidden, bias, scale1, scale2, *saved = ctx.saved_tensors
        parts = fp8_cast(d_y.reshape(-1, d_y.shape[-1]), scale2[OUTPUT, :1], GRADIENT)
        shape = hidden.shape[0], saved[5].shape[0]
        d_a, d_w2, of_fc2 = gradients(*parts, saved[5:], shape, d_y.dtype, d_y.dtype)
        rows, columns, d_bias, most = ACTIVATIONS[ctx.kind].backward(d_a, hidden, bias, scale1[OUTPUT, :1])
        d_x, d_w1, of_fc1 = gradients(rows, columns, most, saved[:5], ctx.shape, ctx.dtype, d_y.dtype)
        return d_x, None, None, None, d_w1, d_bias, d_w2, of_fc1, of_fc2, *[None] * 6


def mlp(module: Mlp, x: Tensor | Rounded) -> Tensor:
    """The MLP without the last bias."""
    fc1, fc2, x = module.fc1, module.fc2, rounded(x, module.fc1)
    return _Mlp.apply(
        *x, fc1.weight, fc1.bias, fc2.weight, fc1.magnitudes, fc2.magnitudes, fc1.scale, fc1.inverse, fc2.scale,
        fc2.inverse, output_dtype(x.whole), module.kind,
    )  # fmt: skip
