"""Write and read diffusers DiTPipeline folders."""

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.build import build_objective
from fastdit.config import config_from, save_config, to_tree
from fastdit.convert import scheduler as schedulers
from fastdit.convert.diffusers import (
    NORM_EPS,
    TRANSFORMER,
    from_diffusers,
    make_exact,
    options_of,
    to_diffusers,
    to_pipeline_clock,
    transformer_config,
)
from fastdit.convert.loaded import CLOSE, Difference, Loaded, from_facts
from fastdit.convert.settings import Stated, checked, foreign_config, own_config, read_tree
from fastdit.data.latents import LatentCodec
from fastdit.diffusion.objectives import FlowMatching
from fastdit.errors import counted
from fastdit.files import read_json
from fastdit.models.dit import MAX_DEPTH, variant_shape
from fastdit.models.layers import position_embedding
from fastdit.schema import Config

SHIFT_LINES = """for block in pipe.transformer.transformer_blocks:
    block.norm1.emb.time_proj.downscale_freq_shift = 0"""
# settings of fastdit's sampler that DiTPipeline does not have -> the value that it stands for
NOT_IN_PIPELINE = {"cfg_interval": (0.0, 1.0), "cfg_rescale": 0.0, "weak_checkpoint": "", "route": 0.0, "clip": "none"}


def write_pipeline(loaded: Loaded, folder: Path, weights: str) -> None:
    """Write transformer/, scheduler/, vae/ (if it is a local folder), model_index.json, and fastdit's own fastdit.yaml
    and fastdit.json into the new `folder`; ValueError for what a DiTPipeline cannot do."""
    import diffusers

    config, latents, objective, shape = loaded.config, loaded.latents, loaded.objective, loaded.architecture()
    scheduler, state = schedulers.scheduler_of(objective), getattr(loaded, weights)
    if latents.shift or isinstance(latents.scale, tuple):
        raise ValueError(f"scale={latents.scaling}, shift={latents.shift} is not supported by DiTPipeline; keep the "
                         "fastdit checkpoint")  # fmt: skip
    grid = shape.input_size // shape.patch_size
    if not torch.equal(state["pos_embed"][0], position_embedding(shape.hidden_size, grid, grid)):
        raise ValueError("pos_embed is not the fixed table of DiTTransformer2DModel; keep the fastdit checkpoint")
    if isinstance(objective, FlowMatching):
        state = to_pipeline_clock(state)
    transformer = diffusers.DiTTransformer2DModel(**transformer_config(shape, to_tree(config.model)))
    transformer.load_state_dict(to_diffusers(state, shape))
    transformer.save_pretrained(folder / "transformer")
    scheduler.save_pretrained(folder / "scheduler")
    if latents.are_pixels or Path(config.data.vae).is_dir():
        codec = LatentCodec.load(config.data.vae)
        latents.check(codec.spec(latents.image_size, latents.shape), "the checkpoint", f"data.vae={config.data.vae}")
        if (kind := type(codec.vae).__name__) != "AutoencoderKL":
            raise ValueError(f"data.vae={config.data.vae} is of class {kind}, not the AutoencoderKL of a DiTPipeline; "
                             "keep the fastdit checkpoint")  # fmt: skip
        codec.vae.save_pretrained(folder / "vae")
    index = {"_class_name": "DiTPipeline", "_diffusers_version": diffusers.__version__}
    index |= {"transformer": ["diffusers", "DiTTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    if loaded.class_names:
        index["id2label"] = {str(label): name for label, name in enumerate(loaded.class_names)}
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))
    save_config(config, folder / "fastdit.yaml")
    (folder / "fastdit.json").write_text(json.dumps({**loaded.facts(), "weights": weights}, indent=1))


