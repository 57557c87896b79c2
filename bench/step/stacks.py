"""The stacks that `python -m bench.step` runs, from the same weights and batches, behind one interface.

A contestant has `step(i)`, one timed training step from host batch i to updated weights, which returns its loss on the
device, and `gate()`, the first steps as gate.py defines them. Beside fastdit's stack there are recipes for the plain
network (reference.py):

official   as facebookresearch/DiT trains: eager fp32 (TF32 on a GPU), tables in numpy moved at every lookup, EMA in a
           loop over the parameters, the loss read by the host at each step; without its autoencoder in the loop.
fast-dit   as chuanyangjin/fast-DiT: the same, with every block checkpointed and fp16 autocast with loss scaling
           (bf16 on a CPU, which has no fast fp16 products).
strong     what a careful user writes today: whole-model torch.compile, bf16 autocast, SDPA, fused AdamW, foreach EMA,
           tables on the device, nothing read by the host.
oracle     plain fp32, a few images at a time: what the gate compares with.
"""

import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.epilogue.mlp import use_epilogues
from bench.step.cases import EMA_DECAY, LR, SCALE, SIZES, Case, Size, config_of, is_variable, models_of_repo
from bench.step.gate import RATES, Verdict, check_drawn
from bench.step.reference import Inputs, PlainDDPM, PlainDiT
from fastdit.build import build_network, build_objective, prepare_for_training
from fastdit.distributed import Ranks, StepRandom, step_generator
from fastdit.training.ema import EMA
from fastdit.training.engine import build_engine
from fastdit.training.graph import GraphedStep
from fastdit.training.step import TrainStep

SEED, CLASS_DROPOUT = 0, 0.1
HOST_BATCHES = 4  # distinct ones, used in rotation


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The tensors that training moves, sorted by their official names."""
    named = ((name.removeprefix("_orig_mod."), p) for name, p in model.named_parameters() if p.requires_grad)
    return dict(sorted(named, key=lambda pair: pair[0]))


def start_weights(shapes: dict[str, torch.Size], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Initial values of each trained tensor. None is zero, as gates and head are by default: no part is silent."""
    for seed, (name, shape) in enumerate(shapes.items(), SEED):
        generator = torch.Generator(device).manual_seed(seed)
        std = shape[1:].numel() ** -0.5 if len(shape) > 1 else 0.02
        yield name, torch.empty(shape, device=device).normal_(0, std, generator=generator)


@torch.no_grad()
def fill(model: nn.Module) -> dict[str, torch.Size]:
    """Set every trained tensor to its initial value; returns their shapes by name."""
    parameters = trained(model)
    shapes = {name: p.shape for name, p in parameters.items()}
    for name, start in start_weights(shapes, next(iter(parameters.values())).device):
        parameters[name].copy_(start)
    return shapes


@torch.no_grad()
def moved(shapes: dict[str, torch.Size], device: torch.device, *states: dict[str, Tensor]) -> Tensor:
    """Norm of each tensor's displacement from the start, by name, of each state (weights, averages)."""
    starts = start_weights(shapes, device)
    return torch.stack([torch.linalg.vector_norm(s[name].to(device) - start) for name, start in starts for s in states])


def host_batches(size: Size, batch: int, pin: bool) -> list[tuple[Tensor, Tensor]]:
    """Moments (N, 2C, h, w) and labels (N,) as the loader yields them; half a batch is the first half of the images."""
    batches = []
    for i in range(HOST_BATCHES):
        generator = torch.Generator().manual_seed(SEED + i)
        samples = []
        for _ in range(batch):
            mean = 5 * torch.randn(size.latent_shape, generator=generator)
            std = 0.1 * torch.rand(size.latent_shape, generator=generator)
            samples.append((torch.cat([mean, std]), torch.randint(0, size.classes, (), generator=generator)))
        pair = tuple(map(torch.stack, zip(*samples, strict=True)))
        batches.append(tuple(value.pin_memory() for value in pair) if pin else pair)
    return batches


def plain_network(size: Size) -> nn.Module:
    return PlainDiT(size.latent, size.patch, size.channels, size.hidden, size.depth, size.heads, size.classes)


def network_of_repo(path: str, size: Size) -> nn.Module:
    """The DiT of a checkout's models.py, with the released defaults for everything that `size` does not define."""
    return models_of_repo(Path(path)).DiT(
        input_size=size.latent, patch_size=size.patch, in_channels=size.channels, hidden_size=size.hidden,
        depth=size.depth, num_heads=size.heads, num_classes=size.classes,
    )  # fmt: skip


