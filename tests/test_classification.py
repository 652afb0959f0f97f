"""Heads and their training, against second, slow implementations; whole runs are in test_tasks.py."""
import math
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SENTENCES, changed, classifier, tiny, trainer_of
from torch import Tensor, nn
from torch.testing import assert_close

import classification
import ELMO
from classification import SETTINGS, Config, Head, Trainer

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
Weights = dict[str, Tensor]


# ---------------------------------------------------------------- heads, from the weights in their file and torch alone
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
def test_logits_of_a_padded_batch_equal_those_of_each_text_by_itself_and_of_torch_alone(setting, task):
    head = Head(Config(hidden=5, task=task, dropout=0.4), setting, 3, 8, classes=4)
    generator = torch.Generator().manual_seed(1)
    for weight in head.parameters():        # large ones, biases too, so that every wrong equation shows
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
        assert_close(found, expected, **CLOSE)
        own_masks = (masks[0][n:n + 1], masks[1][:, rows])
        by_itself = head(layers[:, :, rows], lengths[rows], own_masks)
        assert_close(by_itself[0], expected, **CLOSE)


def test_a_text_is_pooled_over_its_words_and_not_over_its_padding():
    head = Head(Config(hidden=1), "trainable", 3, 8, classes=4)
    weights = head.attention.state_dict()
    weights["weight"].fill_(math.log(3) / 2)            # a state that is larger by 2 gets 3 times the attention
    weights["bias"].fill_(0)
    forward = [[1, 3, 100], [6, 4, 8], [100, 100, 100]]         # states of three texts of 2, 3 and 0 words
    backward = [[7, 5, -100], [-1, -1, -1], [-100, 100, 0]]
    h = torch.tensor([forward, backward], dtype=torch.float32).transpose(1, 2)[..., None]       # (2, T, B, 1)
    inside = torch.tensor([[True, True, False], [True, True, True], [False, False, False]]).t()
    expected = [                                        # maximum, attention and mean; first forward, then backward
        [3, (1 + 3 * 3) / 4, 2, 7, (3 * 7 + 5) / 4, 6],
        [8, (3 * 6 + 4 + 9 * 8) / 13, 6, -1, -1, -1],
        [0, 0, 0, 0, 0, 0]]
    with torch.no_grad():
        found = head.pool(h, inside)
    assert_close(found, torch.tensor(expected, dtype=torch.float32))


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
    assert prediction["probabilities"] == pytest.approx(dict(zip(content["labels"], p, strict=True)), abs=1e-5)


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


def inputs_of(module: nn.Module) -> list[Tensor]:
    """A list that gets the first input of every later call of a module."""
    inputs = []
    module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].detach()))
    return inputs


def check_masks(masks: list[Tensor], share: float) -> None:
    """That masks (units, texts) are about this full, and that nearly all texts of all masks lose different units."""
    for mask in masks:
        assert mask.float().mean().item() == pytest.approx(share, abs=0.12)
    columns = torch.cat(masks, dim=1)
    different = columns.unique(dim=1)
    assert different.shape[1] > 0.8 * columns.shape[1]          # a few are the same by chance


def inside_mask(values: Tensor, lengths: list[int]) -> Tensor:
    """(units, texts) which units of values (T, B, units) are not zero; they must be the same at all words of a text."""
    columns = []
    for b, length in enumerate(lengths):
        used = values[:length, b] != 0                          # (length, units)
        assert torch.equal(used, used[:1].expand_as(used)), "words of one text lose different units"
        columns.append(used[0])
    return torch.stack(columns, dim=1)


def test_dropout_takes_the_same_units_at_all_words_of_a_text_and_others_in_every_text_head_and_step(elmo):
    trainer = trainer_of(elmo, setting="trainable", seeds=2, dropout=0.4)
    mixes = [inputs_of(learner.modules["head"].forward_lstm) for learner in trainer.learners.values()]
    texts = [inputs_of(learner.modules["head"].out) for learner in trainer.learners.values()]
    trained(trainer, 3)
    of_mixes = []
    of_texts = []
    for step in range(3):
        lengths = trainer.parts["train"].words[trainer.batches[step]]
        of_mixes += [inside_mask(of_head[step], lengths) for of_head in mixes]
        of_texts += [(of_head[step] != 0).t() for of_head in texts]
    check_masks(of_mixes, 0.6)
    check_masks(of_texts, 0.6)


def test_dropout_divides_what_remains_by_its_probability(elmo):
    trainer = trainer_of(elmo, setting="trainable", dropout=0.4)
    head = trainer.learners["trainable-0"].modules["head"]
    found = inputs_of(head.forward_lstm)
    rows = trainer.batches[0]
    layers = trainer.vectors(trainer.parts["train"].encoded, rows, torch.float32)
    average = layers.mean(dim=0)                                # w is 0 and gamma 1 before the first step
    trainer.step(0)
    assert_close(found[0], average / 0.6 * (found[0] != 0), **CLOSE)


