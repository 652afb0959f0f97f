"""Checks of what a user gives. A text is a string, or a list of its tokens; a tuple holds several texts.

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
        raise InputError(f"{name} is a tuple of texts; expected one text: a string or a list of tokens")
    if not isinstance(text, list):
        raise InputError(f"{name} is of type {type(text).__name__}; expected a string or a list of tokens")
    for k, token in enumerate(text):
        if not isinstance(token, str):
            raise InputError(f"{name}, token {k} is of type {type(token).__name__}; expected str")
        if not token:
            raise InputError(f"{name}, token {k} is empty; leave it out")
    return text


def each_checked(texts: Iterable[Text]) -> Iterator[Text]:
    """The texts one by one. Raises InputError at once for a single string, later for an item that is no text."""
    if isinstance(texts, str):
        raise InputError("texts is one string; expected a list of texts, such as [text]")
    return (check_text(text, f"text {i}") for i, text in enumerate(texts))


def check_texts(texts: Iterable[Text]) -> list[Text]:
    """The texts as a list. Raises InputError for a single string, and for an item that is no text."""
    return list(each_checked(texts))


def nonempty_texts(texts: Iterable[Text]) -> list[Text]:
    """The texts as a list. Raises InputError as check_texts does, and if there is no text."""
    found = check_texts(texts)
    if not found:
        raise InputError("there are no texts; expected a list of at least one")
    return found


def check_mix(mix: str | Sequence[float], count: int) -> str | list[float]:
    """"trainable", "frozen", or the weights of `count` layers. InputError if they are not >= 0 with a sum above 0."""
    if isinstance(mix, str) and mix in ("trainable", "frozen"):
        return mix
    try:
        numbers = [] if isinstance(mix, str) else [float(weight) for weight in mix]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count or min(numbers) < 0 or not 0 < sum(numbers) < math.inf:       # NaN: the sum is NaN
        raise InputError(f"mix is {mix!r}; expected trainable, frozen, or {count} numbers >= 0 with a sum above 0")
    return numbers

