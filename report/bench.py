"""How fast this machine trains, embeds, classifies, tokenizes and starts, idle and beside a busy process.

    python report/bench.py                              the published models on the real rows, 8 minutes on two cores
    python report/bench.py --quick                      shorter measures, 3 minutes
    python report/bench.py --hidden 96 --rows 9000      any option of ELMO.py, for the training that is measured

OUT/bench.json has the median over three repeats of every number. Each repeat runs all measures once, the second repeat
in the opposite order. A warm-up before the first repeat does not count. Ratios are taken within a repeat.

Measured on machine.device, which is the GPU if there is one:
    tokens_per_second: training by ELMO.py; targets of both directions, end symbols included, padding left out
    classification_rows_per_second: training by classification.py, nine heads on the frozen biLM
    busy_tokens_per_second, busy_classification_rows_per_second: the same beside one process that keeps a core busy
    busy_over_idle_tokens, busy_over_idle_classification: the busy speed divided by the idle speed
    common_loop_tokens_per_second, plain_loop_tokens_per_second: training by `common_loop` and `plain_loop` below
    times_common_loop, times_plain_loop: tokens_per_second divided by these
    step_seconds_{10k, 28k, 100k, 800k}: a training step with a vocabulary of this size, on the same rows
    largest_vocabulary_over_published: step_seconds_800k divided by step_seconds_28k
    embed_fp32_per_second, embed_bf16_per_second: descriptions through `ELMo.embed_stream`, tokenized on the CPU
    predict_per_second: descriptions through `Classifier.predict`, in bf16 if it is fast, tokenized on the CPU
Measured on the CPU, machine.cpu, on every machine:
    tokenize_rows_per_second: descriptions tokenized into an empty cache
    tokenize_open_seconds: opening that cache again
    startup_seconds: `python ELMO.py --help`
    training_memory_gb, peak_memory_gb: largest main memory of this process after the first training steps, and at the
        end, with a vocabulary of 800,000; a GPU's own memory is not counted
    load_before: the system's load average before the bench
Sizes and origin:
    repeats [{number: value}, ..], vocabulary (size in training), tokenized_rows, embedded_texts
    command, quick, config, versions, machine, minutes (of the whole bench)
"""
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # for `python report/bench.py`

import classification
import ELMO
from data.ag_news import CACHE, read_ag_news
from data.batches import batches, collate
from data.tasks import EncodedTexts, ag_news_part
from data.text import PAD, UNK, Data, Encoded, Vocabulary, tokenize_texts
from run.files import write_json
from run.machine import autocast, compute_dtype, find_device, peak_memory_gb, provenance, upload
from run.options import script, script_arguments

REPEATS = 3
SIZES = {"10k": 10_000, "28k": 28_000, "100k": 100_000, "800k": 800_000}        # words of the vocabularies
COMMON_WORDS = 14_000
SECONDS = 14.0          # that training is measured for
QUICK_SECONDS = 2.0     # the same with --quick
TEXTS = 1000            # embedded and classified
# `while True: pass`, except that it ends if the bench is killed.
BUSY = "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n    for _ in range(1_000_000): pass"
RATIOS = {                                                  # name: (numerator, denominator)
    "busy_over_idle_tokens": ("busy_tokens_per_second", "tokens_per_second"),
    "busy_over_idle_classification": ("busy_classification_rows_per_second", "classification_rows_per_second"),
    "times_common_loop": ("tokens_per_second", "common_loop_tokens_per_second"),
    "times_plain_loop": ("tokens_per_second", "plain_loop_tokens_per_second"),
    "largest_vocabulary_over_published": ("step_seconds_800k", "step_seconds_28k")}


# ------------------------------------------------------------------------------------------------ other loops
class CommonModel(nn.Module):
    """The model of public solutions to the assignment: two LSTM layers of 300 per direction, and an untied softmax."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(COMMON_WORDS, 300) for _ in range(2))
        self.lstms = nn.ModuleList(nn.LSTM(300, 300, num_layers=2) for _ in range(2))
        self.softmaxes = nn.ModuleList(nn.Linear(300, COMMON_WORDS) for _ in range(2))

    def nll(self, d: int, x: Tensor, y: Tensor) -> Tensor:
        """Summed nll of direction d; x and y (T, B)."""
        h, _ = self.lstms[d](self.embeddings[d](x))                                     # (T, B, 300)
        logits = self.softmaxes[d](h)                                                   # (T, B, 14,000)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=PAD, reduction="sum")


class PlainModel(ELMO.BiLM):
    """ELMo's biLM with the full softmax, whose gradient of the word table is dense."""

    def nll(self, d: int, x: Tensor, y: Tensor) -> Tensor:
        """Summed nll of direction d; x and y (T, B)."""
        ones = torch.ones(1, x.shape[1], self.config.width, device=x.device)
        masks = [F.dropout(ones, self.config.dropout) for _ in range(ELMO.LAYERS + 1)]
        with autocast(x.device, compute_dtype(self.config.precision, x.device)):
            h = self.states(d, F.embedding(x, self.table), masks)[-1]                   # (T, B, P)
            logits = F.linear(h[y != PAD], self.table, self.bias[:, 0])                 # (N, V)
            return F.cross_entropy(logits, y[y != PAD], reduction="sum")


