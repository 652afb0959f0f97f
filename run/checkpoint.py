"""Checkpoints: .pt files that run no code when they are opened, and that notice when they are damaged.

A published file (models/*.pt) is a dictionary of plain types, the tensors under "weights" and a digest of everything.
A resume file holds the state of a stopped run, and the identity of the run that may continue from it.
"""
import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from run.files import InputError, one_line, write_atomically


def read_checkpoint(path: str | Path, keys: set[str]) -> dict:
    """The dictionary in a .pt file, opened with weights_only=True. Raises InputError if it lacks one of `keys`."""
    try:
        file = io.BytesIO(Path(path).read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path} is missing; run the script that writes it first, or name another file") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    try:
        content = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:      # torch raises many kinds of exceptions for damaged files
        reason = "it is damaged"
        if "Weights only load failed" in str(error):
            reason = "it is damaged, or holds more than tensors and plain types"
        raise InputError(f"{path} cannot be opened: {reason}; restore it or train again") from None
    if not isinstance(content, dict) or not keys <= set(content):
        raise InputError(f"{path} is no checkpoint of this kind; expected the keys {', '.join(sorted(keys))}")
    return content


def digest(content: dict) -> str:
    """SHA-256 of everything in a published file except the digest itself: plain types as JSON, weights as bytes."""
    plain = {key: value for key, value in content.items() if key not in ("weights", "digest")}
    sha = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for name, value in sorted(content["weights"].items()):
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.contiguous().numpy().tobytes())
    return sha.hexdigest()


def write_published(path: str | Path, content: dict) -> str:
    """Writes `content` together with its digest. Returns the digest."""
    published = content | {"digest": digest(content)}
    write_atomically(path, partial(torch.save, published))
    return published["digest"]


def read_published(path: str | Path, form: str, keys: set[str]) -> dict:
    """The content of a published file. Raises InputError if the digest does not match or the format is not `form`."""
    content = read_checkpoint(path, {"format", "weights", "digest"})
    if content["format"] != form:
        raise InputError(f"{path} has format {content['format']!r} instead of {form!r}: another version of the scripts "
                         "wrote it; train again")
    if not keys <= set(content):
        raise InputError(f"{path} is damaged: it lacks {', '.join(sorted(keys - set(content)))}")
    try:
        actual = digest(content)
    except Exception:       # for example, a weight is no dense tensor: this is not a file that we wrote
        actual = None
    if actual is None or actual != content["digest"]:
        raise InputError(f"{path} is damaged: its contents do not match its digest; restore it or train again")
    return content


@contextmanager
def fitting(path: str | Path) -> Iterator[None]:
    """A `with` block that uses the content of a file. If the parts do not fit together, InputError names the file."""
    try:
        yield
    except InputError as error:
        if str(path) in str(error):
            raise
        raise InputError(f"{path}: {error}") from None
    except (TypeError, ValueError, KeyError, RuntimeError, AttributeError, IndexError) as error:
        raise InputError(f"{path} does not fit together: {one_line(error)}") from None


def weights_of(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """A file's weights whose names start with `prefix`: as float32, by their names without the prefix."""
    return {name.removeprefix(prefix): value.float() for name, value in weights.items() if name.startswith(prefix)}


def write_resume(path: Path, identity: dict, state: dict) -> None:
    """Writes the state of a run. `identity` is what another run must have in common to continue from it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    packed = buffer.getbuffer()
    content = {"identity": identity, "digest": hashlib.sha256(packed).hexdigest(),
               "state": torch.frombuffer(packed, dtype=torch.uint8)}
    write_atomically(path, partial(torch.save, content))


def read_resume(path: Path, identity: dict) -> dict:
    """The state in a resume file. Raises InputError that names the first difference between the identities."""
    content = read_checkpoint(path, {"identity", "digest", "state"})
    try:
        packed = content["state"].numpy()
        intact = isinstance(content["identity"], dict) and hashlib.sha256(packed).hexdigest() == content["digest"]
    except Exception:       # for example, the state is no tensor
        intact = False
    if not intact:
        raise InputError(f"{path} is damaged: it does not match its digest; start anew without --resume")
    for name, value in identity.items():
        saved = content["identity"].get(name)
        if saved != value:
            raise InputError(f"{path} was made with {name} = {saved}, not {value}; give the same options and data, or "
                             "start anew without --resume")
    return torch.load(io.BytesIO(packed), weights_only=True, map_location="cpu")
