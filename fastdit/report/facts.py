"""What the files of a run tell, without its network: settings, curves, starts, and warnings in words."""

import json
import math
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastdit import environment
from fastdit.autoencoder.config import AutoencoderConfig
from fastdit.config import load_config, to_tree
from fastdit.data.latents import PerChannel, scale_remarks
from fastdit.data.loader import split
from fastdit.data.manifest import Manifest
from fastdit.data.opening import open_latents
from fastdit.errors import counted
from fastdit.files import read_bytes, read_json, read_yaml
from fastdit.schema import Config, shards_text
from fastdit.training import checkpoint
from fastdit.training.ema import too_young
from fastdit.training.log import RECORDS, read_metrics, read_records
from fastdit.training.monitor import EVALUATIONS
from fastdit.training.state import CONFIG, same_contents

QUALITY = "quality.json"  # [{"name": ..., "value": ..., "protocol": how it was measured}, ...]
STARTED = {"step": int, "processes": int, "nodes": int, "hardware": str, "date": str, "versions": dict, "platform": str,
           "command": str, "commit": str | None}  # of environment.jsonl  # fmt: skip
RESUMED = re.compile(r"resumed at step (\d{1,18})\b|^changed since step (\d{1,18}): (.*)$", re.MULTILINE)  # train.log
LEFT_OUT = re.compile(r"^sample (\d+) of .*; it is left out", re.MULTILINE)  # data/loader.py, in train.log


