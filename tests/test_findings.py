"""Tests of report/findings.py with senses.py, mixes.py and figures.py, and of --track."""
import json
import os
import signal
from functools import partial
from itertools import combinations, islice, product
from threading import Event
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import SENTENCES, tiny
from torch.nn.functional import normalize

import ELMO
from data.tasks import EncodedTexts, Part, Task
from report import figures, findings, mixes, senses
from report.baselines import StaticVectors
from report.mixes import STATIC, VARIANTS, ELMoAndWord2Vec, VariantConfig, VariantHead
from report.senses import Uses, sense_accuracy
from run.files import write_json


# --------------------------------------------------------------------------------------------- senses and neighbours
def uses(vectors: list, classes: list[int], texts: list[str] | None = None) -> Uses:
    """One use per row, with a vector (2,) that is the same in all layers. Without texts, no two rows share a word."""
    rows = np.arange(len(vectors))
    unit = np.array(vectors) / np.linalg.norm(vectors, axis=1, keepdims=True)
    tokens = [text.split() for text in texts or map(str, rows)]
    return Uses(np.repeat(unit[:, None], 3, axis=1), rows, np.array(classes), tokens)


def test_the_nearest_use_has_the_largest_cosine_and_is_no_near_copy():
    pool = uses([[1, 0], [1, 1], [0, 1]], [0, 0, 0], ["x a b c d e f g h", "other words", "a bank"])
    queries = uses([[1, 0.1], [0.1, 1]], [0, 0], ["a b c d e f g h i", "the bank of the river"])
    found = senses.nearest(queries, pool, senses.cosines(queries, pool, 1), 2)
    assert found == [[1, 2], [2, 1]]                        # row 0 of the pool shares eight words with the first query


def test_nouns_are_words_that_often_stand_between_a_determiner_and_a_follower():
    tokens = ["the cat sat on the mat .".split(), "oil prices fall .".split(), "a cat of the mat ,".split()]
    assert senses.nouns(tokens) == {"cat", "mat"}           # "cat": 1 of 2 uses, as "sat" is no follower
    assert senses.nouns([*tokens, *["red cat sat on a mat .".split()] * 9]) == {"mat"}          # "cat": 1 of 11


def test_a_word_is_ambiguous_if_it_is_frequent_and_no_class_has_more_than_70_percent_of_its_uses():
    rows = [["bank", "rare"], ["bank", "goal"], ["bank", "goal"], ["goal", "goal"]]
    classes = np.array([0, 0, 1, 1])
    assert senses.ambiguous({"bank", "rare", "goal", "other"}, rows, classes, 3) == ["bank"]    # goal: 3 of 4
    assert senses.ambiguous({"bank"}, rows, classes, 4) == []


def test_uses_have_the_vectors_that_users_get(elmo):
    texts = ["the cat sat on the mat .", "he won the match", "the goal !"]
    part = Part([(text,) for text in texts], np.array([2, 0, 1]))
    found = senses.find_uses(elmo, part, [text.split() for text in texts], ["the", "goal"])
    assert found["the"].rows.tolist() == [0, 0, 1, 2]
    assert found["the"].classes.tolist() == [2, 2, 0, 1]
    assert found["goal"].rows.tolist() == [2]
    for i, (row, k) in enumerate([(0, 0), (0, 4), (1, 2), (2, 0)]):
        expected = normalize(elmo.embed(texts)[row][:, k], dim=1)           # (3, D)
        assert np.allclose(found["the"].vectors[i], expected.numpy(), atol=0.02)


def test_a_use_is_predicted_by_its_nearest_uses_and_in_layer_0_by_the_shares_of_the_classes():
    pool = uses([[1, 0], [0, 1], [0.1, 1], [0.2, 1]], [0, 1, 1, 1])
    queries = uses([[1, 0.1], [0.1, 1], [0, 1]], [0, 0, 1])
    found = sense_accuracy({"word": (queries, pool)})
    assert found["layers"] == pytest.approx([(1 / 4 + 1 / 4 + 3 / 4) / 3, 2 / 3, 2 / 3])
    assert found["votes"] == pytest.approx([1 / 3, 2 / 3, 2 / 3])     # the first: 0.995 for class 0, 0.59 for 1
    assert found["majority"] == found["votes"][0]
    assert found["interval"] == [pytest.approx([vote, vote]) for vote in found["votes"]]        # one word, so no spread


