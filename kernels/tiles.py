"""Pieces of kernels that several ops share. A row of D columns is two tiles: a (ROWS, A) and b (ROWS, B), D <= A + B.

A is the largest power of two in D, so only b ever needs a column mask; B = 0 drops it. Everything is computed in fp32.
"""

import math

import torch
from torch import Tensor

from .runtime import cdiv, on_device, tl, triton, triton_op, wrap_triton


@triton.jit
def load(base, rows, stride, cols, mask):
    """(ROWS, COLS) tile of a matrix as fp32; masked elements are 0."""
    return tl.load(base + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(base, rows, stride, cols, mask, tile):
    tl.store(base + rows[:, None] * stride + cols[None, :], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_columns(base, cols, mask):
    """(COLS,) fp32 vector, one value a column."""
    return tl.load(base + cols, mask=mask, other=0.0).to(tl.float32)


# A value per row couples the layouts of the two tiles: left alone, the compiler lays b out like a, eight times
# redundantly, or computes it twice. These two pass the value on without its layout.


@triton.jit
def a_to_b(v, ROWS: tl.constexpr):
    """v (ROWS,) by way of scalars. In a's layout every thread holds all rows, so this costs no instruction."""
    index = tl.arange(0, ROWS)
    out = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(ROWS):
        out = tl.where(index == i, tl.sum(tl.where(index == i, v, 0.0), axis=0), out)
    return out


@triton.jit
def b_to_a(v, ROWS: tl.constexpr):
    """v (ROWS,) by way of shared memory, where it would have to pass anyway."""
    return tl.gather(v, tl.arange(0, ROWS), axis=0)


@triton.jit
def moments(a, b, in_b, eps: tl.constexpr, D: tl.constexpr, B: tl.constexpr, RMS: tl.constexpr, ROWS: tl.constexpr):
    """Per row: mean (0 for RMS norm) and 1 / sqrt(variance + eps), by two passes over registers (E[x^2] cancels)."""
    total = tl.sum(a, axis=1)
    if B > 0:
        total += b_to_a(tl.sum(b, axis=1), ROWS)
    mean = total * (0.0 if RMS else 1.0 / D)
    centred = a - mean[:, None]
    square = tl.sum(centred * centred, axis=1)
    if B > 0:
        centred_b = tl.where(in_b[None, :], b - a_to_b(mean, ROWS)[:, None], 0.0)
        square += b_to_a(tl.sum(centred_b * centred_b, axis=1), ROWS)
    return mean, 1.0 / tl.sqrt(square * (1.0 / D) + eps)


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
    """(N, chunks, ...) fp32 -> (N, ...): the second pass of every column reduction, in an order fixed by the shape."""
    n, chunks = partial.shape[:2]
    m = math.prod(partial.shape[2:])
    out = torch.empty((n, *partial.shape[2:]), dtype=dtype, device=partial.device)
    if out.numel():
        rows = min(1 << max(chunks - 1, 0).bit_length(), 64)
        block = 256 if rows <= 4 else 32
        with on_device(partial):
            wrap_triton(_sum_chunks)[(n, cdiv(m, block))](
                partial, out, m, CHUNKS=chunks, ROWS=rows, BLOCK=block, num_warps=2
            )  # fmt: skip
    return out
