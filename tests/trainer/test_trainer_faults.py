"""Faults while pruning: Ctrl-C, NaN, a full disk, too little memory. Model, optimizer and Trainer stay usable."""

import copy
import errno
import logging
import signal
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers as hf
from trainings import assert_same, config, make_trainer, samples, tiny_model
from transformers import Trainer

import hap_hf.cut
import hap_hf.decision
import hap_hf.pipeline
from hap_hf import Compensation, ConfigError, CurvatureError, HessianPruner, plan_of, prune
from hap_hf.model.rollback import interrupts_deferred, undone_on_error


class Remember(hf.TrainerCallback):
    """Keeps copies of the model from before the steps; goes before the callback that prunes."""

    def __init__(self):
        self.before = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.before[state.global_step] = copy.deepcopy(model)


def interrupted_training(tmp_path):
    """Return a trainer that prunes after step 3, with implants, and the copies of its model."""
    remember = Remember()
    pruner = HessianPruner(config(implant_ratio=0.5), step=3)
    return make_trainer(tmp_path, tiny_model(), remember, pruner, max_steps=5, eval_dataset=samples(8)), remember


def assert_usable(trainer, before):
    """Check that the model is the one before, that the optimizer trains it, and that the next training prunes it."""
    model, optimizer = trainer.model, trainer.optimizer.optimizer
    assert_same(model, before)
    assert plan_of(model) is None
    assert all(p.requires_grad for p in model.parameters())
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert set(optimizer.state) <= set(model.parameters())
    for p, state in optimizer.state.items():
        assert all(v.shape == p.shape for v in state.values() if isinstance(v, torch.Tensor) and v.dim())
    twin = make_trainer(trainer.args.output_dir, before, eval_dataset=samples(8))
    assert trainer.evaluate()["eval_loss"] == twin.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.model.num_parameters() < before.num_parameters()
    assert plan_of(trainer.model) is not None


def raising_after(function, error):
    def wrapped(*args, **kwargs):
        function(*args, **kwargs)
        raise error

    return wrapped


@pytest.fixture
def _no_look_at_the_beginning(monkeypatch):
    """Let a training begin without a look at what a later round will do."""
    monkeypatch.setattr("hap_hf.trainer.callback.look_ahead", lambda *given: None)


STAGES = [
    "discover",
    "score_in_passes",
    "choose",
    "collect_input_moments",
    "replace_values_",
    "apply_plan_",
    "carry_optimizer_state_",
    "record_plan",
]


@pytest.mark.parametrize("stage", [*STAGES, "make_report"])
@pytest.mark.usefixtures("_no_look_at_the_beginning")
def test_ctrl_c_after_any_stage_leaves_everything_as_it_was(tmp_path, stage):
    trainer, remember = interrupted_training(tmp_path)
    modules = hap_hf.decision, hap_hf.admission, hap_hf.cut, hap_hf.pipeline
    module = next(m for m in modules if hasattr(m, stage))
    interrupted = raising_after(getattr(module, stage), KeyboardInterrupt())
    if stage == "record_plan":  # nothing comes after it, so it is interrupted before
        interrupted = raising_after(lambda *args: None, KeyboardInterrupt())
    with mock.patch.object(module, stage, interrupted), pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert_usable(trainer, remember.before[3])


@pytest.mark.parametrize("step", ["while_scoring", "values"])
def test_ctrl_c_after_compensation_leaves_everything_as_it_was(tmp_path, step):
    trainer, remember = interrupted_training(tmp_path)
    interrupted = raising_after(getattr(Compensation, step), KeyboardInterrupt())
    with mock.patch.object(Compensation, step, interrupted), pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert_usable(trainer, remember.before[3])


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.usefixtures("_no_look_at_the_beginning")
def test_a_real_ctrl_c_while_scoring_leaves_everything_as_it_was(tmp_path, call):
    trainer, remember = interrupted_training(tmp_path)
    loss, calls = Trainer.compute_loss, []

    def press(self, model, *args, **kwargs):
        calls.extend([] if model.training else [1])
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return loss(self, model, *args, **kwargs)

    with mock.patch.object(Trainer, "compute_loss", press), pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert len(calls) == call
    assert_usable(trainer, remember.before[3])


