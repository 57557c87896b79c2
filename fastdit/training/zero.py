"""The engine that trains with ZeRO, through DeepSpeed."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdit.distributed import Ranks
from fastdit.training.ema import EMA


class DeepSpeedEngine:
    """ZeRO stage 1, 2 or 3 through DeepSpeed; weights stay fp32 (torch_autocast), partitioned with Adam's state."""

    name = "deepspeed"
    muon = None

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
        before, optimizer = self.engine.skipped_steps, self.engine.optimizer
        if bad:  # the gradients may be finite: FP8, which ZeRO-3 refuses, saturates an infinity
            optimizer.scaled_global_norm = lambda *_: float("nan")
        self.engine.step()  # DeepSpeed skips a step whose gradients have no finite norm
        vars(optimizer).pop("scaled_global_norm", None)
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
        if key == "zero_optimization" and isinstance(value, dict) and "stage" not in value:
            merged[key] = {**own[key], **value}
        elif key in own:
            raise ValueError(f"training.deepspeed.{key}={value!r} is set by fastdit; use the keys of training:")
        elif key not in known:
            raise ValueError(f"training.deepspeed.{key}={value!r} is not a key that DeepSpeed knows")
        else:
            merged[key] = value
    return merged
