"""Any autoencoder of diffusers: how it scales, what it loses, where it comes from, and which one it is."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

import fastdit
from fastdit.config import load_config
from fastdit.convert import convert
from fastdit.data import autoencoders
from fastdit.data.images import load_crop, to_pixels
from fastdit.data.latents import LatentCodec, LatentSpec, sample_latents, scale_remarks
from fastdit.data.manifest import Manifest
from fastdit.data.preview import Preview, psnr
from fastdit.data.sources import list_images
from fastdit.distributed import Ranks
from fastdit.training import checkpoint
from fastdit.training.loop import train
from fastdit.training.state import latents_of
from helpers.data import small_vae, tiny_vae, write_digits
from helpers.extraction import files_of, run

MEAN, STD = (0.1, -0.2, 0.3, 0.0), (0.5, 1.0, 2.0, 4.0)


def tiny_dc(**options):
    """An AutoencoderDC of random weights: 32 px images to 8 x 8 x 8 latents."""
    from diffusers import AutoencoderDC

    with torch.random.fork_rng():
        torch.manual_seed(0)
        sides = {
            "block_out_channels": (8, 8, 16),
            "layers_per_block": (1, 1, 1),
            "qkv_multiscales": ((), (), (5,)),
        }
        both = {f"{side}_{key}": value for key, value in sides.items() for side in ("encoder", "decoder")}
        kinds = {"encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock")}
        kinds |= {"decoder_block_types": kinds["encoder_block_types"]}
        return AutoencoderDC(latent_channels=8, attention_head_dim=8, scaling_factor=0.4, **both, **kinds, **options)


MADE = {
    "16 channels, shift": lambda: tiny_vae(
        latent_channels=16, scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False
    ),
    "mean and std": lambda: tiny_vae(latents_mean=MEAN, latents_std=STD, scaling_factor=0.5),
    "DC": tiny_dc,
}


def pixels() -> torch.Tensor:
    return torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("kind", MADE)
def test_what_is_encoded_is_decoded_as_diffusers_does(tmp_path, kind):
    MADE[kind]().save_pretrained(tmp_path / "vae")
    codec = LatentCodec.load(tmp_path / "vae")
    with torch.no_grad():
        encoded = codec.vae.encode(pixels())
        mean = encoded.latent if kind == "DC" else encoded.latent_dist.mean
        moments = codec.encode(pixels())
        torch.testing.assert_close(moments.chunk(2, dim=1)[0], mean)
        x_0 = sample_latents(moments, torch.zeros_like(mean), codec.scale, codec.shift)
        torch.testing.assert_close(codec.decode(x_0), codec.vae.decode(mean).sample, atol=1e-5, rtol=1e-5)
    assert mean.shape == (3, *codec.spec((48, 32)).shape)
    assert codec.spec((48, 32)).shape == {
        "16 channels, shift": (16, 16, 24),
        "mean and std": (4, 16, 24),
        "DC": (8, 8, 12),
    }[kind]
    if kind == "DC":
        assert not moments.chunk(2, dim=1)[1].any()


def test_the_scale_of_each_channel_is_that_of_diffusers():
    """diffusers' pipelines: z -> (z - latents_mean) * scaling_factor / latents_std."""
    codec = LatentCodec(MADE["mean and std"]())
    moments = codec.encode(pixels())
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (MEAN, STD))
    expected = (moments[:, :4] + moments[:, 4:] - mean) * 0.5 / std
    torch.testing.assert_close(sample_latents(moments, torch.ones(3, 4, 16, 24), codec.scale, codec.shift), expected)


def test_records_of_a_scale_per_channel_and_of_a_rectangle_survive_json():
    for spec in (
        LatentCodec(MADE["mean and std"]()).spec((48, 32)),
        LatentCodec(tiny_vae()).spec(32),
    ):
        assert LatentSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert json.loads(json.dumps(spec.to_json()))["image_size"] == 32
    for damage in ({"shape": [1, 2]}, {"scale": "x"}, {"image_size": None}):
        with pytest.raises((ValueError, TypeError)):
            LatentSpec.from_json(spec.to_json() | damage)


