"""What a training run decides before and while it trains: words to sample, precision, device, when it has diverged."""
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HAS_GPU, SENTENCES, arguments, encoded, files, refused, tiny, trainer_of

import classification
import ELMO
from classification import Classifier, Config, adapt
from data import text
from data.ag_news import read_ag_news, split
from data.batches import Sampler
from data.tasks import Part, Task, read_task
from data.text import PAD, UNK
from run import machine
from run.checkpoint import read_resume
from run.files import InputError
from run.optimization import check_loss
from run.progress import Run

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------- words to sample
def test_every_word_but_padding_can_be_sampled_even_if_no_row_contains_it():
    counts = np.array([5, 0, 9, 9, 100, 3, 0, 0, 1])
    sampler = Sampler(counts, draws=4, seed=0)
    assert sampler.pi[PAD] == 0
    assert (sampler.pi[1:] > 0).all()
    assert sampler.pi[UNK] == sampler.pi[6] == sampler.pi[8], "an absent word counts once"
    drawn = [sampler.draw(u) for u in np.linspace(0, 0.999, 1000)]
    assert set(torch.cat(drawn).tolist()) == set(range(1, 9))


@pytest.fixture
def adapted(elmo, tmp_path):
    """The run that adapts the biLM to a task of 40 rows, of which every row has a word that no other row has."""
    rows = [(0, (f"a film called word{i} word{i} .",)) for i in range(40)]
    part = Part.of(rows)
    task = Task("sst2", ["negative", "positive"], part, part, part, [row[0] for row in part.texts])
    return adapt(elmo, task, Config(task="sst2", adapt=1.0, precision="fp32"), tmp_path / "adapt.pt", resume=False)


def test_words_that_the_texts_of_a_task_lack_are_sampled_while_the_bilm_adapts_to_it(elmo, adapted):
    trainer = adapted.trainer
    old = len(elmo.words)
    assert trainer.data.words.words[:old] == elmo.words.words
    absent = trainer.data.counts()[:old] == 0
    assert absent.sum() > 10, "the texts lack most of the old words"
    assert (trainer.sampler.pi[1:] > 0).all()
    moved = (trainer.model.table[:old] != elmo.model.table).any(dim=1).numpy()
    assert (moved & absent)[1:].any()


def test_the_vocabulary_of_an_adapted_bilm_has_no_word_of_the_rows_that_choose_the_pass(adapted):
    data = adapted.trainer.data
    assert len(data.validation) == 4
    for row in range(40):
        assert (f"word{row}" in data.words.index) == (row in data.train)


# ------------------------------------------------------------------------------------------------------ precision
def times(monkeypatch, fp32: float, bf16: float) -> None:
    """Lets the measurement of this process say these seconds."""
    seconds = {torch.float32: fp32, torch.bfloat16: bf16}
    monkeypatch.setattr(machine, "product_seconds", lambda device, dtype: seconds[dtype])
    machine.fast_bf16.cache_clear()


@pytest.fixture(autouse=True)
def measure_again():
    """Forgets what was measured, and what a test said about the speed of this machine."""
    machine.fast_bf16.cache_clear()
    yield
    machine.fast_bf16.cache_clear()


@pytest.mark.parametrize("fp32, bf16, expected", [
    (1.0, 0.5, torch.bfloat16), (1.12, 1.0, torch.bfloat16), (1.08, 1.0, torch.float32), (1.0, 1.5, torch.float32)])
def test_auto_takes_bf16_only_if_it_is_measured_to_be_a_tenth_faster(monkeypatch, fp32, bf16, expected):
    times(monkeypatch, fp32, bf16)
    assert machine.compute_dtype("auto", CPU) == expected
    assert machine.compute_dtype("bf16", CPU) == torch.bfloat16
    assert machine.compute_dtype("fp32", CPU) == torch.float32


def test_bf16_is_measured_once():
    machine.fast_bf16(CPU)
    machine.fast_bf16(CPU)
    assert machine.fast_bf16.cache_info().misses == 1
    assert machine.fast_bf16.cache_info().hits == 1
    assert machine.product_seconds(CPU, torch.float32) > 0


def test_all_processes_use_fp32_if_bf16_is_slow_in_one_of_them(monkeypatch):
    times(monkeypatch, 1.0, 0.5)
    for slow_elsewhere, expected in ((0, torch.bfloat16), (1, torch.float32)):
        with monkeypatch.context() as patch:
            patch.setattr(machine, "sum_over_processes", lambda own, n=slow_elsewhere: [own[0] + n])
            assert machine.compute_dtype("auto", CPU) == expected


def stopped_run(file: Path, **options) -> None:
    """A state after three steps of a small run."""
    trainer = ELMO.Trainer(tiny(**options), encoded(SENTENCES * 5), CPU)
    with Run(trainer, file) as run:
        for step in range(3):
            run.count(*trainer.step(step))
        run.save()


