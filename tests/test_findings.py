"""What report/ finds beside the scripts' own numbers: senses, leaks, variants of the mix; also sweeps and trackers."""
import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from itertools import combinations, islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SENTENCES, tiny

import ELMO
from data.tasks import EncodedTexts, Part, Task
from report import figures, findings, senses, sweep
from report.mixes import STATIC, VARIANTS, ELMoAndWord2Vec, VariantConfig, VariantHead
from report.senses import Uses, correct_classes, nearest, sense_accuracy

SMALL = ["--hidden", "12", "--validation", "60", "--epochs", "2", "--batch-tokens", "300", "--negatives", "50",
         "--min-count", "2", "--log-every", "20"]


def unit(*rows) -> np.ndarray:
    """(uses, 3, 2) vectors that are the same in all layers."""
    rows = np.array(rows, dtype=np.float32)
    return np.repeat((rows / np.linalg.norm(rows, axis=1, keepdims=True))[:, None], 3, axis=1)


def uses(vectors: list, classes: list[int], texts: list[str] | None = None) -> Uses:
    """Uses in rows of their own; without texts, no two rows share a word."""
    count = len(vectors)
    tokens = [text.split() for text in texts or map(str, range(count))]
    return Uses(unit(*vectors), np.arange(count), np.array(classes), tokens)


# --------------------------------------------------------------------------------------------- senses and neighbours
def test_the_nearest_use_has_the_largest_cosine_and_is_no_near_copy():
    pool = uses([[1, 0], [1, 1], [0, 1]], [0, 0, 0], ["x a b c d e f g h", "other words", "a bank"])
    queries = uses([[1, 0.1], [0.1, 1]], [0, 0], ["a b c d e f g h i", "the bank of the river"])
    assert nearest(queries, pool, 1) == [[1], [2]]              # row 0 of the pool shares eight words
    assert nearest(queries, pool, 1, count=2) == [[1, 2], [2, 1]]


def test_nouns_are_words_between_a_determiner_and_a_follower():
    tokens = ["the cat sat on the mat .".split(), "oil prices fall .".split(), "a cat of the mat ,".split()]
    assert senses.nouns(tokens) == {"cat", "mat"}           # "a cat of" is one of two uses of "cat", "the cat sat" none
    assert senses.nouns([*tokens, *["red cat sat on a mat .".split()] * 9]) == {"mat"}          # 1 in 11


def test_a_word_is_ambiguous_if_it_is_frequent_and_no_class_has_nearly_all_its_uses():
    rows = [["bank", "rare"], ["bank", "goal"], ["bank", "goal"], ["goal", "goal"]]
    classes = np.array([0, 0, 1, 1])
    assert senses.ambiguous({"bank", "rare", "goal", "other"}, rows, classes, 2) == ["bank"]    # 2 of 3; goal 3 of 4
    assert senses.ambiguous({"bank"}, rows, classes, 4) == []


def test_uses_are_the_users_vectors_of_the_first_places_in_a_random_order(elmo):
    texts = ["the cat sat on the mat .", "he won the match", "the goal !"]
    part = Part([(text,) for text in texts], np.array([2, 0, 1]))
    found = senses.find_uses(elmo, part, [text.split() for text in texts], ["the", "goal"])
    assert found["the"].rows.tolist() == [0, 0, 1, 2] and found["the"].classes.tolist() == [2, 2, 0, 1]
    assert found["goal"].tokens == [["the", "goal", "!"]]
    for i, (row, k) in enumerate([(0, 0), (0, 4), (1, 2), (2, 0)]):
        vector = elmo.embed(texts)[row][:, k]                                                   # (3, D)
        expected = vector / vector.norm(dim=1, keepdim=True)
        assert np.allclose(found["the"].vectors[i], expected.numpy(), atol=0.02)
    few = senses.find_uses(elmo, part, [text.split() for text in texts], ["the"], max_uses=2)
    assert len(few["the"].rows) == 2


