"""What report/ measures beside the scripts' own numbers: senses, leaks, variants of the mix, sweeps, trackers."""
import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from itertools import combinations, islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SENTENCES, tiny

import ELMO
from data.prepare import Part, Task
from data.text import Texts
from report import figures, findings, readme, sweep
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
    assert nearest(query, pool, asked, known, 1) == [[1], [2]]     # row 0 of the pool shares eight words


def test_nouns_are_words_between_a_determiner_and_a_follower(elmo):
    bed = SimpleNamespace(elmo=elmo)
    tokens = ["the cat sat on the mat .".split(), "oil prices fall .".split(), "a cat of the mat ,".split()]
    assert findings.nouns(bed, tokens) == {"cat", "mat"}    # "a cat of" is one of the cats two uses, "the cat sat" none
    assert findings.nouns(bed, [*tokens, *["red cat sat on a mat .".split()] * 9]) == {"mat"}        # 1 in 11


def bed_of(elmo, texts: list[str]) -> findings.Bed:
    part = Part([(text,) for text in texts], np.arange(len(texts)) % 2)
    task = Task("ag_news", ["a", "b"], part, part, part, texts)
    return findings.Bed(None, elmo, task, part, {"validation": Texts(part, elmo), "test": Texts(part, elmo)})


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
            sgd = torch.optim.SGD(head.parameters(), lr=0.5)
            for _ in range(20):
                loss = torch.nn.functional.cross_entropy(head(h, n)[0], gold) * 100
                sgd.zero_grad()
                loss.backward()
                head.clip(1.0)
                sgd.step()
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


def test_a_use_is_of_the_class_of_its_nearest_use_and_layer_0_is_worth_its_share(elmo, monkeypatch):
    bed = bed_of(elmo, SENTENCES)
    pool = Uses(unit([1, 0], [0, 1], [0.1, 1], [0.2, 1]), np.arange(4), np.array([0, 1, 1, 1]))
    query = Uses(unit([1, 0.1], [0.1, 1], [0, 1]), np.arange(3), np.array([0, 0, 1]))
    rows = [[str(i)] for i in range(4)]
    monkeypatch.setattr(findings, "found_uses", lambda *about: ({"word": query}, {"word": pool}, rows, rows))
    found = findings.told_apart(bed, "test", 1)
    assert found["layers"] == pytest.approx([(1 / 4 + 1 / 4 + 3 / 4) / 3, 2 / 3, 2 / 3])
    assert found["majority"] == pytest.approx(1 / 3) and found["uses"] == 3     # class 1, the pool's, is one of three
    assert found["votes"] == pytest.approx([1 / 3, 2 / 3, 2 / 3])       # of the first use: 0.995 against 0.59


def test_two_uses_that_are_nearly_as_near_outvote_the_nearest(monkeypatch):
    pool = Uses(unit([1, 0], [0.9, 0.1], [0.9, -0.1]), np.arange(3), np.array([0, 1, 1]))
    query, rows = Uses(unit([1, 0]), np.arange(1), np.array([1])), [["a"], ["b"], ["c"]]
    assert [part.tolist() for part in findings.told(query, pool, rows, rows, 1)] == [[False], [True]]
    monkeypatch.setattr(findings, "VOTERS", 1)
    assert [part.tolist() for part in findings.told(query, pool, rows, rows, 1)] == [[False], [False]]


def test_every_finding_is_drawn_and_told_in_the_readme_also_where_some_are_missing(tmp_path):
    point = {"test": [0.8, 0.9], "validation": [0.8, 0.9]}
    share = {"mean": 0.9, "deviation": 0.01}
    about = {"command": "python report/findings.py --only it", "minutes": 1.2}
    cosines = np.full((3, 4, 4), 0.5).tolist()
    made = {
        "labels": {"shares": list(findings.SHARES), "rows": [1] * 7, "measured": 7, "chosen_on": 5, "systems": {
            name: [point] * 7 for name in ("elmo", "word2vec", "tfidf")}},
        "mixes": {"rows": 5, "seeds": 2, "variants": {"layer 0": {"validation": share, "test": share, "s": None}}},
        "senses": {"words": {"bank": {}}, "uses": 9, "majority": 0.4, "layers": [0.3, 0.7, 0.6], "best": 1,
                   "votes": [0.4, 0.72, 0.65], "voters": 10, "pool": 800,
                   "interval": [[0.2, 0.4], [0.6, 0.8], [0.5, 0.7]]},
        "weights": {"tasks": {"AG News": {"s": [[0.2, 0.3, 0.5]], "gamma": [1.0]}}},
        "heatmap": {"tokens": ["the", "bank", "a", "bank"], "layers": cosines},
        "map": {"rows": 2, "x": [0, 1], "y": [1, 0], "labels": [0, 3], "names": list("abcd"), "same": 0.5},
        "leaks": {"rows": 3, "changed": 3, "moved_forward_before": 0, "moved_backward_after": 0, "example": {
            "tokens": ["a", "b"], "changed_word": 1, "new": "c", "forward": [[0, 1]] * 2, "backward": [[1, 1]] * 2}}}
    made = {name: numbers | about for name, numbers in made.items()}
    figures.findings(made, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"finding_{name}.png" for name in made if name != "mixes"}
    text = readme.findings(made)
    assert "| 85.0 |" in text and "| layer 0 | 90.00 ± 1.00 | 90.00 ± 1.00 |" in text and "| 70.0 |" in text
    assert readme.findings({"bilm": "0"}) == "" and "70.0" in readme.findings({"senses": made["senses"]})
    for name, number in (("senses", "72.0 %; 40.0 %"), ("labels", "85.0 %; 85.0 %")):
        (tmp_path / "findings.json").write_text(json.dumps({name: made[name]}))
        assert number in (text := readme.results(tmp_path)) and text.count("\n") == 2


