"""fastdit train --images: where the latents are extracted to, and when those of an earlier command are taken."""

import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import fastdit.api  # noqa: F401  with the real train, which a test replaces
from fastdit.cli import main
from fastdit.data.manifest import Manifest
from fastdit.schema import SD_VAE
from fastdit.training.checkpoint import checkpoints
from fastdit.training.loop import train as real_train
from helpers.data import tiny_vae

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def twelve(world, tmp_path, monkeypatch):
    """A folder with four images of each of three classes, and a function: the command, without training, returns
    data.shards."""
    monkeypatch.chdir(tmp_path)
    for label in "012":
        for path in sorted((world / "images" / label).iterdir())[:4]:
            (tmp_path / "images" / label).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / "images" / label)
    shutil.copytree(world / "vae", "vae")
    said = []
    monkeypatch.setattr("fastdit.training.loop.train", lambda config, **_: said.append(config))

    def train(*more, name="sit_s_2", size="data.image_size=32", vae="data.vae=vae", images="images"):
        main(["train", name, "--images", images, *filter(None, (size, vae)), *more, "--device", "cpu"])
        return said.pop().data.shards

    return train


def test_images_are_extracted_to_where_data_shards_says_or_beside_them(twelve, tmp_path, capsys):
    assert twelve() == "images_latents_32" and "extracting" in capsys.readouterr().out
    assert twelve() == "images_latents_32" and "extracting" not in capsys.readouterr().out
    assert twelve("data.shards=wanted") == "wanted" and len(Manifest.load("wanted")) == 12
    assert twelve("data.shards=wanted", size="", vae="") == "wanted"
    (tmp_path / "own.yaml").write_text("run_dir: x\ndata: {shards: mine}\n")
    assert twelve(name="own.yaml") == "mine" and len(Manifest.load("mine")) == 12
    mixed = "[{path: wanted, weight: 1}, {path: mine, weight: 1}]"
    for shards in (mixed, "synthetic:40/4x8x8/3", "s3://bucket/latents"):
        with pytest.raises(SystemExit):
            twelve(f"data.shards={shards}")
        assert "--images=images is for one folder of latents, not data.shards=" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["", "data.shards=latents"])
def test_latents_of_other_images_or_settings_are_not_taken_for_those_of_images(world, twelve, tmp_path, capsys, place):
    shards = twelve(*filter(None, [place]))

    def refused(**options) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit):
            twelve(*filter(None, [place]), **options)
        return capsys.readouterr().err

    remedy = ("omit --images to train on them, or name another folder in data.shards for those of images" if place
              else "omit --images to train on them, or remove images_latents_32 to extract again")  # fmt: skip
    shutil.copytree(world / "images/3", "images/3")
    said = refused()
    assert f"the latents in {shards} are of 12 images of 3 classes, but images=images has " in said
    assert " of 4; " + remedy in said
    shutil.rmtree("images/3")
    os.rename("images/2", "images/7")
    assert "has 12 of 3, such as '7' in place of '2'; " + remedy in refused()
    os.rename("images/7", "images/2")
    first = sorted((tmp_path / "images/1").iterdir())[0]
    first.rename(tmp_path / "images/0" / first.name)
    assert f"have other labels than images=images; {remedy}" in refused()
    (tmp_path / "images/0" / first.name).rename(first)
    if place:
        assert "image_size=64, but the latents in latents are from 32 px images" in refused(size="data.image_size=64")
    else:
        assert f"are of vae={tmp_path}/vae, and the default is {SD_VAE}; set data.vae=" in refused(vae="")
    tiny_vae(seed=3).save_pretrained("other")
    assert "is not the one that encoded the latents" in refused(vae="data.vae=other")
    shutil.rmtree("vae")
    shutil.copytree("other", "vae")
    assert "is not the one that encoded the latents" in refused()


def test_images_that_changed_after_their_latents_were_written_are_counted(twelve, tmp_path, capsys):
    twelve()
    twelve()
    assert "warning" not in capsys.readouterr().out
    later = (tmp_path / "images_latents_32/manifest.json").stat().st_mtime_ns + 1
    for path in sorted((tmp_path / "images/1").iterdir())[:3]:
        os.utime(path, ns=(later, later))
    twelve()
    assert ("warning: 3 files of images changed after their latents in images_latents_32 were written; remove "
            "images_latents_32 to extract again") in capsys.readouterr().out  # fmt: skip


def test_the_time_limit_includes_the_extraction(twelve, monkeypatch):
    """A job would be killed if its limit counted from the end of the extraction on."""
    extract, later = fastdit.api.extract_features, SimpleNamespace(monotonic=lambda: time.monotonic() + 3600)

    def slow(**given):
        extract(**given)
        monkeypatch.setattr("fastdit.training.guard.time", later)

    monkeypatch.setattr("fastdit.api.extract_features", slow)
    monkeypatch.setattr("fastdit.training.loop.train", real_train)
    few = ["model.variant=DiT-Ti/4", "training.global_batch=4", "training.compile=false", "training.steps=3"]
    with pytest.raises(SystemExit, match="75"):
        twelve(*few, "run_dir=run", "training.time_limit=1:00")
    assert [folder.name for folder in checkpoints(Path("run"))] == ["step-0000001"]
