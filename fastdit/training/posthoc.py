"""Post-hoc EMA: average weights of any width after training (Karras et al. 2024, arXiv 2312.02696, Sec. 3, App. C).

With training.ema_stds, a run stores its power-function averages (ema.PowerAverage) at each checkpoint:

run_dir/averages/step-0001000/
    power-0.050.safetensors   the average of relative width 0.05: a full state dict in fp32, under the official names
    power-0.100.safetensors   and so on, one for each of training.ema_stds
    checkpoint.json           step and the SHA-256 of every file, as in a checkpoint

The profile of a target is approximated by a linear combination of the stored profiles, in the least-squares sense. The
same combination of the stored weights is the rebuilt average.
"""

import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from fastdit.config import load_config, save_config
from fastdit.errors import counted
from fastdit.files import staged, sync
from fastdit.training import checkpoint
from fastdit.training.ema import AVERAGES, exponent, width_name
from fastdit.training.state import CONFIG, VAE, classes_of, describe, keep_autoencoder, latents_of
from fastdit.training.weights import header, mismatches, write_weights

FILE = re.compile(r"power-(\d[\d.]*(?:e-\d+)?)\.safetensors")
FAR = 0.1  # relative error of a profile above which a warning is due
NEGLIGIBLE = 1e-12  # of the weights: far below the rounding of fp32


class Snapshot(NamedTuple):
    """One stored average: relative width `std` at `step`."""

    step: int
    std: float
    path: Path


def coefficients(snapshots: list[tuple[int, float]], step: int, std: float) -> tuple[np.ndarray, float]:
    """How to combine snapshots of (step, relative width) to the average of width `std` at `step`.

    Returns the coefficients (n,) in float64, whose sum is 1, and the relative error ||p - sum_i c_i p_i|| / ||p|| of
    the profile in the L2 norm. ValueError for a width that is out of range.
    """
    t = np.array([step for step, _ in snapshots], np.float64)
    gamma = np.array([exponent(std) for _, std in snapshots])
    # one more row and column for the target; (n + 1, n + 1)
    t, gamma = np.append(t, step), np.append(gamma, exponent(std))
    products = _products(t, gamma)
    norms = np.sqrt(products.diagonal())
    products /= np.outer(norms, norms)  # of profiles with norm 1, which is better conditioned
    a, b = products[:-1, :-1], products[:-1, -1]
    weights = np.linalg.lstsq(a, b, rcond=None)[0] / norms[:-1]
    weights /= weights.sum()  # so that weights that do not change are rebuilt exactly
    x = weights * norms[:-1] / norms[-1]
    return weights, float(np.sqrt(max(0.0, 1 - 2 * x @ b + x @ a @ x)))


