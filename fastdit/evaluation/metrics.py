"""Distances and scores between sets of features, in float64 on the CPU, whose number of threads changes no digit.

Every entry of METRICS takes (samples, reference, seed) as `Features` and returns named numbers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fastdit.distributed import one_thread
from fastdit.evaluation.moments import Moments, moments_of, sums_of

CPU = torch.device("cpu")
GROUPS = 10  # of the jackknife
BLOCK = 512  # rows of a distance matrix that are in memory at once


@dataclass(frozen=True)
class Features:
    """Features (N, D) of images, and class probabilities (N, classes) where the network has classes.

    A reference may have moments only, or moments of more images than `values` holds, as ADM's files do. `spatial`:
    Inception's spatial features (N, 2023), or their moments.
    """

    values: np.ndarray | None
    probabilities: np.ndarray | None = None
    stated: Moments | None = None
    spatial: np.ndarray | Moments | None = None

    @cached_property
    def moments(self) -> Moments:
        return self.stated or moments_of(self.values)

    @cached_property
    def spatial_moments(self) -> Moments:
        """ValueError without spatial features."""
        if self.spatial is None:
            raise ValueError("it needs Inception's spatial features: use --features inception-v3 and a reference with "
                             "images or mu_s and sigma_s, or leave it out")  # fmt: skip
        return self.spatial if isinstance(self.spatial, Moments) else moments_of(self.spatial)

    @property
    def rows(self) -> Tensor:
        """`values` in float64; ValueError without them."""
        if self.values is None:
            raise ValueError("the reference holds mu and sigma only, which suffice for frechet and frechet_infinity; "
                             "give images, or leave out the other metrics")  # fmt: skip
        return torch.from_numpy(self.values).double()


def frechet_distance(a: np.ndarray | Moments, b: np.ndarray | Moments) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017, arXiv 1706.08500).

    `a`, `b`: features (N, D) and (M, D), or their moments. tr((C_a C_b)^(1/2)) is the sum of the square roots of the
    eigenvalues of C_b^(1/2) C_a C_b^(1/2). This matrix is symmetric, so rank-deficient covariances (N < D) need no
    diagonal offset.
    """
    a, b = (x if isinstance(x, Moments) else moments_of(x) for x in (a, b))
    if a.mu.shape != b.mu.shape:
        shapes = [(x.count, len(x.mu)) for x in (a, b)]
        raise ValueError(f"features {shapes[0]} and {shapes[1]} do not match; use the same extractor for both")
    with one_thread(CPU):
        return _frechet(a, b, _root(b.sigma))


def _root(sigma: np.ndarray) -> Tensor:
    """The symmetric square root of a covariance (D, D)."""
    values, vectors = torch.linalg.eigh(torch.from_numpy(sigma))
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _frechet(a: Moments, b: Moments, root_b: Tensor) -> float:
    eigenvalues = torch.linalg.eigvalsh(root_b @ torch.from_numpy(a.sigma) @ root_b)
    difference = a.mu - b.mu
    trace = np.trace(a.sigma) + np.trace(b.sigma) - 2 * float(eigenvalues.clamp(min=0).sqrt().sum())
    return float(difference @ difference + trace)


def frechet_infinity(
    samples: np.ndarray, reference: np.ndarray | Moments, points: int = 15, seed: int = 0
) -> tuple[float, float]:
    """The Frechet distance for N -> infinity samples, and its standard error (Chong & Forsyth 2020, arXiv 1911.07023).

    The distance of N samples is biased by a term in 1/N. A line through the distances of `points` random subsets of
    N/2 to N of the samples (N, D), as a function of 1/size, has the extrapolated value as its intercept. The standard
    error combines that of the intercept with the sampling error of the samples, from a jackknife over 10 groups. The
    bias and the error of the reference's own size stay. Sizes start at N/2, not at the paper's N/10, and N must be at
    least 4 D: where subsets have few more images than features, the bias is not linear in 1/N.
    """
    count, least = len(samples), max(2 * points, 4 * samples.shape[1])
    if count < least:
        raise ValueError(f"{samples.shape[1]} features need {least} samples or more to extrapolate from, not {count}; "
                         "use more, or leave it out")  # fmt: skip
    b = reference if isinstance(reference, Moments) else moments_of(reference)
    random = np.random.default_rng(seed)
    sizes = np.linspace(count // 2, count, points).round().astype(int)
    with one_thread(CPU):
        root = _root(b.sigma)
        values = [_frechet(moments_of(samples[random.permutation(count)[:size]]), b, root) for size in sizes]
        groups = random.permutation(count) % GROUPS
        sums, without = sums_of(samples), []
        for group in range(GROUPS):
            part = sums_of(samples[groups == group])
            sums.merge(part, -1)
            without.append(_frechet(sums.moments(), b, root))
            sums.merge(part)
    x = np.stack([np.ones(points), 1 / sizes], axis=1)  # (points, 2)
    solution = np.linalg.lstsq(x, np.array(values), rcond=None)[0]
    fit = ((values - x @ solution) ** 2).sum() / (points - 2) * np.linalg.inv(x.T @ x)[0, 0]
    return float(solution[0]), float(np.sqrt(fit + (GROUPS - 1) * np.var(without)))


def inception_score(probabilities: np.ndarray, split_size: int = 5000) -> float:
    """exp(E KL(p(y|x) || p(y))) of class probabilities (N, classes), averaged over splits (Salimans et al. 2016).

    Splits are consecutive, as in OpenAI's evaluator; the last one may be shorter.
    """
    scores = []
    for start in range(0, len(probabilities), split_size):
        p = np.asarray(probabilities[start : start + split_size], np.float64)
        tiny = np.finfo(np.float64).tiny  # 0 log 0 = 0
        divergence = (p * (np.log(p.clip(tiny)) - np.log(p.mean(0).clip(tiny)))).sum(1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))


