"""Heads on other inputs than those of classification.py: one layer, regularized layer weights, Word2Vec with ELMo.

The finding `mixes` of report/findings.py trains them (tables 2 and 3 of the paper). Shapes: as in classification.py.
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
    """What a head of `mixes` reads.

    layers: the layers of the biLM in its mix.
    strength: lambda in section 3.2 of the paper. lambda |w|^2 is added to the loss, which pulls s to the plain average.
    word2vec: whether the LSTM reads Word2Vec's vectors.
    elmo_input, elmo_output: whether the mix is an input of the LSTM, and whether it is joined to the LSTM's states.
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
    """The biLM's three layers and, as a fourth, Word2Vec's vectors padded with zeros: (4, T, B, D)."""
    layers = ELMoVectors.layers + 1

    def __init__(self, elmo: ELMo, word2vec: StaticVectors):
        super().__init__(elmo.model)
        self.word2vec = word2vec
        if self.width < word2vec.width:
            raise InputError(f"the biLM's vectors have width {self.width}; `mixes` needs at least {word2vec.width}")

    def __call__(self, encoded: Encoded, rows: np.ndarray, dtype: torch.dtype, run_both: Callable = map) -> Tensor:
        layers = super().__call__(encoded, rows, dtype, run_both)               # (3, T, B, D)
        word2vec = self.word2vec(encoded, rows, layers.dtype)                   # (1, T, B, 300)
        return torch.cat([layers, F.pad(word2vec, (0, self.width - self.word2vec.width))])


class VariantMix(ScalarMix):
    """The inputs of a variant, concatenated: (4, T, B, D) from ELMoAndWord2Vec -> (T, B, width)."""

    def __init__(self, variant: Variant):
        super().__init__(len(variant.layers))
        self.variant = variant
        if variant.strength:
            self.w.register_hook(lambda gradient: gradient + 2 * variant.strength * self.w.detach())

    def forward(self, layers: Tensor) -> Tensor:
        """(T, B, width): Word2Vec if the variant has it, then the mix for the input, the output, or both."""
        mix = super().forward(layers[list(self.variant.layers)])                # (T, B, D)
        vectors = [layers[-1, ..., :STATIC]] if self.variant.word2vec else []
        return torch.cat(vectors + [mix] * (self.variant.elmo_input + self.variant.elmo_output), dim=-1)


class VariantHead(Head):
    """The head of a variant; `layers` and `width` are those of ELMoAndWord2Vec, 4 and D.

    ELMo at the output is concatenated with the LSTM's states and pooled with them. Input and output share one mix; the
    paper learns two.
    """

    def __init__(self, config: Config, name: str, layers: int, width: int, classes: int):
        variant = VARIANTS[name]
        self.read_width = variant.word2vec * STATIC + variant.elmo_input * width            # of the LSTM's input
        super().__init__(config, "trainable", len(variant.layers), self.read_width, classes)
        self.mix = VariantMix(variant)
        if variant.elmo_output:
            self.width += width                                 # of the dropout mask, for input and output
            self.text_width += 6 * width
            self.attention = nn.Linear(config.hidden + width, 1)
            self.out = nn.Linear(self.text_width, classes)

    def read(self, x: Tensor, lengths: Tensor) -> Tensor:
        """States (2, T, B, H) from x (T, B, width); (2, T, B, H + D) with ELMo at the output."""
        h = super().read(x[..., :self.read_width], lengths)
        output = x[..., self.read_width:].expand(2, -1, -1, -1)                 # (2, T, B, D or 0)
        return torch.cat([h, output.to(h.dtype)], dim=-1)


class VariantConfig(Config):
    """Options of classification.py; each variant is a setting."""
    settings = tuple(VARIANTS)


class VariantTrainer(Trainer):
    """Trains the heads of all variants on the same batches."""

    def new_head(self, setting: str, classes: int, seed: int) -> VariantHead:
        """A head with random weights for the variant named `setting`."""
        with torch.random.fork_rng(devices=[]):
            head = VariantHead(self.config, setting, self.vectors.layers, self.vectors.width, classes)
        return head.initialize(seed)
