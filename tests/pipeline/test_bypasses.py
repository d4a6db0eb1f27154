"""Low-rank paths that are chosen: where they pay, that the amount is met, and everything that follows."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers as hf
from bypasses import RANK, beside, planted
from reference import logits, masked
from trainings import make_trainer, samples
from transformers import AutoModelForSequenceClassification

import hap_hf.bypassing
from hap_hf import (
    ConfigError,
    Decision,
    HapConfig,
    HessianPruner,
    carry_out_,
    decide,
    decide_again,
    plan_of,
    prune,
    prune_to_floor,
)
from hap_hf.bypassing import ranks_that_pay
from hap_hf.layers.bypass import Bypass
from hap_hf.names.currencies import Macs, Params
from hap_hf.names.plan import PruningPlan
from hap_hf.reconstruction import PathGains, bypassed_repair
from hap_hf.reconstruction.blocks import Block, blocks
from hap_hf.reconstruction.stations import fitted_layers

# Chosen without regard to what stands in for what: then there is something left for paths to win.
QUIET = {"progress": False, "max_batches": None, "kinds": ("ffn",), "method": "mask_ggn"}


@pytest.fixture(scope="module")
def decided():
    model, batches = planted()
    config = HapConfig(target_params=0.6, implants="auto", **QUIET)
    return model, batches, config, decide(config.evidence(model, batches), config)


def test_a_linear_part_of_a_block_goes_into_a_path_of_its_rank():
    model, batches = planted()
    config = HapConfig(target_params=0.5, **QUIET)
    evidence = config.evidence(model, batches)
    decision = decide(evidence, config)
    stage = [replace(g, actions="p" * 12 + "k" * 12) for g in decision.stage if g.group.kind == "ffn"]
    found = blocks(evidence, stage, fitted_layers(model))
    assert {b.group for b in found.values()} == {g.group.name for g in stage}
    dense, removed = logits(model, batches[0]), {g.group: list(range(12)) for g in stage}
    errors = {}
    for rank in (RANK - 1, RANK):
        repair = bypassed_repair(evidence, stage, None, dict.fromkeys(found, rank))
        plan = PruningPlan((tuple(stage),), (), (repair.bypasses,))
        trial = copy.deepcopy(model)
        trial.load_state_dict({**model.state_dict(), **repair.values})
        with masked(trial, removed), beside(trial, plan, repair.paths):
            errors[rank] = (logits(trial, batches[0]) - dense).abs().max().item()
    assert errors[RANK] < 0.05 * errors[RANK - 1]


def test_paths_are_taken_where_they_pay_and_the_amount_is_met(decided):
    model, _, _, decision = decided
    assert decision.bypasses
    report = carry_out_(copy.deepcopy(model), decision)
    assert 0.5 < report.prunable_after.params / report.prunable_before.params <= 0.6
    assert report.bypasses == {b.exit: b.rank for b in decision.bypasses}
    assert "bypasses" in str(report)
    assert report.prunable_after == decision.expected.prunable_after
    assert report.after.params == decision.expected.after.params
    # Measured and counted: the paths are in both.
    assert report.before.params - report.after.params == (report.prunable_before.params - report.prunable_after.params)
    without = copy.deepcopy(model)
    plain = carry_out_(without, decide_again(decision, HapConfig(target_params=0.6, **QUIET)))
    assert not plain.bypasses
    assert report.loss_after < plain.loss_after


def test_the_cut_model_is_the_masked_one_with_the_paths(decided):
    model, batches, _, decision = decided
    cut = copy.deepcopy(model)
    carry_out_(cut, decision)
    removed = {g.group: g.units("p") for g in decision.stage}
    whole = copy.deepcopy(model)
    whole.load_state_dict({**model.state_dict(), **decision.values})
    with masked(whole, removed):
        silenced = logits(whole, batches[0])
        with beside(whole, PruningPlan((decision.stage,), (), (decision.bypasses,)), decision.paths):
            expected = logits(whole, batches[0])
    torch.testing.assert_close(logits(cut, batches[0]), expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(expected, silenced, rtol=1e-3)


def test_a_decision_with_paths_is_written_and_read(decided, tmp_path):
    model, batches, _, decision = decided
    decision.save(tmp_path)
    loaded = Decision.load(tmp_path, decision.evidence)
    models = [copy.deepcopy(model) for _ in range(2)]
    for each, made in zip(models, (decision, loaded), strict=True):
        carry_out_(each, made)
    assert torch.equal(logits(models[0], batches[0]), logits(models[1], batches[0]))
    assert loaded.plan == decision.plan


def test_multiply_accumulates_are_a_price_too(decided):
    model, batches, _, _ = decided
    config = HapConfig(target_macs=0.6, implants="auto", **QUIET)
    report = prune(copy.deepcopy(model), batches, config)
    assert report.bypasses
    assert report.prunable_after.macs <= 0.6 * report.prunable_before.macs
    saved = report.before.macs - report.after.macs
    assert saved == pytest.approx(report.prunable_before.macs - report.prunable_after.macs, rel=1e-6)


def test_where_none_is_better_there_are_none(decided, monkeypatch):
    _, _, config, decision = decided
    real = hap_hf.bypassing.bypassed_repair
    monkeypatch.setattr(
        hap_hf.bypassing, "bypassed_repair", lambda *a: hap_hf.bypassing.replace(real(*a), loss=float("inf"))
    )
    again = decide_again(decision, config)
    plain = decide_again(decision, HapConfig(target_params=0.6, **QUIET))
    assert not again.bypasses
    assert [g.actions for g in again.stage] == [g.actions for g in plain.stage]


def test_ranks_by_hand():
    block = Block("a:ffn", "0", "1", 1, 5.0, torch.tensor([[0], [1], [2]]), (0, 2))
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 6))
    gains = [PathGains(block, torch.tensor([8.0, 1.0, 2.5, -1.0]), energy=20.0, left=0.5)]
    sensitivity = {"a:ffn": torch.tensor([3.0, 100.0, 1.0])}
    # (3 + 1) / 20 = 0.2 of loss for each unit of squared error; a direction costs 10 parameters, and half of the price.
    for price, rank in ((0.5, None), (0.3, 1), (0.09, 1), (0.06, 3), (0.0, 3)):
        found = ranks_that_pay(gains, sensitivity, price, Params(), model)
        assert found == ({} if rank is None else {"1": rank}), price
    assert ranks_that_pay(gains, sensitivity, 0.3 / 5, Macs(), model) == {"1": 1}
    assert ranks_that_pay(gains, {"a:ffn": torch.tensor([-1.0, 1, -1])}, 0.0, Params(), model) == {}


def test_a_trainer_prunes_trains_saves_and_loads(tmp_path):
    model, _ = planted()
    config = HapConfig(target_params=0.6, implants="auto", **{**QUIET, "max_batches": 2})
    pruner = HessianPruner(config, step=2, num_rounds=2, interval=1)
    trainer = make_trainer(tmp_path, model.float(), pruner, max_steps=5, learning_rate=1e-3)
    trainer.train()
    assert not pruner.reports[0].bypasses  # in the last round alone
    assert sum(isinstance(m, Bypass) for m in model.modules()) == len(pruner.reports[1].bypasses)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    batch = hf.default_data_collator(samples(4))
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert plan_of(again) == plan_of(model)


def test_a_floor_is_met_with_paths(decided):
    model, batches, _, _ = decided
    cut = copy.deepcopy(model)

    def accuracy(net):
        return sum((logits(net, b).argmax(-1) == b["labels"]).double().mean().item() for b in batches) / len(batches)

    prune_to_floor(cut, batches, accuracy, HapConfig(target_params=0.9, implants="auto", **QUIET), drop=0.1)
    assert accuracy(cut) >= 0.9 * 1.0 - 1e-9
    assert cut.num_parameters() < model.num_parameters()


WRONG = {
    "a ratio of units": ({"prune_ratio": 0.5}, "needs target_params or target_macs"),
    "rows as well": ({"target_params": 0.5, "implant_ratio": 0.2}, "leave implant_ratio at 0"),
    "no reconstruction": ({"target_params": 0.5, "reconstruct": False}, "leave reconstruct"),
    "another criterion": ({"target_params": 0.5, "method": "magnitude", "reconstruct": True}, "set per_cost=True"),
    "parts": ({"target_params": 0.5, "parts": {"ffn": 0.3}}, "leave parts out"),
}


@pytest.mark.parametrize("case", WRONG)
def test_settings_that_cannot_be_weighed_are_refused(case):
    settings, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        HapConfig(implants="auto", **settings)


def test_settings_are_written_and_read():
    config = HapConfig(target_params=0.5, implants="auto")
    assert HapConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="implants"):
        HapConfig(target_params=0.5, implants="some")


@pytest.mark.parametrize("reconstruct", [True, False])
def test_paths_of_a_given_plan_are_fitted_at_its_time_or_begin_silent_and_learn(decided, tmp_path, reconstruct):
    model, batches, config, decision = decided
    settings = replace(config, implants="rows", reconstruct=reconstruct, compensate=reconstruct)
    answers = {}
    for rate in (0.0, 1e-2):
        pruner = HessianPruner(settings, plan=decision.plan)
        trainer = make_trainer(tmp_path, copy.deepcopy(model), pruner, max_steps=2, learning_rate=rate)
        trainer.train()
        paths = [m for m in trainer.model.modules() if isinstance(m, Bypass)]
        assert len(paths) == len(decision.bypasses)
        assert plan_of(trainer.model).bypasses == decision.plan.bypasses
        assert any(m.up.weight.any() for m in paths) == (reconstruct or rate > 0)
        answers[rate] = logits(trainer.model.eval(), batches[0])
        trainer.save_model(tmp_path)
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
        assert torch.equal(logits(again.eval(), batches[0]), answers[rate])
    with masked(model, {g.group: g.units("p") for g in decision.stage}):
        silent = logits(model, batches[0])
    assert torch.allclose(answers[0.0], silent, rtol=0, atol=1e-10) == (not reconstruct)
    pruned = copy.deepcopy(model)
    carry_out_(pruned, decision)
    near = (logits(pruned, batches[0]) - answers[0.0]).abs().max()
    # On the same batches as the decision it would be the same; the Trainer's are others.
    assert (near < (silent - logits(pruned, batches[0])).abs().max() / 2) == reconstruct
    assert not torch.allclose(answers[1e-2], answers[0.0])
