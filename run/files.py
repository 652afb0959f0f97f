"""Files that are never half written, and errors that a user can fix."""
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
    path = Path(path)
    part = path.with_name(f".{path.name}.part")     # a fixed name: after a kill, the next write replaces it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        with suppress(OSError):
            part.unlink()
        if not isinstance(error, (OSError, RuntimeError)):      # torch.save reports a full disk as a RuntimeError
            raise
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"{path} cannot be written ({reason}); free some space or choose another --out") from None


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
    """The lines of read_text(path) without their line ends. A line end at the end of the file starts no new line."""
    lines = read_text(path).split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


@contextmanager
def folder_lock(folder: str | Path) -> Iterator[None]:
    """Makes `folder`, and keeps other processes from writing a run to it until the `with` block ends.

    Raises InputError if another process has the lock. The operating system frees it however a process ends.
    """
    lock = FileLock(Path(folder) / ".lock", blocking=False)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise InputError(f"another run is writing to {folder}; wait for its end or choose another --out") from None
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}); choose another --out") from None
    try:
        yield
    finally:
        with suppress(OSError):     # Windows refuses, and removes the file by itself
            Path(lock.lock_file).unlink()
        lock.release()
