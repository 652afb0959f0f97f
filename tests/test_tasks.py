"""Whole runs: from the files of every task to the file of a classifier, its numbers and its predictions."""
import io
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SENTENCES, tiny
from torch import nn

import classification
import ELMO
from classification import SETTINGS, Classifier, Config, Head
from data import sample
from data.ag_news import read_ag_news, read_csv, split
from data.tasks import NLI_LABELS, ag_news_task, labelled_phrases, read_pairs, read_trees
from run.checkpoint import read_published, write_published
from run.files import InputError
from run.metrics import classification_metrics, over_seeds, validation_numbers

SMALL = "--hidden 6 --batch-tokens 300 --epochs 2 --log-every 50 --precision fp32".split()
TREES = ["(3 (2 It) (4 (2 's) (4 great)))", "(1 (2 A) (0 (0 bad) (2 film)))", "(2 (2 So) (2 so))",
         "(4 (3 Very) (4 good))"]


@pytest.fixture(scope="module")
def bilm(tmp_path_factory) -> Path:
    """bilstm.pt of a tiny biLM of the built-in corpus."""
    file = tmp_path_factory.mktemp("bilm") / "bilstm.pt"
    texts = [text for _, _, text in sample.generate(600)]
    ELMO.ELMo.train(texts, tiny(validation=60, epochs=2.0, batch_tokens=300)).save(file)
    return file


@pytest.fixture(scope="module")
def whole(bilm, corpus, tmp_path_factory) -> Path:
    """The folder of a run with two seeds."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AG_NEWS_DIR", str(corpus))
        assert run(bilm, out, "--seeds", "2") == 0
    return out


def run(bilm: Path, out: Path, *more: str) -> int:
    return classification.main(["--out", str(out), "--bilstm", str(bilm), *SMALL, *more])


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> Path:
    """A folder of tiny SST and NLI files, which $SST_DIR and $NLI_DIR name."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for part in ("train", "dev", "test"):
        (folder / f"{part}.txt").write_text("\n".join(TREES * 3) + "\n")
    rows = ""
    for label, word in zip(NLI_LABELS, ("bank", "judge", "court"), strict=True):
        rows += f"{label}\tthe bank sued the court .\tthe {word} sued .\n"
    for name in ("mnli_train_subset", "mnli_eval_easycl", "snli_train_subset"):
        (folder / f"{name}.tsv").write_text(rows * 8)
    monkeypatch.setenv("SST_DIR", str(folder))
    monkeypatch.setenv("NLI_DIR", str(folder))
    return folder


# ------------------------------------------------------------------------------------------- files of the tasks
def test_a_tree_is_its_phrases_inner_ones_first():
    found = labelled_phrases("(3 (2 It) (4 (2 's) (4 -LRB-)))")
    assert found == [(2, "It"), (2, "'s"), (4, "("), (4, "'s ("), (3, "It 's (")]
    assert labelled_phrases(r"(2 (2 and\/or) (2 \*))") == [(2, "and/or"), (2, "*"), (2, "and/or *")]


@pytest.mark.parametrize("line", ["", "it", "(3 it", "3 it)", "(7 it)", "(3)", "(3 (2 it)) x", "(2 a) (3 b)"])
def test_a_line_that_is_no_tree_is_refused(line):
    with pytest.raises(ValueError):
        labelled_phrases(line)


def test_trees_give_sentences_or_every_phrase_once_and_binary_ones_leave_neutral_ones_out(tasks):
    sentences = read_trees(tasks / "test.txt", phrases=False, binary=False)
    assert sentences.texts[:2] == [("It 's great",), ("A bad film",)]
    assert sentences.labels.tolist() == [3, 1, 2, 4] * 3
    assert read_trees(tasks / "test.txt", phrases=False, binary=True).labels.tolist() == [1, 0, 1] * 3
    phrases = read_trees(tasks / "train.txt", phrases=True, binary=True)
    positive = []
    negative = []
    for (text,), label in zip(phrases.texts, phrases.labels, strict=True):
        by_label = positive if label == 1 else negative
        by_label.append(text)
    assert sorted(positive) == ["'s great", "It 's great", "Very", "Very good", "good", "great"]
    assert sorted(negative) == ["A bad film", "bad", "bad film"]


