"""The baselines of report/baselines.py: word vectors, the linear model, and how predictions are compared."""
import json

import numpy as np
import pytest
import torch
from conftest import ROOT, SENTENCES, tiny

import classification
import ELMO
from classification import Config
from data import sample, word2vec
from data.tasks import EncodedTexts, Part, Task
from report import baselines
from run.metrics import mcnemar

SMALL = ["--hidden", "6", "--batch-tokens", "300", "--log-every", "50", "--seeds", "2", "--epochs", "0.5"]


@pytest.fixture(scope="module")
def bilm(corpus, tmp_path_factory):
    """A folder with bilstm.pt, a tiny biLM of the built-in corpus."""
    folder = tmp_path_factory.mktemp("bilm")
    texts = [text for _, _, text in sample.generate(600)]
    ELMO.ELMo.train(texts, tiny(validation=60, epochs=2.0, batch_tokens=300)).save(folder / "bilstm.pt")
    return folder


def part_of(texts: list[str]) -> Part:
    return Part([(text,) for text in texts], np.arange(len(texts)) % 2)


def of_task(kind: str, elmo: ELMO.ELMo, texts: list[str]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Vectors of one kind for some texts, and what users of the ELMo get for them."""
    part = part_of(texts)
    task = Task("ag_news", ["a", "b"], part, part, part, texts)
    vectors = baselines.make_vectors(kind, Config(), elmo, task)
    made = vectors(EncodedTexts(part, elmo).encoded, np.arange(len(texts)), torch.float32)
    assert made.shape[0] == vectors.layers and made.shape[3] == vectors.width and vectors.device.type == "cpu"
    return made, elmo.embed(texts)


@pytest.mark.parametrize("kind, expected", [
    ("layer0", lambda layers: layers[0, :, :layers.shape[2] // 2]),
    ("layer2", lambda layers: layers[2]),
    ("average", lambda layers: layers.mean(dim=0))])
def test_parts_of_the_bilm_are_those_of_the_vectors_that_users_get(elmo, kind, expected):
    made, users = of_task(kind, elmo, SENTENCES)
    for b, layers in enumerate(users):
        assert torch.allclose(made[0, :layers.shape[1], b], expected(layers), atol=1e-5)


def test_an_untrained_bilm_has_the_shape_of_the_trained_one_other_numbers_and_depends_on_the_seed(elmo):
    made, users = of_task("untrained", elmo, SENTENCES)
    again, _ = of_task("untrained", elmo, SENTENCES)
    assert torch.equal(made, again) and made.shape[0] == 3
    assert not torch.allclose(made[:, :4, 0], users[0], atol=0.1)
    assert not torch.equal(baselines.untrained(elmo, 0).table, baselines.untrained(elmo, 1).table)


@pytest.mark.parametrize("representation", ["embedding", "char"])
def test_static_vectors_are_the_rows_of_their_words(representation):
    elmo = ELMO.ELMo.train(SENTENCES * 3, tiny(representation=representation, epochs=0.1))
    table = torch.randn(len(elmo.words), 5)
    encoded = EncodedTexts(part_of(["oil prices fall .", "goal zzz"]), elmo).encoded
    made = baselines.StaticVectors(table)(encoded, np.arange(2), torch.float32)
    assert made.shape == (1, 4, 2, 5)
    assert torch.equal(made[0, :, 0], table[elmo.words.ids(["oil", "prices", "fall", "."])])
    assert torch.equal(made[0, :2, 1], table[[elmo.words.index["goal"], 1]])        # an unknown word has <unk>'s


def test_the_word2vec_baseline_is_skip_gram_and_elmos_start_is_not(monkeypatch):
    import gensim.models
    made = []

    class Recorder:
        def __init__(self, *_, sg: int = 0, **settings):
            made.append((sg, settings["window"], settings["negative"], settings["epochs"]))
            self.wv = self
            self.key_to_index = {}

    monkeypatch.setattr(gensim.models, "Word2Vec", Recorder)
    data = ELMO.Data.of(SENTENCES, tiny(), np.arange(4), np.arange(0))
    baselines.static_vectors("word2vec", data, seed=0, width=4)
    word2vec.word2vec(data, 4, 0)
    assert made == [(1, 5, 10, 10), (0, 5, 10, 5)]


def test_svd_places_words_of_the_same_neighbours_together():
    animals = ["cat sat", "cat ran", "dog sat", "dog ran"]
    markets = ["oil rose", "oil fell", "gas rose", "gas fell"]
    rows = (animals + markets) * 5
    data = ELMO.Data.of(rows, tiny(), np.arange(len(rows)), np.arange(0))
    table = baselines.svd(data, 4, seed=0)
    unit = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-9)
    cat, dog, oil = (unit[data.words.index[word]] for word in ("cat", "dog", "oil"))
    assert cat @ dog > 0.9 and abs(cat @ oil) < 0.5


def test_pairs_are_counted_in_training_rows_within_the_window_and_not_across_rows():
    rows = ["a b c d e f g", "a x", "b x"]
    data = ELMO.Data.of(rows, tiny(), np.array([0, 1]), np.array([2]))
    counts = baselines.pair_counts(data).toarray()
    number = {word: data.words.index[word] for word in "abfgx"}

    def count(one: str, other: str) -> int:
        assert counts[number[one], number[other]] == counts[number[other], number[one]]
        return counts[number[one], number[other]]

    assert count("a", "f") == 1 and count("a", "g") == 0        # five and six words apart
    assert count("a", "x") == 1 and count("g", "x") == 0        # "g" ends a row, "x" is in the next row
    assert count("b", "x") == 0                                 # in a validation row


def test_mcnemar_counts_the_rows_that_only_one_has_right():
    right = np.array([True] * 10 + [False] * 2 + [True] * 5)
    other = np.array([False] * 10 + [True] * 2 + [True] * 5)
    found = mcnemar(right, other)
    assert (found["only_this"], found["only_that"]) == (10, 2)
    assert found["p"] == pytest.approx(2 * (1 + 12 + 66) / 2**12)       # two-sided binomial of 12 fair throws
    assert found["difference"] == pytest.approx(8 / 17)
    assert found["interval"][0] < 8 / 17 < found["interval"][1]
    assert mcnemar(right, right)["p"] == 1


def test_the_linear_model_is_chosen_on_validation_rows_and_counts_unlabelled_texts_too():
    corpus = ["good film", "good story", "bad film", "bad story", "fine plot", "fine plot"] * 3
    labels = np.array([1, 1, 0, 0] * 3)
    train = Part([(text,) for text in corpus[:4] * 3], labels)
    test = Part([("good plot",), ("bad plot",), ("good bad",)], np.array([1, 0, 1]))
    task = Task("ag_news", ["0", "1"], train, test.take(np.arange(2)), test, corpus, np.array([True, False, False]))
    vectorizers = baselines.count_words(task.corpus)
    assert "plot" in vectorizers[1].vocabulary_ and "fine plot" in vectorizers[2].vocabulary_
    numbers, predicted = baselines.tfidf(task, vectorizers)
    assert predicted[:2].tolist() == [1, 0] and len(numbers["tried"]) == 12
    assert numbers["validation"] == {"mean": 1.0, "std": None} and numbers["fresh"]["mean"] == 1.0
    assert numbers["ensemble"] == numbers["test"]["mean"] == pytest.approx((predicted == test.labels).mean())


def test_baselines_and_their_differences_from_the_jsons(builtin, bilm, tmp_path):
    out = tmp_path / "out"
    build = tmp_path / "build"
    files = ["--out", str(out), "--bilstm", str(bilm / "bilstm.pt")]
    assert classification.main([*files, *SMALL]) == 0
    argv = [*files, "--build", str(build), *SMALL]
    assert baselines.main(argv) == 0
    result = json.loads((out / "baselines.json").read_text())
    assert list(result["rows"]) == ["tfidf", *baselines.VECTORS, *classification.SETTINGS]
    assert all(len(row["each"]["test"]) == 2 for name, row in result["rows"].items() if name != "tfidf")
    gold = [label - 1 for label, _, _ in sample.stream_rows(100, 0, stream=1)]
    this = json.loads((out / "classification.json").read_text())["settings"]["function"]["predictions"]
    that = json.loads((build / "word2vec.json").read_text())["settings"]["trainable"]["predictions"]
    this_only = [int(a) == c != int(b) for a, b, c in zip(this, that, gold, strict=True)]
    assert result["rows"]["function"]["against"]["word2vec"]["only_this"] == sum(this_only)

    def times() -> dict:
        return {path.name: path.stat().st_mtime_ns for path in build.glob("*.json")}

    before = times()
    assert set(before) == {f"{kind}.json" for kind in baselines.VECTORS}
    assert not list(build.glob("*.pt"))                     # neither a classifier nor a resume state
    assert baselines.main(argv) == 0 and times() == before, "a finished run is not trained again"
    assert baselines.main([*argv, "--task", "sst2"]) == 2
    (out / "classification.json").write_text("{")
    assert baselines.main(argv) == 2


def test_runs_with_other_options_or_of_another_bilm_are_not_taken(tmp_path):
    path = tmp_path / "svd.json"
    path.write_text(json.dumps({"bilm": "a", "config": {"lr": 0.1, "seeds": 1},
                                "settings": {"trainable": {"predictions": "0123"}}}))
    assert baselines.finished_run(path, "a", 4, {"lr": 0.1})["bilm"] == "a"
    assert baselines.finished_run(path, "b", 4, {"lr": 0.1}) is None
    assert baselines.finished_run(path, "a", 5, {"lr": 0.1}) is None
    assert baselines.finished_run(path, "a", 4, {"lr": 0.2}) is None
    assert baselines.finished_run(tmp_path / "other.json", "a", 4, {}) is None


def test_the_committed_baselines_stand_beside_the_committed_runs():
    rows = json.loads((ROOT / "models" / "baselines.json").read_text())["rows"]
    result = json.loads((ROOT / "models" / "classification.json").read_text())
    for setting, numbers in result["settings"].items():
        assert rows[setting]["test"] == numbers["test"]["accuracy"]
        assert rows[setting]["ensemble"] == numbers["test"]["ensemble"]["accuracy"]
    assert set(baselines.VECTORS) < set(rows)
