"""Figures, README results, report and notebook show the numbers in models/*.json, and none is typed by hand."""
import json
import re
import shutil
import zlib
from contextlib import suppress
from functools import reduce
from operator import getitem
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib.image import imread
from matplotlib.text import Text

from report import build
from report.figures import FINDINGS, few_labels, similarity
from run import figures
from run.files import InputError

REPORT = ROOT / "report"
TEXT = "-- text\n"                                      # the line of report.typ above which layout and helpers stand
PHRASES = r"section 5\.3|95[ ~]% (bootstrap|interval)|\"95 %\"|\b1e6\b|data\(\d+|(fp|bf)\d\d"
WORDS = "one|two|three|four|five|six|seven|eight|nine|ten"
UNITS = r"(%|percent|points?|seeds?|heads?|minutes|hours|rows|times|passes|words|systems|labels)"


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of the README, the models' JSON files with their figures, and the sources of report and notebook."""
    left_out = shutil.ignore_patterns("*.pt", "*.pdf", "*.py", "__pycache__")
    for folder in ("models", "report"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=left_out)
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def change(project: Path, name: str, *keys: str, value) -> None:
    """Sets content[key][key].. of a JSON file."""
    path = project / "models" / f"{name}.json"
    content = json.loads(path.read_text())
    reduce(getitem, keys[:-1], content)[keys[-1]] = value
    path.write_text(json.dumps(content))


# -------------------------------------------------------------------------------------------------------- figures
def written(monkeypatch, draw, *arguments) -> dict[str, list[str]]:
    """{file: all texts in its figure} of the pictures that draw(*arguments) would write."""
    found = {}
    def remember(figure, path):
        found[f"{path.parent.name}/{path.name}"] = [text.get_text() for text in figure.findobj(Text)]
    monkeypatch.setattr(figures, "save", remember)
    draw(*arguments)
    return found


# Two evaluations of two seeds.
HISTORY = [{"epoch": epoch, "train_loss": 0.5, "validation": {"frozen": {"accuracy": [0.5, 0.7], "loss": [0.9, 0.8]}}}
           for epoch in (0.5, 1.0)]


def two_classes(confusion: list | None) -> dict:
    """Numbers of a classification with two seeds, as far as figures read them."""
    ensemble = {"rows": 10, "accuracy": 0.7} | ({} if confusion is None else {"confusion": confusion})
    part = {"ensemble": ensemble, "seeds": [{}, {}]}
    return {"task": "ag_news", "labels": ["cat", "dog"], "config": {"phrases": True}, "history": [HISTORY],
            "settings": {"frozen": {"train": part, "validation": part, "test": part}}}


def test_a_confusion_matrix_shows_counts_and_percent_of_each_gold_class(monkeypatch, tmp_path):
    found = written(monkeypatch, figures.classification, two_classes([[3, 2], [1, 4]]), tmp_path, "")
    assert set(found) == {"figures/confusion_frozen_train.png", "figures/confusion_frozen_test.png",
                          "figures/curves_classification.png"}
    texts = found["figures/confusion_frozen_test.png"]
    for cell in ("3\n60.0 %", "2\n40.0 %", "1\n20.0 %", "4\n80.0 %", "gold class", "predicted class"):
        assert cell in texts
    title, = [text for text in texts if "test rows" in text]
    assert "70.00% right, mean probabilities of 2 seeds" in title and "(n = 10)" in title
    assert "cat is taken for dog" in title


def test_numbers_without_a_confusion_matrix_get_curves_only(monkeypatch, tmp_path):
    found = written(monkeypatch, figures.classification, two_classes(None), tmp_path, "titled")
    assert list(found) == ["figures/curves_titled.png"]
    texts = found["figures/curves_titled.png"]
    assert any("ends at 60.0 % with frozen (n = 10 rows, 2 seeds" in text for text in texts)


def test_words_are_confused_by_percent_and_small_shares_are_blank(monkeypatch, tmp_path):
    confusion = {"words": ["the", "a", "(other)"], "counts": [[96, 4, 0], [30, 60, 10], [0, 0, 100]]}
    result = {"history": [], "confusion": confusion}
    texts = written(monkeypatch, figures.pretraining, result, tmp_path)["figures/confusion_words.png"]
    assert {"96", "30", "60", "10", "100"} <= set(texts) and "4" not in texts
    assert any("right on 78% of the 200 occurrences of the 2 most frequent" in text for text in texts)     # 156 / 200


def test_curves_of_several_runs_have_the_seeds_of_all_runs():
    values = figures.validation_values([HISTORY, HISTORY], "frozen", "accuracy")
    assert np.array_equal(values, [[0.5, 0.7, 0.5, 0.7]] * 2)


