"""Checks of a checkpoint."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdit.build import build_network, build_objective
from fastdit.config import load_config
from fastdit.data.images import size_text
from fastdit.data.latents import LatentCodec, LatentSpec
from fastdit.data.opening import can_open, open_latents
from fastdit.data.remote import is_remote
from fastdit.errors import counted
from fastdit.files import read_array
from fastdit.models.dit import DiT
from fastdit.schema import Config, shards_text
from fastdit.training import checkpoint
from fastdit.training.ema import AVERAGES
from fastdit.training.engine import MOMENTS
from fastdit.training.state import CONFIG, GOLDEN, latents_of
from fastdit.training.weights import TYPES, mismatches, read_weights
from fastdit.verify.findings import Findings

GOLDEN_BYTES = 1 << 28
CLOSE = 1e-4  # tolerance relative to the largest output: fp32 rounding, also on other hardware


def verify_checkpoint(folder: Path, meta: dict[str, Any], found: Findings, say: Callable[[str], None]) -> None:
    """`meta`: what checkpoint.json says."""
    try:
        latents, config = latents_of(meta), load_config(folder / CONFIG)
        objective = build_objective(config)
        with torch.device("meta"):
            model = build_network(config, latents.shape, objective).eval()
    except ValueError as error:
        return found.add("description", f"{folder}: {error}")
    for key, value in (("model", config.model.variant), ("num_classes", config.data.num_classes)):
        if meta.get(key) != value:
            found.add("description", f"{checkpoint.META} says {key}={meta.get(key)!r}, but config.yaml says {value!r}")
    for name in (*MOMENTS, "progress") if "progress.safetensors" in meta["files"] else ():  # converted ones have none
        check_weights(folder / f"{name}.safetensors", dict(model.named_parameters()) if name in MOMENTS else {}, found)
    check_latents(config, latents, found, say)

    own = model.state_dict()
    states = {name: check_weights(folder / f"{name}.safetensors", own, found) for name in ("model", "ema")}
    if all(states.values()) and config.training.ema_decay:  # with decay 0, the EMA is the weights
        check_average(states["model"], states["ema"], meta, found)
    if found.counts["weights"] or not states["ema"]:
        return
    say(f"{folder}: {config.model.variant}, step {meta.get('step')}, {model.parameter_count():,} parameters, fp32 EMA")
    model.load_state_dict({name: tensor.float() for name, tensor in states["ema"].items()}, assign=True)
    check_forward(model, objective, model.state_shape, folder / GOLDEN, found, say)


def verify_averages(run_dir: Path, found: Findings, say: Callable[[str], None]) -> None:
    """Check what `fastdit ema` rebuilds averages from: run_dir/averages/step-*/."""
    folders = [path for path in sorted((run_dir / AVERAGES).glob("step-*")) if checkpoint.NAME.fullmatch(path.name)]
    for folder in folders:
        meta, faults = checkpoint.inspect(folder)
        for fault in faults:
            found.add("averages", fault)
        for name in () if faults else meta["files"]:
            if name.endswith(".safetensors"):
                check_weights(folder / name, {}, found)
    if folders:
        say(f"{run_dir / AVERAGES}: averages of {counted(len(folders), 'step')}")


def check_weights(path: Path, expected: dict[str, Tensor], found: Findings) -> dict[str, Tensor]:
    """Check the tensors of a file against the `expected` ones (names and shapes; {}: any, of any dtype).

    Returns the tensors, or {} if the file cannot be read.
    """
    try:
        state = read_weights(path)
    except ValueError as error:
        found.add("weights", str(error))
        return {}
    for line in mismatches(expected, state) if expected else ():
        found.add("weights", f"{path.name}: {line}")
    for name, tensor in state.items():
        if expected and tensor.dtype != torch.float32:
            kind = str(tensor.dtype).removeprefix("torch.")
            found.add("precision", f"{path.name}: {name} is {kind}, not float32; weights and EMA must be fp32")
        if tensor.dtype not in TYPES.values():
            continue
        bad = tensor.numel() - int(tensor.isfinite().sum())
        if bad:
            found.add("finiteness", f"{path.name}: {name} has {bad} of {tensor.numel()} values that are not finite")
    return state


def check_average(weights: dict[str, Tensor], ema: dict[str, Tensor], meta: dict, found: Findings) -> None:
    """Check that the EMA of a run has moved from its initial value and differs from the weights."""
    if "progress.safetensors" not in meta["files"] or meta.get("step", 0) < 100:
        return
    trained = [name for name in weights if name in ema and name != "pos_embed"]
    still = [name for name in trained if not ema[name].any() and weights[name].any()]
    if still:  # tensors that start at zero
        found.add(
            "average",
            f"the EMA never moved: {still[0]} is all zero, but not in the weights "
            f"({counted(len(still), 'such tensor')})",
        )
    if all(torch.equal(weights[name], ema[name]) for name in trained):
        found.add("average", "the EMA equals the weights bit for bit, so nothing was averaged")


def check_latents(config: Config, latents: LatentSpec, found: Findings, say: Callable[[str], None]) -> None:
    """Compare the latents recorded in the checkpoint with the autoencoder and the shards, if these are available."""
    scales = latents.scale if isinstance(latents.scale, tuple) else (latents.scale,)
    if not all(0 < scale < float("inf") for scale in scales):
        found.add("latents", f"the scale of the latents is {latents.scale}, not a positive number")
    vae, shards = Path(config.data.vae), config.data.shards
    stored = can_open(shards)
    known = config.data.normalize != "none" or stored  # the shards know the scale
    check_autoencoder(latents, vae, "the checkpoint", known, found, say)
    if stored:
        try:
            manifest = open_latents(shards, config.data.remote_cache).normalized(config.data.normalize)
        except ValueError as error:
            return say(f"not checked: {error}") if is_remote(shards) else found.add("latents", str(error))
        for key, own, other in latents.differences(manifest.latents, "precision"):
            where = shards_text(shards)
            found.add("latents", f"the latents in {where} have {key} {other}, but the checkpoint says {own}")


def check_autoencoder(
    latents: LatentSpec, vae: Path, where: str, any_scale: bool, found: Findings, say: Callable[[str], None]
) -> None:
    """Compare latents with the autoencoder that they are of, if it is a local folder."""
    if not (latents.are_pixels or vae.is_dir()):
        return say(f"not checked: the autoencoder {vae} is not a local folder")
    try:
        codec = LatentCodec.load(vae)
    except ValueError as error:
        return found.add("latents", str(error))
    if any_scale:
        codec.take_scale_of(latents)
    for key, own, other in latents.differences(codec.spec(latents.image_size)):
        of = f" of {size_text(latents.image_size)} px images" if key == "shape" else ""
        found.add("latents", f"the latents in {where} have {key} {own} (autoencoder {latents.vae}), but {vae} has "
                  f"{other}{of}")  # fmt: skip


def read_golden(path: Path) -> dict[str, Tensor]:
    """Input x, t, y and output out of a recorded forward pass; ValueError for a damaged file."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = ("x", "t", "y", "out")
            size = sum(archive.getinfo(f"{name}.npy").file_size for name in names)
            if size > GOLDEN_BYTES:  # a compressed file can hold a thousand times its own size
                raise ValueError(f"it holds {size} bytes, more than the {GOLDEN_BYTES} that are read")
            arrays = {name: torch.tensor(read_array(archive.read(f"{name}.npy"))) for name in names}
    except Exception as error:  # zipfile, zlib and numpy raise all kinds of errors on damaged files
        raise ValueError(f"{path} is damaged: {error}") from error
    return arrays


