"""gelu: y = gelu(x + bias), the tanh form (Hendrycks & Gimpel 2016), with the bias gradient in the same backward pass.

gelu(u) = u sigmoid(2 sqrt(2/pi) (u + 0.044715 u^3)): one exponential, no tanh. Forward reads x and writes y; backward
reads d_y and x and writes d_x, and y again where it is wanted (see gelu_linear), so that nobody needs to keep it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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

TILE = 4096  # elements a program holds at once, in 8 warps: two 16-byte accesses a thread and tensor
FORWARD_TILES = 4  # tiles a program: enough to spare most re-reads of the bias
BACKWARD_ROWS = 128  # rows a program sums before it writes its share of the bias gradient
STAGES = 3


def gelu_eager(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition: tanh-GELU of x + bias."""
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@triton.jit
def _gate(u):
    """sigmoid(2 sqrt(2/pi) (u + 0.044715 u^3)) and its derivative, where 1 - gate is a product: it would cancel."""
    square = u * u
    power = tl.exp(tl.minimum(u * (-1.5957691216057308 - 0.07135481282553 * square), 80.0))
    gate = 1.0 / (1.0 + power)
    return gate, gate * gate * power * (1.5957691216057308 + 0.21406443847659 * square)


@triton.jit
def _gelu_forward(
    x, bias, y, M, x_row, BIAS: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (D + C - 1) // C
    first = (tl.program_id(0) // blocks).to(tl.int64) * (ROWS * STEPS)
    cols = (tl.program_id(0) % blocks) * C + tl.arange(0, C)
    inside = cols < D
    if BIAS:
        b = load_columns(bias, cols, inside)
    for step in tl.range(STEPS, num_stages=STAGES):
        rows = step * ROWS + tl.arange(0, ROWS)
        mask = (first + rows < M)[:, None] & inside[None, :]
        u = load(x + first * x_row, rows, x_row, cols, mask)
        if BIAS:
            u += b[None, :]
        gate, _ = _gate(u)
        store(y + first * D, rows, D, cols, mask, u * gate)


@triton.jit
def _gelu_backward(
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
        b = load_columns(bias, cols, inside)
        total = tl.zeros([ROWS, C], tl.float32)
    for step in tl.range(STEPS, num_stages=STAGES):
        rows = step * ROWS + tl.arange(0, ROWS)
        mask = (first + rows < M)[:, None] & inside[None, :]
        u = load(x + first * x_row, rows, x_row, cols, mask)
        if BIAS:
            u += b[None, :]
        gate, slope = _gate(u)
        d_u = load(d_y + first * dy_row, rows, dy_row, cols, mask) * (gate + u * slope)
        store(d_x + first * D, rows, D, cols, mask, d_u)
        if KEEP:
            store(y + first * D, rows, D, cols, mask, u * gate)
        if BIAS:
            total += d_u
    if BIAS:
        tl.store(partial + chunk * D + cols, tl.sum(total, axis=0), mask=inside)


@triton_op("fastdit::gelu")
def _op(x: Tensor, bias: Tensor | None) -> Tensor:
    rows = as_rows(x)
    m, d = rows.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        bias = None if bias is None else unit_stride(bias)
        c = column_block(d)
        tile = TILE // c
        with on_device(x):
            wrap_triton(_gelu_forward)[(cdiv(m, tile * FORWARD_TILES) * cdiv(d, c),)](
                rows, bias, y, m, rows.stride(0),
                BIAS=int(bias is not None), D=d, C=c, ROWS=tile, STEPS=FORWARD_TILES, STAGES=STAGES, num_warps=8,
            )  # fmt: skip
    return y


@triton_op("fastdit::gelu_backward")
def _op_backward(d_y: Tensor, x: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """-> d_x; y (empty unless keep); (1, chunks, D) fp32 partial sums of d_bias (no chunks without a bias)."""
    d_rows, rows = as_rows(d_y), as_rows(x)
    m, d = rows.shape
    c = column_block(d)
    tile = TILE // c
    steps = cdiv(BACKWARD_ROWS, tile)
    chunks = cdiv(m, tile * steps)
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty(x.shape if keep else (0,), dtype=x.dtype, device=x.device)
    partial = torch.empty((1, 0 if bias is None else chunks, d), dtype=torch.float32, device=x.device)
    if x.numel():
        bias = None if bias is None else unit_stride(bias)
        with on_device(x):
            wrap_triton(_gelu_backward)[(chunks * cdiv(d, c),)](
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


def gelu_triton(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return _op(x, bias)


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """tanh-GELU of x + bias: x (..., D), bias (D,) of the linear that made x, or None -> (..., D), x's dtype."""
    if bias is not None:
        check("bias", bias, x.shape[-1])
    return (gelu_triton if use_triton("gelu", x.device.type, x.dtype) else gelu_eager)(x, bias)


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    return random_inputs(seed, dtype, device, x=shape, bias=shape[-1:])


def minimum_bytes(shape: tuple[int, int, int], size: int) -> tuple[int, int]:
    n, t, d = shape
    return (2 * n * t * d + d) * size, (3 * n * t * d + 2 * d) * size


OP = Op(
    "gelu", gelu_eager, gelu_triton, gelu, inputs,
    tiny=(2, 3, 5), shapes=((3, 41, 72), (1, 64, 1536), (5, 41, 64), (1, 1024, 96)),
    real=((256, 256, 1536), (256, 256, 4608)), minimum_bytes=minimum_bytes,
)  # fmt: skip
