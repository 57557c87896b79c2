"""The manifest of a folder of latent shards.

<folder>/shard-00000.tar   <key>.moments.npy (2, 2C, h, w): mean and std of the image and of its mirror image; <key>.cls
                           imported latents may lack mirror images: (1, 2C, h, w), "orientations": 1
<folder>/index.npy         one SAMPLE row per image: shard, byte offset of the array, one crc32 per orientation, ...
<folder>/manifest.json     the kind of latents, the codec that encoded them, the shards with their sizes and SHA-256
<folder>/skipped.txt       the images that could not be read, with the reason
<folder>/features/         optional: an encoder's features of the same images, see features.py

The tar files are in WebDataset format. The index lets every process read every sample directly.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from fastdit.classes import Classes
from fastdit.data.images import Size, size_text
from fastdit.data.latents import LatentCodec, LatentSpec, scale_remarks
from fastdit.data.order import LISTED, Order
from fastdit.data.remote import NO_CACHE, Cache, fetch_manifest, fetched, is_remote, opened
from fastdit.errors import counted
from fastdit.files import map_array, read_array, read_json, read_large, sealed
from fastdit.registry import check, convert_all

FORMAT = 1
DTYPES = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
SAMPLE = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("crc32", "<u4", 2), ("key", "<u8"), ("label", "<i4")])
HEADER = 4096  # bytes; those of index.npy have 192
ROWS = 1 << 14  # of an index, checked together, within a processor's cache
SHARDS = ("manifest.json", "index.npy")  # the files that show a folder of latents
AGAIN = "copy it again or extract again"


def class_counts(labels: np.ndarray, num_classes: int) -> tuple[int, ...]:
    """The number of samples of each class; () if there are no classes."""
    return tuple(np.bincount(labels, minlength=num_classes).tolist()) if num_classes else ()


@dataclass(frozen=True)
class Shard:
    """A tar file: its name, number of samples, size in bytes and SHA-256."""

    name: str
    samples: int
    bytes: int
    sha256: str


def is_shards(path: str | Path) -> bool:
    """Whether `path` is a folder of latents."""
    return all((Path(path) / name).is_file() for name in SHARDS)


def stored_manifest(folder: str | Path, missing: str) -> dict[str, Any]:
    """What <folder>/manifest.json contains; a one-line ValueError if it is damaged, of another format or missing.

    `missing`: what to do then.
    """
    path = Path(folder) / "manifest.json"
    try:
        stored = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder} has no manifest.json; {missing}") from None
    except ValueError as error:
        raise ValueError(f"{error}; extract again") from None
    if (version := stored.get("format")) != FORMAT:
        raise ValueError(f"{path} has format {version}, this version reads {FORMAT}; extract the latents again")
    digest = stored.pop("sha256", None)  # whoever edits the manifest removes it
    if digest not in (None, sealed(stored)["sha256"]):
        raise ValueError(f"{path} was changed: its contents do not match its entry sha256; copy it again, or remove "
                         "that entry if the change is right")  # fmt: skip
    del stored["format"]
    return stored


def manifest_text(stored: Mapping[str, Any]) -> str:
    """The text of manifest.json."""
    return json.dumps(sealed({"format": FORMAT, **stored}), indent=1, sort_keys=True) + "\n"


def damaged_manifest(folder: str | Path, error: Exception) -> str:
    return f"{Path(folder) / 'manifest.json'} is damaged ({type(error).__name__}: {error}); extract again"


@dataclass(frozen=True, kw_only=True)
class ShardFolder:
    """What the manifests of latents and of features share: shards with an index, in the folder they were read from.

    manifest.json has the fields that count in a comparison.
    """

    shards: tuple[Shard, ...] = ()
    index_sha256: str = ""
    listing: str = ""  # ImageSource.listing of the images; "" of several sources, and where it is not known
    folder: Path = field(default=Path(), compare=False)  # where it was read from
    rows: np.ndarray | None = field(default=None, compare=False, repr=False)  # of the index, where some are held out
    block: int = field(default=0, compare=False)  # images that are read in a row, see Order
    url: str = field(default="", compare=False)  # of a remote folder
    cache: Cache = field(default=NO_CACHE, compare=False)  # of its files

    def __len__(self) -> int:
        return sum(shard.samples for shard in self.shards) if self.rows is None else len(self.rows)

    def stored(self) -> dict[str, Any]:
        """What manifest.json contains, but for its format and digest."""
        known, values = [f.name for f in fields(self) if f.compare], asdict(self)
        return {"samples": len(self), **{name: values[name] for name in known}}

    def same_listing(self, listing: str) -> bool:
        """False if another folder's listing is known to be of other images."""
        return self.listing == listing or "" in (self.listing, listing)

    def check_names(self) -> None:
        """Raises a ValueError for a shard that is not a file of this folder, or whose sizes cannot be true."""
        for shard in self.shards:
            sizes = (shard.samples, shard.bytes)
            if Path(shard.name).name != shard.name or not all(0 <= size < 1 << 50 for size in sizes):
                raise ValueError(f"{shard} is not a file of this folder")

    def file(self, name: str, size: int, sha256: str) -> Path:
        """Where a file of this folder is on this machine; one of a remote folder is fetched if it is not there."""
        return fetched(self.url, name, size, sha256, self.cache) if self.url else self.folder / name

    def open_shard(self, number: int) -> int:
        """A descriptor of the tar file, see `file`; it stays on this machine as long as it is open."""
        shard = self.shards[number]
        if self.url:
            return opened(self.url, shard.name, shard.bytes, shard.sha256, self.cache)
        return os.open(self.folder / shard.name, os.O_RDONLY)

    def index(self) -> np.ndarray:
        """SAMPLE rows (n,) as the images are stored; raises a ValueError if the file is not as listed.

        More than LISTED are mapped into memory, read-only, which all processes of a machine share.
        """
        count = sum(shard.samples for shard in self.shards)
        most = HEADER + count * SAMPLE.itemsize
        path = self.file("index.npy", most, self.index_sha256)
        try:
            if count > LISTED:
                index, digest = map_array(path, most)
            else:
                data = read_large(path, most)
                index, digest = None, hashlib.sha256(data).hexdigest()
        except OSError as error:
            if self.url and isinstance(error, FileNotFoundError):  # deleted for other files
                return self.index()
            raise ValueError(f"{path} cannot be read ({error.strerror}); {AGAIN}") from None
        except ValueError as error:
            raise ValueError(f"{error}; {AGAIN}") from None
        if digest != self.index_sha256:
            raise ValueError(f"{path} is damaged: its SHA-256 does not match the manifest; {AGAIN}")
        try:
            index = read_array(data) if index is None else index
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}; {AGAIN}") from None
        if index.dtype != SAMPLE or index.shape != (count,):
            raise ValueError(f"{path} has {index.dtype} of shape {index.shape}, not {count} samples; {AGAIN}")
        sizes = np.array([shard.bytes for shard in self.shards], np.uint64)
        for rows in (index[start : start + ROWS] for start in range(0, count, ROWS)):
            if rows["shard"].max() >= len(sizes) or (rows["offset"] > sizes[rows["shard"]]).any():
                raise ValueError(f"{path} has samples outside the shards; {AGAIN}")
        return index if self.rows is None else index[self.rows]

    def check_files(self, one: int, size: str) -> None:
        """Raises a ValueError if a shard is missing, has another size, or is too small for samples of `one` bytes.

        `size` names the manifest's entry that `one` comes from.
        """
        for shard in self.shards:
            path = os.path.join(self.folder, shard.name)  # a Path takes three times as long
            if shard.samples * one > shard.bytes:
                raise ValueError(
                    f"{self.folder / 'manifest.json'} says {size}, too large for the "
                    f"{shard.samples} samples in the {shard.bytes} bytes of {shard.name}; {AGAIN}"
                )
            if self.url:  # checked when it is fetched
                continue
            found = os.path.getsize(path) if os.path.isfile(path) else None
            if found != shard.bytes:
                state = "is missing" if found is None else f"has {found} bytes instead of {shard.bytes}"
                raise ValueError(f"{path} {state}; {AGAIN}")

    def order(self, seed: int) -> Order:
        """Which of the images comes when in a run with this seed."""
        return Order(seed, [len(self)], block=self.block)


