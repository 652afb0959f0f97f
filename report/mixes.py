"""Heads that read other mixes than those of classification.py: single layers, regularized weights, Word2Vec too.

For the finding `mixes` of report/findings.py (tables 2 and 3 of the paper). Shapes as in classification.py.
"""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classification import Config, ELMoVectors, Head, Trainer
from data.text import Encoded
from ELMO import ELMo, ScalarMix
from report.baselines import STATIC_VECTORS, StaticVectors
from run.files import InputError

STATIC = STATIC_VECTORS["width"]


@dataclass(frozen=True)
class Variant:
    """What a head of `mixes` reads (a mix of some layers, Word2Vec, or both) and at which places.

    strength: lambda of the paper's section 3.2; the loss has a term lambda |w|^2, which draws s to the plain average.
    """
    layers: tuple[int, ...] = (0, 1, 2)
    strength: float = 0.0
    word2vec: bool = False
    elmo_input: bool = True
    elmo_output: bool = False


VARIANTS = {
    "layer 0": Variant(layers=(0,)),
    "layer 1": Variant(layers=(1,)),
    "layer 2": Variant(layers=(2,)),
    "all layers, lambda 0": Variant(),
    "all layers, lambda 1/1000": Variant(strength=0.001),
    "all layers, lambda 1": Variant(strength=1.0),
    "Word2Vec": Variant(word2vec=True, elmo_input=False),
    "Word2Vec, ELMo at the input": Variant(word2vec=True),
    "Word2Vec, ELMo at the output": Variant(word2vec=True, elmo_input=False, elmo_output=True),
    "Word2Vec, ELMo at both": Variant(word2vec=True, elmo_output=True)}


class ELMoAndWord2Vec(ELMoVectors):
    """The biLM's layers and, as a fourth one, Word2Vec filled up with zeros: (4, T, B, D)."""
    layers = ELMoVectors.layers + 1

    def __init__(self, elmo: ELMo, word2vec: StaticVectors):
        super().__init__(elmo.model)
        self.word2vec = word2vec
        if self.width < word2vec.width:
            raise InputError(f"the biLM's vectors have {self.width} numbers; `mixes` needs {word2vec.width} or more")

    def __call__(self, encoded: Encoded, rows: np.ndarray, dtype: torch.dtype, run_both: Callable = map) -> Tensor:
        layers = super().__call__(encoded, rows, dtype, run_both)               # (3, T, B, D)
        word2vec = self.word2vec(encoded, rows, layers.dtype)                   # (1, T, B, 300)
        return torch.cat([layers, F.pad(word2vec, (0, self.width - self.word2vec.width))])


class VariantMix(ScalarMix):
    """What a variant reads at both places, side by side: (4, T, B, D) from ELMoAndWord2Vec -> (T, B, width)."""

    def __init__(self, variant: Variant):
        super().__init__(len(variant.layers))
        self.variant = variant
        if variant.strength:
            self.w.register_hook(lambda gradient: gradient + 2 * variant.strength * self.w.detach())

    def forward(self, layers: Tensor) -> Tensor:
        """(T, B, width): Word2Vec if the variant has it, then the mix once for each place where it is read."""
        mix = super().forward(layers[list(self.variant.layers)])                # (T, B, D)
        vectors = [layers[-1, ..., :STATIC]] if self.variant.word2vec else []
        return torch.cat(vectors + [mix] * (self.variant.elmo_input + self.variant.elmo_output), dim=-1)


class VariantHead(Head):
    """A head that reads what its variant says; layers and width are those of ELMoAndWord2Vec, 4 and D.

    ELMo at the output stands beside the LSTM's states and is pooled with them. At both places it is the same mix, while
    the paper learns two.
    """

    def __init__(self, config: Config, name: str, layers: int, width: int, classes: int):
        variant = VARIANTS[name]
        self.read_width = variant.word2vec * STATIC + variant.elmo_input * width        # width of what the LSTM reads
        super().__init__(config, "trainable", len(variant.layers), self.read_width, classes)
        self.mix = VariantMix(variant)
        if variant.elmo_output:
            self.width += width                                 # width of the dropout mask, which covers both places
            self.text_width += 6 * width
            self.attention = nn.Linear(config.hidden + width, 1)
            self.out = nn.Linear(self.text_width, classes)

    def read(self, x: Tensor, lengths: Tensor) -> Tensor:
        """(2, T, B, H) states from x (T, B, width), with ELMo at the output (2, T, B, H + D)."""
        h = super().read(x[..., :self.read_width], lengths)
        output = x[..., self.read_width:].expand(2, -1, -1, -1)                 # (2, T, B, D or 0)
        return torch.cat([h, output.to(h.dtype)], dim=-1)


class VariantConfig(Config):
    """Options of classification, with every variant as a setting."""
    settings = tuple(VARIANTS)


class VariantTrainer(Trainer):
    """Trains the heads of all variants side by side."""

    def new_head(self, setting: str, classes: int, seed: int) -> VariantHead:
        """A head of the variant that `setting` names."""
        with torch.random.fork_rng(devices=[]):
            head = VariantHead(self.config, setting, self.vectors.layers, self.vectors.width, classes)
        return head.initialize(seed)
