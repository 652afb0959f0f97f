"""Heads and their training, against second, slow implementations; whole runs are in test_tasks.py."""
import math
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import SENTENCES, tiny
from torch import Tensor, nn

import classification
import ELMO
from classification import SETTINGS, Config, ELMoVectors, Head, LayerFunction, Trainer
from data.tasks import EncodedTexts, Part
from run.files import InputError
from run.optimization import learning_rate_factor
from run.progress import Run

LAYERS = 3
WIDTH = 8               # of random vectors
LENGTHS = [6, 3, 1, 0]  # of four texts; as pairs they have 6 and 1, 3 and 0 words
BOTH_TASKS = pytest.mark.parametrize("task", ["ag_news", "nli"])
ALL_SETTINGS = pytest.mark.parametrize("setting", SETTINGS)


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of the weights that differ between two state dicts of the same names."""
    assert before.keys() == after.keys()
    return {name for name, weight in before.items() if not torch.equal(weight, after[name])}


def copy_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


# ------------------------------------------------------------------------------------ heads, one word at a time
def random_head(setting: str, task: str) -> Head:
    """A head whose weights are all random and large, biases too, so that every wrong equation shows."""
    config = Config(hidden=5, task=task, dropout=0.4)
    head = Head(config, setting, LAYERS, WIDTH, classes=4)
    generator = torch.Generator().manual_seed(1)
    for weight in head.parameters():
        weight.data.normal_(std=0.7, generator=generator)
    return head


def random_batch(head: Head) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Layers of four texts with random numbers in the padding too, their lengths, and dropout masks."""
    generator = torch.Generator().manual_seed(2)
    layers = torch.randn(LAYERS, max(LENGTHS), len(LENGTHS), WIDTH, generator=generator)
    masks = head.dropout_masks(len(LENGTHS), generator)
    return layers, torch.tensor(LENGTHS), masks


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


def slow_mix(mix: nn.Module, word: Tensor) -> Tensor:
    """The mix of the layers (J, D) of one word."""
    if isinstance(mix, LayerFunction):
        return (mix.linear.weight @ word.flatten() + mix.linear.bias).clamp(min=0)
    total = torch.zeros(word.shape[1])
    for w, h in zip(mix.w, word, strict=True):
        total = total + w.exp() / mix.w.exp().sum() * h
    return mix.gamma * total


def slow_average(scores: list[Tensor], states: list[Tensor]) -> Tensor:
    """The average of some states by the softmax of their scores."""
    weights = torch.stack(scores).exp()
    return weights @ torch.stack(states) / weights.sum()


def slow_pool(head: Head, directions: list[list[Tensor]]) -> Tensor:
    """(6H,) [maximum, attention, mean] of the forward states, then of the backward ones; zeros without words."""
    if not directions[0]:
        return torch.zeros(6 * head.config.hidden)
    pooled = []
    for states in directions:
        scores = [head.attention.weight[0] @ h + head.attention.bias[0] for h in states]
        pooled.append(torch.stack(states).max(dim=0).values)
        pooled.append(slow_average(scores, states))
        pooled.append(sum(states) / len(states))
    return torch.cat(pooled)


def slow_compared(head: Head, own: list[Tensor], other: list[Tensor]) -> list[Tensor]:
    """Every state of one side compared with the average of the other side's states that it attends to."""
    compared = []
    for h in own:
        found = torch.zeros_like(h)
        if other:
            found = slow_average([h @ state / math.sqrt(len(h)) for state in other], other)
        features = torch.cat([h, found, (h - found).abs(), h * found])
        compared.append(head.matcher.compare(features).clamp(min=0))
    return compared


def slow_logits(head: Head, texts: list[Tensor], text_mask: Tensor, mix_masks: Tensor) -> Tensor:
    """(C,) logits of one row: one text (J, n, D), or a pair of them."""
    sides = []
    for text, mask in zip(texts, mix_masks, strict=True):
        inputs = [slow_mix(head.mix, word) * mask for word in text.unbind(dim=1)]
        forward = slow_lstm(head.forward_lstm, inputs)
        backward = slow_lstm(head.backward_lstm, inputs[::-1])
        sides.append([forward, backward[::-1]])
    pooled = slow_pool(head, sides[0])
    if len(sides) == 2:
        pooled = slow_pair(head, *sides)
    return head.out(pooled * text_mask)


