"""Write and read diffusers DiTPipeline folders."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.config import Config, to_tree
from fastdit.convert.diffusers import (
    from_diffusers,
    make_exact,
    objective_of,
    options_of,
    scheduler_of,
    to_diffusers,
    to_pipeline_clock,
    transformer_config,
)
from fastdit.data.latents import LatentCodec
from fastdit.diffusion.objectives import FlowMatching
from fastdit.models.layers import position_embedding

CLOSE = 1e-4  # tolerance relative to the largest output: fp32 rounding in another order of operations
SHIFT_LINES = """for block in pipe.transformer.transformer_blocks:
    block.norm1.emb.time_proj.downscale_freq_shift = 0"""


def write_pipeline(loaded, folder: Path, out: Path, weights: str) -> list[str]:
    """Write transformer/, scheduler/, vae/ (if it is a local folder), model_index.json and README.md into `folder`.

    `loaded` is a command.Loaded. Loads the transformer back, compares outputs, and returns the lines to print.
    """
    import diffusers

    config, latents, objective, shape = loaded.config, loaded.latents, loaded.objective, loaded.architecture()
    scheduler, state = scheduler_of(objective), getattr(loaded, weights)
    if latents.shift:
        raise ValueError(f"shift={latents.shift} is not supported by DiTPipeline; keep the fastdit checkpoint")
    grid = shape.input_size // shape.patch_size
    if not torch.equal(state["pos_embed"][0], position_embedding(shape.hidden_size, grid, grid)):
        raise ValueError("pos_embed is not the fixed table of DiTTransformer2DModel; keep the fastdit checkpoint")
    if isinstance(objective, FlowMatching):
        state = to_pipeline_clock(state)
    transformer = diffusers.DiTTransformer2DModel(**transformer_config(shape, to_tree(config.model)))
    transformer.load_state_dict(to_diffusers(state, shape))
    transformer.save_pretrained(folder / "transformer")
    scheduler.save_pretrained(folder / "scheduler")
    local = Path(config.data.vae).is_dir()
    if local:
        codec = LatentCodec.load(config.data.vae)
        latents.check(codec.spec(latents.image_size, latents.shape), "the checkpoint", f"data.vae={config.data.vae}")
        codec.vae.save_pretrained(folder / "vae")
    index = {"_class_name": "DiTPipeline", "_diffusers_version": diffusers.__version__}
    index |= {"transformer": ["diffusers", "DiTTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    if loaded.class_names:
        index["id2label"] = {str(label): name for label, name in enumerate(loaded.class_names)}
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))

    report = compare(diffusers.DiTTransformer2DModel.from_pretrained(folder / "transformer"), loaded, weights)
    assert report.exact < CLOSE * report.largest, report
    lines = notes(loaded, out, report, local)
    (folder / "README.md").write_text("\n".join(lines) + "\n")
    return lines[2:]


@dataclass(frozen=True)
class Difference:
    """Largest absolute differences between the outputs of diffusers and fastdit on random input."""

    exact: float  # after `make_exact` (DDPM only)
    as_loaded: float
    largest: float  # absolute output
    outputs: Tensor  # of the exact transformer, with the sign of fastdit


@torch.no_grad()
def compare(transformer: nn.Module, loaded, weights: str = "ema") -> Difference:
    """Run both networks on `loaded.random_input()`; calls `make_exact` on the transformer for DDPM."""
    x, times, y = loaded.random_input()
    table = transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table
    labels = torch.where(y == loaded.config.data.num_classes, table.num_embeddings - 1, y)
    flow = isinstance(loaded.objective, FlowMatching)
    timestep = times.float() if flow else loaded.objective.model_time(times)

    def run() -> Tensor:
        out = transformer.eval()(x, timestep=timestep, class_labels=labels).sample
        return -out if flow else out

    ours = loaded.network(weights)(x, loaded.objective.model_time(times), y)
    exact = as_loaded = run()
    if not flow:
        make_exact(transformer)
        exact = run()
    gaps = [(ours - theirs).abs().max().item() for theirs in (exact, as_loaded)]
    return Difference(*gaps, ours.abs().max().item(), exact)


def notes(loaded, out: Path, report: Difference, local_vae: bool) -> list[str]:
    """The README.md of an exported folder: how to load it, what to set, and how DiTPipeline differs."""
    config = loaded.config
    flow = isinstance(loaded.objective, FlowMatching)
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
    return lines


@dataclass(frozen=True)
class Pipeline:
    """The contents of a DiTPipeline folder: `state` with the official names, `said` for command.configure."""

    transformer: nn.Module
    state: dict[str, Tensor]
    said: dict[str, Any]
    step: int
    class_names: tuple[str, ...] = ()

    def weights(self, config: Config) -> dict[str, Tensor]:
        """The state dict for the time convention of the objective."""
        return to_pipeline_clock(self.state, back=True) if config.objective.name == "flow" else self.state

    def forward(self, loaded, say: Callable[[str], None]) -> dict[str, Tensor]:
        """Reference input x, t, y and output out of the transformer; reports the difference from fastdit."""
        report = compare(self.transformer, loaded)
        say(f"largest output difference from fastdit on random input: {report.exact:.1e} of {report.largest:.2g}")
        if report.as_loaded > CLOSE * report.largest:
            say(
                f"with frequency shift 1, as in diffusers, the difference is {report.as_loaded:.2g}; fastdit is wrong "
                "if the network was trained in diffusers, diffusers is wrong if it was converted from DiT"
            )
        x, times, y = loaded.random_input()
        return {"x": x, "t": loaded.objective.model_time(times), "y": y, "out": report.outputs}


def read_pipeline(folder: Path, num_classes: int | None = None, null_row: bool = True) -> Pipeline:
    """Read a DiTPipeline folder; ValueError if it has no DiT. `num_classes`, `null_row`: see `from_diffusers`."""
    from diffusers import DiTTransformer2DModel

    path = folder / "transformer"
    try:
        kind = json.loads((path / "config.json").read_text())
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is not a complete DiTPipeline folder: {error.filename} is missing") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder} is damaged: {error}") from error
    if kind.get("_class_name") not in ("DiTTransformer2DModel", "Transformer2DModel"):
        raise ValueError(f"{path} contains a {kind.get('_class_name')}, not a DiTTransformer2DModel")
    model = options_of(kind, path)
    try:
        transformer, loading = DiTTransformer2DModel.from_pretrained(path, output_loading_info=True)
    except Exception as error:  # files, pickles, safetensors and configs have no common exception
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {reason}") from error
    if loading["missing_keys"]:  # diffusers leaves them at random values
        missing = sorted(loading["missing_keys"])
        raise ValueError(f"{path} lacks {len(missing)} weights, {missing[0]} first; save the pipeline again")
    state = from_diffusers(transformer, num_classes, null_row)
    said: dict[str, Any] = {"model": model} | ({"num_classes": num_classes} if num_classes is not None else {})
    learn_sigma = transformer.out_channels == 2 * transformer.config.in_channels
    objective = objective_of(scheduler, learn_sigma)
    if objective is not None:
        default = type(objective)()
        options = {key: value for key, value in to_tree(objective).items() if value != getattr(default, key)}
        said["objective"] = {"name": "flow" if isinstance(objective, FlowMatching) else "ddpm", **options}
    if (folder / "vae" / "config.json").is_file():
        said["vae"] = str(folder)
    facts = json.loads((folder / "fastdit.json").read_text()) if (folder / "fastdit.json").is_file() else {}
    index = json.loads((folder / "model_index.json").read_text()) if (folder / "model_index.json").is_file() else {}
    names = index.get("id2label") or {}
    names = tuple(names[str(label)] for label in range(len(names))) if len(names) == num_classes else ()
    return Pipeline(transformer, state, said, facts.get("step", 0), names)
