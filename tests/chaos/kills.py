"""Kill -9 at random moments, also inside a save: nothing is lost, and every loss and weight is as without the kills."""

import random
import signal
import sys
import time
from pathlib import Path

from chaos.runs import (
    ENGINES,
    Launched,
    arguments_of,
    differing_files,
    free_port,
    logged_step,
    losses_until,
    newest_step,
    python,
    send,
    until,
)
from chaos.table import Table
from fastdit.training import checkpoint
from fastdit.training.log import read_metrics
from helpers.runs import Forks
from helpers.runs import run as run_forked

KILLS = {"torch": 28, "DDP": 24, "ZeRO-1": 16, "ZeRO-2": 16, "ZeRO-3": 16}
NODE_KILLS = 20
STEPS = 20
WAIT_S = 8


def run(place: Path, seed: int) -> Table:
    table = Table(
        "Kill -9 at random moments",
        f"Runs of {STEPS} steps that save at every step, in a thread, are killed after a random number of steps, or "
        "while they start; half of them when the next save has begun. The kill hits all processes, or one. Each run is "
        "resumed and killed again until it is complete. *Inside a save*: the kill left an unfinished checkpoint. "
        "*Unloadable*: a resume did not continue from the newest complete checkpoint. *Different*: losses and gradient "
        "norms, and files of the last checkpoint, that are not equal, bit for bit, to those of a run that was never "
        "killed. *Others*: how long the processes that were not hit went on; one whose peer dies before they have met "
        f"waits for it, and after {WAIT_S} s gets the SIGTERM that a launcher or scheduler sends. *Left running*: "
        "training processes 20 s later. *Two nodes*: two torchrun launchers on loopback; one of them, its worker or "
        "both are killed.",
        ["engine", "kills", "inside a save", "runs", "unloadable", "different losses", "different files",
         "steps repeated per kill (mean, most)", "others ended by themselves within", "others ended by SIGTERM",
         "left running"],
    )  # fmt: skip
    for engine, kills in KILLS.items():
        table.rows.append(Killer(place / "kills", place, engine, random.Random(f"{seed} {engine}"), table).row(kills))
    nodes = NodeKiller(place / "kills", place, "DDP", random.Random(f"{seed} nodes"), table)
    table.rows.append(nodes.row(NODE_KILLS))
    return table


