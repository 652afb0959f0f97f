"""Searches knobs of either script on validation rows with Optuna; the study is a SQLite file and can be resumed.

    python report/sweep.py ELMO.py --trials 20 --search lr=0.002:0.02:log --search dropout=0:0.4 -- --rows 8000
    python report/sweep.py classification.py --trials 10 --search setting=trainable,function -- --epochs 1
    python ELMO.py --config build/sweep/ELMO.toml --out elsewhere       # a whole run with what the search found

A trial is a training with the knobs behind `--` and those that the sampler draws (TPE); its value is the lowest
validation cross-entropy of the run, in nats a token or a row. No test row is scored. OUT/SCRIPT.toml holds the best
values of the searched knobs so far. A study goes on with the same file, search, knobs, rows and biLM.
"""
import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # run as `python report/sweep.py`

import classification
import ELMO
from data.files import InputError, one_line, write_atomically
from data.knobs import Parser, add_knobs, script
from data.machine import default_device
from data.prepare import CACHE, read_task
from data.text import Data, Texts

ROOT = Path(__file__).resolve().parent.parent
# Another task, other rows or another vocabulary: values of two such trials do not compare.
FIXED = {"task", "vectors", "fields", "rows", "validation", "seed", "seeds", "representation", "lowercase", "min_count",
         "max_chars", "word2vec_epochs", "phrases", "finetune", "save_every", "log_every", "report_every"}
USELESS = {"adapt", "ngrams", "ensemble", "track"}          # no trial heeds them


def of_bilm(config: ELMO.Config, options) -> tuple[str, Callable]:
    """(what the training rows are, a call that trains a biLM with some knobs and returns its Run)."""
    data = Data.of_ag_news(config, CACHE)
    return data.digest, lambda knobs: ELMO.train(ELMO.Trainer(knobs, data, torch.device(default_device())))


def of_classifier(config: classification.Config, options) -> tuple[str, Callable]:
    """The same for a classifier: its value is the mean over settings and seeds; fine-tuned, of the first seed."""
    elmo = ELMO.ELMo.load(options.bilstm, default_device())
    task = read_task(config, elmo.config)
    parts = {part: Texts(getattr(task, part), elmo, CACHE) for part in ("train", "validation")}
    seeds = range(config.seed, config.seed + (1 if config.finetune else config.seeds))
    vectors = classification.vectors_of(config, elmo, task)
    def trainer(knobs: classification.Config) -> classification.Trainer:
        return classification.Trainer(knobs, vectors, parts, len(task.labels), seeds, elmo.digest)
    return elmo.digest + trainer(config).identity()["texts"], lambda knobs: classification.train(trainer(knobs))


SCRIPTS = {"ELMO.py": (ELMO.Config, of_bilm), "classification.py": (classification.Config, of_classifier)}


def lowest(train: Callable) -> float:
    """The lowest validation loss of a run; inf where it is not finite, KeyboardInterrupt where it was stopped."""
    try:
        run = train()
    except InputError as error:
        if "not finite" not in str(error):
            raise
        return math.inf
    if not run.finished or run.request.is_set():
        raise KeyboardInterrupt
    return run.lowest


def ranges(texts: Sequence[str], config) -> dict[str, tuple | list]:
    """{knob: (low, high, log?)} or {knob: [values]} of NAME=LOW:HIGH, NAME=LOW:HIGH:log and NAME=A,B,C.

    InputError for what is no knob, no range, or not allowed by the Config.
    """
    types, out = {f.name: f.type for f in fields(config)}, {}
    for text in texts:
        name, _, value = text.partition("=")
        name = name.replace("-", "_")
        if name not in types or name in FIXED | USELESS:
            raise InputError(f"--search {text}: {name!r} is no knob to search; the script's --help lists the knobs")
        try:
            out[name] = read_range(value, types[name])
        except (ValueError, KeyError):
            raise InputError(f"--search {text}: {value!r} is no range of {types[name].__name__} values; expected "
                             "LOW:HIGH, LOW:HIGH:log with LOW above 0, or values with commas between") from None
        for each in out[name][:2] if isinstance(out[name], tuple) else out[name]:
            replace(config, **{name: each})
    if not out:
        raise InputError("nothing is searched; name a knob and its range, such as --search lr=0.001:0.01:log")
    return out


