"""Who runs in bench/step.py: sizes, the same weights and batches for all, and one interface to every stack.

A contestant has `step(i)` (one timed training step on host batch i, returns its loss on the device) and
`gate()` (the first steps as gate.py says, what they came to). New ones are lines in CONTESTANTS; a toggle of fastdit is
a line in ABLATION.
"""

import argparse
import dataclasses
import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from gate import RATES, Verdict, check_drawn, gate_inputs
from reference import Inputs, PlainDiT, ReferenceStep
from torch import Tensor, nn

from fastdit.config import Config, load_config, shipped_config
from fastdit.distributed import Ranks
from fastdit.training.ema import EMA
from fastdit.training.graph import GraphedStep
from fastdit.training.loop import build_engine, build_objective, network, set_up
from fastdit.training.step import TrainStep

SCALE, LR, SEED = 0.18215, 1e-4, 0
EMA_DECAY = 0.99  # so far from 1 that the gate sees fp32 averages move within its few steps
CLASS_DROPOUT = 0.1
HOST_BATCHES = 4  # distinct ones, taken in turn


@dataclass(frozen=True)
class Size:
    """A network and its batch per device; `micro` is what the fp32 oracle holds at once."""

    depth: int
    hidden: int
    heads: int
    latent: int  # cells a side
    batch: int
    patch: int = 2
    channels: int = 4
    classes: int = 1000
    micro: int = 16

    def overrides(self) -> list[str]:
        return [f"model.variant=DiT-{self.depth}x{self.hidden}x{self.heads}/{self.patch}",
                f"data.image_size={8 * self.latent}", f"data.num_classes={self.classes}",
                f"training.global_batch={self.batch}"]  # fmt: skip


SIZES = {
    "tiny": Size(2, 64, 4, latent=8, batch=4, classes=10),
    "small": Size(6, 384, 6, latent=16, batch=16),
    "S/2": Size(12, 384, 6, latent=32, batch=256),
    "B/2": Size(12, 768, 12, latent=32, batch=256),
    "L/2": Size(24, 1024, 16, latent=32, batch=256),
    "XL/2": Size(28, 1152, 16, latent=32, batch=256),
    "XL/2-512": Size(28, 1152, 16, latent=64, batch=32, micro=4),
}

CONTESTANTS = {  # name: what the table says; in the order of their turns, should time run out
    "fastdit": "fastdit",
    "strong": "strong baseline: torch.compile, bf16, SDPA, fused AdamW, foreach EMA",
    "fastdit-all-on": "fastdit, all on: bf16 residual stream, on a GPU the step as a CUDA graph",
    "official": "official design: eager, TF32 on a GPU, EMA in a loop",
    "fast-dit": "fast-DiT's recipe: checkpointing, fp16 AMP, loss read each step",
}
ALL_ON = ["training.residual=bf16", "training.cuda_graph=true"]  # a CPU has no graph

