"""Training steps per second: fastdit beside the public recipes, on the same work, in one run, by turns.

A step is everything from a batch of moments in pinned host memory to moved weights and EMA: transfer, posterior sample,
noise, label dropout, DDPM's learned-range loss, backward, optimiser, EMA. Every contestant lives in a process of its
own and must first pass a gate: from the same weights and inputs the same losses, step after step, within the noise of
its dtype, as the plain network in fp32; what fails it is not timed. Then they take turns, and ratios are formed within
a turn. On a CPU all stay alive between their turns; on a GPU each has the memory to itself and is started afresh.

    python bench/step.py                     # the small model on a CPU, DiT-XL/2 at batch 256 on a GPU
    python bench/step.py --size S/2 --batch 64 --contestants strong fastdit --profile --out results
    python bench/step.py --ablation          # fastdit, and fastdit with one thing changed at a time
    python bench/step.py --engines           # fastdit plain, under DDP, under ZeRO-1, 2 and 3, each in a group of one
    python bench/step.py --reference-repo ~/DiT ~/fast-DiT      # their models.py in the place of the plain network
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from contestants import CONTESTANTS, SIZES, Case, cases_of, config_of, latent_shape
from gate import Gated, Judge, objection
from record import hardware, record
from report import chart, table
from workers import Worker

from fastdit.diffusion.objectives import OBJECTIVES
from fastdit.training.log import PEAK_TFLOPS
from fastdit.training.loop import memory_by_kind, network
from fastdit.training.memory import GIB


@dataclass
class Row:
    """What is known of one contestant."""

    case: Case
    failed: str = ""  # why there are no figures, or not all
    gated: Gated | None = None
    errors: tuple[float, float] = (float("nan"), float("nan"))
    turns: list[list[float]] = field(default_factory=list)  # seconds of each step of each turn
    peak_gib: tuple[float, float] = (float("nan"), float("nan"))  # of the tensors, taken from the device
    product_tflops: list[float] = field(default_factory=list)
    profile: dict[str, float] = field(default_factory=dict)  # ms of a step by kind of kernel

    @property
    def rates(self) -> list[float]:
        """Images/s of each turn."""
        return [self.gated.batch / statistics.median(turn) for turn in self.turns]

    def over(self, other: "Row") -> float:
        """How many times the other's images/s, turn by turn; the geometric mean of the two turns in the middle."""
        logs = (math.log(a / b) for a, b in zip(self.rates, other.rates, strict=False))
        return round(math.exp(statistics.median(logs)), 3)


