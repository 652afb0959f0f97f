"""ELMo's layers at work (Peters et al. 2018, section 3.2): a classifier over a frozen biLM, in three layer mixes.

    biLM states h_{k,0}, h_{k,1}, h_{k,2} of word k      (J, 2, T, B, D), from models/bilstm.pt
    ELMo_k = gamma sum_j s_j h_{k,j},  s = softmax(w)    `trainable`: w and gamma learn; `frozen`: w is drawn, gamma 1
    ELMo_k = f(h_{k,0}, h_{k,1}, h_{k,2})                `function`: a small network
    biLSTM over ELMo_1 .. ELMo_n -> maximum and mean over the words -> linear -> classes

The biLM runs once per batch for all settings and seeds, whose heads train side by side. B rows of a batch, T words of
the longest, J layers, D their width, S seeds, I width of the mix, H cells of a head's LSTM, C classes.

    python classification.py                    AG News in three settings: models/classifier.pt, classification.json
    python classification.py --finetune         the biLM learns too: models/finetuned.pt; --ngrams adds a linear model
    python classification.py --task sst5        or sst2, nli; --adapt 2 trains the biLM on the task's text first
    python classification.py --predict "text"   label and probabilities; --predict - takes the lines of standard input
"""
import copy
import hashlib
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch import Tensor, nn

import ELMO
from data.files import InputError, fitting, print_predictions, read_published, write_published
from data.knobs import check_knobs, knob, script, script_arguments
from data.machine import compute_dtype, default_device, on_each_core
from data.ngrams import Ngrams
from data.prepare import CACHE, Part, Task, check_rows, read_task, split, static_vectors
from data.progress import Run, rate
from data.text import Data, Encoded, Texts, Vocabulary, batches, tokenized
from ELMO import ELMo, Layer, RowAdam, collate

HERE = Path(__file__).resolve().parent
FORMAT = "elmo-classifier-1"
SETTINGS = ("trainable", "frozen", "function")


# ------------------------------------------------------------------------------------------------------ knobs
@dataclass(frozen=True)
class Config:
    """Every knob of classification; the published table is the defaults with --seeds 3. InputError out of range."""
    task: str = knob("ag_news", "what to classify", ("ag_news", "sst2", "sst5", "nli"))
    setting: str = knob("all", "how the layers are mixed", ("all", *SETTINGS))
    vectors: str = knob("elmo", "what a word is to the head: the biLM's layers, or a baseline",
                        ("elmo", "layer0", "layer2", "average", "untrained", "word2vec", "svd"))
    fields: str = knob("description", "columns of AG News that are read", ("description", "title+description"))
    seeds: int = knob(1, "heads per setting, of the seeds from `seed` on", least=1, most=100)
    finetune: bool = knob(False, "the biLM learns too, each seed its own copy")
    ngrams: bool = knob(False, "also a linear model of words and word pairs, its share chosen on validation rows")
    ensemble: bool = knob(False, "also save all seeds' classifiers as one, whose probabilities are their mean")
    adapt: float = knob(0.0, "passes of the biLM over the task's text first, its vocabulary grown by it", most=1000)
    adapt_lr: float = knob(2e-3, "highest learning rate of that, of the LSTMs and the table", most=10)
    phrases: bool = knob(True, "sst: train on every phrase of a tree, not on whole sentences alone")
    hidden: int = knob(128, "H: cells of the head's LSTM, per direction", least=1, most=8192)
    dropout: float = knob(0.2, "share of units left out of the mix and of the pooled text", most=0.95)
    smoothing: float = knob(0.05, "label smoothing: share of the target spread over all classes", most=0.99)
    rows: int = knob(0, "labelled training rows, drawn by the seed; 0 takes all")
    validation: int = knob(2000, "nli: training rows kept apart; ag_news keeps apart those of the biLM")
    epochs: float = knob(2.0, "passes over the training rows", most=100_000)
    batch_tokens: int = knob(3000, "positions (rows x T) of a batch", least=1)
    lr: float = knob(4e-3, "highest learning rate of the head (AdamW)", most=10)
    mix_lr: float = knob(2e-2, "highest learning rate of w and gamma", most=10)
    bilm_lr: float = knob(4e-3, "finetune: that of the biLM's top layer; each layer below has 1 / 2.6 of it", most=10)
    bilm_dropout: float = knob(0.1, "finetune: share of units left out of x, h_1 and h_2", most=0.95)
    unfreeze: float = knob(0.05, "finetune: share of the steps between unfreezing layer 2, 1 and 0", most=0.5)
    warmup: float = knob(0.03, "share of the steps in which the rate rises; then it falls as a cosine", most=1)
    weight_decay: float = knob(0.01, "AdamW's, of the head", most=10)
    ema: float = knob(0.99, "decay, every 10 steps, of the average of the weights that is evaluated", most=0.99999)
    clip: float = knob(1.0, "largest gradient norm of a head, and of the biLM", least=1e-9)
    precision: str = knob("auto", "of matrix products; auto: bf16 where it is fast", ("auto", "fp32", "bf16"))
    seed: int = knob(0, "of weights, batches and dropout", most=2**31)
    evaluations: int = knob(2, "evaluations on the validation rows per pass", least=1)
    log_every: int = knob(100, "steps between log lines", least=1)
    save_every: float = knob(300.0, "seconds between resume states")
    track: str = knob("none", "curves to a tracker too, in --out", ("none", "tensorboard", "wandb"))

    def __post_init__(self):
        check_knobs(self)
        if self.finetune and self.vectors not in ("elmo", "untrained"):
            raise InputError(f"finetune moves a biLM; vectors {self.vectors} has none")
        if (self.ensemble or self.adapt) and self.vectors != "elmo":
            raise InputError(f"ensemble and adapt are for the vectors elmo, not {self.vectors}")
        if "title" in self.fields and self.task != "ag_news":
            raise InputError(f"fields is {self.fields}, but the rows of {self.task} have no titles")

    @property
    def settings(self) -> tuple[str, ...]:
        """What is trained: without several layers there is nothing to mix; a fine-tuned biLM has one mix by default."""
        if self.setting != "all":
            return (self.setting,)
        return SETTINGS if self.vectors == "elmo" and not self.finetune else ("trainable",)

    @property
    def pair(self) -> bool:
        """Whether a row is two texts that are read apart."""
        return self.task == "nli"

    @property
    def two_texts(self) -> bool:
        """Whether `predict` takes pairs."""
        return self.pair or "title" in self.fields

    @property
    def stem(self) -> str:
        """First word of the names of the run's files; "" for the bare command's."""
        names = [self.task if self.task != "ag_news" else "titled" if "title" in self.fields else "",
                 self.vectors if self.vectors != "elmo" else "",
                 "adapted" if self.adapt and self.task == "ag_news" else "",
                 "finetuned" if self.finetune and "title" not in self.fields else ""]
        return "_".join(filter(None, names))


