"""How well an autoencoder reconstructs images, and what its latents are like."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.autoencoder.perceptual import Perceptual
from fastdit.data.images import to_pixels, to_uint8
from fastdit.distributed import ImageRandom, Ranks, one_thread, seed_of
from fastdit.evaluation.features import Extractor
from fastdit.evaluation.metrics import frechet_distance
from fastdit.evaluation.moments import moments_of

BLOCK = 32  # images that the network sees at once: the last bits depend on it
SEED = 0xAE  # of the posterior's noise, in every run
WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03  # of SSIM


def psnr(mean_square: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error of 8-bit values; inf for none."""
    return 10 * math.log10(255**2 / mean_square) if mean_square else math.inf


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (n,) of images (n, C, H, W) of 8-bit values (Wang et al. 2004, IEEE TIP 13(4), eq. 13).

    Gaussian windows of 11 x 11 that lie within the image, the mean over them and over the channels. Images smaller
    than the window have a window of their own size.
    """
    a, b = a.double(), b.double()
    sides = [min(WINDOW, side - 1 + side % 2) for side in a.shape[2:]]  # odd
    tables = [torch.exp(-((torch.arange(n, dtype=a.dtype, device=a.device) - n // 2) ** 2) / (2 * SIGMA**2))
              for n in sides]  # fmt: skip
    rows, columns = (table / table.sum() for table in tables)

    def mean(x: Tensor) -> Tensor:
        x = F.conv2d(x.flatten(0, 1)[:, None], rows.view(1, 1, -1, 1))
        return F.conv2d(x, columns.view(1, 1, 1, -1)).unflatten(0, a.shape[:2])

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b, both = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2, mean(a * b) - mean_a * mean_b
    c1, c2 = (K1 * 255) ** 2, (K2 * 255) ** 2
    found = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return found.flatten(1).mean(1)


@dataclass
class Quality:
    """Measures of an autoencoder on `images`, uint8 (N, H, W, 3), of which each process has its blocks.

    `own` (share, BLOCK, H, W, 3): block b of all images belongs to process b mod world.
    """

    own: np.ndarray
    count: int
    ranks: Ranks
    extractor: Extractor | None
    lpips: Perceptual | None

    def __post_init__(self):
        self.real = self._features(self.own) if self.extractor else None

    @torch.no_grad()
    def __call__(self, vae: nn.Module, on_block: Callable[[], None] = lambda: None) -> tuple[dict, Tensor, Tensor]:
        """Named values, and the first images' latents (n, C, h, w) and reconstructions (n, H, W, 3), on the main one.

        Images are reconstructed from the posterior's mean and rounded to 8 bits. psnr is that of the mean squared error
        of all values; ssim and lpips are means over images. latent_mean and latent_std are those of the channels of
        latents drawn from the posteriors; latent_std_all is the deviation of all values together. The digits depend
        neither on the number of processes nor on the training's batch. A collective call.
        """
        device, rows, outputs, shown = self.ranks.device, [], [], None
        with one_thread(device):
            for slot, images in enumerate(self.own):
                on_block()
                x = to_pixels(torch.from_numpy(images).to(device))  # (BLOCK, 3, H, W)
                posterior = vae.encode(x).latent_dist
                mean, std = posterior.mean.float(), posterior.std.float()
                output = vae.decode(mean).sample.float()
                rounded = to_uint8(output)
                start = (slot * self.ranks.world + self.ranks.rank) * BLOCK
                noise = ImageRandom([seed_of(SEED, start + i) for i in range(BLOCK)])(mean)
                z = (mean + std * noise).double().flatten(2)  # (BLOCK, C, h w)
                a, b = (t.to(device).movedim(-1, 1).double() for t in (torch.from_numpy(images), rounded))
                pairs = [(a - b).square().mean((1, 2, 3)), ssim(a, b)]
                if self.lpips is not None:
                    pairs.append(self.lpips(to_pixels(rounded), x).double())
                rows.append(torch.cat([z.mean(2), z.square().mean(2), torch.stack(pairs, 1)], 1))
                outputs.append(rounded.cpu().numpy())
                shown = (mean.cpu(), rounded.cpu()) if shown is None else shown
        table, channels = self.ranks.blocks(torch.stack(rows))[: self.count].mean(0), shown[0].shape[1]
        means, squares, (square, similarity, *rest) = table.split([channels, channels, len(table) - 2 * channels])
        deviation = (squares - means**2).clamp(min=0).sqrt()
        overall = (squares.mean() - means.mean() ** 2).clamp(min=0).sqrt()
        values = {"psnr": psnr(square.item()), "ssim": similarity.item(), "latent_mean": means.tolist(),
                  "latent_std": deviation.tolist(), "latent_std_all": overall.item()}  # fmt: skip
        if self.lpips is not None:
            values["lpips"] = rest[0].item()
        if self.extractor:
            values["frechet"] = frechet_distance(moments_of(self._features(np.stack(outputs))), moments_of(self.real))
        return values, *shown

    def _features(self, blocks: np.ndarray) -> np.ndarray:
        """(count, D) of blocks (share, BLOCK, H, W, 3) of each process."""
        own = torch.from_numpy(np.stack([self.extractor(images) for images in blocks]))
        return self.ranks.blocks(own)[: self.count].cpu().numpy()[:, : self.extractor.dim]


def own_blocks(read: Callable[[np.ndarray], np.ndarray], chosen: np.ndarray, ranks: Ranks) -> np.ndarray:
    """`Quality.own`: this process's blocks of the images that `read` gives for their numbers (N,); the last one is
    filled up with its last image, and so are missing blocks."""
    slots = math.ceil(len(chosen) / BLOCK / ranks.world)
    places = (np.arange(slots)[:, None] * ranks.world + ranks.rank) * BLOCK + np.arange(BLOCK)
    images = read(chosen[places.ravel().clip(max=len(chosen) - 1)])
    return images.reshape(slots, BLOCK, *images.shape[1:])
