"""FP8 products in the linears of the blocks (Micikevicius et al. 2022, arXiv 2209.05433), with delayed scaling.

Inputs and weights are rounded to e4m3, gradients to e5m2. Each of these tensors has one factor, a power of two, that
brings its largest magnitude into the range of FP8. Measuring it first would cost a pass over the tensor. Instead the
factor comes from the largest magnitudes of the last steps (the history), and the kernel that rounds a tensor measures
it for later steps. A value that outgrows the range saturates. Weights, their gradients and the optimizer's state stay
fp32. On a CPU the products are emulated: the rounding is the same, the speed is not.

A magnitude leaves the network as the gradient of a dummy leaf, `Linear.magnitudes`. This way, compiled code, activation
checkpointing and CUDA graphs need no side effects.
"""

import torch
from torch import Tensor

from fastdit.distributed import Ranks
from fastdit.kernels.fp8 import FORWARD, GRADIENT
from fastdit.kernels.runtime import use_triton
from fastdit.models.dit import DiT
from fastdit.models.fp8_linears import ACTIVATIONS, WEIGHT, attend, fuses, mlp, multiply, norm_and_round
from fastdit.models.layers import Linear

FORMATS = (FORWARD, FORWARD, GRADIENT)  # of INPUT, WEIGHT and OUTPUT
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


def use_fp8(model: DiT, history: int, margin: float, batch_values: int, attention: bool = False) -> Fp8:
    """Use FP8 products in the linears of attention and MLP, in place; ValueError if that is not possible.

    With `attention`, its kernels round their output and their gradient, as the kernels of the norms and the MLP do.

    Modulations, embedders and the final layer do not change: they are small and need the precision.
    """
    device = next(model.parameters()).device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError("training.fp8=true needs compute capability 8.9 (Ada, Hopper or newer); use false")
    state = Fp8(model, history, margin, batch_values)
    for linear in state.linears.values():
        linear.multiply = multiply
    for block in model.blocks:
        if attention:
            if model.tokens % 16 or model.rope is not None or not fuses(block.attn):
                raise ValueError("training.fp8_attention=true needs attention=triton on a GPU, a multiple of 16 tokens"
                                 ", an even head_dim, no rotary positions and qk_norm=none; use false")  # fmt: skip
            block.attn.fused = attend
        if block.mlp.kind in ACTIVATIONS:
            block.mlp.fused = mlp
        if use_triton("gate_residual_adaln", device.type, torch.float32):
            for linear in (block.attn.qkv, block.mlp.fc1, *([block.cross.q] if block.cross else [])):
                linear.after_norm = norm_and_round
    return state
