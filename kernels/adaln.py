"""adaln: LayerNorm or RMSNorm without affine, then modulate: h = norm(x) (1 + scale) + shift (Peebles & Xie 2022).

Forward reads x and writes h; backward reads d_h and x and writes d_x. Mean and rstd travel in fp32. d_shift and d_scale
are summed in fp32 registers per (sample, chunk of tokens), written as (N, chunks, 2, D) and finished by a second pass
in a fixed order: no atomics, the same bits every time.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .runtime import (
    Op,
    cdiv,
    check,
    on_device,
    random_inputs,
    rows_per_program,
    split_columns,
    tl,
    triton,
    triton_op,
    unit_stride,
    use_triton,
    warps_for,
    wrap_triton,
)
from .tiles import a_to_b, b_to_a, load, load_columns, moments, store, sum_chunks

NORMS = ("layer", "rms")
# Rows a program holds at once and its cp.async stages: 2 rows keep forward under 80 and backward under 128 registers;
# either pass has over 64 kB a multiprocessor under way, twice what hides an H200's latency.
FORWARD = {"ROWS": 2, "STAGES": 4}
BACKWARD = {"ROWS": 2, "STAGES": 3}


def adaln_eager(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, norm: str = "layer") -> Tensor:
    """The definition: norm(x) (1 + scale) + shift, shift and scale one row a sample."""
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
    cols_a = tl.arange(0, A)
    all_a = cols_a < A
    shift_a = load_columns(shift + n * shift_n, cols_a, all_a)
    scale_a = 1.0 + load_columns(scale + n * scale_n, cols_a, all_a)
    if B > 0:
        cols_b = A + tl.arange(0, B)
        in_b = cols_b < D
        shift_b = load_columns(shift + n * shift_n, cols_b, in_b)
        scale_b = 1.0 + load_columns(scale + n * scale_n, cols_b, in_b)
    else:
        in_b = all_a
    for step in tl.range(STEPS, num_stages=STAGES):
        rows = first + step * ROWS + tl.arange(0, ROWS)
        live = rows < T
        if B > 0:
            x_b = load(x + n * x_n, rows, x_t, cols_b, live[:, None] & in_b[None, :])
        x_a = load(x + n * x_n, rows, x_t, cols_a, live[:, None])
        if B == 0:
            x_b = x_a
        mu, r = moments(x_a, x_b, in_b, EPS, D, B, RMS, ROWS)
        h_a = (x_a - mu[:, None]) * r[:, None] * scale_a[None, :] + shift_a[None, :]
        store(h + n * T * D, rows, D, cols_a, live[:, None], h_a)
        if B > 0:
            h_b = (x_b - a_to_b(mu, ROWS)[:, None]) * a_to_b(r, ROWS)[:, None] * scale_b[None, :] + shift_b[None, :]
            store(h + n * T * D, rows, D, cols_b, live[:, None] & in_b[None, :], h_b)
        tl.store(stats + n * 2 * T + rows, mu, mask=live)
        tl.store(stats + n * 2 * T + T + rows, r, mask=live)


@triton.jit
def _adaln_backward(
    d_h, x, scale, stats, d_x, partial, T, chunks, dh_n, dh_t, x_n, x_t, scale_n,
    RMS: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * ROWS * STEPS
    cols_a = tl.arange(0, A)
    scale_a = 1.0 + load_columns(scale + n * scale_n, cols_a, cols_a < A)
    shift_sum_a = tl.zeros([A], tl.float32)
    scale_sum_a = tl.zeros([A], tl.float32)
    if B > 0:
        cols_b = A + tl.arange(0, B)
        in_b = cols_b < D
        scale_b = 1.0 + load_columns(scale + n * scale_n, cols_b, in_b)
        shift_sum_b = tl.zeros([ROWS, B], tl.float32)  # b's rows lie in several warps: add them once, at the end
        scale_sum_b = tl.zeros([ROWS, B], tl.float32)
    for step in tl.range(STEPS, num_stages=STAGES):
        rows = first + step * ROWS + tl.arange(0, ROWS)
        live = rows < T
        mu = tl.load(stats + n * 2 * T + rows, mask=live, other=0.0)
        r = tl.load(stats + n * 2 * T + T + rows, mask=live, other=0.0)
        if B > 0:
            in_tile = live[:, None] & in_b[None, :]
            dh_b = load(d_h + n * dh_n, rows, dh_t, cols_b, in_tile)
            xhat_b = (load(x + n * x_n, rows, x_t, cols_b, in_tile) - mu[:, None]) * r[:, None]
        dh_a = load(d_h + n * dh_n, rows, dh_t, cols_a, live[:, None])
        xhat_a = (load(x + n * x_n, rows, x_t, cols_a, live[:, None]) - mu[:, None]) * r[:, None]
        g_a = dh_a * scale_a[None, :]
        g_mean = tl.sum(g_a, axis=1)
        g_xhat = tl.sum(g_a * xhat_a, axis=1)
        if B > 0:
            g_b = dh_b * scale_b[None, :]
            g_mean += b_to_a(tl.sum(g_b, axis=1), ROWS)
            g_xhat += b_to_a(tl.sum(g_b * xhat_b, axis=1), ROWS)
            shift_sum_b += dh_b
            scale_sum_b += dh_b * xhat_b
        g_mean *= 0.0 if RMS else 1.0 / D
        g_xhat *= 1.0 / D
        dx_a = (g_a - g_mean[:, None] - xhat_a * g_xhat[:, None]) * r[:, None]
        store(d_x + n * T * D, rows, D, cols_a, live[:, None], dx_a)
        if B > 0:
            dx_b = (g_b - a_to_b(g_mean, ROWS)[:, None] - xhat_b * a_to_b(g_xhat, ROWS)[:, None]) * r[:, None]
            store(d_x + n * T * D, rows, D, cols_b, in_tile, dx_b)
        shift_sum_a += tl.sum(dh_a, axis=0)
        scale_sum_a += tl.sum(dh_a * xhat_a, axis=0)
    out = partial + tl.program_id(0).to(tl.int64) * 2 * D
    tl.store(out + cols_a, shift_sum_a)
    tl.store(out + D + cols_a, scale_sum_a)
    if B > 0:
        tl.store(out + cols_b, tl.sum(shift_sum_b, axis=0), mask=in_b)
        tl.store(out + D + cols_b, tl.sum(scale_sum_b, axis=0), mask=in_b)


@triton_op("fastdit::adaln")
def _op(x: Tensor, shift: Tensor, scale: Tensor, eps: float, rms: bool) -> tuple[Tensor, Tensor]:
    """-> h (N, T, D) and (N, 2, T) fp32 mean and rstd."""
    x, shift, scale = unit_stride(x), unit_stride(shift), unit_stride(scale)
    n, t, d = x.shape
    h = torch.empty((n, t, d), dtype=x.dtype, device=x.device)
    stats = torch.empty((n, 2, t), dtype=torch.float32, device=x.device)
    if x.numel():
        a, b = split_columns(d)
        rows = rows_per_program(n, t, programs=2048, most=32)
        chunks = cdiv(t, rows)
        with on_device(x):
            wrap_triton(_adaln_forward)[(n * chunks,)](
                x, shift, scale, h, stats, t, chunks, x.stride(0), x.stride(1), shift.stride(0), scale.stride(0),
                EPS=eps, RMS=rms, D=d, A=a, B=b, STEPS=rows // FORWARD["ROWS"], **FORWARD, num_warps=warps_for(a),
            )  # fmt: skip
    return h, stats


@triton_op("fastdit::adaln_backward")
def _op_backward(d_h: Tensor, x: Tensor, scale: Tensor, stats: Tensor, rms: bool) -> tuple[Tensor, Tensor]:
    """-> d_x (N, T, D) and (N, chunks, 2, D) fp32 partial sums of d_shift and d_scale."""
    d_h, x, scale = unit_stride(d_h), unit_stride(x), unit_stride(scale)
    n, t, d = x.shape
    rows = rows_per_program(n, t, programs=512, most=128)
    chunks = cdiv(t, rows)
    d_x = torch.empty((n, t, d), dtype=x.dtype, device=x.device)
    partial = torch.empty((n, chunks, 2, d), dtype=torch.float32, device=x.device)
    if x.numel():
        a, b = split_columns(d)
        with on_device(x):
            wrap_triton(_adaln_backward)[(n * chunks,)](
                d_h, x, scale, stats, d_x, partial, t, chunks,
                d_h.stride(0), d_h.stride(1), x.stride(0), x.stride(1), scale.stride(0),
                RMS=rms, D=d, A=a, B=b, STEPS=rows // BACKWARD["ROWS"], **BACKWARD, num_warps=warps_for(a),
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

    x (N, T, D); shift, scale (N, D), any strides (a chunk of a (N, 6D) projection is read in place) -> (N, T, D), x's
    dtype. norm: "layer" or "rms", over D, without affine. ValueError where shapes or the norm's name do not fit.
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


OP = Op(
    "adaln", adaln_eager, adaln_triton, adaln, inputs,
    tiny=(2, 3, 5), shapes=((3, 41, 72), (1, 64, 384), (3, 41, 1152), (1, 256, 72), (1, 9, 2048)),
    real=((256, 256, 384), (256, 256, 768), (256, 256, 1024), (256, 256, 1152)),
    minimum_bytes=minimum_bytes,
)  # fmt: skip
