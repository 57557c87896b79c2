"""Training objectives: the loss of a batch, and the conversion of the network's output to a `Prediction`.

An objective defines its path, the distribution of its timesteps and the time convention of its network (`model_time`:
what a released checkpoint expects as t). It draws no random numbers: it takes uniforms `u` and `noise`, so that the
loss is a pure function of its arguments. Networks are called as `model(x_t, time, y)`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fastdit.diffusion.coupling import COUPLINGS
from fastdit.diffusion.paths import INTERPOLANTS, NUM_TIMESTEPS, PATHS, SCHEDULES, Path, broadcast, half_diffusion
from fastdit.diffusion.prediction import Prediction, Step, predicted, target
from fastdit.diffusion.timesteps import TIME_DISTRIBUTIONS, respaced, shifted
from fastdit.registry import check_literals

Model = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Terms = tuple[Tensor, dict[str, Tensor]]  # the fields of a Loss


@dataclass(frozen=True)
class Loss:
    """The loss of each sample (N,), and its named terms (N,)."""

    per_sample: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """The interface of an objective: a frozen dataclass whose fields are its options."""

    @property
    def path(self) -> Path:
        """The noising path."""

    def out_channels(self, channels: int) -> int:
        """The number of output channels that the network needs for latents with `channels` channels."""

    def sample_t(self, u: Tensor) -> Tensor:
        """Uniforms (N,) in [0, 1) -> timesteps of a training batch (N,), float64."""

    def model_time(self, t: Tensor) -> Tensor:
        """t (N,) -> the time that the network takes as input (N,)."""

    def timesteps(self, steps: int | str) -> Tensor:
        """The timesteps of a sampler (steps + 1,), descending, float64."""

    def predict(self, model: Model, x_t: Tensor, t: Tensor, y: Tensor | None) -> Prediction:
        """Runs the network on x_t (N, C, h, w), t (N,) and labels y (N,), and converts its output."""

    def loss(self, model: Model, x_0: Tensor, y: Tensor | None, t: Tensor, noise: Tensor) -> Loss:
        """The loss of a batch: x_0 and noise (N, C, h, w), t (N,) from `sample_t`."""

    def terms(self, output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Terms:
        """The part of `loss` after the network. It is compiled on a GPU, so it must have no Python side effects."""


@dataclass(frozen=True)
class DDPM:
    """Denoising diffusion on a discrete noise schedule, as in DiT (Ho et al. 2020; Nichol & Dhariwal 2021).

    schedule       a key of SCHEDULES: linear, cosine, scaled_linear, zero_terminal_snr
    variance       learned_range (2C output channels), fixed_large (beta) or fixed_small (that of q(x_s | x_t, x_0))
    loss_type      mse; mse_vlb: plus the variational bound, which trains only the variance; kl: T times the bound,
                   which also trains the mean; rescaled_mse: the released code's bound times T / 1000, which at
                   T = 1000 equals mse_vlb
    min_snr_gamma  caps the weight of low-noise timesteps (Hang et al. 2023); 0: no weighting
    """

    schedule: Literal[*SCHEDULES] = "linear"
    prediction: Literal["eps", "x_0", "v"] = "eps"
    variance: Literal["learned_range", "fixed_large", "fixed_small"] = "learned_range"
    loss_type: Literal["mse", "mse_vlb", "rescaled_mse", "kl"] = "mse_vlb"
    min_snr_gamma: float = 0.0

    def __post_init__(self):
        check_literals(self)
        if self._learned and self.loss_type == "mse":
            raise ValueError("loss_type='mse' never trains variance='learned_range'; use mse_vlb or a fixed variance")
        if not self._learned and self.loss_type in ("mse_vlb", "rescaled_mse"):
            raise ValueError(f"loss_type={self.loss_type!r} cannot train variance={self.variance!r}; use mse or kl")
        if self.schedule == "zero_terminal_snr" and self.prediction == "eps":
            raise ValueError("prediction='eps' gives no x_0 at t=1 of schedule='zero_terminal_snr'; use prediction=v")
        if self.min_snr_gamma < 0 or (self.min_snr_gamma and self.loss_type == "kl"):
            raise ValueError(f"min_snr_gamma={self.min_snr_gamma} cannot weight this loss; use 0, or 5.0 with mse")

    @property
    def _learned(self) -> bool:
        return self.variance == "learned_range"

    @property
    def path(self) -> Path:
        return PATHS[f"ddpm_{self.schedule}"]

    def out_channels(self, channels: int) -> int:
        return 2 * channels if self._learned else channels

    def sample_t(self, u: Tensor) -> Tensor:
        """Uniforms (N,) in [0, 1) -> timesteps (N,) of the schedule, float64."""
        return ((u.double() * NUM_TIMESTEPS).floor() + 1) / NUM_TIMESTEPS

    def model_time(self, t: Tensor) -> Tensor:
        """t -> the timestep in 0..999 that DiT was trained on; fractional if t lies between two of them."""
        return (NUM_TIMESTEPS * t.double() - 1).clamp(min=0).float()

    def timesteps(self, steps: int | str) -> Tensor:
        """Timesteps (steps + 1,), float64, descending to 0; steps is a count, "10,15,20" or "ddim50" (`respaced`)."""
        kept = respaced(steps)
        if kept[-1] == 0:  # for a single step, the released rule keeps only the one with the least noise
            raise ValueError(f"steps={steps!r} keeps only index 0, where almost no noise is left; use at least 2 steps")
        return (torch.tensor([*kept[::-1], -1], dtype=torch.float64) + 1) / NUM_TIMESTEPS

    def predict(self, model: Model, x_t: Tensor, t: Tensor, y: Tensor | None) -> Prediction:
        return self._read(model(x_t, self.model_time(t), y).to(x_t.dtype), x_t, t)

    def _read(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        channels = x_t.shape[1]
        if self._learned:
            mix = (output[:, channels:] + 1) / 2
        elif self.variance == "fixed_large":
            # as in the released code, the step to t = 0 has the smaller variance of the step before it
            mix = broadcast((t > 1.5 / NUM_TIMESTEPS).double(), x_t)
        else:
            mix = 0.0
        return predicted(self.prediction, output[:, :channels], x_t, t, self.path, mix)

    def loss(self, model: Model, x_0: Tensor, y: Tensor | None, t: Tensor, noise: Tensor) -> Loss:
        x_t = self.path.q_sample(x_0, noise, t)
        return Loss(*self.terms(model(x_t, self.model_time(t), y).to(x_t.dtype), x_0, x_t, t, noise))

    def terms(self, output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Terms:
        prediction = self._read(output, x_t, t)
        if self.loss_type == "kl":
            vlb = self.vlb(prediction, x_0, x_t, t)
            return vlb * NUM_TIMESTEPS, {"vlb": vlb}
        error = output[:, : x_0.shape[1]] - target(self.prediction, x_0, noise, t, self.path)
        parts = {"mse": self._min_snr_weight(t).to(x_0) * per_sample_mean(error**2)}
        if self._learned:
            # the bound trains only the variance: with gradients through the mean, it would add noise to the mse
            parts["vlb"] = self.vlb(replace(prediction, x_0=prediction.x_0.detach()), x_0, x_t, t)
        return parts["mse"] + parts["vlb"] if self._learned else parts["mse"], parts

    def _min_snr_weight(self, t: Tensor) -> Tensor:
        if not self.min_snr_gamma:
            return torch.ones_like(t)
        snr = (self.path.alpha(t) / self.path.sigma(t)) ** 2
        capped = snr.clamp(max=self.min_snr_gamma)  # the weight of the squared error of x_0
        return {"x_0": capped, "eps": capped / snr, "v": capped / (snr + 1)}[self.prediction]

    def vlb(self, prediction: Prediction, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The bound's term at t, in bits per dimension (N,); at the first timestep, a negative log-likelihood."""
        t = t.double()
        s = t - 1 / NUM_TIMESTEPS
        first = s < 0.5 / NUM_TIMESTEPS
        s = torch.where(first, 0.0, s)
        step = Step.between(t, s, self.path, x_t)
        mean, log_variance = step.distribution(prediction, x_t)
        true = Prediction(x_0, prediction.eps, prediction.velocity)
        true_mean, true_log_variance = step.distribution(true, x_t)
        kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
        nats = torch.where(broadcast(first, x_t).bool(), -binned_log_likelihood(x_0, mean, 0.5 * log_variance), kl)
        return per_sample_mean(nats) / math.log(2)


