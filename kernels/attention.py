"""attention for short sequences: softmax(scale q k^T) v, non-causal, T <= 1024, also for head sizes such as 72.

A head of 72 is 64 + 16 columns: two products instead of one padded to 128. The forward pass follows Dao 2023 (online
softmax, base 2). The backward pass recomputes the scores twice, for d_k and d_v and for d_q, so that one program owns
each sum: no atomics, so results are deterministic. `model.attention=triton` selects it; `auto` selects it where it was
measured to be fastest.
"""

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .runtime import Op, cdiv, check, random_inputs, tl, triton, triton_op, unit_stride, use_triton, wrap_triton
from .tiles import split_columns

LONGEST = 1024
# By itemsize: fp32 operands take twice the shared memory.
FORWARD = {2: {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
           4: {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}}  # fmt: skip
BACKWARD_Q = {2: {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
              4: {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}}  # fmt: skip
BACKWARD_KV = {2: {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
               4: {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}}  # fmt: skip


def attention_eager(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """The definition."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q * scale) @ k.transpose(-2, -1)  # (N, H, T, T)
    return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype) @ v


# The D columns of a head are two tiles, a (A wide) and b (B wide, absent if B = 0), as in tiles.py.


@triton.jit
def _load(base, rows, stride: tl.constexpr, T: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Both tiles of these rows, in their own dtype; 0 at or past T and D."""
    cols = tl.arange(0, A)
    mask = (rows < T)[:, None] & (cols < D)[None, :]
    a = tl.load(base + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)
    b = a
    if B > 0:
        cols = A + tl.arange(0, B)
        mask = (rows < T)[:, None] & (cols < D)[None, :]
        b = tl.load(base + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)
    return a, b


@triton.jit
def _store(base, rows, stride: tl.constexpr, a, b, T: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    cols = tl.arange(0, A)
    mask = (rows < T)[:, None] & (cols < D)[None, :]
    tl.store(base + rows[:, None] * stride + cols[None, :], a.to(base.dtype.element_ty), mask=mask)
    if B > 0:
        cols = A + tl.arange(0, B)
        mask = (rows < T)[:, None] & (cols < D)[None, :]
        tl.store(base + rows[:, None] * stride + cols[None, :], b.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _zeros(ROWS: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    a = tl.zeros([ROWS, A], tl.float32)
    b = a
    if B > 0:
        b = tl.zeros([ROWS, B], tl.float32)
    return a, b


@triton.jit
def _products(x_a, x_b, y_a, y_b, B: tl.constexpr):
    """x y^T, over the columns of both tiles."""
    out = tl.dot(x_a, tl.trans(y_a), input_precision="ieee")
    if B > 0:
        out = tl.dot(x_b, tl.trans(y_b), out, input_precision="ieee")
    return out


@triton.jit
def _accumulate(sum_a, sum_b, p, x_a, x_b, B: tl.constexpr):
    """sum + p x, both tiles."""
    sum_a = tl.dot(p, x_a, sum_a, input_precision="ieee")
    if B > 0:
        sum_b = tl.dot(p, x_b, sum_b, input_precision="ieee")
    return sum_a, sum_b


@triton.jit
def _block_of(H: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):
    """This program's sample, head and rows."""
    blocks: tl.constexpr = (T + BLOCK - 1) // BLOCK
    n = (tl.program_id(0) // (H * blocks)).to(tl.int64)
    return n, tl.program_id(0) // blocks % H, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _attention_forward(
    q, k, v, out, lse, q_n, k_n, v_n, q_h: tl.constexpr, k_h: tl.constexpr, v_h: tl.constexpr,
    q_t: tl.constexpr, k_t: tl.constexpr, v_t: tl.constexpr,
    SCALE: tl.constexpr, H: tl.constexpr, T: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n, head, rows = _block_of(H, T, BLOCK_M)
    q += n * q_n + head * q_h
    k += n * k_n + head * k_h
    v += n * v_n + head * v_h
    q_a, q_b = _load(q, rows, q_t, T, D, A, B)
    sum_a, sum_b = _zeros(BLOCK_M, A, B)
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(0, T, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k_a, k_b = _load(k, keys, k_t, T, D, A, B)
        scores = _products(q_a, q_b, k_a, k_b, B) * (SCALE * 1.4426950408889634)  # powers of 2
        if T % BLOCK_N:
            scores = tl.where((keys < T)[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, axis=1))
        fade = tl.exp2(most - higher)
        p = tl.exp2(scores - higher[:, None])
        most = higher
        total = total * fade + tl.sum(p, axis=1)
        v_a, v_b = _load(v, keys, v_t, T, D, A, B)
        p = p.to(v.dtype.element_ty)
        sum_a, sum_b = _accumulate(sum_a * fade[:, None], sum_b * fade[:, None], p, v_a, v_b, B)
    out += (n * T * H + head) * D
    _store(out, rows, H * D, sum_a / total[:, None], sum_b / total[:, None], T, D, A, B)
    tl.store(lse + (n * H + head) * T + rows, most + tl.log2(total), mask=rows < T)


@triton.jit
def _attention_backward_q(
    d_out, q, k, v, out, lse, delta, d_qkv, do_n, q_n, k_n, v_n,
    do_h: tl.constexpr, q_h: tl.constexpr, k_h: tl.constexpr, v_h: tl.constexpr,
    do_t: tl.constexpr, q_t: tl.constexpr, k_t: tl.constexpr, v_t: tl.constexpr,
    SCALE: tl.constexpr, H: tl.constexpr, T: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n, head, rows = _block_of(H, T, BLOCK_M)
    q += n * q_n + head * q_h
    k += n * k_n + head * k_h
    v += n * v_n + head * v_h
    d_out += n * do_n + head * do_h
    out += (n * T * H + head) * D
    d_qkv += (n * T * 3 * H + head) * D
    stats = (n * H + head) * T + rows
    q_a, q_b = _load(q, rows, q_t, T, D, A, B)
    do_a, do_b = _load(d_out, rows, do_t, T, D, A, B)
    out_a, out_b = _load(out, rows, H * D, T, D, A, B)
    total = tl.sum(do_a.to(tl.float32) * out_a.to(tl.float32), axis=1)
    if B > 0:
        total += tl.sum(do_b.to(tl.float32) * out_b.to(tl.float32), axis=1)
    dq_a, dq_b = _zeros(BLOCK_M, A, B)
    tl.store(delta + stats, total, mask=rows < T)
    level = tl.load(lse + stats, mask=rows < T, other=float("inf"))
    for start in tl.range(0, T, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k_a, k_b = _load(k, keys, k_t, T, D, A, B)
        v_a, v_b = _load(v, keys, v_t, T, D, A, B)
        scores = _products(q_a, q_b, k_a, k_b, B)
        dp = _products(do_a, do_b, v_a, v_b, B)
        p = tl.exp2(scores * (SCALE * 1.4426950408889634) - level[:, None])
        if T % BLOCK_N:
            p = tl.where((keys < T)[None, :], p, 0.0)  # 2^(0 - level) may overflow there
        ds = (p * (dp - total[:, None])).to(k.dtype.element_ty)
        dq_a, dq_b = _accumulate(dq_a, dq_b, ds, k_a, k_b, B)
    _store(d_qkv, rows, 3 * H * D, dq_a * SCALE, dq_b * SCALE, T, D, A, B)


@triton.jit
def _attention_backward_kv(
    d_out, q, k, v, lse, delta, d_qkv, do_n, q_n, k_n, v_n,
    do_h: tl.constexpr, q_h: tl.constexpr, k_h: tl.constexpr, v_h: tl.constexpr,
    do_t: tl.constexpr, q_t: tl.constexpr, k_t: tl.constexpr, v_t: tl.constexpr,
    SCALE: tl.constexpr, H: tl.constexpr, T: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n, head, rows = _block_of(H, T, BLOCK_M)  # rows are keys; scores are (keys, queries) here
    q += n * q_n + head * q_h
    k += n * k_n + head * k_h
    v += n * v_n + head * v_h
    d_out += n * do_n + head * do_h
    d_qkv += (n * T * 3 * H + head) * D
    stats = (n * H + head) * T
    k_a, k_b = _load(k, rows, k_t, T, D, A, B)
    v_a, v_b = _load(v, rows, v_t, T, D, A, B)
    dk_a, dk_b = _zeros(BLOCK_M, A, B)
    dv_a, dv_b = _zeros(BLOCK_M, A, B)
    for start in tl.range(0, T, BLOCK_N):
        queries = start + tl.arange(0, BLOCK_N)
        q_a, q_b = _load(q, queries, q_t, T, D, A, B)
        do_a, do_b = _load(d_out, queries, do_t, T, D, A, B)
        scores = _products(k_a, k_b, q_a, q_b, B)
        dp = _products(v_a, v_b, do_a, do_b, B)
        # a query at or past T has probability 2^-inf = 0
        level = tl.load(lse + stats + queries, mask=queries < T, other=float("inf"))
        total = tl.load(delta + stats + queries, mask=queries < T, other=0.0)
        p = tl.exp2(scores * (SCALE * 1.4426950408889634) - level[None, :])
        ds = (p * (dp - total[None, :])).to(q.dtype.element_ty)
        dv_a, dv_b = _accumulate(dv_a, dv_b, p.to(d_out.dtype.element_ty), do_a, do_b, B)
        dk_a, dk_b = _accumulate(dk_a, dk_b, ds, q_a, q_b, B)
    _store(d_qkv + H * D, rows, 3 * H * D, dk_a * SCALE, dk_b * SCALE, T, D, A, B)
    _store(d_qkv + 2 * H * D, rows, 3 * H * D, dv_a, dv_b, T, D, A, B)


def _constants(q: Tensor, scale: float) -> dict[str, Any]:
    """The constants of all three kernels, for q (N, H, T, D)."""
    _, h, t, d = q.shape
    a, b = split_columns(max(d, 16))
    return {"SCALE": scale, "H": h, "T": t, "D": d, "A": a, "B": max(b, 16) if b else 0}


def _blocks(config: dict[int, dict[str, int]], q: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Grid and launch options; blocks are powers of two, no longer than the sequence needs."""
    n, h, t, _ = q.shape
    config = dict(config[q.dtype.itemsize])
    config |= {key: min(config[key], max(16, 1 << (t - 1).bit_length())) for key in ("BLOCK_M", "BLOCK_N")}
    return (cdiv(t, config["BLOCK_M"]) * n * h,), config


def _launch_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q, k, v (N, H, T, D) -> out (N, T, H, D) and the log2-sum-exp2 of the scores, (N, H, T) fp32."""
    n, h, t, d = q.shape
    out = torch.empty((n, t, h, d), dtype=q.dtype, device=q.device)
    lse = torch.empty((n, h, t), dtype=torch.float32, device=q.device)
    grid, config = _blocks(FORWARD, q)
    strides = [x.stride(dim) for dim in range(3) for x in (q, k, v)]
    wrap_triton(_attention_forward)[grid](q, k, v, out, lse, *strides, **_constants(q, scale), **config)
    return out, lse


@triton_op("fastdit::attention")
def _op(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _launch_forward(unit_stride(q), unit_stride(k), unit_stride(v), scale)


@triton_op("fastdit::attention_packed")
def _op_packed(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = unit_stride(qkv).permute(2, 0, 3, 1, 4).unbind()
    return _launch_forward(q, k, v, scale)


@triton_op("fastdit::attention_backward")
def _op_backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    """d_out, out (N, T, H, D), q, k, v (N, H, T, D) -> d_qkv (N, T, 3, H, D)."""
    d_out, q, k, v = (unit_stride(x) for x in (d_out, q, k, v))
    n, h, t, d = q.shape
    d_qkv = torch.empty((n, t, 3, h, d), dtype=q.dtype, device=q.device)
    delta = torch.empty((n, h, t), dtype=torch.float32, device=q.device)  # per query: sum of out d_out
    strides = [x.stride(dim) for dim in range(3) for x in (d_out.transpose(1, 2), q, k, v)]
    constants = _constants(q, scale)
    grid, config = _blocks(BACKWARD_Q, q)
    wrap_triton(_attention_backward_q)[grid](d_out, q, k, v, out, lse, delta, d_qkv, *strides, **constants, **config)
    grid, config = _blocks(BACKWARD_KV, q)
    wrap_triton(_attention_backward_kv)[grid](d_out, q, k, v, lse, delta, d_qkv, *strides, **constants, **config)
    return d_qkv


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _grad(ctx: Any, d_out: Tensor, _: None) -> tuple:
    q, k, v, out, lse = ctx.saved_tensors
    d_q, d_k, d_v = _op_backward(d_out, q, k, v, out, lse, ctx.scale).permute(2, 0, 3, 1, 4).unbind()
    return d_q, d_k, d_v, None


def _grad_packed(ctx: Any, d_out: Tensor, _: None) -> tuple:
    qkv, out, lse = ctx.saved_tensors
    return _op_backward(d_out, *qkv.permute(2, 0, 3, 1, 4).unbind(), out, lse, ctx.scale), None


_op.register_autograd(_grad, setup_context=_setup)
_op_packed.register_autograd(_grad_packed, setup_context=_setup)


def _check_length(t: int) -> None:
    if t > LONGEST:
        raise ValueError(f"T={t} exceeds {LONGEST}, the longest sequence of this kernel; use SDPA")


def attention_triton(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    return _op(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)[0].transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v: q, k, v (N, H, T, D) -> (N, H, T, D), stored token-major; scale defaults to 1 / sqrt(D).

    Where Triton is not used (see FASTDIT_KERNELS) this is PyTorch's scaled_dot_product_attention.
    ValueError if the shapes differ or T exceeds 1024.
    """
    check("k", k, *q.shape)
    check("v", v, *q.shape)
    _check_length(q.shape[2])
    if use_triton("attention", q.device.type, q.dtype):
        return attention_triton(q, k, v, scale)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def attention_packed_triton(qkv: Tensor, scale: float | None = None) -> Tensor:
    return _op_packed(qkv, qkv.shape[-1] ** -0.5 if scale is None else scale)[0]


def attention_packed_eager(qkv: Tensor, scale: float | None = None) -> Tensor:
    """The definition."""
    return attention_eager(*qkv.permute(2, 0, 3, 1, 4), scale).transpose(1, 2)


def attention_packed(qkv: Tensor, scale: float | None = None) -> Tensor:
    """`attention` on the packed projection, with a packed gradient: qkv (N, T, 3, H, D) -> (N, T, H, D)."""
    check("qkv", qkv, *qkv.shape[:2], 3, *qkv.shape[3:])
    _check_length(qkv.shape[1])
    if use_triton("attention_packed", qkv.device.type, qkv.dtype):
        return attention_packed_triton(qkv, scale)
    return F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), scale=scale).transpose(1, 2)


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    n, h, t, d = shape
    return random_inputs(seed, dtype, device, q=shape, k=shape, v=shape)


def packed_inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    n, h, t, d = shape
    return random_inputs(seed, dtype, device, qkv=(n, t, 3, h, d))


def minimum_bytes(shape: tuple[int, int, int, int], size: int) -> tuple[int, int]:
    tensor, stats = math.prod(shape) * size, math.prod(shape[:3]) * 4
    return 4 * tensor + stats, 8 * tensor + stats


ATTENTION = Op(
    "attention", attention_eager, attention_triton, attention, inputs,
    tiny=(1, 2, 3, 8), shapes=((2, 2, 41, 72), (1, 1, 64, 64)), real=((256, 16, 256, 64), (256, 16, 256, 72)),
    minimum_bytes=minimum_bytes, most_bytes=4,  # keys and values are read once per block of queries, from the L2 cache
    writes=(("out", "lse"), ("delta", "d_qkv"), ("d_qkv",)), variants=({"scale": 0.3},),
)  # fmt: skip
ATTENTION_PACKED = dataclasses.replace(
    ATTENTION, name="attention_packed", eager=attention_packed_eager, triton=attention_packed_triton,
    public=attention_packed, inputs=packed_inputs, shapes=((2, 2, 41, 72), (1, 1, 96, 72)), real=((256, 16, 256, 72),),
)  # fmt: skip
