"""Own labelled texts: their files, columns, labels and validation rows, and figures of many classes."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.text import Text

from classification import Config
from data.labels import class_names, labelled_task
from data.tables import own_task
from data.tasks import leave_each_class, nli_task, read_pairs, read_task, with_title
from ELMO import Config as BiLMConfig
from run import figures
from run.files import InputError
from run.metrics import classification_metrics, classification_numbers

SINGLE = "text,label\nMy card was charged twice,billing\nWhere is my money?,refund\n"     # one row of each class
CSV = SINGLE + "Charged again,billing\nStill no money,refund\n"


def write(folder: Path, **contents: str) -> Path:
    """Writes train.csv for train_csv=content, and so on."""
    for name, content in contents.items():
        (folder / name.replace("_", ".")).write_text(content)
    return folder


def write_thrice(folder: Path, suffix: str, content: str) -> Path:
    """Writes the same rows for training, validation and test."""
    return write(folder, **{f"{part}_{suffix}": content for part in ("train", "validation", "test")})


def read(folder: Path, text: tuple = (), label: str | None = None, pair=False, validation=None, tokenized=False):
    """own_task of a folder with seed 0."""
    return own_task(folder, text, label, pair, validation, 0, tokenized)


def rows_of(part, labels) -> list[tuple]:
    """(texts, name of the class) of each row."""
    return [(texts, labels[c]) for texts, c in zip(part.texts, part.labels, strict=True)]


# --------------------------------------------------------------------------------------------- files and columns
@pytest.mark.parametrize("suffix, content, note", [
    ("csv", "text,label\nOil rises,eco\nGoal!,sport\n", "text: column text; label: column label"),
    ("csv", " Label ,TEXT\neco,Oil rises\nsport, Goal! \n", "text: column TEXT; label: column Label"),
    ("csv", "review,label\nOil rises,eco\nGoal!,sport\n", "text: column review; label: column label"),
    ("csv", "description,topic\nOil rises,eco\nGoal!,sport\n", "text: column description; label: column topic"),
    ("csv", "0,text\neco,Oil rises\nsport,Goal!\n", "text: column text; label: column 0"),
    ("csv", ",id,class,text\n0,a,eco,Oil rises\n1,b,sport,Goal!\n", "text: column text; label: column class"),
    ("csv", ",class,review\n0,eco,Oil rises\n1,sport,Goal!\n", "text: column review; label: column class"),
    ("tsv", "label\ttext\neco\tOil rises\nsport\tGoal!\n", "text: column text; label: column label"),
    ("jsonl", '{"text": "Oil rises", "label": "eco", "id": 3}\n\n{"label": "sport", "text": "Goal!"}\n',
     "text: column text; label: column label")])
def test_columns_are_found_by_their_usual_names_or_because_only_one_is_left(tmp_path, suffix, content, note):
    task = read(write_thrice(tmp_path, suffix, content))
    assert task.name == "own"
    assert task.labels == ["eco", "sport"]
    assert rows_of(task.test, task.labels) == [(("Oil rises",), "eco"), (("Goal!",), "sport")]
    assert task.notes == [f"{note}; 2 classes: eco, sport"]


@pytest.mark.parametrize("header", ["", "Class Index,Title,Description\n"])
def test_the_layouts_of_ag_news_are_read_as_class_title_and_description(tmp_path, header):
    folder = write_thrice(tmp_path, "csv", header + '"3","Markets","Oil rises"\n"10","Cup, final","Goal!"\n')
    task = read(folder)
    assert task.labels == ["3", "10"]
    assert task.test.texts == [("Oil rises",), ("Goal!",)]
    assert task.test.labels.tolist() == [0, 1]
    titled = read(folder, ("title", "description"))
    assert titled.test.texts == [("Markets . Oil rises",), ("Cup, final . Goal!",)]


def test_the_files_of_a_folder_can_have_different_forms_and_other_columns(tmp_path):
    task = read(write(tmp_path, train_csv=CSV, test_tsv="id\tLabel\tText\n7\trefund\tMy money, please\n",
                      validation_jsonl='{"text": "Charged", "label": "billing"}'))
    assert len(task.train) == 4
    assert rows_of(task.validation, task.labels) == [(("Charged",), "billing")]
    assert rows_of(task.test, task.labels) == [(("My money, please",), "refund")]


@pytest.mark.parametrize("content, texts", [
    ('label\ttext\na\t"one\ttwo"\nb\t"say ""no"""\n', ["one\ttwo", 'say "no"']),
    ('label\ttext\na\t"one two"\nb\tthree\n', ["one two", "three"]),
    ('label\ttext\na\t"one" two\nb\tthree\n', ['"one" two', "three"]),                      # not a CSV: a csv.Error
    ('label\ttext\na\t"one two\nb\tthree"\n', ['"one two', 'three"']),                      # a CSV with one merged row
    ('label\ttext\na\t"one\ntwo"\nb\tthree\n', ["one\ntwo", "three"])])
