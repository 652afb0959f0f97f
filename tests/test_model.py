"""The biLM itself: leakage, alignment, padding, losses and training, against second, slow implementations."""
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SENTENCES, changed, encoded, gradients_of_update, slow_states, tiny
from pytest import approx
from torch import Tensor, nn

import ELMO
from data.batches import Sampler, batches, collate
from data.text import BOS, EOS, PAD, UNK, Data
from ELMO import BiLM, ELMo, Trainer, sampled_nll
from run.files import InputError
from run.machine import autocast, map_on_cores
from run.metrics import full_softmax_nll
from run.optimization import Optimizers, clip_gradients, group, lr_factor

CPU = torch.device("cpu")


def new_trainer(sentences: list[str], **options) -> Trainer:
    """A trainer of a tiny model on the processor; every sentence is a training row."""
    return Trainer(tiny(**options), encoded(sentences), CPU)


# ---------------------------------------------------------------------------------------- leakage, alignment, padding
def test_a_batch_has_inputs_and_targets_as_the_docstring_of_collate_shows():
    data = encoded(["oil falls", "a b c"])
    x, y = collate(data.encoded, np.array([0, 1]))
    oil = data.words.index["oil"]
    falls = data.words.index["falls"]
    assert x[0, :, 0].tolist() == [BOS, oil, falls, PAD]
    assert y[0, :, 0].tolist() == [oil, falls, EOS, PAD]
    assert x[1, :, 0].tolist() == [EOS, falls, oil, PAD]
    assert y[1, :, 0].tolist() == [falls, oil, BOS, PAD]


@pytest.mark.parametrize("k", range(5))
def test_a_changed_word_moves_forward_states_from_it_on_and_backward_states_up_to_it_bit_for_bit(elmo, k):
    words = ["he", "won", "the", "match", "today"]
    other = [*words[:k], "cat", *words[k + 1:]]
    before = elmo.embed([" ".join(words)])[0]
    after = elmo.embed([" ".join(other)])[0]
    P = elmo.config.width
    for layer in (1, 2):
        same = before[layer] == after[layer]                    # (5, 2P)
        forward = same[:, :P]
        backward = same[:, P:]
        assert forward[:k].all()
        assert backward[k + 1:].all()
        assert not forward[k:].all(dim=1).any()                 # every forward state from word k on has moved
        assert not backward[:k + 1].all(dim=1).any()            # every backward state up to word k has moved


@pytest.mark.parametrize("hidden", [12, 20])
def test_vectors_equal_those_of_reading_one_word_at_a_time(hidden):
    model = ELMo.train(SENTENCES, tiny(hidden=hidden, width=12, epochs=1.0))
    text = "the cat won the match ."
    ids = [model.words.index[word] for word in text.split()]
    vectors = model.embed([text])[0]
    with torch.no_grad():
        forward = slow_states(model.model, ids, 0)
        backward = slow_states(model.model, ids, 1)
    for j in range(3):
        for k in range(len(ids)):       # the forward model reads <s> first, the backward model </s> and the last word
            expected = torch.cat([forward[j][k + 1], backward[j][len(ids) - k]])
            assert torch.allclose(vectors[j, k], expected, atol=1e-5)


def test_a_text_has_the_same_vectors_by_itself_and_in_a_padded_batch(elmo):
    long = "the cat sat on the mat and won the match today , said the coach of the oil team ."
    texts = ["goal !", long, "", "oil"]
    in_batch = elmo.embed(texts)
    for text, vectors in zip(texts, in_batch, strict=True):
        by_itself = elmo.embed([text])[0]
        assert torch.allclose(by_itself, vectors, atol=1e-5)
    in_reverse = elmo.embed(texts[::-1])
    assert torch.allclose(in_reverse[-1], in_batch[0], atol=1e-5)
    one = elmo.score(["goal !"])["forward"]["nats"]
    three = elmo.score(["goal !"] * 3)["forward"]["nats"]
    assert three == approx(3 * one, rel=1e-5)


# ---------------------------------------------------------------------------------------------------- the softmax
@pytest.mark.parametrize("d, name", enumerate(ELMO.DIRECTIONS))
def test_scores_equal_the_sum_over_a_full_softmax_one_word_at_a_time(elmo, d, name):
    text = "the cat won unknownword ."
    ids = [elmo.words.index.get(word, UNK) for word in text.split()]
    assert ids[3] == UNK
    gold = [*ids, EOS]
    if name == "backward":
        gold = [*reversed(ids), BOS]
    with torch.no_grad():
        h = slow_states(elmo.model, ids, d)[2]
        logits = h @ elmo.model.table.t() + elmo.model.bias[:, 0]
    nll = 0.0
    for row, word in zip(logits.double(), gold, strict=True):
        probabilities = row[1:].softmax(dim=0)                  # of all words but <pad>
        nll -= math.log(probabilities[word - 1])
    found = elmo.score([text])[name]
    assert found["tokens"] == 6                                 # 5 words and an end
    assert found["nats"] == approx(nll, rel=1e-5)
    assert found["perplexity"] == approx(math.exp(nll / 6), rel=1e-5)


