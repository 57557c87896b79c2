"""What a report makes with the network of a run: samples over training, their nearest training images, loss over t."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from fastdit.data.autoencoders import NO_VAE
from fastdit.data.images import to_uint8
from fastdit.data.latents import mean_latents
from fastdit.data.loader import read_moments
from fastdit.data.manifest import Manifest
from fastdit.distributed import ImageRandom, Ranks, seed_of
from fastdit.evaluation.loss import IMAGES, validation_loss
from fastdit.evaluation.neighbors import nearest
from fastdit.pipeline import ImagePipeline, Inference, spread
from fastdit.report.facts import Run
from fastdit.sampling import load_pipeline
from fastdit.training import checkpoint
from fastdit.training.alignment import token_features
from fastdit.training.ema import too_young
from fastdit.training.state import VAE, load_network

FEW = ("sampling.sampler=dpmpp_2m", "sampling.steps=20", "sampling.compile=false")  # one evaluation per step
SEED = 0
SAMPLES, STRIP, CLASSES = 16, 8, 8  # of the last checkpoint; of each one; classes among them
CHECKPOINTS, FRAMES = 6, 12  # of the strip over training; of the animation
CANDIDATES, NEAREST, SEARCHED = 2000, 3, 6  # training images searched per class; shown per sample; samples searched for


@dataclass(frozen=True)
class Neighbors:
    """A sample and the training images nearest to it, nearest first: images (1 + NEAREST, H, W, 3), distances."""

    label: int
    images: np.ndarray
    distances: list[float]


@dataclass
class Measured:
    """What one run gives for its page; what could not be made is empty, and `notes` say why."""

    notes: list[str] = field(default_factory=list)
    parameters: int = 0
    weights: str = "ema"
    sampling: str = ""  # how the samples were made
    names: tuple[str, ...] = ()  # of the classes
    labels: list[int] = field(default_factory=list)  # of the samples
    samples: np.ndarray | None = None  # uint8 (SAMPLES, H, W, 3), of the last checkpoint
    strips: list[tuple[int, np.ndarray]] = field(default_factory=list)  # step, samples (STRIP, H, W, 3)
    frames: np.ndarray | None = None  # (FRAMES, SAMPLES, H, W, 3), noise first
    real: np.ndarray | None = None  # (SAMPLES, H, W, 3): decoded latents of the same classes
    neighbors: list[Neighbors] = field(default_factory=list)
    searched: int = 0  # training images per class that were compared with a sample, at most
    between_real: float = math.nan  # distance of a training image to the nearest other, median
    bins: list[tuple[float, float]] = field(default_factory=list)  # mean loss and standard error; nan: no t there

    def name(self, label: int) -> str:
        return self.names[label] if label < len(self.names) else f"class {label}"


def measure_run(
    run: Run, device: torch.device, overrides: Iterable[str] = (), budget_s: float = math.inf
) -> Measured:
    """Everything on the page that needs the network; without what is predicted to take longer than `budget_s`."""
    found = Measured()
    if not run.checkpoints:
        found.notes.append("No samples: the run has no complete checkpoint.")
        return found
    last, overrides = run.checkpoints[-1], [*FEW, *overrides]
    found.weights = "model" if too_young(run.config.training, checkpoint.step_of(last)) else "ema"
    pipeline = model = None
    with noted(found.notes, "No samples"):
        vae = run.config.data.vae
        local = vae == NO_VAE or Path(vae).is_dir() or (run.folder / VAE).is_dir()
        if budget_s < math.inf and not local and not try_to_load_from_cache(vae, "config.json"):  # no download now
            raise ValueError(f"data.vae={vae} is not on this machine; make them with fastdit report {run.folder}")
        pipeline = load_pipeline(last, overrides, weights=found.weights, device=device)
        objective, model = pipeline.objective, pipeline.model
    if not pipeline:
        with noted(found.notes, "No loss per timestep"):
            trained = load_network(last, found.weights, device=device)
            objective, model = trained.objective, trained.model
    if not model:
        return found
    found.parameters = model.parameter_count()
    network = Inference(model, run.config.sampling.precision, compile=False)
    seconds = seconds_needed(network, pipeline, run, device)
    if seconds > budget_s:
        found.notes.append(f"No samples, neighbors and loss per timestep: on this machine they would take about "
                           f"{seconds:.0f} s. Make them with fastdit report {run.folder}.")  # fmt: skip
        return found
    manifest = run.manifest
    if manifest:
        with noted(found.notes, "No loss per timestep"):
            features, ranks = token_features(run.config), Ranks(0, 0, 1, device)
            found.bins = validation_loss(objective, network, manifest, ranks, features=features)["bins"]
            if not any(math.isfinite(loss) for loss, _ in found.bins):
                found.bins = []
                raise ValueError("it is not finite: check the weights with fastdit verify")
    if pipeline:
        with noted(found.notes, "No samples"):
            x_0 = draw(found, run, pipeline, overrides, device)
            if manifest:
                with noted(found.notes, "No real images and neighbors"):
                    compare(found, pipeline, manifest, x_0)
    return found


@contextmanager
def noted(notes: list[str], what: str) -> Iterator[None]:
    """Turns an error of the files, or of too little memory, into a note that something is left out."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        notes.append(f"{what}: {' '.join(str(error).split())}")


