"""The report and the notebook: what they show is in models/*.json and the published files, and nothing is typed."""
import json
import re
import zlib
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

from report import build

REPORT = ROOT / "report"
TEXT = "-- text\n"                                      # the line of report.typ above which layout and helpers stand
ALLOWED = {"0", "1", "2", "3", "4", "5", "5.3", "8", "95"}    # layers; sections and tables of the paper; 8-grams; 95 %


def published(name: str) -> Path:
    """A file of models/ or report/; the test is skipped where it is not there."""
    path = ROOT / name
    if not path.exists():
        pytest.skip(f"{name} is not there: `make train`, `make findings` and `make report` write it")
    return path


def pages(pdf: bytes) -> int:
    """Pages of a PDF, whose objects may be packed."""
    packed = re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf, re.DOTALL)
    unpacked = [pdf]
    for part in packed:
        try:
            unpacked.append(zlib.decompress(part))
        except zlib.error:
            continue
    return sum(len(re.findall(rb"/Type ?/Page\b(?!s)", part)) for part in unpacked)


def typed_numbers(source: str) -> list[str]:
    """Numbers of the text part of a Typst source that a reader would see, without code, equations and literals."""
    text = source[source.index(TEXT) + len(TEXT):]
    text = re.sub(r"\$[^$]*\$|`.*?`|//.*|@\w+", "", text)
    shown = re.sub(r"\bdigits: \d|, \d\)|\b\w+\(\d+", "", text)
    return [number for number in re.findall(r"(?<![\w.])\d[\d.,]*", shown) if number.rstrip(".,") not in ALLOWED]


def test_a_number_typed_into_the_report_would_be_found():
    source = "#let x = 12.5\n// -- text\nOn #whole(n) rows, figure 2, $h_17$, #pct(a.b, digits: 1) %"
    assert typed_numbers(source) == []
    assert typed_numbers(source + " and 92.1 % of 7,600 rows") == ["92.1", "7,600"]


def test_no_number_of_the_report_is_typed_by_hand():
    assert typed_numbers((REPORT / "report.typ").read_text()) == []


def test_the_report_is_what_its_source_makes_of_the_committed_json():
    committed = published("report/report.pdf").read_bytes()
    assert build.pdf() == committed
    assert 8 <= pages(committed) <= 14


def test_the_report_without_a_json_says_which_one_is_missing(monkeypatch, tmp_path, capsys):
    (tmp_path / "report").mkdir()
    for name in ("report.typ", "references.bib"):
        (tmp_path / "report" / name).write_bytes((REPORT / name).read_bytes())
    monkeypatch.setattr(build, "HERE", tmp_path / "report")
    assert build.main([]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pretraining.json" in error and "make train" in error
    assert not (tmp_path / "report" / "report.pdf").exists()


def test_the_notebook_runs_on_the_published_files_and_shows_what_it_shows_now(ag_news):
    committed = nbformat.read(published("report/explore.ipynb"), as_version=4)
    now = build.executed()
    digest = json.loads((ROOT / "models" / "pretraining.json").read_text())["digest"]
    assert digest[:12] in str(committed.cells) and digest[:12] in str(now.cells)
    kinds = [[[output.output_type for output in cell.get("outputs", [])] for cell in book.cells]
             for book in (committed, now)]
    assert kinds[0] == kinds[1] and sum(bool(outputs) for outputs in kinds[0]) >= 8
    assert "image/png" in str(committed.cells)


def test_what_is_committed_names_no_folder_of_a_machine():
    for name in ("report/explore.ipynb", "report/report.pdf"):
        assert not re.search(rb"/(home|root|work|tmp|Users)/", published(name).read_bytes()), name
