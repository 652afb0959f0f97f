"""The paper's findings at the scale of AG News: one function each, models/findings.json, and their figures.

    python report/findings.py                   all of them anew, under 90 minutes on two cores; after a stop --resume
                                                goes on: it keeps what is finished, of `labels` every run
    python report/findings.py --only senses     the named ones anew, the others as they are in the file

Schema of findings.json: bilm (digest), and one entry by finding, each with its command, minutes, versions and machine:
    labels (figure 1 of the paper): static (data.prepare.STATIC_VECTORS), shares [% of the training rows], rows,
        chosen_on (validation rows by which weights, of tfidf also knobs, are chosen), measured (test rows),
        systems.{elmo, word2vec, tfidf}: for every share {test: accuracy of each seed, validation: the same on those
        rows, of the last share on all}. The last share is that of classification.json and baselines.json; below it
        each seed draws its own rows, the same for all systems
    mixes (tables 2 and 3): rows, seeds, variants.{name}: {validation, test: {mean, deviation}, s: of the first seed}
    senses (section 5.3; the sense of a use is taken as the class of its row): the rule, pool, voters, words.{word}:
        {uses, majority: share that is of the word's most frequent class in its pool, layers: [share whose nearest
        use in training rows is of their class; by layer 0, where all are as near, the expected share], votes: [the
        same of the class for which the `voters` nearest vote by their cosines; by layer 0 the majority]}; uses,
        majority, layers, votes and interval (of the votes; 95 %, bootstrap over words) over all words; validation
        {uses, majority, layers, votes}, best: the layer whose votes are best there
    neighbours (table 4): words [{word, static: nearest words by x, uses: [{text, label, nearest, nearest_label,
        cosine}]}]
    weights (figure 2): tasks.{name}: s of every seed, gamma
    heatmap: text, tokens, layers: [cosine similarity of each two words]
    map: rows, x, y, labels, names: t-SNE of the documents' mean vectors; same: share of rows whose nearest mean vector
        by cosine is of their class, near copies included; same_static: the same of the means of layer 0 alone
    settings (the assignment's question): rows, pairs [{one, other: settings of classification.json, and finetuned;
        difference of the accuracies of their seeds' mean probabilities on test rows, interval (95 %, bootstrap),
        only_this, only_that: rows that one alone has right, p of the exact McNemar test}]
    leaks: rows, changed (rows all of whose states of the new word are other ones), moved_forward_before and
        moved_backward_after (states, by layer and word, that must not move and did); example: tokens, changed_word,
        new, forward and backward [|change| of layers 1 and 2 at each word]
"""
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # run as `python report/findings.py`

import classification
from classification import Config, Head, Layer, Linears, ScalarMix, Trainer, Vectors, dropout, vectors_of
from data.files import InputError, write_json, written_json
from data.knobs import Parser, script
from data.machine import default_device, machine, versions
from data.prepare import CACHE, STATIC_VECTORS, Part, Task, read_task
from data.text import Texts
from ELMO import ELMo
from report import figures
from report.baselines import TRIED, mcnemar, tfidf

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "build" / "findings" / "labels.json"      # its finished runs
SHARES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)        # % of the training rows that have labels
SEEDS = {0.1: 5, 0.3: 5, 1.0: 5, 3.0: 5, 10.0: 2, 30.0: 1}
EVALUATIONS = 3                                         # of a run, on the validation rows
DETERMINERS = frozenset(["the", "a", "an", "its", "his", "her", "their", "our", "this", "that", "these", "those"])
FOLLOWERS = frozenset([
    ",", ".", ";", ":", ")", "of", "in", "on", "at", "for", "to", "from", "by", "with", "and", "or", "as", "is", "was",
    "are", "were", "has", "had", "have", "will", "would", "that", "which", "who", "when", "while", "after", "before"])


