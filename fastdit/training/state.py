"""What a checkpoint holds, written and read side by side.

run_dir/checkpoints/step-0000500/
    config.yaml          the resolved config of the run
    model.safetensors    weights in fp32, under the official names
    ema.safetensors      their exponential moving average, likewise
    ema-00000.pt         one per process that shards the EMA: its part, and the losses since the last log line
    optimizer.pt         AdamW's state (torch engine), or
    deepspeed/           one ZeRO partition per process (DeepSpeed engine)
    times.pt             the loss history of training.loss_aware_times, where that is on
    golden.npz           a recorded forward pass, in converted checkpoints only
    checkpoint.json      step, engine, latents, ... and the size of every file; training/checkpoint.py writes it last

A run is its config, its seed and its step, so this is all that a resume needs.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdit.build import build_network, build_objective
from fastdit.config import Config, load_config, save_config, to_tree
from fastdit.data.latents import LatentSpec
from fastdit.data.manifest import Manifest
from fastdit.diffusion.objectives import Objective
from fastdit.diffusion.timesteps import LossAwareTimes
from fastdit.distributed import Ranks
from fastdit.models.dit import DiT
from fastdit.training import checkpoint
from fastdit.training.ema import EMA
from fastdit.training.engine import Engine
from fastdit.training.log import LossWindow

CONFIG, GOLDEN = "config.yaml", "golden.npz"
LABELS = "y_embedder.embedding_table.weight"
COMPUTED = ("pos_embed", "rope")  # buffers that the network computes for its own number of patches
STARTS_ANEW = (*COMPUTED, LABELS, "final_layer.")  # what a run may have otherwise than its training.init_from
MAY_CHANGE = ("variant", "attention", "class_dropout", "dropout")  # keys of model: that a resume does not compare
MUST_STAY = ("init_from", "ema_stds")  # keys of training: that describe a run from its first step


@dataclass
class TrainingState:
    """Everything of a run that changes from step to step, and the facts that must be the same on resume."""

    config: Config
    manifest: Manifest
    ranks: Ranks
    engine: Engine
    ema: EMA
    window: LossWindow
    times: LossAwareTimes | None

    @property
    def sharded_over(self) -> int:
        """Number of processes that each hold a part of the optimizer's state and of the EMA."""
        return self.ranks.world if self.engine.name == "deepspeed" else 1

    @property
    def meta(self) -> dict[str, Any]:
        """The content of checkpoint.json, except for the step and the list of files."""
        settings = self.config.training
        return describe(
            self.config,
            self.manifest.latents,
            self.manifest.class_names,
            engine=self.engine.name,
            sharded_over=self.sharded_over,
            zero_stage=settings.zero_stage if self.engine.name == "deepspeed" else 0,
        )

    def save(self, folder: Path) -> None:
        """Write this process's files; the main process also writes the full weights and EMA."""
        masters = self.engine.master_parameters()
        whole = {"model": self.engine.full_state(masters), "ema": self.engine.full_state(self.ema.average)}
        kept = self.window.state(None if self.sharded_over > 1 else self.ranks)
        self.engine.save(folder)
        if self.ranks.rank < self.sharded_over:
            torch.save({"average": self.ema.average, **kept}, folder / f"ema-{self.ranks.rank:05d}.pt")
        if self.ranks.is_main:
            for name, state in whole.items():
                write_weights(state, folder / f"{name}.safetensors")
            save_config(self.config, folder / CONFIG)
            if self.times is not None:
                torch.save(self.times.state_dict(), folder / "times.pt")

    def load(self, folder: Path) -> int:
        """Restore what `save` wrote and return its step; ValueError where the two runs' settings are incompatible."""
        meta = checkpoint.read_meta(folder)
        latents_of(meta).check(self.manifest.latents, str(folder), "this run's shards")
        for key, value in self.meta.items():
            if key != "latents" and meta.get(key, value) != value:  # 0.1.0 stored no class names
                raise ValueError(f"{folder} has {key}={meta[key]!r}, this run {value!r}; make them equal to resume")
        before = load_config(folder / CONFIG)
        fixed = [("model", key) for key in vars(self.config.model) if key not in MAY_CHANGE]  # also e.g. the norm
        for section, key in fixed + [("training", key) for key in MUST_STAY]:
            old, new = (to_tree(getattr(getattr(config, section), key)) for config in (before, self.config))
            if old != new:
                raise ValueError(f"{folder} has {section}.{key}={old!r}, this run {new!r}; make them equal to resume")
        self.engine.load(folder, load_file(folder / "model.safetensors"))
        part = folder / f"ema-{self.ranks.rank % self.sharded_over:05d}.pt"
        own = torch.load(part, map_location="cpu", weights_only=True)
        self.ema.load(own["average"])
        self.window.load(own)
        if self.times is not None and (folder / "times.pt").is_file():  # absent if the run did not use them before
            self.times.load_state_dict(torch.load(folder / "times.pt", weights_only=True))
        return meta["step"]


