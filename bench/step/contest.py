"""Runs contestants in rotation, each turn a process of its own, and compares their result files.

In its first turn a contestant also runs the gate (gate.py): its figures count only if it computes what the plain fp32
network does. Separate processes keep each contestant's peak memory and out-of-memory errors apart from the others'.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from bench.record import ROOT
from bench.step.cases import CONTESTANTS, Case
from bench.step.gate import Verdict, gate_errors, objection


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
        process, self.spare = self.spare or self.start(), self.start() if self.spare else None
        self.count += 1
        file = self.folder / f"{self.count:02}-{job['case']['name'].replace(' ', '-').replace('/', '-')}.json"
        file.unlink(missing_ok=True)
        try:
            process.communicate(json.dumps({**job, "file": str(file)}), timeout=timeout_s)
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
    budget_s: float, profile: bool = False, traces: str = "", truth: Path | None = None,
    progress: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:  # fmt: skip
    """Gate and time all cases in rotation; an error ends only its own row.

    `perform(job, timeout_s)` returns a result. `traces`: prefix of the timelines' file names. `truth`: file that keeps
    the oracle's results for other runs. `progress` is called after each turn.
    """
    deadline, rows = time.monotonic() + budget_s, [Row(case) for case in cases]
    truths = json.loads(truth.read_text()) if truth and truth.is_file() else {}

    def run(case: Case, **job) -> dict:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"the budget of {budget_s:.0f} s was used up")
        job = {"gate": True, "warmup": warmup, "steps": steps, "profile": 0, "trace": "", **job}
        return perform({"case": asdict(case), **job}, left)

    def oracle(case: Case) -> Verdict:
        """The plain network's fp32 results for the size, device and batch of a case, computed once."""
        key = f"{case.size} {case.device} {case.batch}"
        if key not in truths:
            result = run(replace(case, name="oracle", stack="oracle", overrides=(), repo=""), steps=0)
            if "failed" in result:
                raise RuntimeError(result["failed"])
            truths[key] = result
            if truth:
                truth.write_text(json.dumps(truths))
        return verdict_of(truths[key])

    def first_turn(row: Row) -> dict:
        """With the gate; the batch is halved (to the first half of the images) until it fits into memory."""
        if rows[0].results:  # compare at the batch that the first contestant can hold
            row.case = replace(row.case, batch=min(row.case.batch, rows[0].case.batch))
        profiled = profile and row.case.name in CONTESTANTS
        trace = f"{traces}{row.case.name}.json.gz" if traces and profiled else ""
        while True:
            result = run(row.case, profile=2 * profiled, trace=trace)
            if not result.get("out_of_memory") or row.case.batch == 1:
                break
            row.case = replace(row.case, batch=row.case.batch // 2)
        if "failed" not in result:
            row.errors = gate_errors(verdict_of(result), oracle(row.case))
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
        say(f"{row.case.name}: {row.failed or f'{row.rates[-1]:.2f} images/s'}")

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
    return Verdict(torch.tensor(result["losses"]), torch.tensor(result["moved"]), result["precision"], 0.0)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
