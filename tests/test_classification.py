"""The classifier: the mix by hand, heads side by side, what stays frozen, whole runs of every task, wrong inputs."""
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SENTENCES, tiny
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

import classification
import ELMO
from classification import Classifier, Config, Head, ScalarMix, Texts, Trainer, Vectors, metrics
from data import sample
from data.files import InputError, read_published, write_published
from data.ngrams import Ngrams
from data.prepare import (
    NLI_LABELS,
    Part,
    ag_news_task,
    read_ag_news,
    read_pairs,
    read_trees,
    spans,
    split,
    static_vectors,
    svd,
    word2vec,
)
from report import baselines, figures, readme

SMALL = ["--hidden", "6", "--batch-tokens", "300", "--epochs", "2", "--log-every", "50"]
TREES = ["(3 (2 It) (4 (2 's) (4 great)))", "(1 (2 A) (0 (0 bad) (2 film)))", "(2 (2 So) (2 so))",
         "(4 (3 Very) (4 good))"]


@pytest.fixture(scope="module")
def bilm(corpus, tmp_path_factory):
    """A folder with bilstm.pt, a tiny biLM of the built-in corpus."""
    folder = tmp_path_factory.mktemp("bilm")
    texts = [text for _, _, text in sample.generate(600)]
    ELMO.ELMo.train(texts, tiny(validation=60, epochs=2.0, batch_tokens=300)).save(folder / "bilstm.pt")
    return folder


@pytest.fixture(scope="module")
def whole(bilm, corpus, tmp_path_factory):
    """The folder of a bare run with two seeds."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AG_NEWS_DIR", str(corpus))
        assert run(bilm, out, "--seeds", "2") == 0
    return out


def run(bilm, out, *more: str) -> int:
    return classification.main(["--out", str(out), "--bilstm", str(bilm / "bilstm.pt"), *SMALL, *more])


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Folders of tiny SST and NLI files, named by $SST_DIR and $NLI_DIR."""
    for part in ("train", "dev", "test"):
        (tmp_path / f"{part}.txt").write_text("\n".join(TREES * 3) + "\n")
    rows = [f"{label}\tthe bank sued the court .\tthe {word} sued .\n" for label, word in
            zip(NLI_LABELS, ("bank", "judge", "court"), strict=True)]
    for name in ("mnli_train_subset", "mnli_eval_easycl", "snli_train_subset"):
        (tmp_path / f"{name}.tsv").write_text("".join(rows * 8))
    monkeypatch.setenv("SST_DIR", str(tmp_path))
    monkeypatch.setenv("NLI_DIR", str(tmp_path))
    return tmp_path


def head_of(config: Config, setting: str, seeds=(0,), J=3, D=8) -> Head:
    return Head.of_seeds(seeds, config, setting, J, D, 4)


# ------------------------------------------------------------------------------------------------------ parts
def test_the_scalar_mix_is_gamma_times_the_softmax_weighted_sum_of_the_layers():
    mix = ScalarMix(3, frozen=False)
    mix.w.data, mix.gamma.data = torch.tensor([[0.5, -1.0, 2.0], [0.0, 0.0, 0.0]]), torch.tensor([[1.5], [2.0]])
    h = np.random.default_rng(0).normal(size=(3, 2, 4, 5, 6)).astype(np.float32)
    e = np.exp([0.5, -1.0, 2.0])
    first = 1.5 * (e[0] * h[0] + e[1] * h[1] + e[2] * h[2]) / e.sum()
    second = 2.0 * (h[0] + h[1] + h[2]) / 3
    assert np.allclose(mix(torch.from_numpy(h)).detach().numpy(), np.stack([first, second]), atol=1e-5)


def test_the_frozen_mix_is_drawn_by_the_seed_has_gamma_1_and_does_not_learn():
    a, b, again = (head_of(Config(), "frozen", [seed]).mix for seed in (0, 1, 0))
    assert not torch.equal(a.w, b.w) and torch.equal(a.w, again.w)
    assert float(a.gamma) == 1 and not any(p.requires_grad for p in a.parameters())
    assert torch.equal(a.w, a.w.half().float()), "the file's half precision holds it exactly"


@pytest.mark.parametrize("knobs", [{}, {"task": "nli"}])
@pytest.mark.parametrize("setting", classification.SETTINGS)
def test_heads_side_by_side_compute_what_each_computes_alone(setting, knobs):
    config = Config(hidden=5, **knobs)
    h, n = torch.randn(3, 2, 6, 4, 8), torch.tensor([6, 3, 1, 0])
    both = head_of(config, setting, [3, 4])(h, n)
    for s, seed in enumerate((3, 4)):
        assert torch.allclose(both[s], head_of(config, setting, [seed])(h, n)[0], atol=1e-6)
    assert torch.isfinite(both).all() and not torch.allclose(both[0], both[1])


@pytest.mark.parametrize("knobs", [{}, {"task": "nli"}])
def test_what_stands_in_the_padding_does_not_matter(knobs):
    head, n = head_of(Config(hidden=5, **knobs), "trainable"), torch.tensor([2, 6, 4, 0])
    h = torch.randn(3, 2, 6, 4, 8)
    other = h.clone()
    for b, words in enumerate(n):
        other[:, :, words:, b] = torch.randn(3, 2, 6 - int(words), 8)
    assert torch.allclose(head(h, n), head(other, n), atol=1e-6)


def test_each_seeds_gradient_is_clipped_on_its_own():
    head = head_of(Config(hidden=5), "trainable", [0, 1])
    for p in head.parameters():
        p.grad = torch.ones_like(p)
        p.grad.chunk(2)[1].mul_(1e-6)
    head.clip(1.0)
    for s, expected in ((0, 1.0), (1, 1e-6 * sum(p.numel() / 2 for p in head.parameters()) ** 0.5)):
        norm = sum(float(p.grad.chunk(2)[s].square().sum()) for p in head.parameters()) ** 0.5
        assert norm == pytest.approx(expected, rel=1e-4)


