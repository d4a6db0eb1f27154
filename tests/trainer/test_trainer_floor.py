"""The smallest model above a floor, judged by the Trainer's own evaluation."""

import numpy as np
import pytest
import torch
from trainings import assert_same, config, make_trainer, samples, tiny_model

from hap_hf import ConfigError, Floor, HessianPruner, prune_to_floor

SETTINGS = {"method": "magnitude", "target_params": 0.2, "prune_ratio": None}


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def as_the_dense_model_says():
    """Return samples with the labels that the dense model gives, so that it is right each time."""
    rows, model = samples(48), tiny_model().eval()
    with torch.no_grad():
        for row in rows:
            row["labels"] = model(**{k: v[None] for k, v in row.items() if k != "labels"}).logits.argmax(-1)[0]
    return rows


def trainer_with(tmp_path, floor, **more):
    how = {"eval_dataset": as_the_dense_model_says(), "compute_metrics": accuracy, **more}
    pruner = HessianPruner(config(**SETTINGS), floor=floor, batches=[collated(samples()[:8])])
    return make_trainer(tmp_path, tiny_model(), pruner, **{"max_steps": 2, "learning_rate": 0.0, **how}), pruner


def collated(rows):
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


def right(model):
    batch = collated(as_the_dense_model_says())
    labels = batch.pop("labels")
    with torch.no_grad():
        return float((model.eval()(**batch).logits.argmax(-1) == labels).double().mean())


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.9])
def test_it_is_the_search_without_a_trainer_with_its_evaluation(drop, tmp_path):
    trainer, pruner = trainer_with(tmp_path, Floor(drop=drop, num_trials=4))
    trainer.train()
    model = tiny_model()
    found = prune_to_floor(model, [collated(samples()[:8])], right, config(**SETTINGS), drop=drop, num_trials=4)
    assert_same(trainer.model, model)
    assert right(trainer.model) >= 1 - drop
    assert pruner.reports[0].plan == found.report.plan
    assert trainer.model.num_parameters() < tiny_model().num_parameters()
    assert len(pruner.reports) == 1


def test_more_may_go_under_a_lower_floor(tmp_path):
    sizes = []
    for drop in (0.0, 0.9):
        trainer, _ = trainer_with(tmp_path, drop)
        trainer.train()
        sizes.append(trainer.model.num_parameters())
    assert sizes[1] < sizes[0]


def test_losses_should_be_low_and_need_no_metric(tmp_path):
    trainer, _ = trainer_with(tmp_path, {"metric": "loss", "drop": 0.05, "num_trials": 4}, compute_metrics=None)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] <= before + 0.05
    assert trainer.model.num_parameters() < tiny_model().num_parameters()


def test_the_training_goes_on_and_is_resumed(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 1e-2}
    whole, _ = trainer_with(tmp_path, 0.1, **saving)
    whole.train()
    again, pruner = trainer_with(tmp_path, 0.1, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(again.model, whole.model)
    assert pruner.floor == Floor(drop=0.1)


def test_no_amount_that_is_good_enough_is_told_before_the_first_step(tmp_path):
    calls = iter(np.linspace(1, 0, 50))
    trainer, pruner = trainer_with(tmp_path, 0.0, compute_metrics=lambda prediction: {"accuracy": next(calls)})
    before = {name: t.clone() for name, t in trainer.model.state_dict().items()}
    with pytest.raises(ConfigError, match="no amount is good enough"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not pruner.reports
    assert all(torch.equal(t, before[name]) for name, t in trainer.model.state_dict().items())


@pytest.mark.parametrize(
    ("floor", "more", "message"),
    [
        (0.1, {"eval_dataset": None, "eval_strategy": "no"}, "eval_dataset, which is missing"),
        (0.1, {"eval_dataset": {"a": as_the_dense_model_says()}}, "a mapping of several"),
        (0.1, {"compute_metrics": None}, r"the Trainer has no compute_metrics; pass one, or use Floor\(metric='loss'"),
        (Floor(metric="f1"), {}, r"looks for the metric 'eval_f1', and the evaluation has \['eval_accuracy'"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_the_first_step(floor, more, message, tmp_path):
    trainer, pruner = trainer_with(tmp_path, floor, **more)
    with pytest.raises(ConfigError, match=message):
        trainer.train()
    assert not pruner.reports
    assert trainer.model.num_parameters() == tiny_model().num_parameters()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"floor": -0.1}, "drop must be a finite number of at least 0"),
        ({"floor": True}, "drop must be a finite number"),
        ({"floor": {"drops": 0.1}}, "Floor has no setting 'drops'; did you mean 'drop'"),
        ({"floor": {"num_trials": 0}}, "num_trials"),
        ({"floor": 0.1, "num_rounds": 2}, "num_rounds asks for something else"),
        ({"floor": 0.1, "step": 2, "regularise": {}}, "regularise asks for something else"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        HessianPruner(config(**SETTINGS), **given)
    with pytest.raises(ConfigError, match="implant_ratio=0"):
        HessianPruner(config(**SETTINGS, implant_ratio=0.2), floor=0.1)
