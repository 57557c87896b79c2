"""What a run will cost, before anything runs: parameters, FLOPs, memory by kind, speed and hours on a named GPU.

Memory and FLOPs are counted from the network's own shapes; speed is a roofline: matrix products at a share of the
datasheet's rate, everything else at a share of the memory's. The shares below are assumptions until `bench/step.py`
has run on the GPU in question, and every plan prints them.
"""

from dataclasses import dataclass

import torch

from fastdit.config import Config, build, lookup
from fastdit.diffusion.objectives import OBJECTIVES
from fastdit.models.dit import DiT
from fastdit.models.layers import Linear
from fastdit.training.loop import divisors, memory_by_kind, micro_batches, network, policies_of, uses_zero
from fastdit.training.memory import GIB, RESERVED, moved_bytes

GEMM_SHARE = 0.68  # of the datasheet's dense bf16 rate: an H200 reaches 0.80 on one large product, a step less
FP8_SPEED = 1.6  # of bf16's rate, in the products of the blocks' linears
OPTIMIZER_BYTES = 44  # a parameter: norm, AdamW, EMA
CAST_BYTES = 12  # a parameter: its copy in bf16, its gradient to fp32
ADD_BYTES = 12  # a parameter and further micro-batch: its gradient added to; its weight is cast again, too
MEMORY_SHARE = 0.76  # of the datasheet's bandwidth: an H200 copies at 0.90, fused kernels are to reach 0.85 of that


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
}


@dataclass(frozen=True)
class Plan:
    """One policy on one kind of GPU, with its largest micro-batch; bytes a GPU, speed of the whole job."""

    policy: str
    micro_batch: int
    memory: dict[str, float]
    fits: bool
    step_s: float
    images_per_s: float
    hours: float


def plan(config: Config, gpu: str, world: int = 1) -> tuple[DiT, list[Plan]]:
    """The network (without memory) and one Plan a policy, fastest that fits first.

    A micro-batch is the largest that fits, or training.micro_batch where that is a number of images. ValueError for an
    unknown GPU, and for a batch that the processes cannot share.
    """
    card = lookup(GPUS, gpu, "--gpu")
    if world < 1:
        raise ValueError(f"--gpus={world} is no number of GPUs; use 1 or more")
    settings = config.training
    if settings.fp8 and not card.has_fp8:
        raise ValueError(f"training.fp8=true is impossible on --gpu {gpu}; use training.fp8=false, or an H100 or newer")
    objective = build(OBJECTIVES, config.objective, "objective")
    side = config.data.image_size // 8  # of the usual autoencoders; shards say the real one
    with torch.device("meta"):
        model = network(config, (4, side, side), objective)
    micro, accumulation = micro_batches(settings.global_batch, max(settings.micro_batch, 0), world)
    share = micro * accumulation
    candidates = [micro] if settings.micro_batch > 0 else divisors(share)
    count = sum(p.numel() for p in model.parameters())
    linears = {name: module.weight.numel() for name, module in model.named_modules() if isinstance(module, Linear)}
    weights = sum(count for name, count in linears.items() if not name.endswith("cross.kv"))  # that sees two tokens
    in_fp8 = 2 * model.tokens * weights if settings.fp8 else 0  # FLOPs of an image's forward pass
    wide = 1 if settings.precision == "bf16" else 2  # TF32: values of twice the bytes, products at half the rate
    casts = CAST_BYTES if wide == 1 else 0
    weight_bytes = (OPTIMIZER_BYTES / (world if uses_zero(settings) else 1) + casts) * count
    plans = []
    for policy in policies_of(config):
        memory = {m: memory_by_kind(model, settings, policy, m, world) for m in candidates}
        fitting = [m for m in candidates if sum(memory[m].values()) <= card.gib * GIB * (1 - RESERVED)]
        micro = max(fitting, default=min(candidates))
        flops = 3 * (model.flops_per_image() - in_fp8 * (1 - 1 / FP8_SPEED)) * (4 / 3 if policy == "full" else 1)
        moved = weight_bytes + (share // micro - 1) * (ADD_BYTES + casts / 2) * count
        moved += share * wide * moved_bytes(model, policy, residual=settings.residual_bytes // wide, fp8=settings.fp8)
        rate, bandwidth = card.tflops / wide * GEMM_SHARE, card.bandwidth * MEMORY_SHARE
        step_s = share * flops / (rate * 1e12) + moved / (bandwidth * 1e12)
        speed = settings.global_batch / step_s
        hours = settings.steps * step_s / 3600
        plans.append(Plan(policy, micro, memory[micro], bool(fitting), step_s, speed, hours))
    return model, sorted(plans, key=lambda p: (not p.fits, p.step_s))


def report(config: Config, gpu: str, world: int = 1) -> str:
    """The plan in Markdown, as `fastdit plan` prints it."""
    model, plans = plan(config, gpu, world)
    settings, forward, best = config.training, model.flops_per_image(), plans[0]
    engine = f"ZeRO-{settings.zero_stage}" if uses_zero(settings) else "DDP"
    processes = f"{world} x {gpu}" + (f" ({engine})" if world > 1 else "")
    precision = "FP8 linears, " * settings.fp8 + settings.precision
    lines = [
        f"### {config.model.variant}, {config.data.image_size} px, {processes}, global batch "
        f"{settings.global_batch}, {precision}, residual stream {8 * settings.residual_bytes} bits",
        "",
        f"{model.parameter_count():,} parameters; {forward / 1e9:.1f} GFLOP an image forward, "
        f"{3 * forward / 1e9:.1f} in training.",
        "",
        "| checkpointing | micro-batch | "
        + " | ".join(best.memory)
        + " | total GiB | fits | images/s | hours | GPU-hours |",
        "|---" * (len(best.memory) + 7) + "|",
    ]
    for p in plans:
        cells = [f"{value / GIB:.1f}" for value in p.memory.values()]
        total = f"{sum(p.memory.values()) / GIB:.1f}"
        fits = "yes" if p.fits else "no"
        lines.append(
            f"| {p.policy} | {p.micro_batch} | {' | '.join(cells)} | {total} | {fits} | {p.images_per_s:.0f} "
            f"| {p.hours:.0f} | {p.hours * world:.0f} |"
        )
    chosen = f"training.activation_checkpointing={best.policy} training.micro_batch={best.micro_batch}"
    smaller = f"lower training.micro_batch={best.micro_batch}, or " * (best.micro_batch > 1)
    shards = "" if uses_zero(settings) else " with training.engine=deepspeed training.zero_stage=2"
    other = f" ({FP8_SPEED} times that in FP8)" * settings.fp8 + " (half that in TF32)" * (settings.precision == "fp32")
    lines += [
        "",
        f"Fastest that fits: {chosen}."
        if best.fits
        else f"Nothing fits {gpu}: {smaller}use more GPUs{shards}.",
        f"Predicted, not measured: products at {GEMM_SHARE:.0%} of {GPUS[gpu].tflops:.0f} TFLOP/s{other}, the rest at "
        f"{MEMORY_SHARE:.0%} of {GPUS[gpu].bandwidth:.2f} TB/s; gradient exchange hidden; "
        f"{settings.steps:,} steps.",
    ]
    return "\n".join(lines)
