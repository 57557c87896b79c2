"""300 images of every kind that people have: each one's pixels, what is said about them, and what is not read."""

import contextlib
import os

import numpy as np
import pytest
import torch

from fastdit.data.images import center_crop, load_crop, to_pixels
from fastdit.data.latents import LatentCodec
from fastdit.data.manifest import Manifest
from fastdit.data.sources import list_images
from helpers import awkward
from helpers.data import tiny_vae
from helpers.extraction import run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    base = tmp_path_factory.mktemp("awkward")
    cases, counted = awkward.make(base / "images")
    tiny_vae().save_pretrained(base / "vae")
    with open(base / "said", "w") as file, contextlib.redirect_stderr(file):
        run(base, base / "out", dtype="float32", batch_size=32, shard_size=128)
    return base, cases, counted


def test_every_kind_has_its_pixels(made):
    base, cases, _ = made
    assert len({case.kind for case in cases.values()}) == 29 + awkward.AVIF
    places = np.array([5, 26])
    for path, case in cases.items():
        crop = load_crop(base / "images" / path, 32)
        found = crop[places][:, places].astype(int)  # one pixel of each quadrant
        assert np.abs(found - case.colors.astype(int)).max() <= case.tolerance, (case.kind, path, found, case.colors)


def test_every_image_is_in_the_shards(made):
    base, cases, _ = made
    manifest, source = Manifest.load(base / "out"), list_images(base / "images")
    assert manifest.class_names == ("Fußgänger", "birds", "with space", "犬")
    assert (manifest.images, manifest.skipped, len(manifest)) == (300, 3, 297)
    codec, index = LatentCodec.load(base / "vae"), {row["key"]: row for row in manifest.index()}
    for key, path in enumerate(source.paths):
        if path not in cases:
            assert key not in index
            continue
        row = index[key]
        assert manifest.class_names[row["label"]] == path.split("/")[0]
        pixels = to_pixels(torch.from_numpy(load_crop(base / "images" / path, 32)))[None]
        expected = torch.stack([codec.encode(pixels)[0], codec.encode(pixels.flip(-1))[0]]).numpy()
        with (manifest.folder / manifest.shards[row["shard"]].name).open("rb") as tar:
            tar.seek(row["offset"])
            stored = np.frombuffer(tar.read(expected.nbytes), "<f4").reshape(expected.shape)
        np.testing.assert_allclose(stored, expected, atol=1e-4, rtol=1e-3)


def test_what_was_done_is_counted_and_what_was_not_read_is_named(made):
    base, _, counted = made
    assert Manifest.load(base / "out").counts == dict(counted)
    said = (base / "said").read_text()
    assert f"images={base}/images: class folders, 300 images, 4 classes\n" in said
    assert f"of these: {', '.join(f'{n} x {what}' for what, n in sorted(counted.items()))}\n" in said
    assert "297 images in 3 shards" in said and "3 unreadable images listed in skipped.txt" in said
    assert "preview.png" in said and (base / "out" / "preview.png").is_file()
    lines = dict(line.split("\t") for line in (base / "out" / "skipped.txt").read_text().splitlines())
    assert {path for path in lines if "Error" in lines[path]} == {f"birds/{name}" for name in awkward.CORRUPT}
    assert {path: reason for path, reason in lines.items() if "Error" not in reason} == {
        "犬/notes.txt": "name ends in .txt",
        "犬/photo.heic": "name ends in .heic",
        "犬/Thumbs.db": "name ends in .db",
        "犬/no suffix": "name ends in no suffix",
        "犬/scan.pdf": "name ends in .pdf",
        "犬/page.svg": "name ends in .svg",
        "birds/pipe.png": "not a regular file",
        "birds/broken.jpg": "not a regular file",
        "birds/loop": "a second path to a folder that was already read",
    }


def test_adm_exact_leaves_out_what_adm_does_not_do(made, tmp_path, capfd):
    base, cases, _ = made
    for path, case in cases.items():
        with awkward.Image.open(base / "images" / path) as image:
            expected = image.convert("RGB")
        crop = load_crop(base / "images" / path, 32, adm_exact=True)
        np.testing.assert_array_equal(crop, np.asarray(center_crop(expected, 32)))
        found = crop[[5, 26]][:, [5, 26]].astype(int)
        same = np.abs(found - case.colors.astype(int)).max() <= case.tolerance
        # Pillow turns a TIFF by itself, and reads the high byte of 16-bit RGB
        differs = case.kind in ("RGBA", "LA", "P with a hole", "16-bit", "32-bit") or (
            case.kind.startswith("EXIF") and awkward.TURNED in case.counted and case.suffix != "tif"
        )
        assert same or differs, (case.kind, path)
    run(base, tmp_path / "out", adm_exact=True)
    counts = Manifest.load(tmp_path / "out").counts
    assert counts["EXIF orientation not applied"] == sum(awkward.TURNED in c.counted for c in cases.values())
    assert counts["transparency dropped"] == sum(awkward.WHITE in c.counted for c in cases.values())
    assert awkward.TURNED not in counts and awkward.WHITE not in counts


def test_names_that_are_not_text_are_extracted_and_named(tmp_path):
    cases, _ = awkward.make(tmp_path / "images", count=20)
    tiny_vae().save_pretrained(tmp_path / "vae")
    for name in awkward.CORRUPT:
        (tmp_path / "images" / "birds" / name).unlink()
    first = tmp_path / "images" / next(iter(cases))
    for name in (b"\xff\xfe.png", b"a\tb\nc.png"):
        path = os.fsencode(first.parent) + b"/" + name
        with open(path, "wb") as file:
            file.write(b"no image" if b"\n" in name else first.read_bytes())
    manifest = run(tmp_path, tmp_path / "out")
    assert len(manifest) == len(cases) + 1 and manifest.skipped == 1
    assert "birds/a\\tb\\nc.png\t" in (tmp_path / "out" / "skipped.txt").read_text()
