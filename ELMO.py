"""ELMo's bidirectional language model (Peters et al. 2018, arXiv:1802.05365), from news texts to models/bilstm.pt.

    sentence k: <s> w_1 .. w_n </s>
    forward LM   reads <s> w_1 .. w_n      predicts w_1 .. w_n </s>      sum_k log p(w_k | w_1 .. w_(k-1))
    backward LM  reads </s> w_n .. w_1     predicts w_n .. w_1 <s>       sum_k log p(w_k | w_(k+1) .. w_n)
    h_{k,0} = [x_k ; x_k]    h_{k,j} = [forward h_{k,j} ; backward h_{k,j}],  j = 1, 2

The two directions are two language models. They share the token representations x and the softmax, not the LSTMs, and
their states are only concatenated: layer 2 of nn.LSTM(bidirectional=True) would see the word that it has to predict.

Shapes: B sentences of a batch, T positions (longest sentence + 1 boundary symbol), N predicted tokens, V words,
E sampled words, H cells of an LSTM, P width of x and of every layer's output, D = 2 P width of a returned vector.

    python ELMO.py                                  the published run: models/bilstm.pt, pretraining.json and figures
    python ELMO.py --resume                         resume after an interruption, to the same weights bit for bit
    python ELMO.py --corpus PATH --out FOLDER       train on any plain text: a file, or a folder of .txt and .gz
    python ELMO.py --start FILE --corpus PATH --out FOLDER      go on from a trained biLM, on other texts
    python ELMO.py --embed FILE --out-file NAME.npy     write the vectors of a file's lines
    torchrun --nproc_per_node=2 ELMO.py             the same run, each batch shared by two processes
"""
import copy
import math
import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.ag_news import CACHE, split
from data.batches import Sampler, batches, collate, predicted_tokens, reverse_within_lengths
from data.characters import CharacterCNN
from data.inputs import Text, check_mix, check_text, check_texts, each_checked, nonempty_texts
from data.text import PAD, SPECIAL, Data, Encoded, Vocabulary, tokenize, tokenize_texts, warn_of_unknown
from data.word2vec import unit_variance, word2vec
from run import checkpoint, inference, machine, metrics, ngram
from run.files import InputError, folder_lock, write_json
from run.machine import autocast, upload
from run.metrics import DIRECTIONS
from run.optimization import Optimizers, check_loss, clip_gradients, dropout_mask, group, lr_factor
from run.options import RUN_FLAGS, check_options, option, script, script_arguments, take_options
from run.progress import Run
from run.publication import Publication, options_of_weights

HERE = Path(__file__).resolve().parent
FORMAT = "elmo-bilm-2"                  # of bilstm.pt; renamed whenever the file's meaning changes
LAYERS = 2                              # LSTM layers of each direction
INITIAL_STD = 0.05                      # of the word table's entries: rows of norm about 1 at P = 448
BETAS = (0.9, 0.99)                     # Adam's decay of the mean gradient and of the mean squared gradient
CLIP = 0.25                             # largest norm of the whole gradient
MEASURED_TRAINING_ROWS = 4000           # a sample, on which the finished model is measured
REMOVED = {"beta1", "beta2", "clip"}    # options that older files hold; training alone used them
MODEL_OPTIONS = ("representation", "width", "hidden", "freeze_word2vec")      # those that --start takes from its file


# ---------------------------------------------------------------------------------------------------- options
@dataclass(frozen=True)
class Config:
    """The options of model and training. The defaults are the published run; InputError if one is out of range."""
    representation: str = option("embedding", "what x is made from", choices=("embedding", "word2vec", "char"))
    width: int = option(448, "P: width of x and of every layer's output; `hidden` if that is less", min=1, max=8192)
    hidden: int = option(448, "H: cells of each LSTM; their output is projected to P if H > P", min=1, max=65536)
    dropout: float = option(0.3, "dropout probability; a sentence loses the same units at all positions", max=0.95)
    word_dropout: float = option(0.05, "probability that an input word becomes zeros", max=0.95)
    min_count: int = option(3, "smallest count in the training rows for a word of the vocabulary", min=1)
    freeze_word2vec: bool = option(False, "word2vec: x stays fixed, and the softmax learns a table of its own")
    rows: int = option(0, "use only the first rows of train.csv, validation rows included; 0: all")
    validation: int = option(4000, "rows of train.csv that are not trained on and choose the best epoch")
    epochs: float = option(12.0, "passes over the training rows", max=100_000)
    batch_tokens: int = option(3000, "positions (B x T) of a batch", min=1)
    negatives: int = option(2048, "E: sampled words per step; V or more: the full softmax", min=1)
    lr: float = option(8e-3, "peak learning rate of AdamW, for the LSTMs and the character network", max=10)
    table_lr: float = option(1.6e-2, "peak learning rate of SparseAdam, for word table and softmax bias", max=10)
    weight_decay: float = option(0.1, "AdamW's weight decay, for all weights and biases that `lr` trains", max=10)
    precision: str = option("auto", "type of matrix products; auto: bf16 if faster", choices=("auto", "fp32", "bf16"))
    seed: int = option(0, "random seed of rows, weights, batches, dropout and sampled words", max=2**31)
    log_every: int = option(100, "steps between log lines", min=1)
    save_every: float = option(300.0, "seconds between resume states")
    track: str = option("none", "also log to a tracker, in --out", choices=("none", "tensorboard", "wandb"))

    def __post_init__(self):
        check_options(self)
        object.__setattr__(self, "width", min(self.width, self.hidden))     # a projection never widens

    @property
    def tied(self) -> bool:
        """True if x and the softmax use one table, False if x is made from characters or is frozen Word2Vec vectors."""
        return self.representation == "embedding" or (self.representation == "word2vec" and not self.freeze_word2vec)


