"""Full disks, file size limits, NaN and infinities: the run stops or skips, and what is on disk stays good."""

import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from chaos.runs import ENGINES, arguments_of, differing_files, losses_until, newest_step, same_bytes
from chaos.table import Table
from fastdit.training import checkpoint, state
from fastdit.training.engine import MOMENTS
from fastdit.training.step import TrainStep
from helpers.runs import Forks, file_size_limit
from helpers.runs import run as run_forked

OFFSETS = 20
STEPS, BAD_STEPS = 12, 4  # of the runs with NaN and infinities
SAVED = ["training.checkpoint_every=2", "training.steps=8"]


def run(place: Path, seed: int) -> Table:
    table = Table(
        "Full disks, and values that are not finite",
        "*Disk full*: a run resumes on a small file system (tmpfs) on which a random number of bytes is left, fewer "
        "than a checkpoint needs. *File size limit*: RLIMIT_FSIZE at a random offset of a file of a checkpoint, while "
        "it is written. Each run must end with exit code 2 and one line, must leave no unfinished file and no damaged "
        "checkpoint, and, resumed with enough space, must end with the same losses and files, bit for bit, as a run "
        "that always had it. *NaN, inf*: one element of a random gradient (before the processes average it) or "
        f"activation, on a random process, in {BAD_STEPS} random steps of {STEPS}. Each such step must be in "
        "skipped.jsonl and change no weight, average or moment; all processes must end with the same weights; two runs "
        "with the same bad steps, but other places and values, must write the same files. *In a row*: "
        "training.max_skipped bad steps; the run must end with exit code 2 and one line, and its last checkpoint must "
        "resume.",
        ["fault", "engine", "faults", "as documented", "files left or damaged", "non-finite values on disk",
         "differences afterwards"],
    )  # fmt: skip
    folder = place / "faults"
    base, whole = folder / "base", folder / "whole"
    run_forked("train.py", *arguments_of(place, whole, *SAVED))
    run_forked("train.py", *arguments_of(place, base, *SAVED, "training.steps=4"))
    draw = random.Random(f"{seed} disk")
    table.rows.append(Disk(place, folder, base, whole, table).full(draw))
    table.rows.append(Disk(place, folder, base, whole, table).limited(draw))
    for engine in ENGINES:
        table.rows += poisoned(place, folder, engine, random.Random(f"{seed} {engine}"), table)
    return table


@dataclass
class Disk:
    """Interrupts the write of a checkpoint of a copy of `base`, and resumes until the run is as long as `whole`."""

    place: Path
    folder: Path
    base: Path
    whole: Path
    table: Table
    good: int = 0
    left: int = 0
    different: int = 0

    def full(self, draw: random.Random) -> list:
        need = sum(path.stat().st_size for path in checkpoint.find(self.base).iterdir())
        count = 0
        with small_disk(self.folder / "disk") as disk:
            if not self.table.check(disk is not None, "disk full: no right to mount; run `unshare -rm make chaos`"):
                return ["disk full", "torch", 0, *["-"] * 4]
            for i in range(OFFSETS):  # half of them so early that settings and logs do not fit either
                free = draw.randrange(need if i % 2 else 1 << 16)
                shutil.copytree(self.base, run_dir := disk / "run")
                shutil.rmtree(run_dir / state.VAE)  # the resume copies it again
                ballast = disk / "ballast"
                with ballast.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - free // 4096 * 4096)
                self.interrupt(f"{free} bytes left", run_dir, None, ballast.unlink)
                shutil.rmtree(run_dir)
                count += 1
        return ["disk full", "torch", count, self.good, self.left, "-", self.different]

    def limited(self, draw: random.Random) -> list:
        sizes = {path.name: path.stat().st_size for path in sorted(checkpoint.find(self.base).iterdir())}
        extremes = [max(sizes, key=sizes.get), min(sizes, key=sizes.get)]
        for i in range(OFFSETS):
            name = extremes[i % 2] if i < OFFSETS // 2 else draw.choice(list(sizes))
            offset, run_dir = draw.randrange(sizes[name]), self.folder / f"limited-{i}"
            shutil.copytree(self.base, run_dir)
            self.interrupt(f"{name} limited to {offset} bytes", run_dir, partial(limit, name, offset), lambda: None)
            shutil.rmtree(run_dir)
        return ["file size limit", "torch", OFFSETS, self.good, self.left, "-", self.different]

    def interrupt(self, what: str, run_dir: Path, before: Callable | None, repair: Callable) -> None:
        arguments = arguments_of(self.place, run_dir, *SAVED)
        with Forks("train.py", *arguments, before=before) as forks:
            codes, said = forks.wait(120), forks.said()
        self.good += self.table.check(codes == [2] and one_line(said), f"{what}: exit code {codes}, said: {said}")
        left = [path.name for path in run_dir.rglob("*partial*")] + ["lock"] * (run_dir / "lock").exists()
        damaged = [fault for found in checkpoint.checkpoints(run_dir) for fault in checkpoint.inspect(found)[1]]
        newest = newest_step(run_dir)
        self.left += not self.table.check(newest >= 4 and not left + damaged, f"{what}: {newest}, {left}, {damaged}")
        repair()
        said = run_forked("train.py", *arguments)
        wrong = differing_files(run_dir, self.whole, 8)
        same = losses_until(run_dir, 8) == losses_until(self.whole, 8) and f"resumed at step {newest}" in said
        self.different += not self.table.check(same and not wrong, f"{what}: resumed differently, {wrong}: {said}")


