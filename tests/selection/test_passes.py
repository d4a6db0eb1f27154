"""Scoring in passes: each on the model without what the passes before took."""

import copy

import pytest
import torch
from scored_models import BATCH, FFN, bert, config, heads, net, text_batch

from hap_hf import (
    Compensation,
    CurvatureError,
    HapConfig,
    apply_plan_,
    find_groups,
    make_plan,
    score_groups,
    score_in_passes,
)
from hap_hf.criteria import Scores
from hap_hf.names.plan import PRUNE
from hap_hf.selection import passes

TEXT = text_batch(labels=torch.tensor([0, 1, 1]))
SETTINGS = {"method": "mask_ggn", "num_output_probes": None, "kinds": ("ffn",), "compensate": False}


def settings(**changes: object) -> HapConfig:
    return config(**{**SETTINGS, "prune_ratio": 0.6, **changes})


def gone(scores: Scores) -> dict[str, list[int]]:
    return {name: x.tolist() for name, x in scores.gone_in.items()}


def test_a_single_pass_is_the_plain_score() -> None:
    model = net()
    one = score_in_passes(model, [FFN], [BATCH], settings(num_passes=1))
    plain = score_groups(model, [FFN], [BATCH], settings())
    assert torch.equal(one.sensitivity[FFN.name], plain.sensitivity[FFN.name])
    assert not one.gone_in


@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("method", ["mask_ggn", "ggn", "taylor", "mask_fisher"])
def test_the_last_pass_scores_what_surgery_of_the_passes_before_leaves(method: str, compensate: bool) -> None:
    model = bert(num_hidden_layers=2).eval()
    groups = [g for g in find_groups(model, TEXT) if g.kind == "ffn"]
    two = settings(method=method, num_passes=2, coupling="filter", compensate=compensate)
    scores = score_in_passes(model, groups, [TEXT], two)
    first = make_plan(groups, score_groups(model, groups, [TEXT], two), settings(prune_ratio=0.3, coupling="filter"))
    smaller = copy.deepcopy(model)
    if compensate:
        Compensation.measure(smaller, groups, [TEXT], two).apply_(first)
    apply_plan_(smaller, first)
    left = find_groups(smaller, TEXT)
    again = score_groups(smaller, [g for g in left if g.kind == "ffn"], [TEXT], two)
    for plan in first:
        name = plan.group.name
        kept = torch.tensor([u for u in range(plan.group.num_units) if u not in plan.units(PRUNE)])
        assert plan.units(PRUNE) == scores.gone_in[name].nonzero().flatten().tolist()
        torch.testing.assert_close(scores.sensitivity[name][kept], again.sensitivity[name], rtol=1e-9, atol=1e-15)


def test_what_a_pass_took_goes_whatever_the_next_one_says() -> None:
    model = net(seed=3)
    wanted = settings(num_passes=3, prune_ratio=0.75)
    scores = score_in_passes(model, [FFN], [BATCH], wanted)
    (order,) = gone(scores).values()
    assert sorted(order) == [0, 0, 1, 2]
    (plan,) = make_plan([FFN], scores, wanted)
    assert {u for u, number in enumerate(order) if number} < set(plan.units(PRUNE))


def test_twins_that_each_look_dispensable_do_not_both_go() -> None:
    """Two neurons that cancel out are harmless together; two that double each other are not."""
    model = net(seed=1)
    with torch.no_grad():
        model.up.weight[1], model.up.bias[1] = model.up.weight[0], model.up.bias[0]
        model.down.weight[:, 1] = -model.down.weight[:, 0]  # unit 1 undoes what unit 0 does
        model.down.weight[:, 2:] *= 0.5
    once = score_in_passes(model, [FFN], [BATCH], settings(num_passes=1, prune_ratio=0.5))
    assert once.sensitivity[FFN.name][0] == pytest.approx(once.sensitivity[FFN.name][1].item())
    twice = score_in_passes(model, [FFN], [BATCH], settings(num_passes=2, prune_ratio=0.5))
    (first,) = (u for u, number in enumerate(gone(twice)[FFN.name]) if number)
    alone = copy.deepcopy(model)
    with torch.no_grad():
        alone.down.weight[:, first] = 0
    expected = score_groups(alone, [FFN], [BATCH], settings()).sensitivity[FFN.name]
    rest = [u for u in range(4) if u != first]
    torch.testing.assert_close(twice.sensitivity[FFN.name][rest], expected[rest], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("amount", [{"target_params": 0.5}, {"target_macs": 0.5}])
def test_budgets_are_reached_in_passes_too(amount: dict[str, float]) -> None:
    model = bert().eval()
    groups = find_groups(model, TEXT)
    wanted = HapConfig(**amount, method="mask_ggn", num_passes=3, progress=False)
    scores = score_in_passes(model, groups, [TEXT], wanted)
    plan = make_plan(groups, scores, wanted)
    for group in plan:
        out = {u for u, number in enumerate(scores.gone_in[group.group.name].tolist()) if number}
        assert out <= set(group.units(PRUNE))
    assert {1, 2} <= {int(n) for x in scores.gone_in.values() for n in x}


def test_weights_alone_are_scored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(passes, "score_groups", lambda *a, **k: calls.append(1) or score_groups(*a, **k))
    score_in_passes(net(), [FFN], [BATCH], settings(method="magnitude", num_passes=4))
    assert len(calls) == 1


def test_a_pass_too_small_to_take_a_unit_is_left_out() -> None:
    scores = score_in_passes(net(), [FFN], [BATCH], settings(num_passes=4, prune_ratio=0.5))
    assert sorted(gone(scores)[FFN.name]) == [0, 0, 0, 2]  # passes of 0.5, 1, 1.5 and 2 units


def test_an_error_in_a_later_pass_leaves_the_model_as_it_was() -> None:
    model, calls = net(), []
    before = model(**BATCH).logits.detach()

    def loss(module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        calls.append(1)
        return module(**batch).loss * (1 if len(calls) < 6 else torch.nan)

    with pytest.raises(CurvatureError, match="finite"):
        score_in_passes(model, [FFN], [BATCH], settings(num_passes=4, prune_ratio=0.75), loss_fn=loss)
    assert torch.equal(model(**BATCH).logits, before)
    assert not model.down._forward_pre_hooks


def test_heads_are_silenced_too() -> None:
    model = bert().eval()
    wanted = settings(num_passes=2, prune_ratio=0.5, kinds=("heads",))
    scores = score_in_passes(model, [heads(0), heads(1)], [TEXT], wanted)
    assert sum(n > 0 for x in gone(scores).values() for n in x) == 2
