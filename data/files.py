"""Files that are whole or absent, and checkpoints that run no code: what both scripts write and read."""
import hashlib
import io
import json
import os
import signal
import sys
import threading
import weakref
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import numpy as np
import torch
from tqdm import tqdm


class InputError(ValueError):
    """What a user can mend, in one sentence; the scripts print it and end with exit status 2."""


def write_atomically(path: str | Path, write: Callable) -> None:
    """`path` whole or as it was: `write(file)` fills a neighbour, which is flushed to disk and takes the name."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")     # one name: what a kill leaves behind, the next write replaces
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:        # torch.save reports a full disk as a RuntimeError
        with suppress(OSError):
            part.unlink()
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"{path} cannot be written ({reason}); free some space or choose another --out") from None
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def read_text(path: str | Path) -> str:
    """A UTF-8 file's text, or standard input's for "-"; InputError when it cannot be read or decoded."""
    name = "standard input" if str(path) == "-" else path
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{name} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        raise InputError(f"{name}, line {line}: byte {error.start} is not UTF-8; save the file as UTF-8") from None


def read_lines(path: str | Path) -> list[str]:
    """The lines of read_text(path), without their ends; an end of line at the very end begins no further one."""
    lines = read_text(path).split("\n")
    return [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]


def read_checkpoint(path: str | Path, keys: set[str]) -> dict:
    """A .pt file's dictionary, opened with weights_only=True; InputError for anything else than such a file."""
    try:
        file = io.BytesIO(Path(path).read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path} is missing; run the script that writes it first, or name another file") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    try:
        content = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:      # torch raises half a dozen kinds for damaged files, and one for unsafe pickles
        unsafe = "Weights only load failed" in str(error)
        reason = "it is damaged, or holds more than tensors and plain types" if unsafe else "it is damaged"
        raise InputError(f"{path} cannot be opened: {reason}; restore it or train again") from None
    if not isinstance(content, dict) or not keys <= set(content):
        raise InputError(f"{path} is no checkpoint of this kind; expected the keys {', '.join(sorted(keys))}")
    return content


def digest(content: dict) -> str:
    """SHA-256 of everything in a published file but the digest itself: plain types as JSON, weights as bytes."""
    plain = {key: value for key, value in content.items() if key not in ("weights", "digest")}
    found = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for name, value in sorted(content["weights"].items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.contiguous().numpy().tobytes())
    return found.hexdigest()


def read_published(path: str | Path, form: str, keys: set[str]) -> dict:
    """A published file whose contents match its digest and whose format is `form`; InputError otherwise."""
    content = read_checkpoint(path, {"format", "weights", "digest"} | keys)
    try:
        found = digest(content)
    except Exception:       # weights that are no dense tensors, words that are no text: whatever it is, not our file
        found = None
    if found is None or found != content["digest"]:
        raise InputError(f"{path} is damaged: its contents do not match its digest; restore it or train again")
    if content["format"] != form:
        raise InputError(f"{path} is of format {content['format']!r}; expected {form!r}")
    return content


@contextmanager
def fitting(path: str | Path) -> Iterator[None]:
    """What Python and torch raise where the parts of a file do not fit becomes one sentence that names the file."""
    try:
        yield
    except InputError as error:
        raise (error if str(path) in str(error) else InputError(f"{path}: {error}")) from None
    except (TypeError, ValueError, KeyError, RuntimeError, AttributeError, IndexError) as error:
        raise InputError(f"{path} does not fit together: {one_line(error)}") from None


@contextmanager
def written_json(path: str | Path) -> Iterator[dict]:
    """The numbers in a JSON file of the scripts; what Python raises while they are used becomes one sentence."""
    try:
        yield json.loads(read_text(path))
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{path} is not what the scripts write ({error!r}); run them again") from None


def one_line(error: Exception) -> str:
    """What an exception says, on one line."""
    return " ".join(str(error).split())[:200]


def write_published(path: str | Path, content: dict) -> str:
    """Writes `content` with its digest, which is returned."""
    content = content | {"digest": digest(content)}
    write_atomically(path, partial(torch.save, content))
    return content["digest"]


def write_json(path: Path, content: dict) -> None:
    """`content` as indented UTF-8 JSON, whole or not at all."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))


def write_resume(path: Path, identity: dict, state: dict) -> None:
    """The state of a run that stopped, with what a run must be to go on from it and a digest of it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    found = hashlib.sha256(buffer.getbuffer()).hexdigest()
    state = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
    write_atomically(path, partial(torch.save, {"identity": identity, "digest": found, "state": state}))


