"""What both scripts do with a trained model on the command line: predictions and vectors of the lines of a text."""
import errno
import json
import os
import sys
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import BinaryIO

import numpy as np
from torch import Tensor
from tqdm import tqdm

from run import machine
from run.files import InputError, folder_lock, split_at_spaces, stream_lines, write_atomically, write_together

BLOCK = 64              # lines of standard input that are classified together, and all others that have come already
WAIT = 0.2              # seconds without a new line after which those that have come are classified
LETTERS = 400_000       # most characters that are classified together; a large block takes less time per line
READ_AHEAD = 4096       # lines that are read while others are classified
EMBED_FLAGS = {
    "--embed": {"metavar": "FILE", "help": "write the vectors of this file's lines instead of training"},
    "--out-file": {"metavar": "NAME", "help": "--embed: the file to write. NAME.npy can be a memory map, and "
                                              "NAME.offsets.npy is written beside it; NAME.npz has both"},
    "--npz": {"metavar": "NAME", "dest": "out_file", "help": "the same as --out-file"},
    "--layers": {"choices": ("all", "average", "top", "0", "1", "2"), "default": "all",
                 "help": "--embed: all three layers, their average, the top one, or one of them (default all)"},
    "--float32": {"action": "store_true", "help": "--embed: compute in fp32 and write float32, not float16"}}


# ----------------------------------------------------------------------------------------------------- layers
def check_layers(layers: str | int, top: int) -> None:
    """Raises InputError if `layers` does not name layers; top: number of the top layer."""
    choices = ("all", "average", "top", *range(top + 1))
    if type(layers) not in (str, int) or layers not in choices:
        raise InputError(f"layers is {layers!r}; expected one of {', '.join(map(str, choices))}")


def choose_layers(h: Tensor, layers: str | int) -> Tensor:
    """Of h (3, ..): "all" of it, or of shape (..) the "average" of the layers, the "top" one, or layer 0, 1 or 2."""
    if layers == "all":
        return h
    if layers == "average":
        return h.mean(dim=0)
    return h[-1 if layers == "top" else layers]


# ------------------------------------------------------------------------------------------------ predictions
def print_predictions(load: Callable, precision: str, options: Namespace) -> None:
    """Prints label and probabilities of the text --predict, or if it is "-", of each line of standard input.

    `load()` returns the Classifier. If it reads two texts, a line has both, with a tab between. options: predict, and
    tokenized and json, which are flags. Each line is answered by one line, an empty one by an empty one.
    """
    machine.keep_memory_flat()
    classifier = load()
    predict = partial(predict_lines, classifier, precision, options.tokenized)
    if options.predict != "-":
        check_line(options.predict, "--predict", classifier.config)
        prediction, = predict([options.predict])
        if prediction["label"] is None:
            raise InputError(f"--predict {options.predict!r} has no words; there is nothing to classify")
        print(answer(options.predict, prediction, options.json))
        return
    for block in blocks(checked_lines(stream_lines("-"), classifier.config)):
        answers = [answer(line, found, options.json) for line, found in zip(block, predict(block), strict=True)]
        if not print_lines(answers):
            return


def check_line(line: str, name: str, config) -> None:
    """Raises InputError that begins with `name` if a classifier of two texts cannot read the line; an empty one it can.

    config: two_texts, pair.
    """
    tabs = line.count("\t")
    if config.two_texts and line.strip() and (tabs == 0 or (config.pair and tabs > 1)):
        raise InputError(f"{name}: {line[:40]!r} is not two texts with a tab between them")


def checked_lines(lines: Iterable[str], config) -> Iterator[str]:
    """The lines of standard input. Raises InputError at one that `check_line` refuses."""
    for number, line in enumerate(lines, start=1):
        check_line(line, f"standard input, line {number}", config)
        yield line