@pytest.mark.parametrize("kind", MADE)
def test_every_autoencoder_is_extracted_with_the_statistics_of_its_latents(tmp_path, kind):
    write_digits(tmp_path / "images", 20)
    MADE[kind]().save_pretrained(tmp_path / "vae")
    manifest = run(tmp_path, tmp_path / "out", dtype="float32")
    codec, folder = LatentCodec.load(tmp_path / "vae"), list_images(tmp_path / "images")
    crops = torch.from_numpy(np.stack([load_crop(folder.open(i), 32) for i in range(20)]))
    moments = torch.cat([codec.encode(to_pixels(crops)), codec.encode(to_pixels(crops).flip(-1))])
    mean = sample_latents(moments, torch.zeros_like(moments).chunk(2, dim=1)[0], codec.scale, codec.shift).double()
    std = moments.double().chunk(2, dim=1)[1] * torch.tensor(codec.scale).view(-1, 1, 1)
    deviation = (mean.var((0, 2, 3), correction=0) + std.square().mean((0, 2, 3))).sqrt()
    np.testing.assert_allclose(manifest.channel_mean, mean.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(manifest.channel_std, deviation, rtol=1e-4)
    assert manifest.latents == replace(codec.spec(32), precision="float32") == Manifest.load(tmp_path / "out").latents


def test_a_network_on_latents_of_an_autoencoder_dc_is_sampled(tmp_path):
    write_digits(tmp_path / "images", 20)
    tiny_dc().save_pretrained(tmp_path / "vae")
    run(tmp_path, tmp_path / "out")
    lines = [f"run_dir={tmp_path}/run", f"data.shards={tmp_path}/out", "model.variant=DiT-Ti/4", "training.steps=1"]
    lines += ["training.global_batch=4", "training.compile=false", "training.engine=torch", "sampling.steps=2"]
    train(load_config("dit_s_2", lines))
    [image] = fastdit.load(tmp_path / "run", device="cpu").sample(n=1)
    assert image.size == (32, 32)
    with pytest.raises(ValueError, match="is of class AutoencoderDC, not the AutoencoderKL of"):
        convert(tmp_path / "run", "diffusers", tmp_path / "pipe", say=lambda line: None)


def test_fingerprints_are_those_of_manifests_that_exist():
    vae = tiny_vae(shift_factor=0.1)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.fill_(0.25)
    assert LatentCodec(vae).fingerprint == "582f9fa045329e122b255469fd5689468ac0bc815685f7b5da2b254d5f037f4c"


def test_fingerprints_see_what_scales_the_latents():
    found = [LatentCodec(tiny_vae(**options)).fingerprint for options in (
        {}, {"latents_mean": MEAN}, {"latents_std": STD}, {"latents_std": (*STD[:3], 5.0)})]  # fmt: skip
    found += [LatentCodec(tiny_dc()).fingerprint, LatentCodec(tiny_dc(encoder_out_shortcut=False)).fingerprint]
    assert len(set(found)) == 6


def test_channels_last_and_compiled_it_computes_the_same():
    plain, fast = LatentCodec(small_vae(32, (8, 8))), LatentCodec(small_vae(32, (8, 8)))
    assert fast.faster((3, 3, 32, 48)) == ""
    assert fast.vae.encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fast.encode(pixels()), plain.encode(pixels()), atol=1e-5, rtol=1e-4)
    assert fast.vae.encoder._compiled_call_impl is not None and fast.fingerprint == plain.fingerprint
    assert sorted(fast.vae.state_dict()) == sorted(plain.vae.state_dict())


def test_the_images_need_no_second_compilation(tmp_path, monkeypatch):
    """The warm-up once had other strides than the images, and the first batch compiled the encoder again."""
    write_digits(tmp_path / "images", 20)
    tiny_vae().save_pretrained(tmp_path / "vae")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(tmp_path, tmp_path / "out", compile=True)


def test_without_a_compiler_it_runs_uncompiled_and_says_so(tmp_path, monkeypatch, capfd):
    write_digits(tmp_path / "images", 20)
    tiny_vae().save_pretrained(tmp_path / "vae")
    run(tmp_path, tmp_path / "plain")

    def fail(*_, **__):
        raise RuntimeError("no C++ compiler\nwas found")

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: setattr(self, "_compiled_call_impl", fail))
    run(tmp_path, tmp_path / "out", compile=True)
    said = "the autoencoder runs without torch.compile, which failed (RuntimeError: no C++ compiler)\n"
    assert said in capfd.readouterr().err
    np.testing.assert_allclose(Manifest.load(tmp_path / "out").channel_mean,
                               Manifest.load(tmp_path / "plain").channel_mean, rtol=1e-3, atol=1e-4)  # fmt: skip


