"""Memory and speed of a training step, predicted from the network's shapes, before anything runs.

`fastdit plan`, `training.activation_checkpointing=auto` and `training.micro_batch=-1` share one ranking (`rank`):
matrix products at a share of the datasheet's rate, everything else at a share of the memory bandwidth. The shares are
assumptions until the step benchmark has run on the GPU in question.
"""

from dataclasses import dataclass, replace

import torch

from fastdit import distributed
from fastdit.build import uses_zero
from fastdit.config import Config, TrainingConfig
from fastdit.models.dit import DiT
from fastdit.models.fp8 import ACTIVATIONS as FP8_FUSED
from fastdit.models.layers import Linear
from fastdit.registry import check

GIB = 2**30
RESERVED = 0.06  # of a GPU's memory: CUDA context, the allocator's fragments, workspaces
GEMM_SHARE = 0.68  # of the datasheet's dense bf16 rate: an H200 reaches 0.80 on one large product, a step less
FP8_SPEED = 1.6  # relative to bf16, in the products of the blocks' linears
OPTIMIZER_BYTES = 44  # per parameter: norm, AdamW, EMA
AVERAGE_BYTES = 12  # per parameter and further average: it and the weight are read, it is written
CAST_BYTES = 12  # per parameter: its copy in bf16, its gradient to fp32
ADD_BYTES = 12  # per parameter and further micro-batch: its gradient is added; its weight is also cast again
MEMORY_SHARE = 0.76  # of the datasheet's bandwidth: an H200 copies at 0.90, fused kernels should reach 0.85 of that

POLICIES = ("none", "activation", "selective", "full")  # of activation checkpointing, from fastest to smallest


def activation_bytes(model: DiT, policy: str, *, itemsize: int = 2, residual: int = 4) -> int:
    """Bytes that one image keeps from the forward to the backward pass, with the fused kernels.

    Per token and block, in units of D values of `itemsize` bytes: the input of qkv 1, qkv 3, attention's output 1, both
    branches 2, the input of fc1 1, its output, the activation's output; and twice the residual stream at `residual`
    bytes per value; more where the network has options. `activation` recomputes the activation's output; `selective`
    also the norms' outputs; `full` keeps only a block's residual and branch.
    """
    d, tokens, blocks = model.hidden_size, model.tokens, len(model.blocks)
    before, after = activation_widths(model)
    cross = model.blocks[0].cross is not None  # its input, q, output and branch, and one more residual
    rotated = model.blocks[0].attn.qk_norm != "none" or model.rope is not None  # q and k before and after
    dropped = (2 + cross) if model.options.dropout else 0  # branches: which values are dropped, and the result
    biased = before if model.blocks[0].mlp.kind == "gelu" else 0  # the exact GELU also keeps its input with the bias
    options = 2 * rotated + 3 * dropped + biased
    units, residuals = {
        "none": (1 + 3 + 1 + 2 + 1 + before + after + 4 * cross + options, 2 + cross),
        "activation": (1 + 3 + 1 + 2 + 1 + before + 4 * cross + options, 2 + cross),
        "selective": (3 + 1 + 2 + before + 3 * cross + dropped, 1),
        "full": (1, 1),
    }[policy]
    ends = residual + itemsize  # the residual and the input of the final layer
    return round(d * tokens * (blocks * (itemsize * units + residual * residuals) + ends))


def activation_widths(model: DiT) -> tuple[float, float]:
    """Widths of the MLP's values before and after its activation, over D: 4 and 4, as published."""
    mlp = model.blocks[0].mlp
    return mlp.fc1.weight.shape[0] / model.hidden_size, mlp.fc2.weight.shape[1] / model.hidden_size


def moved_bytes(model: DiT, policy: str, *, residual: int = 4, fp8: bool = False) -> float:
    """Bytes that one image's step moves outside matrix products; within 4% of what bench/static/count.py counts.

    Norms and gates, GELU, attention, the bias and the packing of qkv's gradient; with FP8 also preparing the operands.
    """
    d, tokens, blocks = model.hidden_size, model.tokens, len(model.blocks)
    before, after = activation_widths(model)
    cross = model.blocks[0].cross is not None
    norm = (2 + cross) * (2 * residual + 2 + 2)  # of each branch: x, branch, x', h
    norm_backward = (2 + cross) * (3 * residual + 2 + 2 + 2)
    activation = 2 * (before + after)  # forward; backward reads both and writes a gradient
    attention = 2 * (3 + 1) + 2 * (3 + 1 + 1 + 3) + cross * (2 * (1 + 1) + 2 * (1 + 1 + 1 + 1))
    packing = 2 * (3 + 3) + 2 * 3  # the gradients of q, k and v into one tensor; read again for the bias
    step = norm + norm_backward + activation + (activation + 2 * before) + attention + packing
    if fp8:  # inputs and gradients of the linears: read, written in both layouts, where no other kernel does so
        step += 4 * ((1 + 1 + 1) + (3 + 1 + 1) + 4 * cross)
        step += 0 if model.blocks[0].mlp.kind in FP8_FUSED else 4 * (after + before)
        step += 2 * (3 + 3)  # the bias of qkv is added alone
    again = {
        "none": 0,
        "activation": 2 * after,  # written again by the activation's backward pass
        "selective": norm + activation,
        "full": norm + activation + 2 * (3 + 1),  # and attention's forward pass
    }[policy]
    return d * tokens * blocks * (step + again)


