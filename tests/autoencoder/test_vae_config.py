"""Mistakes in the settings of fastdit train-vae: the error names the key, the value and the remedy."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fastdit.autoencoder.config import AutoencoderConfig
from fastdit.autoencoder.loop import train_autoencoder
from fastdit.cli import main
from fastdit.config import all_keys, config_from, load_config, shipped_names
from fastdit.data import pixels
from fastdit.data.archives import open_images
from fastdit.data.images import random_crop
from fastdit.data.pixels import PixelReader, pixel_batches, split_rows

from .conftest import small


@pytest.mark.parametrize(
    "change, message",
    [
        ("data.image_size=18", "data.image_size=18 is not divisible by 4, the downsampling factor .*; use 16 or 20"),
        ("model.channels=[4,6]", r"model.norm_groups=4 does not divide every one of model.channels=\[4, 6\]; use 2"),
        ("discriminator.start=9", "discriminator.start=9 is not before training.steps=8; use an earlier step, or"),
        ("discriminator.layers=3", "discriminator.layers=3 needs images of 24 px or more, not data.image_size=16"),
        ("data.images=''", "data.images is not set; give a folder"),
        ("data.crop=middle", "data.crop='middle' is unknown; known: center, random|data.crop='middle'"),
        ("data.crop_fraction=0", r"data.crop_fraction=0.0 is out of range; use a share in \(0, 1\]"),
        ("data.crop_fraction=0.8", "data.crop_fraction=0.8 is out of range; use 1 with center crops, or data.crop=ran"),
        ("data.images=NOWHERE", "images=.*nowhere does not exist"),
        ("data.images=EMPTY", "images=.*empty is empty"),
        ("data.val_images=SAME", "data.val_images=.* holds the images of data.images"),
        ("data.val_fraction=1e-9", "data.val_fraction=1e-09 holds out 0 of 90 images; use a larger fraction"),
        ("training.global_batch=9", "training.micro_batch=2 does not divide 9 images per process; use 1"),
        ("training.epochs=0.2", r"discriminator.start=3 is not before training.steps=2 \(training.epochs=0.2\)"),
        ("training.decoder_only=true", "training.decoder_only=True is out of range; set training.init_from"),
        ("training.init_from=NOWHERE", "training.init_from=.*nowhere is not a folder"),
        ("training.evaluate_features=inception", "training.evaluate_features='inception' is unknown"),
        ("loss.perceptual=vgg", "loss.perceptual='vgg' is unknown; did you mean"),
        ("training.lrr=1", "training.lrr=1 is not a known key; did you mean 'training.lr'.* train-vae --help-config"),
        ("training.optimizer=muon", "training.optimizer='muon' is not a known key"),
        ("run_dir=TAKEN", "run_dir=.*taken holds|run_dir=.*taken is not empty"),
    ],
)
def test_a_mistake_is_named(images, tmp_path, change, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    places = {"NOWHERE": tmp_path / "nowhere", "EMPTY": tmp_path / "empty", "SAME": images, "TAKEN": tmp_path / "taken"}
    for word, place in places.items():
        change = change.replace(word, str(place))
    more = {"data.image_size=18": ["model.channels=[4,4,4]"], "training.global_batch=9": ["training.micro_batch=2"]}
    others = ["data.val_fraction=0"] if "val_images" in change else []
    with pytest.raises(ValueError, match=message):
        config = small(images, tmp_path / "run", *others, *more.get(change, []), change)
        train_autoencoder(config, device="cpu")
    assert not (tmp_path / "run").exists()


def test_an_unreadable_image_is_replaced_and_many_are_an_error(images, tmp_path, capsys):
    shutil.copytree(images, tmp_path / "images")
    files = sorted((tmp_path / "images").rglob("*.png"))
    files[3].write_bytes(b"no picture")
    config = small(tmp_path / "images", tmp_path / "run", "training.epochs=2", "data.val_images=" + str(images / "1"),
                   "data.val_fraction=0", "training.evaluate_images=4")  # fmt: skip
    train_autoencoder(config, device="cpu")
    assert capsys.readouterr().out.count("cannot be read; the next image takes its place") == 1
    for file in files[4:8]:
        file.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="more than 1 of 90 images cannot be read"):
        train_autoencoder(dataclasses.replace(config, run_dir=str(tmp_path / "other")), device="cpu")


@pytest.mark.parametrize("crop_fraction", [None, 0.4])
def test_the_order_and_the_crops_are_those_of_one_process(images, crop_fraction):
    source = open_images(images)
    rows, _ = split_rows(source, 0.3, "data.val_fraction")

    def batches(part: slice, start: int, cache: float, count: int) -> list:
        reader = PixelReader(source, rows, 8, workers=2, cache_bytes=cache)
        found = pixel_batches(reader, global_batch=50, rows=part, seed=3, start_step=start, crop_fraction=crop_fraction)
        taken = [next(found).images for _ in range(count)]
        found.close()
        return taken

    whole = batches(slice(None), 0, 0, 5)  # 250 images: four epochs
    halves = [batches(part, 2, 1e9, 3) for part in (slice(0, 20), slice(20, 50))]
    for k in range(3):
        assert whole[k + 2].equal(torch.cat([half[k] for half in halves]))
    assert not whole[0].equal(whole[2])


def test_random_crops_are_others_in_each_epoch_and_are_mirrored(tmp_path):
    Image.fromarray(np.tile(np.arange(0, 240, 6, dtype=np.uint8), (8, 1))).convert("RGB").save(tmp_path / "ramp.png")
    source = open_images(tmp_path)
    reader = PixelReader(source, np.zeros(1, np.int64), 8, workers=1)
    batches = pixel_batches(reader, global_batch=1, seed=0, crop_fraction=1.0)
    found = [next(batches).images[0, :, :, 0].int() for _ in range(300)]
    batches.close()
    steps = [row[0, 1].item() - row[0, 0].item() for row in found]
    lefts = np.array([row[0].min().item() // 6 for row in found])
    assert set(steps) == {6, -6} and 110 < steps.count(6) < 190
    assert lefts.min() == 0 and lefts.max() == 32 and abs(lefts.mean() - 16) < 3 * 9.5 / 300**0.5


def test_the_help_lists_every_key_and_the_included_configs_load(capsys):
    main(["train-vae", "--help-config"])
    text = capsys.readouterr().out
    assert all(f"{key} = " in text for key in all_keys(AutoencoderConfig)) and "judges patches of 70 px" in text
    names = shipped_names(AutoencoderConfig)
    assert {"vae_kl_f4", "vae_kl_f8", "vae_digits"} <= set(names) and not set(names) & set(shipped_names())
    main(["configs"])
    text = capsys.readouterr().out
    assert all(name in text for name in names)


@pytest.mark.parametrize("name", ["vae_kl_f4", "vae_kl_f8"])
def test_an_included_config_runs_at_a_reduced_size(images, tmp_path, name):
    """Its losses, its discriminator and its schedule, with a small network."""
    config = load_config(name, schema=AutoencoderConfig)
    blocks = len(config.model.channels)
    overrides = [
        f"run_dir={tmp_path}/run", f"data.images={images}", "data.image_size=32", f"model.channels={[8] * blocks}",
        "model.norm_groups=4", "model.layers=1", "discriminator.start=2", "discriminator.channels=8",
        "training.steps=3", "training.global_batch=2", "training.compile=false", "training.evaluate_images=4",
        "training.log_every=1", "data.val_fraction=0.2",
    ]  # fmt: skip
    if config.loss.perceptual == "lpips":  # its weights cannot be had here
        overrides.append("loss.perceptual=efficientnet-lite0")
    out = train_autoencoder(load_config(name, overrides, AutoencoderConfig), device="cpu")
    assert (out / "config.json").is_file() and (tmp_path / "run/curves.png").is_file()


def test_a_picture_of_another_form_is_cropped(tmp_path, monkeypatch):
    drawn: list[float] = []
    folder = tmp_path / "wide"
    folder.mkdir()
    for i in range(12):
        Image.new("RGB", (50, 30), (20 * i, 0, 0)).save(folder / f"{i}.png")
    config = small(folder, tmp_path / "run", "data.image_size=[24,16]", "training.steps=4", "data.val_fraction=0",
                   "training.global_batch=4", "training.evaluate_images=12", "data.crop=random",
                   "data.crop_fraction=0.7")  # fmt: skip
    monkeypatch.setattr(pixels, "random_crop", lambda *a, **k: drawn.append(k["least"]) or random_crop(*a, **k))
    train_autoencoder(config, device="cpu")
    assert drawn == [0.7] * len(drawn) and len(drawn) >= 16  # and read ahead; images to measure on are center crops
    assert Image.open(tmp_path / "run/monitor/step-0000004.png").size == (4 * 26 - 2, 3 * 18 - 2)


def test_a_config_of_a_network_is_not_one_of_an_autoencoder():
    with pytest.raises(ValueError, match="data.shards='x' is not a known key"):
        config_from({"data": {"shards": "x"}}, "here", (), AutoencoderConfig)
    with pytest.raises(ValueError, match="vae_kl_f4.yaml is a config of fastdit train-vae; fastdit train --help"):
        load_config("vae_kl_f4")
    with pytest.raises(ValueError, match="sit_s_2.yaml is a config of fastdit train; fastdit train-vae --help"):
        load_config("sit_s_2", schema=AutoencoderConfig)
