"""Memory and speed of a training step, predicted from the network's shapes, before anything runs.

`fastdit plan`, `training.activation_checkpointing=auto` and `training.micro_batch=-1` share one ranking (`rank`):
matrix products and attention at shares of the datasheet's rate, everything else at shares of the memory bandwidth
(`cards.Efficiency`).
"""

from collections import Counter
from dataclasses import dataclass, replace

from torch import Tensor

from fastdit import distributed
from fastdit.build import build_routing, uses_zero
from fastdit.cards import GIB, GPU, GPUS, card_of
from fastdit.errors import counted
from fastdit.models.blocks import RECOMPUTE
from fastdit.models.dit import DiT
from fastdit.models.fp8_linears import ACTIVATIONS as FP8_FUSED
from fastdit.models.layers import Linear
from fastdit.schema import Config, TrainingConfig

RESERVED = 0.06  # of a GPU's memory: CUDA context, the allocator's fragments, workspaces
ZERO_BUCKET = 500_000_000  # gradients that DeepSpeed collects before it reduces them (reduce_bucket_size by default)
OPTIMIZER_BYTES = 40  # per parameter: norm, AdamW and EMA in one pass
AVERAGE_BYTES = 12  # per parameter and further average: it and the weight are read, it is written
CAST_BYTES = 12  # per parameter: its copy in bf16, its gradient to fp32, unless AdamW's pass writes and reads bf16
ADD_BYTES = 12  # per parameter and further micro-batch: its gradient is added; its weight is also cast again

POLICIES = tuple(RECOMPUTE)  # of activation checkpointing, from fastest to smallest


def activation_bytes(
    model: DiT, policy: str, *, itemsize: int = 2, residual: int = 4, fp8: bool = False, blocks: float | None = None
) -> int:
    """Bytes that one image keeps from the forward to the backward pass, with the fused kernels.

    Per token and block, in units of D values of `itemsize` bytes: the input of qkv 1, qkv 3, attention's output 1, both
    branches 2, the input of fc1 1, its output, the activation's output; and twice the residual stream at `residual`
    bytes per value; more where the network has options. `activation` recomputes the activation's output; `selective`
    also the norms' outputs; `full` keeps only a block's residual and branch. With FP8 and `none`, the inputs of qkv,
    fc1 and fc2 are kept in one byte per value, and that of proj in another one. `blocks`: see `full_blocks`. A block of
    a decoder also keeps its modulation vectors and what they are computed from.
    """
    d, tokens, blocks = model.hidden_size, model.tokens, len(model.blocks) if blocks is None else blocks
    before, after = activation_widths(model)
    cross = model.blocks[0].cross is not None  # its input, q, output and branch, and one more residual
    rotated = model.blocks[0].attn.qk_norm != "none" or model.rope is not None  # q and k before and after
    dropped = (2 + cross) if model.options.dropout else 0  # branches: which values are dropped, and the result
    biased = before if model.blocks[0].mlp.kind == "gelu" else 0  # the exact GELU also keeps its input with the bias
    options = 2 * rotated + 3 * dropped + biased
    plain, residuals = {
        "none": (1 + 3 + 1 + 2 + 1 + before + after + 4 * cross + options, 2 + cross),
        "activation": (1 + 3 + 1 + 2 + 1 + before + 4 * cross + options, 2 + cross),
        "selective": (3 + 1 + 2 + before + 3 * cross + dropped, 1),
        "full": (1, 1),
    }[policy]
    ends = residual + itemsize  # the residual and the input of the final layer
    in_bytes = -(1 + 1 + after) + 1 if fp8 and policy == "none" else 0
    if decoder := model.options.decoder_blocks:
        vectors = 2 * model.blocks[-1].modulations  # views of one tensor: a gate keeps it
        units = {"selective": vectors, "full": vectors if vectors == 6 else 0}.get(policy, 1 + vectors)
        ends += decoder * itemsize * units + 2 * residual + 4 * itemsize  # the condition; vectors of the final layer
    return round(d * tokens * (blocks * (itemsize * plain + in_bytes + residual * residuals) + ends))


def activation_widths(model: DiT) -> tuple[float, float]:
    """Widths of the MLP's values before and after its activation, over D: 4 and 4, as published."""
    mlp = model.blocks[0].mlp
    return mlp.fc1.weight.shape[0] / model.hidden_size, mlp.fc2.weight.shape[1] / model.hidden_size