def test_every_use_counts_equally_whatever_its_word_and_two_votes_outweigh_the_nearest():
    sure = (uses([[1, 0]], [0]), uses([[1, 0], [0, 1]], [0, 1]))
    wrong = (uses([[1, 0], [1, 0], [0, 1]], [1, 1, 0]), uses([[1, 0], [0, 1]], [0, 1]))
    found = sense_accuracy({"a": sure, "b": wrong})
    assert found["layers"][1] == pytest.approx(1 / 4)
    assert found["words"]["b"]["layers"][1] == 0
    assert found["interval"][1] == pytest.approx([0, 1])
    outvoted = (uses([[1, 0]], [1]), uses([[1, 0], [0.9, 0.1], [0.9, -0.1]], [0, 1, 1]))
    assert senses.correct_classes(*outvoted, 1).tolist() == [[False], [True]]


COPIED = "a b c d e f g h"                                  # eight words: rows that share them are near copies


def test_a_use_whose_only_neighbours_are_near_copies_counts_nowhere():
    pool = uses([[1, 0], [1, 0]], [0, 0], [f"x {COPIED}", f"y {COPIED}"])
    queries = uses([[1, 0], [0, 1]], [0, 1], [f"{COPIED} i", "other words"])
    assert senses.nearest(queries, pool, senses.cosines(queries, pool, 1), 2) == [[], [0, 1]]
    found = sense_accuracy({"word": (queries, pool), "copied": (queries.take([0]), pool)})
    assert (found["uses"], list(found["words"])) == (1, ["word"])
    assert found["layers"] == found["votes"] == [0, 0, 0]   # the one use that counts is of class 1, the pool of class 0
    with pytest.raises(ELMO.InputError, match="only near copies as neighbours"):
        sense_accuracy({"copied": (queries.take([0]), pool)})


def task_of(texts: list[str]) -> Task:
    """A task of two classes in turn, all of whose parts have these texts."""
    part = Part([(text,) for text in texts], np.arange(len(texts)) % 2)
    return Task("ag_news", ["a", "b"], part, part, part, texts, np.ones(len(texts), dtype=bool))


def test_neighbours_begin_with_the_most_evenly_ambiguous_word_and_show_a_use_of_each_class(elmo):
    pool = uses([[1, 0], [0, 1]], [0, 1])
    found = senses.nearest_uses({"cat": (uses([[1, 0], [1, 0], [0, 1]], [0, 0, 1]), pool),
                                 "oil": (uses([[1, 0], [0, 1]], [0, 1]), pool)}, elmo, task_of(SENTENCES))
    assert [word["word"] for word in found] == ["oil", "cat"]
    cat = found[1]
    assert [(use["label"], use["nearest_label"]) for use in cat["uses"]] == [("a", "a"), ("b", "b")]
    first, second = cat["uses"]
    assert second["text"] == SENTENCES[2]
    assert second["nearest"] == SENTENCES[1]
    assert first["cosine"] == pytest.approx(1)
    table = normalize(elmo.model.table)
    order = (table @ table[elmo.words.index["cat"]]).argsort(descending=True)
    assert cat["static"] == [elmo.words.words[i] for i in order[1:7]]


def test_neighbours_show_no_near_copy_and_leave_out_a_use_that_has_nothing_else(elmo):
    pool = uses([[1, 0], [0, 1]], [0, 1], [f"x {COPIED}", f"y {COPIED}"])
    queries = uses([[1, 0], [0, 1], [0.1, 1]], [0, 1, 1], [f"{COPIED} i", f"{COPIED} j", "other words"])
    word, = senses.nearest_uses({"cat": (queries, pool)}, elmo, task_of(SENTENCES))
    assert [(use["text"], use["nearest"]) for use in word["uses"]] == [(SENTENCES[2], SENTENCES[1])]


# -------------------------------------------------------------------------------------------------- other findings
def inputs_of(elmo, texts: list[str], folder=None) -> findings.Inputs:
    """Inputs whose parts all have these texts."""
    task = task_of(texts)
    parts = {name: EncodedTexts(task.test, elmo) for name in ("validation", "test")}
    return findings.Inputs(folder, elmo, task, task.validation, parts)


def test_the_leak_test_finds_nothing_in_the_bilm_and_something_in_a_model_that_leaks(elmo, monkeypatch):
    inputs = inputs_of(elmo, SENTENCES)
    found = findings.leaks(inputs)
    assert found["rows"] == found["changed"] == 3           # the fourth text has two words
    assert found["moved_forward_before"] == found["moved_backward_after"] == 0
    states = elmo.model.states
    monkeypatch.setattr(elmo.model, "states", lambda *given: [h + h.mean(dim=0) for h in states(*given)])   # (T, B, P)
    found = findings.leaks(inputs)
    assert min(found["moved_forward_before"], found["moved_backward_after"]) > 0


