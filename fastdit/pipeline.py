"""A trained network that makes images: its evaluation and its sampler."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdit import __version__
from fastdit.build import check_sampling, routing_of
from fastdit.classes import Classes
from fastdit.config import config_from, to_tree
from fastdit.data.images import to_uint8
from fastdit.data.latents import LatentCodec, LatentSpec
from fastdit.diffusion.guidance import CLIPS, guided, processed, watched
from fastdit.diffusion.objectives import Objective
from fastdit.diffusion.samplers import SAMPLERS, Noise
from fastdit.distributed import ImageRandom, one_thread, seed_of
from fastdit.errors import out_of_memory_says
from fastdit.models.dit import DiT
from fastdit.models.routing import Routing
from fastdit.registry import bind
from fastdit.schema import Config

ROUTE = 2  # what the seed of an image is for, beside its noise and its random label


class Inference:
    """A DiT for inference: computes in `precision`, returns fp32. Its weights must not change afterwards.

    With `compile` on a GPU, the blocks are compiled and each input shape is replayed as a CUDA graph.
    """

    def __init__(self, model: DiT, precision: str, compile: bool):
        self.model, self.null_label = model, model.null_label
        device = next(model.parameters()).device
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)
        self.graphs: dict[tuple, tuple] | None = {} if compile and device.type == "cuda" else None
        if self.graphs is not None:
            model.compile_blocks()
        if precision == "bf16":
            for module in model.modules():
                if isinstance(module, nn.Linear):  # cast once; autocast would cast at every evaluation
                    module.weight.data = module.weight.data.bfloat16()

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        if self.graphs is None:
            return self.evaluate(x, t, y)
        given = [tensor for tensor in (x, t, y) if tensor is not None]
        shape = tuple((tensor.shape, tensor.dtype) for tensor in given)
        if shape not in self.graphs:
            self.graphs[shape] = self._capture([tensor.clone() for tensor in given])
        graph, places, out = self.graphs[shape]
        for place, tensor in zip(places, given, strict=True):
            place.copy_(tensor)
        graph.replay()
        return out.clone()  # the next replay overwrites it

    def evaluate(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        with self.autocast:
            return self.model(x, t, y).float()

    def _capture(self, places: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compile, and let the libraries allocate their workspaces
                self.evaluate(*places)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            out = self.evaluate(*places)
        return graph, places, out


class SparseInference:
    """The prediction of a network in which random tokens skip the middle blocks, other ones at each evaluation.

    The weak model of Sparse Guidance (Krause et al. 2026, arXiv 2601.01608), for networks that were trained with
    training.route. `seeds`: of each image.
    """

    def __init__(self, inference: Inference, routing: Routing, seeds: list[int]):
        self.inference, self.routing, self.random = inference, routing, ImageRandom(seeds)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        model = self.inference.model
        order = self.random(torch.empty(len(x), model.patches, device=x.device))  # (N, T)
        model.route = self.routing.draw(lambda patches: order, model, 0)
        try:
            return self.inference.evaluate(x, t, y)
        finally:
            model.route = None


@dataclass(frozen=True)
class ImagePipeline:
    """A trained network with its objective, sampler and codec, ready to make images."""

    config: Config
    inference: Inference
    weak: Inference | None  # of sampling.weak_checkpoint
    objective: Objective
    codec: LatentCodec
    spec: LatentSpec
    identity: str = ""  # SHA-256 of the weights' file
    classes: Classes = Classes(0)
    checkpoint: str = ""  # its folder
    weights: str = "ema"
    weak_identity: str = ""

    def changed(self, overrides: Iterable[str], where: str) -> "ImagePipeline":
        """A copy with overrides of its config. ValueError, which names `where`, for those that do not fit it."""
        config = config_from(to_tree(self.config), where, overrides)
        check_sampling(config, self.objective, self.model.null_label)
        return replace(self, config=config)

    @torch.no_grad()
    def latents(self, indices: list[int], labels: Tensor, seed: int, *, on_step=None, denoised_fn=None) -> Tensor:
        """x_0 (N, C, h, w) of the images `indices` with labels (N,).

        `on_step(t, x_t, prediction)` sees every evaluation. `denoised_fn(x_0)` replaces the predicted x_0 at every
        evaluation; without it, sampling.clip does.
        """
        noise = ImageRandom([seed_of(seed, i) for i in indices])
        return self.latents_from(noise, labels, on_step=on_step, denoised_fn=denoised_fn)

    @torch.no_grad()
    def latents_from(self, noise: Noise, labels: Tensor, *, on_step=None, denoised_fn=None) -> Tensor:
        """Like `latents`, from any noise: x_1 is the first that it draws, and a stochastic sampler draws more."""
        settings, weak = self.config.sampling, self.weak
        x_1 = noise(torch.empty(len(labels), *self.model.state_shape, device=labels.device))
        if settings.route:
            if not isinstance(noise, ImageRandom):
                raise ValueError(f"sampling.route={settings.route} needs samples with seeds of their own; use 0 here")
            routing = routing_of(self.model, settings.route, self.config.training.route_ends, "sampling.route")
            seeds = [seed_of(generator.initial_seed(), ROUTE) for generator in noise.generators]
            weak = SparseInference(self.inference, routing, seeds)
        denoise = guided(
            self.objective,
            self.inference,
            labels,
            settings.cfg_scale,
            settings.cfg_channels or None,
            cfg_interval=settings.cfg_interval,
            cfg_rescale=settings.cfg_rescale,
            weak_model=weak,
        )
        denoised_fn, channels = denoised_fn or CLIPS[settings.clip], self.spec.shape[0]
        if denoised_fn is not None:
            fn = denoised_fn if self.model.class_token is None else of_latents(denoised_fn, channels)
            denoise = processed(denoise, self.objective.path, fn)
        if on_step is not None:
            denoise = watched(denoise, on_step)
        sampler, times = bind(SAMPLERS, settings.sampler, "sampling.sampler"), self.objective.timesteps(settings.steps)
        return sampler(denoise, x_1, times, self.objective.path, noise=noise)[:, :channels]

    def images(self, indices: list[int], labels: Tensor, seed: int) -> np.ndarray:
        """uint8 (N, H, W, 3)."""
        return self.decode(self.latents(indices, labels, seed))

    def decode(self, x_0: Tensor) -> np.ndarray:
        """Latents (N, C, h, w) -> uint8 (N, H, W, 3); ValueError where they are not finite."""
        pixels = self.codec.decode(x_0)
        if not pixels.isfinite().all():
            raise ValueError("the sampled images are not finite: check the weights with fastdit verify")
        return to_uint8(pixels).cpu().numpy()

    def trajectory(self, noise: Noise, labels: Tensor, frames: int) -> tuple[list[float], list[Tensor], list[Tensor]]:
        """Up to `frames` times (F,) from noise to data, and x_t and the predicted x_0 at each, (N, C, h, w).

        At the last time, t = 0, both are the sample. Where a sampler evaluates the network several times at one t, such
        as `heun`, the last evaluation counts.
        """
        seen: dict[float, tuple[Tensor, Tensor]] = {}
        channels = self.spec.shape[0]  # without a class token's

        def on_step(t: float, x_t: Tensor, prediction) -> None:
            seen[t] = x_t[:, :channels], prediction.x_0[:, :channels]

        x_0 = self.latents_from(noise, labels, on_step=on_step)
        seen[0.0] = x_0, x_0
        times = sorted(seen, reverse=True)
        times = [times[i] for i in spread(len(times), frames)]
        return times, [seen[t][0] for t in times], [seen[t][1] for t in times]

    def remarks(self) -> list[str]:
        """What a user should know about the guidance and the autoencoder before images are made."""
        settings, lines = self.config.sampling, []
        if self.spec.codec not in ("", self.codec.fingerprint):
            lines.append(f"the decoder of {self.codec.name} is not that of the autoencoder that encoded the latents; "
                         "the encoder is the same")  # fmt: skip
        if self.weak and settings.cfg_scale == 1:
            lines.append(f"sampling.weak_checkpoint={settings.weak_checkpoint} changes nothing at sampling.cfg_scale=1")
        if settings.cfg_scale != 1 and 0 < settings.cfg_channels < (channels := self.spec.shape[0]) and channels > 4:
            lines.append(f"sampling.cfg_channels={settings.cfg_channels} guides only the first of {channels} channels; "
                         "use 0 for all")  # fmt: skip
        return lines

    def batches(self, count: int) -> int:
        """The number of batches of `count` images."""
        return math.ceil(count / self.config.sampling.batch_size)

    def batch(self, b: int, classes: Sequence[int], seed: int) -> np.ndarray:
        """uint8 (n, H, W, 3): batch `b` of images with these classes, from the images' own seeds.

        A short last batch is padded and cut, because the last bits of a matrix product depend on its shape.
        """
        size, count = self.config.sampling.batch_size, len(classes)
        indices = list(range(b * size, (b + 1) * size))
        y = torch.tensor([classes[i % count] for i in indices], device=self.device)
        with self.working():
            return self.images(indices, y, seed)[: count - b * size]

    @contextmanager
    def working(self) -> Iterator[None]:
        """One thread, and a remedy where memory is too small."""
        size = self.config.sampling.batch_size
        remedy = f"sampling.batch_size={size} is too much for {self.device}: use a smaller one"
        with one_thread(self.device), out_of_memory_says(remedy):
            yield

    def record(self, num_samples: int, seed: int, labels: str | None) -> dict[str, Any]:
        """What determines the images, and which weights and code made them: the contents of sampling.json."""
        sampling = self.config.sampling
        return {
            "checkpoint": self.checkpoint,
            "weights": self.weights,
            "sha256": self.identity or None,  # unknown during training
            "num_samples": num_samples,
            "seed": seed,
            "labels": labels or "balanced",
            "objective": to_tree(self.config.objective),  # its options move the sampler's times
            "sampling": to_tree(sampling) | {"compile": self.inference.graphs is not None},
            **({"route_ends": list(self.config.training.route_ends)} if sampling.route else {}),
            "weak_sha256": self.weak_identity,
            "vae": self.codec.name,
            "vae_fingerprint": self.codec.fingerprint,
            "fastdit": __version__,
        }

    @property
    def model(self) -> DiT:
        return self.inference.model

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def of_latents(denoised_fn: Callable[[Tensor], Tensor], channels: int) -> Callable[[Tensor], Tensor]:
    """`denoised_fn` on the first `channels`, those of the latent; the channels of a class token stay."""
    return lambda x_0: torch.cat([denoised_fn(x_0[:, :channels]), x_0[:, channels:]], dim=1)


def spread(count: int, most: int) -> list[int]:
    """Up to `most` of 0..count - 1, evenly, with the first and the last."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(most, count))})
