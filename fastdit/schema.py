"""The keys of a config: frozen dataclasses with their defaults, meaning and limits; config.py reads them from YAML."""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastdit.registry import Choice, check_literals

MAX_EMA_STD = 12**-0.5  # relative standard deviation of a uniform average (training/ema.py)
SD_VAE = "stabilityai/sd-vae-ft-ema"


def require(holds: bool, key: str, value: Any, remedy: str) -> None:
    """Raises a ValueError that names the key, its value and the remedy, unless the value `holds`."""
    if not holds:
        raise ValueError(f"{key}={value!r} is out of range; {remedy}")


@dataclass(frozen=True)
class ShardSet:
    """A folder of latents and its weight among others: its share of every batch is weight / sum of the weights."""

    path: str = ""
    weight: float = 0.0

    def __post_init__(self):
        require(self.path, "data.shards.path", self.path, "use a folder of latents")
        possible = 0 < self.weight < float("inf")
        require(possible, f"data.shards: the weight of {self.path}", self.weight, "use a positive number")


def shards_text(shards: str | tuple[ShardSet, ...]) -> str:
    """data.shards in words: `a`, or `0.7 x a + 0.3 x b`."""
    return shards if isinstance(shards, str) else " + ".join(f"{each.weight:g} x {each.path}" for each in shards)


@dataclass(frozen=True)
class Cache:
    """The folder for the files of remote shards, and its size in GiB; 0: no limit."""

    folder: str | Path = ""
    gib: float = 0.0

    @property
    def most(self) -> float:
        """Bytes."""
        return self.gib * 2**30 or math.inf


@dataclass(frozen=True)
class DataConfig:
    # folder of latents, written by fastdit extract; or synthetic:IMAGES/CxHxW/CLASSES; or several folders, mixed:
    # [{path: a, weight: 0.7}, {path: b, weight: 0.3}]; or URLs, such as s3://bucket/latents
    shards: str | tuple[ShardSet, ...] = ""
    cache: str = ""  # folder of this machine that keeps the files of remote shards; required for them
    cache_gib: float = 0.0  # its size, beyond which the shards that were read least recently are deleted; 0: no limit
    features: str = ""  # an encoder's features, for repa and model.class_token; default: those in the shards' folder
    image_size: int | tuple[int, int] | None = None  # pixels: a side or [width, height]; null: that of the shards
    num_classes: int | None = None  # null: that of the shards; 0 trains an unconditional network
    normalize: Literal["none", "channel"] = "none"  # channel: latents of mean 0 and deviation 1, by the manifest
    hflip: bool = True  # mirror each image with probability 1/2
    vae: str = ""  # decodes the samples; default: the one that encoded the shards, as it must be; none: pixels
    prefetch: int = 4  # number of batches to read ahead
    block: int = 0  # images that are read in a row, for hard disks and object stores, such as 4096; 0: a full shuffle
    skip_damaged: bool = False  # replace a damaged sample by the next good one, instead of ending the run
    val_shards: str = ""  # a folder of latents for the validation loss
    val_fraction: float = 0.0  # or the share of the images in shards that is held out for it; the same in every run

    def __post_init__(self):
        require(0 <= self.cache_gib < float("inf"), "data.cache_gib", self.cache_gib, "use GiB, or 0 for no limit")
        fraction = self.val_fraction
        require(0 <= fraction < 1, "data.val_fraction", fraction, "use a share below 1, such as 0.01, or 0")
        both = fraction and self.val_shards
        require(not both, "data.val_fraction", fraction, "use 0 with data.val_shards, which gives other images")
        size, classes = self.image_size, self.num_classes
        sides = size if isinstance(size, tuple) else () if size is None else (size,)
        require(all(side > 0 for side in sides), "data.image_size", size, "use a positive number of pixels")
        require(self.prefetch >= 0, "data.prefetch", self.prefetch, "use 0 to read no batch ahead")
        require(0 <= self.block < 1 << 24, "data.block", self.block, "use 0 for a full shuffle, or for example 4096")
        known = classes is None or 0 <= classes < 1 << 31
        require(known, "data.num_classes", classes, "use 0 for an unconditional network")

    @property
    def remote_cache(self) -> Cache:
        return Cache(self.cache, self.cache_gib)


