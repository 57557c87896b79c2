"""Features of a frozen encoder, in shards beside the latents of the same images.

<latents>/features/shard-00000.tar   <key>.features.npy: those of the image and of its mirror image; <key>.cls
<latents>/features/index.npy         as for the latents, with the same keys in the same order
<latents>/features/manifest.json     the encoder, the SHA-256 of its weights, the grid, the shards with their SHA-256

An array has T tokens of D values for each orientation: the patches row by row, then the class token, if there is one.
As float16 it is (2, T, D). As int8 it is (2,) of records with `values` (T, D) and `scale` (T,) float32: a value is
values * scale.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.data.images import Unusable
from fastdit.data.manifest import Manifest, Shard, ShardFolder, damaged_manifest, manifest_text, stored_manifest
from fastdit.data.remote import NO_CACHE, Cache, Missing, fetch_manifest, is_remote
from fastdit.data.writer import TarWriter, move_into_place, write_index
from fastdit.registry import check, convert_all

FOLDER = "features"  # within the folder of the latents
FEATURE_DTYPES = ("float16", "int8")
MAX_SIDE, MAX_DIM = 1 << 10, 1 << 16
HALF_MAX = float(np.finfo(np.float16).max)


class Encoder(Protocol):
    """A frozen network; evaluation/encoders.py has them."""

    name: str
    weights: str  # SHA-256 of the file
    dim: int  # D
    class_token: bool

    def at(self, grid: tuple[int, int], precision: str) -> "Encoder":
        """A copy whose `encode` gives this grid (rows, columns) and computes in `precision`, a key of PRECISIONS."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) in [-1, 1] -> features (N, T, D) float32, in the order of the shards."""


def record_type(dtype: str, tokens: int, dim: int) -> np.dtype:
    """How the features of one orientation are stored."""
    if dtype == "float16":
        return np.dtype(("<f2", (tokens, dim)))
    return np.dtype([("values", "i1", (tokens, dim)), ("scale", "<f4", (tokens,))])


def packed(features: np.ndarray, dtype: str) -> np.ndarray:
    """Features (2, T, D) float32 as they are stored; int8 with one scale per token, its largest magnitude / 127."""
    if dtype == "float16":
        return features.astype("<f2")
    array = np.zeros(2, record_type(dtype, *features.shape[1:]))
    array["scale"] = np.abs(features).max(-1) / 127
    array["values"] = np.rint(features / np.where(array["scale"], array["scale"], 1)[..., None])
    return array


def unpacked(array: np.ndarray, tokens: slice) -> Tensor:
    """Stored features of n images, one orientation each -> those of some tokens (n, tokens, D), float16."""
    if array.dtype.names is None:
        return torch.from_numpy(array)[:, tokens].contiguous()
    scale = torch.from_numpy(np.ascontiguousarray(array["scale"][:, tokens]))
    values = torch.from_numpy(array["values"])[:, tokens].half()
    return values.mul_(scale.half()[..., None])  # in float32, PyTorch takes three times as long


def class_token_of(patches: Tensor, class_token: Tensor | None = None) -> Tensor:
    """The class token (N, D), or the mean of patches (N, rows, columns, D) where the encoder has none; float32.

    It has mean 0 and variance 1 over D, the variance of the noise.
    """
    token = patches.float().mean((1, 2)) if class_token is None else class_token.float()
    return F.layer_norm(token, token.shape[1:])


def is_finite(array: np.ndarray) -> bool:
    """Whether all values are, of an array of floats, or of features stored as int8."""
    if array.dtype == np.float16:  # by the bits, positive and negative: NumPy's own test takes 20 times as long
        largest = (np.maximum.reduce(array.view(dtype), axis=None, initial=0) for dtype in (np.int16, np.uint16))
        return bool(next(largest) < 0x7C00 and next(largest) < 0xFC00)
    return bool(np.isfinite(array if array.dtype.names is None else array["scale"]).all())


