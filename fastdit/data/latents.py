"""Pixels <-> moments <-> latents through a diffusers AutoencoderKL (Rombach et al. 2022, arXiv 2112.10752).

"Moments" are the posterior's mean and standard deviation, unscaled. A latent is
x_0 = (mean + std * noise - shift) * scale.
"""

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from fastdit.files import read_json

# The config entries that affect latents or decoded pixels; the rest is bookkeeping.
FINGERPRINTED = (
    "act_fn", "block_out_channels", "down_block_types", "in_channels", "latent_channels", "layers_per_block",
    "mid_block_add_attention", "norm_num_groups", "out_channels", "scaling_factor", "shift_factor", "up_block_types",
    "use_post_quant_conv", "use_quant_conv",
)  # fmt: skip
MAX_SIDE, MAX_LAYERS = 1 << 14, 100


@dataclass(frozen=True)
class LatentSpec:
    """What kind of latents a shard set, checkpoint or conversion uses; they must agree to be used together."""

    shape: tuple[int, int, int]  # (C, h, w)
    scale: float
    shift: float
    vae: str  # the autoencoder's name or folder, as the user gave it
    codec: str  # its LatentCodec.fingerprint; "" if unknown, and then not compared
    image_size: int  # pixels per side

    def __post_init__(self):
        if not all(1 <= size <= MAX_SIDE for size in self.shape):
            raise ValueError(f"shape={self.shape} of the latents is out of range; use sizes from 1 to {MAX_SIDE}")

    @classmethod
    def names(cls) -> list[str]:
        return [f.name for f in fields(cls)]

    def differences(self, other: "LatentSpec") -> list[tuple[str, object, object]]:
        """(field, own value, other's value) of each differing field that affects the latents' values."""
        pairs = [(key, getattr(self, key), getattr(other, key)) for key in ("shape", "scale", "shift", "codec")]
        return [(key, a, b) for key, a, b in pairs if a != b and not (key == "codec" and "" in (a, b))]

    def check(self, other: "LatentSpec", mine: str, theirs: str) -> None:
        """Raises a ValueError unless these latents, from `mine`, are compatible with `other`, from `theirs`."""
        for key, own, value in self.differences(other):
            raise ValueError(
                f"the latents of {theirs} have {key} {value}, but {mine} has latents with {key} {own} (autoencoder "
                f"{self.vae}); use the same autoencoder and image size for both"
            )


def sample_latents(moments: Tensor, noise: Tensor, scale: float, shift: float = 0.0) -> Tensor:
    """x_0 (N, C, h, w) = (mean + std * noise - shift) * scale from moments (N, 2C, h, w) and standard normal noise."""
    mean, std = moments.chunk(2, dim=1)
    return torch.addcmul(mean - shift if shift else mean, std, noise) * scale


