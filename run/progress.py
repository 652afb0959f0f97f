"""A training run that shows its progress, stops when it is asked to, and resumes to the same weights bit for bit.

    with Run(trainer, file, resume) as run:
        for step in range(run.step, trainer.steps + 1):
            if run.due(step):
                run.save_best(evaluate)         # adds to the history, saves the best weights
            if run.stop():
                break
            run.count(*trainer.step(step))      # (summed loss, gradient norm, items)
"""
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from run.checkpoint import read_resume, write_resume
from run.files import InputError, one_line
from run.machine import sum_over_processes
from run.optimization import MAX_NLL, SLOWER, check_loss
from run.tracker import Tracker


@contextmanager
def stop_request() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, so that training stops between two steps; a second Ctrl-C stops at once."""
    event = threading.Event()
    previous = {}

    def handle(number, frame):
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    if threading.current_thread() is threading.main_thread():       # signals can be handled nowhere else
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handle)
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Progress:
    """A bar of steps with loss, items per second and time left, and a log line every `log_every` steps.

    Items are what the trainer counts: tokens (then the perplexity is shown too) or rows. In a log file the bar is
    updated once per minute and at log lines. Only the first process shows anything (`shown`).
    """

    def __init__(self, steps: int, done: int, log_every: int, shown: bool, unit: str, tracker: Tracker):
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=done, unit="step", disable=not shown, smoothing=0.05,
                        mininterval=0.1 if terminal else 60, dynamic_ncols=terminal)
        self.steps = steps
        self.done = done
        self.log_every = log_every
        self.shown = shown
        self.unit = unit
        self.tracker = tracker
        self.start()

    def start(self) -> None:
        """Starts new averages: after a log line, and after an evaluation, whose time does not count."""
        self.start_time = time.perf_counter()
        self.items = 0
        self.loss = 0.0

    def count(self, steps: int, loss: float, items: int, per_epoch: int) -> None:
        """Counts some steps over `items` tokens or rows, whose summed loss is `loss`."""
        self.done += steps
        self.items += items
        self.loss += loss
        seconds = max(time.perf_counter() - self.start_time, 1e-9)
        nll = self.loss / max(1, self.items)
        speed = self.items / seconds
        figures = f"loss {nll:.3f}  {speed:,.0f} {self.unit}/s"
        if self.unit == "tokens":
            figures += f"  perplexity {math.exp(nll):.1f}"
        self.bar.set_postfix_str(figures, refresh=False)
        self.bar.update(steps)
        if self.done % self.log_every == 0:
            self.tracker.log(self.done, {"training": {"nll": nll, f"{self.unit}_per_second": speed}})
            self.write(f"step {self.done:,} of {self.steps:,}  epoch {self.done / per_epoch:.2f}  {figures}  "
                       f"{tqdm.format_interval(self.seconds_left())} left")
            self.start()

    def seconds_left(self) -> float:
        """The time left that the bar shows."""
        if not self.shown:
            return 0.0
        bar = self.bar.format_dict
        rate = bar["rate"] or (bar["n"] - bar["initial"]) / max(bar["elapsed"], 1e-9)
        return (self.steps - self.done) / max(rate, 1e-9)

    def write(self, line: str) -> None:
        """Prints a line above the bar."""
        if self.shown:
            self.bar.write(line)
            sys.stdout.flush()


class Run:
    """A training run that can be stopped and resumed: its counters, clock, history, best weights and resume file.

    The trainer has steps, per_epoch, interval (steps between evaluations), unit ("tokens" or "rows"), config (with
    precision, log_every, save_every and track), rank, device, dtype, model, identity(), state() and load_state(state).

    seconds: time of the steps alone; wall: of everything; earlier: wall time before this resume. No step depends on
    when a state is saved, so a killed run that is resumed ends with the same weights as a run that was not.

    A GPU computes while Python goes on, until somebody reads a number from it. So a GPU's losses and gradient norms are
    kept in `unread`, and are read and checked every log_every steps and before every evaluation and save. On a CPU they
    are read after every step; there the trainer has checked them already, before it updated the weights.
    """
    SAVED = ("step", "seconds", "wall", "loss", "items", "lowest", "best", "history")

    def __init__(self, trainer, file: Path | None = None, resume: bool = False):
        self.trainer = trainer
        self.file = file
        self.step = 0
        self.seconds = 0.0
        self.wall = 0.0
        self.loss = 0.0         # summed over the items since the last evaluation
        self.items = 0
        self.unread = []        # (summed loss, gradient norm, items) of the steps that were not read yet
        self.lowest = math.inf
        self.best = None        # state dict of the model with the lowest number so far
        self.history = []
        if resume and file and file.exists():
            self.load(read_resume(file, trainer.identity()))
        self.earlier = self.wall
        self.begin = time.perf_counter() - self.wall
        self.clock = time.perf_counter()        # `seconds` is up to date until here
        self.save_time = self.clock

    def load(self, state: dict) -> None:
        """Sets trainer and counters to a state that `save` wrote. With --precision auto, its precision is kept."""
        try:
            self.trainer.load_state(state["trainer"])
            for name in self.SAVED:
                setattr(self, name, state["run"][name])
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[state["precision"]]
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise InputError(f"{self.file} cannot be resumed ({one_line(error)}); start anew without --resume"
                             ) from None
        if self.trainer.config.precision not in ("auto", state["precision"]):
            raise InputError(f"{self.file} was computed in {state['precision']}, not {self.trainer.config.precision}; "
                             f"give --precision {state['precision']}, or start anew without --resume")
        self.trainer.dtype = dtype

    def __enter__(self) -> "Run":
        trainer = self.trainer
        config = trainer.config
        first = trainer.rank == 0
        file = self.file or Path("run")
        kind = config.track if first and self.file else "none"
        tracker = Tracker(kind, file.parent, file.name.removesuffix(".resume.pt"), asdict(config), self.step)
        self.progress = Progress(trainer.steps, self.step, config.log_every, first, trainer.unit, tracker)
        self.exits = ExitStack()
        self.exits.callback(tracker.close)
        self.exits.callback(self.progress.bar.close)
        self.stop_event = self.exits.enter_context(stop_request())
        if self.step == 0 and self.file and self.file.exists():
            self.progress.write(f"{self.file} has a stopped run, which this run replaces; --resume would continue it")
        self.progress.write(f"starting at step {self.step:,} of {trainer.steps:,}; matrix products in {self.precision}")
        return self

    def __exit__(self, kind, error, traceback) -> None:
        # If a step diverged: a CPU's weights are those before it, and are saved; a GPU's have changed, so save() raises
        # and writes nothing. If an evaluation diverged, the weights are bad, and the last saved state stays.
        if isinstance(error, InputError) and self.file and not self.due(self.step):
            with suppress(InputError):
                self.save()
                self.progress.write(f"{self.file} has the state before step {self.step:,}")
        self.exits.close()

    @property
    def precision(self) -> str:
        """The type of the matrix products."""
        return "bf16" if self.trainer.dtype == torch.bfloat16 else "fp32"

    @property
    def finished(self) -> bool:
        return self.step == self.trainer.steps

    def due(self, step: int) -> bool:
        """Whether the weights before this step must be evaluated: once at the end of each interval.

        A run that is resumed right after an evaluation must not repeat it, so a step that is in the history is not due.
        """
        end_of_interval = step == self.trainer.steps or step % self.trainer.interval == 0
        last = self.history[-1]["step"] if self.history else 0
        return end_of_interval and step > last

    def save_best(self, evaluate: Callable[[float], tuple[float, dict, str]]) -> None:
        """Evaluates: adds to the history, keeps a copy of the weights if they are the best so far, saves the state.

        `evaluate(mean training loss since the last evaluation)` returns (loss, entry, sentence): the weights with the
        lowest loss are the best, the entry goes into the history, the sentence is printed. The time of an evaluation
        does not count as training time.
        """
        self.read()
        self.seconds += time.perf_counter() - self.clock
        loss, entry, sentence = evaluate(self.loss / max(1, self.items))
        if not loss <= MAX_NLL:
            raise InputError(f"the loss diverged: it is {loss:.4g} on the validation rows after step {self.step:,}; "
                             f"{SLOWER}")
        if loss < self.lowest:
            self.lowest = loss
            self.best = {name: value.clone() for name, value in self.trainer.model.state_dict().items()}
        self.history.append({"step": self.step, "epoch": round(self.step / self.trainer.per_epoch, 3),
                             "seconds": round(self.seconds, 1)} | entry)
        self.loss = 0.0
        self.items = 0
        self.progress.write(f"epoch {self.history[-1]['epoch']:g}: {sentence}")
        self.progress.tracker.log(self.step, entry)
        self.progress.start()
        self.clock = time.perf_counter()
        self.save()

    def stop(self) -> bool:
        """Whether the run ends before this step: it is complete, or a user asked it to stop, and its state is saved."""
        if self.finished:
            return True
        votes = torch.tensor([float(self.stop_event.is_set())])        # on the CPU, so that no step waits for a GPU
        votes, = sum_over_processes([votes])         # so that all processes stop before the same step
        if votes == 0:
            return False
        self.save()
        hint = "; --resume continues" if self.file else ""
        self.progress.write(f"stopped after {self.step:,} of {self.trainer.steps:,} steps{hint}")
        return True

    def count(self, loss: torch.Tensor, norm: torch.Tensor, items: int) -> None:
        """Counts a step, shows it, and saves the state if the last one is more than `save_every` seconds old."""
        self.step += 1
        self.unread.append((loss, norm, items))
        if self.trainer.device.type == "cpu" or self.step % self.trainer.config.log_every == 0:
            self.read()
        if time.perf_counter() - self.save_time > self.trainer.config.save_every:
            self.save()

    def read(self) -> None:
        """Reads and shows the losses of the last steps. Raises InputError if they show that training has diverged."""
        if not self.unread:
            return
        losses, norms, items = zip(*self.unread, strict=True)
        loss = float(sum(losses))
        check_loss(loss, sum(norms), sum(items), self.step - len(items), self.step - 1)
        self.loss += loss
        self.items += sum(items)
        self.progress.count(len(items), loss, sum(items), self.trainer.per_epoch)
        self.unread.clear()

    def save(self) -> None:
        """Writes the state to the resume file; only the first process does."""
        self.read()
        self.seconds += time.perf_counter() - self.clock
        self.wall = time.perf_counter() - self.begin
        if self.file and self.trainer.rank == 0:
            self.progress.tracker.flush()
            counters = {name: getattr(self, name) for name in self.SAVED}
            write_resume(self.file, self.trainer.identity(), {
                "run": counters, "trainer": self.trainer.state(), "precision": self.precision})
        self.clock = time.perf_counter()
        self.save_time = self.clock
