"""A news corpus of four classes, written by a small grammar. Its entropy and the best possible accuracies are known.

    the senior court sued the bank over this civil trial .              World: a state actor acts on a firm
    on monday the bank sued the court in paris over the retail bond .   Business: the same two actors, roles exchanged

A row is a walk through slots (subject, verb, object, ...). Each slot draws a word; slot and word decide the next slot.
Only the class is hidden, so log p(row) is four sums and one logsumexp. The classes are 0 World, 1 Sports, 2 Business
and 3 Sci/Tech. They form two pairs: the mate of class c is (c + 2) % 4. A class shows in two places:
  - who acts on whom (SUBJECT): the subject mostly belongs to the row's class, the object always to the subject's mate.
    A bag of words has both actors of a clause, so they do not tell a class from its mate. Their order does.
  - the modifiers of noun phrases (MODIFIER), which a bag of words has too.
Many words are in several lists of NOUNS. Only the words around them show which one is meant: civil court, indoor court;
solar cell, federal cell.

`python data/sample.py --out DIR --rows 8000` writes DIR/train.csv and DIR/test.csv. `--limits` prints the entropy and
the best possible accuracies.
"""
import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import chain, count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # for `python data/sample.py`

from run.files import write_atomically
from run.options import Parser, script

CLASSES = 4
# Shares of the row's class, of its mate, and of each of the other two classes.
SUBJECT = (0.95, 0.02, 0.015)       # among subjects
MODIFIER = (0.70, 0.20, 0.05)       # among modifiers, which therefore show the class less clearly
CHUNK = 2_000       # rows are drawn in chunks, each with its own seed, so row i does not depend on the number of rows
END = ""            # the end symbol, which a language model predicts too

ACTORS = [words.split() for words in (
    "minister president senate army parliament court embassy envoy police cabinet mayor governor militia king",
    "coach striker goalkeeper club team captain champion referee sprinter boxer golfer pitcher league star",
    "bank company retailer airline lender insurer brewer broker carmaker investor exporter grocer factory builder",
    "scientist engineer lab astronomer doctor biologist chemist robot physicist coder hacker inventor surgeon pilot")]
VERBS = [words.split() for words in (       # one list per pair of mates: a verb shows the pair, not the class
    "sued warned funded lobbied bribed blamed rescued audited backed petitioned pressed shielded",
    "tested trained tracked filmed measured challenged studied monitored advised beat equipped joined")]
MODIFIERS = [words.split() for words in (
    "military federal civil diplomatic colonial royal tribal imperial criminal national wartime peaceful",
    "olympic indoor professional amateur junior regional outdoor seasonal athletic competitive home decisive",
    "corporate retail commercial annual quarterly offshore wholesale luxury taxable profitable private industrial",
    "digital nuclear solar wireless genetic magnetic quantum electronic virtual molecular robotic optical")]
NOUNS = [words.split() for words in (
    "court cell race strike trial charge bank treaty summit vote",
    "court pitch race match trial record field drive medal tournament",
    "pitch bond strike record charge bank market merger profit stock",
    "cell bond match field drive charge virus chip telescope laser")]
SPEAKERS = "analysts officials reporters observers insiders experts critics witnesses".split()
SAYING = "said confirmed reported noted claimed admitted".split()
DAYS = "monday tuesday wednesday thursday friday".split()
PLACES = "london paris tokyo berlin madrid moscow sydney cairo toronto delhi".split()
ADJECTIVES = "former young new senior rival veteran local famous".split()
PREPOSITIONS = "over after before despite during about".split()
JOINS = "while and but as".split()
LINKS = "meanwhile later elsewhere separately".split()


class Source(NamedTuple):
    """The grammar as A arcs, sorted by slot. An arc is one word of one slot; it leads to the next slot."""
    slots: dict[str, int]                       # name -> number
    arcs: list[dict[str, tuple[int, int]]]      # per slot: word -> (arc, next slot)
    target: np.ndarray                          # (A,) next slot
    logs: np.ndarray                            # (A, 4) log p(word | slot, class)
    pieces: np.ndarray                          # (A,) the word with a space before it; "" for END
    steps: np.ndarray                           # (4 * A,) increasing; a search in it finds an arc, see walk()


