"""Shards, images and archives that anyone may have written run nothing, block nothing and stay small."""

import json
import os
import pickle
import shutil
import tarfile

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from fastdit.data import columns
from fastdit.data.archives import open_images
from fastdit.data.extract import extract_features
from fastdit.data.images import load_crop
from fastdit.data.loader import latent_batches
from fastdit.data.manifest import Manifest
from fastdit.files import read_bytes
from fastdit.verify import verify
from helpers.checkpoints import quiet
from helpers.data import edit_manifest, make_shards
from helpers.sources import cifar_of

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = ["training.steps=2", "training.checkpoint_every=2", "model.variant=DiT-1x32x2/4", "training.precision=fp32"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_a_link_or_a_device_in_a_shard_is_a_finding(tmp_path, kind):
    folder = make_shards(tmp_path / "latents").folder
    info = tarfile.TarInfo("999999999.cls")
    info.type, info.linkname = kind, "../../etc/passwd"
    with tarfile.open(folder / "shard-00000.tar", "a") as tar:
        tar.addfile(info)
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    shards[0]["bytes"] = (folder / "shard-00000.tar").stat().st_size
    edit_manifest(folder, shards=shards)
    assert any("999999999.cls is a link, a folder or a device" in line for line in verify(folder, quiet))


def reindexed(folder, change):
    """Replace index.npy by what `change` makes of it, with its digest in the manifest."""
    import hashlib

    np.save(folder / "index.npy", change(np.load(folder / "index.npy")), allow_pickle=True)
    edit_manifest(folder, index_sha256=hashlib.sha256((folder / "index.npy").read_bytes()).hexdigest())


def outside(index):
    index["offset"][3] = 2**64 - 1
    return index


def no_such_shard(index):
    index["shard"][3] = 7
    return index


@pytest.mark.parametrize(
    "change, words",
    [
        (outside, "samples outside the shards"),
        (no_such_shard, "samples outside the shards"),
        (lambda index: index["key"], "not 40 samples"),
        (lambda index: index[:-1], "not 40 samples"),
        (lambda index: np.array([{}], object), "is not an array"),
    ],
)
def test_an_index_that_does_not_fit_the_shards_is_named(tmp_path, change, words):
    folder = make_shards(tmp_path / "latents").folder
    reindexed(folder, change)
    for read in (lambda: verify(folder, quiet), lambda: latent_batches(Manifest.load(folder), global_batch=4, seed=0)):
        try:
            [line] = [line for line in read() if "index.npy" in line]
        except ValueError as error:
            line = str(error)
        assert "index.npy" in line and words in line


@pytest.mark.parametrize(
    "key, value",
    [("latent_shape", [4, 9000, 9000]), ("latent_shape", 3), ("latent_shape", [4, 0, 8]), ("dtype", "object"),
     ("scale", []), ("class_names", None), ("shards", [{"name": "../x.tar", "samples": 40, "bytes": 1, "sha256": ""}]),
     ("shards", [{"name": "x.tar", "samples": 1e308, "bytes": 1, "sha256": ""}]), ("shards", {}), ("images", "many"),
     ("format", [])],
)  # fmt: skip
def test_settings_of_a_manifest_that_are_none_are_named(tmp_path, key, value):
    folder = make_shards(tmp_path / "latents").folder
    edit_manifest(folder, **{key: value})
    with pytest.raises(ValueError, match=r"manifest.json (is damaged|has format|says latent_shape)") as error:
        Manifest.load(folder).check()
    assert "\n" not in str(error.value)


def test_an_image_that_is_long_and_narrow_is_skipped(tmp_path):
    Image.new("L", (1, 3_000_000)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="1 x 3000000 pixels are too long and narrow"):
        load_crop(tmp_path / "x.png", 64)


def test_reading_stops_at_the_limit(tmp_path):
    (tmp_path / "x").write_bytes(b"123")
    assert read_bytes(tmp_path / "x", 3) == b"123"  # the size itself is allowed
    with pytest.raises(ValueError, match="x has 3 bytes, more than the 2"):
        read_bytes(tmp_path / "x", 2)


def images(folder):
    """Two images as PNG files."""
    folder.mkdir()
    for i in range(2):
        Image.new("RGB", (40, 40), (i, i, i)).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


def test_a_label_of_a_terabyte_in_a_webdataset_is_not_read(tmp_path):
    first, _ = images(tmp_path / "images")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(first, "0.png")
        info = tarfile.TarInfo("0.cls")
        info.size = 10**12
        tar.fileobj.write(info.tobuf(tarfile.GNU_FORMAT) + bytes(512))
    with pytest.raises(ValueError, match="1000000000000 bytes at byte .* are more than"):
        open_images(tmp_path / "a.tar")


@pytest.mark.parametrize(
    "batch, words",
    [
        (b"\x80\x02K\x00r\xff\xff\xff\x7f.", "in place 2147483647 of its memo"),
        (pickle.dumps(None, protocol=2), "'NoneType' object has no attribute"),
        (pickle.dumps({b"data": np.zeros((1, 3072)), b"labels": [0]}, protocol=2), "not of bytes"),
    ],
)
def test_a_pickle_in_cifar_takes_no_more_memory_than_it_has(tmp_path, batch, words):
    cifar_of(tmp_path / "cifar.tar.gz", batch)
    with pytest.raises(ValueError, match=f"cannot be read as CIFAR .*{words}"):
        open_images(tmp_path / "cifar.tar.gz")


def test_a_compressed_archive_is_read_up_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "UNPACKED", 1 << 20)
    cifar_of(tmp_path / "cifar.tar.gz", bytes(1 << 21))
    assert (tmp_path / "cifar.tar.gz").stat().st_size < 10_000
    with pytest.raises(ValueError, match="its files hold more than 1048576 bytes"):
        open_images(tmp_path / "cifar.tar.gz")


