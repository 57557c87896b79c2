"""The diffusion transformer DiT (Peebles & Xie 2023, arXiv 2212.09748) and its options; SiT uses the same network.

docs/variants.md lists the options and their costs. All defaults are the official design.
"""

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.kernels import rope_2d
from fastdit.models.attention import ATTENTION
from fastdit.models.blocks import BLOCKS, DiTBlock, FinalLayer
from fastdit.models.class_token import ClassToken, channels_of, join, split
from fastdit.models.dropout import dropout_keys
from fastdit.models.layers import LabelEmbedder, PatchEmbed, TimestepEmbedder, position_embedding
from fastdit.models.routing import Route
from fastdit.models.taps import Tapped, settled
from fastdit.registry import check, lookup
from fastdit.schema import NetworkOptions


class DiT(nn.Module):
    """Latents (N, C, H, W), the objective's model time (N,) and labels (N,) -> (N, C or 2C, H, W).

    `input_size` is the side of a square latent, or (height, width). `learn_sigma` doubles the output channels.
    `num_classes=0` makes the network unconditional. The null label for classifier-free guidance is `num_classes`; the
    label table has a row for it only if `class_dropout > 0`, else `null_label` is None. Labels are dropped by the
    training step (`drop_labels`), not by the network. With a class token, the input and the output have
    further channels (models/class_token.py); `state_shape` is the input's (C, H, W). `attention` is a key of
    `models.attention.ATTENTION`; `options` are the fields of `NetworkOptions`. Raises
    ValueError for inconsistent sizes.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        num_classes: int = 1000,
        class_dropout: float = 0.1,
        learn_sigma: bool = True,
        attention: str = "sdpa",
        **options,
    ):
        super().__init__()
        height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
        for side in (height, width):
            if side % patch_size or not side:
                raise ValueError(
                    f"latent size {side} is not divisible by patch_size={patch_size}; "
                    f"use a latent of {max(side // patch_size, 1) * patch_size} or another patch size"
                )
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden_size={hidden_size} must be a multiple of num_heads={num_heads} and of 4")
        head_dim = hidden_size // num_heads
        check(attention, ATTENTION, "model.attention")
        options = NetworkOptions(**options)
        position, registers, decoder = options.position, options.registers, options.decoder_blocks
        if decoder and not BLOCKS[options.block]:
            raise ValueError(f"model.decoder_blocks={decoder} modulates each token, but block={options.block!r} has no "
                             "modulations; use adaln_zero or adaln, or decoder_blocks=0")  # fmt: skip
        if decoder >= depth:
            raise ValueError(f"model.decoder_blocks={decoder} leaves none of {depth} blocks for the encoder; use fewer")
        if options.class_token and decoder:
            raise ValueError(f"model.class_token={options.class_token} has no place in the decoder of "
                             f"model.decoder_blocks={decoder}; use decoder_blocks=0")  # fmt: skip
        if "rope" in position and head_dim % 4:
            raise ValueError(
                f"model.position={position!r} rotates pairs along two axes and needs head_dim to be a multiple of 4, "
                f"not {hidden_size} / {num_heads} = {head_dim}; use another num_heads, or position=sincos"
            )
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.hidden_size, self.num_classes, self.options = hidden_size, num_classes, options
        self.grid = height // patch_size, width // patch_size
        self.patches = self.grid[0] * self.grid[1]
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.fp8 = None  # the scaling factors of FP8 training, see models/fp8.py
        self.residual_dtype: torch.dtype | None = None  # None: the dtype of the weights, fp32
        self.null_label = num_classes if num_classes and class_dropout > 0 else None
        in_context = (2 if num_classes else 1) if options.block == "in_context" else 0  # tokens for time and label
        self.tokens = self.patches + registers + in_context + bool(options.class_token)  # sequence length in the blocks
        self.class_token = ClassToken(options.class_token, hidden_size) if options.class_token else None
        self.state_shape = (in_channels + channels_of(options.class_token, (height, width)), height, width)

        self.encoder_blocks = depth - decoder  # the number of blocks before the decoder, if there is one
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.decoder_embedder = PatchEmbed(patch_size, in_channels, hidden_size) if decoder else None
        self.t_embedder = TimestepEmbedder(hidden_size)
        if num_classes:
            self.y_embedder = LabelEmbedder(num_classes, hidden_size, null_row=class_dropout > 0)
        table = position_embedding(hidden_size, *self.grid)[None] if "sincos" in position else None
        self.register_buffer("pos_embed", table)  # (1, T, D), frozen
        rope = None
        if "rope" in position:  # (2, tokens, head_dim / 2): cos, sin; extra tokens are not rotated
            rope = torch.stack([torch.ones(self.tokens, head_dim // 2), torch.zeros(self.tokens, head_dim // 2)])
            rope[:, : self.patches] = torch.stack(rope_2d(*self.grid, head_dim))
        self.register_buffer("rope", rope)
        self.registers = nn.Parameter(torch.empty(1, registers, hidden_size)) if registers else None
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, options, attention) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels, options)
        self.initialize()
        # in training only: who reads hidden tokens (models/taps.py), what was read, and which tokens skip blocks
        self.taps = nn.ModuleDict()
        self.tapped: dict[str, Tapped] = {}
        self.route: Route | None = None

    def initialize(self) -> None:
        """Official initialization: linears Xavier uniform, bias zero; embedders N(0, 0.02); modulations, head zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for embedder in filter(None, (self.x_embedder, self.decoder_embedder)):
            patch_weight = embedder.proj.weight
            nn.init.xavier_uniform_(patch_weight.view(patch_weight.shape[0], -1))  # as a linear
            nn.init.zeros_(embedder.proj.bias)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        if self.num_classes:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        if self.registers is not None:
            nn.init.normal_(self.registers, std=0.02)
        for layer in [*self.blocks, self.final_layer]:
            if hasattr(layer, "adaLN_modulation"):
                nn.init.zeros_(layer.adaLN_modulation[1].weight)
        for head in filter(None, (self.final_layer.head, self.class_token and self.class_token.head)):
            for parameter in head.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        keys = [None] * len(self.blocks)
        if self.options.dropout and self.training:
            keys = dropout_keys(x, len(self.blocks), 3)  # at most three branches per block
        x_t, class_token = (x, None) if self.class_token is None else split(x, self.options.class_token)
        time = self.t_embedder(t)
        c, tokens = self.condition(time, y), []
        if self.class_token is not None:
            tokens.append(self.class_token.embed(class_token)[:, None])  # (N, 1, D)
        if self.options.block == "in_context":
            tokens.append(c)
            c = None
        x = self.embed(self.x_embedder, x_t, tokens)
        pending = None  # the previous block's MLP branch, not yet added to the residual x
        rope = None if self.rope is None else tuple(self.rope)
        conditions = list(self.joint_modulations(c)) if self.blocks[0].joint else [c] * self.encoder_blocks
        route, extra = self.route, self.tokens - self.patches
        for number, (block, key) in enumerate(zip(self.blocks, keys, strict=True), 1):
            if number == self.encoder_blocks + 1:  # the decoder sees x_t, and the encoder's output as its condition
                c = settled(x, pending) + time[:, None]  # (N, tokens, D)
                x, pending = self.embed(self.decoder_embedder, x_t), None
                conditions += [c] * self.options.decoder_blocks
            on_route = route is not None and route.first < number <= route.last
            if on_route and number == route.first + 1:
                whole = settled(x, pending)
                x, pending = route.enter(whole), None
            x, pending = block(x, pending, conditions[number - 1], route.rotations(rope) if on_route else rope, key)
            if on_route and number == route.last:
                x, pending, on_route = route.leave(whole, settled(x, pending)), None, False
            for name, tap in self.taps.items():
                if tap.block == number:
                    hidden = settled(x, pending)
                    kept = route.kept[:, : hidden.shape[1] - extra] if on_route else None
                    self.tapped[name] = Tapped(tap(hidden[:, : hidden.shape[1] - extra]), kept)
        if extra:  # drop them, but for the class token
            last = self.patches + (self.class_token is not None)
            x, c = x[:, :last], c[:, :last] if self.options.decoder_blocks else c
            if pending is not None:
                branch, gate, bias = pending
                gate = gate[:, :last] if gate is not None and gate.ndim == 3 else gate
                pending = branch[:, :last], gate, bias
        if self.class_token is None:
            return self.unpatchify(self.final_layer(x, pending, c))
        out, hidden = self.final_layer(x, pending, c, self.patches)
        latents = self.unpatchify(out)[:, : self.in_channels]  # SiT ignores the others
        return join(latents, self.class_token.head(hidden[:, 0]))

    def embed(self, embedder: PatchEmbed, x_t: Tensor, tokens: Sequence[Tensor] = ()) -> Tensor:
        """Latents (N, C, H, W) -> (N, tokens, D): patches with their positions, further `tokens`, registers."""
        x = embedder(x_t)  # (N, T, D), T = (H / p)(W / p)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        if tokens:
            x = torch.cat([x, *tokens], dim=1)
        if self.registers is not None:
            x = torch.cat([x, self.registers.expand(len(x), -1, -1)], dim=1)  # (N, tokens, D)
        return x.to(self.residual_dtype or embedder.proj.weight.dtype)

    def condition(self, time: Tensor, y: Tensor | None) -> Tensor:
        """Embedded time (N, D) with the label's embedding: their sum for adaLN blocks, else tokens (N, 1 or 2, D)."""
        if BLOCKS[self.options.block]:
            return time + self.y_embedder(y) if self.num_classes else time
        return torch.stack([time, self.y_embedder(y)] if self.num_classes else [time], dim=1)

    def joint_modulations(self, c: Tensor) -> tuple[Tensor, ...]:
        """The outputs of the encoder blocks' adaLN_modulation on c (N, D), as one matmul; without a decoder, of all."""
        linears = [block.adaLN_modulation[1] for block in self.blocks[: self.encoder_blocks]]
        device = c.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else c.dtype
        # cast before concatenating: when compiled, both take the one pass over the weights that autocast needs anyway
        weight = torch.cat([linear.weight.to(dtype) for linear in linears])
        bias = torch.cat([linear.bias.to(dtype) for linear in linears])
        return F.linear(F.silu(c), weight, bias).chunk(len(linears), dim=-1)

    def unpatchify(self, x: Tensor) -> Tensor:
        """(N, T, p p C) with channels fastest -> (N, C, H, W)."""
        (height, width), p = self.grid, self.patch_size
        x = x.view(x.shape[0], height, width, p, p, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], self.out_channels, height * p, width * p)

    def set_activation_checkpointing(self, policy: str) -> None:
        """What the backward pass recomputes. none; activation: the output of GELU or SwiGLU, from saved inputs;
        selective: norms, gates and activation; full: the whole block, a third more FLOPs. ValueError if unsupported."""
        if policy == "activation" and self.blocks[0].mlp.kind == "gelu":
            raise ValueError("activation_checkpointing='activation' has no kernel for model.mlp=gelu; use selective")
        for block in self.blocks:
            block.checkpointing, block.mlp.recompute = policy, policy == "activation"

    def set_attention(self, backend: str) -> None:
        """Set the attention backend, a key of ATTENTION, in all blocks."""
        for block in self.blocks:
            for layer in (block.attn, block.cross):
                if layer is not None:
                    layer.backend = backend

    def join_modulations(self) -> None:
        """Compute all modulations but a decoder's in one matmul, for small batches; ValueError if there are none."""
        if not BLOCKS[self.options.block]:
            raise ValueError(
                f"training.joint_adaln=true needs modulations, but block={self.options.block!r} has none; use false"
            )
        for block in self.blocks[: self.encoder_blocks]:
            block.joint = True

    def compile_blocks(self, dynamic: bool | None = None) -> None:
        """Compile each block with torch.compile. They share the code, so compiling takes seconds."""
        if self.options.decoder_blocks:  # c has another rank there, and the compiler would make all its sizes dynamic
            dynamic = False
        # each kind of input has its own code: first block or another, on a route or not, in a decoder, of other sizes
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        for block in self.blocks:
            block.compile(fullgraph=True, dynamic=dynamic)
        if self.blocks[0].joint:
            self.joint_modulations = torch.compile(self.joint_modulations, fullgraph=True)

    def parameter_count(self) -> int:
        """Number of parameters as published, including the frozen `pos_embed` and without the projectors of taps."""
        table = 0 if self.pos_embed is None else self.pos_embed.numel()
        return sum(p.numel() for name, p in self.named_parameters() if not name.startswith("taps.")) + table

    def flops_per_image(self, lengths: Sequence[int] | None = None) -> int:
        """FLOPs (2 x multiply-adds) of the matmuls in the forward pass per image; training takes 3x as many.

        `lengths`: the number of tokens in each block, on a route. The projectors of taps count.
        """
        d, conditions = self.hidden_size, 2 if self.num_classes else 1
        mlp, cross = self.blocks[0].mlp, self.options.block == "cross_attention"
        total = 0
        for number, tokens in enumerate(lengths or [self.tokens] * len(self.blocks), 1):
            per_token = 4 * d * d + 2 * tokens * d + mlp.fc1.weight.numel() + mlp.fc2.weight.numel()
            per_token += 2 * d * d + 2 * conditions * d if cross else 0
            per_image = conditions * 2 * d * d if cross else 0
            rows = tokens if number > self.encoder_blocks else 1  # a decoder's modulations are per token
            total += tokens * per_token + per_image + rows * 2 * BLOCKS[self.options.block] * d * d
        for tap in self.taps.values():
            weights = sum(p.numel() for p in tap.parameters() if p.ndim > 1)
            total += weights * min(lengths[tap.block - 1] if lengths else self.tokens, self.patches)
        decoder = self.decoder_embedder is not None
        channels = self.in_channels * (1 + decoder) + self.out_channels
        ends = self.patches * d * channels * self.patch_size**2  # embeddings and head
        rows = (self.patches if decoder else 1) if BLOCKS[self.options.block] else 0
        ends += 256 * d + d * d + rows * 2 * d * d  # time embedding; final modulation
        ends += 2 * d * self.options.class_token
        return 2 * (total + ends)


