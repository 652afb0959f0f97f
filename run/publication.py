"""Which files a run may write: a trial must not overwrite the numbers and weights that somebody has published.

A published run is a JSON file of numbers in OUT, with its options under "config" and the digests of its data, and the
.pt file of its weights.
"""
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from run.files import InputError, read_json

ADVICE = "choose another --out, or give --overwrite"
NUMBERS = {"bilstm": "pretraining", "classifier": "classification"}     # JSON by .pt file, if their names differ


def options_of_weights(config) -> dict:
    """The options that decide the weights, except precision: "auto" may mean either type, so `Run` compares that."""
    others = ("precision", "log_every", "save_every", "track")
    return {name: value for name, value in asdict(config).items() if name not in others}


class Publication:
    """The files of a run in OUT: `json`, its numbers; OUT/{name}.pt, its weights; until it has ended, `resume_file`.

    options: out, resume and overwrite of the command line. Without --overwrite, InputError if OUT has the files of
    another run. Other options are noticed here, at once; other data or another biLM in `finished`, after reading them.
    """

    def __init__(self, name: str, config, options: Namespace):
        self.model = options.out / f"{name}.pt"
        self.json = options.out / f"{NUMBERS.get(name, name)}.json"
        self.resume_file = options.out / f"{name}.resume.pt"
        self.options = options
        self.unfinished = options.resume and self.resume_file.exists()
        if options.overwrite:
            return
        if self.json.exists():
            self.check_options(config)
        elif self.model.exists() and not self.unfinished:
            raise InputError(f"{self.model} exists, but not {self.json.name}, which would tell its options; {ADVICE}")

    def check_options(self, config) -> None:
        """Raises InputError if the numbers in the JSON are those of other options."""
        with read_json(self.json) as result:
            saved = asdict(type(config)()) | result["config"]       # the default of an option that the file lacks
            for name, value in options_of_weights(config).items():
                if saved[name] != value:
                    raise InputError(f"{self.json} is from a run with {name} = {saved[name]}, not {value}; {ADVICE}")

    def finished(self, source: dict[str, str]) -> bool:
        """True if --resume is given, but the run is complete: OUT has its JSON and no state to resume.

        source: the digests of the run's data and biLM, by their keys in the JSON. Raises InputError if they are others.
        """
        if self.options.overwrite or not self.json.exists():
            return False
        with read_json(self.json) as result:
            for name, other in (("data", "other data"), ("bilm", "another biLM")):
                if name in source and result.get(name) != source[name]:
                    raise InputError(f"{self.json} is from a run on {other}; {ADVICE}")
        if not self.options.resume or self.unfinished:
            return False
        print(f"finished already: {self.json} has the numbers of this run")
        return True

    def complete(self, resume_files: list[Path]) -> None:
        """Removes the resume files of a run that has written its results, and says where these are."""
        for file in resume_files:
            file.unlink(missing_ok=True)
        written = [str(file) for file in (self.json, self.model, self.options.out / "figures") if file.exists()]
        print("written:", ", ".join(written))
