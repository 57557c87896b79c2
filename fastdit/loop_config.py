"""The settings that the training of a network and that of an autoencoder have in common."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from fastdit.registry import Choice


def require(holds: bool, key: str, value: Any, remedy: str) -> None:
    if not holds:
        raise ValueError(f"{key}={value!r} is out of range; {remedy}")


@dataclass(frozen=True)
class LoopConfig:
    """What the training of a network and that of an autoencoder have in common."""

    steps: int = 400_000
    epochs: float = 0.0  # passes over the images, instead of steps; 0: steps count
    global_batch: int = 256  # images per step, over all processes
    micro_batch: int = 0  # images per forward pass and process; 0: all of its images
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 0  # linear learning-rate warmup
    lr_schedule: Choice = Choice("constant")  # linear, cosine, inverse_sqrt or wsd, see training/schedule.py
    grad_clip: float = 0.0  # maximum gradient norm; 0: no clipping
    ema_decay: float = 0.9999
    ema_warmup: bool = False  # decay min(ema_decay, (1 + step) / (10 + step)), for runs of a few hundred steps
    precision: Literal["bf16", "fp32"] = "bf16"  # of the computation; weights, optimizer state and EMA are always fp32
    log_every: int = 50
    checkpoint_every: int = 10_000
    checkpoint_minutes: float = 0.0  # also save whenever this much time has passed; 0: never
    keep_checkpoints: int = 3  # number of most recent checkpoints to keep; 0: all
    keep_every: int = 0  # also keep those whose step is a multiple of this; 0: none
    wandb: str = ""  # log to this project of Weights & Biases, too; offline where there is no API key
    max_skipped: int = 3  # end the run after this many steps in a row whose loss or gradient is not finite
    timeout_s: float = 600.0  # if a step takes longer, the run names the process that stalls, and ends
    time_limit: str = ""  # HH:MM, or minutes, after which the run saves and stops with exit code 75; "": none

    def __post_init__(self):
        for key in ("steps", "global_batch", "log_every", "checkpoint_every"):
            require(getattr(self, key) >= 1, f"training.{key}", getattr(self, key), "use 1 or more")
        for key in ("epochs", "weight_decay", "warmup_steps", "grad_clip", "keep_checkpoints", "keep_every"):
            require(getattr(self, key) >= 0, f"training.{key}", getattr(self, key), "use 0 or more")
        require(self.timeout_s > 0, "training.timeout_s", self.timeout_s, "use a positive number of seconds")
        require(self.max_skipped >= 1, "training.max_skipped", self.max_skipped, "use 1 or more, 3 by default")
        require(
            self.checkpoint_minutes >= 0, "training.checkpoint_minutes", self.checkpoint_minutes, "use 0 for never"
        )
        limit = not self.time_limit or re.fullmatch(r"(\d+:[0-5])?\d+", self.time_limit)
        require(limit, "training.time_limit", self.time_limit, "use HH:MM, or minutes")
        require(0 < self.lr < float("inf"), "training.lr", self.lr, "use a positive learning rate, 1e-4 in the paper")
        require(0 <= self.ema_decay < 1, "training.ema_decay", self.ema_decay, "use [0, 1), 0.9999 in the paper")

    @property
    def time_limit_s(self) -> float:
        """Seconds; 0 for no limit. A number is minutes: YAML itself reads 1:30 as 90."""
        hours, _, minutes = self.time_limit.rpartition(":")
        return 3600 * int(hours or 0) + 60 * int(minutes or 0)
