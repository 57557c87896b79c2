"""Table 6: files made to run code, fill memory, block or escape, given to the commands that read them (corpus.py)."""

import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from chaos import corpus, crafted
from chaos.table import Table
from chaos.watched import EXECUTED, HANGS, LIMIT_S, MEMORY, OUTSIDE, TRACEBACKS, WRONG, Outcome, watch

FAULTS = (EXECUTED, OUTSIDE, HANGS, TRACEBACKS, WRONG)


def run(place: Path, seed: int) -> Table:
    table = Table(
        "Hostile files",
        "Each hostile file replaces a good one, its digests are made right, and every command that reads it runs in a "
        f"process of its own, with {MEMORY >> 30} GiB of address space and an audit hook that reports what is started "
        "and what is written outside the output folder. A refusal is exit code 2 with one line. A command hangs if it "
        f"takes over {LIMIT_S:g} s.",
        ["files", "number", "commands", "refused", *FAULTS, "slowest", "peak memory"],
    )
    good = corpus.prepare(place, place / "hostile")
    found: dict[str, list[Outcome]] = {}

    def attempt(pair: tuple[int, corpus.Case]) -> tuple[corpus.Case, list[Outcome]]:
        folder = place / "hostile" / f"case-{pair[0]}"
        outcomes = [watch(folder, command, pair[1].refused, pair[1].names) for command in pair[1].make(folder)]
        shutil.rmtree(folder)
        return pair[1], outcomes

    cases = chain(corpus.cases(good), crafted.cases(good, random.Random(seed)))
    with ThreadPoolExecutor(2) as pool:
        for case, outcomes in pool.map(attempt, enumerate(cases)):
            found.setdefault(case.kind, []).append(outcomes)
            for end in outcomes:
                faults = "; ".join(": ".join(fault) for fault in end.faults)
                told = f"{case.kind}, {case.name}, {' '.join(end.command)}: {faults}\n{end.said[-2000:]}"
                table.check(not end.faults, told.encode(errors="replace").decode())
    for kind, groups in found.items():
        ends = [end for outcomes in groups for end in outcomes]
        counts = [sum(any(kind == fault for kind, _ in end.faults) for end in ends) for fault in FAULTS]
        slowest, gib = max(end.seconds for end in ends), max(end.gib for end in ends)
        refused = sum(end.code == 2 for end in ends)
        table.rows.append([kind, len(groups), len(ends), refused, *counts, f"{slowest:.1f} s", f"{gib:.1f} GiB"])
    return table
