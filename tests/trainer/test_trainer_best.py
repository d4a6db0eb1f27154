"""What trainings remember and repeat: best models, early stopping, further train() calls, searches."""

import copy
import itertools
import sys
import types

import pytest
import torch
import transformers as hf
from trainings import assert_same, config, make_trainer, samples, tiny_model
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_utils import BestRun, HPSearchBackend

from hap_hf import HessianPruner, plan_of

SEARCHING = {
    "save_strategy": "steps",
    "eval_strategy": "steps",
    "save_steps": 2,
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "score",
    "greater_is_better": False,
}
"""Looks for the model with the lowest score after every second step."""


def searching(tmp_path, scores, *callbacks, **settings):
    """Return a trainer whose evaluations find the given scores, lower being better."""
    values = iter(scores)
    return make_trainer(
        tmp_path,
        tiny_model(),
        HessianPruner(config(), step=3),
        *callbacks,
        eval_dataset=samples(8),
        compute_metrics=lambda prediction: {"score": next(values)},
        **{**SEARCHING, **settings},
    )


def test_a_better_score_from_before_pruning_does_not_win(tmp_path):
    trainer = searching(tmp_path, [0.1, 5.0, 4.0, 6.0], max_steps=8)
    trainer.train()
    assert trainer.state.best_metric == 4.0
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-6")
    assert_same(trainer.model, hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-6"))
    assert trainer.model.num_parameters() < tiny_model().num_parameters()


def test_a_checkpoint_from_before_pruning_is_not_found_again_when_no_later_score_is_a_number(tmp_path):
    nan = float("nan")
    trainer = searching(tmp_path, [0.1, nan, nan, nan], max_steps=8)
    trainer.train()
    assert trainer.state.best_model_checkpoint is None
    assert trainer.model.num_parameters() < tiny_model().num_parameters()


def test_a_resumed_search_forgets_what_was_best_before_the_round_too(tmp_path):
    searching(tmp_path, [0.1, 5.0, 4.0, 6.0], max_steps=8).train()
    resumed = searching(tmp_path, [5.0, 4.0, 6.0], max_steps=8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.best_model_checkpoint == str(tmp_path / "checkpoint-6")


def test_only_pruned_checkpoints_are_left_when_few_are_kept(tmp_path):
    trainer = searching(tmp_path, [0.1, 5.0, 4.0, 6.0, 7.0], max_steps=10, save_total_limit=2)
    trainer.train()
    assert sorted(f.name for f in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-6"]
    for folder in tmp_path.glob("checkpoint-*"):
        model = hf.AutoModelForSequenceClassification.from_pretrained(folder)
        assert model.num_parameters() == trainer.model.num_parameters()


def test_early_stopping_does_not_count_that_the_pruned_model_is_worse_than_the_dense_one(tmp_path):
    stopping = EarlyStoppingCallback(early_stopping_patience=1)
    trainer = searching(tmp_path, [0.1, 5.0, 4.0, 3.0], stopping, max_steps=8)
    trainer.train()
    assert trainer.state.global_step == 8
    assert stopping.early_stopping_patience_counter == 0


def test_early_stopping_still_stops_when_the_pruned_model_gets_no_better(tmp_path):
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = searching(tmp_path, [0.1, 5.0, 6.0, 7.0, 8.0, 9.0], stopping, max_steps=12)
    trainer.train()
    assert trainer.state.global_step == 8
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")


def test_no_patience_is_carried_over_a_round(tmp_path):
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = searching(tmp_path, [5.0, 4.0, 3.0], stopping, max_steps=6)
    trainer.callback_handler.callbacks[-2].early_stopping_patience_counter = 1
    stopping.early_stopping_patience_counter = 1
    trainer.train()
    assert trainer.state.global_step == 6


def test_the_learning_rate_does_not_fall_because_the_pruned_model_is_worse(tmp_path):
    rates = []

    class Watch(hf.TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            rates.append(optimizer.param_groups[0]["lr"])

    settings = {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "mode": "min", "factor": 0.5},
    }
    searching(tmp_path, [0.1, 5.0, 4.0, 3.0, 9.0, 9.0], Watch(), max_steps=11, **settings).train()
    assert rates[:8] == [1e-3] * 8
    assert rates[-1] == 0.5e-3  # a negative control: at step 10 the pruned model is worse than itself at step 8


def test_a_further_train_call_does_not_repeat_the_rounds(tmp_path):
    pruner = HessianPruner(config(), step=2)
    trainer = make_trainer(tmp_path, tiny_model(), pruner, max_steps=3)
    trainer.train()
    plan, size = plan_of(trainer.model), trainer.model.num_parameters()
    before = copy.deepcopy(trainer.model)
    trainer.train()
    assert plan_of(trainer.model) == plan
    assert trainer.model.num_parameters() == size
    assert len(pruner.reports) == 1
    assert not torch.equal(trainer.model.classifier.weight, before.classifier.weight)


def test_a_further_training_may_be_shorter_than_the_schedule_of_rounds_already_done(tmp_path):
    pruner = HessianPruner(config(), step=3)
    trainer = make_trainer(tmp_path, tiny_model(), pruner, max_steps=4)
    trainer.train()
    make_trainer(tmp_path, trainer.model, pruner, max_steps=1).train()
    assert len(pruner.reports) == 1


def test_a_further_train_call_does_the_rounds_that_are_left(tmp_path):
    class StopOnce(hf.TrainerCallback):
        stopped = False

        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop |= state.global_step == 2 and not self.stopped
            self.stopped |= control.should_training_stop

    pruner = HessianPruner(config(prune_ratio=0.6), step=1, num_rounds=2, interval=2)
    trainer = make_trainer(tmp_path, tiny_model(), pruner, StopOnce(), max_steps=4)
    trainer.train()
    assert len(pruner.reports) == 1
    trainer.train()
    assert len(pruner.reports) == 2
    removed = [sum(g.removed for g in r.groups) for r in pruner.reports]
    assert removed == [int(0.3 * 56), int(0.6 * 56) - int(0.3 * 56)]


def test_a_new_callback_prunes_the_pruned_model_further(tmp_path):
    trainer = make_trainer(tmp_path, tiny_model(), HessianPruner(config()), max_steps=1)
    trainer.train()
    size = trainer.model.num_parameters()
    make_trainer(tmp_path, trainer.model, HessianPruner(config()), max_steps=1).train()
    assert trainer.model.num_parameters() < size
    assert len(plan_of(trainer.model).stages) == 2


def test_the_same_callback_prunes_another_model_from_the_beginning(tmp_path):
    pruner = HessianPruner(config())
    models = []
    for _ in range(2):
        trainer = make_trainer(tmp_path, tiny_model(), pruner, max_steps=1)
        trainer.train()
        models.append(trainer.model)
    assert_same(*models)
    assert len(pruner.reports) == 1


def test_every_model_of_model_init_is_pruned(tmp_path):
    pruner = HessianPruner(config(), step=2)
    trainer = make_trainer(tmp_path, None, pruner, model_init=tiny_model, max_steps=3)
    models = []
    for _ in range(3):
        trainer.train()
        models.append(trainer.model)
        assert len(pruner.reports) == 1
    assert_same(models[0], models[2])
    assert models[0] is not models[2]
    assert models[0].num_parameters() < tiny_model().num_parameters()


def test_every_trial_of_a_search_is_pruned_once(tmp_path, monkeypatch):
    sizes = []

    class Trial(dict):
        number = 0
        params = {"learning_rate": 1e-3}  # noqa: RUF012

    class Backend:
        """What transformers asks of a library for searches."""

        name = "optuna"

        def ensure_available(self):
            """Nothing to install."""

        def run(self, trainer, n_trials, direction, **kwargs):
            for number in range(n_trials):
                trial = Trial()
                trial.number = number
                trainer.train(resume_from_checkpoint=None, trial=trial)
                sizes.append(trainer.model.num_parameters())
            return BestRun("0", 0.0, Trial.params)

    monkeypatch.setitem(sys.modules, "optuna", types.ModuleType("optuna"))
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    monkeypatch.setitem(hf.trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Backend)
    pruner = HessianPruner(config(), step=1)
    trainer = make_trainer(
        tmp_path, None, pruner, model_init=tiny_model, max_steps=2, save_strategy="steps", save_steps=2
    )
    trainer.hyperparameter_search(hp_space=lambda trial: trial.params, n_trials=3, backend="optuna")
    assert len(set(sizes)) == 1
    assert sizes[0] < tiny_model().num_parameters()
    assert len(pruner.reports) == 1
    for number in range(3):
        saved = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / f"run-{number}" / "checkpoint-2")
        assert saved.num_parameters() == sizes[number]


def test_evaluating_and_predicting_between_rounds_show_the_model_as_it_is(tmp_path):
    data, seen = samples(12), []

    class Look(hf.TrainerCallback):
        trainer = None

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step in {2, 4}:
                loss = self.trainer.evaluate()["eval_loss"]
                logits = self.trainer.predict(data).predictions
                twin = make_trainer(tmp_path / "twin", copy.deepcopy(model), eval_dataset=data)
                assert loss == twin.evaluate()["eval_loss"]
                assert torch.equal(torch.tensor(logits), torch.tensor(twin.predict(data).predictions))
                seen.append(model.num_parameters())

    look = Look()
    pruner = HessianPruner(config(prune_ratio=0.6), step=1, num_rounds=2, interval=2)
    trainer = make_trainer(tmp_path, tiny_model(), pruner, look, max_steps=5, eval_dataset=data)
    look.trainer = trainer
    trainer.train()
    assert len(pruner.reports) == 2
    assert tiny_model().num_parameters() > seen[0] > seen[1] == trainer.model.num_parameters()


def test_a_training_that_starts_anew_with_smaller_batches_is_not_pruned_twice(tmp_path):
    class Short(Trainer):
        """Runs out of memory at the third training step of batches of 8, after pruning."""

        steps = itertools.count(1)

        def training_step(self, model, inputs, *args, **kwargs):
            if next(self.steps) == 3 and len(inputs["labels"]) > 4:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    pruner = HessianPruner(config(), step=2)
    trainer = make_trainer(tmp_path, tiny_model(), pruner, kind=Short, auto_find_batch_size=True, max_steps=6)
    trainer.train()
    assert trainer._train_batch_size < 8
    assert len(pruner.reports) == 1
    assert len(plan_of(trainer.model).stages) == 1


@pytest.mark.parametrize("best", [True, False])
def test_forgetting_is_what_these_tests_are_about(tmp_path, monkeypatch, best):
    if not best:
        monkeypatch.setattr("hap_hf.trainer.callback.forget_best_", lambda *args: None)
    trainer = searching(tmp_path, [0.1, 5.0], EarlyStoppingCallback(early_stopping_patience=1), max_steps=8)
    if best:
        with pytest.raises(StopIteration):
            trainer.train()
    else:  # stops at the first evaluation of the pruned model, and loads the dense one into it
        with pytest.raises(RuntimeError, match="size mismatch"):
            trainer.train()
