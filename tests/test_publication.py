"""Which files a run may write: never those of another published run, unless --overwrite is given."""
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import FILES, SCRIPTS, arguments, files, numbers, refused, snapshot

import classification
import ELMO
from classification import Config
from data.text import Data
from run.files import write_json

JSON = {"ELMO.py": "pretraining.json", "classification.py": "classification.json"}
ADVICE = "choose another --out, or give --overwrite"


@pytest.fixture
def out(whole, tmp_path) -> Path:
    """A copy of the folder with the published files of both scripts."""
    return Path(shutil.copytree(whole, tmp_path / "out"))


def same_run(name: str, out: Path, *more: str) -> list[str]:
    """The command line that has written the files of a script in `out`."""
    setting = ["--setting", "all"] if name == "classification.py" else []
    return arguments(name, out, out / "bilstm.pt", *setting, *more)


@pytest.mark.parametrize("command, message", [
    ("ELMO.py --rows 500", "pretraining.json is from a run with rows = 0, not 500"),
    ("ELMO.py --epochs 0.1", "with epochs = 3.0, not 0.1"),
    ("ELMO.py --rows 500 --resume", "with rows = 0, not 500"),
    ("classification.py --seeds 1", "classification.json is from a run with seeds = 2, not 1"),
    ("classification.py --setting frozen", "with setting = all, not frozen"),
    ("classification.py --rows 100", "with rows = 0, not 100")])
def test_a_trial_does_not_overwrite_the_files_of_another_run(builtin, out, command, message):
    name, *trial = command.split()
    sentence = refused(name, same_run(name, out, *trial), out)
    assert message in sentence
    assert ADVICE in sentence


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_on_other_data_does_not_overwrite_the_files(builtin, out, tmp_path, monkeypatch, name):
    other = Path(shutil.copytree(builtin, tmp_path / "other"))
    text = (other / "test.csv").read_text()
    (other / "test.csv").write_text(text.replace("bank", "court"))
    monkeypatch.setenv("AG_NEWS_DIR", str(other))
    sentence = refused(name, same_run(name, out), out)
    assert "is from a run on other data; " + ADVICE in sentence


def test_heads_on_another_bilm_do_not_overwrite_the_files(builtin, out, tmp_path):
    elmo = ELMO.ELMo.load(out / "bilstm.pt")
    elmo.model.bias += 0.25
    elmo.save(tmp_path / "other.pt")
    argv = same_run("classification.py", out, "--bilstm", str(tmp_path / "other.pt"))
    assert "is from a run on another biLM" in refused("classification.py", argv, out)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_same_run_may_write_its_files_again(builtin, out, name):
    result = numbers(JSON[name].removesuffix(".json"), out)
    write_json(out / JSON[name], result | {"minutes": -1.0})
    assert SCRIPTS[name].main(same_run(name, out, "--log-every", "7", "--precision", "auto")) == 0
    assert numbers(JSON[name].removesuffix(".json"), out)["minutes"] > 0


@pytest.mark.parametrize("name", SCRIPTS)
def test_resume_says_that_the_same_run_is_finished_and_writes_nothing(builtin, out, capsys, name):
    before = snapshot(out)
    assert SCRIPTS[name].main(same_run(name, out, "--resume")) == 0
    assert "finished already" in capsys.readouterr().out
    assert snapshot(out) == before


def test_more_epochs_than_the_finished_run_are_refused_with_what_to_do(builtin, out):
    sentence = refused("ELMO.py", same_run("ELMO.py", out, "--resume", "--epochs", "6"), out)
    assert "with epochs = 3.0, not 6.0; " + ADVICE in sentence


@pytest.mark.parametrize("name", SCRIPTS)
def test_overwrite_with_resume_starts_anew_if_there_is_no_state_to_resume(builtin, out, name):
    argv = same_run(name, out, "--overwrite", "--resume", "--epochs", "1")
    assert SCRIPTS[name].main(argv) == 0
    assert numbers(JSON[name].removesuffix(".json"), out)["config"]["epochs"] == 1.0


