"""The classifier: heads against a second, slow implementation, what learns and what does not, and the file that it saves."""
import io
import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SENTENCES, tiny
from torch import Tensor, nn

import classification
import ELMO
from classification import SETTINGS, Classifier, Config, ELMoVectors, Head, LayerFunction, Trainer, read_batch
from data import sample
from data.ag_news import read_csv, split
from data.tasks import EncodedTexts, Part
from run.checkpoint import read_published, write_published
from run.files import InputError
from run.metrics import classification_metrics, over_seeds, validation_numbers, word_metrics
from run.optimization import learning_rate_share
from run.progress import Run

SMALL = "--hidden 6 --batch-tokens 300 --epochs 2 --log-every 50 --precision fp32".split()
LAYERS = 3
WIDTH = 8               # of the random vectors
LENGTHS = [6, 3, 1, 0]  # of four texts; as pairs they are (6, 1) and (3, 0) words
BOTH_TASKS = pytest.mark.parametrize("task", ["ag_news", "nli"])
ALL_SETTINGS = pytest.mark.parametrize("setting", SETTINGS)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def copy_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def trained(trainer: Trainer, steps: int) -> Trainer:
    """The trainer after its first steps."""
    for step in range(steps):
        trainer.step(step)
    return trainer


# ------------------------------------------------------------------------------------ heads, a word at a time
def random_head(setting: str, task: str) -> Head:
    """A head whose weights are all random and large, biases too, so that every wrong equation shows."""
    head = Head(Config(hidden=5, task=task, dropout=0.4), setting, LAYERS, WIDTH, 4)
    generator = torch.Generator().manual_seed(1)
    for weight in head.parameters():
        weight.data.normal_(std=0.7, generator=generator)
    return head


def random_batch(head: Head) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Layers of four texts with random numbers in the padding too, their lengths, and dropout masks."""
    generator = torch.Generator().manual_seed(2)
    layers = torch.randn(LAYERS, max(LENGTHS), len(LENGTHS), WIDTH, generator=generator)
    return layers, torch.tensor(LENGTHS), head.dropout_masks(len(LENGTHS), generator)


def slow_lstm(lstm: nn.LSTM, inputs: list[Tensor]) -> list[Tensor]:
    """The states of an LSTM after each input, by the equations of its cell."""
    c = torch.zeros(lstm.hidden_size)
    h = torch.zeros(lstm.hidden_size)
    outputs = []
    for x in inputs:
        gates = lstm.weight_ih_l0 @ x + lstm.bias_ih_l0 + lstm.weight_hh_l0 @ h + lstm.bias_hh_l0
        input_gate, forget_gate, cell, output_gate = gates.chunk(4)
        c = forget_gate.sigmoid() * c + input_gate.sigmoid() * cell.tanh()
        h = output_gate.sigmoid() * c.tanh()
        outputs.append(h)
    return outputs


def slow_states(head: Head, words: list[Tensor], mask: Tensor) -> list[list[Tensor]]:
    """[forward, backward] states in reading order of one text, whose words are (J, D) layers."""
    if isinstance(head.mix, LayerFunction):
        inputs = [(head.mix.linear.weight @ word.flatten() + head.mix.linear.bias).clamp(min=0) for word in words]
    else:
        shares = head.mix.w.exp() / head.mix.w.exp().sum()
        inputs = [head.mix.gamma * sum(s * h for s, h in zip(shares, word, strict=True)) for word in words]
    inputs = [x * mask for x in inputs]
    backward = slow_lstm(head.backward_lstm, inputs[::-1])
    return [slow_lstm(head.forward_lstm, inputs), backward[::-1]]


def slow_pool(head: Head, directions: list[list[Tensor]]) -> Tensor:
    """(6H,) [maximum, attention, mean] of the forward states, then of the backward ones; zeros without words."""
    if not directions[0]:
        return torch.zeros(6 * head.config.hidden)
    pooled = []
    for states in directions:
        scores = torch.stack([(head.attention.weight[0] @ h + head.attention.bias[0]).exp() for h in states])
        attention = sum(score * h for score, h in zip(scores, states, strict=True)) / scores.sum()
        pooled += [torch.stack(states).max(dim=0).values, attention, sum(states) / len(states)]
    return torch.cat(pooled)


def slow_compared(head: Head, own: list[Tensor], other: list[Tensor]) -> list[Tensor]:
    """Every state of one side compared with the average of the other side's states that it attends to."""
    compared = []
    for h in own:
        found = torch.zeros_like(h)
        if other:
            scores = torch.stack([(h @ state / math.sqrt(len(h))).exp() for state in other])
            found = sum(score * state for score, state in zip(scores, other, strict=True)) / scores.sum()
        compared.append(head.pair.compare(torch.cat([h, found, (h - found).abs(), h * found])).clamp(min=0))
    return compared