def test_a_terabyte_of_zeros_is_not_tried_as_xz(tmp_path):
    (tmp_path / "a.tar").touch()
    os.truncate(tmp_path / "a.tar", 1 << 40)
    with pytest.raises(ValueError, match="has no images in it"):
        open_images(tmp_path / "a.tar")


@pytest.mark.parametrize(
    "features", ["[", '{"info": [1]}', '{"info": {"features": {"image": 1, "label": {"names": 5}}}}']
)
def test_metadata_of_another_form_in_parquet_is_one_line_or_ignored(tmp_path, features):
    table = pyarrow.table({"image": [b"x", b"y"], "label": [0, 1]}).replace_schema_metadata({"huggingface": features})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        open_images(tmp_path / "a.parquet")


def test_more_rows_than_bytes_in_parquet_are_no_images(tmp_path):
    parquet.write_table(pyarrow.table({"image": [b""] * 100_000}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="100000 rows in .* bytes cannot hold images"):
        open_images(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["settings.json", "shard-00000.part"])
def test_what_an_unfinished_extraction_left_may_be_anything(world, tmp_path, name):
    folder = tmp_path / "latents.writing"
    images(tmp_path / "images")
    options = {"images": tmp_path / "images", "vae": world / "vae", "image_size": 32}
    extract_features(out=tmp_path / "plain", **options)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()}
    for text in ("[", "[1]", '{"shard": [1]}', '{"shard": {"name": 5}}', "[" * 20_000, "\xff"):
        folder.mkdir()
        (folder / name).write_text(text, encoding="latin1")
        (tmp_path / "latents.partial").mkdir()
        extract_features(out=tmp_path / "latents", **options)
        assert {path.name: path.read_bytes() for path in (tmp_path / "latents").iterdir()} == expected
        assert not folder.exists() and not (tmp_path / "latents.partial").exists()
        shutil.rmtree(tmp_path / "latents")
