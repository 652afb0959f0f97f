"""Heads and their training, against second, slow implementations; whole runs are in test_tasks.py."""
import math
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SENTENCES, changed, classifier, gradients_of_update, tiny, trainer_of
from pytest import approx
from torch import Tensor, nn

import classification
import ELMO
from classification import SETTINGS, Config, Head, Trainer
from data.tasks import Part, Task
from run.optimization import dropout_mask

Weights = dict[str, Tensor]


# ------------------------------------------------------------ heads in plain PyTorch, from the weights in their file
# w: the weights of a head by name. It reads one text at a time, so that there is no padding.
def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """A linear layer of the head."""
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def plain_mix(w: Weights, text: Tensor) -> Tensor:
    """(n, width) mix of the layers (J, n, D) of a text."""
    if "mix.w" not in w:
        return linear(w, "mix.linear", torch.cat(text.unbind(), dim=1)).relu()
    s = w["mix.w"].softmax(dim=0)
    return w["mix.gamma"] * torch.einsum("j,jnd->nd", s, text)


def plain_states(w: Weights, x: Tensor) -> list[Tensor]:
    """The states (n, H) of the forward and of the backward LSTM over a text x (n, width), in reading order."""
    H = w["attention.weight"].shape[1]
    if len(x) == 0:
        return [torch.zeros(0, H), torch.zeros(0, H)]
    lstm = nn.LSTM(x.shape[1], H, bidirectional=True)
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
        lstm.get_parameter(name).data = w[f"forward_lstm.{name}"]
        lstm.get_parameter(f"{name}_reverse").data = w[f"backward_lstm.{name}"]
    states, _ = lstm(x)
    return list(states.chunk(2, dim=1))


def plain_pool(w: Weights, directions: list[Tensor]) -> Tensor:
    """(6H,) [maximum, attention, mean] of the forward states, then of the backward ones; zeros without words."""
    pooled = []
    for h in directions:
        if len(h) == 0:
            return torch.zeros(6 * h.shape[1])
        attention = linear(w, "attention", h)[:, 0].softmax(dim=0)
        pooled.append(h.max(dim=0).values)
        pooled.append(attention @ h)
        pooled.append(h.mean(dim=0))
    return torch.cat(pooled)


def compared(w: Weights, layer: str, a: Tensor, b: Tensor) -> Tensor:
    """A layer of the matcher over [a; b; |a - b|; a * b]."""
    features = [a, b, (a - b).abs(), a * b]
    return linear(w, f"matcher.{layer}", torch.cat(features, dim=-1)).relu()


def plain_side(w: Weights, own: list[Tensor], other: list[Tensor]) -> Tensor:
    """(6H,) one side of a pair: every state is compared with the average of the other side that it attends to."""
    directions = []
    for h, states in zip(own, other, strict=True):
        found = F.scaled_dot_product_attention(h, states, states)   # zeros if the other side has no states
        directions.append(compared(w, "compare", h, found))
    return plain_pool(w, directions)


def plain_logits(w: Weights, texts: list[Tensor], text_mask=1.0, mix_masks=(1.0,)) -> Tensor:
    """(C,) logits of one row: one text (J, n, D), or a pair of them."""
    sides = []
    for text, mask in zip(texts, mix_masks, strict=True):
        x = plain_mix(w, text) * mask
        sides.append(plain_states(w, x))
    if len(sides) == 1:
        pooled = plain_pool(w, sides[0])
    else:
        u = plain_side(w, *sides)
        v = plain_side(w, *reversed(sides))
        pooled = compared(w, "match", u, v)
    return linear(w, "out", pooled * text_mask)


