"""The training run, from config to checkpoints, as one flat function."""

import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fastdit import distributed
from fastdit.config import Config, TrainingConfig, bind, build, load_config, save_config
from fastdit.data.latents import LatentCodec
from fastdit.data.shards import Manifest, latent_batches, on_device
from fastdit.diffusion.objectives import OBJECTIVES, compiled
from fastdit.diffusion.samplers import SAMPLERS
from fastdit.diffusion.timesteps import LossAwareTimes
from fastdit.distributed import seed_of
from fastdit.errors import make_folder, out_of_memory_says
from fastdit.models.attention import resolve
from fastdit.models.dit import DiT, create_dit
from fastdit.models.fp8 import use_fp8
from fastdit.training import checkpoint
from fastdit.training.ema import EMA
from fastdit.training.engine import DeepSpeedEngine, TorchEngine
from fastdit.training.graph import GraphedStep
from fastdit.training.log import Log, peak_flops
from fastdit.training.memory import POLICIES, RESERVED, fit, memory_bytes
from fastdit.training.step import TrainStep

INIT, ORDER, NOISE = range(3)  # what a seed is for, so that no two uses share a stream


def train(config: Config, *, resume: bool = False, device: str | None = None) -> Path:
    """Train as `config` says and return the last checkpoint; `resume` goes on from the newest one in `run_dir`."""
    ranks = distributed.init(device)
    device, settings, run_dir = ranks.device, config.training, Path(config.run_dir)
    found = checkpoint.checkpoints(run_dir)
    if run_dir.exists() and any(run_dir.iterdir()) and not resume:
        raise ValueError(f"run_dir={run_dir} is not empty; go on with --resume, or choose another run_dir=...")

    # data: what the shards hold must be what the config means
    manifest = Manifest.load(config.data.shards)
    manifest.check(
        image_size=config.data.image_size,
        num_classes=config.data.num_classes,
        global_batch=settings.global_batch,
        # loading an autoencoder takes seconds: only where the name leaves a doubt
        codec=LatentCodec.load(config.data.vae).fingerprint if config.data.vae != manifest.vae else None,
    )
    micro, accumulation = micro_batches(settings.global_batch, max(settings.micro_batch, 0), ranks.world)

    # objective and network, from the seed alone: every process starts with the same weights
    objective = build_objective(config, device)
    if settings.loss_aware_times and config.objective.name != "ddpm":
        raise ValueError("training.loss_aware_times=True needs a discrete schedule; use objective=ddpm, or false")
    times = LossAwareTimes() if settings.loss_aware_times else None
    torch.manual_seed(seed_of(config.seed, INIT))
    model = network(config, manifest.latent_shape, objective, device).to(device).train()
    check_sampling(config, objective, model)  # a misspelt sampler fails now, not after the training
    flops_per_image = 3 * model.flops_per_image()  # forward, and twice that backward
    policy, micro, accumulation = memory_policy(config, model, micro * accumulation, ranks)
    set_up(model, settings, policy)
    engine = build_engine(model, settings, ranks, micro, accumulation)
    ema = EMA(engine.master_parameters(), settings.ema_decay, settings.ema_warmup)

    # a run is its config, its seed and its step: a resume needs weights, moments, EMA and the step number
    facts = {
        "model": config.model.variant,
        "num_classes": config.data.num_classes,
        "objective": config.objective.name,
        "engine": engine.name,
        "sharded_over": ranks.world if engine.name == "deepspeed" else 1,
        "zero_stage": settings.zero_stage if engine.name == "deepspeed" else 0,
        "global_batch": settings.global_batch,
        "seed": config.seed,
        "latents": {
            "shape": list(manifest.latent_shape),
            "scale": manifest.scale,
            "shift": manifest.shift,
            "vae": manifest.vae,
            "codec": manifest.codec,
            "image_size": manifest.image_size,
        },
    }
    start, window = 0, torch.zeros(2, device=device)  # loss summed since the last log line, and its number of steps
    if resume and found:
        meta = checkpoint.read_meta(found[-1])
        for key, value in facts.items():
            if meta[key] != value:
                raise ValueError(f"{found[-1]} has {key}={meta[key]!r}, this run {value!r}; make them equal to resume")
        before = vars(load_config(found[-1] / "config.yaml").model)
        for key, value in vars(config.model).items():  # another norm, say, has the same names and shapes
            if before[key] != value and key not in ("variant", "attention", "class_dropout", "dropout"):
                raise ValueError(
                    f"{found[-1]} has model.{key}={before[key]!r}, this run {value!r}; make them equal to resume"
                )
        engine.load(found[-1], load_file(found[-1] / "model.safetensors"))
        part = found[-1] / f"ema-{ranks.rank % facts['sharded_over']:05d}.pt"
        own = torch.load(part, map_location="cpu", weights_only=True)
        ema.load(own["average"])
        start, window = meta["step"], own["window"].to(device)
        if times is not None and (found[-1] / "times.pt").is_file():  # absent where the run went without until now
            times.load_state_dict(torch.load(found[-1] / "times.pt", weights_only=True))

    def write(folder: Path) -> None:
        """This process's part of a checkpoint; the main one adds whole weights and EMA for everybody else's use."""
        weights, average = engine.full_state(engine.master_parameters()), engine.full_state(ema.average)
        kept = window if facts["sharded_over"] > 1 else ranks.mean(window)  # of one part, every process resumes from it
        engine.save(folder)
        if ranks.rank < facts["sharded_over"]:
            torch.save({"average": ema.average, "window": kept}, folder / f"ema-{ranks.rank:05d}.pt")
        if ranks.is_main:
            save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, folder / "model.safetensors")
            save_file({k: v.detach().cpu().contiguous() for k, v in average.items()}, folder / "ema.safetensors")
            save_config(config, folder / "config.yaml")
            if times is not None:
                torch.save(times.state_dict(), folder / "times.pt")

    train_step = TrainStep(
        engine,
        ema,
        objective,
        ranks,
        latent_shape=manifest.latent_shape,
        scale=manifest.scale,
        shift=manifest.shift,
        class_dropout=config.model.class_dropout,
        null_label=model.null_label,
        micro_batch=micro,
        accumulation=accumulation,
        seed=seed_of(config.seed, NOISE),
        times=times,
    )
    if settings.cuda_graph:
        train_step = GraphedStep(train_step)

    log = None
    if ranks.is_main:
        make_folder(run_dir, "run_dir")
        save_config(config, run_dir / "config.yaml")
        log = Log(run_dir, start, settings.steps, flops_per_image=flops_per_image,
                  peak_flops=ranks.world * peak_flops(device))  # fmt: skip
        log.say(
            f"{config.model.variant}: {model.parameter_count():,} parameters, {len(manifest):,} images, "
            f"{ranks.world} x {device} ({engine.name}), attention {model.blocks[0].attn.backend}, "
            f"batch {ranks.world} x {micro} x {accumulation}, "
            + (f"resumed at step {start}" if start else "from the start")
        )
    batches = latent_batches(
        manifest,
        global_batch=settings.global_batch,
        rows=slice(ranks.rank * micro * accumulation, (ranks.rank + 1) * micro * accumulation),
        seed=seed_of(config.seed, ORDER),
        start_step=start,
        hflip=config.data.hflip,
        prefetch=config.data.prefetch,
        pin_memory=device.type == "cuda",
    )
    batches = on_device(batches, device)
    last = found[-1] if found else None
    smaller = max((m for m in divisors(micro) if m < micro), default=1)
    remedy = (
        f"training.micro_batch={micro} with activation_checkpointing={policy} is too much for {device}: use "
        f"training.micro_batch={smaller}" + ", or activation_checkpointing=full" * (policy != "full")
    )
    clock, clock_step = time.perf_counter(), start
    for step in range(start, settings.steps):
        _, moments, y = next(batches)
        lr = settings.lr * min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else settings.lr
        with out_of_memory_says(remedy):
            loss, grad_norm = train_step(moments, y, step, lr)
        window += torch.stack([loss, torch.ones_like(loss)])

        done = step + 1
        log_due = done % settings.log_every == 0 or done == settings.steps
        save_due = done % settings.checkpoint_every == 0 or done == settings.steps
        if log:
            log.step()
        if log_due or save_due:
            mean_loss = (ranks.mean(window[0]) / window[1]).item()  # the only wait for the device
            if not math.isfinite(mean_loss):
                raise ValueError(
                    f"the loss is {mean_loss} at step {done}; the last good state is {last or 'none'}: "
                    f"lower training.lr={settings.lr} or set training.grad_clip=1"
                )
        if log_due:
            seconds, steps = time.perf_counter() - clock, done - clock_step
            clock, clock_step = time.perf_counter(), done
            window.zero_()
            if log:
                log.write(done, loss=mean_loss, grad_norm=grad_norm.item(), lr=lr, seconds=seconds,
                          steps=steps, images=steps * settings.global_batch, device=device)  # fmt: skip
        if save_due:
            before = time.perf_counter()
            last = checkpoint.save(run_dir, done, write, facts, ranks, settings.keep_checkpoints)
            clock += time.perf_counter() - before  # writing does not count as training time
    batches.close()
    if log:
        log.close()
    return last


