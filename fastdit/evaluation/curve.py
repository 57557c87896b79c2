"""Reference curves: validation losses of runs that went well, to compare another run of the same settings with.

A file holds `settings`, the dotted config keys that it was measured with; `runs`, their number; and `points`, for some
steps: `loss` and `bins` (20 parts of t), each a mean and a standard deviation over the runs. bench/quality/curve.py
writes it. The band is Student's prediction interval: a run with another seed is inside with probability LEVEL. Few runs
give a wide band, since they say little about the deviation.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from fastdit.config import shipped_config, to_tree
from fastdit.evaluation.loss import BINS
from fastdit.files import read_json
from fastdit.schema import Config

LEVEL, LEAST = 0.99, 0.03  # of the band; its half-width as a share of the mean, at least
SECTIONS = ("data", "model", "objective", "training")
COMPARED = ("variant", "name", "time_distribution", "steps", "global_batch", "lr", "ema_decay", "ema_warmup", "hflip",
            "normalize", "dropout", "optimizer", "weight_decay", "route", "align")  # fmt: skip


@dataclass(frozen=True)
class ReferenceCurve:
    """`points`: step -> (mean, standard deviation) of the loss, then of each part of t: (1 + BINS, 2)."""

    name: str
    runs: int
    points: dict[int, np.ndarray]
    unlike: tuple[str, ...] = ()  # settings of the curve that a run does not have

    @classmethod
    def load(cls, path: str, config: Config) -> "ReferenceCurve":
        """The file at `path`, or an included one of that name (`quickstart`); ValueError if it is not a curve."""
        file = curve_file(path)
        try:
            stored = read_json(file)
            points = {int(p["step"]): np.array([p["loss"], *p["bins"]], float) for p in stored["points"]}
            own, settings, runs = settings_of(config), dict(stored["settings"]), int(stored["runs"])
            if not points or any(values.shape != (1 + BINS, 2) for values in points.values()) or runs < 2:
                raise ValueError("it has no points, or fewer than two runs")
        except FileNotFoundError:
            raise ValueError(f"training.loss_reference={path} does not exist; give a file of bench/quality/curve.py or "
                             "an included one: quickstart") from None  # fmt: skip
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"training.loss_reference={path} is not a reference curve: {error}") from None
        unlike = tuple(f"{key}={value}" for key, value in settings.items() if own.get(key) != value)
        return cls(file.stem.removesuffix("_curve"), runs, points, unlike)

    def compare(self, step: int, loss: float, bins: list[float]) -> str:
        """Whether the validation loss at `step` is inside the band, in words; "" for a step that the curve lacks."""
        if step not in self.points:
            return ""
        mean, deviation = self.points[step].T
        quantile = stdtrit(self.runs - 1, (1 + LEVEL) / 2) * math.sqrt(1 + 1 / self.runs)
        half = np.fmax(quantile * deviation, LEAST * np.abs(mean))
        off = (np.array([loss, *bins], float) - mean) / half  # outside [-1, 1] is outside the band
        whose = f"the band of {self.name} ({self.runs} runs)"
        wrong = [f"{k / BINS:.2f}-{(k + 1) / BINS:.2f}" for k, value in enumerate(off[1:]) if abs(value) > 1]
        if not abs(off[0]) <= 1:
            side = "above" if off[0] > 1 else "below" if off[0] < -1 else "outside"
            return f"{side} {whose}, which is {mean[0]:.4f} +- {half[0]:.4f}"
        return f"inside {whose}" + (f", except at t = {', '.join(wrong)}" if wrong else "")


def curve_file(path: str) -> Path:
    """`path` itself, or the included curve of that name."""
    included = shipped_config("any").parent / f"{path}_curve.json"
    return included if Path(path).name == path and included.is_file() else Path(path)


def settings_of(config: Config) -> dict[str, Any]:
    """The settings that a curve depends on most, by dotted key."""
    trees = {section: to_tree(getattr(config, section)) for section in SECTIONS}
    return {f"{s}.{key}": tree[key] for s, tree in trees.items() for key in COMPARED if key in tree}
