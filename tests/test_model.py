"""The biLM itself: leakage, alignment, padding, losses and training against second, slow implementations."""
import math
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SENTENCES, changed, encoded, tiny
from torch import Tensor, nn
from torch.testing import assert_close

import ELMO
from data.batches import Sampler
from data.text import BOS, EOS, PAD, UNK
from run.files import InputError
from run.machine import autocast, map_on_cores
from run.optimization import Optimizers, clip_gradients, group, lr_factor

CPU = torch.device("cpu")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
SPECIAL = 4
EXACT = {"precision": "fp32", "dropout": 0.0, "negatives": 1000}        # with 1000 negatives it is the full softmax


# ---------------------------------------------------------------------------------- states, vectors and scores
def slow_states(model: ELMO.BiLM, ids: list[int], d: int) -> list[Tensor]:
    """[h_0, h_1, h_2], each (n + 1, P): direction d read one word at a time by the equations of an LSTM cell."""
    stream = [BOS, *ids] if d == 0 else [EOS, *reversed(ids)]
    inputs = [model.table[i] for i in stream]
    layers = [torch.stack(inputs)]
    for j, lstm in enumerate(model.lstms(d)):
        c = torch.zeros(lstm.hidden_size)
        h = torch.zeros(lstm.proj_size or lstm.hidden_size)
        outputs = []
        for x in inputs:
            gates = lstm.weight_ih_l0 @ x + lstm.weight_hh_l0 @ h + lstm.bias_ih_l0
            input_gate, forget_gate, cell, output_gate = gates.chunk(4)
            c = forget_gate.sigmoid() * c + input_gate.sigmoid() * cell.tanh()
            h = output_gate.sigmoid() * c.tanh()
            if lstm.proj_size:
                h = lstm.weight_hr_l0 @ h
            outputs.append(h)
        if j == 1:                                          # skip connection
            outputs = [new + old for new, old in zip(outputs, inputs, strict=True)]
        inputs = outputs
        layers.append(torch.stack(inputs))
    return layers


@pytest.mark.parametrize("k", range(5))
def test_a_changed_word_moves_forward_states_from_it_on_and_backward_states_up_to_it_bit_for_bit(elmo, k):
    words = ["he", "won", "the", "match", "today"]
    text = " ".join(words)
    words[k] = "cat"
    before, after = elmo.embed([text, " ".join(words)])
    P = elmo.config.width
    for layer in (1, 2):
        same = before[layer] == after[layer]
        assert same[:k, :P].all(), "the forward model saw the future"
        assert same[k + 1:, P:].all(), "the backward model saw the past"
        assert not same[k:, :P].all(dim=1).any()                                # forward: every state from k on
        assert not same[:k + 1, P:].all(dim=1).any()                            # backward: every state up to k


@pytest.mark.parametrize("hidden", [12, 20])
def test_vectors_equal_those_of_reading_one_word_at_a_time(hidden):
    model = ELMO.ELMo.train(SENTENCES, tiny(hidden=hidden, width=12, epochs=1.0))
    text = "the cat won the match ."
    ids = [model.words.index[word] for word in text.split()]
    vectors = model.embed([text])[0]
    with torch.no_grad():
        forward = slow_states(model.model, ids, 0)
        backward = slow_states(model.model, ids, 1)
    for j in range(3):
        for k in range(len(ids)):       # behind <s> the state after w_k stands at k + 1; behind </s>, from the end
            assert_close(vectors[j, k, :12], forward[j][k + 1], **CLOSE)
            assert_close(vectors[j, k, 12:], backward[j][len(ids) - k], **CLOSE)


def test_a_text_by_itself_and_in_a_padded_batch_has_the_same_vectors(elmo):
    texts = ["goal !", "the cat sat on the mat and won the match today , said the coach of the oil team .", "", "oil"]
    vectors = elmo.embed(texts)
    for text, of_text in zip(texts, vectors, strict=True):
        by_itself, = elmo.embed([text])
        assert_close(by_itself, of_text, **CLOSE)
    in_reverse = elmo.embed(texts[::-1])
    assert_close(in_reverse[-1], vectors[0], **CLOSE)
    once = elmo.score(texts[:1])["forward"]["nll"]
    three_times = elmo.score([texts[0]] * 3)["forward"]["nll"]
    assert three_times == pytest.approx(3 * once, rel=1e-5)


