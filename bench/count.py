"""What can be counted about fastdit's step without a GPU: waits of the host, graph breaks, kernels, bytes.

    python bench/count.py [--size XL/2] [--calls] [--out FOLDER] [training.x=y | FASTDIT_KERNELS=eager ...]

Waits are counted by running the step in eager mode on the CPU under two modes that see every operator and every
method call; graphs, kernels and bytes from the code that torch.compile writes for an H200 (cuda_target.py). Blocks are
alike, so a network of three stands for the whole depth. Embedders, final layer and, with training.joint_adaln, the
joint projection are left out.
"""

import argparse
import contextlib
import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from contestants import SIZES, Case, Fastdit, Size, latent_shape
from cuda_target import Graph, build, bytes_of, compiled_graphs
from record import record
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastdit.diffusion.objectives import OBJECTIVES, compiled
from fastdit.errors import friendly_exit
from fastdit.kernels import runtime
from fastdit.models import attention

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
            unscaled = (kwargs or {}).get("grad_scale") is None
            for given, argument in zip(args, function._schema.arguments, strict=False):  # written in place
                if argument.name == "grads" and unscaled:  # a fused optimiser writes them to take a scale off, else not
                    continue
                if argument.alias_info is not None and argument.alias_info.is_write and not written:
                    leaves = torch.utils._pytree.tree_leaves(given)
                    self.total += sum(value.nbytes for value in leaves if isinstance(value, Tensor))
        return result


def case_of(size: Size, name: str, overrides: tuple[str, ...]) -> Case:
    SIZES[name] = size
    return Case(name, "fastdit", name, size.batch, "cpu", overrides)


def eager_case(size: Size, name: str, overrides: tuple[str, ...]) -> Case:
    """As the CPU can run it."""
    able = [o for o in overrides if not o.startswith("model.attention=")]
    return case_of(size, name, (*able, "model.attention=sdpa", "training.compile=false"))


def host_waits(size: Size, overrides: tuple[str, ...] = ()) -> Counter[str]:
    """What the host would wait for in one step, by name; empty is as it should be."""
    bench = Fastdit(eager_case(size, "waits", overrides))
    moments, y = bench.batches[0]
    bench.work(moments, y, 0, bench.lr)  # tables are made and kept at the first step
    with HostWaits() as waits:
        bench.work(moments, y, 1, bench.lr)
    return waits.found


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What scaled_dot_product_attention becomes on Hopper with the backend of cuDNN, which "auto" takes there."""
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False)[0]


@contextlib.contextmanager
def _as_on_gpu() -> Iterator[None]:
    """fastdit's own choices by the device, as it makes them on an H200."""
    if runtime.INTERPRET:
        raise ValueError("TRITON_INTERPRET=1 hides the kernels from the compiler; unset it")
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(runtime, "_obstacle", lambda *_: None))
        stack.enter_context(mock.patch.object(attention, "obstacle", lambda *_, **__: None))
        stack.enter_context(mock.patch.dict(attention.ATTENTION, dict.fromkeys(("sdpa", "sdpa-cudnn"), _cudnn)))
        if importlib.util.find_spec("torchao"):
            import torchao.float8

            config = torchao.float8.Float8LinearConfig
            real = lambda **options: config(**options | {"emulate": False})  # noqa: E731
            stack.enter_context(mock.patch.object(torchao.float8, "Float8LinearConfig", real))
        stack.callback(runtime._decide.cache_clear)
        runtime._decide.cache_clear()
        yield


def graphs_of(size: Size, overrides: tuple[str, ...] = ()) -> tuple[list[Graph], Counter[str]]:
    """The graphs of one compiled step in the order of their compilation, and the graph breaks by reason."""
    case = case_of(size, "graphs", ("model.attention=sdpa-cudnn", *overrides))
    with _as_on_gpu(), compiled_graphs() as graphs, mock.patch.dict(os.environ):
        torch._dynamo.utils.counters.clear()
        Fastdit(case).step(0)
        return graphs, Counter(torch._dynamo.utils.counters["graph_break"])


def middle_block(graphs: list[Graph]) -> dict[str, Graph]:
    """Forward and backward of a block in the middle: compiled last on the way there, first on the way back."""
    forward, backward = ([g for g in graphs if g.backward == way] for way in (False, True))
    return {"forward": forward[-1], "backward": backward[0]}


def loss_graphs(size: Size) -> list[Graph]:
    """DDPM's loss, forward and backward from the network's output, as the training loop has it compiled on a GPU."""
    objective = OBJECTIVES["ddpm"]()
    x_0, noise = torch.randn(2, size.batch, *latent_shape(size)).unbind()
    output = torch.randn(size.batch, objective.out_channels(size.channels), size.latent, size.latent)
    with compiled_graphs() as graphs:
        loss = compiled(objective).loss
        t = objective.sample_t(torch.rand(size.batch))
        loss(lambda x_t, time, y: output.requires_grad_(), x_0, None, t, noise).per_sample.mean().backward()
    return graphs


PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm")


def bytes_by_kind(graph: Graph, size: Size) -> tuple[Counter[str], Counter[str]]:
    """A graph's bytes by who moves them: those that grow with the batch, and those of weights and their gradients."""
    images, weights = Counter(), Counter()
    rows = {size.batch, size.batch * (size.latent // size.patch) ** 2}
    for call in graph.calls:
        kind = {"ours": "Triton ops", "inductor": "Inductor"}.get(call.kind)
        if kind is None:
            kind = "products" if call.name in PRODUCTS else "attention" if "attention" in call.name else "other calls"
        fixed = [t for t in call.tensors if not rows & set(t.shape)]
        if len(fixed) == len(call.tensors):
            of_weights = call.bytes
        else:
            of_weights = sum(map(bytes_of, fixed)) if kind == "products" else 0
        weights[kind] += of_weights
        images[kind] += call.bytes - of_weights
    return images, weights


def optimiser_bytes(size: Size, overrides: tuple[str, ...] = ()) -> tuple[int, int]:
    """(bytes that optimiser and EMA move in a step, parameters)."""
    bench = Fastdit(eager_case(size, "optimiser", overrides))
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


def report(size: Size, overrides: tuple[str, ...], calls: bool = False) -> dict:
    """All counts, for a network of the size's width; bytes of the size's whole depth."""
    few = replace(size, depth=3, classes=10)
    narrow = replace(few, hidden=64, heads=4, latent=8, batch=2)
    waits = host_waits(narrow, overrides)
    graphs, breaks = graphs_of(few, overrides)
    middle = middle_block(graphs)
    if calls:
        print_calls(middle)
    images, weights = {}, Counter()
    for way, graph in middle.items():
        images[way], of_weights = bytes_by_kind(graph, few)
        weights += of_weights
    built = {kernel.source: kernel for graph in graphs for kernel in graph.kernels}.values()
    registers, spills = zip(*map(build, built), strict=True)
    moved, parameters = optimiser_bytes(narrow, overrides)
    least = least_bytes(size)

    def per_image(moved: int) -> float:
        return round(size.depth * moved / size.batch / 1e6, 1)

    return {
        "batch": size.batch,
        "host_waits": dict(waits),
        "graph_breaks": sum(breaks.values()),
        "graphs": len(graphs),
        "block_kernels": {way: len(graph.of("inductor")) for way, graph in middle.items()},
        "block_triton_ops": {way: len(graph.of("ours")) for way, graph in middle.items()},
        "block_library_calls": {way: len(graph.of("library")) for way, graph in middle.items()},
        "loss_kernels": {("forward", "backward")[g.backward]: len(g.calls) for g in loss_graphs(size)},
        "mb_per_image": {f"blocks, {way}": per_image(found.total()) for way, found in images.items()},
        "mb_per_image_by": {kind: per_image(moved) for kind, moved in sum(images.values(), Counter()).items()},
        "mb_per_image_least": {name: round(size.depth * value / 1e6, 1) for name, value in least.items()},
        "times_least": round(sum(found.total() for found in images.values()) / size.batch / sum(least.values()), 2),
        "block_weights_mb_per_step": {kind: round(moved / 1e6, 1) for kind, moved in weights.items()},
        "optimiser_bytes_per_parameter": round(moved / parameters, 1),
        "optimiser_bytes_per_parameter_least": LEAST_OPTIMISER,
        "kernels_compiled": len(built),
        "most_registers": max(registers),
        "spilled_bytes": sum(spills),
    }


def print_calls(block: dict[str, Graph]) -> None:
    """The calls of a block in order: what a reader optimises from."""
    for way, graph in block.items():
        print(f"{way}: {len(graph.calls)} calls, {graph.bytes / 1e6:.1f} MB")
        for call in graph.calls:
            print(call)


@friendly_exit()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("override", nargs="*")
    parser.add_argument("--size", choices=SIZES, default="XL/2")
    parser.add_argument(
        "--calls", action="store_true", help="list the calls of a block in the middle, with their bytes"
    )
    parser.add_argument("--out", type=Path, help="folder of results.jsonl")
    arguments = parser.parse_args()
    if "training.compile=whole" in arguments.override:
        parser.error("training.compile=whole has no graph of one block to count; leave it out")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out and arguments.out / "results.jsonl"
    found = report(SIZES[arguments.size], tuple(arguments.override), arguments.calls)
    record("count", file=file, size=arguments.size, overrides=arguments.override, **found)
    if found["host_waits"] or found["graph_breaks"] or found["spilled_bytes"]:
        sys.exit("the step waits for the device, breaks its graphs, or spills registers")


if __name__ == "__main__":
    main()