# -------------------------------------------------------------------------------------------------- layer mix
class Linears(nn.Module):
    """S linear maps side by side: (S, N, in) -> (S, N, out)."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, out, width).uniform_(-1, 1) / math.sqrt(width))
        self.bias = nn.Parameter(torch.zeros(1, 1, out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias.to(x.dtype), x, self.weight.to(x.dtype).transpose(1, 2))


class ScalarMix(nn.Module):
    """ELMo_k = gamma sum_j s_j h_{k,j} with s = softmax(w), equation 1 of the paper; S seeds at once.

    s_j is what the assignment calls lambda. `frozen`: w is drawn from a normal distribution and never moves, gamma 1.
    """

    def __init__(self, J: int, frozen: bool):
        super().__init__()
        w = torch.randn(1, J).half().float() if frozen else torch.zeros(1, J)       # as the file will hold it
        self.w = nn.Parameter(w, requires_grad=not frozen)
        self.gamma = nn.Parameter(torch.ones(1, 1), requires_grad=not frozen)

    def s(self) -> Tensor:
        """(S, J) layer weights, each row of sum 1."""
        return self.w.softmax(dim=1)

    def forward(self, h: Tensor) -> Tensor:             # (J, 2, T, B, D) -> (S, 2, T, B, D)
        weights = (self.gamma * self.s()).to(h.dtype)   # (S, J)
        return (weights @ h.flatten(1)).unflatten(1, h.shape[1:])


class LayerFunction(nn.Module):
    """f(h_0, h_1, h_2) = relu(W [h_0; h_1; h_2] + b), learned: each unit of the mix weighs the layers its own way."""

    def __init__(self, J: int, D: int, width: int):
        super().__init__()
        self.map = Linears(J * D, width)

    def forward(self, h: Tensor) -> Tensor:             # (J, 2, T, B, D) -> (S, 2, T, B, I)
        flat = h.permute(1, 2, 3, 0, 4).flatten(3).flatten(0, 2)          # (2 T B, J D), one for all seeds
        out = F.linear(flat, self.map.weight.to(h.dtype).flatten(0, 1), self.map.bias.to(h.dtype).flatten()).relu()
        return out.unflatten(1, self.map.weight.shape[:2]).transpose(0, 1).unflatten(1, h.shape[1:4])


# ------------------------------------------------------------------------------------------------- classifier
class Head(nn.Module):
    """Layer mix -> biLSTM -> pooled text (or pair of texts) -> classes, for S seeds side by side.

    Every parameter's first dimension is S or 2 S (both directions), so that one batched product serves all seeds, none
    of which touches another's numbers. A pair's sides meet in soft alignments before they are pooled (Parikh et al.
    2016; Chen et al. 2017), then as [u; v; |u - v|; u * v] (Conneau et al. 2017).
    """

    def __init__(self, config: Config, setting: str, J: int, D: int, classes: int):
        super().__init__()
        self.config, self.pair, H = config, config.pair, config.hidden
        width = 2 * H if setting == "function" else D
        self.mix = LayerFunction(J, D, width) if setting == "function" else ScalarMix(J, setting == "frozen")
        self.lstm = Layer(width, H, H)
        if self.pair:
            self.compare = Linears(4 * H, H)
            self.match = Linears(4 * 6 * H, 2 * H)
        self.attend = Linears(H, 1)
        self.out = Linears(2 * H if self.pair else 6 * H, classes)

    @classmethod
    def of_seeds(cls, seeds: Sequence[int], *shape) -> "Head":
        """The heads of these seeds, each with the weights that it has alone."""
        heads = []
        for seed in seeds:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                heads.append(cls(*shape))
        for parts in zip(*(head.parameters() for head in heads), strict=True):
            parts[0].data = torch.cat([part.data for part in parts])
        return heads[0]

    S = property(lambda self: len(self.out.weight))     # seeds

    def forward(self, h: Tensor, n: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(S, N, C) logits of layer states h (J, 2, T, B, D) of rows with n (B,) words; N = B, of pairs B / 2.

        With a generator, units of the mix (the same at every word) and of the text are dropped.
        """
        x = self.mix(h)                                                         # (S, 2, T, B, I)
        x = dropout(x, (self.S, 1, 1, *x.shape[3:]), self.config.dropout, generator)
        h = self.lstm(x.flatten(0, 1)).transpose(1, 2)                          # (2 S, B, T, H)
        inside = torch.arange(h.shape[2], device=h.device) < n[:, None]         # (B, T)
        text = self.pool(h, inside) if not self.pair else self.pool_pair(h, inside)
        return self.out(dropout(text, text.shape, self.config.dropout, generator)).float()

    def pool_pair(self, h: Tensor, inside: Tensor) -> Tensor:
        """(S, N, 2H) of a pair's sides, the first and the second half of the rows, each seen in the other's light."""
        (a, b), (at_a, at_b) = h.chunk(2, dim=1), inside.chunk(2)               # (2 S, N, T, H), (N, T)
        match = a @ b.transpose(2, 3) / math.sqrt(a.shape[-1])                  # (2 S, N, T, T)
        sides = []
        for own, other, scores, mine, theirs in ((a, b, match, at_a, at_b), (b, a, match.transpose(2, 3), at_b, at_a)):
            scores = scores.float().masked_fill(~theirs[:, None], -1e9).softmax(dim=-1)
            found = scores.masked_fill(~theirs[:, None], 0).to(own.dtype) @ other   # nothing of a side without words
            both = torch.cat([own, found, (own - found).abs(), own * found], dim=-1)        # (2 S, N, T, 4H)
            both = both.unflatten(0, (self.S, 2))
            compared = self.compare(both.flatten(1, 3)).relu().view_as(both[..., :own.shape[-1]])
            sides.append(self.pool(compared.flatten(0, 1), mine))
        u, v = sides
        return self.match(torch.cat([u, v, (u - v).abs(), u * v], dim=-1)).relu()

    def pool(self, h: Tensor, inside: Tensor) -> Tensor:
        """(S, B, 6H): maximum, attention-weighted sum and mean of a row's words, both directions; 0 without words."""
        outside, count = (~inside)[..., None], inside.sum(dim=1, keepdim=True)              # (B, T, 1), (B, 1)
        scores = self.attend(h.unflatten(0, (self.S, 2)).flatten(1, 3)).view(h.shape[:3])   # (2 S, B, T)
        share = scores.float().masked_fill(~inside, -1e9).softmax(dim=2).to(h.dtype)
        parts = [h.masked_fill(outside, -torch.inf).amax(dim=2), (h * share[..., None]).sum(dim=2),
                 h.masked_fill(outside, 0).sum(dim=2) / count.clamp(min=1)]                 # (2 S, B, H) each
        text = torch.cat(parts, dim=-1).masked_fill(count == 0, 0)
        return text.unflatten(0, (self.S, 2)).transpose(1, 2).flatten(2)

    def clip(self, most: float) -> None:
        """Scales each seed's gradient to a norm of at most `most`."""
        grads = [p.grad.unflatten(0, (self.S, -1)).flatten(1) for p in self.parameters() if p.grad is not None]
        norm = sum(grad.square().sum(dim=1) for grad in grads).sqrt()                       # (S,)
        for grad in grads:
            grad.mul_((most / norm.clamp(min=1e-12)).clamp(max=1)[:, None])

    def alone(self, s: int) -> "Head":
        """A copy of one seed's head."""
        head, S = copy.deepcopy(self), self.S
        for parameter in head.parameters():
            parameter.data = parameter.data.chunk(S)[s].clone()
        return head


