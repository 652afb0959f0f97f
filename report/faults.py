"""What both scripts survive: kills, damaged files, wrong inputs, a full disk, a second run, a loss that is no number.

    python report/faults.py             everything; about 15 minutes on two cores, to models/faults.json
    python report/faults.py --quick     a tenth of it

Every script runs on the built-in corpus as a user runs it, in a folder of its own that is deleted afterwards.
Schema of faults.json: for each of the parts below {tried, survived} and what is counted besides; failures [what did
not survive, in words]; seed (of all that is drawn), command, machine, versions, seconds.
    kills: a script gets SIGKILL, SIGTERM or SIGINT at a random moment, three in four times after it has begun to train,
        and is resumed until it ends; survived where the weights of that end are those of an undisturbed run, bit for
        bit, no saved state was of an earlier step than the one before it, and what began to train said no traceback.
        by_signal; with_state: those that left a state beyond step 0; after_the_end: came too late, not in tried
    damaged_files: a checkpoint cut short, or with bytes flipped, at a random place; survived where it is refused in
        one sentence, or what is loaded equals the undamaged one. refused
    bad_inputs: CSV, TOML, JSON and .pt files that are wrong by construction, drawn by hypothesis; survived where the
        script says one sentence, ends with exit status 2 and writes nothing. by_kind
    disk_full: a run whose folder has too little room; survived where it says one sentence, ends with exit status 2,
        leaves no part of a file, and a resumed run with more room ends with the right weights. by: what was too small
    two_runs: a second run on the folder of a first; survived where it says so and stops with exit status 2, and the
        first ends with the right weights
    code: a .pt whose pickle would run code; survived where it is refused and nothing was run
    nan: a loss that is not finite at a random step; survived where the run names the step, stops with exit status 2
        and, resumed without the fault, ends with the right weights
"""
import argparse
import contextlib
import io
import json
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # run as `python report/faults.py`

import classification
import ELMO
from data import sample
from data.files import InputError, read_published, read_resume, write_json, write_published
from data.knobs import Parser, script
from data.machine import machine, versions
from report import figures

ROOT = Path(__file__).resolve().parent.parent
COMMON = ["--log-every", "20", "--save-every", "0.1"]
BILM = ["--hidden", "12", "--validation", "60", "--epochs", "3", "--batch-tokens", "300", "--negatives", "50",
        "--lr", "0.01", "--table-lr", "0.01", "--min-count", "2", *COMMON]
HEADS = ["--hidden", "8", "--epochs", "2", "--batch-tokens", "300", *COMMON]
FILES = {"ELMO.py": "bilstm.pt", "classification.py": "classifier.pt"}
MODULES = {"ELMO.py": ELMO, "classification.py": classification}


class TestBed:
    """The folder of all runs: a corpus, an undisturbed run of each script, and how its result is told."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed, self.seconds, self.failures = folder, seed, {}, []
        self.random = random.Random(seed)
        sample.write(folder / "corpus", 600, seed=0, test_rows=100)
        os.environ["AG_NEWS_DIR"] = str(folder / "corpus")
        for name in FILES:
            begin = time.perf_counter()
            end = self.run(name, folder / "whole", "--resume").wait()
            self.seconds[name] = time.perf_counter() - begin
            if end:
                raise InputError(f"{name} failed undisturbed: {' '.join(log_of(folder / 'whole').split())[-300:]}")
        self.whole = {name: weights(folder / "whole" / file) for name, file in FILES.items()}

    def argv(self, name: str, out: Path, *more: str) -> list[str]:
        own = BILM if name == "ELMO.py" else [*HEADS, "--bilstm", str(self.folder / "whole" / "bilstm.pt")]
        return ["--out", str(out), *own, *more]

    def run(self, name: str, out: Path, *more: str, before: Callable | None = None) -> subprocess.Popen:
        """The script in a process of one thread, what it prints appended to a log beside that folder."""
        def begin() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)        # a shell's background job ignores it
            if before:
                before()
        with open(f"{out}.log", "ab") as log:
            return subprocess.Popen(
                [sys.executable, str(ROOT / name), *self.argv(name, out, *more)], stdout=log, stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"}, preexec_fn=begin)

    def right(self, name: str, out: Path) -> bool:
        """Whether a run ended with the undisturbed one's weights, and left nothing but its results."""
        left = [path.name for path in out.iterdir() if path.name.startswith(".") or ".resume." in path.name]
        return not left and same(weights(out / FILES[name]), self.whole[name])

    def fail(self, what: str) -> None:
        print(f"FAILED: {what}", flush=True)
        self.failures.append(what)


