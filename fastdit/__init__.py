"""fastdit: diffusion transformers (DiT, SiT), trained fast, exactly and resumably."""

import logging
import os

__version__ = "0.1.0"

# Before torch loads OpenMP: waiting threads sleep. By default they spin, and on cores that are shared with anybody
# else a step then waits for a thread that spins for another: measured 2 steps/s where this gives 30.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# diffusers imports torchao wherever it is installed, and three loggers then tell of libraries for other GPUs
for _name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao"):
    logging.getLogger(_name).setLevel(logging.ERROR)
