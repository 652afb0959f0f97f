"""The numbers of classification.py: every setting on training, validation and test rows, their table and JSON.

OUT/{classification, finetuned, titled, sst5, word2vec, ..}.json, by the run's knobs:
    command, config, versions, machine, minutes (from command to file), peak_memory_gb, task, labels, bilm (digest)
    history [of each run: {step, epoch, seconds, train_loss (mean over heads, with dropout and label smoothing),
        validation.{setting}: {loss, accuracy} per seed}]
    settings.{setting}: s, gamma (per seed; none for `function`), parameters, best (number of the seed that is best on
        validation rows), predictions (test rows' label numbers by the seeds' mean probabilities, a digit a row) and
        for train (10,000 of its rows), validation and test:
            accuracy, macro_f1: {mean, deviation} over seeds    seeds: [classification.metrics of each]
            together: classification.metrics of the seeds' mean probabilities
            fresh (AG News test): rows, accuracy, macro_f1 as above, and together: {accuracy}
            without_ngrams (with --ngrams): accuracy as above, together: {accuracy}, and fresh with these two
    ngrams (with --ngrams): share of the linear model, accuracy of it alone on train, validation and test rows; it is in
        all numbers but those of the history
Seeds on a frozen biLM differ in weights and dropout and share the order of the batches, since the biLM runs once for
all; fine-tuned ones differ in that order too. The pass whose weights are kept is chosen for all heads of a run.
"""
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from data.files import write_json
from data.machine import machine, peak_memory_gb, versions
from data.ngrams import Ngrams
from data.prepare import Part, Task
from report import figures

SAMPLE = 10_000     # training rows that are measured


def summary(p: np.ndarray, gold: np.ndarray, labels: Sequence[str], metrics: Callable) -> dict:
    """Metrics of S seeds' probabilities p (S, N, C), as the schema above says."""
    seeds = [metrics(each, gold, labels) for each in p]
    out = {"seeds": seeds, "together": metrics(p.mean(axis=0), gold, labels)}
    for key in ("accuracy", "macro_f1"):
        values = [seed[key] for seed in seeds]
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        out[key] = {"mean": float(np.mean(values)), "deviation": deviation}
    return out


def measure(runs: list, task: Task, metrics: Callable, ngrams: Ngrams | None = None) -> dict:
    """A result without what `publish` adds, from finished runs whose trainers hold the weights to be measured."""
    trainer = runs[0].trainer
    config, parts = trainer.config, trainer.parts
    sample = np.sort(np.random.default_rng([config.seed, 4]).permutation(len(task.train))[:SAMPLE])
    result = {"config": asdict(config), "machine": machine(trainer.device), "task": task.name, "labels": task.labels,
              "history": [run.history for run in runs], "settings": {}}
    for setting in config.settings:
        result["settings"][setting] = {"s": [], "gamma": []}
    every = {"validation": task.validation, "train": task.train.take(sample), "test": task.test}
    for name, part in every.items():        # validation first: it chooses the linear model's share
        found = [run.trainer.probabilities(parts[name], sample if name == "train" else None) for run in runs]
        plain = {setting: torch.cat([each[setting] for each in found]) for setting in config.settings}      # (S, N, C)
        mixed = plain if ngrams is None else mix_in(ngrams, plain, part, name, result)
        for setting, numbers in result["settings"].items():
            numbers[name] = measured(mixed[setting].numpy(), part, task, metrics)
            if ngrams:
                numbers[name]["without_ngrams"] = brief(measured(plain[setting].numpy(), part, task, metrics))
            if name == "test":
                numbers["predictions"] = "".join(map(str, mixed[setting].mean(dim=0).argmax(dim=1).tolist()))
    for setting, numbers in result["settings"].items():
        heads = [run.trainer.model[setting] for run in runs]
        for head in heads if hasattr(heads[0].mix, "gamma") else []:
            numbers["s"] += head.mix.s().tolist()
            numbers["gamma"] += head.mix.gamma[:, 0].tolist()
        numbers["parameters"] = sum(value.numel() for value in heads[0].state_dict().values()) // heads[0].S
        numbers["best"] = int(np.argmax([seed["accuracy"] for seed in numbers["validation"]["seeds"]]))
    return result


def measured(p: np.ndarray, part: Part, task: Task, metrics: Callable) -> dict:
    """The summary of a part's rows, and for test rows that of the fresh ones in brief."""
    out = summary(p, part.labels, task.labels, metrics)
    if part is task.test and task.fresh is not None and task.fresh.any():
        fresh = summary(p[:, task.fresh], part.labels[task.fresh], task.labels, metrics)
        out["fresh"] = {"rows": int(task.fresh.sum()), "macro_f1": fresh["macro_f1"]} | brief(fresh)
    return out


def brief(numbers: dict) -> dict:
    """The accuracy of a summary, over seeds and of their mean, and of its fresh rows."""
    out = {"accuracy": numbers["accuracy"], "together": {"accuracy": numbers["together"]["accuracy"]}}
    return out | ({"fresh": brief(numbers["fresh"])} if "fresh" in numbers else {})


def mix_in(ngrams: Ngrams, plain: dict, part: Part, name: str, result: dict) -> dict:
    """{setting: (S, N, C)} with the linear model's share, which validation rows choose; result["ngrams"] says it."""
    q, gold = ngrams.probabilities(part.texts), torch.from_numpy(part.labels)
    if name == "validation":
        ngrams.choose(list(plain.values()), q, gold)
        result["ngrams"] = {"share": float(ngrams.weights["share"]), "accuracy": {}}
    result["ngrams"]["accuracy"][name] = float((q.argmax(dim=1) == gold).double().mean())
    return {setting: ngrams.mixed(p, q) for setting, p in plain.items()}


def publish(result: dict, out: Path, stem: str, seconds: float) -> None:
    """Figures and JSON of a result that took so many seconds from the command on."""
    result |= {"command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]), "versions": versions()}
    figures.classification(result, out, stem)
    result |= {"minutes": seconds / 60, "peak_memory_gb": peak_memory_gb()}
    write_json(out / f"{stem or 'classification'}.json", result)
    print(table(result))


def table(result: dict) -> str:
    """Accuracies and layer weights of a result as lines to print."""
    lines = [f"{'accuracy':<12}{'train':>9}{'validation':>12}{'test':>9}{'deviation':>11}{'fresh rows':>12}"
             f"{'macro-F1':>10}   layers s, gamma"]
    for setting, r in result["settings"].items():
        test, deviation = r["test"], r["test"]["accuracy"]["deviation"]
        fresh = f"{test['fresh']['accuracy']['mean']:.2%}" if "fresh" in test else "-"
        mix = "; ".join(f"{' '.join(f'{w:.2f}' for w in s)}, {g:.2f}" for s, g in zip(r["s"], r["gamma"], strict=True))
        lines.append(f"{setting:<12}{r['train']['accuracy']['mean']:>9.2%}{r['validation']['accuracy']['mean']:>12.2%}"
                     f"{test['accuracy']['mean']:>9.2%}{'-' if deviation is None else f'{deviation:.2%}':>11}"
                     f"{fresh:>12}{test['macro_f1']['mean']:>10.4f}   {mix}")
    return "\n".join(lines)
