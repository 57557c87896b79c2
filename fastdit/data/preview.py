"""A look at an autoencoder before an extraction: images above their reconstructions, and what the numbers say."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fastdit.data.images import Size, load_crop, to_pixels, to_uint8
from fastdit.data.latents import LatentCodec, channel_statistics, channel_sums, mean_latents, scale_remarks
from fastdit.data.sources import ImageSource
from fastdit.distributed import one_thread
from fastdit.errors import counted

COUNT, GAP, LINE = 8, 4, 14  # images; pixels between them; height of a line of text


@dataclass(frozen=True)
class Preview:
    """`image`: the sheet. `psnr`: of the reconstructions, dB (n,). `precision_psnr`: of those from latents that were
    computed in the extraction's precision against those from float32, None if that is float32. `remarks`: what is wrong
    with the scale."""

    image: Image.Image
    psnr: tuple[float, ...]
    precision_psnr: float | None
    remarks: list[str]

    def says(self, precision: str) -> str:
        """One line for the report."""
        of = counted(len(self.psnr), "image")
        line = f"reconstruction: {np.mean(self.psnr):.1f} dB PSNR on average of {of} (preview.png)"
        if self.precision_psnr is None:
            return line
        return f"{line}; {precision} against float32: {self.precision_psnr:.1f} dB"

    def precision_remarks(self, precision: str) -> list[str]:
        """What is wrong with the extraction's precision: it may add a tenth to the reconstructions' squared error."""
        own = float(np.mean(self.psnr))
        if self.precision_psnr is None or self.precision_psnr >= own + 10:
            return []
        return [
            f"precision={precision} changes the reconstructions by {self.precision_psnr:.1f} dB PSNR, less than 10 dB "
            f"above their own {own:.1f} dB; use float32"
        ]


def look(
    source: ImageSource, exact: LatentCodec, codec: LatentCodec, size: Size, adm_exact: bool, device: torch.device
) -> Preview | None:
    """A preview of the first images that can be read."""
    crops: list[np.ndarray] = []
    for key in source.order[: 4 * COUNT]:
        try:
            crops.append(load_crop(source.open(key), size, adm_exact))
        except (ValueError, OSError):  # it will be counted
            continue
        if len(crops) == COUNT:
            break
    return preview(exact, codec, crops, device) if crops else None


def preview(exact: LatentCodec, codec: LatentCodec, crops: Sequence[np.ndarray], device: torch.device) -> Preview:
    """Encodes crops (H, W, 3) uint8 with `codec` and with `exact`, its float32 original, which decodes both."""
    originals, images, references, sums = [], [], [], 0
    for crop in crops:  # one by one: a decoder needs gigabytes for each
        pixels = to_pixels(torch.from_numpy(crop).to(device))[None]
        with one_thread(device):
            moments = codec.encode(pixels)
            images.append(reconstruct(exact, moments))
            if codec is not exact:
                references.append(reconstruct(exact, exact.encode(pixels)))
        originals.append(pixels)
        sums = sums + channel_sums(moments.cpu().numpy())
    found = [psnr(a, b) for a, b in zip(originals, images, strict=True)]
    return Preview(
        sheet(crops, images, found),
        tuple(found),
        psnr(torch.cat(images), torch.cat(references)) if references else None,
        scale_remarks(*channel_statistics(sums / len(crops), exact), exact.scale, exact.name),
    )


def reconstruct(codec: LatentCodec, moments: Tensor) -> Tensor:
    """Pixels (N, 3, H, W) in [-1, 1] from the posterior's mean."""
    return codec.decode(mean_latents(moments, codec)).clamp(-1, 1)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1], at most 99."""
    return float(-10 * torch.log10(((a - b).double().square().mean() / 4).clamp(min=10**-9.9)))


def sheet(crops: Sequence[np.ndarray], images: Sequence[Tensor], values: Sequence[float]) -> Image.Image:
    """Crops above reconstructions (1, 3, H, W), with the PSNR below."""
    height, width = crops[0].shape[:2]
    page = Image.new("RGB", ((width + GAP) * len(crops) + GAP, 2 * (height + GAP) + GAP + LINE), "white")
    draw = ImageDraw.Draw(page)
    for i, (crop, image, value) in enumerate(zip(crops, images, values, strict=True)):
        x = GAP + i * (width + GAP)
        page.paste(Image.fromarray(crop), (x, GAP))
        page.paste(Image.fromarray(to_uint8(image)[0].cpu().numpy()), (x, height + 2 * GAP))
        draw.text((x, 2 * (height + GAP) + GAP), f"{value:.1f} dB" if width >= 48 else f"{value:.0f}", "black")
    return page
