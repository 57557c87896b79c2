"""What torch.compile generates for a GPU that is not present: Triton code, kernel by kernel, with the bytes of each.

The program runs on the CPU. Every graph that Dynamo and autograd extract from it is moved to `cuda:0` by fake tensors
and passed to Inductor. Inductor asks the machine a few questions (`H200` answers them) and generates the code that it
would generate there; our Triton ops are launches in it like any other. That code runs once on meta tensors, which gives
the sequence of calls and the tensors of each. The program gets uninitialized outputs of the right shapes, so losses are
meaningless. Kernels can also be compiled for sm_90, which needs no device either.
"""

import collections
import contextlib
import copy
import dataclasses
import functools
import math
import re
import subprocess
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, fx
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("cuda", 0)
H200 = types.SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65536, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, shared_memory_per_block_optin=232448,
    total_memory=140 << 30, L2_cache_size=50 << 20, gcnArchName="",
)  # fmt: skip


@dataclasses.dataclass
class Kernel:
    """A Triton kernel in the generated code: Inductor's own, or one of the program's, included unchanged."""

    name: str
    source: str
    record: Callable | None = None  # gets the calls of the run on meta tensors

    @property
    def ours(self) -> bool:
        return "@triton_heuristics.user_autotune" in self.source

    def run(self, *args, **_) -> None:
        # Inductor's own kernels may read slices of their arguments, and state how much; the program's get views
        stated = re.search(r"'kernel_num_gb': ([\d.e+-]+)", self.source)
        moved = round(float(stated[1]) * 1e9) if stated else None
        self.record(call_of(self.name.strip("_"), "ours" if self.ours else "inductor", args, moved))


@dataclasses.dataclass
class Call:
    """One launch or library call; `bytes` counts each tensor that it reads or writes once."""

    name: str
    kind: str  # "inductor"; "ours": a Triton kernel of the program; "library": products, attention, stray copies
    bytes: int
    tensors: list[Tensor]  # on the meta device

    def __str__(self) -> str:
        tensors = (f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in self.tensors)
        return f"{self.bytes / 1e6:9.1f} MB  {self.kind:8}  {self.name:40}  {', '.join(tensors)}"


@dataclasses.dataclass
class Graph:
    """The code generated for one graph."""

    backward: bool
    calls: list[Call]
    kernels: list[Kernel]

    @property
    def bytes(self) -> int:
        return sum(call.bytes for call in self.calls)

    def of(self, kind: str) -> list[str]:
        return [call.name for call in self.calls if call.kind == kind]


def call_of(name: str, kind: str, values: object, moved: int | None = None) -> Call:
    """A Call with the tensors among the values; a tensor that occurs twice, as outputs do, counts once."""
    tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
    once = {(t.untyped_storage()._cdata, t.storage_offset(), t.dtype, *t.shape, *t.stride()): t for t in tensors}
    tensors = list(once.values())
    return Call(name, kind, sum(map(bytes_of, tensors)) if moved is None else moved, tensors)


def bytes_of(t: Tensor) -> int:
    """An expanded dimension (stride 0) counts once."""
    return t.itemsize * math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride)


class _Library:
    """Replaces Inductor's `extern_kernels`: records calls that get a tensor to write to, without running them."""

    def __init__(self, original: object, record: Callable):
        self.original, self.record = original, record

    def __getattr__(self, name: str) -> Callable:
        def call(*args, **kwargs):
            if "out" not in kwargs:
                return getattr(self.original, name)(*args, **kwargs)
            self.record(call_of(name, "library", (args, kwargs)))
            return kwargs["out"]

        return call


@contextlib.contextmanager
def _machine() -> Iterator[None]:
    """Answers what Inductor and its code ask the machine, for the GPU that is not present."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import scheduler
    from torch._inductor.codegen.simd_kernel_features import SIMDKernelFeatures
    from torch._inductor.fx_passes import reinplace
    from torch._inductor.virtualized import V

    def accesses(self: SIMDKernelFeatures, original: Callable = SIMDKernelFeatures.buf_accesses) -> dict[str, list]:
        """Inductor's byte count misses a buffer that a kernel of the program wrote, as it is renamed by that."""
        found = collections.defaultdict(list)
        for name, uses in original(self).items():
            found[V.graph.scheduler.mutation_real_name.get(name, name)] += uses
        return found

    answers = [
        (torch.cuda, "is_available", True), (torch.cuda, "device_count", 1), (torch.cuda, "current_device", 0),
        (torch.cuda, "get_device_properties", H200), (torch.cuda, "get_device_capability", (9, 0)),
        (torch.cuda, "_lazy_init", None), (torch.cuda, "set_device", None),
        (torch.cuda, "get_rng_state", torch.zeros(16, dtype=torch.uint8)), (torch.cuda, "set_rng_state", None),
        (CudaInterface, "is_available", True), (CudaInterface, "get_compute_capability", 90),
        (CudaInterface, "get_device_properties", H200), (CudaInterface.Worker, "get_device_properties", H200),
        (scheduler, "has_triton", True), (fake_tensor, "init_gpu_context", None),
        (torch._C, "_cuda_getCurrentRawStream", 0),
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        for owner, name, answer in answers:
            value = lambda *_, answer=answer, **__: answer  # noqa: E731
            value = staticmethod(value) if isinstance(owner, type) else value
            stack.enter_context(mock.patch.object(owner, name, value, create=owner is torch._C))
        for name in ("device", "_DeviceGuard"):
            stack.enter_context(mock.patch.object(torch.cuda, name, contextlib.nullcontext))
        stack.enter_context(mock.patch.object(SIMDKernelFeatures, "buf_accesses", accesses))
        # a pass that writes into views of fake CUDA tensors, only for their shapes: the shape is the target's
        stack.enter_context(mock.patch.object(reinplace, "_inplace_generalized_scatter", lambda into, _, __: into))
        # a build without CUDA cannot run its definition on fake CUDA tensors
        shapes = {torch.ops.aten._unsafe_masked_index_put_accumulate.default: lambda into, *_: torch.empty_like(into)}
        stack.enter_context(mock.patch.dict(torch._decomp.decomposition_table, shapes))
        yield


def _on_gpu(module: fx.GraphModule, inputs: list) -> tuple[fx.GraphModule, list]:
    """A copy of the graph and its inputs with every tensor on the GPU."""
    module = copy.deepcopy(module)
    mode = next(value.fake_mode for value in inputs if isinstance(value, Tensor))

    for node in module.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": DEVICE}
    with mode:
        moved = tree_map_only(
            Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=DEVICE), list(inputs)
        )
    FakeTensorProp(module, mode).propagate(*moved)
    return module, moved


