"""The diffusion transformer, DiT with adaLN-Zero (Peebles & Xie 2023, arXiv 2212.09748); SiT uses the same network."""

import re

import torch
from torch import Tensor, nn

from fastdit.config import lookup
from fastdit.models.attention import ATTENTION
from fastdit.models.layers import (
    DiTBlock,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    position_embedding,
)


class DiT(nn.Module):
    """Latents (N, C, H, W), time (N,) on the model's clock and labels (N,) -> (N, C or 2C, H, W).

    `learn_sigma` doubles the output channels. `num_classes=0` makes an unconditional network. The null label for
    classifier-free guidance is `num_classes`; its row exists only when `class_dropout > 0` (`null_label` is None
    otherwise). The network draws no random numbers: who trains it replaces labels by the null label.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        num_classes: int = 1000,
        class_dropout: float = 0.1,
        learn_sigma: bool = True,
        attention: str = "sdpa",
    ):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(
                f"latent size {input_size} is not divisible by patch_size={patch_size}; "
                f"use a latent of {input_size // patch_size * patch_size} or another patch size"
            )
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden_size={hidden_size} must be a multiple of num_heads={num_heads} and of 4")
        lookup(ATTENTION, attention, "model.attention")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.hidden_size, self.num_classes = hidden_size, num_classes
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.residual_dtype: torch.dtype | None = None  # None: as autocast leaves it, fp32
        self.null_label = num_classes if num_classes and class_dropout > 0 else None

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        if num_classes:
            self.y_embedder = LabelEmbedder(num_classes, hidden_size, null_row=class_dropout > 0)
        grid = input_size // patch_size
        self.register_buffer("pos_embed", position_embedding(hidden_size, grid, grid)[None])  # (1, T, D), frozen
        self.blocks = nn.ModuleList([DiTBlock(hidden_size, num_heads, attention) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize()

    def initialize(self) -> None:
        """Official start: linears Xavier uniform with zero bias; embedders N(0, 0.02); modulations and head zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patch_weight = self.x_embedder.proj.weight
        nn.init.xavier_uniform_(patch_weight.view(patch_weight.shape[0], -1))  # as the linear that it is
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        if self.num_classes:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in [*(block.adaLN_modulation[1] for block in self.blocks), self.final_layer.adaLN_modulation[1]]:
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        c = self.t_embedder(t)  # (N, D)
        if self.num_classes:
            c = c + self.y_embedder(y)
        x = self.x_embedder(x) + self.pos_embed  # (N, T, D), T = (H / p)(W / p)
        x = x.to(self.residual_dtype or x.dtype)
        pending = None  # the last block's MLP branch, on its way into the residual x
        for block in self.blocks:
            x, pending = block(x, pending, c)
        return self.unpatchify(self.final_layer(x, pending, c))

    def unpatchify(self, x: Tensor) -> Tensor:
        """(N, T, p p C) with channels fastest -> (N, C, H, W)."""
        grid, p = self.input_size // self.patch_size, self.patch_size
        x = x.view(x.shape[0], grid, grid, p, p, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], self.out_channels, grid * p, grid * p)

    def set_activation_checkpointing(self, policy: str) -> None:
        """none; selective: backward runs norms, gates and GELU again; full: the whole block, a third more FLOPs."""
        for block in self.blocks:
            block.recompute = policy

    def set_attention(self, backend: str) -> None:
        """Use another key of ATTENTION in every block."""
        for block in self.blocks:
            block.attn.backend = backend

    def compile_blocks(self) -> None:
        """torch.compile one block, reused by all of them: seconds to the first step, and the same parameter names."""
        for block in self.blocks:
            block.compile(fullgraph=True)

    def parameter_count(self) -> int:
        """Parameters as published, the frozen `pos_embed` included."""
        return sum(p.numel() for p in self.parameters()) + self.pos_embed.numel()

    def flops_per_image(self) -> int:
        """FLOPs (2 x multiply-adds) of one image's forward pass in matrix products; training takes three times that."""
        d, tokens = self.hidden_size, self.pos_embed.shape[1]
        patch = self.in_channels * self.patch_size**2
        head = self.out_channels * self.patch_size**2
        per_token = patch * d + len(self.blocks) * (12 * d * d + 2 * tokens * d) + d * head
        per_image = 256 * d + d * d + (6 * len(self.blocks) + 2) * d * d
        return 2 * (tokens * per_token + per_image)


def drop_labels(y: Tensor, u: Tensor, class_dropout: float, null_label: int | None) -> Tensor:
    """Replace each label by the null label where its uniform number u (N,) falls below `class_dropout`."""
    return y if null_label is None else torch.where(u < class_dropout, null_label, y)


_SIZES = {"Ti": (4, 64, 4), "S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}

DIT_VARIANTS: dict[str, dict[str, int]] = {
    f"DiT-{size}/{patch}": {"depth": depth, "hidden_size": hidden, "num_heads": heads, "patch_size": patch}
    for size, (depth, hidden, heads) in _SIZES.items()
    for patch in (2, 4, 8)
}


def variant_shape(variant: str) -> dict[str, int]:
    """Depth, hidden size, heads and patch of "DiT-XL/2", or of a size spelt out in that order: "DiT-6x384x6/2"."""
    spelt = re.fullmatch(r"DiT-([1-9]\d*)x([1-9]\d*)x([1-9]\d*)/([1-9]\d*)", variant)
    if spelt:
        return dict(zip(("depth", "hidden_size", "num_heads", "patch_size"), map(int, spelt.groups()), strict=True))
    return lookup(DIT_VARIANTS, variant, "model.variant")


def create_dit(variant: str, **arguments) -> DiT:
    """DiT of a size that `variant_shape` knows, e.g. `create_dit("DiT-XL/2", input_size=32)`; the rest as DiT's."""
    return DiT(**variant_shape(variant), **arguments)
