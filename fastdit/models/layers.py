"""Layers of DiT (Peebles & Xie 2023, arXiv 2212.09748, section 3), under the official parameter names."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fastdit.kernels import adaln, gate_residual_adaln
from fastdit.models.attention import attention


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
    """Timestep (N,) on the model's clock -> (N, D)."""

    def __init__(self, hidden_size: int, frequency_dim: int = 256):
        super().__init__()
        self.frequency_dim = frequency_dim
        self.mlp = nn.Sequential(nn.Linear(frequency_dim, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(t, self.frequency_dim))


class LabelEmbedder(nn.Module):
    """Class labels (N,) int64 -> (N, D); one more row for the null label when it is ever dropped."""

    def __init__(self, num_classes: int, hidden_size: int, null_row: bool):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + null_row, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


Pending = tuple[Tensor, Tensor, Tensor]  # a branch (N, T, D) not yet in the residual, its gate (N, D), its bias (D,)


class Attention(nn.Module):
    """Multi-head self-attention over (N, T, D); qkv laid out as (3, heads, head_dim).

    The projection's bias is left out: it joins where the gate meets the residual, in one fused op.
    """

    def __init__(self, hidden_size: int, num_heads: int, backend: str = "sdpa"):
        super().__init__()
        self.num_heads = num_heads
        self.backend = backend
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, dim = x.shape
        qkv = self.qkv(x).view(n, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, T, head_dim), views of the packed projection
        x = attention(q, k, v, self.backend)
        return F.linear(x.transpose(1, 2).reshape(n, tokens, dim), self.proj.weight)


class Mlp(nn.Module):
    """Two linears with a tanh-GELU between, over (N, T, D); the second one's bias is left out, as in Attention."""

    def __init__(self, hidden_size: int, ratio: float = 4.0):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * ratio))
        self.fc2 = nn.Linear(int(hidden_size * ratio), hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.gelu(self.fc1(x), approximate="tanh"), self.fc2.weight)


class DiTBlock(nn.Module):
    """adaLN-Zero block: x + gate * attention(modulated LN(x)), then the same with the MLP; c (N, D) conditions.

    A gated branch enters the residual in the op that also normalises and modulates for the next branch, so a block
    hands its MLP branch on as `pending`: the next block, or the final layer, adds it.
    """

    def __init__(self, hidden_size: int, num_heads: int, attention_backend: str = "sdpa"):
        super().__init__()
        self.attn = Attention(hidden_size, num_heads, attention_backend)
        self.mlp = Mlp(hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.recompute = "none"  # activation checkpointing, a key of RECOMPUTE

    def forward(self, x: Tensor, pending: Pending | None, c: Tensor) -> tuple[Tensor, Pending]:
        options = RECOMPUTE[self.recompute]
        if options is None or not torch.is_grad_enabled():
            return self._forward(x, pending, c)
        # inside the compiled region, so that the compiler sees it
        return checkpoint(self._forward, x, pending, c, use_reentrant=False, preserve_rng_state=False, **options)

    def _forward(self, x: Tensor, pending: Pending | None, c: Tensor) -> tuple[Tensor, Pending]:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=-1)  # (N, D) each
        x, h = add_and_modulate(x, pending, shift_a, scale_a)
        x, h = add_and_modulate(x, (self.attn(h), gate_a, self.attn.proj.bias), shift_m, scale_m)
        # a copy of the bias: ZeRO-3 takes a block's parameters back when the block returns
        return x, (self.mlp(h), gate_m, self.mlp.fc2.bias.clone())


def _keep_products(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    kept = op.name().split("::")[1].split(".")[0]
    expensive = kept in ("mm", "addmm", "bmm") or "scaled_dot_product" in kept
    return CheckpointPolicy.MUST_SAVE if expensive else CheckpointPolicy.PREFER_RECOMPUTE


# What backward runs again instead of keeping: nothing; the cheap ops (norms, gates, GELU); the whole block.
RECOMPUTE: dict[str, dict | None] = {
    "none": None,
    "selective": {"context_fn": functools.partial(create_selective_checkpoint_contexts, _keep_products)},
    "full": {},
}


def add_and_modulate(x: Tensor, pending: Pending | None, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x + gate (branch + bias), and LayerNorm(that) (1 + scale) + shift: both (N, T, D)."""
    if pending is None:
        return x, adaln(x, shift, scale)
    branch, gate, bias = pending
    return gate_residual_adaln(x, branch, gate, shift, scale, bias)


class FinalLayer(nn.Module):
    """Modulated LayerNorm and the linear to p p C_out values a token: (N, T, D) -> (N, T, p p C_out)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, pending: Pending, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(add_and_modulate(x, pending, shift, scale)[1])
