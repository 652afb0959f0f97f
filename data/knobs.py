"""Knobs: a frozen dataclass whose fields carry their help, filled from a TOML file and the command line."""
import argparse
import math
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import field, fields
from functools import wraps
from pathlib import Path

from data.files import InputError, read_text
from data.track import check_tracker


def knob(default, help: str, among: tuple = (), least: float = 0, most: float = math.inf):
    """A field of Config whose help, choices and range travel with it."""
    return field(default=default, metadata={"help": help, "among": among, "least": least, "most": most})


def check_knobs(config) -> None:
    """InputError for the first field of a dataclass whose value has the wrong type or is out of range."""
    for f in fields(config):
        value, meta = getattr(config, f.name), f.metadata
        if f.type is float and type(value) is int and abs(value) < 2**63:
            object.__setattr__(config, f.name, value := float(value))
        if type(value) is not f.type:
            raise InputError(f"{f.name} is {value!r}; expected {f.type.__name__}")
        if meta["among"] and value not in meta["among"]:
            raise InputError(f"{f.name} is {value!r}; expected one of {', '.join(meta['among'])}")
        if f.type in (int, float) and not meta["least"] <= value <= meta["most"]:
            raise InputError(f"{f.name} is {value}; expected {meta['least']:g} to {meta['most']:g}")


def read_toml(path: str, known: set[str]) -> dict:
    """The knobs of a TOML file; InputError names the file and an unknown knob."""
    text = read_text(path)
    try:
        values = tomllib.loads(text)
    except ValueError as error:     # its own error is one, and so is a number of thousands of digits
        raise InputError(f"{path}: is not TOML ({error})") from None
    if unknown := sorted(set(values) - known):
        raise InputError(f"{path}: {unknown[0]!r} is no knob; --help lists them")
    return values


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence."""
    def error(self, message: str):
        raise InputError(f"{message}; --help lists the options")


def add_knobs(parser: argparse.ArgumentParser, config_class: type) -> None:
    """One option per field, --no-NAME for a switch; an option not given is absent, so that a TOML file can fill it."""
    for f in fields(config_class):
        name, text = "--" + f.name.replace("_", "-"), f"{f.metadata['help']} (default {f.default})"
        how = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        if f.metadata["among"]:
            how["choices"] = f.metadata["among"]
        parser.add_argument(name, help=text.replace("%", "%%"), default=argparse.SUPPRESS, **how)


def script_arguments(argv: Sequence[str] | None, config_class: type, name: str, text: str, out: Path, options: dict):
    """(config, other options) of a script: its knobs, --out, --resume, --config and `options` {flag: settings}."""
    parser = Parser(prog=name, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=out, type=Path, help=f"folder that the run writes (default {out.name}/)")
    parser.add_argument("--resume", action="store_true", help="go on where the last run in --out stopped")
    parser.add_argument("--config", metavar="FILE", help="TOML file of knobs; the command line wins")
    for flag, settings in options.items():
        parser.add_argument(flag, **settings)
    others = {action.dest for action in parser._actions} - {"help"}
    add_knobs(parser, config_class)
    given = vars(parser.parse_args(argv))
    other = argparse.Namespace(**{key: given.pop(key) for key in others})
    if other.out.exists() and not other.out.is_dir():
        raise InputError(f"--out {other.out} is a file; name a folder")
    from_file = read_toml(other.config, {f.name for f in fields(config_class)}) if other.config else {}
    config = config_class(**(from_file | given))
    check_tracker(config.track)
    return config, other


def script(name: str) -> Callable:
    """Decorates a main(argv) -> exit status: a wrong input becomes one sentence and status 2, Ctrl-C 130."""
    def decorate(main: Callable[..., int]) -> Callable[..., int]:
        @wraps(main)
        def run(argv: Sequence[str] | None = None) -> int:
            try:
                return main(argv)
            except InputError as error:
                print(f"{name}: {error}", file=sys.stderr)
                return 2
            except OSError as error:        # a full disk, a folder that may not be read or written
                print(f"{name}: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
                return 2
            except (MemoryError, RuntimeError) as error:
                if isinstance(error, MemoryError) or "allocate" in str(error) or "out of memory" in str(error):
                    print(f"{name}: there is not enough memory; choose smaller knobs", file=sys.stderr)
                    return 2
                raise
            except KeyboardInterrupt:
                return 130
        return run
    return decorate
