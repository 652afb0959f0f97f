"""Makes report.pdf from models/*.json and its figures, and runs explore.ipynb on the published files.

`python report/build.py` takes a minute. Typst is pinned and reads its own fonts alone, so that the same JSON and
figures give the same PDF byte for byte; the notebook reads AG News' test rows.
"""
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
import typst
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # run as `python report/build.py`

from data.files import InputError, one_line, write_atomically
from data.knobs import script
from data.prepare import ag_news_folder

HERE = Path(__file__).resolve().parent


def pdf() -> bytes:
    """The report, compiled; InputError where a JSON or a figure that it shows is missing."""
    try:
        return typst.compile(HERE / "report.typ", root=HERE.parent, ignore_system_fonts=True)
    except typst.TypstError as error:
        raise InputError(f"report.typ cannot be compiled: {one_line(error)}; make the file that is missing, "
                         "`make train` and `make findings` write them") from None


def executed() -> nbformat.NotebookNode:
    """The notebook with its outputs, without times; InputError where a cell fails."""
    book = nbformat.read(HERE / "explore.ipynb", as_version=4)
    client = NotebookClient(book, timeout=300, record_timing=False, resources={"metadata": {"path": str(HERE)}})
    try:
        client.execute()
    except CellExecutionError as error:
        raise InputError(f"a cell of explore.ipynb fails: {error.ename}: {one_line(error.evalue)}") from None
    book.metadata["language_info"] = {"name": "python"}     # no version: another one makes no other notebook
    return book


@script("build.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 2 where something that the two show is missing."""
    report = pdf()
    write_atomically(HERE / "report.pdf", lambda file: file.write(report))
    ag_news_folder()                # its sentence, rather than a cell's
    book = nbformat.writes(executed()) + "\n"
    write_atomically(HERE / "explore.ipynb", lambda file: file.write(book.encode()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
