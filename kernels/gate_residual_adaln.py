"""gate_residual_adaln: between two branches of a block, x' = x + gate (branch + bias), then h = adaln(x').

adaLN-Zero (Peebles & Xie 2022). The forward pass reads x and branch and writes x' and h; the backward pass reads d_x',
d_h, x' and branch and writes d_x and d_branch. The sums over tokens for d_gate, d_shift, d_scale and d_bias are handled
as in adaln.py.
"""

from typing import Any

import torch
from torch import Tensor

from .adaln import NORMS, adaln_eager
from .runtime import Op, check, random_inputs, tl, triton, triton_op, unit_stride, use_triton, wrap_triton
from .tiles import (
    add_rows,
    load,
    load_normalized,
    load_tiles,
    load_vector,
    norm_backward,
    normalize_modulate,
    row_programs,
    split_columns,
    store,
    store_sums,
    store_tiles,
    sum_chunks,
    zero_sums,
)

# See row_programs. Backward, 2 or 3 programs with 37 kB of loads in flight per multiprocessor, twice what hides the
# latency of an H200.
FORWARD = {"programs": 2048, "most": 32, "rows": 2, "stages": 4}
BACKWARD = {"programs": 512, "most": 128, "rows": 2, "stages": 3}


def gate_residual_adaln_eager(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None = None,
    eps: float = 1e-6, norm: str = "layer",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition: x' = x + gate (branch + bias) and adaln(x')."""
    branch_ = branch if bias is None else branch + bias
    x = (x + gate[:, None] * branch_).to(x.dtype)
    return x, adaln_eager(x, shift, scale, eps, norm).to(branch.dtype)


@triton.jit
def _add_branch(x, branch, gate, bias, x_out, rows, x_t, branch_t, cols, mask, D: tl.constexpr, BIAS: tl.constexpr):
    """Write a tile of x + gate (branch + bias) to x_out; return it as rounded there, because the norm sees that."""
    tile = load(branch, rows, branch_t, cols, mask)
    if BIAS:
        tile += bias[None, :]
    tile = load(x, rows, x_t, cols, mask) + gate[None, :] * tile
    tile = tile.to(x_out.dtype.element_ty).to(tl.float32)
    store(x_out, rows, D, cols, mask, tile)
    return tile


@triton.jit
def _gate_residual_adaln_forward(
    x, branch, gate, bias, shift, scale, x_out, h, stats, factor, most, T, chunks,
    x_n, x_t: tl.constexpr, branch_n, branch_t: tl.constexpr, gate_n, shift_n, scale_n,
    EPS: tl.constexpr, FP8: tl.constexpr, RMS: tl.constexpr, BIAS: tl.constexpr,
    D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * ROWS * STEPS
    gate_a, gate_b = load_vector(gate + n * gate_n, D, A, B)
    bias_a, bias_b = gate_a, gate_b  # not used without BIAS
    if BIAS:
        bias_a, bias_b = load_vector(bias, D, A, B)
    shift_a, shift_b = load_vector(shift + n * shift_n, D, A, B)
    scale_a, scale_b = load_vector(scale + n * scale_n, D, A, B)
    fp8_scale = tl.load(factor) if FP8 else 1.0
    seen_a, seen_b = zero_sums(ROWS, A, B)
    for step in tl.range(STEPS, num_stages=STAGES):
        rows = first + step * ROWS + tl.arange(0, ROWS)
        if B > 0:
            cols_b = A + tl.arange(0, B)
            in_b = (rows < T)[:, None] & (cols_b < D)[None, :]
            x_b = _add_branch(x + n * x_n, branch + n * branch_n, gate_b, bias_b, x_out + n * T * D,
                              rows, x_t, branch_t, cols_b, in_b, D, BIAS)  # fmt: skip
        x_a = _add_branch(x + n * x_n, branch + n * branch_n, gate_a, bias_a, x_out + n * T * D,
                          rows, x_t, branch_t, tl.arange(0, A), (rows < T)[:, None], D, BIAS)  # fmt: skip
        if B == 0:
            x_b = x_a
        h_a, h_b = normalize_modulate(x_a, x_b, shift_a, shift_b, scale_a, scale_b, h + n * T * D, stats + n * 2 * T,
                                      rows, T, fp8_scale, EPS, RMS, D, A, B, ROWS)  # fmt: skip
        if FP8:
            seen_a = tl.maximum(seen_a, tl.max(tl.where((rows < T)[:, None], tl.abs(h_a), 0.0), axis=0))
            if B > 0:
                seen_b = tl.maximum(seen_b, tl.where(in_b, tl.abs(h_b), 0.0))
    if FP8:
        seen = tl.max(seen_a)
        if B > 0:
            seen = tl.maximum(seen, tl.max(seen_b))
        tl.store(most + tl.program_id(0), seen)


@triton.jit
def _gate_residual_adaln_backward(
    d_out, d_h, x_out, branch, gate, scale, stats, d_x, d_branch, partial, T, chunks,
    dout_n, dout_t: tl.constexpr, dh_n, dh_t: tl.constexpr, x_n, x_t: tl.constexpr, branch_n, branch_t: tl.constexpr,
    gate_n, scale_n,
    RMS: tl.constexpr, BIAS: tl.constexpr, D_OUT: tl.constexpr,
    D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * ROWS * STEPS
    gate_a, gate_b = load_vector(gate + n * gate_n, D, A, B)
    gate_sum_a, gate_sum_b = zero_sums(ROWS, A, B)
    dx_sum_a, dx_sum_b = zero_sums(ROWS, A, B)
    shift_sum_a, shift_sum_b = zero_sums(ROWS, A, B)
    scale_sum_a, scale_sum_b = zero_sums(ROWS, A, B)
    scale_a, scale_b = load_vector(scale + n * scale_n, D, A, B)
    for step in tl.range(STEPS, num_stages=STAGES):
        rows = first + step * ROWS + tl.arange(0, ROWS)
        xhat_a, xhat_b, rstd = load_normalized(x_out + n * x_n, rows, x_t, stats + n * 2 * T, T, D, A, B)
        dh_a, dh_b = load_tiles(d_h + n * dh_n, rows, dh_t, T, D, A, B)
        scale_sum_a, scale_sum_b = add_rows(scale_sum_a, scale_sum_b, dh_a * xhat_a, dh_b * xhat_b, B)
        shift_sum_a, shift_sum_b = add_rows(shift_sum_a, shift_sum_b, dh_a, dh_b, B)
        g_a, g_b = dh_a * (1.0 + scale_a)[None, :], dh_b * (1.0 + scale_b)[None, :]
        dx_a, dx_b = norm_backward(g_a, g_b, xhat_a, xhat_b, rstd, RMS, D, B, ROWS)
        if D_OUT:
            dout_a, dout_b = load_tiles(d_out + n * dout_n, rows, dout_t, T, D, A, B)
            dx_a += dout_a
            dx_b += dout_b
        store_tiles(d_x + n * T * D, rows, D, T, dx_a, dx_b, D, A, B)
        store_tiles(d_branch + n * T * D, rows, D, T, dx_a * gate_a[None, :], dx_b * gate_b[None, :], D, A, B)
        branch_a, branch_b = load_tiles(branch + n * branch_n, rows, branch_t, T, D, A, B)
        gate_sum_a, gate_sum_b = add_rows(gate_sum_a, gate_sum_b, dx_a * branch_a, dx_b * branch_b, B)
        if BIAS:
            dx_sum_a, dx_sum_b = add_rows(dx_sum_a, dx_sum_b, dx_a, dx_b, B)
    SUMS: tl.constexpr = 3 + BIAS
    out = partial + tl.program_id(0).to(tl.int64) * SUMS * D
    store_sums(out, gate_sum_a, gate_sum_b, D, A, B)
    store_sums(out + D, shift_sum_a, shift_sum_b, D, A, B)
    store_sums(out + 2 * D, scale_sum_a, scale_sum_b, D, A, B)
    if BIAS:
        store_sums(out + 3 * D, dx_sum_a, dx_sum_b, D, A, B)


def launch_forward(
    x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None, x_out: Tensor, shift: Tensor, scale: Tensor,
    h: Tensor, stats: Tensor, eps: float, rms: bool, factor: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """Write x_out, h and stats. With `factor` (1,), h is in e4m3, scaled by it, and the largest magnitudes of its parts
    are returned."""
    chunks, constants = row_programs(x, **FORWARD)
    most = None if factor is None else torch.empty(len(x) * chunks, dtype=torch.float32, device=x.device)
    wrap_triton(_gate_residual_adaln_forward)[(len(x) * chunks,)](
        x, branch, gate, bias, shift, scale, x_out, h, stats, factor, most, x.shape[1], chunks,
        *x.stride()[:2], *branch.stride()[:2], gate.stride(0), shift.stride(0), scale.stride(0),
        EPS=eps, FP8=int(factor is not None), RMS=rms, BIAS=int(bias is not None), **constants,
    )  # fmt: skip
    return most


@triton_op("fastdit::gate_residual_adaln")
def _op(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> x', h (N, T, D) and (N, 2, T) fp32 mean and rstd of x'."""
    x, branch, gate, shift, scale = (unit_stride(v) for v in (x, branch, gate, shift, scale))
    n, t, d = x.shape
    x_out = torch.empty((n, t, d), dtype=x.dtype, device=x.device)
    h = torch.empty((n, t, d), dtype=branch.dtype, device=x.device)
    stats = torch.empty((n, 2, t), dtype=torch.float32, device=x.device)
    launch_forward(x, branch, gate, unit_stride(bias), x_out, shift, scale, h, stats, eps, rms)
    return x_out, h, stats


