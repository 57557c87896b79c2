"""Configuration of `fastdit train-vae`, with the rules of fastdit/config.py.

The defaults of the losses are those of latent diffusion's autoencoders (Rombach et al. 2022, arXiv 2112.10752), per
pixel value instead of per image.
"""

import math
from dataclasses import dataclass
from typing import Literal

from fastdit.registry import check_literals
from fastdit.schema import LoopConfig, require


@dataclass(frozen=True)
class ImagesConfig:
    images: str = ""  # a folder, list, archive or WebDataset, as for fastdit extract --images
    image_size: int | tuple[int, int] = 256  # of the crops, in pixels: a side or [width, height]
    crop: Literal["center", "random"] = "center"  # of images to train on; random: at any place, another each epoch
    crop_fraction: float = 1.0  # random: smallest side of a crop, relative to the largest that fits; 0.8 in ADM
    hflip: bool = True  # mirror each image with probability 1/2
    val_images: str = ""  # images to measure the reconstruction on
    val_fraction: float = 0.0  # or the share of the images that is held out for it; the same in every run
    workers: int = 0  # decoding threads of each process; 0: its share of the cores
    prefetch: int = 4  # number of batches to read ahead
    cache_gib: float = 1.0  # keep center crops in memory if all of them take at most this; 0: never

    def __post_init__(self):
        fraction = self.val_fraction
        require(0 <= fraction < 1, "data.val_fraction", fraction, "use a share below 1, such as 0.01, or 0")
        both = fraction and self.val_images
        require(not both, "data.val_fraction", fraction, "use 0 with data.val_images, which gives other images")
        require(min(self.sides) > 0, "data.image_size", self.image_size, "use a positive number of pixels")
        check_literals(self, "data")
        share = self.crop_fraction
        require(0 < share <= 1, "data.crop_fraction", share, "use a share in (0, 1], such as 0.8")
        alone = share == 1 or self.crop == "random"
        require(alone, "data.crop_fraction", share, "use 1 with center crops, or data.crop=random")
        for key in ("workers", "prefetch", "cache_gib"):
            require(getattr(self, key) >= 0, f"data.{key}", getattr(self, key), "use 0 or more")

    @property
    def sides(self) -> tuple[int, int]:
        """(width, height)"""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)


@dataclass(frozen=True)
class NetworkConfig:
    """The AutoencoderKL. With training.init_from, the source decides, but for scaling_factor."""

    channels: tuple[int, ...] = (128, 256, 512, 512)  # of each resolution; each but the last is halved
    layers: int = 2  # residual blocks of each resolution in the encoder; the decoder has one more
    latent_channels: int = 4
    norm_groups: int = 32  # of the group norms; must divide every number of channels
    attention: bool = True  # self-attention at the lowest resolution
    scaling_factor: float | None = None  # of the latents; null: 1 / their standard deviation, measured

    def __post_init__(self):
        require(self.channels and min(self.channels) >= 1, "model.channels", list(self.channels), "use one or more")
        for key, most in (("layers", 100), ("latent_channels", 1 << 12), ("norm_groups", 1 << 12)):
            value = getattr(self, key)
            require(1 <= value <= most, f"model.{key}", value, f"use 1 to {most}")
        fits = math.gcd(self.norm_groups, *self.channels)
        if fits != self.norm_groups:
            raise ValueError(
                f"model.norm_groups={self.norm_groups} does not divide every one of model.channels="
                f"{list(self.channels)}; use {fits}, or multiples of {self.norm_groups} as channels"
            )
        scale = self.scaling_factor
        require(scale is None or 0 < scale < math.inf, "model.scaling_factor", scale, "use null to measure it")

    @property
    def downsample(self) -> int:
        return 2 ** (len(self.channels) - 1)

    @property
    def variant(self) -> str:
        return f"AutoencoderKL-{'x'.join(map(str, self.channels))}/{self.downsample}"


@dataclass(frozen=True)
class LossConfig:
    """loss = reconstruction + perceptual_weight perceptual + kl_weight KL + the adversarial part of discriminator."""

    reconstruction: Literal["l1", "l2"] = "l1"  # mean absolute or squared error of pixels in [-1, 1]
    kl_weight: float = 1e-6  # of the KL divergence in nats per pixel value
    perceptual: Literal["none", "lpips", "efficientnet-lite0"] = "none"  # a distance of features, see perceptual.py
    perceptual_weight: float = 1.0
    vgg: str = ""  # for lpips: the file vgg16-397923af.pth; default: where torch.hub keeps it

    def __post_init__(self):
        check_literals(self, "loss")
        for key in ("kl_weight", "perceptual_weight"):
            value = getattr(self, key)
            require(0 <= value < math.inf, f"loss.{key}", value, "use 0 or more")


