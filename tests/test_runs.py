"""The script as a user runs it: whole runs, kills and resumes, damaged files and wrong inputs."""
import io
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import ROOT, SENTENCES, tiny

import ELMO
from data import sample
from data.files import InputError, hold, read_published, write_published, write_resume
from data.prepare import read_csv
from data.progress import Run
from report import figures, readme

SMALL = ["--hidden", "12", "--validation", "60", "--epochs", "3", "--batch-tokens", "300", "--negatives", "50",
         "--lr", "0.01", "--table-lr", "0.01", "--min-count", "2", "--log-every", "20", "--save-every", "0"]


def command(corpus, out, *more: str, launch=(sys.executable,)) -> subprocess.Popen:
    environment = os.environ | {"AG_NEWS_DIR": str(corpus), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*launch, str(ROOT / "ELMO.py"), "--out", str(out), *SMALL, *more], env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def weights(folder) -> dict[str, torch.Tensor]:
    return torch.load(folder / "bilstm.pt", weights_only=True)["weights"]


def written(file) -> int:
    """When the file was last replaced, in nanoseconds; 0 where there is none."""
    return file.stat().st_mtime_ns if file.exists() else 0


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A folder with everything that an uninterrupted run writes, and what it printed."""
    out = tmp_path_factory.mktemp("whole")
    return out, finish(command(corpus, out))


def test_a_run_writes_the_model_its_numbers_and_its_figures_and_nothing_else(whole):
    out, printed = whole
    assert sorted(os.listdir(out)) == ["bilstm.pt", "confusion_words.png", "curves_pretraining.png", "pretraining.json"]
    result = json.loads((out / "pretraining.json").read_text())
    assert result["splits"]["test"]["rows"] == 100 and result["splits"]["test"]["fresh"]["rows"] > 90
    assert result["digest"] == torch.load(out / "bilstm.pt", weights_only=True)["digest"]
    assert len(result["history"]) == 3 and result["config"]["hidden"] == 12
    assert "tokens/s" in printed and "Kneser-Ney" in printed


def test_published_numbers_are_those_of_the_model_in_the_file(whole, corpus):
    result = json.loads((whole[0] / "pretraining.json").read_text())["splits"]
    elmo = ELMO.ELMo.load(whole[0] / "bilstm.pt")
    texts = read_csv(corpus / "test.csv").description.tolist()
    found = elmo.score(texts)
    for name in ("forward", "backward"):
        assert found[name]["perplexity"] == pytest.approx(result["test"][name]["perplexity"], rel=1e-5)
        assert found[name]["tokens"] == result["test"]["tokens"] == sum(len(t.split()) + 1 for t in texts)
    gold, best = [], []
    for text in texts[:30]:                             # word prediction, one text at a time
        x, y = ELMO.collate(elmo.encode([text]), np.array([0]))
        with torch.no_grad():
            h = elmo.model.states(elmo.model.represent(x))[2][0, :, 0]
            logits = h @ elmo.model.table.t() + elmo.model.table_bias[:, 0]
        best += logits[:, 1:].argmax(dim=1).add(1).tolist()
        gold += y[0, :, 0].tolist()
    scores = ELMO.score_rows(elmo.model, elmo.encode(texts[:30]), np.arange(30), details=True)
    _, found_gold, found_best, _ = scores.words[0]
    assert sorted(zip(gold, best, strict=True)) == sorted(zip(found_gold.tolist(), found_best.tolist(), strict=True))


def test_a_run_killed_at_random_moments_and_resumed_ends_with_the_same_weights(whole, corpus, tmp_path, request):
    moments, kills, killed = random.Random(time.time_ns()), request.config.getoption("--kills"), 0
    for _ in range(kills):
        process, file = command(corpus, tmp_path, "--resume"), tmp_path / "bilstm.resume.pt"
        before, begin = written(file), time.time()
        while written(file) == before and process.poll() is None and time.time() - begin < 100:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 1.5 / kills))
        process.kill()
        process.communicate()
        if process.returncode == -signal.SIGKILL:
            killed += 1
    assert killed >= min(3, kills)      # the others came after the end of a run
    finish(command(corpus, tmp_path, "--resume"))
    assert same(weights(tmp_path), weights(whole[0]))
    assert not list(tmp_path.glob("*.resume.pt"))


def test_ctrl_c_stops_between_two_steps_keeps_the_best_model_and_resumes(whole, corpus, tmp_path):
    process = command(corpus, tmp_path)
    for line in process.stdout:
        if line.startswith('{"step"') or '{"step"' in line:     # the first epoch is complete
            break
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in printed
    assert (tmp_path / "bilstm.resume.pt").exists() and ELMO.ELMo.load(tmp_path / "bilstm.pt").history
    finish(command(corpus, tmp_path, "--resume"))
    assert same(weights(tmp_path), weights(whole[0]))


def test_a_kill_between_two_files_of_the_end_is_mended_by_resuming(builtin, whole, tmp_path, monkeypatch):
    for name in ("bilstm.pt", "curves_pretraining.png", "pretraining.json"):
        def fail(self, target, name=name, replace=pathlib.Path.replace):
            if pathlib.Path(target).name == name:
                raise KeyboardInterrupt
            return replace(self, target)
        with monkeypatch.context() as patch:
            patch.setattr(pathlib.Path, "replace", fail)
            assert ELMO.main(["--out", str(tmp_path), *SMALL, "--resume"]) == 130
        assert (tmp_path / "bilstm.resume.pt").exists() and not (tmp_path / name).exists()
    assert ELMO.main(["--out", str(tmp_path), *SMALL, "--resume"]) == 0
    assert sorted(os.listdir(tmp_path)) == sorted(os.listdir(whole[0]))


@pytest.mark.parametrize("knobs", [{"representation": "char"}, {"representation": "word2vec"}, {"hidden": 384}])
def test_a_resumed_run_ends_with_the_same_weights_whatever_the_representation_and_with_all_threads(knobs, tmp_path):
    config = tiny(**({"batch_tokens": 600, "epochs": 4.0} | knobs))
    data = ELMO.Data.of([text for _, _, text in sample.generate(200)], config, np.arange(150), np.arange(150, 200))
    ends = []
    for stop in (None, 9):
        trainer, file = ELMO.Trainer(config, data, torch.device("cpu")), tmp_path / f"{stop}.resume.pt"
        if stop:
            with Run(trainer, file) as run:
                for step in range(stop):
                    run.count(*trainer.step(step))
                run.save()
            trainer = ELMO.Trainer(config, data, torch.device("cpu"))
        ends.append(ELMO.train(trainer, file, resume=bool(stop)).trainer.model.state_dict())
    assert same(*ends)


def test_two_processes_train_as_one_does_on_the_same_batches(corpus, tmp_path):
    short = ["--batch-tokens", "30", "--epochs", "0.04", "--dropout", "0.2", "--word-dropout", "0.1",
             "--precision", "fp32"]
    finish(command(corpus, tmp_path / "one", *short))
    finish(command(corpus, tmp_path / "two", *short, launch=(
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    moved = max((one[name].float() - weights_at_start(corpus)[name]).abs().max() for name in one)
    assert moved > 0.05
    assert all(torch.allclose(one[name].float(), two[name].float(), atol=4e-3) for name in one)


def weights_at_start(corpus) -> dict[str, torch.Tensor]:
    """The weights before the first step of `command`'s run."""
    texts = read_csv(corpus / "train.csv").description.tolist()
    config = ELMO.Config(hidden=12, validation=60, min_count=2)
    data = ELMO.Data.of(texts, config, *ELMO.split(len(texts), 60, 0))
    return {name: value.clone() for name, value in
            ELMO.Trainer(config, data, torch.device("cpu")).model.state_dict().items()}


