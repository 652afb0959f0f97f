"""A text classifier on ELMo's layers (Peters et al. 2018, section 3.2), with three ways to mix the layers.

    layers h_{k,0}, h_{k,1}, h_{k,2} of word k, from the biLM in models/bilstm.pt
    setting `trainable`:  ELMo_k = gamma sum_j s_j h_{k,j}, s = softmax(w); w and gamma learn     (lambda_j = s_j)
    setting `frozen`:     the same; w is drawn at random and stays, gamma is 1
    setting `function`:   ELMo_k = f(h_{k,0}, h_{k,1}, h_{k,2}), a small network that learns
    a biLSTM reads ELMo_1 .. ELMo_n -> [maximum, attention, mean] over the words -> linear layer -> classes

A head is one classifier, of one setting and one seed. A biLM that does not learn reads each batch once for all heads.

Shapes: B texts of a batch, T words of the longest, J layers, D width of a layer, H cells of a head's LSTM, C classes,
N classified rows (B, or B / 2 if a row is a pair of texts).

    python classification.py                    AG News in three settings: models/classifier.pt, classification.json
    python classification.py --finetune         setting trainable; each head trains a copy of the biLM: finetuned.pt
    python classification.py --task sst5        or sst2, nli; --adapt 2 first trains the biLM on the task's texts
    python classification.py --data FOLDER --out DIR    your own train.csv and test.csv, with any labels
    python classification.py --predict "text"   label and probabilities; --predict - reads lines from standard input
"""
import copy
import math
import sys
import time
import zlib
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ELMO
from data.ag_news import CACHE
from data.batches import batches, reverse_within_lengths
from data.inputs import Text
from data.labels import labelled_task
from data.tables import own_task
from data.tasks import EncodedTexts, Part, Task, check_rows, read_task
from data.text import Encoded
from ELMO import BETAS, BiLM, ELMo, ScalarMix
from run import checkpoint, inference, machine, metrics
from run.files import InputError, folder_lock, write_json
from run.machine import autocast, upload
from run.optimization import Optimizers, check_loss, clip_gradients, dropout_mask, group, lr_factor, update_average
from run.options import RUN_FLAGS, check_options, option, script, script_arguments
from run.pairs import PairMatcher
from run.progress import Run
from run.publication import Publication, options_of_weights

HERE = Path(__file__).resolve().parent
FORMAT = "elmo-classifier-2"            # of classifier.pt; renamed whenever its meaning changes
SETTINGS = ("trainable", "frozen", "function")
EVALUATIONS = 2                         # on the validation rows, per pass over the training rows
AVERAGE_EVERY = 10                      # steps between updates of the averaged weights
LAYER_DECAY = 2.6                       # fine-tuning: a layer learns this much slower than the one above (ULMFiT)
MEASURED_TRAINING_ROWS = 10_000
OWN_BATCHES = 50                        # at least, per pass over own rows, since a few updates would not be enough


