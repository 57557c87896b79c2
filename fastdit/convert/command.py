"""`fastdit convert`: between official DiT and SiT files, diffusers DiTPipeline folders, and fastdit checkpoints.

Weights are copied bit for bit. The one exception is a flow checkpoint in diffusers format, whose first time layer takes
another time (convert/diffusers.py). What a format cannot store comes from the command line, or from fastdit.yaml and
fastdit.json in an exported folder.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from fastdit.build import build_objective
from fastdit.config import Config, ModelConfig, load_config, save_config, shipped_config, to_tree
from fastdit.convert.diffusers import SLOTS
from fastdit.convert.official import Architecture, architecture, args_of_official, read_released, write_official
from fastdit.convert.pipeline import read_pipeline, write_pipeline
from fastdit.data.latents import LatentCodec, LatentSpec
from fastdit.diffusion.objectives import OBJECTIVES, Objective
from fastdit.models.dit import DiT, variant_shape
from fastdit.registry import lookup
from fastdit.training import checkpoint
from fastdit.training.state import CONFIG, GOLDEN, describe, latents_of, network_from_state, read_weights, write_weights

SD_SCALE, SD_DOWNSAMPLE = 0.18215, 8  # the Stable Diffusion autoencoder, used by the released DiT and SiT
FREE = {"variant", "class_dropout", "attention", "learn_sigma", "dropout"}  # options that all formats support


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory, with the official names; `golden` holds reference outputs of another implementation."""

    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    config: Config
    latents: LatentSpec
    step: int = 0
    golden: dict[str, Tensor] | None = None
    class_names: tuple[str, ...] = ()

    @property
    def objective(self) -> Objective:
        return build_objective(self.config)

    def network(self, weights: str = "ema") -> DiT:
        """The network with these weights, in eval mode; ValueError if they do not fit the config."""
        config = replace(self.config, model=replace(self.config.model, attention="sdpa"))  # runs everywhere
        state = getattr(self, weights)
        return network_from_state(config, self.latents, self.objective, state, where="the source")

    def random_input(self) -> tuple[Tensor, Tensor, Tensor]:
        """Deterministic x (3, C, h, w), times from clean to noise (3,), and labels: first, last and null label."""
        x = torch.randn(3, *self.latents.shape, generator=torch.Generator().manual_seed(0))
        classes = self.config.data.num_classes
        null = classes if self.config.model.class_dropout > 0 else 0
        return x, torch.tensor([0.001, 0.5, 1.0], dtype=torch.float64), torch.tensor([0, max(classes - 1, 0), null])

    @torch.no_grad()
    def forward(self) -> dict[str, Tensor]:
        """`random_input` as x, t, y, and the output of the EMA network as out."""
        x, times, y = self.random_input()
        t = self.objective.model_time(times)
        return {"x": x, "t": t, "y": y, "out": self.network()(x, t, y)}

    def architecture(self) -> Architecture:
        """The sizes of the network; ValueError for latents that are not square, which no other format supports."""
        _, height, width = self.latents.shape
        if height != width:
            raise ValueError(f"latents of {height} x {width} are not square; keep the fastdit checkpoint")
        heads, num_classes = variant_shape(self.config.model.variant)["num_heads"], self.config.data.num_classes
        return architecture(self.ema, "the checkpoint", heads=heads, num_classes=num_classes)


def convert(
    src: str | Path,
    to: str,
    out: str | Path,
    *,
    config: str | Path | None = None,
    overrides: Iterable[str] = (),
    heads: int | None = None,
    weights: str = "ema",
    say: Callable[[str], None] = print,
) -> Path:
    """Read `src` (a .pt file, a DiTPipeline folder, a run or checkpoint) and write `out` in the format `to`.

    `config` and `overrides` set what the source does not store, such as the objective and the autoencoder. `weights`
    (ema or model) is what a diffusers folder stores, which has only one set. On ValueError `out` does not exist.
    """
    src, out = Path(src), Path(out)
    write = lookup(WRITERS, to, "--to")
    if out.exists():
        raise ValueError(f"--out {out} exists; choose another name")
    if not src.exists():
        raise ValueError(f"{src} does not exist; name a .pt file, a DiTPipeline folder, or a fastdit checkpoint")
    stated = Stated(config, tuple(overrides), heads)
    if src.is_file():
        loaded = read_official(src, stated, say)
    elif (src / "model_index.json").is_file() or (src / "transformer" / "config.json").is_file():
        loaded = read_diffusers(src, stated, say)
    else:
        loaded = read_fastdit(src, stated)
    config = loaded.config
    say(
        f"{src}: {config.model.variant}, {config.data.num_classes} classes"
        f"{'' if config.model.class_dropout else ' without a null label'}, objective {config.objective.name}, "
        f"latents {'x'.join(map(str, loaded.latents.shape))}, scale {loaded.latents.scale:g}"
    )
    loaded.network("model"), loaded.network("ema")  # fail before anything is written if the weights do not fit
    out.parent.mkdir(parents=True, exist_ok=True)
    write(loaded, out, weights, say)
    say(f"{out}: written")
    return out


