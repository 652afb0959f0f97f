"""Whole runs: from the files of every task to the file of a classifier, its numbers and its predictions."""
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SENTENCES, arguments, changed, classifier, files, labelled, numbers, refused, tiny
from pytest import approx

import classification
import ELMO
from classification import SETTINGS, Classifier, Config, Head
from data import sample
from data.ag_news import split
from data.tasks import NLI_LABELS, EncodedTexts, Part, ag_news_task, labelled_phrases, read_pairs, read_trees
from data.text import Data
from run.checkpoint import read_published, write_published
from run.files import InputError
from run.metrics import (
    Scores,
    classification_metrics,
    classification_numbers,
    over_seeds,
    validation_numbers,
    word_confusion,
    word_metrics,
)

TREES = ["(3 (2 It) (4 (2 's) (4 great)))", "(1 (2 A) (0 (0 bad) (2 film)))", "(2 (2 So) (2 so))",
         "(4 (3 Very) (4 good))"]


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
    signs = read_trees(tasks / "test.txt", phrases=False, binary=True)
    assert signs.labels.tolist() == [1, 0, 1] * 3
    phrases = read_trees(tasks / "train.txt", phrases=True, binary=True)
    found = sorted((label, text) for label, (text,) in zip(phrases.labels, phrases.texts, strict=True))
    assert found == [
        (0, "A bad film"), (0, "bad"), (0, "bad film"),
        (1, "'s great"), (1, "It 's great"), (1, "Very"), (1, "Very good"), (1, "good"), (1, "great")]


def test_pairs_are_read_by_tabs(tasks):
    part, notes = read_pairs(tasks / "mnli_eval_easycl.tsv")
    assert notes == []
    assert part.texts[0] == ("the bank sued the court .", "the bank sued .")
    assert part.labels.tolist() == [0, 1, 2] * 8


def test_the_first_texts_of_pairs_come_before_the_second_ones(elmo):
    rows = [(0, ("oil", "the cat")), (1, ("goal !", "a b c")), (2, ("one two three four", "match"))]
    part = EncodedTexts(Part.of(rows), elmo)
    assert part.words.tolist() == [1, 2, 4, 2, 3, 1]
    assert part.lengths.tolist() == [2, 3, 4]
    sides, lengths = part.sides(np.array([2, 0]))
    assert sides.tolist() == [2, 0, 5, 3]
    assert lengths.tolist() == [4, 1, 1, 2]


def test_validation_rows_are_those_that_the_bilm_never_saw(builtin, tmp_path):
    data = Data.of_ag_news(ELMO.Config(rows=300, validation=40, seed=7), tmp_path)
    texts, _ = data.texts
    task = ag_news_task(Config(), ELMO.Config(rows=300, validation=40, seed=7))
    assert task.validation.texts == [(texts[row],) for row in data.validation]
    assert len(task.train) == 560
    assert len(task.test) == 100


@pytest.mark.parametrize("more, stem", [
    ("--task sst2", "sst2"),
    ("--task sst5 --no-phrases --adapt 1", "adapted_sst5"),
    ("--task nli --validation 6 --finetune", "nli_finetuned"),
    ("--fields title+description --rows 90", "titled"),
    ("--finetune --setting function --epochs 0.2", "finetuned")])
def test_every_task_runs_from_its_files_to_predictions(builtin, tasks, whole, bilm, tmp_path, more, stem):
    out = tmp_path / "out"
    argv = arguments("classification.py", out, whole / "bilstm.pt", "--setting", "all", *more.split())
    assert classification.main(argv) == 0
    written = [name for name in files(out) if "figures/" not in name]
    assert written == [f"{stem}.json", f"{stem}.pt"]
    bilstm = whole / "bilstm.pt"
    if "--finetune" in more or "--adapt" in more:
        bilstm = None                           # the file has a biLM of its own
    clf = Classifier.load(out / f"{stem}.pt", bilstm)
    text = "the bank sued ."
    if clf.config.two_texts:
        text = ("the bank", "the court sued .")
    prediction, = clf.predict([text])
    assert prediction["label"] in clf.labels
    assert sum(prediction["probabilities"].values()) == approx(1)
    known = bilm.words.words
    assert clf.elmo.words.words[:len(known)] == known
    assert ("great" in clf.elmo.words.words) == (stem == "adapted_sst5"), "an adapted biLM knows the words of its task"


