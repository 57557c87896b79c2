"""Training methods against each other on frames of games: quality against images seen and against seconds.

    python -m bench.quality.frames --out procgen                     # once: the data set
    python -m bench.quality.methods --data procgen --seeds 0 1 2     # every method; hours in bench/README.md
    python -m bench.quality.methods --data procgen --size gpu --only baseline modern
    python -m bench.quality.methods --data procgen --rates           # images/s of all, side by side
    python -m bench.quality.methods --table                          # write docs/convergence.md again

All methods of a seed see the same images in the same order. At two or four points of a run its EMA makes samples
without guidance, whose distance to held-out frames is measured in the features of EfficientNet-Lite0; the validation
loss is the mean over equal parts of t, so that it does not depend on the times that a method trains with. Seconds are
images by the rate of --rates, where it was measured, so that other work on the machine does not decide. Lines go to
bench/results/methods.jsonl, the table and the plot to docs/.
A new method is a line of METHODS.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch

from bench.quality.frames import read_set
from bench.record import ROOT, markdown, record, rotate
from fastdit.config import load_config
from fastdit.data.images import to_pixels, to_uint8
from fastdit.data.latents import LatentCodec
from fastdit.data.order import permutation
from fastdit.distributed import init
from fastdit.evaluation.evaluate import evaluate
from fastdit.training.log import read_metrics, read_records
from fastdit.training.loop import train
from fastdit.training.state import load_network

RESULTS, DOCS = ROOT / "bench" / "results" / "methods.jsonl", ROOT / "docs" / "convergence.md"
BASELINE, FLOOR, RATE = "baseline", "real images", "rate"
MODERN = ["model.norm=rms", "model.mlp=swiglu", "model.position=sincos_rope", "model.qk_norm=rms",
          "objective.time_distribution=logit_normal"]  # fmt: skip
MUON = ["training.optimizer=muon", "training.cuda_graph=false"]
METHODS: dict[str, list[str]] = {
    BASELINE: [],
    "modern": MODERN,
    "layersync": ["training.align=[layersync]"],
    "sra2": ["training.align=[sra2]"],
    "repa": ["training.align=[{name: repa, width: 512}]"],
    "reg": ["model.class_token=1280", "training.align=[{name: repa, width: 512}]"],
    "routing": ["training.route=0.5", "training.route_ends=[1,1]"],
    "muon": MUON,
    "modern, muon": [*MODERN, *MUON],
}
COMMON = [
    "objective=flow", "data.hflip=false", "training.ema_warmup=true", "training.report=false",
    "sampling={sampler: dpmpp_2m, steps: 20, cfg_scale: 1}",
]  # fmt: skip
SIZES: dict[str, list[str]] = {  # a run and its measurements take at most 10 minutes of two cores, 90 s of a GPU
    "cpu": ["model.variant=DiT-6x192x3/4", "training={steps: 1600, global_batch: 64, lr: 1e-3, warmup_steps: 100, "
            "ema_decay: 0.995, precision: bf16, compile: false, log_every: 50}"],
    "cpu_lr": ["model.variant=DiT-6x192x3/4", "training={steps: 800, global_batch: 64, lr: 4e-3, warmup_steps: 100, "
               "ema_decay: 0.995, precision: bf16, compile: false, log_every: 50}"],  # at the baseline's best rate
    "gpu": ["model.variant=DiT-S/2", "training={steps: 4000, global_batch: 256, lr: 5e-4, warmup_steps: 200, "
            "ema_decay: 0.998, precision: bf16, compile: true, cuda_graph: true, log_every: 100}"],
}  # fmt: skip
SAMPLES = {"cpu": 800, "cpu_lr": 800, "gpu": 3200}
POINTS = {"cpu": 4, "cpu_lr": 2, "gpu": 4}  # at which a run is measured


def reference(data: Path, samples: np.ndarray | None = None) -> Path | dict[str, float]:
    """The file with the features of the held-out frames; with samples uint8 (N, H, W, 3): their distances to them."""
    kept, ranks = data / "held_out.npz", init()
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/samples.npz", arr_0=read_set(data / "held_out.tar", 100)[0] if samples is None else samples)
        if not kept.is_file():
            evaluate(f"{folder}/samples.npz", data / "held_out.tar", ranks, metrics=["kid"], save_reference=str(kept))
        return kept if samples is None else figures(evaluate(f"{folder}/samples.npz", kept, ranks)["values"])


def figures(values: dict[str, float]) -> dict[str, float]:
    return {name: round(values[name], 6) for name in ("frechet", "kid", "kid_error")}


def floor(data: Path, count: int) -> dict[str, dict[str, float]]:
    """What `count` training frames score, as they are and through the autoencoder: no sample can do much better."""
    images = read_set(data / "train.tar")[0]
    images = images[permutation(0, 0, len(images))[:count]]
    codec, device = LatentCodec.load(data / "vae"), init().device
    codec = codec.to(torch.float32, device)
    decoded = []
    for pixels in to_pixels(torch.from_numpy(images)).split(64):
        mean = codec.encode(pixels.to(device)).chunk(2, dim=1)[0]
        decoded.append(to_uint8(codec.decode(mean * codec.scale)).cpu())
    return {"real": reference(data, images), "autoencoder": reference(data, torch.cat(decoded).numpy())}


def seconds_of(metrics: Sequence[dict], global_batch: int) -> dict[int, float]:
    """Seconds of training until each logged step, without measurements."""
    seconds, before, found = 0.0, 0, {}
    for line in metrics:
        seconds += (line["step"] - before) * global_batch / line["images_per_s"]
        before = line["step"]
        found[before] = seconds
    return found


def run(method: str, seed: int, size: str, data: Path, changes: Sequence[str] = ()) -> dict:
    """Train one method, which measures itself at POINTS[size] steps; the contents of its line."""
    with tempfile.TemporaryDirectory() as root:
        overrides = [
            *SIZES[size], *COMMON, *METHODS[method], f"seed={seed}", f"run_dir={root}/run",
            f"data.shards={data}/latents", f"data.val_shards={data}/held", f"training.reference={reference(data)}",
            f"training.evaluate_images={SAMPLES[size]}", *changes,
        ]  # fmt: skip
        settings = load_config("sit_s_2", overrides).training
        every = -(-settings.steps // POINTS[size])
        keys = ("validate_every", "evaluate_every", "checkpoint_every")
        config = load_config("sit_s_2", [*overrides, *(f"training.{key}={every}" for key in keys)])
        last = train(config)
        records = read_records(Path(config.run_dir) / "metrics.jsonl")
        seconds = seconds_of(read_metrics(config.run_dir), settings.global_batch)
        points = [
            {"images": r["step"] * settings.global_batch, "seconds": round(seconds[r["step"]], 1),
             "loss": round(statistics.fmean(r["val_bins"]), 4),
             **figures({name.removeprefix("eval_"): value for name, value in r.items()})}
            for r in records if "eval_frechet" in r
        ]  # fmt: skip
        parameters = load_network(last).model.parameter_count()
    return {"size": size, "method": method, "seed": seed, "overrides": METHODS[method], "changes": list(changes),
            "samples": settings.evaluate_images, "parameters": parameters, "points": points}  # fmt: skip


def rates(size: str, data: Path, methods: Sequence[str], changes: Sequence[str] = (), rounds: int = 3) -> dict:
    """Images/s of the methods, by turns in short runs: the median of all but the first log line of each."""

    def rate(method: str) -> float:
        with tempfile.TemporaryDirectory() as root:
            short = ["training.steps=60", "training.log_every=15", "training.validate_every=0"]
            config = load_config("sit_s_2", [*SIZES[size], *COMMON, *METHODS[method], f"run_dir={root}/run",
                                             f"data.shards={data}/latents", *short, *changes])  # fmt: skip
            train(config)
            return statistics.median(line["images_per_s"] for line in read_metrics(config.run_dir)[1:])

    found = rotate({method: partial(rate, method) for method in methods}, rounds)
    return {method: round(statistics.median(each), 1) for method, each in found.items()}


def newest_lines() -> dict[tuple, dict]:
    """The last line of each size, method and seed, with the seconds by the rates that were measured side by side."""
    text = RESULTS.read_text() if RESULTS.is_file() else ""
    lines = {(line["size"], line["method"], line["seed"]): line for line in map(json.loads, text.splitlines())}
    for (size, method, _), line in lines.items():
        rate = lines.get((size.removesuffix("_lr"), RATE, 0), {"rates": {}})["rates"].get(method)  # of the same step
        for point in line.get("points", []) if rate else []:
            point["seconds"] = point["images"] / rate
    return lines


def reached(points: Sequence[dict], distance: float) -> float | None:
    """Seconds until the distance was as small as `distance`, on a line between two points; None if it never was."""
    for a, b in zip(points, points[1:], strict=False):
        if b["frechet"] <= distance <= a["frechet"]:
            share = (a["frechet"] - distance) / (a["frechet"] - b["frechet"])
            return a["seconds"] + share * (b["seconds"] - a["seconds"])
    return points[0]["seconds"] if points[0]["frechet"] <= distance else None


def means(runs: Sequence[dict]) -> list[dict]:
    """The points of several seeds, averaged."""
    every = zip(*(line["points"] for line in runs), strict=True)
    return [{key: statistics.fmean(point[key] for point in points) for key in points[0]} for points in every]


def table(size: str, lines: dict[tuple, dict]) -> str:
    """Markdown of the last points: mean over the seeds, and the range of the distance."""
    rows = [["method", "seeds", "images", "seconds", "distance", "range", "KID x 1000", "validation loss",
             "seconds to the baseline's distance"]]  # fmt: skip
    by_method = {method: [line for (s, m, _), line in lines.items() if (s, m) == (size, method)] for method in METHODS}
    goal = means(by_method[BASELINE])[-1]["frechet"] if by_method[BASELINE] else None
    for method, runs in by_method.items():
        if runs:
            points, last = means(runs), [line["points"][-1]["frechet"] for line in runs]
            end, seconds = points[-1], reached(points, goal) if goal else None
            rows.append([method, len(runs), f"{end['images']:,.0f}", f"{end['seconds']:.0f}", f"{end['frechet']:.2f}",
                         f"{min(last):.2f} to {max(last):.2f}", f"{1000 * end['kid']:.2f}", f"{end['loss']:.4f}",
                         "never" if seconds is None else f"{seconds:.0f}"])  # fmt: skip
    floor = lines.get((size, FLOOR, 0))
    for name, values in (floor["floor"] if floor else {}).items():
        title = {"real": "training frames", "autoencoder": "training frames, decoded"}[name]
        rows.append([title, "", "", "", f"{values['frechet']:.2f}", "", f"{1000 * values['kid']:.2f}", "", ""])
    return markdown(rows, "---:")


def plot(size: str, lines: dict[tuple, dict], file: Path) -> None:
    """Distance against images and against seconds: a thin line a seed, a thick one for their mean."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4.5), sharey=True, layout="constrained")
    for number, method in enumerate(METHODS):
        runs = [line["points"] for (s, m, _), line in lines.items() if (s, m) == (size, method)]
        for axis, key, unit in zip(axes, ("images", "seconds"), (1000, 1), strict=True):
            for points, style in [(run, {"lw": 0.6}) for run in runs if len(runs) > 1] + (
                [(means([{"points": run} for run in runs]), {"marker": ".", "label": method})] if runs else []
            ):
                axis.plot([p[key] / unit for p in points], [p["frechet"] for p in points], f"C{number}", **style)
    if floor := lines.get((size, FLOOR, 0)):
        for axis in axes:
            best = floor["floor"]["autoencoder"]["frechet"]
            axis.axhline(best, color="gray", ls=":", label="training frames, decoded")
    axes[0].set(xlabel="thousand images seen", ylabel="Frechet distance (EfficientNet-Lite0)")
    axes[1].set(xlabel="seconds of training")
    axes[1].legend(fontsize=8)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def write_tables() -> None:
    """Write the tables between their marks in docs/convergence.md, and the plots beside it."""
    lines, text = newest_lines(), DOCS.read_text()
    for size in SIZES:
        if any(key[0] == size for key in lines):
            head, _, rest = text.partition(f"<!-- {size} -->\n")
            tail = rest.partition("<!-- end -->")[2]
            text = f"{head}<!-- {size} -->\n{table(size, lines)}<!-- end -->{tail}"
            plot(size, lines, DOCS.with_name(f"convergence_{size}.png"))
    DOCS.write_text(text)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=Path("procgen"), help="the folder that bench.quality.frames made")
    options.add_argument("--size", choices=[*SIZES], default="cpu")
    options.add_argument("--only", nargs="+", choices=[*METHODS], default=[*METHODS], help="methods")
    options.add_argument("--seeds", nargs="+", type=int, default=[0])
    options.add_argument("--set", nargs="+", default=[], help="overrides of every run, as training.steps=500")
    options.add_argument("--rates", action="store_true", help="only measure images/s of the methods, side by side")
    options.add_argument("--table", action="store_true", help="train nothing")
    given = options.parse_args()
    if given.rates:
        found = rates(given.size, given.data, given.only, given.set)
        record("methods", RESULTS.parent, name=RESULTS.name, size=given.size, method=RATE, seed=0, rates=found)
    elif not given.table:
        if (given.size, FLOOR, 0) not in newest_lines():
            found = floor(given.data, SAMPLES[given.size])
            record("methods", RESULTS.parent, name=RESULTS.name, size=given.size, method=FLOOR, seed=0, floor=found)
        for seed in given.seeds:
            for method in given.only:
                line = run(method, seed, given.size, given.data, given.set)
                record("methods", RESULTS.parent, name=RESULTS.name, **line)
                write_tables()
    write_tables()


if __name__ == "__main__":
    main()