def test_held_out_perplexity_on_the_built_in_corpus_is_near_the_sources_and_not_below_it(grammar):
    test = [text for _, _, text in sample.generate(1000, seed=2)]
    elmo = ELMO.ELMo.load(grammar / "bilstm.pt")
    source = sample.nats_batch(test)
    scores = ELMO.score_rows(elmo.model, elmo.encode(test), np.arange(len(test)))
    for d in range(2):
        gap = (scores.nats[d] - source) / scores.tokens.sum()           # nats a token that the model loses on each row
        error = gap.std() * np.sqrt(len(gap))
        print(f"direction {d}: {scores.perplexity()[d] / np.exp(source.sum() / scores.tokens.sum()):.4f} of the source")
        assert -3 * error < gap.sum() < np.log(1.10)


def test_embed_writes_the_vectors_of_every_line(whole, tmp_path):
    lines = ["the bank sued the court .", "", "unseen words", "the bank ."]
    (tmp_path / "texts").write_text("\n".join(lines) + "\n")
    source, target = str(tmp_path / "texts"), str(tmp_path / "v.npz")
    assert ELMO.main(["--out", str(whole[0]), "--embed", source, "--npz", target, "--precision", "fp32"]) == 0
    elmo, found = ELMO.ELMo.load(whole[0] / "bilstm.pt"), np.load(tmp_path / "v.npz")
    assert found["offsets"].tolist() == [0, 6, 6, 8, 11] and found["vectors"].dtype == np.float16
    for i, vectors in enumerate(elmo.embed(lines)):
        a, b = found["offsets"][i:i + 2]
        assert np.allclose(found["vectors"][:, a:b], vectors.numpy(), atol=2e-3)
    assert sorted(os.listdir(tmp_path)) == ["texts", "v.npz"]


