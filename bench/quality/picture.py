"""The README's picture, docs/samples.png: a small network trained on frames of games, one class per row.

    python -m bench.quality.frames --out procgen # the data set and its autoencoder
    python -m bench.quality.picture --data procgen               # trains in DATA/picture, or samples what is there
"""

import argparse
from pathlib import Path

from bench.record import ROOT
from fastdit.config import load_config
from fastdit.sampling import grid, sample
from fastdit.training.loop import train

CLASSES = ("bigfish", "caveflyer", "chaser", "dodgeball", "heist", "leaper", "maze", "plunder")  # the best of 16
COLUMNS = 12
SETTINGS = [
    "model.variant=DiT-6x192x3/2", "objective={name: flow, time_distribution: logit_normal}", "data.hflip=false",
    "training={steps: 3200, global_batch: 32, lr: 1e-3, warmup_steps: 100, lr_schedule: linear, ema_decay: 0.997, "
    "ema_warmup: true, precision: bf16, compile: false, checkpoint_every: 1000}",
    "sampling={sampler: heun, steps: 25, cfg_scale: 1.75}",
]  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=Path("procgen"), help="the folder that bench.quality.frames made")
    options.add_argument("--classes", default=",".join(CLASSES), help="rows of the picture")
    options.add_argument("--set", nargs="+", default=[], help="overrides, as training.steps=500")
    given = options.parse_args()
    places = [f"run_dir={given.data}/picture", f"data.shards={given.data}/latents"]
    config = load_config("sit_s_2", [*SETTINGS, *places, *given.set])
    if not Path(config.run_dir).is_dir():
        train(config)
    classes, folder = given.classes.split(","), given.data / "picture_samples"
    count = COLUMNS * len(classes)
    sample(config.run_dir, folder, count, labels=given.classes)
    sheet = grid(folder, [i % len(classes) for i in range(count)], len(classes), COLUMNS)
    sheet.quantize(256).save(ROOT / "docs" / "samples.png", optimize=True)


if __name__ == "__main__":
    main()
