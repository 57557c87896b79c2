"""Latent shards: samples are read as written, in an order that world size, resuming and prefetching do not change."""

import hashlib
import json
import os
import threading
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdit.data.latents import LatentCodec, LatentSpec
from fastdit.data.loader import latent_batches, on_device, replaced_keys, sample_keys
from fastdit.data.manifest import Manifest
from fastdit.data.order import mirrors, permutation
from fastdit.verify import verify
from helpers.data import edit_manifest, tiny_vae
from helpers.shards import take, write_shards

COUNT, SHAPE = 53, (4, 6, 5)  # awkward on purpose
LATENTS = LatentSpec(SHAPE, scale=0.3, shift=0.7, vae="toy", codec="f" * 64, image_size=40)
ABOUT = Manifest(LATENTS, "float16", class_names=("ant", "bee", "cat"), images=0)


def toy_samples(count: int = COUNT) -> tuple[np.ndarray, np.ndarray]:
    """Moments (count, 2, 2C, h, w) exact in float16, and labels (count,)."""
    rng = np.random.default_rng(0)
    moments = rng.normal(size=(count, 2, 2 * SHAPE[0], *SHAPE[1:]))
    moments[:, :, SHAPE[0] :] = np.abs(moments[:, :, SHAPE[0] :])
    return moments.astype(np.float16), rng.integers(0, 3, count)


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Manifest:
    out = tmp_path_factory.mktemp("shards") / "latents"
    write_shards(zip(*toy_samples(), strict=True), out, ABOUT, shard_size=11)
    return Manifest.load(out)


def test_batches_are_the_samples_in_the_stated_order(stored):
    moments, labels = toy_samples()
    batch, seed = 8, 5
    got = take(stored, 20, global_batch=batch, seed=seed)  # over three epochs
    for step, each in enumerate(got):
        assert each.step == step
        for row in range(batch):
            epoch, place = divmod(step * batch + row, COUNT)
            image = permutation(seed, epoch, COUNT)[place]
            mirrored = mirrors(seed, epoch, np.array([image]))[0]
            assert each.y[row] == labels[image] and each.y.dtype == torch.int64
            np.testing.assert_array_equal(each.moments[row].numpy(), moments[image, mirrored].astype(np.float32))


def test_without_hflip_no_image_is_mirrored(stored):
    moments, _ = toy_samples()
    [batch] = take(stored, 1, global_batch=COUNT, seed=0, hflip=False)
    np.testing.assert_array_equal(batch.moments.numpy(), moments[permutation(0, 0, COUNT), 0].astype(np.float32))


def test_world_size_and_resume_do_not_change_the_global_batches(stored):
    rng = np.random.default_rng(1)
    whole = take(stored, 30, global_batch=16, seed=9)
    for _ in range(20):
        world, start, prefetch = int(rng.integers(1, 9)), int(rng.integers(0, 28)), int(rng.integers(0, 4))
        edges = np.sort(rng.integers(0, 17, world - 1)).tolist()  # uneven shares, empty ones too
        shares = [slice(a, b) for a, b in zip([0, *edges], [*edges, 16], strict=True)]
        options = dict(global_batch=16, seed=9, start_step=start, prefetch=prefetch)
        parts = [take(stored, 2, rows=rows, **options) for rows in shares]
        for k in range(2):
            expected = whole[start + k]
            assert all(part[k].step == start + k for part in parts)
            assert torch.equal(torch.cat([part[k].moments for part in parts]), expected.moments)
            assert torch.equal(torch.cat([part[k].y for part in parts]), expected.y)


def test_an_epoch_holds_every_image_once_and_differs_from_the_others():
    orders = [permutation(3, epoch, 1000) for epoch in range(200)]
    assert all(np.array_equal(np.sort(order), np.arange(1000)) for order in orders)
    places = np.array([np.argsort(order)[:5] for order in orders])  # where images 0..4 come, by epoch
    # uniform on 0..999: mean 499.5, deviation 288.7 / sqrt(200 epochs x 5 images) = 9.1
    assert abs(places.mean() - 499.5) < 4 * 9.13
    follows = np.mean([np.mean(np.diff(order) == 1) for order in orders])
    assert abs(follows - 1e-3) < 4 * np.sqrt(1e-3 / 200_000)
    flips = np.array([mirrors(3, epoch, np.arange(1000)) for epoch in range(200)])
    assert abs(flips.mean() - 0.5) < 4 * 0.5 / np.sqrt(flips.size)
    assert np.abs(flips.mean(axis=0) - 0.5).max() < 5 * 0.5 / np.sqrt(200)  # no image is always mirrored
    assert not np.array_equal(permutation(4, 0, 1000), orders[0])


