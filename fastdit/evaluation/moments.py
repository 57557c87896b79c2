"""Mean and covariance of features, streamed. The sums are exact, so their order and their parts change no digit.

Each feature is rounded to a multiple of 2^-30 and split into two integers of 20 bits. Products of these, summed over
4,096 rows, are integers below 2^53: float64 matrix products compute them exactly, and int64 adds them up.
"""

from dataclasses import dataclass

import numpy as np

GRID = 2.0**30  # a step of 1e-9; float32 has coarser steps from 1/64 on
LARGEST = 2.0**10  # of a feature; networks stay below 100
HALF = 2.0**20
ROWS = 4096  # 2^12 rows of products up to 2^40
MOST_ROWS = 1 << 22  # int64 holds this many


@dataclass(frozen=True)
class Moments:
    """mu (D,) and the unbiased covariance sigma (D, D) of `count` rows, float64. count 0: not known."""

    mu: np.ndarray
    sigma: np.ndarray
    count: int = 0


class MomentSums:
    """Sums of features (n, D) and of their products; `add` and `merge` in any order give the same moments."""

    def __init__(self, dim: int):
        self.count = 0
        self.sums = np.zeros((2, dim), np.int64)  # of the high and the low halves
        self.products = np.zeros((3, dim, dim), np.int64)  # high high, high low, low low

    def add(self, features: np.ndarray) -> None:
        """Add rows (n, D). ValueError unless all are finite and below 1,024."""
        for start in range(0, len(features), ROWS):
            steps = np.rint(np.asarray(features[start : start + ROWS], np.float64) * GRID)
            if not np.abs(steps).max() < LARGEST * GRID:  # also for NaN
                message = f"features must be finite and within {LARGEST:.0f}; check the images and the extractor"
                raise ValueError(message)
            high = np.rint(steps / HALF)  # |high| <= 2^20
            low = steps - high * HALF  # |low| <= 2^19
            self.count += len(steps)
            self.sums += np.stack([high.sum(0), low.sum(0)]).astype(np.int64)
            self.products += np.stack([high.T @ high, high.T @ low, low.T @ low]).astype(np.int64)
        if self.count > MOST_ROWS:
            raise ValueError(f"{self.count} images are more than the {MOST_ROWS} that can be summed exactly; use fewer")

    def merge(self, other: "MomentSums", sign: int = 1) -> None:
        """Add the sums of another part, such as another process's, or take them away (sign -1)."""
        self.count += sign * other.count
        self.sums += sign * other.sums
        self.products += sign * other.products

    def moments(self) -> Moments:
        """ValueError for fewer than 2 rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs 2 images or more, not {self.count}; use more")
        sums = self.sums.astype(np.float64)
        mu = (sums[0] * HALF + sums[1]) / GRID / self.count
        high, mixed, low = self.products.astype(np.float64) / GRID**2
        second = high * HALF**2 + (mixed + mixed.T) * HALF + low
        sigma = (second - self.count * np.outer(mu, mu)) / (self.count - 1)
        return Moments(mu, sigma, self.count)


def sums_of(features: np.ndarray) -> MomentSums:
    """The sums of features (N, D)."""
    sums = MomentSums(features.shape[1])
    sums.add(features)
    return sums


def moments_of(features: np.ndarray) -> Moments:
    """The moments of features (N, D)."""
    return sums_of(features).moments()
