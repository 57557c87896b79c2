"""The loss with FP8 linears, and with a bf16 residual stream, beside bf16's and other seeds': the quickstart's run.

    python -m bench.quality.fp8                  # real FP8 on a GPU; on a CPU the products are emulated
    python -m bench.quality.fp8 --config dit_s_2 --set data.shards=LATENTS training.steps=300 training.log_every=10

With --config, that config is trained on one's own latents, without samples and picture. Lines go to
bench/results/fp8.jsonl, the picture to docs/fp8.png. `python -m bench.step --ablation` measures the speed.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import matplotlib

from bench.quality.variants import World
from bench.record import ROOT, record
from fastdit.config import load_config, shipped_config
from fastdit.training.log import read_metrics
from fastdit.training.loop import train

COMMON = ["training.precision=bf16", "training.compile=true", "training.checkpoint_every=100000"]
RUNS = {"bf16": [], "fp8": ["training.fp8=true"], "bf16 residual stream": ["training.residual=bf16"],
        "bf16, seed 1": ["seed=1"], "bf16, seed 2": ["seed=2"]}  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--config", help="instead of the quickstart's")
    options.add_argument("--runs", nargs="+", choices=RUNS, default=[*RUNS])
    options.add_argument("--set", nargs="+", default=[], help="overrides of all runs, as training.steps=400")
    arguments = options.parse_args()
    curves = {}
    with tempfile.TemporaryDirectory() as root:
        world = None if arguments.config else World.make(Path(root))
        for name in arguments.runs:
            overrides = [*COMMON, *RUNS[name], *arguments.set]
            if world:
                config, _, figures = world.run(overrides)
            else:
                config = load_config(shipped_config(arguments.config), [f"run_dir={root}/{len(curves)}", *overrides])
                train(config)
                figures = {"batch": config.training.global_batch}
            curves[name] = {line["step"]: line["loss"] for line in read_metrics(config.run_dir)}
            losses = {step: round(loss, 4) for step, loss in curves[name].items()}
            record("fp8", ROOT / "bench" / "results", name="fp8.jsonl", run=name, variant=config.model.variant,
                   overrides=arguments.set, losses=losses, **figures)  # fmt: skip
    if world and "bf16" in curves:
        draw(curves)


def draw(curves: dict[str, dict[int, float]]) -> None:
    """The curves, each with its median difference from the first one."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for (name, curve), style in zip(curves.items(), ("-", "--", "-.", ":", ":"), strict=False):
        apart = statistics.median(abs(curve[step] / loss - 1) for step, loss in curves["bf16"].items())
        axes.plot(list(curve), list(curve.values()), style, label=name + (f", {apart:.1%} from bf16" if apart else ""))
    axes.set(xlabel="step", ylabel="training loss on digits", yscale="log")
    axes.legend()
    figure.savefig(ROOT / "docs" / "fp8.png", dpi=120)


if __name__ == "__main__":
    main()
