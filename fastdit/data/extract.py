"""Extract latent shards from images, with any number of processes and interruptions.

Each process writes whole shards, and every batch has the same size (the last one is padded), so the files are
byte-identical in any case. Each file is written by one process; rank 0 merges the parts.
"""

import copy
import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fastdit.data.add_features import (
    PRECISIONS,
    add_features,
    check_same_images,
    check_space,
    check_stored,
    feature_bytes,
)
from fastdit.data.archives import open_images
from fastdit.data.autoencoders import NO_VAE
from fastdit.data.encode import extract_share
from fastdit.data.features import FEATURE_DTYPES, Encoder
from fastdit.data.images import Size, parse_size, width_height
from fastdit.data.jobs import write_folder
from fastdit.data.latents import LatentCodec
from fastdit.data.manifest import DTYPES, Manifest
from fastdit.data.preview import Preview, look
from fastdit.data.progress import Progress
from fastdit.data.sources import remarks
from fastdit.data.writer import SHARD_SIZE, TAR_OVERHEAD, ShardWriter, check_out, publish
from fastdit.distributed import Ranks
from fastdit.environment import cores
from fastdit.errors import counted
from fastdit.registry import check

WORTH_COMPILING = 10_000  # images for which half a minute of compilation pays


def extract_features(
    *,
    images: str | Path,
    out: str | Path,
    vae: str | Path,
    image_size: Size | str = 256,
    batch_size: int = 32,
    dtype: str | None = None,
    precision: str | None = None,
    compile: bool | None = None,
    adm_exact: bool = False,
    workers: int | None = None,
    shard_size: int | None = None,
    overwrite: bool = False,
    encoder: Encoder | None = None,
    feature_dtype: str = "float16",
    ranks: Ranks | None = None,
) -> Manifest:
    """Writes shards to `out` with the moments of each image in `images` (see `open_images`) and of its mirror image.

    `vae`: a folder, a hub name, or "none": the latents are the pixels. It computes in `precision` (None: bfloat16 on a
    GPU, float32 on a CPU), and the moments are stored as `dtype` (None: float16), `shard_size` images per shard (None:
    2048). `image_size`: the side of a square or (width, height), also as text: "512x256".
    `compile`: the encoder, with torch.compile (None: on a GPU, for many images). `adm_exact`: see `read_image`.
    `workers`: decoding threads of this process (None: its share of the cores). `ranks`: this process among those that
    share the work (None: a single process, on a GPU if there is one); all must see the same `out`. The images are
    shuffled once, in a fixed order, so that each shard mixes the classes for readers that shuffle only the shards.

    With an `encoder` (evaluation/encoders.py), its features of the same images follow, in <out>/features and stored as
    `feature_dtype`: float16 or int8. If `out` already has the latents of these images, only the features are added;
    a `dtype` or `shard_size` other than theirs is a ValueError.

    `out` appears once it is complete, and is replaced only with `overwrite`. After a run was stopped in any way, one
    with the same settings keeps the shards that were finished, and the result is that of a run that was not stopped.
    Unreadable images are skipped and listed in <out>/skipped.txt. Raises a one-line ValueError for too many of them
    (see `Skipped`), invalid arguments, or a full disk.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ranks = ranks or Ranks(rank=0, local_rank=0, world=1, device=torch.device(device))
    on_gpu = ranks.device.type == "cuda"
    adds = encoder is not None and not overwrite and (Path(out) / "manifest.json").is_file()
    out, image_size = Path(out).resolve() if adds else check_out(out, overwrite), parse_size(image_size)
    pixels = str(vae) == NO_VAE
    if pixels and precision not in (None, "float32"):
        raise ValueError(f"precision={precision} is that of an autoencoder, and vae={vae} has none; leave it out")
    precision = precision or ("bfloat16" if on_gpu and not pixels and has_bfloat16(ranks.device) else "float32")
    workers = workers if workers is not None else cores_per_process()
    check(dtype or "float16", DTYPES, "dtype")
    check(precision, PRECISIONS, "precision")
    check(feature_dtype, FEATURE_DTYPES, "feature_dtype")
    check_precision(precision, ranks.device)
    for key, value in (("batch_size", batch_size), ("workers", workers), ("shard_size", shard_size)):
        if value is not None and value < 1:
            raise ValueError(f"{key}={value} must be at least 1")
    source = open_images(images)
    if adds:
        manifest = Manifest.load(out)
        check_stored(manifest, dtype, shard_size)
        check_same_images(source, manifest, LatentCodec.load(vae, torch.float32, ranks.device), image_size, adm_exact)
        add_features(source, manifest, encoder, feature_dtype, precision, ranks, batch_size, workers, adm_exact, say)
        return manifest
    dtype, shard_size = dtype or "float16", shard_size or SHARD_SIZE
    if out.is_relative_to(source.root.resolve()):
        raise ValueError(f"out={out} lies inside images={images}, where it would become a class; write it elsewhere")
    exact = LatentCodec.load(vae, torch.float32, ranks.device)
    exact.check_image_size(*width_height(image_size))
    codec = exact if precision == "float32" else copy.deepcopy(exact).to(PRECISIONS[precision])
    compile = not pixels and (on_gpu and len(source) >= WORTH_COMPILING if compile is None else compile)
    latents = replace(exact.spec(image_size), precision=precision)
    about = Manifest(latents, dtype, source.class_names, images=len(source), source=source.kind,
                     listing=source.listing)  # fmt: skip
    settings = {
        "images": source.identity,
        "vae": exact.fingerprint,
        "image_size": [*width_height(image_size)],
        **dict(dtype=dtype, precision=precision, compile=compile, adm_exact=adm_exact, batch_size=batch_size),
        **dict(shard_size=shard_size, device=ranks.device.type),
    }
    shards = -(-len(source) // shard_size)
    seen, start = None, 0.0

    def before(share: float) -> None:
        nonlocal seen
        size = 4 * int(np.prod(about.latents.shape)) * DTYPES[dtype].itemsize + TAR_OVERHEAD
        per_image = feature_bytes(encoder, about, feature_dtype) if encoder else 0
        check_space(out, int(len(source) * (share * size + per_image)))
        for line in remarks(source):
            say(line)
        seen = look(source, exact, codec, image_size, adm_exact, ranks.device)
        for line in (*seen.remarks, *seen.precision_remarks(precision)) if seen else ():
            say(f"warning: {line}")

    def write(progress: Progress, own: list[int]) -> None:
        nonlocal start
        if on_gpu or compile:
            width, height = width_height(image_size)
            fault = codec.faster((batch_size, 3, height, width) if compile else None)
            if fault and ranks.is_main:
                say(f"warning: the autoencoder runs without torch.compile, which failed ({fault})")
        start = time.perf_counter()
        share = {number: source.order[number * shard_size : (number + 1) * shard_size] for number in own}
        writer = partial(ShardWriter, dtype=dtype)
        extract_share(source, progress, share, codec, writer, ranks, image_size, batch_size, workers, adm_exact)

    def complete(folder: Path, parts: list[dict], written: set[int]) -> None:
        if seen:
            seen.image.save(folder / "preview.png")
        found = publish(folder, out, about, parts, overwrite, source.ignored)
        done = sum(min(shard_size, len(source) - number * shard_size) for number in written)
        _summarize(found, done / (time.perf_counter() - start), seen, precision)

    write_folder(out, shards, settings, ranks, batch_size, say, before=before, write=write, publish=complete)
    manifest = Manifest.load(out)
    if encoder:
        add_features(source, manifest, encoder, feature_dtype, precision, ranks, batch_size, workers, adm_exact, say)
    return manifest


def check_precision(precision: str, device: torch.device) -> None:
    """ValueError for a device that cannot compute in `precision`, a key of PRECISIONS."""
    if device.type == "cuda":
        if precision == "bfloat16" and not has_bfloat16(device):
            name = torch.cuda.get_device_name(device)
            raise ValueError(f"precision={precision} needs a GPU from Ampere on, but this is a {name}; use float16")
    elif precision != "float32":
        ops = torch.ops.mkldnn
        supported = ops._is_mkldnn_bf16_supported if precision == "bfloat16" else ops._is_mkldnn_fp16_supported
        if not (torch.backends.mkldnn.is_available() and supported()):
            raise ValueError(f"precision={precision} is not supported by this CPU; use float32")


def has_bfloat16(gpu: torch.device) -> bool:
    return torch.cuda.get_device_capability(gpu) >= (8, 0)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _summarize(about: Manifest, rate: float, seen: Preview | None, precision: str) -> None:
    skipped = f", {counted(about.skipped, 'unreadable image')} listed in skipped.txt" if about.skipped else ""
    found = f"{counted(len(about), 'image')} in {counted(len(about.shards), 'shard')}"
    say(f"{about.folder}: {found}, {rate:.1f} images/s{skipped}")
    if about.counts:
        say(f"of these: {', '.join(f'{count} x {what}' for what, count in about.counts.items())}")
    if seen:
        say(seen.says(precision))
    if not (seen and seen.remarks):
        for line in about.scale_remarks():
            say(f"warning: {line}")


def cores_per_process() -> int:
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