@dataclass
class Loop:
    """The usual training loop with torch's default threads: one direction after the other, then one dense update."""
    model: nn.Module
    optimizer: torch.optim.Optimizer
    encoded: Encoded
    batches: list[np.ndarray]
    device: torch.device

    def step(self, number: int) -> tuple[Tensor, int]:
        """One update on batch `number`; returns its (summed nll, targets), without waiting for a GPU to compute it."""
        ids, gold = collate(self.encoded, self.batches[number % len(self.batches)])
        targets = int((gold != PAD).sum())
        x = upload(ids, self.device)
        y = upload(gold, self.device)
        total = torch.zeros((), device=self.device)
        for d in range(2):
            nll = self.model.nll(d, x[d], y[d])
            (nll / targets).backward()
            total += nll.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, targets


def common_loop(config: ELMO.Config, data: Data, device: torch.device) -> Loop:
    """How public solutions train: fp32, Adam, 16 rows per batch in random order, all but 14,000 words as <unk>."""
    model = CommonModel().to(device)
    order = np.random.default_rng(config.seed).permutation(data.train)
    rows = np.split(order, range(16, len(order), 16))
    return Loop(model, torch.optim.Adam(model.parameters()), resized(data, COMMON_WORDS).encoded, rows, device)


def plain_loop(config: ELMO.Config, data: Data, device: torch.device) -> Loop:
    """The model, precision and batch size of ELMO.py, but the full softmax and one AdamW with dense gradients."""
    model = PlainModel(config, len(data.words)).to(device)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    adamw = torch.optim.AdamW(weights, lr=config.lr, weight_decay=0.0, fused=True)
    parts = batches(data.encoded.lengths[data.train], config.batch_tokens, np.random.default_rng(config.seed))
    return Loop(model, adamw, data.encoded, [data.train[part] for part in parts], device)


def resized(data: Data, size: int) -> Data:
    """The same rows with `size` words: the rarest words become <unk>, or words that occur in no row are added."""
    words = data.words.words[:size] + [f"extra{i}" for i in range(size - len(data.words))]
    lookup = np.where(data.encoded.lookup < size, data.encoded.lookup, UNK)
    return Data(Vocabulary(words), replace(data.encoded, lookup=lookup), data.train, data.validation)


# -------------------------------------------------------------------------------------------------- measuring
def training_speed(name: str, trainer, seconds: float) -> dict[str, float]:
    """{name: targets or rows per second}: runs the steps 0, 1, 2, .. until `seconds` have passed."""
    items = 0
    begin = time.perf_counter()
    for number in count():
        loss, *_, targets = trainer.step(number)
        items += targets
        if number % 20 == 0 or time.perf_counter() - begin >= seconds:
            float(loss)                             # waits for a GPU
            elapsed = time.perf_counter() - begin
            if elapsed >= seconds:
                return {name: items / elapsed}


def busy_training_speed(name: str, trainer, seconds: float) -> dict[str, float]:
    """The same, with "busy_" before the name, beside another process that keeps a core busy."""
    with subprocess.Popen([sys.executable, "-c", BUSY, str(os.getpid())]) as process:
        try:
            time.sleep(0.3)             # the process needs a moment to start
            return training_speed(f"busy_{name}", trainer, seconds)
        finally:
            process.kill()


def seconds_of(call: Callable) -> float:
    """Seconds that a call takes, its work on a GPU included."""
    begin = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()                    # the last update of a step may still be under way
    return time.perf_counter() - begin


def step_seconds(trainers: dict[str, ELMO.Trainer], seconds: float) -> dict[str, float]:
    """{step_seconds_NAME: mean seconds per step} of each trainer, from about `seconds` of training each.

    All trainers run step 0, then all run step 1 in the opposite order, and so on.
    """
    spent = dict.fromkeys(trainers, 0.0)
    names = list(trainers)
    for number in count():
        for name in names:
            spent[name] += seconds_of(partial(trainers[name].step, number))
        names.reverse()
        if number % 2 == 1 and sum(spent.values()) >= seconds * len(trainers):
            return {f"step_seconds_{name}": total / (number + 1) for name, total in spent.items()}


def tokenizing(texts: list[str]) -> dict[str, float]:
    """Speed of tokenizing into an empty cache, and seconds of a second call, which only opens the cache."""
    with TemporaryDirectory() as cache:
        first, second = (seconds_of(partial(tokenize_texts, texts, Path(cache))) for _ in range(2))
    return {"tokenize_rows_per_second": len(texts) / first, "tokenize_open_seconds": second}