def resample(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """(N, D, h, w) -> (N, D, *grid): bilinear; where the grid shrinks, with a filter as wide as the step."""
    same = tuple(maps.shape[2:]) == tuple(grid)
    return maps if same else F.interpolate(maps, grid, mode="bilinear", align_corners=False, antialias=True)


def grid_for(latents: Sequence[int]) -> tuple[int, int]:
    """The grid of features beside latents (C, h, w): the tokens of a network with patches of 2."""
    return max(1, latents[1] // 2), max(1, latents[2] // 2)


class FeatureWriter(TarWriter):
    """Writes features of type `dtype`."""

    kind = "features"

    def __init__(self, folder: Path, number: int, dtype: str):
        super().__init__(folder, number)
        self.dtype = dtype

    def add(self, key: int, features: np.ndarray, label: int) -> None:
        """Appends the features (2, T, D) of an image and its mirror image; ValueError if they overflow float16."""
        if not np.abs(features).max() <= HALF_MAX:
            remedy = "use --precision float32, or another --encoder"
            raise Unusable(f"the features of image {key} are not finite in float16; {remedy}")
        self.keep(key, packed(features, self.dtype), label)

    def keep(self, key: int, array: np.ndarray, label: int) -> None:
        """Appends features (2, ...) as they are stored."""
        self.store(key, array, label)
        self.sums = self.sums + moments(array)


class StoredFeatureWriter(FeatureWriter):
    """Writes features that are in the stored form already."""

    add = FeatureWriter.keep


def moments(array: np.ndarray) -> np.ndarray:
    """(2,) float64: the mean of the stored values of an image and its mirror image, and of their squares."""
    values = array if array.dtype.names is None else array["values"] * array["scale"][..., None]
    values = values.astype(np.float64)
    return np.array([values.mean(), (values**2).mean()])


@dataclass(frozen=True)
class FeatureManifest(ShardFolder):
    """The contents of a folder of features."""

    encoder: str  # its name
    weights: str  # SHA-256 of its file
    grid: tuple[int, int]  # rows and columns of patches
    dim: int  # D
    class_token: bool  # whether one follows the patches
    dtype: str  # one of FEATURE_DTYPES
    precision: str  # in which the encoder computed
    mean: float = 0.0  # of all values
    std: float = 0.0

    @property
    def tokens(self) -> int:
        """T."""
        return self.grid[0] * self.grid[1] + self.class_token

    @property
    def record(self) -> np.dtype:
        return record_type(self.dtype, self.tokens, self.dim)

    @classmethod
    def load(cls, folder: str | Path, cache: Cache = NO_CACHE) -> "FeatureManifest":
        """Reads <folder>/manifest.json; raises a one-line ValueError if it is missing, damaged or of another kind."""
        url = str(folder).rstrip("/") if is_remote(folder) else ""
        folder = fetch_manifest(url, cache) if url else Path(folder)
        stored = stored_manifest(folder, "write features there with fastdit extract --encoder")
        if "encoder" not in stored:
            raise ValueError(f"{folder} holds latents, not features; set data.features to a folder of features")
        try:
            del stored["samples"]
            manifest = cls(**convert_all(get_type_hints(cls), stored, ""), folder=folder, rows=None, block=0, url=url,
                           cache=cache)  # fmt: skip
            check(manifest.dtype, FEATURE_DTYPES, "dtype")
            if not (all(0 < side <= MAX_SIDE for side in manifest.grid) and 0 < manifest.dim <= MAX_DIM):
                raise ValueError(f"grid={manifest.grid} or dim={manifest.dim} is out of range")
            _ = manifest.record  # ValueError as well: NumPy's have less than 2 GiB
            manifest.check_names()
        except (ValueError, LookupError, TypeError, OverflowError) as error:
            raise ValueError(damaged_manifest(folder, error)) from None
        return manifest

    def to_json(self) -> str:
        """The text of manifest.json."""
        return manifest_text(self.stored())

    def check(self, latents: Manifest) -> np.ndarray:
        """The SAMPLE rows (n,) of the latents' images, in their order.

        Raises a ValueError if these are not the features of the same images, or a shard is incomplete.
        """
        index, count = self.index(), sum(shard.samples for shard in latents.shards)
        rows = index if latents.rows is None or len(index) != count else index[latents.rows]
        listed = self.same_listing(latents.listing)
        if not listed or len(index) != count or not same_images(rows, latents.index()):
            raise ValueError(
                f"the features in {self.folder} are of other images ({len(index)}) than the latents in "
                f"{latents.folder} ({count}), or in another order; extract them again"
            )
        self.check_files(2 * self.record.itemsize, f"grid={list(self.grid)} and dim={self.dim}")
        return rows

    def check_alike(self, other: "FeatureManifest") -> None:
        """Raises a ValueError unless both are by the same encoder, and are stored in the same way."""
        for key in ("encoder", "weights", "grid", "dim", "class_token", "dtype"):
            own, theirs = (str(getattr(each, key))[:24] for each in (self, other))
            if own != theirs:
                raise ValueError(f"the features in {other.folder} have {key} {theirs}, those in {self.folder} {own}; "
                                 "extract both with the same --encoder and --feature-dtype")  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """What a run must not change when it resumes."""
        return {"encoder": self.encoder, "weights": self.weights, "grid": list(self.grid), "dim": self.dim}


def same_images(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two indices have the same images in the same order."""
    return len(a) == len(b) and bool((a["key"] == b["key"]).all() and (a["label"] == b["label"]).all())


def publish_features(partial: Path, out: Path, about: FeatureManifest, parts: Sequence[Mapping[str, Any]]) -> None:
    """Merges the parts of all shards into the index and the manifest, then renames to `out`."""
    index, digest = write_index(partial, parts)
    mean, square = (sum(np.array(part["sums"]) for part in parts) / len(index)).tolist()
    manifest = replace(
        about,
        mean=mean,
        std=max(square - mean**2, 0.0) ** 0.5,
        shards=tuple(Shard(**part["shard"]) for part in parts),
        index_sha256=digest,
        folder=out,
    )
    move_into_place(partial, out, manifest.to_json())


def holds_features(folder: Path) -> bool:
    """Whether a folder of shards has features; False if that cannot be told."""
    try:
        return "encoder" in stored_manifest(folder, "")
    except (ValueError, OSError):
        return False


def beside_latents(latents: Manifest) -> FeatureManifest | None:
    """The features in the folder of the latents, if there are any."""
    if not latents.url:
        folder = latents.folder / FOLDER
        return FeatureManifest.load(folder) if folder.exists() else None
    try:
        return FeatureManifest.load(f"{latents.url}/{FOLDER}", latents.cache)
    except Missing:
        return None


def find_features(shards: str | Path, features: str | Path = "", cache: Cache = NO_CACHE) -> FeatureManifest:
    """The folder `features`, or else the one beside the latents; a one-line ValueError if there is none."""
    folder = features or f"{shards}/{FOLDER}"
    try:
        if features or is_remote(folder) or Path(folder).is_dir():
            return FeatureManifest.load(folder, cache)
    except Missing:
        if features:
            raise
    raise ValueError(
        f"training.align or model.class_token needs features, but {shards} has none; add them with "
        f"fastdit extract --images IMAGES --out {shards} --vae VAE --encoder NAME"
    )
