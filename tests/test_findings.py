"""What report/ measures beside the scripts' own numbers: senses, leaks, variants of the mix, sweeps, trackers."""
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SENTENCES

import ELMO
from data.prepare import Part, Task
from data.text import Texts
from report import findings, sweep
from report.findings import Uses, Variant, Variants, nearest

SMALL = ["--hidden", "12", "--validation", "60", "--epochs", "2", "--batch-tokens", "300", "--negatives", "50",
         "--min-count", "2", "--log-every", "20"]


def unit(*rows) -> np.ndarray:
    """(uses, 3, 2) vectors that are the same in all layers."""
    rows = np.array(rows, dtype=np.float32)
    return np.repeat((rows / np.linalg.norm(rows, axis=1, keepdims=True))[:, None], 3, axis=1)


def test_the_nearest_use_is_that_of_the_largest_cosine_that_is_no_near_copy():
    asked = ["a b c d e f g h i".split(), "the bank of the river".split()]
    known = ["x a b c d e f g h".split(), "other words".split(), "a bank".split()]
    pool = Uses(unit([1, 0], [1, 1], [0, 1]), np.arange(3), np.zeros(3))
    query = Uses(unit([1, 0.1], [0.1, 1]), np.arange(2), np.zeros(2))
    assert nearest(query, pool, asked, known, 1).tolist() == [1, 2]     # row 0 of the pool shares eight words


def test_nouns_are_words_between_a_determiner_and_a_follower(elmo):
    bed = SimpleNamespace(elmo=elmo)
    tokens = ["the cat sat on the mat .".split(), "oil prices fall .".split(), "a cat of the mat ,".split()]
    assert findings.nouns(bed, tokens) == {"cat", "mat"}    # "a cat of" is one of the cats two uses, "the cat sat" none
    assert findings.nouns(bed, [*tokens, *["red cat sat on a mat .".split()] * 9]) == {"mat"}        # 1 in 11


def bed_of(elmo, texts: list[str]) -> findings.Bed:
    part = Part([(text,) for text in texts], np.arange(len(texts)) % 2)
    task = Task("ag_news", ["a", "b"], part, part, part, texts)
    return findings.Bed(None, elmo, task, {"validation": Texts(part, elmo), "test": Texts(part, elmo)})


def test_the_leak_test_is_silent_on_the_bilm_and_not_on_a_model_that_leaks(elmo, monkeypatch):
    bed = bed_of(elmo, SENTENCES)
    found = findings.leaks(bed)
    assert found["rows"] == found["changed"] == 3           # the fourth text has two words
    assert found["moved_forward_before"] == found["moved_backward_after"] == 0
    states = elmo.model.states
    def leaking(*args):
        return [h + h.mean(dim=1, keepdim=True) for h in states(*args)]
    monkeypatch.setattr(elmo.model, "states", leaking)
    found = findings.leaks(bed)
    assert found["moved_forward_before"] and found["moved_backward_after"]


def test_a_strong_lambda_keeps_the_layers_equal_and_variants_see_what_their_names_say():
    torch.manual_seed(0)
    config = Variants(hidden=4, dropout=0.0)
    h, n = torch.randn(4, 2, 5, 6, 8), torch.tensor([5, 4, 3, 2, 1, 5])
    h[3, ..., 4:] = 0
    gold, moved = torch.tensor([0, 1, 0, 1, 0, 1]), {}
    findings_static, findings.STATIC = findings.STATIC, 4
    try:
        for name in config.settings:
            head = Variant.of_seeds([0, 1], config, name, 4, 8, 2)
            adam = torch.optim.SGD(head.parameters(), lr=0.5)
            for _ in range(20):
                loss = torch.nn.functional.cross_entropy(head(h, n)[0], gold) * 100
                adam.zero_grad()
                loss.backward()
                head.clip(1.0)
                adam.step()
            out = head(h, n)
            moved[name] = [not torch.equal(out, head(h.index_fill(0, torch.tensor(j), 0.3), n)) for j in range(4)]
            assert out.shape == (2, 6, 2)
            if name == "all layers, lambda 1":
                strong = head.mix.s()[0]
            if name == "all layers, lambda 0":
                free = head.mix.s()[0]
    finally:
        findings.STATIC = findings_static
    assert moved["layer 1"] == [False, True, False, False]
    assert moved["all layers, lambda 1"] == [True, True, True, False]
    assert moved["Word2Vec"] == [False, False, False, True]
    assert all(all(moved[name]) for name in config.settings if "ELMo at" in name)
    assert (strong - 1 / 3).abs().max() < (free - 1 / 3).abs().max()


