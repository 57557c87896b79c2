"""What is measured while a run trains: the validation loss, the EMA's samples, and their distance to real images.

Everything here has its own network and random numbers, so the training computes the same bits with and without it. It
runs between two steps, on all processes: each takes some batches, and one collective joins them.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdit.build import build_network
from fastdit.config import Config
from fastdit.data.images import size_text, width_height
from fastdit.data.latents import LatentCodec
from fastdit.data.manifest import Manifest
from fastdit.diffusion.objectives import Objective
from fastdit.distributed import Ranks
from fastdit.errors import is_out_of_memory
from fastdit.evaluation.curve import ReferenceCurve
from fastdit.evaluation.evaluate import load_reference, measure
from fastdit.evaluation.features import load_features
from fastdit.evaluation.generated import generated
from fastdit.evaluation.loss import check_images, validation_loss
from fastdit.files import replacing
from fastdit.pipeline import ImagePipeline, Inference, image_labels
from fastdit.training.boards import check_wandb
from fastdit.training.ema import EMA, random_share
from fastdit.training.engine import Engine
from fastdit.training.guard import Requests
from fastdit.training.log import Log, as_json, read_records, rewind
from fastdit.training.sheets import sheet, strip
from fastdit.training.state import autoencoder_of, load_weak
from fastdit.training.watchdog import MONITORS, Watchdog

FOLDER, EVALUATIONS = "monitor", "evaluations.jsonl"  # of a run
SEED = 0  # of the samples, in every run
COLUMNS = 8  # of a grid of samples, at most
TOOK = {"validate": "validated", "sample": "sampled", "evaluate": "evaluated"}  # <key>_s in metrics.jsonl


class Monitor:
    """Validates, samples and evaluates every so many steps. ValueError for whatever would fail in the first use.

    `attach` gives it what the run has; then it is called after every step.
    """

    def __init__(self, config: Config, manifest: Manifest, held_out: Manifest | None, objective: Objective,
                 ranks: Ranks):  # fmt: skip
        self.config, self.manifest, self.held_out, self.ranks = config, manifest, held_out, ranks
        self.objective, settings, self.trouble = objective, config.training, ""
        every = settings.validate_every
        if every is None:
            every = settings.checkpoint_every if held_out else 0
        if every and not held_out:
            raise ValueError(f"training.validate_every={every} needs images that are not trained on; set data.val_shards "
                             "or data.val_fraction=0.01")  # fmt: skip
        self.every = {"validate": every, "sample": settings.sample_every, "evaluate": settings.evaluate_every}
        check_wandb(settings.wandb)
        size = manifest.latents.image_size
        if settings.evaluate_every and not Path(settings.reference).exists() or not settings.reference:
            if settings.evaluate_every:
                raise ValueError(f"training.reference={settings.reference!r} does not exist; training.evaluate_every needs "
                                 "real images there, or a file of fastdit evaluate --save-reference")  # fmt: skip
        self.curve = ReferenceCurve.load(settings.loss_reference, config) if settings.loss_reference else None
        self.network = self.codec = None
        if not any(self.every.values()):
            return
        if every:
            check_images(held_out, settings.validate_images)
        with torch.random.fork_rng(), torch.device("meta"):
            network = build_network(config, manifest.latents.shape, objective, ranks.device)
        self.network = network.to_empty(device=ranks.device).eval().requires_grad_(False)
        # compiled, it would share the limits of torch.compile, and its graphs the stream, with the training
        self.inference = Inference(self.network, config.sampling.precision, compile=False)
        if settings.sample_every or settings.evaluate_every:
            self.pipeline = self._pipeline()
        if settings.evaluate_every:
            with renamed({"--features": "training.evaluate_features", "--reference": "training.reference"}):
                self.extractor = load_features(settings.evaluate_features, ranks.device)
                self.reference = load_reference(
                    settings.reference, width_height(size), self.extractor, ranks, size_text(size)
                )
