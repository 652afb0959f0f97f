"""The README's tables of numbers, written from models/*.json between their markers, so that none is typed by hand.

`python report/readme.py` rewrites README.md; a test holds it to the JSON.
"""
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # run as `python report/readme.py`

from data.files import read_text, write_atomically, written_json
from data.knobs import script

ROOT = Path(__file__).resolve().parent.parent
DIRECTIONS = ("forward", "backward")


def pretraining(r: dict) -> str:
    """Perplexities of the published biLM beside the counting models, then how it was made."""
    lines = ["| perplexity on | rows | forward | backward | Kneser-Ney, forward | backward | unigram |",
             "|---|--:|--:|--:|--:|--:|--:|"]
    for name, part in r["splits"].items():
        for label, p in ((f"{name}, all", part), (f"{name}, fresh", part.get("fresh"))):
            if p and p["rows"]:
                numbers = [p[d][key] for key in ("perplexity", "kneser_ney_perplexity") for d in DIRECTIONS]
                cells = [label, f"{p['rows']:,}", *(f"{n:.1f}" for n in numbers), f"{p['unigram_perplexity']:.0f}"]
                lines.append(f"| {' | '.join(cells)} |")
    unknown, test = r["unknown"], r["splits"]["test"]["forward"]
    return "\n".join(lines) + f"""

Vocabulary {r['vocabulary']:,} words (min-count {r['config']['min_count']}, lower-cased); `<unk>` is
{unknown['train']:.2%} of training, {unknown['validation']:.2%} of validation and {unknown['test']:.2%} of test tokens;
end symbols count, the softmax is the full one. On all test rows the forward model names the next word right
{test['accuracy']:.1%} of the time, and has it among its first five {test['top5_accuracy']:.1%}.

Made by `{r['command']}` in {r['minutes']:.0f} minutes, evaluation and figures included, on
{r['machine']['cores']} cores ({r['machine']['device']}, {r['precision']}), {r['tokens_per_second']:,.0f} targets a
second, {r['peak_memory_gb']:.1f} GB of memory; {r['parameters'] / 1e6:.1f} million weights in {r['file_mb']:.1f} MB."""


def bench(r: dict) -> str:
    """Speeds and ratios of one run of report/bench.py."""
    peak = f"the machine's own {r['peak']['precision']} matrix peak ({r['peak']['gflops']:,.0f} GFLOP/s)"
    rows = [("targets a second, training", f"{r['tokens_per_second']:,.0f}")]
    rows += [(f"times {what}", f"{r[key]:.1f}") for what, key in (
        ("the common loop, padded to the corpus's longest row", "times_common_loop"),
        ("the common loop, padded per batch", "times_common_loop_batch_padded"),
        ("a plain PyTorch loop of the same model, full softmax, fp32", "times_plain_fp32"),
        ("the same in bf16", "times_plain_bf16")) if key in r]
    rows += [(f"share of {peak}", f"{r['share_of_peak']:.0%}"),
             ("share of a step's time that its matrix products take alone", f"{r['share_of_products']:.0%}")]
    rows += [(f"step time with {size} words over 10,000", f"{r[key]:.2f}") for size, key in (
        ("100,000", "step_time_100k_over_10k"), ("800,000", "step_time_800k_over_10k"))]
    rows += [(f"{what} a second", f"{r[key]:,.0f}") for what, key in (
        ("descriptions embedded, fp32,", "embed_fp32_per_second"),
        ("descriptions embedded, bf16,", "embed_bf16_per_second"), ("descriptions classified", "predict_per_second"),
        ("rows tokenized", "tokenize_rows_per_second")) if key in r]
    rows += [("seconds to start", f"{r['startup_seconds']:.1f}")]
    if "scaling" in r:
        sizes = ", ".join(f"{part['rows']:,}" for part in r["scaling"])
        rows += [(f"seconds to tokenize and train on {sizes} built-in rows",
                  ", ".join(f"{part['seconds']:.1f}" for part in r["scaling"])),
                 ("memory of these, GB", ", ".join(f"{part['peak_memory_gb']:.2f}" for part in r["scaling"])),
                 ("largest difference of the seconds a row from their mean over these", f"{r['off_linear']:.0%}"),
                 ("targets a second of one process of one thread, of two that share every batch",
                  f"{r['processes']['one']:,.0f}, {r['processes']['two']:,.0f}")]
    lines = ["| what | measured |", "|---|--:|", *(f"| {what} | {value} |" for what, value in rows), ""]
    if "passes" in r:
        lines += passes(r["passes"])
    if "to_perplexity" in r:
        lines += to_perplexity(r["to_perplexity"])
    lines.append(f"Made by `{r['command']}` on {on(r['machine'])}.")
    lines += [f"\nOn {on(other['machine'])}: {other['tokens_per_second']:,.0f} targets a second, "
              f"{other['share_of_peak']:.0%} of that machine's {other['peak']['precision']} peak "
              f"({other['bf16_gflops']:,.0f} GFLOP/s, fp32 {other['fp32_gflops']:,.0f}), products "
              f"{other['share_of_products']:.0%} of a step."
              for other in r["devices"].values()]
    return "\n".join(lines)