class Contestant:
    """What the stacks share: the size, the device, the host's batches and the gate."""

    def __init__(self, case: Case):
        self.size, self.device = SIZES[case.size], torch.device(case.device)
        self.batches, self.lr = host_batches(self.size, case.batch, self.device.type == "cuda"), LR

    def gate_inputs(self, step: int) -> Inputs:
        """What (seed, step) draws for the host's batch of that step, in plain PyTorch."""
        moments, y = (value.to(self.device) for value in self.batches[step % HOST_BATCHES])
        mean, std = moments.chunk(2, dim=1)
        random = StepRandom(step_generator(SEED, step, self.device), slice(None), len(y))
        x_0 = (mean + std * random.randn(*mean.shape[1:])) * SCALE
        y = torch.where(random.rand() < CLASS_DROPOUT, self.size.classes, y)
        index = (1000 * random.rand().double()).long()
        return Inputs(x_0, y, index, random.randn(*mean.shape[1:]))

    def gate(self) -> Verdict:
        losses, drawn, first_done = [], [], 0.0
        for i, rate in enumerate(RATES):
            inputs = self.gate_inputs(i)
            losses.append(self.gate_step(i, inputs, rate * self.lr).cpu())
            drawn.append(torch.stack([value.double().abs().mean() for value in vars(inputs).values()]).cpu())
            first_done = first_done or time.perf_counter()
        displacements = moved(self.shapes, self.device, *self.states()).cpu()
        return Verdict(torch.stack(losses), displacements, self.precision, torch.stack(drawn), first_done)