def slow_logits(head: Head, texts: list[Tensor], text_mask: Tensor, mix_masks: Tensor) -> Tensor:
    """(C,) logits of one row: one text (J, n, D) or a pair of them."""
    sides = [slow_states(head, list(text.unbind(1)), mask) for text, mask in zip(texts, mix_masks, strict=True)]
    if len(sides) == 1:
        pooled = slow_pool(head, sides[0])
    else:
        a, b = sides
        u = slow_pool(head, [slow_compared(head, a[d], b[d]) for d in range(2)])
        v = slow_pool(head, [slow_compared(head, b[d], a[d]) for d in range(2)])
        pooled = head.pair.match(torch.cat([u, v, (u - v).abs(), u * v])).clamp(min=0)
    return head.out(pooled * text_mask)


@BOTH_TASKS
@ALL_SETTINGS
def test_logits_of_a_padded_batch_equal_those_of_each_text_read_one_word_at_a_time(setting, task):
    head = random_head(setting, task)
    layers, lengths, masks = random_batch(head)
    logits = head(layers, lengths, masks)
    assert len(logits) == (2 if task == "nli" else 4)
    for n, found in enumerate(logits):
        rows = [n, n + 2] if task == "nli" else [n]
        texts = [layers[:, :LENGTHS[row], row] for row in rows]
        expected = slow_logits(head, texts, masks[0][n], masks[1][0, rows])
        assert torch.allclose(found, expected, atol=1e-5)


@BOTH_TASKS
@ALL_SETTINGS
def test_every_word_and_no_padding_has_a_gradient(setting, task):
    head = random_head(setting, task)
    layers, lengths, masks = random_batch(head)
    layers.requires_grad_()
    head(layers, lengths, masks).square().sum().backward()
    has_gradient = layers.grad.abs().sum(dim=(0, 3)) > 0                # (T, B)
    assert torch.equal(has_gradient, torch.arange(6)[:, None] < lengths)
    ones = tuple(torch.ones_like(mask) for mask in masks)
    assert torch.equal(head(layers, lengths), head(layers, lengths, ones))          # no masks: no dropout


@ALL_SETTINGS
def test_a_text_by_itself_and_in_a_padded_batch_has_the_same_logits(setting):
    head = random_head(setting, "ag_news")
    layers, lengths, (text_mask, mix_mask) = random_batch(head)
    batch = head(layers, lengths, (text_mask, mix_mask))
    for b, n in enumerate(LENGTHS):
        masks = (text_mask[b:b + 1], mix_mask[:, b:b + 1])
        by_itself = head(layers[:, :n, b:b + 1], lengths[b:b + 1], masks)
        assert torch.allclose(by_itself[0], batch[b], atol=1e-5)


def test_the_scalar_mix_is_gamma_times_the_softmax_weighted_sum_of_the_layers():
    mix = ELMO.ScalarMix(3)
    mix.w.data = torch.tensor([0.0, math.log(2), math.log(5)])          # s = 1/8, 2/8, 5/8
    mix.gamma.data = torch.tensor(4.0)
    layers = torch.tensor([[8.0, 0.0], [0.0, 16.0], [1.0, 2.0]])
    assert mix(layers[:, None, None]).flatten().tolist() == pytest.approx([4 * (1 + 5 / 8), 4 * (4 + 10 / 8)])


