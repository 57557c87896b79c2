"""What may stop a run: steps that are not finite, signals, a stop file, the clock. All processes agree on it.

Each step reduces four flags over the processes, on the device: skipped, stop, save and failed. The host reads them LAG
steps later, when they have arrived, so no step waits for the device, and every process acts after the same step.
"""

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastdit.distributed import Ranks
from fastdit.errors import counted
from fastdit.launcher import under_deepspeed
from fastdit.lock import process_fields

LAG = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped by request after a checkpoint; the same command with --resume continues
AGAIN_S = 1.0  # until then a signal is the same request: launchers pass on what SLURM or a terminal also sent to us
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")  # USR1 is SLURM's warning before the time limit


class Requests:
    """Asks for a stop on a signal, a file `run_dir/stop` or after `time_limit_s`, and for a checkpoint by the clock.

    The time limit counts from `started` on, a time of time.monotonic, by default now.
    A second signal, AGAIN_S or more after the first, ends the process at once. A context manager: leaving it restores
    the signal handlers.
    """

    def __init__(self, run_dir: Path, time_limit_s: float, checkpoint_s: float, started: float | None = None):
        self.stop_file, self.start = run_dir / "stop", time.monotonic() if started is None else started
        self.time_limit_s, self.checkpoint_s, self.saved = time_limit_s, checkpoint_s, time.monotonic()
        self.reason, self.looked, self.launcher = "", -1.0, parent_of(os.getppid())
        self.before: dict[int, object] = {}
        self.signaled: float | None = None  # when the first signal came

    def __enter__(self) -> "Requests":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            numbers = [getattr(signal, name) for name in SIGNALS]
            self.before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        self.stop_file.unlink(missing_ok=True)  # otherwise the next run would stop as well
        for number, handler in self.before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _handle(self, number: int, frame) -> None:
        if self.signaled is None:
            self.signaled, self.reason = time.monotonic(), signal.Signals(number).name
        elif time.monotonic() - self.signaled >= AGAIN_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            os._exit(128 + number)  # process 1, as in a container, outlives its own signal

    def poll(self) -> tuple[bool, bool]:
        """(stop, save), as this process sees it."""
        now = time.monotonic()
        if now - self.looked >= 1:  # a lookup on a shared disk may take milliseconds
            self.looked = now
            if not self.reason and self.stop_file.exists():
                self.reason = f"the file {self.stop_file}"
            if not self.reason and under_deepspeed() and parent_of(os.getppid()) != self.launcher:
                self.reason = "the end of the deepspeed launcher"  # which leaves launch.py and its workers running
        if not self.reason and self.time_limit_s and now - self.start >= self.time_limit_s:
            self.reason = "training.time_limit"
        return bool(self.reason), bool(self.checkpoint_s and now - self.saved >= self.checkpoint_s)


def parent_of(pid: int) -> str:
    """The parent of a process, "" where there is no /proc."""
    fields = process_fields(pid)
    return fields[1] if fields else ""


class Guard:
    """Reads each step's flags LAG steps later; ends the run after `limit` skipped steps in a row.

    `on_skip(step)` is called for each skipped step.
    """

    def __init__(self, limit: int, ranks: Ranks, on_skip: Callable[[int], None]):
        self.limit, self.ranks, self.on_skip = limit, ranks, on_skip
        self.pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        self.in_a_row = 0
        self.stop = self.save = self.failed = False

    def add(self, step: int, skipped: Tensor, stop: bool, save: bool, failed: bool) -> None:
        """`skipped` (0-dim, on the device): step number `step` was not finite and changed nothing.

        `stop`, `save`: see `Requests.poll`; `failed`: this process could not write a checkpoint.
        """
        flags = torch.stack([skipped.float()] + [skipped.new_full((), flag).float() for flag in (stop, save, failed)])
        flags = self.ranks.max(flags)
        event = None
        if flags.is_cuda:
            flags = flags.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.pending.append((step, flags, event))
        while len(self.pending) > LAG * (event is not None):
            self._read()

    def flush(self) -> None:
        """Read the flags of all steps so far; waits for the device."""
        while self.pending:
            self._read()

    def _read(self) -> None:
        step, flags, event = self.pending.popleft()
        if event is not None:
            event.synchronize()
        skipped, stop, save, failed = (bool(flag) for flag in flags.tolist())
        self.stop, self.save, self.failed = self.stop or stop, self.save or save, self.failed or failed
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if skipped:
            self.on_skip(step)
        if self.in_a_row >= self.limit:
            raise ValueError(
                f"the loss or the gradient was not finite in {counted(self.limit, 'step')} in a row "
                f"(training.max_skipped), up to step {step}; they changed no weight: lower training.lr, set "
                "training.grad_clip=1, or look at the samples named in skipped.jsonl"
            )