@dataclass(frozen=True)
class Stated:
    """What the command line says about the source."""

    config: str | Path | None
    overrides: tuple[str, ...]
    heads: int | None

    @cached_property
    def given(self) -> Config:
        return load_config(self.config or shipped_config("dit_xl_2"), self.overrides)

    @property
    def keys(self) -> set[str]:
        """The dotted keys that are set, and their sections."""
        tree = yaml.safe_load(Path(self.config).read_text()) if self.config else {}
        keys = {override.partition("=")[0] for override in self.overrides}
        for section, values in (tree or {}).items():
            keys |= {section} | ({f"{section}.{key}" for key in values} if isinstance(values, dict) else set())
        return keys


def configure(
    state: dict[str, Tensor], where: Path, said: dict[str, Any], stated: Stated, say
) -> tuple[Config, LatentSpec]:
    """The config and latents of weights that fastdit did not write.

    `said`: what the source contains (`objective` {name, ...}, `vae`, `num_classes`, `model`); `stated` overrides it.
    """
    given, keys = stated.given, stated.keys  # reports mistakes in the command line first
    name = said.get("objective", {}).get("name")
    if {"objective", "objective.name"} & keys:
        if name not in (None, given.objective.name):
            raise ValueError(f"objective.name={given.objective.name!r}, but {where} was trained with {name}; omit it")
        name = given.objective.name
        said = {key: value for key, value in said.items() if key != "objective"}
    if name is None:
        raise ValueError(
            f"the weights of {where} do not show the objective, because DiT and SiT have the same shapes; "
            "add objective=ddpm (DiT) or objective=flow (SiT)"
        )
    lookup(OBJECTIVES, name, "objective.name")
    hints = [f"objective.{key}={value}" for key, value in said.get("objective", {"name": name}).items()]
    hints += [f"model.{key}={value}" for key, value in said.get("model", {}).items()]
    hints += [f"data.vae={said['vae']}"] if "vae" in said and "data.vae" not in keys else []
    base = stated.config or shipped_config("sit_xl_2" if name == "flow" else "dit_xl_2")
    config = load_config(base, [*hints, *stated.overrides])

    own = variant_shape(config.model.variant) if "model.variant" in keys else None
    hidden = state["x_embedder.proj.weight"].shape[0] if "x_embedder.proj.weight" in state else None
    shape = architecture(
        state,
        where,
        heads=own["num_heads"] if stated.heads is None and own and own["hidden_size"] == hidden else stated.heads,
        num_classes=config.data.num_classes if "data.num_classes" in keys else said.get("num_classes"),
    )
    if own and own != variant_shape(shape.variant):
        raise ValueError(f"model.variant={config.model.variant}, but {where} contains {shape.variant}; omit it")
    latents = assumed_latents(config.data.vae, shape)
    if "data.image_size" in keys and config.data.image_size != latents.image_size:
        raise ValueError(
            f"data.image_size={config.data.image_size}, but the latents of {where} have side {shape.input_size}, "
            f"which means {latents.image_size} px images; omit it"
        )
    objective = build_objective(config)
    needs = objective.out_channels(shape.in_channels)
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


def assumed_latents(vae: str, shape: Architecture) -> LatentSpec:
    """The latents of a foreign network: those of `vae` if it is a local folder, else those of Stable Diffusion."""
    codec = LatentCodec.load(vae) if Path(vae).is_dir() else None
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


def read_official(path: Path, stated: Stated, say) -> Loaded:
    released = read_released(path)
    for note in released.notes:
        say(note)
    config, latents = configure(released.ema, path, args_of_official(released.args), stated, say)
    step = int(path.stem) if path.stem.isdigit() else 0  # the official scripts name their files 0400000.pt
    return Loaded(released.model, released.ema, config, latents, step)


def read_fastdit(path: Path, stated: Stated) -> Loaded:
    if stated.config or stated.heads:
        raise ValueError(f"{path} has its own config; leave out --config and --heads, and use section.key=value")
    folder = checkpoint.find(path)
    meta = checkpoint.read_meta(folder, contents=[CONFIG, "model.safetensors", "ema.safetensors"])
    config = load_config(folder / CONFIG, stated.overrides)
    model, ema = (read_weights(folder / f"{name}.safetensors") for name in ("model", "ema"))
    names = tuple(meta.get("class_names", ()))
    return Loaded(model, ema, config, latents_of(meta), meta["step"], class_names=names)


