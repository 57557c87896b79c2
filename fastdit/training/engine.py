"""Engines turn a loss into an update: plain PyTorch (with DDP for several processes), or DeepSpeed's ZeRO.

Weights, gradients and Adam's state are fp32. `precision="bf16"` computes under autocast.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastdit.build import uses_zero
from fastdit.config import TrainingConfig
from fastdit.distributed import Ranks
from fastdit.kernels import adamw_ema
from fastdit.kernels.runtime import use_triton
from fastdit.training.ema import EMA, capturing

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's running means of the gradient and of its square


class Engine(Protocol):
    """What the training step and the checkpoints ask of an engine; it is called like the model."""

    name: str
    adam: torch.optim.AdamW  # its state is keyed by the master parameters

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
    """AdamW's MOMENTS, each shaped like `master_parameters()`, and its number of updates."""
    states = [engine.adam.state[master] for master in engine.master_parameters()]
    return {name: [state[name] for state in states] for name in MOMENTS}, int(states[0]["step"])


def set_moments(engine: Engine, moments: Mapping[str, list[Tensor]], updates: int) -> None:
    """The reverse of `moments_of`; the tensors are copied."""
    for i, master in enumerate(engine.master_parameters()):
        step = torch.tensor(float(updates), device=master.device if engine.adam.defaults["fused"] else "cpu")
        copies = {name: tensors[i].to(master, copy=True) for name, tensors in moments.items()}
        engine.adam.state[master] = {"step": step, **copies}


