"""How fast this machine trains, embeds, tokenizes and starts: a table, and models/bench.json.

    python report/bench.py                          the published Config on the real rows; under 20 minutes on two cores
    python report/bench.py --quick                  shorter measures; 3 minutes
    python report/bench.py --hidden 96 --rows 9000  any knob of ELMO.py

Schema of bench.json; every number is the median of three interleaved repeats, a ratio is taken within its repeat first:
    tokens_per_second: of Trainer.step; targets of both directions, end symbols in, padding out
    common_loop_tokens_per_second, common_loop_batch_padded_tokens_per_second: the same of common_loop, its batches
        padded to the longest row of the corpus (common_loop_positions), or each to its own longest
    times_common_loop, times_common_loop_batch_padded: tokens_per_second over these
    fp32_gflops, bf16_gflops: of a square product of 2,048; peak {precision, gflops}: the precision of training
    share_of_peak: tokens_per_second x operations_per_target / peak, where operations_per_target is
        6 x (matrices of one direction's LSTMs + P x (negatives + 1)), with nothing for padding or recomputation
    step_time_800k_over_28k: a step with vocabulary.grown words over the same step with vocabulary.words
    embed_fp32_per_second, embed_bf16_per_second: descriptions through embed_stream; embed {model, texts, config,
        bf16_computed_in}
    tokenize_rows_per_second, tokenize_open_seconds (from the cache): of tokenized_rows descriptions
    startup_seconds: of python ELMO.py --help; seconds: of the bench
    machine, versions, config, command, quick, peak_memory_gb, repeats [{number: value}, ..]
"""
import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # run as `python report/bench.py`

import ELMO
from data.files import InputError, write_json
from data.knobs import Parser, add_knobs, script
from data.machine import default_device, fast_bf16, machine, peak_memory_gb, versions
from data.prepare import read_ag_news, split
from data.text import PAD, UNK, Data, Vocabulary, tokenized

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 3
SIDE = 2048                                             # of the square product that measures the peak
COMMON_WORDS, COMMON_WIDTH, COMMON_BATCH = 14_000, 300, 16
PLANS = {   # by --quick: seconds of a measure, fewest padded steps and pairs of steps, texts embedded, rows tokenized
    True: {"seconds": 4.0, "padded": 1, "pairs": 2, "texts": 600, "rows": 10_000},
    False: {"seconds": 30.0, "padded": 2, "pairs": 6, "texts": 2000, "rows": None}}


class CommonLM(nn.Module):
    """Logits (B, T, 14,000) of one direction as public copies make them: two LSTM layers of 300, an untied softmax."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(COMMON_WORDS, COMMON_WIDTH)
        self.lstm = nn.LSTM(COMMON_WIDTH, COMMON_WIDTH, 2, batch_first=True)
        self.softmax = nn.Linear(COMMON_WIDTH, COMMON_WORDS)

    def forward(self, x: Tensor) -> Tensor:             # (B, T) -> (B, T, 14,000)
        return self.softmax(self.lstm(self.embedding(x))[0])


def common_loop(data: Data, positions: int, seed: int, device: torch.device) -> Iterator[int]:
    """Targets of each step of the loop of public copies: fp32, dense Adam, 16 rows a batch in random order, for ever.

    Both directions are trained on every batch, each by a model of its own. Batches are padded to `positions`, at least
    to their longest row; words beyond 14,000 are <unk>.
    """
    torch.manual_seed(seed)
    generator, loss = np.random.default_rng([seed, 5]), nn.CrossEntropyLoss(ignore_index=PAD)
    models = [CommonLM().to(device) for _ in range(2)]
    adams = [torch.optim.Adam(model.parameters()) for model in models]
    while True:
        order = generator.permutation(data.train)
        for a in range(0, len(order), COMMON_BATCH):
            batch = ELMO.collate(data.encoded, order[a:a + COMMON_BATCH])       # x and y (2, T, 16)
            pad = (0, max(0, positions - batch[0].shape[1]))
            for d, (model, adam) in enumerate(zip(models, adams, strict=True)):
                x, y = (F.pad(torch.where(ids[d] < COMMON_WORDS, ids[d], UNK).t(), pad).to(device)     # (B, T)
                        for ids in batch)
                adam.zero_grad()
                loss(model(x).flatten(0, 1), y.flatten()).backward()
                adam.step()
            yield int((batch[1] != PAD).sum())


class Grown(Data):
    """Data whose vocabulary has words that no row holds; each counts once, so that it is sampled as a negative."""

    def counts(self) -> np.ndarray:
        return np.maximum(super().counts(), 1)


def grow(data: Data, size: int) -> Grown:
    """The same rows under a vocabulary of `size` words; InputError when it has as many already."""
    if size <= len(data.words):
        raise InputError(f"words is {size}, but the vocabulary has {len(data.words)} already; expected more")
    words = data.words.words + [f"extra{i}" for i in range(size - len(data.words))]
    return Grown(Vocabulary(words), data.encoded, data.train, data.validation)


def timed(call: Callable[[], float], device: torch.device, seconds: float = 0.0, least: int = 1) -> float:
    """Work per second of a call that returns its work, made `least` times or more, for `seconds` or longer."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begin, work, calls = time.perf_counter(), 0, 0
    while calls < least or time.perf_counter() - begin < seconds:
        work, calls = work + call(), calls + 1
    wait()
    return work / (time.perf_counter() - begin)


