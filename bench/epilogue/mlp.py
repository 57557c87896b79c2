"""DiT's MLP, fc1 - GELU - fc2, whose two products around the activation apply it in their epilogues.

WAYS lists who computes them: `eager` is the definition, `cublaslt` the library (cublaslt.py), `triton` our kernels
(tiles.py). Each is a pair of functions:

up(x (M, K), weight (N, K), bias (N,)) -> u = x weight^T + bias and gelu(u), (M, N) each
down(d_y (M, K), weight (K, N), u (M, N)) -> d_u = (d_y weight) gelu'(u) (M, N), and its sum over rows (N,)
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.epilogue import cublaslt, tiles
from fastdit.models.dit import DiT
from fastdit.models.layers import Mlp

Pair = tuple[Tensor, Tensor]


def eager_up(x: Tensor, weight: Tensor, bias: Tensor) -> Pair:
    u = F.linear(x, weight, bias)
    return u, F.gelu(u, approximate="tanh")


def eager_down(d_y: Tensor, weight: Tensor, u: Tensor) -> Pair:
    d_u = torch.ops.aten.gelu_backward(d_y @ weight, u, approximate="tanh")
    return d_u, d_u.sum(0)


def fastest_tile(function: Callable, columns: Callable[..., int]) -> Callable[..., Pair]:
    """`function` with its fastest tile, which is found at the first call for a shape; that one must not be captured."""
    best: dict[tuple, Callable] = {}

    def run(*tensors: Tensor) -> Pair:
        key = tuple(tensors[0].shape), tuple(tensors[1].shape)
        if key not in best:
            fitting = [tile for tile in tiles.TILES if columns(*tensors) % tile.columns == 0]
            candidates = {functools.partial(function, *tensors, tile): tile for tile in fitting}
            best[key] = functools.partial(function, tile=candidates[cublaslt.fastest(list(candidates))])
        return best[key](*tensors)

    return run


WAYS: dict[str, tuple[Callable[..., Pair], Callable[..., Pair]]] = {
    "eager": (eager_up, eager_down),
    "cublaslt": (cublaslt.up, cublaslt.down),
    "triton": (
        fastest_tile(tiles.up, lambda x, weight, bias: len(weight)),
        fastest_tile(tiles.down, lambda d_y, weight, u: u.shape[1]),
    ),
}


@torch.library.custom_op("fastdit_bench::up", mutates_args=())
def up(x: Tensor, weight: Tensor, bias: Tensor, way: str) -> Pair:
    return WAYS[way][0](x, weight, bias)


@torch.library.custom_op("fastdit_bench::down", mutates_args=())
def down(d_y: Tensor, weight: Tensor, u: Tensor, way: str) -> Pair:
    return WAYS[way][1](d_y, weight, u)


@up.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, way: str) -> Pair:
    return x.new_empty(len(x), len(weight)), x.new_empty(len(x), len(weight))


@down.register_fake
def _(d_y: Tensor, weight: Tensor, u: Tensor, way: str) -> Pair:
    return torch.empty_like(u), u.new_empty(u.shape[1])


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, way: str) -> Tensor:
        u, y = up(x, w1, b1, way)
        ctx.save_for_backward(x, w1, w2, u, y)
        ctx.way = way
        return y @ w2.T

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple:
        x, w1, w2, u, y = ctx.saved_tensors
        d_out = d_out.contiguous()
        d_u, d_b1 = down(d_out, w2, u, ctx.way)
        return d_u @ w1, d_u.T @ x, d_b1, d_out.T @ y, None


def mlp(module: Mlp, x: Tensor, way: str) -> Tensor:
    """(N, T, D) -> the MLP's output without its last bias, in the dtype of autocast where that is on."""
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    weights = (v.to(dtype) for v in (module.fc1.weight, module.fc1.bias, module.fc2.weight))
    with torch.autocast(x.device.type, enabled=False):
        return _Mlp.apply(x.to(dtype).flatten(0, 1).contiguous(), *weights, way).unflatten(0, x.shape[:2])


def use_epilogues(model: DiT, way: str) -> None:
    """Compute the MLPs of the blocks in this way, in place."""
    for block in model.blocks:
        block.mlp.fused = functools.partial(mlp, way=way)