# ------------------------------------------------------------------------------------------------------ model
def lstm_layers(config: Config) -> nn.ModuleList:
    """The LSTM layers of one direction, one module each, so that the states of every layer are visible."""
    projection = config.width if config.hidden > config.width else 0
    layers = nn.ModuleList()
    for _ in range(LAYERS):
        lstm = nn.LSTM(config.width, config.hidden, proj_size=projection)
        nn.init.zeros_(lstm.bias_ih_l0)
        nn.init.zeros_(lstm.bias_hh_l0)
        nn.init.ones_(lstm.bias_ih_l0.data[config.hidden:2 * config.hidden])    # the forget gate (Jozefowicz 2015)
        layers.append(lstm)
    return layers


class BiLM(nn.Module):
    """The forward and the backward language model, with the token representations and the softmax that they share.

    table (V, P): the rows are the softmax weights and, if tied, also the token representations; static (V, P): only
    with frozen Word2Vec, its vectors; bias (V, 1) of the softmax, a column so that F.embedding can look it up.
    """

    def __init__(self, config: Config, vocabulary_size: int):
        super().__init__()
        self.config = config
        self.sparse = True              # the table's gradient holds only the rows that were looked up
        self.table = nn.Parameter(INITIAL_STD * torch.randn(vocabulary_size, config.width))
        self.bias = nn.Parameter(torch.zeros(vocabulary_size, 1))
        if config.representation == "char":
            self.characters = CharacterCNN(config.width)
        elif not config.tied:
            self.register_buffer("static", INITIAL_STD * torch.randn(vocabulary_size, config.width))
        self.forward_lstms = lstm_layers(config)
        self.backward_lstms = lstm_layers(config)
        self.set_trainable()

    def set_trainable(self) -> "BiLM":
        """Lets all weights learn except the second bias of each LSTM, which stays zero; returns self.

        nn.LSTM adds two biases with the same gradient, so together they would learn at twice the rate.
        """
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("bias_hh" not in name)
        return self

    def lstms(self, d: int) -> nn.ModuleList:
        """The layers of direction d: 0 forward, 1 backward."""
        return self.forward_lstms if d == 0 else self.backward_lstms

    def layer_weights(self, j: int) -> list[nn.Parameter]:
        """Weights of layer j that learn, both directions; 0: character network (no word table), 1 and 2: LSTMs."""
        if j == 0:
            return list(self.characters.parameters()) if self.config.representation == "char" else []
        lstms = nn.ModuleList([self.forward_lstms[j - 1], self.backward_lstms[j - 1]])
        return [weight for weight in lstms.parameters() if weight.requires_grad]

    def lstm_weights(self, d: int) -> list[nn.Parameter]:
        """The weights that learn in the LSTMs of direction d."""
        return [weight for weight in self.lstms(d).parameters() if weight.requires_grad]

    def represent(self, ids: Tensor, chars: Tensor | None = None) -> Tensor:
        """(..., P) representations, on the model's device; ids (...) and chars (of all distinct tokens) on the CPU."""
        device = self.table.device
        if self.config.representation == "char":
            types, place = torch.unique(ids, return_inverse=True)           # each type goes through the network once
            x = self.characters(upload(chars[types], device)).to(self.table.dtype)
            return F.embedding(upload(place, device), x)
        ids = upload(ids, device)
        if self.config.tied:
            return F.embedding(ids, self.table, sparse=self.sparse)
        return F.embedding(ids, self.static)

    def states(self, d: int, x: Tensor, masks: Sequence[Tensor] | None = None) -> list[Tensor]:
        """[h_0, h_1, h_2], each (T, B, P): all layers of direction d over representations x (T, B, P).

        masks, for dropout: one per layer, (1, B, P), the same at every position; with word dropout, first (T, B, P).
        """
        h = x if masks is None else x * masks[0]
        states = [h]
        for j, lstm in enumerate(self.lstms(d)):
            new, _ = lstm(h)                                                # (T, B, P)
            if masks is not None:
                new = new * masks[j + 1]
            h = new if j == 0 else new + h                                  # skip connection, as in the paper
            states.append(h)
        return states

    def join(self, forward: list[Tensor], backward: list[Tensor], lengths: Tensor) -> Tensor:
        """(3, T - 1, B, 2P) vectors of the words in reading order, without boundaries, from both directions' states.

        In the forward model position 0 is <s>, so its state at position k has just read word k. The backward model
        reads word n first, so its states are reversed within each sentence. lengths (B,).
        """
        dtype = forward[-1].dtype                               # h_0 is fp32, the others may be bf16 or fp16
        layers = []
        for forward_h, backward_h in zip(forward, backward, strict=True):
            in_reading_order = reverse_within_lengths(backward_h[1:], lengths)
            layers.append(torch.cat([forward_h[1:], in_reading_order], dim=-1).to(dtype))
        return torch.stack(layers)

    def contextual(self, encoded: Encoded, rows: np.ndarray, dtype: torch.dtype = torch.float32,
                   masks=(None, None), run_both: Callable = map) -> Tensor:
        """(3, T - 1, B, 2P) vectors of all layers of some rows, with matrix products in `dtype`.

        masks: of each direction, as `states` takes them; run_both: `map`, or one like it that runs both side by side.
        """
        device = self.table.device
        learns = torch.is_grad_enabled()
        ids, _ = collate(encoded, rows)                                     # (2, T, B)
        lengths = torch.from_numpy(encoded.lengths[rows])
        with autocast(device, dtype):
            x = self.represent(ids, encoded.chars)

        def run(d: int) -> list[Tensor]:
            with autocast(device, dtype), torch.set_grad_enabled(learns):       # both hold for one thread only
                return self.states(d, x[d], masks[d])

        forward, backward = run_both(run, range(2))
        return self.join(forward, backward, upload(lengths, device))