def build_objective(config: Config, device: torch.device):
    """The config's objective, its loss compiled where the blocks are, on a GPU: a CPU launches nothing."""
    objective = build(OBJECTIVES, config.objective, "objective")
    return compiled(objective) if config.training.compile and device.type == "cuda" else objective


def network(
    config: Config, latent_shape: tuple[int, int, int], objective, device: torch.device | str = "cpu"
) -> DiT:
    """The config's network for latents (C, h, w), on the CPU, its attention backend the one to use on `device`."""
    channels, *sides = latent_shape
    learn_sigma = objective.out_channels(channels) == 2 * channels
    if learn_sigma and config.model.learn_sigma is False:
        raise ValueError("model.learn_sigma=False leaves no channels for the objective's variance; use null")
    apart = ("variant", "learn_sigma", "attention")
    model = create_dit(
        config.model.variant,
        input_size=tuple(sides),
        in_channels=channels,
        num_classes=config.data.num_classes,
        learn_sigma=learn_sigma or bool(config.model.learn_sigma),
        **{key: value for key, value in vars(config.model).items() if key not in apart},
    )
    head_dim, tokens = model.hidden_size // model.blocks[0].attn.num_heads, model.tokens
    model.set_attention(resolve(config.model.attention, device=torch.device(device), head_dim=head_dim, tokens=tokens))
    return model


