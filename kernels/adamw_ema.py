"""adamw_ema: AdamW (Loshchilov & Hutter 2019), the EMA of the weights and their low-precision copy, in one pass.

Reads gradient, weights, Adam's two averages and the EMA once and writes the last four and the copy once: 36 bytes per
parameter with bf16 gradients. Step, learning rate and EMA decay are device tensors, so a CUDA graph of the step stays
valid.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .runtime import Op, cdiv, random_inputs, tl, triton, triton_op, use_triton, wrap_triton

BLOCK = 1024  # in 4 warps: 8 elements per thread, 16-byte accesses


def adamw_ema_eager(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, ema: Tensor, copy: Tensor | None,
    step: Tensor, lr: Tensor, ema_decay: Tensor, grad_scale: Tensor | None = None,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
) -> None:  # fmt: skip
    """The definition, in place."""
    grad = grad.to(param.dtype)
    if grad_scale is not None:
        grad = grad * grad_scale
    bias_1, bias_2 = (-torch.expm1(step.to(param.dtype) * math.log(beta)) if beta else 1.0 for beta in betas)
    param.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    param.sub_(lr * (exp_avg / bias_1) / ((exp_avg_sq / bias_2).sqrt() + eps))
    ema.lerp_(param, (1 - ema_decay).to(ema.dtype))
    if copy is not None:
        copy.copy_(param)


@triton.jit
def _one_minus_exp(z):
    """1 - exp(-z), as a series where the difference would cancel: the bias correction of the first steps."""
    z = tl.minimum(z, 100.0)
    series = z * (1 - z / 2 * (1 - z / 3 * (1 - z / 4 * (1 - z / 5 * (1 - z / 6 * (1 - z / 7 * (1 - z / 8)))))))
    return tl.where(z < 0.5, series, 1.0 - tl.exp(-z))


@triton.jit
def _adamw_ema(
    param, grad, exp_avg, exp_avg_sq, ema, copy, step, lr, ema_decay, grad_scale, M,
    BETA_1: tl.constexpr, BETA_2: tl.constexpr, LOG_1: tl.constexpr, LOG_2: tl.constexpr, EPS: tl.constexpr,
    DECAY: tl.constexpr, COPY: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < M
    t = tl.load(step).to(tl.float32)
    rate = tl.load(lr).to(tl.float32)
    take = (1.0 - tl.load(ema_decay)).to(tl.float32)  # in the decay's own precision
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    p = tl.load(param + at, mask=mask, other=0.0)
    m = tl.load(exp_avg + at, mask=mask, other=0.0)
    v = tl.load(exp_avg_sq + at, mask=mask, other=0.0)
    e = tl.load(ema + at, mask=mask, other=0.0)
    if SCALE:
        g *= tl.load(grad_scale).to(tl.float32)
    m += (g - m) * (1.0 - BETA_1)
    v = v * BETA_2 + g * g * (1.0 - BETA_2)
    p *= 1.0 - rate * DECAY
    p -= rate * (m / _one_minus_exp(t * LOG_1)) / (tl.sqrt(v / _one_minus_exp(t * LOG_2)) + EPS)
    tl.store(param + at, p, mask=mask)
    tl.store(exp_avg + at, m, mask=mask)
    tl.store(exp_avg_sq + at, v, mask=mask)
    tl.store(ema + at, e + (p - e) * take, mask=mask)
    if COPY:
        tl.store(copy + at, p.to(copy.dtype.element_ty), mask=mask)


@triton_op("fastdit::adamw_ema", mutates_args=("param", "exp_avg", "exp_avg_sq", "ema", "copy"))
def _op(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, ema: Tensor, copy: Tensor | None,
    step: Tensor, lr: Tensor, ema_decay: Tensor, grad_scale: Tensor | None,
    beta_1: float, beta_2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    m = param.numel()
    logs = [-math.log(beta) if beta else 1e30 for beta in (beta_1, beta_2)]
    wrap_triton(_adamw_ema)[(cdiv(m, BLOCK),)](
        param, grad, exp_avg, exp_avg_sq, ema, copy, step, lr, ema_decay, grad_scale, m,
        BETA_1=beta_1, BETA_2=beta_2, LOG_1=logs[0], LOG_2=logs[1], EPS=eps, DECAY=weight_decay,
        COPY=int(copy is not None), SCALE=int(grad_scale is not None), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


def adamw_ema_triton(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, ema: Tensor, copy: Tensor | None,
    step: Tensor, lr: Tensor, ema_decay: Tensor, grad_scale: Tensor | None = None,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
) -> None:  # fmt: skip
    _op(param, grad, exp_avg, exp_avg_sq, ema, copy, step, lr, ema_decay, grad_scale, *betas, eps, weight_decay)


def adamw_ema(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, ema: Tensor, copy: Tensor | None,
    step: Tensor, lr: Tensor, ema_decay: Tensor, grad_scale: Tensor | None = None,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
) -> None:  # fmt: skip
    """One AdamW step, then ema += (1 - ema_decay)(param - ema) and copy = param, in place.

    param, exp_avg, exp_avg_sq, ema: flat (M,) fp32 buffers; grad (M,) of any float dtype, multiplied by grad_scale (the
    clipping factor) if given; copy (M,), the weights that the model computes with, or None. step (the number of this
    step, from 1), lr, ema_decay, grad_scale: one-element tensors on the same device. Use fp64 for ema_decay: in fp32,
    1 - 0.9999 has a relative error of 2e-4. ValueError unless the buffers are flat, contiguous, equally long and fp32
    (grad and copy: any float dtype).
    """
    buffers = {"param": param, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "ema": ema, "copy": copy}
    for name, buffer in buffers.items():
        if buffer is None:
            continue
        if not (buffer.dim() == 1 and buffer.is_contiguous() and len(buffer) == len(param)):
            raise ValueError(f"{name} has shape {tuple(buffer.shape)}; give it a contiguous ({param.numel()},)")
        if name not in ("grad", "copy") and buffer.dtype != torch.float32:
            raise ValueError(f"{name} has dtype {buffer.dtype}; it must be torch.float32, or small updates round away")
    fn = adamw_ema_triton if use_triton("adamw_ema", param.device.type, grad.dtype) else adamw_ema_eager
    fn(param, grad, exp_avg, exp_avg_sq, ema, copy, step, lr, ema_decay, grad_scale, betas, eps, weight_decay)


def _functional(fn: Any) -> Any:
    """fn on clones, returning the five buffers that it writes, for the tests to compare."""

    def call(**kwargs: Any) -> tuple[Tensor, ...]:
        written = ("param", "exp_avg", "exp_avg_sq", "ema", "copy")
        kwargs |= {name: kwargs[name].clone() for name in written}
        fn(**kwargs)
        return tuple(kwargs[name] for name in written)

    return call


def inputs(shape: tuple[int], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """States in fp32; dtype is that of gradient and copy. The learning rate is large so that the update is visible."""
    names = ("param", "exp_avg", "exp_avg_sq", "ema")
    states = random_inputs(seed, torch.float32, device, **dict.fromkeys(names, shape))
    values = {name: value.detach() for name, value in states.items()}
    values["exp_avg_sq"] = values["exp_avg_sq"].square()
    values["grad"] = random_inputs(seed + 1, dtype, device, grad=shape)["grad"].detach()
    scalars = {"step": (3, torch.int64), "lr": (0.05, torch.float32), "ema_decay": (0.99, torch.float64),
               "grad_scale": (0.7, torch.float32)}  # fmt: skip
    values |= {name: torch.full((), v, dtype=kind, device=device) for name, (v, kind) in scalars.items()}
    return values | {"copy": torch.zeros_like(values["grad"]), "weight_decay": 0.1}


def minimum_bytes(shape: tuple[int], size: int) -> tuple[int, int]:
    return shape[0] * (4 * 4 + 4 * 4 + 2 * size), 0


ADAMW_EMA = Op(
    "adamw_ema", _functional(adamw_ema_eager), _functional(adamw_ema_triton), adamw_ema, inputs,
    tiny=(7,), shapes=((5000,), (1024,)), real=((675_129_600,),), minimum_bytes=minimum_bytes,
    writes=(("param", "exp_avg", "exp_avg_sq", "ema", "copy"),),
    variants=({"grad_scale": None, "betas": (0.0, 0.9), "eps": 1e-3, "weight_decay": 0.0},),
)  # fmt: skip