def test_pairs_are_read_by_tabs(tasks):
    part = read_pairs(tasks / "mnli_eval_easycl.tsv")
    assert part.texts[0] == ("the bank sued the court .", "the bank sued .")
    assert part.labels.tolist() == [0, 1, 2] * 8


def test_validation_rows_are_those_that_the_bilm_never_saw(builtin):
    _, validation = split(300, 40, 7)               # of ELMO.py --rows 300 --validation 40 --seed 7
    texts = read_ag_news("train").description.tolist()
    task = ag_news_task("description", 40, 7, 300)
    assert task.validation.texts == [(texts[i],) for i in validation]
    assert (len(task.train), len(task.test)) == (560, 100)


@pytest.mark.parametrize("more, stem", [
    (["--task", "sst2"], "sst2"),
    (["--task", "sst5", "--no-phrases", "--adapt", "1"], "sst5"),
    (["--task", "nli", "--validation", "6", "--finetune"], "nli_finetuned"),
    (["--fields", "title+description", "--rows", "90"], "titled"),
    (["--finetune", "--setting", "function", "--epochs", "0.2"], "finetuned")])
def test_every_task_runs_from_its_files_to_predictions(builtin, tasks, bilm, tmp_path, more, stem):
    out = tmp_path / "out"
    assert run(bilm, out, *more) == 0
    files = {name for name in os.listdir(out) if not name.startswith(".")}
    assert files == {f"{stem}.pt", f"{stem}.json", "figures"}
    holds_bilm = "--finetune" in more or "--adapt" in more
    clf = Classifier.load(out / f"{stem}.pt", None if holds_bilm else bilm)
    text = ("the bank", "the court sued .") if clf.config.two_texts else "the bank sued ."
    prediction = clf.predict([text])[0]
    assert prediction["label"] in clf.labels
    assert sum(prediction["probabilities"].values()) == pytest.approx(1)
    known = ELMO.ELMo.load(bilm).words.words
    assert clf.elmo.words.words[:len(known)] == known
    assert ("great" in clf.elmo.words.words) == (stem == "sst5"), "an adapted biLM knows the words of its task"


# ------------------------------------------------------------------------------------------ the file and its numbers
def check_part(numbers: dict, best: int, clf: Classifier, table: pd.DataFrame) -> None:
    """The numbers of one part are those that the classifier of the best of two seeds gets on its rows."""
    gold = torch.tensor(table["class"].to_numpy() - 1)
    p = clf.probabilities(table.description.tolist())
    correct = p.argmax(dim=1) == gold
    nll = F.nll_loss(p.log(), gold).item()
    accuracy = [seed["accuracy"] for seed in numbers["seeds"]]
    assert accuracy[best] == pytest.approx(correct.double().mean().item())
    assert numbers["seeds"][best]["nll"] == pytest.approx(nll, rel=1e-4)
    assert numbers["accuracy"]["mean"] == pytest.approx(sum(accuracy) / 2)
    gap = abs(accuracy[0] - accuracy[1])
    std = gap / math.sqrt(2)                                # of two numbers
    assert numbers["accuracy"]["std"] == pytest.approx(std)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_numbers_in_the_json_are_those_of_the_classifier_in_the_file(whole, bilm, corpus, setting):
    result = json.loads((whole / "classification.json").read_text())
    numbers = result["settings"][setting]
    best = numbers["best"]
    clf = Classifier.load(whole / "classifier.pt", bilm, setting)
    test = read_csv(corpus / "test.csv")
    _, validation = split(600, 60, 0)
    check_part(numbers["test"], best, clf, test)
    check_part(numbers["validation"], best, clf, read_csv(corpus / "train.csv").iloc[validation])
    on_validation = [seed["accuracy"] for seed in numbers["validation"]["seeds"]]
    assert on_validation[best] == max(on_validation)
    predictions = np.array(list(numbers["predictions"]), dtype=int)
    correct = predictions == test["class"].to_numpy() - 1
    assert correct.mean() == pytest.approx(numbers["test"]["ensemble"]["accuracy"])
    if setting != "function":
        s = clf.head.mix.w.softmax(dim=0)
        assert s.tolist() == pytest.approx(numbers["s"][best])


