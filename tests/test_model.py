"""The biLM itself: leakage, alignment, padding, losses and optimizer against second, slow implementations."""
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import SENTENCES, encoded, tiny

import ELMO
from data.batches import Sampler, batches
from data.text import BOS, EOS, PAD, UNK
from run.files import InputError
from run.machine import autocast, map_on_cores
from run.metrics import full_softmax_nll
from run.optimization import Optimizers, clip_gradients, group, lr_factor

SPECIAL = 4


def slow_states(model: ELMO.BiLM, ids: list[int], d: int) -> list[torch.Tensor]:
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


def test_the_batch_of_the_docstring_is_as_written_there():
    data = encoded(["oil falls", "a b c"])
    x, y = ELMO.collate(data.encoded, np.array([0, 1]))
    oil, falls = data.words.index["oil"], data.words.index["falls"]
    assert x[0, :, 0].tolist() == [BOS, oil, falls, PAD] and y[0, :, 0].tolist() == [oil, falls, EOS, PAD]
    assert x[1, :, 0].tolist() == [EOS, falls, oil, PAD] and y[1, :, 0].tolist() == [falls, oil, BOS, PAD]


@pytest.mark.parametrize("k", range(5))
def test_a_changed_word_moves_forward_states_from_it_on_and_backward_states_up_to_it_bit_for_bit(elmo, k):
    words = ["he", "won", "the", "match", "today"]
    before = elmo.embed([" ".join(words)])[0]
    after = elmo.embed([" ".join([*words[:k], "cat", *words[k + 1:]])])[0]
    P = elmo.config.width
    for layer in (1, 2):
        same = (before[layer] == after[layer])
        assert same[:k, :P].all() and same[k + 1:, P:].all()                    # untouched: the past, and the future
        assert not same[k:, :P].all(dim=1).any()                                # forward: every state from k on
        assert not same[:k + 1, P:].all(dim=1).any()                            # backward: every state up to k


@pytest.mark.parametrize("hidden", [12, 20])
def test_vectors_equal_those_of_reading_one_word_at_a_time(hidden):
    model = ELMO.ELMo.train(SENTENCES, tiny(hidden=hidden, width=12, epochs=1.0))
    text = "the cat won the match ."
    ids = [model.words.index[word] for word in text.split()]
    vectors = model.embed([text])[0]
    with torch.no_grad():
        forward, backward = (slow_states(model.model, ids, d) for d in range(2))
    for j in range(3):
        for k in range(len(ids)):       # behind <s> the state after w_k stands at k + 1; behind </s>, from the end
            expected = torch.cat([forward[j][k + 1], backward[j][len(ids) - k]])
            assert torch.allclose(vectors[j, k], expected, atol=1e-5)


def test_a_text_alone_and_in_a_padded_batch_has_the_same_vectors(elmo):
    texts = ["goal !", "the cat sat on the mat and won the match today , said the coach of the oil team .", "", "oil"]
    together = elmo.embed(texts)
    for text, vectors in zip(texts, together, strict=True):
        assert torch.allclose(elmo.embed([text])[0], vectors, atol=1e-5)
    assert torch.allclose(elmo.embed(texts[::-1])[-1], together[0], atol=1e-5)
    one, many = elmo.score(texts[:1])["forward"]["nll"], elmo.score([texts[0]] * 3)["forward"]["nll"]
    assert many == pytest.approx(3 * one, rel=1e-5)


def test_scores_equal_the_sum_over_a_full_softmax_one_word_at_a_time(elmo):
    text = "the cat won unknownword ."
    ids = [elmo.words.index.get(word, UNK) for word in text.split()]
    assert UNK in ids
    for d, name in enumerate(("forward", "backward")):
        gold = [*ids, EOS] if d == 0 else [*reversed(ids), BOS]
        with torch.no_grad():
            logits = slow_states(elmo.model, ids, d)[2] @ elmo.model.table.t() + elmo.model.bias[:, 0]
        nll = -sum(torch.log_softmax(row[1:].double(), 0)[word - 1] for row, word in zip(logits, gold, strict=True))
        found = elmo.score([text])[name]
        assert found["tokens"] == len(ids) + 1
        assert found["nll"] == pytest.approx(float(nll), rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(float(nll) / (len(ids) + 1)), rel=1e-5)


