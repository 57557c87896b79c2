"""Settings that change nothing, because they belong to one that is not set: a run names them when it starts."""

from typing import Any

from fastdit.config import leaves, to_tree

ZERO = "training.engine=deepspeed, or the deepspeed launcher"
NEEDS = {  # key: the key that it belongs to, and the values of that one with which it counts; without any: all but 0
    "training.residual": ("training.precision", "bf16"),
    "training.fp8_history": ("training.fp8",),
    "training.fp8_margin": ("training.fp8",),
    "training.route_ends": ("training.route",),
    "training.route_full_steps": ("training.route",),
    "training.zero_stage": (ZERO,),
    "training.deepspeed": (ZERO,),
    "training.sample_images": ("training.sample_every",),
    "training.reference": ("training.evaluate_every",),
    "training.evaluate_images": ("training.reference",),  # an autoencoder is always measured, and has no such key
    "training.evaluate_features": ("training.reference",),
    "objective.weight": ("objective.prediction", "eps", "x_0", "score"),
    "objective.time_mean": ("objective.time_distribution", "logit_normal"),
    "objective.time_scale": ("objective.time_distribution", "logit_normal", "mode"),
    "objective.class_token_weight": ("model.class_token",),
    "discriminator.start": ("discriminator.weight",),
    "discriminator.channels": ("discriminator.weight",),
    "discriminator.layers": ("discriminator.weight",),
    "discriminator.lr": ("discriminator.weight",),
    "loss.perceptual_weight": ("loss.perceptual", "lpips", "efficientnet-lite0"),
    "loss.vgg": ("loss.perceptual", "lpips"),
}


def unused(config: Any, zero: bool = False) -> list[str]:
    """A line for each setting of a config that changes nothing. `zero`: whether the run uses DeepSpeed's ZeRO."""
    own, default = dict(leaves(to_tree(config))), dict(leaves(to_tree(type(config)())))
    lines = []
    for key, (need, *values) in NEEDS.items():
        has = (own | {ZERO: zero}).get(need, not need.startswith("objective."))
        if has in values if values else has:
            continue
        counts = need + "=" * bool(values) + " or ".join(values)
        names = [name for name in own if name == key or name.startswith(f"{key}.")]
        lines += [f"{n}={own[n]} changes nothing without {counts}" for n in names if own[n] != default.get(n)]
    return lines
