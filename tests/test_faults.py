"""What both scripts survive: kills, damaged files, wrong inputs, a full disk, a second run, code in a file, a nan loss.

    pytest tests/test_faults.py                         a few tries of each fault, as a part of the test suite
    python tests/test_faults.py [--quick] [--seed N]    many tries, to models/faults.json; about 15 minutes on two cores

A run that was disturbed must end with the weights of one that was not, bit for bit. faults.json has {tried, survived}
of each fault, then failures [sentences], seed, command, machine, versions and seconds. Some faults have more counts:
with_state (stops after step 0), after_the_end (signals that came too late to be tried) and by_signal of kills, refused
of damaged_files, by_kind of bad_inputs, and for disk_full by what the room was limited.
"""
import argparse
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # run as `python tests/test_faults.py`

import classification
import ELMO
from data import sample
from run import figures
from run.checkpoint import digest, read_published, read_resume
from run.files import InputError, one_line, read_json, write_json
from run.machine import machine, versions
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
            assert process.wait() == 0, log_of(self.whole)[-300:]
            self.seconds[name] = (startup, time.perf_counter() - begin - startup)
            self.weights[name] = weights(self.whole / FILES[name])

    def arguments(self, name: str, out: Path, *more: str) -> list[str]:
        """The command line of a script that runs in the folder `out`."""
        bilstm = ["--bilstm", str(self.whole / "bilstm.pt")] if name == "classification.py" else []
        return ["--out", str(out), *OPTIONS[name].split(), *bilstm, *more]

    def start(self, name: str, out: Path, *more: str, program: str = "", limit: int = 0) -> subprocess.Popen:
        """Starts a script, or `program` in its place; `limit`: bytes that it may write to one file."""
        def prepare() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)        # a background job of a shell ignores SIGINT
            if limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        python = [sys.executable, "-c", program] if program else [sys.executable, str(ROOT / name)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "AG_NEWS_DIR": str(self.folder / "corpus")}
        with open(f"{out}.log", "ab") as log:
            return subprocess.Popen([*python, *self.arguments(name, out, *more)], env=environment, stdout=log,
                                    stderr=log, cwd=ROOT, preexec_fn=prepare)

    def check(self, name: str, out: Path, process: subprocess.Popen) -> None:
        """Asserts that a run ends as the undisturbed one did, and leaves nothing but its results."""
        assert process.wait() == 0, f"exit status {process.returncode}: {log_of(out)[-300:]!r}"
        rest = [path.name for path in out.rglob("*") if path.name.startswith(".") or ".resume." in path.name]
        assert set(rest) <= {".lock"}, f"{rest} is left"
        assert weights(out / FILES[name]) == self.weights[name], "the weights differ from the undisturbed run's"

    def resume(self, name: str, out: Path) -> None:
        self.check(name, out, self.start(name, out, "--resume"))


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


def assert_refused(process: subprocess.Popen, out: Path, sentence: str) -> None:
    """Asserts that a run ends with exit status 2 and says why."""
    status = process.wait()
    said = log_of(out)
    assert status == 2 and sentence in said and "Traceback" not in said, f"exit status {status}: {said[-300:]!r}"


def state_of(out: Path) -> Path | None:
    """The file from which a run in this folder can resume."""
    return next(out.glob("*.resume.pt"), None)


def saved_step(out: Path) -> int:
    """The step at which the saved state continues; 0 without a state."""
    file = state_of(out)
    return read_resume(file, {})["run"]["step"] if file else 0


def wait_for_state(process: subprocess.Popen, out: Path) -> None:
    """Waits until the process has written a state, or has ended."""
    before = time.time_ns()
    while process.poll() is None:
        with suppress(FileNotFoundError):       # the run deletes the state at its end
            if any(file.stat().st_mtime_ns > before for file in out.glob("*.resume.pt")):
                return
        time.sleep(0.002)


# Each of the following functions is one try of a fault, with random numbers of its own. It raises AssertionError if a
# script does not survive, and counts in `found` what it has tried.
# ------------------------------------------------------------------------------------------------------ kills
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def kills(reference: Reference, k: int, draw: random.Random, found: Counter) -> None:
    """Each signal stops a run once at a random moment, three times in four after it has begun to train; it resumes."""
    name = NAMES[k % 2]
    out = reference.folder / f"kills-{k}"
    step = 0
    process = reference.start(name, out, "--resume")
    for kind in draw.sample(SIGNALS, len(SIGNALS)):
        begins = len(log_of(out))
        latest, training = reference.seconds[name]
        trains = draw.random() < 0.75
        if trains:
            wait_for_state(process, out)
            latest = 0.2 * training
        with suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0, latest))
        process.send_signal(kind)
        if process.wait() == 0:
            found["after_the_end"] += 1
            break
        found.update(["tried", kind.name])
        before = step
        step = saved_step(out)
        found["with_state"] += step > 0
        assert step >= before or not state_of(out), f"a state of step {step} after one of step {before}"
        assert not trains or "Traceback" not in log_of(out)[begins:], log_of(out)[-300:]
        process = reference.start(name, out, "--resume")
    reference.check(name, out, process)


