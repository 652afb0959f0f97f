"""A text classifier on ELMo's layers (Peters et al. 2018, section 3.2), with three ways to mix the layers.

    layers h_{k,0}, h_{k,1}, h_{k,2} of word k, from the frozen biLM in models/bilstm.pt
    setting `trainable`:  ELMo_k = gamma sum_j s_j h_{k,j}, s = softmax(w); w and gamma learn     (s_j is lambda_j)
    setting `frozen`:     the same; w is drawn at random and stays, gamma is 1
    setting `function`:   ELMo_k = f(h_{k,0}, h_{k,1}, h_{k,2}), a small network that learns
    a biLSTM reads ELMo_1 .. ELMo_n -> [maximum, attention, mean] over the words -> linear layer -> classes

The biLM runs once per batch for all heads; a head is one classifier of one setting and one seed. Heads train side by
side and do not influence each other.

Shapes: B texts of a batch, T words of the longest, J layers, D width of a layer, H cells of a head's LSTM, C classes,
N rows that are classified (B, or B / 2 if a row is a pair of texts).

    python classification.py                    AG News in three settings: models/classifier.pt, classification.json
    python classification.py --finetune         the biLM learns too: models/finetuned.pt
    python classification.py --task sst5        or sst2, nli; --adapt 2 first trains the biLM on the task's texts
    python classification.py --predict "text"   label and probabilities; --predict - reads lines from standard input
"""
import copy
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import ELMO
from data.ag_news import CACHE, split
from data.batches import batches, collate
from data.tasks import EncodedTexts, Part, Task, check_rows, read_task
from data.text import Data, Encoded, Vocabulary, tokenize_texts
from ELMO import BiLM, ELMo, ScalarMix, clip_gradients, reverse_within_lengths
from run import figures
from run.checkpoint import fitting, read_published, write_published
from run.files import InputError, folder_lock, read_lines, write_json
from run.machine import (
    Workers,
    autocast,
    compute_dtype,
    default_device,
    machine,
    map_on_cores,
    peak_memory_gb,
    torch_threads,
    versions,
)
from run.metrics import over_seeds
from run.options import check_options, option, script, script_arguments
from run.progress import Run, learning_rate_share

HERE = Path(__file__).resolve().parent
FORMAT = "elmo-classifier-2"            # of classifier.pt; raised when the meaning of the file changes
SETTINGS = ("trainable", "frozen", "function")
WARMUP = 0.03                           # share of the steps in which the learning rate rises
EVALUATIONS = 2                         # on the validation rows, per pass over the training rows
AVERAGE_EVERY = 10                      # steps between updates of the averaged weights
LAYER_DECAY = 2.6                       # fine-tuning: each layer learns this much slower than the one above
MEASURED_TRAINING_ROWS = 10_000


# ---------------------------------------------------------------------------------------------------- options
@dataclass(frozen=True)
class Config:
    """Every option of classification. The published table is the defaults with --seeds 3."""
    task: str = option("ag_news", "what to classify", choices=("ag_news", "sst2", "sst5", "nli"))
    setting: str = option("all", "how the layers are mixed", choices=("all", *SETTINGS))
    fields: str = option("description", "columns of AG News to read", choices=("description", "title+description"))
    seeds: int = option(1, "heads per setting, with the seeds from `seed` on", min=1, max=100)
    finetune: bool = option(False, "the biLM learns too, a copy of it for each seed")
    adapt: float = option(0.0, "passes of the biLM over the task's texts first, with its vocabulary grown by them", max=1000)
    adapt_lr: float = option(2e-3, "highest learning rate of these passes", max=10)
    phrases: bool = option(True, "sst: train on every phrase of a tree, not only on whole sentences")
    hidden: int = option(128, "H: cells of the head's LSTM, per direction", min=1, max=8192)
    dropout: float = option(0.2, "share of units dropped from the mix and from the pooled text", max=0.95)
    smoothing: float = option(0.05, "label smoothing: share of the target spread over all classes", max=0.99)
    rows: int = option(0, "labelled training rows, drawn by the seed; 0: all")
    validation: int = option(2000, "nli: training rows that are not trained on; ag_news takes those of the biLM")
    epochs: float = option(2.0, "passes over the training rows", max=100_000)
    batch_tokens: int = option(3000, "positions (B x T) of a batch", min=1)
    lr: float = option(4e-3, "highest learning rate of the head", max=10)
    mix_lr: float = option(2e-2, "highest learning rate of w and gamma", max=10)
    bilm_lr: float = option(4e-3, "finetune: highest learning rate of the biLM's top layer", max=10)
    bilm_dropout: float = option(0.1, "finetune: share of units dropped from x, h_1 and h_2", max=0.95)
    unfreeze: float = option(0.05, "finetune: share of the steps between unfreezing layers 2, 1 and 0", max=0.5)
    weight_decay: float = option(0.01, "AdamW's weight decay, of the head", max=10)
    ema: float = option(0.99, "decay of the moving average of the weights, which is what is evaluated", max=0.99999)
    clip: float = option(1.0, "largest gradient norm of a head, and of the biLM", min=1e-9)
    precision: str = option("auto", "of matrix products; auto: bf16 if it is fast", choices=("auto", "fp32", "bf16"))
    seed: int = option(0, "of weights, batches and dropout", max=2**31)
    log_every: int = option(100, "steps between log lines", min=1)
    save_every: float = option(300.0, "seconds between resume states")
    track: str = option("none", "curves to a tracker too, in --out", choices=("none", "tensorboard", "wandb"))

    def __post_init__(self):
        check_options(self)
        if "title" in self.fields and self.task != "ag_news":
            raise InputError(f"fields is {self.fields}, but the rows of {self.task} have no titles")

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings to train: all three, but with a biLM that learns only `trainable`."""
        if self.setting != "all":
            return (self.setting,)
        return ("trainable",) if self.finetune else SETTINGS

    @property
    def pair(self) -> bool:
        """Whether a row is a pair of texts that are read apart, as premise and hypothesis are."""
        return self.task == "nli"

    @property
    def two_texts(self) -> bool:
        """Whether a row has two texts: a pair, or title and description, which are joined."""
        return self.pair or "title" in self.fields

    @property
    def stem(self) -> str:
        """Name of the run's files: "classifier", "finetuned", "titled", "sst5", .."""
        if self.task != "ag_news":
            return self.task + "_finetuned" * self.finetune
        if "title" in self.fields:
            return "titled"
        names = ["adapted"] * (self.adapt > 0) + ["finetuned"] * self.finetune
        return "_".join(names) or "classifier"


