"""`fastdit evaluate`: features of any images, on any number of processes, and numbers that carry their protocol."""

import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fastdit.config import leaves
from fastdit.data.order import permutation
from fastdit.distributed import Ranks
from fastdit.errors import output_file
from fastdit.evaluation.features import Extractor, load_features
from fastdit.evaluation.images import ImageSet, open_set, read_statistics, save_statistics
from fastdit.evaluation.metrics import METRICS, Features, frechet_distance
from fastdit.evaluation.protocol import defaults, made_on, remarks, stamp, subject
from fastdit.files import sha256
from fastdit.registry import check


@dataclass(frozen=True)
class Reference:
    """Real images as features, and what the protocol says about them; one serves any number of measurements."""

    features: Features
    about: dict[str, Any]
    halves: dict[int, dict[str, Any]] = field(default_factory=dict)  # of `real`, by number of samples

    def real(self, count: int) -> dict[str, Any] | None:
        """The distance of one half of the images to the other, at the number of samples where they suffice."""
        values = self.features.values
        if values is None or len(values) < 4:
            return None
        if count not in self.halves:
            order = permutation(0, 0, len(values))
            half = len(order) // 2
            taken = order[half:][: max(count, 2)]
            distance = frechet_distance(values[taken], values[order[:half]])
            self.halves[count] = {"frechet": distance, "num_images": len(taken), "reference_images": half}
        return self.halves[count]


def evaluate(
    samples: str | Path | ImageSet,
    reference: str | Path,
    ranks: Ranks,
    *,
    features: str = "efficientnet-lite0",
    metrics: Sequence[str] | None = None,
    image_size: str | None = None,
    seed: int = 0,
    save_reference: str | None = None,
) -> dict[str, Any]:
    """The result of `measure` for the samples and the reference at these paths.

    ValueError for what cannot be read or compared. Prints what was left out, and where images are too few.
    """
    check_options(metrics, save_reference)
    extractor = load_features(features, ranks.device)
    images = samples if isinstance(samples, ImageSet) else open_set(samples, "SAMPLES", image_size, ranks.device)
    real = load_reference(reference, images.size, extractor, ranks, image_size, save_reference)
    result = measure(images, real, ranks, extractor=extractor, metrics=metrics, seed=seed)
    for line in remarks(result):
        print(line, file=sys.stderr)
    return result


def check_options(metrics: Sequence[str] | None, save_reference: str | None) -> None:
    """ValueError for an unknown metric, or a file that cannot be written."""
    for name in metrics or ():
        check(name, METRICS, "--metrics")
    if save_reference:
        output_file(save_reference, "--save-reference", ".npz", new=True)


