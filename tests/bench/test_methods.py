"""The comparison of training methods on a data set of its own: made once, measured alike, reported with its spread."""

import json

import numpy as np
import pytest
import torch

from bench.quality import frames, methods, procgen
from fastdit.config import load_config
from fastdit.data.manifest import Manifest
from fastdit.evaluation import features
from helpers.evaluation import tiny

CLASSES = ("bars", "dots", "waves")
SIDE = 16
TINY = ["model.variant=DiT-1x16x1/4", "training.steps=8", "training.global_batch=8", "training.log_every=2",
        "training.compile=false", "training.precision=fp32", "training.validate_images=20",
        "training.lr=1e-2", "training.warmup_steps=0", "sampling.steps=2"]  # fmt: skip


def render(name: str, split: str, count: int):
    """Images that tell class, split and number."""
    for i in range(count):
        frame = np.zeros((SIDE, SIDE, 3), np.uint8)
        frame[..., CLASSES.index(name)] = 255
        frame[i % SIDE, :, :] = 100 if split == "train" else 200
        yield frame


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    threads = torch.get_num_threads()
    out = tmp_path_factory.mktemp("data")
    settings = frames.AUTOENCODER["training"] | {"steps": 3, "global_batch": 4}
    small = frames.AUTOENCODER | {"model": frames.AUTOENCODER["model"] | {"channels": [4, 8, 8]}, "training": settings}
    frames.make(out, CLASSES, {"train": 8, "held_out": 4}, render, SIDE, small)
    torch.set_num_threads(threads)
    return out


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(features.FEATURES, "efficientnet-lite0", tiny)


def test_a_set_is_what_was_rendered_with_a_hash_that_every_machine_gets(data, tmp_path):
    images, labels = frames.read_set(data / "train.tar")
    assert images.shape == (24, SIDE, SIDE, 3) and labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert (images[8:16] == np.stack([*render("dots", "train", 8)])).all()
    about = json.loads((data / frames.ABOUT).read_text())
    again = frames.write_frames(tmp_path, CLASSES, {"train": 8, "held_out": 4}, render)
    assert all(about[split] == again[split] for split in again) and about["autoencoder"]["psnr_db"] > 0
    assert (tmp_path / "train.tar").read_bytes() == (data / "train.tar").read_bytes()
    train, held = (Manifest.load(data / name) for name in ("latents", "held"))
    assert (len(train), len(held), train.latents.shape) == (24, 12, (4, 4, 4)) and train.class_names == CLASSES


def test_what_exists_is_not_made_again(data):
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}

    def unwanted(*_):
        raise AssertionError("rendered again")

    frames.make(data, CLASSES, {"train": 8}, unwanted, SIDE, {})
    assert before == {path: path.stat().st_mtime_ns for path in data.rglob("*")}


def test_the_wheel_must_be_the_one_whose_frames_are_stated(tmp_path):
    (tmp_path / "other.whl").write_bytes(b"other")
    with pytest.raises(ValueError, match="--wheel=.*other.whl has SHA-256 .*; pip download procgen==0.10.7"):
        procgen.unpack(tmp_path, tmp_path / "other.whl")


def test_every_method_is_a_config_of_both_sizes():
    for size, settings in methods.SIZES.items():
        for overrides in methods.METHODS.values():
            config = load_config("sit_s_2", [*settings, *methods.COMMON, *overrides])
            assert config.objective.name == "flow" and config.training.steps % methods.POINTS[size] == 0, size


def test_a_method_is_trained_and_measured_at_four_points_and_shown_beside_the_others(data, tmp_path, monkeypatch):
    monkeypatch.setitem(methods.SAMPLES, "cpu", 8)
    lines = {("cpu", methods.FLOOR, 0): {"floor": methods.floor(data, 8)}}
    for method in ("baseline", "modern", "repa", "reg"):
        lines["cpu", method, 0] = methods.run(method, 0, "cpu", data, TINY)
    again = methods.run("baseline", 0, "cpu", data, TINY)
    points = lines["cpu", "baseline", 0]["points"]
    assert [point["images"] for point in points] == [16, 32, 48, 64]
    assert all(0 <= a["seconds"] <= b["seconds"] for a, b in zip(points, points[1:], strict=False))
    assert [p | {"seconds": 0} for p in points] == [p | {"seconds": 0} for p in again["points"]]
    assert all(a["frechet"] != b["frechet"] for a, b in zip(points, lines["cpu", "modern", 0]["points"], strict=True))
    found = methods.table("cpu", lines)
    assert all(f"| {row} |" in found for row in ("baseline | 1 | 64", "modern | 1 | 64", "training frames, decoded"))
    methods.plot("cpu", lines, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_seconds_are_images_by_the_rates_that_were_measured_side_by_side(data, tmp_path, monkeypatch):
    rates = methods.rates("cpu", data, ["baseline", "repa"], TINY, rounds=1)
    assert rates.keys() == {"baseline", "repa"} and all(rate > 0 for rate in rates.values())
    points = [{"images": 10, "seconds": 7.0}, {"images": 20, "seconds": 9.0}]
    lines = [{"size": "cpu", "method": m, "seed": 0, "points": points} for m in ("baseline", "muon")]
    lines.append({"size": "cpu", "method": methods.RATE, "seed": 0, "rates": {"baseline": 5.0}})
    monkeypatch.setattr(methods, "RESULTS", tmp_path / "lines.jsonl")
    methods.RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = methods.newest_lines()
    assert [point["seconds"] for point in found["cpu", "baseline", 0]["points"]] == [2, 4]
    assert [point["seconds"] for point in found["cpu", "muon", 0]["points"]] == [7, 9]


def test_training_frames_are_nearer_to_the_held_out_ones_than_what_a_bad_autoencoder_makes_of_them(data):
    found = methods.floor(data, 24)
    assert 0 < found["real"]["frechet"] < found["autoencoder"]["frechet"]
    held, _ = frames.read_set(data / "held_out.tar")
    assert methods.reference(data, held)["frechet"] == pytest.approx(0, abs=1e-5)


def test_seconds_to_a_distance_are_read_off_the_curve():
    points = [{"seconds": 10, "frechet": 8.0}, {"seconds": 20, "frechet": 4.0}, {"seconds": 30, "frechet": 3.0}]
    assert methods.reached(points, 6.0) == 15 and methods.reached(points, 9.0) == 10
    assert methods.reached(points, 3.0) == 30 and methods.reached(points, 2.0) is None
    lines = [{"step": 10, "images_per_s": 20.0}, {"step": 30, "images_per_s": 40.0}]
    assert methods.seconds_of(lines, global_batch=4) == {10: 2.0, 30: 4.0}
