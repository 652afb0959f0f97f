"""Figures of both scripts from their JSON: legible at print size, colour-blind safe, titled by what they show.

`python report/figures.py [DIR]` draws those of DIR (default models/) again from the JSON there.
"""
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # run as `python report/figures.py`

from data.files import write_atomically, written_json
from data.knobs import script

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"      # Okabe and Ito 2008


def save(figure, path: Path) -> None:
    """`figure` as a PNG of 200 dots an inch, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, bbox_inches="tight", metadata={"Software": None})
    write_atomically(path, lambda file: file.write(buffer.getvalue()))


def pretraining(result: dict, out: Path) -> None:
    """OUT/curves_pretraining.png and OUT/confusion_words.png of a pretraining.json."""
    if result["history"]:
        save(curves(result), out / "curves_pretraining.png")
    if len(result["confusion"]["words"]) > 1:
        save(words_confused(result), out / "confusion_words.png")


def new_figure(width: float, height: float):
    """(figure, axes) without a window system, so that scripts draw on any machine."""
    figure = Figure(figsize=(width, height))
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def heat_map(axes, values: np.ndarray, names: list[str], most: float, rotation: float = 0, size: float = 8):
    """The picture of a square matrix from 0 to `most`, the same names along both sides in letters of `size`."""
    axes.set_xticks(range(len(names)), names, rotation=rotation, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    return axes.imshow(values, cmap="cividis", vmin=0, vmax=most)


def curves(result: dict):
    """Perplexity after each epoch: validation rows in both directions, training rows, and Kneser-Ney as a line."""
    history = result["history"]
    figure, axes = new_figure(6.4, 4)
    epochs = [entry["epoch"] for entry in history]
    axes.plot(epochs, [entry["train_perplexity"] for entry in history], "s:", color=GREY,
              label="training rows, with dropout and sampling, both directions")
    part = result["splits"]["validation"]
    if "validation_perplexity" in history[0]:
        for d, (name, colour, marker) in enumerate((("forward", BLUE, "o"), ("backward", ORANGE, "^"))):
            axes.plot(epochs, [entry["validation_perplexity"][d] for entry in history], marker + "-", color=colour,
                      label=f"validation rows, {name}")
    if "kneser_ney_perplexity" in part["forward"]:
        axes.axhline(part["forward"]["kneser_ney_perplexity"], color=GREEN, linestyle="--",
                     label="validation rows, forward 4-gram Kneser-Ney")
    axes.set(xlabel="epoch (passes over the training rows)", ylabel="perplexity (log scale)", yscale="log")
    low, high = axes.get_ylim()
    ticks = [t for t in (1, 2, 3, 5, 8, 12, 20, 30, 50, 70, 100, 150, 200, 300, 500, 1000, 2000) if low <= t <= high]
    axes.set_yticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.xaxis.set_major_locator(MaxNLocator(integer=max(epochs) >= 2))
    best = [part[d]["perplexity"] for d in ("forward", "backward")]
    axes.set_title(f"Validation perplexity ends at {best[0]:.1f} forward, {best[1]:.1f} backward\n"
                   f"(n = {part['tokens']:,} tokens, V = {result['vocabulary']:,})", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    return figure


def words_confused(result: dict):
    """Confusion matrix of the most frequent words as a heat map of row shares, counts left to the JSON."""
    words, counts = result["confusion"]["words"], np.array(result["confusion"]["counts"], dtype=float)
    share = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axes = new_figure(8.4, 7.6)
    image = heat_map(axes, share, words, 100, rotation=90, size=9)
    for i, j in zip(*np.nonzero(share >= 5), strict=True):
        axes.text(j, i, f"{share[i, j]:.0f}", ha="center", va="center", fontsize=8,
                  color="black" if share[i, j] > 55 else "white")
    axes.set(xlabel="predicted word", ylabel="gold word")
    hit = np.trace(counts[:-1, :-1]) / max(counts[:-1].sum(), 1)
    axes.set_title(f"The forward model is right on {hit:.0%} of the {int(counts[:-1].sum()):,} occurrences of the "
                   f"{len(words) - 1} most frequent tokens\n"
                   f"(of n = {int(counts.sum()):,} test targets; percent of each gold word, from 5 % on)",
                   fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.7, label="percent of the gold word's occurrences")
    return figure


def classification(result: dict, out: Path, stem: str) -> None:
    """Confusion matrices of train and test rows per setting, and learning curves, of a classification JSON."""
    begin = f"{stem}_" if stem else ""
    for setting in result["settings"]:
        for part in ("train", "test"):
            save(classes_confused(result, setting, part), out / f"confusion_{begin}{setting}_{part}.png")
    save(learning(result), out / f"curves_{stem or 'classification'}.png")


def classes_confused(result: dict, setting: str, part: str):
    """Confusion matrix of the seeds' mean probabilities: counts, and percent of each gold class."""
    labels, numbers = result["labels"], result["settings"][setting][part]
    counts = np.array(numbers["together"]["confusion"])
    share = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axes = new_figure(0.85 * len(labels) + 1.4, 0.75 * len(labels) + 0.9)
    image = heat_map(axes, share, labels, 100, rotation=20 if len(labels) > 4 else 0)
    axes.spines[:].set_visible(False)
    for i in range(len(labels)):
        for j in range(len(labels)):
            axes.text(j, i, f"{counts[i, j]:,}\n{share[i, j]:.1f} %", ha="center", va="center", fontsize=7,
                      color="black" if share[i, j] > 55 else "white")
    axes.set(xlabel="predicted class", ylabel="gold class")
    off = counts - np.diag(np.diag(counts))
    i, j = np.unravel_index(off.argmax(), off.shape)
    worst = f"most often {labels[i]} is taken for {labels[j]}" if off.any() else "no row is mistaken"
    seeds = len(numbers["seeds"])
    mean = f", mean probabilities of {seeds} seeds" if seeds > 1 else ""
    linear = " with n-grams" * ("ngrams" in result)
    axes.set_title(f"{setting}{linear}, {part} rows: {numbers['together']['accuracy']:.2%} right{mean};\n"
                   f"{worst} (n = {counts.sum():,})", fontsize=7.5)
    figure.colorbar(image, ax=axes, shrink=0.8, label="percent of the gold class").ax.tick_params(labelsize=7)
    return figure


