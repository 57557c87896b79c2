"""The codec agrees with diffusers, recognizes its autoencoder, and reports what is wrong with one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdit.data.latents import LatentCodec, sample_latents
from helpers.data import tiny_vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vae") / "tiny"
    tiny_vae(shift_factor=0.1).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def codec(folder) -> LatentCodec:
    return LatentCodec.load(folder)


def test_latents_are_the_scaled_posterior():
    generator = torch.Generator().manual_seed(0)
    moments = torch.rand(3, 8, 5, 7, generator=generator)
    noise = torch.randn(3, 4, 5, 7, generator=generator)
    expected = (moments[:, :4] + moments[:, 4:] * noise - 0.25) * 0.18215
    torch.testing.assert_close(sample_latents(moments, noise, 0.18215, 0.25), expected)
    torch.testing.assert_close(sample_latents(moments, torch.zeros_like(noise), 2.0), moments[:, :4] * 2)


def test_codec_agrees_with_diffusers(codec):
    pixels = torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = codec.vae.encode(pixels).latent_dist
        moments = codec.encode(pixels)
        assert moments.shape == (3, 2 * codec.channels, 32 // codec.downsample, 48 // codec.downsample)
        torch.testing.assert_close(moments, torch.cat([posterior.mean, posterior.std], dim=1))
        x_0 = sample_latents(moments, torch.zeros_like(posterior.mean), codec.scale, codec.shift)
        torch.testing.assert_close(codec.decode(x_0), codec.vae.decode(posterior.mean).sample, atol=1e-5, rtol=1e-5)
    assert (codec.scale, codec.shift, codec.downsample, codec.channels) == (0.18215, 0.1, 2, 4)


def test_fingerprint_survives_files_dtypes_and_pipelines(codec, folder, tmp_path):
    assert codec.fingerprint == LatentCodec(tiny_vae(shift_factor=0.1)).fingerprint
    half = LatentCodec.load(folder, torch.bfloat16)
    assert half.vae.dtype == torch.bfloat16 and half.fingerprint == codec.fingerprint
    assert half.encode(torch.zeros(1, 3, 32, 32)).dtype == torch.float32
    shutil.copytree(folder, tmp_path / "pipeline" / "vae")
    assert LatentCodec.load(tmp_path / "pipeline").fingerprint == codec.fingerprint
    assert LatentCodec(tiny_vae(shift_factor=0.1, sample_size=64)).fingerprint == codec.fingerprint


def test_fingerprint_sees_one_bit_and_the_scale(codec):
    vae = tiny_vae(shift_factor=0.1)
    with torch.no_grad():
        weight = vae.decoder.conv_in.weight
        weight[0, 0, 0, 0] = torch.nextafter(weight[0, 0, 0, 0], torch.tensor(9.0))
    others = [
        vae,
        tiny_vae(shift_factor=0.2),
        tiny_vae(shift_factor=0.1, scaling_factor=0.2),
        tiny_vae(1, shift_factor=0.1),
    ]
    assert len({codec.fingerprint, *(LatentCodec(other).fingerprint for other in others)}) == 5


@pytest.mark.parametrize(("size", "message"), [(33, "use 32 or 34"), (1, "use 2 or 4"), (0, "use 2 or 4")])
def test_sizes_that_do_not_fit(codec, size, message):
    with pytest.raises(ValueError, match=f"image_size={size} is not divisible by 2.*{message}"):
        codec.check_image_size(size)


def damage(folder: Path, how: str) -> None:
    config, weights = folder / "config.json", folder / "diffusion_pytorch_model.safetensors"
    if how == "no config":
        config.unlink()
    elif how == "cut config":
        config.write_text(config.read_text()[:20])
    elif how == "class":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "AutoencoderTiny"}))
    elif how == "no weights":
        weights.unlink()
    elif how == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "missing":
        save_file({k: v for k, v in load_file(weights).items() if k != "encoder.conv_in.bias"}, weights)
    elif how == "shape":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"latent_channels": 5}))
    elif how == "gone":
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no config", "has no config.json; give a folder written by AutoencoderKL.save_pretrained"),
        ("cut config", "config.json is damaged"),
        ("class", "is of class AutoencoderTiny, .* use an AutoencoderKL"),
        ("no weights", "cannot be read: "),
        ("cut weights", "cannot be read: "),
        ("missing", r"is missing 1 weight \(the first is encoder.conv_in.bias\)"),
        ("shape", "cannot be read: "),
        ("gone", "is not a folder"),
    ],
)
def test_what_is_wrong_with_an_autoencoder(folder, tmp_path, how, message):
    bad = shutil.copytree(folder, tmp_path / "bad")
    damage(bad, how)
    with pytest.raises(ValueError, match=message) as error:
        LatentCodec.load(bad)
    assert str(bad) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key, value",
    [("layers_per_block", 10**12), ("layers_per_block", -1), ("scaling_factor", None), ("scaling_factor", {}),
     ("shift_factor", [1]), ("down_block_types", []), ("norm_num_groups", -1), ("in_channels", 1)],
)  # fmt: skip
def test_settings_of_an_autoencoder_that_make_none_are_one_line(tmp_path, key, value):
    tiny_vae().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ValueError, match=f"vae={tmp_path}") as error:
        LatentCodec.load(tmp_path)
    assert "\n" not in str(error.value)