def _run_on_meta(code: types.ModuleType, kernels: list[Kernel], inputs: list) -> list[Call]:
    """The calls that the generated code makes, in order."""

    def empty(size, stride, dtype):
        return torch.empty_strided(size, stride, dtype=dtype, device="meta")

    calls: list[Call] = []

    class Operators(TorchDispatchMode):
        """Records every operator except views and allocations."""

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            name = function.overloadpacket.__name__
            if not function.is_view and not name.startswith(("empty", "detach")):
                calls.append(call_of(name, "library", (args, kwargs, result)))
            return result

    for kernel in kernels:
        kernel.record = calls.append
    code.empty_strided_cuda, code.copy_if_misaligned, code.assert_alignment = empty, lambda t: t, lambda *_: None
    code.reinterpret_tensor = lambda t, size, stride, offset=0: t.as_strided(size, stride, t.storage_offset() + offset)
    code.extern_kernels = _Library(code.extern_kernels, calls.append)
    with unset_fake_temporarily(), Operators():
        inputs = tree_map_only(Tensor, lambda t: empty(t.shape, t.stride(), t.dtype), inputs)
        code.call(inputs)
    return calls


@contextlib.contextmanager
def compiled_graphs() -> Iterator[list[Graph]]:
    """Collects a Graph for everything that torch.compile compiles inside. TRITON_INTERPRET must not be set."""
    import triton
    from torch._functorch import partitioners
    from torch._inductor import compile_fx
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import PyCodeCache
    from triton.backends.compiler import GPUTarget

    graphs: list[Graph] = []
    kernels: list[Kernel] = []
    loaded: list[types.ModuleType] = []

    def keep(_, name: str, source: str, *args, **kwargs) -> Kernel:
        kernels.append(Kernel(name, source))
        return kernels[-1]

    def load(*args, **kwargs):
        kernels.clear()
        loaded.append(original_load(*args, **kwargs))
        return loaded[-1]

    def inner(module: fx.GraphModule, inputs: list, **options):
        with _machine():
            moved, moved_inputs = _on_gpu(module, inputs)
            compile_fx.compile_fx_inner(moved, moved_inputs, **options)
            calls = _run_on_meta(loaded[-1], kernels, moved_inputs)
        graphs.append(Graph(bool(options.get("is_backward")), calls, list(kernels)))
        outputs = fx.map_arg(module.graph.output_node().args[0], lambda node: node.meta["val"])

        def run(_):  # memory that is never written costs nothing
            return tree_map_only(Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype), outputs)

        run._boxed_call = True
        return run

    def backend(module: fx.GraphModule, inputs: list, **options):  # one: equal blocks share code
        return compile_fx.compile_fx(module, inputs, inner_compile=inner, **options)

    def compile(*args, **options):
        return original_compile(*args, **{k: v for k, v in options.items() if k != "mode"}, backend=backend)

    original_load, original_compile = PyCodeCache.load_by_key_path, torch.compile
    driver = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0,
        get_active_torch_device=lambda: DEVICE, is_active=lambda: True,
    )  # fmt: skip
    options = {
        "force_disable_caches": True, "compile_threads": 1, "triton.autotune_at_compile_time": False,
        "profile_bandwidth": True,  # states each kernel's bytes in the code
    }  # fmt: skip
    torch._dynamo.reset()
    with (
        # attention counts as random; without dropout there is no state to keep for a checkpoint
        mock.patch.object(partitioners, "functionalize_rng_ops", lambda _, forward, backward, *__: (forward, backward)),
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(torch, "compile", compile),
        mock.patch.object(PyCodeCache, "load_by_key_path", load),
        mock.patch.object(AsyncCompile, "triton", keep),
        mock.patch.object(triton.runtime.jit.JITFunction, "run", lambda *_, **__: None),  # in eager code
        torch._inductor.config.patch(options),
    ):
        yield graphs
    torch._dynamo.reset()


def build(kernel: Kernel) -> tuple[int, int]:
    """Resources on sm_90, the worst of the kernel's configurations."""
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime import triton_helpers, triton_heuristics

    with (
        mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None),
        mock.patch.object(triton_heuristics.StaticTritonCompileResult, "can_statically_launch", lambda *_: None),
    ):
        tuner = getattr(PyCodeCache.load(kernel.source), kernel.name)
        found = [resources(tuner._precompile_config(config).kernel.asm["cubin"]) for config in tuner.configs]
    return max(found, key=lambda pair: (pair[1], pair[0]))


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers per thread, bytes of stack and local memory: spills)."""
    usage = cuobjdump(cubin, "-res-usage")
    number = {key: int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL")}
    return number["REG"], number["STACK"] + number["LOCAL"]


@functools.cache  # kernels that several ops share
def cuobjdump(cubin: bytes, option: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
