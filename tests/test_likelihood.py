"""The likelihood command against closed forms, on latents whose density is known."""

import json
import math
import sys

import pytest
import torch

from fastdit import cli
from fastdit.convert import convert
from fastdit.data.latents import sample_latents
from fastdit.data.manifest import Manifest
from fastdit.diffusion.likelihood import variational_bound
from fastdit.distributed import ImageRandom, seed_of
from fastdit.likelihood import batches, likelihood, log_posterior, mean_and_error
from fastdit.training import state
from helpers.checkpoints import golden_weights, quiet
from helpers.data import make_shards, tiny_vae
from helpers.runs import train_here

D, SCALE = 256, 0.18215
STD = math.sqrt(29) * SCALE  # of make_shards' latents: posterior means of deviation 5, posteriors of deviation 2


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """latents/ of 40 images and a checkpoint for each objective."""
    root = tmp_path_factory.mktemp("likelihood")
    tiny_vae().save_pretrained(root / "vae")
    torch.save(golden_weights(), root / "plain.pt")
    make_shards(root / "latents")
    for name in ("ddpm", "flow"):
        convert(root / "plain.pt", "fastdit", root / name, overrides=[f"objective={name}"], heads=4, say=quiet)
    return root


class Gaussian(torch.nn.Module):
    """The ideal network for data N(0, STD^2): it returns DDPM's eps (and a variance), or SiT's velocity."""

    null_label = None

    def __init__(self, objective):
        super().__init__()
        self.objective = objective

    def forward(self, x, time, y):
        ddpm = not hasattr(self.objective, "interpolant")
        t = (time.double() + 1) / 1000 if ddpm else 1 - time.double()
        alpha, sigma, d_alpha, d_sigma = self.objective.path.at(t, x)
        excess = x / (alpha**2 * STD**2 + sigma**2)
        x_0, eps = alpha * STD**2 * excess, sigma * excess
        return torch.cat([eps, torch.zeros_like(x)], 1) if ddpm else -(d_alpha * x_0 + d_sigma * eps)


@pytest.mark.parametrize("name", ["flow", "ddpm"])
def test_gaussian_latents_have_the_likelihood_of_their_closed_form(place, monkeypatch, name):
    monkeypatch.setattr(state, "network_from_state", lambda config, latents, objective, *_, **__: Gaussian(objective))
    report = likelihood(place / name, place / "latents", num_images=40, probes=2, steps=100, say=quiet)
    wanted = -D / 2 * (math.log(2 * math.pi * STD**2) + 1)  # minus the entropy
    assert report.nats_error == pytest.approx(math.sqrt(D / 2 / 40), rel=0.4)  # log p varies as chi-squared / 2
    assert abs(report.nats - wanted) < 3 * report.nats_error
    assert report.nats == pytest.approx(wanted, rel=0.01)
    assert report.bits_per_dim == pytest.approx(-report.nats / D / math.log(2), rel=1e-6)
    gain = 0.5 * math.log2(29 / 4)  # bits a dimension that a mean tells beyond its posterior
    assert report.posterior_bits_per_dim == pytest.approx(gain, rel=0.01)
    assert abs(report.posterior_bits_per_dim - gain) < 3 * report.posterior_bits_per_dim_error
    assert report.probe_error_nats < 0.01  # its Jacobian is a multiple of the identity: no probe can miss


def test_the_bound_of_a_ddpm_checkpoint_is_that_of_the_whole_chain(place, monkeypatch):
    monkeypatch.setattr(state, "network_from_state", lambda config, latents, objective, *_, **__: Gaussian(objective))
    report = likelihood(place / "ddpm", place / "latents", num_images=6, method="vlb", batch_size=4, say=quiet)
    manifest = Manifest.load(place / "latents")
    [(_, moments, y)] = batches(manifest, 6, 6, 0)
    noise, draws = (ImageRandom([seed_of(0, kind, i) for i in range(6)]) for kind in (1, 3))
    x_0 = sample_latents(moments, noise(moments[:, :4]), SCALE)
    objective = state.load_network(place / "ddpm").objective
    bound = variational_bound(objective, Gaussian(objective), x_0, y, noise=draws)
    assert report.bits_per_dim == pytest.approx(bound["total"].mean().item(), rel=1e-5)
    assert report.mse == pytest.approx(bound["mse"].mean().item(), rel=1e-5)
    assert report.prior_bits_per_dim == pytest.approx(bound["prior"].mean().item(), rel=1e-4)
    # bins of 2 / 255 within [-1, 1], and two that reach to infinity, count at the last step alone: the bound lies
    # between the entropy of such a binned normal and that of one with narrow bins everywhere
    edges = torch.cat([torch.tensor([-torch.inf]), (torch.arange(-126.5, 127.5) / 127.5), torch.tensor([torch.inf])])
    mass = torch.distributions.Normal(0.0, STD).cdf(edges).diff()
    entropy = -(mass[mass > 0] * mass[mass > 0].log2()).sum().item()
    narrow = 0.5 * math.log2(2 * math.pi * math.e * STD**2) + math.log2(255 / 2)
    assert entropy < report.bits_per_dim < narrow + 3 * report.bits_per_dim_error
    with pytest.raises(ValueError, match="--method=vlb needs a DDPM checkpoint, not objective=flow; use heun"):
        likelihood(place / "flow", place / "latents", method="vlb", num_images=2, say=quiet)
    for given in ({"steps": 50}, {"probes": 4}):
        with pytest.raises(ValueError, match=f"--{[*given][0]}=.* is for --method heun and euler; vlb takes all 1,000"):
            likelihood(place / "ddpm", place / "latents", method="vlb", num_images=2, say=quiet, **given)


