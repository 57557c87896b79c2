"""What a run reports: a line on the terminal, a JSON line in metrics.jsonl, values on boards.py, a progress bar."""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastdit import kernels
from fastdit.cards import card_of
from fastdit.config import to_tree
from fastdit.data.manifest import Manifest
from fastdit.distributed import Ranks, return_freed_memory
from fastdit.errors import counted
from fastdit.files import append_json, append_to, as_json, read_bytes, replace_text
from fastdit.models.dit import DiT
from fastdit.models.routing import Routing
from fastdit.schema import Config
from fastdit.training.boards import Boards

RECORDS = 1 << 30  # bytes of metrics.jsonl: 400,000 steps at log_every=1 take 120 MB


class LossWindow:
    """The loss, and its parts where there are several, summed on the device since the last log line."""

    def __init__(self, device: torch.device):
        self.device, self.sums = device, {"loss": torch.zeros(2, device=device)}  # name -> sum, number of steps

    def add(self, losses: dict[str, Tensor], skipped: Tensor) -> None:
        """The global mean losses of one step, 0-dim; a skipped step does not count. Nothing waits for the device."""
        for name, loss in losses.items():
            total = self.sums.setdefault(name, torch.zeros(2, device=self.device))
            total += torch.stack([loss, torch.ones_like(loss)]).where(~skipped, 0)

    def means(self) -> dict[str, float]:
        """Over the steps, nan where every step was skipped; waits for the device."""
        return {name: (total[0] / total[1]).item() for name, total in self.sums.items()}

    def clear(self) -> None:
        self.sums = {"loss": torch.zeros(2, device=self.device)}

    def load(self, sums: dict[str, Tensor]) -> None:
        self.sums = {name: total.to(self.device) for name, total in sums.items()}