def test_the_frozen_weights_are_those_that_the_seed_draws(whole):
    result = json.loads((whole / "classification.json").read_text())
    numbers = result["settings"]["frozen"]
    assert numbers["gamma"] == [1, 1]
    for seed, s in enumerate(numbers["s"]):
        head = Head(Config(hidden=6), "frozen", 3, 24, 4).initialize(seed)
        assert s == pytest.approx(head.mix.w.softmax(dim=0).tolist())


def test_a_notebook_needs_only_torch_to_classify_with_the_file(whole, bilm):
    content = torch.load(whole / "classifier.pt", weights_only=True)
    assert list(content) == ["format", "config", "labels", "heads", "bilm", "weights", "metrics", "digest"]
    weights = {}
    for name, value in content["weights"].items():
        setting, _, own_name = name.partition(".")
        if setting == "frozen":
            weights[own_name] = value.float()
    lstm = nn.LSTM(24, 6, bidirectional=True)               # a single text has no padding that it could read
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
        lstm.get_parameter(name).data = weights[f"forward_lstm.{name}"]
        lstm.get_parameter(f"{name}_reverse").data = weights[f"backward_lstm.{name}"]
    text = "the bank sued the court ."
    s = weights["mix.w"].softmax(dim=0)
    layers = ELMO.ELMo.load(bilm).embed([text])[0]
    states, _ = lstm(torch.einsum("j,jnd->nd", s, layers))
    pooled = []
    for h in states.chunk(2, dim=1):
        attention = (h @ weights["attention.weight"][0]).softmax(dim=0)
        pooled.append(h.max(dim=0).values)
        pooled.append(attention @ h)
        pooled.append(h.mean(dim=0))
    logits = F.linear(torch.cat(pooled), weights["out.weight"], weights["out.bias"])
    p = logits.softmax(dim=0).tolist()
    clf = Classifier.load(whole / "classifier.pt", bilm, "frozen")
    found = clf.predict([text])[0]["probabilities"]
    assert content["labels"] == ["World", "Sports", "Business", "Sci/Tech"]
    assert found == pytest.approx(dict(zip(content["labels"], p, strict=True)), abs=1e-5)


def test_a_prediction_is_the_largest_probability_and_depends_on_no_other_text(whole, bilm):
    clf = Classifier.load(whole / "classifier.pt", bilm, "trainable")
    texts = [text for _, _, text in sample.generate(30, seed=5)]
    texts += ["bank", "ünïcode ☃ 漢字", "the court " * 200]
    for prediction in clf.predict(texts):
        probabilities = prediction["probabilities"]
        assert prediction["label"] == max(probabilities, key=probabilities.get)
    p = clf.probabilities(texts)
    one_by_one = torch.cat([clf.probabilities([text]) for text in texts])
    assert torch.allclose(one_by_one, p, atol=1e-5)
    assert torch.allclose(clf.probabilities(texts[::-1]).flip(0), p, atol=1e-5)
    assert clf.predict([]) == []


def test_the_setting_is_the_one_that_is_named_or_the_best_on_validation_rows(whole, bilm, tmp_path):
    content = read_published(whole / "classifier.pt", classification.FORMAT, set())
    file = tmp_path / "classifier.pt"
    for best in SETTINGS:
        for setting in SETTINGS:
            content["heads"][setting]["validation"] = 0.9 if setting == best else 0.8
        write_published(file, content)
        expected = Classifier.load(whole / "classifier.pt", bilm, best).head.state_dict()
        found = Classifier.load(file, bilm).head.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    with pytest.raises(InputError, match="no setting 'best'; expected one of trainable, frozen, function"):
        Classifier.load(file, bilm, "best")