def shares(strength: tuple[float, float, float]) -> np.ndarray:
    """(4 groups, 4 classes) p(group | class) from the shares of own class, mate, each other class; columns sum to 1."""
    own, mate, other = strength
    return np.array([np.roll((own, other, mate, other), c) for c in range(4)])


def grammar() -> dict[str, list[tuple[float | np.ndarray, Sequence[str], str]]]:
    """{slot: [(share, words, next slot), ..]}; a share is one number for all classes, or (4,) one per class."""
    subject = shares(SUBJECT)
    modifier = shares(MODIFIER)
    slots = {
        "start": [(0.45, ["the"], "subject"), (0.30, SPEAKERS, "say"), (0.25, ["on"], "first day")],
        "say": [(1, SAYING, "that")],
        "that": [(1, ["that"], "the")],
        "first day": [(1, DAYS, "the")],
        "the": [(1, ["the"], "subject")],
        "subject": [(0.25, ADJECTIVES, "subject noun"),
                    *((0.75 * subject[g], ACTORS[g], f"verb {g}") for g in range(4))],
        "subject noun": [(subject[g], ACTORS[g], f"verb {g}") for g in range(4)],
        "after clause": [(0.75, PREPOSITIONS, "determiner"), (0.25, ["in"], "place")],
        "place": [(1, PLACES, "after place")],
        "after place": [(0.85, PREPOSITIONS, "determiner"), (0.15, [","], "join")],
        "determiner": [(1, ["the", "this", "that"], "modifier")],
        "modifier": [(modifier[g], MODIFIERS[g], f"noun {g}") for g in range(4)],
        "after noun": [(0.1, ["and"], "determiner"), (0.12, [","], "join"), (0.18, ["on"], "last day"),
                       (0.6, ["."], "stop")],
        "last day": [(1, DAYS, "after day")],
        "after day": [(0.12, [","], "join"), (0.88, ["."], "stop")],
        "join": [(1, JOINS, "the")],
        "stop": [(0.9, [END], "done"), (0.1, LINKS, "the")]}
    for g in range(4):
        mate = ACTORS[(g + 2) % 4]
        slots |= {f"verb {g}": [(1, VERBS[g % 2], f"object the {g}")],
                  f"object the {g}": [(1, ["the"], f"object {g}")],
                  f"object {g}": [(0.25, ADJECTIVES, f"object noun {g}"), (0.75, mate, "after clause")],
                  f"object noun {g}": [(1, mate, "after clause")],
                  f"noun {g}": [(1, NOUNS[g], "after noun")]}
    return slots


@cache
def source() -> Source:
    """The grammar's arcs. In a list of words, word k = 0, 1, .. has the weight 1 / (10 + k), so no word is rare."""
    table = grammar()
    number = {name: k for k, name in enumerate([*table, "done"])}
    arcs = []
    target = []
    pieces = []
    chances = []                                # per slot: (arcs of the slot, 4) p(word | slot, class)
    for ways in table.values():
        of_slot = {}
        of_words = []
        for share, words, following in ways:
            weights = 1 / (10 + np.arange(len(words)))
            for word, weight in zip(words, weights / weights.sum(), strict=True):
                of_slot[word] = len(target), number[following]
                target.append(number[following])
                pieces.append(f" {word}" if word != END else END)
                of_words.append(np.broadcast_to(share * weight, CLASSES))
        arcs.append(of_slot)
        chances.append(np.array(of_words))
    steps = []
    for c in range(CLASSES):
        for slot, of_words in enumerate(chances):
            low = 2 * (c * len(number) + slot)
            steps.append(low + np.cumsum(of_words[:, c]))
            steps[-1][-1] = low + 1.5           # not 1: rounding must not reach the next slot
    logs = np.log(np.concatenate(chances))
    return Source(number, arcs, np.array(target), logs, np.array(pieces, object), np.concatenate(steps))


