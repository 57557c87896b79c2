"""A fake GPU, for tests of the code that only a GPU runs.

`install` replaces PyTorch's factories, `Tensor.to`, `torch.Generator` and `torch.cuda` in this process. A tensor on
"cuda" is then a CPU tensor that says so (`OnGpu`). What a GPU refuses is an error: operators on tensors of both
devices, `.numpy()`, a generator of the other device and, during the capture of a CUDA graph, whatever waits for the
GPU or copies to or from it. A CUDA graph records operators and repeats them. Nothing is compiled.
"""

import functools
import os
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch._dynamo  # before `install`: it looks for the functions that are replaced
import torch.utils.checkpoint
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

PLAIN = torch._C.DisableTorchFunctionSubclass  # within it, operators treat OnGpu as Tensor
FACTORIES = """arange as_tensor asarray empty empty_like empty_strided eye full full_like linspace logspace normal ones
    ones_like rand rand_like randint randn randn_like randperm scalar_tensor tensor zeros zeros_like""".split()
WAITS = """item tolist __bool__ __int__ __float__ __index__ __contains__ nonzero masked_select is_nonzero equal
    allclose unique""".split()  # for the GPU
MIXES = """copy_ _foreach_copy_ module_load __set__ __getitem__ __setitem__ is_same_size type_as view_as
    expand_as _has_compatible_shallow_copy_type""".split()  # tensors of both devices
NAME, CAPABILITY, MEMORY = "NVIDIA H200", (9, 0), 141 << 30

to, new_generator = Tensor.to, torch.Generator
capturing: "CUDAGraph | None" = None


def device() -> torch.device:
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