@dataclass(frozen=True)
class NetworkOptions:
    """Options of the DiT network. The defaults are the official design; docs/variants.md compares the others."""

    block: Literal["adaln_zero", "adaln", "in_context", "cross_attention"] = "adaln_zero"  # see models/blocks.py
    norm: Literal["layer", "rms"] = "layer"  # in the blocks and the final layer (RMS: Zhang & Sennrich 2019)
    qk_norm: Literal["none", "rms", "layer"] = "none"  # of each head's queries and keys, with learned weights
    mlp: Literal["gelu_tanh", "gelu", "swiglu"] = "gelu_tanh"  # gelu: exact; swiglu: gated, 2/3 of the width
    mlp_ratio: float = 4.0  # MLP width / hidden size
    position: Literal["sincos", "rope", "sincos_rope"] = "sincos"  # fixed table, 2-D rotary (Su et al. 2021), or both
    registers: int = 0  # number of learned tokens, dropped before the final layer (Darcet et al. 2023)
    qkv_bias: bool = True  # bias of attention's QKV projection
    proj_bias: bool = True  # bias of attention's output projection
    mlp_bias: bool = True  # biases of both linear layers of the MLP
    dropout: float = 0.0  # probability of dropping an element of a branch's output in training (models/dropout.py)
    decoder_blocks: int = 0  # the last blocks, as a decoder conditioned on the others' output (DDT, Wang et al. 2025)
    class_token: int = 0  # D of an encoder's class token, denoised with the latent (REG, Wu et al. 2025); 0: none
    unpatchify: Literal["linear", "transposed_conv"] = "linear"

    def __post_init__(self):
        check_literals(self, "model")
        require(0 <= self.class_token <= 1 << 16, "model.class_token", self.class_token,
                "use the width of the encoder's features, 768 for DINOv2-B, or 0")  # fmt: skip
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "use a probability in [0, 1)")
        require(0 <= self.registers < 1 << 16, "model.registers", self.registers, "use 0 for none, 4 or more")
        blocks = self.decoder_blocks
        require(blocks >= 0, "model.decoder_blocks", blocks, "use 0 for none, 6 of 28 in the paper")
        require(0 < self.mlp_ratio <= 1000, "model.mlp_ratio", self.mlp_ratio, "use a positive factor, 4 in the paper")


@dataclass(frozen=True)
class ModelConfig(NetworkOptions):
    variant: str = "DiT-XL/2"  # or depth x hidden size x heads / patch size: "DiT-6x384x6/2"
    class_dropout: float = 0.1  # probability of replacing a label by the null label, for classifier-free guidance
    attention: str = "auto"  # a backend of models/attention.py; auto: the fastest known for this GPU and shape
    learn_sigma: bool | None = None  # 2C output channels; null: the objective decides; SiT has 2C and ignores half

    def __post_init__(self):
        super().__post_init__()
        require(0 <= self.class_dropout < 1, "model.class_dropout", self.class_dropout, "use a probability in [0, 1)")

    @property
    def options(self) -> NetworkOptions:
        return NetworkOptions(**{f.name: getattr(self, f.name) for f in dataclasses.fields(NetworkOptions)})


