"""Latents that other programs wrote: where each keeps them, what they mean, and how one is read.

    fast-dit     *_features/<i>.npy (1, C, h, w), sampled and multiplied by 0.18215; *_labels/<i>.npy (1,)
    repa, edm2   a folder or zip of <part>/img-mean-std-<i>.npy (2C, h, w) and dataset.json {"labels": [[file, y], ...]}
    lightningdit *.safetensors with latents, latents_flip (n, C, h, w), sampled, and labels (n,); latents_stats.pt
    cerebras     <class>/<image>.npz with vae_output (2C, h, w), mean and log variance, and label; mirror images in a
                 second folder

Nothing that is read can run code, and no name in a file is used as a path.
"""

import io
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastdit.data.latents import PerChannel
from fastdit.data.sources import MAX_CLASSES, version_of
from fastdit.data.synthetic import SD_SCALE
from fastdit.files import JSON_BYTES, read_array, read_bytes, read_json

MOST = 1 << 28  # bytes of one array; the latent of a 2048 px image has 2^22
SD_VAE = "stabilityai/sd-vae-ft-"
STATS = "latents_stats.pt"
AGAIN = "copy it again"
Sample = tuple[np.ndarray, int | None]  # moments (orientations, 2C, h, w), unscaled; label


@dataclass(frozen=True)
class OtherLatents:
    """Latents in a foreign layout. `read(i)` raises a ValueError that names the file of sample i."""

    names: Sequence[str]  # of the samples, for messages
    read: Callable[[int], Sample]
    versions: Sequence[tuple[int, int]]  # (size in bytes, time of the last change in ns) of what is read
    vae: str  # the autoencoder that the program uses by default
    scale: PerChannel | None = None  # that the layout fixes; None: the autoencoder's
    shift: PerChannel = 0.0
    downsample: int = 8  # image side / latent side
    class_names: tuple[str, ...] = ()  # if the layout has them


def fast_dit(root: Path, scale: float | None, mirrored: Path | None) -> OtherLatents:
    """fast-DiT's extract_features.py."""
    folders = [_only(root, "*_features"), _only(root, "*_labels")]
    found = [{path.name: path for path in folder.glob("*.npy")} for folder in folders]
    for own, other, folder in ((*found, folders[1]), (*found[::-1], folders[0])):
        if lone := sorted(own.keys() - other.keys()):
            raise ValueError(f"{folder} has no {lone[0]} ({len(lone)} are missing); a feature and its label have the "
                             f"same name: {AGAIN}")  # fmt: skip
    names = sorted(found[0], key=lambda name: (len(name), name))  # numbers without leading zeros
    scale = scale or SD_SCALE

    def read(i: int) -> Sample:
        path, label = (files[names[i]] for files in found)
        array, y = _array(path), _array(label)
        if array.ndim == 4 and len(array) == 1:
            array = array[0]
        if y.size != 1 or y.dtype.kind not in "iu":
            raise ValueError(f"{label} has {y.dtype} of shape {y.shape}, not one label; {AGAIN}")
        return _sampled(_latent(array, path)[None] / np.float64(np.float32(scale))), int(y.item())

    return OtherLatents([f"{folders[0].name}/{name}" for name in names], read, _versions(found[0].values()),
                        f"{SD_VAE}ema", scale)  # fmt: skip


