"""A command in a forked process with limits on time and memory, and a hook that sees what it starts and writes."""

import os
import resource
import runpy
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

import torch

from helpers import ROOT
from helpers.runs import ENVIRONMENT, FORKS

LIMIT_S, MEMORY = 10.0, 6 << 30
STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen")
# the positions of the path, and of the descriptor of the folder that it is relative to
MAKES = {"os.mkdir": (0, 2), "os.rename": (1, 3), "os.link": (1, 3), "os.symlink": (1, 2), "os.remove": (0, 1),
         "os.rmdir": (0, 1)}  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
OWN = ("git", "uname")  # started by a run itself, to record where it runs
EXECUTED, OUTSIDE, HANGS, TRACEBACKS, WRONG = "executed", "written outside", "hangs", "tracebacks", "wrong end"

LOCK = threading.Lock()  # `start` also looks after the processes of other threads


@dataclass
class Outcome:
    """How a command ended, and by kind what it did that nothing may do."""

    command: list[str]
    code: int | None  # None: killed after LIMIT_S
    said: str
    seconds: float
    gib: float  # peak resident memory
    faults: list[tuple[str, str]] = field(default_factory=list)


def watch(folder: Path, command: list[str], refused: bool | None = None) -> Outcome:
    """Run a script of the repository, [path, *arguments], which may write below folder/out.

    `refused`: whether it must exit with 2 (None: 0 is right as well). folder/canary exists if a payload has run.
    """
    for name in ("out", "cwd", "tmp"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    log, events = folder / "log", folder / "events"
    log.write_text(""), events.write_text("")
    process = FORKS.Process(target=confined, args=(folder, command))
    with LOCK:
        process.start()
    start = time.perf_counter()
    ended = wait([process.sentinel], LIMIT_S)
    seconds = time.perf_counter() - start
    with LOCK:
        process.kill()
        process.join()
    code = process.exitcode if ended else None
    said = log.read_text(errors="replace")
    reported = [tuple(line.split("\t", 1)) for line in events.read_text(errors="replace").splitlines()]
    gib = max((float(value) for kind, value in reported if kind == "gib"), default=0.0)
    faults = [event for event in reported if event[0] != "gib"]
    if (folder / "canary").exists():
        faults.append((EXECUTED, "the payload has run"))
    lines = [line for line in said.splitlines() if line.startswith(("error: ", "wrong: "))]
    if code is None:
        faults.append((HANGS, f"not finished after {LIMIT_S:g} s"))
    elif code not in (0, 2) or "Traceback" in said or "panicked" in said:
        faults.append((TRACEBACKS, f"exit code {code}"))
    elif code == 2 and (not lines or sum(line.startswith("error: ") for line in lines) > 1):
        faults.append((TRACEBACKS, "exit code 2 without a line that explains it"))
    elif refused not in (None, code == 2):
        faults.append((WRONG, f"exit code {code}"))
    return Outcome(command, code, said, seconds, gib, faults)


def confined(folder: Path, command: list[str]) -> None:
    """The body of the process."""
    with open(folder / "log", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    events = os.open(folder / "events", os.O_WRONLY | os.O_APPEND)
    os.environ |= ENVIRONMENT | {"HF_HUB_OFFLINE": "1"}
    tempfile.tempdir = f"{folder}/tmp"
    os.chdir(folder / "cwd")
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    script = str(ROOT / command[0])
    sys.argv = [script, *command[1:]]
    peak = f"/proc/{os.getpid()}/clear_refs"  # a run writes there to reset its peak memory
    sys.addaudithook(hook(events, (f"{folder}/out/", f"{folder}/tmp/", "/dev/null", peak)))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kilobytes on Linux
        os.write(events, f"gib\t{peak}\n".encode())


def hook(events: int, allowed: tuple[str, ...]) -> Callable:
    """An audit hook that reports what is started, and what is opened for writing, made or removed elsewhere."""

    def audit(event: str, arguments: tuple) -> None:
        if event in STARTS and arguments[0] not in OWN:
            os.write(events, f"{EXECUTED}\t{event} {arguments[:2]!r}\n".encode(errors="replace"))
        path, at, follows = None, -1, False
        if event in MAKES:
            which, folder = MAKES[event]
            path, at = arguments[which], arguments[folder]
        if event == "open" and arguments[2] & WRITES:
            path, follows = arguments[0], not arguments[2] & (os.O_EXCL | os.O_NOFOLLOW)
        if isinstance(path, str | bytes):
            whole = Path(f"/proc/self/fd/{at}" if at != -1 else os.getcwd()) / os.fsdecode(path)
            real = os.path.realpath(whole) if follows else f"{os.path.realpath(whole.parent)}/{whole.name}"
            if not (real + "/").startswith(allowed):
                os.write(events, f"{OUTSIDE}\t{event} {real!r}\n".encode(errors="replace"))

    return audit
