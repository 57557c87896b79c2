"""Alignment losses: hidden tokens after one block are pulled toward a target, to learn representations sooner.

Each is added to the objective's loss with its weight. A projector belongs to a tap of the network (models/taps.py); a
checkpoint keeps it in a file of its own, and exports leave it out. Block numbers of 0 mean the paper's depth, in
proportion to the depth of the network.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.data.features import FeatureManifest, resample
from fastdit.data.opening import open_features
from fastdit.models.dit import DiT
from fastdit.models.routing import Routing
from fastdit.models.taps import Tap, Tapped
from fastdit.registry import Choice, build, check, lookup
from fastdit.schema import Config

PAPER_DEPTH = 28  # of DiT-XL and SiT-XL, for which the papers give block numbers


class Alignment(Protocol):
    """A frozen dataclass whose fields are its options; `until` is the step at which it ends, 0 for never."""

    weight: float
    until: int
    uses_features: bool  # of the shards

    def weight_at(self, step: int) -> float:
        """`weight`, and 0 from step `until` on (from 0)."""

    def taps(self, model: DiT, width: int) -> dict[str, Tap]:
        """Its taps by their names within this alignment; projectors are initialized from PyTorch's random state.

        `width`: D of the features, 0 without any.
        """

    def loss(
        self, tapped: Mapping[str, Tapped], x_0: Tensor, patch_size: int, features: Tensor | None = None
    ) -> Tensor:
        """Per sample (N,), from what its taps read, by their names, and the clean latents x_0 (N, C, h, w).

        `features`: those of the encoder (N, rows, columns, D), for an alignment that uses them.
        """


def at_depth(block: int, model: DiT, default: int) -> int:
    """A block number from 1; 0 means block `default` of 28, scaled to the network."""
    depth = len(model.blocks)
    number = block or max(1, round(default * depth / PAPER_DEPTH))
    if not 1 <= number <= depth:
        raise ValueError(f"training.align: block {number} is not one of the network's 1 to {depth}; use one of them")
    return number


def mlp(widths: Sequence[int]) -> nn.Module:
    """Linears with SiLU between; (D, 2048, 768) has two of them."""
    layers: list[nn.Module] = []
    for width, following in zip(widths, widths[1:], strict=False):
        layers += [nn.SiLU()] * bool(layers) + [nn.Linear(width, following)]
    return nn.Sequential(*layers)


def negative_cosine(a: Tensor, b: Tensor) -> Tensor:
    """-cos of a and b (N, T, D), averaged over the tokens: (N,)."""
    return -F.cosine_similarity(a.float(), b.float(), dim=-1).mean(1)


def patches_of(x: Tensor, patch_size: int) -> Tensor:
    """(N, C, h, w) -> (N, T, p p C), in the order of the network's tokens."""
    return F.pixel_unshuffle(x, patch_size).flatten(2).transpose(1, 2)


def chosen(values: Tensor, kept: Tensor | None) -> Tensor:
    """The rows `kept` (N, K) of values (N, T, D)."""
    return values if kept is None else values.gather(1, kept[..., None].expand(-1, -1, values.shape[-1]))


class GridConv(nn.Module):
    """A 3 x 3 convolution over tokens (N, T, D) on their grid, with zeros beyond its edges: (N, T, outputs)."""

    def __init__(self, inputs: int, outputs: int, grid: tuple[int, int]):
        super().__init__()
        self.grid, self.conv = grid, nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        maps = tokens.transpose(1, 2).unflatten(2, self.grid)  # (N, D, rows, columns)
        return self.conv(maps).flatten(2).transpose(1, 2)


class _Weighted:
    uses_features = False

    def weight_at(self, step: int) -> float:
        return 0.0 if self.until and step >= self.until else self.weight


