"""What a checkpoint of an autoencoder's training holds, written and read side by side.

run_dir/checkpoints/step-0000500/
    config.yaml                    the resolved config of the run
    vae.json                       the architecture, as in the config.json of diffusers
    model.safetensors              the autoencoder's weights in fp32, under the names of diffusers
    ema.safetensors                their exponential moving average
    exp_avg.safetensors            AdamW's running mean of the gradient, of the weights that are trained
    exp_avg_sq.safetensors         AdamW's running mean of its square
    discriminator*.safetensors     the discriminator's weights, and its two means (_exp_avg, _exp_avg_sq)
    progress.safetensors           numbers of updates, the adversarial weight, the losses since the last log line
    checkpoint.json                "kind": "autoencoder", step, ... and the size and SHA-256 of every file
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.autoencoder.config import AutoencoderConfig
from fastdit.autoencoder.discriminator import PatchDiscriminator
from fastdit.autoencoder.network import write_architecture
from fastdit.config import load_config, save_config, to_tree
from fastdit.training import checkpoint
from fastdit.training.ema import EMA
from fastdit.training.engine import MOMENTS, TorchEngine, moments_of, set_moments
from fastdit.training.log import LossWindow
from fastdit.training.state import AUTOENCODER, CONFIG, below, check_files, check_steps
from fastdit.training.weights import read_weights, write_weights

CRITIC, PREFIX = "discriminator", "vae."  # the prefix of names in Reconstruction
MUST_STAY = {
    "": ("seed",),
    "data": ("image_size", "val_fraction"),
    "model": ("channels", "layers", "latent_channels", "norm_groups", "attention"),
    "discriminator": ("channels", "layers"),
    "training": ("global_batch", "init_from", "decoder_only"),
}  # section -> keys that describe a run from its first step


@dataclass
class AutoencoderState:
    """Everything of a run that changes from step to step."""

    config: AutoencoderConfig
    engine: TorchEngine
    critic: TorchEngine | None
    ema: EMA
    weight: Tensor
    window: LossWindow

    def snapshot(self) -> dict[str, dict[str, Tensor]]:
        """A copy in host memory, by file and name."""
        moments, updates = moments_of(self.engine)
        masters = dict(self.engine.full_state(self.engine.master_parameters()))
        whole = {name: masters.get(name, tensor) for name, tensor in self.engine.module.state_dict().items()}
        files = {"model": whole, "ema": whole | dict(self.engine.full_state(self.ema.average))}
        files |= {name: dict(self.engine.full_state(tensors)) for name, tensors in moments.items()}
        files = {name: {key.removeprefix(PREFIX): t for key, t in state.items()} for name, state in files.items()}
        progress = {f"window.{name}": total for name, total in self.window.sums.items()}
        progress |= {"updates": torch.tensor(updates), "adversarial_weight": self.weight}
        if self.critic:
            moments, progress["discriminator_updates"] = moments_of(self.critic)
            progress["discriminator_updates"] = torch.tensor(progress["discriminator_updates"])
            files[CRITIC] = self.critic.module.state_dict()
            files |= {f"{CRITIC}_{name}": dict(self.critic.full_state(tensors)) for name, tensors in moments.items()}
        files["progress"] = progress
        return {name: {key: t.detach().to("cpu", copy=True) for key, t in state.items()}
                for name, state in files.items()}  # fmt: skip

    def load(self, folder: Path) -> int:
        """Restore all but the weights from a checkpoint, and return its step."""
        progress = read_weights(folder / "progress.safetensors")
        files = {name: read_weights(folder / f"{name}.safetensors") for name in (*MOMENTS, "ema")}
        moments = {name: self.engine.partition({f"{PREFIX}{key}": tensor for key, tensor in state.items()})
                   for name, state in files.items()}  # fmt: skip
        self.ema.load(moments.pop("ema"))
        set_moments(self.engine, moments, int(progress["updates"]))
        self.weight.copy_(progress["adversarial_weight"])
        self.window.load(below(progress, "window."))
        if self.critic:
            files = {name: read_weights(folder / f"{CRITIC}_{name}.safetensors") for name in MOMENTS}
            moments = {name: self.critic.partition(state) for name, state in files.items()}
            set_moments(self.critic, moments, int(progress["discriminator_updates"]))
        return checkpoint.read_meta(folder)["step"]


def write_snapshot(snapshot: Mapping[str, Mapping[str, Tensor]], config: AutoencoderConfig, vae: nn.Module,
                   folder: Path) -> None:  # fmt: skip
    """Write the files of a checkpoint, except for checkpoint.json."""
    for file, state in snapshot.items():
        write_weights(state, folder / f"{file}.safetensors")
    write_architecture(vae, folder)
    save_config(config, folder / CONFIG)


def describe(config: AutoencoderConfig, images: int, contents: str) -> dict[str, Any]:
    """The facts in checkpoint.json: its kind, and the images to train on, their number and `ImageSource.contents`."""
    return {"kind": AUTOENCODER, "model": config.model.variant, "images": images, "contents": contents}


def expected_files(vae: nn.Module, critic: nn.Module | None, frozen: bool) -> dict[str, dict[str, Tensor]]:
    """The tensors in each file of a checkpoint, but for progress; `frozen`: the encoder is not trained."""
    trained = {name: p for name, p in vae.named_parameters() if not (frozen and name.startswith(("encoder.", "quant")))}
    files = dict.fromkeys(("model", "ema"), vae.state_dict()) | dict.fromkeys(MOMENTS, trained)
    if critic is not None:
        files[CRITIC] = critic.state_dict()
        files |= {f"{CRITIC}_{name}": dict(critic.named_parameters()) for name in MOMENTS}
    return files


def build_critic(config: AutoencoderConfig) -> PatchDiscriminator | None:
    settings = config.discriminator
    return PatchDiscriminator(settings.channels, settings.layers) if settings.weight else None


def check_resume(
    folder: Path, config: AutoencoderConfig, images: int, contents: str, vae: nn.Module, critic: nn.Module | None
) -> None:
    """ValueError where the settings do not allow to continue `folder`, or where its files are not of this run."""
    meta = checkpoint.read_meta(folder)
    if meta.get("kind") != AUTOENCODER:
        raise ValueError(f"{folder} is no checkpoint of fastdit train-vae; choose another run_dir")
    check_steps(folder, config.training)
    before = load_config(folder / CONFIG, schema=AutoencoderConfig)
    found = {"images": (meta["images"], images)}
    for section, keys in MUST_STAY.items():
        own, other = (getattr(c, section) if section else c for c in (before, config))
        found |= {f"{section}.{key}".lstrip("."): (getattr(own, key), getattr(other, key)) for key in keys}
    for key, (old, new) in found.items():
        if old != new:
            old, new = to_tree(old), to_tree(new)
            raise ValueError(f"{folder} has {key}={old!r}, this run {new!r}; make them equal to resume")
    if meta.get("contents", contents) != contents:  # images that it was trained on could be held out now
        raise ValueError(f"{folder} was trained on other images than data.images={config.data.images} has now; restore "
                         "them, or choose another run_dir")  # fmt: skip
    if bool(before.discriminator.weight) != bool(config.discriminator.weight):
        old, new = before.discriminator.weight, config.discriminator.weight
        raise ValueError(f"{folder} has discriminator.weight={old}, this run {new}; a resume can change it, but "
                         "neither to 0 nor from 0")  # fmt: skip
    check_files(folder, expected_files(vae, critic, config.training.decoder_only))