def neighbor_radii(x: Tensor, k: int) -> Tensor:
    """The distance of each row of x (N, D) to its k-th nearest other row: (N,)."""
    if len(x) <= k:
        raise ValueError(f"{len(x)} images have no neighbor number {k}; use {k + 1} or more")
    return torch.cat([d.kthvalue(k + 1, dim=1).values for d in _distances(x, x)])  # the row itself is the first


def _distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Euclidean distances from x (N, D) to y (M, D), in blocks of rows (<= 512, M)."""
    squares = (y * y).sum(1)
    for rows in x.split(BLOCK):
        yield ((rows * rows).sum(1, keepdim=True) + squares - 2 * rows @ y.T).clamp(min=0).sqrt()


def precision_recall(samples: Tensor, reference: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall of samples (N, D) for a reference (M, D) (Kynkaanniemi et al. 2019, 1904.06991).

    Precision: the share of samples within the ball of a reference image, whose radius is the distance to its k-th
    nearest neighbor in the reference. Recall: the same with the roles exchanged.
    """
    radii, radii_samples = neighbor_radii(reference, k), neighbor_radii(samples, k)
    precise, recalled = [], torch.zeros(len(reference), dtype=torch.bool)
    for start, d in zip(range(0, len(samples), BLOCK), _distances(samples, reference), strict=True):
        precise.append((d <= radii).any(1))
        recalled |= (d <= radii_samples[start : start + BLOCK, None]).any(0)
    return torch.cat(precise).double().mean().item(), recalled.double().mean().item()


def density_coverage(samples: Tensor, reference: Tensor, k: int = 5) -> tuple[float, float]:
    """Density and coverage of samples (N, D) for a reference (M, D) (Naeem et al. 2020, arXiv 2002.09797).

    Balls as for precision. Density: the mean number of balls that hold a sample, divided by k. Coverage: the share of
    balls that hold a sample.
    """
    radii = neighbor_radii(reference, k)
    held, covered = 0, torch.zeros(len(reference), dtype=torch.bool)
    for d in _distances(samples, reference):
        within = d <= radii
        held += within.sum().item()
        covered |= within.any(0)
    return held / (k * len(samples)), covered.double().mean().item()


def kernel_distance(
    samples: Tensor, reference: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID and its standard error over subsets (Binkowski et al. 2018, arXiv 1801.01401).

    The unbiased MMD^2 with the kernel (x y / D + 1)^3, averaged over random subsets of both. A subset has at most half
    of a set, or subsets would not differ.
    """
    n = min(subset_size, len(samples) // 2, len(reference) // 2)
    if n < 2:
        raise ValueError(f"kid needs 4 images or more in both sets, not {len(samples)} and {len(reference)}")
    random = np.random.default_rng(seed)
    values = []
    with one_thread(CPU):
        for _ in range(subsets):
            x = samples[torch.from_numpy(random.permutation(len(samples))[:n])]
            y = reference[torch.from_numpy(random.permutation(len(reference))[:n])]
            xx, yy, xy = (((a @ b.T) / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
            within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (n * (n - 1))
            values.append((within - 2 * xy.mean()).item())
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(subsets))


def _score(samples: Features) -> float:
    if samples.probabilities is None:
        raise ValueError("inception_score needs class probabilities, which these features lack; leave it out")
    return inception_score(samples.probabilities)


def _named(*names: str, of: Callable) -> Callable[[Features, Features, int], dict[str, float]]:
    return lambda samples, reference, seed: dict(zip(names, of(samples, reference, seed), strict=True))


METRICS = {
    "frechet": _named("frechet", of=lambda a, b, _: [frechet_distance(a.moments, b.moments)]),
    "frechet_infinity": _named(
        "frechet_infinity", "frechet_infinity_error", of=lambda a, b, s: frechet_infinity(a.values, b.moments, seed=s)
    ),
    "spatial_frechet": _named(
        "spatial_frechet", of=lambda a, b, _: [frechet_distance(a.spatial_moments, b.spatial_moments)]
    ),
    "kid": _named("kid", "kid_error", of=lambda a, b, s: kernel_distance(a.rows, b.rows, seed=s)),
    "precision_recall": _named("precision", "recall", of=lambda a, b, _: precision_recall(a.rows, b.rows)),
    "density_coverage": _named("density", "coverage", of=lambda a, b, _: density_coverage(a.rows, b.rows)),
    "inception_score": _named("inception_score", of=lambda a, b, _: [_score(a)]),
}
