"""Figures, README, report and notebook show the numbers in models/*.json; the requirements name every package."""
import ast
import json
import re
import shutil
import sys
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
TEXT = "-- text\n"                                      # report.typ: layout and helpers stand above this line
PHRASES = r"section 5\.3|95[ ~]% (bootstrap|interval)|\"95 %\"|\b1e6\b|data\(\d+|(fp|bf)\d\d"
WORDS = "one|two|three|four|five|six|seven|eight|nine|ten"
UNITS = r"(%|percent|points?|seeds?|heads?|minutes|hours|rows|times|passes|words|systems|labels)"


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of the README, the JSON files and figures in models/, and the sources of report and notebook."""
    left_out = shutil.ignore_patterns("*.pt", "*.pdf", "*.py", "__pycache__")
    for folder in ("models", "report"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=left_out)
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def change(project: Path, name: str, *keys: str, value) -> None:
    """Sets content[keys[0]][keys[1]].. of a JSON file in models/."""
    path = project / "models" / f"{name}.json"
    content = json.loads(path.read_text())
    reduce(getitem, keys[:-1], content)[keys[-1]] = value
    path.write_text(json.dumps(content))


# -------------------------------------------------------------------------------------------------------- figures
def written(monkeypatch, draw, *arguments) -> dict[str, list[str]]:
    """{file: all texts in its figure} for every figure that draw(*arguments) would write."""
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
    """What figures read of the JSON file of a classification with two seeds."""
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


def test_a_json_without_confusion_matrices_gets_curves_only(monkeypatch, tmp_path):
    found = written(monkeypatch, figures.classification, two_classes(None), tmp_path, "titled")
    assert list(found) == ["figures/curves_titled.png"]
    texts = found["figures/curves_titled.png"]
    assert any("ends at 60.0 % with frozen (n = 10 rows, 2 seeds" in text for text in texts)


def test_the_confusion_matrix_of_words_shows_percent_and_leaves_small_shares_blank(monkeypatch, tmp_path):
    confusion = {"words": ["the", "a", "(other)"], "counts": [[96, 4, 0], [30, 60, 10], [0, 0, 100]]}
    result = {"history": [], "confusion": confusion}
    texts = written(monkeypatch, figures.pretraining, result, tmp_path)["figures/confusion_words.png"]
    assert {"96", "30", "60", "10", "100"} <= set(texts) and "4" not in texts
    assert any("right on 78% of the 200 occurrences of the 2 most frequent" in text for text in texts)     # 156 / 200


def test_curves_of_several_runs_use_the_seeds_of_all_runs():
    values = figures.validation_values([HISTORY, HISTORY], "frozen", "accuracy")
    assert np.array_equal(values, [[0.5, 0.7, 0.5, 0.7]] * 2)


def test_few_labels_are_drawn_at_their_shares():
    points = [{"test": [accuracy, accuracy]} for accuracy in (0.5, 0.6, 0.7)]
    axes, = few_labels({"shares": [1.0, 3.0, 100.0], "rows": [1, 3, 100], "measured": 7, "chosen_on": 5,
                        "systems": {"elmo": points, "word2vec": points}}).axes
    assert np.allclose(axes.lines[0].get_xydata(), [[1, 50], [3, 60], [100, 70]])
    assert "ELMo is right on 50.0 %, Word2Vec with 3 % on 60.0 %" in axes.get_title()


def test_negative_cosines_have_colours_of_their_own_on_one_scale_for_all_layers():
    layers = np.ones((3, 3, 3))
    layers[2, 0, 1] = layers[2, 1, 0] = -0.5
    layers[1, 0, 2] = layers[1, 2, 0] = -0.25
    drawn = similarity({"tokens": ["bank", "of", "bank"], "layers": layers.tolist()})
    panels = [axes.images[0] for axes in drawn.axes if axes.images]
    assert len(panels) == 3
    for image in panels:
        assert image.get_clim() == (-0.5, 1)
        assert len({image.to_rgba(cosine) for cosine in (-0.5, -0.25, 0.0, 0.5, 1.0)}) == 5
    bar = drawn.axes[-1]
    assert bar.get_ylim() == (-0.5, 1)
    assert bar.get_ylabel() == "cosine similarity, -0.50 to 1"


@pytest.mark.figures
def test_the_committed_figures_show_the_committed_json(project):
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
def test_the_results_in_the_readme_are_those_in_the_json_files():
    readme = (ROOT / "README.md").read_text()
    assert build.with_results(readme, ROOT / "models") == readme
    assert readme.count("<!-- ") == 2                   # one table


@pytest.mark.parametrize("name, keys, value, shown", [
    ("pretraining", ("splits", "test", "backward", "perplexity"), 33.349, ", 33.3;"),
    ("finetuned", ("settings", "trainable", "test", "accuracy"), {"mean": 0.12345, "std": 0.5}, "12.35 ± 50.00 %"),
    ("adapted_sst2", ("settings", "function", "test", "accuracy"), {"mean": 0.2, "std": None}, "| 20.00 % |"),
    ("findings", ("senses", "votes"), [0.1, 0.2, 0.333], "33.3 %"),
    ("faults", ("kills", "survived"), 98, "; 98 |")])
def test_a_changed_json_changes_the_results(project, name, keys, value, shown):
    assert shown not in build.results(project / "models")
    change(project, name, *keys, value=value)
    assert shown in build.results(project / "models")


def test_the_setting_in_the_results_is_the_best_on_validation_rows(project):
    for part, setting, mean in (("validation", "frozen", 0.9), ("validation", "function", 0.1),
                                ("test", "frozen", 0.3), ("test", "function", 0.8)):
        change(project, "adapted_nli", "settings", setting, part, "accuracy", value={"mean": mean, "std": None})
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
    """Everything that looks like a typed number in the text of a Typst source: prose, code and equations.

    These are decimals, numbers of several digits, and one digit or its word before a unit.
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