def test_w_and_gamma_learn_at_their_own_rate_and_everything_else_at_the_heads(builtin, bilm):
    trainer = trainer_of(ELMO.ELMo.load(bilm / "bilstm.pt"), Config(hidden=6))
    fast = {id(p) for group in trainer.adamw.param_groups if group["highest"] == 2e-2 for p in group["params"]}
    head = trainer.live["trainable"]
    assert fast == {id(head.mix.w), id(head.mix.gamma)}
    assert sum(len(group["params"]) for group in trainer.adamw.param_groups) == sum(
        p.requires_grad for p in trainer.live.parameters())


def test_the_averaged_weights_are_those_of_the_formula(builtin, bilm):
    trainer = trainer_of(ELMO.ELMo.load(bilm / "bilstm.pt"), Config(hidden=6, batch_tokens=300, ema=0.15))
    expected = None
    for step in range(30):
        trainer.step(step)
        if step % 10 == 9:
            now = trainer.live["function"].out.weight.detach().clone()
            k = step // 10
            expected = now if k == 0 else torch.lerp(expected, now, 1 - min(0.15, k / (k + 9)))
    assert torch.allclose(trainer.model["function"].out.weight, expected, atol=1e-6)


def trainer_of(elmo: ELMO.ELMo, config: Config) -> Trainer:
    """On the built-in rows that $AG_NEWS_DIR names."""
    task = ag_news_task("description", 60, 0)
    parts = {name: Texts(getattr(task, name), elmo) for name in ("train", "validation")}
    return Trainer(config, Vectors("elmo", elmo.model), parts, 4, [0])


def test_validation_rows_are_those_that_the_bilm_never_saw(builtin):
    _, held_out = split(300, 40, 7)             # of ELMO.py --rows 300 --validation 40 --seed 7
    texts = read_ag_news("train").description.tolist()
    task = ag_news_task("description", 40, 7, 300)
    assert [text for text, in task.validation.texts] == [texts[i] for i in held_out]
    assert len(task.train) == 560 and len(task.test) == 100


def test_the_head_reads_the_vectors_that_users_receive_in_reading_order_and_from_the_end(elmo):
    texts = Texts(Part([(text,) for text in SENTENCES], np.zeros(4, dtype=np.int64)), elmo)
    h, n = Vectors("elmo", elmo.model)(texts, np.arange(4), torch.float32)
    for b, vectors in enumerate(elmo.embed(SENTENCES)):
        assert n[b] == vectors.shape[1]
        assert torch.allclose(h[:, 0, :n[b], b], vectors, atol=1e-5)
        assert torch.allclose(h[:, 1, :n[b], b], vectors.flip(1), atol=1e-5)
    top, _ = Vectors("layer2", elmo.model)(texts, np.arange(4), torch.float32)
    mean, _ = Vectors("average", elmo.model)(texts, np.arange(4), torch.float32)
    below, _ = Vectors("layer0", elmo.model)(texts, np.arange(4), torch.float32)
    assert torch.equal(top[0], h[2]) and torch.allclose(mean[0], h.mean(dim=0), atol=1e-6)
    assert torch.equal(below[0, 0], h[0, 0, ..., :below.shape[-1]])


def test_static_vectors_are_looked_up_in_both_orders(elmo):
    texts = Texts(Part([("oil prices fall .",), ("goal !",)], np.zeros(2, dtype=np.int64)), elmo)
    table = torch.randn(len(elmo.words), 5)
    h, n = Vectors("svd", elmo.model, table)(texts, np.arange(2), torch.float32)
    ids = elmo.words.ids(["oil", "prices", "fall", "."])
    assert torch.equal(h[0, 0, :, 0], table[ids]) and torch.equal(h[0, 1, :, 0], table[ids[::-1].copy()])
    assert n.tolist() == [4, 2]


def test_metrics_are_those_of_a_matrix_worked_out_on_paper():
    gold = np.array([0, 0, 0, 1, 1, 2])
    found = np.array([0, 0, 1, 1, 0, 1])
    p = np.full((6, 3), 0.1)
    p[np.arange(6), found] = 0.8
    m = metrics(p, gold, ["a", "b", "c"])
    assert m["confusion"] == [[2, 1, 0], [1, 1, 0], [0, 1, 0]]
    assert m["accuracy"] == pytest.approx(3 / 6)
    assert m["classes"]["a"] == {"precision": pytest.approx(2 / 3), "recall": pytest.approx(2 / 3),
                                 "f1": pytest.approx(2 / 3), "rows": 3}
    assert m["classes"]["b"] == {"precision": pytest.approx(1 / 3), "recall": 0.5, "f1": pytest.approx(0.4), "rows": 2}
    assert m["classes"]["c"] == {"precision": 0, "recall": 0, "f1": 0, "rows": 1}
    assert m["macro_precision"] == pytest.approx(1 / 3) and m["macro_recall"] == pytest.approx(7 / 18)
    assert m["macro_f1"] == pytest.approx((2 / 3 + 0.4) / 3)
    assert m["calibration_error"] == pytest.approx(0.8 - 0.5)           # all in one bin
    assert m["nats"] == pytest.approx(-(3 * np.log(0.8) + 3 * np.log(0.1)) / 6)