@dataclass(frozen=True)
class Manifest(ShardFolder):
    """The contents of a folder of latents. Channel statistics are of the scaled latents, including mirror images."""

    latents: LatentSpec
    dtype: str  # of the stored moments, a key of DTYPES
    class_names: tuple[str, ...]  # () of images without classes, whose labels are all 0
    images: int  # in the source, including skipped ones
    source: str = ""  # its kind
    orientations: int = 2  # of each image: 1 of imported latents without those of the mirror images
    skipped: int = 0
    counts: dict[str, int] = field(default_factory=dict)  # how many images were turned, put on white, ...
    class_counts: tuple[int, ...] = ()
    channel_mean: tuple[float, ...] = ()
    channel_std: tuple[float, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def contents(self) -> list[str]:
        """What identifies the images and their order, in any folder: the index, which has a checksum of each."""
        return [self.index_sha256]

    def classes_of(self, count: int) -> Classes:
        """The classes of a network with `count` classes that is trained on these latents."""
        return Classes(count, self.class_names, tuple(c for c, images in enumerate(self.class_counts) if not images))

    @classmethod
    def load(cls, folder: str | Path, cache: Cache = NO_CACHE) -> "Manifest":
        """Reads <folder>/manifest.json; raises a one-line ValueError if it is missing, damaged or in another format.

        A URL is that of a remote folder, whose files are kept in `cache` (remote.py). `opening.open_latents` takes
        generated latents and mixtures as well.
        """
        url = str(folder).rstrip("/") if is_remote(folder) else ""
        folder = fetch_manifest(url, cache) if url else Path(folder)
        stored = stored_manifest(folder, "give a folder of latents, which fastdit extract or import writes")
        try:
            for derived in ("samples", "num_classes"):  # stored for people and other tools
                del stored[derived]
            stored["shape"] = stored.pop("latent_shape")
            latents = LatentSpec.from_json({name: stored.pop(name) for name in LatentSpec.names() if name in stored})
            manifest = cls(latents, **convert_all(get_type_hints(cls), stored, ""), folder=folder, rows=None, block=0,
                           url=url, cache=cache)  # fmt: skip
            check(manifest.dtype, DTYPES, "dtype")
            check(manifest.orientations, (1, 2), "orientations")
            manifest.check_names()
        except (ValueError, LookupError, TypeError, OverflowError) as error:
            raise ValueError(damaged_manifest(folder, error)) from None
        return manifest

    def normalized(self, by: str) -> "Manifest":
        """With a scale and shift that give each channel mean 0 and standard deviation 1, if `by` is "channel".

        data.normalize, for autoencoders whose channels differ, such as VA-VAE (Yao et al. 2025, arXiv 2501.01423).
        """
        if by == "none":
            return self
        if len(self.channel_std) != self.latents.shape[0] or not min(self.channel_std) > 0:
            raise ValueError(f"data.normalize={by} needs channels that vary, but {self.folder / 'manifest.json'} has "
                             f"channel_std={list(self.channel_std)}; use none, or extract again")  # fmt: skip
        mean, std = np.array(self.channel_mean), np.array(self.channel_std)
        scale, shift = (np.broadcast_to(value, mean.shape) for value in (self.latents.scale, self.latents.shift))
        shift, scale = tuple((shift + mean / scale).tolist()), tuple((scale / std).tolist())
        latents = replace(self.latents, scale=scale, shift=shift)
        return replace(self, latents=latents, channel_mean=(0.0,) * len(mean), channel_std=(1.0,) * len(std))

    def scaled_as(self, latents: LatentSpec) -> "Manifest":
        """With the scale and shift of these latents, which data.normalize sets, if they have the same encoder."""
        if not latents.same_encoder(self.latents):
            return self
        return replace(self, latents=replace(self.latents, scale=latents.scale, shift=latents.shift))

    def to_json(self) -> str:
        """The text of manifest.json."""
        stored = self.stored() | {"num_classes": self.num_classes}
        stored |= stored.pop("latents")
        stored["latent_shape"] = stored.pop("shape")
        return manifest_text(stored)

    def check(
        self,
        *,
        image_size: Size | None = None,
        num_classes: int | None = None,
        codec: LatentCodec | None = None,
        global_batch: int | None = None,
        hflip: bool = False,
    ) -> None:
        """Raises a ValueError if the latents do not match the settings (None: not checked) or a shard is incomplete.

        `num_classes=0` (unconditional) matches any labels. `codec` may be one with another decoder.
        `hflip` needs the latents of the mirror images: a mirrored latent is not the latent of the mirrored image.
        """
        own = self.latents
        if image_size is not None and image_size != own.image_size:
            raise ValueError(
                f"data.image_size={size_text(image_size)}, but the latents in {self.folder} are from "
                f"{size_text(own.image_size)} px images; set {own.image_size} or extract again"
            )
        if num_classes and num_classes < self.num_classes:
            raise ValueError(
                f"data.num_classes={num_classes}, but the latents in {self.folder} have labels 0 to "
                f"{self.num_classes - 1}; set {self.num_classes}, or 0 to train without labels"
            )
        if num_classes and not self.num_classes:
            raise ValueError(
                f"data.num_classes={num_classes}, but the latents in {self.folder} are of images without classes; set 0"
            )
        made = codec.spec(own.image_size) if codec else own
        if own.codec and not own.same_encoder(made):
            raise ValueError(
                f"the vae (fingerprint {codec.fingerprint[:12]}) is not the one that encoded the latents in "
                f"{self.folder}: {own.vae} ({own.codec[:12]}); use that one or extract again"
            )
        if not own.codec and made.shape != own.shape:
            raise ValueError(f"vae={made.vae} makes latents of shape {made.shape} of these images, but those in "
                             f"{self.folder} have shape {own.shape}; use their autoencoder, {own.vae}")  # fmt: skip
        if global_batch is not None and global_batch > len(self):
            raise ValueError(
                f"training.global_batch={global_batch}, but {self.folder} has only {counted(len(self), 'image')}; use "
                f"at most {len(self)}"
            )
        if hflip and self.orientations == 1:
            raise ValueError(
                f"data.hflip=True, but {self.folder} has no latents of mirror images, and a mirrored latent is not the "
                "latent of a mirrored image; set data.hflip=false"
            )
        one = 2 * self.orientations * math.prod(own.shape) * DTYPES[self.dtype].itemsize  # mean and std
        self.check_files(one, f"latent_shape={list(own.shape)}")

    def scale_remarks(self) -> list[str]:
        """What is wrong with the scale or shift of the latents, in words; [] if none, and of pixels."""
        mean, std = np.array(self.channel_mean), np.array(self.channel_std)
        return scale_remarks(mean, std, self.latents.scale, self.latents.vae)