def test_a_use_has_the_class_of_its_nearest_use_and_layer_0_is_worth_its_share():
    pool = uses([[1, 0], [0, 1], [0.1, 1], [0.2, 1]], [0, 1, 1, 1])
    queries = uses([[1, 0.1], [0.1, 1], [0, 1]], [0, 0, 1])
    found = sense_accuracy({"word": (queries, pool)})
    assert found["layers"] == pytest.approx([(1 / 4 + 1 / 4 + 3 / 4) / 3, 2 / 3, 2 / 3])
    assert found["majority"] == pytest.approx(1 / 3) and found["uses"] == 3     # class 1, the pool's, is one of three
    assert found["votes"] == pytest.approx([1 / 3, 2 / 3, 2 / 3])       # for the first use: 0.995 against 0.59
    assert found["interval"] == [pytest.approx([vote, vote]) for vote in found["votes"]]        # one word only


def test_words_count_by_their_uses():
    sure = (uses([[1, 0]], [0]), uses([[1, 0], [0, 1]], [0, 1]))
    wrong = (uses([[1, 0], [1, 0], [0, 1]], [1, 1, 0]), uses([[1, 0], [0, 1]], [0, 1]))
    found = sense_accuracy({"a": sure, "b": wrong})
    assert found["layers"][1] == pytest.approx(1 / 4) and found["uses"] == 4
    assert found["words"]["b"]["layers"][1] == 0
    assert found["interval"][1] == pytest.approx([0, 1])


def test_two_uses_that_are_nearly_as_near_outvote_the_nearest(monkeypatch):
    pool = uses([[1, 0], [0.9, 0.1], [0.9, -0.1]], [0, 1, 1])
    queries = uses([[1, 0]], [1])
    assert correct_classes(queries, pool, 1).tolist() == [[False], [True]]
    monkeypatch.setattr(senses, "VOTERS", 1)
    assert correct_classes(queries, pool, 1).tolist() == [[False], [False]]


def test_neighbours_show_the_most_evenly_ambiguous_word_first_with_a_use_of_each_class(elmo):
    texts = SENTENCES * 2
    part = Part([(text,) for text in texts], np.arange(len(texts)) % 2)
    task = Task("ag_news", ["a", "b"], part, part, part, texts)
    pool = uses([[1, 0], [0, 1]], [0, 1])
    found = senses.nearest_uses({"cat": (uses([[1, 0], [1, 0], [0, 1]], [0, 0, 1]), pool),
                                 "oil": (uses([[1, 0], [0, 1]], [0, 1]), pool)}, elmo, task)
    assert [word["word"] for word in found] == ["oil", "cat"]
    assert [use["label"] for use in found[1]["uses"]] == ["a", "b"]
    assert [use["nearest_label"] for use in found[1]["uses"]] == ["a", "b"]
    assert found[1]["uses"][1]["text"] == texts[2] and found[1]["uses"][1]["nearest"] == texts[1]
    assert found[1]["uses"][0]["cosine"] == pytest.approx(1)
    assert "cat" not in found[1]["static"] and len(found[1]["static"]) == 6


# -------------------------------------------------------------------------------------------------- other findings
def inputs_of(elmo, texts: list[str]) -> findings.Inputs:
    part = Part([(text,) for text in texts], np.arange(len(texts)) % 2)
    task = Task("ag_news", ["a", "b"], part, part, part, texts)
    return findings.Inputs(None, elmo, task, part, {name: EncodedTexts(part, elmo) for name in ("validation", "test")})


def test_the_leak_test_is_silent_on_the_bilm_and_not_on_a_model_that_leaks(elmo, monkeypatch):
    inputs = inputs_of(elmo, SENTENCES)
    found = findings.leaks(inputs)
    assert found["rows"] == found["changed"] == 3           # the fourth text has two words
    assert found["moved_forward_before"] == found["moved_backward_after"] == 0
    states = elmo.model.states

    def leaking(*arguments):
        return [h + h.mean(dim=0, keepdim=True) for h in states(*arguments)]        # (T, B, P)

    monkeypatch.setattr(elmo.model, "states", leaking)
    found = findings.leaks(inputs)
    assert found["moved_forward_before"] and found["moved_backward_after"]


def variant_head(name: str, seed: int = 0, **options) -> VariantHead:
    """A head on vectors of 304 numbers, 300 of which Word2Vec fills."""
    return VariantHead(VariantConfig(hidden=4, **options), name, 4, STATIC + 4, 2).initialize(seed)