@dataclass(frozen=True)
class LayerSync(_Weighted):
    """Pulls tokens after one block toward those after a deeper one (Haghighi et al. 2025, arXiv 2510.12581).

    The negative cosine of each token, without a gradient to the deeper block. No parameters.
    """

    block: int = 0  # 8 of 28 in the paper
    target: int = 0  # 16 of 28
    weight: float = 0.2
    until: int = 0

    def taps(self, model: DiT, width: int = 0) -> dict[str, Tap]:
        block, target = at_depth(self.block, model, 8), at_depth(self.target, model, 16)
        if target <= block:
            raise ValueError(f"training.align.target={target} must be deeper than training.align.block={block}")
        return {"student": Tap(block), "target": Tap(target)}

    def loss(self, tapped: Mapping[str, Tapped], x_0: Tensor, patch_size: int, features=None) -> Tensor:
        (tokens, kept), (target, kept_by_target) = tapped["student"], tapped["target"]
        if tokens.shape[1] > target.shape[1]:  # only the target is on the route
            tokens = chosen(tokens, kept_by_target)
        elif tokens.shape[1] < target.shape[1]:
            target = chosen(target, kept)
        return negative_cosine(tokens, target.detach())


@dataclass(frozen=True)
class SRA2(_Weighted):
    """Predicts each patch of the clean latent from its token (Wang et al. 2026, arXiv 2601.17830).

    An MLP of 5 linears, and the smooth L1 loss with `beta`. The MLP is twice as wide as a token, which adds the 4% of
    FLOPs that the paper states. The weight is ours.
    """

    block: int = 0  # 8 of 28 in the paper; 2 of 12
    weight: float = 0.5
    beta: float = 0.05
    until: int = 0

    def taps(self, model: DiT, width: int = 0) -> dict[str, Tap]:
        block = at_depth(self.block, model, 8 if len(model.blocks) > 12 else 5)
        width = 2 * model.hidden_size
        return {"student": Tap(block, mlp([model.hidden_size, *[width] * 4, model.in_channels * model.patch_size**2]))}

    def loss(self, tapped: Mapping[str, Tapped], x_0: Tensor, patch_size: int, features=None) -> Tensor:
        tokens, kept = tapped["student"]
        target = chosen(patches_of(x_0, patch_size), kept)
        return F.smooth_l1_loss(tokens.float(), target.float(), reduction="none", beta=self.beta).mean((1, 2))


@dataclass(frozen=True)
class REPA(_Weighted):
    """Pulls tokens toward an encoder's features of the clean image (Yu et al. 2024, arXiv 2410.06940).

    The negative cosine of each patch, after an MLP of 3 linears; features of another grid are resampled to the tokens'.
    iREPA (Singh et al. 2025, arXiv 2512.10794) has `projector=conv`, a 3 x 3 convolution on the grid, and
    `spatial_norm`: each channel of the features becomes (x - gamma mean(x)) / std(x), over the patches of an image.
    HASTE (Wang et al. 2025, arXiv 2505.16792) ends the alignment at a step, `until`.
    """

    block: int = 0  # 8 in the paper, 4 of 12
    weight: float = 0.5
    projector: Literal["mlp", "conv"] = "mlp"
    width: int = 2048  # of the MLP
    spatial_norm: bool = False
    gamma: float = 0.6
    until: int = 0
    uses_features = True

    def taps(self, model: DiT, width: int = 0) -> dict[str, Tap]:
        check(self.projector, ("mlp", "conv"), "training.align.projector")
        if self.width < 1:
            raise ValueError(f"training.align.width={self.width} must be positive; 2048 in the paper")
        block = at_depth(self.block or min(8, max(1, round(len(model.blocks) / 3))), model, 8)
        if self.projector == "conv":
            return {"student": Tap(block, GridConv(model.hidden_size, width, model.grid))}
        return {"student": Tap(block, mlp([model.hidden_size, *[self.width] * 2, width]))}

    def loss(self, tapped: Mapping[str, Tapped], x_0: Tensor, patch_size: int, features=None) -> Tensor:
        tokens, kept = tapped["student"]
        grid = x_0.shape[2] // patch_size, x_0.shape[3] // patch_size
        maps = resample(features.float().movedim(-1, 1), grid)  # (N, D, rows, columns)
        target = maps.flatten(2).transpose(1, 2)  # (N, T, D)
        if self.spatial_norm:
            target = spatially_normalized(target, self.gamma)
        return negative_cosine(tokens, chosen(target, kept))


