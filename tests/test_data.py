"""Rows, tokens and the built-in corpus: expected values are written by hand or counted in a second, slow way."""
import collections
import hashlib
import itertools
import math
import os

import numpy as np
import pytest

from data import ag_news as news
from data import sample
from data.corpus import tokenize_corpus
from data.text import Data, tokenize, tokenize_texts
from ELMO import Config
from run.files import InputError, write_atomically

LAYOUTS = {
    "original": '"3","A title","Oil rises, again."\n"1","","He said ""no""."\n',
    "three columns": 'Class Index,Title,Description\n3,A title,"Oil rises, again."\n1,,"He said ""no""."\n',
    "two columns": 'Class Index,Description\n3,"Oil rises, again."\n1,"He said ""no""."\n'}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_csv_layout_gives_the_same_classes_and_descriptions(layout, tmp_path):
    (tmp_path / "a.csv").write_text(LAYOUTS[layout])
    rows = news.read_csv(tmp_path / "a.csv")
    assert rows["class"].tolist() == [3, 1]
    assert rows.description.tolist() == ["Oil rises, again.", 'He said "no".']
    if layout == "two columns":
        assert rows.title.tolist() == ["", ""]
    else:
        assert rows.title.tolist() == ["A title", ""]


@pytest.mark.parametrize("content, expected", [
    ('"1","NA","null"\n"2","nan","None"\n', ["null", "None"]),           # words that pandas takes for missing values
    ('"1","t","one\ntwo"\n"2","t","three"\n', ["one\ntwo", "three"])])
def test_descriptions_stay_as_they_are(tmp_path, content, expected):
    (tmp_path / "a.csv").write_text(content)
    assert news.read_csv(tmp_path / "a.csv").description.tolist() == expected


def test_ag_news_dir_is_the_only_place_looked_at(tmp_path, monkeypatch):
    monkeypatch.setenv("AG_NEWS_DIR", str(tmp_path))
    with pytest.raises(InputError, match=r"train\.csv is missing"):
        news.read_ag_news("train")


def test_offline_with_nothing_found_names_three_things_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("AG_NEWS_DIR", raising=False)
    monkeypatch.setattr(news, "HERE", tmp_path)
    monkeypatch.setattr(news, "SOURCE", "http://127.0.0.1:9/")          # no server listens there
    with pytest.raises(InputError, match=r"three things: set AG_NEWS_DIR .* put the two files .* connect to the net"):
        news.ag_news_folder()
    assert not list((tmp_path / "ag_news").iterdir())


