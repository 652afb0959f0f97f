"""Whole runs: from the files of every task to the file of a classifier, its numbers and its predictions."""
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SENTENCES, arguments, changed, classifier, files, labelled, numbers, refused, tiny

import classification
import ELMO
from classification import SETTINGS, Classifier, Config, Head
from data import sample
from data.ag_news import read_ag_news, split
from data.tasks import NLI_LABELS, ag_news_task, labelled_phrases, read_pairs, read_trees
from run import metrics
from run.checkpoint import read_published, write_published
from run.files import InputError
from run.metrics import (
    Scores,
    classification_metrics,
    classification_numbers,
    full_softmax_nll,
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
    part = read_pairs(tasks / "mnli_eval_easycl.tsv")
    assert part.texts[0] == ("the bank sued the court .", "the bank sued .")
    assert part.labels.tolist() == [0, 1, 2] * 8


def test_validation_rows_are_those_that_the_bilm_never_saw(builtin):
    _, validation = split(300, 40, 7)               # of ELMO.py --rows 300 --validation 40 --seed 7
    texts = read_ag_news("train").description.tolist()
    task = ag_news_task("description", 40, 7, 300)
    assert task.validation.texts == [(texts[i],) for i in validation]
    assert len(task.train) == 560
    assert len(task.test) == 100


@pytest.mark.parametrize("more, stem", [
    (["--task", "sst2"], "sst2"),
    (["--task", "sst5", "--no-phrases", "--adapt", "1"], "adapted_sst5"),
    (["--task", "nli", "--validation", "6", "--finetune"], "nli_finetuned"),
    (["--fields", "title+description", "--rows", "90"], "titled"),
    (["--finetune", "--setting", "function", "--epochs", "0.2"], "finetuned")])
def test_every_task_runs_from_its_files_to_predictions(builtin, tasks, whole, bilm, tmp_path, more, stem):
    out = tmp_path / "out"
    argv = arguments("classification.py", out, whole / "bilstm.pt", "--setting", "all", *more)
    assert classification.main(argv) == 0
    assert [name for name in files(out) if "figures/" not in name] == [f"{stem}.json", f"{stem}.pt"]
    holds_bilm = "--finetune" in more or "--adapt" in more
    clf = Classifier.load(out / f"{stem}.pt", None if holds_bilm else whole / "bilstm.pt")
    text = ("the bank", "the court sued .") if clf.config.two_texts else "the bank sued ."
    prediction, = clf.predict([text])
    assert prediction["label"] in clf.labels
    assert sum(prediction["probabilities"].values()) == pytest.approx(1)
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
        assert found["accuracy"] == pytest.approx(correct.double().mean().item())
        nll = F.nll_loss(p.log(), gold).item()
        assert found["nll"] == pytest.approx(nll, rel=1e-4)
    on_validation = [seed["accuracy"] for seed in result["validation"]["seeds"]]
    assert on_validation[best] == max(on_validation)
    predictions = np.array(list(result["predictions"]), dtype=int)
    _, labels = parts["test"]
    assert np.mean(predictions == labels) == pytest.approx(result["test"]["ensemble"]["accuracy"])
    if setting != "function":
        s = clf.head.mix.w.softmax(dim=0)
        assert s.tolist() == pytest.approx(result["s"][best])


def test_the_frozen_weights_after_training_are_those_of_a_new_head_of_the_seed(whole):
    frozen = numbers("classification", whole)["settings"]["frozen"]
    assert frozen["gamma"] == [1, 1]
    first, second = frozen["s"]
    assert first != pytest.approx(second, abs=0.01)
    for seed, s in enumerate((first, second)):
        head = Head(Config(hidden=9), "frozen", 3, 10, 2).initialize(seed)      # of another size
        assert s == pytest.approx(head.mix.w.softmax(dim=0).tolist())


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
    with pytest.raises(InputError, match="trained on another biLM"):
        Classifier.load(whole / "classifier.pt", tmp_path / "other.pt")
    with pytest.raises(InputError, match="needs the biLM"):
        Classifier.load(whole / "classifier.pt")


@pytest.mark.parametrize("texts, message", [
    (["a", " \n"], "text 1 has no words"), ("text", "one string"), ([3], "text 0 is of type int")])
def test_a_text_that_cannot_be_classified_is_named(whole, texts, message):
    with pytest.raises(InputError, match=message):
        classifier(whole).predict(texts)


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


# ------------------------------------------------------------------------------------- metrics of language models
def test_ranks_count_the_words_with_a_higher_logit_and_never_padding():
    logits = torch.tensor([90, 2, 5, 4, 4, 1, 3])               # of the words 0 to 6; word 0 is <pad>
    gold = torch.tensor([2, 3, 4, 6, 1, 5])
    table = logits[:, None].float()
    states = torch.ones(6, 1)
    nll, found, best, rank = full_softmax_nll(states, gold, table, torch.zeros(7, 1), details=True)
    assert found.tolist() == gold.tolist()
    assert best.tolist() == [2] * 6
    assert rank.tolist() == [0, 1, 1, 3, 4, 5]                  # words 3 and 4 are equal: neither is before the other
    log_z = math.log(math.exp(2) + math.exp(5) + 2 * math.exp(4) + math.exp(1) + math.exp(3))
    expected = [log_z - logit for logit in (5, 4, 4, 3, 2, 1)]
    assert nll.tolist() == pytest.approx(expected)


def test_a_word_is_in_the_top_5_if_at_most_four_words_are_before_it():
    gold = np.array([7, 7, 8, 8, 9])
    best = np.array([7, 8, 7, 8, 6])
    found = word_metrics(gold, best, rank=np.array([0, 4, 5, 0, 6]))
    assert found["accuracy"] == pytest.approx(2 / 5)
    assert found["top5_accuracy"] == pytest.approx(3 / 5)
    # word 7: 1 of 2 predicted and 1 of 2 gold ones; word 8 the same; word 9 is never predicted
    for name in ("macro_precision", "macro_recall", "macro_f1"):
        assert found[name] == pytest.approx(1 / 3), name
    assert word_metrics(gold[:0], best[:0], best[:0]) == {}


def tokens(*columns: list) -> tuple[np.ndarray, ...]:
    """Predicted tokens of a batch: their rows, nll, gold words, best words and ranks."""
    return tuple(np.array(column) for column in columns)


def scores_of_three_rows() -> Scores:
    """Scores of the rows 7, 2 and 5 with 2, 1 and 2 tokens, which two batches have scored in another order."""
    first_forward = tokens(
        [5, 2, 5],              # rows
        [1.0, 4.0, 2.0],        # nll
        [3, 2, 3],              # gold words
        [3, 4, 4],              # best words
        [0, 5, 1])              # ranks
    first_backward = tokens(
        [2, 5, 5],
        [3.0, 1.0, 1.0],
        [2, 3, 3],
        [2, 3, 3],
        [0, 0, 0])
    second_forward = tokens(
        [7, 7],
        [0.5, 0.5],
        [4, 4],
        [4, 4],
        [0, 0])
    second_backward = tokens(
        [7, 7],
        [0.0, 2.0],
        [4, 4],
        [4, 2],
        [0, 6])
    batches = [(first_forward, first_backward), (second_forward, second_backward)]
    return Scores.of(np.array([7, 2, 5]), np.array([2, 1, 2]), batches)


def test_scores_are_summed_by_row_whatever_the_order_of_batches():
    scores = scores_of_three_rows()
    assert scores.nll.tolist() == [[1, 4, 3], [2, 3, 2]]
    forward, backward = scores.totals().values()
    assert forward == pytest.approx({"nll": 8, "tokens": 5, "perplexity": math.exp(8 / 5)})
    assert backward == pytest.approx({"nll": 7, "tokens": 5, "perplexity": math.exp(7 / 5)})


def test_the_metrics_of_chosen_rows_are_those_of_their_words():
    found = scores_of_three_rows().metrics(np.array([False, True, True]))       # the rows 2 and 5
    assert found["rows"] == 2
    assert found["tokens"] == 3
    forward = found["forward"]
    assert forward["nll"] == pytest.approx(7 / 3)
    assert forward["perplexity"] == pytest.approx(math.exp(7 / 3))
    assert forward["bits_per_token"] == pytest.approx(7 / 3 / 0.693147)         # ln 2
    assert forward["accuracy"] == pytest.approx(1 / 3)
    assert forward["top5_accuracy"] == pytest.approx(2 / 3)
    assert found["backward"]["accuracy"] == 1


def test_the_confusion_of_words_has_the_most_frequent_ones_first_and_the_others_as_one(monkeypatch):
    monkeypatch.setattr(metrics, "FREQUENT_WORDS", 2)
    gold = np.array([1, 2, 2, 2, 3, 3, 4])
    best = np.array([2, 2, 3, 1, 3, 2, 4])
    found = word_confusion(gold, best, ["<pad>", "a", "b", "c", "d"])
    assert found == {"words": ["b", "c", "(other)"], "counts": [[1, 1, 1], [1, 1, 0], [1, 0, 1]]}


# --------------------------------------------------------------------------------------------- metrics of classifiers
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
    product = 0.5 * 0.8**2 * 0.1**3             # of the probabilities of the gold classes
    assert found["nll"] == pytest.approx(-math.log(product) / 6)
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
    assert numbers["frozen"]["accuracy"] == [0.5, 0.5]


def test_the_best_seed_is_chosen_on_validation_rows_and_predictions_are_those_of_the_ensemble():
    first = torch.tensor([
        [0.9, 0.1],
        [0.6, 0.4],
        [0.2, 0.8]])
    second = torch.tensor([
        [0.4, 0.6],
        [0.3, 0.7],
        [0.4, 0.6]])
    heads = {"frozen-0": first, "frozen-1": second}
    p = {"train": heads, "validation": heads, "test": heads}
    gold = {"train": np.array([0, 0, 1]), "validation": np.array([1, 1, 1]), "test": np.array([0, 0, 1])}
    found = classification_numbers(p, gold, ["frozen-0", "frozen-1"], ["a", "b"], np.array([True, False, False]))
    assert found["best"] == 1                               # although the first one is better on test rows
    assert found["predictions"] == "011"                    # mean probabilities of "a": 0.65, 0.45 and 0.3
    assert found["test"]["fresh"]["accuracy"]["mean"] == pytest.approx(1 / 2)
    assert "fresh" not in found["validation"]


def test_the_calibration_error_weighs_the_gap_of_each_bin_by_its_rows():
    gold = np.array([0, 0, 0, 1])
    p = np.array([
        [0.99, 0.01],                   # two rows in the last bin, both right: a gap of 0.01 + 0.03
        [0.97, 0.03],
        [0.65, 0.35],                   # two rows of another bin, one right: a gap of 0.65 + 0.64 - 1
        [0.64, 0.36]])
    found = classification_metrics(p, gold, ["a", "b"])
    assert found["calibration_error"] == pytest.approx((0.04 + 0.29) / 4)