@triton_op("fastdit::gate_residual_adaln_backward")
def _op_backward(
    d_out: Tensor | None, d_h: Tensor, x_out: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, stats: Tensor,
    has_bias: bool, rms: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> d_x, d_branch (N, T, D), fp32 partial sums (N, chunks, 3 or 4, D): gate, shift, scale and, if biased, d_x."""
    d_out, d_h, x_out, branch, gate, scale = (unit_stride(v) for v in (d_out, d_h, x_out, branch, gate, scale))
    n, t, d = branch.shape
    one_tile = {} if split_columns(d)[1] else {"stages": 4}  # at 3 stages ptxas spills 8 bytes there
    chunks, constants = row_programs(branch, **BACKWARD | one_tile)
    d_x = torch.empty((n, t, d), dtype=x_out.dtype, device=x_out.device)
    d_branch = torch.empty((n, t, d), dtype=branch.dtype, device=branch.device)
    partial = torch.empty((n, chunks, 3 + has_bias, d), dtype=torch.float32, device=branch.device)
    wrap_triton(_gate_residual_adaln_backward)[(n * chunks,)](
        d_out, d_h, x_out, branch, gate, scale, stats, d_x, d_branch, partial, t, chunks,
        *((0, 0) if d_out is None else d_out.stride()[:2]), *d_h.stride()[:2], *x_out.stride()[:2],
        *branch.stride()[:2], gate.stride(0), scale.stride(0),
        RMS=rms, BIAS=int(has_bias), D_OUT=int(d_out is not None), **constants,
    )  # fmt: skip
    return d_x, d_branch, partial


@triton_op("fastdit::gate_residual_adaln_fp8")
def gate_residual_adaln_fp8(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None, factor: Tensor,
    eps: float, rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> x', stats, and h (N T, D) in e4m3 times `factor` (1,), with the largest magnitudes of its parts."""
    x, branch, gate, shift, scale = (unit_stride(v) for v in (x, branch, gate, shift, scale))
    n, t, d = x.shape
    x_out = torch.empty((n, t, d), dtype=x.dtype, device=x.device)
    h = torch.empty((n * t, d), dtype=torch.float8_e4m3fn, device=x.device)
    stats = torch.empty((n, 2, t), dtype=torch.float32, device=x.device)
    most = launch_forward(x, branch, gate, unit_stride(bias), x_out, shift, scale, h, stats, eps, rms, factor)
    return x_out, stats, h, most


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, branch, gate, shift, scale, bias, _, ctx.rms = inputs
    ctx.set_materialize_grads(False)
    ctx.shift_dtype = shift.dtype
    ctx.save_for_backward(output[0], branch, gate, scale, bias, output[2])


def gate_residual_adaln_backward(
    d_out: Tensor | None, d_h: Tensor | None, x_out: Tensor, branch: Tensor, gate: Tensor, scale: Tensor,
    bias: Tensor | None, stats: Tensor, shift_dtype: torch.dtype, rms: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, branch, gate, shift, scale and bias from those of x' (None: not used) and h."""
    if d_h is None:
        d_h = torch.zeros_like(branch)
    d_x, d_branch, partial = _op_backward(d_out, d_h, x_out, branch, gate, scale, stats, bias is not None, rms)
    sums = sum_chunks(partial, gate.dtype if bias is None else torch.float32).unbind(1)
    (d_gate, d_shift, d_scale), d_bias = sums[:3], None
    if bias is not None:
        d_gate = (d_gate + bias * sums[3]).to(gate.dtype)
        d_bias = (gate * sums[3]).sum(0).to(bias.dtype)
    return d_x, d_branch, d_gate, d_shift.to(shift_dtype), d_scale.to(scale.dtype), d_bias


def _grad(ctx: Any, d_out: Tensor | None, d_h: Tensor | None, _: None) -> tuple:
    gradients = gate_residual_adaln_backward(d_out, d_h, *ctx.saved_tensors, ctx.shift_dtype, ctx.rms)
    return *gradients, None, None


_op.register_autograd(_grad, setup_context=_setup)


def gate_residual_adaln_triton(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None = None,
    eps: float = 1e-6, norm: str = "layer",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _op(x, branch, gate, shift, scale, bias, eps, norm == "rms")[:2]


def gate_residual_adaln(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None = None,
    eps: float = 1e-6, norm: str = "layer",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x' = x + gate (branch + bias); h = norm(x') (1 + scale) + shift. -> x' (x's dtype), h (branch's dtype).

    x, branch (N, T, D); gate, shift, scale (N, D), any strides: chunks of an (N, 6D) projection are read in place;
    bias (D,) of the linear that computed the branch, added here so that its gradient needs no extra pass.
    ValueError if a shape or the norm's name is wrong.
    """
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is unknown; use one of {', '.join(NORMS)}")
    check("branch", branch, *x.shape)
    for name, vector in (("gate", gate), ("shift", shift), ("scale", scale)):
        check(name, vector, x.shape[0], x.shape[2])
    check("bias", bias, x.shape[2])
    fused = use_triton("gate_residual_adaln", x.device.type, x.dtype, branch.dtype, gate.dtype)
    fn = gate_residual_adaln_triton if fused else gate_residual_adaln_eager
    return fn(x, branch, gate, shift, scale, bias, eps, norm)


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    n, t, d = shape
    values = random_inputs(seed, dtype, device, x=(n, t, d), branch=(n, t, d), modulation=(n, 6 * d), bias=(d,))
    shift, scale, gate = values.pop("modulation").chunk(6, dim=1)[:3]
    return values | {"gate": gate, "shift": shift, "scale": scale}


def minimum_bytes(shape: tuple[int, int, int], size: int) -> tuple[int, int]:
    n, t, d = shape
    tokens, vectors, stats = n * t * d * size, n * d * size, n * t * 8
    return 4 * tokens + 3 * vectors + d * size + stats, 6 * tokens + 5 * vectors + d * size + stats


GATE_RESIDUAL_ADALN = Op(
    "gate_residual_adaln", gate_residual_adaln_eager, gate_residual_adaln_triton, gate_residual_adaln, inputs,
    tiny=(2, 3, 5), shapes=((2, 19, 72), (1, 16, 384), (1, 19, 1152), (1, 9, 64)),
    real=((256, 256, 384), (256, 256, 768), (256, 256, 1024), (256, 256, 1152)),
    minimum_bytes=minimum_bytes,
    writes=(("x_out", "h", "stats"), ("d_x", "d_branch", "partial"), ("out",)),
    variants=({"norm": "rms", "eps": 1e-2}, {"bias": None}),
)  # fmt: skip
