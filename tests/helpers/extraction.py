"""Extractions in threads in place of processes, and their results."""

import threading
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastdit.data import extract
from fastdit.data.latents import LatentCodec
from fastdit.data.manifest import Manifest
from fastdit.distributed import Ranks


def run(base: Path, out: Path, **options) -> Manifest:
    options = {"image_size": 32, "batch_size": 8, "shard_size": 20, "workers": 2, **options}
    return extract.extract_features(**{"images": base / "images", "vae": base / "vae", "out": out, **options})


def files_of(folder: Path) -> dict[str, bytes]:
    """The contents of a folder by file name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """Threads in place of processes."""

    meeting: threading.Barrier

    def barrier(self) -> None:
        self.meeting.wait()

    def agree(self, facts) -> None:
        pass


def thread_ranks(count: int, made: Path, monkeypatch) -> list[Ranks]:
    codec = LatentCodec.load(made / "vae")  # once: diffusers patches torch.nn while it loads, so threads must not
    monkeypatch.setattr(LatentCodec, "load", lambda *_: codec)
    meeting = threading.Barrier(count)
    return [ThreadRanks(rank, rank, count, torch.device("cpu"), meeting) for rank in range(count)]


@dataclass(frozen=True)
class TinyEncoder:
    """Six values per patch, from its mean color; the mirror image's features are those of the image, mirrored."""

    name: str = "tiny"
    weights: str = "5" * 64
    dim: int = 6
    class_token: bool = True
    grid: tuple[int, int] = (0, 0)

    def at(self, grid: tuple[int, int], precision: str) -> "TinyEncoder":
        return replace(self, grid=grid)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        maps = torch.nn.functional.adaptive_avg_pool2d(pixels, self.grid)
        tokens = torch.cat([maps, 3 * maps**2 - 1], 1).flatten(2).transpose(1, 2)
        return torch.cat([tokens, tokens.mean(1, keepdim=True)], 1)