def measure(
    images: ImageSet,
    reference: Reference,
    ranks: Ranks,
    *,
    extractor: Extractor,
    metrics: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """On the main process: protocol, subject, distance, values, real, left_out, environment, remarks; {} elsewhere.

    A collective call. The processes share the images, which only the extractor resizes. Without `metrics`: those that
    these images allow.
    """
    values, digest = extract(images, extractor, ranks)
    if not ranks.is_main:
        return {}
    features = as_features(values, extractor)
    probabilities, order = extractor.probabilities(features.values), {}
    if images.by_class and probabilities is not None:  # a part of consecutive images would have few classes
        probabilities = np.random.default_rng(0).permutation(probabilities)
        order["inception_score"] = {"order": "random"}
    features = replace(features, probabilities=probabilities)
    found, kept, left_out = {}, [], {}
    for name in metrics or METRICS:
        try:
            found |= METRICS[name](features, reference.features, seed)
            kept.append(name)
        except ValueError as error:
            if metrics:
                raise ValueError(f"--metrics={name}: {error}") from None
            left_out[name] = str(error)
    result = {
        "protocol": stamp(images, reference.about, extractor, seed) | {
            "metrics": {name: defaults(name) | order.get(name, {}) for name in kept}
        },
        "subject": {"samples": str(images.path), "samples_sha256": digest, **subject(images)},
        "distance": extractor.distance,
        "values": found,
        "real": reference.real(images.count),
        "left_out": left_out,
        "environment": made_on(ranks.device),
    }
    return result | {"remarks": remarks(result)}


def extract(images: ImageSet, extractor: Extractor, ranks: Ranks) -> tuple[np.ndarray, str]:
    """On every process: the features (N, dim + spatial) of all images, and the SHA-256 of their pixels.

    Block b of the images belongs to process b mod world. The hash is that of the hashes of the images.
    """
    made = dict(leaves(images.sampling or {})) | {"checkpoint": images.path.name, "vae": ""}  # not the folders
    ranks.agree({"images": images.count, "size": images.size, "features": extractor.hash, **made})
    count = math.ceil(images.count / images.block)
    share = math.ceil(count / ranks.world)
    values = np.zeros((share, images.block, extractor.dim + extractor.spatial), np.float32)
    digests = np.zeros((share, images.block, 32), np.uint8)
    own = range(ranks.rank, count, ranks.world)
    quiet = not ranks.is_main or not sys.stderr.isatty()
    for slot, block in enumerate(tqdm(images.blocks(own), total=len(own), unit="batch", disable=quiet)):
        values[slot, : len(block)] = extractor(block)
        for i, image in enumerate(block):
            digests[slot, i] = np.frombuffer(digest_of(image), np.uint8)
    # the last block alone is shorter
    values, digests = (ranks.blocks(torch.from_numpy(own)).cpu().numpy()[: images.count] for own in (values, digests))
    return values, hashlib.sha256(digests.tobytes()).hexdigest()


def digest_of(image: np.ndarray) -> bytes:
    """The SHA-256 of an image (H, W, 3), with its shape."""
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest()


def load_reference(
    path: str | Path,
    size: Sequence[int],
    extractor: Extractor,
    ranks: Ranks,
    image_size: str | None = None,
    save_to: str | None = None,
) -> Reference:
    """The real images or statistics at `path`, for samples of `size` (width, height). A collective call.

    `save_to`: the main process writes their statistics to this .npz file.
    """
    reference = _read_reference(path, size, extractor, ranks, image_size)
    if save_to and ranks.is_main:
        save_statistics(Path(save_to), reference.features, reference.about)
    return reference


def _read_reference(
    path: str | Path, size: Sequence[int], extractor: Extractor, ranks: Ranks, image_size: str | None
) -> Reference:
    stated, known = read_statistics(path, "--reference") or (None, {})
    if known:
        made_with = known.get("extractor"), known.get("extractor_sha256")
        if made_with != (extractor.name, extractor.hash):
            raise ValueError(f"--reference={path} holds features of {made_with[0]}; use --features {made_with[0]}, or "
                             f"give images for {extractor.name}")  # fmt: skip
        _same_size(size, known["size"], path)
        return Reference(stated, known)
    about = {"extractor": extractor.name, "extractor_sha256": extractor.hash}
    use = stated and extractor.name == "inception-v3"
    if use and stated.moments.mu.shape != (extractor.dim,):
        raise ValueError(f"--reference={path} has mu {stated.moments.mu.shape}, not ({extractor.dim},)")
    try:
        real = open_set(path, "--reference", image_size, ranks.device)
    except ValueError:
        if not stated:
            raise
        if not use:
            raise ValueError(f"--reference={path} holds Inception's mu and sigma only; use --features inception-v3, or "
                             f"give images for {extractor.name}") from None  # fmt: skip
        return Reference(stated, about | {"sha256": sha256(path), "images": 0, "size": None})
    _same_size(size, real.size, path)
    values, digest = extract(real, extractor, ranks)
    about |= {"sha256": digest, "images": real.count, "size": list(real.size)}
    if real.sampling and "latents" in real.sampling:
        about["decoded_by"] = real.sampling["vae_fingerprint"]
    if use:  # ADM's: moments of all images, and some of these images
        stated = replace(stated, values=values[:, : extractor.dim])
        parts = [part for m in (stated.stated, stated.spatial) if m for part in (m.mu.tobytes(), m.sigma.tobytes())]
        return Reference(stated, about | {"sha256": hashlib.sha256(digest.encode() + b"".join(parts)).hexdigest()})
    return Reference(as_features(values, extractor), about)


def as_features(values: np.ndarray, extractor: Extractor) -> Features:
    """What `extract` returned (N, dim + spatial), in its parts."""
    spatial = np.ascontiguousarray(values[:, extractor.dim :]) if extractor.spatial else None
    return Features(np.ascontiguousarray(values[:, : extractor.dim]), spatial=spatial)


def _same_size(size: Sequence[int], reference: Sequence[int] | None, path: str | Path) -> None:
    if reference is not None and tuple(reference) != tuple(size):
        ours, theirs = ("x".join(map(str, sides)) for sides in (size, reference))
        raise ValueError(f"SAMPLES has images of {ours} pixels, --reference={path} of {theirs}; only the extractor "
                         f"resizes: give a reference of {ours}, or --image-size for a folder")  # fmt: skip
