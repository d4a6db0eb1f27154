"""Scoring in passes: each on the model without what the passes before took."""

import copy
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import pytest
import torch
from compensations import make_up_for_
from scored_models import BATCH, FFN, bert, config, heads, net, score, text_batch
from torch import nn

from hap_hf import (
    Compensation,
    ConfigError,
    CurvatureError,
    HapConfig,
    Magnitude,
    Scores,
    apply_plan_,
    find_groups,
    make_plan,
)
from hap_hf.criteria import known_criteria
from hap_hf.names.actions import PRUNE
from hap_hf.selection import passes, score_in_passes

TEXT = text_batch(labels=torch.tensor([0, 1, 1]))
SETTINGS = {"method": "mask_ggn", "num_output_probes": None, "kinds": ("ffn",), "compensate": False}


def settings(**changes: object) -> HapConfig:
    """Return settings, of which a criterion gets those of its own that it has."""
    wanted = {**SETTINGS, "prune_ratio": 0.6, **changes}
    method = wanted["method"]
    criterion = known_criteria()[method] if isinstance(method, str) else type(method)
    missing = {"num_output_probes", "coupling"} - {f.name for f in fields(criterion)}
    return config(**{name: value for name, value in wanted.items() if name not in missing})


def scored(model: nn.Module, groups: Any, batches: Any, wanted: HapConfig, **how: Any) -> Scores:
    """Return the scores of all passes, with compensation in between if that is wanted."""
    found = compensation_of(model, groups, batches, wanted, **how) if wanted.compensates else None
    return score_in_passes(wanted.evidence(model, batches, **how), groups, wanted, compensation=found)


def compensation_of(model: nn.Module, groups: Any, batches: Any, wanted: HapConfig, **how: Any) -> Compensation:
    """Return what is measured of the layers that read these groups."""
    probes = getattr(wanted.criterion, "num_output_probes", 1)
    return Compensation.measure(wanted.evidence(model, batches, **how), groups, num_output_probes=probes)


def gone(scores: Scores) -> dict[str, list[int]]:
    return {name: x.tolist() for name, x in scores.gone_in.items()}


def test_a_single_pass_is_the_plain_score() -> None:
    model = net()
    one = scored(model, [FFN], [BATCH], settings(num_passes=1))
    plain = score(model, [FFN], [BATCH], settings())
    assert torch.equal(one.sensitivity[FFN.name], plain.sensitivity[FFN.name])
    assert not one.gone_in


@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("method", ["mask_ggn", "ggn", "taylor", "mask_fisher"])
def test_the_last_pass_scores_what_surgery_of_the_passes_before_leaves(method: str, compensate: bool) -> None:
    model = bert(num_hidden_layers=2).eval()
    groups = [g for g in find_groups(model, TEXT) if g.kind == "ffn"]
    two = settings(method=method, num_passes=2, coupling="filter", compensate=compensate)
    scores = scored(model, groups, [TEXT], two)
    first = make_plan(groups, score(model, groups, [TEXT], two), settings(prune_ratio=0.3, coupling="filter"))
    smaller = copy.deepcopy(model)
    if compensate:
        make_up_for_(compensation_of(smaller, groups, [TEXT], two), first)
    apply_plan_(smaller, first)
    left = find_groups(smaller, TEXT)
    again = score(smaller, [g for g in left if g.kind == "ffn"], [TEXT], two)
    for plan in first:
        name = plan.group.name
        kept = torch.tensor([u for u in range(plan.group.num_units) if u not in plan.units(PRUNE)])
        assert plan.units(PRUNE) == scores.gone_in[name].nonzero().flatten().tolist()
        torch.testing.assert_close(scores.sensitivity[name][kept], again.sensitivity[name], rtol=1e-9, atol=1e-15)


def test_what_a_pass_took_goes_whatever_the_next_one_says() -> None:
    model = net(seed=3)
    wanted = settings(num_passes=3, prune_ratio=0.75)
    scores = scored(model, [FFN], [BATCH], wanted)
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
    once = scored(model, [FFN], [BATCH], settings(num_passes=1, prune_ratio=0.5))
    assert once.sensitivity[FFN.name][0] == pytest.approx(once.sensitivity[FFN.name][1].item())
    twice = scored(model, [FFN], [BATCH], settings(num_passes=2, prune_ratio=0.5))
    (first,) = (u for u, number in enumerate(gone(twice)[FFN.name]) if number)
    alone = copy.deepcopy(model)
    with torch.no_grad():
        alone.down.weight[:, first] = 0
    expected = score(alone, [FFN], [BATCH], settings()).sensitivity[FFN.name]
    rest = [u for u in range(4) if u != first]
    torch.testing.assert_close(twice.sensitivity[FFN.name][rest], expected[rest], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("amount", [{"target_params": 0.5}, {"target_macs": 0.5}])
def test_budgets_are_reached_in_passes_too(amount: dict[str, float]) -> None:
    model = bert().eval()
    groups = find_groups(model, TEXT)
    wanted = HapConfig(**amount, method="mask_ggn", num_passes=3, progress=False)
    scores = scored(model, groups, [TEXT], wanted)
    plan = make_plan(groups, scores, wanted)
    for group in plan:
        out = {u for u, number in enumerate(scores.gone_in[group.group.name].tolist()) if number}
        assert out <= set(group.units(PRUNE))
    assert {1, 2} <= {int(n) for x in scores.gone_in.values() for n in x}


@dataclass(frozen=True, kw_only=True)
class MagnitudeInPasses(Magnitude):
    """A criterion that looks at the weights alone, and asks for passes that would all come out alike."""

    passes: ClassVar[int] = 4


@pytest.mark.parametrize("method", ["magnitude", MagnitudeInPasses()])
def test_weights_alone_are_scored_once(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    score = passes._scored
    monkeypatch.setattr(passes, "_scored", lambda *a: calls.append(1) or score(*a))
    scores = scored(net(), [FFN], [BATCH], settings(method=method))
    assert len(calls) == 1
    assert not scores.gone_in


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_several_passes_over_weights_alone_are_refused(method: str) -> None:
    with pytest.raises(ConfigError, match=f"num_passes=4 has no meaning with method='{method}'"):
        settings(method=method, num_passes=4)


def test_a_pass_too_small_to_take_a_unit_is_left_out() -> None:
    scores = scored(net(), [FFN], [BATCH], settings(num_passes=4, prune_ratio=0.5))
    assert sorted(gone(scores)[FFN.name]) == [0, 0, 0, 2]  # passes of 0.5, 1, 1.5 and 2 units


def test_an_error_in_a_later_pass_leaves_the_model_as_it_was() -> None:
    model, calls = net(), []
    before = model(**BATCH).logits.detach()

    def loss(module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        calls.append(1)
        return module(**batch).loss * (1 if len(calls) < 3 else torch.nan)

    with pytest.raises(CurvatureError, match="finite"):
        scored(model, [FFN], [BATCH], settings(num_passes=4, prune_ratio=0.75), loss_fn=loss)
    assert torch.equal(model(**BATCH).logits, before)
    assert not model.down._forward_pre_hooks


def test_heads_are_silenced_too() -> None:
    model = bert().eval()
    wanted = settings(num_passes=2, prune_ratio=0.5, kinds=("heads",))
    scores = scored(model, [heads(0), heads(1)], [TEXT], wanted)
    assert sum(n > 0 for x in gone(scores).values() for n in x) == 2
