"""Latents that other programs wrote (others.py) as shards: the same values, checked one by one."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shlex import quote

import numpy as np
import torch
from tqdm import tqdm

from fastdit.data.add_features import check_space
from fastdit.data.autoencoders import from_unit_range
from fastdit.data.images import Size, parse_size, size_text, to_uint8, width_height
from fastdit.data.jobs import write_folder
from fastdit.data.latents import LatentCodec, LatentSpec, mean_latents
from fastdit.data.manifest import DTYPES, Manifest
from fastdit.data.others import LAYOUTS, STATS, OtherLatents, Sample, check_label
from fastdit.data.progress import Progress
from fastdit.data.synthetic import SD_SCALE
from fastdit.data.writer import SHARD_SIZE, TAR_OVERHEAD, ShardWriter, check_out, publish
from fastdit.distributed import Ranks
from fastdit.errors import counted
from fastdit.files import read_text
from fastdit.registry import check
from fastdit.sheets import tiled

SHOWN = 8  # samples in preview.png


def import_latents(
    layout: str,
    src: str | Path,
    out: str | Path,
    *,
    vae: str | Path | None = None,
    image_size: Size | str | None = None,
    scale: float | None = None,
    classes: str | Path | None = None,
    mirrored: str | Path | None = None,
    dtype: str | None = None,
    shard_size: int = SHARD_SIZE,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> Manifest:
    """Writes shards to `out` with the latents in `src`, whose `layout` is a key of LAYOUTS.

    `vae`: the autoencoder that encoded them, a folder or a hub name. It is loaded, compared with the latents and
    recorded with its fingerprint, and `preview.png` shows the first samples decoded. Without it, the layout's usual one
    is recorded by name alone. `image_size`: as for `extract_features` (None: by the autoencoder's downsampling).
    `scale`: what training multiplies the unscaled latents by (None: the layout's, else the autoencoder's). `classes`: a
    text file with the name of a class in each line (None: the layout's names, else the numbers). `mirrored`: the folder
    with the latents of the mirror images, for `cerebras`. `dtype`: float32 or float16 (None: that of the source).

    Samples keep their order. The values are those of the source in `dtype`; a scale that the source applied is divided
    out in fp32. `out` appears once it is complete. After an interruption, the same call keeps the finished shards.
    Raises a one-line ValueError for a source that is damaged, incomplete or inconsistent.
    """
    check(layout, LAYOUTS, "FORMAT")
    root, out = Path(src), check_out(out, overwrite)
    if not root.exists():
        raise ValueError(f"SRC={src} does not exist; give the folder or file with the latents")
    if root.is_dir() and out.is_relative_to(root.resolve()):
        raise ValueError(f"OUT={out} lies inside SRC={src}; write it elsewhere")
    if mirrored and layout != "cerebras":
        raise ValueError(f"--mirrored={mirrored} is for cerebras; {layout} keeps mirror images in SRC, or has none")
    if shard_size < 1 or not (scale is None or 0 < scale < float("inf")):
        raise ValueError(f"--shard-size={shard_size} and --scale={scale} must be positive")
    codec = LatentCodec.load(vae) if vae else None
    if layout == "edm2":
        codec = _of_usual_pixels(codec, out)
    source = LAYOUTS[layout](root, scale, Path(mirrored) if mirrored else None)
    if not len(source.names):
        raise ValueError(f"SRC={src} holds no latents in the layout of {layout}; see fastdit import --help")
    if layout == "lightningdit" and not (source.scale or codec):
        raise ValueError(f"SRC={src} has no {STATS}, which says the scale; copy it there, or give --scale ({SD_SCALE} "
                         "for Stable Diffusion's autoencoder) or --vae")  # fmt: skip
    first, has_labels = source.read(0)[0], source.read(0)[1] is not None
    if classes and not has_labels:
        raise ValueError(f"--classes={classes} names classes, but SRC={src} has no labels; omit it")
    orientations, channels, *sides = first.shape[0], first.shape[1] // 2, *first.shape[2:]
    dtype = dtype or ("float16" if first.dtype == np.float16 else "float32")
    check(dtype, DTYPES, "dtype")
    spec = _spec(source, (channels, *sides), codec, image_size, scale)
    names = _class_names(classes) if classes else source.class_names
    count, kind = len(source.names), f"latents of {layout}"
    about = Manifest(spec, dtype, names, images=count, source=kind, orientations=orientations)
    identity = repr((layout, [*source.names], source.versions, source.scale, source.shift))
    settings = {"latents": hashlib.sha256(identity.encode(errors="backslashreplace")).hexdigest(), "vae": spec.codec,
                "dtype": dtype, "shard_size": shard_size}  # fmt: skip
    shards, start = -(-count // shard_size), time.perf_counter()

    def before(share: float) -> None:
        check_space(out, int(count * share * (first.size * DTYPES[dtype].itemsize + TAR_OVERHEAD)))

    def write(progress: Progress, own: list[int]) -> None:
        with tqdm(total=len(own) * shard_size, unit="latent", disable=None) as bar:
            for number in own:
                writer = ShardWriter(progress.partial, number, dtype)
                for key in range(number * shard_size, min((number + 1) * shard_size, count)):
                    moments, label = checked(source, key, first.shape, dtype)
                    writer.add(key, moments, 0 if label is None else label)
                    bar.update()
                progress.finish(number, writer.close())

    def complete(folder: Path, parts: list[dict], written: set[int]) -> None:
        highest = max(row[4] for part in parts for row in part["rows"])
        if has_labels and names and highest >= len(names):
            where = f"--classes={classes}" if classes else f"SRC={src}"
            raise ValueError(f"{where} names {len(names)} classes, but there is a label {highest}; name all classes")
        found = names or (tuple(map(str, range(highest + 1))) if has_labels else ())
        if codec:
            _preview(source, codec, spec).save(folder / "preview.png")
        done = publish(folder, out, replace(about, class_names=found), parts, overwrite)
        _say_what(done, codec, count / (time.perf_counter() - start), say)

    ranks = Ranks(rank=0, local_rank=0, world=1, device=torch.device("cpu"))
    write_folder(out, shards, settings, ranks, 1, say, before=before, write=write, publish=complete)
    return Manifest.load(out)


def _of_usual_pixels(codec: LatentCodec | None, out: Path) -> LatentCodec:
    """EDM2 gives the autoencoder pixels in [0, 1], and it decodes such: one for pixels in [-1, 1], beside `out`."""
    if not codec or type(codec.vae).__name__ != "AutoencoderKL":
        raise ValueError("edm2 needs --vae: EDM2 encodes pixels in [0, 1], and the import writes the autoencoder that "
                         "decodes to [-1, 1]; give --vae stabilityai/sd-vae-ft-mse or its folder")  # fmt: skip
    folder = out.with_name(f"{out.name}-vae")
    if Path(codec.name) == folder:
        raise ValueError(f"--vae={folder} was written by an import, for pixels in [-1, 1]; give EDM2's autoencoder")
    from_unit_range(codec.vae).save_pretrained(folder)
    return LatentCodec.load(folder)


def checked(source: OtherLatents, i: int, shape: tuple[int, ...], dtype: str) -> Sample:
    """Sample i; ValueError unless it has the shape of the first one, deviations >= 0 and a label that can be one."""
    moments, label = source.read(i)
    name = source.names[i]
    if moments.shape != shape:
        raise ValueError(f"{name} has moments of shape {moments.shape}, but {source.names[0]} {shape}; import latents "
                         "of one shape")  # fmt: skip
    if not np.isfinite(moments).all():
        raise ValueError(f"{name} has values too large for float32 once they are divided by the scale; the file is "
                         "damaged, or --scale is wrong")  # fmt: skip
    if (moments[:, shape[1] // 2 :] < 0).any():
        raise ValueError(f"{name} has deviations below 0; FORMAT is another one, or the file is damaged")
    if dtype == "float16" and np.abs(moments).max() > np.finfo(np.float16).max:
        most = np.abs(moments).max()
        raise ValueError(f"{name} has values up to {most:g}, too large for --dtype=float16; use float32")
    if label is not None:
        check_label(label, name)
    return moments, label


def _spec(
    source: OtherLatents,
    shape: tuple[int, int, int],
    codec: LatentCodec | None,
    size: Size | str | None,
    scale: float | None,
) -> LatentSpec:
    """What the manifest says of the latents; ValueError where the autoencoder cannot have made them."""
    if codec and codec.channels != shape[0]:
        raise ValueError(f"vae={codec.name} has {codec.channels} latent channels, but the latents have {shape[0]}; "
                         "give the autoencoder that encoded them")  # fmt: skip
    factor = codec.downsample if codec else source.downsample
    own = (shape[2] * factor, shape[1] * factor)
    size = parse_size(size) if size else parse_size(own)
    if codec and width_height(size) != own:
        raise ValueError(f"image_size={size_text(size)}, but vae={codec.name} makes latents {shape[2]} x {shape[1]} of "
                         f"{own[0]} x {own[1]} px; omit one of them, or give the right one")  # fmt: skip
    own_scale, own_shift = (codec.scale, codec.shift) if codec else (SD_SCALE, 0.0)
    chosen = source.scale or scale
    if isinstance(chosen, tuple) and len(chosen) != shape[0]:
        raise ValueError(f"{STATS} has {len(chosen)} channels, the latents {shape[0]}; copy it again")
    scale, shift = (chosen, source.shift) if chosen else (own_scale, own_shift)
    if codec:
        return replace(codec.spec(size, shape), scale=scale, shift=shift)
    return LatentSpec(shape, scale, shift, source.vae, "", size)


def _class_names(path: str | Path) -> tuple[str, ...]:
    try:
        names = tuple(line.strip() for line in read_text(Path(path)).strip().splitlines())
    except OSError as error:
        raise ValueError(f"--classes={path} cannot be read ({error.strerror}); give a text file") from None
    if not names or "" in names or len(set(names)) < len(names):
        raise ValueError(f"--classes={path} has an empty or repeated line; give a name in each, in the order of labels")
    return names


def _preview(source: OtherLatents, codec: LatentCodec, spec: LatentSpec):
    """The first samples as the autoencoder decodes them, and below them their mirror images if there are any."""
    moments = np.stack([source.read(i)[0] for i in range(min(SHOWN, len(source.names)))], axis=1)
    codec.take_scale_of(spec)
    rows = []
    for row in torch.from_numpy(moments).float():  # (n, 2C, h, w) of an orientation
        rows.append([to_uint8(codec.decode(one[None]))[0].numpy() for one in mean_latents(row, spec)])
    return tiled(rows)


def _say_what(found: Manifest, codec: LatentCodec | None, rate: float, say: Callable[[str], None]) -> None:
    spec, classes = found.latents, counted(found.num_classes, "class", "classes") if found.num_classes else "no classes"
    say(f"{found.folder}: {len(found):,} latents {'x'.join(map(str, spec.shape))} of {size_text(spec.image_size)} px "
        f"images, {classes}, {counted(len(found.shards), 'shard')}, scale {spec.scaling}, "
        f"{rate:.0f} latents/s")  # fmt: skip
    if not codec:
        say(f"the autoencoder is recorded by name alone, {spec.vae}; --vae would load and compare it")
    for line in found.scale_remarks():
        say(f"warning: {line}")
    if found.orientations == 1:
        say(f"there are no latents of mirror images: fastdit train sit_s_2 {quote(f'data.shards={found.folder}')} "
            "data.hflip=false")  # fmt: skip
