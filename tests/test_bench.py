"""Tests of report/bench.py, run/machine.py's description of the machine, and report/sweep.py."""
import json
import subprocess
import sys
import time
from functools import partial
from itertools import count
from threading import Event
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import SENTENCES, encoded, tiny

import classification
import ELMO
from data import sample
from data.batches import Sampler
from data.text import PAD
from report import bench, sweep
from run.machine import describe, provenance

CPU = torch.device("cpu")
SMALL = ["--hidden", "12", "--validation", "60", "--epochs", "1", "--batch-tokens", "300", "--negatives", "50",
         "--min-count", "1"]


# ------------------------------------------------------------------------------------------------ other loops
@pytest.mark.parametrize("hidden", [12, 20])
def test_the_plain_loop_has_elmos_model_and_the_full_softmax(hidden):
    config = tiny(hidden=hidden, width=12, dropout=0.0, precision="fp32")
    data = encoded(SENTENCES)
    model = bench.PlainModel(config, len(data.words))
    model.bias.data[PAD] = -1e9                             # ELMo's softmax is one over words, without <pad>
    rows = np.arange(len(SENTENCES))
    x, y = ELMO.collate(data.encoded, rows)
    scores = ELMO.score_rows(model, data.encoded, rows)
    for d in range(2):
        assert model.nll(d, x[d], y[d]).item() == pytest.approx(scores.nll[d].sum(), rel=1e-5)


@pytest.mark.parametrize("make, lr", [(bench.common_loop, 0.01), (bench.plain_loop, 0.02)])
def test_both_other_loops_learn_and_count_their_targets(make, lr, monkeypatch):
    monkeypatch.setattr(bench, "COMMON_WORDS", 400)
    torch.manual_seed(0)
    config = tiny(batch_tokens=300, hidden=16, width=16, lr=lr)
    data = encoded([text for _, _, text in sample.generate(150)])
    loop = make(config, data, CPU)
    steps = [loop.step(number) for number in range(2 * len(loop.batches))]
    passes = [(loss.item(), targets) for loss, targets in steps]
    first = np.array(passes[:len(loop.batches)])
    last = np.array(passes[-len(loop.batches):])
    targets = 2 * (data.encoded.lengths + 1).sum()          # every word and one boundary per row, in both directions
    assert first[:, 1].sum() == last[:, 1].sum() == targets
    assert last[:, 0].sum() < 0.95 * first[:, 0].sum()


def test_a_resized_vocabulary_has_the_same_rows_and_a_smaller_one_turns_rare_words_into_unk():
    data = encoded(SENTENCES)
    small = bench.resized(data, 10)
    large = bench.resized(data, 1000)
    assert len(small.words) == 10
    assert len(large.words) == 1000
    assert small.encoded.unknown(data.train) > 0 == large.encoded.unknown(data.train)
    assert (large.encoded.lookup == data.encoded.lookup).all()


def test_words_that_are_added_to_a_vocabulary_are_sampled_too():
    large = bench.resized(encoded(SENTENCES), 1000)
    assert (Sampler(large.counts(), 500, 0).pi[PAD + 1:] > 0).all()


# -------------------------------------------------------------------------------------------------- measuring
def test_the_second_repeat_takes_the_measures_in_the_opposite_order():
    number = count(1)
    repeats = bench.interleaved([lambda: {"a": next(number)}, lambda: {"b": next(number)}])
    assert repeats == [{"a": 1, "b": 2}, {"b": 3, "a": 4}, {"a": 5, "b": 6}]


def test_vocabularies_run_the_same_steps_and_every_second_step_in_the_opposite_order():
    steps = []
    def step(name, seconds, number):
        steps.append((name, number))
        time.sleep(seconds)
    trainers = {"10k": SimpleNamespace(step=partial(step, "10k", 0.01)),
                "800k": SimpleNamespace(step=partial(step, "800k", 0.03))}
    found = bench.step_seconds(trainers, seconds=0.05)
    assert steps[:4] == [("10k", 0), ("800k", 0), ("800k", 1), ("10k", 1)]
    assert 0.01 <= found["step_seconds_10k"] < found["step_seconds_800k"]
    assert found["step_seconds_800k"] >= 0.03


def timed_speed(trainer, seconds: float) -> tuple[float, float]:
    """(speed of a trainer whose steps have 10 items, the same of a single step by a clock outside)."""
    begin = time.perf_counter()
    speed = bench.training_speed("speed", trainer, seconds)["speed"]
    return speed, 10 / (time.perf_counter() - begin)