def test_the_order_never_changes_between_versions():
    assert permutation(0, 0, 12).tolist() == [0, 1, 9, 4, 11, 2, 3, 6, 8, 7, 10, 5]
    assert mirrors(0, 0, np.arange(12)).tolist() == [1, 0, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1]


def test_webdataset_reads_the_tars(stored):
    import webdataset as wds

    moments, labels = toy_samples()
    urls = [str(stored.folder / shard.name) for shard in stored.shards]
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"{i:09d}" for i in range(COUNT)]
    for i, sample in enumerate(samples):
        np.testing.assert_array_equal(sample["moments.npy"], moments[i])
        assert sample["cls"] == labels[i]


def test_manifest_says_what_is_there(stored):
    moments, labels = toy_samples()
    mean, std = np.split(moments.astype(np.float64), 2, axis=2)
    rng = np.random.default_rng(2)
    drawn = [(mean + std * rng.normal(size=std.shape) - 0.7) * 0.3 for _ in range(20)]
    np.testing.assert_allclose(stored.channel_mean, np.mean(drawn, axis=(0, 1, 2, 4, 5)), atol=0.01)
    np.testing.assert_allclose(stored.channel_std, np.std(drawn, axis=(0, 1, 2, 4, 5)), rtol=0.02)
    assert stored.class_counts == tuple(np.bincount(labels)) and len(stored) == stored.images == COUNT
    assert [shard.samples for shard in stored.shards] == [11, 11, 11, 11, 9]
    for shard in stored.shards:
        data = (stored.folder / shard.name).read_bytes()
        assert len(data) == shard.bytes and hashlib.sha256(data).hexdigest() == shard.sha256
    assert all("far from the 1 that diffusion assumes" in line for line in verify(stored.folder, lambda line: None))
    written = json.loads((stored.folder / "manifest.json").read_text())
    assert written["samples"] == COUNT and written["num_classes"] == 3 and "folder" not in written
    assert sorted(os.listdir(stored.folder)) == ["index.npy", "manifest.json", *(shard.name for shard in stored.shards)]


def test_the_same_samples_make_the_same_bytes(stored, tmp_path):
    write_shards(zip(*toy_samples(), strict=True), tmp_path / "again", ABOUT, shard_size=11)
    for path in stored.folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_float32_keeps_every_bit(tmp_path):
    moments = np.random.default_rng(3).normal(size=(4, 2, 8, 6, 5)).astype(np.float32)
    manifest = write_shards([(m, 0) for m in moments], tmp_path / "out", replace(ABOUT, dtype="float32"))
    [batch] = take(manifest, 1, global_batch=4, seed=0, hflip=False)
    np.testing.assert_array_equal(batch.moments.numpy(), moments[permutation(0, 0, 4), 0])


@pytest.fixture
def copy(stored, tmp_path) -> Manifest:
    for path in stored.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return Manifest.load(tmp_path)


