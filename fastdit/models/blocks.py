"""The four DiT block designs (Peebles & Xie 2023, arXiv 2212.09748, section 3.2), and the final layer.

A block has two or three branches: self-attention, cross-attention to the condition (`cross_attention` only), and MLP.
Each branch starts with a norm with shift and scale, and is added to the residual through a gate. The designs differ in
where these modulation vectors come from:
  adaln_zero       shift, scale and gate are regressed from the condition and initialized to zero
  adaln            shift and scale are regressed from the condition; no gate
  in_context       shift and scale are learned and equal for all samples; time and label are appended as tokens
  cross_attention  shift and scale are learned and equal for all samples; a third branch attends to time and label
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fastdit.kernels import adaln, gate_residual_adaln
from fastdit.models.dropout import dropout
from fastdit.models.layers import NORMS, Attention, CrossAttention, Linear, Mlp, Rope, learned_shift_and_scale
from fastdit.schema import NetworkOptions

BLOCKS = {"adaln_zero": 3, "adaln": 2, "in_context": 0, "cross_attention": 0}  # modulation vectors per branch

# a branch output (N, T, D) that is not yet added to the residual, its gate (N, D) or (N, T, D), its bias (D,)
Pending = tuple[Tensor, Tensor | None, Tensor | None]


class DiTBlock(nn.Module):
    """One transformer block over (N, T, D); the condition c is (N, D), tokens (N, K, D) to attend to, or None.

    In the decoder of a DDT, c is (N, T, D): each token has its own modulation vectors.

    One fused op adds a branch to the residual, then normalizes and modulates the input of the next branch. A block
    therefore returns its MLP branch as `pending`, and the next block or the final layer adds it.
    """

    def __init__(self, hidden_size: int, num_heads: int, options: NetworkOptions, backend: str = "sdpa"):
        super().__init__()
        self.modulations = BLOCKS[options.block]
        self.norm, self.dropout = options.norm, options.dropout
        self.attn = Attention(hidden_size, num_heads, options, backend)
        self.cross = None
        if options.block == "cross_attention":
            self.cross = CrossAttention(hidden_size, num_heads, options, backend)
        self.mlp = Mlp(hidden_size, options)
        if self.modulations:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * self.modulations * hidden_size))
        else:
            self.norms = nn.ModuleList(NORMS[self.norm](hidden_size) for _ in range(2 + (self.cross is not None)))
        self.joint = False  # c holds this block's modulation vectors (see DiT.join_modulations)
        self.checkpointing = "none"  # activation checkpointing, a key of RECOMPUTE

    def forward(
        self, x: Tensor, pending: Pending | None, c: Tensor | None, rope: Rope | None = None, keys: Tensor | None = None
    ) -> tuple[Tensor, Pending]:
        """`keys` (branches, N) from `dropout_keys`; None disables dropout."""
        arguments = (x, pending, c, rope, keys)
        options = RECOMPUTE[self.checkpointing]
        if options is None or not torch.is_grad_enabled():
            return self._forward(*arguments)
        # inside the compiled region, so that the compiler sees the checkpointing
        return checkpoint(self._forward, *arguments, use_reentrant=False, preserve_rng_state=False, **options)

    def _forward(
        self, x: Tensor, pending: Pending | None, c: Tensor | None, rope: Rope | None, keys: Tensor | None
    ) -> tuple[Tensor, Pending]:
        branches = [(self.attn, rope), (self.cross, c), (self.mlp, None)]
        if self.cross is None:
            del branches[1]
        for i, (shift, scale, gate) in enumerate(self._vectors(c, x.shape[0])):
            branch, context = branches[i]
            x, h = add_and_modulate(x, pending, shift, scale, self.norm, branch.first)
            h, bias = branch(h, context)
            if keys is not None:
                h, bias = dropout(h if bias is None else h + bias, keys[i], self.dropout), None
            pending = h, gate, bias
        # clone the bias: ZeRO-3 releases the parameters of a block when the block returns
        return x, (h, gate, None if bias is None else bias.clone())

    def _vectors(self, c: Tensor | None, n: int) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Shift, scale and gate (N, D), or (N, T, D), of each branch; a gate of None means 1."""
        if self.modulations == 0:
            return [(*learned_shift_and_scale(norm, n), None) for norm in self.norms]
        vectors = (c if self.joint else self.adaLN_modulation(c)).chunk(2 * self.modulations, dim=-1)
        if self.modulations == 2:
            return [(*vectors[:2], None), (*vectors[2:], None)]
        return [vectors[:3], vectors[3:]]


