"""What is measured while an autoencoder trains, and the diffusers folder run_dir/vae that each measurement leaves.

All of it has its own network and its own random numbers, so the training computes the same bits with and without it.
"""

import copy
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastdit.autoencoder.config import AutoencoderConfig
from fastdit.autoencoder.curves import write_curves
from fastdit.autoencoder.perceptual import Perceptual
from fastdit.autoencoder.quality import Quality, own_blocks
from fastdit.autoencoder.state import PREFIX
from fastdit.data.latents import in_words, rounded, scale_and_shift, scale_remarks
from fastdit.data.order import permutation
from fastdit.data.pixels import PixelReader
from fastdit.distributed import Ranks
from fastdit.evaluation.features import load_features
from fastdit.training.ema import EMA
from fastdit.training.engine import TorchEngine
from fastdit.training.log import Log, read_records
from fastdit.training.monitor import FOLDER, keys_of_the_config
from fastdit.training.sheets import NAME, sheet, sheets, step_of, strip, write_png
from fastdit.training.state import VAE
from fastdit.training.watchdog import MONITORS, Watchdog

ABOUT = "about.json"  # in the folder of diffusers: what was measured
SEED = 0xE7A1  # of the choice of images, in every run


class VaeMonitor:
    """Measures the EMA every so many steps and at the end, and writes it to run_dir/vae.

    `vae` is copied before it is trained. `reader` has the images to measure on, and `held_out` says whether they are
    not trained on. `begin` gives it what the run has; then it is called after every step.
    """

    def __init__(self, config: AutoencoderConfig, vae: nn.Module, reader: PixelReader, held_out: bool, ranks: Ranks,
                 lpips: Perceptual | None):  # fmt: skip
        settings = config.training
        self.config, self.ranks, self.run_dir, self.held_out = config, ranks, Path(config.run_dir), held_out
        self.every = settings.checkpoint_every if settings.evaluate_every is None else settings.evaluate_every
        self.vae = copy.deepcopy(vae).eval().requires_grad_(False)
        count = min(settings.evaluate_images, len(reader.rows))
        if count < 2:
            raise ValueError(f"{count} image to measure on is too few; use a larger data.val_fraction")
        extractor = None
        if settings.evaluate_features:
            with keys_of_the_config():
                extractor = load_features(settings.evaluate_features, ranks.device)
        chosen = permutation(SEED, 0, len(reader.rows))[:count]
        self.quality = Quality(own_blocks(reader.read, chosen, ranks), count, ranks, extractor, lpips)

    def begin(self, engine: TorchEngine, ema: EMA, log: Log, watchdog: Watchdog, start: int) -> None:
        """Before the first step. Measures at `start` if the run was stopped before that was done."""
        self.engine, self.ema, self.log, self.watchdog = engine, ema, log, watchdog
        missing = False
        if self.ranks.is_main:
            for path in sheets(self.run_dir / FOLDER):
                if step_of(path) > start:
                    path.unlink()
            measured = [r["step"] for r in read_records(self.run_dir / "metrics.jsonl") if "psnr" in r]
            missing = start not in measured or not (self.run_dir / VAE).is_dir()
        if self.ranks.any(missing):
            self(start)

    def __call__(self, step: int) -> float:
        """Measure if that is due after step number `step`; returns the seconds that it took."""
        last = self.config.training.steps
        if not step or not (step == last or (self.every and step % self.every == 0)):
            return 0.0
        begun = time.perf_counter()
        own = dict(self.vae.named_parameters())
        with torch.no_grad():
            for name, tensor in self.engine.full_state(self.ema.average):
                own[name.removeprefix(PREFIX)].copy_(tensor)
        found, latents, outputs = self.quality(self.vae, lambda: self.watchdog.at(step, MONITORS))
        if self.ranks.is_main:
            self._report(step, found, latents, outputs, begun)
        self.ranks.barrier()
        return time.perf_counter() - begun

    def _report(self, step: int, found: dict, latents: Tensor, outputs: Tensor, begun: float) -> None:
        factor = self.config.model.scaling_factor or 1 / max(found["latent_std_all"], 1e-9)
        scale, shift = scale_and_shift(self.vae.config, factor)  # of each channel, of some autoencoders
        mean, std = (np.array(found[key]) for key in ("latent_mean", "latent_std"))
        remarks = scale_remarks((mean - np.array(shift)) * np.array(scale), std * np.array(scale), scale)
        picture = self._sheet(latents, outputs)
        folder = self.run_dir / FOLDER
        folder.mkdir(exist_ok=True)
        write_png(picture, folder / NAME.format(step))
        height = outputs.shape[1]
        over_time = strip(folder, height, row=2)
        write_png(over_time, folder / "strip.png")
        own = {key: list(value) if isinstance(value, tuple) else value
               for key, value in (("scaling_factor", scale), ("shift_factor", shift))}  # fmt: skip
        values = {**found, **own, "monitor_s": time.perf_counter() - begun}
        self.log.record(step, values, {"reconstructions": picture, "reconstructions_over_time": over_time})
        self._write(step, found, factor)
        write_curves(self.run_dir)
        names = {"psnr": "PSNR {:.2f} dB", "ssim": "SSIM {:.4f}", "lpips": "LPIPS {:.4f}", "frechet": "FD {:.3f}"}
        told = ", ".join(text.format(found[name]) for name, text in names.items() if name in found)
        where = "held-out images" if self.held_out else "training images"
        self.log.say(f"step {step}  {self.quality.count} {where}: {told}; latents: mean {rounded(mean)}, std "
                     f"{rounded(std)}, scaling_factor {in_words(scale)}")  # fmt: skip
        for line in remarks:
            self.log.say(f"warning: {line}")

    def _sheet(self, latents: Tensor, outputs: Tensor) -> np.ndarray:
        """Rows of images, the first three channels of their latents, and reconstructions: uint8 (H', W', 3)."""
        n = min(self.config.training.sheet_images, self.quality.count, len(outputs))
        images, outputs = self.quality.own[0][:n], outputs[:n].numpy()  # (n, H, W, 3)
        z = latents[:n, [0, min(1, latents.shape[1] - 1), min(2, latents.shape[1] - 1)]]  # (n, 3, h, w)
        center, spread = z.mean((0, 2, 3), keepdim=True), z.std((0, 2, 3), keepdim=True)
        z = ((z - center) / (5 * spread.clamp(min=1e-9)) + 0.5).clamp(0, 1)  # 2.5 deviations to both sides
        z = torch.nn.functional.interpolate(z, images.shape[1:3])  # nearest
        return sheet(np.concatenate([images, (255 * z).byte().movedim(1, -1).numpy(), outputs]), n)

    def _write(self, step: int, found: dict, scale: float) -> None:
        """The EMA in run_dir/vae, with its scale in config.json and what was measured in ABOUT."""
        self.vae.register_to_config(scaling_factor=float(scale))
        partial, final = self.run_dir / f"{VAE}.partial", self.run_dir / VAE
        shutil.rmtree(partial, ignore_errors=True)
        self.vae.save_pretrained(partial)
        about = {"step": step, "parameters": sum(p.numel() for p in self.vae.parameters()),
                 "images": self.quality.count, "held_out": self.held_out, **found}  # fmt: skip
        (partial / ABOUT).write_text(json.dumps(about, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
