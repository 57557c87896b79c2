"""What elementwise activations share: y = f(x + bias) or f(a + bias_a) (v + bias_v), alone or followed by a linear.

The file of an activation holds f with its derivative and two kernels that only call `activation_forward` and
`activation_backward`; `activation` turns them into two ops. The forward pass reads x and writes y. The backward pass
reads d_y and x, writes d_x and sums the gradient of the bias.

A linear saves its input for the gradient of its weight, and after an activation that input is the widest tensor of a
block. The second op, linear(y), saves x instead of y: the backward pass of the activation reads x anyway and
recomputes y. One extra write replaces a saved activation, a third of a block's memory.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .runtime import Op, cdiv, check, random_inputs, tl, triton, triton_op, unit_stride, use_triton, wrap_triton
from .tiles import load, load_columns, store, sum_chunks

TILE = 4096  # elements of x that a program holds at once, in 8 warps: two 16-byte accesses per thread and tensor
FORWARD_TILES = 4  # tiles per program (twice as many if gated): enough to avoid most re-reads of the bias
BACKWARD_ROWS = 128  # rows a program sums before it writes its share of the bias gradient
STAGES = 3


@triton.jit
def activation_forward(
    f, x, bias, y, M, x_row, BIAS: tl.constexpr, HALVES: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (D + C - 1) // C
    first = (tl.program_id(0) // blocks).to(tl.int64) * (ROWS * STEPS)
    cols = (tl.program_id(0) % blocks) * C + tl.arange(0, C)
    inside = cols < D
    if BIAS:
        bias_a = load_columns(bias, cols, inside)
        if HALVES == 2:
            bias_v = load_columns(bias + D, cols, inside)
    for step in tl.range(STEPS, num_stages=STAGES):
        rows = step * ROWS + tl.arange(0, ROWS)
        mask = (first + rows < M)[:, None] & inside[None, :]
        a = load(x + first * x_row, rows, x_row, cols, mask)
        if HALVES == 2:
            v = load(x + first * x_row + D, rows, x_row, cols, mask)
        if BIAS:
            a += bias_a[None, :]
            if HALVES == 2:
                v += bias_v[None, :]
        value, _ = f(a)
        if HALVES == 2:
            value *= v
        store(y + first * D, rows, D, cols, mask, value)


@triton.jit
def activation_backward(
    f, d_y, x, bias, d_x, y, partial, M, dy_row, x_row,
    BIAS: tl.constexpr, KEEP: tl.constexpr, HALVES: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write d_x, y if KEEP, and this program's sum over rows of d_x to partial if BIAS."""
    X: tl.constexpr = HALVES * D
    blocks: tl.constexpr = (D + C - 1) // C
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    first = chunk * (ROWS * STEPS)
    cols = (tl.program_id(0) % blocks) * C + tl.arange(0, C)
    inside = cols < D
    if BIAS:
        bias_a = load_columns(bias, cols, inside)
        total_a = tl.zeros([ROWS, C], tl.float32)
        if HALVES == 2:
            bias_v = load_columns(bias + D, cols, inside)
            total_v = tl.zeros([ROWS, C], tl.float32)
    for step in tl.range(STEPS, num_stages=STAGES):
        rows = step * ROWS + tl.arange(0, ROWS)
        mask = (first + rows < M)[:, None] & inside[None, :]
        a = load(x + first * x_row, rows, x_row, cols, mask)
        if HALVES == 2:
            v = load(x + first * x_row + D, rows, x_row, cols, mask)
        if BIAS:
            a += bias_a[None, :]
            if HALVES == 2:
                v += bias_v[None, :]
        value, slope = f(a)
        dy = load(d_y + first * dy_row, rows, dy_row, cols, mask)
        d_a = (dy * v if HALVES == 2 else dy) * slope
        store(d_x + first * X, rows, X, cols, mask, d_a)
        if HALVES == 2:
            d_v = dy * value
            store(d_x + first * X + D, rows, X, cols, mask, d_v)
            value *= v
        if KEEP:
            store(y + first * D, rows, D, cols, mask, value)
        if BIAS:
            total_a += d_a
            if HALVES == 2:
                total_v += d_v
    if BIAS:
        tl.store(partial + chunk * X + cols, tl.sum(total_a, axis=0), mask=inside)
        if HALVES == 2:
            tl.store(partial + chunk * X + D + cols, tl.sum(total_v, axis=0), mask=inside)


