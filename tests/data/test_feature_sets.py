"""Features follow their latents: in mixtures, with held-out images, and when folders are merged, split and sampled."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdit.cli import main
from fastdit.data.features import FeatureManifest, FeatureWriter, find_features, publish_features
from fastdit.data.loader import read_class_tokens, split
from fastdit.data.manifest import Manifest
from fastdit.data.opening import open_features, open_latents
from fastdit.data.shards import merge, sample
from fastdit.data.shards import split as split_folder
from fastdit.schema import ShardSet
from fastdit.verify import verify
from helpers.data import edit_manifest
from helpers.sets import write
from helpers.shards import take

pytestmark = pytest.mark.usefixtures("one_thread")
ABOUT = FeatureManifest("tiny", "5" * 64, (1, 1), 3, class_token=False, dtype="float16", precision="float32")


def add_features(folder: Path, start: int, about: FeatureManifest = ABOUT) -> None:
    """Beside latents of helpers.sets: (number % 100, number // 100, +1 or -1 by orientation) in the one patch."""
    partial = folder / "features.partial"
    partial.mkdir()
    writer = FeatureWriter(partial, 0, about.dtype)
    for row in Manifest.load(folder).index():
        number = start + int(row["key"])
        values = [[number % 100, number // 100, sign] for sign in (1, -1)]
        writer.add(int(row["key"]), np.array(values, np.float32)[:, None], int(row["label"]))
    publish_features(partial, folder / "features", about, [writer.close()])


@pytest.fixture
def sets(tmp_path) -> Path:
    """a, 7 images from 1000 on, and b, 40 from 2000 on, with features; c, 23, without."""
    for name, size, start in (("a", 7, 1000), ("b", 40, 2000), ("c", 23, 3000)):
        write(tmp_path / name, size, start)
        if name != "c":
            add_features(tmp_path / name, start)
    return tmp_path


def seen(manifest: Manifest, features: FeatureManifest, steps: int = 12, **options) -> set[int]:
    """The numbers of the images in batches, each of which has the features of its own image and orientation."""
    found = take(manifest, steps, global_batch=6, seed=1, features=features, **options)
    for batch in found:
        value = batch.moments[:, 0, 0, 0].numpy()  # (n,): the number, with the sign of the orientation
        own = batch.features.float().numpy()[:, 0, 0]  # (n, 3)
        np.testing.assert_array_equal((own[:, 0] + 100 * own[:, 1]) * own[:, 2], value)
    return {int(abs(value)) for batch in found for value in batch.moments[:, 0, 0, 0]}


def test_a_mixture_has_the_features_of_each_set(sets):
    mixed = ShardSet(str(sets / "a"), 1.0), ShardSet(str(sets / "b"), 3.0)
    manifest, features = open_latents(mixed), open_features(mixed)
    numbers = seen(manifest, features, steps=40)
    assert numbers == {*range(1000, 1007), *range(2000, 2040)} and features.facts() == ABOUT.facts()
    train, held_out = split(manifest, 0.3)
    assert seen(train, features, steps=40) == numbers - seen(held_out, features, steps=40)
    rows = manifest.index()[[3, 9, 40]]  # one of a, two of b
    values = torch.tensor([[3.0, 10, 1], [2, 20, 1], [33, 20, 1]])
    assert torch.equal(read_class_tokens(features, rows["key"]), torch.nn.functional.layer_norm(values, (3,)))
    a, b = (FeatureManifest.load(sets / name / "features") for name in "ab")
    assert features.mean == pytest.approx(0.25 * a.mean + 0.75 * b.mean) and min(a.std, b.std) < features.std


def test_held_out_images_have_their_own_features(sets):
    manifest, features = Manifest.load(sets / "b"), find_features(sets / "b")
    train, held_out = split(manifest, 0.3)
    assert seen(train, features) | seen(held_out, features) == {*range(2000, 2040)}


def test_sets_whose_features_do_not_belong_together_are_refused(sets):
    for key, value, shown in (("encoder", "other", "other"), ("weights", "6" * 64, "6" * 24), ("dtype", "int8", "int8"),
                              ("grid", (1, 2), r"\(1, 2\)"), ("class_token", True, "True")):  # fmt: skip
        shutil.rmtree(sets / "a" / "features")
        about = replace(ABOUT, **{key: value})
        if about.tokens == 1:
            add_features(sets / "a", 1000, about)
        else:  # the manifest alone
            shutil.copytree(sets / "b" / "features", sets / "a" / "features")
            edit_manifest(sets / "a/features", **{key: value})
        message = f"the features in .*a/features have {key} {shown}, those in .*b/features .*same --encoder"
        with pytest.raises(ValueError, match=message):
            open_features((ShardSet(str(sets / "b"), 1.0), ShardSet(str(sets / "a"), 1.0)))
        if about.tokens == 1:
            with pytest.raises(ValueError, match=message):
                merge([sets / "b", sets / "a"], sets / "out")
    with pytest.raises(ValueError, match="needs features, but .*c has none; add them with fastdit extract"):
        open_features((ShardSet(str(sets / "b"), 1.0), ShardSet(str(sets / "c"), 1.0)))
    assert not (sets / "out").exists()


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_merged_split_and_sampled_folders_keep_the_features_bit_for_bit(sets, dtype, capsys):
    for name, start in (("a", 1000), ("b", 2000)):
        shutil.rmtree(sets / name / "features")
        add_features(sets / name, start, replace(ABOUT, dtype=dtype))
    merge([sets / "a", sets / "b"], sets / "both")
    main(["shards", "split", str(sets / "both"), str(sets / "train"), str(sets / "val"), "--count", "11"])
    sample(sets / "both", sets / "few", count=9)
    stored = {1000 + key: data for key, data in records(sets / "a").items()}
    stored |= {2000 + key: data for key, data in records(sets / "b").items()}
    for name, count in (("both", 47), ("train", 36), ("val", 11), ("few", 9)):
        assert verify(sets / name / "features", say=lambda line: None) == []
        of_key = records(sets / name)
        assert len(of_key) == count
        for key, data in of_key.items():
            assert data == stored[1000 + key if key < 7 else 1993 + key]
        if dtype == "float16":
            numbers = seen(Manifest.load(sets / name), find_features(sets / name), steps=9)
            assert len(numbers) == count if name == "both" else numbers


def records(folder: Path) -> dict[int, bytes]:
    """Key -> the stored features of both orientations."""
    manifest = FeatureManifest.load(folder / "features")
    tars = [(manifest.folder / shard.name).read_bytes() for shard in manifest.shards]
    places = ((row, int(row["offset"])) for row in manifest.index())
    return {int(row["key"]): tars[row["shard"]][at : at + 2 * manifest.record.itemsize] for row, at in places}


def test_features_of_one_folder_alone_are_not_merged_and_can_be_left_out(sets, capsys):
    with pytest.raises(ValueError, match="c has no features, but another folder has; .* with --no-features"):
        merge([sets / "a", sets / "c"], sets / "out")
    main(["shards", "merge", str(sets / "a"), str(sets / "c"), str(sets / "out"), "--no-features"])
    assert len(Manifest.load(sets / "out")) == 30 and not (sets / "out" / "features").exists()


def test_damaged_features_leave_no_folder(sets):
    features = FeatureManifest.load(sets / "b" / "features")
    path, place = features.folder / features.shards[0].name, int(features.index()["offset"][5])
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match="sample 000000005 of .*is damaged.*extract the features again, or"):
        split_folder(sets / "b", sets / "train", sets / "val", count=3)
    assert sorted(path.name for path in sets.iterdir()) == ["a", "b", "c"]
    split_folder(sets / "b", sets / "train", sets / "val", count=3, features=False)
