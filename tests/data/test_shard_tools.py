"""fastdit shards: what a folder holds, merged, split, sampled and repaired."""

import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdit.cli import main
from fastdit.data.latents import LatentCodec
from fastdit.data.loader import read_moments
from fastdit.data.loader import split as held_out
from fastdit.data.manifest import Manifest
from fastdit.data.shards import merge, repair, sample, split, stats
from fastdit.data.writer import write_keyed
from fastdit.verify import verify
from helpers.data import make_shards, tiny_vae
from helpers.shards import take, write_shards

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def made(tmp_path) -> Manifest:
    """40 images in two shards, of three classes."""
    return make_shards(tmp_path / "latents")


def values(manifest: Manifest) -> dict[int, bytes]:
    """Key -> what is stored of it, of both orientations."""
    index = manifest.index()
    both = [read_moments(manifest, index, mirrored).numpy() for mirrored in (False, True)]
    rows = zip(index, *both, strict=True)
    return {int(row["key"]): (first.tobytes(), second.tobytes(), int(row["label"])) for row, first, second in rows}


def intact(folder: Path) -> Manifest:
    assert verify(folder, say=lambda line: None) == []
    return Manifest.load(folder)


def test_stats_name_size_autoencoder_channels_and_classes(made, capsys):
    main(["shards", "stats", str(made.folder)])
    text = capsys.readouterr().out
    assert "40 images in 2 shards" in text and "latents 4x8x8 of 16 px, float16, with mirror images" in text
    assert f"channel 3: mean {made.channel_mean[3]:.4f}, standard deviation {made.channel_std[3]:.4f}" in text
    assert "3 classes of 13 to 14 images" in text and "      14  0 a" in text and "      13  2 c" in text
    many = replace(made, class_names=tuple(map(str, range(100))), class_counts=tuple(range(100)))
    (made.folder / "manifest.json").write_text(many.to_json())
    assert stats(made.folder).count("\n") < 20 < 100 < stats(made.folder, every_class=True).count("\n")
    (made.folder / made.shards[0].name).unlink()
    with pytest.raises(ValueError, match="shard-00000.tar is missing"):
        stats(made.folder)


def test_merging_keeps_all_images_in_order_with_keys_that_differ(made, tmp_path, capsys):
    rest = split(made.folder, tmp_path / "a", tmp_path / "b", count=11)
    assert [len(part) for part in rest] == [29, 11] and [part.images for part in rest] == [40, 40]
    main(["shards", "merge", *(str(part.folder) for part in rest), str(tmp_path / "both")])
    assert "40 images" in capsys.readouterr().out
    both = intact(tmp_path / "both")
    first, second = (values(part) for part in rest)
    assert values(both) == first | {40 + key: value for key, value in second.items()}
    assert both.class_counts == made.class_counts and both.images == 80
    np.testing.assert_allclose(both.channel_std, made.channel_std, rtol=1e-12)


