"""ELMo's bidirectional language model (Peters et al. 2018, arXiv:1802.05365) from raw news to models/bilstm.pt.

    sentence k: <s> w_1 .. w_n </s>
    forward LM   reads <s> w_1 .. w_n      predicts w_1 .. w_n </s>      sum_k log p(w_k | w_1 .. w_k-1)
    backward LM  reads </s> w_n .. w_1     predicts w_n .. w_1 <s>       sum_k log p(w_k | w_k+1 .. w_n)
    h_{k,0} = [x_k ; x_k]    h_{k,j} = [forward h_{k,j} ; backward h_{k,j}],  j = 1, 2

Token representations x and the softmax are shared by the two directions, the LSTMs are not; the loss is the mean of
both directions' nats per token. B rows of a batch, T positions (longest row + 1), V words, P width of x and of every
layer's output, H cells of an LSTM, E sampled words of a step, D = 2 P what a user receives per layer.

    python ELMO.py                                  the published run: models/bilstm.pt, pretraining.json and figures
    python ELMO.py --resume                         goes on where a stopped run was, to the same weights bit for bit
    python ELMO.py --corpus PATH --out FOLDER       any plain text instead: a file, or a folder of .txt and .gz
    python ELMO.py --embed FILE --npz FILE          one text a line -> its three layers' vectors
    torchrun --nproc_per_node=2 ELMO.py             the same run, each batch shared by two processes
"""
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.files import InputError, fitting, read_published, write_npz, write_published
from data.knobs import check_knobs, knob, script, script_arguments
from data.machine import compute_dtype, default_device, fast_bf16, join_processes, on_each_core, sum_over_processes
from data.prepare import CACHE, check_texts, split, word2vec
from data.progress import Run, rate
from data.text import BOS, EOS, PAD, SPECIAL, Data, Encoded, Vocabulary, batches, tokenize, tokenized

HERE = Path(__file__).resolve().parent
FORMAT = "elmo-bilm-1"


# ------------------------------------------------------------------------------------------------------ knobs
@dataclass(frozen=True)
class Config:
    """Every knob of pretraining; the defaults are the published run. InputError where a value is out of range."""
    representation: str = knob("embedding", "what x is made from", ("embedding", "word2vec", "char"))
    width: int = knob(448, "P: width of x and of each LSTM's output, at most `hidden`", least=1, most=8192)
    hidden: int = knob(448, "H: cells of each LSTM, projected to P where wider", least=1, most=65536)
    skip: bool = knob(True, "add layer 1's output to layer 2's, as the paper does")
    dropout: float = knob(0.2, "share of units left out, the same ones for a whole row", most=0.95)
    word_dropout: float = knob(0.0, "share of words left out of the input", most=0.95)
    lowercase: bool = knob(True, "lower-case the text")
    min_count: int = knob(3, "a word enters the vocabulary when training rows hold it this often", least=1)
    freeze_word2vec: bool = knob(False, "word2vec: x stays as gensim made it, and the softmax has a table of its own")
    word2vec_epochs: int = knob(5, "word2vec: passes of gensim over the training rows", least=1)
    max_chars: int = knob(24, "char: bytes of a word that are read", least=3, most=200)
    rows: int = knob(0, "train on this many rows of train.csv only, for short trials; 0 takes all")
    validation: int = knob(4000, "rows of train.csv that are kept apart for every choice", least=1)
    epochs: float = knob(4.0, "passes over the training rows", most=100_000)
    batch_tokens: int = knob(3000, "positions (rows x T) of a batch", least=1)
    negatives: int = knob(2048, "sampled words of the training softmax; at V and above it is the full one", least=1)
    sampling_power: float = knob(0.75, "words are sampled by count to this power", most=4)
    lr: float = knob(8e-3, "highest learning rate of the LSTMs and the character network (AdamW)", most=10)
    table_lr: float = knob(1.6e-2, "highest learning rate of the tied table (row-wise lazy Adam)", most=10)
    warmup: float = knob(0.03, "share of the steps in which the rate rises; then it falls as a cosine", most=1)
    beta2: float = knob(0.99, "Adam's decay of the squared gradient", most=0.99999)
    weight_decay: float = knob(0.0, "AdamW's, of the LSTMs and the character network", most=10)
    clip: float = knob(0.5, "largest gradient norm, over the LSTMs and the touched rows together", least=1e-9)
    precision: str = knob("auto", "of matrix products; auto: bf16 where it is fast", ("auto", "fp32", "bf16"))
    seed: int = knob(0, "of rows, weights, batches, dropout and negatives", most=2**31)
    report_every: int = knob(0, "epochs between detailed metrics on validation rows; 0: only at the end")
    log_every: int = knob(100, "steps between log lines", least=1)
    save_every: float = knob(300.0, "seconds between resume states")
    track: str = knob("none", "curves to a tracker too, in --out", ("none", "tensorboard", "wandb"))

    def __post_init__(self):
        check_knobs(self)

    @property
    def output(self) -> int:
        """P: a layer is never wider than its cells."""
        return min(self.width, self.hidden)

    @property
    def tied(self) -> bool:
        """Whether x and the softmax are one table: not for characters, nor for vectors that must not move."""
        return self.representation != "char" and not (self.representation == "word2vec" and self.freeze_word2vec)