def compete(cases: list[Case], *, turns: int, steps: int, warmup: int, resident: bool, budget_s: float,
            profile: bool, traces: str = "", truth: Path | None = None) -> list[Row]:  # fmt: skip
    """Gate and time all `cases`; what goes wrong with one is said in its row. `traces`: how their files begin."""
    deadline, spares = time.monotonic() + budget_s, Spares(not resident)
    rows, workers, judge = {case.name: Row(case) for case in cases}, {}, Judge(cases[0], truth)
    cases = sorted(cases, key=lambda case: case.name != "fastdit")  # first, should time run out

    def left() -> float:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the budget of {budget_s:.0f} s was used up")
        return deadline - time.monotonic()

    def enter(row: Row) -> None:
        """A live worker for the row: gated the first time, built again where it had to give up its memory."""
        name = row.case.name
        if name in workers:
            return
        workers[name] = worker = spares.take()
        if row.gated is not None:
            worker.ask("build", replace(row.case, batch=row.gated.batch), timeout_s=left())
            return
        first = rows[cases[0].name].gated  # what it cannot hold nobody is compared on, and compiles for
        case = replace(row.case, batch=min(row.case.batch, first.batch)) if first else row.case
        gated = worker.ask("gate", case, timeout_s=left())
        if not judge.knows(gated):
            worker.ask("release", timeout_s=left())
            learn(name, gated)
        row.errors, row.gated = judge.errors(gated), gated
        row.failed = objection(gated, row.errors)
        say(f"{name}: {gated.verdict.precision}, batch {gated.batch}, first step after {gated.first_step_s:.1f} s, "
            + (row.failed or f"equal (losses {row.errors[0]:.0e}, ways {row.errors[1]:.0e})"))  # fmt: skip
        if gated.batch < case.batch:
            leave(name)  # its peak of memory is that of the batch that did not fit
        if not row.failed:
            enter(row)

    def learn(name: str, gated: Gated) -> None:
        """Ask the oracle, beside the waiting contestant, or without it where the memory is too little for both."""
        while True:
            oracle, beside = spares.take(), name in workers
            try:
                return judge.learn(gated, oracle, left())
            except MemoryError:
                if not beside:
                    raise
                leave(name)
            finally:
                oracle.close()

    def leave(name: str) -> None:
        if name in workers:
            workers.pop(name).close()

    def attempt(row: Row, action) -> None:
        """Do it, or write into the row why not."""
        if row.failed:
            return
        try:
            action(row)
        except (RuntimeError, MemoryError, TimeoutError) as error:
            why = ("out of memory: " if isinstance(error, MemoryError) else "") + str(error)
            say(f"{row.case.name}: {why}")
            if not (row.turns and isinstance(error, TimeoutError)):  # fewer turns for want of time are still turns
                row.failed = why
            leave(row.case.name)
        if row.failed:
            leave(row.case.name)

    def turn(row: Row) -> None:
        enter(row)
        if row.failed:
            return
        worker = workers[row.case.name]
        row.turns.append(worker.ask("turn", warmup, steps, timeout_s=left()))
        row.peak_gib = worker.ask("peak_gib", timeout_s=left())
        say(f"{row.case.name}: {row.rates[-1]:.2f} images/s")
        if row.case.name == cases[0].name:  # the ceiling, measured while everything is as warm as it gets
            row.product_tflops.append(worker.ask("product_tflops", timeout_s=left()))
        if profile and not row.profile and row.case.name in CONTESTANTS:
            trace = Path(f"{traces}{row.case.name}.json.gz") if traces else None
            try:
                row.profile = worker.ask("profile", 2, trace, timeout_s=left())
            except (RuntimeError, MemoryError) as error:  # the turn counts nevertheless
                say(f"{row.case.name}: no profile: {error}")
                leave(row.case.name)
        if not resident:
            leave(row.case.name)

    if resident:
        for case in cases:
            attempt(rows[case.name], enter)
    for i in range(turns):
        for case in cases if i % 2 == 0 else cases[::-1]:  # there and back: a drift of the clock is nobody's gain
            attempt(rows[case.name], turn)
    for name in list(workers):
        leave(name)
    spares.close()
    return list(rows.values())


class Spares:
    """Workers; with `ahead` there is always one more that has begun to import, so that nobody waits for that."""

    def __init__(self, ahead: bool):
        self.next = Worker() if ahead else None

    def take(self) -> Worker:
        if self.next is None:
            return Worker()
        worker, self.next = self.next, Worker()
        return worker

    def close(self) -> None:
        if self.next is not None:
            self.next.close()


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def flops_per_image(case: Case) -> int:
    """Of a training step, in matrix products; recomputation does not count."""
    with torch.device("meta"):
        objective = OBJECTIVES["ddpm"]()
        return 3 * network(config_of(case), latent_shape(SIZES[case.size]), objective).flops_per_image()


def predicted_gib(case: Case, batch: int) -> float:
    """Peak memory as `fastdit plan` predicts it."""
    settings = config_of(case).training
    with torch.device("meta"):
        model = network(config_of(case), latent_shape(SIZES[case.size]), OBJECTIVES["ddpm"]())
    return sum(memory_by_kind(model, settings, settings.activation_checkpointing, batch, world=1).values()) / GIB