@pytest.mark.parametrize("task", ["ag_news", "nli"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_logits_of_a_padded_batch_equal_those_of_each_text_by_itself_and_of_plain_pytorch(setting, task):
    head = Head(Config(hidden=5, task=task, dropout=0.4), setting, 3, 8, classes=4)
    generator = torch.Generator().manual_seed(1)
    for weight in head.parameters():        # large weights and biases, so that every wrong equation shows
        weight.data.normal_(std=0.7, generator=generator)
    layers = torch.randn(3, 6, 4, 8, generator=generator)                       # random numbers in the padding too
    lengths = torch.tensor([6, 3, 1, 0])    # of four texts; as pairs they have 6 and 1, 3 and 0 words
    masks = head.dropout_masks(4, generator)
    logits = head(layers, lengths, masks)
    assert len(logits) == (2 if task == "nli" else 4)
    for n, found in enumerate(logits):
        rows = [n, n + 2] if task == "nli" else [n]
        texts = [layers[:, :lengths[row], row] for row in rows]
        expected = plain_logits(head.state_dict(), texts, masks[0][n], masks[1][0, rows])
        assert torch.allclose(found, expected, atol=1e-5)
        own_masks = (masks[0][n:n + 1], masks[1][:, rows])
        by_itself = head(layers[:, :, rows], lengths[rows], own_masks)
        assert torch.allclose(by_itself[0], expected, atol=1e-5)


def test_states_of_both_directions_are_in_reading_order_and_padding_comes_after_them():
    head = Head(Config(hidden=5), "trainable", 3, 8, classes=4).initialize(0)
    x = torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(0))        # (T, B, width)
    lengths = torch.tensor([6, 3, 1])
    with torch.no_grad():
        found = head.read(x, lengths)                                           # (2, T, B, H)
        for b, length in enumerate(lengths):
            forward, backward = plain_states(head.state_dict(), x[:length, b])
            assert torch.allclose(found[0, :length, b], forward, atol=1e-5)
            assert torch.allclose(found[1, :length, b], backward, atol=1e-5)


def test_a_text_is_pooled_over_its_words_and_not_over_its_padding():
    head = Head(Config(hidden=1), "trainable", 3, 8, classes=4)
    weights = head.attention.state_dict()
    weights["weight"].fill_(math.log(3) / 2)            # a state that is larger by 2 gets 3 times the attention
    weights["bias"].fill_(0)
    forward = [                                         # states of three texts of 2, 3 and 0 words
        [1, 3, 100],
        [6, 4, 8],
        [100, 100, 100]]
    backward = [
        [7, 5, -100],
        [-1, -1, -1],
        [-100, 100, 0]]
    h = torch.tensor([forward, backward]).float().transpose(1, 2)               # (2, T, B)
    words = torch.tensor([
        [1, 1, 0],
        [1, 1, 1],
        [0, 0, 0]])
    expected = torch.tensor([                           # maximum, attention and mean; first forward, then backward
        [3, (1 + 3 * 3) / 4, 2, 7, (3 * 7 + 5) / 4, 6],
        [8, (3 * 6 + 4 + 9 * 8) / 13, 6, -1, -1, -1],
        [0, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        found = head.pool(h[..., None], words.t() == 1)
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_notebook_needs_only_torch_to_classify_with_the_file(whole):
    content = torch.load(whole / "classifier.pt", weights_only=True)
    assert list(content) == ["format", "config", "labels", "heads", "bilm", "weights", "metrics", "digest"]
    assert content["labels"] == ["World", "Sports", "Business", "Sci/Tech"]
    clf = classifier(whole, "frozen")
    text = "the bank sued the court ."
    weights = {}
    for name, value in content["weights"].items():
        if name.startswith("frozen."):
            weights[name.removeprefix("frozen.")] = value.float()
    logits = plain_logits(weights, clf.elmo.embed([text]))
    p = logits.softmax(dim=0).tolist()
    prediction, = clf.predict([text])
    assert prediction["probabilities"] == approx(dict(zip(content["labels"], p, strict=True)), abs=1e-5)


def test_forget_gates_begin_open_and_all_other_biases_at_zero():
    head = Head(Config(hidden=2), "trainable", 3, 4, classes=4).initialize(0)
    for lstm in (head.forward_lstm, head.backward_lstm):
        assert lstm.bias_ih_l0.tolist() == [0, 0, 1, 1, 0, 0, 0, 0]             # gates i, f, g, o
        assert not lstm.bias_hh_l0.any()
    assert not head.out.bias.any()


# ------------------------------------------------------------------------------------ heads that learn side by side
def trained(trainer: Trainer, steps: int) -> Trainer:
    """The trainer after its first steps."""
    for step in range(steps):
        trainer.step(step)
    return trainer


def all_weights(trainer: Trainer) -> Weights:
    """Copies of all weights that learn, and of their averages."""
    weights = dict(trainer.model.state_dict())
    for name, learner in trainer.learners.items():
        weights |= learner.modules.state_dict(prefix=f"learning.{name}.")
    return deepcopy(weights)


def test_heads_of_one_seed_share_every_weight_of_the_same_shape_but_w(elmo):
    trainer = trainer_of(elmo, seed=7, seeds=2)
    heads = {}
    for name, learner in trainer.learners.items():
        heads[name] = learner.modules["head"].state_dict()
    trainable = heads["trainable-7"]
    frozen = heads["frozen-7"]
    function = heads["function-7"]
    assert changed(trainable, frozen) == {"mix.w"}
    assert trainable["mix.w"].tolist() == [0, 0, 0]
    assert trainable["mix.gamma"] == 1
    assert torch.equal(frozen["mix.w"], frozen["mix.w"].half()), "half precision holds it exactly"
    shared = [name for name in function if "mix" not in name and "weight_ih" not in name]
    assert "forward_lstm.weight_hh_l0" in shared
    for name in shared:
        assert torch.equal(trainable[name], function[name]), name
    assert not torch.equal(frozen["forward_lstm.weight_hh_l0"], frozen["backward_lstm.weight_hh_l0"])
    drawn = {name for name in frozen if "weight" in name}
    assert changed(frozen, heads["frozen-8"]) == drawn | {"mix.w"}


def test_dropout_removes_a_share_of_the_units_and_scales_the_others_so_that_their_mean_stays():
    mask = dropout_mask(0.2, (100, 100), torch.Generator().manual_seed(0))
    assert mask.unique().tolist() == [0, 1.25]
    assert (mask == 0).float().mean().item() == approx(0.2, abs=0.02)


def test_in_training_a_sentence_loses_the_same_units_of_the_mix_at_every_position(elmo):
    trainer = trainer_of(elmo, setting="trainable", dropout=0.5)
    head = trainer.learners["trainable-0"].modules["head"]
    mixed = []
    read = []
    head.mix.register_forward_hook(lambda mix, inputs, output: mixed.append(output.detach()))
    head.forward_lstm.register_forward_pre_hook(lambda lstm, inputs: read.append(inputs[0].detach()))
    trained(trainer, 3)
    for x, with_dropout in zip(mixed, read, strict=True):
        factor = with_dropout / x                                   # (T, B, width)
        assert factor.unique().tolist() == approx([0, 2])
        assert (factor == factor[:1]).all()
        assert len(factor[0].unique(dim=0)) == x.shape[1], "every sentence loses other units"


def lost_units(trainer: Trainer, steps: int) -> dict[str, list[Tensor]]:
    """For each head, the units (N, 6H) of the pooled texts that it loses in each of its first steps, as bool."""
    lost = {name: [] for name in trainer.learners}
    for name, learner in trainer.learners.items():
        def record(layer, inputs, found=lost[name]):
            """Adds the zeros that the last layer reads."""
            found.append(inputs[0] == 0)

        learner.modules["head"].out.register_forward_pre_hook(record)
    trained(trainer, steps)
    return lost


def test_settings_of_one_seed_lose_the_same_units_and_other_seeds_and_steps_other_ones(elmo):
    trainer = trainer_of(elmo, seeds=2, batch_tokens=10_000, epochs=3, dropout=0.5)     # one batch in every epoch
    lost = lost_units(trainer, 2)
    for name, (first, second) in lost.items():
        _, _, seed = name.partition("-")
        expected_first, expected_second = lost[f"trainable-{seed}"]
        assert first[expected_first].all()
        assert second[expected_second].all()
        assert not torch.equal(first, second)
        assert len(first.unique(dim=0)) == len(first), "two texts lose the same units"
        assert 0.4 < first.float().mean() < 0.6
    assert not torch.equal(lost["trainable-0"][0], lost["trainable-1"][0])


def test_heads_are_evaluated_twice_per_pass_over_the_training_rows_and_at_the_end(elmo):
    run = classification.train(trainer_of(elmo, setting="frozen", epochs=1.25))
    assert [entry["epoch"] for entry in run.history] == [0.5, 1.0, 1.25]


def test_another_epoch_has_other_batches(elmo):
    trainer = trainer_of(elmo, setting="frozen", batch_tokens=100)
    first = trainer.batches
    trained(trainer, trainer.per_epoch + 1)
    second = trainer.batches
    first = np.concatenate(first).tolist()
    second = np.concatenate(second).tolist()
    assert sorted(first) == list(range(120))
    assert sorted(second) == list(range(120))
    assert first != second


def test_trainable_and_frozen_stay_identical_if_w_is_the_same_and_does_not_learn(elmo):
    trainer = trainer_of(elmo, mix_lr=0.0, clip=1e9)
    trainable = trainer.learners["trainable-0"].modules["head"]
    frozen = trainer.learners["frozen-0"].modules["head"]
    before = deepcopy(frozen.state_dict())
    trainable.mix.w.data.copy_(frozen.mix.w)
    trained(trainer, 5)
    assert not changed(trainable.state_dict(), frozen.state_dict())
    learning = {name for name in before if "mix" not in name and "bias_hh" not in name}
    assert changed(before, frozen.state_dict()) == learning


def test_heads_trained_side_by_side_equal_heads_trained_by_themselves(elmo):
    every = all_weights(trained(trainer_of(elmo, seed=3, seeds=2), 12))
    fewer = [trainer_of(elmo, seed=3, seeds=2, setting=setting) for setting in SETTINGS]
    fewer.append(trainer_of(elmo, seed=3, setting="function"))
    for trainer in fewer:
        weights = all_weights(trained(trainer, 12))
        assert not changed(weights, {name: every[name] for name in weights})


# the share of the peak learning rate before each of the first of 100 steps: 3 steps of warm-up, then a cosine
SHARES = [1 / 3, 2 / 3, 0.99902, 0.99780, 0.99610, 0.99391]


def test_training_equals_a_plain_loop_with_adamw(elmo):
    trainer = trainer_of(elmo, seed=2, setting="trainable", clip=0.2, dropout=0.0)
    trainer.steps = 100
    head = trainer.new_head("trainable", 4, 2)
    mix = [head.mix.w, head.mix.gamma]
    others = [weight for name, weight in head.named_parameters() if "mix" not in name]
    optimizer = torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.01)
    optimizer.add_param_group({"params": mix, "weight_decay": 0.0})
    part = trainer.parts["train"]
    norms = []
    for step, share in enumerate(SHARES):
        rows = trainer.batches[step]
        layers = trainer.vectors(part.encoded, rows, torch.float32)
        lengths = torch.from_numpy(part.words[rows])
        log_p = head(layers, lengths).log_softmax(dim=1)
        gold = log_p[range(len(rows)), part.labels[rows]]
        loss = -(0.95 * gold + 0.05 * log_p.mean(dim=1)).mean()     # label smoothing
        loss.backward()
        norm = nn.utils.clip_grad_norm_(head.parameters(), 0.2)
        norms.append(norm)
        optimizer.param_groups[0]["lr"] = 0.004 * share
        optimizer.param_groups[1]["lr"] = 0.02 * share
        optimizer.step()
        optimizer.zero_grad()
        summed, found_norm, count = trainer.step(step)
        assert count == len(rows)
        assert float(summed) / count == approx(loss.item(), rel=1e-5)
        assert float(found_norm) == approx(norm.item(), rel=1e-3)
    assert min(norms) < 0.2 < max(norms)
    found = trainer.learners["trainable-2"].modules["head"].state_dict()
    found.pop("attention.bias")         # it moves all scores alike: its gradient is 0 up to rounding
    for name, weight in found.items():
        assert torch.allclose(weight, head.state_dict()[name], atol=1e-5), name


def test_newest_weights_are_evaluated_at_first_and_then_averages_of_every_tenth_step_and_the_last(elmo):
    trainer = trainer_of(elmo, setting="function", ema=0.15)
    trainer.steps = 23
    learning = trainer.learners["function-0"].modules["head"].out.weight
    average = trainer.model["function-0"]["head"].out.weight
    snapshots = []
    for step in range(23):
        trainer.step(step)
        if step < 10:
            assert torch.equal(average, learning), "an early evaluation must not measure the random weights"
        if step in (9, 19, 22):
            snapshots.append(learning.detach().clone())
    expected = torch.lerp(snapshots[1], snapshots[0], 0.1)          # decay 1/10
    expected = torch.lerp(snapshots[2], expected, 0.15)             # 2/11 is more than `ema`
    assert torch.allclose(average, expected, atol=1e-6)


class Rehearsed(Trainer):
    """A trainer whose steps only set the averaged weights, so that every text has the class probabilities of ROUNDS."""
    ROUNDS = ([0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25], [0.1, 0.2, 0.3, 0.4])

    def step(self, step: int) -> tuple[Tensor, Tensor, int]:
        for modules in self.model.values():
            out = modules["head"].out
            out.weight.data.zero_()
            out.bias.data = torch.tensor(self.ROUNDS[step]).log()
        return torch.zeros(()), torch.zeros(()), 1


def test_the_weights_are_those_of_the_evaluation_with_the_lowest_validation_loss(elmo):
    options = {"setting": "frozen", "epochs": 3, "batch_tokens": 10_000}        # one step per epoch
    plain = trainer_of(elmo, **options)
    trainer = Rehearsed(plain.config, plain.vectors, plain.parts, 4)
    validation = trainer.parts["validation"]
    validation.labels = torch.arange(30) % 4                        # 8 of classes 0 and 1, 7 of classes 2 and 3
    run = classification.train(trainer)
    losses = []
    for entry in run.history:
        loss, = entry["validation"]["frozen"]["loss"]
        losses.append(loss)
    assert losses[0] == approx(-(8 * math.log(0.7) + 22 * math.log(0.1)) / 30, rel=1e-5)
    assert losses[1] == approx(math.log(4), rel=1e-5)
    assert losses[2] == approx(-(8 * math.log(0.1 * 0.2) + 7 * math.log(0.3 * 0.4)) / 30, rel=1e-5)
    assert run.best["frozen-0.head.out.bias"].exp().tolist() == approx([0.25] * 4)


@pytest.mark.parametrize("finetune", [False, True])
def test_probabilities_of_rows_are_in_the_order_of_the_rows_and_by_the_evaluated_weights(elmo, finetune):
    trainer = trainer_of(elmo, setting="trainable", finetune=finetune, unfreeze=0.0)
    trained(trainer, 20)
    part = trainer.parts["validation"]
    chosen = np.array([5, 29, 0, 11, 2])
    p = trainer.probabilities(part, chosen)["trainable-0"]
    modules = trainer.model["trainable-0"]
    bilm = modules["bilm"] if finetune else elmo.model
    for row, found in zip(chosen, p, strict=True):
        layers = classification.ELMoVectors(bilm)(part.encoded, np.array([row]), torch.float32)
        logits = plain_logits(modules["head"].state_dict(), [layers[:, :, 0]])
        assert torch.allclose(found, logits.softmax(dim=0), atol=1e-5)


# --------------------------------------------------------------------------------- a biLM that learns, or does not
@pytest.mark.parametrize("representation, unused", [("embedding", {"bias"}), ("char", {"bias", "table"})])
def test_only_a_copy_of_the_bilm_learns_the_top_layer_first_and_lower_ones_more_slowly(representation, unused):
    elmo = ELMO.ELMo.train(SENTENCES * 3, tiny(representation=representation, epochs=0.5))
    before = deepcopy(elmo.model.state_dict())
    trained(trainer_of(elmo), 3)
    trainer = trainer_of(elmo, finetune=True, unfreeze=0.25, bilm_lr=0.01)
    trainer.steps = 40
    bilm = trainer.learners["trainable-0"].modules["bilm"]
    start = {}
    for step in range(trainer.steps):
        old = deepcopy(bilm.state_dict())
        trainer.step(step)
        for name, weight in bilm.state_dict().items():
            moved = (weight - old[name]).abs().max().item()
            if moved:
                start.setdefault(name, (step, moved))
    assert not changed(before, elmo.model.state_dict())
    assert set(start) == {name for name in before if "bias_hh" not in name} - unused
    # the first update of Adam is as large as the learning rate: 0.01, divided by 2.6 for each layer below the top,
    # times the share of the schedule after a quarter, a half and three quarters of the steps
    top = (10, 0.01 * 0.85502)
    middle = (20, 0.01 / 2.6 * 0.505)
    lowest = (30, 0.01 / 6.76 * 0.15498)
    for name, (step, moved) in start.items():
        expected = lowest
        if "lstms.1" in name:
            expected = top
        elif "lstms.0" in name:
            expected = middle
        assert step == expected[0], name
        assert moved == approx(expected[1], rel=0.01), name


def test_a_sentence_loses_the_same_units_of_a_bilm_that_learns_at_every_position(elmo):
    trainer = trainer_of(elmo, finetune=True, bilm_dropout=0.5)
    learner = trainer.learners["trainable-0"]
    part = trainer.parts["train"]
    rows = np.flatnonzero(part.lengths == 7)[:4]
    generator = torch.Generator().manual_seed(0)
    h, lengths = learner.contextual(part, rows, torch.float32, generator)                       # (3, T, B, D)
    assert h.shape[:3] == (3, 7, 4)
    assert lengths.tolist() == [7, 7, 7, 7]
    lost = torch.stack([h[0] == 0, h[1] == 0, h[2] == h[1]])        # h_2 is h_1 plus what the upper LSTM adds
    assert (lost == lost[:, :1]).all()
    assert lost.float().mean().item() == approx(0.5, abs=0.15)
    units = torch.cat(lost[:, 0].chunk(2, dim=-1))                  # (6, B, P): layers and directions
    assert len(units.flatten(0, 1).unique(dim=0)) == 6 * 4, "layers, directions and sentences lose different units"
    x = trainer.vectors(part.encoded, rows, torch.float32)[0]
    assert torch.allclose(h[0], 2 * x * ~lost[0]), "units that stay are scaled"


def norm_of(gradients: dict[str, Tensor]) -> float:
    """The norm of all gradients as one vector."""
    flat = [gradient.flatten() for gradient in gradients.values()]
    return torch.cat(flat).norm().item()


def test_the_gradients_of_a_head_and_of_its_bilm_are_clipped_apart(elmo):
    trainer = trainer_of(elmo, finetune=True, unfreeze=0.0, clip=0.001)
    learner = trainer.learners["trainable-0"]
    gradients = gradients_of_update(trainer, 0, learner.modules, learner.optimizers)
    for part in ("head", "bilm"):
        of_part = {name: gradient for name, gradient in gradients.items() if name.startswith(part)}
        assert norm_of(of_part) == approx(0.001, rel=1e-4)


def test_a_layer_that_does_not_learn_yet_has_no_gradient_and_no_share_of_the_norm(elmo):
    trainer = trainer_of(elmo, finetune=True, unfreeze=0.25, clip=0.001)
    trainer.steps = 40
    learner = trainer.learners["trainable-0"]
    bilm = gradients_of_update(trainer, 15, learner.modules["bilm"], learner.optimizers)
    for name in bilm:
        assert "lstms.1" in name
    assert "forward_lstms.1.weight_ih_l0" in bilm
    assert "backward_lstms.1.weight_ih_l0" in bilm
    assert norm_of(bilm) == approx(0.001, rel=1e-4)


def test_an_adapted_bilm_begins_with_the_weights_that_it_had(elmo, tmp_path):
    texts = ["the quagga sat on the mat .", "oil prices fall , said the quagga ."] * 10
    task = Task("sst2", ["a", "b"], Part.of([]), Part.of([]), Part.of([]), texts)
    config = Config(task="sst2", adapt=1e-6, adapt_lr=0.0)          # one step that changes nothing
    run = classification.adapt(elmo, task, config, tmp_path / "resume.pt", resume=False)
    assert run.step == 1
    adapted = ELMO.ELMo.from_run(run)
    known = elmo.words.words
    assert adapted.words.words == [*known, "quagga"]
    for found, expected in zip(adapted.embed(SENTENCES), elmo.embed(SENTENCES), strict=True):
        assert torch.allclose(found, expected, atol=1e-2)           # rounded to half precision