def test_dropout_of_a_bilm_that_learns_takes_the_same_units_at_all_words_of_a_text_and_others_in_every_layer(elmo):
    trainer = trainer_of(elmo, finetune=True, bilm_dropout=0.4, dropout=0.0)
    layers = inputs_of(trainer.learners["trainable-0"].modules["head"].mix)
    trained(trainer, 2)
    masks = []
    for step in range(2):
        lengths = trainer.parts["train"].words[trainer.batches[step]]
        h = layers[step]                                        # (3, T, B, D)
        without_skip = h[2] - h[1]
        for values in (h[0], h[1], without_skip):
            both = inside_mask(values, lengths)
            masks += both.chunk(2)                              # forward and backward
    assert len(masks) == 12
    check_masks(masks, 0.6)


def test_heads_of_one_seed_lose_the_same_units_whatever_their_settings(elmo):
    trainer = trainer_of(elmo, dropout=0.4)
    mixes = []
    texts = []
    for learner in trainer.learners.values():
        head = learner.modules["head"]
        mixes.append(inputs_of(head.forward_lstm))
        texts.append(inputs_of(head.out))
    trainer.step(0)
    trainable, frozen, function = texts
    assert torch.equal(trainable[0] == 0, frozen[0] == 0)
    assert torch.equal(trainable[0] == 0, function[0] == 0)     # of the pooled text
    trainable, frozen, _ = mixes
    assert torch.equal(trainable[0] == 0, frozen[0] == 0)       # of the mix


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


def test_training_equals_a_plain_loop_with_adamw(elmo):
    trainer = trainer_of(elmo, seed=2, setting="trainable", clip=0.2, dropout=0.0, epochs=25.0, weight_decay=0.1)
    assert trainer.steps == 400                                 # so that the learning rate rises for 12 steps
    head = trainer.new_head("trainable", 4, 2)
    mix = [head.mix.w, head.mix.gamma]
    others = [weight for name, weight in head.named_parameters() if "mix" not in name]
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.1)
    adam = torch.optim.Adam(mix, betas=(0.9, 0.99))
    part = trainer.parts["train"]
    norms = []
    for step in range(6):
        rows = trainer.batches[step]
        layers = trainer.vectors(part.encoded, rows, torch.float32)
        lengths = torch.from_numpy(part.words[rows])
        log_p = head(layers, lengths).log_softmax(dim=1)
        gold = F.one_hot(part.labels[rows], 4)
        target = 0.95 * gold + 0.05 / 4                         # label smoothing, which is 0.05 by default
        loss = -(target * log_p).sum(dim=1).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(head.parameters(), 0.2)
        norms.append(norm)
        adamw.param_groups[0]["lr"] = 0.004 * (step + 1) / 12
        adam.param_groups[0]["lr"] = 0.02 * (step + 1) / 12
        for optimizer in (adamw, adam):
            optimizer.step()
            optimizer.zero_grad()
        summed, *_, count = trainer.step(step)
        assert count == len(rows)
        assert float(summed) / count == pytest.approx(loss.item(), rel=1e-5)
    assert min(norms) < 0.2 < max(norms)
    found = trainer.learners["trainable-2"].modules["head"].state_dict()
    found.pop("attention.bias")         # it moves all scores alike: its gradient is 0 up to rounding
    for name, weight in found.items():
        assert_close(weight, head.state_dict()[name], **CLOSE, msg=name)


# cos(pi / 4) = 0.70711, so that after a quarter of the run the cosine is 0.01 + 0.99 / 2 * 1.70711 = 0.85502
@pytest.mark.parametrize("step, factor", [
    (0, 1 / 12), (1, 2 / 12), (100, 0.85502), (200, 0.505), (300, 0.15498), (399, 0.01002)])
def test_a_step_moves_weights_by_the_learning_rate_of_its_place_in_the_run(elmo, step, factor):
    trainer = trainer_of(elmo, setting="trainable", epochs=25.0, weight_decay=0.0, lr=0.004, mix_lr=0.02)
    assert trainer.steps == 400
    head = trainer.learners["trainable-0"].modules["head"]
    before = deepcopy(head.state_dict())
    trainer.step(step)                  # the first update of Adam is as large as the learning rate
    peaks = {"mix.w": 0.02, "mix.gamma": 0.02, "out.weight": 0.004, "backward_lstm.weight_ih_l0": 0.004}
    for name, peak in peaks.items():
        moved = head.get_parameter(name) - before[name]
        largest = moved.abs().max().item()
        assert largest == pytest.approx(peak * factor, rel=0.01), name


