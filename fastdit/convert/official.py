"""Released checkpoint files of DiT, SiT and fast-DiT, read without executing code in them.

fastdit uses the official parameter names. A released file is a plain state dict, or a training file
{model, ema, opt, args} with args an argparse.Namespace; its names may have prefixes from DDP and torch.compile. The
architecture is inferred from the shapes.
"""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdit.build import build_objective
from fastdit.convert.pickles import is_plain, read_pickle
from fastdit.diffusion.objectives import DDPM, FlowMatching
from fastdit.models.dit import DIT_VARIANTS, variant_shape
from fastdit.schema import Config
from fastdit.training.weights import read_weights

# arg of SiT -> (objective option, {its value: ours}, {} if they are the same)
FLOW = {
    "path_type": ("interpolant", {"Linear": "linear", "GVP": "gvp", "VP": "vp"}),
    "prediction": ("prediction", {"velocity": "velocity", "noise": "eps", "score": "score"}),
    "loss_weight": ("weight", {None: "none", "velocity": "velocity", "likelihood": "likelihood"}),
    "train_eps": ("train_eps", {}),
    "sample_eps": ("sample_eps", {}),
}
# the same for create_diffusion in DiT: objective option -> {its argument: ours}; DiT's scripts always use the first
DIFFUSION = {
    "schedule": {"noise_schedule='linear'": "linear", "noise_schedule='squaredcos_cap_v2'": "cosine"},
    "prediction": {"predict_xstart=False": "eps", "predict_xstart=True": "x_0"},
    "variance": {"learn_sigma=True": "learned_range", "learn_sigma=False": "fixed_large",
                 "learn_sigma=False, sigma_small=True": "fixed_small"},
}  # fmt: skip
NAMES = {key: (f"objective.{option}", names) for key, (option, names) in FLOW.items()} | {
    "num_classes": ("data.num_classes", {}),
    "image_size": ("data.image_size", {}),
    "global_seed": ("seed", {}),
    "global_batch_size": ("training.global_batch", {}),
}
# args of DiT, SiT and fast-DiT that have no effect on the network
NO_EFFECT = ("data_path", "feature_path", "results_dir", "epochs", "num_workers", "log_every", "ckpt_every",
             "sample_every", "cfg_scale", "wandb", "ckpt", "lr")  # fmt: skip
VAES = "stabilityai/sd-vae-ft-{}"
WRAPPERS = ("module", "_orig_mod")  # added to parameter names by DDP and torch.compile
HEADS = {shape["hidden_size"]: shape["num_heads"] for shape in DIT_VARIANTS.values()}


@dataclass(frozen=True)
class Released:
    """fp32 weights with the official names, their EMA (the same if the file has one set), and the args of the run."""

    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    args: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """The sizes of a network, inferred from the shapes in its state dict."""

    depth: int
    hidden_size: int
    num_heads: int
    patch_size: int
    input_size: int  # of the latents
    in_channels: int
    num_classes: int
    null_row: bool
    learn_sigma: bool

    @property
    def variant(self) -> str:
        """The name for `create_dit`."""
        custom = f"DiT-{self.depth}x{self.hidden_size}x{self.num_heads}/{self.patch_size}"
        return next((name for name, shape in DIT_VARIANTS.items() if shape == variant_shape(custom)), custom)