@pytest.fixture
def layers() -> torch.Tensor:
    """(4, T, B, D) = (4, 5, 6, 304) vectors as ELMoAndWord2Vec gives them."""
    h = torch.randn(4, 5, 6, STATIC + 4, generator=torch.Generator().manual_seed(0))
    h[3, ..., STATIC:] = 0
    return h


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_read_what_their_names_say(name, layers):
    head = variant_head(name)
    lengths = torch.tensor([5, 4, 3, 2, 1, 5])
    out = head(layers, lengths)
    assert out.shape == (6, 2)
    read = [not torch.equal(out, head(layers.index_fill(0, torch.tensor(j), 0.3), lengths)) for j in range(4)]
    elmo = [False, False, False] if name == "Word2Vec" else [True, True, True]
    if name.startswith("layer"):
        elmo = [name == f"layer {j}" for j in range(3)]
    assert read == [*elmo, "Word2Vec" in name]


def test_elmo_at_the_output_is_pooled_beside_the_states_and_not_read_by_the_lstm(layers):
    lengths = torch.full((6,), 5)
    for name, width in (("Word2Vec, ELMo at the input", 2 * STATIC + 4), ("Word2Vec, ELMo at the output", STATIC)):
        assert variant_head(name).forward_lstm.input_size == width
    head = variant_head("Word2Vec, ELMo at the output")
    mix = layers[:3].mean(dim=0)                            # gamma 1, equal weights
    pooled = []
    head.out.register_forward_hook(lambda module, inputs, output: pooled.append(inputs[0]))
    head(layers, lengths)
    width = 4 + STATIC + 4                                  # H + D, for each direction [maximum, attention, mean]
    assert pooled[0].shape == (6, 6 * width)
    assert torch.allclose(pooled[0][:, 4:width], mix.amax(dim=0), atol=1e-5)
    assert torch.allclose(pooled[0][:, 2 * width + 4:3 * width], mix.mean(dim=0), atol=1e-5)


def test_dropout_covers_both_places_with_masks_of_their_own(layers):
    head = variant_head("Word2Vec, ELMo at both", dropout=0.5)
    text, mix = head.dropout_masks(6, torch.Generator().manual_seed(0))
    D = STATIC + 4
    assert mix.shape == (1, 6, STATIC + 2 * D) and text.shape == (6, head.text_width)
    assert not torch.equal(mix[..., STATIC:STATIC + D], mix[..., STATIC + D:])
    lengths = torch.full((6,), 5)
    whole = (torch.ones_like(text), torch.ones_like(mix))
    assert torch.equal(head(layers, lengths), head(layers, lengths, whole))
    assert not torch.equal(head(layers, lengths), head(layers, lengths, (text, mix)))


def test_a_strong_lambda_keeps_the_weights_of_the_layers_equal(layers):
    lengths = torch.tensor([5, 4, 3, 2, 1, 5])
    gold = torch.tensor([0, 1, 0, 1, 0, 1])
    spread = {}
    for name in ("all layers, lambda 0", "all layers, lambda 1/1000", "all layers, lambda 1"):
        head = variant_head(name)
        sgd = torch.optim.SGD(head.parameters(), lr=0.3)
        for _ in range(20):
            loss = torch.nn.functional.cross_entropy(head(layers, lengths), gold) * 10
            sgd.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            sgd.step()
        spread[name] = float((head.mix.w.detach().softmax(dim=0) - 1 / 3).abs().max())
    assert spread["all layers, lambda 1"] < 0.5 * spread["all layers, lambda 0"]
    assert spread["all layers, lambda 1/1000"] == pytest.approx(spread["all layers, lambda 0"], rel=0.1)


def test_lambda_adds_the_gradient_of_lambda_times_the_squared_weights(layers):
    lengths = torch.full((6,), 5)
    gradients = []
    for name in ("all layers, lambda 0", "all layers, lambda 1"):
        head = variant_head(name)
        head.mix.w.data = torch.tensor([0.5, -1.0, 2.0])
        head(layers, lengths).sum().backward()
        gradients.append(head.mix.w.grad)
    assert torch.allclose(gradients[1] - gradients[0], torch.tensor([1.0, -2.0, 4.0]), atol=1e-4)       # 2 w


def test_the_fourth_layer_is_word2vec_filled_up_with_zeros(elmo):
    table = torch.randn(len(elmo.words), 7)
    encoded = EncodedTexts(Part([("oil prices fall .",)], np.array([0])), elmo).encoded
    vectors = ELMoAndWord2Vec(elmo, findings.StaticVectors(table))
    made = vectors(encoded, np.arange(1), torch.float32)
    assert made.shape == (4, 4, 1, vectors.width) and vectors.layers == 4
    assert torch.equal(made[3, :, 0, :7], table[elmo.words.ids(["oil", "prices", "fall", "."])])
    assert not made[3, ..., 7:].any()
    assert torch.allclose(made[:3, :, 0], elmo.embed(["oil prices fall ."])[0], atol=1e-5)
    with pytest.raises(ELMO.InputError, match="needs 300"):
        ELMoAndWord2Vec(elmo, findings.StaticVectors(torch.zeros(len(elmo.words), STATIC)))


