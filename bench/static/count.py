"""What can be counted about fastdit's step without a GPU: host synchronizations, graph breaks, kernels, bytes.

    python -m bench.static.count [--size XL/2] [--calls] [--out FOLDER] [training.x=y | FASTDIT_KERNELS=eager ...]

Host synchronizations are counted by running the step eagerly on the CPU under two modes that see every operator and
every method call; graphs, kernels and bytes in the code that torch.compile generates for an H200 (cuda_target.py).
Blocks are alike, so a network of three represents the whole depth. Embedders, final layer and, with
training.joint_adaln, the joint projection are not counted.
"""

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.record import parser, record
from bench.static.cuda_target import H200, Graph, build, bytes_of, compiled_graphs
from bench.step.cases import SIZES, Case, Size
from bench.step.stacks import Fastdit
from fastdit.diffusion.objectives import OBJECTIVES, compiled
from fastdit.errors import friendly_exit
from fastdit.kernels import runtime
from fastdit.models import attention
from fastdit.training import engine

WAITING_METHODS = "item tolist numpy cpu __bool__ __int__ __float__ __index__ nonzero __array__ pin_memory".split()
WAITING_FUNCTIONS = "tensor as_tensor from_numpy nonzero masked_select unique equal allclose".split()
WAITING_OPS = "_local_scalar_dense nonzero masked_select _unique2 unique_dim equal is_nonzero".split()
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm")
LEAST_OPTIMIZER = 36  # bytes per parameter: weight, both moments and average read and written, gradient, bf16 copy


@contextlib.contextmanager
def waits_counted() -> Iterator[Counter[str]]:
    """Counts by name what makes the host wait for a GPU: reads, data-dependent shapes, unpinned transfers.

    On the CPU a copy to the host is recognized by its name only: `x.cpu()`, `x.to("cpu")`. Compiled code is not seen:
    there `fullgraph=True` refuses such operations.
    """
    found: Counter[str] = Counter()

    class Functions(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            name, kwargs = getattr(function, "__name__", ""), kwargs or {}
            on_tensor = bool(args) and isinstance(args[0], Tensor)
            by_name = name == "to" and "cpu" in (*args[1:], kwargs.get("device"))
            masked = name == "__getitem__" and any(
                isinstance(i, Tensor) and i.dtype == torch.bool
                for i in (args[1] if isinstance(args[1], tuple) else (args[1],))
            )
            if by_name or masked or name in (WAITING_METHODS if on_tensor else WAITING_FUNCTIONS):
                found[f"{name} of a mask" if masked else name] += 1
            return function(*args, **kwargs)

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            if name in WAITING_OPS:
                found[f"aten.{name}"] += 1
            return function(*args, **(kwargs or {}))

    with Operators(), Functions():
        yield found


class Bytes(TorchDispatchMode):
    """Sums what eager operators read and write, except views."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if not function.is_view and "detach" not in function.__name__:
            written = list(tree_leaves(result))
            if not any(isinstance(value, Tensor) for value in written):  # in place, into arguments
                for given, argument in zip(args, function._schema.arguments, strict=False):
                    # a fused optimizer writes the gradients only to take a scale off
                    read_only = argument.name == "grads" and kwargs.get("grad_scale") is None
                    if argument.alias_info is not None and argument.alias_info.is_write and not read_only:
                        written += tree_leaves(given)
            moved = [*tree_leaves((args, kwargs)), *written]
            self.total += sum(value.nbytes for value in moved if isinstance(value, Tensor))
        return result


def case_of(size: Size, overrides: tuple[str, ...]) -> Case:
    SIZES["counted"] = size
    return Case("counted", "fastdit", "counted", size.batch, "cpu", overrides)


def eager_case(size: Size, overrides: tuple[str, ...]) -> Case:
    """In a form that the CPU can run."""
    able = [o for o in overrides if not o.startswith(("model.attention=", "training.fp8_attention="))]
    return case_of(size, (*able, "model.attention=sdpa", "training.compile=false"))


def host_waits(size: Size, overrides: tuple[str, ...] = ()) -> Counter[str]:
    """Operations in one step for which the host would wait, by name; there should be none."""
    bench = Fastdit(eager_case(size, overrides))
    bench.step(0)  # creates the tables
    moments, y = bench.batches[0]
    with waits_counted() as found:
        bench.work(1, bench.lr, moments, y)
    return found


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What scaled_dot_product_attention becomes on Hopper with the cuDNN backend, which "auto" takes there."""
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False)[0]