def test_every_pass_over_the_training_rows_has_every_row_once_in_another_order(elmo):
    trainer = trainer_of(elmo, setting="frozen")
    orders = []
    for epoch in range(2):
        trainer.step(epoch * trainer.per_epoch)
        orders.append(np.concatenate(trainer.batches).tolist())
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(120))
    assert orders[0] != orders[1]


def test_the_weights_of_a_run_are_the_averaged_ones_of_the_evaluation_with_the_lowest_loss(elmo):
    trainer = trainer_of(elmo, epochs=12.0, lr=0.02, ema=0.5)           # random labels: heads learn them by heart
    run = classification.train(trainer)
    assert [entry["epoch"] for entry in run.history] == [k / 2 for k in range(1, 25)]
    losses = []
    for entry in run.history:
        of_settings = [entry["validation"][setting]["loss"] for setting in SETTINGS]
        losses.append(np.mean(of_settings))
    best = int(np.argmin(losses))
    assert best < 20
    trainer.model.load_state_dict(run.best)
    part = trainer.parts["validation"]
    for setting in SETTINGS:
        p = trainer.probabilities(part)[f"{setting}-0"]
        loss = F.nll_loss(p.log(), part.labels).item()
        assert run.history[best]["validation"][setting]["loss"] == pytest.approx([loss], rel=1e-4)


def test_the_averaged_weights_are_those_of_the_formula(elmo):
    trainer = trainer_of(elmo, setting="function", ema=0.15, epochs=3)
    learning = trainer.learners["function-0"].modules["head"].out.weight
    average = trainer.model["function-0"]["head"].out.weight
    snapshots = []
    for step in range(30):
        trainer.step(step)
        if step in (9, 19, 29):
            snapshots.append(learning.detach().clone())
    expected = torch.lerp(snapshots[1], snapshots[0], 0.1)          # decay 1/10
    expected = torch.lerp(snapshots[2], expected, 0.15)             # 2/11 is more than `ema`
    assert_close(average, expected)
    p = trainer.probabilities(trainer.parts["validation"])
    trainer.learners["function-0"].modules["head"].out.weight.data.zero_()
    again = trainer.probabilities(trainer.parts["validation"])
    assert torch.equal(p["function-0"], again["function-0"]), "the weights that learn were evaluated"


# --------------------------------------------------------------------------------- a biLM that learns, or does not
@pytest.mark.parametrize("representation, unused", [("embedding", {"bias"}), ("char", {"bias", "table"})])
def test_only_a_copy_of_the_bilm_learns_the_top_layer_first_and_lower_ones_more_slowly(representation, unused):
    elmo = ELMO.ELMo.train(SENTENCES * 3, tiny(representation=representation, epochs=0.5))
    before = deepcopy(elmo.model.state_dict())
    trained(trainer_of(elmo), 3)
    trainer = trainer_of(elmo, finetune=True, unfreeze=0.25, bilm_lr=0.01, epochs=2.5)
    assert trainer.steps == 40
    bilm = trainer.learners["trainable-0"].modules["bilm"]
    first = {}                          # step and size of each weight's first update
    for step in range(31):
        old = deepcopy(bilm.state_dict())
        trainer.step(step)
        for name in changed(old, bilm.state_dict()) - first.keys():
            moved = bilm.state_dict()[name] - old[name]
            first[name] = (step, moved.abs().max().item())
    assert not changed(before, elmo.model.state_dict())
    assert set(first) == {name for name in before if "bias_hh" not in name} - unused
    # The first update of Adam is as large as the learning rate. After a quarter of the run, a half and three quarters
    # the cosine has fallen to 0.85502, 0.505 and 0.15498. Each layer is 2.6 times slower than the one above.
    expected = {
        "_lstms.1.": (10, 0.01 * 0.85502),
        "_lstms.0.": (20, 0.01 * 0.505 / 2.6),
        "": (30, 0.01 * 0.15498 / 2.6**2)}
    for name, (step, moved) in first.items():
        start, size = next(expected[layer] for layer in expected if layer in name)
        assert step == start, name
        assert moved == pytest.approx(size, rel=0.01), name


def test_the_gradients_of_a_head_and_of_its_bilm_are_clipped_apart(elmo):
    trainer = trainer_of(elmo, finetune=True, unfreeze=0.0, clip=0.001)
    learner = trainer.learners["trainable-0"]
    learner.optimizers.optimizers.clear()                       # so that the gradients stay after a step
    trainer.step(0)
    for module in learner.modules.values():
        gradients = []
        for weight in module.parameters():
            if weight.grad is not None:
                gradients.append(weight.grad.to_dense().flatten())
        assert torch.cat(gradients).norm().item() == pytest.approx(0.001, rel=1e-4)
