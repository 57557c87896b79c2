"""`fastdit neighbors`: the training images nearest to samples, and how many samples are nearer to them than new images.

Exact search in blocks of the training set; the digits do not depend on the blocks.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from fastdit.distributed import one_thread

QUANTILE, RESAMPLES = 0.01, 1000
SPARE = 8  # candidates beyond k
ELEMENTS = 1 << 24  # of float64 in memory at once


@torch.no_grad()
def nearest(queries: Tensor, blocks: Iterable[Tensor], k: int, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Euclidean distances (N, k), float64, and indices (N, k) of the nearest rows of a reference (M, D), nearest first.

    queries (N, V, D): V views of each image, such as itself and its mirror image; the nearest view counts. blocks: the
    reference (m, D), part after part, on the device of the queries. own (N,): a row that does not count, -1 for none.
    Among equal distances the lower index is first. Where the reference has fewer than k rows: inf and -1.

    A matrix product in float64 gives a lower bound of each distance. The distances of candidates are then computed from
    differences, because the product hides small distances in its rounding error, and depends on the shapes. Where the
    bounds leave room for more than the candidates, all distances in the block are computed.
    """
    count, views, dim = queries.shape
    own = torch.full((count,), -1) if own is None else own
    best = torch.full((count, k), torch.inf, dtype=torch.float64)
    index = torch.full((count, k), -1)
    start = 0
    for block in blocks:
        block = block.double()
        lengths = block.norm(dim=1)
        wide = min(k + SPARE, len(block))
        rows = max(1, ELEMENTS // (views * max(wide * dim, len(block))))
        for i in range(0, count, rows):
            part = slice(i, min(i + rows, count))
            with one_thread(block.device):
                found = _nearest_in(queries[part].double(), block, lengths, k, wide, own[part].to(block.device) - start)
            both = torch.cat([best[part], found[0].cpu()], 1), torch.cat([index[part], found[1].cpu() + start], 1)
            best[part], index[part] = _smallest(*both, k)
        start += len(block)
    return best, torch.where(best.isinf(), -1, index)


def _nearest_in(q: Tensor, block: Tensor, lengths: Tensor, k: int, wide: int, own: Tensor) -> tuple[Tensor, Tensor]:
    """Distances and indices of up to k + SPARE rows (n, wide) of a block (m, D), among them the k nearest."""
    sizes = q.norm(dim=2, keepdim=True)  # (n, V, 1)
    product = (q.flatten(0, 1) @ block.T).view(*q.shape[:2], -1)  # (n, V, m)
    error = 4 * q.shape[2] * torch.finfo(torch.float64).eps
    bounds = (sizes.square() + lengths.square() - 2 * product - error * (sizes + lengths).square()).amin(1)  # (n, m)
    inside = (own >= 0) & (own < len(block))
    bounds[inside.nonzero()[:, 0], own[inside]] = torch.inf
    lowest, candidates = bounds.topk(min(wide + 1, len(block)), largest=False)  # (n, wide + 1)
    candidates = candidates[:, :wide]
    distances = _distances(q, block[candidates])
    distances[candidates == own[:, None]] = torch.inf
    if lowest.shape[1] > wide:
        reached = distances.topk(min(k, wide), largest=False)[0][:, -1]
        for row in (lowest[:, -1] <= reached.square()).nonzero()[:, 0].tolist():
            every = torch.cat([_distances(q[row : row + 1], rows[None])[0] for rows in block.split(wide)])
            if inside[row]:
                every[own[row]] = torch.inf
            order = every.sort(stable=True)
            distances[row], candidates[row] = order.values[:wide], order.indices[:wide]
    return distances, candidates


def _distances(q: Tensor, rows: Tensor) -> Tensor:
    """Distances (n, w) of the nearest view in q (n, V, D) to rows (n, w, D)."""
    return (q[:, :, None] - rows[:, None]).square().sum(-1).amin(1).sqrt()


def _smallest(values: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest values (n, k) and their indices; of equal ones, the lowest indices."""
    order = indices.argsort(dim=1, stable=True)
    values, indices = values.gather(1, order), indices.gather(1, order)
    order = values.argsort(dim=1, stable=True)[:, :k]
    return values.gather(1, order), indices.gather(1, order)


def memorized(
    samples: np.ndarray, others: np.ndarray, quantile: float = QUANTILE, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """The share of samples that are nearer to the training set than new images are, its standard error, and chance.

    samples (N,), others (M,): distances to the nearest training image, of samples and of images that were not trained
    on. A sample is nearer if its distance is below the r-th smallest of `others`; r is quantile M, rounded down, but at
    least 1. A sample that is like a new image is so with probability r / (M + 1), which is `chance`. The standard error
    is over bootstrap resamples of both sets. Meehan et al. 2020 (arXiv 2004.05675) compare the same distances by ranks.
    """
    rank = max(1, int(quantile * len(others)))
    samples, others, random = np.sort(samples), np.sort(others), np.random.default_rng(seed)  # of any order

    def share(a: np.ndarray, b: np.ndarray) -> float:
        return float((a < np.partition(b, rank - 1)[rank - 1]).mean())

    drawn = [share(random.choice(samples, len(samples)), random.choice(others, len(others))) for _ in range(resamples)]
    return share(samples, others), float(np.std(drawn)), rank / (len(others) + 1)