def test_mcnemar_counts_the_rows_that_one_alone_has_right():
    right = np.array([True] * 10 + [False] * 2 + [True] * 5)
    other = np.array([False] * 10 + [True] * 2 + [True] * 5)
    found = baselines.mcnemar(right, other)
    assert (found["only_this"], found["only_that"]) == (10, 2)
    assert found["p"] == pytest.approx(2 * (1 + 12 + 66) / 2**12)      # two-sided binomial of 12 fair throws
    assert found["difference"] == pytest.approx(8 / 17)
    assert found["interval"][0] < 8 / 17 < found["interval"][1]
    assert baselines.mcnemar(right, right)["p"] == 1


def test_a_tree_is_its_phrases_inner_ones_first():
    assert spans("(3 (2 It) (4 (2 's) (4 -LRB-)))") == [
        (2, "It"), (2, "'s"), (4, "("), (4, "'s ("), (3, "It 's (")]
    assert spans(r"(2 (2 and\/or) (2 \*))") == [(2, "and/or"), (2, "*"), (2, "and/or *")]
    for wrong in ("", "it", "(3 it", "3 it)", "(7 it)", "(3)", "(3 (2 it)) x", "((3 it))", "(2 a) (3 b)", "(2 a)("):
        assert not spans(wrong), wrong


def test_trees_give_roots_or_every_phrase_once_and_binary_leaves_neutral_ones_out(tasks):
    roots = read_trees(tasks / "test.txt", phrases=False, binary=False)
    assert len(roots) == 12 and roots.texts[0] == ("It 's great",) and roots.labels[:4].tolist() == [3, 1, 2, 4]
    assert read_trees(tasks / "test.txt", False, True).labels[:3].tolist() == [1, 0, 1]
    phrases = read_trees(tasks / "train.txt", True, True)
    assert len(phrases) == 9 and dict(zip((text for text, in phrases.texts), phrases.labels.tolist(), strict=True)) == {
        "'s great": 1, "A bad film": 0, "It 's great": 1, "Very": 1, "Very good": 1, "bad film": 0, "bad": 0, "good": 1,
        "great": 1}


def test_svd_places_words_of_the_same_neighbours_together(elmo):
    words = ["cat", "dog", "sat", "ran", "oil", "gas", "rose", "fell"]
    rows = [f"{a} {v}" for a in ("cat", "dog") for v in ("sat", "ran")] * 5 + \
           [f"{a} {v}" for a in ("oil", "gas") for v in ("rose", "fell")] * 5
    data = ELMO.Data.of(rows, tiny(), np.arange(len(rows)), np.arange(0))
    table = svd(data, 4, seed=0)
    table = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-9)
    cat, dog, oil = (table[data.words.index[word]] for word in (words[0], words[1], words[4]))
    assert cat @ dog > 0.9 and abs(cat @ oil) < 0.5


# ------------------------------------------------------------------------------------------------- whole runs
def test_a_run_writes_classifier_numbers_and_figures_and_nothing_else(whole):
    pictures = {f"confusion_{s}_{p}.png" for s in classification.SETTINGS for p in ("train", "test")}
    assert set(os.listdir(whole)) == {"classifier.pt", "classification.json", "curves_classification.png"} | pictures
    result = json.loads((whole / "classification.json").read_text())
    for numbers in result["settings"].values():
        assert [numbers[part]["together"]["rows"] for part in ("train", "validation", "test")] == [540, 60, 100]
        assert sum(map(sum, numbers["test"]["together"]["confusion"])) == 100
        found = np.array(list(numbers["predictions"]), dtype=int)
        gold = gold_labels(100)
        assert (found == gold).mean() == pytest.approx(numbers["test"]["together"]["accuracy"])
        seeds = [seed["accuracy"] for seed in numbers["test"]["seeds"]]
        assert numbers["test"]["accuracy"]["mean"] == pytest.approx(np.mean(seeds))
        assert numbers["test"]["accuracy"]["deviation"] == pytest.approx(abs(seeds[0] - seeds[1]) / 2**0.5)
    for s in result["settings"]["trainable"]["s"]:
        assert sum(s) == pytest.approx(1, abs=1e-5)


def gold_labels(rows: int) -> np.ndarray:
    """Gold labels of the built-in test rows."""
    return np.array([label - 1 for label, _, _ in sample.stream_rows(rows, 0, stream=1)])


def test_the_frozen_weights_are_the_same_before_and_after_training_and_from_the_file(whole, bilm):
    result = json.loads((whole / "classification.json").read_text())
    saved = torch.load(whole / "classifier.pt", weights_only=True)
    for i, member in enumerate(saved["members"]):
        if member["setting"] != "function":
            drawn = head_of(Config(hidden=6), member["setting"], [member["seed"]], D=24).mix.w
            same = torch.equal(saved["weights"][f"head.{i}.mix.w"].float(), drawn)
            assert same == (member["setting"] == "frozen")
    clf = Classifier.load(whole / "classifier.pt", bilm / "bilstm.pt", setting="frozen")
    best = result["settings"]["frozen"]["best"]
    assert clf.members[0][0].mix.s()[0].tolist() == pytest.approx(result["settings"]["frozen"]["s"][best])
    assert result["settings"]["frozen"]["gamma"] == [1, 1]


def test_training_leaves_the_bilm_as_it_was(builtin, bilm, tmp_path):
    before = (bilm / "bilstm.pt").read_bytes()
    elmo = ELMO.ELMo.load(bilm / "bilstm.pt")
    weights = {name: value.clone() for name, value in elmo.model.state_dict().items()}
    for knobs in ({}, {"finetune": True, "unfreeze": 0.0, "bilm_lr": 0.01}):
        trainer = trainer_of(elmo, Config(hidden=6, batch_tokens=300, **knobs))
        for step in range(4):
            trainer.step(step)
        moved = trainer.live["bilm"].state_dict() if knobs else {}
        assert all(not torch.equal(moved[name], weights[name]) for name in moved if name != "table_bias")
    assert run(bilm, tmp_path, "--setting", "function") == 0
    assert all(torch.equal(value, weights[name]) for name, value in elmo.model.state_dict().items())
    assert (bilm / "bilstm.pt").read_bytes() == before


