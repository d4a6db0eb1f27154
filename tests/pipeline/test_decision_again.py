"""Other amounts and limits from one decision: what would be decided anew, without scoring again."""

import copy

import pytest
import torch
from decisions import (
    assert_same_state,
    bert,
    config,
    decided,
    step,
    texts,
    without_times,
)
from scored_models import snapshot

from hap_hf import (
    ConfigError,
    Decision,
    Hessian,
    PlanMismatchError,
    carry_out_,
    decide,
    decide_again,
)

ONE_PASS = {
    "mask_fisher": {"method": "mask_fisher"},
    "mask_fisher with implants": {"method": "mask_fisher", "implant_ratio": 0.3},
    "hessian": {"method": Hessian(num_probes=2)},
    "one pass of mask_ggn": {"num_passes": 1},
}


@pytest.mark.parametrize("other", [{"target_params": 0.4}, {"target_macs": 0.8}, {"prune_ratio": 0.2}], ids=str)
@pytest.mark.parametrize("settings", ONE_PASS)
def test_another_amount_of_a_decision_in_one_pass_is_what_would_be_decided_anew(settings, other):
    model = bert()
    first, second = config(**ONE_PASS[settings], target_params=0.7), config(**ONE_PASS[settings], **other)
    evidence = first.evidence(model, texts())
    decision = decide(evidence, first)
    again, anew = decide_again(decision, second), decide(evidence, second)
    assert again.plan == anew.plan
    assert again.plan != decision.plan
    assert again.threshold == anew.threshold
    assert without_times(again.expected) == without_times(anew.expected)
    twin = copy.deepcopy(model)
    carry_out_(twin, again)
    carry_out_(model, anew)
    assert_same_state(twin, model)


def test_other_limits_of_a_decision_are_what_would_be_decided_anew():
    model, settings = bert(), {"method": "mask_fisher", "target_params": 0.6}
    evidence = config(**settings).evidence(model, texts())
    decision = decide(evidence, config(**settings))
    for change in ({"round_to": 4}, {"max_group_ratio": 0.5}, {"exclude": "*layer.0*"}, {"kinds": "ffn"}):
        again = decide_again(decision, config(**settings, **change))
        assert again.plan == decide(evidence, config(**settings, **change)).plan
        assert again.plan.stages != decision.plan.stages


def test_another_amount_after_several_passes_is_reached():
    model, first, second = bert(), config(target_params=0.7), config(target_params=0.4)
    evidence = first.evidence(model, texts())
    decision = decide(evidence, first)
    again = decide_again(decision, second)
    kept = again.expected.prunable_after.params / again.expected.prunable_before.params
    assert 0.36 < kept <= 0.4
    for before, after in zip(decision.stage, again.stage, strict=True):
        assert set(before.units("p")) <= set(after.units("p")), before.group.name
    assert decide_again(again, first).plan == decision.plan
    assert without_times(carry_out_(model, again)) == without_times(again.expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "taylor"}, r"the scores are those of MaskFisher\(\) in 1 passes, and .* Taylor\(\) in 1; decide"),
        ({"num_passes": 2}, r"MaskFisher\(\) in 1 passes, and .* in 2"),
        ({"seed": 1}, "evidence was made with seed=0, and the config says 1"),
        ({"precision": "bf16"}, "evidence was made with precision=fp32, and the config says bf16"),
        ({"compensate": True}, "ask for compensation, and what it needs .* was not measured or not saved"),
        ({"kinds": ("heads", "ffn")}, "select groups that were not scored"),
    ],
    ids=str,
)
def test_what_asks_for_other_scores_is_not_decided_from_these(change, message):
    settings = {"method": "mask_fisher", "kinds": "heads"}
    model = bert()
    decision = decide(config(**settings).evidence(model, texts()), config(**settings))
    with pytest.raises(ConfigError, match=message):
        decide_again(decision, config(**{**settings, **change}))


def test_what_a_loaded_decision_no_longer_knows_is_said(tmp_path):
    _, decision = decided("a BERT by default")
    decision.save(tmp_path)
    loaded = Decision.load(tmp_path, decision.evidence)
    with pytest.raises(ConfigError, match="not measured or not saved; set compensate=False"):
        decide_again(loaded, config(prune_ratio=0.2))
    again = decide_again(loaded, config(prune_ratio=0.2, compensate=False))
    assert again.stage == decide_again(decision, config(prune_ratio=0.2)).stage
    assert not again.values


@pytest.mark.parametrize("how", ["trained", "pruned"])
def test_another_amount_is_not_decided_for_a_model_that_has_changed_since(how):
    model, decision = decided("a BERT by default")
    if how == "pruned":
        carry_out_(model, decision)
    else:
        step(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    before = snapshot(model)
    with pytest.raises(PlanMismatchError):  # what is known of the layers' inputs is of other weights
        decide_again(decision, config(prune_ratio=0.2))
    assert snapshot(model) == before