def logits_of(model: ELMO.BiLM, h: Tensor) -> Tensor:
    """(.., V - 1) logits of all words but <pad>, whose id is 0, from states h (.., P)."""
    table = model.table[1:]
    bias = model.bias[1:, 0]
    return h @ table.t() + bias


def test_scores_equal_the_sum_over_a_full_softmax_one_word_at_a_time(elmo):
    text = "the cat won unknownword ."
    ids = [elmo.words.index.get(word, UNK) for word in text.split()]
    assert UNK in ids
    for d, name in enumerate(("forward", "backward")):
        gold = [*ids, EOS] if d == 0 else [*reversed(ids), BOS]
        with torch.no_grad():
            top = slow_states(elmo.model, ids, d)[2]
            log_p = logits_of(elmo.model, top).double().log_softmax(dim=1)
        nll = 0.0
        for row, word in zip(log_p, gold, strict=True):
            nll -= row[word - 1].item()
        found = elmo.score([text])[name]
        assert found["tokens"] == len(ids) + 1
        assert found["nll"] == pytest.approx(nll, rel=1e-5)
        per_token = nll / found["tokens"]
        assert found["perplexity"] == pytest.approx(math.exp(per_token), rel=1e-5)


def test_a_zero_softmax_scores_every_word_with_the_log_of_how_many_there_are():
    model = ELMO.ELMo.train(SENTENCES, tiny(epochs=1.0))
    model.model.table.zero_()
    model.model.bias.zero_()
    found = model.score(["the cat", ""])["backward"]
    words = len(model.words) - 1                            # all but <pad>
    assert found["tokens"] == 4
    assert found["nll"] / 4 == pytest.approx(math.log(words), rel=1e-6)


# ------------------------------------------------------------------------------------------- the sampled softmax
def sampler_of(draws: int) -> Sampler:
    """A sampler of 60 words, frequent ones first after the special symbols."""
    counts = np.concatenate([[0, 3, 40, 40], 1000 / np.arange(1, 57)])
    return Sampler(counts, draws, seed=0)


def test_a_word_is_sampled_by_its_count_to_the_power_of_three_quarters_and_never_more_often_than_always():
    sampler = Sampler(np.array([9, 1, 16, 81]), draws=2, seed=0)        # powers 1, 8 and 27, and <pad>
    # 2 / 36 * 27 is more than 1, so the last word is always there; the one draw that is left is shared as 1 to 8
    assert sampler.pi.tolist() == pytest.approx([0, 1 / 9, 8 / 9, 1])
    assert sampler.log_pi[1:].exp().tolist() == pytest.approx([1 / 9, 8 / 9, 1])


def test_sampled_words_are_distinct_never_padding_and_drawn_as_often_as_they_say():
    sampler = sampler_of(20)
    draws = [sampler.draw((i + 0.5) / 4000) for i in range(4000)]
    for draw in draws[::50]:
        assert len(draw) == 20
        assert len(draw.unique()) == 20
    often = np.bincount(torch.cat(draws), minlength=60) / 4000
    assert np.abs(often - sampler.pi).max() < 1e-3
    assert often[PAD] == 0
    assert sampler.pi.sum() == pytest.approx(20)
    assert sampler.pi[4] == 1                               # the most frequent word is always there
    assert (sampler.pi[[BOS, EOS]] > 0).all()


def test_every_epoch_samples_other_words_together():
    sampler = sampler_of(20)
    draws = []
    for epoch in (0, 1, 0):
        sampler.shuffle(epoch)
        draws.append(sampler.draw(0.5).tolist())
    assert draws[0] != draws[1]
    assert draws[0] == draws[2]


