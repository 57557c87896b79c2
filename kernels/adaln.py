"""adaln: LayerNorm or RMSNorm without affine, then modulation: h = norm(x) (1 + scale) + shift (Peebles & Xie 2022).

The forward pass reads x and writes h; the backward pass reads d_h and x and writes d_x. Mean and rstd are saved in
fp32. d_shift and d_scale are summed in fp32 registers per (sample, chunk of tokens), written as partial sums
(N, chunks, 2, D) and added up by a second pass in a fixed order: no atomics, so results are deterministic.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .runtime import Op, check, random_inputs, tl, triton, triton_op, unit_stride, use_triton, wrap_triton
from .tiles import (
    add_rows,
    load_normalized,
    load_tiles,
    load_vector,
    norm_backward,
    normalize_modulate,
    row_programs,
    store_sums,
    store_tiles,
    sum_chunks,
    zero_sums,
)

NORMS = ("layer", "rms")
# See row_programs. At width 1152, 2 rows take fewer than 80 registers forward and 128 backward. Both passes keep more
# than 64 kB of loads in flight per multiprocessor, twice what hides the latency of an H200.
FORWARD = {"programs": 2048, "most": 32, "rows": 2, "stages": 4}
BACKWARD = {"programs": 512, "most": 128, "rows": 2, "stages": 3}


def adaln_eager(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, norm: str = "layer") -> Tensor:
    """The definition: norm(x) (1 + scale) + shift, shift and scale (N, D)."""
    normed = F.layer_norm(x, x.shape[-1:], eps=eps) if norm == "layer" else F.rms_norm(x, x.shape[-1:], eps=eps)
    return (normed * (1 + scale[:, None]) + shift[:, None]).to(x.dtype)


@triton.jit
def _adaln_forward(
    x, shift, scale, h, stats, T, chunks, x_n, x_t, shift_n, scale_n,
    EPS: tl.constexpr, RMS: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * ROWS * STEPS
    shift_a, shift_b = load_vector(shift + n * shift_n, D, A, B)
    scale_a, scale_b = load_vector(scale + n * scale_n, D, A, B)
    for step in tl.range(STEPS, num_stages=STAGES):
        rows = first + step * ROWS + tl.arange(0, ROWS)
        x_a, x_b = load_tiles(x + n * x_n, rows, x_t, T, D, A, B)
        normalize_modulate(x_a, x_b, shift_a, shift_b, scale_a, scale_b, h + n * T * D, stats + n * 2 * T, rows, T,
                           1.0, EPS, RMS, D, A, B, ROWS)  # fmt: skip


@triton.jit
def _adaln_backward(
    d_h, x, scale, stats, d_x, partial, T, chunks, dh_n, dh_t, x_n, x_t, scale_n,
    RMS: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * ROWS * STEPS
    scale_a, scale_b = load_vector(scale + n * scale_n, D, A, B)
    shift_sum_a, shift_sum_b = zero_sums(ROWS, A, B)
    scale_sum_a, scale_sum_b = zero_sums(ROWS, A, B)
    for step in tl.range(STEPS, num_stages=STAGES):
        rows = first + step * ROWS + tl.arange(0, ROWS)
        xhat_a, xhat_b, rstd = load_normalized(x + n * x_n, rows, x_t, stats + n * 2 * T, T, D, A, B)
        dh_a, dh_b = load_tiles(d_h + n * dh_n, rows, dh_t, T, D, A, B)
        scale_sum_a, scale_sum_b = add_rows(scale_sum_a, scale_sum_b, dh_a * xhat_a, dh_b * xhat_b, B)
        shift_sum_a, shift_sum_b = add_rows(shift_sum_a, shift_sum_b, dh_a, dh_b, B)
        g_a, g_b = dh_a * (1.0 + scale_a)[None, :], dh_b * (1.0 + scale_b)[None, :]
        dx_a, dx_b = norm_backward(g_a, g_b, xhat_a, xhat_b, rstd, RMS, D, B, ROWS)
        store_tiles(d_x + n * T * D, rows, D, T, dx_a, dx_b, D, A, B)
    out = partial + tl.program_id(0).to(tl.int64) * 2 * D
    store_sums(out, shift_sum_a, shift_sum_b, D, A, B)
    store_sums(out + D, scale_sum_a, scale_sum_b, D, A, B)


@triton_op("fastdit::adaln")
def _op(x: Tensor, shift: Tensor, scale: Tensor, eps: float, rms: bool) -> tuple[Tensor, Tensor]:
    """-> h (N, T, D) and (N, 2, T) fp32 mean and rstd."""
    x, shift, scale = unit_stride(x), unit_stride(shift), unit_stride(scale)
    n, t, d = x.shape
    h = torch.empty((n, t, d), dtype=x.dtype, device=x.device)
    stats = torch.empty((n, 2, t), dtype=torch.float32, device=x.device)
    chunks, constants = row_programs(x, **FORWARD)
    wrap_triton(_adaln_forward)[(n * chunks,)](
        x, shift, scale, h, stats, t, chunks, *x.stride()[:2], shift.stride(0), scale.stride(0),
        EPS=eps, RMS=rms, **constants,
    )  # fmt: skip
    return h, stats


@triton_op("fastdit::adaln_backward")
def _op_backward(d_h: Tensor, x: Tensor, scale: Tensor, stats: Tensor, rms: bool) -> tuple[Tensor, Tensor]:
    """-> d_x (N, T, D) and (N, chunks, 2, D) fp32 partial sums of d_shift and d_scale."""
    d_h, x, scale = unit_stride(d_h), unit_stride(x), unit_stride(scale)
    n, t, d = x.shape
    chunks, constants = row_programs(x, **BACKWARD)
    d_x = torch.empty((n, t, d), dtype=x.dtype, device=x.device)
    partial = torch.empty((n, chunks, 2, d), dtype=torch.float32, device=x.device)
    wrap_triton(_adaln_backward)[(n * chunks,)](
        d_h, x, scale, stats, d_x, partial, t, chunks, *d_h.stride()[:2], *x.stride()[:2], scale.stride(0),
        RMS=rms, **constants,
    )  # fmt: skip
    return d_x, partial


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, shift, scale, _, ctx.rms = inputs
    ctx.set_materialize_grads(False)
    ctx.shift_dtype = shift.dtype
    ctx.save_for_backward(x, scale, output[1])


def _grad(ctx: Any, d_h: Tensor, _: None) -> tuple:
    x, scale, stats = ctx.saved_tensors
    d_x, partial = _op_backward(d_h, x, scale, stats, ctx.rms)
    d_shift, d_scale = sum_chunks(partial, scale.dtype).unbind(1)
    return d_x, d_shift.to(ctx.shift_dtype), d_scale, None, None


_op.register_autograd(_grad, setup_context=_setup)


def adaln_triton(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, norm: str = "layer") -> Tensor:
    return _op(x, shift, scale, eps, norm == "rms")[0]


def adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, norm: str = "layer") -> Tensor:
    """norm(x) (1 + scale) + shift.

    x (N, T, D); shift, scale (N, D), any strides: chunks of an (N, 6D) projection are read in place -> (N, T, D), x's
    dtype. norm: "layer" or "rms", over D, without affine. ValueError if a shape or the norm's name is wrong.
    """
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is unknown; use one of {', '.join(NORMS)}")
    check("shift", shift, x.shape[0], x.shape[2])
    check("scale", scale, x.shape[0], x.shape[2])
    fused = use_triton("adaln", x.device.type, x.dtype, shift.dtype, scale.dtype)
    return (adaln_triton if fused else adaln_eager)(x, shift, scale, eps, norm)


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    n, t, d = shape
    values = random_inputs(seed, dtype, device, x=(n, t, d), modulation=(n, 6 * d))
    shift, scale = values.pop("modulation").chunk(6, dim=1)[:2]
    return values | {"shift": shift, "scale": scale}


def minimum_bytes(shape: tuple[int, int, int], size: int) -> tuple[int, int]:
    n, t, d = shape
    tokens, vectors, stats = n * t * d * size, n * d * size, n * t * 8
    return 2 * tokens + 2 * vectors + stats, 3 * tokens + 3 * vectors + stats


ADALN = Op(
    "adaln", adaln_eager, adaln_triton, adaln, inputs,
    tiny=(2, 3, 5), shapes=((2, 19, 72), (1, 16, 384), (1, 19, 1152), (1, 9, 2048)),
    real=((256, 256, 384), (256, 256, 768), (256, 256, 1024), (256, 256, 1152)),
    minimum_bytes=minimum_bytes,
    writes=(("h", "stats"), ("d_x", "partial"), ("out",)), variants=({"norm": "rms", "eps": 1e-2},),
)  # fmt: skip