def slow_pair(head: Head, a: list[list[Tensor]], b: list[list[Tensor]]) -> Tensor:
    """(2H,) both sides of a pair, each read against the other one."""
    compared_a = []
    compared_b = []
    for d in range(2):
        compared_a.append(slow_compared(head, a[d], b[d]))
        compared_b.append(slow_compared(head, b[d], a[d]))
    u = slow_pool(head, compared_a)
    v = slow_pool(head, compared_b)
    features = torch.cat([u, v, (u - v).abs(), u * v])
    return head.matcher.match(features).clamp(min=0)


@BOTH_TASKS
@ALL_SETTINGS
def test_logits_of_a_padded_batch_equal_those_of_each_text_by_itself_and_read_one_word_at_a_time(setting, task):
    head = random_head(setting, task)
    layers, lengths, masks = random_batch(head)
    logits = head(layers, lengths, masks)
    assert len(logits) == (2 if task == "nli" else 4)
    for n, found in enumerate(logits):
        rows = [n, n + 2] if task == "nli" else [n]
        texts = [layers[:, :LENGTHS[row], row] for row in rows]
        own_masks = (masks[0][n:n + 1], masks[1][:, rows])
        expected = slow_logits(head, texts, own_masks[0][0], own_masks[1][0])
        assert torch.allclose(found, expected, atol=1e-5)
        T = max(text.shape[1] for text in texts)
        by_itself = head(layers[:, :T, rows], lengths[rows], own_masks)
        assert torch.allclose(by_itself[0], found, atol=1e-5)


@BOTH_TASKS
@ALL_SETTINGS
def test_every_word_counts_and_no_padding(setting, task):
    head = random_head(setting, task)
    layers, lengths, _ = random_batch(head)
    layers.requires_grad_()
    head(layers, lengths).square().sum().backward()
    counts = layers.grad.abs().sum(dim=(0, 3)) > 0                              # (T, B)
    assert torch.equal(counts, torch.arange(6)[:, None] < lengths)


def test_the_scalar_mix_is_gamma_times_the_softmax_weighted_sum_of_the_layers():
    mix = ELMO.ScalarMix(3)
    mix.w.data = torch.tensor([0.0, math.log(2), math.log(5)])                  # s = 1/8, 2/8, 5/8
    mix.gamma.data = torch.tensor(4.0)
    layers = torch.tensor([8.0, 16.0, 1.0])
    found = mix(layers.view(3, 1, 1, 1)).item()
    assert found == pytest.approx(4 * (1 + 4 + 5 / 8))


# ------------------------------------------------------------------------------------ heads that learn side by side
def trainer_of(elmo: ELMO.ELMo, seeds: tuple[int, ...] = (0,), **options) -> Trainer:
    """A trainer on 120 short random texts, in fp32."""
    draw = random.Random(0)
    words = " ".join(SENTENCES).split()
    rows = []
    for k in range(150):
        text = " ".join(draw.choices(words, k=1 + k % 11))
        rows.append((k % 4, (text,)))
    train = EncodedTexts(Part.of(rows[:120]), elmo)
    validation = EncodedTexts(Part.of(rows[120:]), elmo)
    small = {"hidden": 6, "batch_tokens": 60, "precision": "fp32", "log_every": 10_000}
    config = Config(**small | options)
    parts = {"train": train, "validation": validation}
    return Trainer(config, ELMoVectors(elmo.model), parts, 4, seeds)


