"""The losses and measures of an autoencoder against closed forms and independent programs."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d
from torch import nn

from fastdit.autoencoder import perceptual
from fastdit.autoencoder.discriminator import PatchDiscriminator
from fastdit.autoencoder.losses import adaptive_weight, discriminator_loss, generator_loss, kl_loss, reconstruction_loss
from fastdit.autoencoder.perceptual import LPIPS, STAGES, load_efficientnet, load_lpips
from fastdit.autoencoder.quality import psnr, ssim

RECORDED = [0.8217836, 0.8235074]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_reconstruction_and_kl_are_those_of_their_definitions():
    x = torch.randn(3, 3, 5, 7)
    y = x + torch.tensor([0.5, -1.0, 2.0]).view(3, 1, 1, 1)
    assert torch.allclose(reconstruction_loss("l1", y, x), torch.tensor([0.5, 1.0, 2.0]), atol=1e-6)
    assert torch.allclose(reconstruction_loss("l2", y, x), torch.tensor([0.25, 1.0, 4.0]), atol=1e-5)
    mean, logvar = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    exact = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0, 1)).sum((1, 2, 3)) / 108
    assert torch.allclose(kl_loss(mean, logvar, 108), exact, rtol=1e-5)


def test_the_hinge_losses_stop_beyond_their_margins():
    real, fake = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([-3.0, -1.0, 0.5])
    images = [t.view(3, 1, 1, 1).expand(3, 1, 2, 2) for t in (real, fake)]
    assert discriminator_loss(*images).tolist() == [0.0, 0.5, 1.75]
    assert generator_loss(images[1]).tolist() == [3.0, 1.0, -0.5]


def test_the_adaptive_weight_is_the_ratio_of_the_gradients():
    rec, adv = torch.full((3, 4), 2.0), torch.full((3, 4), -0.5)
    assert adaptive_weight(rec, adv).item() == pytest.approx(4.0, rel=1e-5)
    assert adaptive_weight(rec, torch.zeros(3, 4)).item() == 1e4


def test_an_images_logits_do_not_depend_on_the_others_and_cover_a_patch_of_70_pixels():
    network = PatchDiscriminator(channels=8, layers=3)
    x = torch.randn(2, 3, 96, 96)
    assert torch.allclose(network(x)[:1], network(x[:1]), atol=1e-6)
    assert network(x).shape == (2, 1, 10, 10) and network(x[..., :24, :24]).shape == (2, 1, 1, 1)
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):  # it joins all places
            module.forward = lambda h: h
    x.requires_grad_()
    network(x)[0, 0, 5, 5].backward()
    touched = x.grad[0].abs().sum(0).nonzero()
    assert (touched.max(0).values - touched.min(0).values + 1).tolist() == [70, 70]


def test_psnr_and_ssim_are_those_of_other_programs():
    assert psnr(1.0) == pytest.approx(48.1308, abs=1e-4) and psnr(0.0) == math.inf
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (2, 3, 20, 24)).astype(float)
    b = (a + rng.normal(0, 20, a.shape)).clip(0, 255)

    def smooth(x):  # SciPy's Gaussian, cut at 5 pixels, without the border
        for axis in (2, 3):
            x = gaussian_filter1d(x, 1.5, axis=axis, truncate=3.4)
        return x[:, :, 5:-5, 5:-5]

    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b, both = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2, smooth(a * b) - mean_a * mean_b
    c1, c2 = 6.5025, 58.5225
    exact = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    found = ssim(torch.from_numpy(a), torch.from_numpy(b))
    np.testing.assert_allclose(found, exact.mean((1, 2, 3)), rtol=1e-10)
    assert ssim(torch.from_numpy(a), torch.from_numpy(a)).tolist() == pytest.approx([1, 1])
    assert ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)).tolist() == [1]  # smaller than the window


def random_lpips() -> tuple[dict, dict]:
    """Weights under the names of torchvision and lpips."""
    generator = torch.Generator().manual_seed(0)
    vgg, channels, place, inputs = {}, {}, 0, 3
    for i, stage in enumerate(STAGES):
        place += bool(i)
        for outputs in stage:
            std = (2 / (9 * inputs)) ** 0.5
            vgg[f"features.{place}.weight"] = std * torch.randn(outputs, inputs, 3, 3, generator=generator)
            vgg[f"features.{place}.bias"] = 0.1 * torch.randn(outputs, generator=generator)
            place, inputs = place + 2, outputs
        channels[f"lin{i}.model.1.weight"] = torch.rand(1, stage[-1], 1, 1, generator=generator)
    return vgg | {"classifier.0.bias": torch.zeros(1)}, channels


def test_lpips_is_that_of_its_package():
    """RECORDED: what lpips 0.1.4 gives with the same weights."""
    distance = LPIPS(*random_lpips()).eval()
    a, b = torch.rand(2, 2, 3, 40, 36, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        assert distance(a, b).tolist() == pytest.approx(RECORDED, rel=1e-4)
        assert distance(a, a).tolist() == [0, 0]


def test_missing_weights_are_named_with_their_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="loss.perceptual=lpips needs the package .* pip install lpips"):
        load_lpips("", torch.device("cpu"))
    folder = tmp_path / "lpips" / "weights" / "v0.1"
    folder.mkdir(parents=True)
    torch.save(random_lpips()[1], folder / "vgg.pth")
    spec = type("Spec", (), {"origin": str(tmp_path / "lpips" / "__init__.py")})
    monkeypatch.setattr(perceptual, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match=r"loss.vgg=\S+gone.pth does not exist; get https://\S+ \(SHA-256 397923af"):
        load_lpips(str(tmp_path / "gone.pth"), torch.device("cpu"))
    (tmp_path / "vgg.pth").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"vgg.pth has SHA-256 \w+, not a78928a0"):
        load_lpips(str(tmp_path / "vgg.pth"), torch.device("cpu"))


def test_efficientnet_tells_a_blur_from_a_match_and_gives_a_gradient():
    distance = load_efficientnet(torch.device("cpu"))
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    slightly, strongly = (x + s * torch.randn_like(x) for s in (0.02, 0.5))
    values = [distance(y, x) for y in (x, slightly, strongly)]
    assert values[0].tolist() == [0, 0] and (values[1] < values[2]).all()
    y = slightly.requires_grad_()
    distance(y, x).sum().backward()
    assert y.grad.abs().sum() > 0 and all(p.grad is None for p in distance.parameters())
    first = distance.maps(x)[0]
    with torch.no_grad():  # the network's own preparation: (v - 127) / 128 of 8-bit values
        own = distance.network.stem((127.5 * (x + 1) - 127) / 128)
    assert torch.allclose(first, distance.network._blocks[0](own), atol=1e-5)
