"""Checks of what a user gives. A text is a string, or a list of its tokens; a tuple is a pair of texts.

    check_texts(["Oil prices fall.", ["Oil", "prices", "fall", "."]])
"""
import math
from collections.abc import Iterable, Iterator, Sequence

from run.files import InputError

Text = str | list[str]


def check_text(text: Text, name: str) -> Text:
    """The text. Raises InputError that begins with `name` if it is no string and no list of tokens."""
    if isinstance(text, str):
        return text
    if isinstance(text, tuple):
        raise InputError(f"{name} is a tuple, that is a pair of texts; expected one text: a string or a list of tokens")
    if not isinstance(text, list):
        raise InputError(f"{name} is of type {type(text).__name__}; expected a string or a list of tokens")
    for k, token in enumerate(text):
        if not isinstance(token, str):
            raise InputError(f"{name}, token {k} is of type {type(token).__name__}; expected str")
        if not token:
            raise InputError(f"{name}, token {k} is empty; leave it out")
    return text


def checked_texts(texts: Iterable[Text]) -> Iterator[Text]:
    """The texts one by one. Raises InputError at once for a single string, later for an item that is no text."""
    if isinstance(texts, str):
        raise InputError("texts is one string; expected a list of texts, such as [text]")
    return (check_text(text, f"text {i}") for i, text in enumerate(texts))


def check_texts(texts: Iterable[Text]) -> list[Text]:
    """The texts as a list. Raises InputError for a single string, and for an item that is no text."""
    return list(checked_texts(texts))


def training_texts(texts: Iterable[Text]) -> list[Text]:
    """The texts as a list. Raises InputError as check_texts does, and if there is no text."""
    found = check_texts(texts)
    if not found:
        raise InputError("there is no text to train on; expected a list of texts")
    return found


def check_weights(weights: Sequence[float], count: int) -> list[float]:
    """The weights of a mix of layers. Raises InputError if they are not `count` numbers of at least 0, one above 0."""
    try:
        numbers = [float(weight) for weight in weights]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count or not min(numbers) >= 0 or not 0 < sum(numbers) < math.inf:
        raise InputError(f"mix is {weights!r}; expected trainable, frozen, or {count} numbers of at least 0")
    return numbers