def full_blocks(model: DiT, settings: TrainingConfig) -> float:
    """The number of blocks with all tokens that compute as many tokens as the network does on training.route."""
    routing = build_routing(settings, model)
    return sum(routing.lengths(model)) / model.tokens if routing else len(model.blocks)


def moved_bytes(
    model: DiT, policy: str, *, residual: int = 4, fp8: bool = False, blocks: float | None = None
) -> float:
    """Bytes that one image's step moves outside matrix products; within 4% of what bench/static/count.py counts.

    Norms and gates, GELU, attention, the bias and the packing of qkv's gradient; with FP8 also preparing the operands.
    `blocks`: see `full_blocks`.
    """
    d, tokens, blocks = model.hidden_size, model.tokens, len(model.blocks) if blocks is None else blocks
    before, after = activation_widths(model)
    cross = model.blocks[0].cross is not None
    norm = (2 + cross) * (2 * residual + 2 + 2)  # of each branch: x, branch, x', h
    norm_backward = (2 + cross) * (3 * residual + 2 + 2 + 2)
    activation = 2 * (before + after)  # forward; backward reads both and writes a gradient
    attention = 2 * (3 + 1) + 2 * (3 + 1 + 1 + 3) + cross * (2 * (1 + 1) + 2 * (1 + 1 + 1 + 1))
    packing = 2 * (3 + 3) + 2 * 3  # the gradients of q, k and v into one tensor; read again for the bias
    step = norm + norm_backward + activation + (activation + 2 * before) + attention + packing
    if fp8:  # inputs and gradients of the linears: read, and written in both layouts
        step += 4 * (1 + (3 + 1 + 1)) + 12 * cross  # of attention; gradients of qkv and of the branches
        step += 0 if model.blocks[0].mlp.kind in FP8_FUSED else 4 * (after + before)  # else by the activation
        step += (2 + cross) * (2 - 1)  # the norm writes a byte instead of two, which is then transposed
        step -= 2 * 3  # the cast also sums the gradient of qkv's bias
    more, recomputed = 0.0, 0.0  # of options, as counted: of a step, and when it computes norms or blocks again
    if model.blocks[0].attn.qk_norm != "none":  # with or without the rotation
        more, recomputed = 16, 10
    elif model.rope is not None:
        more, recomputed = 24, 16
    if model.options.dropout:
        more, recomputed = more + 41 * (2 + cross), recomputed + 20 * (2 + cross)
    if model.blocks[0].mlp.kind == "gelu":  # without a kernel of its own
        more, recomputed = more + 4 * before, recomputed - 2 * before
    again = {
        "none": 0,
        "activation": 2 * after,  # written again by the activation's backward pass
        "selective": norm + activation + recomputed,
        "full": norm + activation + recomputed + 2 * (3 + 1),  # and attention's forward pass
    }[policy]
    decoder = model.options.decoder_blocks * 35 * 2 * model.blocks[-1].modulations  # per vector of a token, as counted
    return d * tokens * (blocks * (step + more + again) + decoder)


def muon_matrices(model: DiT) -> list[Tensor]:
    """The weights that training.optimizer=muon updates with Muon (training/muon.py): those that tokens pass through.

    A modulation sees one vector per image: in a small batch its gradient has few directions, of which Newton-Schulz
    would amplify the noise.
    """
    return [p for name, p in model.blocks.named_parameters() if p.ndim == 2 and "adaLN_modulation" not in name]