# ------------------------------------------------------------------------------------- token representations
class CharacterCNN(nn.Module):
    """x from a word's bytes: convolutions of several widths, maximum over the word, highway layers, a projection.

    Kim et al. 2016 (arXiv:1508.06615), as in the paper; every word gets a vector, seen in training or not.
    """
    WIDTH, HIGHWAYS = 16, 2                                         # of a character's embedding; layers
    FILTERS = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 128))       # (width, count): the paper's first five, two capped

    def __init__(self, config: Config):
        super().__init__()
        size = sum(count for _, count in self.FILTERS)
        self.characters = nn.Embedding(262, self.WIDTH, padding_idx=0)
        self.convolutions = nn.ModuleList(nn.Conv1d(self.WIDTH, count, width) for width, count in self.FILTERS)
        self.highways = nn.ModuleList(nn.Linear(size, 2 * size) for _ in range(self.HIGHWAYS))
        self.project = nn.Linear(size, config.output)
        for layer in self.highways:
            nn.init.constant_(layer.bias[size:], -2.0)      # the gate starts nearly shut: the layer begins as identity

    def forward(self, codes: Tensor) -> Tensor:
        """(words, P) representations of the codes (words, L) that `spell` gives."""
        x = self.characters(codes.long()).transpose(1, 2)   # (words, WIDTH, L)
        x = torch.cat([conv(x).amax(dim=2).relu() for conv in self.convolutions], dim=1)    # (words, size)
        for layer in self.highways:
            value, gate = layer(x).chunk(2, dim=1)
            x = x.lerp(value.relu(), gate.sigmoid())
        return self.project(x)


