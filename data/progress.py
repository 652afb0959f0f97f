"""Long work: its progress on a terminal or in a log file, and what lets it stop and go on."""
import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from data.files import InputError, hold, one_line, read_resume, stop_request, write_atomically, write_resume
from data.machine import keep_freed_memory, sum_over_processes
from data.track import Tracker


class Progress:
    """A bar of steps with loss, items a second and time left, and a log line every so many steps.

    Items are what the trainer counts: a language model's target tokens, whose perplexity is shown too, or rows.

    Nothing is shown on other processes than the first. A log file gets a bar line a minute, a terminal ten a second.
    """

    def __init__(self, steps: int, done: int, every: int, shown: bool, unit: str, tracker: Tracker):
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=done, unit="step", disable=not shown, smoothing=0.05,
                        mininterval=0.1 if terminal else 60, dynamic_ncols=terminal)
        self.every, self.steps, self.done, self.shown, self.unit = every, steps, done, shown, unit
        self.tracker = tracker
        self.start()

    def start(self) -> None:
        """Restarts the clock of the rates, after an evaluation say."""
        self.since, self.items, self.loss, self.begin = time.perf_counter(), 0, 0.0, self.done

    def step(self, loss: float, items: int, per_epoch: int) -> None:
        """Counts a step of `items` tokens or rows whose summed loss in nats is `loss`."""
        self.done, self.items, self.loss = self.done + 1, self.items + items, self.loss + loss
        seconds = max(time.perf_counter() - self.since, 1e-9)
        nats, rate = self.loss / max(1, self.items), self.items / seconds
        figures = f"loss {nats:.3f}  {rate:,.0f} {self.unit}/s"
        if self.unit == "tokens":
            figures += f"  perplexity {math.exp(min(nats, 50)):.1f}"
        self.bar.set_postfix_str(figures, refresh=False)
        self.bar.update()
        if self.done % self.every == 0:
            self.tracker.log(self.done, {"training": {"nats": nats, f"{self.unit}_per_second": rate}})
            left = seconds / (self.done - self.begin) * (self.steps - self.done)
            self.write(f"step {self.done:,} of {self.steps:,}  epoch {self.done / per_epoch:.2f}  {figures}  "
                       f"{tqdm.format_interval(left)} left")
            self.start()

    def write(self, line: str) -> None:
        if self.shown:
            self.bar.write(line)
            sys.stdout.flush()


