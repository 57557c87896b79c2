"""The whole job once, as a user runs it: images to latents to two ZeRO runs with checkpoints and --resume, to samples.

    python -m bench.smoke --out DIR          # SD-sized autoencoder and DiT-S/2 on a GPU, tiny networks on a CPU

Training goes through DeepSpeed's launcher, ZeRO-1 with torch.compile and ZeRO-2 without, side by side. Each is stopped
after its steps, resumed for more, and must have logged every step once with a finite loss. A line is recorded for every
command; the logs are in DIR/smoke.
"""

import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from bench.io.extract import make_images, make_vae
from bench.record import ROOT, parser, record
from fastdit.training.log import read_metrics

STEPS, MORE = 20, 10  # before and after --resume


class Job:
    """The commands of one smoke test, in a folder."""

    def __init__(self, out: Path, on_gpu: bool, deadline: float):
        self.out, self.deadline, self.side = out, deadline, 256 if on_gpu else 32
        images, samples = (256, 16) if on_gpu else (24, 4)
        make_images(out / "images", images)
        make_vae(out / "vae", large=on_gpu)
        self.count, self.samples = images, samples
        self.settings = [
            f"data.shards={out}/latents", f"data.vae={out}/vae", f"data.image_size={self.side}", "data.num_classes=4",
            f"training.global_batch={64 if on_gpu else 4}", "training.log_every=1", "training.report=false",
            f"training.checkpoint_every={STEPS}", f"sampling.batch_size={samples}", "sampling.steps=10",
            *([] if on_gpu else ["model.variant=DiT-2x64x4/2"]),
        ]  # fmt: skip

    def run(self, name: str, *command: str) -> str:
        """What a command printed; RuntimeError with the end of that if it failed or took too long."""
        begin, log = time.perf_counter(), self.out / f"{name}.log"
        with open(log, "w") as lines:
            try:
                done = subprocess.run(
                    [sys.executable, *command], cwd=ROOT, stdout=lines, stderr=subprocess.STDOUT,
                    timeout=max(self.deadline - time.monotonic(), 1),
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                done = "too late"
        said = log.read_text(errors="replace")
        seconds = round(time.perf_counter() - begin, 1)
        if done != 0:
            raise RuntimeError(f"{name} ended with {done} after {seconds} s: ...{said[-1500:]}")
        print(f"smoke: {name} took {seconds} s", file=sys.stderr, flush=True)
        return said

    def extract(self) -> dict:
        begin, size = time.perf_counter(), str(self.side)
        said = self.run("extract", "extract_features.py", "--images", f"{self.out}/images", "--out",
                        f"{self.out}/latents", "--vae", f"{self.out}/vae", "--image-size", size)  # fmt: skip
        rate = re.search(rf"{self.count:,} images in \d+ shards?, ([\d.]+) images/s", said)
        return {"seconds": time.perf_counter() - begin, "images_per_s": float(rate[1])}

    def train(self, stage: int) -> dict:
        """Train, and resume to the end; a run of each stage has its own folder and port."""
        run, begin = self.out / f"zero_{stage}", time.perf_counter()
        with socket.socket() as free:
            free.bind(("", 0))
            port = str(free.getsockname()[1])
        launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", port]
        command = [*launcher, "train.py", "--config", "configs/dit_s_2.yaml", f"run_dir={run}", *self.settings,
                   f"training.zero_stage={stage}", f"training.compile={str(stage == 1).lower()}"]  # fmt: skip
        self.run(f"zero_{stage}", *command, f"training.steps={STEPS}")
        first = time.perf_counter()
        self.run(f"zero_{stage}_resume", *command, f"training.steps={STEPS + MORE}", "--resume")
        logged = read_metrics(run)
        if [each["step"] for each in logged] != list(range(1, STEPS + MORE + 1)):
            raise RuntimeError(f"zero_{stage} logged the steps {[each['step'] for each in logged]}")
        losses = [each["loss"] for each in logged]
        if not all(loss is not None and math.isfinite(loss) for loss in losses):
            raise RuntimeError(f"zero_{stage}: a loss is not finite: {losses}")
        return {"seconds": first - begin, "resumed_s": time.perf_counter() - first, "losses": losses[:: STEPS // 4]}

    def sample(self) -> dict:
        begin = time.perf_counter()
        self.run("sample", "sample_ddp.py", "--checkpoint", f"{self.out}/zero_2", "--out", f"{self.out}/samples",
                 "--num-samples", str(self.samples))  # fmt: skip
        images = np.load(self.out / "samples" / "samples.npz")["arr_0"]
        if images.shape != (self.samples, self.side, self.side, 3) or images.std() == 0:
            raise RuntimeError(f"sample wrote {images.shape} with a standard deviation of {images.std()}")
        return {"seconds": time.perf_counter() - begin}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--budget-s", type=float, default=600.0, help="seconds, after which commands are stopped")
    arguments = options.parse_args()
    out, failed = (arguments.out or Path("smoke_out")).resolve() / "smoke", []
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    deadline = time.monotonic() + arguments.budget_s
    job = Job(out, torch.cuda.is_available(), deadline)
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"

    def stage(name: str, step, *given) -> None:
        try:
            figures = {key: round(v, 2) if isinstance(v, float) else v for key, v in step(*given).items()}
            record("smoke", arguments.out, stage=name, **figures)
        except Exception as error:  # the other stages go on
            failed.append(name)
            record("smoke", arguments.out, stage=name, failed=str(error)[-1500:])

    def second_chain() -> None:
        stage("ZeRO-2, resumed", job.train, 2)
        stage("sample", job.sample)

    stage("extract", job.extract)
    with ThreadPoolExecutor(2) as chains:
        chains.submit(stage, "ZeRO-1, resumed", job.train, 1)
        chains.submit(second_chain)
    for folder in filter(Path.is_dir, out.iterdir()):  # what remains are the logs
        shutil.rmtree(folder)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
