"""gate_residual_adaln: between two branches of a block, x' = x + gate (branch + bias), then h = adaln(x').

One pass forward (reads x and branch, writes x' and h) and one backward (reads d_x', d_h, x', branch, writes d_x and
d_branch). The sums over tokens behind d_gate, d_shift, d_scale and d_bias stay in fp32 registers per (sample, chunk of
tokens), leave as (N, chunks, 3 or 4, D) and are finished in a fixed order: no atomics, the same bits every time.
Without the norm the same kernels make `gate_residual`. Peebles & Xie 2022, adaLN-Zero.
"""

from typing import Any

import torch
from torch import Tensor

from .adaln import NORMS, adaln_eager
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

# Rows a program holds at once and its cp.async stages: backward 2-3 programs of 37 kB in flight a multiprocessor, twice
# what hides an H200's latency. (Without a second tile ptxas spills 8 bytes at 3 stages, none at 4.)
FORWARD = {"ROWS": 2, "STAGES": 4}
BACKWARD = {"ROWS": 2, "STAGES": 3}
BACKWARD_ONE_TILE = {"ROWS": 2, "STAGES": 4}


def gate_residual_adaln_eager(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None = None,
    eps: float = 1e-6, norm: str = "layer",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition: x' = x + gate (branch + bias) and adaln(x')."""
    branch_ = branch if bias is None else branch + bias
    x = (x + gate[:, None] * branch_).to(x.dtype)
    return x, adaln_eager(x, shift, scale, eps, norm).to(branch.dtype)


@triton.jit
def _gate_residual_adaln_forward(
    x, branch, gate, bias, shift, scale, x_out, h, stats, T, chunks,
    x_n, x_t: tl.constexpr, branch_n, branch_t: tl.constexpr, gate_n, shift_n, scale_n,
    EPS: tl.constexpr, NORM: tl.constexpr, RMS: tl.constexpr, BIAS: tl.constexpr,
    D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * ROWS * STEPS
    cols_a = tl.arange(0, A)
    all_a = cols_a < A
    in_b = all_a
    gate_a = load_columns(gate + n * gate_n, cols_a, all_a)
    if BIAS:
        bias_a = load_columns(bias, cols_a, all_a)
    if NORM:
        shift_a = load_columns(shift + n * shift_n, cols_a, all_a)
        scale_a = 1.0 + load_columns(scale + n * scale_n, cols_a, all_a)
    if B > 0:
        cols_b = A + tl.arange(0, B)
        in_b = cols_b < D
        gate_b = load_columns(gate + n * gate_n, cols_b, in_b)
        if BIAS:
            bias_b = load_columns(bias, cols_b, in_b)
        if NORM:
            shift_b = load_columns(shift + n * shift_n, cols_b, in_b)
            scale_b = 1.0 + load_columns(scale + n * scale_n, cols_b, in_b)
    for step in tl.range(STEPS, num_stages=STAGES):
        rows = first + step * ROWS + tl.arange(0, ROWS)
        live = rows < T
        # b before a: the compiler lays the values that both share out as it does the tile it meets last
        if B > 0:
            in_tile = live[:, None] & in_b[None, :]
            branch_b = load(branch + n * branch_n, rows, branch_t, cols_b, in_tile)
            if BIAS:
                branch_b += bias_b[None, :]
            x_b = load(x + n * x_n, rows, x_t, cols_b, in_tile) + gate_b[None, :] * branch_b
            x_b = x_b.to(x_out.dtype.element_ty).to(tl.float32)  # the norm sees what is stored
            store(x_out + n * T * D, rows, D, cols_b, in_tile, x_b)
        branch_a = load(branch + n * branch_n, rows, branch_t, cols_a, live[:, None])
        if BIAS:
            branch_a += bias_a[None, :]
        x_a = load(x + n * x_n, rows, x_t, cols_a, live[:, None]) + gate_a[None, :] * branch_a
        x_a = x_a.to(x_out.dtype.element_ty).to(tl.float32)
        store(x_out + n * T * D, rows, D, cols_a, live[:, None], x_a)
        if NORM:
            if B == 0:
                x_b = x_a
            mu, r = moments(x_a, x_b, in_b, EPS, D, B, RMS, ROWS)
            if B > 0:
                h_b = (x_b - a_to_b(mu, ROWS)[:, None]) * a_to_b(r, ROWS)[:, None] * scale_b[None, :]
                store(h + n * T * D, rows, D, cols_b, in_tile, h_b + shift_b[None, :])
            h_a = (x_a - mu[:, None]) * r[:, None] * scale_a[None, :] + shift_a[None, :]
            store(h + n * T * D, rows, D, cols_a, live[:, None], h_a)
            tl.store(stats + n * 2 * T + rows, mu, mask=live)
            tl.store(stats + n * 2 * T + T + rows, r, mask=live)


@triton.jit
def _gate_residual_adaln_backward(
    d_out, d_h, x_out, branch, gate, scale, stats, d_x, d_branch, partial, T, chunks,
    dout_n, dout_t: tl.constexpr, dh_n, dh_t: tl.constexpr, x_n, x_t: tl.constexpr, branch_n, branch_t: tl.constexpr,
    gate_n, scale_n,
    NORM: tl.constexpr, RMS: tl.constexpr, BIAS: tl.constexpr, D_OUT: tl.constexpr,
    D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * ROWS * STEPS
    cols_a = tl.arange(0, A)
    all_a = cols_a < A
    gate_a = load_columns(gate + n * gate_n, cols_a, all_a)
    gate_sum_a = tl.zeros([A], tl.float32)
    dx_sum_a = tl.zeros([A], tl.float32)
    shift_sum_a = tl.zeros([A], tl.float32)
    scale_sum_a = tl.zeros([A], tl.float32)
    if NORM:
        scale_a = 1.0 + load_columns(scale + n * scale_n, cols_a, all_a)
    if B > 0:
        cols_b = A + tl.arange(0, B)
        in_b = cols_b < D
        gate_b = load_columns(gate + n * gate_n, cols_b, in_b)
        gate_sum_b = tl.zeros([ROWS, B], tl.float32)  # b's rows lie in several warps: add them once, at the end
        dx_sum_b = tl.zeros([ROWS, B], tl.float32)
        shift_sum_b = tl.zeros([ROWS, B], tl.float32)
        scale_sum_b = tl.zeros([ROWS, B], tl.float32)
        if NORM:
            scale_b = 1.0 + load_columns(scale + n * scale_n, cols_b, in_b)
    for step in tl.range(STEPS, num_stages=STAGES):
        rows = first + step * ROWS + tl.arange(0, ROWS)
        live = rows < T
        if NORM:
            mu = tl.load(stats + n * 2 * T + rows, mask=live, other=0.0)
            r = tl.load(stats + n * 2 * T + T + rows, mask=live, other=0.0)
            if B > 0:
                in_tile = live[:, None] & in_b[None, :]
                dh_b = load(d_h + n * dh_n, rows, dh_t, cols_b, in_tile)
                xhat_b = (load(x_out + n * x_n, rows, x_t, cols_b, in_tile) - mu[:, None]) * r[:, None]
                g_b = dh_b * scale_b[None, :]
                shift_sum_b += dh_b
                scale_sum_b += dh_b * xhat_b
            dh_a = load(d_h + n * dh_n, rows, dh_t, cols_a, live[:, None])
            xhat_a = (load(x_out + n * x_n, rows, x_t, cols_a, live[:, None]) - mu[:, None]) * r[:, None]
            g_a = dh_a * scale_a[None, :]
            shift_sum_a += tl.sum(dh_a, axis=0)
            scale_sum_a += tl.sum(dh_a * xhat_a, axis=0)
            g_mean = tl.sum(g_a, axis=1)
            g_xhat = tl.sum(g_a * xhat_a, axis=1)
            if B > 0:
                g_mean += b_to_a(tl.sum(g_b, axis=1), ROWS)
                g_xhat += b_to_a(tl.sum(g_b * xhat_b, axis=1), ROWS)
            g_mean *= 0.0 if RMS else 1.0 / D
            g_xhat *= 1.0 / D
            dx_a = (g_a - g_mean[:, None] - xhat_a * g_xhat[:, None]) * r[:, None]
            if D_OUT:
                dx_a += load(d_out + n * dout_n, rows, dout_t, cols_a, live[:, None])
        else:
            dx_a = load(d_out + n * dout_n, rows, dout_t, cols_a, live[:, None])
        if NORM:
            store(d_x + n * T * D, rows, D, cols_a, live[:, None], dx_a)
        store(d_branch + n * T * D, rows, D, cols_a, live[:, None], dx_a * gate_a[None, :])
        gate_sum_a += tl.sum(dx_a * load(branch + n * branch_n, rows, branch_t, cols_a, live[:, None]), axis=0)
        if BIAS:
            dx_sum_a += tl.sum(dx_a, axis=0)
        if B > 0:
            in_tile = live[:, None] & in_b[None, :]
            if NORM:
                dx_b = (g_b - a_to_b(g_mean, ROWS)[:, None] - xhat_b * a_to_b(g_xhat, ROWS)[:, None]) * r[:, None]
                if D_OUT:
                    dx_b += load(d_out + n * dout_n, rows, dout_t, cols_b, in_tile)
                store(d_x + n * T * D, rows, D, cols_b, in_tile, dx_b)
            else:
                dx_b = load(d_out + n * dout_n, rows, dout_t, cols_b, in_tile)
            store(d_branch + n * T * D, rows, D, cols_b, in_tile, dx_b * gate_b[None, :])
            gate_sum_b += dx_b * load(branch + n * branch_n, rows, branch_t, cols_b, in_tile)
            if BIAS:
                dx_sum_b += dx_b
    SUMS: tl.constexpr = 1 + 2 * NORM + BIAS
    out = partial + tl.program_id(0).to(tl.int64) * SUMS * D
    tl.store(out + cols_a, gate_sum_a)
    if NORM:
        tl.store(out + D + cols_a, shift_sum_a)
        tl.store(out + 2 * D + cols_a, scale_sum_a)
    if BIAS:
        tl.store(out + (SUMS - 1) * D + cols_a, dx_sum_a)
    if B > 0:
        tl.store(out + cols_b, tl.sum(gate_sum_b, axis=0), mask=in_b)
        if NORM:
            tl.store(out + D + cols_b, tl.sum(shift_sum_b, axis=0), mask=in_b)
            tl.store(out + 2 * D + cols_b, tl.sum(scale_sum_b, axis=0), mask=in_b)
        if BIAS:
            tl.store(out + (SUMS - 1) * D + cols_b, tl.sum(dx_sum_b, axis=0), mask=in_b)


def launch_forward(
    x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None, modulation: tuple[Tensor, Tensor] | None,
    x_out: Tensor, h: Tensor | None, stats: Tensor | None, eps: float, rms: bool,
) -> None:  # fmt: skip
    n, t, d = x.shape
    a, b = split_columns(d)
    rows = rows_per_program(n, t, programs=2048, most=32)
    chunks = cdiv(t, rows)
    shift, scale = modulation or (None, None)
    with on_device(x):
        wrap_triton(_gate_residual_adaln_forward)[(n * chunks,)](
            x, branch, gate, bias, shift, scale, x_out, h, stats, t, chunks, *x.stride()[:2], *branch.stride()[:2],
            gate.stride(0), 0 if shift is None else shift.stride(0), 0 if scale is None else scale.stride(0),
            EPS=eps, NORM=int(h is not None), RMS=rms, BIAS=int(bias is not None), D=d, A=a, B=b,
            STEPS=rows // FORWARD["ROWS"], **FORWARD, num_warps=warps_for(a),
        )  # fmt: skip


def launch_backward(
    d_out: Tensor | None, d_h: Tensor | None, x_out: Tensor | None, branch: Tensor, gate: Tensor, scale: Tensor | None,
    stats: Tensor | None, d_x: Tensor | None, d_branch: Tensor, has_bias: bool, rms: bool,
) -> Tensor:  # fmt: skip
    n, t, d = branch.shape
    rows = rows_per_program(n, t, programs=512, most=128)
    chunks = cdiv(t, rows)
    norm = d_x is not None
    partial = torch.empty((n, chunks, 1 + 2 * norm + has_bias, d), dtype=torch.float32, device=branch.device)
    if branch.numel():
        a, b = split_columns(d)
        strides = [s for v in (d_out, d_h, x_out, branch) for s in ((0, 0) if v is None else v.stride()[:2])]
        with on_device(branch):
            wrap_triton(_gate_residual_adaln_backward)[(n * chunks,)](
                d_out, d_h, x_out, branch, gate, scale, stats, d_x, d_branch, partial, t, chunks, *strides,
                gate.stride(0), 0 if scale is None else scale.stride(0),
                NORM=int(norm), RMS=rms, BIAS=int(has_bias), D_OUT=int(d_out is not None), D=d, A=a, B=b,
                STEPS=rows // BACKWARD["ROWS"], **(BACKWARD if b else BACKWARD_ONE_TILE), num_warps=warps_for(a),
            )  # fmt: skip
    return partial


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
    if x.numel():
        bias = None if bias is None else unit_stride(bias)
        launch_forward(x, branch, gate, bias, (shift, scale), x_out, h, stats, eps, rms)
    return x_out, h, stats


@triton_op("fastdit::gate_residual_adaln_backward")
def _op_backward(
    d_out: Tensor | None, d_h: Tensor, x_out: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, stats: Tensor,
    has_bias: bool, rms: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> d_x, d_branch (N, T, D) and the fp32 partial sums (N, chunks, 3 or 4, D): gate, shift, scale, d_x."""
    d_out = None if d_out is None else unit_stride(d_out)
    d_h, x_out, branch, gate, scale = (unit_stride(v) for v in (d_h, x_out, branch, gate, scale))
    d_x = torch.empty(x_out.shape, dtype=x_out.dtype, device=x_out.device)
    d_branch = torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
    partial = launch_backward(d_out, d_h, x_out, branch, gate, scale, stats, d_x, d_branch, has_bias, rms)
    return d_x, d_branch, partial


