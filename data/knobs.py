"""Knobs: a frozen dataclass whose fields carry their help, filled from a TOML file and the command line."""
import argparse
import math
import tomllib
from dataclasses import field, fields

from data.files import InputError, read_text


def knob(default, help: str, among: tuple = (), least: float = 0, most: float = math.inf):
    """A field of Config whose help, choices and range travel with it."""
    return field(default=default, metadata={"help": help, "among": among, "least": least, "most": most})


def check_knobs(config) -> None:
    """InputError for the first field of a dataclass whose value has the wrong type or is out of range."""
    for f in fields(config):
        value, meta = getattr(config, f.name), f.metadata
        if f.type is float and type(value) is int:
            object.__setattr__(config, f.name, value := float(value))
        if type(value) is not f.type:
            raise InputError(f"{f.name} is {value!r}; expected {f.type.__name__}")
        if meta["among"] and value not in meta["among"]:
            raise InputError(f"{f.name} is {value!r}; expected one of {', '.join(meta['among'])}")
        if f.type in (int, float) and not meta["least"] <= value <= meta["most"]:
            raise InputError(f"{f.name} is {value}; expected {meta['least']:g} to {meta['most']:g}")


def read_toml(path: str, known: set[str]) -> dict:
    """The knobs of a TOML file; InputError names the file and an unknown knob."""
    try:
        values = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
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
