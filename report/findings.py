"""Measures the paper's findings on AG News, one function per finding; writes models/findings.json and figures.

    python report/findings.py                   measures all findings again, under 90 minutes on two cores
    python report/findings.py --resume          continues after a stop; finished findings and runs of `labels` stay
    python report/findings.py --only senses     measures only the named findings; the others stay as they are

findings.json: bilm (digest), and for each finding its command, versions, machine, minutes, peak_memory_gb, and:
    labels (figure 1 of the paper): static (baselines.STATIC_VECTORS), shares (% of the training rows), rows (number of
        them), chosen_on (number of validation rows that choose the weights or, for tfidf, the hyperparameters),
        measured (number of test rows), systems.{elmo, word2vec, tfidf}: for each share {test, validation}, the accuracy
        of each seed. A seed draws the labelled rows, the same ones for all systems. The last share, 100 %, is taken
        from baselines.json
    mixes (tables 2 and 3): rows, seeds, epochs, variants.{name}: {validation, test: {mean, std}, s of the first seed}
    senses (section 5.3; the sense of a use is taken to be the class of its row): rule, pool, voters, uses (number
        of uses in test rows; without those whose pool, the word's uses in training rows, has only near copies of
        their row), majority (share of the uses whose class is the most frequent one in the word's pool), layers
        (share whose nearest use in training rows has their class), votes (share that has the class for which the
        nearest uses vote by cosine), interval (of the votes; 95 %, bootstrap over words), words.{word} and
        validation: uses, majority, layers and votes for a word and for validation rows; best: the layer with the
        best votes there. In layer 0 all uses are equally near: layers has the expected share, votes the majority
    neighbours (table 4): words [{word, static (nearest words by x), uses}], uses [{text, label, nearest,
        nearest_label, cosine}]; here too, no nearest use is in a near copy
    weights (figure 2): tasks.{name}: s and gamma of each seed
    heatmap: text, tokens, layers: cosine similarity of every two words
    map: rows, x, y, labels, names: t-SNE of the documents' mean vectors; same: share of the rows whose nearest mean
        vector by cosine has the same class, near copies included; same_static: the same for the means of layer 0
    settings (the assignment's question): rows, pairs [{one, other} and run.metrics.mcnemar of their ensembles]
    leaks: rows, changed (number of rows in which every state of the new word changed), moved_forward_before,
        moved_backward_after (number of states that changed but must not, over layers and words); example: tokens,
        changed_word, new, forward and backward [|change| of layers 1 and 2 at each word]
"""
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from joblib import Memory
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # run as `python report/findings.py`

import classification
from classification import Config, ELMoVectors, Trainer
from data.ag_news import CACHE
from data.tasks import EncodedTexts, Part, Task, read_task
from ELMO import HERE, ELMo
from report import figures
from report.baselines import LINEAR_MODELS, STATIC_VECTORS, StaticVectors, count_words, make_vectors, texts_of, tfidf
from report.mixes import VARIANTS, ELMoAndWord2Vec, VariantConfig, VariantTrainer
from report.senses import MIN_USES, POOL, RULE, VOTERS, Uses, nearest_uses, sense_accuracy, uses_by_word
from run import machine
from run.files import InputError, read_json, write_json
from run.metrics import mcnemar, mean_and_std, validation_numbers
from run.options import Parser, script

SEEDS = {0.1: 5, 0.3: 5, 1.0: 5, 3.0: 5, 10.0: 2, 30.0: 1}      # {% of the training rows that have labels: seeds}
PARTS = ("test", "validation")
EVALUATIONS = 3                                                 # of each run, on validation rows
RUNS = HERE / "build" / "findings"                              # finished runs of `labels`
TASKS = {"classification": "AG News", "finetuned": "AG News, biLM fine-tuned", "adapted_sst5": "SST, 5 classes",
         "adapted_sst2": "SST, 2 classes", "adapted_nli": "NLI"}


