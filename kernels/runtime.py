"""What every op shares: the choice between Triton and eager PyTorch, registration, launches and test inputs.

`FASTDIT_KERNELS=auto` (default) uses Triton on NVIDIA GPUs of compute capability 8.0 and higher, and eager PyTorch
elsewhere. `eager` always uses eager PyTorch. `triton` raises a ValueError where Triton cannot run. On CPU, `triton`
needs Triton's interpreter (TRITON_INTERPRET=1 set before the import), which is how the tests run the kernels.
"""

import contextlib
import dataclasses
import functools
import os
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the definitions in eager PyTorch work without Triton

    class triton:
        @staticmethod
        def jit(fn: Callable) -> Callable:
            return fn

    class tl:
        constexpr = None

    HAS_TRITON = False
else:
    HAS_TRITON = True

INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MODES = ("auto", "triton", "eager")


@dataclasses.dataclass(frozen=True)
class Op:
    """One fused op: what tests and benchmarks loop over.

    eager: the definition in eager PyTorch and the tests' reference. triton: the same through the kernels. public:
    chooses between the two. All three take the keyword arguments that `inputs` returns.
    inputs(shape, dtype, device, seed): keyword arguments; floating-point tensors that require grad are differentiated.
    tiny: shape for gradcheck. shapes: shapes for the tests, of awkward sizes. real: shapes of DiT models at batch 256,
    for benchmarks and static checks.
    minimum_bytes(shape, itemsize) -> (forward, backward): each input read once, each output written once.
    most_bytes: how many times the minimum the kernels may move.
    writes: for each launch, forward and then backward, the kernel arguments that it writes; none where the kernel finds
    its tensors through a table of addresses. Such an op is not registered for torch.compile.
    writes_hopper: the same for shapes with kernels of their own on compute capability 9.
    variants: changes to the keyword arguments that select other options, for the tests.
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
    writes: tuple[tuple[str, ...], ...]
    writes_hopper: tuple[tuple[str, ...], ...] = ()
    variants: tuple[dict[str, Any], ...] = ()
    most_bytes: float = 1.05


# ---- choice

def _obstacle(mode: str, device: str, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why Triton cannot (or, on CPU, should not) run, or None."""
    if not HAS_TRITON:
        return "triton is not installed"
    wrong = [str(dtype) for dtype in dtypes if dtype not in DTYPES]
    if wrong:
        return f"no kernel for {wrong[0]}"
    if device == "cuda":
        capability = torch.cuda.get_device_capability()
        return None if capability >= (8, 0) else f"compute capability {capability} is below (8, 0)"
    if device == "cpu" and mode == "triton":
        return None if INTERPRET else "no GPU, and TRITON_INTERPRET=1 was not set before the import"
    return "no GPU" if device == "cpu" else f"no kernels for {device}"


@functools.cache
def _decide(op: str, mode: str, device: str, dtypes: tuple[torch.dtype, ...]) -> str:
    """"triton" or "eager (reason)"; ValueError where Triton was asked for and cannot run."""
    if mode not in MODES:
        raise ValueError(f"FASTDIT_KERNELS={mode!r} is unknown; use one of {', '.join(MODES)}")
    obstacle = "FASTDIT_KERNELS=eager" if mode == "eager" else _obstacle(mode, device, dtypes)
    if mode == "triton" and obstacle:
        raise ValueError(f"FASTDIT_KERNELS=triton is impossible for {op}: {obstacle}; use auto or eager")
    return f"eager ({obstacle})" if obstacle else "triton"


@torch.compiler.assume_constant_result
def use_triton(op: str, device: str, *dtypes: torch.dtype) -> bool:
    """The choice for one op; a constant of the graph under torch.compile."""
    return _decide(op, os.environ.get("FASTDIT_KERNELS", "auto"), device, dtypes) == "triton"


def choice() -> str:
    """What runs on the current device, for a log line: "triton", or "eager" with the reason, as in "eager (no GPU)"."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return _decide("the kernels", os.environ.get("FASTDIT_KERNELS", "auto"), device, ())


ABSENT_GPU = (8, 0)  # whose kernels run in the interpreter and are recorded on meta tensors


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of the device, or of the GPU that it stands for."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else ABSENT_GPU


# ---- registration and launch

class _State(threading.local):
    dry: bool = False  # in a fake implementation: shapes only, no launch
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


class wrap_triton:  # torch.library looks for this name in the source of an op to find its kernels
    """wrap_triton(kernel)[grid](...) launches on the device of the first tensor; an empty grid launches nothing.

    `traced=False` for a launch that is not within a `triton_op`.
    """

    def __init__(self, kernel: Any, traced: bool = True):
        self.kernel, self.traced = kernel, traced and not INTERPRET

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        if 0 in grid:
            return
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        if _state.dry or device.type == "meta":
            if _state.launches is not None:
                _state.launches.append((self.kernel, grid, args, kwargs))
            return
        kernel = torch.library.wrap_triton(self.kernel) if self.traced else self.kernel
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[grid](*args, **kwargs)


def triton_op(name: str) -> Callable[[Callable], Any]:
    """torch.library.triton_op whose fake implementation is the same body with its launches left out.

    torch.compile traces into such an op and sees its kernels. It cannot see interpreted kernels, so under the
    interpreter the op is an opaque custom_op.
    """

    def register(body: Callable) -> Any:
        if not HAS_TRITON:
            return types.SimpleNamespace(register_autograd=lambda *_, **__: None)  # never called
        op = (torch.library.custom_op if INTERPRET else torch.library.triton_op)(name, mutates_args=())(body)

        def fake(*args: Any, **kwargs: Any) -> Any:
            _state.dry = True
            try:
                return body(*args, **kwargs)
            finally:
                _state.dry = False

        op.register_fake(fake)
        return op

    return register


def unit_stride(x: Tensor | None) -> Tensor | None:
    """The kernels accept any strides but the last, which must be 1."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def check(name: str, x: Tensor | None, *shape: int) -> None:
    """ValueError unless x is None or has this shape."""
    if x is not None and tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; give it {shape}")


def random_inputs(seed: int, dtype: torch.dtype, device: str, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Normal tensors that require grad, drawn in fp64, so that every dtype sees the same values up to rounding."""
    rng = torch.Generator("cpu" if device == "meta" else device).manual_seed(seed)
    out = {}
    for name, shape in shapes.items():
        if device == "meta":
            value = torch.empty(shape, dtype=dtype, device=device)
        else:
            value = (torch.randn(shape, generator=rng, dtype=torch.float64, device=device) * 0.5 + 0.25).to(dtype)
        out[name] = value.requires_grad_()
    return out
