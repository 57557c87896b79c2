"""What can be counted about fastdit's step without a GPU: waits of the host, graph breaks, kernels, bytes.

    python bench/count.py [--size XL/2] [--out FOLDER] [training.x=y ...]

Waits are counted by running the step in eager mode on the CPU under two modes that see every operator and every
method call; graphs, kernels and bytes by compiling the step for the CPU, where Inductor fuses by the same rules around
the Triton ops (none of these is run). Blocks are alike, so a network of three stands for the whole depth, and two batch
sizes tell bytes per image from bytes per step (the weights').
"""

import argparse
import os
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import torch
from contestants import SIZES, Case, Fastdit, Size
from fastdit.kernels import runtime
from record import record
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

WAITING_METHODS = "item tolist numpy cpu __bool__ __int__ __float__ __index__ nonzero __array__ pin_memory".split()
WAITING_FUNCTIONS = "tensor as_tensor from_numpy nonzero masked_select unique equal allclose".split()
WAITING_OPS = "_local_scalar_dense nonzero masked_select _unique2 unique_dim equal is_nonzero".split()


class HostWaits(TorchFunctionMode):
    """Counts by name what makes the host wait for a GPU: reads, shapes that depend on data, unpinned transfers.

    On the CPU all tensors live in one place, so a copy to it is known by its name alone: `x.cpu()`, `x.to("cpu")`.
    Nothing inside compiled code is seen: `fullgraph=True` refuses it there.
    """

    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()
        self.operators = _WaitingOps(self.found)

    def __enter__(self):
        self.operators.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.operators.__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        on_tensor = bool(args) and isinstance(args[0], Tensor)
        kwargs = kwargs or {}
        by_name = name == "to" and "cpu" in (*args[1:], kwargs.get("device"))
        masked = name == "__getitem__" and any(
            isinstance(i, Tensor) and i.dtype == torch.bool
            for i in (args[1] if isinstance(args[1], tuple) else (args[1],))
        )
        if by_name or masked or name in (WAITING_METHODS if on_tensor else WAITING_FUNCTIONS):
            self.found[f"{name} of a mask" if masked else name] += 1
        return function(*args, **kwargs)


