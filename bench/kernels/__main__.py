"""Time each fused op beside a memory copy, eager, torch.compile and the installed public peers.

    python -m bench.kernels --out DIR      needs a GPU; `python -m bench.static.kernels` does not

A time is written only if the op's correctness, at that very shape and dtype, passed in the same run. Forward and
backward are timed separately, each by replaying a CUDA graph of many calls: from Python, a short kernel's time would be
the host's. The calls take several sets of inputs in turn, many times the size of the L2 cache. `percent` is of the GB/s
of a plain copy in this run, where the op counts the fewest bytes that it could move. `calls` says how often a training
step of DiT-XL/2 calls the op, in bf16 and in FP8, and `step_ms` what that takes at batch 256.
"""

import collections
import inspect
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from bench.kernels.compare import cast, compare, run
from bench.kernels.peers import PEERS
from bench.record import markdown, parser, record
from bench.step.cases import ALL_ON, FP8, SIZES, Case, config_of
from fastdit.build import build_network, build_objective, prepare_for_training
from fastdit.kernels import OPS

INPUTS = 512e6  # bytes of the inputs that the calls take in turn: an H200's L2 cache has 60 MB
GRAPH_MS = 10  # of calls in one CUDA graph


def measure(calls: list[Callable[[], Any]], ms: float) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of the ms of one call, from replays of a CUDA graph of many rounds of `calls`.

    Inputs must have been made on the current stream, which is not the default one: that is where backward passes run.
    """

    def elapsed(run: Callable[[], Any]) -> float:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        run()
        events[1].record()
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1])

    def round_() -> None:
        for call in calls:
            alive.append(call())

    alive = collections.deque(maxlen=len(calls))  # so that outputs too are several in turn
    for _ in range(2):  # the first compiles
        once = elapsed(round_)
    rounds = max(1, round(GRAPH_MS / once))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(rounds):
            round_()
    once = elapsed(graph.replay)
    times = torch.tensor([elapsed(graph.replay) for _ in range(max(5, round(ms / once)))])
    return tuple((times.quantile(torch.tensor([0.5, 0.2, 0.8])) / rounds / len(calls)).tolist())


def copy_gbps(ms: float) -> float:
    """GB/s of a device-to-device copy of 1 GiB of random bytes, read plus written."""
    x = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / measure([lambda: y.copy_(x)], ms)[0] / 1e6


class Calls(TorchDispatchMode):
    """Counts the calls of our ops by name."""

    def __init__(self):
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastdit":
            self.found[function._opname] += 1
        return function(*args, **(kwargs or {}))


def calls_of_step(overrides: list[str], device: str) -> dict[str, int]:
    """How often a training step of DiT-XL/2 calls each op forward: counted on fake tensors, which have no values."""
    config = config_of(Case("calls", "fastdit", "XL/2", 2, device, (*overrides, "training.compile=false")))
    with mock.patch.dict(os.environ, FASTDIT_KERNELS="triton"), FakeTensorMode(), Calls() as calls:
        with torch.device(device):
            objective = build_objective(config)
            model = build_network(config, SIZES["XL/2"].latent_shape, objective).train()
            prepare_for_training(model, objective, config.training, "none")
            with torch.autocast(device, torch.bfloat16):
                model(torch.randn(2, 4, 32, 32), torch.rand(2), torch.zeros(2, dtype=torch.long))
    return dict(calls.found)


def correct(op: Any, shape: tuple[int, ...]) -> list[str]:
    """Complaints: in bf16 against fp64, at an awkward shape and at this one; two runs, the same bits."""
    found = [f"{op.shapes[0]}: {c}" for c in compare(op, op.inputs(op.shapes[0], torch.bfloat16, "cuda"))]
    kwargs = op.inputs(shape, torch.bfloat16, "cuda")
    found += [f"{shape}: {c}" for c in compare(op, kwargs)]
    first, second = (run(op.triton, cast(kwargs)) for _ in range(2))
    return found + [f"{key}: two runs differ" for key in first if not torch.equal(first[key], second[key])]


def timed(fn: Callable, kwargs: dict[str, Any], ms: float) -> dict[str, tuple[float, float, float]]:
    """Times of the forward and, if something is differentiated, of the backward pass."""
    tensors = [value for value in tree_leaves(kwargs) if isinstance(value, torch.Tensor)]
    copies = max(1, round(INPUTS / sum(value.nbytes for value in tensors)))
    sets = [kwargs, *(clone(kwargs) for _ in range(copies - 1))]
    found, backward = {"forward": measure([lambda each=each: fn(**each) for each in sets], ms)}, []
    for each in sets:
        leaves = [v for v in each.values() if isinstance(v, torch.Tensor) and v.requires_grad]
        if leaves:
            outs = fn(**each)
            outs = [o for o in (outs if isinstance(outs, tuple) else (outs,)) if o is not None and o.requires_grad]
            given = outs, leaves, [torch.randn_like(o) for o in outs]
            backward.append(lambda given=given: torch.autograd.grad(*given, retain_graph=True))
    if backward:
        found["backward"] = measure(backward, ms)
    return found


def clone(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Copies of the tensors."""
    return tree_map_only(torch.Tensor, lambda x: x.detach().clone().requires_grad_(x.requires_grad), kwargs)


