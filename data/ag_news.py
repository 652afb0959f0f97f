"""AG News: find, download, verify, read and split its rows.

    rows = read_ag_news("train")                            # DataFrame: class 1-4, title, description
    train, validation = split(len(rows), 4000, seed=0)      # row numbers
    fresh = fresh_rows(train_descriptions, test_descriptions)

`python data/ag_news.py` downloads AG News to data/ag_news/, or says which copy it found, and prints its hashes.
"""
import csv
import hashlib
import http.client
import io
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # for `python data/ag_news.py`

from run.files import InputError, one_line, read_text
from run.options import script

HERE = Path(__file__).resolve().parent
CACHE = HERE / "cache"          # tokenized corpora
SOURCE = "https://raw.githubusercontent.com/mhjabreel/CharCnn_Keras/master/data/ag_news_csv/"
SHA256 = {"train": "76a0a2d2f92b286371fe4d4044640910a04a803fdd2538e0f3f29a5c6f6b672e",
          "test": "521465c2428ed7f02f8d6db6ffdd4b5447c1c701962353eb2c40d548c3c85699"}
COLUMNS = ["class", "title", "description"]
HEADERS = (["class index", "title", "description"], ["class index", "description"])


# ---------------------------------------------------------------------------------------------------- finding
def ag_news_folder() -> Path:
    """The folder with train.csv and test.csv: only $AG_NEWS_DIR if it is set, else data/ag_news/, downloaded if needed.

    Raises InputError if a file is missing and cannot be downloaded.
    """
    named = os.environ.get("AG_NEWS_DIR")
    if not named:
        folder = HERE / "ag_news"
        download(folder)
        return folder
    folder = Path(named)
    for part in SHA256:
        if not (folder / f"{part}.csv").is_file():
            raise InputError(f"$AG_NEWS_DIR is {folder}, where {part}.csv is missing; put train.csv and test.csv "
                             "there or unset the variable")
    return folder


def download(folder: Path) -> None:
    """Downloads the missing ones of train.csv and test.csv to `folder`; a file appears only once it is verified."""
    for part, sha256 in SHA256.items():
        file = folder / f"{part}.csv"
        if file.is_file():
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(f"{SOURCE}{part}.csv", str(file), hash_prefix=sha256)
        except RuntimeError as error:       # torch's error for a wrong hash
            raise InputError(f"the download of {part}.csv does not have the SHA-256 of the original "
                             f"({one_line(error)}); run it again, or fetch the file by hand") from None
        except (OSError, http.client.HTTPException) as error:
            raise InputError(
                f"$AG_NEWS_DIR is not set, {file} is missing, and the download failed ({one_line(error)}); do one of "
                "three things: set AG_NEWS_DIR to a folder with train.csv and test.csv, put the two files into "
                f"{folder}, or connect to the network and run this again (`make demo` needs no download)") from None


# ---------------------------------------------------------------------------------------------------- reading
def read_ag_news(part: str, rows: int = 0) -> pd.DataFrame:
    """The first `rows` rows (0: all) of "train" or "test": class (1-4), title ("" if there is none), description."""
    path = ag_news_folder() / f"{part}.csv"
    table = read_csv(path)
    if rows > len(table):
        raise InputError(f"rows is {rows}, but {path} has {len(table)} rows")
    return table[:rows or None]


def read_csv(path: str | Path) -> pd.DataFrame:
    """The rows of an AG News file as class, title and description. The first line tells which of three layouts it has:

        "3","Title","Text"                      the original: no header, three columns
        Class Index,Title,Description           a header and three columns
        Class Index,Description                 a header and two columns

    Raises InputError that names the file, the row (1 is the first below a header) and what was expected.
    """
    rows = read_rows(path)
    if not rows:
        raise InputError(f"{path}: the file is empty; expected rows of class, title, description")
    first = [field.strip().lower() for field in rows[0]]
    has_header = not first[0].lstrip("+-").isdigit()
    if has_header:
        header = rows.pop(0)
        if first not in HEADERS:
            raise InputError(f"{path}: the header is {','.join(header)[:80]!r}; expected 'Class Index,Title,"
                             "Description', 'Class Index,Description', or no header and three columns; for texts and "
                             "labels of your own use `python classification.py --data FOLDER`")
    elif len(first) != 3:
        raise InputError(f"{path}, row 1: has {len(first)} columns; expected class, title, description")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(first):
            raise InputError(f"{path}, row {number}: has {len(row)} columns; expected {len(first)}")
    columns = COLUMNS if len(first) == 3 else ["class", "description"]
    table = pd.DataFrame(rows, columns=columns).reindex(columns=COLUMNS, fill_value="")
    table["class"] = class_numbers(table, path)
    return table