def on(machine: dict) -> str:
    """2 cores (AMD EPYC, with bf16 hardware), or the instructions that multiply bf16 where they are known."""
    by = machine.get("bf16_by")
    bf16 = f"bf16 by {by}" if by else f"{'with' if machine['bf16_hardware'] else 'without'} bf16 hardware"
    return f"{machine['cores']} cores ({machine['device']}, {bf16})"


def passes(r: dict) -> list[str]:
    """Lines of a table of passes: their share of the peak of their precision, and the kernels that take most time."""
    names = {"training": "training", "classification": "classification, frozen biLM, nine heads",
             "embed_fp32": "embedding, fp32", "embed_bf16": "embedding, bf16"}
    lines = ["| pass | share of peak, padding counted | share of its time by kernel |", "|---|--:|---|"]
    for name, part in r.items():
        large = [f"`{kernel}` {share:.0%}" for kernel, share in part["kernels"].items() if kernel != "others"]
        lines.append(f"| {names[name]} | {part['share_of_peak']:.0%} | {', '.join(large[:6])} |")
    return [*lines, ""]


def to_perplexity(r: dict) -> list[str]:
    """Lines of a table of minutes to a given validation perplexity, one loop a row."""
    names = {"elmo": "this", "plain_fp32": "plain loop, fp32", "plain_bf16": "plain loop, bf16",
             "common_loop_batch_padded": "common loop, padded per batch"}
    lines = [f"| {r['rows']:,} training rows, to validation perplexity {r['perplexity']:g} | minutes |", "|---|--:|"]
    for name, minutes in r["minutes"].items():
        missed = f"not in {r['most_minutes']:g} ({r['ended'][name]:.0f} then)"
        lines.append(f"| {names[name]} | {missed if minutes is None else format(minutes, '.1f')} |")
    return [*lines, "", f"Made by `{r['command']}`.", ""]


def faults(r: dict) -> str:
    """What was tried and what survived, one kind of fault a row."""
    names = {"kills": "SIGKILL, SIGTERM or SIGINT at a random moment, resumed: same weights bit for bit",
             "damaged_files": "checkpoints cut short or with bytes flipped: refused, or equal",
             "bad_inputs": "malformed CSV, TOML, JSON and .pt files: one sentence, exit status 2, nothing written",
             "disk_full": "disk full while saving: one sentence, no part of a file, resumed to the same weights",
             "two_runs": "a second run on the same folder: says so and stops, the first is not disturbed",
             "code": ".pt files that would run code: refused",
             "nan": "loss not a number: stops, names the step, keeps the state before it"}
    lines = ["| fault | tried | survived |", "|---|--:|--:|"]
    lines += [f"| {what} | {r[name]['tried']} | {r[name]['survived']} |" for name, what in names.items()]
    return "\n".join([*lines, "", f"Made by `{r['command']}` in {r['seconds'] / 60:.0f} minutes."])


def percent(x: float) -> str:
    """92.43 of 0.92425: a tie goes up, as in the report, though the binary fraction may lie below it."""
    return f"{100 * x + 1e-9:.2f}"