@torch.no_grad()
def compare(transformer: nn.Module, loaded: Loaded) -> Difference:
    """Run both networks on `loaded.random_input()`; calls `make_exact` on the transformer for DDPM."""
    x, times, y = loaded.random_input()
    table = transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table
    labels = torch.where(y == loaded.config.data.num_classes, table.num_embeddings - 1, y)
    flow = isinstance(loaded.objective, FlowMatching)
    timestep = times.float() if flow else loaded.objective.model_time(times)

    def run() -> Tensor:
        out = transformer.eval()(x, timestep=timestep, class_labels=labels).sample
        return -out if flow else out

    ours = loaded.network()(x, loaded.objective.model_time(times), y)
    exact = as_loaded = run()
    if not flow:
        make_exact(transformer)
        exact = run()
    gaps = [(ours - theirs).abs().max().item() for theirs in (exact, as_loaded)]
    return Difference(*gaps, ours.abs().max().item(), exact)


def write_readme(loaded: Loaded, written: Loaded, folder: Path, out: Path) -> list[str]:
    """Write the README.md of an exported folder: how to load it, what to set, and how DiTPipeline differs.

    `written`: what was read back from `folder`, which will be `out`. Returns the lines to print.
    """
    config, report, flow = loaded.config, written.report, isinstance(loaded.objective, FlowMatching)
    local_vae = (folder / "vae").is_dir()
    vae = "" if local_vae else f', vae=AutoencoderKL.from_pretrained("{config.data.vae}")'
    lines = [f"# {config.model.variant}, exported by fastdit", ""]
    lines += [f"Largest output difference from fastdit on random input: {report.exact:.1e} of {report.largest:.2g}."]
    if not flow:
        lines += [
            "IMPORTANT: diffusers embeds timesteps with frequency shift 1, DiT with 0, and no config key sets it. As "
            f"loaded, the output is off by {report.as_loaded:.2g} of {report.largest:.2g}. Set the shift after loading:"
        ]
    names = "DiTPipeline" if local_vae else "AutoencoderKL, DiTPipeline"
    lines += ["", "```python", f"from diffusers import {names}", f'pipe = DiTPipeline.from_pretrained("{out}"{vae})']
    lines += [] if flow else [SHIFT_LINES]
    lines += ["```", ""]
    if not local_vae:
        lines += [f"The autoencoder {config.data.vae} is not a local folder and was not copied; pass it as above."]
    if not config.model.class_dropout:
        lines += ["The network has no null label; call the pipeline with guidance_scale=1."]
    elif config.sampling.cfg_channels:
        lines += [
            f"DiTPipeline applies guidance to all channels, fastdit only to the first sampling.cfg_channels="
            f"{config.sampling.cfg_channels}, so images differ at equal guidance scales."
        ]
    lines += [
        f"DiTPipeline has no sampling.{key}={getattr(config.sampling, key)}; fastdit.yaml keeps it."
        for key, value in NOT_IN_PIPELINE.items()
        if getattr(config.sampling, key) != value
    ]
    if flow and loaded.objective.sample_eps:
        lines += [f"DiTPipeline samples down to t = 0, without objective.sample_eps={loaded.objective.sample_eps}."]
    (folder / "README.md").write_text("\n".join(lines) + "\n")
    return lines[2:]