def test_few_labels_are_drawn_at_their_shares():
    points = [{"test": [accuracy, accuracy]} for accuracy in (0.5, 0.6, 0.7)]
    axes, = few_labels({"shares": [1.0, 3.0, 100.0], "rows": [1, 3, 100], "measured": 7, "chosen_on": 5,
                        "systems": {"elmo": points, "word2vec": points}}).axes
    assert np.allclose(axes.lines[0].get_xydata(), [[1, 50], [3, 60], [100, 70]])
    assert "ELMo is right on 50.0 %, Word2Vec with 3 % on 60.0 %" in axes.get_title()


def test_every_cosine_has_a_colour_of_its_own_and_the_colour_bar_shows_the_negative_ones():
    cosines = [[1, -0.08, -1], [-0.08, 1, 0], [-1, 0, 1]]
    figure = similarity({"tokens": ["a", "b", "b"], "layers": [cosines] * 3})
    panel, *_, bar = figure.axes
    image, = panel.images
    colours = {cosine: tuple(image.to_rgba(cosine)) for cosine in (-1, -0.5, -0.08, 0, 0.08, 0.5, 1)}
    assert len(set(colours.values())) == len(colours)
    for cosine, (red, _, blue, _) in colours.items():
        assert np.sign(round(red - blue, 1)) == np.sign(round(cosine, 1))               # red above 0, blue below
    assert bar.get_ylim() == (-1, 1)
    assert "blue: below 0" in bar.get_ylabel()


def test_the_committed_figures_are_those_of_the_committed_json(project):
    folder = project / "models" / "figures"
    shutil.rmtree(folder)
    build.draw_figures(project / "models")
    committed = ROOT / "models" / "figures"
    assert {path.name for path in folder.iterdir()} == {path.name for path in committed.iterdir()}
    for name in ("confusion_frozen_test.png", "curves_finetuned.png", "finding_labels.png"):
        drawn = imread(folder / name)
        before = imread(committed / name)
        assert drawn.shape == before.shape, name
        assert np.abs(drawn - before).mean() < 0.001, name              # 0 black, 1 white


# --------------------------------------------------------------------------------------------------------- README
def test_the_results_of_the_readme_are_those_of_the_json():
    readme = (ROOT / "README.md").read_text()
    assert build.with_results(readme, ROOT / "models") == readme
    assert readme.count("<!-- ") == 2                   # one table


@pytest.mark.parametrize("name, keys, value, shown", [
    ("pretraining", ("splits", "test", "backward", "perplexity"), 33.349, ", 33.3;"),
    ("classification", ("settings", "frozen", "test", "accuracy"), {"mean": 0.12345, "std": 0.5}, "12.35 ± 50.00 %"),
    ("sst2", ("settings", "function", "test", "accuracy"), {"mean": 0.2, "std": None}, "| 20.00 % |"),
    ("findings", ("senses", "votes"), [0.1, 0.2, 0.333], "33.3 %"),
    ("faults", ("kills", "survived"), 98, "; 98 |")])
def test_the_results_follow_the_json(project, name, keys, value, shown):
    assert shown not in build.results(project / "models")
    change(project, name, *keys, value=value)
    assert shown in build.results(project / "models")


def test_the_setting_in_the_results_is_the_best_on_validation_rows(project):
    for part, setting, mean in (("validation", "frozen", 0.9), ("validation", "function", 0.1),
                                ("test", "frozen", 0.3), ("test", "function", 0.8)):
        change(project, "nli", "settings", setting, part, "accuracy", value={"mean": mean, "std": None})
    assert "(setting `frozen`) | 30.00 %" in build.results(project / "models")


@pytest.mark.parametrize("machine, place", [
    ({"device": "AMD EPYC", "cores": 2}, "on 2 cores (AMD EPYC);"),
    ({"device": "AMD EPYC", "cpu": "AMD EPYC", "cores": 2}, "on 2 cores (AMD EPYC);"),
    ({"device": "NVIDIA H100", "cpu": "AMD EPYC", "cores": 16}, "on NVIDIA H100;")])
def test_the_speed_in_the_results_is_that_of_the_device_that_trained(machine, place):
    numbers = {"machine": machine, "tokens_per_second": 1000, "busy_tokens_per_second": 500, "command": "bench"}
    what, number, _ = build.bench_line(numbers)
    assert place in what
    assert number == "1,000; 500"


# --------------------------------------------------------------------------------------------------------- report
def unpacked(pdf: bytes) -> list[bytes]:
    """A PDF and each of its packed streams that can be unpacked."""
    parts = [pdf]
    for stream in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf, re.DOTALL):
        with suppress(zlib.error):
            parts.append(zlib.decompress(stream))
    return parts