def flip_bit(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_every_flipped_bit_of_a_latent_is_caught_and_named(copy):
    rng = np.random.default_rng(4)
    index = copy.index()
    size = 2 * 2 * 2 * int(np.prod(SHAPE))  # bytes of both orientations in float16
    for sample in rng.integers(0, COUNT, 60):
        row = index[sample]
        path = copy.folder / copy.shards[row["shard"]].name
        bit = int(rng.integers(0, 8 * size))
        flip_bit(path, int(row["offset"]) * 8 + bit)
        mirrored = bit // 8 >= size // 2
        seed = next(s for s in range(99) if mirrors(s, 0, np.array([sample]))[0] == mirrored)
        with pytest.raises(ValueError, match=f"sample {sample:09d} of .*{path.name} is damaged: .* crc32"):
            take(copy, 1, global_batch=COUNT, seed=seed)
        assert len(take(copy, 1, global_batch=COUNT, seed=seed, verify=False)) == 1
        flip_bit(path, int(row["offset"]) * 8 + bit)
    take(copy, 1, global_batch=COUNT, seed=0)


def damage(folder: Path, how: str) -> None:
    if how == "no manifest":
        (folder / "manifest.json").unlink()
    elif how == "cut manifest":
        (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:100])
    elif how == "format":
        text = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(text.replace('"format": 1', '"format": 9'))
    elif how == "index":
        flip_bit(folder / "index.npy", 8 * 500)
    elif how == "no index":
        (folder / "index.npy").unlink()
    elif how == "no shard":
        (folder / "shard-00002.tar").unlink()
    elif how == "cut shard":
        os.truncate(folder / "shard-00002.tar", 5000)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no manifest", "has no manifest.json; give a folder of latents, which fastdit extract or import writes"),
        ("cut manifest", "manifest.json is damaged: Unterminated|manifest.json is damaged: Expecting"),
        ("format", "manifest.json has format 9, this version reads 1"),
        ("index", "index.npy is damaged: its SHA-256"),
        ("no index", "index.npy cannot be read"),
        ("no shard", "shard-00002.tar is missing"),
        ("cut shard", "shard-00002.tar has 5000 bytes instead of"),
    ],
)
def test_damaged_folders_are_named_before_the_first_batch(copy, how, message):
    damage(copy.folder, how)
    with pytest.raises(ValueError, match=message) as error:
        latent_batches(Manifest.load(copy.folder), global_batch=4, seed=0)
    assert "\n" not in str(error.value)


def spoil(folder: Path, sample: int) -> Manifest:
    """A NaN in both orientations of a sample, with checksums that agree."""
    manifest, index = Manifest.load(folder), Manifest.load(folder).index().copy()
    path, start = folder / manifest.shards[index["shard"][sample]].name, int(index["offset"][sample])
    data, size = bytearray(path.read_bytes()), 2 * 2 * int(np.prod(SHAPE))
    for view in range(2):
        part = slice(start + view * size, start + (view + 1) * size)
        data[part.start : part.start + 2] = np.array([np.nan], "<f2").tobytes()
        index["crc32"][sample, view] = zlib.crc32(data[part])
    path.write_bytes(data)
    np.save(folder / "index.npy", index)
    digest = hashlib.sha256((folder / "index.npy").read_bytes()).hexdigest()
    edit_manifest(folder, index_sha256=digest)
    return Manifest.load(folder)


def test_labels_that_no_class_has_are_named_before_the_first_batch(copy):
    index = copy.index().copy()
    index["label"][9] = 3
    np.save(copy.folder / "index.npy", index)
    digest = hashlib.sha256((copy.folder / "index.npy").read_bytes()).hexdigest()
    edit_manifest(copy.folder, index_sha256=digest)
    with pytest.raises(ValueError, match="index.npy has labels 0 to 3, but the manifest names 3 classes"):
        latent_batches(Manifest.load(copy.folder), global_batch=4, seed=0)


def test_a_sample_that_is_not_finite_is_named(copy):
    manifest = spoil(copy.folder, 7)
    key = int(manifest.index()["key"][7])
    with pytest.raises(ValueError, match=f"sample {key:09d} of .* has values that are not finite; .*skip_damaged=true"):
        take(manifest, COUNT, global_batch=1, seed=0)


@pytest.mark.parametrize("processes", [1, 3])
def test_damaged_samples_are_replaced_by_the_next_good_one_and_said_once(stored, copy, processes):
    flip_bit(copy.folder / copy.shards[0].name, 8 * (int(copy.index()["offset"][4]) + 3))
    flip_bit(copy.folder / copy.shards[0].name, 8 * (int(copy.index()["offset"][4]) + 3 + 2 * 2 * int(np.prod(SHAPE))))
    manifest = spoil(copy.folder, 5)
    heard, whole = [], take(stored, 40, global_batch=6, seed=3, hflip=False)
    options = {"global_batch": 6, "seed": 3, "hflip": False, "skip_damaged": heard.append}
    own = 6 // processes
    parts = [take(manifest, 40, rows=slice(own * r, own * (r + 1)), **options) for r in range(processes)]
    index, samples = stored.index(), toy_samples()[0]
    for step, batch in enumerate(whole):
        moments, y = (torch.cat([getattr(part[step], name) for part in parts]) for name in ("moments", "y"))
        for i in range(6):
            epoch, position = divmod(step * 6 + i, COUNT)
            chosen = permutation(3, epoch, COUNT)[position]
            wanted = {4: 6, 5: 6}.get(chosen, chosen)
            np.testing.assert_array_equal(moments[i], samples[int(index["key"][wanted]), 0].astype(np.float32))
            assert y[i] == index["label"][wanted]
            assert chosen in (4, 5) or torch.equal(moments[i], batch.moments[i])
        keys, key = sample_keys(manifest, 3, 6, step), index["key"].tolist()
        found = replaced_keys(manifest, None, global_batch=6, seed=3, step=step, hflip=False)
        assert found == {key[i]: key[6] for i in (4, 5) if key[i] in keys}
    assert sorted({line.split(" of ")[0] for line in heard}) == sorted(
        f"sample {int(index['key'][i]):09d}" for i in (4, 5)
    )
    assert processes == 3 or len(heard) == 2