def bench(op: Any, shape: tuple[int, ...], contestants: dict, calls: dict, copy: float, ms: float, out) -> list[dict]:
    """Record what each contestant takes; `calls` of the op in a step by precision, where this is the shape there."""
    lines = []
    minimum = dict(zip(("forward", "backward"), op.minimum_bytes(shape, 2), strict=True))
    for name, make in contestants.items():
        kwargs = cast(op.inputs(shape, torch.bfloat16, "cuda"))
        try:
            times = timed(make(), kwargs, ms)
        except Exception as error:  # a peer that is missing or cannot run
            record("kernels", out, op=op.name, shape=shape, contestant=name, failed=[str(error)[:200]])
            continue
        for way, (median, p20, p80) in times.items():
            gbps = minimum[way] / median / 1e6
            share = {"calls": calls, "step_ms": {p: round(n * median, 2) for p, n in calls.items()}} if calls else {}
            lines.append(record(
                "kernels", out, op=op.name, shape=shape, dtype="bf16", contestant=name, way=way, ms=round(median, 4),
                p20=round(p20, 4), p80=round(p80, 4), gbps=round(gbps, 1), percent=round(100 * gbps / copy, 1),
                copy_gbps=round(copy, 1), **share,
            ))  # fmt: skip
        del kwargs
        torch.cuda.empty_cache()
    return lines


def table(lines: list[dict]) -> str:
    """Our kernels, with the milliseconds of the others beside them, and what a step of DiT-XL/2 spends in them."""
    names = list(dict.fromkeys(line["contestant"] for line in lines))
    rows = {}
    for line in lines:
        rows.setdefault((line["op"], line["shape"], line["way"]), {})[line["contestant"]] = line
    header = ["op", "shape", "way", *(f"{name} ms" for name in names), "of a copy", "ms of a step (bf16, fp8)"]
    return "## kernels\n\n" + markdown([header] + [
        [op, " x ".join(map(str, shape)), way, *(row[name]["ms"] if name in row else "" for name in names),
         f"{row['fastdit']['percent']} %", ", ".join(map(str, row["fastdit"].get("step_ms", {}).values()))]
        for (op, shape, way), row in rows.items()
    ])  # fmt: skip


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--ops", nargs="*", choices=list(OPS), default=list(OPS), metavar="OP")
    options.add_argument("--budget-s", type=float, default=210, help="seconds, after which nothing begins")
    options.add_argument("--ms", type=float, default=60, help="device time per figure")
    arguments = options.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no GPU; `python -m bench.static.kernels` shows what the compiler makes of the kernels")
    with torch.cuda.stream(torch.cuda.Stream()):  # graphs are not captured on the default one
        run_all([OPS[name] for name in arguments.ops], arguments.budget_s, arguments.ms, arguments.out)


def run_all(ops: list, budget_s: float, ms: float, out: Path | None) -> None:
    """Every op's own times at its widest shape first, which is DiT-XL/2's; then its peers' there; then other shapes."""
    torch._functorch.config.donated_buffer = False  # the backward pass is timed repeatedly on one graph
    deadline, calls, right, lines = time.monotonic() + budget_s, {}, {}, []
    for precision, overrides in (("bf16", ALL_ON), ("fp8", ALL_ON + FP8)):
        try:
            calls[precision] = calls_of_step(overrides, "cuda")
        except Exception as error:  # a GPU without FP8; the times do not need it
            print(f"calls of a step in {precision} were not counted: {error}", file=sys.stderr)
    copy = copy_gbps(ms)
    work = [(2 * i + part, op, s) for op in ops for i, s in enumerate(reversed(op.real)) for part in range(2)]
    for rank, op, shape in sorted(work, key=lambda item: item[0]):
        try:
            if time.monotonic() > deadline:
                raise TimeoutError("not started: --budget-s was used up")
            if (op.name, shape) not in right:
                right[op.name, shape] = False
                if complaints := correct(op, shape):
                    record("kernels", out, op=op.name, shape=shape, failed=complaints)
                right[op.name, shape] = not complaints
                torch.cuda.empty_cache()
            if not right[op.name, shape]:
                continue
            ours, eager = inspect.unwrap(op.triton), inspect.unwrap(op.eager)  # in place, where the op is: no copies
            own = {"fastdit": lambda fn=ours: fn}
            peers = {"eager": lambda fn=eager: fn, "compiled": lambda fn=eager: torch.compile(fn, fullgraph=True)}
            counts = {precision: found.get(op.name, 0) for precision, found in calls.items()} if rank < 2 else {}
            chosen = peers | PEERS.get(op.name, {}) if rank % 2 else own
            lines += bench(op, shape, chosen, counts, copy, ms, out)
            if out:
                (out / "kernels.md").write_text(table(lines))
        except Exception as error:  # from a compiler or for lack of memory: the other ops go on
            record("kernels", out, op=op.name, shape=shape, failed=[f"{type(error).__name__}: {error}"[:200]])


if __name__ == "__main__":
    main()