@dataclass(frozen=True)
class Pipeline:
    """The contents of a DiTPipeline folder: `state` with the official names, and what its configs say.

    `own`: the config and facts that fastdit stored when it exported the folder, else None.
    """

    folder: Path
    transformer: nn.Module
    state: dict[str, Tensor]
    said: dict[str, Any]
    class_names: tuple[str, ...]
    own: tuple[Config, dict[str, Any]] | None

    def weights(self) -> dict[str, Tensor]:
        """The state dict for the time convention of the objective."""
        flow = self.said["objective.name"] == "flow"
        return to_pipeline_clock(self.state, back=True) if flow else self.state

    def loaded(self, stated: Stated, say: Callable[[str], None]) -> Loaded:
        """The checkpoint, after a comparison of its outputs with those of diffusers; ValueError if they differ."""
        state, folder = self.weights(), self.folder
        if self.own:
            config, facts = self.own
            if "data.vae" in self.said and "data.vae" not in stated.keys:
                config = replace(config, data=replace(config.data, vae=self.said["data.vae"]))
        else:
            config, latents = foreign_config(self.state, folder, self.said, stated, say)
            facts = {"latents": latents, "class_names": self.class_names}
        if "data.vae" in self.said and (self.own or "data.vae" in stated.keys):
            latents, codec = facts["latents"], LatentCodec.load(self.said["data.vae"])
            mine = f"data.vae={config.data.vae}" if "data.vae" in stated.keys else f"{folder}/fastdit.json"
            latents.check(codec.spec(latents.image_size, latents.shape), mine, f"{folder}/vae")
        loaded = Loaded(state, state, config, **facts)
        loaded.check()
        report = compare(self.transformer, loaded)
        if not report.exact <= CLOSE * report.largest:
            raise ValueError(
                f"{folder} is not converted: the outputs of fastdit differ by {report.exact:.1e} of "
                f"{report.largest:.2g}, and no setting in transformer/config.json explains it; please report it"
            )
        if not self.own and not report.as_loaded <= CLOSE * report.largest:
            gap = f"{report.as_loaded:.2g} of {report.largest:.2g}"
            if not stated.from_official:
                raise ValueError(
                    f"{folder} is not converted: diffusers embeds timesteps with frequency shift 1, DiT with 0, which "
                    f"changes the output by {gap}, and no config says with which it was trained; add --from-official "
                    "if its weights were converted from the official DiT; others cannot be converted"
                )
            say(f"converted with frequency shift 0, as in DiT; diffusers itself uses 1, which is off by {gap}")
        say(f"largest output difference from diffusers on random input: {report.exact:.1e} of {report.largest:.2g}")
        return replace(loaded, report=report)


def read_pipeline(folder: Path, stated: Stated) -> Pipeline:
    """Read a DiTPipeline folder; ValueError if it has no DiT, or a setting that fastdit does not understand."""
    import diffusers

    path = folder / "transformer"
    kind, scheduler = _json(path / "config.json"), _json(folder / "scheduler" / "scheduler_config.json")
    index = _json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    if kind.get("_class_name") not in ("DiTTransformer2DModel", "Transformer2DModel"):
        raise ValueError(f"{path} contains a {kind.get('_class_name')}, not a DiTTransformer2DModel")
    settings = checked(kind, TRANSFORMER, getattr(diffusers, kind["_class_name"]), path / "config.json")
    layers = settings["num_layers"]
    if type(layers) is not int or not 1 <= layers <= MAX_DEPTH:
        raise ValueError(f"{path / 'config.json'}: num_layers={layers!r} is out of range; use 1 to {MAX_DEPTH}")
    parts = dict.fromkeys(("transformer", "vae", "scheduler", "id2label"))
    checked(index, parts, diffusers.DiTPipeline, folder / "model_index.json")
    for key, value in (("_class_name", "DiTPipeline"), ("scheduler", ["diffusers", scheduler.get("_class_name")])):
        if index.get(key, value) != value:
            raise ValueError(f"{folder}/model_index.json: {key}={index[key]!r} cannot be converted; expected {value!r}")
    try:
        transformer, loading = diffusers.DiTTransformer2DModel.from_pretrained(path, output_loading_info=True)
    except Exception as error:  # files, pickles, safetensors and configs have no common exception
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {reason}") from error
    if loading["missing_keys"]:  # diffusers leaves them at random values
        missing = sorted(loading["missing_keys"])
        raise ValueError(f"{path} lacks {counted(len(missing), 'weight')}, {missing[0]} first; save the pipeline again")
    if loading["unexpected_keys"]:
        extra = sorted(loading["unexpected_keys"])
        lacked = counted(len(extra), "weight")
        raise ValueError(f"{path} has {lacked} that DiT does not have, {extra[0]} first; it cannot convert")
    for key, value in transformer.config.items():  # the defaults of Transformer2DModel are others
        if key in settings and settings[key] != value:
            raise ValueError(f"{path}/config.json does not state {key}; add it, {settings[key]!r} or {value!r}")

    learn_sigma = transformer.out_channels == 2 * transformer.config.in_channels
    said = options_of(settings)
    said |= schedulers.settings_of(scheduler, learn_sigma, folder / "scheduler/scheduler_config.json")
    if (folder / "vae").is_dir():
        said["data.vae"] = str(folder.resolve())
        check_vae(folder / "vae/config.json")
    names, own = class_names(index, folder), None
    if (folder / "fastdit.yaml").is_file():  # exported by fastdit, so it is complete
        own = _own(folder, said, learn_sigma, stated)
        num_classes, null_row = own[0].data.num_classes, own[0].model.class_dropout > 0
    else:
        given = config_from({}, "the command line", stated.lines)
        null_row = given.model.class_dropout > 0
        num_classes = given.data.num_classes if "data.num_classes" in stated.keys else None
        table = transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight
        if num_classes is None and names and not table[len(names) : -1].any():  # the rows in between are padding
            num_classes = len(names)
        if num_classes is not None:
            said["data.num_classes"] = num_classes
        if len(names) > (len(table) - 1 if num_classes is None else num_classes):
            named = counted(len(names), "class", "classes")
            raise ValueError(f"{folder}/model_index.json: id2label names {named}, more than the network "
                             "has; correct data.num_classes, or remove it")  # fmt: skip
    if settings["norm_eps"] != NORM_EPS and (own or said["objective.name"] == "flow"):
        raise ValueError(f"{path}/config.json: norm_eps={settings['norm_eps']} cannot be converted; DiT has {NORM_EPS}")
    state = from_diffusers(transformer, num_classes, null_row, folder)
    return Pipeline(folder, transformer, state, said, names, own)