def _products(t: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    """(n, n): the integrals of p_i p_j over time, p_i(s) = (gamma_i + 1) s^gamma_i / t_i^(gamma_i + 1) up to t_i."""
    first = np.minimum(t[:, None], t)  # both profiles are 0 later than this
    powers = (first / t[:, None]) ** (gamma[:, None] + 1) * (first / t) ** (gamma + 1)
    return (gamma[:, None] + 1) * (gamma + 1) / (gamma[:, None] + gamma + 1) * powers / first


def stored(run_dir: Path, say: Callable[[str], None]) -> list[Snapshot]:
    """All averages of a run, by step and width; `say` hears about damaged ones, which are left out."""
    found = []
    for folder in sorted((run_dir / AVERAGES).glob("step-*")):
        if not checkpoint.NAME.fullmatch(folder.name) or not (folder / checkpoint.META).is_file():
            continue
        meta, faults = checkpoint.inspect(folder)
        if faults:
            say(f"file {faults[0]}; its step is left out")
            continue
        step, stds = checkpoint.step_of(folder), {file: FILE.fullmatch(file) for file in meta["files"]}
        found += [Snapshot(step, float(std[1]), folder / file) for file, std in stds.items() if std]
    return sorted(found)


def rebuild(
    run_dir: str | Path,
    stds: Iterable[float],
    out: str | Path,
    *,
    step: int | None = None,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Write out/std-0.050/ and so on: one checkpoint for each of `stds`, with the EMA of this relative width at `step`.

    `step`: one that has stored averages, by default the newest. model.safetensors is that of the same step, or, where
    its checkpoint has been deleted, of the newest one, which `load_network` then refuses to take for that step's.
    ValueError for a run without averages, a width that is out of range, or an `out` that exists; then nothing is
    written.
    """
    run_dir, out, stds = Path(run_dir), Path(out), list(dict.fromkeys(stds))
    if out.exists():
        raise ValueError(f"--out {out} exists; choose another name")
    for std in stds:
        exponent(std)
    found = stored(run_dir, say)
    if not found:
        raise ValueError(f"{run_dir} holds no averages; name the folder of a run with training.ema_stds=[0.05,0.1]")
    steps = sorted({snapshot.step for snapshot in found})
    step = steps[-1] if step is None else step
    if step not in steps:
        near = min(steps, key=lambda other: abs(other - step))
        raise ValueError(f"--step={step} has no averages; the nearest is {near}, of {len(steps)} from {steps[0]} on")
    found = [snapshot for snapshot in found if snapshot.step <= step]
    in_steps = len({snapshot.step for snapshot in found})
    source = next((p for p in checkpoint.checkpoints(run_dir) if checkpoint.step_of(p) == step), None)
    if source is None:
        source = checkpoint.find(run_dir)
        say(f"the checkpoint of step {step} is gone: model.safetensors is from {source.name}, only the EMA can be used")
    meta = checkpoint.read_meta(source, contents=[CONFIG, "model.safetensors"])
    config = load_config(source / CONFIG)
    facts = latents_of(meta), classes_of(meta, config)
    kept = {key: meta[key] for key in ("features", "contents") if key in meta} | {"model_step": meta["step"]}

    with staged(out) as stage:
        for std in stds:
            weights, error = coefficients([(s.step, s.std) for s in found], step, std)
            used = abs(weights) > NEGLIGIBLE
            folder = stage / f"std-{width_name(std)}"
            folder.mkdir(parents=True)
            shutil.copyfile(source / "model.safetensors", folder / "model.safetensors")
            ema = combine([s.path for s, keep in zip(found, used, strict=True) if keep], weights[used], source)
            write_weights(ema, folder / "ema.safetensors")
            own = replace(config, run_dir=str(out / folder.name))
            save_config(own, folder / CONFIG)
            checkpoint.complete(folder, {"step": step, **describe(own, *facts), **kept, "ema_std": std})
            keep_autoencoder(config.data.vae if Path(config.data.vae).is_dir() else str(run_dir / VAE), folder)
            say(f"{out / folder.name}: step {step}, from {counted(used.sum(), 'average')}, profile within {error:.2%}")
            if error > FAR:
                say(
                    f"warning: std={std:g} is not well represented by the averages of {counted(in_steps, 'step')} (the "
                    f"relative error of its profile is {error:.0%}): choose a width nearer to {nearest(found, std):g}, "
                    "or train with a smaller training.checkpoint_every"
                )
        sync(stage)
    return [out / f"std-{width_name(std)}" for std in stds]


def nearest(snapshots: list[Snapshot], std: float) -> float:
    return min({snapshot.std for snapshot in snapshots}, key=lambda other: abs(other - std))


def combine(paths: list[Path], weights: np.ndarray, source: Path) -> dict[str, Tensor]:
    """The sum of weights[i] times the state dict in paths[i], accumulated in float64, in fp32.

    One tensor of all files at a time. ValueError that names a file whose tensors are not those of the checkpoint
    `source`.
    """
    own = header(source / "model.safetensors")
    for path in paths:
        if mismatches(own, header(path)):
            raise ValueError(f"{path} holds the average of another network than {source}; remove its folder")
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt")) for path in paths]
        state = {}
        for name, tensor in own.items():
            total = torch.zeros(tensor.shape, dtype=torch.float64)
            for file, weight in zip(files, weights, strict=True):
                total.add_(file.get_tensor(name), alpha=float(weight))
            state[name] = total.float()
    return state