def test_ctrl_c_in_the_middle_of_carrying_the_optimizer_over_is_undone(tmp_path):
    trainer, remember = interrupted_training(tmp_path)
    cut, calls = hap_hf.surgery.optimizer._cut, []

    def press(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return cut(*args)

    with mock.patch.object(hap_hf.surgery.optimizer, "_cut", press), pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert_usable(trainer, remember.before[3])


def net_with_batch_norm():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.ReLU(), torch.nn.Linear(6, 2))


def test_statistics_of_batch_norms_are_put_back_too():
    model = net_with_batch_norm()
    before = copy.deepcopy(model)

    @undone_on_error(model)
    def change():
        model[1].running_mean.add_(1)
        model[1].running_var = torch.ones(3)
        model[0] = torch.nn.Linear(4, 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        change()
    assert_same(model, before)


def test_hooks_flags_gradients_and_the_optimizer_are_put_back():
    model = net_with_batch_norm()
    optimizer = torch.optim.Adam(model.named_parameters())
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    parameters, gradients = list(model.parameters()), [p.grad for p in model.parameters()]
    state = dict(optimizer.state)

    @undone_on_error(model, optimizer)
    def change():
        model[0].register_forward_hook(lambda *args: None)
        model[3].weight.requires_grad_(False)
        model[3].weight.grad = None
        model[0].weight = torch.nn.Parameter(torch.zeros(2, 4))
        optimizer.param_groups[0]["params"][0] = model[0].weight
        optimizer.param_groups[0]["param_names"].insert(1, "0.implant_up")
        optimizer.state.pop(parameters[0])
        raise ValueError("changed enough")

    with pytest.raises(ValueError, match="changed enough"):
        change()
    assert not model[0]._forward_hooks
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert all(p.grad is g and p.requires_grad for p, g in zip(parameters, gradients, strict=True))
    assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], parameters, strict=True))
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    assert dict(optimizer.state) == state


def test_what_ends_well_is_not_undone():
    model = net_with_batch_norm()
    with undone_on_error(model):
        model[0] = torch.nn.Linear(4, 3)
    assert model[0].out_features == 3


def test_ctrl_c_waits_for_the_end_of_a_block_that_must_not_be_torn():
    done = []

    def run():
        with interrupts_deferred():
            signal.raise_signal(signal.SIGINT)
            done.append("rest of the block")
        done.append("code behind it")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert done == ["rest of the block"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_cannot_and_need_not_defer_ctrl_c():
    handlers = []

    def look():
        with interrupts_deferred():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]


def bent(name):
    """Return a loss whose second derivative with respect to one weight is infinite, on the batch with sample 0."""

    def loss(model, batch):
        weight = model.get_parameter(name)[0, 0]
        kink = (weight - weight.detach()).abs().pow(1.5)
        return model(**batch).loss + (kink if batch["input_ids"][0, 0] == 7 else 0)

    return loss


def test_curvature_that_is_not_finite_names_batch_and_layer_and_leaves_the_model(tmp_path):
    name = "bert.encoder.layer.1.output.dense.weight"
    batches = [hf.default_data_collator(samples()[i : i + 4]) for i in (0, 4)]
    batches[0]["input_ids"][0, 0], batches[1]["input_ids"][0, 0] = 1, 7
    model = tiny_model()
    before = copy.deepcopy(model)
    pruner = HessianPruner(config(method="hessian"), batches=batches, loss_fn=bent(name))
    with pytest.raises(CurvatureError, match=f"batch 1: expected finite second derivatives, got NaN .* in {name};"):
        make_trainer(tmp_path, model, pruner, max_steps=1).train()
    assert_same(model, before)
    assert pruner.reports == []


def exploding(model, batch):
    """Return the loss, with a gradient that is not finite before the second layer."""

    def explode(module, args, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * torch.inf)

    hook = model.get_submodule("bert.encoder.layer.1.output.dense").register_forward_hook(explode)
    loss = model(**batch).loss
    hook.remove()
    return loss