def test_a_classifier_refuses_another_bilm(whole, tmp_path):
    ELMO.ELMo.train(SENTENCES * 3, tiny(epochs=0.1)).save(tmp_path / "other.pt")
    with pytest.raises(InputError, match="trained on another biLM"):
        Classifier.load(whole / "classifier.pt", tmp_path / "other.pt")
    with pytest.raises(InputError, match="needs the biLM"):
        Classifier.load(whole / "classifier.pt")


@pytest.mark.parametrize("change, message", [
    (lambda content: content["config"].update(hidden=7), "does not fit together"),
    (lambda content: content["config"].update(hidden=0), "a.pt: hidden is 0"),
    (lambda content: content["labels"].pop(), "does not fit together"),
    (lambda content: content["weights"].clear(), "does not fit together"),
    (lambda content: content["heads"].clear(), "does not fit together"),
    (lambda content: content["bilm"].clear(), "does not fit together"),
    (lambda content: content.update(format="elmo-bilm-2"), "instead of 'elmo-classifier-2'"),
    (lambda content: content.pop("labels"), "lacks labels")])
def test_parts_that_do_not_fit_together_are_refused_though_the_digest_is_right(whole, bilm, tmp_path, change, message):
    content = read_published(whole / "classifier.pt", classification.FORMAT, set())
    change(content)
    write_published(tmp_path / "a.pt", content)
    with pytest.raises(InputError, match=message):
        Classifier.load(tmp_path / "a.pt", bilm)


def test_a_damaged_file_is_refused(whole, bilm, tmp_path):
    content = (whole / "classifier.pt").read_bytes()
    weights = torch.load(whole / "classifier.pt", weights_only=True)["weights"]["frozen.out.weight"]
    place = content.index(weights.numpy().tobytes())
    file = tmp_path / "classifier.pt"
    flipped = bytearray(content)
    flipped[place + 1] ^= 1
    for damaged in (flipped, content[:len(content) // 2], b""):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=r"classifier\.pt"):
            Classifier.load(file, bilm)


# ------------------------------------------------------------------------------------------------- the command
def predicted(monkeypatch, whole: Path, bilm: Path, *argv: str, lines: bytes = b"") -> int:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(lines)))
    files = ["--out", str(whole), "--bilstm", str(bilm), "--setting", "frozen", "--precision", "fp32"]
    return classification.main([*files, *argv])


def test_predict_prints_label_and_probabilities_of_a_text_or_of_lines(capsys, monkeypatch, whole, bilm):
    lines = ["the bank .", "the cöurt ."]
    clf = Classifier.load(whole / "classifier.pt", bilm, "frozen")
    expected = clf.predict(lines)
    assert predicted(monkeypatch, whole, bilm, "--predict", lines[0]) == 0
    label, *shares = capsys.readouterr().out.rstrip("\n").split("\t")
    assert label == expected[0]["label"]
    assert shares == [f"{name} {p:.4f}" for name, p in expected[0]["probabilities"].items()]
    typed = "\r\n".join(lines).encode()
    assert predicted(monkeypatch, whole, bilm, "--predict", "-", "--json", lines=typed) == 0
    printed = capsys.readouterr().out
    found = [json.loads(line) for line in printed.splitlines()]
    assert [answer["text"] for answer in found] == lines
    for i, answer in enumerate(found):
        assert answer["label"] == expected[i]["label"]
        assert answer["probabilities"] == pytest.approx(expected[i]["probabilities"], abs=1e-6)


@pytest.mark.parametrize("lines, message", [
    (b"a\n\nb\n", "text 1 has no words"), (b"a\xff\n", "standard input, line 1"), (b"\n", "text 0 has no words")])
def test_a_line_that_cannot_be_classified_is_named(capsys, monkeypatch, whole, bilm, lines, message):
    assert predicted(monkeypatch, whole, bilm, "--predict", "-", lines=lines) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert message in captured.err


@pytest.mark.parametrize("texts, message", [
    (["a", " \n"], "text 1 has no words"), ("text", "one string"), ([3], "text 0 is of type int")])