# -------------------------------------------------------------------------------------------------- layer mix
class LayerFunction(nn.Module):
    """f(h_0, h_1, h_2) = relu(W [h_0; h_1; h_2] + b): every unit of the mix weighs the layers in its own way."""

    def __init__(self, layers: int, width: int, out: int):
        super().__init__()
        self.linear = nn.Linear(layers * width, out)

    def forward(self, layers: Tensor) -> Tensor:
        return self.linear(torch.cat(layers.unbind(), dim=-1)).relu()       # (J, T, B, D) -> (T, B, out)


class ELMoVectors:
    """Word vectors for a head: all layers of a biLM, (J, T, B, D) with J = 3 and D = 2P.

    report/baselines.py has other kinds of word vectors with the same attributes and the same call.
    """
    layers = ELMO.LAYERS + 1

    def __init__(self, model: BiLM):
        self.model = model
        self.width = 2 * model.config.width
        self.device = model.table.device

    def __call__(self, encoded: Encoded, rows: np.ndarray, dtype: torch.dtype, map: Callable = map) -> Tensor:
        """Vectors of some rows; `map` runs the two directions, one after the other or side by side."""
        @torch.no_grad()
        def states(d: int) -> list[Tensor]:
            with autocast(self.device, dtype):                              # holds for one thread, like no_grad
                return self.model.states(d, x[d])
        ids, _ = collate(encoded, rows)
        lengths = torch.from_numpy(encoded.lengths[rows]).to(self.device)
        with torch.no_grad():
            x = self.model.represent(ids.to(self.device), encoded.chars)
            forward, backward = map(states, range(2))
            return self.model.join(forward, backward, lengths)


