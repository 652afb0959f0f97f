"""Both scripts as a user runs them: whole runs, stops and resumes, several processes, and wrong options."""
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import ROOT, arguments, changed, classifier, files, labelled, numbers, refused, tiny, trainer_of
from torch.testing import assert_close

import classification
import ELMO
from data import sample
from data.batches import collate
from data.text import Data
from run.checkpoint import write_resume
from run.files import InputError
from run.options import script_arguments
from run.progress import Run

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------- whole runs
def test_both_scripts_write_their_models_numbers_and_figures_and_nothing_else(whole):
    confusions = "frozen_test frozen_train function_test function_train trainable_test trainable_train words".split()
    assert files(whole) == [
        "bilstm.pt", "classification.json", "classifier.pt", *[f"figures/confusion_{name}.png" for name in confusions],
        "figures/curves_classification.png", "figures/curves_pretraining.png", "pretraining.json"]
    for picture in (whole / "figures").iterdir():
        assert min(matplotlib.image.imread(picture).shape[:2]) > 400, "at least 2 inches of 200 dots"
    result = numbers("pretraining", whole)
    assert result["splits"]["test"]["rows"] == 100
    assert result["splits"]["test"]["fresh"]["rows"] > 90
    assert result["digest"] == torch.load(whole / "bilstm.pt", weights_only=True)["digest"]
    assert len(result["history"]) == 3
    assert result["config"]["hidden"] == 12
    assert (result["betas"], result["clip"]) == (list(ELMO.BETAS), ELMO.CLIP)
    printed = Path(f"{whole}.log").read_text()
    assert "tokens/s" in printed
    assert "Kneser-Ney" in printed


def test_published_perplexities_are_those_of_the_model_in_the_file(whole, bilm, corpus):
    result = numbers("pretraining", whole)["splits"]["test"]
    texts, _ = labelled(corpus / "test.csv")
    found = bilm.score(texts)
    for name in ELMO.DIRECTIONS:
        assert found[name]["perplexity"] == pytest.approx(result[name]["perplexity"], rel=1e-5)
        assert found[name]["tokens"] == result["tokens"] == sum(len(text.split()) + 1 for text in texts)


def test_word_predictions_of_a_batch_are_those_of_its_texts_one_by_one(bilm, corpus):
    model = bilm.model
    texts, _ = labelled(corpus / "test.csv", slice(30))
    expected = []
    for text in texts:
        ids, y = collate(bilm.encode([text]), np.array([0]))
        h = model.states(0, model.represent(ids)[0])[-1][:, 0]                          # (T, P), forward
        logits = h @ model.table.t() + model.bias[:, 0]                                 # (T, V)
        best = logits[:, 1:].argmax(dim=1) + 1                                          # <pad> is never predicted
        expected += zip(y[0, :, 0].tolist(), best.tolist(), strict=True)
    scores = ELMO.score_rows(model, bilm.encode(texts), np.arange(30), details=True)
    _, gold, best, _ = scores.words[0]
    assert sorted(zip(gold.tolist(), best.tolist(), strict=True)) == sorted(expected)


def test_held_out_perplexity_on_the_built_in_corpus_is_near_the_sources_and_not_below_it(grammar):
    texts = [text for _, _, text in sample.generate(1000, seed=2)]
    elmo = ELMO.ELMo.load(grammar / "bilstm.pt")
    source = sample.nll_batch(texts)
    scores = ELMO.score_rows(elmo.model, elmo.encode(texts), np.arange(len(texts)))
    for name, nll in zip(ELMO.DIRECTIONS, scores.nll, strict=True):
        loss = (nll - source) / scores.tokens.sum()             # (rows,) what the model loses on each row, per token
        error = loss.std() * np.sqrt(len(loss))
        print(f"{name}: {np.exp(loss.sum()):.4f} times the perplexity of the source")
        assert -3 * error < loss.sum() < np.log(1.10)


def test_a_notebook_opens_the_committed_model_with_torch_alone_and_it_scores_real_rows(ag_news):
    path = ROOT / "models" / "bilstm.pt"
    if not path.exists():
        pytest.skip("models/bilstm.pt is missing: run `python ELMO.py` first")
    content = torch.load(path, weights_only=True)
    assert list(content) == ["format", "config", "words", "weights", "history", "metrics", "digest"]
    assert path.stat().st_size < 45e6
    result = numbers("pretraining")
    assert result["digest"] == content["digest"]
    texts, _ = labelled(ag_news / "test.csv", slice(300))
    found = ELMO.ELMo.load(path).score(texts)
    for name in ELMO.DIRECTIONS:        # 300 of 7,600 rows: a standard error of about 7 % in perplexity
        expected = result["splits"]["test"][name]["perplexity"]
        assert found[name]["perplexity"] == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize("setting", classification.SETTINGS)