def test_a_zero_softmax_scores_every_word_with_the_log_of_how_many_there_are():
    model = ELMO.ELMo.train(SENTENCES, tiny(epochs=1.0))
    model.model.table.zero_()
    model.model.bias.zero_()
    found = model.score(["the cat", ""])["backward"]
    assert found["tokens"] == 4
    assert found["nll"] / 4 == pytest.approx(math.log(len(model.words) - 1), rel=1e-6)     # all but <pad>


def sampler_of(draws: int, words: int = 60) -> Sampler:
    counts = np.concatenate([[0, 3, 40, 40], 1000 / np.arange(1, words - 3)])
    return Sampler(counts, draws, seed=0)


def test_negatives_are_distinct_never_padding_and_drawn_as_often_as_they_say():
    sampler = sampler_of(20)
    draws = [sampler.draw((i + 0.5) / 4000) for i in range(4000)]
    assert {len(draw) for draw in draws} == {20} and all(len(set(draw.tolist())) == 20 for draw in draws[::50])
    often = np.bincount(torch.cat(draws), minlength=60) / 4000
    assert np.abs(often - sampler.pi).max() < 1e-3 and often[PAD] == 0 and sampler.pi.sum() == pytest.approx(20)
    assert sampler.pi[4] == 1 and (sampler.pi[[BOS, EOS]] > 0).all()        # the most frequent word is always there


def test_the_sampled_softmax_has_the_full_ones_partition_sum_on_average():
    torch.manual_seed(0)
    sampler = sampler_of(20)
    h, table, bias = torch.randn(3, 5), torch.randn(60, 5), torch.randn(60, 1)
    target = torch.tensor([4, 30, 2])
    full, = full_softmax_nll(h, target, table, bias)
    mean = torch.zeros(3, dtype=torch.float64)
    for i in range(1000):
        sampled = sampler.draw((i + 0.5) / 1000)
        mean += ELMO.sampled_nll(h, target, table, bias, sampled, sampler.log_pi[sampled]).exp() / 1000
    assert torch.allclose(mean, full.exp(), rtol=1e-2)


@pytest.mark.parametrize("draws", [20, 10_000])
def test_the_sampled_softmax_and_its_gradients_equal_the_formula_and_with_all_words_the_full_one(draws):
    torch.manual_seed(1)
    sampler = sampler_of(draws)
    sampled = sampler.draw(0.3)
    target = torch.randint(1, 60, (40,))
    assert np.isin(target, sampled).any()                       # accidental hits
    tensors = [torch.randn(40, 5), torch.randn(60, 5), torch.randn(60, 1)]
    fast, slow = ([tensor.clone().requires_grad_() for tensor in tensors] for _ in range(2))
    nll = ELMO.sampled_nll(fast[0], target, *fast[1:], sampled, sampler.log_pi[sampled])
    nll.sum().backward()
    h, table, bias = slow
    logits = h @ table.t() + bias[:, 0]
    if draws == 10_000:
        assert len(sampled) == 59
        expected = torch.nn.functional.cross_entropy(logits[:, 1:], target - 1, reduction="none")
    else:
        weighted = (logits[:, sampled] - sampler.log_pi[sampled]).exp() * (sampled != target[:, None])
        gold = logits.gather(1, target[:, None])[:, 0]
        expected = (gold.exp() + weighted.sum(dim=1)).log() - gold
    expected.sum().backward()
    assert torch.allclose(nll, expected, atol=1e-5)
    for a, b in zip(fast, slow, strict=True):
        assert torch.allclose(a.grad.to_dense(), b.grad, atol=1e-5)