def test_a_text_that_cannot_be_classified_is_named(whole, bilm, texts, message):
    with pytest.raises(InputError, match=message):
        Classifier.load(whole / "classifier.pt", bilm).predict(texts)


def refused(capsys, bilm: Path, out: Path, *argv: str) -> str:
    """The one sentence that a wrong input gets; the exit status is 2, and nothing is written."""
    assert run(bilm, out, *argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("classification.py: ")
    assert error.count("\n") == 1
    assert not out.exists() or not os.listdir(out)
    return error


@pytest.mark.parametrize("argv, message", [
    (["--setting", "best"], "invalid choice"),
    (["--seeds", "0"], "seeds is 0"),
    (["--rows", "541"], "rows is 541"),
    (["--lr", "nan"], "lr is nan"),
    (["--colour"], "--colour"),
    (["--task", "sst2", "--fields", "title+description"], "no titles"),
    (["--bilstm", "missing.pt"], "missing.pt is missing"),
    (["--bilstm", __file__], "cannot be opened"),
    (["--predict", "a"], "classifier.pt is missing"),
    (["--task", "sst2"], "SST_DIR is not set"),
    (["--task", "nli"], "NLI_DIR is not set")])
def test_a_wrong_option_is_named_in_one_sentence(builtin, bilm, capsys, monkeypatch, tmp_path, argv, message):
    monkeypatch.delenv("SST_DIR", raising=False)
    monkeypatch.delenv("NLI_DIR", raising=False)
    assert message in refused(capsys, bilm, tmp_path / "out", *argv)


@pytest.mark.parametrize("name, text, task, message", [
    ("train.txt", b"(3 a", "sst5", "train.txt, line 1"),
    ("dev.txt", b"\n", "sst5", "dev.txt"),
    ("test.txt", b"(9 a)", "sst2", "test.txt, line 1"),
    ("mnli_train_subset.tsv", b"neutral\ta\n", "nli", "subset.tsv, line 1"),
    ("mnli_eval_easycl.tsv", b"", "nli", "easycl.tsv: the file is empty"),
    ("mnli_eval_easycl.tsv", b"neutral\ta\tb\nmaybe\ta\tb\n", "nli", "line 2"),
    ("snli_train_subset.tsv", b"neutral\ta\t\xff\n", "nli", "not UTF-8"),
    ("mnli_train_subset.tsv", b"neutral\ta\tb\n", "nli", "validation is")])
def test_a_wrong_file_of_a_task_is_named_in_one_sentence(tasks, bilm, capsys, tmp_path, name, text, task, message):
    (tasks / name).write_bytes(text)
    assert message in refused(capsys, bilm, tmp_path / "out", "--validation", "5", "--task", task)


def test_the_order_of_words_counts_on_the_built_in_corpus(grammar, tmp_path, monkeypatch):
    monkeypatch.setenv("AG_NEWS_DIR", str(grammar))
    files = ["--out", str(tmp_path), "--bilstm", str(grammar / "bilstm.pt")]
    options = "--setting trainable --hidden 32 --epochs 3 --lr 0.006 --batch-tokens 400 --dropout 0".split()
    assert classification.main([*files, *options]) == 0
    result = json.loads((tmp_path / "classification.json").read_text())
    numbers = result["settings"]["trainable"]
    accuracy = numbers["test"]["accuracy"]["mean"]
    table = read_csv(grammar / "test.csv")
    texts = table.description.tolist()
    bag_posterior, _ = sample.bayes(sample.bag_logs(texts))
    logs, _ = sample.class_logs(texts)
    posterior, _ = sample.bayes(logs)
    bag = bag_posterior.max(axis=1).mean()          # of the best classifier that does not know the order
    best = posterior.max(axis=1).mean()             # of the best one
    error = math.sqrt(best * (1 - best) / 1000)
    assert bag + 0.25 * (best - bag) < accuracy < best + 3 * error
    order = np.random.default_rng(0)
    shuffled = [" ".join(order.permutation(text.split())) for text in texts]
    clf = Classifier.load(tmp_path / "classifier.pt", grammar / "bilstm.pt")
    predicted = clf.probabilities(shuffled).argmax(dim=1).numpy()
    correct = predicted == table["class"].to_numpy() - 1
    assert 0.25 < correct.mean() < bag


# ------------------------------------------------------------------------------------------ metrics, real rows
def test_metrics_are_those_of_a_matrix_worked_out_on_paper():
    p = np.array([[0.5, 0.3, 0.2],
                  [0.8, 0.1, 0.1],
                  [0.1, 0.8, 0.1],
                  [0.1, 0.8, 0.1],
                  [0.8, 0.1, 0.1],
                  [0.1, 0.8, 0.1]])
    gold = np.array([0, 0, 0, 1, 1, 2])
    found = classification_metrics(p, gold, ["a", "b", "c"])
    assert found["confusion"] == [[2, 1, 0], [1, 1, 0], [0, 1, 0]]
    assert found["accuracy"] == 3 / 6
    a, b, c = found["classes"].values()
    assert list(a.values()) == pytest.approx([2 / 3, 2 / 3, 2 / 3, 3])      # precision, recall, f1, rows
    assert list(b.values()) == pytest.approx([1 / 3, 1 / 2, 2 / 5, 2])
    assert list(c.values()) == [0, 0, 0, 1]
    assert found["macro_precision"] == pytest.approx(1 / 3)
    assert found["macro_recall"] == pytest.approx(7 / 18)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 5) / 3)
    assert found["nll"] == pytest.approx(-math.log(0.5 * 0.8**2 * 0.1**3) / 6)
    gap = 5 * 0.8 - 2                           # of a bin with 5 rows, of which 2 are right
    assert found["calibration_error"] == pytest.approx((0.5 + gap) / 6)


