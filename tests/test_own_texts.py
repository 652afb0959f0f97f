"""What people bring and take: tokens, single layers, ELMo inside another model, further training, honest scores."""
import copy
import math
import warnings

import numpy as np
import pytest
import torch
from conftest import SENTENCES, arguments, numbers, refused, slow_states, tiny
from pytest import approx
from torch import nn

import classification
import ELMO
from data.text import tokenize
from ELMO import ELMo
from run.files import InputError

GIVEN = ["Peter", "visited", "Real-Madrid", "on", "1996-08-22"]


# ----------------------------------------------------------------------------------------------------------- tokens
def test_given_tokens_get_one_vector_each_and_are_never_split(elmo):
    vectors, = elmo.embed([GIVEN])
    assert vectors.shape == (3, 5, 24)
    assert elmo.tokenize(GIVEN) == ["peter", "visited", "real-madrid", "on", "1996-08-22"]
    tokens = ["the", "Cat", "won", "."]
    same, = elmo.embed(["The cat won."])
    for found in (elmo.embed([tokens])[0], next(elmo.embed_stream([tokens]))):
        assert torch.allclose(found, same, atol=1e-6)
    assert torch.equal(elmo.sentences([tokens]), elmo.sentences(["The cat won."]))
    assert elmo.score([tokens]) == elmo.score(["The cat won."])
    assert elmo.embed([[]])[0].shape == (3, 0, 24)


def test_models_train_and_go_on_from_given_tokens():
    texts = [["Real-Madrid", "won", "."], ["oil", "Fell", "."]] * 6
    model = ELMo.train(texts, tiny(epochs=1.0))
    assert set(model.words.words[4:]) == {"real-madrid", "won", "oil", "fell", "."}
    assert "new-word" in model.adapt([["New-word", "won"]] * 20, epochs=1).words.words


@pytest.mark.parametrize("text, message", [
    (["a", ""], "text 1, token 1 is empty"),
    (["a", 7], "text 1, token 1 is of type int; expected str"),
    (("a", "b"), "text 1 is a tuple"),
    (None, "text 1 is of type NoneType; expected a string or a list of tokens")])
def test_what_is_no_text_is_named(elmo, text, message):
    for call in (elmo.embed, elmo.sentences, elmo.score, elmo.adapt, elmo.layer(), ELMo.train):
        with pytest.raises(InputError, match=message):
            call(["fine", text])


@pytest.mark.parametrize("curly, straight", [
    ("don’t", "don't"), ("Iraq’s", "Iraq's"), ("don&#8217;t", "don't"), ("caf" + "e\u0301", "caf\u00e9"),
    (["Iraq", "’s", "ca", "n’t"], ["iraq", "'s", "ca", "n't"])])
def test_curly_apostrophes_and_combined_accents_give_the_tokens_of_plain_ones(curly, straight):
    assert tokenize(curly) == tokenize(straight)


def test_a_curly_quote_that_is_no_apostrophe_stays():
    assert tokenize("the ‘dogs’ of ’04") == ["the", "‘", "dogs", "’", "of", "’", "04"]


# ----------------------------------------------------------------------------------------------------------- layers
def test_chosen_layers_are_those_of_all_layers(elmo):
    everything = elmo.embed([*SENTENCES, ""])
    for layers, expected in {"average": lambda h: (h[0] + h[1] + h[2]) / 3, "top": lambda h: h[2], 0: lambda h: h[0],
                             1: lambda h: h[1], 2: lambda h: h[2]}.items():
        found = elmo.embed([*SENTENCES, ""], layers=layers)
        assert found[-1].shape == (0, 24)
        for one, h in zip(found, everything, strict=True):
            assert torch.allclose(one, expected(h), atol=1e-6)
    for layers in ("bottom", 3, -1, 1.0, True, None):
        with pytest.raises(InputError, match="expected one of all, average, top, 0, 1, 2"):
            elmo.embed(SENTENCES, layers=layers)