def test_lower_layers_of_a_bilm_that_learns_wait_for_their_turn(builtin, bilm):
    elmo = ELMO.ELMo.load(bilm / "bilstm.pt")
    trainer = trainer_of(elmo, Config(hidden=6, batch_tokens=300, finetune=True, unfreeze=0.2))
    names = {"layers.1.w_x": 0.2, "layers.0.w_x": 0.4, "table": 0.6}
    first = {}
    for step in range(trainer.steps):
        before = {name: trainer.live["bilm"].state_dict()[name].clone() for name in names}
        trainer.step(step)
        for name in names:
            if not torch.equal(before[name], trainer.live["bilm"].state_dict()[name]):
                first.setdefault(name, step / trainer.steps)
    assert all(names[name] <= first[name] < names[name] + 0.1 for name in names)


def test_the_file_predicts_what_the_run_measured(whole, bilm, builtin):
    test = read_ag_news("test")
    result = json.loads((whole / "classification.json").read_text())
    for setting in classification.SETTINGS:
        clf = Classifier.load(whole / "classifier.pt", bilm / "bilstm.pt", setting)
        hits = [clf.labels.index(found["label"]) + 1 == gold for found, gold in
                zip(clf.predict(test.description.tolist()), test["class"], strict=True)]
        numbers = result["settings"][setting]
        assert np.mean(hits) == pytest.approx(numbers["test"]["seeds"][numbers["best"]]["accuracy"], abs=0.011)
    known = {s: n["validation"]["seeds"][n["best"]]["accuracy"] for s, n in result["settings"].items()}
    best = max(known, key=known.get)
    clf = Classifier.load(whole / "classifier.pt", bilm / "bilstm.pt")
    assert type(clf.members[0][0].mix).__name__ == ("LayerFunction" if best == "function" else "ScalarMix")


def test_a_prediction_depends_neither_on_batch_mates_nor_on_their_order(whole, bilm):
    clf = Classifier.load(whole / "classifier.pt", bilm / "bilstm.pt", "trainable")
    texts = [text for _, _, text in sample.generate(40, seed=5)] + ["bank", "ünïcode ☃ 漢字", "the court " * 200]
    together = clf.probabilities(texts)
    assert torch.allclose(together.sum(dim=1), torch.ones(len(texts)), atol=1e-5)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    shuffled = clf.probabilities([texts[i] for i in order])
    alone = torch.cat([clf.probabilities([text]) for text in texts])
    assert torch.allclose(shuffled, together[order], atol=1e-5) and torch.allclose(alone, together, atol=1e-5)
    assert clf.predict([]) == [] and clf.probabilities([]).shape == (0, 4)


@pytest.mark.parametrize("texts, message", [
    ([""], "text 0 has no words"), (["a", " \n"], "text 1 has no words"), ("text", "one string"), ([3], "type int")])
def test_texts_that_cannot_be_classified_are_named(whole, bilm, texts, message):
    with pytest.raises(InputError, match=message):
        Classifier.load(whole / "classifier.pt", bilm / "bilstm.pt").predict(texts)


@pytest.mark.parametrize("more, files", [
    (["--task", "sst2"], {"sst2.pt", "sst2.json", "curves_sst2.png"}),
    (["--task", "sst5", "--no-phrases", "--adapt", "1"], {"sst5.pt", "sst5.json", "curves_sst5.png"}),
    (["--task", "nli", "--validation", "6"], {"nli.pt", "nli.json", "curves_nli.png"}),
    (["--task", "nli", "--validation", "6", "--finetune"],
     {"nli_finetuned.pt", "nli_finetuned.json", "curves_nli_finetuned.png"}),
    (["--fields", "title+description", "--finetune", "--ngrams", "--seeds", "2", "--ensemble"],
     {"titled.pt", "titled_ensemble.pt", "titled.json", "curves_titled.png"}),
    (["--finetune", "--seeds", "2", "--ensemble"],
     {"finetuned.pt", "ensemble.pt", "finetuned.json", "curves_finetuned.png"})])
def test_every_task_runs_from_its_files_to_predictions(builtin, tasks, bilm, tmp_path, monkeypatch, more, files):
    out = tmp_path / "out"
    monkeypatch.setattr("data.ngrams.COLUMNS", 2**12)
    assert run(bilm, out, *more) == 0
    found = set(os.listdir(out))
    assert files <= found and all(name.startswith("confusion_") for name in found - files)
    for file in files:
        if file.endswith(".pt"):
            own = "--finetune" in more or "--adapt" in more
            clf = Classifier.load(out / file, None if own else bilm / "bilstm.pt")
            pair = clf.config.pair or "title" in clf.config.fields
            answers = clf.predict([("the bank", "the court sued .")] if pair else ["the bank sued ."])
            assert answers[0]["label"] in clf.labels and sum(answers[0]["probabilities"].values()) == pytest.approx(1)
            assert len(clf.members) == (2 if "ensemble" in file else 1)
            assert (clf.ngrams is not None) == ("--ngrams" in more)