def read_released(path: str | Path) -> Released:
    """Read a .pt or .safetensors file of the official DiT, SiT or fast-DiT; ValueError for anything else."""
    path = Path(path)
    content = read_weights(path) if path.suffix == ".safetensors" else read_pickle(path)
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise ValueError(f"{path} contains a {kind}; expected a state dict or {{model, ema, opt, args}}")
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else dict(args) if isinstance(args, Mapping) else {}
    sets = {name: content[name] for name in ("model", "ema") if isinstance(content.get(name), Mapping)}
    notes = []
    if not sets:
        if not any(isinstance(value, Tensor) for value in content.values()):
            keys = ", ".join(map(str, list(content)[:5])) or "nothing"
            raise ValueError(f"{path} contains {keys}; expected a state dict or {{model, ema, opt, args}}")
        sets = {"ema": content}
    weights = {name: official_names(state, path) for name, state in sets.items()}
    if len(weights) == 1:
        [(name, only)] = weights.items()
        weights = {"model": only, "ema": only}
        notes.append(f"{path.name} has one set of weights{'' if name == 'ema' else ', without EMA'}; it is used as "
                     "both the weights and the EMA")  # fmt: skip
    if any(t.dtype != torch.float32 for state in sets.values() for t in state.values() if isinstance(t, Tensor)):
        notes.append(f"{path.name} is not all float32; converted to float32")
    return Released(weights["model"], weights["ema"], args, tuple(notes))


def official_names(state: Mapping[str, Any], path: str | Path) -> dict[str, Tensor]:
    """fp32 tensors with the official parameter names; ValueError for values that fp32 does not hold."""
    names = {}
    for name, value in state.items():
        if not isinstance(name, str):
            raise ValueError(f"{path}: {name!r} is not the name of a tensor; expected a state dict")
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {name} is a {type(value).__name__}, not a tensor; expected a state dict")
        if not value.is_floating_point() or not is_plain(value):
            raise ValueError(f"{path}: {name} is not a tensor of plain numbers, all of which are in the file")
        single = value.float()
        if value.dtype == torch.float64 and not torch.equal(single.double(), value):
            raise ValueError(f"{path}: {name} is float64, and its values are not exact in float32; save it as float32")
        names[".".join(part for part in name.split(".") if part not in WRAPPERS)] = single
    return names


def architecture(
    state: Mapping[str, Tensor], where: str | Path, *, heads: int | None = None, num_classes: int | None = None
) -> Architecture:
    """Infer the architecture from a state dict with the official names; ValueError if the shapes are not enough.

    `heads` is needed if no known variant has the hidden size; `num_classes` if the label table has no null label.
    """

    def shape(name: str, rank: int) -> torch.Size:
        if name not in state:
            raise ValueError(f"{where} has no {name}; it is not a DiT or SiT checkpoint ({some_names(state)})")
        if state[name].ndim != rank:
            raise ValueError(f"{where}: {name} has shape {tuple(state[name].shape)}; expected {rank} dimensions")
        return state[name].shape

    hidden, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    _, tokens, _ = shape("pos_embed", 3)
    outputs, _ = shape("final_layer.linear.weight", 2)
    depth = len({m[1] for name in state if (m := re.match(r"blocks\.(\d+)\.", name))})
    if depth == 0:
        raise ValueError(f"{where} has no blocks.0.*; it is not a DiT or SiT checkpoint ({some_names(state)})")
    if isqrt(tokens) ** 2 != tokens:
        raise ValueError(f"{where}: pos_embed has {tokens} positions, not a square; only square latents convert")
    if outputs not in (channels * patch**2, 2 * channels * patch**2):
        raise ValueError(
            f"{where}: the head has {outputs} outputs per patch; a DiT has {channels * patch**2} or twice as many, "
            "so this is another network"
        )
    heads = HEADS.get(hidden) if heads is None else heads
    if heads is None:
        known = ", ".join(map(str, sorted(HEADS)))
        raise ValueError(f"{where} has hidden size {hidden}, not one of {known}; set its number of heads with --heads")
    if heads < 1 or hidden % heads:
        raise ValueError(f"--heads={heads} does not divide the hidden size {hidden} of {where}; use a divisor")
    rows = len(state.get("y_embedder.embedding_table.weight", ()))
    if num_classes is None:
        num_classes = max(rows - 1, 0)
    if num_classes not in (rows, rows - 1) or (rows and not num_classes):
        raise ValueError(
            f"data.num_classes={num_classes}, but the label table of {where} has {rows} rows; "
            + (f"use {rows - 1} with a null label, or {rows} without" if rows else "use 0, because it is unconditional")
        )
    return Architecture(
        depth=depth,
        hidden_size=hidden,
        num_heads=heads,
        patch_size=patch,
        input_size=isqrt(tokens) * patch,
        in_channels=channels,
        num_classes=num_classes,
        null_row=rows > num_classes,
        learn_sigma=outputs == 2 * channels * patch**2,
    )


