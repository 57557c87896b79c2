"""PyTorch files, read without executing code in them."""

import argparse
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MOST_STAND_INS = 100  # classes in a file


class StandIn:
    """In place of an object that a file asks for, without anything of it."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_pickle(path: Path, stand_ins: bool = False) -> Any:
    """torch.load that executes no code: it allows only tensors, plain containers and argparse.Namespace.

    `stand_ins`: any other class in the file, such as Lightning's callbacks, becomes a StandIn instead of an error.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; name a .pt file or a folder")
    damaged, names = f"{path} is not a PyTorch checkpoint, or is damaged; download it again", []
    while True:
        try:
            with torch.serialization.safe_globals([argparse.Namespace, *((StandIn, name) for name in names)]):
                # mmap: the optimizer state of a training file is never read
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+)", str(error))
            if not found:
                raise ValueError(damaged) from error
            if not stand_ins or found[1] in names or len(names) == MOST_STAND_INS:
                raise ValueError(
                    f"{path} needs {found[1]}, which could execute code and was not loaded; "
                    "if you trust the file, save it again as a plain state dict"
                ) from error
            names.append(found[1])
        except (RuntimeError, EOFError, LookupError, ValueError, OSError) as error:
            raise ValueError(damaged) from error


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is dense, on the CPU, and no larger than its storage: a view could stand for any size."""
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    return not tensor.is_quantized and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