ABLATION = {  # fastdit with one thing changed: overrides of the configuration, or an environment variable
    "bf16 residual stream": ["training.residual=bf16"],
    "CUDA graph": ["training.cuda_graph=true"],
    "no Triton kernels": ["FASTDIT_KERNELS=eager"],
    "no compile": ["training.compile=false"],
    "whole compile": ["training.compile=whole"],
    "joint adaLN": ["training.joint_adaln=true"],
    "activation checkpointing": ["training.activation_checkpointing=activation"],
    "selective checkpointing": ["training.activation_checkpointing=selective"],
    "full checkpointing": ["training.activation_checkpointing=full"],
    "attention sdpa-flash": ["model.attention=sdpa-flash"],
    "attention sdpa-cudnn": ["model.attention=sdpa-cudnn"],
    "attention eager": ["model.attention=eager"],
    "attention triton": ["model.attention=triton"],
    "FP8 linears": ["training.fp8=true"],
    "fp32": ["training.precision=fp32"],
}
ENGINES = {  # the same step, in a group of one process: what an engine costs before anything is communicated
    "DDP": ["DDP=1"],
    **{f"ZeRO-{stage}": ["training.engine=deepspeed", f"training.zero_stage={stage}"] for stage in (1, 2)},
    "ZeRO-3, no compile": ["training.engine=deepspeed", "training.zero_stage=3", "training.compile=false"],
    "no compile": ["training.compile=false"],
}
GPU_ONLY = {"no Triton kernels", "CUDA graph", "attention triton", "attention sdpa-flash", "attention sdpa-cudnn",
            "FP8 linears"}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One contestant as a process is told to build it."""

    name: str  # in tables: a key of CONTESTANTS, or of ABLATION
    stack: str  # official | fast-dit | strong | oracle | fastdit
    size: str
    batch: int
    device: str = "cpu"
    overrides: tuple[str, ...] = ()
    repo: str = ""  # a checkout whose models.py holds the network of a reference


def config_of(case: Case) -> Config:
    """The shipped DiT-XL/2 configuration, resized, with the case's overrides."""
    size = dataclasses.replace(SIZES[case.size], batch=case.batch)
    fixed = [*size.overrides(), f"training.lr={LR}", f"training.ema_decay={EMA_DECAY}"]
    return load_config(shipped_config("dit_xl_2"), [*fixed, *(o for o in case.overrides if not is_variable(o))])


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    size = SIZES[arguments.size]
    common = dict(size=arguments.size, batch=arguments.batch or size.batch, device=arguments.device)
    own = tuple(arguments.override)
    repos = {stack_of_repo(path): str(path.resolve()) for path in arguments.reference_repo}
    on_gpu = arguments.device.startswith("cuda")
    all_on = [override for override in ALL_ON if on_gpu or override != "training.cuda_graph=true"]
    changes = {"fastdit": own, "fastdit-all-on": (*all_on, *own)}
    cases = [
        Case(name, "fastdit" if name in changes else name, **common, overrides=changes.get(name, ()),
             repo=repos.get(name, ""))
        for name in arguments.contestants
    ]  # fmt: skip
    changed = ABLATION if arguments.ablation else ENGINES if arguments.engines else {}
    if changed:
        cases = [Case("fastdit", "fastdit", **common, overrides=own)]
        without = ["training.engine=deepspeed"] if importlib.util.find_spec("deepspeed") is None else []
        missing = [name for name, changes in changed.items() if set(without) & set(changes)]
        if missing:
            print(f"{', '.join(missing)}: left out, deepspeed is not installed", file=sys.stderr)
        for name, changes in changed.items():
            if name in missing or (name in GPU_ONLY and not on_gpu):
                continue
            cases.append(Case(name, "fastdit", **common, overrides=(*own, *changes)))
    return cases


def is_variable(override: str) -> bool:
    """Whether this is an environment variable: FASTDIT_KERNELS=eager, where a key of the configuration has sections."""
    return override.partition("=")[0].isupper()


def latent_shape(size: Size) -> tuple[int, int, int]:
    return size.channels, size.latent, size.latent


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and tensors that training moves, by official name and in its order."""
    named = ((name.removeprefix("_orig_mod."), p) for name, p in model.named_parameters() if p.requires_grad)
    return sorted(named, key=lambda pair: pair[0])


def start_weights(shapes: dict[str, torch.Size], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Where each trained tensor starts: so that no part of the network is silent, as gates and head are at 0."""
    for seed, (name, shape) in enumerate(shapes.items(), SEED):
        generator = torch.Generator(device).manual_seed(seed)
        std = shape[1:].numel() ** -0.5 if len(shape) > 1 else 0.02
        yield name, torch.empty(shape, device=device).normal_(0, std, generator=generator)


@torch.no_grad()
def fill(model: nn.Module) -> dict[str, torch.Size]:
    """Put every trained tensor where it starts; their shapes by name."""
    parameters = dict(trained(model))
    shapes = {name: p.shape for name, p in parameters.items()}
    for name, start in start_weights(shapes, next(iter(parameters.values())).device):
        parameters[name].copy_(start)
    return shapes


