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
import itertools
import multiprocessing
import os
import random
import re
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
from contextlib import redirect_stdout, suppress
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # run as `python tests/test_faults.py`

from conftest import FILES, ROOT, SCRIPTS, arguments, files, refused, save_empty

import classification
import ELMO
from data import sample
from run import figures
from run.checkpoint import digest, read_published, read_resume
from run.files import InputError, read_json, write_json
from run.machine import describe, versions
from run.options import Parser, script

NAMES = list(SCRIPTS)
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
        self.files = {}         # what it has written
        self.seconds = {}
        sample.write(folder / "corpus", 600, seed=0, test_rows=100)
        for name in NAMES:
            before = files(self.whole)
            begin = time.perf_counter()
            process = self.start(name, self.whole)
            wait_for_state(process, self.whole)
            shutil.copy(next(self.whole.glob("*.resume.pt")), folder / f"{name}.state.pt")
            assert status_of(process) == 0, log_of(self.whole)[-300:]
            self.seconds[name] = time.perf_counter() - begin
            self.files[name] = [file for file in files(self.whole) if file not in before]
            self.weights[name] = weights(self.whole / FILES[name])

    def start(self, name: str, out: Path, *more: str, before: Callable = bool) -> FORKS.Process:
        """Starts a script in a process of its own, which first calls `before`; see log_of for what it prints."""
        log = Path(f"{out}.log")
        log.touch()
        argv = arguments(name, out, self.whole / "bilstm.pt", *more)
        process = FORKS.Process(target=run_script, args=(name, argv, log, self.folder / "corpus", before))
        with LOCK:
            process.start()
        return process

    def check(self, name: str, out: Path, process: FORKS.Process) -> None:
        """Asserts that a run ends as the undisturbed one did, and writes nothing but its results."""
        assert status_of(process) == 0, log_of(out)[-300:]
        assert files(out) == self.files[name]
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
    figures.save = save_empty
    before()
    sys.exit(SCRIPTS[name].main(argv))


def has_ended(process: FORKS.Process, seconds: float) -> bool:
    """Waits until a process has ended, but at most for so many seconds."""
    return bool(wait([process.sentinel], seconds))


def status_of(process: FORKS.Process) -> int:
    """The exit status of a process, when it has ended; -N if signal N ended it."""
    assert has_ended(process, 600), "the run takes too long"
    with LOCK:
        process.join()
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
    while not has_ended(process, 0.002):
        with suppress(FileNotFoundError):       # the run deletes the state at its end
            if any(file.stat().st_mtime_ns > before for file in out.glob("*.resume.pt")):
                return


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
        trains = draw.random() < 0.75
        if trains:
            wait_for_state(process, out)
        has_ended(process, draw.uniform(0, 0.15 * reference.seconds[name]))
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
    found["refused"] += loaded is None
    assert loaded in (None, load(reference, name, folder / name)), f"{name} was loaded in spite of its damage"


class Evil(str):
    """The name of a folder, which is made when this is unpickled."""
    def __reduce__(self):
        return os.mkdir, (str(self),)