def test_gradients_are_clipped_by_the_norm_of_sparse_and_dense_ones_together():
    table, weight = torch.nn.Parameter(torch.zeros(5, 2)), torch.nn.Parameter(torch.zeros(3))
    (torch.nn.functional.embedding(torch.tensor([1, 1, 3]), table, sparse=True) * 3).sum().backward()
    (weight * 2).sum().backward()
    norm = math.sqrt(2 * 6**2 + 2 * 3**2 + 3 * 2**2)            # row 1 was used twice
    assert clip_gradients([table, weight], 1.0) == pytest.approx(norm)
    assert table.grad.to_dense()[1].tolist() == pytest.approx([6 / norm, 6 / norm])
    assert weight.grad.tolist() == pytest.approx([2 / norm] * 3)
    assert clip_gradients([table, weight], 10.0) == pytest.approx(1.0)
    assert weight.grad.tolist() == pytest.approx([2 / norm] * 3)


def test_a_group_that_has_not_started_does_not_move_and_does_not_count_in_the_norm():
    early, late = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizers = Optimizers([group([early], 0.1), group([late], 0.1, start=0.5)], [], betas=(0.9, 0.99))
    for done in (0.2, 0.6):
        (3 * early + 4 * late).sum().backward()
        optimizers.freeze(done)
        assert clip_gradients([early, late], 1e9) == pytest.approx(math.sqrt(2 * 9 + 2 * 16 * (done > 0.5)))
        before = late.detach().clone()
        optimizers.step(factor=1.0)
        assert torch.equal(late, before) == (done < 0.5)
    assert early.tolist() == pytest.approx([0.8, 0.8], abs=1e-4)                # Adam's steps are 0.1 each


def test_the_learning_rate_rises_and_then_falls_as_a_cosine():
    shares = [lr_factor(step, 1000) for step in range(1001)]
    assert shares[0] == pytest.approx(1 / 30) and shares[14] == pytest.approx(0.5)
    assert shares[500] == pytest.approx(0.01 + 0.99 / 2) and shares[1000] == pytest.approx(0.01)
    assert max(shares) == pytest.approx(shares[29], abs=1e-2) and shares[29:] == sorted(shares[29:], reverse=True)


def test_the_two_biases_of_an_lstm_move_at_the_rate_of_one():
    trainer = ELMO.Trainer(tiny(), encoded(SENTENCES * 5), torch.device("cpu"))
    before = trainer.model.lstms(0)[0].bias_ih_l0.clone()
    trainer.step(0)
    assert not torch.equal(trainer.model.lstms(0)[0].bias_ih_l0, before)
    assert not trainer.model.lstms(0)[0].bias_hh_l0.any()


@pytest.mark.parametrize("representation", ["embedding", "char"])
def test_the_gradients_of_a_step_equal_those_of_one_loss_over_both_directions(representation, monkeypatch):
    config = tiny(representation=representation, negatives=1000, dropout=0.0, precision="fp32", clip=1e9)
    data = encoded(SENTENCES * 2, representation=representation)
    trainer = ELMO.Trainer(config, data, torch.device("cpu"))
    monkeypatch.setattr(trainer.optimizers, "step", lambda factor: None)
    nll, _, targets = trainer.step(0)
    weights = dict(trainer.model.named_parameters())
    found = {name: weight.grad.to_dense() for name, weight in weights.items() if weight.grad is not None}
    trainer.model.zero_grad()
    ids, y = trainer.batch(0)
    x = trainer.model.represent(ids, data.encoded.chars)
    loss = torch.zeros(())
    for d in range(2):
        logits = trainer.model.states(d, x[d])[-1] @ trainer.model.table.t() + trainer.model.bias[:, 0]
        loss = loss + torch.nn.functional.cross_entropy(logits[..., 1:].flatten(0, 1), y[d].flatten() - 1,
                                                        ignore_index=-1, reduction="sum")      # no <pad>
    (loss / targets).backward()
    assert float(nll) == pytest.approx(loss.item(), rel=1e-4)
    assert len(found) > 10 and "forward_lstms.0.weight_ih_l0" in found
    for name, gradient in found.items():
        assert torch.allclose(gradient, trainer.model.get_parameter(name).grad.to_dense(), atol=1e-5), name