def read_resume(path: Path, identity: dict) -> dict:
    """The state; InputError names the first thing in which the run that made it differs from this one."""
    content = read_checkpoint(path, {"identity", "digest", "state"})
    try:
        state = content["state"].numpy()
        if not isinstance(content["identity"], dict) or hashlib.sha256(state).hexdigest() != content["digest"]:
            raise ValueError
    except Exception:
        raise InputError(f"{path} is damaged: it does not match its digest; start anew without --resume") from None
    for name, value in identity.items():
        if (found := content["identity"].get(name)) != value:
            raise InputError(f"{path} was made with {name} = {found}, not {value}; give the same knobs and data, or "
                             "start anew without --resume")
    return torch.load(io.BytesIO(state), weights_only=True, map_location="cpu")


def print_predictions(load: Callable, text: str, precision: str, as_json: bool) -> int:
    """Prints label and probabilities of a text, or for "-" of each line of standard input; exit status 0.

    `load()` gives the Classifier; where it takes pairs, a tab stands between the two texts.
    """
    lines = read_lines("-") if text == "-" else [text]
    classifier = load()
    texts = [tuple(line.split("\t")) for line in lines] if classifier.config.two_texts else lines
    for line, found in zip(lines, classifier.predict(texts, precision), strict=True):
        if as_json:
            print(json.dumps({"text": line} | found))
        else:
            print(found["label"], *(f"{label} {p:.4f}" for label, p in found["probabilities"].items()), sep="\t")
    return 0


def write_npz(load: Callable, source: str | None, target: str | None, precision: str, wide: bool) -> int:
    """Writes `target`, a .npz of the lines of `source`: offsets (N + 1,), vectors (3, tokens, D); exit status 0.

    `load()` gives the ELMo. float32 when `wide`, else float16 and, unless precision is "fp32", bf16 where it is fast.
    Streamed: the vectors are written beside the target as they come, and packed at the end, so that memory stays flat.
    """
    if not source or not target:
        raise InputError("--embed and --npz go together: --embed texts.txt --npz vectors.npz")
    parent = Path(target).absolute().parent
    if not parent.is_dir():
        raise InputError(f"{target} cannot be written: the folder {parent} is missing")
    if Path(target).is_dir():
        raise InputError(f"{target} cannot be written: it is a folder")
    lines = read_lines(source)
    elmo = load()
    offsets = elmo.encode(lines).tokens.offsets
    shape = (3, int(offsets[-1]), 2 * elmo.config.output)
    dtype = np.dtype(np.float32 if wide else np.float16)
    with TemporaryDirectory(dir=parent, prefix=".embed") as folder:
        with open(f"{folder}/vectors.npy", "wb") as file:
            header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_2_0(file, header)
            begin, width = file.tell(), shape[2] * dtype.itemsize
            texts = elmo.embed_stream(lines, "fp32" if wide or precision == "fp32" else "bf16")
            for start, layers in zip(offsets[:-1], tqdm(texts, total=len(lines), unit="text"), strict=True):
                for j, layer in enumerate(layers.numpy().astype(dtype)):
                    file.seek(begin + (j * shape[1] + int(start)) * width)
                    file.write(layer.tobytes())
        np.save(f"{folder}/offsets.npy", offsets)
        def pack(file) -> None:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for name in ("offsets.npy", "vectors.npy"):
                    archive.write(f"{folder}/{name}", name)
        write_atomically(target, pack)
    print(f"{target}: offsets ({len(offsets)},), vectors {shape} of {len(lines):,} texts")
    return 0


class Held:
    """A folder that no other process's run writes while this object lives, however this process ends."""
    every: ClassVar = weakref.WeakValueDictionary()

    def __init__(self, folder: Path):
        self.file = None
        try:
            import fcntl  # not on Windows, nor do all file systems lock
            self.file = os.open(folder, os.O_RDONLY)
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another run is writing to {folder}; wait for its end or choose another --out") from None
        except (ImportError, OSError):
            pass

    def __del__(self):
        if self.file is not None:
            os.close(self.file)


def hold(folder: Path) -> Held:
    """The folder, held against other processes; InputError when one of them has it."""
    folder = folder.resolve()
    return Held.every.get(folder) or Held.every.setdefault(folder, Held(folder))


@contextmanager
def stop_request() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, so that training stops between two steps; a second Ctrl-C stops at once."""
    event, old = threading.Event(), {}
    def ask(number, frame):
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
    if threading.current_thread() is threading.main_thread():
        old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