class _WaitingOps(TorchDispatchMode):
    def __init__(self, found: Counter[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in WAITING_OPS:
            self.found[f"aten.{name}"] += 1
        return function(*args, **(kwargs or {}))


class Bytes(TorchDispatchMode):
    """Adds up what eager operators read and write, views left out."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and "detach" not in function.__name__:
            written = [value for value in torch.utils._pytree.tree_leaves(result) if isinstance(value, Tensor)]
            read = [value for value in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            self.total += sum(value.nbytes for value in read)
            self.total += sum(value.nbytes for value in written)
            for given, argument in zip(args, function._schema.arguments, strict=False):  # written in place
                if argument.alias_info is not None and argument.alias_info.is_write and not written:
                    leaves = torch.utils._pytree.tree_leaves(given)
                    self.total += sum(value.nbytes for value in leaves if isinstance(value, Tensor))
        return result


class _Dry:
    """Stands for the kernels' state: they return tensors of the right shape and launch nothing."""

    launches = None
    dry = property(lambda self: True, lambda self, value: None)


@dataclass
class Graph:
    """One compiled graph: its Inductor kernels, the other calls beside them, the bytes that all move."""

    backward: bool
    kernels: int
    ops: int  # our Triton ops
    calls: int  # matrix products and attention
    bytes: int


@contextmanager
def compiled_graphs():
    """Collects a Graph for everything that torch.compile compiles inside."""
    from torch._inductor import async_compile, compile_fx, metrics

    graphs: list[Graph] = []
    library = {"mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention_for_cpu",
               "_scaled_dot_product_flash_attention_for_cpu_backward"}  # fmt: skip

    def inner(module, example_inputs, **options):
        before = metrics.generated_kernel_count, metrics.num_bytes_accessed
        compiled = compile_fx.compile_fx_inner(module, example_inputs, **options)
        targets = [node.target for node in module.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        graphs.append(Graph(
            bool(options.get("is_backward")), metrics.generated_kernel_count - before[0],
            sum(target.namespace == "fastdit" for target in targets),
            sum(target.overloadpacket.__name__ in library for target in targets),
            metrics.num_bytes_accessed - before[1],
        ))  # fmt: skip
        return compiled

    def backend(module, example_inputs, **options):  # one for all, as equal blocks share what is compiled by it
        return compile_fx.compile_fx(module, example_inputs, inner_compile=inner, **options)

    def counting(*args, **options):
        return original(*args, **{k: v for k, v in options.items() if k != "mode"}, backend=backend)

    original = torch.compile
    torch._dynamo.reset()
    quiet = mock.Mock(**{"isEnabledFor.return_value": True})  # Inductor counts bytes only for its log
    with (
        mock.patch.object(torch, "compile", counting),
        mock.patch.object(compile_fx, "inductor_metrics_log", quiet),
        mock.patch.object(async_compile.AsyncCompile, "cpp_pybinding", lambda *_: lambda *_: None),  # nobody runs them
        torch._inductor.config.patch(force_disable_caches=True),
    ):
        yield graphs
    torch._dynamo.reset()


def case_of(size: Size, name: str, overrides: tuple[str, ...]) -> Case:
    SIZES[name] = size
    # attention in one kernel, as on a GPU; a CPU makes products of it where tokens are few
    return Case(name, "fastdit", name, size.batch, "cpu", ("model.attention=sdpa", *overrides))


def host_waits(size: Size, overrides: tuple[str, ...] = ()) -> Counter[str]:
    """What the host would wait for in one step, by name; empty is as it should be."""
    bench = Fastdit(case_of(size, "waits", (*overrides, "training.compile=false")))
    moments, y = bench.batches[0]
    bench.work(moments, y, 0, bench.lr)  # tables are made and kept at the first step
    with HostWaits() as waits:
        bench.work(moments, y, 1, bench.lr)
    return waits.found


def graphs_of(size: Size, overrides: tuple[str, ...] = ()) -> tuple[list[Graph], Counter[str]]:
    """The graphs of one compiled step in the order of their compilation, and the graph breaks by reason."""
    ops = {"FASTDIT_KERNELS": "triton"} if runtime.INTERPRET else {}
    with compiled_graphs() as graphs, mock.patch.dict(os.environ, ops), mock.patch.object(runtime, "_state", _Dry()):
        torch._dynamo.utils.counters.clear()
        Fastdit(case_of(size, "graphs", overrides)).step(0)
        return graphs, Counter(torch._dynamo.utils.counters["graph_break"])


def optimiser_bytes(size: Size, overrides: tuple[str, ...] = ()) -> tuple[int, int]:
    """(bytes that optimiser and EMA move in a step, parameters)."""
    bench = Fastdit(case_of(size, "optimiser", (*overrides, "training.compile=false")))
    bench.step(0)
    total = []
    originals = bench.work.engine.step, bench.work.ema.update

    def counted(original):
        def call(*args, **kwargs):
            with Bytes() as count:
                result = original(*args, **kwargs)
            total.append(count.total)
            return result

        return call

    bench.work.engine.step, bench.work.ema.update = map(counted, originals)
    bench.step(1)
    return sum(total), sum(p.numel() for p in bench.model.parameters() if p.requires_grad)


def least_bytes(size: Size, itemsize: int = 2) -> dict[str, int]:
    """Bytes per image and block that no fusion can spare: each op of the list reads and writes its tensors once.

    In units of one activation (T tokens of D values), forward + backward. The linears read their input and write
    their output; backward they read both again for the weights' gradient.
    """
    unit = (size.latent // size.patch) ** 2 * size.hidden * itemsize
    return {
        "linears": (16 + 32) * unit,
        "attention": (4 + 8) * unit,
        "gate, residual, norm, modulate": (8 + 12) * unit,
        "GELU": (8 + 12) * unit,
        "qkv bias gradient": 3 * unit,
    }


LEAST_OPTIMISER = 36  # bytes a parameter: weight, both moments and average read and written, gradient and copy in bf16


def report(size: Size, overrides: tuple[str, ...]) -> dict:
    """All counts, for a network of the size's width; bytes of the size's whole depth and batch."""
    few = replace(size, depth=3, batch=2, classes=10)
    waits = host_waits(replace(few, hidden=64, heads=4, latent=8), overrides)
    totals = []
    for batch in (2, 4):
        graphs, breaks = graphs_of(replace(few, batch=batch), overrides)
        totals.append((sum(g.bytes for g in graphs), graphs))
    last = totals[0][1]
    forward, backward = [g for g in last if not g.backward], [g for g in last if g.backward]
    # the last graphs compiled are those of a block in the middle
    middle = {"forward": forward[-1], "backward": backward[0]}
    slopes = {}
    for name, pick in (("forward", lambda g: [x for x in g if not x.backward][-1]),
                       ("backward", lambda g: [x for x in g if x.backward][0])):  # fmt: skip
        small, large = pick(totals[0][1]).bytes, pick(totals[1][1]).bytes
        slopes[name] = (large - small) / 2, 2 * small - large  # per image, per step
    moved, parameters = optimiser_bytes(replace(few, hidden=64, heads=4, latent=8), overrides)
    least = least_bytes(size)
    return {
        "host_waits": dict(waits),
        "graph_breaks": sum(breaks.values()),
        "graphs": len(last),
        "block_kernels": {name: graph.kernels for name, graph in middle.items()},
        "block_triton_ops": {name: graph.ops for name, graph in middle.items()},
        "block_library_calls": {name: graph.calls for name, graph in middle.items()},
        "mb_per_image": {f"blocks, {name}": round(size.depth * image / 1e6, 1) for name, (image, _) in slopes.items()},
        "mb_per_image_least": {name: round(size.depth * value / 1e6, 1) for name, value in least.items()},
        "times_least": round(sum(image for image, _ in slopes.values()) / sum(least.values()), 2),
        "block_weights_mb_per_step": round(sum(step for _, step in slopes.values()) / 1e6, 1),
        "optimiser_bytes_per_parameter": round(moved / parameters, 1),
        "optimiser_bytes_per_parameter_least": LEAST_OPTIMISER,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("override", nargs="*")
    parser.add_argument("--size", choices=SIZES, default="XL/2")
    parser.add_argument("--out", type=Path, help="folder of results.jsonl")
    arguments = parser.parse_args()
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out and arguments.out / "results.jsonl"
    found = report(SIZES[arguments.size], tuple(arguments.override))
    record("count", file=file, size=arguments.size, overrides=arguments.override, **found)
    if found["host_waits"] or found["graph_breaks"]:
        sys.exit("the step waits for the device, or breaks its graphs")


if __name__ == "__main__":
    main()