def learning(result: dict):
    """Accuracy and cross-entropy on the validation rows of every setting, mean over seeds, with the seeds' range.

    The training line is the mean of all heads since the evaluation before, with dropout and label smoothing.
    """
    figure, history, best = Figure(figsize=(9, 3.8), layout="constrained"), result["history"], []
    epochs, panels = [entry["epoch"] for entry in history[0]], figure.subplots(1, 2)
    for axes, key, unit in zip(panels, ("accuracy", "loss"), (100, 1), strict=True):
        for setting, colour, marker in zip(result["settings"], (BLUE, ORANGE, GREEN), "os^", strict=False):
            values = unit * np.array([[x for run in history for x in run[i]["validation"][setting][key]]
                                      for i in range(len(epochs))])             # (evaluations, seeds)
            axes.plot(epochs, values.mean(axis=1), marker + "-", color=colour, label=f"{setting}, validation rows")
            axes.fill_between(epochs, values.min(axis=1), values.max(axis=1), color=colour, alpha=0.15, linewidth=0)
            if key == "accuracy":
                best.append((values.mean(axis=1)[-1], setting))
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("epoch (passes over the training rows)")
    panels[0].set_ylabel("accuracy (%)")
    panels[1].set_ylabel("cross-entropy (nats a row)")
    kind = "phrases" if result["task"].startswith("sst") and result["config"]["phrases"] else "rows"
    panels[1].plot(epochs, [np.mean([run[i]["train_loss"] for run in history]) for i in range(len(epochs))], "D:",
                   color=GREY, label=f"training {kind}, mean of all heads, with dropout and smoothing")
    last = result["settings"][max(best)[1]]["validation"]["together"]["rows"]
    plain = ", without n-grams" if "ngrams" in result else ""
    figure.suptitle(f"Validation accuracy ends at {max(best)[0]:.1f} % with {max(best)[1]}{plain} (n = {last:,} rows, "
                    f"{values.shape[1]} seed{'s; band: their range' if values.shape[1] > 1 else ''})", fontsize=10)
    lines = panels[1].get_legend_handles_labels()
    figure.legend(*lines, fontsize=8, frameon=False, loc="outside lower center", ncols=2)
    return figure


# ------------------------------------------------------------------------------------------ report/findings.py
def findings(result: dict, out: Path) -> None:
    """OUT/finding_{name}.png of every finding of a findings.json that is a picture."""
    for name, draw in FINDINGS.items():
        if name in result and result[name].get("example", True):
            save(draw(result[name]), out / f"finding_{name}.png")


