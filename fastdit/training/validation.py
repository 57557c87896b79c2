"""`fastdit evaluate RUN --loss`: the validation loss of a checkpoint, as training computes it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastdit.build import shards_of
from fastdit.config import check_used, leaves, to_tree
from fastdit.data.manifest import Manifest
from fastdit.data.opening import open_latents
from fastdit.diffusion.objectives import OF_SAMPLES
from fastdit.distributed import Ranks
from fastdit.evaluation.loss import IMAGES, validation_loss
from fastdit.evaluation.protocol import made_on
from fastdit.pipeline import Inference
from fastdit.training import checkpoint
from fastdit.training.alignment import token_features
from fastdit.training.state import Trained, load_network, same_contents

USED = ("objective", "model.attention", "model.learn_sigma", "sampling.precision", "data.cache", "data.cache_gib",
        "data.normalize")  # keys that change the loss  # fmt: skip
HELD_OUT = ("data.shards", "data.val_shards", "data.val_fraction", "data.features")  # and without --shards
PROTOCOL = 1  # increases when the same files and settings give other digits


def fitting(manifest: Manifest, trained: Trained, where: str) -> Manifest:
    """Shards for a checkpoint, with the scale of its latents; ValueError where they are of other latents or classes."""
    data, names = trained.config.data, trained.classes.names
    if data.normalize != "none":
        manifest = manifest.scaled_as(trained.latents)
    manifest.check(num_classes=data.num_classes)
    if names and manifest.class_names and tuple(names) != manifest.class_names:
        other = next(((a, b) for a, b in zip(names, manifest.class_names, strict=False) if a != b), (len(names), len(
            manifest.class_names)))  # fmt: skip
        raise ValueError(f"--shards={manifest.folder} has other classes than the run ({other[1]}, not {other[0]}); "
                         "extract both with the same classes")  # fmt: skip
    trained.latents.check(manifest.latents, str(trained.folder), where)
    return manifest


def loss_of_run(
    path: str | Path,
    ranks: Ranks,
    *,
    shards: str | None = None,
    num_samples: int | None = None,
    weights: str | None = None,
    overrides: Iterable[str] = (),
) -> dict[str, Any]:
    """The validation loss of the checkpoint at `path` on `num_samples` images of `shards`. A collective call.

    By default the images are those of the run's data.val_shards or data.val_fraction. The result has the form of
    evaluation.evaluate.measure's. ValueError where the run names no such images, or the shards are of another kind.
    """
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"--num-samples={num_samples} must be 1 or more")
    overrides = list(overrides)
    of_samples = [f"objective.{option}" for option in OF_SAMPLES]
    held_out = () if shards else HELD_OUT
    options = {"data.val_shards": "--shards", "data.shards": "--shards"}
    check_used(overrides, (*USED, *held_out), "for a validation loss", options, of_samples)
    trained = load_network(path, weights or "ema", overrides=overrides, device=ranks.device)
    if ranks.is_main:
        trained.warn()
    data = trained.config.data
    if shards:
        manifest = open_latents(shards, data.remote_cache)
    elif data.val_shards or data.val_fraction:
        trains, manifest = shards_of(trained.config)
        if data.val_fraction and not same_contents(checkpoint.read_meta(trained.folder), trains):
            raise ValueError(f"{trained.folder} was trained on other images than data.shards={trains.folder} has now; "
                             "restore them, or give --shards")  # fmt: skip
    else:
        raise ValueError(f"--loss: {path} has neither data.val_shards nor data.val_fraction; give --shards")
    manifest = fitting(manifest, trained, str(manifest.folder))
    network = Inference(trained.model, trained.config.sampling.precision, compile=False)
    like, count = checkpoint.read_meta(trained.folder).get("features"), num_samples or IMAGES
    if trained.config.model.class_token and not like:
        raise ValueError(f"{trained.folder} does not say which encoder its class token is from; evaluate its run")
    features = token_features(trained.config, shards or data.val_shards, like)
    ranks.agree({"checkpoint": trained.folder.name, "sha256": trained.identity, "images": manifest.index_sha256,
                 "count": count, **dict(leaves(to_tree(trained.config)))})  # fmt: skip
    found = validation_loss(trained.objective, network, manifest, ranks, images=count, features=features)
    return {
        "protocol": {
            "version": PROTOCOL,
            "num_images": found["images"],
            "images_sha256": manifest.index_sha256,
            "latents": {key: manifest.latents.to_json()[key] for key in ("codec", "scale", "shift")},
            "val_fraction": 0.0 if shards else data.val_fraction,
            "objective": to_tree(trained.config.objective),
            "precision": trained.config.sampling.precision,
            "weights": weights or "ema",
            "metrics": {"loss": {}},
        },
        "subject": {"samples": str(path), "checkpoint": str(trained.folder.resolve()), "sha256": trained.identity,
                    "step": trained.step, "images": min(found["images"], len(manifest))},
        "distance": "loss",
        "values": {"loss": found["loss"], "loss_error": found["loss_error"], **found["parts"]},
        "bins": found["bins"],
        "real": None,
        "environment": made_on(ranks.device),
    }  # fmt: skip
