"""data.normalize=channel: latents of mean 0 and deviation 1 in each channel, in training, checkpoint and sampling."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastdit.convert import convert, read_initial
from fastdit.data.latents import sample_latents
from fastdit.data.loader import read_moments
from fastdit.data.manifest import Manifest
from fastdit.likelihood import likelihood
from fastdit.sampling import load_pipeline
from fastdit.training.state import load_network
from fastdit.verify import verify
from helpers.runs import train_here

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = ["training.steps=2", "training.checkpoint_every=1", "training.precision=fp32"]


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("normalized") / "run"
    train_here(world, run_dir, *FEW, "data.normalize=channel")
    return run_dir


def latents_of(manifest: Manifest) -> torch.Tensor:
    """Those of all images and mirror images: (2N, C, h, w)."""
    index = manifest.index()
    moments = read_moments(manifest, index)
    noise = torch.randn(len(moments), *manifest.latents.shape, generator=torch.Generator().manual_seed(0))
    return sample_latents(moments, noise, manifest.latents.scale, manifest.latents.shift)


def test_each_channel_has_mean_0_and_deviation_1(world):
    manifest = Manifest.load(world / "latents")
    x = latents_of(manifest.normalized("channel"))
    assert latents_of(manifest).std(dim=(0, 2, 3)).max() < 0.3  # as the autoencoder's own scale leaves them
    torch.testing.assert_close(x.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=0.02)
    torch.testing.assert_close(x.std(dim=(0, 2, 3)), torch.ones(4), rtol=0.02, atol=0)
    assert manifest.normalized("none") is manifest and not manifest.normalized("channel").scale_remarks()
    with pytest.raises(ValueError, match="data.normalize=channel needs channels that vary"):
        replace(manifest, channel_std=(1.0, 0.0, 1.0, 1.0)).normalized("channel")


def test_a_checkpoint_records_the_scale_and_samples_are_decoded_with_it(world, run):
    manifest = Manifest.load(world / "latents").normalized("channel")
    assert load_network(run).latents.scale == manifest.latents.scale != Manifest.load(world / "latents").latents.scale
    codec, plain = load_pipeline(run).codec, Manifest.load(world / "latents")
    moments = read_moments(plain, plain.index()[:3])
    noise = torch.randn(3, 4, 8, 8)
    pixels = codec.decode(sample_latents(moments, noise, manifest.latents.scale, manifest.latents.shift))
    codec.scale, codec.shift = plain.latents.scale, plain.latents.shift
    expected = codec.decode(sample_latents(moments, noise, plain.latents.scale, plain.latents.shift))
    torch.testing.assert_close(pixels, expected, rtol=1e-3, atol=1e-4)
    assert verify(run) == []


def test_a_resume_with_another_scale_is_refused_and_a_new_start_says_so(world, run, tmp_path, capsys):
    with pytest.raises(ValueError, match="scale"):
        train_here(world, run, *FEW, "training.steps=3", resume=True)
    train_here(world, run, *FEW, "training.steps=3", "data.normalize=channel", resume=True)
    train_here(world, tmp_path / "tuned", *FEW, f"training.init_from={run}", read_initial=read_initial)
    assert "was trained with data.normalize=channel, this run trains none" in capsys.readouterr().out


def test_the_likelihood_is_that_of_the_normalized_latents(world, run, monkeypatch):
    scales = []

    def spied(moments, noise, scale, shift):
        scales.append((scale, shift))
        return sample_latents(moments, noise, scale, shift)

    monkeypatch.setattr("fastdit.likelihood.sample_latents", spied)
    report = likelihood(run, world / "latents", num_images=4, steps=2, probes=1, weights="model", device="cpu")
    latents = Manifest.load(world / "latents").normalized("channel").latents
    assert scales == [(latents.scale, latents.shift)] and np.isfinite(report.posterior_bits_per_dim)


def test_a_pipeline_that_cannot_hold_the_scale_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="by channel, .* is not supported by DiTPipeline"):
        convert(run, "diffusers", tmp_path / "pipeline")
    with pytest.raises(ValueError, match="data.normalize='chanel' is unknown; did you mean 'channel'"):
        from fastdit.config import load_config

        load_config("sit_s_2", ["data.normalize=chanel"])