def test_the_sampled_softmax_has_the_full_ones_partition_sum_on_average():
    torch.manual_seed(0)
    sampler = sampler_of(20)
    h = torch.randn(3, 5)
    table = torch.randn(60, 5)
    bias = torch.randn(60, 1)
    target = torch.tensor([4, 30, 2])
    logits = h @ table.t() + bias[:, 0]
    words = logits[:, 1:].double()                      # without <pad>
    full = F.cross_entropy(words, target - 1, reduction="none")
    mean = torch.zeros(3, dtype=torch.float64)
    for i in range(1000):
        sampled = sampler.draw((i + 0.5) / 1000)
        nll = ELMO.sampled_nll(h, target, table, bias, sampled, sampler.log_pi[sampled])
        mean += nll.double().exp() / 1000
    assert_close(mean, full.exp(), rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("draws", [20, 10_000])
def test_the_sampled_softmax_and_its_gradients_equal_the_formula_and_with_all_words_the_full_one(draws):
    torch.manual_seed(1)
    sampler = sampler_of(draws)
    sampled = sampler.draw(0.3)
    target = torch.randint(1, 60, (40,))
    assert np.isin(target, sampled).any(), "no target was sampled too"
    fast = [torch.randn(40, 5), torch.randn(60, 5), torch.randn(60, 1)]
    slow = deepcopy(fast)
    for tensor in (*fast, *slow):
        tensor.requires_grad_()
    h, table, bias = fast
    nll = ELMO.sampled_nll(h, target, table, bias, sampled, sampler.log_pi[sampled])
    nll.sum().backward()
    h, table, bias = slow
    logits = h @ table.t() + bias[:, 0]
    if draws == 10_000:
        assert len(sampled) == 59
        expected = F.cross_entropy(logits[:, 1:], target - 1, reduction="none")
    else:
        pi = torch.from_numpy(sampler.pi)[sampled]
        others = sampled != target[:, None]
        weighted = logits[:, sampled].exp() / pi * others
        gold = logits.gather(1, target[:, None])[:, 0]
        expected = (gold.exp() + weighted.sum(dim=1)).log() - gold
    expected.sum().backward()
    assert_close(nll, expected, **CLOSE, check_dtype=False)
    for a, b in zip(fast, slow, strict=True):
        assert_close(a.grad.to_dense(), b.grad, **CLOSE)


# ------------------------------------------------------------------------------- gradient norm and learning rate
def test_gradients_are_clipped_by_the_norm_of_sparse_and_dense_ones_together():
    table = nn.Parameter(torch.zeros(5, 2))
    weight = nn.Parameter(torch.zeros(3))
    rows = F.embedding(torch.tensor([1, 1, 3]), table, sparse=True)
    (3 * rows).sum().backward()
    (weight * 2).sum().backward()
    norm = math.sqrt(2 * 6**2 + 2 * 3**2 + 3 * 2**2)            # row 1 was used twice
    assert float(clip_gradients([table, weight], 1.0)) == pytest.approx(norm)
    assert table.grad.to_dense()[1].tolist() == pytest.approx([6 / norm, 6 / norm])
    assert weight.grad.tolist() == pytest.approx([2 / norm] * 3)
    assert float(clip_gradients([table, weight], 10.0)) == pytest.approx(1.0)
    assert weight.grad.tolist() == pytest.approx([2 / norm] * 3)        # a small gradient stays as it is


@pytest.mark.parametrize("done, norm_of_unit, after", [(0.2, 3, 1.0), (0.5, 5, 0.9), (0.6, 5, 0.9)])
def test_a_group_that_has_not_started_does_not_move_and_does_not_count_in_the_norm(done, norm_of_unit, after):
    early = nn.Parameter(torch.ones(2))
    late = nn.Parameter(torch.ones(2))
    groups = [group([early], 0.1), group([late], 0.1, start=0.5)]
    optimizers = Optimizers(groups, [], betas=(0.9, 0.99))
    (3 * early + 4 * late).sum().backward()
    optimizers.freeze(done)
    norm = float(clip_gradients([early, late], 1e9))
    assert norm == pytest.approx(norm_of_unit * math.sqrt(2))           # both have two units
    optimizers.step(1.0)
    assert early.tolist() == pytest.approx([0.9, 0.9], abs=1e-4)        # the first step of Adam is the learning rate
    assert late.tolist() == pytest.approx([after, after], abs=1e-4)


# cos(pi / 4) = 0.70711, so that after a quarter of the run the cosine is 0.01 + 0.99 / 2 * 1.70711 = 0.85502
@pytest.mark.parametrize("step, factor", [
    (0, 1 / 30), (14, 1 / 2), (28, 29 / 30), (250, 0.85502), (500, 0.505), (750, 0.15498), (1000, 0.01)])
def test_the_learning_rate_rises_for_3_percent_of_the_steps_and_falls_as_a_cosine_to_1_percent(step, factor):
    assert lr_factor(step, 1000) == pytest.approx(factor, rel=1e-4)


def test_the_learning_rate_of_a_short_run_begins_at_its_peak_and_only_falls():
    factors = [lr_factor(step, 20) for step in range(20)]
    assert factors[0] == 1
    assert factors == sorted(factors, reverse=True)


@pytest.mark.parametrize("step, factor", [
    (0, 1 / 3), (1, 2 / 3), (25, 0.85502), (50, 0.505), (75, 0.15498), (99, 0.01024)])
def test_a_step_moves_weights_by_the_learning_rate_of_its_place_in_the_run(step, factor):
    config = tiny(**EXACT, epochs=100.0, lr=0.01, table_lr=0.02)
    trainer = ELMO.Trainer(config, encoded(SENTENCES[:1] * 4), CPU)
    assert trainer.steps == 100
    before = deepcopy(trainer.model.state_dict())
    trainer.step(step)              # the first update of Adam is as large as the learning rate
    peaks = {
        "table": 0.02,
        "bias": 0.02,
        "forward_lstms.0.weight_ih_l0": 0.01,
        "backward_lstms.1.bias_ih_l0": 0.01}
    for name, peak in peaks.items():
        moved = trainer.model.get_parameter(name) - before[name]
        largest = moved.abs().max().item()
        assert largest == pytest.approx(peak * factor, rel=0.01), name


# ------------------------------------------------------------------------------------------------------ dropout
def inputs_of(module: nn.Module) -> list[Tensor]:
    """A list that gets the first input of every later call of a module."""
    inputs = []
    module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].detach()))
    return inputs