def drop_labels(y: Tensor, u: Tensor, class_dropout: float, null_label: int | None) -> Tensor:
    """Replace each label by the null label where u (N,), uniform in [0, 1), is below `class_dropout`."""
    return y if null_label is None else torch.where(u < class_dropout, null_label, y)


_SIZES = {
    "Ti": (4, 64, 4),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "2B": (30, 2048, 16),  # as in the Cerebras model zoo
}

DIT_VARIANTS: dict[str, dict[str, int]] = {
    f"DiT-{size}/{patch}": {"depth": depth, "hidden_size": hidden, "num_heads": heads, "patch_size": patch}
    for size, (depth, hidden, heads) in _SIZES.items()
    for patch in (1, 2, 4, 8)
}

MAX_DEPTH, MAX_WIDTH, MAX_PATCH = 1000, 1 << 16, 1 << 10  # of a custom size


def variant_shape(variant: str) -> dict[str, int]:
    """Depth, hidden size, heads and patch size of a name such as "DiT-XL/2" or "DiT-6x384x6/2" (in that order)."""
    custom = re.fullmatch(r"DiT-([1-9]\d*)x([1-9]\d*)x([1-9]\d*)/([1-9]\d*)", variant)
    if custom:
        shape = dict(zip(("depth", "hidden_size", "num_heads", "patch_size"), map(int, custom.groups()), strict=True))
        if shape["depth"] > MAX_DEPTH or shape["hidden_size"] > MAX_WIDTH or shape["patch_size"] > MAX_PATCH:
            raise ValueError(f"model.variant={variant!r} is too large; use up to {MAX_DEPTH} blocks of {MAX_WIDTH} and "
                             f"patches of {MAX_PATCH}")  # fmt: skip
        return shape
    if f"{variant}/2" in DIT_VARIANTS:
        raise ValueError(f"model.variant={variant!r} has no patch size; did you mean '{variant}/2'?")
    return lookup(DIT_VARIANTS, variant, "model.variant")


def create_dit(variant: str, **arguments) -> DiT:
    """A DiT of a size known to `variant_shape`, e.g. `create_dit("DiT-XL/2", input_size=32)`; arguments as for DiT."""
    return DiT(**variant_shape(variant), **arguments)
