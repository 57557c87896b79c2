"""Each fused op against the memory's speed, eager, torch.compile and the public peers that are installed.

    python bench/kernels.py --out DIR      on a GPU: correctness first, then times; JSON lines into DIR/kernels.jsonl
    python bench/kernels.py --static       without one: what the compiler made of every kernel, as a table

A time is written only after the op's correctness, at that very shape and dtype, passed in the same run. `percent` is
of a plain copy's GB/s measured in this run, counting for the op the fewest bytes it could move. Forward and backward
are timed apart, on inputs several times the L2 cache, which is flushed between runs.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
if importlib.util.find_spec("fastdit.kernels") is None:  # a bare checkout: map the folder as setup.py does
    spec = importlib.util.spec_from_file_location("fastdit.kernels", ROOT / "kernels" / "__init__.py")
    sys.modules["fastdit.kernels"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

from record import record  # noqa: E402

from fastdit.kernels import OPS  # noqa: E402
from helpers.kernels import cast, compare, run  # noqa: E402


def measure(fn: Callable[[], Any], ms: float) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile in ms, from device events, the L2 cache flushed before each run."""
    from triton.testing import do_bench

    return tuple(do_bench(fn, warmup=ms / 3, rep=ms, quantiles=[0.5, 0.2, 0.8]))


def copy_gbps(ms: float) -> float:
    """GB/s of a device-to-device copy of 1 GiB of random bytes, read plus written."""
    x = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / measure(lambda: y.copy_(x), ms)[0] / 1e6


def contestants(op: Any) -> dict[str, Callable]:
    """Name -> what makes a callable with the op's keywords; ImportError where a peer is not installed."""
    from kernels_peers import PEERS

    torch._functorch.config.donated_buffer = False  # backward is timed on one graph, kept
    own = {"fastdit": lambda: op.triton, "eager": lambda: op.eager}
    return {**own, "compiled": lambda: torch.compile(op.eager, fullgraph=True), **PEERS.get(op.name, {})}


def correct(op: Any, shape: tuple[int, ...]) -> list[str]:
    """Complaints: against fp64 in every dtype at an awkward shape and in bf16 at this one; two runs, the same bits."""
    found = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found += [f"{dtype} {op.shapes[0]}: {c}" for c in compare(op, op.inputs(op.shapes[0], dtype, "cuda"))]
    kwargs = op.inputs(shape, torch.bfloat16, "cuda")
    found += [f"bf16 {shape}: {c}" for c in compare(op, kwargs)]
    first, second = (run(op.triton, cast(kwargs)) for _ in range(2))
    return found + [f"{key}: two runs differ" for key in first if not torch.equal(first[key], second[key])]


def timed(fn: Callable, kwargs: dict[str, Any], ms: float) -> dict[str, tuple[float, float, float]]:
    """Times of the forward and, where something is differentiated, of the backward pass."""
    leaves = [v for v in kwargs.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    outs = fn(**kwargs)
    outs = [o for o in (outs if isinstance(outs, tuple) else (outs,)) if o.requires_grad]
    grads = [torch.randn_like(o) for o in outs]
    found = {"forward": measure(lambda: fn(**kwargs), ms)}
    if leaves:
        found["backward"] = measure(lambda: torch.autograd.grad(outs, leaves, grads, retain_graph=True), ms)
    return found


def bench(op: Any, shape: tuple[int, ...], copy: float, ms: float, file: Path) -> None:
    complaints = correct(op, shape)
    torch.cuda.empty_cache()
    if complaints:
        record("kernels", file=file, op=op.name, shape=shape, failed=complaints)
        return
    minimum = dict(zip(("forward", "backward"), op.minimum_bytes(shape, 2), strict=True))
    for name, make in contestants(op).items():
        kwargs = cast(op.inputs(shape, torch.bfloat16, "cuda"))
        try:
            times = timed(make(), kwargs, ms)
        except Exception as error:  # a peer that cannot: say so and go on
            record("kernels", file=file, op=op.name, shape=shape, contestant=name, failed=[str(error)[:200]])
            continue
        for way, (median, p20, p80) in times.items():
            gbps = minimum[way] / median / 1e6
            record("kernels", file=file, op=op.name, shape=shape, dtype="bf16", contestant=name, way=way,
                   ms=round(median, 4), p20=round(p20, 4), p80=round(p80, 4), gbps=round(gbps, 1),
                   percent=round(100 * gbps / copy, 1), copy_gbps=round(copy, 1))  # fmt: skip
        del kwargs
        torch.cuda.empty_cache()


def static(ops: list[str], file: Path | None) -> int:
    import kernels_static

    rows = kernels_static.table({name: OPS[name] for name in ops})
    print(kernels_static.markdown(rows))
    if file is not None:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return int(any(row["spills"] for row in rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the JSON lines")
    parser.add_argument("--static", action="store_true", help="build for sm_80, 90, 100 and print the table; no GPU")
    parser.add_argument("--ops", nargs="*", choices=list(OPS), default=list(OPS), metavar="OP")
    parser.add_argument("--budget-s", type=float, default=210, help="start no further shape after this many seconds")
    parser.add_argument("--ms", type=float, default=60, help="device time a figure is measured for")
    arguments = parser.parse_args()
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.static:
        return static(arguments.ops, arguments.out and arguments.out / "kernels_static.jsonl")
    if not torch.cuda.is_available():
        print("no GPU: times need one; --static shows what the compiler makes of the kernels", file=sys.stderr)
        return 2
    file = (arguments.out or Path(".")) / "kernels.jsonl"
    start = time.monotonic()
    copy = copy_gbps(arguments.ms)
    work = [(i, op, s) for op in map(OPS.get, arguments.ops) for i, s in enumerate(reversed(op.real))]
    for _, op, shape in sorted(work, key=lambda item: item[0]):  # every op at its widest shape first
        if time.monotonic() - start > arguments.budget_s:
            record("kernels", file=file, op=op.name, shape=shape, failed=["not started: --budget-s was used up"])
            continue
        try:
            bench(op, shape, copy, arguments.ms, file)
        except Exception as error:  # what a compiler or the memory raises: the other ops go on
            record("kernels", file=file, op=op.name, shape=shape, failed=[f"{type(error).__name__}: {error}"[:200]])
    return 0


if __name__ == "__main__":
    sys.exit(main())