def read_diffusers(folder: Path, stated: Stated, say) -> Loaded:
    if stated.config is None and (folder / "fastdit.yaml").is_file():  # exported by fastdit, so it is complete
        stated = replace(stated, config=folder / "fastdit.yaml")
    given, keys = stated.given, stated.keys
    num_classes = given.data.num_classes if "data.num_classes" in keys else None
    null_row = "model.class_dropout" not in keys or given.model.class_dropout > 0
    pipeline = read_pipeline(folder, num_classes, null_row)
    if (folder / "vae").is_dir() and not any(o.startswith("data.vae=") for o in stated.overrides):
        stated = replace(stated, overrides=(*stated.overrides, f"data.vae={folder}"))
    config, latents = configure(pipeline.state, folder, pipeline.said, stated, say)
    state = pipeline.weights(config)
    loaded = Loaded(state, state, config, latents, pipeline.step, class_names=pipeline.class_names)
    return replace(loaded, golden=pipeline.forward(loaded, say))


def read_initial(source: str, config: Config, say: Callable[[str], None] = print) -> tuple[dict, dict]:
    """Weights and their EMA (the same where there is one set) under the official names, for training.init_from.

    `config`: that of the run which starts from them; it decides the time convention of a diffusers folder.
    """
    path = Path(source)
    if not path.exists():
        raise ValueError(f"training.init_from={source} does not exist; name a run, checkpoint, .pt file or folder")
    if path.is_file():
        released = read_released(path)
        for note in released.notes:
            say(note)
        return released.model, released.ema
    if (path / "model_index.json").is_file() or (path / "transformer" / "config.json").is_file():
        ours = path / "fastdit.yaml"
        state = read_pipeline(path, load_config(ours).data.num_classes if ours.is_file() else None).weights(config)
        return state, state
    loaded = read_fastdit(path, Stated(None, (), None))
    if loaded.config.objective != config.objective:
        theirs, ours = to_tree(loaded.config.objective), to_tree(config.objective)
        say(f"training.init_from={source} was trained with objective={theirs}, this run trains {ours}")
    return loaded.model, loaded.ema


def write_fastdit(loaded: Loaded, out: Path, weights: str, say) -> None:
    """Write a checkpoint folder for sampling, with a recorded forward pass for `fastdit verify`."""
    config = replace(loaded.config, run_dir=str(out))
    with _new_folder(out) as partial:
        for name in ("model", "ema"):
            write_weights(getattr(loaded, name), partial / f"{name}.safetensors")
        save_config(config, partial / CONFIG)
        np.savez(partial / GOLDEN, **(loaded.golden or loaded.forward()))
        meta = describe(config, loaded.latents, loaded.class_names)
        checkpoint.commit(partial, out, {"step": loaded.step, **meta})


def write_official_file(loaded: Loaded, out: Path, weights: str, say) -> None:
    refuse_options(loaded.config.model, "the official DiT", {})
    loaded.architecture()
    if not loaded.config.data.num_classes:
        raise ValueError("data.num_classes=0, but the official DiT always has labels; keep the fastdit checkpoint")
    args = {"model": loaded.config.model.variant, "image_size": loaded.latents.image_size}
    write_official(out, loaded.model, loaded.ema, args | {"num_classes": loaded.config.data.num_classes})


def write_diffusers(loaded: Loaded, out: Path, weights: str, say) -> None:
    refuse_options(loaded.config.model, "DiTTransformer2DModel", SLOTS)
    with _new_folder(out) as partial:
        lines = write_pipeline(loaded, partial, out, weights)
        save_config(loaded.config, partial / "fastdit.yaml")
        facts = {"latents": asdict(loaded.latents), "step": loaded.step, "weights": weights}
        (partial / "fastdit.json").write_text(json.dumps(facts, indent=1))
        partial.rename(out)
    for line in lines:
        say(line)


def refuse_options(model: ModelConfig, where: str, slots: dict[str, tuple[str, dict]]) -> None:
    """Raise ValueError for the first network option that a format cannot store."""
    default = ModelConfig()
    for option in dataclasses.fields(model):
        value = getattr(model, option.name)
        stored = value == getattr(default, option.name) or value in slots.get(option.name, ("", {}))[1]
        if option.name not in FREE and not stored:
            raise ValueError(f"model.{option.name}={value!r} is not supported by {where}; keep the fastdit checkpoint")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder, to be filled and renamed to `out`; removed on failure."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


WRITERS = {"fastdit": write_fastdit, "official": write_official_file, "diffusers": write_diffusers}