def set_up(model: DiT, settings: TrainingConfig, policy: str) -> None:
    """Have the network compute as training asks, on the device that it is on; `policy` of activation checkpointing."""
    model.set_activation_checkpointing(policy)
    if settings.residual_bytes == 2:
        model.residual_dtype = torch.bfloat16
    if settings.joint_adaln:
        model.join_modulations()
    if settings.fp8:
        use_fp8(model)
    if settings.compile:
        if uses_zero(settings) and settings.zero_stage == 3:
            raise ValueError(
                f"training.compile={settings.compile} cannot see ZeRO-3 gather weights; "
                "use compile=false, or zero_stage=2"
            )
        # DDP would have the compiler cut each block at its buckets; blocks alone give it the gradients early enough
        torch._dynamo.config.optimize_ddp = settings.compile == "whole"
        model.compile(fullgraph=True) if settings.compile == "whole" else model.compile_blocks()


def uses_zero(settings: TrainingConfig) -> bool:
    return settings.engine == "deepspeed" or (settings.engine == "auto" and distributed.under_deepspeed())


def build_engine(
    model: DiT, settings: TrainingConfig, ranks: distributed.Ranks, micro: int, accumulation: int
) -> TorchEngine | DeepSpeedEngine:
    """The engine that the settings, and under `auto` the launcher, ask for."""
    shared = dict(
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        precision=settings.precision,
        accumulation=accumulation,
        grad_clip=settings.grad_clip,
    )
    if uses_zero(settings):
        zero = dict(micro_batch=micro, zero_stage=settings.zero_stage, extra=settings.deepspeed)
        return DeepSpeedEngine(model, ranks, **shared, **zero)
    return TorchEngine(model, ranks, **shared)


def check_sampling(config: Config, objective, model: DiT) -> None:
    """ValueError where this model could not be sampled as `config.sampling` says."""
    settings = config.sampling
    bind(SAMPLERS, settings.sampler, "sampling.sampler")
    objective.timesteps(settings.steps)  # a count that the objective cannot make fails here
    if settings.cfg_scale != 1 and model.null_label is None:
        raise ValueError(
            f"sampling.cfg_scale={settings.cfg_scale} needs a null label; this model has class_dropout="
            f"{config.model.class_dropout}, num_classes={config.data.num_classes}: use sampling.cfg_scale=1"
        )


def memory_policy(config: Config, model: DiT, share: int, ranks: distributed.Ranks) -> tuple[str, int, int]:
    """Activation checkpointing, micro-batch and accumulation: the config's, or what is predicted to fit this GPU."""
    settings = config.training
    policy, micro = settings.activation_checkpointing, settings.micro_batch or share
    if policy == "auto" or micro < 0:
        policies = policies_of(config) if policy == "auto" else [policy]
        micros = divisors(share) if micro < 0 else [micro]
        budget = distributed.memory_of(ranks.device) * (1 - RESERVED)
        policy, micro = fit(
            budget, policies, micros, lambda p, m: sum(memory_by_kind(model, settings, p, m, ranks.world).values())
        )
    return policy, micro, share // micro


def policies_of(config: Config) -> list[str]:
    """The policies of activation checkpointing that can run; FP8 products keep inputs of their own."""
    without = config.training.fp8 or config.model.mlp == "gelu"
    return [policy for policy in POLICIES if not (without and policy == "activation")]


def memory_by_kind(model: DiT, settings: TrainingConfig, policy: str, micro: int, world: int) -> dict[str, float]:
    """Peak bytes of one of `world` processes, predicted."""
    return memory_bytes(
        model,
        micro,
        policy,
        world=world,
        zero_stage=settings.zero_stage if uses_zero(settings) else 0,
        precision=settings.precision,
        residual=settings.residual_bytes,
    )


def divisors(share: int) -> list[int]:
    """What a micro-batch can be, ascending."""
    return [m for m in range(1, share + 1) if share % m == 0]


def micro_batches(global_batch: int, micro_batch: int, world: int) -> tuple[int, int]:
    """(images a forward pass, forward passes a step) of one process."""
    if global_batch % world:
        near = max(world, global_batch // world * world)
        raise ValueError(f"training.global_batch={global_batch} is not divisible by {world} processes; use {near}")
    share = global_batch // world
    micro = micro_batch or share
    if share % micro:
        fits = max(m for m in divisors(share) if m <= micro)
        raise ValueError(f"training.micro_batch={micro} does not divide {share} images a process; use {fits}")
    return micro, share // micro


def read_metrics(run_dir: str | Path) -> list[dict]:
    """The records of metrics.jsonl, oldest first."""
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
