"""`fastdit verify`: what is wrong with a checkpoint, or with a folder of latent shards, in words."""

import hashlib
import io
import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from fastdit.config import Config, build, load_config
from fastdit.data.latents import LatentCodec
from fastdit.data.shards import DTYPES, Manifest, Shard
from fastdit.diffusion.objectives import OBJECTIVES
from fastdit.models.convert import mismatches
from fastdit.models.dit import DiT
from fastdit.training import checkpoint
from fastdit.training.loop import network

SHOWN = 3  # findings of one kind that are spelt out; the rest are counted
CLOSE = 1e-4  # of the largest output: fp32 rounding, on other hardware too
GOLDEN = "golden.npz"


class Findings:
    """Lines, a few of each kind."""

    def __init__(self) -> None:
        self.lines: dict[str, list[str]] = {}
        self.counts: Counter[str] = Counter()

    def add(self, kind: str, line: str) -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= SHOWN:
            self.lines.setdefault(kind, []).append(line)

    def all(self) -> list[str]:
        """What was found, in the order of the checks."""
        out = []
        for kind, lines in self.lines.items():
            more = self.counts[kind] - len(lines)
            out += lines + ([f"... and {more} more: {kind}"] if more else [])
        return out


def verify(path: str | Path, say: Callable[[str], None] = print) -> list[str]:
    """Check a run's newest checkpoint, one checkpoint, or a folder of latents; the findings, none if all is well.

    `say` hears what was checked. ValueError where `path` is neither.
    """
    path, found = Path(path), Findings()
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; give a run, one of its checkpoints/step-*, or a folder of latents")
    if (path / "manifest.json").exists():
        verify_shards(path, found, say)
    else:
        verify_checkpoint(checkpoint.find(path), found, say)
    return found.all()


def verify_checkpoint(folder: Path, found: Findings, say: Callable[[str], None]) -> None:
    try:
        meta = json.loads((folder / checkpoint.META).read_text())
        files, latents = meta["files"], meta["latents"]
        shape = tuple(latents["shape"])
        config = load_config(folder / "config.yaml")
        objective = build(OBJECTIVES, config.objective, "objective")
        with torch.device("meta"):
            model = network(config, shape, objective, torch.device("cpu")).eval()
    except (ValueError, KeyError, TypeError) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else str(error)
        return found.add("description", f"{folder}: {what}")
    for name, size in files.items():
        actual = (folder / name).stat().st_size if (folder / name).is_file() else None
        if actual != size:
            state = "is missing" if actual is None else f"has {actual} bytes instead of {size}"
            found.add("files", f"{folder / name} {state}")
    for key, value in (("model", config.model.variant), ("num_classes", config.data.num_classes)):
        if meta.get(key) != value:
            found.add("description", f"{checkpoint.META} says {key}={meta.get(key)!r}, config.yaml {value!r}")
    if meta.get("engine") != "none":  # "none": converted, not trained here
        for name in ("optimizer.pt" if meta.get("engine") == "torch" else "deepspeed", "ema-00000.pt"):
            if not (folder / name).exists():
                found.add("resume", f"{folder / name} is missing: the run cannot resume from here")
    check_latents(config, latents, found, say)

    states = {name: check_weights(folder / f"{name}.safetensors", model, found) for name in ("model", "ema")}
    if all(states.values()):
        check_average(states["model"], states["ema"], meta, found)
    if found.counts["weights"] or not states["ema"]:
        return
    say(f"{folder}: {config.model.variant}, step {meta.get('step')}, {model.parameter_count():,} parameters, fp32 EMA")
    model.load_state_dict({name: tensor.float() for name, tensor in states["ema"].items()}, assign=True)
    check_forward(model, objective, shape, folder / GOLDEN, found, say)


