"""Samplers against distributions whose denoiser is known in closed form, on every path."""

import inspect
import math

import pytest
import torch

from fastdit.diffusion.guidance import watched
from fastdit.diffusion.objectives import DDPM, FlowMatching
from fastdit.diffusion.paths import PATHS
from fastdit.diffusion.prediction import Prediction
from fastdit.diffusion.samplers import DIFFUSION_FORMS, SAMPLERS

MEAN, STD = 1.5, 0.4  # of the first channel; the second holds a mixture
WEIGHTS, MEANS, STDS = (torch.tensor(v, dtype=torch.float64) for v in ([0.3, 0.7], [-1.0, 1.2], [0.3, 0.4]))


def gaussian(path, mean=MEAN, std=STD):
    """The exact denoiser of data N(mean, std^2)."""

    def denoise(x_t, t):
        alpha, sigma, d_alpha, d_sigma = path.at(torch.as_tensor(t, dtype=torch.float64), x_t)
        excess = (x_t - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        x_0, eps = mean + alpha * std**2 * excess, sigma * excess
        return Prediction(x_0, eps, d_alpha * x_0 + d_sigma * eps)

    return denoise


def mixture(path):
    """The exact denoiser of a mixture of two normals: each component's, weighted by its responsibility for x_t."""

    def denoise(x_t, t):
        alpha, sigma, d_alpha, d_sigma = path.at(torch.as_tensor(t, dtype=torch.float64), x_t)
        (w_a, w_b), (mean_a, mean_b), (std_a, std_b) = WEIGHTS, MEANS, STDS
        variance_a, variance_b = alpha**2 * std_a**2 + sigma**2, alpha**2 * std_b**2 + sigma**2
        gap_a, gap_b = x_t - alpha * mean_a, x_t - alpha * mean_b
        log_odds = (w_a / w_b).log() + 0.5 * (variance_b / variance_a).log()
        share = torch.sigmoid(log_odds + 0.5 * (gap_b**2 / variance_b - gap_a**2 / variance_a))
        excess_a, excess_b = share * gap_a / variance_a, (1 - share) * gap_b / variance_b
        x_0 = share * mean_a + (1 - share) * mean_b + alpha * (std_a**2 * excess_a + std_b**2 * excess_b)
        eps = sigma * (excess_a + excess_b)
        return Prediction(x_0, eps, d_alpha * x_0 + d_sigma * eps)

    return denoise


def both(path):
    """The Gaussian in the first channel and the mixture in the second."""

    def denoise(x_t, t):
        one, two = gaussian(path)(x_t[:, :1], t), mixture(path)(x_t[:, 1:], t)
        return Prediction(*(torch.cat([getattr(one, k), getattr(two, k)], 1) for k in ("x_0", "eps", "velocity")))

    return denoise


def seeded(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def times(name, steps):
    """The times at which an objective would sample this path."""
    if name.startswith("ddpm_"):
        return DDPM(name.removeprefix("ddpm_"), "v").timesteps(steps)
    return FlowMatching(name).timesteps(steps)


def fine(sampler):
    """Options for a small error: the default last step, without noise from t = 0.04, is too coarse for this test."""
    return {"last_step_size": 0.01} if "last_step_size" in inspect.signature(SAMPLERS[sampler]).parameters else {}


def exact(path, t, x):
    """Where the probability-flow ODE of the Gaussian takes x from t to 0: it keeps the quantile."""
    alpha, sigma, _, _ = path.at(t, x)
    return MEAN + STD * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2).sqrt()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", PATHS)
def test_a_gaussian_and_a_mixture_are_recovered(name, sampler):
    path, ts, noise = PATHS[name], times(name, 500), seeded()
    # from the true marginal: pure noise is not it where a schedule keeps signal at t = 1 (Lin et al. 2023)
    z = noise(torch.empty(4000, 2, dtype=torch.float64))
    first = MEAN + STD * z[:, 0]
    second = torch.where(torch.arange(4000) < 1200, MEANS[0] + STDS[0] * z[:, 1], MEANS[1] + STDS[1] * z[:, 1])
    x_1 = path.q_sample(torch.stack([first, second], 1), noise(z), ts[0])
    x_0 = SAMPLERS[sampler](both(path), x_1, ts, path, noise=noise, **fine(sampler))
    mean, std = x_0.mean(0), x_0.std(0)
    assert mean[0].item() == pytest.approx(MEAN, abs=0.02)
    assert std[0].item() == pytest.approx(STD, rel=0.03)
    low = x_0[:, 1] < 0
    parts = WEIGHTS * (1 - 2 * torch.special.ndtr(-MEANS.abs() / STDS))  # all but the tails that cross 0
    assert low.double().mean().item() == pytest.approx(parts[0].item() + 0.0009, abs=0.015)
    assert mean[1].item() == pytest.approx((WEIGHTS * MEANS).sum().item(), abs=0.03)
    variance = (WEIGHTS * (STDS**2 + MEANS**2)).sum() - (WEIGHTS * MEANS).sum() ** 2
    assert std[1].item() == pytest.approx(variance.sqrt().item(), rel=0.02)


ORDERS = {"ddim": 1, "euler": 1, "heun": 2, "dpmpp_2m": 2}


@pytest.mark.parametrize("name", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("sampler", ORDERS)
def test_the_error_falls_at_the_order_that_theory_gives(name, sampler):
    path = PATHS[name]
    x_1 = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    errors = []
    for steps in (50, 100, 200, 400):
        ts = torch.linspace(0.95, 0.05, steps + 1, dtype=torch.float64)
        x = SAMPLERS[sampler](gaussian(path), x_1, ts, path)
        errors.append((exact(path, ts[-1], x) - exact(path, ts[0], x_1)).abs().max().item())
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    print(name, sampler, [f"{s:.3f}" for s in slopes])
    assert slopes[-1] == pytest.approx(ORDERS[sampler], abs=0.15)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_steps_stay_finite_in_the_dtype_of_x(name, sampler, dtype):
    for steps in (2, 3, 10):
        x_1 = seeded()(torch.empty(7, 1, dtype=dtype))
        x_0 = SAMPLERS[sampler](gaussian(PATHS[name]), x_1, times(name, steps), PATHS[name], noise=seeded(1))
        assert x_0.dtype == dtype and x_0.shape == x_1.shape and torch.isfinite(x_0).all()
        assert x_0.abs().max() < 10


@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun", "dopri5"])
@pytest.mark.parametrize("name", PATHS)
def test_ascending_times_lead_back_to_the_noise(name, sampler):
    path, ts = PATHS[name], times(name, 500)
    options = {"rtol": 1e-5, "atol": 1e-8} if sampler == "dopri5" else {}
    close = {"atol": 0.05 if ORDERS.get(sampler) == 1 else 0.02, "rtol": 0}
    x_1 = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    x_0 = SAMPLERS[sampler](gaussian(path), x_1, ts, path, **options)
    torch.testing.assert_close(exact(path, ts[-1], x_0), exact(path, ts[0], x_1), **close)
    torch.testing.assert_close(SAMPLERS[sampler](gaussian(path), x_0, ts.flip(0), path, **options), x_1, **close)


def test_ddim_with_eta_1_is_ddpm_with_the_small_variance():
    path, ts, x_1 = PATHS["ddpm_linear"], times("ddpm_linear", 20), seeded()(torch.empty(50, 1, dtype=torch.float64))
    one = SAMPLERS["ddim"](mixture(path), x_1, ts, path, noise=seeded(1), eta=1.0)
    two = SAMPLERS["ddpm"](mixture(path), x_1, ts, path, noise=seeded(1))
    torch.testing.assert_close(one, two)


def test_the_sde_solver_starts_as_ddpm():
    path, x_1 = PATHS["vp"], seeded()(torch.empty(50, 1, dtype=torch.float64))
    ts = torch.tensor([0.9, 0.6], dtype=torch.float64)
    one = SAMPLERS["dpmpp_2m_sde"](mixture(path), x_1, ts, path, noise=seeded(1))
    torch.testing.assert_close(one, SAMPLERS["ddpm"](mixture(path), x_1, ts, path, noise=seeded(1)))


@pytest.mark.parametrize("form", DIFFUSION_FORMS)
@pytest.mark.parametrize("name", PATHS)
def test_the_sde_forms_are_finite_from_end_to_end(name, form):
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    w = DIFFUSION_FORMS[form](PATHS[name], t, 1.5)
    assert torch.isfinite(w).all() and (w >= 0).all()


@pytest.mark.parametrize("form", DIFFUSION_FORMS)
@pytest.mark.parametrize("sampler", ["sde_euler", "sde_heun"])
@pytest.mark.parametrize("last_step", ["mean", "tweedie", "euler", "none"])
def test_every_sde_recovers_the_gaussian(form, sampler, last_step):
    path, noise = PATHS["linear"], seeded()
    x_1 = noise(torch.empty(4000, 1, dtype=torch.float64))
    options = {"form": form, "last_step": last_step, "last_step_size": 0.02, "norm": 0.7}
    x_0 = SAMPLERS[sampler](gaussian(path), x_1, times("linear", 250), path, noise=noise, **options)
    assert x_0.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x_0.std().item() == pytest.approx(STD, rel=0.03)


def test_ddim_refuses_more_noise_than_there_is():
    with pytest.raises(ValueError, match=r"eta=1.5.*\[0, 1\]"):
        SAMPLERS["ddim"](gaussian(PATHS["vp"]), torch.zeros(1, 1), times("vp", 5), PATHS["vp"], eta=1.5)


def test_an_unknown_sde_option_fails_with_the_known_ones():
    path, x_1 = PATHS["linear"], torch.zeros(1, 1)
    for options, message in (
        ({"form": "sgma"}, "form='sgma'.*did you mean 'sigma'"),
        ({"last_step": "median"}, "last_step='median'.*tweedie"),
        ({"last_step_size": 1.5}, "last_step_size=1.5.*0.04"),
    ):
        with pytest.raises(ValueError, match=message):
            SAMPLERS["sde_euler"](gaussian(path), x_1, times("linear", 5), path, **options)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_step_can_be_watched(sampler):
    path, seen = PATHS["linear"], []
    denoise = watched(gaussian(path), lambda t, x_t, prediction: seen.append((t, x_t, prediction.x_0)))
    x_1 = seeded()(torch.empty(3, 1, dtype=torch.float64))
    plain = SAMPLERS[sampler](gaussian(path), x_1, times("linear", 8), path, noise=seeded(1))
    assert torch.equal(SAMPLERS[sampler](denoise, x_1, times("linear", 8), path, noise=seeded(1)), plain)
    assert len(seen) >= 8 and seen[0][0] == 1.0 and torch.equal(seen[0][1], x_1) or sampler == "sde_heun"
    assert all(x_0.shape == x_1.shape for _, _, x_0 in seen)
