"""Where images are near each other: as features of a network, or as latents. Both spaces have the same methods.

`embed(images)` and `stored(path, key)` return vectors (N, V, D) of V views and what the protocol says about the images;
`blocks()` yields the training set (m, D), part after part; `rows`, `names` and `pictures` are those of some of it.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdit.data.encode import encode_both
from fastdit.data.images import size_text, to_uint8, width_height
from fastdit.data.latents import LatentCodec, mean_latents
from fastdit.data.loader import read_moments
from fastdit.data.manifest import DTYPES, Manifest, is_shards
from fastdit.distributed import Ranks, one_thread
from fastdit.evaluation.evaluate import digest_of, extract
from fastdit.evaluation.features import load_features
from fastdit.evaluation.images import ImageSet, open_set

PART = 4096  # training images in memory at once
Embedded = tuple[Tensor, dict[str, Any]]


class FeatureSpace:
    """Features of a network, one view of each image."""

    distance = "Euclidean distance"

    def __init__(self, name: str, reference: str | Path, size: tuple[int, int], ranks: Ranks):
        self.ranks, self.size, self.extractor = ranks, size, load_features(name, ranks.device)
        self.name, self.hash, self.dim = self.extractor.name, self.extractor.hash, self.extractor.dim
        self.images = images_of(reference, "--reference", size, ranks.device)
        self.values, self.about = self.embed(self.images)

    def embed(self, images: ImageSet) -> Embedded:
        values, digest = extract(images, self.extractor, self.ranks)
        return torch.from_numpy(values[:, None, : self.dim]).to(self.ranks.device), about(images, digest)

    def stored(self, path: str | Path, key: str) -> Embedded:
        return self.embed(images_of(path, key, self.size, self.ranks.device))

    def blocks(self) -> Iterator[Tensor]:
        return iter(self.values[:, 0].split(PART))

    def rows(self, indices: Sequence[int]) -> Tensor:
        return self.values[list(indices)]

    def names(self, indices: Sequence[int]) -> list[str]:
        return [str(self.images.names[i] if self.images.names else i) for i in indices]

    def pictures(self, indices: Sequence[int]) -> list[np.ndarray]:
        return pictures_of(self.images, indices)


class LatentSpace:
    """Scaled means of the autoencoder's posterior: of the image and of its mirror image, which may be trained on, too.

    If the reference has no latents of mirror images, there is one view of each image, also of samples and held-out
    images: with two, these would be nearer to the training images than training images are to each other.
    Means are rounded as in the shards.
    """

    name, distance = "latents", "root mean square difference"

    def __init__(self, reference: str | Path, size: tuple[int, int], ranks: Ranks, vae: str | None = None):
        self.ranks, self.size, self.manifest = ranks, size, load_shards(reference, "--reference", size)
        self.index, self.spec = self.manifest.index(), self.manifest.latents
        self.codec = LatentCodec.of(self.spec, f"--reference={reference}", vae or "", ranks.device)
        self.hash, self.about = self.codec.fingerprint, about_shards(self.manifest)
        self.dim = math.prod(self.spec.shape)

    def embed(self, images: ImageSet) -> Embedded:
        dtype, found, digest = DTYPES[self.manifest.dtype], [], hashlib.sha256()
        for block in images.blocks(range(-(-images.count // images.block))):
            both = encode_both(self.codec, list(block), images.block, self.ranks.device)  # (block, 2, 2C, h, w)
            both = both[: len(block), : self.manifest.orientations].cpu().numpy().astype(dtype).astype(np.float32)
            found.append(self.vectors(torch.from_numpy(both).flatten(0, 1)).unflatten(0, both.shape[:2]))
            digest.update(b"".join(map(digest_of, block)))
        return torch.cat(found), about(images, digest.hexdigest())

    def stored(self, path: str | Path, key: str) -> Embedded:
        if not is_shards(path):
            return self.embed(images_of(path, key, self.size, self.ranks.device))
        other = load_shards(path, key, self.size)
        self.spec.check(other.latents, "--reference", f"{key}={path}")
        if other.orientations < self.manifest.orientations:
            raise ValueError(f"{key}={path} has no latents of mirror images, but --reference has; give the images")
        return self.both_views(other, other.index()), about_shards(other)

    def both_views(self, manifest: Manifest, index: np.ndarray) -> Tensor:
        views = (False, True)[: self.manifest.orientations]
        return torch.stack([self.vectors(read_all(manifest, index, mirrored)) for mirrored in views], dim=1)

    def vectors(self, moments: Tensor) -> Tensor:
        """Moments (n, 2C, h, w) -> (n, D) on the device, whose Euclidean distance is the root mean square."""
        return self.means(moments).flatten(1) / self.dim**0.5

    def means(self, moments: Tensor) -> Tensor:
        return mean_latents(moments.to(self.ranks.device), self.spec)

    def blocks(self) -> Iterator[Tensor]:
        for i in range(0, len(self.index), PART):
            yield self.vectors(read_all(self.manifest, self.index[i : i + PART]))

    def rows(self, indices: Sequence[int]) -> Tensor:
        return self.both_views(self.manifest, self.index[list(indices)])

    def names(self, indices: Sequence[int]) -> list[str]:
        return [f"{self.index['key'][i]:09d}" for i in indices]

    def pictures(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Decoded means."""
        with one_thread(self.ranks.device):
            latents = self.means(read_all(self.manifest, self.index[list(indices)]))
            return [to_uint8(self.codec.decode(latent[None]))[0].cpu().numpy() for latent in latents]


def load_shards(path: str | Path, key: str, size: tuple[int, int]) -> Manifest:
    """The latents at `path`, which must be of images of this size (width, height)."""
    if not is_shards(path):
        raise ValueError(f"{key}={path} is not a folder of latents, which --features latents needs; give one")
    manifest = Manifest.load(path)
    manifest.check()
    _same_size(width_height(manifest.latents.image_size), size, path, key)
    return manifest


def images_of(path: str | Path, key: str, size: tuple[int, int], device: torch.device) -> ImageSet:
    """The images at `path`; those of a folder are center-cropped to this size, as `fastdit extract` does."""
    images = open_set(path, key, size_text(size), device)
    _same_size(images.size, size, path, key)
    return images


def _same_size(found: tuple[int, int], size: tuple[int, int], path: str | Path, key: str) -> None:
    if found != size:
        raise ValueError(f"{key}={path} has images of {size_text(found)} pixels, SAMPLES of {size_text(size)}; give "
                         "images of one size")  # fmt: skip


def read_all(manifest: Manifest, index: np.ndarray, mirrored: bool = False) -> Tensor:
    """The moments of all rows; ValueError where one is damaged."""
    moments = read_moments(manifest, index, mirrored)
    if len(moments) < len(index):
        raise ValueError(f"{manifest.folder} has damaged samples; fastdit verify {manifest.folder} names them")
    return moments


def pictures_of(images: ImageSet, indices: Sequence[int]) -> list[np.ndarray]:
    """Some of the images, (H, W, 3) each; only their blocks are read."""
    numbers = sorted({i // images.block for i in indices})
    blocks = dict(zip(numbers, images.blocks(numbers), strict=True))
    return [blocks[i // images.block][i % images.block] for i in indices]


def about(images: ImageSet, digest: str) -> dict[str, Any]:
    return {"sha256": digest, "images": images.count, "size": list(images.size), "cropped": images.cropped}


def about_shards(manifest: Manifest) -> dict[str, Any]:
    size = list(width_height(manifest.latents.image_size))
    return {"sha256": manifest.index_sha256, "images": len(manifest), "size": size, "cropped": None}
