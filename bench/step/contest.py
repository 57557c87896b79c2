"""Runs contestants in rotation, each turn a process of its own, and compares their result files.

In its first turn a contestant also runs the gate (gate.py): its figures count only if it computes what the plain fp32
network does. Separate processes keep each contestant's peak memory and out-of-memory errors apart from the others'.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from bench.record import ROOT
from bench.step.cases import SIZES, Case
from bench.step.gate import Verdict, gate_errors, objection

STORED = ROOT / "bench/results/oracle.json"  # the oracle's results by size, device and batch


@dataclass
class Row:
    """What is known of one contestant."""

    case: Case  # its batch is halved until it fits
    failed: str = ""  # why there are no figures, or fewer
    errors: tuple[float, float] = (float("nan"), float("nan"))  # of the gate
    results: list[dict] = field(default_factory=list)  # of each turn, as contestant.py writes them

    @property
    def rates(self) -> list[float]:
        """Images/s of each turn; none for a contestant that did not pass the gate."""
        return [self.case.batch / statistics.median(r["seconds"]) for r in self.results if "seconds" in r]


class Processes:
    """Starts contestants' processes. With `ahead`, the next one is importing while the current one runs."""

    def __init__(self, folder: Path, ahead: bool):
        self.folder, self.count = folder, 0
        self.spare = self.start() if ahead else None

    def start(self) -> subprocess.Popen:
        command = [sys.executable, "-m", "bench.step.contestant"]
        return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, text=True)

    def __call__(self, job: dict, timeout_s: float) -> dict:
        """The result of a job, which is also kept in the folder; RuntimeError or TimeoutError if there is none."""
        return self.finish(*self.begin(job), timeout_s)

    def begin(self, job: dict) -> tuple[subprocess.Popen, Path]:
        """The process that does the job, and the file that it will write."""
        process, self.spare = self.spare or self.start(), self.start() if self.spare else None
        self.count += 1
        file = self.folder / f"{self.count:02}-{job['case']['name'].replace(' ', '-').replace('/', '-')}.json"
        file.unlink(missing_ok=True)
        with contextlib.suppress(BrokenPipeError):  # it has ended already; `finish` says so
            process.stdin.write(json.dumps({**job, "file": str(file)}))
            process.stdin.close()
        return process, file

    def finish(self, process: subprocess.Popen, file: Path, timeout_s: float) -> dict:
        try:
            process.wait(timeout=max(timeout_s, 0))
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"no result within the {timeout_s:.0f} s that were left") from None
        finally:
            process.kill()
            process.wait()
        if not file.is_file():
            raise RuntimeError(f"its process ended with {process.returncode}")
        return json.loads(file.read_text())

    def close(self) -> None:
        if self.spare:
            self.spare.kill()
            self.spare.wait()


