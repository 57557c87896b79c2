"""`fastdit likelihood`: how likely a checkpoint finds the latents of a shard set.

By its probability-flow ODE (method heun or euler), or for DDPM checkpoints also by the variational bound over the whole
chain (method vlb), as the released code computes it.

The density is that of the latents as training sees them: x_0 = (mean + std noise - shift) scale, a draw from the
autoencoder's posterior q(x_0 | image), which plays the part that dequantization plays for pixels (Ho et al. 2019). So
-log p(x_0) is a differential entropy, which may be negative and depends on `scale`. log q - log p, the cost of an
image's latent beyond the noise in it (bits back), does not, and is reported as well.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastdit import distributed
from fastdit.config import check_used
from fastdit.data.latents import PerChannel, per_channel, sample_latents
from fastdit.data.loader import latent_batches
from fastdit.data.manifest import Manifest
from fastdit.data.opening import open_latents
from fastdit.diffusion.guidance import guided
from fastdit.diffusion.likelihood import bits_per_dim, log_likelihood, variational_bound
from fastdit.diffusion.objectives import OF_LOSS
from fastdit.distributed import ImageRandom, seed_of
from fastdit.errors import counted
from fastdit.files import as_json, replace_text
from fastdit.registry import check
from fastdit.training.state import load_network
from fastdit.training.validation import fitting

ORDER, POSTERIOR, PROBES, BOUND = range(4)  # what the seed is for
METHODS = ("heun", "euler", "vlb")
USED = ("objective", "model.attention", "model.learn_sigma", "data.cache", "data.cache_gib", "data.normalize")
OPTIONS = {"seed": "--seed", "data.shards": "--shards", "sampling.steps": "--steps", "sampling.sampler": "--method",
           "sampling.batch_size": "--batch-size"}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """What was measured, and on what."""

    images: int
    dimensions: int  # of one image's latent
    method: str
    weights: str
    seed: int
    checkpoint: str
    shards: str


@dataclass(frozen=True)
class Report(Measured):
    """Means over the images, with the standard error of each mean (over images, the probes' noise included)."""

    nats: float  # log p(x_0) per image
    nats_error: float
    bits_per_dim: float  # -log2 p(x_0) / dimensions
    bits_per_dim_error: float
    posterior_bits_per_dim: float  # (log2 q(x_0 | image) - log2 p(x_0)) / dimensions
    posterior_bits_per_dim_error: float
    probe_error_nats: float  # of one image, from the spread over the probes; nan with one probe
    probes: int
    steps: int


@dataclass(frozen=True)
class BoundReport(Measured):
    """Means over the images, in bits per dimension; x_0 counts in bins of 2 / 255 (Nichol & Dhariwal 2021)."""

    bits_per_dim: float  # the bound: the sum of all terms
    bits_per_dim_error: float
    prior_bits_per_dim: float  # the term of t = 1
    mse: float  # of eps, averaged over the schedule


def likelihood(
    path: str | Path,
    shards: str | Path,
    *,
    num_images: int = 64,
    probes: int | None = None,
    steps: int | None = None,
    method: str = "heun",
    batch_size: int = 16,
    weights: str = "ema",
    seed: int = 0,
    device: str | None = None,
    overrides: Iterable[str] = (),
    say: Callable[[str], None] = print,
) -> Report | BoundReport:
    """Of `num_images` images of `shards`, drawn without repetition, each under its own label, without guidance.

    An image's numbers are a function of (seed, image): the batch size changes only their rounding. `steps` of the ODE
    (None: 50) take two evaluations each with method heun, one with euler; `probes` (None: 4) are random directions for
    the divergence. vlb takes 1,000 evaluations, and neither of the two. ValueError for what does not fit.
    """
    check(method, METHODS, "--method")
    for key, value in (("--probes", probes), ("--steps", steps)):
        if method == "vlb" and value is not None:
            raise ValueError(f"{key}={value} is for --method heun and euler; vlb takes all 1,000 steps of the schedule "
                             "and no probes; leave it out")  # fmt: skip
    probes, steps = 4 if probes is None else probes, 50 if steps is None else steps
    for key, value in (
        ("--num-images", num_images),
        ("--probes", probes),
        ("--steps", steps),
        ("--batch-size", batch_size),
    ):
        if value < 1:
            raise ValueError(f"{key}={value} must be 1 or more")
    overrides = list(overrides)
    check_used(overrides, USED, "for a likelihood", OPTIONS, [f"objective.{option}" for option in OF_LOSS])
    device = distributed.init(device).device
    trained = load_network(path, weights, overrides=overrides, device=device)
    trained.warn()
    data = trained.config.data
    manifest = open_latents(shards, data.remote_cache)
    if num_images > len(manifest):
        raise ValueError(f"--num-images={num_images}, but {shards} holds {len(manifest)}; use at most that")
    if dim := trained.config.model.class_token:
        raise ValueError(f"{trained.folder} has model.class_token={dim}, so a likelihood would be that of latent and "
                         "token together, which is not measured; use a run with class_token=0")  # fmt: skip
    objective, model = trained.objective, trained.model
    if method == "vlb" and not hasattr(objective, "vlb"):
        raise ValueError(
            f"--method=vlb needs a DDPM checkpoint, not objective={trained.config.objective.name}; use heun"
        )
    times = objective.timesteps(steps).flip(0)  # from data to noise
    manifest = fitting(manifest, trained, str(shards))
    latents = manifest.latents

    values: dict[str, list[float]] = {}
    dimensions = math.prod(latents.shape)
    with tqdm(total=num_images, unit="image", disable=None) as progress:
        for start, moments, y in batches(manifest, num_images, batch_size, seed):
            moments, y = moments.to(device), y.to(device)
            seeds = {
                kind: [seed_of(seed, kind, start + i) for i in range(len(y))] for kind in (POSTERIOR, PROBES, BOUND)
            }
            noise = ImageRandom(seeds[POSTERIOR])(moments[:, : latents.shape[0]])
            x_0 = sample_latents(moments, noise, latents.scale, latents.shift)
            if method == "vlb":
                found = variational_bound(objective, model, x_0, y, noise=ImageRandom(seeds[BOUND]))
                found["mse"] = found["mse"].mean(1)
            else:
                density = log_likelihood(guided(objective, model, y), x_0, times, objective.path, probes=probes,
                                         probe=ImageRandom(seeds[PROBES], signs), method=method)  # fmt: skip
                found = {"nats": density.nats, "probe_error": density.standard_error}
                found["posterior"] = log_posterior(moments, noise, latents.scale)
            for key in found.keys() - {"vlb"}:
                values.setdefault(key, []).extend(found[key].tolist())
            progress.update(len(y))
    if not all(map(math.isfinite, values["total" if method == "vlb" else "nats"])):
        raise ValueError(
            f"the likelihood is not finite: the weights or the ODE's steps are bad; see fastdit verify {trained.folder}"
        )

    about = (num_images, dimensions, method, weights, seed, str(trained.folder), str(shards))
    if method == "vlb":
        report = BoundReport(
            *about, *mean_and_error(values["total"]), statistics.fmean(values["prior"]), statistics.fmean(values["mse"])
        )
        say(
            f"{counted(num_images, 'image')}, the variational bound over 1000 steps\n"
            f"-log2 p(x_0) <=     {report.bits_per_dim:.4f} +- {report.bits_per_dim_error:.4f} bits per dimension "
            f"({report.prior_bits_per_dim:.2g} of them at t = 1), mse of eps {report.mse:.4f}"
        )
        return report
    per_dim = bits_per_dim(torch.tensor(values["nats"]), torch.empty(1, dimensions)).tolist()
    beyond = [bits + q / (dimensions * math.log(2)) for bits, q in zip(per_dim, values["posterior"], strict=True)]
    report = Report(
        *about, *mean_and_error(values["nats"]), *mean_and_error(per_dim), *mean_and_error(beyond),
        statistics.fmean(values["probe_error"]), probes, steps,
    )  # fmt: skip
    say(
        f"{counted(num_images, 'image')}, {counted(steps, 'step')} of {method}, {counted(probes, 'probe')}\n"
        f"log p(x_0)          {report.nats:.2f} +- {report.nats_error:.2f} nats per image of {dimensions} dimensions\n"
        f"-log2 p(x_0)        {report.bits_per_dim:.4f} +- {report.bits_per_dim_error:.4f} bits per dimension\n"
        + (
            "log2 q - log2 p     infinite: the deviation of these latents is 0"
            if math.isnan(report.posterior_bits_per_dim)
            else f"log2 q - log2 p     {report.posterior_bits_per_dim:.4f} +- "
            f"{report.posterior_bits_per_dim_error:.4f} bits per dimension, beyond the posterior's own noise"
        )
        + "\ndensities of pixels in [-1, 1] without dequantization, not bits of 8-bit values" * latents.are_pixels
    )
    return report


def batches(manifest: Manifest, count: int, batch_size: int, seed: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(position of the first, moments (n, 2C, h, w), labels (n,)) until `count` images have come, none mirrored."""
    size = min(batch_size, count)
    source = latent_batches(manifest, global_batch=size, seed=seed_of(seed, ORDER), hflip=False, prefetch=1)
    with closing(source):
        for start in range(0, count, size):
            batch, left = next(source), count - start
            yield start, batch.moments[:left], batch.y[:left]


def signs(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """+1 or -1, as `ImageRandom` draws them."""
    return torch.randint(0, 2, shape, generator=generator) * 2 - 1


def log_posterior(moments: Tensor, noise: Tensor, scale: PerChannel) -> Tensor:
    """log q(x_0 | image) in nats (N,) of x_0 = (mean + std noise - shift) scale, from moments (N, 2C, h, w)."""
    std = moments.chunk(2, dim=1)[1].double()
    std = std * abs(per_channel(scale, std))
    logs = -0.5 * noise.double() ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
    return logs.flatten(1).sum(1)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean, and its standard error over the images; nan of one image, and both where a value is infinite."""
    if not all(map(math.isfinite, values)):  # a posterior of deviation 0 in the stored dtype
        return math.nan, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def write_report(report: Measured, path: str | Path) -> None:
    """As JSON; nan becomes null."""
    replace_text(Path(path), as_json(asdict(report), indent=1))
