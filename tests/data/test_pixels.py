"""Without an autoencoder: latents are the pixels, exactly, in shards, training, sampling and all that reads runs."""

import numpy as np
import pytest
import torch
from PIL import Image

import fastdit
from fastdit.cli import main
from fastdit.config import load_config
from fastdit.convert import convert
from fastdit.data.add_features import check_same_images
from fastdit.data.archives import open_images
from fastdit.data.autoencoders import NO_VAE
from fastdit.data.extract import extract_features
from fastdit.data.images import to_pixels, to_uint8
from fastdit.data.latents import LatentCodec, LatentSpec
from fastdit.data.loader import latent_batches, read_moments
from fastdit.data.manifest import Manifest
from fastdit.data.shards import stats
from fastdit.distributed import Ranks
from fastdit.evaluation import features
from fastdit.plan import plan, report
from fastdit.training.loop import train
from fastdit.verify import verify
from helpers import sources
from helpers.evaluation import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
LEVELS = torch.arange(256, dtype=torch.uint8)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """CIFAR's archive of twelve images as shards of pixels, and a run on them."""
    root = tmp_path_factory.mktemp("pixels")
    archive = sources.make_cifar10(root)
    extract_features(images=archive, out=root / "pixels", vae=NO_VAE, image_size=32, shard_size=5)
    lines = [f"run_dir={root}/run", f"data.shards={root}/pixels", "model.variant=DiT-Ti/4", "training.steps=2",
             "training.global_batch=4", "training.compile=false", "training.engine=torch", "training.report=false",
             "sampling.steps=2", "sampling.sampler=heun"]  # fmt: skip
    train(load_config("sit_s_2", lines))
    return root


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_all_levels_survive_the_shards(dtype):
    pixels = LEVELS.view(1, 1, 256, 1).expand(1, 1, 256, 3)  # (N, H, W, 3)
    codec = LatentCodec.load(NO_VAE).to(dtype=torch.bfloat16)  # nothing in it computes
    mean, std = codec.encode(to_pixels(pixels)).to(dtype).float().chunk(2, dim=1)
    assert torch.equal(to_uint8(codec.decode(mean)), pixels) and not std.any()
    latents = LatentSpec((3, 1, 256), 1.0, 0.0, "none", codec.fingerprint, (256, 1), codec_encoder=codec.encoder)
    assert codec.spec((256, 1)) == latents


def test_the_scale_of_pixels_is_not_remarked_upon(tmp_path, capfd):
    """There is none to set, and pictures of few colors are no mistake."""
    for i in range(4):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (120 + i, 128, 128)).save(tmp_path / f"images/{i}.png")
    extract_features(images=tmp_path / "images", out=tmp_path / "out", vae=NO_VAE, image_size=16)
    said = capfd.readouterr().err
    assert "4 images in 1 shard," in said and "warning" not in said
    assert verify(tmp_path / "out", say=lambda line: None) == [] and "warning" not in stats(tmp_path / "out")


def test_shards_hold_the_pixels_and_their_mirror_images(made):
    manifest = Manifest.load(made / "pixels")
    spec, index, codec = manifest.latents, manifest.index(), LatentCodec.load(manifest.latents.vae)
    assert (spec.shape, spec.scale, spec.vae, spec.precision) == ((3, 32, 32), 1.0, "none", "float32")
    manifest.check(image_size=32, codec=codec)
    for mirrored in (False, True):
        mean, std = read_moments(manifest, index, mirrored).chunk(2, dim=1)
        images = sources.PIXELS[index["key"].astype(int)]
        assert np.array_equal(to_uint8(codec.decode(mean)), images[:, :, ::-1] if mirrored else images)
        assert not std.any()
    pixels = sources.PIXELS / 127.5 - 1
    np.testing.assert_allclose(manifest.channel_std, pixels.std((0, 1, 2)), rtol=1e-4)
    assert next(latent_batches(manifest, global_batch=4, seed=0)).moments.shape == (4, 6, 32, 32)