def compete(
    cases: list[Case], perform: Callable[[dict, float], dict], *, rounds: int, steps: int, warmup: int,
    budget_s: float, turn_s: float = 3600.0, profile: bool = False, traces: str = "", truth: Path | None = None,
    progress: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:  # fmt: skip
    """Gate and time all cases in rotation; an error ends only its own row.

    `perform(job, timeout_s)` returns a result. `turn_s`: what a turn should take; one of four times that is given up.
    `traces`: prefix of the timelines' file names. `truth`: file that gets the oracle's results, for other runs; those
    of STORED are used too. `progress` is called after each turn.
    """
    deadline, rows = time.monotonic() + budget_s, [Row(case) for case in cases]
    stored, fresh = (json.loads(file.read_text()) if file and file.is_file() else {} for file in (STORED, truth))
    truths = stored | fresh

    def run(case: Case, **job) -> dict:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"the budget of {budget_s:.0f} s was used up")
        job = {"gate": True, "warmup": warmup, "steps": steps, "turn_s": turn_s, "profile": 0, "trace": "", **job}
        if case.stack in ("official", "fast-dit"):
            job["warmup"] = min(warmup, 2)  # nothing is compiled, and a step takes a second
        return perform({"case": asdict(case), **job}, min(left, 4 * turn_s))

    def oracle(case: Case, drawn: Tensor) -> Verdict:
        """The plain network's fp32 results for the size, device and batch of a case, from the inputs `drawn`."""
        key = f"{case.size} {case.device.partition(':')[0]} {case.batch}"
        known = verdict_of(truths[key]) if key in truths else None
        if known is None or not torch.allclose(known.drawn, drawn, rtol=1e-5):  # else other seeds, or another PyTorch's
            result = run(replace(case, name="oracle", stack="oracle", overrides=(), repo=""), steps=0)
            if "failed" in result:
                raise RuntimeError(result["failed"])
            short = {name: rounded(result[name]) for name in ("losses", "moved", "drawn")}
            truths[key] = fresh[key] = {**short, "precision": result["precision"]}
            known = verdict_of(truths[key])
            if truth:
                truth.write_text(json.dumps(fresh))
        return known

    def first_turn(row: Row) -> dict:
        """With the gate; the batch is halved (to the first half of the images) until it fits into memory."""
        if rows[0].results:  # compare at the batch that the first contestant can hold
            row.case = replace(row.case, batch=min(row.case.batch, rows[0].case.batch))
        profiled = profile and row.case.stack in ("fastdit", "strong")
        trace = f"{traces}{row.case.name}.json.gz" if traces and profiled else ""
        while True:
            result = run(row.case, profile=2 * profiled, trace=trace)
            if not result.get("out_of_memory") or row.case.batch == 1:
                break
            row.case = replace(row.case, batch=row.case.batch // 2)
        if "failed" not in result:
            verdict = verdict_of(result)
            row.errors = gate_errors(verdict, oracle(row.case, verdict.drawn))
            row.failed = objection(result["precision"], row.errors)
            say(f"{row.case.name}: {result['precision']}, batch {row.case.batch}, first step after "
                f"{result['first_step_s']:.1f} s, losses off by {row.errors[0]:.0e}, "
                f"displacements by {row.errors[1]:.0e}")  # fmt: skip
            if row.failed:
                del result["seconds"]
        return result

    def turn(row: Row) -> None:
        result = run(row.case, gate=False) if row.results else first_turn(row)
        if "failed" in result:
            raise RuntimeError(result["failed"])
        row.results.append(result)
        say(f"{row.case.name}: {row.failed or f'{row.rates[-1]:.2f} images/s'}, the turn took {result['turn_s']:.1f} s")

    for i in range(rounds):
        for row in rows[:: 1 if i % 2 == 0 else -1]:  # alternating, so that a drifting clock rate cancels
            if row.failed:
                continue
            try:
                turn(row)
            except (RuntimeError, TimeoutError) as error:
                say(f"{row.case.name}: {error}")
                if not (row.rates and isinstance(error, TimeoutError)):  # with less time there are fewer turns
                    row.failed = str(error)
            progress(rows)
    return rows


def verdict_of(result: dict) -> Verdict:
    losses, moved, drawn = (torch.tensor(result[name]) for name in ("losses", "moved", "drawn"))
    return Verdict(losses, moved, result["precision"], drawn, 0.0)


def rounded(values: list | float) -> list | float:
    """Eight digits: what fp32 holds."""
    return [rounded(v) for v in values] if isinstance(values, list) else float(f"{values:.8g}")


def fill_caches(cases: list[Case], processes: "Processes", timeout_s: float) -> None:
    """Compile what the cases compile, all at once, so that their turns find it in the compiler's caches.

    fastdit compiles block by block: three blocks are enough. The baseline's network is one graph.
    """
    deadline, started = time.monotonic() + timeout_s, []
    for case in cases:
        if case.stack in ("fastdit", "strong"):
            size = SIZES[case.size]
            few = f"model.variant=DiT-3x{size.hidden}x{size.heads}/{size.patch}"
            overrides = (*case.overrides, few) if case.stack == "fastdit" else ()
            job = {"case": asdict(replace(case, overrides=overrides)), "gate": True, "steps": 0, "profile": 0}
            started.append((case, *processes.begin(job)))
    for case, process, file in started:
        try:
            result = processes.finish(process, file, deadline - time.monotonic())
            about = f"{result['first_step_s']:.1f} s" if "first_step_s" in result else result["failed"]
        except (RuntimeError, TimeoutError) as error:
            about = str(error)
        say(f"{case.name}: compiled beside other work, first step after: {about.strip().splitlines()[-1]}")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
