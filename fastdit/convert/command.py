"""`fastdit convert`: between official DiT and SiT files, diffusers DiTPipeline folders, and fastdit checkpoints.

Autoencoders of latent-diffusion are in ldm.py.

Weights are copied bit for bit. The one exception is a flow checkpoint in diffusers format, whose first time layer takes
another time (diffusers.py). Every setting of the source is used, has no effect, or is refused (settings.py). What was
written is read back and compared with the source before it gets its name.
"""

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdit.classes import Classes
from fastdit.config import save_config, to_tree
from fastdit.convert import ldm, official, pipeline
from fastdit.convert.diffusers import SLOTS
from fastdit.convert.loaded import Loaded, differences, from_facts
from fastdit.convert.settings import Stated, foreign_config, own_config, read_tree
from fastdit.data.latents import in_words
from fastdit.diffusion.objectives import FlowMatching
from fastdit.errors import counted
from fastdit.files import staged
from fastdit.models.dit import variant_shape
from fastdit.registry import lookup
from fastdit.schema import Config, ModelConfig
from fastdit.training import checkpoint
from fastdit.training.initial import LABELS, Initial
from fastdit.training.state import AUTOENCODER, CONFIG, GOLDEN, classes_of, describe, latents_of
from fastdit.training.weights import read_weights, write_weights

FREE = {"variant", "class_dropout", "attention", "learn_sigma", "dropout"}  # options that all formats support
SHAPELESS = ("block", "norm", "qk_norm", "mlp", "decoder_blocks")  # options that the shapes of the weights may not show
TIME_LAYER = "t_embedder.mlp.0.weight"


