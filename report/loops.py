"""What report/bench.py measures ELMO.py against: two other training loops, and a step's matrix products alone.

`common_loop` is how public copies of the assignment train; `plain_loop` is what a careful user of torch.nn would write:
the same model as ELMo's (P, layers, skip, dropout, tied table), batches by length, fused AdamW, and the full softmax;
`products` is the least that a step of ELMO.py could take on a machine, whatever is done around its products.
"""
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ELMO
from data.files import InputError
from data.text import PAD, UNK, Data, Vocabulary, batches

COMMON_WORDS, COMMON_WIDTH, COMMON_BATCH = 14_000, 300, 16


class CommonLM(nn.Module):
    """Logits (B, T, 14,000) of one direction as public copies make them: two LSTM layers of 300, an untied softmax."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(COMMON_WORDS, COMMON_WIDTH)
        self.lstm = nn.LSTM(COMMON_WIDTH, COMMON_WIDTH, 2, batch_first=True)
        self.softmax = nn.Linear(COMMON_WIDTH, COMMON_WORDS)

    def forward(self, x: Tensor) -> Tensor:             # (B, T) -> (B, T, 14,000)
        return self.softmax(self.lstm(self.embedding(x))[0])


class CommonLoop:
    """The loop of public copies: fp32, dense Adam, 16 rows a batch in random order, both directions on every batch.

    Each direction is a model of its own. Batches are padded to `positions`, at least to their longest row; words
    beyond 14,000 are <unk>.
    """

    def __init__(self, data: Data, positions: int, seed: int, device: torch.device):
        torch.manual_seed(seed)
        self.data, self.positions, self.device = data, positions, device
        self.generator = np.random.default_rng([seed, 5])
        self.models = [CommonLM().to(device) for _ in range(2)]
        self.adams = [torch.optim.Adam(model.parameters()) for model in self.models]
        self.rows = self.epochs()

    def epochs(self) -> Iterator[np.ndarray]:
        while True:
            order = self.generator.permutation(self.data.train)
            yield from (order[a:a + COMMON_BATCH] for a in range(0, len(order), COMMON_BATCH))

    def nats(self, rows: np.ndarray, d: int) -> Tensor:
        """Mean nats of a batch's targets in direction d."""
        batch = ELMO.collate(self.data.encoded, rows)                               # x and y (2, T, 16)
        pad = (0, max(0, self.positions - batch[0].shape[1]))
        x, y = (F.pad(torch.where(ids[d] < COMMON_WORDS, ids[d], UNK).t(), pad).to(self.device) for ids in batch)
        return F.cross_entropy(self.models[d](x).flatten(0, 1), y.flatten(), ignore_index=PAD)

    def __call__(self) -> int:
        """One step; its targets."""
        rows = next(self.rows)
        for d, adam in enumerate(self.adams):
            adam.zero_grad()
            self.nats(rows, d).backward()
            adam.step()
        return 2 * targets(self.data, rows)


class PlainLM(nn.Module):
    """ELMo's biLM of torch.nn's parts: h_2 (T, B, P) of either direction, and one table for words in and out."""

    def __init__(self, config: ELMO.Config, size: int):
        super().__init__()
        self.config, P = config, config.output
        self.table = nn.Embedding(size, P)
        self.bias = nn.Parameter(torch.zeros(size))
        nn.init.normal_(self.table.weight, std=ELMO.BiLM.STD)       # and PlainLoop starts the bias as ELMO.py does
        more = {"proj_size": P} if config.hidden > P else {}
        self.layers = nn.ModuleList(nn.LSTM(P, config.hidden, **more) for _ in range(4))

    def forward(self, x: Tensor, d: int) -> Tensor:     # (T, B) -> (T, B, P)
        def drop(h: Tensor) -> Tensor:
            return h * F.dropout(torch.ones_like(h[:1]), self.config.dropout, self.training)
        x = drop(self.table(x))
        first = drop(self.layers[d](x)[0])
        second = drop(self.layers[2 + d](first)[0])
        return first + second if self.config.skip else second