def typed_numbers(source: str) -> list[str]:
    """The numbers typed into the text of a Typst source, in prose, code and equations alike.

    Decimals and numbers of several digits count everywhere; one digit, or its word, counts before a unit.
    """
    text = re.sub(r"^ *//.*$", "", source[source.index(TEXT) + len(TEXT):], flags=re.MULTILINE)
    text = re.sub(rf"{PHRASES}|@\w+", "", text)
    pattern = rf"\d*\.\d+|\d[\d,]*\d|\b\d ?%|\b(\d|{WORDS})[ -]?{UNITS}\b|\"\d+\""
    return [found[0] for found in re.finditer(pattern, text)]


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
    assert build.pdf(ROOT) == committed
    assert 8 <= len(re.findall(rb"/Type ?/Page\b(?!s)", b"\n".join(unpacked(committed)))) <= 14     # pages


@pytest.mark.parametrize("name", sorted(build.MADE_BY))
def test_the_report_without_a_json_says_which_one_is_missing(project, name):
    (project / "models" / f"{name}.json").unlink()
    with pytest.raises(InputError, match=rf"{name}\.json is missing; `{re.escape(build.MADE_BY[name])}`"):
        build.check_numbers(project / "models")


@pytest.mark.parametrize("name", sorted(build.FINDINGS))
def test_the_report_without_a_finding_says_which_one_is_missing(project, name):
    findings = json.loads((project / "models" / "findings.json").read_text())
    assert set(FINDINGS) <= build.FINDINGS <= set(findings)
    del findings[name]
    (project / "models" / "findings.json").write_text(json.dumps(findings))
    with pytest.raises(InputError, match=f"no finding `{name}`"):
        build.check_numbers(project / "models")


@pytest.mark.parametrize("name, keys, value, message", [
    ("sst5", ["bilm"], "0" * 64, "sst5.json is of another biLM"),
    ("classification", ["settings", "trainable", "test", "ensemble", "accuracy"], 0.9,
     "findings.json is older than the runs beside it; run"),
    ("classification", ["settings", "trainable", "test", "accuracy", "mean"], 0.9,
     "baselines.json is older than the runs beside it; run")])
def test_the_report_refuses_numbers_of_another_bilm_or_older_than_the_runs(project, name, keys, value, message):
    change(project, name, *keys, value=value)
    with pytest.raises(InputError, match=re.escape(message)):
        build.pdf(project)


# ------------------------------------------------------------------------------------------------------- notebook
def texts(project: Path) -> dict[Path, bytes]:
    """The content of the files that `build` writes only after it could make all of them, and of their sources."""
    return {path: path.read_bytes() for path in [project / "README.md", *(project / "report").iterdir()]}


def test_a_cell_that_fails_is_one_sentence_and_changes_no_text(monkeypatch, project, capsys, ag_news):
    monkeypatch.setattr(build, "ROOT", project)
    monkeypatch.setattr(build, "draw_figures", lambda folder: None)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    nbformat.write(notebook, project / "report" / "explore.ipynb")
    (project / "README.md").write_text("<!-- results -->\nold\n<!-- end -->\n")
    before = texts(project)
    assert build.main([]) == 2
    error = capsys.readouterr().err
    assert "ZeroDivisionError" in error and error.count("build.py:") == 1
    assert texts(project) == before


def shown(book: nbformat.NotebookNode) -> list[list]:
    """For every cell: the words and whole numbers that its outputs show as text, and the other kinds that it shows."""
    def output(o) -> list:
        text = o.get("text") or o.get("data", {}).get("text/plain", "")
        return [o.output_type, sorted(o.get("data", {})), re.findall(r"[A-Za-z_/]{3,}|(?<![\d.])\d+(?![\d.])", text)]
    return [[output(o) for o in cell.get("outputs", [])] for cell in book.cells]


def test_the_notebook_runs_on_the_published_files_and_shows_what_it_shows_now(ag_news):
    committed = nbformat.read(REPORT / "explore.ipynb", as_version=4)
    executed = nbformat.reads(build.executed(REPORT / "explore.ipynb"), as_version=4)
    before = shown(committed)
    after = shown(executed)
    assert sum(bool(outputs) for outputs in before) >= 8 and "image/png" in str(before)
    exact = [i for i, cell in enumerate(committed.cells) if "bf16" not in cell.source]      # bf16 may change a rank
    assert [before[i] for i in exact] == [after[i] for i in exact]
    assert [[o[:2] for o in outputs] for outputs in before] == [[o[:2] for o in outputs] for outputs in after]
    for name in ("bilstm", "classifier"):
        digest = torch.load(ROOT / "models" / f"{name}.pt", weights_only=True)["digest"][:12]
        assert digest in str(committed.cells), name


def test_what_is_committed_names_no_folder_of_a_machine():
    for part in [(REPORT / "explore.ipynb").read_bytes(), *unpacked((REPORT / "report.pdf").read_bytes())]:
        assert not re.search(rb"/(home|root|work|tmp|Users)/", part)