def test_speed_is_the_items_of_whole_steps_divided_by_their_time():
    numbers = []
    def step(number):
        numbers.append(number)
        time.sleep(0.02)
        return 0.0, 10
    speed, at_least = timed_speed(SimpleNamespace(step=step), 0.05)
    assert numbers == [0, 1, 2][:len(numbers)]              # fewer on a busy machine
    assert at_least * len(numbers) <= speed <= 500


class Gpu:
    """A trainer whose steps return at once while a device goes on computing; reading a loss waits for the device."""

    def __init__(self, seconds: float):
        self.seconds = seconds          # the device's time for one step
        self.end = 0.0                  # when the device will have done all steps so far
        self.steps = 0
        self.waits = 0

    def step(self, number: int) -> tuple:
        self.steps += 1
        self.end = max(self.end, time.perf_counter()) + self.seconds
        return self, None, 10           # (loss, gradient norm, items)

    def __float__(self) -> float:
        self.waits += 1
        time.sleep(max(0.0, self.end - time.perf_counter()))
        return 0.0


def test_speed_on_a_gpu_is_that_of_finished_steps_though_the_loss_is_seldom_read():
    gpu = Gpu(0.01)
    speed, at_least = timed_speed(gpu, 0.5)
    assert at_least * gpu.steps <= speed <= 1000            # 10 items in 0.01 seconds
    assert gpu.waits <= 2 + gpu.steps / 20
    bench.training_speed("speed", gpu, 0)
    assert time.perf_counter() >= gpu.end                   # the last step is waited for too


def test_the_busy_process_ends_if_the_bench_is_killed():
    parent = """import os, subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())])"""              # ends, but does not kill it
    command = [sys.executable, "-c", parent, bench.BUSY]
    subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=10)             # returns when both have ended


def test_the_bench_writes_medians_over_repeats_and_ratios_within_each_repeat(builtin, elmo, tmp_path, monkeypatch):
    config = classification.Config(hidden=8)
    head = classification.Head(config, "trainable", 3, 2 * elmo.config.width, 4).initialize(0)
    classifier = classification.Classifier(config, list("abcd"), head, elmo)
    monkeypatch.setattr(classification, "Config", partial(classification.Config, hidden=8))
    monkeypatch.setattr(classification.Classifier, "load", lambda *files, **device: classifier)
    monkeypatch.setattr(bench, "SIZES", {"10k": 500, "28k": 700, "100k": 1000, "800k": 5000})
    monkeypatch.setattr(bench, "COMMON_WORDS", 400)
    monkeypatch.setattr(bench, "QUICK_SECONDS", 0.05)
    monkeypatch.setattr(bench, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(bench, "startup", lambda: {"startup_seconds": 1.0})
    assert bench.main(["--quick", "--out", str(tmp_path), *SMALL]) == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    for name in set(result) - {"repeats"}:
        assert name in bench.__doc__ or name.startswith("step_seconds_"), name
    for name in result["repeats"][0]:
        assert result[name] == sorted(repeat[name] for repeat in result["repeats"])[1]
    for r in result["repeats"]:
        assert r["busy_over_idle_tokens"] == r["busy_tokens_per_second"] / r["tokens_per_second"]
        assert r["times_common_loop"] == r["tokens_per_second"] / r["common_loop_tokens_per_second"]
        assert r["largest_vocabulary_over_published"] == r["step_seconds_800k"] / r["step_seconds_28k"]
    assert (result["config"]["hidden"], result["tokenized_rows"]) == (12, 700)


# ---------------------------------------------------------------------------------------------------- machine
@pytest.mark.parametrize("limit, by", [
    ("", "AMX"), ("ALL", "AMX"), ("AVX512_CORE_AMX", "AMX"), ("AVX10_1_512_AMX", "AMX"),
    ("AVX512_CORE_BF16", "AVX-512"), ("AVX512_CORE_FP16", "AVX-512"), ("avx10_1_512", "AVX-512"),
    ("AVX512_CORE", None), ("AVX2", None)])
def test_the_device_names_the_limit_if_the_cpus_instructions_are_limited(monkeypatch, limit, by):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True, "avx512_bf16": True, "cpu_name": "A"})
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    found = describe(CPU)
    assert found["bf16_by"] == by
    assert found["device"] == (f"A, {limit} at most" if limit else "A")


