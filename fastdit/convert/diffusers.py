"""DiT as diffusers has it: DiTTransformer2DModel and the schedulers that its DiTPipeline takes.

The same network under other names, with three differences. diffusers keeps a copy of the time and label embedders in
every block. Its config can set the epsilon of all norms (`norm_eps`), but not the frequency shift of its timestep
embedding, which is 1 where DiT's is 0: `make_exact` sets it after loading. And its pipeline knows neither SiT's clock
nor its sign of velocity; both are folded into the weights (`to_pipeline_clock`).
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.convert.official import Architecture
from fastdit.diffusion.objectives import DDPM, FlowMatching

NULL_CLASS = 1000  # DiTPipeline's, whatever the number of classes is
FREQUENCIES = 128
_WHOLE = {"x_embedder.proj": "pos_embed.proj", "final_layer.adaLN_modulation.1": "proj_out_1",
          "final_layer.linear": "proj_out_2"}  # fmt: skip
_SHARED = {"t_embedder.mlp.0": "timestep_embedder.linear_1", "t_embedder.mlp.2": "timestep_embedder.linear_2"}
_OF_A_BLOCK = {"adaLN_modulation.1": "norm1.linear", "attn.proj": "attn1.to_out.0", "mlp.fc1": "ff.net.0.proj",
               "mlp.fc2": "ff.net.2"}  # fmt: skip
_TABLE = "class_embedder.embedding_table.weight"
_BETAS = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "zero_terminal_snr": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
                          "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}  # fmt: skip
# options of the network that their config has too: its key, and its values for ours, the official one first
SLOTS = {
    "mlp": ("activation_fn", {"gelu_tanh": "gelu-approximate", "gelu": "gelu"}),
    "qkv_bias": ("attention_bias", {True: True, False: False}),
}
_FIXED = {"norm_type": "ada_norm_zero", "norm_elementwise_affine": False}
_PREDICTIONS = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}


def transformer_config(shape: Architecture, options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of DiTTransformer2DModel; norm_eps is DiT's own, which diffusers' default is not.

    `options`: the network's, of which SLOTS count.
    """
    return {key: values[options[name]] for name, (key, values) in SLOTS.items()} | {
        "num_attention_heads": shape.num_heads,
        "attention_head_dim": shape.hidden_size // shape.num_heads,
        "in_channels": shape.in_channels,
        "out_channels": shape.in_channels * (1 + shape.learn_sigma),
        "num_layers": shape.depth,
        "sample_size": shape.input_size,
        "patch_size": shape.patch_size,
        "num_embeds_ada_norm": NULL_CLASS,
        "norm_eps": 1e-6,
    }


def options_of(config: Mapping[str, Any], where: str | Path) -> dict[str, Any]:
    """The network's options behind the config of a DiTTransformer2DModel; ValueError for what DiT never is."""
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise ValueError(f"{where}: {key}={config[key]!r} has no counterpart in DiT, which has {value!r}")
    options = {}
    for name, (key, values) in SLOTS.items():
        theirs = config.get(key, next(iter(values.values())))
        ours = [value for value, other in values.items() if other == theirs]
        if not ours:
            known = ", ".join(map(repr, values.values()))
            raise ValueError(f"{where}: {key}={theirs!r} has no counterpart in DiT, which has {known}")
        options[name] = ours[0]
    return options


def to_diffusers(state: Mapping[str, Tensor], shape: Architecture) -> dict[str, Tensor]:
    """Official names -> DiTTransformer2DModel's; the label table is padded to 1,001 rows, the null row the last."""
    if shape.num_classes > NULL_CLASS:
        raise ValueError(
            f"data.num_classes={shape.num_classes}: DiTPipeline hard-codes {NULL_CLASS} as the null class, "
            f"so at most {NULL_CLASS} classes can be exported"
        )
    table = torch.zeros(NULL_CLASS + 1, shape.hidden_size)
    if shape.num_classes:
        rows = state["y_embedder.embedding_table.weight"]
        table[: shape.num_classes] = rows[: shape.num_classes]
        table[NULL_CLASS] = rows[-1] if shape.null_row else 0
    out = {}
    for kind in ("weight", "bias"):
        out |= {f"{theirs}.{kind}": state[f"{ours}.{kind}"] for ours, theirs in _WHOLE.items()}
        for i in range(shape.depth):
            block = f"transformer_blocks.{i}."
            out |= {f"{block}norm1.emb.{theirs}.{kind}": state[f"{ours}.{kind}"] for ours, theirs in _SHARED.items()}
            out |= {
                f"{block}{theirs}.{kind}": state[f"blocks.{i}.{ours}.{kind}"] for ours, theirs in _OF_A_BLOCK.items()
            }
            qkv = state.get(f"blocks.{i}.attn.qkv.{kind}")
            for part, tensor in zip("qkv", qkv.chunk(3), strict=True) if qkv is not None else ():
                out[f"{block}attn1.to_{part}.{kind}"] = tensor
            out[f"{block}norm1.emb.{_TABLE}"] = table
    return out


