"""fastdit: fast, reproducible and resumable training of diffusion transformers (DiT, SiT)."""

import logging
import os

__version__ = "0.1.0"

# Set before torch loads OpenMP: waiting threads sleep instead of spinning. On cores shared with other programs,
# spinning threads keep the working ones from running: 2 steps/s instead of 30 in one measurement.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

API = ("load", "extract", "train", "Model")


def __getattr__(name: str):
    """load, extract, train and Model, from api.py: only their first use imports PyTorch."""
    if name not in API:
        raise AttributeError(f"module 'fastdit' has no attribute {name!r}")
    from fastdit import api

    return getattr(api, name)


# diffusers imports torchao if it is installed, and three loggers then warn about libraries for other GPUs
for _name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao"):
    logging.getLogger(_name).setLevel(logging.ERROR)
