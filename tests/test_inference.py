"""A trained model on the command line: predictions of a stream of lines, vectors of a file, what a script prints."""
import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stderr
from itertools import chain, count
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, arguments, classifier, files, refused
from nltk import Tree

import classification
import ELMO
from run import inference
from run.files import InputError, folder_lock
from run.options import script

LINES = ["the bank .", "the cöurt .", "the court sued the bank ."]


# ------------------------------------------------------------------------------------------------ predictions
def predict(whole: Path, *argv: str) -> list[str]:
    """The command line of predictions by the head `frozen`."""
    return arguments("classification.py", whole, whole / "bilstm.pt", "--setting", "frozen", "--predict", *argv)


@pytest.fixture
def give_stdin(monkeypatch, tmp_path) -> Iterator[Callable[[bytes], None]]:
    """A function that makes some bytes the standard input of this test."""
    with ExitStack() as stack:
        def give(content: bytes) -> None:
            """Standard input is a file, as after `< FILE`."""
            (tmp_path / "stdin").write_bytes(content)
            monkeypatch.setattr(sys, "stdin", stack.enter_context(open(tmp_path / "stdin")))
        yield give


def process(whole: Path, *argv: str, **streams) -> subprocess.Popen:
    """A process that classifies its standard input, as a user starts it."""
    command = [sys.executable, str(ROOT / "classification.py"), *predict(whole, "-", *argv)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **streams)


def test_predict_prints_label_and_probabilities_of_a_text(capsys, whole):
    expected, = classifier(whole, "frozen").predict(LINES[:1])
    assert classification.main(predict(whole, LINES[0])) == 0
    label, *shares = capsys.readouterr().out.rstrip("\n").split("\t")
    assert label == expected["label"]
    assert shares == [f"{name} {p:.4f}" for name, p in expected["probabilities"].items()]


@pytest.mark.parametrize("text", ["", "  ", "\t"])
def test_a_text_without_words_is_refused(whole, text):
    assert "there is nothing to classify" in refused("classification.py", predict(whole, text), whole)


def test_every_line_of_standard_input_has_one_line_of_output(capsys, give_stdin, whole):
    content = "\ufeffthe bank .\r\n\r\nthe cöurt .\n   \nthe court sued the bank ."
    give_stdin(content.encode())
    assert classification.main(predict(whole, "-")) == 0
    plain = capsys.readouterr().out.split("\n")
    expected = classifier(whole, "frozen").predict(LINES)
    labels = [prediction["label"] for prediction in expected]
    assert [line.split("\t")[0] for line in plain] == [labels[0], "", labels[1], "", labels[2], ""]

    give_stdin(content.encode())
    assert classification.main(predict(whole, "-", "--json")) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found[1] == {"text": "", "label": None, "probabilities": {}}
    assert found[3] == {"text": "   ", "label": None, "probabilities": {}}
    for answer, line, prediction in zip(found[::2], LINES, expected, strict=True):
        assert answer["text"] == line
        assert answer["label"] == prediction["label"]
        assert answer["probabilities"] == pytest.approx(prediction["probabilities"], abs=1e-6)


def test_tokenized_lines_are_split_at_spaces_only(capsys, give_stdin, whole):
    give_stdin("the  bank-court\u00a0won 1996-08-22 \n".encode())
    assert classification.main(predict(whole, "-", "--json", "--tokenized")) == 0
    found = json.loads(capsys.readouterr().out)
    expected, = classifier(whole, "frozen").predict([["the", "bank-court\u00a0won", "1996-08-22"]])
    assert found["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-6)


class TwoTexts:
    """Takes the place of a classifier of pairs: its label shows what it was given."""
    config = Namespace(two_texts=True, pair=True)

    def predict(self, texts, precision):
        return [{"label": repr(text), "probabilities": {}} for text in texts]


@pytest.mark.parametrize("tokenized, expected", [
    (False, "('a b', ' c')\n\n('d', '')\n"), (True, "(['a', 'b'], ['c'])\n\n(['d'], [])\n")])
def test_a_line_of_two_texts_has_a_tab_between_them(capsys, give_stdin, tokenized, expected):
    options = Namespace(predict="-", tokenized=tokenized, json=False)
    give_stdin(b"a b\t c\n\nd\t\nno tab\n")
    with pytest.raises(InputError, match="standard input, line 4: 'no tab' is not two texts with a tab between them"):
        inference.print_predictions(TwoTexts, "fp32", options)
    assert capsys.readouterr().out == expected


def test_a_line_that_is_not_utf_8_is_named_after_the_lines_before_it_are_answered(capsys, give_stdin, whole):
    give_stdin(b"the bank .\n\na\xff\nb\n")
    assert "standard input, line 3: byte 1" in refused("classification.py", predict(whole, "-"), whole)
    answer, empty = capsys.readouterr().out.splitlines()
    assert answer.split("\t")[0] == classifier(whole, "frozen").predict(LINES[:1])[0]["label"]
    assert empty == ""


def test_a_line_is_answered_while_the_input_stays_open_and_ctrl_c_keeps_the_answer(whole):
    with process(whole) as running:
        running.stdin.write(b"the bank .\n")
        running.stdin.flush()
        answer = running.stdout.readline()              # comes although the input has not ended
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=60) == 130
        assert running.stderr.read() == b""
    assert answer.count(b"\t") == 4


