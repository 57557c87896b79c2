"""fastdit: fast, reproducible and resumable training of diffusion transformers (DiT, SiT)."""

import logging
import os

__version__ = "0.1.0"

# Set before torch loads OpenMP: a waiting thread spins for some microseconds, then sleeps. Threads that always sleep
# waste the short pauses between operators; threads that spin on cores shared with other programs keep the working ones
# from running (bench/LOG.md). The user's own setting is kept.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}

API = ("load", "grid", "extract", "train", "train_vae", "Model")


def __getattr__(name: str):
    """load, grid, extract, train, train_vae and Model, from api.py: only their first use imports PyTorch."""
    if name not in API:
        raise AttributeError(f"module 'fastdit' has no attribute {name!r}")
    from fastdit import api

    return getattr(api, name)


# diffusers imports torchao if it is installed, and three loggers then warn about libraries for other GPUs
for _name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao"):
    logging.getLogger(_name).setLevel(logging.ERROR)
