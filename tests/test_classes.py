"""Which class a user means, and which ones are sampled by default."""

import re
from dataclasses import replace

import numpy as np
import pytest

import fastdit
from fastdit.classes import Classes
from fastdit.convert.command import convert
from fastdit.data.manifest import Manifest
from fastdit.training import checkpoint
from fastdit.training.state import load_network
from helpers.data import make_shards

NAMED = Classes(1000, ("ant", "bee", "cat"))


def test_labels_of_images():
    assert Classes(3).labels("balanced", 5, 0) == [0, 1, 2, 0, 1]
    assert Classes(3).labels("2,0", 3, 0) == [2, 0, 2]
    drawn = Classes(3).labels("random", 3000, 0)
    assert drawn[:10] == Classes(3).labels("random", 10, 0) and all(900 < drawn.count(c) < 1100 for c in range(3))
    assert Classes(0, ("a", "b")).labels("balanced", 2, 0) == [0, 0]  # unconditional, on images with classes
    for asked in ("a", "1", ["a"], [0]):  # else the images would be recorded as of this class
        with pytest.raises(ValueError, match=re.escape(f"--labels={asked!r}: this network is unconditional")):
            Classes(0, ("a", "b")).labels(asked, 2, 0)


def test_classes_may_be_named_and_only_trained_ones_are_drawn():
    assert NAMED.labels("cat,0,bee", 4, 0) == [2, 0, 1, 2]
    assert NAMED.labels("balanced", 4, 0) == [0, 1, 2, 0]
    assert max(NAMED.labels("random", 50, 0)) == 2 and max(Classes(1000).labels("random", 50, 0)) > 2
    assert NAMED.few() == [0, 1, 2] and Classes(1000).few(4) == [0, 250, 500, 750] and Classes(0).few() == [0]
    assert Classes(2, ("a, b", "c")).chosen("a, b") == [0]
    for wrong in ("bea", "1000", "-1", "1.0", ""):
        with pytest.raises(ValueError, match=re.escape(f"{wrong!r} is not a class of this model")):
            NAMED.chosen(wrong)
    with pytest.raises(ValueError, match="did you mean 'bee'"):
        NAMED.chosen("bea")


def test_a_class_without_images_is_sampled_only_by_its_number():
    gaps = Classes(5, tuple("01234"), empty=(0, 3))
    assert gaps.trained == [1, 2, 4] and gaps.few(2) == [1, 2]
    assert gaps.labels("balanced", 4, 0) == [1, 2, 4, 1]
    assert set(gaps.labels("random", 50, 0)) == {1, 2, 4}
    assert gaps.chosen("3") == [3]


def test_names_that_are_numbers_are_not_mistaken_for_the_numbers_of_classes():
    folders = Classes(3, ("1", "2", "3"))
    assert folders.chosen("1,3") == [0, 2]
    assert folders.chosen([1, np.int64(2), "2"]) == [1, 2, 1]  # in Python, a number is a number
    with pytest.raises(ValueError, match="no class is named '0', and the classes have numbers as names; .* such as 1"):
        folders.chosen("0,1")
    assert Classes(12, tuple(f"{i:02d}" for i in range(12))).chosen("3,11") == [3, 11]


def test_a_class_named_as_a_way_to_draw_labels_is_asked_for_by_its_number():
    cards = Classes(3, ("ace", "random", "balanced"))
    for word, number in (("random", 1), ("balanced", 2)):
        with pytest.raises(ValueError, match=f"={word} is also the name of class {number}; use --labels {number}"):
            cards.labels(word, 4, 0)
        assert cards.labels([word], 2, 0) == cards.labels(str(number), 2, 0) == [number, number]
    assert cards.labels(None, 4, 0) == [0, 1, 2, 0] and cards.labels("random,ace", 2, 0) == [1, 0]


def test_a_run_knows_which_classes_had_no_images(tmp_path):
    """Also after a conversion: in checkpoints of fastdit, in official files and in folders of diffusers."""
    made = make_shards(tmp_path / "latents")
    manifest = replace(made, class_names=tuple("abcde"), class_counts=(*made.class_counts, 0, 0))
    (tmp_path / "latents" / "manifest.json").write_text(manifest.to_json())
    quick = {"steps": 1, "global_batch": 8, "compile": False, "precision": "fp32"}
    network = {"model": {"variant": "DiT-1x16x2/4"}, "objective": "flow"}
    fastdit.train(network, shards=tmp_path / "latents", run_dir=tmp_path / "run", training=quick, device="cpu")
    assert load_network(tmp_path / "run").classes == Classes(5, tuple("abcde"), (3, 4))
    assert Manifest.load(tmp_path / "latents").classes_of(5).trained == [0, 1, 2]
    for to, name in (("fastdit", "copy"), ("official", "model.pt"), ("diffusers", "pipe")):
        convert(tmp_path / "run", to, tmp_path / name, say=lambda line: None)
        back = tmp_path / name
        if to != "fastdit":
            back = convert(back, "fastdit", tmp_path / f"{to}-back", say=lambda line: None)
        assert load_network(back).classes.empty == (3, 4), to
    meta = checkpoint.read_meta(checkpoint.find(tmp_path / "run"))
    assert meta["empty_classes"] == [3, 4]