# ------------------------------------------------------------------------------------ heads of the same seed
def test_heads_of_one_seed_share_every_weight_of_the_same_shape_but_w():
    trainable, frozen, function, other = (
        Head(Config(hidden=5), setting, LAYERS, WIDTH, 4).initialize(seed)
        for setting, seed in [*((setting, 7) for setting in SETTINGS), ("frozen", 8)])
    a, b, c = (copy_of(head) for head in (trainable, frozen, function))
    assert {name for name in a if not torch.equal(a[name], b[name])} == {"mix.w"}
    shared = {name for name in a.keys() & c.keys() if a[name].shape == c[name].shape}
    assert shared >= {"forward_lstm.weight_hh_l0", "backward_lstm.weight_hh_l0", "attention.weight", "out.weight"}
    assert all(torch.equal(a[name], c[name]) for name in shared)
    assert not torch.equal(a["forward_lstm.weight_hh_l0"], a["backward_lstm.weight_hh_l0"])
    assert a["mix.w"].tolist() == [0, 0, 0] and a["mix.gamma"] == b["mix.gamma"] == 1
    assert not torch.equal(frozen.mix.w, other.mix.w) and not torch.equal(frozen.out.weight, other.out.weight)
    assert torch.equal(frozen.mix.w, frozen.mix.w.half()), "the half precision of the file holds it exactly"
    assert [any(weight.requires_grad for weight in head.mix.parameters()) for head in (trainable, frozen)] == [True, False]


@pytest.fixture(scope="module")
def bilm(tmp_path_factory) -> Path:
    """A folder with bilstm.pt, a tiny biLM of the built-in corpus."""
    folder = tmp_path_factory.mktemp("bilm")
    texts = [text for _, _, text in sample.generate(600)]
    ELMO.ELMo.train(texts, tiny(validation=60, epochs=2.0, batch_tokens=300)).save(folder / "bilstm.pt")
    return folder


@pytest.fixture(scope="module")
def elmo(bilm) -> ELMO.ELMo:
    return ELMO.ELMo.load(bilm / "bilstm.pt")


def trainer_of(elmo: ELMO.ELMo, seeds: tuple[int, ...] = (0,), **options) -> Trainer:
    """A trainer on 120 rows of the built-in corpus, in fp32."""
    rows = [(label - 1, (text,)) for label, _, text in sample.generate(150)]
    parts = {"train": Part.of(rows[:120]), "validation": Part.of(rows[120:])}
    encoded = {name: EncodedTexts(part, elmo) for name, part in parts.items()}
    config = Config(**{"hidden": 6, "batch_tokens": 120, "precision": "fp32", "log_every": 10_000} | options)
    return Trainer(config, ELMoVectors(elmo.model), encoded, 4, seeds)


def test_heads_of_one_seed_have_equal_dropout_masks_in_training(elmo, monkeypatch):
    trainer = trainer_of(elmo, (0, 1))
    seen = {}
    forward = Head.forward

    def record(head: Head, layers: Tensor, lengths: Tensor, masks: tuple[Tensor, Tensor]) -> Tensor:
        seen[head] = masks
        return forward(head, layers, lengths, masks)

    monkeypatch.setattr(Head, "forward", record)
    trainer.step(0)
    text, mix = zip(*(seen[learner.modules["head"]] for learner in trainer.learners.values()), strict=True)
    assert list(trainer.learners) == [f"{setting}-{seed}" for setting in SETTINGS for seed in (0, 1)]
    assert torch.equal(text[0], text[2]) and torch.equal(text[0], text[4]) and not torch.equal(text[0], text[1])
    assert torch.equal(mix[0], mix[2]) and not torch.equal(mix[0], mix[1])
    assert set(text[0].unique().tolist()) == set(mix[0].unique().tolist()) == {0.0, 1.25}       # a fifth is dropped


def test_trainable_and_frozen_stay_identical_if_w_is_equal_and_does_not_learn(elmo):
    trainer = trainer_of(elmo, mix_lr=0.0, clip=1e9)
    trainable, frozen = (trainer.learners[f"{setting}-0"].modules["head"] for setting in ("trainable", "frozen"))
    before = copy_of(frozen)
    trainable.mix.w.data.copy_(frozen.mix.w)
    trained(trainer, 5)
    assert same(trainable.state_dict(), frozen.state_dict())
    assert torch.equal(frozen.mix.w, before["mix.w"]) and not torch.equal(frozen.out.weight, before["out.weight"])


def test_heads_trained_side_by_side_equal_heads_trained_by_themselves(elmo):
    every = trained(trainer_of(elmo, (3, 4)), 8)
    fewer = [trained(trainer_of(elmo, (3, 4), setting=setting), 8) for setting in SETTINGS]
    fewer.append(trained(trainer_of(elmo, (3,), setting="function"), 8))
    for trainer in fewer:
        for name, learner in trainer.learners.items():
            assert same(learner.modules.state_dict(), every.learners[name].modules.state_dict())


