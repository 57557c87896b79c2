"""What a checkpoint holds, written and read side by side.

run_dir/checkpoints/step-0000500/
    config.yaml              the resolved config of the run
    model.safetensors        weights in fp32, under the official names
    ema.safetensors          their exponential moving average, likewise
    exp_avg.safetensors      AdamW's running mean of the gradient, likewise
    exp_avg_sq.safetensors   AdamW's running mean of its square, likewise
    progress.safetensors     AdamW's number of updates, the losses since the last log line, and, where they are on,
                             the histories of training.loss_aware_times and training.fp8
    alignment.safetensors    the same five for the projectors of training.align, if it is on
    power-0.050.safetensors  and so on: the averages of training.ema_stds, also kept in run_dir/averages/step-0000500/
    golden.npz               a recorded forward pass, in converted checkpoints only
    checkpoint.json          step, latents, ... and the size and SHA-256 of every file; training/checkpoint.py writes it

A run is its config, its seed and its step, so this is all that a resume needs. Nothing depends on the number of
processes, the ZeRO stage or the engine, so a run may continue with others. No file can hold code.
"""

import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdit.build import build_network, build_objective
from fastdit.classes import Classes
from fastdit.config import changes, load_config, save_config, to_tree
from fastdit.data.features import FeatureManifest
from fastdit.data.latents import LatentSpec
from fastdit.data.manifest import Manifest
from fastdit.diffusion.objectives import OF_NETWORK, Objective
from fastdit.diffusion.timesteps import LossAwareTimes
from fastdit.distributed import Ranks
from fastdit.errors import counted
from fastdit.files import staged
from fastdit.models import fp8
from fastdit.models.dit import DiT
from fastdit.schema import Config, LoopConfig
from fastdit.training import checkpoint
from fastdit.training.ema import AVERAGES, EMA, PowerAverage, too_young, width_name
from fastdit.training.engine import MOMENTS, Engine, moments_of, set_moments
from fastdit.training.log import LossWindow
from fastdit.training.weights import header, mismatches, other_types, read_weights, write_weights

CONFIG, GOLDEN, VAE = "config.yaml", "golden.npz", "vae"
AUTOENCODER = "autoencoder"  # the kind of a checkpoint of fastdit train-vae (autoencoder/state.py)
SMALL = 64 << 20  # bytes: an autoencoder up to this size is copied into the run
ALIGNMENT, TAPS = "alignment", "taps."  # the file of the projectors of training.align; how their names start
MAY_CHANGE = ("variant", "attention", "class_dropout", "dropout")  # keys of model: that a resume does not compare
OF_SOME = ("features", "empty_classes")  # facts in checkpoint.json that only some runs have
MUST_STAY = ("init_from", "ema_stds", "align", "optimizer")  # keys of training: that describe a run from its first step


