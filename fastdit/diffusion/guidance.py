"""Denoisers: a sampler only sees `denoise(x_t, t) -> Prediction`, which hides the network, labels and guidance."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastdit.diffusion.objectives import Model
from fastdit.diffusion.paths import Path, broadcast
from fastdit.diffusion.prediction import Prediction, with_x_0

Denoiser = Callable[[Tensor, Tensor], Prediction]


def guided(
    objective,
    model: Model,
    y: Tensor | None,
    cfg_scale: float = 1.0,
    cfg_channels: int | None = None,
    *,
    cfg_interval: Sequence[float] = (0.0, 1.0),
    cfg_rescale: float = 0.0,
    weak_model: Model | None = None,
) -> Denoiser:
    """A denoiser for labels y (N,) that returns weak + cfg_scale * (strong - weak); strong is the prediction for y.

    weak is the prediction for the null label (classifier-free guidance, Ho & Salimans 2022), or that of `weak_model`
    for y (autoguidance, Karras et al. 2024). Guidance applies to the first `cfg_channels` channels (3 in the released
    DiT, None for all) and at times within `cfg_interval` (Kynkaanniemi et al. 2024). `cfg_rescale` in [0, 1] rescales
    the standard deviation of x_0 toward that of the strong prediction (Lin et al. 2023, section 3.4).
    """
    null_label = getattr(model, "null_label", None)
    if cfg_scale != 1 and weak_model is None and null_label is None:
        raise ValueError(f"cfg_scale={cfg_scale} needs a model trained with label dropout; use 1.0 or a weak model")
    low, high = cfg_interval

    def denoise(x_t: Tensor, time: Tensor) -> Prediction:
        inside = low <= float(time) <= high
        t = torch.full((len(x_t),), float(time), dtype=torch.float64, device=x_t.device)  # no blocking copy
        if cfg_scale == 1 or not inside:
            return objective.predict(model, x_t, t, y)
        if weak_model is not None:
            strong, weak = objective.predict(model, x_t, t, y), objective.predict(weak_model, x_t, t, y)
        else:
            labels = torch.cat([y, torch.full_like(y, null_label)])  # (2N,)
            both = objective.predict(model, torch.cat([x_t, x_t]), torch.cat([t, t]), labels)
            strong, weak = both.rows(slice(None, len(x_t))), both.rows(slice(len(x_t), None))
        prediction = extrapolated(strong, weak, cfg_scale, cfg_channels)
        if not cfg_rescale:
            return prediction
        ratio = deviation(strong.x_0) / deviation(prediction.x_0)
        x_0 = prediction.x_0 * (cfg_rescale * ratio + 1 - cfg_rescale)
        return with_x_0(prediction, x_0, x_t, torch.as_tensor(time, dtype=torch.float64), objective.path)

    return denoise


def extrapolated(strong: Prediction, weak: Prediction, scale: float, channels: int | None) -> Prediction:
    """Guides the first `channels` channels of x_0, eps and velocity; the rest is copied from `strong`."""

    def blend(strong: Tensor, weak: Tensor) -> Tensor:
        guided = weak[:, :channels] + scale * (strong[:, :channels] - weak[:, :channels])
        return guided if channels is None else torch.cat([guided, strong[:, channels:]], 1)

    x_0, eps, velocity = (blend(getattr(strong, k), getattr(weak, k)) for k in ("x_0", "eps", "velocity"))
    return Prediction(x_0, eps, velocity, strong.log_variance_mix)


def deviation(x: Tensor) -> Tensor:
    """The standard deviation of each sample: (N, C, h, w) -> (N, 1, 1, 1)."""
    return x.std(dim=tuple(range(1, x.ndim)), keepdim=True)


def processed(denoise: Denoiser, path: Path, denoised_fn: Callable[[Tensor], Tensor]) -> Denoiser:
    """A denoiser that applies `denoised_fn` to x_0, such as one of CLIPS, and recomputes eps and velocity."""

    def corrected(x_t: Tensor, t: Tensor) -> Prediction:
        prediction = denoise(x_t, t)
        return with_x_0(prediction, denoised_fn(prediction.x_0), x_t, torch.as_tensor(t, dtype=torch.float64), path)

    return corrected


def clip(x_0: Tensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    return x_0.clamp(low, high)


def dynamic_threshold(x_0: Tensor, quantile: float = 0.995, floor: float = 1.0) -> Tensor:
    """Clips each sample at a quantile of |x_0|, if above `floor`, and rescales it to +-floor (Saharia et al. 2022)."""
    limit = torch.quantile(x_0.abs().flatten(1).float(), quantile, dim=1).clamp(min=floor).to(x_0)  # (N,)
    limit = broadcast(limit, x_0)
    return x_0.clamp(-limit, limit) * (floor / limit)


def watched(denoise: Denoiser, on_step: Callable[[float, Tensor, Prediction], None]) -> Denoiser:
    """A denoiser that calls `on_step(t, x_t, prediction)` after each evaluation, with any sampler."""

    def observed(x_t: Tensor, t: Tensor) -> Prediction:
        prediction = denoise(x_t, t)
        on_step(float(t), x_t, prediction)
        return prediction

    return observed


CLIPS = {"none": None, "static": clip, "dynamic": dynamic_threshold}