def dropout(x: Tensor, shape: tuple[int, ...], p: float, generator: torch.Generator | None) -> Tensor:
    """x with a share p left out, the same along the dimensions where `shape` is 1; x itself without a generator."""
    if generator is None or p == 0:
        return x
    return x * torch.empty(shape, dtype=x.dtype).bernoulli_(1 - p, generator=generator).div_(1 - p).to(x.device)


# ---------------------------------------------------------------------------------------------------- vectors
def both_orders(h: Tensor, n: Tensor) -> Tensor:
    """(J, 2, T, B, 2P) for the head's two directions from the biLM's streams h (J, 2, T, B, P), n words in each row.

    Stream 1 is the backward model's, whose time runs from the row's end: in reading order its states are turned
    round, for the head's backward direction the forward model's are.
    """
    t = torch.arange(h.shape[2], device=h.device)[:, None]                      # (T, 1)
    turned = torch.where(t < n, n - 1 - t, t)[None, :, :, None].expand(len(h), -1, -1, h.shape[-1])
    forward, backward = h[:, 0], h[:, 1]
    return torch.stack([torch.cat([forward, backward.gather(1, turned)], dim=-1),
                        torch.cat([forward.gather(1, turned), backward], dim=-1)], dim=1)


class Vectors:
    """What a head reads of a word, by --vectors: states of a biLM's layers, or rows of a table."""

    def __init__(self, kind: str, model: ELMO.BiLM, table: Tensor | None = None):
        self.kind, self.model, self.table = kind, model, table
        self.J = 3 if kind in ("elmo", "untrained") else 1
        self.D = table.shape[1] if table is not None else model.config.output * (1 if kind == "layer0" else 2)

    def __call__(self, texts: Texts, rows: np.ndarray, dtype: torch.dtype, masks=(None,) * 3,
                 represent=None) -> tuple[Tensor, Tensor]:
        """Layer states (J, 2, T, B, D) and words (B,) of some rows; `represent` gives x of the ids where x learns."""
        rows = np.concatenate([rows, rows + len(texts.lengths)]) if texts.pair else rows
        encoded = texts.encoded if self.table is None else replace(texts.encoded, chars=None)   # a table is by word
        x, _ = collate(encoded, rows)
        n, device = torch.from_numpy(texts.words[rows]).to(self.model.table.device), self.model.table.device
        first = min(1, len(x[0]) - 1)           # <s> is left out; a batch without any word keeps it, masked
        if self.table is not None:
            return F.embedding(x[:, first:].to(device), self.table)[None].to(dtype), n
        x = represent(x) if represent else self.model.represent(x.to(device), chars=texts.encoded.chars)
        if self.kind == "layer0":
            return x[None, :, first:].to(dtype), n
        h = both_orders(torch.stack(self.model.states(x, dtype, masks))[:, :, first:], n)
        return h[2:] if self.kind == "layer2" else h.mean(dim=0, keepdim=True) if self.kind == "average" else h, n


