"""Building blocks shared by several kernels. Everything is computed in fp32.

A row of D columns is held as two tiles, a (ROWS, A) and b (ROWS, B), where A is the largest power of two <= D and B
covers the remainder: 1152 = 1024 + 128 idles no lane, a single block of 2048 would idle 44% of them. Only b needs a
column mask. B = 0 means that there is no second tile: functions that return a pair then return a twice, and what is
computed from the copy is dead code.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .runtime import cdiv, tl, triton, triton_op, wrap_triton

# ---- loads and stores


@triton.jit
def load(base, rows, stride, cols, mask):
    """(ROWS, COLS) tile of a matrix as fp32; masked elements are 0."""
    return tl.load(base + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(base, rows, stride, cols, mask, tile):
    tl.store(base + rows[:, None] * stride + cols[None, :], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_columns(base, cols, mask):
    """(COLS,) fp32 vector, one value per column."""
    return tl.load(base + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_vector(base, limit, A: tl.constexpr, B: tl.constexpr):
    """The values at base, one per column, as (A,) and (B,); those at or past limit are 0."""
    cols = tl.arange(0, A)
    a = load_columns(base, cols, cols < limit)
    b = a
    if B > 0:
        cols_b = A + tl.arange(0, B)
        b = load_columns(base, cols_b, cols_b < limit)
    return a, b


@triton.jit
def load_tiles(base, rows, stride, limit, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Both tiles of these rows; rows at or past limit are 0."""
    # b before a: the compiler lays out the values that both share as it does for the tile it meets last
    if B > 0:
        cols_b = A + tl.arange(0, B)
        b = load(base, rows, stride, cols_b, (rows < limit)[:, None] & (cols_b < D)[None, :])
    a = load(base, rows, stride, tl.arange(0, A), (rows < limit)[:, None])
    if B == 0:
        b = a
    return a, b


