"""Folders of latents: what they hold, merged, split, samples of them, and what can be saved of a damaged one.

Nothing is changed in place: each result is a new folder, which appears once it is complete.
"""

import hashlib
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fastdit.data.features import FOLDER, FeatureManifest, StoredFeatureWriter, beside_latents, publish_features
from fastdit.data.images import EXTENSIONS, size_text, to_uint8
from fastdit.data.latents import LatentCodec, mean_latents
from fastdit.data.loader import moments_shape
from fastdit.data.manifest import DTYPES, HEADER, Manifest, ShardFolder
from fastdit.data.opening import open_latents
from fastdit.data.order import HELD_OUT, hash_of
from fastdit.data.reader import ShardReader
from fastdit.data.remote import Cache, check_local
from fastdit.data.writer import prepare, write_keyed, write_tars
from fastdit.errors import counted, output_file
from fastdit.files import read_array
from fastdit.sheets import in_rows, tiled

COLUMNS, SHOWN = 8, 5  # of a sheet; classes in the statistics at each end
Sample = tuple[int, np.ndarray, int]  # key, moments (orientations, 2C, h, w) or stored features (2, ...), label


def stats(folder: str | Path, every_class: bool = False, cache: str | Path = "") -> str:
    """What the manifest says, as text; with `every_class` the number of images of each class.

    Here and below, `cache` is the folder for the files of URLs.
    """
    manifest = open_latents(folder, Cache(cache))
    manifest.check()
    spec, counts = manifest.latents, np.array(manifest.class_counts)
    shards, gib = counted(len(manifest.shards), "shard"), sum(shard.bytes for shard in manifest.shards) / 2**30
    lines = [
        f"{counted(len(manifest), 'image')} in {shards}, {gib:.3g} GiB, {manifest.source or 'unknown source'}",
        f"latents {'x'.join(map(str, spec.shape))} of {size_text(spec.image_size)} px, {manifest.dtype}, "
        + ("with mirror images" if manifest.orientations == 2 else "without mirror images"),
        f"autoencoder {spec.vae} ({spec.codec[:12] or 'unknown weights'}), scale {spec.scaling}",
        *(f"channel {c}: mean {mean:.4f}, standard deviation {std:.4f}"
          for c, (mean, std) in enumerate(zip(manifest.channel_mean, manifest.channel_std, strict=True))),
        *(f"warning: {line}" for line in manifest.scale_remarks()),
    ]  # fmt: skip
    order = np.argsort(-counts, kind="stable").tolist() if len(counts) else []
    classes = counted(len(counts), "class", "classes")
    lines.append(classes + (f" of {counts.min()} to {counts.max()} images" if order else ""))
    shown = order if every_class or len(order) <= 2 * SHOWN else [*order[:SHOWN], None, *order[-SHOWN:]]
    lines += ["..." if i is None else f"{counts[i]:8d}  {i} {manifest.class_names[i]}" for i in shown]
    return "\n".join(lines)


def merge(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    features: bool = True,
    overwrite: bool = False,
    cache: str | Path = "",
) -> Manifest:
    """The images of all folders, one after the other; ValueError unless one network could be trained on all.

    With `features`, those in the folders are taken along; here and below.

    Key n of a folder becomes n + the number of images in the sources of the folders before it.
    """
    manifests = [open_latents(folder, Cache(cache)) for folder in folders]
    if len(manifests) < 2:
        raise ValueError("merge needs two folders or more, and then a new one for the result")
    first = manifests[0]
    for other in manifests[1:]:
        first.latents.check(other.latents, str(first.folder), str(other.folder), "precision")
        for key, own, theirs in (
            ("image_size", first.latents.image_size, other.latents.image_size),
            ("dtype", first.dtype, other.dtype),
            ("mirror images", first.orientations == 2, other.orientations == 2),
            ("class names", first.class_names, other.class_names),
        ):
            if own != theirs:
                differs = "other class names than" if key == "class names" else f"{key} {theirs}, not {own} as"
                raise ValueError(f"{other.folder} has {differs} {first.folder}; make them alike to merge them")
        if [manifest.index_sha256 for manifest in manifests].count(other.index_sha256) > 1:
            raise ValueError(f"{other.folder} is named twice, or has the images of another folder; name each once")
    _check_new([out], *manifests)
    starts = np.cumsum([0, *(manifest.images for manifest in manifests)]).tolist()
    parts = [(manifest, np.arange(len(manifest)), start) for manifest, start in zip(manifests, starts, strict=False)]
    return _write(parts, out, replace(first, images=starts[-1], listing=""), features, overwrite)


