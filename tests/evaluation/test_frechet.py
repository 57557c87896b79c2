"""Frechet distance against OpenAI's evaluator and against closed forms."""


import numpy as np
import pytest

from fastdit.evaluation.frechet import frechet_distance
from helpers import GOLDEN

ARRAYS = np.load(GOLDEN / "evaluator.npz", allow_pickle=False)


def test_frechet_distance_equals_the_evaluators():
    reference, samples = ARRAYS["reference_features"], ARRAYS["sample_features"]
    assert frechet_distance(samples, reference) == pytest.approx(float(ARRAYS["frechet_distance"]), rel=1e-6)
    few = int(ARRAYS["few"])
    expected = float(ARRAYS["frechet_distance_few"])
    assert frechet_distance(samples[:few], reference) == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_of_shifted_and_scaled_copies_has_a_closed_form():
    x = np.random.default_rng(0).normal(size=(500, 6))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 3) == pytest.approx(6 * 9, rel=1e-9)
    assert frechet_distance(x, 2 * (x - x.mean(0)) + x.mean(0)) == pytest.approx(np.trace(np.cov(x.T)), rel=1e-9)


def test_features_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(5, 4\)"):
        frechet_distance(np.zeros((5, 3)), np.zeros((5, 4)))
