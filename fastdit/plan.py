"""What a run will cost, before anything runs: parameters, FLOPs, memory by kind, speed and hours on a named GPU."""

from dataclasses import replace
from pathlib import Path

import torch

from fastdit.build import (
    build_network,
    build_objective,
    build_routing,
    check_engine,
    resolved,
    shards_of,
    uses_zero,
    with_steps,
)
from fastdit.cards import GIB, GPUS, card_name
from fastdit.config import assumed
from fastdit.data.autoencoders import NO_VAE
from fastdit.data.features import FEATURE_DTYPES, record_type
from fastdit.data.images import size_text, width_height
from fastdit.data.latents import LatentCodec
from fastdit.data.opening import can_open
from fastdit.errors import counted
from fastdit.memory import Candidate, candidates
from fastdit.models.dit import DiT
from fastdit.schema import Config
from fastdit.training.alignment import ALIGNMENTS, attach

IMAGENET = 1_281_167  # images
USUAL = ("stabilityai/sd-vae", "stabilityai/sdxl-vae")  # hub names whose latents have 4 channels and an eighth the size
ENCODERS = {"DINOv2-B": 768, "DINOv2-L": 1024, "EfficientNet-Lite0": 1280}  # width of their features


def plan(config: Config, gpu: str, world: int = 1) -> tuple[DiT, list[Candidate]]:
    """The network, without memory, and one Candidate per policy, the fastest that fits first.

    The micro-batch is the largest that fits, or training.micro_batch where that is a number of images. ValueError for
    an unknown GPU, for a batch that cannot be divided among the processes, and for settings that exclude each other.
    """
    (config, shape), gpu = known(config), card_name(gpu)
    card = GPUS[gpu]
    if world < 1:
        raise ValueError(f"--gpus={world} is not a number of GPUs; use 1 or more")
    settings = config.training
    check_engine(settings, world)
    if settings.fp8 and not card.has_fp8:
        raise ValueError(f"training.fp8=true is impossible on --gpu {gpu}; use training.fp8=false, or an H100 or newer")
    with torch.device("meta"):
        model = build_network(config, shape, build_objective(config))
        attach(settings.align, model, ENCODERS["DINOv2-B"], build_routing(settings, model))
    open_ = replace(settings, activation_checkpointing="auto", micro_batch=settings.micro_batch or -1)
    return model, candidates(replace(config, training=open_), model, card, world)[0]