def read_range(text: str, kind: type) -> tuple | list:
    """(low, high, log?) or [values]; ValueError or KeyError for anything else."""
    low, colon, rest = text.partition(":")
    if not colon:
        read = {"true": True, "false": False}.__getitem__ if kind is bool else kind
        return [read(each) for each in text.split(",")]
    high, _, log = rest.partition(":")
    found = (kind(low), kind(high), bool(log))
    if kind not in (int, float) or log not in ("", "log") or not -math.inf < found[0] < found[1] < math.inf:
        raise ValueError
    if log and found[0] <= 0:
        raise ValueError
    return found


def draw(trial, searched: dict) -> dict:
    """A trial's knobs by Optuna's sampler."""
    out = {}
    for name, among in searched.items():
        if isinstance(among, list):
            out[name] = trial.suggest_categorical(name, among)
        else:
            suggest = trial.suggest_int if isinstance(among[0], int) else trial.suggest_float
            out[name] = suggest(name, *among[:2], log=among[2])
    return out


def search(study, trials: int, value_of: Callable[[dict], float], searched: dict, file: Path, command: str) -> None:
    """Trials until so many are complete; the best knobs are in the TOML file after each, and where none is left to do.

    JSON's spelling of strings, numbers and booleans is TOML's too.
    """
    import optuna
    states = optuna.trial.TrialState
    while True:
        done = study.get_trials(deepcopy=False, states=(states.COMPLETE,))
        if done:
            best = study.best_trial
            lines = [f"# {command}: trial {best.number + 1}, the best of {len(done)}, {best.value:.4f} nats on "
                     "validation rows", *(f"{name} = {json.dumps(value)}" for name, value in best.params.items()), ""]
            write_atomically(file, lambda part, lines=lines: part.write("\n".join(lines).encode()))
            print(f"trial {len(done)} of {trials}; best {best.value:.4f} nats with {best.params}", flush=True)
        if len(done) >= trials:
            return
        trial = study.ask()
        try:
            study.tell(trial, min(value_of(draw(trial, searched)), 1e9))
        except BaseException:
            study.tell(trial, state=states.FAIL)
            raise


@script("sweep.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 2 for an input that the user can mend, 130 after Ctrl-C: finished trials are kept."""
    try:
        import optuna
        from sqlalchemy.exc import SQLAlchemyError
    except ModuleNotFoundError:
        raise InputError("sweep.py needs a package that is not here; run `pip install optuna`") from None
    argv = sys.argv[1:] if argv is None else list(argv)
    own, knobs = (argv[:argv.index("--")], argv[argv.index("--") + 1:]) if "--" in argv else (argv, [])
    parser = Parser(prog="sweep.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", choices=SCRIPTS, help="whose knobs")
    parser.add_argument("--trials", type=int, default=20, help="finished trials in the study (default %(default)s)")
    parser.add_argument("--search", action="append", default=[], metavar="NAME=RANGE", help="once for every knob")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "sweep", help="folder (default build/sweep)")
    parser.add_argument("--bilstm", type=Path, default=ROOT / "models" / "bilstm.pt", help="for classification.py")
    options = parser.parse_args(own)
    if options.trials < 1:
        raise InputError(f"--trials is {options.trials}; expected 1 or more")
    config_class, prepare = SCRIPTS[options.script]
    knob_parser = Parser(prog=options.script)
    add_knobs(knob_parser, config_class)
    fixed = vars(knob_parser.parse_args(knobs))
    if useless := sorted(USELESS & set(fixed)):
        raise InputError(f"{useless[0]} does nothing in a sweep; leave it out")
    config = config_class(**fixed)
    searched = ranges(options.search, config)
    rows, train = prepare(config, options)
    name = hashlib.sha256(json.dumps([rows, fixed, searched], sort_keys=True).encode()).hexdigest()[:12]
    options.out.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    database, file = options.out / "studies.db", options.out / f"{Path(options.script).stem}.toml"
    try:
        study = optuna.create_study(storage=f"sqlite:///{database}", study_name=f"{options.script} {name}",
                                    load_if_exists=True)
        study.sampler = optuna.samplers.TPESampler(seed=config.seed + len(study.trials))
        search(study, options.trials, lambda drawn: lowest(lambda: train(replace(config, **drawn))), searched, file,
               " ".join(["python", "report/sweep.py", *argv]))
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise InputError(f"{database} cannot be used ({one_line(error)}); end other sweeps that use it, free some "
                         "space, or choose another --out") from None
    print(f"{file}: for --config")
    return 0


if __name__ == "__main__":
    sys.exit(main())
