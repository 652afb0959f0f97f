"""A script's options: a frozen dataclass whose fields carry their help, filled from a TOML file and the command line.

    @dataclass(frozen=True)
    class Config:
        hidden: int = option(448, "cells of each LSTM", min=1)
        track: str = option("none", "also send curves to a tracker", choices=("none", "tensorboard", "wandb"))

        def __post_init__(self):
            check_options(self)
"""
import argparse
import math
import os
import sys
import time
import tomllib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import field, fields, replace
from functools import wraps
from pathlib import Path

from run.files import InputError, read_text
from run.tracker import check_tracker

TORCHRUN_WAIT = 5.0         # seconds in which the first process surely prints
RUN_FLAGS = {
    "--resume": {"action": "store_true", "help": "continue the stopped run in --out"},
    "--overwrite": {"action": "store_true", "help": "replace the files of another run in --out"}}


def option(default, help: str, choices: tuple = (), min: float = 0, max: float = math.inf):
    """A dataclass field with its help, its allowed values and, for a number, its range."""
    return field(default=default, metadata={"help": help, "choices": choices, "min": min, "max": max})


def check_options(config) -> None:
    """Raises InputError for the first field of a dataclass that has the wrong type or is out of range."""
    for f in fields(config):
        value = getattr(config, f.name)
        choices = f.metadata["choices"]
        if f.type is float and type(value) is int and abs(value) < 2**63:       # `dropout = 0` in a TOML file
            value = float(value)
            object.__setattr__(config, f.name, value)
        if type(value) is not f.type:
            raise InputError(f"{f.name} is {value!r}; expected {f.type.__name__}")
        if choices and value not in choices:
            raise InputError(f"{f.name} is {value!r}; expected one of {', '.join(choices)}")
        if f.type in (int, float) and not f.metadata["min"] <= value <= f.metadata["max"]:
            raise InputError(f"{f.name} is {value}; expected {f.metadata['min']:g} to {f.metadata['max']:g}")


def read_toml(path: str, known: set[str]) -> dict:
    """The options in a TOML file. Raises InputError that names the file, and an option that is not in `known`."""
    text = read_text(path)
    try:
        values = tomllib.loads(text)
    except ValueError as error:     # TOMLDecodeError, or a number with thousands of digits
        raise InputError(f"{path} is not TOML ({error})") from None
    unknown = sorted(set(values) - known)
    if unknown:
        raise InputError(f"{path}: {unknown[0]!r} is no option; --help lists them")
    return values


def take_options(config, other, names: Sequence[str], given: set[str], source: str):
    """`config` with some options of `other`, read from `source`. InputError if the user has given another value."""
    values = {name: getattr(other, name) for name in names}
    for name, value in values.items():
        if name in given and getattr(config, name) != value:
            raise InputError(f"{name} is {getattr(config, name)}, but {source} has {value}; leave this option out")
    return replace(config, **values)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises InputError instead of printing its usage."""

    def error(self, message: str):
        raise InputError(f"{message}; --help lists the options")


def add_options(parser: argparse.ArgumentParser, config_class: type) -> None:
    """Adds --NAME for each field, and --no-NAME for a switch. An option that is not given is absent from the result."""
    for f in fields(config_class):
        settings = {"help": f"{f.metadata['help']} (default {f.default})".replace("%", "%%")}
        if f.type is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings["type"] = f.type
        if f.metadata["choices"]:
            settings["choices"] = f.metadata["choices"]
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **settings)


def script_arguments(argv: Sequence[str] | None, config_class: type, name: str, text: str, out: Path,
                     extra: dict[str, dict]):
    """(config, others) of a script's command line; the command line wins over the TOML file.

    others: --out, --config, the flags in `extra`, {flag: settings of add_argument}, such as RUN_FLAGS, and `given`, the
    names of the options that are not left at their defaults. InputError for an unknown option or a wrong value.
    """
    parser = Parser(prog=name, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    project = Path(__file__).resolve().parent.parent
    default = out.relative_to(project) if out.is_relative_to(project) else out
    parser.add_argument("--out", default=out, type=Path, help=f"folder of the results and models (default {default}/)")
    parser.add_argument("--config", metavar="FILE", help="TOML file of options; the command line wins")
    for flag, settings in extra.items():
        parser.add_argument(flag, **settings)
    add_options(parser, config_class)
    given = vars(parser.parse_args(argv))
    names = {f.name for f in fields(config_class)}
    others = argparse.Namespace(**{key: value for key, value in given.items() if key not in names})
    if others.out.exists() and not others.out.is_dir():
        raise InputError(f"--out {others.out} is a file; name a folder")
    values = read_toml(others.config, names) if others.config else {}
    values |= {key: value for key, value in given.items() if key in names}
    others.given = set(values)
    config = config_class(**values)
    check_tracker(config.track)
    return config, others


def script(name: str) -> Callable:
    """Decorates main(argv) -> exit status: a wrong input becomes one sentence and status 2, Ctrl-C status 130.

    While main runs, warnings become a sentence too, and a character that the console cannot show is printed as \\u1234.
    """
    def show_warning(message: Warning, *args) -> None:
        """Takes the place of warnings.showwarning, which also prints a line of the code."""
        print(f"{name}: warning: {' '.join(str(message).split())}", file=sys.stderr)

    def decorate(main: Callable[..., int]) -> Callable[..., int]:
        """`main`, but what it raises becomes an exit status."""
        @wraps(main)
        def run(argv: Sequence[str] | None = None) -> int:
            """Runs main; returns its exit status, or prints the sentence of what it raised and returns 2 or 130."""
            print_any_character()
            try:
                with warnings.catch_warnings():
                    warnings.showwarning = show_warning
                    return main(argv)
            except InputError as error:
                message = str(error)
            except OSError as error:        # a full disk, or a folder that may not be read or written
                message = f"{error.filename or 'a file'}: {error.strerror or error}"
            except (MemoryError, RuntimeError) as error:        # torch reports a lack of memory as a RuntimeError
                about_memory = "allocate" in str(error) or "out of memory" in str(error)
                if not isinstance(error, MemoryError) and not about_memory:
                    raise
                message = "there is not enough memory; choose smaller options"
            except KeyboardInterrupt:
                return 130
            if os.environ.get("RANK", "0") == "0":
                print(f"{name}: {message}", file=sys.stderr)
            else:           # the first process of torchrun prints it; torchrun would kill that one if this one ended
                time.sleep(TORCHRUN_WAIT)
            return 2
        return run
    return decorate


def print_any_character() -> None:
    """Lets standard output and error print \\u1234 for a character that the console's encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):          # a notebook's stream has UTF-8 and no such method
            stream.reconfigure(errors="backslashreplace")