def mean_std(root: Path, scale: float | None, mirrored: Path | None) -> OtherLatents:
    """REPA's and EDM2's dataset tools."""
    if root.is_dir():
        root = root / "vae-sd" if (root / "vae-sd").is_dir() else root
        files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.npy")}
        versions = _versions(files.values())
        found = [root / "dataset.json"] if (root / "dataset.json").is_file() else root.rglob("dataset.json")
        about = _dataset(root, files, [path.relative_to(root).as_posix() for path in found])
        labels = read_json(root / about).get("labels") if about else None
        fetch: Callable[[str], bytes] = lambda name: read_bytes(files[name], MOST)  # noqa: E731
    else:
        try:
            archive = zipfile.ZipFile(root)
        except Exception as error:  # of as many kinds as below
            raise ValueError(f"SRC={root} is not a folder, nor a complete zip file ({error}); {AGAIN}") from None
        versions = [version_of(root)]
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        files = {name: name for name in sizes if name.endswith(".npy")}

        def fetch(name: str) -> bytes:
            if sizes[name] > (JSON_BYTES if name.endswith(".json") else MOST):  # a small zip can hold a large file
                raise ValueError(f"it has {sizes[name]} bytes")
            return archive.read(name)

        about = _dataset(root, files, [name for name in sizes if name.split("/")[-1] == "dataset.json"])
        labels = _labels_in_zip(root, about, fetch) if about else None
    names, archived = sorted(files), "" if root.is_dir() else f"{root}: "
    inside = about.removesuffix("dataset.json")
    known = _known_labels(labels, [name.removeprefix(inside) for name in names], root) if labels is not None else {}

    def read(i: int) -> Sample:
        try:
            array = read_array(fetch(names[i]))
        except Exception as error:  # zipfile and zlib raise all kinds of errors on damaged files
            raise ValueError(f"{root}: {names[i]} cannot be read: {error}; {AGAIN}") from None
        array = _latent(array, f"{root}: {names[i]}")
        if len(array) % 2:
            raise ValueError(f"{root}: {names[i]} has {len(array)} channels, not mean and deviation of each; {AGAIN}")
        return array[None], known.get(names[i].removeprefix(inside))

    return OtherLatents([archived + name for name in names], read, versions, f"{SD_VAE}mse")


def lightningdit(root: Path, scale: float | None, mirrored: Path | None) -> OtherLatents:
    """LightningDiT's extract_features.py; x_0 = (latent - mean) / std * scale, with latents_stats.pt and scale 1."""
    from safetensors import SafetensorError, safe_open

    paths = sorted(root.glob("*.safetensors"))
    places, opened = [], []
    for path in paths:
        try:
            file = safe_open(path, framework="pt")
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, RuntimeError, OverflowError) as error:
            raise ValueError(f"{path} cannot be read: {error}; {AGAIN}") from None
        if not {"latents", "labels"} <= shapes.keys() or len(shapes["latents"]) != 4:
            raise ValueError(f"{path} has {shapes}, not latents (n, C, h, w) and labels (n,); {AGAIN}")
        flipped = shapes.get("latents_flip", shapes["latents"])
        if flipped != shapes["latents"] or shapes["labels"] != shapes["latents"][:1]:
            raise ValueError(f"{path} has tensors of different lengths: {shapes}; {AGAIN}")
        opened.append((file, [key for key in ("latents", "latents_flip") if key in shapes]))
        places += [(len(opened) - 1, row) for row in range(shapes["latents"][0])]
    if len({len(keys) for _, keys in opened}) > 1:
        raise ValueError(f"SRC={root} has files with latents_flip and files without; extract them in the same way")

    def read(i: int) -> Sample:
        number, row = places[i]
        file, keys = opened[number]
        both = [file.get_slice(key)[row].float().numpy() for key in keys]  # bfloat16 too; float32 holds it exactly
        label = file.get_slice("labels")[row]
        if label.is_floating_point():
            raise ValueError(f"{paths[number]} has labels of {label.dtype}, not whole numbers; {AGAIN}")
        where = f"{paths[number]}, row {row}"
        return _sampled(np.stack([_latent(latent, where) for latent in both])), int(label)

    per_channel, shift = (scale, 0.0) if scale else (None, 0.0)
    if (root / STATS).is_file():
        mean, std = _stats(root / STATS)
        per_channel, shift = tuple(((scale or 1.0) / std).tolist()), tuple(mean.tolist())
    names = [f"{paths[number].name}, row {row}" for number, row in places]
    return OtherLatents(names, read, _versions(paths), "hustvl/vavae-imagenet256-f16d32-dinov2", per_channel, shift, 16)


