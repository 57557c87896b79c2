"""`fastdit neighbors`: the training images nearest to samples, and the share of samples that are too near to be new."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastdit.data.manifest import is_shards
from fastdit.data.order import permutation
from fastdit.distributed import Ranks
from fastdit.errors import counted
from fastdit.evaluation.features import FEATURES
from fastdit.evaluation.images import check_crop, open_set
from fastdit.evaluation.neighbors import QUANTILE, RESAMPLES, memorized, nearest
from fastdit.evaluation.protocol import made_on, stamp, subject
from fastdit.evaluation.spaces import FeatureSpace, LatentSpace, pictures_of
from fastdit.registry import check
from fastdit.sheets import labelled

LEAST = 1000  # training images whose own neighbors are the yardstick without held-out images, if there are as many


def neighbors(
    samples: str | Path,
    reference: str | Path,
    ranks: Ranks,
    *,
    held_out: str | Path | None = None,
    features: str | None = None,
    k: int = 5,
    rows: int = 8,
    seed: int = 0,
    image_size: str | None = None,
    vae: str | None = None,
) -> tuple[dict[str, Any], Image.Image | None]:
    """The result, like that of `evaluate`, and a sheet: the `rows` samples nearest to the training set, nearest first.

    `features`: "latents", or as for `evaluate`; by default latents if the reference is shards, else efficientnet-lite0.
    `held_out`: images, or shards, that were not trained on. Without them, the yardstick is how far training images are
    from the other training images. `vae`: the shards' autoencoder, if it was moved.
    Values: `memorized` with its error and chance (see `memorized`); `authenticity`, the share of samples farther from
    their nearest training image than that one is from the nearest other (Alaa et al. 2022, arXiv 2102.08921); median
    distances of samples and of the yardstick. On other processes than the main one: {} and None. A collective call.
    """
    if k < 1 or rows < 1:
        raise ValueError(f"-k {k} and --rows={rows} must be 1 or more")
    if features:
        check(features.partition("=")[0], ["latents", *FEATURES], "--features")
    features = features or ("latents" if is_shards(reference) else "efficientnet-lite0")
    if vae and features != "latents":
        raise ValueError(f"--vae={vae} is for --features latents; leave it out")
    check_crop(image_size, samples)  # training images are cropped to the size of the samples
    images = open_set(samples, "SAMPLES", image_size)
    space = (LatentSpace(reference, images.size, ranks, vae) if features == "latents"
             else FeatureSpace(features, reference, images.size, ranks))  # fmt: skip
    count = space.about["images"]
    if count < 2:
        raise ValueError(f"--reference={reference} has one image; give two or more")
    queries, made_of = space.embed(images)
    held, about = space.stored(held_out, "--held-out") if held_out else (None, None)
    if not ranks.is_main:
        return {}, None
    distances, indices = (found.numpy() for found in nearest(queries, space.blocks(), min(k, count)))
    first = distances[:, 0]
    closest, inverse = np.unique(indices[:, 0], return_inverse=True)
    chosen = [] if held_out else np.sort(permutation(seed, 0, count)[: max(images.count, LEAST)])
    own = torch.from_numpy(np.concatenate([closest, chosen]).astype(int))
    between = nearest(space.rows(own.tolist()), space.blocks(), 1, own)[0][:, 0].numpy()  # to the nearest other one
    others = nearest(held, space.blocks(), 1)[0][:, 0].numpy() if held_out else between[len(closest) :]
    share, error, chance = memorized(first, others, seed=seed)
    shown = np.argsort(first, kind="stable")[:rows]
    others_are = about or f"{len(others)} training images, each against the others"
    metrics = {"memorized": {"quantile": QUANTILE, "resamples": RESAMPLES}, "authenticity": {}}
    result = {
        "protocol": stamp(images, space.about, space, seed) | {"held_out": others_are, "metrics": metrics},
        "subject": {"samples": str(samples), "samples_sha256": made_of["sha256"], **subject(images)},
        "distance": space.distance,
        "values": {
            "memorized": share,
            "memorized_error": error,
            "memorized_chance": chance,
            "authenticity": float((first > between[: len(closest)][inverse]).mean()),
            "median_distance": float(np.median(first)),
            "median_distance_of_others": float(np.median(others)),
        },
        "real": None,
        "nearest": [{"sample": int(i), "distances": distances[i].tolist(), "training_images": space.names(indices[i])}
                    for i in shown],
        "environment": made_on(ranks.device),
    }  # fmt: skip
    pictures = [[own, *space.pictures(indices[i])] for own, i in zip(pictures_of(images, shown), shown, strict=True)]
    captions = [["", *(f"{d:#.3g}" for d in distances[i])] for i in shown]
    title = f"memorized: {share:.1%} (by chance: {chance:.1%})"
    return result, labelled(pictures, title=title, row_labels=[f"sample {i}" for i in shown],
                            columns_title="and the nearest training images", captions=captions)  # fmt: skip


def summary(result: dict[str, Any]) -> str:
    """The values of a result in a few lines."""
    values, protocol = result["values"], result["protocol"]
    about = protocol["held_out"]
    others = about if isinstance(about, str) else counted(about["images"], "held-out image")
    return "\n".join([
        f"{counted(protocol['num_images'], 'sample')}, {protocol['reference']['images']:,} training images, {others}",
        f"memorized                 {values['memorized']:.4f} +- {values['memorized_error']:.4f} (by chance: "
        f"{values['memorized_chance']:.4f})",
        f"authenticity              {values['authenticity']:.4f}",
        f"median {result['distance']:<34} {values['median_distance']:.4g}",
        f"the same of the others    {values['median_distance_of_others']:.4g}",
    ])  # fmt: skip