def test_findings_of_another_bilm_are_refused(elmo, tmp_path):
    inputs = inputs_of(elmo, SENTENCES)
    inputs.folder = tmp_path
    (tmp_path / "classification.json").write_text(json.dumps({"bilm": "0" * 64}))
    with pytest.raises(ELMO.InputError, match="of another biLM"):
        inputs.published("classification")


def test_two_settings_are_compared_by_the_rows_that_one_of_them_has_right(elmo, tmp_path):
    inputs = inputs_of(elmo, SENTENCES)                     # classes 0, 1, 0, 1
    inputs.folder = tmp_path
    predicted = {"trainable": "0101", "frozen": "0000", "function": "1101"}
    (tmp_path / "classification.json").write_text(json.dumps({
        "bilm": elmo.digest, "settings": {name: {"predictions": classes} for name, classes in predicted.items()}}))
    pairs = findings.settings(inputs)["pairs"]
    assert [(pair["one"], pair["other"], pair["difference"]) for pair in pairs] == [
        ("trainable", "frozen", 0.5), ("trainable", "function", 0.25), ("frozen", "function", -0.25)]
    assert (pairs[0]["only_this"], pairs[0]["only_that"]) == (2, 0)
    assert pairs[0]["p"] == pytest.approx(0.5)              # two rows, both of one setting: 2 / 2^2


def test_a_documents_nearest_neighbour_is_another_document(elmo):
    texts = [" ".join(words) for words in islice(combinations(elmo.words.words[4:], 3), 20)]
    inputs = inputs_of(elmo, texts)
    inputs.task.test = Part([(text,) for text in texts * 2], np.repeat([0, 1], 20))     # each twin has the other class
    found = findings.document_map(inputs)
    assert (found["rows"], found["same"], found["same_static"]) == (40, 0, 0)
    assert len(found["x"]) == len(found["y"]) == len(found["labels"]) == 40


# ----------------------------------------------------------------------------------------------------- few labels
def few_label_inputs(elmo, tmp_path, monkeypatch) -> findings.Inputs:
    """Inputs of 40 rows with published files, and two shares of which a run takes little time."""
    inputs = inputs_of(elmo, SENTENCES * 10)
    inputs.task.fresh = np.ones(40, dtype=bool)
    inputs.folder = tmp_path
    each = {"test": [0.8, 0.9], "validation": [0.7, 0.8]}
    trained = {part: {"seeds": [{"accuracy": value} for value in values]} for part, values in each.items()}
    (tmp_path / "classification.json").write_text(json.dumps({
        "bilm": elmo.digest, "settings": {"trainable": trained}}))
    (tmp_path / "baselines.json").write_text(json.dumps({
        "bilm": elmo.digest, "rows": {"word2vec": {"each": each}, "tfidf": {part: {"mean": 0.6} for part in each}}}))
    monkeypatch.setattr(findings, "SEEDS", {10.0: 2, 50.0: 1})
    monkeypatch.setattr(findings, "SHARES", (10.0, 50.0, 100.0))
    monkeypatch.setattr(findings, "RUNS", tmp_path / "runs")
    return inputs


def test_few_labels_are_measured_by_system_and_share_and_a_finished_run_is_not_repeated(elmo, tmp_path, monkeypatch):
    inputs = few_label_inputs(elmo, tmp_path, monkeypatch)
    made = []

    def run(inputs, system: str, share: float, rows: int, seed: int) -> dict:
        made.append((system, share, rows, seed))
        return {"test": share / 100, "validation": seed}

    monkeypatch.setattr(findings, "few_labels", run)
    found = findings.labels(inputs)
    assert found["rows"] == [4, 20, 40] and found["shares"] == [10.0, 50.0, 100.0]
    assert len(made) == 9 and ("tfidf", 10.0, 4, 1) in made
    assert found["systems"]["elmo"] == [{"test": [0.1, 0.1], "validation": [0, 1]}, {"test": [0.5], "validation": [0]},
                                        {"test": [0.8, 0.9], "validation": [0.7, 0.8]}]
    assert found["systems"]["tfidf"][-1] == {"test": [0.6], "validation": [0.6]}
    again = findings.labels(inputs)
    assert again == found and len(made) == 9                # from the files, their minutes too
    monkeypatch.setattr(findings, "EVALUATIONS", 5)         # another recipe
    findings.labels(inputs)
    assert len(made) == 18


