"""Between the data and the models: batches of rows, their inputs and targets, and sampled words."""
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.text import BOS, EOS, PAD, SPECIAL, Encoded

SAMPLING_POWER = 0.75       # words are sampled with probability proportional to count ** power


def batches(lengths: np.ndarray, positions: int, generator: np.random.Generator | None = None) -> list[np.ndarray]:
    """Row numbers in batches of about equal length, each with at most `positions` positions, rows x (longest + 1).

    A row that is longer than that is a batch by itself. Rows are sorted by length, so that few positions are padding.
    The generator shuffles rows of equal length, and the batches; without it both are in order.
    """
    ties = np.zeros(len(lengths)) if generator is None else generator.random(len(lengths))
    order = np.lexsort((ties, lengths))
    sizes = lengths[order] + 1
    out = []
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * sizes[end] <= positions:
            end += 1
        out.append(order[start:end])
        start = end
    if generator is None:
        return out
    order_of_batches = generator.permutation(len(out))
    return [out[i] for i in order_of_batches]


def collate(encoded: Encoded, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Inputs x and targets y (2, T, B) of some rows: both directions, each in the order in which its LSTMs read.

    The sentence "oil falls" with T = 4, because another sentence is longer:

        x[0] = <s>  oil   falls <pad>     y[0] = oil   falls </s> <pad>     forward
        x[1] = </s> falls oil   <pad>     y[1] = falls oil   <s>  <pad>     backward

    The backward input is reversed within each sentence's own length, so padding comes last in both directions.
    Numbers are word ids. With characters, x holds type ids + 4 instead, since each type has its own vector.
    """
    sentences = [encoded.types(row) for row in rows]
    T = max(len(types) for types in sentences) + 1
    x = np.full((2, T, len(rows)), PAD, dtype=np.int64)
    y = np.full((2, T, len(rows)), PAD, dtype=np.int64)
    for b, types in enumerate(sentences):
        n = len(types)
        words = encoded.lookup[types]
        inputs = words if encoded.chars is None else types + len(SPECIAL)
        x[0, 0, b] = BOS
        x[0, 1:n + 1, b] = inputs
        y[0, :n, b] = words
        y[0, n, b] = EOS
        x[1, 0, b] = EOS
        x[1, 1:n + 1, b] = inputs[::-1]
        y[1, :n, b] = words[::-1]
        y[1, n, b] = BOS
    return torch.from_numpy(x), torch.from_numpy(y)


def predicted_tokens(y: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) places of the predicted tokens in `y.flatten()`, which are all but the padding, and (N,) their word ids."""
    flat = y.flatten()
    place = (flat != PAD).nonzero()[:, 0]
    return place, flat[place]


def reverse_within_lengths(h: Tensor, lengths: Tensor) -> Tensor:
    """Each sentence of h (T, B, width) in reverse order, its padding where it was; lengths (B,).

    A sentence of 3 words with one position of padding: [a b c -] -> [c b a -]. Twice gives h again.
    """
    T, B, width = h.shape
    position = torch.arange(T, device=h.device)[:, None]                                # (T, 1)
    source = torch.where(position < lengths, lengths - 1 - position, position)          # (T, B)
    place = source * B + torch.arange(B, device=h.device)           # (T, B): where it stands in h as (T * B, width)
    return F.embedding(place, h.reshape(T * B, width))


class Sampler:
    """Draws E distinct words per step for the sampled softmax: word w is in the sample with probability pi_w.

    pi_w = min(1, k count_w ** 0.75), with k such that the pi_w sum to E. Frequent words are in every sample. Boundary
    symbols and <unk> are words like any other. A count of 0 becomes 1, because a word that cannot be drawn would keep
    its probability for ever. Only <pad> is in no sample.

    Systematic sampling: the words lie on a line in random order, word w as an interval of length pi_w. The points
    u, u + 1, u + 2, .. with one random u in [0, 1) hit every interval with probability pi_w, and none twice. So the
    probabilities are exact, which the usual sampling with replacement does not give.
    """

    def __init__(self, counts: np.ndarray, draws: int, seed: int):
        weight = np.maximum(counts, 1.0) ** SAMPLING_POWER
        weight[PAD] = 0
        self.seed = seed
        self.draws = min(draws, len(weight) - 1)
        self.pi = self.inclusion_probabilities(weight, self.draws)
        self.log_pi = torch.from_numpy(np.log(np.maximum(self.pi, 1e-30))).float()
        self.shuffle(0)

    @staticmethod
    def inclusion_probabilities(weight: np.ndarray, draws: int) -> np.ndarray:
        """(V,) min(1, k weight) with k such that the sum is `draws`."""
        k = draws / weight.sum()
        for _ in range(200):                                # each round caps more words at 1; few rounds are needed
            pi = np.minimum(1, k * weight)
            missing = draws - pi.sum()
            if abs(missing) < 1e-9 * draws:
                break
            k *= 1 + missing / max(pi[pi < 1].sum(), 1e-12)
        return pi

    def shuffle(self, epoch: int) -> None:
        """Lays the words on the line in a new order. All work that is proportional to V is done here."""
        self.order = np.random.default_rng([self.seed, epoch, 1]).permutation(len(self.pi))
        self.ends = np.cumsum(self.pi[self.order])

    def draw(self, u: float) -> Tensor:
        """(E,) distinct word ids in ascending order, for u in [0, 1)."""
        points = np.arange(self.draws) + u
        points = points[points < self.ends[-1]]             # rounding must not lead past the end of the line
        intervals = np.searchsorted(self.ends, points, side="right")
        return torch.from_numpy(np.unique(self.order[intervals]))