def test_the_committed_classifier_reaches_its_published_accuracy_on_real_rows(ag_news, setting):
    models = ROOT / "models"
    if not (models / "classifier.pt").exists():
        pytest.skip("models/classifier.pt is missing: run `python classification.py --seeds 3` first")
    result = numbers("classification")["settings"][setting]
    published = result["test"]["seeds"][result["best"]]["accuracy"]
    rows = np.arange(0, 7000, 7)
    texts, gold = labelled(ag_news / "test.csv", rows)
    predicted = classifier(models, setting).probabilities(texts, "auto").argmax(dim=1).numpy()
    error = math.sqrt(published * (1 - published) / 1000)
    assert abs(np.mean(predicted == gold) - published) < 3 * error
    all_seeds = np.array(list(result["predictions"]), dtype=int)[rows]
    assert np.mean(predicted == all_seeds) > 0.95


# ------------------------------------------------------------------------------------------ stops and resumes
def test_a_stop_between_two_files_of_the_end_is_mended_by_resuming(builtin, whole, tmp_path, monkeypatch):
    argv = arguments("ELMO.py", tmp_path, tmp_path, "--resume")
    replace = Path.replace
    for name in ("bilstm.pt", "figures/curves_pretraining.png", "pretraining.json"):
        def stop_at_name(part, target, name=name):
            if Path(target) == tmp_path / name:
                raise KeyboardInterrupt
            return replace(part, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", stop_at_name)
            assert ELMO.main(argv) == 130
        assert (tmp_path / "bilstm.resume.pt").exists()
        assert not (tmp_path / name).exists()
    assert ELMO.main(argv) == 0
    assert files(tmp_path) == ["bilstm.pt", "figures/confusion_words.png", "figures/curves_pretraining.png",
                               "pretraining.json"]


class StoppedRun(Run):
    """A run that Ctrl-C stops before step 13."""

    def stop(self) -> bool:
        if self.step == 13:
            self.stop_event.set()
        return super().stop()


def bilm_trainer(**options) -> ELMO.Trainer:
    """A trainer of a biLM on 150 rows of the built-in corpus."""
    config = tiny(**{"batch_tokens": 600, "epochs": 4.0} | options)
    texts = [text for _, _, text in sample.generate(200)]
    return ELMO.Trainer(config, Data.of(texts, config, np.arange(150), np.arange(150, 200)), CPU)


@pytest.mark.parametrize("module, options", [
    (ELMO, {"representation": "char"}), (ELMO, {"representation": "word2vec"}), (ELMO, {"hidden": 384}),
    (classification, {}), (classification, {"finetune": True, "unfreeze": 0.2})])
def test_a_stopped_and_resumed_run_ends_as_one_that_was_not_stopped(elmo, tmp_path, monkeypatch, module, options):
    new_trainer = bilm_trainer if module is ELMO else partial(trainer_of, elmo, seeds=2)
    undisturbed = module.train(new_trainer(**options))
    with monkeypatch.context() as patch:
        patch.setattr(module, "Run", StoppedRun)
        stopped = module.train(new_trainer(**options), tmp_path / "resume.pt")
    assert stopped.step == 13
    assert len(stopped.history) == 13 // stopped.trainer.interval
    resumed = module.train(new_trainer(**options), tmp_path / "resume.pt", resume=True)
    assert not changed(undisturbed.best, resumed.best)
    assert_close(resumed.trainer.state(), undisturbed.trainer.state(), rtol=0, atol=0)
    for found, expected in zip(resumed.history, undisturbed.history, strict=True):
        assert found | {"seconds": 0} == expected | {"seconds": 0}


def test_a_run_stops_if_any_process_was_asked_to(tmp_path, monkeypatch):
    trainer = bilm_trainer()
    for votes in (0.0, 1.0):            # those of the other process
        with monkeypatch.context() as patch, Run(trainer, tmp_path / "resume.pt") as run:
            patch.setattr("run.progress.sum_over_processes", lambda own, votes=votes: [own[0] + votes])
            assert run.stop() == (votes > 0)


def trained(corpus: Path, out: Path, *launch: str) -> dict[str, torch.Tensor]:
    """The weights of a short run in processes of its own, which `launch` starts."""
    short = ["--batch-tokens", "30", "--epochs", "0.04", "--dropout", "0.2", "--word-dropout", "0.1",
             "--precision", "fp32", "--log-every", "2"]
    environment = os.environ | {"AG_NEWS_DIR": str(corpus), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launch, str(ROOT / "ELMO.py"), *arguments("ELMO.py", out, out, *short)],
                   env=environment, check=True, timeout=300)
    return {name: value.float() for name, value in torch.load(out / "bilstm.pt")["weights"].items()}