# ---------------------------------------------------------------------------------------------------- metrics
def metrics(p: np.ndarray, gold: np.ndarray, labels: Sequence[str]) -> dict:
    """Accuracy, macro and per-class precision, recall and F1, and more, of probabilities p (N, C).

    confusion: counts, rows gold, columns predicted; nats: mean cross-entropy; calibration_error: mean difference of
    confidence and accuracy over 15 equal bins (Guo et al. 2017). A class that is never predicted has precision 0.
    """
    found, every = p.argmax(axis=1), np.arange(len(labels))
    parts = np.array(precision_recall_fscore_support(gold, found, labels=every, zero_division=0))       # (4, C)
    confidence, hit = p.max(axis=1), found == gold
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = np.bincount(bins, weights=confidence - hit, minlength=15)
    nats = -np.log(np.maximum(p[np.arange(len(gold)), gold], 1e-12))
    return {"rows": len(gold), "accuracy": float(hit.mean()), "nats": float(nats.mean()),
            "calibration_error": float(np.abs(gaps).sum() / len(gold)),
            **{f"macro_{name}": float(parts[i].mean()) for i, name in enumerate(("precision", "recall", "f1"))},
            "classes": {label: dict(zip(("precision", "recall", "f1", "rows"), parts[:, c].tolist(), strict=True))
                        for c, label in enumerate(labels)},
            "confusion": confusion_matrix(gold, found, labels=every).tolist()}