class Reference(Contestant):
    """One of the recipes of this module's docstring; `case.repo` replaces the plain network."""

    def __init__(self, case: Case):
        super().__init__(case)
        recipe, device, on_gpu = case.stack, self.device, self.device.type == "cuda"
        with device:
            model = network_of_repo(case.repo, self.size) if case.repo else plain_network(self.size)
        self.model = model = model.to(device).train()
        self.shapes = fill(model)
        self.recipe, self.drops_labels = recipe, bool(case.repo)  # a checkout's network drops its labels itself
        self.dtype = {"fast-dit": torch.float16 if on_gpu else torch.bfloat16, "strong": torch.bfloat16}.get(recipe)
        dtypes = {torch.float16: "fp16", torch.bfloat16: "bf16", None: "fp32"}
        self.precision = "tf32" if recipe == "official" and on_gpu else dtypes[self.dtype]
        torch.set_float32_matmul_precision("highest" if recipe == "oracle" else "high")
        model.checkpointing = recipe == "fast-dit"
        self.waits = recipe in ("official", "fast-dit")  # for transfers, and to read the loss
        self.diffusion = PlainDDPM(tables=None if self.waits else device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.parameters = list(model.parameters())
        self.ema = [p.detach().clone() for p in self.parameters]
        trainable = [p for p in self.parameters if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=LR, weight_decay=0, fused=recipe == "strong" or None)
        self.forward = torch.compile(model, fullgraph=True) if recipe == "strong" else model

    def step(self, i: int) -> Tensor:
        moments, y = (value.to(self.device, non_blocking=not self.waits) for value in self.batches[i % HOST_BATCHES])
        mean, std = moments.chunk(2, dim=1)
        x_0 = (mean + std * torch.randn_like(mean)) * SCALE
        if not self.drops_labels:
            y = torch.where(torch.rand(len(y), device=y.device) < CLASS_DROPOUT, self.size.classes, y)
        index = torch.randint(0, 1000, (len(y),), device=y.device)
        loss = self.learn(Inputs(x_0, y, index, torch.randn_like(x_0))).mean()
        if self.waits:
            loss.item()  # both sum the loss on the host
        return loss

    def learn(self, inputs: Inputs) -> Tensor:
        """Update weights and EMA; returns the losses (N,)."""
        micro = self.size.micro if self.recipe == "oracle" else len(inputs.y)
        losses = []
        for i in range(0, len(inputs.y), micro):
            part = Inputs(*(value[i : i + micro] for value in vars(inputs).values()))
            losses.append(self.diffusion.losses(self.network, part))
            self.scaler.scale(losses[-1].sum() / len(inputs.y)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.average()
        return torch.cat(losses).detach()

    def network(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext():
            return self.forward(x, t, y).float()

    @torch.no_grad()
    def average(self) -> None:
        if self.recipe == "strong":
            torch._foreach_lerp_(self.ema, self.parameters, 1 - EMA_DECAY)
        else:
            for average, parameter in zip(self.ema, self.parameters, strict=True):
                average.mul_(EMA_DECAY).add_(parameter.data, alpha=1 - EMA_DECAY)

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def gate_step(self, i: int, inputs: Inputs, lr: float) -> Tensor:
        self.set_lr(lr)
        if self.drops_labels:  # the inputs' labels are dropped already
            embedder = self.model.y_embedder
            embedder.dropout_prob, dropout = 0, embedder.dropout_prob
        while True:
            scale = self.scaler.get_scale()
            per_sample = self.learn(inputs)
            if self.scaler.get_scale() >= scale:
                break  # else fp16 overflowed and the step was skipped, as it should be
        if self.drops_labels:
            embedder.dropout_prob = dropout
        return per_sample

    def states(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights and averages by name."""
        weights, averages = trained(self.model), dict(zip(map(id, self.parameters), self.ema, strict=True))
        return weights, {name: averages[id(p)] for name, p in weights.items()}


class Fastdit(Contestant):
    """fastdit's own stack as the training loop builds it from a Config."""

    def __init__(self, case: Case):
        super().__init__(case)
        os.environ.update(o.split("=", 1) for o in case.overrides if is_variable(o))
        config, device = config_of(case), self.device
        settings = config.training
        torch.set_float32_matmul_precision("high")
        self.precision = settings.precision if settings.precision != "fp32" or device.type == "cpu" else "tf32"
        if settings.fp8:
            self.precision = "fp8"
        if settings.activation_checkpointing == "auto":
            raise ValueError("training.activation_checkpointing=auto depends on the GPU; name a policy")
        objective, ranks = build_objective(config), Ranks(0, 0, 1, device)
        with device:  # saves seconds over building on the CPU
            model = build_network(config, self.size.latent_shape, objective, device)
        self.model = model.to(device).train()
        self.shapes = fill(self.model)
        if way := os.environ.get("EPILOGUE"):
            use_epilogues(self.model, way)
        policy = settings.activation_checkpointing
        self.objective = Recorder(prepare_for_training(self.model, objective, settings, policy))
        self.engine = engine = build_engine(self.model, settings, ranks, case.batch, 1)
        if os.environ.get("DDP") == "1":  # even around this one process
            backend = "nccl" if device.type == "cuda" else "gloo"
            torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
            engine.forward = nn.parallel.DistributedDataParallel(
                self.model, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self.ema = EMA(engine.master_parameters(), settings.ema_decay, settings.ema_warmup)
        self.work = TrainStep(
            engine, self.ema, self.objective, ranks, self.size.latents, config.model.class_dropout,
            self.model.null_label, micro_batch=case.batch, accumulation=1, seed=SEED,
        )  # fmt: skip
        if settings.cuda_graph:
            self.work = GraphedStep(self.work)
        self.lr, self.steps = settings.lr, 0

    def step(self, i: int) -> Tensor:
        moments, y = (value.to(self.device, non_blocking=True) for value in self.batches[i % HOST_BATCHES])
        self.steps += 1
        return self.work(self.steps - 1, self.lr, moments, y)[0]["loss"]

    def gate_step(self, i: int, inputs: Inputs, lr: float) -> Tensor:
        """The step draws its own inputs, which must be `inputs`; else ValueError."""
        moments, y = (value.to(self.device) for value in self.batches[i % HOST_BATCHES])
        mean_loss = self.work(i, lr, moments, y)[0]["loss"]
        drawn, per_sample = self.objective.seen
        check_drawn(i, drawn, inputs)
        if not torch.allclose(per_sample.mean(), mean_loss, rtol=1e-4):
            raise ValueError(f"the step returned a loss of {mean_loss}, its objective {per_sample.mean()}")
        return per_sample

    def states(self) -> list[dict[str, Tensor]]:
        """Weights and averages by name."""
        parts = (self.engine.master_parameters(), self.ema.average)
        return [dict(self.engine.full_state(tensors)) for tensors in parts]


class Recorder:
    """An objective that records the inputs and the result of its last loss, within the step as it is timed."""

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
