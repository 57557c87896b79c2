"""What is measured while a run trains: the validation loss, the EMA's samples, and their distance to real images.

All of it has its own network and its own random numbers, so the training computes the same bits with and without it. It
runs between two steps, on all processes: each takes some of the batches, and then they are joined.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdit.build import build_network
from fastdit.classes import Classes
from fastdit.data.archives import is_there
from fastdit.data.images import size_text, width_height
from fastdit.data.manifest import Manifest
from fastdit.diffusion.objectives import Objective
from fastdit.distributed import Ranks
from fastdit.errors import counted, is_out_of_memory
from fastdit.evaluation.curve import ReferenceCurve
from fastdit.evaluation.evaluate import load_reference, measure
from fastdit.evaluation.features import load_features
from fastdit.evaluation.generated import generated
from fastdit.evaluation.loss import check_images, validation_loss
from fastdit.evaluation.protocol import in_a_line
from fastdit.files import append_json
from fastdit.pipeline import Inference
from fastdit.schema import Config
from fastdit.training.alignment import token_features
from fastdit.training.boards import check_wandb
from fastdit.training.ema import EMA, random_share
from fastdit.training.engine import Engine
from fastdit.training.guard import Requests
from fastdit.training.log import Log, read_records, reset_peak, rewind, synchronize
from fastdit.training.pipeline import image_pipeline
from fastdit.training.sheets import NAME, sheet, sheets, step_of, strip, write_png
from fastdit.training.watchdog import MONITORS, Watchdog

FOLDER, EVALUATIONS = "monitor", "evaluations.jsonl"  # of a run
SEED, CLASSES = 0, 8  # of the samples, in every run; classes among those of a grid
DONE = {"validate": "validated", "sample": "sampled", "evaluate": "evaluated"}  # <key>_s in metrics.jsonl: seconds
Found = tuple[dict[str, Any], dict[str, np.ndarray], str] | None  # values, pictures and a line for the log


class Watched(Inference):
    """Tells the watchdog about every evaluation of the network: a long sampler does not stall."""

    on_call: Callable[[], None]

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        self.on_call()
        return super().__call__(x, t, y)


class Monitor:
    """Validates, samples and evaluates every so many steps. ValueError for what would fail when it is first needed.

    `begin` gives it what the run has; then it is called after every step.
    """

    def __init__(
        self, config: Config, manifest: Manifest, held_out: Manifest | None, objective: Objective, ranks: Ranks
    ):
        settings, size = config.training, manifest.latents.image_size
        self.config, self.held_out, self.objective, self.ranks = config, held_out, objective, ranks
        self.run_dir, self.device, self.loaded = Path(config.run_dir), ranks.device, ("", 0)
        self.seconds: dict[str, float] = {}  # that each of DONE took the last time
        self.every = config.monitor_every
        check_wandb(settings.wandb)
        if self.every["validate"] and not held_out:
            raise ValueError(f"training.validate_every={settings.validate_every} needs images that are not trained on; "
                             "set data.val_fraction=0.01 or data.val_shards")  # fmt: skip
        if settings.evaluate_every and not (settings.reference and is_there(Path(settings.reference))):
            what = f"training.reference={settings.reference} does not exist" if settings.reference else (
                f"training.evaluate_every={settings.evaluate_every} needs training.reference")  # fmt: skip
            raise ValueError(f"{what}; give real images, or a file of fastdit evaluate --save-reference")
        self.curve = ReferenceCurve.load(settings.loss_reference, config) if settings.loss_reference else None
        if not any(self.every.values()):
            return
        if self.every["validate"]:
            check_images(held_out, settings.validate_images)
            own = token_features(config)
            self.features = own and token_features(config, config.data.val_shards, own.facts())
            if own:
                self.features.check(held_out)
        # never compiled: the training's compiled code and CUDA graphs stay as they are
        config = replace(config, sampling=replace(config.sampling, compile=False))
        with torch.random.fork_rng([]), torch.device("meta"):
            network = build_network(config, manifest.latents.shape, objective, self.device)
        self.network = network.to_empty(device=self.device).eval().requires_grad_(False)
        self.inference = Watched(self.network, config.sampling.precision, compile=False)
        if settings.sample_every or settings.evaluate_every:
            classes = manifest.classes_of(config.data.num_classes)
            spec, where = manifest.latents, f"data.shards={manifest.folder}"
            pipeline = image_pipeline(config, self.network, objective, spec, where, run_dir=self.run_dir,
                                      classes=classes)  # fmt: skip
            self.pipeline = replace(pipeline, inference=self.inference)
            self.labels = spread_labels(settings.sample_images, classes)
        if settings.evaluate_every:
            with keys_of_the_config():
                self.extractor = load_features(settings.evaluate_features, self.device)
                place = (settings.reference, width_height(size), self.extractor, ranks, size_text(size))
                self.reference = load_reference(*place)

    def begin(self, engine: Engine, ema: EMA, log: Log, watchdog: Watchdog, requests: Requests, start: int) -> None:
        """Before the first step. Does what was due at `start`, if the run was stopped before that was done."""
        self.engine, self.log, self.requests = engine, log, requests
        self.weights = {"model": engine.master_parameters, "ema": lambda: ema.average}
        if self.curve and not self.every["validate"]:
            log.say(f"training.loss_reference={self.config.training.loss_reference} is not used without validation")
        if not any(self.every.values()):
            return
        if self.curve and self.curve.unlike:
            log.say(f"warning: training.loss_reference={self.config.training.loss_reference} was measured with other "
                    f"settings: {', '.join(self.curve.unlike)}")  # fmt: skip
        self.inference.on_call = lambda: watchdog.at(self.step, MONITORS)
        for name, buffer in self.network.named_buffers():
            buffer.copy_(engine.module.get_buffer(name))
        missing = set()
        if self.ranks.is_main:
            for path in sheets(self.run_dir / FOLDER):
                if step_of(path) > start:
                    path.unlink()
            rewind(self.run_dir / EVALUATIONS, start)
            records = [r for r in read_records(self.run_dir / "metrics.jsonl") if r.get("step") == start]
            missing = {name for name in DONE if not any(f"{name}_s" in record for record in records)}
        missing = [name for name in DONE if self.ranks.any(name in missing)]
        self._run(start, [name for name in self._due(start) if name in missing])

    def __call__(self, step: int) -> float:
        """Does what is due after step number `step`; returns the seconds that it took."""
        return self._run(step, self._due(step))

    def remaining(self, step: int) -> float:
        """Seconds that everything due from this step on will take, as far as is known by now."""
        last, known = self.config.training.steps, [(self.every[name], s) for name, s in self.seconds.items()]
        return sum(s * (last // every - (step - 1) // every + (last % every > 0)) for every, s in known)

    def _due(self, step: int) -> list[str]:
        last = self.config.training.steps
        return [name for name, every in self.every.items() if every and step and (step % every == 0 or step == last)]

    def _run(self, step: int, due: list[str]) -> float:
        if not due:
            return 0.0
        synchronize(self.device)  # the steps that were launched before count as training
        self.log.peak_gib()
        begun, values, pictures, took = time.perf_counter(), {}, {}, []
        self.step = step
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            for name in due:
                self.trouble, started = "", time.perf_counter()
                found = getattr(self, f"_{name}")()
                if found is None:
                    self.log.say(f"step {step}  not {DONE[name]}: {self.trouble or 'see the other processes'}")
                    continue
                synchronize(self.device)
                seconds = time.perf_counter() - started
                values |= found[0] | {f"{name}_s": seconds}
                self.seconds[name] = seconds
                pictures |= found[1]
                took.append(f"{DONE[name]} in {seconds:.1f} s")
                self.log.say(f"step {step}  {found[2]}")
        if took:
            self.log.record(step, values | {"monitor_s": time.perf_counter() - begun}, pictures)
            self.log.say(f"step {step}  {', '.join(took)}; images/s does not include that time")
        reset_peak(self.device)  # what this took does not count
        return time.perf_counter() - begun

    def _validate(self) -> Found:
        images, results = self.config.training.validate_images, []
        for name in ("model", "ema"):
            self._use(name)
            results.append(validation_loss(self.objective, self._network, self.held_out, self.ranks, images=images,
                                           on_batch=self._stopped, features=self.features))  # fmt: skip
        if self._failed():
            return None
        model, ema = results
        bins = [mean for mean, _ in ema["bins"]]
        values = {"val_loss": ema["loss"], "val_loss_error": ema["loss_error"], "val_loss_model": model["loss"]}
        values |= {f"val_{name}": value for name, value in ema["parts"].items()} | {"val_bins": bins}
        line = f"validation loss {ema['loss']:.4f} (EMA{self._young()}), {model['loss']:.4f} (weights)"
        if self.curve and (told := self.curve.compare(self.step, ema["loss"], bins)):
            line += f", {told}"
        return values, {}, f"{line}; for t from 0 to 1: {' '.join(f'{value:.3g}' for value in bins)}"

    def _sample(self) -> Found:
        self._use("ema")
        settings = self.config.training
        size = max(1, settings.sample_images // 4)  # so that several processes have something to do
        few = replace(self.config.sampling, batch_size=min(size, self.config.sampling.batch_size), compile=False)
        pipeline = replace(self.pipeline, config=replace(self.config, sampling=few))
        width, height = width_height(pipeline.spec.image_size)
        batches = pipeline.batches(settings.sample_images)
        own = np.zeros((-(-batches // self.ranks.world), few.batch_size, height, width, 3), np.uint8)
        for slot, b in enumerate(range(self.ranks.rank, batches, self.ranks.world)):
            images = self._or_blank(partial(pipeline.batch, b, self.labels, SEED), own[slot])
            own[slot, : len(images)] = images
        images = self.ranks.blocks(torch.from_numpy(own))[: settings.sample_images].cpu().numpy()
        if self._failed():
            return None
        picture = sheet(images, min(len(images), CLASSES))
        found = {"samples": picture}
        path = self.run_dir / FOLDER / NAME.format(self.step)
        if self.ranks.is_main:
            path.parent.mkdir(exist_ok=True)
            write_png(picture, path)
            if (over_time := strip(path.parent, height)) is not None:
                write_png(over_time, path.parent / "strip.png")
                found["samples_over_time"] = over_time
        return {}, found, f"{counted(len(images), 'sample')} of the EMA{self._young()} in {path}"

    def _evaluate(self) -> Found:
        self._use("ema")
        settings, folder = self.config.training, self.run_dir.resolve()
        saved = self.step % settings.checkpoint_every == 0 or self.step == settings.steps  # after this
        where = folder / "checkpoints" / f"step-{self.step:07d}" if saved else f"{folder}, step {self.step}"
        pipeline = replace(self.pipeline, checkpoint=str(where))
        samples = generated(pipeline, self.config.training.evaluate_images, SEED)

        def blocks(numbers: Iterable[int]) -> Iterator[np.ndarray]:
            for b in numbers:
                shape = min(samples.block, samples.count - b * samples.block), *samples.size[::-1], 3
                blank = np.random.default_rng(b).integers(0, 256, shape, np.uint8)  # the metrics need some variance
                yield self._or_blank(lambda b=b: next(samples.blocks([b])), blank)

        images = replace(samples, blocks=blocks)
        result = measure(images, self.reference, self.ranks, extractor=self.extractor, seed=SEED)
        if self._failed():
            return None
        if not self.ranks.is_main:
            return {}, {}, ""
        rewind(self.run_dir / EVALUATIONS, self.step - 1)
        append_json(self.run_dir / EVALUATIONS, {"step": self.step, **result})
        values = {f"eval_{name}": value for name, value in result["values"].items()}
        if result["real"]:
            values["eval_real_frechet"] = result["real"]["frechet"]
        return values, {}, f"{images.count} samples of the EMA{self._young()}: {in_a_line(result)}"

    def _use(self, name: str) -> None:
        """Copy the current `model` or `ema` weights into the network. A collective call."""
        if self.loaded != (name, self.step):
            own = dict(self.network.named_parameters())
            for key, tensor in self.engine.full_state(self.weights[name]()):
                if key in own:  # not the projectors of training.align
                    own[key].copy_(tensor)
            self.loaded = name, self.step

    def _network(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        blank = x.new_zeros(len(x), self.network.out_channels, *x.shape[2:])
        return self._or_blank(lambda: self.inference(x, t, y), blank)

    def _or_blank(self, make: Callable, blank):
        """`make()`, or `blank` after a stop or an error: the others would wait for a process that raised it alone."""
        if self._stopped():
            return blank
        try:
            return make()
        except (ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            self.trouble = " ".join(str(error).split())
            return blank

    def _stopped(self) -> bool:
        """Whether to leave out the rest, between two batches."""
        self.inference.on_call()
        if self.requests.poll()[0]:
            self.trouble = self.requests.reason
        return bool(self.trouble)

    def _failed(self) -> bool:
        """On every process: whether one has left something out, so that there is no result."""
        return self.ranks.any(bool(self.trouble))

    def _young(self) -> str:
        share = random_share(self.config.training, self.step)
        return f", still {share:.0%} random weights" if share >= 0.05 else ""


def spread_labels(count: int, classes: Classes) -> list[int]:
    """Labels for a grid of up to CLASSES columns: classes spread evenly over those that the data has."""
    few = classes.few(min(count, CLASSES))
    return [few[i % len(few)] for i in range(count)]


@contextmanager
def keys_of_the_config() -> Iterator[None]:
    """Errors of an evaluation name the keys of the config instead of the options of `fastdit evaluate`."""
    try:
        yield
    except ValueError as error:
        text = str(error).replace("--reference", "training.reference").replace("--features ", "--features=")
        text = text.replace("SAMPLES has", "data.shards has").replace("--image-size for a folder", "a folder of images")
        raise ValueError(text.replace("--features", "training.evaluate_features")) from None
