"""The biLM itself: leakage, alignment, padding, losses and optimizer against second, slow implementations."""
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import SENTENCES, encoded, tiny

import ELMO
from data.files import InputError
from data.machine import on_each_core
from data.text import BOS, EOS, PAD, UNK, batches

SPECIAL = 4


def slow_states(model: ELMO.BiLM, ids: list[int], direction: int) -> list[torch.Tensor]:
    """[h_0, h_1, h_2], each (n + 1, P): one direction read one word at a time with torch.nn.LSTMCell's equations."""
    stream = [BOS, *ids] if direction == 0 else [EOS, *reversed(ids)]
    inputs = [model.table[i] for i in stream]
    layers = [torch.stack(inputs)]
    for j, layer in enumerate(model.layers):
        w_x, w_h, bias = layer.w_x[direction], layer.w_h[direction], layer.bias[direction]
        h, c, out = torch.zeros(w_h.shape[1]), torch.zeros(w_x.shape[0] // 4), []
        for x in inputs:
            i, f, o, u = (w_x @ x + w_h @ h + bias).chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * u.tanh()
            h = o.sigmoid() * c.tanh()
            h = h if layer.w_p is None else layer.w_p[direction] @ h
            out.append(h)
        inputs = [a + b for a, b in zip(out, inputs, strict=True)] if j and model.config.skip else out
        layers.append(torch.stack(inputs))
    return layers


@pytest.mark.parametrize("hidden, width", [(6, 6), (10, 6)])
def test_the_lstm_and_its_gradients_equal_torchs(hidden, width):
    torch.manual_seed(0)
    layer = ELMO.Layer(width, hidden, min(width, hidden))
    x = torch.randn(2, 7, 3, width, requires_grad=True)
    weight = torch.randn(2, 7, 3, width)
    (layer(x) * weight).sum().backward()
    order = torch.arange(4 * hidden).view(4, hidden)[[0, 1, 3, 2]].flatten()    # ours i f o u, torch's i f u o
    for d in range(2):
        other = torch.nn.LSTM(width, hidden, proj_size=width if hidden > width else 0)
        with torch.no_grad():
            other.weight_ih_l0.copy_(layer.w_x[d][order])
            other.weight_hh_l0.copy_(layer.w_h[d][order])
            other.bias_ih_l0.copy_(layer.bias[d][order])
            other.bias_hh_l0.zero_()
            if hidden > width:
                other.weight_hr_l0.copy_(layer.w_p[d])
        y = x[d].detach().clone().requires_grad_()
        out, _ = other(y)
        (out * weight[d]).sum().backward()
        assert torch.allclose(layer(x)[d], out, atol=1e-6)
        assert torch.allclose(x.grad[d], y.grad, atol=1e-5)
        assert torch.allclose(layer.w_x.grad[d][order], other.weight_ih_l0.grad, atol=1e-5)
        assert torch.allclose(layer.w_h.grad[d][order], other.weight_hh_l0.grad, atol=1e-5)
        assert torch.allclose(layer.bias.grad[d][order], other.bias_ih_l0.grad, atol=1e-5)
        if hidden > width:
            assert torch.allclose(layer.w_p.grad[d], other.weight_hr_l0.grad, atol=1e-5)


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
    P = elmo.config.output
    for layer in (1, 2):
        same = (before[layer] == after[layer])
        assert same[:k, :P].all() and same[k + 1:, P:].all()                    # untouched: the past, and the future
        assert not same[k:, :P].all(dim=1).any()                                # forward: every state from k on
        assert not same[:k + 1, P:].all(dim=1).any()                            # backward: every state up to k


@pytest.mark.parametrize("skip, hidden", [(True, 12), (False, 12), (True, 20)])
def test_vectors_equal_those_of_reading_one_word_at_a_time(skip, hidden):
    model = ELMO.ELMo.train(SENTENCES, tiny(skip=skip, hidden=hidden, width=12, epochs=1.0))
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
    one, many = elmo.score(texts[:1])["forward"]["nats"], elmo.score([texts[0]] * 3)["forward"]["nats"]
    assert many == pytest.approx(3 * one, rel=1e-5)


def test_scores_equal_the_sum_over_a_full_softmax_one_word_at_a_time(elmo):
    text = "the cat won unknownword ."
    ids = [elmo.words.index.get(word, UNK) for word in text.split()]
    assert UNK in ids
    for d, name in enumerate(("forward", "backward")):
        gold = [*ids, EOS] if d == 0 else [*reversed(ids), BOS]
        with torch.no_grad():
            logits = slow_states(elmo.model, ids, d)[2] @ elmo.model.table.t() + elmo.model.table_bias[:, 0]
        nats = -sum(torch.log_softmax(row[1:].double(), 0)[word - 1] for row, word in zip(logits, gold, strict=True))
        found = elmo.score([text])[name]
        assert found["tokens"] == len(ids) + 1
        assert found["nats"] == pytest.approx(float(nats), rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(float(nats) / (len(ids) + 1)), rel=1e-5)


def test_a_zero_softmax_scores_every_word_with_the_log_of_how_many_there_are():
    model = ELMO.ELMo.train(SENTENCES, tiny(epochs=1.0))
    model.model.table.zero_()
    model.model.table_bias.zero_()
    found = model.score(["the cat", ""])["backward"]
    assert found["tokens"] == 4
    assert found["nats"] / 4 == pytest.approx(math.log(len(model.words) - 1), rel=1e-6)     # all but <pad>


def negatives(draws: int, words: int = 60) -> ELMO.Negatives:
    counts = np.concatenate([[0, 3, 40, 40], 1000 / np.arange(1, words - 3)])
    sampler = ELMO.Negatives(counts, draws, 0.75, seed=0)
    sampler.shuffle(0)
    return sampler


def test_negatives_are_distinct_never_padding_and_drawn_as_often_as_they_say():
    sampler = negatives(20)
    draws = [sampler.draw((i + 0.5) / 4000) for i in range(4000)]
    assert {len(draw) for draw in draws} == {20} and all(len(set(draw.tolist())) == 20 for draw in draws[::50])
    often = np.bincount(torch.cat(draws), minlength=60) / 4000
    assert np.abs(often - sampler.pi).max() < 1e-3 and often[PAD] == 0 and sampler.pi.sum() == pytest.approx(20)
    assert sampler.pi[4] == 1 and (sampler.pi[[BOS, EOS]] > 0).all()        # the most frequent word is always there


def test_the_sampled_softmax_has_the_full_ones_partition_sum_on_average():
    torch.manual_seed(0)
    sampler, h, table, bias = negatives(20), torch.randn(3, 5), torch.randn(60, 5), torch.randn(60, 1)
    target = torch.tensor([4, 30, 2])
    full = torch.nn.functional.cross_entropy((h @ table.t() + bias[:, 0])[:, 1:], target - 1, reduction="none")
    mean = torch.zeros(3, dtype=torch.float64)
    for i in range(2000):
        sampled = sampler.draw((i + 0.5) / 2000)
        for n in range(3):
            loss = ELMO.SampledSoftmax.apply(h[n:n + 1], table, bias, target[n:n + 1], sampled, sampler.log_pi[sampled])
            mean[n] += loss.exp() / 2000
    assert torch.allclose(mean, full.double().exp(), rtol=5e-3)


@pytest.mark.parametrize("draws", [20, 10_000])
def test_the_sampled_softmax_and_its_gradients_equal_the_formula_and_with_all_words_the_full_one(draws, monkeypatch):
    torch.manual_seed(1)
    sampler = negatives(draws)
    sampled = sampler.draw(0.3)
    tensors = [torch.randn(40, 5), torch.randn(60, 5), torch.randn(60, 1)]
    target = torch.randint(1, 60, (40,))
    fast, slow = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    monkeypatch.setattr(ELMO.SampledSoftmax, "LOGITS", 1)          # blocks of 16 targets
    total = ELMO.SampledSoftmax.apply(*fast, target, sampled, sampler.log_pi[sampled])
    (total / 7).backward()
    h, table, bias = slow
    logits = h @ table.t() + bias[:, 0]
    if draws == 10_000:
        assert len(sampled) == 59
        expected = torch.nn.functional.cross_entropy(logits[:, 1:], target - 1, reduction="sum")
    else:
        z = logits[:, sampled] - sampler.log_pi[sampled]
        z = z.masked_fill(sampled == target[:, None], -torch.inf)
        gold = logits.gather(1, target[:, None])
        expected = (torch.cat([gold, z], 1).logsumexp(1) - gold[:, 0]).sum()
    (expected / 7).backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(fast, slow, strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5)


def test_row_wise_adam_equals_torchs_adam_for_rows_always_touched_and_leaves_the_others_alone():
    torch.manual_seed(0)
    start = torch.randn(6, 3)
    table, dense = start.clone(), torch.nn.Parameter(start[[1, 4]].clone())
    ours, torchs = ELMO.RowAdam(table, 0.99), torch.optim.Adam([dense], lr=0.1, betas=(0.9, 0.99))
    for _ in range(5):
        dense.grad = torch.randn(2, 3)
        ours.update(torch.tensor([1, 4]), dense.grad, 0.1)
        torchs.step()
    assert torch.allclose(table[[1, 4]], dense, atol=1e-6)
    assert torch.equal(table[[0, 2, 3, 5]], start[[0, 2, 3, 5]])
    assert ours.state["steps"][:, 0].tolist() == [0, 5, 0, 0, 5, 0]


def test_a_training_step_moves_only_rows_of_its_batch_and_its_negatives():
    data = encoded(SENTENCES * 5)
    trainer = ELMO.Trainer(tiny(negatives=2, batch_tokens=6), data, torch.device("cpu"))
    before = trainer.model.table.clone()
    trainer.step(0)
    batch = trainer.data.train[trainer.batches[0]]
    touched = set(ELMO.collate(data.encoded, batch)[0].flatten().tolist()) | {BOS, EOS}
    moved = (before != trainer.model.table).any(dim=1).nonzero()[:, 0].tolist()
    assert len(set(moved) - touched) <= 2 and set(moved) - {PAD} >= touched - {PAD}


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


@pytest.mark.parametrize("knobs", [{"representation": "char"}, {"representation": "word2vec"},
                                   {"representation": "word2vec", "freeze_word2vec": True}, {"hidden": 20, "width": 8}])
def test_every_representation_trains_saves_embeds_and_scores(knobs, tmp_path):
    model = ELMO.ELMo.train(SENTENCES * 4, tiny(**knobs, epochs=2.0))
    model.save(tmp_path / "a.pt")
    again = ELMO.ELMo.load(tmp_path / "a.pt")
    assert again.score(SENTENCES) == model.score(SENTENCES) and again.digest == model.digest
    assert all(torch.equal(a, b) for a, b in zip(again.embed(SENTENCES), model.embed(SENTENCES), strict=True))
    assert again.embed(["oil"])[0].shape == (3, 1, 2 * again.config.output)
    forward, backward = again.embed(["oil"])[0][0].chunk(2, dim=-1)
    assert torch.equal(forward, backward)       # layer 0 is [x ; x]


def test_frozen_word2vec_vectors_stay_and_tuned_ones_move():
    for freeze in (True, False):
        config = tiny(representation="word2vec", freeze_word2vec=freeze)
        trainer = ELMO.Trainer(config, encoded(SENTENCES * 4), torch.device("cpu"))
        x = (trainer.model.static if freeze else trainer.model.table)
        before = x.clone()
        assert before[SPECIAL:].std() == pytest.approx(ELMO.BiLM.STD, rel=0.2)
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
    assert vectors.shape == (3, expected, 2 * elmo.config.output) and vectors.dtype == torch.float32
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


def test_work_on_each_core_is_done_once_and_its_errors_arrive():
    done, cores = [], torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        on_each_core(lambda i: done.append((i, torch.get_num_threads())), range(50), torch.device("cpu"))
        with pytest.raises(ZeroDivisionError):
            on_each_core(lambda i: 1 // i, [1, 0, 2], torch.device("cpu"))
        with ThreadPoolExecutor(1) as pool:                         # a thread that comes later has all cores again
            assert pool.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(cores)
    assert sorted(done) == [(i, 1) for i in range(50)]


def test_bf16_states_are_fp32_states_to_bf16s_precision(elmo):
    x, _ = ELMO.collate(elmo.encode(SENTENCES), np.arange(4))
    with torch.no_grad():
        x = elmo.model.represent(x)
        h32, h16 = (elmo.model.states(x, kind)[2].float() for kind in (torch.float32, torch.bfloat16))
    assert not torch.equal(h32, h16) and (h32 - h16).abs().max() < 0.05 * h32.abs().max()
    model = ELMO.ELMo.train(SENTENCES, tiny(hidden=32, epochs=150.0, batch_tokens=100, dropout=0.0, precision="bf16"))
    assert model.score(SENTENCES)["forward"]["perplexity"] < 1.6


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
