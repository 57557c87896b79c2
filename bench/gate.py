"""The gate that every contestant of bench/step.py passes before it is timed: the losses and ways of the plain network.

A few steps from the same weights, each on images, noise, times and dropped labels of its own and at a learning rate of
its own, so that a replayed CUDA graph cannot get by with what it was captured with.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reference import Inputs
from torch import Tensor

from fastdit.distributed import StepRandom, step_generator

# of each step, in units of the learning rate. A CUDA graph runs three steps as they are, is captured in the fourth and
# replayed as a stranger in the fifth alone, whose rate must therefore show in the weights
RATES = (1.0, 1.0, 1.0, 0.25, 4.0)
GATE_STEPS = len(RATES)

# of the gate's two errors: losses, and ways of the weights (Adam moves a weight whose gradient is all rounding as far
# as any other, so these differ more). For scale: bf16 shows 5e-4 in the losses, FP8 (emulated, 6 x 384) 3e-3 and 0.05,
# times off by one of 1000 steps 5e-3
TOLERANCE = {"fp32": (1e-4, 1e-2), "tf32": (2e-3, 0.1), "fp16": (2e-3, 0.1), "bf16": (4e-3, 0.15),
             "fp8": (4e-3, 0.15)}  # fmt: skip


@dataclass
class Verdict:
    """What the gate's steps came to, on the CPU."""

    losses: list[Tensor]  # (N,) of every step
    moved: Tensor  # norm of the way that each weight tensor, then its average, went from the start; by name
    precision: str
    first_done: float  # time.perf_counter() at the end of the first step


@dataclass
class Gated:
    """A contestant that has run its first steps: what came out, the batch that fitted, seconds to the first step."""

    verdict: Verdict
    batch: int
    first_step_s: float


def gate_inputs(
    batches: list[tuple[Tensor, Tensor]], device: torch.device, *, seed: int, scale: float, class_dropout: float,
    null_label: int,
) -> list[Inputs]:  # fmt: skip
    """Of every step, from the host's (moments, y) by turns: what (seed, step) draws, written in plain tensors."""
    inputs = []
    for step in range(GATE_STEPS):
        moments, y = (value.to(device) for value in batches[step % len(batches)])
        mean, std = moments.chunk(2, dim=1)
        random = StepRandom(step_generator(seed, step, device), slice(None), len(y))
        x_0 = (mean + std * random.randn(*mean.shape[1:])) * scale
        y = torch.where(random.rand() < class_dropout, null_label, y)
        index = (1000 * random.rand().double()).long()
        inputs.append(Inputs(x_0, y, index, random.randn(*mean.shape[1:])))
    return inputs


def check_drawn(step: int, drawn: Inputs, wanted: Inputs) -> None:
    """ValueError where a step's inputs are not those that its seed, number and batch say."""
    for name, value in vars(wanted).items():
        if not torch.allclose(getattr(drawn, name).double(), value.double(), atol=1e-5):
            raise ValueError(f"step {step} computed on another {name} than its seed, number and batch say")


def gate_errors(verdict: Verdict, truth: Verdict) -> tuple[float, float]:
    """(of the losses, of the ways that weights and averages went): root mean square of the relative differences."""

    def distance(ours: Tensor, theirs: Tensor) -> float:
        return float((ours / theirs - 1).square().mean().sqrt())

    return (
        distance(torch.stack(verdict.losses), torch.stack(truth.losses)),
        distance(verdict.moved, truth.moved),
    )


def objection(gated: Gated, errors: tuple[float, float]) -> str:
    """Empty when the contestant computes what it should."""
    most = TOLERANCE[gated.verdict.precision]
    if all(error <= limit for error, limit in zip(errors, most, strict=True)):
        return ""
    return f"computes something else: losses differ by {errors[0]:.1e}, ways of the weights by {errors[1]:.1e}"


class Judge:
    """What the plain network in fp32 makes of the gate's inputs, for each batch that a contestant has; and who agrees.

    `case`: any contestant's. `file` keeps what was learned for another run.
    """

    def __init__(self, case: Any, file: Path | None):
        self.oracle = dataclasses.replace(case, name="oracle", stack="oracle", overrides=(), repo="")
        self.file = file
        self.truths = torch.load(file, weights_only=False) if file and file.is_file() else {}

    def knows(self, gated: Gated) -> bool:
        return self._key(gated) in self.truths

    def learn(self, gated: Gated, worker: Any, timeout_s: float) -> None:
        """Have a fresh `worker` find out what is right for the batch of `gated`."""
        case = dataclasses.replace(self.oracle, batch=gated.batch)
        self.truths[self._key(gated)] = worker.ask("gate", case, timeout_s=timeout_s).verdict
        if self.file:
            torch.save(self.truths, self.file)

    def errors(self, gated: Gated) -> tuple[float, float]:
        return gate_errors(gated.verdict, self.truths[self._key(gated)])

    def _key(self, gated: Gated) -> tuple:
        return self.oracle.size, self.oracle.device, gated.batch