def share_of(number: dict) -> str:
    """91.23 ± 0.10, in percent; without a deviation the mean alone."""
    deviation = number["deviation"]
    return percent(number["mean"]) + ("" if deviation is None else f" ± {percent(deviation)}")


def made(r: dict) -> str:
    """How a classification JSON came about."""
    return f"Made by `{r['command']}` in {r['minutes']:.0f} minutes on {on(r['machine'])}."


def mix(n: dict) -> str:
    """Layer weights of the saved head of a setting."""
    if not n["s"]:
        return "learned"
    return f"{', '.join(f'{w:.2f}' for w in n['s'][n['best']])}; {n['gamma'][n['best']]:.2f}"


def accuracies(n: dict) -> dict[str, str]:
    """Cells of the accuracies on each part, of a setting or of what it is without n-grams."""
    test = n["test"]
    cells = {"train": share_of(n["train"]["accuracy"]), "validation": share_of(n["validation"]["accuracy"]),
             "test": share_of(test["accuracy"])}
    cells |= {"test, fresh": share_of(test["fresh"]["accuracy"])} if "fresh" in test else {}
    several = test["accuracy"]["deviation"] is not None
    return cells | ({"together": percent(test["together"]["accuracy"])} if several else {})


def classification(r: dict) -> str:
    """Accuracy and macro-F1 of each setting, its layer weights, and how they were made."""
    first = next(iter(r["settings"].values()))
    seeds = len(first["test"]["seeds"])
    marks = "mean ± deviation of" if seeds > 1 else "of"
    rows = []
    for setting, n in r["settings"].items():
        rows.append({"setting": setting} | accuracies(n) | {
            "macro-F1, test": f"{n['test']['macro_f1']['mean']:.4f}",
            "calibration error": f"{n['test']['together']['calibration_error']:.3f}", "s_0, s_1, s_2; gamma": mix(n)})
        if "ngrams" in r:
            plain = {part: n[part]["without_ngrams"] for part in ("train", "validation", "test")}
            rows.append(dict.fromkeys(rows[0], "") | {"setting": "without n-grams"} | accuracies(plain))
    counted = {part: f"{part} ({first[part]['together']['rows']:,} rows)" for part in ("train", "test")}
    lines = [f"| {' | '.join(counted.get(name, name) for name in rows[0])} |", "|---|" + "--:|" * (len(rows[0]) - 1),
             *(f"| {' | '.join(row.values())} |" for row in rows)]
    together = ("; *together* and the calibration\nerror are those of the seeds' mean "
                "probabilities, s and gamma those of the saved seed") * (seeds > 1)
    linear = "" if "ngrams" not in r else (
        f"\nThe linear model alone: {r['ngrams']['accuracy']['validation']:.2%} of validation and "
        f"{r['ngrams']['accuracy']['test']:.2%} of test rows; its share is {r['ngrams']['share']:.4g}.")
    return "\n".join(lines) + f"""

Accuracy in percent, {marks} {seeds} seed{'s' * (seeds > 1)}{together}.{linear}
{made(r)}"""


def baselines(r: dict) -> str:
    """Every system's accuracy, and its difference from Word2Vec and TF-IDF with exact McNemar tests."""
    head = ["system", "validation", "test", "test, fresh", "together", *(f"against {name}" for name in (
        "Word2Vec", "TF-IDF", "layer 0"))]
    lines = [f"| {' | '.join(head)} |", "|---|" + "--:|" * (len(head) - 1)]
    for name, n in r["rows"].items():
        against = [f"{100 * a['difference']:+.2f} ({100 * a['interval'][0]:+.2f} to {100 * a['interval'][1]:+.2f}), "
                   f"p = {a['p']:.1g}" if a else "" for a in map(n["against"].get, ("word2vec", "tfidf", "layer0"))]
        lines.append("| " + " | ".join([
            NAMES.get(name, f"ELMo, {name}") + ", with n-grams" * n["ngrams"], share_of(n["validation"]),
            share_of(n["test"]), share_of(n["fresh"]) if n["fresh"] else "-", percent(n["together"]),
            *against]) + " |")
    return "\n".join(lines) + f"""

Accuracy in percent. Differences are those of *together* on all test rows, with 95 % bootstrap intervals; p is of the
exact two-sided McNemar test, not corrected for their number. TF-IDF is one model, its knobs chosen on validation rows.
Made by `{r['command']}` in {r['minutes']:.0f} minutes."""