def test_a_damaged_file_is_refused_or_loads_the_same_model(whole, tmp_path):
    content, expected = (whole[0] / "bilstm.pt").read_bytes(), weights(whole[0])
    place, refused = random.Random(0), 0
    for k in range(60):
        damaged = bytearray(content)
        if k < 15:
            del damaged[place.randrange(len(content)):]
        else:
            damaged[place.randrange(len(content))] ^= 1 << place.randrange(8)
        (tmp_path / "a.pt").write_bytes(damaged)
        try:
            loaded = ELMO.ELMo.load(tmp_path / "a.pt")
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert same({name: w.half() for name, w in loaded.model.state_dict().items()}, expected)
    assert refused >= 45


@pytest.mark.parametrize("change", [
    lambda c: c["weights"].update(table=torch.nn.Parameter(c["weights"]["table"])),
    lambda c: c["weights"].update(table=c["weights"]["table"].to_sparse()),
    lambda c: c.update(digest=None, weights=3), lambda c: c.update(words=3), lambda c: c.clear()])
def test_a_tampered_file_is_refused(whole, tmp_path, change):
    content = torch.load(whole[0] / "bilstm.pt", weights_only=True)
    change(content)
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(InputError):
        ELMO.ELMo.load(tmp_path / "a.pt")


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    torch.save({"format": ELMO.FORMAT, "weights": Evil(tmp_path / "run")}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="more than tensors and plain types"):
        ELMO.ELMo.load(tmp_path / "a.pt")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change, message", [
    (lambda c: c["config"].update(hidden=16), "does not fit together"),
    (lambda c: c["config"].update(hidden=-1), "a.pt: hidden is -1"),
    (lambda c: c["config"].update(colour="red"), "does not fit together"),
    (lambda c: c["config"].update(hidden=65536, width=8192), "does not fit together"),
    (lambda c: c["words"].pop(), "vocabulary does not fit"),
    (lambda c: c["words"].reverse(), "vocabulary does not fit"),
    (lambda c: c["weights"].pop("table_bias"), "does not fit together"),
    (lambda c: c.update(format="elmo-bilm-0"), "is of format"),
    (lambda c: c.pop("words"), "expected the keys")])