class ScalarMix(nn.Module):
    """Scaled, weighted average of the biLM's layers: gamma * sum_j s_j h_j, with s = softmax(w).

    Equation 1 of Peters et al. 2018. The weights s_j are also called lambda_j.
    """

    def __init__(self, layers: int = LAYERS + 1):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(layers))
        self.gamma = nn.Parameter(torch.ones(()))

    def forward(self, layers: Tensor) -> Tensor:
        weights = self.gamma * self.w.softmax(dim=0)                                        # (3,)
        return torch.einsum("j,jtbd->tbd", weights.to(layers.dtype), layers)                # (3, T, B, D) -> (T, B, D)


# ------------------------------------------------------------------------------------------------------- loss
def sampled_nll(h: Tensor, y: Tensor, table: Tensor, bias: Tensor, sampled: Tensor, log_pi: Tensor) -> Tensor:
    """(N,) negative log-likelihoods of targets y (N,) given states h (N, P), by a softmax over y and E sampled words.

        nll = log Z - s_y        Z = exp(s_y) + sum over sampled w != y of exp(s_w) / pi_w

    s_w = h . table_w + bias_w is the logit of word w, and pi_w the probability that w is in the sample (see `Sampler`).
    A word that is sampled with probability 1/10 counts ten times, since nine times of ten it is absent. So the expected
    value of Z is the sum of the full softmax (Horvitz and Thompson 1952). sampled (E,): distinct ids; log_pi (E,).
    """
    target_rows = F.embedding(y, table, sparse=True)                                    # (N, P)
    target_bias = F.embedding(y, bias, sparse=True)[:, 0]                               # (N,)
    target = (h.float() * target_rows).sum(dim=1) + target_bias                         # (N,) the logits s_y
    words = F.embedding(sampled, table, sparse=True)                                    # (E, P)
    offset = F.embedding(sampled, bias, sparse=True)[:, 0] - log_pi                     # (E,)
    logits = (h @ words.to(h.dtype).t()).float() + offset                               # (N, E)
    logits.masked_fill_(sampled == y[:, None], -torch.inf)              # a target that was sampled must not count twice
    return torch.logaddexp(target, logits.logsumexp(dim=1)) - target


# ------------------------------------------------------------------------------------------------- evaluation
def score_batch(model: BiLM, encoded: Encoded, dtype: torch.dtype, details: bool, rows: np.ndarray) -> list[tuple]:
    """For each direction the arrays (row, nll) of every predicted token, with details also (gold, best, rank)."""
    device = model.table.device
    ids, y = collate(encoded, rows)
    directions = []
    with torch.no_grad(), autocast(device, dtype):
        x = model.represent(ids, encoded.chars)                                 # (2, T, B, P)
        for d in range(2):
            place, gold = predicted_tokens(y[d])
            h = model.states(d, x[d])[-1].flatten(0, 1)[upload(place, device)]  # (T, B, P) -> (N, P)
            scores = metrics.full_softmax_nll(h, upload(gold, device), model.table, model.bias, details)
            row = rows[place.numpy() % len(rows)]                       # place = position * B + sentence
            directions.append((row, *(values.cpu().numpy() for values in scores)))
    return directions


def score_rows(model: BiLM, encoded: Encoded, rows: np.ndarray, dtype: torch.dtype = torch.float32,
               details: bool = False) -> metrics.Scores:
    """Scores of some rows by the full softmax, without dropout; the same in any batch, up to rounding."""
    lengths = encoded.lengths[rows]
    parts = [rows[part] for part in batches(lengths, 3000)]
    scores = machine.map_on_cores(partial(score_batch, model, encoded, dtype, details), parts, model.table.device)
    return metrics.Scores.of(rows, lengths + 1, scores)


# --------------------------------------------------------------------------------------------------- training
class Gradients(NamedTuple):
    """Of one direction: summed nll, and gradients of nll / targets; targets: predicted tokens of the whole step."""
    nll: Tensor
    table: Tensor               # sparse, like that of the bias
    bias: Tensor
    x: Tensor                   # (T, B, P)
    lstms: list[Tensor]