def gradients_of(lstm: nn.LSTM) -> list[Tensor]:
    """A list that gets the gradient of the states (T, B, P) of every later call of an LSTM."""
    gradients = []

    def watch(_, arguments, outputs) -> None:
        outputs[0].register_hook(gradients.append)

    lstm.register_forward_hook(watch)
    return gradients


def test_dropout_takes_the_same_units_at_all_positions_and_others_in_every_sentence_layer_direction_and_step():
    config = tiny(hidden=40, dropout=0.2, batch_tokens=180, precision="fp32")
    trainer = ELMO.Trainer(config, encoded(["a b c d e f g h"] * 20), CPU)      # one batch without padding
    found = []
    for d in range(2):
        first, second = trainer.model.lstms(d)
        found.append(inputs_of(first))          # h_0
        found.append(inputs_of(second))         # h_1
        found.append(gradients_of(second))      # of the last layer, whose dropped units get no gradient
    for step in range(2):
        trainer.step(step)
    masks = []
    for of_place in found:
        masks += [values != 0 for values in of_place]
    assert len(masks) == 12                     # 2 directions, 3 layers, 2 steps
    for mask in masks:                          # (T, B, P)
        assert mask.shape == (9, 20, 40)
        assert torch.equal(mask, mask[:1].expand_as(mask)), "positions of one sentence lose different units"
        of_sentence = mask[0]                   # (B, P)
        assert len(of_sentence.unique(dim=0)) == 20, "two sentences lose the same units"
        assert 0.74 < of_sentence.float().mean() < 0.86
    for a, b in combinations(masks, 2):
        assert not torch.equal(a, b)


def test_dropout_divides_what_remains_by_its_probability():
    config = tiny(hidden=40, dropout=0.2, batch_tokens=180, precision="fp32")
    trainer = ELMO.Trainer(config, encoded(["a b c d e f g h"] * 20), CPU)
    table = trainer.model.table.detach().clone()
    found = inputs_of(trainer.model.lstms(0)[0])
    ids, _ = trainer.batch(0)
    trainer.step(0)
    expected = 1.25 * table[ids[0]] * (found[0] != 0)           # 1 / (1 - 0.2) = 1.25
    assert_close(found[0], expected)


