"""The callback: it equals the pipeline by hand, keeps training alive, and refuses what it cannot do."""

import copy
import json
import logging

import pytest
import torch
import transformers as hf
from torch import nn
from trainings import assert_same, config, make_trainer, samples, tiny_model
from transformers import Trainer

from hap_hf import ConfigError, HessianPruner, UnsupportedModelError, plan_of, prune
from hap_hf.errors import BatchError
from hap_hf.trainer import scoring_batches, trainer_loss

pytestmark = pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning", "ignore:.*pin_memory.*:UserWarning")


def by_hand(trainer, model, settings, optimizer=None):
    batches = scoring_batches(trainer.train_dataset, trainer.data_collator, 8, settings)
    return prune(model, batches, settings, loss_fn=trainer_loss(trainer), optimizer=optimizer)


@pytest.mark.parametrize("settings", [{}, {"implant_ratio": 0.5}, {"target_params": 0.6}], ids=str)
def test_pruning_at_train_begin_equals_the_pipeline_by_hand(tmp_path, settings):
    settings = config(**settings)
    called = make_trainer(tmp_path / "a", tiny_model(), HessianPruner(settings))
    called.train()

    model = tiny_model()
    trainer = make_trainer(tmp_path / "b", model, None)
    by_hand(trainer, model, settings)
    trainer.train()
    assert_same(called.model, model)
    assert called.model.num_parameters() < tiny_model().num_parameters()


class PruneByHand(hf.TrainerCallback):
    """What a user would write without the callback."""

    def __init__(self, step, settings):
        self.step, self.settings, self.trainer = step, settings, None

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == self.step:
            by_hand(self.trainer, model, self.settings, optimizer.optimizer)


@pytest.mark.parametrize(("when", "step"), [({"step": 4}, 4), ({"epoch": 1}, 6)])
def test_pruning_later_equals_the_pipeline_by_hand_at_the_same_step(tmp_path, when, step):
    settings = config(implant_ratio=0.5)
    called = make_trainer(tmp_path / "a", tiny_model(), HessianPruner(settings, **when))
    called.train()

    hand = PruneByHand(step, settings)
    trainer = make_trainer(tmp_path / "b", tiny_model(), hand)
    hand.trainer = trainer
    trainer.train()
    assert_same(called.model, trainer.model)


def test_the_training_order_is_not_changed_by_scoring(tmp_path):
    seen = {True: [], False: []}
    for pruned, order in seen.items():

        class Watching(Trainer):
            def training_step(self, model, inputs, *args, order=order, **kwargs):
                order.append(inputs["input_ids"].clone())
                return super().training_step(model, inputs, *args, **kwargs)

        trainer = make_trainer(tmp_path, tiny_model(), HessianPruner(config(), step=2) if pruned else None)
        trainer.__class__ = Watching
        trainer.train()
    assert len(seen[True]) == 18
    assert all(torch.equal(a, b) for a, b in zip(seen[True], seen[False], strict=True))