def test_parts_that_do_not_fit_together_are_refused_though_the_digest_is_right(whole, tmp_path, change, message):
    content = read_published(whole[0] / "bilstm.pt", ELMO.FORMAT, set())
    change(content)
    write_published(tmp_path / "a.pt", content)
    with pytest.raises(InputError, match=message):
        ELMO.ELMo.load(tmp_path / "a.pt")


ROW = b'"1","t","the bank sued the court ."\n'
BAD_FILES = {
    "empty": b"", "blank": b" \n\n", "header only": b"Class Index,Title,Description\n",
    "wrong header": b"label,text\n1,a\n", "swapped header": b"Title,Class Index,Description\na,1,b\n",
    "two columns, no header": b'"1","a"\n', "four columns": b'"1","a","b","c"\n', "class 7": ROW + b'"7","a","b"\n',
    "class 0": b'"0","a","b"\n', "class x": ROW * 3 + b'"x","a","b"\n', "class 2.5": ROW + b'2.5,a,b\n',
    "no class": ROW + b',a,b\n', "class nan": ROW + b'nan,a,b\n', "short row": ROW + b'"2","a"\n',
    "long row": ROW + b'"2","a","b","c","d"\n', "latin-1": ROW + b'"2","a","caf\xe9"\n',
    "utf-16": ROW.decode().encode("utf-16"), "nul": ROW + b'"2","a","b\0c"\n', "no text": b'"1","a",""\n"2","b"," "\n',
    "empty field": b'""\n', "open quote": ROW + b'"2","a","b\n', "binary": bytes(range(256)) * 20}


