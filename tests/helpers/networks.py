"""Small DiTs with each option, and inputs for them."""

import pytest
import torch
from torch import Tensor

from fastdit.models.blocks import BLOCKS
from fastdit.models.dit import DiT
from fastdit.models.layers import ACTIVATIONS

OPTIONS = {
    "official": {},
    **{block: {"block": block} for block in BLOCKS if block != "adaln_zero"},
    **{mlp: {"mlp": mlp} for mlp in ACTIVATIONS if mlp != "gelu_tanh"},
    "narrow": {"mlp_ratio": 1.5},
    "rms": {"norm": "rms"},
    "qk_rms": {"qk_norm": "rms"},
    "qk_layer": {"qk_norm": "layer"},
    "rope": {"position": "rope"},
    "sincos_rope": {"position": "sincos_rope"},
    "registers": {"registers": 3},
    "no_bias": {"qkv_bias": False, "proj_bias": False, "mlp_bias": False},
    "dropout": {"dropout": 0.2},
    "transposed_conv": {"unpatchify": "transposed_conv"},
    "decoder": {"decoder_blocks": 1},
    "wide": {"input_size": (4, 10)},
    "unconditional": {"num_classes": 0, "block": "in_context"},
}
EVERYTHING = {
    "norm": "rms", "qk_norm": "rms", "mlp": "swiglu", "position": "sincos_rope", "registers": 3, "qkv_bias": False,
    "mlp_bias": False, "dropout": 0.2, "unpatchify": "transposed_conv", "input_size": (4, 10),
}  # fmt: skip
COMBINED = {f"{block}_with_all": {"block": block, **EVERYTHING} for block in BLOCKS}
COMBINED["decoder_with_all"] = {"decoder_blocks": 2, "block": "adaln", "depth": 3, **EVERYTHING}
OPTIONS |= COMBINED
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def small(**options) -> DiT:
    """Two blocks, three heads of 8, every weight perturbed after its initialization."""
    torch.manual_seed(0)
    arguments = {"input_size": 6, "hidden_size": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    model = DiT(**arguments | options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def batch(model: DiT, n: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    height, width = (side * model.patch_size for side in model.grid)
    y = torch.randint(0, 6, (n,), generator=generator) if model.num_classes else None
    return torch.randn(n, 4, height, width, generator=generator), torch.rand(n, generator=generator), y


def gradients(model: DiT) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(*batch(model))
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}
