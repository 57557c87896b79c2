"""attention for short sequences: softmax(scale q k^T) v, non-causal, T <= 1024, also for head sizes such as 72.

A head of 72 is 64 + 16 columns: two products instead of one padded to 128. The forward pass follows Dao 2023 (online
softmax, base 2). The backward pass recomputes the scores twice, for d_k and d_v and for d_q, so that one program owns
each sum: no atomics, so results are deterministic. On Hopper a head of up to 256 tokens fits one program, which owns
all three sums and computes the scores once (see `_whole`). `model.attention=triton` selects this op; `auto` selects it
where it was measured to be fastest.
"""

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fp8
from .attention_kernels import (
    _attention_backward_kv,
    _attention_backward_q,
    _attention_backward_whole,
    _attention_forward,
)
from .runtime import (
    HAS_TRITON,
    INTERPRET,
    Op,
    capability,
    cdiv,
    check,
    random_inputs,
    triton,
    triton_op,
    unit_stride,
    use_triton,
    wrap_triton,
)
from .tiles import split_columns

LONGEST = 1024
# By itemsize: fp32 operands take twice the shared memory.
FORWARD = {2: {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
           4: {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}}  # fmt: skip
BACKWARD_Q = {2: {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
              4: {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}}  # fmt: skip
BACKWARD_KV = {2: {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
               4: {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}}  # fmt: skip
BACKWARD_WHOLE = {2: {"BLOCK_M": 256, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}}  # 216 KiB of shared memory
UNVERIFIED = 0 if INTERPRET else 64  # tokens up to which the kernel for a whole head was not run on a GPU
WHOLE_FITS = INTERPRET or HAS_TRITON and triton.__version__.startswith("3.6.")  # 3.9 needs 12 registers more: it spills


def _whole(gpu: tuple[int, int], q: Tensor) -> bool:
    """Whether one program holds a head, q (N, H, T, D), in the backward pass on a GPU of this compute capability."""
    t, d = q.shape[2:]
    # 129 to 255 are padded to 256, with a mask that does not fit beside them
    tokens = UNVERIFIED < t <= 128 or t in (192, 256)
    return WHOLE_FITS and gpu[0] == 9 and q.dtype.itemsize == 2 and tokens and 64 <= d <= 80


def attention_eager(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """The definition."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q * scale) @ k.transpose(-2, -1)  # (N, H, T, T)
    return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype) @ v


def _constants(q: Tensor, scale: float) -> dict[str, Any]:
    """The constants of all three kernels, for q (N, H, T, D)."""
    _, h, t, d = q.shape
    a, b = split_columns(max(d, 16))
    return {"SCALE": scale, "H": h, "T": t, "D": d, "A": a, "B": max(b, 16) if b else 0}


def _blocks(config: dict[int, dict[str, int]], q: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Grid and launch options; blocks are powers of two, no longer than the sequence needs."""
    n, h, t, _ = q.shape
    config = dict(config[q.dtype.itemsize])
    config |= {key: min(config[key], max(16, 1 << (t - 1).bit_length())) for key in ("BLOCK_M", "BLOCK_N")}
    return (cdiv(t, config["BLOCK_M"]) * n * h,), config


def _operands(m: int, d: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Empty rows (m, d / 2) and columns (d, padded m / 2), whose last ones are zero, two FP8 values in each int16."""
    rows, columns = fp8.operands(m, d, dtype, device)
    if 2 * columns.shape[1] > m:  # under torch.compile, this copies the columns
        columns[:, m // 2 :] = 0
    return rows.view(torch.int16), columns


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, factor: Tensor | None = None
) -> tuple[Tensor, ...]:
    """q, k, v (N, H, T, D) -> out (N, T, H, D) and the log2-sum-exp2 of the scores, (N, H, T) fp32.

    With `factor` (1,) also what `fp8_cast` makes of out as (N T, H D): rows, columns and the largest magnitudes.
    """
    n, h, t, d = q.shape
    out = torch.empty((n, t, h, d), dtype=q.dtype, device=q.device)
    lse = torch.empty((n, h, t), dtype=torch.float32, device=q.device)
    grid, config = _blocks(FORWARD, q)
    if t <= 64 and q.dtype.itemsize == 2:  # one block: with 4 warps, heads of 72 were wrong on an H200 (Triton 3.6)
        config["num_warps"] = 8
    strides = [x.stride(dim) for dim in range(3) for x in (q, k, v)]
    low = (None,) * 5
    if factor is not None:
        most = torch.empty(grid, dtype=torch.float32, device=q.device)
        rows, columns = _operands(n * t, h * d, fp8.FORWARD, q.device)
        low = rows, columns, factor, most, columns.shape[1]
    wrap_triton(_attention_forward)[grid](
        q, k, v, out, lse, *low, *strides, FP8=int(factor is not None), **_constants(q, scale), **config
    )
    return (out, lse) if factor is None else (out, lse, rows.view(fp8.FORWARD), columns.view(fp8.FORWARD), most)


def launch_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
    factor: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """d_out, out (N, T, H, D), q, k, v (N, H, T, D) -> d_qkv (N, T, 3, H, D).

    With `factor` (1,) instead what `fp8_cast` makes of d_qkv as (N T, 3 H D), rows, columns and the largest magnitudes,
    and its sums over blocks of rows, (1, blocks, 3 H D) fp32.
    """
    d_out, q, k, v = (unit_stride(x) for x in (d_out, q, k, v))
    n, h, t, d = q.shape
    strides = [x.stride(dim) for dim in range(3) for x in (d_out.transpose(1, 2), q, k, v)]
    constants = _constants(q, scale)
    if factor is None:
        d_qkv = torch.empty((n, t, 3, h, d), dtype=q.dtype, device=q.device)
        low = (None,) * 5
        if _whole(capability(q.device), q):  # FP8 does not fit there
            grid, config = _blocks(BACKWARD_WHOLE, q)
            wrap_triton(_attention_backward_whole)[grid](
                d_out, q, k, v, out, lse, d_qkv, *strides, **constants, **config
            )
            return (d_qkv,)
    grid, config = _blocks(BACKWARD_Q, q)
    if factor is not None:
        chunks = grid[0] // h
        most = torch.empty(chunks * 3 * h, dtype=torch.float32, device=q.device)
        partial = torch.empty((1, chunks, 3 * h * d), dtype=torch.float32, device=q.device)
        d_qkv, columns = _operands(n * t, 3 * h * d, fp8.GRADIENT, q.device)
        low = columns, factor, partial, most, columns.shape[1]
    constants["FP8"] = int(factor is not None)
    delta = torch.empty((n, h, t), dtype=torch.float32, device=q.device)  # per query: sum of out d_out
    wrap_triton(_attention_backward_q)[grid](
        d_out, q, k, v, out, lse, delta, d_qkv, *low, *strides, **constants, **config
    )
    grid, config = _blocks(BACKWARD_KV, q)
    wrap_triton(_attention_backward_kv)[grid](
        d_out, q, k, v, lse, delta, d_qkv, *low, *strides, **constants, **config
    )
    return (d_qkv,) if factor is None else (d_qkv.view(fp8.GRADIENT), columns.view(fp8.GRADIENT), most, partial)


@triton_op("fastdit::attention")
def _op(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return launch_forward(unit_stride(q), unit_stride(k), unit_stride(v), scale)


@triton_op("fastdit::attention_packed")
def _op_packed(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = unit_stride(qkv).permute(2, 0, 3, 1, 4).unbind()
    return launch_forward(q, k, v, scale)


@triton_op("fastdit::attention_backward")
def _op_backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    """d_out, out (N, T, H, D), q, k, v (N, H, T, D) -> d_qkv (N, T, 3, H, D)."""
    return launch_backward(d_out, q, k, v, out, lse, scale)[0]


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _grad(ctx: Any, d_out: Tensor, _: None) -> tuple:
    q, k, v, out, lse = ctx.saved_tensors
    d_q, d_k, d_v = _op_backward(d_out, q, k, v, out, lse, ctx.scale).permute(2, 0, 3, 1, 4).unbind()
    return d_q, d_k, d_v, None


def _grad_packed(ctx: Any, d_out: Tensor, _: None) -> tuple:
    qkv, out, lse = ctx.saved_tensors
    return _op_backward(d_out, *qkv.permute(2, 0, 3, 1, 4).unbind(), out, lse, ctx.scale), None


_op.register_autograd(_grad, setup_context=_setup)
_op_packed.register_autograd(_grad_packed, setup_context=_setup)


def check_length(t: int) -> None:
    if t > LONGEST:
        raise ValueError(f"T={t} exceeds {LONGEST}, the longest sequence of this kernel; use SDPA")


def attention_triton(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    return _op(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)[0].transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v: q, k, v (N, H, T, D) -> (N, H, T, D), stored token-major; scale defaults to 1 / sqrt(D).

    Where Triton is not used (see FASTDIT_KERNELS) this is PyTorch's scaled_dot_product_attention.
    ValueError if the shapes differ or T exceeds 1024.
    """
    check("k", k, *q.shape)
    check("v", v, *q.shape)
    check_length(q.shape[2])
    if use_triton("attention", q.device.type, q.dtype):
        return attention_triton(q, k, v, scale)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def attention_packed_triton(qkv: Tensor, scale: float | None = None) -> Tensor:
    return _op_packed(qkv, qkv.shape[-1] ** -0.5 if scale is None else scale)[0]


def attention_packed_eager(qkv: Tensor, scale: float | None = None) -> Tensor:
    """The definition."""
    return attention_eager(*qkv.permute(2, 0, 3, 1, 4), scale).transpose(1, 2)


def attention_packed(qkv: Tensor, scale: float | None = None) -> Tensor:
    """`attention` on the packed projection, with a packed gradient: qkv (N, T, 3, H, D) -> (N, T, H, D)."""
    check("qkv", qkv, *qkv.shape[:2], 3, *qkv.shape[3:])
    check_length(qkv.shape[1])
    if use_triton("attention_packed", qkv.device.type, qkv.dtype):
        return attention_packed_triton(qkv, scale)
    return F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), scale=scale).transpose(1, 2)


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    n, h, t, d = shape
    return random_inputs(seed, dtype, device, q=shape, k=shape, v=shape)


def packed_inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    n, h, t, d = shape
    return random_inputs(seed, dtype, device, qkv=(n, t, 3, h, d))


def minimum_bytes(shape: tuple[int, int, int, int], size: int) -> tuple[int, int]:
    tensor, stats = math.prod(shape) * size, math.prod(shape[:3]) * 4
    return 4 * tensor + stats, 8 * tensor + stats


ATTENTION = Op(
    "attention", attention_eager, attention_triton, attention, inputs,
    tiny=(1, 2, 3, 8), shapes=((2, 2, 41, 72), (1, 1, 64, 64)), real=((256, 16, 256, 64), (256, 16, 256, 72)),
    minimum_bytes=minimum_bytes, most_bytes=4,  # keys and values are read once per block of queries, from the L2 cache
    writes=(("out", "lse"), ("delta", "d_qkv"), ("d_qkv",)), writes_hopper=(("out", "lse"), ("d_qkv",)),
    variants=({"scale": 0.3},),
)  # fmt: skip
ATTENTION_PACKED = dataclasses.replace(
    ATTENTION, name="attention_packed", eager=attention_packed_eager, triton=attention_packed_triton,
    public=attention_packed, inputs=packed_inputs, shapes=((2, 2, 41, 72), (1, 1, 96, 72)), real=((256, 16, 256, 72),),
)  # fmt: skip
