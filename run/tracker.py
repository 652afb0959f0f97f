"""--track: sends a run's curves to TensorBoard or Weights & Biases, and imports neither unless it is asked for."""
import os
import uuid
from importlib.util import find_spec
from pathlib import Path

from run.files import InputError, one_line, write_atomically


def check_tracker(kind: str) -> None:
    """Raises InputError if the package of the tracker is not installed."""
    if kind != "none" and find_spec(kind) is None:
        raise InputError(f"--track {kind} needs a package that is not here; run `pip install {kind}`")


def flat_numbers(values: dict, prefix: str = "") -> dict[str, float]:
    """The numbers in nested dictionaries and lists: {"a": {"b": [1, 2]}} -> {"a/b/0": 1.0, "a/b/1": 2.0}."""
    out = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out |= flat_numbers(value, f"{prefix}{key}/")
        elif isinstance(value, list):
            out |= flat_numbers(dict(enumerate(value)), f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            out[f"{prefix}{key}"] = float(value)
    return out


class Tracker:
    """Writes numbers by step to FOLDER/tensorboard/NAME or FOLDER/wandb, or nowhere. A resumed run extends its curves.

    wandb is offline unless WANDB_API_KEY is set; if WANDB_MODE is set, it decides instead.
    """

    def __init__(self, kind: str, folder: Path, name: str, config: dict, step: int):
        self.writer = None
        self.run = None
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(folder / kind / name, purge_step=step + 1)
            self.writer.add_text("config", "\n".join(f"    {key} = {value!r}" for key, value in config.items()))
        elif kind == "wandb":
            self.run = start_wandb(folder, name, config, step)

    def log(self, step: int, values: dict) -> None:
        """Writes the numbers in a nested dictionary."""
        numbers = flat_numbers(values)
        if self.writer:
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, step)
        if self.run:
            self.run.log(numbers, step=step)

    def flush(self) -> None:
        """Writes everything to disk. Called before a state is saved, so that a resumed run's curves have no gap."""
        if self.writer:
            self.writer.flush()

    def close(self) -> None:
        if self.writer:
            self.writer.close()
        if self.run:
            self.run.finish()


def start_wandb(folder: Path, name: str, config: dict, step: int):
    """A wandb run. A file in `folder` holds its id, by which a resumed run (step > 0) finds it again."""
    import wandb
    mode = os.environ.get("WANDB_MODE")
    if not mode:
        mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    file = folder / "wandb" / f"{name}.id"
    run_id = file.read_text() if step and file.exists() else uuid.uuid4().hex
    write_atomically(file, lambda part: part.write(run_id.encode()))
    try:
        return wandb.init(project="elmo", name=name, dir=folder, config=config, mode=mode, id=run_id, resume="allow")
    except wandb.errors.Error as error:
        raise InputError(f"--track wandb failed ({one_line(error)}); set WANDB_MODE=offline, or leave out --track"
                         ) from None