def predict_lines(classifier, precision: str, tokenized: bool, lines: list[str]) -> list[dict]:
    """Classifier.predict of each line; an empty line gets the label None.

    tokenized: the lines have spaces between their tokens, and are split there only.
    """
    predictions = [{"label": None, "probabilities": {}} for _ in lines]
    rows = [row for row, line in enumerate(lines) if line.strip()]
    texts = [given_text(lines[row], classifier.config.two_texts, tokenized) for row in rows]
    for row, prediction in zip(rows, classifier.predict(texts, precision), strict=True):
        predictions[row] = prediction
    return predictions


def given_text(line: str, two_texts: bool, tokenized: bool) -> str | list[str] | tuple:
    """A line as Classifier.predict takes it: "a b" or ["a", "b"], or if the line has two texts a tuple of them."""
    texts = line.split("\t") if two_texts else [line]
    if tokenized:
        texts = [split_at_spaces(text) for text in texts]
    return tuple(texts) if two_texts else texts[0]


def answer(line: str, prediction: dict, as_json: bool) -> str:
    """What is printed for a line: nothing if it has no words, unless as JSON."""
    if as_json:
        return json.dumps({"text": line} | prediction)
    if prediction["label"] is None:
        return ""
    probabilities = [f"{label} {p:.4f}" for label, p in prediction["probabilities"].items()]
    return "\t".join([str(prediction["label"]), *probabilities])


def print_lines(lines: list[str]) -> bool:
    """Prints the lines at once. False if nobody reads them any more, as in `.. | head -1`."""
    try:
        print("\n".join(lines), flush=True)
        return True
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # for what Python prints when it ends
        if error.errno not in (errno.EPIPE, errno.EINVAL):                  # EINVAL: a closed pipe on Windows
            raise InputError(f"standard output cannot be written ({error.strerror})") from None
        return False


def blocks(lines: Iterable[str]) -> Iterator[list[str]]:
    """Lists of lines, in order, while more lines are coming. A list ends when no line has come for WAIT seconds.

    It also ends at BLOCK lines, unless more have come already, or at LETTERS characters. An error that `lines` raises
    is raised after the lines before it. Another thread reads the lines, so that this one can watch the time.
    """
    arrived = Queue(maxsize=READ_AHEAD)
    Thread(target=put_lines, args=(lines, arrived), daemon=True).start()
    item = ""
    while isinstance(item, str):
        block = []
        letters = 0
        with suppress(Empty):                       # raised if no line comes in time
            while letters < LETTERS and (len(block) < BLOCK or not arrived.empty()):
                item = arrived.get(timeout=WAIT)
                if not isinstance(item, str):
                    break
                block.append(item)
                letters += len(item) + 1
        if block:
            yield block
    if isinstance(item, Exception):
        raise item


def put_lines(lines: Iterable[str], arrived: Queue) -> None:
    """Puts each line into the queue, and then None, or the error that ended the lines. Runs in a thread of its own."""
    try:
        for line in lines:
            arrived.put(line)
        arrived.put(None)
    except Exception as error:
        arrived.put(error)


# ---------------------------------------------------------------------------------------------------- vectors
class Texts:
    """The texts of a file, one per line. Each iteration reads the file again, so that memory does not hold it.

    tokenized: the lines have spaces between their tokens; a text is the list of them.
    """

    def __init__(self, path: str, tokenized: bool):
        self.path = path
        self.tokenized = tokenized

    def __iter__(self) -> Iterator[str | list[str]]:
        for line in stream_lines(self.path):
            yield split_at_spaces(line) if self.tokenized else line