@contextlib.contextmanager
def _as_on_gpu() -> Iterator[None]:
    """fastdit's own choices by device, as it makes them on an H200."""
    if runtime.INTERPRET:
        raise ValueError("TRITON_INTERPRET=1 hides the kernels from the compiler; unset it")
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(runtime, "_obstacle", lambda *_: None))
        stack.enter_context(mock.patch.object(runtime, "ABSENT_GPU", (H200.major, H200.minor)))
        stack.enter_context(mock.patch.object(attention, "obstacle", lambda *_, **__: None))
        stack.enter_context(mock.patch.dict(attention.ATTENTION, dict.fromkeys(("sdpa", "sdpa-cudnn"), _cudnn)))
        stack.callback(runtime._decide.cache_clear)
        runtime._decide.cache_clear()
        yield


def graphs_of(size: Size, overrides: tuple[str, ...] = ()) -> tuple[list[Graph], Counter[str]]:
    """The graphs of one compiled step in the order of compilation, and the graph breaks by reason."""
    case = case_of(size, ("model.attention=sdpa-cudnn", *overrides))
    with _as_on_gpu(), compiled_graphs() as graphs, mock.patch.dict(os.environ):
        torch._dynamo.utils.counters.clear()
        Fastdit(case).step(0)
        return graphs, Counter(torch._dynamo.utils.counters["graph_break"])


def middle_block(graphs: list[Graph]) -> dict[str, Graph]:
    """Forward and backward of a block in the middle: compiled last in the forward pass, first in the backward pass."""
    forward, backward = ([g for g in graphs if g.backward == way] for way in (False, True))
    return {"forward": forward[-1], "backward": backward[0]}


def loss_graphs(size: Size) -> list[Graph]:
    """DDPM's loss, forward and backward from the network's output, compiled as the training loop does on a GPU."""
    objective = OBJECTIVES["ddpm"]()
    x_0, noise = torch.randn(2, size.batch, *size.latent_shape).unbind()
    output = torch.randn(size.batch, objective.out_channels(size.channels), size.latent, size.latent)
    with compiled_graphs() as graphs:
        loss = compiled(objective).loss
        t = objective.sample_t(torch.rand(size.batch))
        loss(lambda x_t, time, y: output.requires_grad_(), x_0, None, t, noise).per_sample.mean().backward()
    return graphs