# ---------------------------------------------------------------------------------------------------- options
@dataclass(frozen=True)
class Config:
    """Every option of classification. The published table is the defaults with --seeds 3."""
    task: str = option("ag_news", "what to classify; own: --data", choices=("ag_news", "sst2", "sst5", "nli", "own"))
    setting: str = option("all", "how the layers are mixed", choices=("all", *SETTINGS))
    fields: str = option("description", "columns of AG News to read; --data: columns are joined, or a pair",
                         choices=("description", "title+description", "joined", "pair"))
    seeds: int = option(1, "heads per setting, with the seeds `seed`, `seed` + 1, ..", min=1, max=100)
    finetune: bool = option(False, "each head trains a copy of the biLM too; `all` then means `trainable`")
    adapt: float = option(0.0, "first train the biLM for this many passes over the task's texts", max=999)
    adapt_lr: float = option(2e-3, "peak learning rate of these passes", max=10)
    phrases: bool = option(True, "sst: train on every phrase of a tree, not only on whole sentences")
    hidden: int = option(128, "H: cells of the head's LSTM, per direction", min=1, max=8192)
    dropout: float = option(0.2, "dropout probability of the mix and of the pooled text", max=0.95)
    smoothing: float = option(0.05, "label smoothing: share of the target spread over all classes", max=0.99)
    rows: int = option(0, "labelled training rows, drawn by the seed; 0: all")
    validation: int = option(2000, "training rows set aside for validation; --data: unless given, at most a tenth of "
                             "the rows; ag_news: those of the biLM", min=1)
    epochs: float = option(2.0, "passes over the training rows", max=100_000)
    batch_tokens: int = option(3000, "positions (B x T) of a batch; fewer if own rows are few", min=1)
    lr: float = option(4e-3, "peak learning rate of the head", max=10)
    mix_lr: float = option(2e-2, "peak learning rate of w and gamma", max=10)
    bilm_lr: float = option(4e-3, "finetune: peak learning rate of the biLM's top layer", max=10)
    bilm_dropout: float = option(0.1, "finetune: dropout probability of h_0, h_1 and h_2", max=0.95)
    unfreeze: float = option(0.05, "finetune: layers 2, 1, 0 learn after 1x, 2x, 3x this share of the steps", max=0.5)
    weight_decay: float = option(0.01, "AdamW's weight decay, of the head", max=10)
    ema: float = option(0.99, "decay of the weights' moving average, updated every 10 steps", max=0.99999)
    clip: float = option(1.0, "largest gradient norm of a head, and of the biLM", min=1e-9)
    precision: str = option("auto", "type of matrix products; auto: bf16 if faster", choices=("auto", "fp32", "bf16"))
    seed: int = option(0, "random seed of the first head, and of the batches, which all heads share", max=2**31)
    log_every: int = option(100, "steps between log lines", min=1)
    save_every: float = option(300.0, "seconds between resume states")
    track: str = option("none", "also log to a tracker, in --out", choices=("none", "tensorboard", "wandb"))

    def __post_init__(self):
        check_options(self)
        if "title" in self.fields and self.task != "ag_news":
            raise InputError(f"fields is {self.fields}, but the rows of {self.task} have no titles")

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings to train. With --finetune it is `trainable` alone, unless another one is named."""
        if self.setting != "all":
            return (self.setting,)
        return ("trainable",) if self.finetune else SETTINGS

    @property
    def pair(self) -> bool:
        """Whether a row is a pair of texts that are encoded separately, as premise and hypothesis are."""
        return self.task == "nli" or self.fields == "pair"

    @property
    def two_texts(self) -> bool:
        """Whether a row has two texts or more: a pair, or columns that are joined, such as title and description."""
        return self.pair or self.fields in ("title+description", "joined")

    @property
    def stem(self) -> str:
        """Name of the run's files: "classifier", also for own data; "finetuned", "adapted_sst5", .."""
        if self.task == "own":
            return "classifier"
        name = "titled" if "title" in self.fields else self.task
        if self.adapt:
            name = f"adapted_{name}"
        if self.finetune:
            name = f"{name}_finetuned"
        return {"ag_news": "classifier", "ag_news_finetuned": "finetuned"}.get(name, name)


# -------------------------------------------------------------------------------------------------- layer mix
class LayerFunction(nn.Module):
    """f(h_0, h_1, h_2) = relu(W [h_0; h_1; h_2] + b): every unit of the mix weighs the layers in its own way."""

    def __init__(self, layers: int, width: int, out: int):
        super().__init__()
        self.linear = nn.Linear(layers * width, out)

    def forward(self, layers: Tensor) -> Tensor:
        return self.linear(torch.cat(layers.unbind(), dim=-1)).relu()       # (J, T, B, D) -> (T, B, out)


class ELMoVectors:
    """Word vectors for a head: all layers of a frozen biLM, J = 3, D = 2P. Baselines use other classes instead."""
    layers = ELMO.LAYERS + 1

    def __init__(self, model: BiLM):
        self.model = model
        self.width = 2 * model.config.width
        self.device = model.table.device

    @torch.no_grad()
    def __call__(self, encoded: Encoded, rows: np.ndarray, dtype: torch.dtype, run_both: Callable = map) -> Tensor:
        """(J, T, B, D) vectors of some rows. `run_both` runs the directions, one after the other or side by side."""
        return self.model.contextual(encoded, rows, dtype, run_both=run_both)