def test_ranks_best_words_and_losses_are_those_of_logits_written_by_hand():
    logits = torch.log(torch.tensor([
        [64.0, 1.0, 2.0, 4.0, 1.0],         # the logit of word 0, which is <pad>, does not count
        [1.0, 2.0, 2.0, 3.0, 1.0],
        [1.0, 5.0, 3.0, 4.0, 2.0],
        [1.0, 5.0, 3.0, 4.0, 2.0]]))
    gold = torch.tensor([3, 2, 4, 1])
    bias = torch.tensor([[0.0], [0.0], [1.0], [0.0], [0.0]])
    states = logits - bias[:, 0]
    nll, same_gold, best, rank = full_softmax_nll(states, gold, torch.eye(5), bias, details=True)
    assert same_gold.tolist() == [3, 2, 4, 1]
    assert best.tolist() == [3, 3, 1, 1]
    assert rank.tolist() == [0, 1, 3, 0]                        # word 1 has the same logit as gold word 2: not higher
    assert nll.exp().tolist() == approx([8 / 4, 8 / 2, 14 / 2, 14 / 5])


def test_words_are_sampled_with_probabilities_worked_out_on_paper():
    counts = np.array([7, 0, 1, 16, 16])        # <pad> is never drawn, a word that was never seen counts once
    weights = np.array([0, 1, 1, 8, 8])         # 16 ** 0.75 = 8
    sampler = Sampler(counts, 2, seed=0)
    assert sampler.pi == approx(weights / 9)                    # they sum to 2
    counts = np.array([7, 0, 1, 16, 16, 256])
    weights = np.array([0, 1, 1, 8, 8, 9])                      # 256 ** 0.75 = 64, but a probability is at most 1
    sampler = Sampler(counts, 3, seed=0)
    assert sampler.pi == approx(weights / 9)
    found = sampler.log_pi.exp().numpy()
    assert found[1:] == approx(weights[1:] / 9)


def sampler_of(draws: int) -> Sampler:
    """A sampler of 60 words, some of them much more frequent than others."""
    counts = np.concatenate([[0, 3, 40, 40], 1000 / np.arange(1, 57)])
    return Sampler(counts, draws, seed=0)


def test_sampled_words_are_distinct_never_padding_and_drawn_as_often_as_their_probabilities_say():
    sampler = sampler_of(20)
    draws = [sampler.draw((i + 0.5) / 4000) for i in range(4000)]
    assert {len(draw) for draw in draws} == {20}
    assert all(len(draw.unique()) == 20 for draw in draws[::50])
    often = np.bincount(torch.cat(draws), minlength=60) / 4000
    assert np.abs(often - sampler.pi).max() < 1e-3
    assert often[PAD] == 0
    assert often.sum() == approx(20)
    assert often[4] == 1                                        # the most frequent word is in every sample
    assert often[BOS] > 0
    assert often[EOS] > 0


def test_another_epoch_draws_other_samples():
    sampler = sampler_of(20)
    first = [sampler.draw(u / 10) for u in range(10)]
    sampler.shuffle(1)
    second = [sampler.draw(u / 10) for u in range(10)]
    assert not torch.equal(torch.stack(first), torch.stack(second))


def test_the_sampled_softmax_has_on_average_the_normalizer_of_the_full_one():
    torch.manual_seed(0)
    sampler = sampler_of(20)
    h = torch.randn(3, 5)
    table = torch.randn(60, 5)
    bias = torch.randn(60, 1)
    target = torch.tensor([4, 30, 2])
    full, = full_softmax_nll(h, target, table, bias)
    mean = torch.zeros(3, dtype=torch.float64)
    for i in range(1000):
        sampled = sampler.draw((i + 0.5) / 1000)
        nll = sampled_nll(h, target, table, bias, sampled, sampler.log_pi[sampled])
        mean += nll.exp() / 1000
    assert torch.allclose(mean, full.exp(), rtol=1e-2)


def slow_sampled_nll(h: Tensor, y: int, table: Tensor, bias: Tensor, sampled: Tensor, pi: Tensor) -> Tensor:
    """The loss of one target y given a state h (P,), word by word."""
    gold = (h @ table[y] + bias[y, 0]).exp()
    normalizer = gold
    for word in sampled.tolist():
        if word != y:
            normalizer = normalizer + (h @ table[word] + bias[word, 0]).exp() / pi[word]
    return (normalizer / gold).log()