def describe(
    config: Config, latents: LatentSpec, class_names: Iterable[str], *, engine: str, sharded_over: int, zero_stage: int
) -> dict[str, Any]:
    """The facts in checkpoint.json that must match on resume; `engine` is "none" for a converted checkpoint."""
    return {
        "model": config.model.variant,
        "num_classes": config.data.num_classes,
        "objective": config.objective.name,
        "engine": engine,
        "sharded_over": sharded_over,
        "zero_stage": zero_stage,
        "global_batch": config.training.global_batch,
        "seed": config.seed,
        "class_names": list(class_names),
        "latents": {**asdict(latents), "shape": list(latents.shape)},
    }


def latents_of(meta: Mapping[str, Any]) -> LatentSpec:
    """The record of the latents in checkpoint.json; KeyError or TypeError where it has none."""
    stored = meta["latents"]
    return LatentSpec(**{**stored, "shape": tuple(stored["shape"])})


@dataclass(frozen=True)
class Trained:
    """A loaded checkpoint: the network with its weights, in eval mode, with its config, objective and latents."""

    folder: Path
    config: Config
    objective: Objective
    model: DiT
    latents: LatentSpec
    identity: str  # SHA-256 of the file that the weights were read from
    class_names: tuple[str, ...]  # () where they are not known
    step: int
    ema_std: float | None = None  # relative width, where `fastdit ema` rebuilt the EMA


def load_network(
    path: str | Path, weights: str = "ema", *, overrides: Iterable[str] = (), device: torch.device | str = "cpu"
) -> Trained:
    """The checkpoint at `path` (a run folder means its newest), its config changed by `overrides`.

    `weights`: "ema" or "model". ValueError if the checkpoint is incomplete or does not match the config's network.
    """
    folder = checkpoint.find(Path(path))
    meta = checkpoint.read_meta(folder, contents=[CONFIG, f"{weights}.safetensors"])
    config, latents = load_config(folder / CONFIG, overrides), latents_of(meta)
    objective = build_objective(config)
    state = read_weights(folder / f"{weights}.safetensors")
    model = network_from_state(config, latents, objective, state, where=str(folder), device=device)
    entry = meta["files"][f"{weights}.safetensors"]
    identity = entry["sha256"] if isinstance(entry, dict) else checkpoint.sha256(folder / f"{weights}.safetensors")
    names = tuple(meta.get("class_names", ()))
    return Trained(folder, config, objective, model.to(device), latents, identity, names, meta["step"],
                   meta.get("ema_std"))  # fmt: skip


def network_from_state(
    config: Config,
    latents: LatentSpec,
    objective: Objective,
    state: Mapping[str, Tensor],
    *,
    where: str,
    device: torch.device | str = "cpu",
) -> DiT:
    """The config's network with the tensors of `state` (not copied), in eval mode; attention chosen for `device`."""
    with torch.device("meta"):
        model = build_network(config, latents.shape, objective, device)
    wrong = mismatches(model.state_dict(), state)
    if wrong:
        raise ValueError(f"{where} has weights of another network than {config.model.variant}: {wrong[0]} "
                         f"({len(wrong)} differences)")  # fmt: skip
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def take_over(
    own: Mapping[str, Tensor], sources: Iterable[Mapping[str, Tensor]], where: str, null_label: int | None
) -> tuple[list[dict[str, Tensor]], list[str]]:
    """A network's own state dict with the tensors of each source in it, and the names of those that stay its own.

    The label table may differ in its classes (the null label's row is kept, the last one of both), the positions in
    their number, and the final layer in its channels: those start anew. ValueError for any other difference.
    """
    states, kept = [], []
    for source in sources:
        state, kept = {name: tensor.clone() for name, tensor in own.items()}, []
        wrong = [line for line in mismatches(own, source) if not line.startswith(STARTS_ANEW)]
        if wrong:
            raise ValueError(
                f"training.init_from={where} is another network: {wrong[0]} ({len(wrong)} differences); set "
                "model.variant and the options of model: to those of the source"
            )
        for name, tensor in own.items():
            other = source.get(name)
            if other is not None and other.shape == tensor.shape and name not in COMPUTED:
                state[name] = other.to(tensor)
            elif (
                name == LABELS and null_label is not None and other is not None and other.shape[1:] == tensor.shape[1:]
            ):
                state[name][-1] = other[-1].to(tensor)
                kept.append(f"{name} (but for the null label)")
            elif other is None or other.shape != tensor.shape:
                kept.append(name)
        states.append(state)
    return states, kept


def write_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file with the permissions that the umask asks for; ValueError for values that are not finite."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    bad = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if bad:
        raise ValueError(
            f"{bad[0]} has values that are not finite ({len(bad)} such tensors), so {path.name} is not written"
        )
    save_file(state, path)
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)  # safetensors itself leaves 0600


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError that names a file which is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; name a checkpoint that has it")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or is damaged: {error}") from error


def mismatches(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Why `state` does not load into a network whose state dict is `expected`, one message per tensor."""
    found = [f"{name} is missing" for name in expected if name not in state]
    found += [f"{name} has no place in this network" for name in state if name not in expected]
    return found + [
        f"{name} has shape {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
