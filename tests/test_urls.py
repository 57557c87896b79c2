"""Every command that reads latents takes a URL, or says in one line what to do."""

import re
from pathlib import Path

import numpy as np
import pytest

from fastdit.cli import main
from fastdit.data.manifest import Manifest
from helpers.runs import losses, train_here

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(world, tmp_path_factory) -> Path:
    """A short run on latents at a URL; <run>/../cache has them."""
    folder = tmp_path_factory.mktemp("urls")
    settings = ["training.steps=4", "data.val_fraction=0.1", "training.validate_images=20"]
    remote = [f"data.shards=file://{world}/latents", f"data.cache={folder}/cache"]
    train_here(world, folder / "run", *settings, *remote)
    train_here(world, folder / "local", *settings)
    assert losses(folder / "run") == losses(folder / "local")
    return folder / "run"


def said(capsys, *words) -> str:
    main([*map(str, words)])
    return capsys.readouterr().out


def refused(capsys, *words) -> str:
    with pytest.raises(SystemExit) as end:
        main([*map(str, words)])
    assert end.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_a_run_on_a_url_is_verified_and_judged(run, world, capsys, tmp_path):
    url = f"file://{world}/latents"
    assert "all is well" in said(capsys, "verify", run)
    table = said(capsys, "evaluate", run, "--loss", "--num-samples", "20", "--device", "cpu")
    assert "loss  " in table and "20 images" in table
    given = said(capsys, "evaluate", run, "--loss", "--num-samples", "20", "--shards", url, "--device", "cpu")
    assert "20 images" in given
    assert "bits per dimension" in said(capsys, "likelihood", "--checkpoint", run, "--shards", url, "--num-images", "2",
                                        "--steps", "1", "--device", "cpu")  # fmt: skip
    (world / "latents").rename(world / "away")
    try:
        text = said(capsys, "verify", run)
        assert "not checked: file://" in text and "it is not there" in text and "all is well" in text
        assert "manifest.json cannot be read (it is not there)" in refused(capsys, "evaluate", run, "--loss")
    finally:
        (world / "away").rename(world / "latents")


def test_folders_at_a_url_are_shown_merged_split_and_sampled(run, world, capsys, tmp_path):
    url, cache = f"file://{world}/latents", ("--cache", run.parent / "cache")
    assert said(capsys, "shards", "stats", url, *cache) == said(capsys, "shards", "stats", world / "latents")
    for name, place in (("there", url), ("here", world / "latents")):
        said(capsys, "shards", "sample", place, tmp_path / name, "--count", "5", *cache)
    there, here = Manifest.load(tmp_path / "there"), Manifest.load(tmp_path / "here")
    assert there == here and len(there) == 5
    np.testing.assert_array_equal(there.index(), here.index())
    assert "9 images" in said(capsys, "shards", "split", url, tmp_path / "t", tmp_path / "v", "--count", "9", *cache)
    assert "14 images" in said(capsys, "shards", "merge", f"file://{tmp_path}/v", here.folder, tmp_path / "m", *cache)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("shards stats URL", "needs a folder for its files; set data.cache=FOLDER, or --cache FOLDER"),
        ("shards repair URL OUT", "fastdit shards repair reads folders of this machine, not file://"),
        ("verify URL", "fastdit verify reads folders of this machine, not file://"),
        ("evaluate URL --reference X", "SAMPLES reads folders of this machine, not file://"),
        ("evaluate SAMPLES --reference URL", "--reference reads folders of this machine, not file://"),
        ("train CONFIG data.shards=URL training.align=[repa] data.cache=OUT run_dir=X", "has none; add them with"),
        ("likelihood --checkpoint RUN --shards URL data.cache=''", "data.shards=file.* needs a folder for its files"),
    ],
)
def test_what_cannot_be_read_is_one_line(run, world, capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "SAMPLES").symlink_to(world / "images")
    monkeypatch.setattr("fastdit.data.remote.WAITS_S", ())
    known = {"URL": f"file://{world}/latents", "CONFIG": f"{world}/config.yaml", "RUN": str(run)}
    for key, value in known.items():
        words = words.replace(key, value)
    line = refused(capsys, *words.split())
    assert re.search(message, line), line
    assert not (tmp_path / "OUT" / "manifest.json").exists()


def test_a_cache_too_small_for_the_run_is_found_before_it_begins(world, tmp_path):
    options = [f"data.shards=file://{world}/latents", f"data.cache={tmp_path}/cache", "data.cache_gib=0.0001"]
    with pytest.raises(ValueError, match="data.cache_gib=0.0001 is less than"):
        train_here(world, tmp_path / "run", *options, "training.steps=1")
    assert not (tmp_path / "run").exists()
