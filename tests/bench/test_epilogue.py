"""GELU in the epilogue of products (bench/epilogue): the Triton kernels in the interpreter, and the MLP around them."""

import copy
import os
import subprocess
import sys

import pytest
import torch

from bench.epilogue import __main__ as epilogue
from bench.epilogue import mlp, tiles
from bench.kernels.compare import errors, poisoned
from fastdit.kernels.runtime import INTERPRET, tl, triton
from fastdit.models.layers import Mlp
from fastdit.schema import NetworkOptions
from helpers import ROOT

ROWS, WIDTH, HIDDEN = 150, 72, 512  # neither rows nor width are multiples of a tile's


def arguments(direction: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"up": ((ROWS, WIDTH), (HIDDEN, WIDTH), (HIDDEN,)),
              "down": ((ROWS, WIDTH), (WIDTH, HIDDEN), (ROWS, HIDDEN))}  # fmt: skip
    first, weight, last = (torch.randn(shape, generator=generator) for shape in shapes[direction])
    return tuple(v.to(dtype) for v in (first, weight * WIDTH**-0.5, last))


def complaints(direction: str, tile: tiles.Tile, dtype: torch.dtype) -> list[str]:
    """Results whose error against fp64 is more than twice that of eager PyTorch in the same dtype."""
    given, eager = arguments(direction, dtype), {"up": mlp.eager_up, "down": mlp.eager_down}[direction]
    with poisoned():
        found = getattr(tiles, direction)(*given, tile)
    exact, plain = eager(*(v.double() for v in given)), eager(*given)
    pairs = [(errors(ours, truth)[0], errors(theirs, truth)[0])
             for ours, theirs, truth in zip(found, plain, exact, strict=True)]  # fmt: skip
    return [f"{ours:.1e}, eager {theirs:.1e}" for ours, theirs in pairs if not ours <= 2 * theirs]


@pytest.mark.skipif(not INTERPRET, reason="Triton's interpreter stands in for a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tile", tiles.TILES, ids=lambda tile: f"{tile.rows}x{tile.columns}")
@pytest.mark.parametrize("direction", ["up", "down"])
def test_tiles_are_as_exact_as_eager(direction, tile, dtype):
    assert complaints(direction, tile, dtype) == []


@triton.jit
def _swapped(acc):
    half: tl.constexpr = acc.shape[1] // 2
    left, right = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, half)), (0, 2, 1)))
    return right, left


@pytest.mark.skipif(not INTERPRET, reason="Triton's interpreter stands in for a GPU")
@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_planted_bug_is_found(monkeypatch, direction):
    """The epilogue of one quarter works on its neighbor's columns."""
    monkeypatch.setattr(tiles, "_halves", _swapped)
    assert complaints(direction, tiles.TILES[0], torch.float32)


def test_a_width_that_the_tile_does_not_divide_is_refused():
    x, weight, bias = torch.zeros(8, 64), torch.zeros(200, 64), torch.zeros(200)
    with pytest.raises(ValueError, match="200 columns are not a multiple"):
        tiles.up(x, weight, bias, tiles.TILES[0])


def test_the_mlp_has_the_gradients_of_the_plain_one():
    torch.manual_seed(0)
    plain = Mlp(64, NetworkOptions()).double()
    fused = copy.deepcopy(plain)
    fused.fused = lambda module, x: mlp.mlp(module, x, "eager")
    x = torch.randn(3, 16, 64, dtype=torch.float64, requires_grad=True)
    results = []
    for module in (plain, fused):
        out, bias = module(x)
        loss = (out + bias).square().sum()
        results.append([out, *torch.autograd.grad(loss, [x, *module.parameters()])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_kernels_compile_without_spills_and_multiply_on_tensor_cores():
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_INTERPRET": "0"}
    script = ("from bench.epilogue import __main__ as m; from bench.epilogue.tiles import TILES\n"
              "for d in ('up', 'down'): r = m.compiled(d, TILES[0]); assert not r['spills'] and r['HGMMA'] >= 4 and "
              "r['UTMALDG'] and r['UTMASTG'] and r['shared'] <= 232448, r")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_way_that_is_wrong_or_cannot_run_is_not_timed(monkeypatch, tmp_path, capsys):
    """As on a GPU, with a fake clock: cuBLASLt fails, one tile is wrong, the others are recorded."""

    def product(direction, wrong):
        eager = {"up": mlp.eager_up, "down": mlp.eager_down}[direction]

        def run(*given, tile):
            first, second = eager(*given)
            return (first, second + 1) if tile == wrong else (first, second)

        return run

    def fails(*given):
        raise OSError("libcublasLt.so.13: cannot open shared object file")

    monkeypatch.setattr(epilogue, "ROWS", 64)
    monkeypatch.setattr(epilogue, "inputs", lambda direction, rows, device: arguments(direction, torch.float32))
    monkeypatch.setattr(epilogue, "apart", lambda direction: dict.fromkeys(("product", "apart"), print))
    monkeypatch.setattr(epilogue, "measure", lambda calls, ms: [0.5])
    monkeypatch.setitem(mlp.WAYS, "cublaslt", (fails, fails))
    for direction in ("up", "down"):
        monkeypatch.setattr(tiles, direction, product(direction, tiles.TILES[1]))
    epilogue.timed(tmp_path)
    table = (tmp_path / "products.md").read_text()
    assert table.count("| up ") == table.count("| down ") == 5 and "cublaslt" not in table
    assert f"{tiles.TILES[1]}" not in table and f"{tiles.TILES[0]}" in table
    assert "cannot open shared object file" in capsys.readouterr().out