def refused(capsys, argv: list[str], out) -> str:
    """The one sentence that a wrong input gets; status 2, nothing written."""
    before = sorted(os.listdir(out)) if out.exists() else None
    assert ELMO.main(["--out", str(out), *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ELMO.py: ") and error.count("\n") == 1, error
    assert (sorted(os.listdir(out)) if out.exists() else None) == before
    return error


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("name", BAD_FILES)
def test_a_wrong_csv_file_is_named_in_one_sentence(builtin, monkeypatch, capsys, tmp_path, name, part):
    folder = tmp_path / "data"
    shutil.copytree(builtin, folder)
    (folder / f"{part}.csv").write_bytes(BAD_FILES[name])
    monkeypatch.setenv("AG_NEWS_DIR", str(folder))
    assert f"{part}.csv" in refused(capsys, SMALL, tmp_path / "out")


@pytest.mark.parametrize("argv, message", [
    (["--validation", "600"], "validation is 600"), (["--rows", "601"], "rows is 601"),
    (["--dropout", "2"], "dropout is 2"),
    (["--hidden", "x"], "--hidden"), (["--hidden", "0"], "hidden is 0"), (["--lr", "nan"], "lr is nan"),
    (["--representation", "bert"], "invalid choice"), (["--colour"], "--colour"), (["--epochs", "-1"], "epochs is -1"),
    (["--config", "missing.toml"], "missing.toml"), (["--embed", "missing.txt"], "go together"),
    (["--npz", "a.npz"], "go together"), (["--embed", "missing.txt", "--npz", "a.npz"], "missing.txt cannot be read"),
    (["--embed", __file__, "--npz", "a.npz"], "bilstm.pt is missing"), (["extra"], "unrecognized")])
def test_a_wrong_option_is_named_in_one_sentence(builtin, capsys, tmp_path, argv, message):
    assert message in refused(capsys, [*SMALL, *argv], tmp_path / "out")


@pytest.mark.parametrize("text, message", [
    (b"hidden = ", "not TOML"), (b"colour = 3", "'colour' is no knob"), (b"hidden = 'x'", "expected int"),
    (b"dropout = true", "expected float"), (b"\xff", "not UTF-8"), (b"[hidden]\nx = 1", "expected int")])
def test_a_wrong_toml_file_is_named_in_one_sentence(builtin, capsys, tmp_path, text, message):
    (tmp_path / "a.toml").write_bytes(text)
    assert message in refused(capsys, ["--config", str(tmp_path / "a.toml")], tmp_path / "out")


def test_the_command_line_wins_over_the_toml_file(tmp_path):
    (tmp_path / "a.toml").write_text("hidden = 7\ndropout = 0\nskip = false\n")
    argv = ["--config", str(tmp_path / "a.toml"), "--hidden", "9"]
    config, options = ELMO.script_arguments(argv, ELMO.Config, "", "", tmp_path, {})
    assert (config.hidden, config.dropout, config.skip, config.width) == (9, 0.0, False, 448) and not options.resume


def test_a_resume_state_of_other_knobs_or_of_other_rows_or_damaged_is_refused(builtin, capsys, tmp_path):
    trainer = ELMO.Trainer(tiny(), ELMO.Data.of(SENTENCES, tiny(), np.arange(4), np.arange(0)), torch.device("cpu"))
    out = tmp_path / "out"
    out.mkdir()
    ELMO.train(trainer, out / "bilstm.resume.pt")
    capsys.readouterr()
    assert "was made with" in refused(capsys, [*SMALL, "--resume"], out)
    content = (out / "bilstm.resume.pt").read_bytes()
    (out / "bilstm.resume.pt").write_bytes(content[:len(content) // 2])
    assert "cannot be opened" in refused(capsys, [*SMALL, "--resume"], out)
    middle = len(content) // 2
    (out / "bilstm.resume.pt").write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:])
    assert "does not match its digest" in refused(capsys, [*SMALL, "--resume"], out)
    trainer.state = dict
    write_resume(out / "bilstm.resume.pt", trainer.identity(), {})
    with pytest.raises(InputError, match="does not hold such a run"):
        Run(trainer, out / "bilstm.resume.pt", resume=True)


def test_a_loss_that_is_not_finite_stops_with_the_step_in_one_sentence():
    trainer = ELMO.Trainer(tiny(), ELMO.Data.of(SENTENCES, tiny(), np.arange(4), np.arange(0)), torch.device("cpu"))
    trainer.model.layers[0].w_x.data[0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="not finite at step 0"):
        trainer.step(0)


def test_a_loss_that_is_not_finite_keeps_the_state_before_it(builtin, capsys, tmp_path, monkeypatch):
    argv = [*SMALL, "--save-every", "1000", "--epochs", "0.5"]
    assert ELMO.main(["--out", str(tmp_path / "whole"), *argv]) == 0
    apply, calls = ELMO.SampledSoftmax.apply, []
    with monkeypatch.context() as patch:
        patch.setattr(ELMO.SampledSoftmax, "apply", lambda *parts: calls.append(1) or apply(*parts) * (
            torch.nan if len(calls) == 8 else 1))
        assert ELMO.main(["--out", str(tmp_path / "a"), *argv]) == 2
    assert "not finite at step 7;" in capsys.readouterr().err
    kept = torch.load(tmp_path / "a" / "bilstm.resume.pt", weights_only=True)
    assert torch.load(io.BytesIO(kept["state"].numpy()), weights_only=True)["run"]["step"] == 7
    assert ELMO.main(["--out", str(tmp_path / "a"), *argv, "--resume"]) == 0
    assert same(weights(tmp_path / "a"), weights(tmp_path / "whole"))


def test_a_folder_that_another_process_writes_is_refused_until_that_process_ends(builtin, capsys, tmp_path):
    code = "from pathlib import Path; import sys; from data.files import hold; held = hold(Path(sys.argv[1])); print(1)"
    other = subprocess.Popen([sys.executable, "-c", code + "; sys.stdout.flush(); input()", tmp_path], cwd=ROOT,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"1\n"
    assert "another run is writing to" in refused(capsys, SMALL, tmp_path)
    other.kill()
    other.communicate()
    hold(tmp_path)


def test_the_folder_named_by_out_may_not_be_a_file(builtin, capsys, tmp_path):
    (tmp_path / "out").write_text("a file")
    assert ELMO.main(["--out", str(tmp_path / "out"), *SMALL]) == 2
    assert (tmp_path / "out").read_text() == "a file" and capsys.readouterr().err.count("ELMO.py:") == 1


def test_the_numbers_of_the_readme_are_those_of_the_json():
    text = (ROOT / "README.md").read_text()
    assert readme.filled(text, ROOT / "models") == text


class Traced(float):
    """A number of a JSON that shows between two marks wherever it is printed, also after arithmetic."""

    def __new__(cls, value):
        traced = super().__new__(cls, value)
        traced.plain = value
        return traced

    def __format__(self, spec):
        return f"\x01{format(self.plain, spec)}\x02"

    def __index__(self):
        return int(self.plain)

    def __add__(self, other):
        return Traced(self.plain + float(other))

    def __sub__(self, other):
        return Traced(self.plain - float(other))

    def __mul__(self, other):
        return Traced(self.plain * float(other))

    def __truediv__(self, other):
        return Traced(self.plain / float(other))

    __radd__, __rmul__ = __add__, __mul__


def traced(content):
    if isinstance(content, (dict, list)):
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        parts = {key: traced(value) for key, value in pairs}
        return parts if isinstance(content, dict) else list(parts.values())
    return Traced(content) if isinstance(content, (int, float)) and not isinstance(content, bool) else content


def test_every_number_in_a_table_of_the_readme_is_read_from_a_json(monkeypatch):
    monkeypatch.setattr(readme, "written_json", lambda path: nullcontext(traced(json.loads(path.read_text()))))
    text = (ROOT / "README.md").read_text()
    shown = readme.filled(text, ROOT / "models")
    assert re.sub("[\x01\x02]", "", shown) == text
    rest = re.sub("\x01.*?\x02|`.*?`", "#", shown)
    rows = [line for line in re.findall(r"^\|.*", rest, re.MULTILINE) if "#" in line]
    assert len(rows) > 50
    assert not [row for row in rows if re.search(r"(?<!\w)\d", row.partition("|")[2].partition("|")[2])]


def test_figures_and_tables_are_drawn_from_the_json_alone(whole, tmp_path):
    shutil.copy(whole[0] / "pretraining.json", tmp_path)
    assert figures.main([str(tmp_path)]) == 0
    assert {"curves_pretraining.png", "confusion_words.png"} < set(os.listdir(tmp_path))
    text = readme.filled("a <!-- pretraining.json -->old<!-- end --> b", tmp_path)
    perplexity = json.loads((tmp_path / "pretraining.json").read_text())["splits"]["test"]["forward"]["perplexity"]
    assert f"{perplexity:.1f}" in text and "old" not in text and text.endswith("<!-- end --> b")
    assert figures.main([str(tmp_path / "missing")]) == 2


def test_a_notebook_opens_the_committed_model_with_torch_alone_and_it_scores_real_rows(ag_news):
    path = ROOT / "models" / "bilstm.pt"
    if not path.exists():
        pytest.skip("models/bilstm.pt is not there: run `python ELMO.py` first")
    content = torch.load(path, weights_only=True)
    assert list(content) == ["format", "config", "words", "weights", "history", "metrics", "digest"]
    assert path.stat().st_size < 45e6
    result = json.loads((ROOT / "models" / "pretraining.json").read_text())
    assert result["digest"] == content["digest"]
    texts = read_csv(ag_news / "test.csv").description.tolist()[:300]
    found = ELMO.ELMo.load(path).score(texts)
    for name in ("forward", "backward"):        # 300 of 7,600 rows: about 7 % of standard error in perplexity
        assert found[name]["perplexity"] == pytest.approx(result["splits"]["test"][name]["perplexity"], rel=0.25)