def test_a_closed_output_ends_the_predictions_quietly(whole):
    with process(whole) as running:
        running.stdin.write(b"the bank .\n")
        running.stdin.flush()
        assert running.stdout.readline()
        running.stdout.close()                          # as `| head -1` does
        running.stdin.write(b"the bank .\n" * 3)
        running.stdin.flush()
        assert running.wait(timeout=60) == 0            # although the input is still open
        assert running.stderr.read() == b""


def test_blocks_hold_all_lines_in_order_and_end_at_a_pause_or_if_they_are_long(monkeypatch):
    def lines():
        """Three lines, a pause, and three more."""
        yield from "abc"
        time.sleep(0.6)
        yield from ["d" * 60, "e" * 60, "f"]

    monkeypatch.setattr(inference, "LETTERS", 100)
    assert list(inference.blocks(lines())) == [["a", "b", "c"], ["d" * 60, "e" * 60], ["f"]]


def test_an_error_of_the_lines_is_raised_after_the_lines_before_it():
    def lines():
        """Two lines; the third one is wrong."""
        yield from "ab"
        raise InputError("line 3")

    found = inference.blocks(lines())
    assert next(found) == ["a", "b"]
    with pytest.raises(InputError, match="line 3"):
        next(found)


def test_an_endless_input_is_not_read_far_ahead(monkeypatch):
    monkeypatch.setattr(inference, "LETTERS", 2000)
    monkeypatch.setattr(inference, "READ_AHEAD", 10)
    numbers = count()
    blocks = inference.blocks(str(number % 10) for number in numbers)
    taken = 0
    for _ in range(3):
        block = next(blocks)
        assert inference.BLOCK <= len(block) <= 1000    # each line is one character and a line end
        taken += len(block)
    time.sleep(0.2)
    assert next(numbers) <= taken + 10 + 1


def test_a_block_ends_at_64_lines_although_others_follow():
    def lines():
        """Lines with short pauses between them."""
        for number in range(70):
            yield str(number)
            time.sleep(0.002)

    assert [len(block) for block in inference.blocks(lines())] == [64, 6]


# ---------------------------------------------------------------------------------------------------- vectors
TEXT = "the bank sued the court .\n\nunseen words\nthe bank ."
OFFSETS = [0, 6, 6, 8, 11]


def embed(whole: Path, source: Path, target: Path, *more: str) -> list[str]:
    """The command line that writes the vectors of a file."""
    return ["--out", str(whole), "--embed", str(source), "--out-file", str(target), "--precision", "fp32", *more]