def test_a_training_step_moves_only_rows_of_its_batch_and_its_sampled_words():
    data = encoded(SENTENCES * 5)
    trainer = ELMO.Trainer(tiny(negatives=2, batch_tokens=6), data, torch.device("cpu"))
    before = trainer.model.table.clone()
    trainer.step(0)
    batch = trainer.data.train[trainer.batches[0]]
    used = set(ELMO.collate(data.encoded, batch)[0].flatten().tolist()) | {BOS, EOS}
    moved = set((before != trainer.model.table).any(dim=1).nonzero()[:, 0].tolist())
    assert len(moved - used) <= 2 and moved >= used - {PAD}


def test_batches_pad_less_than_5_percent_hold_every_row_once_and_are_as_many_in_every_epoch():
    lengths = np.random.default_rng(0).poisson(36, 20_000)
    counts = set()
    for epoch in range(3):
        parts = batches(lengths, 2000, np.random.default_rng([0, epoch]))
        counts.add(len(parts))
        cells = sum(len(part) * (lengths[part].max() + 1) for part in parts)
        assert sorted(np.concatenate(parts)) == list(range(20_000))
        assert (lengths + 1).sum() > 0.95 * cells and max(len(p) * (lengths[p].max() + 1) for p in parts) <= 2000
    assert len(counts) == 1


def test_four_sentences_are_learned_by_heart():
    config = tiny(hidden=32, epochs=150.0, batch_tokens=100, negatives=1000, dropout=0.0)
    scores = ELMO.ELMo.train(SENTENCES, config).score(SENTENCES)
    assert max(scores[d]["perplexity"] for d in scores) < 1.5


@pytest.mark.parametrize("options", [{"representation": "char"}, {"representation": "word2vec"},
                                   {"representation": "word2vec", "freeze_word2vec": True}, {"hidden": 20, "width": 8}])
def test_every_representation_trains_saves_embeds_and_scores(options, tmp_path):
    model = ELMO.ELMo.train(SENTENCES * 4, tiny(**options, epochs=2.0))
    model.save(tmp_path / "a.pt")
    again = ELMO.ELMo.load(tmp_path / "a.pt")
    assert again.score(SENTENCES) == model.score(SENTENCES) and again.digest == model.digest
    assert all(torch.equal(a, b) for a, b in zip(again.embed(SENTENCES), model.embed(SENTENCES), strict=True))
    assert again.embed(["oil"])[0].shape == (3, 1, 2 * again.config.width)
    forward, backward = again.embed(["oil"])[0][0].chunk(2, dim=-1)
    assert torch.equal(forward, backward)       # layer 0 is [x ; x]


def test_frozen_word2vec_vectors_stay_and_tuned_ones_move():
    for freeze in (True, False):
        config = tiny(representation="word2vec", freeze_word2vec=freeze)
        trainer = ELMO.Trainer(config, encoded(SENTENCES * 4), torch.device("cpu"))
        x = (trainer.model.static if freeze else trainer.model.table)
        before = x.detach().clone()
        assert before[SPECIAL:].detach().std() == pytest.approx(ELMO.INITIAL_STD, rel=0.2)
        ELMO.train(trainer)
        assert torch.equal(before, x) == freeze


def test_unseen_words_have_their_own_vectors_by_characters_and_share_one_otherwise():
    for kind in ("char", "embedding"):
        model = ELMO.ELMo.train(SENTENCES * 4, tiny(representation=kind, epochs=1.0))
        a, b = (model.embed([word])[0] for word in ("zebra", "quagga"))
        assert torch.equal(a, b) == (kind == "embedding")


@pytest.mark.parametrize("text, tokens", [
    ("", 0), ("   ", 0), ("Zürich 東京 \U0001f389 \u200b e\u0301", None), ("\ud800", None), ("word " * 10_000, 10_000),
    ("#" + "9" * 5000 + "; &#" + "9" * 5000 + ";", None)])