def cerebras(root: Path, scale: float | None, mirrored: Path | None) -> OtherLatents:
    """The Cerebras model zoo's create_imagenet_latents.py; `mirrored`: what its --horizontal_flip wrote."""
    paths = sorted(root.glob("*/*.npz"))
    if not paths and (splits := sorted(path.parent.parent.name for path in root.glob("*/*/*.npz"))):
        raise ValueError(f"SRC={root} has no <class>/*.npz; give one of its splits, such as {root / splits[0]}")
    others = [path.relative_to(root) for path in paths]
    if mirrored and mirrored.resolve() == root.resolve():
        raise ValueError(f"--mirrored={mirrored} is SRC; give the folder that --horizontal_flip wrote")
    if mirrored and (lone := [path for path in others if not (mirrored / path).is_file()]):
        raise ValueError(f"--mirrored={mirrored} has no {lone[0]} ({len(lone)} are missing); it must have the mirror "
                         f"image of each file in {root}")  # fmt: skip
    labels: dict[str, int] = {}
    for path in paths:  # a label for each class; the other files must agree
        if path.parent.name not in labels:
            check_label(label := _npz(path)[1], path)
            labels[path.parent.name] = label
    by_label = {label: name for name, label in labels.items()}
    if len(by_label) < len(labels):
        raise ValueError(f"SRC={root} has two classes with one label: {labels}; {AGAIN}")

    def read(i: int) -> Sample:
        each = [_npz(path) for path in (paths[i], mirrored and mirrored / others[i]) if path]
        expected = labels[paths[i].parent.name]
        if any(label != expected for _, label in each):
            raise ValueError(f"{paths[i]} has label {[label for _, label in each]}, not {expected} as the other files "
                             f"in its folder; {AGAIN}")  # fmt: skip
        return np.stack([moments for moments, _ in each]), expected

    names = tuple(by_label.get(label, str(label)) for label in range(max(by_label, default=-1) + 1))
    versions = _versions(paths) + (_versions([mirrored / path for path in others]) if mirrored else [])
    return OtherLatents([*map(str, others)], read, versions, f"{SD_VAE}mse", scale, class_names=names)


LAYOUTS: Mapping[str, Callable[[Path, float | None, Path | None], OtherLatents]] = {
    "fast-dit": fast_dit, "repa": mean_std, "edm2": mean_std, "lightningdit": lightningdit, "cerebras": cerebras,
}  # fmt: skip


def _only(root: Path, pattern: str) -> Path:
    """The one folder in `root` that matches."""
    found = [path for path in sorted(root.glob(pattern)) if path.is_dir()]
    if len(found) != 1:
        raise ValueError(f"SRC={root} has {len(found)} folders {pattern}, not one; give what was the --feature-path of "
                         "fast-DiT's extract_features.py")  # fmt: skip
    return found[0]


def _versions(paths) -> list[tuple[int, int]]:
    return [version_of(path) for path in sorted(paths)]


def _array(path: Path) -> np.ndarray:
    try:
        return read_array(read_bytes(path, MOST))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}; {AGAIN}") from None


def _latent(array: np.ndarray, where: str | Path) -> np.ndarray:
    """Floats (C, h, w), all finite; ValueError otherwise. float64 becomes float32."""
    if array.ndim != 3 or array.dtype.kind != "f" or not array.size:
        raise ValueError(f"{where} has {array.dtype} of shape {array.shape}, not floats (C, h, w); {AGAIN}")
    if not np.isfinite(array).all():
        raise ValueError(f"{where} has values that are not finite; {AGAIN}, or extract it again")
    return array if array.dtype.itemsize == 2 else array.astype(np.float32)


def _sampled(latents: np.ndarray) -> np.ndarray:
    """Samples of the posterior (n, C, h, w) as moments (n, 2C, h, w): with deviation 0, each is drawn again exactly."""
    with np.errstate(over="ignore"):  # infinite values are refused by name
        latents = latents.astype(np.float32)
    return np.concatenate([latents, np.zeros_like(latents)], axis=1)


def _dataset(root: Path, names: Collection[str], found: Sequence[str]) -> str:
    """The dataset.json that has the labels, or "" if there is none. A zip file may hold the folder around it."""
    folders = {name: name.removesuffix("dataset.json") for name in found}
    about = min((name for name in found if any(each.startswith(folders[name]) for each in names or [""])), key=len,
                default="")  # fmt: skip
    if not all(name.startswith(folders.get(about, "")) for name in names):
        raise ValueError(f"SRC={root} has latents in {folders[about]}, with their dataset.json, and elsewhere; give "
                         "one folder of latents, or a zip file of it")  # fmt: skip
    return about


