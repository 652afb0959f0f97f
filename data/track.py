"""--track: a run's curves to TensorBoard or Weights & Biases, neither of which is imported unless asked for."""
import os
import uuid
from importlib.util import find_spec
from pathlib import Path

from data.files import InputError, one_line, write_atomically


def check_tracker(kind: str) -> None:
    """InputError where the package is not installed, before anything is read."""
    if kind != "none" and find_spec(kind) is None:
        raise InputError(f"--track {kind} needs a package that is not here; run `pip install {kind}`")


def numbers(values: dict, prefix: str = "") -> dict[str, float]:
    """{"validation/trainable/loss/0": 0.3, ..} of nested dicts and lists; what is no number is left out."""
    out = {}
    for key, value in values.items():
        if isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            out |= numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            out[f"{prefix}{key}"] = float(value)
    return out


class Tracker:
    """Takes numbers by step, to FOLDER/tensorboard/NAME or FOLDER/wandb; a resumed run goes on with its curves.

    wandb is offline unless WANDB_API_KEY or WANDB_MODE is set.
    """

    def __init__(self, kind: str, folder: Path, name: str, config: dict, step: int):
        self.writer = self.run = None
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(folder / kind / name, purge_step=step + 1)
            self.writer.add_text("config", "\n".join(f"    {key} = {value!r}" for key, value in config.items()))
        elif kind == "wandb":
            import wandb
            mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
            file = folder / kind / f"{name}.id"
            known = file.read_text() if step and file.exists() else uuid.uuid4().hex
            write_atomically(file, lambda part: part.write(known.encode()))
            try:
                self.run = wandb.init(project="elmo", name=name, dir=folder, config=config, mode=mode, id=known,
                                      resume="allow")
            except wandb.errors.Error as error:
                raise InputError(f"--track wandb failed ({one_line(error)}); set WANDB_MODE=offline, or leave it out"
                                 ) from None

    def log(self, step: int, values: dict) -> None:
        """Nested numbers at a step."""
        found = numbers(values)
        for name, value in found.items() if self.writer else ():
            self.writer.add_scalar(name, value, step)
        if self.run:
            self.run.log(found, step=step)

    def flush(self) -> None:
        """To disk: with a saved state, so that no curve lacks what came before it."""
        if self.writer:
            self.writer.flush()

    def close(self) -> None:
        if self.writer:
            self.writer.close()
        if self.run:
            self.run.finish()