# ---------------------------------------------------------------------------------------------------- batches
def collate(encoded: Encoded, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """x and y (2, T, B): both directions of some rows, each read left to right by its own LSTMs, time before rows.

    The row "oil falls" with T = 4 (a longer row beside it):
        x[0] = <s>  oil   falls <pad>     y[0] = oil   falls </s> <pad>
        x[1] = </s> falls oil   <pad>     y[1] = falls oil   <s>  <pad>
    The backward stream is reversed within each row's own length, so padding comes last in both. Ids are the words',
    but type ids + 4 in the character model's x.
    """
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
    return torch.from_numpy(x), torch.from_numpy(y)


# ------------------------------------------------------------------------------------------------------ model
def tanh_(a: Tensor) -> Tensor:
    """tanh(a) in place, as 2 sigmoid(2 a) - 1: torch's tanh takes a CPU five times as long as its sigmoid."""
    return a.mul_(2).sigmoid_().mul_(2).sub_(1)


class LSTM(torch.autograd.Function):
    """(K, T, B, P) outputs of K LSTMs at once that never see each other: one layer's two directions, or several heads'.

        [i f o u] = W_x x_t + W_h h_t-1 + b
        c_t = sigmoid(f) c_t-1 + sigmoid(i) tanh(u)         h_t = W_p sigmoid(o) tanh(c_t)

    (Hochreiter and Schmidhuber 1997, projection of Sak et al. 2014). Written out because what does not depend on the
    previous step (W_x x, all weights' gradients) is then one large product over all T, and because what is done to a
    step's gates is done in a buffer that stays in the cache. The gates' arithmetic and the states c are fp32.
    """

    @staticmethod
    def forward(ctx, x: Tensor, w_x: Tensor, w_h: Tensor, bias: Tensor, w_p: Tensor | None, training: bool) -> Tensor:
        """(K, T, B, P) outputs of inputs x (K, T, B, width), weights as in Layer; `training`: backward will follow."""
        (K, T, B, _), H = x.shape, w_x.shape[1] // 4
        gates = torch.bmm(x.flatten(1, 2), w_x.transpose(1, 2)).view(K, T, B, 4 * H)
        now = x.new_empty(K, B, 4 * H, dtype=torch.float32)                 # a step's gates
        i, f, o, u = now.chunk(4, dim=-1)                                   # (K, B, H) each
        shape = (T if training else 1, K, B, H)                             # without training the last step's suffice
        c, tanh_c = (x.new_empty(shape, dtype=torch.float32).expand(T, -1, -1, -1) for _ in range(2))
        cell_out = x.new_empty(K, T, B, H)
        h = cell_out if w_p is None else x.new_empty(K, T, B, w_p.shape[1])
        for t, gate in enumerate(gates.unbind(1)):                          # (K, B, 4H)
            if t:
                gate.baddbmm_(h[:, t - 1], w_h.transpose(1, 2))
            now.copy_(gate).add_(bias[:, None])
            now[..., :3 * H].sigmoid_()
            tanh_(u)
            torch.mul(f, c[t - 1], out=c[t]).addcmul_(i, u) if t else torch.mul(i, u, out=c[t])
            torch.mul(o, tanh_(tanh_c[t].copy_(c[t])), out=cell_out[:, t])
            if w_p is not None:
                h[:, t] = torch.bmm(cell_out[:, t], w_p.transpose(1, 2))
            if training:
                gate.copy_(now)
        if training:
            ctx.save_for_backward(x, w_x, w_h, w_p, gates, c, tanh_c, cell_out, h)
        return h

    @staticmethod
    def backward(ctx, dh: Tensor):
        """Gradients of x and the weights from that of the outputs, by backpropagation through time."""
        x, w_x, w_h, w_p, gates, c, tanh_c, cell_out, h = ctx.saved_tensors
        (T, K, B, H), width = c.shape, x.shape[-1]
        dprojected = None if w_p is None else torch.empty_like(h)           # all T steps' gradient of h, for W_p's
        now, dnow = (c.new_empty(K, B, 4 * H) for _ in range(2))            # a step's gates, and their gradient
        (i, f, o, u), (di, df, do, du) = now.chunk(4, dim=-1), dnow.chunk(4, dim=-1)
        difo, dc, dnext = dnow[..., :3 * H], torch.zeros_like(c[0]), None
        for t in reversed(range(T)):
            dout = dh[:, t] if dnext is None else dh[:, t] + dnext          # (K, B, P)
            if w_p is not None:
                dprojected[:, t] = dout
                dout = torch.bmm(dout, w_p)                                 # (K, B, H)
            now.copy_(gates[:, t])
            dout = dout.float()
            torch.mul(dout, tanh_c[t], out=do)
            dc.add_(torch.ops.aten.tanh_backward(dout * o, tanh_c[t]))
            torch.mul(dc, i, out=du)
            torch.mul(dc, u, out=di)
            torch.mul(dc, c[t - 1], out=df) if t else df.zero_()
            torch.ops.aten.tanh_backward.grad_input(du, u, grad_input=du)
            torch.ops.aten.sigmoid_backward.grad_input(difo, now[..., :3 * H], grad_input=difo)
            dc.mul_(f)
            gates[:, t] = dnow                                              # from here on the gates' gradient
            dnext = torch.bmm(gates[:, t], w_h) if t else None              # (K, B, P)
        flat = gates.flatten(1, 2)                                          # (K, T B, 4H)
        before = F.pad(h[:, :-1], (0, 0, 0, 0, 1, 0))                       # h_t-1
        dw = torch.bmm(flat.transpose(1, 2), torch.cat([x, before], dim=-1).flatten(1, 2))      # W_x's and W_h's
        dw_p = None if w_p is None else torch.bmm(dprojected.flatten(1, 2).transpose(1, 2), cell_out.flatten(1, 2))
        dx = torch.bmm(flat, w_x).view_as(x) if ctx.needs_input_grad[0] else None
        return dx, dw[..., :width], dw[..., width:], flat.sum(dim=1), dw_p, None


class Layer(nn.Module):
    """One LSTM layer's weights, both directions: w_x (2, 4H, width), w_h (2, 4H, P), bias (2, 4H), w_p (2, P, H)."""

    def __init__(self, width: int, H: int, P: int):
        super().__init__()
        def uniform(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).uniform_(-1, 1) / math.sqrt(shape[-1]))
        self.w_x, self.w_h = uniform(2, 4 * H, width), uniform(2, 4 * H, P)
        self.bias = nn.Parameter(torch.zeros(2, 4 * H))
        self.w_p = uniform(2, P, H) if H > P else None
        self.bias.data[:, H:2 * H] = 1                      # remember at first (Jozefowicz et al. 2015)

    def forward(self, x: Tensor) -> Tensor:                 # (2, T, B, width) -> (2, T, B, P)
        weights = [None if w is None else w.to(x.dtype) for w in (self.w_x, self.w_h, self.bias, self.w_p)]
        return LSTM.apply(x, *weights, torch.is_grad_enabled())


