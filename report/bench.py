"""How fast this machine trains, embeds, tokenizes and starts: a table, and models/bench.json.

    python report/bench.py                          the published Config on the real rows; under 20 minutes on two cores
    python report/bench.py --quick                  shorter measures, none in processes of their own; 3 minutes
    python report/bench.py --hidden 96 --rows 9000  any knob of ELMO.py
    python report/bench.py --to-perplexity 150      also minutes to that validation perplexity, on a tenth of the rows

Schema of bench.json; up to `widths` the median of three interleaved repeats, a ratio taken within its repeat first:
    tokens_per_second: of Trainer.step; targets of both directions, end symbols in, padding out
    common_loop_tokens_per_second, common_loop_batch_padded_tokens_per_second, plain_fp32_tokens_per_second,
        plain_bf16_tokens_per_second: of the loops of report/loops.py, the common one padded to the longest row of the
        corpus (common_loop_positions) or per batch; times_<loop>: tokens_per_second over these
    fp32_gflops, bf16_gflops: of a square product of 2,048; peak {precision, gflops}: the precision of training
    share_of_peak: tokens_per_second x operations_per_target / peak, where operations_per_target is
        6 x (matrices of one direction's LSTMs + P x (negatives + 1)), with nothing for padding or recomputation
    share_of_products: time of a step's own matrix products, made alone, over the time of the step; same batches
    step_time_100k_over_10k, step_time_800k_over_10k: a step with vocabularies of these sizes, on the same rows
    embed_fp32_per_second, embed_bf16_per_second: descriptions through embed_stream; predict_per_second: through
        Classifier.predict, bf16 where it is fast; embed {model, texts, config, bf16_computed_in}
    tokenize_rows_per_second, tokenize_open_seconds (from the cache): of tokenized_rows descriptions
    startup_seconds: of python ELMO.py --help; seconds: of the bench
    widths [{width, tokens_per_second, share_of_peak}]: P = H, once
    passes.{training, classification, embed_fp32, embed_bf16}: some steps (embed: descriptions), the same each time:
        precision, seconds, operations (of their matrix products), share_of_peak (operations / seconds / the peak of
        that precision), kernels {name: share of the time by PyTorch's profiler, embedding on one core; below 1 %
        together as "others"}; classification: the frozen biLM with nine heads, three settings of three seeds, where
        the corpus has enough rows
    scaling [{rows, seconds, peak_memory_gb}]: tokenizing and one epoch of a small model on so many rows of the
        built-in corpus, medians of three; off_linear: the largest |seconds a row / their mean - 1|
    processes {one, two}: tokens/s of a process of one thread, and of torchrun with two of them, once
    machine, versions, config, command, quick, peak_memory_gb, repeats [{number: value}, ..]
    to_perplexity {command, perplexity, rows, most_minutes, minutes {loop: minutes or null}, ended {loop: perplexity}}
    devices {name: the same}: runs on other devices, kept when the file is written anew
"""
import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # run as `python report/bench.py`

import classification
import ELMO
from classification import Classifier
from data import sample
from data.files import InputError, write_json
from data.knobs import Parser, add_knobs, script
from data.machine import default_device, fast_bf16, keep_freed_memory, machine, peak_memory_gb, versions
from data.prepare import read_task
from data.text import Data, tokenized
from report.loops import CommonLoop, PlainLoop, perplexity, products, resize

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 3
SIDE = 2048                                             # of the square product that measures the peak
SIZES = {"10k": 10_000, "100k": 100_000, "800k": 800_000}
WIDTHS = (128, 256, 512, 1024)
ROWS = (16_000, 32_000, 64_000, 128_000)                # of the built-in corpus: 1x, 2x, 4x, 8x
PLANS = {   # by --quick: seconds of a measure, fewest padded steps and pairs of steps, texts embedded, rows tokenized
    True: {"seconds": 2.0, "padded": 1, "pairs": 2, "texts": 300, "rows": 10_000},
    False: {"seconds": 14.0, "padded": 2, "pairs": 6, "texts": 2000, "rows": None}}