class Killer:
    """Kills runs of one engine, whose processes are forked."""

    label = ""

    def __init__(self, folder: Path, place: Path, engine: str, draw: random.Random, table: Table):
        self.folder, self.place, self.draw, self.table = folder, place, draw, table
        self.engine, (self.processes, overrides) = engine, ENGINES[engine]
        self.overrides = [*overrides, "training.checkpoint_every=1", "training.keep_checkpoints=2",
                          f"training.steps={STEPS}"]  # fmt: skip
        self.inside = self.unloadable = 0
        self.repeated: list[int] = []
        self.longest, self.helped, self.orphans = 0.0, 0, 0

    def row(self, kills: int) -> list:
        whole, count, runs, losses, files = self.folder / f"{self.engine}-whole", 0, 0, 0, 0
        if not whole.exists():
            run_forked("train.py", *arguments_of(self.place, whole, *self.overrides), processes=self.processes)
        times = [line["time"] for line in read_metrics(whole)]
        self.step_s = (times[-1] - times[0]) / STEPS
        while count < kills:
            run_dir, runs, complete = self.folder / f"{self.engine}{self.label}-{runs}", runs + 1, False
            while not complete:
                killed = self.launch(run_dir, kill=count < kills)
                count, complete = count + killed, not killed
                self.table.check(complete or len(self.repeated) < 3 * kills, f"{run_dir.name} does not advance")
            differ = sum(a != b for a, b in zip(losses_until(run_dir, STEPS), losses_until(whole, STEPS), strict=True))
            self.table.check(not differ, f"{run_dir.name}: {differ} losses differ")
            wrong = differing_files(run_dir, whole, STEPS)
            self.table.check(not wrong, f"{run_dir.name}: files differ: {wrong}")
            losses, files = losses + differ, files + len(wrong)
        mean = sum(self.repeated) / len(self.repeated)
        others = [f"{self.longest:.1f} s", self.helped, self.orphans] if self.processes > 1 else ["-"] * 3
        return [self.engine + self.label, count, self.inside, runs, self.unloadable, losses, files,
                f"{mean:.1f}, {max(self.repeated)}", *others]  # fmt: skip

    def launch(self, run_dir: Path, kill: bool) -> bool:
        """Start or resume a run and kill it at a random moment if `kill`; whether it was killed before its end."""
        before = newest_step(run_dir)
        with self.start(run_dir) as run:
            if kill:
                self.wait_for_the_moment(run, run_dir, before)
                killed = self.kill(run)
            else:
                killed = not self.finish(run)
            said = run.said()
        expected = f"resumed at step {before}" if before else "from random weights"
        started = expected in said or (killed and " parameters, " not in said)  # killed before its start line
        if not self.table.check(started and "damaged" not in said, f"{run_dir.name}: no '{expected}' in: {said}"):
            self.unloadable += 1
        if killed:
            self.inside += any((run_dir / "checkpoints").glob("*.partial"))
            newest = newest_step(run_dir)
            faults = checkpoint.inspect(checkpoint.path_of(run_dir, newest))[1] if newest else []
            self.table.check(newest >= before and not faults, f"{run_dir.name}: step {before}, then {newest}: {faults}")
            self.repeated.append(max(logged_step(said) - newest, 0))
        return killed

    def wait_for_the_moment(self, run, run_dir: Path, before: int) -> None:
        steps = self.draw.choice([0, 1, 1, 2, 2, 3, 3, 4])
        if not steps:
            return time.sleep(self.draw.uniform(0, self.start_s))
        until(lambda: logged_step(run.said()) >= before + steps or not run.running, 120, every=0.002)
        if self.draw.random() < 0.5:
            return time.sleep(self.draw.uniform(0, self.step_s))
        saves = run_dir / "checkpoints"
        until(lambda: any(saves.glob("*.partial")) or not run.running, 120, every=0.001)
        time.sleep(self.draw.uniform(0, 0.03))

    start_s = 0.5

    def start(self, run_dir: Path):
        arguments = arguments_of(self.place, run_dir, *self.overrides)
        return Forks("train.py", *arguments, processes=self.processes)

    def kill(self, run) -> bool:
        """Kill all ranks, or one and wait for the others to end; whether the kill came before their end."""
        chosen = run.forks if self.draw.random() < 0.5 else [self.draw.choice(run.forks)]
        if not all(fork.is_alive() for fork in run.forks):
            return not self.finish(run)  # it is complete
        for fork in chosen:
            fork.kill()
        self.end_others(run)
        return run.wait(0) != [0] * len(run.forks)

    def end_others(self, run) -> None:
        """Wait for the end of the others, and after WAIT_S do what a launcher, or the scheduler of launchers, does."""
        start = time.monotonic()
        if until(lambda: not run.running, WAIT_S):
            self.longest = max(self.longest, time.monotonic() - start)
            return
        self.helped += 1
        for pid in self.warned(run):
            send(pid, signal.SIGTERM)
        if not self.table.check(until(lambda: not self.training(run), 20), f"{self.engine}: goes on: {run.said()}"):
            self.orphans += len(self.training(run))

    def warned(self, run) -> list[int]:
        return [fork.pid for fork in run.running]

    def training(self, run) -> list[int]:
        """The training processes that have not ended."""
        return [fork.pid for fork in run.running]

    def finish(self, run) -> bool:
        """Wait for the end of a run that is not killed, and return True."""
        return self.well(run, run.wait())

    def well(self, run, codes: list[int]) -> bool:
        if codes != [0] * self.processes:
            raise RuntimeError(f"{self.engine}{self.label} ended by itself with exit codes {codes}: {run.said()}")
        return True


class NodeKiller(Killer):
    """Kills launchers and workers of a run on two nodes, each simulated by a torchrun of one worker."""

    label = ", two nodes"
    start_s = 6.0

    def start(self, run_dir: Path) -> Launched:
        run_dir.parent.mkdir(exist_ok=True)
        port = str(free_port())
        command = python(self.place, run_dir, *self.overrides)[1:]
        return Launched(run_dir, *(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", node, "--nproc-per-node",
             "1", "--master-addr", "127.0.0.1", "--master-port", port, *command]
            for node in "01"
        ))  # fmt: skip

    def kill(self, run: Launched) -> bool:
        what, node = self.draw.choice(["launcher", "worker", "node"]), self.draw.randrange(2)
        launcher, workers = run.launchers[node], run.workers
        if any(process.poll() is not None for process in run.launchers):
            return not self.finish(run)  # it is complete
        chosen = [launcher.pid] * (what != "worker") + [workers.get(node, launcher.pid)] * (what != "launcher")
        for pid in chosen:
            send(pid, signal.SIGKILL)
        self.end_others(run)
        return [process.returncode for process in run.launchers] != [0, 0]

    def warned(self, run: Launched) -> list[int]:
        return [process.pid for process in run.launchers if process.poll() is None]

    def training(self, run: Launched) -> list[int]:
        return list(run.workers.values())  # a torchrun whose peer died at the end of the run waits 5 minutes for it

    def finish(self, run: Launched) -> bool:
        run.ended(300)
        return self.well(run, [process.returncode for process in run.launchers])
