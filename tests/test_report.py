"""The report and the notebook: what they show is in models/*.json and the published files, and nothing is typed."""
import json
import re
import shutil
import zlib
from contextlib import suppress
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import ROOT

from data.files import InputError
from report import build, findings

REPORT = ROOT / "report"
TEXT = "-- text\n"                                      # the line of report.typ above which layout and helpers stand
PHRASES = r"section 5\.3|95[ ~]% (bootstrap|interval)|\"95 %\"|\b1e6\b|data\(\d+|(fp|bf)\d\d"
WORDS = "one|two|three|four|five|six|seven|eight|nine|ten"
UNITS = r"(%|percent|points?|seeds?|heads?|minutes|hours|rows|times|passes|words|systems|labels)"


def copy_of_the_source(monkeypatch, folder: Path) -> None:
    """Lets build.py compile a copy of the report in `folder`."""
    (folder / "report").mkdir()
    for name in ("report.typ", "references.bib"):
        shutil.copy(REPORT / name, folder / "report")
    monkeypatch.setattr(build, "HERE", folder / "report")


def unpacked(pdf: bytes) -> list[bytes]:
    """A PDF and each of its packed streams that can be unpacked."""
    parts = [pdf]
    for stream in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf, re.DOTALL):
        with suppress(zlib.error):
            parts.append(zlib.decompress(stream))
    return parts


def pages(pdf: bytes) -> int:
    return sum(len(re.findall(rb"/Type ?/Page\b(?!s)", part)) for part in unpacked(pdf))


def typed_numbers(source: str) -> list[str]:
    """What looks like a number typed into the text of a Typst source, in prose, code and equations alike.

    Decimals and numbers of several digits stand nowhere there; one digit, or its word, not before a unit.
    """
    text = re.sub(r"^ *//.*$", "", source[source.index(TEXT) + len(TEXT):], flags=re.MULTILINE)
    text = re.sub(rf"{PHRASES}|@\w+", "", text)
    numbers = rf"\d*\.\d+|\d[\d,]*\d|\b\d ?%|\b(\d|{WORDS})[ -]?{UNITS}\b|\"\d+\""
    return [found[0] for found in re.finditer(numbers, text)]


@pytest.mark.parametrize("typed", [
    " and 92.1 % of 7,600 rows", " gains $+0.95$ points", " with $p = 0.003$", " (92.1) %", "#fixed(92.08, 2) %",
    "#pct(0.9208) %", " `92.08` %", " a .93 share", " over three seeds", " by 4 points", " 17 heads", " nine heads",
    " two percent of", " 5 words", ' ("x", "2")'])
def test_a_number_typed_into_the_report_would_be_found(typed):
    source = "#let x = 12.5\n// -- text\nOn #whole(n) rows, figure 2, $h_(k,0) = 1 / 2$, #pct(a.b, digits: 1) %, 8-word"
    assert typed_numbers(source) == []
    assert typed_numbers(source + typed)


def test_no_number_of_the_report_is_typed_by_hand():
    assert typed_numbers((REPORT / "report.typ").read_text()) == []


def test_the_report_is_what_its_source_makes_of_the_committed_json():
    committed = (REPORT / "report.pdf").read_bytes()
    assert build.pdf() == committed
    assert 8 <= pages(committed) <= 14