@pytest.mark.parametrize("method", ["mask_ggn", "ggn", "empirical_fisher"])
def test_gradients_that_are_not_finite_name_batch_and_layers_and_leave_the_model(tmp_path, method):
    model = tiny_model()
    before = copy.deepcopy(model)
    pruner = HessianPruner(config(method=method), loss_fn=exploding)
    with pytest.raises(
        CurvatureError, match=r"batch 0: expected finite gradients, got NaN .* in .*bert\.encoder\.layer"
    ):
        make_trainer(tmp_path, model, pruner, max_steps=1).train()
    assert_same(model, before)


@pytest.mark.parametrize("method", ["hessian", "ggn", "taylor"])
def test_a_loss_that_is_not_finite_names_the_batch_and_leaves_the_model(tmp_path, method):
    model = tiny_model()
    before = copy.deepcopy(model)
    batches = [hf.default_data_collator(samples()[i : i + 4]) for i in (0, 4)]

    def loss(model, batch):
        value = model(**batch).loss
        return value * float("nan") if torch.equal(batch["input_ids"], batches[1]["input_ids"]) else value

    pruner = HessianPruner(config(method=method), batches=batches, loss_fn=loss)
    with pytest.raises(CurvatureError, match="batch 1: expected a finite loss, got nan"):
        make_trainer(tmp_path, model, pruner, max_steps=1).train()
    assert_same(model, before)


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_while_saving_leaves_the_checkpoint_before_whole(tmp_path):
    def new():
        pruner = HessianPruner(config(implant_ratio=0.5), step=3)
        return make_trainer(tmp_path, tiny_model(), pruner, save_strategy="steps", save_steps=2, max_steps=8)

    new().train()
    whole = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-8")
    for folder in ("checkpoint-6", "checkpoint-8"):
        for file in (tmp_path / folder).iterdir():
            file.unlink()
        (tmp_path / folder).rmdir()
    save = torch.save

    def filling_up(value, file, *args, **kwargs):
        return full_disk() if "checkpoint-6" in str(file) else save(value, file, *args, **kwargs)

    with mock.patch.object(torch, "save", filling_up), pytest.raises(OSError, match="No space left"):
        new().train()
    with pytest.raises(ConfigError, match=r"checkpoint-6' is not complete.*checkpoint-4'\)"):
        new().train(resume_from_checkpoint=True)
    resumed = new()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(resumed.model, whole)


def test_a_report_that_cannot_be_written_does_not_cost_the_training(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Path, "write_text", full_disk)
    pruner = HessianPruner(config(), step=1)
    trainer = make_trainer(tmp_path, tiny_model(), pruner, max_steps=2)
    with caplog.at_level(logging.WARNING, logger="hap_hf"):
        trainer.train()
    assert "could not be written" in caplog.text
    assert "No space left on device" in caplog.text
    assert trainer.state.global_step == 2
    assert len(pruner.reports) == 1


def test_scoring_through_the_callback_goes_on_in_smaller_batches(tmp_path, monkeypatch, caplog):
    loss = Trainer.compute_loss

    def short(self, model, inputs, *args, **kwargs):
        if not model.training and len(inputs["labels"]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "compute_loss", short)
    pruner = HessianPruner(config())
    trainer = make_trainer(tmp_path, tiny_model(), pruner, max_steps=1)
    with caplog.at_level(logging.WARNING, logger="hap_hf"):
        trainer.train()
    assert "out of memory while scoring a batch of 8 samples; starting anew with at most 4 a batch" in caplog.text
    report = pruner.reports[0]
    assert report.plan.provenance[-1]["num_batches"] == 4
    monkeypatch.undo()
    model, halves = tiny_model(), []
    for batch in hap_hf.trainer.scoring_batches(samples(), trainer.data_collator, 8, config()):
        halves += [{k: v[rows] for k, v in batch.items()} for rows in (slice(4), slice(4, 8))]
    expected = prune(model, halves, config(max_batches=4))
    assert report.threshold == expected.threshold
    assert [g.actions for g in report.plan] == [g.actions for g in expected.plan]