def test_the_vector_of_a_sentence_is_the_mean_over_its_tokens_and_the_layers(elmo):
    found = elmo.sentences(["oil prices fall .", "", "goal !"])
    assert found.shape == (3, 24)
    assert torch.allclose(found[0], elmo.embed(["oil prices fall ."])[0].mean(dim=(0, 1)), atol=1e-6)
    assert not found[1].any()
    assert elmo.sentences([]).shape == (0, 24)
    assert torch.allclose(elmo.sentences(text for text in ["oil prices fall ."]), found[:1], atol=1e-6)


# ----------------------------------------------------------------------------------------------------------- scores
def test_scores_count_unknown_words_for_all_texts_and_for_each(elmo):
    texts = ["the cat sat on the mat nook .", "", "goal ! nook"]
    total = elmo.score(texts)
    each = elmo.score(texts, per_text=True)
    assert [one["forward"]["unknown"] for one in each] == [1, 0, 1]
    assert [one["backward"]["tokens"] for one in each] == [9, 1, 4]
    for name in ELMO.DIRECTIONS:
        assert total[name]["unknown"] == 2
        assert total[name]["nats"] == approx(sum(one[name]["nats"] for one in each))
        assert each[0][name] == approx(elmo.score(texts[:1])[name], rel=1e-5)
        assert each[2][name]["perplexity"] == approx(math.exp(each[2][name]["nats"] / 4))


