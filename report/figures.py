"""Figures of report/findings.py. Each function draws one finding; `r` is its entry in findings.json."""
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from run.figures import BLUE, GREEN, GREY, ORANGE, label, legend, new_figure, plot_range, save

SYSTEMS = {"elmo": ("ELMo", BLUE, "o-"),
           "word2vec": ("Word2Vec", ORANGE, "s-"),
           "tfidf": ("TF-IDF, linear", GREEN, "^-")}
LAYER_NAMES = ("layer 0", "layer 1", "layer 2")
LAYER_COLOURS = (GREY, BLUE, ORANGE)
CLASS_COLOURS = (BLUE, ORANGE, GREEN, GREY)
CLASS_MARKERS = "o^sD"
ACCURACY_TICKS = (0, 20, 40, 60, 70, 80, 85,
                  88, 90, 92, 94, 96, 98, 99, 99.5)


def findings(result: dict, out: Path) -> None:
    """Draws OUT/figures/finding_{name}.png for every finding in findings.json that has a picture."""
    for name, draw in FINDINGS.items():
        if name in result and result[name].get("example", True):
            save(draw(result[name]), out / "figures" / f"finding_{name}.png")


def leak_test(r: dict) -> Figure:
    """How much each hidden state of one row changes if one word is replaced by another."""
    example = r["example"]
    tokens = example["tokens"]
    figure = Figure(figsize=(7, 4.4))
    panels = figure.subplots(2, 1, sharex=True)
    for axes, direction in zip(panels, ("forward", "backward"), strict=True):
        colour = BLUE if direction == "forward" else ORANGE
        lower, upper = example[direction]
        axes.plot(lower, "o-", color=colour, markersize=4, label=f"{direction}, layer 1")
        axes.plot(upper, "o--", color=colour, markersize=4, label=f"{direction}, layer 2")
        axes.axvline(example["changed_word"], color=GREY, linewidth=0.8, linestyle=":")
        label(axes, "", "", "|change of the state|")
        legend(axes)
    panels[1].set_xticks(range(len(tokens)), tokens, rotation=60, ha="right", fontsize=8)
    before = r["moved_forward_before"] or "no"
    after = r["moved_backward_after"] or "no"
    figure.suptitle(f"A changed word moves {before} forward states before it and {after} backward states after it\n"
                    f"(shown: “{example['new']}” at the dotted line; n = {r['rows']} test rows)", fontsize=10)
    return figure


def similarity(r: dict) -> Figure:
    """Cosine similarity of every pair of words of one sentence, one panel per layer; negative cosines are shown too."""
    tokens = r["tokens"]
    layers = np.array(r["layers"])                                      # (3, T, T)
    lowest = layers.min()
    figure = Figure(figsize=(10.2, 4), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, values, name in zip(panels, layers, LAYER_NAMES, strict=True):
        image = axes.imshow(values, cmap="cividis", vmin=lowest, vmax=1)
        axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=11)
        axes.set_yticks(range(len(tokens)), tokens, fontsize=11)
        axes.set_xlabel(name, fontsize=12)
    word = max((token for token in tokens if token != "the"), key=tokens.count)
    first, second = [place for place, token in enumerate(tokens) if token == word]
    cosine = layers[:, first, second]                                   # (3,)
    figure.suptitle(f"The two uses of “{word}” are the same vector in layer 0; "
                    f"their cosine is {cosine[1]:.2f} in layer 1 and {cosine[2]:.2f} in layer 2", fontsize=13)
    figure.colorbar(image, ax=panels, shrink=0.7, label=f"cosine similarity, {lowest:.2f} to 1")
    return figure


def document_map(r: dict) -> Figure:
    """The t-SNE map of test rows, coloured by class."""
    figure, axes = new_figure(6.2, 5)
    points = np.array([r["x"], r["y"]])                                 # (2, N)
    classes = np.array(r["labels"])
    for i, name in enumerate(r["names"]):
        x, y = points[:, classes == i]
        axes.scatter(x, y, s=7, color=CLASS_COLOURS[i], marker=CLASS_MARKERS[i],
                     label=name, alpha=0.6, linewidths=0)
    title = (f"Without labels {r['same']:.0%} of the documents have a nearest neighbour of their own class\n"
             f"(n = {r['rows']:,} test rows, mean vector over words and layers, by cosine)")
    label(axes, title, "t-SNE, first axis (no unit)", "t-SNE, second axis (no unit)")
    legend(axes, markerscale=2)
    return figure


