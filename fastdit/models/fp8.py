"""FP8 products in the linears of the blocks (Micikevicius et al. 2022, arXiv 2209.05433), with delayed scaling.

Inputs and weights are rounded to e4m3, gradients to e5m2. Each of these tensors has one factor, a power of two, that
brings its largest magnitude into the range of FP8. Measuring it first would cost a pass over the tensor. Instead the
factor comes from the largest magnitudes of the last steps (the history), and the kernel that rounds a tensor measures
it for later steps. A value that outgrows the range saturates. Weights, their gradients and the optimizer's state stay
fp32. On a CPU the products are emulated: the rounding is the same, the speed is not.

A magnitude leaves the network as the gradient of a dummy leaf, `Linear.magnitudes`. This way, compiled code, activation
checkpointing and CUDA graphs need no side effects.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdit.distributed import Ranks
from fastdit.kernels import (
    fp8_cast,
    fp8_cast_and_sum,
    fp8_transpose,
    gate_residual_adaln_backward,
    gate_residual_adaln_fp8,
    gelu_fp8,
    largest,
    swiglu_fp8,
)
from fastdit.kernels.runtime import use_triton
from fastdit.models.dit import DiT
from fastdit.models.layers import Linear, Mlp

FORWARD, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
INPUT, WEIGHT, OUTPUT = range(3)  # what is rounded for a linear: input, weight, and the gradient of the output
FORMATS = (FORWARD, FORWARD, GRADIENT)
ACTIVATIONS = {"gelu_tanh": gelu_fp8, "swiglu": swiglu_fp8}
LINE = 4  # a factor stands at a multiple of 16 bytes, as the products want it


def linears_of(model: DiT) -> dict[str, Linear]:
    """The linears of the blocks, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


