"""Extraction, images/s: `extract_features` and two plain ways to do it, by turns in one run.

"loader": torch's DataLoader with worker processes, the same batch and crop, one .npy per image and orientation.
"one by one": the same without workers, a batch of one: what most latent scripts do.
All encode each image and its mirror with the same weights. Loading the autoencoder is not counted; starting the
workers is. Without --images it makes noisy JPEGs of 500 x 375, ImageNet's usual size; without --vae it takes random
weights: the released autoencoder's size and 256 px on a GPU, the quickstart's order of size and 32 px on a CPU, where
the encoder would otherwise take all the time.

    python bench/extract.py [--images DIR] [--vae NAME_OR_DIR] [--image-size 256] [--count 512] [--rounds 5]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from record import record

from fastdit.data.extract import PRECISIONS, extract_features
from fastdit.data.images import ImageFolder, list_images, load_crop, to_pixels
from fastdit.data.latents import LatentCodec
from fastdit.distributed import init


def make_images(folder: Path, count: int) -> None:
    """JPEGs with the detail of photographs: noise at every scale."""
    rng = np.random.default_rng(0)
    for i in range(count):
        image = np.zeros((375, 500, 3))
        for side in (4, 16, 64, 250):
            noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
            image += np.asarray(noise.resize((500, 375), Image.Resampling.BICUBIC)) / 4
        path = folder / str(i % 4) / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.astype(np.uint8)).save(path, quality=90)


def make_vae(folder: Path, large: bool) -> None:
    from diffusers import AutoencoderKL

    channels = (128, 256, 512, 512) if large else (8, 8, 16, 16)
    AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2 if large else 1,
        norm_num_groups=32 if large else 4,
    ).save_pretrained(folder)


class Crops(torch.utils.data.Dataset):
    def __init__(self, folder: ImageFolder, size: int):
        self.folder, self.size = folder, size

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.from_numpy(load_crop(self.folder.root / self.folder.paths[i], self.size))


def plain(codec: LatentCodec, folder: ImageFolder, out: Path, size: int, batch: int, workers: int, device) -> None:
    out.mkdir()
    done = 0
    for crops in torch.utils.data.DataLoader(Crops(folder, size), batch_size=batch, num_workers=workers):
        pixels = to_pixels(crops.to(device))
        for name, each in (("", pixels), ("-mirror", pixels.flip(-1))):
            for i, moments in enumerate(codec.encode(each).half().cpu().numpy()):
                np.save(out / f"{done + i}{name}.npy", moments)
        done += len(crops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images")
    parser.add_argument("--vae")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precision", default="float32", choices=PRECISIONS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--count", type=int, default=512, help="images to make")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    ranks = init()
    size = arguments.image_size or (256 if ranks.device.type == "cuda" else 32)
    batch, workers = arguments.batch_size, arguments.workers
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        if not arguments.images:
            make_images(base / "images", arguments.count)
        if not arguments.vae:
            make_vae(base / "vae", large=ranks.device.type == "cuda")
        images, vae = arguments.images or base / "images", arguments.vae or base / "vae"
        folder = list_images(images)
        codec = LatentCodec.load(vae, PRECISIONS[arguments.precision], ranks.device)
        codec.encode(torch.zeros(batch, 3, size, size, device=ranks.device))  # the first call tunes and allocates
        load = LatentCodec.load
        LatentCodec.load = lambda *_: codec  # nobody's loading is counted
        ways = {
            "fastdit": lambda out: extract_features(
                images=images, out=out, vae=vae, image_size=size, batch_size=batch, workers=workers,
                precision=arguments.precision, ranks=ranks,
            ),
            "loader": lambda out: plain(codec, folder, out, size, batch, workers, ranks.device),
            "one by one": lambda out: plain(codec, folder, out, size, 1, 0, ranks.device),
        }  # fmt: skip
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(arguments.rounds):
            for way, extract in ways.items():
                start = time.perf_counter()
                extract(base / f"{way}-{turn}")
                rates[way].append(len(folder) / (time.perf_counter() - start))
        LatentCodec.load = load
    medians = {way: statistics.median(each) for way, each in rates.items()}
    settings = {"image_size": size, "batch_size": batch, "workers": workers, "precision": arguments.precision}
    settings["vae_parameters"] = sum(p.numel() for p in codec.vae.parameters())
    for way, median in medians.items():
        spread = [round(min(rates[way]), 1), round(max(rates[way]), 1)]
        ratio = round(medians["fastdit"] / median, 2)
        record(
            "extract", way=way, images_per_s=round(median, 1), spread=spread, fastdit_over_this=ratio, **settings
        )  # fmt: skip


if __name__ == "__main__":
    main()