def convert(
    src: str | Path,
    to: str,
    out: str | Path,
    *,
    config: str | Path | None = None,
    overrides: Iterable[str] = (),
    heads: int | None = None,
    from_official: bool = False,
    weights: str | None = None,
    scale: float | None = None,
    shift: float | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Read `src` (a .pt file, a DiTPipeline folder, a run or checkpoint) and write `out` in the format `to`.

    A file with an autoencoder in the format of latent-diffusion becomes a folder of diffusers (ldm.py), with `scale` as
    its scaling_factor and `shift` as its shift_factor.

    `config`, `overrides` and `heads` set what the source does not state, such as the objective and the autoencoder.
    `from_official`: the weights of a diffusers folder come from the official DiT. `weights` (ema or model) is what a
    diffusers folder stores, which has only one set (None: ema; of an autoencoder: model). On ValueError `out` does not
    exist: the source has a setting that fastdit does not understand, the format lacks one of the source's, or what was
    read back differs.
    """
    src, out = Path(src), Path(out)
    write, finish = lookup(WRITERS, to, "--to")
    if out.exists():
        raise ValueError(f"--out {out} exists; choose another name")
    if to != "official" and out.suffix in (".pt", ".safetensors"):
        raise ValueError(f"--out {out}: --to {to} writes a folder; use a name without {out.suffix}")
    if src.is_file() and (found := ldm.find_autoencoder(src)):
        if to != "diffusers":
            raise ValueError(f"{src} is an autoencoder; convert it --to diffusers")
        given = {"--config": config, "--heads": heads, "--from-official": from_official}
        if extra := [*overrides, *(name for name, value in given.items() if value)]:
            raise ValueError(f"{extra[0]} is for a network, and {src} is an autoencoder; leave it out")
        return ldm.convert_autoencoder(src, found, out, scale, shift or 0.0, weights, say)
    for option, value in (("scale", scale), ("shift", shift)):
        if value is not None:
            raise ValueError(f"--{option}={value} is for an autoencoder of latent-diffusion, not for {src}")
    if weights and to != "diffusers":
        raise ValueError(f"--weights={weights} is for --to diffusers; --to {to} keeps both the weights and their EMA")
    weights = weights or "ema"
    loaded = read(src, Stated(config, tuple(overrides), heads, from_official), say)
    config = loaded.config
    say(
        f"{src}: {config.model.variant}, {counted(config.data.num_classes, 'class', 'classes')}"
        f"{'' if config.model.class_dropout else ' without a null label'}, objective {config.objective.name}, "
        f"latents {'x'.join(map(str, loaded.latents.shape))}, scale {loaded.latents.scaling}"
    )
    if loaded.report is None:  # with one, it is checked
        loaded.check()
    with staged(out) as stage:
        write(loaded, stage, out, weights)
        written = read(stage, Stated(), lambda line: None)
        flow = to == "diffusers" and isinstance(loaded.objective, FlowMatching)
        sets = (weights, weights) if to == "diffusers" else ("model", "ema")
        for difference in differences(loaded, written, sets, TIME_LAYER if flow else ""):
            raise ValueError(f"{out} is not written, because it would read back with {difference}; please report it")
        lines = finish(loaded, written, stage, out)
    for line in (*lines, f"{out}: written"):
        say(line)
    return out


def read(src: Path, stated: Stated, say: Callable[[str], None]) -> Loaded:
    """The checkpoint at `src`, in any format."""
    if not src.exists():
        raise ValueError(f"{src} does not exist; name a .pt file, a DiTPipeline folder, or a fastdit checkpoint")
    if src.is_file():
        loaded = read_official(src, stated, say)
    elif is_pipeline(src):
        loaded = pipeline.read_pipeline(src, stated).loaded(stated, say)
    else:
        loaded = read_fastdit(src, stated, say)
    vae = Path(loaded.config.data.vae)
    if not vae.is_dir():
        return loaded
    return replace(loaded, config=replace(loaded.config, data=replace(loaded.config.data, vae=str(vae.resolve()))))


def is_pipeline(folder: Path) -> bool:
    return (folder / "model_index.json").is_file() or (folder / "transformer" / "config.json").is_file()


def read_official(path: Path, stated: Stated, say) -> Loaded:
    released = official.read_released(path)
    for note in released.notes:
        say(note)
    if own := released.args.get("fastdit"):
        where = f"{path}, args.fastdit"
        facts = from_facts(own, where)
        return Loaded(released.model, released.ema, own_config(own.get("config", {}), where, stated), **facts)
    said = official.settings_of(released.args, path, stated.heads, "data.vae" in stated.keys)
    config, latents = foreign_config(released.ema, path, said, stated, say)
    step = int(path.stem) if path.stem.isdigit() else 0  # the official scripts name their files 0400000.pt
    return Loaded(released.model, released.ema, config, latents, step)


def read_fastdit(path: Path, stated: Stated, say: Callable[[str], None]) -> Loaded:
    folder = checkpoint.find(path)
    meta = checkpoint.read_meta(folder, contents=[CONFIG, "model.safetensors", "ema.safetensors"])
    if meta.get("kind") == AUTOENCODER:
        raise ValueError(f"{path} is of an autoencoder: its run's folder vae/ is in the format of diffusers already")
    config = own_config(read_tree(folder / CONFIG), path, stated)
    model, ema = (read_weights(folder / f"{name}.safetensors") for name in ("model", "ema"))
    if (step := meta.get("model_step", meta["step"])) != meta["step"]:  # of `fastdit ema`
        model = ema
        say(f"{folder} has the EMA of step {meta['step']}, but the weights of step {step}; the EMA is used as both")
    known = classes_of(meta, config)
    return Loaded(model, ema, config, latents_of(meta), meta["step"], known.names, None, known.empty,
                  meta.get("features"))  # fmt: skip


def read_initial(source: str, config: Config, say: Callable[[str], None] = print) -> Initial:
    """Weights and their EMA (the same where there is one set), for training.init_from.

    `config`: that of the run which starts from them. ValueError if the source states another number of heads or another
    network option than the run; `say` is called if it was trained with another objective.
    """
    path, stated = Path(source), Stated()
    if not path.exists():
        raise ValueError(f"training.init_from={source} does not exist; name a run, checkpoint, .pt file or folder")
    said: dict[str, Any] = {}
    own, names = None, ()
    if path.is_file():
        released = official.read_released(path)
        for note in released.notes:
            say(note)
        model, ema = released.model, released.ema
        if stored := released.args.get("fastdit"):
            own = own_config(stored.get("config", {}), f"{path}, args.fastdit", stated)
            names = from_facts(stored, f"{path}, args.fastdit")["class_names"]
        else:
            heads = variant_shape(config.model.variant)["num_heads"]
            said = official.settings_of(released.args, path, heads, vae=True)
    elif is_pipeline(path):
        found = pipeline.read_pipeline(path, stated)
        said, own, names = found.said, found.own and found.own[0], found.class_names
        model = ema = found.weights()
        if not own and said["objective.name"] == "ddpm":
            say(f"training.init_from={source}: right for weights that were converted from the official DiT; diffusers "
                "itself embeds timesteps in another way")  # fmt: skip
    else:
        loaded = read_fastdit(path, stated, say)
        own, model, ema, names = loaded.config, loaded.model, loaded.ema, loaded.class_names
    null_row = str(said.get("data.num_classes")) != str(len(model.get(LABELS, ())))
    if own:
        null_row = own.model.class_dropout > 0
        said = {f"model.{key}": getattr(own.model, key) for key in ("variant", *SHAPELESS)}
        said["objective.name"] = own.objective.name
    check_start(source, said, config)
    holds_out = config.data.val_fraction or config.data.val_shards
    if holds_out and not (own and (own.data.shards, own.data.val_fraction) == (config.data.shards,
                                                                               config.data.val_fraction)):  # fmt: skip
        say(f"training.init_from={source}: it may have been trained on images that this run holds out, and the "
            "validation loss would then be too small")  # fmt: skip
    if own and own.data.normalize != config.data.normalize:
        say(f"training.init_from={source} was trained with data.normalize={own.data.normalize}, this run trains "
            f"{config.data.normalize}: it must first learn another scale")  # fmt: skip
    if own and own.objective != config.objective:
        theirs, ours = to_tree(own.objective), to_tree(config.objective)
        say(f"training.init_from={source} was trained with objective={theirs}, this run trains {ours}")
    elif said.get("objective.name", config.objective.name) != config.objective.name:
        name = said["objective.name"]
        say(f"training.init_from={source} was trained with {name}, this run trains {config.objective.name}")
    return Initial(model, ema, names, null_row)


def check_start(source: str, said: dict[str, Any], config: Config) -> None:
    """ValueError where a source of initial weights has settings that the shapes of its weights do not show."""
    heads = variant_shape(said["model.variant"])["num_heads"] if "model.variant" in said else said.get("heads")
    ours = variant_shape(config.model.variant)["num_heads"]
    if heads not in (None, ours):
        raise ValueError(f"training.init_from={source} has {heads} attention heads, model.variant="
                         f"{config.model.variant} has {ours}; use the variant of the source")  # fmt: skip
    for key in SHAPELESS:
        theirs, own = said.get(f"model.{key}"), getattr(config.model, key)
        if theirs not in (None, own):
            raise ValueError(
                f"training.init_from={source} has model.{key}={theirs!r}, this run {own!r}; make them equal"
            )


def write_fastdit(loaded: Loaded, place: Path, out: Path, weights: str = "ema") -> None:
    """Write a checkpoint folder for sampling, with a recorded forward pass for `fastdit verify`."""
    config = replace(loaded.config, run_dir=str(out))
    place.mkdir()
    for name in ("model", "ema"):
        write_weights(getattr(loaded, name), place / f"{name}.safetensors")
    save_config(config, place / CONFIG)
    np.savez(place / GOLDEN, **loaded.forward())
    classes = Classes(config.data.num_classes, loaded.class_names, loaded.empty_classes)
    meta = describe(config, loaded.latents, classes)
    meta |= {"features": loaded.features} if loaded.features else {}
    checkpoint.complete(place, {"step": loaded.step, **meta})


def write_official(loaded: Loaded, place: Path, out: Path, weights: str) -> None:
    """Write {model, ema, args} for the official scripts, which read `ema`; args also holds fastdit's own config."""
    refuse_options(loaded.config.model, "the official DiT", {})
    loaded.architecture()
    if not loaded.config.data.num_classes:
        raise ValueError("data.num_classes=0, but the official DiT always has labels; keep the fastdit checkpoint")
    if out.suffix != ".pt":
        raise ValueError(f"--out {out}: the official format is a PyTorch file; use a name with .pt")
    args, _ = official.args_for(loaded.config, loaded.latents.image_size)
    args["fastdit"] = {"config": to_tree(loaded.config), **loaded.facts()}
    same = all(torch.equal(tensor, loaded.ema[name]) for name, tensor in loaded.model.items())  # then stored once
    torch.save({"model": loaded.ema if same else loaded.model, "ema": loaded.ema, "args": args}, place)


def official_remarks(loaded: Loaded, written: Loaded, place: Path, out: Path) -> list[str]:
    _, call = official.args_for(loaded.config, loaded.latents.image_size)
    lines = [f"IMPORTANT: the official scripts sample with another objective by default; use {call}"] if call else []
    if not loaded.config.model.class_dropout:
        lines.append("IMPORTANT: the network has no null label, which the official scripts expect; build it with "
                     "class_dropout_prob=0 there, and sample with --cfg-scale 1")  # fmt: skip
    vae, latents = loaded.config.data.vae, loaded.latents
    if latents.are_pixels:
        lines.append("IMPORTANT: the official scripts decode with an autoencoder, and this network makes pixels")
    elif not vae.startswith(official.VAES.format("")) or (latents.scale, latents.shift) != (0.18215, 0):
        own = f"scale {latents.scaling} and shift {in_words(latents.shift)}"
        lines.append("IMPORTANT: the official scripts decode with Stable Diffusion's autoencoder, scale 0.18215 and no "
                     f"shift; use {vae} with {own}, where latents are x_0 / scale + shift")  # fmt: skip
    return lines


def write_diffusers(loaded: Loaded, place: Path, out: Path, weights: str) -> None:
    refuse_options(loaded.config.model, "DiTTransformer2DModel", SLOTS)
    place.mkdir()
    pipeline.write_pipeline(loaded, place, weights)


def refuse_options(model: ModelConfig, where: str, slots: dict[str, tuple[str, dict]]) -> None:
    """Raise ValueError for the first network option that a format cannot store."""
    default = ModelConfig()
    for option in fields(model):
        value = getattr(model, option.name)
        stored = value == getattr(default, option.name) or value in slots.get(option.name, ("", {}))[1]
        if option.name not in FREE and not stored:
            raise ValueError(f"model.{option.name}={value!r} is not supported by {where}; keep the fastdit checkpoint")


WRITERS = {
    "fastdit": (write_fastdit, lambda *_: []),
    "official": (write_official, official_remarks),
    "diffusers": (write_diffusers, pipeline.write_readme),
}
