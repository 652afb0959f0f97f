"""Any text as token ids on disk: read line by line, tokenized on all cores, opened again as a memory map.

    tokens = tokenize_corpus(texts, tokenize, "version 1", cache)           # Tokens: types, ids, offsets
    tokens = tokenize_corpus(Lines("news/"), tokenize, "version 1", cache)  # every .txt and .gz of a folder

With a cache, memory holds only the distinct tokens, one number per row and a few chunks of text, even of a long corpus.
"""
import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from run.files import InputError
from run.machine import end_with_parent

CHUNK = 2_000       # texts that a worker tokenizes at a time
LETTERS = 2**20     # about the largest number of characters in a chunk; a line with more bytes is cut between words
LONGEST = 400       # most tokens of a row of plain text; a longer line becomes several rows


# ------------------------------------------------------------------------------------------------- plain text
class Lines:
    """The lines of a file, or of every .txt and .gz file below a folder in the order of their names; no blank lines.

    Files are UTF-8 with one sentence or document per line; .gz files are unpacked while they are read. Can be iterated
    any number of times. Raises InputError if there is no such file, or if one cannot be read, unpacked or decoded.
    """

    def __init__(self, path: str | Path):
        if Path(path).is_file():
            self.files = [Path(path)]
        elif path:          # Path("") would be the current folder
            self.files = sorted(p for p in Path(path).rglob("*") if p.suffix in (".txt", ".gz") and p.is_file())
        else:
            self.files = []
        if not self.files:
            raise InputError(f"{str(path)!r} is no file, and no folder with .txt or .gz files; name one")

    def __iter__(self) -> Iterator[str]:
        for path in self.files:
            number = 0
            open_file = gzip.open if path.suffix == ".gz" else open
            try:
                with open_file(path, "rb") as file:
                    for line in lines_of(file):
                        number += 1
                        encoding = "utf-8-sig" if number == 1 else "utf-8"      # a byte order mark
                        text = line.decode(encoding).strip()
                        if text:
                            yield text
            except UnicodeDecodeError:
                raise InputError(f"{path}, line {number}: is not UTF-8; save the file as UTF-8") from None
            except (OSError, EOFError, gzip.zlib.error) as error:
                reason = getattr(error, "strerror", None) or str(error)
                raise InputError(f"{path} cannot be read ({reason})") from None


def lines_of(file) -> Iterator[bytes]:
    """The lines of a binary file; a line longer than LETTERS comes in pieces, cut after a space or a character."""
    rest = b""
    while line := rest + file.readline(LETTERS - len(rest)):
        end = len(line)
        if len(line) == LETTERS and not line.endswith(b"\n"):
            end = end_of_piece(line)
        yield line[:end]
        rest = line[end:]


def end_of_piece(line: bytes) -> int:
    """Where to cut the line: after its last space, else before its last UTF-8 character, which may be incomplete."""
    after_space = line.rfind(b" ") + 1
    if after_space > 0:
        return after_space
    for at in range(len(line) - 1, len(line) - 5, -1):
        if line[at] & 0xC0 != 0x80:         # the first byte of a character
            return at
    return len(line)                        # not UTF-8: decode() will raise