def some_names(state: Mapping[str, Any]) -> str:
    return "it contains " + (", ".join(map(str, list(state)[:3])) + ", ..." if state else "nothing")


def settings_of(args: Mapping[str, Any], where: str | Path, heads: int | None, vae: bool) -> dict[str, Any]:
    """What the args of a training file say, as dotted config keys (settings.py); ValueError for what is not understood.

    `heads`, `vae`: what the command line says about the number of heads, and whether it names the autoencoder.
    """
    said: dict[str, Any] = {}

    def unknown(key: str, remedy: str) -> ValueError:
        value = str(args[key])[:100]
        return ValueError(f"{where}: the args contain {key}={value!r}, which fastdit does not understand; {remedy}")

    for key, value in args.items():
        off = value is None or (isinstance(value, str | int | float) and not value and key not in NAMES)
        if off or key in (*NO_EFFECT, "model", "vae"):
            continue
        if key not in NAMES:
            raise unknown(key, "if it has no effect on the network, save `ema` alone as a state dict and convert that")
        ours, names = NAMES[key]
        if not isinstance(value, str | int | float) or (names and value not in names):
            raise unknown(key, f"expected {' or '.join(map(repr, names)) or 'a number'}")
        said[ours] = names[value] if names else value
    name = str(args.get("model") or "")
    if name.startswith("SiT") or "path_type" in args:
        said["objective.name"] = "flow"
    elif name.startswith("DiT"):
        said["objective.name"] = "ddpm"
    if name:
        try:
            variant_shape(name.replace("SiT", "DiT"))
            said["model.variant"] = name.replace("SiT", "DiT")
        except ValueError:
            if heads is None:
                raise unknown("model", "set its number of heads with --heads") from None
    if args.get("vae") in ("ema", "mse"):
        said["data.vae"] = VAES.format(args["vae"])
    elif args.get("vae") is not None and not vae:
        raise unknown("vae", "name the autoencoder with data.vae=FOLDER")
    return said


def args_for(config: Config, image_size: int) -> tuple[dict[str, Any], str]:
    """The args of a training file, and what to pass to the official code, whose defaults are another objective's.

    ValueError for an objective that the official code does not have.
    """
    objective, size = build_objective(config), config.model.variant
    flow = isinstance(objective, FlowMatching)
    if not flow and not isinstance(objective, DDPM):
        raise ValueError(f"objective.name={config.objective.name!r} is not supported by the official code; keep the "
                         "fastdit checkpoint")  # fmt: skip
    args: dict[str, Any] = {"model": size.replace("DiT", "SiT") if flow else size, "image_size": image_size}
    args |= {"num_classes": config.data.num_classes, "global_seed": config.seed}
    args |= {"global_batch_size": config.training.global_batch}
    if config.data.vae in (VAES.format("ema"), VAES.format("mse")):
        args["vae"] = config.data.vae[-3:]
    to_pass = []
    for key, (option, names) in (FLOW if flow else {key: (key, names) for key, names in DIFFUSION.items()}).items():
        value = getattr(objective, option)
        theirs = value if not names else next((other for other, ours in names.items() if ours == value), "")
        if theirs == "":
            code = "SiT" if flow else "DiT"
            raise ValueError(f"objective.{option}={value!r} is not supported by the official {code}; keep the fastdit "
                             "checkpoint")  # fmt: skip
        if flow:
            args[key] = theirs
        if option in ("interpolant", *DIFFUSION) and value != getattr(type(objective)(), option):
            to_pass.append(f"--{key.replace('_', '-')} {theirs}" if flow else theirs)
    if not to_pass:
        return args, ""
    return args, " ".join(to_pass) if flow else f"create_diffusion(..., {', '.join(to_pass)})"
