"""GELU in the epilogue of the MLP's products, beside a product and fastdit's GELU kernel.

    python -m bench.epilogue --out DIR      on a GPU: errors, and milliseconds at DiT-XL/2's shape
    python -m bench.epilogue                without one: what the compiler makes of each tile for sm_90

`python -m bench.step --contestants fastdit-all-on fastdit-cublaslt fastdit-triton` times whole training steps.

A time is written only if the errors against fp64, at a smaller shape, are at most twice those of eager PyTorch in bf16.
`product` is the product alone, without bias and GELU: what an epilogue that costs nothing would take.
"""

import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.epilogue import tiles
from bench.epilogue.mlp import WAYS, Pair, eager_down, eager_up
from bench.kernels.__main__ import measure
from bench.kernels.compare import errors
from bench.record import markdown, parser, record
from fastdit.kernels import gelu, runtime

ROWS, WIDTH, HIDDEN = 256 * 256, 1152, 4608  # DiT-XL/2, 256 images of 256 tokens
BLOCKS = 28
SETS = 3  # of inputs, taken in turn: 0.75 GB each, many times the L2 cache


def inputs(direction: str, rows: int, device: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """Random arguments of `up` or `down`, of the sizes that they have in a network."""
    sizes = {"up": ((rows, WIDTH), (HIDDEN, WIDTH), (HIDDEN,)),
             "down": ((rows, WIDTH), (WIDTH, HIDDEN), (rows, HIDDEN))}  # fmt: skip
    first, weight, last = sizes[direction]
    return tuple(torch.randn(size, device=device, dtype=dtype) * std
                 for size, std in ((first, 1), (weight, WIDTH**-0.5), (last, 1)))  # fmt: skip


def complaints(direction: str, function: Callable[..., Pair], device: str = "cuda") -> tuple[list[str], bool]:
    """What is wrong with results for 1,000 rows, which no tile divides; whether a second run has the same bits."""
    eager = {"up": eager_up, "down": eager_down}[direction]
    given = inputs(direction, 1000, device)
    exact, plain, found = eager(*(v.double() for v in given)), eager(*given), function(*given)
    wrong = []
    for i, results in enumerate(zip(found, plain, exact, strict=True)):
        (ours, _), (theirs, _) = (errors(result, results[2]) for result in results[:2])
        if not ours <= 2 * theirs:  # NaN never passes
            wrong.append(f"result {i}: error {ours:.2e}, eager's {theirs:.2e}")
    return wrong, all(map(torch.equal, found, function(*given)))


def apart(direction: str) -> dict[str, Callable]:
    """The product alone, and what fastdit does now: a product and the GELU kernel, which sums the bias gradient too."""
    if direction == "up":
        return {"product": lambda x, w, b: x @ w.T, "apart": lambda x, w, b: gelu(x @ w.T, b)}
    zeros = torch.zeros(HIDDEN, device="cuda", dtype=torch.bfloat16)

    def backward(d_y: Tensor, w: Tensor, u: Tensor) -> Pair:
        d_u, _, partial = torch.ops.fastdit.gelu_backward(d_y @ w, u, zeros, False)
        return d_u, partial.sum(1)

    return {"product": lambda d_y, w, u: d_y @ w, "apart": backward}


def timed(out: Path | None) -> None:
    rows = [["direction", "way", "ms", "ms of a step", "of the product's rate"]]
    for direction in ("up", "down"):
        sets = [inputs(direction, ROWS, "cuda") for _ in range(SETS)]
        ways = {"cublaslt": WAYS["cublaslt"][direction == "down"]}
        ways |= {f"{tile}": functools.partial(getattr(tiles, direction), tile=tile) for tile in tiles.TILES}
        alone = None
        for name, function in (apart(direction) | ways).items():
            try:
                wrong, same_bits = complaints(direction, function) if name in ways else ([], True)
                if wrong:
                    raise ValueError("; ".join(wrong))
                ms = measure([functools.partial(function, *each) for each in sets], 60)[0]
            except Exception as error:  # a compiler's, the library's, or wrong results: the others go on
                record("epilogue", out, direction=direction, way=name, failed=f"{error}"[:300])
                continue
            alone = alone or ms
            share = round(100 * alone / ms, 1)
            record("epilogue", out, direction=direction, way=name, rows=ROWS, ms=round(ms, 4),
                   step_ms=round(BLOCKS * ms, 2), percent_of_product=share, deterministic=same_bits)  # fmt: skip
            rows.append([direction, name, f"{ms:.3f}", f"{BLOCKS * ms:.1f}", f"{share} %"])
    if out:
        (out / "products.md").write_text("## Products with GELU in their epilogue\n\n" + markdown(rows))


def compiled(direction: str, tile: tiles.Tile) -> dict:
    """Registers, spills, shared memory and instructions of a kernel for sm_90."""
    from triton import compile
    from triton.backends.compiler import GPUTarget

    from bench.static.cuda_target import cuobjdump, resources
    from bench.static.kernels import access_widths, source

    with runtime.record_launches() as launches:
        getattr(tiles, direction)(*inputs(direction, ROWS, "meta"), tile)
    kernel, _, arguments, constants = launches[0]
    src, options = source(kernel, arguments, constants)
    made = compile(src, target=GPUTarget("cuda", 90, 32), options=options)
    sass, (registers, stack) = cuobjdump(made.asm["cubin"], "-sass"), resources(made.asm["cubin"])
    counts = {name: len(re.findall(rf"\b{name}\b", sass)) for name in ("HGMMA", "UTMALDG", "UTMASTG")}
    return {"registers": registers, "spills": stack + access_widths(sass)["local"], "shared": made.metadata.shared,
            **counts}  # fmt: skip


def main() -> None:
    arguments = parser(__doc__).parse_args()
    if torch.cuda.is_available():
        with torch.cuda.stream(torch.cuda.Stream()):  # graphs are not captured on the default one
            timed(arguments.out)
        return
    for direction in ("up", "down"):
        for tile in tiles.TILES:
            line = record("epilogue", arguments.out, direction=direction, way=f"{tile}", **compiled(direction, tile))
            if line["spills"]:
                sys.exit(f"error: {direction} with {tile} spills")


if __name__ == "__main__":
    main()