@torch.no_grad()
def moved(shapes: dict[str, torch.Size], device: torch.device, *states: dict[str, Tensor]) -> Tensor:
    """How far each tensor of the states (weights, averages) went from the start, by name."""
    starts = start_weights(shapes, device)
    ways = [torch.linalg.vector_norm(state[name].to(device) - start) for name, start in starts for state in states]
    return torch.stack(ways).cpu()


def host_batches(size: Size, batch: int, pin: bool) -> list[tuple[Tensor, Tensor]]:
    """Moments (N, 2C, h, w) and labels (N,) as the loader hands them over; half a batch has the first half's images."""
    batches = []
    for i in range(HOST_BATCHES):
        generator = torch.Generator().manual_seed(SEED + i)
        rows = []
        for _ in range(batch):
            mean = 5 * torch.randn(latent_shape(size), generator=generator)
            std = 0.1 * torch.rand(latent_shape(size), generator=generator)
            rows.append((torch.cat([mean, std]), torch.randint(0, size.classes, (), generator=generator)))
        pair = tuple(map(torch.stack, zip(*rows, strict=True)))
        batches.append(tuple(value.pin_memory() for value in pair) if pin else pair)
    return batches


def inputs_of_gate(size: Size, batches: list[tuple[Tensor, Tensor]], device: torch.device) -> list[Inputs]:
    return gate_inputs(
        batches, device, seed=SEED, scale=SCALE, class_dropout=CLASS_DROPOUT, null_label=size.classes
    )  # fmt: skip


class Reference:
    """One of reference.py's recipes; "oracle" is the plain network in fp32, a few images at a time."""

    def __init__(self, case: Case):
        self.size, device = SIZES[case.size], torch.device(case.device)
        self.batches = host_batches(self.size, case.batch, device.type == "cuda")
        with device:
            model = network_of_repo(case.repo, self.size) if case.repo else plain_network(self.size)
        self.model = model.to(device).train()
        self.shapes = fill(self.model)
        self.work = ReferenceStep(
            case.stack, self.model, device, lr=LR, ema_decay=EMA_DECAY, scale=SCALE, null_label=self.size.classes,
            class_dropout=CLASS_DROPOUT, micro_batch=self.size.micro if case.stack == "oracle" else 0,
            drops_labels=bool(case.repo),
        )  # fmt: skip

    def step(self, i: int) -> Tensor:
        return self.work(*self.batches[i % HOST_BATCHES])

    def gate(self) -> Verdict:
        work, embedder = self.work, self.model.y_embedder
        if work.drops_labels:  # the inputs' labels are dropped already
            embedder.dropout_prob, dropout = 0, embedder.dropout_prob
        losses, first_done = [], 0.0
        for inputs, rate in zip(inputs_of_gate(self.size, self.batches, work.device), RATES, strict=True):
            work.set_lr(rate * LR)
            while True:
                scale = work.scaler.get_scale()
                per_sample = work.learn(inputs).cpu()
                first_done = first_done or time.perf_counter()
                if work.scaler.get_scale() >= scale:
                    break  # else fp16 overflowed and the step was left out, as it should be
            losses.append(per_sample)
        if work.drops_labels:
            embedder.dropout_prob = dropout
        weights, averages = dict(trained(self.model)), dict(zip(map(id, work.parameters), work.ema, strict=True))
        averages = {name: averages[id(p)] for name, p in weights.items()}
        return Verdict(losses, moved(self.shapes, work.device, weights, averages), work.precision, first_done)


def plain_network(size: Size) -> nn.Module:
    return PlainDiT(size.latent, size.patch, size.channels, size.hidden, size.depth, size.heads, size.classes)


def network_of_repo(path: str, size: Size) -> nn.Module:
    """The DiT of a checkout's models.py, with the released defaults for all that `size` does not say."""
    return models_of_repo(Path(path)).DiT(
        input_size=size.latent, patch_size=size.patch, in_channels=size.channels, hidden_size=size.hidden,
        depth=size.depth, num_heads=size.heads, num_classes=size.classes,
    )  # fmt: skip


