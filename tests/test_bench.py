"""report/bench.py: it measures what it says, against loops that train what ELMO.py trains."""
import json
import sys

import numpy as np
import pytest
import torch
from conftest import SENTENCES, encoded, tiny

import ELMO
from data import sample
from data.machine import machine
from report import bench, loops, readme

CPU = torch.device("cpu")


def trainer(**knobs) -> ELMO.Trainer:
    texts = [text for _, _, text in sample.generate(300)]
    config = tiny(**({"batch_tokens": 300, "hidden": 16, "width": 16, "negatives": 50} | knobs))
    data = ELMO.Data.of(texts, config, np.arange(250), np.arange(250, 300))
    return ELMO.Trainer(config, data, CPU)


@pytest.mark.parametrize("knobs", [{}, {"hidden": 24}])
def test_the_products_measured_alone_are_those_of_a_step_to_the_last_operation(knobs):
    own = trainer(**knobs)
    for step in (0, 3):
        whole, alone = bench.operations(lambda step=step: own.step(step)), bench.operations(loops.products(own, step))
        assert alone == whole > 1e5


@pytest.mark.parametrize("hidden", [12, 20])
def test_the_plain_loops_model_is_elmos(hidden):
    config = tiny(hidden=hidden, width=12, dropout=0.0)
    data = encoded(SENTENCES)
    own, plain = ELMO.BiLM(config, len(data.words)), loops.PlainLM(config, len(data.words)).eval()
    plain.table.weight.data.copy_(own.table)
    order = torch.cat([torch.arange(hidden * k, hidden * (k + 1)) for k in (0, 1, 3, 2)])   # torch has i f u o
    for j, layer in enumerate(own.layers):
        for d in range(2):
            lstm = plain.layers[2 * j + d]
            lstm.weight_ih_l0.data.copy_(layer.w_x[d][order])
            lstm.weight_hh_l0.data.copy_(layer.w_h[d][order])
            lstm.bias_ih_l0.data.copy_(layer.bias[d][order])
            lstm.bias_hh_l0.data.zero_()
            if hidden > 12:
                lstm.weight_hr_l0.data.copy_(layer.w_p[d])
    x, _ = ELMO.collate(data.encoded, np.arange(len(SENTENCES)))
    with torch.no_grad():
        expected = own.states(own.represent(x))[2]
        for d in range(2):
            assert torch.allclose(plain(x[d], d), expected[d], atol=1e-5)


