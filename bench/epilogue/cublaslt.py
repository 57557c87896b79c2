"""The MLP's products by cuBLASLt, whose epilogues apply bias and GELU (by tanh), or multiply by GELU's derivative.

PyTorch has no interface to the two epilogues that training needs, so the library that it has loaded is called through
ctypes. Names and numbers are those of cublasLt.h. The library counts columns first: a row-major (M, N) tensor is its
(N, M) matrix.
"""

import ctypes
import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

CUDA_R_32F, TYPES = 0, {torch.float16: 2, torch.bfloat16: 14}  # cudaDataType
CUBLAS_COMPUTE_32F, CUBLAS_OP_N, CUBLAS_OP_T = 68, 0, 1
TRANSA, TRANSB, EPILOGUE, BIAS_POINTER, AUX_POINTER, AUX_LD = 3, 4, 7, 8, 11, 12  # CUBLASLT_MATMUL_DESC_...
GELU_AUX_BIAS, DGELU_BGRAD = 32 | 128 | 4, 64 | 128 | 16  # CUBLASLT_EPILOGUE_...
MAX_WORKSPACE_BYTES = 1  # CUBLASLT_MATMUL_PREF_...
WORKSPACE = 32 << 20  # bytes, what NVIDIA recommends for Hopper
ALGORITHMS = 8  # asked for; the fastest of them is kept


class Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = [("algo", ctypes.c_uint64 * 8), ("workspace", ctypes.c_size_t), ("state", ctypes.c_int),
                ("waves", ctypes.c_float), ("reserved", ctypes.c_int * 4)]  # fmt: skip


@functools.cache
def library() -> tuple[ctypes.CDLL, ctypes.c_void_p]:
    """PyTorch's cuBLASLt and a handle."""
    lib, handle = ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.partition('.')[0]}"), ctypes.c_void_p()
    _check(lib.cublasLtCreate(ctypes.byref(handle)), "cublasLtCreate")
    return lib, handle


@functools.cache
def _workspace(device: torch.device) -> Tensor:
    return torch.empty(WORKSPACE, dtype=torch.uint8, device=device)


def _check(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"{what} failed with cublasStatus_t {status}")


def _layout(lib: ctypes.CDLL, x: Tensor) -> ctypes.c_void_p:
    layout, (rows, columns) = ctypes.c_void_p(), x.shape
    status = lib.cublasLtMatrixLayoutCreate(ctypes.byref(layout), TYPES[x.dtype], ctypes.c_uint64(columns),
                                            ctypes.c_uint64(rows), ctypes.c_int64(x.stride(0)))  # fmt: skip
    _check(status, "cublasLtMatrixLayoutCreate")
    return layout


