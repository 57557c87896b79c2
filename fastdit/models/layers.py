"""Layers of DiT (Peebles & Xie 2023, arXiv 2212.09748, section 3), with the official parameter names.

All defaults are the official design. A branch returns its last bias instead of adding it: one fused op adds the bias,
applies the gate, and adds the branch to the residual.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.kernels import gelu, gelu_linear, qk_norm_rope, swiglu, swiglu_linear
from fastdit.models.attention import attention, packed_attention
from fastdit.schema import NetworkOptions

Rope = tuple[Tensor, Tensor]  # cosines and sines (T, head_dim / 2) from kernels.rope_2d, or (N, T, head_dim / 2)
Branch = tuple[Tensor, Tensor | None]  # (N, T, D), and the bias (D,), not yet added


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """[cos(t w), sin(t w)] in fp32, w_i = max_period^(-i / (dim / 2)): t (N,), any real -> (N, dim)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_embedding(dim: int, height: int, width: int) -> Tensor:
    """Fixed 2-D sin-cos table -> (height * width, dim): the first half encodes the column, the second the row."""
    omega = 10_000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    halves = [position.flatten()[:, None] * omega for position in (column, row)]  # 2 x (T, dim / 4)
    return torch.cat([part for angles in halves for part in (angles.sin(), angles.cos())], dim=-1).float()


class Linear(nn.Linear):
    """A linear whose matmul is also available without the bias (`product`), for a fused op to add it.

    `models/fp8.py` sets `multiply`, (linear, x, bias) -> x W^T + bias, and `after_norm`, the op that adds the previous
    branch, normalizes and returns the input of this linear (see `blocks.add_and_modulate`).
    """

    multiply: Callable[["Linear", Tensor, Tensor | None], Tensor] | None = None
    after_norm: Callable[..., tuple[Tensor, Tensor]] | None = None

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) if self.multiply is None else self.multiply(self, x, None)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.multiply is None else self.multiply(self, x, self.bias)


