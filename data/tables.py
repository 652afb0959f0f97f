"""Own labelled texts: a folder with train.csv, test.csv and perhaps validation.csv, or the same as .tsv or .jsonl.

    task = own_task("tickets/", [], None, pair=False, validation=None, seed=0)      # columns are guessed by their names
    task.labels                                                                     # ["billing", "refund", ..]
"""
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.ag_news import COLUMNS, read_rows
from data.inputs import Text, check_text
from data.labels import Rows, labelled_task
from data.tasks import Task, with_title
from data.text import normalize
from run.files import InputError, read_lines, split_at_spaces

SUFFIXES = (".csv", ".tsv", ".jsonl")
USUAL_NAMES = {"text": ("text", "description"), "label": ("label", "class", "class index")}
HUGGING_FACE = "if this is AG News of Hugging Face: its text column is title and description in one"


def own_task(folder: str | Path, text_columns: Sequence[str], label_column: str | None, pair: bool,
             validation: int | None, seed: int, tokenized: bool = False) -> Task:
    """The task of a folder of labelled texts. Columns that are not named are guessed: see `choose_columns`.

    Several text columns are joined to one text, or are a pair of texts if `pair`. tokenized: texts are split at spaces
    only. Rows of validation.csv are the validation rows; without this file they are drawn: see `labelled_task`.
    Raises InputError that names the file, the row (1 is the first below the header) or the line of a .jsonl file.
    """
    train = read_table(Path(folder), "train")
    test = read_table(Path(folder), "test")
    given = read_table(Path(folder), "validation")
    if train is None or test is None:
        missing = "test" if train else "train"
        raise InputError(f"{folder}: {missing}.csv (or .tsv, .jsonl) is missing; put train.csv and test.csv there")
    if given is not None and validation is not None:
        raise InputError(f"{given.path} has the validation rows, so none are drawn; leave --validation out")
    texts, label = choose_columns(train, text_columns, label_column)
    if pair and len(texts) != 2:
        raise InputError(f"a pair needs two text columns; found {listed(texts)}; name two with --text")
    rows = train.rows_of(texts, label, pair, tokenized)
    task = labelled_task(rows.texts, rows.labels, validation if given is None else 0, seed, rows.places)
    task.test = test.rows_of(texts, label, pair, tokenized).part(task.labels)
    if given is not None:
        task.validation = given.rows_of(texts, label, pair, tokenized).part(task.labels)
    kind = "pair" if pair else "text"
    names = " and ".join(texts)
    classes = f"{len(task.labels)} classes: {listed(task.labels)}"
    task.notes.append(f"{kind}: column {names}; label: column {label}; {classes}")
    if train.columns == ["text", "label"] and [str(name) for name in task.labels] == ["0", "1", "2", "3"]:
        task.notes.append(HUGGING_FACE)
    return task


# --------------------------------------------------------------------------------------------------------- texts
def checked_text(value: object, place: str, tokenized: bool) -> Text:
    """A text, or a list of tokens; a string becomes tokens if `tokenized`. Raises InputError for other values."""
    text = check_text(value, place)
    if tokenized and isinstance(text, str):
        return split_at_spaces(text)
    return text


def joined(texts: Sequence[Text], place: str) -> Text:
    """One text of several columns. Raises InputError if only some of them are lists of tokens."""
    try:
        return with_title(*texts)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


# --------------------------------------------------------------------------------------------------------- files
@dataclass
class Table:
    """The rows of a file, each {column: value}; places: what an error calls each row, "train.csv, row 1", .."""
    path: Path
    columns: list[str]
    rows: list[dict]
    places: list[str]

    def column(self, name: str) -> str:
        """The column of this name; if there is none, the one that differs only in case and spaces around."""
        found = [column for column in self.columns if column == name]
        if not found:
            found = [column for column in self.columns if plain(column) == plain(name)]
        if len(found) != 1:
            count = "two columns" if found else "no column"
            raise InputError(f"{self.path} has {count} {name!r}; its columns are {listed(self.columns)}")
        return found[0]

    def rows_of(self, text_columns: Sequence[str], label_column: str, pair: bool, tokenized: bool) -> Rows:
        """Texts and labels of all rows. Raises InputError for a row without a text, or with a wrong value."""
        columns = [self.column(name) for name in [*text_columns, label_column]]
        rows = Rows([], [], [])
        for row, place in zip(self.rows, self.places, strict=True):
            for name in columns:
                if name not in row:
                    raise InputError(f"{place}: {name} is missing; write it on every line")
            texts = [checked_text(row[name], f"{place}: {name}", tokenized) for name in columns[:-1]]
            if not normalize("".join("".join(text) for text in texts)).strip():
                raise InputError(f"{place}: the text is empty; write one or remove the row")
            if not pair and len(texts) > 1:
                texts = [joined(texts, place)]
            rows.texts.append(tuple(texts))
            rows.labels.append(row[columns[-1]])
            rows.places.append(f"{place}: {columns[-1]}")
        return rows