def muon_flops(model: DiT, world: int) -> int:
    """FLOPs of Muon in a step, of the process with the largest share: five iterations of three products."""
    shapes, total = Counter(p.shape for p in muon_matrices(model)), 0
    for (rows, columns), number in shapes.items():
        small, large = sorted((rows, columns))
        total += -(-number // world) * 5 * 2 * (2 * small**2 * large + small**3)
    return total


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
    fp8: bool = False,
    blocks: float | None = None,
    muon: bool = False,
    monitored: bool = False,
) -> dict[str, float]:
    """Peak bytes per GPU by kind, for `images` in one forward pass; `residual` bytes per value of that stream.

    `averages`: the EMA, and one more for each of training.ema_stds. `blocks`: see `full_blocks`.
    `muon`: training.optimizer=muon, which keeps one value per weight of a matrix instead of AdamW's two.
    `monitored`: the run validates, samples or evaluates, with a network of its own in fp32.
    """
    count = sum(p.numel() for p in model.parameters())
    width = {"itemsize": 2 if precision == "bf16" else 4, "residual": residual, "fp8": fp8, "blocks": blocks}
    kept, whole = activation_bytes(model, policy, **width), activation_bytes(model, "none", **width)
    recomputed = (whole - kept) / len(model.blocks)  # by the backward pass, for one block at a time
    optimizer_over, gradients_over, weights_over = (world if zero_stage >= stage else 1 for stage in (1, 2, 3))
    # in bf16 DeepSpeed has two buckets: the gradients of nn.Linear are reduced in bf16, the others in fp32
    bucket = ZERO_BUCKET * (4 if precision == "fp32" else 8 if zero_stage < 3 else 6)
    zero = {"ZeRO's copy and buckets": 4 * count / world + bucket} if zero_stage else {}
    return {
        "weights": 4 * count / weights_over,
        "bf16 copies": 2 * count if precision == "bf16" else 0,  # autocast's, kept for the backward pass
        "gradients": 4 * count / gradients_over,
        "optimizer": (8 * count - (4 * sum(p.numel() for p in muon_matrices(model)) if muon else 0)) / optimizer_over,
        "EMA": 4 * averages * count / optimizer_over,
        **zero,
        **({"monitor": 4 * count} if monitored else {}),
        "activations": images * (kept + recomputed),
    }


@dataclass(frozen=True)
class Candidate:
    """One policy of activation checkpointing with its largest micro-batch that fits; bytes per GPU by kind."""

    policy: str
    micro_batch: int
    memory: dict[str, float]
    fits: bool
    step_s: float  # predicted, for the whole step of all processes