@pytest.mark.parametrize("first", ["auto", "bf16", "fp32"])
def test_a_resumed_run_keeps_its_precision_whatever_is_fast_on_this_machine(monkeypatch, tmp_path, first):
    times(monkeypatch, 1.0, 0.5)
    stopped_run(tmp_path / "a.pt", precision=first)
    before = "fp32" if first == "fp32" else "bf16"
    other = "bf16" if first == "fp32" else "fp32"
    times(monkeypatch, 0.5, 1.0)            # another machine
    for precision in ("auto", before):
        trainer = ELMO.Trainer(tiny(precision=precision), encoded(SENTENCES * 5), CPU)
        run = Run(trainer, tmp_path / "a.pt", resume=True)
        assert run.step == 3
        assert run.precision == before
    trainer = ELMO.Trainer(tiny(precision=other), encoded(SENTENCES * 5), CPU)
    with pytest.raises(InputError, match=f"was computed in {before}, not {other}; give --precision {before}"):
        Run(trainer, tmp_path / "a.pt", resume=True)


# ----------------------------------------------------------------------------------------------------- divergence
@pytest.mark.parametrize("loss, norm", [
    (math.nan, 1.0), (math.inf, 1.0), (10.0, math.nan), (10.0, math.inf), (501.0, 1.0)])
def test_a_loss_that_is_not_finite_or_above_50_nats_per_token_is_named_with_its_step(loss, norm):
    check_loss(torch.tensor(500.0), torch.tensor(1e30), 10, 4, 4)       # 50 nats: nothing is said
    with pytest.raises(InputError, match="the loss diverged at step 4: "):
        check_loss(torch.tensor(loss), torch.tensor(norm), 10, 4, 4)
    with pytest.raises(InputError, match="the loss diverged at one of the steps 4 to 7: "):
        check_loss(torch.tensor(loss), torch.tensor(norm), 10, 4, 7)


def test_a_run_that_diverges_while_its_loss_is_finite_keeps_the_state_before_the_step(builtin, tmp_path, capsys):
    argv = arguments("ELMO.py", tmp_path / "out", tmp_path, "--lr", "10", "--table-lr", "10", "--hidden", "96")
    assert ELMO.main(argv) == 2
    step = re.search(r"the loss diverged at step (\d+): it is \d", capsys.readouterr().err).group(1)
    assert files(tmp_path) == ["out/bilstm.resume.pt"]
    state = read_resume(tmp_path / "out" / "bilstm.resume.pt", {})
    assert state["run"]["step"] == int(step) > 0
    assert all(torch.isfinite(weight).all() for weight in state["trainer"]["model"].values())


def test_heads_that_diverge_are_refused_and_their_state_is_kept(elmo, tmp_path):
    trainer = trainer_of(elmo, lr=10.0, mix_lr=10.0, epochs=20.0, setting="trainable", clip=1e9)
    trainer.learners["trainable-0"].modules["head"].out.weight.data.mul_(1e4)
    with pytest.raises(InputError, match="the loss diverged at step 0: "):
        classification.train(trainer, tmp_path / "a.resume.pt")
    assert read_resume(tmp_path / "a.resume.pt", trainer.identity())["run"]["step"] == 0


@pytest.mark.parametrize("loss", [50.1, math.inf, math.nan])
def test_an_evaluation_that_shows_divergence_ends_the_run_and_the_last_saved_state_stays(tmp_path, loss):
    trainer = ELMO.Trainer(tiny(), encoded(SENTENCES * 5), CPU)
    file = tmp_path / "a.resume.pt"
    with pytest.raises(InputError, match=r"the loss diverged: it is .* on the validation rows after step"), \
            Run(trainer, file) as run:
        for step in range(trainer.interval):
            if step == trainer.interval - 1:
                run.save()
            run.count(*trainer.step(step))
        run.save_best(lambda _: (loss, {}, "no sentence"))
    assert read_resume(file, {})["run"]["step"] == trainer.interval - 1


# ------------------------------------------------------------------------------------------ what a model says of itself
@pytest.mark.parametrize("texts, asked, expected", [(4, 4000, 0), (40, 4000, 4), (100, 3, 3)])
def test_a_trained_model_says_how_many_validation_rows_it_had(texts, asked, expected, tmp_path):
    model = ELMO.ELMo.train((SENTENCES * 25)[:texts], tiny(epochs=1.0, validation=asked))
    model.save(tmp_path / "a.pt")
    assert ELMO.ELMo.load(tmp_path / "a.pt").config.validation == expected