def test_findings_of_another_bilm_are_refused(elmo, tmp_path):
    bed = bed_of(elmo, SENTENCES)
    bed.folder = tmp_path
    (tmp_path / "classification.json").write_text(json.dumps({"bilm": "0" * 64}))
    with pytest.raises(ELMO.InputError, match="of another biLM"):
        bed.published("classification")


def test_two_settings_are_compared_by_the_rows_that_one_of_them_has_right(elmo, tmp_path):
    bed = bed_of(elmo, SENTENCES)                           # classes 0, 1, 0, 1
    bed.folder = tmp_path
    predicted = {"trainable": "0101", "frozen": "0000"}
    (tmp_path / "classification.json").write_text(json.dumps({
        "bilm": elmo.digest, "settings": {name: {"predictions": found} for name, found in predicted.items()}}))
    pair, = findings.settings(bed)["pairs"]
    (tmp_path / "finetuned.json").write_text(json.dumps({
        "bilm": elmo.digest, "settings": {"trainable": {"predictions": "1101"}}}))
    assert [(n["one"], n["other"], n["difference"]) for n in findings.settings(bed)["pairs"]] == [
        ("trainable", "frozen", 0.5), ("trainable", "finetuned", 0.25), ("frozen", "finetuned", -0.25)]
    assert (pair["one"], pair["other"], pair["difference"]) == ("trainable", "frozen", 0.5)
    assert (pair["only_this"], pair["only_that"]) == (2, 0)
    assert pair["p"] == pytest.approx(0.5)                  # two rows, both of one setting: 2 / 2^2


def test_a_documents_nearest_neighbour_is_another_document(elmo):
    texts = [" ".join(words) for words in islice(combinations(elmo.words.words[4:], 3), 20)]
    part = Part([(text,) for text in texts * 2], np.repeat([0, 1], 20))     # the twin of each is of the other class
    bed = findings.Bed(None, elmo, Task("ag_news", ["a", "b"], part, part, part, texts), part, {})
    found = findings.documents(bed)
    assert (found["rows"], found["same"], found["same_static"]) == (40, 0, 0)
    assert len(found["x"]) == len(found["y"]) == len(found["labels"]) == 40


@pytest.mark.parametrize("accuracies", [(0.4, 0.92), (0.85, 0.99), (0.99, 1.0), (0.945, 0.955), (0.61, 0.69)])
def test_few_labels_are_drawn_with_marks_on_the_axis_wherever_they_lie(accuracies):
    points = [{"test": [a]} for a in np.linspace(*accuracies, 7)]
    axes, = figures.few_labels({"shares": list(findings.SHARES), "rows": [1] * 7, "measured": 7, "chosen_on": 5,
                                "systems": dict.fromkeys(("elmo", "word2vec", "tfidf"), points)}).axes
    low, high = axes.get_ylim()
    first, last = (100 * a for a in accuracies)
    assert first - (last - first) < low < high < last + (last - first)      # no mark has stretched the axis
    assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 2


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