def product(dtype: torch.dtype, device: torch.device) -> Callable[[], float]:
    """A call that multiplies two square matrices and returns its operations in units of 1e9."""
    a, b = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    def call() -> float:
        torch.mm(a, b, out=out)
        return 2 * SIDE**3 / 1e9
    return call


def step_ratio(own: ELMO.Trainer, grown: ELMO.Trainer, numbers: Iterator[int], seconds: float, least: int) -> float:
    """Median over pairs of the grown vocabulary's step time over the own one's, each pair on the same rows."""
    begin, ratios = time.perf_counter(), []
    while len(ratios) < least or time.perf_counter() - begin < seconds:
        n = next(numbers)
        order = (own, grown) if len(ratios) % 2 else (grown, own)
        rates = {trainer: timed(lambda trainer=trainer, n=n: trainer.step(n)[1], own.device) for trainer in order}
        ratios.append(rates[own] / rates[grown])
    return median(ratios)


def tokenizing(texts: list[str], config: ELMO.Config) -> dict:
    """Rows per second of a first tokenization into an empty cache, and the seconds of opening it again."""
    with TemporaryDirectory() as cache:
        first, again = (timed(lambda: len(tokenized(texts, config, Path(cache))), torch.device("cpu"))
                        for _ in range(2))
    return {"tokenize_rows_per_second": first, "tokenize_open_seconds": len(texts) / again}


def startup() -> dict:
    """Seconds of a process that prints the help of ELMO.py."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, ROOT / "ELMO.py", "--help"], stdout=subprocess.DEVNULL, check=True)
    return {"startup_seconds": time.perf_counter() - begin}


def interleaved(measures: Sequence[Callable[[], dict]]) -> list[dict]:
    """The numbers of every repeat; each measure has its turn in each of them, so that drift meets all alike."""
    repeats = [{} for _ in range(REPEATS)]
    for i, repeat in enumerate(repeats, start=1):
        for measure in measures:
            found = measure()
            repeat |= found
            print(f"repeat {i} of {REPEATS}: " + ", ".join(f"{k} {v:,.4g}" for k, v in found.items()), flush=True)
    return repeats


def speeds(trainer: ELMO.Trainer, grown: Grown, elmo: ELMO.ELMo, texts: list[str], positions: int, plan: dict) -> list:
    """The repeats of all that multiplies matrices; each measure is warmed up by steps that do not count."""
    data, device, seed, seconds = trainer.data, trainer.device, trainer.config.seed, plan["seconds"]
    large, numbers, rate = ELMO.Trainer(trainer.config, grown, device), count(), partial(timed, device=device)
    step = lambda: trainer.step(next(numbers))[1]       # noqa: E731
    by_batch, by_corpus = (partial(next, common_loop(data, size, seed, device)) for size in (0, positions))
    products = {"fp32": product(torch.float32, device), "bf16": product(torch.bfloat16, device)}
    brief = {"fp32": seconds / 8, "bf16": seconds / 8 * fast_bf16(device)}     # emulated, one may take long
    embed = {name: lambda texts=texts, name=name: sum(1 for _ in elmo.embed_stream(texts, name)) for name in products}
    for warm_up in (step, step, partial(large.step, 0), partial(large.step, 1), by_batch, by_corpus,
                    partial(embed["fp32"], texts[:8]), *products.values()):
        warm_up()
    return interleaved([
        lambda: {f"{name}_gflops": rate(call, seconds=brief[name]) for name, call in products.items()},
        lambda: {"tokens_per_second": rate(step, seconds=seconds)},
        lambda: {"common_loop_batch_padded_tokens_per_second": rate(by_batch, seconds=seconds)},
        lambda: {"common_loop_tokens_per_second": rate(by_corpus, seconds=seconds, least=plan["padded"])},
        lambda: {"step_time_800k_over_28k": step_ratio(trainer, large, numbers, seconds, plan["pairs"])},
        lambda: {f"embed_{name}_per_second": rate(call) for name, call in embed.items()}])


def operations_per_target(trainer: ELMO.Trainer) -> int:
    """6 per weight used, 2 forward and 4 backward: one direction's matrices, the target's row and the negatives'."""
    matrices = [w[0] for layer in trainer.model.layers for w in layer.parameters() if w.dim() == 3]
    return 6 * (sum(w.numel() for w in matrices) + trainer.config.output * (trainer.negatives.draws + 1))


