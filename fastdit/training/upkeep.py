"""What every training does around its steps: it locks its folder, logs, saves, stops when asked to, and is watched."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

from fastdit import __version__, distributed
from fastdit.config import leaves, to_tree
from fastdit.distributed import Ranks
from fastdit.lock import FolderLock
from fastdit.schema import LoopConfig
from fastdit.training import checkpoint
from fastdit.training.guard import EXIT_STOPPED, Guard, Requests
from fastdit.training.log import Log, LossWindow, say
from fastdit.training.step import StepResult
from fastdit.training.watchdog import LOGS, Watchdog

PLACES = {  # keys that may name another folder on each machine
    "run_dir", "data.shards", "data.cache", "data.features", "data.vae", "data.val_shards", "data.images",
    "data.val_images", "loss.vgg", "training.init_from", "training.reference", "training.loss_reference",
}  # fmt: skip


@contextmanager
def run_folder(config, resume: bool, device: str | None, report: Callable | None) -> Iterator[tuple[Path, Ranks]]:
    """The folder of a run, locked, and its processes; ValueError unless the run may write there.

    At the end, `report(run_dir, device)` writes the report on the main process, and returns a line to log.
    """
    ranks = distributed.init(device, 2 * config.training.timeout_s)  # the watchdog speaks first
    run_dir = Path(config.run_dir)
    checkpoint.check_run_dir(run_dir, resume)
    with FolderLock(run_dir, "run_dir") if ranks.is_main else nullcontext():
        yield run_dir, ranks
        if report and config.training.report and ranks.is_main:  # now, when the training's memory is free
            say(run_dir, report(run_dir, ranks.device))


def agree(ranks: Ranks, config: Any, last: Path | None, files: dict[str, Any]) -> None:
    """ValueError unless all processes have the same config and continue the same checkpoint with the same `files`."""
    settings = {key: value for key, value in leaves(to_tree(config)) if key not in PLACES}
    ranks.agree({"fastdit": __version__, "checkpoint": last and last.name, **settings, **files})


class Upkeep(ExitStack):
    """A context around the steps of a run: `begin`, `after` each step, `end`.

    `requests` was made before the run was prepared, so that the time limit includes it. `snapshot()` copies the state
    and returns what writes it to a folder; `facts` are for checkpoint.json.
    `on_skip(step)`: see Guard. `remaining(step)`: seconds that the monitor will still take. What it takes is added to
    `clock`, and so does not count as training.
    """

    def __init__(
        self, run_dir: Path, ranks: Ranks, settings: LoopConfig, log: Log, window: LossWindow,
        requests: Requests, snapshot: Callable[[], Callable[[Path], None]], facts: dict[str, Any],
        on_skip: Callable[[int], None], remaining: Callable[[int], float] = lambda step: 0.0,
    ):  # fmt: skip
        super().__init__()
        self.settings, self.log, self.window = settings, log, window
        self.snapshot, self.facts, self.remaining, self.last = snapshot, facts, remaining, None
        self.guard = Guard(settings.max_skipped, ranks, on_skip)
        self.watchdog = self.enter_context(Watchdog(run_dir, ranks, settings.timeout_s))
        self.writer = self.enter_context(
            checkpoint.Writer(run_dir, ranks, settings.keep_checkpoints, settings.keep_every)
        )
        self.requests = self.enter_context(requests)
        if seconds := settings.time_limit_s:  # 30:00 is 30 hours, which Slurm reads as 30 minutes
            log.say(f"training.time_limit={settings.time_limit}: saves and stops after {timedelta(seconds=seconds)}")

    def begin(self, step: int) -> None:
        self.clock, self.clock_step = time.perf_counter(), step

    def after(self, done: int, result: StepResult, lr: float) -> None:
        """After step number `done`: a log line and a checkpoint where they are due. SystemExit for a run to stop."""
        settings, guard = self.settings, self.guard
        self.window.add(result.losses, result.skipped)
        guard.add(done, result.skipped, *self.requests.poll(), self.writer.failed)
        log_due = done % settings.log_every == 0 or done == settings.steps
        save_due = done % settings.checkpoint_every == 0 or done == settings.steps
        self.log.step()
        self.watchdog.at(done, LOGS)
        if log_due or save_due:
            guard.flush()
            means = self.window.means()  # the only wait for the device
        if log_due:
            seconds, steps = time.perf_counter() - self.clock, done - self.clock_step
            self.begin(done)
            self.window.clear()
            self.log.write(done, means, grad_norm=result.grad_norm.item(), lr=lr, seconds=seconds, steps=steps,
                           images=steps * settings.global_batch, monitor_s=self.remaining(done))  # fmt: skip
        if save_due or guard.save or guard.stop or guard.failed:
            self.writer.wait()  # raises the error of a failed write; the copy below replaces what it reads
            self.last = self.writer.start(done, self.snapshot(), self.facts)
            guard.save, self.requests.saved = False, time.monotonic()
        if guard.stop and done < settings.steps:
            self.writer.wait()
            reason = self.requests.reason or "another process"
            self.log.say(f"stopped at step {done} by {reason}: continue with --resume")
            raise SystemExit(EXIT_STOPPED)

    def end(self) -> Path | None:
        """The last checkpoint, complete; None if there were no steps."""
        self.writer.wait()
        return self.last
