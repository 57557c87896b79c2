"""Extraction: latents match their images, any number of processes writes the same bytes, a mistake is one line."""

import errno
import os
import re
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdit.cli import main
from fastdit.data import encode, extract
from fastdit.data.images import load_crop, to_pixels
from fastdit.data.latents import LatentCodec
from fastdit.data.manifest import Manifest
from fastdit.data.sources import list_images
from fastdit.lock import FolderLock
from helpers import runs
from helpers.data import tiny_vae, write_digits
from helpers.extraction import files_of, run, thread_ranks
from helpers.shards import take

COUNT = 90


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with images/, vae/, and out/ with the latents that one process extracts."""
    base = tmp_path_factory.mktemp("extract")
    write_digits(base / "images", COUNT)
    tiny_vae().save_pretrained(base / "vae")
    run(base, base / "out")
    return base


def test_each_latent_is_the_one_of_its_image_and_label(made):
    manifest = Manifest.load(made / "out")
    manifest.check(image_size=32, num_classes=10, codec=LatentCodec(tiny_vae()))
    assert manifest.class_names == tuple("0123456789") and len(manifest) == COUNT and len(manifest.shards) == 5
    folder, codec = list_images(made / "images"), LatentCodec(tiny_vae())
    index = manifest.index()
    assert sorted(index["key"]) == list(range(COUNT))
    assert len(set(index["label"][:20])) >= 6  # a shard mixes the classes
    for row in index[::7]:
        assert row["label"] == folder.labels[row["key"]]
        crop = torch.from_numpy(load_crop(folder.root / folder.paths[row["key"]], 32))
        pixels = to_pixels(crop)[None]
        expected = torch.stack([codec.encode(pixels)[0], codec.encode(pixels.flip(-1))[0]]).numpy()
        with (manifest.folder / manifest.shards[row["shard"]].name).open("rb") as tar:
            tar.seek(row["offset"])
            stored = np.frombuffer(tar.read(expected.size * 2), "<f2").reshape(expected.shape)
        np.testing.assert_allclose(stored, expected, atol=1e-4, rtol=2e-3)  # float16 has 11 bits


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere priorities are those of processes")
def test_decoding_yields_to_the_thread_that_encodes(made, tmp_path, monkeypatch):
    seen = {}

    def noted(name, work):
        def call(*args):
            seen.setdefault(name, set()).add(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
            return work(*args)

        return call

    for name in ("_read", "encode_both", "_write"):
        monkeypatch.setattr(encode, name, noted(name, getattr(encode, name)))
    run(made, tmp_path / "out")
    (own,), (decoding,) = seen["encode_both"], seen["_read"]
    assert decoding == min(19, own + 10) and seen["_write"] == {own}


def test_extraction_is_readable_as_batches(made):
    [batch] = take(Manifest.load(made / "out"), 1, global_batch=32, seed=0)
    assert batch.moments.shape == (32, 8, 16, 16) and batch.moments.dtype == torch.float32


@pytest.mark.parametrize("world", [2, 3, 7])
def test_any_number_of_processes_writes_the_same_bytes(made, tmp_path, monkeypatch, world):
    ranks = thread_ranks(world, made, monkeypatch)
    with ThreadPoolExecutor(world) as pool:
        list(pool.map(lambda r: run(made, tmp_path / "out", ranks=r), ranks))
    assert files_of(tmp_path / "out") == files_of(made / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_processes_of_the_command_write_the_same_bytes(made, tmp_path):
    arguments = ["--images", made / "images", "--vae", made / "vae", "--out", tmp_path / "out", "--image-size", "32"]
    arguments += ["--batch-size", "8", "--shard-size", "20", "--device", "cpu"]
    assert f"{COUNT} images in 5 shards" in runs.run("extract_features.py", *map(str, arguments), processes=2)
    assert files_of(tmp_path / "out") == files_of(made / "out")


def copy_images(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "images", tmp_path / "images")
    shutil.copytree(made / "vae", tmp_path / "vae")
    return tmp_path


def test_one_unreadable_image_is_skipped_counted_and_named(made, tmp_path):
    base = copy_images(made, tmp_path)
    bad = list_images(base / "images").paths[31]
    (base / "images" / bad).write_bytes(b"no image")
    manifest = run(base, base / "out")
    assert (manifest.images, manifest.skipped, len(manifest)) == (COUNT, 1, COUNT - 1)
    [line] = (base / "out" / "skipped.txt").read_text().splitlines()
    assert line.startswith(f"{bad}\tUnidentifiedImageError: ")
    assert 31 not in manifest.index()["key"]
    assert sum(manifest.class_counts) == COUNT - 1


def test_unreadable_images_of_all_processes_count_together(made, tmp_path, monkeypatch):
    base = copy_images(made, tmp_path)
    ranks = thread_ranks(2, made, monkeypatch)
    keys = Manifest.load(made / "out").index()["key"]
    for key in (keys[0], keys[20]):  # one in the first shard, one in the second: one for each process
        (base / "images" / list_images(base / "images").paths[key]).write_bytes(b"no image")
    with ThreadPoolExecutor(2) as pool:
        first, second = [pool.submit(run, base, base / "out", ranks=r) for r in ranks]
        assert "more than 1 of 90 images cannot be read" in str(first.exception())
        ranks[0].meeting.abort()  # what a launcher does to the others
        assert isinstance(second.exception(), threading.BrokenBarrierError)
    assert sorted(path.name for path in base.iterdir()) == ["images", "vae"]


def spoil(base: Path, how: str) -> dict:
    """Prepare one mistake and return the arguments that cause it."""
    images = base / "images"
    if how == "no images":
        return {"images": base / "nowhere"}
    if how == "empty images":
        (base / "empty").mkdir()
        return {"images": base / "empty"}
    if how == "beside classes":
        shutil.copy(images / list_images(images).paths[0], images / "loose.png")
    if how == "empty class":
        (images / "10").mkdir()
    if how == "unreadable":
        for path in list_images(images).paths[:2]:
            (images / path).write_bytes(b"no image")
    if how == "none readable":
        (base / "one" / "a").mkdir(parents=True)
        (base / "one" / "a" / "x.png").write_bytes(b"no image")
        return {"images": base / "one"}
    if how in ("exists", "foreign"):
        (base / "out").mkdir()
        (base / "out" / "thesis.txt").write_text("dear")
        return {"overwrite": True} if how == "foreign" else {}
    if how == "file":
        (base / "file").write_text("dear")
        return {"out": base / "file" / "out"}
    return {
        "odd size": {"image_size": 33},
        "no vae": {"vae": base / "nowhere"},
        "wrong vae": {"vae": images},
        "dtype": {"dtype": "float8"},
        "precision": {"precision": "fp64"},
        "batch": {"batch_size": 0},
        "inside": {"out": images / "out"},
    }.get(how, {})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no images", "images=.*nowhere does not exist; give a folder of class folders, .*, or Parquet files"),
        ("empty images", "images=.* is empty; it needs images, or one subfolder of images per class"),
        (
            "beside classes",
            "images=.* has 1 image beside its subfolders .*; move them into one subfolder per class, or all",
        ),
        ("empty class", "images=.* has a class subfolder '10' without images; remove it"),
        ("unreadable", r"more than 1 of 90 images cannot be read \(the last is 0/.*Error: .*; repair or remove them"),
        ("none readable", r"none of the images \(1\) could be read"),
        ("exists", "out=.* exists; choose another folder, or replace it with --overwrite"),
        ("foreign", "out=.* exists and has no manifest.json, so it is not replaced; choose another folder"),
        ("file", "out=.*file/out.writing cannot be created .*; choose another folder"),
        ("odd size", "image_size=33 is not divisible by 2, the downsampling factor of vae=.*; use 32 or 34"),
        ("no vae", "vae=.*nowhere is not a folder"),
        ("wrong vae", "vae=.* has no config.json"),
        ("dtype", r"dtype='float8' is unknown; did you mean 'float32'\? Known: float16, float32"),
        ("precision", "precision='fp64' is unknown; did you mean"),
        ("batch", "batch_size=0 must be at least 1"),
        ("inside", "out=.* lies inside images=.*; write it elsewhere"),
        ("space", "out=.* needs about 0.00 GiB, but .* has 0.00 GiB free; free some or write elsewhere"),
        ("full", "no space left for out=.*; free some or write elsewhere"),
    ],
)
def test_a_mistake_gets_one_line_and_leaves_nothing(made, tmp_path, capfd, monkeypatch, how, message):
    base = copy_images(made, tmp_path)
    arguments = {
        "images": base / "images",
        "vae": base / "vae",
        "out": base / "out",
        "image_size": 32,
        **spoil(base, how),
    }
    if how == "space":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    if how == "full":
        monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    argv = ["--device", "cpu"]
    for key, value in arguments.items():
        argv += [f"--{key.replace('_', '-')}"] + ([] if value is True else [str(value)])
    before = sorted(base.rglob("*"))
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["extract", *argv])
    assert stop.value.code == 2
    *others, line = capfd.readouterr().err.splitlines()
    assert re.match(f"error: {message}", line), line
    assert not others or how in ("unreadable", "none readable")  # what was found out before
    assert sorted(base.rglob("*")) == before


def test_overwrite_replaces_latents(made, tmp_path):
    run(made, tmp_path / "out", shard_size=COUNT)
    with pytest.raises(ValueError, match="exists"):
        run(made, tmp_path / "out")
    run(made, tmp_path / "out", overwrite=True)
    assert files_of(tmp_path / "out") == files_of(made / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_extractions_never_write_into_one_folder(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    write_digits(tmp_path / "images", 12)
    settings = {"images": tmp_path / "images", "vae": tmp_path / "vae", "image_size": 32}
    with FolderLock(tmp_path / "latents.writing", "out"):
        with pytest.raises(ValueError, match="out=.*latents.writing is in use by process"):
            extract.extract_features(out=tmp_path / "latents", **settings)
    assert len(extract.extract_features(out=tmp_path / "latents", **settings)) == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "latents", "vae"]