def findings(r: dict) -> str:
    """The paper's findings, as far as they are there: few labels, variants of the mix, senses, leaks."""
    lines = []
    if "labels" in r:
        shares = [f"{share:g} %" for share in r["labels"]["shares"]]
        lines += [f"| test accuracy with labels of | {' | '.join(shares)} |", "|---|" + "--:|" * len(shares)]
        for name, points in r["labels"]["systems"].items():
            means = [f"{percent_of(point):.1f}" for point in points]
            lines.append(f"| {NAMES.get(name, 'ELMo, trainable')} | {' | '.join(means)} |")
        seeds = ", ".join(str(len(point["test"])) for point in r["labels"]["systems"]["elmo"])
        chosen = (f"Accuracy in percent, mean of {seeds} seeds (TF-IDF's last of one); below all labels "
                  f"{r['labels']['chosen_on']:,} labelled validation rows besides choose weights.\n")
        lines += ["", chosen + made_finding(r["labels"]), ""]
    if "mixes" in r:
        lines += [f"| with {r['mixes']['rows']:,} labelled rows | validation | test |", "|---|--:|--:|"]
        lines += [f"| {name} | {share_of(n['validation'])} | {share_of(n['test'])} |"
                  for name, n in r["mixes"]["variants"].items()]
        lines += ["", made_finding(r["mixes"]), ""]
    if "senses" in r:
        n = r["senses"]
        layers = [f"| layer {j} | {100 * near:.1f} | {100 * vote:.1f} |"
                  for j, (near, vote) in enumerate(zip(n["layers"], n["votes"], strict=True))]
        lines += [f"| class of {n['uses']:,} test uses of {len(n['words'])} words, told by | nearest of up to "
                  f"{n['pool']} training uses | vote of the {n['voters']} nearest |", "|---|--:|--:|",
                  f"| the word's most frequent class | {100 * n['majority']:.1f} | |", *layers, "", made_finding(n), ""]
    if "leaks" in r:
        n = r["leaks"]
        lines += [f"In {n['rows']} test rows one word became another: {n['moved_forward_before']} forward states "
                  f"before it and {n['moved_backward_after']} backward ones after it moved. {made_finding(n)}"]
    return "\n".join(lines)


def percent_of(point: dict) -> float:
    """Mean test accuracy over the seeds of a share of the labels."""
    return 100 * sum(point["test"]) / len(point["test"])


def made_finding(n: dict) -> str:
    """How one of them came about."""
    took = f"{n['minutes']:.0f} minutes" if n["minutes"] >= 1 else f"{60 * n['minutes']:.0f} seconds"
    return f"Made by `{n['command']}` in {took}."


NAMES = {"tfidf": "linear TF-IDF", "word2vec": "Word2Vec", "svd": "SVD", "layer0": "layer 0 alone",
         "layer2": "top layer alone", "average": "plain average of the layers", "untrained": "untrained biLM",
         "finetuned": "ELMo, fine-tuned"}
BLOCKS: dict[str, Callable[[dict], str]] = {
    "pretraining": pretraining, "bench": bench, "faults": faults, "baselines": baselines, "findings": findings,
    **dict.fromkeys(("classification", "finetuned", "titled", "sst2", "sst5", "nli"), classification)}


def perplexities(r: dict) -> tuple[str, str, str]:
    """A line of the results, as the functions below: what, the number, the command; None where the JSON lacks it."""
    test = r["splits"]["test"]
    return (f"test perplexity, full softmax over {r['vocabulary']:,} words, forward and backward; Kneser-Ney, forward",
            f"{test['forward']['perplexity']:.1f}, {test['backward']['perplexity']:.1f}; "
            f"{test['forward']['kneser_ney_perplexity']:.1f}", r["command"])


def accuracy_of(what: str) -> Callable[[dict], tuple[str, str, str]]:
    def line(r: dict) -> tuple[str, str, str]:
        name = max(r["settings"], key=lambda setting: r["settings"][setting]["validation"]["accuracy"]["mean"])
        return f"{what} (setting `{name}`)", f"{share_of(r['settings'][name]['test']['accuracy'])} %", r["command"]
    return line


