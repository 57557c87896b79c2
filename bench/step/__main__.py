"""Training steps per second: fastdit beside the public recipes, on the same work, in one run, in rotation.

A step is everything from a batch of moments in pinned host memory to updated weights and EMA: transfer, posterior
sample, noise, label dropout, DDPM's learned-range loss, backward, optimizer, EMA. Every contestant must first pass a
gate: from the same weights and inputs the same losses, step after step, within the noise of its dtype, as the plain
network in fp32. Each round gives every contestant a turn in a process of its own; ratios are formed within a round.

    python -m bench.step                     # the small model on a CPU, DiT-XL/2 at batch 256 on a GPU
    python -m bench.step --size S/2 --batch 64 --contestants strong fastdit --profile --out results
    python -m bench.step --ablation          # fastdit, and fastdit with one thing changed at a time
    python -m bench.step --engines           # fastdit, and under DDP and ZeRO-1, 2, 3 in a process group of one
    python -m bench.step --reference-repo ~/DiT ~/fast-DiT      # their models.py instead of the plain network
"""

import os
import sys
import tempfile
from pathlib import Path

import torch

from bench.record import about, parser, record
from bench.step.cases import CONTESTANTS, SIZES, cases_of, config_of
from bench.step.contest import Processes, compete, fill_caches
from bench.step.report import chart, figures, fitting, table


def main() -> None:
    options, on_gpu = parser(__doc__), torch.cuda.is_available()
    options.add_argument("override", nargs="*", help="of fastdit's configuration, like training.compile=false")
    options.add_argument("--device", default="cuda" if on_gpu else "cpu")
    options.add_argument("--size", choices=SIZES, default="XL/2" if on_gpu else "small")
    options.add_argument("--batch", type=int, help="images per step (halved until they fit)")
    options.add_argument("--contestants", nargs="+", metavar="NAME",
                         help=f"some of {', '.join(CONTESTANTS)}, or of the ablation or engines")  # fmt: skip
    options.add_argument("--ablation", action="store_true", help="fastdit with one thing changed at a time")
    options.add_argument("--engines", action="store_true", help="fastdit, and under DDP and ZeRO-1, 2, 3")
    options.add_argument("--reference-repo", nargs="+", type=Path, default=[], metavar="PATH")
    options.add_argument("--rounds", type=int, default=2 if on_gpu else 3)
    options.add_argument("--steps", type=int, default=10, help="timed per turn, at most")
    options.add_argument("--turn-s", type=float, default=120.0, help="seconds: time fewer steps to hold them")
    options.add_argument("--fill-caches", action="store_true", help="only compile what the contestants compile")
    options.add_argument("--warmup", type=int, default=6 if on_gpu else 1, help="steps before them")
    options.add_argument("--profile", action="store_true", help="timelines, and a step's time by kind of kernel")
    options.add_argument("--budget-s", type=float, default=3600.0, help="seconds, after which no turn begins")
    options.add_argument("--truth", type=Path, help="file that keeps the oracle's results: else OUT/oracle.json")
    options.add_argument("--label", help="name of the output files instead of step, ablation or engines")
    arguments = options.parse_args()
    try:
        cases = cases_of(arguments)
        for case in cases:
            config_of(case)
        if not arguments.batch:
            cases = fitting(cases)
    except ValueError as error:
        sys.exit(f"error: {error}")
    kind = "ablation" if arguments.ablation else "engines" if arguments.engines else "step"
    label, out, environment = arguments.label or kind, arguments.out and arguments.out.resolve(), about()

    def write(rows) -> str:
        text = f"## {label}\n\n{table(figures(rows), environment | {'caches': caches})}\n"
        if out:
            (out / f"{label}.md").write_text(text)
        return text

    with tempfile.TemporaryDirectory() as scratch:  # empty caches: the time to the first step is a new user's
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{scratch}/inductor")
        os.environ.setdefault("TRITON_CACHE_DIR", f"{scratch}/triton")
        folder = out / label if out else Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        compiled = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        caches = "warm" if compiled.is_dir() and any(compiled.iterdir()) else "empty"
        processes = Processes(folder, ahead=arguments.device != "cpu")
        try:
            if arguments.fill_caches:
                return fill_caches(cases, processes, arguments.budget_s)
            rows = compete(
                cases, processes, rounds=arguments.rounds, steps=arguments.steps, warmup=arguments.warmup,
                budget_s=arguments.budget_s, turn_s=arguments.turn_s, profile=arguments.profile,
                truth=arguments.truth or (out and out / "oracle.json"), traces=f"{folder}/trace-" if out else "",
                progress=write,
            )  # fmt: skip
        finally:
            processes.close()
    lines = figures(rows)
    for line in lines:
        record(kind, out, **line, caches=caches)
    print(write(rows))
    if out:
        chart(lines, environment["hardware"], out / f"{label}.png")
    if failed := [row.case.name for row in rows if row.failed]:
        sys.exit(f"not every contestant came through: {', '.join(failed)}")


if __name__ == "__main__":
    main()