@pytest.mark.parametrize("draws", [20, 10_000])
def test_the_sampled_softmax_and_its_gradients_equal_a_loop_over_words_and_with_all_words_the_full_softmax(draws):
    torch.manual_seed(1)
    sampler = sampler_of(draws)
    sampled = sampler.draw(0.3)
    target = torch.randint(1, 60, (40,))
    assert np.isin(target, sampled).any(), "some targets are in the sample"
    fast = [torch.randn(size, requires_grad=True) for size in ((40, 5), (60, 5), (60, 1))]
    slow = [tensor.detach().clone().requires_grad_() for tensor in fast]
    h, table, bias = fast
    nll = sampled_nll(h, target, table, bias, sampled, sampler.log_pi[sampled])
    nll.sum().backward()
    h, table, bias = slow
    if draws == 10_000:
        assert len(sampled) == 59                               # all words but <pad>
        logits = h @ table.t() + bias[:, 0]
        expected = F.cross_entropy(logits[:, 1:], target - 1, reduction="none")
    else:
        pi = torch.from_numpy(sampler.pi)
        losses = []
        for state, y in zip(h, target.tolist(), strict=True):
            loss = slow_sampled_nll(state, y, table, bias, sampled, pi)
            losses.append(loss)
        expected = torch.stack(losses).float()
    expected.sum().backward()
    assert torch.allclose(nll, expected, atol=1e-5)
    for found, wanted in zip(fast, slow, strict=True):
        assert torch.allclose(found.grad.to_dense(), wanted.grad, atol=1e-5)


# ---------------------------------------------------------------------------- learning rate, gradients and optimizers
def test_sparse_and_dense_gradients_are_clipped_by_their_common_norm():
    table = nn.Parameter(torch.zeros(5, 2))
    weight = nn.Parameter(torch.zeros(3))
    rows = F.embedding(torch.tensor([1, 1, 3]), table, sparse=True)
    (3 * rows).sum().backward()
    (2 * weight).sum().backward()
    norm = 102 ** 0.5           # 2 * 6 * 6 of row 1, which was used twice, 2 * 3 * 3 of row 3, 3 * 2 * 2 of the weight
    before = clip_gradients([table, weight], 1.0)
    assert before == approx(norm)
    for _ in range(2):
        rows = table.grad.to_dense()
        assert rows[1].tolist() == approx([6 / norm, 6 / norm])
        assert weight.grad.tolist() == approx([2 / norm] * 3)
        before = clip_gradients([table, weight], 10.0)
        assert before == approx(1.0), "a small gradient stays as it is"


@pytest.mark.parametrize("done, learns", [(0.2, False), (0.5, True), (0.6, True)])
def test_a_group_that_has_not_started_does_not_move_and_does_not_count_in_the_norm(done, learns):
    early = nn.Parameter(torch.ones(2))
    late = nn.Parameter(torch.ones(2))
    groups = [group([early], 0.1), group([late], 0.1, start=0.5)]
    optimizers = Optimizers(groups, [], betas=(0.9, 0.99))
    (3 * early + 4 * late).sum().backward()
    optimizers.freeze(done)
    norm = clip_gradients([early, late], 1e9)
    optimizers.step(factor=1.0)
    assert early.tolist() == approx([0.9, 0.9])          # the first step of Adam is the learning rate
    if learns:
        assert late.tolist() == approx([0.9, 0.9])
        assert norm == approx(50 ** 0.5)                 # 2 * 3 * 3 + 2 * 4 * 4
    else:
        assert late.tolist() == [1.0, 1.0]
        assert norm == approx(18 ** 0.5)


def test_two_updates_of_both_optimizers_are_those_worked_out_on_paper():
    weight = nn.Parameter(torch.ones(1))
    table = nn.Parameter(torch.ones(2, 1))
    optimizers = Optimizers([group([weight], 0.1)], [group([table], 0.2)], betas=(0.5, 0.5))
    for gradient, factor in ((1.0, 0.5), (3.0, 0.1)):
        row = F.embedding(torch.tensor([1]), table, sparse=True)
        (gradient * (weight + row)).sum().backward()
        optimizers.step(factor)
        assert weight.grad is None
        assert table.grad is None
    # Adam's means of g and of g * g are 1 and 1 after the first step, and 7/3 and 19/3 after the second
    second = (7 / 3) / math.sqrt(19 / 3)
    assert weight.item() == approx(1 - 0.1 * 0.5 - 0.1 * 0.1 * second)
    assert table[1].item() == approx(1 - 0.2 * 0.5 - 0.2 * 0.1 * second)
    assert table[0].item() == 1, "a row that was not used does not move"