def test_overwrite_with_resume_goes_on_from_a_state(builtin, out, monkeypatch, capsys):
    argv = same_run("ELMO.py", out, "--overwrite", "--resume", "--epochs", "1")
    step = ELMO.Trainer.step

    def stop_at_8(trainer, number):
        if number == 8:
            raise KeyboardInterrupt
        return step(trainer, number)

    with monkeypatch.context() as patch:
        patch.setattr(ELMO.Trainer, "step", stop_at_8)
        assert ELMO.main([*argv, "--save-every", "0"]) == 130
    assert (out / "bilstm.resume.pt").exists()
    assert ELMO.main(argv) == 0
    assert "\nstarting at step 8 of 36" in capsys.readouterr().out


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_model_without_its_numbers_is_not_overwritten(builtin, out, name):
    (out / JSON[name]).unlink()
    sentence = refused(name, same_run(name, out), out)
    assert f"{FILES[name]} exists, but not {JSON[name]}" in sentence
    assert ADVICE in sentence


def test_a_stopped_run_of_other_options_is_replaced_with_overwrite_and_refused_without(builtin, out, capsys):
    (out / "pretraining.json").unlink()
    (out / "bilstm.pt").rename(out / "bilstm.resume.pt")         # no state of this run
    assert "is no checkpoint of this kind" in refused("ELMO.py", same_run("ELMO.py", out, "--resume"), out)
    assert ELMO.main(same_run("ELMO.py", out, "--resume", "--overwrite")) == 0
    assert "starting anew, because" in capsys.readouterr().out


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_without_its_model_is_not_finished(builtin, out, name):
    before = (out / FILES[name]).read_bytes()
    (out / FILES[name]).unlink()
    assert SCRIPTS[name].main(same_run(name, out, "--resume")) == 0
    assert len((out / FILES[name]).read_bytes()) == pytest.approx(len(before), rel=0.01)


def test_another_precision_is_another_run(builtin, out):
    message = refused("ELMO.py", same_run("ELMO.py", out, "--resume", "--precision", "fp32"), out)
    assert "with precision = bf16, not fp32" in message


def test_a_stopped_adaptation_is_not_finished(builtin, out, capsys):
    shutil.copy(out / "bilstm.pt", out / "classifier.adapt.0123.resume.pt")
    assert classification.main(same_run("classification.py", out, "--resume")) == 0
    assert "finished already" not in capsys.readouterr().out


def test_a_run_that_another_one_overtakes_is_refused(builtin, out, monkeypatch):
    folder = out / "new"
    digest = Data.digest.func

    def publish_meanwhile(data):
        """Another run publishes while this one reads its data."""
        folder.mkdir(exist_ok=True)
        result = numbers("pretraining", out)
        write_json(folder / "pretraining.json", result | {"config": result["config"] | {"dropout": 0.4}})
        return digest(data)

    monkeypatch.setattr(Data, "digest", property(publish_meanwhile))
    assert ELMO.main(same_run("ELMO.py", folder)) == 2


def test_a_damaged_json_is_named_and_can_be_overwritten(builtin, out):
    (out / "pretraining.json").write_text("{")
    assert "pretraining.json is not what the scripts write" in refused("ELMO.py", same_run("ELMO.py", out), out)
    assert ELMO.main(same_run("ELMO.py", out, "--overwrite")) == 0
    assert numbers("pretraining", out)["splits"]


def test_runs_that_differ_in_kind_write_files_of_different_names():
    titled = Config(fields="title+description")
    names = []
    for config in (Config(), titled, Config(task="sst5"), Config(task="nli")):
        for finetune in (False, True):
            for adapt in (0.0, 2.0):
                names.append(replace(config, finetune=finetune, adapt=adapt).stem)
    assert len(set(names)) == 16
    assert Config().stem == "classifier"
    assert Config(finetune=True).stem == "finetuned"
    assert replace(titled, finetune=True).stem == "titled_finetuned"


def test_files_of_other_runs_stay_beside_new_ones(builtin, out):
    before = snapshot(out)
    argv = same_run("classification.py", out, "--setting", "trainable", "--finetune", "--seeds", "1", "--epochs", "0.1")
    assert classification.main(argv) == 0
    after = snapshot(out)
    assert before.items() <= after.items()
    assert "finetuned.json" in files(out)
