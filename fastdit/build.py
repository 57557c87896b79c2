"""From a config to what it names: objective and network, and the checks that concern several sections at once."""

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import torch

from fastdit.data.autoencoders import NO_VAE
from fastdit.data.latents import LatentCodec
from fastdit.data.loader import split
from fastdit.data.manifest import Manifest
from fastdit.data.opening import open_latents
from fastdit.diffusion.entangled import EntangledFlow
from fastdit.diffusion.objectives import OBJECTIVES, Objective, compiled
from fastdit.diffusion.samplers import SAMPLERS
from fastdit.launcher import under_deepspeed
from fastdit.models.attention import resolve
from fastdit.models.dit import DiT, create_dit
from fastdit.models.fp8 import use_fp8
from fastdit.models.routing import Routing
from fastdit.registry import bind, build
from fastdit.schema import Config, LoopConfig, TrainingConfig


def build_objective(config: Config) -> Objective:
    if config.training.loss_aware_times and config.objective.name != "ddpm":
        raise ValueError("training.loss_aware_times=True needs a discrete schedule; use objective=ddpm, or false")
    objective = build(OBJECTIVES, config.objective, "objective")
    if not (dim := config.model.class_token):
        return objective
    if config.objective.name != "flow":
        raise ValueError(f"model.class_token={dim} is denoised by flow matching, but objective="
                         f"{config.objective.name}; use objective=flow, or class_token=0")  # fmt: skip
    return EntangledFlow(**vars(objective), token_dim=dim)


def build_network(
    config: Config, latent_shape: tuple[int, int, int], objective: Objective, device: torch.device | str = "cpu"
) -> DiT:
    """The config's network for latents (C, h, w), on the CPU; its attention backend is the one to use on `device`."""
    channels, *sides = latent_shape
    learn_sigma = objective.out_channels(channels) == 2 * channels
    if learn_sigma and config.model.learn_sigma is False:
        raise ValueError("model.learn_sigma=False leaves no channels for the objective's variance; use null")
    model = create_dit(
        config.model.variant,
        input_size=tuple(sides),
        in_channels=channels,
        num_classes=config.data.num_classes,
        class_dropout=config.model.class_dropout,
        learn_sigma=learn_sigma or bool(config.model.learn_sigma),
        **vars(config.model.options),
    )
    head_dim, tokens = model.hidden_size // model.blocks[0].attn.num_heads, model.tokens
    model.set_attention(resolve(config.model.attention, device=torch.device(device), head_dim=head_dim, tokens=tokens))
    return model


def build_routing(settings: TrainingConfig, model: DiT) -> Routing | None:
    """training.route; ValueError where it cannot be followed."""
    if settings.cuda_graph and settings.route_full_steps:
        raise ValueError(f"training.route_full_steps={settings.route_full_steps} changes shapes, which a CUDA graph "
                         "cannot follow; use 0, or training.cuda_graph=false")  # fmt: skip
    end = settings.steps - settings.route_full_steps
    return routing_of(model, settings.route, settings.route_ends, "training.route", end) if settings.route else None


def routing_of(model: DiT, share: float, ends: tuple[int, int], key: str, full_from: int = 1 << 62) -> Routing:
    """ValueError where no block, or no token, or every token would skip; `key` is that of the share."""
    if sum(ends) >= len(model.blocks):
        raise ValueError(f"training.route_ends={list(ends)} leave none of {len(model.blocks)} blocks to skip; use "
                         f"smaller numbers, or {key}=0")  # fmt: skip
    if ends[1] < (decoder := model.options.decoder_blocks):
        raise ValueError(f"training.route_ends={list(ends)} let tokens skip blocks of the decoder, which needs every "
                         f"token's condition; use [{ends[0]}, {decoder}], or model.decoder_blocks=0")  # fmt: skip
    if not 0 < round(share * model.patches) < model.patches:
        raise ValueError(f"{key}={share} of {model.patches} tokens is all or none; use another share")
    return Routing(share, ends, full_from)


def shards_of(config: Config) -> tuple[Manifest, Manifest | None]:
    """The images to train on, and those of the validation loss, if the config names any; ValueError if they differ."""
    cache = config.data.remote_cache
    manifest = open_latents(config.data.shards, cache).normalized(config.data.normalize)
    train, held_out = split(replace(manifest, block=config.data.block), config.data.val_fraction)
    if not (path := config.data.val_shards):
        return train, held_out
    held_out = open_latents(path, cache)
    if config.data.normalize != "none":
        held_out = held_out.scaled_as(train.latents)
    held_out.check()
    if held_out.index_sha256 == train.index_sha256:
        raise ValueError(f"data.val_shards={path} holds the images of data.shards; use data.val_fraction=0.01 instead")
    train.latents.check(held_out.latents, f"data.shards={train.folder}", f"data.val_shards={path}")
    if config.data.num_classes != 0 and held_out.class_names != train.class_names:
        raise ValueError(f"data.val_shards={path} has other classes than data.shards={train.folder}; extract both with "
                         "the same classes")  # fmt: skip
    return train, held_out


