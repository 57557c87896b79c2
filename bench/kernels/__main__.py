"""Time each fused op beside a memory copy, eager, torch.compile and the installed public peers.

    python -m bench.kernels --out DIR      needs a GPU; `python -m bench.static.kernels` does not

A time is written only if the op's correctness, at that very shape and dtype, passed in the same run. `percent` is of
the GB/s of a plain copy in this run, where the op counts the fewest bytes that it could move. Forward and backward are
timed separately, on inputs several times the size of the L2 cache, which is flushed between runs.
"""

import inspect
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.kernels.compare import cast, compare, run
from bench.kernels.peers import PEERS
from bench.record import parser, record
from fastdit.kernels import OPS


def measure(fn: Callable[[], Any], ms: float) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile in ms from device events; the L2 cache is flushed before each run."""
    from triton.testing import do_bench

    return tuple(do_bench(fn, warmup=ms / 3, rep=ms, quantiles=[0.5, 0.2, 0.8]))


def copy_gbps(ms: float) -> float:
    """GB/s of a device-to-device copy of 1 GiB of random bytes, read plus written."""
    x = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / measure(lambda: y.copy_(x), ms)[0] / 1e6


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
    """Times of the forward and, if something is differentiated, of the backward pass."""
    leaves = [v for v in kwargs.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    outs = fn(**kwargs)
    outs = [o for o in (outs if isinstance(outs, tuple) else (outs,)) if o is not None and o.requires_grad]
    grads = [torch.randn_like(o) for o in outs]
    found = {"forward": measure(lambda: fn(**kwargs), ms)}
    if leaves:
        found["backward"] = measure(lambda: torch.autograd.grad(outs, leaves, grads, retain_graph=True), ms)
    return found


def bench(op: Any, shape: tuple[int, ...], copy: float, ms: float, out: Path | None) -> None:
    complaints = correct(op, shape)
    torch.cuda.empty_cache()
    if complaints:
        record("kernels", out, op=op.name, shape=shape, failed=complaints)
        return
    minimum = dict(zip(("forward", "backward"), op.minimum_bytes(shape, 2), strict=True))
    torch._functorch.config.donated_buffer = False  # the backward pass is timed repeatedly on one graph
    ours, eager = inspect.unwrap(op.triton), inspect.unwrap(op.eager)  # in place, where the op is: without its copies
    contestants = {"fastdit": lambda: ours, "eager": lambda: eager,
                   "compiled": lambda: torch.compile(eager, fullgraph=True), **PEERS.get(op.name, {})}  # fmt: skip
    for name, make in contestants.items():
        kwargs = cast(op.inputs(shape, torch.bfloat16, "cuda"))
        try:
            times = timed(make(), kwargs, ms)
        except Exception as error:  # a peer that is missing or cannot run
            record("kernels", out, op=op.name, shape=shape, contestant=name, failed=[str(error)[:200]])
            continue
        for way, (median, p20, p80) in times.items():
            gbps = minimum[way] / median / 1e6
            record("kernels", out, op=op.name, shape=shape, dtype="bf16", contestant=name, way=way,
                   ms=round(median, 4), p20=round(p20, 4), p80=round(p80, 4), gbps=round(gbps, 1),
                   percent=round(100 * gbps / copy, 1), copy_gbps=round(copy, 1))  # fmt: skip
        del kwargs
        torch.cuda.empty_cache()


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--ops", nargs="*", choices=list(OPS), default=list(OPS), metavar="OP")
    options.add_argument("--budget-s", type=float, default=210, help="seconds, after which no shape begins")
    options.add_argument("--ms", type=float, default=60, help="device time per figure")
    arguments = options.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no GPU; `python -m bench.static.kernels` shows what the compiler makes of the kernels")
    out, deadline, copy = arguments.out, time.monotonic() + arguments.budget_s, copy_gbps(arguments.ms)
    work = [(i, op, s) for op in map(OPS.get, arguments.ops) for i, s in enumerate(reversed(op.real))]
    for _, op, shape in sorted(work, key=lambda item: item[0]):  # every op at its widest shape first
        try:
            if time.monotonic() > deadline:
                raise TimeoutError("not started: --budget-s was used up")
            bench(op, shape, copy, arguments.ms, out)
        except Exception as error:  # from a compiler or for lack of memory: the other ops go on
            record("kernels", out, op=op.name, shape=shape, failed=[f"{type(error).__name__}: {error}"[:200]])


if __name__ == "__main__":
    main()
