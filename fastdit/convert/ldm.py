"""Autoencoders in the format of latent-diffusion (VA-VAE, CompVis' kl-f8, ...) as folders of diffusers.

The network is the AutoencoderKL of Rombach et al. 2022 (arXiv 2112.10752); diffusers has the same layers under other
names, and numbers the decoder's blocks from the lowest resolution. The architecture is inferred from the shapes, and
nothing but tensors is read from a file.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.convert.pickles import is_plain, read_pickle
from fastdit.data.autoencoders import MAX_LAYERS, load_autoencoder
from fastdit.errors import counted
from fastdit.files import staged
from fastdit.training.weights import header, is_finite, mismatches, read_weights

PARTS = ("encoder", "decoder", "quant_conv", "post_quant_conv")
EMA = "model_ema"  # of names without dots
FIRST, GROUPS = "encoder.conv_in.weight", 32  # a name that every such file has; of all group norms in this format
OURS = (  # names in the file -> names of diffusers, applied one after the other
    (r"\b(down|up)\.(\d+)\.block\.", r"\1_blocks.\2.resnets."),
    (r"\b(down|up)\.(\d+)\.attn\.", r"\1_blocks.\2.attentions."),
    (r"\b(down|up)\.(\d+)\.(down|up)sample\.", r"\1_blocks.\2.\3samplers.0."),
    (r"\bmid\.block_1\.", "mid_block.resnets.0."),
    (r"\bmid\.block_2\.", "mid_block.resnets.1."),
    (r"\bmid\.attn_1\.", "mid_block.attentions.0."),
    (r"\bnin_shortcut\b", "conv_shortcut"),
    (r"(?<=coder\.)norm_out\b", "conv_norm_out"),
)
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


@dataclass(frozen=True)
class Found:
    """The tensors of an autoencoder in a file, and how many others there are, by the first part of their names.

    `ema`: their EMA, {} if there is none. `scale`: what latent-diffusion multiplies latents by, if the file states it.
    """

    state: dict[str, Any]
    ema: dict[str, Any]
    others: dict[str, int]
    scale: float | None = None


def find_autoencoder(path: Path) -> Found | None:
    """The autoencoder in a .ckpt, .pt or .safetensors file of this format; None for another kind of file."""
    if path.suffix == ".safetensors":
        content: Any = read_weights(path) if any(name.endswith(FIRST) for name in header(path)) else {}
    else:
        content = read_pickle(path, stand_ins=True)
    whole = content
    for key in ("state_dict", "model"):  # Lightning's, and MAR's
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    names = [name for name in content if isinstance(name, str)] if isinstance(content, Mapping) else []
    prefixes = sorted((name.removesuffix(FIRST) for name in names if name.endswith(FIRST)), key=len)
    if not prefixes:
        return None
    if len(prefixes) > 1:
        known = " and ".join(f"{prefix}*" for prefix in prefixes)
        raise ValueError(f"{path} has {len(prefixes)} autoencoders, {known}; save one of them in a file of its own")
    inside = {name: name.removeprefix(prefixes[0]) for name in names if name.startswith(prefixes[0])}
    own = {name: short for name, short in inside.items() if short.partition(".")[0] in PARTS}
    beside = whole.get("ema") if whole is not content else None  # as a set of its own, with the same names
    dotless = {name: f"{prefixes[0]}{EMA}.{short.replace('.', '')}" for name, short in own.items()}
    if isinstance(beside, Mapping):
        ema = {short: beside[name] for name, short in own.items() if name in beside}
    else:
        ema = {own[name]: content[averaged] for name, averaged in dotless.items() if averaged in content}
    others = Counter(name.removeprefix(prefixes[0]).partition(".")[0] for name in names if name not in own)
    if ema:
        others.pop(EMA, None)
    scale = content.get("scale_factor")  # of a whole latent-diffusion model
    scale = float(scale) if isinstance(scale, Tensor) and scale.numel() == 1 and is_plain(scale) else None
    return Found({short: content[name] for name, short in own.items()}, ema, dict(others), scale)


def convert_autoencoder(
    path: Path,
    found: Found,
    out: Path,
    scale: float | None = None,
    shift: float = 0.0,
    weights: str | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Write the folder `out` for `--vae` and `data.vae`.

    `scale`: its scaling_factor (None: that in the file, else 1, latents as they are). `shift`: its shift_factor, which
    is subtracted before. `weights`: "ema" takes the EMA; by default it is left out, because latent-diffusion encodes
    without it.
    ValueError, before anything is written, for a network that an AutoencoderKL of diffusers cannot express.
    """
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"--scale={scale} must be a positive number")
    if not math.isfinite(shift):
        raise ValueError(f"--shift={shift} must be a number")
    if weights == "ema" and not found.ema:
        raise ValueError(f"--weights=ema, but {path} has no EMA; leave it out")
    if "quantize" in found.others:
        raise ValueError(f"{path} has a codebook (quantize.*), as a VQ autoencoder; only those with a KL loss convert")
    if weights is None and found.ema:
        say(f"{path}: its EMA is left out, as latent-diffusion encodes without it; --weights ema converts it")
    if scale is None and found.scale is not None:
        if not 0 < found.scale < float("inf"):
            raise ValueError(f"{path} has scale_factor={found.scale}, not a positive number; give --scale")
        scale = found.scale
        say(f"scaling_factor={scale:g}, the scale_factor in the file")
    state = checked(found.ema if weights == "ema" else found.state, path)
    vae = autoencoder(state, path, scale or 1.0, shift)
    if found.others:
        left = ", ".join(f"{name} ({count})" for name, count in found.others.items())
        say(f"{path}: tensors that are not of the autoencoder are left out: {left}")
    config = vae.config
    attention = [2**i for i, kind in enumerate(config.down_block_types) if kind.startswith("Attn")]
    say(f"{path}: AutoencoderKL, channels {list(config.block_out_channels)}, "
        f"{counted(config.layers_per_block, 'layer')}, downsampling {2 ** (len(config.block_out_channels) - 1)}, "
        f"{counted(config.latent_channels, 'latent channel')}"
        + (f", attention at 1/{', 1/'.join(map(str, attention))} of the size" if attention else ""))  # fmt: skip
    if scale is None:
        say("scaling_factor=1, because the file does not state it: give --scale (Stable Diffusion: 0.18215), or train "
            "with data.normalize=channel")  # fmt: skip
    with staged(out) as stage:
        vae.save_pretrained(stage)
        again = load_autoencoder(stage).state_dict()
        for name, tensor in vae.state_dict().items():
            if not torch.equal(again[name], tensor):
                raise ValueError(f"{out} is not written, because {name} would read back differently; please report it")
    say(f"{out}: written; use it with fastdit extract --vae {quote(str(out))}")
    return out