def split(
    folder: str | Path,
    train: str | Path,
    val: str | Path,
    *,
    fraction: float | None = None,
    count: int | None = None,
    per_class: int | None = None,
    features: bool = True,
    overwrite: bool = False,
    cache: str | Path = "",
) -> tuple[Manifest, Manifest]:
    """Two folders, of which `val` has a fraction of the images, a number, or a number of each class.

    They are chosen by the hash of data.val_fraction: the same in every run, and a larger `val` holds a smaller one.
    """
    manifest = open_latents(folder, Cache(cache))
    _check_new([train, val], manifest)
    index = manifest.index()
    held_out = _chosen(manifest, index, HELD_OUT, fraction, count, per_class)
    if held_out.all() or not held_out.any():
        raise ValueError(f"{folder}: {held_out.sum()} of {len(index)} images for {val} leave one folder empty; use "
                         "another number")  # fmt: skip
    parts = [_write([(manifest, np.flatnonzero(rows), 0)], out, manifest, features, overwrite)
             for rows, out in ((~held_out, train), (held_out, val))]  # fmt: skip
    return parts[0], parts[1]


def sample(
    folder: str | Path,
    out: str | Path,
    *,
    count: int | None = None,
    per_class: int | None = None,
    seed: int = 0,
    vae: str | None = None,
    features: bool = True,
    overwrite: bool = False,
    cache: str | Path = "",
) -> Path:
    """Random images: decoded on a sheet if `out` ends in .png, else as a new folder of latents."""
    sheet = (out := Path(out)).suffix.lower() in EXTENSIONS
    if sheet:
        output_file(out, "OUT", ".png", new=not overwrite)
    manifest = open_latents(folder, Cache(cache))
    index = manifest.index()
    if count is None and per_class is None:
        count = min(64, len(index))
    chosen = _chosen(manifest, index, seed, None, count, per_class)
    if not sheet:
        _check_new([out], manifest)
        _write([(manifest, np.flatnonzero(chosen), 0)], out, manifest, features, overwrite)
        return out
    spec = manifest.latents
    codec, rows = LatentCodec.of(spec, str(folder), vae or ""), index[chosen]
    pictures = []
    for _, moments, _ in _read([(manifest, rows[np.argsort(rows["label"], kind="stable")], 0)]):  # class by class
        mean = mean_latents(torch.from_numpy(moments[:1].astype(np.float32)), spec)  # (1, C, h, w)
        pictures.append(to_uint8(codec.decode(mean))[0].numpy())
    tiled(in_rows(pictures, COLUMNS)).save(out)
    return out


def repair(
    folder: str | Path, out: str | Path, *, say: Callable[[str], None] = print, overwrite: bool = False
) -> Manifest:
    """The samples of a damaged folder that are intact, as a new one; `say` gets each that was dropped, and why.

    Without a usable index.npy, samples are read from the tar files in order, as far as these can be read. The manifest
    must be there: nothing else says which autoencoder encoded the latents.
    """
    check_local(folder, "fastdit shards repair")
    manifest = open_latents(folder)
    _check_new([out], manifest)
    try:
        index = manifest.index()
        missing = [shard.name for shard in manifest.shards if not (manifest.folder / shard.name).is_file()]
        lost = np.isin(index["shard"], [i for i, shard in enumerate(manifest.shards) if shard.name in missing])
        for name in missing:
            say(f"dropped: {name}, which is missing")
        rows = index[~lost]
        samples = _read([(manifest, rows[_as_stored(rows)], 0)], dropped=lambda fault: say(f"dropped: {fault}"))
        total = len(index)
    except ValueError as error:
        say(f"the index is made again from the tar files: {error}")
        samples, total = _scan(manifest, say), len(manifest)
    found = write_keyed(samples, out, manifest, overwrite=overwrite)
    left = ", without features" if (manifest.folder / FOLDER).exists() else ""
    say(f"{out}: {len(found)} of {total} images{left}")
    return found


def _check_new(outs: Sequence[str | Path], *manifests: Manifest) -> None:
    """ValueError where a result would replace another one, or what it is made from."""
    places = [Path(place).resolve() for place in (*outs, *(manifest.folder for manifest in manifests))]
    if again := next((place for place in places if places.count(place) > 1), None):
        raise ValueError(f"{again} is named twice; give each result a new folder")


def _chosen(
    manifest: Manifest, index: np.ndarray, seed: int, fraction: float | None, count: int | None, per_class: int | None
) -> np.ndarray:
    """A mask (n,) of the rows with the smallest hashes; ValueError unless one of the numbers is given and possible."""
    given = {"--fraction": fraction, "--count": count, "--per-class": per_class}
    given = {key: value for key, value in given.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"give one of --fraction, --count and --per-class, not {len(given)} of them")
    [(key, value)] = given.items()
    most = {"--fraction": 1, "--count": len(index), "--per-class": min(manifest.class_counts, default=0)}[key]
    if not 0 < value <= most:
        raise ValueError(f"{key}={value} must be above 0 and at most {most} for {manifest.folder}")
    hashes = hash_of(seed, index["key"].astype(np.uint64))
    if fraction:
        return hashes < np.uint64(min(fraction * 2**64, 2**64 - 1))
    if count:
        limit = np.sort(hashes)[count - 1]
        return hashes <= limit
    of_class = (hashes[index["label"] == label] for label in range(manifest.num_classes))
    return hashes <= np.array([np.sort(own)[per_class - 1] for own in of_class])[index["label"]]


def _as_stored(rows: np.ndarray) -> np.ndarray:
    """The places (n,) of the rows in the order of the files."""
    return np.lexsort((rows["offset"], rows["shard"]))


