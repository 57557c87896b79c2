"""Pixels <-> moments <-> latents through a diffusers autoencoder, or without one.

"Moments" are the posterior's mean and standard deviation, unscaled. A latent is
x_0 = (mean + std * noise - shift) * scale.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdit.data.autoencoders import DECODER, NO_VAE, fingerprint, load_autoencoder
from fastdit.data.images import Size, width_height

PerChannel = float | tuple[float, ...]  # one value for all channels of the latents, or one for each
MAX_SIDE = 1 << 14


@dataclass(frozen=True)
class LatentSpec:
    """What kind of latents a shard set, checkpoint or conversion uses; they must agree to be used together."""

    shape: tuple[int, int, int]  # (C, h, w)
    scale: PerChannel
    shift: PerChannel
    vae: str  # the autoencoder's folder or hub name, or NO_VAE
    codec: str  # its LatentCodec.fingerprint; "" if unknown, and then not compared
    image_size: Size  # pixels per side of a square, or (width, height)
    precision: str = ""  # in which the autoencoder encoded them; "" if unknown
    codec_encoder: str = ""  # its LatentCodec.encoder; "" if unknown, and then the whole autoencoder counts

    def __post_init__(self):
        for key in ("shape", "scale", "shift", "image_size"):  # JSON has lists
            if isinstance(value := getattr(self, key), list):
                object.__setattr__(self, key, tuple(value))
        for key in ("scale", "shift"):
            if isinstance(value := getattr(self, key), tuple) and len(value) != self.shape[0]:
                raise ValueError(f"{key}={value} of the latents is not one value for each of {self.shape[0]} channels")
        if not all(1 <= size <= MAX_SIDE for size in self.shape):
            raise ValueError(f"shape={self.shape} of the latents is out of range; use sizes from 1 to {MAX_SIDE}")

    def to_json(self) -> dict[str, Any]:
        """The fields, with lists for tuples."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "LatentSpec":
        """What `to_json` returned; raises a KeyError, TypeError or ValueError if it is damaged."""
        kinds = {"scale": float, "shift": float, "vae": str, "codec": str, "image_size": int, "precision": str,
                 "codec_encoder": str}  # fmt: skip
        channels, height, width = map(int, stored["shape"])
        stored = {"precision": "", "codec_encoder": "", **stored}  # earlier versions did not record them
        others = {key: [*map(kind, v)] if isinstance(v := stored[key], list | tuple) else kind(v)
                  for key, kind in kinds.items()}  # fmt: skip
        return cls((channels, height, width), **others)

    @property
    def are_pixels(self) -> bool:
        return self.vae == NO_VAE

    @property
    def scaling(self) -> str:
        """The scale in words: `0.18215`, or `0.31 to 0.52 by channel`."""
        return in_words(self.scale)

    @classmethod
    def names(cls) -> list[str]:
        return [f.name for f in fields(cls)]

    def differences(self, other: "LatentSpec", *more: str) -> list[tuple[str, object, object]]:
        """(field, own value, other's value) of each differing field that affects the latents' values.

        Both kinds work with one network if only the precision differs; `more` ("precision") compares that, too.
        """
        known = () if self.same_encoder(other) else ("codec",)
        pairs = [(key, getattr(self, key), getattr(other, key)) for key in ("shape", "scale", "shift", *known, *more)]
        return [(key, a, b) for key, a, b in pairs if a != b and "" not in (a, b)]

    def same_encoder(self, other: "LatentSpec") -> bool:
        """Whether both give an image the same moments: the autoencoders are equal, or differ in the decoder alone."""
        return self.codec == other.codec or self.codec_encoder == other.codec_encoder != ""

    def check(self, other: "LatentSpec", mine: str, theirs: str, *more: str) -> None:
        """Raises a ValueError unless these latents, from `mine`, are compatible with `other`, from `theirs`.

        `more`: see `differences`.
        """
        for key, own, value in self.differences(other, *more):
            remedy = "autoencoder, image size and data.normalize" if key != "precision" else key
            raise ValueError(
                f"the latents of {theirs} have {key} {value}, but {mine} has latents with {key} {own} (autoencoder "
                f"{self.vae}); use the same {remedy} for both"
            )


def in_words(value: PerChannel) -> str:
    return f"{min(value):g} to {max(value):g} by channel" if isinstance(value, tuple) else f"{value:g}"


def sample_latents(moments: Tensor, noise: Tensor, scale: PerChannel, shift: PerChannel = 0.0) -> Tensor:
    """x_0 (N, C, h, w) = (mean + std * noise - shift) * scale from moments (N, 2C, h, w) and standard normal noise."""
    mean, std = moments.chunk(2, dim=1)
    return torch.addcmul(mean - per_channel(shift, mean) if shift else mean, std, noise) * per_channel(scale, mean)