@contextmanager
def small_disk(path: Path) -> Iterator[Path | None]:
    """A file system of 64 MiB at `path`; None where it cannot be mounted."""
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", path], capture_output=True)
    try:
        yield None if mounted.returncode else path
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", path], check=True)


def limit(name: str, size: int) -> None:
    """Keep this process from writing more than `size` bytes while it writes the checkpoint's file `name`."""

    def limited(function: Callable, path_of: Callable) -> Callable:
        def write(*arguments):
            with file_size_limit(size) if path_of(*arguments).name == name else nullcontext():
                function(*arguments)

        return write

    state.write_weights = limited(state.write_weights, lambda tensors, path: path)
    state.save_config = limited(state.save_config, lambda config, path: path)
    checkpoint.write_meta = limited(checkpoint.write_meta, lambda folder, meta: folder / checkpoint.META)


def one_line(said: str) -> bool:
    """Whether an error is reported in one line, at the end."""
    lines = said.strip().splitlines()
    return "Traceback" not in said and [line for line in lines if line.startswith("error: ")] == lines[-1:]


@dataclass(frozen=True)
class Poison:
    """One value that is not finite: in which step (from 1) and process, where (fractions of all), and which."""

    step: int
    rank: int
    where: str
    layer: float
    element: float
    value: float

    @staticmethod
    def drawn(draw: random.Random, step: int, processes: int) -> "Poison":
        where, value = draw.choice(["gradient", "activation"]), draw.choice([float("nan"), float("inf"), -float("inf")])
        return Poison(step, draw.randrange(processes), where, draw.random(), draw.random(), value)

    def spoil(self, tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[int(self.element * tensor.numel())] = self.value
        return tensor


def poison(faults: list[Poison]) -> None:
    """Have this process compute with `faults`, and print a digest of its weights after the last step."""
    original, rank, now = TrainStep.run, int(os.environ.get("RANK", 0)), {"step": 0, "calls": 0, "before": 0}
    mine = {fault.step: fault for fault in faults if fault.rank == rank}

    def in_backward(parameter: int, count: int, gradient: Tensor) -> Tensor | None:
        fault = mine.get(now["step"])
        if fault and fault.where == "gradient" and parameter == int(fault.layer * count):
            return fault.spoil(gradient)

    def in_forward(module, inputs, output):
        first = output[0] if isinstance(output, tuple) else output
        if not isinstance(first, Tensor) or not first.is_floating_point():
            return None
        fault, now["calls"] = mine.get(now["step"]), now["calls"] + 1
        if fault and fault.where == "activation" and now["calls"] == 1 + int(fault.layer * now["before"]):
            first = fault.spoil(first)
            return (first, *output[1:]) if isinstance(output, tuple) else first

    def run(self, generator, step, lr, *given):
        module = self.engine.module
        if not now["step"]:
            parameters = [p for p in module.parameters() if p.requires_grad]
            for i, parameter in enumerate(parameters):
                parameter.register_hook(partial(in_backward, i, len(parameters)))
            for layer in module.modules():
                layer.register_forward_hook(in_forward)
        now["step"], now["before"], now["calls"] = step + 1, now["calls"], 0
        result = original(self, generator, step, lr, *given)
        if step + 1 == STEPS and getattr(self.engine, "zero_stage", 1) < 3:
            bits = torch.cat([p.detach().flatten() for p in module.parameters()]).view(torch.int32)
            print(f"weights {bits.sum().item()} {(bits.long() * torch.arange(len(bits))).sum().item()}", flush=True)
        return result

    TrainStep.run = run


def poisoned(place: Path, folder: Path, engine: str, draw: random.Random, table: Table) -> list[list]:
    processes, overrides = ENGINES[engine]
    settings = [*overrides, f"training.steps={STEPS}", "training.checkpoint_every=1", "training.keep_checkpoints=0"]
    steps = sorted(draw.sample(range(2, STEPS, 2), BAD_STEPS))  # never two in a row, nor the first, which has no before
    good = bad_values = different = 0
    pair = [folder / f"{engine}-poisoned-{i}" for i in range(2)]
    for run_dir in pair:
        faults = [Poison.drawn(draw, step, processes) for step in steps]
        what = f"{engine} {faults}"
        with Forks("train.py", *arguments_of(place, run_dir, *settings), processes=processes,
                   before=partial(poison, faults)) as forks:  # fmt: skip
            codes, said = forks.wait(300), forks.said()
        table.check(codes == [0] * processes, f"{what}: exit codes {codes}: {said}")
        skipped = skipped_steps(run_dir)
        good += len(set(steps) & set(skipped))
        table.check(skipped == steps, f"{what}: skipped {skipped}")
        weights = re.findall(r"^weights .*", said, re.MULTILINE)
        expected = 0 if engine == "ZeRO-3" else processes  # there each has a part
        table.check(len(set(weights)) <= 1 and len(weights) == expected, f"{what}: processes differ: {weights}")
        bad_values += non_finite(run_dir, table, what)
        names = [f"{name}.safetensors" for name in ("model", "ema", *MOMENTS)]
        changed = [f"{step}: {name}" for step in steps for name in names
                   if not same_bytes(*(checkpoint.path_of(run_dir, at) / name for at in (step - 1, step)))]  # fmt: skip
        table.check(not changed, f"{what}: a bad step changed {changed}")
        different += len(changed)
    wrong = differing_files(*pair, STEPS)
    table.check(not wrong, f"{engine}, bad steps {steps}: two runs differ: {wrong}")
    single = ["NaN, inf", engine, 2 * BAD_STEPS, good, "-", bad_values, different + len(wrong)]

    run_dir, first = folder / f"{engine}-in-a-row", draw.randint(2, STEPS - 4)
    faults = [Poison.drawn(draw, first + i, processes) for i in range(3)]
    what = f"{engine} {faults}"
    with Forks("train.py", *arguments_of(place, run_dir, *settings), processes=processes,
               before=partial(poison, faults)) as forks:  # fmt: skip
        codes, outputs = forks.wait(300), [path.read_text() for path in forks.outputs]
    stopped = [text for text in outputs if one_line(text) and "not finite in 3 steps in a row" in text]
    ended = 2 in codes and len(stopped) == codes.count(2)  # the others are killed when the first has ended
    ended = table.check(ended, f"{what}: exit codes {codes}: {outputs}")
    skipped = skipped_steps(run_dir)
    table.check(skipped == [fault.step for fault in faults], f"{what}: skipped {skipped}")
    bad_values = non_finite(run_dir, table, what)
    newest = newest_step(run_dir)
    said = run_forked("train.py", *arguments_of(place, run_dir, *settings), processes=processes)
    resumed = newest >= first and f"resumed at step {newest}" in said and newest_step(run_dir) == STEPS
    table.check(resumed, f"{what}: checkpoint {newest} does not resume: {said}")
    return [single, ["NaN, inf in a row", engine, 3, len(skipped) if ended else 0, "-", bad_values, int(not resumed)]]


def skipped_steps(run_dir: Path) -> list[int]:
    path = run_dir / "skipped.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def non_finite(run_dir: Path, table: Table, what: str) -> int:
    """The number of tensors and records of a run that hold a value that is not finite."""

    def refuse(name: str):
        raise ValueError(f"{name} is not JSON")

    found = 0
    for path in sorted(run_dir.rglob("*.safetensors")):
        found += sum(not tensor.isfinite().all() for tensor in load_file(path).values())
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        try:
            json.loads(line, parse_constant=refuse)
        except ValueError:
            found += 1
    table.check(not found, f"{what}: {found} non-finite values on disk")
    return found
