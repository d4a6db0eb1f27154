"""Resuming: killed trainings end as if nothing had happened, and what cannot go on says what to call instead."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from killed_trainings import LAST_CHECKPOINTS, new_pruner, new_trainer
from torch import nn
from trainings import assert_same, config, make_trainer, samples, tiny_model

from hap_hf import ConfigError, HessianPruner, plan_of, prune
from hap_hf.config import HapConfig
from hap_hf.trainer.progress import progress_from_dict, progress_to_dict

STEPS = {"save_strategy": "steps", "max_steps": 6}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Return the folder in which the killed trainings left their checkpoints."""
    folder = tmp_path_factory.mktemp("killed")
    tests = Path(__file__).parents[1] / "helpers"
    script, path = tests / "killed_trainings.py", os.pathsep.join([str(tests), str(tests.parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the trainer of a training that nothing interrupted, and its callback."""
    pruner = new_pruner()
    trainer = new_trainer(tmp_path_factory.mktemp("whole"), pruner)
    trainer.train()
    return trainer, pruner


def without_times(reports):
    return [{k: v for k, v in report.to_dict().items() if k != "seconds"} for report in reports]


@pytest.mark.parametrize("when", [w for w in LAST_CHECKPOINTS if w != "while saving"])
def test_a_killed_training_ends_with_the_same_plan_and_the_same_weights(killed, whole, when, tmp_path):
    folder = shutil.copytree(killed / when, tmp_path / "run")
    steps = sorted(int(f.name.partition("-")[2]) for f in folder.glob("checkpoint-*"))
    assert steps[-1] == LAST_CHECKPOINTS[when]
    pruner = new_pruner()
    resumed = new_trainer(folder, pruner)
    resumed.train(resume_from_checkpoint=True)
    trainer, uninterrupted = whole
    assert plan_of(resumed.model) == plan_of(trainer.model)
    assert_same(resumed.model, trainer.model)
    assert without_times(pruner.reports) == without_times(uninterrupted.reports)
    assert resumed.model.num_parameters() < tiny_model().num_parameters()


def test_a_report_that_was_being_written_is_the_old_one_and_whole(killed, whole):
    written = json.loads((killed / "while writing the report" / "pruning_report.json").read_text())
    del written["seconds"]
    assert written == without_times(whole[1].reports)[0]


def test_a_checkpoint_that_was_being_saved_is_refused_with_the_call_that_goes_on(killed, whole, tmp_path):
    folder = shutil.copytree(killed / "while saving", tmp_path / "run")
    model = tiny_model()
    before = copy.deepcopy(model)
    trainer = new_trainer(folder, model=model)
    with pytest.raises(ConfigError, match=r"checkpoint-8' is not complete: expected trainer_state\.json") as caught:
        trainer.train(resume_from_checkpoint=True)
    assert_same(model, before)
    exec(re.search(r"trainer\.train\(.*\)$", str(caught.value))[0])
    assert_same(model, whole[0].model)


def test_half_a_trainer_state_is_refused_too(whole, tmp_path):
    folder = shutil.copytree(whole[0].args.output_dir, tmp_path / "run")
    state = folder / "checkpoint-10" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    with pytest.raises(ConfigError, match=r"JSONDecodeError.*resume_from_checkpoint='.*checkpoint-8'"):
        new_trainer(folder).train(resume_from_checkpoint=True)


def test_with_no_whole_checkpoint_the_advice_is_to_start_anew(whole, tmp_path):
    shutil.copytree(Path(whole[0].args.output_dir) / "checkpoint-2", tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    with pytest.raises(ConfigError, match=r"FileNotFoundError; .* Then start anew"):
        new_trainer(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("step", [2, 4, 8])
def test_the_checkpoints_own_model_may_be_passed_as_well(whole, tmp_path, step):
    trainer, uninterrupted = whole
    checkpoint = Path(trainer.args.output_dir) / f"checkpoint-{step}"
    pruner = new_pruner()
    model = hf.AutoModelForSequenceClassification.from_pretrained(checkpoint)
    resumed = new_trainer(tmp_path, pruner, model=model)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same(resumed.model, trainer.model)
    assert without_times(pruner.reports) == without_times(uninterrupted.reports)


def test_a_model_of_an_earlier_round_is_pruned_like_the_checkpoints(whole, tmp_path):
    folder = Path(whole[0].args.output_dir)
    model = hf.AutoModelForSequenceClassification.from_pretrained(folder / "checkpoint-4")
    resumed = new_trainer(tmp_path, model=model)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-8"))
    assert_same(resumed.model, whole[0].model)
    assert plan_of(resumed.model) == plan_of(whole[0].model)


def test_sharded_checkpoints_are_resumed(whole, tmp_path, monkeypatch):
    save = hf.BertForSequenceClassification.save_pretrained
    monkeypatch.setattr(
        hf.BertForSequenceClassification, "save_pretrained", lambda *a, **k: save(*a, **k, max_shard_size="4KB")
    )
    new_trainer(tmp_path).train()
    assert (tmp_path / "checkpoint-8" / "model.safetensors.index.json").is_file()
    resumed = new_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert_same(resumed.model, whole[0].model)


def test_an_optimizer_of_the_users_own_follows_the_rebuilt_model(tmp_path):
    def new():
        model = tiny_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
        return new_trainer(tmp_path, model=model, optimizers=(optimizer, None))

    whole, resumed = new(), new()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert_same(resumed.model, whole.model)


def test_a_model_from_model_init_is_rebuilt(tmp_path):
    settings = {"model_init": tiny_model, "max_steps": 10, "save_strategy": "steps", "save_steps": 2}
    whole, resumed = (make_trainer(tmp_path, None, new_pruner(), **settings) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert_same(resumed.model, whole.model)


class Plain(nn.Module):
    """A model without a config: only the callback's state can say how it was pruned."""

    def __init__(self):
        super().__init__()
        self.bert = tiny_model()

    def forward(self, input_ids, attention_mask, labels=None):
        logits = self.bert(input_ids=input_ids, attention_mask=attention_mask).logits
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("step", [2, 4, 8])
def test_a_model_without_a_config_is_rebuilt_from_the_callbacks_state(tmp_path, step):
    whole, resumed = new_trainer(tmp_path / "a", model=Plain()), new_trainer(tmp_path / "b", model=Plain())
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
    assert_same(resumed.model, whole.model)
    assert sum(p.numel() for p in resumed.model.parameters()) < sum(p.numel() for p in Plain().parameters())


def test_a_checkpoint_from_before_a_round_is_never_loaded_into_the_pruned_model(tmp_path):
    trainer = new_trainer(tmp_path)
    trainer.train()
    before = copy.deepcopy(trainer.model)
    with pytest.raises(ConfigError, match="pruned 1 times, and the Trainer's was pruned 2 times") as caught:
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(trainer.model, before)
    names = {"BertForSequenceClassification": hf.BertForSequenceClassification}
    exec(re.search(r"model = .*$", str(caught.value))[0], names)
    again = new_trainer(tmp_path, model=names["model"])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(again.model, before)


def test_a_model_that_was_pruned_otherwise_is_refused_unchanged(whole, tmp_path):
    model = tiny_model()
    prune(model, [hf.default_data_collator(samples()[:8])], config(prune_ratio=0.2))
    before = copy.deepcopy(model)
    with pytest.raises(ConfigError, match=r"and otherwise.*model = BertForSequenceClassification\.from_pretrained\("):
        new_trainer(tmp_path, model=model).train(
            resume_from_checkpoint=str(Path(whole[0].args.output_dir) / "checkpoint-4")
        )
    assert_same(model, before)


def test_a_wrapped_model_is_not_rebuilt_behind_its_wrapper(whole, tmp_path):
    trainer = new_trainer(tmp_path)
    before = copy.deepcopy(trainer.model)
    checkpoint = str(Path(whole[0].args.output_dir) / "checkpoint-4")
    with pytest.raises(ConfigError, match=r"the Trainer has wrapped its own.*\.from_pretrained\("):
        trainer._load_from_checkpoint(checkpoint, nn.Sequential(trainer.model))
    assert_same(trainer.model, before)


def test_ctrl_c_while_rebuilding_leaves_model_and_optimizer_as_they_were(whole, tmp_path, monkeypatch):
    model = tiny_model()
    before, optimizer = copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=1e-2)
    trainer = new_trainer(tmp_path, model=model, optimizers=(optimizer, None))

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("hap_hf.trainer.rebuilding.record_plan", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=str(Path(whole[0].args.output_dir) / "checkpoint-8"))
    assert_same(model, before)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]


def test_a_round_that_came_after_the_last_save_of_an_epoch_is_caught_up_with(tmp_path):
    def new():
        pruner = HessianPruner(config(implant_ratio=0.5), epoch=1)
        return make_trainer(tmp_path, tiny_model(), pruner, save_strategy="steps", save_steps=6, num_train_epochs=2)

    whole, resumed = new(), new()
    size = resumed.model.num_parameters()
    whole.train()
    checkpoint = tmp_path / "checkpoint-6"
    assert hf.AutoModelForSequenceClassification.from_pretrained(checkpoint).num_parameters() == size
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert plan_of(resumed.model) == plan_of(whole.model)
    assert_same(resumed.model, whole.model)


@pytest.mark.parametrize("schedule", [{}, {"step": 1}, {"step": 5}])
def test_a_callback_may_join_a_training_that_began_without_it(tmp_path, schedule):
    make_trainer(tmp_path, tiny_model(), save_steps=1, **STEPS).train()
    pruner = HessianPruner(config(), **schedule)
    joined = make_trainer(tmp_path, tiny_model(), pruner, save_steps=1, **STEPS)
    joined.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert len(pruner.reports) == 1
    assert [e["step"] for e in joined.state.log_history if "prune_params" in e] == [max(3, schedule.get("step", 0))]
    again = HessianPruner(config(), **schedule)
    make_trainer(tmp_path, tiny_model(), again, save_steps=1, **STEPS).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-5")
    )
    assert len(again.reports) == 1