def _labels_in_zip(root: Path, about: str, fetch: Callable[[str], bytes]) -> list | None:
    try:
        return json.loads(fetch(about)).get("labels")
    except Exception as error:  # zipfile, zlib and json raise all kinds of errors on damaged files
        raise ValueError(f"{root}: dataset.json cannot be read: {error}; {AGAIN}") from None


def check_label(label: int, where: str | Path) -> None:
    if not 0 <= label < MAX_CLASSES:
        raise ValueError(f"{where} has label {label}; use labels from 0 to {MAX_CLASSES - 1}")


def _known_labels(labels: list, names: Sequence[str], root: Path) -> dict[str, int]:
    """{file: label} of a dataset.json; ValueError unless it has each file once."""
    where, known = f"{root}: dataset.json", {}
    for entry in labels if isinstance(labels, list) else [labels]:
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and type(entry[1]) is int):
            raise ValueError(f"{where} has {str(entry)[:80]} among its labels, not [file, number]; {AGAIN}")
        check_label(entry[1], f"{where}, {entry[0]},")
        if known.setdefault(entry[0], entry[1]) != entry[1]:
            raise ValueError(f"{where} has two labels for {entry[0]}, {known[entry[0]]} and {entry[1]}; correct it")
    listed = set(names)
    for missing, what in ((listed - known.keys(), "has no label for"), (known.keys() - listed, "names")):
        if missing:
            absent = "" if what != "names" else ", which is not there"
            raise ValueError(f"{where} {what} {min(missing)}{absent} ({len(missing)} in all); {AGAIN}")
    return known


def _stats(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation (C,) of each channel, float64."""
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):  # of pickles that torch.save did not write
            stored = torch.load(path, map_location="cpu", weights_only=True)  # refuses everything but tensors
        mean, std = (stored[key].double().numpy().reshape(-1) for key in ("mean", "std"))
    except Exception as error:  # pickle, zipfile and torch raise all kinds of errors on damaged files
        reason = re.sub(r"\s+", " ", str(error))[:100]
        raise ValueError(f"{path} cannot be read as tensors mean and std ({type(error).__name__}: {reason}); nothing "
                         f"in it was run: {AGAIN}") from None  # fmt: skip
    if mean.shape != std.shape or not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
        raise ValueError(f"{path} has mean {mean.shape} and std {std.shape} that are not finite and positive; {AGAIN}")
    return mean, std


def _npz(path: Path) -> Sample:
    """The moments (2C, h, w) and the label in one of the Cerebras model zoo's files."""
    try:
        with zipfile.ZipFile(io.BytesIO(read_bytes(path, MOST))) as archive:
            held = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if large := next((key for key, info in held.items() if info.file_size > MOST), None):
                raise ValueError(f"{large} has {held[large].file_size} bytes")
            read = {key: read_array(archive.read(held[key]))
                    for key in ("vae_output", "mean", "logvar", "label") if key in held}  # fmt: skip
        if {"mean", "logvar"} <= read.keys():
            read["vae_output"] = np.concatenate([read["mean"], read["logvar"]])
    except Exception as error:  # zipfile and zlib raise all kinds of errors on damaged files
        raise ValueError(f"{path} cannot be read: {error}; {AGAIN}") from None
    if not {"vae_output", "label"} <= read.keys():
        raise ValueError(f"{path} has {', '.join(held)}, not vae_output and label; {AGAIN}")
    array, label = _latent(read["vae_output"], path), read["label"]
    if len(array) % 2 or label.size != 1 or label.dtype.kind not in "iu":
        raise ValueError(f"{path} has vae_output {array.shape} and label {label.dtype} {label.shape}, not mean and log "
                         f"variance (2C, h, w) and one number; {AGAIN}")  # fmt: skip
    mean, logvar = np.split(array.astype(np.float32), 2)  # (C, h, w) each
    return np.concatenate([mean, np.exp(0.5 * np.clip(logvar, -30, 20))]), int(label.item())