def bench(config: ELMO.Config, size: int, plan: dict) -> dict:
    """Everything in the file but what names the run; `size` is the grown vocabulary's."""
    train, test = (read_ag_news(*part).description.tolist() for part in (("train", config.rows), ("test",)))
    load = os.getloadavg()[0]
    data = Data.of(train, config, *split(len(train), config.validation, config.seed), cache=ELMO.CACHE)
    grown, device, file = grow(data, size), torch.device(default_device()), ROOT / "models" / "bilstm.pt"
    published = file.exists()
    elmo = (ELMO.ELMo.load(file, str(device)) if published else
            ELMO.ELMo(config, data.words, ELMO.BiLM(config, len(data.words)).to(device)))
    rows, texts = (train + test)[:plan["rows"]], test[:plan["texts"]]
    host = interleaved([partial(tokenizing, rows, config), startup])    # first, while there is little memory to fork
    trainer = ELMO.Trainer(config, data, device)
    positions = int(np.diff(data.encoded.tokens.offsets)[data.train].max()) + 1
    operations, precision = operations_per_target(trainer), "bf16" if trainer.dtype == torch.bfloat16 else "fp32"
    repeats = [a | b for a, b in zip(host, speeds(trainer, grown, elmo, texts, positions, plan), strict=True)]
    for repeat in repeats:
        for name in ("common_loop", "common_loop_batch_padded"):
            repeat[f"times_{name}"] = repeat["tokens_per_second"] / repeat[f"{name}_tokens_per_second"]
        repeat["share_of_peak"] = repeat["tokens_per_second"] * operations / (repeat[f"{precision}_gflops"] * 1e9)
    medians = {name: median(repeat[name] for repeat in repeats) for name in repeats[0]}
    return medians | {
        "machine": machine(device) | {"load_before": load}, "operations_per_target": operations,
        "peak": {"precision": precision, "gflops": medians[f"{precision}_gflops"]}, "common_loop_positions": positions,
        "vocabulary": {"words": len(data.words), "grown": size}, "tokenized_rows": len(rows),
        "embed": {"model": "models/bilstm.pt" if published else "untrained", "texts": len(texts),
                  "config": asdict(elmo.config), "bf16_computed_in": "bf16" if fast_bf16(device) else "fp32"},
        "repeats": repeats}


def table(repeats: list[dict]) -> str:
    """Median, lowest and highest repeat of every number as lines to print."""
    lines = [f"{'':<44}{'median':>12}{'lowest':>12}{'highest':>12}"]
    for name in repeats[0]:
        values = [repeat[name] for repeat in repeats]
        digits = 0 if min(values) >= 100 else 3
        shown = (f"{value:>12,.{digits}f}" for value in (median(values), min(values), max(values)))
        lines.append(f"{name.replace('_', ' '):<44}" + "".join(shown))
    return "\n".join(lines)


@script("bench.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 2 for an input that the user can mend, 130 after Ctrl-C."""
    begin, argv = time.perf_counter(), sys.argv[1:] if argv is None else argv
    parser = Parser(prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter measures, 3 minutes on two cores")
    parser.add_argument("--out", type=Path, default=ROOT / "models" / "bench.json", help="default models/bench.json")
    parser.add_argument("--seconds", type=float, help="of each measure, instead of 4 (--quick) or 30")
    parser.add_argument("--words", type=int, default=800_000, help="the grown vocabulary (default %(default)s)")
    add_knobs(parser, ELMO.Config)
    given = vars(parser.parse_args(argv))
    quick, out, seconds, words = (given.pop(name) for name in ("quick", "out", "seconds", "words"))
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; name a file")
    config, plan = ELMO.Config(**given), PLANS[quick] | ({} if seconds is None else {"seconds": seconds})
    result = bench(config, words, plan)
    print(table(result["repeats"]))
    write_json(out, result | {
        "command": " ".join(["python", "report/bench.py", *argv]), "quick": quick, "config": asdict(config),
        "versions": versions(), "peak_memory_gb": peak_memory_gb(), "seconds": time.perf_counter() - begin})
    print(f"{out}: after {time.perf_counter() - begin:,.0f} seconds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
