"""`fastdit evaluate`: numbers that carry their protocol, and comparisons that refuse unlike protocols."""

import hashlib
import inspect
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fastdit import __version__
from fastdit.data.loader import permutation
from fastdit.distributed import Ranks
from fastdit.environment import commit, hardware
from fastdit.evaluation import metrics as formulas
from fastdit.evaluation.features import BLOCK, Extractor, load_features
from fastdit.evaluation.images import ImageSet, open_set, read_statistics, save_statistics
from fastdit.evaluation.metrics import METRICS, Features, frechet_distance
from fastdit.files import read_text
from fastdit.registry import check

PROTOCOL = 1  # increases when the same files and settings give other digits
SUBJECT = ("checkpoint", "sha256")  # what may differ between two results that are compared
FUNCTIONS = {  # whose defaults are part of the protocol
    "frechet_infinity": formulas.frechet_infinity,
    "kid": formulas.kernel_distance,
    "precision_recall": formulas.precision_recall,
    "density_coverage": formulas.density_coverage,
    "inception_score": formulas.inception_score,
}


def evaluate(
    samples: str | Path,
    reference: str | Path,
    ranks: Ranks,
    *,
    features: str = "efficientnet-lite0",
    metrics: Sequence[str] | None = None,
    image_size: str | None = None,
    seed: int = 0,
    save_reference: str | None = None,
) -> dict[str, Any]:
    """The result of `samples` against `reference` on the main process: protocol, subject, values, real, environment.

    Images are shared by the processes and resized by the extractor only. Without `metrics`, those that these images
    allow. ValueError for what cannot be read or compared.
    """
    for name in metrics or ():
        check(name, METRICS, "--metrics")
    if save_reference and not (Path(save_reference).suffix == ".npz" and Path(save_reference).parent.is_dir()):
        raise ValueError(f"--save-reference={save_reference} must end in .npz and be in a folder that exists")
    extractor = load_features(features, ranks.device)
    images = open_set(samples, "SAMPLES", image_size)
    real, about = _reference(reference, extractor, images, image_size, ranks)
    values, digest = extract(images, extractor, ranks)
    if not ranks.is_main:
        return {}
    if save_reference:
        save_statistics(Path(save_reference), real, about)
    generated = Features(values, extractor.probabilities(values))
    _warn(images.count, about["images"], extractor)
    found, kept = {}, []
    for name in metrics or METRICS:
        try:
            found |= METRICS[name](generated, real, seed)
            kept.append(name)
        except ValueError as error:
            if metrics:
                raise ValueError(f"--metrics={name}: {error}") from None
            print(f"{name} is left out: {error}", file=sys.stderr)
    sampling = images.sampling or {}
    return {
        "protocol": {
            "version": PROTOCOL,
            "num_images": images.count,
            "image_size": list(images.size),
            "cropped": images.cropped,
            "samples": {key: value for key, value in sampling.items() if key not in SUBJECT},
            "reference": about,
            "features": extractor.name,
            "features_sha256": extractor.hash,
            "seed": seed,
            "metrics": {name: _defaults(name) for name in kept},
        },
        "subject": {"samples": str(samples), "samples_sha256": digest} | {key: sampling.get(key) for key in SUBJECT},
        "distance": extractor.distance,
        "values": found,
        "real": _real(real, images.count),
        "environment": {
            "fastdit": __version__,
            "commit": commit(),
            "torch": torch.__version__,
            "hardware": hardware(ranks.device),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        },
    }