def test_a_run_on_pixels_is_sampled_verified_measured_and_reported(made, capsys, monkeypatch):
    monkeypatch.setitem(features.FEATURES, "efficientnet-lite0", tiny)
    [image] = fastdit.load(made / "run", device="cpu").sample(n=1)
    assert image.size == (32, 32)
    main(["verify", str(made / "run")])
    main(["verify", str(made / "pixels")])
    main(["evaluate", str(made / "run"), "--reference", str(made / "cifar-10-python.tar.gz"), "--num-samples", "4",
          "--metrics", "frechet"])  # fmt: skip
    main(["evaluate", str(made / "run"), "--loss", "--shards", str(made / "pixels"), "--num-samples", "20"])
    main(["report", str(made / "run")])
    said = capsys.readouterr().out
    assert said.count("all is well") == 2 and "FD (tiny)" in said and "0.95 - 1.00" in said
    page = (made / "run" / "report.html").read_text()
    assert "3 x 32 x 32, the pixels themselves" in page and "No samples" not in page and "scaling_factor" not in page


def test_features_can_be_added_to_pixels(made):
    """Which have no network whose device could be asked for."""
    source, latents = open_images(made / "cifar-10-python.tar.gz"), Manifest.load(made / "pixels")
    check_same_images(source, latents, LatentCodec.load(NO_VAE), 32, False)


def test_channels_of_pixels_are_normalized_and_restored(made, tmp_path):
    lines = [f"run_dir={tmp_path}/run", f"data.shards={made}/pixels", "data.normalize=channel", "data.vae=none"]
    lines += ["model.variant=DiT-Ti/4", "training.steps=1", "training.global_batch=4", "training.compile=false"]
    train(load_config("sit_s_2", [*lines, "training.engine=torch", "training.report=false"]))
    pipeline = fastdit.load(tmp_path / "run", device="cpu").pipeline
    manifest = Manifest.load(made / "pixels").normalized("channel")
    assert pipeline.codec.scale == manifest.latents.scale != 1.0
    x_0 = (torch.from_numpy(sources.PIXELS[:2]).movedim(-1, 1) / 127.5 - 1).float()
    scale, shift = (torch.tensor(value).view(-1, 1, 1) for value in (manifest.latents.scale, manifest.latents.shift))
    assert np.array_equal(pipeline.decode((x_0 - shift) * scale), sources.PIXELS[:2])


def test_what_needs_an_autoencoder_is_refused(made, tmp_path):
    with pytest.raises(ValueError, match="of class Pixels, not the AutoencoderKL of a DiTPipeline"):
        convert(made / "run", "diffusers", tmp_path / "pipe", say=lambda line: None)
    said = []
    convert(made / "run", "official", tmp_path / "run.pt", say=said.append)
    assert any("this network makes pixels" in line for line in said)
    with pytest.raises(ValueError, match="precision=bfloat16 is that of an autoencoder, and vae=none has none"):
        extract_features(images=made, out=tmp_path / "out", vae=NO_VAE, precision="bfloat16")


def test_on_a_gpu_pixels_are_neither_rounded_nor_compiled(made, tmp_path, monkeypatch):
    """A stand-in for the GPU: the precision that is recorded, and what would be prepared for it."""
    asked = []
    monkeypatch.setattr("fastdit.data.extract.has_bfloat16", lambda gpu: True)
    monkeypatch.setattr(LatentCodec, "faster", lambda self, shape=None: asked.append(shape) or "")
    monkeypatch.setattr("fastdit.data.extract.check_precision", lambda precision, device: asked.append(precision))
    ranks = Ranks(0, 0, 1, torch.device("cpu"))
    extract_features(images=made / "cifar-10-python.tar.gz", out=tmp_path / "out", vae="none", image_size=32,
                     compile=True, ranks=ranks)  # fmt: skip
    assert asked == ["float32"] and Manifest.load(tmp_path / "out").latents.precision == "float32"


def test_the_plan_knows_the_size_of_pixels():
    config = load_config("sit_s_2", ["data.vae=none", "data.image_size=32"])
    model, _ = plan(config, "H100")
    assert (model.in_channels, model.patches) == (3, 256) and "DiT-S/2, 32 px" in report(config, "H100")
