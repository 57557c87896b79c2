"""A run against a reference curve: inside the band, outside it, or of other settings."""

import json
from dataclasses import replace

import numpy as np
import pytest

from fastdit.config import load_config
from fastdit.evaluation.curve import ReferenceCurve, curve_file, settings_of
from fastdit.evaluation.loss import BINS

FLAT = [1.0] * BINS


@pytest.fixture
def curve(tmp_path):
    """The loss is 1 with a standard deviation of 0.01: of three runs, the band is 9.925 sqrt(4/3) times that (Student's
    t with two degrees of freedom, from a table). In the bins it is 3%."""
    config = load_config("quickstart")
    points = [{"step": 100, "loss": [1.0, 0.01], "bins": [[1.0, 0.001]] * BINS}]
    path = tmp_path / "mine_curve.json"
    path.write_text(json.dumps({"settings": settings_of(config), "runs": 3, "points": points}))
    return path


def test_a_loss_is_inside_or_outside_of_the_band(curve):
    reference = ReferenceCurve.load(str(curve), load_config("quickstart"))
    assert not reference.unlike
    assert reference.compare(100, 1.11, FLAT) == "inside the band of mine (3 runs)"
    assert reference.compare(100, 1.12, FLAT) == "above the band of mine (3 runs), which is 1.0000 +- 0.1146"
    assert reference.compare(100, 0.88, FLAT).startswith("below the band of mine")
    bins = [*FLAT[:3], 1.02, 1.04, *FLAT[5:-1], 0.5]
    assert reference.compare(100, 1.0, bins) == "inside the band of mine (3 runs), except at t = 0.20-0.25, 0.95-1.00"
    assert reference.compare(101, 9.0, FLAT) == ""
    assert "outside" in reference.compare(100, float("nan"), FLAT)


def test_another_run_is_outside_as_often_as_the_level_says(curve):
    """Runs from a normal distribution, the curve from three others: 1% of 4,000 is 40 +- 6."""
    config, random, outside = load_config("quickstart"), np.random.default_rng(0), 0
    made = ReferenceCurve.load(str(curve), config)
    for *others, new in random.normal(1, 0.1, (4000, 4)):
        point = np.array([[np.mean(others), np.std(others, ddof=1)], *[[1, 0.001]] * BINS])
        outside += "inside" not in replace(made, points={100: point}).compare(100, new, FLAT)
    assert abs(outside - 40) < 4 * 6.3


def test_other_settings_are_named(curve):
    changed = load_config("quickstart", ["training.lr=1e-3", "model.variant=DiT-S/2"])
    assert ReferenceCurve.load(str(curve), changed).unlike == ("model.variant=DiT-Ti/2", "training.lr=0.002")


def test_the_included_curve_is_that_of_the_included_config():
    config = load_config("quickstart")
    reference = ReferenceCurve.load("quickstart", config)
    assert curve_file("quickstart").name == "quickstart_curve.json" and not reference.unlike and reference.runs >= 3
    assert max(reference.points) == config.training.steps
    first, last = (reference.points[step][0, 0] for step in (min(reference.points), max(reference.points)))
    assert last < first


ONE = '{"points": [{"step": 1, "loss": [1, 1], "bins": []}]}'


@pytest.mark.parametrize("text", ["[]", '{"points": []}', ONE, "no"])
def test_a_file_that_is_no_curve_is_named(tmp_path, text):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ValueError, match="training.loss_reference=.*file.json is not a reference curve: "):
        ReferenceCurve.load(str(tmp_path / "file.json"), load_config("quickstart"))
