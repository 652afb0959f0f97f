"""Searches knobs of either script on validation rows with Optuna; the study is a SQLite file and can be resumed.

    python report/sweep.py ELMO.py --trials 20 --search lr=0.002:0.02:log --search dropout=0:0.4 -- --rows 8000
    python report/sweep.py classification.py --trials 10 --search setting=trainable,function -- --epochs 1
    python ELMO.py --config build/sweep/ELMO.toml           # a run with what the search found

A trial is a whole training with the knobs behind `--` and those that the sampler draws (TPE); its value is the lowest
validation cross-entropy of the run, in nats a token or a row. Test rows are not read by it. OUT/ELMO.toml holds the
fixed knobs and the best ones found so far, after every trial. A study goes on with the same file, search and knobs.
"""
import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # run as `python report/sweep.py`

import classification
import ELMO
from data.files import InputError, write_atomically
from data.knobs import Parser, add_knobs, script
from data.machine import default_device
from data.prepare import CACHE, read_task
from data.text import Data, Texts

ROOT = Path(__file__).resolve().parent.parent


def of_bilm(config: ELMO.Config, options) -> float:
    """Lowest validation nats a token of a pretraining; inf where the loss is not finite."""
    trainer = ELMO.Trainer(config, Data.of_ag_news(config, CACHE), torch.device(default_device()))
    return lowest(lambda: ELMO.train(trainer))


def of_classifier(config: classification.Config, options) -> float:
    """Lowest validation nats a row of a classifier, mean over its settings and seeds."""
    elmo = ELMO.ELMo.load(options.bilstm, default_device())
    task = read_task(config, elmo.config)
    parts = {part: Texts(getattr(task, part), elmo, CACHE) for part in ("train", "validation")}
    seeds = range(config.seed, config.seed + (1 if config.finetune else config.seeds))
    vectors = classification.vectors_of(config, elmo, task)
    trainer = classification.Trainer(config, vectors, parts, len(task.labels), seeds, elmo.digest)
    return lowest(lambda: classification.train(trainer))


def lowest(train: Callable) -> float:
    """The lowest validation loss of a run; inf where it is not finite, KeyboardInterrupt where it was stopped."""
    try:
        run = train()
    except InputError as error:
        if "not finite" not in str(error):
            raise
        return float("inf")
    if not run.finished:
        raise KeyboardInterrupt
    return run.lowest


SCRIPTS = {"ELMO.py": (ELMO.Config, of_bilm), "classification.py": (classification.Config, of_classifier)}


def ranges(texts: Sequence[str], config_class: type) -> dict[str, tuple]:
    """{knob: (low, high, log?)} or {knob: [values]} of NAME=LOW:HIGH, NAME=LOW:HIGH:log and NAME=A,B,C."""
    known, out = {f.name: f.type for f in fields(config_class)}, {}
    for text in texts:
        name, _, value = text.partition("=")
        name = name.replace("-", "_")
        if name not in known or not value:
            raise InputError(f"--search {text}: expected a knob and its range, such as lr=0.001:0.01:log; the script's "
                             "--help lists the knobs")
        kind = known[name]
        try:
            low, colon, rest = value.partition(":")
            if colon:
                high, _, log = rest.partition(":")
                if kind not in (int, float) or log not in ("", "log"):
                    raise ValueError
                out[name] = (kind(low), kind(high), bool(log))
                if out[name][0] >= out[name][1] or (log and out[name][0] <= 0):
                    raise ValueError
            else:
                read = {"true": True, "false": False}.__getitem__ if kind is bool else kind
                out[name] = [read(each) for each in value.split(",")]
        except (ValueError, KeyError):
            raise InputError(f"--search {text}: {value!r} is no range of {kind.__name__} values; expected LOW:HIGH, "
                             "LOW:HIGH:log with LOW above 0, or values with commas between") from None
    if not out:
        raise InputError("nothing is searched; name a knob and its range, such as --search lr=0.001:0.01:log")
    return out


def draw(trial, searched: dict) -> dict:
    """A trial's knobs by Optuna's sampler."""
    out = {}
    for name, among in searched.items():
        if isinstance(among, list):
            out[name] = trial.suggest_categorical(name, among)
        else:
            low, high, log = among
            suggest = trial.suggest_int if isinstance(low, int) else trial.suggest_float
            out[name] = suggest(name, low, high, log=log)
    return out


def write_toml(file: Path, knobs: dict, comment: str) -> None:
    """Knobs as `--config` reads them: JSON's spelling of strings, numbers and booleans is TOML's too."""
    lines = [f"# {comment}", *(f"{name} = {json.dumps(value)}" for name, value in knobs.items())]
    write_atomically(file, lambda part: part.write(("\n".join(lines) + "\n").encode()))


@script("sweep.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 2 for an input that the user can mend, 130 after Ctrl-C: finished trials are kept."""
    try:
        import optuna
        from sqlalchemy.exc import DatabaseError
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
    config_class, measure = SCRIPTS[options.script]
    knob_parser = Parser(prog=options.script)
    add_knobs(knob_parser, config_class)
    fixed = vars(knob_parser.parse_args(knobs))
    searched, config = ranges(options.search, config_class), config_class(**fixed)
    name = hashlib.sha256(json.dumps([options.script, fixed, searched], sort_keys=True).encode()).hexdigest()[:12]
    options.out.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    database, file = options.out / "studies.db", options.out / f"{Path(options.script).stem}.toml"
    try:
        study = optuna.create_study(storage=f"sqlite:///{database}", study_name=f"{options.script} {name}",
                                    load_if_exists=True)
    except DatabaseError:
        raise InputError(f"{database} is no SQLite file of studies; delete it, or choose another --out") from None
    study.sampler = optuna.samplers.TPESampler(seed=config.seed + len(study.trials))
    command = " ".join(["python", "report/sweep.py", *argv])
    finished = optuna.trial.TrialState.COMPLETE
    while len(done := study.get_trials(states=(finished,))) < options.trials:
        trial = study.ask()
        knobs = draw(trial, searched)
        value = measure(replace(config, **knobs), options)
        study.tell(trial, min(value, 1e9))
        best = study.best_trial
        write_toml(file, fixed | best.params, f"{command}: trial {best.number + 1} of {len(study.trials)}, "
                                              f"{best.value:.4f} nats on validation rows")
        print(f"trial {len(done) + 1} of {options.trials}: {value:.4f} nats with {knobs}; best {best.value:.4f} with "
              f"{best.params}", flush=True)
    print(f"{file}: the best of {len(study.trials)} trials, for --config")
    return 0


if __name__ == "__main__":
    sys.exit(main())
