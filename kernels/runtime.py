"""What every op here shares: the choice between Triton and eager, registration, launch shapes.

`FASTDIT_KERNELS=auto` (default) takes Triton on NVIDIA GPUs of compute capability 8.0 and up, eager PyTorch elsewhere;
`eager` takes the definitions; `triton` insists and raises where that is impossible. On CPU, `triton` works under
Triton's interpreter (TRITON_INTERPRET=1 set before the import), which is how the tests run the kernels.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the definitions in eager PyTorch still work

    class triton:  # noqa: N801
        @staticmethod
        def jit(fn: Callable) -> Callable:
            return fn

    class tl:  # noqa: N801
        constexpr = None

    HAS_TRITON = False
else:
    HAS_TRITON = True

INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MODES = ("auto", "triton", "eager")
log = logging.getLogger("fastdit.kernels")


@dataclasses.dataclass(frozen=True)
class Op:
    """One fused op: what tests and benchmarks loop over. All callables take the keywords that `inputs` makes.

    eager: the definition and oracle. triton: the same through the kernels. public: chooses between the two.
    inputs(shape, dtype, device, seed): the keyword arguments; floating tensors that require grad are differentiated.
    shapes: awkward ones for the tests, `tiny` for gradcheck, `real` those of DiT models (batch 256) for benchmarks and
    static proofs.
    minimum_bytes(shape, itemsize) -> (forward, backward): each input read once, each output written once.
    """

    name: str
    eager: Callable
    triton: Callable
    public: Callable
    inputs: Callable[..., dict[str, Any]]
    tiny: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    real: tuple[tuple[int, ...], ...]
    minimum_bytes: Callable[[tuple[int, ...], int], tuple[int, int]]


# ---- choice

@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _obstacle(mode: str, device: str, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why Triton cannot (or, on CPU, should not) run, or None."""
    if not HAS_TRITON:
        return "triton is not installed"
    wrong = [str(dtype) for dtype in dtypes if dtype not in DTYPES]
    if wrong:
        return f"no kernel for {wrong[0]}"
    if device == "cuda":
        capability = _capability(torch.cuda.current_device())
        return None if capability >= (8, 0) else f"compute capability {capability} is below (8, 0)"
    if device == "cpu" and mode == "triton":
        return None if INTERPRET else "tensors are on cpu and TRITON_INTERPRET=1 was not set before the import"
    return f"tensors are on {device}"


@functools.cache
def _decide(op: str, mode: str, device: str, dtypes: tuple[torch.dtype, ...]) -> bool:
    if mode not in MODES:
        raise ValueError(f"FASTDIT_KERNELS={mode!r} is unknown; use one of {', '.join(MODES)}")
    obstacle = "FASTDIT_KERNELS=eager" if mode == "eager" else _obstacle(mode, device, dtypes)
    if mode == "triton" and obstacle:
        raise ValueError(f"FASTDIT_KERNELS=triton is impossible for {op}: {obstacle}; use auto or eager")
    log.info("kernel %s on %s: %s", op, device, f"eager ({obstacle})" if obstacle else "triton")
    return obstacle is None


@torch.compiler.assume_constant_result
def use_triton(op: str, device: str, *dtypes: torch.dtype) -> bool:
    """The choice for one op, logged when first made; torch.compile takes it as a constant of the graph."""
    return _decide(op, os.environ.get("FASTDIT_KERNELS", "auto"), device, dtypes)


# ---- registration and launch

class _State(threading.local):
    dry: bool = False  # shapes only: no launch
    launches: list[tuple] | None = None


_state = _State()


@contextlib.contextmanager
def record_launches() -> Iterator[list[tuple]]:
    """Collect (kernel, grid, args, kwargs) of every launch that ops on meta tensors would make."""
    _state.launches = []
    try:
        yield _state.launches
    finally:
        _state.launches = None


def wrap_triton(kernel: Any) -> Any:
    """torch.library.wrap_triton, and under a fake or meta tensor a launcher that launches nothing."""
    if _state.dry:
        return _DryKernel(kernel)
    return kernel if INTERPRET else torch.library.wrap_triton(kernel)


class _DryKernel:
    def __init__(self, kernel: Any):
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def launch(*args: Any, **kwargs: Any) -> None:
            if _state.launches is not None:
                _state.launches.append((self.kernel, grid, args, kwargs))

        return launch


def triton_op(name: str, body: Callable | None = None, *, mutates_args: tuple[str, ...] = ()) -> Any:
    """torch.library.triton_op whose fake is the same body with its launches left out.

    The compiler sees into such an op; interpreted kernels it cannot see, so there the op is an opaque custom_op.
    """
    if body is None:
        return functools.partial(triton_op, name, mutates_args=mutates_args)
    if not HAS_TRITON:
        return _Absent()
    register = torch.library.custom_op if INTERPRET else torch.library.triton_op
    op = register(name, mutates_args=mutates_args)(body)

    def fake(*args: Any, **kwargs: Any) -> Any:
        _state.dry = True
        try:
            return body(*args, **kwargs)
        finally:
            _state.dry = False

    op.register_fake(fake)
    return op


class _Absent:
    """Stands for a registered op where there is no Triton; never called."""

    def register_autograd(self, *args: Any, **kwargs: Any) -> None:
        pass


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device; make that the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


# ---- launch shapes: functions of the sizes alone, so that a sum's order, and its bits, never depend on the machine

def split_columns(d: int) -> tuple[int, int]:
    """Cover d columns by two powers of two (a, b): 1152 = 1024 + 128 idles no lane, a block of 2048 would idle 44%."""
    a = 1 << (d.bit_length() - 1)
    return a, (1 << (d - a - 1).bit_length() if d > a else 0)


def warps_for(a: int) -> int:
    """Warps such that each thread owns 8 of the a columns: 16-byte accesses, column sums inside the thread."""
    return min(max(a // 256, 1), 8)


def rows_per_program(n: int, t: int, programs: int, most: int) -> int:
    """Rows of one (sample, chunk) program: enough programs to fill the chip, few enough to spare re-reads.

    A power of two in [16, most]; `programs` are wanted, fewer are made where the batch is small.
    """
    wanted = n * t // programs
    return min(max(1 << max(wanted.bit_length() - 1, 0), 16), most)


def column_block(d: int) -> int:
    """Columns a program of an elementwise op takes: a power of two that divides d where one of 64..512 does."""
    return next((c for c in (512, 256, 128, 64) if d % c == 0), min(1 << (d - 1).bit_length(), 512))


def as_rows(x: Tensor) -> Tensor:
    """(..., D) -> (rows, D), last stride 1; a view where the memory allows one."""
    return unit_stride(x.reshape(-1, x.shape[-1]))


def unit_stride(x: Tensor) -> Tensor:
    """The kernels read any strides but the last; that one must be 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def check(name: str, x: Tensor, *shape: int) -> None:
    """ValueError unless x has this shape."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; give it {shape}")


def random_inputs(
    seed: int, dtype: torch.dtype, device: str, **shapes: tuple[int, ...]
) -> dict[str, Tensor]:
    """Normal tensors that require grad, drawn in fp64, so that every dtype sees the same values but for rounding."""
    rng = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in shapes.items():
        if device == "meta":
            value = torch.empty(shape, dtype=dtype, device=device)
        else:
            value = (torch.randn(shape, generator=rng, dtype=torch.float64) * 0.5 + 0.25).to(device, dtype)
        out[name] = value.requires_grad_()
    return out