@triton.jit
def store_tiles(base, rows, stride, limit, a, b, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    store(base, rows, stride, tl.arange(0, A), (rows < limit)[:, None], a)
    if B > 0:
        cols_b = A + tl.arange(0, B)
        store(base, rows, stride, cols_b, (rows < limit)[:, None] & (cols_b < D)[None, :], b)


# ---- reductions over a row
# A value per row couples the layouts of the two tiles: left alone, the compiler gives b the layout of a, eight times
# redundantly, or computes it twice. The next two functions pass the value on without its layout.


@triton.jit
def a_to_b(v, ROWS: tl.constexpr):
    """v (ROWS,) as scalars. In a's layout every thread holds all rows, so this costs no instruction."""
    index = tl.arange(0, ROWS)
    out = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(ROWS):
        out = tl.where(index == i, tl.sum(tl.where(index == i, v, 0.0), axis=0), out)
    return out


@triton.jit
def exchange(v, ROWS: tl.constexpr):
    """v (ROWS,) through shared memory, which a sum over b has to cross anyway."""
    return tl.gather(v, tl.arange(0, ROWS), axis=0)


@triton.jit
def row_sum(a, b, B: tl.constexpr, ROWS: tl.constexpr):
    """(ROWS,) sums over the columns of both tiles."""
    total = tl.sum(a, axis=1)
    if B > 0:
        total += exchange(tl.sum(b, axis=1), ROWS)
    return total


@triton.jit
def normalize_modulate(
    x_a, x_b, shift_a, shift_b, scale_a, scale_b, h, stats, rows, T,
    factor, EPS: tl.constexpr, RMS: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Write h = norm(x) (1 + scale) + shift, and mean (0 for RMSNorm) and rstd to stats (2, T).

    The variance takes a second pass over the registers: E[x^2] - E[x]^2 would cancel. If h is e4m3, it is multiplied by
    `factor`; the conversion saturates. Returns h before that.
    """
    mean = row_sum(x_a, x_b, B, ROWS) * (0.0 if RMS else 1.0 / D)
    x_a -= mean[:, None]
    x_b -= a_to_b(mean, ROWS)[:, None]
    if B > 0:
        x_b = tl.where((A + tl.arange(0, B) < D)[None, :], x_b, 0.0)
    rstd = 1.0 / tl.sqrt(row_sum(x_a * x_a, x_b * x_b, B, ROWS) * (1.0 / D) + EPS)
    h_a = x_a * rstd[:, None] * (1.0 + scale_a)[None, :] + shift_a[None, :]
    h_b = x_b * a_to_b(rstd, ROWS)[:, None] * (1.0 + scale_b)[None, :] + shift_b[None, :]
    if h.dtype.element_ty == tl.float8e4nv:
        # the compiler would give each thread 16 columns here, but 8 of x, and exchange values between threads: these
        # columns look to it as if only 8 of them were contiguous
        cols = tl.arange(0, A) // 8 * 8 + tl.arange(0, A) % 8
        store(h, rows, D, cols, (rows < T)[:, None], h_a * factor)
        if B > 0:
            cols_b = A + tl.arange(0, B)
            store(h, rows, D, cols_b, (rows < T)[:, None] & (cols_b < D)[None, :], h_b * factor)
    else:
        store_tiles(h, rows, D, T, h_a, h_b, D, A, B)
    tl.store(stats + rows, mean, mask=rows < T)
    tl.store(stats + T + rows, rstd, mask=rows < T)
    return h_a, h_b


@triton.jit
def load_normalized(base, rows, stride, stats, T, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """(x - mean) rstd of both tiles, and rstd."""
    mean = tl.load(stats + rows, mask=rows < T, other=0.0)
    rstd = tl.load(stats + T + rows, mask=rows < T, other=0.0)
    a, b = load_tiles(base, rows, stride, T, D, A, B)
    return (a - mean[:, None]) * rstd[:, None], (b - mean[:, None]) * rstd[:, None], rstd


@triton.jit
def norm_backward(
    g_a, g_b, xhat_a, xhat_b, rstd, RMS: tl.constexpr, D: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Gradient of x from g, that of xhat = norm(x)."""
    g_mean = row_sum(g_a, g_b, B, ROWS) * (0.0 if RMS else 1.0 / D)
    g_xhat = row_sum(g_a * xhat_a, g_b * xhat_b, B, ROWS) * (1.0 / D)
    dx_a = (g_a - g_mean[:, None] - xhat_a * g_xhat[:, None]) * rstd[:, None]
    dx_b = (g_b - a_to_b(g_mean, ROWS)[:, None] - xhat_b * a_to_b(g_xhat, ROWS)[:, None]) * rstd[:, None]
    return dx_a, dx_b


# ---- reductions over rows: each program sums its own rows, then sum_chunks adds the programs' partial sums


@triton.jit
def zero_sums(ROWS: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Sums over rows: a's are (A,); b's rows lie in several warps and are added once, at the end: (ROWS, B)."""
    a = tl.zeros([A], tl.float32)
    b = a
    if B > 0:
        b = tl.zeros([ROWS, B], tl.float32)
    return a, b


@triton.jit
def add_rows(sum_a, sum_b, a, b, B: tl.constexpr):
    if B > 0:
        sum_b += b
    return sum_a + tl.sum(a, axis=0), sum_b


@triton.jit
def store_sums(out, sum_a, sum_b, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    tl.store(out + tl.arange(0, A), sum_a)
    if B > 0:
        cols_b = A + tl.arange(0, B)
        tl.store(out + cols_b, tl.sum(sum_b, axis=0), mask=cols_b < D)


@triton.jit
def _sum_chunks(partial, out, M, CHUNKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, CHUNKS, ROWS):
        rows = first + tl.arange(0, ROWS)
        total += load(partial + n * CHUNKS * M, rows, M, cols, (rows < CHUNKS)[:, None] & (cols < M)[None, :])
    tl.store(out + n * M + cols, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=cols < M)


@triton_op("fastdit::sum_chunks")
def sum_chunks(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, chunks, ...) fp32 -> (N, ...): the second pass of a reduction over rows, in an order fixed by the shape."""
    n, chunks = partial.shape[:2]
    m = math.prod(partial.shape[2:])
    out = torch.empty((n, *partial.shape[2:]), dtype=dtype, device=partial.device)
    rows = min(1 << max(chunks - 1, 0).bit_length(), 64)
    block = 256 if rows <= 4 else 32
    wrap_triton(_sum_chunks)[(n, cdiv(m, block))](partial, out, m, CHUNKS=chunks, ROWS=rows, BLOCK=block, num_warps=2)
    return out


# ---- launch shapes: functions of the sizes alone, so that the order of a sum, and its bits, depend on no machine


def split_columns(d: int) -> tuple[int, int]:
    """(A, B) for rows of d columns."""
    a = 1 << (d.bit_length() - 1)
    return a, (1 << (d - a - 1).bit_length() if d > a else 0)


def row_programs(x: Tensor, programs: int, most: int, rows: int, stages: int) -> tuple[int, dict[str, Any]]:
    """How to cut x (N, T, D) into programs: the chunks of tokens per sample, and the kernel's constants.

    A chunk is a power of two of tokens in [16, most], or less in short samples: about `programs` in all fill the GPU,
    larger chunks spare re-reads. A program holds `rows` tokens at once and loads `stages` steps ahead. Each thread owns
    8 of the A columns: 16-byte accesses, and sums over rows that stay inside the thread.
    """
    n, t, d = x.shape
    a, b = split_columns(d)
    chunk = min(max(1 << max((n * t // programs).bit_length() - 1, 0), 16), most)
    chunk = min(chunk, max(1 << (t - 1).bit_length(), rows))  # samples of one token, as in a decoder: one step
    constants = {"D": d, "A": a, "B": b, "ROWS": rows, "STEPS": chunk // rows, "STAGES": stages}
    return cdiv(t, chunk), constants | {"num_warps": min(max(a // 256, 1), 8)}
