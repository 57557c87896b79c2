"""The recorded arrays and network, files like the official ones with its weights, and what they convert to."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from fastdit.build import build_network, build_objective
from fastdit.config import load_config
from fastdit.convert import convert
from fastdit.convert.command import write_fastdit
from fastdit.convert.loaded import Loaded
from fastdit.models.dit import DiT
from fastdit.registry import Choice
from fastdit.training import checkpoint
from fastdit.training.state import latents_of
from helpers import GOLDEN
from helpers.data import make_shards, tiny_vae

SIZE = ["--heads", "4"]  # the hidden size 48 of the recorded network does not imply it


def golden(name: str) -> dict[str, torch.Tensor]:
    """All numeric arrays of a golden file."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files if file[key].dtype.kind in "fiu"}


def golden_weights() -> dict[str, torch.Tensor]:
    """The recorded state dict: 2 blocks of 48, 4 heads, 10 classes, 8 x 8 latents, learned sigma."""
    return {key.removeprefix("weights/"): v for key, v in golden("dit").items() if key.startswith("weights/")}


def golden_dit(**changes) -> DiT:
    """The recorded network in eval mode."""
    with np.load(GOLDEN / "dit.npz", allow_pickle=False) as file:
        model = DiT(**json.loads(str(file["config"])), **changes).eval()
    model.load_state_dict(golden_weights(), strict=True)
    return model


def moved(state: dict[str, torch.Tensor], by: float) -> dict[str, torch.Tensor]:
    """Other weights for the same network; the position table is fixed."""
    return {name: tensor if name == "pos_embed" else tensor + by for name, tensor in state.items()}


def training_file(path: Path, prefix: str = "module.", **args) -> Path:
    """{model, ema, opt, args} as the official scripts write it; the EMA is the recorded network."""
    ema = golden_weights()
    model = {prefix + name: tensor for name, tensor in moved(ema, 0.25).items()}
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 1e-4}]}
    torch.save({"model": model, "ema": ema, "opt": optimizer, "args": argparse.Namespace(**args)}, path)
    return path


def quiet(line: str) -> None:
    """A `say` that prints nothing."""


def make_place(root: Path) -> Path:
    """vae/, latents/ (40, of unit variance, in two shards) and plain.pt.

    From plain.pt ddpm/ and flow/ are converted to fastdit, and from these ddpm_pipe/ and flow_pipe/ to diffusers.
    """
    tiny_vae().save_pretrained(root / "vae")
    make_shards(root / "latents")
    torch.save(golden_weights(), root / "plain.pt")
    for name in ("ddpm", "flow"):
        overrides = [f"objective={name}", f"data.vae={root}/vae"]
        convert(root / "plain.pt", "fastdit", root / name, overrides=overrides, heads=4, say=quiet)
        convert(root / name, "diffusers", root / f"{name}_pipe", say=quiet)
    return root


def make_checkpoint(
    place: Path,
    out: Path,
    objective: dict | None = None,
    shape: tuple[int, int, int] = (4, 8, 8),
    classes: int = 5,
    names: tuple[str, ...] = (),
    vae: str | None = None,
    **options,
) -> Path:
    """A checkpoint, at step 7, of a small network with random weights, another EMA, and these options of `model:`."""
    config = load_config(place / "ddpm" / "config.yaml", ["model.variant=DiT-2x32x2/4", f"data.num_classes={classes}"])
    given = {"name": "ddpm"} if objective is None else objective
    choice = Choice(given["name"], {key: value for key, value in given.items() if key != "name"})
    config = replace(config, model=replace(config.model, **options), objective=choice)
    latents = replace(latents_of(checkpoint.read_meta(place / "ddpm")), shape=shape)
    if vae is not None:  # one that is no local folder, whose scale the formats must keep
        config = replace(config, data=replace(config.data, vae=vae))
        latents = replace(latents, vae=vae, scale=0.3)
    model = build_network(config, shape, build_objective(config))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    ema = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    raw = moved(ema, 0.01) | {name: ema[name] for name in ("rope",) if name in ema}
    write_fastdit(Loaded(raw, ema, config, latents, 7, names), out, out)
    return out


def weights(folder: Path, name: str = "ema") -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.safetensors")


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """The same names and the same bits."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def without(state: dict, *names: str) -> dict:
    return {key: value for key, value in state.items() if key not in names}
