"""Extraction, images/s: `extract_features` in several precisions and two plain ways to do it, in rotation.

"fastdit-fp32", "fastdit-bf16", "fastdit-bf16-compiled": our command; on a GPU all three are channels-last. Their rate
is the one that the command reports, from the first batch to the finished shards; `setup_s` is what comes before it:
the preview and, where it is compiled, the compilation.
"loader": torch's DataLoader with worker processes, the same batch and crop, fp32, one .npy per image and orientation.
"one-by-one": the same without workers and with batches of one, as most latent scripts do.
"decode", "encode", "write": the parts of "fastdit-fp32" alone, of images in memory for the second and of latents in
memory for the third. With all three, a further line says what share of the slowest part's rate the whole has, and of
the rate of one part after the other, which is the most that a single core can have.
All encode each image and its mirror image with the same weights. Starting the workers counts, loading the autoencoder
does not. On a GPU "float32" allows TF32, as everywhere in fastdit. Without --images, noisy JPEGs of 500 x 375,
ImageNet's typical size, are generated. Without --vae the weights are random: on a GPU the released autoencoder's size
and 256 px; on a CPU, where the encoder would dominate, the quickstart's order of size and 32 px.

    python -m bench.io.extract [--images DIR] [--vae NAME_OR_DIR] [--image-size 256] [--count 512] [--rounds 5]
    python -m bench.io.extract --ways fastdit-fp32 fastdit-bf16-compiled loader
    python -m bench.io.extract --ways fastdit-fp32 decode encode write [--cpu-time]
"""

import copy
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench.record import compared, markdown, parser, record
from fastdit.data import encode, extract
from fastdit.data.images import load_crop, to_pixels
from fastdit.data.latents import LatentCodec
from fastdit.data.sources import ImageSource, list_images
from fastdit.data.writer import ShardWriter
from fastdit.distributed import init

# name: (precision, compile) of extract_features; None: a plain way
WAYS = {
    "fastdit-fp32": ("float32", False), "fastdit-bf16-compiled": ("bfloat16", True),
    "fastdit-bf16": ("bfloat16", False), "loader": None, "one-by-one": None,
    "decode": None, "encode": None, "write": None,
}  # fmt: skip
PARTS = ("decode", "encode", "write")


def make_images(folder: Path, count: int) -> Path:
    """JPEGs with as much detail as photographs: noise at every scale."""

    def make(i: int) -> None:
        rng = np.random.default_rng(i)
        image = np.zeros((375, 500, 3))
        for side in (4, 16, 64, 250):
            noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
            image += np.asarray(noise.resize((500, 375), Image.Resampling.BICUBIC)) / 4
        path = folder / str(i % 4) / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.astype(np.uint8)).save(path, quality=90)

    with ThreadPoolExecutor() as pool:
        list(pool.map(make, range(count)))
    return folder


def make_vae(folder: Path, large: bool) -> Path:
    from diffusers import AutoencoderKL

    channels = (128, 256, 512, 512) if large else (8, 8, 16, 16)
    AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2 if large else 1,
        norm_num_groups=32 if large else 4,
    ).save_pretrained(folder)
    return folder


class Crops(torch.utils.data.Dataset):
    def __init__(self, folder: ImageSource, size: int):
        self.folder, self.size = folder, size

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.from_numpy(load_crop(self.folder.root / self.folder.paths[i], self.size))


def plain(codec: LatentCodec, folder: ImageSource, out: Path, size: int, batch: int, workers: int, device) -> None:
    out.mkdir()
    done = 0
    for crops in torch.utils.data.DataLoader(Crops(folder, size), batch_size=batch, num_workers=workers):
        pixels = to_pixels(crops.to(device))
        for name, each in (("", pixels), ("-mirror", pixels.flip(-1))):
            for i, moments in enumerate(codec.encode(each).half().cpu().numpy()):
                np.save(out / f"{done + i}{name}.npy", moments)
        done += len(crops)