def test_the_committed_report_is_compiled_from_its_source_and_the_committed_json():
    committed = (REPORT / "report.pdf").read_bytes()
    assert build.pdf(ROOT) == committed
    assert 8 <= len(re.findall(rb"/Type ?/Page\b(?!s)", b"\n".join(unpacked(committed)))) <= 14     # pages


@pytest.mark.parametrize("name", sorted(build.MADE_BY))
def test_a_missing_json_is_named_with_the_command_that_makes_it(project, name):
    (project / "models" / f"{name}.json").unlink()
    with pytest.raises(InputError, match=rf"{name}\.json is missing; `{re.escape(build.MADE_BY[name])}`"):
        build.check_numbers(project / "models")


@pytest.mark.parametrize("name", sorted(build.FINDINGS))
def test_a_missing_finding_is_named(project, name):
    findings = json.loads((project / "models" / "findings.json").read_text())
    assert set(FINDINGS) <= build.FINDINGS <= set(findings)
    del findings[name]
    (project / "models" / "findings.json").write_text(json.dumps(findings))
    with pytest.raises(InputError, match=f"no finding `{name}`"):
        build.check_numbers(project / "models")


def test_the_report_refuses_numbers_of_a_bilm_that_it_does_not_know(project):
    change(project, "adapted_sst5", "bilm", value="0" * 64)
    with pytest.raises(InputError, match=r"adapted_sst5\.json was made with another biLM"):
        build.pdf(project)


def put_in_step(project: Path) -> None:
    """Changes baselines.json and findings.json as if they had been measured after classification.json."""
    runs = json.loads((project / "models" / "classification.json").read_text())
    pairs = json.loads((project / "models" / "findings.json").read_text())["settings"]["pairs"]
    test = {name: numbers["test"] for name, numbers in runs["settings"].items()}
    for name in ("baselines", "findings"):
        change(project, name, "bilm", value=runs["bilm"])
    for name, numbers in test.items():
        change(project, "baselines", "rows", name, "test", "mean", value=numbers["accuracy"]["mean"])
    for pair in pairs:
        one, other = (test[pair[key]]["ensemble"]["accuracy"] for key in ("one", "other"))
        pair["difference"] = one - other
    change(project, "findings", "settings", "pairs", value=pairs)
    seeds = [seed["accuracy"] for seed in test["trainable"]["seeds"]]
    change(project, "findings", "labels", "systems", "elmo", -1, "test", value=seeds)


