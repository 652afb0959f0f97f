"""Words as characters: every word has a representation, even a word that training never saw.

    codes = character_codes(["oil"])        # (5, 26): four special symbols, then "oil"
    CharacterCNN(448)(codes)                # (5, 448)
"""
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

MAX_CHARS = 24      # bytes of a word that are read


def character_codes(types: Sequence[str], special: int = 4) -> np.ndarray:
    """(special + types, MAX_CHARS + 2) int16 codes of UTF-8 bytes: 0 pads, 1 begins and 2 ends a word, byte b is 3 + b.

    The special symbols come first. Each is one code from 259 on, which no byte has; <pad> is all 0.
    """
    codes = np.zeros((special + len(types), MAX_CHARS + 2), dtype=np.int16)
    for i in range(1, special):
        codes[i, 0] = 258 + i
    for row, token in zip(codes[special:], types, strict=True):
        content = token.encode("utf-8", "surrogatepass")[:MAX_CHARS]
        row[0] = 1
        row[1:len(content) + 1] = [3 + byte for byte in content]
        row[len(content) + 1] = 2
    return codes


class CharacterCNN(nn.Module):
    """x from the bytes of a word: convolutions, maximum over the word, highway layers, a projection.

    Kim et al. 2016 (arXiv:1508.06615), as in the paper. Every word gets a vector, also one that training never saw.
    """
    CHARACTERS = 262                                                # 256 bytes and 6 symbols, see character_codes
    WIDTH = 16                                                      # of a character's embedding
    FILTERS = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 128))       # (width, count): the paper's first 5, last halved
    HIGHWAYS = 2

    def __init__(self, P: int):
        super().__init__()
        size = sum(count for _, count in self.FILTERS)
        self.characters = nn.Embedding(self.CHARACTERS, self.WIDTH, padding_idx=0)
        self.convolutions = nn.ModuleList(nn.Conv1d(self.WIDTH, count, width) for width, count in self.FILTERS)
        self.highways = nn.ModuleList(nn.Linear(size, 2 * size) for _ in range(self.HIGHWAYS))
        self.project = nn.Linear(size, P)
        for highway in self.highways:
            nn.init.constant_(highway.bias[size:], -2.0)            # the gate starts nearly closed: y is nearly x

    def forward(self, codes: Tensor) -> Tensor:
        """(words, P) representations of words whose characters are `codes` (words, L)."""
        characters = self.characters(codes.long()).transpose(1, 2)                          # (words, WIDTH, L)
        maxima = [convolution(characters).amax(dim=2).relu() for convolution in self.convolutions]
        x = torch.cat(maxima, dim=1)                                                        # (words, size)
        for highway in self.highways:
            new, gate = highway(x).chunk(2, dim=1)
            x = torch.lerp(x, new.relu(), gate.sigmoid())           # y = (1 - gate) x + gate new
        return self.project(x)