def choose_columns(table: Table, text_columns: Sequence[str], label_column: str | None) -> tuple[list[str], str]:
    """(text columns, label column): the given ones; else those with a usual name; else the only other column.

    Raises InputError that lists the columns of the file if a given one is missing, or if the choice is not clear.
    """
    given = {"text": [table.column(name) for name in text_columns], "label": []}
    if label_column is not None:
        given["label"].append(table.column(label_column))
    taken = given["text"] + given["label"]
    if len(set(taken)) < len(taken):
        raise InputError(f"{table.path}: {listed(taken)} names a column twice; give --text and --label other columns")
    free = [name for name in table.columns if name and name not in taken]
    found = {}
    for kind, usual in USUAL_NAMES.items():
        found[kind] = given[kind] or [name for name in free if plain(name) in usual]
    rest = [name for name in free if name not in found["text"] + found["label"]]
    if len(rest) == 1 and (found["text"] or found["label"]):            # one kind is clear: the other is what is left
        found = {kind: names or rest for kind, names in found.items()}
    for kind, names in found.items():
        if len(names) != 1 and not given[kind]:
            raise InputError(f"{table.path} has the columns {listed(table.columns)} in its first line, and it is not "
                             f"clear which one is the {kind}; name it with --{kind}")
    return found["text"], found["label"][0]


def plain(name: str) -> str:
    """A column's name in small letters without spaces around."""
    return name.strip().lower()


def listed(names: Sequence[str | int]) -> str:
    """The names with commas between, cut to about 100 characters."""
    line = " ".join(", ".join(str(name) for name in names).split())
    return line if len(line) <= 100 else f"{line[:100]} .."


def read_table(folder: Path, part: str) -> Table | None:
    """The rows of the file of a part ("train", "validation", "test"), or None if there is no such file."""
    paths = [folder / f"{part}{suffix}" for suffix in SUFFIXES]
    found = [path for path in paths if path.is_file()]
    if not found:
        return None
    if len(found) > 1:
        raise InputError(f"{folder} has {found[0].name} and {found[1].name}; leave only one of them there")
    table = read_objects(found[0]) if found[0].suffix == ".jsonl" else read_fields(found[0])
    if not table.rows:
        raise InputError(f"{table.path} has no row below its first line, which names the columns; add rows")
    return table


def read_objects(path: Path) -> Table:
    """The rows of a file with a JSON object on each line. The columns are the keys of the first one."""
    table = Table(path, [], [], [])
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: {line[:40]!r} is no JSON object; expected one on each line, such "
                             'as {"text": "..", "label": ".."}')
        table.columns = table.columns or list(row)
        table.rows.append(row)
        table.places.append(f"{path}, line {number}")
    return table


def read_fields(path: Path) -> Table:
    """The rows of a .csv or .tsv file, without spaces around the fields.

    The first line is the header, unless it begins with a number and has three fields, as in AG News.
    """
    delimiter = "\t" if path.suffix == ".tsv" else ","
    rows = []
    for fields in read_rows(path, delimiter):
        rows.append([field.strip() for field in fields])
    columns = COLUMNS
    if rows and (len(rows[0]) != 3 or not rows[0][0].isdecimal()):
        columns = rows.pop(0)
    if len(columns) == 1:
        raise InputError(f"{path}: the header is one column, {columns[0][:40]!r}; write columns with {delimiter!r} "
                         "between")
    table = Table(path, columns, [], [])
    for number, row in enumerate(rows, start=1):
        if len(row) != len(columns):
            raise InputError(f"{path}, row {number}: has {len(row)} fields; expected {len(columns)} with {delimiter!r} "
                             f'between, and a text that holds {delimiter!r} in quotes ("..")')
        table.rows.append(dict(zip(columns, row, strict=True)))
        table.places.append(f"{path}, row {number}")
    return table
