"""Which files a run may write: a trial must not overwrite the numbers and weights that somebody has published.

A published run is a JSON file of numbers in OUT, with its options under "config" and the digests of its data, and the
.pt file of its weights.
"""
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from run.files import InputError, read_json

ADVICE = "choose another --out, or give --overwrite"


def options_of_weights(config) -> dict:
    """The options that decide the weights of a run. `precision` is no such option, since "auto" can mean two types."""
    others = ("precision", "log_every", "save_every", "track")
    return {name: value for name, value in asdict(config).items() if name not in others}


def finished_already(file: Path, model: Path, config, source: dict[str, str], resume_file: Path,
                     options: Namespace) -> bool:
    """Whether --resume finds nothing left to do, because `file` is of this run and there is no state to resume.

    file, model: the JSON and .pt file that the run would write; source: the digests of its data, by their key in the
    JSON; options: the command's resume and overwrite. Raises InputError if another run has published in the folder.
    """
    unfinished = options.resume and resume_file.exists()
    if options.overwrite:
        return False
    if not file.exists():
        if model.exists() and not unfinished:
            raise InputError(f"{model} exists without {file.name}, so nobody knows which run wrote it; {ADVICE}")
        return False
    check_same_run(file, config, source)
    if options.resume and not unfinished:
        print(f"finished already: {file} has the numbers of this run")
        return True
    return False


def check_same_run(file: Path, config, source: dict[str, str]) -> None:
    """Raises InputError if the numbers in `file` are of other options, other data or another biLM."""
    with read_json(file) as result:
        saved = asdict(type(config)()) | result["config"]       # the default of an option that is newer than the file
        for name, value in options_of_weights(config).items():
            if saved[name] != value:
                raise InputError(f"{file} is of a run with {name} = {saved[name]}, not {value}; {ADVICE}")
        for name, digest in source.items():
            if result.get(name) != digest:
                other = {"data": "other data", "bilm": "another biLM"}[name]
                raise InputError(f"{file} is of a run on {other}; {ADVICE}")
