"""Extraction, images/s: `extract_features` and two plain ways to do it, in rotation.

"loader": torch's DataLoader with worker processes, the same batch and crop, one .npy per image and orientation.
"one by one": the same without workers and with batches of one, as most latent scripts do.
All encode each image and its mirror image with the same weights. Starting the workers counts, loading the autoencoder
does not. Without --images, noisy JPEGs of 500 x 375, ImageNet's typical size, are generated. Without --vae the weights
are random: on a GPU the released autoencoder's size and 256 px; on a CPU, where the encoder would dominate, the
quickstart's order of size and 32 px.

    python -m bench.io.extract [--images DIR] [--vae NAME_OR_DIR] [--image-size 256] [--count 512] [--rounds 5]
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench.record import compared, parser, record, rotate
from fastdit.data.extract import PRECISIONS, extract_features
from fastdit.data.images import load_crop, to_pixels
from fastdit.data.latents import LatentCodec
from fastdit.data.sources import ImageSource, list_images
from fastdit.distributed import init


def make_images(folder: Path, count: int) -> Path:
    """JPEGs with as much detail as photographs: noise at every scale."""
    rng = np.random.default_rng(0)
    for i in range(count):
        image = np.zeros((375, 500, 3))
        for side in (4, 16, 64, 250):
            noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
            image += np.asarray(noise.resize((500, 375), Image.Resampling.BICUBIC)) / 4
        path = folder / str(i % 4) / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.astype(np.uint8)).save(path, quality=90)
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


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--images")
    options.add_argument("--vae")
    options.add_argument("--image-size", type=int)
    options.add_argument("--batch-size", type=int, default=32)
    options.add_argument("--precision", default="float32", choices=PRECISIONS)
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--count", type=int, default=512, help="images to generate")
    options.add_argument("--rounds", type=int, default=5)
    arguments = options.parse_args()
    ranks = init()
    device, on_gpu, batch, workers = ranks.device, ranks.device.type == "cuda", arguments.batch_size, arguments.workers
    size = arguments.image_size or (256 if on_gpu else 32)
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        images = arguments.images or make_images(base / "images", arguments.count)
        vae = arguments.vae or make_vae(base / "vae", large=on_gpu)
        folder = list_images(images)
        codec = LatentCodec.load(vae, PRECISIONS[arguments.precision], device)
        codec.encode(torch.zeros(batch, 3, size, size, device=device))  # the first call tunes and allocates
        load, LatentCodec.load = LatentCodec.load, lambda *_: codec  # loading is not timed
        ways = {
            "fastdit": lambda out: extract_features(
                images=images, out=out, vae=vae, image_size=size, batch_size=batch, workers=workers,
                precision=arguments.precision, ranks=ranks,
            ),
            "loader": lambda out: plain(codec, folder, out, size, batch, workers, device),
            "one by one": lambda out: plain(codec, folder, out, size, 1, 0, device),
        }  # fmt: skip

        def rate(extract) -> float:
            out = Path(tempfile.mkdtemp(dir=base)) / "latents"
            start = time.perf_counter()
            extract(out)
            return len(folder) / (time.perf_counter() - start)

        rates = rotate({way: lambda run=run: rate(run) for way, run in ways.items()}, arguments.rounds)
        LatentCodec.load = load
    settings = {"image_size": size, "batch_size": batch, "workers": workers, "precision": arguments.precision,
                "vae_parameters": sum(p.numel() for p in codec.vae.parameters())}  # fmt: skip
    for way, figures in compared(rates).items():
        record("extract", arguments.out, way=way, **figures, **settings)


if __name__ == "__main__":
    main()