def test_two_settings_are_compared_by_the_rows_that_only_one_of_them_predicts_right(elmo, tmp_path, monkeypatch):
    inputs = inputs_of(elmo, SENTENCES, tmp_path)           # classes 0, 1, 0, 1
    predicted = {"trainable": "0101", "frozen": "0000", "function": "1101"}
    settings = {name: {"predictions": classes} for name, classes in predicted.items()}
    write_json(tmp_path / "classification.json", {"bilm": elmo.digest, "settings": settings})
    pairs = findings.settings(inputs)["pairs"]
    assert [(pair["one"], pair["other"], pair["difference"]) for pair in pairs] == [
        ("trainable", "frozen", 0.5), ("trainable", "function", 0.25), ("frozen", "function", -0.25)]
    monkeypatch.setattr(elmo, "digest", "another")
    with pytest.raises(ELMO.InputError, match="made with another biLM"):
        findings.settings(inputs)


def test_a_documents_nearest_neighbour_is_another_document(elmo):
    texts = [" ".join(words) for words in islice(combinations(elmo.words.words[4:], 3), 20)]
    inputs = inputs_of(elmo, texts)
    inputs.task.test = Part([(text,) for text in texts * 2], np.repeat([0, 1], 20))     # equal texts, other classes
    found = findings.document_map(inputs)
    assert found["same"] == found["same_static"] == 0
    assert found["rows"] == len(found["x"]) == len(found["y"]) == len(found["labels"]) == 40


# ---------------------------------------------------------------------------------------------------------- mixes
LENGTHS = torch.tensor([5, 4, 3, 2, 1, 5])


def variant_head(name: str) -> VariantHead:
    """A head on vectors of width 304; Word2Vec's vectors fill 300 of them."""
    return VariantHead(VariantConfig(hidden=4), name, 4, STATIC + 4, 2).initialize(0)


@pytest.fixture
def layers() -> torch.Tensor:
    """(4, T, B, D) = (4, 5, 6, 304) vectors as ELMoAndWord2Vec gives them."""
    h = torch.randn(4, 5, 6, STATIC + 4, generator=torch.Generator().manual_seed(0))
    h[3, ..., STATIC:] = 0
    return h


@pytest.mark.parametrize("name, expected", zip(VARIANTS, "0 1 2 012 012 012 3 0123 0123 0123".split(), strict=True))
def test_each_variant_reads_the_layers_in_its_name(name, expected, layers):
    head = variant_head(name)
    out = head(layers, LENGTHS)
    assert out.shape == (6, 2)
    changed = [head(layers.index_fill(0, torch.tensor(j), 0.3), LENGTHS) for j in range(4)]         # Word2Vec is 3
    assert [j for j in range(4) if not torch.equal(out, changed[j])] == [int(j) for j in expected]


def test_elmo_at_the_output_is_pooled_with_the_states_and_not_read_by_the_lstm(layers):
    head = variant_head("Word2Vec, ELMo at the output")
    assert head.forward_lstm.input_size == STATIC
    mix = layers[:3].mean(dim=0)                            # gamma 1, equal weights
    pooled = []
    head.out.register_forward_pre_hook(lambda module, inputs: pooled.append(inputs[0]))
    head(layers, torch.full((6,), 5))
    width = 4 + STATIC + 4                                  # H + D, for each direction [maximum, attention, mean]
    assert pooled[0].shape == (6, 6 * width)
    assert torch.allclose(pooled[0][:, 4:width], mix.amax(dim=0), atol=1e-5)
    assert torch.allclose(pooled[0][:, 2 * width + 4:3 * width], mix.mean(dim=0), atol=1e-5)


def test_dropout_has_separate_masks_for_word2vec_and_for_elmo_at_each_place(layers):
    head = variant_head("Word2Vec, ELMo at both")
    text = torch.ones(6, head.text_width)
    outputs = []
    # drops 300 numbers of Word2Vec, of ELMo at the input, of ELMo at the output, and none
    for first in (0, STATIC, 2 * STATIC + 4, 3 * STATIC + 8):
        mask = torch.ones(1, 6, 3 * STATIC + 8)
        mask[..., first:first + STATIC] = 0
        outputs.append(head(layers, LENGTHS, (text, mask)))
    assert torch.equal(outputs[3], head(layers, LENGTHS))
    for one, other in combinations(outputs, 2):
        assert not torch.equal(one, other)


