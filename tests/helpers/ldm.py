"""An AutoencoderKL in the format of latent-diffusion: its parameter names, and its forward pass in plain PyTorch.

Rombach et al. 2022, arXiv 2112.10752: residual blocks with group norms of 32 groups, self-attention with one head in
the middle and, where `attended` says so, after each block of a level; strided convolutions after padding at the right
and the bottom; nearest-neighbor upsampling.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width, eps=1e-6)


def conv(inputs: int, outputs: int, side: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, side, padding=options.pop("padding", side // 2), **options)


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.conv1 = norm(inputs), conv(inputs, outputs)
        self.norm2, self.conv2 = norm(outputs), conv(outputs, outputs)
        if inputs != outputs:
            self.nin_shortcut = conv(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.proj_out = (conv(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        q, k, v = (layer(self.norm(x)).flatten(2).mT for layer in (self.q, self.k, self.v))  # (n, h w, c)
        weights = (q @ k.mT * c**-0.5).softmax(-1)
        return x + self.proj_out((weights @ v).mT.reshape(n, c, h, w))


class Resized(nn.Module):
    def __init__(self, width: int, up: bool):
        super().__init__()
        self.up, self.conv = up, conv(width, width) if up else conv(width, width, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    def __init__(self, inputs: int, outputs: int, layers: int, attended: bool):
        super().__init__()
        self.block = nn.ModuleList(Residual(inputs if j == 0 else outputs, outputs) for j in range(layers))
        self.attn = nn.ModuleList(Attention(outputs) for _ in range(layers if attended else 0))

    def forward(self, x: Tensor) -> Tensor:
        for j, block in enumerate(self.block):
            x = block(x)
            x = self.attn[j](x) if len(self.attn) else x
        resize = getattr(self, "downsample", getattr(self, "upsample", None))
        return resize(x) if resize else x


class Middle(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = Residual(width, width), Attention(width), Residual(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, channels: list[int], layers: int, latent: int, attended: set[int]):
        super().__init__()
        self.conv_in = conv(3, channels[0])
        inputs = [channels[0], *channels]
        self.down = nn.ModuleList(Level(inputs[i], c, layers, i in attended) for i, c in enumerate(channels))
        for level, width in zip(self.down[:-1], channels, strict=False):
            level.downsample = Resized(width, up=False)
        self.mid, self.norm_out = Middle(channels[-1]), norm(channels[-1])
        self.conv_out = conv(channels[-1], 2 * latent)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """The blocks of `up` run from the last to the first."""

    def __init__(self, channels: list[int], layers: int, latent: int, attended: set[int]):
        super().__init__()
        self.conv_in, self.mid = conv(latent, channels[-1]), Middle(channels[-1])
        inputs = [*channels[1:], channels[-1]]
        self.up = nn.ModuleList(Level(inputs[i], c, layers + 1, i in attended) for i, c in enumerate(channels))
        for level, width in zip(self.up[1:], channels[1:], strict=True):
            level.upsample = Resized(width, up=True)
        self.norm_out, self.conv_out = norm(channels[0]), conv(channels[0], 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class LDM(nn.Module):
    """Weights from `seed`, none of them zero or one."""

    def __init__(self, channels=(32, 64), layers: int = 1, latent: int = 5, attended=(1,), seed: int = 0):
        super().__init__()
        channels, attended = list(channels), set(attended)
        self.encoder, self.decoder = (kind(channels, layers, latent, attended) for kind in (Encoder, Decoder))
        self.quant_conv, self.post_quant_conv = conv(2 * latent, 2 * latent, 1), conv(latent, latent, 1)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)

    def encode(self, x: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) -> mean and log variance (N, 2C, h, w)."""
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))
