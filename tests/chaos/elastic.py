"""Table 4: a run that goes on with another number of processes, ZeRO stage or engine at every leg."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from chaos.table import Table
from fastdit.data.loader import sample_keys
from fastdit.data.manifest import Manifest
from fastdit.data.order import mirrors
from fastdit.distributed import seed_of
from fastdit.training import checkpoint
from fastdit.training.engine import MOMENTS
from fastdit.training.log import read_metrics
from fastdit.training.loop import ORDER
from helpers.runs import run as run_script

STEPS, BATCH = 5, 12  # of each leg; images of a step, over all processes
# the largest relative differences allowed; bf16 rounds to 1/256, so another split of the batch changes more
LOSS, MOMENT = {"fp32": 1e-4, "bf16": 1e-3}, {"fp32": 1e-4, "bf16": 1e-1}
CHAINS = {
    "processes": [("ZeRO", 1, 2), ("ZeRO", 1, 1), ("ZeRO", 1, 2), ("ZeRO", 1, 4)],
    "stages": [("ZeRO", 1, 2), ("ZeRO", 3, 2), ("ZeRO", 2, 2)],
    "engines": [("ZeRO", 2, 2), ("PyTorch", 0, 1), ("ZeRO", 3, 3), ("PyTorch", 0, 2)],
}
SCRIPT = '''
"""train.py, with a record of every sample that this process reads: step, key, orientation."""
import json, os, runpy, sys
from fastdit.data.loader import _Reader

out = open(f"{sys.argv.pop(1)}-{os.environ.get('RANK', 0)}.jsonl", "a", buffering=1)
batch, read = _Reader.batch, _Reader.read

def recorded_batch(self, step):
    self.now = step
    return batch(self, step)

def recorded_read(self, images, mirrored, array, features):
    for image, view in zip(images.tolist(), mirrored.tolist()):
        out.write(json.dumps([self.now, int(self.index["key"][image]), view]) + "\\n")
    return read(self, images, mirrored, array, features)

_Reader.batch, _Reader.read = recorded_batch, recorded_read
sys.argv[0] = TRAIN
runpy.run_path(TRAIN, run_name="__main__")
'''


def run(place: Path, seed: int) -> Table:
    table = Table(
        "Another number of processes, ZeRO stage or engine",
        f"Each leg continues the run of the leg before for {STEPS} steps. It is compared with one process of the plain "
        "engine that was never interrupted. *Same samples*: the processes have read the same images, in the same "
        "orientation and order. *Loss*: largest relative difference in the leg. *Moments*: of AdamW at the end of the "
        "leg, the norm of the difference relative to the norm; the number of updates must be equal.",
        ["precision", "chain", "leg", "same samples", "loss", "mean of gradients", "mean of squares", "updates"],
    )
    from helpers import ROOT

    folder = place / "elastic"
    folder.mkdir()
    script = folder / "recorded.py"
    script.write_text(SCRIPT.replace("TRAIN", repr(str(ROOT / "train.py"))))
    manifest = Manifest.load(place / "latents")
    for precision, chains in (("fp32", CHAINS), ("bf16", {"engines": CHAINS["engines"]})):
        common = ["--config", f"{place}/config.yaml", "--resume", f"training.precision={precision}", f"seed={seed}",
                  f"training.checkpoint_every={STEPS}", "training.keep_checkpoints=0"]  # fmt: skip
        whole = folder / f"{precision}-whole"
        steps = STEPS * max(map(len, chains.values()))
        run_script("train.py", *common, f"run_dir={whole}", f"training.steps={steps}")
        for chain, legs in chains.items():
            ours = folder / f"{precision}-{chain}"
            for i, (engine, stage, processes) in enumerate(legs):
                named = f"{engine}-{stage} x {processes}" if stage else f"{engine} x {processes}"
                options = ["training.engine=deepspeed", f"training.zero_stage={stage}"] if stage else []
                record, last = folder / f"{precision}-{chain}-{i}", STEPS * (i + 1)
                run_script(str(script), f"{record}", *common, f"run_dir={ours}", f"training.steps={last}",
                           *options or ["training.engine=torch"], processes=processes)  # fmt: skip
                leg = range(last - STEPS, last)
                agree = all(read_by(record, processes, step) == expected(manifest, seed, step) for step in leg)
                loss = max(relative(ours, whole, step + 1) for step in leg)
                moments = [difference(ours, whole, last, name) for name in MOMENTS]
                updates = [int(load_file(at(path, last) / "progress.safetensors")["updates"]) for path in (ours, whole)]
                what = f"{precision}, {chain}, leg {i + 1} ({named})"
                table.check(agree, f"{what}: other samples were read")
                table.check(loss <= LOSS[precision], f"{what}: the loss differs by {loss:.1e}")
                table.check(max(moments) <= MOMENT[precision], f"{what}: the moments differ by {max(moments):.1e}")
                table.check(updates[0] == updates[1] == last, f"{what}: {updates} updates")
                table.rows.append([precision, chain, named, "yes" if agree else "NO", f"{loss:.1e}",
                                   *(f"{gap:.1e}" for gap in moments), updates[0]])  # fmt: skip
    return table


def at(run_dir: Path, step: int) -> Path:
    return checkpoint.path_of(run_dir, step)


def read_by(record: Path, processes: int, step: int) -> list[tuple[int, int]]:
    """The key and orientation of each sample that the processes read for a step, in the order of the ranks."""
    found = []
    for rank in range(processes):
        lines = map(json.loads, Path(f"{record}-{rank}.jsonl").read_text().splitlines())
        found += [(key, mirrored) for at, key, mirrored in lines if at == step]
    return found


def expected(manifest: Manifest, seed: int, step: int) -> list[tuple[int, int]]:
    """The same, from the seed alone."""
    order, index = seed_of(seed, ORDER), manifest.index()
    keys = sample_keys(manifest, order, BATCH, step)
    place = {int(key): i for i, key in enumerate(index["key"])}
    epochs = [(step * BATCH + i) // len(index) for i in range(BATCH)]
    sides = [int(mirrors(order, e, torch.tensor([place[k]]).numpy())[0]) for e, k in zip(epochs, keys, strict=True)]
    return list(zip(keys, sides, strict=True))


def relative(run_dir: Path, other: Path, step: int) -> float:
    ours, theirs = ({r["step"]: r["loss"] for r in read_metrics(path)}[step] for path in (run_dir, other))
    return abs(ours - theirs) / abs(theirs)


def difference(run_dir: Path, other: Path, step: int, name: str) -> float:
    ours, theirs = (load_file(at(path, step) / f"{name}.safetensors") for path in (run_dir, other))
    a, b = (torch.cat([state[key].flatten().double() for key in sorted(theirs)]) for state in (ours, theirs))
    return float((a - b).norm() / b.norm())