def memory_bytes(
    model: DiT,
    images: int,
    policy: str,
    *,
    world: int = 1,
    zero_stage: int = 0,
    precision: str = "bf16",
    residual: int = 4,
    averages: int = 1,
) -> dict[str, float]:
    """Peak bytes per GPU by kind, for `images` in one forward pass; `residual` bytes per value of that stream.

    `averages`: the EMA, and one more for each of training.ema_stds.
    """
    count = sum(p.numel() for p in model.parameters())
    width = {"itemsize": 2 if precision == "bf16" else 4, "residual": residual}
    kept, whole = activation_bytes(model, policy, **width), activation_bytes(model, "none", **width)
    recomputed = (whole - kept) / len(model.blocks)  # by the backward pass, for one block at a time
    optimizer_over, gradients_over, weights_over = (world if zero_stage >= stage else 1 for stage in (1, 2, 3))
    return {
        "weights": 4 * count / weights_over,
        "bf16 copies": 2 * count if precision == "bf16" else 0,  # autocast's, kept for the backward pass
        "gradients": 4 * count / gradients_over,
        "optimizer": 8 * count / optimizer_over,
        "EMA": 4 * averages * count / optimizer_over,
        "activations": images * (kept + recomputed),
    }


@dataclass(frozen=True)
class GPU:
    """Datasheet: dense bf16 TFLOP/s, memory bandwidth in TB/s, memory in GiB."""

    tflops: float
    bandwidth: float
    gib: float
    has_fp8: bool = True


GPUS = {
    "A100-80G": GPU(312, 2.04, 80, has_fp8=False),
    "H100": GPU(989, 3.35, 80),
    "H200": GPU(989, 4.80, 141),
    "B200": GPU(2250, 8.00, 180),
    "L40S": GPU(362, 0.86, 48),
    "L4": GPU(121, 0.30, 24),
    "A10": GPU(125, 0.60, 24, has_fp8=False),
    "RTX 5090": GPU(209, 1.79, 32),
    "RTX 4090": GPU(165, 1.01, 24),
    "RTX 3090": GPU(71, 0.94, 24, has_fp8=False),
}
NO_BF16 = ("T4", "V100", "P100", "RTX 2080")


def card_name(gpu: str) -> str:
    """The name in GPUS for --gpu, in any case and also without "RTX"; ValueError for an unknown GPU."""
    names = {_plain(name): name for name in GPUS} | {"a100": "A100-80G"}
    if _plain(gpu) in map(_plain, NO_BF16):
        raise ValueError(f"--gpu={gpu!r} has no bf16, which fastdit trains in; use a GPU from Ampere on")
    check(names.get(_plain(gpu), gpu), GPUS, "--gpu")
    return names[_plain(gpu)]


def _plain(name: str) -> str:
    return name.lower().replace("rtx", "").replace(" ", "").replace("-", "")