def test_a_linear_models_share_is_in_the_file_as_it_was_measured(builtin, bilm, tmp_path, monkeypatch):
    monkeypatch.setattr("data.ngrams.COLUMNS", 2**12)
    assert run(bilm, tmp_path, "--ngrams", "--setting", "frozen", "--seeds", "2", "--ensemble", "--epochs", "0.2") == 0
    result = json.loads((tmp_path / "classification.json").read_text())
    share, test = result["ngrams"]["share"], result["settings"]["frozen"]["test"]
    clf = Classifier.load(tmp_path / "classifier_ensemble.pt", bilm / "bilstm.pt")
    texts = read_ag_news("test").description.tolist()
    rows = [(text,) for text in texts]
    assert share > 0, "the head has hardly begun to learn"
    found = [str(clf.labels.index(answer["label"])) for answer in clf.predict(texts)]
    assert sum(a != b for a, b in zip(found, result["settings"]["frozen"]["predictions"], strict=True)) <= 1
    q, plain = clf.ngrams.probabilities(rows), Classifier(clf.config, clf.labels, clf.members).probabilities(texts)
    assert np.mean(q.argmax(dim=1).numpy() == gold_labels(100)) == pytest.approx(result["ngrams"]["accuracy"]["test"])
    assert np.mean(plain.argmax(dim=1).numpy() == gold_labels(100)) == pytest.approx(
        test["without_ngrams"]["together"]["accuracy"], abs=0.011)
    text = readme.filled("<!-- classification.json -->old<!-- end -->", tmp_path)
    assert "without n-grams" in text and f"its share is {share:.4g}" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1, "as many cells in a row"


def test_the_linear_model_is_scikit_learns_over_all_words_and_pairs():
    words, order = ["oil", "prices", "team", "won", "chip", "war"], np.random.default_rng(0)
    texts = [" ".join(order.choice(words, size=6)) for _ in range(60)]
    rows = [tuple(text.split(" ", 1)) for text in texts]        # a row's texts are read as one
    gold = np.array([("oil" in text) + 2 * ("war" in text) for text in texts]) % 3
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    expected = LogisticRegression(C=30).fit(vectorizer.fit_transform(texts), gold)
    p = Ngrams.fit(rows, gold, 4).probabilities(rows).numpy()
    assert np.allclose(p[:, :3], expected.predict_proba(vectorizer.transform(texts)), atol=5e-3)
    assert (p[:, 3] == 0).all(), "no row is of the fourth class"
    two = Ngrams.fit(rows, (gold > 0).astype(int), 2)
    assert np.mean(two.probabilities(rows).argmax(dim=1).numpy() == (gold > 0)) > 0.9


def test_the_share_of_the_linear_model_is_the_one_of_lowest_cross_entropy():
    model = Ngrams.fit([("oil",), ("war",)], np.array([0, 1]), 2)
    q, gold = torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 1])
    knows_nothing, knows_all = torch.full((1, 2, 2), 0.5), torch.tensor([[[0.99, 0.01], [0.01, 0.99]]])
    model.choose([knows_nothing], q, gold)
    assert float(model.weights["share"]) == 0.5
    assert model.mixed(knows_nothing, q)[0, 0, 0] == pytest.approx(0.9**0.5 / (0.9**0.5 + 0.1**0.5))
    model.choose([knows_all], q, gold)
    assert float(model.weights["share"]) == 0
    gold_odds = np.log([[0.8 / 0.2, 0.3 / 0.7], [0.99 / 0.01, 0.99 / 0.01], [0.1 / 0.9, 0.9 / 0.1]])    # p, all, q
    def best(others: list[int]) -> float:
        nats = [np.log1p(np.exp(-((1 - a / 16) * gold_odds[others] + a / 16 * gold_odds[2]))).mean() for a in range(9)]
        return float(np.argmin(nats)) / 16
    p, q = torch.tensor([[[0.8, 0.2], [0.7, 0.3]]]), torch.tensor([[0.1, 0.9], [0.1, 0.9]])
    for others, expected in (([p], best([0])), ([p, knows_all], best([0, 1]))):
        model.choose(others, q, gold)
        assert float(model.weights["share"]) == expected not in (0, 0.5)
    assert best([0]) != best([0, 1]), "all of the others are asked"


def test_the_word2vec_baseline_is_skip_gram_and_elmos_start_is_not(elmo, monkeypatch):
    import gensim.models
    made = []
    monkeypatch.setattr(gensim.models, "Word2Vec", lambda *_, sg, **knobs: made.append(sg) or SimpleNamespace(
        wv=SimpleNamespace(key_to_index={})))
    data = ELMO.Data.of(SENTENCES, tiny(), np.arange(4), np.arange(0))
    static_vectors("word2vec", data, 4, 1, 0)
    word2vec(data, 4, 1, 0)
    assert made == [1, 0]


@pytest.mark.parametrize("kind", ["layer0", "layer2", "average", "untrained", "word2vec", "svd"])
def test_every_kind_of_vectors_runs_under_the_same_head(builtin, bilm, tmp_path, kind):
    assert run(bilm, tmp_path, "--vectors", kind, "--epochs", "1") == 0
    assert set(os.listdir(tmp_path)) == {f"{kind}.json", f"curves_{kind}.png", f"confusion_{kind}_trainable_train.png",
                                         f"confusion_{kind}_trainable_test.png"}


@pytest.mark.parametrize("knobs", [{"representation": "char"}, {"width": 8}, {"skip": False},
                                   {"representation": "word2vec", "freeze_word2vec": True}])
def test_any_bilm_can_be_classified_with_and_fine_tuned(builtin, tmp_path, knobs):
    texts = [text for _, _, text in sample.generate(600)]
    ELMO.ELMo.train(texts, tiny(validation=60, epochs=0.5, batch_tokens=300, **knobs)).save(tmp_path / "bilstm.pt")
    for more in (["--epochs", "0"], ["--finetune", "--rows", "50"], ["--vectors", "svd"], ["--adapt", "1"]):
        assert run(tmp_path, tmp_path, *more, "--setting", "function") == 0
    result = json.loads((tmp_path / "finetuned.json").read_text())
    assert result["settings"]["function"]["train"]["together"]["rows"] == 50
    alone = Classifier.load(tmp_path / "classifier.pt", tmp_path / "bilstm.pt").predict(["the bank sued ."])
    assert len(alone) == 1 and Classifier.load(tmp_path / "adapted.pt").predict(["the bank sued ."])