def test_quotes_between_tabs_are_those_of_csv_only_if_the_lines_fit(tmp_path, content, texts):
    task = read(write_thrice(tmp_path, "tsv", content))
    assert task.test.texts == [(text,) for text in texts]


def test_rows_like_those_of_hugging_face_get_a_note(tmp_path):
    task = read(write_thrice(tmp_path, "csv", "text,label\na,2\nb,0\nc,3\nd,1\n"))
    assert task.labels == ["0", "1", "2", "3"]
    assert task.summary().splitlines() == [
        "own: 4 training, 4 validation, 4 test rows",
        "text: column text; label: column label; 4 classes: 0, 1, 2, 3",
        "if this is AG News of Hugging Face: its text column is title and description in one"]
    other = read(write_thrice(tmp_path, "csv", "text,label\na,1\nb,2\nc,3\nd,4\n"))
    assert len(other.notes) == 1


def test_a_long_list_of_classes_is_cut_in_the_note(tmp_path):
    rows = "".join(f"text,a class with the number {c:04}\n" for c in range(50)) * 2
    task = read(write_thrice(tmp_path, "csv", "text,label\n" + rows))
    assert len(task.labels) == 50
    assert "50 classes: a class with the number 0000, a class" in task.notes[0]
    assert task.notes[0].endswith(" ..")
    assert len(task.notes[0]) < 200


# ------------------------------------------------------------------------------------------------- texts
def test_several_columns_are_joined_or_are_a_pair(tmp_path):
    folder = write_thrice(tmp_path, "csv", "a,b,label\none,two,x\none,,y\none,three,y\n")
    joined = read(folder, ("b", "a"))
    assert joined.train.texts == [("two . one",), (" . one",), ("three . one",)]
    assert joined.corpus == ["two . one", " . one", "three . one"]
    pair = read(folder, ("a", "b"), pair=True)
    assert pair.train.texts == [("one", "two"), ("one", ""), ("one", "three")]
    assert pair.corpus == ["one", "two", "", "three"], "every text once"
    assert pair.notes == ["pair: column a and b; label: column label; 2 classes: x, y"]


def test_tokens_are_given_as_lists_or_between_spaces(tmp_path):
    folder = write_thrice(tmp_path, "jsonl", '{"text": ["Real-Madrid", "won", "."], "title": ["Cup"], "label": 5}\n'
                                             '{"text": "on  1996-08-22 ", "title": "A b", "label": 3}\n')
    task = read(folder)
    assert task.test.texts == [(["Real-Madrid", "won", "."],), ("on  1996-08-22 ",)]
    assert task.labels == [3, 5]
    task = read(folder, ("title", "text"), tokenized=True)
    assert task.test.texts == [(["Cup", ".", "Real-Madrid", "won", "."],), (["A", "b", ".", "on", "1996-08-22"],)]
    assert task.corpus == [["Cup", ".", "Real-Madrid", "won", "."], ["A", "b", ".", "on", "1996-08-22"]]
    assert len(task.digest) == 64
    with pytest.raises(InputError, match="same form"):
        with_title("a", ["b"])