def code(reference: Reference, k: int, draw: random.Random, found: Counter) -> None:
    """Code stands in one part of a published file, or in its place: refused, and not run."""
    name = FILES[NAMES[k % 2]]
    content = torch.load(reference.whole / name, weights_only=True)
    evil = Evil(reference.folder / "was-run")
    places = [content | {key: evil} for key in content]
    file = reference.folder / "evil.pt"
    torch.save([evil, *places][k // 2 % (1 + len(places))], file, _use_new_zipfile_serialization=draw.random() < 0.5)
    assert load(reference, name, file) is None
    assert not Path(evil).exists(), "the code was run"


# In a wrong file, TEXT stands for random characters and ROWS for one to three good rows.
TEXT = "abc ,;'.#=[]{}\\\t\xa0\u200f\ufeffé١😀"
ROW = b'"1","t","the bank sued the court ."\n'
CLASSES = ["0", "5", "7", "-1", "x", "", " ", "nan", "inf", "1.5", "1e0x", "one", "١٢"]
TOML = {                                                # content: what the sentence says
    b"hidden = TEXT": "", b"hidden = ": "not TOML", b"hidden 12": "not TOML", b"hidden = 12\nhidden = 13": "not TOML",
    b"= 3": "not TOML", b"\0": "not TOML", b"# \xff": "not UTF-8", b"[hidden]\nx = 1": "expected int",
    b"hidden = true": "expected int", b"hidden = 'x'": "expected int", b"dropout = true": "expected float",
    b"hidden = 0": "hidden is 0", b"lr = nan": "lr is nan", b"lr = 11": "lr is 11", b"lr = -1e-9": "lr is -1e-09",
    b"colour = 3": "'colour' is no option"}
WRONG = {
    "csv": [
        *[b'ROWS"%b","TEXT","TEXT"\nROWS' % label.encode() for label in CLASSES], b'"0","TEXT","TEXT"\n',
        b'"1","TEXT"\n', b'ROWS"1","TEXT"\nROWS', b'"1","TEXT","TEXT","TEXT"\n', b'ROWS"1","TEXT","TEXT","TEXT"\nROWS',
        b'ROWS"2","a","TEXT\n', b'ROWS"1","t","TEXT\nROWS', b'ROWS"1","t","TEXT\0"\nROWS', b'ROWS"2","a","caf\xe9"\n',
        b"", b"\n \n", b'""\n', b'"1","a",""\n"2","b"," "\n', b"Class Index,Title,Description\n",
        b"Title,Class Index,Description\na,1,b\n", b"label,text\n1,a\n", ROW.decode().encode("utf-16"),
        bytes(range(256)) * 20],
    "toml": list(TOML),
    "json": [b"", b"{", b"{TEXT", b"\xff", b"[]", b"3", b"null", b"{}", b'"a"', b'{"history": []}',
             b'{"settings": []}'],
    "pt": [None, True, 3, "a", [], ["a"], [1, 2, 3], {}, {"a": 1}, {"hidden": 12}, [[]], {"a": {}}]}
CASES = []                                              # (kind, script, which of two files, content)
for wrong_kind, contents in WRONG.items():
    CASES += itertools.product([wrong_kind], NAMES, (0, 1), contents)


def published(content: dict) -> bytes:
    """A published file of this content, with the right digest if it can have one."""
    with suppress(Exception):       # for example, the weights are no dictionary
        content["digest"] = digest(content)
    return as_bytes(content)


def using(name: str, folder: Path, bilstm: Path) -> list[str]:
    """The command line of a script that uses the published file in a folder."""
    use = {"ELMO.py": ["--embed", __file__, "--npz", f"{folder}/a.npz"],
           "classification.py": ["--setting", "all", "--predict", "a"]}
    return arguments(name, folder, bilstm, *use[name])


DRAW = {"pretraining.json": figures.pretraining, "classification.json": partial(figures.classification, stem="")}


@script("build.py")
def draw_figures(argv: list[str]) -> None:
    """Draws the figures of one JSON file, as report/build.py does."""
    file = Path(argv[0])
    with read_json(file) as result:
        DRAW[file.name](result, out=file.parent)


def bad_inputs(reference: Reference, k: int, draw: random.Random, found: Counter) -> None:
    """One wrong file for the program that reads it: one sentence, exit status 2, and nothing is written."""
    kind, name, which, content = CASES[k % len(CASES)]
    found[kind] += 1
    folder = reference.folder / f"input-{k}"
    shutil.copytree(reference.folder / "corpus", folder)
    names = {"csv": ["train.csv", "test.csv"], "toml": ["a.toml"] * 2, "json": list(DRAW), "pt": [FILES[name]] * 2}
    file = folder / names[kind][which]
    if kind == "pt":            # random bytes, the value by itself, or in the place of one part of a published file
        whole = read_published(reference.whole / file.name, SCRIPTS[name].FORMAT, set())
        part = draw.choice(sorted(whole.keys() & {"config", "words", "labels", "weights", "format"}))
        wrong = published(whole | {part: content})
        file.write_bytes(draw.choice([draw.randbytes(draw.randrange(200)), as_bytes(content), wrong, wrong]))
    else:
        text = "".join(draw.choices(TEXT, k=draw.randrange(20))).encode()
        file.write_bytes(content.replace(b"ROWS", ROW * draw.randrange(1, 4)).replace(b"TEXT", text))
    bilstm = reference.whole / "bilstm.pt"
    argv = {"csv": arguments(name, folder, bilstm), "toml": ["--out", str(folder), "--config", str(file)],
            "json": [str(file)], "pt": using(name, folder, bilstm)}
    program = "build.py" if kind == "json" else name
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()):
        patch.setenv("AG_NEWS_DIR", str(folder))
        message = refused(program, argv[kind], folder, draw_figures if kind == "json" else None)
    expected = TOML[content] if kind == "toml" else file.name
    assert expected in message, f"{content!r}: {message}"


def disk_full(reference: Reference, k: int, draw: random.Random, found: Counter) -> None:
    """The system refuses to write more bytes: one sentence, exit status 2, no part of a file; with room it resumes."""
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
    calls = itertools.count()

    def poisoned(*args, **options) -> torch.Tensor:
        factor = float("nan") if next(calls) == call else 1.0
        return factor * loss(*args, **options)

    setattr(module, function, poisoned)


def nan(reference: Reference, k: int, draw: random.Random, found: Counter) -> None:
    """The loss of one direction or head is nan at one step: the run names the step, and resumes from before it."""
    name = NAMES[k % 2]
    out = reference.folder / f"nan-{k}"
    step = draw.randrange(30)
    call = 2 * step + draw.randrange(2)         # a step has two calls: one per direction, or one per head
    run = reference.start(name, out, "--save-every", "1000", before=partial(poison, name, call))
    assert_refused(run, out, f"diverged at step {step}:")
    assert saved_step(out) == step, f"nan at step {step}, but the state is of step {saved_step(out)}"
    reference.check(name, out, reference.start(name, out, "--resume"))


TRIES = {   # of a long run, of a short one, and how many at a time
    kills: (36, 2, 2), damaged_files: (200, 12, 1), bad_inputs: (300, len(CASES), 1), disk_full: (12, 2, 2),
    two_runs: (8, 2, 2), code: (24, 8, 1), nan: (12, 2, 2)}


def survey(fault: Callable, reference: Reference, short: bool) -> tuple[dict, list[str]]:
    """All tries of a fault: its part of faults.json, and what went wrong in those that a script did not survive."""
    long_run, short_run, at_a_time = TRIES[fault]
    name = fault.__name__
    counts = [Counter(tried=int(fault is not kills)) for _ in range(short_run if short else long_run)]
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


@pytest.mark.parametrize("name", NAMES)
def test_ctrl_c_stops_between_two_steps_publishes_nothing_and_resumes(name, reference):
    out = reference.folder / f"ctrl-c-{name}"
    process = reference.start(name, out)
    while ": validation " not in log_of(out):   # until the first evaluation is complete
        assert not has_ended(process, 0.01)
    send(process, signal.SIGINT)
    assert status_of(process) == 130
    log = log_of(out)
    assert "Traceback" not in log
    assert "--resume continues" in log
    assert files(out) == [FILES[name].replace(".pt", ".resume.pt")]
    reference.check(name, out, reference.start(name, out, "--resume"))
    for evaluation in re.findall(r"epoch [\d.]+: validation", log):
        assert log_of(out).count(evaluation) == 1


@pytest.mark.parametrize("name, change, message", [
    ("ELMO.py", lambda content: content["config"].update(hidden=16), "does not fit together"),
    ("ELMO.py", lambda content: content["config"].update(hidden=-1), "bilstm.pt: hidden is -1"),
    ("ELMO.py", lambda content: content["config"].update(colour="red"), "does not fit together"),
    ("ELMO.py", lambda content: content["config"].update(hidden=65536, width=8192), "does not fit together"),
    ("ELMO.py", lambda content: content["words"].pop(), "vocabulary does not fit"),
    ("ELMO.py", lambda content: content["words"].reverse(), "vocabulary does not fit"),
    ("ELMO.py", lambda content: content.update(words=3), "does not fit together"),
    ("ELMO.py", lambda content: content.pop("words"), "it lacks"),
    ("ELMO.py", lambda content: content["weights"].pop("bias"), "does not fit together"),
    ("ELMO.py", lambda content: content["weights"].update(bias=content["weights"]["bias"].to_sparse()), "its digest"),
    ("ELMO.py", lambda content: content["weights"].update(bias=Parameter(content["weights"]["bias"])), "its digest"),
    ("ELMO.py", lambda content: content.update(digest=None, weights=3), "its digest"),
    ("ELMO.py", lambda content: content.update(format="elmo-bilm-1"), "'elmo-bilm-1' instead of 'elmo-bilm-2'"),
    ("ELMO.py", lambda content: content.clear(), "no checkpoint of this kind"),
    ("classification.py", lambda content: content["config"].update(hidden=7), "does not fit together"),
    ("classification.py", lambda content: content["config"].update(hidden=0), "classifier.pt: hidden is 0"),
    ("classification.py", lambda content: content["labels"].pop(), "does not fit together"),
    ("classification.py", lambda content: content["weights"].clear(), "does not fit together"),
    ("classification.py", lambda content: content["heads"].clear(), "does not fit together"),
    ("classification.py", lambda content: content["bilm"].clear(), "does not fit together"),
    ("classification.py", lambda content: content.update(format="elmo-bilm-2"), "instead of 'elmo-classifier-2'"),
    ("classification.py", lambda content: content.pop("labels"), "lacks labels")])
def test_a_changed_file_is_refused_even_if_its_digest_is_right(whole, tmp_path, name, change, message):
    content = torch.load(whole / FILES[name], weights_only=True)
    change(content)
    (tmp_path / FILES[name]).write_bytes(published(content))
    assert message in refused(name, using(name, tmp_path, whole / "bilstm.pt"), tmp_path)


def test_an_older_bilm_with_options_that_are_constants_now_still_loads(whole, tmp_path):
    content = torch.load(whole / "bilstm.pt", weights_only=True)
    content["config"].update(beta1=0.8, clip=0.5)
    (tmp_path / "bilstm.pt").write_bytes(published(content))
    before = ELMO.ELMo.load(whole / "bilstm.pt").embed(["a"])
    assert torch.equal(ELMO.ELMo.load(tmp_path / "bilstm.pt").embed(["a"])[0], before[0])


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
