"""What `python -m bench.step` can compare: network sizes, contestants, options of fastdit, and its engines.

A new contestant is a line in CONTESTANTS, an option a line in ABLATION, an engine a line in ENGINES, a size a line in
SIZES. The order of the lines is the order in which they run, the most important first.
"""

import argparse
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from fastdit.config import load_config, shipped_config
from fastdit.data.latents import LatentSpec
from fastdit.schema import Config

LR, SCALE = 1e-4, 0.18215  # of the learning rate, and from moments to latents
EMA_DECAY = 0.99  # low enough for the gate to see fp32 averages move within its few steps


@dataclass(frozen=True)
class Size:
    """A network and its batch size per device; the fp32 oracle processes `micro` images at a time."""

    depth: int
    hidden: int
    heads: int
    latent: int  # height and width of a latent
    batch: int
    patch: int = 2
    channels: int = 4
    classes: int = 1000
    micro: int = 16

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.channels, self.latent, self.latent

    @property
    def latents(self) -> LatentSpec:
        return LatentSpec(self.latent_shape, SCALE, shift=0.0, vae="bench", codec="", image_size=8 * self.latent)


SIZES = {
    "tiny": Size(2, 64, 4, latent=8, batch=4, classes=10),
    "small": Size(6, 384, 6, latent=16, batch=16),
    "S/2": Size(12, 384, 6, latent=32, batch=256),
    "B/2": Size(12, 768, 12, latent=32, batch=256),
    "L/2": Size(24, 1024, 16, latent=32, batch=256),
    "XL/2": Size(28, 1152, 16, latent=32, batch=256),
    "XL/2-512": Size(28, 1152, 16, latent=64, batch=32, micro=4),
}

CONTESTANTS = {  # name: description in the table
    "fastdit": "fastdit",
    "fastdit-all-on": "fastdit, all on: bf16 residual stream; on a GPU also the step as a CUDA graph, and joint adaLN",
    "fastdit-fp8": "fastdit, all on, and FP8 linears",
    "strong": "strong baseline: torch.compile, bf16, SDPA, fused AdamW, foreach EMA",
    "fast-dit": "fast-DiT's recipe: checkpointing, fp16 AMP, loss read each step",
    "official": "official design: eager, TF32 on a GPU, EMA in a loop",
    "fastdit-fp8-attention": "fastdit, all on, FP8 linears, and attention that rounds for them",
    "fastdit-cublaslt": "fastdit, all on, GELU in the epilogues of cuBLASLt's products",
    "fastdit-triton": "fastdit, all on, GELU in the epilogues of products in Triton",
}
REFERENCES = ("official", "fast-dit", "strong")
ALL_ON = ["training.residual=bf16", "training.cuda_graph=true", "training.joint_adaln=true"]
GPU_OPTIONS = {"training.cuda_graph=true", "training.joint_adaln=true"}  # joint adaLN is slower on a CPU
FP8 = ["training.fp8=true"]