def bytes_by_kind(graph: Graph, size: Size) -> tuple[Counter[str], Counter[str]]:
    """A graph's bytes by kind of call: (those that grow with the batch, those of weights and their gradients)."""
    images, weights = Counter(), Counter()
    per_batch = {size.batch, size.batch * (size.latent // size.patch) ** 2}
    for call in graph.calls:
        kind = {"ours": "Triton ops", "inductor": "Inductor"}.get(call.kind)
        if kind is None:
            kind = "products" if call.name in PRODUCTS else "attention" if "attention" in call.name else "other calls"
        fixed = [t for t in call.tensors if not per_batch & set(t.shape)]
        of_weights = sum(map(bytes_of, fixed)) if kind == "products" else 0
        if len(fixed) == len(call.tensors):
            of_weights = call.bytes
        weights[kind] += of_weights
        images[kind] += call.bytes - of_weights
    return images, weights


def optimizer_bytes(size: Size, overrides: tuple[str, ...] = (), one_pass: bool = True) -> tuple[int, int]:
    """(bytes that optimizer and EMA move in a step, parameters); `one_pass`: as on a GPU, with kernels/adamw_ema.py."""
    with mock.patch.object(engine, "use_triton", lambda *_: one_pass):
        bench = Fastdit(eager_case(size, overrides))
    bench.step(0)
    total, original = [], bench.engine.step

    def kernel(params, grads, exp_avgs, exp_avg_sqs, emas, copies, *_) -> None:  # as counted in the static table
        written = [*params, *exp_avgs, *exp_avg_sqs, *emas]
        total.append(sum(tensor.nbytes for tensor in (*written, *written, *grads, *(copies or ()))))

    def counted(*args):
        with Bytes() as count:
            result = original(*args)
        total.append(count.total)
        return result

    bench.engine.step = counted
    with mock.patch.object(engine, "adamw_ema", kernel):
        bench.step(1)
    return sum(total), sum(p.numel() for p in bench.model.parameters() if p.requires_grad)


def least_bytes(size: Size, itemsize: int = 2) -> dict[str, int]:
    """Bytes per image and block that no fusion can avoid: each op of the list reads and writes its tensors once.

    In units of one activation (T tokens of D values), forward + backward. The linears read their input and write
    their output; the backward pass reads both again for the weights' gradient.
    """
    unit = (size.latent // size.patch) ** 2 * size.hidden * itemsize
    return {
        "linears": (16 + 32) * unit,
        "attention": (4 + 8) * unit,
        "gate, residual, norm, modulate": (8 + 12) * unit,
        "GELU": (8 + 12) * unit,
        "qkv bias gradient": 3 * unit,
    }


def report(size: Size, overrides: tuple[str, ...], calls: bool = False) -> dict:
    """All counts, for a network of the size's width; bytes of the size's whole depth. `calls`: print a block's."""
    few = replace(size, depth=3, classes=10)
    narrow = replace(few, hidden=64, heads=4, latent=8, batch=2)
    waits = host_waits(narrow, overrides)
    graphs, breaks = graphs_of(few, overrides)
    block = middle_block(graphs)
    images, weights = {}, Counter()
    for way, graph in block.items():
        images[way], of_weights = bytes_by_kind(graph, few)
        weights += of_weights
        if calls:
            print(f"{way}: {len(graph.calls)} calls, {graph.bytes / 1e6:.1f} MB", *graph.calls, sep="\n")
    built = {kernel.source: kernel for graph in graphs for kernel in graph.kernels}.values()
    registers, spills = zip(*map(build, built), strict=True)
    moved, parameters = optimizer_bytes(narrow, overrides)
    least = least_bytes(size)

    def per_image(moved: int) -> float:
        return round(size.depth * moved / size.batch / 1e6, 1)

    def number_of(kind: str) -> dict[str, int]:
        return {way: len(graph.of(kind)) for way, graph in block.items()}

    return {
        "batch": size.batch,
        "host_waits": dict(waits),
        "graph_breaks": sum(breaks.values()),
        "graphs": len(graphs),
        "block_kernels": number_of("inductor"),
        "block_triton_ops": number_of("ours"),
        "block_library_calls": number_of("library"),
        "loss_kernels": {("forward", "backward")[g.backward]: len(g.calls) for g in loss_graphs(size)},
        "mb_per_image": {f"blocks, {way}": per_image(found.total()) for way, found in images.items()},
        "mb_per_image_by": {kind: per_image(moved) for kind, moved in sum(images.values(), Counter()).items()},
        "mb_per_image_least": {name: round(size.depth * value / 1e6, 1) for name, value in least.items()},
        "times_least": round(sum(found.total() for found in images.values()) / size.batch / sum(least.values()), 2),
        "block_weights_mb_per_step": {kind: round(moved / 1e6, 1) for kind, moved in weights.items()},
        "optimizer_bytes_per_parameter": round(moved / parameters, 1),
        "optimizer_bytes_per_parameter_least": LEAST_OPTIMIZER,
        "kernels_compiled": len(built),
        "most_registers": max(registers),
        "spilled_bytes": sum(spills),
    }


@friendly_exit()
def main() -> None:
    options = parser(__doc__)
    options.add_argument("override", nargs="*")
    options.add_argument("--size", choices=SIZES, default="XL/2")
    options.add_argument("--calls", action="store_true", help="list the calls of a middle block, with their bytes")
    arguments = options.parse_args()
    if "training.compile=whole" in arguments.override:
        options.error("training.compile=whole has no graph of one block to count; leave it out")
    found = report(SIZES[arguments.size], tuple(arguments.override), arguments.calls)
    record("count", arguments.out, size=arguments.size, overrides=arguments.override, **found)
    if found["host_waits"] or found["graph_breaks"] or found["spilled_bytes"]:
        sys.exit("the step waits for the device, breaks its graphs, or spills registers")


if __name__ == "__main__":
    main()