@dataclass(eq=False)
class Inputs:
    """What every finding starts from.

    folder: with the published files. quarter: the validation rows that choose the weights. parts: quarter and all test
    rows, encoded.
    """
    folder: Path
    elmo: ELMo
    task: Task
    quarter: Part
    parts: dict[str, EncodedTexts]

    @classmethod
    def read(cls, folder: Path) -> "Inputs":
        """The inputs for the biLM in a folder."""
        elmo = ELMo.load(folder / "bilstm.pt")
        task = read_task(Config(), elmo.config)
        quarter = task.validation.take(np.arange(0, len(task.validation), 4))
        parts = {"validation": EncodedTexts(quarter, elmo), "test": EncodedTexts(task.test, elmo, CACHE)}
        return cls(folder, elmo, task, quarter, parts)

    def published(self, name: str) -> dict:
        """The content of a JSON file in the folder; InputError if it is missing, damaged or made with another biLM."""
        path = self.folder / f"{name}.json"
        with read_json(path) as result:
            if result["bilm"] != self.elmo.digest:
                raise InputError(f"{path} was made with another biLM; make it again first")
        return result

    @cached_property
    def train_tokens(self) -> list[list[str]]:
        """The tokens of each training row."""
        return [self.elmo.tokenize(text) for text in texts_of(self.task.train)]

    @cached_property
    def test_uses(self) -> dict[str, tuple[Uses, Uses]]:
        """{word: (its uses in test rows, its uses in training rows)} for the ambiguous words of the test rows."""
        return uses_by_word(self.elmo, self.task, "test", self.train_tokens, MIN_USES)

    @cached_property
    def word2vec(self) -> StaticVectors:
        """Word2Vec's vectors of the biLM's words."""
        return make_vectors("word2vec", Config(), self.elmo, self.task)

    @cached_property
    def vectorizers(self) -> dict[int, TfidfVectorizer]:
        """The TF-IDF weights that `tfidf` needs."""
        return count_words(self.task.corpus)


def trained(config: Config, vectors, inputs: Inputs, trainer_class: type = Trainer) -> Trainer:
    """A trainer after its run on `config.rows` labelled rows, with the weights that are best on validation rows."""
    task = inputs.task.with_labels(config.rows, config.seed)
    parts = inputs.parts | {"train": EncodedTexts(task.train, inputs.elmo)}
    trainer = trainer_class(config, vectors, parts, len(task.labels))
    trainer.interval = math.ceil(trainer.steps / EVALUATIONS)
    run = classification.train(trainer)
    if not run.finished or run.stop_event.is_set():
        raise KeyboardInterrupt
    trainer.model.load_state_dict(run.best)
    return trainer


def accuracies(trainer: Trainer, texts: EncodedTexts) -> dict[str, list[float]]:
    """{setting: accuracy of each seed}."""
    _, numbers = validation_numbers(trainer.probabilities(texts), texts.labels, trainer.config.settings)
    return {setting: of_seeds["accuracy"] for setting, of_seeds in numbers.items()}


def few_labels(inputs: Inputs, system: str, share: float, seed: int, recipe: str) -> dict:
    """{"test", "validation", "minutes"}: accuracies of one system with `share` % of the labels, drawn by the seed.

    ELMo and Word2Vec have the same options, chosen on validation rows with 1 % of the labels. recipe: everything else
    that the result depends on; a result on disk is used again only if it is the same.
    """
    begin = time.perf_counter()
    rows = round(len(inputs.task.train) * share / 100)
    if system == "tfidf":
        task = replace(inputs.task.with_labels(rows, seed), validation=inputs.quarter)
        numbers, _ = tfidf(task, inputs.vectorizers)
        result = {part: numbers[part]["mean"] for part in PARTS}
    else:
        config = Config(rows=rows, seed=seed, setting="trainable", epochs=2 * (100 / share) ** 0.4,
                        batch_tokens=600 if share < 10 else 3000, log_every=10**9)
        vectors = inputs.word2vec if system == "word2vec" else ELMoVectors(inputs.elmo.model)
        trainer = trained(config, vectors, inputs)
        result = {part: accuracies(trainer, inputs.parts[part])["trainable"][0] for part in PARTS}
    return result | {"minutes": (time.perf_counter() - begin) / 60}


def labels(inputs: Inputs) -> dict:
    """Test accuracy of ELMo, Word2Vec and TF-IDF with few labelled rows. Vectors and counts come from all texts."""
    total = len(inputs.task.train)
    recipe = (f"{inputs.elmo.digest} {total} rows {machine.versions()} {Config()} {EVALUATIONS} {STATIC_VECTORS} "
              f"{LINEAR_MODELS}")
    measure = Memory(RUNS, verbose=0).cache(few_labels, ignore=["inputs"])
    baselines = inputs.published("baselines")["rows"]
    with_all = {"elmo": baselines["trainable"]["each"], "word2vec": baselines["word2vec"]["each"],
                "tfidf": {part: [baselines["tfidf"][part]["mean"]] for part in PARTS}}
    systems = {system: [] for system in with_all}
    minutes = 0.0
    for share, seeds in SEEDS.items():
        for system, points in systems.items():
            runs = [measure(inputs, system, share, seed, recipe) for seed in range(seeds)]
            minutes += sum(run["minutes"] for run in runs)
            points.append({part: [run[part] for run in runs] for part in PARTS})
            print(f"{share:g} % of the labels, {system}: {np.mean(points[-1]['test']):.2%}", flush=True)
    shares = [*SEEDS, 100.0]
    return {"shares": shares, "rows": [round(total * share / 100) for share in shares],
            "chosen_on": len(inputs.quarter), "measured": len(inputs.task.test), "static": STATIC_VECTORS,
            "systems": {system: [*points, with_all[system]] for system, points in systems.items()}, "minutes": minutes}