@pytest.mark.parametrize("system", ["elmo", "word2vec", "tfidf"])
def test_every_system_is_trained_on_the_labelled_rows_that_its_seed_draws(elmo, tmp_path, monkeypatch, system):
    inputs = few_label_inputs(elmo, tmp_path, monkeypatch)
    inputs.word2vec = findings.StaticVectors(torch.randn(len(elmo.words), 5))
    found = findings.few_labels(inputs, system, 50.0, 20, seed=1)
    assert all(0 <= found[part] <= 1 for part in ("test", "validation"))


def test_a_stopped_run_stops_the_findings(elmo, tmp_path, monkeypatch):
    inputs = few_label_inputs(elmo, tmp_path, monkeypatch)
    stopped = SimpleNamespace(finished=True, stop_event=SimpleNamespace(is_set=lambda: True))
    monkeypatch.setattr(findings.classification, "train", lambda trainer: stopped)
    with pytest.raises(KeyboardInterrupt):
        findings.few_labels(inputs, "elmo", 50.0, 20, seed=0)


def test_mixes_trains_every_variant(elmo, tmp_path, monkeypatch):
    inputs = few_label_inputs(elmo, tmp_path, monkeypatch)
    inputs.word2vec = findings.StaticVectors(torch.randn(len(elmo.words), 7))
    monkeypatch.setattr("report.mixes.STATIC", 7)
    small = VariantConfig(rows=10, seeds=2, epochs=1.0, hidden=4)
    monkeypatch.setattr(findings, "VariantConfig", lambda **options: small)
    found = findings.mixes(inputs)
    assert list(found["variants"]) == list(VARIANTS) and (found["rows"], found["seeds"]) == (10, 2)
    weighed = {name: numbers["s"] for name, numbers in found["variants"].items() if numbers["s"] is not None}
    assert list(weighed) == [name for name in VARIANTS if name.startswith("all layers")]
    assert all(sum(s) == pytest.approx(1) and len(s) == 3 for s in weighed.values())
    assert all(numbers["test"].keys() == {"mean", "std"} for numbers in found["variants"].values())


# ------------------------------------------------------------------------------------------------- the command
def run_findings(monkeypatch, elmo, tmp_path, made: dict, *argv: str) -> int:
    """findings.main with these findings {name: function} in place of the real ones."""
    monkeypatch.setattr(findings, "FINDINGS", made)
    monkeypatch.setattr(findings.Inputs, "read", classmethod(lambda cls, folder: SimpleNamespace(elmo=elmo)))
    monkeypatch.setattr(elmo, "digest", "a")
    monkeypatch.setattr(figures, "findings", lambda *_: None)
    monkeypatch.setattr(findings, "RUNS", tmp_path / "runs")
    return findings.main([*argv, "--out", str(tmp_path)])


def test_only_labels_made_anew_removes_its_finished_runs(elmo, tmp_path, monkeypatch):
    made = {"heatmap": lambda inputs: {}, "labels": lambda inputs: {"minutes": 7.0}}
    runs = tmp_path / "runs"
    runs.mkdir()
    assert run_findings(monkeypatch, elmo, tmp_path, made, "--only", "heatmap") == 0 and runs.exists()
    assert run_findings(monkeypatch, elmo, tmp_path, made, "--only", "labels", "--resume") == 0 and runs.exists()
    assert json.loads((tmp_path / "findings.json").read_text())["labels"]["minutes"] == 7
    assert run_findings(monkeypatch, elmo, tmp_path, made, "--only", "labels") == 0 and not runs.exists()


