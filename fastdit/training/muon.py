"""Muon (Jordan et al. 2024): updates of matrices along their orthogonalized momentum."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdit.distributed import Ranks

COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5  # Jordan et al.'s; singular values end between 0.7 and 1.2


class Muon(torch.optim.Muon):
    """PyTorch's Muon with its updates scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982).

    Matrices of one shape are orthogonalized as one batch, and each process does its share of every batch. The update
    of a weight W (m, n) with Nesterov momentum M is W <- (1 - lr weight_decay) W - 0.2 sqrt(max(m, n)) lr NS(M).
    """

    def __init__(self, matrices: list[nn.Parameter], ranks: Ranks, weight_decay: float):
        super().__init__(matrices, lr=0.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.ranks = ranks
        self.batches: dict[torch.Size, list[nn.Parameter]] = {}
        for matrix in matrices:
            self.batches.setdefault(matrix.shape, []).append(matrix)

    @torch.no_grad()
    def step(self) -> None:
        [group] = self.param_groups
        lr, momentum = group["lr"], group["momentum"]
        for (rows, columns), weights in self.batches.items():
            gradients = [weight.grad for weight in weights]
            momenta = [self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight)) for weight in weights]
            torch._foreach_lerp_(momenta, gradients, 1 - momentum)
            share = -(-len(weights) // self.ranks.world)
            own = slice(self.ranks.rank * share, (self.ranks.rank + 1) * share)
            updates = torch.zeros(share, rows, columns, dtype=torch.bfloat16, device=weights[0].device)
            if gradients[own]:  # with more processes than matrices, the last ones have none
                nesterov = torch.stack(torch._foreach_lerp(gradients[own], momenta[own], momentum)).bfloat16()
                updates[: len(nesterov)] = orthogonalized(nesterov)
            if self.ranks.world > 1:
                every = updates.new_empty(share * self.ranks.world, rows, columns)
                dist.all_gather_into_tensor(every, updates)
                updates = every
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
            updates = updates[: len(weights)].float().unbind()
            torch._foreach_add_(weights, updates, alpha=-0.2 * max(rows, columns) ** 0.5 * lr)


def orthogonalized(matrices: Tensor) -> Tensor:
    """Matrices (n, rows, columns) with singular values near 1: the Newton-Schulz iteration of degree 5."""
    a, b, c = COEFFICIENTS
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT
