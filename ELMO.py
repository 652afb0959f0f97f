"""ELMo's bidirectional language model (Peters et al. 2018, arXiv:1802.05365) from raw news to models/bilstm.pt.

    sentence k: <s> w_1 .. w_n </s>
    forward LM   reads <s> w_1 .. w_n      predicts w_1 .. w_n </s>      p(w_1 .. w_n </s>) = prod_k p(w_k | w_1 .. w_k-1)
    backward LM  reads </s> w_n .. w_1     predicts w_n .. w_1 <s>       p(<s> w_1 .. w_n) = prod_k p(w_k | w_k+1 .. w_n)
    h_{k,0} = [x_k ; x_k]    h_{k,j} = [forward h_{k,j} ; backward h_{k,j}],  j = 1, 2

Token representations x and the softmax are shared by the two directions, the LSTMs are not; the loss is the mean of both
directions' nats per token. B rows of a batch, T positions (longest row + 1), V words, P width of x and of every layer's
output, H cells of an LSTM, E candidate words of a step, D = 2 P what a user receives per layer.

    python ELMO.py                                  the published run: AG News -> models/bilstm.pt, pretraining.json, PNGs
    python ELMO.py --resume                         goes on where a stopped run was, to the same weights bit for bit
    python ELMO.py --embed FILE --npz FILE          one text a line -> its three layers' vectors
    torchrun --nproc_per_node=2 ELMO.py             the same run, each batch shared by two processes
"""
import argparse
import hashlib
import html
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from nltk.tokenize import RegexpTokenizer
from torch import Tensor, nn
from tqdm import tqdm

from data.files import (
    InputError,
    read_checkpoint,
    read_published,
    stop_request,
    write_atomically,
    write_npz,
    write_published,
)
from data.knobs import Parser, add_knobs, check_knobs, knob, read_toml
from data.prepare import Tokens, read_ag_news, split, tokenize_corpus

HERE = Path(__file__).resolve().parent
CACHE = HERE / "data" / "cache"
PAD, UNK, BOS, EOS = range(4)
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
FORMAT = "elmo-bilm-1"


# ------------------------------------------------------------------------------------------------------ knobs
@dataclass(frozen=True)
class Config:
    """Every knob of pretraining; the defaults are the published run. InputError where a value is out of range."""
    representation: str = knob("embedding", "what x is made from", ("embedding", "word2vec", "char"))
    width: int = knob(384, "P: width of x and of each LSTM's output, at most `hidden`", least=1, most=8192)
    hidden: int = knob(384, "H: cells of each LSTM, projected to P where wider", least=1, most=65536)
    skip: bool = knob(True, "add layer 1's output to layer 2's, as the paper does")
    dropout: float = knob(0.1, "share of units left out, the same ones for a whole row", most=0.95)
    word_dropout: float = knob(0.0, "share of words left out of the input", most=0.95)
    lowercase: bool = knob(True, "lower-case the text")
    min_count: int = knob(3, "a word enters the vocabulary when training rows hold it this often", least=1)
    freeze_word2vec: bool = knob(False, "word2vec: x stays as gensim made it, and the softmax has a table of its own")
    word2vec_epochs: int = knob(5, "word2vec: passes of gensim over the training rows", least=1)
    max_chars: int = knob(24, "char: bytes of a word that are read", least=1, most=200)
    char_width: int = knob(16, "char: width of a character's embedding", least=1)
    char_filters: str = knob("1:32,2:32,3:64,4:128,5:128", "char: width:count of the convolutions' filters")
    highways: int = knob(2, "char: highway layers", most=10)
    rows: int = knob(0, "train on this many rows of train.csv only, for short trials; 0 takes all")
    validation: int = knob(4000, "rows of train.csv that are kept apart for every choice", least=1)
    epochs: float = knob(4.0, "passes over the training rows", most=100_000)
    batch_tokens: int = knob(2000, "positions (rows x T) of a batch", least=1)
    negatives: int = knob(2048, "sampled words of the training softmax; at V and above it is the full one", least=1)
    sampling_power: float = knob(0.75, "words are sampled by count to this power", most=4)
    lr: float = knob(3e-3, "highest learning rate of the LSTMs (AdamW)", most=10)
    table_lr: float = knob(3e-3, "highest learning rate of the tied table (row-wise lazy Adam)", most=10)
    warmup: float = knob(0.03, "share of the steps in which the rate rises; then it falls as a cosine", most=1)
    beta2: float = knob(0.99, "Adam's decay of the squared gradient", most=0.99999)
    weight_decay: float = knob(0.0, "AdamW's, LSTMs only", most=10)
    clip: float = knob(0.5, "largest gradient norm, over the LSTMs and the touched rows together", least=1e-9)
    precision: str = knob("auto", "bf16 matrix products where the hardware has them, or as said", ("auto", "fp32", "bf16"))
    seed: int = knob(0, "of rows, weights, batches, dropout and negatives", most=2**31)
    report_every: int = knob(0, "epochs between detailed metrics on validation rows; 0: only at the end")
    log_every: int = knob(100, "steps between log lines", least=1)
    save_every: float = knob(300.0, "seconds between resume states")

    def __post_init__(self):
        check_knobs(self)
        parse_filters(self.char_filters)

    @property
    def output(self) -> int:
        """P: a layer is never wider than its cells."""
        return min(self.width, self.hidden)

    @property
    def tied(self) -> bool:
        """Whether x and the softmax are one table: not for characters, nor for vectors that must not move."""
        return self.representation != "char" and not (self.representation == "word2vec" and self.freeze_word2vec)


RUN_ONLY = ("report_every", "log_every", "save_every")      # knobs that a resumed run may change: no weight depends on them


def parse_filters(text: str) -> list[tuple[int, int]]:
    """[(1, 32), (2, 64)] from "1:32,2:64"."""
    if not re.fullmatch(r"[1-9]\d{0,2}:[1-9]\d{0,4}(,[1-9]\d{0,2}:[1-9]\d{0,4})*", text):
        raise InputError(f"char_filters is {text!r}; expected width:count pairs such as 1:32,2:64")
    return [tuple(map(int, pair.split(":"))) for pair in text.split(",")]


# ------------------------------------------------------------------------------------------------------- text
ENTITY = re.compile(r"(?<![&\w])(#\d+|amp|quot|apos|lt|gt|nbsp);")      # AG News lost the & of most entities
TOKENS = RegexpTokenizer(
    r"</?[A-Za-z][^<>]{0,200}>"             # mark-up, whole: it says where a story came from
    r"|(?:[^\W\d_]\.){2,}"                  # u.s., a.m.
    r"|\d+(?:[.,:/]\d+)*"                   # 1,000  4.5  9/11
    r"|(?i:n't)\b|'(?i:s|re|ve|ll|d|m)\b|\w+?(?=(?i:n't)\b)"            # can't -> ca n't, Iraq's -> Iraq 's
    r"|\w+|\.{2,}|-{2,}|[^\w\s]")           # words, dashes and dots in a row, every other sign alone


def tokenize(text: str, lowercase: bool = True) -> list[str]:
    """Tokens of a text: entities become characters, mark-up stays, nothing needs NLTK's data.

    "Oil #39;s up &lt;b&gt;4.5%&lt;/b&gt;." -> ["oil", "'s", "up", "<b>", "4.5", "%", "</b>", "."]
    """
    text = html.unescape(html.unescape(ENTITY.sub(r"&\1;", text)))
    return TOKENS.tokenize(text.lower() if lowercase else text)


def tokenized(texts: Sequence[str], config: "Config", cache: Path | None = None) -> Tokens:
    """The texts' Tokens; the cache is keyed by the texts and by all that decides how they are cut."""
    version = f"{TOKENS._pattern} {ENTITY.pattern} lowercase={config.lowercase}"
    return tokenize_corpus(texts, partial(tokenize, lowercase=config.lowercase), version, cache)


# ------------------------------------------------------------------------------------------------- vocabulary
class Vocabulary:
    """words[i] is the word of id i; the first four are <pad> <unk> <s> </s>, and no text can spell them."""

    def __init__(self, words: Sequence[str]):
        self.words = list(words)
        self.index = {word: i for i, word in enumerate(self.words) if i >= len(SPECIAL)}

    @classmethod
    def count(cls, types: Sequence[str], counts: np.ndarray, min_count: int) -> "Vocabulary":
        """Words counted at least `min_count` times, most frequent first, ties by spelling."""
        kept = [(-int(n), word) for word, n in zip(types, counts, strict=True) if n >= min_count and word not in SPECIAL]
        return cls(SPECIAL + [word for _, word in sorted(kept)])

    def __len__(self) -> int:
        return len(self.words)

    def ids(self, types: Iterable[str]) -> np.ndarray:
        """(types,) int64 word ids, <unk> for what is not a word of the vocabulary."""
        return np.array([self.index.get(token, UNK) for token in types], dtype=np.int64)


def spell(types: Sequence[str], max_chars: int) -> np.ndarray:
    """(4 + types, max_chars + 2) uint8-sized codes of UTF-8 bytes: 0 pads, 1 begins and 2 ends a word, byte b is 3 + b.

    The four specials come first, each one code that no byte has, so that a text can not spell them either.
    """
    codes = np.zeros((len(SPECIAL) + len(types), max_chars + 2), dtype=np.int16)
    for i in range(1, len(SPECIAL)):
        codes[i, 0] = 258 + i
    for row, token in zip(codes[len(SPECIAL):], types, strict=True):
        letters = [1, *(3 + b for b in token.encode("utf-8", "surrogatepass")[:max_chars]), 2]
        row[:len(letters)] = letters
    return codes


@dataclass
class Encoded:
    """Tokens with what the model needs of them: lookup (types,) word ids; chars from `spell` for the char model."""
    tokens: Tokens
    lookup: np.ndarray
    chars: Tensor | None = None

    @classmethod
    def of(cls, tokens: Tokens, words: Vocabulary, config: Config) -> "Encoded":
        chars = torch.from_numpy(spell(tokens.types, config.max_chars)) if config.representation == "char" else None
        return cls(tokens, words.ids(tokens.types), chars)


# ------------------------------------------------------------------------------------- token representations
class CharacterCNN(nn.Module):
    """x from a word's bytes: convolutions of several widths, maximum over the word, highway layers, a projection.

    Kim et al. 2016 (arXiv:1508.06615), as in the paper; every word gets a vector, seen in training or not.
    """

    def __init__(self, config: Config):
        super().__init__()
        filters = parse_filters(config.char_filters)
        size = sum(count for _, count in filters)
        self.longest = max(width for width, _ in filters)
        self.characters = nn.Embedding(262, config.char_width, padding_idx=0)
        self.convolutions = nn.ModuleList(nn.Conv1d(config.char_width, count, width) for width, count in filters)
        self.highways = nn.ModuleList(nn.Linear(size, 2 * size) for _ in range(config.highways))
        self.project = nn.Linear(size, config.output)
        for layer in self.highways:
            nn.init.constant_(layer.bias[size:], -2.0)      # the gate starts nearly shut: the layer begins as identity

    def forward(self, codes: Tensor) -> Tensor:             # (words, L) -> (words, P)
        x = self.characters(codes.long()).transpose(1, 2)   # (words, char_width, L)
        x = F.pad(x, (0, max(0, self.longest - x.shape[2])))
        x = torch.cat([conv(x).amax(dim=2).relu() for conv in self.convolutions], dim=1)    # (words, size)
        for layer in self.highways:
            value, gate = layer(x).chunk(2, dim=1)
            gate = gate.sigmoid()
            x = gate * value.relu() + (1 - gate) * x
        return self.project(x)


def word2vec(encoded: Encoded, rows: np.ndarray, words: Vocabulary, config: Config) -> Tensor:
    """(V, P) gensim Word2Vec vectors of the training rows, scaled to the table's initial size."""
    from gensim.models import Word2Vec

    class Sentences:
        def __iter__(self):
            for row in rows:
                start, end = encoded.tokens.offsets[row:row + 2]
                yield [words.words[i] for i in encoded.lookup[encoded.tokens.ids[start:end]]]
    model = Word2Vec(Sentences(), vector_size=config.output, min_count=1, workers=1, seed=config.seed,   # one worker: the
                     epochs=config.word2vec_epochs, negative=10, window=5)                     # same vectors every time
    table = torch.randn(len(words), config.output, generator=torch.Generator().manual_seed(config.seed))
    known = [i for i, word in enumerate(words.words) if word in model.wv]
    if known:
        vectors = torch.from_numpy(np.stack([model.wv[words.words[i]] for i in known]))
        table[known] = vectors / vectors.std().clamp_min(1e-6)
    return TABLE_STD * table


# ---------------------------------------------------------------------------------------------------- batches
@dataclass
class Batch:
    """Both directions of some rows, each read left to right by its own LSTMs: (2, T, B) ids, time before rows.

    The row "oil falls" with T = 4 (a longer row beside it):
        x[0] = <s>  oil   falls <pad>     y[0] = oil   falls </s> <pad>
        x[1] = </s> falls oil   <pad>     y[1] = falls oil   <s>  <pad>
    The backward stream is reversed within each row's own length, so padding comes last in both.
    """
    x: Tensor
    y: Tensor
    lengths: Tensor         # (B,) tokens, boundaries left out


def collate(encoded: Encoded, rows: np.ndarray) -> Batch:
    """The Batch of these rows; x holds word ids, or type ids + 4 for the character model."""
    starts = encoded.tokens.offsets[rows]
    n = encoded.tokens.offsets[rows + 1] - starts
    size, width = int(n.max()) + 1, len(rows)
    x, y = (np.zeros((2, size, width), dtype=np.int64) for _ in range(2))
    position = np.arange(size - 1)[:, None]                 # (T - 1, 1)
    inside = position < n                                   # (T - 1, B)
    for d, (first, last) in enumerate([(BOS, EOS), (EOS, BOS)]):
        at = starts + (position if d == 0 else n - 1 - position)
        types = encoded.tokens.ids[at[inside]].astype(np.int64)
        y[d, :-1][inside] = encoded.lookup[types]
        x[d, 1:][inside] = encoded.lookup[types] if encoded.chars is None else types + len(SPECIAL)
        x[d, 0] = first
        y[d, n, np.arange(width)] = last
    return Batch(torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(n))


def batches(lengths: np.ndarray, positions: int, generator: np.random.Generator | None = None) -> list[np.ndarray]:
    """Row numbers in batches of about equal length and at most `positions` cells (one row, where it alone is longer).

    Sorted by length, ties and the order of batches at random: under 5 % of the cells pad, and every epoch has the
    same number of batches. Without a generator the order is by length.
    """
    tie = generator.random(len(lengths)) if generator else np.zeros(len(lengths))
    order = np.lexsort((tie, lengths))
    out, start = [], 0
    sizes = lengths[order] + 1
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * sizes[end] <= positions:
            end += 1
        out.append(order[start:end])
        start = end
    return [out[i] for i in generator.permutation(len(out))] if generator else out


# ------------------------------------------------------------------------------------------------------ model
class LSTM(torch.autograd.Function):
    """(2, T, B, P) outputs of one LSTM layer of both directions at once, which never see each other.

        [i f o u] = W_x x_t + W_h h_t-1 + b;  c_t = sigmoid(f) c_t-1 + sigmoid(i) tanh(u);  h_t = W_p sigmoid(o) tanh(c_t)

    (Hochreiter and Schmidhuber 1997, projection of Sak et al. 2014). The two directions are the first dimension of every
    batched product. Written out because what does not depend on the previous step (W_x x, all weights' gradients) is
    then one large product over all T, and because torch's own projected LSTM has no fast CPU path. States c are fp32.
    """

    @staticmethod
    def forward(ctx, x: Tensor, w_x: Tensor, w_h: Tensor, bias: Tensor, w_p: Tensor | None) -> Tensor:
        _, T, B, P = x.shape
        H = w_x.shape[1] // 4
        gates = torch.baddbmm(bias[:, None], x.reshape(2, T * B, P), w_x.transpose(1, 2)).view(2, T, B, 4 * H)
        c, tanh_c = (x.new_empty(2, T, B, H, dtype=torch.float32) for _ in range(2))
        cell_out = x.new_empty(2, T, B, H)
        h = cell_out if w_p is None else x.new_empty(2, T, B, P)
        for t in range(T):
            gate = gates[:, t]                                              # (2, B, 4H)
            if t:
                gate.baddbmm_(h[:, t - 1], w_h.transpose(1, 2))
            gate[..., :3 * H].sigmoid_()
            gate[..., 3 * H:].tanh_()
            i, f, o, u = (part.float() for part in gate.chunk(4, dim=-1))   # (2, B, H) each
            torch.mul(i, u, out=c[:, t])
            if t:
                c[:, t].addcmul_(f, c[:, t - 1])
            torch.tanh(c[:, t], out=tanh_c[:, t])
            cell_out[:, t] = o * tanh_c[:, t]
            if w_p is not None:
                h[:, t] = torch.bmm(cell_out[:, t], w_p.transpose(1, 2))
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, w_x, w_h, w_p, gates, c, tanh_c, cell_out, h)
        return h

    @staticmethod
    def backward(ctx, dh: Tensor):
        x, w_x, w_h, w_p, gates, c, tanh_c, cell_out, h = ctx.saved_tensors
        _, T, B, P = x.shape
        dgates = torch.empty_like(gates)
        dprojected = None if w_p is None else torch.empty_like(h)           # all T steps' gradient of h, for W_p's
        dc = dnext = None
        for t in reversed(range(T)):
            dout = dh[:, t] if dnext is None else dh[:, t] + dnext          # (2, B, P)
            if w_p is not None:
                dprojected[:, t] = dout
                dout = torch.bmm(dout, w_p)                                 # (2, B, H)
            i, f, o, u = (part.float() for part in gates[:, t].chunk(4, dim=-1))
            dout, k = dout.float(), tanh_c[:, t]
            through = dout * o
            through = through.addcmul_(through * k, k, value=-1)
            dc = through if dc is None else dc.add_(through)
            step = dgates[:, t] if dgates.dtype == torch.float32 else torch.empty_like(dgates[:, t], dtype=torch.float32)
            di, df, do, du = step.chunk(4, dim=-1)
            torch.ops.aten.sigmoid_backward.grad_input(dc * u, i, grad_input=di)
            torch.ops.aten.sigmoid_backward.grad_input(dout * k, o, grad_input=do)
            torch.ops.aten.tanh_backward.grad_input(dc * i, u, grad_input=du)
            if t:
                torch.ops.aten.sigmoid_backward.grad_input(dc * c[:, t - 1], f, grad_input=df)
                dc = dc * f
            else:
                df.zero_()
            if step.dtype != dgates.dtype:
                dgates[:, t] = step
            if t:
                dnext = torch.bmm(dgates[:, t], w_h)                        # (2, B, P)
        flat = dgates.view(2, T * B, -1)
        dw_x = torch.bmm(flat.transpose(1, 2), x.reshape(2, T * B, P))
        dw_h = torch.bmm(dgates[:, 1:].reshape(2, (T - 1) * B, -1).transpose(1, 2),
                         h[:, :-1].reshape(2, (T - 1) * B, P))
        dw_p = None
        if w_p is not None:
            dw_p = torch.bmm(dprojected.view(2, T * B, P).transpose(1, 2), cell_out.view(2, T * B, -1))
        dx = torch.bmm(flat, w_x).view_as(x) if ctx.needs_input_grad[0] else None
        return dx, dw_x, dw_h, flat.sum(dim=1), dw_p


class Layer(nn.Module):
    """Weights of one LSTM layer, both directions stacked: w_x, w_h (2, 4H, P), bias (2, 4H), w_p (2, P, H) where H > P."""

    def __init__(self, P: int, H: int):
        super().__init__()
        uniform = lambda *shape, fan: nn.Parameter(torch.empty(shape).uniform_(-1, 1) / math.sqrt(fan))  # noqa: E731
        self.w_x, self.w_h = (uniform(2, 4 * H, P, fan=P) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(2, 4 * H))
        self.w_p = uniform(2, P, H, fan=H) if H > P else None
        with torch.no_grad():
            self.bias[:, H:2 * H] = 1                       # remember at first (Jozefowicz et al. 2015)

    def forward(self, x: Tensor) -> Tensor:                 # (2, T, B, P) -> (2, T, B, P)
        weights = [None if w is None else w.to(x.dtype) for w in (self.w_x, self.w_h, self.bias, self.w_p)]
        return LSTM.apply(x, *weights)


TABLE_STD = 0.05    # initial deviation of the table's entries; rows of norm about 1 at P = 384


class BiLM(nn.Module):
    """The bidirectional language model. `table` (V, P) is the softmax and, where tied, also x; row-wise Adam moves it.

    `table` and `table_bias` are buffers, not parameters: no gradient of their size exists, only that of the rows that a
    step touches. They are changed in place by RowAdam.
    """

    def __init__(self, config: Config, size: int):
        super().__init__()
        self.config = config
        P = config.output
        self.register_buffer("table", TABLE_STD * torch.randn(size, P))
        self.register_buffer("table_bias", torch.zeros(size, 1))
        if config.representation == "char":
            self.characters = CharacterCNN(config)
        elif not config.tied:
            self.register_buffer("static", TABLE_STD * torch.randn(size, P))
        self.layers = nn.ModuleList(Layer(P, config.hidden) for _ in range(2))

    def represent(self, x: Tensor, rows: Tensor | None = None, chars: Tensor | None = None) -> Tensor:
        """(..., P) token representations of the ids x: of `rows`, the step's part of the table, where given."""
        if self.config.representation == "char":
            types, where = torch.unique(x, return_inverse=True)
            return self.characters(chars[types.to(chars.device)].to(x.device))[where]
        return (self.static if not self.config.tied else self.table if rows is None else rows)[x]

    def states(self, x: Tensor, dtype: torch.dtype = torch.float32, masks: Sequence[Tensor | None] = (None,) * 3) -> list:
        """[h_0, h_1, h_2], each (2, T, B, P): representations x in, every layer's states out."""
        h = x.to(dtype)
        out = [h if masks[0] is None else h * masks[0]]
        for j, layer in enumerate(self.layers, start=1):
            h = layer(out[-1])
            h = h if masks[j] is None else h * masks[j]
            out.append(h + out[-1] if self.config.skip and j > 1 else h)
        return out

    def full_logits(self, h: Tensor) -> Tensor:             # (N, P) -> (N, V)
        return torch.addmm(self.table_bias[:, 0], h.float(), self.table.t())


def fast_bf16(device: torch.device) -> bool:
    """Whether this device multiplies bf16 matrices in hardware; emulation would be several times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    can = torch.cpu.get_capabilities()
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type of matrix products for "auto", "fp32" or "bf16"; masters, cell states and losses are always fp32."""
    return torch.bfloat16 if precision == "bf16" or precision == "auto" and fast_bf16(device) else torch.float32


# ------------------------------------------------------------------------------------------------------- loss
class Negatives:
    """Draws sampled words without replacement: word w is in a draw with probability pi_w, exactly, in O(E log V).

    pi_w = min(1, k count_w^power) with k such that they sum to E: frequent words are in every draw, both boundary symbols
    among the candidates like any word, <pad> never. Systematic sampling: the words lie in a random order (new each
    epoch) as intervals of length pi_w on a line; the points u, u + 1, u + 2, .. hit no interval of length <= 1 twice.
    """

    def __init__(self, counts: np.ndarray, draws: int, power: float, seed: int):
        weight = np.where(counts > 0, np.maximum(counts, 1.0) ** power, 0.0)
        weight[PAD] = 0
        draws = min(draws, int((weight > 0).sum()))
        pi, scale = weight, draws / weight.sum()
        for _ in range(200):                                # each round caps more words; few rounds are needed
            pi = np.minimum(1, scale * weight)
            if abs(pi.sum() - draws) < 1e-9 * draws:
                break
            scale *= 1 + (draws - pi.sum()) / max(pi[pi < 1].sum(), 1e-12)
        self.pi, self.draws, self.seed = pi, draws, seed
        self.log_pi = torch.from_numpy(np.log(np.maximum(pi, 1e-30))).float()

    def shuffle(self, epoch: int) -> None:
        self.order = np.random.default_rng([self.seed, epoch, 1]).permutation(len(self.pi))
        self.ends = np.cumsum(self.pi[self.order])

    def draw(self, u: float) -> Tensor:
        """(E,) distinct word ids for u in [0, 1)."""
        points = np.arange(self.draws) + u
        hits = np.searchsorted(self.ends, points[points < self.ends[-1]], side="right")
        return torch.from_numpy(self.order[np.unique(hits)])


class SampledSoftmax(torch.autograd.Function):
    """Summed nats of N targets against shared sampled words, and all gradients, in one pass over blocks of logits.

        Z = exp(s_target) + sum over sampled w != target of exp(s_w) / pi_w        (Horvitz and Thompson 1952)
        loss = log Z - s_target

    A sampled word counts as 1 / pi_w words, so that Z's expectation is the full softmax's sum exactly; a target that was
    sampled too (accidental hit) is left out of the sum, since it stands there already. Gradients are made where the
    logits lie, block by block, so that no second array of their size exists.
    """
    BLOCK = 1024        # rows: 1024 x 4096 logits in fp32 are 16 MB, about what a core's share of the cache holds

    @staticmethod
    def forward(ctx, h, rows, bias, target, sampled, log_pi):
        """h (N, P); rows (C, P) and bias (C, 1) the step's part of the table; target (N,), sampled (E,) places in it."""
        weight = rows[sampled].to(h.dtype)                  # (E, P)
        offset = bias[sampled, 0] - log_pi                  # (E,)
        place = torch.full((len(rows),), -1, device=h.device)
        place[sampled] = torch.arange(len(sampled), device=h.device)
        hit = place[target]                                 # (N,) where in `sampled` the target stands, or -1
        dh, dgold = torch.empty_like(h), h.new_empty(len(h), dtype=torch.float32)
        dweight, doffset = torch.zeros_like(weight, dtype=torch.float32), torch.zeros_like(offset)
        total = torch.zeros((), dtype=torch.float64, device=h.device)
        for a in range(0, len(h), SampledSoftmax.BLOCK):
            block, gold = h[a:a + SampledSoftmax.BLOCK], target[a:a + SampledSoftmax.BLOCK]
            gold_rows = rows[gold]                          # (n, P)
            s = (block.float() * gold_rows).sum(dim=1) + bias[gold, 0]
            z = torch.addmm(offset, block, weight.t()) if h.dtype == torch.float32 else (
                (block @ weight.t()).float().add_(offset))  # (n, E)
            both = (hit[a:a + SampledSoftmax.BLOCK] >= 0).nonzero()[:, 0]
            z[both, hit[a + both]] = -torch.inf
            top = torch.maximum(z.amax(dim=1), s)
            z.sub_(top[:, None]).exp_()
            s_exp = (s - top).exp()
            Z = z.sum(dim=1) + s_exp
            total += (Z.log() + top - s).sum(dtype=torch.float64)
            z.div_(Z[:, None])                              # now the gradient of the sampled words' logits
            dgold[a:a + SampledSoftmax.BLOCK] = s_exp / Z - 1
            doffset += z.sum(dim=0)
            z = z.to(h.dtype)
            dh[a:a + SampledSoftmax.BLOCK] = torch.mm(z, weight).float().addcmul_(
                dgold[a:a + SampledSoftmax.BLOCK, None], gold_rows).to(h.dtype)
            if h.dtype == torch.float32:
                dweight.addmm_(z.t(), block)
            else:
                dweight += z.t() @ block
        drows, dbias = torch.zeros_like(rows), torch.zeros_like(bias)
        drows.index_add_(0, target, dgold[:, None] * h.float()).index_add_(0, sampled, dweight)
        dbias[:, 0].index_add_(0, target, dgold).index_add_(0, sampled, doffset)
        ctx.save_for_backward(dh, drows, dbias)
        return total

    @staticmethod
    def backward(ctx, grad):
        return *(g * grad.to(g.dtype) for g in ctx.saved_tensors), None, None, None


def full_softmax(model: BiLM, h: Tensor, y: Tensor, details: bool = False) -> tuple[Tensor, ...]:
    """Nats (N,) of the targets y (N,) under all V words; with details also the best word and the target's rank (N,)."""
    nats, best, rank = [], [], []
    block = max(16, 2**23 // len(model.table))              # logits of 32 MB
    for a in range(0, len(h), block):
        z, gold = model.full_logits(h[a:a + block]), y[a:a + block]
        z[:, PAD] = -torch.inf
        s = z.gather(1, gold[:, None])
        if details:
            best.append(z.argmax(dim=1))
            rank.append((z > s).sum(dim=1))
        top = z.amax(dim=1, keepdim=True)
        nats.append(((z.sub_(top).exp_().sum(dim=1, dtype=torch.float32).log() + top[:, 0]) - s[:, 0]).double())
    return tuple(torch.cat(part) if part else torch.zeros(0) for part in ((nats, best, rank) if details else (nats,)))


# ------------------------------------------------------------------------------------------------- evaluation
@dataclass
class Scores:
    """Per direction (forward, backward) and row: nats (2, rows), tokens (rows,) predicted, each end symbol included.

    With details also, per direction and predicted token: its row, the gold word, the best one, and the rank (number of
    words scored above the gold one).
    """
    nats: np.ndarray
    tokens: np.ndarray
    words: list[tuple[np.ndarray, ...]]

    def perplexity(self, rows: np.ndarray | slice = slice(None)) -> list[float]:
        """exp(summed nats / summed tokens) of the chosen rows, forward and backward."""
        return np.exp(self.nats[:, rows].sum(axis=1) / max(1, self.tokens[rows].sum())).tolist()


@torch.no_grad()
def score_rows(model: BiLM, encoded: Encoded, rows: np.ndarray, dtype: torch.dtype = torch.float32,
               details: bool = False) -> Scores:
    """Scores of the rows under the full softmax; no dropout, no sampling, each row on its own."""
    lengths, device = np.diff(encoded.tokens.offsets)[rows], model.table.device
    nats, found = np.zeros((2, len(rows))), ([], [])
    for part in batches(lengths, 8000):
        batch = collate(encoded, rows[part])
        h = model.states(model.represent(batch.x.to(device), chars=encoded.chars), dtype)[-1]       # (2, T, B, P)
        for d in range(2):
            real = batch.y[d] != PAD                                        # (T, B)
            gold = batch.y[d][real].to(device)
            values = full_softmax(model, h[d][real.to(device)], gold, details)
            row = real.nonzero()[:, 1].numpy()
            nats[d, part] = np.bincount(row, weights=values[0].cpu().numpy(), minlength=len(part))
            if details:
                found[d].append([part[row], gold.cpu().numpy(), *(v.cpu().numpy() for v in values[1:])])
    return Scores(nats, lengths + 1, [tuple(map(np.concatenate, zip(*f, strict=True))) for f in found if f])


# --------------------------------------------------------------------------------------------------- training
@dataclass
class Data:
    """A tokenized corpus, its vocabulary from the training rows alone, and its two sets of row numbers."""
    words: Vocabulary
    encoded: Encoded
    train: np.ndarray
    validation: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[str], config: Config, train: np.ndarray, validation: np.ndarray,
           cache: Path | None = None) -> "Data":
        tokens = tokenized(texts, config, cache)
        words = Vocabulary.count(tokens.types, tokens.counts(train), config.min_count)
        return cls(words, Encoded.of(tokens, words, config), train, validation)

    def counts(self) -> np.ndarray:
        """(V,) how often each word is a target of the training rows; either boundary symbol ends one stream a row."""
        counts = np.bincount(self.encoded.lookup, weights=self.encoded.tokens.counts(self.train),
                             minlength=len(self.words))
        counts[[BOS, EOS]] = len(self.train)
        return counts

    def unknown(self, rows: np.ndarray) -> float:
        """Share of <unk> among the rows' tokens."""
        counts = self.encoded.tokens.counts(rows)
        return float(counts[self.encoded.lookup == UNK].sum() / max(1, counts.sum()))


class RowAdam:
    """Adam (Kingma and Ba 2015) for the rows of a table that a step touches; the others cost nothing and do not move.

    Every row has its own step count, so that a rare word's first update is corrected like a frequent word's first.
    """

    def __init__(self, table: Tensor, beta2: float):
        self.table, self.beta2 = table, beta2
        self.state = {"m": torch.zeros_like(table), "v": torch.zeros_like(table),
                      "steps": torch.zeros(len(table), 1, device=table.device)}

    def update(self, at: Tensor, grad: Tensor, lr: float) -> None:
        """at: distinct row numbers (C,); grad (C, width)."""
        rows = {name: value[at] for name, value in self.state.items()}
        rows["steps"] += 1
        rows["m"].lerp_(grad, 0.1)
        rows["v"].mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
        for name, value in rows.items():
            self.state[name][at] = value
        size = (rows["v"] / (1 - self.beta2 ** rows["steps"])).sqrt_().add_(1e-8)
        self.table[at] -= lr * rows["m"] / (1 - 0.9 ** rows["steps"]) / size


