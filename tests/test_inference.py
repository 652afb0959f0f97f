"""Trained models on the command line: a stream of predictions, and files of vectors."""
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, arguments, classifier, files, refused
from nltk import Tree
from pytest import approx

import classification
import ELMO
from run import files as run_files
from run.inference import BLOCK, blocks

LINES = ["the bank sued the court .", "", "unseen words", "the bank ."]


def predict(whole: Path, *argv: str) -> list[str]:
    """The command line of predictions by the head `frozen`."""
    return arguments("classification.py", whole, whole / "bilstm.pt", "--setting", "frozen", "--predict", *argv)


def give(monkeypatch, content: bytes) -> None:
    """Makes `content` the standard input of this process."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


class Process:
    """classification.py --predict - in a process of its own, with pipes."""

    def __init__(self, whole: Path, *more: str):
        argv = [sys.executable, ROOT / "classification.py", *predict(whole, "-", *more)]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(argv, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE)

    def write(self, content: str) -> None:
        self.process.stdin.write(content.encode())
        self.process.stdin.flush()

    def end(self) -> tuple[int, str, str]:
        """(exit status, the rest of standard output, standard error) after standard input was closed."""
        out, error = self.process.communicate(timeout=60)
        return self.process.returncode, out.decode(), error.decode()


# ------------------------------------------------------------------------------------------------- predictions
def test_predict_prints_label_and_probabilities_of_a_text_or_of_lines(capsys, monkeypatch, whole):
    lines = ["the bank .", "the cöurt ."]
    expected = classifier(whole, "frozen").predict(lines)
    assert classification.main(predict(whole, lines[0])) == 0
    label, *shares = capsys.readouterr().out.rstrip("\n").split("\t")
    assert label == expected[0]["label"]
    assert shares == [f"{name} {p:.4f}" for name, p in expected[0]["probabilities"].items()]
    give(monkeypatch, ("\ufeff" + "\r\n".join(lines)).encode())
    assert classification.main(predict(whole, "-", "--json")) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["text"] for answer in found] == lines
    for answer, prediction in zip(found, expected, strict=True):
        assert answer["label"] == prediction["label"]
        assert answer["probabilities"] == approx(prediction["probabilities"], abs=1e-5)


def test_every_line_is_answered_by_one_and_an_empty_one_by_an_empty_one(capsys, monkeypatch, whole):
    give(monkeypatch, b"the bank .\n\n \t\nthe court .\n")
    assert classification.main(predict(whole, "-")) == 0
    first, *empty, last, end = capsys.readouterr().out.split("\n")
    assert empty == ["", ""]
    assert first and last and not end
    give(monkeypatch, b"\nthe bank .\n")
    assert classification.main(predict(whole, "-", "--json")) == 0
    answer, *_ = capsys.readouterr().out.splitlines()
    assert json.loads(answer) == {"text": "", "label": None, "probabilities": {}}


def test_tokens_of_a_line_are_split_at_spaces_only(capsys, monkeypatch, whole):
    expected, = classifier(whole, "frozen").predict([["the", "bank.court", "sued"]])
    give(monkeypatch, b"the  bank.court sued\n")
    assert classification.main(predict(whole, "-", "--json", "--tokenized")) == 0
    assert json.loads(capsys.readouterr().out)["probabilities"] == approx(expected["probabilities"], abs=1e-5)


def test_the_lines_before_a_wrong_one_are_answered(capsys, monkeypatch, whole):
    give(monkeypatch, b"the bank .\nthe court .\na\xff\nthe bank .\n")
    assert classification.main(predict(whole, "-")) == 2
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 2
    assert "standard input, line 3: byte 1 of the line is not UTF-8" in printed.err
    assert "there is nothing to classify" in refused("classification.py", predict(whole, " "), whole)


def test_a_block_ends_at_64_lines_unless_more_are_waiting_and_after_a_silence():
    def slow():
        """A line, a silence, then more lines than a block, one after the other."""
        yield "first"
        time.sleep(0.5)
        for i in range(BLOCK + 1):
            yield str(i)
            time.sleep(0.002)
        raise ValueError("end")
    found = []
    with pytest.raises(ValueError, match="end"):
        for block in blocks(slow()):
            found.append(block)
    assert [len(block) for block in found] == [1, BLOCK, 1]
    assert [*found[0], *found[1], *found[2]] == ["first", *[str(i) for i in range(BLOCK + 1)]]


def test_lines_are_answered_while_the_pipe_stays_open_and_ctrl_c_keeps_the_answers(whole):
    stream = Process(whole)
    stream.write("the bank .\n\n")
    label = stream.process.stdout.readline()            # would wait for ever if the answer came at the end only
    assert label.strip()
    assert stream.process.stdout.readline() == b"\n"
    stream.write("the court .\n")
    assert stream.process.stdout.readline().strip()
    stream.process.send_signal(signal.SIGINT)
    status, rest, error = stream.end()
    assert (status, rest, error) == (130, "", "")


def test_a_closed_output_pipe_ends_quietly(whole):
    stream = Process(whole)
    stream.write("the bank .\n")
    assert stream.process.stdout.readline()
    stream.process.stdout.close()
    stream.write("the bank .\n" * 2000)
    stream.process.stdin.close()
    assert stream.process.wait(60) == 0
    assert stream.process.stderr.read() == b""


def test_a_character_that_the_console_cannot_show_is_no_error(whole):
    argv = [sys.executable, ROOT / "classification.py", *predict(whole, "the bank .", "--classifier", "東京.pt")]
    done = subprocess.run(argv, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("classification.py: \\u6771\\u4eac.pt is missing")


# ----------------------------------------------------------------------------------------------------- vectors
def embed(whole: Path, folder: Path, name: str, *more: str) -> int:
    """Writes the vectors of LINES to a file of this name."""
    (folder / "texts").write_text("\n".join(LINES) + "\n")
    argv = ["--out", str(whole), "--embed", str(folder / "texts"), "--out-file", str(folder / name), *more]
    return ELMO.main([*argv, "--precision", "fp32"])


@pytest.mark.parametrize("layers", ["all", "average", "top", "0", "1", "2"])
def test_a_npy_file_is_a_memory_map_of_the_chosen_layers_with_offsets_beside_it(whole, bilm, tmp_path, layers):
    assert embed(whole, tmp_path, "v.npy", "--layers", layers) == 0
    offsets = np.load(tmp_path / "v.offsets.npy")
    vectors = np.load(tmp_path / "v.npy", mmap_mode="r")
    assert offsets.tolist() == [0, 6, 6, 8, 11]
    assert isinstance(vectors, np.memmap)
    assert vectors.dtype == np.float16
    assert vectors.shape == ((3, 11, 24) if layers == "all" else (11, 24))
    chosen = int(layers) if layers.isdigit() else layers
    for begin, end, expected in zip(offsets[:-1], offsets[1:], bilm.embed(LINES, layers=chosen), strict=True):
        assert np.allclose(vectors[..., begin:end, :], expected.numpy(), atol=2e-3)
    assert files(tmp_path) == ["texts", "v.npy", "v.offsets.npy"]


@pytest.mark.parametrize("flag", ["--out-file", "--npz"])
def test_a_npz_file_has_offsets_and_vectors(whole, bilm, tmp_path, flag):
    (tmp_path / "texts").write_text("\n".join(LINES) + "\n")
    argv = ["--out", str(whole), "--embed", str(tmp_path / "texts"), flag, str(tmp_path / "v.npz"), "--float32"]
    assert ELMO.main(argv) == 0
    found = np.load(tmp_path / "v.npz")
    assert found["offsets"].tolist() == [0, 6, 6, 8, 11]
    expected = np.concatenate([vectors.numpy() for vectors in bilm.embed(LINES)], axis=1)
    assert found["vectors"].dtype == np.float32
    assert np.allclose(found["vectors"], expected, atol=1e-5)
    assert files(tmp_path) == ["texts", "v.npz"]


def test_lines_without_any_token_give_an_empty_array(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "LINES", ["", " "])
    for name in ("v.npy", "v.npz"):
        assert embed(whole, tmp_path, name) == 0
    assert np.load(tmp_path / "v.npy").shape == (3, 0, 24)
    assert np.load(tmp_path / "v.npz")["vectors"].shape == (3, 0, 24)
    assert np.load(tmp_path / "v.offsets.npy").tolist() == [0, 0, 0]


@pytest.mark.parametrize("name, more, message", [
    ("v.txt", [], "expected a name that ends with .npy or .npz"),
    ("missing/v.npy", [], "the folder"),
    ("folder.npy", [], "it is a folder"),
    ("v.npy", ["--layers", "top", "--layers", "3"], "invalid choice")])
def test_a_wrong_target_is_named(whole, tmp_path, name, more, message):
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "texts").write_text("the bank .\n")
    argv = ["--out", str(whole), "--embed", str(tmp_path / "texts"), "--out-file", str(tmp_path / name), *more]
    assert message in refused("ELMO.py", argv, tmp_path)


@pytest.mark.parametrize("name", ["v.npy", "v.npz"])
def test_a_stopped_run_leaves_the_old_file_and_the_next_run_removes_what_a_killed_one_left(
        whole, tmp_path, monkeypatch, name):
    assert embed(whole, tmp_path, name) == 0
    before = (tmp_path / name).read_bytes()
    (tmp_path / "texts").write_bytes(b"the bank .\n\xff\n")
    argv = ["--out", str(whole), "--embed", str(tmp_path / "texts"), "--out-file", str(tmp_path / name)]
    assert ELMO.main(argv) == 2
    assert (tmp_path / name).read_bytes() == before

    class Killed(BaseException):
        """Takes the place of a kill: nothing is cleaned up."""

    def killed(*args):
        raise Killed
    with monkeypatch.context() as patch:
        patch.setattr(run_files.os, "fsync", killed)
        patch.setattr(Path, "unlink", lambda *args, **kwargs: None)
        with pytest.raises(Killed):
            embed(whole, tmp_path, name)
    assert any(".part" in left for left in files(tmp_path))
    assert embed(whole, tmp_path, name) == 0
    assert not [left for left in files(tmp_path) if left.startswith(".")]


def test_new_offsets_never_stand_beside_old_vectors(whole, tmp_path, monkeypatch):
    assert embed(whole, tmp_path, "v.npy") == 0
    replace = Path.replace

    def killed_before_the_vectors(part: Path, target: Path) -> None:
        """Renames, but the vectors."""
        if Path(target).name == "v.npy":
            raise KeyboardInterrupt
        replace(part, target)
    monkeypatch.setattr(Path, "replace", killed_before_the_vectors)
    assert embed(whole, tmp_path, "v.npy") == 130
    assert not (tmp_path / "v.npy").exists()


def test_the_tokens_of_sst_get_one_vector_each(bilm, whole, tmp_path):
    source = Path(os.environ.get("SST_DIR", "")) / "test.txt"
    if not os.environ.get("SST_DIR") or not source.is_file():
        pytest.skip("SST_DIR does not name a folder with the Stanford Sentiment Treebank")
    texts = [Tree.fromstring(line).leaves() for line in source.read_text(encoding="utf-8").splitlines()]
    assert len(texts) == 2210
    for tokens, vectors in zip(texts, bilm.embed(texts, layers="top"), strict=True):
        assert len(vectors) == len(tokens)
    (tmp_path / "texts").write_text("\n".join(" ".join(tokens) for tokens in texts), encoding="utf-8")
    argv = ["--out", str(whole), "--embed", str(tmp_path / "texts"), "--out-file", str(tmp_path / "v.npy")]
    assert ELMO.main([*argv, "--tokenized", "--layers", "0"]) == 0
    assert np.diff(np.load(tmp_path / "v.offsets.npy")).tolist() == [len(tokens) for tokens in texts]