def test_every_tensor_still_moves_after_pruning(tmp_path):
    before = {}

    class Remember(hf.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                before.update({n: p.detach().clone() for n, p in model.named_parameters()})

    pruner = HessianPruner(config(implant_ratio=0.5), step=4)
    trainer = make_trainer(tmp_path, tiny_model(), pruner)
    trainer.add_callback(Remember())
    trainer.train()
    assert any("implant_up" in n for n in before)
    frozen = [n for n, p in trainer.model.named_parameters() if torch.equal(p, before[n])]
    # The key bias cannot move: softmax does not see it. Unused position embeddings have no gradient.
    assert not [n for n in frozen if "implant" in n or "dense" in n]


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)])
def test_optimizer_state_is_cut_with_the_parameters(tmp_path, optimizer):
    model = tiny_model()
    mine = optimizer(model.parameters(), lr=1e-3)
    trainer = make_trainer(tmp_path, model, HessianPruner(config(), step=6), optimizers=(mine, None), max_steps=8)
    trainer.train()
    held = {id(p) for g in mine.param_groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert set(mine.state) <= set(model.parameters())
    for p, state in mine.state.items():
        assert all(v.shape == p.shape for v in state.values() if isinstance(v, torch.Tensor) and v.dim())


def test_rounds_rise_to_the_target_and_each_is_scored_anew(tmp_path):
    pruner = HessianPruner(config(prune_ratio=0.6), epoch=1, num_rounds=2)
    trainer = make_trainer(tmp_path, tiny_model(), pruner)
    trainer.train()
    units = 2 * 4 + 2 * 24
    removed = [sum(g.units - g.kept - g.implanted for g in r.groups) for r in pruner.reports]
    assert removed == [int(0.3 * units), int(0.6 * units) - int(0.3 * units)]
    assert len(plan_of(trainer.model).stages) == 2
    for number, report in enumerate(pruner.reports, 1):
        written = json.loads((tmp_path / f"pruning_round_{number}" / "pruning_report.json").read_text())
        assert written == report.to_dict()
    reloaded = hf.AutoModelForSequenceClassification.from_pretrained(save(trainer, tmp_path))
    assert_same(reloaded, trainer.model)


def save(trainer, tmp_path):
    trainer.save_model(str(tmp_path / "saved"))
    return tmp_path / "saved"


def test_implants_come_in_the_last_round(tmp_path):
    pruner = HessianPruner(config(target_params=0.5, implant_ratio=0.4, per_cost=False), num_rounds=3)
    trainer = make_trainer(tmp_path, tiny_model(), pruner)
    trainer.train()
    implanted = [sum(g.implanted for g in r.groups) for r in pruner.reports]
    assert implanted[:2] == [0, 0]
    assert implanted[2] > 0
    kept = pruner.reports[-1].prunable_after.params / pruner.reports[0].prunable_before.params
    assert 0.5 - 0.02 <= kept <= 0.5 + 1e-9


class Spy:
    """A loss that counts how often it is asked, and smooths nothing."""

    def __init__(self):
        self.calls = 0

    def __call__(self, outputs, labels, num_items_in_batch=None):
        self.calls += 1
        return nn.functional.cross_entropy(outputs.logits, labels) + 0.01 * outputs.logits.square().mean()


def test_scores_use_compute_loss_func(tmp_path):
    spy = Spy()
    pruner = HessianPruner(config(method="hessian"))
    trainer = make_trainer(tmp_path, tiny_model(), pruner, compute_loss_func=spy, max_steps=1)
    trainer.train()
    # Two looks at the first batch, two batches before pruning, scored and after it, and one training step.
    assert spy.calls == 2 + 2 + 2 + 2 + 1


def test_label_smoothing_changes_the_scores(tmp_path):
    sensitivities = []
    for factor in (0.0, 0.2):
        pruner = HessianPruner(config(method="taylor"))  # smoothing leaves the second derivatives as they are
        make_trainer(tmp_path, tiny_model(), pruner, label_smoothing_factor=factor, max_steps=1).train()
        sensitivities.append(pruner.reports[0].threshold)
    assert sensitivities[0] != sensitivities[1]


def test_mixed_precision_of_the_training_does_not_reach_the_scores(tmp_path):
    thresholds = []
    for bf16 in (False, True):
        pruner = HessianPruner(config())
        trainer = make_trainer(tmp_path, tiny_model(), pruner, bf16=bf16, max_steps=1)
        trainer.train()
        thresholds.append(pruner.reports[0].threshold)
        assert ("_original_forward" in vars(trainer.model)) == bf16
    assert thresholds[0] == thresholds[1]


def test_given_batches_and_loss_are_used_instead_of_the_trainers(tmp_path):
    calls = []

    def loss(model, batch):
        calls.append(batch["input_ids"].shape[0])
        return model(**batch).loss

    batches = [{k: torch.stack([s[k] for s in samples()[:5]]) for k in samples()[0]}]
    pruner = HessianPruner(config(method="hessian"), batches=batches, loss_fn=loss)
    make_trainer(tmp_path, tiny_model(), pruner, max_steps=1).train()
    assert calls == [5] * 5  # two looks, the loss before, scoring, the loss after


def test_what_was_done_is_logged_and_written(tmp_path):
    pruner = HessianPruner(config(), step=2)
    trainer = make_trainer(tmp_path, tiny_model(), pruner, max_steps=4)
    trainer.train()
    entries = [e for e in trainer.state.log_history if "prune_params" in e]
    assert [(e["step"], e["prune_params"]) for e in entries] == [(2, trainer.model.num_parameters())]
    report = json.loads((tmp_path / "pruning_report.json").read_text())
    assert report == pruner.reports[0].to_dict()
    assert "| " in (tmp_path / "pruning_report.md").read_text()


@pytest.mark.fast
def test_checkpoints_saved_after_pruning_reload(tmp_path):
    trainer = make_trainer(
        tmp_path,
        tiny_model(),
        HessianPruner(config(implant_ratio=0.5), step=2),
        save_strategy="steps",
        save_steps=3,
        max_steps=6,
    )
    trainer.train()
    reloaded = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-6")
    assert_same(reloaded, trainer.model)
    assert hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-3").num_parameters() == (
        trainer.model.num_parameters()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": 2, "epoch": 1}, "at most one of step and epoch"),
        ({"step": 0}, "step must be an integer of at least 1, or a share of the training in .*, got 0"),
        ({"epoch": True}, "epoch must be an integer"),
        ({"num_rounds": 0}, "num_rounds must be"),
        ({"interval": 1.5}, "interval must be"),
    ],
)
def test_contradictory_schedules_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        HessianPruner(config(), **arguments)


