"""Makes report.pdf from models/*.json and its figures, and runs explore.ipynb on the published files.

`python report/build.py` takes a minute. Typst is pinned and reads its own fonts alone, so that the same JSON and
figures give the same PDF byte for byte; the notebook reads AG News' test rows.
"""
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # run as `python report/build.py`

try:
    import nbformat
    import typst
    from nbclient import NotebookClient
    from nbclient.exceptions import CellControlSignal, CellExecutionError, DeadKernelError
except ModuleNotFoundError as missing:
    sys.exit(f"build.py: the package {missing.name} is not here; run `pip install -r requirements-dev.txt`")

from data.files import InputError, one_line, write_atomically, written_json
from data.knobs import script
from data.prepare import ag_news_folder

HERE = Path(__file__).resolve().parent
MADE_BY = {"pretraining": "python ELMO.py", "classification": "python classification.py --seeds 3",
           "bench": "make bench", "faults": "make faults", "findings": "make findings", "baselines": "make train",
           "finetuned": "make train", "titled": "make train", "sst5": "make tasks", "sst2": "make tasks",
           "nli": "make tasks"}
FINDINGS = {"heatmap", "labels", "leaks", "map", "mixes", "neighbours", "senses", "settings", "weights"}


def pdf() -> bytes:
    """The report, compiled; InputError where a JSON or a figure that it shows is missing or of another biLM."""
    for name, command in MADE_BY.items():
        path = HERE.parent / "models" / f"{name}.json"
        if not path.exists():
            raise InputError(f"{path} is missing; `{command}` makes it")
    with written_json(HERE.parent / "models" / "findings.json") as found:
        if missing := sorted(FINDINGS - set(found)):
            raise InputError(f"models/findings.json has no finding `{missing[0]}`; `make findings` adds it")
    try:
        return typst.compile(HERE / "report.typ", root=HERE.parent, ignore_system_fonts=True)
    except typst.TypstError as error:
        raise InputError(f"report.typ cannot be compiled: {one_line(error)}") from None


def executed() -> nbformat.NotebookNode:
    """The notebook with its outputs, without times; InputError where it is damaged or a cell fails."""
    try:
        book = nbformat.read(HERE / "explore.ipynb", as_version=4)
    except ValueError as error:
        raise InputError(f"explore.ipynb is no notebook: {one_line(error)}; restore it") from None
    client = NotebookClient(book, timeout=300, record_timing=False, resources={"metadata": {"path": str(HERE)}},
                            extra_arguments=["--log-level=ERROR"])      # without its warnings of ports
    try:
        client.execute()
    except (CellControlSignal, DeadKernelError) as error:
        said = f"{error.ename}: {error.evalue}" if isinstance(error, CellExecutionError) else one_line(error)
        raise InputError(f"a cell of explore.ipynb fails: {said}") from None
    book.metadata["language_info"] = {"name": "python"}     # no version: another one makes no other notebook
    return book


@script("build.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 2 where something that the two show is missing; both files are written, or neither."""
    ag_news_folder()                                        # its sentence, rather than a cell's
    report, book = pdf(), nbformat.writes(executed()) + "\n"
    write_atomically(HERE / "report.pdf", lambda file: file.write(report))
    write_atomically(HERE / "explore.ipynb", lambda file: file.write(book.encode()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
