"""What both scripts survive: kills, damaged files, wrong inputs, a full disk, a second run, code in a file, a nan loss.

    pytest tests/test_faults.py                         a few tries of each fault, as a part of the test suite
    python tests/test_faults.py [--quick] [--seed N]    many tries, to models/faults.json; about 6 minutes on two cores

A run that was disturbed must end with the weights of one that was not, bit for bit. faults.json has {tried, survived}
of each fault, then failures [sentences], seed, command, machine, versions and seconds. Some faults have more counts:
with_state (stops after step 0), after_the_end (signals that came too late to be tried) and by_signal of kills, refused
of damaged_files, by_kind of bad_inputs, and by of disk_full: what limited the room.
"""
import argparse
import io
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # run as `python tests/test_faults.py`

import classification
import ELMO
from data import sample
from run import figures
from run.checkpoint import digest, read_published, read_resume
from run.files import InputError, read_json, write_json
from run.machine import describe, versions
from run.options import Parser, script

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"ELMO.py": ELMO, "classification.py": classification}
NAMES = list(SCRIPTS)
FILES = {"ELMO.py": "bilstm.pt", "classification.py": "classifier.pt"}
OPTIONS = {
    "ELMO.py": "--hidden 12 --validation 60 --epochs 3 --batch-tokens 300 --negatives 50 --lr 0.01 --table-lr 0.01 "
               "--min-count 2 --log-every 20 --save-every 0.1",
    "classification.py": "--hidden 8 --setting trainable --seeds 2 --epochs 2 --batch-tokens 300 --log-every 20 "
                         "--save-every 0.1"}
FORKS = multiprocessing.get_context("forkserver")       # new processes that have both scripts imported already
FORKS.set_forkserver_preload(["classification"])
LOCK = threading.Lock()     # starting a process asks all others for their status, and a status can be read only once


class Reference:
    """A corpus, what both scripts make of it if nothing disturbs them, and a folder for the runs that are disturbed."""

    def __init__(self, folder: Path, seed: int):
        self.folder = folder
        self.seed = seed
        self.whole = folder / "whole"
        self.weights = {}       # of the undisturbed run of each script, as bytes
        self.seconds = {}       # its seconds until the first state is saved, and from there to the end
        sample.write(folder / "corpus", 600, seed=0, test_rows=100)
        for name in NAMES:
            begin = time.perf_counter()
            process = self.start(name, self.whole)
            wait_for_state(process, self.whole)
            shutil.copy(next(self.whole.glob("*.resume.pt")), folder / f"{name}.state.pt")
            startup = time.perf_counter() - begin
            assert status_of(process) == 0, log_of(self.whole)[-300:]
            self.seconds[name] = (startup, time.perf_counter() - begin - startup)
            self.weights[name] = weights(self.whole / FILES[name])

    def arguments(self, name: str, out: Path, *more: str) -> list[str]:
        """The command line of a script that runs in the folder `out`."""
        bilstm = ["--bilstm", str(self.whole / "bilstm.pt")] if name == "classification.py" else []
        return ["--out", str(out), *OPTIONS[name].split(), *bilstm, *more]

    def start(self, name: str, out: Path, *more: str, before: Callable = bool) -> FORKS.Process:
        """Starts a script in a process of its own, which first calls `before`; see log_of for what it prints."""
        log = Path(f"{out}.log")
        log.touch()
        argv = self.arguments(name, out, *more)
        process = FORKS.Process(target=run_script, args=(name, argv, log, self.folder / "corpus", before))
        with LOCK:
            process.start()
        return process

    def check(self, name: str, out: Path, process: FORKS.Process) -> None:
        """Asserts that a run ends as the undisturbed one did, and leaves nothing but its results."""
        assert status_of(process) == 0, log_of(out)[-300:]
        rest = [path.name for path in out.rglob("*") if path.name.startswith(".") or ".resume." in path.name]
        assert set(rest) <= {".lock"}, f"{rest} is left"
        same = weights(out / FILES[name]) == self.weights[name]
        assert same, "the weights differ from those of the undisturbed run"