@dataclass(eq=False)
class Bed:
    """What every finding starts from: the folder of the published files, the biLM, AG News, and what is measured.

    some: a quarter of the validation rows, by which runs of few labels choose their weights; parts: these and all test
    rows.
    """
    folder: Path
    elmo: ELMo
    task: Task
    some: Part
    parts: dict[str, Texts]

    @classmethod
    def of(cls, folder: Path) -> "Bed":
        elmo = ELMo.load(folder / "bilstm.pt", default_device())
        task = read_task(Config(), elmo.config)
        some = task.validation.take(np.arange(0, len(task.validation), 4))
        return cls(folder, elmo, task, some, {"validation": Texts(some, elmo), "test": Texts(task.test, elmo, CACHE)})

    def published(self, name: str) -> dict:
        """A JSON of the folder that is of this biLM; InputError where it is of another one, damaged or missing."""
        with written_json(self.folder / f"{name}.json") as result:
            if result["bilm"] != self.elmo.digest:
                raise InputError(f"{self.folder / name}.json is of another biLM; make it anew first")
        return result

    @cached_property
    def known(self) -> list[list[str]]:
        """Tokens of the training rows."""
        return [self.elmo.tokenize(text) for text in texts_of(self, "train")]

    @cached_property
    def word2vec(self) -> Vectors:
        return vectors_of(Config(vectors="word2vec"), self.elmo, self.task)


# ------------------------------------------------------------------------------------------ labels (figure 1)
def few_labels(rows: int, share: float, seed: int, vectors: str) -> Config:
    """Knobs for so many labelled rows, the same for both vectors: chosen on validation rows with 1 % of the labels."""
    return Config(rows=rows, seed=seed, vectors=vectors, setting="trainable", epochs=2 * (100 / share) ** 0.4,
                  batch_tokens=600 if share < 10 else 3000, log_every=10**9)


