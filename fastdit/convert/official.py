"""Released checkpoint files: the official DiT's, SiT's and fast-DiT's, read without running what is in them.

fastdit keeps the official key names, so such a file differs from fastdit's weights only in its wrapping: a plain state
dict, or a training file {model, ema, opt, args} whose args are an argparse.Namespace, with the prefixes that DDP and
torch.compile leave. The architecture is read off the shapes.
"""

import argparse
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdit.models.dit import DIT_VARIANTS
from fastdit.training.state import read_weights

WRAPPERS = ("module", "_orig_mod")  # what DDP and torch.compile put into a parameter's name
HEADS = {shape["hidden_size"]: shape["num_heads"] for shape in DIT_VARIANTS.values()}


@dataclass(frozen=True)
class Released:
    """Weights under the official names, fp32: raw ones, their EMA (the same where there is one set), the run's args."""

    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    args: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """What the shapes of a state dict say."""

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
        """The name that `create_dit` knows it by."""
        sizes = (self.depth, self.hidden_size, self.num_heads, self.patch_size)
        for name, shape in DIT_VARIANTS.items():
            if (shape["depth"], shape["hidden_size"], shape["num_heads"], shape["patch_size"]) == sizes:
                return name
        return "DiT-{}x{}x{}/{}".format(*sizes)


