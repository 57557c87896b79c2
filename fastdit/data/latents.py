"""Pixels <-> moments <-> latents through a diffusers AutoencoderKL (Rombach et al. 2022, arXiv 2112.10752).

"Moments" here are the posterior's mean and standard deviation, unscaled. A latent is x_0 = (mean + std noise - shift)
scale.
"""

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

# What changes a latent or a decoded pixel beside the weights; the rest of the config is bookkeeping.
FINGERPRINTED = (
    "act_fn", "block_out_channels", "down_block_types", "in_channels", "latent_channels", "layers_per_block",
    "mid_block_add_attention", "norm_num_groups", "out_channels", "scaling_factor", "shift_factor", "up_block_types",
    "use_post_quant_conv", "use_quant_conv",
)  # fmt: skip


@dataclass(frozen=True)
class LatentSpec:
    """What latents are. Shard sets, checkpoints and conversions carry one each, and must agree to be used together."""

    shape: tuple[int, int, int]  # (C, h, w)
    scale: float
    shift: float
    vae: str  # the autoencoder's name or folder, as the user gave it
    codec: str  # its LatentCodec.fingerprint; "" where it is not known, so not compared
    image_size: int  # pixels per side

    @classmethod
    def names(cls) -> list[str]:
        return [f.name for f in fields(cls)]

    def differences(self, other: "LatentSpec") -> list[tuple[str, object, object]]:
        """(field, own value, other's value) where they differ in what changes the numbers: not in names or pixels."""
        pairs = [(key, getattr(self, key), getattr(other, key)) for key in ("shape", "scale", "shift", "codec")]
        return [(key, a, b) for key, a, b in pairs if a != b and not (key == "codec" and "" in (a, b))]

    def check(self, other: "LatentSpec", mine: str, theirs: str) -> None:
        """ValueError unless these latents, of `mine`, and the `other` ones, of `theirs`, are the same kind."""
        for key, own, value in self.differences(other):
            raise ValueError(
                f"the latents of {theirs} have {key} {value}, but {mine} has latents with {key} {own} (autoencoder "
                f"{self.vae}); use the same autoencoder and image size for both"
            )


def sample_latents(moments: Tensor, noise: Tensor, scale: float, shift: float = 0.0) -> Tensor:
    """x_0 (N, C, h, w) = (mean + std noise - shift) scale, from moments (N, 2C, h, w) and standard normal noise."""
    mean, std = moments.chunk(2, dim=1)
    return torch.addcmul(mean - shift if shift else mean, std, noise) * scale


class LatentCodec:
    """An AutoencoderKL, frozen: `encode` to moments, `decode` from scaled latents.

    `scale`, `shift`: from moments to latents. `downsample`: pixels per latent cell and side. `channels`: C.
    `fingerprint`: identifies the autoencoder whatever the dtype and device it runs in (make the codec from the fp32
    weights and convert it with `to`).
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
        """Loads a folder written by AutoencoderKL.save_pretrained (or a pipeline's, with `vae/` in it), or a hub name.

        ValueError in one line when there is no such thing, or when it is not a whole AutoencoderKL.
        """
        from diffusers import AutoencoderKL  # seconds to import: only when an autoencoder is needed

        folder = Path(name)
        subfolder = None
        if folder.is_dir():
            subfolder = "vae" if (folder / "vae" / "config.json").is_file() else None
            _check_folder(folder / (subfolder or ""))
        elif folder.exists() or folder.is_absolute() or str(name).startswith(".") or str(name).count("/") > 1:
            raise ValueError(
                f"vae={name} is not a folder; name one written by AutoencoderKL.save_pretrained, or a hub name"
            )
        try:
            vae, loading = AutoencoderKL.from_pretrained(
                str(name), subfolder=subfolder, output_loading_info=True, torch_dtype=torch.float32
            )
        except Exception as error:  # network, hub, safetensors and pickle errors have no common base
            what = "cannot be read" if folder.is_dir() else "is no local folder and could not be fetched from the hub"
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"vae={name} {what}: {type(error).__name__}: {reason}") from error
        if loading["missing_keys"]:  # diffusers would leave them at random values
            raise ValueError(
                f"vae={name} lacks {len(loading['missing_keys'])} weights, {sorted(loading['missing_keys'])[0]} first; "
                "save it again with AutoencoderKL.save_pretrained"
            )
        return cls(vae, str(name)).to(dtype=dtype, device=device)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "LatentCodec":
        """Moves the autoencoder in place; the fingerprint stays that of the weights it was made from."""
        nn.Module.to(self.vae, device=device, dtype=dtype)  # diffusers' own `to` warns without cause
        return self

    def spec(self, image_size: int, shape: tuple[int, int, int] | None = None) -> LatentSpec:
        """The latents that this codec makes of square images of `image_size` pixels, or with another `shape`."""
        side = image_size // self.downsample
        shape = shape or (self.channels, side, side)
        return LatentSpec(shape, self.scale, self.shift, self.name, self.fingerprint, image_size)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) in [-1, 1] -> float32 moments (N, 2C, h, w): mean, then std, unscaled."""
        self.check_image_size(*pixels.shape[-2:])
        posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        # std from the log-variance in fp32: exp() in half precision would cost three of its digits
        std = (0.5 * posterior.logvar.float()).exp()
        return torch.cat([posterior.mean.float(), std], dim=1)

    @torch.no_grad()
    def decode(self, x_0: Tensor) -> Tensor:
        """Latents (N, C, h, w) as the network sees them, scaled -> float32 pixels (N, 3, H, W), about [-1, 1]."""
        z = x_0.float() / self.scale + self.shift
        return self.vae.decode(z.to(self.vae.dtype)).sample.float()

    def check_image_size(self, *sides: int) -> None:
        """ValueError with the nearest sizes that work, when a side is no multiple of the downsampling factor."""
        for side in sides:
            if side < self.downsample or side % self.downsample:
                below = max(side // self.downsample, 1) * self.downsample
                raise ValueError(
                    f"image_size={side} is not divisible by {self.downsample}, the factor of vae={self.name}; "
                    f"use {below} or {below + self.downsample}"
                )


def fingerprint(vae: nn.Module) -> str:
    """SHA-256 over the autoencoder's config items that matter and its weights as little-endian fp32, sorted by name."""
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
        kind = json.loads(path.read_text()).get("_class_name")
    except FileNotFoundError:
        raise ValueError(
            f"vae={folder} holds no config.json; name a folder written by AutoencoderKL.save_pretrained"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"vae={path} is damaged ({error}); save the autoencoder again") from None
    if kind != "AutoencoderKL":
        raise ValueError(
            f"vae={folder} is of class {kind}, not AutoencoderKL; its latents would have no posterior to sample"
        )