def test_the_report_without_a_json_says_which_one_is_missing(monkeypatch, tmp_path, capsys, ag_news):
    copy_of_the_source(monkeypatch, tmp_path)
    assert build.main([]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pretraining.json is missing" in error and "python ELMO.py" in error
    assert not (tmp_path / "report" / "report.pdf").exists()


def test_the_report_refuses_numbers_of_another_bilm(monkeypatch, tmp_path):
    shutil.copytree(ROOT / "models", tmp_path / "models", ignore=shutil.ignore_patterns("*.pt"))
    copy_of_the_source(monkeypatch, tmp_path)
    assert build.pdf()
    content = json.loads((tmp_path / "models" / "sst5.json").read_text())
    (tmp_path / "models" / "sst5.json").write_text(json.dumps(content | {"bilm": "0" * 64}))
    with pytest.raises(InputError, match=r"sst5\.json is of another biLM"):
        build.pdf()


def test_the_report_refuses_findings_that_are_older_than_the_runs(monkeypatch, tmp_path):
    shutil.copytree(ROOT / "models", tmp_path / "models", ignore=shutil.ignore_patterns("*.pt"))
    copy_of_the_source(monkeypatch, tmp_path)
    for name, key in (("classification", "together"), ("finetuned", "together"), ("classification", "accuracy")):
        path = tmp_path / "models" / f"{name}.json"
        content = json.loads((ROOT / "models" / f"{name}.json").read_text())
        test = content["settings"]["trainable"]["test"]
        test[key] |= {"accuracy": 0.9} if key == "together" else {"mean": 0.9}
        path.write_text(json.dumps(content))
        older = "findings" if key == "together" else "baselines"
        with pytest.raises(InputError, match=rf"{older}\.json is older than the runs beside it; run"):
            build.pdf()
        shutil.copy(ROOT / "models" / f"{name}.json", path)
    assert build.pdf()


def test_the_report_asks_for_every_finding():
    assert set(findings.FINDINGS) == build.FINDINGS


@pytest.mark.parametrize("finding", sorted(build.FINDINGS))
def test_the_report_without_a_finding_says_which_one_is_missing(monkeypatch, tmp_path, finding):
    shutil.copytree(ROOT / "models", tmp_path / "models", ignore=shutil.ignore_patterns("*.pt", "*.png"))
    copy_of_the_source(monkeypatch, tmp_path)
    content = json.loads((tmp_path / "models" / "findings.json").read_text())
    del content[finding]
    (tmp_path / "models" / "findings.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"no finding `{finding}`"):
        build.pdf()


def test_a_cell_that_fails_is_one_sentence_and_changes_nothing(monkeypatch, tmp_path, capsys, ag_news):
    monkeypatch.setattr(build, "HERE", tmp_path)
    monkeypatch.setattr(build, "pdf", lambda: b"a report")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    nbformat.write(notebook, tmp_path / "explore.ipynb")
    before = (tmp_path / "explore.ipynb").read_bytes()
    assert build.main([]) == 2
    error = capsys.readouterr().err
    assert "ZeroDivisionError" in error and error.count("build.py:") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["explore.ipynb"]
    assert (tmp_path / "explore.ipynb").read_bytes() == before


def shown(book: nbformat.NotebookNode) -> list[list]:
    """Of every cell: words and whole numbers that its outputs show as text, and which other kinds it shows."""
    def output(o) -> list:
        text = o.get("text") or o.get("data", {}).get("text/plain", "")
        return [o.output_type, sorted(o.get("data", {})), re.findall(r"[A-Za-z_/]{3,}|(?<![\d.])\d+(?![\d.])", text)]
    return [[output(o) for o in cell.get("outputs", [])] for cell in book.cells]


def test_the_notebook_runs_on_the_published_files_and_shows_what_it_shows_now(ag_news):
    committed = nbformat.read(REPORT / "explore.ipynb", as_version=4)
    found, now = shown(committed), shown(build.executed())
    assert sum(bool(outputs) for outputs in found) >= 8 and "image/png" in str(found)
    exact = [i for i, cell in enumerate(committed.cells) if "bf16" not in cell.source]      # whose ranks may round
    assert [found[i] for i in exact] == [now[i] for i in exact]
    assert [[o[:2] for o in outputs] for outputs in found] == [[o[:2] for o in outputs] for outputs in now]
    for name in ("bilstm", "classifier"):
        digest = torch.load(ROOT / "models" / f"{name}.pt", weights_only=True)["digest"][:12]
        assert digest in str(committed.cells), name


def test_what_is_committed_names_no_folder_of_a_machine():
    pdf = (REPORT / "report.pdf").read_bytes()
    for part in [(REPORT / "explore.ipynb").read_bytes(), *unpacked(pdf)]:
        assert not re.search(rb"/(home|root|work|tmp|Users)/", part)
