"""adamw_ema: AdamW (Loshchilov & Hutter 2019), the EMA of the weights and their low-precision copy, in one pass.

One launch updates all tensors of a network. It reads gradient, weights, Adam's two averages and the EMA once and writes
the last four once: 36 bytes per parameter with fp32 gradients. The kernel finds the tensors through a table of
addresses, which torch.compile cannot follow: call the op outside of compiled code. All numbers that change from step to
step are tensors on the device, so a CUDA graph of the step stays valid.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .runtime import Op, random_inputs, tl, triton, use_triton, wrap_triton

BLOCK, WARPS = 1024, 4  # 8 elements per thread, 16-byte accesses


def adamw_ema_eager(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor], copies: Sequence[Tensor] | None, step: Tensor, lr: Tensor, ema_weight: Tensor,
    skip: Tensor, grad_scale: Tensor | None = None,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
) -> None:  # fmt: skip
    """The definition, in place."""
    for param, grad, exp_avg, exp_avg_sq, ema, copy in zip(
        params, grads, exp_avgs, exp_avg_sqs, emas, copies or [None] * len(params), strict=True
    ):
        grad = grad.to(param.dtype)
        if grad_scale is not None:
            grad = grad * grad_scale
        bias_1, bias_2 = (-torch.expm1(step.to(param.dtype) * math.log(beta)) if beta else 1.0 for beta in betas)
        m = exp_avg.lerp(grad, 1 - betas[0])
        v = exp_avg_sq * betas[1] + (1 - betas[1]) * grad * grad
        p = param * (1 - lr * weight_decay) - lr * (m / bias_1) / ((v / bias_2).sqrt() + eps)
        e = ema.lerp(p, ema_weight.to(p.dtype))
        for old, new in ((param, p), (exp_avg, m), (exp_avg_sq, v), (ema, e), (copy, p)):
            if old is not None:
                old.copy_(torch.where(skip, old, new))


@triton.jit
def _one_minus_exp(z):
    """1 - exp(-z), as a series where the difference would cancel: the bias correction of the first steps."""
    z = tl.minimum(z, 100.0)
    series = z * (1 - z / 2 * (1 - z / 3 * (1 - z / 4 * (1 - z / 5 * (1 - z / 6 * (1 - z / 7 * (1 - z / 8)))))))
    return tl.where(z < 0.5, series, 1.0 - tl.exp(-z))


@triton.jit
def _pointers(cell, start, at, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """To the elements start + at of the tensor whose address is in a cell of the table."""
    pointer = tl.load(cell).to(tl.pointer_type(TYPE)) + start
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + at


@triton.jit
def _adamw_ema(
    table, blocks, step, lr, ema_weight, skip, grad_scale, N,
    BETA_1: tl.constexpr, BETA_2: tl.constexpr, LOG_1: tl.constexpr, LOG_2: tl.constexpr, EPS: tl.constexpr,
    DECAY: tl.constexpr, GRAD: tl.constexpr, COPY: tl.constexpr, SCALE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    table += tl.load(blocks + tl.program_id(0))  # the column of this program's tensor
    start = tl.load(blocks + tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * BLOCK
    length = tl.where(tl.load(skip), 0, tl.minimum(tl.load(table) - start, BLOCK)).to(tl.int32)
    if ALIGNED:
        length = tl.multiple_of(length, 8)
    at = tl.arange(0, BLOCK)
    param = _pointers(table + N, start, at, tl.float32, ALIGNED)
    grad = _pointers(table + 2 * N, start, at, GRAD, ALIGNED)
    exp_avg = _pointers(table + 3 * N, start, at, tl.float32, ALIGNED)
    exp_avg_sq = _pointers(table + 4 * N, start, at, tl.float32, ALIGNED)
    ema = _pointers(table + 5 * N, start, at, tl.float32, ALIGNED)
    mask = at < length
    g = tl.load(grad, mask=mask, other=0.0).to(tl.float32)
    p = tl.load(param, mask=mask, other=0.0)
    m = tl.load(exp_avg, mask=mask, other=0.0)
    v = tl.load(exp_avg_sq, mask=mask, other=0.0)
    e = tl.load(ema, mask=mask, other=0.0)
    t = tl.load(step).to(tl.float32)
    rate = tl.load(lr).to(tl.float32)
    weight = tl.load(ema_weight).to(tl.float32)
    if SCALE:
        g *= tl.load(grad_scale).to(tl.float32)
    m += (g - m) * (1.0 - BETA_1)
    v = v * BETA_2 + g * g * (1.0 - BETA_2)
    p *= 1.0 - rate * DECAY
    p -= rate * (m / _one_minus_exp(t * LOG_1)) / (tl.sqrt(v / _one_minus_exp(t * LOG_2)) + EPS)
    e = tl.where(weight < 0.5, e + (p - e) * weight, p - (p - e) * (1.0 - weight))  # exact at 0 and at 1
    tl.store(param, p, mask=mask)
    tl.store(exp_avg, m, mask=mask)
    tl.store(exp_avg_sq, v, mask=mask)
    tl.store(ema, e, mask=mask)
    if COPY is not None:
        tl.store(_pointers(table + 6 * N, start, at, COPY, ALIGNED), p.to(COPY), mask=mask)


@functools.cache  # never freed: a CUDA graph may hold it
def _blocks(sizes: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """(2, programs) int32: each program's tensor, and its block of that tensor."""
    counts = torch.tensor([-(-size // block) for size in sizes], dtype=torch.int64)
    tensor = torch.arange(len(sizes)).repeat_interleave(counts)
    number = torch.arange(len(tensor)) - (counts.cumsum(0) - counts)[tensor]
    return torch.stack([tensor, number]).int().to(device)


def _on_device(numbers: list[int], device: torch.device) -> Tensor:
    """(len(numbers),) int64; the host does not wait."""
    if device.type != "cuda":
        return torch.tensor(numbers, device=device)
    if not torch.cuda.is_current_stream_capturing():
        return torch.tensor(numbers).pin_memory().to(device, non_blocking=True)
    # as arguments of kernels: a captured copy would read host memory again at every replay
    table = torch.zeros(len(numbers), dtype=torch.int64, device=device)
    torch._foreach_add_(table.unbind(), numbers)
    return table


def adamw_ema_triton(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor], copies: Sequence[Tensor] | None, step: Tensor, lr: Tensor, ema_weight: Tensor,
    skip: Tensor, grad_scale: Tensor | None = None,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
) -> None:  # fmt: skip
    sizes, device = tuple(param.numel() for param in params), params[0].device
    rows = [params, grads, exp_avgs, exp_avg_sqs, emas, *([] if copies is None else [copies])]
    addresses = [tensor.data_ptr() for row in rows for tensor in row]
    aligned = not (functools.reduce(operator.or_, addresses) % 16 or functools.reduce(operator.or_, sizes) % 8)
    table = _on_device([*sizes, *addresses], device)  # (1 + rows, tensors), flat
    blocks = _blocks(sizes, BLOCK, device)
    types = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    logs = [-math.log(beta) if beta else 1e30 for beta in betas]
    wrap_triton(_adamw_ema, traced=False)[(blocks.shape[1],)](
        table, blocks, step, lr, ema_weight, skip, grad_scale, len(sizes),
        BETA_1=betas[0], BETA_2=betas[1], LOG_1=logs[0], LOG_2=logs[1], EPS=eps, DECAY=weight_decay,
        GRAD=types[grads[0].dtype], COPY=None if copies is None else types[copies[0].dtype],
        SCALE=int(grad_scale is not None), ALIGNED=int(aligned), BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def adamw_ema(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor], copies: Sequence[Tensor] | None, step: Tensor, lr: Tensor, ema_weight: Tensor,
    skip: Tensor, grad_scale: Tensor | None = None,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
) -> None:  # fmt: skip
    """One AdamW step, then ema += ema_weight (param - ema) and copy = param, in place; nothing where `skip` is true.

    The lists hold a tensor for each parameter, of any shape, on one device. All tensors of a parameter are contiguous,
    or all are channels-last. params, exp_avgs, exp_avg_sqs, emas: fp32. grads: one float dtype for all; multiplied by
    grad_scale (the clipping factor) if given. copies: the weights that the model computes with, one float dtype for
    all, or None. step (the number of this step, from 1), lr, ema_weight (1 - decay), skip (bool), grad_scale:
    one-element tensors on the device. ValueError for other shapes and dtypes. Call the op once before it is captured in
    a CUDA graph. It is fastest where all addresses are multiples of 16 bytes and all sizes multiples of 8.
    """
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "emas": emas}
    for name, tensors in (lists | ({} if copies is None else {"copies": copies})).items():
        if len(tensors) != len(params):
            raise ValueError(f"{name} has {len(tensors)} tensors; give it {len(params)}, one for each parameter")
        dtype = tensors[0].dtype if name in ("grads", "copies") else torch.float32
        for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            if tensor.shape != param.shape:
                raise ValueError(f"{name}[{i}] has shape {tuple(tensor.shape)}; give it {(*param.shape,)}")
            if not _same_order(tensor, param):
                raise ValueError(f"{name}[{i}] has strides {tensor.stride()}, params[{i}] {param.stride()}; make both "
                                 "contiguous, or channels-last")  # fmt: skip
            if tensor.dtype != dtype:
                raise ValueError(f"{name}[{i}] has dtype {tensor.dtype}; it must be {dtype}")
    fn = adamw_ema_triton if use_triton("adamw_ema", params[0].device.type, grads[0].dtype) else adamw_ema_eager
    fn(params, grads, exp_avgs, exp_avg_sqs, emas, copies, step, lr, ema_weight, skip, grad_scale, betas, eps,
       weight_decay)  # fmt: skip


def _same_order(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape hold their values in the same order, without gaps."""
    if a.is_contiguous() and b.is_contiguous():
        return True
    return all(x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) for x in (a, b))


WRITTEN = ("params", "exp_avgs", "exp_avg_sqs", "emas", "copies")


def _functional(fn: Callable[..., None]) -> Callable[..., tuple[Tensor, ...]]:
    """fn on clones, returning the values that it writes in five flat tensors, for the tests to compare."""

    @functools.wraps(fn)
    def call(**kwargs: Any) -> tuple[Tensor, ...]:
        kwargs |= {name: [tensor.clone() for tensor in kwargs[name]] for name in WRITTEN}
        fn(**kwargs)
        return tuple(torch.cat(kwargs[name]) for name in WRITTEN)

    return call


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Tensors of these sizes. States in fp32; dtype is that of gradients and copies. The learning rate is large so that
    the update is visible."""
    values = {}
    for i, name in enumerate(("params", "exp_avgs", "exp_avg_sqs", "emas", "grads", "copies")):
        kind = dtype if name in ("grads", "copies") else torch.float32
        made = random_inputs(seed + i, kind, device, **{str(j): (size,) for j, size in enumerate(shape)})
        values[name] = [tensor.detach() for tensor in made.values()]
    values["exp_avg_sqs"] = [tensor.square() for tensor in values["exp_avg_sqs"]]
    scalars = {"step": (3, torch.float32), "lr": (0.05, torch.float32), "ema_weight": (0.01, torch.float32),
               "grad_scale": (0.7, torch.float32), "skip": (False, torch.bool)}  # fmt: skip
    values |= {name: torch.full((), v, dtype=kind, device=device) for name, (v, kind) in scalars.items()}
    return values | {"weight_decay": 0.1}


def minimum_bytes(shape: tuple[int, ...], size: int) -> tuple[int, int]:
    return sum(shape) * (4 * 4 + 4 * 4 + 2 * size), 0


ADAMW_EMA = Op(
    "adamw_ema", _functional(adamw_ema_eager), _functional(adamw_ema_triton), adamw_ema, inputs,
    tiny=(7, 1), shapes=((5000,), (1, 1025, 0, 2056), (1024, 4096, 16)),
    real=((4608 * 1152, 4608, 1152 * 4608, 1152, 3456 * 1152, 3456, 1152 * 1152, 1152, 6912 * 1152, 6912),),
    minimum_bytes=minimum_bytes, writes=((),),
    variants=({"grad_scale": None, "betas": (0.0, 0.9), "eps": 1e-3, "weight_decay": 0.0},),
)  # fmt: skip