def extract(images: ImageSet, extractor: Extractor, ranks: Ranks) -> tuple[np.ndarray, str]:
    """On every process: the features (N, D) of all images, and the SHA-256 of their pixels.

    Block b of 32 images belongs to process b mod world. The hash is that of the hashes of the blocks.
    """
    count = math.ceil(images.count / BLOCK)
    share = math.ceil(count / ranks.world)
    values = np.zeros((share, BLOCK, extractor.dim), np.float32)
    digests = np.zeros((share, 32), np.uint8)
    own = range(ranks.rank, count, ranks.world)
    quiet = not ranks.is_main or not sys.stderr.isatty()
    for slot, block in enumerate(tqdm(images.blocks(own), total=len(own), unit="batch", disable=quiet)):
        values[slot, : len(block)] = extractor(block)
        digest = hashlib.sha256(repr(block.shape[1:]).encode() + block.tobytes()).digest()
        digests[slot] = np.frombuffer(digest, np.uint8)
    ordered = []
    for mine in (values, digests):
        every = ranks.gather(torch.from_numpy(mine).to(ranks.device)).cpu().numpy()  # (world share, ...)
        every = every.reshape(ranks.world, share, *mine.shape[1:]).swapaxes(0, 1)  # block b at [b // world, b % world]
        ordered.append(every.reshape(-1, *mine.shape[1:])[:count])
    return ordered[0].reshape(-1, extractor.dim)[: images.count], hashlib.sha256(ordered[1].tobytes()).hexdigest()


def _reference(
    path: str | Path, extractor: Extractor, images: ImageSet, image_size: str | None, ranks: Ranks
) -> tuple[Features, dict[str, Any]]:
    """The features of the reference, and what the protocol says about it."""
    stated = read_statistics(path, "--reference")
    if stated and stated.about:
        made_with = stated.about.get("extractor"), stated.about.get("extractor_sha256")
        if made_with != (extractor.name, extractor.hash):
            raise ValueError(f"--reference={path} holds features of {made_with[0]}; use --features {made_with[0]}, or "
                             f"give images for {extractor.name}")  # fmt: skip
        _same_size(images, stated.about["size"], path)
        return stated.features, stated.about
    about = {"extractor": extractor.name, "extractor_sha256": extractor.hash}
    use = stated and extractor.name == "inception-v3"
    if use and stated.features.moments.mu.shape != (extractor.dim,):
        raise ValueError(f"--reference={path} has mu {stated.features.moments.mu.shape}, not ({extractor.dim},)")
    try:
        real = open_set(path, "--reference", image_size)
    except ValueError:
        if not stated:
            raise
        if not use:
            raise ValueError(f"--reference={path} holds Inception's mu and sigma only; use --features inception-v3, or "
                             f"give images for {extractor.name}") from None  # fmt: skip
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return stated.features, about | {"sha256": digest, "images": 0, "size": None}
    _same_size(images, real.size, path)
    values, digest = extract(real, extractor, ranks)
    about |= {"sha256": digest, "images": real.count, "size": list(real.size)}
    if use:  # ADM's: moments of all images, and some of these images
        moments = stated.features.moments
        digest = hashlib.sha256(digest.encode() + moments.mu.tobytes() + moments.sigma.tobytes()).hexdigest()
        return Features(values, stated=moments), about | {"sha256": digest}
    return Features(values), about


def _same_size(images: ImageSet, size: Sequence[int] | None, path: str | Path) -> None:
    if size is not None and tuple(size) != images.size:
        ours, theirs = ("x".join(map(str, sides)) for sides in (images.size, size))
        raise ValueError(f"SAMPLES={images.path} has images of {ours} pixels, --reference={path} of {theirs}; only the "
                         f"extractor resizes: give a reference of {ours}, or --image-size for a folder")  # fmt: skip


def _real(real: Features, count: int) -> dict[str, Any] | None:
    """The distance of one half of the reference's images to the other, at the number of samples where they suffice."""
    if real.values is None or len(real.values) < 4:
        return None
    order = permutation(0, 0, len(real.values))
    half = len(order) // 2
    taken = order[half:][: max(count, 2)]
    distance = frechet_distance(real.values[taken], real.values[order[:half]])
    return {"frechet": distance, "num_images": len(taken), "reference_images": half}


