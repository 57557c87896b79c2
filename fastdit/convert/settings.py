"""The settings of a source: each one is used, has no effect on the network, or is refused by name and value.

`said` maps dotted config keys (and `heads`) to what the source itself states. The command line adds what a source does
not state; it cannot contradict what it does.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdit.build import build_objective
from fastdit.config import assumed, config_from, load_config, shipped_config, to_tree
from fastdit.convert.official import HEADS, Architecture, architecture
from fastdit.data.autoencoders import NO_VAE
from fastdit.data.latents import LatentCodec, LatentSpec
from fastdit.data.synthetic import SD_DOWNSAMPLE, SD_SCALE
from fastdit.diffusion.objectives import OBJECTIVES
from fastdit.files import parse_yaml, read_yaml, yaml_line
from fastdit.models.dit import variant_shape
from fastdit.registry import lookup
from fastdit.schema import Config
from fastdit.training.state import MAY_CHANGE

SECTIONS = {f.name for f in dataclasses.fields(Config)} - {"run_dir", "seed"}


def checked(
    config: Mapping[str, Any], allowed: Mapping[str, tuple | None], cls: Callable, where: str | Path
) -> dict[str, Any]:
    """A diffusers config with the defaults of `cls`, after checking every key.

    `allowed`: the values that fastdit can convert, None for any. Any other key must have the default of `cls`.
    """
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.default is not parameter.empty
    }
    settings = defaults | {key: value for key, value in config.items() if not key.startswith("_")}
    for key, value in settings.items():
        if allowed.get(key) is not None and value not in allowed[key]:
            known = " or ".join(map(repr, allowed[key]))
            raise ValueError(f"{where}: {key}={value!r} cannot be converted; fastdit supports {known}")
        if key not in allowed and (key not in defaults or value != defaults[key]):
            raise ValueError(
                f"{where}: {key}={value!r} is a setting that fastdit does not know; if it has no effect on the output, "
                "remove it from the file"
            )
    return settings


@dataclass(frozen=True)
class Stated:
    """What the command line says about the source.

    `from_official`: the weights of a diffusers folder were converted from the official DiT (pipeline.py).
    """

    config: str | Path | None = None
    overrides: tuple[str, ...] = ()
    heads: int | None = None
    from_official: bool = False

    @cached_property
    def lines(self) -> tuple[str, ...]:
        """All settings of `config` and `overrides` as `section.key=value`."""
        if self.config is not None:
            load_config(self.config, self.overrides)  # reports mistakes, with the name of the file
        tree = read_yaml(Path(self.config)) if self.config is not None else {}
        lines = [f"{key}={yaml_line(value)}" for key, value in (tree or {}).items() if value is not None]
        return tuple(line for given in (*lines, *self.overrides) for line in _flat(given))

    @property
    def keys(self) -> set[str]:
        return {line.partition("=")[0] for line in self.lines}


def _flat(override: str) -> list[str]:
    """`objective=flow` and `objective={name: flow}` as `objective.name=flow`; others unchanged."""
    section, _, text = override.partition("=")
    if section not in SECTIONS:
        return [override]
    try:
        value = parse_yaml(text)
    except ValueError:
        return [override]
    value = {"name": value} if isinstance(value, str) else value
    return [f"{section}.{k}={yaml_line(v)}" for k, v in value.items()] if isinstance(value, dict) else [override]


def read_tree(path: Path) -> dict[str, Any]:
    """A config that fastdit stored, as plain values; ValueError if it is damaged."""
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is damaged: it contains a {type(tree).__name__}")
    return tree


def own_config(tree: dict[str, Any], where: str | Path, stated: Stated) -> Config:
    """The config that fastdit itself stored with the weights, with overrides; ValueError if they contradict it."""
    if stated.config:
        raise ValueError(f"{where} has its own config; leave out --config, and use section.key=value")
    config, own = config_from(tree, where, stated.overrides), config_from(tree, where)
    heads = variant_shape(own.model.variant)["num_heads"]
    if stated.heads not in (None, heads):
        raise ValueError(f"--heads={stated.heads}, but {where} says {heads}; omit it")
    for key in dataclasses.fields(config.model):
        if key.name not in MAY_CHANGE:
            _agree(f"model.{key.name}", getattr(config.model, key.name), getattr(own.model, key.name), where)
    _agree("model.variant", variant_shape(config.model.variant), variant_shape(own.model.variant), where)
    for key in ("num_classes", "image_size"):
        _agree(f"data.{key}", getattr(config.data, key), getattr(own.data, key), where)
    _agree("objective.name", config.objective.name, own.objective.name, where)
    ours = vars(build_objective(own))
    for key, value in vars(build_objective(config)).items():
        if not key.startswith("sample_"):  # the times of samples are the user's choice
            _agree(f"objective.{key}", value, ours[key], where)
    return config


def _agree(key: str, given: Any, own: Any, where: str | Path) -> None:
    if given != own:
        raise ValueError(f"{key}={given!r}, but {where} was trained with {own!r}; omit it")


def foreign_config(
    state: dict[str, Tensor], where: Path, said: dict[str, Any], stated: Stated, say
) -> tuple[Config, LatentSpec]:
    """The config and latents of weights that fastdit did not write, from `said`, `stated` and the tensor shapes."""
    load_config(shipped_config("dit_xl_2"), stated.lines)  # reports mistakes in the command line first
    config = _merged(where, said, stated)
    name = config.objective.name
    own = variant_shape(config.model.variant) if "model.variant" in stated.keys | said.keys() else None
    heads = said.get("heads", own["num_heads"] if "model.variant" in said else stated.heads)
    if own and heads is None:
        heads = own["num_heads"]
    if stated.heads not in (None, heads):
        raise ValueError(f"--heads={stated.heads}, but {where} says {heads}; omit it")
    classes = said.get("data.num_classes", config.data.num_classes if "data.num_classes" in stated.keys else None)
    sizes = variant_shape(architecture(state, where, heads=1, num_classes=classes).variant)  # all but the heads
    if own and own != sizes | {"num_heads": heads}:
        found = "DiT-{depth}x{hidden_size}x{num_heads}/{patch_size}".format(
            **sizes | {"num_heads": stated.heads or HEADS.get(sizes["hidden_size"], "?")}
        )
        raise ValueError(f"model.variant={config.model.variant}, but {where} contains {found}; omit it, or use its own")
    if heads is None and sizes["hidden_size"] in HEADS:
        say(f"{where} does not state its attention heads; {HEADS[sizes['hidden_size']]}, as in every released DiT of "
            "this size, unless you pass --heads")  # fmt: skip
    shape = architecture(state, where, heads=heads, num_classes=classes)

    latents = assumed_latents(config.data.vae, shape)
    if config.data.image_size != latents.image_size and {"data.image_size"} & (stated.keys | said.keys()):
        raise ValueError(
            f"data.image_size={config.data.image_size}, but the latents of {where} have side {shape.input_size}, which "
            f"means {latents.image_size} px images; omit it, or name the autoencoder with data.vae=FOLDER"
        )
    needs = build_objective(config).out_channels(shape.in_channels)
    if needs > shape.in_channels * (1 + shape.learn_sigma):
        raise ValueError(
            f"{where} has {shape.in_channels} output channels, but objective={name} with learned variance needs "
            f"{needs}; add objective.variance=fixed_small objective.loss_type=mse, or objective=flow"
        )
    if not shape.null_row and config.sampling.cfg_scale != 1:
        config = replace(config, sampling=replace(config.sampling, cfg_scale=1.0))
        say(f"{where} has no null label: sampling.cfg_scale=1")
    model = replace(
        config.model,
        variant=shape.variant,
        class_dropout=(config.model.class_dropout or 0.1) if shape.null_row else 0.0,
        learn_sigma=True if shape.learn_sigma and needs == shape.in_channels else None,
    )
    data = replace(config.data, shards="", image_size=latents.image_size, num_classes=shape.num_classes)
    return replace(config, data=data, model=model), latents


def _merged(where: Path, said: dict[str, Any], stated: Stated) -> Config:
    """The shipped config of the objective with `stated` and `said`; ValueError where they contradict each other."""
    named = config_from({}, where, stated.lines).objective.name if "objective.name" in stated.keys else None
    name = said.get("objective.name", named)
    if named not in (None, name):
        raise ValueError(f"objective.name={named!r}, but {where} was trained with {name}; omit it")
    if name is None:
        raise ValueError(
            f"the weights of {where} do not show the objective, because DiT and SiT have the same shapes; "
            "add objective=ddpm (DiT) or objective=flow (SiT)"
        )
    lookup(OBJECTIVES, name, "objective.name")
    tree = to_tree(assumed(load_config(shipped_config("sit_xl_2" if name == "flow" else "dit_xl_2"))))
    unsaid = {"heads"} | ({"data.vae"} & stated.keys)  # the autoencoder may lie elsewhere by now
    hints = [f"{key}={yaml_line(value)}" for key, value in said.items() if key not in unsaid]
    hints.append(f"objective.name={name}")
    config = config_from(tree, where, [*stated.lines, *hints])
    given = config_from(tree, where, [*hints, *stated.lines])
    ours, theirs = build_objective(config), build_objective(given)
    for key in sorted(said.keys() & stated.keys - unsaid):
        section, _, option = key.partition(".")
        if section == "objective" and option != "name":
            _agree(key, getattr(theirs, option), getattr(ours, option), where)
        elif section in ("model", "data") and key != "model.variant":
            _agree(key, getattr(getattr(given, section), option), getattr(getattr(config, section), option), where)
    if "model.variant" in stated.keys & said.keys():
        _agree("model.variant", variant_shape(given.model.variant), variant_shape(config.model.variant), where)
    return config


def assumed_latents(vae: str, shape: Architecture) -> LatentSpec:
    """The latents of a foreign network: those of `vae` if it is local or NO_VAE, else Stable Diffusion's."""
    codec = LatentCodec.load(vae) if vae == NO_VAE or Path(vae).is_dir() else None
    channels, downsample = (4, SD_DOWNSAMPLE) if codec is None else (codec.channels, codec.downsample)
    if channels != shape.in_channels:
        raise ValueError(
            f"data.vae={vae} has {channels} latent channels, but the network has {shape.in_channels}; "
            "use the folder of the autoencoder it was trained with, data.vae=FOLDER"
        )
    size = shape.input_size
    if codec is not None:
        return codec.spec(size * downsample)
    return LatentSpec((channels, size, size), SD_SCALE, 0.0, vae, codec="", image_size=size * downsample)