def read_released(path: str | Path) -> Released:
    """A .pt (or .safetensors) file of the official DiT, SiT or fast-DiT; ValueError in one line for anything else."""
    path = Path(path)
    content = read_weights(path) if path.suffix == ".safetensors" else read_pickle(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict or {{model, ema, opt, args}}")
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else dict(args) if isinstance(args, Mapping) else {}
    sets = {name: content[name] for name in ("model", "ema") if isinstance(content.get(name), Mapping)}
    notes = []
    if not sets:
        if not any(isinstance(value, Tensor) for value in content.values()):
            keys = ", ".join(map(str, list(content)[:5])) or "nothing"
            raise ValueError(f"{path} holds {keys}; expected a state dict, or {{model, ema, opt, args}}")
        sets = {"ema": content}
    weights = {name: official_names(state, path) for name, state in sets.items()}
    if len(weights) == 1:
        [(name, only)] = weights.items()
        weights = {"model": only, "ema": only}
        notes.append(f"{path.name} holds one set of weights{'' if name == 'ema' else ', the raw ones'}: it stands for "
                     "both the weights and their EMA")  # fmt: skip
    if any(t.dtype != torch.float32 for state in sets.values() for t in state.values() if isinstance(t, Tensor)):
        notes.append(f"{path.name} is not all float32; converted to it")
    return Released(weights["model"], weights["ema"], args, tuple(notes))


def read_pickle(path: Path) -> Any:
    """torch.load that executes nothing: tensors, plain containers and argparse.Namespace are all that it makes."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; name a .pt file or a folder")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # mapped, not read: the optimiser's half of a training file is never touched
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        if name is None:
            raise ValueError(f"{path} is not a PyTorch checkpoint, or is damaged; download it again") from error
        raise ValueError(
            f"{path} asks for {name[1]}, which is no tensor and no argparse.Namespace; nothing of it was run: "
            "save it again as a plain state dict if you trust it"
        ) from error
    except (RuntimeError, EOFError, LookupError, ValueError, OSError) as error:
        raise ValueError(f"{path} is not a PyTorch checkpoint, or is damaged; download it again") from error


def official_names(state: Mapping[str, Any], path: str | Path) -> dict[str, Tensor]:
    """fp32 tensors with the names that the official network gives them."""
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {name} is a {type(value).__name__}, not a tensor; this is no state dict")
    return {".".join(p for p in name.split(".") if p not in WRAPPERS): t.float() for name, t in state.items()}


def write_official(path: Path, model: dict[str, Tensor], ema: dict[str, Tensor], args: dict[str, Any]) -> None:
    """A .pt file for the official scripts: a plain state dict where EMA and weights are equal, as released; else
    {model, ema, args}, of which they read `ema`. It appears whole or not at all."""
    same = all(torch.equal(tensor, ema[name]) for name, tensor in model.items())
    content = dict(ema) if same else {"model": dict(model), "ema": dict(ema), "args": args}
    temporary = path.with_name(path.name + ".partial")
    try:
        torch.save(content, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def architecture(
    state: Mapping[str, Tensor], where: str | Path, *, heads: int | None = None, num_classes: int | None = None
) -> Architecture:
    """The network that a state dict under the official names belongs to; ValueError for what the shapes do not say.

    `heads`: where no known size has the hidden size. `num_classes`: where it is not the table's rows less the null row.
    """

    def shape(name: str, rank: int) -> torch.Size:
        if name not in state:
            raise ValueError(f"{where} has no {name}; it is not a DiT or SiT checkpoint ({some_names(state)})")
        if state[name].ndim != rank:
            raise ValueError(f"{where}: {name} has shape {tuple(state[name].shape)}; {rank} dimensions are expected")
        return state[name].shape

    hidden, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    _, tokens, _ = shape("pos_embed", 3)
    outputs, _ = shape("final_layer.linear.weight", 2)
    depth = 1 + max((int(m[1]) for name in state if (m := re.match(r"blocks\.(\d+)\.", name))), default=-1)
    if depth == 0:
        raise ValueError(f"{where} has no blocks.0.*; it is not a DiT or SiT checkpoint ({some_names(state)})")
    if isqrt(tokens) ** 2 != tokens:
        raise ValueError(f"{where}: pos_embed has {tokens} positions, no square; only square latents convert")
    if outputs not in (channels * patch**2, 2 * channels * patch**2):
        raise ValueError(
            f"{where}: the head has {outputs} values a patch, neither {channels * patch**2} nor twice that; "
            "this is another network"
        )
    heads = HEADS.get(hidden) if heads is None else heads
    if heads is None:
        known = ", ".join(map(str, sorted(HEADS)))
        raise ValueError(f"{where} has hidden size {hidden}, not one of {known}: name its number of heads with --heads")
    if heads < 1 or hidden % heads:
        raise ValueError(f"--heads={heads} does not divide the hidden size {hidden} of {where}")
    rows = state["y_embedder.embedding_table.weight"].shape[0] if "y_embedder.embedding_table.weight" in state else 0
    if num_classes is None:
        num_classes = max(rows - 1, 0)
    if num_classes not in (rows, rows - 1) or (rows and not num_classes):
        raise ValueError(
            f"data.num_classes={num_classes}, but the label table of {where} has {rows} rows; "
            + (f"use {rows - 1} with a null label, or {rows} without" if rows else "use 0, it is unconditional")
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
    return "it holds " + (", ".join(map(str, list(state)[:3])) + ", ..." if state else "nothing")


def args_of_official(args: Mapping[str, Any]) -> dict[str, Any]:
    """What a training file's args say in this library's config keys: `objective` {name, ...}, `vae`, `num_classes`."""
    said: dict[str, Any] = {}
    if "path_type" in args:  # SiT's alone
        names = {"Linear": "linear", "GVP": "gvp", "VP": "vp", "velocity": "velocity", "noise": "eps", "score": "score"}
        try:
            flow = {"interpolant": names[args["path_type"]], "prediction": names[args.get("prediction", "velocity")]}
        except KeyError as error:
            raise ValueError(f"the args say {error.args[0]!r}, which is no path or prediction of SiT's") from None
        if args.get("loss_weight"):
            flow["weight"] = args["loss_weight"]
        said["objective"] = {"name": "flow", **flow, **{k: args[k] for k in ("train_eps", "sample_eps") if args.get(k)}}
    elif "model" in args and str(args["model"]).startswith("DiT"):
        said["objective"] = {"name": "ddpm"}
    if args.get("vae") in ("ema", "mse"):
        said["vae"] = f"stabilityai/sd-vae-ft-{args['vae']}"
    if isinstance(args.get("num_classes"), int):
        said["num_classes"] = args["num_classes"]
    return said