@pytest.mark.parametrize(
    "when", [{"step": 19}, {"epoch": 4}, {"num_rounds": 5}, {"step": 10, "num_rounds": 2, "interval": 9}]
)
def test_a_round_behind_the_end_of_training_is_refused_before_it_starts(tmp_path, when):
    model = tiny_model()
    before = copy.deepcopy(model)
    with pytest.raises(ConfigError, match="the training ends after"):
        make_trainer(tmp_path, model, HessianPruner(config(), **when)).train()
    assert_same(model, before)


def test_a_training_that_stops_early_says_how_many_rounds_are_missing(tmp_path, caplog):
    class Stop(hf.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 3

    trainer = make_trainer(tmp_path, tiny_model(), HessianPruner(config(), step=2, num_rounds=2, interval=5))
    trainer.add_callback(Stop())
    with caplog.at_level(logging.WARNING, logger="hap_hf"):
        trainer.train()
    assert "after 1 of 2 pruning rounds" in caplog.text


def test_an_error_while_pruning_leaves_the_model_whole(tmp_path):
    model = tiny_model()
    before = copy.deepcopy(model)
    pruner = HessianPruner(config(exclude=("nothing.like.this*",)))
    with pytest.raises(ConfigError, match="exclude"):
        make_trainer(tmp_path, model, pruner).train()
    assert_same(model, before)


def test_data_without_labels_is_refused(tmp_path):
    data = [{k: v for k, v in s.items() if k != "labels"} for s in samples()]
    with pytest.raises((BatchError, ValueError), match=r"label|did not return a loss"):
        make_trainer(tmp_path, tiny_model(), HessianPruner(config()), data=data).train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_n_gpu": 2}, "2 GPUs in one process"),
        ({"deepspeed": "x.json"}, "DeepSpeed"),
        ({"fsdp": "full_shard"}, "FSDP"),
    ],
)
def test_trainings_that_cannot_be_pruned_are_refused_by_name(tmp_path, change, message):
    pruner = HessianPruner(config())
    trainer = make_trainer(tmp_path, tiny_model(), pruner)
    args = copy.copy(trainer.args)
    for name, value in change.items():
        object.__setattr__(args, name, value)
    with pytest.raises(UnsupportedModelError, match=f"this training uses {message}; prune first"):
        pruner.on_train_begin(args, trainer.state, trainer.control, model=trainer.model)


def test_outside_of_a_trainer_the_callback_says_what_to_call(tmp_path):
    pruner = HessianPruner(config())
    trainer = make_trainer(tmp_path, tiny_model(), pruner)
    trainer.state.max_steps = 18
    with pytest.raises(ConfigError, match=r"hap_hf\.prune"):
        pruner.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_an_empty_dataset_is_refused():
    with pytest.raises(BatchError, match="empty dataset"):
        next(scoring_batches([], lambda x: x, 4, config()))


def test_scoring_batches_are_the_same_for_the_same_seed_and_cover_the_data():
    collate = hf.default_data_collator

    def ids(seed, most):
        batches = scoring_batches(samples(10), collate, 4, config(seed=seed, max_batches=most))
        return [b["input_ids"] for b in batches]

    assert [len(b) for b in ids(0, None)] == [4, 4, 2]
    assert all(torch.equal(a, b) for a, b in zip(ids(0, 2), ids(0, 2), strict=True))
    assert not torch.equal(ids(0, 1)[0], ids(1, 1)[0])
    assert len({tuple(row.tolist()) for b in ids(0, None) for row in b}) == 10
