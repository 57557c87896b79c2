"""Paths, predictions, objectives, times and couplings: identities that hold for every entry of their registries."""

import itertools
import math

import pytest
import torch

from fastdit.diffusion.coupling import optimal_transport, paired
from fastdit.diffusion.objectives import DDPM, FlowMatching, per_sample_mean
from fastdit.diffusion.paths import PATHS
from fastdit.diffusion.prediction import PREDICTIONS, predicted, target
from fastdit.diffusion.timesteps import TIME_DISTRIBUTIONS, LossAwareTimes, respaced

INSIDE = torch.linspace(0.0137, 0.9871, 23, dtype=torch.float64)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(n=23):
    return draws(n, 2, 3, 3, seed=1), draws(n, 2, 3, 3, seed=2)


# Paths


@pytest.mark.parametrize("name", PATHS)
def test_derivatives_agree_with_autograd(name):
    path, t = PATHS[name], INSIDE.clone().requires_grad_()
    for value, slope in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        (gradient,) = torch.autograd.grad(value(t).sum(), t)
        torch.testing.assert_close(slope(t).detach(), gradient, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", PATHS)
def test_a_path_leads_from_data_to_noise(name):
    path = PATHS[name]
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    alpha, sigma = path.alpha(t), path.sigma(t)
    assert alpha[0] == 1 and sigma[0] == 0
    assert (alpha.diff() < 0).all() and (sigma.diff() > 0).all()
    assert alpha[-1] < 0.07 and sigma[-1] > 0.997
    assert path.alpha(t.float()).dtype == torch.float32
    torch.testing.assert_close(path.alpha(t.float()).double(), alpha, atol=1e-6, rtol=0)


def test_zero_terminal_snr_keeps_no_signal_and_its_start():
    last, first = torch.tensor([1.0, 0.001], dtype=torch.float64)
    assert PATHS["ddpm_zero_terminal_snr"].alpha(last) == 0
    start = PATHS["ddpm_scaled_linear"].alpha(first)
    torch.testing.assert_close(PATHS["ddpm_zero_terminal_snr"].alpha(first), start, atol=1e-15, rtol=0)


@pytest.mark.parametrize("name", PATHS)
def test_the_posterior_is_bayes_rule(name):
    """x_s given x_0 and x_t given x_s are normal, so x_s given both follows from the formula for two variables."""
    path, s, t = PATHS[name], INSIDE[:-1], INSIDE[1:]
    ratio = path.alpha(t) / path.alpha(s)
    prior, noise = path.sigma(s) ** 2, path.sigma(t) ** 2 - (ratio * path.sigma(s)) ** 2
    gain = ratio * prior / (ratio**2 * prior + noise)
    from_x_t, from_x_0, variance, beta = path.posterior(t, s)
    torch.testing.assert_close(from_x_t, gain)
    torch.testing.assert_close(from_x_0, path.alpha(s) * (1 - gain * ratio))
    torch.testing.assert_close(variance, prior * (1 - gain * ratio))
    torch.testing.assert_close(beta, noise)


# Predictions


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", PREDICTIONS)
def test_each_form_of_a_prediction_gives_back_all_others(path, name):
    x_0, eps = batch()
    path = PATHS[path]
    x_t = path.q_sample(x_0, eps, INSIDE)
    seen = predicted(name, target(name, x_0, eps, INSIDE, path), x_t, INSIDE, path)
    torch.testing.assert_close(seen.x_0, x_0, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(seen.eps, eps, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(seen.velocity, target("velocity", x_0, eps, INSIDE, path), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_the_velocity_is_the_derivative_of_x_t(path):
    x_0, eps = batch(1)
    t = torch.tensor(0.37, dtype=torch.float64)
    _, slope = torch.func.jvp(lambda t: PATHS[path].q_sample(x_0, eps, t), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(target("velocity", x_0, eps, t, PATHS[path]), slope)


# Losses

FLOWS = list(itertools.product(("linear", "gvp", "vp"), ("eps", "score", "x_0")))


def oracle(objective, x_0, eps, t, error=0.0):
    """A network whose output differs from the target by `error`, with the time and sign that it uses."""
    sign = -1 if objective.prediction == "velocity" else 1
    return lambda x_t, time, y: sign * (target(objective.prediction, x_0, eps, t, objective.path) + error)


@pytest.mark.parametrize(("interpolant", "prediction"), FLOWS)
def test_the_velocity_weight_turns_any_loss_into_the_velocity_loss(interpolant, prediction):
    objective = FlowMatching(interpolant, prediction, weight="velocity")
    x_0, eps = batch()
    model = oracle(objective, x_0, eps, INSIDE, error=draws(*x_0.shape, seed=3))
    x_t = objective.path.q_sample(x_0, eps, INSIDE)
    velocity = objective.predict(model, x_t, INSIDE, None).velocity
    wanted = per_sample_mean((velocity - target("velocity", x_0, eps, INSIDE, objective.path)) ** 2)
    torch.testing.assert_close(objective.loss(model, x_0, None, INSIDE, eps).per_sample, wanted, rtol=1e-6, atol=1e-9)


PLAIN = [FlowMatching(), FlowMatching("vp", "score"), DDPM("cosine", "v", "fixed_small", "mse")]


@pytest.mark.parametrize("objective", PLAIN)
def test_a_perfect_network_has_no_loss_and_predicts_the_data(objective):
    x_0, eps = batch()
    t = objective.sample_t(INSIDE)
    model = oracle(objective, x_0, eps, t)
    assert objective.loss(model, x_0, None, t, eps).per_sample.max() < 1e-20
    x_t = objective.path.q_sample(x_0, eps, t)
    torch.testing.assert_close(objective.predict(model, x_t, t, None).x_0, x_0)


def test_the_bound_trains_the_variance_alone():
    x_0, eps = batch(4)
    t = torch.tensor([0.001, 0.002, 0.5, 1.0], dtype=torch.float64)
    output = draws(4, 4, 3, 3).requires_grad_()

    def gradient(objective, part):
        return torch.autograd.grad(objective.loss(lambda *_: output, x_0, None, t, eps).parts[part].sum(), output)[0]

    vlb = gradient(DDPM(), "vlb")
    assert vlb[:, :2].abs().max() == 0 and vlb[:, 2:].abs().min() > 0
    assert gradient(DDPM(loss_type="kl"), "vlb")[:, :2].abs().max() > 0


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_min_snr_caps_the_weight_of_an_x_0_error(prediction):
    objective = DDPM("cosine", prediction, "fixed_small", "mse", min_snr_gamma=5.0)
    x_0, eps = batch()
    t = objective.sample_t(INSIDE)
    model = oracle(objective, x_0, eps, t, error=draws(*x_0.shape, seed=3))
    x_t = objective.path.q_sample(x_0, eps, t)
    snr = (objective.path.alpha(t) / objective.path.sigma(t)) ** 2
    wanted = snr.clamp(max=5.0) * per_sample_mean((objective.predict(model, x_t, t, None).x_0 - x_0) ** 2)
    torch.testing.assert_close(objective.loss(model, x_0, None, t, eps).per_sample, wanted)


def test_the_cosine_loss_measures_the_angle():
    x_0, eps = batch(3)
    t = INSIDE[:3]
    objective = FlowMatching(cosine_weight=2.0)
    velocity = eps - x_0
    quarter = torch.stack([-velocity[:, 1], velocity[:, 0]], 1)  # at right angles in the plane of the two channels
    for said, angle in ((3 * velocity, 0.0), (quarter, 1.0), (-velocity, 2.0)):
        loss = objective.loss(lambda *_, said=said: -said, x_0, None, t, eps)
        torch.testing.assert_close(loss.parts["cosine"], torch.full((3,), angle, dtype=torch.float64))
        torch.testing.assert_close(loss.per_sample, loss.parts["mse"] + 2 * angle)


def test_the_cosine_loss_has_a_bounded_gradient_at_a_zero_output():
    """Without the bound the first gradient is 5e7, which stays in Adam's second moment for a thousand steps."""
    x_0, eps = batch(3)
    output = torch.zeros_like(x_0, requires_grad=True)
    FlowMatching(cosine_weight=1.0).loss(lambda *_: output, x_0, None, INSIDE[:3], eps).per_sample.sum().backward()
    assert output.grad.norm() < 10


def test_flow_matching_ignores_the_variance_half_of_the_head():
    x_0, eps = batch(3)
    output = draws(3, 4, 3, 3)
    full, half = (
        FlowMatching().loss(lambda *_, c=c: output[:, :c], x_0, None, INSIDE[:3], eps).per_sample for c in (4, 2)
    )
    assert torch.equal(full, half)


def test_the_model_sees_the_time_of_the_released_checkpoints():
    index = torch.tensor([0, 1, 499, 999])
    assert torch.equal(DDPM().model_time((index + 1).double() / 1000), index.float())
    assert torch.equal(FlowMatching().model_time(torch.tensor([0.0, 0.25, 1.0])), torch.tensor([1.0, 0.75, 0.0]))
    assert DDPM().out_channels(4) == 8 and FlowMatching().out_channels(4) == 4


# Times


@pytest.mark.parametrize("name", TIME_DISTRIBUTIONS)
def test_times_grow_with_u_from_0_to_1(name):
    t = FlowMatching(time_distribution=name).sample_t(torch.linspace(0, 1 - 1e-6, 1001))
    assert t[0] == 0 and (t.diff() > 0).all() and 0.99 < t[-1] < 1


def test_time_distributions_have_their_published_densities():
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    logits = FlowMatching(time_distribution="logit_normal", time_mean=0.5, time_scale=0.7).sample_t(u).logit()
    assert logits.mean().item() == pytest.approx(0.5, abs=1e-4)
    assert logits.std().item() == pytest.approx(0.7, abs=1e-3)
    # cosmap: density 2 / (pi - 2 pi t + 2 pi t^2)
    t = FlowMatching(time_distribution="cosmap").sample_t(u)
    slope = 1e-5 / (t[1:] - t[:-1])
    middle = (t[1:] + t[:-1]) / 2
    torch.testing.assert_close(slope, 2 / (math.pi * (1 - 2 * middle + 2 * middle**2)), rtol=1e-4, atol=0)
    # mode: f(u) = 1 - u - s (cos^2(pi u / 2) - 1 + u), here at 1 - u
    t = FlowMatching(time_distribution="mode", time_scale=1.29).sample_t(u)
    torch.testing.assert_close(t, 1 - (1 - u) - 1.29 * (torch.cos(math.pi / 2 * (1 - u)) ** 2 - u))


def test_the_shift_multiplies_the_noise_to_signal_ratio():
    t = FlowMatching(shift=3.0).sample_t(INSIDE)
    torch.testing.assert_close(t / (1 - t), 3 * INSIDE / (1 - INSIDE))
    ts = FlowMatching(shift=3.0, sample_shift=0.5).timesteps(4)[1:-1]
    torch.testing.assert_close(ts / (1 - ts), 0.5 * torch.tensor([3.0, 1.0, 1 / 3], dtype=torch.float64))


@pytest.mark.parametrize("interpolant", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("prediction", ["velocity", "eps", "score", "x_0"])
def test_given_distances_from_the_ends_are_honored(interpolant, prediction):
    objective = FlowMatching(interpolant, prediction, train_eps=0.02, sample_eps=0.05)
    top = 0.0 if interpolant == "vp" else 1.0
    t, ts = objective.sample_t(torch.tensor([0.0, 1.0])), objective.timesteps(10)
    torch.testing.assert_close(t, torch.tensor([0.02, 1 - 0.02 * top], dtype=torch.float64))
    assert ts[-1] == pytest.approx(0.05) and ts[0] == pytest.approx(1 - 0.05 * top)


def test_times_of_a_discrete_schedule():
    objective = DDPM()
    t = objective.sample_t(torch.tensor([0.0, 0.0015, 0.9999999]))
    assert torch.equal(t, torch.tensor([1, 2, 1000]).double() / 1000)
    assert torch.equal(objective.timesteps("ddim4"), torch.tensor([751, 501, 251, 1, 0]).double() / 1000)
    assert objective.timesteps(1000).tolist() == [i / 1000 for i in range(1000, -1, -1)]
    assert respaced("1") == [0] and respaced("2,1", 10) == [0, 4, 5]


def test_loss_aware_times_are_proportional_and_unbiased():
    times = LossAwareTimes(num_timesteps=5, history=2, uniform_share=0.1)
    t = torch.arange(1, 6).double() / 5
    losses = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0])
    times.update(t, 100 * losses)  # to be forgotten: the history keeps two
    assert torch.equal(times.probabilities(), torch.full((5,), 1 / 5, dtype=torch.float64))
    times.update(t, losses)
    times.update(t, losses)
    wanted = 0.9 * losses.double() / 16 + 0.1 / 5
    torch.testing.assert_close(times.probabilities(), wanted)
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    drawn, factor = times.sample(u)
    counts = torch.bincount((drawn * 5).round().long() - 1, minlength=5) / len(u)
    torch.testing.assert_close(counts.double(), wanted, atol=1e-5, rtol=0)
    weighted = (factor * losses.double()[(drawn * 5).round().long() - 1]).mean()
    assert weighted.item() == pytest.approx(losses.mean().item(), rel=1e-4)
    again = LossAwareTimes(num_timesteps=5, history=2, uniform_share=0.1)
    again.load_state_dict(times.state_dict())
    assert torch.equal(again.probabilities(), times.probabilities())


# Couplings


def test_optimal_transport_is_the_best_of_all_permutations():
    x_0, noise = draws(6, 2, 2), draws(6, 2, 2, seed=5)
    assigned = optimal_transport(x_0, noise)
    cost = (x_0 - assigned).square().sum()
    assert cost == pytest.approx(min(
        (x_0 - noise[list(order)]).square().sum().item() for order in itertools.permutations(range(6))
    ))  # fmt: skip
    assert sorted(map(tuple, assigned.flatten(1).tolist())) == sorted(map(tuple, noise.flatten(1).tolist()))


def test_an_objective_names_its_coupling():
    x_0, noise = batch(5)
    assert torch.equal(paired(FlowMatching(coupling="ot"), x_0, noise), optimal_transport(x_0, noise))
    assert not torch.equal(optimal_transport(x_0, noise), noise)
    assert paired(FlowMatching(), x_0, noise) is noise and paired(DDPM(), x_0, noise) is noise


# Mistakes

MISTAKES = [
    (lambda: DDPM(schedule="cosin"), "schedule='cosin'.*did you mean 'cosine'"),
    (lambda: DDPM(prediction="velocity"), "prediction='velocity' is unknown; did you mean 'v'. Known: eps, x_0, v"),
    (lambda: DDPM(variance="learned"), "variance='learned'"),
    (lambda: DDPM(loss_type="mse"), "loss_type='mse'.*learned_range.*use mse_vlb"),
    (lambda: DDPM(variance="fixed_small"), "loss_type='mse_vlb'.*fixed_small.*use mse or kl"),
    (lambda: DDPM(schedule="zero_terminal_snr"), "prediction='eps'.*use prediction=v"),
    (lambda: DDPM(loss_type="kl", min_snr_gamma=5.0), "min_snr_gamma=5.0.*use 0"),
    (lambda: DDPM().timesteps("ddim300"), "steps='ddim300'.*use steps=300"),
    (lambda: DDPM().timesteps("500,600"), "steps='500,600'.*at most 500"),
    (lambda: DDPM().timesteps("many"), "steps='many'.*'ddim50'"),
    (lambda: DDPM().timesteps(0), "steps='0'"),
    (lambda: DDPM().timesteps(1), "steps=1 .*at least 2"),
    (lambda: FlowMatching().timesteps("ddim50"), "steps='ddim50'.*positive count"),
    (lambda: FlowMatching(interpolant="cosine"), "interpolant='cosine'.*linear, gvp, vp"),
    (lambda: FlowMatching(prediction="noise"), "prediction='noise'.*eps"),
    (lambda: FlowMatching(prediction="eps", cosine_weight=1.0), "cosine_weight=1.0.*prediction=velocity"),
    (lambda: FlowMatching(time_distribution="mode", time_scale=2.0), "time_scale=2.0.*1.75"),
    (lambda: FlowMatching(shift=0.0), "shift=0.0.*positive"),
    (lambda: FlowMatching(sample_eps=0.7), "sample_eps=0.7.*0.5"),
    (lambda: FlowMatching(coupling="optimal"), "coupling='optimal'.*ot"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES)
def test_a_wrong_combination_fails_in_one_line_with_the_remedy(mistake, message):
    with pytest.raises(ValueError, match=message) as caught:
        mistake()
    assert "\n" not in str(caught.value)