# the share of the peak learning rate before some of 1,000 steps: 30 steps of warm-up, then 0.01 + 0.99 (1 + cos) / 2
SHARES = {0: 1 / 30, 14: 15 / 30, 250: 0.85502, 500: 0.505, 750: 0.15498, 1000: 0.01}


def test_the_learning_rate_rises_and_then_falls_as_a_cosine():
    for step, share in SHARES.items():
        assert lr_factor(step, 1000) == approx(share, abs=1e-5)
    shares = [lr_factor(step, 1000) for step in range(1001)]
    assert shares[:29] == sorted(shares[:29])
    assert shares[29:] == sorted(shares[29:], reverse=True)
    assert max(shares) == approx(1, abs=0.01)


@pytest.mark.parametrize("step", [0, 14, 500, 750])
def test_a_step_of_training_moves_weights_by_the_learning_rate_of_this_step(step):
    trainer = new_trainer(SENTENCES * 5, lr=0.01, table_lr=0.03)
    trainer.steps = 1000
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.step(step)
    peaks = {
        "forward_lstms.0.weight_ih_l0": 0.01,
        "backward_lstms.1.weight_hh_l0": 0.01,
        "table": 0.03,
        "bias": 0.03}
    for name, peak in peaks.items():
        difference = trainer.model.get_parameter(name) - before[name]
        moved = difference.abs().max().item()
        assert moved == approx(peak * SHARES[step], rel=0.01), name      # the first update of Adam


def test_weight_decay_moves_dense_weights_towards_zero_and_no_word():
    weights = []
    for weight_decay in (0.0, 5.0):
        trainer = new_trainer(SENTENCES * 5, lr=0.01, weight_decay=weight_decay)
        trainer.steps = 1000
        before = trainer.model.lstms(0)[0].weight_ih_l0.detach().clone()
        trainer.step(500)
        weights.append(trainer.model.state_dict())
    without, decayed = weights
    name = "forward_lstms.0.weight_ih_l0"
    assert torch.allclose(without[name] - decayed[name], 0.01 * 0.505 * 5.0 * before, atol=1e-6)
    assert torch.equal(without["table"], decayed["table"])


# -------------------------------------------------------------------------------------------------- training steps
def test_an_untrained_model_scores_words_by_how_often_the_training_rows_have_them():
    trainer = new_trainer(["a a b"])
    trainer.model.table.data.zero_()                            # so that only the bias of the softmax counts
    model = ELMo(trainer.config, trainer.data.words, trainer.model)
    # counts: a 2, b 1, </s> 1, <s> 1; <unk> has none and counts one half; the sum is 5.5
    for name in ELMO.DIRECTIONS:
        known = model.score(["a"])[name]
        unknown = model.score(["b c"])[name]
        assert known["nats"] == approx(math.log(5.5 / 2 * 5.5), rel=1e-5)                # of "a" and the end
        assert unknown["nats"] == approx(math.log(5.5 * 5.5 / 0.5 * 5.5), rel=1e-5)      # of "b", <unk> and the end


def test_forget_gates_begin_open_and_all_other_biases_at_zero():
    model = BiLM(tiny(hidden=3, width=3), 10)
    for d in range(2):
        for lstm in model.lstms(d):
            assert lstm.bias_ih_l0.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0]     # gates i, f, g, o
            assert not lstm.bias_hh_l0.any()


def test_the_second_bias_of_an_lstm_stays_zero():
    trainer = new_trainer(SENTENCES * 5)
    lstm = trainer.model.lstms(0)[0]
    before = lstm.bias_ih_l0.clone()
    trainer.step(0)
    assert not torch.equal(lstm.bias_ih_l0, before)
    assert not lstm.bias_hh_l0.any()


@pytest.mark.parametrize("representation", ["embedding", "char"])
def test_the_gradients_of_a_step_equal_those_of_one_loss_over_both_directions(representation, monkeypatch):
    config = tiny(representation=representation, negatives=1000, dropout=0.0, precision="fp32")
    monkeypatch.setattr(ELMO, "CLIP", 1e9)
    data = encoded(SENTENCES * 2, representation=representation)
    trainer = Trainer(config, data, CPU)
    model = trainer.model
    ids, y = trainer.batch(0)
    x = model.represent(ids, data.encoded.chars)
    loss = torch.zeros(())
    for d in range(2):
        h = model.states(d, x[d])[-1]
        logits = h @ model.table.t() + model.bias[:, 0]                         # (T, B, V)
        logits = logits[..., 1:].flatten(0, 1)                                  # without <pad>
        loss = loss + F.cross_entropy(logits, y[d].flatten() - 1, ignore_index=-1, reduction="sum")
    (loss / (y != PAD).sum()).backward()
    expected = {}
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            expected[name] = weight.grad.to_dense()
    model.zero_grad()
    found = gradients_of_update(trainer, 0, trainer.model, trainer.optimizers)
    assert found.keys() == expected.keys()
    assert "forward_lstms.0.weight_ih_l0" in found
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], atol=1e-5), name