def _warn(samples: int, reference: int, extractor: Extractor) -> None:
    for name, count in (("SAMPLES", samples), ("--reference", reference)):
        if 0 < count <= extractor.dim:
            print(f"warning: {name}: {count} images are too few for a covariance of {extractor.dim} features; compare "
                  f"at equal numbers only, or use more than {extractor.dim}", file=sys.stderr)  # fmt: skip


def _defaults(name: str) -> dict[str, Any]:
    """The settings of a metric: the defaults of its function."""
    if name not in FUNCTIONS:
        return {}
    parameters = inspect.signature(FUNCTIONS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty and p.name != "seed"}


def summary(result: dict[str, Any]) -> str:
    """The values of a result in a few lines."""
    values, protocol, real = result["values"], result["protocol"], result["real"]
    known = protocol["reference"]["images"] or "an unknown number"
    lines = [f"{protocol['num_images']} images, {known} in the reference"]
    if "frechet" in values:
        lines.append(f"{result['distance']:<26}{_number('frechet', values)}")
    if real:
        counts = f"{real['num_images']} against {real['reference_images']} images"
        lines.append(f"{'real against real':<26}{real['frechet']:.4f} ({counts})")
    for name, title in (("frechet_infinity", "... for infinitely many"), ("kid", "KID")):
        if name in values:
            lines.append(f"{title:<26}{_number(name, values)} +- {_number(f'{name}_error', values)}")
    rest = [key for key in values if not key.startswith(("frechet", "kid"))]
    return "\n".join(lines + [f"{key.replace('_', ' '):<26}{_number(key, values)}" for key in rest])


def _number(key: str, values: dict[str, float]) -> str:
    return f"{values[key]:.{6 if key.startswith('kid') else 4}f}"  # a KID is mostly below 0.1


def compare(a: str | Path, b: str | Path) -> str:
    """The last results of two files side by side; ValueError that names every difference of their protocols."""
    results = [read_result(path) for path in (a, b)]
    common = [name for name in results[0]["protocol"]["metrics"] if name in results[1]["protocol"]["metrics"]]
    flat = []
    for result in results:
        protocol = result["protocol"] | {"metrics": {name: result["protocol"]["metrics"][name] for name in common}}
        flat.append(dict(_flat(protocol)))
    names = sorted({*flat[0], *flat[1]})
    unlike = [f"{n}={flat[0].get(n)} and {flat[1].get(n)}" for n in names if flat[0].get(n) != flat[1].get(n)]
    if unlike:
        raise ValueError(f"{a} and {b} were not measured alike: {'; '.join(unlike)}; measure both the same way")
    rows = [["", str(a), str(b)]]
    for key in ("samples", "sha256"):
        rows.append([key, *(str(result["subject"].get(key)) for result in results)])
    for key in results[0]["values"]:
        if key in results[1]["values"]:
            title = results[0]["distance"] if key == "frechet" else key.replace("_", " ")
            rows.append([title, *(_number(key, result["values"]) for result in results)])
    if all(result["real"] for result in results):
        rows.append(["real against real", *(_number("frechet", result["real"]) for result in results)])
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def read_result(path: str | Path) -> dict[str, Any]:
    """The last result in a file of JSON lines."""
    if not Path(path).is_file():
        raise ValueError(f"--compare: {path} does not exist; write it with fastdit evaluate --out {path}")
    lines = [line for line in read_text(Path(path)).splitlines() if line.strip()]
    try:
        result = json.loads(lines[-1])
        shapes = all(isinstance(result[key], dict) for key in ("protocol", "subject", "values"))
        if not (shapes and isinstance(result["protocol"]["metrics"], dict) and {"distance", "real"} <= result.keys()):
            raise ValueError
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        raise ValueError(f"--compare: {path} has no result in its last line; write it with fastdit evaluate "
                         f"--out {path}") from None  # fmt: skip
    return result


def _flat(tree: dict, prefix: str = ""):
    """(dotted key, value) of every leaf."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