def check_weights(path: Path, model: DiT, found: Findings) -> dict[str, Tensor]:
    """The tensors of a file that fits the network, {} where it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            types = {name: str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118
        state = load_file(path)
    except FileNotFoundError:
        found.add("weights", f"{path} is missing")
        return {}
    except SafetensorError as error:
        found.add("weights", f"{path} is damaged: {error}")
        return {}
    expected = model.state_dict()
    for line in mismatches(expected, state):
        found.add("weights", f"{path.name}: {line}")
    for name, tensor in state.items():
        if types[name] != "F32":
            found.add("precision", f"{path.name}: {name} is {types[name]}, not F32; an average must live in fp32")
        bad = tensor.numel() - int(tensor.isfinite().sum())
        if bad:
            found.add("finiteness", f"{path.name}: {name} has {bad} of {tensor.numel()} values that are not finite")
    return state


def check_average(weights: dict[str, Tensor], ema: dict[str, Tensor], meta: dict, found: Findings) -> None:
    """That the EMA of a run has moved away from its start, and is not the weights themselves."""
    if meta.get("engine") == "none" or meta.get("step", 0) < 100:
        return
    trained = [name for name in weights if name in ema and name != "pos_embed"]
    still = [name for name in trained if not ema[name].any() and weights[name].any()]
    if still:  # tensors that start at zero
        found.add("average", f"the EMA never moved: {still[0]} is all zero, the weights are not ({len(still)} such)")
    if all(torch.equal(weights[name], ema[name]) for name in trained):
        found.add("average", "the EMA equals the weights bit for bit; nothing was averaged")


def check_latents(config: Config, latents: dict, found: Findings, say: Callable[[str], None]) -> None:
    """The facts on latents against the autoencoder and the shards, where these are at hand."""
    if not 0 < latents["scale"] < float("inf"):
        found.add("latents", f"the latents' scale is {latents['scale']}, not a positive number")
    vae, shards = Path(config.data.vae), Path(config.data.shards or "nowhere")
    if vae.is_dir():
        try:
            codec = LatentCodec.load(vae)
        except ValueError as error:
            return found.add("latents", str(error))
        if codec.scale != latents["scale"]:
            found.add("latents", f"the checkpoint's latents have scale {latents['scale']}, {vae} has {codec.scale}")
        if latents["codec"] not in ("", codec.fingerprint):
            found.add("latents", f"{vae} is another autoencoder than the one that made the latents ({latents['vae']})")
    else:
        say(f"not checked: the autoencoder {vae} is no local folder")
    if (shards / "manifest.json").is_file():
        try:
            manifest = Manifest.load(shards)
        except ValueError as error:
            return found.add("latents", str(error))
        for key, own in (("scale", manifest.scale), ("shape", list(manifest.latent_shape)), ("codec", manifest.codec)):
            if latents[key] not in ("", own):
                found.add("latents", f"the latents in {shards} have {key} {own}, the checkpoint says {latents[key]}")


@torch.no_grad()
def check_forward(model: DiT, objective, shape, golden: Path, found: Findings, say: Callable[[str], None]) -> None:
    """Finite, the same twice, and as recorded where a golden.npz lies beside the weights."""
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    t = objective.model_time(torch.tensor([0.001, 0.5, 1.0], dtype=torch.float64))
    y = torch.tensor([0, max(model.num_classes - 1, 0), model.null_label or 0])
    out = model(x, t, y)
    if not out.isfinite().all():
        return found.add("forward", "the network's output on random input is not finite")
    if not torch.equal(out, model(x, t, y)):
        found.add("forward", "the network gives two outputs for one input")
    if not golden.is_file():
        return say("forward: finite, the same twice (no golden.npz to compare with)")
    with np.load(golden, allow_pickle=False) as file:
        recorded = {name: torch.from_numpy(file[name]) for name in ("x", "t", "y", "out")}
    out = model(recorded["x"], recorded["t"], recorded["y"])
    if out.shape != recorded["out"].shape:
        return found.add("forward", f"{golden.name} holds outputs of another shape: {tuple(recorded['out'].shape)}")
    gap, largest = (out - recorded["out"]).abs().max().item(), recorded["out"].abs().max().item()
    say(f"forward: finite, the same twice, within {gap:.1e} of the recorded one (largest value {largest:.2g})")
    if not gap <= CLOSE * largest:
        found.add("forward", f"the output differs from the recorded one by {gap:.2g} of {largest:.2g}")


def verify_shards(folder: Path, found: Findings, say: Callable[[str], None]) -> None:
    try:
        manifest = Manifest.load(folder)
    except ValueError as error:
        return found.add("manifest", str(error))
    for path in sorted(set(folder.glob("*.tar")) - {folder / shard.name for shard in manifest.shards}):
        found.add("files", f"{path} is not in the manifest")
    try:
        index = manifest.index()
    except ValueError as error:
        found.add("index", str(error))
        index = None
    if index is not None and check_index(manifest, index, found):
        index = None  # its offsets cannot be trusted
    moments = Moments(manifest)
    for number, shard in enumerate(tqdm(manifest.shards, unit="shard", disable=None)):
        data = check_shard(folder, shard, found)
        if data is not None and index is not None:
            check_samples(manifest, index[index["shard"] == number], data, shard, found, moments)
    if moments.images == len(manifest) and not found.counts["sample"]:
        moments.compare(found)
        size = sum(shard.bytes for shard in manifest.shards) / 2**20
        say(
            f"{folder}: {len(manifest)} images of {manifest.num_classes} classes in {len(manifest.shards)} shards, "
            f"{size:.1f} MiB, latents {'x'.join(map(str, manifest.latent_shape))}, mean "
            f"{rounded(moments.mean)}, deviation {rounded(moments.std)}"
        )


def check_index(manifest: Manifest, index: np.ndarray, found: Findings) -> bool:
    """True where the index does not describe the shards."""
    before = found.counts["index"]
    counts = np.bincount(index["shard"], minlength=len(manifest.shards)).tolist()
    if counts != [shard.samples for shard in manifest.shards]:
        found.add("index", "index.npy has other numbers of samples per shard than the manifest")
    if len(np.unique(index["key"])) != len(index):
        found.add("index", "index.npy names a key twice")
    labels = index["label"]
    for row in index[(labels < 0) | (labels >= manifest.num_classes)]:
        found.add(
            "labels", f"sample {row['key']:09d} has label {row['label']}, not one of 0..{manifest.num_classes - 1}"
        )
    if not found.counts["labels"]:
        classes = np.bincount(labels, minlength=manifest.num_classes).tolist()
        if classes != list(manifest.class_counts):
            found.add("labels", "the classes' counts in the manifest are not those of the index")
    return found.counts["index"] > before


def check_shard(folder: Path, shard: Shard, found: Findings) -> np.ndarray | None:
    """The shard's bytes, mapped, or None where they are not all there."""
    path = folder / shard.name
    size = path.stat().st_size if path.is_file() else None
    if size != shard.bytes:
        state = "is missing" if size is None else f"has {size} bytes instead of {shard.bytes}"
        found.add("files", f"{path} {state}")
        return None
    data = np.memmap(path, np.uint8, "r")
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        found.add("files", f"{path} is damaged: its SHA-256 is not the manifest's")
    return data