class PatchEmbed(nn.Module):
    """(N, C, H, W) -> (N, T, D), T = (H / p)(W / p); the weight keeps the official convolution's shape (D, C, p, p)."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        p = self.patch_size
        x = F.pixel_unshuffle(x, p).flatten(2).transpose(1, 2)  # (N, T, C p p): a stride-p convolution as one GEMM
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


class TimestepEmbedder(nn.Module):
    """The objective's model time (N,) -> (N, D)."""

    def __init__(self, hidden_size: int, frequency_dim: int = 256):
        super().__init__()
        self.frequency_dim = frequency_dim
        self.mlp = nn.Sequential(nn.Linear(frequency_dim, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(t, self.frequency_dim))


class LabelEmbedder(nn.Module):
    """Class labels (N,) int64 -> (N, D); `null_row` adds a row for the null label to the table."""

    def __init__(self, num_classes: int, hidden_size: int, null_row: bool):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + null_row, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


NORMS: dict[str, type[nn.Module]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}  # hold the weights; fused ops normalize


def learned_shift_and_scale(norm: nn.Module, n: int) -> tuple[Tensor, Tensor]:
    """The affine weights of a norm as a modulation norm(x) (1 + scale) + shift: (D,), expanded to n samples."""
    bias = getattr(norm, "bias", None)  # RMSNorm has none
    # copies: ZeRO-3 releases the parameters of a module when the module returns
    shift = torch.zeros_like(norm.weight) if bias is None else bias.clone()
    return shift.expand(n, -1), (norm.weight - 1).expand(n, -1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i + 1) of x (N, heads, T, head_dim) by angles given as cos, sin of `Rope`."""
    cos, sin = (table.unsqueeze(1) if table.dim() == 3 else table for table in (cos, sin))  # over the heads
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention over (N, T, D); qkv laid out as (3, heads, head_dim).

    Options: `qk_norm` normalizes each head's queries and keys, with learned weights (Dehghani et al. 2023); `qkv_bias`
    and `proj_bias`. `backend` is a key of `models.attention.ATTENTION`. `models/fp8.py` sets `fused`,
    (attention, x) -> the input of `proj`, where training.fp8_attention asks for it.
    """

    fused: Callable[["Attention", Tensor], Tensor] | None = None

    def __init__(self, hidden_size: int, num_heads: int, options: NetworkOptions, backend: str = "sdpa"):
        super().__init__()
        self.num_heads, self.backend, self.qk_norm = num_heads, backend, options.qk_norm
        self.qkv = Linear(hidden_size, 3 * hidden_size, bias=options.qkv_bias)
        self.proj = Linear(hidden_size, hidden_size, bias=options.proj_bias)
        if self.qk_norm != "none":
            self.q_norm, self.k_norm = (nn.RMSNorm(hidden_size // num_heads) for _ in range(2))  # hold the weights

    @property
    def first(self) -> Linear:
        return self.qkv

    def forward(self, x: Tensor, rope: Rope | None = None) -> Branch:
        n, tokens, dim = x.shape
        if self.fused is not None and tokens % 16 == 0:  # routes have any number
            return self.proj.product(self.fused(self, x)), self.proj.bias
        qkv = self.qkv(x).view(n, tokens, 3, self.num_heads, dim // self.num_heads)
        if self.qk_norm != "none":
            cos, sin = (None, None) if rope is None else rope
            q, k, v = qk_norm_rope(qkv, self.q_norm.weight, self.k_norm.weight, cos, sin, norm=self.qk_norm)
            x = attention(q, k, v, self.backend).transpose(1, 2)  # (N, T, heads, head_dim)
        elif rope is not None:
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, T, head_dim), views of the packed projection
            x = attention(rotated(q, *rope), rotated(k, *rope), v, self.backend).transpose(1, 2)
        else:
            x = packed_attention(qkv, self.backend)
        return self.proj.product(x.reshape(n, tokens, dim)), self.proj.bias


class CrossAttention(nn.Module):
    """Image tokens (N, T, D) attend to the condition tokens (N, K, D); kv laid out as (2, heads, head_dim).

    `backend="eager"` is honored. All other backends use `sdpa`: the kernels are chosen for the self-attention shape.
    """

    def __init__(self, hidden_size: int, num_heads: int, options: NetworkOptions, backend: str = "sdpa"):
        super().__init__()
        self.num_heads, self.backend = num_heads, backend
        self.q = Linear(hidden_size, hidden_size, bias=options.qkv_bias)
        self.kv = Linear(hidden_size, 2 * hidden_size, bias=options.qkv_bias)
        self.proj = Linear(hidden_size, hidden_size, bias=options.proj_bias)

    @property
    def first(self) -> Linear:
        return self.q

    def forward(self, x: Tensor, context: Tensor) -> Branch:
        n, tokens, dim = x.shape
        head_dim = dim // self.num_heads
        q = self.q(x).view(n, tokens, self.num_heads, head_dim).transpose(1, 2)  # (N, heads, T, head_dim)
        kv = self.kv(context).view(n, context.shape[1], 2, self.num_heads, head_dim)
        k, v = kv.permute(2, 0, 3, 1, 4)  # (N, heads, K, head_dim) each
        x = attention(q, k, v, "eager" if self.backend == "eager" else "sdpa")
        return self.proj.product(x.transpose(1, 2).reshape(n, tokens, dim)), self.proj.bias


def exact_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """x Phi(x), with Phi computed from the error function."""
    return F.gelu(x if bias is None else x + bias)


def exact_gelu_linear(x: Tensor, bias: Tensor | None, weight: Tensor) -> Tensor:
    return F.linear(exact_gelu(x, bias), weight)


# activation(x, bias of the preceding linear), and the same fused with the next linear, which saves only x for backward
ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "gelu_tanh": (gelu, gelu_linear),
    "gelu": (exact_gelu, exact_gelu_linear),
    "swiglu": (swiglu, swiglu_linear),
}


class Mlp(nn.Module):
    """Two linears with the activation `options.mlp` between, over (N, T, D). SwiGLU's fc1 holds gates, then values.

    The hidden width is `mlp_ratio` D. SwiGLU has three matmuls, so its width is two thirds of that, rounded up to a
    multiple of 8 (Shazeer 2020). `models/fp8.py` sets `fused`, (mlp, x) -> the output without the last bias.
    """

    fused: Callable[["Mlp", Tensor], Tensor] | None = None

    def __init__(self, hidden_size: int, options: NetworkOptions):
        super().__init__()
        self.kind, self.recompute = options.mlp, False  # recompute: the backward pass recomputes the activation
        gated, width = self.kind == "swiglu", int(hidden_size * options.mlp_ratio)
        if gated:
            width = -(-(2 * width // 3) // 8) * 8
        self.fc1 = Linear(hidden_size, 2 * width if gated else width, bias=options.mlp_bias)
        self.fc2 = Linear(width, hidden_size, bias=options.mlp_bias)

    @property
    def first(self) -> Linear:
        return self.fc1

    def forward(self, x: Tensor, _: None = None) -> Branch:
        if self.fused is not None:
            return self.fused(self, x), self.fc2.bias
        x = self.fc1.product(x)
        activation, activation_linear = ACTIVATIONS[self.kind]
        if self.recompute:
            return activation_linear(x, self.fc1.bias, self.fc2.weight), self.fc2.bias
        return self.fc2.product(activation(x, self.fc1.bias)), self.fc2.bias