def test_an_adapted_bilm_knows_the_words_of_its_task(tasks, bilm, tmp_path):
    assert run(bilm, tmp_path / "out", "--task", "sst5", "--adapt", "1", "--setting", "trainable") == 0
    words = torch.load(tmp_path / "out" / "sst5.pt", weights_only=True)["bilm"]["words"]
    known = ELMO.ELMo.load(bilm / "bilstm.pt").words.words
    assert words[:len(known)] == known and {"great", "film", "'s"} <= set(words) and "great" not in known


def test_baselines_and_their_differences_from_the_jsons(builtin, whole, bilm, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(whole / "classification.json", out)
    argv = ["--out", str(out), "--bilstm", str(bilm / "bilstm.pt"), "--build", str(tmp_path / "b"), *SMALL,
            "--seeds", "2", "--epochs", "0.5"]
    assert baselines.main(argv) == 0
    result = json.loads((out / "baselines.json").read_text())
    assert list(result["rows"]) == ["tfidf", *baselines.VECTORS, *classification.SETTINGS]
    gold = gold_labels(100)
    found = json.loads((whole / "classification.json").read_text())["settings"]["function"]["predictions"]
    other = json.loads((tmp_path / "b" / "word2vec.json").read_text())["settings"]["trainable"]["predictions"]
    hit, miss = ([int(c) == g for c, g in zip(text, gold, strict=True)] for text in (found, other))
    against = result["rows"]["function"]["against"]["word2vec"]
    assert against["only_this"] == sum(a and not b for a, b in zip(hit, miss, strict=True))
    times = {name: os.stat(tmp_path / "b" / name).st_mtime_ns for name in os.listdir(tmp_path / "b")}
    assert baselines.main(argv) == 0, "what is finished is not trained again"
    assert times == {name: os.stat(tmp_path / "b" / name).st_mtime_ns for name in os.listdir(tmp_path / "b")}
    text = readme.filled("<!-- baselines.json -->old<!-- end --><!-- classification.json -->old<!-- end -->", out)
    assert "old" not in text and f"{100 * result['rows']['function']['together']:.2f}" in text
    assert baselines.main([*argv, "--task", "sst2"]) == 2
    (out / "classification.json").write_text("{")
    assert baselines.main(argv) == 2


# ------------------------------------------------------------------------------------------- stops and resumes
def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("knobs", [{}, {"finetune": True, "unfreeze": 0.1}])
def test_a_resumed_run_ends_with_the_same_weights(builtin, bilm, tmp_path, knobs):
    elmo, config, ends = ELMO.ELMo.load(bilm / "bilstm.pt"), Config(hidden=6, batch_tokens=600, **knobs), []
    for stop in (None, 17):
        file = tmp_path / f"{stop}.resume.pt"
        trainer = trainer_of(elmo, config)
        if stop:
            with classification.Run(trainer, file) as part:
                for step in range(stop):
                    part.count(*trainer.step(step))
                part.save()
            trainer = trainer_of(elmo, replace(config, ngrams=True, ensemble=True))     # neither moves a weight
        ends.append(classification.train(trainer, file, resume=bool(stop)).best)
    assert same(*ends)


def command(corpus, bilm, out, *more: str) -> subprocess.Popen:
    environment = os.environ | {"AG_NEWS_DIR": str(corpus), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(ROOT / "classification.py"), "--out", str(out), "--bilstm",
                             str(bilm / "bilstm.pt"), *SMALL, "--save-every", "0", *more],
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_run_killed_at_random_moments_and_resumed_ends_with_the_same_weights(corpus, bilm, tmp_path):
    argv = ["--finetune", "--seeds", "2"]
    process = command(corpus, bilm, tmp_path / "whole", *argv)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    kills, moments = 0, random.Random(0)
    while True:
        process = command(corpus, bilm, tmp_path / "killed", *argv, "--resume")
        if kills == 2:
            printed, _ = process.communicate(timeout=120)
            break
        skip = moments.randrange(3, 12)
        for line in process.stdout:
            skip -= "step" in line
            if skip == 0:
                break
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    assert process.returncode == 0, printed
    ends = [read_published(tmp_path / name / "finetuned.pt", classification.FORMAT, set())["weights"]
            for name in ("whole", "killed")]
    assert same(*ends) and sorted(os.listdir(tmp_path / "whole")) == sorted(os.listdir(tmp_path / "killed"))


def test_ctrl_c_stops_between_two_steps_and_resumes(corpus, bilm, tmp_path):
    argv = ["--epochs", "8", "--setting", "trainable"]
    process = command(corpus, bilm, tmp_path / "stopped", *argv)
    for line in process.stdout:
        if '"step"' in line:
            break
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in printed and "--resume goes on" in printed
    assert os.listdir(tmp_path / "stopped") == ["classifier.0.resume.pt"]
    for name, more in (("stopped", ["--resume"]), ("whole", [])):
        process = command(corpus, bilm, tmp_path / name, *argv, *more)
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 0, printed
        assert ('"epoch": 0.5' in printed) == (name == "whole"), "a resumed run does not begin anew"
    assert same(*(torch.load(tmp_path / name / "classifier.pt", weights_only=True)["weights"]
                  for name in ("stopped", "whole")))


# ------------------------------------------------------------------------------------------------ the command
def predicted(capsys, monkeypatch, whole, bilm, *argv: str, lines: bytes = b"") -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(lines)))
    status = classification.main(["--out", str(whole), "--bilstm", str(bilm / "bilstm.pt"), *argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_predict_prints_labels_and_probabilities_of_a_text_or_of_lines(capsys, monkeypatch, whole, bilm):
    status, out, _ = predicted(capsys, monkeypatch, whole, bilm, "--predict", "the bank sued the court .")
    label, *shares = out.rstrip("\n").split("\t")
    assert status == 0 and label in {share.rsplit(" ", 1)[0] for share in shares}
    assert sum(float(share.rsplit(" ", 1)[1]) for share in shares) == pytest.approx(1, abs=2e-4)
    status, out, _ = predicted(capsys, monkeypatch, whole, bilm, "--predict", "-", "--json", "--setting", "frozen",
                               lines="the bank .\r\nthe cöurt .\n".encode())
    answers = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [answer["text"] for answer in answers] == ["the bank .", "the cöurt ."]
    clf = Classifier.load(whole / "classifier.pt", bilm / "bilstm.pt", "frozen")
    expected = clf.predict(["the bank .", "the cöurt ."])
    assert [answer["label"] for answer in answers] == [answer["label"] for answer in expected]


@pytest.mark.parametrize("lines, message", [
    (b"a\n\nb\n", "text 1 has no words"), (b"a\xff\n", "standard input, line 1"), (b"\n", "text 0 has no words")])
def test_lines_that_cannot_be_classified_are_named(capsys, monkeypatch, whole, bilm, lines, message):
    status, out, error = predicted(capsys, monkeypatch, whole, bilm, "--predict", "-", lines=lines)
    assert status == 2 and not out and message in error and error.count("\n") == 1


def refused(capsys, argv: list[str], out) -> str:
    """The one sentence that a wrong input gets; status 2, nothing written."""
    capsys.readouterr()
    assert classification.main(["--out", str(out), *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("classification.py: ") and error.count("\n") == 1, error
    assert not out.exists() or not os.listdir(out)
    return error


@pytest.mark.parametrize("argv, message", [
    (["--setting", "best"], "invalid choice"), (["--seeds", "0"], "seeds is 0"), (["--rows", "541"], "rows is 541"),
    (["--task", "qnli"], "invalid choice"), (["--lr", "nan"], "lr is nan"), (["--colour"], "--colour"),
    (["--vectors", "svd", "--finetune"], "has none"),
    (["--vectors", "svd", "--ensemble"], "not svd"), (["--ngrams", "--rows", "1"], "all of one class"),
    (["--task", "sst2", "--fields", "title+description"], "no titles"),
    (["--bilstm", "missing.pt"], "missing.pt is missing"),
    (["--bilstm", __file__], "cannot be opened"), (["--predict", "a"], "classifier.pt is missing"),
    (["--task", "sst2"], "SST_DIR is not set"), (["--task", "nli"], "NLI_DIR is not set"), (["extra"], "unrecognized")])
def test_a_wrong_option_is_named_in_one_sentence(builtin, bilm, capsys, monkeypatch, tmp_path, argv, message):
    monkeypatch.delenv("SST_DIR", raising=False)
    monkeypatch.delenv("NLI_DIR", raising=False)
    argv = [*SMALL, "--bilstm", str(bilm / "bilstm.pt"), *argv]
    assert message in refused(capsys, argv, tmp_path / "out")


@pytest.mark.parametrize("name, text, argv, message", [
    ("train.txt", b"(3 a", ["--task", "sst5"], "train.txt, line 1"), ("dev.txt", b"\n", ["--task", "sst5"], "dev.txt"),
    ("test.txt", b"(9 a)", ["--task", "sst2"], "test.txt, line 1"),
    ("mnli_train_subset.tsv", b"neutral\ta\n", ["--task", "nli"], "subset.tsv, line 1"),
    ("mnli_eval_easycl.tsv", b"", ["--task", "nli"], "easycl.tsv: the file is empty"),
    ("mnli_eval_easycl.tsv", b"neutral\ta\tb\nmaybe\ta\tb\n", ["--task", "nli"], "line 2"),
    ("snli_train_subset.tsv", b"neutral\ta\t\xff\n", ["--task", "nli"], "not UTF-8"),
    ("mnli_train_subset.tsv", b"neutral\ta\tb\n", ["--task", "nli"], "validation is")])
def test_a_wrong_file_of_a_task_is_named_in_one_sentence(tasks, bilm, capsys, tmp_path, name, text, argv, message):
    (tasks / name).write_bytes(text)
    argv = [*SMALL, "--bilstm", str(bilm / "bilstm.pt"), "--validation", "5", *argv]
    assert message in refused(capsys, argv, tmp_path / "out")


def test_labels_outside_the_classes_are_named(builtin, bilm, capsys, monkeypatch, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for part in ("train", "test"):
        rows = (builtin / f"{part}.csv").read_bytes()
        (folder / f"{part}.csv").write_bytes(rows + (b'"7","a","b"\n' if part == "test" else b""))
    monkeypatch.setenv("AG_NEWS_DIR", str(folder))
    assert "test.csv, row 101: class is '7'" in refused(
        capsys, [*SMALL, "--bilstm", str(bilm / "bilstm.pt")], tmp_path / "out")


def test_a_classifier_refuses_another_bilm(whole, tmp_path):
    ELMO.ELMo.train(SENTENCES * 3, tiny()).save(tmp_path / "other.pt")
    with pytest.raises(InputError, match="trained on another biLM"):
        Classifier.load(whole / "classifier.pt", tmp_path / "other.pt")
    with pytest.raises(InputError, match="needs the biLM"):
        Classifier.load(whole / "classifier.pt")


def linear(content: dict, **wrong: float) -> None:
    """Puts a linear model into a file's content, with a wrong number where one is named."""
    content["config"]["ngrams"] = True
    for name, value in Ngrams.fit([("a",), ("b",)], np.array([0, 1]), 4).weights.items():
        content["weights"][f"ngrams.{name}"] = value.half()
        if name in wrong:
            content["weights"][f"ngrams.{name}"].view(-1)[0] = wrong[name]


@pytest.mark.parametrize("change, message", [
    (lambda c: c["config"].update(hidden=7), "does not fit together"), (lambda c: c["labels"].pop(), "does not fit"),
    (lambda c: c["members"][0].pop("bilm"), "does not fit"), (lambda c: c["weights"].clear(), "does not fit"),
    (lambda c: c.update(format="elmo-bilm-1"), "is of format"), (lambda c: c.pop("labels"), "expected the keys"),
    (lambda c: c["config"].update(ngrams=True), "linear model"), (lambda c: linear(c, share=7.0), "outside 0 to 1"),
    (lambda c: linear(c, idf=float("nan")), "not finite"), (lambda c: linear(c, weight=float("inf")), "not finite"),
    (lambda c: c.update(members=[]), "no setting"), (lambda c: c.update(bilm={"count": 2}), "does not fit")])
def test_parts_that_do_not_fit_together_are_refused_though_the_digest_is_right(whole, bilm, tmp_path, change, message):
    content = read_published(whole / "classifier.pt", classification.FORMAT, set())
    change(content)
    write_published(tmp_path / "a.pt", content)
    with pytest.raises(InputError, match=message):
        Classifier.load(tmp_path / "a.pt", bilm / "bilstm.pt", "trainable")


def test_a_damaged_classifier_is_refused(whole, bilm, tmp_path):
    content, place = (whole / "classifier.pt").read_bytes(), random.Random(0)
    clf = Classifier.load(whole / "classifier.pt", bilm / "bilstm.pt", "frozen")
    expected = clf.members[0][0].state_dict()
    for k in range(30):
        damaged = bytearray(content)
        if k < 10:
            del damaged[place.randrange(len(content)):]
        else:
            damaged[place.randrange(len(content))] ^= 1 << place.randrange(8)
        (tmp_path / "a.pt").write_bytes(damaged)
        try:
            loaded = Classifier.load(tmp_path / "a.pt", bilm / "bilstm.pt", "frozen")
        except InputError as error:
            assert "\n" not in str(error)
        else:
            assert same(loaded.members[0][0].state_dict(), expected)


def test_figures_are_drawn_from_the_json_alone(whole, tmp_path):
    result = json.loads((whole / "classification.json").read_text())
    figures.classification(result, tmp_path, "")
    assert {name for name in os.listdir(whole) if name.endswith(".png")} == set(os.listdir(tmp_path))


def test_on_the_built_in_corpus_elmo_beats_the_best_bag_of_words_by_most_of_what_order_is_worth(
        grammar, tmp_path, monkeypatch):
    monkeypatch.setenv("AG_NEWS_DIR", str(grammar))
    assert run(grammar, tmp_path, "--setting", "trainable", "--hidden", "32", "--epochs", "3", "--lr", "0.006",
               "--batch-tokens", "800", "--dropout", "0") == 0
    result = json.loads((tmp_path / "classification.json").read_text())
    test = [text for _, _, text in sample.stream_rows(1000, 1, stream=1)]
    bag = np.mean([sample.bag_posterior(text).max() for text in test])
    best = np.mean([sample.posterior(text).max() for text in test])
    accuracy = result["settings"]["trainable"]["test"]["accuracy"]["mean"]
    print(f"bag of words at most {bag:.3f}, sequence at most {best:.3f}, ELMo {accuracy:.3f}")
    error = 3 * (best * (1 - best) / 1000) ** 0.5
    assert bag + 0.75 * (best - bag) < accuracy < best + error


@pytest.mark.parametrize("file, name, alone", [
    ("classifier.pt", "classification", False), ("finetuned.pt", "finetuned", True)])
def test_the_committed_classifiers_reach_their_published_accuracy_on_real_rows(ag_news, file, name, alone):
    models = ROOT / "models"
    if not (models / file).exists():
        pytest.skip(f"models/{file} is not there: run `python classification.py` first, for the other --finetune")
    assert (models / file).stat().st_size < 45e6
    result, table = json.loads((models / f"{name}.json").read_text()), ag_news_rows(ag_news, 400)
    clf = Classifier.load(models / file, None if alone else models / "bilstm.pt", "trainable")
    found = clf.predict([text for _, text in table])
    hits = [answer["label"] == clf.labels[c - 1] for answer, (c, _) in zip(found, table, strict=True)]
    numbers = result["settings"]["trainable"]
    published = numbers["test"]["seeds"][numbers["best"]]["accuracy"]
    assert np.mean(hits) == pytest.approx(published, abs=0.05)      # 400 rows: a standard error of 0.014


def test_the_committed_baselines_stand_beside_the_committed_runs():
    rows = json.loads((ROOT / "models" / "baselines.json").read_text())["rows"]
    for name in ("classification", "finetuned"):
        result = json.loads((ROOT / "models" / f"{name}.json").read_text())
        for setting, numbers in result["settings"].items():
            row = rows[name if name == "finetuned" else setting]
            assert row["test"] == numbers["test"]["accuracy"] and row["ngrams"] == ("ngrams" in result)
            assert row["together"] == numbers["test"]["together"]["accuracy"]


def ag_news_rows(folder, rows: int) -> list[tuple[int, str]]:
    """(class, description) of evenly spread test rows."""
    from data.prepare import read_csv
    table = read_csv(folder / "test.csv").iloc[::7600 // rows][:rows]
    return list(zip(table["class"], table.description, strict=True))


def test_pairs_are_read_by_tabs(tasks):
    part = read_pairs(tasks / "mnli_eval_easycl.tsv")
    assert len(part) == 24 and part.texts[0] == ("the bank sued the court .", "the bank sued .")
    assert part.labels[:3].tolist() == [0, 1, 2]
