"""The diffusers version of DiT: DiTTransformer2DModel, and the schedulers that DiTPipeline accepts.

The network is the same under other names, with three differences. diffusers has a copy of the time and label embedders
in every block. Its timestep embedding uses frequency shift 1, DiT uses 0, and no config key sets it: `make_exact` sets
it after loading. Its pipeline supports neither the time convention of SiT nor its sign of the velocity; both are
folded into the weights (`to_pipeline_clock`).
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.convert.official import Architecture
from fastdit.diffusion.objectives import DDPM, FlowMatching

NULL_CLASS = 1000  # hard-coded in DiTPipeline, for any number of classes
FREQUENCIES = 128
_WHOLE = {"x_embedder.proj": "pos_embed.proj", "final_layer.adaLN_modulation.1": "proj_out_1",
          "final_layer.linear": "proj_out_2"}  # fmt: skip
_SHARED = {"t_embedder.mlp.0": "timestep_embedder.linear_1", "t_embedder.mlp.2": "timestep_embedder.linear_2"}
_OF_A_BLOCK = {"adaLN_modulation.1": "norm1.linear", "attn.proj": "attn1.to_out.0", "mlp.fc1": "ff.net.0.proj",
               "mlp.fc2": "ff.net.2"}  # fmt: skip
_TABLE = "y_embedder.embedding_table.weight"
_BETAS = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "zero_terminal_snr": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
                          "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}  # fmt: skip
# network options that diffusers supports: option -> (key in its config, {our value: its value}), official value first
SLOTS = {
    "mlp": ("activation_fn", {"gelu_tanh": "gelu-approximate", "gelu": "gelu"}),
    "qkv_bias": ("attention_bias", {True: True, False: False}),
}
_FIXED = {"norm_type": "ada_norm_zero", "norm_elementwise_affine": False}
_PREDICTIONS = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}


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
        "norm_eps": 1e-6,  # of DiT; the default of diffusers differs
    }


def options_of(config: Mapping[str, Any], where: str | Path) -> dict[str, Any]:
    """The network options for the config of a DiTTransformer2DModel; ValueError for values that DiT lacks."""
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise ValueError(f"{where}: {key}={config[key]!r} is not supported by DiT, which has {value!r}")
    options = {}
    for name, (key, values) in SLOTS.items():
        theirs = config.get(key, next(iter(values.values())))
        ours = [value for value, other in values.items() if other == theirs]
        if not ours:
            known = ", ".join(map(repr, values.values()))
            raise ValueError(f"{where}: {key}={theirs!r} is not supported by DiT, which has {known}")
        options[name] = ours[0]
    return options


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


def from_diffusers(transformer: nn.Module, num_classes: int | None, null_row: bool = True) -> dict[str, Tensor]:
    """The state dict of a DiTTransformer2DModel with official names. `num_classes`: the number of classes in its label
    table (None: all rows but the last). ValueError if the blocks have different embedders, which DiT shares."""
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
    if num_classes:
        out[_TABLE] = torch.cat([table[:num_classes], table[len(table) - null_row :]])
    return {name: tensor.detach().float().contiguous() for name, tensor in out.items()}


def make_exact(transformer: nn.Module) -> nn.Module:
    """Set the timestep frequencies and norm epsilon of DiT in a loaded DiTTransformer2DModel, in place."""
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    return transformer


def _time_features(t: Tensor, shift: int) -> Tensor:
    """[cos(t w), sin(t w)] (n, 256) in float64, with the fp32 frequencies w that the networks compute."""
    steps = torch.arange(FREQUENCIES, dtype=torch.float32)
    angles = t[:, None] * torch.exp(-math.log(10_000) * steps / (FREQUENCIES - shift)).double()
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _change_time(weight: Tensor, to_pipeline: bool) -> Tensor:
    """The first time linear (D, 256), converted between time 1 - t (SiT) and t with the frequencies of diffusers.

    For t in [0, 1], the 256 smooth features of both span the same nine directions to 1e-12. One set of features is
    therefore a linear function of the other, which the linear layer absorbs.
    """
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    ours, theirs = _time_features(1 - t, 0), _time_features(t, 1)  # (n, 256)
    wanted, given = (ours, theirs) if to_pipeline else (theirs, ours)
    u, s, v = torch.linalg.svd(given, full_matrices=False)
    rank = int((s > 1e-13 * s[0]).sum())
    change = v[:rank].T @ ((u[:, :rank].T @ wanted) / s[:rank, None])  # given @ change = wanted
    return (weight.double() @ change.T).to(weight.dtype)


def to_pipeline_clock(state: Mapping[str, Tensor], back: bool = False) -> dict[str, Tensor]:
    """SiT weights -> weights that take t (1 is noise) with diffusers' frequencies and predict dx/dt, or `back`."""
    changed = dict(state)
    changed["t_embedder.mlp.0.weight"] = _change_time(state["t_embedder.mlp.0.weight"], to_pipeline=not back)
    for kind in ("weight", "bias"):
        changed[f"final_layer.linear.{kind}"] = -state[f"final_layer.linear.{kind}"]
    return changed


def scheduler_of(objective: DDPM | FlowMatching):
    """The diffusers scheduler for DiTPipeline; ValueError if diffusers has none for the objective."""
    from diffusers import DDIMScheduler

    if isinstance(objective, DDPM):
        return DDIMScheduler(
            **_BETAS[objective.schedule], prediction_type=_PREDICTIONS[objective.prediction], clip_sample=False
        )
    for key, only in (("interpolant", "linear"), ("prediction", "velocity")):
        if getattr(objective, key) != only:
            value = getattr(objective, key)
            raise ValueError(f"objective.{key}={value!r} has no scheduler for DiTPipeline; only {only} can be exported")
    try:
        from diffusers import FlowMapEulerDiscreteScheduler
    except ImportError as error:
        raise ValueError("a flow checkpoint needs diffusers 0.42 or newer: pip install -U diffusers") from error
    shift = objective.shift if objective.sample_shift is None else objective.sample_shift
    return FlowMapEulerDiscreteScheduler(num_train_timesteps=1, shift=shift)  # its timesteps are t, from 1 to 0


def objective_of(scheduler: Mapping[str, Any], learn_sigma: bool) -> DDPM | FlowMatching | None:
    """The objective for the config of a scheduler, None if fastdit has no such objective."""
    if scheduler.get("_class_name") == "FlowMapEulerDiscreteScheduler" and scheduler.get("num_train_timesteps") == 1:
        return FlowMatching(shift=float(scheduler.get("shift", 1.0)))
    fixed = {} if learn_sigma else {"variance": "fixed_small", "loss_type": "mse"}
    for schedule, betas in _BETAS.items():
        same = all(scheduler.get(key) == value for key, value in betas.items() if key != "timestep_spacing")
        if same and bool(scheduler.get("rescale_betas_zero_snr")) == ("rescale_betas_zero_snr" in betas):
            for ours, theirs in _PREDICTIONS.items():
                if scheduler.get("prediction_type", "epsilon") == theirs:
                    return replace(DDPM(**fixed), schedule=schedule, prediction=ours)
    return None