def seconds_needed(network: Inference, pipeline: ImagePipeline | None, run: Run, device: torch.device) -> float:
    """A prediction for everything here, from one evaluation of the network on 8 latents, and one decoded image."""
    x, t = torch.zeros(8, *network.model.state_shape, device=device), torch.full((8,), 0.5, device=device)
    y = torch.zeros(8, dtype=torch.long, device=device)
    seconds = IMAGES / 8 * timed(lambda: network(x, t, y))
    if pipeline:
        settings = pipeline.config.sampling
        images = SAMPLES + STRIP * min(CHECKPOINTS - 1, len(run.checkpoints) - 1)
        evaluations = len(pipeline.objective.timesteps(settings.steps)) * (2 if settings.cfg_scale != 1 else 1)
        seconds += images * evaluations / 8 * timed(lambda: network(x, t, y))
        decoded = images + SAMPLES * (FRAMES + 1) + SEARCHED * (NEAREST + 1)
        seconds += decoded * timed(lambda: pipeline.codec.decode(x[:1, : pipeline.spec.shape[0]]))
    return seconds


def timed(run: Callable[[], Tensor]) -> float:
    """Seconds of a second call: the first one chooses algorithms."""
    run().sum().item()
    start = time.perf_counter()
    run().sum().item()
    return time.perf_counter() - start


def draw(found: Measured, run: Run, pipeline: ImagePipeline, overrides: list[str], device: torch.device) -> Tensor:
    """Samples of the kept checkpoints and the frames of the animation; returns x_0 (SAMPLES, C, h, w) of the last."""
    classes = pipeline.classes.few(CLASSES)
    found.names = pipeline.classes.names if run.config.data.num_classes else ("",)
    found.labels = [classes[i % len(classes)] for i in range(SAMPLES)]
    labels = torch.tensor(found.labels, device=device)
    settings, used = run.config.sampling, pipeline.config.sampling
    found.sampling = (
        f"{used.sampler.name}, {used.steps} steps, guidance {used.cfg_scale:g}, seed {SEED}, "
        f"{'EMA' if found.weights == 'ema' else 'weights without EMA'}"
        + (f" (the run's own setting is {settings.sampler.name}, {settings.steps} steps, guidance "
           f"{settings.cfg_scale:g})" if (settings.sampler, settings.steps) != (used.sampler, used.steps) else "")
    )  # fmt: skip
    noise = ImageRandom([seed_of(SEED, i) for i in range(SAMPLES)])
    _, path, _ = pipeline.trajectory(noise, labels, FRAMES)
    found.frames, x_0 = np.stack([decoded(pipeline, x_t) for x_t in path]), path[-1]
    found.samples = found.frames[-1]
    kept = [run.checkpoints[i] for i in spread(len(run.checkpoints), CHECKPOINTS)]
    for folder in kept[:-1]:
        model = load_network(folder, found.weights, overrides=overrides, device=device).model
        earlier = replace(pipeline, inference=Inference(model, used.precision, compile=False))
        images = decoded(pipeline, earlier.latents(list(range(STRIP)), labels[:STRIP], SEED))
        found.strips.append((checkpoint.step_of(folder), images))
    found.strips.append((checkpoint.step_of(kept[-1]), found.samples[:STRIP]))
    return x_0


def decoded(pipeline: ImagePipeline, x_0: Tensor) -> np.ndarray:
    """(N, C, h, w) -> uint8 (N, H, W, 3); ValueError where a latent is not finite."""
    if not x_0.isfinite().all():
        raise ValueError("the sampled latents are not finite: check the weights with fastdit verify")
    return np.concatenate([to_uint8(pipeline.codec.decode(part)).cpu().numpy() for part in x_0.split(8)])


@torch.no_grad()
def compare(found: Measured, pipeline: ImagePipeline, manifest: Manifest, x_0: Tensor) -> None:
    """Real images of the samples' classes, and the nearest training images of the first samples.

    The distance is the root mean square over the latent's elements, to the posterior means of images of the same class;
    a sample counts as it is and mirrored.
    """
    index, random = manifest.index(), np.random.default_rng(SEED)
    real: list[Tensor | None] = [None] * SAMPLES
    entries, between = [], []
    for label in dict.fromkeys(found.labels):
        rows = index[index["label"] == label] if pipeline.config.data.num_classes else index
        rows = rows[np.sort(random.permutation(len(rows))[:CANDIDATES])]
        moments = read_moments(manifest, rows).to(x_0.device)
        if not len(moments):
            continue
        known = mean_latents(moments, manifest.latents)
        found.searched = max(found.searched, len(known))
        places = [i for i, other in enumerate(found.labels) if other == label]
        shown = known[random.permutation(len(known))[np.arange(len(places)) % len(known)]]
        for i, latent in zip(places, shown, strict=True):
            real[i] = latent
        vectors = known.flatten(1) / known[0].numel() ** 0.5  # (n, D)
        if len(known) > 1:
            few = vectors[:SEARCHED, None]
            between += nearest(few, [vectors], 1, own=torch.arange(len(few)))[0][:, 0].tolist()
        searched = [i for i in places if i < SEARCHED]
        views = torch.stack([x_0[searched], x_0[searched].flip(-1)], 1).flatten(2) / known[0].numel() ** 0.5
        for i, values, order in zip(searched, *nearest(views, [vectors], min(NEAREST, len(known))), strict=True):
            images = decoded(pipeline, torch.cat([x_0[i : i + 1], known[order]]))
            entries.append((i, Neighbors(label, images, values.tolist())))
    found.neighbors = [entry for _, entry in sorted(entries, key=lambda pair: pair[0])]
    found.between_real = float(np.median(between)) if between else math.nan
    if all(latent is not None for latent in real):
        found.real = decoded(pipeline, torch.stack(real))