class Product:
    """out (M, N) = epilogue(b (M, K) a): a is (N, K), transposed, or (K, N); for tensors of one shape and dtype.

    The first call times the algorithms that the library proposes and keeps the fastest, so it must not be captured.
    """

    def __init__(self, a: Tensor, transposed: bool, b: Tensor, out: Tensor, epilogue: int):
        self.lib, self.handle = library()
        self.desc, self.best = ctypes.c_void_p(), None
        _check(self.lib.cublasLtMatmulDescCreate(ctypes.byref(self.desc), CUBLAS_COMPUTE_32F, CUDA_R_32F), "desc")
        self._set(TRANSA, ctypes.c_int32(CUBLAS_OP_T if transposed else CUBLAS_OP_N))
        self._set(TRANSB, ctypes.c_int32(CUBLAS_OP_N))
        self._set(EPILOGUE, ctypes.c_uint32(epilogue))
        self._set(AUX_LD, ctypes.c_int64(out.stride(0)))
        self.layouts = [_layout(self.lib, x) for x in (a, b, out)]

    def _set(self, attribute: int, value: ctypes._SimpleCData) -> None:
        status = self.lib.cublasLtMatmulDescSetAttribute(self.desc, attribute, ctypes.byref(value),
                                                         ctypes.c_size_t(ctypes.sizeof(value)))  # fmt: skip
        _check(status, f"cublasLtMatmulDescSetAttribute({attribute})")

    def __call__(self, a: Tensor, b: Tensor, out: Tensor, aux: Tensor, bias: Tensor) -> None:
        """`aux` (M, N): u, written or read; `bias` (N,): read, or its gradient, written."""
        self._set(BIAS_POINTER, ctypes.c_void_p(bias.data_ptr()))
        self._set(AUX_POINTER, ctypes.c_void_p(aux.data_ptr()))
        if self.best is None:
            calls = [functools.partial(self._run, a, b, out, found) for found in self._algorithms()]
            self.best = fastest(calls).args[-1]
        self._run(a, b, out, self.best)

    def _algorithms(self) -> list[Heuristic]:
        preference, limit = ctypes.c_void_p(), ctypes.c_uint64(WORKSPACE)
        found, count = (Heuristic * ALGORITHMS)(), ctypes.c_int()
        _check(self.lib.cublasLtMatmulPreferenceCreate(ctypes.byref(preference)), "preference")
        status = self.lib.cublasLtMatmulPreferenceSetAttribute(preference, MAX_WORKSPACE_BYTES, ctypes.byref(limit),
                                                               ctypes.c_size_t(8))  # fmt: skip
        _check(status, "cublasLtMatmulPreferenceSetAttribute")
        a, b, out = self.layouts
        status = self.lib.cublasLtMatmulAlgoGetHeuristic(self.handle, self.desc, a, b, out, out, preference,
                                                         ALGORITHMS, found, ctypes.byref(count))  # fmt: skip
        _check(status, "cublasLtMatmulAlgoGetHeuristic")
        self.lib.cublasLtMatmulPreferenceDestroy(preference)
        return [each for each in found[: count.value] if each.state == 0]

    def _run(self, a: Tensor, b: Tensor, out: Tensor, found: Heuristic) -> None:
        one, zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in (a, b, out, _workspace(out.device))]
        a_layout, b_layout, out_layout = self.layouts
        status = self.lib.cublasLtMatmul(
            self.handle, self.desc, ctypes.byref(one), pointers[0], a_layout, pointers[1], b_layout,
            ctypes.byref(zero), pointers[2], out_layout, pointers[2], out_layout, ctypes.byref(found.algo),
            pointers[3], ctypes.c_size_t(WORKSPACE), ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )  # fmt: skip
        _check(status, "cublasLtMatmul")


def fastest(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """The call with the shortest time on this GPU, the best of five; those that fail are left out."""
    times = {}
    for call in calls:
        try:
            call()
        except Exception as error:
            print(f"a candidate does not run: {str(error).splitlines()[0][:200]}", file=sys.stderr)
            continue
        times[call] = float("inf")
        for _ in range(5):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times[call] = min(times[call], begin.elapsed_time(end))
    if not times:
        raise RuntimeError("no candidate runs on this GPU")
    return min(times, key=times.get)


@functools.cache
def _product(shapes: tuple, dtype: torch.dtype, device: torch.device, transposed: bool, epilogue: int) -> Product:
    a, b, out = (torch.empty(shape, dtype=dtype, device=device) for shape in shapes)
    return Product(a, transposed, b, out, epilogue)


def up(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K), weight (N, K), bias (N,) -> u = x weight^T + bias and gelu(u), (M, N) each."""
    u, y = (torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device) for _ in range(2))
    shapes = tuple(weight.shape), tuple(x.shape), tuple(y.shape)
    _product(shapes, x.dtype, x.device, True, GELU_AUX_BIAS)(weight, x, y, u, bias)
    return u, y


def down(d_y: Tensor, weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """d_y (M, K), weight (K, N), u (M, N) -> d_u = (d_y weight) gelu'(u) (M, N), and its sum over rows (N,)."""
    d_u = torch.empty_like(u)
    d_bias = torch.empty(u.shape[1], dtype=u.dtype, device=u.device)
    shapes = tuple(weight.shape), tuple(d_y.shape), tuple(d_u.shape)
    _product(shapes, u.dtype, u.device, False, DGELU_BGRAD)(weight, d_y, d_u, u, d_bias)
    return d_u, d_bias