@dataclass(frozen=True)
class LoopConfig:
    """What the training of a network and that of an autoencoder have in common."""

    steps: int = 400_000
    epochs: float = 0.0  # passes over the images, instead of steps; 0: steps count
    global_batch: int = 256  # images per step, over all processes
    micro_batch: int = 0  # images per forward pass and process; 0: all of its images
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 0  # linear learning-rate warmup
    lr_schedule: Choice = Choice("constant")  # linear, cosine, inverse_sqrt or wsd, see training/schedule.py
    grad_clip: float = 0.0  # maximum gradient norm; 0: no clipping
    ema_decay: float = 0.9999
    ema_warmup: bool = False  # decay min(ema_decay, (1 + step) / (10 + step)), for runs of a few hundred steps
    precision: Literal["bf16", "fp32"] = "bf16"  # of the computation; weights, optimizer state and EMA are always fp32
    log_every: int = 50
    checkpoint_every: int = 10_000
    checkpoint_minutes: float = 0.0  # also save whenever this much time has passed; 0: never
    keep_checkpoints: int = 3  # number of most recent checkpoints to keep; 0: all
    keep_every: int = 0  # also keep those whose step is a multiple of this; 0: none
    wandb: str = ""  # log to this project of Weights & Biases, too; offline where there is no API key
    max_skipped: int = 3  # end the run after this many steps in a row whose loss or gradient is not finite
    timeout_s: float = 600.0  # if a step takes longer, the run names the process that stalls, and ends
    time_limit: str = ""  # HH:MM, HH:MM:SS or minutes until the run saves and stops with exit code 75; "": none
    report: bool = True  # write run_dir/report.html at the end; fastdit report does it at any time

    def __post_init__(self):
        for key in ("steps", "global_batch", "log_every", "checkpoint_every"):
            require(getattr(self, key) >= 1, f"training.{key}", getattr(self, key), "use 1 or more")
        for key in ("epochs", "weight_decay", "warmup_steps", "grad_clip", "keep_checkpoints", "keep_every"):
            require(0 <= getattr(self, key) < float("inf"), f"training.{key}", getattr(self, key), "use 0 or more")
        require(self.timeout_s > 0, "training.timeout_s", self.timeout_s, "use a positive number of seconds")
        require(self.max_skipped >= 1, "training.max_skipped", self.max_skipped, "use 1 or more, 3 by default")
        require(
            self.checkpoint_minutes >= 0, "training.checkpoint_minutes", self.checkpoint_minutes, "use 0 for never"
        )
        limit = re.fullmatch(r"(\d{1,9}(:[0-5]\d){0,2})?", self.time_limit)
        require(limit, "training.time_limit", self.time_limit, "use HH:MM, HH:MM:SS or minutes")
        switch = self.wandb.lower() in ("yes", "no", "on", "off")
        require(not switch, "training.wandb", self.wandb, 'use the name of a project, or "" for none')
        require(0 < self.lr < float("inf"), "training.lr", self.lr, "use a positive learning rate, 1e-4 in the paper")
        require(all(0 <= beta < 1 for beta in self.betas), "training.betas", list(self.betas), "use two in [0, 1)")
        require(0 <= self.ema_decay < 1, "training.ema_decay", self.ema_decay, "use [0, 1), 0.9999 in the paper")

    @property
    def time_limit_s(self) -> float:
        """Seconds; 0 for no limit. 90 is minutes, 1:30 hours and minutes, 1:30:00 hours, minutes and seconds."""
        parts = [int(part) for part in (self.time_limit or "0").split(":")]
        return sum(part * unit for part, unit in zip(parts, (3600, 60, 1)[len(parts) == 1 :], strict=False))


