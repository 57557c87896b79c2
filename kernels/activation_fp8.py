"""Elementwise activations for FP8 linears: the output and the gradient as `fp8_cast` would round them, in one pass.

The same functions as in activation.py; the file of an activation holds two more kernels, which only call
`activation_fp8_forward` and `activation_fp8_backward`.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .activation import as_rows
from .fp8 import (
    FORWARD,
    GRADIENT,
    eights,
    fp8_cast_eager,
    load_pair,
    operands,
    store_both,
)
from .runtime import cdiv, tl, triton, triton_op, unit_stride, use_triton, wrap_triton
from .tiles import load_columns, sum_chunks

ROWS, COLUMNS, STEPS, STAGES, WARPS = 128, 64, 1, 1, 8  # of a tile; tiles per program, and loads ahead


@triton.jit
def _add_bias(even, odd, bias, start: tl.constexpr, cols, D: tl.constexpr, BIAS: tl.constexpr):
    if BIAS:
        value = load_columns(bias + start, cols, cols < D)[None, :]
        even += value
        odd += value
    return even, odd


@triton.jit
def _zero_after(even, odd, pair, at, M):
    """Zero in the rows at or past M."""
    return tl.where((2 * (pair + at) < M)[:, None], even, 0.0), tl.where((2 * (pair + at) + 1 < M)[:, None], odd, 0.0)


@triton.jit
def activation_fp8_forward(
    f, x, bias, rows, columns, scale, most, M, PAIRS, x_row,
    BIAS: tl.constexpr, HALVES: tl.constexpr, D: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
    STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (D + C - 1) // C
    first, factor = (tl.program_id(0) // blocks).to(tl.int64) * (STEPS * ROWS // 2), tl.load(scale)
    at, cols = tl.arange(0, ROWS // 2), eights((tl.program_id(0) % blocks) * C, C)
    seen = 0.0
    for step in tl.range(STEPS, num_stages=STAGES):
        pair = first + step * (ROWS // 2)
        even, odd = load_pair(x, pair, at, x_row, cols, M, D)
        even, odd = _add_bias(even, odd, bias, 0, cols, D, BIAS)
        even, _ = f(even)
        odd, _ = f(odd)
        if HALVES == 2:
            v_even, v_odd = load_pair(x + D, pair, at, x_row, cols, M, D)
            v_even, v_odd = _add_bias(v_even, v_odd, bias, D, cols, D, BIAS)
            even *= v_even
            odd *= v_odd
        even, odd = _zero_after(even, odd, pair, at, M)
        seen = tl.maximum(seen, store_both(even, odd, rows, columns, pair, at, cols, factor, M, PAIRS, D, D))
    tl.store(most + tl.program_id(0), seen)


@triton.jit
def activation_fp8_backward(
    f, d_y, x, bias, rows, partial, columns, scale, most, M, PAIRS, dy_row, x_row,
    BIAS: tl.constexpr, HALVES: tl.constexpr, D: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
    STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write d_x as `store_both` does, its largest magnitude to `most`, and its sum over rows to partial if BIAS."""
    X: tl.constexpr = HALVES * D
    blocks: tl.constexpr = (D + C - 1) // C
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    at, cols = tl.arange(0, ROWS // 2), eights((tl.program_id(0) % blocks) * C, C)
    factor, seen = tl.load(scale), 0.0
    total = tl.zeros([ROWS // 2, C], tl.float32)
    total_v = total
    for step in tl.range(STEPS, num_stages=STAGES):
        pair = chunk * (STEPS * ROWS // 2) + step * (ROWS // 2)
        even, odd = load_pair(x, pair, at, x_row, cols, M, D)
        even, odd = _add_bias(even, odd, bias, 0, cols, D, BIAS)
        dy_even, dy_odd = load_pair(d_y, pair, at, dy_row, cols, M, D)
        even, slope_even = f(even)
        odd, slope_odd = f(odd)
        if HALVES == 2:
            d_even, d_odd = dy_even * even, dy_odd * odd
            to = columns + D * PAIRS.to(tl.int64)
            seen = tl.maximum(
                seen, store_both(d_even, d_odd, rows + D, to, pair, at, cols, factor, M, PAIRS, D, X)
            )
            total_v += d_even + d_odd
            v_even, v_odd = load_pair(x + D, pair, at, x_row, cols, M, D)
            v_even, v_odd = _add_bias(v_even, v_odd, bias, D, cols, D, BIAS)
            dy_even *= v_even
            dy_odd *= v_odd
        even, odd = dy_even * slope_even, dy_odd * slope_odd
        seen = tl.maximum(seen, store_both(even, odd, rows, columns, pair, at, cols, factor, M, PAIRS, D, X))
        total += even + odd
    tl.store(most + tl.program_id(0), seen)
    if BIAS:
        tl.store(partial + chunk * X + cols, tl.sum(total, axis=0), mask=cols < D)
        if HALVES == 2:
            tl.store(partial + chunk * X + D + cols, tl.sum(total_v, axis=0), mask=cols < D)


def register_fp8(
    name: str, forward: Any, backward: Any, eager: Callable, slope: Callable, halves: int
) -> types.SimpleNamespace:
    """The activation for FP8 linears: `forward` writes its output and `backward` its gradient as `fp8_cast` would.

    forward(x, bias, scale) -> rows (M, D), columns (D, P), max |y| by part.
    backward(d_y, x, bias, scale) -> rows (M, halves D), columns (halves D, P), d_bias (fp32, or None), max |d_x| by
    part. x (..., halves D), d_y (..., D), scale (1,).
    """

    def launch(m: int, d: int) -> tuple[int, int, dict[str, int]]:
        """Chunks of rows, programs and constants."""
        chunks = cdiv(m, ROWS * STEPS)
        constants = {"HALVES": halves, "D": d, "C": COLUMNS, "ROWS": ROWS, "STEPS": STEPS, "STAGES": STAGES}
        return chunks, chunks * cdiv(d, COLUMNS), constants | {"num_warps": WARPS}

    @triton_op(f"fastdit::{name}_fp8")
    def op(x: Tensor, bias: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, bias = as_rows(x), unit_stride(bias)
        m, d = x.shape[0], x.shape[1] // halves
        rows, columns = operands(m, d, FORWARD, x.device)
        _, programs, constants = launch(m, d)
        most = torch.empty(programs, dtype=torch.float32, device=x.device)
        wrap_triton(forward)[(programs,)](
            x, bias, rows, columns, scale, most, m, columns.shape[1], x.stride(0), BIAS=int(bias is not None),
            **constants,
        )  # fmt: skip
        return rows, columns.view(FORWARD), most

    @triton_op(f"fastdit::{name}_backward_fp8")
    def op_backward(
        d_y: Tensor, x: Tensor, bias: Tensor | None, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        d_y, x, bias = as_rows(d_y), as_rows(x), unit_stride(bias)
        m, d = d_y.shape
        rows, columns = operands(m, halves * d, GRADIENT, x.device)
        chunks, programs, constants = launch(m, d)
        most = torch.empty(programs, dtype=torch.float32, device=x.device)
        partial = torch.empty((1, 0 if bias is None else chunks, halves * d), dtype=torch.float32, device=x.device)
        wrap_triton(backward)[(programs,)](
            d_y, x, bias, rows, partial, columns, scale, most, m, columns.shape[1], d_y.stride(0), x.stride(0),
            BIAS=int(bias is not None), **constants,
        )  # fmt: skip
        return rows, columns.view(GRADIENT), partial, most

    def public(x: Tensor, bias: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if use_triton(f"{name}_fp8", x.device.type, x.dtype):
            return op(x, bias, scale)
        return fp8_cast_eager(eager(as_rows(x), bias), scale, FORWARD)

    def public_backward(
        d_y: Tensor, x: Tensor, bias: Tensor | None, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        if use_triton(f"{name}_fp8", x.device.type, x.dtype):
            rows, columns, partial, most = op_backward(d_y, x, bias, scale)
            return rows, columns, None if bias is None else sum_chunks(partial, torch.float32)[0], most
        d_x = slope(as_rows(d_y), as_rows(x if bias is None else x + bias.to(x.dtype)))
        rows, columns, most = fp8_cast_eager(d_x, scale, GRADIENT)
        return rows, columns, None if bias is None else d_x.float().sum(0), most

    return types.SimpleNamespace(forward=public, backward=public_backward)