def mean_latents(moments: Tensor, of: "LatentSpec | LatentCodec") -> Tensor:
    """x_0 (N, C, h, w) of the posterior's means, from moments (N, 2C, h, w)."""
    return sample_latents(moments, torch.zeros_like(moments.chunk(2, dim=1)[0]), of.scale, of.shift)


def per_channel(value: PerChannel, like: Tensor) -> float | Tensor:
    """A scale or shift as a factor or term of latents (N, C, h, w): the number, or a tensor (C, 1, 1) like `like`."""
    return _constant(value, like.dtype, like.device) if isinstance(value, tuple) else value


@lru_cache(64)  # a copy to a GPU would wait for it, and a CUDA graph cannot hold one
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1)


def channel_sums(moments: np.ndarray) -> np.ndarray:
    """Of an image's moments (n, 2C, h, w): the means of mean, mean^2 and variance in each channel, (3, C) float64."""
    mean, std = np.split(moments.astype(np.float64), 2, axis=1)
    return np.stack([m.mean(axis=(0, 2, 3)) for m in (mean, mean**2, std**2)])


def channel_statistics(average: np.ndarray, of: "LatentSpec | LatentCodec") -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (C,) of scaled latents, from the average of `channel_sums` over images."""
    mean, square, variance = average
    scale, shift = np.array(of.scale), np.array(of.shift)  # of all channels, or (C,)
    return (mean - shift) * scale, np.sqrt(square - mean**2 + variance) * abs(scale)


def scale_remarks(mean: np.ndarray, std: np.ndarray, scale: PerChannel, vae: str = "") -> list[str]:
    """What is wrong with the scale or shift of latents, given the mean and deviation of each scaled channel (C,).

    [] if `vae`, the autoencoder's name, is NO_VAE: the scale of pixels is fixed.
    """
    if vae == NO_VAE:
        return []
    lines, overall = [], float(np.sqrt((std**2).mean()))
    if not 0.5 <= overall <= 2 or not (std <= 4).all():
        one = not isinstance(scale, tuple)
        remedy = f"scaling_factor={scale / overall:.3g}" if one else "the right latents_mean and latents_std"
        lines.append(
            f"the standard deviations of the scaled latents are {rounded(std)}, far from the 1 that diffusion "
            f"assumes: scale={f'{scale:g}' if one else scale} is wrong; train with data.normalize=channel, or write "
            f"{remedy} to the autoencoder's config.json and extract again"
        )
    if (np.abs(mean) > 3).any():
        lines.append(
            f"the means of the scaled latents are {rounded(mean)}, far from 0: a shift is missing; train with "
            "data.normalize=channel"
        )
    return lines


def rounded(values: np.ndarray) -> str:
    return " ".join(f"{value:.2f}" for value in values)


def scale_and_shift(config: Any, scaling_factor: float | None = None) -> tuple[PerChannel, PerChannel]:
    """Scale and shift of the latents, from an autoencoder's config. `scaling_factor` overrides the config's."""
    scale: PerChannel = float(scaling_factor or config.scaling_factor)
    shift: PerChannel = float(getattr(config, "shift_factor", None) or 0.0)
    if getattr(config, "latents_std", None):
        scale = tuple(scale / float(std) for std in config.latents_std)
    if getattr(config, "latents_mean", None):
        shift = tuple(map(float, config.latents_mean))
    return scale, shift


class LatentCodec:
    """A frozen AutoencoderKL, AutoencoderDC or `Pixels`: `encode` returns moments, `decode` takes scaled latents.

    `scale`, `shift`: see `sample_latents`; of each channel where the autoencoder has latents_std and latents_mean.
    `downsample`: image side / latent side. `channels`: C. `fingerprint`, `encoder`: identify the autoencoder and
    its encoder independently of dtype and device (create the codec from the fp32 weights, then convert it with `to`).
    """

    def __init__(self, vae: nn.Module, name: str = "in-memory"):
        self.vae = vae.eval().requires_grad_(False)
        self.name = name
        config = vae.config
        self.scale, self.shift = scale_and_shift(config)
        blocks = getattr(config, "block_out_channels", None) or config.encoder_block_out_channels
        self.downsample = 2 ** (len(blocks) - 1)
        self.channels = int(config.latent_channels)
        self.fingerprint, self.encoder = fingerprint(vae), fingerprint(vae, without=DECODER)

    @classmethod
    def load(
        cls, name: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> "LatentCodec":
        """The codec of a folder, a hub name or NO_VAE; see `load_autoencoder`.

        ValueError if it does not encode and decode images.
        """
        vae = load_autoencoder(name)
        local = str(name) != NO_VAE and Path(name).is_dir()
        where = Path(name).resolve() if local else name  # it is used from other folders, too
        try:  # diffusers accepts any settings
            codec = cls(vae, str(where))
            side = 2 * codec.downsample  # a group norm of one channel needs more than one pixel
            moments = codec.encode(torch.zeros(1, 3, side, side))
            reason = f"an image of {side} px becomes moments of shape {tuple(moments.shape)}"
            codec.decode(moments[:, : codec.channels])
            fits = moments.shape == (1, 2 * codec.channels, 2, 2)
        except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
            fits, reason = False, str(error).strip().partition("\n")[0]
        if not fits:
            raise ValueError(f"vae={name} cannot encode and decode images with the settings in config.json: {reason}")
        return codec.to(dtype=dtype, device=device)

    @classmethod
    def of(
        cls, latents: LatentSpec, where: str, name: str = "", device: torch.device | str = "cpu"
    ) -> "LatentCodec":
        """The codec of latents, with their scale; ValueError, which says `where` they are, if it is another one.

        `name`: of the autoencoder, if it is not where it was.
        """
        codec = cls.load(name or latents.vae, device=device)
        codec.take_scale_of(latents)
        latents.check(codec.spec(latents.image_size, latents.shape), where, f"vae={codec.name}")
        return codec

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "LatentCodec":
        """Moves or converts the autoencoder in place; the fingerprint does not change."""
        nn.Module.to(self.vae, device=device, dtype=dtype)  # diffusers' own `to` gives needless warnings
        return self

    def faster(self, compile_for: tuple[int, ...] | None = None) -> str:
        """Prepares the encoder for a GPU, in place: channels-last, and compiled for pixels of the shape (N, 3, H, W).

        If that fails, as without a C++ compiler, it stays as it is; returns the reason.
        """
        nn.Module.to(self.vae, memory_format=torch.channels_last)
        if compile_for:
            self.vae.encoder.compile(dynamic=False)
            try:
                zeros = torch.zeros(compile_for, device=self.vae.device)
                self.encode(zeros.contiguous(memory_format=torch.channels_last))  # the strides that to_pixels makes
            except Exception as error:
                self.vae.encoder._compiled_call_impl = None
                return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        return ""

    def spec(self, image_size: Size, shape: tuple[int, int, int] | None = None) -> LatentSpec:
        """The LatentSpec of images of a size; `shape` overrides the latents' shape."""
        width, height = width_height(image_size)
        shape = shape or (self.channels, height // self.downsample, width // self.downsample)
        return LatentSpec(
            shape, self.scale, self.shift, self.name, self.fingerprint, image_size, codec_encoder=self.encoder
        )

    def take_scale_of(self, latents: LatentSpec) -> None:
        """Use the scale and shift of latents that this autoencoder encoded, which a run may have chosen itself."""
        if latents.same_encoder(self.spec(latents.image_size, latents.shape)):
            self.scale, self.shift = latents.scale, latents.shift

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) in [-1, 1] -> moments (N, 2C, h, w), float32 and unscaled: mean, then std."""
        self.check_image_size(*pixels.shape[-2:])
        encoded = self.vae.encode(pixels.to(self.vae.dtype))
        if not hasattr(encoded, "latent_dist"):  # that of AutoencoderDC and Pixels is a point
            mean = encoded.latent.float()
            return torch.cat([mean, torch.zeros_like(mean)], dim=1)
        posterior = encoded.latent_dist
        # exponentiate in fp32: in half precision, exp() would lose three digits of std
        std = (0.5 * posterior.logvar.float()).exp()
        return torch.cat([posterior.mean.float(), std], dim=1)

    @torch.no_grad()
    def decode(self, x_0: Tensor) -> Tensor:
        """Scaled latents (N, C, h, w) -> float32 pixels (N, 3, H, W), approximately in [-1, 1]."""
        z = x_0.float() / per_channel(self.scale, x_0.float()) + per_channel(self.shift, x_0.float())
        return self.vae.decode(z.to(self.vae.dtype)).sample.float()

    def check_image_size(self, *sides: int) -> None:
        """Raises a ValueError with the nearest valid sizes if a side is not a multiple of the downsampling factor."""
        for side in sides:
            if side < self.downsample or side % self.downsample:
                below = max(side // self.downsample, 1) * self.downsample
                raise ValueError(
                    f"image_size={side} is not divisible by {self.downsample}, the downsampling factor of "
                    f"vae={self.name}; use {below} or {below + self.downsample}"
                )