def test_a_step_reports_the_summed_loss_and_the_predicted_tokens_of_both_directions():
    trainer = new_trainer(SENTENCES, negatives=1000, dropout=0.0, precision="fp32")
    model = ELMo(trainer.config, trainer.data.words, trainer.model)
    rows = trainer.batches[0]
    expected = model.score([SENTENCES[row] for row in rows])
    trainer.model.set_trainable()
    nll, _, targets = trainer.step(0)
    assert float(nll) == approx(expected["forward"]["nats"] + expected["backward"]["nats"], rel=1e-4)
    assert targets == expected["forward"]["tokens"] + expected["backward"]["tokens"]


def test_the_gradient_of_all_weights_is_clipped_as_one(monkeypatch):
    monkeypatch.setattr(ELMO, "CLIP", 0.001)
    trainer = new_trainer(SENTENCES * 2)
    found = gradients_of_update(trainer, 0, trainer.model, trainer.optimizers)
    assert found["table"].norm() > 0
    assert found["backward_lstms.0.weight_ih_l0"].norm() > 0
    everything = torch.cat([gradient.flatten() for gradient in found.values()])
    assert everything.norm().item() == approx(0.001, rel=1e-4)


def test_training_equals_a_plain_loop_with_the_full_softmax_and_adam(monkeypatch):
    monkeypatch.setattr(ELMO, "BETAS", (0.8, 0.95))
    monkeypatch.setattr(ELMO, "CLIP", 0.24)
    trainer = new_trainer(SENTENCES * 4, negatives=1000, dropout=0.0, precision="fp32", lr=0.01, table_lr=0.02,
                          weight_decay=0.1)
    trainer.steps = 300                                         # so that the learning rate rises for 9 steps
    model = deepcopy(trainer.model)
    tables = [model.table, model.bias]
    others = [weight for name, weight in model.named_parameters() if "lstm" in name and weight.requires_grad]
    adam = torch.optim.Adam(tables, betas=(0.8, 0.95))
    adamw = torch.optim.AdamW(others, betas=(0.8, 0.95), weight_decay=0.1)
    norms = []
    for step in range(8):
        ids, y = trainer.batch(step)
        x = model.table[ids]
        loss = torch.zeros(())
        for d in range(2):
            h = model.states(d, x[d])[-1]
            logits = h @ model.table[1:].t() + model.bias[1:, 0]                # without <pad>
            gold = y[d].flatten() - 1
            loss = loss + F.cross_entropy(logits.flatten(0, 1), gold, ignore_index=-1, reduction="sum")
        (loss / (y != PAD).sum()).backward()
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
        assert torch.allclose(found, weight, rtol=1e-3, atol=1e-4), name


def test_a_training_step_moves_only_rows_of_its_batch_and_its_sampled_words_which_change_from_step_to_step():
    trainer = new_trainer(SENTENCES * 5, negatives=2, batch_tokens=6)
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


