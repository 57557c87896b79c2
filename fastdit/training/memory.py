"""Bytes that a training step keeps and moves, counted from the network's shapes (bf16 autocast, fused kernels)."""

from collections.abc import Callable

from fastdit.models.dit import DiT

GIB = 2**30
RESERVED = 0.06  # of a GPU's memory: CUDA context, the allocator's fragments, workspaces


POLICIES = ("none", "activation", "selective", "full")  # of activation checkpointing, fastest first


def activation_bytes(model: DiT, policy: str, *, itemsize: int = 2, residual: int = 4) -> int:
    """Bytes that one image keeps from forward to backward, with the fused kernels.

    Per token and block, in units of D values of `itemsize` bytes: the input of qkv 1, qkv 3, attention's output 1, both
    branches 2, the input of fc1 1, its output, the activation's output; and twice the residual stream at `residual`
    bytes; more where the network has options. `activation` makes the activation's output again; `selective` that and
    the norms' outputs; `full` keeps a block's residual and branch only.
    """
    d, tokens, blocks = model.hidden_size, model.tokens, len(model.blocks)
    before, after = activation_widths(model)
    cross = model.blocks[0].cross is not None  # its input, q, output and branch, and one more residual
    turned = model.blocks[0].attn.qk_norm != "none" or model.rope is not None  # q and k before and after
    dropped = (2 + cross) if model.dropout else 0  # branches of which it is kept what is dropped, and where
    biased = before if model.blocks[0].mlp.kind == "gelu" else 0  # the exact GELU keeps its input with its bias, too
    options = 2 * turned + 3 * dropped + biased
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
    """Bytes that one image's step moves outside matrix products; within 4% of those that bench/count.py counts.

    Norms and gates, GELU, attention, the bias and the packing of qkv's gradient; under FP8 what prepares the operands.
    """
    d, tokens, blocks = model.hidden_size, model.tokens, len(model.blocks)
    before, after = activation_widths(model)
    cross = model.blocks[0].cross is not None
    norm = (2 + cross) * (2 * residual + 2 + 2)  # of each branch: x, branch, x', h
    norm_backward = (2 + cross) * (3 * residual + 2 + 2 + 2)
    activation = 2 * (before + after)  # forward; backward reads both and writes a gradient
    attention = 2 * (3 + 1) + 2 * (3 + 1 + 1 + 3) + cross * (2 * (1 + 1) + 2 * (1 + 1 + 1 + 1))
    packing = 2 * (3 + 3) + 2 * 3  # the gradients of q, k and v into one; read once more for the bias
    step = norm + norm_backward + activation + (activation + 2 * before) + attention + packing
    if fp8:  # inputs and gradients of the linears: read for the largest value, read, written as they are and transposed
        step += 6 * (1 + 1 + 1 + after + 3 + 1 + before + 1 + 4 * cross)
    again = {
        "none": 0,
        "activation": 2 * after,  # written once more by the activation's backward pass
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
) -> dict[str, float]:
    """Peak bytes a GPU by kind, for `images` in one forward pass; `residual` bytes a value of that stream."""
    count = sum(p.numel() for p in model.parameters())
    width = {"itemsize": 2 if precision == "bf16" else 4, "residual": residual}
    kept, whole = activation_bytes(model, policy, **width), activation_bytes(model, "none", **width)
    again = (whole - kept) / len(model.blocks)  # what one block makes once more, in backward
    optimizer_over, gradients_over, weights_over = (world if zero_stage >= stage else 1 for stage in (1, 2, 3))
    return {
        "weights": 4 * count / weights_over,
        "bf16 copies": 2 * count if precision == "bf16" else 0,  # autocast's, kept for backward
        "gradients": 4 * count / gradients_over,
        "moments": 8 * count / optimizer_over,
        "EMA": 4 * count / optimizer_over,
        "activations": images * (kept + again),
    }


def fit(
    budget: float, policies: list[str], micro_batches: list[int], need: Callable[[str, int], float]
) -> tuple[str, int]:
    """The first policy, and its largest micro-batch, whose `need(policy, micro_batch)` bytes stay within `budget`.

    A micro-batch that fills less than a quarter of the largest one is worse than the next policy, except for the
    last. ValueError when nothing fits.
    """
    for policy in policies:
        for micro in sorted(micro_batches, reverse=True):
            if 4 * micro < max(micro_batches) and policy != policies[-1]:
                break
            if need(policy, micro) <= budget:
                return policy, micro
    least = need(policies[-1], min(micro_batches)) / GIB
    raise ValueError(
        f"training.micro_batch={min(micro_batches)} with activation_checkpointing={policies[-1]} needs {least:.1f} GiB "
        f"of {budget / GIB:.1f}; use more GPUs, a higher training.zero_stage, or a smaller model.variant"
    )