def test_callbacks_restored_by_the_trainer_go_on_too(whole, tmp_path):
    resumed = new_trainer(tmp_path, HessianPruner(config()), restore_callback_states_from_checkpoint=True)
    resumed.train(resume_from_checkpoint=str(Path(whole[0].args.output_dir) / "checkpoint-6"))
    assert_same(resumed.model, whole[0].model)
    (restored,) = [c for c in resumed.callback_handler.callbacks if isinstance(c, HessianPruner)]
    assert without_times(restored.reports) == without_times(whole[1].reports)


@pytest.mark.parametrize("restored", [True, False])
def test_rounds_are_not_continued_without_the_loss_that_they_began_with(tmp_path, restored):
    def pruner(**given):
        return HessianPruner(config(), step=2, num_rounds=2, interval=2, **given)

    new_trainer(tmp_path, pruner(loss_fn=lambda model, batch: model(**batch).loss), save_steps=3, max_steps=6).train()
    given = {"loss_fn": lambda model, batch: model(**batch).loss} if restored else {}
    trainer = new_trainer(
        tmp_path, pruner(**given), max_steps=6, restore_callback_states_from_checkpoint=restored, save_steps=3
    )
    with pytest.raises(ConfigError, match="done with loss_fn, which no checkpoint carries"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_two_callbacks_in_one_training_go_on_with_their_own_rounds(tmp_path):
    def new():
        heads = HessianPruner(config(kinds="heads"), step=2)
        ffn = HessianPruner(config(kinds="ffn", prune_ratio=0.5), step=3, num_rounds=2, interval=2)
        return [heads, ffn], make_trainer(tmp_path, tiny_model(), heads, ffn, save_steps=1, **STEPS)

    pruners, whole = new()
    whole.train()
    for step in (2, 4):
        resumed_pruners, resumed = new()
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same(resumed.model, whole.model)
        for pruner, resumed_pruner in zip(pruners, resumed_pruners, strict=True):
            assert without_times(resumed_pruner.reports) == without_times(pruner.reports)


def test_reports_survive_json(whole):
    reports = whole[1].reports
    values = json.loads(json.dumps(progress_to_dict(reports, whole[1]._start)))
    assert progress_from_dict(values) == (reports, whole[1]._start)


def test_the_state_makes_an_equal_callback(whole):
    pruner = whole[1]
    twin = HessianPruner.from_state(json.loads(json.dumps(pruner.state())))
    assert isinstance(twin.config, HapConfig)
    assert twin.state() == json.loads(json.dumps(pruner.state()))
    assert twin.reports == pruner.reports
