"""What varies in a picture of samples: classes, seeds, guidance, steps, samplers and checkpoints."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch

from fastdit.config import check_alone
from fastdit.gallery import KEYS, OPTIONS
from fastdit.pipeline import ImagePipeline
from fastdit.sampling import load_pipeline
from fastdit.sheets import in_letters, told_apart
from fastdit.training import checkpoint

FEW, MOST = 8, 1024  # classes, and seeds, where none are given; images of a picture


@dataclass(frozen=True)
class Axes:
    """The values of every axis, at least one each, and what samples them; made by `read_axes`."""

    values: dict[str, list]  # class, seed: numbers; checkpoint: folders; others: text, or None for the config's
    given: frozenset[str]  # the axes that the user gave
    pipeline: ImagePipeline  # of the first checkpoint
    overrides: tuple[str, ...]  # with the first value of each axis that is a setting
    weights: str

    @property
    def varying(self) -> list[str]:
        return [axis for axis in OPTIONS if len(self.values[axis]) > 1]

    def narrowed(self, **values: list) -> "Axes":
        """A copy with other values of some axes."""
        return replace(self, values=self.values | values)

    def labels(self, pipeline: ImagePipeline) -> list[int]:
        """The numbers of the classes in a checkpoint, which may have other classes than the first one."""
        names, others = self.pipeline.classes.names, pipeline.classes
        if names == others.names or not names or not others.names:
            return self.values["class"]
        return others.chosen([names[number] for number in self.values["class"]], "--classes")

    def variants(self, folder: Path) -> list[ImagePipeline]:
        """The pipelines of a checkpoint with each guidance, steps and sampler, the last of them varying fastest."""
        pipeline = self.pipeline
        if folder != self.values["checkpoint"][0]:
            pipeline = load_pipeline(folder, self.overrides, weights=self.weights, device=pipeline.device)
            if pipeline.spec.image_size != self.pipeline.spec.image_size:
                raise ValueError(f"--checkpoints: {folder} makes images of another size than "
                                 f"{self.values['checkpoint'][0]}; make a sheet of each")  # fmt: skip
        found = []
        for chosen in product(*(self.values[axis] for axis in KEYS)):
            changes = settings_of(dict(zip(KEYS, chosen, strict=True)))  # options of a sampler follow the sampler
            found.append(pipeline.changed([*self.overrides, *changes], "fastdit sample"))
        return found

    def text(self, axis: str, value) -> str:
        """A value as a label that says what it is: otter, seed 3, guidance 1.5, 20 steps."""
        steps = "1 step" if str(value) == "1" else f"{value} steps"
        forms = {"seed": f"seed {value}", "guidance": f"guidance {value}", "steps": steps}
        short = self.short(axis, value)
        return f"class {short}" if axis == "class" and short.isdigit() else forms.get(axis, short)

    def short(self, axis: str, value) -> str:
        """A value as a label below the name of its axis."""
        if axis == "class":
            names = self.pipeline.classes.names
            return in_letters(names[value], str(value)) if value < len(names) else str(value)
        if axis == "checkpoint":
            return names_of(self.values[axis])[self.values[axis].index(value)]
        return str(value)

    def title(self) -> str:
        """What is the same in the whole picture."""
        settings = self.pipeline.config.sampling
        own = {"guidance": f"{settings.cfg_scale:g}", "steps": settings.steps, "sampler": settings.sampler.name}
        said = ["EMA" if self.weights == "ema" else "no EMA"]
        for axis in ("checkpoint", "sampler", "steps", "guidance", "class", "seed"):
            if axis not in self.varying and (axis != "class" or self.pipeline.config.data.num_classes):
                [value] = self.values[axis]
                said.append(self.text(axis, own[axis] if value is None else value))
        return ", ".join(said)


def read_axes(
    path: str | Path,
    *,
    classes: str | None = None,
    seeds: str | None = None,
    cfg_scale: str | None = None,
    steps: str | None = None,
    samplers: str | None = None,
    checkpoints: str | None = None,
    overrides: Iterable[str] = (),
    seed: int = 0,
    weights: str = "ema",
    device: torch.device | str = "cpu",
) -> Axes:
    """The axes of text such as "otter,zebra", "0-7" or "1,1.5,4"; without it, classes and seeds that suit the others.

    Raises a ValueError for values that the run does not have, or cannot be sampled with.
    """
    given = {"class": classes, "seed": seeds, "guidance": cfg_scale, "steps": steps, "sampler": samplers,
             "checkpoint": checkpoints}  # fmt: skip
    overrides = tuple(overrides)
    values: dict[str, list] = {axis: parts(text, axis) if text else [None] for axis, text in given.items()}
    for axis, key in KEYS.items():
        if given[axis]:
            check_alone(f"--{OPTIONS[axis]}={given[axis]}", key, overrides)
    overrides += tuple(settings_of({axis: values[axis][0] for axis in KEYS}))
    values["checkpoint"] = folders_of(Path(path), values["checkpoint"])
    pipeline = load_pipeline(values["checkpoint"][0], overrides, weights=weights, device=device)
    own = pipeline.classes
    if classes and not own.count:
        raise ValueError(f"--classes={classes}: this network is unconditional; leave it out")
    values["class"] = own.chosen(classes, "--classes") if classes else own.few(FEW)
    if not seeds:
        several = sum(len(values[axis]) > 1 for axis in values)
        values["seed"] = [seed + i for i in range(FEW if several < 2 else 1)]
    for axis, found in values.items():
        if len(set(found)) < len(found):
            raise ValueError(f"--{OPTIONS[axis]}={given[axis]} names something twice; give each value once")
    if (count := math.prod(map(len, values.values()))) > MOST:
        raise ValueError(f"a picture of {count:,} images is too large; choose at most {MOST:,}, or use --num-samples")
    axes = Axes(values, frozenset(axis for axis in given if given[axis]), pipeline, overrides, weights)
    axes.variants(values["checkpoint"][0])  # fails here, not later
    return axes


def settings_of(values: dict[str, str | None]) -> list[str]:
    """The overrides for values of axes; None: the config's own."""
    return [f"{KEYS[axis]}={value}" for axis, value in values.items() if value is not None]