def startup() -> dict[str, float]:
    """Seconds of a process that prints the help of ELMO.py."""
    command = [sys.executable, str(ELMO.HERE / "ELMO.py"), "--help"]
    return {"startup_seconds": seconds_of(partial(subprocess.run, command, stdout=subprocess.DEVNULL, check=True))}


def interleaved(measures: Sequence[Callable[[], dict]]) -> list[dict]:
    """The numbers of each repeat. Each repeat runs all measures, so that a slow minute does not spoil a single one."""
    repeats = [{} for _ in range(REPEATS)]
    for number, repeat in enumerate(repeats):
        for measure in measures if number % 2 == 0 else reversed(measures):
            found = measure()
            repeat.update(found)
            values = ", ".join(f"{name} {value:,.4g}" for name, value in found.items())
            print(f"repeat {number + 1} of {REPEATS}: {values}", flush=True)
    return repeats


def inference(classifier: classification.Classifier, texts: list[str]) -> dict[str, float]:
    """Descriptions per second: embedded in fp32, embedded in bf16, and classified."""
    calls = {"embed_fp32_per_second": lambda: deque(classifier.elmo.embed_stream(texts, "fp32"), maxlen=0),
             "embed_bf16_per_second": lambda: deque(classifier.elmo.embed_stream(texts, "bf16"), maxlen=0),
             "predict_per_second": lambda: classifier.predict(texts, "auto")}
    return {name: len(texts) / seconds_of(call) for name, call in calls.items()}


def bench(config: ELMO.Config, seconds: float) -> dict:
    """The numbers of bench.json."""
    device = find_device()
    bilstm = ELMO.HERE / "models" / "bilstm.pt"
    classifier = classification.Classifier.load(bilstm.with_name("classifier.pt"), bilstm, device=str(device))
    data = Data.of_ag_news(config, CACHE)
    rows = data.texts[0] + data.texts[1]
    texts = data.texts[1][:TEXTS]
    on_cpu = interleaved([partial(tokenizing, rows), startup])      # first, because a small process forks faster
    trainers = {"tokens_per_second": ELMO.Trainer(config, data, device)}
    training_speed("warm-up", trainers["tokens_per_second"], seconds / 2)
    memory = peak_memory_gb()
    heads = classification.Config(seeds=3)                          # nine heads: three seeds in three settings
    part = EncodedTexts(ag_news_part(read_ag_news("train"), heads.fields), classifier.elmo, CACHE)
    trainers["classification_rows_per_second"] = classification.Trainer(
        heads, classification.ELMoVectors(classifier.elmo.model), {"train": part}, 4)
    words = replace(data, encoded=replace(data.encoded, chars=None))        # both loops read word ids, not characters
    trainers["common_loop_tokens_per_second"] = common_loop(config, words, device)
    trainers["plain_loop_tokens_per_second"] = plain_loop(config, words, device)
    sizes = {name: ELMO.Trainer(config, resized(data, size), device) for name, size in SIZES.items()}
    measures = [partial(step_seconds, sizes, seconds / 2), partial(inference, classifier, texts)]
    for name, trainer in trainers.items():
        training_speed("warm-up", trainer, seconds / 4)
        measures.append(partial(training_speed, name, trainer, seconds))
        if "loop" not in name:
            measures.append(partial(busy_training_speed, name, trainer, seconds))
    step_seconds(sizes, 0)                                          # warm-up
    inference(classifier, texts[:50])                               # warm-up
    repeats = [first | second for first, second in zip(on_cpu, interleaved(measures), strict=True)]
    for repeat in repeats:
        repeat.update({name: repeat[above] / repeat[below] for name, (above, below) in RATIOS.items()})
    medians = {name: median(repeat[name] for repeat in repeats) for name in repeats[0]}
    return medians | {"repeats": repeats, "vocabulary": len(data.words), "tokenized_rows": len(rows),
                      "embedded_texts": len(texts), "training_memory_gb": memory}


@script("bench.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 2 for an input that the user can fix, 130 after Ctrl-C."""
    begin = time.perf_counter()
    load = os.getloadavg()[0]
    config, options = script_arguments(argv, ELMO.Config, "bench.py", __doc__, ELMO.HERE / "models", {
        "--quick": {"action": "store_true", "help": "shorter measures, 3 minutes on two cores"}})
    result = bench(config, QUICK_SECONDS if options.quick else SECONDS)
    result |= provenance(find_device(), time.perf_counter() - begin)
    result |= {"load_before": load, "quick": options.quick, "config": asdict(config)}
    write_json(options.out / "bench.json", result)
    for name in result["repeats"][0]:
        print(f"{name:<42}{result[name]:>14,.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