@dataclass
class Run:
    """A run folder, read."""

    folder: Path
    config: Config | AutoencoderConfig
    metrics: list[dict] = field(default_factory=list)  # of metrics.jsonl; a value that was not finite is None
    skipped: list[dict] = field(default_factory=list)
    starts: list[dict] = field(default_factory=list)  # of environment.jsonl
    quality: list[dict] = field(default_factory=list)
    measured: list[dict] = field(default_factory=list)  # of metrics.jsonl: what the monitor measured
    evaluations: list[dict] = field(default_factory=list)  # of evaluations.jsonl
    checkpoints: list[Path] = field(default_factory=list)
    manifest: Manifest | None = None
    images: int = 0  # to train on; 0: unknown
    notes: list[str] = field(default_factory=list)  # what is missing, and why
    damaged: int = 0  # samples of the shards that training left out
    changes: list[tuple[int, str]] = field(default_factory=list)  # (step, settings) that a resume changed

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def steps(self) -> int:
        """The last step that left a record or a checkpoint."""
        last = [self.metrics[-1]["step"]] if self.metrics else []
        return max([*last, *map(checkpoint.step_of, self.checkpoints[-1:])], default=0)

    @property
    def epochs(self) -> float | None:
        return self.steps * self.config.training.global_batch / self.images if self.images else None

    @property
    def seconds(self) -> float:
        """Time of the training steps that are on record. A repeated part counts once."""
        steps = [0, *(m["step"] for m in self.metrics)]
        rates = [m["steps_per_s"] for m in self.metrics]
        return sum(n / rate for n, rate in zip(np.diff(steps), rates, strict=True) if rate)

    def curve(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps (n,) and values (n,), nan where the value was not finite; empty for a key that was not recorded."""
        records = [record for record in (*self.metrics, *self.measured) if key in record]  # a key of one of them
        points = [(m["step"], m[key] if isinstance(m[key], int | float) else math.nan) for m in records]
        steps, values = np.array(points, dtype=float).reshape(-1, 2).T
        return steps, values


def read_run(folder: str | Path) -> Run:
    """ValueError unless `folder` is that of a run."""
    folder = Path(folder).resolve()
    if not (folder / CONFIG).is_file() or (folder / checkpoint.META).is_file():
        raise ValueError(f"{folder} is not the folder of a run, which has a {CONFIG} and checkpoints/; give one")
    tree = read_yaml(folder / CONFIG)
    trains_vae = isinstance(tree, dict) and "discriminator" in tree
    config = load_config(folder / CONFIG, schema=AutoencoderConfig if trains_vae else Config)
    if not trains_vae and (config.data.image_size is None or config.data.num_classes is None):
        raise ValueError(f"{folder / CONFIG} is not that of a run, which has data.image_size and data.num_classes")
    run = Run(folder, config, checkpoints=checkpoint.checkpoints(folder))
    run.metrics = read_metrics(folder)
    run.measured = [record for record in read_records(folder / "metrics.jsonl")
                    if type(record.get("step")) is int and "monitor_s" in record]  # fmt: skip
    run.evaluations = [line for line in read_records(folder / EVALUATIONS) if type(line.get("step")) is int
                       and all(isinstance(line.get(key), dict) for key in ("protocol", "values"))]  # fmt: skip
    run.skipped = [line for line in read_records(folder / "skipped.jsonl") if type(line.get("step")) is int]
    run.starts = [line for line in read_records(folder / environment.FILE)
                  if all(isinstance(line.get(key), kind) for key, kind in STARTED.items())
                  and 1 <= line["nodes"] <= line["processes"]]  # fmt: skip
    if (folder / QUALITY).is_file():
        found = read_json(folder / QUALITY, list)
        run.quality = [figure for figure in found if isinstance(figure, dict) and {"name", "value"} <= figure.keys()]
    if (folder / "train.log").is_file():
        told = read_bytes(folder / "train.log", RECORDS).decode(errors="replace")
        run.damaged = len(set(LEFT_OUT.findall(told)))  # each process, and each start, names those that it met
        for resumed, since, changed in RESUMED.findall(told):
            if resumed:  # what came after that step was repeated
                run.changes = [change for change in run.changes if change[0] < int(resumed)]
            else:
                run.changes.append((int(since), changed))
    meta = checkpoint.inspect(run.checkpoints[-1], ())[0] if run.checkpoints else {}
    if trains_vae:
        run.images = meta["images"] if type(meta.get("images")) is int else 0
        return run
    try:
        data = run.config.data
        manifest = open_latents(data.shards, data.remote_cache).normalized(data.normalize)
        if not same_contents(meta, manifest):
            raise ValueError(f"the run was trained on other images than data.shards={shards_text(data.shards)} has now")
        run.manifest, _ = split(manifest, data.val_fraction)
        run.images = len(run.manifest)
    except ValueError as error:
        run.notes.append(f"No real images, neighbors and loss per timestep: {error}")
    return run


def warnings(run: Run) -> list[str]:
    """What a reader of the figures should know, one sentence or two each."""
    found, settings = [], run.config.training
    if run.steps < settings.steps:
        found.append(f"The run is not complete: step {run.steps:,} of {settings.steps:,}. Continue it with --resume.")
    if run.skipped:
        steps = ", ".join(f"{line['step']:,}" for line in run.skipped[:5]) + ", ..." * (len(run.skipped) > 5)
        count = f"{len(run.skipped)} steps were" if len(run.skipped) > 1 else "1 step was"
        told = "" if of_autoencoder(run) else " and times"
        found.append(f"{count} skipped, because the loss or the gradient was not finite: step {steps}. They changed "
                     f"nothing; skipped.jsonl names their samples{told}.")  # fmt: skip
    if run.changes:
        told = "; ".join(f"at step {step:,} {changed}" for step, changed in run.changes)
        found.append(f"A resume changed settings: {told}. Elsewhere, this page names the last ones alone.")
    _, losses = run.curve("loss")
    bad = int(np.isnan(losses).sum())
    if bad:
        found.append(f"The loss is not finite in {bad} of {len(run.metrics)} records.")
    return found + (autoencoder_warnings(run) if of_autoencoder(run) else network_warnings(run))


def of_autoencoder(run: Run) -> bool:
    return isinstance(run.config, AutoencoderConfig)


def autoencoder_warnings(run: Run) -> list[str]:
    """Warnings about a run of fastdit train-vae."""
    found, settings = [], run.config.discriminator
    if young := too_young(run.config.training, run.steps):
        found.append(f"A{young.removeprefix('warning: a').partition(':')[0]}, and so are the reconstructions here.")
    steps, values = run.curve("psnr")
    later = (steps >= (settings.start if settings.weight else 0)) & ~np.isnan(values)
    steps, values = steps[later], values[later]
    if len(values) and values[-1] < values.max() - 1:  # once the discriminator is there: it costs PSNR by itself
        found.append(f"The PSNR fell to {values[-1]:.2f} dB, from {values.max():.2f} dB at step "
                     f"{int(steps[values.argmax()]):,}.")  # fmt: skip
    if latents := latents_of(run):
        mean, std, shift, scale = latents
        lines = scale_remarks((mean - np.array(shift)) * np.array(scale), std * np.array(scale), scale)
        found += [f"{line[0].upper()}{line[1:]}." for line in lines]
    return found


def latents_of(run: Run) -> tuple[np.ndarray, np.ndarray, PerChannel, PerChannel] | None:
    """Mean and deviation of each latent channel (C,) as last measured, and the shift and scale that are recorded."""
    for record in reversed(run.measured):
        values = [record.get(key) for key in ("latent_mean", "latent_std")]
        if not all(isinstance(value, list) and value for value in values):
            continue
        mean, std = (np.array([x if isinstance(x, int | float) else np.nan for x in value]) for value in values)
        pair = [record.get("shift_factor", 0.0), record.get("scaling_factor")]
        shift, scale = (tuple(v) if isinstance(v, list) and len(v) == len(mean) else v for v in pair)
        numbers = [x for v in (shift, scale) for x in (v if isinstance(v, tuple) else (v,))]
        fits = mean.shape == std.shape and all(isinstance(x, float) for x in numbers)
        return (mean, std, shift, scale) if fits else None
    return None


def network_warnings(run: Run) -> list[str]:
    """Warnings about a run of fastdit train."""
    found = []
    if young := too_young(run.config.training, run.steps):
        found.append(f"A{young.removeprefix('warning: a')}. The samples here are from the weights themselves.")
    _, losses = run.curve("loss")
    losses = losses[~np.isnan(losses)]
    if len(losses) >= 20:
        parts = [part.mean() for part in np.array_split(losses, 10)]
        if parts[-1] > 1.1 * min(parts):
            best = parts.index(min(parts))
            found.append(f"The loss rises: {parts[-1]:.4g} over the last tenth of the run, {min(parts):.4g} over its "
                         f"{'first' if not best else f'{10 * best}% to {10 * best + 10}%'}.")  # fmt: skip
    if run.manifest and run.manifest.channel_std:
        std = math.sqrt(np.square(run.manifest.channel_std).mean() + np.var(run.manifest.channel_mean))
        if not (0.7 < std < 1.4 or run.manifest.latents.are_pixels):
            found.append(f"The scaled latents have a standard deviation of {std:.2g}, not about 1: the autoencoder's "
                         f"scaling_factor {run.manifest.latents.scaling} does not fit these images. Noise levels and "
                         "samplers assume 1.")  # fmt: skip
    if run.damaged:
        found.append(f"Training left out {counted(run.damaged, 'damaged sample')} of the shards (data.skip_damaged).")
    if run.manifest and run.manifest.skipped:
        found.append(f"{run.manifest.skipped} of {run.manifest.images:,} images could not be read when the latents "
                     "were extracted; skipped.txt beside the shards names them.")  # fmt: skip
    return found


def settings_of(run: Run) -> dict[str, str]:
    """Every config key with its value, dotted."""
    return dict(_dotted(to_tree(run.config)))


def _dotted(value, prefix: str = ""):
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _dotted(item, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, json.dumps(value) if isinstance(value, (bool, type(None))) else str(value) or '""'


def reproduce(run: Run) -> str:
    """The commands that run it again, from its config.yaml, as it was started."""
    first = run.starts[0] if run.starts else {}
    processes, nodes = first.get("processes", 1), first.get("nodes", 1)
    words = [f"FASTDIT_KERNELS={first['kernels']}"] if first.get("kernels") else []
    words.append("fastdit")
    if processes > 1:
        words.append(f"launch --gpus {processes // nodes}" + f" --nodes {nodes} --master HOST:PORT" * (nodes > 1))
    places = shlex.join([str(run.folder / CONFIG), f"run_dir={run.folder}-again"])
    words.append(f"{'train-vae' if of_autoencoder(run) else 'train'} {places}")
    words += ["training.engine=deepspeed"] * bool(first.get("deepspeed_launcher"))
    words += ["--device cpu"] * (first.get("device") == "cpu")
    commit = (first.get("commit") or "").rstrip("+")
    return (f"git checkout {commit}\n" if commit else "") + " ".join(words)
