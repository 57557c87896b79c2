"""Properties of every entry of OBJECTIVES, new ones included: the network that minimizes the loss predicts the data."""

import dataclasses
import functools
import typing

import pytest
import torch

from fastdit.diffusion.objectives import OBJECTIVES, OF_LOSS, OF_SAMPLES, compiled
from fastdit.registry import Choice, build

MEAN, STD = 0.6, 0.4
CASES = [(name, {}) for name in OBJECTIVES]
CASES += [("ddpm", {"prediction": p}) for p in ("x_0", "v")] + [("flow", {"prediction": p}) for p in ("eps", "x_0")]
CASES += [("flow", {"prediction": "score", "weight": w}) for w in ("none", "velocity", "likelihood")]
CASES += [("ddpm", {"variance": "fixed_small", "loss_type": "kl"}), ("ddpm", {"min_snr_gamma": 5.0})]
every_objective = pytest.mark.parametrize("name, options", CASES)


def normal_grid(n: int = 61) -> torch.Tensor:
    """n quantiles of a standard normal, of mean 0 and deviation 1 exactly."""
    z = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    return z / z.square().mean().sqrt()


class Affine:
    """A network with two parameters, out = a x + b at any time; further channels are zero."""

    null_label = None

    def __init__(self, objective, a: float = 0.3, b: float = 0.1):
        self.weights = torch.tensor([a, b], dtype=torch.float64, requires_grad=True)
        self.idle = objective.out_channels(1) - 1

    def __call__(self, x, t, y):
        a, b = self.weights
        return torch.cat([a * x + b, *[torch.zeros_like(x)] * self.idle], dim=1)


@every_objective
def test_its_best_network_predicts_the_posterior_mean(name, options):
    objective = build(OBJECTIVES, Choice(name, options), "objective")
    z, eps = (g.reshape(-1, 1, 1, 1) for g in torch.meshgrid(normal_grid(), normal_grid(), indexing="ij"))
    x_0 = MEAN + STD * z  # (N, 1, 1, 1), every value with every noise
    for u in (0.05, 0.4, 0.8):
        t = objective.sample_t(torch.full((len(z),), u, dtype=torch.float64))
        model = Affine(objective)
        optimizer = torch.optim.LBFGS([model.weights], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15,
                                      line_search_fn="strong_wolfe")  # fmt: skip

        def closure(t=t, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = objective.loss(model, x_0, None, t, eps).per_sample
            assert loss.shape == (len(z),)
            loss.mean().backward()
            return loss.mean()

        optimizer.step(closure)
        alpha, sigma, _, _ = objective.path(t[:1])
        x_t = alpha * MEAN + (alpha**2 * STD**2 + sigma**2).sqrt() * torch.tensor([-1.5, 0.0, 0.7]).view(3, 1, 1, 1)
        found = objective.predict(model, x_t, t[0], None).x_0
        expected = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x_t - alpha * MEAN)
        torch.testing.assert_close(found, expected, atol=5e-3, rtol=0)