def test_verify_finds_damage_outside_the_latents(copy):
    flip_bit(copy.folder / "shard-00003.tar", 8 * 20)  # in a member's name
    assert any("shard-00003.tar is damaged: its SHA-256" in line for line in verify(copy.folder, lambda line: None))


def codec(fingerprint: str) -> LatentCodec:
    made = LatentCodec(tiny_vae())
    made.fingerprint = fingerprint
    return made


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(image_size=256), "image_size=256, but .* 40 px images; set 40 or extract again"),
        (dict(num_classes=2), "num_classes=2, but .* labels 0 to 2; set 3, or 0"),
        (dict(codec=codec("a" * 64)), "fingerprint aaaaaaaaaaaa.* is not the one that encoded .* toy"),
        (dict(global_batch=54), "global_batch=54, but .* only 53 images; use at most 53"),
    ],
)
def test_latents_that_do_not_fit_a_run(stored, settings, message):
    stored.check(image_size=40, num_classes=3, codec=codec("f" * 64), global_batch=53)
    stored.check(num_classes=0)
    stored.check(num_classes=1000)
    with pytest.raises(ValueError, match=message) as error:
        stored.check(**settings)
    assert "\n" not in str(error.value)


def test_more_than_an_epoch_in_a_batch_fails_at_once(stored):
    with pytest.raises(ValueError, match="global_batch=54"):
        latent_batches(stored, global_batch=54, seed=0)


def open_shards(manifest: Manifest) -> int:
    """How many files of the folder this process has open."""
    folder = os.path.realpath(manifest.folder)
    return sum(os.path.realpath(file).startswith(f"{folder}/") for file in Path("/proc/self/fd").iterdir())


def readers() -> int:
    return sum(thread.name.startswith("latents") for thread in threading.enumerate())


def test_closing_ends_the_thread_and_the_files(stored):
    batches = latent_batches(stored, global_batch=40, seed=0)
    next(batches)
    assert open_shards(stored) > 0 and readers() == 1
    batches.close()
    assert open_shards(stored) == readers() == 0


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))])  # fmt: skip
def test_on_a_device_the_batches_are_the_same_and_closing_ends_them_too(stored, name):
    expected = take(stored, 3, global_batch=40, seed=0)
    batches = on_device(latent_batches(stored, global_batch=40, seed=0, pin_memory=name == "cuda"), torch.device(name))
    for batch in expected:
        step, moments, y, *_ = next(batches)
        assert step == batch.step and moments.device.type == y.device.type == name
        assert torch.equal(moments.cpu(), batch.moments) and torch.equal(y.cpu(), batch.y)
    batches.close()
    assert readers() == 0


def test_many_shards_stay_below_the_limit_of_open_files(stored, monkeypatch):
    expected = take(stored, 3, global_batch=COUNT, seed=0)
    monkeypatch.setattr("fastdit.data.reader.OPEN_FILES", 2)
    opened, real_open = [], os.open

    def counting(*arguments, **options):  # in the reader's thread, the only one that opens and closes shards
        file = real_open(*arguments, **options)
        opened.append(open_shards(stored))
        return file

    monkeypatch.setattr(os, "open", counting)
    for ours, theirs in zip(take(stored, 3, global_batch=COUNT, seed=0), expected, strict=True):
        assert torch.equal(ours.moments, theirs.moments)
    assert max(opened) == 2


def test_infinite_latents_are_refused(tmp_path):
    moments = np.full((2, 8, 6, 5), 1e6)  # beyond float16
    with pytest.raises(ValueError, match="not finite as float16"):
        write_shards([(moments, 0)], tmp_path / "out", ABOUT)
    assert not list(tmp_path.iterdir())
