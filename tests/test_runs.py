"""ELMO.py as a user runs it: whole runs, stops and resumes, several processes, and wrong inputs."""
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SENTENCES, tiny

import ELMO
from data import sample
from data.ag_news import read_csv, split
from data.batches import collate
from data.text import Data
from run.checkpoint import read_published, write_published, write_resume
from run.files import InputError
from run.options import script_arguments
from run.progress import Run

SMALL = ("--hidden 12 --validation 60 --epochs 3 --batch-tokens 300 --negatives 50 --lr 0.01 --table-lr 0.01 "
         "--min-count 2 --log-every 20 --save-every 0").split()
CPU = torch.device("cpu")


def start(corpus: Path, out: Path, *more: str, launch: tuple[str, ...] = (sys.executable,)) -> subprocess.Popen:
    """A small run in a process of its own, which reads the rows in `corpus`."""
    environment = os.environ | {"AG_NEWS_DIR": str(corpus), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*launch, str(ROOT / "ELMO.py"), "--out", str(out), *SMALL, *more], env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def output(process: subprocess.Popen) -> str:
    """What a run has printed, after it has ended well."""
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "bilstm.pt", weights_only=True)["weights"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def files(folder: Path) -> list[str]:
    """Every file in a folder, except the lock of a run."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return sorted(str(path.relative_to(folder)) for path in found)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> tuple[Path, str]:
    """A folder with everything that an undisturbed run writes, and what it printed."""
    out = tmp_path_factory.mktemp("whole")
    return out, output(start(corpus, out))


# ------------------------------------------------------------------------------------------------- whole runs
def test_a_run_writes_the_model_its_numbers_and_its_figures_and_nothing_else(whole):
    out, printed = whole
    assert files(out) == ["bilstm.pt", "figures/confusion_words.png", "figures/curves_pretraining.png",
                          "pretraining.json"]
    result = json.loads((out / "pretraining.json").read_text())
    assert result["splits"]["test"]["rows"] == 100
    assert result["splits"]["test"]["fresh"]["rows"] > 90
    assert result["digest"] == torch.load(out / "bilstm.pt", weights_only=True)["digest"]
    assert len(result["history"]) == 3
    assert result["config"]["hidden"] == 12
    assert "tokens/s" in printed
    assert "Kneser-Ney" in printed


def test_published_perplexities_are_those_of_the_model_in_the_file(whole, corpus):
    out, _ = whole
    result = json.loads((out / "pretraining.json").read_text())["splits"]["test"]
    texts = read_csv(corpus / "test.csv").description.tolist()
    found = ELMO.ELMo.load(out / "bilstm.pt").score(texts)
    for name in ELMO.DIRECTIONS:
        assert found[name]["perplexity"] == pytest.approx(result[name]["perplexity"], rel=1e-5)
        assert found[name]["tokens"] == result["tokens"] == sum(len(text.split()) + 1 for text in texts)


def test_word_predictions_of_a_batch_are_those_of_its_texts_one_by_one(whole, corpus):
    elmo = ELMO.ELMo.load(whole[0] / "bilstm.pt")
    texts = read_csv(corpus / "test.csv").description.tolist()[:30]
    expected = []
    for text in texts:
        ids, y = collate(elmo.encode([text]), np.array([0]))
        with torch.no_grad():
            h = elmo.model.states(0, elmo.model.represent(ids)[0])[-1][:, 0]            # (T, P), forward
            logits = h @ elmo.model.table.t() + elmo.model.bias[:, 0]                   # (T, V)
        best = logits[:, 1:].argmax(dim=1) + 1                                          # <pad> is never predicted
        expected += zip(y[0, :, 0].tolist(), best.tolist(), strict=True)
    scores = ELMO.score_rows(elmo.model, elmo.encode(texts), np.arange(30), details=True)
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


def test_embed_writes_the_vectors_of_every_line(whole, tmp_path):
    out, _ = whole
    lines = ["the bank sued the court .", "", "unseen words", "the bank ."]
    (tmp_path / "texts").write_text("\n".join(lines) + "\n")
    argv = ["--out", str(out), "--embed", str(tmp_path / "texts"), "--npz", str(tmp_path / "v.npz")]
    assert ELMO.main([*argv, "--precision", "fp32"]) == 0
    found = np.load(tmp_path / "v.npz")
    assert found["offsets"].tolist() == [0, 6, 6, 8, 11]
    assert found["vectors"].dtype == np.float16
    for i, vectors in enumerate(ELMO.ELMo.load(out / "bilstm.pt").embed(lines)):
        begin, end = found["offsets"][i:i + 2]
        assert np.allclose(found["vectors"][:, begin:end], vectors.numpy(), atol=2e-3)
    assert files(tmp_path) == ["texts", "v.npz"]


def test_a_notebook_opens_the_committed_model_with_torch_alone_and_it_scores_real_rows(ag_news):
    path = ROOT / "models" / "bilstm.pt"
    if not path.exists():
        pytest.skip("models/bilstm.pt is missing: run `python ELMO.py` first")
    content = torch.load(path, weights_only=True)
    assert list(content) == ["format", "config", "words", "weights", "history", "metrics", "digest"]
    assert path.stat().st_size < 45e6
    result = json.loads((ROOT / "models" / "pretraining.json").read_text())
    assert result["digest"] == content["digest"]
    texts = read_csv(ag_news / "test.csv").description.tolist()[:300]
    found = ELMO.ELMo.load(path).score(texts)
    for name in ELMO.DIRECTIONS:        # 300 of 7,600 rows: a standard error of about 7 % in perplexity
        expected = result["splits"]["test"][name]["perplexity"]
        assert found[name]["perplexity"] == pytest.approx(expected, rel=0.25)


# ------------------------------------------------------------------------------------------ stops and resumes
def test_ctrl_c_stops_between_two_steps_publishes_nothing_and_resumes(whole, corpus, tmp_path):
    process = start(corpus, tmp_path)
    for line in process.stdout:
        if '{"step"' in line:           # the first epoch is complete
            break
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in printed
    assert "--resume continues" in printed
    assert files(tmp_path) == ["bilstm.resume.pt"]
    printed = output(start(corpus, tmp_path, "--resume"))
    assert '"epoch": 1.0,' not in printed
    assert same(weights(tmp_path), weights(whole[0]))
    assert files(tmp_path) == files(whole[0])


def test_a_stop_between_two_files_of_the_end_is_mended_by_resuming(builtin, whole, tmp_path, monkeypatch):
    argv = ["--out", str(tmp_path), *SMALL, "--resume"]
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
    assert files(tmp_path) == files(whole[0])


@pytest.mark.parametrize("options", [{"representation": "char"}, {"representation": "word2vec"}, {"hidden": 384}])
def test_a_resumed_run_ends_with_the_same_weights_whatever_the_representation_and_with_all_threads(options, tmp_path):
    config = tiny(**({"batch_tokens": 600, "epochs": 4.0} | options))
    texts = [text for _, _, text in sample.generate(200)]
    data = Data.of(texts, config, np.arange(150), np.arange(150, 200))
    undisturbed = ELMO.train(ELMO.Trainer(config, data, CPU))
    first = ELMO.Trainer(config, data, CPU)
    with Run(first, tmp_path / "resume.pt") as run:
        for step in range(9):
            run.count(*first.step(step))
        run.save()
    second = ELMO.Trainer(config, data, CPU)
    ELMO.train(second, tmp_path / "resume.pt", resume=True)
    assert same(second.model.state_dict(), undisturbed.trainer.model.state_dict())


def test_a_run_stops_if_any_process_was_asked_to(tmp_path, monkeypatch):
    trainer = ELMO.Trainer(tiny(), Data.of(SENTENCES * 3, tiny(), np.arange(12), np.arange(0)), CPU)
    for votes in (0.0, 1.0):            # those of the other process
        with monkeypatch.context() as patch, Run(trainer, tmp_path / "resume.pt") as run:
            patch.setattr("run.progress.sum_over_processes", lambda own, votes=votes: [own[0] + votes])
            assert run.stop() == (votes > 0)


def test_two_processes_train_as_one_does_on_the_same_batches(corpus, tmp_path):
    short = ["--batch-tokens", "30", "--epochs", "0.04", "--dropout", "0.2", "--word-dropout", "0.1",
             "--precision", "fp32"]
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    output(start(corpus, tmp_path / "one", *short))
    output(start(corpus, tmp_path / "two", *short, launch=torchrun))
    one = weights(tmp_path / "one")
    two = weights(tmp_path / "two")
    before = weights_before_training(corpus)
    moved = max((one[name].float() - before[name]).abs().max() for name in one)
    assert moved > 0.05
    for name in one:
        assert torch.allclose(one[name].float(), two[name].float(), atol=4e-3), name


def weights_before_training(corpus: Path) -> dict[str, torch.Tensor]:
    """The weights before the first step of a run that `start` starts."""
    texts = read_csv(corpus / "train.csv").description.tolist()
    config = ELMO.Config(hidden=12, validation=60, min_count=2)
    data = Data.of(texts, config, *split(len(texts), 60, 0))
    trainer = ELMO.Trainer(config, data, CPU)
    return {name: value.float() for name, value in ELMO.ELMo(config, data.words, trainer.model).weights().items()}


# ---------------------------------------------------------------------------------------------- files that lie
@pytest.mark.parametrize("change", [
    lambda content: content["weights"].update(table=torch.nn.Parameter(content["weights"]["table"])),
    lambda content: content["weights"].update(table=content["weights"]["table"].to_sparse()),
    lambda content: content.update(digest=None, weights=3),
    lambda content: content.update(words=3),
    lambda content: content.clear()])
def test_a_tampered_file_is_refused(whole, tmp_path, change):
    content = torch.load(whole[0] / "bilstm.pt", weights_only=True)
    change(content)
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(InputError):
        ELMO.ELMo.load(tmp_path / "a.pt")


@pytest.mark.parametrize("change, message", [
    (lambda content: content["config"].update(hidden=16), "does not fit together"),
    (lambda content: content["config"].update(hidden=-1), "a.pt: hidden is -1"),
    (lambda content: content["config"].update(colour="red"), "does not fit together"),
    (lambda content: content["config"].update(hidden=65536, width=8192), "does not fit together"),
    (lambda content: content["words"].pop(), "vocabulary does not fit"),
    (lambda content: content["words"].reverse(), "vocabulary does not fit"),
    (lambda content: content["weights"].pop("bias"), "does not fit together"),
    (lambda content: content.update(format="elmo-bilm-1"), "has format 'elmo-bilm-1' instead of 'elmo-bilm-2'"),
    (lambda content: content.pop("words"), "it lacks")])
def test_parts_that_do_not_fit_together_are_refused_though_the_digest_is_right(whole, tmp_path, change, message):
    content = read_published(whole[0] / "bilstm.pt", ELMO.FORMAT, set())
    change(content)
    write_published(tmp_path / "a.pt", content)
    with pytest.raises(InputError, match=message):
        ELMO.ELMo.load(tmp_path / "a.pt")


def test_a_resume_state_of_other_options_or_damaged_is_refused(builtin, capsys, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    file = out / "bilstm.resume.pt"
    trainer = ELMO.Trainer(tiny(), Data.of(SENTENCES, tiny(), np.arange(4), np.arange(0)), CPU)
    ELMO.train(trainer, file)
    capsys.readouterr()
    assert "was made with" in refused(capsys, [*SMALL, "--resume"], out)
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    file.write_bytes(content[:middle])
    assert "cannot be opened" in refused(capsys, [*SMALL, "--resume"], out)
    content[middle] ^= 1
    file.write_bytes(content)
    assert "does not match its digest" in refused(capsys, [*SMALL, "--resume"], out)
    write_resume(file, trainer.identity(), {})
    with pytest.raises(InputError, match="does not hold such a run"):
        Run(trainer, file, resume=True)


# ----------------------------------------------------------------------------------------------- wrong inputs
def refused(capsys, argv: list[str], out: Path) -> str:
    """The one sentence that a wrong input gets; the exit status is 2, and nothing is written."""
    before = files(out)
    assert ELMO.main(["--out", str(out), *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ELMO.py: ") and error.count("\n") == 1, error
    assert files(out) == before
    return error


ROW = b'"1","t","the bank sued the court ."\n'
BAD_FILES = {
    "empty": b"",
    "blank": b" \n\n",
    "header only": b"Class Index,Title,Description\n",
    "wrong header": b"label,text\n1,a\n",
    "swapped header": b"Title,Class Index,Description\na,1,b\n",
    "two columns, no header": b'"1","a"\n',
    "four columns": b'"1","a","b","c"\n',
    "class 7": ROW + b'"7","a","b"\n',
    "class 0": b'"0","a","b"\n',
    "class x": ROW * 3 + b'"x","a","b"\n',
    "class 2.5": ROW + b'2.5,a,b\n',
    "no class": ROW + b',a,b\n',
    "class nan": ROW + b'nan,a,b\n',
    "short row": ROW + b'"2","a"\n',
    "long row": ROW + b'"2","a","b","c","d"\n',
    "latin-1": ROW + b'"2","a","caf\xe9"\n',
    "utf-16": ROW.decode().encode("utf-16"),
    "nul": ROW + b'"2","a","b\0c"\n',
    "no text": b'"1","a",""\n"2","b"," "\n',
    "empty field": b'""\n',
    "open quote": ROW + b'"2","a","b\n',
    "binary": bytes(range(256)) * 20}


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("name", BAD_FILES)
def test_a_wrong_csv_file_is_named_in_one_sentence(builtin, monkeypatch, capsys, tmp_path, name, part):
    folder = tmp_path / "data"
    shutil.copytree(builtin, folder)
    (folder / f"{part}.csv").write_bytes(BAD_FILES[name])
    monkeypatch.setenv("AG_NEWS_DIR", str(folder))
    assert f"{part}.csv" in refused(capsys, SMALL, tmp_path / "out")


@pytest.mark.parametrize("argv, message", [
    (["--validation", "600"], "validation is 600"),
    (["--rows", "601"], "rows is 601"),
    (["--dropout", "2"], "dropout is 2"),
    (["--hidden", "x"], "--hidden"),
    (["--hidden", "0"], "hidden is 0"),
    (["--lr", "nan"], "lr is nan"),
    (["--representation", "bert"], "invalid choice"),
    (["--colour"], "--colour"),
    (["--epochs", "-1"], "epochs is -1"),
    (["--config", "missing.toml"], "missing.toml"),
    (["--embed", "missing.txt"], "go together"),
    (["--npz", "a.npz"], "go together"),
    (["--embed", "missing.txt", "--npz", "a.npz"], "missing.txt cannot be read"),
    (["--embed", __file__, "--npz", "a.npz"], "bilstm.pt is missing"),
    (["extra"], "unrecognized")])
def test_a_wrong_option_is_named_in_one_sentence(builtin, capsys, tmp_path, argv, message):
    assert message in refused(capsys, [*SMALL, *argv], tmp_path / "out")


@pytest.mark.parametrize("text, message", [
    (b"hidden = ", "not TOML"),
    (b"colour = 3", "'colour' is no option"),
    (b"hidden = 'x'", "expected int"),
    (b"dropout = true", "expected float"),
    (b"\xff", "not UTF-8"),
    (b"[hidden]\nx = 1", "expected int")])
def test_a_wrong_toml_file_is_named_in_one_sentence(builtin, capsys, tmp_path, text, message):
    (tmp_path / "a.toml").write_bytes(text)
    assert message in refused(capsys, ["--config", str(tmp_path / "a.toml")], tmp_path / "out")


def test_the_command_line_wins_over_the_toml_file(tmp_path):
    (tmp_path / "a.toml").write_text("hidden = 7\ndropout = 0\nfreeze_word2vec = true\n")
    argv = ["--config", str(tmp_path / "a.toml"), "--hidden", "9"]
    config, options = script_arguments(argv, ELMO.Config, "", "", tmp_path, {})
    assert (config.hidden, config.dropout, config.freeze_word2vec, config.width) == (9, 0.0, True, 9)
    assert not options.resume


def test_the_folder_named_by_out_may_not_be_a_file(builtin, capsys, tmp_path):
    (tmp_path / "out").write_text("a file")
    assert ELMO.main(["--out", str(tmp_path / "out"), *SMALL]) == 2
    assert (tmp_path / "out").read_text() == "a file"
    assert capsys.readouterr().err.count("ELMO.py:") == 1