@every_objective
def test_its_prediction_agrees_with_itself(name, options):
    objective = build(OBJECTIVES, Choice(name, options), "objective")
    x_t = torch.randn(5, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = objective.sample_t(torch.linspace(0.1, 0.9, 5, dtype=torch.float64))
    prediction = objective.predict(Affine(objective), x_t, t, None)
    alpha, sigma, d_alpha, d_sigma = objective.path.at(t, x_t)
    torch.testing.assert_close(alpha * prediction.x_0 + sigma * prediction.eps, x_t)
    torch.testing.assert_close(d_alpha * prediction.x_0 + d_sigma * prediction.eps, prediction.velocity)


@every_objective
def test_its_times_are_in_range_and_it_draws_no_random_numbers(name, options):
    objective = build(OBJECTIVES, Choice(name, options), "objective")
    state = torch.get_rng_state()
    t = objective.sample_t(torch.linspace(0, 1 - 1e-7, 50))
    assert t.dtype == torch.float64 and (t.diff() >= 0).all() and t[0] >= 0 and t[-1] <= 1 and t[-1] - t[0] > 0.5
    assert objective.model_time(t).dtype == torch.float32 and objective.model_time(t).shape == (50,)
    for steps in (7, "20"):
        ts = objective.timesteps(steps)
        assert ts.dtype == torch.float64 and len(ts) == int(steps) + 1 and (ts.diff() < 0).all() and ts[-1] >= 0
    x = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    whole = objective.loss(Affine(objective), x, None, t[10:14], x.flip(0)).per_sample
    one = objective.loss(Affine(objective), x[2:3], None, t[12:13], x.flip(0)[2:3]).per_sample
    torch.testing.assert_close(whole[2:3], one)  # a sample's loss is its own
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_yaml_section_can_describe_it(name):
    fields = dataclasses.fields(OBJECTIVES[name])
    hints = typing.get_type_hints(OBJECTIVES[name])
    assert all(f.default is not dataclasses.MISSING for f in fields) and OBJECTIVES[name].__dataclass_params__.frozen
    plain = {int, float, str, bool, type(None)}
    for hint in (hints[f.name] for f in fields):
        named = typing.get_origin(hint) is typing.Literal and all(isinstance(v, str) for v in typing.get_args(hint))
        assert named or set(typing.get_args(hint) or (hint,)) <= plain


OTHERS = {"variance": "fixed_small", "loss_type": "kl", "prediction": "x_0", "interpolant": "gvp", "schedule": "cosine",
          "weight": "velocity", "time_distribution": "logit_normal", "coupling": "ot", "time_mean": 0.5,
          "cosine_weight": 0.5, "class_token_weight": 0.5}  # fmt: skip
BESIDE = {"variance": {"loss_type": "kl"}, "weight": {"prediction": "x_0"},
          "min_snr_gamma": {"variance": "fixed_small", "loss_type": "mse"},
          "time_mean": {"time_distribution": "logit_normal"}, "time_scale": {"time_distribution": "logit_normal"},
          "train_eps": {"prediction": "eps"}, "sample_eps": {"prediction": "eps"}}  # fmt: skip


@pytest.mark.parametrize("name, option", [(n, f.name) for n, o in OBJECTIVES.items() for f in dataclasses.fields(o)])
def test_an_option_changes_what_it_is_said_to_change(name, option):
    beside, other = BESIDE.get(option, {}), OTHERS.get(option, 0.3)
    x_0, noise = torch.randn(2, 6, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    samples, losses = [], []
    for options in (beside, {**beside, option: other}):
        objective = build(OBJECTIVES, Choice(name, options), "objective")
        model = lambda x, t, y, o=objective: x.repeat(1, 2, 1, 1)[:, : o.out_channels(2)] / 2  # noqa: E731
        found, t = objective.predict(model, x_0, torch.tensor([0.4] * 6), None), torch.linspace(0.1, 0.9, 6)
        mix = 0.0 if found.log_variance_mix is None else found.log_variance_mix
        samples.append([objective.timesteps(4), found.x_0, torch.zeros_like(x_0) + mix])
        losses.append(objective.loss(model, x_0, None, objective.sample_t(t), noise).per_sample)
    same_samples, same_losses = all(map(torch.equal, *samples)), torch.equal(*losses)
    assert same_samples >= (option in (*OF_LOSS, "loss_type")) and same_losses >= (option in OF_SAMPLES)
    if name in ("ddpm", "flow"):  # whose options are all listed
        assert same_samples == (option in (*OF_LOSS, "loss_type"))
        assert same_losses == (option in (*OF_SAMPLES, "class_token_weight", "coupling"))  # entangled.py, coupling.py


@every_objective
def test_a_loss_compiles_to_one_graph_that_copies_no_table(name, options, monkeypatch):
    """On a GPU the loss is fused; a graph break, or a table copied to the device, would cost time in every step."""
    torch._dynamo.reset()  # many objectives are compiled in one process here
    objective = build(OBJECTIVES, Choice(name, options), "objective")
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
        fused = compiled(objective)
    x_0, noise = torch.randn(2, 5, 1, 2, 2, dtype=torch.float64).unbind()
    t = objective.sample_t(torch.linspace(0, 0.99, 5))
    model = Affine(objective)
    ours, wanted = (o.loss(model, x_0, None, t, noise) for o in (fused, objective))
    assert torch.equal(ours.per_sample, wanted.per_sample) and ours.parts.keys() == wanted.parts.keys()
    assert len(graphs) == 1
    devices = [node for node in graphs[0].graph.nodes if any(isinstance(a, torch.device) for a in node.args)]
    assert not devices


def test_a_compiled_loss_has_the_same_values_and_gradients():
    torch._dynamo.reset()
    objective = OBJECTIVES["ddpm"]()
    # float64: the first step's likelihood is a difference of two tails, of which fp32 keeps few digits in any order
    x_0, noise = torch.randn(2, 6, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    t = objective.sample_t(torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 0.99]))
    results = []
    for form in (objective, compiled(objective)):
        output = torch.linspace(-1, 1, 6 * 8 * 64, dtype=torch.float64).view(6, 8, 8, 8).requires_grad_()
        loss = form.loss(lambda x_t, time, y, output=output: output, x_0, None, t, noise).per_sample
        results.append((loss, torch.autograd.grad(loss.sum(), output)[0]))
    for ours, wanted in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-8, atol=1e-12)