# ------------------------------------------------------------------------------------------------------- head
class Head(nn.Module):
    """Layer mix -> biLSTM -> pooled text -> classes, for one setting.

    For a pair of texts, each side attends to the other before pooling (Parikh et al. 2016, Chen et al. 2017), and the
    two pooled sides u and v are compared as [u; v; |u - v|; u * v] (Conneau et al. 2017).
    """

    def __init__(self, config: Config, setting: str, layers: int, width: int, classes: int):
        super().__init__()
        H = config.hidden
        self.config = config
        self.width = 2 * H if setting == "function" else width              # of the mix
        self.mix = LayerFunction(layers, width, 2 * H) if setting == "function" else ScalarMix(layers)
        self.mix.requires_grad_(setting != "frozen")
        self.forward_lstm = nn.LSTM(self.width, H)
        self.backward_lstm = nn.LSTM(self.width, H)
        for lstm in (self.forward_lstm, self.backward_lstm):
            lstm.bias_hh_l0.requires_grad_(False)                           # two biases would learn at twice the rate
        self.attention = nn.Linear(H, 1)
        self.text_width = 6 * H                                             # of a pooled text
        if config.pair:
            self.compare = nn.Linear(4 * H, H)
            self.match = nn.Linear(4 * 6 * H, 2 * H)
            self.text_width = 2 * H
        self.out = nn.Linear(self.text_width, classes)

    @torch.no_grad()
    def initialize(self, seed: int) -> "Head":
        """Random weights that depend on the seed alone; returns self.

        What has the same shape in every setting is drawn first, so that heads of one seed share it.
        """
        generator = torch.Generator().manual_seed(seed)
        H = self.config.hidden
        shared = [name for name, _ in self.named_parameters() if "mix" not in name and "weight_ih" not in name]
        own = [name for name, _ in self.named_parameters() if name not in shared]
        for name in shared + own:
            weight = self.get_parameter(name)
            if weight.dim() == 2:
                bound = weight.shape[1] ** -0.5
                weight.uniform_(-bound, bound, generator=generator)
            elif "bias" in name:
                weight.zero_()
        for lstm in (self.forward_lstm, self.backward_lstm):
            lstm.bias_ih_l0[H:2 * H] = 1                                    # remember at first
        if isinstance(self.mix, ScalarMix) and not self.mix.w.requires_grad:
            self.mix.w.normal_(generator=torch.Generator().manual_seed(seed))
            self.mix.w.copy_(self.mix.w.half())                             # as the file holds it
        return self

    def dropout_masks(self, B: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Masks of the pooled text (N, ..) and of the mix (1, B, width), the same for all words of a text.

        The mask of the text is drawn first, since it has the same shape in all settings.
        """
        p = self.config.dropout
        N = B // 2 if self.config.pair else B
        device = self.out.weight.device
        text = torch.empty(N, self.text_width).bernoulli_(1 - p, generator=generator).div_(1 - p)
        mix = torch.empty(1, B, self.width).bernoulli_(1 - p, generator=generator).div_(1 - p)
        return text.to(device), mix.to(device)

    def forward(self, layers: Tensor, lengths: Tensor, masks: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(N, C) float32 logits of word vectors `layers` (J, T, B, D) of texts with `lengths` (B,) words.

        For pairs, the first half of the texts are the first sides. masks: from `dropout_masks`, for training.
        """
        x = self.mix(layers)                                                # (T, B, width)
        if masks is not None:
            x = x * masks[1].to(x.dtype)
        h = self.read(x, lengths)                                           # (2, T, B, H)
        inside = torch.arange(len(x), device=x.device)[:, None] < lengths   # (T, B)
        text = self.pool_pair(h, inside) if self.config.pair else self.pool(h, inside)
        if masks is not None:
            text = text * masks[0].to(text.dtype)
        return self.out(text).float()

    def read(self, x: Tensor, lengths: Tensor) -> Tensor:
        """(2, T, B, H) states of both directions in reading order, from x (T, B, width).

        Two LSTMs, the second over the words in reverse order: a bidirectional nn.LSTM would read the padding first.
        """
        forward, _ = self.forward_lstm(x)
        backward, _ = self.backward_lstm(reverse_within_lengths(x, lengths))
        return torch.stack([forward, reverse_within_lengths(backward, lengths)])

    def pool(self, h: Tensor, inside: Tensor) -> Tensor:
        """(B, 6H): per direction the maximum, attention-weighted sum and mean over the words; 0 for an empty text.

        h (2, T, B, H); inside (T, B) is True for words and False for padding.
        """
        outside = ~inside[:, :, None]                                       # (T, B, 1)
        count = inside.sum(dim=0)[:, None]                                  # (B, 1)
        maximum = h.masked_fill(outside, -torch.inf).amax(dim=1)            # (2, B, H)
        scores = self.attention(h).float().masked_fill(outside, -1e9)       # (2, T, B, 1)
        attention = (h * scores.softmax(dim=1).to(h.dtype)).sum(dim=1)      # (2, B, H)
        mean = h.masked_fill(outside, 0).sum(dim=1) / count.clamp(min=1)    # (2, B, H)
        text = torch.cat([maximum, attention, mean], dim=-1)                # (2, B, 3H)
        return text.masked_fill(count == 0, 0).transpose(0, 1).flatten(1)

    def pool_pair(self, h: Tensor, inside: Tensor) -> Tensor:
        """(N, 2H) of the pairs; h (2, T, 2N, H) holds the first sides of all pairs, then the second ones."""
        a, b = h.chunk(2, dim=2)                                            # (2, T, N, H)
        inside_a, inside_b = inside.chunk(2, dim=1)                         # (T, N)
        u = self.pool(self.compare_with(a, b, inside_b), inside_a)          # (N, 6H)
        v = self.pool(self.compare_with(b, a, inside_a), inside_b)
        return self.match(torch.cat([u, v, (u - v).abs(), u * v], dim=-1)).relu()

    def compare_with(self, own: Tensor, other: Tensor, inside: Tensor) -> Tensor:
        """(2, T, N, H): every state of `own` compared with what it finds in `other` by dot-product attention."""
        scores = torch.einsum("dtnh,dsnh->dnts", own, other) / math.sqrt(own.shape[-1])     # (2, N, T, T)
        outside = ~inside.t()[:, None, :]                                                   # (N, 1, T)
        weights = scores.float().masked_fill(outside, -1e9).softmax(dim=-1).masked_fill(outside, 0)
        found = torch.einsum("dnts,dsnh->dtnh", weights.to(own.dtype), other)
        return self.compare(torch.cat([own, found, (own - found).abs(), own * found], dim=-1)).relu()


# --------------------------------------------------------------------------------------------------- training
class Learner:
    """A head that learns: its optimizer, and the moving average of its weights, which is what is evaluated."""

    def __init__(self, config: Config, setting: str, seed: int, vectors, classes: int):
        self.config = config
        self.seed = seed
        with torch.random.fork_rng(devices=[]):                             # leaves the caller's random numbers alone
            head = Head(config, setting, vectors.layers, vectors.width, classes).initialize(seed)
        self.head = head.to(vectors.device)
        self.average = AveragedModel(self.head, avg_fn=moving_average(config.ema))
        scalars = [p for name, p in head.named_parameters() if name in ("mix.w", "mix.gamma") and p.requires_grad]
        others = [p for name, p in head.named_parameters() if name not in ("mix.w", "mix.gamma") and p.requires_grad]
        groups = [{"params": others, "weight_decay": config.weight_decay, "highest_lr": config.lr}]
        if scalars:
            groups.append({"params": scalars, "weight_decay": 0.0, "highest_lr": config.mix_lr})
        self.adamw = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)

    def step(self, step: int, steps: int, layers: Tensor, lengths: Tensor, gold: Tensor, dtype: torch.dtype) -> float:
        """One update; returns the cross-entropy summed over the rows. layers (J, T, B, D), gold (N,)."""
        generator = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + step)
        masks = self.head.dropout_masks(len(lengths), generator)
        with autocast(gold.device, dtype):
            logits = self.head(layers, lengths, masks)                      # (N, C)
        loss = F.cross_entropy(logits, gold, reduction="sum", label_smoothing=self.config.smoothing)
        (loss / len(gold)).backward()
        nn.utils.clip_grad_norm_(self.head.parameters(), self.config.clip)
        for group in self.adamw.param_groups:
            group["lr"] = group["highest_lr"] * learning_rate_share(step, steps, WARMUP)
        self.adamw.step()
        self.adamw.zero_grad()
        if averages_at(step, steps):
            self.average.update_parameters(self.head)
        return float(loss)

    def state(self) -> dict:
        return {"head": self.head.state_dict(), "average": self.average.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state(self, state: dict) -> None:
        self.head.load_state_dict(state["head"])
        self.average.load_state_dict(state["average"])
        self.adamw.load_state_dict(state["adamw"])


def moving_average(decay: float) -> Callable:
    """The rule of AveragedModel: average = d average + (1 - d) new, where d rises to `decay` over the first updates."""
    def update(average: Tensor, new: Tensor, count: Tensor) -> Tensor:
        return average.lerp(new, 1 - min(decay, float(count) / (float(count) + 9)))
    return update


def averages_at(step: int, steps: int) -> bool:
    """Whether the moving average takes in the weights after this step."""
    return step % AVERAGE_EVERY == AVERAGE_EVERY - 1 or step + 1 == steps


class FineTuner:
    """A copy of the biLM that learns with a head: lower layers later and more slowly (Howard and Ruder 2018).

    The two directions run side by side. Their states are cut out of the graph; the head's loss gives the gradients at
    the cut, and each direction goes on backward from there in its own thread.
    """

    def __init__(self, model: BiLM, config: Config, workers: Workers, dtype: torch.dtype):
        self.config = config
        self.workers = workers
        self.dtype = dtype
        self.model = copy.deepcopy(model).set_trainable()
        self.device = model.table.device
        self.average = AveragedModel(self.model, avg_fn=moving_average(config.ema))
        groups = []
        for depth in range(ELMO.LAYERS):
            layers = [self.model.lstms(d)[ELMO.LAYERS - 1 - depth] for d in range(2)]       # the top layer first
            weights = [weight for weight in nn.ModuleList(layers).parameters() if weight.requires_grad]
            groups.append(self.group(weights, depth))
        if hasattr(self.model, "characters"):
            groups.append(self.group(list(self.model.characters.parameters()), ELMO.LAYERS))
        self.adamw = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.optimizers = [self.adamw]
        if self.model.config.tied:
            self.optimizers.append(torch.optim.SparseAdam([self.group([self.model.table], ELMO.LAYERS)], betas=(0.9, 0.99)))

    def group(self, weights: list[nn.Parameter], depth: int) -> dict:
        """Optimizer group of the weights `depth` layers below the top: its highest rate, and when it starts to learn."""
        highest_lr = self.config.bilm_lr / LAYER_DECAY ** depth
        return {"params": weights, "lr": highest_lr, "highest_lr": highest_lr, "start": self.config.unfreeze * (depth + 1)}

    def states(self, d: int, x: Tensor, masks: list[Tensor]) -> list[Tensor]:
        """[h_0, h_1, h_2] of direction d, with their graph."""
        with autocast(self.device, self.dtype):
            return self.model.states(d, x, masks)

    def forward(self, part: EncodedTexts, rows: np.ndarray, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Layers (3, T, B, D) and lengths (B,) of some rows, with dropout. Keeps what `backward` needs."""
        rows, lengths = part.sides(rows)
        ids, _ = collate(part.encoded, rows)
        self.x = self.model.represent(ids.to(self.device), part.encoded.chars)
        self.inputs = [x.detach().requires_grad_() for x in self.x]
        keep = 1 - self.config.bilm_dropout
        shape = (ELMO.LAYERS + 1, 1, len(rows), self.model.config.width)
        masks = [torch.empty(shape).bernoulli_(keep, generator=generator).div_(keep).to(self.device) for _ in range(2)]
        self.outputs = self.workers.map(self.states, range(2), self.inputs, masks)
        self.cut = [[h.detach().requires_grad_() for h in states] for states in self.outputs]
        lengths = lengths.to(self.device)
        return at_least_one_word(self.model.join(*self.cut, lengths)), lengths

    def direction_gradients(self, d: int) -> tuple[Tensor, ...]:
        """Gradients of x and of the LSTMs of direction d, from those at the cut."""
        gradients = [h.grad for h in self.cut[d]]
        return torch.autograd.grad(self.outputs[d], [self.inputs[d], *self.model.lstm_weights(d)], gradients)

    def backward(self) -> None:
        """Puts the gradients into .grad, after the head's backward pass."""
        results = self.workers.map(self.direction_gradients, range(2))
        for d, (_, *gradients) in enumerate(results):
            for weight, gradient in zip(self.model.lstm_weights(d), gradients, strict=True):
                weight.grad = gradient
        if self.x.requires_grad:
            self.x.backward(torch.stack([gradients[0] for gradients in results]))
        if self.model.table.grad is not None:
            self.model.table.grad = self.model.table.grad.coalesce()

    def update(self, step: int, steps: int) -> None:
        """Clips and updates the layers that have started to learn; the others lose their gradients."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group in groups:
            group["lr"] = group["highest_lr"] * learning_rate_share(step, steps, WARMUP)
            if step / steps < group["start"]:
                for weight in group["params"]:
                    weight.grad = None
        clip_gradients(list(self.model.parameters()), self.config.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if averages_at(step, steps):
            self.average.update_parameters(self.model)

    def state(self) -> dict:
        return {"model": self.model.state_dict(), "average": self.average.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def at_least_one_word(layers: Tensor) -> Tensor:
    """layers (J, T, B, D), with one position of zeros if T is 0 because no text of the batch has a word."""
    return layers if layers.shape[1] else F.pad(layers, (0, 0, 0, 0, 0, 1))


class Trainer:
    """The heads of all settings and seeds on one biLM, and one training step. All randomness comes from (seed, step).

    On a CPU the biLM's directions run side by side first, then the heads, one per core at a time.
    """
    unit = "rows"
    rank = 0

    def __init__(self, config: Config, vectors, parts: dict[str, EncodedTexts], classes: int, seeds: Sequence[int],
                 digest: str = ""):
        self.config = config
        self.vectors = vectors
        self.parts = parts                      # "train", "validation", "test"
        self.seeds = list(seeds)
        self.digest = digest                    # of the biLM, for `identity`
        self.device = vectors.device
        self.dtype = compute_dtype(config.precision, self.device)
        self.workers = Workers(2, self.device)
        self.learners = {(setting, seed): Learner(config, setting, seed, vectors, classes)
                         for setting in config.settings for seed in self.seeds}
        self.model = nn.ModuleDict({f"{setting}-{seed}": learner.average.module
                                    for (setting, seed), learner in self.learners.items()})
        self.tuner = None
        if config.finetune:
            self.tuner = FineTuner(vectors.model, config, self.workers, self.dtype)
            self.model["bilm"] = self.tuner.average.module
        self.start_epoch(0)
        self.per_epoch = len(self.batches)
        self.steps = max(1, round(config.epochs * self.per_epoch))
        self.interval = math.ceil(self.per_epoch / EVALUATIONS)             # steps between evaluations

    def start_epoch(self, epoch: int) -> None:
        """New batches of rows of about equal length."""
        generator = np.random.default_rng([self.seeds[0], epoch])
        positions = self.config.batch_tokens // (1 + self.config.pair)
        self.epoch = epoch
        self.batches = batches(self.parts["train"].lengths, positions, generator)

    @torch_threads(1)
    def step(self, step: int) -> tuple[float, int]:
        """One update of every head; returns (cross-entropy summed over the rows, mean over heads; rows)."""
        epoch, number = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.start_epoch(epoch)
        part = self.parts["train"]
        rows = self.batches[number]
        gold = part.labels[rows].to(self.device)
        if self.tuner is None:
            layers, lengths = read_batch(self.vectors, part, rows, self.dtype, self.workers.map)
        else:
            generator = torch.Generator().manual_seed((self.seeds[0] + 1) * 1_000_003 + step)
            layers, lengths = self.tuner.forward(part, rows, generator)

        def learn(learner: Learner) -> float:
            return learner.step(step, self.steps, layers, lengths, gold, self.dtype)
        losses = self.workers.map(learn, self.learners.values())
        loss = sum(losses) / len(losses)
        if not math.isfinite(loss):
            raise InputError(f"the loss is not finite at step {step}; start anew with a lower --lr")
        if self.tuner is not None:
            self.tuner.backward()
            self.tuner.update(step, self.steps)
        return loss, len(rows)

    def identity(self) -> dict:
        """What a resumed run must share with the run that it continues."""
        sha = hashlib.sha256()
        for part in self.parts.values():
            tokens = part.encoded.tokens
            for array in (part.labels.numpy(), tokens.ids, tokens.offsets, part.encoded.lookup):
                sha.update(np.ascontiguousarray(array).data)
        without_effect = dict.fromkeys(("log_every", "save_every", "track"))            # no weight depends on these
        return asdict(self.config) | without_effect | {"texts": sha.hexdigest(), "biLM": self.digest, "seeds": self.seeds}

    def learning(self) -> list:
        """Everything with a state."""
        return [*self.learners.values(), *([self.tuner] if self.tuner else [])]

    def state(self) -> dict:
        """Everything that the next step depends on, beside the identity."""
        return {"learners": [learner.state() for learner in self.learning()]}

    def load_state(self, state: dict) -> None:
        """The inverse of `state`."""
        for learner, saved in zip(self.learning(), state["learners"], strict=True):
            learner.load_state(saved)

    def probabilities(self, part: EncodedTexts, rows: np.ndarray | None = None) -> dict[tuple, Tensor]:
        """{(setting, seed): (N, C)} by the averaged weights."""
        vectors = ELMoVectors(self.model["bilm"]) if self.tuner else self.vectors
        heads = {key: learner.average.module for key, learner in self.learners.items()}
        return probabilities(heads, vectors, part, self.dtype, rows)


def read_batch(vectors, part: EncodedTexts, rows: np.ndarray, dtype: torch.dtype, map: Callable = map):
    """Word vectors (J, T, B, D) and lengths (B,) of some rows; for pairs, first sides and then second ones."""
    sides, lengths = part.sides(rows)
    layers = vectors(part.encoded, sides, dtype, map)
    return at_least_one_word(layers), lengths.to(vectors.device)


def probabilities(heads: dict, vectors, part: EncodedTexts, dtype: torch.dtype, rows: np.ndarray | None = None) -> dict:
    """{name: (N, C)} of some rows of a part, or of all, for heads {name: Head}; no dropout."""
    rows = np.arange(len(part.lengths)) if rows is None else rows
    results = {name: torch.zeros(len(rows), head.out.out_features) for name, head in heads.items()}

    @torch.no_grad()
    def classify_batch(batch: np.ndarray) -> None:
        layers, lengths = read_batch(vectors, part, rows[batch], dtype)
        with autocast(vectors.device, dtype):
            for name, head in heads.items():
                results[name][batch] = head(layers, lengths).softmax(dim=-1).cpu()
    map_on_cores(classify_batch, batches(part.lengths[rows], 3000 // (1 + part.pair)), vectors.device)
    return results


def train(trainer: Trainer, resume_file: Path | None = None, resume: bool = False) -> Run:
    """The training loop. The returned Run holds the averaged weights with the lowest mean loss on the validation rows."""
    gold = trainer.parts["validation"].labels

    def evaluate(train_loss: float) -> tuple[float, dict]:
        """(mean cross-entropy of all heads on the validation rows, entry of the history)."""
        validation = {setting: {"loss": [], "accuracy": []} for setting in trainer.config.settings}
        for (setting, _), p in trainer.probabilities(trainer.parts["validation"]).items():
            nll = -p.gather(1, gold[:, None]).clamp(min=1e-12).log().mean()
            validation[setting]["loss"].append(float(nll))
            validation[setting]["accuracy"].append(float((p.argmax(dim=1) == gold).double().mean()))
        mean = np.mean([loss for numbers in validation.values() for loss in numbers["loss"]])
        return float(mean), {"train_loss": train_loss, "validation": validation}

    with Run(trainer, resume_file, resume) as run:
        for step in range(run.step, trainer.steps + 1):
            if run.due(step):                   # twice per pass over the training rows
                run.save_best(evaluate)
            if run.stop():                      # the end of training, or Ctrl-C
                break
            loss, rows = trainer.step(step)
            run.count(loss, rows)               # progress, log line, resume state
    return run


# ------------------------------------------------------------------------------------------------- classifier
class Classifier:
    """A trained head with its biLM: texts in, labels and probabilities out.

        clf = Classifier.load("models/classifier.pt", "models/bilstm.pt", setting="trainable")
        clf.predict(["Oil prices fall."])       # [{"label": "Business", "probabilities": {"World": .., ..}}]
    """

    def __init__(self, config: Config, labels: Sequence[str], head: Head, elmo: ELMo):
        self.config = config
        self.labels = list(labels)
        self.head = head.eval().requires_grad_(False)
        self.elmo = elmo

    @classmethod
    def load(cls, path: str | Path, bilstm: str | Path | None = None, setting: str | None = None,
             device: str = "cpu") -> "Classifier":
        """The classifier of a file made by classification.py; InputError if it is damaged or of another biLM.

        bilstm: the biLM that it was trained on, unless the file holds its own. setting: "trainable", "frozen" or
        "function"; by default the one with the best accuracy on the validation rows.
        """
        content = read_published(path, FORMAT, {"config", "labels", "heads", "bilm", "metrics"})
        with fitting(path):
            config = Config(**content["config"])
            heads = content["heads"]
            if setting in (None, "all"):
                setting = max(heads, key=lambda name: heads[name]["validation"])
            if setting not in heads:
                raise InputError(f"{path} has no setting {setting!r}; expected one of {', '.join(heads)}")
            elmo = bilm_of(path, content, bilstm, device)
            vectors = ELMoVectors(elmo.model)
            with torch.device("meta"):          # takes no memory for the sizes that a file claims
                head = Head(config, setting, vectors.layers, vectors.width, len(content["labels"]))
            head.load_state_dict(weights_of(content["weights"], f"{setting}."), assign=True)
            return cls(config, [str(label) for label in content["labels"]], head.to(vectors.device), elmo)

    def predict(self, texts: Sequence[str | tuple[str, str]], precision: str = "fp32") -> list[dict]:
        """One {"label", "probabilities": {label: p}} per text, or per pair of texts if the task is one of pairs.

        InputError names a text that is empty or is no text. precision: "fp32"; "auto" and "bf16" are faster and round.
        """
        return [{"label": self.labels[int(p.argmax())], "probabilities": dict(zip(self.labels, p.tolist(), strict=True))}
                for p in self.probabilities(texts, precision)]

    def probabilities(self, texts: Sequence[str | tuple[str, str]], precision: str = "fp32") -> Tensor:
        """(N, C) float32 CPU tensor."""
        rows = check_rows(texts, self.config)
        if not rows:
            return torch.zeros(0, len(self.labels))
        part = EncodedTexts(Part(rows, np.zeros(len(rows), dtype=np.int64)), self.elmo)
        for i in np.flatnonzero(part.words == 0)[:1]:
            raise InputError(f"text {i % len(rows)} has no words; there is nothing to classify")
        vectors = ELMoVectors(self.elmo.model)
        return probabilities({"": self.head}, vectors, part, compute_dtype(precision, vectors.device))[""]


def weights_of(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The float32 weights whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): value.float() for name, value in weights.items() if name.startswith(prefix)}


def bilm_of(path: str | Path, content: dict, bilstm: str | Path | None, device: str) -> ELMo:
    """The biLM inside a classifier's file, or the one in the file `bilstm` if its digest is the right one."""
    bilm = content["bilm"]
    if "words" in bilm:
        return ELMo.from_parts(bilm["config"], bilm["words"], weights_of(content["weights"], "bilm."), device)
    if bilstm is None:
        raise InputError(f"{path} needs the biLM that it was trained on; name it, for example models/bilstm.pt")
    elmo = ELMo.load(bilstm, device)
    if elmo.digest != bilm["digest"]:
        raise InputError(f"{path} was trained on another biLM than {bilstm}; name that one (digest "
                         f"{bilm['digest'][:12]}..), or run `python classification.py` anew")
    return elmo


# ------------------------------------------------------------------------------------------------ publication
def measure(runs: list[Run], task: Task) -> dict:
    """The numbers of finished runs on training, validation and test rows: the JSON without what `publish` adds.

    settings.{setting}: s and gamma of each seed (none for `function`), parameters, best (index of the seed that is best
    on the validation rows), predictions (class of each test row by the seeds' mean probabilities, one digit per row),
    and for train (10,000 of its rows), validation and test what `run.metrics.over_seeds` gives; for test rows of AG
    News also `fresh`, the same for the rows that are no near copies of training rows.
    """
    trainer = runs[0].trainer
    config = trainer.config
    sample = np.random.default_rng([config.seed, 4]).permutation(len(task.train))[:MEASURED_TRAINING_ROWS]
    parts = {"train": task.train.take(np.sort(sample)), "validation": task.validation, "test": task.test}
    settings = {setting: describe_heads(setting, runs) for setting in config.settings}
    for name, part in parts.items():
        rows = np.sort(sample) if name == "train" else None
        p = {}
        for run in runs:
            p.update(run.trainer.probabilities(trainer.parts[name], rows))
        for setting, numbers in settings.items():
            of_seeds = np.stack([values.numpy() for (of, _), values in p.items() if of == setting])     # (S, N, C)
            numbers[name] = over_seeds(of_seeds, part.labels, task.labels)
            if name == "test":
                numbers["predictions"] = "".join(map(str, of_seeds.mean(axis=0).argmax(axis=1)))
                if task.fresh is not None and task.fresh.any():
                    fresh = over_seeds(of_seeds[:, task.fresh], part.labels[task.fresh], task.labels)
                    numbers[name]["fresh"] = {"rows": int(task.fresh.sum()), "accuracy": fresh["accuracy"],
                                              "macro_f1": fresh["macro_f1"],
                                              "ensemble": {"accuracy": fresh["ensemble"]["accuracy"]}}
    for numbers in settings.values():
        numbers["best"] = int(np.argmax([seed["accuracy"] for seed in numbers["validation"]["seeds"]]))
    return {"config": asdict(config), "machine": machine(trainer.device), "task": task.name, "labels": task.labels,
            "history": [run.history for run in runs], "settings": settings}


def describe_heads(setting: str, runs: list[Run]) -> dict:
    """Layer weights and number of parameters of the heads of one setting."""
    heads = [learner.average.module for run in runs for (of, _), learner in run.trainer.learners.items() if of == setting]
    mixes = [head.mix for head in heads if isinstance(head.mix, ScalarMix)]
    return {"s": [mix.w.softmax(dim=0).tolist() for mix in mixes], "gamma": [float(mix.gamma) for mix in mixes],
            "parameters": sum(value.numel() for value in heads[0].parameters())}


def save(path: Path, result: dict, runs: list[Run], elmo: ELMo) -> None:
    """The .pt file: for each setting the seed that is best on the validation rows, and the biLM if it was changed."""
    config = runs[0].trainer.config
    heads, weights = {}, {}
    for setting, numbers in result["settings"].items():
        learners = [(seed, run.trainer, learner) for run in runs
                    for (of, seed), learner in run.trainer.learners.items() if of == setting]
        seed, trainer, learner = learners[numbers["best"]]
        heads[setting] = {"seed": seed, "validation": numbers["validation"]["seeds"][numbers["best"]]["accuracy"]}
        weights |= {f"{setting}.{name}": value for name, value in learner.average.module.state_dict().items()}
    bilm = {"digest": elmo.digest}
    if config.finetune or config.adapt:
        model = trainer.model["bilm"] if config.finetune else elmo.model
        own = ELMo(elmo.config, elmo.words, copy.deepcopy(model))
        bilm = {"config": asdict(elmo.config), "words": elmo.words.words}
        weights |= {f"bilm.{name}": value for name, value in own.weights().items()}
    scores = {setting: {part: numbers[part]["accuracy"]["mean"] for part in ("train", "validation", "test")}
              for setting, numbers in result["settings"].items()}
    write_published(path, {"format": FORMAT, "config": asdict(config), "labels": result["labels"], "heads": heads,
                           "bilm": bilm, "weights": {name: value.cpu().half() for name, value in weights.items()},
                           "metrics": scores})


def publish(result: dict, out: Path, stem: str, seconds: float) -> None:
    """Writes the figures and the JSON of a result, and prints its table. seconds: from command to file."""
    result |= {"command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]), "versions": versions()}
    figures.classification(result, out, "" if stem == "classifier" else stem)
    result |= {"minutes": seconds / 60, "peak_memory_gb": peak_memory_gb()}
    write_json(out / f"{'classification' if stem == 'classifier' else stem}.json", result)
    print(table(result))


def table(result: dict) -> str:
    """Accuracies and layer weights as lines to print."""
    lines = [f"{'accuracy':<12}{'train':>9}{'validation':>12}{'test':>9}{'std':>8}{'fresh rows':>12}{'macro-F1':>10}"
             "   layer weights s, gamma"]
    for setting, numbers in result["settings"].items():
        test = numbers["test"]
        std = test["accuracy"]["std"]
        cells = [f"{setting:<12}", f"{numbers['train']['accuracy']['mean']:>9.2%}",
                 f"{numbers['validation']['accuracy']['mean']:>12.2%}", f"{test['accuracy']['mean']:>9.2%}",
                 "       -" if std is None else f"{std:>8.2%}",
                 f"{test['fresh']['accuracy']['mean']:>12.2%}" if "fresh" in test else f"{'-':>12}",
                 f"{test['macro_f1']['mean']:>10.4f}   "]
        mixes = [f"{' '.join(f'{weight:.2f}' for weight in s)}, {gamma:.2f}"
                 for s, gamma in zip(numbers["s"], numbers["gamma"], strict=True)]
        lines.append("".join(cells) + "; ".join(mixes))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- main
def adapt(elmo: ELMo, task: Task, config: Config, file: Path, resume: bool) -> Run:
    """Trains the biLM on as a language model of the task's training texts, with its vocabulary grown by their words.

    As in the paper's section 3.4; a tenth of the texts chooses the pass. New words start like those of a new model.
    """
    tokens = tokenize_texts(task.corpus, CACHE)
    found = Vocabulary.count(tokens.types, tokens.counts(slice(None)), 2)
    words = Vocabulary(elmo.words.words + [word for word in found.words[4:] if word not in elmo.words.index])
    options = replace(elmo.config, epochs=config.adapt, lr=config.adapt_lr, table_lr=config.adapt_lr, seed=config.seed,
                      log_every=config.log_every, save_every=config.save_every, track=config.track,
                      precision=config.precision)
    rows = split(len(tokens), max(1, len(tokens) // 10), config.seed)
    data = Data(words, Encoded.of(tokens, words, options.representation), *rows)
    trainer = ELMO.Trainer(options, data, elmo.model.table.device)
    trained = elmo.model.state_dict()
    for name, value in trainer.model.state_dict().items():
        value[:len(trained[name])] = trained[name]
    return ELMO.train(trainer, file, resume)


def elmo_vectors(config: Config, elmo: ELMo, task: Task) -> ELMoVectors:
    """The word vectors of the command. report/baselines.py gives `classify` other functions with these arguments."""
    return ELMoVectors(elmo.model)


def classify(config: Config, out: Path, bilstm: Path, resume: bool, make_vectors: Callable = elmo_vectors,
             stem: str | None = None) -> int:
    """The run of the command: reads the task, trains, measures, writes. Returns the exit status.

    With other word vectors than ELMo's, named by `stem`, only the JSON and the figures are written.
    """
    begin = time.perf_counter()
    elmo = ELMo.load(bilstm, default_device())
    digest = elmo.digest
    task = read_task(config, elmo.config)
    name = stem or config.stem
    with folder_lock(out):
        runs = []
        if config.adapt:
            runs.append(adapt(elmo, task, config, out / f"{name}.adapt.{digest[:12]}.resume.pt", resume))
            if not runs[0].finished:
                return 130
            elmo = ELMo.from_run(runs[0])
        parts = {part: EncodedTexts(getattr(task, part), elmo, CACHE) for part in ("train", "validation", "test")}
        vectors = make_vectors(config, elmo, task)
        seeds = range(config.seed, config.seed + config.seeds)
        print(f"{task.name}: {len(task.train):,} training, {len(task.validation):,} validation, {len(task.test):,} test "
              f"rows; {', '.join(config.settings)}; {config.seeds} seed(s)", flush=True)
        trained = []
        for of_run in ([[seed] for seed in seeds] if config.finetune else [list(seeds)]):
            trainer = Trainer(config, vectors, parts, len(task.labels), of_run, digest)
            run = train(trainer, out / f"{name}.{of_run[0]}.resume.pt", resume)
            if not run.finished:
                return 130
            trainer.model.load_state_dict({key: value.half().float() for key, value in run.best.items()})
            trained.append(run)
        result = measure(trained, task) | {"bilm": digest}
        if stem is None:
            save(out / f"{name}.pt", result, trained, elmo)
        runs += trained
        publish(result, out, name, time.perf_counter() - begin + sum(run.earlier for run in runs))
        for run in runs:
            run.file.unlink(missing_ok=True)
    return 0


def print_predictions(file: Path, options, config: Config) -> int:
    """Prints label and probabilities of a text, or for "-" of each line of standard input. Returns the exit status.

    If the classifier takes two texts, a tab stands between them.
    """
    lines = read_lines("-") if options.predict == "-" else [options.predict]
    classifier = Classifier.load(file, options.bilstm, config.setting, default_device())
    texts = [tuple(line.split("\t")) for line in lines] if classifier.config.two_texts else lines
    for line, prediction in zip(lines, classifier.predict(texts, config.precision), strict=True):
        if options.json:
            print(json.dumps({"text": line} | prediction))
        else:
            print(prediction["label"], *(f"{label} {p:.4f}" for label, p in prediction["probabilities"].items()), sep="\t")
    return 0


@script("classification.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 2 for an input that the user can fix, 130 after Ctrl-C."""
    config, options = script_arguments(argv, Config, "classification.py", __doc__, HERE / "models", {
        "--bilstm": {"metavar": "FILE", "type": Path, "default": HERE / "models" / "bilstm.pt",
                     "help": "the biLM (default models/bilstm.pt)"},
        "--classifier": {"metavar": "FILE", "type": Path, "help": "for --predict (default: classifier.pt in --out)"},
        "--predict": {"metavar": "TEXT", "help": "classify this text, or the lines of standard input (-)"},
        "--json": {"action": "store_true", "help": "--predict: print one JSON object per line"}})
    if options.predict is None:
        return classify(config, options.out, options.bilstm, options.resume)
    return print_predictions(options.classifier or options.out / "classifier.pt", options, config)


if __name__ == "__main__":
    sys.exit(main())