def trained(config: Config, vectors: Vectors, bed: Bed, kind: type = Trainer) -> tuple[Trainer, dict[str, dict]]:
    """(trainer with its best weights, {part: {setting: (S, N, C)}} of validation and test rows)."""
    task = bed.task.with_labels(config.rows, config.seed)
    parts = bed.parts | {"train": Texts(task.train, bed.elmo)}
    trainer = kind(config, vectors, parts, len(task.labels), range(config.seed, config.seed + config.seeds))
    trainer.interval = max(1, -(-trainer.steps // EVALUATIONS))
    run = classification.train(trainer)
    if not run.finished or run.request.is_set():
        raise KeyboardInterrupt
    trainer.model.load_state_dict(run.best)
    return trainer, {part: trainer.probabilities(bed.parts[part]) for part in bed.parts}


def hits(p: Tensor, gold: Tensor) -> list[float]:
    """Accuracy of each seed's probabilities (S, N, C)."""
    return (p.argmax(dim=2) == gold).double().mean(dim=1).tolist()


class Kept:
    """Finished runs of `labels` by what made them, in a JSON of one recipe, so that a stopped command can go on."""

    def __init__(self, file: Path, recipe: str):
        self.file, self.content, self.earlier = file, {"recipe": recipe, "runs": {}}, 0.0
        if file.exists():
            with written_json(file) as old:
                self.content = old if old["recipe"] == recipe else self.content

    def __call__(self, name: str, run: Callable[[], dict]) -> dict:
        """What was kept under the name, its minutes added to `earlier`, or else what the run returns."""
        runs = self.content["runs"]
        if name in runs:
            self.earlier += runs[name]["minutes"]
        else:
            begin = time.perf_counter()
            runs[name] = {"result": run()} | {"minutes": (time.perf_counter() - begin) / 60}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.file, self.content)
        return runs[name]["result"]


def labels(bed: Bed) -> dict:
    """Test accuracy of ELMo, Word2Vec and TF-IDF with few labelled rows; vectors and counts from all texts."""
    full, others = bed.published("classification")["settings"]["trainable"], bed.published("baselines")["rows"]
    parts, counted = ("test", "validation"), {}
    kept = Kept(KEPT, f"{bed.elmo.digest} {versions()} {EVALUATIONS} {STATIC_VECTORS} {TRIED} {len(bed.task.train)}")
    vectors = {"elmo": vectors_of(Config(), bed.elmo, bed.task), "word2vec": bed.word2vec}
    def by_head(config: Config) -> dict:
        p = trained(config, vectors[config.vectors], bed)[1]
        return {part: hits(p[part]["trainable"], bed.parts[part].labels)[0] for part in parts}
    def by_counts(n: int, seed: int) -> dict:
        numbers, _ = tfidf(replace(bed.task.with_labels(n, seed), validation=bed.some), counted)
        return {part: numbers[part]["mean"] for part in parts}
    systems = {name: [] for name in (*vectors, "tfidf")}
    rows = [round(len(bed.task.train) * share / 100) for share in SHARES]
    for share, n in zip(SHARES[:-1], rows, strict=False):
        for name, points in systems.items():
            runs = []
            for seed in range(SEEDS[share]):
                config = few_labels(n, share, seed, name) if name in vectors else None
                runs.append(kept(f"{config}", partial(by_head, config)) if config else
                            kept(f"tfidf, rows {n}, seed {seed}", partial(by_counts, n, seed)))
            points.append({part: [run[part] for run in runs] for part in parts})
            print(f"{share:g} % of the labels, {name}: {np.mean(points[-1]['test']):.2%}", flush=True)
    systems["elmo"].append({part: [seed["accuracy"] for seed in full[part]["seeds"]] for part in parts})
    systems["word2vec"].append({part: others["word2vec"]["each"][part] for part in parts})
    systems["tfidf"].append({part: [others["tfidf"][part]["mean"]] for part in parts})
    return {"shares": list(SHARES), "rows": rows, "chosen_on": len(bed.some), "measured": len(bed.task.test),
            "static": STATIC_VECTORS, "systems": systems, "minutes": kept.earlier}


# ------------------------------------------------------------------------------------- mixes (tables 2 and 3)
class WithWord2Vec(Vectors):
    """The biLM's layers and, as a fourth one, Word2Vec filled up with zeros."""

    def __init__(self, elmo: Vectors, static: Vectors):
        super().__init__("elmo", elmo.model)
        self.static = static

    def __call__(self, texts: Texts, rows: np.ndarray, dtype: torch.dtype, *about) -> tuple[Tensor, Tensor]:
        h, n = super().__call__(texts, rows, dtype, *about)                     # (3, 2, T, B, D)
        own, _ = self.static(texts, rows, dtype)                                # (1, 2, T, B, 300)
        if h.shape[-1] < own.shape[-1]:
            raise InputError(f"the biLM's layers have {h.shape[-1]} numbers a word; the finding `mixes` needs {STATIC}")
        return torch.cat([h, F.pad(own, (0, h.shape[-1] - own.shape[-1]))]), n


LAYERS = {"layer 0": [0], "layer 1": [1], "layer 2": [2]}
STRENGTHS = {"all layers, lambda 0": 0.0, "all layers, lambda 1/1000": 0.001, "all layers, lambda 1": 1.0}
PLACES = {"Word2Vec": (True, False, False), "Word2Vec, ELMo at the input": (True, True, False),
          "Word2Vec, ELMo at the output": (True, False, True), "Word2Vec, ELMo at both": (True, True, True)}
STATIC = STATIC_VECTORS["width"]


class Variant(Head):
    """A head by its name in LAYERS, STRENGTHS or PLACES: which layers it mixes, how freely, and where they enter.

    lambda: |w|^2 is added to the loss so many times, which draws s towards the plain average (paper, section 3.2).
    ELMo at the output stands beside the LSTM's states where these are pooled; at both places it is one mix, where the
    paper learns two.
    """

    def __init__(self, config: Config, name: str, J: int, D: int, classes: int):
        super().__init__(config, "trainable", J, D, classes)
        H, self.layers = config.hidden, LAYERS.get(name, [0, 1, 2])
        self.reads_static, self.reads_mix, self.adds_mix = PLACES.get(name, (False, True, False))
        self.mix = ScalarMix(len(self.layers), False)
        self.lstm = Layer(STATIC * self.reads_static + D * self.reads_mix, H, H)
        if self.adds_mix:
            self.attend, self.out = Linears(H + D, 1), Linears(6 * (H + D), classes)
        if strength := STRENGTHS.get(name):
            self.mix.w.register_hook(lambda grad: grad + 2 * strength * self.mix.w.detach())

    def forward(self, h: Tensor, n: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mix = self.mix(h[self.layers])                                          # (S, 2, T, B, D)
        static = h[3:, ..., :STATIC].expand(self.S, -1, -1, -1, -1)             # (S, 2, T, B, 300)
        x = torch.cat([static] * self.reads_static + [mix] * self.reads_mix, dim=-1)
        x = dropout(x, (self.S, 1, 1, *x.shape[3:]), self.config.dropout, generator)
        h = self.lstm(x.flatten(0, 1))                                          # (2 S, T, B, H)
        if self.adds_mix:
            mix = dropout(mix, (self.S, 1, 1, *mix.shape[3:]), self.config.dropout, generator)
            h = torch.cat([h, mix.flatten(0, 1)], dim=-1)
        h = h.transpose(1, 2)                                                   # (2 S, B, T, H or H + D)
        text = self.pool(h, torch.arange(h.shape[2], device=h.device) < n[:, None])
        return self.out(dropout(text, text.shape, self.config.dropout, generator)).float()


@dataclass(frozen=True)
class Variants(Config):
    settings = property(lambda self: (*LAYERS, *STRENGTHS, *PLACES))


class VariantTrainer(Trainer):
    head = Variant


def mixes(bed: Bed) -> dict:
    """All layers against one, how free s is, where ELMo enters: side by side on a twentieth of the labels."""
    rows = len(bed.task.train) // 20
    config = Variants(rows=rows, seeds=3, epochs=5.0, log_every=100)
    vectors = WithWord2Vec(vectors_of(Config(), bed.elmo, bed.task), bed.word2vec)
    trainer, p = trained(config, vectors, bed, VariantTrainer)
    variants = {}
    for name in config.settings:
        found = {part: hits(p[part][name], bed.parts[part].labels) for part in bed.parts}
        variants[name] = {part: {"mean": float(np.mean(values)), "deviation": float(np.std(values, ddof=1))}
                          for part, values in found.items()}
        variants[name]["s"] = trainer.model[name].mix.s()[0].tolist() if name in STRENGTHS else None
        print(f"{name}: {variants[name]['test']['mean']:.2%}", flush=True)
    return {"rows": rows, "seeds": config.seeds, "epochs": config.epochs, "variants": variants}


# -------------------------------------------------------------------------- senses and neighbours (section 5.3)
RULE = ("words that follow a determiner and stand before a preposition, an auxiliary, a conjunction or a sign in at "
        "least {share:.0%} of their uses in training rows (nouns), with at least {least} uses in test rows, none of "
        "whose classes has more than {most:.0%} of these")
LEAST, MOST, NOUN = 20, 0.7, 0.15
POOL, VOTERS = 800, 10  # uses of a word in training rows among which the nearest are sought; how many vote


@dataclass
class Uses:
    """Uses of one word: vectors (uses, 3, D) of unit length by layer, the rows and their classes (uses,)."""
    vectors: np.ndarray
    rows: np.ndarray
    classes: np.ndarray


def nouns(bed: Bed, tokens: list[list[str]]) -> set[str]:
    """Words that stand like nouns often enough, by RULE; no tagger and no lexicon is asked."""
    seen, like = Counter(word for row in tokens for word in row), Counter()
    for row in tokens:
        like.update(word for before, word, after in zip(row, row[1:], row[2:], strict=False)
                    if before in DETERMINERS and after in FOLLOWERS)
    known = bed.elmo.words.index
    return {word for word, n in like.items() if n >= NOUN * seen[word] and word.isalpha() and word in known}


def ambiguous(bed: Bed, asked: list[list[str]], gold: np.ndarray, least: int) -> list[str]:
    """Nouns of rows of these tokens and classes by RULE, in the order of the alphabet."""
    counts = {}
    for row, tokens in enumerate(asked):
        for word in tokens:
            counts.setdefault(word, np.zeros(len(bed.task.labels)))[gold[row]] += 1
    known = nouns(bed, bed.known)
    return sorted(word for word, n in counts.items()
                  if word in known and n.sum() >= least and n.max() <= MOST * n.sum())


def uses(bed: Bed, texts: list[str], tokens: list[list[str]], classes: np.ndarray, wanted: list[str],
         most: int | None = None) -> dict[str, Uses]:
    """The uses of some words in some rows, of each word the first `most` in an order that the seed draws."""
    by_row, found = {}, {word: ([], []) for word in wanted}
    taken = Counter()
    for row in np.random.default_rng(0).permutation(len(texts)).tolist():
        for k, word in enumerate(tokens[row]):
            if word in found and (most is None or taken[word] < most):
                taken[word] += 1
                by_row.setdefault(row, []).append((word, k))
    rows = sorted(by_row)
    for row, h in zip(rows, bed.elmo.embed_stream((texts[row] for row in rows), "bf16"), strict=True):
        for word, k in by_row[row]:
            found[word][0].append(F.normalize(h[:, k], dim=1).half().numpy())
            found[word][1].append(row)
    return {word: Uses(np.stack(vectors), np.array(at), classes[at]) for word, (vectors, at) in found.items() if at}


def shared(a: list[str], b: list[str], n: int = 8) -> bool:
    """Whether two rows have a run of n words in common: near copies, whose class proves nothing."""
    grams = {tuple(a[i:i + n]) for i in range(len(a) - n + 1)}
    return any(tuple(b[i:i + n]) in grams for i in range(len(b) - n + 1))


def nearest(query: Uses, pool: Uses, asked: list[list[str]], known: list[list[str]], layer: int,
            most: int = 1) -> list[np.ndarray]:
    """Of each use the numbers of the `most` uses in the pool that are nearest by cosine, near copies left out."""
    order = np.argsort(-cosines(query, pool, layer))
    fresh = ((j for j in line if not shared(asked[row], known[pool.rows[j]]))
             for row, line in zip(query.rows, order, strict=True))
    return [np.array(list(islice(found, most)) or line[:1]) for found, line in zip(fresh, order, strict=True)]


def cosines(query: Uses, pool: Uses, layer: int) -> np.ndarray:
    """(uses of the query, uses of the pool)."""
    return query.vectors[:, layer].astype(np.float32) @ pool.vectors[:, layer].astype(np.float32).T


@lru_cache(maxsize=1)
def found_uses(bed: Bed, part: str, least: int) -> tuple[dict[str, Uses], dict[str, Uses], list, list]:
    """(uses in the part's rows, uses in training rows, tokens of either's rows) of the words that RULE names."""
    asked, gold = [bed.elmo.tokenize(text) for text in texts_of(bed, part)], getattr(bed.task, part).labels
    words = ambiguous(bed, asked, gold, least)
    if not words:
        raise InputError(f"no word of the {part} rows is ambiguous by the rule; there is no sense to find")
    pool = uses(bed, texts_of(bed, "train"), bed.known, bed.task.train.labels, words, POOL)
    return uses(bed, texts_of(bed, part), asked, gold, words), pool, asked, bed.known


def texts_of(bed: Bed, part: str) -> list[str]:
    return [text for text, in getattr(bed.task, part).texts]


def senses(bed: Bed) -> dict:
    """Of test rows, and of validation rows, which say what layer is best; there half as many uses of a word suffice."""
    held_out = told_apart(bed, "validation", LEAST // 2)
    return told_apart(bed, "test", LEAST) | {
        "rule": RULE.format(share=NOUN, least=LEAST, most=MOST), "pool": POOL, "voters": VOTERS,
        "validation": {name: held_out[name] for name in ("uses", "majority", "layers", "votes")},
        "best": int(np.argmax(held_out["votes"]))}


def told_apart(bed: Bed, part: str, least: int) -> dict:
    """How often a word's nearest uses in training rows tell its class, by layer, beside the most frequent class."""
    query, pool, asked, known = found_uses(bed, part, least)
    words, out, sums = list(query), {}, []
    for word in words:
        q, p = query[word], pool[word]
        most = q.classes == np.bincount(p.classes).argmax()
        same = (p.classes == q.classes[:, None]).mean(axis=1)       # layer 0: all uses are as near, any is as good
        right = np.stack([same, most, *(part for j in (1, 2) for part in told(q, p, asked, known, j))])
        sums.append([most.sum(), *right.sum(axis=1)])               # layer 0 nearest, votes, layer 1 nearest, ..
        share = right.mean(axis=1).tolist()
        out[word] = {"uses": len(most), "majority": float(most.mean()), "layers": share[::2], "votes": share[1::2]}
    sizes, sums = np.array([out[word]["uses"] for word in words], dtype=float), np.array(sums, dtype=float)
    drawn = np.random.default_rng(0).integers(len(words), size=(2_000, len(words)))
    spread = sums[drawn, 2::2].sum(axis=1) / sizes[drawn].sum(axis=1)[:, None]              # (2000, 3)
    majority, *share = (sums.sum(axis=0) / sizes.sum()).tolist()
    return {"words": out, "uses": int(sizes.sum()), "majority": majority, "layers": share[::2], "votes": share[1::2],
            "interval": np.percentile(spread, [2.5, 97.5], axis=0).T.tolist()}


def told(q: Uses, p: Uses, asked: list[list[str]], known: list[list[str]], layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Whether the nearest use is of a use's class, and whether the vote of the VOTERS nearest is: (uses,) each."""
    similar, found = cosines(q, p, layer), nearest(q, p, asked, known, layer, VOTERS)
    votes = np.array([np.bincount(p.classes[near], similar[i, near], minlength=p.classes.max() + 1).argmax()
                      for i, near in enumerate(found)])
    return p.classes[[near[0] for near in found]] == q.classes, votes == q.classes


def neighbours(bed: Bed, shown: int = 4, few: int = 6) -> dict:
    """Of the most evenly ambiguous words: nearest words by x, and the nearest use of two test uses of two classes."""
    query, pool, asked, known = found_uses(bed, "test", LEAST)
    train, test = texts_of(bed, "train"), texts_of(bed, "test")
    def evenness(word: str) -> float:
        share = np.bincount(query[word].classes, minlength=2) / len(query[word].rows)
        return -float(np.sum(share * np.log(np.maximum(share, 1e-12))))
    table, out = F.normalize(bed.elmo.model.table.float(), dim=1), []
    for word in sorted(query, key=evenness, reverse=True)[:shown]:
        i, q, p = bed.elmo.words.index[word], query[word], pool[word]
        near = (table @ table[i]).argsort(descending=True)[1:few + 1].tolist()
        two = [int(np.flatnonzero(q.classes == c)[0]) for c in np.bincount(q.classes).argsort()[::-1][:2]]
        found = nearest(Uses(q.vectors[two], q.rows[two], q.classes[two]), p, asked, known, 2)
        out.append({"word": word, "static": [bed.elmo.words.words[j] for j in near], "uses": [
            {"text": test[q.rows[a]], "label": bed.task.labels[q.classes[a]], "nearest": train[p.rows[b]],
             "nearest_label": bed.task.labels[p.classes[b]],
             "cosine": float(q.vectors[a, 2].astype(np.float32) @ p.vectors[b, 2].astype(np.float32))}
            for a, (b,) in zip(two, found, strict=True)]})
    return {"words": out}


# ----------------------------------------------------------------------------------------- from what was published
def weights(bed: Bed) -> dict:
    """s and gamma that each task learned, of every seed, from the JSON of the runs."""
    names = {"classification": "AG News", "finetuned": "AG News, biLM fine-tuned", "sst5": "SST, 5 classes",
             "sst2": "SST, 2 classes", "nli": "NLI"}
    runs = {title: bed.published(name)["settings"]["trainable"] for name, title in names.items()
            if (bed.folder / f"{name}.json").exists()}
    return {"tasks": {title: {"s": run["s"], "gamma": run["gamma"]} for title, run in runs.items()}}


def settings(bed: Bed) -> dict:
    """Each two of the classifier's settings, and the fine-tuned one, by what they predict of the test rows."""
    runs = dict(bed.published("classification")["settings"])
    if (bed.folder / "finetuned.json").exists():
        runs["finetuned"] = bed.published("finetuned")["settings"]["trainable"]
    right = {name: np.array([*run["predictions"]], dtype=int) == bed.task.test.labels for name, run in runs.items()}
    return {"rows": len(bed.task.test), "pairs": [{"one": one, "other": other} | mcnemar(right[one], right[other])
                                                  for one, other in combinations(right, 2)]}


SENTENCE = "The bank raised interest rates after the team left the bank of the river."


def heatmap(bed: Bed) -> dict:
    """Cosine similarity of each two words of a sentence, by layer."""
    h = F.normalize(bed.elmo.embed([SENTENCE])[0], dim=2)                       # (3, n, D)
    return {"text": SENTENCE, "tokens": bed.elmo.tokenize(SENTENCE), "layers": (h @ h.transpose(1, 2)).tolist()}


def documents(bed: Bed, rows: int = 2_000) -> dict:
    """t-SNE of the mean over words and layers of some test rows."""
    from sklearn.manifold import TSNE
    chosen = np.sort(np.random.default_rng(0).permutation(len(bed.task.test))[:rows])
    texts = [bed.task.test.texts[i][0] for i in chosen]
    layers = torch.stack([h.mean(dim=1) for h in bed.elmo.embed_stream(texts, "bf16")], dim=1)  # (3, rows, D)
    means, gold = layers.mean(dim=0), bed.task.test.labels[chosen]
    def same(vectors: Tensor) -> float:
        unit = F.normalize(vectors, dim=1)
        return float((gold[(unit @ unit.T).fill_diagonal_(-1).argmax(dim=1).numpy()] == gold).mean())
    xy = TSNE(metric="cosine", init="pca", random_state=0).fit_transform((means - means.mean(dim=0)).numpy())
    return {"rows": len(texts), "x": xy[:, 0].round(2).tolist(), "y": xy[:, 1].round(2).tolist(),
            "labels": gold.tolist(), "names": bed.task.labels, "same": same(means), "same_static": same(layers[0])}


def leaks(bed: Bed, rows: int = 500) -> dict:
    """What moves when one word of a test row becomes another: no forward state before it, no backward one after it."""
    random, half = np.random.default_rng(0), bed.elmo.model.config.output
    texts = [text for text, in bed.task.test.texts if len(bed.elmo.tokenize(text)) >= 3]
    out, shown = {"rows": 0, "changed": 0, "moved_forward_before": 0, "moved_backward_after": 0}, None
    for text in (texts[i] for i in random.permutation(len(texts))[:rows]):
        tokens = bed.elmo.tokenize(text)
        k, new = int(random.integers(len(tokens))), "iraq" if "iraq" not in tokens else "microsoft"
        other = [*tokens[:k], new, *tokens[k + 1:]]
        if bed.elmo.tokenize(" ".join(tokens)) != tokens or bed.elmo.tokenize(" ".join(other)) != other:
            continue        # its marks would be cut otherwise once they stand apart
        a, b = (bed.elmo.embed([" ".join(words)])[0] for words in (tokens, other))
        moved = (a != b).unflatten(2, (2, half)).any(dim=3)                     # (3, n, 2): layer, word, direction
        out["rows"] += 1
        out["changed"] += int(moved[:, k].all())
        out["moved_forward_before"] += int(moved[:, :k, 0].sum())
        out["moved_backward_after"] += int(moved[:, k + 1:, 1].sum())
        if shown is None and 12 <= len(tokens) <= 20 and 4 <= k < len(tokens) - 4:
            gap = (a - b)[1:]                                                   # (2, n, D)
            shown = {"tokens": tokens, "changed_word": k, "new": new, "forward": gap[..., :half].norm(dim=2).tolist(),
                     "backward": gap[..., half:].norm(dim=2).tolist()}
    return out | {"example": shown}


FINDINGS: dict[str, Callable[[Bed], dict]] = {
    "leaks": leaks, "heatmap": heatmap, "map": documents, "weights": weights, "settings": settings,
    "senses": senses, "neighbours": neighbours, "mixes": mixes, "labels": labels}


@script("findings.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 2 for an input that the user can mend, 130 after Ctrl-C; finished findings stay in the file."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="findings.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "models", help="folder of the published files and the JSON")
    parser.add_argument("--only", help=f"these alone, with commas between: {', '.join(FINDINGS)}")
    parser.add_argument("--resume", action="store_true", help="keep what the file has of this biLM, and finished runs")
    options = parser.parse_args(argv)
    wanted = options.only.split(",") if options.only else list(FINDINGS)
    if unknown := sorted(set(wanted) - set(FINDINGS)):
        raise InputError(f"--only names {unknown[0]!r}; expected some of {', '.join(FINDINGS)}")
    bed, file, result = Bed.of(options.out), options.out / "findings.json", {}
    if file.exists():
        with written_json(file) as old:
            result = old if old["bilm"] == bed.elmo.digest else {}
    if not options.resume:      # what is made anew leaves the file first, so that --resume can go on
        result = {name: found for name, found in result.items() if name not in wanted}
        if result:
            write_json(file, result)
        if "labels" in wanted:
            KEPT.unlink(missing_ok=True)
    for name in wanted:
        if options.resume and name in result:
            continue
        begin = time.perf_counter()
        found = FINDINGS[name](bed)
        result = {"bilm": bed.elmo.digest} | result | {name: found | {
            "command": f"python report/findings.py --only {name}", "versions": versions(),
            "minutes": found.get("minutes", 0) + (time.perf_counter() - begin) / 60,
            "machine": machine(torch.device(default_device()))}}
        write_json(file, result)
        print(f"{name}: {result[name]['minutes']:.1f} minutes", flush=True)
    figures.findings(result, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
