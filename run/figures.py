"""Figures of both scripts, drawn from the numbers in their JSON files.

`pretraining` and `classification` take the content of such a file and write PNGs to OUT/figures/. Each title says what
its figure shows. Colour-blind readers can distinguish the colours (Okabe and Ito 2008). E: evaluations, C: classes.
"""
import io
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import ConfusionMatrixDisplay

from run.files import write_atomically

BLUE = "#0072B2"
ORANGE = "#D55E00"
GREEN = "#009E73"
GREY = "#777777"
COLOURS = (BLUE, ORANGE, GREEN)
MARKERS = "os^"
PERPLEXITY_TICKS = (1, 2, 3, 5, 8, 12, 20, 30, 50, 70,
                    100, 150, 200, 300, 500, 1000, 2000)
MIN_SHOWN = 5           # percent; cells with a smaller share stay blank
LARGEST = 14            # inches: width of the confusion matrix of many classes


def pretraining(result: dict, out: Path) -> None:
    """Draws OUT/figures/curves_pretraining.png and confusion_words.png from the numbers of pretraining.json."""
    folder = out / "figures"
    if result["history"]:
        save(perplexity_curves(result), folder / "curves_pretraining.png")
    if len(result["confusion"]["words"]) > 1:
        save(word_confusion(result["confusion"]), folder / "confusion_words.png")


def classification(result: dict, out: Path, stem: str) -> None:
    """Draws confusion matrices and learning curves from the numbers of a classification into OUT/figures/.

    The files are confusion_{setting}_{train|test}.png and curves_classification.png if `stem` is "", otherwise
    confusion_{stem}_{setting}_{train|test}.png and curves_{stem}.png. A part without a confusion matrix
    in the JSON gets no such figure.
    """
    folder = out / "figures"
    prefix = f"{stem}_" if stem else ""
    for setting, numbers in result["settings"].items():
        for part in ("train", "test"):
            if "confusion" in numbers[part]["ensemble"]:
                figure = class_confusion(result["labels"], numbers[part], f"{setting}, {part} rows")
                save(figure, folder / f"confusion_{prefix}{setting}_{part}.png")
    save(learning_curves(result), folder / f"curves_{stem or 'classification'}.png")


def save(figure: Figure, path: Path) -> None:
    """Writes `figure` as a PNG with 200 dots per inch. An interrupted write leaves no partial file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, bbox_inches="tight", metadata={"Software": None})
    write_atomically(path, lambda file: file.write(buffer.getvalue()))


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with one panel, size in inches. It needs no window system."""
    figure = Figure(figsize=(width, height))
    axes = figure.subplots()
    return figure, axes