def test_findings_that_were_stopped_go_on_with_those_that_were_not_made_anew(elmo, tmp_path, monkeypatch):
    made = []

    def finding(name: str, number: int):
        def make(inputs) -> dict:
            if (name, number) == ("map", 2):
                raise KeyboardInterrupt
            made.append(name)
            return {"number": number}
        return make

    def run(number: int, *argv: str) -> int:
        stubs = {name: finding(name, number) for name in ("leaks", "map", "weights")}
        return run_findings(monkeypatch, elmo, tmp_path, stubs, *argv)

    assert run(1) == 0 and run(1, "--resume") == 0 and made == ["leaks", "map", "weights"]
    assert run(2) == 130 and run(3, "--resume") == 0 and made[3:] == ["leaks", "map", "weights"]
    found = json.loads((tmp_path / "findings.json").read_text())
    assert [found[name]["number"] for name in ("leaks", "map", "weights")] == [2, 3, 3]


def test_an_unknown_finding_and_findings_of_another_bilm(elmo, tmp_path, monkeypatch, capsys):
    made = {"map": lambda inputs: {}}
    assert run_findings(monkeypatch, elmo, tmp_path, made, "--only", "map,sense") == 2
    assert "'sense'" in capsys.readouterr().err
    (tmp_path / "findings.json").write_text(json.dumps({"bilm": "b", "leaks": {"rows": 1}}))
    assert run_findings(monkeypatch, elmo, tmp_path, made, "--only", "map", "--resume") == 0
    assert set(json.loads((tmp_path / "findings.json").read_text())) == {"bilm", "map"}