def parts(text: str, axis: str) -> list:
    """The values in "a,b,c"; for seeds also ranges such as 0-7. ValueError for one that is twice there, or empty."""
    option, found = f"--{OPTIONS[axis]}={text}", []
    for part in text.split(","):
        part = part.strip()
        span = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part) if axis == "seed" else None
        if not part or (axis == "seed" and not span):
            kinds = "whole numbers, such as 0-7 or 3,5" if axis == "seed" else "values with commas between"
            raise ValueError(f"{option}: {part!r} is not a value; give {kinds}")
        if span:
            first, last = int(span[1]), int(span[2] or span[1])
            if not 0 <= last - first < MOST:
                raise ValueError(f"{option}: {part} must go up, and over fewer than {MOST} seeds")
            found += range(first, last + 1)
        else:
            found.append(part)
    return found


def names_of(folders: list[Path]) -> list[str]:
    """A label for each checkpoint, such as `step 20`; of several runs with the run's name, and more if that is one."""

    def names(depth: int) -> list[str]:
        found = []
        for folder in folders:
            step = checkpoint.NAME.fullmatch(folder.name)
            parts = folder.parts[:-2] if step else folder.parts
            kind, depth_of = ("run", depth) if step else ("checkpoint", max(depth, 1))
            words = [in_letters("/".join(parts[-depth_of:]), kind)] * bool(depth_of)
            found.append(" ".join([*words, f"step {int(step[1])}"] if step else words))
        return found

    several = len({folder.parent for folder in folders}) > 1
    return told_apart(names, int(several), max(len(folder.parts) for folder in folders))


def folders_of(path: Path, names: list[str | None]) -> list[Path]:
    """The checkpoints that names stand for: step-1000 or 1000 of the run at `path`, or paths; None: `path` itself."""
    own = checkpoint.find(path)
    found = []
    for name in names:
        step = re.fullmatch(r"(?:step-)?(\d{1,18})", name or "")
        folder = own.parent / checkpoint.path_of(Path(), int(step[1])).name if step else Path(name or own)
        if step and not (folder / checkpoint.META).is_file():
            kept = ", ".join(f"step-{checkpoint.step_of(other)}" for other in checkpoint.checkpoints(own.parents[1]))
            raise ValueError(f"--checkpoints: {path} has no step {int(step[1])}, only {kept or 'one without a step'}; "
                             "give one of them, or a path")  # fmt: skip
        found.append(checkpoint.find(folder))
    return found
