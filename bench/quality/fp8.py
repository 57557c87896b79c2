"""The loss with FP8 linears, and with a bf16 residual stream, beside bf16's and other seeds': the quickstart's run.

    python -m bench.quality.fp8                  # real FP8 on a GPU; on a CPU the products are emulated
    python -m bench.quality.fp8 --set training.steps=400 model.variant=DiT-S/2

Lines go to bench/results/fp8.jsonl, the picture to docs/fp8.png. `python -m bench.step --ablation` measures the speed.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import matplotlib

from bench.quality.variants import World
from bench.record import ROOT, record
from fastdit.training.log import read_metrics

COMMON = ["training.precision=bf16", "training.compile=true", "training.checkpoint_every=100000"]
RUNS = {"bf16": [], "fp8": ["training.fp8=true"], "bf16 residual stream": ["training.residual=bf16"],
        "bf16, seed 1": ["seed=1"], "bf16, seed 2": ["seed=2"]}  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--set", nargs="+", default=[], help="overrides of all runs, as training.steps=400")
    arguments = options.parse_args()
    curves = {}
    with tempfile.TemporaryDirectory() as root:
        world = World.make(Path(root))
        for name, change in RUNS.items():
            config, _, figures = world.run([*COMMON, *change, *arguments.set])
            curves[name] = {line["step"]: line["loss"] for line in read_metrics(config.run_dir)}
            losses = {step: round(loss, 4) for step, loss in curves[name].items()}
            record("fp8", ROOT / "bench" / "results", name="fp8.jsonl", run=name, variant=config.model.variant,
                   overrides=arguments.set, losses=losses, **figures)  # fmt: skip
    draw(curves)


def draw(curves: dict[str, dict[int, float]]) -> None:
    """The curves, each with its median difference from the first one."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for (name, curve), style in zip(curves.items(), ("-", "--", "-.", ":", ":"), strict=True):
        apart = statistics.median(abs(curve[step] / loss - 1) for step, loss in curves["bf16"].items())
        axes.plot(list(curve), list(curve.values()), style, label=name + (f", {apart:.1%} from bf16" if apart else ""))
    axes.set(xlabel="step", ylabel="training loss on digits", yscale="log")
    axes.legend()
    figure.savefig(ROOT / "docs" / "fp8.png", dpi=120)


if __name__ == "__main__":
    main()
