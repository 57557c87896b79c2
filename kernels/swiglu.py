"""swiglu: y = silu(a + bias_a) (v + bias_v), a and v the halves of one projection (Shazeer 2020).

Forward reads both halves and writes y; backward reads d_y and both halves and writes their gradient, sums the bias's,
and writes y again where it is wanted (see swiglu_linear), so that nobody needs to keep it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .gelu import BACKWARD_ROWS, STAGES
from .runtime import (
    Op,
    as_rows,
    cdiv,
    check,
    column_block,
    on_device,
    random_inputs,
    tl,
    triton,
    triton_op,
    unit_stride,
    use_triton,
    wrap_triton,
)
from .tiles import load, load_columns, store, sum_chunks

TILE = 2048  # elements of y a program holds at once, in 8 warps: one 16-byte access a thread and tensor
FORWARD_TILES = 8


def swiglu_eager(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition: silu of the first half times the second, after the bias."""
    a, v = (x if bias is None else x + bias).chunk(2, dim=-1)
    return F.silu(a) * v


@triton.jit
def _sigmoid(a):
    """sigmoid(a), and 1 - sigmoid(a) as a product, free of cancellation."""
    power = tl.exp(tl.minimum(-a, 80.0))
    gate = 1.0 / (1.0 + power)
    return gate, power * gate