def weights(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)["weights"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def log_of(out: Path) -> str:
    return Path(f"{out}.log").read_text(errors="replace")


# ------------------------------------------------------------------------------------------------------ kills
def kills(bed: TestBed, number: int) -> dict:
    """Both scripts side by side, each interrupted `number` / 2 times."""
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(partial(interrupted, bed), FILES, [number // 2] * 2, [1, 2]))
    return {key: sum((part[key] for part in parts), type(parts[0][key])()) for key in parts[0]}


def interrupted(bed: TestBed, name: str, number: int, seed: int) -> dict:
    """One script: runs that are interrupted and resumed until each ends by itself."""
    draw, found = random.Random(bed.seed + seed), {"tried": 0, "survived": 0, "with_state": 0, "after_the_end": 0}
    signals, run = Counter(), 0
    while found["tried"] < number:
        out, hits, step, wrong = bed.folder / f"kills-{seed}-{run}", 0, 0, ""
        run += 1
        while True:
            process, said = bed.run(name, out, "--resume"), len(log_of(out))
            if found["tried"] + hits >= number:
                process.wait()
                break
            kind, begun = draw.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)), draw.random() < 0.75
            if begun:
                wait_for_state(process, out)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(draw.uniform(0, bed.seconds[name] * (0.3 if begun else 1.2)))
                break                                   # by itself
            process.send_signal(kind)
            if process.wait() == 0:
                found["after_the_end"] += 1
                break
            hits += 1
            signals[kind.name] += 1
            found["with_state"] += (now := saved_step(out)) > 0
            if (states(out) and now < step) or (begun and "Traceback" in log_of(out)[said:]):
                wrong = f"state of step {now} after one of step {step}, {log_of(out)[said:][-300:]!r}"
            step = now
        found["tried"] += hits
        if process.returncode == 0 and bed.right(name, out) and not wrong:
            found["survived"] += hits
        else:
            bed.fail(f"{name} after {hits} signals: {process.returncode}, {wrong or log_of(out)[-300:]!r}")
        shutil.rmtree(out)
    return found | {"by_signal": signals}


def states(out: Path) -> dict[Path, int]:
    """When each resume state in a folder was last written, in nanoseconds."""
    return {path: path.stat().st_mtime_ns for path in sorted(out.glob("*.resume.pt"))} if out.exists() else {}


def wait_for_state(process: subprocess.Popen, out: Path) -> None:
    """Until the process has written a state, or has ended."""
    before = states(out)
    while process.poll() is None and states(out) == before:
        time.sleep(0.002)


def saved_step(out: Path) -> int:
    """The step before which the folder's state stands; 0 without one."""
    content = [torch.load(path, weights_only=True)["state"].numpy() for path in states(out)]
    return sum(torch.load(io.BytesIO(state), weights_only=True)["run"]["step"] for state in content)


# --------------------------------------------------------------------------------------------------- damage
def damaged_files(bed: TestBed, number: int) -> dict:
    """Checkpoints of three kinds, cut short or with bytes flipped."""
    whole, trials, found = bed.folder / "whole", bed.folder / "damage", Counter()
    trials.mkdir()
    state = stopped(bed, trials)
    identity = torch.load(state, weights_only=True)["identity"]
    loads = {whole / "bilstm.pt": lambda file: ELMO.ELMo.load(file).model.state_dict(),
             whole / "classifier.pt": lambda file: classification.Classifier.load(
                 file, whole / "bilstm.pt").members[0][0].state_dict(),
             state: lambda file: flat(read_resume(file, identity))}
    for k in range(number):
        file = list(loads)[k % len(loads)]
        content = bytearray(file.read_bytes())
        place = bed.random.randrange(len(content))
        if k % 4 == 0:
            del content[place:]
        for _ in range(0 if k % 4 == 0 else bed.random.choice((1, 1, 2, 8))):
            content[place] ^= bed.random.randrange(1, 256)
            place = bed.random.randrange(len(content))
        (trials / "a.pt").write_bytes(content)
        try:
            good = same(loads[file](trials / "a.pt"), loads[file](file))
        except InputError as error:
            found["refused"] += 1
            good = "\n" not in str(error)
        except Exception as error:
            good = False
            print(f"{type(error).__name__}: {error}")
        found["survived"] += good
        if not good:
            bed.fail(f"{file.name} with damage at byte {place} was loaded, or not refused in a sentence")
    return {"tried": number, "survived": found["survived"], "refused": found["refused"]}


def flat(state, name: str = "") -> dict[str, torch.Tensor]:
    """Every tensor and number of a nested state, by its path."""
    if isinstance(state, (dict, list, tuple)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for key, value in items for k, v in flat(value, f"{name}.{key}").items()}
    return {name: state if isinstance(state, torch.Tensor) else torch.tensor(hash(str(state)))}


def stopped(bed: TestBed, folder: Path) -> Path:
    """The resume state of a run that was asked to stop half-way."""
    out = folder / "stopped"
    for _ in range(20):
        process = bed.run("ELMO.py", out)
        wait_for_state(process, out)
        process.send_signal(signal.SIGTERM)
        if process.wait() == 130:
            return out / "bilstm.resume.pt"
    raise InputError("a run could not be stopped half-way; is SIGTERM blocked?")


# ----------------------------------------------------------------------------------------------- wrong inputs
ROW = b'"1","t","the bank sued the court ."\n'
BAD_CLASS = st.sampled_from(["0", "5", "7", "-1", "x", "", " ", "nan", "inf", "1.5", "1e0x", "one", "١٢"])
FIELD = st.text(st.characters(codec="utf-8", exclude_characters='"\0\r\n'), max_size=20)


def csv_of(*rows: Sequence[str]) -> bytes:
    return b"".join(b",".join(f'"{field}"'.encode() for field in row) + b"\n" for row in rows)


def framed(middle) -> st.SearchStrategy[bytes]:
    """Right rows, then the wrong part, then right rows again."""
    return st.tuples(st.integers(0, 3), middle, st.integers(0, 3)).map(lambda t: ROW * t[0] + t[1] + ROW * t[2])


BAD_CSV = st.one_of(
    framed(st.builds(lambda c, a, b: csv_of((c, a, b)), BAD_CLASS, FIELD, FIELD)),                  # class 7
    framed(st.lists(FIELD, min_size=4, max_size=9).map(lambda fields: csv_of(["1", *fields]))),     # too many columns
    st.integers(1, 3).flatmap(lambda n: FIELD.map(lambda a: ROW * n + csv_of(["1", a]))),           # too few
    framed(st.binary(min_size=1, max_size=5).map(lambda b: b'"1","t","' + b"\xff" + b.replace(b'"', b"") + b'"\n')),
    framed(FIELD.map(lambda a: csv_of(["1", a, "a\0b"]))), framed(FIELD.map(lambda a: f'"1","t","{a}\n'.encode())),
    st.sampled_from([b"", b"\n\n \n", b"Class Index,Title,Description\n", b"label,text\n1,a b\n", b"\xff\xfe"]),
    st.lists(FIELD, min_size=3, max_size=3).map(lambda f: csv_of(["Class", *f[1:]])))

KNOBS = {f.name for module in MODULES.values() for f in fields(module.Config)}
BAD_TOML = st.one_of(
    st.binary(min_size=1, max_size=30).map(lambda b: b"hidden = \xff" + b), st.sampled_from(
        [b"hidden = ", b"hidden 12", b"[hidden]\nx = 1", b"hidden = 12\nhidden = 13", b"= 3", b"hidden = [1", b"\0"]),
    st.from_regex(r"[a-z]{3,12}", fullmatch=True).filter(lambda name: name not in KNOBS).map(
        lambda name: f"{name} = 1".encode()),
    st.one_of(st.booleans(), st.text("abc", max_size=5), st.floats(allow_nan=False, allow_infinity=False),
              st.integers(max_value=0)).map(lambda value: f"hidden = {json.dumps(value)}".encode()),
    st.one_of(st.sampled_from(["nan", "inf", "'a'", "true"]), st.integers(11).map(str),
              st.floats(max_value=-1e-9, allow_infinity=False).map(repr)).map(lambda value: f"lr = {value}".encode()))

BAD_JSON = st.one_of(
    st.binary(max_size=40).map(lambda b: b"{" + b + b"\xff"), st.sampled_from([b"", b"{", b"[]", b"3", b"null", b"{}"]),
    st.dictionaries(st.text(max_size=8), st.integers(), max_size=4).map(lambda d: json.dumps(d).encode()))

PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3))