def test_a_download_is_accepted_only_if_its_hash_is_right(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    content = LAYOUTS["original"].encode()
    for part in ("train", "test"):
        (source / f"{part}.csv").write_bytes(content)
    monkeypatch.setattr(news, "SOURCE", source.as_uri() + "/")
    folder = tmp_path / "folder"
    with pytest.raises(InputError, match="SHA-256"):
        news.download(folder)
    assert not list(folder.iterdir())
    monkeypatch.setattr(news, "SHA256", dict.fromkeys(("train", "test"), hashlib.sha256(content).hexdigest()))
    news.download(folder)
    assert (folder / "train.csv").read_bytes() == content
    assert sorted(os.listdir(folder)) == ["test.csv", "train.csv"]


def test_a_row_is_fresh_if_at_most_a_fifth_of_its_8_grams_are_in_the_training_rows():
    known = ["a b c d e f g h i j k l"]             # it has 5 8-grams
    fresh_of_text = {
        "A B C D E F G H x y z u": True,            # 1 of 5 is known: a fifth
        "a b c d e f g h i x y z": False,           # 2 of 5 are known
        "a b c d e f g": True,                      # it has no 8-gram
        "": True,
        "n o t h i n g k n o w n": True}
    found = news.fresh_rows(known, list(fresh_of_text))
    assert found.tolist() == list(fresh_of_text.values())


def test_a_split_has_every_row_once_and_depends_on_the_seed_alone():
    train, validation = news.split(100, 30, seed=5)
    assert sorted([*train, *validation]) == list(range(100))
    assert len(validation) == 30
    _, again = news.split(100, 30, seed=5)
    _, other = news.split(100, 30, seed=6)
    assert again.tolist() == validation.tolist()
    assert other.tolist() != validation.tolist()


@pytest.mark.parametrize("text, tokens", [
    ("Oil prices fall.", ["oil", "prices", "fall", "."]),
    ("Iraq #39;s U.S. can't 1,000.5 A amp;M", ["iraq", "'s", "u.s.", "ca", "n't", "1,000.5", "a", "&", "m"]),
    ("&lt;b&gt;Up&lt;/b&gt; 4.5% -- \\", ["<b>", "up", "</b>", "4.5", "%", "--", "\\"]),
    ("third-quarter ... Zürich 東京", ["third", "-", "quarter", "...", "zürich", "東京"]),
    ("", []),
    ("  \t\n", [])])
def test_the_tokens_of_a_text_are_those_written_here(text, tokens):
    assert tokenize(text) == tokens


def test_no_text_becomes_a_special_symbol():
    texts = ["&lt;s&gt; a <pad> &amp;lt;/s&amp;gt; <unk> <s>"] * 3
    data = Data.of(texts, Config(min_count=1), np.arange(3), np.arange(0))
    assert data.words.words == ["<pad>", "<unk>", "<s>", "</s>", "a"]
    assert data.encoded.lookup[data.encoded.tokens.ids].tolist() == [1, 4, 1, 1, 1, 1] * 3


def test_the_vocabulary_comes_from_training_rows_alone():
    texts = ["a a b", "a b c", "d d d"]
    data = Data.of(texts, Config(min_count=2), np.array([0, 1]), np.array([2]))
    assert data.words.words[4:] == ["a", "b"]
    assert data.encoded.unknown(data.train) == pytest.approx(1 / 6)
    assert data.encoded.unknown(data.validation) == 1
    assert data.counts().tolist() == [0, 1, 2, 2, 3, 2]


def test_tokenizing_in_processes_and_from_the_cache_equals_the_plain_loop(tmp_path):
    texts = [f"word{i % 700} and {i % 13} , #39;s" if i % 5 else "" for i in range(5000)]
    plain = [tokenize(text) for text in texts]
    for _ in range(2):
        tokens = tokenize_texts(texts, tmp_path)
        words = np.array(tokens.types, dtype=object)[tokens.ids]
        rows = [words[begin:end].tolist() for begin, end in itertools.pairwise(tokens.offsets)]
        assert rows == plain
    assert isinstance(tokens.ids, np.memmap)
    assert len(list(tmp_path.iterdir())) == 1
    counts = collections.Counter(itertools.chain.from_iterable(plain[:100]))
    found = dict(zip(tokens.types, tokens.counts(np.arange(100)), strict=True))
    present = {word: count for word, count in found.items() if count}
    assert present == counts


def test_other_texts_have_a_cache_of_their_own_and_a_damaged_one_is_named(tmp_path):
    assert tokenize_texts(["A"], tmp_path).types == ["a"]
    (next(tmp_path.iterdir()) / "ids.int32").write_bytes(b"1234")
    assert tokenize_texts(["B"], tmp_path).types == ["b"]
    assert tokenize_corpus(["A"], str.split, "another tokenizer", tmp_path).types == ["A"]
    with pytest.raises(InputError, match="delete it"):
        tokenize_texts(["A"], tmp_path)
    (tmp_path / "file").write_text("not a folder")
    assert tokenize_texts(["a b"], tmp_path / "file").types == ["a", "b"]          # without a cache


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "a").write_text("old")

    def fail(file):
        """Writes a part of the content; then the disk is full."""
        file.write(b"new")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left"):
        write_atomically(tmp_path / "a", fail)
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_the_built_in_corpus_is_the_same_for_a_seed_and_its_first_rows_do_not_depend_on_its_size():
    rows = list(sample.generate(2500, seed=3))
    assert rows[:100] == list(sample.generate(100, seed=3))
    assert rows != list(sample.generate(2500, seed=4))
    assert {row[0] for row in rows} == {1, 2, 3, 4}
    assert all(tokenize(text) == text.split() for _, _, text in rows[:300])


def test_the_probability_of_a_row_is_the_product_of_its_choices():
    text = "on monday the minister sued the bank over the military court ."         # every word the first of its list

    def first(count: int) -> float:
        """The probability of the first of so many words: word k, from 0 on, has a share of 1 / (10 + k)."""
        return (1 / 10) / sum(1 / (10 + k) for k in range(count))

    common = 0.25 * first(5) * 0.75 * first(14) * first(12) * 0.75 * first(14) * 0.75 * first(6) * first(3)
    common *= first(12) * first(10) * 0.6 * 0.9
    by_class = [0.95 * 0.70, 0.015 * 0.05, 0.02 * 0.20, 0.015 * 0.05]
    assert sample.nll_batch([text])[0] == pytest.approx(-math.log(common * sum(by_class) / 4))
    assert sample.posterior(text) == pytest.approx(np.array(by_class) / sum(by_class))
    bag = np.array([0.97 * 0.70, 0.03 * 0.05, 0.97 * 0.20, 0.03 * 0.05])            # "sued" shows the pair
    assert sample.bag_posterior(text) == pytest.approx(bag / bag.sum())


def test_in_the_built_in_corpus_the_order_of_words_tells_more_than_the_words_without_their_order():
    rows = list(sample.generate(1500, seed=7))
    gold = np.array([label - 1 for label, _, _ in rows])
    order = np.array([sample.posterior(text).argmax() for _, _, text in rows])
    bag = np.array([sample.bag_posterior(text).argmax() for _, _, text in rows])
    assert 0.94 < (order == gold).mean() < 0.98
    assert 0.70 < (bag == gold).mean() < 0.79
    shuffled = " ".join(np.random.default_rng(0).permutation(rows[0][2].split()))
    assert np.allclose(sample.bag_posterior(shuffled), sample.bag_posterior(rows[0][2]))


def test_at_most_2_percent_of_the_real_test_tokens_are_unknown(ag_news, tmp_path):
    assert Data.of_ag_news(Config(min_count=3), tmp_path).unknown()["test"] < 0.02


def test_odd_texts_reach_the_worker_processes_as_they_are(tmp_path):
    odd = ["\ud800 a", "b\x00c", "\U0001f600"] * 1000          # more than one chunk, so that workers are used
    tokens = tokenize_texts(odd, tmp_path)
    assert len(tokens) == 3000
    assert tokens.types == ["\ud800", "a", "b", "\x00", "c", "\U0001f600"]
