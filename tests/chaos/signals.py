"""Signals to plain python, torchrun and deepspeed: a checkpoint of the exact step, and nothing is left running."""

import random
import re
import signal
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from chaos.runs import (
    ENGINES,
    Launched,
    arguments_of,
    differing_files,
    free_port,
    logged_step,
    newest_step,
    python,
    send,
    until,
)
from chaos.table import Table
from fastdit.training.guard import AGAIN_S, EXIT_STOPPED, SIGNALS
from helpers.runs import Forks
from helpers.runs import run as run_forked

SETTINGS = ["training.global_batch=192", "training.keep_checkpoints=0"]  # steps of about 0.1 s
ENDLESS = [*SETTINGS, "training.steps=100000", "training.checkpoint_every=100000"]
LAUNCHERS = {  # name -> the engine that it chooses, what precedes train.py
    "python": ("torch", []),
    "torchrun": ("DDP", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]),
    "deepspeed": ("ZeRO-1", ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port"]),
}
CASES = [
    (launcher, target, name)
    for target in ("process", "launcher", "all processes")
    for name in SIGNALS
    for launcher in ("deepspeed", "torchrun", "python")
    if launcher != "python" or target == "process"
]


def run(place: Path, seed: int) -> Table:
    table = Table(
        "Signals",
        "SIGTERM, SIGINT and SIGUSR1 after a random number of steps, each to one training process, to the launcher, "
        "and to the launcher and its processes at once, as SLURM or a terminal does. *Exact*: the run says at which "
        "step it stopped, has logged that step last, and has a checkpoint of it and no other. *Different files*: those "
        "of this checkpoint that are not equal, bit for bit, to what an uninterrupted run writes at this step. *Exit "
        "codes*: of the command that was started, for the three signals; negative where the signal itself ended it. "
        f"*Again*: a second signal, more than {AGAIN_S:.0f} s later and inside a long step, ends the process at once.",
        ["launcher", "signal sent to", "signals", "exact", "different files", "exit codes", "processes left",
         "tracebacks of fastdit", "longest time until all ended"],
    )  # fmt: skip
    folder = place / "signals"
    folder.mkdir()
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda case: stop(place, folder, *case, random.Random(f"{seed} {case}")), CASES))
    steps = defaultdict(int)
    for (launcher, *_), result in zip(CASES, results, strict=True):
        steps[launcher] = max(steps[launcher], result["step"])
    for launcher, (engine, _) in LAUNCHERS.items():
        processes, overrides = ENGINES[engine]
        settings = [*SETTINGS, *overrides, f"training.steps={steps[launcher]}", "training.checkpoint_every=1"]
        run_forked("train.py", *arguments_of(place, folder / launcher, *settings), processes=processes)
    rows = defaultdict(list)
    for case, result in zip(CASES, results, strict=True):
        what = " ".join(case)
        wrong = differing_files(result["run_dir"], folder / case[0], result["step"])
        table.check(result["exact"], f"{what}: not the exact step: {result['said']}")
        table.check(not wrong, f"{what}: step {result['step']} differs: {wrong}")
        table.check(result["code"] == documented(*case), f"{what}: exit code {result['code']}")
        table.check(not result["left"], f"{what}: left running: {result['left']}")
        table.check(not result["tracebacks"], f"{what}: a traceback: {result['said']}")
        rows[case[:2]].append(result | {"differ": len(wrong)})
    for (launcher, target), found in sorted(rows.items(), key=lambda row: list(LAUNCHERS).index(row[0][0])):
        sums = [sum(result[key] for result in found) for key in ("exact", "differ", "tracebacks")]
        left = sum(len(result["left"]) for result in found)
        table.rows.append([launcher, target, len(found), sums[0], sums[1], ", ".join(str(r["code"]) for r in found),
                           left, sums[2], f"{max(r['seconds'] for r in found):.1f} s"])  # fmt: skip
    table.rows.append(twice(place, folder, table))
    return table


def documented(launcher: str, target: str, name: str) -> int:
    """The exit code of the command, as README.md says; negative where the signal itself ended it."""
    if launcher == "python":
        return EXIT_STOPPED
    handled = ("SIGTERM", "SIGINT") if launcher == "torchrun" else ()
    if target != "process" and name not in handled:
        return -getattr(signal, name)
    return 1 if launcher == "torchrun" else EXIT_STOPPED


def stop(place: Path, folder: Path, launcher: str, target: str, name: str, draw: random.Random) -> dict:
    """Start a run, send it a signal and see what becomes of it."""
    run_dir = folder / f"{launcher}-{target.replace(' ', '-')}-{name}"
    engine, before = LAUNCHERS[launcher]
    before = before + [str(free_port())] * (launcher == "deepspeed")
    overrides = [*ENDLESS, *(["training.engine=auto"] if launcher == "deepspeed" else [])]
    interpreter, *command = python(place, run_dir, *overrides)
    with Launched(run_dir, [interpreter, *before, *command]) as run:
        wanted = draw.randint(1, 10)
        until(lambda: logged_step(run.said()) >= wanted or not run.running, 120)
        time.sleep(draw.uniform(0, 0.2))
        workers, started = run.workers, run.launchers[0].pid
        chosen = {"process": draw.choice(sorted(workers)), "launcher": started, "all processes": run.running}[target]
        if target == "process":
            chosen = workers[chosen]
        start = time.monotonic()
        for pid in chosen if isinstance(chosen, list) else [chosen]:
            send(pid, getattr(signal, name))
        run.ended(30)
        seconds, left, said = time.monotonic() - start, run.running, run.said()
        code = run.launchers[0].poll()
    stops, newest = re.findall(r"stopped at step (\d+) by ", said), newest_step(run_dir)
    saved = [path.name for path in (run_dir / "checkpoints").glob("*")]
    exact = stops == [str(newest)] and logged_step(said) == newest and len(saved) == 1
    tracebacks = len(re.findall(r'Traceback(?:\n  .*)*?\n  File ".*/(?:fastdit/.*|train)\.py"', said))
    return {"run_dir": run_dir, "step": newest, "exact": exact, "code": code, "left": left, "seconds": seconds,
            "tracebacks": tracebacks, "said": said}  # fmt: skip


def twice(place: Path, folder: Path, table: Table) -> list:
    """Each signal twice to a process whose third step lasts a minute."""
    seconds, codes = [], []
    for name in SIGNALS:
        run_dir = folder / f"twice-{name}"
        with Forks("train.py", *arguments_of(place, run_dir, *ENDLESS), before=long_third_step) as run:
            until(lambda run=run: logged_step(run.said()) >= 2, 60)
            for wait_s in (0.2, AGAIN_S + 0.2):
                time.sleep(wait_s)
                send(run.forks[0].pid, getattr(signal, name))
            start = time.monotonic()
            until(lambda run=run: not run.running, 10)
            seconds.append(time.monotonic() - start)
            codes.append(run.wait(0)[0])
            table.check(seconds[-1] < 2, f"a second {name} did not end the process: {run.said()}")
            table.check(codes[-1] == -getattr(signal, name), f"a second {name}: exit code {codes[-1]}")
    return ["python", "process, again", len(codes), "-", "-", ", ".join(map(str, codes)), 0, "-",
            f"{max(seconds):.1f} s"]  # fmt: skip


def long_third_step() -> None:
    from fastdit.training.step import TrainStep

    original = TrainStep.run

    def run(self, generator, step, lr, *given):
        if step == 2:
            time.sleep(60)
        return original(self, generator, step, lr, *given)

    TrainStep.run = run