def from_diffusers(transformer: nn.Module, num_classes: int | None, null_row: bool = True) -> dict[str, Tensor]:
    """Official names from a DiTTransformer2DModel. `num_classes`: how many rows of its label table are classes (None:
    all but the last); ValueError where the blocks' embedders, one and the same in DiT, have grown apart."""
    state, depth = transformer.state_dict(), len(transformer.transformer_blocks)
    shared = [f"{name}.{kind}" for name in _SHARED.values() for kind in ("weight", "bias")]
    for i in range(1, depth):
        for name in [*shared, _TABLE]:
            if not torch.equal(
                state[f"transformer_blocks.{i}.norm1.emb.{name}"], state[f"transformer_blocks.0.norm1.emb.{name}"]
            ):
                raise ValueError(
                    f"transformer_blocks.{i}.norm1.emb.{name} differs from block 0's: each block was trained with an "
                    "embedder of its own, and DiT has one for all"
                )
    out = {"pos_embed": transformer.pos_embed.pos_embed}
    first = "transformer_blocks.0.norm1.emb."
    for kind in ("weight", "bias"):
        out |= {f"{ours}.{kind}": state[f"{theirs}.{kind}"] for ours, theirs in _WHOLE.items()}
        out |= {f"{ours}.{kind}": state[f"{first}{theirs}.{kind}"] for ours, theirs in _SHARED.items()}
        for i in range(depth):
            block = f"transformer_blocks.{i}."
            out |= {
                f"blocks.{i}.{ours}.{kind}": state[f"{block}{theirs}.{kind}"] for ours, theirs in _OF_A_BLOCK.items()
            }
            if f"{block}attn1.to_q.{kind}" in state:
                parts = [state[f"{block}attn1.to_{part}.{kind}"] for part in "qkv"]
                out[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    table = state[first + _TABLE]
    num_classes = len(table) - 1 if num_classes is None else num_classes
    if num_classes:
        out["y_embedder.embedding_table.weight"] = torch.cat([table[:num_classes], table[len(table) - null_row :]])
    return {name: tensor.detach().float().contiguous() for name, tensor in out.items()}


def make_exact(transformer: nn.Module) -> nn.Module:
    """Give a DiTTransformer2DModel, as loaded, DiT's own timestep frequencies and norms, in place."""
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    return transformer


def _time_features(t: Tensor, shift: int) -> Tensor:
    """[cos(t w), sin(t w)] (n, 256), float64, of the fp32 frequencies w that the networks compute."""
    steps = torch.arange(FREQUENCIES, dtype=torch.float32)
    angles = t[:, None] * torch.exp(-math.log(10_000) * steps / (FREQUENCIES - shift)).double()
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _on_other_clock(weight: Tensor, to_pipeline: bool) -> Tensor:
    """The first time linear (D, 256), for the other of the two clocks: SiT's 1 - t, and t in diffusers' frequencies.

    On t in [0, 1] the 256 features of either are smooth and span the same nine directions to 1e-12, so that one set is
    a linear function of the other, and a linear layer can take it up.
    """
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    ours, theirs = _time_features(1 - t, 0), _time_features(t, 1)  # (n, 256)
    wanted, given = (ours, theirs) if to_pipeline else (theirs, ours)
    u, s, v = torch.linalg.svd(given, full_matrices=False)
    rank = int((s > 1e-13 * s[0]).sum())
    change = v[:rank].T @ ((u[:, :rank].T @ wanted) / s[:rank, None])  # given @ change = wanted
    return (weight.double() @ change.T).to(weight.dtype)


def to_pipeline_clock(state: Mapping[str, Tensor], back: bool = False) -> dict[str, Tensor]:
    """Official names of a SiT -> weights for t (1 is noise) in diffusers' frequencies and velocity dx/dt; or `back`."""
    changed = dict(state)
    changed["t_embedder.mlp.0.weight"] = _on_other_clock(state["t_embedder.mlp.0.weight"], to_pipeline=not back)
    for kind in ("weight", "bias"):
        changed[f"final_layer.linear.{kind}"] = -state[f"final_layer.linear.{kind}"]
    return changed


def scheduler_of(objective: DDPM | FlowMatching):
    """The diffusers scheduler for DiTPipeline; ValueError for objectives that diffusers has none for."""
    from diffusers import DDIMScheduler

    if isinstance(objective, DDPM):
        return DDIMScheduler(
            **_BETAS[objective.schedule], prediction_type=_PREDICTIONS[objective.prediction], clip_sample=False
        )
    for key, only in (("interpolant", "linear"), ("prediction", "velocity")):
        if getattr(objective, key) != only:
            raise ValueError(
                f"objective.{key}={getattr(objective, key)!r} has no scheduler for DiTPipeline; only {only}"
            )
    try:
        from diffusers import FlowMapEulerDiscreteScheduler
    except ImportError as error:
        raise ValueError("a flow checkpoint needs diffusers 0.42 or newer: pip install -U diffusers") from error
    shift = objective.shift if objective.sample_shift is None else objective.sample_shift
    return FlowMapEulerDiscreteScheduler(num_train_timesteps=1, shift=shift)  # its timesteps are t itself, 1 to 0


def objective_of(scheduler: Mapping[str, Any], learn_sigma: bool) -> DDPM | FlowMatching | None:
    """What a scheduler's config says was learned, None where it is none of ours."""
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
