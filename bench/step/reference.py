"""The reference: DiT in plain modules and DDPM's loss in plain PyTorch.

Written from the papers (Peebles & Xie 2023, Ho et al. 2020, Nichol & Dhariwal 2021) in the style of the public stacks
and independently of fastdit's own modules, so that correctness is checked against it too. Parameters carry the official
names. Attention is PyTorch's SDPA, as in timm's blocks today: faster than what was published.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass
class Inputs:
    """Inputs of a loss: x_0 and noise (N, C, h, w), labels y (N,), timestep index (N,) in 0..999."""

    x_0: Tensor
    y: Tensor
    index: Tensor
    noise: Tensor


# ---- network

def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimeEmbedding(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10_000) * torch.arange(128, device=t.device) / 128)
        angles = t[:, None].float() * frequencies[None]
        return self.mlp(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1))


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(x.transpose(1, 2).reshape(n, t, d))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        mlp = {"fc1": nn.Linear(dim, 4 * dim), "act": nn.GELU(approximate="tanh"), "fc2": nn.Linear(4 * dim, dim)}
        self.mlp = nn.Sequential(OrderedDict(mlp))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_1, scale_1))
        return x + gate_2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_2, scale_2))


class Head(nn.Module):
    def __init__(self, dim: int, values: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class PlainDiT(nn.Module):
    """(N, C, H, W), index (N,), labels (N,) -> (N, 2C, H, W); labels are dropped by the caller."""

    def __init__(self, input_size, patch_size, in_channels, hidden_size, depth, num_heads, num_classes):
        super().__init__()
        self.patch_size, self.out_channels, self.checkpointing = patch_size, 2 * in_channels, False
        patches = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        self.x_embedder = nn.ModuleDict({"proj": patches})
        self.t_embedder = TimeEmbedding(hidden_size)
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, hidden_size)})
        self.pos_embed = nn.Parameter(sin_cos_table(hidden_size, input_size // patch_size), requires_grad=False)
        self.blocks = nn.ModuleList([Block(hidden_size, num_heads) for _ in range(depth)])
        self.final_layer = Head(hidden_size, patch_size**2 * self.out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.t_embedder(t) + self.y_embedder["embedding_table"](y)
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed  # (N, T, D)
        for block in self.blocks:
            x = checkpoint(block, x, c, use_reentrant=False) if self.checkpointing else block(x, c)
        x = self.final_layer(x, c)  # (N, T, p p 2C)
        n, p, side = x.shape[0], self.patch_size, math.isqrt(x.shape[1])
        x = x.reshape(n, side, side, p, p, self.out_channels)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(n, self.out_channels, side * p, side * p)


def sin_cos_table(dim: int, side: int) -> Tensor:
    """(1, side side, dim): columns in the first half, rows in the second, each [sin, cos]."""
    omega = 1 / 10_000 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4))
    rows, columns = np.divmod(np.arange(side * side), side)
    parts = [f(np.outer(place, omega)) for place in (columns, rows) for f in (np.sin, np.cos)]
    return torch.from_numpy(np.concatenate(parts, axis=1)).float().unsqueeze(0)


# ---- loss

BETAS = np.linspace(1e-4, 0.02, 1000, dtype=np.float64)


class PlainDDPM:
    """Eps and learned-range variance: MSE plus the variational bound with eps detached.

    `tables`: None keeps the tables in numpy and moves them to the device at each lookup; a device holds fp32 copies.
    """

    def __init__(self, tables: torch.device | str | None, betas: np.ndarray = BETAS):
        bar = np.cumprod(1 - betas)
        before = np.append(1.0, bar[:-1])
        posterior = betas * (1 - before) / (1 - bar)
        self.tables = {
            "sqrt_bar": np.sqrt(bar),
            "sqrt_rest": np.sqrt(1 - bar),
            "x_0_of_x_t": np.sqrt(1 / bar),
            "x_0_of_eps": np.sqrt(1 / bar - 1),
            "mean_of_x_0": betas * np.sqrt(before) / (1 - bar),
            "mean_of_x_t": (1 - before) * np.sqrt(1 - betas) / (1 - bar),
            "log_beta": np.log(betas),
            "log_posterior": np.log(np.append(posterior[1], posterior[1:])),
        }
        if tables is not None:
            self.tables = {k: torch.from_numpy(v).float().to(tables) for k, v in self.tables.items()}

    def at(self, name: str, index: Tensor) -> Tensor:
        table = self.tables[name]
        if isinstance(table, np.ndarray):
            table = torch.from_numpy(table).to(index.device)
        return table[index].float()[:, None, None, None]

    def losses(self, model: Callable, inputs: Inputs) -> Tensor:
        """(N,)"""
        x_0, y, index, noise = inputs.x_0, inputs.y, inputs.index, inputs.noise
        x_t = self.at("sqrt_bar", index) * x_0 + self.at("sqrt_rest", index) * noise
        eps, raw = model(x_t, index, y).chunk(2, dim=1)
        mse = (noise - eps).square().mean(dim=(1, 2, 3))
        # the bound treats eps as a constant: it trains only the variance
        guess = self.at("x_0_of_x_t", index) * x_t - self.at("x_0_of_eps", index) * eps.detach()
        mean = self.at("mean_of_x_0", index) * guess + self.at("mean_of_x_t", index) * x_t
        true_mean = self.at("mean_of_x_0", index) * x_0 + self.at("mean_of_x_t", index) * x_t
        true_log = self.at("log_posterior", index)
        part = (raw + 1) / 2
        log = part * self.at("log_beta", index) + (1 - part) * true_log
        kl = 0.5 * (log - true_log - 1 + torch.exp(true_log - log) + (true_mean - mean) ** 2 * torch.exp(-log))
        bits = torch.where(index == 0, self.decoder_nats(x_0, mean, log).mean(dim=(1, 2, 3)), kl.mean(dim=(1, 2, 3)))
        return mse + bits / math.log(2)

    @staticmethod
    def decoder_nats(x: Tensor, mean: Tensor, log: Tensor) -> Tensor:
        """-log of the normal distribution's mass in the 8-bit bin of x; CDF by the tanh approximation."""
        scale = torch.exp(-0.5 * log)

        def cdf(z: Tensor) -> Tensor:
            return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z.pow(3))))

        upper, lower = cdf(scale * (x - mean + 1 / 255)), cdf(scale * (x - mean - 1 / 255))
        inner = torch.where(x > 0.999, 1 - lower, upper - lower)
        return -torch.where(x < -0.999, upper, inner).clamp(min=1e-12).log()
