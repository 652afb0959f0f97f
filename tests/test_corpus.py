"""Plain text, --corpus: it is read line by line, cut into rows, prepared in little memory, and trained on."""
import gzip
import json

import numpy as np
import pytest

import ELMO
from data import corpus, sample, text


def test_plain_text_is_every_line_of_a_folders_txt_and_gz_files_in_the_order_of_their_names(tmp_path):
    (tmp_path / "b.txt").write_bytes("\ufeffone two\r\n\n  \nthree\n".encode())
    (tmp_path / "a").mkdir()
    with gzip.open(tmp_path / "a" / "x.gz", "wt") as file:
        file.write("zero\nlast without an end")
    (tmp_path / "c.csv").write_text("not read")
    lines = corpus.Lines(tmp_path)
    expected = ["zero", "last without an end", "one two", "three"]
    assert list(lines) == expected
    assert list(lines) == expected, "they can be read again"
    assert list(corpus.Lines(tmp_path / "c.csv")) == ["not read"], "a file that is named is read, whatever its name"


@pytest.mark.parametrize("content, joint", [
    (" ".join(f"wörd{i}" for i in range(100)), " "),
    ("東京" * 60, ""),
    ("é" * 200, "")])
def test_a_very_long_line_is_cut_between_words_or_if_there_are_none_between_characters(
        tmp_path, monkeypatch, content, joint):
    monkeypatch.setattr(corpus, "LETTERS", 50)                  # the longest piece, in bytes
    (tmp_path / "a.txt").write_text(content + "\nnext\n", encoding="utf-8")
    *pieces, last = corpus.Lines(tmp_path / "a.txt")
    assert last == "next"
    assert len(pieces) > 3
    assert max(len(piece.encode()) for piece in pieces) <= 50
    assert joint.join(pieces) == content


def test_a_long_row_becomes_several_of_the_same_tokens():
    tokens = corpus.Tokens(["a"], np.zeros(9, dtype=np.int32), np.array([0, 5, 5, 7, 9]))
    short, row = tokens.cut(2)
    assert short.offsets.tolist() == [0, 2, 4, 5, 5, 7, 9]
    assert row.tolist() == [0, 0, 0, 1, 2, 3]
    uncut, row = tokens.cut(5)
    assert uncut.offsets.tolist() == [0, 5, 5, 7, 9]
    assert row.tolist() == [0, 1, 2, 3]


PACKED = gzip.compress(b"words and words\n" * 99)


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", b"good\nb\xe9d\n", "a.txt, line 2: is not UTF-8"),
    ("a.txt", b"\x80" * 120, "a.txt, line 1: is not UTF-8"),
    ("a.txt", b"", "has 0 lines"),
    ("a.txt", b"one\ntwo\n", "has 2 lines"),
    ("a.csv", b"a,b\n", "no folder with .txt"),
    ("a.gz", b"no gzip", "a.gz cannot be read"),
    ("a.gz", PACKED[:-20], "a.gz cannot be read"),
    ("a.gz", PACKED[:-4] + b"1234", "a.gz cannot be read")])
def test_a_wrong_corpus_is_named_in_one_sentence(tmp_path, capsys, monkeypatch, name, content, message):
    monkeypatch.setattr(ELMO, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(corpus, "LETTERS", 50)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / name).write_bytes(content)
    argv = ["--corpus", str(tmp_path / "text"), "--out", str(tmp_path / "out"), "--validation", "1"]
    assert ELMO.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_script_trains_on_plain_text_and_separates_validation_and_test_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ELMO, "CACHE", tmp_path / "cache")
    texts = [row[2] for row in sample.generate(500)]
    (tmp_path / "a.txt").write_text("\n".join(texts[:300]), encoding="utf-8")
    with gzip.open(tmp_path / "b.gz", "wt") as file:
        file.write("\n".join(texts[300:]))
    options = "--hidden 12 --validation 40 --min-count 1 --batch-tokens 300 --epochs 1".split()
    out = tmp_path / "out"
    assert ELMO.main(["--corpus", str(tmp_path), "--out", str(out), *options]) == 0
    result = json.loads((out / "pretraining.json").read_text())
    rows = {name: part["rows"] for name, part in result["splits"].items()}
    assert rows == {"train": 420, "validation": 40, "test": 40}
    config = ELMO.Config(validation=40, min_count=1)
    data = text.Data.of_plain_text(str(tmp_path), config, tmp_path / "cache")
    _, test_rows = data.test
    assert sorted([*data.train, *data.validation, *test_rows]) == list(range(500))
    elmo = ELMO.ELMo.load(out / "bilstm.pt")
    found = elmo.score([texts[row] for row in test_rows])
    expected = result["splits"]["test"]["forward"]["perplexity"]
    assert found["forward"]["perplexity"] == pytest.approx(expected, rel=1e-4)


def test_all_rows_of_a_long_line_are_for_training_or_all_for_validation_or_all_for_the_test(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "LONGEST", 3)                     # tokens of a row
    lines = [f"line{i} " * (1 + i % 8) for i in range(60)]      # each has a word of its own, up to 8 times
    (tmp_path / "a.txt").write_text("\n".join(lines))
    config = ELMO.Config(validation=10, min_count=1)
    data = text.Data.of_plain_text(str(tmp_path / "a.txt"), config, tmp_path / "cache")
    _, test_rows = data.test
    words = []
    for rows in (data.train, data.validation, test_rows):
        words.append(np.flatnonzero(data.encoded.tokens.counts(rows)))
    assert [len(part) for part in words] == [40, 10, 10]
    assert len(np.unique(np.concatenate(words))) == 60
    # lines of 1 to 8 words become 1, 1, 1, 2, 2, 2, 3 and 3 rows; 60 lines are 7 times all of these and 4 lines more
    assert len(data.train) + len(data.validation) + len(test_rows) == 7 * 15 + 5
    assert data.encoded.lengths.max() == 3


def test_only_a_few_chunks_are_read_ahead_however_long_the_corpus_is():
    drawn = 0

    def jobs():
        """200 chunks of 10 texts, counted by `drawn`."""
        nonlocal drawn
        for _ in range(200):
            drawn += 1
            yield ["a b c"] * 10

    found = corpus.count_chunks(jobs(), str.split, 2)
    done = 0
    for types, *_ in found:
        done += 1
        assert types == ["a", "b", "c"]
        assert drawn <= done + 10
    assert done == 200


def test_a_corpus_is_refused_if_its_cache_cannot_be_written(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "cache").write_text("a file")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cache").write_text("a file")
    monkeypatch.setattr(ELMO, "CACHE", tmp_path / "cache")
    argv = ["--corpus", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--validation", "1"]
    assert ELMO.main(argv) == 2
    assert "cannot be written" in capsys.readouterr().err
