"""Training and inference on a GPU, checked without one: see far_device.py."""
import os
import threading
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import SENTENCES, encoded, tiny, trainer_of
from far_device import CUDA, far_device

import classification
import ELMO
from run import machine
from run.files import InputError
from run.optimization import dropout_mask
from run.progress import Run

GPU = torch.device("cuda")


# -------------------------------------------------------------------------------------------- the pretended device
def test_what_is_computed_from_a_tensor_on_the_device_is_there_too():
    with far_device():
        x = torch.ones(4, 2).cuda().requires_grad_()
        table = torch.nn.Parameter(torch.ones(5, 2, device="cuda"))
        loss = torch.nn.functional.embedding(torch.arange(3, device=x.device), table, sparse=True).sum() + (x * x).sum()
        loss.backward()
        gradient, = torch.autograd.grad((x * x).sum(), x)
        computed = [x[0], x.data, x.double(), x.detach(), loss]
        gradients = [gradient, x.grad, table.grad, table.grad.coalesce().values()]
        assert {tensor.device for tensor in [x, table, *computed, *gradients]} == {CUDA}
        assert torch.ones(2).device == torch.ones(2, device="cpu").device == x.cpu().device == torch.device("cpu")


def test_a_module_and_its_copy_move_to_the_device_and_back():
    with far_device():
        lstm = torch.nn.LSTM(2, 3).to("cuda")
        assert {weight.device for weight in torch.optim.swa_utils.AveragedModel(lstm).module.parameters()} == {CUDA}
        assert {value.device.type for value in lstm.cpu().state_dict().values()} == {"cpu"}


@pytest.mark.parametrize("mix", [
    lambda far, near: far + near,
    lambda far, near: near[far.long()],
    lambda far, near: torch.cat([near, far]),
    lambda far, near: far.add_(near),
    lambda far, near: far.bernoulli_(0.5, generator=torch.Generator()),
    lambda far, near: setattr(far, "grad", near)])
def test_tensors_of_two_devices_do_not_meet_in_one_operation(mix):
    with far_device(), pytest.raises(AssertionError, match=r"mixes cpu and cuda tensors in test_device.py:\d+"):
        mix(torch.zeros(3, device="cuda"), torch.zeros(3))


@pytest.mark.parametrize("make", [lambda x: x.numpy(), np.asarray])
def test_numpy_takes_no_tensor_on_the_device(make):
    with far_device(), pytest.raises(AssertionError, match="takes no cuda tensor"):
        make(torch.zeros(3, device="cuda"))


def test_a_number_on_the_cpu_may_meet_a_tensor_on_the_device():
    with far_device():
        assert (torch.zeros(3, device="cuda") + torch.tensor(1.0)).device == CUDA


@pytest.mark.parametrize("read", [
    lambda x: x[0].item(), lambda x: x.tolist(), lambda x: x.cpu(), lambda x: x.to("cpu"),
    lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: bool(x[0] > 0), lambda x: float(x[0]), lambda x: f"{x[0]:.3f}",
    lambda x: max(x[0], x[1]), lambda x: torch.unique(x), lambda x: torch.zeros(3).copy_(x),
    lambda x: torch.ones(3).to(x.device), lambda x: torch.tensor([1.0], device=x.device)])
def test_what_makes_the_program_wait_for_the_device_is_noted(read):
    with far_device() as far:
        x = torch.ones(3, device="cuda")
        assert far.waits == []
        read(x)
        wait, = far.waits
        assert " in test_device.py:" in wait


def test_what_only_gives_the_device_more_work_is_not_noted():
    with far_device() as far:
        x = torch.ones(3, device="cuda")
        y = torch.arange(3).to("cuda", non_blocking=True)
        x[y].masked_fill(x > 0, 1.0).sum().clamp(max=2.0)
        assert x.shape == (3,) and len(x) == 3 and x.dtype == torch.float32
        assert far.waits == []


# -------------------------------------------------------------------------------------------------- training steps
def language_models(device: str, representation: str) -> ELMO.Trainer:
    """A trainer of the two language models on this device."""
    options = {"representation": representation, "precision": "fp32", "word_dropout": 0.1}
    return ELMO.Trainer(tiny(**options), encoded(SENTENCES * 6, **options), torch.device(device))


def heads(device: str, elmo: ELMO.ELMo, **options) -> classification.Trainer:
    """A trainer of heads on this device."""
    return trainer_of(on_device(elmo, device), **options)


def on_device(elmo: ELMO.ELMo, device: str) -> ELMO.ELMo:
    """A copy of a biLM on this device."""
    return ELMO.ELMo.from_parts(asdict(elmo.config), elmo.words.words, elmo.weights(), torch.device(device))


def check_steps(make: Callable, steps: int, *arguments, **options) -> None:
    """Some steps on the device read nothing from it, and their losses and gradient norms are those on the CPU."""
    near = make("cpu", *arguments, **options)
    expected = [near.step(step) for step in range(steps)]
    with far_device() as far:
        trainer = make("cuda", *arguments, **options)
        assert {weight.device for weight in trainer.model.parameters()} == {CUDA}
        far.waits.clear()
        found = [trainer.step(step) for step in range(steps)]
        assert far.waits == []
        assert {loss.device for loss, _, _ in found} == {norm.device for _, norm, _ in found} == {CUDA}
    for (loss, norm, items), (near_loss, near_norm, near_items) in zip(found, expected, strict=True):
        assert items == near_items
        assert [float(loss), float(norm)] == pytest.approx([float(near_loss), float(near_norm)], rel=1e-4)


@pytest.mark.parametrize("representation", ["embedding", "char"])
def test_a_training_step_of_the_language_models_reads_nothing_from_the_device(representation):
    check_steps(language_models, 4, representation)


