"""The validation losses of the quickstart over several seeds: the reference curve that its log compares a run with.

python -m bench.quality.curve --seeds 0,1,2,3,4,5 --out configs/quickstart_curve.json
Each seed has its own autoencoder, latents and training, as users' runs have.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from fastdit.config import load_config
from fastdit.environment import commit, hardware
from fastdit.evaluation.curve import settings_of
from fastdit.training.log import read_records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2,3,4,5", help="two or more")
    parser.add_argument("--out", default="configs/quickstart_curve.json")
    arguments = parser.parse_args()
    runs = []
    for seed in arguments.seeds.split(","):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "fastdit.cli", "quickstart", "--out", f"{folder}/quickstart"]
            subprocess.run([*command, "--seed", seed, "training.loss_reference=''"], check=True)
            records = read_records(Path(folder) / "quickstart/run/metrics.jsonl")
        runs.append({record["step"]: record for record in records if "val_loss" in record})
    points = []
    for step in runs[0]:
        values = np.array([[run[step]["val_loss"], *run[step]["val_bins"]] for run in runs])  # (runs, 1 + BINS)
        loss, *bins = np.stack([values.mean(0), values.std(0, ddof=1)], 1).round(6).tolist()
        points.append({"step": step, "loss": loss, "bins": bins})
    curve = {
        "settings": settings_of(load_config("quickstart")),
        "runs": len(runs),
        "seeds": arguments.seeds,
        "commit": commit(),
        "hardware": hardware(torch.device("cpu")),
        "date": time.strftime("%Y-%m-%d"),
        "points": points,
    }
    head = json.dumps({key: value for key, value in curve.items() if key != "points"}, indent=1)
    lines = ",\n".join(f"  {json.dumps(point)}" for point in points)
    Path(arguments.out).write_text(f'{head[:-2]},\n "points": [\n{lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
