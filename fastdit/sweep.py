"""`fastdit evaluate RUN --sweep`: one measurement per combination of sampling settings, as a table and a plot."""

import itertools
import math
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from fastdit.config import check_alone, config_from, to_tree
from fastdit.distributed import Ranks
from fastdit.evaluation.evaluate import check_options, load_reference, measure
from fastdit.evaluation.features import load_features
from fastdit.evaluation.generated import generated
from fastdit.evaluation.images import ImageSet
from fastdit.evaluation.metrics import METRICS
from fastdit.evaluation.protocol import aligned, find_result, real_distance, remarks, shown, title
from fastdit.files import append_json, replacing
from fastdit.registry import check
from fastdit.sampling import load_pipeline
from fastdit.schema import Config, SamplingConfig

WEIGHTS = ("ema", "model")
WHEN_LOADED = ("weights", "weak_checkpoint", "precision", "compile")  # the network depends on them
Point = dict[str, str]  # a value of every key that is swept


def points(words: Iterable[str]) -> list[Point]:
    """Every combination of words such as "cfg_scale=1,1.5" and "weights=ema,model"; the last key varies fastest.

    Commas in brackets are part of a value: "cfg_interval=[0,0.6],[0,1]".
    """
    known, axes = ["weights", *(field.name for field in fields(SamplingConfig))], {}
    for word in words:
        key, sign, values = word.removeprefix("sampling.").partition("=")
        if not sign or not values or key in axes:
            again = "repeats a key" if key in axes else "is not of the form key=value,value"
            raise ValueError(f"--sweep {word} {again}; use, for example, --sweep cfg_scale=1,1.5,2 steps=20,50")
        check(key.partition(".")[0], known, "--sweep")
        axes[key] = re.split(r",(?![^\[{]*[]}])", values)
    for value in axes.get("weights", ()):
        check(value, WEIGHTS, "--sweep weights")
    return [dict(zip(axes, chosen, strict=True)) for chosen in itertools.product(*axes.values())]


def samples_of(
    run: str, device: torch.device, chosen: Sequence[Point] = ({},), *, num_samples: int | None, seed: int = 0,
    labels: str | None = None, weights: str | None = None, overrides: Iterable[str] = (),
) -> list[ImageSet]:  # fmt: skip
    """For each point, the images that `fastdit sample` would write. Every mistake is found before the first is made."""
    if num_samples is None:
        raise ValueError(f"SAMPLES={run} is a run: say how many samples with --num-samples, such as 10000")
    pipelines, found, overrides, lines = {}, [], list(overrides), {}  # lines: each once, in order
    for key in chosen[0]:
        check_alone(f"--sweep {key}=...", f"sampling.{key}", overrides)
    if weights and "weights" in chosen[0]:
        raise ValueError(f"--weights={weights} and --sweep weights=... are the same; give one")
    for point in chosen:  # values of the wrong kind, before anything is loaded
        config_from(to_tree(Config()), "--sweep", overrides_of(point))
    for point in chosen:
        settings = [*overrides, *overrides_of(point)]  # options of a sampler follow the sampler
        loaded = tuple(point.get(key) for key in WHEN_LOADED)
        if loaded not in pipelines:
            kind = point.get("weights") or weights or "ema"
            pipelines[loaded] = load_pipeline(run, settings, weights=kind, device=device)
        pipeline = pipelines[loaded].changed(settings, "--sweep")
        lines |= dict.fromkeys(pipeline.remarks())
        found.append(generated(pipeline, num_samples, seed, labels))
    for line in lines if os.environ.get("RANK", "0") == "0" else ():
        print(f"warning: {line}", file=sys.stderr)
    return found


def overrides_of(point: Point) -> list[str]:
    return [f"sampling.{key}={value}" for key, value in point.items() if key != "weights"]


def sweep(
    chosen: Sequence[Point],
    images: Sequence[ImageSet],
    reference: str | Path,
    ranks: Ranks,
    *,
    features: str = "efficientnet-lite0",
    metrics: Sequence[str] | None = None,
    image_size: str | None = None,
    seed: int = 0,
    save_reference: str | None = None,
    out: str | None = None,
) -> list[dict[str, Any]]:
    """The result of `measure` for the images of each point, on the main process, and one line of each in `out`.

    A measurement that `out` already has is not repeated.
    """
    check_options(metrics, save_reference)
    extractor, results = load_features(features, ranks.device), []
    real = load_reference(reference, images[0].size, extractor, ranks, image_size, save_reference)
    for i, (point, these) in enumerate(zip(chosen, images, strict=True)):
        done = out and ranks.is_main and find_result(out, these, real.about, extractor, seed, metrics or METRICS)
        if not ranks.any(bool(done)):
            if ranks.is_main:
                print(f"[{i + 1}/{len(chosen)}] {words(point)}", file=sys.stderr)
            done = measure(these, real, ranks, extractor=extractor, metrics=metrics, seed=seed)
            if out and ranks.is_main:
                append_json(out, done)
        results.append(done)
    for line in remarks(results[0]) if ranks.is_main else ():
        print(line, file=sys.stderr)
    return results


def words(point: Point) -> str:
    """A point as one types it."""
    return " ".join(f"{key}={value}" for key, value in point.items())


def table(chosen: Sequence[Point], results: Sequence[dict[str, Any]]) -> str:
    """A row of values for each point, the point of the smallest distance, and that between real images."""
    keys = [key for key in results[0]["values"] if not key.endswith("_error")]
    keys = [key for key in keys if all(key in result["values"] for result in results)]
    rows = [[*chosen[0], *(title(key, results[0]) for key in keys)]]
    for point, result in zip(chosen, results, strict=True):
        rows.append([*point.values(), *(shown(key, result) for key in keys)])
    lines = [aligned(rows)]
    if "frechet" in keys:
        best = min(range(len(results)), key=lambda i: results[i]["values"]["frechet"])
        value = shown("frechet", results[best])
        lines.append(f"smallest {results[0]['distance']}: {value} at {words(chosen[best])}")
        if results[0]["real"]:
            lines.append(f"real against real: {real_distance(results[0])}")
    return "\n".join(lines)


def plot(chosen: Sequence[Point], results: Sequence[dict[str, Any]], path: Path) -> None:
    """A PNG of the first value over the first key with several values, with a line for each choice of the others.

    Bars show its standard error where that is known.
    """
    from matplotlib.figure import Figure

    x_key = next((key for key in chosen[0] if len({point[key] for point in chosen}) > 1), next(iter(chosen[0])))
    y_key, lines = next(iter(results[0]["values"])), {}
    for point, result in zip(chosen, results, strict=True):
        others = words({key: value for key, value in point.items() if key != x_key})
        error = result["values"].get(f"{y_key}_error", math.nan)
        lines.setdefault(others, []).append((point[x_key], result["values"][y_key], error))
    numeric = all(re.fullmatch(r"[-+.\de]+", point[x_key]) for point in chosen)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for label, found in lines.items():
        x, y, errors = zip(*sorted((float(x), *rest) for x, *rest in found) if numeric else found, strict=True)
        axes.errorbar(x, y, errors, fmt="o-", capsize=3, label=label or None)
    if y_key == "frechet" and (real := results[0]["real"]):
        counts = f"{real['num_images']} against {real['reference_images']}"
        axes.axhline(real["frechet"], color="gray", ls="--", label=f"real against real ({counts} images)")
    axes.set(xlabel=x_key, ylabel=f"{title(y_key, results[0])} of {results[0]['protocol']['num_images']} samples")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=150)