def label(axes: Axes, title: str, x: str, y: str) -> None:
    """Sets the title and the names of both axes, and removes the upper and right lines of the frame."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)


def legend(axes: Axes, **place) -> None:
    """Adds a legend in small letters without a frame."""
    axes.legend(fontsize=8, frameon=False, **place)


def perplexity_curves(result: dict) -> Figure:
    """Perplexity after each epoch: on training rows, on validation rows in both directions, and of Kneser-Ney."""
    history = result["history"]
    part = result["splits"]["validation"]
    epochs = [entry["epoch"] for entry in history]
    train = [entry["train_perplexity"] for entry in history]
    figure, axes = new_figure(6.4, 4)
    axes.plot(epochs, train, "s:", color=GREY, label="training rows, with dropout and sampling, both directions")
    if "validation_perplexity" in history[0]:
        values = np.array([entry["validation_perplexity"] for entry in history])        # (E, 2)
        axes.plot(epochs, values[:, 0], "o-", color=BLUE, label="validation rows, forward")
        axes.plot(epochs, values[:, 1], "^-", color=ORANGE, label="validation rows, backward")
    if "kneser_ney_perplexity" in part["forward"]:
        counted = part["forward"]["kneser_ney_perplexity"]
        axes.axhline(counted, color=GREEN, linestyle="--", label="validation rows, forward 4-gram Kneser-Ney")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    ticks = [tick for tick in PERPLEXITY_TICKS if low <= tick <= high]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.xaxis.set_major_locator(MaxNLocator(integer=max(epochs) >= 2))
    title = (f"Validation perplexity ends at {part['forward']['perplexity']:.1f} forward, "
             f"{part['backward']['perplexity']:.1f} backward\n"
             f"(n = {part['tokens']:,} tokens, V = {result['vocabulary']:,})")
    label(axes, title, "epoch (passes over the training rows)", "perplexity (log scale)")
    legend(axes)
    return figure


def percent_of_gold(counts: np.ndarray) -> np.ndarray:
    """Counts (C, C), gold class by predicted class -> percent of each gold class (C, C)."""
    gold = counts.sum(axis=1, keepdims=True)
    return 100 * counts / np.maximum(gold, 1)


def confusion_matrix(axes: Axes, percent: np.ndarray, texts: list[str], names: list[str], size: float):
    """Draws percentages (C, C) of the classes `names`; returns the image. texts: of the C * C cells, or empty."""
    display = ConfusionMatrixDisplay(percent, display_labels=names)
    display.plot(ax=axes, cmap="cividis", colorbar=False, im_kw={"vmin": 0, "vmax": 100}, include_values=bool(texts))
    if texts:
        for cell, text, value in zip(display.text_.flat, texts, percent.flat, strict=True):
            cell.set_text(text)
            cell.set_fontsize(size)
            cell.set_color("black" if value > 55 else "white")
    axes.tick_params(labelsize=size + 1)
    for name in [*axes.get_xticklabels(), *axes.get_yticklabels()]:
        name.set_parse_math(False)                      # "$" in a name is a dollar sign
    return display.im_


def short_name(name: str | int) -> str:
    """The name of a class on one line, cut to 25 characters."""
    line = " ".join(str(name).split())
    return line if len(line) <= 25 else f"{line[:24]}…"


def word_confusion(confusion: dict) -> Figure:
    """Confusion matrix of the most frequent words, in percent of each gold word. The JSON has the counts."""
    words = confusion["words"]
    counts = np.array(confusion["counts"])
    percent = percent_of_gold(counts)
    texts = [f"{value:.0f}" if value >= MIN_SHOWN else "" for value in percent.flat]
    figure, axes = new_figure(8.4, 7.6)
    image = confusion_matrix(axes, percent, texts, words, size=8)
    axes.tick_params(axis="x", rotation=90)
    frequent = counts[:-1]                              # the last row holds all other words
    occurrences = frequent.sum()
    right = np.trace(frequent) / max(occurrences, 1)
    title = (f"The forward model is right on {right:.0%} of the {occurrences:,} occurrences "
             f"of the {len(frequent)} most frequent tokens\n"
             f"(of n = {counts.sum():,} test targets; percent of each gold word, from {MIN_SHOWN} % on)")
    label(axes, title, "predicted word", "gold word")
    figure.colorbar(image, ax=axes, shrink=0.7, label="percent of the gold word's occurrences")
    return figure


def class_confusion(labels: list[str | int], numbers: dict, rows: str) -> Figure:
    """Confusion matrix of the ensemble: counts, and percent of each gold class.

    With many classes everything is drawn smaller, so that the width is at most LARGEST; very small cells have no text.

    Args:
        labels: names of the classes.
        numbers: of one setting on one part of the rows.
        rows: name of setting and part, for the title.
    """
    counts = np.array(numbers["ensemble"]["confusion"])
    percent = percent_of_gold(counts)
    names = [short_name(name) for name in labels]
    size = len(labels)
    width = 0.85 * size + 1.4
    scale = min(1, LARGEST / width)
    texts = []
    if scale > 0.55:                                    # below, the letters would be too small to read
        texts = [f"{count:,}\n{value:.1f} %" for count, value in zip(counts.flat, percent.flat, strict=True)]
    figure, axes = new_figure(scale * width, scale * (0.75 * size + 0.9))
    image = confusion_matrix(axes, percent, texts, names, size=7 * scale)
    axes.tick_params(labelsize=min(8, 32 * scale))      # a name is lower than its row of 54 * scale points
    if size >= 8 or max(len(name) for name in names) > 13:
        axes.tick_params(axis="x", rotation=90)
    elif size > 4:
        axes.tick_params(axis="x", rotation=20)
    mistakes = counts.copy()
    np.fill_diagonal(mistakes, 0)
    gold, predicted = np.unravel_index(mistakes.argmax(), mistakes.shape)
    worst = "no row is mistaken"
    if mistakes.any():
        worst = f"most often {names[gold]} is taken for {names[predicted]}"
    seeds = len(numbers["seeds"])
    mean = f", mean probabilities of {seeds} seeds" if seeds > 1 else ""
    right = numbers["ensemble"]["accuracy"]
    label(axes, f"{rows}: {right:.2%} right{mean};\n{worst} (n = {counts.sum():,})", "predicted class", "gold class")
    axes.title.set(fontsize=7.5, parse_math=False)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, label="percent of the gold class")
    bar.ax.tick_params(labelsize=7)
    return figure


def validation_values(history: list, setting: str, key: str) -> np.ndarray:
    """(E, seeds) values of `key` at each evaluation. history: for each run its evaluations, with a value per seed."""
    values = []
    for run in history:
        values.append([entry["validation"][setting][key] for entry in run])
    return np.concatenate(values, axis=1)


def learning_curves(result: dict) -> Figure:
    """Accuracy and cross-entropy on validation rows for every setting: mean and range over seeds.

    The training loss is the mean over all heads since the last evaluation, with dropout and label smoothing.
    """
    history = result["history"]
    epochs = [entry["epoch"] for entry in history[0]]
    accuracy = {}
    loss = {}
    for setting in result["settings"]:
        accuracy[setting] = 100 * validation_values(history, setting, "accuracy")
        loss[setting] = validation_values(history, setting, "loss")
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot_settings(left, epochs, accuracy, "accuracy (%)")
    plot_settings(right, epochs, loss, "cross-entropy (nats per row)")
    train_loss = np.mean([[entry["train_loss"] for entry in run] for run in history], axis=0)
    with_phrases = result["task"].startswith("sst") and result["config"]["phrases"]
    name = f"training {'phrases' if with_phrases else 'rows'}, mean of all heads, with dropout and smoothing"
    right.plot(epochs, train_loss, "D:", color=GREY, label=name)
    last = {setting: values[-1].mean() for setting, values in accuracy.items()}
    best = max(last, key=last.get)
    n = result["settings"][best]["validation"]["ensemble"]["rows"]
    seeds = accuracy[best].shape[1]
    counted = f"{seeds} seeds; band: their range" if seeds > 1 else "1 seed"
    figure.suptitle(f"Validation accuracy ends at {last[best]:.1f} % with {best} (n = {n:,} rows, {counted})",
                    fontsize=10)
    lines, names = right.get_legend_handles_labels()
    figure.legend(lines, names, fontsize=8, frameon=False, loc="outside lower center", ncols=2)
    return figure


def plot_settings(axes: Axes, epochs: list[float], values: dict, unit: str) -> None:
    """Draws the mean over seeds of each setting as a line, and the range over seeds as a band.

    values: {setting: (E, seeds)}.
    """
    for (setting, seeds), colour, marker in zip(values.items(), COLOURS, MARKERS, strict=False):
        axes.plot(epochs, seeds.mean(axis=1), marker + "-", color=colour, label=f"{setting}, validation rows")
        plot_range(axes, epochs, seeds, colour)
    label(axes, "", "epoch (passes over the training rows)", unit)


def plot_range(axes: Axes, x: list[float], values: np.ndarray, colour: str) -> None:
    """Fills the band between smallest and largest value at each point; values (points, seeds)."""
    low = values.min(axis=1)
    high = values.max(axis=1)
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