class BiLM(nn.Module):
    """The bidirectional language model. `table` (V, P) is the softmax and, where tied, also x; row-wise Adam moves it.

    `table` and `table_bias` are buffers, not parameters: no gradient of their size exists, only that of the rows that a
    step touches. They are changed in place by RowAdam.
    """
    STD = 0.05          # of the table's entries at first: rows of norm about 1 at P = 448

    def __init__(self, config: Config, size: int):
        super().__init__()
        self.config, P = config, config.output
        self.register_buffer("table", self.STD * torch.randn(size, P))
        self.register_buffer("table_bias", torch.zeros(size, 1))
        if config.representation == "char":
            self.characters = CharacterCNN(config)
        elif not config.tied:
            self.register_buffer("static", self.STD * torch.randn(size, P))
        self.layers = nn.ModuleList(Layer(P, config.hidden, P) for _ in range(2))

    @torch.no_grad()
    def start_from(self, vectors: dict[int, np.ndarray]) -> None:
        """Word2Vec vectors (P,) of word ids into x's table, scaled to its initial size."""
        if vectors:
            found = torch.from_numpy(np.stack(list(vectors.values())))
            (self.table if self.config.tied else self.static)[list(vectors)] = self.STD * found / found.std()

    def represent(self, x: Tensor, rows: Tensor | None = None, chars: Tensor | None = None) -> Tensor:
        """(..., P) token representations of the ids x: of `rows`, the step's part of the table, where given."""
        if self.config.representation == "char":
            types, where = torch.unique(x, return_inverse=True)
            return F.embedding(where, self.characters(chars[types.to(chars.device)].to(x.device)))
        table = self.static if not self.config.tied else self.table if rows is None else rows
        return F.embedding(x, table)        # unlike table[x], its gradient is summed in the same order every time

    def states(self, x: Tensor, dtype: torch.dtype = torch.float32, masks: Sequence = (None,) * 3) -> list[Tensor]:
        """[h_0, h_1, h_2], each (2, T, B, P): representations x in, every layer's states out."""
        out = [x.to(dtype) if masks[0] is None else x.to(dtype) * masks[0]]
        for j, layer in enumerate(self.layers, start=1):
            h = layer(out[-1])
            h = h if masks[j] is None else h * masks[j]
            out.append(h + out[-1] if self.config.skip and j > 1 else h)
        return out