SYSTEMS = {"elmo": ("ELMo", BLUE, "o"), "word2vec": ("Word2Vec", ORANGE, "s"), "tfidf": ("TF-IDF, linear", GREEN, "^")}
LAYER_NAMES = ("layer 0", "layer 1", "layer 2")


def few_labels(r: dict):
    """Test accuracy by share of the labels, mean over seeds with their range; spaced by the log of the error."""
    figure, axes = new_figure(6.4, 4)
    means = {name: [100 * np.mean(point["test"]) for point in points] for name, points in r["systems"].items()}
    for name, points in r["systems"].items():
        title, colour, marker = SYSTEMS[name]
        low, high = ([100 * f(point["test"]) for point in points] for f in (min, max))
        axes.plot(r["shares"], means[name], marker + "-", color=colour, label=title)
        axes.fill_between(r["shares"], low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_yscale("function", functions=(lambda y: -np.log10(np.maximum(100 - y, 0.1)), lambda y: 100 - 10 ** -y))
    low, high = axes.get_ylim()
    ticks = [tick for tick in (0, 20, 40, 60, 70, 80, 85, 88, 90, 92, 94, 96, 98, 99, 99.5) if low <= tick <= high]
    if len(ticks) >= 2:
        axes.set_yticks(ticks)
    axes.set(xscale="log", xlabel="labelled training rows (% of them, log scale)",
             ylabel="test accuracy (%, log scale of the error)")
    axes.set_xticks(r["shares"], [f"{share:g}\n({n:,})" for share, n in zip(r["shares"], r["rows"], strict=True)],
                    fontsize=8)
    axes.minorticks_off()
    one, three = r["shares"].index(1.0), r["shares"].index(3.0)
    axes.set_title(f"With 1 % of the labels ELMo is right on {means['elmo'][one]:.1f} %, Word2Vec with 3 % on "
                   f"{means['word2vec'][three]:.1f} %\n(and {r['chosen_on']:,} "
                   f"to choose weights by; n = {r['measured']:,} test rows; band: range over seeds)",
                   fontsize=10)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def sense_bars(r: dict):
    """Share of uses whose class the nearest uses vote for, by layer, and that of the nearest use alone."""
    figure, axes = new_figure(5.6, 3.8)
    values, spread = 100 * np.array(r["votes"]), 100 * np.array(r["interval"])
    bars = axes.bar(LAYER_NAMES, values, color=BLUE, width=0.6, yerr=np.abs(spread.T - values),
                    capsize=4, ecolor="black", label=f"vote of the {r['voters']} nearest uses")
    for bar, value in zip(bars, values, strict=True):
        axes.text(bar.get_x() + bar.get_width() / 2, 2, f"{value:.1f}", ha="center", color="white", fontsize=9)
    axes.plot(LAYER_NAMES, 100 * np.array(r["layers"]), "D", color="white", markeredgecolor="black",
              label="the nearest use alone")
    axes.axhline(100 * r["majority"], color=ORANGE, linestyle="--", label="the word's most frequent class among these")
    axes.set(ylabel="class of a use is told (%)", ylim=(0, 100))
    best = r["best"]
    axes.set_title(f"Layer {best}, best on validation rows, tells the class of {values[best]:.1f} % of uses\n"
                   f"({len(r['words'])} words, n = {r['uses']:,} test uses; 95 % interval over words)", fontsize=10)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    return figure


def layer_weights(r: dict):
    """s_0, s_1 and s_2 of each task, mean over seeds, each seed as a dot."""
    figure, axes = new_figure(6.8, 3.8)
    tasks, colours = list(r["tasks"]), (GREY, BLUE, ORANGE)
    for j in range(3):
        at = np.arange(len(tasks)) + 0.27 * (j - 1)
        axes.bar(at, [np.mean(run["s"], axis=0)[j] for run in r["tasks"].values()], 0.25, color=colours[j],
                 label=LAYER_NAMES[j])
        for x, run in zip(at, r["tasks"].values(), strict=True):
            axes.plot([x] * len(run["s"]), [s[j] for s in run["s"]], ".", color="black", markersize=4)
    axes.axhline(1 / 3, color="black", linewidth=0.8, linestyle=":")
    names = [f"{task}, {len(run['s'])} seed{'s' * (len(run['s']) > 1)}" for task, run in r["tasks"].items()]
    axes.set_xticks(range(len(tasks)), [name.replace(", ", ",\n") for name in names], fontsize=8)
    axes.set(ylabel="softmax-normalised layer weight s")
    top = [task for task, run in r["tasks"].items() if np.mean(run["s"], axis=0).argmax() == 2]
    axes.set_title(f"The top layer weighs most in {len(top)} of {len(tasks)} runs, mean over seeds\n"
                   "(dots: seeds; dotted: equal weights)", fontsize=10)
    axes.legend(fontsize=8, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.22))
    return figure