# ------------------------------------------------------------------------------------------------------- head
class Head(nn.Module):
    """Layer mix -> biLSTM -> pooled text -> classes, for one setting."""

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
        self.text_width = 2 * H if config.pair else 6 * H                   # of a pooled text or pair
        if config.pair:
            self.matcher = PairMatcher(H)
        self.out = nn.Linear(self.text_width, classes)

    @torch.no_grad()
    def initialize(self, seed: int) -> "Head":
        """Sets random weights; returns self. Heads of one seed have equal weights, except where mix or shape differ."""
        for name, weight in self.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))    # one for each weight
            if name == "mix.w" and not weight.requires_grad:                # setting `frozen`
                weight.normal_(generator=generator)
                weight.copy_(weight.half())                                 # as the file holds it
            elif weight.dim() == 2:
                bound = weight.shape[1] ** -0.5
                weight.uniform_(-bound, bound, generator=generator)
            elif "bias" in name:
                weight.zero_()
        for lstm in (self.forward_lstm, self.backward_lstm):
            lstm.bias_ih_l0[self.config.hidden:2 * self.config.hidden] = 1  # forget gates, as in ELMO.py
        return self

    def dropout_masks(self, B: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Masks of the pooled text (N, ..) and of the mix (1, B, width). The first is the same in all settings."""
        N = B // 2 if self.config.pair else B
        text = dropout_mask(self.config.dropout, (N, self.text_width), generator)
        mix = dropout_mask(self.config.dropout, (1, B, self.width), generator)
        return text, mix

    def forward(self, layers: Tensor, lengths: Tensor, masks: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(N, C) float32 logits of word vectors `layers` (J, T, B, D) of texts with `lengths` (B,) words.

        For pairs, the first half of the texts are the first sides. masks: from `dropout_masks`, for training.
        """
        if layers.shape[1] == 0:
            layers = F.pad(layers, (0, 0, 0, 0, 0, 1))                      # no text has a word: one padding position
        x = self.mix(layers)                                                # (T, B, width)
        if masks is not None:
            x = x * masks[1].to(x.dtype)
        h = self.read(x, lengths)                                           # (2, T, B, H)
        inside = torch.arange(len(x), device=x.device)[:, None] < lengths   # (T, B)
        text = self.matcher(h, inside, self.pool) if self.config.pair else self.pool(h, inside)
        if masks is not None:
            text = text * masks[0].to(text.dtype)
        return self.out(text).float()

    def read(self, x: Tensor, lengths: Tensor) -> Tensor:
        """(2, T, B, H) states of both directions in reading order, from x (T, B, width).

        The second LSTM reads the words in reverse. A bidirectional nn.LSTM would read padding before words.
        """
        forward, _ = self.forward_lstm(x)
        backward, _ = self.backward_lstm(reverse_within_lengths(x, lengths))
        return torch.stack([forward, reverse_within_lengths(backward, lengths)])

    def pool(self, h: Tensor, inside: Tensor) -> Tensor:
        """(B, 6H) [maximum, attention, mean] of h (2, T, B, H) over the words, where `inside` (T, B) is True."""
        outside = ~inside[:, :, None]                                       # (T, B, 1)
        count = inside.sum(dim=0)[:, None]                                  # (B, 1)
        maximum = h.masked_fill(outside, -torch.inf).amax(dim=1)            # (2, B, H)
        scores = self.attention(h).float().masked_fill(outside, -1e9)       # (2, T, B, 1); -inf would give nan
        attention = (h * scores.softmax(dim=1).to(h.dtype)).sum(dim=1)      # (2, B, H)
        mean = h.masked_fill(outside, 0).sum(dim=1) / count.clamp(min=1)    # (2, B, H)
        text = torch.cat([maximum, attention, mean], dim=-1)                # (2, B, 3H)
        return text.masked_fill(count == 0, 0).transpose(0, 1).flatten(1)


# --------------------------------------------------------------------------------------------------- training
class Learner:
    """A head that learns, with its optimizers and the moving average of its weights, which is what is evaluated.

    With --finetune, a copy of the biLM learns too, lower layers later and more slowly (Howard and Ruder 2018).
    """

    def __init__(self, config: Config, head: Head, seed: int, vectors):
        self.config = config
        self.seed = seed
        self.modules = nn.ModuleDict({"head": head.to(vectors.device)})
        if config.finetune:
            self.modules["bilm"] = copy.deepcopy(vectors.model).set_trainable().train()
        self.average = copy.deepcopy(self.modules)
        self.optimizers = self.new_optimizers()

    def new_optimizers(self) -> Optimizers:
        """Groups of weights, each with its peak learning rate and the share of the steps before it begins to learn."""
        config = self.config
        learning = {name: weight for name, weight in self.modules["head"].named_parameters() if weight.requires_grad}
        scalars = [learning.pop(name) for name in ("mix.w", "mix.gamma") if name in learning]
        dense = [group(list(learning.values()), config.lr, config.weight_decay), group(scalars, config.mix_lr)]
        sparse = []
        if config.finetune:
            bilm = self.modules["bilm"]
            for j in (2, 1, 0):                                             # from the top layer down
                peak_lr = config.bilm_lr / LAYER_DECAY ** (2 - j)
                start = config.unfreeze * (3 - j)
                dense.append(group(bilm.layer_weights(j), peak_lr, start=start))
                if j == 0 and bilm.config.tied:
                    sparse.append(group([bilm.table], peak_lr, start=start))
        return Optimizers(dense, sparse, BETAS)

    def contextual(self, part: EncodedTexts, rows: np.ndarray, dtype: torch.dtype, generator: torch.Generator):
        """Layers (3, T, B, D) and lengths (B,) by the biLM that learns, with dropout."""
        bilm = self.modules["bilm"]
        sides, lengths = part.sides(rows)
        shape = (2, ELMO.LAYERS + 1, 1, len(sides), bilm.config.width)
        masks = dropout_mask(self.config.bilm_dropout, shape, generator)
        return bilm.contextual(part.encoded, sides, dtype, masks), upload(lengths, bilm.table.device)

    def gradients(self, trainer: "Trainer", step: int, rows: np.ndarray, shared: tuple | None) -> tuple[Tensor, Tensor]:
        """Computes .grad, clipped; returns (summed cross-entropy, norm). shared: layers and lengths, or None."""
        head = self.modules["head"]
        part = trainer.parts["train"]
        gold = upload(part.labels[rows], trainer.device)
        generator = machine.random_generator(trainer.device, (self.seed + 1) * 1_000_003 + step)
        if shared is None:
            shared = self.contextual(part, rows, trainer.dtype, generator)
        layers, lengths = shared
        with autocast(trainer.device, trainer.dtype):
            logits = head(layers, lengths, head.dropout_masks(len(lengths), generator))     # (N, C)
        loss = F.cross_entropy(logits, gold, reduction="sum", label_smoothing=self.config.smoothing)
        (loss / len(gold)).backward()
        self.optimizers.freeze(step / trainer.steps)                        # groups that do not learn yet: no gradient
        norms = [clip_gradients(module.parameters(), self.config.clip) for module in self.modules.values()]
        return loss.detach(), sum(norms)

    def update(self, step: int, steps: int) -> None:
        """Updates the weights and, every AVERAGE_EVERY steps, their average; before that, it is a copy of them."""
        self.optimizers.step(lr_factor(step, steps))
        if step < AVERAGE_EVERY or step % AVERAGE_EVERY == AVERAGE_EVERY - 1 or step + 1 == steps:
            update_average(self.average, self.modules, step // AVERAGE_EVERY, self.config.ema)

    def state(self) -> dict:
        """Everything that the next step depends on."""
        return {name: getattr(self, name).state_dict() for name in ("modules", "average", "optimizers")}

    def load_state(self, state: dict) -> None:
        """The inverse of `state`."""
        for name, saved in state.items():
            getattr(self, name).load_state_dict(saved)


class Trainer:
    """Learners of all settings and seeds, and one training step. Every random number comes from (seed, step).

    A biLM that does not learn reads the batch once for all heads. On a CPU, the heads learn side by side in threads.
    """
    unit = "rows"       # of the progress bar
    rank = 0            # there is one process

    def __init__(self, config: Config, vectors, parts: dict, classes: int, source: dict | None = None):
        self.config = config
        self.vectors = vectors
        self.parts = parts                      # EncodedTexts of "train", "validation", "test"
        self.seeds = range(config.seed, config.seed + config.seeds)
        self.source = source or {}              # digests of the data and of the biLM, for `identity`
        self.device = vectors.device
        self.dtype = machine.compute_dtype(config.precision, self.device)
        machine.keep_freed_memory()                                         # saves up to a quarter of a step
        self.learners = {}                      # by name: "trainable-0", ..
        for setting in config.settings:
            for name, seed in zip(self.names(setting), self.seeds, strict=True):
                self.learners[name] = Learner(config, self.new_head(setting, classes, seed), seed, vectors)
        self.workers = machine.Workers(min(torch.get_num_threads(), len(self.learners)), self.device)
        # what is evaluated and saved: the averaged weights
        self.model = nn.ModuleDict({name: learner.average for name, learner in self.learners.items()})
        self.start_epoch(0)
        self.per_epoch = len(self.batches)
        self.steps = max(1, round(config.epochs * self.per_epoch))
        self.interval = math.ceil(self.per_epoch / EVALUATIONS)             # steps between evaluations

    def new_head(self, setting: str, classes: int, seed: int) -> Head:
        """A head with random weights; the random numbers of the caller stay as they are."""
        make = partial(Head, self.config, setting, self.vectors.layers, self.vectors.width, classes)
        return machine.seeded(seed, make).initialize(seed)

    def names(self, setting: str) -> list[str]:
        """One setting's keys, one per seed, in `learners`, `model` and what `probabilities` returns."""
        return [f"{setting}-{seed}" for seed in self.seeds]

    def start_epoch(self, epoch: int) -> None:
        """New batches of rows of about equal length, the same ones for all learners."""
        generator = np.random.default_rng([self.config.seed, epoch])
        lengths = self.parts["train"].lengths
        positions = self.config.batch_tokens // (1 + self.config.pair)      # of a pair's texts, each has half of them
        if self.config.task == "own":
            positions = min(positions, int((lengths + 1).sum()) // OWN_BATCHES)
        self.epoch = epoch
        self.batches = batches(lengths, positions, generator)

    @machine.torch_threads(1)
    def step(self, step: int) -> tuple[Tensor, Tensor, int]:
        """One update of every head; returns (summed cross-entropy, gradient norm, rows), averaged over heads."""
        epoch, number = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.start_epoch(epoch)
        rows = self.batches[number]
        shared = None
        if not self.config.finetune:
            shared = vectors_of(self.vectors, self.parts["train"], rows, self.dtype, self.workers.map)
        learners = list(self.learners.values())
        results = self.workers.map(lambda learner: learner.gradients(self, step, rows, shared), learners)
        if self.device.type == "cpu":       # Run reads a GPU's numbers later, because reading them takes time
            for loss, norm in results:
                check_loss(loss, norm, len(rows), step, step)
        self.workers.map(lambda learner: learner.update(step, self.steps), learners)
        losses, norms = zip(*results, strict=True)
        return torch.stack(losses).mean(), torch.stack(norms).mean(), len(rows)

    def identity(self) -> dict:
        """What a resumed run must share with the run that it continues."""
        return options_of_weights(self.config) | {"format": FORMAT} | self.source

    def state(self) -> dict:
        """Everything that the next step depends on, beside the identity."""
        return {name: learner.state() for name, learner in self.learners.items()}

    def load_state(self, state: dict) -> None:
        """The inverse of `state`."""
        for name, learner in self.learners.items():
            learner.load_state(state[name])

    def probabilities(self, part: EncodedTexts, rows: np.ndarray | None = None) -> dict[str, Tensor]:
        """{"trainable-0": (N, C), ..} by the averaged weights of each setting and seed."""
        if not self.config.finetune:
            heads = {name: modules["head"] for name, modules in self.model.items()}
            return probabilities(heads, self.vectors, part, self.dtype, rows)
        results = {}
        for name, modules in self.model.items():
            vectors = ELMoVectors(modules["bilm"])
            results |= probabilities({name: modules["head"]}, vectors, part, self.dtype, rows)
        return results


def vectors_of(vectors, part: EncodedTexts, rows: np.ndarray, dtype: torch.dtype, run_both: Callable = map):
    """Word vectors (J, T, B, D) and lengths (B,) of some rows; of pairs, all first texts come first."""
    sides, lengths = part.sides(rows)
    return vectors(part.encoded, sides, dtype, run_both), upload(lengths, vectors.device)


def probabilities(heads: dict, vectors, part: EncodedTexts, dtype: torch.dtype, rows: np.ndarray | None = None) -> dict:
    """{name: (N, C)} of some rows of a part, or of all, for heads {name: Head}; no dropout."""
    if rows is None:
        rows = np.arange(len(part.lengths))
    results = {name: torch.zeros(len(rows), head.out.out_features) for name, head in heads.items()}

    @torch.no_grad()
    def classify_batch(batch: np.ndarray) -> None:
        layers, lengths = vectors_of(vectors, part, rows[batch], dtype)
        with autocast(vectors.device, dtype):
            for name, head in heads.items():
                results[name][batch] = head(layers, lengths).softmax(dim=-1).cpu()
    parts = batches(part.lengths[rows], 3000 // (1 + part.pair))
    machine.map_on_cores(classify_batch, parts, vectors.device)
    return results


def train(trainer: Trainer, resume_file: Path | None = None, resume: bool = False) -> Run:
    """The training loop. The Run holds all heads' averaged weights at the evaluation with the lowest mean loss."""
    gold = trainer.parts["validation"].labels

    def evaluate(train_loss: float) -> tuple[float, dict, str]:
        """(mean cross-entropy of all heads on the validation rows, entry of the history, sentence)."""
        p = trainer.probabilities(trainer.parts["validation"])
        loss, validation = metrics.validation_numbers(p, gold, trainer.config.settings)
        entry = {"train_loss": train_loss, "validation": validation}
        return loss, entry, metrics.accuracy_sentence(entry)

    with Run(trainer, resume_file, resume) as run:
        for step in range(run.step, trainer.steps + 1):     # from 0, or from where a resumed run stopped
            if run.due(step):                   # twice per pass over the training rows
                run.save_best(evaluate)
            if run.stop():                      # the end of training, or Ctrl-C
                break
            run.count(*trainer.step(step))      # progress, log line, resume state
    return run


# ------------------------------------------------------------------------------------------------- classifier
class Classifier:
    """A trained head with its biLM: texts in, labels and probabilities out.

        clf = Classifier.load("models/classifier.pt", "models/bilstm.pt", setting="trainable")
        clf.predict(["Oil prices fall."])       # [{"label": "Business", "probabilities": {"World": .., ..}}]
    """

    def __init__(self, config: Config, labels: Sequence[str | int], head: Head, elmo: ELMo, about: dict | None = None):
        self.config = config
        self.labels = list(labels)
        self.head = head.eval().requires_grad_(False)
        self.elmo = elmo
        self.about = about or {}                # setting, seed, and accuracy on the validation rows

    @classmethod
    def train(cls, texts: Sequence[Text | tuple[Text, Text]], labels: Sequence[str | int], elmo: ELMo,
              config: Config | None = None) -> "Classifier":
        """Trains a classifier on your own texts, or pairs of texts; setting `trainable`, unless config names another.

        labels: one per text, strings or integers. A tenth of the rows, at most `validation`, chooses the best weights.
        InputError names a text or a label that is wrong.
        """
        config = config or Config()
        rows = texts if isinstance(texts, str) else list(texts)             # check_rows refuses a single string
        pair = len(rows) > 0 and isinstance(rows[0], tuple)
        config = replace(config, task="own", fields="pair" if pair else "description",
                         setting="trainable" if config.setting == "all" else config.setting)
        rows = check_rows(rows, config)
        EncodedTexts(Part.without_labels(rows), elmo).check_words()         # before a training that may be long
        validation = min(config.validation, max(1, len(rows) // 10))
        task = labelled_task(rows, labels, validation, config.seed).with_labels(config.rows, config.seed)
        if config.adapt:
            elmo = ELMo.from_run(adapt(elmo, task, config))
        parts = {part: EncodedTexts(getattr(task, part), elmo) for part in ("train", "validation")}
        trainer = Trainer(config, ELMoVectors(elmo.model), parts, len(task.labels))
        run = train(trainer)
        restore_best(run)
        p = trainer.probabilities(parts["validation"])
        _, numbers = metrics.validation_numbers(p, parts["validation"].labels, [config.setting])
        return cls.of_setting(trainer, config.setting, numbers[config.setting]["accuracy"], task.labels, elmo)

    @classmethod
    def of_setting(cls, trainer: Trainer, setting: str, accuracies: list[float], labels: Sequence[str | int],
                   elmo: ELMo) -> "Classifier":
        """The classifier of the seed with the best accuracy; accuracies: of each seed, on the validation rows."""
        best = int(np.argmax(accuracies))
        seed = trainer.seeds[best]
        modules = trainer.model[f"{setting}-{seed}"]
        if trainer.config.finetune:
            elmo = ELMo(elmo.config, elmo.words, modules["bilm"])           # in no file yet: it has no digest
        about = {"setting": setting, "seed": seed, "validation": accuracies[best]}
        return cls(trainer.config, labels, modules["head"], elmo, about)

    @classmethod
    def load(cls, path: str | Path, bilstm: str | Path | None = None, setting: str | None = None,
             device: str | None = None) -> "Classifier":
        """The classifier of a file made by classification.py; InputError if it is damaged or for another biLM.

        bilstm: the biLM that it was trained on, unless the file holds its own. setting: "trainable", "frozen" or
        "function"; by default the one with the best accuracy on the validation rows. device: as for ELMo.load.
        """
        device = machine.find_device(device)
        content = checkpoint.read_published(path, FORMAT, {"config", "labels", "heads", "bilm", "metrics"})
        with checkpoint.fitting(path):
            config = Config(**content["config"])
            heads = content["heads"]
            if setting in (None, "all"):
                setting = max(heads, key=lambda name: heads[name]["validation"])
            if setting not in heads:
                raise InputError(f"{path} has no setting {setting!r}; expected one of {', '.join(heads)}")
            if not content["labels"]:
                raise ValueError("there are no labels")
            elmo = bilm_of(path, content, bilstm, device)
            vectors = ELMoVectors(elmo.model)
            with torch.device("meta"):          # allocates nothing before the sizes are known to fit
                head = Head(config, setting, vectors.layers, vectors.width, len(content["labels"]))
            head.load_state_dict(checkpoint.weights_of(content["weights"], f"{setting}."), assign=True)
            return cls(config, content["labels"], head.to(vectors.device), elmo, {"setting": setting} | heads[setting])

    def save(self, path: str | Path) -> None:
        """Writes the classifier, the whole file or nothing; with its biLM, unless that was saved."""
        save(path, [self])

    def predict(self, texts: Sequence[Text | tuple[Text, ...]], precision: str = "fp32") -> list[dict]:
        """One {"label", "probabilities": {label: p}} per text, or per tuple of texts if the classifier reads several.

        A text is a string or a list of tokens. One without words gets the label None and no probabilities. InputError
        names an item that is no text. precision: "fp32", "bf16", or "auto": the faster one.
        """
        part = self.encode(texts)
        rows = np.flatnonzero(part.shortest)                                # those with words
        predictions = [{"label": None, "probabilities": {}} for _ in part.labels]
        for row, p in zip(rows, self.probabilities_of(part, rows, precision), strict=True):
            probabilities = dict(zip(self.labels, p.tolist(), strict=True))
            predictions[row] = {"label": self.labels[p.argmax()], "probabilities": probabilities}
        return predictions

    def probabilities(self, texts: Sequence[Text | tuple[Text, ...]], precision: str = "fp32") -> Tensor:
        """(N, C) float32 CPU tensor. InputError names a text without words."""
        part = self.encode(texts)
        part.check_words()
        return self.probabilities_of(part, np.arange(len(part.labels)), precision)

    def encode(self, texts: Sequence[Text | tuple[Text, ...]]) -> EncodedTexts:
        """Texts in the ids of the biLM."""
        return EncodedTexts(Part.without_labels(check_rows(texts, self.config)), self.elmo)

    def probabilities_of(self, part: EncodedTexts, rows: np.ndarray, precision: str) -> Tensor:
        """(rows, C) float32 CPU tensor."""
        vectors = ELMoVectors(self.elmo.model)
        dtype = machine.compute_dtype(precision, vectors.device)
        return probabilities({"head": self.head}, vectors, part, dtype, rows)["head"]


def save(path: str | Path, classifiers: Sequence[Classifier], scores: dict | None = None) -> None:
    """Writes the classifiers of one run, one per setting. Their biLM is written too if it has no file of its own.

    That is so if it was adapted, fine-tuned or never saved. scores: accuracies, for whoever opens the file.
    """
    heads = {}
    weights = {}
    for clf in classifiers:
        setting = clf.about["setting"]
        heads[setting] = {"seed": clf.about["seed"], "validation": clf.about["validation"]}
        weights |= {f"{setting}.{name}": value for name, value in clf.head.state_dict().items()}
    elmo = classifiers[0].elmo
    bilm = {"digest": elmo.digest}
    if elmo.digest is None:
        bilm = {"config": asdict(elmo.config), "words": elmo.words.words}
        weights |= {f"bilm.{name}": value for name, value in elmo.weights().items()}
    checkpoint.write_published(path, {
        "format": FORMAT, "config": asdict(classifiers[0].config), "labels": classifiers[0].labels, "heads": heads,
        "bilm": bilm, "weights": {name: value.cpu().half() for name, value in weights.items()},
        "metrics": scores or {}})


def bilm_of(path: str | Path, content: dict, bilstm: str | Path | None, device: torch.device) -> ELMo:
    """The biLM inside a classifier's file, or the one in the file `bilstm` if its digest is the right one."""
    bilm = content["bilm"]
    if "words" in bilm:
        weights = checkpoint.weights_of(content["weights"], "bilm.")
        return ELMo.from_parts(bilm["config"], bilm["words"], weights, device)
    if bilstm is None:
        raise InputError(f"{path} needs the biLM that it was trained on; name it, for example models/bilstm.pt")
    elmo = ELMo.load(bilstm, device)
    if elmo.digest != bilm["digest"]:
        raise InputError(f"{path} was not trained on {bilstm}; give its own biLM with --bilstm (digest "
                         f"{bilm['digest'][:12]}..), or run `python classification.py` again")
    return elmo


# ------------------------------------------------------------------------------------------------ publication
def measure(run: Run, task: Task) -> dict:
    """The numbers of a finished run for its JSON: s and gamma by seed, and `run.metrics.classification_numbers`."""
    trainer = run.trainer
    order = np.random.default_rng([trainer.config.seed, 4]).permutation(len(task.train))
    sample = np.sort(order[:MEASURED_TRAINING_ROWS])
    rows = {"train": sample, "validation": None, "test": None}
    p = {part: trainer.probabilities(trainer.parts[part], rows[part]) for part in rows}
    gold = {"train": task.train.labels[sample], "validation": task.validation.labels, "test": task.test.labels}
    settings = {}
    for setting in trainer.config.settings:
        names = trainer.names(setting)
        numbers = metrics.classification_numbers(p, gold, names, task.labels, task.fresh)
        heads = [trainer.model[name]["head"] for name in names]
        mixes = [head.mix for head in heads if isinstance(head.mix, ScalarMix)]
        numbers["s"] = [mix.w.softmax(dim=0).tolist() for mix in mixes]
        numbers["gamma"] = [mix.gamma.item() for mix in mixes]
        numbers["parameters"] = sum(weight.numel() for weight in heads[0].parameters())
        settings[setting] = numbers
    return {"config": asdict(trainer.config), "precision": run.precision, "task": task.name, "labels": task.labels,
            "history": [run.history], "settings": settings} | trainer.source


def save_run(path: Path, result: dict, trainer: Trainer, elmo: ELMo) -> None:
    """Writes the .pt file of a run: for each setting the seed that is best on the validation rows."""
    classifiers = []
    scores = {}
    for setting, numbers in result["settings"].items():
        accuracies = [of_seed["accuracy"] for of_seed in numbers["validation"]["seeds"]]
        classifiers.append(Classifier.of_setting(trainer, setting, accuracies, result["labels"], elmo))
        scores[setting] = {part: numbers[part]["accuracy"]["mean"] for part in ("train", "validation", "test")}
    save(path, classifiers, scores)


# ------------------------------------------------------------------------------------------------------- main
def own_data(config: Config, options: Namespace) -> tuple[Config, Task | None]:
    """Reads --data: (config with task and fields set to fit, task). Without --data: (config, None)."""
    if options.data is None:
        if config.task == "own" or config.fields in ("joined", "pair") or options.text or options.label:
            raise InputError("--task own, --fields joined or pair, --text and --label are for --data; name its folder")
        if options.tokenized:
            raise InputError("--tokenized is for --data and --predict; the texts of other tasks are not tokenized")
        return config, None
    if config.task not in ("ag_news", "own") or "title" in config.fields:
        raise InputError("--data names rows of your own; leave out --task, and choose columns by --text")
    validation = config.validation if "validation" in options.given else None
    task = own_task(options.data, options.text or [], options.label, config.fields == "pair", validation, config.seed,
                    options.tokenized)
    fields = config.fields
    if fields != "pair":
        fields = "joined" if len(options.text or []) > 1 else "description"
    return replace(config, task="own", fields=fields), task.with_labels(config.rows, config.seed)


def adapt(elmo: ELMo, task: Task, config: Config, file: Path | None = None, resume: bool = False) -> Run:
    """Trains the biLM further on the task's training texts, with the options of this run."""
    options = replace(elmo.config, epochs=config.adapt, lr=config.adapt_lr, table_lr=config.adapt_lr, seed=config.seed,
                      min_count=2, log_every=config.log_every, save_every=config.save_every, track=config.track,
                      precision=config.precision)
    return ELMO.adapt(elmo, task.corpus, options, CACHE, file, resume)


def restore_best(run: Run) -> None:
    """Sets the heads, and biLMs that learned, to a run's best weights, rounded to half precision as in the file."""
    if not run.finished:
        raise KeyboardInterrupt                 # in a notebook, Ctrl-C stopped it
    run.trainer.model.load_state_dict({key: value.half().float() for key, value in run.best.items()})


def classify(config: Config, options: Namespace, make_vectors: Callable | None = None, stem: str | None = None,
             task: Task | None = None) -> int:
    """Runs the command: reads the task unless it is given, trains, measures, writes. Returns the exit status.

    options: out, bilstm, resume and overwrite of the command line. make_vectors(config, elmo, task) gives a baseline's
    word vectors, named by `stem`; then no .pt file is written.
    """
    begin = time.perf_counter()
    out = options.out
    name = stem or config.stem
    publication = Publication(name, config, options, has_model=stem is None)
    elmo = ELMo.load(options.bilstm)
    task = task or read_task(config, elmo.config)
    source = {"data": task.digest, "bilm": elmo.digest}
    with folder_lock(out):
        if publication.finished(source):
            return 0
        runs = []
        if config.adapt:
            adapt_file = out / f"{name}.adapt.{elmo.digest[:12]}.resume.pt"
            runs.append(adapt(elmo, task, config, adapt_file, options.resume))
            if not runs[0].finished:
                return 130
            elmo = ELMo.from_run(runs[0])
            source["adapted"] = checkpoint.digest({"weights": elmo.weights()})
        parts = {part: EncodedTexts(getattr(task, part), elmo, CACHE) for part in ("train", "validation", "test")}
        vectors = ELMoVectors(elmo.model) if make_vectors is None else make_vectors(config, elmo, task)
        print(f"{task.summary()}\nheads: {config.seeds} per setting ({', '.join(config.settings)})", flush=True)
        trainer = Trainer(config, vectors, parts, len(task.labels), source)
        run = train(trainer, publication.state_file(trainer.identity()), options.resume)
        if not run.finished:
            return 130
        restore_best(run)
        result = measure(run, task)
        if stem is None:
            save_run(out / f"{name}.pt", result, trainer, elmo)
        runs.append(run)
        seconds = time.perf_counter() - begin + sum(run.earlier for run in runs)
        result |= machine.provenance(trainer.device, seconds)
        from run import figures  # imported here, because Matplotlib takes a while
        figures.classification(result, out, "" if name == "classifier" else name)
        write_json(publication.json, result)
        print(metrics.accuracy_table(result))
        publication.complete([run.file for run in reversed(runs)])
    return 0


@script("classification.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 2 for an input that the user can fix, 130 after Ctrl-C."""
    machine.refuse_processes("classification.py")
    config, options = script_arguments(argv, Config, "classification.py", __doc__, HERE / "models", RUN_FLAGS | {
        "--bilstm": {"metavar": "FILE", "type": Path, "default": HERE / "models" / "bilstm.pt",
                     "help": "the biLM (default models/bilstm.pt)"},
        "--data": {"metavar": "FOLDER", "type": Path, "help": "own rows: train and test, as .csv, .tsv or .jsonl"},
        "--text": {"metavar": "COLUMN", "nargs": "+", "help": "--data: the columns of the text"},
        "--label": {"metavar": "COLUMN", "help": "--data: the column of the label"},
        "--tokenized": {"action": "store_true", "help": "--data, --predict: texts have spaces between their tokens"},
        "--classifier": {"metavar": "FILE", "type": Path, "help": "for --predict (default: classifier.pt in --out)"},
        "--predict": {"metavar": "TEXT", "help": "classify this text, or the lines of standard input (-)"},
        "--json": {"action": "store_true", "help": "--predict: print one JSON object per line"}})
    if options.predict is None:
        config, task = own_data(config, options)
        return classify(config, options, task=task)
    path = options.classifier or options.out / f"{config.stem}.pt"
    if not options.classifier and not path.exists():
        path = options.out / "classifier.pt"            # the name for own data, whatever the options
    load = partial(Classifier.load, path, options.bilstm, config.setting)
    inference.print_predictions(load, config.precision, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