def _own(folder: Path, said: dict[str, Any], learn_sigma: bool, stated: Stated) -> tuple[Config, dict[str, Any]]:
    """The config and facts that fastdit exported; ValueError where diffusers' own configs say something else."""
    path = folder / "fastdit.yaml"
    tree = read_tree(path)
    config = own_config(tree, path, stated)
    written = schedulers.scheduler_of(build_objective(config_from(tree, path)))
    wanted = {"heads": variant_shape(config.model.variant)["num_heads"]}
    wanted |= {key: getattr(config.model, key[6:]) for key in said if key.startswith("model.")}
    wanted |= schedulers.settings_of(json.loads(written.to_json_string()), learn_sigma, path)
    for key, value in wanted.items():
        if said.get(key) != value:
            raise ValueError(f"{path} says {key}={value!r}, but the other configs in {folder} say {said.get(key)!r}; "
                             "remove fastdit.yaml if the network was trained on in diffusers")  # fmt: skip
    path = folder / "fastdit.json"
    return config, from_facts(_json(path), str(path))


def class_names(index: dict[str, Any], folder: Path) -> tuple[str, ...]:
    """The names in model_index.json by label, () if there are none; ValueError if a label has no name."""
    names = index.get("id2label") or {}
    if not isinstance(names, dict):
        raise ValueError(f"{folder}/model_index.json: id2label is a {type(names).__name__}, not names by label")
    missing = [label for label in range(len(names)) if not isinstance(names.get(str(label)), str)]
    if missing:
        raise ValueError(f"{folder}/model_index.json: id2label has {len(names)} names, but none for label {missing[0]}")
    return tuple(names[str(label)] for label in range(len(names)))


def check_vae(path: Path) -> None:
    """ValueError for a setting of the autoencoder that DiTPipeline and fastdit treat differently."""
    from diffusers import AutoencoderKL

    config = _json(path)
    checked(config, dict.fromkeys(inspect.signature(AutoencoderKL).parameters), AutoencoderKL, path)
    for key in ("shift_factor", "latents_mean", "latents_std"):
        if config.get(key):
            raise ValueError(f"{path}: {key}={config[key]!r} is ignored by DiTPipeline, but not by fastdit; set it to "
                             "null if the network was trained without it")  # fmt: skip


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent} is not a complete DiTPipeline folder: {path} is missing") from error
