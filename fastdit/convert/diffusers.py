"""The diffusers version of DiT, DiTTransformer2DModel: its config, and the names and values of its weights.

The network is the same under other names, with three differences. diffusers has a copy of the time and label embedders
in every block. Its timestep embedding uses frequency shift 1, DiT uses 0, and no config key sets it: `make_exact` sets
it after loading. Its pipeline supports neither the time convention of SiT nor its sign of the velocity; both are
folded into the weights (`to_pipeline_clock`).
"""

import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.convert.official import Architecture

NULL_CLASS = 1000  # hard-coded in DiTPipeline, for any number of classes
FREQUENCIES = 128
_WHOLE = {"x_embedder.proj": "pos_embed.proj", "final_layer.adaLN_modulation.1": "proj_out_1",
          "final_layer.linear": "proj_out_2"}  # fmt: skip
_SHARED = {"t_embedder.mlp.0": "timestep_embedder.linear_1", "t_embedder.mlp.2": "timestep_embedder.linear_2"}
_OF_A_BLOCK = {"adaLN_modulation.1": "norm1.linear", "attn.proj": "attn1.to_out.0", "mlp.fc1": "ff.net.0.proj",
               "mlp.fc2": "ff.net.2"}  # fmt: skip
_TABLE = "y_embedder.embedding_table.weight"
# network options that diffusers supports: option -> (key in its config, {our value: its value}), official value first
SLOTS = {
    "mlp": ("activation_fn", {"gelu_tanh": "gelu-approximate", "gelu": "gelu"}),
    "qkv_bias": ("attention_bias", {True: True, False: False}),
}
NORM_EPS = 1e-6  # of DiT; the default of diffusers is 1e-5
TRANSFORMER = {
    **dict.fromkeys(("num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "num_layers")),
    **dict.fromkeys(("sample_size", "patch_size", "num_embeds_ada_norm")),  # read_pipeline uses these
    "norm_eps": (NORM_EPS, 1e-5),  # that of diffusers only with --from-official, because `make_exact` changes it
    **{key: tuple(values.values()) for key, values in SLOTS.values()},
    "norm_type": ("ada_norm_zero",),
    "norm_elementwise_affine": (False,),
    # no effect on the output in float32, in evaluation mode, and with patches
    **dict.fromkeys(("dropout", "upcast_attention", "norm_num_groups", "use_linear_projection")),
}


def transformer_config(shape: Architecture, options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of DiTTransformer2DModel. `options`: those of the network; only the keys of SLOTS are used."""
    return {key: values[options[name]] for name, (key, values) in SLOTS.items()} | {
        "num_attention_heads": shape.num_heads,
        "attention_head_dim": shape.hidden_size // shape.num_heads,
        "in_channels": shape.in_channels,
        "out_channels": shape.in_channels * (1 + shape.learn_sigma),
        "num_layers": shape.depth,
        "sample_size": shape.input_size,
        "patch_size": shape.patch_size,
        "num_embeds_ada_norm": NULL_CLASS,
        "norm_eps": NORM_EPS,
    }


def options_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the checked config of a DiTTransformer2DModel says, as dotted config keys and `heads`."""
    said = {"heads": settings["num_attention_heads"]}
    for name, (key, values) in SLOTS.items():
        [said[f"model.{name}"]] = (ours for ours, theirs in values.items() if theirs == settings[key])
    return said


def _name_pairs(depth: int) -> Iterator[tuple[str, str]]:
    """(official name, diffusers name) of all tensors but q, k and v; shared embedders once per block."""
    for i in range(depth):
        yield _TABLE, f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight"
    for kind in ("weight", "bias"):
        for ours, theirs in _WHOLE.items():
            yield f"{ours}.{kind}", f"{theirs}.{kind}"
        for i in range(depth):
            for ours, theirs in _SHARED.items():
                yield f"{ours}.{kind}", f"transformer_blocks.{i}.norm1.emb.{theirs}.{kind}"
            for ours, theirs in _OF_A_BLOCK.items():
                yield f"blocks.{i}.{ours}.{kind}", f"transformer_blocks.{i}.{theirs}.{kind}"


def to_diffusers(state: Mapping[str, Tensor], shape: Architecture) -> dict[str, Tensor]:
    """Official names -> names of DiTTransformer2DModel. The label table is padded to 1,001 rows, null label last."""
    if shape.num_classes > NULL_CLASS:
        raise ValueError(
            f"data.num_classes={shape.num_classes} is too large, because DiTPipeline hard-codes {NULL_CLASS} as the "
            "null label; keep the fastdit checkpoint"
        )
    table = torch.zeros(NULL_CLASS + 1, shape.hidden_size)
    if shape.num_classes:
        table[: shape.num_classes] = state[_TABLE][: shape.num_classes]
        table[NULL_CLASS] = state[_TABLE][-1] if shape.null_row else 0
    out = {theirs: table if ours == _TABLE else state[ours] for ours, theirs in _name_pairs(shape.depth)}
    for name, tensor in state.items():
        if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name):
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                out[f"transformer_blocks.{match[1]}.attn1.to_{part}.{match[2]}"] = rows
    return out


def from_diffusers(
    transformer: nn.Module, num_classes: int | None, null_row: bool = True, where: str | Path = "it"
) -> dict[str, Tensor]:
    """The state dict of a DiTTransformer2DModel with official names. `num_classes`: the number of classes in its label
    table (None: all rows but the last). ValueError if the blocks have different embedders, which DiT shares, or if rows
    of the table that are not zero would be lost."""
    state, out = transformer.state_dict(), {"pos_embed": transformer.pos_embed.pos_embed}
    depth = len(transformer.transformer_blocks)
    for ours, theirs in _name_pairs(depth):
        if not torch.equal(out.setdefault(ours, state[theirs]), state[theirs]):
            raise ValueError(f"{theirs} differs from block 0's, but all DiT blocks share it; it cannot convert")
    for i, kind in itertools.product(range(depth), ("weight", "bias")):
        parts = [f"transformer_blocks.{i}.attn1.to_{part}.{kind}" for part in "qkv"]
        if parts[0] in state:
            out[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat([state[part] for part in parts])
    table = out.pop(_TABLE)
    num_classes = len(table) - 1 if num_classes is None else num_classes
    end = len(table) - (null_row and num_classes > 0)
    if table[num_classes:end].any():
        last = int(table[num_classes:end].any(dim=1).nonzero().max()) + num_classes
        raise ValueError(
            f"data.num_classes={num_classes}{'' if null_row else ' without a null label'}, but the label table of "
            f"{where} has a row for label {last} that is not zero and would be lost; omit it"
        )
    if num_classes:
        out[_TABLE] = torch.cat([table[:num_classes], table[end:]])
    return {name: tensor.detach().float().contiguous() for name, tensor in out.items()}


def make_exact(transformer: nn.Module) -> nn.Module:
    """Set the timestep frequencies and norm epsilon of DiT in a loaded DiTTransformer2DModel, in place."""
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = NORM_EPS
    return transformer


def _time_features(t: Tensor, shift: int) -> Tensor:
    """[cos(t w), sin(t w)] (n, 256) in float64, with the fp32 frequencies w that the networks compute."""
    steps = torch.arange(FREQUENCIES, dtype=torch.float32)
    angles = t[:, None] * torch.exp(-math.log(10_000) * steps / (FREQUENCIES - shift)).double()
    return torch.cat([angles.cos(), angles.sin()], dim=1)


@functools.cache
def _change_time(to_pipeline: bool) -> Tensor:
    """(256, 256): features of time 1 - t (SiT) = change @ features of t with the frequencies of diffusers, or back.

    For t in [0, 1], the 256 smooth features of both span the same nine directions to 1e-12. One set of features is
    therefore a linear function of the other, which the first time layer absorbs.
    """
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    ours, theirs = _time_features(1 - t, 0), _time_features(t, 1)  # (n, 256)
    wanted, given = (ours, theirs) if to_pipeline else (theirs, ours)
    u, s, v = torch.linalg.svd(given, full_matrices=False)
    rank = int((s > 1e-13 * s[0]).sum())
    return ((u[:, :rank].T @ wanted) / s[:rank, None]).T @ v[:rank]  # wanted = given @ change.T


def to_pipeline_clock(state: Mapping[str, Tensor], back: bool = False) -> dict[str, Tensor]:
    """SiT weights -> weights that take t (1 is noise) with diffusers' frequencies and predict dx/dt, or `back`."""
    changed = dict(state)
    weight = state["t_embedder.mlp.0.weight"]  # (D, 256)
    changed["t_embedder.mlp.0.weight"] = (weight.double() @ _change_time(not back)).to(weight.dtype)
    for kind in ("weight", "bias"):
        changed[f"final_layer.linear.{kind}"] = -state[f"final_layer.linear.{kind}"]
    return changed
