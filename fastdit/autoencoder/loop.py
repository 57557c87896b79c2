"""The training of an autoencoder, from config to run_dir/vae, as one flat function."""

import copy
import shlex
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastdit.autoencoder.config import AutoencoderConfig, NetworkConfig
from fastdit.autoencoder.monitor import VaeMonitor
from fastdit.autoencoder.network import (
    Reconstruction,
    as_config,
    build_autoencoder,
    from_checkpoint,
    not_taken,
    pretrained,
)
from fastdit.autoencoder.perceptual import Perceptual, load_perceptual
from fastdit.autoencoder.state import (
    CRITIC,
    AutoencoderState,
    build_critic,
    check_resume,
    describe,
    write_snapshot,
)
from fastdit.autoencoder.step import AutoencoderStep
from fastdit.build import check_device, with_steps
from fastdit.config import changes, load_config, save_config
from fastdit.data.archives import open_images
from fastdit.data.extract import cores_per_process
from fastdit.data.images import to_pixels
from fastdit.data.loader import on_device
from fastdit.data.order import Order
from fastdit.data.pixels import PixelReader, pixel_batches, split_rows
from fastdit.data.sources import ImageSource, remarks
from fastdit.distributed import Ranks, seed_of
from fastdit.environment import write_environment
from fastdit.errors import counted, out_of_memory_says
from fastdit.memory import micro_batches
from fastdit.training import checkpoint
from fastdit.training.boards import check_wandb
from fastdit.training.ema import EMA, too_young
from fastdit.training.engine import MOMENTS, TorchEngine, set_moments
from fastdit.training.guard import Requests
from fastdit.training.log import Log, LossWindow
from fastdit.training.schedule import learning_rates
from fastdit.training.state import CONFIG, VAE
from fastdit.training.upkeep import Upkeep, agree, run_folder
from fastdit.training.watchdog import COMPUTES, READS
from fastdit.training.weights import read_weights
from fastdit.unused import unused

INIT, ORDER, NOISE = range(3)  # what a seed is for, so that no two uses share a stream


def train_autoencoder(
    config: AutoencoderConfig, *, resume: bool = False, device: str | None = None, report=None
) -> Path:
    """Train as `config` says and return run_dir/vae, a folder of diffusers with the EMA.

    `resume` continues from the newest checkpoint in `run_dir`. `report(run_dir, device)` writes the report of a run
    that has ended, as for training.loop.train.
    """
    with run_folder(config, resume, device, report) as (run_dir, ranks):
        return _train(config, run_dir, ranks, resume)


