"""Bytes that a training step keeps and moves, counted from the network's shapes (bf16 autocast, fused kernels)."""

from collections.abc import Callable

from fastdit.models.dit import DiT

GIB = 2**30
RESERVED = 0.06  # of a GPU's memory: CUDA context, the allocator's fragments, workspaces


def activation_bytes(model: DiT, policy: str, residual: int = 4) -> int:
    """Bytes that one image keeps from forward to backward, bf16 under autocast with the fused kernels.

    Per token and block, in units of D values: the input of qkv 1, qkv 3, attention's output 1, both branches 2, the
    input of fc1 1, its output 4, GELU's output 4, at two bytes; and twice the residual stream at `residual` bytes.
    `selective` runs norms and GELU again and drops what they make; `full` keeps a block's residual and branch only.
    """
    d, tokens, blocks = model.hidden_size, model.tokens, len(model.blocks)
    a_token = {
        "none": 2 * (1 + 3 + 1 + 2 + 1 + 4 + 4) + 2 * residual,
        "selective": 2 * (3 + 1 + 2 + 4) + residual,
        "full": 2 + residual,
    }[policy]
    ends = residual + 2  # the residual and the input of the final layer
    return d * tokens * (blocks * a_token + ends)


def moved_bytes(model: DiT, policy: str, residual: int = 4) -> int:
    """Bytes that one image's step moves outside matrix products: norms and gates, GELU, attention, bias gradients."""
    d, tokens, blocks = model.hidden_size, model.tokens, len(model.blocks)
    norm = 2 * ((2 * residual + 2 + 2) + (3 * residual + 2 + 2 + 2))  # twice a block: x, branch, x', h and backward
    gelu = 2 * (4 + 4) + 2 * (4 + 4 + 4)
    attention = 2 * (3 + 1) + 2 * (3 + 1 + 1 + 3)
    bias_gradients = 2 * (3 + 4)  # those of qkv and fc1; the others leave the fused kernels
    again = {"none": 0, "selective": norm // 3 + 2 * (4 + 4), "full": (norm + gelu + attention) // 3}[policy]
    return d * tokens * blocks * (norm + gelu + attention + bias_gradients + again)


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
    """Peak bytes a GPU by kind, for `images` in one forward pass."""
    count = sum(p.numel() for p in model.parameters())
    one_block = activation_bytes(model, "none", residual) / len(model.blocks)
    again = one_block if policy != "none" else 0  # in backward
    optimizer_over, gradients_over, weights_over = (world if zero_stage >= stage else 1 for stage in (1, 2, 3))
    return {
        "weights": 4 * count / weights_over,
        "bf16 copies": 2 * count if precision == "bf16" else 0,  # autocast's, kept for backward
        "gradients": 4 * count / gradients_over,
        "moments": 8 * count / optimizer_over,
        "EMA": 4 * count / optimizer_over,
        "activations": images * (activation_bytes(model, policy, residual) + again) * (1 if precision == "bf16" else 2),
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
