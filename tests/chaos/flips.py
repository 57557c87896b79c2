"""Table 2: single bits flipped in, and ends cut off, every file of a checkpoint of each engine."""

import random
import shutil
from pathlib import Path

import torch

from chaos.table import Table
from fastdit.distributed import Ranks
from fastdit.training import checkpoint
from fastdit.training.log import read_metrics
from fastdit.training.state import load_network
from fastdit.verify import verify
from helpers.runs import run as run_script

FLIPS, CUTS = 300, 100  # over all engines
RESUMED = {1: 10, 2: 3}  # processes -> how many of an engine's damaged runs are resumed by the real command
ENGINES = {
    "PyTorch": (["training.engine=torch"], 1),
    "PyTorch, DDP": (["training.engine=torch"], 2),
    "ZeRO-1": (["training.engine=deepspeed", "training.zero_stage=1"], 2),
    "ZeRO-3": (["training.engine=deepspeed", "training.zero_stage=3"], 2),
}
SAMPLED = (checkpoint.META, "config.yaml", "ema.safetensors")  # the files that sampling reads
ONE = Ranks(0, 0, 1, torch.device("cpu"))
QUIET = {"say": lambda line: None}


def run(place: Path, seed: int) -> Table:
    table = Table(
        "Damaged checkpoints",
        "One random bit is flipped, or the end cut off at a random byte, in each file of the newest checkpoint in "
        "turn. A resume must pass over it and name the file, `fastdit verify` must name it, and sampling must refuse "
        "it if it reads the file (checkpoint.json, config.yaml, ema.safetensors). Some damaged runs are resumed by the "
        "real command: they must continue from the checkpoint before and end bit for bit as the undamaged run.",
        ["engine", "files", "flips", "cuts", "passed over", "named by verify", "refused by sampling", "resumed, equal"],
    )
    for name, (options, processes) in ENGINES.items():
        whole = place / "flips" / name.replace(" ", "_").replace(",", "")
        arguments = ["--config", f"{place}/config.yaml", "model.variant=DiT-1x32x2/4", "training.steps=6", "--resume",
                     "training.checkpoint_every=2", "training.ema_stds=[0.05,0.1]", *options]  # fmt: skip
        run_script("train.py", *arguments, f"run_dir={whole}", processes=processes)
        files = sorted(path.name for path in newest(whole).iterdir())
        draw, flips, cuts = random.Random(f"{seed} {name}"), FLIPS // len(ENGINES), CUTS // len(ENGINES)
        passed = found = refused = sampled = equal = 0
        for i in range(flips + cuts):
            copy = whole.with_name("copy")
            shutil.copytree(whole, copy)
            file = files[i % len(files)]
            what = f"{name}: {damage(newest(copy) / file, draw, cut=i >= flips)}"
            heard: list[str] = []
            good = checkpoint.newest_good(copy, ONE, heard.append)
            named = len(heard) == 1 and file in heard[0]
            passed += table.check(good.name == "step-0000004" and named, f"{what}: resume: {good.name}, {heard}")
            lines = verify(copy, **QUIET)
            found += table.check(any(file in line for line in lines), f"{what}: verify: {lines}")
            if file in SAMPLED:
                sampled += 1
                refused += table.check(file in refusal(copy), f"{what}: sampling does not refuse it")
            if i % ((flips + cuts) // RESUMED[processes]) == 0:
                said = run_script("train.py", *arguments, f"run_dir={copy}", processes=processes)
                told = f"{what}: the resumed run differs, or does not name the file"
                equal += table.check(same(copy, whole) and file in said and "resumed at step 4" in said, told)
            shutil.rmtree(copy)
        resumed = len(range(0, flips + cuts, (flips + cuts) // RESUMED[processes]))
        table.rows.append([name, len(files), flips, cuts, f"{passed}/{flips + cuts}", f"{found}/{flips + cuts}",
                           f"{refused}/{sampled}", f"{equal}/{resumed}"])  # fmt: skip
    return table


def newest(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "step-0000006"


def damage(path: Path, draw: random.Random, cut: bool) -> str:
    """Flip one bit or cut the end off, and say which."""
    data = bytearray(path.read_bytes())
    at, bit = draw.randrange(len(data)), draw.randrange(8)
    if cut:
        path.write_bytes(data[:at])
        return f"{path.name} cut to {at} bytes"
    data[at] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {at} of {path.name} flipped"


def refusal(run_dir: Path) -> str:
    """What sampling says."""
    try:
        load_network(run_dir)
    except ValueError as error:
        return str(error)
    return ""


def same(run_dir: Path, other: Path) -> bool:
    """Whether two runs have the same losses and the same last checkpoint, bit for bit, but for their folder's name."""
    losses = [[(record["step"], record["loss"]) for record in read_metrics(path)] for path in (run_dir, other)]
    files = {path.name for path in newest(other).glob("*.safetensors")}
    equal = all((newest(run_dir) / name).read_bytes() == (newest(other) / name).read_bytes() for name in files)
    return losses[0] == losses[1] and equal and not checkpoint.inspect(newest(run_dir))[1]