def test_the_report_says_what_a_precision_costs(tmp_path, capfd, any_cpu):
    write_digits(tmp_path / "images", 20)
    tiny_vae().save_pretrained(tmp_path / "vae")
    exact = run(tmp_path, tmp_path / "exact")
    assert "dB PSNR on average of 8 images (preview.png)\n" in capfd.readouterr().err
    half = run(tmp_path, tmp_path / "half", precision="bfloat16")
    said = capfd.readouterr().err
    decibel = float(said.split("bfloat16 against float32: ")[1].split(" dB")[0])
    assert 35 < decibel < 70  # 8 bits of a mantissa
    assert exact.latents == replace(half.latents, precision="float32") and exact.shards != half.shards
    assert half.latents.precision == "bfloat16" and "changes the reconstructions" not in said
    assert len(files_of(tmp_path / "exact")["preview.png"]) > 1000


def test_a_precision_that_the_reconstructions_show_is_said():
    def made(cost):
        return Preview(Image.new("RGB", (1, 1)), (29.0, 31.0), cost, [])

    assert made(None).precision_remarks("float32") == made(40.0).precision_remarks("bfloat16") == []
    assert made(39.9).precision_remarks("bfloat16") == [
        "precision=bfloat16 changes the reconstructions by 39.9 dB PSNR, less than 10 dB above their own 30.0 dB; use "
        "float32"
    ]


@pytest.mark.parametrize(("on", "precision", "message"), [
    ("cuda", "bfloat16", "precision=bfloat16 needs a GPU from Ampere on, but this is a Tesla T4; use float16"),
    ("cpu", "bfloat16", "precision=bfloat16 is not supported by this CPU; use float32"),
    ("cpu", "float16", "precision=float16 is not supported by this CPU; use float32"),
])  # fmt: skip
def test_a_device_without_a_precision_is_one_line(tmp_path, monkeypatch, on, precision, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    write_digits(tmp_path / "images", 20)
    ranks = Ranks(0, 0, 1, torch.device(on))
    with pytest.raises(ValueError, match=message):
        run(tmp_path, tmp_path / "out", precision=precision, ranks=ranks)
    with pytest.raises(ValueError, match="vae=.* is not a folder"):  # float32 is the default there
        run(tmp_path, tmp_path / "out", ranks=ranks)


def test_a_run_continues_only_on_latents_of_the_precision_that_it_began_with(world, tmp_path, any_cpu):
    """The fingerprint is the autoencoder's and the same for both; samples and other uses do not depend on it."""
    for precision in ("float32", "bfloat16"):
        run(world, tmp_path / precision, precision=precision)
    lines = [f"run_dir={tmp_path}/run", "training.log_every=1", f"data.vae={world}/vae"]
    last = train(load_config(world / "config.yaml", [*lines, f"data.shards={tmp_path}/float32", "training.steps=1"]))
    more = load_config(world / "config.yaml", [*lines, f"data.shards={tmp_path}/bfloat16", "training.steps=2"])
    with pytest.raises(ValueError, match="have precision bfloat16, but .* with precision float32 .*; use the same pre"):
        train(more, resume=True)
    own, other = (Manifest.load(tmp_path / name).latents for name in ("float32", "bfloat16"))
    assert own.differences(other) == [] and latents_of(checkpoint.read_meta(last)) == own
    stored = json.loads((tmp_path / "bfloat16" / "manifest.json").read_text())
    assert stored.pop("precision") == "bfloat16" and stored.pop("sha256")
    (tmp_path / "bfloat16" / "manifest.json").write_text(json.dumps(stored))  # as earlier versions wrote it
    assert Manifest.load(tmp_path / "bfloat16").latents == replace(other, precision="")
    train(more, resume=True)


def test_the_preview_shows_images_above_their_reconstructions(tmp_path):
    write_digits(tmp_path / "images", 20)
    tiny_vae().save_pretrained(tmp_path / "vae")
    run(tmp_path, tmp_path / "out")
    folder, codec = list_images(tmp_path / "images"), LatentCodec.load(tmp_path / "vae")
    with Image.open(tmp_path / "out" / "preview.png") as page:
        page = np.asarray(page)
    assert page.shape == (2 * 36 + 4 + 14, 8 * 36 + 4, 3)
    for place, key in enumerate(folder.order[:8]):
        crop = load_crop(folder.open(key), 32)
        left = 4 + 36 * place
        np.testing.assert_array_equal(page[4:36, left : left + 32], crop)
        moments = codec.encode(to_pixels(torch.from_numpy(crop))[None])
        decoded = codec.vae.decode(moments[:, :4]).sample[0].clamp(-1, 1)
        shown = to_pixels(torch.from_numpy(page[40:72, left : left + 32].copy()))
        assert (shown - decoded).abs().max() < 0.01
    assert psnr(torch.zeros(4), torch.full((4,), 0.2)) == pytest.approx(20)
    assert psnr(torch.zeros(4), torch.zeros(4)) == pytest.approx(99)


@pytest.mark.parametrize(("scale", "wrong"), [(1.0, False), (0.18215, True), (5.0, True)])
def test_a_scale_that_does_not_fit_is_said(tmp_path, capfd, scale, wrong):
    write_digits(tmp_path / "images", 20)
    tiny_vae(scaling_factor=scale).save_pretrained(tmp_path / "vae")
    run(tmp_path, tmp_path / "out")
    said = capfd.readouterr().err
    assert said.count("warning: the standard deviations of the scaled latents are") == wrong
    assert not wrong or "far from the 1 that diffusion assumes: scale=" in said


def test_remarks_on_scales():
    assert scale_remarks(np.zeros(4), np.ones(4), 0.2) == []
    [line] = scale_remarks(np.zeros(4), np.full(4, 5.5), 0.2)
    assert line.endswith("scale=0.2 is wrong; train with data.normalize=channel, or write scaling_factor=0.0364 "
                         "to the autoencoder's config.json and extract again")  # fmt: skip
    [line] = scale_remarks(np.zeros(2), np.full(2, 5.5), (0.2, 0.3))
    assert "scale=(0.2, 0.3) is wrong; train with data.normalize=channel, or write the right latents_mean" in line
    [line] = scale_remarks(np.array([0.0, 3.5]), np.ones(2), 0.2)
    assert "a shift is missing; train with data.normalize=channel" in line
    assert scale_remarks(np.array([0.0, 3.5]), np.full(2, 0.3), 1.0, "none") == []


# where they come from


@pytest.mark.parametrize("name", ["vae", "nowhere/at/all", "./vae", "/nowhere/vae", "runs/vae", "../vae", "vae/"])
def test_a_path_that_does_not_exist_never_asks_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("the hub was asked"))
    with pytest.raises(ValueError, match=f"vae={name} is not a folder; give one written by save_pretrained"):
        LatentCodec.load(name)