class Trainer:
    """The model, its two optimizers and one training step; every random number comes from (seed, step)."""

    def __init__(self, config: Config, data: Data, device: torch.device):
        torch.manual_seed(config.seed)
        self.config, self.data, self.device = config, data, device
        self.model = BiLM(config, len(data.words))
        counts = data.counts()
        self.model.table_bias[:, 0] = torch.from_numpy(np.log(np.maximum(counts, 0.5) / counts.sum()))
        if config.representation == "word2vec":
            vectors = word2vec(data.encoded, data.train, data.words, config)
            (self.model.table if config.tied else self.model.static).copy_(vectors)
        self.model.to(device)
        self.parameters = list(self.model.parameters())
        self.adamw = torch.optim.AdamW(self.parameters, lr=config.lr, betas=(0.9, config.beta2),
                                       weight_decay=config.weight_decay, fused=True)
        self.row_adams = [RowAdam(t, config.beta2) for t in (self.model.table, self.model.table_bias)]
        self.negatives = Negatives(counts, config.negatives, config.sampling_power, config.seed)
        self.log_pi = self.negatives.log_pi.to(device)
        self.place = torch.zeros(len(data.words), dtype=torch.long, device=device)     # word id -> row of this step's part
        self.dtype = compute_dtype(config.precision, device)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        lengths = np.diff(data.encoded.tokens.offsets)[data.train]
        self.epoch_batches = lambda epoch: batches(lengths, config.batch_tokens, np.random.default_rng([config.seed, epoch]))
        self.per_epoch = len(self.epoch_batches(0))
        self.steps = round(config.epochs * self.per_epoch)
        self.targets_per_epoch = 2 * int((lengths + 1).sum())
        self.epoch = -1

    def rate(self, step: int) -> float:
        """Share of the highest learning rate: linear warm-up, then a cosine to 1 %."""
        rise = self.config.warmup * self.steps
        return (step + 1) / rise if step + 1 < rise else 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def masks(self, T: int, B: int, generator: torch.Generator) -> list[Tensor | None]:
        """Dropout masks of x, h_1, h_2, shape (2, 1, B, P), the same at every t; word dropout (2, T, B, 1) joins x's."""
        def mask(p: float, *shape: int) -> Tensor | None:
            if p:
                kept = torch.empty(shape).bernoulli_(1 - p, generator=generator).div_(1 - p)
                return kept[:, :, self.rank::self.world].to(self.device, self.dtype)
        units = [mask(self.config.dropout, 2, 1, B, self.config.output) for _ in range(3)]
        if (words := mask(self.config.word_dropout, 2, T, B, 1)) is not None:
            units[0] = words if units[0] is None else units[0] * words
        return units

    def step(self, step: int) -> tuple[float, int]:
        """One update; (summed nats, targets) of the batch, both directions and all processes together."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, self.epoch_batches(epoch)
            self.negatives.shuffle(epoch)
        batch = collate(self.data.encoded, self.data.train[self.order[place]])
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        masks = self.masks(*batch.x.shape[1:], generator)
        sampled = self.negatives.draw(float(torch.rand((), generator=generator, dtype=torch.float64)))
        words = [batch.y.flatten(), sampled] + ([batch.x.flatten()] if self.config.tied else [])
        at, x, y, sampled = (t.to(self.device) for t in (torch.unique(torch.cat(words)), batch.x, batch.y, sampled))
        self.place[at] = torch.arange(len(at), device=self.device)
        rows, bias = self.model.table[at].requires_grad_(), self.model.table_bias[at].requires_grad_()
        targets = int((batch.y != PAD).sum())
        x, y = x[:, :, self.rank::self.world], y[:, :, self.rank::self.world]   # this process's rows of the batch
        x = self.model.represent(self.place[x] if self.config.tied else x, rows, self.data.encoded.chars)
        h = self.model.states(x, self.dtype, masks)[-1]
        real = y != PAD
        nats = SampledSoftmax.apply(h[real], rows, bias, self.place[y[real]], self.place[sampled], self.log_pi[sampled])
        (nats / targets).backward()
        nats = self.reduce(nats.detach(), [rows, bias])
        norm = float(nn.utils.clip_grad_norm_([*self.parameters, rows, bias], self.config.clip))
        if not math.isfinite(norm + nats):
            raise InputError(f"the loss is not finite at step {step}; resume from the last state with a lower --lr")
        rate = self.rate(step)
        for group in self.adamw.param_groups:
            group["lr"] = self.config.lr * rate
        self.adamw.step()
        self.adamw.zero_grad()
        for adam, part in zip(self.row_adams, (rows, bias), strict=True):
            adam.update(at, part.grad, self.config.table_lr * rate)
        return nats, targets

    def reduce(self, nats: Tensor, rows: list[Tensor]) -> float:
        """Gradients and nats summed over the processes, each of which has its own rows of the same batch."""
        if self.world > 1:
            with_grad = [p for p in [*self.parameters, *rows] if p.grad is not None]
            flat = torch.cat([p.grad.flatten() for p in with_grad])
            dist.all_reduce(flat)
            dist.all_reduce(nats)
            for p, grad in zip(with_grad, flat.split([p.numel() for p in with_grad]), strict=True):
                p.grad = grad.view_as(p)
        return float(nats)

    def state(self) -> dict:
        """All that the next step depends on, beside the config and the corpus."""
        return {"model": self.model.state_dict(), "adamw": self.adamw.state_dict(),
                "rows": [adam.state for adam in self.row_adams]}

    def load_state(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.adamw.load_state_dict(state["adamw"])
        for adam, saved in zip(self.row_adams, state["rows"], strict=True):
            for name, value in saved.items():
                adam.state[name].copy_(value)


def train(trainer: Trainer, resume_file: Path | None = None, resume: bool = False, report=None) -> dict:
    """The run: `best` weights by validation (the last, without validation rows), `history`, `step`, `seconds`, `wall`.

    A resume state is written to `resume_file` every `save_every` seconds, at each evaluation and at a stop request.
    `report(model, epoch)` adds the detailed metrics of `--report-every` to the history.
    """
    config, data = trainer.config, trainer.data
    run = {"step": 0, "seconds": 0.0, "wall": 0.0, "nats": 0.0, "targets": 0, "lowest": math.inf, "best": None, "history": []}
    if resume and resume_file and resume_file.exists():
        load_resume(resume_file, trainer, run)
    leader = trainer.rank == 0
    began = time.perf_counter() - run["wall"]       # `wall` counts evaluations and writing too, over all resumed parts
    def save() -> None:
        run["wall"] = time.perf_counter() - began
        if resume_file and leader:
            save_resume(resume_file, trainer, run)
    bar = tqdm(total=trainer.steps, initial=run["step"], unit="step", disable=not leader, mininterval=1, smoothing=0.05)
    clock, saved, since, pace = time.perf_counter(), time.perf_counter(), 0, time.perf_counter()
    with stop_request() as stop, bar:
        for step in range(run["step"], trainer.steps + 1):
            last, (epoch, place) = step == trainer.steps, divmod(step, trainer.per_epoch)
            # 1. evaluate and keep the best; the clock stops meanwhile
            if step and (last or not place) and (not run["history"] or run["history"][-1]["step"] < step):
                run["seconds"] += time.perf_counter() - clock
                entry = {"step": step, "epoch": round(step / trainer.per_epoch, 3), "seconds": round(run["seconds"], 1),
                         "train_perplexity": math.exp(run["nats"] / max(1, run["targets"]))}
                if len(data.validation):
                    scores = score_rows(trainer.model, data.encoded, data.validation, trainer.dtype)
                    entry["validation_perplexity"] = scores.perplexity()
                if report and config.report_every and not epoch % config.report_every and not last:
                    entry["details"] = report(trainer.model)
                mean = float(np.mean(np.log(entry.get("validation_perplexity", [0.0]))))
                if mean < run["lowest"] or not len(data.validation):
                    run["lowest"] = mean
                    run["best"] = {name: value.clone() for name, value in trainer.model.state_dict().items()}
                run["history"].append(entry)
                run.update(nats=0.0, targets=0)
                if leader:
                    bar.write(json.dumps(entry))
                clock = pace = saved = time.perf_counter()
                since = 0
                save()
            # 2. stop
            if last or agreed(stop.is_set(), trainer):
                save()
                break
            # 3. one step
            nats, targets = trainer.step(step)
            run.update(step=step + 1, nats=run["nats"] + nats, targets=run["targets"] + targets)
            since += targets
            bar.update()
            # 4. one log line, one resume state in a while
            if (step + 1) % config.log_every == 0 and leader:
                now = time.perf_counter()
                loss = run["nats"] / run["targets"]
                bar.write(f"step {step + 1} of {trainer.steps}  epoch {(step + 1) / trainer.per_epoch:.2f}  loss {loss:.3f}"
                          f"  perplexity {math.exp(loss):.1f}  {since / (now - pace):,.0f} tokens/s  "
                          f"{bar.format_interval((now - pace) / config.log_every * (trainer.steps - step - 1))} left")
                since, pace = 0, now
            if time.perf_counter() - saved > config.save_every:
                run["seconds"] += time.perf_counter() - clock
                save()
                clock = saved = time.perf_counter()
    return run


def agreed(stop: bool, trainer: Trainer) -> bool:
    """Whether any process was asked to stop, so that all stop after the same step."""
    if trainer.world == 1:
        return stop
    flag = torch.tensor(float(stop), device=trainer.device)
    dist.all_reduce(flag)
    return bool(flag)


# ------------------------------------------------------------------------------------------------- checkpoint
def fingerprint(trainer: Trainer) -> dict:
    """What a resumed run must share with the run that it continues."""
    words = hashlib.sha256("\n".join(trainer.data.words.words).encode("utf-8", "surrogatepass"))
    words.update(trainer.data.counts().tobytes())
    words.update(np.diff(trainer.data.encoded.tokens.offsets)[trainer.data.train].tobytes())
    config = {name: value for name, value in asdict(trainer.config).items() if name not in RUN_ONLY}
    return {"config": config, "corpus": words.hexdigest()}


def save_resume(path: Path, trainer: Trainer, run: dict) -> None:
    write_atomically(path, partial(torch.save, fingerprint(trainer) | {"run": run, "trainer": trainer.state()}))


def load_resume(path: Path, trainer: Trainer, run: dict) -> None:
    """Trainer and run as they were saved; InputError when they belong to another config or corpus."""
    content = read_checkpoint(path, {"config", "corpus", "run", "trainer"})
    expected = fingerprint(trainer)
    for name, value in expected["config"].items():
        if content["config"].get(name) != value:
            raise InputError(f"{path} was made with {name} = {content['config'].get(name)}, not {value}; give the same "
                             "knobs, or start anew without --resume")
    if content["corpus"] != expected["corpus"]:
        raise InputError(f"{path} was made from other training rows or another vocabulary; start anew without --resume")
    try:
        trainer.load_state(content["trainer"])
        run.update(content["run"])
    except (KeyError, ValueError, RuntimeError, TypeError):
        raise InputError(f"{path} does not hold this model's state; start anew without --resume") from None


# ------------------------------------------------------------------------------------------------------- ELMo
class ELMo:
    """A trained biLM: text in, three layers of vectors or perplexities out.

        elmo = ELMo.load("models/bilstm.pt")
        elmo.embed(["Oil prices fall."])[0]         # (3, 4, D): layer 0 is [x ; x], layers 1 and 2 [forward ; backward]
    """

    def __init__(self, config: Config, words: Vocabulary, model: BiLM, history=(), metrics=None):
        self.config, self.words, self.model = config, words, model.eval()
        self.history, self.metrics, self.digest = list(history), metrics or {}, None

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> "ELMo":
        """The biLM of a file that `save` or ELMO.py wrote; InputError when it is missing, damaged or does not fit."""
        content = read_published(path, FORMAT, {"config", "words", "history", "metrics"})
        try:
            config, words = Config(**content["config"]), Vocabulary(content["words"])
            if words.words[:len(SPECIAL)] != SPECIAL or len(words) != len(content["weights"]["table"]):
                raise ValueError("the vocabulary does not fit the weights")
            model = BiLM(config, len(words))
            model.load_state_dict({name: value.float() for name, value in content["weights"].items()})
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            raise InputError(f"{path} does not fit together: {str(error).splitlines()[0]}") from None
        elmo = cls(config, words, model.to(device), content["history"], content["metrics"])
        elmo.digest = content["digest"]
        return elmo

    @classmethod
    def train(cls, texts: Sequence[str], config: Config | None = None, device: str | None = None) -> "ELMo":
        """The script's training on any texts; a tenth of them, at most `validation`, choose the best epoch (none below 10)."""
        texts, config = check_texts(texts), config or Config()
        if not texts:
            raise InputError("there is no text to train on; expected a list of strings")
        kept = min(config.validation, len(texts) // 10)
        parts = split(len(texts), kept, config.seed) if kept else (np.arange(len(texts)), np.arange(0))
        trainer = Trainer(config, Data.of(texts, config, *parts), torch.device(device or default_device()))
        run = train(trainer)
        return cls.rounded(trainer, run["best"], run["history"])

    @classmethod
    def rounded(cls, trainer: Trainer, weights: dict | None, history: list) -> "ELMo":
        """The model with its weights as the file will hold them, in half precision: published numbers are this model's."""
        trainer.model.load_state_dict({k: v.half().float() for k, v in (weights or trainer.model.state_dict()).items()})
        return cls(trainer.config, trainer.data.words, trainer.model, history)

    def save(self, path: str | Path) -> None:
        """Tensors in half precision and plain types, written whole or not at all; sets `digest`."""
        weights = {name: value.cpu().half() for name, value in self.model.state_dict().items()}
        self.digest = write_published(path, {
            "format": FORMAT, "config": asdict(self.config), "words": self.words.words, "weights": weights,
            "history": self.history, "metrics": self.metrics})

    def tokenize(self, text: str) -> list[str]:
        """["oil", "prices", "fall", "."] of "Oil prices fall."."""
        return tokenize(text, self.config.lowercase)

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Texts as `score_rows` and `collate` take them."""
        return Encoded.of(tokenized(check_texts(texts), self.config), self.words, self.config)

    def embed(self, texts: Sequence[str], precision: str = "fp32") -> list[Tensor]:
        """One (3, tokens, D) float32 CPU tensor per text, boundaries left out; (3, 0, D) for a text without tokens."""
        return list(self.embed_stream(check_texts(texts), precision))

    def embed_stream(self, texts: Iterable[str], precision: str = "fp32", window: int = 1024) -> Iterator[Tensor]:
        """The same one by one, in input order, from any iterable; memory holds `window` texts at a time.

        precision: "fp32"; "bf16" is faster where the hardware multiplies it, and is computed in fp32 elsewhere.
        """
        if precision not in ("fp32", "bf16"):
            raise InputError(f"precision is {precision!r}; expected fp32 or bf16")
        device, texts = self.model.table.device, iter(texts)
        dtype = torch.bfloat16 if precision == "bf16" and fast_bf16(device) else torch.float32
        while chunk := list(islice(texts, window)):
            encoded, out = self.encode(chunk), [None] * len(chunk)
            for rows in batches(np.diff(encoded.tokens.offsets), 8000):
                batch = collate(encoded, rows)
                with torch.inference_mode():
                    h = self.model.states(self.model.represent(batch.x.to(device), chars=encoded.chars), dtype)
                    h = torch.stack(h).permute(1, 3, 0, 2, 4).float().cpu()             # (2, B, 3, T, P)
                for b, (row, n) in enumerate(zip(rows, batch.lengths.tolist(), strict=True)):
                    out[row] = torch.cat([h[0, b, :, 1:n + 1], h[1, b, :, 1:n + 1].flip(1)], dim=-1)    # (3, n, D)
            yield from (vectors.clone() for vectors in out)

    def score(self, texts: Sequence[str]) -> dict:
        """{"forward": {"nats", "tokens", "perplexity"}, "backward": ...} summed over the texts, full softmax, end symbols in."""
        encoded = self.encode(texts)
        scores = score_rows(self.model, encoded, np.arange(len(encoded.tokens)))
        tokens = int(scores.tokens.sum())
        return {name: {"nats": float(scores.nats[d].sum()), "tokens": tokens, "perplexity": scores.perplexity()[d]}
                for d, name in enumerate(("forward", "backward"))}


# ------------------------------------------------------------------------------------------------------- main
def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_texts(texts: Sequence[str]) -> list[str]:
    """The texts as a list; InputError for one string, or for anything in it that is not a string."""
    if isinstance(texts, str):
        raise InputError("texts is one string; expected a list of strings: embed([text])")
    texts = list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"text {i} is {type(text).__name__}; expected str")
    return texts


def pretrain(config: Config, out: Path, resume: bool) -> int:
    """The run of the bare command: AG News to out/bilstm.pt, out/pretraining.json and the PNGs; the exit status."""
    from report import pretraining
    begin = time.perf_counter()
    if "RANK" in os.environ and not dist.is_initialized():      # started by torchrun
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    texts, test_texts = (read_ag_news(part).description.tolist() for part in ("train", "test"))
    if config.rows > len(texts):
        raise InputError(f"rows is {config.rows}, but train.csv has {len(texts)} rows")
    texts = texts[:config.rows or None]
    data = Data.of(texts, config, *split(len(texts), config.validation, config.seed), cache=CACHE)
    test = Encoded.of(tokenized(test_texts, config, CACHE), data.words, config)
    trainer = Trainer(config, data, torch.device(default_device()))
    resume_file = out / "bilstm.resume.pt"
    if trainer.rank == 0:
        print(pretraining.describe(trainer, test), flush=True)
    details = partial(pretraining.details, data, score_rows) if config.report_every else None
    setup = time.perf_counter() - begin
    run = train(trainer, resume_file, resume, details)
    best, finished = run["best"], run["step"] == trainer.steps
    begin = time.perf_counter() - setup - run["wall"]
    elmo = ELMo.rounded(trainer, best, run["history"])
    if trainer.rank == 0 and finished:
        pretraining.publish(elmo, trainer, (texts, test_texts), test, score_rows, out, begin)
        resume_file.unlink(missing_ok=True)
    elif trainer.rank == 0:
        if best is not None:
            elmo.save(out / "bilstm.pt")
        print(f"stopped; {out / 'bilstm.pt'} holds the best epoch so far; --resume goes on" if best is not None else
              "stopped before the first epoch was complete; --resume goes on")
    return 0 if finished else 130


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 2 for an input that the user can mend, 130 after Ctrl-C."""
    parser = Parser(prog="ELMO.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_knobs(parser, Config)
    parser.add_argument("--out", default=HERE / "models", type=Path, help="folder that the run writes (default models/)")
    parser.add_argument("--resume", action="store_true", help="go on where the last run in --out stopped")
    parser.add_argument("--config", help="TOML file of knobs; the command line wins")
    parser.add_argument("--embed", metavar="FILE", help="write the vectors of this file's lines instead of training")
    parser.add_argument("--npz", metavar="FILE", help="where --embed writes them")
    parser.add_argument("--float32", action="store_true", help="--embed: full precision in the file")
    try:
        given = vars(parser.parse_args(argv))
        out, resume, toml, embed, npz, wide = (given.pop(name) for name in ("out", "resume", "config", "embed", "npz", "float32"))
        config = Config(**((read_toml(toml, {f.name for f in fields(Config)}) if toml else {}) | given))
        if not embed and not npz:
            return pretrain(config, out, resume)
        if not embed or not npz:
            raise InputError("--embed and --npz go together: --embed texts.txt --npz vectors.npz")
        precision = "fp32" if config.precision == "fp32" else "bf16"
        shape = write_npz(ELMo.load(out / "bilstm.pt", default_device()), embed, npz, precision, "f4" if wide else "f2")
        print(f"{npz}: vectors {shape}, offsets beside them")
        return 0
    except InputError as error:
        print(f"ELMO.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