# ------------------------------------------------------------------------------------------------- tokenizing
@dataclass
class Tokens:
    """A tokenized corpus: row i is [types[k] for k in ids[offsets[i]:offsets[i + 1]]].

    types: every distinct token, in order of appearance; ids: (tokens,) int32, a read-only memory map if they come from
    the cache, so that they need not fit in memory; offsets: (rows + 1,) int64.
    """
    types: list[str]
    ids: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def counts(self, rows: np.ndarray | slice) -> np.ndarray:
        """(types,) how often each type occurs in these rows."""
        inside = np.zeros(len(self), dtype=bool)
        inside[rows] = True
        total = np.zeros(len(self.types), dtype=np.int64)
        step = 20_000                                       # so that only a part of the memory map is read at a time
        for first in range(0, len(self), step):
            offsets = self.offsets[first:first + step + 1]
            mask = np.repeat(inside[first:first + step], np.diff(offsets))
            ids = self.ids[offsets[0]:offsets[-1]]
            total += np.bincount(ids[mask], minlength=len(total))
        return total

    def cut(self, max_tokens: int) -> tuple["Tokens", np.ndarray]:
        """The same tokens with longer rows cut into pieces, and for each piece the row that it comes from.

        Offsets [0, 5, 7] and max_tokens 2 become offsets [0, 2, 4, 5, 7] and rows [0, 0, 0, 1].
        """
        lengths = np.diff(self.offsets)
        pieces = np.maximum(1, -(-lengths // max_tokens))                           # (rows,) pieces of each row
        row = np.repeat(np.arange(len(self)), pieces)                               # (pieces,)
        first_piece = np.cumsum(pieces) - pieces                                    # (rows,)
        piece_in_row = np.arange(len(row)) - first_piece[row]                       # (pieces,)
        starts = self.offsets[row] + piece_in_row * max_tokens
        return Tokens(self.types, self.ids, np.append(starts, self.offsets[-1])), row


def count_chunk(tokenize: Callable, texts: list[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(types, ids, lengths) of a chunk: its own types, the ids of all its tokens, the tokens per text. In a worker."""
    index: dict[str, int] = {}
    ids = []
    lengths = []
    for text in texts:
        tokens = tokenize(text)
        ids.extend([index.setdefault(token, len(index)) for token in tokens])
        lengths.append(len(tokens))
    return list(index), np.array(ids, dtype=np.int32), np.array(lengths, dtype=np.int64)


def chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in lists of at most CHUNK texts and about LETTERS characters."""
    chunk = []
    letters = 0
    for text in tqdm(texts, "tokenizing", unit="text", delay=5, mininterval=0.1 if sys.stderr.isatty() else 60):
        chunk.append(text)
        letters += len(text)
        if len(chunk) == CHUNK or letters >= LETTERS:
            yield chunk
            chunk = []
            letters = 0
    if chunk:
        yield chunk


def begin_worker() -> None:
    """Leaves Ctrl-C to the parent process, and ends this worker when the parent ends, also if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def count_chunks(jobs: Iterator[list[str]], tokenize: Callable, workers: int) -> Iterator[tuple]:
    """count_chunk of every chunk, in order, by worker processes; at most a few chunks per worker are read ahead."""
    first = list(islice(jobs, 2))
    if workers == 1 or len(first) < 2:
        yield from map(partial(count_chunk, tokenize), chain(first, jobs))
        return
    pool = ProcessPoolExecutor(workers, initializer=begin_worker)
    waiting = deque()
    try:
        for job in chain(first, jobs):
            waiting.append(pool.submit(count_chunk, tokenize, job))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise InputError("a process that tokenizes was killed, perhaps for lack of memory; run again") from None
    finally:
        pool.shutdown(cancel_futures=True)


def stream_tokens(texts: Iterable[str], tokenize: Callable, file, workers: int) -> tuple[list[str], np.ndarray]:
    """(types, offsets) of the texts. Their ids are written to `file` as int32, chunk by chunk."""
    index: dict[str, int] = {}
    lengths = [np.zeros(1, dtype=np.int64)]
    for types, ids, chunk_lengths in count_chunks(chunks(texts), tokenize, workers):
        global_ids = np.array([index.setdefault(token, len(index)) for token in types], dtype=np.int32)
        file.write(global_ids[ids].tobytes())
        lengths.append(chunk_lengths)
    return list(index), np.cumsum(np.concatenate(lengths))


def tokenize_corpus(texts: Iterable[str], tokenize: Callable, version: str, cache: Path | None = None) -> Tokens:
    """The tokens of the texts, from the cache if the same texts were tokenized by the same `version` before.

    `version` names the tokenizer and its settings. Without a cache everything stays in memory. So it does if the cache
    cannot be written, except for Lines, which may be too long: InputError. A cache needs two passes over the texts.
    """
    if cache is not None:
        folder = Path(cache) / cache_key(texts, version)
        try:
            if not folder.exists():
                fill_cache(folder, texts, tokenize)
        except OSError as error:
            if isinstance(texts, Lines) and not folder.exists():
                raise InputError(f"{folder.parent} cannot be written ({error.strerror}); free some space or make it "
                                 "writable") from None
        if folder.exists():
            return open_tokens(folder)
    buffer = io.BytesIO()
    types, offsets = stream_tokens(texts, tokenize, buffer, workers=1)
    return Tokens(types, np.frombuffer(buffer.getvalue(), dtype=np.int32), offsets)


def writable(folder: Path) -> bool:
    """Whether files can be written to the folder, which is made if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def cache_key(texts: Iterable[str], version: str) -> str:
    """A hash of every text and of the version."""
    sha = hashlib.sha256(version.encode())
    for text in texts:
        sha.update(f"{len(text)}:{text}".encode("utf-8", "surrogatepass"))
    return sha.hexdigest()[:24]


def fill_cache(folder: Path, texts: Iterable[str], tokenize: Callable) -> None:
    """Writes the files of a token cache to a temporary folder, which takes the name `folder` when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(".part*"):
        if time.time() - leftover.stat().st_mtime > 86_400:     # a day old: its process was killed
            shutil.rmtree(leftover, ignore_errors=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".part"))
    try:
        with open(part / "ids.int32", "wb") as file:
            types, offsets = stream_tokens(texts, tokenize, file, workers=os.cpu_count() or 1)
        np.save(part / "offsets.npy", offsets)
        (part / "types.json").write_text(json.dumps(types), encoding="utf-8")
        for name in ("ids.int32", "offsets.npy", "types.json"):
            with open(part / name, "r+b") as file:      # for update, because Windows syncs no file that is read
                os.fsync(file.fileno())
        part.chmod(0o755)
        part.replace(folder)        # fails if another process made `folder` first, with the same content
    finally:
        shutil.rmtree(part, ignore_errors=True)


def open_tokens(folder: Path) -> Tokens:
    """A cached corpus, its ids a read-only memory map. Raises InputError if the folder is damaged."""
    try:
        offsets = np.load(folder / "offsets.npy")
        types = json.loads((folder / "types.json").read_text(encoding="utf-8"))
        size = (folder / "ids.int32").stat().st_size
        ids = np.zeros(0, dtype=np.int32)
        if size:                    # an empty file cannot be mapped
            ids = np.memmap(folder / "ids.int32", dtype=np.int32, mode="r")
        if len(ids) != offsets[-1] or (size and int(ids.max()) >= len(types)):
            raise ValueError(f"{len(ids)} ids of {len(types)} types where {offsets[-1]} were expected")
    except (OSError, ValueError, EOFError, IndexError) as error:
        raise InputError(f"the token cache {folder} is damaged ({error}); delete it and run again") from None
    return Tokens(types, ids, offsets)