@pytest.mark.parametrize("program, command", [("/a/report/bench.py", "python report/bench.py --quick"),
                                              ("/a/ELMO.py", "python ELMO.py --quick")])
def test_the_recorded_command_can_be_run_again_in_the_projects_folder(monkeypatch, program, command):
    monkeypatch.setattr(sys, "argv", [program, "--quick"])
    found = provenance(CPU, 90)
    assert (found["command"], found["minutes"]) == (command, 1.5)


# ------------------------------------------------------------------------------------------------------ sweep
def test_a_sweep_of_classifiers_scores_no_test_row(builtin, tmp_path, monkeypatch):
    elmo = ELMO.ELMo.train([text for _, _, text in sample.generate(100)], tiny(validation=20, epochs=1.0))
    elmo.save(tmp_path / "models" / "bilstm.pt")
    monkeypatch.setattr(ELMO, "HERE", tmp_path)
    trainer = Mock(wraps=classification.Trainer)
    monkeypatch.setattr(classification, "Trainer", trainer)
    argv = ["classification.py", "--search", "setting=trainable,frozen", "--trials", "1", "--out", str(tmp_path)]
    assert sweep.main([*argv, "--hidden", "6", "--rows", "60"]) == 0
    assert (tmp_path / "classification.toml").read_text() in ("setting = 'trainable'\n", "setting = 'frozen'\n")
    parts = [set(made.args[2]) for made in trainer.call_args_list]
    assert parts == [{"train", "validation"}] * 2          # the trainer that names the search, and the trial


@pytest.mark.parametrize("wrong", [
    ["BERT.py", "--search", "dropout=0:0.4"], ["ELMO.py"], ["ELMO.py", "--search", "dropout=0:0.4", "--width", "0"],
    *(["ELMO.py", "--search", search] for search in (
        "colour=1:2", "min_count=1:5", "lr=0.1:0.01", "lr=a:b", "lr=0:1:log", "hidden=1.5:3", "lr", "lr=1:2:3"))])
def test_a_sweep_refuses_wrong_inputs_in_one_sentence(tmp_path, capsys, wrong):
    assert sweep.main([*wrong, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "AG News" not in error            # refused before any data is read


def test_after_ctrl_c_finished_trials_stay_and_other_rows_start_another_search(builtin, tmp_path, monkeypatch):
    argv = ["ELMO.py", "--search", "dropout=0:0.4", "--search", "lr=0.003,0.006", "--trials", "2"]
    argv += ["--out", str(tmp_path), "--", *SMALL]
    losses = Mock(side_effect=[1.0, KeyboardInterrupt, float("inf"), 2.0, 3.0])
    monkeypatch.setattr(sweep, "lowest", losses)
    assert sweep.main(argv) == 130
    assert sweep.main(argv) == 0
    assert losses.call_count == 3
    train, trainer = losses.call_args_list[0].args
    assert train is ELMO.train
    found, _ = sweep.script_arguments(["--config", str(tmp_path / "ELMO.toml")], ELMO.Config, "", "", tmp_path, {})
    searched = {"dropout": trainer.config.dropout, "lr": trainer.config.lr}
    assert found == ELMO.Config(**searched)                     # inf is not the best; others have their defaults
    assert sweep.main([*argv, "--rows", "500"]) == 0
    assert losses.call_count == 5


def test_a_file_that_is_no_study_is_refused(builtin, tmp_path, capsys):
    (tmp_path / "studies.db").write_bytes(b"no database at all" * 100)
    assert sweep.main(["ELMO.py", "--search", "dropout=0:0.4", "--out", str(tmp_path), "--", *SMALL]) == 2
    assert "studies.db cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize("finished, asked", [(False, False), (True, True)])     # the last: stopped while it evaluates
def test_a_stopped_trial_ends_the_sweep(finished, asked):
    run = SimpleNamespace(finished=finished, stop_event=SimpleNamespace(is_set=lambda: asked))
    with pytest.raises(KeyboardInterrupt):
        sweep.lowest(lambda trainer: run, None)


def test_a_trial_returns_its_lowest_loss_or_infinity_if_a_loss_is_not_finite():
    run = SimpleNamespace(finished=True, stop_event=Event(), lowest=1.5)
    assert sweep.lowest(lambda trainer: run, None) == 1.5
    assert sweep.lowest(Mock(side_effect=ELMO.InputError("the loss is not finite")), None) == float("inf")
