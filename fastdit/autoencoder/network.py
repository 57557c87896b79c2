"""The AutoencoderKL of a run: built from its config, loaded from another folder, or as a checkpoint describes it."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from fastdit.autoencoder.config import NetworkConfig
from fastdit.data.autoencoders import load_autoencoder
from fastdit.files import read_json

ARCHITECTURE = "vae.json"  # in a checkpoint: the config of diffusers


def build_autoencoder(config: NetworkConfig, image_size: int, seed: int | None = None) -> nn.Module:
    """An untrained AutoencoderKL of diffusers (Rombach et al. 2022, arXiv 2112.10752), its weights from `seed`.

    Without a seed, they are from PyTorch's global generator, which a seed leaves as it was.
    """
    from diffusers import AutoencoderKL  # takes seconds to import

    blocks = len(config.channels)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * blocks,
            up_block_types=["UpDecoderBlock2D"] * blocks,
            block_out_channels=config.channels,
            layers_per_block=config.layers,
            latent_channels=config.latent_channels,
            norm_num_groups=config.norm_groups,
            mid_block_add_attention=config.attention,
            sample_size=image_size,
        )


def pretrained(name: str) -> nn.Module:
    """The AutoencoderKL of a folder or a hub name, with its weights; ValueError for another kind."""
    try:
        vae = load_autoencoder(name)
    except ValueError as error:
        raise ValueError(str(error).replace("vae=", "training.init_from=", 1)) from None
    if type(vae).__name__ != "AutoencoderKL":
        raise ValueError(f"training.init_from={name} is an {type(vae).__name__}; only an AutoencoderKL can be trained")
    return vae


def as_config(vae: nn.Module, scaling_factor: float | None) -> NetworkConfig:
    """The section `model` that describes an AutoencoderKL."""
    found = vae.config
    return NetworkConfig(
        channels=tuple(found.block_out_channels),
        layers=found.layers_per_block,
        latent_channels=found.latent_channels,
        norm_groups=found.norm_num_groups,
        attention=found.mid_block_add_attention,
        scaling_factor=scaling_factor,
    )


def not_taken(given: NetworkConfig, network: NetworkConfig) -> list[str]:
    """A line for each setting of the section `model` that is another one in the network of training.init_from."""
    default, chosen, own = vars(NetworkConfig()), vars(given), vars(network)
    return [
        f"model.{key}={chosen[key]} changes nothing: the autoencoder of training.init_from has {own[key]}"
        for key in own
        if key != "scaling_factor" and chosen[key] not in (default[key], own[key])
    ]


def from_checkpoint(folder: Path) -> nn.Module:
    """The untrained AutoencoderKL that a checkpoint holds the weights of; ValueError if its description is damaged."""
    from diffusers import AutoencoderKL

    path = folder / ARCHITECTURE
    try:
        return AutoencoderKL.from_config(read_json(path))
    except Exception as error:  # diffusers accepts any settings, and fails in any way
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} describes no AutoencoderKL ({type(error).__name__}: {reason})") from None


def write_architecture(vae: nn.Module, folder: Path) -> None:
    described = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    (folder / ARCHITECTURE).write_text(json.dumps(described, indent=1))


class Reconstruction(nn.Module):
    """Pixels and noise -> reconstruction, mean and log variance of the posterior, in fp32.

    `frozen`: the encoder is not trained, and no gradient goes through the latents.
    """

    def __init__(self, vae: nn.Module, frozen: bool = False):
        super().__init__()
        self.vae, self.frozen = vae, frozen
        if frozen:
            for module in filter(None, (vae.encoder, vae.quant_conv)):
                module.requires_grad_(False)

    @property
    def last_layer(self) -> nn.Parameter:
        """Its weight (3, C, 3, 3), for the adversarial loss's weight."""
        return self.vae.decoder.conv_out.weight

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """pixels (n, 3, H, W) in [-1, 1], noise (n, C, h, w)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            posterior = self.vae.encode(pixels).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()  # (n, C, h, w)
        z = mean + (0.5 * logvar).exp() * noise
        return self.vae.decode(z).sample.float(), mean, logvar

    def compile(self) -> None:
        """Compile the blocks. The last layer stays outside: its gradient is also asked for alone.

        Each is compiled for fixed sizes, because Inductor (2.13) fails on dynamic ones on a CPU.
        """
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        encoder, decoder = self.vae.encoder, self.vae.decoder
        for block in (*encoder.down_blocks, encoder.mid_block, decoder.mid_block, *decoder.up_blocks):
            block.compile(dynamic=False)