OFFLINE = 'cannot reach the hub; run "hf download owner/name --local-dir vae" elsewhere, then --vae vae'


def test_without_a_network_the_hub_is_one_line_at_once():
    start = time.perf_counter()
    with pytest.raises(ValueError) as error:
        LatentCodec.load("owner/name")
    assert str(error.value) == OFFLINE and time.perf_counter() - start < 6


def test_a_hub_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: time.sleep(20))
    monkeypatch.setattr(autoencoders, "HUB_TIMEOUT_S", 0.3)
    start = time.perf_counter()
    with pytest.raises(ValueError) as error:
        LatentCodec.load("owner/name")
    assert str(error.value) == OFFLINE and time.perf_counter() - start < 5


@pytest.mark.parametrize("below", ["", "vae"])
@pytest.mark.parametrize("online", [False, True])
def test_a_repository_in_the_cache_needs_no_network(tmp_path, monkeypatch, below, online):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc123"
    tiny_vae().save_pretrained(snapshot / below)
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("abc123")
    if online:  # the download puts it there
        hidden = snapshot.rename(tmp_path / "hub")
        names = [path.relative_to(hidden).as_posix() for path in hidden.rglob("*.*")]
        about = huggingface_hub.hf_api.ModelInfo(id="owner/name", siblings=[{"rfilename": name} for name in names])
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: about)

        def download(name: str, file: str) -> str:
            (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
            return shutil.copy(hidden / file, snapshot / file)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    codec = LatentCodec.load("owner/name")
    assert codec.name == "owner/name" and codec.fingerprint == LatentCodec(tiny_vae()).fingerprint


def test_what_the_hub_refuses_is_said(monkeypatch):
    kind = huggingface_hub.errors.RepositoryNotFoundError
    refusal = kind.__new__(kind)  # its __init__ needs a response of the HTTP library
    refusal.args = ("404 Client Error\nmore",)

    def refuse(*_, **__):
        raise refusal

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    with pytest.raises(ValueError, match="vae=owner/name is no local folder, and the hub refuses it: .*404") as error:
        LatentCodec.load("owner/name")
    assert "\n" not in str(error.value)


def test_a_local_folder_is_recorded_by_its_absolute_path(tmp_path, monkeypatch):
    tiny_vae().save_pretrained(tmp_path / "vae")
    monkeypatch.chdir(tmp_path)
    spec = LatentCodec.load("vae").spec(32)
    assert spec.vae == str(Path(tmp_path / "vae").resolve())
    assert spec.differences(replace(spec, vae="elsewhere")) == []