def known(config: Config) -> tuple[Config, tuple[int, int, int]]:
    """The config and the latents' shape (C, h, w) as its shards tell.

    Without them, training.epochs counts the images of ImageNet, and the latents are those of data.vae if that is a
    folder, else those of the usual autoencoders.
    """
    if can_open(config.data.shards):
        manifest, _ = shards_of(config)
        return resolved(config, manifest), manifest.latents.shape
    config = assumed(config)
    config = replace(config, training=with_steps(config.training, IMAGENET))
    width, height = width_height(config.data.image_size)
    vae = config.data.vae
    if vae != NO_VAE and not Path(vae).is_dir():
        return config, (4, height // 8, width // 8)
    codec = LatentCodec.load(vae)
    return config, (codec.channels, height // codec.downsample, width // codec.downsample)


def report(config: Config, gpu: str, world: int = 1) -> str:
    """The plan in Markdown, as `fastdit plan` prints it."""
    config, gpu = known(config)[0], card_name(gpu)
    model, plans = plan(config, gpu, world)
    settings, best, routing = config.training, plans[0], build_routing(config.training, model)
    trained = 3 * model.flops_per_image(routing.lengths(model) if routing else None)
    model.taps.clear()  # the projectors are not part of the network
    forward = model.flops_per_image()
    engine = f"ZeRO-{settings.zero_stage}" if uses_zero(settings) else "DDP"
    processes = f"{world} x {gpu}" + (f" ({engine})" if world > 1 else "")
    precision = "FP8 linears, " * settings.fp8 + settings.precision
    lines = [
        f"### {config.model.variant}, {size_text(config.data.image_size)} px, {processes}, global batch "
        f"{settings.global_batch}, {precision}, residual stream {8 * settings.residual_bytes} bits",
        "",
        f"{model.parameter_count():,} parameters; {forward / 1e9:.1f} GFLOP per image forward, "
        f"{trained / 1e9:.1f} in training.",
        *extras(config, model),
        "",
        "| checkpointing | micro-batch | "
        + " | ".join(best.memory)
        + " | total GiB | fits | images/s | hours | GPU-hours |",
        "|---" * (len(best.memory) + 7) + "|",
    ]
    for p in plans:
        cells = [f"{value / GIB:.1f}" for value in p.memory.values()]
        total = f"{sum(p.memory.values()) / GIB:.1f}"
        fits = "yes" if p.fits else "no"
        speed, hours = settings.global_batch / p.step_s, settings.steps * p.step_s / 3600
        lines.append(
            f"| {p.policy} | {p.micro_batch} | {' | '.join(cells)} | {total} | {fits} | {speed:.0f} "
            f"| {hours:.0f} | {hours * world:.0f} |"
        )
    chosen = f"training.activation_checkpointing={best.policy} training.micro_batch={best.micro_batch}"
    smaller = f"lower training.micro_batch={best.micro_batch}, or " * (best.micro_batch > 1)
    shards = "" if uses_zero(settings) else " with training.engine=deepspeed training.zero_stage=2"
    reached = GPUS[gpu].efficiency
    other = f" ({reached.fp8} times that in FP8)" * settings.fp8
    other += " (half that in TF32)" * (settings.precision == "fp32")
    lines += [
        "",
        f"Fastest that fits: {chosen}." if best.fits else f"Nothing fits {gpu}: {smaller}use more GPUs{shards}.",
        f"Predicted with the shares that {reached.source} reached: products at {reached.products:.0%} of "
        f"{GPUS[gpu].tflops:.0f} TFLOP/s{other}, attention at {reached.attention:.0%}, norms and activations at "
        f"{reached.memory:.0%} of {GPUS[gpu].bandwidth:.2f} TB/s; gradient exchange hidden; "
        + counted(settings.steps, "step")
        + f" = {counted(settings.epochs, 'epoch', spec='g')}" * bool(settings.epochs) + ".",
    ]
    return "\n".join(lines)


def extras(config: Config, model: DiT) -> list[str]:
    """Lines on latents that are not known, training.route, and features of training.align or model.class_token."""
    settings, lines, routing = config.training, [], build_routing(config.training, model)
    vae, (channels, height, width) = config.data.vae, known(config)[1]
    if not (can_open(config.data.shards) or vae == NO_VAE or Path(vae).is_dir() or vae.startswith(USUAL)):
        lines.append(f"Latents are taken to be {channels} x {height} x {width}, as data.vae={vae} is not read; give "
                     "others as data.shards=synthetic:IMAGES/CxHxW/CLASSES.")  # fmt: skip
    if routing:
        blocks, full = routing.blocks(model), settings.route_full_steps
        later = f"; the last {full:,} steps, with all tokens, take longer than predicted" * bool(full)
        kept = f"{min(routing.lengths(model))} of {model.tokens} tokens"
        lines += [f"training.route: {kept} in blocks {blocks[0]} to {blocks[-1]}{later}."]
    measured = [f"training.{name}_every={steps}" for name, steps in config.monitor_every.items() if steps]
    untimed = ["the integer operations of model.dropout's masks"] * bool(config.model.dropout)
    untimed += ["what training.joint_adaln=true saves in launches"] * settings.joint_adaln
    untimed += [f"a step with training.compile={str(settings.compile).lower()}"] * (settings.compile is not True)
    untimed += ["objective.coupling=ot"] * (config.objective.options.get("coupling") == "ot") + measured
    if untimed:
        lines.append(f"Not in the hours: {'; '.join(untimed)}.")
    if config.model.class_token or any(ALIGNMENTS[choice.name].uses_features for choice in settings.align):
        width, height = width_height(config.data.image_size)
        tokens, sizes = (height // 16) * (width // 16) + 1, []  # with a class token
        for name, dim in ENCODERS.items():
            each = (f"{IMAGENET * 2 * record_type(dtype, tokens, dim).itemsize / 1e12:.2f} TB as {dtype}"
                    for dtype in FEATURE_DTYPES)  # fmt: skip
            sizes.append(f"{name} ({dim}) {' or '.join(each)}")
        lines += [f"Features of ImageNet and its mirror images, {tokens} tokens each: {'; '.join(sizes)}."]
    return lines