def test_lambda_adds_the_gradient_of_lambda_times_the_squared_weights(layers):
    gradients = []
    for name in ("all layers, lambda 0", "all layers, lambda 1"):
        head = variant_head(name)
        head.mix.w.data = torch.tensor([0.5, -1.0, 2.0])
        head(layers, LENGTHS).sum().backward()
        gradients.append(head.mix.w.grad)
    assert torch.allclose(gradients[1] - gradients[0], torch.tensor([1.0, -2.0, 4.0]), atol=1e-4)       # 2 w


def test_the_fourth_layer_is_word2vec_padded_with_zeros(elmo):
    table = torch.randn(len(elmo.words), 7)
    encoded = elmo.encode(["oil prices fall ."])
    made = ELMoAndWord2Vec(elmo, StaticVectors(table))(encoded, np.arange(1), torch.float32)
    assert torch.equal(made[3, :, 0, :7], table[elmo.words.ids(["oil", "prices", "fall", "."])])
    assert not made[3, ..., 7:].any()
    assert torch.allclose(made[:3, :, 0], elmo.embed(["oil prices fall ."])[0], atol=1e-5)
    with pytest.raises(ELMO.InputError, match="needs at least 300"):
        ELMoAndWord2Vec(elmo, StaticVectors(torch.zeros(len(elmo.words), STATIC)))


def test_mixes_trains_every_variant_and_records_the_weights_that_it_learns(elmo, monkeypatch):
    inputs = inputs_of(elmo, SENTENCES * 10)
    inputs.word2vec = StaticVectors(torch.randn(len(elmo.words), 7))
    monkeypatch.setattr(mixes, "STATIC", 7)
    small = VariantConfig(rows=10, seeds=2, epochs=1.0, hidden=4)
    monkeypatch.setattr(findings, "VariantConfig", lambda **options: small)
    found = findings.mixes(inputs)["variants"]
    assert list(found) == list(VARIANTS)
    free = {name: numbers["s"] for name, numbers in found.items() if numbers["s"] is not None}
    assert list(free) == [name for name in VARIANTS if name.startswith("all layers")]
    for s in free.values():
        assert sum(s) == pytest.approx(1)
        assert s != [1 / 3] * 3


