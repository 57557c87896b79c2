"""The PatchGAN discriminator (Isola et al. 2017, arXiv 1611.07004, Sec. 3.2 and 6.1.2): one logit for each patch."""

import math

from torch import Tensor, nn

SLOPE, MOST = 0.2, 8  # of the leaky ReLU; the largest multiple of the first layer's channels


class PatchDiscriminator(nn.Module):
    """Images (N, 3, H, W) -> logits (N, 1, h, w), h about H / 2^layers - 2. With 3 layers a patch has 70 x 70 pixels.

    Isola et al. normalize over a batch. Here a group norm sees one image at a time, so the logits of an image do not
    depend on the others, and training does not depend on the number of processes and the micro-batch.
    """

    def __init__(self, channels: int = 64, layers: int = 3):
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(SLOPE)]
        width = channels
        for i in range(1, layers + 1):
            inputs, width = width, channels * min(2**i, MOST)
            stride = 2 if i < layers else 1
            norm = nn.GroupNorm(math.gcd(32, width), width)
            blocks += [nn.Conv2d(inputs, width, 4, stride, 1, bias=False), norm, nn.LeakyReLU(SLOPE)]
        self.layers = nn.Sequential(*blocks, nn.Conv2d(width, 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
