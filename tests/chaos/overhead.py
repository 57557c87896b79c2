"""Table 7: what finite checks, checksums and asynchronous saving cost, in one run of a 33M-parameter network.

The variants take turns, segment by segment, in the same process.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

from chaos.table import Table
from fastdit.config import load_config
from fastdit.training import checkpoint, loop
from fastdit.training.ema import EMA
from fastdit.training.engine import TorchEngine
from fastdit.training.guard import Guard
from fastdit.training.log import Log
from fastdit.training.state import TrainingState

SEGMENT, ROUNDS = 6, 5  # steps; repeats of each variant
EVERY = 100  # steps between saves: the target is for this
TARGET = 0.02
NOTHING, CHECKS, WAITING, SAVING, UNHASHED = VARIANTS = (
    "neither checks nor saves", "finite checks", "saves that the step waits for", "saves in the background",
    "the same without SHA-256",
)  # fmt: skip
XL_PARAMETERS, XL_STEP_S, LINK = 675_129_632, 0.3691, 50e9  # DiT-XL/2 on one H200 (README), PCIe 5 in bytes/s


class Bench:
    """Patches of the training loop: at every segment's first step, the next variant's turn."""

    def __init__(self):
        self.variant, self.writer, self.step, self.start = NOTHING, None, 0, 0.0
        self.seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        self.copies: list[float] = []
        self.writes: list[float] = []

    def turn(self, log: Log) -> None:
        """In place of Log.step, after each step and before a save."""
        self.step += 1
        if (self.step - 1) % SEGMENT:
            return
        if self.writer and self.writer.pending:
            self.writer.pending.exception()  # a save that takes longer than its segment delays the end of it
        now = time.perf_counter()
        if self.step > 1 + SEGMENT * len(VARIANTS):  # the first round warms up
            self.seconds[self.variant].append(now - self.start)
        self.variant = VARIANTS[((self.step - 1) // SEGMENT) % len(VARIANTS)]
        self.start = time.perf_counter()

    def patches(self) -> list:
        originals = (Guard.add, TorchEngine.step, TrainingState.snapshot, checkpoint.Writer.start, checkpoint.save,
                     checkpoint.sha256)  # fmt: skip
        add, step, snapshot, start, save, sha256 = originals

        def guarded(guard, done, skipped, *flags) -> None:
            if self.variant != NOTHING:
                add(guard, done, skipped, *flags)

        def stepping(engine, lr, bad, ema, number):
            plain = self.variant == NOTHING
            return plain_step(engine, lr, ema, number) if plain else step(engine, lr, bad, ema, number)

        def copying(state):
            if self.variant in (NOTHING, CHECKS):
                return {}
            begin = time.perf_counter()
            copies = snapshot(state)
            self.copies.append(time.perf_counter() - begin)
            return copies

        def starting(writer, done, write, meta) -> Path:
            self.writer = writer
            if self.variant not in (NOTHING, CHECKS):
                start(writer, done, write, meta)
            if self.variant == WAITING:
                writer.wait()
            return checkpoint.path_of(writer.run_dir, done)

        def saving(*arguments) -> None:
            begin = time.perf_counter()
            save(*arguments)
            if self.variant == SAVING:
                self.writes.append(time.perf_counter() - begin)

        def hashing(path: Path) -> str:
            return "" if self.variant == UNHASHED else sha256(path)

        return [
            patch.object(Guard, "add", guarded), patch.object(TorchEngine, "step", stepping),
            patch.object(TrainingState, "snapshot", copying), patch.object(checkpoint.Writer, "start", starting),
            patch.object(checkpoint, "save", saving), patch.object(checkpoint, "sha256", hashing),
            patch.object(Log, "step", self.turn_of()),
        ]  # fmt: skip

    def turn_of(self) -> Callable[[Log], None]:
        return lambda log: self.turn(log)


def plain_step(engine: TorchEngine, lr: float, ema: EMA, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """TorchEngine.step without the finite check; the norm is logged in any case."""
    norm = nn.utils.get_total_norm([p.grad for p in engine.parameters])
    engine.adam.found_inf = None
    engine.set_lr(lr)
    engine.adam.step()
    engine.adam.zero_grad(set_to_none=True)
    ema.update(engine.parameters, number, skipped := torch.tensor(False))
    return norm, skipped


def run(place: Path, seed: int) -> Table:
    bench, steps = Bench(), SEGMENT * len(VARIANTS) * (ROUNDS + 1) + 1
    config = load_config(place / "config.yaml", [
        f"run_dir={place}/overhead", "model.variant=DiT-S/4", f"training.steps={steps}", "training.global_batch=96",
        f"training.log_every={steps}", f"training.checkpoint_every={SEGMENT}", "training.keep_checkpoints=1",
        f"seed={seed}",
    ])  # fmt: skip
    with ExitStack() as stack:
        for patched in bench.patches():
            stack.enter_context(patched)
        loop.train(config, device="cpu")
    return report(bench)


def report(bench: Bench) -> Table:
    step = statistics.median(bench.seconds[CHECKS]) / SEGMENT
    table = Table(
        "Overhead",
        "A run of DiT-S/4 (33M parameters, 16 bytes of state each) on one CPU thread, while the thread that writes "
        f"has the other core. Segments of {SEGMENT} steps take turns, {ROUNDS} of each kind; a segment of a kind that "
        "saves begins with one save, and ends after it has been written. *Cost*: the median of the differences between "
        "segments of one round, with the smallest and the largest; that of the checks relative to a step, that of a "
        f"save relative to {EVERY} steps of {step:.2f} s. The target is {TARGET:.0%} for one save in {EVERY} steps. "
        "The last row is predicted, not measured: the copy of DiT-XL/2's state from one H200 to pinned memory at 50 "
        "GB/s, relative to the step that the README reports; the thread that writes shares nothing with the GPU.",
        ["what", "seconds of a segment", "cost in seconds", "cost"],
    )
    seconds = bench.seconds
    table.rows.append([NOTHING, spread(seconds[NOTHING]), "", ""])
    checks = [(b - a) / a for a, b in zip(seconds[NOTHING], seconds[CHECKS], strict=True)]
    cost = spread([(b - a) / SEGMENT for a, b in zip(seconds[NOTHING], seconds[CHECKS], strict=True)], 4)
    table.rows.append([CHECKS, spread(seconds[CHECKS]), f"{cost} per step", percent(checks)])
    for variant in (WAITING, SAVING, UNHASHED):
        costs = [b - a for a, b in zip(seconds[CHECKS], seconds[variant], strict=True)]
        shares = [cost / (EVERY * step) for cost in costs]
        table.rows.append([variant, spread(seconds[variant]), f"{spread(costs)} per save", percent(shares)])
        if variant == SAVING:
            table.check(statistics.median(shares) < TARGET, f"a save costs {percent(shares)} of {EVERY} steps")
    table.rows.append(["of these, the copy into host memory", "", f"{spread(bench.copies)} per save",
                       percent([copy / (EVERY * step) for copy in bench.copies])])  # fmt: skip
    table.rows.append(["the write in the background", "", f"{spread(bench.writes)} per save", ""])
    copy = 16 * XL_PARAMETERS / LINK
    share = copy / (EVERY * XL_STEP_S)
    table.rows.append(["predicted: DiT-XL/2 on one H200", "", f"{copy:.2f} per save", f"{share:.1%}"])
    return table


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def percent(shares: list[float]) -> str:
    return f"{statistics.median(shares):.1%} ({min(shares):.1%} to {max(shares):.1%})"
