"""How noise samples are assigned to the images of a training batch."""

import torch
from torch import Tensor


def independent(x_0: Tensor, noise: Tensor) -> Tensor:
    return noise


def optimal_transport(x_0: Tensor, noise: Tensor) -> Tensor:
    """The noise samples (N, ...) reordered to minimize the sum of squared distances to x_0 (Tong et al. 2024).

    Solved exactly on the CPU by scipy's assignment solver. Larger batches give straighter paths.
    """
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(x_0.detach().flatten(1).float(), noise.flatten(1).float()) ** 2  # (N, N)
    _, columns = linear_sum_assignment(cost.cpu().numpy())
    return noise[torch.as_tensor(columns, device=noise.device)]


COUPLINGS = {"independent": independent, "ot": optimal_transport}


def paired(objective: object, x_0: Tensor, noise: Tensor) -> Tensor:
    """The noise samples (N, ...), assigned to x_0 as the objective says."""
    return COUPLINGS[coupling_of(objective)](x_0, noise)


def coupling_of(objective: object) -> str:
    """A key of COUPLINGS; DDPM has no such option."""
    return getattr(objective, "coupling", "independent")
