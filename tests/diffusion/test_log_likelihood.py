"""Likelihoods against closed forms."""

import math

import pytest
import torch

from fastdit.diffusion.likelihood import log_likelihood, rademacher, variational_bound
from fastdit.diffusion.objectives import DDPM, FlowMatching
from fastdit.diffusion.prediction import Prediction, target

D = 12
MIX = torch.randn(D, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / math.sqrt(D)
COVARIANCE = MIX @ MIX.T + 0.1 * torch.eye(D, dtype=torch.float64)
MEAN = torch.linspace(-1, 1, D, dtype=torch.float64)


def correlated(path):
    """The exact denoiser of data N(MEAN, COVARIANCE); its Jacobian is not diagonal, so that probes have a variance."""

    def denoise(x_t, t):
        alpha, sigma, d_alpha, d_sigma = path(torch.as_tensor(t, dtype=torch.float64))
        total = alpha**2 * COVARIANCE + sigma**2 * torch.eye(D, dtype=torch.float64)
        excess = torch.linalg.solve(total, (x_t - alpha * MEAN).T).T
        x_0, eps = MEAN + alpha * excess @ COVARIANCE, sigma * excess
        return Prediction(x_0, eps, d_alpha * x_0 + d_sigma * eps)

    return denoise


def probes(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1


@pytest.mark.parametrize("interpolant", ["linear", "gvp", "vp"])
def test_a_gaussian_has_its_likelihood_within_the_error_bar(interpolant):
    objective = FlowMatching(interpolant)
    data = torch.distributions.MultivariateNormal(MEAN, COVARIANCE)
    x_0 = MEAN + torch.randn(64, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64) @ MIX.T
    ts = objective.timesteps(100).flip(0)
    found = log_likelihood(correlated(objective.path), x_0, ts, objective.path, probes=64, probe=probes(2))
    wanted = data.log_prob(x_0)
    if interpolant == "vp":  # its times start at 1e-3, and x_0 is taken for x there
        covariance = COVARIANCE + objective.path.sigma(ts[0]) ** 2 * torch.eye(D)
        wanted = torch.distributions.MultivariateNormal(MEAN, covariance).log_prob(x_0)
    score = (found.nats - wanted) / found.standard_error
    print(interpolant, f"{found.nats.mean():.4f} {wanted.mean():.4f} +- {found.standard_error.mean():.4f}")
    assert found.nats.mean().item() == pytest.approx(wanted.mean().item(), rel=0.01)
    assert score.abs().mean() < 1.2 and score.abs().max() < 4.5 and score.abs().max() > 1  # a bar, and not too wide


def test_an_isotropic_gaussian_has_no_probe_error():
    objective, std = FlowMatching(), 0.5

    def denoise(x_t, t):
        excess = x_t / ((1 - t) ** 2 * std**2 + t**2)
        x_0, eps = (1 - t) * std**2 * excess, t * excess
        return Prediction(x_0, eps, eps - x_0)

    x_0 = std * torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ts = objective.timesteps(400).flip(0)
    found = log_likelihood(denoise, x_0, ts, objective.path, probes=2, probe=probes(0))
    wanted = torch.distributions.Normal(0, std).log_prob(x_0).flatten(1).sum(1)
    torch.testing.assert_close(found.nats, wanted, atol=1e-3, rtol=0)
    assert found.standard_error.max() < 1e-9
    torch.testing.assert_close(found.x_1, x_0 / std, atol=1e-3, rtol=1e-3)
    assert torch.isnan(log_likelihood(denoise, x_0, ts[:3], objective.path).standard_error).all()


def test_probes_are_signs():
    signs = rademacher(torch.zeros(1000))
    assert set(signs.tolist()) == {-1.0, 1.0} and signs.mean().abs() < 0.2


def test_the_bound_of_a_perfect_network_is_its_ends():
    objective = DDPM("cosine", "eps", "fixed_small", "mse")
    x_0 = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).clamp(-1, 1)
    drawn = []

    def noise(x):
        drawn.append(torch.randn(x.shape, generator=torch.Generator().manual_seed(len(drawn)), dtype=x.dtype))
        return drawn[-1]

    bound = variational_bound(objective, lambda x_t, time, y: drawn[-1], x_0, None, noise=noise)
    assert bound["vlb"].shape == (3, 1000) and bound["mse"].max() == 0
    assert bound["vlb"][:, 1:].max() < 1e-9  # each step's mean is the posterior's
    alpha = objective.path.alpha(torch.tensor(1.0, dtype=torch.float64))
    prior = 0.5 * (alpha**2 * x_0**2 + (1 - alpha**2) - 1 - (1 - alpha**2).log()).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(bound["prior"], prior)
    torch.testing.assert_close(bound["total"], bound["prior"] + bound["vlb"][:, 0])


def test_the_bound_exceeds_the_entropy_of_the_data():
    """Gaussian data and its exact denoiser: the bound cannot be below the entropy."""
    objective, std = DDPM("linear", "x_0", "fixed_large", "mse"), 0.3
    x_0 = std * torch.randn(200, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def model(x_t, time, y):
        alpha, sigma, _, _ = objective.path.at((time.double() + 1) / 1000, x_t)
        return alpha * std**2 / (alpha**2 * std**2 + sigma**2) * x_t

    generator = torch.Generator().manual_seed(1)
    noise = lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)  # noqa: E731
    total = variational_bound(objective, model, x_0, None, noise=noise)["total"].mean().item()
    nats = torch.distributions.Normal(0, std).log_prob(x_0).mean().item()
    entropy = -nats / math.log(2) - math.log2(2 / 255)  # of the same data in bins of 2 / 255
    print(f"bound {total:.4f} bits, entropy {entropy:.4f} bits")
    assert entropy < total < 1.05 * entropy


def test_mistakes_are_named():
    path, x = FlowMatching().path, torch.zeros(1, 1)
    with pytest.raises(ValueError, match="method='rk4'.*euler or heun"):
        log_likelihood(None, x, torch.tensor([0.0, 1.0]), path, method="rk4")
    with pytest.raises(ValueError, match="ascending"):
        log_likelihood(None, x, torch.tensor([1.0, 0.0]), path)
    with pytest.raises(ValueError, match="objective=FlowMatching.*log_likelihood"):
        variational_bound(FlowMatching(), None, x, None)
    assert target("eps", x, x, torch.tensor(0.5), path) is x
