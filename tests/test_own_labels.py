"""Classifiers of people's own texts and labels, from their files or lists to predictions."""
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import arguments, files, numbers, refused, tiny
from pytest import approx

import classification
from classification import Classifier, Config
from ELMO import ELMo
from run.files import InputError

WORDS = {"World": "court", "Sport": "match", "Money": "bank", "Science": "probe", "Food": "bread", "Travel": "train"}
SMALL = Config(hidden=6, epochs=4.0, lr=0.02, precision="fp32", log_every=10_000)


def rows(count: int, seed: int) -> list[tuple[str, str]]:
    """(label, text) of random rows of six classes: one word tells the class."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        label = draw.choice(list(WORDS))
        words = draw.choices(["the", "a", "sued", "said", "."], k=draw.randint(1, 6))
        words.insert(draw.randint(0, len(words)), WORDS[label])
        found.append((label, " ".join(words)))
    return found


@pytest.fixture(scope="module")
def elmo() -> ELMo:
    """A biLM that knows the words of the rows."""
    model = ELMo.train([text for _, text in rows(300, seed=5)], tiny(hidden=16, batch_tokens=300))
    model.model.table.data.mul_(20)                     # so that heads learn in a few steps
    return model


@pytest.fixture
def folder(tmp_path, elmo) -> Path:
    """A folder with train.csv and test.csv, and the biLM in bilstm.pt."""
    for part, count, seed in (("train", 400, 0), ("test", 100, 1)):
        lines = ["label,text"]
        for label, text in rows(count, seed):
            lines.append(f'{label},"{text}"')
        (tmp_path / f"{part}.csv").write_text("\n".join(lines))
    ELMo(elmo.config, elmo.words, elmo.model).save(tmp_path / "bilstm.pt")      # leaves elmo itself unsaved
    return tmp_path


def command(folder: Path, *more: str) -> list[str]:
    """The command line of a small run on the rows in a folder."""
    argv = arguments("classification.py", folder / "out", folder / "bilstm.pt", "--data", str(folder), *more)
    return [*argv, "--epochs", "4", "--lr", "0.02"]


@pytest.mark.figures
def test_six_named_classes_go_from_a_csv_to_json_figure_and_prediction(folder, capsys):
    assert classification.main(command(folder)) == 0
    assert "text: column text; label: column label; 6 classes: Food, Money, " in capsys.readouterr().out
    result = numbers("classification", folder / "out")
    assert result["labels"] == sorted(WORDS)
    assert result["task"] == "own"
    assert result["settings"]["trainable"]["validation"]["ensemble"]["rows"] == 40, "a tenth"
    test = result["settings"]["trainable"]["test"]["ensemble"]
    assert list(test["classes"]) == sorted(WORDS)
    assert test["accuracy"] > 0.9
    f1 = [of_class["f1"] for of_class in test["classes"].values()]
    assert test["macro_f1"] == approx(sum(f1) / 6)
    assert "figures/confusion_trainable_test.png" in files(folder / "out")
    argv = ["--out", str(folder / "out"), "--bilstm", str(folder / "bilstm.pt"), "--predict"]
    assert classification.main([*argv, "the bread ."]) == 0
    label, *probabilities = capsys.readouterr().out.split("\t")
    assert label == "Food"
    assert [text.rpartition(" ")[0] for text in probabilities] == sorted(WORDS)
    assert classification.main(command(folder, "--resume")) == 0
    assert "finished already" in capsys.readouterr().out
    assert "validation = 2000, not 30" in refused("classification.py", command(folder, "--validation", "30"), folder)


def test_an_adapted_classifier_of_own_rows_knows_their_words_and_stands_by_itself(folder):
    (folder / "train.csv").write_text((folder / "train.csv").read_text().replace("said", "zebra"))
    assert classification.main(command(folder, "--adapt", "1")) == 0
    clf = Classifier.load(folder / "out" / "classifier.pt")
    assert "zebra" in clf.elmo.words.words


def test_columns_that_are_joined_or_a_pair_are_given_as_tuples_to_predict(folder):
    for part in ("train", "test"):
        lines = [json.dumps({"q": text, "a": text[:7], "kind": label}) for label, text in rows(120, 3)]
        (folder / f"{part}.csv").unlink()
        (folder / f"{part}.jsonl").write_text("\n".join(lines))
    columns = ["--text", "q", "a", "--label", "kind"]
    for fields in ("joined", "pair"):
        more = [*columns, "--fields", fields, "--overwrite"]
        assert classification.main(command(folder, *more)) == 0
        clf = Classifier.load(folder / "out" / "classifier.pt", folder / "bilstm.pt")
        assert clf.config.fields == fields
        assert clf.predict([("the bank .", "the bank")])[0]["label"] in WORDS
        with pytest.raises(InputError, match="expected a tuple of two texts"):
            clf.predict(["the bank ."])


@pytest.mark.parametrize("convert, names", [
    (lambda label: label, sorted(WORDS)),
    (lambda label: list(WORDS).index(label) * 5 - 5, [-5, 0, 5, 10, 15, 20]),
    (lambda label: np.int64(list(WORDS).index(label)), [0, 1, 2, 3, 4, 5])])
def test_a_classifier_learns_lists_of_texts_and_labels_and_is_saved_and_loaded(elmo, tmp_path, convert, names):
    known = rows(300, 0)
    clf = Classifier.train([text for _, text in known], [convert(label) for label, _ in known], elmo, SMALL)
    assert clf.labels == names
    texts = [text for _, text in rows(60, 1)]
    predictions = clf.predict(texts)
    right = [answer["label"] == convert(label) for answer, (label, _) in zip(predictions, rows(60, 1), strict=True)]
    assert np.mean(right) > 0.9
    clf.save(tmp_path / "own.pt")                       # with the biLM, because no file has it
    clf.elmo = ELMo(elmo.config, elmo.words, elmo.model)
    clf.elmo.save(tmp_path / "bilstm.pt")
    clf.save(tmp_path / "small.pt")                     # without it
    assert (tmp_path / "small.pt").stat().st_size < (tmp_path / "own.pt").stat().st_size
    for again in (Classifier.load(tmp_path / "own.pt"), Classifier.load(tmp_path / "small.pt", tmp_path / "bilstm.pt")):
        assert again.labels == names
        for found, expected in zip(again.predict(texts), predictions, strict=True):
            assert found["label"] == expected["label"]
            assert found["probabilities"] == approx(expected["probabilities"], abs=0.01)


def test_a_classifier_learns_given_tokens_and_pairs(elmo):
    known = rows(200, 0)
    labels = [label for label, _ in known]
    tokens = Classifier.train([text.split() for _, text in known], labels, elmo, SMALL)
    assert tokens.predict([["the", "bread", "."]])[0]["label"] == "Food"
    pairs = Classifier.train([(text, text.split()) for _, text in known], labels, elmo, SMALL)
    assert pairs.config.pair
    assert pairs.predict([("the bread .", ["the", "bread", "."]), ("", "the bread")])[1]["label"] is None


def test_a_fine_tuned_classifier_of_lists_has_a_biLM_of_its_own(elmo, tmp_path):
    known = rows(100, 0)
    before = elmo.model.table.clone()
    clf = Classifier.train([text for _, text in known], [label for label, _ in known], elmo,
                           Config(hidden=6, finetune=True, precision="fp32"))
    assert torch.equal(elmo.model.table, before)
    assert not torch.equal(clf.elmo.model.table, before)
    clf.save(tmp_path / "own.pt")
    assert Classifier.load(tmp_path / "own.pt").predict(["the bread ."])[0]["label"] in WORDS


@pytest.mark.parametrize("texts, labels, message", [
    (["a", "b"], ["x"], "there are 2 texts and 1 labels"),
    (["a", "b"], ["x", "x"], "expected at least two classes"),
    (["a", " "], ["x", "y"], "text 1 has no words"),
    (["a", 3], ["x", "y"], "text 1 is of type int"),
    (["a", "b"], ["x", None], "label 1 is 'None'; expected an integer, or a string"),
    (["a", "b"], ["x", "y\nz"], "expected an integer, or a string of printable characters"),
    (["a"] * 21, [str(i) for i in range(21)], "every row has a class of its own"),
    (["a", "b"], ["x", 1], "label 1 is 1, but label 0 is 'x'"),
    ([], [], "there are no labels"),
    ("ab", ["x", "y"], "texts is one string"),
    ([("a", "b"), "c"], ["x", "y"], "text 1 is 'c'; expected a tuple of two texts")])
def test_wrong_texts_and_labels_are_named(elmo, texts, labels, message):
    with pytest.raises(InputError, match=message):
        Classifier.train(texts, labels, elmo, SMALL)