def test_findings_of_another_bilm_are_refused(elmo, tmp_path):
    bed = bed_of(elmo, SENTENCES)
    bed.folder = tmp_path
    (tmp_path / "classification.json").write_text(json.dumps({"bilm": "0" * 64}))
    with pytest.raises(ELMO.InputError, match="of another biLM"):
        bed.published("classification")


def test_a_tracked_run_has_the_numbers_of_its_json(corpus, tmp_path):
    if find_spec("tensorboard") is None:
        pytest.skip("tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    subprocess.run([sys.executable, ROOT / "ELMO.py", "--out", tmp_path, *SMALL, "--track", "tensorboard"], check=True,
                   env=os.environ | {"AG_NEWS_DIR": str(corpus), "OMP_NUM_THREADS": "1"}, capture_output=True)
    history = json.loads((tmp_path / "pretraining.json").read_text())["history"]
    found = EventAccumulator(str(tmp_path / "tensorboard" / "bilstm")).Reload()
    for d in range(2):
        points = [(event.step, event.value) for event in found.Scalars(f"validation_perplexity/{d}")]
        assert points == [(entry["step"], pytest.approx(entry["validation_perplexity"][d])) for entry in history]
    assert found.Scalars("training/nats")[0].step == 20


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_done(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("data.track.find_spec", lambda name: None)
    assert ELMO.main(["--out", str(tmp_path / "out"), "--track", "wandb"]) == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_sweep_keeps_the_best_knobs_for_config_and_goes_on_where_it_stopped(builtin, tmp_path, capsys, monkeypatch):
    argv = ["ELMO.py", "--search", "lr=0.0001:0.02:log", "--search", "skip=true,false", "--out", str(tmp_path), "--",
            *SMALL]
    seen = []
    def counted(*args):
        seen.append(train(*args))
        return seen[-1]
    train = ELMO.train
    monkeypatch.setattr(ELMO, "train", counted)
    assert sweep.main([argv[0], "--trials", "2", *argv[1:]]) == 0
    assert sweep.main([argv[0], "--trials", "3", *argv[1:]]) == 0
    assert len(seen) == 3
    best = min(seen, key=lambda run: run.lowest).trainer.config
    config, _ = ELMO.script_arguments(["--config", str(tmp_path / "ELMO.toml")], ELMO.Config, "", "", tmp_path, {})
    assert (config.lr, config.skip, config.hidden) == (best.lr, best.skip, 12)
    assert "test" not in capsys.readouterr().err


@pytest.mark.parametrize("search, message", [
    ([], "nothing is searched"), (["colour=1:2"], "expected a knob"), (["lr=1"], None), (["lr=0.1:0.01"], "no range"),
    (["lr=0:1:log"], "LOW above 0"), (["skip=maybe"], "no range of bool"), (["hidden=1.5:3"], "no range of int"),
    (["representation=a:b"], "no range of str")])
def test_a_wrong_range_is_named_in_one_sentence(search, message):
    if message is None:
        assert sweep.ranges(search, ELMO.Config) == {"lr": [1.0]}
        return
    with pytest.raises(ELMO.InputError, match=message):
        sweep.ranges(search, ELMO.Config)


def test_a_stopped_trial_ends_the_sweep_and_a_loss_that_is_not_finite_does_not():
    def not_finite():
        raise ELMO.InputError("the loss is not finite at step 3")
    assert sweep.lowest(not_finite) == float("inf")
    with pytest.raises(KeyboardInterrupt):
        sweep.lowest(lambda: SimpleNamespace(finished=False))
    with pytest.raises(ELMO.InputError, match="missing"):
        sweep.lowest(lambda: (_ for _ in ()).throw(ELMO.InputError("missing")))
