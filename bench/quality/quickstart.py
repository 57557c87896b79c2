"""The quickstart's time from images to report, by stage, and the quality of its samples; each seed in turn.

    python -m bench.quality.quickstart --out results          # three seeds, about seven minutes on two cores
"""

import tempfile
from pathlib import Path

from bench.record import parser, record
from fastdit.quickstart import quickstart

KEPT = ("seed", "class_accuracy", "judge_accuracy_on_real", "frechet_distance", "final_loss", "seconds")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("override", nargs="*", help="of the quickstart's configuration, like training.steps=100")
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = options.parse_args()
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "quickstart"
            report = quickstart(out, seed=seed, overrides=arguments.override, say=lambda _: None)
        record("quickstart", arguments.out, **{key: report[key] for key in KEPT}, overrides=arguments.override)


if __name__ == "__main__":
    main()
