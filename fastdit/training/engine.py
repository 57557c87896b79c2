"""Engines turn a loss into an update: plain PyTorch (with DDP for several processes), or DeepSpeed's ZeRO.

Weights, gradients and Adam's state are fp32. `precision="bf16"` computes under autocast.
"""

import os
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastdit.build import uses_zero
from fastdit.config import TrainingConfig
from fastdit.distributed import Ranks


class Engine(Protocol):
    """What the training step and the checkpoints ask of an engine; it is called like the model."""

    name: str

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The model's output in fp32, computed in the engine's precision."""

    def boundary(self, last: bool) -> None:
        """Before each micro-batch: gradients are exchanged only in the `last` one of a step."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch's mean loss."""

    def step(self, lr: float, bad: Tensor) -> tuple[Tensor, Tensor]:
        """One AdamW step, skipped on all processes where `bad` (0-dim bool, agreed) or the gradient is not finite.

        Returns the gradient norm before clipping, and whether the step was skipped; 0-dim, on the device.
        """

    def master_parameters(self) -> list[Tensor]:
        """The fp32 tensors that the optimizer updates: this process's part of them under ZeRO."""

    def full_state(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        """The model's state dict with `tensors` (shaped like `master_parameters()`) as weights; a collective call."""

    def partition(self, state: dict[str, Tensor]) -> list[Tensor]:
        """The reverse of `full_state`: tensors shaped like `master_parameters()`; a collective call."""

    def save(self, folder: Path) -> None:
        """Write what a resume needs beside weights and EMA; every process calls it."""

    def load(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Take over weights (`state`, the checkpoint's model.safetensors) and what `save` wrote."""


class TorchEngine:
    """fp32 weights and fused AdamW on every process; gradients averaged by DDP."""

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
        # on a GPU the learning rate is a tensor there: a replayed CUDA graph reads its new value
        lr = torch.zeros((), device=ranks.device) if ranks.device.type == "cuda" else 0.0
        self.optimizer = torch.optim.AdamW(self.parameters, lr, betas, weight_decay=weight_decay, fused=True)

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
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

    def step(self, lr: float, bad: Tensor) -> tuple[Tensor, Tensor]:
        gradients = [p.grad for p in self.parameters]
        norm = nn.utils.get_total_norm(gradients)  # the same on all processes, as the gradients are
        skipped = bad | ~norm.isfinite()
        self.optimizer.found_inf = skipped.float()  # the fused kernel then leaves weights and state as they are
        if self.grad_clip:
            nn.utils.clip_grads_with_norm_(self.parameters, self.grad_clip, norm)
        if not torch.cuda.is_available() or not torch.cuda.is_current_stream_capturing():
            self.set_lr(lr)  # a captured step reads what `set_lr` writes before the replay
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, skipped

    def master_parameters(self) -> list[Tensor]:
        return self.parameters

    def full_state(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        names = [name for name, p in self.module.named_parameters() if p.requires_grad]
        return {**dict(self.module.named_buffers()), **dict(zip(names, tensors, strict=True))}

    def partition(self, state: dict[str, Tensor]) -> list[Tensor]:
        return [state[name] for name, p in self.module.named_parameters() if p.requires_grad]

    def save(self, folder: Path) -> None:
        if self.ranks.is_main:
            torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")

    def load(self, folder: Path, state: dict[str, Tensor]) -> None:
        self.module.load_state_dict(state)
        settings = settings_of(self.optimizer)
        self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)


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
        optimizer = torch.optim.AdamW(parameters, betas=betas, weight_decay=weight_decay, fused=zero_stage < 3)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=merge_deepspeed(own, extra))

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.engine(x, t, y).float()

    def boundary(self, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, lr: float, bad: Tensor) -> tuple[Tensor, Tensor]:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        before = self.engine.skipped_steps
        self.engine.step()  # DeepSpeed itself skips a step whose gradient is not finite, as that of a bad loss is
        norm = self.engine.get_global_grad_norm()
        norm = torch.as_tensor(norm if norm is not None else float("nan"), device=self.ranks.device)
        return norm, torch.as_tensor(self.engine.skipped_steps > before, device=self.ranks.device)

    def master_parameters(self) -> list[Tensor]:
        optimizer = self.engine.optimizer
        if self.zero_stage == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        return list(optimizer.single_partition_of_fp32_groups)

    @torch.no_grad()
    def full_state(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        masters = self.master_parameters()
        kept = [master.clone() for master in masters]
        for master, tensor in zip(masters, tensors, strict=True):
            master.copy_(tensor)  # DeepSpeed gathers parameters from these partitions: put our tensors there
        state = dict(self.module.named_buffers())
        for name, parameter in self.module.named_parameters():
            state[name] = safe_get_full_fp32_param(parameter).cpu()
        for master, own in zip(masters, kept, strict=True):
            master.copy_(own)
        return state

    @torch.no_grad()
    def partition(self, state: dict[str, Tensor]) -> list[Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

        named = dict(self.module.named_parameters())
        kept = {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in named.items()}
        for name, parameter in named.items():
            safe_set_full_fp32_param(parameter, state[name])  # DeepSpeed scatters a tensor into its partitions
        own = [master.clone() for master in self.master_parameters()]
        for name, parameter in named.items():
            safe_set_full_fp32_param(parameter, kept[name])
        return own

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False)

    def load(self, folder: Path, state: dict[str, Tensor]) -> None:
        settings = settings_of(self.engine.optimizer)
        path, _ = self.engine.load_checkpoint(str(folder), tag="deepspeed")
        if path is None:
            raise ValueError(f"{folder} holds no DeepSpeed state; resume with training.engine=torch")
        self.engine.optimizer.clip_grad = self.engine.gradient_clipping()  # ZeRO-1 and 2 restore that of the checkpoint
        for group, own in zip(self.engine.optimizer.param_groups, settings, strict=True):
            group.update(own)


def settings_of(optimizer) -> list[dict]:
    """What the config says about each parameter group, and what a checkpoint must not replace on resume."""
    return [{key: group[key] for key in ("lr", "betas", "eps", "weight_decay")} for group in optimizer.param_groups]


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