class TorchEngine:
    """fp32 weights and fused AdamW on every process; gradients averaged by DDP.

    Where Triton runs, AdamW and EMA are one kernel over all tensors (kernels/adamw_ema.py), else PyTorch's own.
    """

    name = "torch"

    def __init__(self, model: nn.Module, ranks: Ranks, *, betas, weight_decay, precision, accumulation, grad_clip):
        self.module, self.precision, self.ranks = model, precision, ranks
        self.accumulation, self.grad_clip = accumulation, grad_clip
        self.forward = model
        if ranks.world > 1:
            ids = [ranks.device.index] if ranks.device.type == "cuda" else None
            self.forward = DistributedDataParallel(
                model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=False
            )
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.one_pass = use_triton("adamw_ema", ranks.device.type, torch.float32)
        # on a GPU the learning rate is a tensor there: a replayed CUDA graph reads its new value
        on_device = self.one_pass or ranks.device.type == "cuda"
        lr = torch.zeros((), device=ranks.device) if on_device else 0.0
        self.adam = torch.optim.AdamW(self.parameters, lr, betas, weight_decay=weight_decay, fused=True)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step. A replayed CUDA graph reads what was set before."""
        if capturing():
            return
        for group in self.adam.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.forward(x, t, y).float()

    def boundary(self, last: bool) -> None:
        if self.ranks.world > 1:
            self.forward.require_backward_grad_sync = last

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()

    def step(self, lr: float, bad: Tensor, ema: EMA, number: int) -> tuple[Tensor, Tensor]:
        gradients = [p.grad for p in self.parameters]
        norm = nn.utils.get_total_norm(gradients)  # the same on all processes, as the gradients are
        skipped = bad | ~norm.isfinite()
        self.set_lr(lr)
        if self.one_pass:
            self._step_in_one_pass(gradients, norm, skipped, ema, number)
        else:
            self.adam.found_inf = skipped.float()  # the fused kernel then leaves weights and state as they are
            if self.grad_clip:
                nn.utils.clip_grads_with_norm_(self.parameters, self.grad_clip, norm)
            self.adam.step()
            ema.update(self.parameters, number, skipped)
        self.adam.zero_grad(set_to_none=True)
        return norm, skipped

    @torch.no_grad()
    def _step_in_one_pass(self, gradients: list[Tensor], norm: Tensor, skipped: Tensor, ema: EMA, number: int) -> None:
        if not self.adam.state:
            set_moments(self, {name: list(map(torch.zeros_like, self.parameters)) for name in MOMENTS}, 0)
        states, [group] = [self.adam.state[p] for p in self.parameters], self.adam.param_groups
        torch._foreach_add_([state["step"] for state in states], (~skipped).float())
        clip = (self.grad_clip / (norm + 1e-6)).clamp(max=1) if self.grad_clip else None  # as in clip_grad_norm_
        ema.set_step(number)
        adamw_ema(
            self.parameters, gradients, *([state[name] for state in states] for name in MOMENTS), ema.average, None,
            states[0]["step"], group["lr"], ema.weight, skipped, clip, group["betas"], group["eps"],
            group["weight_decay"],
        )  # fmt: skip

    def master_parameters(self) -> list[Tensor]:
        return self.parameters

    def full_state(self, tensors: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        names = [name for name, p in self.module.named_parameters() if p.requires_grad]
        return zip(names, tensors, strict=True)

    def partition(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        return [state[name] for name, p in self.module.named_parameters() if p.requires_grad]


class DeepSpeedEngine:
    """ZeRO stage 1, 2 or 3 through DeepSpeed; weights stay fp32 (torch_autocast), partitioned with Adam's state."""

    name = "deepspeed"

    def __init__(
        self,
        model: nn.Module,
        ranks: Ranks,
        *,
        betas,
        weight_decay,
        precision,
        accumulation,
        grad_clip,
        micro_batch: int,
        zero_stage: int,
        extra: dict,
    ):
        try:
            import deepspeed
        except ImportError as error:
            raise ValueError("training.engine=deepspeed needs DeepSpeed: pip install 'fastdit[deepspeed]'") from error
        if ranks.device.type == "cpu":  # its own collectives would compile C++ for a minute
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if not dist.is_initialized():  # plain `python`: a group of one process, without MPI
            backend = "nccl" if ranks.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))  # required by DeepSpeed
        deepspeed.init_distributed(dist_backend=dist.get_backend())
        self.module, self.ranks, self.zero_stage = model, ranks, zero_stage
        own = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": grad_clip,
            "zero_optimization": {"stage": zero_stage},
            "zero_allow_untested_optimizer": True,  # torch's AdamW; DeepSpeed's would be compiled
            "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16"},
            "data_types": {"grad_accum_dtype": "fp32"},
            "steps_per_print": 1 << 60,
        }
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.adam = torch.optim.AdamW(parameters, betas=betas, weight_decay=weight_decay, fused=zero_stage < 3)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=self.adam, config=merge_deepspeed(own, extra))
        self._gather_small_parameters()

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.engine(x, t, y).float()

    def boundary(self, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        # the gradient of a loss that is not finite may be: NaN times it is not, and DeepSpeed then skips the step
        self.engine.backward(loss * (1 + 0 * loss.detach()))

    def step(self, lr: float, bad: Tensor, ema: EMA, number: int) -> tuple[Tensor, Tensor]:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        before = self.engine.skipped_steps
        self.engine.step()  # DeepSpeed itself skips a step whose gradient is not finite, as that of a bad loss is
        if self.engine.skipped_steps > before:
            self._gather_small_parameters()
        norm = self.engine.get_global_grad_norm()
        norm = torch.as_tensor(norm if norm is not None else float("nan"), device=self.ranks.device)
        skipped = torch.as_tensor(self.engine.skipped_steps > before, device=self.ranks.device)
        ema.update(self.master_parameters(), number, skipped)
        return norm, skipped

    def _gather_small_parameters(self) -> None:
        """Have ZeRO-3 gather the parameters that it keeps whole, in fp32, as it does after each update.

        Otherwise the next forward pass gathers them in bf16: the first step after a resume would round differently
        than without the interruption, and so would the step after a skipped one.
        """
        if self.zero_stage == 3 and (small := self.engine.optimizer.persistent_parameters):
            small[0].all_gather(small)

    def master_parameters(self) -> list[Tensor]:
        optimizer = self.engine.optimizer
        if self.zero_stage == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        return list(optimizer.single_partition_of_fp32_groups)

    @torch.no_grad()
    def full_state(self, tensors: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param

        with self._borrowed_masters() as masters:
            for master, tensor in zip(masters, tensors, strict=True):
                master.copy_(tensor)  # DeepSpeed gathers parameters from these partitions
            for name, parameter in self.module.named_parameters():
                yield name, safe_get_full_fp32_param(parameter)

    @torch.no_grad()
    def partition(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        with self._borrowed_masters() as masters:
            for name, parameter in self.module.named_parameters():
                if self.zero_stage < 3:
                    safe_set_full_fp32_param(parameter, state[name])
                else:  # the last partition is padded
                    own = torch.zeros(parameter.ds_tensor.ds_numel)
                    part = state[name].flatten()[self.ranks.rank * len(own) :][: len(own)]
                    own[: len(part)] = part
                    safe_set_local_fp32_param(parameter, own)
            return [master.clone() for master in masters]

    @contextmanager
    def _borrowed_masters(self) -> Iterator[list[Tensor]]:
        """The master parameters, which may be overwritten meanwhile."""
        masters = self.master_parameters()
        kept = [master.clone() for master in masters]
        yield masters
        for master, own in zip(masters, kept, strict=True):
            master.copy_(own)


def merge_deepspeed(own: dict, extra: dict) -> dict:
    """DeepSpeed's JSON: our settings with the user's `training.deepspeed` merged in.

    ValueError for keys that fastdit sets itself and for unknown ones, which DeepSpeed would silently ignore.
    """
    from deepspeed.runtime import constants

    known = {v for k, v in vars(constants).items() if k.isupper() and isinstance(v, str)} | {"zero_optimization"}
    merged = dict(own)
    for key, value in extra.items():
        if key == "zero_optimization" and "stage" not in value:
            merged[key] = {**own[key], **value}
        elif key in own:
            raise ValueError(f"training.deepspeed.{key}={value!r} is set by fastdit; use the keys of training:")
        elif key not in known:
            raise ValueError(f"training.deepspeed.{key}={value!r} is not a key that DeepSpeed knows")
        else:
            merged[key] = value
    return merged


def build_engine(model: nn.Module, settings: TrainingConfig, ranks: Ranks, micro: int, accumulation: int) -> Engine:
    """The engine that the settings ask for; under `auto`, the one of the launcher."""
    shared = dict(
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        precision=settings.precision,
        accumulation=accumulation,
        grad_clip=settings.grad_clip,
    )
    if uses_zero(settings):
        zero = dict(micro_batch=micro, zero_stage=settings.zero_stage, extra=settings.deepspeed)
        return DeepSpeedEngine(model, ranks, **shared, **zero)
    return TorchEngine(model, ranks, **shared)