@dataclass(frozen=True)
class TrainingConfig(LoopConfig):
    init_from: str = ""  # start from these weights: a run, checkpoint, official .pt file or diffusers folder
    micro_batch: int = 0  # images per forward pass and process; 0: all of its images; -1: as many as fit in GPU memory
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the blocks, AdamW for the rest
    ema_stds: tuple[float, ...] = ()  # relative widths of averages to store for `fastdit ema`, such as [0.05, 0.1]
    fp8: bool = False  # FP8 in the blocks' linear layers, bf16 elsewhere; on a GPU, needs Ada, Hopper or newer
    fp8_attention: bool = False  # attention itself rounds for these layers; predicted to be faster, not yet measured
    fp8_history: int = 16  # steps whose largest magnitudes set the FP8 scaling factors
    fp8_margin: float = 2.0  # how many times larger than in the history a value may become before it saturates
    residual: Literal["fp32", "bf16"] = "fp32"  # dtype of the residual stream between blocks, if precision is bf16
    cuda_graph: bool = False  # capture the whole step, including optimizer and EMA; needs one GPU and fixed shapes
    # what the backward pass recomputes: activation: GELU; selective: GELU and norms; auto: as little as memory allows
    activation_checkpointing: Literal["none", "activation", "selective", "full", "auto"] = "none"
    compile: Literal[True, False, "whole"] = True  # true: each block, starts in seconds; whole: the whole network
    align: tuple[Choice, ...] = ()  # alignment losses, such as [layersync]; see training/alignment.py
    route: float = 0.0  # share of the tokens that skip the middle blocks in training (models/routing.py); 0.5 in TREAD
    route_ends: tuple[int, int] = (2, 4)  # number of blocks at the start and at the end that no token skips
    route_full_steps: int = 0  # the last steps, in which no token skips
    joint_adaln: bool = False  # compute the adaLN projections of all blocks in one product, for small batches
    loss_aware_times: bool = False  # DDPM: importance sampling of timesteps by their loss, for loss_type=kl
    engine: Literal["auto", "torch", "deepspeed"] = "auto"  # auto: deepspeed if its launcher is used
    zero_stage: int = 1
    deepspeed: dict[str, Any] = field(default_factory=dict)  # added to DeepSpeed's JSON config
    validate_every: int | None = None  # steps between validation losses; null: as checkpoint_every; 0: never
    validate_images: int = 1280  # images of the validation loss
    loss_reference: str = ""  # a JSON file of validation losses to compare with, see bench/quality/curve.py
    sample_every: int = 0  # steps between grids of samples, made with the EMA as `sampling` says; 0: never
    sample_images: int = 16  # images of a grid
    evaluate_every: int = 0  # steps between evaluations of the EMA's samples, as by fastdit evaluate; 0: never
    reference: str = ""  # for evaluate_every: real images, or a file of fastdit evaluate --save-reference
    evaluate_images: int = 500  # number of samples of an evaluation
    evaluate_features: str = "efficientnet-lite0"  # as fastdit evaluate --features

    def __post_init__(self):
        super().__post_init__()
        require(self.micro_batch >= -1, "training.micro_batch", self.micro_batch, "use -1 for as many as fit")
        for key in ("validate_every", "sample_every", "evaluate_every"):
            require((getattr(self, key) or 0) >= 0, f"training.{key}", getattr(self, key), "use 0 for never")
        for key, least in (("validate_images", 1), ("sample_images", 1), ("evaluate_images", 2)):
            require(getattr(self, key) >= least, f"training.{key}", getattr(self, key), f"use {least} or more")
        stds, remedy = self.ema_stds, "use two or more different widths, such as [0.05, 0.1]; [] for none"
        require(len(stds) != 1 and len(set(stds)) == len(stds), "training.ema_stds", list(stds), remedy)
        remedy = f"use widths between 0 and {MAX_EMA_STD:.4f}, that of a uniform average"
        require(all(0 < std <= MAX_EMA_STD for std in stds), "training.ema_stds", list(stds), remedy)
        require(self.fp8_history >= 1, "training.fp8_history", self.fp8_history, "use 1 or more steps")
        require(1 <= self.fp8_margin <= 64, "training.fp8_margin", self.fp8_margin, "use 1 to 64")
        if self.optimizer == "muon":
            require(not self.cuda_graph, "training.cuda_graph", True, "use false with training.optimizer=muon")
        if self.fp8:
            require(self.precision == "bf16", "training.fp8", True, "use training.precision=bf16 with it")
            require(self.zero_stage < 3, "training.fp8", True, "use training.zero_stage=1 or 2 with it")
            policy = self.activation_checkpointing  # FP8 products save their own inputs
            require(policy != "activation", "training.activation_checkpointing", policy, "use selective with fp8=true")
        require(0 <= self.route < 1, "training.route", self.route, "use a share in [0, 1), 0.5 in the paper")
        require(min(self.route_ends) >= 0, "training.route_ends", list(self.route_ends), "use [2, 4] as in the paper")
        steps = self.route_full_steps
        require(0 <= steps <= self.steps, "training.route_full_steps", steps, "use 0 to training.steps")
        if self.joint_adaln:
            require(self.zero_stage < 3, "training.joint_adaln", True, "use training.zero_stage=1 or 2 with it")
        require(self.zero_stage in (1, 2, 3), "training.zero_stage", self.zero_stage, "use 1, 2 or 3")

    @property
    def residual_bytes(self) -> int:
        """Bytes per element of the residual stream."""
        return 2 if self.residual == self.precision == "bf16" else 4