# --------------------------------------------------------------------------------------------------- measuring
def timed(call: Callable[[], float], device: torch.device, seconds: float = 0.0, least: int = 1) -> float:
    """Work per second of a call that returns its work, made `least` times or more, for `seconds` or longer."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begin, work, calls = time.perf_counter(), 0, 0
    while calls < least or time.perf_counter() - begin < seconds:
        work, calls = work + call(), calls + 1
    wait()
    return work / (time.perf_counter() - begin)


def seconds_of(call: Callable, device: torch.device) -> float:
    """Of one call."""
    return 1 / timed(lambda: (call(), 1)[1], device)


def product(dtype: torch.dtype, device: torch.device) -> Callable[[], float]:
    """A call that multiplies two square matrices and returns its operations in units of 1e9."""
    a, b = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    def call() -> float:
        torch.mm(a, b, out=out)
        return 2 * SIDE**3 / 1e9
    return call


def interleaved(measures: Sequence[Callable[[], dict]]) -> list[dict]:
    """The numbers of every repeat; each measure has its turn in each of them, so that drift meets all alike."""
    found = [{} for _ in range(REPEATS)]
    for i, repeat in enumerate(found, start=1):
        for measure in measures:
            repeat |= (new := measure())
            print(f"repeat {i} of {REPEATS}: " + ", ".join(f"{k} {v:,.4g}" for k, v in new.items()), flush=True)
    return found


def steps_per_second(trainers: dict[str, ELMO.Trainer], numbers: Iterator[int], seconds: float, least: int) -> dict:
    """{name: steps a second} on the same rows in turn, so that only what differs between the trainers tells."""
    begin, spent, n, device = time.perf_counter(), dict.fromkeys(trainers, 0.0), 0, next(iter(trainers.values())).device
    while n < least or time.perf_counter() - begin < seconds:
        step, n = next(numbers), n + 1
        for name, trainer in (reversed(trainers.items()) if n % 2 else trainers.items()):
            spent[name] += seconds_of(partial(trainer.step, step), device)
    return {name: n / spent[name] for name in trainers}


def share_of_products(trainer: ELMO.Trainer, numbers: Iterator[int], pairs: int) -> dict:
    """Time of the products of some steps over the time of these steps."""
    alone = whole = 0.0
    for _, step in zip(range(pairs), numbers, strict=False):
        call = products(trainer, step)
        call()
        alone += seconds_of(call, trainer.device)
        whole += seconds_of(partial(trainer.step, step), trainer.device)
    return {"share_of_products": alone / whole}


def operations_per_target(trainer: ELMO.Trainer) -> int:
    """6 per weight used, 2 forward and 4 backward: one direction's matrices, the target's row and the negatives'."""
    matrices = [w[0] for layer in trainer.model.layers for w in layer.parameters() if w.dim() == 3]
    return 6 * (sum(w.numel() for w in matrices) + trainer.config.output * (trainer.negatives.draws + 1))


def baddbmm_operations(out: Sequence, a: Sequence, b: Sequence, **_) -> int:
    """Of aten::baddbmm_, an LSTM's recurrent product, from its shapes; PyTorch's counter does not know it."""
    return 2 * a[0] * a[1] * a[2] * b[2]


