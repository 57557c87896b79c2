"""Engines turn a loss into an update: plain PyTorch (with DDP for several processes), or DeepSpeed's ZeRO (zero.py).

Weights, Adam's state and, but for `TorchEngine`'s rounded weights, gradients are fp32. `precision="bf16"` computes
under autocast.
"""

import warnings
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastdit.build import check_engine, uses_zero
from fastdit.distributed import Ranks
from fastdit.kernels import adamw_ema
from fastdit.kernels.runtime import use_triton
from fastdit.memory import muon_matrices
from fastdit.schema import TrainingConfig
from fastdit.training.ema import EMA, capturing
from fastdit.training.muon import Muon

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's running means of the gradient and of its square


class Engine(Protocol):
    """What the training step and the checkpoints ask of an engine; it is called like the model."""

    name: str
    adam: torch.optim.AdamW  # its state is keyed by the master parameters
    muon: Muon | None  # updates the blocks' matrices instead of AdamW

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The model's output in fp32, computed in the engine's precision."""

    def boundary(self, last: bool) -> None:
        """Before each micro-batch: gradients are exchanged only in the `last` one of a step."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch's mean loss."""

    def step(self, lr: float, bad: Tensor, ema: EMA, number: int) -> tuple[Tensor, Tensor]:
        """Step `number` (from 1) of AdamW and of the EMA, skipped on all processes where `bad` (0-dim bool, agreed) or
        where the gradient is not finite.

        Returns the gradient norm before clipping, and whether the step was skipped; 0-dim, on the device.
        """

    def master_parameters(self) -> list[Tensor]:
        """The fp32 tensors that the optimizer updates: this process's part of them under ZeRO."""

    def full_state(self, tensors: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's name with its values in `tensors` (shaped like `master_parameters()`), gathered from all
        processes; a collective call, to be iterated to its end."""

    def partition(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        """The reverse of `full_state`: tensors shaped like `master_parameters()`; a collective call."""


def moments_of(engine: Engine) -> tuple[dict[str, list[Tensor]], int]:
    """AdamW's MOMENTS, each shaped like `master_parameters()`, and its number of updates.

    For Muon's matrices, the first is its momentum and the second is 0.
    """
    masters = engine.master_parameters()
    states = [engine.adam.state.get(master) or muon_state(engine, master) for master in masters]
    updates = next(int(state["step"]) for state in states if "step" in state)
    return {name: [state[name] for state in states] for name in MOMENTS}, updates


def muon_state(engine: Engine, master: Tensor) -> dict[str, Tensor]:
    """The state of a matrix that Muon updates, under AdamW's names."""
    zeros = torch.zeros_like(master)
    return {"exp_avg": engine.muon.state[master].get("momentum_buffer", zeros), "exp_avg_sq": zeros}


def set_moments(engine: Engine, moments: Mapping[str, list[Tensor]], updates: int) -> None:
    """The reverse of `moments_of`; the tensors are copied."""
    for i, master in enumerate(engine.master_parameters()):
        step = torch.tensor(float(updates), device=master.device if engine.adam.defaults["fused"] else "cpu")
        copies = {name: torch.empty_like(master).copy_(tensors[i]) for name, tensors in moments.items()}  # its strides
        if engine.muon and master in set(engine.muon.param_groups[0]["params"]):
            engine.muon.state[master] = {"momentum_buffer": copies["exp_avg"]}
        else:
            engine.adam.state[master] = {"step": step, **copies}


class TorchEngine:
    """fp32 weights and fused AdamW on every process; gradients averaged by DDP.

    Where Triton runs, AdamW and EMA are one kernel over all tensors (kernels/adamw_ema.py), else PyTorch's own. With
    one process and no accumulation, that kernel also writes the weights in bf16, which autocast would otherwise do in
    every forward pass. The module then holds the bf16 weights, `masters` the fp32 ones. The losses do not change.

    `optimizer="muon"`: Muon (muon.py) updates the matrices of the blocks, and AdamW the rest, with one learning rate
    and weight decay. It waits for the device once a step, to skip a step that is not finite.
    """

    name = "torch"

    def __init__(self, model: nn.Module, ranks: Ranks, *, betas, weight_decay, precision, accumulation, grad_clip,
                 optimizer="adamw"):  # fmt: skip
        self.module, self.precision, self.ranks = model, precision, ranks
        self.accumulation, self.grad_clip = accumulation, grad_clip
        self.forward = model
        if ranks.world > 1:
            ids = [ranks.device.index] if ranks.device.type == "cuda" else None
            with warnings.catch_warnings():  # the new name of broadcast_buffers is unknown to PyTorch 2.11
                warnings.simplefilter("ignore", FutureWarning)
                self.forward = DistributedDataParallel(
                    model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=False
                )
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.one_pass = use_triton("adamw_ema", ranks.device.type, torch.float32) and optimizer == "adamw"
        rounded = set()  # not where gradients are added up, in bf16
        if self.one_pass and precision == "bf16" and accumulation == ranks.world == 1:
            rounded = rounded_weights(model) & set(self.parameters)
        self.masters = [p.detach().clone() if p in rounded else p for p in self.parameters]
        for p in rounded:
            p.data = p.data.bfloat16()
        indices = {True: [], False: []}  # of the parameters that are rounded, and of the others
        for i, p in enumerate(self.parameters):
            indices[p in rounded].append(i)
        self.parts = [part for part in indices.values() if part]
        # on a GPU the learning rate is a tensor there: a replayed CUDA graph reads its new value
        on_device = self.one_pass or ranks.device.type == "cuda"
        lr = torch.zeros((), device=ranks.device) if on_device else 0.0
        matrices = muon_matrices(model) if optimizer == "muon" else []
        rest = [master for master in self.masters if master not in set(matrices)]
        self.adam = torch.optim.AdamW(rest, lr, betas, weight_decay=weight_decay, fused=True)
        self.muon = None
        if matrices:
            self.muon = Muon(matrices, ranks, weight_decay)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step. A replayed CUDA graph reads what was set before."""
        if capturing():
            return
        for group in self.adam.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        for group in self.muon.param_groups if self.muon else ():
            group["lr"] = lr

    def autocast(self) -> torch.autocast:
        """The context in which the module computes."""
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with self.autocast():
            return self.forward(x, t, y).float()

    def boundary(self, last: bool) -> None:
        if self.ranks.world > 1:
            self.forward.require_backward_grad_sync = last

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()

    def gradient_norm(self) -> Tensor:
        """The norm before clipping, 0-dim: the same on all processes, as the gradients are."""
        return total_norm([p.grad for p in self.parameters])

    def step(self, lr: float, bad: Tensor, ema: EMA, number: int) -> tuple[Tensor, Tensor]:
        gradients, norm = [p.grad for p in self.parameters], self.gradient_norm()
        skipped = bad | ~norm.isfinite()
        self.set_lr(lr)
        if self.one_pass:
            self._step_in_one_pass(gradients, norm, skipped, ema, number)
        else:
            self.adam.found_inf = skipped.float()  # the fused kernel then leaves weights and state as they are
            if self.grad_clip:
                nn.utils.clip_grads_with_norm_(self.parameters, self.grad_clip, norm)
            self.adam.step()
            if self.muon and not skipped:
                self.muon.step()
            ema.update(self.masters, number, skipped)
        self.module.zero_grad(set_to_none=True)
        return norm, skipped

    @torch.no_grad()
    def _step_in_one_pass(self, gradients: list[Tensor], norm: Tensor, skipped: Tensor, ema: EMA, number: int) -> None:
        if not self.adam.state:
            set_moments(self, {name: list(map(torch.zeros_like, self.masters)) for name in MOMENTS}, 0)
        states, [group] = [self.adam.state[master] for master in self.masters], self.adam.param_groups
        states[0]["step"].add_(~skipped)  # that of all parameters; the other entries are not read
        clip = (self.grad_clip / (norm + 1e-6)).clamp(max=1) if self.grad_clip else None  # as in clip_grad_norm_
        ema.set_step(number)
        rows = self.masters, gradients, *([state[name] for state in states] for name in MOMENTS), ema.average
        for part in self.parts:
            masters, *others = ([row[i] for i in part] for row in rows)
            weights = [self.parameters[i] for i in part]
            adamw_ema(
                masters, *others, None if weights[0] is masters[0] else weights, states[0]["step"], group["lr"],
                ema.weight, skipped, clip, group["betas"], group["eps"], group["weight_decay"],
            )  # fmt: skip

    def master_parameters(self) -> list[Tensor]:
        return self.masters

    def full_state(self, tensors: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        names = [name for name, p in self.module.named_parameters() if p.requires_grad]
        return zip(names, tensors, strict=True)

    def partition(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        return [state[name] for name, p in self.module.named_parameters() if p.requires_grad]


def rounded_weights(model: nn.Module) -> set[nn.Parameter]:
    """The weights that autocast rounds to bf16 in every forward pass: those of the linears that are not in FP8."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return {linear.weight for linear in linears if getattr(linear, "multiply", None) is None}


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, in fp32."""
    norms = []
    for dtype in {gradient.dtype: None for gradient in gradients}:
        norms += torch._foreach_norm([g for g in gradients if g.dtype == dtype], 2, torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms))


def build_engine(model: nn.Module, settings: TrainingConfig, ranks: Ranks, micro: int, accumulation: int) -> Engine:
    """The engine that the settings ask for; under `auto`, the one of the launcher."""
    shared = dict(
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        precision=settings.precision,
        accumulation=accumulation,
        grad_clip=settings.grad_clip,
    )
    check_engine(settings, ranks.world)
    if uses_zero(settings):
        from fastdit.training.zero import DeepSpeedEngine

        zero = dict(micro_batch=micro, zero_stage=settings.zero_stage, extra=settings.deepspeed)
        return DeepSpeedEngine(model, ranks, **shared, **zero)
    return TorchEngine(model, ranks, **shared, optimizer=settings.optimizer)