@dataclass(frozen=True)
class FlowMatching:
    """Interpolants between data and noise, as in SiT (Ma et al. 2024). Ignores the second half of 2C output channels.

    interpolant  linear | gvp | vp
    prediction   velocity | eps (SiT's "noise") | score | x_0
    weight       none | velocity | likelihood: loss weight for eps, score or x_0; always none for velocity, as in SiT
    time_distribution  uniform | logit_normal (time_mean, time_scale) | mode (time_scale) | cosmap
    shift        resolution shift of the timesteps; sample_shift: a different one for sampling
    cosine_weight  weight of the loss 1 - cos(velocity, target) over the channels (LightningDiT: Yao et al. 2025)
    class_token_weight  weight of the loss of model.class_token (REG: Wu et al. 2025)
    coupling     independent | ot: noise assigned to images by optimal transport in the global batch, before `loss`
    train_eps, sample_eps  minimum distance of timesteps from the singular ends; None: SiT's defaults
    """

    interpolant: Literal[*INTERPOLANTS] = "linear"
    prediction: Literal["velocity", "eps", "score", "x_0"] = "velocity"
    weight: Literal["none", "velocity", "likelihood"] = "none"
    time_distribution: Literal[*TIME_DISTRIBUTIONS] = "uniform"
    time_mean: float = 0.0
    time_scale: float = 1.0
    shift: float = 1.0
    sample_shift: float | None = None
    cosine_weight: float = 0.0
    class_token_weight: float = 0.03
    coupling: Literal[*COUPLINGS] = "independent"
    train_eps: float | None = None
    sample_eps: float | None = None

    def __post_init__(self):
        check_literals(self)
        if self.cosine_weight < 0 or (self.cosine_weight and self.prediction != "velocity"):
            raise ValueError(f"cosine_weight={self.cosine_weight} compares velocities; use 0, or prediction=velocity")
        if not 0 <= self.class_token_weight < math.inf:
            raise ValueError(f"class_token_weight={self.class_token_weight} is out of range; use 0.03, as in the paper")
        if self.time_distribution == "mode" and not -1 <= self.time_scale <= 2 / (math.pi - 2):
            raise ValueError(f"time_scale={self.time_scale} makes t non-monotonic in u; use a value in [-1, 1.75]")
        if self.time_distribution == "logit_normal" and self.time_scale <= 0:
            raise ValueError(f"time_scale={self.time_scale} is not positive; use a standard deviation such as 1.0")
        for key in ("shift", "sample_shift"):
            if (value := getattr(self, key)) is not None and value <= 0:
                raise ValueError(f"{key}={value} is out of range; use a positive factor, 1.0 for no shift")
        for key in ("train_eps", "sample_eps"):
            if (value := getattr(self, key)) is not None and not 0 <= value < 0.5:
                raise ValueError(f"{key}={value} leaves no times; use a value in [0, 0.5), or null for SiT's default")

    @property
    def path(self) -> Path:
        return PATHS[self.interpolant]

    def out_channels(self, channels: int) -> int:
        return channels

    def interval(self, sampling: bool = False) -> tuple[float, float]:
        """The smallest and largest time in use; the largest is 1 if alpha(1) > 0 (VP)."""
        zero, one = torch.tensor([0.0, 1.0], dtype=torch.float64)
        eps = self.sample_eps if sampling else self.train_eps
        if eps is None:
            if self.path.singular(zero):
                eps = 1e-3 if sampling else 1e-5
            else:
                eps = 0.0 if self.prediction == "velocity" else 1e-3
        return eps, 1.0 if self.path.alpha(one) > 1e-6 else 1 - eps

    def sample_t(self, u: Tensor) -> Tensor:
        """Uniforms (N,) in [0, 1) -> timesteps (N,), float64."""
        t = TIME_DISTRIBUTIONS[self.time_distribution](u.double(), self.time_mean, self.time_scale)
        low, high = self.interval()
        return low + (high - low) * shifted(t, self.shift)

    def model_time(self, t: Tensor) -> Tensor:
        """t -> SiT's time, in which 0 is noise and 1 is data."""
        return (1 - t.double()).float()

    def timesteps(self, steps: int | str) -> Tensor:
        """Timesteps (steps + 1,), float64, descending over `interval(sampling=True)`."""
        if not (str(steps).isdigit() and int(steps) > 0):
            raise ValueError(f"steps={steps!r} needs a discrete schedule; use a positive count with flow matching")
        low, high = self.interval(sampling=True)
        t = torch.linspace(1, 0, int(steps) + 1, dtype=torch.float64)
        return low + (high - low) * shifted(t, self.shift if self.sample_shift is None else self.sample_shift)

    def predict(self, model: Model, x_t: Tensor, t: Tensor, y: Tensor | None) -> Prediction:
        return predicted(self.prediction, self._output(model, x_t, t, y), x_t, t, self.path)

    def _output(self, model: Model, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        output = model(x_t, self.model_time(t), y)[:, : x_t.shape[1]].to(x_t.dtype)
        return -output if self.prediction == "velocity" else output  # SiT's velocity points from noise to data

    def loss(self, model: Model, x_0: Tensor, y: Tensor | None, t: Tensor, noise: Tensor) -> Loss:
        x_t = self.path.q_sample(x_0, noise, t)
        return Loss(*self.terms(self._output(model, x_t, t, y), x_0, x_t, t, noise))

    def terms(self, output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Terms:
        if self.prediction == "score":  # score = -eps / sigma; the error of eps stays finite
            error = output * broadcast(self.path.sigma(t), x_0) + noise
        else:
            error = output - target(self.prediction, x_0, noise, t, self.path)
        parts = {"mse": self._weight(t).to(x_0) * per_sample_mean(error**2)}
        if self.cosine_weight:
            wanted = target("velocity", x_0, noise, t, self.path)
            # (N, h, w) -> (N,); eps limits the gradient for outputs with norm < 0.1, such as those of a zero-init head
            parts["cosine"] = per_sample_mean(1 - cosine_similarity(output, wanted, dim=1, eps=0.1))
            return parts["mse"] + self.cosine_weight * parts["cosine"], parts
        return parts["mse"], parts

    def _weight(self, t: Tensor) -> Tensor:
        if self.weight == "none" or self.prediction == "velocity":
            return torch.ones_like(t)
        alpha, sigma, _, _ = coefficients = self.path(t)
        rate = half_diffusion(*coefficients)
        of_eps = (rate / sigma) ** 2 if self.weight == "velocity" else rate / sigma**2
        return of_eps * (alpha / sigma) ** 2 if self.prediction == "x_0" else of_eps


def per_sample_mean(x: Tensor) -> Tensor:
    """(N, ...) -> (N,)"""
    return x.flatten(1).mean(1)


def gaussian_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """Elementwise KL(first || second) of two normal distributions, in nats."""
    gap = log_variance - other_log_variance
    return 0.5 * (gap.exp() - gap - 1 + (mean - other_mean) ** 2 * torch.exp(-other_log_variance))


def binned_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Elementwise log-probability of the 8-bit bin of x in [-1, 1] under a normal; the outer bins extend to infinity.

    The CDF is approximated by tanh, as in the released code, so that the losses agree.
    """

    def cdf(z):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    inverse_scale, half_bin = torch.exp(-log_scale), 1 / 255
    above, below = cdf(inverse_scale * (x - mean + half_bin)), cdf(inverse_scale * (x - mean - half_bin))
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()


def compiled(objective: Objective) -> Objective:
    """The objective with compiled `terms`, which would otherwise launch hundreds of small kernels on a GPU."""
    copy = replace(objective)
    object.__setattr__(copy, "terms", torch.compile(objective.terms, fullgraph=True))  # the dataclass is frozen
    return copy


OF_LOSS = ("min_snr_gamma", "weight", "time_distribution", "time_mean", "time_scale", "cosine_weight",
           "class_token_weight", "coupling", "train_eps")  # options without an effect on samples  # fmt: skip
OF_SAMPLES = ("sample_shift", "sample_eps")  # options without an effect on the loss
OF_NETWORK = ("schedule", "interpolant", "prediction")  # options that say what the network's output is
OBJECTIVES = {"ddpm": DDPM, "flow": FlowMatching}