class Fp8:
    """Scaling factors of the linears in the blocks, for all linears in one tensor.

    `history` (length, linears, 3): the largest magnitudes of the last steps, newest first; 0 where unknown. `margin`:
    how many times larger than in the history a value may become before it saturates. `batch_values`: values over which
    the loss is a mean. Until a gradient has a history, it is scaled by as much, as if the loss were a sum.
    """

    def __init__(self, model: DiT, history: int, margin: float, batch_values: int):
        self.linears = linears_of(model)
        for name, linear in self.linears.items():
            d_out, d_in = linear.weight.shape
            if d_out % 16 or d_in % 16:
                raise ValueError(f"training.fp8=true needs multiples of 16, but {name} is {d_in} x {d_out}; use false")
        device = next(model.parameters()).device
        size = (len(self.linears), 3)
        first = torch.tensor([1.0, 1.0, batch_values], device=device)
        self.first, self.margin = torch.exp2(first.log2().floor()), margin
        self.most = torch.tensor([torch.finfo(dtype).max for dtype in FORMATS], device=device)
        self.history = torch.zeros(history, *size, device=device)
        self.seen = torch.zeros(size, device=device)  # in the current step
        self.scale, self.inverse = (torch.ones(*size, LINE, device=device) for _ in range(2))
        for i, linear in enumerate(self.linears.values()):
            linear.magnitudes = torch.zeros(3, device=device, requires_grad=True)
            linear.scale, linear.inverse = self.scale[i], self.inverse[i]
            self.history[0, i, WEIGHT] = linear.weight.detach().abs().amax()
        self.rescale()

    @torch.no_grad()
    def rescale(self) -> None:
        """Set the factors from the history."""
        largest = self.history.amax(0)
        fitting = torch.exp2((self.most / (self.margin * largest)).log2().floor().clamp(-100, 100))
        scale = torch.where(largest > 0, fitting, self.first)
        self.scale.copy_(scale[..., None])
        self.inverse.copy_(1 / scale[..., None])

    @torch.no_grad()
    def collect(self) -> None:
        """After the backward pass of each micro-batch: note what its tensors measured."""
        measured = torch.stack([linear.magnitudes.grad for linear in self.linears.values()])
        self.seen.copy_(torch.maximum(self.seen, measured))
        for linear in self.linears.values():
            linear.magnitudes.grad = None

    def not_finite(self, ranks: Ranks) -> Tensor:
        """Whether any process saw an infinity in this step (0-dim bool): FP8 saturates it, and the loss may hide it."""
        return ~ranks.max(self.seen).isfinite().all()

    @torch.no_grad()
    def update(self, ranks: Ranks, skipped: Tensor) -> None:
        """After each step: move what was seen on any process into the history, unless the step was skipped."""
        seen = ranks.max(self.seen)
        newest = torch.cat([torch.where(seen.isfinite(), seen, 0)[None], self.history[:-1]])
        self.history.copy_(torch.where(skipped, self.history, newest))
        self.seen.zero_()
        self.rescale()

    def state_dict(self) -> dict[str, Tensor]:
        return {"history": self.history}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The newest steps of another history; a longer one is filled up with "unknown"."""
        count = min(len(self.history), len(state["history"]))
        self.history[:count].copy_(state["history"][:count])
        self.history[count:] = 0
        self.rescale()


def use_fp8(model: DiT, history: int, margin: float, batch_values: int) -> Fp8:
    """Use FP8 products in the linears of attention and MLP, in place; ValueError if that is not possible.

    Modulations, embedders and the final layer do not change: they are small and need the precision.
    """
    device = next(model.parameters()).device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError("training.fp8=true needs compute capability 8.9 (Ada, Hopper or newer); use false")
    state = Fp8(model, history, margin, batch_values)
    for linear in state.linears.values():
        linear.multiply = multiply
    for block in model.blocks:
        if block.mlp.kind in ACTIVATIONS:
            block.mlp.fused = mlp
        if use_triton("gate_residual_adaln", device.type, torch.float32):
            for linear in (block.attn.qkv, block.mlp.fc1, *([block.cross.q] if block.cross else [])):
                linear.after_norm = norm_and_round
    return state


class Rounded(NamedTuple):
    """The input of a linear in FP8, as `fp8_cast` returns it. `whole` (..., D) stands for the unrounded input.

    The gradient belongs to `whole`; its values are not read, so its memory may be one element.
    """

    whole: Tensor
    rows: Tensor
    columns: Tensor
    magnitudes: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.whole.shape


def rounded(x: Tensor | Rounded, linear: Linear) -> Rounded:
    """The input of `linear`, if a kernel has not rounded it before."""
    if isinstance(x, Rounded):
        return x
    rows = x.detach().reshape(-1, x.shape[-1])
    return Rounded(x, *fp8_cast(rows, linear.scale[INPUT, :1], FORWARD))


class _NormAndRound(torch.autograd.Function):
    """`gate_residual_adaln` that writes h in FP8 only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None,
        factor: Tensor, rms: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        x, stats, rows, magnitudes = gate_residual_adaln_fp8(x, branch, gate, shift, scale, bias, factor, 1e-6, rms)
        columns = fp8_transpose(rows)
        ctx.shift_dtype, ctx.rms = shift.dtype, rms
        ctx.save_for_backward(x, branch, gate, scale, bias, stats)
        ctx.mark_non_differentiable(rows, columns, magnitudes)
        return x, branch.new_empty(1).expand(branch.shape), rows, columns, magnitudes

    @staticmethod
    def backward(ctx: Any, d_x: Tensor, d_h: Tensor, *_: None) -> tuple:
        return *gate_residual_adaln_backward(d_x, d_h, *ctx.saved_tensors, ctx.shift_dtype, ctx.rms), None, None


def norm_and_round(
    linear: Linear, x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None,
    norm: str,
) -> tuple[Tensor, Rounded]:  # fmt: skip
    """`kernels.gate_residual_adaln`, with h as the input of `linear`."""
    factor = linear.scale[INPUT, :1]
    x, *parts = _NormAndRound.apply(x, branch, gate, shift, scale, bias, factor, norm == "rms")
    return x, Rounded(*parts)