def models_of_repo(path: Path):
    """The module models.py of a checkout of DiT or fast-DiT; ValueError where there is none, or it lacks a package."""
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
    """The recipe that a checkout stands for: fast-DiT's network checkpoints its blocks itself."""
    models_of_repo(path)
    return "fast-dit" if "checkpoint" in (path / "models.py").read_text() else "official"


class Fastdit:
    """fastdit's own stack as training/loop.py builds it, from a Config."""

    def __init__(self, case: Case):
        os.environ.update(o.split("=", 1) for o in case.overrides if is_variable(o))
        config, size, device = config_of(case), SIZES[case.size], torch.device(case.device)
        settings = config.training
        torch.set_float32_matmul_precision("high")
        self.precision = settings.precision if settings.precision != "fp32" or device.type == "cpu" else "tf32"
        self.batches = host_batches(size, case.batch, device.type == "cuda")
        self.objective = Recorder(build_objective(config, device))
        ranks = Ranks(0, 0, 1, device)
        with device:  # seconds less than on the CPU
            model = network(config, latent_shape(size), self.objective, device)
        self.model = model.to(device).train()
        self.shapes = fill(self.model)
        if settings.activation_checkpointing == "auto":
            raise ValueError("training.activation_checkpointing=auto means another policy on each GPU; name one")
        if settings.fp8:
            self.precision = "fp8"
        set_up(self.model, settings, settings.activation_checkpointing)
        self.engine = engine = build_engine(self.model, settings, ranks, case.batch, 1)
        if os.environ.get("DDP") == "1":  # even around this one process
            backend = "nccl" if device.type == "cuda" else "gloo"
            torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
            engine.forward = nn.parallel.DistributedDataParallel(
                self.model, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self.ema = EMA(engine.master_parameters(), settings.ema_decay, settings.ema_warmup)
        self.work = TrainStep(
            engine, self.ema, self.objective, ranks, latent_shape=latent_shape(size), scale=SCALE, shift=0.0,
            class_dropout=config.model.class_dropout, null_label=self.model.null_label, micro_batch=case.batch,
            accumulation=1, seed=SEED,
        )  # fmt: skip
        if settings.cuda_graph:
            self.work = GraphedStep(self.work)
        self.size, self.device, self.lr, self.steps = size, device, settings.lr, 0

    def step(self, i: int) -> Tensor:
        moments, y = (value.to(self.device, non_blocking=True) for value in self.batches[i % HOST_BATCHES])
        self.steps += 1
        return self.work(moments, y, self.steps - 1, self.lr)[0]

    def gate(self) -> Verdict:
        """Draws its own inputs, which must be everybody's."""
        losses, first_done = [], 0.0
        for i, wanted in enumerate(inputs_of_gate(self.size, self.batches, self.device)):
            moments, y = (value.to(self.device) for value in self.batches[i % HOST_BATCHES])
            mean_loss, _ = self.work(moments, y, i, RATES[i] * self.lr)
            drawn, per_sample = self.objective.seen
            losses.append(per_sample.cpu())
            first_done = first_done or time.perf_counter()
            check_drawn(i, drawn, wanted)
            if not torch.allclose(per_sample.mean(), mean_loss, rtol=1e-4):
                raise ValueError(f"the step returned a loss of {mean_loss}, its objective {per_sample.mean()}")
        states = (self.engine.full_state(tensors) for tensors in (self.engine.master_parameters(), self.ema.average))
        return Verdict(losses, moved(self.shapes, self.device, *states), self.precision, first_done)


class Recorder:
    """An objective that remembers what its loss was last asked and what it answered, in the step as it is timed."""

    def __init__(self, objective):
        self.objective, self.seen = objective, None

    def __getattr__(self, name: str):
        return getattr(self.objective, name)

    def loss(self, model, x_0: Tensor, y: Tensor, t: Tensor, noise: Tensor):
        result = self.objective.loss(model, x_0, y, t, noise)
        index = self.objective.model_time(t).round().long()
        self.seen = Inputs(x_0, y, index, noise), result.per_sample.detach()
        return result


def build_case(case: Case) -> Reference | Fastdit:
    return Fastdit(case) if case.stack == "fastdit" else Reference(case)