def test_training_equals_a_plain_loop_with_adamw(elmo):
    trainer = trainer_of(elmo, setting="trainable", clip=0.5)
    head = trainer.new_head("trainable", 4, 0)
    mix = [head.mix.w, head.mix.gamma]
    others = [weight for name, weight in head.named_parameters() if weight.requires_grad and "mix" not in name]
    groups = [{"params": mix, "weight_decay": 0.0}, {"params": others, "weight_decay": 0.01}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    for step in range(6):
        rows = trainer.batches[step]
        generator = torch.Generator().manual_seed(1_000_003 + step)
        layers, lengths = read_batch(trainer.vectors, trainer.parts["train"], rows, torch.float32)
        logits = head(layers, lengths, head.dropout_masks(len(rows), generator))
        loss = F.cross_entropy(logits, trainer.parts["train"].labels[rows], label_smoothing=0.05)
        loss.backward()
        assert nn.utils.clip_grad_norm_(head.parameters(), 0.5) > 0.5
        for group, highest in zip(optimizer.param_groups, (2e-2, 4e-3), strict=True):
            group["lr"] = highest * learning_rate_share(step, trainer.steps)
        optimizer.step()
        optimizer.zero_grad()
        assert trainer.step(step) == (pytest.approx(loss.item() * len(rows), rel=1e-5), len(rows))
    for name, weight in trainer.learners["trainable-0"].modules["head"].state_dict().items():
        assert torch.allclose(weight, head.state_dict()[name], atol=1e-6), name


def test_the_averaged_weights_are_those_of_the_formula(elmo):
    trainer = trainer_of(elmo, setting="function", ema=0.15, epochs=8)
    learner = trainer.learners["function-0"]
    expected = None
    for step in range(30):
        trainer.step(step)
        if step in (9, 19, 29):
            k = step // 10                                      # decay: 1/10, then 2/11, of which `ema` leaves 0.15
            new = learner.modules["head"].out.weight.detach().clone()
            expected = new if k == 0 else torch.lerp(expected, new, 1 - (0.1, 0.15)[k - 1])
    assert torch.allclose(trainer.model["function-0"]["head"].out.weight, expected, atol=1e-6)


# ------------------------------------------------------------------------------- a biLM that learns, or does not
def layer_of(name: str) -> int:
    """Layer of a biLM's weight: 0 is the word table or the character network."""
    direction, _, rest = name.partition(".")
    return int(rest[0]) + 1 if direction in ELMO.DIRECTIONS else 0


@pytest.mark.parametrize("representation, unused", [("embedding", {"bias"}), ("char", {"bias", "table"})])
def test_only_a_copy_of_the_bilm_learns_one_layer_after_the_other_and_lower_ones_more_slowly(representation, unused):
    elmo = ELMO.ELMo.train(SENTENCES * 3, tiny(representation=representation, epochs=0.5))
    before = copy_of(elmo.model)
    trained(trainer_of(elmo), 3)
    trainer = trainer_of(elmo, finetune=True, unfreeze=0.2, bilm_lr=0.01, epochs=3)
    learning = trainer.learners["trainable-0"].modules["bilm"]
    first = {}
    for step in range(trainer.steps):
        old = copy_of(learning)
        trainer.step(step)
        for name, weight in learning.state_dict().items():
            if name not in first and not torch.equal(weight, old[name]):
                first[name] = (step, (weight - old[name]).abs().max().item())
    assert same(elmo.model.state_dict(), before)
    assert set(first) == {name for name in before if "bias_hh" not in name} - unused
    for name, (step, moved) in first.items():       # the first update of Adam is as large as the learning rate
        depth = 2 - layer_of(name)
        assert step == math.ceil(0.2 * (depth + 1) * trainer.steps), name
        assert moved == pytest.approx(0.01 / 2.6 ** depth * learning_rate_share(step, trainer.steps), rel=0.01), name


def test_the_gradients_of_a_head_and_of_its_bilm_are_clipped_apart(elmo, monkeypatch):
    trainer = trainer_of(elmo, finetune=True)
    learner = trainer.learners["trainable-0"]
    for name, size in (("head", 3.0), ("bilm", 1e-6)):
        for weight in learner.modules[name].parameters():
            weight.grad = torch.full_like(weight, size)
    sizes = []
    monkeypatch.setattr(learner.optimizers, "step", sizes.append)
    learner.update(trainer.steps // 2, trainer.steps)
    head = torch.cat([weight.grad.flatten() for weight in learner.modules["head"].parameters()])
    assert head.norm().item() == pytest.approx(1.0) and learner.modules["bilm"].table.grad[0, 0] == pytest.approx(1e-6)
    assert sizes == [learning_rate_share(trainer.steps // 2, trainer.steps)]


class StoppedRun(Run):
    """A run that Ctrl-C stops before step 7."""

    def stop(self) -> bool:
        if self.step == 7:
            self.stop_event.set()
        return super().stop()


@pytest.mark.parametrize("options", [{}, {"finetune": True, "unfreeze": 0.2}])
def test_a_stopped_and_resumed_run_ends_with_the_same_weights(elmo, tmp_path, monkeypatch, options):
    file = tmp_path / "resume.pt"
    whole = classification.train(trainer_of(elmo, (0, 1), **options))
    with monkeypatch.context() as patch:
        patch.setattr(classification, "Run", StoppedRun)
        stopped = classification.train(trainer_of(elmo, (0, 1), **options), file)
    assert stopped.step == 7 and not stopped.finished and len(stopped.history) == 1
    resumed = classification.train(trainer_of(elmo, (0, 1), **options), file, resume=True)
    assert same(resumed.best, whole.best)
    assert [entry["validation"] for entry in resumed.history] == [entry["validation"] for entry in whole.history]
    for name, learner in resumed.trainer.learners.items():
        assert same(learner.modules.state_dict(), whole.trainer.learners[name].modules.state_dict())


def test_a_loss_that_is_not_finite_changes_no_weight(elmo, monkeypatch):
    trainer = trained(trainer_of(elmo), 2)
    before = copy_of(trainer.model)
    heads = {name: copy_of(learner.modules) for name, learner in trainer.learners.items()}
    trainer.learners["frozen-0"].modules["head"].register_forward_hook(lambda head, inputs, logits: logits * math.nan)
    with pytest.raises(InputError, match="not finite at step 2"):
        trainer.step(2)
    assert same(trainer.model.state_dict(), before)
    assert all(same(learner.modules.state_dict(), heads[name]) for name, learner in trainer.learners.items())


def test_the_order_of_words_counts_on_the_built_in_corpus(grammar, tmp_path, monkeypatch):
    monkeypatch.setenv("AG_NEWS_DIR", str(grammar))
    options = "--setting trainable --hidden 32 --epochs 3 --lr 0.006 --batch-tokens 800 --dropout 0".split()
    assert run(grammar, tmp_path, *options) == 0
    result = json.loads((tmp_path / "classification.json").read_text())
    accuracy = result["settings"]["trainable"]["test"]["accuracy"]["mean"]
    texts = [text for _, _, text in sample.stream_rows(1000, 1, stream=1)]
    bag = np.mean([sample.bag_posterior(text).max() for text in texts])     # the best that is blind to the order
    best = np.mean([sample.posterior(text).max() for text in texts])
    assert bag + 0.75 * (best - bag) < accuracy < best + 3 * (best * (1 - best) / 1000) ** 0.5
    clf = Classifier.load(tmp_path / "classifier.pt", grammar / "bilstm.pt")
    world, business = clf.predict(["the court sued the bank over the loan .", "the bank sued the court over the loan ."])
    assert world["label"] != business["label"] or world["probabilities"]["World"] > business["probabilities"]["World"]


# ---------------------------------------------------------------------------------------- the file and its numbers
def run(bilm: Path, out: Path, *more: str) -> int:
    return classification.main(["--out", str(out), "--bilstm", str(bilm / "bilstm.pt"), *SMALL, *more])


@pytest.fixture(scope="module")
def whole(bilm, corpus, tmp_path_factory) -> Path:
    """The folder of a run with two seeds."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AG_NEWS_DIR", str(corpus))
        assert run(bilm, out, "--seeds", "2") == 0
    return out


def load(whole: Path, bilm: Path, setting: str | None = None) -> Classifier:
    return Classifier.load(whole / "classifier.pt", bilm / "bilstm.pt", setting)


def test_the_numbers_in_the_json_are_those_of_the_classifiers_in_the_file(whole, bilm, corpus):
    result = json.loads((whole / "classification.json").read_text())
    known = read_csv(corpus / "train.csv")
    _, validation = split(600, 60, 0)                       # the rows that the biLM was not trained on
    tables = {"validation": known.iloc[validation], "test": read_csv(corpus / "test.csv")}
    for setting, numbers in result["settings"].items():
        clf = load(whole, bilm, setting)
        best = numbers["best"]
        for part, table in tables.items():
            gold = table["class"].to_numpy() - 1
            p = clf.probabilities(table.description.tolist()).numpy()
            written = numbers[part]["seeds"][best]
            assert written["accuracy"] == pytest.approx(np.mean(p.argmax(axis=1) == gold))
            assert written["nll"] == pytest.approx(-np.log(p[np.arange(len(p)), gold]).mean(), rel=1e-4)
            seeds = [seed["accuracy"] for seed in numbers[part]["seeds"]]
            assert seeds[best] == max(seeds) or part == "test"
            assert numbers[part]["accuracy"]["std"] == pytest.approx(abs(seeds[0] - seeds[1]) / 2**0.5)
        predictions = np.array(list(numbers["predictions"]), dtype=int)
        assert np.mean(predictions == gold) == pytest.approx(numbers["test"]["ensemble"]["accuracy"])
        assert numbers["parameters"] == sum(weight.numel() for weight in clf.head.parameters())
        if setting != "function":
            assert clf.head.mix.w.softmax(dim=0).tolist() == pytest.approx(numbers["s"][best])
    drawn = Head(Config(hidden=6), "frozen", 3, 24, 4).initialize(0).mix.w.softmax(dim=0)
    assert result["settings"]["frozen"]["s"][0] == pytest.approx(drawn.tolist())
    assert result["settings"]["frozen"]["gamma"] == [1, 1]


def test_a_notebook_needs_only_torch_to_classify_with_the_file(whole, bilm, elmo):
    content = torch.load(whole / "classifier.pt", weights_only=True)
    assert list(content) == ["format", "config", "labels", "heads", "bilm", "weights", "metrics", "digest"]
    assert content["bilm"] == {"digest": elmo.digest}
    weights = {name.removeprefix("frozen."): value.float() for name, value in content["weights"].items() if "frozen" in name}
    lstm = nn.LSTM(24, 6, bidirectional=True)               # one text has no padding that it could read
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
        getattr(lstm, name).data = weights[f"forward_lstm.{name}"]
        getattr(lstm, f"{name}_reverse").data = weights[f"backward_lstm.{name}"]
    text = "the bank sued the court ."
    x = torch.einsum("j,jnd->nd", weights["mix.w"].softmax(dim=0), elmo.embed([text])[0])
    pooled = []
    for h in lstm(x)[0].chunk(2, dim=1):
        attention = (h @ weights["attention.weight"][0]).softmax(dim=0) @ h
        pooled += [h.max(dim=0).values, attention, h.mean(dim=0)]
    p = F.linear(torch.cat(pooled), weights["out.weight"], weights["out.bias"]).softmax(dim=0)
    found = load(whole, bilm, "frozen").predict([text])[0]
    assert list(found["probabilities"]) == content["labels"] == ["World", "Sports", "Business", "Sci/Tech"]
    assert list(found["probabilities"].values()) == pytest.approx(p.tolist(), abs=1e-5)


def test_a_prediction_is_the_largest_probability_and_depends_on_no_other_text(whole, bilm):
    clf = load(whole, bilm, "trainable")
    texts = [text for _, _, text in sample.generate(30, seed=5)] + ["bank", "ünïcode ☃ 漢字", "the court " * 200]
    found = clf.predict(texts)
    assert len({prediction["label"] for prediction in found}) > 1
    for prediction in found:
        probabilities = prediction["probabilities"]
        assert prediction["label"] == max(probabilities, key=probabilities.get)
        assert sum(probabilities.values()) == pytest.approx(1)
    p = clf.probabilities(texts)
    assert torch.allclose(clf.probabilities(texts[::-1]).flip(0), p, atol=1e-5)
    assert torch.allclose(torch.cat([clf.probabilities([text]) for text in texts]), p, atol=1e-5)
    assert clf.predict([]) == []


@pytest.mark.parametrize("texts, message", [
    ([""], "text 0 has no words"), (["a", " \n"], "text 1 has no words"), ("text", "one string"), ([3], "text 0 is of type int")])
def test_a_text_that_cannot_be_classified_is_named(whole, bilm, texts, message):
    with pytest.raises(InputError, match=message):
        load(whole, bilm).predict(texts)


def test_the_setting_is_the_one_that_is_named_or_the_best_on_validation_rows(whole, bilm, tmp_path):
    content = read_published(whole / "classifier.pt", classification.FORMAT, set())
    for best in SETTINGS:
        for setting in SETTINGS:
            content["heads"][setting]["validation"] = 0.9 if setting == best else 0.8
        write_published(tmp_path / "classifier.pt", content)
        assert same(load(tmp_path, bilm).head.state_dict(), load(whole, bilm, best).head.state_dict())
    with pytest.raises(InputError, match="no setting 'best'; expected one of trainable, frozen, function"):
        load(whole, bilm, "best")


def test_a_classifier_refuses_another_bilm(whole, tmp_path):
    ELMO.ELMo.train(SENTENCES * 3, tiny(epochs=0.1)).save(tmp_path / "bilstm.pt")
    with pytest.raises(InputError, match="trained on another biLM"):
        load(whole, tmp_path)
    with pytest.raises(InputError, match="needs the biLM"):
        Classifier.load(whole / "classifier.pt")


@pytest.mark.parametrize("change, message", [
    (lambda content: content["config"].update(hidden=7), "does not fit together"),
    (lambda content: content["config"].update(hidden=0), "a.pt: hidden is 0"),
    (lambda content: content["labels"].pop(), "does not fit together"),
    (lambda content: content["weights"].clear(), "does not fit together"),
    (lambda content: content["heads"].clear(), "does not fit together"),
    (lambda content: content["bilm"].clear(), "does not fit together"),
    (lambda content: content.update(format="elmo-bilm-2"), "is of format"),
    (lambda content: content.pop("labels"), "expected the keys")])
def test_parts_that_do_not_fit_together_are_refused_though_the_digest_is_right(whole, bilm, tmp_path, change, message):
    content = read_published(whole / "classifier.pt", classification.FORMAT, set())
    change(content)
    write_published(tmp_path / "a.pt", content)
    with pytest.raises(InputError, match=message):
        Classifier.load(tmp_path / "a.pt", bilm / "bilstm.pt", None if "heads" not in content else None)


def test_a_damaged_file_is_refused_or_loaded_as_it_was(whole, bilm, tmp_path):
    content = (whole / "classifier.pt").read_bytes()
    expected = load(whole, bilm, "frozen").head.state_dict()
    draw = random.Random(0)
    refused = 0
    for k in range(20):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        (tmp_path / "classifier.pt").write_bytes(damaged if k % 2 else content[:draw.randrange(len(content))])
        try:
            assert same(load(tmp_path, bilm, "frozen").head.state_dict(), expected)     # a byte that nothing reads
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused >= 15


# ------------------------------------------------------------------------------------------------ the command
def predicted(monkeypatch, whole: Path, bilm: Path, *argv: str, lines: bytes = b"") -> int:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(lines)))
    return classification.main(["--out", str(whole), "--bilstm", str(bilm / "bilstm.pt"), *argv])


def test_predict_prints_label_and_probabilities_of_a_text_or_of_lines(capsys, monkeypatch, whole, bilm):
    lines = ["the bank .", "the cöurt ."]
    clf = load(whole, bilm, "frozen")
    assert predicted(monkeypatch, whole, bilm, "--predict", lines[0], "--setting", "frozen", "--precision", "fp32") == 0
    label, *shares = capsys.readouterr().out.rstrip("\n").split("\t")
    expected = clf.predict(lines)
    assert label == expected[0]["label"]
    assert shares == [f"{name} {p:.4f}" for name, p in expected[0]["probabilities"].items()]
    options = ["--predict", "-", "--json", "--setting", "frozen", "--precision", "fp32"]
    assert predicted(monkeypatch, whole, bilm, *options, lines="\r\n".join(lines).encode()) == 0
    for line, text, prediction in zip(capsys.readouterr().out.splitlines(), lines, expected, strict=True):
        found = json.loads(line)
        assert (found["text"], found["label"]) == (text, prediction["label"])
        assert found["probabilities"] == pytest.approx(prediction["probabilities"], abs=1e-6)


@pytest.mark.parametrize("lines, message", [
    (b"a\n\nb\n", "text 1 has no words"), (b"a\xff\n", "standard input, line 1"), (b"\n", "text 0 has no words")])
def test_lines_that_cannot_be_classified_are_named(capsys, monkeypatch, whole, bilm, lines, message):
    assert predicted(monkeypatch, whole, bilm, "--predict", "-", lines=lines) == 2
    captured = capsys.readouterr()
    assert not captured.out and message in captured.err and captured.err.count("\n") == 1


# ------------------------------------------------------------------------------------------ metrics, real models
def test_metrics_are_those_of_a_matrix_worked_out_on_paper():
    gold = np.array([0, 0, 0, 1, 1, 2])
    predicted = np.array([0, 0, 1, 1, 0, 1])
    p = np.full((6, 3), 0.1)
    p[np.arange(6), predicted] = 0.8
    p[0] = [0.5, 0.3, 0.2]
    found = classification_metrics(p, gold, ["a", "b", "c"])
    assert found["confusion"] == [[2, 1, 0], [1, 1, 0], [0, 1, 0]]
    assert found["accuracy"] == 3 / 6
    assert found["classes"]["a"] == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "rows": 3})
    assert found["classes"]["b"] == pytest.approx({"precision": 1 / 3, "recall": 1 / 2, "f1": 2 / 5, "rows": 2})
    assert found["classes"]["c"] == {"precision": 0, "recall": 0, "f1": 0, "rows": 1}
    assert found["macro_precision"] == pytest.approx(1 / 3)
    assert found["macro_recall"] == pytest.approx(7 / 18)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 5) / 3)
    assert found["nll"] == pytest.approx(-(math.log(0.5) + 2 * math.log(0.8) + 3 * math.log(0.1)) / 6)
    assert found["calibration_error"] == pytest.approx((0.5 + abs(5 * 0.8 - 2)) / 6)        # bins of 1 and of 5 rows


def test_metrics_over_seeds_have_means_and_the_ensemble_of_mean_probabilities():
    gold = np.array([0, 1])
    p = np.array([[[0.9, 0.1], [0.6, 0.4]], [[0.4, 0.6], [0.1, 0.9]]])
    found = over_seeds(p, gold, ["a", "b"], fresh=np.array([False, True]))
    assert [seed["accuracy"] for seed in found["seeds"]] == [0.5, 1.0 / 2]
    assert found["accuracy"] == {"mean": 0.5, "std": 0.0} and found["ensemble"]["accuracy"] == 1.0
    assert found["fresh"]["rows"] == 1 and found["fresh"]["accuracy"] == pytest.approx({"mean": 0.5, "std": 0.5**0.5})
    heads = {"frozen-0": torch.tensor(p[0]), "frozen-1": torch.tensor(p[1])}
    loss, numbers = validation_numbers(heads, torch.tensor(gold), ["frozen"])
    assert loss == pytest.approx(-math.log(0.9 * 0.4 * 0.4 * 0.9) / 4) and numbers["frozen"]["accuracy"] == [0.5, 0.5]


def test_word_metrics_are_means_over_the_gold_words():
    found = word_metrics(np.array([4, 4, 4, 5]), np.array([4, 4, 6, 4]), np.array([0, 0, 4, 5]))
    assert (found["accuracy"], found["top5_accuracy"]) == (0.5, 0.75)
    assert found["macro_precision"] == found["macro_recall"] == pytest.approx((2 / 3 + 0) / 2)


@ALL_SETTINGS
def test_the_committed_classifier_reaches_its_published_accuracy_on_real_rows(ag_news, setting):
    if not (ROOT / "models" / "classifier.pt").exists():
        pytest.skip("models/classifier.pt is missing: run `python classification.py --seeds 3` first")
    numbers = json.loads((ROOT / "models" / "classification.json").read_text())["settings"][setting]
    published = numbers["test"]["seeds"][numbers["best"]]["accuracy"]
    rows = np.arange(0, 7600, 7)[:1000]
    table = read_csv(ag_news / "test.csv").iloc[rows]
    clf = load(ROOT / "models", ROOT / "models", setting)
    found = clf.probabilities(table.description.tolist(), "auto").argmax(dim=1).numpy()
    accuracy = np.mean(found == table["class"].to_numpy() - 1)
    assert abs(accuracy - published) < 3 * (published * (1 - published) / 1000) ** 0.5
    ensemble = np.array(list(numbers["predictions"]), dtype=int)[rows]
    assert np.mean(found == ensemble) > 0.95, "one seed agrees with the mean of all seeds on the same rows"