def test_word_dropout_takes_whole_words_at_some_positions():
    config = tiny(hidden=40, dropout=0.0, word_dropout=0.3, batch_tokens=180, precision="fp32")
    trainer = ELMO.Trainer(config, encoded(["a b c d e f g h"] * 20), CPU)
    table = trainer.model.table.detach().clone()
    found = inputs_of(trainer.model.lstms(1)[0])
    ids, _ = trainer.batch(0)
    trainer.step(0)
    words = (found[0] != 0).any(dim=2)          # (T, B)
    assert 0.55 < words.float().mean() < 0.85
    assert len(words.unique(dim=0)) == 9, "whole sentences were dropped"
    expected = table[ids[1]] / 0.7 * words[:, :, None]
    assert_close(found[0], expected)


# ----------------------------------------------------------------------------------------------------- training
def test_a_new_model_has_small_word_vectors_and_predicts_every_word_as_often_as_it_occurs():
    data = encoded(["a a b a", "a b a a"])
    trainer = ELMO.Trainer(tiny(hidden=200), data, CPU)
    assert trainer.model.table.std().item() == pytest.approx(0.05, rel=0.1)
    p = trainer.model.bias.exp()[:, 0].tolist()
    assert p[2:] == pytest.approx([1 / 6, 1 / 6, 1 / 2, 1 / 6])         # <s> </s> a b: 2, 2, 6 and 2 of 12


def test_the_two_biases_of_an_lstm_move_at_the_rate_of_one():
    trainer = ELMO.Trainer(tiny(), encoded(SENTENCES * 5), CPU)
    lstm = trainer.model.lstms(0)[0]
    assert lstm.bias_ih_l0.tolist() == [0] * 12 + [1] * 12 + [0] * 24       # gates i f g o: only f begins at 1
    before = lstm.bias_ih_l0.clone()
    trainer.step(0)
    assert not torch.equal(lstm.bias_ih_l0, before)
    assert not lstm.bias_hh_l0.any()


def full_loss(model: ELMO.BiLM, x: Tensor, y: Tensor) -> Tensor:
    """The summed nll of both directions by a full softmax over all words but <pad>; x (2, T, B, P), y (2, T, B)."""
    loss = torch.zeros(())
    for d in range(2):
        logits = logits_of(model, model.states(d, x[d])[-1])                # (T, B, V - 1)
        gold = y[d] - 1
        loss = loss + F.cross_entropy(logits.flatten(0, 1), gold.flatten(), ignore_index=-1, reduction="sum")
    return loss


@pytest.mark.parametrize("representation", ["embedding", "char"])
def test_the_gradients_of_a_step_equal_those_of_one_loss_over_both_directions(representation):
    config = tiny(**EXACT, representation=representation, clip=1e9)
    data = encoded(SENTENCES * 2, representation=representation)
    trainer = ELMO.Trainer(config, data, CPU)
    trainer.optimizers.optimizers.clear()                   # so that the gradients stay after a step
    nll, *_, targets = trainer.step(0)
    found = {}
    for name, weight in trainer.model.named_parameters():
        if weight.grad is not None:
            found[name] = weight.grad.to_dense()
    trainer.model.zero_grad()
    ids, y = trainer.batch(0)
    assert (y == PAD).any(), "the batch has no padding"
    loss = full_loss(trainer.model, trainer.model.represent(ids, data.encoded.chars), y)
    (loss / targets).backward()
    assert float(nll) == pytest.approx(loss.item(), rel=1e-4)
    assert len(found) > 10
    assert "forward_lstms.0.weight_ih_l0" in found
    for name, gradient in found.items():
        expected = trainer.model.get_parameter(name).grad.to_dense()
        assert_close(gradient, expected, **CLOSE, msg=name)