def test_two_processes_train_as_one_does_on_the_same_batches(corpus, tmp_path):
    one = trained(corpus, tmp_path / "one")
    two = trained(corpus, tmp_path / "two", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    bias = one["forward.0.bias_ih_l0"]
    assert (bias - bias.round()).abs().max() > 0.03         # it has learned: every bias begins as 0 or 1
    for name in one:
        assert torch.allclose(one[name], two[name], atol=4e-3), name


def test_a_resume_state_of_other_options_or_damaged_is_refused(builtin, tmp_path):
    file = tmp_path / "bilstm.resume.pt"
    trainer = bilm_trainer()
    ELMO.train(trainer, file)
    argv = arguments("ELMO.py", tmp_path, tmp_path, "--resume")
    assert "was made with" in refused("ELMO.py", argv, tmp_path)
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    file.write_bytes(content[:middle])
    assert "cannot be opened" in refused("ELMO.py", argv, tmp_path)
    content[middle] ^= 1
    file.write_bytes(content)
    assert "does not match its digest" in refused("ELMO.py", argv, tmp_path)
    write_resume(file, trainer.identity(), {})
    with pytest.raises(InputError, match="cannot be resumed"):
        Run(trainer, file, resume=True)


# ---------------------------------------------------------------------------------------------- wrong options
WRONG_OPTIONS = {
    "ELMO.py --validation 600": "validation is 600", "ELMO.py --rows 601": "rows is 601",
    "ELMO.py --dropout 2": "dropout is 2", "ELMO.py --hidden x": "--hidden", "ELMO.py --hidden 0": "hidden is 0",
    "ELMO.py --lr nan": "lr is nan", "ELMO.py --epochs -1": "epochs is -1", "ELMO.py --colour": "--colour",
    "ELMO.py --representation bert": "invalid choice", "ELMO.py --config missing.toml": "missing.toml",
    "ELMO.py --embed missing.txt": "go together", "ELMO.py --npz a.npz": "go together",
    "ELMO.py --embed missing.txt --npz a.npz": "missing.txt cannot be read",
    "ELMO.py --embed a.txt --npz a.npz": "bilstm.pt is missing",
    "ELMO.py --out a.txt": "a.txt is a file", "ELMO.py extra": "unrecognized",
    "classification.py --setting best": "invalid choice", "classification.py --seeds 0": "seeds is 0",
    "classification.py --rows 541": "rows is 541", "classification.py --lr nan": "lr is nan",
    "classification.py --colour": "--colour", "classification.py --predict a": "classifier.pt is missing",
    "classification.py --task sst2 --fields title+description": "no titles",
    "classification.py --data missing": "train.csv (or .tsv, .jsonl) is missing",
    "classification.py --data a --task sst2": "leave out --task", "classification.py --text a": "are for --data",
    "classification.py --fields pair": "are for --data", "classification.py --rows 1": "no training row of the class",
    "classification.py --tokenized": "is for --data and --predict",
    "ELMO.py --embed a.txt --start a.pt --npz b.npz": "--start and --corpus are for training",
    "classification.py --task own": "are for --data", "ELMO.py --start missing.pt": "missing.pt is missing",
    "ELMO.py --tokenized": "AG News is not tokenized",
    "classification.py --bilstm missing.pt": "missing.pt is missing",
    "classification.py --bilstm a.txt": "cannot be opened",
    "classification.py --task sst2": "SST_DIR is not set", "classification.py --task nli": "NLI_DIR is not set"}


@pytest.mark.parametrize("command, message", WRONG_OPTIONS.items())
def test_a_wrong_option_is_named_in_one_sentence(builtin, whole, monkeypatch, tmp_path, command, message):
    monkeypatch.delenv("SST_DIR", raising=False)
    monkeypatch.delenv("NLI_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a file\n")
    name, *wrong = command.split()
    argv = arguments(name, tmp_path / "out", whole / "bilstm.pt", *wrong)
    assert message in refused(name, argv, tmp_path)


def test_the_command_line_wins_over_the_toml_file(tmp_path):
    (tmp_path / "a.toml").write_text("hidden = 7\ndropout = 0\nfreeze_word2vec = true\n")
    argv = ["--config", str(tmp_path / "a.toml"), "--hidden", "9"]
    config, options = script_arguments(argv, ELMO.Config, "", "", tmp_path, {})
    assert (config.hidden, config.dropout, config.freeze_word2vec, config.width) == (9, 0.0, True, 9)
    assert options.out == tmp_path