def test_odd_texts_have_one_vector_a_token(elmo, text, tokens):
    vectors = elmo.embed([text])[0]
    expected = len(elmo.tokenize(text)) if tokens is None else tokens
    assert vectors.shape == (3, expected, 2 * elmo.config.width) and vectors.dtype == torch.float32
    assert torch.isfinite(vectors).all() and elmo.score([text])["forward"]["tokens"] == expected + 1


def test_a_stream_of_100_000_texts_keeps_its_order_and_its_memory(elmo):
    words, taken, count = ["oil", "cat", "goal", "match"], 0, 0
    expected = {word: elmo.embed([word])[0][:, 0] for word in words}

    def texts():
        nonlocal taken
        for taken in range(1, 100_001):
            yield words[(taken - 1) % 4] + " !" * ((taken - 1) % 3)
    for i, vectors in enumerate(elmo.embed_stream(texts())):
        count += 1
        assert taken - i <= 512             # texts and vectors held at a time
        assert vectors.shape[1] == 1 + i % 3
        if i % 1000 < 12 and i % 3 == 0:
            assert torch.allclose(vectors[:, 0], expected[words[i % 4]], atol=1e-5)
    assert count == 100_000


def test_vectors_are_the_same_bit_for_bit_on_several_cores_and_on_one(elmo):
    texts, cores = [f"{a} {b} !" for a in SENTENCES for b in SENTENCES] * 100, torch.get_num_threads()
    found = {}
    try:
        for n in (3, 1):
            torch.set_num_threads(n)
            found[n] = elmo.embed(texts)
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(cores)
    assert all(map(torch.equal, found[3], found[1]))


def test_work_on_several_cores_is_done_once_and_in_order_and_its_errors_arrive():
    done, cores = [], torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        map_on_cores(lambda i: done.append((i, torch.get_num_threads())), range(50), torch.device("cpu"))
        with pytest.raises(ZeroDivisionError):
            map_on_cores(lambda i: 1 // i, [1, 0, 2], torch.device("cpu"))
        with ThreadPoolExecutor(1) as pool:                         # a thread that comes later has all cores again
            assert pool.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(cores)
    assert sorted(done) == [(i, 1) for i in range(50)]


def test_bf16_states_are_fp32_states_to_bf16s_precision(elmo):
    ids, _ = ELMO.collate(elmo.encode(SENTENCES), np.arange(4))
    lengths = torch.from_numpy(elmo.encode(SENTENCES).lengths)
    with torch.no_grad():
        h32 = elmo.model.contextual(ids, lengths, None)[2]
        h16 = elmo.model.contextual(ids, lengths, None, torch.bfloat16)[2]
    assert h16.dtype == torch.bfloat16 and (h32 - h16.float()).abs().max() < 0.05 * h32.abs().max()
    model = ELMO.ELMo.train(SENTENCES, tiny(hidden=32, epochs=150.0, batch_tokens=100, dropout=0.0, precision="bf16"))
    assert model.score(SENTENCES)["forward"]["perplexity"] < 1.6


def test_threads_do_not_share_a_cache_of_cast_weights():
    weight = torch.nn.Parameter(torch.randn(4, 4))
    with autocast(torch.device("cpu"), torch.bfloat16):
        first = torch.nn.functional.linear(torch.ones(1, 4), weight).sum()
        second = torch.nn.functional.linear(torch.full((1, 4), 2**-9), weight).sum()
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
    digests = []
    for seed in (0, 0, 1):
        model = ELMO.ELMo.train(SENTENCES * 4, tiny(seed=seed, dropout=0.2, word_dropout=0.1))
        digests.append([w.clone() for w in model.model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(digests[0], digests[1], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(digests[0], digests[2], strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_cuda_device_trains_and_embeds_as_the_processor_does():
    model = ELMO.ELMo.train(SENTENCES, tiny(precision="fp32"), device="cuda")
    other = ELMO.ELMo.train(SENTENCES, tiny(precision="fp32"), device="cpu")
    for a, b in zip(model.embed(SENTENCES), other.embed(SENTENCES), strict=True):
        assert torch.allclose(a, b, atol=1e-3)