# --------------------------------------------------------------------------------------------------- training
class Trainer:
    """Heads of all settings and seeds on one biLM, their optimizers and one step for `data.progress.Run`.

    What is evaluated and kept is a moving average of the weights. Every random number comes from (seed, step).
    """
    unit, rank, head = "rows", 0, Head

    def __init__(self, config: Config, vectors: Vectors, parts: dict[str, Texts], classes: int, seeds: Sequence[int],
                 digest: str = ""):
        self.config, self.vectors, self.parts, self.seeds = config, vectors, parts, list(seeds)
        self.digest = digest        # of the biLM, for `identity`
        self.device = vectors.model.table.device
        self.dtype = compute_dtype(config.precision, self.device)
        self.live = nn.ModuleDict({setting: self.head.of_seeds(
            self.seeds, config, setting, vectors.J, vectors.D, classes) for setting in config.settings})
        groups = [{"params": [p for head in self.live.values() for name, p in head.named_parameters()
                              if (name in ("mix.w", "mix.gamma")) == scalars and p.requires_grad],
                   "highest": lr, "weight_decay": decay, "from": 0.0}
                  for scalars, lr, decay in ((False, config.lr, config.weight_decay), (True, config.mix_lr, 0.0))]
        self.row_adam, self.averages = None, 0
        if config.finetune:
            self.vectors = vectors = copy.copy(vectors)
            self.live["bilm"] = vectors.model = copy.deepcopy(vectors.model)
            groups += self.unfrozen(vectors.model)
        self.live.to(self.device)
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.99), fused=True)
        self.model = copy.deepcopy(self.live)       # the moving average
        self.start_epoch(0)
        self.per_epoch = len(self.batches)
        self.steps = max(1, round(config.epochs * self.per_epoch))
        self.interval = -(-self.per_epoch // config.evaluations)

    def unfrozen(self, model: ELMO.BiLM) -> list[dict]:
        """Optimizer groups of a biLM that learns: lower layers slower and later (Howard and Ruder 2018)."""
        model.requires_grad_()
        if model.config.tied:
            self.row_adam = RowAdam(model.table, 0.99)
        parts = [list(layer.parameters()) for layer in reversed(model.layers)]
        parts.append(list(model.characters.parameters()) if hasattr(model, "characters") else [])
        return [{"params": part, "highest": self.config.bilm_lr / 2.6 ** depth, "weight_decay": 0.0,
                 "from": self.config.unfreeze * (depth + 1)} for depth, part in enumerate(parts)]

    def start_epoch(self, epoch: int) -> None:
        """New batches of rows of about equal length."""
        generator = np.random.default_rng([self.seeds[0], epoch])
        positions = self.config.batch_tokens // (1 + self.config.pair)
        self.epoch, self.batches = epoch, batches(self.parts["train"].lengths, positions, generator)

    def step(self, step: int) -> tuple[float, int]:
        """One update; (cross-entropy summed over the rows, mean over heads; rows) of the batch."""
        if step // self.per_epoch != self.epoch:
            self.start_epoch(step // self.per_epoch)
        rows = self.batches[step % self.per_epoch]
        generator = torch.Generator().manual_seed((self.seeds[0] + 1) * 1_000_003 + step)
        gold, table = self.parts["train"].labels[rows].to(self.device), []
        masks = [None] * 3
        if self.config.finetune and self.config.bilm_dropout:
            one = torch.ones((), dtype=self.dtype, device=self.device)
            shape = (2, 1, len(rows) * (1 + self.config.pair), self.vectors.model.config.output)
            masks = [dropout(one, shape, self.config.bilm_dropout, generator) for _ in range(3)]
        with torch.set_grad_enabled(self.config.finetune):
            h, n = self.vectors(self.parts["train"], rows, self.dtype, masks, lambda x: self.represent(x, table))
        logits = torch.cat([self.live[setting](h, n, generator) for setting in self.config.settings])  # (heads, N, C)
        total = F.cross_entropy(logits.flatten(0, 1), gold.repeat(len(logits)), reduction="sum",
                                label_smoothing=self.config.smoothing)
        (total / len(rows)).backward()
        loss = float(total.detach()) / len(logits)
        if not math.isfinite(loss):
            raise InputError(f"the loss is not finite at step {step}; start anew with a lower --lr")
        self.update(step, table)
        return loss, len(rows)

    def represent(self, x: Tensor, table: list) -> Tensor:
        """x of the ids; where the biLM's table learns, of a copy of the rows that the batch holds, kept in `table`."""
        model = self.vectors.model
        if self.row_adam is None:
            return model.represent(x.to(self.device), chars=self.parts["train"].encoded.chars)
        at, where = torch.unique(x.to(self.device), return_inverse=True)
        table.extend([at, model.table[at].requires_grad_()])
        return F.embedding(where, table[1])

    def update(self, step: int, table: list) -> None:
        """Clips, moves the weights, and every 10 steps their average."""
        done, share = step / self.steps, rate(step, self.steps, self.config.warmup)
        for setting in self.config.settings:
            self.live[setting].clip(self.config.clip)
        if self.config.finetune:
            nn.utils.clip_grad_norm_([*self.vectors.model.parameters(), *table[1:]], self.config.clip)
        for group in self.adamw.param_groups:
            group["lr"] = group["highest"] * share * (done >= group["from"])
        self.adamw.step()
        self.adamw.zero_grad()
        if table and done >= self.config.unfreeze * 3:
            self.row_adam.update(table[0], table[1].grad, self.config.bilm_lr / 2.6 ** 2 * share)
        if step % 10 == 9 or step + 1 == self.steps:
            decay = min(self.config.ema, self.averages / (self.averages + 9))
            self.averages += 1
            for average, value in zip(self.model.state_dict().values(), self.live.state_dict().values(), strict=True):
                average.lerp_(value, 1 - decay)

    def identity(self) -> dict:
        """What a resumed run must share with the run that it continues."""
        found = hashlib.sha256()
        for part in self.parts.values():
            tokens = part.encoded.tokens
            for array in (part.labels.numpy(), tokens.ids, tokens.offsets, part.encoded.lookup):
                found.update(np.ascontiguousarray(array).data)
        free = dict.fromkeys(("log_every", "save_every", "track", "ngrams", "ensemble"))     # no weight needs these
        return asdict(self.config) | free | {"texts": found.hexdigest(), "biLM": self.digest, "seeds": self.seeds}

    def state(self) -> dict:
        """All that the next step depends on, beside the identity."""
        return {"live": self.live.state_dict(), "model": self.model.state_dict(), "adamw": self.adamw.state_dict(),
                "rows": self.row_adam.state if self.row_adam else {}, "averages": self.averages}

    def load_state(self, state: dict) -> None:
        """The inverse of `state`."""
        self.live.load_state_dict(state["live"])
        self.model.load_state_dict(state["model"])
        self.adamw.load_state_dict(state["adamw"])
        self.averages = state["averages"]
        if self.row_adam:
            self.row_adam.state = {name: value.to(self.device) for name, value in state["rows"].items()}

    @torch.no_grad()
    def probabilities(self, part: Texts, rows: np.ndarray | None = None) -> dict[str, Tensor]:
        """{setting: (S, N, C)} of the averaged weights, each row on its own."""
        vectors = copy.copy(self.vectors)
        vectors.model = self.model["bilm"] if self.config.finetune else vectors.model
        return probabilities({s: self.model[s] for s in self.config.settings}, vectors, part, self.dtype, rows)


def probabilities(heads: dict[str, Head], vectors: Vectors, part: Texts, dtype, rows=None) -> dict[str, Tensor]:
    """{setting: (S, N, C)} for some rows of a part, or all; no dropout."""
    rows = np.arange(len(part.lengths)) if rows is None else rows
    out = {name: torch.zeros(head.S, len(rows), head.out.bias.shape[2]) for name, head in heads.items()}
    @torch.no_grad()
    def measure(batch: np.ndarray) -> None:
        h, n = vectors(part, rows[batch], dtype)
        for name, head in heads.items():
            out[name][:, batch] = head(h, n).softmax(dim=-1).cpu()
    on_each_core(measure, batches(part.lengths[rows], 3000 // (1 + part.pair)), vectors.model.table.device)
    return out


def train(trainer: Trainer, resume_file: Path | None = None, resume: bool = False) -> Run:
    """The run, with the averaged weights whose cross-entropy on the validation rows is lowest, mean over heads."""
    gold = trainer.parts["validation"].labels
    def evaluate(loss: float) -> tuple[float, dict]:
        """(mean cross-entropy of all heads on the validation rows, the history's entry)."""
        entry = {"train_loss": loss, "validation": {}}
        for name, p in trainer.probabilities(trainer.parts["validation"]).items():
            nats = -p[:, torch.arange(len(gold)), gold].clamp(min=1e-12).log().mean(dim=1)
            entry["validation"][name] = {"loss": nats.tolist(),
                                         "accuracy": (p.argmax(dim=2) == gold).double().mean(dim=1).tolist()}
        return float(np.mean([v["loss"] for v in entry["validation"].values()])), entry

    with Run(trainer, resume_file, resume) as run:
        for step in range(run.step, trainer.steps + 1):
            if run.due(step):               # evaluate and keep the best
                run.keep(evaluate)
            if run.stop():                  # complete, or Ctrl-C
                break
            run.count(*trainer.step(step))  # one step, one log line
    return run


# ------------------------------------------------------------------------------------------------- checkpoint
class Classifier:
    """Trained heads with their biLM: texts in, labels and probabilities out.

        clf = Classifier.load("models/classifier.pt", "models/bilstm.pt", setting="trainable")
        clf.predict(["Oil prices fall."])       # [{"label": "Business", "probabilities": {"World": .., ...}}]

    A member is (head, its biLM, {setting, seed, validation accuracy}); several members' probabilities are averaged,
    and those of `ngrams`, where there is one, mixed in.
    """

    def __init__(self, config: Config, labels: Sequence[str], members: list[tuple[Head, ELMo, dict]],
                 ngrams: Ngrams | None = None):
        self.config, self.labels, self.members, self.ngrams = config, list(labels), members, ngrams

    @classmethod
    def load(cls, path: str | Path, bilstm: str | Path | None = None, setting: str | None = None,
             device: str = "cpu") -> "Classifier":
        """The classifier of a file that classification.py wrote; InputError where it is damaged or of another biLM.

        bilstm: the biLM that it was trained on, unless the file holds its own. setting: one of those that the file
        holds; by default the one that was best on the validation rows.
        """
        content = read_published(path, FORMAT, {"config", "labels", "members", "bilm", "metrics"})
        with fitting(path):
            config, members, bilm = Config(**content["config"]), content["members"], content["bilm"]
            settings = list(dict.fromkeys(member["setting"] for member in members))
            if setting in (None, "all"):
                setting = max(members, key=lambda member: member["validation"])["setting"]
            own = [ELMo.restored(bilm["config"], bilm["words"], part_of(content["weights"], f"bilm.{i}."), device)
                   for i in range(bilm["count"])]
            if not own and bilstm is None:
                raise InputError(f"{path} needs the biLM that it was trained on; name it, models/bilstm.pt say")
            if not own:
                own = [ELMo.load(bilstm, device)]
                if own[0].digest != bilm["digest"]:
                    raise InputError(f"{path} was trained on another biLM than {bilstm}; name that one (digest "
                                     f"{bilm['digest'][:12]}..), or run `python classification.py` anew")
            if setting not in settings or not all(isinstance(label, str) for label in content["labels"]):
                raise InputError(f"{path} holds no setting {setting!r}; expected one of {', '.join(settings)}")
            chosen = [cls.member(content, config, i, own[member["bilm"]]) for i, member in enumerate(members)
                      if member["setting"] == setting]
            linear = part_of(content["weights"], "ngrams.")
            ngrams = Ngrams(linear, len(content["labels"])) if config.ngrams else None
            return cls(config, content["labels"], chosen, ngrams)

    @staticmethod
    def member(content: dict, config: Config, i: int, elmo: ELMo) -> tuple[Head, ELMo, dict]:
        """The i-th head of a file, on its biLM."""
        about, vectors = content["members"][i], Vectors(config.vectors, elmo.model)
        with torch.device("meta"):
            head = Head(config, about["setting"], vectors.J, vectors.D, len(content["labels"]))
        head.load_state_dict(part_of(content["weights"], f"head.{i}."), assign=True)
        return head.to(elmo.model.table.device), elmo, about

    def save(self, path: str | Path, bilm: str | None, scores: dict) -> None:
        """Half-precision tensors and plain types; the biLMs are in the file, unless `bilm` is the digest of the one."""
        bilms = list(dict.fromkeys(elmo for _, elmo, _ in self.members))
        weights = {f"head.{i}.{name}": value for i, (head, _, _) in enumerate(self.members)
                   for name, value in head.state_dict().items()}
        weights |= {f"ngrams.{name}": value for name, value in (self.ngrams.weights if self.ngrams else {}).items()}
        source = {"count": 0, "digest": bilm}
        if bilm is None:
            weights |= {f"bilm.{i}.{name}": value for i, elmo in enumerate(bilms)
                        for name, value in elmo.model.state_dict().items()}
            source = {"count": len(bilms), "config": asdict(bilms[0].config), "words": bilms[0].words.words}
        write_published(path, {
            "format": FORMAT, "config": asdict(self.config), "labels": self.labels, "bilm": source,
            "members": [about | {"bilm": bilms.index(elmo)} for _, elmo, about in self.members],
            "weights": {name: value.cpu().half() for name, value in weights.items()}, "metrics": scores})

    def predict(self, texts: Sequence[str | tuple[str, str]], precision: str = "fp32") -> list[dict]:
        """One {"label", "probabilities": {label: share}} per text, or per pair of texts where the task is one of pairs.

        InputError names a text that is empty or no text. precision: "auto" and "bf16" are faster and round.
        """
        p = self.probabilities(texts, precision)
        return [{"label": self.labels[int(row.argmax())],
                 "probabilities": dict(zip(self.labels, row.tolist(), strict=True))} for row in p]

    def probabilities(self, texts: Sequence[str | tuple[str, str]], precision: str = "fp32") -> Tensor:
        """(N, C) float32 CPU tensor, the members' mean."""
        texts = check_rows(texts, self.config)
        if not texts:
            return torch.zeros(0, len(self.labels))
        encoded = Texts(Part(texts, np.zeros(len(texts), dtype=np.int64)), self.members[0][1])
        for i in np.flatnonzero(encoded.words == 0)[:1]:
            raise InputError(f"text {i % len(texts)} has no words; there is nothing to classify")
        total = torch.zeros(len(texts), len(self.labels))
        q = self.ngrams and self.ngrams.probabilities(texts)
        for elmo in dict.fromkeys(elmo for _, elmo, _ in self.members):     # each biLM runs once
            dtype = compute_dtype(precision, elmo.model.table.device)
            heads = {str(i): head for i, (head, own, _) in enumerate(self.members) if own is elmo}
            for p in probabilities(heads, Vectors(self.config.vectors, elmo.model), encoded, dtype).values():
                total += self.ngrams.mixed(p[0], q) if self.ngrams else p[0]
        return total / len(self.members)


def part_of(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The float32 weights whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value.float() for name, value in weights.items() if name.startswith(prefix)}


# ------------------------------------------------------------------------------------------------------- main
def adapted(elmo: ELMo, task: Task, config: Config, file: Path, resume: bool) -> Run:
    """The run that trains the biLM on as a language model of the task's training texts, its vocabulary grown by them.

    As in the paper's section 3.4; a tenth of the texts chooses the pass. New words begin like a new model's.
    """
    tokens = tokenized(task.corpus, elmo.config, CACHE)
    found = Vocabulary.count(tokens.types, tokens.counts(slice(None)), 2)
    words = Vocabulary(elmo.words.words + [word for word in found.words[4:] if word not in elmo.words.index])
    knobs = replace(elmo.config, epochs=config.adapt, lr=config.adapt_lr, table_lr=config.adapt_lr, seed=config.seed,
                    log_every=config.log_every, save_every=config.save_every, track=config.track,
                    precision=config.precision)
    parts = split(len(tokens), max(1, len(tokens) // 10), config.seed)
    trainer = ELMO.Trainer(knobs, Data(words, Encoded.of(tokens, words, knobs), *parts), elmo.model.table.device)
    with torch.no_grad():
        for name, value in trainer.model.state_dict().items():
            old = elmo.model.state_dict()[name]
            value[:len(old)] = old
    return ELMO.train(trainer, file, resume)


def vectors_of(config: Config, elmo: ELMo, task: Task) -> Vectors:
    """What --vectors names; tables are counted or trained on the task's training texts, in the biLM's vocabulary."""
    model, table = elmo.model, None
    if config.vectors == "untrained":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = ELMO.BiLM(elmo.config, len(elmo.words)).requires_grad_(False).to(model.table.device)
    if config.vectors in ("word2vec", "svd"):
        encoded = elmo.encode(task.corpus)
        data = Data(elmo.words, encoded, np.arange(len(encoded.tokens)), np.arange(0))
        table = torch.from_numpy(static_vectors(config.vectors, data, seed=config.seed)).to(model.table.device)
    return Vectors(config.vectors, model, table)


def classify(config: Config, out: Path, bilstm: Path, resume: bool) -> int:
    """The run of the command: reads the task, trains, measures, writes; the exit status."""
    from report import downstream
    begin = time.perf_counter()
    elmo = ELMo.load(bilstm, default_device())
    task, digest = read_task(config, elmo.config), elmo.digest
    name, runs = config.stem or "classifier", []
    if config.adapt:
        runs.append(adapted(elmo, task, config, out / f"{name}.adapt.{digest[:12]}.resume.pt", resume))
        if not runs[0].finished:
            return 130
        elmo = ELMo.rounded(runs[0].trainer, runs[0])
    parts = {name: Texts(getattr(task, name), elmo, CACHE) for name in ("train", "validation", "test")}
    vectors, every = vectors_of(config, elmo, task), range(config.seed, config.seed + config.seeds)
    print(f"{task.name}: {len(task.train):,} training, {len(task.validation):,} validation, {len(task.test):,} test "
          f"rows; {', '.join(config.settings)}; {config.seeds} seed(s); {vectors.J} x {vectors.D} a word", flush=True)
    ngrams = Ngrams.fit(task.train.texts, task.train.labels, len(task.labels)) if config.ngrams else None
    for seeds in [[seed] for seed in every] if config.finetune else [list(every)]:
        trainer = Trainer(config, vectors, parts, len(task.labels), seeds, digest)
        runs.append(train(trainer, out / f"{name}.{seeds[0]}.resume.pt", resume))
        if not runs[-1].finished:
            return 130
        trainer.model.load_state_dict({name: value.half().float() for name, value in runs[-1].best.items()})
    trained = runs[bool(config.adapt):]
    result = downstream.measure(trained, task, metrics, ngrams) | {"bilm": digest}
    if config.vectors == "elmo":
        save(config, trained, result, elmo, ngrams, out)
    downstream.publish(result, out, config.stem, time.perf_counter() - begin + sum(run.earlier for run in runs))
    for run in runs:
        run.file.unlink(missing_ok=True)
    return 0


def save(config: Config, runs: list[Run], result: dict, elmo: ELMo, ngrams: Ngrams | None, out: Path) -> None:
    """OUT's .pt: per setting the seed that is best on validation rows; with --ensemble another one of all seeds."""
    best, every = [], []
    for setting, numbers in result["settings"].items():
        members = []
        for run in runs:
            own = ELMo(elmo.config, elmo.words, run.trainer.model["bilm"]) if config.finetune else elmo
            for s, seed in enumerate(run.trainer.seeds):
                accuracy = numbers["validation"]["seeds"][len(members)]["accuracy"]
                about = {"setting": setting, "seed": seed, "validation": accuracy}
                members.append((run.trainer.model[setting].alone(s), own, about))
        every += members
        best.append(members[numbers["best"]])
    scores = {setting: {part: r[part]["accuracy"]["mean"] for part in ("train", "validation", "test")}
              for setting, r in result["settings"].items()}
    digest = None if config.finetune or config.adapt else result["bilm"]
    Classifier(config, result["labels"], best, ngrams).save(out / f"{config.stem or 'classifier'}.pt", digest, scores)
    if config.ensemble:
        name = "ensemble" if config.stem == "finetuned" else f"{config.stem or 'classifier'}_ensemble"
        Classifier(config, result["labels"], every, ngrams).save(out / f"{name}.pt", digest, scores)


@script("classification.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 2 for an input that the user can mend, 130 after Ctrl-C."""
    config, options = script_arguments(argv, Config, "classification.py", __doc__, HERE / "models", {
        "--bilstm": {"metavar": "FILE", "type": Path, "default": HERE / "models" / "bilstm.pt",
                     "help": "the biLM (default models/bilstm.pt)"},
        "--classifier": {"metavar": "FILE", "type": Path, "help": "for --predict (default: classifier.pt in --out)"},
        "--predict": {"metavar": "TEXT", "help": "label this text, or standard input's lines (-), instead of training"},
        "--json": {"action": "store_true", "help": "--predict: one JSON object a line"}})
    if options.predict is None:
        return classify(config, options.out, options.bilstm, options.resume)
    file = options.classifier or options.out / "classifier.pt"
    return print_predictions(lambda: Classifier.load(file, options.bilstm, config.setting, default_device()),
                             options.predict, config.precision, options.json)


if __name__ == "__main__":
    sys.exit(main())
