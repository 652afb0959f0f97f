"""Files that are never half written, and errors that a user can fix."""
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout


class InputError(ValueError):
    """Something that the user can fix, in one sentence. The scripts print it and exit with status 2."""


def one_line(error: Exception) -> str:
    """The message of an exception on one line, at most 200 characters."""
    return " ".join(str(error).split())[:200]


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file so that `path` always holds either the whole new content or the old one.

    `write(file)` fills a temporary file beside `path`, which then takes the name. Raises InputError if that fails.
    """
    write_together({path: write})


def write_together(files: dict[str | Path, Callable[[BinaryIO], object]]) -> None:
    """Writes files {path: write} so that the last one is never found beside older versions of the others.

    All temporary files are filled first. Then the last of the old files is removed, and the new ones take their names
    in order. After a kill in between, the last file is missing. Raises InputError if a file cannot be written.
    """
    parts = {}
    path = None
    try:
        for path, write in files.items():
            path = Path(path)
            part = path.with_name(f".{path.name}.part")     # a fixed name: after a kill, the next write replaces it
            path.parent.mkdir(parents=True, exist_ok=True)
            parts[part] = path
            with open(part, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        if len(parts) > 1:
            path.unlink(missing_ok=True)
        for part, path in parts.items():
            part.replace(path)
    except BaseException as error:
        for part in parts:
            with suppress(OSError):
                part.unlink()
        if not isinstance(error, (OSError, RuntimeError)):      # torch.save reports a full disk as a RuntimeError
            raise
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"{path} cannot be written ({reason}); free some space or choose another folder") from None


def write_json(path: str | Path, content: dict) -> None:
    """Writes `content` as indented UTF-8 JSON, whole or not at all."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    data = text.encode("utf-8", "surrogateescape")
    write_atomically(path, lambda file: file.write(data))


@contextmanager
def read_json(path: str | Path) -> Iterator[dict]:
    """Gives the content of a JSON file that a script wrote: `with read_json(path) as result:`.

    Raises InputError if the file is missing or damaged, or if the `with` block misses something in it.
    """
    try:
        yield json.loads(read_text(path))
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(f"{path} is not what the scripts write ({error!r}); run them again") from None


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, or of standard input for "-". Raises InputError if it cannot be read or decoded."""
    from_stdin = str(path) == "-"
    name = "standard input" if from_stdin else path
    try:
        content = sys.stdin.buffer.read() if from_stdin else Path(path).read_bytes()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{name} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        raise InputError(f"{name}, line {line}: byte {error.start} is not UTF-8; save the file as UTF-8") from None


def read_lines(path: str | Path) -> list[str]:
    """The lines of stream_lines(path) as a list."""
    return list(stream_lines(path))


def open_stdin() -> BinaryIO:
    """Standard input in a file object of its own. Python closes sys.stdin at exit, even if a thread still reads it."""
    try:
        return open(sys.stdin.fileno(), "rb", closefd=False)
    except (AttributeError, io.UnsupportedOperation):       # there is none, or it is no file, as in a notebook
        return sys.stdin.buffer if sys.stdin else io.BytesIO()


def stream_lines(path: str | Path) -> Iterator[str]:
    """The lines of a UTF-8 file one by one, or of standard input for "-" as they come, without their line ends.

    A line end at the end of the file starts no new line. Raises InputError if the file cannot be read, and at a line
    that is not UTF-8.
    """
    name = "standard input" if str(path) == "-" else path
    try:
        with open_stdin() if str(path) == "-" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")         # a byte order mark
                yield text.removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise InputError(f"{name} cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{name}, line {number}: byte {error.start} of the line is not UTF-8; save the text as UTF-8"
                         ) from None


def split_at_spaces(line: str) -> list[str]:
    """The tokens of a line, by spaces only: "new  york" -> ["new", "york"]. Tokens may hold other white space."""
    return [token for token in line.split(" ") if token]


@contextmanager
def folder_lock(folder: str | Path, file: str | None = None) -> Iterator[None]:
    """Makes `folder`, and keeps other processes from writing a run to it until the `with` block ends.

    file: keeps them from writing this file of the folder only. Raises InputError if another process has the lock. The
    operating system frees it however a process ends.
    """
    target = Path(folder) / file if file else Path(folder)
    lock = FileLock(Path(folder) / (f".{file}.lock" if file else ".lock"), blocking=False)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        option = "--out-file" if file else "--out"
        raise InputError(f"another run is writing to {target}; wait for its end or choose another {option}") from None
    except OSError as error:
        raise InputError(f"{target} cannot be written ({error.strerror}); choose another folder") from None
    try:
        yield
    finally:
        with suppress(OSError):     # Windows refuses, and removes the file by itself
            Path(lock.lock_file).unlink()
        lock.release()
