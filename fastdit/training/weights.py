"""Weights in safetensors files, which hold no code: writing, reading, and what they hold without reading all of it."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdit.files import use_umask

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def write_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file with the permissions that the umask asks for; ValueError for values that are not finite."""
    state = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    bad = [name for name, tensor in state.items() if not is_finite(tensor)]
    if bad:
        raise ValueError(
            f"{bad[0]} has values that are not finite ({len(bad)} of {len(state)} tensors), so {path.name} is "
            "not written"
        )
    try:
        save_file(state, path)
    except SafetensorError as error:  # it has the error of the operating system in words only
        if not (number := re.search(r"os error (\d+)", str(error))):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    use_umask(path)


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; both extremes are nan where one value is, and take 1/30 of isfinite's time."""
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError that names a file which is missing or damaged."""
    header(path)
    try:
        return load_file(path)
    except (SafetensorError, RuntimeError, LookupError) as error:  # of types that PyTorch, or safetensors, cannot make
        raise ValueError(f"{path} cannot be read: {error}; export it as float32") from error


def header(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, without values, on the meta device; dtypes that fastdit does not write become uint8."""
    if not path.is_file():
        raise ValueError(f"{path} is missing, or not a regular file; name a checkpoint that has it")
    try:
        with safe_open(path, "pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            kinds = {name: (part.get_shape(), TYPES.get(str(part.get_dtype()))) for name, part in parts.items()}
            return {n: torch.empty(shape, dtype=t or torch.uint8, device="meta") for n, (shape, t) in kinds.items()}
    except (SafetensorError, OSError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path} is not a safetensors file, or is damaged: {error}") from error


def mismatches(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Why `state` does not load into a network whose state dict is `expected`, one message per tensor."""
    found = [f"{name} is missing" for name in expected if name not in state]
    found += [f"{name} has no place in this network" for name in state if name not in expected]
    return found + [
        f"{name} has shape {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]


def other_types(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Likewise for the types of the tensors that both have."""
    both = {name: (tensor.dtype, state[name].dtype) for name, tensor in expected.items() if name in state}
    return [f"{name} is {own}, not {wanted}" for name, (wanted, own) in both.items() if own != wanted]