@triton.jit
def _swiglu_forward(
    x, bias, y, M, x_row, BIAS: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (D + C - 1) // C
    first = (tl.program_id(0) // blocks).to(tl.int64) * (ROWS * STEPS)
    cols = (tl.program_id(0) % blocks) * C + tl.arange(0, C)
    inside = cols < D
    if BIAS:
        bias_a = load_columns(bias, cols, inside)
        bias_v = load_columns(bias + D, cols, inside)
    for step in tl.range(STEPS, num_stages=STAGES):
        rows = step * ROWS + tl.arange(0, ROWS)
        mask = (first + rows < M)[:, None] & inside[None, :]
        a = load(x + first * x_row, rows, x_row, cols, mask)
        v = load(x + first * x_row + D, rows, x_row, cols, mask)
        if BIAS:
            a += bias_a[None, :]
            v += bias_v[None, :]
        gate, _ = _sigmoid(a)
        store(y + first * D, rows, D, cols, mask, a * gate * v)


@triton.jit
def _swiglu_backward(
    d_y, x, bias, d_x, y, partial, M, dy_row, x_row,
    BIAS: tl.constexpr, KEEP: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (D + C - 1) // C
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    first = chunk * (ROWS * STEPS)
    cols = (tl.program_id(0) % blocks) * C + tl.arange(0, C)
    inside = cols < D
    if BIAS:
        bias_a = load_columns(bias, cols, inside)
        bias_v = load_columns(bias + D, cols, inside)
        total_a = tl.zeros([ROWS, C], tl.float32)
        total_v = tl.zeros([ROWS, C], tl.float32)
    for step in tl.range(STEPS, num_stages=STAGES):
        rows = step * ROWS + tl.arange(0, ROWS)
        mask = (first + rows < M)[:, None] & inside[None, :]
        a = load(x + first * x_row, rows, x_row, cols, mask)
        v = load(x + first * x_row + D, rows, x_row, cols, mask)
        dy = load(d_y + first * dy_row, rows, dy_row, cols, mask)
        if BIAS:
            a += bias_a[None, :]
            v += bias_v[None, :]
        gate, rest = _sigmoid(a)
        silu = a * gate
        d_v = dy * silu
        d_a = dy * v * (gate + silu * rest)
        store(d_x + first * 2 * D, rows, 2 * D, cols, mask, d_a)
        store(d_x + first * 2 * D + D, rows, 2 * D, cols, mask, d_v)
        if KEEP:
            store(y + first * D, rows, D, cols, mask, silu * v)
        if BIAS:
            total_a += d_a
            total_v += d_v
    if BIAS:
        tl.store(partial + chunk * 2 * D + cols, tl.sum(total_a, axis=0), mask=inside)
        tl.store(partial + chunk * 2 * D + D + cols, tl.sum(total_v, axis=0), mask=inside)


@triton_op("fastdit::swiglu")
def _op(x: Tensor, bias: Tensor | None) -> Tensor:
    rows = as_rows(x)
    m, d = rows.shape[0], rows.shape[1] // 2
    y = torch.empty((*x.shape[:-1], d), dtype=x.dtype, device=x.device)
    if x.numel():
        bias = None if bias is None else unit_stride(bias)
        c = column_block(d)
        tile = TILE // c
        with on_device(x):
            wrap_triton(_swiglu_forward)[(cdiv(m, tile * FORWARD_TILES) * cdiv(d, c),)](
                rows, bias, y, m, rows.stride(0),
                BIAS=int(bias is not None), D=d, C=c, ROWS=tile, STEPS=FORWARD_TILES, STAGES=STAGES, num_warps=8,
            )  # fmt: skip
    return y


@triton_op("fastdit::swiglu_backward")
def _op_backward(d_y: Tensor, x: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """-> d_x; y (empty unless keep); (1, chunks, 2D) fp32 partial sums of d_bias (no chunks without a bias)."""
    d_rows, rows = as_rows(d_y), as_rows(x)
    m, d = d_rows.shape
    c = column_block(d)
    tile = TILE // c
    steps = cdiv(BACKWARD_ROWS, tile)
    chunks = cdiv(m, tile * steps)
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty(d_y.shape if keep else (0,), dtype=x.dtype, device=x.device)
    partial = torch.empty((1, 0 if bias is None else chunks, 2 * d), dtype=torch.float32, device=x.device)
    if x.numel():
        bias = None if bias is None else unit_stride(bias)
        with on_device(x):
            wrap_triton(_swiglu_backward)[(chunks * cdiv(d, c),)](
                d_rows, rows, bias, d_x, y, partial, m, d_rows.stride(0), rows.stride(0),
                BIAS=int(bias is not None), KEEP=int(keep), D=d, C=c,
                ROWS=tile, STEPS=steps, STAGES=STAGES, num_warps=8,
            )  # fmt: skip
    return d_x, y, partial


def backward(d_y: Tensor, x: Tensor, bias: Tensor | None, keep: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """-> d_x, y (where kept), d_bias."""
    d_x, y, partial = _op_backward(d_y, x, bias, keep)
    return d_x, y, None if bias is None else sum_chunks(partial, bias.dtype)[0]


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grad(ctx: Any, d_y: Tensor) -> tuple:
    d_x, _, d_bias = backward(d_y, *ctx.saved_tensors)
    return d_x, d_bias


_op.register_autograd(_grad, setup_context=_setup)


def swiglu_triton(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return _op(x, bias)


def swiglu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """silu(a) v, where [a, v] = x + bias: x (..., 2D), bias (2D,) or None -> (..., D), x's dtype."""
    if x.shape[-1] % 2:
        raise ValueError(f"x has {x.shape[-1]} columns; give it an even number, gates then values")
    if bias is not None:
        check("bias", bias, x.shape[-1])
    return (swiglu_triton if use_triton("swiglu", x.device.type, x.dtype) else swiglu_eager)(x, bias)


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    n, t, d = shape
    return random_inputs(seed, dtype, device, x=(n, t, 2 * d), bias=(2 * d,))


def minimum_bytes(shape: tuple[int, int, int], size: int) -> tuple[int, int]:
    n, t, d = shape
    return (3 * n * t * d + 2 * d) * size, (5 * n * t * d + 4 * d) * size


OP = Op(
    "swiglu", swiglu_eager, swiglu_triton, swiglu, inputs,
    tiny=(2, 3, 5), shapes=((3, 41, 72), (1, 64, 1536)), real=((256, 256, 3072),), minimum_bytes=minimum_bytes,
)  # fmt: skip