def as_rows(x: Tensor) -> Tensor:
    """(..., D) -> (rows, D), last stride 1; a view where the memory allows one."""
    return unit_stride(x.reshape(-1, x.shape[-1]))


def programs(m: int, d: int, halves: int, steps: int = 0) -> tuple[int, tuple[int], dict[str, int]]:
    """Number of chunks, grid and constants for m rows of y; a chunk is `steps` tiles, by default BACKWARD_ROWS rows.

    A program owns C columns of a chunk: a power of two, which divides d if one in 64..512 does.
    """
    c = next((c for c in (512, 256, 128, 64) if d % c == 0), min(1 << (d - 1).bit_length(), 512))
    rows = TILE // halves // c
    steps = steps or cdiv(BACKWARD_ROWS, rows)
    chunks = cdiv(m, rows * steps)
    constants = {"HALVES": halves, "D": d, "C": c, "ROWS": rows, "STEPS": steps, "STAGES": STAGES, "num_warps": 8}
    return chunks, (chunks * cdiv(d, c),), constants


def register(name: str, forward: Any, backward: Any, halves: int) -> tuple[Callable, Callable]:
    """Differentiable op fastdit::`name`, (x, bias) -> y, and its backward (d_y, x, bias, keep) -> d_x, y, d_bias."""

    @triton_op(f"fastdit::{name}")
    def op(x: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = as_rows(x)
        m, d = rows.shape[0], rows.shape[1] // halves
        bias = unit_stride(bias)
        y = torch.empty((*x.shape[:-1], d), dtype=x.dtype, device=x.device)
        _, grid, constants = programs(m, d, halves, FORWARD_TILES * halves)
        wrap_triton(forward)[grid](rows, bias, y, m, rows.stride(0), BIAS=int(bias is not None), **constants)
        return y

    @triton_op(f"fastdit::{name}_backward")
    def op_backward(d_y: Tensor, x: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
        """-> d_x; y (empty unless keep); (1, chunks, halves * D) fp32 partial sums of d_bias (no chunks if no bias)."""
        d_rows, rows = as_rows(d_y), as_rows(x)
        m, d = d_rows.shape
        bias = unit_stride(bias)
        chunks, grid, constants = programs(m, d, halves)
        d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        y = torch.empty(d_y.shape if keep else (0,), dtype=x.dtype, device=x.device)
        partial = torch.empty((1, 0 if bias is None else chunks, halves * d), dtype=torch.float32, device=x.device)
        wrap_triton(backward)[grid](
            d_rows, rows, bias, d_x, y, partial, m, d_rows.stride(0), rows.stride(0),
            BIAS=int(bias is not None), KEEP=int(keep), **constants,
        )  # fmt: skip
        return d_x, y, partial

    def gradients(d_y: Tensor, x: Tensor, bias: Tensor | None, keep: bool = False) -> tuple[Tensor | None, ...]:
        d_x, y, partial = op_backward(d_y, x, bias, keep)
        return d_x, y, None if bias is None else sum_chunks(partial, bias.dtype)[0]

    def setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    op.register_autograd(lambda ctx, d_y: gradients(d_y, *ctx.saved_tensors)[::2], setup_context=setup)
    return op, gradients


class _ActivationLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, bias: Tensor | None, weight: Tensor, out_bias: Tensor | None, op: Callable, gradients: Callable
    ) -> Tensor:
        y = op(x, bias)
        return F.linear(y, weight.to(y.dtype), None if out_bias is None else out_bias.to(y.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, bias, weight, out_bias, _, ctx.gradients = inputs
        ctx.out_bias = None if out_bias is None else out_bias.dtype
        ctx.save_for_backward(x, bias, weight)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple:
        x, bias, weight = ctx.saved_tensors
        d_x, y, d_bias = ctx.gradients(d_out @ weight.to(d_out.dtype), x, bias, keep=True)
        rows = d_out.reshape(-1, d_out.shape[-1])
        d_weight = (rows.T @ y.reshape(-1, y.shape[-1])).to(weight.dtype)
        d_out_bias = None if ctx.out_bias is None else rows.sum(0, dtype=torch.float32).to(ctx.out_bias)
        return d_x, d_bias, d_weight, d_out_bias, None, None


def activation(
    name: str, eager: Callable, forward: Any, backward: Any, halves: int = 1,
    shapes: tuple[tuple[int, int, int], ...] = ((3, 41, 72), (1, 16, 1536)),
    real: tuple[tuple[int, int, int], ...] = ((256, 256, 4608),),
) -> tuple[Op, Op]:  # fmt: skip
    """The ops `name` and `name`_linear.

    The kernels pass on an f that returns f(u) and f'(u). halves = 1: y = f(x + bias). halves = 2: y = f(a) v, where a
    and v are the halves of x + bias. shapes and real are shapes (N, T, D) of y.
    """
    op, gradients = register(name, forward, backward, halves)

    def use(name: str, x: Tensor, bias: Tensor | None) -> bool:
        if x.shape[-1] % halves:
            raise ValueError(f"x has {x.shape[-1]} columns; give it an even number, gates then values")
        check("bias", bias, x.shape[-1])
        return use_triton(name, x.device.type, x.dtype)

    def public(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return (op if use(name, x, bias) else eager)(x, bias)

    def linear_eager(x: Tensor, bias: Tensor | None, weight: Tensor, out_bias: Tensor | None = None) -> Tensor:
        return F.linear(eager(x, bias), weight, out_bias)

    def linear_triton(x: Tensor, bias: Tensor | None, weight: Tensor, out_bias: Tensor | None = None) -> Tensor:
        return _ActivationLinear.apply(x, bias, weight, out_bias, op, gradients)

    def linear(x: Tensor, bias: Tensor | None, weight: Tensor, out_bias: Tensor | None = None) -> Tensor:
        check("weight", weight, weight.shape[0], x.shape[-1] // halves)
        return (linear_triton if use(f"{name}_linear", x, bias) else linear_eager)(x, bias, weight, out_bias)

    def inputs(
        shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu", seed: int = 0, linear: bool = False
    ) -> dict[str, Any]:
        n, t, d = shape
        weights = {"weight": (d // 2, d), "out_bias": (d // 2,)} if linear else {}
        return random_inputs(seed, dtype, device, x=(n, t, halves * d), bias=(halves * d,), **weights)

    def minimum_bytes(shape: tuple[int, int, int], size: int) -> tuple[int, int]:
        n, t, d = shape
        x, y, bias = n * t * halves * d, n * t * d, halves * d
        return (x + y + bias) * size, (2 * x + y + 2 * bias) * size

    wide = f"{halves if halves > 1 else ''}D"
    arguments = f"x (..., {wide}), bias ({wide},) of the linear that made x, or None"
    public.__doc__ = f"{name}(x + bias): {arguments} -> (..., D), x's dtype. ValueError where shapes do not fit."
    linear.__doc__ = (
        f"linear({name}(x + bias)): {arguments}, weight (E, D), out_bias (E,) or None -> (..., E).\n\n"
        f"Keeps x for the backward pass, not the activation. ValueError where shapes do not fit."
    )
    for fn, called in ((public, name), (linear, f"{name}_linear")):
        fn.__name__ = fn.__qualname__ = called
    return Op(
        name, eager, op, public, inputs, tiny=(2, 3, 5), shapes=shapes, real=real, minimum_bytes=minimum_bytes,
        writes=(("y",), ("d_x", "partial"), ("out",)), variants=({"bias": None},),
    ), Op(
        f"{name}_linear", linear_eager, linear_triton, linear, functools.partial(inputs, linear=True),
        tiny=(2, 3, 6), shapes=shapes[:1], real=(), minimum_bytes=minimum_bytes,
        writes=(("y",), ("d_x", "y", "partial"), ("out",)), variants=({"bias": None, "out_bias": None},),
    )  # fmt: skip