def pickled(value) -> bytes:
    """What torch.save makes of any value."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


BAD_PT = st.one_of(         # a tuple is the part of a right file that is replaced, and by what
    st.binary(max_size=200), PLAIN.map(pickled),
    st.tuples(st.sampled_from(["config", "words", "labels", "weights", "format"]), PLAIN))


def bad_inputs(bed: TestBed, number: int) -> dict:
    """As many of each kind; a CSV for either part of AG News and either script, a .pt as biLM and as classifier."""
    folder, by_kind = bed.folder / "inputs", {}
    shutil.copytree(bed.folder / "corpus", folder / "corpus")
    kinds = {"csv": (BAD_CSV, wrong_csv), "toml": (BAD_TOML, wrong_toml), "json": (BAD_JSON, wrong_json),
             "pt": (BAD_PT, wrong_pt)}
    for kind, (strategy, give) in kinds.items():
        tried, survived = Counter(), 0
        for value in drawn(strategy, number // len(kinds), bed.seed):
            name = list(FILES)[tried[kind] % 2]
            tried[kind] += 1
            good = give(bed, folder, name, value, tried[kind])
            survived += good
            if not good:
                bed.fail(f"{kind} for {name}: {value!r:.200}")
        by_kind[kind] = {"tried": tried[kind], "survived": survived}
    return {key: sum(part[key] for part in by_kind.values()) for key in ("tried", "survived")} | {"by_kind": by_kind}


def drawn(strategy: st.SearchStrategy, number: int, seed: int) -> list:
    """`number` values of a strategy, the same for a seed."""
    values = []
    @hypothesis_seed(seed)
    @settings(max_examples=2 * number, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(strategy)
    def collect(value):
        if len(values) < number:
            values.append(value)
    collect()
    return values


def refused(main: Callable, argv: list[str], out: Path, said: str) -> bool:
    """Whether main(argv) ends with 2 after one sentence that holds `said`, and `out` is as it was."""
    before, errors, printed = listing(out), io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(printed):
            status = main(argv)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
        return False
    message = errors.getvalue()
    return status == 2 and message.count("\n") == 1 and said in message and listing(out) == before


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()) if folder.exists() else []


def wrong_csv(bed: TestBed, folder: Path, name: str, content: bytes, k: int) -> bool:
    part = ("train.csv", "test.csv")[k // 2 % 2]
    right = (folder / "corpus" / part).read_bytes()
    (folder / "corpus" / part).write_bytes(content)
    os.environ["AG_NEWS_DIR"] = str(folder / "corpus")
    try:
        return refused(MODULES[name].main, bed.argv(name, folder / "out"), folder / "out", part)
    finally:
        (folder / "corpus" / part).write_bytes(right)
        os.environ["AG_NEWS_DIR"] = str(bed.folder / "corpus")


def wrong_toml(bed: TestBed, folder: Path, name: str, content: bytes, k: int) -> bool:
    (folder / "a.toml").write_bytes(content)
    return refused(MODULES[name].main, ["--out", str(folder / "out"), "--config", str(folder / "a.toml")],
                   folder / "out", "")


def wrong_json(bed: TestBed, folder: Path, name: str, content: bytes, k: int) -> bool:
    (folder / "numbers").mkdir(exist_ok=True)
    for file in (folder / "numbers").iterdir():
        file.unlink()
    file = ("pretraining.json", "classification.json")[k % 2]
    (folder / "numbers" / file).write_bytes(content)
    return refused(figures.main, [str(folder / "numbers")], folder / "numbers", file)


def wrong_pt(bed: TestBed, folder: Path, name: str, content: bytes | tuple, k: int) -> bool:
    whole, file = bed.folder / "whole", folder / "a.pt"
    if isinstance(content, tuple):                      # a right file with one part replaced, and a right digest
        form = ELMO.FORMAT if name == "ELMO.py" else classification.FORMAT
        right = read_published(whole / FILES[name], form, set())
        key = "labels" if content[0] == "words" and name != "ELMO.py" else content[0].replace("labels", "words")
        right[key if key in right else content[0]] = content[1]
        try:
            write_published(file, right)
        except Exception:       # no digest can be made of it, nor could the script
            torch.save(right, file)
    else:
        file.write_bytes(content)
    (folder / "texts").write_text("the bank sued the court .\n")
    if name == "ELMO.py":
        (folder / "as-bilm").mkdir(exist_ok=True)
        shutil.copy(file, folder / "as-bilm" / "bilstm.pt")
        return refused(ELMO.main, ["--out", str(folder / "as-bilm"), "--embed", str(folder / "texts"), "--npz",
                                   str(folder / "v.npz")], folder, "bilstm.pt")
    argv = ["--bilstm", str(whole / "bilstm.pt"), "--classifier", str(file), "--predict", "the bank ."]
    return refused(classification.main, argv, folder, "a.pt")


# ----------------------------------------------------------------------------------------- disk, second run, nan
def side_by_side(trial: Callable, bed: TestBed, number: int) -> dict:
    """trial(bed, script, k, random numbers) -> what went wrong, or nothing, for k below `number`, two at a time."""
    def one(k: int) -> bool:
        name = list(FILES)[k % 2]
        if wrong := trial(bed, name, k, random.Random(1000 * bed.seed + k)):
            bed.fail(f"{trial.__name__} of {name}: {wrong}")
        return not wrong
    with ThreadPoolExecutor(2) as pool:
        return {"tried": number, "survived": sum(pool.map(one, range(number)))}


def resumed(bed: TestBed, name: str, out: Path) -> str:
    """Resumes a run; what is wrong with its end, or nothing."""
    status = bed.run(name, out, "--resume").wait()
    return "" if status == 0 and bed.right(name, out) else f"resumed, it ended with {status}: {log_of(out)[-300:]!r}"


def disk_full(bed: TestBed, number: int) -> dict:
    """Runs in a folder with room for a random part of what they write: a small tmpfs, or a limit on a file's size."""
    tmpfs = mounted(bed.folder / "probe", 1 << 20)
    if tmpfs:
        subprocess.run(["umount", bed.folder / "probe"], check=True)
    return side_by_side(full_tmpfs if tmpfs else full_by_limit, bed, number) | {
        "by": "tmpfs" if tmpfs else "limit on the size of a file"}


