"""A small world to train in, and how to run the scripts there: digits, an untrained autoencoder, their latents."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from helpers import ROOT

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def make_world(root: Path) -> Path:
    """root/{images,held_out,vae,latents} and root/config.yaml: a two-step-a-second run on a laptop."""
    from fastdit.data.extract import extract_features
    from fastdit.quickstart.digits import write_digits
    from fastdit.quickstart.small_vae import small_vae

    write_digits(root, 32)
    small_vae(32, seed=1).save_pretrained(root / "vae")
    extract_features(images=root / "images", out=root / "latents", vae=root / "vae", image_size=32)
    (root / "config.yaml").write_text(f"""
run_dir: {root}/run
data: {{shards: {root}/latents, image_size: 32, num_classes: 10, vae: {root}/vae}}
model: {{variant: DiT-Ti/4}}
objective: {{name: flow}}
training: {{steps: 20, global_batch: 12, lr: 1e-3, compile: false, log_every: 1, checkpoint_every: 5, engine: torch}}
sampling: {{sampler: heun, steps: 4, cfg_scale: 1.5, batch_size: 4}}
""")
    return root


def command(script: str, *arguments: str, processes: int = 1) -> list[str]:
    """The command line of a script of the repository, under torchrun when there are several processes."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", free_port()]
    return [*launcher, str(ROOT / script), *arguments]


def run(script: str, *arguments: str, processes: int = 1, check: bool = True) -> subprocess.CompletedProcess:
    """Run a script to its end; its output is in the failure's message."""
    done = subprocess.run(
        command(script, *arguments, processes=processes), env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert not check or done.returncode == 0, f"{script} {arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])
