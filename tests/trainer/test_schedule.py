"""Schedules: shares of the training, the cubic ramp, and learning rates that begin anew after a cut."""

import pytest
import torch
import transformers as hf
from trainings import assert_same, config, make_trainer, samples, tiny_bert, tiny_model
from transformers import get_scheduler

from hap_hf import ConfigError, HessianPruner
from hap_hf.selection import Ramp, Round
from hap_hf.trainer.schedule import future_rates, position, rewind_, steps_of


def test_steps_may_be_shares_of_the_training(tmp_path):
    shares = HessianPruner(config(method="magnitude"), step=0.2, num_rounds=3, interval=0.25)
    steps = HessianPruner(config(method="magnitude"), step=2, num_rounds=3, interval=3)
    trainers = []
    for pruner in (shares, steps):
        trainers.append(make_trainer(tmp_path, tiny_model(), pruner, max_steps=10))
        trainers[-1].train()
    rounds = [[e["step"] for e in t.state.log_history if "prune_params" in e] for t in trainers]
    assert rounds == [[2, 5, 8]] * 2
    assert_same(trainers[0].model, trainers[1].model)
    assert [steps_of("step", 0.3, n) for n in (10, 11, 1)] == [3, 4, 1]  # rounded up, as save_steps is


@pytest.mark.parametrize("wrong", [0.0, 1.0, -1, 0, True, 1.5, float("nan"), "2"])
def test_what_is_neither_a_number_of_steps_nor_a_share_is_refused(wrong):
    with pytest.raises(ConfigError, match="step must be an integer of at least 1, or a share of the training"):
        HessianPruner(config(), step=wrong)


def test_a_cubic_ramp_takes_most_at_first_and_ends_at_the_target(tmp_path):
    assert [Round(i, 4, ramp=Ramp.CUBIC).share for i in range(1, 5)] == [37 / 64, 56 / 64, 63 / 64, 1]
    assert [Round(i, 4).share for i in range(1, 5)] == [0.25, 0.5, 0.75, 1]
    kept = {}
    for ramp in Ramp:
        pruner = HessianPruner(config(method="magnitude", target_params=0.4), step=1, num_rounds=3, ramp=ramp.value)
        make_trainer(tmp_path, tiny_model(), pruner, max_steps=4).train()
        whole = pruner.reports[0].prunable_before.params
        kept[ramp] = [report.prunable_after.params / whole for report in pruner.reports]
    for ramp, expected in ((Ramp.LINEAR, (0.8, 0.6, 0.4)), (Ramp.CUBIC, (1 - 0.6 * 19 / 27, 1 - 0.6 * 26 / 27, 0.4))):
        assert kept[ramp] == pytest.approx(expected, abs=0.05)
    with pytest.raises(ConfigError, match="ramp must be one of"):
        HessianPruner(config(), ramp="square")


def test_a_round_with_nothing_left_to_do_is_left_out_and_the_training_goes_on(tmp_path, caplog):
    def train(folder=None, **changes):
        # Whole heads go, so that the first round is beyond what the second one asks for.
        asked = config(**{"method": "magnitude", "kinds": "heads", "target_params": 0.6, **changes})
        pruner = HessianPruner(asked, step=2, num_rounds=3, interval=2, ramp="cubic")
        settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1}
        trainer = make_trainer(tmp_path, tiny_bert(num_hidden_layers=1, num_attention_heads=2), pruner, **settings)
        trainer.train(resume_from_checkpoint=folder)
        return pruner, trainer.model

    pruner, whole = train()
    assert (len(pruner.reports), pruner.finished) == (1, True)
    assert [m.split(":")[0] for m in caplog.messages if "left out" in m] == [
        "round 2 of 3 is left out",
        "round 3 of 3 is left out",
    ]
    again, resumed = train(str(tmp_path / "checkpoint-5"))
    assert_same(resumed, whole)
    assert again.finished
    with pytest.raises(ConfigError, match="cannot be reached"):  # the first one is asked for
        train(target_params=0.999, max_group_ratio=0.1)


def test_the_schedule_runs_once_from_beginning_to_end_after_each_cut():
    found = [position(step, [4, 6], 10) for step in range(12)]
    assert found == pytest.approx([0, 1, 2, 3, 0, 5, 0, 2.5, 5, 7.5, 10, 10])
    assert [position(step, [0], 10) for step in range(11)] == list(range(11))


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup", "polynomial"])
def test_rates_are_those_of_the_schedule_at_its_other_steps(kind):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    plain = get_scheduler(kind, optimizer, num_warmup_steps=2, num_training_steps=12)
    rates = future_rates(plain, optimizer, 0, 13)
    rewind_(plain, [6], 12)
    rewind_(plain, [6], 12)  # once and for all
    found = future_rates(plain, optimizer, 0, 13)
    assert found == [*rates[:6], *rates[::2]]


def test_the_training_uses_the_rates_and_goes_on_with_them_when_resumed(tmp_path):
    def train(folder=None, **changes):
        pruner = HessianPruner(config(method="magnitude"), step=3, num_rounds=2, interval=3, rewind=True)
        settings = {"max_steps": 9, "save_strategy": "steps", "save_steps": 1, **changes}
        trainer = make_trainer(tmp_path, tiny_model(), pruner, **settings)
        trainer.train(resume_from_checkpoint=folder)
        return trainer

    whole = train()
    rates = {e["step"]: e["learning_rate"] for e in whole.state.log_history if "learning_rate" in e}
    # Linear from 1e-3 to 0 in nine steps; after the cuts, in three.
    expected = dict(enumerate((1, 8 / 9, 7 / 9, 1, 2 / 3, 1 / 3, 1, 2 / 3, 1 / 3), 1))
    assert {4, 5, 7, 8, 9} <= rates.keys()
    assert rates == pytest.approx({step: 1e-3 * expected[step] for step in rates})
    for step in (2, 3, 7):
        assert_same(train(str(tmp_path / f"checkpoint-{step}")).model, whole.model)
    with pytest.raises(ConfigError, match="needs a schedule that depends on the step alone"):
        train(lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_dataset=samples(8))


def test_epochs_are_counted_in_steps(tmp_path):
    pruner = HessianPruner(config(method="magnitude"), epoch=1, rewind=True)
    trainer = make_trainer(tmp_path, tiny_model(), pruner, num_train_epochs=2, gradient_accumulation_steps=2)
    trainer.train()
    rates = {e["step"]: e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e}
    assert rates == pytest.approx({s: 1e-3 * x for s, x in enumerate((1, 5 / 6, 4 / 6, 1, 2 / 3, 1 / 3), 1)})

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(samples())

    endless = make_trainer(tmp_path, tiny_model(), HessianPruner(config(), epoch=1, rewind=True), data=Stream(),
                           max_steps=4)  # fmt: skip
    with pytest.raises(ConfigError, match="give the rounds in steps"):
        endless.train()
    assert isinstance(endless.args, hf.TrainingArguments)
