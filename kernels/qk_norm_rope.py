"""qk_norm_rope: RMSNorm or LayerNorm of each head's query and key, then 2-D rotary embedding, on the packed projection.

The forward pass reads q and k from the output of the linear, (N, T, 3, H, D), and writes them once, in the layout that
attention reads; v is a view. The backward pass writes the packed gradient, including that of v, so nothing is
concatenated or transposed. Query-key norm: Dehghani et al. 2023. Rotary embedding: Su et al. 2021, pairs (2i, 2i + 1),
half of them for each axis.
"""

from typing import Any

import torch
from torch import Tensor

from .adaln import NORMS
from .runtime import Op, cdiv, check, random_inputs, tl, triton, triton_op, use_triton, wrap_triton
from .tiles import (
    exchange,
    load_tiles,
    load_vector,
    row_sum,
    split_columns,
    store_sums,
    store_tiles,
    sum_chunks,
    zero_sums,
)

STAGES = 3


def rope_2d(height: int, width: int, head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """cos and sin (height * width, head_dim / 2), fp32: half of the pairs rotate with the row, half with the column."""
    if head_dim % 4:
        raise ValueError(f"head_dim={head_dim} does not split into pairs for two axes; use a multiple of 4")
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
            c, s = (table.unsqueeze(1) if table.dim() == 3 else table for table in (cos, sin))
            x = torch.stack([even * c - odd * s, even * s + odd * c], dim=-1).flatten(-2)
        return x.to(qkv.dtype)

    return one(q, q_weight), one(k, k_weight), v


@triton.jit
def _turn(x, cos, sin, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rotate the pairs of (ROWS, COLS) by the angles of cos, sin (COLS / 2,)."""
    even, odd = tl.split(tl.reshape(x, [ROWS, COLS // 2, 2]))
    cos, sin = cos[None, :], sin[None, :]
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [ROWS, COLS])


@triton.jit
def _rotate(a, b, cos_a, cos_b, sin_a, sin_b, ROWS: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    a = _turn(a, cos_a, sin_a, ROWS, A)
    if B > 0:
        b = _turn(b, cos_b, sin_b, ROWS, B)
    return a, b


@triton.jit
def _load_normalized(base, rows, limit, EPS: tl.constexpr, RMS: tl.constexpr, D: tl.constexpr, A: tl.constexpr,
                     B: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Both tiles of xhat, and rstd."""
    a, b = load_tiles(base, rows, D, limit, D, A, B)
    mean = row_sum(a, b, B, ROWS) * (0.0 if RMS else 1.0 / D)
    a -= mean[:, None]
    if B > 0:
        b = tl.where((A + tl.arange(0, B) < D)[None, :], b - exchange(mean, ROWS)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(row_sum(a * a, b * b, B, ROWS) * (1.0 / D) + EPS)
    return a * rstd[:, None], b * exchange(rstd, ROWS)[:, None], rstd


@triton.jit
def _qk_norm_rope_forward(
    qkv, q_weight, k_weight, cos, sin, q, k, T, chunks, cos_n, qkv_n, qkv_t: tl.constexpr, qkv_s: tl.constexpr,
    EPS: tl.constexpr, RMS: tl.constexpr, WEIGHT: tl.constexpr, ROPE: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * TOKENS
    rows = tl.arange(0, ROWS)  # heads
    for step in tl.range(TOKENS, num_stages=STAGES):
        t = first + step
        heads = tl.where(t < T, H, 0)
        if ROPE:
            pairs = tl.where(t < T, D // 2, 0)
            cos_a, cos_b = load_vector(cos + n * cos_n + t * (D // 2), pairs, A // 2, B // 2)
            sin_a, sin_b = load_vector(sin + n * cos_n + t * (D // 2), pairs, A // 2, B // 2)
        for which in tl.static_range(2):
            base = qkv + n * qkv_n + t * qkv_t + which * qkv_s
            a, b, _ = _load_normalized(base, rows, heads, EPS, RMS, D, A, B, ROWS)
            if WEIGHT:
                weight_a, weight_b = load_vector(q_weight if which == 0 else k_weight, D, A, B)
                a *= weight_a[None, :]
                b *= weight_b[None, :]
            if ROPE:
                a, b = _rotate(a, b, cos_a, cos_b, sin_a, sin_b, ROWS, A, B)
            store_tiles((q if which == 0 else k) + (n * T + t) * H * D, rows, D, heads, a, b, D, A, B)


@triton.jit
def _qk_norm_rope_backward(
    d_q, d_k, d_v, qkv, q_weight, k_weight, cos, sin, d_qkv, partial, T, chunks,
    cos_n, qkv_n, qkv_t: tl.constexpr, qkv_s: tl.constexpr,
    EPS: tl.constexpr, RMS: tl.constexpr, WEIGHT: tl.constexpr, ROPE: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * TOKENS
    rows = tl.arange(0, ROWS)  # heads
    for which in tl.static_range(2):
        sum_a = tl.zeros([ROWS, A], tl.float32)
        _, sum_b = zero_sums(ROWS, A, B)
        for step in tl.range(TOKENS, num_stages=STAGES):
            t = first + step
            heads = tl.where(t < T, H, 0)
            g_a, g_b = load_tiles((d_q if which == 0 else d_k) + (n * T + t) * H * D, rows, D, heads, D, A, B)
            base = qkv + n * qkv_n + t * qkv_t + which * qkv_s
            a, b, rstd = _load_normalized(base, rows, heads, EPS, RMS, D, A, B, ROWS)
            if ROPE:
                pairs = tl.where(t < T, D // 2, 0)
                cos_a, cos_b = load_vector(cos + n * cos_n + t * (D // 2), pairs, A // 2, B // 2)
                sin_a, sin_b = load_vector(sin + n * cos_n + t * (D // 2), pairs, A // 2, B // 2)
                g_a, g_b = _rotate(g_a, g_b, cos_a, cos_b, -sin_a, -sin_b, ROWS, A, B)
            if WEIGHT:
                sum_a += g_a * a
                if B > 0:
                    sum_b += g_b * b
                weight_a, weight_b = load_vector(q_weight if which == 0 else k_weight, D, A, B)
                g_a *= weight_a[None, :]
                g_b *= weight_b[None, :]
            g_xhat = row_sum(g_a * a, g_b * b, B, ROWS) * (1.0 / D)
            g_mean = row_sum(g_a, g_b, B, ROWS) * (0.0 if RMS else 1.0 / D)
            dx_a = (g_a - g_mean[:, None] - a * g_xhat[:, None]) * rstd[:, None]
            dx_b = g_b - exchange(g_mean, ROWS)[:, None] - b * exchange(g_xhat, ROWS)[:, None]
            dx_b *= exchange(rstd, ROWS)[:, None]
            store_tiles(d_qkv + ((n * T + t) * 3 + which) * H * D, rows, D, heads, dx_a, dx_b, D, A, B)
            if which == 1:  # the gradient of v is only copied
                dv_a, dv_b = load_tiles(d_v + (n * T + t) * H * D, rows, D, heads, D, A, B)
                store_tiles(d_qkv + ((n * T + t) * 3 + 2) * H * D, rows, D, heads, dv_a, dv_b, D, A, B)
        if WEIGHT:
            out = partial + (tl.program_id(0).to(tl.int64) * 2 + which) * D
            store_sums(out, tl.sum(sum_a, axis=0), sum_b, D, A, B)


def _packed(qkv: Tensor) -> Tensor:
    """qkv with (H, D) contiguous; the other strides may be any."""
    return qkv if qkv.stride(-1) == 1 and qkv.stride(-2) == qkv.shape[-1] else qkv.contiguous()


def _per_sample(table: Tensor | None) -> int:
    """The stride from the angles of one sample to those of the next; 0 where all share one table."""
    return table.stride(0) if table is not None and table.dim() == 3 else 0


def _programs(qkv: Tensor, weight: Tensor | None, cos: Tensor | None) -> tuple[int, dict[str, Any]]:
    """Chunks of tokens per sample, and the kernels' constants."""
    n, t, _, h, d = qkv.shape
    a, b = split_columns(d)
    rows = 1 << (h - 1).bit_length()
    tokens = min(max(1 << (n * t // 1024).bit_length() - 1, 16), 64) if n * t >= 1024 else 16
    flags = {"WEIGHT": int(weight is not None), "ROPE": int(cos is not None)}
    sizes = {"H": h, "D": d, "A": a, "B": b, "ROWS": rows, "TOKENS": tokens, "STAGES": STAGES}
    return cdiv(t, tokens), flags | sizes | {"num_warps": min(max(rows * a // 512, 1), 4)}


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
    chunks, constants = _programs(qkv, q_weight, cos)
    wrap_triton(_qk_norm_rope_forward)[(n * chunks,)](
        qkv, q_weight, k_weight, cos, sin, q, k, t, chunks, _per_sample(cos), *qkv.stride()[:3],
        EPS=eps, RMS=rms, **constants,
    )
    return q, k


@triton_op("fastdit::qk_norm_rope_backward")
def _op_backward(
    d_q: Tensor, d_k: Tensor, d_v: Tensor, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, eps: float, rms: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """d_q, d_k, d_v (N, T, H, D) -> d_qkv (N, T, 3, H, D), fp32 partial sums (1, programs, 2, D) for both weights."""
    qkv, d_q, d_k, d_v = _packed(qkv), d_q.contiguous(), d_k.contiguous(), d_v.contiguous()
    q_weight, k_weight, cos, sin = (None if x is None else x.contiguous() for x in (q_weight, k_weight, cos, sin))
    n, t, _, h, d = qkv.shape
    chunks, constants = _programs(qkv, q_weight, cos)
    d_qkv = torch.empty((n, t, 3, h, d), dtype=qkv.dtype, device=qkv.device)
    programs = n * chunks if q_weight is not None else 0
    partial = torch.empty((1, programs, 2, d), dtype=torch.float32, device=qkv.device)
    wrap_triton(_qk_norm_rope_backward)[(n * chunks,)](
        d_q, d_k, d_v, qkv, q_weight, k_weight, cos, sin, d_qkv, partial, t, chunks, _per_sample(cos),
        *qkv.stride()[:3],
        EPS=eps, RMS=rms, **constants,
    )  # fmt: skip
    return d_qkv, partial


class _QKNormRope(torch.autograd.Function):
    """An autograd.Function around the ops, because an op may not return v, a view of its input."""

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
        gradients = (x.transpose(1, 2) for x in (d_q, d_k, d_v))  # (N, T, H, D), contiguous if laid out like q and k
        d_qkv, partial = _op_backward(*gradients, qkv, q_weight, k_weight, cos, sin, ctx.eps, ctx.rms)
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
    """q and k normalized per head, scaled and rotated, and v unchanged: each (N, H, T, D), stored token-major.

    qkv (N, T, 3, H, D), the packed projection (D even); q_weight, k_weight (D,), both or neither; cos, sin (T, D / 2)
    or (N, T, D / 2), fp32 from rope_2d, or None for no rotation. norm: "rms" or "layer". ValueError if a shape is
    wrong.
    """
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is unknown; use one of {', '.join(NORMS)}")
    n, t, _, h, d = qkv.shape
    check("qkv", qkv, n, t, 3, h, d // 2 * 2)
    if (q_weight is None) != (k_weight is None) or (cos is None) != (sin is None):
        raise ValueError("q_weight and k_weight come together, and so do cos and sin; give both or neither")
    for name, x, shape in (("q_weight", q_weight, (d,)), ("k_weight", k_weight, (d,)),
                           ("cos", cos, (t, d // 2)), ("sin", sin, (t, d // 2))):  # fmt: skip
        check(name, x, *((n, *shape) if x is not None and x.dim() == 3 else shape))
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


QK_NORM_ROPE = Op(
    "qk_norm_rope", qk_norm_rope_eager, qk_norm_rope_triton, qk_norm_rope, inputs,
    tiny=(2, 3, 2, 8), shapes=((2, 19, 3, 72), (1, 16, 2, 64)), real=((256, 256, 16, 72),),
    minimum_bytes=minimum_bytes, most_bytes=1.1,  # the rotary tables are fp32
    writes=(("q", "k"), ("d_qkv", "partial"), ("out",)),
    variants=({"norm": "layer", "eps": 1e-2}, {"q_weight": None, "k_weight": None, "cos": None, "sin": None}),
)  # fmt: skip