class PlainLoop:
    """A loop without anything of ELMO.py's: autocast for bf16, batches of about equal length, full softmax.

    lr is ELMO.py's own, held constant. Validation perplexity after three quarters of a pass over a tenth of the rows,
    in bf16, was 673 with 1e-3, 430 with 3e-3, 346 with 6e-3 and 338 with 1.2e-2, which was slower at first.
    """

    def __init__(self, config: ELMO.Config, data: Data, dtype: torch.dtype, device: torch.device, lr: float = 8e-3):
        torch.manual_seed(config.seed)
        self.config, self.data, self.dtype, self.device = config, data, dtype, device
        self.model, counts = PlainLM(config, len(data.words)).to(device), data.counts()
        self.model.bias.data.copy_(torch.from_numpy(np.log(np.maximum(counts, 0.5) / counts.sum())))
        self.adamw = torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=0.0, fused=True)
        self.lengths, self.rows = np.diff(data.encoded.tokens.offsets)[data.train], self.epochs()

    def epochs(self) -> Iterator[np.ndarray]:
        generator = np.random.default_rng([self.config.seed, 6])
        while True:
            for part in batches(self.lengths, self.config.batch_tokens, generator):
                yield self.data.train[part]

    def nats(self, rows: np.ndarray, d: int) -> Tensor:
        """Mean nats of a batch's targets in direction d."""
        x, y = (ids[d].to(self.device) for ids in ELMO.collate(self.data.encoded, rows))
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            h, real = self.model(x, d), y != PAD
            z = F.linear(h[real], self.model.table.weight, self.model.bias)
        return F.cross_entropy(z.float(), y[real])

    def __call__(self) -> int:
        """One step; its targets."""
        rows = next(self.rows)
        self.adamw.zero_grad()
        for d in range(2):
            (self.nats(rows, d) / 2).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.adamw.step()
        return 2 * targets(self.data, rows)


def targets(data: Data, rows: np.ndarray) -> int:
    """Words that one direction predicts in some rows, end symbols in."""
    return int((np.diff(data.encoded.tokens.offsets)[rows] + 1).sum())


@torch.no_grad()
def perplexity(loop: CommonLoop | PlainLoop, rows: np.ndarray) -> float:
    """Of both directions together on some rows, in the loop's own vocabulary."""
    models = loop.models if isinstance(loop, CommonLoop) else [loop.model]
    nats, count = 0.0, 0
    for model in models:
        model.eval()
    for part in batches(np.diff(loop.data.encoded.tokens.offsets)[rows], 2000):
        n = targets(loop.data, rows[part])
        nats, count = nats + n * sum(float(loop.nats(rows[part], d)) for d in range(2)), count + 2 * n
    for model in models:
        model.train()
    return float(np.exp(nats / count))


def products(trainer: ELMO.Trainer, step: int) -> Callable[[], None]:
    """A call that makes the matrix products of one step of ELMO.py, in its order and shapes, and nothing else."""
    config, data, device = trainer.config, trainer.data, trainer.device
    rows = data.train[trainer.batches[step % trainer.per_epoch]]
    N, B, P, H = 2 * targets(data, rows), len(rows), config.output, config.hidden
    T, E = int(np.diff(data.encoded.tokens.offsets)[rows].max()) + 1, trainer.negatives.draws
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(trainer.dtype)
    x, both, gates, h = random(2, T * B, P), random(2, T * B, 2 * P), random(2, T, B, 4 * H), random(2, B, P)
    w_x, w_p, cell, all_cells = random(2, 4 * H, P), random(2, P, H), random(2, B, H), random(2, T * B, H)
    weight, states, z = random(E, P), random(N, P), random(N, E)
    block = max(16, ELMO.SampledSoftmax.LOGITS // E)
    def call() -> None:
        for _ in range(2):                                                          # layers, forward
            torch.bmm(x, w_x.transpose(1, 2))
            for t in range(T):
                if t:
                    gates[:, t].baddbmm_(h, w_x.transpose(1, 2))
                if H > P:
                    torch.bmm(cell, w_p.transpose(1, 2))
        for a in range(0, N, block):                                                # softmax, all in one pass
            part = states[a:a + block]
            torch.mm(part, weight.t())
            torch.mm(z[a:a + block], weight)
            torch.mm(z[a:a + block].t(), part)
        for _ in range(2):                                                          # layers, backward
            for t in range(T):
                if t:
                    torch.bmm(gates[:, t], w_x)
                if H > P:
                    torch.bmm(h, w_p)
            flat = gates.flatten(1, 2)
            torch.bmm(flat.transpose(1, 2), both)
            torch.bmm(flat, w_x)
            if H > P:
                torch.bmm(x.transpose(1, 2), all_cells)
        gates.zero_()                                                               # or its sums overflow in the end
    return call


class Resized(Data):
    """Data under another vocabulary; words that no row holds count once, so that they are sampled as negatives."""

    def counts(self) -> np.ndarray:
        return np.maximum(super().counts(), 1)


def resize(data: Data, size: int) -> Resized:
    """The same rows under a vocabulary of `size` words: further ones that no row holds, or the rarest as <unk>."""
    if size < 5:
        raise InputError(f"a vocabulary of {size} words has none; expected 5 or more")
    words = data.words.words[:size] + [f"extra{i}" for i in range(size - len(data.words))]
    encoded = ELMO.Encoded(data.encoded.tokens, np.where(data.encoded.lookup < size, data.encoded.lookup, UNK))
    return Resized(Vocabulary(words), encoded, data.train, data.validation)