def product(
    a: Tensor, b: Tensor, a_inverse: Tensor, b_inverse: Tensor, dtype: torch.dtype, fast: bool = False,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """a (M, K) b (N, K)^T in FP8, times both inverse factors (1,), plus bias (N,) -> (M, N).

    `fast` sums in lower precision.
    """
    if bias is not None and dtype == torch.float32:  # no such product
        return product(a, b, a_inverse, b_inverse, dtype, fast) + bias
    bias = None if bias is None else bias.to(dtype)
    return torch._scaled_mm(a, b.T, a_inverse, b_inverse, bias=bias, out_dtype=dtype, use_fast_accum=fast)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Tensor, columns: Tensor, x_most: Tensor, weight: Tensor, bias: Tensor | None,
        magnitudes: Tensor, scale: Tensor, inverse: Tensor, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        w_rows, w_columns, w_most = fp8_cast(weight, scale[WEIGHT, :1], FORWARD)
        ctx.shape, ctx.dtype, ctx.biased = x.shape, x.dtype, bias is not None
        ctx.save_for_backward(columns, w_columns, x_most, w_most, scale, inverse)
        y = product(rows, w_rows, inverse[INPUT, :1], inverse[WEIGHT, :1], dtype, True, bias)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple:
        x_columns, w_columns, x_most, w_most, scale, inverse = ctx.saved_tensors
        of_x, of_w, of_y = (inverse[i, :1] for i in range(3))
        d_y, d_bias = d_y.reshape(-1, d_y.shape[-1]), None
        if ctx.biased:
            rows, columns, y_most, d_bias = fp8_cast_and_sum(d_y, scale[OUTPUT, :1], GRADIENT)
        else:
            rows, columns, y_most = fp8_cast(d_y, scale[OUTPUT, :1], GRADIENT)
        d_x = product(rows, w_columns, of_y, of_w, d_y.dtype).view(ctx.shape).to(ctx.dtype)
        d_w = product(columns, x_columns, of_y, of_x, torch.float32)
        return d_x, None, None, None, d_w, d_bias, largest(x_most, w_most, y_most), None, None, None


def multiply(linear: Linear, x: Tensor | Rounded, bias: Tensor | None) -> Tensor:
    """x W^T + bias."""
    x = rounded(x, linear)
    return _Linear.apply(
        *x, linear.weight, bias, linear.magnitudes, linear.scale, linear.inverse, output_dtype(x.whole)
    )  # fmt: skip


def output_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


class _Mlp(torch.autograd.Function):
    """fc2(activation(fc1(x) + bias)), in which the activation itself rounds its output and its gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Tensor, x_columns: Tensor, x_most: Tensor, w1: Tensor, bias: Tensor | None,
        w2: Tensor, magnitudes1: Tensor, magnitudes2: Tensor, scale1: Tensor, inverse1: Tensor, scale2: Tensor,
        inverse2: Tensor, dtype: torch.dtype, kind: str,
    ) -> Tensor:  # fmt: skip
        w_rows, w1_columns, w1_most = fp8_cast(w1, scale1[WEIGHT, :1], FORWARD)
        hidden = product(rows, w_rows, inverse1[INPUT, :1], inverse1[WEIGHT, :1], dtype, True)
        rows, a_columns, a_most = ACTIVATIONS[kind].forward(hidden, bias, scale2[INPUT, :1])
        w_rows, w2_columns, w2_most = fp8_cast(w2, scale2[WEIGHT, :1], FORWARD)
        y = product(rows, w_rows, inverse2[INPUT, :1], inverse2[WEIGHT, :1], dtype, True)
        ctx.shape, ctx.dtype, ctx.kind = x.shape, x.dtype, kind
        ctx.save_for_backward(hidden, bias, x_columns, a_columns, w1_columns, w2_columns, x_most, w1_most, a_most,
                              w2_most, scale1, inverse1, scale2, inverse2)  # fmt: skip
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple:
        (hidden, bias, x_columns, a_columns, w1_columns, w2_columns, x_most, w1_most, a_most, w2_most,
         scale1, inverse1, scale2, inverse2) = ctx.saved_tensors  # fmt: skip
        of_x, of_w1, of_hidden = (inverse1[i, :1] for i in range(3))
        of_a, of_w2, of_y = (inverse2[i, :1] for i in range(3))
        rows, columns, y_most = fp8_cast(d_y.reshape(-1, d_y.shape[-1]), scale2[OUTPUT, :1], GRADIENT)
        d_a = product(rows, w2_columns, of_y, of_w2, d_y.dtype)
        d_w2 = product(columns, a_columns, of_y, of_a, torch.float32)
        rows, columns, d_bias, hidden_most = ACTIVATIONS[ctx.kind].backward(d_a, hidden, bias, scale1[OUTPUT, :1])
        d_x = product(rows, w1_columns, of_hidden, of_w1, d_y.dtype).view(ctx.shape).to(ctx.dtype)
        d_w1 = product(columns, x_columns, of_hidden, of_x, torch.float32)
        of_fc1, of_fc2 = largest(x_most, w1_most, hidden_most), largest(a_most, w2_most, y_most)
        return d_x, None, None, None, d_w1, d_bias, d_w2, of_fc1, of_fc2, *[None] * 6


def mlp(module: Mlp, x: Tensor | Rounded) -> Tensor:
    """The MLP without the last bias."""
    fc1, fc2, x = module.fc1, module.fc2, rounded(x, module.fc1)
    return _Mlp.apply(
        *x, fc1.weight, fc1.bias, fc2.weight, fc1.magnitudes, fc2.magnitudes, fc1.scale, fc1.inverse, fc2.scale,
        fc2.inverse, output_dtype(x.whole), module.kind,
    )  # fmt: skip