def _train(config: AutoencoderConfig, run_dir: Path, ranks: Ranks, resume: bool) -> Path:
    device = ranks.device
    requests = Requests(run_dir, config.training.time_limit_s, 60 * config.training.checkpoint_minutes)
    last = checkpoint.newest_good(run_dir, ranks, print) if resume else None
    # data
    check_device(config.training, device)
    check_wandb(config.training.wandb)
    source, reader, measured, held_out = _images(config)
    images = len(reader.rows)
    agree(ranks, config, last, {"images": (images, source.contents)})
    settings = with_steps(config.training, images)
    micro, accumulation = micro_batches(settings.global_batch, settings.micro_batch, ranks.world)

    # networks, from the seed alone: every process starts with the same weights
    torch.manual_seed(seed_of(config.seed, INIT))
    vae, network, origin = _autoencoder(config, last)
    given, config = config, replace(config, model=network, training=settings)
    config.check_start()
    _check_size(config)
    critic = build_critic(config)
    if last:
        check_resume(last, config, images, source.contents, vae, critic)
        vae.load_state_dict(read_weights(last / "model.safetensors"))
        if critic:
            critic.load_state_dict(read_weights(last / f"{CRITIC}.safetensors"))
    perceptual = load_perceptual(config.loss.perceptual, config.loss.vgg, device)
    flops = _flops_per_image(config, vae, critic, perceptual)
    module = Reconstruction(vae, settings.decoder_only).to(device, memory_format=torch.channels_last).train()
    lpips = perceptual if config.loss.perceptual == "lpips" else None
    monitor = VaeMonitor(config, vae, measured, held_out, ranks, lpips)
    if settings.compile:
        module.compile()
    shared = dict(betas=settings.betas, weight_decay=settings.weight_decay, precision=settings.precision,
                  accumulation=accumulation, grad_clip=settings.grad_clip)  # fmt: skip
    engine, critic_engine = TorchEngine(module, ranks, **shared), None
    if critic:
        critic_engine = TorchEngine(critic.to(device, memory_format=torch.channels_last), ranks, **shared)
        zeros = [torch.zeros_like(master) for master in critic_engine.master_parameters()]
        set_moments(critic_engine, dict.fromkeys(MOMENTS, zeros), 0)  # it may be saved before its first step
    ema = EMA(engine.master_parameters(), settings.ema_decay, settings.ema_warmup)
    window, weight = LossWindow(device), torch.zeros((), device=device)
    state = AutoencoderState(config, engine, critic_engine, ema, weight, window)
    start = state.load(last) if last else 0
    width, height = config.data.sides
    shape = (network.latent_channels, height // network.downsample, width // network.downsample)
    train_step = AutoencoderStep(
        config, engine, critic_engine, ema, perceptual, ranks, shape, micro, accumulation,
        seed_of(config.seed, NOISE), weight,
    )  # fmt: skip
    learning_rate = learning_rates(settings)
    critic_rate = learning_rates(replace(settings, lr=config.discriminator.lr or settings.lr))

    if ranks.is_main:
        save_config(config, run_dir / CONFIG)
        write_environment(run_dir, ranks, start)
    log = Log(run_dir, ranks, start, config, images=images, flops_per_image=flops)
    reader.say = log.say_own
    origin = f"resumed at step {start}" if start else origin
    warnings = (f"warning: {line}" for line in (*unused(given), *not_taken(given.model, network)))
    about = _start_line(config, vae, critic, ranks, images, (micro, accumulation), origin)
    for line in (*remarks(source), *warnings, about):
        log.say(line)
    if last and (changed := changes(load_config(last / CONFIG, schema=AutoencoderConfig), config)):
        log.say(f"changed since step {start}: {changed}")
    if last and (later := source.changed_after(last / checkpoint.META)):
        log.say(f"warning: {counted(later, 'file')} of {config.data.images} changed after step {start} was saved")
    order, own = seed_of(config.seed, ORDER), micro * accumulation
    batches = pixel_batches(
        reader, global_batch=settings.global_batch, rows=slice(ranks.rank * own, (ranks.rank + 1) * own), seed=order,
        start_step=start, hflip=config.data.hflip, prefetch=config.data.prefetch, pin_memory=device.type == "cuda",
        crop_fraction=config.data.crop_fraction if config.data.crop == "random" else None,
    )  # fmt: skip

    def on_skip(done: int) -> None:
        chosen, _ = Order(order, [images])(np.arange((done - 1) * settings.global_batch, done * settings.global_batch))
        log.skip(done, reader.rows[chosen].tolist(), [])

    with (
        Upkeep(
            run_dir, ranks, settings, log, window, requests, on_skip=on_skip,
            facts=describe(config, images, source.contents),
            snapshot=lambda: partial(write_snapshot, state.snapshot() if ranks.is_main else {}, config, vae),
        ) as upkeep,
        closing(on_device(batches, device)) as batches,
        out_of_memory_says(f"{device} has too little memory for training.micro_batch={micro}; use a smaller one"),
    ):  # fmt: skip
        monitor.begin(engine, ema, log, upkeep.watchdog, start)
        upkeep.begin(start)
        for step in range(start, settings.steps):
            upkeep.watchdog.at(step + 1, READS)
            pixels = to_pixels(next(batches).images)  # (n, 3, H, W), channels last
            upkeep.watchdog.at(step + 1, COMPUTES)
            lr = learning_rate(step)
            upkeep.after(step + 1, train_step(pixels, step, lr, critic_rate(step)), lr)
            upkeep.clock += monitor(step + 1)
        last = upkeep.end() or last
    size = "x".join(map(str, dict.fromkeys(config.data.sides)))
    log.say(too_young(settings, settings.steps))
    following = ["--images", config.data.images, "--vae", str(run_dir / VAE), "--image-size", size, "--out", "latents"]
    log.say(f"checkpoint {last}; next: fastdit extract {shlex.join(following)}")
    log.close()
    return run_dir / VAE


def _images(config: AutoencoderConfig) -> tuple[ImageSource, PixelReader, PixelReader, bool]:
    """The images, a reader of those to train on, one of those to measure on, and whether these are held out."""
    data = config.data
    if not data.images:
        raise ValueError("data.images is not set; give a folder, list or archive of images")
    source = open_images(data.images)
    rows, rest = split_rows(source, data.val_fraction, "data.val_fraction")
    others = open_images(data.val_images) if data.val_images else source
    if data.val_images and others.identity == source.identity:
        raise ValueError(f"data.val_images={data.val_images} holds the images of data.images; use "
                         "data.val_fraction=0.01 instead")  # fmt: skip
    if not len(rows) or not len(others):
        raise ValueError(f"data.images={data.images} holds no images; give others")
    chosen = np.arange(len(others)) if data.val_images else rest if len(rest) else rows
    workers = data.workers or cores_per_process()
    kept = data.cache_gib * 2**30 if data.crop == "center" else 0
    reader = PixelReader(source, rows, data.image_size, workers=workers, cache_bytes=kept)
    measured = PixelReader(others, chosen, data.image_size, workers=workers)
    return source, reader, measured, bool(data.val_images) or len(rest) > 0


def _autoencoder(config: AutoencoderConfig, last: Path | None) -> tuple[nn.Module, NetworkConfig, str]:
    """The network to train, the section `model` that describes it, and where its weights are from."""
    settings, scale = config.training, config.model.scaling_factor
    if settings.init_from:
        vae = from_checkpoint(last) if last else pretrained(settings.init_from)  # a checkpoint has its weights
        if settings.decoder_only and scale is None:  # the latents stay as they are
            scale = float(vae.config.scaling_factor)
        if not settings.decoder_only:  # those of its channels would come on top of the scale that is measured
            vae.register_to_config(latents_mean=None, latents_std=None)
        return vae, as_config(vae, scale), f"from {settings.init_from}"
    side = config.data.image_size
    vae = build_autoencoder(config.model, side if isinstance(side, int) else max(side))
    return vae, config.model, "from random weights"


def _check_size(config: AutoencoderConfig) -> None:
    factor = config.model.downsample
    for side in config.data.sides:
        if side % factor:
            below = max(side // factor, 1) * factor
            channels = list(config.model.channels)
            raise ValueError(f"data.image_size={side} is not divisible by {factor}, the downsampling factor of "
                             f"model.channels={channels}; use {below} or {below + factor}")  # fmt: skip


def _flops_per_image(
    config: AutoencoderConfig, vae: nn.Module, critic: nn.Module | None, perceptual: Perceptual | None
) -> Callable[[int], float]:
    """FLOPs per image of a training step, by its number from 1; a backward pass counts as two forward passes.

    The perceptual distance takes the image and the reconstruction, and gives the gradient of the latter alone. The
    discriminator takes the reconstruction once for its gradient, and both again for that of the weights.
    """
    width, height = config.data.sides
    image = torch.zeros(1, 3, height, width, device="meta")

    def forward(module: nn.Module | None, call: Callable) -> float:
        if module is None:
            return 0.0
        module = copy.deepcopy(module).to("meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call(module)
        return counter.get_total_flops()

    encoder = forward(vae, lambda m: m.encode(image))
    decoder = forward(vae, lambda m: m.decode(m.encode(image).latent_dist.mean)) - encoder
    distance = forward(perceptual, lambda m: m.maps(image))
    patches = forward(critic, lambda m: m(image))
    base = (1 if config.training.decoder_only else 3) * encoder + 3 * decoder + 3 * distance
    return lambda step: base + (8 * patches if step >= config.discriminator.start else 0)


def _start_line(config: AutoencoderConfig, vae, critic, ranks, images: int, batch: tuple[int, int], origin: str) -> str:
    settings, counts = config.training, [sum(p.numel() for p in m.parameters()) for m in (vae, critic) if m]
    second = f" and a discriminator of {counts[1]:,} from step {config.discriminator.start:,} on" if critic else ""
    threads = f", {counted(torch.get_num_threads(), 'thread')}" if ranks.device.type == "cpu" else ""
    return (
        f"{config.model.variant}: {counts[0]:,} parameters{second}, {counted(images, 'image')}, "
        f"{ranks.world} x {ranks.device}{threads}, perceptual loss {config.loss.perceptual}, "
        f"batch {' x '.join(map(str, (ranks.world, *batch)))}, "
        f"{counted(settings.steps, 'step')} = {settings.steps * settings.global_batch / images:.1f} epochs"
        + (f", {origin}" if origin else "")
    )
