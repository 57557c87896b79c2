"""The loss with FP8 linears beside bf16's, on scikit-learn's digits: the quickstart's run, twice, from the same seed.

    python bench/fp8.py                          # on a GPU in FP8 indeed; on a CPU torchao emulates the rounding
    python bench/fp8.py --set training.steps=400 model.variant=DiT-S/2

Lines go to bench/results/fp8.jsonl, the picture to docs/fp8.png. Speed is `bench/step.py --ablation`'s to tell.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
from record import record
from variants import World

from fastdit.config import load_config, shipped_config
from fastdit.evaluation.frechet import frechet_distance
from fastdit.quickstart import SAMPLES
from fastdit.sampling import sample
from fastdit.training.loop import read_metrics, train

ROOT = Path(__file__).parents[1]
RUNS = {"bf16": [], "fp8": ["training.fp8=true"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", nargs="+", default=[], help="overrides of both runs, as training.steps=400")
    arguments = parser.parse_args()
    curves = {}
    with tempfile.TemporaryDirectory() as root:
        world = World.make(Path(root))
        for name, change in RUNS.items():
            places = [f"run_dir={root}/{name}", f"data.shards={root}/latents", f"data.vae={root}/vae"]
            common = ["training.precision=bf16", "training.compile=true", "training.checkpoint_every=100000"]
            config = load_config(shipped_config("quickstart"), [*places, *common, *change, *arguments.set])
            checkpoint = train(config)
            curves[name] = {line["step"]: line["loss"] for line in read_metrics(config.run_dir)}
            images = np.load(sample(checkpoint, Path(root) / f"{name}_samples", SAMPLES) / "samples.npz")["arr_0"]
            record(
                "fp8", file=ROOT / "bench" / "results" / "fp8.jsonl", run=name, variant=config.model.variant,
                steps=config.training.steps, overrides=arguments.set,
                losses={step: round(loss, 4) for step, loss in curves[name].items()},
                accuracy=round(world.judge.accuracy(images, np.arange(SAMPLES) % config.data.num_classes), 4),
                frechet=round(frechet_distance(world.judge.features(images), world.held_features), 3),
            )  # fmt: skip
    apart = statistics.median(abs(curves["fp8"][step] / loss - 1) for step, loss in curves["bf16"].items())
    draw(curves, f"training loss on digits; fp8 {apart:.1%} apart (median)")


def draw(curves: dict[str, dict[int, float]], title: str) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for (name, curve), style in zip(curves.items(), ("-", "--"), strict=True):
        axes.plot(list(curve), list(curve.values()), style, label=name)
    axes.set(title=title, xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    figure.savefig(ROOT / "docs" / "fp8.png", dpi=120)


if __name__ == "__main__":
    main()
