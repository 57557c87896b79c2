"""Metrics against OpenAI's evaluator, direct transcriptions of their formulas, and closed forms; sums in any order."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image import fid, inception, kid

from fastdit.evaluation.metrics import (
    METRICS,
    Features,
    density_coverage,
    frechet_distance,
    frechet_error,
    frechet_infinity,
    inception_score,
    kernel_distance,
    neighbor_radii,
    precision_recall,
)
from fastdit.evaluation.moments import GRID, Moments, MomentSums, moments_of
from helpers import GOLDEN

ARRAYS = np.load(GOLDEN / "evaluator.npz", allow_pickle=False)
REFERENCE, SAMPLES = ARRAYS["reference_features"], ARRAYS["sample_features"]
RANDOM = np.random.default_rng(0)
X, Y = (RANDOM.normal(size=(n, 7)).astype(np.float32) + shift for n, shift in ((90, 0.0), (70, 0.3)))


def rows(array):
    return torch.from_numpy(array).double()


def test_the_frechet_distance_equals_the_evaluators():
    assert frechet_distance(SAMPLES, REFERENCE) == pytest.approx(float(ARRAYS["frechet_distance"]), rel=1e-6)
    few, expected = int(ARRAYS["few"]), float(ARRAYS["frechet_distance_few"])
    assert frechet_distance(SAMPLES[:few], REFERENCE) == pytest.approx(expected, rel=1e-5)


def test_precision_and_recall_equal_the_evaluators_exactly():
    for features, key in ((REFERENCE, "radii_reference_k3"), (SAMPLES, "radii_sample_k3")):
        squares = neighbor_radii(rows(features), 3) ** 2
        rounding = 3 * 2**-11 * (features**2).sum(1).max()  # the evaluator adds three terms in half precision
        np.testing.assert_allclose(squares, ARRAYS[key][:, 0], rtol=0, atol=rounding)
    assert precision_recall(rows(SAMPLES), rows(REFERENCE)) == (ARRAYS["precision"].item(), ARRAYS["recall"].item())


def test_the_inception_score_equals_the_evaluators():
    score = inception_score(ARRAYS["probabilities"], int(ARRAYS["inception_split_size"]))
    assert score == pytest.approx(float(ARRAYS["inception_score"]), rel=1e-12)
    assert inception_score(np.eye(10)) == pytest.approx(10)  # sure of one class each, all classes equally often
    assert inception_score(np.full((10, 10), 0.1)) == pytest.approx(1)


def test_the_frechet_distance_equals_scipys_matrix_square_root():
    a, b = np.cov(X.T.astype(np.float64)), np.cov(Y.T.astype(np.float64))
    mean = X.mean(0, dtype=np.float64) - Y.mean(0, dtype=np.float64)
    expected = mean @ mean + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert frechet_distance(X, Y) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(moments_of(X), Y) == frechet_distance(X, moments_of(Y)) == frechet_distance(X, Y)


def test_the_frechet_distance_of_gaussians_has_a_closed_form():
    x = np.random.default_rng(0).normal(size=(500, 6))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 3) == pytest.approx(6 * 9, rel=1e-8)
    assert frechet_distance(x, 2 * (x - x.mean(0)) + x.mean(0)) == pytest.approx(np.trace(np.cov(x.T)), rel=1e-8)
    a, b = np.array([4.0, 9.0, 0.0]), np.array([1.0, 0.0, 25.0])  # both singular
    distance = frechet_distance(Moments(np.zeros(3), np.diag(a)), Moments(np.ones(3), np.diag(b)))
    assert distance == pytest.approx(3 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-12)


def test_infinitely_many_samples_have_the_distance_of_their_gaussian_within_the_error_bar():
    a, b = Moments(np.full(8, 0.1), np.diag(np.linspace(0.2, 2, 8))), Moments(np.zeros(8), np.eye(8))
    truth, found, biased = frechet_distance(a, b), [], []
    for seed in range(24):
        samples = a.mu + np.random.default_rng(seed).normal(size=(100, 8)) * np.sqrt(np.diag(a.sigma))
        found.append(frechet_infinity(samples, b, seed=seed))
        biased.append(frechet_distance(samples, b) - truth)
    values, errors = np.array(found).T
    assert abs(values.mean() - truth) < 3 * values.std() / 24**0.5 < np.mean(biased)  # the bias is found, and removed
    assert values.std() == pytest.approx(errors.mean(), rel=0.4)


@pytest.mark.parametrize("shift", [0, 0.3])
@pytest.mark.parametrize("count", [12, 24, 96])  # of 24 features
def test_the_error_of_the_frechet_distance_is_the_spread_over_new_samples(count, shift):
    """At most 3.5 times too large, where the distance is mostly bias; never much too small."""
    reference, found = Moments(np.zeros(24), np.eye(24)), []
    for seed in range(24):
        samples = np.random.default_rng(seed).normal(shift, size=(count, 24))
        found.append((frechet_distance(samples, reference), frechet_error(samples, reference, seed)))
    values, errors = np.array(found).T
    assert 0.7 < errors.mean() / values.std(ddof=1) < 3.5
    if shift and count == 96:  # the distance is mostly not bias
        assert errors.mean() == pytest.approx(values.std(ddof=1), rel=0.4)


def test_the_error_leaves_out_each_group_in_turn():
    """A transcription of the formula, for fewer and for more samples than features."""
    for count in (4, 7, 23, 70):
        groups = np.random.default_rng(2).permutation(count) % 10
        left = [frechet_distance(np.delete(Y[:count], groups == g, 0), X) for g in range(min(10, count))]
        variance = (len(left) - 1) / len(left) * sum((value - np.mean(left)) ** 2 for value in left)
        assert frechet_error(Y[:count], X, seed=2) == pytest.approx(variance**0.5, rel=1e-5)


@pytest.mark.parametrize("decay", [0, 1])
@pytest.mark.parametrize("count", [45, 60, 120, 180])  # of 60 features
def test_with_few_samples_the_extrapolation_is_nearer_to_the_truth_and_its_error_says_how_near(count, decay):
    variances = np.arange(1, 61) ** -float(decay)
    a, b = (Moments(np.full(60, mean), np.diag(variances)) for mean in (0.1, 0))
    truth, found = frechet_distance(a, b), []
    for seed in range(8):
        samples = a.mu + np.random.default_rng(seed).normal(size=(count, 60)) * variances**0.5
        value, error = frechet_infinity(samples, b, seed=seed)
        found.append((value - truth, error, frechet_distance(samples, b) - truth))
    off, error, plain = np.square(found).mean(0) ** 0.5
    assert off < error < plain and off < 0.5 * plain


def test_copies_of_real_images_are_within_the_balls_of_radius_0():
    """Real images that are there eight times have their nearest neighbors at distance 0, and so have their copies."""
    for seed in range(5):
        own = np.abs(np.random.default_rng(seed).normal(size=(6, 1280))).astype(np.float32)
        real, copies = np.repeat(own, 8, 0), np.concatenate([own, own[:1] + 50])
        assert precision_recall(rows(copies), rows(real))[0] == pytest.approx(6 / 7)
        assert density_coverage(rows(copies), rows(real)) == (pytest.approx(6 / 7 * 8 / 5), 1)


def test_precision_recall_density_and_coverage_follow_their_formulas():
    def distances(a, b):
        return np.linalg.norm(a[:, None].astype(np.float64) - b[None], axis=2)

    def radius(a, k):
        return np.sort(distances(a, a), axis=1)[:, k]

    between = distances(X, Y)
    expected = (between <= radius(Y, 3)).any(1).mean(), (between <= radius(X, 3)[:, None]).any(0).mean()
    assert precision_recall(rows(X), rows(Y)) == pytest.approx(expected, rel=1e-12)
    within = between <= radius(Y, 5)
    assert density_coverage(rows(X), rows(Y)) == pytest.approx((within.sum() / (5 * len(X)), within.any(0).mean()))
    assert precision_recall(rows(X), rows(X)) == (1, 1) and precision_recall(rows(X), rows(Y) + 99) == (0, 0)
    assert density_coverage(rows(X), rows(X))[1] == 1


def test_metrics_of_gaussians_have_closed_forms():
    """KID by the moments of both; the expected coverage of an equal distribution (Naeem et al. 2020, lemma 1)."""
    (m, s), (n, r) = (0.3, 1.2), (-0.1, 0.8)
    moments = [(mean, mean**2 + std**2, mean**3 + 3 * mean * std**2) for mean, std in ((m, s), (n, r))]
    truth = sum(weight * (a - b) ** 2 for weight, a, b in zip((3, 3, 1), *moments, strict=True))
    kids, coverages, count, k = [], [], 200, 5
    for seed in range(30):
        x, y = torch.from_numpy(np.random.default_rng(seed).normal(size=(2, 2000, 1)))
        kids.append(kernel_distance(m + s * x, n + r * y, subsets=4)[0])
        x, y = torch.from_numpy(np.random.default_rng(seed).normal(size=(2, count, 2)))
        coverages.append(density_coverage(x, y, k)[1])
    missed = np.prod([(count - i) / (2 * count - i) for i in range(1, k + 1)])
    for values, expected in ((kids, truth), (coverages, 1 - missed)):
        assert abs(np.mean(values) - expected) < 3 * np.std(values) / 30**0.5 < 0.1 * expected


def test_blocks_of_rows_change_no_neighbor(monkeypatch):
    whole = precision_recall(rows(X), rows(Y)), density_coverage(rows(X), rows(Y))
    monkeypatch.setattr("fastdit.evaluation.metrics.BLOCK", 16)
    assert (precision_recall(rows(X), rows(Y)), density_coverage(rows(X), rows(Y))) == whole


def test_the_kernel_distance_is_the_unbiased_mmd_of_the_cubic_kernel():
    def kernel(a, b):
        return (float(a.astype(np.float64) @ b) / 7 + 1) ** 3

    def within(a):
        return np.mean([kernel(a[i], a[j]) for i, j in itertools.permutations(range(len(a)), 2)])

    expected, generator = [], np.random.default_rng(5)
    for _ in range(3):
        x, y = (z[generator.permutation(len(z))[:35]] for z in (X, Y))  # half of the smaller set
        expected.append(within(x) + within(y) - 2 * np.mean([kernel(a, b) for a in x for b in y]))
    value, error = kernel_distance(rows(X), rows(Y), subsets=3, seed=5)
    assert value == pytest.approx(np.mean(expected), rel=1e-6)
    assert error == pytest.approx(np.std(expected, ddof=1) * (1 + 1 / 3) ** 0.5, rel=1e-6)  # 35 / (70 - 35) = 1
    random = np.random.default_rng(3).normal(size=(2, 3000, 7))
    value, error = kernel_distance(rows(random[0]), rows(random[1]), subset_size=200)
    assert abs(value) < 4 * error and error > 0  # unbiased: no distance between equal distributions
    values = [kernel_distance(rows(X), rows(Y), subset_size=30, seed=seed) for seed in (1, 1, 2)]
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize("shift", [0, 0.3])
def test_the_error_of_the_kernel_distance_is_the_spread_over_new_images(shift):
    """At most three times too large, where the distance is zero; never much too small."""
    found = []
    for seed in range(24):
        x, y = np.random.default_rng(seed).normal(size=(2, 300, 16))
        found.append(kernel_distance(rows(x + shift), rows(y), subsets=20))
    values, errors = np.array(found).T
    assert 0.7 < errors.mean() / values.std(ddof=1) < 3


@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize("parts", [1, 2])
def test_sums_are_exact_in_any_batches_order_and_parts(size, parts):
    features = np.concatenate([REFERENCE, -100 * REFERENCE, 1e-6 * SAMPLES])
    order = np.random.default_rng(size).permutation(len(features))
    sums = [MomentSums(features.shape[1]) for _ in range(parts)]
    for number, start in enumerate(range(0, len(features), size)):
        sums[number % parts].add(features[order[start : start + size]])
    for other in sums[1:]:
        sums[0].merge(other)
    found, expected = sums[0].moments(), moments_of(features)
    assert found.count == expected.count == len(features)
    assert (found.mu == expected.mu).all() and (found.sigma == expected.sigma).all()
    np.testing.assert_allclose(found.mu, features.mean(0, dtype=np.float64), rtol=1e-9, atol=1 / GRID)
    covariance = np.cov(features.T.astype(np.float64))
    np.testing.assert_allclose(found.sigma, covariance, rtol=1e-9, atol=1e-9 * covariance.max())


def test_the_number_of_threads_changes_no_digit():
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append([
            frechet_distance(SAMPLES, REFERENCE),
            frechet_error(SAMPLES, REFERENCE),
            frechet_error(SAMPLES[:20], REFERENCE),  # fewer than features
            frechet_infinity(SAMPLES, REFERENCE),
            kernel_distance(rows(SAMPLES), rows(REFERENCE), subsets=5),
        ])
    torch.set_num_threads(before)
    assert results[0] == results[1]


def test_every_metric_returns_named_finite_numbers():
    samples = Features(SAMPLES, ARRAYS["probabilities"], spatial=SAMPLES[:, :5])
    reference = Features(REFERENCE, spatial=moments_of(REFERENCE[:, :5]))
    values = {}
    for metric in METRICS.values():
        values |= metric(samples, reference, 0)
    assert len(values) == 12 and all(isinstance(v, float) and np.isfinite(v) for v in values.values())
    assert values["frechet_infinity"] < values["frechet"]
    assert values["spatial_frechet"] == frechet_distance(SAMPLES[:, :5], REFERENCE[:, :5])
    stated = Features(None, stated=moments_of(REFERENCE))
    assert METRICS["frechet"](samples, stated, 0)["frechet"] == values["frechet"]
    with pytest.raises(ValueError, match="mu and sigma only"):
        METRICS["kid"](samples, stated, 0)


def test_features_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(5, 4\)"):
        frechet_distance(np.zeros((5, 3)), np.zeros((5, 4)))
    with pytest.raises(ValueError, match="a covariance needs 2 images or more, not 1"):
        frechet_distance(np.zeros((1, 3)), np.zeros((5, 3)))
    for bad in (np.nan, np.inf, 2000):
        with pytest.raises(ValueError, match="finite and within 1024"):
            moments_of(np.full((3, 2), bad))
    with pytest.raises(ValueError, match="neighbor number 3 needs 4 images or more, not 3"):
        precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))
    with pytest.raises(ValueError, match="it needs 30 samples or more to extrapolate from, not 29"):
        frechet_infinity(np.zeros((29, 2)), np.zeros((9, 2)))
    with pytest.raises(ValueError, match="a standard error needs 3 samples or more, not 2"):
        frechet_error(np.zeros((2, 2)), np.zeros((9, 2)))
    assert METRICS["frechet"](Features(X[:2]), Features(Y), 0).keys() == {"frechet"}
    with pytest.raises(ValueError, match="class probabilities"):
        METRICS["inception_score"](Features(X), Features(Y), 0)
    with pytest.raises(ValueError, match="use --features inception-v3=FILE, and a reference with images or mu_s"):
        METRICS["spatial_frechet"](Features(X, spatial=X), Features(Y), 0)


class AsFeatures(torch.nn.Module):
    """For torchmetrics: what it takes for images are features already."""

    num_features = 7

    def forward(self, x):
        return x


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_distances_and_scores_equal_those_of_torchmetrics():
    def computed(metric, samples, reference):
        metric.update(samples, real=False)
        metric.update(reference, real=True)
        return metric.compute()

    exact = fid.FrechetInceptionDistance(AsFeatures()).set_dtype(torch.float64)
    assert frechet_distance(X, Y) == pytest.approx(computed(exact, rows(X), rows(Y)).item(), rel=1e-6)
    random, distances = np.random.default_rng(5), []
    for _ in range(2):  # subsets of half of the smaller set
        x, y = (rows(z)[random.permutation(len(z))[:35]] for z in (X, Y))
        exact = kid.KernelInceptionDistance(AsFeatures(), subsets=1, subset_size=35)
        distances.append(computed(exact, x, y)[0].item())
    assert kernel_distance(rows(X), rows(Y), subsets=2, seed=5)[0] == pytest.approx(np.mean(distances), rel=1e-6)
    score, logits = inception.InceptionScore(AsFeatures(), splits=1), 3 * rows(X)
    score.update(logits)
    assert inception_score(logits.softmax(1).numpy()) == pytest.approx(score.compute()[0].item(), rel=1e-6)