class Trainer:
    """The model, its optimizers, and one training step. Every random number of a step comes from (seed, step).

    The two directions share what makes x, the table and the bias, but no LSTM; on a CPU they run in two threads.
    Each gets its half of x detached, that is, cut off from what made x, so that no two threads walk through one graph.
    Then `collect` adds up their gradients, and carries that of x on into the table or the character network.
    """
    unit = "tokens"                 # of the progress bar

    def __init__(self, config: Config, data: Data, device: torch.device, start: "ELMo | None" = None):
        self.config = config
        self.data = data
        self.device = device
        self.start = start                                  # the biLM to go on from; its words have the first ids
        self.rank, self.world = machine.join_processes()
        self.dtype = machine.compute_dtype(config.precision, device)
        machine.keep_freed_memory()                         # saves up to a quarter of a step
        self.workers = machine.Workers(2, device)
        counts = data.counts()
        self.model = self.new_model(counts).to(device)
        self.sparse = [self.model.table, self.model.bias]       # their gradients hold only the rows that a step used
        self.dense = [weight for name, weight in self.model.named_parameters()
                      if weight.requires_grad and name not in ("table", "bias")]
        self.optimizers = Optimizers([group(self.dense, config.lr, config.weight_decay)],
                                     [group(self.sparse, config.table_lr)], BETAS)
        self.sampler = Sampler(counts, config.negatives, config.seed)
        self.log_pi = self.sampler.log_pi.to(device)
        self.lengths = data.encoded.lengths[data.train]
        self.start_epoch(0)
        self.per_epoch = len(self.batches)                  # the same in every epoch: the lengths decide it
        self.interval = self.per_epoch                      # steps between evaluations
        self.steps = max(1, round(config.epochs * self.per_epoch))

    def new_model(self, counts: np.ndarray) -> BiLM:
        """A model with random weights, a softmax bias of log frequencies, and Word2Vec's vectors if they are wanted.

        With `start`, all weights are copied from that biLM; only the rows of new words keep the values above.
        """
        model = machine.seeded(self.config.seed, partial(BiLM, self.config, len(self.data.words)))
        frequency = np.maximum(counts, 0.5) / counts.sum()                  # 0.5 for a word that does not occur
        model.bias.data[:, 0] = torch.from_numpy(np.log(frequency))
        if self.config.representation == "word2vec":
            vectors = word2vec(self.data, self.config.width, self.config.seed)
            table = model.table if self.config.tied else model.static
            if vectors:
                table.data[list(vectors)] = INITIAL_STD * torch.from_numpy(unit_variance(vectors))
        if self.start is not None:
            trained = self.start.model.state_dict()
            for name, value in model.state_dict().items():      # `value` shares its memory with the model
                value[:len(trained[name])] = trained[name]      # the old words have the first rows
        return model

    def start_epoch(self, epoch: int) -> None:
        """New batches, and a new order of the words in the sampler."""
        generator = np.random.default_rng([self.config.seed, epoch])
        self.epoch = epoch
        self.batches = batches(self.lengths, self.config.batch_tokens, generator)
        self.sampler.shuffle(epoch)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Input ids and targets y (2, T, B) of a step, the rows of all processes."""
        epoch, number = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.start_epoch(epoch)
        return collate(self.data.encoded, self.data.train[self.batches[number]])

    def own(self, batch: Tensor) -> Tensor:
        """This process's share of a batch (2, T, B, ...): with W processes, every W-th sentence."""
        return batch[:, :, self.rank::self.world]

    def masks(self, step: int, T: int, B: int) -> list[tuple[Tensor, ...]]:
        """For each direction dropout masks of h_0, h_1 and h_2, (1, B, P); with word dropout the first is (T, B, P)."""
        generator = machine.random_generator(self.device, self.config.seed * 1_000_003 + step)
        shape = (2, 1, B, self.config.width)
        masks = [self.own(dropout_mask(self.config.dropout, shape, generator)) for _ in range(LAYERS + 1)]
        if self.config.word_dropout:
            masks[0] = masks[0] * self.own(dropout_mask(self.config.word_dropout, (2, T, B, 1), generator))
        return list(zip(*masks, strict=True))                                           # by direction

    def direction(self, d: int, x: Tensor, y: Tensor, masks: Sequence, sampled: Tensor, targets: int) -> Gradients:
        """The nll of direction d over its x (T, B, P) and y (T, B), and the gradients of nll / targets."""
        place, gold = (upload(part, self.device) for part in predicted_tokens(y))    # (N,), found on the CPU
        with autocast(self.device, self.dtype):
            h = self.model.states(d, x, masks)[-1].flatten(0, 1)[place]                         # (T, B, P) -> (N, P)
            nll = sampled_nll(h, gold, self.model.table, self.model.bias, sampled, self.log_pi[sampled]).sum()
        weights = [self.model.table, self.model.bias, x, *self.model.lstm_weights(d)]
        # divided here, not before: a GPU's LSTMs may compute in fp16, in which small gradients become 0
        table, bias, dx, *lstms = (gradient / targets for gradient in torch.autograd.grad(nll, weights))
        return Gradients(nll.detach(), table, bias, dx, lstms)

    @machine.torch_threads(1)
    def step(self, step: int) -> tuple[Tensor, Tensor, int]:
        """One update; returns (nll, gradient norm, predicted tokens) of both directions and all processes."""
        # batch
        ids, y = self.batch(step)                                                       # (2, T, B)
        targets = int((y != PAD).sum())
        masks = self.masks(step, *ids.shape[1:])
        u = np.random.default_rng([self.config.seed, step, 2]).random()    # decides the whole sample, see Sampler
        sampled = upload(self.sampler.draw(u), self.device)
        # loss and gradients: self.direction(d, inputs[d], y[d], masks[d]) for d = 0, 1; on a CPU at the same time
        with autocast(self.device, self.dtype):
            x = self.model.represent(self.own(ids), self.data.encoded.chars)                        # (2, T, B, P)
        inputs = [x[d].detach().requires_grad_() for d in range(2)]
        direction = partial(self.direction, sampled=sampled, targets=targets)
        forward, backward = self.workers.map(direction, range(2), inputs, self.own(y), masks)
        nll = self.collect(x, forward, backward)
        # clip
        norm = clip_gradients([*self.dense, *self.sparse], CLIP)
        if self.device.type == "cpu":       # Run reads a GPU's numbers later, because reading them takes time
            check_loss(nll, norm, targets, step, step)
        # update, with linear warm-up and then a cosine
        self.optimizers.step(lr_factor(step, self.steps))
        return nll, norm, targets

    def collect(self, x: Tensor, forward: Gradients, backward: Gradients) -> Tensor:
        """Puts both directions' gradients into .grad, summed over processes; returns the summed nll."""
        self.model.table.grad = forward.table + backward.table
        self.model.bias.grad = forward.bias + backward.bias
        for d, gradients in enumerate((forward, backward)):
            for weight, gradient in zip(self.model.lstm_weights(d), gradients.lstms, strict=True):
                weight.grad = gradient
        if x.requires_grad:
            x.backward(torch.stack([forward.x, backward.x]))    # adds to table.grad, or fills the CharacterCNN's .grad
        return machine.sum_gradients([*self.dense, *self.sparse], forward.nll + backward.nll)

    def identity(self) -> dict:
        """What a resumed run must share with the run that it continues."""
        source = {"data": self.data.digest, "start": self.start and self.start.digest}
        return options_of_weights(self.config) | source | {"format": FORMAT}

    def state(self) -> dict:
        """Everything that the next step depends on, beside the identity and what Run saves (step, precision)."""
        return {"model": self.model.state_dict(), "optimizers": self.optimizers.state_dict()}

    def load_state(self, state: dict) -> None:
        """The inverse of `state`."""
        self.model.load_state_dict(state["model"])
        self.optimizers.load_state_dict(state["optimizers"])