ABLATION = {  # fastdit with one thing changed: overrides of the configuration, or an environment variable
    "bf16 residual stream": ["training.residual=bf16"],
    "CUDA graph": ["training.cuda_graph=true"],
    "FP8 linears": FP8,
    "attention sdpa-cudnn": ["model.attention=sdpa-cudnn"],
    "attention triton": ["model.attention=triton"],
    "no Triton kernels": ["FASTDIT_KERNELS=eager"],
    "whole compile": ["training.compile=whole"],
    "no compile": ["training.compile=false"],
    "activation checkpointing": ["training.activation_checkpointing=activation"],
    "selective checkpointing": ["training.activation_checkpointing=selective"],
    "full checkpointing": ["training.activation_checkpointing=full"],
    "joint adaLN": ["training.joint_adaln=true"],
    "attention sdpa-flash": ["model.attention=sdpa-flash"],
    "attention eager": ["model.attention=eager"],
    "fp32": ["training.precision=fp32"],
}
ENGINES = {  # the same step in a process group of one: the cost of an engine before it communicates anything
    "DDP": ["DDP=1"],
    **{f"ZeRO-{stage}": ["training.engine=deepspeed", f"training.zero_stage={stage}"] for stage in (1, 2)},
    "ZeRO-3, no compile": ["training.engine=deepspeed", "training.zero_stage=3", "training.compile=false"],
    "no compile": ["training.compile=false"],
}
GPU_ONLY = {"no Triton kernels", "CUDA graph", "attention triton", "attention sdpa-flash", "attention sdpa-cudnn",
            "FP8 linears", "fastdit-fp8", "fastdit-fp8-attention", "fastdit-cublaslt", "fastdit-triton"}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One contestant, as its process is told to build it."""

    name: str  # in tables: a key of CONTESTANTS, ABLATION or ENGINES
    stack: str  # official | fast-dit | strong | oracle | fastdit
    size: str
    batch: int
    device: str = "cpu"
    overrides: tuple[str, ...] = ()
    repo: str = ""  # a checkout whose models.py defines the network of a reference


def config_of(case: Case) -> Config:
    """The shipped DiT-XL/2 configuration at the case's size, with the case's overrides."""
    size = SIZES[case.size]
    fixed = [f"model.variant=DiT-{size.depth}x{size.hidden}x{size.heads}/{size.patch}",
             f"data.image_size={8 * size.latent}", f"data.num_classes={size.classes}",
             f"training.global_batch={case.batch}", f"training.lr={LR}", f"training.ema_decay={EMA_DECAY}"]  # fmt: skip
    return load_config(shipped_config("dit_xl_2"), [*fixed, *(o for o in case.overrides if not is_variable(o))])


def is_variable(override: str) -> bool:
    """Whether this sets an environment variable, like FASTDIT_KERNELS=eager; the configuration's keys are lowercase."""
    return override.partition("=")[0].isupper()


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    """The cases to compare, fastdit first in case time runs out; ValueError for unknown names."""
    on_gpu = arguments.device.startswith("cuda")
    all_on = [override for override in ALL_ON if on_gpu or override not in GPU_OPTIONS]
    changes = dict.fromkeys(CONTESTANTS, []) | {"fastdit-all-on": all_on, "fastdit-fp8": all_on + FP8}
    changes["fastdit-fp8-attention"] = [*all_on, *FP8, "training.fp8_attention=true"]
    changes |= {f"fastdit-{way}": [*all_on, f"EPILOGUE={way}"] for way in ("cublaslt", "triton")}
    if varied := ABLATION if arguments.ablation else ENGINES if arguments.engines else {}:
        changes = {"fastdit": [], **varied}
    chosen = [name for name in arguments.contestants or changes if on_gpu or name not in GPU_ONLY]
    if unknown := set(chosen) - set(changes):
        raise ValueError(f"--contestants {', '.join(sorted(unknown))} is unknown; use some of {', '.join(changes)}")
    if importlib.util.find_spec("deepspeed") is None:
        missing = [name for name in chosen if "training.engine=deepspeed" in changes[name]]
        chosen = [name for name in chosen if name not in missing]
        if missing:
            print(f"{', '.join(missing)}: left out, deepspeed is not installed", file=sys.stderr)
    if varied or "fastdit" in chosen:
        chosen = ["fastdit", *(name for name in chosen if name != "fastdit")]
    common = dict(size=arguments.size, batch=arguments.batch or SIZES[arguments.size].batch, device=arguments.device)
    repos = {stack_of_repo(path): str(path.resolve()) for path in arguments.reference_repo}
    cases = []
    for name in chosen:
        parts = [arguments.override, changes[name]] if varied else [changes[name], arguments.override]  # the last wins
        overrides = () if name in REFERENCES else (*parts[0], *parts[1])
        stack = name if name in REFERENCES else "fastdit"
        cases.append(Case(name, stack, **common, overrides=overrides, repo=repos.get(name, "")))
    return cases


def models_of_repo(path: Path) -> ModuleType:
    """The module models.py of a checkout of DiT or fast-DiT; ValueError if it is absent or cannot be imported."""
    file = path / "models.py"
    if not file.is_file():
        raise ValueError(f"--reference-repo {path} holds no models.py; clone facebookresearch/DiT or fast-DiT there")
    spec = importlib.util.spec_from_file_location("reference_models", file)
    module = sys.modules["reference_models"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ValueError(f"--reference-repo {path}: {error}; install it beside torch") from error
    return module


def stack_of_repo(path: Path) -> str:
    """The recipe that a checkout stands for: fast-DiT's network checkpoints its own blocks."""
    models_of_repo(path)
    return "fast-dit" if "checkpoint" in (path / "models.py").read_text() else "official"
