"""Images and statistics that an evaluation reads: npz files, folders, archives, latents, and samples."""

import json
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fastdit.data.archives import is_there, open_images
from fastdit.data.images import Size, parse_size, read_image, size_text, to_uint8, width_height
from fastdit.data.latents import LatentCodec, mean_latents
from fastdit.data.loader import read_moments
from fastdit.data.manifest import Manifest, is_shards
from fastdit.data.remote import check_local
from fastdit.distributed import one_thread
from fastdit.evaluation.features import BLOCK
from fastdit.evaluation.metrics import Features
from fastdit.evaluation.moments import LARGEST, Moments
from fastdit.files import SAMPLING, array_header, read_json, replacing

ABOUT = {"extractor", "extractor_sha256", "sha256", "images", "size"}  # and decoded_by, of latents
DECODED = 8  # latents that an autoencoder decodes at once
Blocks = Callable[[Iterable[int]], Iterator[np.ndarray]]


@dataclass(frozen=True)
class ImageSet:
    """`count` images of one size (width, height), in blocks of `block`; the last one may be shorter.

    `blocks` reads or makes those of ascending numbers: uint8 (<= block, H, W, 3).
    """

    path: Path
    count: int
    size: tuple[int, int]
    blocks: Blocks
    sampling: dict | None = None  # what `fastdit sample` recorded about them, or how they were decoded
    cropped: str | None = None  # the size that they were center-cropped to
    block: int = BLOCK
    names: Sequence[str] = ()  # of the images, where they are files
    by_class: bool = False  # whether they may be sorted by their classes


def open_set(
    path: str | Path, key: str, image_size: str | None = None, device: torch.device | str = "cpu"
) -> ImageSet:
    """The images at `path`: an npz with arr_0, a folder from `fastdit sample`, latents, or what `open_images` takes.

    Latents are decoded on `device`.
    `image_size`: center-crop images that are not in an npz, as `fastdit extract` does. ValueError names `key`.
    """
    check_local(path, key)
    path = Path(path)
    if not is_there(path):
        raise ValueError(f"{key}={path} does not exist; give an .npz file or a folder of images")
    if path.suffix == ".npz":
        found = _array(path, key)
        record = path.parent / SAMPLING
        return _sampled(found, record, key) if path.name == "samples.npz" and record.is_file() else found
    if is_run(path):
        raise ValueError(f"{key}={path} is a run or a checkpoint; sample it first: fastdit sample {path} --out samples")
    if (record := path / SAMPLING).is_file():
        return replace(_sampled(_folder(path / "images", key, None), record, key), path=path)
    if is_shards(path):
        return _latents(path, key, device)
    return _folder(path, key, image_size)


def check_crop(image_size: str | None, *paths: str | Path) -> None:
    """ValueError where --image-size would change none of the images at these paths."""
    files = [path for path in map(Path, paths) if path.exists()]
    fixed = [p for p in files if p.suffix == ".npz" or is_run(p) or is_shards(p) or (p / SAMPLING).is_file()]
    if image_size and len(fixed) == len(paths):
        raise ValueError(f"--image-size={image_size} center-crops folders and archives of images only, so it changes "
                         f"nothing for {' and '.join(map(str, fixed))}; leave it out")  # fmt: skip


def is_run(path: str | Path) -> bool:
    """Whether `path` is a run or a checkpoint."""
    return (Path(path) / "checkpoints").is_dir() or (Path(path) / "checkpoint.json").is_file()


def _sampled(images: ImageSet, record: Path, key: str) -> ImageSet:
    sampling = read_json(record)
    if images.count != sampling.get("num_samples"):
        raise ValueError(f"{key}={record.parent} holds {images.count} of {sampling.get('num_samples')} samples; repeat "
                         "its sample command to complete it")  # fmt: skip
    return replace(images, sampling=sampling)


def _folder(path: Path, key: str, image_size: str | None) -> ImageSet:
    try:
        source = open_images(path)
    except ValueError as error:
        raise ValueError(str(error).replace("images=", f"{key}=", 1)) from None
    wanted: Size | None = parse_size(image_size) if image_size else None

    def read(i: int) -> np.ndarray:
        try:
            return read_image(source.open(i), wanted)[0]
        except ValueError as error:
            raise ValueError(f"{key}={path}: {source.paths[i]} cannot be read ({error}); repair or remove it") from None

    first = read(0)

    def blocks(numbers: Iterable[int]) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(4) as pool:
            for b in numbers:
                indices = range(b * BLOCK, min((b + 1) * BLOCK, len(source)))
                images = list(pool.map(read, indices))
                for i, image in zip(indices, images, strict=True):
                    if image.shape != first.shape:
                        raise ValueError(
                            f"{key}={path}: {source.paths[i]} has {_pixels(image)} pixels, {source.paths[0]} "
                            f"{_pixels(first)}; center-crop all with --image-size {min(first.shape[:2])}"
                        )
                yield np.stack(images)

    cropped = size_text(wanted) if wanted else None
    return ImageSet(path, len(source), (first.shape[1], first.shape[0]), blocks, cropped=cropped, names=source.paths,
                    by_class=bool(source.class_names))  # fmt: skip