def _save_matmuls(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    namespace, name = op.name().split(".")[0].split("::")
    matmul = name in ("mm", "addmm", "bmm", "_scaled_mm")
    attention = "scaled_dot_product" in name or (namespace == "fastdit" and "attention" in name)
    attention = attention or "flash_attn" in namespace
    return CheckpointPolicy.MUST_SAVE if matmul or attention else CheckpointPolicy.PREFER_RECOMPUTE


# What the backward pass recomputes: nothing; the activation; norms, gates and activation; the whole block.
RECOMPUTE: dict[str, dict | None] = {
    "none": None,
    "activation": None,  # see Mlp.recompute
    "selective": {"context_fn": functools.partial(create_selective_checkpoint_contexts, _save_matmuls)},
    "full": {},
}


def add_and_modulate(
    x: Tensor, pending: Pending | None, shift: Tensor, scale: Tensor, norm: str = "layer", linear: Linear | None = None
) -> tuple[Tensor, Tensor]:
    """Return r = x + gate (branch + bias) and norm(r) (1 + scale) + shift, both (N, T, D), the second for `linear`."""
    if shift.ndim == 3:  # vectors (N, T, D): the ops see each token as a sample of its own
        if pending is not None:
            branch, gate, bias = pending
            pending = alone(branch), None if gate is None else gate.flatten(0, 1), bias
        r, h = add_and_modulate(alone(x), pending, shift.flatten(0, 1), scale.flatten(0, 1), norm)
        return r.view_as(x), h.view_as(x)
    if pending is None:
        return x, adaln(x, shift, scale, norm=norm)
    branch, gate, bias = pending
    if gate is None:
        gate = branch.new_ones(1, branch.shape[-1]).expand(branch.shape[0], -1)
    if linear is not None and linear.after_norm is not None:
        return linear.after_norm(linear, x, branch, gate, shift, scale, bias, norm)
    return gate_residual_adaln(x, branch, gate, shift, scale, bias, norm=norm)


def alone(x: Tensor) -> Tensor:
    """(N, T, D) -> (N T, 1, D)"""
    return x.reshape(-1, 1, x.shape[-1])


class FinalLayer(nn.Module):
    """Modulated norm as in the blocks, then a linear to p p C_out values per token: (N, T, D) -> (N, T, p p C_out).

    `unpatchify`: "linear" is the released design; "transposed_conv", of stride p, is the same linear with its weights
    in another order and one bias per channel.
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

    def forward(self, x: Tensor, pending: Pending, c: Tensor | None, patches: int | None = None):
        """With `patches`: the output of the first tokens, and the normalized others (N, T - patches, D)."""
        if self.modulated:
            shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        else:
            shift, scale = learned_shift_and_scale(self.own_norm, x.shape[0])
        h = add_and_modulate(x, pending, shift, scale, self.norm)[1]
        return self.project(h) if patches is None else (self.project(h[:, :patches]), h[:, patches:])

    def project(self, h: Tensor) -> Tensor:
        if self.unpatchify == "linear":
            return self.linear(h)
        # as a linear: (D, C, p, p) -> (p p C, D) with channels fastest, and one bias per channel
        weight = self.conv.weight.permute(2, 3, 1, 0).flatten(0, 2)
        return F.linear(h, weight, self.conv.bias.repeat(weight.shape[0] // len(self.conv.bias)))