@pytest.mark.parametrize("options", [{"setting": "all"}, {"finetune": True}])
def test_a_training_step_of_the_heads_reads_nothing_from_the_device(elmo, options):
    check_steps(heads, 2 * classification.AVERAGE_EVERY, elmo, **options)


def test_dropout_masks_are_made_on_the_device_by_a_generator_of_the_device():
    with far_device() as far:
        generator = machine.random_generator(GPU, 0)
        assert generator.device == CUDA
        assert dropout_mask(0.5, (2, 3), generator).device == CUDA
        assert far.waits == []


def test_calls_for_the_device_run_in_this_thread():
    def thread(_) -> int:
        return threading.get_ident()
    with machine.torch_threads(2):
        assert set(machine.Workers(2, GPU).map(thread, range(4))) == {threading.get_ident()}
        assert set(machine.map_on_cores(thread, range(4), GPU)) == {threading.get_ident()}
        assert threading.get_ident() not in machine.map_on_cores(thread, range(4), torch.device("cpu"))


# ------------------------------------------------------------------------------------------------------- inference
def test_vectors_scores_and_probabilities_are_those_of_the_cpu(elmo):
    trainer = heads("cpu", elmo, setting="trainable")
    labels = ["a", "b", "c", "d"]

    def results(device: str) -> tuple:
        """Vectors, scores and predictions of the sentences."""
        model = on_device(elmo, device)
        head = classification.Head(trainer.config, "trainable", 3, trainer.vectors.width, 4)
        head.load_state_dict(trainer.model["trainable-0"]["head"].state_dict())
        clf = classification.Classifier(trainer.config, labels, head.to(device), model)
        predictions = [prediction["probabilities"] for prediction in clf.predict(SENTENCES)]
        return model.embed([*SENTENCES, ""]), model.score(SENTENCES), predictions

    vectors, scores, predictions = results("cpu")
    with far_device():
        far_vectors, far_scores, far_predictions = results("cuda")
        assert {tensor.device.type for tensor in far_vectors} == {"cpu"}
    for found, expected in zip(far_vectors, vectors, strict=True):
        assert torch.allclose(found, expected, atol=1e-6)
    for direction in ("forward", "backward"):
        assert far_scores[direction] == pytest.approx(scores[direction], rel=1e-6)
    for found, expected in zip(far_predictions, predictions, strict=True):
        assert found == pytest.approx(expected, abs=1e-6)


def test_a_language_model_trained_on_the_device_embeds_as_one_trained_on_the_cpu():
    texts = SENTENCES * 8
    config = tiny(precision="fp32", validation=8)
    with far_device():
        vectors = ELMO.ELMo.train(texts, config, device="cuda").embed(SENTENCES)
    for found, expected in zip(vectors, ELMO.ELMo.train(texts, config, device="cpu").embed(SENTENCES), strict=True):
        assert torch.allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("options", [{"setting": "all"}, {"finetune": True}])
def test_heads_trained_on_the_device_have_the_probabilities_of_heads_trained_on_the_cpu(elmo, options):
    near = heads("cpu", elmo, **options)
    classification.train(near)
    expected = near.probabilities(near.parts["validation"])
    with far_device():
        trainer = heads("cuda", elmo, **options)
        classification.train(trainer)
        found = trainer.probabilities(trainer.parts["validation"])
    assert found.keys() == expected.keys()
    for name, probabilities in found.items():
        assert torch.allclose(probabilities, expected[name], atol=1e-4), name


# ------------------------------------------------------------------------------------------------------------ runs
def long_epoch() -> ELMO.Trainer:
    """A trainer on the device that logs every 5 steps and is evaluated after 20."""
    return ELMO.Trainer(tiny(precision="fp32", log_every=5), encoded(SENTENCES * 40), GPU)


def test_a_run_on_the_device_reads_its_losses_every_log_every_steps_only(tmp_path):
    read_after = []
    with far_device() as far, Run(long_epoch(), tmp_path / "run.pt") as run:
        assert run.trainer.interval == 20
        for step in range(13):
            far.waits.clear()
            assert not run.due(step) and not run.stop()
            run.count(*run.trainer.step(step))
            if far.waits:
                read_after.append(run.step)
        assert len(run.unread) == 3
        run.save()
        assert run.unread == []
    assert read_after == [5, 10]


def test_a_loss_that_diverges_on_the_device_is_refused_and_the_last_saved_state_stays(tmp_path):
    file = tmp_path / "run.pt"
    with far_device(), pytest.raises(InputError) as refused, Run(long_epoch(), file) as run:
        for step in range(20):
            if step == 5:
                run.save()
                saved = file.read_bytes()
            if step == 7:
                run.trainer.model.bias.data.fill_(torch.nan)
            run.count(*run.trainer.step(step))
    assert run.step == 10
    assert str(refused.value).startswith("the loss diverged at one of the steps 5 to 9: it is nan")
    assert file.read_bytes() == saved
    with far_device():
        resumed = Run(long_epoch(), file, resume=True)
        assert resumed.step == 5
        assert resumed.trainer.model.bias.isfinite().all()


# ------------------------------------------------------------------------------------------------------------ GPUs
def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "run", "LOCAL_WORLD_SIZE": "3", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match=r"^3 processes need as many GPUs, but there are 2; choose a smaller"):
        machine.join_processes()


def test_tests_that_are_not_marked_see_no_gpu():
    assert machine.find_device() == torch.device("cpu")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.cuda
def test_a_marked_test_sees_the_gpu():
    assert machine.find_device() == GPU
    assert torch.ones(2, device="cuda").sum().item() == 2