@pytest.fixture
def text(tmp_path) -> Path:
    """A file of four lines, in a folder of its own."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(TEXT)
    return tmp_path / "text" / "a.txt"


def test_an_npz_file_has_the_vectors_of_every_line(whole, bilm, text, tmp_path):
    (tmp_path / "v.npz").write_text("an older file")
    assert ELMO.main(embed(whole, text, tmp_path / "v.npz")) == 0
    with np.load(tmp_path / "v.npz") as found:
        assert found["offsets"].tolist() == OFFSETS
        assert found["vectors"].dtype == np.float16
        expected = torch.cat(bilm.embed(TEXT.split("\n")), dim=1)
        assert np.allclose(found["vectors"], expected.numpy(), atol=2e-3)
    assert files(tmp_path) == ["text/a.txt", "v.npz"]


@pytest.mark.parametrize("layers", ["all", "average", "top", "0", "1", "2"])
def test_an_npy_file_is_a_memory_map_with_the_offsets_beside_it(whole, bilm, text, tmp_path, layers):
    assert ELMO.main(embed(whole, text, tmp_path / "a.v.npy", "--layers", layers, "--float32")) == 0
    assert np.load(tmp_path / "a.v.offsets.npy").tolist() == OFFSETS
    found = np.load(tmp_path / "a.v.npy", mmap_mode="r")
    assert isinstance(found, np.memmap)
    assert found.dtype == np.float32
    h = torch.cat(bilm.embed(TEXT.split("\n")), dim=1)                      # (3, 11, D)
    expected = {"all": h, "average": (h[0] + h[1] + h[2]) / 3, "top": h[2], "0": h[0], "1": h[1], "2": h[2]}
    assert np.allclose(found, expected[layers].numpy(), atol=1e-5)
    assert found.shape == expected[layers].shape
    assert files(tmp_path) == ["a.v.npy", "a.v.offsets.npy", "text/a.txt"]


@pytest.mark.parametrize("content, offsets", [("", [0]), ("\n\n", [0, 0, 0])])
def test_a_file_without_words_gives_an_empty_array(whole, text, tmp_path, content, offsets):
    text.write_text(content)
    for layers, shape in {"all": (3, 0, 24), "average": (0, 24)}.items():
        for name in ("v.npy", "v.npz"):
            assert ELMO.main(embed(whole, text, tmp_path / name, "--layers", layers)) == 0
        assert np.load(tmp_path / "v.npy").shape == shape
        assert np.load(tmp_path / "v.offsets.npy").tolist() == offsets
        with np.load(tmp_path / "v.npz") as found:
            assert found["vectors"].shape == shape
            assert found["offsets"].tolist() == offsets


def test_embed_reads_standard_input_too(give_stdin, whole, text, tmp_path):
    give_stdin(TEXT.encode())
    for source, name in ((text, "file"), ("-", "stdin")):
        assert ELMO.main(embed(whole, source, tmp_path / f"{name}.npy")) == 0
    assert (tmp_path / "file.npy").read_bytes() == (tmp_path / "stdin.npy").read_bytes()


WRONG = {
    "--embed missing.txt": "go together", "--npz a.npz": "go together",
    "--embed missing.txt --out-file v.npy": "missing.txt cannot be read (No such file",
    "--embed text --out-file v.npy": "text cannot be read (Is a directory)",
    "--embed text/a.txt --out-file v.txt": "ends with .npy or .npz",
    "--embed text/a.txt --out-file missing/v.npy": "missing is missing",
    "--embed text/a.txt --out-file folder.npy": "it is a folder",
    "--embed text/a.txt --out-file v.npy --layers 3": "invalid choice",
    "--embed text/a.txt --out-file v.npy --out missing": "bilstm.pt is missing",
    "--embed text/wrong.txt --out-file v.npy": "wrong.txt, line 2: byte 1 of the line is not UTF-8",
    "--embed text/wrong.txt --out-file v.npz": "wrong.txt, line 2: byte 1 of the line is not UTF-8"}


@pytest.mark.parametrize("command, message", WRONG.items())
def test_a_wrong_input_leaves_the_old_vectors_and_nothing_else(whole, text, tmp_path, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    for name in ("v.npy", "v.offsets.npy", "v.npz"):
        Path(name).write_text("old")
    Path("folder.npy").mkdir()
    Path("text/wrong.txt").write_bytes(b"good\na\xff\n")
    assert message in refused("ELMO.py", ["--out", str(whole), *command.split()], tmp_path)


KILL = """import os, sys
from pathlib import Path
import ELMO
replace = Path.replace
def replace_or_die(part, target):
    if Path(target).name == sys.argv[1]:
        os._exit(9)                         # as after kill -9: nothing is cleaned up
    return replace(part, target)
