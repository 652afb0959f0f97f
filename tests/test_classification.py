"""Heads and their training, against second, slow implementations; whole runs are in test_tasks.py."""
import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from conftest import SENTENCES, changed, classifier, tiny, trainer_of
from torch import Tensor, nn

import ELMO
from classification import SETTINGS, Config, Head, Trainer
from run.optimization import lr_factor

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
        assert torch.allclose(found, expected, atol=1e-5)
        own_masks = (masks[0][n:n + 1], masks[1][:, rows])
        by_itself = head(layers[:, :, rows], lengths[rows], own_masks)
        assert torch.allclose(by_itself[0], expected, atol=1e-5)


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


def test_heads_draw_equal_dropout_masks_from_the_same_random_numbers(elmo):
    masks = []
    for learner in trainer_of(elmo).learners.values():
        generator = torch.Generator().manual_seed(5)
        masks.append(learner.modules["head"].dropout_masks(4, generator))
    trainable, frozen, function = masks
    assert torch.equal(trainable[0], frozen[0])
    assert torch.equal(trainable[0], function[0])                   # of the pooled text
    assert torch.equal(trainable[1], frozen[1])                     # of the mix
    assert trainable[1].unique().tolist() == [0.0, 1.25]            # a fifth is dropped


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
    trainer = trainer_of(elmo, seed=2, setting="trainable", clip=0.3)
    head = trainer.new_head("trainable", 4, 2)
    mix = [head.mix.w, head.mix.gamma]
    others = [weight for name, weight in head.named_parameters() if "mix" not in name]
    optimizer = torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.01)
    optimizer.add_param_group({"params": mix, "weight_decay": 0.0})
    part = trainer.parts["train"]
    norms = []
    for step in range(6):
        rows = trainer.batches[step]
        generator = torch.Generator().manual_seed(3 * 1_000_003 + step)
        layers = trainer.vectors(part.encoded, rows, torch.float32)
        lengths = torch.from_numpy(part.words[rows])
        masks = head.dropout_masks(len(rows), generator)
        logits = head(layers, lengths, masks)
        loss = F.cross_entropy(logits, part.labels[rows], label_smoothing=0.05)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(head.parameters(), 0.3)
        norms.append(norm)
        share = lr_factor(step, trainer.steps)
        optimizer.param_groups[0]["lr"] = 0.004 * share
        optimizer.param_groups[1]["lr"] = 0.02 * share
        optimizer.step()
        optimizer.zero_grad()
        summed, _, count = trainer.step(step)
        assert count == len(rows)
        assert float(summed) / count == pytest.approx(loss.item(), rel=1e-5)
    assert min(norms) < 0.3 < max(norms)
    found = trainer.learners["trainable-2"].modules["head"].state_dict()
    found.pop("attention.bias")         # it moves all scores alike: its gradient is 0 up to rounding
    for name, weight in found.items():
        assert torch.allclose(weight, head.state_dict()[name], atol=1e-5), name


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
    assert torch.allclose(average, expected, atol=1e-6)


# --------------------------------------------------------------------------------- a biLM that learns, or does not
@pytest.mark.parametrize("representation, unused", [("embedding", {"bias"}), ("char", {"bias", "table"})])
def test_only_a_copy_of_the_bilm_learns_the_top_layer_first_and_lower_ones_more_slowly(representation, unused):
    elmo = ELMO.ELMo.train(SENTENCES * 3, tiny(representation=representation, epochs=0.5))
    before = deepcopy(elmo.model.state_dict())
    trained(trainer_of(elmo), 3)
    trainer = trainer_of(elmo, finetune=True, unfreeze=0.2, bilm_lr=0.01)
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
    for name, (step, moved) in start.items():       # the first update of Adam is as large as the learning rate
        module, _, rest = name.partition(".")
        depth = 1 - int(rest[0]) if module.endswith("_lstms") else 2
        assert step == math.ceil(0.2 * (depth + 1) * trainer.steps), name
        expected = 0.01 / 2.6 ** depth * lr_factor(step, trainer.steps)
        assert moved == pytest.approx(expected, rel=0.01), name


def test_the_gradients_of_a_head_and_of_its_bilm_are_clipped_apart(elmo, monkeypatch):
    trainer = trainer_of(elmo, finetune=True, unfreeze=0.0, clip=0.001)
    learner = trainer.learners["trainable-0"]
    monkeypatch.setattr(learner.optimizers, "step", lambda factor: None)        # so that the gradients stay
    trainer.step(0)
    for module in learner.modules.values():
        gradients = [weight.grad.to_dense().flatten() for weight in module.parameters() if weight.grad is not None]
        assert torch.cat(gradients).norm().item() == pytest.approx(0.001, rel=1e-4)