# ----------------------------------------------------------------------------------------------------- few labels
def test_labels_measures_every_system_and_share_and_repeats_no_finished_run(elmo, tmp_path, monkeypatch):
    inputs = inputs_of(elmo, SENTENCES * 10, tmp_path)
    each = {"each": {"test": [0.8, 0.9], "validation": [0.7, 0.8]}}
    write_json(tmp_path / "baselines.json", {"bilm": elmo.digest, "rows": {
        "trainable": each, "word2vec": each, "tfidf": {"test": {"mean": 0.6}, "validation": {"mean": 0.5}}}})
    made = []
    def few_labels(inputs, system: str, share: float, seed: int, recipe: str) -> dict:
        made.append((system, share, seed))
        return {"test": share / 100, "validation": seed, "minutes": 2.0}
    monkeypatch.setattr(findings, "SEEDS", {10.0: 2, 50.0: 1})
    monkeypatch.setattr(findings, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(findings, "few_labels", few_labels)
    found = findings.labels(inputs)
    assert found["shares"] == [10.0, 50.0, 100.0]
    assert found["rows"] == [4, 20, 40]
    assert found["minutes"] == 18
    assert set(made) == {(name, *run) for name, run in product(found["systems"], [(10, 0), (10, 1), (50, 0)])}
    assert found["systems"]["elmo"] == [{"test": [0.1, 0.1], "validation": [0, 1]}, {"test": [0.5], "validation": [0]},
                                        each["each"]]
    assert found["systems"]["tfidf"][-1] == {"test": [0.6], "validation": [0.5]}
    assert findings.labels(inputs) == found
    assert len(made) == 9                                   # read from disk, their minutes too
    monkeypatch.setattr(findings, "EVALUATIONS", 5)         # another recipe
    findings.labels(inputs)
    assert len(made) == 18


@pytest.mark.parametrize("system", ["elmo", "word2vec", "tfidf"])
def test_every_system_learns_from_the_labelled_rows_that_its_seed_draws(elmo, system):
    inputs = inputs_of(elmo, ["oil prices fall", "the cat sat"] * 40)
    inputs.word2vec = StaticVectors(torch.randn(len(elmo.words), 5))
    with patch.object(Task, "with_labels", autospec=True, side_effect=Task.with_labels) as draw:
        found = findings.few_labels(inputs, system, 50.0, 3, "")
    draw.assert_called_once_with(inputs.task, 40, 3)
    assert found["test"] == found["validation"] == 1


def test_a_stopped_training_stops_the_findings(elmo, monkeypatch):
    stopped = SimpleNamespace(finished=True, stop_event=Event())
    stopped.stop_event.set()
    monkeypatch.setattr(findings.classification, "train", lambda trainer: stopped)
    with pytest.raises(KeyboardInterrupt):
        findings.few_labels(inputs_of(elmo, SENTENCES * 10), "elmo", 50.0, 0, "")


# ------------------------------------------------------------------------------------------------- the command
def test_the_command_measures_the_named_findings_and_resumes_after_a_stop(elmo, tmp_path, monkeypatch, capsys):
    number = 0
    def finding(name: str, inputs) -> dict:
        if (name, number) == ("map", 2):
            raise KeyboardInterrupt
        return {"number": number}
    def run(*argv: str) -> tuple[int, dict]:
        """Runs the command once more; returns its exit status and, for each finding, the run that made it."""
        nonlocal number
        number += 1
        status = findings.main([*argv, "--out", str(tmp_path)])
        content = json.loads((tmp_path / "findings.json").read_text())
        return status, {name: found["number"] for name, found in content.items() if name != "bilm"}
    names = ("leaks", "map", "labels")
    monkeypatch.setattr(findings, "FINDINGS", {name: partial(finding, name) for name in names})
    monkeypatch.setattr(findings.Inputs, "read", classmethod(lambda cls, folder: SimpleNamespace(elmo=elmo)))
    monkeypatch.setattr(elmo, "digest", "a")
    monkeypatch.setattr(figures, "findings", lambda *_: None)
    monkeypatch.setattr(findings, "RUNS", tmp_path / "runs")
    assert run() == (0, dict.fromkeys(names, 1))
    assert run() == (130, {"leaks": 2})
    (tmp_path / "runs").mkdir()
    assert run("--resume") == (0, {"leaks": 2, "map": 3, "labels": 3})
    assert run("--only", "map") == (0, {"leaks": 2, "labels": 3, "map": 4})
    assert (tmp_path / "runs").exists()
    assert run("--only", "labels") == (0, {"leaks": 2, "labels": 5, "map": 4})
    assert not (tmp_path / "runs").exists()
    assert run("--only", "map,sense")[0] == 2
    assert "'sense'" in capsys.readouterr().err
    monkeypatch.setattr(elmo, "digest", "b")
    assert run("--only", "leaks", "--resume") == (0, {"leaks": 7})


# ----------------------------------------------------------------------------------------------------- figures
def test_a_finding_that_is_missing_or_has_no_example_is_not_drawn(tmp_path):
    figures.findings({"bilm": "0", "mixes": {}, "leaks": {"example": None}}, tmp_path)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------- trackers
def test_the_curve_of_a_resumed_run_has_every_step_once_and_the_numbers_of_its_history(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = tiny(track="tensorboard", log_every=1, epochs=6.0)
    data = ELMO.Data.of(SENTENCES * 4, config, np.arange(12), np.arange(12, 16))
    first, other = (ELMO.Trainer(config, data, torch.device("cpu")) for _ in range(2))
    def stopping(step: int) -> tuple[float, int]:
        """A training step; in the middle of the run, Ctrl-C is pressed before it."""
        if step == first.steps // 2:
            os.kill(os.getpid(), signal.SIGINT)
        return ELMO.Trainer.step(first, step)
    first.step = stopping
    assert not ELMO.train(first, tmp_path / "bilstm.resume.pt").finished
    run = ELMO.train(other, tmp_path / "bilstm.resume.pt", resume=True)
    found = events.EventAccumulator(str(tmp_path / "tensorboard" / "bilstm")).Reload()
    assert [event.step for event in found.Scalars("training/nll")] == list(range(1, first.steps + 1))
    for d in range(2):
        points = [(event.step, event.value) for event in found.Scalars(f"validation_perplexity/{d}")]
        assert points == [(entry["step"], pytest.approx(entry["validation_perplexity"][d])) for entry in run.history]


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("run.tracker.find_spec", lambda name: None)
    assert ELMO.main(["--out", str(tmp_path / "out"), "--track", "wandb"]) == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