@torch.no_grad()
def check_forward(model: DiT, objective, shape, golden: Path, found: Findings, say: Callable[[str], None]) -> None:
    """Check that the output is finite and deterministic, and that it matches golden.npz if there is one."""
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    t = objective.model_time(torch.tensor([0.001, 0.5, 1.0], dtype=torch.float64))
    y = torch.tensor([0, max(model.num_classes - 1, 0), model.null_label or 0])
    out = model(x, t, y)
    if not out.isfinite().all():
        return found.add("forward", "the network's output on random input is not finite")
    if not torch.equal(out, model(x, t, y)):
        found.add("forward", "the network is not deterministic: two outputs for one input")
    if not golden.is_file():
        return say("forward: finite, deterministic (no golden.npz to compare with)")
    try:
        recorded = read_golden(golden)
    except ValueError as error:
        return found.add("forward", str(error))
    if recorded["x"].shape[1:] != shape or len({recorded["x"].shape[:1], recorded["t"].shape, recorded["y"].shape}) > 1:
        return found.add("forward", f"{golden.name} has inputs of another shape: {tuple(recorded['x'].shape)}")
    out = model(recorded["x"], recorded["t"], recorded["y"])
    if out.shape != recorded["out"].shape:
        return found.add("forward", f"{golden.name} has outputs of another shape: {tuple(recorded['out'].shape)}")
    gap, largest = (out - recorded["out"]).abs().max().item(), recorded["out"].abs().max().item()
    say(f"forward: finite, deterministic, within {gap:.1e} of the recorded output (largest value {largest:.2g})")
    if not gap <= CLOSE * largest:
        found.add("forward", f"the output differs from the recorded output by {gap:.2g} of {largest:.2g}")
