"""fp8_cast: a matrix in FP8, stored in both layouts, and its largest magnitude (Micikevicius et al. 2022).

Hopper's FP8 products need the dimension that is summed to be contiguous in both operands. The input of a linear is
summed over its columns in the forward product and over its rows in the gradient of the weight, so every operand is
needed row by row and column by column. One pass writes both. It scales by a factor that is known before (see
models/fp8.py), saturates, and returns the largest magnitude that it saw, from which later factors are computed. NaN
stays NaN, and infinity saturates, but is seen in the largest magnitude.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .runtime import HAS_TRITON, INTERPRET, cdiv, tl, triton, triton_op, unit_stride, use_triton, wrap_triton
from .tiles import sum_chunks

FORWARD, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
ROWS, COLUMNS, WARPS = 128, 64, 8  # a tile: 128 contiguous bytes per column of the transposed copy
ALIGNED = 16  # bytes: rows of an operand start at multiples of this


def padded(m: int) -> int:
    """Rows of an operand's transposed copy: the products want multiples of 16. The last ones are zero."""
    return cdiv(m, ALIGNED) * ALIGNED


def fp8_cast_eager(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The definition."""
    most = torch.finfo(dtype).max
    rows = (x.float() * scale).clamp(-most, most).to(dtype)
    columns = F.pad(rows.view(torch.uint8).T, (0, padded(len(x)) - len(x))).contiguous().view(dtype)
    return rows, columns, x.abs().amax().float()[None]


# A tile is held as its even and its odd rows, each (ROWS / 2, C). Two rows of a column make one 16-bit value, so that
# it is 16-bit values that are transposed, which is fast. `eights` gives each thread 8 neighboring columns everywhere,
# so that nothing else moves between threads.
ASSEMBLER = tl.constexpr(not INTERPRET) if HAS_TRITON else None


@triton.jit
def eights(start, C: tl.constexpr):
    """start + arange(C), of which the compiler sees only 8 as contiguous."""
    return start + tl.arange(0, C) // 8 * 8 + tl.arange(0, C) % 8


@triton.jit
def in_one(even, odd, dtype: tl.constexpr):
    """Both in FP8, `even` in the low byte of an int16.

    One instruction. It is written out because ptxas 12.8 miscompiles FP8 values that are stored as they are and also
    taken apart into bytes.
    """
    if not ASSEMBLER:  # in the interpreter
        low, high = even.to(dtype).to(tl.uint8, bitcast=True), odd.to(dtype).to(tl.uint8, bitcast=True)
        return low.to(tl.int16) | (high.to(tl.int16) << 8)
    if dtype == tl.float8e4nv:
        return tl.inline_asm_elementwise(
            "cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;", "=h,f,f", [even, odd], dtype=tl.int16, is_pure=True, pack=1
        )
    return tl.inline_asm_elementwise(
        "cvt.rn.satfinite.e5m2x2.f32 $0, $2, $1;", "=h,f,f", [even, odd], dtype=tl.int16, is_pure=True, pack=1
    )


@triton.jit
def _store_columns(value, columns, pair, at, cols, PAIRS, D: tl.constexpr):
    """Write two rows of each column, 2 (pair + at) and the next, to columns (D, PAIRS) of int16."""
    inside = (cols < D)[:, None] & (pair + at < PAIRS)[None, :]
    tl.store(columns + pair + cols.to(tl.int64)[:, None] * PAIRS + at[None, :], tl.trans(value), mask=inside)


@triton.jit
def store_both(even, odd, rows, columns, pair, at, cols, scale, M, PAIRS, D: tl.constexpr, STRIDE: tl.constexpr):
    """Write a tile, rows 2 (pair + at) and the next, columns `cols`, to rows (M, D) and columns (D, PAIRS) in FP8.

    STRIDE is that of `rows`; `columns` holds two rows in each int16. Returns the largest magnitude. Rows at or past M
    must be zero. The conversion saturates.
    """
    dtype: tl.constexpr = rows.dtype.element_ty
    first, out_even, out_odd = 2 * pair, even * scale, odd * scale
    to = rows + first * STRIDE + 2 * at[:, None] * STRIDE + cols[None, :]
    tl.store(to, out_even.to(dtype), mask=(first + 2 * at < M)[:, None] & (cols < D)[None, :])
    tl.store(to + STRIDE, out_odd.to(dtype), mask=(first + 2 * at + 1 < M)[:, None] & (cols < D)[None, :])
    _store_columns(in_one(out_even, out_odd, dtype), columns, pair, at, cols, PAIRS, D)
    return tl.max(tl.maximum(tl.abs(even), tl.abs(odd)))


@triton.jit
def load_pair(base, pair, at, stride, cols, M, D: tl.constexpr):
    """The rows 2 (pair + at), and the next, as fp32; 0 at or past M and D."""
    first = 2 * pair
    source = base + first * stride + 2 * at[:, None] * stride + cols[None, :]
    even = tl.load(source, mask=(first + 2 * at < M)[:, None] & (cols < D)[None, :], other=0.0)
    odd = tl.load(source + stride, mask=(first + 2 * at + 1 < M)[:, None] & (cols < D)[None, :], other=0.0)
    return even.to(tl.float32), odd.to(tl.float32)


@triton.jit
def _fp8_cast(x, scale, rows, columns, most, partial, M, PAIRS, x_row,
              SUMS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr):  # fmt: skip
    blocks: tl.constexpr = (D + C - 1) // C
    pair = (tl.program_id(0) // blocks).to(tl.int64) * (ROWS // 2)
    at, cols = tl.arange(0, ROWS // 2), eights((tl.program_id(0) % blocks) * C, C)
    even, odd = load_pair(x, pair, at, x_row, cols, M, D)
    seen = store_both(even, odd, rows, columns, pair, at, cols, tl.load(scale), M, PAIRS, D, D)
    tl.store(most + tl.program_id(0), seen)
    if SUMS:
        chunk = (tl.program_id(0) // blocks).to(tl.int64)
        tl.store(partial + chunk * D + cols, tl.sum(even + odd, axis=0), mask=cols < D)


def operands(m: int, d: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Empty rows (m, d), and columns (d, padded m / 2) as int16."""
    columns = torch.empty((d, padded(m) // 2), dtype=torch.int16, device=device)
    return torch.empty((m, d), dtype=dtype, device=device), columns


@triton_op("fastdit::fp8_cast")
def _op(x: Tensor, scale: Tensor, dtype: torch.dtype, sums: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The last one: (1, chunks, D) fp32 partial sums over rows, no chunks unless `sums`."""
    x = unit_stride(x)
    m, d = x.shape
    partial = torch.empty((1, cdiv(m, ROWS) if sums else 0, d), dtype=torch.float32, device=x.device)
    rows, columns = operands(m, d, dtype, x.device)
    most = torch.empty(cdiv(m, ROWS) * cdiv(d, COLUMNS), dtype=torch.float32, device=x.device)
    wrap_triton(_fp8_cast)[(len(most),)](
        x, scale, rows, columns, most, partial, m, columns.shape[1], x.stride(0),
        SUMS=int(sums), D=d, ROWS=ROWS, C=COLUMNS, num_warps=WARPS,
    )  # fmt: skip
    return rows, columns.view(dtype), most, partial


def fp8_cast(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x (M, D) times scale (1,) in FP8: rows (M, D), columns (D, M up to a multiple of 16), max |x| by part (fp32).

    dtype: torch.float8_e4m3fn or torch.float8_e5m2. Values beyond its range saturate.
    """
    if use_triton("fp8_cast", x.device.type, x.dtype):
        return _op(x, scale, dtype, False)[:3]
    return fp8_cast_eager(x, scale, dtype)


def fp8_cast_and_sum(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `fp8_cast` returns, and the sum of x over its rows (D,) in fp32."""
    if use_triton("fp8_cast", x.device.type, x.dtype):
        rows, columns, most, partial = _op(x, scale, dtype, True)
        return rows, columns, most, sum_chunks(partial, torch.float32)[0]
    return *fp8_cast_eager(x, scale, dtype), x.sum(0, dtype=torch.float32)


@triton.jit
def _fp8_transpose(rows, columns, M, PAIRS, D: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr):
    blocks: tl.constexpr = (D + C - 1) // C
    pair = (tl.program_id(0) // blocks).to(tl.int64) * (ROWS // 2)
    first = 2 * pair
    at, cols = tl.arange(0, ROWS // 2), (tl.program_id(0) % blocks) * C + tl.arange(0, C)
    source = rows + first * D + 2 * at[:, None] * D + cols[None, :]
    even = tl.load(source, mask=(first + 2 * at < M)[:, None] & (cols < D)[None, :], other=0)
    odd = tl.load(source + D, mask=(first + 2 * at + 1 < M)[:, None] & (cols < D)[None, :], other=0)
    _store_columns(even.to(tl.int16) | (odd.to(tl.int16) << 8), columns, pair, at, cols, PAIRS, D)


@triton_op("fastdit::fp8_transpose")
def fp8_transpose(rows: Tensor) -> Tensor:
    """rows (M, D) in FP8 -> columns (D, M up to a multiple of 16), as `fp8_cast` returns them."""
    m, d = rows.shape
    columns = torch.empty((d, padded(m) // 2), dtype=torch.int16, device=rows.device)
    wrap_triton(_fp8_transpose)[(cdiv(m, ROWS) * cdiv(d, ROWS),)](
        rows.view(torch.uint8), columns, m, columns.shape[1], D=d, ROWS=ROWS, C=ROWS, num_warps=WARPS
    )
    return columns.view(rows.dtype)


@triton.jit
def _largest(x, w, y, out, x_size, w_size, y_size, BLOCK: tl.constexpr):
    source, size = x, x_size
    if tl.program_id(0) == 1:
        source, size = w, w_size
    if tl.program_id(0) == 2:
        source, size = y, y_size
    most = tl.zeros([BLOCK], tl.float32)
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        most = tl.maximum(most, tl.load(source + at, mask=at < size, other=0.0))
    tl.store(out + tl.program_id(0), tl.max(most))


@triton_op("fastdit::fp8_largest")
def _op_largest(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    out = torch.empty(3, dtype=torch.float32, device=x.device)
    wrap_triton(_largest)[(3,)](x, w, y, out, len(x), len(w), len(y), BLOCK=4096, num_warps=16)
    return out


def largest(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """The largest of each: what `fp8_cast` saw in the three tensors of a linear -> (3,)."""
    if use_triton("fp8_cast", x.device.type, torch.float32):
        return _op_largest(x, w, y)
    return torch.stack([part.amax() for part in (x, w, y)])
