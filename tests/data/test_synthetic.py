"""Generated latents: the same for any world size and resume point, of any number, and good for a whole journey."""

import numpy as np
import pytest
import torch

from fastdit.cli import main
from fastdit.config import load_config, save_config
from fastdit.data.latents import sample_latents
from fastdit.data.loader import read_moments, sample_keys, split
from fastdit.data.opening import open_latents
from fastdit.plan import plan
from fastdit.training.loop import train
from helpers.data import make_shards
from helpers.runs import losses, run
from helpers.shards import take

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["model.variant=DiT-2x32x2/2", "training.global_batch=8", "training.compile=false", "training.engine=torch",
         "training.log_every=1", "training.report=false", "sampling.steps=2", "sampling.sampler=heun"]  # fmt: skip


@pytest.mark.parametrize("shape, pixels", [("4x16x16", False), ("3x16x16", True)])
def test_latents_have_the_stated_statistics_and_images_differ(shape, pixels):
    manifest = open_latents(f"synthetic:1000/{shape}/7")
    moments = read_moments(manifest, manifest.index())
    spec, noise = manifest.latents, torch.randn(1000, *manifest.latents.shape)
    x_0 = sample_latents(moments, noise, spec.scale, spec.shift)
    np.testing.assert_allclose(x_0.std((0, 2, 3)), manifest.channel_std, rtol=0.01)
    np.testing.assert_allclose(x_0.mean((0, 2, 3)), manifest.channel_mean, atol=0.01)
    assert not manifest.scale_remarks() and len(moments.flatten(1).unique(dim=0)) == 1000
    assert spec.are_pixels == pixels and spec.image_size == (16 if pixels else 128)
    assert not pixels or (x_0.abs() <= 1).all() and not moments[:, 3:].any()
    assert torch.equal(read_moments(manifest, manifest.index()[:3], True), moments[:3].flip(-1))
    labels = manifest.index()["label"]
    assert tuple(np.bincount(labels)) == manifest.class_counts and manifest.class_names == tuple("0123456")
    same, others = split(manifest, 0.1)
    assert same is manifest and len(others) == 100 and others.latents == spec and others.num_classes == 7
    assert not torch.equal(read_moments(others, others.index()[:1]), moments[:1])


def test_world_size_and_resume_do_not_change_the_global_batches():
    manifest = open_latents("synthetic:21/4x8x8/3")
    for step, batch in enumerate(take(manifest, 6, global_batch=8, seed=0)):
        keys = [(8 * step + i) % 21 for i in range(8)]
        assert sample_keys(manifest, 0, 8, step) == keys and batch.y.tolist() == [key % 3 for key in keys]
        assert torch.equal(batch.moments, read_moments(manifest, manifest.index()[keys]))
        own = {"global_batch": 8, "seed": 0, "start_step": step}
        parts = [part for r in range(2) for part in take(manifest, 1, rows=slice(4 * r, 4 * r + 4), **own)]
        assert torch.equal(torch.cat([part.moments for part in parts]), batch.moments)


def test_the_number_of_images_costs_nothing():
    manifest = open_latents("synthetic:1_000_000_000_000_000/4x8x8/10")
    [batch] = take(manifest, 1, global_batch=4, seed=0, start_step=10**11)
    assert batch.y.tolist() == [0, 1, 2, 3] and len(manifest) == sum(manifest.class_counts) == 10**15
    with pytest.raises(ValueError, match="too many images to list"):
        manifest.index()


WRONG = ["synthetic:", "synthetic:0", "synthetic:x", "synthetic:-1", "synthetic:_", "synthetic:1_0", "synthetic:9/4x8",
         "synthetic:9/4x0x8/2", "synthetic:9/4x8x8/", "synthetic:9//2", f"synthetic:{1 << 60}", f"synthetic:{10**99}",
         "synthetic:9/4x8x8/1000000", "synthetic:9/4x99999x8/1", "synthetic:\uff11\uff12"]  # fmt: skip


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:30])
def test_a_text_of_another_form_is_one_line(text):
    message = "is not synthetic:IMAGES/CxHxW/CLASSES|of the latents is out of range"
    with pytest.raises(ValueError, match=message) as error:
        open_latents(text)
    assert "\n" not in str(error.value)


def test_a_resumed_run_repeats_every_loss_and_two_processes_agree(tmp_path, capsys):
    def config(name: str, *more: str):
        shards = "data.shards=synthetic:1000/4x8x8/10"
        return load_config("sit_s_2", [*SMALL, shards, f"run_dir={tmp_path}/{name}", "training.steps=6",
                                       "training.checkpoint_every=3", "data.val_fraction=0.1", *more])  # fmt: skip

    train(config("whole"))
    train(config("parts", "training.steps=3"))
    train(config("parts"), resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert "val_loss" in (tmp_path / "whole" / "metrics.jsonl").read_text()
    save_config(config("two"), tmp_path / "two.yaml")
    run("train.py", "--config", str(tmp_path / "two.yaml"), processes=2)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "whole"), rtol=1e-4)
    main(["evaluate", f"{tmp_path}/whole", "--loss", "--shards", "synthetic:64/4x8x8/10", "--num-samples", "20"])
    assert "0.95 - 1.00" in capsys.readouterr().out
    with pytest.raises(ValueError, match="needs features, but synthetic:1000/4x8x8/10 has none"):
        train(config("other", "training.align=[repa]"))
    with pytest.raises(ValueError, match="global_batch=2000, but synthetic:1000/4x8x8/10 has only 1,000 images"):
        train(config("other", "training.global_batch=2000"))


def test_the_plan_takes_the_shape_of_the_latents_from_the_shards(tmp_path):
    make_shards(tmp_path / "latents")
    for shards, channels, patches, classes in [("synthetic:30000/4x32x32/0", 4, 256, 0),
                                               ("synthetic:50000/3x16x16/10", 3, 64, 10),
                                               (f"{tmp_path}/latents", 4, 16, 3)]:  # fmt: skip
        model, _ = plan(load_config("sit_s_2", [f"data.shards={shards}", "training.global_batch=32"]), "H100")
        assert (model.in_channels, model.patches, model.num_classes) == (channels, patches, classes)