def test_heads_are_validated_on_rows_that_their_bilm_did_not_learn(builtin):
    texts = read_ag_news("train").description.tolist()
    for count in (40, 300, 600):
        model = ELMO.ELMo.train(texts[:count], tiny(epochs=0.1))
        learned, _ = split(count, model.config.validation, model.config.seed)
        task = read_task(Config(), model.config)
        validation = {text for text, in task.validation.texts}
        assert len(task.validation) == count // 10
        assert validation.isdisjoint(texts[row] for row in learned)


def test_a_bilm_of_a_few_own_texts_leaves_the_validation_rows_of_the_task_to_the_task(builtin):
    model = ELMO.ELMo.train(SENTENCES, tiny(epochs=0.1))
    assert model.config.validation == 0
    assert len(read_task(Config(), model.config).validation) > 0


def test_the_command_needs_validation_rows(builtin, tmp_path):
    argv = arguments("ELMO.py", tmp_path / "out", tmp_path, "--validation", "0")
    assert "validation is 0" in refused("ELMO.py", argv, tmp_path)


def test_no_model_is_wider_than_its_cells():
    assert ELMO.Config(hidden=128).width == 128
    assert ELMO.Config(hidden=128, width=64).width == 64
    assert ELMO.Config(hidden=1024).width == 448


# ------------------------------------------------------------------------------------------------ device and seeds
WITHOUT_GPU = pytest.param("cuda", marks=pytest.mark.skipif(HAS_GPU, reason="there is a GPU here"))


@pytest.mark.parametrize("device", ["cud", WITHOUT_GPU, "cuda:77", "gpu", "meta", 3.5])
def test_a_device_that_does_not_exist_is_blamed_and_not_the_file(whole, device):
    loads = [
        lambda: ELMO.ELMo.load(whole / "bilstm.pt", device=device),
        lambda: ELMO.ELMo.train(SENTENCES, tiny(), device=device),
        lambda: Classifier.load(whole / "classifier.pt", whole / "bilstm.pt", device=device)]
    for load in loads:
        with pytest.raises(InputError) as caught:
            load()
        assert str(caught.value).startswith(f"device '{device}' cannot be used")
        assert "bilstm.pt" not in str(caught.value)


def test_training_and_loading_choose_the_same_device(monkeypatch, whole):
    chosen = []
    find_device = machine.find_device

    def found(name=None):
        chosen.append(name)
        return find_device("cpu")

    monkeypatch.setattr(machine, "find_device", found)
    ELMO.ELMo.load(whole / "bilstm.pt")
    ELMO.ELMo.train(SENTENCES, tiny(epochs=0.1))
    Classifier.load(whole / "classifier.pt", whole / "bilstm.pt")
    assert chosen[0] is None
    assert set(chosen) <= {None, CPU}


def test_new_models_draw_from_their_seed_and_leave_all_other_random_numbers_alone(monkeypatch, elmo):
    reseeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded.append)
    torch.default_generator.manual_seed(3)
    expected = torch.rand(4)
    torch.default_generator.manual_seed(3)
    first = ELMO.Trainer(tiny(seed=1), encoded(SENTENCES), CPU).model.table
    second = ELMO.Trainer(tiny(seed=1), encoded(SENTENCES), CPU).model.table
    other = ELMO.Trainer(tiny(seed=2), encoded(SENTENCES), CPU).model.table
    trainer_of(elmo)
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert reseeded == [], "the generators of GPUs were set"


# --------------------------------------------------------------------------------------------------- texts and cache
@pytest.mark.parametrize("number", [0, 38, 550, 1200])
def test_a_stream_names_the_text_that_is_no_string(elmo, number):
    texts = ["goal !"] * 1300
    texts[number] = 7
    with pytest.raises(InputError, match=f"^text {number} is of type int"):
        list(elmo.embed_stream(texts))


def test_one_string_instead_of_a_list_is_named_as_such(elmo, whole):
    clf = Classifier.load(whole / "classifier.pt", whole / "bilstm.pt")
    for call in (elmo.embed, elmo.embed_stream, elmo.score, clf.predict, ELMO.ELMo.train):
        with pytest.raises(InputError, match="texts is one string; expected a list of texts"):
            call("one text")
    with pytest.raises(InputError, match="texts is one string"):
        elmo.embed_stream("one text", "another text")


def test_another_rule_of_the_tokenizer_makes_another_cache(monkeypatch, tmp_path):
    text.tokenize_texts(["a b"], tmp_path)
    text.tokenize_texts(["a b"], tmp_path)
    assert len(list(tmp_path.iterdir())) == 1

    def tokenize(string: str) -> list[str]:
        return string.upper().split()

    monkeypatch.setattr(text, "tokenize", tokenize)
    assert text.tokenize_texts(["a b"], tmp_path).types == ["A", "B"]
    assert len(list(tmp_path.iterdir())) == 2
