"""Texts with labels: strings or integers, of any names.

    task = labelled_task([("Oil prices fall.",), ("Goal!",), ..], ["economy", "sport", ..], validation=None, seed=0)
    task.labels             # ["economy", "sport", ..]: the names of the classes
    task.train.labels       # array([0, 1, ..]): the class of each row, as its number
"""
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np

from data.ag_news import split
from data.tasks import Part, Task, corpus_of, leave_each_class
from run.files import InputError


def labelled_task(texts: Sequence[tuple], labels: Sequence[str | int], validation: int | None, seed: int,
                  places: Sequence[str] | None = None) -> Task:
    """A task "own" without test rows, from the texts of each row, as in `Part`, and its label.

    The seed draws `validation` rows; if `validation` is None, a tenth of the rows, at most 2,000. A class of which all
    rows are drawn keeps one in training. places: what an error calls each label; by default "label 0", "label 1", ..
    """
    labels = labels.tolist() if hasattr(labels, "tolist") else list(labels)        # of NumPy, pandas or torch
    if len(texts) != len(labels):
        raise InputError(f"there are {len(texts)} texts and {len(labels)} labels; expected one label for each text")
    if places is None:
        places = [f"label {i}" for i in range(len(labels))]
    names = class_names(labels, places)
    if len(names) == len(labels) > 20:
        raise InputError(f"{places[0]} is like no other: every row has a class of its own; are these the labels?")
    known = Rows(list(texts), labels, places).part(names)
    if validation is None:
        validation = min(2000, max(1, len(known) // 10))
    _, drawn = split(len(known), validation, seed)
    validation_rows = leave_each_class(drawn, known.labels)
    train = known.take(np.setdiff1d(np.arange(len(known)), validation_rows))
    no_rows = Part.of([])
    return Task("own", names, train, known.take(validation_rows), no_rows, corpus_of(train.texts))


@dataclass
class Rows:
    """The texts of each row, as in `Part`, its label, and what an error calls this label: "train.csv, row 1: label"."""
    texts: list[tuple]
    labels: list[str | int]
    places: Sequence[str]

    def part(self, names: Sequence[str | int]) -> Part:
        """A part of a task with the classes `names`. Raises InputError for a label that is none of them."""
        number = {name: c for c, name in enumerate(names)}
        numbers = []
        for label, place in zip(self.labels, self.places, strict=True):
            name = checked_label(label, place)
            if name not in number:
                raise InputError(f"{place} is {name!r:.40}, but no training row has this label; add such rows to the "
                                 "training rows, or remove this one")
            numbers.append(number[name])
        return Part(self.texts, np.array(numbers, dtype=np.int64))


def checked_label(label: object, place: str) -> str | int:
    """The label; an integer of NumPy becomes an int. Raises InputError if it is no integer and no name on one line."""
    if isinstance(label, str) and label.isprintable() and label.strip():
        return str(label)
    if isinstance(label, Integral) and not isinstance(label, bool):
        return int(label)
    raise InputError(f"{place} is {str(label)!r:.40}; expected an integer, or a string of printable characters")


def class_names(labels: Sequence[str | int], places: Sequence[str]) -> list[str | int]:
    """The distinct labels, sorted: by value if they are integers or strings of digits ("2", "10"), else by alphabet.

    places: what an error calls each label. Raises InputError if there is only one class, or strings and integers.
    """
    first = None
    names = set()
    for label, place in zip(labels, places, strict=True):
        name = checked_label(label, place)
        if first is None:
            first = name
        if type(name) is not type(first):
            raise InputError(f"{place} is {name!r:.40}, but {places[0]} is {first!r:.40}; write all labels as strings, "
                             "or all as integers")
        names.add(name)
    if not names:
        raise InputError("there are no labels; expected one for each text")
    if len(names) == 1:
        raise InputError(f"{places[0]} is {first!r:.40}, and so are all others; expected at least two classes")
    in_order = sorted(names)
    if all(isinstance(name, str) and name.isdecimal() for name in names):
        width = max(len(name) for name in names)
        in_order.sort(key=lambda name: name.zfill(width))
    return in_order