def test_metrics_over_seeds_have_means_and_an_ensemble_of_mean_probabilities():
    gold = np.array([0, 1])
    one = np.array([[0.9, 0.1],
                    [0.6, 0.4]])
    other = np.array([[0.4, 0.6],
                      [0.1, 0.9]])
    fresh = np.array([False, True])
    found = over_seeds(np.stack([one, other]), gold, ["a", "b"], fresh)
    assert found["accuracy"] == {"mean": 0.5, "std": 0.0}
    assert found["ensemble"]["accuracy"] == 1.0
    assert found["fresh"]["rows"] == 1
    assert found["fresh"]["accuracy"] == pytest.approx({"mean": 0.5, "std": math.sqrt(0.5)})
    heads = {"frozen-0": torch.tensor(one), "frozen-1": torch.tensor(other)}
    loss, numbers = validation_numbers(heads, torch.tensor(gold), ["frozen"])
    assert loss == pytest.approx(-math.log(0.9 * 0.4 * 0.4 * 0.9) / 4)
    accuracies = numbers["frozen"]["accuracy"]
    assert accuracies == [0.5, 0.5]


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_committed_classifier_reaches_its_published_accuracy_on_real_rows(ag_news, setting):
    models = ROOT / "models"
    if not (models / "classifier.pt").exists():
        pytest.skip("models/classifier.pt is missing: run `python classification.py --seeds 3` first")
    numbers = json.loads((models / "classification.json").read_text())["settings"][setting]
    published = numbers["test"]["seeds"][numbers["best"]]["accuracy"]
    rows = np.arange(0, 7000, 7)
    table = read_csv(ag_news / "test.csv").iloc[rows]
    clf = Classifier.load(models / "classifier.pt", models / "bilstm.pt", setting)
    texts = table.description.tolist()
    predicted = clf.probabilities(texts, "auto").argmax(dim=1).numpy()
    correct = predicted == table["class"].to_numpy() - 1
    error = math.sqrt(published * (1 - published) / 1000)
    assert abs(correct.mean() - published) < 3 * error
    all_seeds = np.array(list(numbers["predictions"]), dtype=int)[rows]
    assert np.mean(predicted == all_seeds) > 0.95
