"""The correctness gate of `python -m bench.step`: a contestant must reproduce the plain network's fp32 training steps.

A few steps from the same weights. Each step has its own images, noise, times, dropped labels and learning rate, so a
CUDA graph that replays the inputs of its capture fails.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.step.reference import Inputs

# of each step, in units of the learning rate. A CUDA graph runs three steps eagerly, is captured in the fourth and
# replayed on inputs it was not captured with only in the fifth, whose rate must therefore show in the weights
RATES = (1.0, 1.0, 1.0, 0.25, 4.0)

# largest error of the losses and of the displacements. Adam moves a weight whose gradient is all rounding noise as far
# as any other, so the second is larger. For scale: bf16 gives 5e-4 in the losses, FP8 (emulated, 6 x 384) 3e-3 and
# 0.05, times off by one of 1000 steps 5e-3. That of FP8 is five times bf16's, as its rounding error is: in the losses
# 4.6 times with factors measured in the step itself, 5.0 with delayed ones (emulated, 6 x 384), 4.7 times on an H200
# (XL/2). Smaller mistakes show
# in the bf16 contestant, which shares all code but the products, and in tests/kernels/test_fp8.py
TOLERANCE = {"fp32": (1e-4, 1e-2), "tf32": (2e-3, 0.1), "fp16": (2e-3, 0.1), "bf16": (4e-3, 0.15),
             "fp8": (2e-2, 0.15)}  # fmt: skip


@dataclass
class Verdict:
    """The result of the gate's steps, on the CPU."""

    losses: Tensor  # (steps, N)
    moved: Tensor  # norm of the displacement of each weight tensor, and of its average, from the start; by name
    precision: str  # a key of TOLERANCE
    drawn: Tensor  # (steps, 4) mean absolute x_0, label, timestep and noise: the same for all who took the same steps
    first_done: float  # time.perf_counter() at the end of the first step


def check_drawn(step: int, drawn: Inputs, wanted: Inputs) -> None:
    """ValueError if a step's inputs are not those that its seed, number and batch determine."""
    for name, value in vars(wanted).items():
        if not torch.allclose(getattr(drawn, name).double(), value.double(), atol=1e-5):
            raise ValueError(f"step {step} did not compute on the {name} that its seed, number and batch determine")


def gate_errors(verdict: Verdict, truth: Verdict) -> tuple[float, float]:
    """Root mean square relative error of (losses, displacements of weights and averages)."""

    def distance(ours: Tensor, theirs: Tensor) -> float:
        return float((ours / theirs - 1).square().mean().sqrt())

    return distance(verdict.losses, truth.losses), distance(verdict.moved, truth.moved)


def objection(precision: str, errors: tuple[float, float]) -> str:
    """Why a contestant with these errors is not reported; empty if it computes the right thing."""
    if all(error <= limit for error, limit in zip(errors, TOLERANCE[precision], strict=True)):
        return ""  # NaN never passes
    return f"computes something else: losses differ by {errors[0]:.1e}, weight displacements by {errors[1]:.1e}"
