"""Flow matching of a latent together with an encoder's class token (REG: Wu et al. 2025, arXiv 2507.01467)."""

import math
from dataclasses import dataclass

from torch import Tensor

from fastdit.diffusion.objectives import FlowMatching, Terms


@dataclass(frozen=True)
class EntangledFlow(FlowMatching):
    """The loss of the latent plus `class_token_weight` times that of the token, at the same t.

    The first `token_dim` values of the last channels are the token (models/class_token.py). All else is elementwise
    and is inherited: noising, the prediction, samplers.
    """

    token_dim: int = 768

    def terms(self, output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Terms:
        whole = [output, x_0, x_t, noise]
        extra = math.ceil(self.token_dim / math.prod(x_0.shape[2:]))  # channels
        latent = [x[:, :-extra] for x in whole]
        token = [x[:, -extra:].flatten(1)[:, : self.token_dim, None, None] for x in whole]  # (N, D, 1, 1)
        loss, parts = super().terms(*latent[:3], t, latent[3])
        of_token = super().terms(*token[:3], t, token[3])[0]
        return loss + self.class_token_weight * of_token, parts | {"class_token": of_token}
