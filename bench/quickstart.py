"""The quickstart's time from images to report, by stage, and what its samples are worth; each seed in turn.

    python bench/quickstart.py --out results          # three seeds, some seven minutes on two cores
"""

import argparse
import tempfile
from pathlib import Path

from record import record

from fastdit.quickstart import quickstart

KEPT = ("seed", "class_accuracy", "judge_accuracy_on_real", "frechet_distance", "final_loss", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("override", nargs="*", help="of the quickstart's configuration, training.steps=100")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="folder of results.jsonl (appended to)")
    arguments = parser.parse_args()
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "quickstart"
            report = quickstart(out, seed=seed, overrides=arguments.override, say=lambda _: None)
        file = arguments.out and arguments.out / "results.jsonl"
        record("quickstart", file=file, **{key: report[key] for key in KEPT}, overrides=arguments.override)


if __name__ == "__main__":
    main()