class LatentCodec:
    """A frozen AutoencoderKL: `encode` returns moments, `decode` takes scaled latents.

    `scale`, `shift`: see `sample_latents`. `downsample`: image side / latent side. `channels`: C. `fingerprint`:
    identifies the autoencoder independently of its dtype and device (create the codec from the fp32 weights, then
    convert it with `to`).
    """

    def __init__(self, vae: nn.Module, name: str = "in-memory"):
        self.vae = vae.eval().requires_grad_(False)
        self.name = name
        config = vae.config
        self.scale = float(config.scaling_factor)
        self.shift = float(getattr(config, "shift_factor", None) or 0.0)
        self.downsample = 2 ** (len(config.block_out_channels) - 1)
        self.channels = int(config.latent_channels)
        self.fingerprint = fingerprint(vae)

    @classmethod
    def load(
        cls, name: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> "LatentCodec":
        """Loads a folder from AutoencoderKL.save_pretrained, a pipeline's folder (with `vae/` in it) or a hub name.

        Raises a one-line ValueError if it does not exist or is not a complete AutoencoderKL.
        """
        from diffusers import AutoencoderKL  # takes seconds to import

        folder = Path(name)
        subfolder = None
        if folder.is_dir():
            subfolder = "vae" if (folder / "vae" / "config.json").is_file() else None
            _check_folder(folder / (subfolder or ""))
        elif folder.exists() or folder.is_absolute() or str(name).startswith(".") or str(name).count("/") > 1:
            raise ValueError(
                f"vae={name} is not a folder; give one written by AutoencoderKL.save_pretrained, or a hub name"
            )
        try:
            vae, loading = AutoencoderKL.from_pretrained(
                str(name), subfolder=subfolder, output_loading_info=True, torch_dtype=torch.float32
            )
        except Exception as error:  # network, hub, safetensors and pickle errors have no common base class
            what = "cannot be read" if folder.is_dir() else "is not a local folder and the hub download failed"
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"vae={name} {what}: {type(error).__name__}: {reason}") from error
        if missing := sorted(loading["missing_keys"]):  # diffusers initializes them randomly
            raise ValueError(
                f"vae={name} is missing {len(missing)} weights (the first is {missing[0]}); "
                "save it again with AutoencoderKL.save_pretrained"
            )
        try:  # diffusers accepts any settings
            codec = cls(vae, str(name))
            moments = codec.encode(torch.zeros(1, 3, codec.downsample, codec.downsample))
            fits = moments.shape == (1, 2 * codec.channels, 1, 1)
            codec.decode(moments[:, : codec.channels])
        except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
            fits = False
            reason = str(error).strip().partition("\n")[0]
        else:
            reason = f"an image of {codec.downsample} px becomes moments of shape {tuple(moments.shape)}"
        if not fits:
            raise ValueError(f"vae={name} cannot encode and decode images with the settings in config.json: {reason}")
        return codec.to(dtype=dtype, device=device)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "LatentCodec":
        """Moves or converts the autoencoder in place; the fingerprint does not change."""
        nn.Module.to(self.vae, device=device, dtype=dtype)  # diffusers' own `to` gives needless warnings
        return self

    def spec(self, image_size: int, shape: tuple[int, int, int] | None = None) -> LatentSpec:
        """The LatentSpec of square images with `image_size` pixels per side; `shape` overrides the latents' shape."""
        side = image_size // self.downsample
        shape = shape or (self.channels, side, side)
        return LatentSpec(shape, self.scale, self.shift, self.name, self.fingerprint, image_size)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) in [-1, 1] -> moments (N, 2C, h, w), float32 and unscaled: mean, then std."""
        self.check_image_size(*pixels.shape[-2:])
        posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        # exponentiate in fp32: in half precision, exp() would lose three digits of std
        std = (0.5 * posterior.logvar.float()).exp()
        return torch.cat([posterior.mean.float(), std], dim=1)

    @torch.no_grad()
    def decode(self, x_0: Tensor) -> Tensor:
        """Scaled latents (N, C, h, w) -> float32 pixels (N, 3, H, W), approximately in [-1, 1]."""
        z = x_0.float() / self.scale + self.shift
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


def fingerprint(vae: nn.Module) -> str:
    """SHA-256 of the FINGERPRINTED config entries and the weights as little-endian fp32, sorted by name."""
    config = {key: getattr(vae.config, key, None) for key in FINGERPRINTED}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for key, value in sorted(vae.state_dict().items()):
        array = value.detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(f"{key} {array.shape}".encode())
        digest.update(array.astype("<f4", copy=False).data)
    return digest.hexdigest()


def _check_folder(folder: Path) -> None:
    path = folder / "config.json"
    try:
        config = read_json(path)
        kind = config.get("_class_name")
    except FileNotFoundError:
        raise ValueError(
            f"vae={folder} has no config.json; give a folder written by AutoencoderKL.save_pretrained"
        ) from None
    except ValueError as error:
        raise ValueError(f"vae={error}; save the autoencoder again") from None
    layers = config.get("layers_per_block", 1)
    if type(layers) is not int or not 1 <= layers <= MAX_LAYERS:
        raise ValueError(f"vae={path}: layers_per_block={layers!r} is out of range; use 1 to {MAX_LAYERS}")
    if kind != "AutoencoderKL":
        raise ValueError(
            f"vae={folder} is of class {kind}, which has no posterior to sample from; use an AutoencoderKL"
        )
