"""Table 6: files made to run code, fill memory, block or escape, given to the commands that read them (corpus.py)."""

import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from chaos import archives, corpus, crafted
from chaos.table import Table
from chaos.watched import EXECUTED, HANGS, LIMIT_S, MEMORY, OUTSIDE, TRACEBACKS, WRONG, Outcome, watch

COMMANDS, VALUES = 2, 1  # of those of a case, and of each setting, drawn at random: there are 20,000 in all
FAULTS = (EXECUTED, OUTSIDE, HANGS, TRACEBACKS, WRONG)


def run(place: Path, seed: int) -> Table:
    table = Table(
        "Hostile files",
        "Each hostile file replaces a good one, its digests are made right, and commands that read it run in processes "
        f"of their own, with {MEMORY >> 30} GiB of address space and an audit hook that reports what is started and "
        f"what is written outside the output folder: {COMMANDS} commands for each file, drawn at random. A refusal is "
        f"exit code 2 with one line that begins with `error:`. A command hangs if it takes over {LIMIT_S:g} s.",
        ["files", "number", "commands", "refused", *FAULTS, "slowest", "peak memory"],
    )
    good = corpus.prepare(place, place / "hostile")
    draw = random.Random(seed)
    found: dict[str, list[Outcome]] = {}

    def attempt(number: int, case: corpus.Case) -> tuple[corpus.Case, list[Outcome]]:
        folder = place / "hostile" / f"case-{number}"
        commands = case.make(folder)
        if not case.whole:
            taken = random.Random(f"{seed} {case.kind} {case.name}").sample(range(len(commands)), len(commands))
            commands = [commands[i] for i in sorted(taken[:COMMANDS])]
        outcomes = [watch(folder, command, case.refused) for command in commands]
        shutil.rmtree(folder)
        return case, outcomes

    cases = chain(corpus.cases(good), archives.cases(good), crafted.cases(good, draw, VALUES))
    with ThreadPoolExecutor(2) as pool:
        for case, outcomes in pool.map(attempt, *zip(*enumerate(cases), strict=True)):
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
