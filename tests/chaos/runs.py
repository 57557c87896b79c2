"""Runs to break: their settings, launchers as real processes, and how two runs are compared bit for bit."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from fastdit.training import checkpoint
from fastdit.training.log import read_metrics
from helpers import ROOT
from helpers.runs import ENVIRONMENT

ZERO = {stage: ["training.engine=deepspeed", f"training.zero_stage={stage}"] for stage in (1, 2, 3)}
ENGINES = {  # name -> processes, overrides
    "torch": (1, []),
    "DDP": (2, []),
    "ZeRO-1": (2, ZERO[1]),
    "ZeRO-2": (2, ZERO[2]),
    "ZeRO-3": (2, ZERO[3]),
}
UNLIKE = ("checkpoint.json", "config.yaml")  # they hold the settings, such as run_dir


def arguments_of(place: Path, run_dir: Path, *overrides: str) -> list[str]:
    """Arguments of train.py, which resumes where there is something to resume."""
    return ["--config", f"{place}/config.yaml", f"run_dir={run_dir}", *overrides, "--resume"]


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint, 0 where there is none."""
    found = checkpoint.checkpoints(run_dir)
    return checkpoint.step_of(found[-1]) if found else 0


def logged_step(said: str) -> int:
    """The last step that a process has logged, 0 for none."""
    steps = re.findall(r"^step (\d+)/", said, re.MULTILINE)
    return int(steps[-1]) if steps else 0


def losses_until(run_dir: Path, step: int) -> list[tuple]:
    """(step, loss, gradient norm) of each step up to `step`."""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(run_dir) if line["step"] <= step]


def differing_files(run_dir: Path, whole: Path, step: int) -> list[str]:
    """The files of a step's checkpoint that are damaged, or are not the same, bit for bit, in both runs."""
    ours, theirs = checkpoint.path_of(run_dir, step), checkpoint.path_of(whole, step)
    if not ours.is_dir():
        return [ours.name]
    names = sorted({path.name for folder in (ours, theirs) for path in folder.iterdir()} - set(UNLIKE))
    return checkpoint.inspect(ours)[1] + [name for name in names if not same_bytes(ours / name, theirs / name)]


def same_bytes(ours: Path, theirs: Path) -> bool:
    return ours.is_file() and theirs.is_file() and ours.read_bytes() == theirs.read_bytes()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def processes_of(run_dir: Path) -> dict[int, str]:
    """All processes of this machine that have `run_dir` in their command: pid -> command."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has just ended
            continue
        if f"run_dir={run_dir} " in command and int(path.name) != os.getpid():
            found[int(path.name)] = command
    return found


class Launched:
    """Commands started as a user starts them, each in a session of its own; leaving `with` kills all that is left."""

    def __init__(self, run_dir: Path, *commands: list[str], **environment: str):
        self.run_dir, self.output = run_dir, run_dir.with_suffix(".said")
        with open(self.output, "w") as file:
            start = dict(env={**ENVIRONMENT, **environment}, stdout=file, stderr=file, start_new_session=True)
            self.launchers = [subprocess.Popen(command, **start) for command in commands]

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *_) -> None:
        for pid in [*processes_of(self.run_dir), *(p.pid for p in self.launchers if p.poll() is None)]:
            send(pid, signal.SIGKILL)
        for process in self.launchers:
            process.wait()

    @property
    def workers(self) -> dict[int, int]:
        """The training processes by rank; a process by itself has rank 0."""
        found = {}
        for pid, command in processes_of(self.run_dir).items():
            if "torch.distributed.run" not in command and "deepspeed.launcher" not in command:
                try:
                    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                found[next((int(e[5:]) for e in environment if e.startswith(b"RANK=")), 0)] = pid
        return found

    def said(self) -> str:
        return self.output.read_text()

    @property
    def running(self) -> list[int]:
        """The pids of all launchers and workers that have not ended."""
        alive = [process.pid for process in self.launchers if process.poll() is None]
        return sorted({*alive, *processes_of(self.run_dir)})

    def ended(self, seconds: float) -> bool:
        """Wait until nothing is running; False if something still is after `seconds`."""
        return until(lambda: not self.running, seconds)


def python(place: Path, run_dir: Path, *overrides: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *arguments_of(place, run_dir, *overrides)]


def send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def until(condition, seconds: float, every: float = 0.02) -> bool:
    """Wait for the condition; False if it does not hold within `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(every)
    return True