def embed_file(load: Callable, precision: str, options: Namespace) -> None:
    """Writes the vectors of every line of the file --embed to the file --out-file.

    `load()` returns the ELMo, after the file names are checked. precision: "fp32", "bf16" or "auto". options: those of
    EMBED_FLAGS, and tokenized. The texts are read twice, since the size of the file must be known before its vectors.
    """
    source = options.embed
    if options.start or options.corpus:
        raise InputError("--start and --corpus are for training; --embed uses bilstm.pt in --out")
    if source is None or options.out_file is None:
        raise InputError("--embed and --out-file go together: --embed texts.txt --out-file vectors.npy")
    target = Path(options.out_file)
    check_target(target)
    with folder_lock(target.parent, target.name):
        texts = Texts(source, options.tokenized)
        if not Path(source).is_file():
            texts = list(texts)                     # a pipe, which can be read only once
        machine.keep_memory_flat()
        elmo = load()
        lengths = np.fromiter((len(elmo.tokenize(text)) for text in texts), dtype=np.int64)         # (N,)
        offsets = np.append(0, np.cumsum(lengths))                                                  # (N + 1,)
        layers = int(options.layers) if options.layers.isdigit() else options.layers
        shape = (int(offsets[-1]), 2 * elmo.config.width)                                           # (tokens, D)
        if layers == "all":
            shape = (3, *shape)
        precision = "fp32" if options.float32 or precision == "fp32" else "bf16"
        stream = elmo.embed_stream(texts, precision, layers=layers)
        stream = tqdm(stream, total=len(lengths), unit="text")
        dtype = np.dtype(np.float32 if options.float32 else np.float16)
        write = write_npy if target.suffix == ".npy" else write_npz
        write(target, offsets, partial(write_vectors, texts=stream, offsets=offsets, shape=shape, dtype=dtype))
    print(f"{target}: {len(lengths):,} texts, {offsets[-1]:,} tokens")


def check_target(target: Path) -> None:
    """Raises InputError if no vectors can be written at `target`, before anything is computed."""
    if target.suffix not in (".npy", ".npz"):
        raise InputError(f"--out-file is {target}; expected a name that ends with .npy or .npz")
    folder = target.absolute().parent
    if not folder.is_dir():
        raise InputError(f"{target} cannot be written: the folder {folder} is missing")
    for path in (target, target.with_suffix(".offsets.npy")):
        if path.is_dir():
            raise InputError(f"{path} cannot be written: it is a folder")


def write_vectors(file: BinaryIO, texts: Iterable[Tensor], offsets: np.ndarray, shape: tuple, dtype: np.dtype) -> None:
    """Writes an .npy file of this shape, (3, tokens, D) or (tokens, D), so that memory does not hold all vectors.

    Such a file is a header and then one row of D numbers per token, layer by layer. texts: one (3, n, D) or (n, D)
    tensor per text, in order; the rows of text i are offsets[i] to offsets[i + 1] - 1 in each layer.
    """
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    start = file.tell()
    tokens, D = shape[-2:]
    lengths = []
    for begin, vectors in zip(offsets[:-1], texts, strict=False):       # without lines that were added meanwhile
        layers = vectors.numpy().astype(dtype)
        if layers.ndim == 2:
            layers = layers[None]                                                           # (n, D) -> (1, n, D)
        for j, layer in enumerate(layers):
            file.seek(start + (j * tokens + begin) * D * dtype.itemsize)
            file.write(layer.tobytes())
        lengths.append(vectors.shape[-2])
    if lengths != np.diff(offsets).tolist():
        raise InputError("the texts were changed while they were read; run again")


def write_npy(target: Path, offsets: np.ndarray, write: Callable[[BinaryIO], object]) -> None:
    """Writes NAME.offsets.npy (N + 1,) and NAME.npy, which `write` fills. New offsets never stand by old vectors."""
    write_together({target.with_suffix(".offsets.npy"): lambda file: np.save(file, offsets), target: write})


def write_npz(target: Path, offsets: np.ndarray, write: Callable[[BinaryIO], object]) -> None:
    """Writes one file with offsets (N + 1,) and the vectors, which `write` fills. It needs twice the space on the disk.

    The vectors are written to a file of their own first, because the rows of a zip archive must be written in order.
    """
    vectors = target.with_name(f".{target.name}.vectors")

    def pack(file: BinaryIO) -> None:
        """Fills the archive."""
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("offsets.npy", "w") as entry:
                np.save(entry, offsets)
            archive.write(vectors, "vectors.npy")

    try:
        write_atomically(vectors, write)
        write_atomically(target, pack)
    finally:
        vectors.unlink(missing_ok=True)