def run_script(name: str, argv: list[str], log: Path, corpus: Path, before: Callable) -> None:
    """What a new process does: a script on the rows in `corpus`, with its output at the end of `log`."""
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["AG_NEWS_DIR"] = str(corpus)
    multiprocessing.set_start_method(None, force=True)      # the script's own locks and processes are as by default
    torch.set_num_threads(1)
    before()
    sys.exit(SCRIPTS[name].main(argv))


def has_ended(process: FORKS.Process, seconds: float) -> bool:
    """Waits until a process has ended, but at most for so many seconds."""
    end = time.monotonic() + seconds
    while True:
        with LOCK:
            alive = process.is_alive()
        if not alive or time.monotonic() > end:
            return not alive
        time.sleep(0.002)


def status_of(process: FORKS.Process) -> int:
    """The exit status of a process, when it has ended; -N if signal N ended it."""
    assert has_ended(process, 600), "the run takes too long"
    return process.exitcode


def as_bytes(value) -> bytes:
    """What torch.save writes: equal bytes mean equal values, bit for bit."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def weights(file: Path) -> bytes:
    return as_bytes(torch.load(file, weights_only=True)["weights"])


def log_of(out: Path) -> str:
    """What the runs in a folder have printed."""
    return Path(f"{out}.log").read_text(errors="replace")


def assert_refused(process: FORKS.Process, out: Path, sentence: str) -> None:
    """Asserts that a run ends with exit status 2 and says why."""
    status = status_of(process)
    said = log_of(out)
    assert status == 2 and sentence in said and "Traceback" not in said, f"exit status {status}: {said[-300:]!r}"


def saved_step(out: Path) -> int | None:
    """The step at which the saved state continues; None without a state."""
    return next((read_resume(file, {})["run"]["step"] for file in out.glob("*.resume.pt")), None)


def wait_for_state(process: FORKS.Process, out: Path) -> None:
    """Waits until the process has written a state, or has ended."""
    before = time.time_ns()
    while not has_ended(process, 0):
        with suppress(FileNotFoundError):       # the run deletes the state at its end
            if any(file.stat().st_mtime_ns > before for file in out.glob("*.resume.pt")):
                return
        time.sleep(0.002)


# Each of the following functions is one try of a fault, with random numbers of its own. It raises AssertionError if a
# script does not survive, and counts in `found` what it has tried.
def send(process: FORKS.Process, kind: signal.Signals) -> None:
    """Sends a signal to a process, unless it has ended."""
    with suppress(ProcessLookupError):
        os.kill(process.pid, kind)


SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def kills(reference: Reference, k: int, draw: random.Random, found: Counter) -> None:
    """Each signal stops a run once at a random moment, three times in four after it has begun to train; it resumes."""
    name = NAMES[k % 2]
    out = reference.folder / f"kills-{k}"
    step = None
    process = reference.start(name, out, "--resume")
    for kind in draw.sample(SIGNALS, len(SIGNALS)):
        latest, training = reference.seconds[name]
        trains = draw.random() < 0.75
        if trains:
            wait_for_state(process, out)
            latest = 0.2 * training
        has_ended(process, draw.uniform(0, latest))
        send(process, kind)
        status = status_of(process)
        if status == 0:
            found["after_the_end"] += 1
            break
        found.update(["tried", kind.name])
        before = step
        step = saved_step(out)
        found["with_state"] += bool(step)
        assert None in (step, before) or step >= before, f"a state of step {step} after one of step {before}"
        good = status in (-kind, 130) or not trains or step is None     # without a state the run had ended
        assert good, f"exit status {status}: {log_of(out)[-300:]}"
        process = reference.start(name, out, "--resume")
    reference.check(name, out, process)


def load(reference: Reference, name: str, file: Path) -> bytes | None:
    """The content of a published file or of a resume state; None if it is refused in one sentence."""
    try:
        if name == "bilstm.pt":
            return as_bytes(ELMO.ELMo.load(file).model.state_dict())
        if name == "classifier.pt":
            classifier = classification.Classifier.load(file, reference.whole / "bilstm.pt")
            return as_bytes(classifier.predict(["the bank sued the court .", "the court ."]))
        return as_bytes(read_resume(file, {}))
    except InputError as error:
        assert "\n" not in str(error)
        return None


def damaged_files(reference: Reference, k: int, draw: random.Random, found: Counter) -> None:
    """A published file or a resume state is cut short, or has a few wrong bytes: refused, or loaded as it was."""
    folder = reference.whole if k % 4 < 2 else reference.folder
    name = ("bilstm.pt", "classifier.pt", "ELMO.py.state.pt", "classification.py.state.pt")[k % 4]
    content = bytearray((folder / name).read_bytes())
    if k % 3 == 0:
        del content[draw.randrange(len(content)):]
    else:
        for _ in range(draw.choice((1, 1, 2, 8))):
            content[draw.randrange(len(content))] ^= draw.randrange(1, 256)
    damaged = reference.folder / "damaged.pt"
    damaged.write_bytes(content)
    loaded = load(reference, name, damaged)
    found["tried"] += 1
    found["refused"] += loaded is None
    assert loaded in (None, load(reference, name, folder / name)), f"{name} was loaded in spite of its damage"


class Evil(str):
    """The name of a folder, which is made when this is unpickled."""
    def __reduce__(self):
        return os.mkdir, (str(self),)


def code(reference: Reference, k: int, draw: random.Random, found: Counter) -> None:
    """Code stands in one part of a published file, or in its place: refused, and not run."""
    found["tried"] += 1
    name = FILES[NAMES[k % 2]]
    content = torch.load(reference.whole / name, weights_only=True)
    evil = Evil(reference.folder / "was-run")
    places = [content | {key: evil} for key in content]
    file = reference.folder / "evil.pt"
    torch.save([evil, *places][k // 2 % (1 + len(places))], file, _use_new_zipfile_serialization=draw.random() < 0.5)
    assert load(reference, name, file) is None
    assert not Path(evil).exists(), "the code was run"


# TEXT stands for random text, CLASS for what is no class, ROWS for good rows, \udcff for a byte that is not UTF-8.
TEXT = "abc ,;'.#=[]{}\\\t\xa0\u200f\ufeffé١😀"
CLASSES = ["0", "5", "7", "-1", "x", "", " ", "nan", "inf", "1.5", "1e0x", "one", "١٢"]
WRONG = {
    "csv": ['ROWS"CLASS","TEXT","TEXT"\nROWS', 'ROWS"1","TEXT"\nROWS', 'ROWS"1","TEXT","TEXT","TEXT"\nROWS',
            'ROWS"1","t","TEXT\nROWS', 'ROWS"1","t","TEXT\0"\nROWS', 'ROWS"1","t","TEXT\udcff"\nROWS', "", "\n \n",
            "Class Index,Title,Description\n", '"CLASS","TEXT","TEXT"\n'],
    "toml": ["hidden = TEXT", "hidden 12", "[hidden]\nx = 1", "hidden = 12\nhidden = 13", "= 3", "\0", "# \udcff",
             "hidden = true", "hidden = 'a'", "hidden = 0", "lr = nan", "lr = true", "lr = 11", "lr = -1e-9", "no = 1"],
    "json": ["", "{", "{TEXT", "\udcff", "[]", "3", "null", "{}", '"a"', '{"history": []}', '{"settings": []}'],
    "pt": [None, True, 3, "a", [], ["a"], [1, 2, 3], {}, {"a": 1}, {"hidden": 12}, [[]], {"a": {}}]}


def wrong_text(draw: random.Random, kind: str) -> bytes:
    """The content of a wrong CSV, TOML or JSON file."""
    content = draw.choice(WRONG[kind])
    content = content.replace("ROWS", '"1","t","the bank sued the court ."\n' * draw.randrange(4))
    content = content.replace("TEXT", "".join(draw.choices(TEXT, k=draw.randrange(20))))
    return content.replace("CLASS", draw.choice(CLASSES)).encode("utf-8", "surrogateescape")


def wrong_pt(draw: random.Random, content: dict) -> bytes:
    """Bytes, any value, or a published file with one wrong part and, if there can be one, the right digest."""
    value = draw.choice(WRONG["pt"])
    keys = content.keys() & {"config", "words", "labels", "weights", "format"}
    content[draw.choice(sorted(keys))] = value
    with suppress(Exception):       # for example, the weights are no dictionary, so that there is no digest
        content["digest"] = digest(content)
    return draw.choice([draw.randbytes(draw.randrange(200)), as_bytes(value), as_bytes(content), as_bytes(content)])


def draw_figures(file: Path) -> None:
    """Draws the figures of one JSON file, as report/build.py does."""
    with read_json(file) as result:
        if file.stem == "pretraining":
            figures.pretraining(result, file.parent)
        else:
            figures.classification(result, file.parent, "")


def bad_inputs(reference: Reference, k: int, draw: random.Random, found: Counter) -> None:
    """One wrong file for the program that reads it: one sentence, exit status 2, and nothing is written."""
    kind = list(WRONG)[k % 4]
    name = NAMES[k // 4 % 2]
    program = SCRIPTS[name].main
    folder = reference.folder / f"input-{k}"
    shutil.copytree(reference.folder / "corpus", folder)
    argv = reference.arguments(name, folder)
    if kind == "csv":
        file = folder / draw.choice(["train.csv", "test.csv"])
        file.write_bytes(wrong_text(draw, kind))
    elif kind == "toml":
        file = folder / "options.toml"
        file.write_bytes(wrong_text(draw, kind))
        argv = ["--out", str(folder), "--config", str(file)]
    elif kind == "json":
        file = folder / draw.choice(["pretraining.json", "classification.json"])
        file.write_bytes(wrong_text(draw, kind))
        program = script("build.py")(lambda argv: draw_figures(file))
    else:
        file = folder / FILES[name]
        file.write_bytes(wrong_pt(draw, read_published(reference.whole / file.name, SCRIPTS[name].FORMAT, set())))
        use = ["--predict", "a"] if name == "classification.py" else ["--embed", __file__, "--npz", f"{folder}/a.npz"]
        argv = reference.arguments(name, folder, *use)
    found.update(["tried", kind])
    before = sorted(folder.rglob("[!.]*"))
    printed = io.StringIO()
    with redirect_stderr(printed), redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.setenv("AG_NEWS_DIR", str(folder))
        status = program(argv)
    message = printed.getvalue()
    assert status == 2 and message.count("\n") == 1, f"exit status {status}: {message!r}"
    assert kind == "toml" or file.name in message, message
    assert sorted(folder.rglob("[!.]*")) == before, "something was written"


def disk_full(reference: Reference, k: int, draw: random.Random, found: Counter) -> None:
    """The system refuses to write more bytes: one sentence, exit status 2, no part of a file; with room it resumes."""
    found["tried"] += 1
    name = NAMES[k % 2]
    room = sum(path.stat().st_size for path in reference.whole.rglob("*") if path.is_file())
    status = 0
    while status == 0:          # less and less room for a file, until a run does not fit
        room = int(room * draw.uniform(0.05, 0.7))
        out = reference.folder / f"full-{k}-{room}"
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (room + 8192, room + 8192))
        run = reference.start(name, out, before=limit)
        status = status_of(run)
    assert_refused(run, out, "cannot be written")
    assert not list(out.rglob("*.part"))
    reference.check(name, out, reference.start(name, out, "--resume"))


def two_runs(reference: Reference, k: int, draw: random.Random, found: Counter) -> None:
    """A second run starts in the folder of a first, which pauses half-way: the second refuses, the first ends well."""
    found["tried"] += 1
    name = NAMES[k % 2]
    out = reference.folder / f"two-{k}"
    first = reference.start(name, out)
    wait_for_state(first, out)
    send(first, signal.SIGSTOP)
    try:
        second = reference.start(draw.choice(NAMES), out, *draw.choice(([], ["--resume"])))
        assert_refused(second, out, "another run is writing")
    finally:
        send(first, signal.SIGCONT)
    reference.check(name, out, first)


LOSSES = {"ELMO.py": (ELMO, "sampled_nll"), "classification.py": (classification.F, "cross_entropy")}


def poison(name: str, call: int) -> None:
    """Makes the loss function of a script return nan at one of its calls."""
    module, function = LOSSES[name]
    loss = getattr(module, function)
    calls = count()

    def poisoned(*args, **options) -> torch.Tensor:
        factor = float("nan") if next(calls) == call else 1.0
        return factor * loss(*args, **options)

    setattr(module, function, poisoned)


def nan(reference: Reference, k: int, draw: random.Random, found: Counter) -> None:
    """The loss of one direction or head is nan at one step: the run names the step, and resumes from before it."""
    found["tried"] += 1
    name = NAMES[k % 2]
    out = reference.folder / f"nan-{k}"
    step = draw.randrange(30)
    call = 2 * step + draw.randrange(2)         # a step has two calls: one per direction, or one per head
    run = reference.start(name, out, "--save-every", "1000", before=partial(poison, name, call))
    assert_refused(run, out, f"not finite at step {step};")
    assert saved_step(out) == step, f"nan at step {step}, but the state is of step {saved_step(out)}"
    reference.check(name, out, reference.start(name, out, "--resume"))


TRIES = {   # of a long run, of a short one, and how many at a time
    kills: (36, 2, 2), damaged_files: (200, 12, 1), bad_inputs: (300, 40, 1), disk_full: (12, 2, 2),
    two_runs: (8, 2, 2), code: (24, 8, 1), nan: (12, 2, 2)}


def survey(fault: Callable, reference: Reference, short: bool) -> tuple[dict, list[str]]:
    """All tries of a fault: its part of faults.json, and what went wrong in those that a script did not survive."""
    long_run, short_run, at_a_time = TRIES[fault]
    name = fault.__name__
    counts = [Counter() for _ in range(short_run if short else long_run)]
    with ThreadPoolExecutor(at_a_time) as pool:
        tries = [pool.submit(fault, reference, k, random.Random(f"{reference.seed} {name} {k}"), found)
                 for k, found in enumerate(counts)]
    errors = [future.exception() for future in tries]
    failures = [f"{name}, try {k}: {error!r:.400}" for k, error in enumerate(errors) if error]
    tried = sum(counts, Counter())
    survived = sum((found for found, error in zip(counts, errors, strict=True) if not error), Counter())
    result = {"tried": tried["tried"], "survived": survived["tried"]}
    if fault is kills:
        result |= {"with_state": tried["with_state"], "after_the_end": tried["after_the_end"],
                   "by_signal": {kind.name: tried[kind.name] for kind in SIGNALS}}
    elif fault is damaged_files:
        result["refused"] = tried["refused"]
    elif fault is bad_inputs:
        result["by_kind"] = {kind: {"tried": tried[kind], "survived": survived[kind]} for kind in WRONG}
    elif fault is disk_full:
        result["by"] = "limit on the size of a file"
    return result, failures


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Reference:
    return Reference(tmp_path_factory.mktemp("faults"), seed=0)


@pytest.mark.parametrize("fault", TRIES)
def test_both_scripts_survive(fault, reference):
    counts, failures = survey(fault, reference, short=True)
    assert not failures
    assert counts["tried"] > 0


@script("test_faults.py")
def main(argv: list[str] | None = None) -> int:
    """Exit status 0 if everything survived, 1 otherwise, 2 for an input that the user can fix."""
    begin = time.perf_counter()
    parser = Parser(prog="test_faults.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="as few tries as in the test suite")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default 0)")
    parser.add_argument("--out", type=Path, default=ROOT / "models" / "faults.json", help="default models/faults.json")
    options = parser.parse_args(argv)
    result = {}
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        reference = Reference(Path(folder), options.seed)
        for fault in TRIES:
            result[fault.__name__], new = survey(fault, reference, options.quick)
            print(f"{fault.__name__}: {result[fault.__name__]}", *new, sep="\n", flush=True)
            failures += new
    command = " ".join(["python", "tests/test_faults.py", *sys.argv[1:]])
    about = {"command": command, "machine": describe(torch.device("cpu")), "versions": versions()}
    write_json(options.out, result | {"failures": failures, "seed": options.seed} | about | {
        "seconds": time.perf_counter() - begin})
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