def test_both_other_loops_learn_and_count_their_targets(monkeypatch):
    monkeypatch.setattr(loops, "COMMON_WORDS", 400)
    monkeypatch.setattr(loops, "COMMON_WIDTH", 40)
    own = trainer()
    everything = 2 * int((np.diff(own.data.encoded.tokens.offsets)[own.data.train] + 1).sum())
    plain = loops.PlainLoop(own.config, own.data, torch.float32, CPU, lr=0.02)
    before = loops.perplexity(plain, own.data.validation)
    assert sum(plain() for _ in range(own.per_epoch)) == everything
    for _ in range(3 * own.per_epoch):
        plain()
    assert loops.perplexity(plain, own.data.validation) < 0.8 * before
    common = loops.CommonLoop(own.data, 0, 0, CPU)
    before = loops.perplexity(common, own.data.validation)
    assert sum(common() for _ in range(-(-len(own.data.train) // loops.COMMON_BATCH))) == everything
    for _ in range(30):
        common()
    assert loops.perplexity(common, own.data.validation) < 0.8 * before


def test_a_resized_vocabulary_keeps_the_rows_and_turns_rare_words_into_unk():
    data = encoded(SENTENCES)
    small, large = loops.resize(data, 10), loops.resize(data, 1000)
    assert len(small.words) == 10 and len(large.words) == 1000
    assert small.encoded.unknown(data.train) > 0 == large.encoded.unknown(data.train)
    assert (large.counts()[4:] > 0).all() and (large.encoded.lookup == data.encoded.lookup).all()


def test_the_bench_writes_its_numbers_and_keeps_those_of_other_devices(builtin, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "SIZES", {"10k": 500, "100k": 1000, "800k": 5000})
    monkeypatch.setattr(bench, "WIDTHS", (8,))
    monkeypatch.setattr(loops, "COMMON_WORDS", 400)
    monkeypatch.setattr(bench, "ROOT", tmp_path)                    # no committed weights there
    monkeypatch.setattr(bench, "startup", lambda: {"startup_seconds": 1.0})
    out = tmp_path / "bench.json"
    old = {"machine": {"device": "another"}, "quick": True, "tokens_per_second": 5.0}
    out.write_text(json.dumps(old))
    argv = ["--quick", "--seconds", "0.05", "--out", str(out), "--hidden", "16", "--validation", "60", "--batch-tokens",
            "300", "--negatives", "50", "--min-count", "1", "--to-perplexity", "1e6", "--minutes", "0.05"]
    assert bench.main(argv) == 0
    result = json.loads(out.read_text())
    assert {"times_common_loop", "times_common_loop_batch_padded", "share_of_peak", "tokens_per_second",
            "share_of_products", "times_plain_fp32", "step_time_800k_over_10k"} < set(result)
    assert result["devices"] == {"another": old} and len(result["repeats"]) == 3
    repeat = result["repeats"][0]
    assert repeat["times_common_loop"] == repeat["tokens_per_second"] / repeat["common_loop_tokens_per_second"]
    assert result["operations_per_target"] == 6 * (2 * 2 * 4 * 16 * 16 + 16 * 51)
    assert result["to_perplexity"]["minutes"]["elmo"] > 0
    assert set(result["passes"]) == {"training", "embed_fp32", "embed_bf16"}
    assert bench.main([*argv[:-4], "--seconds", "0.01"]) == 0      # the minutes to a perplexity stay
    assert json.loads(out.read_text())["to_perplexity"] == result["to_perplexity"]


@pytest.mark.parametrize("most, by", [
    ("", "AMX"), ("ALL", "AMX"), ("AVX512_CORE_AMX", "AMX"), ("AVX10_1_512_AMX", "AMX"),
    ("AVX512_CORE_BF16", "AVX-512"), ("AVX512_CORE_FP16", "AVX-512"), ("avx10_1_512", "AVX-512"),
    ("AVX512_CORE", None), ("AVX2", None)])
def test_a_machine_whose_instructions_are_limited_is_another_device(monkeypatch, most, by):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True, "avx512_bf16": True, "cpu_name": "A"})
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", most)
    found = machine(CPU)
    assert found["bf16_by"] == by and found["bf16_hardware"] == bool(by)
    assert found["device"] == (f"A, {most} at most" if most else "A")
    assert (f"bf16 by {by}" if by else "without bf16 hardware") in readme.on(found)


def test_the_memory_of_a_process_is_its_own_and_not_that_of_the_one_that_started_it():
    large = np.ones(100_000_000)                                    # 0.8 GB
    command = "from data.machine import peak_memory_gb; print(peak_memory_gb())"
    assert float(bench.output_of([sys.executable, "-c", command])) < 0.8 < bench.peak_memory_gb() and large[0] == 1


def test_a_pass_is_told_by_the_operations_of_its_products_and_by_its_kernels():
    a = torch.randn(256, 128)
    found = bench.one_pass(lambda: (a @ a.t()).relu(), torch.float32, {"fp32_gflops": 50.0}, CPU)
    assert found["operations"] == 2 * 256 * 256 * 128 and found["precision"] == "fp32"
    assert found["share_of_peak"] == found["operations"] / found["seconds"] / 50e9
    assert found["kernels"]["aten::mm"] > 0.02 and abs(sum(found["kernels"].values()) - 1) < 1e-9


def test_embedding_on_several_cores_is_told_by_the_operations_of_all_of_them(elmo):
    H, cores, texts = elmo.config.hidden, torch.get_num_threads(), ["oil prices fall ."] * 600
    try:
        torch.set_num_threads(2)
        found = bench.one_pass(lambda: elmo.embed(texts), torch.float32, {"fp32_gflops": 50.0}, CPU, one_core=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(cores)
    T = 4 + 1                                           # 2 directions, 2 layers, W_x at T steps and W_h at all but one
    assert found["operations"] == 600 * 2 * 2 * (T + T - 1) * 2 * 4 * H * H
    assert "aten::baddbmm_" in found["kernels"] or "aten::bmm" in found["kernels"]