def card_of(device: torch.device) -> GPU | None:
    """The GPUS entry of a device, with the memory that it really has; None where the table has none."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    found = [card for known, card in GPUS.items() if known.split("-")[0] in name]
    return replace(found[0], gib=distributed.memory_of(device) / GIB) if found else None


@dataclass(frozen=True)
class Candidate:
    """One policy of activation checkpointing with its largest micro-batch that fits; bytes per GPU by kind."""

    policy: str
    micro_batch: int
    memory: dict[str, float]
    fits: bool
    step_s: float  # predicted, for the whole step of all processes


def rank(
    model: DiT, settings: TrainingConfig, card: GPU, share: int, world: int, policies: list[str], micros: list[int]
) -> list[Candidate]:
    """One Candidate per policy, the fastest that fits first.

    The step has `share` images on each of `world` GPUs. A larger micro-batch is always predicted to be faster: the
    weights are cast, and their gradients added, fewer times.
    """
    count = sum(p.numel() for p in model.parameters())
    linears = {name: module.weight.numel() for name, module in model.named_modules() if isinstance(module, Linear)}
    weights = sum(n for name, n in linears.items() if not name.endswith("cross.kv"))  # applied to two tokens only
    in_fp8 = 2 * model.tokens * weights if settings.fp8 else 0  # FLOPs of one image's forward pass
    wide = 1 if settings.precision == "bf16" else 2  # TF32: twice the bytes per value, half the rate
    casts = CAST_BYTES if wide == 1 else 0
    optimizer_bytes = OPTIMIZER_BYTES + AVERAGE_BYTES * len(settings.ema_stds)
    weight_bytes = (optimizer_bytes / (world if uses_zero(settings) else 1) + casts) * count
    candidates = []
    for policy in policies:
        memory = {m: memory_by_kind(model, settings, policy, m, world) for m in micros}
        fitting = [m for m in micros if sum(memory[m].values()) <= card.gib * GIB * (1 - RESERVED)]
        micro = max(fitting, default=min(micros))
        flops = 3 * (model.flops_per_image() - in_fp8 * (1 - 1 / FP8_SPEED)) * (4 / 3 if policy == "full" else 1)
        moved = weight_bytes + (share // micro - 1) * (ADD_BYTES + casts / 2) * count
        moved += share * wide * moved_bytes(model, policy, residual=settings.residual_bytes // wide, fp8=settings.fp8)
        compute, bandwidth = card.tflops / wide * GEMM_SHARE * 1e12, card.bandwidth * MEMORY_SHARE * 1e12
        step_s = share * flops / compute + moved / bandwidth
        candidates.append(Candidate(policy, micro, memory[micro], bool(fitting), step_s))
    return sorted(candidates, key=lambda c: (not c.fits, c.step_s))


def candidates(config: Config, model: DiT, card: GPU, world: int) -> tuple[list[Candidate], int]:
    """What the config leaves open, ranked (see `rank`), and the images of one step per process."""
    settings = config.training
    micro, accumulation = micro_batches(settings.global_batch, max(settings.micro_batch, 0), world)
    share, policy = micro * accumulation, settings.activation_checkpointing
    policies = policies_of(config) if policy == "auto" else [policy]
    micros = divisors(share) if settings.micro_batch < 0 else [micro]
    return rank(model, settings, card, share, world, policies, micros), share


def choose(config: Config, model: DiT, ranks: distributed.Ranks) -> tuple[str, int, int]:
    """Policy of activation checkpointing, micro-batch and accumulation of a run on `ranks.device`.

    What the config states is taken as it is. What it leaves open (`auto`, -1) is the fastest candidate predicted to
    fit; on a device that is not in GPUS, its own memory counts with an H100's speed. ValueError when nothing fits.
    """
    settings = config.training
    card = card_of(ranks.device) or replace(GPUS["H100"], gib=distributed.memory_of(ranks.device) / GIB)
    found, share = candidates(config, model, card, ranks.world)
    best = found[0]
    if not best.fits and (settings.activation_checkpointing == "auto" or settings.micro_batch < 0):
        least = min(found, key=lambda c: sum(c.memory.values()))
        raise ValueError(
            f"training.micro_batch={least.micro_batch} with activation_checkpointing={least.policy} needs "
            f"{sum(least.memory.values()) / GIB:.1f} GiB of {card.gib * (1 - RESERVED):.1f}; use more GPUs, a higher "
            "training.zero_stage, or a smaller model.variant"
        )
    return best.policy, best.micro_batch, share // best.micro_batch


def smaller_batch(policy: str, micro: int) -> str:
    """What to set when a step ran out of memory."""
    smaller = max((m for m in divisors(micro) if m < micro), default=1)
    other = ", or activation_checkpointing=full" * (policy != "full")
    return f"micro_batch={micro} with activation_checkpointing={policy}: use training.micro_batch={smaller}{other}"


def policies_of(config: Config) -> list[str]:
    """The policies of activation checkpointing that can run: `activation` needs a kernel that FP8 and mlp=gelu lack."""
    without = config.training.fp8 or config.model.mlp == "gelu"
    return [policy for policy in POLICIES if not (without and policy == "activation")]


def memory_by_kind(model: DiT, settings: TrainingConfig, policy: str, micro: int, world: int) -> dict[str, float]:
    """Predicted peak bytes of one of `world` processes."""
    return memory_bytes(
        model,
        micro,
        policy,
        world=world,
        zero_stage=settings.zero_stage if uses_zero(settings) else 0,
        precision=settings.precision,
        residual=settings.residual_bytes,
        averages=1 + len(settings.ema_stds),
    )


def divisors(share: int) -> list[int]:
    """The possible micro-batches, ascending."""
    return [m for m in range(1, share + 1) if share % m == 0]


def micro_batches(global_batch: int, micro_batch: int, world: int) -> tuple[int, int]:
    """(images per forward pass, forward passes per step) of one process; `micro_batch=0` means its whole share."""
    if global_batch % world:
        near = max(world, global_batch // world * world)
        raise ValueError(f"training.global_batch={global_batch} is not divisible by {world} processes; use {near}")
    share = global_batch // world
    micro = micro_batch or share
    if share % micro:
        fits = max(m for m in divisors(share) if m <= micro)
        raise ValueError(f"training.micro_batch={micro} does not divide {share} images per process; use {fits}")
    return micro, share // micro