def rate(step: int, steps: int, warmup: float) -> float:
    """Share of the highest learning rate: a cosine to 1 %, at first held down by a linear warm-up."""
    return min((step + 1) / max(1.0, warmup * steps), 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


class Run:
    """A training run that can be stopped and resumed: its counters, clock, history, best weights and resume file.

    The trainer has steps, per_epoch, interval (steps between evaluations), unit ("tokens" or "rows"), config (with
    log_every, save_every), rank, device, model, identity(), state() and load_state(state). `seconds` counts steps
    alone, `wall` everything, both over all resumed parts. Nothing of a step depends on when a state is written, so
    that a killed run ends with the weights of one that was not.
    """
    KEPT = ("step", "seconds", "wall", "loss", "items", "lowest", "best", "history")

    def __init__(self, trainer, file: Path | None = None, resume: bool = False):
        keep_freed_memory()
        self.trainer, self.file = trainer, file
        self.step, self.items, self.seconds, self.wall, self.loss = 0, 0, 0.0, 0.0, 0.0
        self.lowest, self.best, self.history = math.inf, None, []
        if file and trainer.rank == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            self.held = hold(file.parent)       # until this run, and so the script, ends
            write_atomically(file.with_name(".writable"), lambda _: None)       # found out now, not after an epoch
            file.with_name(".writable").unlink()
        if resume and file and file.exists():
            self.load(read_resume(file, trainer.identity()))
        self.earlier = self.wall            # seconds of the parts before this one
        self.began = time.perf_counter() - self.wall
        self.clock = self.saved = time.perf_counter()

    def __enter__(self) -> "Run":
        config, first = self.trainer.config, self.trainer.rank == 0
        file = self.file or Path("run")
        tracker = Tracker(config.track if first and self.file else "none", file.parent,
                          file.name.removesuffix(".resume.pt"), asdict(config), self.step)
        self.progress = Progress(self.trainer.steps, self.step, config.log_every, first, self.trainer.unit, tracker)
        self.requests = ExitStack()
        self.request = self.requests.enter_context(stop_request())
        return self

    def __exit__(self, kind, error, _) -> None:
        if isinstance(error, InputError) and self.file:         # a loss that is not finite: the weights still are
            with suppress(InputError):
                self.save()
                self.progress.write(f"{self.file} keeps the state before step {self.step:,}")
        self.requests.close()
        self.progress.bar.close()
        self.progress.tracker.close()

    def load(self, state: dict) -> None:
        """Trainer and counters as `save` wrote them."""
        try:
            self.trainer.load_state(state["trainer"])
            for name in self.KEPT:
                setattr(self, name, state["run"][name])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise InputError(f"{self.file} does not hold such a run ({one_line(error)}); start anew without "
                             "--resume") from None

    @property
    def finished(self) -> bool:
        return self.step == self.trainer.steps

    def due(self, step: int) -> bool:
        """Whether the weights before this step are to be evaluated: at the end of each interval, once."""
        ends = step == self.trainer.steps or step % self.trainer.interval == 0
        return ends and step > (self.history[-1]["step"] if self.history else 0)

    def keep(self, evaluate: Callable[[float], tuple[float, dict]]) -> None:
        """Adds an evaluation to the history, and the weights where its first number is the lowest so far.

        `evaluate(training loss per item since the last one)` returns the number by which weights are chosen and an
        entry; the clock stops meanwhile.
        """
        self.seconds += time.perf_counter() - self.clock
        number, entry = evaluate(self.loss / max(1, self.items))
        if number < self.lowest:
            self.lowest = number
            self.best = {name: value.clone() for name, value in self.trainer.model.state_dict().items()}
        self.history.append({"step": self.step, "epoch": round(self.step / self.trainer.per_epoch, 3),
                             "seconds": round(self.seconds, 1)} | entry)
        self.loss, self.items = 0.0, 0
        self.progress.write(json.dumps(self.history[-1]))
        self.progress.tracker.log(self.step, entry)
        self.progress.start()
        self.clock = time.perf_counter()
        self.save()

    def stop(self) -> bool:
        """Whether the run ends before this step, because it is complete or was asked to; its state is saved then."""
        if self.finished:
            return True
        votes = torch.tensor([float(self.request.is_set())], device=self.trainer.device)
        sum_over_processes([votes])         # all processes stop before the same step
        if votes:
            self.save()
            self.progress.write(f"stopped before step {self.step:,}" + ("; --resume goes on" if self.file else ""))
        return bool(votes)

    def count(self, loss: float, items: int) -> None:
        """Counts a step, shows it, and saves the state where the last one is `save_every` seconds old."""
        self.step, self.loss, self.items = self.step + 1, self.loss + loss, self.items + items
        self.progress.step(loss, items, self.trainer.per_epoch)
        if time.perf_counter() - self.saved > self.trainer.config.save_every:
            self.save()

    def save(self) -> None:
        """The state to the resume file, by the first process."""
        self.seconds += time.perf_counter() - self.clock
        self.wall = time.perf_counter() - self.began
        if self.file and self.trainer.rank == 0:
            self.progress.tracker.flush()
            kept = {name: getattr(self, name) for name in self.KEPT}
            write_resume(self.file, self.trainer.identity(), {"run": kept, "trainer": self.trainer.state()})
        self.clock = self.saved = time.perf_counter()