def test_a_fifth_of_unknown_words_is_warned_of_in_scores_and_in_training(elmo):
    with pytest.warns(UserWarning, match="20% of the tokens are not in the vocabulary.*min_count.*spaces.*char"):
        elmo.score(["the cat sat nook ."])
    with pytest.warns(UserWarning, match="^67% of the training tokens"):
        ELMo.train(["a b c", "a d e", "a f g"], tiny(min_count=2, epochs=1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        elmo.score(["the cat sat on nook ."])


def test_the_script_warns_of_a_corpus_without_spaces_between_words(tmp_path, capfd):
    lines = [f"石油价格下跌{i}了经济增长" for i in range(60)]
    (tmp_path / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    argv = ["--corpus", str(tmp_path / "a.txt"), "--validation", "5", "--hidden", "8", "--epochs", "1"]
    assert ELMO.main([*argv, "--out", str(tmp_path / "out")]) == 0
    error = capfd.readouterr().err
    assert "ELMO.py: warning: 100% of the training tokens are not in the vocabulary" in error


# ------------------------------------------------------------------------------------------- ELMo in another model
def slow_layer(layer: ELMO.ELMoLayer, bilm: ELMO.BiLM, ids: list[int]) -> torch.Tensor:
    """(tokens, D): the mix of the layers of one text, read one word at a time."""
    forward = slow_states(bilm, ids, 0)
    backward = slow_states(bilm, ids, 1)
    exponentials = [layer.w[j].exp() for j in range(3)]
    mixed = []
    for k in range(len(ids)):
        word = 0
        for j in range(3):
            h = torch.cat([forward[j][k + 1], backward[j][len(ids) - k]])
            word = word + exponentials[j] / sum(exponentials) * h
        mixed.append(layer.gamma * word)
    return torch.stack(mixed)


def test_gradients_of_a_layer_equal_those_of_reading_one_word_at_a_time(elmo):
    layer = elmo.layer(finetune=True)
    with torch.no_grad():
        layer.w.copy_(torch.tensor([0.3, -0.5, 0.2]))
        layer.gamma.fill_(1.7)
    slow = copy.deepcopy(layer)
    texts = ["oil prices fall .", ["goal", "!"]]
    vectors, mask = layer(texts)
    assert mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert not vectors[1, 2:].any()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vectors.shape, generator=generator)
    (vectors * weight).sum().backward()
    total = 0
    for b, text in enumerate(texts):
        ids = elmo.words.ids(elmo.tokenize(text)).tolist()
        expected = slow_layer(slow, slow.bilm, ids)
        assert torch.allclose(vectors[b, :len(ids)], expected, atol=1e-5)
        total = total + (expected * weight[b, :len(ids)]).sum()
    total.backward()
    names = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    assert {"w", "gamma", "bilm.table", "bilm.forward_lstms.1.weight_hh_l0"} <= set(names)
    for (name, found), reference in zip(layer.named_parameters(), slow.parameters(), strict=True):
        if name in names:
            assert torch.allclose(found.grad, reference.grad, atol=1e-4), name
            assert found.grad.any(), name


def test_a_model_with_a_layer_learns_end_to_end_with_adam_and_leaves_the_biLM_as_it_was(elmo):
    before = {name: value.clone() for name, value in elmo.model.state_dict().items()}
    layer = elmo.layer(finetune=True)
    model = nn.ModuleDict({"elmo": layer, "out": nn.Linear(24, 1)})
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        vectors, mask = layer(["the cat", "he won the match"])
        texts = vectors.sum(dim=1) / mask.sum(dim=1, keepdim=True)
        loss = (model["out"](texts)[:, 0] - torch.tensor([1.0, -1.0])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert not torch.equal(layer.bilm.table, elmo.model.table)
    for name, value in elmo.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_layer_of_a_frozen_biLM_has_two_parameters_and_moves_as_any_module(elmo):
    layer = elmo.layer()
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {"w": (3,), "gamma": ()}
    assert list(layer.state_dict()) == ["w", "gamma"]
    vectors, mask = layer([*SENTENCES, ""])
    for b, expected in enumerate(elmo.embed(SENTENCES, layers="average")):
        assert torch.allclose(vectors[b][mask[b]], expected, atol=1e-5)
    assert not mask[-1].any()
    (vectors ** 2).sum().backward()
    assert layer.w.grad.any() and layer.gamma.grad.any()
    layer.to(torch.float64)
    assert layer.bilm.table.dtype == torch.float64
    assert elmo.model.table.dtype == torch.float32, "the ELMo itself does not move"
    layer.load_state_dict({"w": torch.ones(3), "gamma": torch.tensor(2.0)})
    with pytest.raises(InputError, match="there are no texts"):
        layer([])


def test_a_frozen_mix_stays_and_given_weights_are_used_as_they_are(elmo):
    frozen = elmo.layer(mix="frozen")
    assert not frozen.w.requires_grad and not frozen.gamma.requires_grad
    assert frozen.gamma == 1
    assert frozen.w.std() > 0
    h, = elmo.embed(["oil prices fall ."])
    for weights in ([0.5, 0.25, 0.25], [0, 0, 1], np.array([1, 1, 1])):
        layer = elmo.layer(mix=weights)
        vectors, _ = layer(["oil prices fall ."])
        expected = weights[0] * h[0] + weights[1] * h[1] + weights[2] * h[2]
        assert torch.allclose(vectors[0], expected, atol=1e-5)
        assert not vectors.requires_grad
    for mix in ("other", "111", [1, 2], [0, 0, 0], [1, -1, 1], [math.nan, 1, 1], None):
        with pytest.raises(InputError, match="expected trainable, frozen, or 3 numbers"):
            elmo.layer(mix=mix)


# --------------------------------------------------------------------------------------------------------- going on
def test_further_training_keeps_the_words_adds_new_ones_and_leaves_the_first_model_as_it_was():
    model = ELMo.train(SENTENCES * 4, tiny(representation="embedding", epochs=2.0))
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    texts = ["the zebra won the match .", "the zebra sat ."] * 10
    assert "okapi" in model.adapt([*SENTENCES * 4, *["the okapi okapi sat"] * 2], epochs=1).words.words, "twice or more"
    adapted = model.adapt(texts, epochs=30)
    assert adapted.words.words[:len(model.words)] == model.words.words
    assert adapted.words.words[len(model.words):] == ["zebra"]
    assert adapted.config.hidden == model.config.hidden
    assert adapted.digest is None
    before_and_after = [elmo.score(["the cat won the match ."])["forward"]["nats"] for elmo in (model, adapted)]
    assert before_and_after[1] < before_and_after[0]
    for name, value in model.model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("options", [
    {"representation": "char"}, {"representation": "word2vec", "freeze_word2vec": True}])
def test_every_representation_goes_on(options):
    model = ELMo.train(SENTENCES * 4, tiny(**options, epochs=1.0))
    adapted = model.adapt(["the zebra won .", *["the cat won ."] * 17, "a zebra sat .", "a quagga won ."], epochs=1)
    assert adapted.embed(["zebra"])[0].shape == (3, 1, 24)
    learning = {name for name, weight in model.layer(finetune=True).named_parameters() if weight.requires_grad}
    assert not learning & {"bilm.table", "bilm.bias"}, "they are for the softmax only"
    model.layer().double()(["the zebra"])


@pytest.fixture
def lines(tmp_path):
    """A file of 60 lines with a word that the built-in corpus does not have."""
    path = tmp_path / "own.txt"
    path.write_text("the zebra sued the bank .\nthe court sued the zebra .\n" * 30)
    return path


def test_the_script_goes_on_from_a_file_with_its_words_weights_and_model_options(whole, bilm, lines, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["--start", str(whole / "bilstm.pt"), "--corpus", str(lines), "--validation", "5", "--out", str(out)]
    assert ELMO.main([*argv, "--epochs", "0.01", "--lr", "1e-9", "--table-lr", "1e-9"]) == 0
    found = ELMo.load(out / "bilstm.pt")
    assert found.words.words == [*bilm.words.words, "zebra"]
    assert found.config.hidden == bilm.config.hidden == 12
    assert torch.allclose(found.model.table[:len(bilm.words)], bilm.model.table, atol=1e-3)
    assert numbers("pretraining", out)["start"] == bilm.digest
    message = refused("ELMO.py", [*argv, "--hidden", "448"], out)
    assert f"hidden is 448, but {whole / 'bilstm.pt'} has 12; leave this option out" in message
    other = tmp_path / "other.pt"
    bilm.save(other)
    again = ["--start", str(other), *argv[2:], "--epochs", "0.01", "--lr", "1e-9", "--table-lr", "1e-9", "--resume"]
    assert ELMO.main(again) == 0
    assert "finished already" in capsys.readouterr().out


def test_a_corpus_is_read_without_a_cache_folder_that_can_be_written(lines, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(ELMO, "CACHE", tmp_path / "file" / "cache")
    argv = ["--corpus", str(lines), "--validation", "5", "--hidden", "8", "--epochs", "0.1"]
    assert ELMO.main([*argv, "--out", str(tmp_path / "out")]) == 0
    assert list((tmp_path / "out" / "cache").iterdir())


def test_a_corpus_of_given_tokens_is_split_at_spaces_only(tmp_path):
    (tmp_path / "a.txt").write_text("Real-Madrid don't  win\n" * 20)
    argv = ["--corpus", str(tmp_path / "a.txt"), "--tokenized", "--validation", "2", "--hidden", "8", "--epochs", "0.1"]
    assert ELMO.main([*argv, "--out", str(tmp_path / "out")]) == 0
    assert ELMo.load(tmp_path / "out" / "bilstm.pt").words.words[4:] == ["don't", "real-madrid", "win"]


@pytest.mark.parametrize("call", [
    lambda elmo: ELMo.train(SENTENCES * 4, tiny()),
    lambda elmo: elmo.adapt(SENTENCES),
    lambda elmo: classification.Classifier.train(SENTENCES * 8, [0, 1] * 16, elmo)])
def test_ctrl_c_in_a_notebook_gives_no_half_trained_model(elmo, call, monkeypatch):
    def stopped(run):
        run.stop_event.set()
        return real(run)
    real = ELMO.Run.stop
    monkeypatch.setattr(ELMO.Run, "stop", stopped)
    with pytest.raises(KeyboardInterrupt):
        call(elmo)


def test_torchrun_is_refused_by_a_script_that_does_not_share_its_work(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    argv = arguments("classification.py", tmp_path, tmp_path)
    assert "without torchrun" in refused("classification.py", argv, tmp_path)