def test_training_equals_a_plain_loop_with_the_full_softmax_and_adam():
    config = tiny(**EXACT, epochs=100.0, lr=0.01, table_lr=0.02, beta1=0.8, beta2=0.95, weight_decay=0.1, clip=0.24)
    trainer = ELMO.Trainer(config, encoded(SENTENCES * 4), CPU)
    assert trainer.steps == 300                             # so that the learning rate rises for 9 steps
    model = deepcopy(trainer.model)
    tables = [model.table, model.bias]
    others = [weight for name, weight in model.named_parameters() if "lstm" in name and weight.requires_grad]
    adam = torch.optim.Adam(tables, betas=(0.8, 0.95))
    adamw = torch.optim.AdamW(others, betas=(0.8, 0.95), weight_decay=0.1)
    norms = []
    for step in range(8):
        ids, y = trainer.batch(step)
        targets = (y != PAD).sum()
        (full_loss(model, model.table[ids], y) / targets).backward()
        norms.append(nn.utils.clip_grad_norm_([*tables, *others], 0.24))
        adam.param_groups[0]["lr"] = 0.02 * (step + 1) / 9
        adamw.param_groups[0]["lr"] = 0.01 * (step + 1) / 9
        for optimizer in (adam, adamw):
            optimizer.step()
            optimizer.zero_grad()
        trainer.step(step)
    assert min(norms) < 0.24 < max(norms)
    for name, weight in model.named_parameters():
        found = trainer.model.get_parameter(name)
        assert_close(found, weight, rtol=1e-3, atol=1e-4, msg=name)


def test_a_training_step_moves_only_rows_of_its_batch_and_its_sampled_words_which_change_from_step_to_step():
    data = encoded(SENTENCES * 5)
    trainer = ELMO.Trainer(tiny(negatives=2, batch_tokens=6), data, CPU)
    sampled = set()
    for step in range(10):
        before = trainer.model.table.clone()
        ids, y = trainer.batch(step)
        used = {*ids.flatten().tolist(), *y.flatten().tolist()}
        trainer.step(step)
        rows = (before != trainer.model.table).any(dim=1).nonzero()
        moved = set(rows.flatten().tolist())
        assert moved >= used - {PAD}
        assert len(moved - used) <= 2
        sampled |= moved - used
    assert len(sampled) > 4


def test_every_epoch_of_training_has_every_sentence_once_in_another_order():
    trainer = ELMO.Trainer(tiny(batch_tokens=10), encoded([f"word{i} word{i}" for i in range(30)]), CPU)
    epochs = []
    for epoch in range(2):
        steps = range(epoch * trainer.per_epoch, (epoch + 1) * trainer.per_epoch)
        words = [trainer.batch(step)[0][0, 1] for step in steps]            # the first word of each sentence
        epochs.append(torch.cat(words).tolist())
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(SPECIAL, SPECIAL + 30))
    assert epochs[0] != epochs[1]


def trained_too_long() -> ELMO.Trainer:
    """A trainer that learns its few sentences by heart, so that other sentences of their words become unlikely."""
    texts = [*SENTENCES * 2, "fall prices oil .", "the mat sat on the cat .", "the coach won !"]
    config = tiny(**EXACT, hidden=32, epochs=19.5, lr=0.02, table_lr=0.02)
    data = ELMO.Data.of(texts, config, np.arange(8), np.arange(8, 11))
    return ELMO.Trainer(config, data, CPU)


def test_the_model_of_a_run_is_the_one_of_the_epoch_that_is_best_on_validation_rows():
    trainer = trained_too_long()
    run = ELMO.train(trainer)
    means = []
    for entry in run.history:
        logs = np.log(entry["validation_perplexity"])       # forward and backward
        means.append(logs.mean())
    best = means.index(min(means))
    assert 0 < best < len(means) - 3
    assert run.lowest == pytest.approx(means[best])
    scores = ELMO.ELMo.from_run(run).score(["fall prices oil .", "the mat sat on the cat .", "the coach won !"])
    found = [scores["forward"]["perplexity"], scores["backward"]["perplexity"]]
    assert found == pytest.approx(run.history[best]["validation_perplexity"], rel=0.01)     # to half precision