def read_rows(path: str | Path, delimiter: str = ",") -> list[list[str]]:
    """The fields of every row that is not blank. Not read by pandas, which would fill up rows that are too short.

    If the delimiter is a tab, quotes may be plain characters: see `read_tabs`.
    """
    text = read_text(path)
    if "\0" in text:
        line = text[:text.index("\0")].count("\n") + 1
        raise InputError(f"{path}, line {line}: holds a NUL character; it is not the text of a CSV file")
    csv.field_size_limit(2**27)
    if delimiter == "\t":
        rows = read_tabs(text)
    else:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        try:
            rows = list(reader)
        except csv.Error as error:
            raise InputError(f"{path}, line {reader.line_num}: {error}; check the quotes there") from None
    return [row for row in rows if len(row) > 1 or "".join(row).strip()]


def read_tabs(text: str) -> list[list[str]]:
    """The rows of a text with tabs between the fields, by the rules of CSV if they fit, otherwise quotes included.

    The rules do not fit if they fail, or if they merge lines that each have the same number of fields. So a quote that
    is never closed, as in the files of GLUE, is a character of its text.
    """
    lines = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE))
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True))
    except csv.Error:
        return lines
    sizes = {len(line) for line in lines if line}
    return lines if len(rows) < len(lines) and len(sizes) == 1 else rows


def class_numbers(table: pd.DataFrame, path: str | Path) -> pd.Series:
    """The classes as integers. Raises InputError for the first row without class 1-4, or if no row has a text."""
    if table.empty:
        raise InputError(f"{path}: a header and no row below it; expected rows of class, title, description")
    numbers = pd.to_numeric(table["class"], errors="coerce")
    valid = numbers.isin([1, 2, 3, 4])
    if not valid.all():
        row = int(np.argmin(valid))
        raise InputError(f"{path}, row {row + 1}: class is {table['class'][row][:40]!r}; expected 1, 2, 3 or 4")
    if not table["description"].str.strip().any():
        raise InputError(f"{path}: every description is empty; expected a text in the last column")
    return numbers.astype("int64")


# ------------------------------------------------------------------------------------------------------- rows
def split(rows: int, validation: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of training and validation, each sorted; the seed draws the validation rows."""
    if not 0 <= validation < rows:
        raise InputError(f"validation is {validation}, but there are {rows} rows; choose fewer, so that some remain")
    order = np.random.default_rng(seed).permutation(rows)
    return np.sort(order[validation:]), np.sort(order[:validation])


def fresh_rows(known: Iterable[str], texts: Sequence[str], max_share: float = 0.2, n: int = 8) -> np.ndarray:
    """(rows,) bool: False for near copies, of whose 8-grams more than a fifth occur in some known text.

    Words are those of `lower().split()`; a row with fewer than 8 is fresh. More than one AG News test row in seven is a
    near copy of a training row, which a model has memorized. For test rows, `known` is all of train.csv.
    """
    grams_of_rows = [hashed_ngrams(text, n) for text in texts]
    wanted = set().union(*grams_of_rows)
    seen = set()
    for text in known:
        seen.update(wanted.intersection(hashed_ngrams(text, n)))
    fresh = np.ones(len(texts), dtype=bool)
    for row, grams in enumerate(grams_of_rows):
        fresh[row] = sum(gram in seen for gram in grams) <= max_share * len(grams)
    return fresh


def hashed_ngrams(text: str, n: int) -> list[int]:
    """A hash of every n consecutive words."""
    words = text.lower().split()
    return [hash(tuple(words[i:i + n])) for i in range(len(words) - n + 1)]


@script("ag_news.py")
def main(_: Sequence[str] | None) -> int:
    """Prints for both files their rows per class and their hash."""
    folder = ag_news_folder()
    for part, original in SHA256.items():
        file = folder / f"{part}.csv"
        classes = read_csv(file)["class"].value_counts().sort_index().to_dict()
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        kind = "the original" if sha256 == original else "not the original, accepted as it is"
        print(f"{file}: {sum(classes.values()):,} rows, by class {classes}, SHA-256 {sha256} ({kind})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