# ------------------------------------------------------------------------------------------ the file and its numbers
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_numbers_in_the_json_are_those_of_the_classifier_in_the_file(whole, corpus, setting):
    result = numbers("classification", whole)["settings"][setting]
    best = result["best"]
    clf = classifier(whole, setting)
    _, rows = split(600, 60, 0)
    parts = {"validation": labelled(corpus / "train.csv", rows), "test": labelled(corpus / "test.csv")}
    for part, (texts, classes) in parts.items():
        gold = torch.tensor(classes)
        p = clf.probabilities(texts)
        correct = p.argmax(dim=1) == gold
        found = result[part]["seeds"][best]
        assert found["accuracy"] == approx(correct.double().mean().item())
        nll = F.nll_loss(p.log(), gold).item()
        assert found["nll"] == approx(nll, rel=1e-4)
    on_validation = [seed["accuracy"] for seed in result["validation"]["seeds"]]
    assert on_validation[best] == max(on_validation)
    predictions = np.array(list(result["predictions"]), dtype=int)
    _, labels = parts["test"]
    assert np.mean(predictions == labels) == approx(result["test"]["ensemble"]["accuracy"])
    if setting != "function":
        s = clf.head.mix.w.softmax(dim=0)
        assert s.tolist() == approx(result["s"][best])


