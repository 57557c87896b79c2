"""Frozen encoders whose patch features a network in training is aligned with (training.align=repa).

`fastdit extract --encoder` stores their features of each image and of its mirror image (data/features.py).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from fastdit.data.add_features import PRECISIONS
from fastdit.data.features import resample
from fastdit.evaluation.features import IMAGENET, efficientnet_lite0
from fastdit.files import read_json
from fastdit.registry import lookup

VITS = ("dinov2", "dinov2_with_registers", "dinov3_vit")  # model_type of transformers


@dataclass(frozen=True)
class FrozenEncoder:
    """An `Encoder` of data/features.py.

    `tokens(values, grid)` takes values in [0, 255], (N, 3, H, W) float32, and returns (N, T, D): the patches of the
    grid row by row, then the class token, if there is one.
    """

    name: str
    weights: str
    dim: int
    class_token: bool
    tokens: Callable[[Tensor, tuple[int, int]], Tensor]
    grid: tuple[int, int] = (16, 16)
    precision: str = "float32"

    def at(self, grid: tuple[int, int], precision: str) -> "FrozenEncoder":
        return replace(self, grid=grid, precision=precision)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        values, dtype = (pixels.float() + 1) * 127.5, PRECISIONS[self.precision]
        with torch.autocast(pixels.device.type, dtype, enabled=dtype != torch.float32):
            return self.tokens(values, self.grid).float()


def vision_transformer(path: str | None, device: torch.device) -> FrozenEncoder:
    """DINOv2 (Oquab et al. 2023, arXiv 2304.07193) or DINOv3 from a local transformers folder: its last hidden states.

    The image is resized so that one patch of the encoder is one token of the grid. For 16 x 16 tokens and patches of
    14, that is 224 px, as in REPA. Positions are interpolated by the network itself.
    """
    if path is None or not (Path(path) / "config.json").is_file():
        given = f"{path} has no config.json" if path else "the encoder needs a folder"
        raise ValueError(f"{given}; give --encoder dinov2=FOLDER with a DINOv2 or DINOv3 of the transformers library")
    kind = read_json(Path(path) / "config.json").get("model_type")
    if kind not in VITS:
        raise ValueError(f"{path} has a network of type {kind!r}; use one of {', '.join(VITS)}")
    if not (files := sorted(Path(path).glob("*.safetensors"))):
        raise ValueError(f"{path} has no model.safetensors; download it")
    from transformers import AutoModel

    how = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    try:
        network, about = AutoModel.from_pretrained(path, **how)
        missing = sorted(about["missing_keys"])
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} cannot be loaded ({reason}); download it again") from None
    if missing:  # the library would make them up
        raise ValueError(f"{path} lacks {len(missing)} of its weights, such as {missing[0]}; download it again")
    network = network.eval().requires_grad_(False).to(device)
    preprocessor, mean_std = Path(path) / "preprocessor_config.json", IMAGENET
    if preprocessor.is_file():
        stored = read_json(preprocessor)
        mean_std = tuple(tuple(stored.get(key, usual)) for key, usual in zip(("image_mean", "image_std"), IMAGENET,
                                                                             strict=True))  # fmt: skip
    patch = network.config.patch_size
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in mean_std)

    def tokens(values: Tensor, grid: tuple[int, int]) -> Tensor:
        sides = grid[0] * patch, grid[1] * patch
        if values.shape[2:] != sides:
            values = F.interpolate(values, sides, mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)
        hidden = network(pixel_values=(values / 255 - mean) / std).last_hidden_state  # (N, 1 + registers + patches, D)
        return torch.cat([hidden[:, -grid[0] * grid[1] :], hidden[:, :1]], dim=1)

    return FrozenEncoder(kind, digest_of(files), network.config.hidden_size, True, tokens)


def lite0_maps(path: str | None, device: torch.device) -> FrozenEncoder:
    """EfficientNet-Lite0's last feature maps at 224 px, 7 x 7 of 1280 channels, resampled bilinearly to the grid."""
    extractor = efficientnet_lite0(path, device)

    def tokens(values: Tensor, grid: tuple[int, int]) -> Tensor:
        maps = extractor.network.maps(extractor.prepare(values))  # (N, 1280, 7, 7)
        return resample(maps.float(), grid).flatten(2).transpose(1, 2)

    return FrozenEncoder(extractor.name, extractor.hash, extractor.dim, False, tokens)


def digest_of(files: list[Path]) -> str:
    """SHA-256 of the contents of files, one after the other; of a single file, its own."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def load_encoder(name: str, device: torch.device | str = "cpu") -> FrozenEncoder:
    """The encoder that `NAME` or `NAME=PATH` names; PATH is its weights' file or folder."""
    name, _, path = name.partition("=")
    return lookup(ENCODERS, name, "--encoder")(path or None, torch.device(device))


ENCODERS = {"dinov2": vision_transformer, "dinov3": vision_transformer, "efficientnet-lite0": lite0_maps}