# ----------------------------------------------------------------------------------------------------- figures
def test_every_finding_is_drawn_also_if_some_are_missing(tmp_path):
    point = {"test": [0.8, 0.9], "validation": [0.8, 0.9]}
    share = {"mean": 0.9, "std": 0.01}
    cosines = np.full((3, 4, 4), 0.5).tolist()
    made = {
        "labels": {"shares": list(findings.SHARES), "rows": [1] * 7, "measured": 7, "chosen_on": 5,
                   "systems": {name: [point] * 7 for name in ("elmo", "word2vec", "tfidf")}},
        "mixes": {"rows": 5, "seeds": 2, "variants": {"layer 0": {"validation": share, "test": share, "s": None}}},
        "senses": {"words": {"bank": {}}, "uses": 9, "majority": 0.4, "layers": [0.3, 0.7, 0.6], "best": 1,
                   "votes": [0.4, 0.72, 0.65], "voters": 10, "pool": 800,
                   "interval": [[0.2, 0.4], [0.6, 0.8], [0.5, 0.7]]},
        "weights": {"tasks": {"AG News": {"s": [[0.2, 0.3, 0.5]], "gamma": [1.0]}}},
        "heatmap": {"tokens": ["the", "bank", "a", "bank"], "layers": cosines},
        "map": {"rows": 2, "x": [0, 1], "y": [1, 0], "labels": [0, 3], "names": list("abcd"), "same": 0.5},
        "leaks": {"rows": 3, "changed": 3, "moved_forward_before": 0, "moved_backward_after": 0, "example": {
            "tokens": ["a", "b"], "changed_word": 1, "new": "c", "forward": [[0, 1]] * 2, "backward": [[1, 1]] * 2}}}
    figures.findings(made, tmp_path)
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {f"finding_{name}.png" for name in made if name != "mixes"}
    figures.findings({"bilm": "0", "leaks": made["leaks"] | {"example": None}}, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("accuracies", [(0.4, 0.92), (0.85, 0.99), (0.99, 1.0), (0.945, 0.955), (0.61, 0.69)])
def test_few_labels_are_drawn_with_marks_on_the_axis_wherever_they_lie(accuracies):
    points = [{"test": [a]} for a in np.linspace(*accuracies, 7)]
    axes, = figures.few_labels({"shares": list(findings.SHARES), "rows": [1] * 7, "measured": 7, "chosen_on": 5,
                                "systems": dict.fromkeys(("elmo", "word2vec", "tfidf"), points)}).axes
    low, high = axes.get_ylim()
    first, last = (100 * a for a in accuracies)
    assert first - (last - first) < low < high < last + (last - first)      # no mark has stretched the axis
    assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 2


# ---------------------------------------------------------------------------------------- trackers and sweeps
def test_a_tracked_run_has_the_numbers_of_its_json(corpus, tmp_path):
    if find_spec("tensorboard") is None:
        pytest.skip("tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    subprocess.run([sys.executable, ROOT / "ELMO.py", "--out", tmp_path, *SMALL, "--track", "tensorboard"], check=True,
                   env=os.environ | {"AG_NEWS_DIR": str(corpus), "OMP_NUM_THREADS": "1"}, capture_output=True)
    history = json.loads((tmp_path / "pretraining.json").read_text())["history"]
    found = EventAccumulator(str(tmp_path / "tensorboard" / "bilstm")).Reload()
    for d in range(2):
        points = [(event.step, event.value) for event in found.Scalars(f"validation_perplexity/{d}")]
        assert points == [(entry["step"], pytest.approx(entry["validation_perplexity"][d])) for entry in history]
    assert found.Scalars("training/nll")[0].step == 20


def test_a_resumed_runs_curve_has_every_step_once(builtin, tmp_path):
    if find_spec("tensorboard") is None:
        pytest.skip("tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    config, texts = tiny(track="tensorboard", log_every=1, epochs=6.0), SENTENCES * 4
    def trainer() -> ELMO.Trainer:
        data = ELMO.Data.of(texts, config, np.arange(12), np.arange(12, 16))
        return ELMO.Trainer(config, data, torch.device("cpu"))
    first, file = trainer(), tmp_path / "bilstm.resume.pt"
    whole = first.steps
    def stopping(step: int) -> tuple[float, int]:
        if step == whole // 2:
            os.kill(os.getpid(), signal.SIGINT)
        return ELMO.Trainer.step(first, step)
    first.step = stopping
    assert not ELMO.train(first, file).finished
    run = ELMO.train(trainer(), file, resume=True)
    found = EventAccumulator(str(tmp_path / "tensorboard" / "bilstm")).Reload()
    assert [event.step for event in found.Scalars("training/nll")] == list(range(1, whole + 1))
    assert [event.step for event in found.Scalars("validation_perplexity/0")] == [e["step"] for e in run.history]


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_done(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("run.tracker.find_spec", lambda name: None)
    assert ELMO.main(["--out", str(tmp_path / "out"), "--track", "wandb"]) == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_sweep_writes_the_best_options_for_config_and_continues_where_it_stopped(builtin, tmp_path, monkeypatch):
    argv = ["ELMO.py", "--search", "lr=0.0001:0.02:log", "--search", "clip=0.3,0.6", "--out", str(tmp_path), "--",
            *SMALL]
    runs = []
    train = ELMO.train

    def counted(*arguments):
        runs.append(train(*arguments))
        return runs[-1]

    monkeypatch.setattr(ELMO, "train", counted)
    assert sweep.main([argv[0], "--trials", "2", *argv[1:]]) == 0
    assert sweep.main([argv[0], "--trials", "3", *argv[1:]]) == 0
    assert len(runs) == 3
    best = min(runs, key=lambda run: run.lowest).trainer.config
    config, _ = ELMO.script_arguments(["--config", str(tmp_path / "ELMO.toml")], ELMO.Config, "", "", tmp_path, {})
    assert (config.lr, config.clip, config.hidden) == (best.lr, best.clip, ELMO.Config().hidden)    # only searched ones


@pytest.mark.parametrize("search", ["colour=1:2", "min_count=1:5", "lr=0.1:0.01", "lr=a:b", "lr=0:1:log",
                                    "hidden=1.5:3", "lr", "lr=0.1:0.2:0.3"])
def test_a_wrong_range_is_named_in_one_sentence(search):
    with pytest.raises(ELMO.InputError, match="--search"):
        sweep.distribution(search, ELMO.Config())


def test_a_file_that_is_no_study_is_refused(builtin, tmp_path, capsys):
    (tmp_path / "studies.db").write_bytes(b"no database at all" * 100)
    assert sweep.main(["ELMO.py", "--search", "dropout=0:0.4", "--out", str(tmp_path), "--", *SMALL]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "studies.db cannot be used" in error


def test_a_stopped_trial_ends_the_sweep_and_a_loss_that_is_not_finite_does_not():
    def not_finite(trainer):
        raise ELMO.InputError("the loss is not finite at step 3")

    def stopped(trainer, finished: bool = False, asked: bool = False):
        return SimpleNamespace(finished=finished, stop_event=SimpleNamespace(is_set=lambda: asked))

    assert sweep.lowest(not_finite, None) == float("inf")
    with pytest.raises(KeyboardInterrupt):
        sweep.lowest(stopped, None)
    with pytest.raises(KeyboardInterrupt):          # Ctrl-C while the last evaluation ran
        sweep.lowest(lambda trainer: stopped(trainer, finished=True, asked=True), None)