def check_samples(
    manifest: Manifest, rows: np.ndarray, data: np.ndarray, shard: Shard, found: Findings, moments
) -> None:
    """Every sample of a shard: the tar as other readers see it, checksums, finite values, deviations not negative."""
    labels = tar_labels(data, shard, found)
    dtype, (channels, height, width) = DTYPES[manifest.dtype], manifest.latent_shape
    size = dtype.itemsize * 2 * channels * height * width
    for row in rows:
        key = f"{int(row['key']):09d}"
        if labels is not None and labels.get(key) != row["label"]:
            found.add(
                "sample",
                f"{shard.name}: sample {key} has label {labels.get(key)} in the tar, {row['label']} in the index",
            )
        start = int(row["offset"])
        both = data[start : start + 2 * size]
        if [zlib.crc32(both[:size]), zlib.crc32(both[size:])] != row["crc32"].tolist() or len(both) != 2 * size:
            found.add("sample", f"{shard.name}: sample {key} is damaged, its bytes do not match their crc32")
            continue
        array = both.view(dtype).reshape(2, 2 * channels, height, width).astype(np.float64)
        if not np.isfinite(array).all():
            found.add("sample", f"{shard.name}: sample {key} has values that are not finite")
        elif (array[:, channels:] < 0).any():
            found.add("sample", f"{shard.name}: sample {key} has negative deviations")
        else:
            moments.add(array)


def tar_labels(data: np.ndarray, shard: Shard, found: Findings) -> dict[str, int] | None:
    """key -> label as webdataset would read them; None where the tar cannot be walked."""
    labels, arrays = {}, set()
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                if kind == "cls":
                    labels[key] = int(tar.extractfile(member).read())
                else:
                    arrays.add(key)
    except (tarfile.TarError, ValueError) as error:
        found.add("files", f"{shard.name} is no whole tar: {error}")
        return None
    if len(labels) == len(arrays & labels.keys()) == shard.samples:
        return labels
    found.add("files", f"{shard.name}: a tar reader finds {len(arrays)} samples and {len(labels)} labels in it, not "
              f"{shard.samples} of each; a header is damaged")  # fmt: skip
    return None


class Moments:
    """Means and deviations of scaled latents per channel, as the manifest has them."""

    def __init__(self, manifest: Manifest):
        self.manifest, self.images, self.sums = manifest, 0, np.zeros((3, manifest.latent_shape[0]))

    def add(self, array: np.ndarray) -> None:
        mean, std = np.split(array, 2, axis=1)  # (2, C, h, w) each
        self.sums += np.stack([m.mean(axis=(0, 2, 3)) for m in (mean, mean**2, std**2)])
        self.images += 1

    @property
    def mean(self) -> np.ndarray:
        return (self.sums[0] / self.images - self.manifest.shift) * self.manifest.scale

    @property
    def std(self) -> np.ndarray:
        mean, square, variance = self.sums / self.images
        return np.sqrt(square - mean**2 + variance) * abs(self.manifest.scale)

    def compare(self, found: Findings) -> None:
        for name, own, stored in (("means", self.mean, "channel_mean"), ("deviations", self.std, "channel_std")):
            if not np.allclose(own, getattr(self.manifest, stored), rtol=1e-5, atol=1e-6):
                said = rounded(getattr(self.manifest, stored))
                found.add("statistics", f"the channels' {name} are {rounded(own)}, the manifest says {said}")
        overall = float(np.sqrt((self.std**2).mean()))
        if not 0.5 <= overall <= 2 or not (0.25 <= self.std).all() or not (self.std <= 4).all():
            found.add(
                "scale",
                f"the scaled latents' deviations are {rounded(self.std)}, far from the 1 that diffusion assumes: "
                f"scale={self.manifest.scale:g} does not suit them, {self.manifest.scale / overall:.3g} does",
            )
        if (np.abs(self.mean) > 3).any():
            found.add("scale", f"the scaled latents' means are {rounded(self.mean)}, far from 0; a shift is missing")


def rounded(values) -> str:
    return " ".join(f"{value:.2f}" for value in values)
