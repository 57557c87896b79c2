"""DiT's block in its four designs (Peebles & Xie 2023, arXiv 2212.09748, section 3.2), and the final layer.

A block is branches (self-attention, for `cross_attention` also attention to the condition, MLP), each behind a norm
with shift and scale, each entering the residual through a gate. The designs differ in where those rows come from:
  adaln_zero       shift, scale and gate regressed from the condition, all zero at the start
  adaln            shift and scale regressed from the condition, no gate
  in_context       learned, the same for all images; time and label are two more tokens of the sequence
  cross_attention  learned, the same for all images; time and label are two tokens that a third branch attends to
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fastdit.config import NetworkOptions
from fastdit.kernels import adaln, gate_residual_adaln
from fastdit.models.dropout import dropout
from fastdit.models.layers import NORMS, Attention, CrossAttention, Mlp, Rope, learned_shift_and_scale

BLOCKS = {"adaln_zero": 3, "adaln": 2, "in_context": 0, "cross_attention": 0}  # rows a branch regressed from c

Row = Tensor | None
Pending = tuple[Tensor, Row, Row]  # a branch (N, T, D) not yet in the residual, its gate (N, D), its bias (D,)


class DiTBlock(nn.Module):
    """One transformer block over (N, T, D); c conditions: (N, D), tokens (N, K, D) to attend to, or None in context.

    A branch enters the residual in the op that also normalises and modulates for the next branch, so a block hands its
    MLP branch on as `pending`: the next block, or the final layer, adds it.
    """

    def __init__(self, hidden_size: int, num_heads: int, options: NetworkOptions, backend: str = "sdpa"):
        super().__init__()
        self.rows_of_c = BLOCKS[options.block]
        self.norm, self.dropout = options.norm, options.dropout
        self.attn = Attention(hidden_size, num_heads, options, backend)
        self.cross = None
        if options.block == "cross_attention":
            self.cross = CrossAttention(hidden_size, num_heads, options, backend)
        self.mlp = Mlp(hidden_size, options)
        if self.rows_of_c:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * self.rows_of_c * hidden_size))
        else:
            self.norms = nn.ModuleList(NORMS[self.norm](hidden_size) for _ in range(2 + (self.cross is not None)))
        self.joint = False  # c comes as this block's rows, made with all the others' (DiT.join_modulations)
        self.checkpointing = "none"  # activation checkpointing, a key of RECOMPUTE

    def forward(
        self, x: Tensor, pending: Pending | None, c: Row, rope: Rope | None = None, keys: Tensor | None = None
    ) -> tuple[Tensor, Pending]:
        """keys (branches, N) of `dropout_keys`, where values are to be dropped."""
        arguments = (x, pending, c, rope, keys)
        options = RECOMPUTE[self.checkpointing]
        if options is None or not torch.is_grad_enabled():
            return self._forward(*arguments)
        # inside the compiled region, so that the compiler sees it
        return checkpoint(self._forward, *arguments, use_reentrant=False, preserve_rng_state=False, **options)

    def _forward(
        self, x: Tensor, pending: Pending | None, c: Row, rope: Rope | None, keys: Tensor | None
    ) -> tuple[Tensor, Pending]:
        branches = [(self.attn, rope), (self.cross, c), (self.mlp, None)]
        if self.cross is None:
            del branches[1]
        for i, (shift, scale, gate) in enumerate(self._rows(c, x.shape[0])):
            x, h = add_and_modulate(x, pending, shift, scale, self.norm)
            branch, context = branches[i]
            h, bias = branch(h, context)
            if keys is not None:
                h, bias = dropout(h if bias is None else h + bias, keys[i], self.dropout), None
            pending = h, gate, bias
        # a copy of the bias: ZeRO-3 takes a block's parameters back when the block returns
        return x, (h, gate, None if bias is None else bias.clone())

    def _rows(self, c: Row, n: int) -> list[tuple[Tensor, Tensor, Row]]:
        """Shift, scale and gate (N, D) of each branch; no gate is a gate of one."""
        if self.rows_of_c == 0:
            return [(*learned_shift_and_scale(norm, n), None) for norm in self.norms]
        rows = (c if self.joint else self.adaLN_modulation(c)).chunk(2 * self.rows_of_c, dim=-1)
        if self.rows_of_c == 2:
            return [(*rows[:2], None), (*rows[2:], None)]
        return [rows[:3], rows[3:]]


def _keep_products(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    room, kept = op.name().split(".")[0].split("::")
    product = kept in ("mm", "addmm", "bmm", "_scaled_mm")
    attends = "scaled_dot_product" in kept or "flash_attn" in room or (room == "fastdit" and "attention" in kept)
    return CheckpointPolicy.MUST_SAVE if product or attends else CheckpointPolicy.PREFER_RECOMPUTE


# What backward runs again instead of keeping: nothing; GELU; the cheap ops (norms, gates, GELU); the whole block.
RECOMPUTE: dict[str, dict | None] = {
    "none": None,
    "activation": None,  # Mlp.recompute does it
    "selective": {"context_fn": functools.partial(create_selective_checkpoint_contexts, _keep_products)},
    "full": {},
}


def add_and_modulate(
    x: Tensor, pending: Pending | None, shift: Tensor, scale: Tensor, norm: str = "layer"
) -> tuple[Tensor, Tensor]:
    """x + gate (branch + bias), and norm(that) (1 + scale) + shift: both (N, T, D)."""
    if pending is None:
        return x, adaln(x, shift, scale, norm=norm)
    branch, gate, bias = pending
    if gate is None:
        gate = branch.new_ones(1, branch.shape[-1]).expand(branch.shape[0], -1)
    return gate_residual_adaln(x, branch, gate, shift, scale, bias, norm=norm)


class FinalLayer(nn.Module):
    """Norm with shift and scale as in the blocks, and p p C_out values a token: (N, T, D) -> (N, T, p p C_out).

    unpatchify: linear, as released; transposed_conv, of stride p, which is the same linear with its weights in another
    order and one bias a channel.
    """

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int, options: NetworkOptions):
        super().__init__()
        self.norm, self.unpatchify, self.modulated = options.norm, options.unpatchify, BLOCKS[options.block] > 0
        if self.unpatchify == "linear":
            self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        else:
            self.conv = nn.ConvTranspose2d(hidden_size, out_channels, patch_size, stride=patch_size)
        if self.modulated:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))
        else:
            self.own_norm = NORMS[self.norm](hidden_size)

    @property
    def head(self) -> nn.Module:
        return self.linear if self.unpatchify == "linear" else self.conv

    def forward(self, x: Tensor, pending: Pending, c: Row) -> Tensor:
        if self.modulated:
            shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        else:
            shift, scale = learned_shift_and_scale(self.own_norm, x.shape[0])
        h = add_and_modulate(x, pending, shift, scale, self.norm)[1]
        if self.unpatchify == "linear":
            return self.linear(h)
        # the linear's weight in another order, (D, C, p, p) -> (p p C, D) with channels fastest, and one bias a channel
        weight = self.conv.weight.permute(2, 3, 1, 0).flatten(0, 2)
        return F.linear(h, weight, self.conv.bias.repeat(weight.shape[0] // len(self.conv.bias)))
