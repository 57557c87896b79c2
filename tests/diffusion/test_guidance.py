"""Guidance and the other denoiser wrappers, against what the official DiT recorded and against their definitions."""

import pytest
import torch

from fastdit.diffusion.guidance import clip, dynamic_threshold, guided, processed, watched
from fastdit.diffusion.objectives import DDPM, FlowMatching
from fastdit.diffusion.samplers import SAMPLERS
from helpers.checkpoints import golden, golden_dit

FORMS = ("x_0", "eps", "velocity")


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Affine:
    """A network in closed form: x plus its label, times a gain; labels from 10 up are null."""

    null_label = 10

    def __init__(self, gain=1.0, channels=4):
        self.gain, self.channels, self.batches = gain, channels, []

    def __call__(self, x_t, time, y):
        self.batches.append(len(x_t))
        out = self.gain * torch.tanh(x_t) + 0.1 * y.view(-1, 1, 1, 1) + time.view(-1, 1, 1, 1).to(x_t) / 1000
        return out if self.channels == x_t.shape[1] else torch.cat([out, -out], 1)


X_T, Y = draws(3, 4, 5, 5), torch.tensor([1, 2, 3])
T = torch.tensor(0.6, dtype=torch.float64)


def test_guidance_equals_the_official_forward_with_cfg():
    z, model = golden("dit"), golden_dit()
    x, index, y = z["cfg_x"], z["cfg_t"], z["cfg_y"]
    n = len(x) // 2  # the second half repeats the first under the null label
    out = z["cfg_out"][:n]
    assert (y[n:] == model.null_label).all()
    for i in range(n):  # the recorded times differ within the batch
        one = slice(i, i + 1)
        denoise = guided(DDPM(), model, y[one], float(z["cfg_scale"]), cfg_channels=3)
        with torch.no_grad():
            seen = denoise(x[one], (index[i].double() + 1) / 1000)
        torch.testing.assert_close(seen.eps, out[one, :4], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(2 * seen.log_variance_mix - 1, out[one, 4:], atol=1e-5, rtol=1e-5)


OBJECTIVES = [DDPM("cosine", "v", "fixed_small", "mse"), FlowMatching(), FlowMatching("vp", "eps")]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_guidance_extrapolates_every_form_from_null_to_label(objective):
    model = Affine()
    strong, weak = (guided(objective, model, y)(X_T, T) for y in (Y, torch.full_like(Y, 10)))
    for channels in (None, 3):
        seen = guided(objective, model, Y, 4.0, channels)(X_T, T)
        for form in FORMS:
            a, b = getattr(strong, form), getattr(weak, form)
            wanted = b + 4 * (a - b)
            if channels:
                wanted[:, channels:] = a[:, channels:]
            torch.testing.assert_close(getattr(seen, form), wanted)


def test_scale_1_and_times_outside_the_interval_cost_one_evaluation():
    model = Affine()
    plain = guided(FlowMatching(), model, Y)(X_T, T)
    denoise = guided(FlowMatching(), model, Y, 4.0, cfg_interval=(0.1, 0.5))
    for form in FORMS:
        assert torch.equal(getattr(denoise(X_T, T), form), getattr(plain, form))
    assert model.batches == [3, 3, 3, 3]
    denoise(X_T, torch.tensor(0.5))
    assert model.batches[-1] == 6


def test_autoguidance_extrapolates_from_the_weak_model():
    strong, weak = Affine(), Affine(gain=0.5)
    strong.null_label = None  # not needed
    seen = guided(FlowMatching(), strong, Y, 2.0, weak_model=weak)(X_T, T)
    a, b = guided(FlowMatching(), strong, Y)(X_T, T), guided(FlowMatching(), weak, Y)(X_T, T)
    torch.testing.assert_close(seen.velocity, 2 * a.velocity - b.velocity)


def test_rescaled_guidance_restores_the_deviation_of_x_0():
    objective, model = FlowMatching("gvp"), Affine()
    plain, wide = guided(objective, model, Y)(X_T, T), guided(objective, model, Y, 6.0)(X_T, T)
    deviation = lambda p: p.x_0.flatten(1).std(1)  # noqa: E731
    full = guided(objective, model, Y, 6.0, cfg_rescale=1.0)(X_T, T)
    torch.testing.assert_close(deviation(full), deviation(plain))
    half = guided(objective, model, Y, 6.0, cfg_rescale=0.5)(X_T, T)
    torch.testing.assert_close(half.x_0, (full.x_0 + wide.x_0) / 2)
    torch.testing.assert_close(objective.path.q_sample(half.x_0, half.eps, T), X_T)


def test_guidance_without_a_null_label_fails_with_the_remedy():
    model = Affine()
    model.null_label = None
    with pytest.raises(ValueError, match="cfg_scale=4.0.*label dropout.*use 1.0"):
        guided(FlowMatching(), model, Y, 4.0)
    guided(FlowMatching(), lambda x, time, y: x, None)(X_T, T)  # unconditional: no labels at all


def test_clip_and_thresholds_act_on_x_0_and_the_rest_follows():
    path, denoise = FlowMatching().path, guided(FlowMatching(), Affine(gain=5.0), Y)
    assert denoise(X_T, T).x_0.abs().max() > 2
    seen = processed(denoise, path, clip)(X_T, T)
    assert seen.x_0.abs().max() == 1
    torch.testing.assert_close(path.q_sample(seen.x_0, seen.eps, T), X_T)
    torch.testing.assert_close(seen.velocity, seen.eps - seen.x_0)
    # half of the values beyond the median: clipped there, and scaled to 1
    x_0 = torch.linspace(-4, 4, 101, dtype=torch.float64).view(1, 1, 101, 1)
    wanted = (x_0 / 2).clamp(-1, 1)
    torch.testing.assert_close(dynamic_threshold(x_0, quantile=0.5), wanted, atol=0.03, rtol=0)
    assert torch.equal(dynamic_threshold(x_0 / 10), x_0 / 10)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("objective", [DDPM(), FlowMatching("vp", "eps"), FlowMatching()])
@pytest.mark.parametrize("device", ["cpu", *["cuda"] * torch.cuda.is_available()])
def test_every_wrapper_serves_every_sampler(sampler, objective, device):
    def run(noise_seed=7):
        generator, seen = torch.Generator().manual_seed(noise_seed), []
        model = Affine(channels=objective.out_channels(4))
        denoise = guided(objective, model, Y.to(device), 2.0, 3, cfg_interval=(0.2, 0.9), cfg_rescale=0.3)
        denoise = watched(processed(denoise, objective.path, clip), lambda *step: seen.append(step))
        noise = lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype).to(device)  # noqa: E731
        return SAMPLERS[sampler](denoise, X_T.to(device), objective.timesteps(12), objective.path, noise=noise), seen

    (x_0, seen), (again, _) = run(), run()
    assert torch.isfinite(x_0).all() and torch.equal(x_0, again)
    assert all(prediction.x_0.abs().max() <= 1 for _, _, prediction in seen)