# -------------------------------------------------------------------------------------------------- errors
ROW = '{"text": "a", "label": "x"}\n'


@pytest.mark.parametrize("contents, options, message", [
    ({}, {}, "train.csv (or .tsv, .jsonl) is missing"),
    ({"train_csv": CSV, "test_csv": None}, {}, "test.csv (or .tsv, .jsonl) is missing"),
    ({"train_csv": CSV, "train_tsv": "a\tb\n"}, {}, "has train.csv and train.tsv; leave only one"),
    ({"train_csv": ""}, {}, "train.csv has no row"),
    ({"train_csv": "text,label\n"}, {}, "train.csv has no row below its first line"),
    ({"train_jsonl": "\n"}, {}, "train.jsonl has no row"),
    ({"train_csv": "text;label\na;b\n"}, {}, "the header is one column, 'text;label'; write columns with ','"),
    ({"train_csv": "text,label\na,x\nb\n"}, {}, "row 2: has 1 fields; expected 2"),
    ({"train_csv": "text,label\na,b,x\n"}, {}, "has 3 fields; expected 2 with ',' between, and a text that holds"),
    ({"train_csv": 'text,label\n"a,x\n'}, {}, "check the quotes"),
    ({"train_jsonl": ROW + '{"text": \n'}, {}, "train.jsonl, line 2: '{\"text\": ' is no JSON object"),
    ({"train_jsonl": ROW + "\n[3]\n"}, {}, "train.jsonl, line 3: '[3]' is no JSON object"),
    ({"train_jsonl": ROW + '{"text": "b"}\n'}, {}, "train.jsonl, line 2: label is missing"),
    ({"train_jsonl": '{"text": null, "label": "x"}\n'}, {}, "line 1: text is of type NoneType; expected a string"),
    ({"train_jsonl": '{"text": ["a", 3], "label": "x"}\n'}, {}, 'line 1: text, token 1 is of type int; expected'),
    ({"train_jsonl": '{"text": "a", "title": ["b"], "label": "x"}\n'}, {"text": ("title", "text")},
     "line 1: a string and a list of tokens cannot be joined"),
    ({"train_csv": "text,label\na,x\n ,y\n"}, {}, "row 2: the text is empty"),
    ({"train_csv": "text,label\na,x\nb, \n"}, {}, "train.csv, row 2: label is ''; expected an integer, or a string"),
    ({"train_jsonl": ROW + '{"text": "a", "label": true}\n'}, {}, "train.jsonl, line 2: label is 'True'"),
    ({"train_jsonl": ROW + '{"text": "a", "label": 1.5}\n'}, {}, "line 2: label is '1.5'"),
    ({"train_jsonl": ROW + '{"text": "a", "label": null}\n'}, {}, "line 2: label is 'None'"),
    ({"train_jsonl": ROW + '{"text": "a", "label": ["x"]}\n'}, {}, "line 2: label is \"['x']\""),
    ({"train_jsonl": ROW + '{"text": "a", "label": 3}\n'}, {}, "line 2: label is 3, but "),
    ({"train_csv": "text,label\na,x\nb,x\n"}, {}, "row 1: label is 'x', and so are all others; expected at least two"),
    ({"train_csv": CSV, "test_csv": "text,label\na,refund\nb,fraud\n"}, {},
     "test.csv, row 2: label is 'fraud', but no training row has this label; add such rows"),
    ({"train_csv": CSV, "validation_csv": "text,label\na,fraud\n"}, {}, "validation.csv, row 1: label is 'fraud'"),
    ({"train_csv": CSV, "validation_csv": CSV}, {"validation": 1}, "none are drawn; leave --validation out"),
    ({"train_csv": CSV}, {"validation": 4}, "validation is 4, but there are 4 rows"),
    ({"train_csv": SINGLE}, {}, "the only one of its class; add training rows"),
    ({"train_csv": CSV, "test_csv": "body,label\na,refund\n"}, {}, "test.csv has no column 'text'; its columns are"),
    ({"train_csv": CSV}, {"label": "kind"}, "train.csv has no column 'kind'; its columns are text, label"),
    ({"train_csv": "Text,text ,label\na,b,x\n"}, {"text": ("TEXT",)}, "has two columns 'TEXT'"),
    ({"train_csv": CSV}, {"text": ("label",), "label": "label"}, "label, label names a column twice"),
    ({"train_csv": "text,description,label\na,b,x\n"}, {}, "not clear which one is the text; name it with --text"),
    ({"train_csv": "a,b,label\na,b,x\n"}, {}, "has the columns a, b, label in its first line, and it is not clear"),
    ({"train_csv": "text,label,class\na,b,x\n"}, {}, "not clear which one is the label; name it with --label"),
    ({"train_csv": "text,a,b\na,b,x\n"}, {}, "not clear which one is the label"),
    ({"train_csv": ",review\n0,good\n"}, {}, "not clear which one is the text"),
    ({"train_csv": "a,b\na,b\n"}, {}, "not clear which one is the text"),
    ({"train_csv": CSV}, {"pair": True}, "a pair needs two text columns; found text; name two with --text")])