class Log:
    """Writes records on the main process; elsewhere nothing but `say_own`.

    `images` to train on; `flops_per_image(step)` of a whole training step.
    """

    def __init__(
        self, run_dir: Path, ranks: Ranks, start: int, config: Config, *, images: int,
        flops_per_image: Callable[[int], float],
    ):
        self.ranks, self.device, self.run_dir, steps = ranks, ranks.device, run_dir, config.training.steps
        self.peak = 0.0
        reset_peak(self.device)  # what the preparation took does not count
        if not ranks.is_main:
            return
        peak_flops = ranks.world * peak_flops_of(ranks.device)
        self.flops_per_image, self.peak_flops = flops_per_image, peak_flops
        self.steps, self.steps_per_epoch = steps, images / config.training.global_batch
        rewind(run_dir / "metrics.jsonl", start)
        rewind(run_dir / "skipped.jsonl", start)
        self.skipped_path = run_dir / "skipped.jsonl"
        self.file = append_to(run_dir / "metrics.jsonl")
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=not sys.stderr.isatty(), smoothing=0.05)
        self.boards = Boards(run_dir, start, config.training.wandb, to_tree(config), self.say)

    def step(self) -> None:
        if self.ranks.is_main:
            self.bar.update(1)

    def write(self, step: int, losses: dict[str, float], *, grad_norm: float, lr: float, seconds: float, steps: int,
              images: int, monitor_s: float = 0.0) -> None:  # fmt: skip
        """One record over the last `steps` steps, which took `seconds` for `images` images of all processes.

        `losses`: `loss`, and its parts where there are several. `monitor_s`: what the monitor will still take.
        """
        if not self.ranks.is_main:
            return
        record = {
            **losses,
            "grad_norm": grad_norm,
            "lr": lr,
            "steps_per_s": steps / seconds,
            "images_per_s": images / seconds,
            "mfu": images / seconds * self.flops_per_image(step) / self.peak_flops,
            "peak_gib": self.peak_gib(),
        }
        self.record(step, record)
        eta = timedelta(seconds=round((self.steps - step) * seconds / steps + monitor_s))
        self.say(
            f"step {step}/{self.steps} ({step / self.steps:.0%})  epoch {step / self.steps_per_epoch:.2f}  "
            + "".join(f"{name} {value:.4f}  " for name, value in losses.items())
            + f"grad {grad_norm:.3f}  lr {lr:.2e}  {record['images_per_s']:.1f} images/s"
            f"  {record['steps_per_s']:.2f} steps/s  mfu {record['mfu']:.1%}  peak {record['peak_gib']:.2f} GiB"
            f"  eta {eta}"
        )

    def peak_gib(self) -> float:
        """Peak memory of all steps so far in GiB, without what `reset_peak` leaves out.

        A replayed CUDA graph allocates nothing: the peak of such a run is that of the capture.
        """
        self.peak = max(self.peak, peak_gib(self.device))
        return self.peak

    def record(
        self, step: int, values: Mapping[str, float | list[float]], pictures: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """A line of metrics.jsonl, and the same on the boards, with pictures uint8 (H, W, 3)."""
        if self.ranks.is_main:
            self.file.write(as_json({"step": step, **values, "time": time.time()}))
            self.boards.write(step, values, pictures or {})

    def skip(self, step: int, keys: list[int], times: list[float], replaced: Mapping[int, int] | None = None) -> None:
        """A step that was not finite and changed nothing: the keys of its samples and their times.

        `replaced`: what data.skip_damaged took instead of some of them, by their keys.
        """
        if not self.ranks.is_main:
            return
        more = {"replaced": replaced} if replaced else {}
        append_json(self.skipped_path, {"step": step, "keys": keys, "times": times, **more})
        self.say(f"step {step}  skipped: its loss or gradient is not finite; see {self.skipped_path}")

    def say(self, line: str) -> None:
        if not self.ranks.is_main or not line:
            return
        say(self.run_dir, line, print if self.bar.disable else tqdm.write)

    def say_own(self, line: str) -> None:
        """Like `say`, for what only this process knows: it prints on every process."""
        self.say(line) if self.ranks.is_main else say(self.run_dir, line)

    def close(self) -> None:
        if not self.ranks.is_main:
            return
        self.bar.close()
        self.boards.close()
        self.file.close()


def say(run_dir: Path, line: str, show: Callable[[str], None] = print) -> None:
    """A line on the terminal and in train.log."""
    with append_to(run_dir / "train.log") as file:
        file.write(line + "\n")
    show(line)
    sys.stdout.flush()


def training_flops(model: DiT, routing: Routing | None) -> Callable[[int], float]:
    """FLOPs per image of a training step, by its number from 1: the forward pass, and twice that backward."""
    whole = 3 * model.flops_per_image()
    routed = 3 * model.flops_per_image(routing.lengths(model)) if routing else whole
    return lambda step: routed if routing and step <= routing.full_from else whole


def start_line(
    config: Config,
    model: DiT,
    manifest: Manifest,
    ranks: Ranks,
    engine: str,
    policy: str,
    batch: tuple[int, int, int],
    origin: str,
    predicted_s: float,
) -> str:
    """What a run has resolved, in one line; `batch`: processes, images per forward pass, forward passes per step.

    `predicted_s`: of the training; 0: unknown.
    """
    steps, images = config.training.steps, config.training.global_batch
    threads = ""
    if ranks.device.type == "cpu":
        waiting = f"waiting {os.environ.get('OMP_WAIT_POLICY', 'default')}"
        spin = f", spin {os.environ['GOMP_SPINCOUNT']}" if "GOMP_SPINCOUNT" in os.environ else ""
        threads = f", {counted(torch.get_num_threads(), 'thread')} {waiting}{spin}"
    return (
        f"{config.model.variant}: {model.parameter_count():,} parameters, {counted(len(manifest), 'image')}, "
        f"{ranks.world} x {ranks.device} ({engine}{threads}), attention {model.blocks[0].attn.backend}, "
        f"kernels {kernels.choice()}, checkpointing {policy}, batch {' x '.join(map(str, batch))}, "
        f"{counted(steps, 'step')} = {steps * images / len(manifest):.1f} epochs, {origin}"
        + (f", predicted to take {timedelta(seconds=round(predicted_s))}" if predicted_s else "")
    )


def read_metrics(run_dir: str | Path) -> list[dict]:
    """The records of metrics.jsonl, oldest first: numbers, or None where one was not finite; [] if there is no file."""
    numbers = (int, float, type(None))
    return [
        record
        for record in read_records(Path(run_dir) / "metrics.jsonl")
        if {"step", "steps_per_s"} <= record.keys() and all(isinstance(value, numbers) for value in record.values())
    ]


def read_records(path: Path) -> list[dict]:
    """The objects in the lines of a file, without lines that hold none, as a power loss leaves them."""
    try:
        lines = read_bytes(path, RECORDS).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise ValueError(f"{error}; remove it") from None
    found = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            record = json.loads(line, parse_int=_int)
            found += [record] if isinstance(record, dict) else []
    return found


def _int(text: str) -> int:
    if len(text) > 18:
        raise ValueError(f"{text[:20]}... is too large")
    return int(text)


def rewind(path: Path, step: int) -> None:
    """Drop the records after `step`, which a resumed run writes again, and lines that are not records."""
    if os.path.lexists(path):
        kept = [record for record in read_records(path) if type(record.get("step")) is int and record["step"] <= step]
        replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def reset_peak(device: torch.device) -> None:
    """`peak_gib` starts anew; on a CPU where the system allows it, which is Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        return_freed_memory()  # of what is not to count
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: of the GPU's allocator, or of the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)  # B, KiB


def peak_flops_of(device: torch.device) -> float:
    """FLOP/s that MFU is relative to: the datasheet's dense bf16 rate; for other devices, one product timed here."""
    card = card_of(device)
    if card is not None:
        return card.tflops * 1e12
    size = 4096 if device.type == "cuda" else 512
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.ones(size, size, device=device, dtype=dtype).uniform_(generator=torch.Generator(device).manual_seed(0))
    best = float("inf")
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
