"""The images of a picture: each is image 0 of `fastdit sample` for its class, seed and settings.

It is sampled in a batch of the same size, but not always in the first place of it. On a CPU, the place changes no bit.
(`dopri5` adapts its steps to the whole batch.)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fastdit.data.images import width_height
from fastdit.distributed import ImageRandom, Ranks, seed_of
from fastdit.pipeline import ImagePipeline


@dataclass(frozen=True)
class Cell:
    """An image: its label and its seed, or noise at the part `u` of the way from this seed's to another's."""

    label: int
    seed: int
    other: int | None = None
    u: float = 0.0


class MixedRandom:
    """Standard normals between those of two seeds, by spherical interpolation (Shoemake 1985), for each image.

    Unlike a linear interpolation, it keeps the length of the noise. u (N,) in [0, 1]: 0 and 1 give exactly the numbers
    of one seed. A stochastic sampler's later noise is mixed in the same way.
    """

    def __init__(self, a: ImageRandom, b: ImageRandom, u: Sequence[float]):
        self.a, self.b, self.u = a, b, torch.tensor(u, dtype=torch.float64)

    def __call__(self, like: Tensor) -> Tensor:
        a, b = (noise(torch.empty(like.shape, dtype=like.dtype)) for noise in (self.a, self.b))  # (N, C, h, w)
        cosine = nn.functional.cosine_similarity(a.double().flatten(1), b.double().flatten(1))  # (N,)
        angle = cosine.clamp(-1, 1).acos()
        weights = [torch.sin(part * angle) / torch.sin(angle) for part in (1 - self.u, self.u)]
        near, far = (weight.to(a).view(-1, *[1] * (a.ndim - 1)) for weight in weights)
        return (near * a + far * b).to(like)


def batch_of(pipeline: ImagePipeline, cells: Sequence[Cell]) -> tuple[ImageRandom | MixedRandom, Tensor]:
    """Noise and labels (N,) of cells, repeated to N = sampling.batch_size; all have another seed, or none has."""
    cells = [cells[i % len(cells)] for i in range(pipeline.config.sampling.batch_size)]
    noise = ImageRandom([seed_of(cell.seed, 0) for cell in cells])
    if cells[0].other is not None:
        others = ImageRandom([seed_of(cell.other, 0) for cell in cells])
        noise = MixedRandom(noise, others, [cell.u for cell in cells])
    return noise, torch.tensor([cell.label for cell in cells], device=pipeline.device)


def drawn(pipeline: ImagePipeline, cells: Sequence[Cell], ranks: Ranks) -> np.ndarray:
    """uint8 (n, H, W, 3) of cells, on every process; the processes share the batches."""
    size, (width, height) = pipeline.config.sampling.batch_size, width_height(pipeline.spec.image_size)
    images = np.zeros((len(cells), height, width, 3), np.uint8)
    for b in range(ranks.rank, math.ceil(len(cells) / size), ranks.world):
        taken = cells[b * size : (b + 1) * size]
        with pipeline.working():
            made = pipeline.decode(pipeline.latents_from(*batch_of(pipeline, taken)))
        images[b * size : b * size + len(taken)] = made[: len(taken)]
    return ranks.max(torch.from_numpy(images).to(ranks.device)).cpu().numpy()


def path_of(pipeline: ImagePipeline, cells: Sequence[Cell], frames: int) -> tuple[list[float], np.ndarray]:
    """Times (F,), and uint8 (F, 2, n, H, W, 3): x_t and the predicted x_0, decoded; both end with what `drawn` returns.

    The cells must fit in one batch.
    """
    with pipeline.working():
        times, *tensors = pipeline.trajectory(*batch_of(pipeline, cells), frames)
        shown = [[pipeline.decode(x[: len(cells)]) for x in pair] for pair in zip(*tensors, strict=True)]
        last = pipeline.decode(tensors[0][-1])[: len(cells)]  # of a full batch, which decides the last bits
    return times, np.stack([*map(np.stack, shown[:-1]), np.stack([last, last])])


def mix_classes(pipeline: ImagePipeline, mixes: Sequence[tuple[int, int, float]]) -> list[int]:
    """New labels for mixes (a, b, u): their rows of the label table are (1 - u) row a + u row b.

    The rows are appended to the tables of the network and of the weak network, so that nothing else needs to know of
    them; the other labels keep their numbers. The pipeline must not have been used yet.
    """
    networks = [pipeline.inference] + [pipeline.weak] * (pipeline.weak is not None)
    tables = [network.model.y_embedder.embedding_table for network in networks]
    known = max(len(table.weight) for table in tables)  # one of them may have no row for the null label
    for table in tables:
        weight = table.weight
        rows = torch.stack([torch.lerp(weight[a], weight[b], u) for a, b, u in mixes])
        unused = weight.new_zeros(known - len(weight), weight.shape[1])
        table.weight = nn.Parameter(torch.cat([weight, unused, rows]), requires_grad=False)
    return list(range(known, known + len(mixes)))
