"""Tests of report/baselines.py: word vectors, the linear model, and comparisons of predictions."""
import json
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import torch
from conftest import SENTENCES, encoded, tiny
from sklearn.metrics.pairwise import cosine_similarity

import classification
import ELMO
from classification import Config
from data import sample, word2vec
from data.tasks import EncodedTexts, Part, Task
from report import baselines
from run.metrics import mcnemar

SMALL = ["--hidden", "6", "--batch-tokens", "300", "--log-every", "50", "--seeds", "2", "--epochs", "0.5"]


def vectors_of(kind: str, elmo: ELMO.ELMo, seed: int = 0) -> torch.Tensor:
    """Vectors of one kind for SENTENCES."""
    part = Part([(text,) for text in SENTENCES], np.zeros(4, dtype=int))
    task = Task("ag_news", ["a"], part, part, part, SENTENCES)
    vectors = baselines.make_vectors(kind, Config(seed=seed), elmo, task)
    made = vectors(EncodedTexts(part, elmo).encoded, np.arange(4), torch.float32)
    assert (made.shape[0], made.shape[3]) == (vectors.layers, vectors.width)
    return made


@pytest.mark.parametrize("kind, expected", [
    ("layer0", lambda layers: layers[0, :, :layers.shape[2] // 2]),
    ("layer2", lambda layers: layers[2]),
    ("average", lambda layers: layers.mean(dim=0))])
def test_layer0_layer2_and_average_are_those_of_the_vectors_that_users_get(elmo, kind, expected):
    made = vectors_of(kind, elmo)
    for b, layers in enumerate(elmo.embed(SENTENCES)):
        assert torch.allclose(made[0, :layers.shape[1], b], expected(layers), atol=1e-5)


def test_an_untrained_bilm_has_the_shape_of_the_trained_one_and_random_weights_by_the_seed(elmo):
    made = vectors_of("untrained", elmo)
    assert torch.equal(made, vectors_of("untrained", elmo))
    assert not torch.allclose(made[:, :4, 0], elmo.embed(SENTENCES[:1])[0], atol=0.1)
    assert not torch.equal(made, vectors_of("untrained", elmo, seed=1))


@pytest.mark.parametrize("representation", ["embedding", "char"])
def test_static_vectors_are_the_rows_of_their_words(representation):
    elmo = ELMO.ELMo.train(SENTENCES * 3, tiny(representation=representation, epochs=0.1))
    table = torch.randn(len(elmo.words), 5)
    made = baselines.StaticVectors(table)(elmo.encode(["oil prices fall .", "goal zzz"]), np.arange(2), torch.float32)
    assert torch.equal(made[0, :, 0], table[elmo.words.ids(["oil", "prices", "fall", "."])])
    assert torch.equal(made[0, :2, 1], table[[elmo.words.index["goal"], 1]])        # an unknown word: that of <unk>


def test_the_word2vec_baseline_is_skip_gram_and_the_initial_vectors_of_elmo_are_cbow(monkeypatch):
    import gensim.models
    wv = MagicMock(key_to_index={5})
    wv.__getitem__.side_effect = lambda word: np.arange(4) + word
    model = Mock(return_value=Mock(wv=wv))
    monkeypatch.setattr(gensim.models, "Word2Vec", model)
    data = encoded(SENTENCES)
    table = baselines.static_vectors("word2vec", data, seed=0, width=4)
    word2vec.word2vec(data, 4, 0)
    made = [made.kwargs for made in model.call_args_list]
    assert [(given.get("sg", 0), given["window"], given["negative"], given["epochs"]) for given in made] == [
        (1, 5, 10, 10), (0, 5, 10, 5)]
    assert table.any(axis=1).nonzero()[0].tolist() == [5]
    assert table[5] / table[5, 0] == pytest.approx(np.arange(5, 9) / 5)
    assert table.std() == pytest.approx(1)


def test_words_with_the_same_neighbours_have_similar_svd_vectors():
    rows = ["cat sat", "cat ran", "dog sat", "dog ran", "oil rose", "oil fell", "gas rose", "gas fell"] * 5
    data = encoded(rows)
    table = baselines.svd(data, 4, seed=0)
    cosines = cosine_similarity(table[data.words.ids(["cat", "dog", "oil"])])
    assert cosines[0, 1] > 0.9
    assert abs(cosines[0, 2]) < 0.5


@pytest.mark.parametrize("pair, count", [
    ("af", 1), ("ag", 0),               # five and six positions apart
    ("ax", 1), ("gx", 0),               # "g" ends a row, "x" is in the next row
    ("bx", 0)])                         # in a validation row
def test_pairs_are_counted_in_training_rows_within_the_window_and_not_across_rows(pair, count):
    data = ELMO.Data.of(["a b c d e f g", "a x", "b x"], tiny(), np.array([0, 1]), np.array([2]))
    counts = baselines.pair_counts(data).toarray()
    one, other = (data.words.index[word] for word in pair)
    assert counts[one, other] == counts[other, one] == count


def test_mcnemar_counts_the_rows_that_only_one_of_both_predicts_right():
    right = np.array([True] * 10 + [False] * 2 + [True] * 5)
    other = np.array([False] * 10 + [True] * 2 + [True] * 5)
    found = mcnemar(right, other)
    assert (found["only_this"], found["only_that"]) == (10, 2)
    assert found["p"] == pytest.approx(2 * (1 + 12 + 66) / 2**12)       # two-sided binomial: 12 tosses of a fair coin
    assert found["difference"] == pytest.approx(8 / 17)
    assert found["interval"][0] < 8 / 17 < found["interval"][1]
    assert mcnemar(right, right)["p"] == 1


def test_the_linear_model_is_chosen_on_validation_rows_and_its_words_come_from_unlabelled_texts_too(monkeypatch):
    monkeypatch.setattr(baselines, "LINEAR_MODELS", (("svm", 1.0), ("logistic", 1e-9)))   # the second: one class
    corpus = ["good film", "good story", "bad film", "bad story", "fine plot", "fine plot"] * 3
    train = Part([(text,) for text in ["good film", *corpus[:4] * 3]], np.array([1, *[1, 1, 0, 0] * 3]))
    test = Part([("good plot",), ("bad plot",), ("good bad",)], np.array([1, 0, 1]))
    task = Task("ag_news", ["0", "1"], train, test.take(np.arange(2)), test, corpus, np.array([True, False, False]))
    vectorizers = baselines.count_words(task.corpus)
    assert "plot" in vectorizers[1].vocabulary_
    assert "fine plot" in vectorizers[2].vocabulary_
    numbers, predicted = baselines.tfidf(task, vectorizers)
    assert predicted[:2].tolist() == [1, 0]
    assert list(numbers["tried"].values()) == [1, 0.5, 1, 0.5]
    assert numbers["validation"] == {"mean": 1.0, "std": None}
    assert numbers["fresh"]["mean"] == 1.0
    assert numbers["ensemble"] == numbers["test"]["mean"] == pytest.approx((predicted == test.labels).mean())


def test_baselines_json_has_every_baseline_and_setting_and_compares_their_predictions(builtin, tmp_path, monkeypatch):
    texts = [text for _, _, text in sample.generate(200)]
    ELMO.ELMo.train(texts, tiny(validation=60, epochs=0.5)).save(tmp_path / "bilstm.pt")
    build = tmp_path / "build"
    files = ["--out", str(tmp_path), "--bilstm", str(tmp_path / "bilstm.pt")]
    assert classification.main([*files, *SMALL]) == 0
    argv = [*files, "--build", str(build), *SMALL]
    assert baselines.main(argv) == 0
    rows = json.loads((tmp_path / "baselines.json").read_text())["rows"]
    assert list(rows) == ["tfidf", *baselines.VECTORS, *classification.SETTINGS]
    gold = [label - 1 for label, _, _ in sample.stream_rows(100, 0, stream=1)]
    this = json.loads((tmp_path / "classification.json").read_text())["settings"]["function"]["predictions"]
    that = json.loads((build / "word2vec.json").read_text())["settings"]["trainable"]["predictions"]
    this_only = [int(a) == c != int(b) for a, b, c in zip(this, that, gold, strict=True)]
    assert rows["function"]["against"]["word2vec"]["only_this"] == sum(this_only)
    assert {path.name for path in build.glob("*.json")} == {f"{kind}.json" for kind in baselines.VECTORS}
    assert not list(build.glob("*.pt"))                     # neither a classifier nor a resume state
    monkeypatch.setattr(baselines, "classify", None)        # nothing is trained again
    assert baselines.main(argv) == 0
    assert baselines.main([*argv, "--task", "sst2"]) == 2
    (tmp_path / "classification.json").write_text("{")
    assert baselines.main(argv) == 2


@pytest.mark.parametrize("digest, rows, lr, fits", [
    ("a", 4, 0.1, True), ("b", 4, 0.1, False), ("a", 5, 0.1, False), ("a", 4, 0.2, False)])
def test_a_finished_run_with_another_bilm_options_or_test_rows_is_not_used(tmp_path, digest, rows, lr, fits):
    path = tmp_path / "svd.json"
    path.write_text(json.dumps({"bilm": "a", "config": {"lr": 0.1, "seeds": 1},
                                "settings": {"trainable": {"predictions": "0123"}}}))
    assert (baselines.finished_run(path, digest, rows, {"lr": lr}) is not None) == fits