# -------------------------------------------------------------------------------------------------------- dropout
def lost_units(trainer: Trainer, step: int) -> Tensor:
    """(3, 2, T, B, P) bool: the units of h_0, h_1 and h_2 of each direction that dropout removes in a step."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 4, trainer.config.width, generator=generator)            # (T, B, P)
    directions = []
    for d, masks in enumerate(trainer.masks(step, 7, 4)):
        h0, h1, h2 = trainer.model.states(d, x, masks)
        directions.append(torch.stack([h0 == 0, h1 == 0, h2 == h1]))            # h_2 is h_1 plus what the LSTM adds
    return torch.stack(directions, dim=1)


def test_a_sentence_loses_the_same_units_at_every_position():
    trainer = new_trainer(SENTENCES, hidden=64, dropout=0.25)
    lost = lost_units(trainer, 0)
    assert (lost == lost[:, :, :1]).all()
    assert lost.float().mean().item() == approx(0.25, abs=0.05)
    units = lost[:, :, 0].flatten(0, 2)                         # (3 * 2 * B, P)
    assert len(units.unique(dim=0)) == 3 * 2 * 4, "layers, directions and sentences lose different units"
    assert not torch.equal(lost, lost_units(trainer, 1)), "another step loses others"
    assert torch.equal(lost, lost_units(trainer, 0))


def test_units_that_stay_are_scaled_so_that_dropout_does_not_change_the_expected_value_in_training():
    trainer = new_trainer(SENTENCES, hidden=64, dropout=0.5, precision="fp32")
    read = []
    trainer.model.lstms(1)[0].register_forward_pre_hook(lambda lstm, inputs: read.append(inputs[0].detach()))
    ids, _ = trainer.batch(0)
    x = trainer.model.represent(ids)[1]
    trainer.step(0)
    factor = read[0] / x                                        # (T, B, P)
    assert factor.unique().tolist() == approx([0.0, 2.0])
    assert (factor == factor[:1]).all()


def test_word_dropout_removes_whole_words():
    trainer = new_trainer(SENTENCES, hidden=32, dropout=0.0, word_dropout=0.5)
    forward, backward = trainer.masks(0, 50, 4)
    for mask in (forward[0], backward[0]):                      # (T, B, 1) or (T, B, P)
        words = mask.expand(50, 4, 32)
        assert (words == words[:, :, :1]).all()
        lost = words[:, :, 0] == 0                              # (T, B)
        assert lost.float().mean().item() == approx(0.5, abs=0.15)
        assert len(lost.unique(dim=0)) > 4, "positions lose words independently of each other"
    assert not torch.equal(forward[0], backward[0])


# ------------------------------------------------------------------------------------------------ batches and epochs
def test_batches_pad_less_than_5_percent_have_every_row_once_and_are_as_many_in_every_epoch():
    lengths = np.random.default_rng(0).poisson(36, 20_000)
    counts = set()
    for epoch in range(3):
        parts = batches(lengths, 2000, np.random.default_rng([0, epoch]))
        positions = [len(part) * (lengths[part].max() + 1) for part in parts]
        assert sorted(np.concatenate(parts)) == list(range(20_000))
        assert max(positions) <= 2000
        assert (lengths + 1).sum() > 0.95 * sum(positions)
        counts.add(len(parts))
    assert len(counts) == 1


def test_the_generator_shuffles_batches_and_rows_of_equal_length():
    lengths = np.array([1, 2] * 50)
    in_order = batches(lengths, 12)
    # 6 rows of 1 word have 12 positions, 4 rows of 2 words too; the ninth batch has 2 rows of each
    assert [len(part) for part in in_order] == [6] * 8 + [4] * 13
    first = batches(lengths, 12, np.random.default_rng(0))
    second = batches(lengths, 12, np.random.default_rng(1))
    assert [len(part) for part in first] != [len(part) for part in in_order]
    assert {frozenset(part) for part in first} != {frozenset(part) for part in second}


def test_another_epoch_has_other_batches():
    texts = [f"word{i}" for i in range(40)]
    trainer = new_trainer(texts, batch_tokens=10)
    assert trainer.per_epoch == 8                               # 5 rows of 2 positions each
    epochs = []
    for epoch in range(2):
        rows = []
        for number in range(8):
            ids, _ = trainer.batch(8 * epoch + number)
            rows += ids[0, 1].tolist()
        epochs.append(rows)
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(4, 44))
    assert epochs[0] != epochs[1]


class Rehearsed(Trainer):
    """A trainer whose steps only set the probabilities of <unk>, <s>, </s> and "a", by the bias of the softmax."""
    ROUNDS = ([0.1, 0.1, 0.4, 0.4], [0.1, 0.3, 0.3, 0.3], [0.7, 0.1, 0.1, 0.1])

    def step(self, step: int) -> tuple[Tensor, Tensor, int]:
        self.model.table.data.zero_()
        self.model.bias.data[1:, 0] = torch.tensor(self.ROUNDS[step]).log()
        return torch.zeros(()), torch.zeros(()), 1


def test_the_model_is_that_of_the_epoch_with_the_lowest_validation_loss_of_both_directions():
    config = tiny(epochs=3.0, batch_tokens=1000)
    trainer = Rehearsed(config, Data.of(["a"] * 20, config, np.arange(18), np.arange(18, 20)), CPU)
    run = ELMO.train(trainer)
    perplexities = [entry["validation_perplexity"] for entry in run.history]
    # forward predicts a and </s>, backward a and <s>: 1 / sqrt(0.4 * 0.4) and 1 / sqrt(0.4 * 0.1) in the first epoch
    assert perplexities[0] == approx([2.5, 5.0], rel=1e-4)
    assert perplexities[1] == approx([10 / 3, 10 / 3], rel=1e-4)         # lower on the geometric mean
    assert perplexities[2] == approx([10.0, 10.0], rel=1e-4)
    found = ELMo.from_run(run).score(["a"])
    assert found["forward"]["perplexity"] == approx(10 / 3, rel=1e-2)    # rounded to half precision
    assert found["backward"]["perplexity"] == approx(10 / 3, rel=1e-2)


def test_the_history_has_the_training_perplexity_of_each_epoch_by_itself_and_of_the_end():
    options = {"epochs": 3.5, "lr": 0.05, "table_lr": 0.05, "batch_tokens": 30}
    history = ELMO.train(new_trainer(SENTENCES * 3, **options)).history
    trainer = new_trainer(SENTENCES * 3, **options)
    n = trainer.per_epoch
    assert [entry["step"] for entry in history] == [n, 2 * n, 3 * n, trainer.steps]
    first = 0
    for entry in history:
        nll = 0.0
        tokens = 0
        for step in range(first, entry["step"]):
            loss, _, count = trainer.step(step)
            nll += float(loss)
            tokens += count
        assert entry["train_perplexity"] == approx(math.exp(nll / tokens), rel=1e-4)
        first = entry["step"]


def test_a_tenth_of_the_texts_is_for_validation_and_gives_no_words():
    texts = [f"word{i}" for i in range(40)]
    model = ELMo.train(texts, tiny(epochs=1.0))
    assert len(model.words) == 4 + 36
    assert len(model.history) == 1
    assert "validation_perplexity" in model.history[0]
    without = ELMo.train(texts, tiny(epochs=1.0, validation=0))
    assert len(without.words) == 4 + 40


# -------------------------------------------------------------------------------------------------- trained models
def test_four_sentences_are_learned_by_heart():
    config = tiny(hidden=32, epochs=150.0, batch_tokens=100, negatives=1000, dropout=0.0)
    scores = ELMo.train(SENTENCES, config).score(SENTENCES)
    assert scores["forward"]["perplexity"] < 1.5
    assert scores["backward"]["perplexity"] < 1.5


@pytest.mark.parametrize("options", [
    {"representation": "char"}, {"representation": "word2vec"}, {"representation": "word2vec", "freeze_word2vec": True},
    {"hidden": 20, "width": 8}])
def test_every_representation_trains_saves_embeds_and_scores(options, tmp_path):
    model = ELMo.train(SENTENCES * 4, tiny(**options, epochs=2.0))
    model.save(tmp_path / "a.pt")
    again = ELMo.load(tmp_path / "a.pt")
    assert again.digest == model.digest
    assert again.score(SENTENCES) == model.score(SENTENCES)
    vectors = model.embed(SENTENCES)
    for found, expected in zip(again.embed(SENTENCES), vectors, strict=True):
        assert torch.equal(found, expected)
    vectors = again.embed(["oil"])[0]
    assert vectors.shape == (3, 1, 2 * again.config.width)
    forward, backward = vectors[0].chunk(2, dim=-1)
    assert torch.equal(forward, backward), "layer 0 is [x ; x]"


@pytest.mark.parametrize("freeze", [True, False])
def test_word2vec_vectors_learn_unless_they_are_frozen(freeze):
    config = tiny(representation="word2vec", freeze_word2vec=freeze)
    trainer = Trainer(config, encoded(SENTENCES * 4), CPU)
    x = trainer.model.static if freeze else trainer.model.table
    before = x.detach().clone()
    assert before[4:].std() == approx(0.05, rel=0.2)                     # without the special symbols
    ELMO.train(trainer)
    assert torch.equal(before, x) == freeze


@pytest.mark.parametrize("representation, same", [("char", False), ("embedding", True)])
def test_unseen_words_have_vectors_of_their_own_by_characters_and_share_one_otherwise(representation, same):
    model = ELMo.train(SENTENCES * 4, tiny(representation=representation, epochs=1.0))
    zebra, quagga = model.embed(["zebra", "quagga"])
    assert torch.equal(zebra, quagga) == same


@pytest.mark.parametrize("text, tokens", [
    ("", 0),
    ("   ", 0),
    ("Zürich 東京 \U0001f389", 3),
    ("\ud800", 1),
    ("word " * 10_000, 10_000),
    (f"#{'9' * 5000}; &#{'9' * 5000};", None)])
def test_odd_texts_have_one_vector_per_token(elmo, text, tokens):
    if tokens is None:
        tokens = len(elmo.tokenize(text))
    vectors = elmo.embed([text])[0]
    assert vectors.shape == (3, tokens, 2 * elmo.config.width)
    assert vectors.dtype == torch.float32
    assert torch.isfinite(vectors).all()
    assert elmo.score([text])["forward"]["tokens"] == tokens + 1


def test_a_stream_of_50_000_texts_stays_in_order_and_reads_few_texts_ahead(elmo):
    words = ["oil", "cat", "goal", "match"]
    expected = {word: elmo.embed([word])[0][:, 0] for word in words}
    taken = 0
    count = 0

    def texts():
        """Texts of 1, 2 and 3 tokens in turn, counted by `taken`."""
        nonlocal taken
        for i in range(50_000):
            taken += 1
            yield words[i % 4] + " !" * (i % 3)

    for i, vectors in enumerate(elmo.embed_stream(texts())):
        count += 1
        assert taken - i <= 512
        assert vectors.shape[1] == 1 + i % 3
        if i % 3 == 0 and i % 1000 < 12:
            assert torch.allclose(vectors[:, 0], expected[words[i % 4]], atol=1e-5)
    assert count == 50_000


# ------------------------------------------------------------------------------------- cores, precision and devices
@pytest.fixture
def cores():
    """Sets the number of cores that this process uses: cores(3). The test ends with the number from before."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_vectors_are_the_same_bit_for_bit_on_several_cores_and_on_one(elmo, cores):
    texts = [f"{first} {second} !" for first, second in itertools.product(SENTENCES, SENTENCES)] * 100
    cores(3)
    on_three = elmo.embed(texts)
    assert torch.get_num_threads() == 3
    cores(1)
    on_one = elmo.embed(texts)
    assert torch.get_num_threads() == 1
    assert all(map(torch.equal, on_three, on_one))


