"""diffusers autoencoders: from a folder, a pipeline's folder or the Hugging Face hub, and how each is recognized.

With NO_VAE in place of a name, latents are the pixels themselves.
"""

import hashlib
import json
import queue
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from fastdit.errors import counted
from fastdit.files import read_json

KINDS = ("AutoencoderKL", "AutoencoderDC")  # Rombach et al. 2022, arXiv 2112.10752; Chen et al. 2024, arXiv 2410.10733
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
NO_VAE = "none"
HUB_TIMEOUT_S = 5.0
MAX_LAYERS = 100  # of a block: more would take hours to build
# The config entries of an AutoencoderKL that affect latents or decoded pixels; the rest is bookkeeping.
FINGERPRINTED = (
    "act_fn", "block_out_channels", "down_block_types", "in_channels", "latent_channels", "layers_per_block",
    "mid_block_add_attention", "norm_num_groups", "out_channels", "scaling_factor", "shift_factor", "up_block_types",
    "use_post_quant_conv", "use_quant_conv",
)  # fmt: skip
DECODER = ("decoder.", "post_quant_conv.")  # weights that do not change the latents of an image


class Pixels(nn.Module):
    """In place of an autoencoder: latents (N, 3, H, W) are pixels in [-1, 1], and the posterior's deviation is 0."""

    config = SimpleNamespace(scaling_factor=1.0, block_out_channels=(3,), latent_channels=3)
    dtype = torch.float32  # bfloat16 would not keep 256 levels

    def encode(self, pixels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(latent=pixels)

    def decode(self, latents: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=latents)


def load_autoencoder(name: str | Path) -> nn.Module:
    """The autoencoder in a folder from save_pretrained, a pipeline's folder (with `vae/` in it) or a hub repository.

    NO_VAE: `Pixels`. A repository is taken from the local cache if it is there. Raises a one-line ValueError if there
    is none, if it is not complete or not one of KINDS, or if the hub does not answer within HUB_TIMEOUT_S.
    """
    if str(name) == NO_VAE:
        return Pixels()
    import diffusers  # takes seconds to import

    folder = Path(name)
    if folder.is_file():
        raise ValueError(f"vae={name} is a file; an autoencoder in the format of latent-diffusion becomes a folder "
                         f"with fastdit convert {name} --to diffusers --out FOLDER")  # fmt: skip
    if not folder.is_dir():
        if folder.exists() or not _is_hub_name(str(name)):
            raise ValueError(
                f"vae={name} is not a folder; give one written by save_pretrained, a hub name such as "
                f"stabilityai/sd-vae-ft-ema, or {NO_VAE} for pixels"
            )
        folder = _hub_folder(str(name))
    if (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    kind = _kind(folder)
    try:
        vae, loading = getattr(diffusers, kind).from_pretrained(
            str(folder), output_loading_info=True, torch_dtype=torch.float32, local_files_only=True
        )
    except Exception as error:  # safetensors, pickle and diffusers' errors have no common base class
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"vae={name} cannot be read: {type(error).__name__}: {reason}") from error
    if missing := sorted(loading["missing_keys"]):  # diffusers initializes them randomly
        raise ValueError(
            f"vae={name} is missing {counted(len(missing), 'weight')} (the first is {missing[0]}); "
            f"save it again with {kind}.save_pretrained"
        )
    return vae


def from_unit_range(vae: nn.Module) -> nn.Module:
    """An AutoencoderKL that was used with pixels in [0, 1], changed in place to the same one for pixels in [-1, 1].

    It decodes exactly the same images. It encodes them with small differences at the border, where the first
    convolution pads with zeros: black before, gray now.
    """
    first, last = vae.encoder.conv_in, vae.decoder.conv_out
    with torch.no_grad():
        first.bias += first.weight.sum((1, 2, 3)) / 2  # x = (pixel + 1) / 2
        first.weight /= 2
        last.weight *= 2
        last.bias.mul_(2).sub_(1)
    return vae


def fingerprint(vae: nn.Module, without: tuple[str, ...] = ()) -> str:
    """SHA-256 of the config entries that matter and the weights as little-endian fp32, sorted by name.

    `without`: prefixes of names to leave out; DECODER gives the fingerprint of the encoder.
    """
    if isinstance(vae, Pixels):
        config = {"pixels": 1}
    elif type(vae).__name__ == "AutoencoderKL":
        config = {key: getattr(vae.config, key, None) for key in FINGERPRINTED}
        found = {key: getattr(vae.config, key, None) for key in ("latents_mean", "latents_std")}
        config |= {key: value for key, value in found.items() if value is not None}
    else:
        config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for key, value in sorted(vae.state_dict().items()):
        if key.startswith(without):
            continue
        array = value.detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(f"{key} {array.shape}".encode())
        digest.update(array.astype("<f4", copy=False).data)
    return digest.hexdigest()


def _kind(folder: Path) -> str:
    path = folder / "config.json"
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise ValueError(
            f"vae={folder} has no config.json; give a folder written by AutoencoderKL.save_pretrained"
        ) from None
    except ValueError as error:
        raise ValueError(f"vae={error}; save the autoencoder again") from None
    for key in ("layers_per_block", "encoder_layers_per_block", "decoder_layers_per_block"):
        layers = config.get(key, 1)
        for count in layers if isinstance(layers, list) else [layers]:
            if type(count) is not int or not 1 <= count <= MAX_LAYERS:
                raise ValueError(f"vae={path}: {key}={layers!r} is out of range; use 1 to {MAX_LAYERS}")
    kind = config.get("_class_name")
    if kind not in KINDS:
        raise ValueError(f"vae={folder} is of class {kind}, which is not supported; use an {' or an '.join(KINDS)}")
    return kind


def _is_hub_name(name: str) -> bool:
    """Whether a name that is no folder can be OWNER/REPOSITORY. Below an existing folder it is a misspelled path."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)) and not Path(name).parent.exists()


def _hub_folder(name: str) -> Path:
    """Where the local cache has a repository's autoencoder; downloads it if it is not there."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    for below in ("vae/", ""):
        config, *weights = (try_to_load_from_cache(name, below + file) for file in ("config.json", *WEIGHTS))
        if isinstance(config, str) and any(isinstance(path, str) for path in weights):
            return Path(config).parent
    answer: queue.Queue = queue.Queue()

    def ask() -> None:
        try:
            answer.put(HfApi().model_info(name, timeout=HUB_TIMEOUT_S))
        except Exception as error:  # the HTTP library's, which depends on the version
            answer.put(error)

    threading.Thread(target=ask, daemon=True).start()  # the look-up of a host's address has no time limit of its own
    try:
        info = answer.get(timeout=HUB_TIMEOUT_S)
        if isinstance(info, HfHubHTTPError):
            reason = str(info).strip().partition("\n")[0]
            raise ValueError(f"vae={name} is no local folder, and the hub refuses it: {type(info).__name__}: {reason}")
        if isinstance(info, Exception):
            raise info
        files = {sibling.rfilename for sibling in info.siblings}
        below = "vae/" if "vae/config.json" in files else ""
        wanted = ["config.json", next((file for file in WEIGHTS if below + file in files), WEIGHTS[0])]
        return Path([hf_hub_download(name, below + file) for file in wanted][0]).parent
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f'cannot reach the hub; run "hf download {name} --local-dir vae" elsewhere, then --vae vae'
        ) from error
