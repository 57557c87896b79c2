"""attention for short sequences: softmax(scale q k^T) v, non-causal, T <= 1024, heads narrower than a power of two.

A head of 72 is 64 + 16 columns here, two products in place of one padded to 128. The forward pass is that of Dao 2023
(online softmax, base 2); the backward pass recomputes the scores, once for d_k and d_v and once for d_q, so that every
sum has one owner: no atomics, the same bits every time. `model.attention=triton` runs it; `auto` does where it was
measured to be the fastest.
"""

import math
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
    split_columns,
    tl,
    triton,
    triton_op,
    unit_stride,
    use_triton,
    wrap_triton,
)

LONGEST = 1024
# fp32 operands take twice the shared memory
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


@triton.jit
def _load(base, rows, stride: tl.constexpr, cols, T: tl.constexpr, D: tl.constexpr):
    mask = (rows < T)[:, None] & (cols < D)[None, :]
    return tl.load(base + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _store(base, rows, stride: tl.constexpr, cols, T: tl.constexpr, D: tl.constexpr, tile):
    mask = (rows < T)[:, None] & (cols < D)[None, :]
    tl.store(base + rows[:, None] * stride + cols[None, :], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _attention_forward(
    q, k, v, out, lse, q_n, k_n, v_n, q_h: tl.constexpr, k_h: tl.constexpr, v_h: tl.constexpr,
    q_t: tl.constexpr, k_t: tl.constexpr, v_t: tl.constexpr,
    SCALE: tl.constexpr, H: tl.constexpr, T: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (T + BLOCK_M - 1) // BLOCK_M
    n = (tl.program_id(0) // (H * blocks)).to(tl.int64)
    head = tl.program_id(0) // blocks % H
    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    cols_a = tl.arange(0, A)
    q += n * q_n + head * q_h
    k += n * k_n + head * k_h
    v += n * v_n + head * v_h
    q_a = _load(q, rows, q_t, cols_a, T, D)
    acc_a = tl.zeros([BLOCK_M, A], tl.float32)
    if B > 0:
        cols_b = A + tl.arange(0, B)
        q_b = _load(q, rows, q_t, cols_b, T, D)
        acc_b = tl.zeros([BLOCK_M, B], tl.float32)
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(0, T, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k_a = _load(k, keys, k_t, cols_a, T, D)
        scores = tl.dot(q_a, tl.trans(k_a), input_precision="ieee")
        if B > 0:
            k_b = _load(k, keys, k_t, cols_b, T, D)
            scores = tl.dot(q_b, tl.trans(k_b), scores, input_precision="ieee")
        scores *= SCALE * 1.4426950408889634  # powers of 2
        if T % BLOCK_N:
            scores = tl.where((keys < T)[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, axis=1))
        fade = tl.exp2(most - higher)
        p = tl.exp2(scores - higher[:, None])
        most = higher
        total = total * fade + tl.sum(p, axis=1)
        p = p.to(v.dtype.element_ty)
        acc_a = tl.dot(p, _load(v, keys, v_t, cols_a, T, D), acc_a * fade[:, None], input_precision="ieee")
        if B > 0:
            acc_b = tl.dot(p, _load(v, keys, v_t, cols_b, T, D), acc_b * fade[:, None], input_precision="ieee")
    out += (n * T * H + head) * D
    _store(out, rows, H * D, cols_a, T, D, acc_a / total[:, None])
    if B > 0:
        _store(out, rows, H * D, cols_b, T, D, acc_b / total[:, None])
    tl.store(lse + (n * H + head) * T + rows, most + tl.log2(total), mask=rows < T)


@triton.jit
def _attention_backward_q(
    d_out, q, k, v, out, lse, delta, d_qkv, do_n, q_n, k_n, v_n,
    do_h: tl.constexpr, q_h: tl.constexpr, k_h: tl.constexpr, v_h: tl.constexpr,
    do_t: tl.constexpr, q_t: tl.constexpr, k_t: tl.constexpr, v_t: tl.constexpr,
    SCALE: tl.constexpr, H: tl.constexpr, T: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (T + BLOCK_M - 1) // BLOCK_M
    n = (tl.program_id(0) // (H * blocks)).to(tl.int64)
    head = tl.program_id(0) // blocks % H
    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    cols_a = tl.arange(0, A)
    q += n * q_n + head * q_h
    k += n * k_n + head * k_h
    v += n * v_n + head * v_h
    d_out += n * do_n + head * do_h
    out += (n * T * H + head) * D
    d_qkv += (n * T * 3 * H + head) * D
    stats = (n * H + head) * T + rows
    q_a = _load(q, rows, q_t, cols_a, T, D)
    do_a = _load(d_out, rows, do_t, cols_a, T, D)
    total = tl.sum(do_a.to(tl.float32) * _load(out, rows, H * D, cols_a, T, D).to(tl.float32), axis=1)
    dq_a = tl.zeros([BLOCK_M, A], tl.float32)
    if B > 0:
        cols_b = A + tl.arange(0, B)
        q_b = _load(q, rows, q_t, cols_b, T, D)
        do_b = _load(d_out, rows, do_t, cols_b, T, D)
        total += tl.sum(do_b.to(tl.float32) * _load(out, rows, H * D, cols_b, T, D).to(tl.float32), axis=1)
        dq_b = tl.zeros([BLOCK_M, B], tl.float32)
    tl.store(delta + stats, total, mask=rows < T)
    level = tl.load(lse + stats, mask=rows < T, other=float("inf"))
    for start in tl.range(0, T, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k_a = _load(k, keys, k_t, cols_a, T, D)
        s = tl.dot(q_a, tl.trans(k_a), input_precision="ieee")
        dp = tl.dot(do_a, tl.trans(_load(v, keys, v_t, cols_a, T, D)), input_precision="ieee")
        if B > 0:
            k_b = _load(k, keys, k_t, cols_b, T, D)
            s = tl.dot(q_b, tl.trans(k_b), s, input_precision="ieee")
            dp = tl.dot(do_b, tl.trans(_load(v, keys, v_t, cols_b, T, D)), dp, input_precision="ieee")
        p = tl.exp2(s * (SCALE * 1.4426950408889634) - level[:, None])
        if T % BLOCK_N:
            p = tl.where((keys < T)[None, :], p, 0.0)  # 2^(0 - level) may overflow there
        ds = (p * (dp - total[:, None])).to(k.dtype.element_ty)
        dq_a = tl.dot(ds, k_a, dq_a, input_precision="ieee")
        if B > 0:
            dq_b = tl.dot(ds, k_b, dq_b, input_precision="ieee")
    _store(d_qkv, rows, 3 * H * D, cols_a, T, D, dq_a * SCALE)
    if B > 0:
        _store(d_qkv, rows, 3 * H * D, cols_b, T, D, dq_b * SCALE)


@triton.jit
def _attention_backward_kv(
    d_out, q, k, v, lse, delta, d_qkv, do_n, q_n, k_n, v_n,
    do_h: tl.constexpr, q_h: tl.constexpr, k_h: tl.constexpr, v_h: tl.constexpr,
    do_t: tl.constexpr, q_t: tl.constexpr, k_t: tl.constexpr, v_t: tl.constexpr,
    SCALE: tl.constexpr, H: tl.constexpr, T: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (T + BLOCK_M - 1) // BLOCK_M
    n = (tl.program_id(0) // (H * blocks)).to(tl.int64)
    head = tl.program_id(0) // blocks % H
    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)  # keys; scores are (keys, queries) here
    cols_a = tl.arange(0, A)
    q += n * q_n + head * q_h
    k += n * k_n + head * k_h
    v += n * v_n + head * v_h
    d_out += n * do_n + head * do_h
    d_qkv += (n * T * 3 * H + head) * D
    stats = (n * H + head) * T
    k_a = _load(k, rows, k_t, cols_a, T, D)
    v_a = _load(v, rows, v_t, cols_a, T, D)
    dk_a = tl.zeros([BLOCK_M, A], tl.float32)
    dv_a = tl.zeros([BLOCK_M, A], tl.float32)
    if B > 0:
        cols_b = A + tl.arange(0, B)
        k_b = _load(k, rows, k_t, cols_b, T, D)
        v_b = _load(v, rows, v_t, cols_b, T, D)
        dk_b = tl.zeros([BLOCK_M, B], tl.float32)
        dv_b = tl.zeros([BLOCK_M, B], tl.float32)
    for start in tl.range(0, T, BLOCK_N):
        queries = start + tl.arange(0, BLOCK_N)
        q_a = _load(q, queries, q_t, cols_a, T, D)
        do_a = _load(d_out, queries, do_t, cols_a, T, D)
        s = tl.dot(k_a, tl.trans(q_a), input_precision="ieee")
        dp = tl.dot(v_a, tl.trans(do_a), input_precision="ieee")
        if B > 0:
            q_b = _load(q, queries, q_t, cols_b, T, D)
            do_b = _load(d_out, queries, do_t, cols_b, T, D)
            s = tl.dot(k_b, tl.trans(q_b), s, input_precision="ieee")
            dp = tl.dot(v_b, tl.trans(do_b), dp, input_precision="ieee")
        # no query past the end: its probability is 2^-inf
        level = tl.load(lse + stats + queries, mask=queries < T, other=float("inf"))
        total = tl.load(delta + stats + queries, mask=queries < T, other=0.0)
        p = tl.exp2(s * (SCALE * 1.4426950408889634) - level[None, :])
        ds = (p * (dp - total[None, :])).to(q.dtype.element_ty)
        p = p.to(d_out.dtype.element_ty)
        dv_a = tl.dot(p, do_a, dv_a, input_precision="ieee")
        dk_a = tl.dot(ds, q_a, dk_a, input_precision="ieee")
        if B > 0:
            dv_b = tl.dot(p, do_b, dv_b, input_precision="ieee")
            dk_b = tl.dot(ds, q_b, dk_b, input_precision="ieee")
    _store(d_qkv + H * D, rows, 3 * H * D, cols_a, T, D, dk_a * SCALE)
    _store(d_qkv + 2 * H * D, rows, 3 * H * D, cols_a, T, D, dv_a)
    if B > 0:
        _store(d_qkv + H * D, rows, 3 * H * D, cols_b, T, D, dk_b * SCALE)
        _store(d_qkv + 2 * H * D, rows, 3 * H * D, cols_b, T, D, dv_b)


def _columns(d: int) -> dict[str, int]:
    a, b = split_columns(max(d, 16))
    return {"D": d, "A": a, "B": max(b, 16) if b else 0}


def _block(most: int, t: int) -> int:
    """A power of two, no longer than the sequence needs."""
    return min(most, max(16, 1 << (t - 1).bit_length()))


def _launch_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q, k, v (N, H, T, D) in any strides but the last -> out (N, T, H, D) and the scores' (N, H, T) log2-sum-exp2."""
    n, h, t, d = q.shape
    out = torch.empty((n, t, h, d), dtype=q.dtype, device=q.device)
    lse = torch.empty((n, h, t), dtype=torch.float32, device=q.device)
    if q.numel():
        config = dict(FORWARD[q.dtype.itemsize])
        config |= {key: _block(config[key], t) for key in ("BLOCK_M", "BLOCK_N")}
        strides = [x.stride(dim) for dim in range(3) for x in (q, k, v)]
        with on_device(q):
            wrap_triton(_attention_forward)[(cdiv(t, config["BLOCK_M"]) * n * h,)](
                q, k, v, out, lse, *strides,
                SCALE=scale, H=h, T=t, **_columns(d), **config,
            )  # fmt: skip
    return out, lse


@triton_op("fastdit::attention")
def _op(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _launch_forward(unit_stride(q), unit_stride(k), unit_stride(v), scale)


@triton_op("fastdit::attention_packed")
def _op_packed(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = unit_stride(qkv).permute(2, 0, 3, 1, 4).unbind()
    return _launch_forward(q, k, v, scale)


@triton_op("fastdit::attention_backward")
def _op_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Tensor:  # fmt: skip
    """d_out, out (N, T, H, D), q, k, v (N, H, T, D) -> d_qkv (N, T, 3, H, D)."""
    d_out, q, k, v = (unit_stride(x) for x in (d_out, q, k, v))
    n, h, t, d = q.shape
    d_qkv = torch.empty((n, t, 3, h, d), dtype=q.dtype, device=q.device)
    if q.numel():
        delta = torch.empty((n, h, t), dtype=torch.float32, device=q.device)  # per query: sum of out d_out
        by_head = d_out.transpose(1, 2)
        strides = [x.stride(dim) for dim in range(3) for x in (by_head, q, k, v)]
        sizes = {"SCALE": scale, "H": h, "T": t, **_columns(d)}
        queries, keys = (
            config | {key: _block(config[key], t) for key in ("BLOCK_M", "BLOCK_N")}
            for config in (BACKWARD_Q[q.dtype.itemsize], BACKWARD_KV[q.dtype.itemsize])
        )
        with on_device(q):
            wrap_triton(_attention_backward_q)[(cdiv(t, queries["BLOCK_M"]) * n * h,)](
                d_out, q, k, v, out, lse, delta, d_qkv, *strides, **sizes, **queries
            )
            wrap_triton(_attention_backward_kv)[(cdiv(t, keys["BLOCK_M"]) * n * h,)](
                d_out, q, k, v, lse, delta, d_qkv, *strides, **sizes, **keys
            )
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


def attention_triton(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    return _op(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)[0].transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v: q, k, v (N, H, T, D) -> (N, H, T, D), stored token-major; scale 1 / sqrt(D) unless given.

    Where the kernel does not apply (see FASTDIT_KERNELS) this is PyTorch's scaled_dot_product_attention.
    ValueError where shapes differ or T exceeds 1024.
    """
    check("k", k, *q.shape)
    check("v", v, *q.shape)
    if q.shape[2] > LONGEST:
        raise ValueError(f"T={q.shape[2]} is past the {LONGEST} tokens that this kernel is for; use SDPA")
    if use_triton("attention", q.device.type, q.dtype):
        return attention_triton(q, k, v, scale)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def attention_packed_triton(qkv: Tensor, scale: float | None = None) -> Tensor:
    return _op_packed(qkv, qkv.shape[-1] ** -0.5 if scale is None else scale)[0]


def attention_packed_eager(qkv: Tensor, scale: float | None = None) -> Tensor:
    """The definition."""
    return attention_eager(*qkv.permute(2, 0, 3, 1, 4), scale).transpose(1, 2)


def attention_packed(qkv: Tensor, scale: float | None = None) -> Tensor:
    """The same from the packed projection, whose gradient comes packed too: qkv (N, T, 3, H, D) -> (N, T, H, D)."""
    check("qkv", qkv, *qkv.shape[:2], 3, *qkv.shape[3:])
    if qkv.shape[1] > LONGEST:
        raise ValueError(f"T={qkv.shape[1]} is past the {LONGEST} tokens that this kernel is for; use SDPA")
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
    minimum_bytes=minimum_bytes,
)  # fmt: skip
ATTENTION_PACKED = Op(
    "attention_packed", attention_packed_eager, attention_packed_triton, attention_packed, packed_inputs,
    tiny=(1, 2, 3, 8), shapes=((2, 2, 41, 72), (1, 1, 256, 72)), real=((256, 16, 256, 72),),
    minimum_bytes=minimum_bytes,
)  # fmt: skip