# ------------------------------------------------------------------------------------------------------- loss
class Negatives:
    """Draws sampled words without replacement: word w is in a draw with probability pi_w, exactly, in O(E log V).

    pi_w = min(1, k count_w^power) with k such that they sum to E: frequent words are in every draw, both boundary
    symbols are words like any other, <pad> is in none. Systematic sampling: the words lie in a random order, new each
    epoch, as intervals of length pi_w on a line; the points u, u + 1, u + 2, .. hit no interval of length <= 1 twice.
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
        """A new order of the intervals, the only work that grows with V."""
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

    A sampled word counts as 1 / pi_w words, so that Z's expectation is the full softmax's sum exactly; a target that
    was sampled too (accidental hit) is left out of the sum, since it stands there already. Gradients are made where the
    logits lie, block by block, so that no second array of their size exists.
    """
    LOGITS = 2**21      # of a block: 8 MB in fp32, about what a core's share of the cache holds

    @staticmethod
    def forward(ctx, h, rows, bias, target, sampled, log_pi):
        """h (N, P); rows (C, P), bias (C, 1) the step's part of the table; target (N,), sampled (E,) places in it."""
        weight = rows.index_select(0, sampled).to(h.dtype)  # (E, P)
        offset = bias[sampled, 0] - log_pi                  # (E,)
        place = torch.full((len(rows),), -1, device=h.device)
        place[sampled] = torch.arange(len(sampled), device=h.device)
        hit = place[target]                                 # (N,) where in `sampled` the target stands, or -1
        dh, dgold = torch.empty_like(h), h.new_empty(len(h), dtype=torch.float32)
        dweight, doffset = torch.zeros_like(weight, dtype=torch.float32), torch.zeros_like(offset)
        total = torch.zeros((), dtype=torch.float64, device=h.device)
        size = max(16, SampledSoftmax.LOGITS // max(1, len(sampled)))
        for a in range(0, len(h), size):
            block, gold = h[a:a + size], target[a:a + size]
            gold_rows = rows.index_select(0, gold)          # (n, P)
            s = (block.float() * gold_rows).sum(dim=1) + bias[gold, 0]
            z = (block @ weight.t()).float().add_(offset)   # (n, E)
            both = (hit[a:a + size] >= 0).nonzero()[:, 0]
            z[both, hit[a + both]] = -torch.inf
            top = torch.maximum(z.amax(dim=1), s)
            z.sub_(top[:, None]).exp_()
            s_exp = (s - top).exp()
            Z = z.sum(dim=1) + s_exp
            total += (Z.log() + top - s).sum(dtype=torch.float64)
            z.div_(Z[:, None])                              # now the gradient of the sampled words' logits
            dgold[a:a + size] = s_exp / Z - 1
            doffset += z.sum(dim=0)
            z = z.to(h.dtype)
            dh[a:a + size] = (z @ weight).float().addcmul_(dgold[a:a + size, None], gold_rows)
            dweight += z.t() @ block
        drows, dbias = torch.zeros_like(rows), torch.zeros_like(bias)
        drows.index_add_(0, target, dgold[:, None] * h.float()).index_add_(0, sampled, dweight)
        dbias[:, 0].index_add_(0, target, dgold).index_add_(0, sampled, doffset)
        ctx.save_for_backward(dh, drows, dbias)
        return total

    @staticmethod
    def backward(ctx, grad):
        return *(g * grad for g in ctx.saved_tensors), None, None, None     # a 0-d factor keeps each gradient's type


def full_softmax(model: BiLM, h: Tensor, y: Tensor, details: bool = False) -> tuple[Tensor, ...]:
    """Nats (N,) of the targets y under all V words; with details also the best word and the target's rank (N,)."""
    nats, best, rank = [], [], []
    block = max(16, 2**23 // len(model.table))              # logits of 32 MB
    for a in range(0, len(h), block):
        z = torch.addmm(model.table_bias[:, 0], h[a:a + block].float(), model.table.t())         # (n, V)
        z[:, PAD] = -torch.inf
        s = z.gather(1, y[a:a + block, None])
        if details:
            best.append(z.argmax(dim=1))
            rank.append((z > s).sum(dim=1))
        top = z.amax(dim=1, keepdim=True)
        nats.append((z.sub_(top).exp_().sum(dim=1).log() + (top - s)[:, 0]).double())
    return tuple(torch.cat(part) for part in ((nats, best, rank) if details else (nats,)))


# ------------------------------------------------------------------------------------------------- evaluation
@dataclass
class Scores:
    """Per direction (forward, backward) and row: nats (2, rows), tokens (rows,) predicted, each end symbol included.

    With details also, per direction and predicted token: row, gold word, best word, rank (words scored above gold).
    """
    nats: np.ndarray
    tokens: np.ndarray
    words: list[tuple[np.ndarray, ...]]

    def perplexity(self, rows: np.ndarray | slice = slice(None)) -> list[float]:
        """exp(summed nats / summed tokens) of the chosen rows, forward and backward."""
        return np.exp(self.nats[:, rows].sum(axis=1) / max(1, self.tokens[rows].sum())).tolist()


@torch.no_grad()
def score_rows(model: BiLM, encoded: Encoded, rows: np.ndarray, dtype=torch.float32, details: bool = False) -> Scores:
    """Scores of the rows under the full softmax; no dropout, no sampling, each row on its own."""
    lengths, device = np.diff(encoded.tokens.offsets)[rows], model.table.device
    nats, found = np.zeros((2, len(rows))), ([], [])
    for part in batches(lengths, 8000):
        x, y = collate(encoded, rows[part])
        h = model.states(model.represent(x.to(device), chars=encoded.chars), dtype)[-1]       # (2, T, B, P)
        for d in range(2):
            real = y[d] != PAD                                              # (T, B)
            gold = y[d][real].to(device)
            values = full_softmax(model, h[d][real.to(device)], gold, details)
            row = real.nonzero()[:, 1].numpy()
            nats[d, part] = np.bincount(row, weights=values[0].cpu().numpy(), minlength=len(part))
            if details:
                found[d].append([part[row], gold.cpu().numpy(), *(v.cpu().numpy() for v in values[1:])])
    return Scores(nats, lengths + 1, [tuple(map(np.concatenate, zip(*f, strict=True))) for f in found if f])


# --------------------------------------------------------------------------------------------------- training
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
        rows = {name: value.index_select(0, at) for name, value in self.state.items()}
        rows["steps"] += 1
        rows["m"].lerp_(grad, 0.1)
        rows["v"].mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
        for name, value in rows.items():
            self.state[name].index_copy_(0, at, value)
        size = rows["v"].div_(1 - self.beta2 ** rows["steps"]).sqrt_().add_(1e-8)
        self.table.index_add_(0, at, rows["m"].mul_(-lr / (1 - 0.9 ** rows["steps"])).div_(size))


class Trainer:
    """The model, its optimizers and one training step; every random number of a step comes from (seed, step)."""
    unit = "tokens"

    def __init__(self, config: Config, data: Data, device: torch.device):
        self.config, self.data, self.device = config, data, device
        self.rank, self.world = join_processes()
        self.dtype = compute_dtype(config.precision, device)
        counts = data.counts()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = BiLM(config, len(data.words))
        self.model.table_bias[:, 0] = torch.from_numpy(np.log(np.maximum(counts, 0.5) / counts.sum()))
        if config.representation == "word2vec":
            self.model.start_from(word2vec(data, config.output, config.word2vec_epochs, config.seed))
        self.model.to(device)
        self.adamw = torch.optim.AdamW(self.model.parameters(), lr=config.lr, betas=(0.9, config.beta2),
                                       weight_decay=config.weight_decay, fused=True)
        self.row_adams = [RowAdam(t, config.beta2) for t in (self.model.table, self.model.table_bias)]
        self.negatives = Negatives(counts, config.negatives, config.sampling_power, config.seed)
        self.log_pi = self.negatives.log_pi.to(device)
        self.place = torch.zeros(len(counts), dtype=torch.long, device=device)      # word id -> row of the step's part
        self.lengths = np.diff(data.encoded.tokens.offsets)[data.train]
        self.targets_per_epoch = 2 * int((self.lengths + 1).sum())
        self.start_epoch(0)
        self.per_epoch = self.interval = len(self.batches)
        self.steps = round(config.epochs * self.per_epoch)

    def start_epoch(self, epoch: int) -> None:
        """New batches, and a new order of the words on the line from which negatives are drawn."""
        generator = np.random.default_rng([self.config.seed, epoch])
        self.epoch, self.batches = epoch, batches(self.lengths, self.config.batch_tokens, generator)
        self.negatives.shuffle(epoch)

    def masks(self, T: int, B: int, generator: torch.Generator) -> list[Tensor | None]:
        """Dropout of x, h_1, h_2, each (2, 1, B, P) and the same at every t; word dropout (2, T, B, 1) joins x's."""
        def mask(p: float, *shape: int) -> Tensor | None:
            if p == 0:
                return None
            kept = torch.empty(shape).bernoulli_(1 - p, generator=generator).div_(1 - p)
            return kept[:, :, self.rank::self.world].to(self.device, self.dtype)
        units = [mask(self.config.dropout, 2, 1, B, self.config.output) for _ in range(3)]
        if (words := mask(self.config.word_dropout, 2, T, B, 1)) is not None:
            units[0] = words if units[0] is None else units[0] * words
        return units

    def step(self, step: int) -> tuple[float, int]:
        """One update; (summed nats, targets) of the batch, both directions and all processes together."""
        if step // self.per_epoch != self.epoch:
            self.start_epoch(step // self.per_epoch)
        x, y = collate(self.data.encoded, self.data.train[self.batches[step % self.per_epoch]])
        targets = int((y != PAD).sum())
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        masks = self.masks(*x.shape[1:], generator)
        sampled = self.negatives.draw(float(torch.rand((), generator=generator, dtype=torch.float64)))
        touched = torch.cat([y.flatten(), sampled] + ([x.flatten()] if self.config.tied else [])).unique()
        at, x, y, sampled = (ids.to(self.device) for ids in (touched, x, y, sampled))
        self.place[at] = torch.arange(len(at), device=self.device)
        rows, bias = (t.index_select(0, at).requires_grad_() for t in (self.model.table, self.model.table_bias))
        x, y = (ids[:, :, self.rank::self.world] for ids in (x, y))     # this process's rows of the batch
        x = self.model.represent(self.place[x] if self.config.tied else x, rows, self.data.encoded.chars)
        h, real = self.model.states(x, self.dtype, masks)[-1], y != PAD
        nats = SampledSoftmax.apply(h[real], rows, bias, self.place[y[real]], self.place[sampled], self.log_pi[sampled])
        (nats / targets).backward()
        moved, nats = [p for p in (*self.model.parameters(), rows, bias) if p.grad is not None], nats.detach()
        sum_over_processes([p.grad for p in moved])
        sum_over_processes([nats])
        norm = float(nn.utils.clip_grad_norm_(moved, self.config.clip))
        if not math.isfinite(norm + float(nats)):
            raise InputError(f"the loss is not finite at step {step}; start anew with a lower --lr and --table-lr")
        share = rate(step, self.steps, self.config.warmup)
        self.adamw.param_groups[0]["lr"] = self.config.lr * share
        self.adamw.step()
        self.adamw.zero_grad()
        for adam, part in zip(self.row_adams, (rows, bias), strict=True):
            adam.update(at, part.grad, self.config.table_lr * share)
        return float(nats), targets

    def identity(self) -> dict:
        """What a resumed run must share with the run that it continues."""
        free = dict.fromkeys(("report_every", "log_every", "save_every", "track"))      # no weight depends on these
        return asdict(self.config) | free | {"training rows": self.data.digest}

    def state(self) -> dict:
        """All that the next step depends on, beside the identity."""
        return {"model": self.model.state_dict(), "adamw": self.adamw.state_dict(),
                "rows": [adam.state for adam in self.row_adams]}

    def load_state(self, state: dict) -> None:
        """The inverse of `state`."""
        self.model.load_state_dict(state["model"])
        self.adamw.load_state_dict(state["adamw"])
        for adam, saved in zip(self.row_adams, state["rows"], strict=True):
            adam.state = {name: value.to(self.device) for name, value in saved.items()}


def train(trainer: Trainer, resume_file: Path | None = None, resume: bool = False, details=None) -> Run:
    """The run, with the weights best on the validation rows; `details(scores)` is what --report-every adds to them."""
    config, data = trainer.config, trainer.data
    def evaluate(loss: float) -> tuple[float, dict]:
        """(mean nats a validation token, the history's entry); without such rows a number that later steps lower."""
        entry = {"train_perplexity": math.exp(loss)}
        if not len(data.validation):
            return -run.step, entry
        wanted = details and config.report_every and run.step % (config.report_every * trainer.per_epoch) == 0
        scores = score_rows(trainer.model, data.encoded, data.validation, trainer.dtype, bool(wanted))
        entry |= {"validation_perplexity": scores.perplexity()} | ({"details": details(scores)} if wanted else {})
        return float(np.log(scores.perplexity()).mean()), entry

    with Run(trainer, resume_file, resume) as run:
        for step in range(run.step, trainer.steps + 1):
            if run.due(step):               # evaluate and keep the best
                run.keep(evaluate)
            if run.stop():                  # complete, or Ctrl-C
                break
            run.count(*trainer.step(step))  # one step, one log line
    return run


# ------------------------------------------------------------------------------------------------------- ELMo
class ELMo:
    """A trained biLM: text in, three layers of vectors or perplexities out.

        elmo = ELMo.load("models/bilstm.pt")
        elmo.embed(["Oil prices fall."])[0]         # (3, 4, D): layer 0 is [x ; x], layers 1 and 2 [forward ; backward]
    """

    def __init__(self, config: Config, words: Vocabulary, model: BiLM, history=(), metrics=None, digest=None):
        self.config, self.words, self.model, self.digest = config, words, model.eval().requires_grad_(False), digest
        self.history, self.metrics = list(history), metrics or {}

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> "ELMo":
        """The biLM of a file that `save` or ELMO.py wrote; InputError when it is missing, damaged or does not fit."""
        content = read_published(path, FORMAT, {"config", "words", "history", "metrics"})
        with fitting(path):
            return cls.restored(content["config"], content["words"], content["weights"], device,
                                content["history"], content["metrics"], content["digest"])

    @classmethod
    def restored(cls, knobs: dict, words: list[str], weights: dict[str, Tensor], device: str, *about) -> "ELMo":
        """The biLM of a file's parts; what torch and Python raise where they do not fit."""
        config, vocabulary = Config(**knobs), Vocabulary(words)
        if words[:len(SPECIAL)] != SPECIAL or len(words) != len(weights["table"]):
            raise ValueError("the vocabulary does not fit the weights")
        with torch.device("meta"):          # no memory is taken for shapes that a file only claims to have
            model = BiLM(config, len(words))
        model.load_state_dict({name: value.float() for name, value in weights.items()}, assign=True)
        return cls(config, vocabulary, model.to(device), *about)

    @classmethod
    def train(cls, texts: Sequence[str], config: Config | None = None, device: str | None = None) -> "ELMo":
        """The script's training on any texts; of 10 and more, a tenth (at most `validation`) chooses the epoch."""
        texts, config = check_texts(texts), config or Config()
        if not texts:
            raise InputError("there is no text to train on; expected a list of strings")
        kept = min(config.validation, len(texts) // 10)
        parts = split(len(texts), kept, config.seed) if kept else (np.arange(len(texts)), np.arange(0))
        trainer = Trainer(config, Data.of(texts, config, *parts), torch.device(device or default_device()))
        return cls.rounded(trainer, train(trainer))

    @classmethod
    def rounded(cls, trainer: Trainer, run: Run) -> "ELMo":
        """The model with its weights in half precision, as the file will hold them: the one that is measured."""
        best = run.best or trainer.model.state_dict()
        trainer.model.load_state_dict({name: value.half().float() for name, value in best.items()})
        return cls(trainer.config, trainer.data.words, trainer.model, run.history)

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

    def embed_stream(self, texts: Iterable[str], precision: str = "fp32", window: int = 512) -> Iterator[Tensor]:
        """The same one by one, in input order, from any iterable; memory holds `window` texts at a time.

        precision: "fp32"; "bf16" is faster where the hardware multiplies it, and is computed in fp32 elsewhere.
        """
        if precision not in ("fp32", "bf16") or isinstance(texts, str):
            raise InputError(f"precision {precision!r} of {type(texts).__name__}; expected fp32 or bf16 of a list")
        fast = precision == "bf16" and fast_bf16(self.model.table.device)
        return self._stream(iter(texts), torch.bfloat16 if fast else torch.float32, window)

    def _stream(self, texts: Iterator[str], dtype: torch.dtype, window: int) -> Iterator[Tensor]:
        while chunk := list(islice(texts, window)):
            encoded = self.encode(chunk)
            out, n = [None] * len(chunk), np.diff(encoded.tokens.offsets)
            def _embed(rows: np.ndarray, encoded=encoded, out=out, n=n) -> None:
                x = collate(encoded, rows)[0].to(self.model.table.device)
                with torch.inference_mode():
                    h = self.model.states(self.model.represent(x, chars=encoded.chars), dtype)
                    h = torch.stack(h).permute(1, 3, 0, 2, 4).float().cpu()                     # (2, B, 3, T, P)
                for b, row in enumerate(rows):
                    forward, backward = h[:, b, :, 1:n[row] + 1]                                # (3, n, P)
                    out[row] = torch.cat([forward, backward.flip(1)], dim=-1)                   # (3, n, D)
            on_each_core(_embed, batches(n, 1500 if self.model.table.is_cpu else 6000), self.model.table.device)
            yield from out

    def score(self, texts: Sequence[str]) -> dict:
        """{"forward": {"nats", "tokens", "perplexity"}, "backward": ..} of all texts, end symbols in, full softmax."""
        encoded = self.encode(texts)
        scores = score_rows(self.model, encoded, np.arange(len(encoded.tokens)))
        return {name: {"nats": float(scores.nats[d].sum()), "tokens": int(scores.tokens.sum()),
                       "perplexity": scores.perplexity()[d]} for d, name in enumerate(("forward", "backward"))}


# ------------------------------------------------------------------------------------------------------- main
def pretrain(config: Config, options) -> int:
    """The run of the command: AG News or plain text to bilstm.pt, pretraining.json and PNGs; the exit status."""
    from report import pretraining
    begin, out, corpus = time.perf_counter(), options.out, options.corpus
    data = Data.of_ag_news(config, CACHE) if corpus is None else Data.of_plain_text(corpus, config, CACHE)
    trainer = Trainer(config, data, torch.device(default_device()))
    pretraining.describe(trainer)
    run = train(trainer, out / "bilstm.resume.pt", options.resume, pretraining.summary)
    elmo = ELMo.rounded(trainer, run)
    if trainer.rank == 0 and run.finished:
        pretraining.publish(elmo, trainer, score_rows, out, time.perf_counter() - begin + run.earlier)
        run.file.unlink(missing_ok=True)
    elif trainer.rank == 0 and run.best:
        elmo.save(out / "bilstm.pt")
    return 0 if run.finished else 130


@script("ELMO.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 2 for an input that the user can mend, 130 after Ctrl-C."""
    config, options = script_arguments(argv, Config, "ELMO.py", __doc__, HERE / "models", {
        "--corpus": {"metavar": "PATH", "help": "train on the lines of this file, or of a folder's .txt and .gz"},
        "--embed": {"metavar": "FILE", "help": "write the vectors of this file's lines instead of training"},
        "--npz": {"metavar": "FILE", "help": "where --embed writes them"},
        "--float32": {"action": "store_true", "help": "--embed: full precision in the file"}})
    if options.embed is None and options.npz is None:
        return pretrain(config, options)
    load = partial(ELMo.load, options.out / "bilstm.pt", default_device())
    return write_npz(load, options.embed, options.npz, config.precision, options.float32)


if __name__ == "__main__":
    sys.exit(main())