def trained(trainer: Trainer, steps: int) -> Trainer:
    """The trainer after its first steps."""
    for step in range(steps):
        trainer.step(step)
    return trainer


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of all weights that learn, and of their averages."""
    weights = copy_of(trainer.model)
    for name, learner in trainer.learners.items():
        weights |= {f"learning.{name}.{key}": value for key, value in copy_of(learner.modules).items()}
    return weights


def test_heads_of_one_seed_share_every_weight_of_the_same_shape_but_w(elmo):
    trainer = trainer_of(elmo, (7, 8))
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
    before = copy_of(frozen)
    trainable.mix.w.data.copy_(frozen.mix.w)
    trained(trainer, 5)
    assert not changed(trainable.state_dict(), frozen.state_dict())
    learning = {name for name in before if "mix" not in name and "bias_hh" not in name}
    assert changed(before, frozen.state_dict()) == learning


def test_heads_trained_side_by_side_equal_heads_trained_by_themselves(elmo):
    every = weights_of(trained(trainer_of(elmo, (3, 4)), 12))
    fewer = [trainer_of(elmo, (3, 4), setting=setting) for setting in SETTINGS]
    fewer.append(trainer_of(elmo, (3,), setting="function"))
    for trainer in fewer:
        weights = weights_of(trained(trainer, 12))
        assert not changed(weights, {name: every[name] for name in weights})


def test_training_equals_a_plain_loop_with_adamw(elmo):
    trainer = trainer_of(elmo, (2,), setting="trainable", clip=0.3)
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
        logits = head(layers, lengths, head.dropout_masks(len(rows), generator))
        loss = F.cross_entropy(logits, part.labels[rows], label_smoothing=0.05)
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(head.parameters(), 0.3))
        share = learning_rate_factor(step, trainer.steps)
        optimizer.param_groups[0]["lr"] = 0.004 * share
        optimizer.param_groups[1]["lr"] = 0.02 * share
        optimizer.step()
        optimizer.zero_grad()
        summed, count = trainer.step(step)
        assert count == len(rows)
        assert summed / count == pytest.approx(loss.item(), rel=1e-5)
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
    before = copy_of(elmo.model)
    trained(trainer_of(elmo), 3)
    trainer = trainer_of(elmo, finetune=True, unfreeze=0.2, bilm_lr=0.01)
    bilm = trainer.learners["trainable-0"].modules["bilm"]
    start = {}
    for step in range(trainer.steps):
        old = copy_of(bilm)
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
        expected = 0.01 / 2.6 ** depth * learning_rate_factor(step, trainer.steps)
        assert moved == pytest.approx(expected, rel=0.01), name


def test_the_gradients_of_a_head_and_of_its_bilm_are_clipped_apart(elmo, monkeypatch):
    trainer = trainer_of(elmo, finetune=True, unfreeze=0.0, clip=0.001)
    learner = trainer.learners["trainable-0"]
    monkeypatch.setattr(learner.optimizers, "step", lambda factor: None)        # so that the gradients stay
    trainer.step(0)
    for module in learner.modules.values():
        gradients = [weight.grad.to_dense().flatten() for weight in module.parameters() if weight.grad is not None]
        assert torch.cat(gradients).norm().item() == pytest.approx(0.001, rel=1e-4)


class StoppedRun(Run):
    """A run that Ctrl-C stops before step 13."""

    def stop(self) -> bool:
        if self.step == 13:
            self.stop_event.set()
        return super().stop()


@pytest.mark.parametrize("options", [{}, {"finetune": True, "unfreeze": 0.2}])
def test_a_stopped_and_resumed_run_ends_with_the_same_weights(elmo, tmp_path, monkeypatch, options):
    file = tmp_path / "resume.pt"
    undisturbed = classification.train(trainer_of(elmo, (0, 1), **options))
    with monkeypatch.context() as patch:
        patch.setattr(classification, "Run", StoppedRun)
        stopped = classification.train(trainer_of(elmo, (0, 1), **options), file)
    assert stopped.step == 13
    assert len(stopped.history) == 1
    resumed = classification.train(trainer_of(elmo, (0, 1), **options), file, resume=True)
    assert not changed(undisturbed.best, resumed.best)
    assert not changed(weights_of(undisturbed.trainer), weights_of(resumed.trainer))
    assert resumed.history[-1]["validation"] == undisturbed.history[-1]["validation"]


def test_a_loss_that_is_not_finite_changes_no_weight_of_any_head(elmo):
    trainer = trained(trainer_of(elmo), 2)
    before = weights_of(trainer)
    head = trainer.learners["frozen-0"].modules["head"]
    head.register_forward_hook(lambda head, inputs, logits: logits * math.nan)
    with pytest.raises(InputError, match="not finite at step 2"):
        trainer.step(2)
    assert not changed(before, weights_of(trainer))