def similarity(r: dict):
    """Cosine similarity of each two words of a sentence, a panel a layer."""
    figure = Figure(figsize=(10.2, 4), layout="constrained")
    panels, layers = figure.subplots(1, 3, sharey=True), np.array(r["layers"])
    for j, axes in enumerate(panels):
        image = heat_map(axes, layers[j], r["tokens"], 1, rotation=90, size=11)
        axes.set_xlabel(LAYER_NAMES[j], fontsize=12)
    word = max((t for t in r["tokens"] if r["tokens"].count(t) == 2 and t != "the"), key=len)
    a, b = (i for i, token in enumerate(r["tokens"]) if token == word)
    figure.suptitle(f"The two uses of “{word}” are the same vector in layer 0, and alike by {layers[1, a, b]:.2f} and "
                    f"{layers[2, a, b]:.2f} above it", fontsize=13)
    figure.colorbar(image, ax=panels, shrink=0.7, label="cosine similarity")
    return figure


def document_map(r: dict):
    """Test rows in the plane, coloured by class."""
    figure, axes = new_figure(6.2, 5)
    points, gold = np.stack([r["x"], r["y"]], axis=1), np.array(r["labels"])
    for c, (name, colour, marker) in enumerate(zip(r["names"], (BLUE, ORANGE, GREEN, GREY), "o^sD", strict=True)):
        axes.scatter(*points[gold == c].T, s=7, color=colour, marker=marker, label=name, alpha=0.6, linewidths=0)
    axes.set(xlabel="t-SNE, first axis (no unit)", ylabel="t-SNE, second axis (no unit)")
    axes.set_title(f"Without labels {r['same']:.0%} of the documents have a nearest neighbour of their own class\n"
                   f"(n = {r['rows']:,} test rows, mean vector over words and layers, by cosine)", fontsize=10)
    axes.legend(fontsize=8, frameon=False, markerscale=2)
    return figure


def leak_test(r: dict):
    """Which states move when one word of a row becomes another."""
    figure = Figure(figsize=(7, 4.4))
    panels, shown = figure.subplots(2, 1, sharex=True), r["example"]
    for axes, (name, colour) in zip(panels, (("forward", BLUE), ("backward", ORANGE)), strict=True):
        for j, style in enumerate(("-", "--")):
            axes.plot(shown[name][j], "o" + style, color=colour, markersize=4, label=f"{name}, layer {j + 1}")
        axes.axvline(shown["changed_word"], color=GREY, linewidth=0.8, linestyle=":")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylabel("|change of the state|", fontsize=8)
        axes.legend(fontsize=8, frameon=False)
    panels[1].set_xticks(range(len(shown["tokens"])), shown["tokens"], rotation=60, ha="right", fontsize=8)
    figure.suptitle(f"A changed word moves {r['moved_forward_before'] or 'no'} forward states before it and "
                    f"{r['moved_backward_after'] or 'no'} backward ones after it\n(shown: “{shown['new']}” at the "
                    f"dotted line; n = {r['rows']} test rows)", fontsize=10)
    return figure


FINDINGS = {"leaks": leak_test, "heatmap": similarity, "map": document_map, "weights": layer_weights,
            "senses": sense_bars, "labels": few_labels}


@script("figures.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 2 where there is no JSON or one is not what the scripts write."""
    argv = sys.argv[1:] if argv is None else argv
    folder = Path(argv[0]) if argv else Path(__file__).resolve().parent.parent / "models"
    for path in sorted(folder.glob("*.json")) or [folder / "pretraining.json"]:
        with written_json(path) as result:
            if path.stem == "pretraining":
                pretraining(result, folder)
            elif path.stem == "findings":
                findings(result, folder)
            elif path.stem == "classification" or "settings" in result:      # bench.json, say, has no figure
                classification(result, folder, path.stem.replace("classification", ""))
    print(f"drew the figures of {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
