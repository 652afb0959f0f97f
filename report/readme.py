"""The README's tables of numbers, written from models/*.json between their markers, so that none is typed by hand.

`python report/readme.py` rewrites README.md; a test holds it to the JSON.
"""
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # run as `python report/readme.py`

from data.files import InputError, read_text, write_atomically
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
    rows = [
        ("targets a second, training", f"{r['tokens_per_second']:,.0f}"),
        ("times the common loop, padded to the corpus's longest row", f"{r['times_common_loop']:.1f}"),
        ("times the common loop, padded per batch", f"{r['times_common_loop_batch_padded']:.1f}"),
        (f"share of the machine's own {r['peak']['precision']} matrix peak ({r['peak']['gflops']:,.0f} GFLOP/s)",
         f"{r['share_of_peak']:.0%}"),
        (f"step time with {r['vocabulary']['grown']:,} words over {r['vocabulary']['words']:,}",
         f"{r['step_time_800k_over_28k']:.2f}"),
        ("descriptions embedded a second, fp32", f"{r['embed_fp32_per_second']:,.0f}"),
        ("rows tokenized a second", f"{r['tokenize_rows_per_second']:,.0f}")]
    bf16 = "with" if r["machine"]["bf16_hardware"] else "without"
    lines = ["| what | median of three |", "|---|--:|", *(f"| {what} | {value} |" for what, value in rows), "",
             f"Made by `{r['command']}` on {r['machine']['cores']} cores ({r['machine']['device']}, {bf16} bf16 "
             "hardware)."]
    return "\n".join(lines)


def share(number: dict) -> str:
    """91.23 ± 0.10, in percent; without a deviation the mean alone."""
    deviation = number["deviation"]
    return f"{100 * number['mean']:.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}")


def made(r: dict) -> str:
    """How a classification JSON came about."""
    bf16 = "with" if r["machine"]["bf16_hardware"] else "without"
    return (f"Made by `{r['command']}` in {r['minutes']:.0f} minutes on {r['machine']['cores']} cores "
            f"({r['machine']['device']}, {bf16} bf16 hardware).")


def mix(n: dict) -> str:
    """Layer weights of the saved head of a setting."""
    if not n["s"]:
        return "learned"
    return f"{', '.join(f'{w:.2f}' for w in n['s'][n['best']])}; {n['gamma'][n['best']]:.2f}"


def accuracies(n: dict) -> dict[str, str]:
    """Cells of the accuracies on each part, of a setting or of what it is without n-grams."""
    test = n["test"]
    cells = {"train": share(n["train"]["accuracy"]), "validation": share(n["validation"]["accuracy"]),
             "test": share(test["accuracy"])}
    cells |= {"test, fresh": share(test["fresh"]["accuracy"])} if "fresh" in test else {}
    several = test["accuracy"]["deviation"] is not None
    return cells | ({"together": f"{100 * test['together']['accuracy']:.2f}"} if several else {})


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
    lines = ["| system | validation | test | test, fresh | together | against Word2Vec | against TF-IDF |",
             "|---|--:|--:|--:|--:|--:|--:|"]
    for name, n in r["rows"].items():
        against = [f"{100 * a['difference']:+.2f} ({100 * a['interval'][0]:+.2f} to {100 * a['interval'][1]:+.2f}), "
                   f"p = {a['p']:.1g}" if a else "" for a in (n["against"].get(key) for key in ("word2vec", "tfidf"))]
        lines.append("| " + " | ".join([
            NAMES.get(name, f"ELMo, {name}") + ", with n-grams" * n["ngrams"], share(n["validation"]), share(n["test"]),
            share(n["fresh"]) if n["fresh"] else "-", f"{100 * n['together']:.2f}", *against]) + " |")
    return "\n".join(lines) + f"""

Accuracy in percent. Differences are those of *together* on all test rows, with 95 % bootstrap intervals; p is of the
exact two-sided McNemar test, not corrected for their number. TF-IDF is one model, its knobs chosen on validation rows.
Made by `{r['command']}` in {r['minutes']:.0f} minutes."""


NAMES = {"tfidf": "linear TF-IDF", "word2vec": "Word2Vec", "svd": "SVD", "layer0": "layer 0 alone",
         "layer2": "top layer alone", "average": "plain average of the layers", "untrained": "untrained biLM",
         "finetuned": "ELMo, fine-tuned"}
BLOCKS: dict[str, Callable[[dict], str]] = {
    "pretraining": pretraining, "bench": bench, "baselines": baselines,
    **dict.fromkeys(("classification", "finetuned", "titled", "sst2", "sst5", "nli"), classification)}


def filled(readme: str, folder: Path) -> str:
    """The README with every block whose JSON is in `folder` written anew."""
    for name, write in BLOCKS.items():
        path = folder / f"{name}.json"
        if path.exists():
            try:
                block = f"<!-- {path.name} -->\n{write(json.loads(read_text(path)))}\n<!-- end -->"
            except (ValueError, KeyError, TypeError, IndexError) as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(f"{path} is not what the scripts write ({error!r}); run them again") from None
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