def spatially_normalized(features: Tensor, gamma: float) -> Tensor:
    """(x - gamma mean(x)) / std(x) of each channel of x (N, T, D), over T."""
    std, mean = torch.std_mean(features, dim=1, correction=0, keepdim=True)
    return (features - gamma * mean) / (std + 1e-6)


ALIGNMENTS: dict[str, type] = {"layersync": LayerSync, "sra2": SRA2, "repa": REPA}


def attach(
    choices: Sequence[Choice], model: DiT, width: int = 0, routing: Routing | None = None
) -> dict[str, Alignment]:
    """The alignments of training.align by their names in the log, after putting their taps into the network.

    `width`: D of the features, where one uses them. ValueError for options that do not fit the network or the route.
    """
    found: dict[str, Alignment] = {}
    for choice in choices:
        alignment = build(ALIGNMENTS, choice, "training.align")
        if not (0 < alignment.weight < math.inf and alignment.until >= 0):
            raise ValueError(f"training.align.weight={alignment.weight} and until={alignment.until} must be positive")
        count = sum(name.partition("-")[0] == choice.name for name in found) + 1
        name = choice.name if count == 1 else f"{choice.name}-{count}"
        for part, tap in alignment.taps(model, width).items():
            if isinstance(tap.projector, GridConv) and routing and tap.block in routing.blocks(model)[:-1]:
                first, *_, last = routing.blocks(model)
                raise ValueError(
                    f"training.align.projector=conv reads all tokens after block {tap.block}, but training.route="
                    f"{routing.share} lets some skip blocks {first} to {last}; use projector=mlp, or another block"
                )
            model.taps[f"{name}:{part}"] = tap.to(next(model.parameters()).device)
        found[name] = alignment
    return found


def features_for(config: Config) -> FeatureManifest | None:
    """The features that training.align and model.class_token use; None without use, ValueError if they are missing."""
    names, data = [choice.name for choice in config.training.align], config.data
    used = any(lookup(ALIGNMENTS, name, "training.align.name").uses_features for name in names)
    return token_features(config) or (open_features(data.shards, data.features, data.remote_cache) if used else None)


def token_features(config: Config, shards: str = "", like: dict | None = None) -> FeatureManifest | None:
    """The features of model.class_token, of data.shards or of other `shards`; None without a class token.

    ValueError where they are missing, or not those of the encoder with the facts `like`.
    """
    if not (width := config.model.class_token):
        return None
    data = config.data
    features = open_features(shards or data.shards, "" if shards else data.features, data.remote_cache)
    if width != features.dim:
        raise ValueError(f"model.class_token={width}, but the features in {features.folder} have {features.dim} "
                         f"values; use {features.dim}")  # fmt: skip
    own = features.facts()
    if like and (other := next((key for key in ("encoder", "weights") if own[key] != like[key]), None)):
        raise ValueError(f"the features in {features.folder} have {other}={own[other]}, but the run's {like[other]}; "
                         "extract them with the same encoder")  # fmt: skip
    return features


def alignment_losses(
    alignments: Mapping[str, Alignment], model: DiT, x_0: Tensor, features: Tensor | None = None
) -> dict[str, Tensor]:
    """The loss of each alignment (N,), from what the taps read in the last forward pass, which is forgotten."""
    tapped, model.tapped = model.tapped, {}
    losses = {}
    for name, alignment in alignments.items():
        own = {part: read for (owner, _, part), read in ((key.partition(":"), read) for key, read in tapped.items())
               if owner == name}  # fmt: skip
        losses[name] = alignment.loss(own, x_0, model.patch_size, features)
    return losses