def mounted(folder: Path, size: int) -> bool:
    """Whether a file system of `size` bytes in memory could be mounted at `folder`, which takes root."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    with contextlib.suppress(OSError):
        return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0
    return False


def rooms(bed: TestBed, draw: random.Random) -> Iterator[int]:
    """Bytes: a random part of what a run writes, then less and less, until a run meets its limit."""
    need = sum(path.stat().st_size for path in (bed.folder / "whole").iterdir() if path.is_file())
    part = draw.uniform(0.02, 0.5)
    return (8192 + int(part * need / 2**k) for k in range(8))


def full_tmpfs(bed: TestBed, name: str, k: int, draw: random.Random) -> str:
    for size in rooms(bed, draw):
        out = bed.folder / f"full-{k}-{size}"
        if not mounted(out, size):
            return "no file system could be mounted"
        try:
            status = bed.run(name, out, "--resume").wait()
            if status:
                wrong = not_refused(out, status)
                subprocess.run(["mount", "-o", "remount,size=100m", out], check=True)
                return wrong or resumed(bed, name, out)
        finally:
            subprocess.run(["umount", out], check=True)
    return "no room was too small"


def full_by_limit(bed: TestBed, name: str, k: int, draw: random.Random) -> str:
    for size in rooms(bed, draw):
        out = bed.folder / f"full-{k}-{size}"
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
        status = bed.run(name, out, "--resume", before=limit).wait()
        if status:
            return not_refused(out, status) or resumed(bed, name, out)
    return "no limit was too low"


def not_refused(out: Path, status: int) -> str:
    """What is wrong with how a run met its full disk, or nothing."""
    said = log_of(out)
    left = [path.name for path in out.iterdir() if path.name.endswith(".part")] if out.exists() else []
    good = status == 2 and "Traceback" not in said and "cannot be written" in said and not left
    return "" if good else f"exit status {status}, left {left}, said {said[-300:]!r}"


def two_runs(bed: TestBed, number: int) -> dict:
    """A second run is started while the first, half-way, is held."""
    return side_by_side(second_run, bed, number)


def second_run(bed: TestBed, name: str, k: int, draw: random.Random) -> str:
    out = bed.folder / f"two-{k}"
    first = bed.run(name, out)
    wait_for_state(first, out)
    first.send_signal(signal.SIGSTOP)
    try:
        other, more = draw.choice(list(FILES)), draw.choice(([], ["--resume"]))
        second = subprocess.run([sys.executable, str(ROOT / other), *bed.argv(other, out, *more)],
                                capture_output=True, text=True, check=False)
    finally:
        first.send_signal(signal.SIGCONT)
    status = first.wait()
    if second.returncode != 2 or "another run is writing" not in second.stderr or "Traceback" in second.stderr:
        return f"{other} beside it ended with {second.returncode}: {second.stderr[-300:]!r}"
    return "" if status == 0 and bed.right(name, out) else f"it ended with {status}: {log_of(out)[-300:]!r}"


class Evil:
    """Makes a folder when it is unpickled."""
    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def code(bed: TestBed, number: int) -> dict:
    """A command hidden in every place of a checkpoint in turn, in either format of torch.save."""
    whole, target, survived = bed.folder / "whole", bed.folder / "was-run", 0
    places = [("bilstm.pt", key) for key in ("config", "words", "weights", "digest", None)]
    places += [("classifier.pt", key) for key in ("config", "members", "weights", "labels", None)]
    for k in range(number):
        name, key = places[k % len(places)]
        content = torch.load(whole / name, weights_only=True)
        content = Evil(target) if key is None else content | {key: Evil(target)}
        torch.save(content, bed.folder / "evil.pt", _use_new_zipfile_serialization=k // len(places) % 2 == 0)
        load = ELMO.ELMo.load if name == "bilstm.pt" else classification.Classifier.load
        try:
            load(bed.folder / "evil.pt")
            good = False
        except InputError as error:
            good = "\n" not in str(error) and not target.exists()
        survived += good
        if not good:
            bed.fail(f"{name} with code in {key} was opened")
    return {"tried": number, "survived": survived}


POISON = """import sys; sys.path.insert(0, {root!r}); sys.argv[0] = {name!r}
import torch, {module} as script
step, calls = {step}, [0]
def poisoned(*args, call={call}, **kwargs):
    calls[0] += 1
    return call(*args, **kwargs) * (float("nan") if calls[0] == step + 1 else 1)
{call} = poisoned
sys.exit(script.main(sys.argv[1:]))"""
CALLS = {"ELMO.py": "script.SampledSoftmax.apply", "classification.py": "script.F.cross_entropy"}


def nan(bed: TestBed, number: int) -> dict:
    """The loss of one step is replaced by nan; the rest is the script."""
    return side_by_side(poisoned, bed, number)


def poisoned(bed: TestBed, name: str, k: int, draw: random.Random) -> str:
    out, step = bed.folder / f"nan-{k}", draw.randrange(30)
    program = POISON.format(root=str(ROOT), name=name, module=name.removesuffix(".py"), step=step, call=CALLS[name])
    argv = bed.argv(name, out, "--save-every", "1000")          # so that only its end can have saved a state
    run = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True, check=False,
                         env=os.environ | {"OMP_NUM_THREADS": "1"})
    if run.returncode != 2 or f"not finite at step {step};" not in run.stderr or "Traceback" in run.stderr:
        return f"nan at step {step}: exit status {run.returncode}, {run.stderr[-300:]!r}"
    if saved_step(out) != step:
        return f"nan at step {step}: the state kept is that of step {saved_step(out)}"
    return resumed(bed, name, out)


PARTS = {kills: 100, damaged_files: 200, bad_inputs: 300, disk_full: 12, two_runs: 8, code: 20, nan: 12}


def parts(bed: TestBed, share: float) -> Iterator[tuple[str, dict]]:
    for part, number in PARTS.items():
        begin = time.perf_counter()
        found = part(bed, max(4, round(number * share)))
        print(f"{part.__name__}: {found} after {time.perf_counter() - begin:.0f} seconds", flush=True)
        yield part.__name__, found


@script("faults.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 where everything survived, 1 otherwise, 2 for an input that the user can mend."""
    begin, argv = time.perf_counter(), sys.argv[1:] if argv is None else argv
    parser = Parser(prog="faults.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default 0)")
    parser.add_argument("--out", type=Path, default=ROOT / "models" / "faults.json", help="default models/faults.json")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        bed = TestBed(Path(folder), options.seed)
        result = dict(parts(bed, 0.1 if options.quick else 1.0))
    write_json(options.out, result | {
        "failures": bed.failures, "seed": options.seed, "command": " ".join(["python", "report/faults.py", *argv]),
        "machine": machine(torch.device("cpu")), "versions": versions(), "seconds": time.perf_counter() - begin})
    print(f"{options.out}: {len(bed.failures)} failures, {time.perf_counter() - begin:,.0f} seconds")
    return 1 if bed.failures else 0


if __name__ == "__main__":
    sys.exit(main())