def gap(r: dict) -> tuple[str, str, str] | None:
    ours = {name: n for name, n in r["rows"].items() if name in ("trainable", "frozen", "function")}
    if not ours:
        return None
    base = r["rows"]["word2vec"]
    means = ", ".join(f"{100 * (n['test']['mean'] - base['test']['mean']):+.2f}" for n in ours.values())
    tests = (n["against"]["word2vec"] for n in ours.values())
    together = ", ".join(f"{100 * found['difference']:+.2f} (p = {found['p']:.1g})" for found in tests)
    return (f"points from Word2Vec under the same head, settings `{'`, `'.join(ours)}`: means of {base['seeds']} "
            "seeds; the seeds' mean probabilities", f"{means}; {together}", r["command"])


def few_labels(r: dict) -> tuple[str, str, str] | None:
    if "labels" not in r:
        return None
    n = r["labels"]
    ours, theirs = (percent_of(n["systems"][name][n["shares"].index(share)])
                    for name, share in (("elmo", 1.0), ("word2vec", 3.0)))
    return (f"test accuracy with 1 % of the labels, and {n['chosen_on']:,} to choose weights by; Word2Vec with 3 %",
            f"{ours:.1f} %; {theirs:.1f} %", n["command"])


def senses(r: dict) -> tuple[str, str, str] | None:
    if "senses" not in r:
        return None
    n = r["senses"]
    return ("class of an ambiguous word's use told by its nearest uses; by the word alone",
            f"{100 * n['votes'][n['best']]:.1f} %; {100 * n['majority']:.1f} %", n["command"])


RESULTS: list[tuple[str, Callable[[dict], tuple[str, str, str] | None]]] = [
    ("pretraining", perplexities), ("classification", accuracy_of("test accuracy on AG News, the biLM frozen")),
    ("baselines", gap), ("finetuned", accuracy_of("AG News, the biLM fine-tuned, with n-grams")),
    ("titled", accuracy_of("AG News with titles, fine-tuned, with n-grams")),
    ("sst5", accuracy_of("SST, five classes, whole sentences")), ("sst2", accuracy_of("SST, two classes")),
    ("nli", accuracy_of("a subset of MultiNLI's evaluation rows")), ("findings", few_labels), ("findings", senses),
    ("bench", lambda r: ("training speed, times the common loop, padded per batch",
                         f"{r['times_common_loop_batch_padded']:.1f}", r["command"])),
    ("faults", lambda r: ("runs killed at random moments, of them with a saved state; resumed to the same weights "
                          "bit for bit", "{tried}, {with_state}; {survived}".format(**r["kills"]), r["command"]))]


def results(folder: Path) -> str:
    """A table of what the project shows, with commands, as far as the JSON in `folder` tells it."""
    lines = ["| what | measured | by |", "|---|---|---|"]
    for name, row in RESULTS:
        path = folder / f"{name}.json"
        if path.exists():
            with written_json(path) as r:
                if line := row(r):
                    what, number, command = line
                    lines.append(f"| {what} | {number} | `{command}` |")
    return "\n".join(lines)


def filled(readme: str, folder: Path) -> str:
    """The README with every block whose JSON is in `folder` written anew."""
    table = re.compile("<!-- results -->.*?<!-- end -->", re.DOTALL)
    readme = table.sub(lambda _: f"<!-- results -->\n{results(folder)}\n<!-- end -->", readme)
    for name, write in BLOCKS.items():
        path = folder / f"{name}.json"
        if path.exists():
            with written_json(path) as numbers:
                block = f"<!-- {path.name} -->\n{write(numbers)}\n<!-- end -->"
            old = re.compile(f"<!-- {re.escape(path.name)} -->.*?<!-- end -->", re.DOTALL)
            readme = old.sub(lambda _, block=block: block, readme)
    return readme


@script("readme.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0."""
    text = filled(read_text(ROOT / "README.md"), ROOT / "models")
    write_atomically(ROOT / "README.md", lambda file: file.write(text.encode()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
