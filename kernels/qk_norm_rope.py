"""qk_norm_rope: RMS- or LayerNorm of each head's query and key, then 2-D rotary positions, from the packed projection.

Forward reads q and k where the linear left them, (N, T, 3, H, D), and writes them once, in the order attention reads; v
stays in place, a view. Backward writes the packed gradient, v's part with it, so nothing is concatenated or transposed.
Query-key norm: Dehghani et al. 2023; rotary positions: Su et al. 2021, pairs (2i, 2i + 1), half of them for each axis.
"""

from typing import Any

import torch
from torch import Tensor

from .adaln import NORMS
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
    use_triton,
    wrap_triton,
)
from .tiles import load, load_columns, store, sum_chunks

STAGES = 3


def rope_2d(height: int, width: int, head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """cos and sin (height * width, head_dim / 2), fp32: half of the pairs turn with the row, half with the column."""
    if head_dim % 4:
        raise ValueError(f"head_dim={head_dim} cannot be halved into pairs for two axes; use a multiple of 4")
    omega = theta ** (-torch.arange(head_dim // 4, dtype=torch.float64) / (head_dim // 4))
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = torch.cat([position.flatten()[:, None] * omega for position in (row, column)], dim=1)
    return angles.cos().float(), angles.sin().float()


def qk_norm_rope_eager(
    qkv: Tensor, q_weight: Tensor | None = None, k_weight: Tensor | None = None, cos: Tensor | None = None,
    sin: Tensor | None = None, eps: float = 1e-6, norm: str = "rms",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The definition."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (N, H, T, D) each

    def one(x: Tensor, weight: Tensor | None) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if norm == "layer":
            x = x - x.mean(-1, keepdim=True)
        x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        if weight is not None:
            x = x * weight
        if cos is not None:
            even, odd = x[..., ::2], x[..., 1::2]
            x = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
        return x.to(qkv.dtype)

    return one(q, q_weight), one(k, k_weight), v


@triton.jit
def _exchange(v, ROWS: tl.constexpr):
    """A value per row, on to the other tile without its layout (see tiles.py)."""
    return tl.gather(v, tl.arange(0, ROWS), axis=0)


@triton.jit
def _turn(x, c, s, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rotate the pairs of (ROWS, COLS) by the angles of c, s (COLS / 2,)."""
    even, odd = tl.split(tl.reshape(x, [ROWS, COLS // 2, 2]))
    turned = tl.join(even * c[None, :] - odd * s[None, :], even * s[None, :] + odd * c[None, :])
    return tl.reshape(turned, [ROWS, COLS])


@triton.jit
def _normed(base, rows, cols_a, cols_b, in_a, in_b, EPS: tl.constexpr, RMS: tl.constexpr, D: tl.constexpr,
            B: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """xhat of both tiles and 1 / deviation; b's stand for nothing where B is 0."""
    a = load(base, rows, D, cols_a, in_a)
    b = a
    mean = tl.sum(a, axis=1)
    if B > 0:
        b = load(base, rows, D, cols_b, in_b)
        mean += _exchange(tl.sum(b, axis=1), ROWS)
    if RMS:
        mean *= 0.0
    mean *= 1.0 / D
    a -= mean[:, None]
    square = tl.sum(a * a, axis=1)
    if B > 0:
        b = tl.where(in_b, b - _exchange(mean, ROWS)[:, None], 0.0)
        square += _exchange(tl.sum(b * b, axis=1), ROWS)
    r = 1.0 / tl.sqrt(square * (1.0 / D) + EPS)
    if B > 0:
        b *= _exchange(r, ROWS)[:, None]
    return a * r[:, None], b, r


@triton.jit
def _qk_norm_rope_forward(
    qkv, q_weight, k_weight, cos, sin, q, k, T, chunks, qkv_n, qkv_t: tl.constexpr, qkv_s: tl.constexpr,
    EPS: tl.constexpr, RMS: tl.constexpr, WEIGHT: tl.constexpr, ROPE: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * TOKENS
    rows = tl.arange(0, ROWS)  # heads
    cols_a = tl.arange(0, A)
    half_a = tl.arange(0, A // 2)
    BB: tl.constexpr = B if B > 0 else 2
    cols_b = A + tl.arange(0, BB)
    half_b = A // 2 + tl.arange(0, BB // 2)
    for step in tl.range(TOKENS, num_stages=STAGES):
        t = first + step
        in_a = (rows < tl.where(t < T, H, 0))[:, None]
        in_b = in_a & (cols_b < D)[None, :]
        if ROPE:
            pairs = tl.where(t < T, D // 2, 0)
            c_a = load_columns(cos + t * (D // 2), half_a, half_a < pairs)
            s_a = load_columns(sin + t * (D // 2), half_a, half_a < pairs)
            c_b = load_columns(cos + t * (D // 2), half_b, half_b < pairs)
            s_b = load_columns(sin + t * (D // 2), half_b, half_b < pairs)
        for which in tl.static_range(2):
            weight = q_weight if which == 0 else k_weight
            out = (q if which == 0 else k) + (n * T + t) * H * D
            base = qkv + n * qkv_n + t * qkv_t + which * qkv_s
            a, b, _ = _normed(base, rows, cols_a, cols_b, in_a, in_b, EPS, RMS, D, B, ROWS)
            if WEIGHT:
                a *= load_columns(weight, cols_a, cols_a < D)[None, :]
            if ROPE:
                a = _turn(a, c_a, s_a, ROWS, A)
            store(out, rows, D, cols_a, in_a, a)
            if B > 0:
                if WEIGHT:
                    b *= load_columns(weight, cols_b, cols_b < D)[None, :]
                if ROPE:
                    b = _turn(b, c_b, s_b, ROWS, B)
                store(out, rows, D, cols_b, in_b, b)


@triton.jit
def _qk_norm_rope_backward(
    d_q, d_k, d_v, qkv, q_weight, k_weight, cos, sin, d_qkv, partial, T, chunks,
    qkv_n, qkv_t: tl.constexpr, qkv_s: tl.constexpr,
    EPS: tl.constexpr, RMS: tl.constexpr, WEIGHT: tl.constexpr, ROPE: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * TOKENS
    rows = tl.arange(0, ROWS)
    cols_a = tl.arange(0, A)
    half_a = tl.arange(0, A // 2)
    BB: tl.constexpr = B if B > 0 else 2
    cols_b = A + tl.arange(0, BB)
    half_b = A // 2 + tl.arange(0, BB // 2)
    for which in tl.static_range(2):
        weight = q_weight if which == 0 else k_weight
        sum_a = tl.zeros([ROWS, A], tl.float32)
        sum_b = tl.zeros([ROWS, BB], tl.float32)
        for step in tl.range(TOKENS, num_stages=STAGES):
            t = first + step
            in_a = (rows < tl.where(t < T, H, 0))[:, None]
            pairs = tl.where(t < T, D // 2, 0)
            in_b = in_a & (cols_b < D)[None, :]
            d_out = (d_q if which == 0 else d_k) + (n * T + t) * H * D
            base = qkv + n * qkv_n + t * qkv_t + which * qkv_s
            a, b, r = _normed(base, rows, cols_a, cols_b, in_a, in_b, EPS, RMS, D, B, ROWS)
            g_a = load(d_out, rows, D, cols_a, in_a)
            if ROPE:
                c = load_columns(cos + t * (D // 2), half_a, half_a < pairs)
                s = load_columns(sin + t * (D // 2), half_a, half_a < pairs)
                g_a = _turn(g_a, c, -s, ROWS, A)
            if WEIGHT:
                sum_a += g_a * a
                g_a *= load_columns(weight, cols_a, cols_a < D)[None, :]
            g_mean = tl.sum(g_a, axis=1)
            g_xhat = tl.sum(g_a * a, axis=1)
            if B > 0:
                g_b = load(d_out, rows, D, cols_b, in_b)
                if ROPE:
                    c_b = load_columns(cos + t * (D // 2), half_b, half_b < pairs)
                    s_b = load_columns(sin + t * (D // 2), half_b, half_b < pairs)
                    g_b = _turn(g_b, c_b, -s_b, ROWS, B)
                if WEIGHT:
                    sum_b += g_b * b
                    g_b *= load_columns(weight, cols_b, cols_b < D)[None, :]
                g_mean += _exchange(tl.sum(g_b, axis=1), ROWS)
                g_xhat += _exchange(tl.sum(g_b * b, axis=1), ROWS)
            g_mean *= 0.0 if RMS else 1.0 / D
            g_xhat *= 1.0 / D
            out = d_qkv + ((n * T + t) * 3 + which) * H * D
            dx_a = (g_a - g_mean[:, None] - a * g_xhat[:, None]) * r[:, None]
            store(out, rows, D, cols_a, in_a, dx_a)
            if B > 0:
                dx_b = g_b - _exchange(g_mean, ROWS)[:, None] - b * _exchange(g_xhat, ROWS)[:, None]
                store(out, rows, D, cols_b, in_b, dx_b * _exchange(r, ROWS)[:, None])
            if which == 1:  # v's gradient only moves
                out = d_qkv + ((n * T + t) * 3 + 2) * H * D
                store(out, rows, D, cols_a, in_a, load(d_v + (n * T + t) * H * D, rows, D, cols_a, in_a))
                if B > 0:
                    store(out, rows, D, cols_b, in_b, load(d_v + (n * T + t) * H * D, rows, D, cols_b, in_b))
        if WEIGHT:
            at = partial + (tl.program_id(0).to(tl.int64) * 2 + which) * D
            tl.store(at + cols_a, tl.sum(sum_a, axis=0))
            if B > 0:
                tl.store(at + cols_b, tl.sum(sum_b, axis=0), mask=cols_b < D)


def _packed(qkv: Tensor) -> Tensor:
    """Heads side by side: (H, D) contiguous inside any (N, T, 3, ...)."""
    return qkv if qkv.stride(-1) == 1 and qkv.stride(-2) == qkv.shape[-1] else qkv.contiguous()


def _token_major(x: Tensor) -> Tensor:
    """(N, H, T, D) -> contiguous (N, T, H, D); no copy for a gradient in the layout of q and k as we made them."""
    return x.transpose(1, 2).contiguous()


def _launch(qkv: Tensor, cos: Tensor | None) -> tuple[dict[str, int], int, int]:
    n, t, _, h, d = qkv.shape
    a, b = split_columns(d)
    rows = 1 << (h - 1).bit_length()
    tokens = min(max(1 << (n * t // 1024).bit_length() - 1, 16), 64) if n * t >= 1024 else 16
    sizes = {"H": h, "D": d, "A": a, "B": b, "ROWS": rows, "TOKENS": tokens, "STAGES": STAGES}
    return sizes | {"ROPE": int(cos is not None)}, cdiv(t, tokens), min(max(rows * a // 512, 1), 4)


@triton_op("fastdit::qk_norm_rope")
def _op(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    eps: float, rms: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> q, k (N, T, H, D)."""
    qkv = _packed(qkv)
    q_weight, k_weight, cos, sin = (None if x is None else x.contiguous() for x in (q_weight, k_weight, cos, sin))
    n, t, _, h, d = qkv.shape
    q = torch.empty((n, t, h, d), dtype=qkv.dtype, device=qkv.device)
    k = torch.empty((n, t, h, d), dtype=qkv.dtype, device=qkv.device)
    if qkv.numel():
        sizes, chunks, warps = _launch(qkv, cos)
        with on_device(qkv):
            wrap_triton(_qk_norm_rope_forward)[(n * chunks,)](
                qkv, q_weight, k_weight, cos, sin, q, k, t, chunks, qkv.stride(0), qkv.stride(1), qkv.stride(2),
                EPS=eps, RMS=rms, WEIGHT=int(q_weight is not None), **sizes, num_warps=warps,
            )  # fmt: skip
    return q, k


@triton_op("fastdit::qk_norm_rope_backward")
def _op_backward(
    d_q: Tensor, d_k: Tensor, d_v: Tensor, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, eps: float, rms: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """d_q, d_k, d_v (N, T, H, D) -> d_qkv (N, T, 3, H, D); (1, programs, 2, D) fp32 partial sums of the weights'."""
    qkv, d_q, d_k, d_v = _packed(qkv), d_q.contiguous(), d_k.contiguous(), d_v.contiguous()
    q_weight, k_weight, cos, sin = (None if x is None else x.contiguous() for x in (q_weight, k_weight, cos, sin))
    n, t, _, h, d = qkv.shape
    sizes, chunks, warps = _launch(qkv, cos)
    d_qkv = torch.empty((n, t, 3, h, d), dtype=qkv.dtype, device=qkv.device)
    programs = n * chunks if q_weight is not None else 0
    partial = torch.empty((1, programs, 2, d), dtype=torch.float32, device=qkv.device)
    if qkv.numel():
        with on_device(qkv):
            wrap_triton(_qk_norm_rope_backward)[(n * chunks,)](
                d_q, d_k, d_v, qkv, q_weight, k_weight, cos, sin, d_qkv, partial, t, chunks,
                qkv.stride(0), qkv.stride(1), qkv.stride(2),
                EPS=eps, RMS=rms, WEIGHT=int(q_weight is not None), **sizes, num_warps=warps,
            )  # fmt: skip
    return d_qkv, partial


class _QKNormRope(torch.autograd.Function):
    """An autograd.Function around the ops, since an op may not return v, a view of its input."""

    @staticmethod
    def forward(
        qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
        eps: float, rms: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        q, k = _op(qkv, q_weight, k_weight, cos, sin, eps, rms)
        return q.transpose(1, 2), k.transpose(1, 2), qkv[:, :, 2].transpose(1, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.eps, ctx.rms = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor, d_v: Tensor) -> tuple:
        qkv, q_weight, k_weight, cos, sin = ctx.saved_tensors
        d_qkv, partial = _op_backward(
            *(_token_major(x) for x in (d_q, d_k, d_v)), qkv, q_weight, k_weight, cos, sin, ctx.eps, ctx.rms
        )
        if q_weight is None:
            return d_qkv, None, None, None, None, None, None
        sums = sum_chunks(partial, q_weight.dtype)[0]
        return d_qkv, sums[0], sums[1], None, None, None, None


def qk_norm_rope_triton(
    qkv: Tensor, q_weight: Tensor | None = None, k_weight: Tensor | None = None, cos: Tensor | None = None,
    sin: Tensor | None = None, eps: float = 1e-6, norm: str = "rms",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _QKNormRope.apply(qkv, q_weight, k_weight, cos, sin, eps, norm == "rms")


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor | None = None, k_weight: Tensor | None = None, cos: Tensor | None = None,
    sin: Tensor | None = None, eps: float = 1e-6, norm: str = "rms",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k normalised per head, scaled and rotated, and v untouched: each (N, H, T, D), stored token-major.

    qkv (N, T, 3, H, D), the packed projection (D even); q_weight, k_weight (D,), both or neither; cos, sin (T, D / 2)
    fp32 from rope_2d, or None for no positions. norm: "rms" or "layer". ValueError where shapes do not fit.
    """
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is unknown; use one of {', '.join(NORMS)}")
    n, t, _, h, d = qkv.shape
    check("qkv", qkv, n, t, 3, h, d // 2 * 2)
    if (q_weight is None) != (k_weight is None) or (cos is None) != (sin is None):
        raise ValueError("q_weight and k_weight come together, and so do cos and sin; give both or neither")
    for name, x, shape in (("q_weight", q_weight, (d,)), ("k_weight", k_weight, (d,)),
                           ("cos", cos, (t, d // 2)), ("sin", sin, (t, d // 2))):  # fmt: skip
        if x is not None:
            check(name, x, *shape)
    fused = use_triton("qk_norm_rope", qkv.device.type, qkv.dtype)
    return (qk_norm_rope_triton if fused else qk_norm_rope_eager)(qkv, q_weight, k_weight, cos, sin, eps, norm)


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    n, t, h, d = shape
    values = random_inputs(seed, dtype, device, qkv=(n, t, 3, h, d), q_weight=(d,), k_weight=(d,))
    cos, sin = (x.to(device) for x in rope_2d(1, t, d))
    return values | {"cos": cos, "sin": sin}


def minimum_bytes(shape: tuple[int, int, int, int], size: int) -> tuple[int, int]:
    n, t, h, d = shape
    tokens, tables, weights = n * t * h * d * size, t * d * 4, 2 * d * size
    return 4 * tokens + tables + weights, 8 * tokens + tables + 2 * weights


OP = Op(
    "qk_norm_rope", qk_norm_rope_eager, qk_norm_rope_triton, qk_norm_rope, inputs,
    tiny=(2, 3, 2, 8), shapes=((2, 19, 3, 72), (1, 32, 2, 64)), real=((256, 256, 16, 72),),
    minimum_bytes=minimum_bytes,
)  # fmt: skip