def mixes(inputs: Inputs) -> dict:
    """All VARIANTS, trained side by side on a twentieth of the labels."""
    config = VariantConfig(rows=len(inputs.task.train) // 20, seeds=3, epochs=5.0)
    trainer = trained(config, ELMoAndWord2Vec(inputs.elmo, inputs.word2vec), inputs, VariantTrainer)
    found = {part: accuracies(trainer, texts) for part, texts in inputs.parts.items()}
    variants = {}
    for name, variant in VARIANTS.items():
        variants[name] = {part: mean_and_std(accuracy[name]) for part, accuracy in found.items()}
        print(f"{name}: {variants[name]['test']['mean']:.2%}", flush=True)
        mix = trainer.model[f"{name}-{config.seed}"]["head"].mix
        free = len(variant.layers) > 1 and not variant.word2vec
        variants[name]["s"] = mix.w.softmax(dim=0).tolist() if free else None
    return {"rows": config.rows, "seeds": config.seeds, "epochs": config.epochs, "variants": variants}


def senses(inputs: Inputs) -> dict:
    """Senses in test rows, and in validation rows, which choose the best layer."""
    few = MIN_USES // 2                         # there are about half as many validation rows as test rows
    validation = sense_accuracy(uses_by_word(inputs.elmo, inputs.task, "validation", inputs.train_tokens, few))
    return sense_accuracy(inputs.test_uses) | {
        "rule": RULE, "pool": POOL, "voters": VOTERS, "best": int(np.argmax(validation["votes"])),
        "validation": {name: validation[name] for name in ("uses", "majority", "layers", "votes")}}


def neighbours(inputs: Inputs) -> dict:
    """The most evenly ambiguous words: the nearest words by x, and two test uses with their nearest training uses."""
    return {"words": nearest_uses(inputs.test_uses, inputs.elmo, inputs.task)}


def weights(inputs: Inputs) -> dict:
    """s and gamma that each task learned, for every seed, from the JSON file of its run."""
    tasks = {}
    for name, title in TASKS.items():
        if (inputs.folder / f"{name}.json").exists():
            numbers = inputs.published(name)["settings"]["trainable"]
            tasks[title] = {"s": numbers["s"], "gamma": numbers["gamma"]}
    return {"tasks": tasks}


def settings(inputs: Inputs) -> dict:
    """Compares every two of the classifier's settings by the test rows that their ensembles predict right."""
    correct = {}
    for name, numbers in inputs.published("classification")["settings"].items():
        correct[name] = np.array(list(numbers["predictions"]), dtype=int) == inputs.task.test.labels
    pairs = [{"one": one, "other": other} | mcnemar(correct[one], correct[other])
             for one, other in combinations(correct, 2)]
    return {"rows": len(inputs.task.test), "pairs": pairs}


def heatmap(inputs: Inputs) -> dict:
    """Cosine similarity of every two words of a sentence, by layer."""
    text = "The bank raised interest rates after the team left the bank of the river."
    h = F.normalize(inputs.elmo.embed([text])[0], dim=2)                        # (3, n, D)
    similar = h @ h.transpose(1, 2)                                             # (3, n, n)
    return {"text": text, "tokens": inputs.elmo.tokenize(text), "layers": similar.tolist()}


def document_map(inputs: Inputs, rows: int = 2_000) -> dict:
    """t-SNE of `rows` test rows, each as its mean vector over words and layers."""
    test = inputs.task.test
    part = test.take(np.sort(np.random.default_rng(0).permutation(len(test))[:rows]))
    means = [h.mean(dim=1) for h in inputs.elmo.embed_stream(texts_of(part), "bf16")]
    layers = torch.stack(means, dim=1)                                          # (3, rows, D)

    def same_class(vectors: Tensor) -> float:
        """Share of the rows whose nearest vector (rows, D) is of a row of the same class."""
        neighbours = NearestNeighbors(n_neighbors=1, metric="cosine").fit(vectors).kneighbors(return_distance=False)
        return float((part.labels[neighbours[:, 0]] == part.labels).mean())

    average = layers.mean(dim=0)                                                # (rows, D)
    points = TSNE(metric="cosine", init="pca", random_state=0).fit_transform((average - average.mean(dim=0)).numpy())
    x, y = points.round(2).T.tolist()
    return {"rows": len(part), "x": x, "y": y, "labels": part.labels.tolist(), "names": inputs.task.labels,
            "same": same_class(average), "same_static": same_class(layers[0])}


def leaks(inputs: Inputs, rows: int = 500) -> dict:
    """Counts the states that change if one word of a row is replaced.

    Forward states before it and backward states after it must not change. If they do, a language model sees words that
    it predicts.
    """
    elmo = inputs.elmo
    generator = np.random.default_rng(0)
    counts = dict.fromkeys(("rows", "changed", "moved_forward_before", "moved_backward_after"), 0)
    example = None
    texts = [text for text in texts_of(inputs.task.test) if len(elmo.tokenize(text)) >= 3]
    for i in generator.permutation(len(texts))[:rows]:
        tokens = elmo.tokenize(texts[i])
        k = int(generator.integers(len(tokens)))
        other = [*tokens[:k], "microsoft" if "iraq" in tokens else "iraq", *tokens[k + 1:]]
        if any(elmo.tokenize(" ".join(words)) != words for words in (tokens, other)):
            continue                            # joined with spaces, these tokens would be tokenized in another way
        before, = elmo.embed([" ".join(tokens)])                                # two calls: one batch could round
        after, = elmo.embed([" ".join(other)])                                  # equal rows differently
        difference = (before - after).unflatten(2, (2, -1))                     # (3, n, 2, P): layer, word, direction
        moved = difference.ne(0).any(dim=3)                                     # (3, n, 2)
        counts["rows"] += 1
        counts["changed"] += int(moved[:, k].all())
        counts["moved_forward_before"] += int(moved[:, :k, 0].sum())
        counts["moved_backward_after"] += int(moved[:, k + 1:, 1].sum())
        if example is None and 12 <= len(tokens) <= 20 and 4 <= k < len(tokens) - 4:
            forward, backward = difference[1:].norm(dim=3).unbind(dim=2)        # (2, n) each
            example = {"tokens": tokens, "changed_word": k, "new": other[k], "forward": forward.tolist(),
                       "backward": backward.tolist()}
    return counts | {"example": example}


FINDINGS = {
    "leaks": leaks, "heatmap": heatmap, "map": document_map, "weights": weights, "settings": settings,
    "senses": senses, "neighbours": neighbours, "mixes": mixes, "labels": labels}


@script("findings.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 2 for an input that the user can fix, 130 after Ctrl-C; finished findings stay in the file."""
    parser = Parser(prog="findings.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "models",
                        help="folder with the published files; findings.json is written there")
    parser.add_argument("--only", default=",".join(FINDINGS),
                        help="the findings to measure, separated by commas (default %(default)s)")
    parser.add_argument("--resume", action="store_true", help="skip the findings that are finished for this biLM")
    options = parser.parse_args(argv)
    wanted = options.only.split(",")
    for name in wanted:
        if name not in FINDINGS:
            raise InputError(f"--only names {name!r}; expected some of {', '.join(FINDINGS)}")
    inputs = Inputs.read(options.out)
    file = options.out / "findings.json"
    result = {"bilm": inputs.elmo.digest}
    if file.exists():
        with read_json(file) as earlier:
            if earlier["bilm"] == inputs.elmo.digest:
                result = earlier
    if not options.resume:          # what is measured again leaves the file first, so that --resume can continue
        result = {name: content for name, content in result.items() if name not in wanted}
        write_json(file, result)
        if "labels" in wanted:
            shutil.rmtree(RUNS, ignore_errors=True)
    for name in wanted:
        if name in result:
            continue
        begin = time.perf_counter()
        found = FINDINGS[name](inputs)
        about = machine.provenance(inputs.elmo.device, time.perf_counter() - begin)
        result[name] = about | {"command": f"python report/findings.py --only {name}"} | found
        write_json(file, result)
        print(f"{name}: {result[name]['minutes']:.1f} minutes", flush=True)
    figures.findings(result, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