# ------------------------------------------------------------------------------------------------- generating
def walk(rng: np.random.Generator, label: np.ndarray, begin: str, end: str) -> list[str]:
    """One text per label, drawn from slot `begin` to slot `end`. Each round adds one word to every unfinished text.

    With S slots, slot s of class c has the values of `steps` between 2 (c S + s) and 2 (c S + s) + 2, so one binary
    search finds the next arc of every row.
    """
    machine = source()
    slot = np.full(len(label), machine.slots[begin])
    text = np.full(len(label), "", dtype=object)
    active = np.arange(len(label))
    while len(active):
        place = 2 * (label[active] * len(machine.slots) + slot[active]) + rng.random(len(active))
        arc = np.searchsorted(machine.steps, place, side="right") % len(machine.target)
        text[active] += machine.pieces[arc]
        slot[active] = machine.target[arc]
        active = active[slot[active] != machine.slots[end]]
    return [row[1:] for row in text]


def stream_chunks(seed: int, stream: int) -> Iterator[Iterable[tuple[int, str, str]]]:
    """Endless chunks of rows, of which `stream_rows` takes the first ones."""
    for chunk in count():
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, stream, chunk))))
        label = (CLASSES * rng.random(CHUNK)).astype(np.int64)
        titles = [title.title() for title in walk(rng, label, "modifier", "after noun")]
        yield zip((label + 1).tolist(), titles, walk(rng, label, "start", "done"), strict=True)


def stream_rows(rows: int, seed: int, stream: int) -> Iterator[tuple[int, str, str]]:
    """The rows of `generate`, from one of a seed's two streams: 0 for training, 1 for test."""
    return islice(chain.from_iterable(stream_chunks(seed, stream)), rows)


def generate(rows: int, seed: int = 0) -> Iterator[tuple[int, str, str]]:
    """(class 1-4, title, description) of each row, one by one. A larger `rows` only adds rows at the end.

        next(generate(1))
        (3, 'Magnetic Charge', 'insiders noted that the grocer funded the militia after the annual charge .')

    The title is one more noun phrase of the class. nll_batch, posterior and limits are about descriptions only.
    """
    return stream_rows(rows, seed, stream=0)


