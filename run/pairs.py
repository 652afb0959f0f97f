"""One vector for a pair of texts, for tasks whose rows are pairs, such as premise and hypothesis."""
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


class PairMatcher(nn.Module):
    """One vector for a pair of texts.

    Every word of a side is compared with what it finds on the other side by attention (Parikh et al. 2016, Chen et al.
    2017). The pooled sides u and v are then compared as [u; v; |u - v|; u * v] (Conneau et al. 2017).
    Shapes: N pairs, T words, H width of a word's state per direction, 6H width of a pooled text.
    """

    def __init__(self, H: int):
        super().__init__()
        self.compare = nn.Linear(4 * H, H)
        self.match = nn.Linear(4 * 6 * H, 2 * H)

    def forward(self, h: Tensor, inside: Tensor, pool: Callable) -> Tensor:
        """(N, 2H). h (2, T, 2N, H): states of both directions, the first sides of all pairs before the second ones.

        inside (T, 2N) is True for words; pool(h, inside) turns states (2, T, N, H) into texts (N, 6H).
        """
        a, b = h.chunk(2, dim=2)                                            # (2, T, N, H)
        inside_a, inside_b = inside.chunk(2, dim=1)                         # (T, N)
        compared_a = self.compared(a, b, inside_b)
        compared_b = self.compared(b, a, inside_a)
        u = pool(compared_a, inside_a)                                      # (N, 6H)
        v = pool(compared_b, inside_b)
        return self.match(differences(u, v)).relu()

    def compared(self, own: Tensor, other: Tensor, inside: Tensor) -> Tensor:
        """(2, T, N, H): each state of `own` compared with its attention average over `other`.

        inside (T, N) is True for the words of `other`.
        """
        H = own.shape[-1]
        scores = torch.einsum("dtnh,dsnh->dnts", own, other) / math.sqrt(H)                 # (2, N, T, T)
        outside = ~inside.t()[:, None, :]                                                   # (N, 1, T)
        weights = scores.float().masked_fill(outside, -1e9).softmax(dim=-1)
        weights = weights.masked_fill(outside, 0).to(own.dtype)                             # 0 for an empty side
        found = torch.einsum("dnts,dsnh->dtnh", weights, other)                             # (2, T, N, H)
        return self.compare(differences(own, found)).relu()


def differences(a: Tensor, b: Tensor) -> Tensor:
    """[a; b; |a - b|; a * b], along the last dimension."""
    parts = [a, b, (a - b).abs(), a * b]
    return torch.cat(parts, dim=-1)
