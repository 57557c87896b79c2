"""Samples that an evaluation makes on the fly: the same images as those of `fastdit sample`, without files."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from fastdit.data.images import width_height
from fastdit.evaluation.images import ImageSet
from fastdit.pipeline import ImagePipeline


def generated(pipeline: ImagePipeline, count: int, seed: int = 0, labels: str | None = None) -> ImageSet:
    """`count` images of the pipeline, sampled each time they are read; its blocks are the sampling batches.

    `labels`: as for `fastdit.sampling.sample`.
    """
    config = pipeline.config
    if count < 1:
        raise ValueError(f"--num-samples={count} must be 1 or more")
    classes = pipeline.classes.labels(labels, count, seed)

    def blocks(numbers: Iterable[int]) -> Iterator[np.ndarray]:
        return (pipeline.batch(b, classes, seed) for b in numbers)

    size, record = width_height(pipeline.spec.image_size), pipeline.record(count, seed, labels)
    return ImageSet(Path(pipeline.checkpoint), count, size, blocks, record, block=config.sampling.batch_size)