def test_the_history_has_the_training_perplexity_of_each_epoch_by_itself_and_of_the_end():
    history = ELMO.train(trained_too_long()).history
    trainer = trained_too_long()
    assert [entry["step"] for entry in history] == [*range(2, 39, 2), 39]
    for entry in history[:4]:
        nll = 0.0
        tokens = 0
        for step in range(entry["step"] - 2, entry["step"]):
            loss, *_, count = trainer.step(step)
            nll += float(loss)
            tokens += count
        assert entry["train_perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-4)


def test_four_sentences_are_learned_by_heart():
    config = tiny(hidden=32, epochs=150.0, batch_tokens=100, negatives=1000, dropout=0.0)
    scores = ELMO.ELMo.train(SENTENCES, config).score(SENTENCES)
    assert max(scores[d]["perplexity"] for d in scores) < 1.5


# ------------------------------------------------------------------------------------------ token representations
@pytest.mark.parametrize("options", [{"representation": "char"}, {"representation": "word2vec"},
                                   {"representation": "word2vec", "freeze_word2vec": True}, {"hidden": 20, "width": 8}])
def test_every_representation_trains_saves_embeds_and_scores(options, tmp_path):
    model = ELMO.ELMo.train(SENTENCES * 4, tiny(**options, epochs=2.0))
    model.save(tmp_path / "a.pt")
    again = ELMO.ELMo.load(tmp_path / "a.pt")
    assert again.digest == model.digest
    assert again.score(SENTENCES) == model.score(SENTENCES)
    for found, expected in zip(again.embed(SENTENCES), model.embed(SENTENCES), strict=True):
        assert torch.equal(found, expected)
    vectors, = again.embed(["oil"])
    assert vectors.shape == (3, 1, 2 * again.config.width)
    forward, backward = vectors[0].chunk(2, dim=-1)
    assert torch.equal(forward, backward)       # layer 0 is [x ; x]


@pytest.mark.parametrize("freeze", [True, False])
def test_frozen_word2vec_vectors_stay_and_tuned_ones_move(freeze):
    config = tiny(representation="word2vec", freeze_word2vec=freeze)
    trainer = ELMO.Trainer(config, encoded(SENTENCES * 4), CPU)
    x = trainer.model.static if freeze else trainer.model.table
    before = x.detach().clone()
    assert before[SPECIAL:].std().item() == pytest.approx(0.05, rel=0.2)
    ELMO.train(trainer)
    assert torch.equal(before, x) == freeze


@pytest.mark.parametrize("representation", ["char", "embedding"])
def test_unseen_words_have_their_own_vectors_by_characters_and_share_one_otherwise(representation):
    model = ELMO.ELMo.train(SENTENCES * 4, tiny(representation=representation, epochs=1.0))
    zebra, quagga = model.embed(["zebra", "quagga"])
    assert torch.equal(zebra, quagga) == (representation == "embedding")


# ------------------------------------------------------------------------------------------------ texts in, vectors out
@pytest.mark.parametrize("text, tokens", [
    ("", 0), ("   ", 0), ("Zürich 東京 \U0001f389 \u200b e\u0301", None), ("\ud800", None), ("word " * 10_000, 10_000),
    ("#" + "9" * 5000 + "; &#" + "9" * 5000 + ";", None)])
def test_odd_texts_have_one_vector_per_token(elmo, text, tokens):
    vectors, = elmo.embed([text])
    expected = len(elmo.tokenize(text)) if tokens is None else tokens
    assert vectors.shape == (3, expected, 2 * elmo.config.width)
    assert vectors.dtype == torch.float32
    assert torch.isfinite(vectors).all()
    assert elmo.score([text])["forward"]["tokens"] == expected + 1


def test_a_stream_of_100_000_texts_keeps_its_order_and_its_memory(elmo):
    words = ["oil", "cat", "goal", "match"]
    expected = dict(zip(words, elmo.embed(words), strict=True))
    taken = 0

    def texts():
        nonlocal taken
        for i in range(100_000):
            taken = i + 1
            yield words[i % 4] + " !" * (i % 3)

    count = 0
    for i, vectors in enumerate(elmo.embed_stream(texts())):
        count += 1
        assert taken - i <= 512             # texts and vectors in memory
        assert vectors.shape[1] == 1 + i % 3
        if i % 1000 < 12 and i % 3 == 0:
            word = words[i % 4]
            assert_close(vectors, expected[word], **CLOSE)
    assert count == 100_000


@pytest.fixture
def three_threads():
    """Three torch threads for this test."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_vectors_are_the_same_bit_for_bit_on_several_cores_and_on_one(elmo, three_threads):
    texts = []
    for first in SENTENCES:
        texts += [f"{first} {second} !" for second in SENTENCES] * 100
    on_three = elmo.embed(texts)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)
    on_one = elmo.embed(texts)
    assert torch.get_num_threads() == 1
    for a, b in zip(on_three, on_one, strict=True):
        assert torch.equal(a, b)


def test_work_on_several_cores_is_done_once_and_in_order_and_its_errors_arrive(three_threads):
    done = []

    def work(i: int) -> int:
        done.append((i, torch.get_num_threads()))
        return 2 * i

    assert map_on_cores(work, range(50), CPU) == list(range(0, 100, 2))
    assert sorted(done) == [(i, 1) for i in range(50)]
    with pytest.raises(ZeroDivisionError):
        map_on_cores(lambda i: 1 // i, [1, 0, 2], CPU)
    with ThreadPoolExecutor(1) as pool:                         # a thread that comes later has all cores again
        assert pool.submit(torch.get_num_threads).result() == 3


def test_bf16_states_are_fp32_states_to_the_precision_of_bf16(elmo):
    encoded_texts = elmo.encode(SENTENCES)
    ids, _ = ELMO.collate(encoded_texts, np.arange(4))
    lengths = torch.from_numpy(encoded_texts.lengths)
    with torch.no_grad():
        in_fp32 = elmo.model.contextual(ids, lengths, None)[2]
        in_bf16 = elmo.model.contextual(ids, lengths, None, torch.bfloat16)[2]
    assert in_bf16.dtype == torch.bfloat16
    error = (in_fp32 - in_bf16.float()).abs()
    assert error.max() < 0.05 * in_fp32.abs().max()
    model = ELMO.ELMo.train(SENTENCES, tiny(hidden=32, epochs=150.0, batch_tokens=100, dropout=0.0, precision="bf16"))
    assert model.score(SENTENCES)["forward"]["perplexity"] < 1.6


def test_threads_do_not_share_a_cache_of_cast_weights():
    weight = nn.Parameter(torch.randn(4, 4))
    with autocast(CPU, torch.bfloat16):
        first = F.linear(torch.ones(1, 4), weight).sum()
        second = F.linear(torch.full((1, 4), 2**-9), weight).sum()
    (first + second).backward()         # with a cache the two gradients would be added in bf16, which loses 2**-9
    assert weight.grad[0, 0].item() == 1 + 2**-9


def test_texts_without_a_token_can_be_trained_on():
    model = ELMO.ELMo.train([""] * 5, tiny(epochs=100.0))
    assert model.score([""])["forward"]["perplexity"] < 1.8     # each direction has learned its own end symbol


def test_texts_that_are_no_list_of_strings_are_refused(elmo):
    for wrong in ("one text", ["a", 3], [None]):
        with pytest.raises(InputError):
            elmo.embed(wrong)
    with pytest.raises(InputError):
        elmo.embed_stream("one text")
    with pytest.raises(InputError, match="expected fp32 or bf16"):
        elmo.embed(["a"], precision="int8")


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    weights = []
    for seed in (0, 0, 1):
        model = ELMO.ELMo.train(SENTENCES * 4, tiny(seed=seed, dropout=0.2, word_dropout=0.1))
        weights.append(model.model.state_dict())
    assert not changed(weights[0], weights[1])
    assert changed(weights[0], weights[2]) >= {"table", "forward_lstms.0.weight_ih_l0"}


@pytest.mark.cuda
def test_a_gpu_trains_and_embeds_as_a_cpu_does():
    config = tiny(precision="fp32", dropout=0.0)            # a GPU draws other random numbers
    on_gpu = ELMO.ELMo.train(SENTENCES, config, device="cuda").embed(SENTENCES)
    on_cpu = ELMO.ELMo.train(SENTENCES, config, device="cpu").embed(SENTENCES)
    for found, expected in zip(on_gpu, on_cpu, strict=True):
        assert_close(found, expected, rtol=0.0, atol=1e-3)
