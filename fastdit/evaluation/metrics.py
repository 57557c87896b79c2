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
            raise ValueError("it needs Inception's spatial features: use --features inception-v3=FILE, "
                             "and a reference with images or mu_s and sigma_s")  # fmt: skip
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
    return _from_parts(a.mu - b.mu, np.trace(a.sigma) + np.trace(b.sigma), root_b @ torch.from_numpy(a.sigma) @ root_b)


def _from_parts(difference: np.ndarray, traces: float, product: Tensor) -> float:
    """`product`: symmetric, with the nonzero eigenvalues of C_a C_b."""
    trace = traces - 2 * float(torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum())
    return float(difference @ difference + trace)


def _frechet_without(samples: np.ndarray, b: Moments) -> Callable[[np.ndarray], float]:
    """A function of row numbers: the Frechet distance of the samples (N, D) without these rows to `b`."""
    every = sums_of(samples)
    if len(samples) >= samples.shape[1]:
        root = _root(b.sigma)

        def distance(left_out: np.ndarray) -> float:
            part = sums_of(samples[left_out])
            every.merge(part, -1)
            rest = every.moments()
            every.merge(part)
            return _frechet(rest, b, root)

        return distance
    x = torch.from_numpy(samples).double()
    x = x - x.mean(0)
    gram = x @ torch.from_numpy(b.sigma) @ x.T  # (N, N): C_a C_b has its eigenvalues, and zeros
    offset = every.moments().mu - b.mu

    def distance(left_out: np.ndarray) -> float:
        kept = np.delete(np.arange(len(x)), left_out)
        mean, inner = x[kept].mean(0), gram[kept][:, kept]
        inner = inner - inner.mean(0)
        inner = (inner - inner.mean(1, keepdim=True)) / (len(kept) - 1)
        trace = float((x[kept] - mean).square().sum()) / (len(kept) - 1)
        return _from_parts(offset + mean.numpy(), trace + np.trace(b.sigma), inner)

    return distance


def _jackknife(without: Callable[[np.ndarray], float], count: int, random: np.random.Generator) -> float:
    """The variance of the distance of `count` samples."""
    groups = random.permutation(count) % min(GROUPS, count)
    values = [without(np.flatnonzero(groups == group)) for group in np.unique(groups)]
    return (len(values) - 1) * np.var(values)


def frechet_error(samples: np.ndarray, reference: np.ndarray | Moments, seed: int = 0) -> float:
    """The standard error of `frechet_distance(samples, reference)` for other samples (N, D) of the same kind.

    From a jackknife that leaves out 10 random groups of samples in turn (Shao & Wu 1989). Its variance is too large
    rather than too small (Efron & Stein 1981), at most by a factor of about 10, where the distance is mostly bias. It
    tells nothing about the bias. The reference is taken as it is.
    """
    if len(samples) < 3:
        raise ValueError(f"a standard error needs 3 samples or more, not {len(samples)}")
    b = reference if isinstance(reference, Moments) else moments_of(reference)
    with one_thread(CPU):
        variance = _jackknife(_frechet_without(samples, b), len(samples), np.random.default_rng(seed))
    return float(np.sqrt(variance))


def frechet_infinity(
    samples: np.ndarray, reference: np.ndarray | Moments, points: int = 15, seed: int = 0
) -> tuple[float, float]:
    """The Frechet distance for N -> infinity samples, and its standard error (Chong & Forsyth 2020, arXiv 1911.07023).

    The distance of N samples is biased by a term in 1/N. A line through the distances of `points` random subsets of
    N/2 to N of the samples (N, D), as a function of 1/size, has the extrapolated value as its intercept. The standard
    error combines that of the intercept with the sampling error of the samples, from a jackknife over 10 groups. The
    bias and the error of the reference's own size stay. Sizes start at N/2, not at the paper's N/10.

    For N < 4 D, the bias is not linear in 1/N, and the result is rough (`is_rough`): nearer to the truth than the
    distance of N samples, but too small by a part of the bias around N = D, and too large for N < D / 2. The error then
    includes the difference to a parabola's intercept, which is about as large as that part or larger for N > D / 2.
    """
    count = len(samples)
    if count < 2 * points:
        raise ValueError(f"it needs {2 * points} samples or more to extrapolate from, not {count}; use more, or leave "
                         "it out")  # fmt: skip
    b = reference if isinstance(reference, Moments) else moments_of(reference)
    random = np.random.default_rng(seed)
    sizes = np.linspace(count // 2, count, points).round().astype(int)
    with one_thread(CPU):
        without = _frechet_without(samples, b)
        values = [without(random.permutation(count)[size:]) for size in sizes]
        variance = _jackknife(without, count, random)
    x = np.stack([np.ones(points), 1 / sizes], axis=1)  # (points, 2)
    solution = np.linalg.lstsq(x, np.array(values), rcond=None)[0]
    variance += ((values - x @ solution) ** 2).sum() / (points - 2) * np.linalg.inv(x.T @ x)[0, 0]
    if is_rough(*samples.shape):
        variance += (np.polyfit(count / sizes, values, 2)[-1] - solution[0]) ** 2
    return float(solution[0]), float(np.sqrt(variance))


def is_rough(count: int, dim: int) -> bool:
    """Whether `count` samples of `dim` features are too few for a bias that is linear in 1/N."""
    return count < 4 * dim


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
        raise ValueError(f"neighbor number {k} needs {k + 1} images or more, not {len(x)}; use more")
    return torch.cat([d.kthvalue(k + 1, dim=1).values for d in _distances(x, x)])  # the row itself is the first


def _distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Euclidean distances from x (N, D) to y (M, D), in blocks of rows (<= 512, M).

    What could be rounding error of the products is 0: copies of an image must not be outside each other's balls.
    """
    squares, error = (y * y).sum(1), 2 * x.shape[1] * torch.finfo(x.dtype).eps
    for rows in x.split(BLOCK):
        lengths = (rows * rows).sum(1, keepdim=True) + squares
        found = lengths - 2 * rows @ y.T
        yield found.masked_fill_(found <= error * lengths, 0).sqrt()


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
    """KID and its standard error (Binkowski et al. 2018, arXiv 1801.01401).

    The unbiased MMD^2 with the kernel (x y / D + 1)^3, averaged over random subsets of both. A subset has at most half
    of a set, or subsets would not differ. The standard error is that of the delete-d jackknife (Shao & Wu 1989) with
    d = N - subset size, N of the smaller set, and that of averaging over some of the subsets.
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
    total = min(len(samples), len(reference))
    return float(np.mean(values)), float(np.std(values, ddof=1) * np.sqrt(n / (total - n) + 1 / subsets))


def _score(samples: Features) -> float:
    if samples.probabilities is None:
        raise ValueError("it needs class probabilities, which these features lack")
    return inception_score(samples.probabilities)


def _frechet_and_error(samples: Features, reference: Features, seed: int) -> dict[str, float]:
    found = {"frechet": frechet_distance(samples.moments, reference.moments)}
    if len(samples.values) > 2:
        found["frechet_error"] = frechet_error(samples.values, reference.moments, seed)
    return found


def _named(*names: str, of: Callable) -> Callable[[Features, Features, int], dict[str, float]]:
    return lambda samples, reference, seed: dict(zip(names, of(samples, reference, seed), strict=True))


METRICS = {
    "frechet": _frechet_and_error,
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