def resolved(config: Config, manifest: Manifest) -> Config:
    """The config with what the shards tell: image size, classes, autoencoder, and the steps of training.epochs.

    A local autoencoder gets its absolute path, so that the run can be sampled from any folder. Shards without classes
    set sampling.cfg_scale=1. ValueError where the config contradicts the shards.
    """
    data, settings = config.data, config.training
    manifest.check(
        image_size=data.image_size,
        num_classes=data.num_classes,
        global_batch=settings.global_batch,
        hflip=data.hflip,
        # loading an autoencoder takes seconds: only where the name leaves a doubt
        codec=LatentCodec.load(data.vae) if data.vae not in ("", manifest.latents.vae) else None,
    )
    vae = data.vae or manifest.latents.vae
    data = replace(
        data,
        image_size=manifest.latents.image_size,
        num_classes=manifest.num_classes if data.num_classes is None else data.num_classes,
        vae=str(Path(vae).resolve()) if vae != NO_VAE and Path(vae).is_dir() else vae,
    )
    if not (manifest.num_classes or config.sampling.weak_checkpoint):  # there is nothing to guide by
        config = replace(config, sampling=replace(config.sampling, cfg_scale=1.0))
    return replace(config, data=data, training=with_steps(settings, len(manifest)))


def with_steps(settings: LoopConfig, images: int) -> LoopConfig:
    """The settings with the steps of training.epochs, if it is set, for `images` to train on."""
    steps = math.ceil(Fraction(str(settings.epochs)) * images / settings.global_batch)  # 1.1 x 10 is 11, not more
    return replace(settings, steps=steps) if settings.epochs else settings


def check_device(settings: TrainingConfig, device: torch.device) -> None:
    """ValueError for a GPU that cannot compute in the precision of the settings."""
    if device.type != "cuda" or settings.precision != "bf16":
        return
    if torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"training.precision=bf16 needs a GPU from Ampere on, but this is a {name}; use fp32")


def prepare_for_training(model: DiT, objective: Objective, settings: TrainingConfig, policy: str) -> Objective:
    """Set the network up, in place on its device, as training computes it; returns the objective to train with.

    `policy` is that of activation checkpointing. On a GPU the arithmetic of the loss is compiled as well.
    """
    model.set_activation_checkpointing(policy)
    if settings.residual_bytes == 2:
        model.residual_dtype = torch.bfloat16
    if settings.joint_adaln:
        model.join_modulations()
    if settings.fp8:
        values = settings.global_batch * model.in_channels * model.patches * model.patch_size**2
        model.fp8 = use_fp8(model, settings.fp8_history, settings.fp8_margin, values, settings.fp8_attention)
    elif settings.fp8_attention:
        raise ValueError("training.fp8_attention=true needs training.fp8=true; set both, or neither")
    if not settings.compile:
        return objective
    if uses_zero(settings) and settings.zero_stage == 3:
        raise ValueError(
            f"training.compile={settings.compile} cannot trace ZeRO-3's gathering of weights; "
            "use compile=false, or zero_stage=2"
        )
    # DDP would have the compiler split each block at its buckets; separate blocks produce gradients early enough
    torch._dynamo.config.optimize_ddp = settings.compile == "whole"
    if settings.compile == "whole":
        model.compile(fullgraph=True)
    else:  # with a route, blocks see two sequence lengths: one kernel for both would be slower
        model.compile_blocks(dynamic=False if settings.route else None)
    return compiled(objective) if next(model.parameters()).is_cuda else objective


def uses_zero(settings: TrainingConfig) -> bool:
    """Whether training runs under DeepSpeed's ZeRO: by setting, or by the launcher where the engine is auto."""
    return settings.engine == "deepspeed" or (settings.engine == "auto" and under_deepspeed())


def check_engine(settings: TrainingConfig, world: int) -> None:
    """ValueError for an engine, or a number of processes, that other settings exclude."""
    if uses_zero(settings) and settings.optimizer != "adamw":
        raise ValueError(f"training.optimizer={settings.optimizer} needs whole matrices, but ZeRO partitions them; "
                         "use training.engine=torch, or optimizer=adamw")  # fmt: skip
    if settings.cuda_graph and (world > 1 or uses_zero(settings)):
        need = "one process" if world > 1 else "training.engine=torch"
        raise ValueError(f"training.cuda_graph=true needs {need}; set training.cuda_graph=false")


def check_sampling(config: Config, objective: Objective, null_label: int | None) -> None:
    """ValueError where a network with this null label could not be sampled as `config.sampling` says."""
    settings = config.sampling
    bind(SAMPLERS, settings.sampler, "sampling.sampler")
    objective.timesteps(settings.steps)  # a count that the objective cannot make fails here
    if settings.route and not config.training.route:
        raise ValueError(f"sampling.route={settings.route} needs a run that was trained with training.route; use 0")
    if settings.route and settings.cfg_scale == 1:
        raise ValueError(f"sampling.route={settings.route} changes nothing at cfg_scale=1; use a larger one, or 0")
    if settings.route and settings.weak_checkpoint:
        both = f"sampling.route={settings.route} and sampling.weak_checkpoint={settings.weak_checkpoint}"
        raise ValueError(f"{both} both give the prediction to guide away from; use one of them")
    if config.model.class_token and settings.cfg_rescale:
        raise ValueError(f"sampling.cfg_rescale={settings.cfg_rescale} would mix the deviations of the latent and of "
                         "model.class_token; use 0")  # fmt: skip
    if settings.cfg_scale != 1 and null_label is None and not (settings.weak_checkpoint or settings.route):
        raise ValueError(
            f"sampling.cfg_scale={settings.cfg_scale} needs a null label; this model has class_dropout="
            f"{config.model.class_dropout}, num_classes={config.data.num_classes}: use sampling.cfg_scale=1"
        )