@pytest.mark.parametrize("name, keys", [("findings", ["ensemble", "accuracy"]), ("baselines", ["accuracy", "mean"])])
def test_the_report_refuses_numbers_that_are_older_than_the_runs(project, name, keys):
    put_in_step(project)
    build.pdf(project)
    change(project, "classification", "settings", "trainable", "test", *keys, value=0.9)
    with pytest.raises(InputError, match=rf"{name}\.json is older than the runs beside it; run"):
        build.pdf(project)


# ------------------------------------------------------------------------------------------------------- notebook
def texts(project: Path) -> dict[Path, bytes]:
    """README, report and notebook, which `build` writes only after all are made, and their sources."""
    return {path: path.read_bytes() for path in [project / "README.md", *(project / "report").iterdir()]}


def test_a_failing_cell_gives_one_sentence_and_changes_no_file(monkeypatch, project, capsys, ag_news):
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
    """For every output of every cell: its type, its formats, and the words and whole numbers in its text."""
    def output(o) -> list:
        text = o.get("text") or o.get("data", {}).get("text/plain", "")
        return [o.output_type, sorted(o.get("data", {})), re.findall(r"[A-Za-z_/]{3,}|(?<![\d.])\d+(?![\d.])", text)]
    return [[output(o) for o in cell.get("outputs", [])] for cell in book.cells]


def test_the_notebook_run_again_on_the_published_files_shows_the_committed_outputs(ag_news):
    committed = nbformat.read(REPORT / "explore.ipynb", as_version=4)
    executed = nbformat.reads(build.executed(REPORT / "explore.ipynb"), as_version=4)
    before = shown(committed)
    after = shown(executed)
    assert sum(bool(outputs) for outputs in before) >= 8 and "image/png" in str(before)
    exact = [i for i, cell in enumerate(committed.cells) if "bf16" not in cell.source]      # bf16 may change the order
    assert [before[i] for i in exact] == [after[i] for i in exact]
    assert [[o[:2] for o in outputs] for outputs in before] == [[o[:2] for o in outputs] for outputs in after]
    for name in ("bilstm", "classifier"):
        digest = torch.load(ROOT / "models" / f"{name}.pt", weights_only=True)["digest"][:12]
        assert digest in str(committed.cells), name


def test_the_committed_notebook_and_report_name_no_folder_of_a_machine():
    for part in [(REPORT / "explore.ipynb").read_bytes(), *unpacked((REPORT / "report.pdf").read_bytes())]:
        assert not re.search(rb"/(home|root|work|tmp|Users)/", part)


# --------------------------------------------------------------------------------------------------- requirements
OWN = {"ELMO", "classification", "conftest", "data", "report", "run", "far_device"}
OPTIONAL = {"wandb"}                                    # only for --track wandb, which names the package to install
NOT_IMPORTED = {"ipykernel", "ruff", "tensorboard"}     # the notebook, make lint and torch.utils.tensorboard use them


def imported(*folders: str) -> set[str]:
    """The packages that the .py files of these folders import, as pip names them, without Python's and our own."""
    found = set()
    for folder in folders:
        for path in (ROOT / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    found.add(node.module.split(".")[0])
    packages = found - set(sys.stdlib_module_names) - OWN - OPTIONAL
    return {"scikit-learn" if package == "sklearn" else package for package in packages}


def required(file: str) -> set[str]:
    """The packages in a requirements file, in small letters. Each line must pin one version."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("-r ")]
    for line in lines:
        assert re.fullmatch(r"[\w-]+==[\w.]+", line), f"{file}: {line}"
    return {line.split("==")[0].lower() for line in lines}


def test_the_requirements_are_the_packages_that_the_scripts_import():
    assert imported(".", "data", "run") == required("requirements.txt")


def test_the_further_requirements_are_three_tools_and_the_packages_that_report_and_tests_import():
    further = imported("report", "tests") - required("requirements.txt")
    assert required("requirements-dev.txt") == further | NOT_IMPORTED
