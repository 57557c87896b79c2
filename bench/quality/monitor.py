"""What validation, samples and evaluations during training cost, on digits: seconds of each, and their share.

    python -m bench.quality.monitor --out results training.steps=600 training.evaluate_images=500
Two runs, with and without: the losses must be equal.
"""

import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

from bench.record import parser, record, significant
from fastdit.autoencoder.config import AutoencoderConfig
from fastdit.autoencoder.network import build_autoencoder
from fastdit.config import load_config
from fastdit.data.extract import extract_features
from fastdit.quickstart.digits import write_digits
from fastdit.training.log import read_metrics, read_records
from fastdit.training.loop import train

KINDS = ("validate", "sample", "evaluate")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("override", nargs="*", help="of the quickstart's configuration")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as name, redirect_stdout(sys.stderr):
        root, seconds, losses = Path(name), {}, {}
        write_digits(root, 32)
        network = load_config("vae_digits", schema=AutoencoderConfig).model
        build_autoencoder(network, 32, seed=0).save_pretrained(root / "vae")
        for images in ("images", "held_out"):
            extract_features(images=root / images, out=root / f"{images}_latents", vae=root / "vae", image_size=32)
        common = [f"data.shards={root}/images_latents", f"data.val_shards={root}/held_out_latents",
                  f"data.vae={root}/vae", f"training.reference={root}/held_out", "training.evaluate_images=100",
                  "training.steps=300", "training.report=false", *arguments.override]  # fmt: skip
        for run, every in (("with", 100), ("without", 0)):
            keys = [f"training.{kind}_every={every}" for kind in KINDS]
            start = time.perf_counter()
            config = load_config("quickstart", [f"run_dir={root / run}", *common, *keys])
            train(config)
            seconds[run] = time.perf_counter() - start
            losses[run] = [r["loss"] for r in read_metrics(root / run)]
        assert losses["with"] == losses["without"]
        events = [r for r in read_records(root / "with" / "metrics.jsonl") if "monitor_s" in r]
        steps = [r["steps_per_s"] for r in read_metrics(root / "with")]
    each = {f"{kind}_s": significant(statistics.median(r[f"{kind}_s"] for r in events)) for kind in KINDS}
    settings = config.training
    step_s = 1 / statistics.median(steps)
    record("monitor", arguments.out, **each, step_s=significant(step_s),
           steps_that_cost_the_same={kind: round(each[f"{kind}_s"] / step_s) for kind in KINDS},
           share_every_100_steps={kind: round(each[f"{kind}_s"] / (100 * step_s + each[f"{kind}_s"]), 3)
                                  for kind in KINDS},
           seconds={run: significant(value) for run, value in seconds.items()}, steps=settings.steps,
           validate_images=settings.validate_images, sample_images=settings.sample_images,
           evaluate_images=settings.evaluate_images, features=settings.evaluate_features,
           losses_equal=True, overrides=arguments.override)  # fmt: skip


if __name__ == "__main__":
    main()