def _write(
    parts: Sequence[tuple[Manifest, np.ndarray, int]], out: str | Path, about: Manifest, features: bool, overwrite: bool
) -> Manifest:
    """Images of folders, by their places in the index, as a new folder; a number is added to their keys."""
    latents, beside = [], []
    for manifest, places, start in parts:
        index = manifest.index()
        places = places[_as_stored(index[places])]
        latents.append((manifest, index[places], start))
        if features and (own := beside_latents(manifest)):
            beside.append((own, own.check(manifest)[places], start))
        else:
            without = manifest.url or manifest.folder
    if beside and len(beside) < len(parts):
        raise ValueError(f"{without} has no features, but another folder has; add them with fastdit extract --encoder, "
                         "or leave them out with --no-features")  # fmt: skip
    for own, *_ in beside[1:]:
        beside[0][0].check_alike(own)

    def write_features(partial: Path) -> None:
        first = beside[0][0]
        new = prepare(partial / FOLDER)
        found = write_tars(_read(beside), lambda number: StoredFeatureWriter(new, number, first.dtype))
        publish_features(new, partial / FOLDER, replace(first, listing=about.listing), found)

    more = write_features if beside else None
    return write_keyed(_read(latents), out, about, overwrite=overwrite, write_more=more)


def _read(
    parts: Sequence[tuple[ShardFolder, np.ndarray, int]], dropped: Callable[[str], None] | None = None
) -> Iterator[Sample]:
    """The samples of rows of indices, with a number added to their keys; ValueError for a damaged one, or `dropped`."""
    with tqdm(total=sum(len(rows) for _, rows, _ in parts), unit="sample", disable=None) as bar:
        for manifest, rows, start in parts:
            remedy = "save the others with fastdit shards repair"
            if isinstance(manifest, FeatureManifest):
                array, remedy = np.empty(2, manifest.record), "extract the features again, or use --no-features"
            else:
                array = np.empty((manifest.orientations, *moments_shape(manifest)), DTYPES[manifest.dtype])
            with closing(ShardReader(manifest)) as reader:
                for row in rows:
                    bar.update()
                    if faults := reader.fill(np.repeat(row, len(array)), np.arange(len(array)), array):
                        fault = faults[min(faults)]
                        if not dropped:
                            raise ValueError(f"{fault}; {remedy}")
                        dropped(fault)
                        continue
                    yield int(row["key"]) + start, array.copy(), int(row["label"])


def _scan(manifest: Manifest, say: Callable[[str], None]) -> Iterator[Sample]:
    """The samples in the tar files themselves, up to the place in each from which on it cannot be read."""
    seen: set[int] = set()
    for shard in manifest.shards:
        count, path = 0, manifest.folder / shard.name
        try:
            with open(path, "rb") as file:
                intact = hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
            if not intact:  # only the index has a checksum of each sample
                say(f"warning: {path} is damaged: its SHA-256 does not match the manifest; without index.npy, damaged "
                    "values in its samples cannot be found, and are kept")  # fmt: skip
            with tarfile.open(path, "r:") as tar:
                members = iter(tar)
                for member in members:
                    sample, fault = _sample_of(tar, member, next(members, None), manifest, seen)
                    count += 1
                    if sample:
                        seen.add(sample[0])
                        yield sample
                    else:
                        say(f"dropped: {shard.name}: {fault}")
        except (tarfile.TarError, OSError) as error:
            say(f"{shard.name} ends early: {error}")
        if count < shard.samples:
            say(f"dropped: the last {shard.samples - count} of {shard.samples} samples of {shard.name}")


def _sample_of(
    tar: tarfile.TarFile, member: tarfile.TarInfo, label: tarfile.TarInfo | None, manifest: Manifest, seen: set[int]
) -> tuple[Sample | None, str]:
    """A sample of two members of a tar file, or what is wrong with it."""
    shape, dtype = (manifest.orientations, *moments_shape(manifest)), DTYPES[manifest.dtype]
    found = re.fullmatch(r"(\d{9,19})\.moments\.npy", member.name)
    if not (found and label and label.name == f"{found[1]}.cls" and member.isfile() and label.isfile()):
        return None, f"{member.name} and {label.name if label else 'nothing'} are not a sample"
    if member.size > dtype.itemsize * int(np.prod(shape)) + HEADER or label.size > 20:
        return None, f"{member.name} has {member.size} bytes, its label {label.size}"
    try:
        array, y = read_array(tar.extractfile(member).read()), int(tar.extractfile(label).read())
    except ValueError as error:
        return None, f"{member.name}: {error}"
    if array.shape != shape or array.dtype != dtype or not np.isfinite(array).all():
        return None, f"{member.name} has {array.dtype} {array.shape}, or values that are not finite"
    if (array[:, shape[1] // 2 :] < 0).any() or not 0 <= y < max(manifest.num_classes, 1) or int(found[1]) in seen:
        return None, f"{member.name} has deviations below 0, label {y}, or a key that was there before"
    return (int(found[1]), array, y), ""
