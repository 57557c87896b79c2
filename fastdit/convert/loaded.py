"""A checkpoint in memory, whatever its format, and the comparison of one that was written with its source."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdit.build import build_objective
from fastdit.config import leaves, to_tree
from fastdit.convert.official import Architecture, architecture
from fastdit.data.latents import LatentSpec
from fastdit.diffusion.objectives import Objective
from fastdit.errors import counted
from fastdit.models.class_token import channels_of
from fastdit.models.dit import DiT, variant_shape
from fastdit.schema import Config
from fastdit.training.state import network_from_state

# relative to the largest output. Rounding in fp32 was at most 3.5e-6 in 40 networks from 2 x 48 to DiT-XL/2, with and
# without the folded time layer; another number of heads, frequency or activation makes 1e-3 or more.
CLOSE = 3e-5


@dataclass(frozen=True)
class Difference:
    """Largest absolute differences between the outputs of diffusers and fastdit on random input."""

    exact: float  # with the frequencies of DiT (DDPM only)
    as_loaded: float
    largest: float  # absolute output
    outputs: Tensor  # of the exact transformer, with the sign of fastdit


@dataclass(frozen=True)
class Loaded:
    """A checkpoint with the official names; `report`: its comparison with the network of another implementation."""

    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    config: Config
    latents: LatentSpec
    step: int = 0
    class_names: tuple[str, ...] = ()
    report: Difference | None = None
    empty_classes: tuple[int, ...] = ()
    features: dict | None = None  # FeatureManifest.facts() of a model with a class token

    @property
    def objective(self) -> Objective:
        return build_objective(self.config)

    def network(self, weights: str = "ema") -> DiT:
        """The network with these weights, in eval mode; ValueError if they do not fit the config."""
        config = replace(self.config, model=replace(self.config.model, attention="sdpa"))  # runs everywhere
        state = getattr(self, weights)
        return network_from_state(config, self.latents, self.objective, state, where="the source")

    def random_input(self) -> tuple[Tensor, Tensor, Tensor]:
        """Deterministic x (3, C, h, w), times from clean to noise (3,), and labels: first, last and null label."""
        channels, *sides = self.latents.shape
        channels += channels_of(self.config.model.class_token, sides)
        x = torch.randn(3, channels, *sides, generator=torch.Generator().manual_seed(0))
        classes = self.config.data.num_classes
        null = classes if self.config.model.class_dropout > 0 else 0
        return x, torch.tensor([0.001, 0.5, 1.0], dtype=torch.float64), torch.tensor([0, max(classes - 1, 0), null])

    @torch.no_grad()
    def forward(self) -> dict[str, Tensor]:
        """`random_input` as x, t, y, and the output of the EMA network as out, or that of diffusers in `report`."""
        x, times, y = self.random_input()
        t = self.objective.model_time(times)
        return {"x": x, "t": t, "y": y, "out": self.report.outputs if self.report else self.network()(x, t, y)}

    def architecture(self) -> Architecture:
        """The sizes of the network; ValueError for latents that are not square, which no other format supports."""
        _, height, width = self.latents.shape
        if height != width:
            raise ValueError(f"latents of {height} x {width} are not square; keep the fastdit checkpoint")
        heads, num_classes = variant_shape(self.config.model.variant)["num_heads"], self.config.data.num_classes
        return architecture(self.ema, "the checkpoint", heads=heads, num_classes=num_classes)

    def check(self) -> None:
        """ValueError unless both sets of weights fit the network and are finite."""
        for name in ("ema",) if self.model is self.ema else ("model", "ema"):
            self.network(name)
            bad = [key for key, tensor in getattr(self, name).items() if not tensor.isfinite().all()]
            if bad:
                raise ValueError(f"{bad[0]} of {name} has values that are not finite "
                                 f"({counted(len(bad), 'such tensor')}); use another checkpoint")  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """What other formats store beside the config."""
        return {"latents": self.latents.to_json(), "step": self.step, "class_names": list(self.class_names),
                "empty_classes": list(self.empty_classes)}  # fmt: skip


def from_facts(facts: Any, where: str) -> dict[str, Any]:
    """Arguments for Loaded from `Loaded.facts`; ValueError if they are damaged."""
    try:
        latents = LatentSpec.from_json(facts["latents"])
        names = tuple(map(str, facts["class_names"]))
        empty = tuple(map(int, facts["empty_classes"]))
        return {"latents": latents, "step": int(facts["step"]), "class_names": names, "empty_classes": empty}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{where} is damaged ({type(error).__name__}: {error}); export it again") from error


def differences(source: Loaded, written: Loaded, weights: tuple[str, str], folded: str = "") -> Iterator[str]:
    """What differs between a checkpoint and what was read back after writing it, in words.

    `weights`: the sets of the source that the written `model` and `ema` must equal, bit for bit. `folded`: a weight of
    which this does not hold, because it was converted to another one that gives the same time embedding.
    """
    ours, theirs = (dict(leaves(to_tree(each.config) | each.facts())) for each in (source, written))
    places = {"run_dir"} | ({"data.vae"} if Path(written.config.data.vae).is_dir() else set())  # a copy of it
    for key in (ours.keys() | theirs.keys()) - places:
        if ours.get(key) != theirs.get(key):
            yield f"{key}={theirs.get(key)!r} instead of {ours.get(key)!r}"
    for name, own in zip(("model", "ema"), weights, strict=True):
        given, got = getattr(source, own), getattr(written, name)
        yield from (f"{key} of {name} is {'missing' if key in given else 'new'}" for key in given.keys() ^ got.keys())
        for key in given.keys() & got.keys():
            if key != folded and not torch.equal(given[key], got[key]):
                yield f"other values of {key} in {name}"
    if folded:
        t = torch.linspace(0, 1, 1001)
        a, b = source.network(weights[1]).t_embedder(t), written.network().t_embedder(t)  # (1001, D)
        gap, largest = (a - b).abs().max().item(), a.abs().max().item()
        if not gap <= CLOSE * largest:
            yield f"a time embedding that is off by {gap:.1e} of {largest:.2g}"
