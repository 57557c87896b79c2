"""The validation loss: an objective's loss on fixed images, with fixed times and noise, and by timestep.

Times are stratified: t in [0, 1] is cut into BINS equal parts, each part gets as many images, and within it the times
are quantiles of the distribution that training draws from. The loss is the sum of the bins' means, each weighted with
the probability of its bin, so its expectation is that of the training loss without dropped labels.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdit.data.features import FeatureManifest
from fastdit.data.latents import sample_latents
from fastdit.data.loader import read_class_tokens, read_moments
from fastdit.data.manifest import AGAIN, Manifest
from fastdit.data.order import permutation
from fastdit.diffusion.coupling import paired
from fastdit.diffusion.entangled import EntangledFlow
from fastdit.diffusion.objectives import Model, Objective
from fastdit.distributed import ImageRandom, Ranks, one_thread, seed_of
from fastdit.errors import counted
from fastdit.models.class_token import join

BINS = 20  # of t in [0, 1]
IMAGES = 1280  # by default
BATCH = 32  # images that the network sees at once, on any number of processes: the last bits depend on it
AT_ONCE = 32  # batches that are read at once
COLUMNS = 4  # the loss and up to three parts
SEED = 0x10055  # of the noise, in every run
ORDER, POSTERIOR, NOISE = range(3)  # what the seed is for


@torch.no_grad()
def validation_loss(
    objective: Objective,
    network: Model,
    manifest: Manifest,
    ranks: Ranks,
    *,
    images: int = IMAGES,
    on_batch: Callable[[], bool] = lambda: False,
    features: FeatureManifest | None = None,
) -> dict[str, Any]:
    """The loss of `network` on `images` images of the shards, rounded up to a multiple of BINS. A collective call.

    Returns `loss` and `loss_error`; `parts`, the means of the objective's terms; `bins`, (mean, standard error) for
    each part of t, nan where training draws no time; and `images`. Where the shards hold fewer images, they are used
    again with other times and noise. The digits depend neither on the number of processes nor on the training's batch.
    `on_batch()` is called for every batch; once it returns True, the rest is left out, and what comes back is nan.
    `features`: those of the images, for a model with a class token.
    """
    entangled = isinstance(objective, EntangledFlow)
    if entangled:
        features.check(manifest)
    shares, times = stratified(objective, math.ceil(images / BINS))  # (BINS,), (n,)
    count = len(times)
    rows = chosen_rows(manifest, count)
    parts = [slice(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]
    own = parts[ranks.rank :: ranks.world]
    names: list[str] = []
    found = torch.full((math.ceil(len(parts) / ranks.world), BATCH, COLUMNS), math.nan, dtype=torch.float64)
    with one_thread(ranks.device):
        for slot, (part, moments) in enumerate(zip(own, read_parts(manifest, rows, own), strict=True)):
            if on_batch():
                break
            token = read_class_tokens(features, rows["key"][part]).to(ranks.device) if entangled else None
            x_0, noise = state_of(manifest, moments.to(ranks.device), part.start, token)
            y = torch.from_numpy(rows["label"][part].astype(np.int64)).to(ranks.device)
            noise = paired(objective, x_0, noise)
            loss = objective.loss(network, x_0, y, times[part].to(ranks.device), noise)
            names = list(loss.parts)
            values = torch.stack([loss.per_sample, *loss.parts.values()], 1)  # (n, 1 + parts)
            found[slot, : len(y), : values.shape[1]] = values.double().cpu()
    drawn = shares > 0
    bins = ranks.blocks(found)[:count].cpu().numpy().reshape(drawn.sum(), -1, COLUMNS)
    table = np.full((BINS, 2), math.nan)
    table[drawn, 0] = bins[..., 0].mean(1)
    if bins.shape[1] > 1:
        with np.errstate(invalid="ignore"):  # a loss that is not finite
            table[drawn, 1] = bins[..., 0].std(1, ddof=1) / math.sqrt(bins.shape[1])
    whole = shares[drawn] @ bins.mean(1)  # (COLUMNS,)
    return {
        "loss": float(whole[0]),
        "loss_error": float(np.linalg.norm(shares[drawn] * table[drawn, 1])),
        "parts": dict(zip(names, whole[1:].tolist(), strict=False)) if len(names) > 1 else {},
        "bins": [tuple(row) for row in table.tolist()],
        "images": count,
    }


def stratified(objective: Objective, per_bin: int) -> tuple[np.ndarray, Tensor]:
    """The probability (BINS,) of each part of t in training, and `per_bin` times in each that has one: (n,), sorted."""
    times = objective.sample_t((torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)).sort().values
    counts = torch.bincount((times * BINS).ceil().clamp(1, BINS).long() - 1, minlength=BINS)
    inside = [part for part in times.split(counts.tolist()) if len(part)]
    chosen = [part[torch.linspace(0, len(part) - 1, per_bin).round().long()] for part in inside]
    return (counts / len(times)).numpy(), torch.cat(chosen)


def chosen_rows(manifest: Manifest, count: int) -> np.ndarray:
    """Rows (count,) of the index, in an order that is the same in every run; repeated where there are fewer."""
    index = manifest.index()
    return index[permutation(SEED, ORDER, len(index))[np.arange(count) % len(index)]]


def check_images(manifest: Manifest, images: int) -> None:
    """ValueError if an image that `validation_loss` reads is damaged."""
    rows = chosen_rows(manifest, min(math.ceil(images / BINS) * BINS, len(manifest)))
    for _ in read_parts(manifest, rows, [slice(start, start + BATCH) for start in range(0, len(rows), BATCH)]):
        pass


def read_parts(manifest: Manifest, rows: np.ndarray, parts: list[slice]) -> Iterator[Tensor]:
    """Moments (n, 2C, h, w) of each part of the rows; ValueError where an image is damaged."""
    for first in range(0, len(parts), AT_ONCE):
        some = parts[first : first + AT_ONCE]
        wanted = np.concatenate([rows[part] for part in some])
        moments = read_moments(manifest, wanted)
        if len(moments) < len(wanted):
            damaged = len(wanted) - len(moments)
            raise ValueError(f"{manifest.folder}: damaged images of the validation loss: {damaged}; {AGAIN}")
        yield from moments.split([len(rows[part]) for part in some])


def state_of(manifest: Manifest, moments: Tensor, start: int, token: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x_0 and noise (n, C, h, w), with a `token` (n, C + K, h, w), at the places from `start` on of the set."""
    spec = manifest.latents
    posterior, noise = (
        ImageRandom([seed_of(SEED, kind, start + i) for i in range(len(moments))]) for kind in (POSTERIOR, NOISE)
    )
    x_0 = sample_latents(moments, posterior(moments[:, : spec.shape[0]]), spec.scale, spec.shift)
    x_0 = x_0 if token is None else join(x_0, token)
    return x_0, noise(x_0)


def loss_table(result: dict[str, Any]) -> str:
    """A result of `fastdit evaluate --loss` in lines: the loss, its parts, and a row per part of t."""
    values = {name: value for name, value in result["values"].items() if name != "loss_error"}
    error, images = result["values"]["loss_error"], counted(result["protocol"]["num_images"], "image")
    if (own := result["subject"]["images"]) < result["protocol"]["num_images"]:
        images = f"{result['protocol']['num_images']:,} times and noises for {counted(own, 'image')}"
    lines = [f"{name:<11}  {value:9.6f}" for name, value in values.items()]
    lines[0] += f"  {error:9.6f}  {images}, {result['protocol']['weights']} weights"
    lines.append(f"{'t':<11}  {'loss':>9}  {'error':>9}")
    for k, (mean, error) in enumerate(result["bins"]):
        lines.append(f"{k / BINS:.2f} - {(k + 1) / BINS:.2f}  {mean:9.6f}  {error:9.6f}")
    return "\n".join(lines)