def test_an_image_counts_the_same_in_any_batch(place):
    first, second = (
        likelihood(place / "flow", place / "latents", num_images=7, probes=2, steps=3, batch_size=size, say=quiet)
        for size in (7, 3)
    )
    assert first.nats == pytest.approx(second.nats, rel=1e-6) and first.nats_error == pytest.approx(
        second.nats_error, rel=1e-4
    )
    other = likelihood(place / "flow", place / "latents", num_images=7, probes=2, steps=3, seed=1, say=quiet)
    assert abs(other.nats - first.nats) > 1e-3
    assert first.probe_error_nats > 0


def test_the_images_come_once_each_unmirrored(place):
    manifest = Manifest.load(place / "latents")
    parts = list(batches(manifest, 40, 16, seed=0))
    assert [(start, len(y)) for start, _, y in parts] == [(0, 16), (16, 16), (32, 8)]
    images = torch.cat([moments for _, moments, _ in parts])
    assert len({image.numpy().tobytes() for image in images}) == 40
    assert torch.bincount(torch.cat([y for _, _, y in parts])).tolist() == [14, 13, 13]


def test_the_command_prints_and_writes_json(place, tmp_path, capsys, monkeypatch):
    arguments = "--num-images 3 --probes 1 --steps 2 --method euler --out".split() + [str(tmp_path / "out.json")]
    fixed = ["likelihood", "--checkpoint", str(place / "ddpm"), "--shards", str(place / "latents")]
    monkeypatch.setattr(sys, "argv", ["fastdit", *fixed, *arguments, "--seed", "3"])
    cli.main()
    printed, report = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert "3 images, 2 steps of euler, 1 probe\n" in printed and f"{report['nats']:.2f} +- " in printed
    assert report["probe_error_nats"] is None and report["dimensions"] == D  # one probe has no spread
    assert report["bits_per_dim"] == pytest.approx(-report["nats"] / D / math.log(2), rel=1e-6)
    for name, fault in (("out.txt", "must be a file that ends in .json"), (tmp_path / "out.json", "exists; choose")):
        with pytest.raises(SystemExit, match="2"):
            cli.main([*fixed, "--out", str(name)])
        said = capsys.readouterr()  # before anything is measured
        assert not said.out and f"error: --out={name} {fault}" in said.err


def test_latents_without_a_posterior_have_no_noise_of_their_own_to_compare_with(place, monkeypatch):
    said = []
    zero = lambda moments, noise, scale: log_posterior(moments * 0, noise, scale)  # noqa: E731
    monkeypatch.setattr("fastdit.likelihood.log_posterior", zero)
    likelihood(place / "flow", place / "latents", num_images=2, probes=1, steps=2, say=said.append)
    assert said[0].endswith("log2 q - log2 p     infinite: the deviation of these latents is 0")


def test_densities_of_pixels_are_not_called_bits_of_8_bit_values(place, world, tmp_path):
    settings = ["data.shards=synthetic:64/3x16x16/10", "data.vae=none", "data.image_size=16", "training.steps=1"]
    train_here(world, tmp_path / "run", *settings, "training.checkpoint_every=1")
    said = []
    for path, shards in ((tmp_path / "run", "synthetic:64/3x16x16/10"), (place / "flow", place / "latents")):
        likelihood(path, shards, num_images=2, probes=1, steps=2, say=said.append)
    assert ["densities of pixels in [-1, 1] without dequantization" in text for text in said] == [True, False]


def test_means_and_errors():
    assert mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / math.sqrt(3)))
    assert mean_and_error([5.0])[0] == 5 and math.isnan(mean_and_error([5.0])[1])
    assert all(map(math.isnan, mean_and_error([math.inf, 1.0])))


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"num_images": 41}, ["--num-images=41", "holds 40"]),
        ({"num_images": 0}, ["--num-images=0"]),
        ({"probes": 0}, ["--probes=0"]),
        ({"steps": 2000}, ["2000"]),
        ({"shards": "gone"}, ["gone has no manifest.json"]),
        ({"path": "gone"}, ["gone does not exist"]),
        ({"overrides": ["data.num_classes=2"]}, ["data.num_classes=2: only objective, model.attention,"]),
        ({"overrides": ["sampling.cfg_scale=4"]}, ["sampling.cfg_scale=4: only", "can be changed for a likelihood"]),
        ({"overrides": ["sampling.steps=9"]}, ["sampling.steps=9 changes nothing for a likelihood; use --steps 9"]),
        ({"overrides": ["seed=3"]}, ["seed=3 changes nothing for a likelihood; use --seed 3"]),
        ({"overrides": ["objective.coupling=ot"]}, ["objective.coupling=ot changes nothing for a likelihood"]),
        ({"overrides": ["objective=ddmp"]}, ["did you mean 'ddpm'"]),
        ({"scale": 1.0}, ["have scale 1.0", "has latents with scale 0.18215"]),
    ],
)
def test_mistakes_are_named(place, tmp_path, arguments, words):
    given = {"path": place / "ddpm", "shards": place / "latents", "num_images": 2, "steps": 2, **arguments}
    if "scale" in given:
        make_shards(tmp_path / "other", scale=given.pop("scale"))
        given["shards"] = tmp_path / "other"
    with pytest.raises(ValueError) as error:
        likelihood(given.pop("path"), given.pop("shards"), say=quiet, **given)
    assert all(word in str(error.value) for word in words), error.value