# ---------------------------------------------------------------------------------------------- damage and code
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


# ----------------------------------------------------------------------------------------------- wrong inputs
KINDS = ("csv", "toml", "json", "pt")
WRONG_CLASSES = ["0", "5", "7", "-1", "x", "", " ", "nan", "inf", "1.5", "1e0x", "one", "١٢"]
WRONG_TOML = ["hidden = ", "hidden 12", "[hidden]\nx = 1", "hidden = 12\nhidden = 13", "hidden = [1", "= 3", "\0",
              "hidden = true", "hidden = 'a'", "hidden = 1.5", "hidden = 0", "hidden = -3", "lr = nan", "lr = inf",
              "lr = 'a'", "lr = true", "lr = 11", "lr = -1e-9", "hidden_ = 1"]
WRONG_JSON = ["", "{", "[]", "3", "null", "{}", '"a"', '{"history": []}', '{"settings": {}}', '{"confusion": 3}']
WRONG_PARTS = [None, True, 3, "a", [], ["a"], [1, 2, 3], {}, {"a": 1}, {"hidden": 12}, [[]], {"a": {}}]


def noise(draw: random.Random) -> str:
    """Up to 20 characters, some of them unusual; no quotes and no line ends."""
    return "".join(draw.choices("abc ,;'.#=[]{}\\\t\xa0\u200f\ufeffé١😀", k=draw.randrange(20)))


def wrong_csv(draw: random.Random) -> bytes:
    """Good rows around a wrong one, or a file that is wrong as a whole."""
    text = noise(draw)
    wrong = draw.choice([
        f'"{draw.choice(WRONG_CLASSES)}","{text}","{text}"', f'"1","{text}"',
        '"1"' + f',"{text}"' * draw.randrange(3, 9),
        f'"1","t","{text}', f'"1","t","{text}\0"', f'"1","t","{text}\udcff"'])
    row = '"1","t","the bank sued the court ."\n'
    content = row * draw.randrange(4) + wrong + "\n" + row * draw.randrange(4)
    whole = draw.choice(["", "\n\n \n", "Class Index,Title,Description\n", f'"Class","{text}","{text}"\n', "\udcff"])
    return draw.choice([content, content, whole]).encode("utf-8", "surrogateescape")


def wrong_pt(draw: random.Random, good: dict) -> bytes:
    """Bytes, any value, or a published file with one wrong part and, if there can be one, the right digest."""
    value = draw.choice(WRONG_PARTS)
    good[draw.choice(sorted(good.keys() & {"config", "words", "labels", "weights", "format"}))] = value
    file = io.BytesIO()
    with suppress(Exception):       # for example, the weights are no dictionary, so that there is no digest
        good["digest"] = digest(good)
    torch.save(good, file)
    return draw.choice([draw.randbytes(draw.randrange(200)), as_bytes(value), file.getvalue(), file.getvalue()])


def draw_figures(file: Path) -> None:
    """Draws the figures of one JSON file, as report/build.py does."""
    with read_json(file) as result:
        if file.stem == "pretraining":
            figures.pretraining(result, file.parent)
        else:
            figures.classification(result, file.parent, "")


