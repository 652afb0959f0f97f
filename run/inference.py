"""What both scripts do with a trained model on the command line: predictions and vectors of the lines of a file."""
import json
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import numpy as np
from torch import Tensor
from tqdm import tqdm

from run.files import InputError, read_lines, write_atomically

EMBED_FLAGS = {
    "--embed": {"metavar": "FILE", "help": "write the vectors of this file's lines instead of training"},
    "--out-file": {"metavar": "NAME", "help": "--embed: the file to write, NAME.npy (a memory map) or NAME.npz"},
    "--npz": {"metavar": "NAME", "dest": "out_file", "help": "the same as --out-file"},
    "--layers": {"choices": ("all", "average", "top", "0", "1", "2"), "default": "all",
                 "help": "--embed: all three layers, their average, the top one, or one of them (default all)"},
    "--float32": {"action": "store_true", "help": "--embed: compute in fp32 and write float32, not float16"}}


def check_layers(layers: str | int, top: int) -> None:
    """Raises InputError if `layers` does not name layers; top: number of the top layer."""
    choices = ("all", "average", "top", *range(top + 1))
    if layers not in choices or isinstance(layers, bool):
        raise InputError(f"layers is {layers!r}; expected one of {', '.join(map(str, choices))}")


def choose_layers(h: Tensor, layers: str | int) -> Tensor:
    """Of h (3, ..): "all" of it, or of shape (..) the "average" of the layers, the "top" one, or layer 0, 1 or 2."""
    if layers == "all":
        return h
    if layers == "average":
        return h.mean(dim=0)
    return h[-1 if layers == "top" else layers]


def print_predictions(load: Callable, text: str, precision: str, as_json: bool) -> None:
    """Prints label and probabilities of a text, or for "-" of each line of standard input.

    `load()` returns the Classifier. If it reads two texts, a line has both, with a tab between them.
    """
    lines = read_lines("-") if text == "-" else [text]
    classifier = load()
    texts = lines
    if classifier.config.two_texts:
        texts = [tuple(line.split("\t")) for line in lines]
    for line, prediction in zip(lines, classifier.predict(texts, precision), strict=True):
        if as_json:
            print(json.dumps({"text": line} | prediction))
        else:
            probabilities = [f"{label} {p:.4f}" for label, p in prediction["probabilities"].items()]
            print(prediction["label"], *probabilities, sep="\t")


def embed_file(load: Callable, precision: str, options: Namespace) -> None:
    """Writes the vectors of every line of the file --embed to the file --out-file.

    `load()` returns the ELMo, after the file names are checked. precision: "fp32", "bf16" or "auto". options: those of
    EMBED_FLAGS, and tokenized.
    """
    source = options.embed
    target = options.out_file
    full = options.float32
    if source is None or target is None:
        raise InputError("--embed and --out-file go together: --embed texts.txt --out-file vectors.npy")
    check_target(target)
    lines = read_lines(source)
    elmo = load()
    offsets = elmo.encode(lines).tokens.offsets
    precision = "fp32" if full or precision == "fp32" else "bf16"
    stream = tqdm(elmo.embed_stream(lines, precision), total=len(lines), unit="text")
    layers = (vectors.numpy() for vectors in stream)
    dtype = np.dtype(np.float32 if full else np.float16)
    write_npz(target, offsets, 2 * elmo.config.width, layers, dtype)
    print(f"{target}: {len(lines):,} texts, {offsets[-1]:,} tokens")


def check_target(target: str) -> None:
    """Raises InputError if no file can be written at `target`, before anything is computed."""
    folder = Path(target).absolute().parent
    if not folder.is_dir():
        raise InputError(f"{target} cannot be written: the folder {folder} is missing")
    if Path(target).is_dir():
        raise InputError(f"{target} cannot be written: it is a folder")


def write_npz(target: str, offsets: np.ndarray, width: int, texts: Iterable[np.ndarray], dtype: np.dtype) -> None:
    """Writes offsets (N + 1,) and vectors (3, tokens, width); text i has tokens offsets[i]:offsets[i + 1].

    texts: one (3, tokens, width) array per text, in order. They are written to a temporary folder beside the target
    first, because memory does not hold all of them, and put into the .npz file at the end.
    """
    shape = (3, int(offsets[-1]), width)
    with TemporaryDirectory(dir=Path(target).absolute().parent, prefix=".embed") as folder:
        np.save(f"{folder}/vectors.npy", np.zeros((3, 0, width), dtype))        # if there is no token at all
        if shape[1] > 0:
            vectors = np.lib.format.open_memmap(f"{folder}/vectors.npy", mode="w+", dtype=dtype, shape=shape)
            for begin, text in zip(offsets[:-1], texts, strict=True):
                vectors[:, begin:begin + text.shape[1]] = text
            vectors.flush()
        np.save(f"{folder}/offsets.npy", offsets)

        def pack(file: BinaryIO) -> None:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for name in ("offsets.npy", "vectors.npy"):
                    archive.write(f"{folder}/{name}", name)
        write_atomically(target, pack)
