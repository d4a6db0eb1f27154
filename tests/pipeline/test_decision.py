"""Decisions: made without a touch, carried out as prune would, saved, and refused where they do not fit."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from decisions import (
    CASES,
    WITH_VALUES,
    assert_same_state,
    bert,
    config,
    decided,
    loss,
    state_of,
    step,
    texts,
    without_times,
)
from scored_models import snapshot
from torch import nn
from trainings import tiny_bert

import hap_hf.cut
import hap_hf.pipeline
from hap_hf import (
    ConfigError,
    Decision,
    Hessian,
    PlanMismatchError,
    apply_plan_,
    carry_out_,
    decide,
    decide_again,
    plan_of,
    prune,
)
from hap_hf.decision import stamps_of
from hap_hf.selection import Round


@pytest.mark.parametrize("case", CASES)
def test_what_is_decided_and_carried_out_on_a_copy_is_what_prune_does(case):
    build, batches, settings = CASES[case]
    whole, pruned = build(), build()
    report = prune(pruned, batches(), config(**settings))
    assert report.after.params < report.before.params
    decision = decide(config(**settings).evidence(whole, batches()), config(**settings))
    twin = copy.deepcopy(whole)
    carried_out = carry_out_(twin, decision)
    assert_same_state(twin, pruned)
    assert decision.plan == carried_out.plan == report.plan
    assert plan_of(twin) == plan_of(pruned)
    assert without_times(carried_out) == without_times(report)
    assert_same_state(whole, build())


def test_settings_may_be_a_mapping():
    model, twin = bert(), bert()
    settings = {"prune_ratio": 0.3, "method": {"name": "hessian", "num_probes": 2}, "progress": False}
    report = prune(model, texts(), settings)
    assert report.plan == prune(twin, texts(), config(prune_ratio=0.3, method=Hessian(num_probes=2))).plan
    assert_same_state(model, twin)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_follows_as_with_prune(kind):
    trained = []
    for apart in (False, True):
        model, wanted = bert().eval(), config(implant_ratio=0.3)
        optimizer = kind(model.parameters(), lr=1e-2, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
        step(model, optimizer)
        if apart:
            decision = decide(wanted.evidence(model, texts()), wanted)
            carry_out_(model, decision, optimizer=optimizer)
        else:
            prune(model, texts(), wanted, optimizer=optimizer)
        step(model, optimizer)
        assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
        trained.append(model)
    assert_same_state(*trained)


@pytest.mark.parametrize("case", CASES)
def test_deciding_leaves_model_and_optimizer_exactly_as_found(case):
    build, batches, settings = CASES[case]
    model, wanted = build(), config(**settings)
    first = next(iter(model.parameters()))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p is not first], lr=1e-3)
    loss(model, batches()[0]).backward()
    optimizer.step()
    first.requires_grad_(False)
    next(m for m in model.modules() if isinstance(m, nn.Linear)).eval()
    model.register_forward_hook(hook := lambda *args: None)
    before, held = snapshot(model), state_of(optimizer)
    decision = decide(wanted.evidence(model, batches()), wanted)
    decide_again(decision, wanted)
    assert str(decision)
    assert snapshot(model) == before
    assert state_of(optimizer) == held
    assert list(model._forward_hooks.values()) == [hook]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in list(model.modules())[1:])
    assert plan_of(model) is None
    optimizer.step()  # it holds nothing that was replaced


@pytest.mark.parametrize("case", CASES)
def test_a_decision_that_was_saved_and_loaded_gives_the_same_model(case, tmp_path):
    model, decision = decided(case)
    decision.save(tmp_path / "folder" / "decision")
    loaded = Decision.load(tmp_path / "folder" / "decision", decision.evidence)
    assert loaded.config == decision.config
    assert loaded.plan == decision.plan
    assert without_times(loaded.expected) == without_times(decision.expected)
    assert loaded.discovery == decision.discovery
    assert loaded.place == decision.place
    for part in ("values", "moments"):
        ours, theirs = getattr(decision, part), getattr(loaded, part)
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), part
    unsaved, twin = copy.deepcopy(model), copy.deepcopy(model)
    report = carry_out_(unsaved, decision)
    assert without_times(carry_out_(twin, loaded)) == without_times(report)
    assert_same_state(twin, unsaved)
    assert plan_of(twin) == plan_of(unsaved)


def test_a_decision_of_a_round_is_saved_with_its_place(tmp_path):
    model, wanted = bert(), config(target_params=0.5)
    decision = decide(wanted.evidence(model, texts()), wanted, Round(1, 2))
    decision.save(tmp_path)
    loaded = Decision.load(tmp_path, decision.evidence)
    assert loaded.place == decision.place == Round(1, 2, decision.place.start)
    assert decision.place.start > 0
    assert loaded.plan == decision.plan
    assert (loaded.plan.provenance[0]["round"], loaded.plan.provenance[0]["num_rounds"]) == (1, 2)


@pytest.mark.parametrize("change", [{"format": 2}, {"format": None}, []], ids=str)
def test_what_is_no_decision_of_this_format_is_refused(change, tmp_path):
    _, decision = decided("a BERT by magnitudes")
    decision.save(tmp_path)
    path = tmp_path / "decision.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change} if change else change))
    with pytest.raises(ConfigError, match=r"expected a decision of format 1 in decision.json, got something else"):
        Decision.load(tmp_path, decision.evidence)


def test_evidence_of_other_settings_is_refused():
    model = bert()
    with pytest.raises(ConfigError, match="evidence was made with seed=0, and the config says 4"):
        decide(config().evidence(model, texts()), config(seed=4))


@pytest.mark.parametrize("case", WITH_VALUES)
def test_a_model_that_was_trained_since_is_refused_unchanged(case):
    model, decision = decided(case)
    assert decision.values
    assert set(decision.stamps) == set(decision.values)
    batch = CASES[case][1]()[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss(model, batch).backward()
    optimizer.step()
    before, held = snapshot(model), state_of(optimizer)
    with pytest.raises(PlanMismatchError, match=r"are not those that the decision was made for, as after training"):
        carry_out_(model, decision, optimizer=optimizer)
    assert snapshot(model) == before
    assert state_of(optimizer) == held
    assert plan_of(model) is None


@pytest.mark.parametrize("case", WITH_VALUES)
def test_without_values_a_decision_is_carried_out_on_the_trained_model(case):
    model, decision = decided(case, **({} if CASES[case][0] is bert else {"recalibrate": False}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1e-3 * torch.randn_like(p))
    cut = copy.deepcopy(model)
    apply_plan_(cut, decision.plan, init=decision.config.implant_init, input_moments=decision.moments)
    bare = decision.without_values()
    assert (bare.values, bare.stamps) == ({}, {})
    report = carry_out_(model, bare)
    assert_same_state(model, cut)
    assert report.plan == decision.plan
    assert report.after == decision.expected.after


def test_a_decision_fits_its_model_whatever_the_number_of_threads():
    _, decision = decided("a BERT by default")
    model, threads = nn.Sequential(*(nn.Linear(1024, 512 + 64 * i) for i in range(4))), torch.get_num_threads()
    decision = replace(decision, stamps=stamps_of(model, dict(model.named_parameters())))
    try:
        for number in (1, 2, 4, 8):
            torch.set_num_threads(number)
            decision.check_fits(model)
    finally:
        torch.set_num_threads(threads)
    with torch.no_grad():
        model[1].weight[0, 0] += 1e-3
    with pytest.raises(PlanMismatchError, match=r"^1\.weight and 0 other weights are not those"):
        decision.check_fits(model)


def test_values_make_a_difference_to_the_loss():
    model, decision = decided("a BERT by default")
    twin = copy.deepcopy(model)
    carry_out_(model, decision)
    carry_out_(twin, decision.without_values())
    losses = []
    for pruned in (model, twin):
        pruned.eval()
        with torch.no_grad():
            losses.append(sum(pruned(**batch).loss.item() for batch in texts()))
    assert losses[0] < losses[1]


@pytest.mark.parametrize("case", ["a BERT by default", "a BERT by magnitudes"])
def test_a_decision_is_carried_out_once(case):
    model, decision = decided(case)
    carry_out_(model, decision)
    before = copy.deepcopy(model)
    with pytest.raises(PlanMismatchError):
        carry_out_(model, decision)
    assert_same_state(model, before)
    assert len(plan_of(model).stages) == 1


@pytest.mark.parametrize("case", ["a BERT by default", "a BERT by magnitudes"])
def test_another_model_is_refused_unchanged(case):
    _, decision = decided(case)
    other = tiny_bert(intermediate_size=20)
    before = snapshot(other)
    with pytest.raises(PlanMismatchError):
        carry_out_(other, decision)
    assert snapshot(other) == before


@pytest.mark.parametrize("stage", ["carry_optimizer_state_", "measure_size", "record_plan"])
def test_what_fails_while_a_decision_is_carried_out_is_undone(stage, monkeypatch):
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    step(model, optimizer)
    decision = decide(config(implant_ratio=0.3).evidence(model, texts()), config(implant_ratio=0.3))
    before, held = snapshot(model), state_of(optimizer)

    def failed(*args, **kwargs):
        raise OSError("failed")

    with monkeypatch.context() as patch:
        patch.setattr(hap_hf.cut if hasattr(hap_hf.cut, stage) else hap_hf.pipeline, stage, failed)
        with pytest.raises(OSError, match="failed"):
            carry_out_(model, decision, optimizer=optimizer)
    assert snapshot(model) == before
    assert state_of(optimizer) == held
    report = carry_out_(model, decision, optimizer=optimizer)
    assert report.after == decision.expected.after
    step(model, optimizer)


@pytest.mark.parametrize("case", CASES)
def test_a_decision_names_its_groups_and_knows_the_sizes_that_are_measured_later(case):
    model, decision = decided(case)
    text, expected = str(decision), decision.expected
    first_column = "".join(line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|"))
    for group in decision.discovery.groups:
        assert group.name in first_column  # the table folds what is too long for a line
    assert str(decision.config.asked) in text
    report = carry_out_(model, decision)
    assert expected.before == report.before
    assert expected.after == report.after
    assert expected.after.params == sum(p.numel() for p in model.parameters())
    assert without_times(expected) == without_times(report)
    assert expected.seconds.keys() <= report.seconds.keys()