def layer_weights(r: dict) -> Figure:
    """Layer weights s_0, s_1 and s_2 that each task learned: bars are means over seeds, dots are single seeds."""
    figure, axes = new_figure(6.8, 3.8)
    tasks = {task: np.array(run["s"]) for task, run in r["tasks"].items()}      # each (seeds, 3)
    means = np.array([s.mean(axis=0) for s in tasks.values()])                  # (tasks, 3)
    places = np.arange(len(tasks))
    for j, name in enumerate(LAYER_NAMES):
        x = places + 0.27 * (j - 1)
        axes.bar(x, means[:, j], 0.25, color=LAYER_COLOURS[j], label=name)
        for place, s in zip(x, tasks.values(), strict=True):
            axes.plot([place] * len(s), s[:, j], ".", color="black", markersize=4)
    axes.axhline(1 / 3, color="black", linewidth=0.8, linestyle=":")
    names = []
    for task, s in tasks.items():
        plural = "s" if len(s) > 1 else ""
        names.append(f"{task}, {len(s)} seed{plural}".replace(", ", ",\n"))
    axes.set_xticks(places, names, fontsize=8)
    top = np.sum(means.argmax(axis=1) == 2)
    title = (f"The top layer has the largest weight in {top} of {len(tasks)} runs, mean over seeds\n"
             "(dots: seeds; dotted: equal weights)")
    label(axes, title, "", "softmax-normalised layer weight s")
    legend(axes, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.22))
    return figure


def sense_bars(r: dict) -> Figure:
    """For each layer, the share of uses whose class is predicted by the nearest uses' vote, and by the nearest use."""
    figure, axes = new_figure(5.6, 3.8)
    votes = 100 * np.array(r["votes"])                                  # (3,)
    nearest = 100 * np.array(r["layers"])                               # (3,)
    interval = 100 * np.array(r["interval"])                            # (3, 2)
    errors = np.abs(interval.T - votes)
    axes.bar(LAYER_NAMES, votes, color=BLUE, width=0.6, yerr=errors, capsize=4,
             label=f"vote of the {r['voters']} nearest uses")
    for j, vote in enumerate(votes):
        axes.text(j, 2, f"{vote:.1f}", ha="center", color="white", fontsize=9)
    axes.plot(LAYER_NAMES, nearest, "D", color="white", markeredgecolor="black",
              label="the nearest use only")
    axes.axhline(100 * r["majority"], color=ORANGE, linestyle="--",
                 label="the word's most frequent class")
    axes.set_ylim(0, 100)
    best = r["best"]
    title = (f"Layer {best}, best on validation rows, predicts the class of {votes[best]:.1f} % of uses\n"
             f"({len(r['words'])} words, n = {r['uses']:,} test uses; 95 % interval over words)")
    label(axes, title, "", "uses with the right class (%)")
    legend(axes, loc="upper left")
    return figure


def few_labels(r: dict) -> Figure:
    """Test accuracy by share of the labels: mean and range over seeds. The accuracy axis is the log of the error."""
    figure, axes = new_figure(6.4, 4)
    shares = r["shares"]
    means = {}
    for system, points in r["systems"].items():
        name, colour, style = SYSTEMS[system]
        tests = [100 * np.array(point["test"]) for point in points]     # each (seeds,)
        means[system] = [test.mean() for test in tests]
        axes.plot(shares, means[system], style, color=colour, label=name)
        ranges = [(test.min(), test.max()) for test in tests]
        plot_range(axes, shares, np.array(ranges), colour)
    axes.set_yscale("function", functions=(
        lambda accuracy: -np.log10(np.maximum(100 - accuracy, 0.1)),    # as far from 0 % to 90 % as from 90 % to 99 %
        lambda height: 100 - 10 ** -height))
    low, high = axes.get_ylim()
    ticks = [tick for tick in ACCURACY_TICKS if low <= tick <= high]
    if len(ticks) >= 2:
        axes.set_yticks(ticks)
    axes.set_xscale("log")
    names = [f"{share:g}\n({rows:,})" for share, rows in zip(shares, r["rows"], strict=True)]
    axes.set_xticks(shares, names, fontsize=8)
    axes.minorticks_off()
    elmo = means["elmo"][shares.index(1.0)]
    word2vec = means["word2vec"][shares.index(3.0)]
    title = (f"With 1 % of the labels ELMo is right on {elmo:.1f} %, Word2Vec with 3 % on {word2vec:.1f} %\n"
             f"(and {r['chosen_on']:,} to choose weights by; n = {r['measured']:,} test rows; "
             "band: range over seeds)")
    label(axes, title, "labelled training rows (% of them, log scale)",
          "test accuracy (%, log scale of the error)")
    legend(axes, loc="lower right")
    return figure


FINDINGS = {
    "leaks": leak_test,
    "heatmap": similarity,
    "map": document_map,
    "weights": layer_weights,
    "senses": sense_bars,
    "labels": few_labels}
