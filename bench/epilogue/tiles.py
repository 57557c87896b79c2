"""The MLP's products in Triton: the epilogue adds the bias and applies GELU, or multiplies by GELU's derivative.

A program computes every PROGRAMS-th tile. The loops over tiles and over the summed dimension are flattened into one, so
the first loads of a tile run during the epilogue of the previous one. Operands and results pass through the tensor
memory accelerator (TMA), which reads zeros beyond the last row and does not write there. The epilogue takes a quarter
of the columns at a time: its temporaries then fit into registers beside the accumulator (174 of 255, no spills).
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from fastdit.kernels.gelu import _gelu
from fastdit.kernels.runtime import cdiv, tl, triton, wrap_triton
from fastdit.kernels.tiles import sum_chunks

MULTIPROCESSORS = 132  # of an H100 and an H200
DEPTH = 64  # of a load: 128 bytes in bf16, as wide as TMA swizzles


@dataclasses.dataclass(frozen=True)
class Tile:
    """Rows and columns of a tile, warps per program, loads ahead, programs per multiprocessor."""

    rows: int
    columns: int
    warps: int
    stages: int
    per_multiprocessor: int


TILES = (Tile(128, 256, 8, 4, 1), Tile(256, 128, 8, 4, 1), Tile(128, 128, 4, 3, 2), Tile(64, 256, 4, 2, 2))


@triton.jit
def _halves(acc):
    """The left and the right half of the columns."""
    half: tl.constexpr = acc.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, half)), (0, 2, 1)))


@triton.jit
def _finish_up(acc, bias, us, ys, row, col):
    u = acc + tl.load(bias + col + tl.arange(0, acc.shape[1])).to(tl.float32)[None, :]
    y, _ = _gelu(u)
    us.store([row, col], u.to(us.dtype))
    ys.store([row, col], y.to(ys.dtype))


@triton.jit
def _finish_down(acc, us, ds, partial, row, col):
    _, slope = _gelu(us.load([row, col]).to(tl.float32))
    d_u = acc * slope
    ds.store([row, col], d_u.to(ds.dtype))
    tl.store(partial + col + tl.arange(0, acc.shape[1]), tl.sum(d_u, axis=0))


@triton.jit
def _up(x, w, bias, u, y, M, N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
        DEPTH: tl.constexpr, PROGRAMS: tl.constexpr):  # fmt: skip
    QUARTER: tl.constexpr = COLUMNS // 4
    xs = tl.make_tensor_descriptor(x, [M, K], [K, 1], [ROWS, DEPTH])
    ws = tl.make_tensor_descriptor(w, [N, K], [K, 1], [COLUMNS, DEPTH])
    us = tl.make_tensor_descriptor(u, [M, N], [N, 1], [ROWS, QUARTER])
    ys = tl.make_tensor_descriptor(y, [M, N], [N, 1], [ROWS, QUARTER])
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, ROWS) * (N // COLUMNS), PROGRAMS, flatten=True):
        row = tile // (N // COLUMNS) * ROWS
        col = tile % (N // COLUMNS) * COLUMNS
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, K, DEPTH):
            acc = tl.dot(xs.load([row, k]), ws.load([col, k]).T, acc, input_precision="ieee")
        left, right = _halves(acc)
        first, second = _halves(left)
        _finish_up(first, bias, us, ys, row, col)
        _finish_up(second, bias, us, ys, row, col + QUARTER)
        third, fourth = _halves(right)
        _finish_up(third, bias, us, ys, row, col + 2 * QUARTER)
        _finish_up(fourth, bias, us, ys, row, col + 3 * QUARTER)


@triton.jit
def _down(d_y, w, u, d_u, partial, M, N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
          DEPTH: tl.constexpr, PROGRAMS: tl.constexpr):  # fmt: skip
    QUARTER: tl.constexpr = COLUMNS // 4
    gs = tl.make_tensor_descriptor(d_y, [M, K], [K, 1], [ROWS, DEPTH])
    ws = tl.make_tensor_descriptor(w, [K, N], [N, 1], [DEPTH, COLUMNS])
    us = tl.make_tensor_descriptor(u, [M, N], [N, 1], [ROWS, QUARTER])
    ds = tl.make_tensor_descriptor(d_u, [M, N], [N, 1], [ROWS, QUARTER])
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, ROWS) * (N // COLUMNS), PROGRAMS, flatten=True):
        row = tile // (N // COLUMNS) * ROWS
        col = tile % (N // COLUMNS) * COLUMNS
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, K, DEPTH):
            acc = tl.dot(gs.load([row, k]), ws.load([k, col]), acc, input_precision="ieee")
        sums = partial + tile // (N // COLUMNS) * N
        left, right = _halves(acc)
        first, second = _halves(left)
        _finish_down(first, us, ds, sums, row, col)
        _finish_down(second, us, ds, sums, row, col + QUARTER)
        third, fourth = _halves(right)
        _finish_down(third, us, ds, sums, row, col + 2 * QUARTER)
        _finish_down(fourth, us, ds, sums, row, col + 3 * QUARTER)


def _launch(kernel: Callable, tensors: tuple[Tensor, ...], m: int, n: int, k: int, tile: Tile) -> None:
    if n % tile.columns:
        raise ValueError(f"{n} columns are not a multiple of {tile}'s")
    if tensors[0].is_cuda:  # for the TMA descriptors; a setting of the thread, and backward passes have their own
        triton.set_allocator(lambda size, *_: torch.empty(size, dtype=torch.int8, device=tensors[0].device))
    programs = min(tile.per_multiprocessor * MULTIPROCESSORS, cdiv(m, tile.rows) * (n // tile.columns))
    wrap_triton(kernel, traced=False)[(programs,)](
        *tensors, m, N=n, K=k, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=DEPTH, PROGRAMS=programs,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def up(x: Tensor, weight: Tensor, bias: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """x (M, K), weight (N, K), bias (N,) -> u = x weight^T + bias and gelu(u), (M, N) each."""
    (m, k), n = x.shape, len(weight)
    u, y = (torch.empty(m, n, dtype=x.dtype, device=x.device) for _ in range(2))
    _launch(_up, (x, weight, bias, u, y), m, n, k, tile)
    return u, y


def down(d_y: Tensor, weight: Tensor, u: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """d_y (M, K), weight (K, N), u (M, N) -> d_u = (d_y weight) gelu'(u) (M, N), and its sum over rows (N,)."""
    (m, k), n = d_y.shape, u.shape[1]
    d_u = torch.empty_like(u)
    partial = torch.empty(1, cdiv(m, tile.rows), n, dtype=torch.float32, device=u.device)
    _launch(_down, (d_y, weight, u, d_u, partial), m, n, k, tile)
    return d_u, sum_chunks(partial, u.dtype)[0]
