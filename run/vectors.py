"""Vectors of many texts in one .npz file, written while they are computed, so that memory stays flat."""
import zipfile
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import numpy as np

from run.files import InputError, write_atomically


def check_target(target: str) -> None:
    """Raises InputError if no file can be written at `target`, before anything is computed."""
    folder = Path(target).absolute().parent
    if not folder.is_dir():
        raise InputError(f"{target} cannot be written: the folder {folder} is missing")
    if Path(target).is_dir():
        raise InputError(f"{target} cannot be written: it is a folder")


def write_npz(target: str, offsets: np.ndarray, width: int, texts: Iterable[np.ndarray], dtype: np.dtype) -> None:
    """Writes `target` with offsets (N + 1,) and vectors (3, tokens, width); text i has tokens offsets[i]:offsets[i + 1].

    texts: one (3, tokens, width) array per text, in order. They are first written beside the target, layer by layer,
    and packed at the end.
    """
    shape = (3, int(offsets[-1]), width)
    with TemporaryDirectory(dir=Path(target).absolute().parent, prefix=".embed") as folder:
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
