"""Writes everything that shows the numbers in models/*.json: figures, the README's results, report.pdf, explore.ipynb.

`python report/build.py` takes about a minute. It needs AG News, because the notebook reads its test rows. The version
of Typst is pinned and only its own fonts are used, so the same JSON files and figures give the same PDF byte for byte.
"""
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # for `python report/build.py`

try:
    import nbformat
    import typst
    from nbclient import NotebookClient
    from nbclient.exceptions import CellControlSignal, CellExecutionError, DeadKernelError
except ModuleNotFoundError as missing:
    sys.exit(f"build.py: the package {missing.name} is missing; run `pip install -r requirements-dev.txt`")

from data.ag_news import ag_news_folder
from report.figures import findings
from run.figures import classification, pretraining
from run.files import InputError, one_line, read_json, read_text, write_atomically
from run.options import script

ROOT = Path(__file__).resolve().parent.parent
CLASSIFICATIONS = ("classification", "finetuned", "titled_finetuned", "adapted_sst5", "adapted_sst2", "adapted_nli")
MADE_BY = {
    "pretraining": "python ELMO.py",
    "classification": "python classification.py --seeds 3",
    **dict.fromkeys(("baselines", "finetuned", "titled_finetuned"), "make train"),
    **dict.fromkeys(("adapted_sst5", "adapted_sst2", "adapted_nli"), "make tasks"),
    **{name: f"make {name}" for name in ("findings", "bench", "faults")}}
FINDINGS = {"heatmap", "labels", "leaks", "map", "mixes", "neighbours", "senses", "settings", "weights"}
SETTINGS = ("trainable", "frozen", "function")


def check_numbers(folder: Path) -> None:
    """Raises InputError if a JSON file or a finding that the report shows is missing from `folder`."""
    for name, command in MADE_BY.items():
        path = folder / f"{name}.json"
        if not path.exists():
            raise InputError(f"{path} is missing; `{command}` makes it")
    with read_json(folder / "findings.json") as found:
        absent = sorted(FINDINGS - set(found))
    if absent:
        raise InputError(f"findings.json has no finding `{absent[0]}`; `make findings` adds it")


def draw_figures(folder: Path) -> None:
    """Draws all figures in FOLDER/figures/ again from the JSON files in `folder`."""
    with read_json(folder / "pretraining.json") as result:
        pretraining(result, folder)
    for name in CLASSIFICATIONS:
        with read_json(folder / f"{name}.json") as result:
            classification(result, folder, "" if name == "classification" else name)
    with read_json(folder / "findings.json") as result:
        findings(result, folder)


def mean_and_std(number: dict) -> str:
    """"91.23 ± 0.10" for {"mean": 0.9123, "std": 0.001}; "91.23" for one seed. Halves round up, as in the report."""
    return " ± ".join(f"{100 * share + 1e-9:.2f}" for share in number.values() if share is not None)


def filled(what: str, number: str, r: dict) -> tuple[str, str, str]:
    """(what, number, command) for a line of the README's table, from two format strings and the content `r` of a JSON.

    The other functions in LINES return the same three.
    """
    return what.format(**r), number.format(**r), r["command"]


def accuracy_line(what: str, r: dict) -> tuple[str, str, str]:
    """Test accuracy in the setting with the best validation accuracy."""
    settings = r["settings"]
    best = max(settings, key=lambda name: settings[name]["validation"]["accuracy"]["mean"])
    accuracy = mean_and_std(settings[best]["test"]["accuracy"])
    return f"{what} (setting `{best}`)", f"{accuracy} %", r["command"]


def baseline_line(r: dict) -> tuple[str, str, str]:
    """Accuracy of the settings minus that of Word2Vec under the same head: means over seeds, then ensembles with p."""
    word2vec = r["rows"]["word2vec"]
    rows = [r["rows"][name] for name in SETTINGS]
    means = [f"{100 * (row['test']['mean'] - word2vec['test']['mean']):+.2f}" for row in rows]
    tests = [row["against"]["word2vec"] for row in rows]
    ensembles = [f"{100 * test['difference']:+.2f} (p = {test['p']:.1g})" for test in tests]
    what = (f"points above Word2Vec under the same head, settings `{'`, `'.join(SETTINGS)}`: mean of "
            f"{word2vec['seeds']} seeds; the seeds' mean probabilities")
    return what, f"{', '.join(means)}; {', '.join(ensembles)}", r["command"]


def labels_line(r: dict) -> tuple[str, str, str]:
    """Test accuracy of ELMo with 1 % of the labels and of Word2Vec with 3 %."""
    shown = []
    for system, share in (("elmo", 1.0), ("word2vec", 3.0)):
        point = r["systems"][system][r["shares"].index(share)]
        accuracy = 100 * sum(point["test"]) / len(point["test"])
        shown.append(f"{accuracy:.1f} %")
    what = f"test accuracy with 1 % of the labels and {r['chosen_on']:,} to choose weights by; Word2Vec with 3 %"
    return what, "; ".join(shown), r["command"]