class Rehearsed(classification.Trainer):
    """A trainer whose steps only set the averaged weights: every head finds one class more probable than the others.

    It is class 0 for the first seed and class 1 for the second one. The second evaluation has the lowest loss, because
    its probabilities are nearly equal, as are the frequencies of the classes.
    """

    def step(self, step: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        bias = 0.0625 if step // self.interval == 1 else 4.0
        for name, modules in self.model.items():
            out = modules["head"].out
            out.weight.data.zero_()
            out.bias.data.zero_()
            out.bias.data[int(name[-1])] = bias
        return torch.zeros(()), torch.zeros(()), 1


def test_a_run_measures_and_saves_the_weights_of_the_best_evaluation_and_the_best_seed(
        builtin, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(classification, "Trainer", Rehearsed)
    monkeypatch.setattr("run.figures.classification", lambda *arguments: None)
    assert classification.main(arguments("classification.py", tmp_path, whole / "bilstm.pt")) == 0
    result = numbers("classification", tmp_path)["settings"]["trainable"]
    _, rows = split(600, 60, 0)
    _, gold = labelled(builtin / "train.csv", rows)
    shares = np.bincount(gold) / 60
    assert result["best"] == shares[:2].argmax()
    probability = math.exp(0.0625) / (math.exp(0.0625) + 3)
    for c, seed in enumerate(result["validation"]["seeds"]):
        nll = -shares[c] * math.log(probability) - (1 - shares[c]) * math.log((1 - probability) / 3)
        assert seed["accuracy"] == approx(shares[c])
        assert seed["nll"] == approx(nll, rel=1e-3)
    saved = torch.load(tmp_path / "classifier.pt", weights_only=True)
    expected = [0.0] * 4
    expected[result["best"]] = 0.0625
    assert saved["weights"]["trainable.out.bias"].tolist() == expected


def test_the_frozen_weights_are_those_that_the_seed_draws(whole):
    frozen = numbers("classification", whole)["settings"]["frozen"]
    assert frozen["gamma"] == [1, 1]
    for seed, s in enumerate(frozen["s"]):
        head = Head(Config(hidden=6), "frozen", 3, 24, 4).initialize(seed)
        assert s == approx(head.mix.w.softmax(dim=0).tolist())


def test_a_prediction_is_the_largest_probability_and_depends_on_no_other_text(whole):
    clf = classifier(whole, "trainable")
    texts = [text for _, _, text in sample.generate(30, seed=5)]
    texts += ["bank", "ünïcode ☃ 漢字", "the court " * 200]
    for prediction in clf.predict(texts):
        probabilities = prediction["probabilities"]
        assert prediction["label"] == max(probabilities, key=probabilities.get)
    p = clf.probabilities(texts)
    one_by_one = torch.cat([clf.probabilities([text]) for text in texts])
    assert torch.allclose(one_by_one, p, atol=1e-5)
    in_reverse = clf.probabilities(texts[::-1])
    assert torch.allclose(in_reverse.flip(0), p, atol=1e-5)
    assert clf.predict([]) == []


def test_the_setting_is_the_one_that_is_named_or_the_best_on_validation_rows(whole, tmp_path):
    content = read_published(whole / "classifier.pt", classification.FORMAT, set())
    shutil.copy(whole / "bilstm.pt", tmp_path)
    for best in SETTINGS:
        for setting in SETTINGS:
            content["heads"][setting]["validation"] = 0.9 if setting == best else 0.8
        write_published(tmp_path / "classifier.pt", content)
        expected = classifier(whole, best)
        found = classifier(tmp_path)
        assert not changed(found.head.state_dict(), expected.head.state_dict())
    with pytest.raises(InputError, match="no setting 'best'; expected one of trainable, frozen, function"):
        classifier(whole, "best")


def test_a_classifier_refuses_another_bilm(whole, tmp_path):
    ELMO.ELMo.train(SENTENCES * 3, tiny(epochs=0.1)).save(tmp_path / "other.pt")
    with pytest.raises(InputError, match="was not trained on"):
        Classifier.load(whole / "classifier.pt", tmp_path / "other.pt")
    with pytest.raises(InputError, match="needs the biLM"):
        Classifier.load(whole / "classifier.pt")


@pytest.mark.parametrize("texts, message", [
    (["a", " \n"], "text 1 has no words"),
    ("text", "one string"),
    ([("a", "b")], "text 0 is a tuple"),
    ([3], "text 0 is of type int")])
def test_a_text_that_has_no_probabilities_is_named(whole, texts, message):
    with pytest.raises(InputError, match=message):
        classifier(whole).probabilities(texts)


def test_a_text_without_words_gets_no_label_and_the_others_their_usual_one(whole):
    clf = classifier(whole)
    first, empty, tokens, last = clf.predict(["the bank .", " \n", ["the", "bank", "."], "the court sued ."])
    assert empty == {"label": None, "probabilities": {}}
    assert first == tokens
    alone, = clf.predict(["the court sued ."])
    assert last["label"] == alone["label"]
    assert last["probabilities"] == approx(alone["probabilities"], abs=1e-5)
    assert clf.predict([""]) == [empty]
    assert clf.predict([]) == []


@pytest.mark.parametrize("name, text, task, message", [
    ("train.txt", b"(3 a", "sst5", "train.txt, line 1"),
    ("dev.txt", b"\n", "sst5", "dev.txt"),
    ("test.txt", b"(9 a)", "sst2", "test.txt, line 1"),
    ("mnli_train_subset.tsv", b"neutral\ta\n", "nli", "subset.tsv, line 1"),
    ("mnli_eval_easycl.tsv", b"", "nli", "easycl.tsv: the file is empty"),
    ("mnli_eval_easycl.tsv", b"neutral\ta\tb\nmaybe\ta\tb\n", "nli", "line 2"),
    ("snli_train_subset.tsv", b"neutral\ta\t\xff\n", "nli", "not UTF-8"),
    ("mnli_train_subset.tsv", b"neutral\ta\tb\n", "nli", "validation is")])
def test_a_wrong_file_of_a_task_is_named_in_one_sentence(tasks, whole, tmp_path, name, text, task, message):
    (tasks / name).write_bytes(text)
    argv = arguments("classification.py", tmp_path / "out", whole / "bilstm.pt", "--validation", "5", "--task", task)
    assert message in refused("classification.py", argv, tmp_path)


def test_the_order_of_words_counts_on_the_built_in_corpus(grammar, tmp_path, monkeypatch):
    monkeypatch.setenv("AG_NEWS_DIR", str(grammar))
    options = "--seeds 1 --hidden 32 --epochs 3 --lr 0.006 --batch-tokens 400 --dropout 0".split()
    assert classification.main(arguments("classification.py", tmp_path, grammar / "bilstm.pt", *options)) == 0
    result = numbers("classification", tmp_path)["settings"]["trainable"]
    texts, gold = labelled(grammar / "test.csv")
    bag_posterior, _ = sample.bayes(sample.bag_logs(texts))
    logs, _ = sample.class_logs(texts)
    posterior, _ = sample.bayes(logs)
    bag = bag_posterior.max(axis=1).mean()          # of the best classifier that does not know the order
    best = posterior.max(axis=1).mean()             # of the best one
    error = math.sqrt(best * (1 - best) / 1000)
    assert bag + 0.25 * (best - bag) < result["test"]["accuracy"]["mean"] < best + 3 * error
    order = np.random.default_rng(0)
    shuffled = [" ".join(order.permutation(text.split())) for text in texts]
    clf = Classifier.load(tmp_path / "classifier.pt", grammar / "bilstm.pt")
    p = clf.probabilities(shuffled)
    predicted = p.argmax(dim=1).numpy()
    assert 0.25 < np.mean(predicted == gold) < bag


# ---------------------------------------------------------------------------------------------- metrics
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
    assert list(a.values()) == approx([2 / 3, 2 / 3, 2 / 3, 3])      # precision, recall, f1, rows
    assert list(b.values()) == approx([1 / 3, 1 / 2, 2 / 5, 2])
    assert list(c.values()) == [0, 0, 0, 1]
    assert found["macro_precision"] == approx(1 / 3)
    assert found["macro_recall"] == approx(7 / 18)
    assert found["macro_f1"] == approx((2 / 3 + 2 / 5) / 3)
    product = 0.5 * 0.8**2 * 0.1**3             # of the probabilities of the gold classes
    assert found["nll"] == approx(-math.log(product) / 6)
    gap = 5 * 0.8 - 2                           # of a bin with 5 rows, of which 2 are right
    assert found["calibration_error"] == approx((0.5 + gap) / 6)


def test_metrics_of_words_are_those_worked_out_on_paper():
    gold = np.array([4, 4, 4, 5, 6])
    best = np.array([4, 4, 7, 5, 5])
    rank = np.array([0, 0, 5, 0, 4])            # rank 4 is the fifth place
    found = word_metrics(gold, best, rank)
    assert found == approx({
        "accuracy": 3 / 5,
        "top5_accuracy": 4 / 5,
        "macro_precision": 1 / 2,               # of words 4, 5 and 6: 2/2, 1/2 and 0
        "macro_recall": 5 / 9,                  # 2/3, 1/1 and 0
        "macro_f1": 22 / 45})                   # 4/5, 2/3 and 0
    nothing = gold[:0]
    assert word_metrics(nothing, nothing, nothing) == {}


def test_metrics_of_rows_are_sums_over_their_tokens():
    row = np.array([7, 2, 7])                   # of each predicted token; the rows were asked for as 7, 2
    gold = np.array([4, 4, 5])
    best = np.array([4, 5, 5])
    rank = np.array([0, 9, 0])
    forward = (row, np.array([1.0, 4.0, 2.0]), gold, best, rank)
    backward = (row, np.array([0.5, 1.0, 0.5]), gold, best, rank)
    batch = [forward, backward]
    rows = np.array([7, 2])
    tokens = np.array([2, 1])
    scores = Scores.of(rows, tokens, [batch])
    assert scores.nll.tolist() == [[3.0, 4.0], [1.0, 1.0]]
    assert scores.perplexity() == approx([10.31226, 1.947734])                  # e to the power of 7/3 and of 2/3
    every = scores.metrics()
    assert every["rows"] == 2
    assert every["tokens"] == 3
    assert every["backward"]["nll"] == approx(2 / 3)
    assert every["forward"]["accuracy"] == approx(2 / 3)
    first = scores.metrics(np.array([True, False]))
    assert first["rows"] == 1
    assert first["tokens"] == 2
    assert first["forward"]["nll"] == 1.5
    assert first["forward"]["perplexity"] == approx(4.481689)                   # e to the power of 1.5
    assert first["forward"]["bits_per_token"] == approx(2.164043)               # 1.5 / 0.693147
    assert first["forward"]["accuracy"] == 1
    unknown = np.array([1, 0])
    totals = scores.totals(unknown)
    assert totals["forward"] == approx({"nats": 7, "tokens": 3, "unknown": 1, "perplexity": 10.31226})
    one_row = scores.totals(unknown, slice(1, 2))
    assert one_row["backward"] == approx({"nats": 1, "tokens": 1, "unknown": 0, "perplexity": 2.718282})


def test_metrics_of_frequent_words_have_a_row_for_each_gold_word_and_one_for_all_others():
    words = ["<pad>", "<unk>", "<s>", "</s>", "bank", "court", "judge"]
    gold = np.array([4, 5, 5, 5])
    best = np.array([5, 5, 6, 6])
    found = word_confusion(gold, best, words)
    assert found["words"] == ["court", "bank", "(other)"]       # the most frequent gold word comes first
    assert found["counts"] == [[1, 0, 2], [1, 0, 0], [0, 0, 0]]


def test_metrics_of_a_setting_choose_the_best_seed_by_validation_rows_and_predict_by_the_mean_of_the_seeds():
    right = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    unsure = torch.tensor([[0.6, 0.4], [0.6, 0.4]])
    just_right = torch.tensor([[0.49, 0.51], [0.51, 0.49]])         # of the test rows, whose classes are 1 and 0
    always_first = torch.tensor([[0.9, 0.1], [0.9, 0.1]])
    p = {"train": {"frozen-0": right, "frozen-1": right},
         "validation": {"frozen-0": unsure, "frozen-1": right},
         "test": {"frozen-0": just_right, "frozen-1": always_first}}
    gold = {"train": np.array([0, 1]), "validation": np.array([0, 1]), "test": np.array([1, 0])}
    found = classification_numbers(p, gold, ["frozen-0", "frozen-1"], ["a", "b"], None)
    assert [seed["accuracy"] for seed in found["test"]["seeds"]] == [1.0, 0.5]
    assert [seed["accuracy"] for seed in found["validation"]["seeds"]] == [0.5, 1.0]
    assert found["best"] == 1
    assert found["predictions"] == "00"


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
    assert found["fresh"]["accuracy"] == approx({"mean": 0.5, "std": math.sqrt(0.5)})


def test_metrics_of_fresh_rows_are_those_of_these_rows_alone():
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    gold = np.array([0, 1, 0])                                      # right, wrong, wrong
    fresh = np.array([True, True, False])
    found = over_seeds(p[None], gold, ["a", "b"], fresh)
    assert found["accuracy"]["mean"] == approx(1 / 3)
    assert found["fresh"]["rows"] == 2
    assert found["fresh"]["accuracy"]["mean"] == 1 / 2
    assert found["fresh"]["ensemble"]["accuracy"] == 1 / 2


def test_metrics_of_an_evaluation_are_the_mean_loss_of_all_heads_and_each_head_by_itself():
    gold = torch.tensor([0, 1])
    heads = {
        "frozen-0": torch.tensor([[0.9, 0.1], [0.6, 0.4]]),
        "frozen-1": torch.tensor([[0.7, 0.3], [0.1, 0.9]]),
        "trainable-0": torch.tensor([[0.2, 0.8], [0.6, 0.4]])}
    loss, numbers = validation_numbers(heads, gold, ["frozen", "trainable"])
    assert loss == approx(-math.log(0.9 * 0.4 * 0.7 * 0.9 * 0.2 * 0.4) / 6)
    assert numbers["frozen"]["loss"] == approx([-math.log(0.9 * 0.4) / 2, -math.log(0.7 * 0.9) / 2])
    assert numbers["frozen"]["accuracy"] == [0.5, 1.0]
    assert numbers["trainable"]["accuracy"] == [0.0]
