"""Searches options of either script with Optuna for the lowest validation loss. It never scores a test row.

    python report/sweep.py ELMO.py --trials 20 --search lr=0.002:0.02:log --search dropout=0:0.4 -- --rows 8000
    python ELMO.py --config build/sweep/ELMO.toml --out elsewhere       # a full run with the best options
"""
import sys
from dataclasses import replace
from operator import methodcaller
from pathlib import Path
from zlib import crc32

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # for `python report/sweep.py`
import optuna
from sqlalchemy.exc import SQLAlchemyError

import classification
import ELMO
from run.files import InputError, one_line, write_atomically
from run.machine import find_device
from run.options import script, script_arguments

# Options that no search may change: with other rows, words or heads, losses cannot be compared.
FIXED = "task fields phrases rows validation min_count representation freeze_word2vec seed seeds finetune adapt".split()


def trainers(config):
    """A function from Config to trainer. The rows and heads are always those of the `config` given here."""
    if isinstance(config, ELMO.Config):
        data = ELMO.Data.of_ag_news(config, ELMO.CACHE)
        return lambda drawn: ELMO.Trainer(drawn, data, find_device())
    elmo = ELMO.ELMo.load(ELMO.HERE / "models" / "bilstm.pt")
    task = classification.read_task(config, elmo.config)
    parts = {name: classification.EncodedTexts(getattr(task, name), elmo) for name in ("train", "validation")}
    vectors = classification.ELMoVectors(elmo.model)
    source = {"data": task.digest, "bilm": elmo.digest}
    return lambda drawn: classification.Trainer(drawn, vectors, parts, len(task.labels), source)


def distribution(text: str, config) -> tuple[str, optuna.distributions.BaseDistribution]:
    """(option, values) from NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=A,B,C. InputError for others and FIXED options."""
    name, _, values = text.partition("=")
    kind = None if name in FIXED else type(getattr(config, name, None))
    try:
        if ":" not in values:
            return name, optuna.distributions.CategoricalDistribution([kind(value) for value in values.split(",")])
        low, high = values.removesuffix(":log").split(":")
        make = optuna.distributions.IntDistribution if kind is int else optuna.distributions.FloatDistribution
        return name, make(kind(low), kind(high), log=values.endswith(":log"))
    except (TypeError, ValueError):
        raise InputError(f"--search {text}: expected an option and LOW:HIGH, LOW:HIGH:log or A,B,C") from None


def lowest(train, trainer) -> float:
    """The lowest validation loss of a training; infinity if it diverged; KeyboardInterrupt after Ctrl-C."""
    try:
        run = train(trainer)
    except InputError:              # the loss diverged
        return float("inf")
    if run.finished and not run.stop_event.is_set():
        return run.lowest
    raise KeyboardInterrupt


@script("sweep.py")
def main(argv: list[str] | None = None) -> int:
    """Exit status 0, 2 for a wrong input, 130 after Ctrl-C. The same command again continues the search in OUT."""
    words = [word for word in argv or sys.argv[1:] if word != "--"]
    module = classification if "classification.py" in words else ELMO
    config, options = script_arguments(words, module.Config, "sweep.py", __doc__, ELMO.HERE / "build" / "sweep", {
        "script": {"choices": ("ELMO.py", "classification.py"), "help": "the script whose options are searched"},
        "--search": {"action": "append", "required": True, "metavar": "NAME=VALUES",
                     "help": "an option and its values: LOW:HIGH, LOW:HIGH:log or A,B,C; can be given several times"},
        "--trials": {"type": int, "default": 20, "help": "number of trials of the whole search (default 20)"}})
    space = dict(distribution(text, config) for text in options.search)
    trainer_of = trainers(config)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        name = f"{options.script} {crc32(repr([trainer_of(config).identity(), space]).encode())}"
        study = optuna.create_study(storage=f"sqlite:///{options.out}/studies.db", study_name=name, load_if_exists=True)
        while len(study.get_trials(states=[optuna.trial.TrialState.COMPLETE])) < options.trials:
            trial = study.ask(space)
            study.tell(trial, lowest(module.train, trainer_of(replace(config, **trial.params))))
            best = "".join(f"{option} = {value!r}\n" for option, value in study.best_params.items())
            write_atomically(options.out / f"{module.__name__}.toml", methodcaller("write", best.encode()))
            print(f"trial {trial.number + 1}: best {study.best_value:.4f} with {study.best_params}", flush=True)
    except SQLAlchemyError as error:
        raise InputError(f"{options.out}/studies.db cannot be used ({one_line(error)}); choose another --out") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
