"""`fastdit doctor`: what this machine can do, in one page to read, or to paste into an issue."""

import os
import platform
import shutil
import sys

import torch

from fastdit import __version__, kernels
from fastdit.cards import card_of
from fastdit.environment import PACKAGES, version
from fastdit.errors import counted
from fastdit.models.attention import ATTENTION, obstacle, resolve

HEAD_DIM, TOKENS = 72, 256  # DiT-XL/2 at 256 px


def report() -> str:
    """Versions, devices, and which kernels and attention backends work here."""
    lines = [f"fastdit {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines += [f"{name:14}{version(name) or 'not installed'}" for name in PACKAGES]
    cpu = ", ".join([counted(os.cpu_count(), "core"), counted(torch.get_num_threads(), "thread"),
                     torch.backends.cpu.get_cpu_capability()])  # fmt: skip
    lines += [f"{'CPU':14}{cpu}"]
    lines += [f"{'disk':14}{shutil.disk_usage('.').free / 2**30:.0f} GiB free here"]
    lines += _gpus() or [f"{'GPU':14}none that PyTorch can use; training runs on the CPU"]
    lines += [f"{'kernels':14}{kernels.choice()}"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines += [f"{'attention':14}auto is {resolve('auto', device=device, head_dim=HEAD_DIM, tokens=TOKENS)}"]
    for name in ATTENTION:
        reason = obstacle(name, device=device, head_dim=HEAD_DIM, tokens=TOKENS)
        lines.append(f"{'':14}{name}: {reason or 'works'}")
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    launchers = [name for name in ("torchrun", "deepspeed") if shutil.which(name, path=path)]
    return "\n".join([*lines, f"{'launchers':14}{', '.join(launchers) or 'none'}"])


def _gpus() -> list[str]:
    lines = []
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        known = "" if card_of(torch.device("cuda", i)) else ", unknown to fastdit plan"
        bf16 = "bf16" if about.major >= 8 else "no bf16: use training.precision=fp32"
        size = f"{about.total_memory / 2**30:.0f} GiB"
        lines.append(f"{f'GPU {i}':14}{about.name}, {size}, sm_{about.major}{about.minor}, {bf16}{known}")
    return lines