def finish(partial: Tensor, gate: Tensor, bias: Tensor | None, others: int) -> tuple[Tensor, list[Tensor], Any]:
    """d_gate, the further per-sample sums and d_bias: with d_x summed over tokens, d_bias = sum over n of gate d_x."""
    if bias is None:
        sums = sum_chunks(partial, gate.dtype).unbind(1)
        return sums[0], list(sums[1:]), None
    sums = sum_chunks(partial, torch.float32).unbind(1)
    d_gate = (sums[0] + bias * sums[-1]).to(gate.dtype)
    return d_gate, list(sums[1 : 1 + others]), (gate * sums[-1]).sum(0).to(bias.dtype)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, branch, gate, shift, scale, bias, _, ctx.rms = inputs
    ctx.set_materialize_grads(False)
    ctx.shift_dtype = shift.dtype
    ctx.save_for_backward(output[0], branch, gate, scale, bias, output[2])


def _grad(ctx: Any, d_out: Tensor | None, d_h: Tensor | None, _: None) -> tuple:
    x_out, branch, gate, scale, bias, stats = ctx.saved_tensors
    if d_h is None:
        d_h = torch.zeros_like(branch)
    d_x, d_branch, partial = _op_backward(d_out, d_h, x_out, branch, gate, scale, stats, bias is not None, ctx.rms)
    d_gate, (d_shift, d_scale), d_bias = finish(partial, gate, bias, 2)
    return d_x, d_branch, d_gate, d_shift.to(ctx.shift_dtype), d_scale.to(scale.dtype), d_bias, None, None


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

    x, branch (N, T, D); gate, shift, scale (N, D), any strides (chunks of a (N, 6D) projection are read in place);
    bias (D,) of the linear that made the branch, given here so that its gradient costs no further pass.
    ValueError where shapes or the norm's name do not fit.
    """
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is unknown; use one of {', '.join(NORMS)}")
    check("branch", branch, *x.shape)
    for name, vector in (("gate", gate), ("shift", shift), ("scale", scale)):
        check(name, vector, x.shape[0], x.shape[2])
    if bias is not None:
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


OP = Op(
    "gate_residual_adaln", gate_residual_adaln_eager, gate_residual_adaln_triton, gate_residual_adaln, inputs,
    tiny=(2, 3, 5), shapes=((3, 41, 72), (1, 64, 384), (3, 41, 1152)),
    real=((256, 256, 384), (256, 256, 768), (256, 256, 1024), (256, 256, 1152)),
    minimum_bytes=minimum_bytes,
)  # fmt: skip