def test_work_on_several_cores_is_done_once_and_in_order_and_its_errors_arrive(cores):
    cores(3)
    calls = []

    def square(i: int) -> int:
        """i * i; counts the call and the threads that torch may use in it."""
        calls.append((i, torch.get_num_threads()))
        return i * i

    assert map_on_cores(square, range(50), CPU) == [i * i for i in range(50)]
    assert sorted(calls) == [(i, 1) for i in range(50)]
    with pytest.raises(ZeroDivisionError):
        map_on_cores(lambda i: 1 // i, [1, 0, 2], CPU)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 3, "a later thread has all cores again"


def test_bf16_states_are_fp32_states_to_the_precision_of_bf16(elmo):
    texts = elmo.encode(SENTENCES)
    with torch.no_grad():
        h32 = elmo.model.contextual(texts, np.arange(4))[2]
        h16 = elmo.model.contextual(texts, np.arange(4), torch.bfloat16)[2]
    assert h16.dtype == torch.bfloat16
    assert (h32 - h16.float()).abs().max() < 0.05 * h32.abs().max()


def test_a_model_learns_in_bf16():
    config = tiny(hidden=32, epochs=150.0, batch_tokens=100, dropout=0.0, precision="bf16")
    model = ELMo.train(SENTENCES, config)
    assert model.score(SENTENCES)["forward"]["perplexity"] < 1.6


def test_threads_do_not_share_a_cache_of_cast_weights():
    weight = nn.Parameter(torch.randn(4, 4))
    with autocast(CPU, torch.bfloat16):
        first = F.linear(torch.ones(1, 4), weight).sum()
        second = F.linear(torch.full((1, 4), 2**-9), weight).sum()
    (first + second).backward()         # with a cache the two gradients would be added in bf16, which loses 2**-9
    assert weight.grad[0, 0].item() == 1 + 2**-9


def test_texts_without_a_token_can_be_trained_on():
    model = ELMo.train([""] * 5, tiny(epochs=100.0))
    assert model.score([""])["forward"]["perplexity"] < 1.8     # each direction has learned its own end symbol


def test_items_that_are_no_strings_and_other_precisions_are_refused(elmo):
    for wrong in (["a", 3], [None]):
        with pytest.raises(InputError):
            elmo.embed(wrong)
    with pytest.raises(InputError, match="expected fp32 or bf16"):
        elmo.embed(["a"], precision="int8")


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    weights = []
    for seed in (0, 0, 1):
        model = ELMo.train(SENTENCES * 4, tiny(seed=seed, dropout=0.2, word_dropout=0.1))
        weights.append(model.model.state_dict())
    first, again, other = weights
    assert not changed(first, again)
    assert "table" in changed(first, other)
    assert "forward_lstms.0.weight_ih_l0" in changed(first, other)


@pytest.mark.cuda
def test_a_model_on_a_cuda_device_trains_and_embeds_as_on_the_processor():
    on_gpu = ELMo.train(SENTENCES, tiny(precision="fp32"), device="cuda")
    on_cpu = ELMo.train(SENTENCES, tiny(precision="fp32"), device="cpu")
    for found, expected in zip(on_gpu.embed(SENTENCES), on_cpu.embed(SENTENCES), strict=True):
        assert torch.allclose(found, expected, atol=1e-3)
