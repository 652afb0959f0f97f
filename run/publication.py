"""Which files a run may write: a trial must not overwrite the numbers and weights that somebody has published.

A published run is a JSON file of numbers in OUT, with its options under "config" and the digests of its data, and the
.pt file of its weights.
"""
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from run.checkpoint import read_resume
from run.files import InputError, read_json

ADVICE = "choose another --out, or give --overwrite"
NUMBERS = {"bilstm": "pretraining", "classifier": "classification"}     # JSON by .pt file, if their names differ


def options_of_weights(config) -> dict:
    """The options that decide the weights, except precision: "auto" may mean either type, so `Run` compares that."""
    others = ("precision", "log_every", "save_every", "track")
    return {name: value for name, value in asdict(config).items() if name not in others}


class Publication:
    """The files of a run in OUT: `json`, its numbers; OUT/{name}.pt, its weights; until it has ended, resume files.

    options: out, resume and overwrite of the command line. Without --overwrite, InputError if OUT has the files of
    another run. Other options are noticed here, at once; other data or another biLM in `finished`, after reading them.
    has_model: whether the run writes a .pt file.
    """

    def __init__(self, name: str, config, options: Namespace, has_model: bool = True):
        self.config = config
        self.has_model = has_model
        self.model = options.out / f"{name}.pt"
        self.json = options.out / f"{NUMBERS.get(name, name)}.json"
        self.resume_file = options.out / f"{name}.resume.pt"
        self.options = options
        stopped = list(options.out.glob(f"{name}.*resume.pt"))      # of the run itself, or of the adaptation before it
        self.unfinished = options.resume and len(stopped) > 0
        if options.overwrite:
            return
        if self.json.exists():
            self.check_options()
        elif self.model.exists() and not self.unfinished:
            raise InputError(f"{self.model} exists, but not {self.json.name}, which would tell its options; {ADVICE}")

    def check_options(self) -> None:
        """Raises InputError if the numbers in the JSON are those of other options, or of another precision."""
        wanted = options_of_weights(self.config)
        with read_json(self.json) as result:
            saved = asdict(type(self.config)()) | result["config"]      # the default of an option that the file lacks
            if self.config.precision != "auto" and "precision" in result:
                wanted["precision"] = self.config.precision
                saved["precision"] = result["precision"].replace("bfloat16", "bf16").replace("float32", "fp32")
            for name, value in wanted.items():
                if saved[name] != value:
                    raise InputError(f"{self.json} is from a run with {name} = {saved[name]}, not {value}; {ADVICE}")

    def finished(self, source: dict[str, str]) -> bool:
        """True if --resume is given, but the run is complete: OUT has its JSON and no state to resume.

        source: the digests of the run's data and biLM, by their keys in the JSON. Raises InputError if they are others.
        """
        if self.options.overwrite or not self.json.exists():
            return False
        self.check_options()            # again, because another run may have published since the start
        with read_json(self.json) as result:
            for name, other in (("data", "other data"), ("bilm", "another biLM"), ("start", "another --start")):
                if name in source and result.get(name) != source[name]:
                    raise InputError(f"{self.json} is from a run on {other}; {ADVICE}")
        if not self.options.resume or self.unfinished or (self.has_model and not self.model.exists()):
            return False
        print(f"finished already: {self.json} has the numbers of this run")
        return True

    def state_file(self, identity: dict) -> Path:
        """The resume file. With --overwrite, one of another run is removed, so that this run starts anew."""
        if self.options.overwrite and self.options.resume and self.resume_file.exists():
            try:
                read_resume(self.resume_file, identity)
            except InputError as error:
                print(f"starting anew, because {error}")
                self.resume_file.unlink(missing_ok=True)
        return self.resume_file

    def complete(self, resume_files: list[Path]) -> None:
        """Removes the resume files of a run that has written its results, and says where these are."""
        for file in resume_files:
            file.unlink(missing_ok=True)
        written = [str(file) for file in (self.json, self.model, self.options.out / "figures") if file.exists()]
        print("written:", ", ".join(written))