def train(trainer: Trainer, resume_file: Path | None = None, resume: bool = False) -> Run:
    """The training loop. The returned Run holds the weights of the epoch that is best on the validation rows."""
    data = trainer.data
    def evaluate(train_nll: float) -> tuple[float, dict, str]:
        """(number to minimize, history entry, sentence). Number: validation nll, or -step without validation rows."""
        entry = {"train_perplexity": math.exp(train_nll)}
        if len(data.validation) == 0:
            return -run.step, entry, metrics.perplexity_sentence(entry)         # so the last epoch counts as the best
        forward, backward = score_rows(trainer.model, data.encoded, data.validation, trainer.dtype).perplexity()
        entry["validation_perplexity"] = [forward, backward]
        return (math.log(forward) + math.log(backward)) / 2, entry, metrics.perplexity_sentence(entry)

    with Run(trainer, resume_file, resume) as run:
        for step in range(run.step, trainer.steps + 1):     # `step` steps are done; the last round only evaluates
            if run.due(step):                   # an epoch, or the training, has just ended
                run.save_best(evaluate)
            if run.stop():                      # the end of training, or Ctrl-C
                break
            run.count(*trainer.step(step))      # progress, log line, resume state
    return run


def adapt(start: "ELMo", texts: Sequence[Text], config: Config, cache: Path | None = None, *resuming) -> Run:
    """Trains a biLM further on texts, a tenth of them for validation; new words are added. resuming: as in `train`."""
    tokens = tokenize_texts(texts, cache)
    train_rows, validation_rows = split(len(tokens), len(tokens) // 10, config.seed)
    data = Data.of_tokens(tokens, config, train_rows, validation_rows, start.words)
    return train(Trainer(config, data, start.device, start), *resuming)


# ------------------------------------------------------------------------------------------------------- ELMo
class ELMo:
    """A trained biLM: texts in, vectors or perplexities out.

        elmo = ELMo.load("models/bilstm.pt")
        elmo.embed(["Oil prices fall."])[0]         # (3, 4, D): layer 0 is [x ; x], layers 1 and 2 [forward ; backward]

    A text is a string, or a list of tokens, which are normalized and lower-cased but never split: one vector per token.
    """

    def __init__(self, config: Config, words: Vocabulary, model: BiLM, history=(), scores=None, digest=None):
        self.config = config
        self.words = words
        self.model = model.eval().requires_grad_(False)
        self.history = list(history)
        self.metrics = scores or {}
        self.digest = digest                    # of the file; None if it was not saved yet
        self.device = model.table.device

    @classmethod
    def load(cls, path: str | Path, device: str | None = None) -> "ELMo":
        """The biLM of a file made by `save` or ELMO.py; InputError if the file is missing, damaged or does not fit.

        device: "cpu", or "cuda", which is the default if there is a GPU.
        """
        device = machine.find_device(device)
        content = checkpoint.read_published(path, FORMAT, {"config", "words", "history", "metrics"})
        with checkpoint.fitting(path):
            return cls.from_parts(content["config"], content["words"], content["weights"], device, content["history"],
                                  content["metrics"], content["digest"])

    @classmethod
    def from_parts(cls, options: dict, words: list, weights: dict[str, Tensor], device: torch.device, *about) -> "ELMo":
        """The biLM of a file's parts; exceptions of any kind if they do not fit. about: history, metrics, digest."""
        if words[:len(SPECIAL)] != SPECIAL or len(words) != len(weights["table"]):
            raise ValueError("the vocabulary does not fit the weights")
        config = Config(**{name: options[name] for name in options.keys() - REMOVED})
        with torch.device("meta"):              # allocates nothing before the sizes are known to fit
            model = BiLM(config, len(words))
        model.load_state_dict({re.sub(r"^(forward|backward)\.", r"\1_lstms.", name): value.float()
                               for name, value in weights.items()}, assign=True)     # forward.0.x -> forward_lstms.0.x
        return cls(config, Vocabulary(words), model.to(device), *about)

    @classmethod
    def train(cls, texts: Sequence[Text], config: Config | None = None, device: str | None = None) -> "ELMo":
        """Trains a biLM on any texts, as the script does. A tenth, at most `validation`, picks the epoch."""
        device = machine.find_device(device)
        texts = nonempty_texts(texts)
        config = config or Config()
        config = replace(config, rows=len(texts), validation=min(config.validation, len(texts) // 10))
        train_rows, validation_rows = split(len(texts), config.validation, config.seed)
        return cls.from_run(train(Trainer(config, Data.of(texts, config, train_rows, validation_rows), device)))

    def adapt(self, texts: Sequence[Text], epochs: float = 2.0, lr: float = 2e-3) -> "ELMo":
        """A new ELMo, trained further on nine tenths of the texts; adds words found there twice. lr: the peak rate."""
        config = replace(self.config, epochs=epochs, lr=lr, table_lr=lr, min_count=2)
        return ELMo.from_run(adapt(self, nonempty_texts(texts), config))

    @classmethod
    def from_run(cls, run: Run) -> "ELMo":
        """An ELMo with a run's best weights, rounded to half precision: what is measured is what the file holds."""
        if not run.finished:
            raise KeyboardInterrupt             # in a notebook, Ctrl-C stopped it
        trainer = run.trainer
        best = run.best or trainer.model.state_dict()
        trainer.model.load_state_dict({name: value.half().float() for name, value in best.items()})
        return cls(trainer.config, trainer.data.words, trainer.model, run.history)

    def save(self, path: str | Path) -> None:
        """Writes tensors in half precision and plain types, the whole file or nothing; sets `digest`."""
        self.digest = checkpoint.write_published(path, {
            "format": FORMAT, "config": asdict(self.config), "words": self.words.words, "weights": self.weights(),
            "history": self.history, "metrics": self.metrics})

    def weights(self) -> dict[str, Tensor]:
        """Half-precision weights, named as in the file: "forward.0.weight_ih_l0" for forward_lstms.0.weight_ih_l0."""
        return {name.replace("_lstms.", "."): value.cpu().half() for name, value in self.model.state_dict().items()}

    def tokenize(self, text: Text) -> list[str]:
        """["oil", "prices", "fall", "."] for "Oil prices fall."; a list of tokens keeps its length."""
        return tokenize(check_text(text, "text"))

    def encode(self, texts: Sequence[Text]) -> Encoded:
        """Texts as `collate` and `score_rows` take them."""
        return Encoded.of(tokenize_texts(texts), self.words, self.config.representation)

    def embed(self, texts: Sequence[Text], precision: str = "fp32", layers: str | int = "all") -> list[Tensor]:
        """One float32 CPU tensor per text, without boundary symbols; (3, 0, D) or (0, D) for a text without tokens.

        layers: "all" gives (3, tokens, D); "average", "top", 0, 1 and 2 give (tokens, D). InputError names bad texts.
        """
        return list(self.embed_stream(check_texts(texts), precision, layers=layers))

    def embed_stream(self, texts: Iterable[Text], precision: str = "fp32", window: int = 512,
                     layers: str | int = "all") -> Iterator[Tensor]:
        """The same tensors one by one, in order, from any iterable; memory holds `window` texts at a time.

        precision: "fp32", or "bf16", which is used only if it is faster on this machine, otherwise fp32.
        """
        texts = each_checked(texts)
        if precision not in ("fp32", "bf16"):
            raise InputError(f"precision is {precision!r}; expected fp32 or bf16")
        inference.check_layers(layers, LAYERS)
        fast = precision == "bf16" and machine.fast_bf16(self.device)
        dtype = torch.bfloat16 if fast else torch.float32
        return self.embed_windows(texts, window, partial(self.embed_batch, dtype=dtype, layers=layers))

    def embed_windows(self, texts: Iterator[Text], window: int, embed: Callable) -> Iterator[Tensor]:
        """The tensors of all texts, `window` texts at a time, computed in batches of about equal length."""
        while chunk := list(islice(texts, window)):
            encoded = self.encode(chunk)
            parts = batches(encoded.lengths, 1500 if self.device.type == "cpu" else 6000)
            found = machine.map_on_cores(partial(embed, encoded), parts, self.device)
            vectors = list(chain.from_iterable(found))
            for place in np.argsort(np.concatenate(parts)):         # place of row 0, 1, .. in `vectors` (batch order)
                yield vectors[place]

    @torch.no_grad()
    def embed_batch(self, encoded: Encoded, rows: np.ndarray, dtype: torch.dtype, layers: str | int) -> list[Tensor]:
        """One float32 CPU tensor per row: (3, tokens, D), or (tokens, D) of a chosen layer."""
        h = self.model.contextual(encoded, rows, dtype).float()                             # (3, T - 1, B, D)
        h = inference.choose_layers(h, layers).transpose(-3, -2).cpu()                      # (.., B, T - 1, D)
        return [h[..., b, :n, :].clone() for b, n in enumerate(encoded.lengths[rows])]

    def sentences(self, texts: Sequence[Text], precision: str = "fp32") -> Tensor:
        """(texts, D) float32 CPU tensor: each text's mean over tokens of the average layer; zeros without tokens."""
        stream = self.embed_stream(texts, precision, layers="average")
        means = [vectors.sum(dim=0) / max(1, len(vectors)) for vectors in stream]
        return torch.stack(means) if means else torch.zeros(0, 2 * self.config.width)

    def score(self, texts: Sequence[Text], per_text: bool = False) -> dict | list[dict]:
        """{"forward": {"nats", "tokens", "unknown", "perplexity"}, "backward": ..} of all texts by the full softmax.

        nats: summed negative log-likelihood; tokens: words and an end symbol per text; unknown: those that are <unk>,
        with a warning if a fifth or more are. per_text: a list, one dictionary per text.
        """
        encoded = self.encode(check_texts(texts))
        rows = np.arange(len(encoded.tokens))
        warn_of_unknown(encoded.unknown(), "tokens")
        scores = score_rows(self.model, encoded, rows)
        if per_text:
            return [scores.totals(encoded.unknown_tokens, slice(row, row + 1)) for row in rows]
        return scores.totals(encoded.unknown_tokens)

    def layer(self, mix: str | Sequence[float] = "trainable", finetune: bool = False) -> "ELMoLayer":
        """An nn.Module for a model of your own; see ELMoLayer."""
        return ELMoLayer(self, mix, finetune)


class ELMoLayer(ScalarMix):
    """ELMo as a part of another model: texts -> their mixed layers.

        layer = elmo.layer()
        vectors, mask = layer(["Oil prices fall.", ["Goal", "!"]])      # (2, 4, D), (2, 4): True for tokens

    mix: "trainable", w and gamma learn; "frozen", w is drawn by torch's generator and stays; or three weights, which
    stay. finetune: a copy of the biLM learns too, with dense gradients, which every optimizer takes; otherwise it is no
    part of parameters() and state_dict(). There is no dropout.
    """

    def __init__(self, elmo: ELMo, mix: str | Sequence[float], finetune: bool):
        super().__init__()
        self.words = elmo.words
        self.finetune = finetune
        bilm = copy.deepcopy(elmo.model)
        if finetune:
            self.bilm = bilm.set_trainable().train()                        # a GPU's LSTM learns in this mode only
            bilm.sparse = False
            bilm.bias.requires_grad_(False)                                 # it is for the softmax, which is not used
            bilm.table.requires_grad_(bilm.config.tied)
        else:
            vars(self)["bilm"] = bilm           # by `self.bilm = bilm`, nn.Module would make it a part of this module
        mix = check_mix(mix, LAYERS + 1)
        if mix == "frozen":
            nn.init.normal_(self.w)
        elif mix != "trainable":
            weights = torch.tensor(mix)
            self.gamma.data = weights.sum()
            self.w.data = (weights / self.gamma.data).log()                 # so that gamma softmax(w) is `weights`
        for parameter in (self.w, self.gamma):
            parameter.requires_grad_(mix == "trainable")

    def _apply(self, move: Callable, recurse: bool = True) -> "ELMoLayer":
        """What .to(device) calls; here it also moves a biLM that is no part of this module."""
        if not self.finetune:
            self.bilm._apply(move, recurse)
        return super()._apply(move, recurse)

    def forward(self, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
        """(B, T, D) vectors, zeros at padding, and (B, T) bool mask, True for tokens."""
        texts = nonempty_texts(texts)
        encoded = Encoded.of(tokenize_texts(texts), self.words, self.bilm.config.representation)
        layers = self.bilm.contextual(encoded, np.arange(len(texts)))       # (3, T, B, D), T: without boundaries
        lengths = torch.from_numpy(encoded.lengths)[:, None]                                # (B, 1)
        mask = upload(torch.arange(layers.shape[1]) < lengths, layers.device)               # (B, T)
        vectors = super().forward(layers).transpose(0, 1)                                   # (B, T, D)
        return vectors * mask[:, :, None], mask


# ------------------------------------------------------------------------------------------------ publication
def measure(elmo: ELMo, data: Data) -> tuple[dict, dict]:
    """(splits, confusion) of pretraining.json: the finished model on training, validation and test rows."""
    parts = data.parts(MEASURED_TRAINING_ROWS, elmo.config.seed)
    fresh = data.fresh()
    splits = {}
    scores = {}
    for name, (encoded, rows) in parts.items():
        scores[name] = score_rows(elmo.model, encoded, rows, details=True)
        splits[name] = scores[name].metrics()
        if name in fresh and fresh[name].any():
            splits[name]["fresh"] = scores[name].metrics(fresh[name])
    flat = {name: encoded.flat(rows) for name, (encoded, rows) in parts.items()}
    ngram.add_perplexities(splits, data.encoded.flat(data.train), flat, fresh, len(data.words))
    _, gold, best, _ = scores["test"].words[0]              # of the forward model; see Scores
    return splits, metrics.word_confusion(gold, best, data.words.words)


def publish(run: Run, out: Path, begin: float) -> None:
    """Measures a finished run, writes OUT/bilstm.pt, figures, OUT/pretraining.json; begin: perf_counter() at start.

    Besides `machine.provenance`, pretraining.json has: config, betas and clip (BETAS and CLIP), precision,
    tokens_per_second (both directions), vocabulary, parameters, file_mb, digest (of bilstm.pt), data (digest of the
    tokens), start (digest of --start), unknown (share of <unk>), history of the epochs, splits.{train (a sample),
    validation, test}: rows, tokens, unigram_perplexity, and for each direction the metrics of `run.metrics.Scores` and
    kneser_ney_perplexity; `fresh` has the same without near copies of training rows; confusion {words, counts}: of the
    forward model on test rows, rows gold, columns predicted. `splits` measures the file's half-precision weights.
    """
    trainer = run.trainer
    elmo = ELMo.from_run(run)
    splits, confusion = measure(elmo, trainer.data)
    elmo.metrics = {name: {d: part[d]["perplexity"] for d in DIRECTIONS} for name, part in splits.items()}
    elmo.save(out / "bilstm.pt")
    targets = 2 * (trainer.lengths + 1).sum() * trainer.steps / trainer.per_epoch
    result = machine.provenance(trainer.device, time.perf_counter() - begin + run.earlier) | {
        "config": asdict(elmo.config), "betas": BETAS, "clip": CLIP, "precision": run.precision,
        "tokens_per_second": float(targets / run.seconds), "vocabulary": len(elmo.words),
        "parameters": sum(weight.numel() for weight in elmo.model.state_dict().values()),
        "file_mb": (out / "bilstm.pt").stat().st_size / 1e6, "digest": elmo.digest,
        "data": trainer.data.digest, "start": trainer.start and trainer.start.digest,
        "unknown": trainer.data.unknown(), "history": elmo.history, "splits": splits, "confusion": confusion}
    from run import figures  # imported here, because Matplotlib takes a while
    figures.pretraining(result, out)
    write_json(out / "pretraining.json", result)
    print(metrics.perplexity_table(result))


# ------------------------------------------------------------------------------------------------------- main
def pretrain(config: Config, options: Namespace) -> int:
    """Runs the command: reads AG News or --corpus, trains, measures, writes OUT. Returns the exit status."""
    begin = time.perf_counter()
    out = options.out
    start = ELMo.load(options.start) if options.start else None
    if start is not None:
        config = take_options(config, start.config, MODEL_OPTIONS, options.given, options.start)
    publication = Publication("bilstm", config, options)
    data = Data.read(config, options, CACHE, start and start.words)
    first = machine.join_processes()[0] == 0
    with folder_lock(out) if first else nullcontext():          # only the first process writes
        if publication.finished({"data": data.digest, "start": start and start.digest}):
            return 0
        trainer = Trainer(config, data, machine.find_device(), start)
        if first:
            print(data.summary(), flush=True)
        run = train(trainer, publication.state_file(trainer.identity()), options.resume)
        if not run.finished:
            return 130
        if first:
            publish(run, out, begin)
            publication.complete([run.file])
    return 0


@script("ELMO.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Trains, or embeds a file. Exit status 0, 2 for an input that the user can fix, 130 after Ctrl-C."""
    flags = RUN_FLAGS | inference.EMBED_FLAGS | {
        "--corpus": {"metavar": "PATH", "help": "train on the lines of this file, or of a folder's .txt and .gz files"},
        "--start": {"metavar": "FILE", "help": "go on from this biLM: its weights, words and model options"},
        "--tokenized": {"action": "store_true", "help": "--corpus, --embed: the text has spaces between its tokens"}}
    config, options = script_arguments(argv, Config, "ELMO.py", __doc__, HERE / "models", flags)
    if options.embed is None and options.out_file is None:
        return pretrain(config, options)
    inference.embed_file(partial(ELMo.load, options.out / "bilstm.pt"), config.precision, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