def rank(
    model: DiT, settings: TrainingConfig, card: GPU, share: int, world: int, policies: list[str], micros: list[int],
    monitored: bool = False,
) -> list[Candidate]:
    """One Candidate per policy, the fastest that fits first.

    The step has `share` images on each of `world` GPUs. A larger micro-batch is always predicted to be faster: the
    weights are cast, and their gradients added, fewer times.
    """
    count = sum(p.numel() for p in model.parameters())
    linears = {name: module.weight.numel() for name, module in model.named_modules() if isinstance(module, Linear)}
    weights = sum(n for name, n in linears.items() if not name.endswith("cross.kv"))  # applied to two tokens only
    routing, blocks = build_routing(settings, model), full_blocks(model, settings)
    lengths = routing.lengths(model) if routing else [model.tokens] * len(model.blocks)
    in_fp8 = 2 * model.tokens * weights * blocks / len(lengths) if settings.fp8 else 0  # FLOPs of a forward pass
    wide = 1 if settings.precision == "bf16" else 2  # TF32: twice the bytes per value, half the rate
    muon = settings.optimizer == "muon"
    alone = world == 1 and not uses_zero(settings) and not muon  # AdamW's pass writes bf16 weights, see engine.py
    casts = 0 if wide == 2 else CAST_BYTES
    reached, bandwidth = card.efficiency, card.bandwidth * 1e12
    attention = 4 * sum(n * n for n in lengths) * model.hidden_size  # FLOPs, also of one image's forward pass
    products = model.flops_per_image(lengths) - attention - in_fp8 * (1 - 1 / reached.fp8)
    forward_s = (products / reached.products + attention / reached.attention) / (card.tflops / wide * 1e12)
    optimizer_bytes = OPTIMIZER_BYTES + AVERAGE_BYTES * len(settings.ema_stds)
    weight_bytes = optimizer_bytes / (world if uses_zero(settings) else 1) * count
    once_s = muon_flops(model, world) / (reached.products * card.tflops * 1e12) if muon else 0
    candidates = []
    for policy in policies:
        memory = {m: memory_by_kind(model, settings, policy, m, world, monitored) for m in micros}
        fitting = [m for m in micros if sum(memory[m].values()) <= card.gib * GIB * (1 - RESERVED)]
        micro = max(fitting, default=min(micros))
        moved, with_fp8 = (
            wide * moved_bytes(model, policy, residual=settings.residual_bytes // wide, fp8=fp8, blocks=blocks)
            for fp8 in (False, settings.fp8)
        )
        image_s = (4 if policy == "full" else 3) * forward_s  # the backward pass takes two; full: one again
        image_s += (moved / reached.memory + (with_fp8 - moved) / reached.fp8_operands) / bandwidth
        per_step = weight_bytes + (0 if alone and micro == share else casts) * count
        per_step += (share // micro - 1) * (ADD_BYTES + casts / 2) * count
        step_s = share * image_s + per_step / reached.weights / bandwidth + once_s
        step_s += share // micro * (reached.small_s + (0 if settings.cuda_graph else reached.launch_s))
        candidates.append(Candidate(policy, micro, memory[micro], bool(fitting), step_s))
    return sorted(candidates, key=lambda c: (not c.fits, c.step_s))


def candidates(config: Config, model: DiT, card: GPU, world: int) -> tuple[list[Candidate], int]:
    """What the config leaves open, ranked (see `rank`), and the images of one step per process."""
    settings = config.training
    micro, accumulation = micro_batches(settings.global_batch, max(settings.micro_batch, 0), world)
    share, policy = micro * accumulation, settings.activation_checkpointing
    policies = policies_of(config) if policy == "auto" else [policy]
    micros = divisors(share) if settings.micro_batch < 0 else [micro]
    monitored = any(config.monitor_every.values())
    return rank(model, settings, card, share, world, policies, micros, monitored), share


def choose(config: Config, model: DiT, ranks: distributed.Ranks) -> tuple[str, int, int, float]:
    """Policy of activation checkpointing, micro-batch and accumulation of a run on `ranks.device`, and the predicted
    seconds of a step (0 on a device that is not in GPUS).

    What the config states is taken as it is. What it leaves open (`auto`, -1) is the fastest candidate predicted to
    fit; on a device that is not in GPUS, its own memory counts with an H100's speed. ValueError when nothing fits.
    """
    settings = config.training
    known = card_of(ranks.device)
    card = known or replace(GPUS["H100"], gib=distributed.memory_of(ranks.device) / GIB)
    found, share = candidates(config, model, card, ranks.world)
    best = found[0]
    if not best.fits and (settings.activation_checkpointing == "auto" or settings.micro_batch < 0):
        least = min(found, key=lambda c: sum(c.memory.values()))
        raise ValueError(
            f"training.micro_batch={least.micro_batch} with activation_checkpointing={least.policy} needs "
            f"{sum(least.memory.values()) / GIB:.1f} GiB of {card.gib * (1 - RESERVED):.1f}; use more GPUs, a higher "
            "training.zero_stage, or a smaller model.variant"
        )
    return best.policy, best.micro_batch, share // best.micro_batch, best.step_s if known else 0.0


def smaller_batch(policy: str, micro: int) -> str:
    """What to set when a step ran out of memory."""
    smaller = max((m for m in divisors(micro) if m < micro), default=1)
    other = ", or activation_checkpointing=full" * (policy != "full")
    return f"micro_batch={micro} with activation_checkpointing={policy}: use training.micro_batch={smaller}{other}"


def policies_of(config: Config) -> list[str]:
    """The policies of activation checkpointing that can run: `activation` needs a kernel that FP8 and mlp=gelu lack."""
    without = config.training.fp8 or config.model.mlp == "gelu"
    return [policy for policy in POLICIES if not (without and policy == "activation")]


def memory_by_kind(
    model: DiT, settings: TrainingConfig, policy: str, micro: int, world: int, monitored: bool = False
) -> dict[str, float]:
    """Predicted peak bytes of one of `world` processes; `monitored`: see `memory_bytes`."""
    return memory_bytes(
        model,
        micro,
        policy,
        world=world,
        zero_stage=settings.zero_stage if uses_zero(settings) else 0,
        precision=settings.precision,
        residual=settings.residual_bytes,
        averages=1 + len(settings.ema_stds),
        fp8=settings.fp8,
        blocks=None if settings.route_full_steps else full_blocks(model, settings),
        muon=settings.optimizer == "muon",
        monitored=monitored,
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
        shared = counted(share, "image")
        raise ValueError(f"training.micro_batch={micro} does not divide {shared} per process; use {fits}")
    return micro, share // micro