def part(name: str, codec: LatentCodec, folder: ImageSource, out: Path, size: int, batch: int, workers: int, device,
         clock) -> float:  # fmt: skip
    """Images/s of a part of our way, which uses the same functions."""

    def decoded() -> Iterator[np.ndarray]:
        read = partial(encode._read, folder, size, False)
        with ThreadPoolExecutor(workers) as threads:
            for _, (crop, _) in encode._ahead(read, range(len(folder)), threads, ahead=2 * batch + 2 * workers):
                yield crop

    def encoded(crops: list[np.ndarray]) -> Iterator[np.ndarray]:
        for start in range(0, len(crops), batch):
            yield encode.encode_both(codec, crops[start : start + batch], batch, device).cpu().numpy()

    crops = [] if name == "decode" else [*decoded()]
    arrays = [*encoded(crops)] if name == "write" else []
    start = clock()
    if name == "decode":
        deque(decoded(), maxlen=0)
    elif name == "encode":
        deque(encoded(crops), maxlen=0)
    else:
        out.mkdir()
        writer = ShardWriter(out, 0, "float16")
        for key in range(len(folder)):
            writer.add(key, arrays[key // batch][key % batch], 0)
        writer.close()
    return len(folder) / (clock() - start)


def shares(rates: dict[str, list[float]]) -> dict[str, float]:
    """The rate of the whole over that of its slowest part, and over that of one part after the other: medians."""
    rounds = [*zip(rates["fastdit-fp32"], *(rates[name] for name in PARTS), strict=False)]
    slowest = statistics.median(whole / min(parts) for whole, *parts in rounds)
    in_turn = statistics.median(whole * sum(1 / part for part in parts) for whole, *parts in rounds)
    return {"of_slowest_part": round(slowest, 3), "of_parts_in_turn": round(in_turn, 3), "rounds": len(rounds)}


def ours(out: Path, precision: str, compile: bool, clock, **common) -> tuple[float, dict]:
    """Images/s from the first image to the finished folder, and what else is known about the way."""
    lines, times, start = [], [], clock()
    said, share, summarize = extract.say, extract.extract_share, extract._summarize

    def timed(function):
        return lambda *arguments: (times.append(clock()), function(*arguments))[1]

    extract.say, extract.extract_share, extract._summarize = lines.append, timed(share), timed(summarize)
    try:
        manifest = extract.extract_features(out=out, precision=precision, compile=compile, **common)
    finally:
        extract.say, extract.extract_share, extract._summarize = said, share, summarize
    text = "\n".join(lines)
    if "runs without torch.compile" in text:
        raise RuntimeError(text)
    rate = len(manifest) / (times[1] - times[0])
    decibel = re.search(r"against float32: ([\d.]+) dB", text)
    facts = {"setup_s": round(times[0] - start, 1)}
    return rate, facts | ({"fp32_psnr_db": float(decibel[1])} if decibel else {})


def table(lines: list[dict]) -> str:
    header = ["way", "images/s", "min .. max", "x fastdit-fp32", "setup s", "dB to fp32"]
    return "## extract\n\n" + markdown([header] + [
        [line["way"], f"**{line['images_per_s']}**", "{} .. {}".format(*line["spread"]),
         line["over"].get("fastdit-fp32", 1), line.get("setup_s", ""), line.get("fp32_psnr_db", "")] for line in lines
    ])  # fmt: skip


def main() -> None:
    options = parser(__doc__)
    ranks = init()
    on_gpu, cores = ranks.device.type == "cuda", len(os.sched_getaffinity(0))
    usual = [*WAYS][:4] if on_gpu else ["fastdit-fp32", "loader", "one-by-one"]
    options.add_argument("--images")
    options.add_argument("--vae")
    options.add_argument("--image-size", type=int, default=256 if on_gpu else 32)
    options.add_argument("--batch-size", type=int, default=32)
    options.add_argument("--ways", nargs="+", choices=WAYS, default=usual)
    options.add_argument("--workers", type=int, default=cores if on_gpu else 2)
    options.add_argument("--count", type=int, default=512, help="images to generate")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--cpu-time", action="store_true", help="rates per second of CPU time of this process")
    options.add_argument("--budget-s", type=float, default=3600.0, help="seconds, after which no run begins")
    arguments = options.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # what was measured is recorded
    deadline = time.monotonic() + arguments.budget_s
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    device, batch, workers, size = ranks.device, arguments.batch_size, arguments.workers, arguments.image_size
    rates: dict[str, list[float]] = {}
    facts: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        images = arguments.images or make_images(base / "images", arguments.count)
        vae = arguments.vae or make_vae(base / "vae", large=on_gpu)
        folder = list_images(images)
        codec = LatentCodec.load(vae, torch.float32, device)
        plain_codec = copy.deepcopy(codec)  # fastdit's own are changed in place
        plain_codec.encode(torch.zeros(batch, 3, size, size, device=device))  # the first call tunes and allocates
        load, LatentCodec.load = LatentCodec.load, lambda *_: copy.deepcopy(codec)  # loading is not timed
        common = dict(images=images, vae=vae, image_size=size, batch_size=batch, workers=workers, ranks=ranks)

        def run(way: str) -> None:
            out = Path(tempfile.mkdtemp(dir=base)) / "latents"
            if WAYS[way]:
                rate, facts[way] = ours(out, *WAYS[way], clock, **common)
            elif way in PARTS:
                rate, facts[way] = part(way, codec, folder, out, size, batch, workers, device, clock), {}
            else:
                start = clock()
                plain(plain_codec, folder, out, size, *((batch, workers) if way == "loader" else (1, 0)), device)
                rate, facts[way] = len(folder) / (clock() - start), {}
            rates.setdefault(way, []).append(rate)

        try:
            for way in arguments.ways * arguments.rounds:
                if time.monotonic() < deadline:
                    run(way)
        finally:
            LatentCodec.load = load
            settings = {"image_size": size, "batch_size": batch, "workers": workers, "images": len(folder),
                        "clock": clock.__name__}  # fmt: skip
            settings["vae_parameters"] = sum(p.numel() for p in codec.vae.parameters())
            lines = [record("extract", arguments.out, way=way, **figures, **facts[way], **settings)
                     for way, figures in compared(rates).items()]  # fmt: skip
            if {"fastdit-fp32", *PARTS} <= rates.keys():
                record("extract", arguments.out, way="fastdit-fp32 of its parts", **shares(rates), **settings)
            if arguments.out:
                (arguments.out / "extract.md").write_text(table(lines))
    if missing := [way for way in arguments.ways if way not in rates]:
        sys.exit(f"not timed, the budget was used up: {', '.join(missing)}")


if __name__ == "__main__":
    main()