Path.replace = replace_or_die
sys.exit(ELMO.main(sys.argv[2:]))"""


@pytest.mark.parametrize("target, killed_at", [
    ("v.npy", "v.offsets.npy"), ("v.npy", "v.npy"), ("v.npz", ".v.npz.vectors"), ("v.npz", "v.npz")])
def test_a_killed_run_leaves_no_wrong_pair_and_the_next_run_removes_its_files(whole, text, tmp_path, target, killed_at):
    assert ELMO.main(embed(whole, text, tmp_path / target)) == 0
    complete = files(tmp_path)
    old = (tmp_path / target).read_bytes()
    text.write_text("the court .\n")
    argv = embed(whole, text, tmp_path / target)
    killed = subprocess.run([sys.executable, "-c", KILL, killed_at, *argv], cwd=ROOT, timeout=120)
    assert killed.returncode == 9
    assert files(tmp_path) != complete, "it leaves files"
    if target == "v.npz":
        assert (tmp_path / target).read_bytes() == old
    else:
        assert not (tmp_path / target).exists()         # rather than old vectors beside new offsets
    assert ELMO.main(argv) == 0
    assert files(tmp_path) == complete
    if target == "v.npy":
        assert np.load(tmp_path / "v.offsets.npy").tolist() == [0, 3]
        assert np.load(tmp_path / target).shape == (3, 3, 24)


def test_two_runs_write_to_one_folder_but_not_to_one_file(whole, text, tmp_path):
    with folder_lock(tmp_path, "v.npy"):                # as a run that writes v.npy
        assert ELMO.main(embed(whole, text, tmp_path / "other.npy")) == 0
        assert "another run is writing" in refused("ELMO.py", embed(whole, text, tmp_path / "v.npy"), tmp_path)
        assert ".v.npy.lock" in os.listdir(tmp_path)
    assert files(tmp_path) == ["other.npy", "other.offsets.npy", "text/a.txt"]


@pytest.mark.parametrize("lengths", [[2], [2, 3], [3, 1]])
def test_texts_that_change_while_they_are_read_are_refused(lengths):
    texts = [torch.zeros(n, 4) for n in lengths]
    with pytest.raises(InputError, match="changed while they were read"):
        inference.write_vectors(io.BytesIO(), texts, np.array([0, 2, 4]), (4, 4), np.dtype(np.float16))


def test_given_tokens_of_the_sentiment_treebank_have_one_vector_each(whole, bilm, tmp_path):
    path = Path(os.environ.get("SST_DIR", "")) / "test.txt"
    if not path.is_file():
        pytest.skip("SST_DIR does not name a folder with test.txt")
    trees = [Tree.fromstring(line).leaves() for line in path.read_text(encoding="utf-8").split("\n") if line]
    assert len(trees) == 2210
    expected = [len(tokens) for tokens in trees]
    assert [len(vectors) for vectors in bilm.embed(trees, layers="top")] == expected
    (tmp_path / "sst.txt").write_text("".join(" ".join(tokens) + "\n" for tokens in trees), encoding="utf-8")
    argv = embed(whole, tmp_path / "sst.txt", tmp_path / "v.npy", "--tokenized", "--layers", "top")
    assert ELMO.main(argv) == 0
    assert np.diff(np.load(tmp_path / "v.offsets.npy")).tolist() == expected
    assert len(np.load(tmp_path / "v.npy")) == len(list(chain.from_iterable(trees)))


# ----------------------------------------------------------------------------------------- what a script prints
def test_a_warning_is_one_line_that_names_the_script(tmp_path):
    @script("a.py")
    def main(argv) -> int:
        """Warns twice."""
        warnings.warn("some words\nare unknown", stacklevel=1)
        warnings.warn("and others", FutureWarning, stacklevel=1)
        return 0

    printed = io.StringIO()
    before = warnings.showwarning
    with warnings.catch_warnings(), redirect_stderr(printed):
        warnings.simplefilter("always")
        assert main([]) == 0
    assert printed.getvalue() == "a.py: warning: some words are unknown\na.py: warning: and others\n"
    assert warnings.showwarning is before


def run_main(body: str, **environment: str) -> subprocess.CompletedProcess:
    """A process that runs a script with this body, with these environment variables."""
    code = f"from run.options import script\nfrom run.files import InputError\n@script('a.py')\n" \
           f"def main(argv):\n    {body}\nraise SystemExit(main([]))"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True,
                          timeout=60)


def test_a_character_that_the_console_lacks_is_printed_by_its_number():
    found = run_main(r"print('caf\u00e9 \u77f3'); raise InputError('\u6cb9 is missing')", PYTHONIOENCODING="ascii")
    assert found.stdout.split() == [rb"caf\xe9", rb"\u77f3"]
    assert found.stderr.strip() == rb"a.py: \u6cb9 is missing"
    assert found.returncode == 2


def test_only_the_first_process_of_torchrun_prints_a_refusal():
    for rank, message in {"0": b"a.py: wrong", "1": b""}.items():
        found = run_main("raise InputError('wrong')", RANK=rank)
        assert found.returncode == 2
        assert found.stderr.strip() == message
