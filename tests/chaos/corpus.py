"""The hostile files, and the commands that read them.

A case is a copy of something good in which one file is hostile, and the commands that are run on it in turn.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from chaos import contents
from fastdit.convert import convert
from fastdit.files import sealed
from fastdit.sampling import sample
from fastdit.training import checkpoint
from helpers.runs import train_here

STEP = "checkpoints/step-0000002"
WEIGHTS = [f"{name}.safetensors" for name in ("model", "ema", "exp_avg", "exp_avg_sq", "progress", "power-0.050")]
TEXTS = (".json", ".jsonl", ".yaml", ".log", "lock", "stop")


@dataclass
class Case:
    """`make(folder)` puts the hostile files below folder/in or folder/out, and returns the commands.

    `refused`: see watched.watch. `whole`: run all commands, not some of them.
    """

    kind: str
    name: str
    make: Callable[[Path], list[list[str]]]
    refused: bool | None = None
    whole: bool = False


@dataclass(frozen=True)
class Good:
    """What the cases copy: a run of two steps with post-hoc averages, and the same weights in each other format."""

    world: Path
    root: Path

    @property
    def config(self) -> list[str]:
        small = ["model.variant=DiT-1x32x2/4", "training.checkpoint_every=2", "training.ema_stds=[0.05,0.1]"]
        return ["--config", f"{self.world}/config.yaml", *small, "training.steps=2", "sampling.steps=2"]

    def read_run(self, run: Path, out: Path) -> list[list[str]]:
        """The commands that read a run, the last of which writes into it."""
        few = ["--num-images", "2", "--batch-size", "2", "--probes", "1", "--steps", "2"]
        return [
            ["fastdit/cli.py", "verify", f"{run}"],
            ["sample_ddp.py", "--checkpoint", f"{run}", "--out", f"{out}/samples", "--num-samples", "2"],
            ["fastdit/cli.py", "convert", f"{run}", "--to", "official", "--out", f"{out}/official.pt"],
            ["fastdit/cli.py", "ema", f"{run}", "--std", "0.07", "--out", f"{out}/ema"],
            ["fastdit/cli.py", "likelihood", "--checkpoint", f"{run}", "--shards", f"{self.world}/latents", *few],
            ["train.py", *self.config, f"run_dir={out}/tuned", f"training.init_from={run}"],
            ["train.py", *self.config, f"run_dir={run}", "--resume"],
        ]

    def resume(self, run: Path, out: Path) -> list[list[str]]:
        others = [command for command in self.read_run(run, out) if command[1] == "ema" or command[-1] == "--resume"]
        return [["fastdit/cli.py", "report", f"{run}", "--out", f"{out}/report.html"], *others]

    def read_converted(self, folder: Path, out: Path) -> list[list[str]]:
        return [
            ["fastdit/cli.py", "verify", f"{folder}"],
            ["sample_ddp.py", "--checkpoint", f"{folder}", "--out", f"{out}/samples", "--num-samples", "2"],
        ]

    def read_foreign(self, source: Path, out: Path) -> list[list[str]]:
        objective = [] if source.is_dir() else ["objective=flow", f"data.vae={self.world}/vae", "--heads", "2"]
        return [
            ["fastdit/cli.py", "convert", f"{source}", "--to", "fastdit", "--out", f"{out}/converted", *objective],
            ["train.py", *self.config, f"run_dir={out}/tuned", f"training.init_from={source}"],
        ]

    def read_latents(self, folder: Path, out: Path) -> list[list[str]]:
        few = ["--num-images", "2", "--batch-size", "2", "--probes", "1", "--steps", "2"]
        return [
            ["fastdit/cli.py", "verify", f"{folder}"],
            ["train.py", *self.config, f"run_dir={out}/run", f"data.shards={folder}"],
            ["fastdit/cli.py", "likelihood", "--checkpoint", f"{self.root}/run", "--shards", f"{folder}", *few],
        ]

    def read_vae(self, folder: Path, out: Path) -> list[list[str]]:
        size = ["--image-size", "32", "--workers", "1"]
        return [
            ["extract_features.py", "--images", f"{self.root}/images", "--out", f"{out}/latents", "--vae", f"{folder}"]
            + size,
            ["sample_ddp.py", "--checkpoint", f"{self.root}/run", "--out", f"{out}/samples", "--num-samples", "2"]
            + [f"data.vae={folder}"],
            ["train.py", *self.config, f"run_dir={out}/run", f"data.vae={folder}"],
        ]

    def read_config(self, path: Path, out: Path) -> list[list[str]]:
        return [
            ["train.py", "--config", f"{path}", f"run_dir={out}/run", "training.steps=1"],
            ["fastdit/cli.py", "plan", "--config", f"{path}"],
            ["fastdit/cli.py", "convert", f"{self.root}/official.pt", "--to", "fastdit", "--out", f"{out}/converted"]
            + ["--config", f"{path}"],
        ]

    def read_samples(self, folder: Path, out: Path) -> list[list[str]]:
        return [["sample_ddp.py", "--checkpoint", f"{self.root}/run", "--out", f"{folder}", "--num-samples", "2"]
                + ["sampling.steps=2"]]  # fmt: skip


def prepare(world: Path, root: Path) -> Good:
    good = Good(world, root)
    train_here(world, root / "run", *good.config[2:])
    convert(root / "run", "official", root / "official.pt", say=lambda line: None)
    convert(root / "official.pt", "fastdit", root / "converted", say=lambda line: None)
    convert(root / "run", "diffusers", root / "pipe", say=lambda line: None)
    sample(root / "run", root / "samples", 2, overrides=["sampling.steps=2"], device="cpu")
    for path in sorted((world / "images" / "0").iterdir())[:4]:
        (root / "images" / "0").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / "images" / "0")
    return good


# artifact -> its place in `Good`, the method with the commands that read it, and the files that are replaced in turn
MATRIX = {
    "checkpoint": ("run", "read_run", [f"{STEP}/{name}" for name in (*WEIGHTS, "config.yaml", "checkpoint.json")]),
    "run": ("run", "resume", ["config.yaml", "metrics.jsonl", "skipped.jsonl", "environment.jsonl", "quality.json",
            "train.log", "lock", "stop", "tensorboard", "watchdog/rank-00000.json",
            "averages/step-0000002/power-0.050.safetensors", "averages/step-0000002/checkpoint.json"]),
    "converted checkpoint": ("converted", "read_converted", ["golden.npz", "config.yaml", "ema.safetensors"]),
    "official file": ("official.pt", "read_foreign", [""]),
    "diffusers folder": ("pipe", "read_foreign", ["model_index.json", "fastdit.yaml", "fastdit.json",
                         "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors",
                         "transformer/diffusion_pytorch_model.bin", "scheduler/scheduler_config.json",
                         "vae/config.json", "vae/diffusion_pytorch_model.safetensors"]),
    "latents": ("../latents", "read_latents", ["manifest.json", "index.npy", "shard-00000.tar"]),
    "autoencoder": ("../vae", "read_vae", ["config.json", "diffusion_pytorch_model.safetensors",
                    "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors.index.json"]),
    "config": ("../config.yaml", "read_config", [""]),
    "samples": ("samples", "read_samples", ["sampling.json", "images/000000.png"]),
}  # fmt: skip


def cases(good: Good) -> Iterator[Case]:
    for kind, (place, method, files) in MATRIX.items():
        for file in files:
            plain = contents.TEXT if file.endswith(TEXTS) or kind == "config" else contents.BINARY
            for name, content in {**plain, **contents.SPECIAL}.items():
                made = partial(replaced, good, place, method, file, content, name in plain)
                yield Case(kind, f"{name} in {file or kind}", made)


def copied(good: Good, place: str, folder: Path) -> Path:
    """A copy of the artifact in folder/out."""
    source = (good.root / place).resolve()
    copy = folder / "out" / source.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)
    return copy


def replaced(good: Good, place: str, method: str, file: str, content, plain: bool, folder: Path) -> list[list[str]]:
    """A copy with one file replaced, and the digests that cover it made right, and the commands that read it."""
    copy = copied(good, place, folder)
    path = copy / file if file else copy
    if file.endswith((".bin", ".index.json")):  # it is read where there is no other
        path.with_name("diffusion_pytorch_model.safetensors").unlink()
    contents.remove(path)
    path.write_bytes(content(folder / "canary")) if plain else content(path)
    if plain:
        seal(path)
    return getattr(good, method)(copy, folder / "out")


def seal(path: Path) -> None:
    """Make the digests of a changed file right, where its folder has any."""
    folder, name = path.parent, path.name
    if (folder / checkpoint.META).is_file() and name != checkpoint.META:
        checkpoint.write_meta(folder, json.loads((folder / checkpoint.META).read_text()))
    elif (folder / "manifest.json").is_file() and name != "manifest.json":
        stored = json.loads((folder / "manifest.json").read_text())
        data = path.read_bytes()
        if name == "index.npy":
            stored["index_sha256"] = hashlib.sha256(data).hexdigest()
        else:
            stored["shards"][0] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(sealed(stored)))