def figures(rows: list[Row]) -> list[dict]:
    """The fields of each contestant's JSON line."""
    flops = flops_per_image(rows[0].case)
    product = [value for row in rows for value in row.product_tflops]
    product = statistics.median(product) if product else None
    datasheet = next((peak for known, peak in PEAK_TFLOPS.items() if known in hardware()), None)
    lines = []
    for row in rows:
        line = {"contestant": row.case.name, "size": row.case.size, "device": row.case.device,
                "overrides": list(row.case.overrides)}  # fmt: skip
        if row.gated:
            line |= {"batch": row.gated.batch, "precision": row.gated.verdict.precision,
                     "loss_error": float(f"{row.errors[0]:.2g}"), "way_error": float(f"{row.errors[1]:.2g}"),
                     "first_step_s": round(row.gated.first_step_s, 2)}  # fmt: skip
        if row.case.stack == "fastdit" and row.case.device != "cpu":  # there the peak is the whole process's
            batch = row.gated.batch if row.gated else row.case.batch
            line["predicted_gib"] = significant(predicted_gib(row.case, batch))
        if row.failed:
            line["failed"] = row.failed.strip().splitlines()[-1]
        if row.turns:
            images = statistics.median(row.rates)
            tflops = flops * images / 1e12
            line |= {
                "images_per_s": significant(images),
                "steps_per_s": significant(images / row.gated.batch),
                "spread": [significant(min(row.rates)), significant(max(row.rates))],
                "slowest_step": significant(row.gated.batch / max(max(turn) for turn in row.turns)),
                "over": {o.case.name: row.over(o) for o in rows if o.turns and o is not row},
                "tflops": significant(tflops),
                "mfu": datasheet and round(tflops / datasheet, 4),
                "of_product": product and round(tflops / product, 4),
                "product_tflops": product and significant(product),
                "peak_gib": round(row.peak_gib[0], 2),
                "reserved_gib": round(row.peak_gib[1], 2),
                "turns": len(row.turns),
                "steps": len(row.turns[0]),
            }
        if row.profile:
            line["profile_ms"] = {kind: round(ms, 3) for kind, ms in row.profile.items()}
        lines.append(line)
    return lines


def significant(value: float) -> float:
    return float(f"{value:.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("override", nargs="*", help="of fastdit's configuration, like training.compile=false")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--size", choices=SIZES, default="XL/2" if on_gpu else "small")
    parser.add_argument("--batch", type=int, help="images of a step (halved where memory ends)")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--ablation", action="store_true", help="fastdit with one thing changed at a time")
    parser.add_argument("--engines", action="store_true", help="fastdit plain, under DDP and under ZeRO-1, 2, 3")
    parser.add_argument("--reference-repo", nargs="+", type=Path, default=[], metavar="PATH")
    parser.add_argument("--turns", type=int, default=2 if on_gpu else 5)
    parser.add_argument("--steps", type=int, default=10 if on_gpu else 3, help="timed in a turn")
    parser.add_argument("--warmup", type=int, default=6 if on_gpu else 1, help="steps before them")
    parser.add_argument("--fresh", action="store_true", default=on_gpu,
                        help="a new process each turn, alone on the device (always so on a GPU)")  # fmt: skip
    parser.add_argument("--profile", action="store_true", help="traces, and a step's time by kind of kernel")
    parser.add_argument("--budget-s", type=float, default=3600.0, help="after it no turn begins")
    parser.add_argument("--truth", type=Path, help="file that keeps what the fp32 network computed, for another run")
    parser.add_argument("--out", type=Path, help="folder for results.jsonl (appended to), step.md, step.png, traces")
    parser.add_argument("--label", default="", help="in the place of step, ablation or engines in the files' names")
    arguments = parser.parse_args()
    try:
        cases = cases_of(arguments)
        for case in cases:
            config_of(case)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    kind = "ablation" if arguments.ablation else "engines" if arguments.engines else "step"
    label = arguments.label and f"{arguments.label}-"
    with tempfile.TemporaryDirectory() as cache:  # empty, so that the time to the first step is a newcomer's
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{cache}/inductor")
        os.environ.setdefault("TRITON_CACHE_DIR", f"{cache}/triton")
        rows = compete(
            cases, turns=arguments.turns, steps=arguments.steps, warmup=arguments.warmup,
            resident=not arguments.fresh, budget_s=arguments.budget_s, profile=arguments.profile,
            truth=arguments.truth, traces=str(arguments.out / f"trace-{label}") if arguments.out else "",
        )  # fmt: skip
    file = arguments.out and arguments.out / "results.jsonl"
    lines = [record(kind, file=file, **line) for line in figures(rows)]
    text = f"## {arguments.label or kind}\n\n{table(lines)}\n"
    print(text)
    if arguments.out:
        (arguments.out / f"{arguments.label or kind}.md").write_text(text)
        chart(lines, arguments.out / f"{arguments.label or kind}.png")
    if any(row.failed for row in rows):
        sys.exit("not every contestant came through: " + ", ".join(row.case.name for row in rows if row.failed))


if __name__ == "__main__":
    main()
