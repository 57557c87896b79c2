"""`fastdit likelihood`: how likely a checkpoint finds the latents of a shard set, by its probability-flow ODE.

The density is that of the latents as training sees them: x_0 = (mean + std noise) scale, a draw from the autoencoder's
posterior q(x_0 | image), which plays the part that dequantisation plays for pixels (Ho et al. 2019). So -log p(x_0) is
a differential entropy, which may be negative and moves with `scale`; log q - log p, what the latent of an image costs
beyond the noise in it (bits back), does not, and is reported beside it.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from fastdit import distributed
from fastdit.config import build, load_config
from fastdit.data.latents import sample_latents
from fastdit.data.shards import Manifest, latent_batches
from fastdit.diffusion.guidance import guided
from fastdit.diffusion.likelihood import bits_per_dim, log_likelihood
from fastdit.diffusion.objectives import OBJECTIVES
from fastdit.distributed import ImageRandom, seed_of
from fastdit.models.convert import mismatches
from fastdit.training import checkpoint
from fastdit.training.loop import network

ORDER, POSTERIOR, PROBES = range(3)  # what the seed is for


@dataclass(frozen=True)
class Report:
    """Means over the images, with the standard error of each mean (over images, the probes' noise included)."""

    nats: float  # log p(x_0), an image
    nats_error: float
    bits_per_dim: float  # -log2 p(x_0) / dimensions
    bits_per_dim_error: float
    posterior_bits_per_dim: float  # (log2 q(x_0 | image) - log2 p(x_0)) / dimensions
    posterior_bits_per_dim_error: float
    probe_error_nats: float  # of one image, from the spread over the probes; nan of one probe
    images: int
    dimensions: int
    probes: int
    steps: int
    method: str
    weights: str
    seed: int
    checkpoint: str
    shards: str


def likelihood(
    path: str | Path,
    shards: str | Path,
    *,
    num_images: int = 64,
    probes: int = 4,
    steps: int = 50,
    method: str = "heun",
    batch_size: int = 16,
    weights: str = "ema",
    seed: int = 0,
    device: str | None = None,
    overrides: Iterable[str] = (),
    say: Callable[[str], None] = print,
) -> Report:
    """Of `num_images` images of `shards`, drawn without repetition, each under its own label, without guidance.

    An image's numbers are a function of (seed, image): the batch size changes only their rounding. `steps`: of the ODE,
    two evaluations each with method heun, one with euler. ValueError in one line for what does not fit.
    """
    for key, value in (
        ("--num-images", num_images),
        ("--probes", probes),
        ("--steps", steps),
        ("--batch-size", batch_size),
    ):
        if value < 1:
            raise ValueError(f"{key}={value} must be 1 or more")
    device = distributed.init(device).device
    folder = checkpoint.find(Path(path))
    meta = checkpoint.read_meta(folder)
    config = load_config(folder / "config.yaml", overrides)
    objective = build(OBJECTIVES, config.objective, "objective")
    times = objective.timesteps(steps).flip(0)  # from the data to the noise
    manifest = Manifest.load(shards)
    if num_images > len(manifest):
        raise ValueError(f"--num-images={num_images}, but {shards} holds {len(manifest)}; use at most that")
    manifest.check(num_classes=config.data.num_classes)
    latents = meta["latents"]
    for key, own in (("shape", list(manifest.latent_shape)), ("scale", manifest.scale), ("codec", manifest.codec)):
        if latents[key] not in ("", own):
            raise ValueError(f"the latents in {shards} have {key} {own}, {folder} was trained on {latents[key]}")

    model = network(config, manifest.latent_shape, objective, device)
    state = load_file(folder / f"{weights}.safetensors")
    wrong = mismatches(model.state_dict(), state)
    if wrong:
        raise ValueError(f"the weights in {folder} are not those of {config.model.variant}: {wrong[0]}")
    model.load_state_dict(state)
    model.to(device).eval().requires_grad_(False)
    nats, errors, posterior = [], [], []
    dimensions = math.prod(manifest.latent_shape)
    with tqdm(total=num_images, unit="image", disable=None) as progress:
        for start, moments, y in batches(manifest, num_images, batch_size, seed):
            images = range(start, start + len(y))
            moments, y = moments.to(device), y.to(device)
            noise = ImageRandom([seed_of(seed, POSTERIOR, i) for i in images])(moments[:, : manifest.latent_shape[0]])
            x_0 = sample_latents(moments, noise, manifest.scale, manifest.shift)
            denoise = guided(objective, model, y)
            draw = Signs([seed_of(seed, PROBES, i) for i in images])
            found = log_likelihood(denoise, x_0, times, objective.path, probes=probes, probe=draw, method=method)
            nats += found.nats.tolist()
            errors += found.standard_error.tolist()
            posterior += log_posterior(moments, noise, manifest.scale).tolist()
            progress.update(len(y))
    if not all(map(math.isfinite, nats)):
        raise ValueError(f"the likelihood is not finite: {folder} or its steps are broken; see fastdit verify {folder}")

    per_dim = bits_per_dim(torch.tensor(nats), torch.empty(1, dimensions)).tolist()
    beyond = [bits + q / (dimensions * math.log(2)) for bits, q in zip(per_dim, posterior, strict=True)]
    report = Report(
        *mean_and_error(nats), *mean_and_error(per_dim), *mean_and_error(beyond), statistics.fmean(errors),
        num_images, dimensions, probes, steps, method, weights, seed, str(folder), str(shards),
    )  # fmt: skip
    say(
        f"{num_images} images, {steps} steps of {method}, {probes} probes\n"
        f"log p(x_0)          {report.nats:.2f} +- {report.nats_error:.2f} nats an image of {dimensions} dimensions\n"
        f"-log2 p(x_0)        {report.bits_per_dim:.4f} +- {report.bits_per_dim_error:.4f} bits a dimension\n"
        f"log2 q - log2 p     {report.posterior_bits_per_dim:.4f} +- {report.posterior_bits_per_dim_error:.4f} "
        "bits a dimension, beyond the posterior's own noise"
    )
    return report


def batches(manifest: Manifest, count: int, batch_size: int, seed: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(position of the first, moments (n, 2C, h, w), labels (n,)) until `count` images have come, none mirrored."""
    size = min(batch_size, count)
    source = latent_batches(manifest, global_batch=size, seed=seed_of(seed, ORDER), hflip=False, prefetch=1)
    try:
        for start in range(0, count, size):
            batch, left = next(source), count - start
            yield start, batch.moments[:left], batch.y[:left]
    finally:
        source.close()


class Signs:
    """+1 or -1 like x (N, ...), row i from generator i: each call draws anew."""

    def __init__(self, seeds: list[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, x: Tensor) -> Tensor:
        rows = [torch.randint(0, 2, x.shape[1:], generator=g) * 2 - 1 for g in self.generators]
        return torch.stack(rows).to(x)


def log_posterior(moments: Tensor, noise: Tensor, scale: float) -> Tensor:
    """log q(x_0 | image) in nats (N,) of x_0 = (mean + std noise - shift) scale, from moments (N, 2C, h, w)."""
    std = moments.chunk(2, dim=1)[1].double() * abs(scale)
    logs = -0.5 * noise.double() ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
    return logs.flatten(1).sum(1)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean, and its standard error over the images; nan of one image, and both where a value is infinite."""
    if not all(map(math.isfinite, values)):  # a posterior of deviation 0 in the stored dtype
        return math.nan, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def write_report(report: Report, path: str | Path) -> None:
    """As JSON; what is not a number becomes null."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(report).items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(plain, indent=1) + "\n")