def test_a_resumed_runs_curve_has_every_step_once(builtin, tmp_path):
    if find_spec("tensorboard") is None:
        pytest.skip("tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    config, texts = tiny(track="tensorboard", log_every=1, epochs=6.0), SENTENCES * 4
    def trainer() -> ELMO.Trainer:
        data = ELMO.Data.of(texts, config, np.arange(12), np.arange(12, 16))
        return ELMO.Trainer(config, data, torch.device("cpu"))
    first, file = trainer(), tmp_path / "bilstm.resume.pt"
    whole = first.steps
    def stopping(step: int) -> tuple[float, int]:
        if step == whole // 2:
            os.kill(os.getpid(), signal.SIGINT)
        return ELMO.Trainer.step(first, step)
    first.step = stopping
    assert not ELMO.train(first, file).finished
    run = ELMO.train(trainer(), file, resume=True)
    found = EventAccumulator(str(tmp_path / "tensorboard" / "bilstm")).Reload()
    assert [event.step for event in found.Scalars("training/nats")] == list(range(1, whole + 1))
    assert [event.step for event in found.Scalars("validation_perplexity/0")] == [e["step"] for e in run.history]


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_done(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("data.track.find_spec", lambda name: None)
    assert ELMO.main(["--out", str(tmp_path / "out"), "--track", "wandb"]) == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_sweep_keeps_the_best_knobs_for_config_and_goes_on_where_it_stopped(builtin, tmp_path, monkeypatch):
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
    assert (config.lr, config.skip, config.hidden) == (best.lr, best.skip, ELMO.Config().hidden)    # no fixed one


@pytest.mark.parametrize("search, message", [
    ([], "nothing is searched"), (["colour=1:2"], "no knob to search"), (["min_count=1:5"], "no knob to search"),
    (["lr=0.1:0.01"], "no range"), (["lr=0.1:inf"], "no range"), (["lr=0:1:log"], "LOW above 0"),
    (["skip=maybe"], "no range of bool"), (["hidden=1.5:3"], "no range of int"), (["precision=a:b"], "no range of str"),
    (["dropout=0:2"], "dropout is 2"), (["precision=fp32,fp7"], "precision is 'fp7'")])
def test_a_wrong_range_is_named_in_one_sentence(search, message):
    with pytest.raises(ELMO.InputError, match=message):
        sweep.ranges(search, ELMO.Config())


def test_knobs_that_no_trial_heeds_and_files_that_are_no_study_are_refused(builtin, tmp_path, capsys):
    argv = ["ELMO.py", "--search", "dropout=0:0.4", "--out", str(tmp_path), "--", *SMALL]
    assert sweep.main([*argv, "--track", "tensorboard"]) == 2 and "does nothing" in capsys.readouterr().err
    (tmp_path / "studies.db").write_bytes(b"no database at all" * 100)
    assert sweep.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "studies.db cannot be used" in error


def test_a_stopped_trial_ends_the_sweep_and_a_loss_that_is_not_finite_does_not():
    def not_finite():
        raise ELMO.InputError("the loss is not finite at step 3")
    assert sweep.lowest(not_finite) == float("inf")
    with pytest.raises(KeyboardInterrupt):
        sweep.lowest(lambda: SimpleNamespace(finished=False))
    with pytest.raises(KeyboardInterrupt):          # Ctrl-C while the last evaluation ran
        sweep.lowest(lambda: SimpleNamespace(finished=True, request=SimpleNamespace(is_set=lambda: True)))
    with pytest.raises(ELMO.InputError, match="missing"):
        sweep.lowest(lambda: (_ for _ in ()).throw(ELMO.InputError("missing")))


def test_finished_runs_are_kept_for_the_same_recipe_alone(tmp_path):
    file, runs = tmp_path / "build" / "labels.json", []
    def run() -> dict:
        runs.append(1)
        return {"test": 0.5}
    first = findings.Kept(file, "a")
    assert first("one", run) == {"test": 0.5} and first.earlier == 0
    again = findings.Kept(file, "a")
    assert again("one", run) == {"test": 0.5} and again.earlier > 0 and len(runs) == 1
    again("two", run)
    assert findings.Kept(file, "b")("one", run) == {"test": 0.5} and len(runs) == 3


def test_other_findings_leave_the_kept_runs_alone(elmo, tmp_path, monkeypatch):
    monkeypatch.setattr(findings, "KEPT", tmp_path / "labels.json")
    monkeypatch.setattr(findings.Bed, "of", classmethod(lambda cls, folder: SimpleNamespace(elmo=elmo)))
    monkeypatch.setattr(findings, "FINDINGS", {"heatmap": lambda bed: {}, "labels": lambda bed: {"minutes": 7.0}})
    monkeypatch.setattr(elmo, "digest", "a")
    monkeypatch.setattr(figures, "findings", lambda *_: None)
    findings.KEPT.write_text("{}")
    assert findings.main(["--only", "heatmap", "--out", str(tmp_path)]) == 0 and findings.KEPT.exists()
    assert findings.main(["--only", "labels", "--resume", "--out", str(tmp_path)]) == 0 and findings.KEPT.exists()
    assert json.loads((tmp_path / "findings.json").read_text())["labels"]["minutes"] >= 7
    assert findings.main(["--only", "labels", "--out", str(tmp_path)]) == 0 and not findings.KEPT.exists()


def test_findings_that_were_stopped_go_on_with_those_that_were_not_made_anew(elmo, tmp_path, monkeypatch):
    made = []
    def of(name: str, number: int):
        def finding(bed) -> dict:
            if (name, number) == ("map", 2):
                raise KeyboardInterrupt
            made.append(name)
            return {"number": number}
        return finding
    def run(number: int, *argv: str) -> int:
        monkeypatch.setattr(findings, "FINDINGS", {name: of(name, number) for name in ("leaks", "map", "weights")})
        return findings.main([*argv, "--out", str(tmp_path)])
    monkeypatch.setattr(findings.Bed, "of", classmethod(lambda cls, folder: SimpleNamespace(elmo=elmo)))
    monkeypatch.setattr(elmo, "digest", "a")
    monkeypatch.setattr(figures, "findings", lambda *_: None)
    assert run(1) == 0 and run(1, "--resume") == 0 and made == ["leaks", "map", "weights"]
    assert run(2) == 130 and run(3, "--resume") == 0 and made[3:] == ["leaks", "map", "weights"]
    found = json.loads((tmp_path / "findings.json").read_text())
    assert [found[name]["number"] for name in ("leaks", "map", "weights")] == [2, 3, 3]
