"""What the page is made of: warnings, losses, neighbors, curves; each against a known answer."""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastdit.config import config_from
from fastdit.data.loader import read_moments
from fastdit.environment import command, hardware, version
from fastdit.report import measure, page
from fastdit.report.facts import Run, reproduce, warnings
from fastdit.report.pictures import Series, plot, sheet, short, smoothed, ticks
from fastdit.training.sheets import write_png
from helpers.data import make_shards

FALLING = [{"step": step, "loss": 1 / step} for step in range(1, 101)]


def a_run(steps=100, ema_warmup=True, **facts) -> Run:
    config = config_from({"training": {"steps": steps, "ema_warmup": ema_warmup}}, "here")
    return Run(Path("/runs/mine"), config, **{"metrics": FALLING, **facts})


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "latents")


def test_a_healthy_run_has_no_warnings(shards):
    assert warnings(a_run(manifest=shards)) == []


WARNINGS = {
    "step 100 of 200": lambda shards: a_run(steps=200),
    "the EMA is still 99% random weights": lambda shards: a_run(ema_warmup=False),
    "1 step was skipped, because the loss or the gradient was not finite: step 7": lambda shards: a_run(
        skipped=[{"step": 7}]
    ),
    "6 steps were skipped": lambda shards: a_run(skipped=[{"step": i} for i in range(6)]),
    "not finite in 1 of 101 records": lambda shards: a_run(metrics=[{"step": 0, "loss": None}, *FALLING]),
    "The loss rises: 1.5 over the last tenth of the run, 1 over its 80% to 90%": lambda shards: a_run(
        metrics=[{"step": i + 1, "loss": 3.0 if i < 80 else 1.0 if i < 90 else 1.5} for i in range(100)]
    ),
    "standard deviation of 5.4, not about 1": lambda shards: a_run(manifest=replace(
        shards, channel_std=tuple(s * 5.5 for s in shards.channel_std))),
    "Training left out 3 damaged samples of the shards": lambda shards: a_run(damaged=3),
    "2 of 40 images could not be read": lambda shards: a_run(manifest=replace(shards, skipped=2)),
}  # fmt: skip


@pytest.mark.parametrize("words", WARNINGS)
def test_each_fault_is_said_once(shards, words):
    found = warnings(WARNINGS[words](shards))
    assert len(found) == 1 and words in found[0]


def test_the_optimizer_is_the_one_of_the_run():
    run = a_run()
    assert page.optimization(run)["optimizer"] == "AdamW, learning rate 0.0001, constant"
    run.config = config_from({"training": {"optimizer": "muon", "warmup_steps": 20, "weight_decay": 0.1}}, "here")
    told = "learning rate 0.0001, constant after 20 steps of warmup, weight decay 0.1"
    assert page.optimization(run)["optimizer"] == f"Muon for the matrices of the blocks, AdamW for the rest, {told}"


def test_the_command_names_what_the_run_had():
    start = {"processes": 16, "nodes": 2, "kernels": "eager", "deepspeed_launcher": True, "device": "cuda",
             "commit": "abc123+"}  # fmt: skip
    assert reproduce(a_run(starts=[start])) == (
        "git checkout abc123\nFASTDIT_KERNELS=eager fastdit launch --gpus 8 --nodes 2 --master HOST:PORT "
        "train /runs/mine/config.yaml run_dir=/runs/mine-again training.engine=deepspeed"
    )
    assert reproduce(a_run()) == "fastdit train /runs/mine/config.yaml run_dir=/runs/mine-again"
    run = a_run()
    run.folder = Path("/my runs/a, $b")
    assert shlex.split(reproduce(run)) == ["fastdit", "train", "/my runs/a, $b/config.yaml",
                                           "run_dir=/my runs/a, $b-again"]  # fmt: skip