def bad_inputs(reference: Reference, k: int, draw: random.Random, found: Counter) -> None:
    """One wrong file for the program that reads it: one sentence, exit status 2, and nothing is written."""
    kind = KINDS[k % 4]
    name = NAMES[k // 4 % 2]
    program = SCRIPTS[name].main
    folder = reference.folder / f"input-{k}"
    shutil.copytree(reference.folder / "corpus", folder)
    argv = reference.arguments(name, folder)
    if kind == "csv":
        file = folder / draw.choice(["train.csv", "test.csv"])
        file.write_bytes(wrong_csv(draw))
    elif kind == "toml":
        file = folder / "options.toml"
        file.write_text(draw.choice([*WRONG_TOML, f"hidden = {noise(draw)}"]))
        argv = ["--out", str(folder), "--config", str(file)]
    elif kind == "json":
        file = folder / draw.choice(["pretraining.json", "classification.json"])
        file.write_text(draw.choice([*WRONG_JSON, "{" + noise(draw)]))
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


# ----------------------------------------------------------------------------------------- disk, second run, nan
def mount(folder: Path, options: str) -> bool:
    """Mounts a file system in memory, or changes its options; whether this user may do so."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0


def disk_full(reference: Reference, k: int, draw: random.Random, found: Counter) -> None:
    """The folder has too little room: one sentence, exit status 2, no part of a file; with more room it resumes."""
    found["tried"] += 1
    name = NAMES[k % 2]
    size = sum(path.stat().st_size for path in reference.whole.rglob("*") if path.is_file())
    status = 0
    while status == 0:          # less and less room, until the run does not fit
        size = int(size * draw.uniform(0.05, 0.7))
        out = reference.folder / f"full-{k}-{size}"
        mounted = mount(out, f"size={8192 + size}")
        found["mounted"] += mounted
        try:
            run = reference.start(name, out, "--resume", limit=8192 + size)
            status = run.wait()
            if status != 0:
                assert_refused(run, out, "cannot be written")
                assert not list(out.rglob("*.part"))
                if mounted:
                    mount(out, "remount,size=100m")
                reference.resume(name, out)
        finally:
            if mounted:
                subprocess.run(["umount", out], check=True)


def two_runs(reference: Reference, k: int, draw: random.Random, found: Counter) -> None:
    """A second run starts in the folder of a first, which pauses half-way: the second refuses, the first ends well."""
    found["tried"] += 1
    name = NAMES[k % 2]
    out = reference.folder / f"two-{k}"
    first = reference.start(name, out)
    wait_for_state(first, out)
    first.send_signal(signal.SIGSTOP)
    try:
        second = reference.start(draw.choice(NAMES), out, *draw.choice(([], ["--resume"])))
        assert_refused(second, out, "another run is writing")
    finally:
        first.send_signal(signal.SIGCONT)
    reference.check(name, out, first)


POISON = """
import itertools, sys
import {module} as script
loss = {function}
calls = itertools.count()
def poisoned(*args, **options):
    factor = float("nan") if next(calls) == {call} else 1.0
    return factor * loss(*args, **options)
{function} = poisoned
sys.exit(script.main())
"""
LOSSES = {"ELMO.py": ("script.sampled_nll", 2),                     # the function, and how often a step calls it:
          "classification.py": ("script.F.cross_entropy", 2)}       # once per direction, once per head


def nan(reference: Reference, k: int, draw: random.Random, found: Counter) -> None:
    """The loss of one direction or head is nan at one step: the run names the step, and resumes from before it."""
    found["tried"] += 1
    name = NAMES[k % 2]
    out = reference.folder / f"nan-{k}"
    function, calls = LOSSES[name]
    step = draw.randrange(30)
    call = calls * step + draw.randrange(calls)
    program = POISON.format(module=name.removesuffix(".py"), function=function, call=call)
    run = reference.start(name, out, "--save-every", "1000", program=program)       # only its end saves a state
    assert_refused(run, out, f"not finite at step {step};")
    assert saved_step(out) == step, f"nan at step {step}, but the state is of step {saved_step(out)}"
    reference.resume(name, out)


# ---------------------------------------------------------------------------------------------------- all faults
TRIES = {   # of a long run, of a short one, and how many at a time
    kills: (34, 2, 2), damaged_files: (200, 12, 1), bad_inputs: (300, 40, 1), disk_full: (12, 2, 2),
    two_runs: (8, 2, 2), code: (24, 8, 1), nan: (12, 2, 2)}


def survey(fault, reference: Reference, short: bool) -> tuple[dict, list[str]]:
    """All tries of a fault: its part of faults.json, and the failures."""
    def attempt(k: int) -> tuple[Counter, str]:
        found = Counter()
        try:
            fault(reference, k, random.Random(f"{reference.seed} {fault.__name__} {k}"), found)
        except Exception as error:
            return found, f"{fault.__name__}, try {k}: {type(error).__name__}: {one_line(error)}"
        return found, ""

    long_run, short_run, at_a_time = TRIES[fault]
    with ThreadPoolExecutor(at_a_time) as pool:
        outcomes = list(pool.map(attempt, range(short_run if short else long_run)))
    tried = sum((found for found, _ in outcomes), Counter())
    survived = sum((found for found, failure in outcomes if not failure), Counter())
    counts = {"tried": tried["tried"], "survived": survived["tried"]}
    if fault is kills:
        counts |= {"with_state": tried["with_state"], "after_the_end": tried["after_the_end"],
                   "by_signal": {kind.name: tried[kind.name] for kind in SIGNALS}}
    elif fault is damaged_files:
        counts["refused"] = tried["refused"]
    elif fault is bad_inputs:
        counts["by_kind"] = {kind: {"tried": tried[kind], "survived": survived[kind]} for kind in KINDS}
    elif fault is disk_full:
        counts["by"] = "tmpfs" if tried["mounted"] else "limit on the size of a file"
    return counts, [failure for _, failure in outcomes if failure]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Reference:
    return Reference(tmp_path_factory.mktemp("faults"), seed=0)


@pytest.mark.parametrize("fault", TRIES)
def test_both_scripts_survive(fault, reference):
    counts, failures = survey(fault, reference, short=True)
    assert not failures
    assert counts["tried"] > 0


@script("test_faults.py")
def main(argv: Sequence[str] | None = None) -> int:
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
    command = " ".join(["python", "tests/test_faults.py", *(sys.argv[1:] if argv is None else argv)])
    write_json(options.out, result | {
        "failures": failures, "seed": options.seed, "command": command, "machine": machine(torch.device("cpu")),
        "versions": versions(), "seconds": time.perf_counter() - begin})
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
