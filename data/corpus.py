"""Any text as token ids on disk: read line by line, tokenized on all cores, opened again at once as a memory map.

    tokens = tokenize_corpus(texts, tokenize, "version 1", cache)           # Tokens: types, ids, offsets
    tokens = tokenize_corpus(Lines("news/"), tokenize, "version 1", cache)  # every .txt and .gz of a folder

Memory holds the distinct words, a number a row and some chunks of text, whatever the length of the corpus.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.files import InputError
from data.machine import end_with_parent

CHUNK = 2_000       # texts a worker tokenizes at a time: large enough to hide the hand-over, small enough for memory
LETTERS = 2**20     # most characters of a chunk, and most bytes of a line: longer ones are cut between two words
LONGEST = 400       # tokens of a row of plain text; a longer line becomes several rows


# ------------------------------------------------------------------------------------------------- plain text
class Lines:
    """The lines with text of a file, or of every .txt and .gz below a folder in the order of their names.

    One sentence or document a line, UTF-8, .gz unpacked while it is read. InputError when there is no such file, or
    for a file that cannot be read, unpacked or decoded, with its line. Can be iterated any number of times.
    """

    def __init__(self, path: str | Path):
        self.files = [Path(path)] if Path(path).is_file() else []
        if path and not self.files:
            self.files = sorted(p for p in Path(path).rglob("*") if p.suffix in (".txt", ".gz") and p.is_file())
        if not self.files:
            raise InputError(f"{str(path)!r} is no file, and no folder with .txt or .gz files; name one")

    def __iter__(self) -> Iterator[str]:
        for path in self.files:
            number = 0
            try:
                with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
                    for number, line in enumerate(lines_of(file), start=1):
                        text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                        if text:
                            yield text
            except UnicodeDecodeError:
                raise InputError(f"{path}, line {number}: is not UTF-8; save the file as UTF-8") from None
            except (OSError, EOFError, gzip.zlib.error) as error:
                reason = getattr(error, "strerror", None) or str(error)
                raise InputError(f"{path} cannot be read ({reason})") from None


def lines_of(file) -> Iterator[bytes]:
    """A binary file's lines; one longer than LETTERS comes in pieces that end at a space, or at a character's end."""
    rest = b""
    while line := rest + file.readline(LETTERS - len(rest)):
        rest = b""
        if len(line) == LETTERS and not line.endswith(b"\n"):
            begins = (at for at in range(len(line) - 1, len(line) - 5, -1) if line[at] & 0xC0 != 0x80)
            cut = line.rfind(b" ") + 1 or next(begins, len(line))       # the last character's first byte
            line, rest = line[:cut], line[cut:]
        yield line


# ------------------------------------------------------------------------------------------------- tokenizing
@dataclass
class Tokens:
    """A tokenized corpus: row i is [types[k] for k in ids[offsets[i]:offsets[i + 1]]].

    types: every distinct token, in order of appearance; ids: (tokens,) int32, a read-only memory map when it comes
    from the cache, so that no corpus has to fit in memory; offsets: (rows + 1,) int64.
    """
    types: list[str]
    ids: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def counts(self, rows: np.ndarray | slice) -> np.ndarray:
        """(types,) how often each type stands in these rows."""
        inside, total = np.zeros(len(self), dtype=bool), np.zeros(len(self.types), dtype=np.int64)
        inside[rows] = True
        for a in range(0, len(self), 20_000):               # a part of the memory map at a time
            offsets = self.offsets[a:a + 20_001]
            mask = np.repeat(inside[a:a + 20_000], np.diff(offsets))
            total += np.bincount(self.ids[offsets[0]:offsets[-1]][mask], minlength=len(total))
        return total

    def cut(self, most: int) -> tuple["Tokens", np.ndarray]:
        """The same tokens, a row of more than `most` as several, and the row that each of these was.

        Offsets [0, 5, 7] and most 2 become [0, 2, 4, 5, 7] and rows [0, 0, 0, 1].
        """
        pieces = np.maximum(1, -(-np.diff(self.offsets) // most))                   # (rows,)
        owner = np.repeat(np.arange(len(self)), pieces)
        which = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        return Tokens(self.types, self.ids, np.append(self.offsets[owner] + which * most, self.offsets[-1])), owner


def count_chunk(tokenize: Callable, texts: list[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(types, ids, lengths) of one chunk of texts; runs in a worker process."""
    index: dict[str, int] = {}
    ids, lengths = [], []
    for text in texts:
        tokens = tokenize(text)
        ids.extend([index.setdefault(token, len(index)) for token in tokens])
        lengths.append(len(tokens))
    return list(index), np.array(ids, dtype=np.int32), np.array(lengths, dtype=np.int64)


def chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in lists of at most CHUNK, and of about LETTERS characters at most."""
    chunk, size = [], 0
    for text in tqdm(texts, "tokenizing", unit="text", delay=5, mininterval=0.1 if sys.stderr.isatty() else 60):
        chunk.append(text)
        size += len(text)
        if len(chunk) == CHUNK or size >= LETTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def begin_worker() -> None:
    """Ctrl-C is the parent's to handle, and a parent that is killed takes its workers along."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def counted(jobs: Iterator[list[str]], tokenize: Callable, workers: int) -> Iterator[tuple]:
    """count_chunk of every chunk, in order; a few chunks a worker are under way at a time, however many there are."""
    first = list(islice(jobs, 2))
    if workers == 1 or len(first) < 2:
        yield from map(partial(count_chunk, tokenize), chain(first, jobs))
        return
    pool, waiting = ProcessPoolExecutor(workers, initializer=begin_worker), deque()
    try:
        for job in chain(first, jobs):
            waiting.append(pool.submit(count_chunk, tokenize, job))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise InputError("a process that tokenizes was killed, for want of memory perhaps; run again") from None
    finally:
        pool.shutdown(cancel_futures=True)


def stream_tokens(texts: Iterable[str], tokenize: Callable, file, workers: int) -> tuple[list[str], np.ndarray]:
    """(types, offsets) of the texts, whose ids are appended to `file` as int32 while they come: flat memory."""
    index: dict[str, int] = {}
    lengths = [np.zeros(1, dtype=np.int64)]
    for types, ids, length in counted(chunks(texts), tokenize, workers):
        to_global = np.array([index.setdefault(token, len(index)) for token in types], dtype=np.int32)
        file.write((to_global[ids] if len(ids) else ids).tobytes())
        lengths.append(length)
    return list(index), np.cumsum(np.concatenate(lengths))


def tokenize_corpus(texts: Iterable[str], tokenize: Callable, version: str, cache: Path | None = None) -> Tokens:
    """Tokens of the texts, from the cache when the same texts were tokenized by the same `version` before.

    The key is a hash of every text and of `version`, which names the tokenizer and its settings. `cache=None` keeps
    everything in memory and leaves nothing behind; so does a cache that cannot be written, unless the texts are Lines.
    The texts are read twice.
    """
    if cache is not None:
        key = hashlib.sha256(version.encode())
        for text in texts:
            key.update(f"{len(text)}:{text}".encode("utf-8", "surrogatepass"))
        folder = Path(cache) / key.hexdigest()[:24]
        try:
            if not folder.exists():
                fill_cache(folder, texts, tokenize)
        except OSError as error:
            if isinstance(texts, Lines) and not folder.exists():        # memory might not hold them
                raise InputError(f"{folder.parent} cannot be written ({error.strerror}); free some space") from None
        if folder.exists():
            return open_tokens(folder)
    buffer = io.BytesIO()
    types, offsets = stream_tokens(texts, tokenize, buffer, workers=1)
    return Tokens(types, np.frombuffer(buffer.getvalue(), dtype=np.int32), offsets)


def fill_cache(folder: Path, texts: Iterable[str], tokenize: Callable) -> None:
    """Writes a token cache beside its name and gives it that name when it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(".part*"):
        if time.time() - left.stat().st_mtime > 86_400:         # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".part"))
    try:
        with open(part / "ids.int32", "wb") as file:
            types, offsets = stream_tokens(texts, tokenize, file, workers=os.cpu_count() or 1)
        np.save(part / "offsets.npy", offsets)
        (part / "types.json").write_text(json.dumps(types), encoding="utf-8")
        for name in ("ids.int32", "offsets.npy", "types.json"):
            with open(part / name, "rb") as file:
                os.fsync(file.fileno())
        part.chmod(0o755)
        part.replace(folder)        # fails where another process was first: its folder holds the same
    finally:
        shutil.rmtree(part, ignore_errors=True)


def open_tokens(folder: Path) -> Tokens:
    """A cached corpus, its ids a read-only memory map; InputError when the folder was damaged."""
    try:
        offsets = np.load(folder / "offsets.npy")
        types = json.loads((folder / "types.json").read_text(encoding="utf-8"))
        size = (folder / "ids.int32").stat().st_size
        ids = np.memmap(folder / "ids.int32", dtype=np.int32, mode="r") if size else np.zeros(0, dtype=np.int32)
        if len(ids) != offsets[-1] or (size and int(ids.max()) >= len(types)):
            raise ValueError(f"{len(ids)} ids of {len(types)} types where {offsets[-1]} were expected")
    except (OSError, ValueError, EOFError, IndexError) as error:
        raise InputError(f"the token cache {folder} is damaged ({error}); delete it and run again") from None
    return Tokens(types, ids, offsets)


def spell(types: Sequence[str], max_chars: int, special: int) -> np.ndarray:
    """(special + types, max_chars + 2) codes of UTF-8 bytes: 0 pads, 1 begins and 2 ends a word, byte b is 3 + b.

    The special symbols come first, each one code that no byte has, so that a text can not spell them either.
    """
    codes = np.zeros((special + len(types), max_chars + 2), dtype=np.int16)
    for i in range(1, special):
        codes[i, 0] = 258 + i
    for row, token in zip(codes[special:], types, strict=True):
        letters = [1, *(3 + b for b in token.encode("utf-8", "surrogatepass")[:max_chars]), 2]
        row[:len(letters)] = letters
    return codes