def operations(call: Callable) -> int:
    """Of the matrix products of a call, two for each multiplication and its addition, in this thread."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: baddbmm_operations}) as counter:
        call()
    return counter.get_total_flops()


def kernels(call: Callable, device: torch.device) -> dict:
    """{name: share of the device's time} of a call's kernels in this thread, largest first; below 1 % as "others"."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as profiler:
        call()
    times = {event.key: event.self_device_time_total if cuda else event.self_cpu_time_total
             for event in profiler.key_averages() if (event.device_type == DeviceType.CUDA) == cuda}
    shares = {name: time / sum(times.values()) for name, time in sorted(times.items(), key=lambda pair: -pair[1])}
    large = {name: share for name, share in shares.items() if share >= 0.01}
    return large | {"others": 1 - sum(large.values())}


def one_pass(call: Callable, dtype: torch.dtype, peaks: dict, device: torch.device, one_core: bool = False) -> dict:
    """What a call on the same rows takes each time and where it goes: `passes` above; `peaks` by precision.

    one_core: the call spreads its work over threads, so that only what it does on one core can be counted.
    """
    call()
    precision, cores = "bf16" if dtype == torch.bfloat16 else "fp32", torch.get_num_threads()
    seconds = seconds_of(call, device)
    try:
        if one_core:                        # what other threads do is neither counted nor profiled
            torch.set_num_threads(1)
        count, found = operations(call), kernels(call, device)
    finally:
        torch.set_num_threads(cores)
    return {"precision": precision, "seconds": seconds, "operations": count,
            "share_of_peak": count / seconds / (peaks[f"{precision}_gflops"] * 1e9), "kernels": found}


# ------------------------------------------------------------------------------------------- what is measured
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


def published(config: ELMO.Config, data: Data, device: torch.device) -> tuple[ELMO.ELMo, Classifier | None]:
    """The committed biLM and classifier; where there are none an untrained biLM."""
    files = [ROOT / "models" / name for name in ("bilstm.pt", "classifier.pt")]
    if not all(file.exists() for file in files):
        return ELMO.ELMo(config, data.words, ELMO.BiLM(config, len(data.words)).to(device)), None
    return ELMO.ELMo.load(files[0], str(device)), Classifier.load(files[1], files[0], device=str(device))


def speeds(trainer: ELMO.Trainer, elmo: ELMO.ELMo, classifier: Classifier | None, texts: list[str], positions: int,
           plan: dict) -> list[dict]:
    """The repeats of all that multiplies matrices; each measure is warmed up by steps that do not count."""
    data, device, config, seconds = trainer.data, trainer.device, trainer.config, plan["seconds"]
    numbers, rate = count(), partial(timed, device=device)
    step = lambda: trainer.step(next(numbers))[1]       # noqa: E731
    grown = {name: ELMO.Trainer(config, resize(data, size), device) for name, size in SIZES.items()}
    loops = {"common_loop_batch_padded": CommonLoop(data, 0, config.seed, device),
             "plain_fp32": PlainLoop(config, data, torch.float32, device)}
    if fast_bf16(device):       # emulated, a step may take minutes
        loops["plain_bf16"] = PlainLoop(config, data, torch.bfloat16, device)
    common = CommonLoop(data, positions, config.seed, device)
    squares = {"fp32": product(torch.float32, device), "bf16": product(torch.bfloat16, device)}
    brief = {"fp32": seconds / 8, "bf16": seconds / 8 * fast_bf16(device)}
    embed = {name: lambda texts=texts, name=name: sum(1 for _ in elmo.embed_stream(texts, name)) for name in squares}
    predict = (lambda: len(classifier.predict(texts, "auto"))) if classifier else None
    for warm_up in (step, step, *(partial(t.step, 0) for t in grown.values()), *loops.values(), common,
                    *squares.values(), *(partial(call, texts[:8]) for call in embed.values()), predict or step):
        warm_up()
    def sizes() -> dict:
        found = steps_per_second(grown, numbers, seconds, plan["pairs"])
        return {f"step_time_{name}_over_10k": found["10k"] / found[name] for name in list(SIZES)[1:]}
    return interleaved([
        lambda: {f"{name}_gflops": rate(call, seconds=brief[name]) for name, call in squares.items()},
        lambda: {"tokens_per_second": rate(step, seconds=seconds)},
        lambda: share_of_products(trainer, numbers, 2 * plan["pairs"]),
        *(lambda name=name, loop=loop: {f"{name}_tokens_per_second": rate(loop, seconds=seconds)}
          for name, loop in loops.items()),
        lambda: {"common_loop_tokens_per_second": rate(common, seconds=seconds, least=plan["padded"])},
        sizes,
        lambda: {f"embed_{name}_per_second": rate(call) for name, call in embed.items()},
        *([lambda: {"predict_per_second": rate(predict)}] if predict else [])])


def passes(trainer: ELMO.Trainer, elmo: ELMO.ELMo, classifier: Classifier | None, texts: list[str], peaks: dict,
           steps: int) -> dict:
    """Training, classification and embedding by kernels; classification where the published files are there."""
    device, numbers = trainer.device, range(steps)
    fast = torch.bfloat16 if fast_bf16(device) else torch.float32
    calls = {"training": (lambda: [trainer.step(step) for step in numbers], trainer.dtype)}
    if classifier and len(trainer.data.encoded.tokens) > elmo.config.validation:
        config = classification.Config(seeds=3)
        task = read_task(config, elmo.config)
        parts = {"train": classification.Texts(task.train, elmo, ELMO.CACHE)}
        heads = classification.Trainer(config, classification.Vectors("elmo", elmo.model), parts, len(task.labels),
                                       range(config.seeds))
        calls["classification"] = (lambda: [heads.step(step) for step in numbers], heads.dtype)
    for name, dtype in (("fp32", torch.float32), ("bf16", fast)):
        calls[f"embed_{name}"] = (lambda name=name: [0 for _ in elmo.embed_stream(texts, name)], dtype)
    out = {}
    for name, (call, dtype) in calls.items():
        out[name] = one_pass(call, dtype, peaks, device, one_core="embed" in name)
        print(f"{name}: {out[name]['share_of_peak']:.0%} of the {out[name]['precision']} peak", flush=True)
    return out


def widths(config: ELMO.Config, data: Data, device: torch.device, peak: float, seconds: float) -> list[dict]:
    """Training at other widths, P = H, each after two steps that do not count."""
    out = []
    for width in WIDTHS:
        trainer, numbers = ELMO.Trainer(replace(config, width=width, hidden=width), data, device), count()
        step = lambda trainer=trainer, numbers=numbers: trainer.step(next(numbers))[1]       # noqa: E731
        timed(step, device, least=2)
        speed = timed(step, device, seconds)
        out.append({"width": width, "tokens_per_second": speed,
                    "share_of_peak": speed * operations_per_target(trainer) / (peak * 1e9)})
        print(f"width {width}: {speed:,.0f} tokens/s", flush=True)
    return out


def output_of(command: list, **environment: str) -> str:
    """What a command in a process of its own prints; InputError with the end of its errors where it fails."""
    run = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise InputError(f"a process of the bench failed: {' '.join(run.stderr.split())[-300:]}")
    return run.stdout


PREPARE_AND_TRAIN = """import sys, time
from pathlib import Path
import torch, ELMO
from data.machine import peak_memory_gb
from data.text import Data
config, begin = ELMO.Config(hidden=64, validation=200, epochs=1.0, min_count=1, batch_tokens=2000), time.perf_counter()
data = Data.of_ag_news(config, Path(sys.argv[1]))
trainer = ELMO.Trainer(config, data, torch.device("cpu"))
for step in range(trainer.steps):
    trainer.step(step)
print(time.perf_counter() - begin, peak_memory_gb())"""


def scaling(folder: Path) -> list[dict]:
    """Tokenizing and one epoch on 1, 2, 4 and 8 times as many rows of the built-in corpus, in a process each."""
    found = {rows: [] for rows in ROWS}
    for rows in ROWS:
        sample.write(folder / str(rows), rows, seed=0, test_rows=100)
    for repeat in range(REPEATS):
        for rows in ROWS:
            command = [sys.executable, "-c", PREPARE_AND_TRAIN, folder / f"cache-{rows}-{repeat}"]
            printed = output_of(command, AG_NEWS_DIR=str(folder / str(rows)))
            found[rows].append([float(number) for number in printed.split()])
            print(f"{rows:,} rows: {found[rows][-1][0]:.1f} seconds, {found[rows][-1][1]:.2f} GB", flush=True)
    medians = {rows: [median(values) for values in zip(*runs, strict=True)] for rows, runs in found.items()}
    return [{"rows": rows, "seconds": seconds, "peak_memory_gb": memory} for rows, (seconds, memory) in medians.items()]


def processes(folder: Path) -> dict:
    """Tokens a second of ELMO.py in one process of one thread, and in two of torchrun that share every batch."""
    sample.write(folder / "corpus", 4_000, seed=0, test_rows=100)
    out, torchrun = {}, [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for name, launch in (("one", [sys.executable]), ("two", torchrun)):
        knobs = ["--width", "256", "--hidden", "256", "--validation", "200", "--epochs", "2", "--min-count", "1"]
        output_of([*launch, str(ROOT / "ELMO.py"), *knobs, "--out", str(folder / name)], OMP_NUM_THREADS="1",
                  AG_NEWS_DIR=str(folder / "corpus"), CUDA_VISIBLE_DEVICES="")
        out[name] = json.loads((folder / name / "pretraining.json").read_text())["tokens_per_second"]
        print(f"{name} process(es): {out[name]:,.0f} tokens/s", flush=True)
    return out


def to_perplexity(config: ELMO.Config, data: Data, device: torch.device, goal: float, most: float) -> dict:
    """Minutes of training until the validation perplexity, mean of both directions' nats, is `goal`; null after `most`.

    On a tenth of the training rows, chosen by the seed, one loop after the other; the perplexity is measured ten times
    a pass on 1,000 validation rows, outside the clock. The common loop has 14,000 words and is padded per batch.
    """
    few = np.sort(np.random.default_rng([config.seed, 7]).permutation(data.train)[:len(data.train) // 10])
    rows, part = data.validation[:1000], replace(data, train=few)
    trainer = ELMO.Trainer(replace(config, rows=0), part, device)
    def own() -> float:
        scores = ELMO.score_rows(trainer.model, data.encoded, rows, trainer.dtype)
        return float(np.exp(np.log(scores.perplexity()).mean()))
    numbers = count()
    runs = {"elmo": (lambda: trainer.step(next(numbers)), own, trainer.per_epoch, trainer.steps)}
    for name, loop in (("plain_fp32", PlainLoop(config, part, torch.float32, device)),
                       ("plain_bf16", PlainLoop(config, part, torch.bfloat16, device)),
                       ("common_loop_batch_padded", CommonLoop(part, 0, config.seed, device))):
        if name != "plain_bf16" or fast_bf16(device):
            per_epoch = trainer.per_epoch if "plain" in name else len(few) // 16
            runs[name] = (loop, partial(perplexity, loop, rows), per_epoch, 10**9)
    minutes, ended = {}, {}
    for name, (step, measure, per_epoch, steps) in runs.items():
        seconds, done, found = 0.0, 0, np.inf
        while found > goal and seconds < 60 * most and done < steps:
            some = min(max(1, per_epoch // 10), steps - done)
            seconds, done = seconds + some / timed(lambda step=step: step() and 1, device, least=some), done + some
            found = measure()
            print(f"{name}: perplexity {found:.1f} after {done} steps, {seconds / 60:.2f} minutes", flush=True)
        minutes[name], ended[name] = seconds / 60 if found <= goal else None, found
    return {"perplexity": goal, "rows": len(few), "most_minutes": most, "minutes": minutes, "ended": ended}


# ------------------------------------------------------------------------------------------------------- main
def bench(config: ELMO.Config, plan: dict, quick: bool) -> dict:
    """Everything in the file but what names the run."""
    load, device = os.getloadavg()[0], torch.device(default_device())
    data = Data.of_ag_news(config, ELMO.CACHE)
    rows, texts = [text for part in data.texts for text in part][:plan["rows"]], data.texts[1][:plan["texts"]]
    host = interleaved([partial(tokenizing, rows, config), startup])    # first, while there is little memory to fork
    keep_freed_memory()                                                 # as data.progress.Run does
    elmo, classifier = published(config, data, device)
    trainer = ELMO.Trainer(config, data, device)
    positions = int(np.diff(data.encoded.tokens.offsets)[data.train].max()) + 1
    operations, precision = operations_per_target(trainer), "bf16" if trainer.dtype == torch.bfloat16 else "fp32"
    found = speeds(trainer, elmo, classifier, texts, positions, plan)
    repeats = [a | b for a, b in zip(host, found, strict=True)]
    for repeat in repeats:
        for name in [name.removesuffix("_tokens_per_second") for name in repeat if name.endswith("_tokens_per_second")]:
            repeat[f"times_{name}"] = repeat["tokens_per_second"] / repeat[f"{name}_tokens_per_second"]
        repeat["share_of_peak"] = repeat["tokens_per_second"] * operations / (repeat[f"{precision}_gflops"] * 1e9)
    medians = {name: median(repeat[name] for repeat in repeats) for name in repeats[0]}
    result = medians | {
        "machine": machine(device) | {"load_before": load}, "operations_per_target": operations,
        "peak": {"precision": precision, "gflops": medians[f"{precision}_gflops"]}, "common_loop_positions": positions,
        "vocabulary": len(data.words), "tokenized_rows": len(rows),
        "embed": {"model": "models/bilstm.pt" if classifier else "untrained", "texts": len(texts),
                  "config": asdict(elmo.config), "bf16_computed_in": "bf16" if fast_bf16(device) else "fp32"},
        "repeats": repeats, "passes": passes(trainer, elmo, classifier, texts, medians, plan["pairs"]),
        "widths": widths(config, data, device, medians[f"{precision}_gflops"], plan["seconds"] / 2)}
    if not quick:
        with TemporaryDirectory() as folder:
            result |= {"scaling": scaling(Path(folder)), "processes": processes(Path(folder))}
        per_row = [part["seconds"] / part["rows"] for part in result["scaling"]]
        result["off_linear"] = max(abs(value / np.mean(per_row) - 1) for value in per_row)
    return result


def table(repeats: list[dict]) -> str:
    """Median, lowest and highest repeat of every number as lines to print."""
    lines = [f"{'':<44}{'median':>12}{'lowest':>12}{'highest':>12}"]
    for name in repeats[0]:
        values = [repeat[name] for repeat in repeats]
        digits = 0 if min(values) >= 100 else 3
        shown = (f"{value:>12,.{digits}f}" for value in (median(values), min(values), max(values)))
        lines.append(f"{name.replace('_', ' '):<44}" + "".join(shown))
    return "\n".join(lines)


def merged(result: dict, file: Path) -> dict:
    """The result, with what the file holds of other devices and, of the same knobs and versions, of --to-perplexity."""
    old = json.loads(file.read_text()) if file.exists() else {}
    name, others = result["machine"]["device"], old.pop("devices", {})
    before = old.get("machine", {}).get("device")
    same = all(old.get(key) == result[key] for key in ("config", "versions"))
    if before == name and same and "to_perplexity" in old:
        result = {"to_perplexity": old["to_perplexity"]} | result
    if before != name and "quick" in old:
        others[before] = old
    return result | {"devices": {key: value for key, value in others.items() if key != name}}


@script("bench.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 2 for an input that the user can mend, 130 after Ctrl-C."""
    begin, argv = time.perf_counter(), sys.argv[1:] if argv is None else argv
    parser = Parser(prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter measures, 3 minutes on two cores")
    parser.add_argument("--out", type=Path, default=ROOT / "models" / "bench.json", help="default models/bench.json")
    parser.add_argument("--seconds", type=float, help="of each measure, instead of 2 (--quick) or 14")
    parser.add_argument("--to-perplexity", type=float, metavar="GOAL", help="also minutes to this perplexity")
    parser.add_argument("--minutes", type=float, default=30.0, help="most of each loop for that (default %(default)s)")
    add_knobs(parser, ELMO.Config)
    given = vars(parser.parse_args(argv))
    quick, out, seconds = (given.pop(name) for name in ("quick", "out", "seconds"))
    goal, most = given.pop("to_perplexity"), given.pop("minutes")
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; name a file")
    config, plan = ELMO.Config(**given), PLANS[quick] | ({} if seconds is None else {"seconds": seconds})
    command = " ".join(["python", "report/bench.py", *argv])
    result = bench(config, plan, quick)
    print(table(result["repeats"]))
    if goal:
        device = torch.device(default_device())
        result["to_perplexity"] = {"command": command} | to_perplexity(
            config, Data.of_ag_news(config, ELMO.CACHE), device, goal, most)
    write_json(out, merged(result | {
        "command": command, "quick": quick, "config": asdict(config),
        "versions": versions(), "peak_memory_gb": peak_memory_gb(), "seconds": time.perf_counter() - begin}, out))
    print(f"{out}: after {time.perf_counter() - begin:,.0f} seconds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