@dataclass(frozen=True)
class SamplingConfig:
    sampler: Choice = Choice("ddpm")
    steps: str = "250"  # network evaluations, or a respacing: "ddim50", "10,15,20"
    cfg_scale: float = 1.0  # 1: no guidance; 0: no class
    cfg_channels: int = 0  # number of guided latent channels, 3 in the official release; 0: all
    cfg_interval: tuple[float, float] = (0.0, 1.0)  # guide only at times in this interval; t = 0 is data
    cfg_rescale: float = 0.0  # in [0, 1]; reduces the excess contrast of guided images
    weak_checkpoint: str = ""  # autoguidance: guide away from this weaker run instead of the null label
    route: float = 0.0  # Sparse Guidance: guide away from the prediction in which this share of the tokens skips blocks
    clip: Literal["none", "static", "dynamic"] = "none"  # clip predicted x_0: static to [-1, 1], dynamic by quantile
    batch_size: int = 50
    precision: Literal["bf16", "fp32"] = "fp32"
    compile: bool = True  # on a GPU, compile the blocks and capture the network's evaluation as a CUDA graph

    def __post_init__(self):
        require(self.batch_size >= 1, "sampling.batch_size", self.batch_size, "use 1 or more")
        few = all(len(number) < 7 for number in re.findall(r"\d+", self.steps))
        require(few, "sampling.steps", self.steps, "use fewer than 1,000,000")
        scale = self.cfg_scale
        require(0 <= scale < float("inf"), "sampling.cfg_scale", scale, "use 0 or more, 1 for no guidance")
        require(self.cfg_channels >= 0, "sampling.cfg_channels", self.cfg_channels, "use 0 for all, 3 as in DiT")
        low, high = self.cfg_interval
        require(0 <= low <= high <= 1, "sampling.cfg_interval", list(self.cfg_interval), "use [0, 1] for all times")
        require(0 <= self.route < 1, "sampling.route", self.route, "use a share in [0, 1), and cfg_scale above 1")
        require(0 <= self.cfg_rescale <= 1, "sampling.cfg_rescale", self.cfg_rescale, "use a factor in [0, 1]")


@dataclass(frozen=True)
class Config:
    run_dir: str = "runs/default"
    seed: int = 0
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    objective: Choice = Choice("ddpm")
    training: TrainingConfig = TrainingConfig()
    sampling: SamplingConfig = SamplingConfig()

    @property
    def monitor_every(self) -> dict[str, int]:
        """Steps between the run's validations, samples and evaluations, by name; 0 for never."""
        settings, held_out = self.training, bool(self.data.val_fraction or self.data.val_shards)
        every = settings.validate_every
        return {
            "validate": settings.checkpoint_every * held_out if every is None else every,
            "sample": settings.sample_every,
            "evaluate": settings.evaluate_every,
        }

    listed_by = "fastdit train --help-config"  # not a field, nor is the next
    others = {"loss", "discriminator"}, "fastdit train-vae"  # sections of another kind of config, and its command