def test_the_environment_is_this_one(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/fastdit", "train", "a b", "x=1"])
    assert command() == "fastdit train 'a b' x=1"
    monkeypatch.setattr("sys.argv", ["/home/me/train.py", "--resume"])
    assert command() == "python train.py --resume"
    assert version("torch") == torch.__version__.partition("+")[0] or version("torch") == torch.__version__
    assert version("no-such-package") is None and " core" in hardware(torch.device("cpu"))


def test_a_copy_of_a_training_image_is_found_also_mirrored(shards):
    index, spec = shards.index(), shards.latents
    latents = read_moments(shards, index)[:, :4] * spec.scale
    labels = [int(label) for label in index["label"][: measure.SAMPLES]]
    x_0 = latents[: measure.SAMPLES].clone()
    x_0[1] = x_0[1].flip(-1)
    x_0[2] = latents[0] if labels[2] != labels[0] else latents[1]  # of another class: not found
    config = config_from({"data": {"num_classes": 3}}, "here")
    codec = SimpleNamespace(decode=lambda x: x[:, :3])
    found = measure.Measured(labels=labels)
    measure.compare(found, SimpleNamespace(config=config, codec=codec), shards, x_0)
    first = [neighbors.distances[0] for neighbors in found.neighbors]
    assert [d < 1e-6 for d in first] == [True, True, False, True, True, True]
    # two independent images differ by sqrt(2) times their deviation, 5 x 0.18215; the nearest of some by a bit less
    assert 0.8 < first[2] / (2**0.5 * 5 * 0.18215) < 1 and 0.8 < found.between_real / (2**0.5 * 5 * 0.18215) < 1
    assert found.searched == 14 and found.real.shape == (16, 8, 8, 3)
    assert found.neighbors[0].images.shape == (4, 8, 8, 3)


def test_moments_are_read_without_the_damaged_ones(tmp_path):
    shards = make_shards(tmp_path / "latents")
    whole = read_moments(shards, shards.index())
    path = tmp_path / "latents" / shards.shards[0].name
    data = bytearray(path.read_bytes())
    data[int(shards.index()["offset"][3])] ^= 1
    path.write_bytes(data)
    assert torch.equal(read_moments(shards, shards.index()[:6]), whole[[0, 1, 2, 4, 5]])


def test_smoothing_is_the_mean_of_the_points_around():
    values = np.random.default_rng(0).normal(size=200)
    values[[0, 77, 78]] = np.nan
    wanted = [np.nanmean(values[max(0, i - 5) : i + 6]) for i in range(200)]
    np.testing.assert_allclose(smoothed(values), wanted)
    assert np.array_equal(smoothed(values[1:3]), values[1:3])


def points(figure: str, kind: str) -> list[np.ndarray]:
    """The points of the curves of a class, as they stand in the SVG."""
    paths = re.findall(rf'<path class="{kind}" d="M([^"]+)"', figure)
    return [np.array([pair.split() for pair in re.sub(r"[hZ].*", "", path).split("L")], float) for path in paths]


@pytest.mark.parametrize("log", [False, True])
def test_a_curve_is_where_its_values_say_and_has_gaps(log):
    y = np.array([1.0, 10.0, np.nan, 1000.0, 100.0])
    figure = plot("A < B", [Series(np.arange(5.0), y)], log=log)
    first, second = points(figure, "s0")
    height = np.log(y) if log else y
    ups = np.concatenate([first, second])[:, 1]
    places = height[~np.isnan(y)]
    slope, _ = np.polyfit(places, ups, 1)
    np.testing.assert_allclose(ups - ups[0], slope * (places - places[0]), atol=0.15)
    assert slope < 0 and len(first) == len(second) == 2 and first[0, 0] == 52 and second[-1, 0] == 344
    assert "A &lt; B" in figure and figure.count("<text") >= 6


def test_plots_of_nothing_of_one_point_and_of_a_constant():
    empty = np.array([])
    assert plot("a", [Series(empty, empty)]) == plot("a", [Series(np.ones(1), np.full(1, np.nan))]) == ""
    assert plot("a", [Series(np.ones(1), -np.ones(1))], log=True) == ""
    for x in (np.ones(1), np.arange(3.0)):
        assert "nan" not in plot("a", [Series(x, 0 * x)], zero=True) + plot("a", [Series(x, x * 0 + 2)], log=True)
    long = plot("a", [Series(np.arange(1e5), np.arange(1e5))])
    assert len(points(long, "s0")[0]) == 300 and len(long) < 8000


def test_ticks_are_round_and_numbers_are_short():
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(0.9, 2.1, log=True) == pytest.approx([1, 1.25, 1.5, 1.75, 2])
    assert ticks(0.03, 3, log=True) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1, 2])
    assert ticks(1e-9, 1, log=True)[:2] == pytest.approx([1e-9, 1e-7])
    assert [short(v) for v in (0, 0.25, 1e-4, 5e-5, 1.25e-6, 20000, 1.5e6)] == [
        "0", "0.25", "0.0001", "5e-5", "1.25e-6", "20k", "1.5M"]  # fmt: skip