# ---------------------------------------------------------------------------------------------------- scoring
def class_logs(descriptions: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """(rows, 4) log p(description, end | class), and (rows,) number of tokens, end symbol included.

    Raises KeyError for a description that the source cannot write.
    """
    machine = source()
    path = []
    tokens = []
    for description in descriptions:
        words = [*description.split(), END]
        slot = machine.slots["start"]
        for word in words:
            arc, slot = machine.arcs[slot][word]
            path.append(arc)
        tokens.append(len(words))
    starts = np.cumsum([0, *tokens[:-1]])
    return np.add.reduceat(machine.logs[path], starts), np.array(tokens)


def bag_logs(descriptions: Iterable[str]) -> np.ndarray:
    """(rows, 4) log p(bag of words | class), plus a number that is the same for all classes; see bag_posterior."""
    subject = shares(SUBJECT)
    modifier = shares(MODIFIER)
    evidence = {}       # word -> (4,) log p(its group | class), for verbs and modifiers
    for pair in range(2):
        evidence |= dict.fromkeys(VERBS[pair], np.log(subject[pair] + subject[pair + 2]))
    for group in range(4):
        evidence |= dict.fromkeys(MODIFIERS[group], np.log(modifier[group]))
    rows = []
    for description in descriptions:
        row = np.zeros(CLASSES)
        for word in description.split():
            row += evidence.get(word, 0)
        rows.append(row)
    return np.array(rows)


def bayes(logs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log p(row | class) (rows, 4) -> p(class | row) (rows, 4) and -log p(row) (rows,); every class has p = 1/4."""
    top = logs.max(axis=1, keepdims=True)
    weights = np.exp(logs - top)
    total = weights.sum(axis=1, keepdims=True)
    return weights / total, (np.log(4) - top - np.log(total))[:, 0]


def nll_batch(descriptions: Iterable[str]) -> np.ndarray:
    """(rows,) -log p(tokens, end) in nats, summed over the classes. No language model has a lower expected value.

    This holds for both directions, because p(tokens, end) is also the product of the next-token probabilities in either
    reading order, with the boundary symbol predicted last. A model whose mean is clearly lower sees what it predicts.
    """
    logs, _ = class_logs(descriptions)
    _, row_nll = bayes(logs)
    return row_nll


def posterior(description: str) -> np.ndarray:
    """(4,) p(class | description). The best classifier predicts the largest entry and is right with its probability."""
    logs, _ = class_logs([description])
    posteriors, _ = bayes(logs)
    return posteriors[0]


def bag_posterior(description: str) -> np.ndarray:
    """(4,) p(class | the bag of words): exact, and the same for every order of the words.

    Verbs show the pair and modifiers the class. The actors add nothing: the bag does not tell who of the two acts,
    and the sum of p(actors | class) over both possibilities depends only on the pair, which the verb shows already.

        the court sued the bank over the civil trial .    World and Business 0.78 : 0.22, only because of "civil"
    """
    posteriors, _ = bayes(bag_logs([description]))
    return posteriors[0]


def limits(rows: int = 20_000, seed: int = 1_000_003) -> dict[str, float | int]:
    """What the best possible language model and classifiers reach, as means over rows.

    nll_per_token and perplexity count the end symbol. sequence_accuracy is that of the best classifier which knows the
    order of the words, bag_accuracy that of the best one which does not. Both are means of the largest posterior, which
    is less noisy than counting right predictions.
    """
    descriptions = [description for _, _, description in generate(rows, seed)]
    logs, tokens = class_logs(descriptions)
    posteriors, row_nll = bayes(logs)
    bag_posteriors, _ = bayes(bag_logs(descriptions))
    per_token = row_nll.sum() / tokens.sum()
    words = set().union(*source().arcs) - {END}
    return {"rows": rows, "seed": seed, "vocabulary": len(words), "tokens_per_row": float(tokens.mean()),
            "nll_per_token": float(per_token), "perplexity": float(np.exp(per_token)),
            "sequence_accuracy": float(posteriors.max(axis=1).mean()),
            "bag_accuracy": float(bag_posteriors.max(axis=1).mean())}


# ---------------------------------------------------------------------------------------------------- writing
def write(folder: str | Path, rows: int, seed: int = 0, test_rows: int = 1_000) -> None:
    """Writes folder/train.csv and folder/test.csv in AG News's layout: "3","Title","Description" without a header."""
    write_csv(Path(folder) / "train.csv", stream_rows(rows, seed, stream=0))
    write_csv(Path(folder) / "test.csv", stream_rows(test_rows, seed, stream=1))


def write_csv(path: Path, rows: Iterable[tuple[int, str, str]]) -> None:
    """Writes one line per row, without holding all rows in memory."""
    lines = (f'"{label}","{title}","{description}"\n'.encode() for label, title, description in rows)
    write_atomically(path, lambda file: file.writelines(lines))


@script("sample.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Writes the corpus, prints the numbers of `limits` as JSON, or both."""
    parser = Parser(prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="DIR", help="folder for train.csv and test.csv")
    parser.add_argument("--rows", type=int, default=8_000, help="number of rows of train.csv (default %(default)s)")
    parser.add_argument("--test-rows", type=int, default=1_000, help="number of rows of test.csv (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random rows (default %(default)s)")
    parser.add_argument("--limits", action="store_true", help="print the entropy and the best possible accuracies")
    options = parser.parse_args(argv)
    if not (options.out or options.limits):
        parser.error("give --out DIR to write the corpus, or --limits to print its limits")
    if min(options.rows - 1, options.test_rows - 1, options.seed) < 0:
        parser.error("--rows and --test-rows must be at least 1, --seed at least 0")
    if options.out:
        write(options.out, options.rows, options.seed, options.test_rows)
    if options.limits:
        print(json.dumps(limits(), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