def _latents(path: Path, key: str, device: torch.device | str) -> ImageSet:
    """The posterior means of latents as the autoencoder that encoded them decodes them."""
    manifest = Manifest.load(path)
    manifest.check()
    index, spec = manifest.index(), manifest.latents
    codec = LatentCodec.of(spec, f"{key}={path}", device=device)

    def blocks(numbers: Iterable[int]) -> Iterator[np.ndarray]:
        for b in numbers:
            rows = index[b * BLOCK : (b + 1) * BLOCK]
            moments = read_moments(manifest, rows)
            if len(moments) < len(rows):
                raise ValueError(f"{key}={path} has damaged samples; name them with fastdit verify {path}")
            z = mean_latents(moments.to(device), spec)  # (n, C, h, w)
            with one_thread(torch.device(device)):
                padded = torch.cat([z, z.new_zeros(-len(z) % DECODED, *z.shape[1:])]).split(DECODED)
                images = torch.cat([to_uint8(codec.decode(part)) for part in padded])
            yield images[: len(rows)].cpu().numpy()

    decoded = {"latents": "posterior mean", "vae": codec.name, "vae_fingerprint": codec.fingerprint}
    return ImageSet(path, len(index), width_height(spec.image_size), blocks, decoded, by_class=manifest.num_classes > 0)


def _pixels(image: np.ndarray) -> str:
    return f"{image.shape[1]} x {image.shape[0]}"


def _array(path: Path, key: str) -> ImageSet:
    """arr_0 of an npz file, which is not read as a whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            if "arr_0.npy" not in archive.namelist():
                raise ValueError(f"it has no arr_0, only {', '.join(archive.namelist())[:200]}")
            with archive.open("arr_0.npy") as file:
                shape, fortran, dtype = array_header(file)
                start = file.tell()
    except Exception as error:  # zipfile, zlib and numpy raise all kinds of errors on damaged files
        raise ValueError(f"{key}={path} cannot be read ({error}); give an npz with arr_0, uint8 (N, H, W, 3)") from None
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise ValueError(f"{key}={path} holds {dtype} {shape}; arr_0 must be uint8 (N, H, W, 3) in C order")
    return ImageSet(path, shape[0], (shape[2], shape[1]), partial(_array_blocks, path, key, shape, start))


def _array_blocks(path: Path, key: str, shape: tuple, start: int, numbers: Iterable[int]) -> Iterator[np.ndarray]:
    image = math.prod(shape[1:])
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        for b in numbers:
            count = min(BLOCK, shape[0] - b * BLOCK)
            try:
                file.seek(start + b * BLOCK * image)
                data = file.read(count * image)
            except Exception as error:  # of as many kinds as above
                raise ValueError(f"{key}={path} is damaged ({error}); write it again") from None
            if len(data) < count * image:
                raise ValueError(f"{key}={path} is damaged: arr_0 ends in image block {b}; write it again")
            yield np.frombuffer(data, np.uint8).reshape(count, *shape[1:])


def read_statistics(path: str | Path, key: str) -> tuple[Features, dict] | None:
    """mu, sigma, perhaps mu_s and sigma_s, and from `save_statistics` features of an npz; None if it has no mu.

    And what is known about them: the keys of ABOUT, or none for ADM's files.
    """
    if Path(path).suffix != ".npz" or not Path(path).is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if "mu" not in arrays:
                return None
            pairs = [tuple(np.asarray(arrays[name], np.float64) for name in pair)
                     for pair in (("mu", "sigma"), ("mu_s", "sigma_s")) if pair[0] in arrays]  # fmt: skip
            about = json.loads(str(arrays["about"])) if "about" in arrays else {}
            values = arrays["features"] if "features" in arrays else None
    except Exception as error:  # of many kinds, from zipfile, numpy and json
        raise ValueError(f"{key}={path} cannot be read ({error}); write it again with --save-reference") from None
    for mu, sigma in pairs:
        if mu.ndim != 1 or not len(mu) or sigma.shape != (len(mu), len(mu)):
            raise ValueError(f"{key}={path} holds mu {mu.shape} and sigma {sigma.shape}, not (D,) and (D, D)")
    known = isinstance(about, dict) and (not about or about.keys() - {"decoded_by"} == ABOUT and _is_size(about["size"])
                                         and type(about["images"]) is int)  # fmt: skip
    # NumPy returns what is not a .npy file as bytes
    fits = values is None or (isinstance(values, np.ndarray) and values.dtype.kind == "f" and values.ndim == 2
                              and values.shape[1:] == pairs[0][0].shape and np.isfinite(values).all())  # fmt: skip
    numbers = all(np.abs(array).max() <= LARGEST**2 for pair in pairs for array in pair)  # also for NaN
    symmetric = numbers and all(np.allclose(sigma, sigma.T, rtol=1e-4, atol=1e-6) for _, sigma in pairs)
    if not (symmetric and known and fits):
        raise ValueError(f"{key}={path} is damaged: mu and sigma must be finite, and about complete; write it again "
                         "with --save-reference")  # fmt: skip
    moments = [Moments(mu, sigma, about.get("images", 0)) for mu, sigma in pairs]
    return Features(values, None, *moments), about


def _is_size(value: object) -> bool:
    """Whether it is [width, height], or None, as of statistics whose images are not known."""
    return value is None or (isinstance(value, list) and [type(side) for side in value] == [int, int])


def save_statistics(path: Path, features: Features, about: dict) -> None:
    """Write what `read_statistics` reads, with the features (N, D) where they are known."""
    moments = features.moments
    arrays = {"mu": moments.mu, "sigma": moments.sigma, "about": np.array(json.dumps(about))}
    if features.values is not None:
        arrays["features"] = features.values
    if features.spatial is not None:
        arrays |= {"mu_s": features.spatial_moments.mu, "sigma_s": features.spatial_moments.sigma}
    with replacing(path) as file:
        np.savez(file, **arrays)
