"""Token routing, TREAD (Krause et al. 2025, arXiv 2501.04765): in training, random tokens skip the middle blocks.

They return unchanged after these blocks. There are no parameters, and sampling uses all tokens in all blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastdit.models.layers import Rope


@dataclass(frozen=True)
class Route:
    """Blocks first + 1 to `last` (from 1) compute only the tokens `kept` (N, K); the others skip them."""

    first: int
    last: int
    kept: Tensor

    def enter(self, x: Tensor) -> Tensor:
        """(N, T, D) -> (N, K, D)"""
        return x.gather(1, self.kept[..., None].expand(-1, -1, x.shape[-1]))

    def leave(self, whole: Tensor, x: Tensor) -> Tensor:
        """The tokens (N, T, D) from before the route, with those that took it, (N, K, D), in their places."""
        return whole.scatter(1, self.kept[..., None].expand(-1, -1, x.shape[-1]), x)

    def rotations(self, rope: Rope | None) -> Rope | None:
        """cos and sin of the kept tokens: (T, head_dim / 2) each -> (N, K, head_dim / 2)"""
        return None if rope is None else tuple(table[self.kept] for table in rope)

    def of(self, rows: slice) -> "Route":
        """The route of the samples in `rows`."""
        return replace(self, kept=self.kept[rows])


@dataclass(frozen=True)
class Routing:
    """`share` of the patches skip all blocks except `ends`, the number at the start and at the end of the network.

    From step `full_from` on (from 0), no token skips.
    """

    share: float
    ends: tuple[int, int]
    full_from: int

    def blocks(self, model) -> range:
        """The numbers (from 1) of the blocks that tokens skip."""
        return range(self.ends[0] + 1, len(model.blocks) - self.ends[1] + 1)

    def lengths(self, model) -> list[int]:
        """The number of tokens in each block."""
        kept = model.tokens - round(self.share * model.patches)
        return [kept if number in self.blocks(model) else model.tokens for number in range(1, len(model.blocks) + 1)]

    def draw(self, rand: Callable[..., Tensor], model, step: int) -> Route | None:
        """The route of a step's samples; `rand(patches)` gives uniforms (N, patches). None where no token skips."""
        if step >= self.full_from:
            return None
        kept = random_tokens(rand(model.patches), self.share, model.patches, model.tokens)
        return Route(self.ends[0], len(model.blocks) - self.ends[1], kept)


def random_tokens(u: Tensor, share: float, patches: int, tokens: int) -> Tensor:
    """The tokens (N, K) that stay when `share` of the patches skip: those with the smallest u (N, patches), ascending.

    Tokens beyond the patches, such as registers, always stay.
    """
    stay = patches - round(share * patches)
    kept = u.argsort(dim=1)[:, :stay].sort(dim=1).values
    extra = torch.arange(patches, tokens, device=u.device).expand(len(u), -1)
    return torch.cat([kept, extra], dim=1)