def test_a_sheet_places_images_row_by_row_and_shrinks_large_ones():
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.full((1, 32, 32, 3), 10, np.uint8)
    whole = np.asarray(sheet(images, 4))
    assert whole.shape == (66, 134, 4) and whole[0, 34 * 3, 0] == 30 and whole[34, 34, 0] == 50
    assert whole[0, 33, 3] == 0 and whole[60, 120, 3] == 0  # transparent between images and after the last one
    assert sheet(np.zeros((2, 256, 512, 3), np.uint8), 2).size == (2 * 128 + 8, 64)


def test_what_was_measured_during_training_is_on_the_page(tmp_path):
    events = [{"step": 50 * k, "monitor_s": 1.0, "val_loss": 1 / k, "val_bins": [1.0] * 20, "eval_frechet": 9.0 / k}
              for k in (1, 2)]  # fmt: skip
    result = {"step": 100, "distance": "FD (tiny)",
              "real": {"frechet": 1.25, "num_images": 300, "reference_images": 300},
              "values": {"frechet": 4.5, "frechet_infinity": 2.5, "frechet_infinity_error": 3.5, "kid": 0.25,
                         "kid_error": 0.125},
              "protocol": {"num_images": 500, "features_dim": 200, "reference": {"images": 600}, "samples": {
                  "weights": "ema", "seed": 0, "sampling": {"sampler": {"name": "heun"}, "steps": "20",
                                                            "cfg_scale": 1.4}}}}  # fmt: skip
    run = a_run(measured=events, evaluations=[result])
    run.folder = tmp_path
    found = page.quality(run)
    how = "500 samples of step 100, ema, heun, 20 steps, guidance 1.4, seed 0, against 600 real images"
    assert found["FD (tiny)", how] == "4.5" and found["KID", "the same samples"] == "0.25 ± 0.125"
    assert found["frechet infinity", "the same samples"] == "2.5 ± 3.5 (rough)"
    assert found["real against real", "300 against 300 images"] == "1.25"
    assert found["validation loss", "of the EMA at step 100, on images that the run held out"] == "0.5"
    steps, losses = run.curve("val_loss")
    assert steps.tolist() == [50, 100] and losses.tolist() == [1.0, 0.5]
    shown = page.curves([run], [measure.Measured()])
    assert "FD (tiny)" in shown and shown.count("dashed") == 3 and "Dashed: the EMA on images" in shown
    assert page.strips(run, measure.Measured()) == ""
    (tmp_path / "monitor").mkdir()
    write_png(np.zeros((20, 30, 3), np.uint8), tmp_path / "monitor" / "strip.png")
    assert 'alt="samples made during training"' in page.strips(run, measure.Measured())


def test_damaged_lines_of_what_was_measured_do_no_harm(tmp_path):
    event = {"step": 5, "monitor_s": 1, "val_loss": None, "val_bins": [None] * 3, "eval_frechet": "x"}
    result = {"step": 5, "distance": None, "values": {"frechet": None}, "protocol": {"samples": 3}}
    run = a_run(measured=[event], evaluations=[result])
    assert page.quality(run) == {} and "dashed" not in page.curves([run], [measure.Measured()])
