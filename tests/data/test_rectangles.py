"""Rectangular images, width x height, from the crop to the samples; and networks without classes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import fastdit
from fastdit.cli import main
from fastdit.config import load_config
from fastdit.convert import convert
from fastdit.data.images import center_crop, parse_size, size_text
from fastdit.data.manifest import Manifest
from fastdit.plan import report
from fastdit.report import write_report
from fastdit.sampling import sample
from fastdit.training import checkpoint
from fastdit.training.loop import train
from fastdit.training.state import load_network
from fastdit.verify import verify
from helpers.data import tiny_vae, write_digits
from helpers.runs import losses


@pytest.mark.parametrize(
    ("text", "size"),
    [("256", 256), (256, 256), ("512x256", (512, 256)), ("512X256", (512, 256)), ("64x64", 64), ((48, 32), (48, 32)),
     ([32, 32], 32)],
)  # fmt: skip
def test_sizes(text, size):
    assert parse_size(text) == size and parse_size(size_text(size)) == size


@pytest.mark.parametrize("text", ["", "x", "256x", "0", "-4", "1x2x3", "256 px", "2.5", (1, 2, 3), ()])
def test_what_is_not_a_size_is_one_line(text):
    with pytest.raises(ValueError, match="is not a size; give a side such as 256, or WIDTHxHEIGHT"):
        parse_size(text)


@pytest.mark.parametrize("source", [(400, 300), (300, 400), (64, 32), (63, 200), (30, 30), (1000, 90), (129, 65)])
@pytest.mark.parametrize("size", [(64, 32), (32, 64), (48, 48)])
def test_a_crop_covers_the_rectangle_and_keeps_the_shape_of_things(source, size):
    """Of an image whose red is the column and green the row, the crop is the largest centered part with this aspect."""
    width, height = source
    columns, rows = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    image = Image.fromarray(np.stack([columns, rows, rows], -1).astype(np.uint8))
    crop = np.asarray(center_crop(image, size if size[0] != size[1] else size[0])).astype(float)
    assert crop.shape == (size[1], size[0], 3)
    scale = max(size[0] / width, size[1] / height)
    for axis, (sides, length) in enumerate(((size[0], width), (size[1], height))):
        share = sides / (length * scale)  # of this side that is kept
        line = crop[size[1] // 2, :, 0] if axis == 0 else crop[:, size[0] // 2, 1]
        expected = 255 * (0.5 + share * (np.arange(sides) + 0.5 - sides / 2) / sides)
        assert np.abs(line - expected)[2:-2].max() < 1 + 255 * max(1.5 / length, 1.5 / (length * scale))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Images in class folders and in one folder, and an autoencoder with a scale and shift per channel."""
    base = tmp_path_factory.mktemp("rectangles")
    write_digits(base / "images", 40)
    write_digits(base / "classes", 40)
    (base / "flat").mkdir()
    for path in (base / "classes").rglob("*.png"):
        path.rename(base / "flat" / path.name)
    vae = tiny_vae(latents_mean=(0.1, 0.9, -0.4, 0.2), latents_std=(0.5, 1.0, 2.0, 0.7), scaling_factor=1.0)
    vae.save_pretrained(base / "vae")
    for name in ("images", "flat"):
        arguments = ["--images", base / name, "--out", base / f"{name}_latents", "--vae", base / "vae"]
        main(["extract", *map(str, arguments), "--image-size", "64x32", "--device", "cpu"])
    return base


def config(base, name, run_dir, *overrides):
    lines = [f"run_dir={run_dir}", f"data.shards={base}/{name}_latents", "model.variant=DiT-Ti/4", "objective=flow"]
    lines += ["training.global_batch=8", "training.compile=false", "training.log_every=1", "training.engine=torch"]
    lines += ["training.checkpoint_every=3", "training.steps=6", "sampling.steps=2", "sampling.batch_size=4"]
    return load_config("sit_s_2", [*lines, *overrides])


@pytest.mark.parametrize("name", ["images", "flat"])
def test_from_images_to_samples(made, tmp_path, name):
    manifest = Manifest.load(made / f"{name}_latents")
    assert manifest.latents.shape == (4, 16, 32) and manifest.latents.image_size == (64, 32)
    assert json.loads((made / f"{name}_latents" / "manifest.json").read_text())["image_size"] == [64, 32]
    assert manifest.num_classes == (10 if name == "images" else 0)
    train(config(made, name, tmp_path / "whole"))
    train(config(made, name, tmp_path / "parts", "training.steps=3"))
    train(config(made, name, tmp_path / "parts"), resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    trained = load_network(tmp_path / "whole")
    assert trained.latents == manifest.latents and trained.config.data.image_size == (64, 32)
    assert trained.config.data.num_classes == manifest.num_classes
    out = sample(tmp_path / "whole", tmp_path / "samples", 5, device="cpu")
    with np.load(out / "samples.npz") as file:
        assert file["arr_0"].shape == (5, 32, 64, 3)
    [image] = fastdit.load(tmp_path / "whole", device="cpu").sample(n=1)
    assert image.size == (64, 32)
    page = write_report([tmp_path / "whole"], tmp_path / "report.html")
    assert "at 64x32 px for 6 steps" in page.read_text() and "of 64x32 px images" in page.read_text()
    faults = verify(checkpoint.checkpoints(tmp_path / "whole")[-1], lambda line: None)
    assert faults == []


def test_a_size_that_contradicts_the_shards_is_refused(made, tmp_path):
    for value, said in (("32", "image_size=32"), ("[32,64]", "image_size=32x64")):
        with pytest.raises(ValueError, match=f"{said}, but the latents in .* are from 64x32 px images"):
            train(config(made, "images", tmp_path / "run", f"data.image_size={value}"))
    train(config(made, "images", tmp_path / "run", "data.image_size=[64,32]", "training.steps=1"))
    with pytest.raises(ValueError, match="data.image_size=.* is out of range"):
        config(made, "images", tmp_path / "run", "data.image_size=[64,0]")


def test_latents_without_classes_need_a_network_without(made, tmp_path):
    with pytest.raises(ValueError, match="num_classes=10, but the latents in .* are of images without classes; set 0"):
        train(config(made, "flat", tmp_path / "run", "data.num_classes=10"))


def test_a_plan_for_a_rectangle():
    wide = report(load_config("sit_s_2", ["data.image_size=[512,256]"]), "H100")
    square = report(load_config("sit_s_2", ["data.image_size=512"]), "H100")
    assert "512x256 px" in wide and "512 px" in square
    flops = [float(text.split(" GFLOP")[0].split()[-1]) for text in (wide, square)]
    assert 0.4 < flops[0] / flops[1] < 0.5  # half the tokens, a quarter of the attention


def test_formats_for_squares_refuse_rectangles(made, tmp_path):
    """Also where the number of tokens is a square: 64 x 16 px are 16 x 4 patches."""
    arguments = ["--images", made / "images", "--out", tmp_path / "latents", "--vae", made / "vae"]
    main(["extract", *map(str, arguments), "--image-size", "64x16", "--device", "cpu"])
    settings = config(made, "images", tmp_path / "run", f"data.shards={tmp_path}/latents", "training.steps=1")
    train(settings)
    assert torch.prod(torch.tensor(load_network(tmp_path / "run").model.grid)) == 16
    for target, out in (("official", tmp_path / "a.pt"), ("diffusers", tmp_path / "pipe")):
        with pytest.raises(ValueError, match="latents of 8 x 32 are not square"):
            convert(tmp_path / "run", target, out, say=lambda line: None)
