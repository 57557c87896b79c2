"""Several folders of latents as one, each with its share of every batch: data.shards=[{path: a, weight: 0.7}, ...]."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastdit.data.features import FeatureManifest, find_features
from fastdit.data.manifest import Manifest, Shard, ShardFolder
from fastdit.data.order import ROUND, Order, shares
from fastdit.data.remote import NO_CACHE, Cache
from fastdit.data.synthetic import PREFIX
from fastdit.schema import ShardSet, shards_text

APART = 10**12  # key n of set i is i * APART + n


@dataclass(frozen=True)
class Mixture(Manifest):
    """The manifest of all sets: their shards by absolute path, and statistics weighted as the sets are."""

    parts: tuple[Manifest, ...] = ()
    weights: tuple[float, ...] = ()

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def contents(self) -> list[str]:
        return [part.index_sha256 for part in self.parts]

    def index(self) -> np.ndarray:
        """SAMPLE rows (n,) of all sets, one after the other."""
        return joined(self.parts, [part.index() for part in self.parts])

    def open_shard(self, number: int) -> int:
        return open_shard_of(self.parts, number)

    def order(self, seed: int) -> Order:
        return Order(seed, [len(part) for part in self.parts], self.weights, self.block)

    def check_files(self, one: int, size: str) -> None:
        for part in self.parts:
            part.check()

    def of(self, parts: Sequence[Manifest]) -> "Mixture":
        """The mixture of `parts` of its sets, with the same weights."""
        return replace(self, parts=tuple(parts))


@dataclass(frozen=True)
class FeatureMixture(FeatureManifest):
    """The features of all sets of a Mixture."""

    parts: tuple[FeatureManifest, ...] = ()

    def index(self) -> np.ndarray:
        return joined(self.parts, [part.index() for part in self.parts])

    def check(self, latents: Manifest) -> np.ndarray:
        return joined(self.parts, [own.check(part) for own, part in zip(self.parts, latents.parts, strict=True)])

    def open_shard(self, number: int) -> int:
        return open_shard_of(self.parts, number)


def joined(parts: Sequence[ShardFolder], indices: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of the indices of the sets as those of one, with shards counted across the sets and keys APART."""
    index, shards, start = np.concatenate(indices), 0, 0
    for number, (part, rows) in enumerate(zip(parts, indices, strict=True)):
        own = index[start : start + len(rows)]
        own["shard"] += shards
        own["key"] += number * APART
        shards += len(part.shards)
        start += len(rows)
    return index


def open_shard_of(parts: Sequence[ShardFolder], number: int) -> int:
    """A descriptor of a shard, counted across the sets."""
    for part in parts:
        if number < len(part.shards):
            return part.open_shard(number)
        number -= len(part.shards)
    raise IndexError(number)


def absolute(parts: Sequence[ShardFolder]) -> tuple[Shard, ...]:
    """The shards of all sets, with absolute paths as names."""
    each = ((part.folder.resolve(), shard) for part in parts for shard in part.shards)
    return tuple(replace(shard, name=str(folder / shard.name)) for folder, shard in each)


def feature_mixture(sets: Sequence[ShardSet], cache: Cache = NO_CACHE) -> FeatureManifest:
    """The features beside the latents of each set; ValueError where one has none, or others."""
    parts = [find_features(each.path, cache=cache) for each in sets]
    for part in parts[1:]:
        parts[0].check_alike(part)
    part_of = shares([each.weight for each in sets]) / ROUND  # (sets,)
    mean, std = (np.array([getattr(part, key) for part in parts]) for key in ("mean", "std"))
    average = float(part_of @ mean)
    fields = vars(parts[0]) | {
        "mean": average,
        "std": float(part_of @ (std**2 + mean**2) - average**2) ** 0.5,
        "shards": absolute(parts),
        "listing": "",
        "folder": Path(shards_text(tuple(sets))),
    }
    return FeatureMixture(**fields, parts=tuple(parts))


def mixture(sets: Sequence[ShardSet], cache: Cache = NO_CACHE) -> Manifest:
    """The folders as one manifest; ValueError where they cannot train one network, or cannot be read in one batch."""
    if not sets:
        raise ValueError("data.shards=[] names no latents; give a folder, or a list of {path: FOLDER, weight: 0.5}")
    if generated := next((each.path for each in sets if each.path.startswith(PREFIX)), None):
        raise ValueError(f"data.shards={generated} cannot be mixed with others; use it alone")
    parts, weights = [Manifest.load(each.path, cache) for each in sets], [each.weight for each in sets]
    first, where = parts[0], f"data.shards={sets[0].path}"
    for part, each in zip(parts, sets, strict=True):
        if [other.index_sha256 for other in parts].count(part.index_sha256) > 1:
            raise ValueError(f"data.shards names {each.path} twice; add its weights")
        first.latents.check(part.latents, where, f"data.shards={each.path}")
        for key, own, other in (
            ("image_size", first.latents.image_size, part.latents.image_size),
            ("dtype", first.dtype, part.dtype),
            ("classes", first.class_names, part.class_names),
        ):
            if own != other:
                own, other = (f"{len(k)}, such as {k[-1]}" if key == "classes" and k else k for k in (own, other))
                raise ValueError(f"{where} has {key} {own or 'none'}, data.shards={each.path} {other or 'none'}; mix "
                                 "latents that agree in image size, dtype and classes")  # fmt: skip
    part_of = shares(weights)[:, None] / ROUND  # (sets, 1)
    mean, std = (np.array([getattr(part, key) for part in parts]) for key in ("channel_mean", "channel_std"))
    average = (part_of * mean).sum(axis=0)
    deviation = np.sqrt((part_of * (std**2 + mean**2)).sum(axis=0) - average**2)
    contents = repr([(part.index_sha256, weight) for part, weight in zip(parts, weights, strict=True)])
    fields = vars(first) | {
        "images": sum(part.images for part in parts),
        "skipped": sum(part.skipped for part in parts),
        "class_counts": tuple(np.sum([part.class_counts for part in parts], axis=0).tolist()),
        "orientations": min(part.orientations for part in parts),
        "channel_mean": tuple(average.tolist()),
        "channel_std": tuple(deviation.tolist()),
        "shards": absolute(parts),
        "listing": "",
        "index_sha256": hashlib.sha256(contents.encode()).hexdigest(),
        "folder": Path(shards_text(tuple(sets))),
    }
    return Mixture(**fields, parts=tuple(parts), weights=tuple(weights))
