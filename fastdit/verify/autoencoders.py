"""Checks of a checkpoint of `fastdit train-vae`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastdit.autoencoder.config import AutoencoderConfig
from fastdit.autoencoder.network import from_checkpoint
from fastdit.autoencoder.state import build_critic, expected_files
from fastdit.config import load_config
from fastdit.training.state import CONFIG
from fastdit.verify.checkpoints import check_average, check_weights
from fastdit.verify.findings import Findings


def verify_autoencoder(folder: Path, meta: dict[str, Any], found: Findings, say: Callable[[str], None]) -> None:
    """The tensors of every file, the average, and the forward pass of the EMA on random input."""
    try:
        config = load_config(folder / CONFIG, schema=AutoencoderConfig)
        vae = from_checkpoint(folder).eval()
    except ValueError as error:
        return found.add("description", f"{folder}: {error}")
    wanted = expected_files(vae, build_critic(config), config.training.decoder_only)
    states = {name: check_weights(folder / f"{name}.safetensors", own, found) for name, own in wanted.items()}
    check_weights(folder / "progress.safetensors", {}, found)
    if found.counts["weights"] or not (states["model"] and states["ema"]):
        return
    if config.training.ema_decay:  # with decay 0, the EMA is the weights
        check_average(states["model"], states["ema"], meta, found)
    say(f"{folder}: {config.model.variant}, step {meta['step']}, {sum(p.numel() for p in vae.parameters()):,} "
        "parameters, fp32 EMA")  # fmt: skip
    vae.load_state_dict(states["ema"])
    pixels = torch.rand(1, 3, 2 * config.model.downsample, 2 * config.model.downsample) * 2 - 1
    with torch.no_grad():
        output = vae(pixels).sample
    if not output.isfinite().all():
        found.add("forward", "the autoencoder's output on random input is not finite")
    else:
        say("forward: finite")
