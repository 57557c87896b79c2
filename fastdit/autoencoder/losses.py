"""The losses of an autoencoder, per image, and the weight of the adversarial one."""

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 1e4  # of the adaptive weight


def reconstruction_loss(kind: str, output: Tensor, pixels: Tensor) -> Tensor:
    """The mean absolute ("l1") or squared ("l2") error of images (n, 3, H, W): (n,)."""
    error = (output - pixels).flatten(1)
    return (error.abs() if kind == "l1" else error.square()).mean(1)


def kl_loss(mean: Tensor, logvar: Tensor, values: int) -> Tensor:
    """KL of the posterior (n, C, h, w) from N(0, 1) in nats per pixel value, of which an image has `values`: (n,)."""
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
    return kl.flatten(1).sum(1) / values


def generator_loss(logits: Tensor) -> Tensor:
    """The reconstructions' part of the hinge loss (Lim & Ye 2017, arXiv 1705.02894): (n,) from logits (n, 1, h, w)."""
    return -logits.flatten(1).mean(1)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's part: half the mean of max(0, 1 - real) and of max(0, 1 + fake), for each image: (n,)."""
    return 0.5 * (F.relu(1 - real).flatten(1).mean(1) + F.relu(1 + fake).flatten(1).mean(1))


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor) -> Tensor:
    """lambda = |g_rec| / (|g_adv| + 1e-6), of the gradients at the decoder's last layer; at most LARGEST.

    Esser et al. 2021, arXiv 2012.09841, eq. 7, where "rec" includes the perceptual loss.
    """
    ratio = torch.linalg.vector_norm(reconstruction) / (torch.linalg.vector_norm(adversarial) + 1e-6)
    return ratio.clamp(max=LARGEST)