@dataclass(frozen=True)
class DiscriminatorConfig:
    """A PatchGAN with the hinge loss; its weight follows the gradients of the last layer (losses.py)."""

    weight: float = 0.0  # of the adversarial gradient relative to that of the other losses, 0.5 in the paper; 0: none
    start: int = 50_001  # the first step, counted from 1, with the discriminator
    channels: int = 64  # of its first layer
    layers: int = 3  # halvings; 3 judges patches of 70 px
    lr: float | None = None  # null: training.lr

    def __post_init__(self):
        require(0 <= self.weight < math.inf, "discriminator.weight", self.weight, "use 0 for none, 0.5 in the paper")
        for key in ("start", "channels", "layers"):
            require(getattr(self, key) >= 1, f"discriminator.{key}", getattr(self, key), "use 1 or more")
        require(self.layers <= 8, "discriminator.layers", self.layers, "use 8 or fewer")
        lr = self.lr
        require(lr is None or 0 < lr < math.inf, "discriminator.lr", lr, "use a positive rate, or null")

    @property
    def smallest(self) -> int:
        """The smallest side of an image, in pixels, that gives one logit."""
        return 3 * 2**self.layers


@dataclass(frozen=True)
class AutoencoderTraining(LoopConfig):
    init_from: str = ""  # start from these weights: a diffusers folder, a pipeline's folder or a hub name
    decoder_only: bool = False  # keep the encoder, and so the latents, of training.init_from
    steps: int = 100_000
    global_batch: int = 32  # images per step, over all processes
    betas: tuple[float, float] = (0.5, 0.9)  # of both optimizers
    ema_decay: float = 0.999
    ema_warmup: bool = True  # decay min(ema_decay, (1 + step) / (10 + step))
    compile: bool = True  # the blocks of encoder and decoder, with torch.compile
    evaluate_every: int | None = None  # steps between measurements of the EMA; null: as checkpoint_every; 0: at the end
    evaluate_images: int = 1000  # images to measure on, at most
    evaluate_features: str = "efficientnet-lite0"  # of the reconstructions' Frechet distance; "": without it
    sheet_images: int = 8  # columns of the sheet of images, latents and reconstructions

    def __post_init__(self):
        super().__post_init__()
        require(self.micro_batch >= 0, "training.micro_batch", self.micro_batch, "use 0 for all images of a process")
        require((self.evaluate_every or 0) >= 0, "training.evaluate_every", self.evaluate_every, "use 0 for the end")
        for key, least in (("evaluate_images", 2), ("sheet_images", 1)):
            require(getattr(self, key) >= least, f"training.{key}", getattr(self, key), f"use {least} or more")
        alone = not self.decoder_only or self.init_from
        require(alone, "training.decoder_only", True, "set training.init_from to an autoencoder whose encoder to keep")


@dataclass(frozen=True)
class AutoencoderConfig:
    run_dir: str = "runs/vae"
    seed: int = 0
    data: ImagesConfig = ImagesConfig()
    model: NetworkConfig = NetworkConfig()
    loss: LossConfig = LossConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    training: AutoencoderTraining = AutoencoderTraining()

    listed_by = "fastdit train-vae --help-config"  # not a field, nor is the next
    others = {"objective", "sampling"}, "fastdit train"

    def __post_init__(self):
        settings = self.discriminator
        if not self.training.epochs:
            self.check_start()
        if settings.weight and min(self.data.sides) < settings.smallest:
            raise ValueError(
                f"discriminator.layers={settings.layers} needs images of {settings.smallest} px or more, not "
                f"data.image_size={self.data.image_size}; use fewer layers"
            )

    def check_start(self) -> None:
        """ValueError for a discriminator that would never be trained; training.epochs gives the steps only later."""
        settings, steps = self.discriminator, self.training.steps
        if settings.weight and settings.start >= steps:
            epochs = f" (training.epochs={self.training.epochs:g})" * bool(self.training.epochs)
            raise ValueError(
                f"discriminator.start={settings.start} is not before training.steps={steps}{epochs}; use an earlier "
                "step, or discriminator.weight=0 to train without it"
            )
