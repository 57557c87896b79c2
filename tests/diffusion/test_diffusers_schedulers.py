"""Samplers agree with diffusers' schedulers at every step, given the same noise."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from fastdit.diffusion.guidance import guided, watched
from fastdit.diffusion.objectives import DDPM, FlowMatching
from fastdit.diffusion.paths import PATHS
from fastdit.diffusion.samplers import SAMPLERS

BETAS = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "zero_terminal_snr": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "rescale_betas_zero_snr": True,
    },
}
THEIRS = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}
X_1 = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def network(channels):
    """Smooth in x and t; 2C channels where the variance is learned."""

    def model(x, time, y=None):
        out = torch.sin(x + time.view(-1, 1, 1, 1) / 300)
        return torch.cat([out, torch.tanh(2 * x)], 1) if channels == 2 * x.shape[1] else out

    return model


def steps_of(sampler, objective, ts, **options):
    """x after each of our steps, drawing from one seeded generator."""
    generator, seen = torch.Generator().manual_seed(1), []
    denoise = guided(objective, network(objective.out_channels(3)), None)
    denoise = watched(denoise, lambda t, x_t, prediction: seen.append(x_t))
    noise = lambda x: torch.randn(x.shape, generator=generator)  # noqa: E731
    x_0 = SAMPLERS[sampler](denoise, X_1, ts, objective.path, noise=noise, **options)
    return [*seen[1:], x_0]


def steps_of_theirs(scheduler, objective, **options):
    """x after each of the scheduler's steps, drawing from a generator of the same seed."""
    generator, x, seen = torch.Generator().manual_seed(1), X_1, []
    model = network(objective.out_channels(3))
    for t in scheduler.timesteps:
        out = model(x, t.expand(len(x)).float())
        x = scheduler.step(out, t, x, generator=generator, **options).prev_sample
        seen.append(x)
    return seen


def assert_equal_steps(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


def plain(schedule, prediction, variance="fixed_small"):
    return DDPM(schedule, prediction, variance, "mse_vlb" if variance == "learned_range" else "mse")


@pytest.mark.parametrize("schedule", BETAS)
def test_schedules_have_the_same_tables(schedule):
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    theirs = DDPMScheduler(**BETAS[schedule]).alphas_cumprod.double()
    torch.testing.assert_close(PATHS[f"ddpm_{schedule}"].alpha(t) ** 2, theirs, atol=1e-6, rtol=2e-5)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize(("schedule", "prediction"), [("linear", "eps"), ("scaled_linear", "v"), ("cosine", "x_0")])
def test_ddpm(schedule, prediction, variance):
    objective = plain(schedule, prediction, variance)
    scheduler = DDPMScheduler(
        **BETAS[schedule], prediction_type=THEIRS[prediction], variance_type=variance, clip_sample=False
    )
    scheduler.set_timesteps(50)
    ours = steps_of("ddpm", objective, objective.timesteps("ddim50"))
    assert_equal_steps(ours, steps_of_theirs(scheduler, objective))


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize(("schedule", "prediction"), [("linear", "eps"), ("zero_terminal_snr", "v")])
def test_ddim(schedule, prediction, eta):
    objective = plain(schedule, prediction)
    scheduler = DDIMScheduler(**BETAS[schedule], prediction_type=THEIRS[prediction], clip_sample=False)
    scheduler.set_timesteps(50)
    ours = steps_of("ddim", objective, objective.timesteps("ddim50"), eta=eta)
    assert_equal_steps(ours, steps_of_theirs(scheduler, objective, eta=eta))


@pytest.mark.parametrize(("sampler", "algorithm"), [("dpmpp_2m", "dpmsolver++"), ("dpmpp_2m_sde", "sde-dpmsolver++")])
@pytest.mark.parametrize(("schedule", "prediction"), [("linear", "eps"), ("scaled_linear", "v")])
@pytest.mark.parametrize("steps", [8, 20])
def test_dpm_solver(schedule, prediction, sampler, algorithm, steps):
    objective = plain(schedule, prediction)
    scheduler = DPMSolverMultistepScheduler(
        **BETAS[schedule], prediction_type=THEIRS[prediction], algorithm_type=algorithm, solver_order=2
    )
    scheduler.set_timesteps(steps)
    ts = torch.cat([(scheduler.timesteps.double() + 1) / 1000, torch.zeros(1, dtype=torch.float64)])
    assert_equal_steps(steps_of(sampler, objective, ts), steps_of_theirs(scheduler, objective))


def test_dpm_solver_on_the_linear_interpolant():
    objective = FlowMatching()
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=1.0)
    scheduler.set_timesteps(20)
    ts, x, theirs = scheduler.sigmas.double(), X_1, []
    for t, sigma in zip(scheduler.timesteps, ts[:-1], strict=True):
        velocity = -network(3)(x, objective.model_time(sigma.expand(len(x))))
        x = scheduler.step(velocity, t, x).prev_sample
        theirs.append(x)
    assert_equal_steps(steps_of("dpmpp_2m", objective, ts), theirs)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_match_euler(shift):
    objective = FlowMatching(shift=shift)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 20, 20).tolist())
    torch.testing.assert_close(objective.timesteps(20), scheduler.sigmas.double(), atol=1e-6, rtol=0)
    x, theirs = X_1, []
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        velocity = -network(3)(x, objective.model_time(sigma.expand(len(x))))
        x = scheduler.step(velocity, t, x).prev_sample
        theirs.append(x)
    assert_equal_steps(steps_of("euler", objective, objective.timesteps(20)), theirs)