class OnGpu(Tensor):
    """A CPU tensor that says that it is on `device()`."""

    device = property(lambda self: device())
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return device().index

    def __deepcopy__(self, memo: dict) -> Tensor:
        with PLAIN():
            copied = self.detach().clone()
        copied = placed(copied, True).requires_grad_(self.requires_grad)
        return memo.setdefault(id(self), torch.nn.Parameter(copied) if getattr(self, "_is_param", False) else copied)

    @classmethod
    def __torch_function__(cls, func: Callable, _, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = dict(kwargs or {}), func.__name__
        if capturing and name in WAITS:
            raise RuntimeError(f"{name} waits for the GPU, which a capture does not permit")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        others = [each for each in tensors if not isinstance(each, OnGpu) and each.dim() and each.numel()]
        if others and (capturing or name not in MIXES):
            raise RuntimeError(f"{name} takes tensors of both devices: {[tuple(each.shape) for each in others]} on cpu")
        if name in ("__getitem__", "__setitem__"):
            index = [each for each in tree_leaves(args[1]) if isinstance(each, Tensor) and each.dim()]
            if any(isinstance(each, OnGpu) for each in index) and not isinstance(args[0], OnGpu):
                raise RuntimeError("a tensor on cpu is indexed by one on the GPU")
            if capturing and any(each.dtype == torch.bool for each in index):
                raise RuntimeError("an index of booleans waits for the GPU, which a capture does not permit")
        if name == "backward":  # outside `PLAIN`: what its functions do is checked as well
            return func(*placed(args, False), **placed(kwargs, False))
        if name == "module_load":
            return moved(args[1].detach(), True).detach()
        on_gpu = is_gpu(kwargs.pop("device", None) or "cuda")
        check_generator(kwargs.get("generator"), on_gpu)
        with PLAIN():
            out = func(*args, **kwargs)
        return out if args and out is args[0] else placed(out, on_gpu)


class Generator(new_generator):
    def __new__(cls, place: Any = "cpu") -> "Generator":
        new = new_generator.__new__(cls)
        new.on_gpu = is_gpu(place)
        return new

    def __init__(self, place: Any = "cpu"):
        pass

    @property
    def device(self) -> torch.device:
        return device() if self.on_gpu else torch.device("cpu")


def is_gpu(place: Any) -> bool:
    return isinstance(place, int) or torch.device(place).type == "cuda"


def placed(out: Any, on_gpu: bool) -> Any:
    """The tensors in `out` as tensors of a device; nothing is copied."""

    def other(tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, OnGpu) == on_gpu else tensor.as_subclass(OnGpu if on_gpu else Tensor)

    with PLAIN():
        return tree_map_only(Tensor, other, out)


def moved(tensor: Tensor, on_gpu: bool, **kwargs: Any) -> Tensor:
    """Tensor.to: a copy, if the tensor is on the other device."""
    here = isinstance(tensor, OnGpu)
    if capturing and here != on_gpu:
        raise RuntimeError("a copy between devices, which a capture does not permit")
    with PLAIN():
        out = to(tensor, **kwargs)
        out = out.clone() if here != on_gpu and out.data_ptr() == tensor.data_ptr() else out
    return out if out is tensor else placed(out, on_gpu)


def move(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """In place of Tensor.to, with any of its signatures."""
    place = kwargs.pop("device", None)
    kwargs = {key: value for key, value in kwargs.items() if key in ("dtype", "copy", "memory_format") and value}
    for given in args:
        if isinstance(given, Tensor):
            place, kwargs["dtype"] = given.device, given.dtype
        elif isinstance(given, torch.dtype):
            kwargs["dtype"] = given
        elif isinstance(given, str | torch.device):
            place = given
    if place is not None and torch.device(place).type == "meta":
        with PLAIN():
            return to(self, "meta", **kwargs)
    return moved(self, isinstance(self, OnGpu) if place is None else is_gpu(place), **kwargs)


def check_generator(generator: torch.Generator | None, on_gpu: bool) -> None:
    if generator is None:
        return
    if getattr(generator, "on_gpu", False) != on_gpu:
        raise RuntimeError("a generator of the other device")
    if capturing and generator not in capturing.generators:
        raise RuntimeError("a generator that is not registered with the graph")


def factory(make: Callable) -> Callable:
    """A function that makes tensors, on both devices."""

    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Tensor:
        place, grad = kwargs.pop("device", None), kwargs.pop("requires_grad", False)
        kwargs.pop("pin_memory", None)
        if place is not None and torch.device(place).type == "meta":
            return make(*args, device="meta", requires_grad=grad, **kwargs)
        given = isinstance(args[0], OnGpu) if args else False
        on_gpu = given if place is None else is_gpu(place)
        check_generator(kwargs.get("generator"), on_gpu)
        if capturing and make.__name__ in ("tensor", "as_tensor", "asarray") and on_gpu and not given:
            raise RuntimeError(f"{make.__name__} copies to the GPU, which a capture does not permit")
        with PLAIN():
            out = placed(make(*args, **kwargs), on_gpu)
        return out.requires_grad_() if grad else out

    return made


class Recording(TorchDispatchMode):
    """Notes every operator, and what the storages contained that it writes to: a capture changes nothing."""

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}

    def __torch_dispatch__(self, func: Callable, _, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        named = dict(zip([each.name for each in func._schema.arguments], args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(named.get(argument.name)):
                    with PLAIN():
                        storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
                    if storage is not None and storage.data_ptr() not in self.before:
                        self.before[storage.data_ptr()] = storage, storage.clone()
        with PLAIN():
            out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out


class CUDAGraph:
    """Replays the operators that `capture` recorded, and writes their results where those of the capture are."""

    def __init__(self):
        self.calls, self.generators = [], []

    def register_generator_state(self, generator: Generator) -> None:
        self.generators.append(generator)

    def replay(self) -> None:
        assert self.calls, "nothing was captured"
        with torch.no_grad(), PLAIN(), torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, out in self.calls:
                for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and old.numel() and old.data_ptr() != new.data_ptr():
                        old.detach().copy_(new)


@contextmanager
def capture(graph: CUDAGraph, **_) -> Iterator[None]:
    global capturing
    assert not graph.calls and not capturing
    capturing = graph
    try:
        with Recording() as recording:
            yield
    finally:
        capturing = None
    graph.calls = recording.calls
    for storage, contents in recording.before.values():
        storage.copy_(contents)


class Stream:
    """A stream or an event: everything has already happened."""

    def __init__(self, *_, **__):
        pass

    def __getattr__(self, _: str) -> Callable:
        return lambda *_, **__: True


def refuse(name: str, method: Callable) -> Callable:
    def run(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, OnGpu):
            raise TypeError(f"{name} of a tensor on the GPU")
        return method(self, *args, **kwargs)

    return run


def ignored(*_: Any, **__: Any) -> None:
    """In place of a function without an effect on results."""


def install() -> None:
    """Give this process a GPU, and have fastdit use eager PyTorch in place of its kernels there."""
    os.environ["FASTDIT_KERNELS"] = "eager"
    properties = types.SimpleNamespace(name=NAME, total_memory=MEMORY, multi_processor_count=132)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "set_device", "set_rng_state", "_lazy_init"):
        setattr(torch.cuda, name, ignored)
    for name, value in {
        "is_available": True, "device_count": device().index + 1, "current_device": device().index,
        "get_device_capability": CAPABILITY, "get_device_name": NAME, "get_device_properties": properties,
        "max_memory_allocated": 1 << 30, "mem_get_info": (MEMORY, MEMORY), "get_rng_state": torch.zeros(1),
        "current_stream": Stream(), "stream": nullcontext(), "device": nullcontext(),
    }.items():  # fmt: skip
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    torch.cuda.Stream = torch.cuda.Event = Stream
    torch.cuda.CUDAGraph, torch.cuda.graph = CUDAGraph, capture
    torch.cuda.is_current_stream_capturing = lambda: capturing is not None
    for name in FACTORIES:
        setattr(torch, name, factory(getattr(torch, name)))
    torch.Generator = Generator
    Tensor.to = move
    Tensor.cpu, Tensor.cuda = lambda self, **_: moved(self, False), lambda self, *_, **__: moved(self, True)
    Tensor.record_stream = ignored
    Tensor.pin_memory = refuse("pin_memory", lambda self: self.clone())
    Tensor.numpy, Tensor.__array__ = refuse("numpy", Tensor.numpy), refuse("__array__", Tensor.__array__)
    torch.compile, torch.nn.Module.compile = lambda function, **_: function, ignored
    replace_internals()


def replace_internals() -> None:
    """What in PyTorch asks for a device in C++, where every tensor is on the CPU."""
    torch.__future__.set_swap_module_params_on_conversion(True)  # Module.to keeps the class of new parameters
    autocast = torch.autocast.__init__
    torch.autocast.__init__ = lambda self, device_type, *rest, **more: autocast(
        self, "cpu" if device_type == "cuda" else device_type, *rest, **more)  # fmt: skip
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        ask = getattr(torch, name)
        setattr(torch, name, lambda kind="cpu", ask=ask: ask("cpu" if kind == "cuda" else kind))
    backward = torch.autograd.function.BackwardCFunction
    apply = backward.apply
    backward.apply = lambda self, *gradients: apply(self, *placed(gradients, True))
    differentiate = torch.autograd.grad
    torch.autograd.grad = lambda outputs, *rest, **more: placed(differentiate(outputs, *rest, **more), True)
    by_device = torch._C._group_tensors_by_device_and_dtype

    def grouped(lists: list, with_indices: bool) -> dict:
        on_gpu = any(isinstance(each, OnGpu) for each in tree_leaves(lists))
        return {(device() if on_gpu else place, dtype): placed(found, on_gpu)
                for (place, dtype), found in by_device(lists, with_indices).items()}  # fmt: skip

    torch._C._group_tensors_by_device_and_dtype = grouped
    checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
    checks["default"] = lambda x: {"shape": x.shape, "dtype": x.dtype}
    join = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda _, **kwargs: join("gloo", **kwargs)