@dataclass
class TrainingState:
    """Everything of a run that changes from step to step."""

    config: Config
    ranks: Ranks
    engine: Engine
    ema: EMA
    averages: list[PowerAverage]
    window: LossWindow
    times: LossAwareTimes | None
    host: dict[tuple[str, str], Tensor] = field(default_factory=dict)  # buffers of `snapshot`, used again

    def snapshot(self) -> dict[str, dict[str, Tensor]]:
        """A copy in host memory, by file and name, on the main process; {} elsewhere. A collective call.

        The next call overwrites the tensors of this one.
        """
        moments, updates = moments_of(self.engine)
        averages = {"ema": self.ema.average} | {average.name: average.average for average in self.averages}
        sharded = {"model": self.engine.master_parameters(), **averages, **moments}
        copies: dict[str, dict[str, Tensor]] = {file: {} for file in sharded if self.ranks.is_main}
        for file, tensors in sharded.items():
            for name, tensor in self.engine.full_state(tensors):
                if self.ranks.is_main:
                    own, key = (ALIGNMENT, f"{file}.{name}") if name.startswith(TAPS) else (file, name)
                    copies.setdefault(own, {})[key] = self._to_host((own, key), tensor.detach())
        if not self.ranks.is_main:
            return {}
        for file in ("model", *averages):
            for name, tensor in self.engine.module.named_buffers():
                copies[file][name] = self._to_host((file, name), tensor)
        progress = {f"window.{name}": total for name, total in self.window.sums.items()}
        progress |= {f"times.{name}": tensor for name, tensor in self.times.state_dict().items()} if self.times else {}
        factors = self.engine.module.fp8
        progress |= {f"fp8.{name}": tensor for name, tensor in factors.state_dict().items()} if factors else {}
        copies["progress"] = {name: tensor.to("cpu", copy=True) for name, tensor in progress.items()}
        copies["progress"]["updates"] = torch.tensor(updates)
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return copies

    def _to_host(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        if key not in self.host:
            self.host[key] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return self.host[key].copy_(tensor, non_blocking=True)

    def load(self, folder: Path) -> int:
        """Restore all but the weights from what `write_snapshot` wrote, and return its step."""
        progress = read_weights(folder / "progress.safetensors")
        parts = {name: self.engine.partition(read_all(folder, name)) for name in MOMENTS}
        set_moments(self.engine, parts, int(progress["updates"]))
        for name, average in [("ema", self.ema), *((average.name, average) for average in self.averages)]:
            average.load(self.engine.partition(read_all(folder, name)))
        self.window.load(below(progress, "window."))
        if self.times is not None and below(progress, "times."):  # absent if the run did not use them before
            self.times.load_state_dict(below(progress, "times."))
        factors = self.engine.module.fp8
        if factors is not None and below(progress, "fp8."):
            factors.load_state_dict(below(progress, "fp8."))
        return checkpoint.read_meta(folder)["step"]


def read_all(folder: Path, file: str) -> dict[str, Tensor]:
    """The tensors of a file of a checkpoint, and those of the projectors of training.align that belong to it."""
    aligned = folder / f"{ALIGNMENT}.safetensors"
    projectors = below(read_weights(aligned), f"{file}.") if aligned.is_file() else {}
    return read_weights(folder / f"{file}.safetensors") | projectors


def write_snapshot(snapshot: Mapping[str, Mapping[str, Tensor]], config: Config, folder: Path) -> None:
    """Write the files of a checkpoint, except for checkpoint.json, and keep its averages for `fastdit ema`."""
    for file, state in snapshot.items():
        write_weights(state, folder / f"{file}.safetensors")
    save_config(config, folder / CONFIG)
    if config.training.ema_stds:
        run_dir, step = folder.parents[1], folder.with_suffix("")
        kept = run_dir / AVERAGES / step.name
        partial = kept.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for path in folder.glob("power-*"):  # links: both folders together take the space of one
            link_or_copy(path, partial / path.name)
        checkpoint.commit(partial, kept, {"step": checkpoint.step_of(step)})


def keep_autoencoder(vae: str, run_dir: Path) -> None:
    """Copy a small local autoencoder into the run, so that the run can be sampled without the original."""
    source, copy = Path(vae), run_dir / VAE
    if source.is_dir() and not copy.exists() and source.resolve() != copy.resolve():
        files = [path for path in source.rglob("*") if path.is_file()]
        if sum(path.stat().st_size for path in files) <= SMALL:
            for remains in run_dir.glob(f"{VAE}.*.partial"):  # of a start that was killed
                shutil.rmtree(remains, ignore_errors=True)
            with staged(copy) as stage:
                for path in files:  # not copytree, whose error has the reason in words only
                    (stage / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, stage / path.relative_to(source))


def link_or_copy(path: Path, link: Path) -> None:
    try:
        os.link(path, link)
    except OSError:  # some file systems have no hard links
        shutil.copyfile(path, link)


def forget_averages(run_dir: Path, step: int) -> None:
    """Delete the averages after `step`, which a resumed run writes again."""
    for path in (run_dir / AVERAGES).glob("step-*"):
        if checkpoint.NAME.fullmatch(path.name) and checkpoint.step_of(path) > step:
            shutil.rmtree(path)


def resumed_weights(
    folder: Path, config: Config, manifest: Manifest, model: DiT, features: FeatureManifest | None = None
) -> dict[str, Tensor]:
    """The weights that `model` continues from; ValueError where its settings do not allow to continue `folder`."""
    meta = checkpoint.read_meta(folder)
    if not (folder / "progress.safetensors").is_file():
        raise ValueError(f"{folder} has no optimizer state (those of fastdit convert and fastdit ema have none); start "
                         f"a new run_dir with training.init_from={folder}")  # fmt: skip
    check_steps(folder, config.training)
    check_same_facts(folder, meta, config, manifest, features)
    check_same_settings(folder, config)
    check_files(folder, expected_tensors(folder, config, model))
    return read_all(folder, "model")


def check_same_facts(
    folder: Path, meta: Mapping[str, Any], config: Config, manifest: Manifest, features: FeatureManifest | None
) -> None:
    """ValueError where checkpoint.json describes other latents, classes, ... than those of this run."""
    latents_of(meta).check(manifest.latents, str(folder), "this run's shards", "precision")
    facts = describe(config, manifest.latents, manifest.classes_of(config.data.num_classes), features)
    for key in ("contents", *facts):
        if key not in meta and key not in OF_SOME:
            raise ValueError(f"{folder / checkpoint.META} has no {key!r}; start a new run_dir with "
                             f"training.init_from={folder}")  # fmt: skip
    for key, value in facts.items():
        if key != "latents" and meta.get(key, value) != value:
            raise ValueError(f"{folder} has {key}={meta[key]!r}, this run {value!r}; make them equal to resume")
    if config.data.val_fraction and not same_contents(meta, manifest):
        raise ValueError(
            f"{folder} was trained on other images than data.shards={manifest.folder} has now, and data.val_fraction="
            f"{config.data.val_fraction} would hold out some of those; restore them, or choose another run_dir"
        )


def check_same_settings(folder: Path, config: Config) -> None:
    """ValueError where a setting that a resume cannot change is another one in the checkpoint's config."""
    before = load_config(folder / CONFIG)
    fixed = [("model", key) for key in vars(config.model) if key not in MAY_CHANGE]  # also e.g. the norm
    fixed.append(("data", "val_fraction"))  # else images that were trained on would be held out
    fixed.append(("data", "block"))  # else an epoch would have some images twice
    for section, key in fixed + [("training", key) for key in MUST_STAY]:
        old, new = (to_tree(getattr(getattr(c, section), key)) for c in (before, config))
        if old != new:
            raise ValueError(f"{folder} has {section}.{key}={old!r}, this run {new!r}; make them equal to resume")
    if build_objective(before) != build_objective(config):
        old, new = to_tree(before.objective), to_tree(config.objective)
        raise ValueError(f"{folder} has objective={old}, this run {new}; make them equal to resume")


def expected_tensors(folder: Path, config: Config, model: DiT) -> dict[str, dict[str, Tensor]]:
    """The tensors of each file of a checkpoint, of which only names, shapes and types count; see `snapshot`."""
    powers = [f"power-{width_name(std)}" for std in config.training.ema_stds]
    states = {name: model.state_dict() for name in ("model", "ema", *powers)}
    states |= {name: dict(model.named_parameters()) for name in MOMENTS}
    files: dict[str, dict[str, Tensor]] = {file: {} for file in states}
    for file, state in states.items():
        for name, tensor in state.items():
            own, key = (ALIGNMENT, f"{file}.{name}") if name.startswith(TAPS) else (file, name)
            files.setdefault(own, {})[key] = tensor
    return files | {"progress": expected_progress(folder, model)}


def expected_progress(folder: Path, model: DiT) -> dict[str, Tensor]:
    """The tensors of progress.safetensors; if it has a part of a history, all parts are expected."""
    progress = {"updates": torch.tensor(0)}
    for name, stored in header(folder / "progress.safetensors").items():
        if name.startswith("window."):
            progress[name] = torch.zeros(2)
        elif name.startswith("times."):
            progress |= {f"times.{key}": tensor for key, tensor in LossAwareTimes().state_dict().items()}
        elif name == "fp8.history":  # of any length
            progress[name] = torch.zeros(*stored.shape[:1], len(fp8.linears_of(model)), 3)
    return progress


def check_steps(folder: Path, settings: LoopConfig) -> None:
    """ValueError where a run would end before the checkpoint that it continues from."""
    if (done := checkpoint.step_of(folder)) > settings.steps:
        epochs = f" (training.epochs={settings.epochs:g})" * bool(settings.epochs)
        raise ValueError(f"training.steps={settings.steps}{epochs} is less than the {counted(done, 'step')} of "
                         f"{folder}; use more to resume")  # fmt: skip


def check_files(folder: Path, expected: Mapping[str, Mapping[str, Tensor]]) -> None:
    """ValueError where a file of a checkpoint does not hold the expected tensors, by file and name."""
    for name, own in expected.items():
        path = folder / f"{name}.safetensors"
        stored = header(path)
        if wrong := mismatches(own, stored) + other_types(own, stored):
            raise ValueError(f"{path} is not of this run: {wrong[0]}; use the run_dir and the settings of one run")


def same_contents(meta: Mapping[str, Any], manifest: Manifest) -> bool:
    """Whether a checkpoint was trained on these shards, in any folder; True of converted ones, which do not say."""
    return meta.get("contents", manifest.contents) == manifest.contents


def changed_since(folder: Path, config: Config, manifest: Manifest) -> str:
    """What differs between the run that wrote a checkpoint and this one, in words: settings, and the images."""
    changed = [changes(load_config(folder / CONFIG), config)]
    if not same_contents(checkpoint.read_meta(folder), manifest):
        changed.append(f"other images in data.shards={manifest.folder}")
    return ", ".join(filter(None, changed))


def below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def describe(
    config: Config, latents: LatentSpec, classes: Classes, features: FeatureManifest | None = None
) -> dict[str, Any]:
    """The facts in checkpoint.json that must match on resume."""
    return {
        **({"features": features.facts()} if features else {}),
        **({"empty_classes": list(classes.empty)} if classes.empty else {}),
        "model": config.model.variant,
        "num_classes": config.data.num_classes,
        "objective": config.objective.name,
        "global_batch": config.training.global_batch,
        "seed": config.seed,
        "class_names": list(classes.names),
        "latents": latents.to_json(),
    }


def latents_of(meta: Mapping[str, Any]) -> LatentSpec:
    """The record of the latents in checkpoint.json; ValueError where it has none, or one of another form."""
    if "latents" not in meta:
        raise ValueError(f"{checkpoint.META} has no 'latents'")
    try:
        return LatentSpec.from_json(meta["latents"])
    except (ValueError, TypeError, LookupError, OverflowError) as error:
        raise ValueError(f"{checkpoint.META} is damaged: latents={meta['latents']}: {error}") from None


def classes_of(meta: Mapping[str, Any], config: Config) -> Classes:
    """The record of the classes in checkpoint.json."""
    return Classes(config.data.num_classes, tuple(meta.get("class_names", ())), tuple(meta.get("empty_classes", ())))


@dataclass(frozen=True)
class Trained:
    """A loaded checkpoint: the network with its weights, in eval mode, with its config, objective and latents."""

    folder: Path
    config: Config
    objective: Objective
    model: DiT
    latents: LatentSpec
    identity: str  # SHA-256 of the file that the weights were read from
    classes: Classes
    step: int
    young: str = ""  # a warning where these weights are an EMA that holds much of its random start

    def warn(self, of: str = "") -> None:
        """Print the warning, if there is one; `of`: the key that names this checkpoint."""
        if self.young:
            print(self.young.replace("warning: ", f"warning: {of}: ", 1) if of else self.young, file=sys.stderr)


def load_network(
    path: str | Path, weights: str = "ema", *, overrides: Iterable[str] = (), device: torch.device | str = "cpu"
) -> Trained:
    """The checkpoint at `path` (a run folder means its newest), its config changed by `overrides`.

    `weights`: "ema" or "model". ValueError if the checkpoint is incomplete or does not match the config's network.
    """
    folder = checkpoint.find(Path(path))
    meta = checkpoint.read_meta(folder, contents=[CONFIG, f"{weights}.safetensors"])
    if meta.get("kind") == AUTOENCODER:
        raise ValueError(f"{folder} is of an autoencoder, not of a network; its run's folder {VAE} is for --vae")
    if weights == "model" and meta.get("model_step", meta["step"]) != meta["step"]:  # of `fastdit ema`
        raise ValueError(f"{folder} has the EMA of step {meta['step']}, but the weights of step {meta['model_step']}: "
                         "the checkpoint of its step was deleted; use --weights ema")  # fmt: skip
    config, latents = load_config(folder / CONFIG, overrides), latents_of(meta)
    objective = build_objective(config)
    check_output(config, load_config(folder / CONFIG), folder)
    state = read_weights(folder / f"{weights}.safetensors")
    model = network_from_state(config, latents, objective, state, where=str(folder), device=device)
    identity = meta["files"][f"{weights}.safetensors"]["sha256"]
    classes, rebuilt = classes_of(meta, config), "ema_std" in meta  # by `fastdit ema`, without the random start
    young = too_young(config.training, meta["step"]) if weights == "ema" and not rebuilt else ""
    return Trained(folder, config, objective, model.to(device), latents, identity, classes, meta["step"], young)


def check_output(config: Config, trained: Config, where: Path) -> None:
    """ValueError if the network's output would be taken for what it was not trained to be."""
    ours, theirs = (
        {"name": c.objective.name} | {key: getattr(build_objective(c), key, None) for key in OF_NETWORK}
        for c in (config, trained)
    )
    for key, value in theirs.items():
        if ours[key] != value:
            raise ValueError(f"objective.{key}={ours[key]}, but {where} was trained with {value}; leave it out")


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
    wrong = mismatches(model.state_dict(), state) or other_types(model.state_dict(), state)
    if wrong:
        raise ValueError(f"{where} has weights of another network than {config.model.variant}: {wrong[0]} "
                         f"({counted(len(wrong), 'difference')})")  # fmt: skip
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)