def test_folders_that_differ_are_not_merged(made, tmp_path):
    half = make_shards(tmp_path / "scaled", scale=0.09)
    other = replace(made, class_names=("a", "b", "x"), images=0)
    write_keyed(((k, np.ones((2, 8, 8, 8)), 0) for k in range(3)), tmp_path / "names", other)
    write_shards(((np.ones((1, 8, 8, 8)), 0) for _ in range(3)), tmp_path / "one", replace(made, orientations=1))
    for folder, message in (
        (half.folder, "have scale 0.09"), (tmp_path / "names", "names has other class names than"),
        (tmp_path / "one", "one has mirror images False, not True"), (made.folder, "is named twice"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            merge([made.folder, folder], tmp_path / "out")
    with pytest.raises(ValueError, match="two folders or more"):
        merge([made.folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", [{"fraction": 0.3}, {"count": 12}, {"per_class": 4}])
def test_a_split_is_stable_and_loses_nothing(way, made, tmp_path):
    train, val = split(made.folder, tmp_path / "train", tmp_path / "val", **way)
    intact(train.folder), intact(val.folder)
    assert values(train) | values(val) == values(made) and len(train) + len(val) == 40
    chosen = set(values(val))
    if "fraction" in way:  # what data.val_fraction holds out
        assert chosen == set(held_out(made, 0.3)[1].index()["key"].tolist())
    else:
        assert len(val) == 12
    if "per_class" in way:
        assert val.class_counts == (4, 4, 4)
    grown = {key: 1.5 * value if key == "fraction" else value + 3 for key, value in way.items()}
    larger = split(made.folder, tmp_path / "t", tmp_path / "v", **grown)[1]
    assert chosen < set(values(larger))
    [batch] = take(train, 1, global_batch=4, seed=0)
    assert batch.moments.shape == (4, 8, 8, 8)


def test_random_images_are_a_sheet_or_a_folder(made, tmp_path, capsys):
    tiny_vae(scaling_factor=0.18215).save_pretrained(tmp_path / "vae")
    codec = LatentCodec.load(tmp_path / "vae")
    about = replace(made, latents=replace(made.latents, vae=str(tmp_path / "vae"), codec=codec.fingerprint), images=0)
    again = write_keyed(((k, m, y) for k, (m, y) in enumerate(arrays(made))), tmp_path / "own", about)
    main(["shards", "sample", str(again.folder), str(tmp_path / "sheet.png"), "--per-class", "3"])
    assert Image.open(tmp_path / "sheet.png").size == (8 * 18 - 2, 2 * 18 - 2)  # nine images of 16 px, eight in a row
    for out, words in (("sheet.png", "sheet.png exists; choose another name"), ("a.jpg", "must be a file that ends")):
        with pytest.raises(ValueError, match=words):
            sample(again.folder, tmp_path / out)
    sample(again.folder, tmp_path / "sheet.png", per_class=1, overwrite=True)
    assert Image.open(tmp_path / "sheet.png").size == (3 * 18 - 2, 16)
    sample(again.folder, tmp_path / "few", count=5, seed=1)
    few = intact(tmp_path / "few")
    assert len(few) == 5 and values(few).items() <= values(again).items()
    sample(again.folder, tmp_path / "others", count=5, seed=2)
    assert values(Manifest.load(tmp_path / "others")) != values(few)


def arrays(manifest: Manifest) -> list[tuple[np.ndarray, int]]:
    index = manifest.index()
    both = [read_moments(manifest, index, mirrored).numpy() for mirrored in (False, True)]
    return [(np.stack(pair), int(label)) for *pair, label in zip(*both, index["label"], strict=True)]


def flip_byte(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x40
    path.write_bytes(data)


def test_damaged_samples_are_dropped_and_named(made, tmp_path, capsys):
    row = made.index()[7]
    flip_byte(made.folder / made.shards[int(row["shard"])].name, int(row["offset"]) + 5)
    main(["shards", "repair", str(made.folder), str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert f"dropped: sample {row['key']:09d} of" in text and "39 of 40 images" in text
    assert intact(tmp_path / "out").index()["key"].tolist() == [key for key in range(40) if key != row["key"]]
    with pytest.raises(ValueError, match="save the others with fastdit shards repair"):
        split(made.folder, tmp_path / "a", tmp_path / "b", count=3)


@pytest.mark.parametrize("damage", ["lost index", "cut", "header", "foreign member", "lost shard", "label", "nothing"])
def test_the_index_is_made_again_from_the_tars(damage, made, tmp_path):
    expected, said, second = values(made), [], made.folder / made.shards[1].name
    if damage != "lost shard":
        (made.folder / "index.npy").unlink()
    if damage == "cut":
        second.write_bytes(second.read_bytes()[: second.stat().st_size // 2])
    elif damage == "header":
        flip_byte(second, header_of(second, 5))
    elif damage == "foreign member":
        with tarfile.open(second, "a") as tar:
            info = tarfile.TarInfo("../../outside.npy")
            tar.addfile(info)
    elif damage == "lost shard":
        second.unlink()
    elif damage == "label":
        place = header_of(second, 1) + 512  # of the first label
        data = second.read_bytes()
        second.write_bytes(data[:place] + b"7" + data[place + 1 :])
    found = repair(made.folder, tmp_path / "out", say=said.append)
    intact(tmp_path / "out")
    assert values(found).items() <= expected.items() and not (tmp_path.parent / "outside.npy").exists()
    least = {"label": 39, "cut": 30, "header": 27, "lost shard": 25}.get(damage, 40)
    assert len(found) >= least and (len(found) == 40) == (least == 40)
    if len(found) < 40 or damage == "foreign member":
        assert any(line.startswith("dropped: ") for line in said)


def test_without_an_index_each_shard_that_may_hold_damaged_values_is_named(made, tmp_path):
    row, said = made.index()[7], []
    damaged = made.folder / made.shards[int(row["shard"])].name
    flip_byte(damaged, int(row["offset"]) + 5)
    (made.folder / "index.npy").unlink()
    repair(made.folder, tmp_path / "out", say=said.append)
    assert [line.split(" is damaged: ")[0] for line in said if "SHA-256" in line] == [f"warning: {damaged}"]


def header_of(path: Path, number: int) -> int:
    with tarfile.open(path) as tar:
        return tar.getmembers()[number].offset


def test_impossible_numbers_are_refused(made, tmp_path):
    for way, message in (
        ({}, "give one of --fraction, --count and --per-class, not 0"),
        ({"count": 3, "per_class": 1}, "not 2 of them"),
        ({"count": 41}, "--count=41 must be above 0 and at most 40"),
        ({"per_class": 14}, "--per-class=14 must be above 0 and at most 13"),
        ({"fraction": 1.5}, "--fraction=1.5 must be above 0 and at most 1"),
        ({"fraction": 1e-9}, "0 of 40 images .* leave one folder empty"),
    ):
        with pytest.raises(ValueError, match=message):
            split(made.folder, tmp_path / "a", tmp_path / "b", **way)
    assert not (tmp_path / "a").exists()
    for way in ({"per_class": 0}, {"count": 0}):  # 64 is for neither
        with pytest.raises(ValueError, match=f"--{next(iter(way)).replace('_', '-')}=0 must be above 0"):
            sample(made.folder, tmp_path / "sheet.png", **way)
    assert values(intact(sample(made.folder, tmp_path / "b"))) == values(made)  # by default 64, or all where fewer
    (made.folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="has no manifest.json"):
        repair(made.folder, tmp_path / "out")


def test_a_result_replaces_neither_another_nor_what_it_is_made_from(made, tmp_path):
    other = make_shards(tmp_path / "other", spread=4.0)
    before, own, link = values(made), made.folder, tmp_path / "link"
    link.symlink_to(own)
    for make in (
        lambda: split(own, tmp_path / "a", tmp_path / "a", count=5, overwrite=True),
        lambda: split(own, own, tmp_path / "a", count=5, overwrite=True),
        lambda: split(own, tmp_path / "a", link, count=5, overwrite=True),
        lambda: merge([own, other.folder], own, overwrite=True),
        lambda: sample(own, own, count=5, overwrite=True),
        lambda: repair(own, link, overwrite=True),
    ):
        with pytest.raises(ValueError, match="is named twice; give each result a new folder"):
            make()
    assert values(intact(own)) == before and not (tmp_path / "a").exists()