def test_a_wrong_folder_is_named_in_one_sentence(tmp_path, contents, options, message):
    found = {"test_csv": CSV} | contents
    folder = write(tmp_path, **{name: content for name, content in found.items() if content is not None})
    with pytest.raises(InputError) as error:
        read(folder, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------- labels
@pytest.mark.parametrize("labels, names", [
    (["b", "a", "b", "C"], ["C", "a", "b"]),
    (["10", "2", "1", "02"], ["1", "02", "2", "10"]),
    (["10", "2", "x"], ["10", "2", "x"]),
    ([10, -1, np.int64(2)], [-1, 2, 10]),
    (np.array(["b", "a"]), ["a", "b"])])
def test_classes_are_sorted_by_value_if_they_are_numbers_and_otherwise_by_alphabet(labels, names):
    found = class_names(labels, [""] * len(labels))
    assert found == names
    assert {type(name) for name in found} <= {int, str}


@pytest.mark.parametrize("labels, message", [
    ([1, None], "label 1 is 'None'"),
    ([1, "a"], "label 1 is 'a', but label 0 is 1; write all labels as strings, or all as integers"),
    ([True, False], "label 0 is 'True'"),
    ([1], "there are 2 texts and 1 labels"),
    ([7, 7], "label 0 is 7, and so are all others")])
def test_wrong_labels_in_a_list_are_named_by_their_position(labels, message):
    with pytest.raises(InputError) as error:
        labelled_task([("a",), ("b",)], labels, None, 0)
    assert message in str(error.value)


def test_a_list_of_texts_and_labels_is_a_task_without_test_rows():
    texts = [(f"text {i}",) for i in range(40)]
    task = labelled_task(texts, np.arange(40) % 3, None, seed=4)
    assert task.labels == [0, 1, 2]
    assert len(task.test) == 0
    assert len(task.validation) == 4
    found = rows_of(task.train, task.labels) + rows_of(task.validation, task.labels)
    assert sorted(found) == sorted((text, i % 3) for i, text in enumerate(texts))
    assert task.corpus == [text for text, in task.train.texts]
    assert labelled_task(texts, np.arange(40) % 3, None, seed=4).digest == task.digest
    assert labelled_task(texts, np.arange(40) % 3, None, seed=5).digest != task.digest


@pytest.mark.parametrize("rows, given, expected", [(19, None, 1), (250, None, 25), (30_000, None, 2000), (250, 7, 7)])
def test_a_tenth_of_the_rows_is_validation_at_most_2000_unless_a_number_is_given(rows, given, expected):
    task = labelled_task([("a",)] * rows, ["x", "y"] * (rows // 2) + ["x"] * (rows % 2), given, 0)
    assert len(task.validation) == expected
    assert len(task.train) == rows - expected


def test_a_class_keeps_a_training_row_if_all_its_rows_were_drawn_for_validation():
    labels = np.array([0, 1, 1, 2, 2, 2])
    assert leave_each_class(np.array([0, 1, 2, 3, 4]), labels).tolist() == [2, 3, 4]
    assert leave_each_class(np.array([2, 3]), labels).tolist() == [2, 3]
    with pytest.raises(InputError, match="the only one of its class"):
        leave_each_class(np.array([0]), labels)
    for seed in range(20):
        task = labelled_task([("a",)] * 6, ["rare", "y", "y", "z", "z", "z"], 3, seed)
        assert set(task.train.labels) == {0, 1, 2}


def test_other_names_of_the_same_classes_are_other_data():
    texts = [("a",)] * 4
    assert labelled_task(texts, ["x", "y"] * 2, 1, 0).digest != labelled_task(texts, ["x", "z"] * 2, 1, 0).digest


# ------------------------------------------------------------------------------------------------ AG News, NLI
def ag_news_rows(folder: Path, monkeypatch, classes: dict[str, list[int]]) -> Path:
    """Writes train.csv and test.csv in the layout of AG News with these classes to the folder $AG_NEWS_DIR."""
    for part, labels in classes.items():
        (folder / f"{part}.csv").write_text("".join(f'"{c}","t","{part} text {i}"\n' for i, c in enumerate(labels)))
    monkeypatch.setenv("AG_NEWS_DIR", str(folder))
    return folder


def test_the_classes_of_ag_news_are_those_of_train_csv(tmp_path, monkeypatch):
    ag_news_rows(tmp_path, monkeypatch, {"train": [4, 2] * 10, "test": [2, 2, 4]})
    task = read_task(Config(), BiLMConfig(validation=6))
    assert task.labels == ["Sports", "Sci/Tech"]
    assert task.test.labels.tolist() == [0, 0, 1]
    assert len(task.validation) == 6
    assert task.notes == ["the validation rows are those of the biLM's run; --validation is not used"]
    p = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    metrics = classification_metrics(p, task.test.labels, task.labels)
    assert metrics["macro_f1"] == pytest.approx(2 / 3)          # precision and recall: 1 and 1/2, 1/2 and 1


@pytest.mark.parametrize("train, test, message", [
    ([1, 1, 1], [1], "train.csv: every row has class 1; expected at least two classes"),
    ([1, 2, 1, 2], [2, 3], "test.csv, row 2: class is 3, but no row of train.csv has this class")])
def test_classes_of_ag_news_that_cannot_be_learned_are_named(tmp_path, monkeypatch, train, test, message):
    ag_news_rows(tmp_path, monkeypatch, {"train": train, "test": test})
    with pytest.raises(InputError) as error:
        read_task(Config(), BiLMConfig())
    assert message in str(error.value)


@pytest.mark.parametrize("bilm, validation, expected", [(4000, 2000, 30), (4000, 12, 12), (151, 2000, 30), (0, 5, 5)])
def test_a_bilm_of_other_texts_leaves_a_tenth_to_validation(tmp_path, monkeypatch, bilm, validation, expected):
    ag_news_rows(tmp_path, monkeypatch, {"train": [1, 2, 3] * 100, "test": [1, 2]})
    task = read_task(Config(validation=validation, seed=3), BiLMConfig(validation=bilm))
    assert len(task.validation) == expected
    assert len(task.train) == 300 - expected
    assert task.notes[0].startswith(f"{expected} validation rows are drawn by --validation and --seed")
    other = read_task(Config(validation=validation, seed=4), BiLMConfig(validation=bilm))
    assert other.validation.texts != task.validation.texts


def test_an_unknown_header_of_ag_news_is_refused_with_the_way_to_read_it(tmp_path, monkeypatch):
    (tmp_path / "train.csv").write_text("text,label\na,3\n")
    (tmp_path / "test.csv").write_text("text,label\na,3\n")
    monkeypatch.setenv("AG_NEWS_DIR", str(tmp_path))
    with pytest.raises(InputError, match=r"of your own use `python classification\.py --data FOLDER`$"):
        read_task(Config(), BiLMConfig())


def test_pairs_without_a_label_are_skipped_and_counted(tmp_path, monkeypatch):
    rows = "-\ta\tb\nneutral\tc\td\n-\te\tf\nentailment\tc\tg\n"
    part, notes = read_pairs(write(tmp_path, rows_tsv=rows) / "rows.tsv")
    assert part.texts == [("c", "d"), ("c", "g")]
    assert part.labels.tolist() == [1, 0]
    assert notes == ["rows.tsv: 2 rows without a label (-) are skipped"]
    for name in ("mnli_train_subset", "mnli_eval_easycl"):
        (tmp_path / f"{name}.tsv").write_text(rows)
    monkeypatch.setenv("NLI_DIR", str(tmp_path))
    task = nli_task(1, 0)
    assert task.summary().splitlines()[1:] == [
        "mnli_train_subset.tsv: 2 rows without a label (-) are skipped",
        "mnli_eval_easycl.tsv: 2 rows without a label (-) are skipped"]
    (tmp_path / "rows.tsv").write_text("-\ta\tb\n")
    with pytest.raises(InputError, match="has no row with a label"):
        read_pairs(tmp_path / "rows.tsv")


# -------------------------------------------------------------------------------------------- many classes
def test_predictions_of_more_than_ten_classes_are_numbers_with_spaces_between():
    gold = np.array([0, 11, 10])
    p = torch.eye(12)[gold]
    numbers = classification_numbers({part: {"a-0": p} for part in ("validation", "test")},
                                     {"validation": gold, "test": gold}, ["a-0"], list(range(12)), None)
    assert numbers["predictions"] == "0 11 10"
    classes = numbers["test"]["ensemble"]["classes"]
    assert classes["11"]["rows"] == 1
    assert json.loads(json.dumps(classes)) == classes, "the keys are strings"


def drawn(labels: list, tmp_path: Path):
    """The confusion matrix of classes that are all predicted as class 0, 5 rows each, as a figure that was saved."""
    confusion = np.zeros((len(labels), len(labels)), dtype=int)
    confusion[:, 0] = 5
    numbers = {"ensemble": {"confusion": confusion.tolist(), "accuracy": 1 / len(labels)}, "seeds": [{}]}
    figure = figures.class_confusion(labels, numbers, "frozen, test rows")
    figures.save(figure, tmp_path / "figure.png")
    return figure


@pytest.mark.figures
@pytest.mark.parametrize("labels, cells, rotation", [
    (["a$x$", "b"], 4, 0),
    (["a short one", "a name that is longer than 25 letters"], 4, 90),
    (list(range(7)), 49, 20),
    (list(range(12)), 144, 90),
    ([f"$class {c}$" for c in range(100)], 0, 90)])
def test_confusion_matrices_have_readable_names_and_fit_on_a_page(tmp_path, labels, cells, rotation):
    figure = drawn(labels, tmp_path)
    axes = figure.axes[0]
    width, height = figure.get_size_inches()
    assert width <= 14.01 and height <= 14
    names = axes.get_xticklabels()
    assert [name.get_text() for name in names] == [str(label) for label in labels] or len(labels[-1]) > 25
    assert all(len(name.get_text()) <= 25 for name in names)
    assert {name.get_rotation() for name in names} == {rotation}
    assert not any(name.get_parse_math() for name in [*names, axes.title])
    texts = [text.get_text() for text in axes.findobj(Text)]
    assert sum(text.endswith(" %") for text in texts) == cells
    mistake = f"most often {names[1].get_text()} is taken for {names[0].get_text()} (n = {5 * len(labels)})"
    assert mistake in axes.get_title()
    figure.draw_without_rendering()
    first, second = [name.get_window_extent() for name in names[:2]]
    assert not first.overlaps(second)