def checked(state: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """fp32 tensors under the names of the file; ValueError for what is none, or not finite."""
    names = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or not is_plain(value):
            raise ValueError(f"{path}: {name} is not a tensor of plain numbers; save it as a state dict in float32")
        names[name] = value.float()
        if not is_finite(names[name]):
            raise ValueError(f"{path}: {name} has values that are not finite; use another checkpoint")
    return names


def autoencoder(state: Mapping[str, Tensor], path: Path, scale: float, shift: float) -> nn.Module:
    """The AutoencoderKL of diffusers with these weights; ValueError where it has no such layers."""
    from diffusers import AutoencoderKL  # takes seconds to import

    if any(".down_blocks." in name for name in state):
        raise ValueError(f"{path} has the names of diffusers already; put it into a folder with its config.json, as "
                         "diffusion_pytorch_model.safetensors, and give that folder as --vae")  # fmt: skip
    numbers = {kind: [(int(m[1]), int(m[2])) for name in state if (m := re.match(pattern, name))]
               for kind, pattern in (("down", r"encoder\.down\.(\d{1,3})\.block\.(\d{1,3})\."),
                                     ("attention", r"encoder\.down\.(\d{1,3})\.attn\.(\d{1,3})\."),
                                     ("up", r"decoder\.up\.(\d{1,3})\.attn\.(\d{1,3})\."))}  # fmt: skip
    levels, layers = (1 + max((pair[i] for pair in numbers["down"]), default=-1) for i in (0, 1))
    first = state.get("decoder.conv_in.weight")
    latent = first.shape[1] if first is not None and first.ndim == 4 else 0
    widths = [state.get(f"encoder.down.{i}.block.0.conv1.weight") for i in range(levels)]
    if not (0 < layers <= MAX_LAYERS and latent) or any(width is None or width.ndim != 4 for width in widths):
        raise ValueError(f"{path} is no complete autoencoder of latent-diffusion: it needs encoder.down.*.block.* and "
                         "decoder.conv_in.weight")  # fmt: skip
    channels = [width.shape[0] for width in widths]
    if any(width % GROUPS for width in channels):
        raise ValueError(f"{path} has channels {channels}; the group norms of latent-diffusion need multiples of "
                         f"{GROUPS}, so this is another network")  # fmt: skip
    embedded = state.get("post_quant_conv.weight")
    if embedded is not None and embedded.ndim > 1 and embedded.shape[1] != latent:
        raise ValueError(f"{path} has embed_dim={embedded.shape[1]} and z_channels={latent}; an AutoencoderKL of "
                         "diffusers has one number for both")  # fmt: skip
    attended = {kind: {level for level, _ in numbers[kind]} for kind in ("attention", "up")}
    down, up = (["Attn" * (i in attended[kind]) + name for i in range(levels)]
                for kind, name in (("attention", "DownEncoderBlock2D"), ("up", "UpDecoderBlock2D")))  # fmt: skip
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=down,
            up_block_types=up[::-1],
            block_out_channels=channels,
            layers_per_block=layers,
            latent_channels=latent,
            norm_num_groups=GROUPS,
            mid_block_add_attention="encoder.mid.attn_1.q.weight" in state,
            use_quant_conv="quant_conv.weight" in state,
            use_post_quant_conv="post_quant_conv.weight" in state,
            scaling_factor=scale,
            shift_factor=shift or None,
        )
    theirs = {renamed(name, levels): name for name in state}
    weights = {new: state[old] for new, old in theirs.items()}
    weights = {name: t[:, :, 0, 0] if ".attentions." in name and t.ndim == 4 else t for name, t in weights.items()}
    if wrong := mismatches(vae.state_dict(), weights):
        new = wrong[0].partition(" ")[0]
        raise ValueError(f"{path} does not fit into an AutoencoderKL of diffusers "
                         f"({counted(len(wrong), 'tensor')}; the first: "
                         f"{theirs.get(new, new)}{wrong[0].removeprefix(new)})")  # fmt: skip
    vae.load_state_dict(weights, assign=True)
    return vae.eval()


def renamed(name: str, levels: int) -> str:
    """The name of diffusers for that of a tensor in the file."""
    for pattern, ours in OURS:
        name = re.sub(pattern, ours, name)
    name = re.sub(r"(?<=\bup_blocks\.)\d+", lambda m: str(levels - 1 - int(m[0])), name)
    return re.sub(r"(attentions\.\d+\.)(\w+)", lambda m: m[1] + ATTENTION.get(m[2], m[2]), name)
