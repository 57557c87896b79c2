"""The quickstart's time from images to report, by stage, and the quality of its samples; each seed in turn.

    python -m bench.quality.quickstart --out results          # three seeds, about six minutes on two cores
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.record import ROOT, parser, record

KEPT = ("seed", "class_accuracy", "judge_accuracy_on_real", "frechet_distance", "final_loss", "seconds")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("override", nargs="*", help="of the quickstart's configuration, like training.steps=100")
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = options.parse_args()
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            out, start = Path(folder) / "quickstart", time.perf_counter()
            command = ["-m", "fastdit.cli", "quickstart", "--out", str(out), "--seed", str(seed), *arguments.override]
            subprocess.run([sys.executable, *command], cwd=ROOT, stdout=sys.stderr, check=True)
            seconds = round(time.perf_counter() - start, 2)  # with the imports and the page
            report = json.loads((out / "report.json").read_text())
        kept = {key: report[key] for key in KEPT}
        record("quickstart", arguments.out, **kept, command_s=seconds, overrides=arguments.override)


if __name__ == "__main__":
    main()