def senses_line(r: dict) -> tuple[str, str, str]:
    """How often the class of an ambiguous word's use is predicted by its nearest uses."""
    what = "class of an ambiguous word's use predicted by its nearest uses; by the word's most frequent class"
    return what, f"{100 * r['votes'][r['best']]:.1f} %; {100 * r['majority']:.1f} %", r["command"]


def bench_line(r: dict) -> tuple[str, str, str]:
    """Training speed, idle and beside a busy process, on the GPU that trained or on so many cores of the CPU."""
    machine = r["machine"]
    place = machine["device"]
    if machine.get("cpu", place) == place:                      # older files have no `cpu`; they were made on a CPU
        place = f"{machine['cores']} cores ({place})"
    what = f"targets per second of training on {place}; beside one busy process"
    return what, f"{r['tokens_per_second']:,.0f}; {r['busy_tokens_per_second']:,.0f}", r["command"]


LINES = [                               # (name of a JSON file or finding, function of its content)
    ("pretraining", partial(
        filled, "test perplexity, full softmax over {vocabulary:,} words, forward and backward; Kneser-Ney, forward",
        "{splits[test][forward][perplexity]:.1f}, {splits[test][backward][perplexity]:.1f}; "
        "{splits[test][forward][kneser_ney_perplexity]:.1f}")),
    ("classification", partial(accuracy_line, "test accuracy on AG News, the biLM frozen")),
    ("baselines", baseline_line),
    ("finetuned", partial(accuracy_line, "AG News, the biLM fine-tuned")),
    ("titled_finetuned", partial(accuracy_line, "AG News with titles, the biLM fine-tuned")),
    ("adapted_sst5", partial(accuracy_line, "SST, five classes, whole sentences")),
    ("adapted_sst2", partial(accuracy_line, "SST, two classes")),
    ("adapted_nli", partial(accuracy_line, "a subset of MultiNLI's evaluation rows")),
    ("labels", labels_line),
    ("senses", senses_line),
    ("bench", bench_line),
    ("faults", partial(
        filled, "runs killed at random moments, of them with a saved state; resumed to the same weights bit for bit",
        "{kills[tried]}, {kills[with_state]}; {kills[survived]}"))]


def results(folder: Path) -> str:
    """The README's table of results, from the JSON files in `folder`; each line ends with the command that made it."""
    lines = ["| what | measured | by |", "|---|---|---|"]
    for name, line in LINES:
        file = "findings" if name in FINDINGS else name
        with read_json(folder / f"{file}.json") as content:
            what, number, command = line(content.get(name, content))
        command = command.replace(" --overwrite", "")           # whoever copies it must not lose a published file
        lines.append(f"| {what} | {number} | `{command}` |")
    return "\n".join(lines)


def with_results(readme: str, folder: Path) -> str:
    """The README with a new table between its markers."""
    before, rest = readme.split("<!-- results -->\n")
    _, after = rest.split("\n<!-- end -->")
    return f"{before}<!-- results -->\n{results(folder)}\n<!-- end -->{after}"


def pdf(root: Path) -> bytes:
    """The compiled report. Raises InputError if the JSON files in ROOT/models are not of the same runs."""
    try:
        return typst.compile(root / "report" / "report.typ", root=root, ignore_system_fonts=True)
    except typst.TypstError as error:
        raise InputError(f"report.typ cannot be compiled: {one_line(error)}") from None


def executed(notebook: Path) -> str:
    """The notebook after running all its cells, without times. Raises InputError if it is damaged or a cell fails."""
    try:
        book = nbformat.read(notebook, as_version=4)
    except ValueError as error:
        raise InputError(f"{notebook} is not a notebook: {one_line(error)}; restore it") from None
    resources = {"metadata": {"path": str(notebook.parent)}}        # the folder in which the cells run
    client = NotebookClient(book, timeout=300, record_timing=False, coalesce_streams=True, resources=resources,
                            extra_arguments=["--log-level=ERROR"])
    try:
        client.execute()
    except CellExecutionError as error:
        raise InputError(f"a cell of explore.ipynb fails: {error.ename}: {error.evalue}") from None
    except (CellControlSignal, DeadKernelError) as error:
        raise InputError(f"a cell of explore.ipynb fails: {one_line(error)}") from None
    book.metadata["language_info"] = {"name": "python"}     # not Python's version, which differs between machines
    return nbformat.writes(book) + "\n"


@script("build.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 2 for a missing or wrong input (README, report, notebook stay as they are), 130 after Ctrl-C."""
    ag_news_folder()                # fails here rather than in a cell of the notebook
    models = ROOT / "models"
    report = ROOT / "report"
    check_numbers(models)
    draw_figures(models)
    readme = with_results(read_text(ROOT / "README.md"), models)
    compiled = pdf(ROOT)
    notebook = executed(report / "explore.ipynb")
    write_atomically(ROOT / "README.md", lambda file: file.write(readme.encode()))
    write_atomically(report / "report.pdf", lambda file: file.write(compiled))
    write_atomically(report / "explore.ipynb", lambda file: file.write(notebook.encode()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
