"""Budgets are met within one per cent from below, whatever the groups."""

import logging
import random
import time

import pytest
from synthetic_groups import ffn_group, heads_group, random_scores, scores_of

from hap_hf.config import HapConfig
from hap_hf.errors import ConfigError
from hap_hf.names.currencies import Currency, Macs, Params
from hap_hf.names.group import Group, Kind, Role, Slice
from hap_hf.names.outcome import footprint
from hap_hf.selection import make_plan


def kept_share(plan, setting, selected=None):
    """Return the kept share, from nothing but the counts of letters, the ranks and the shapes."""
    left = whole = 0.0
    for g in plan:
        if selected is not None and g.group not in selected:
            continue
        n, kept, survivors = g.group.num_units, g.actions.count("k"), len(g.actions.replace("p", ""))
        macs = setting == "target_macs"
        for s in g.group.slices:
            weight = s.uses if macs else 1.0
            row = s.shape[1 - s.dim] if len(s.shape) > 1 else 1
            whole += weight * s.width * n * row
            if s.role == "producer" and s.tensor in g.ranks:
                rows = s.width * (survivors - kept)
                left += weight * (s.width * kept * row + g.ranks[s.tensor] * (rows + row))
            else:
                left += weight * s.width * survivors * row
        if macs:
            left += survivors * g.group.core_macs
            whole += n * g.group.core_macs
    return left / whole


def random_groups(seed):
    """Return groups of which single units are far below one per cent of the whole."""
    rng = random.Random(seed)
    groups = []
    for layer in range(rng.randint(1, 4)):
        hidden = rng.choice([8, 16, 24])
        groups.append(heads_group(f"l{layer}", rng.randint(2, 16), width=rng.choice([2, 4]), hidden=hidden))
        groups.append(ffn_group(f"l{layer}", rng.randint(300, 600), hidden=hidden, bias=rng.random() < 0.5))
    return groups


@pytest.mark.parametrize("setting", ["target_params", "target_macs"])
@pytest.mark.parametrize("implant_ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(8))
def test_budgets_are_met_within_one_per_cent_from_below(setting, implant_ratio, seed):
    rng = random.Random(seed)
    groups = random_groups(seed)
    target = rng.uniform(0.7, 0.97) if implant_ratio == 1 else rng.uniform(0.35, 0.97)
    config = HapConfig(**{setting: target}, implant_ratio=implant_ratio, max_group_ratio=rng.choice([0.8, 0.95, 1.0]))
    reached = kept_share(make_plan(groups, random_scores(groups, seed), config), setting)
    assert target - 0.01 <= reached <= target + 1e-12


@pytest.mark.parametrize("implant_ratio", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(8))
def test_budgets_are_met_with_rounded_widths(implant_ratio, seed):
    groups = random_groups(seed)
    # A step of 4 neurons stays below one per cent, as the smallest FFN has 300.
    config = HapConfig(target_params=0.6, round_to=4, implant_ratio=implant_ratio)
    plan = make_plan(groups, random_scores(groups, seed), config)
    assert 0.6 - 0.01 <= kept_share(plan, "target_params") <= 0.6 + 1e-12
    for g in plan:
        survivors = len(g.actions.replace("p", ""))
        assert g.group.kind is Kind.HEADS or survivors % 4 == 0 or survivors == g.group.num_units


@pytest.mark.parametrize("seed", range(5))
def test_groups_that_are_not_selected_do_not_count_towards_the_budget(seed):
    groups = random_groups(seed)
    plan = make_plan(groups, random_scores(groups, seed), HapConfig(target_params=0.5, kinds="ffn"))
    ffn = [g for g in groups if g.kind is Kind.FFN]
    assert 0.49 <= kept_share(plan, "target_params", ffn) <= 0.5
    assert all(set(g.actions) == {"k"} for g in plan if g.group.kind is Kind.HEADS)


@pytest.mark.parametrize("seed", range(5))
def test_within_a_group_no_cut_unit_is_more_sensitive_than_a_kept_one(seed):
    groups = random_groups(seed)
    scores = random_scores(groups, seed)
    for g in make_plan(groups, scores, HapConfig(target_params=0.5, implant_ratio=0.3)):
        values = scores.sensitivity[g.group.name]
        by_letter = {a: [values[u].item() for u in g.units(a)] for a in "pik"}
        assert max(by_letter["p"], default=-1e9) <= min(by_letter["i"] + by_letter["k"])
        assert max(by_letter["i"], default=-1e9) <= min(by_letter["k"])


def test_without_implants_the_result_is_the_largest_that_restoring_in_order_allows():
    groups = [ffn_group("a", 10, hidden=1, bias=False), ffn_group("b", 10, hidden=3, bias=False)]
    # Costs of 2 and 6 a unit, 80 in all; 44 may stay. Cut in order: b0..b5 frees 36 and leaves exactly 44.
    scores = scores_of({groups[0]: range(10, 20), groups[1]: range(10)})
    a, b = make_plan(groups, scores, HapConfig(per_cost=False, target_params=0.55))
    assert (a.actions, b.actions) == ("k" * 10, "p" * 6 + "k" * 4)
    # All but 1 of a go, and b0..b2: 8 * 2 + 18 = 34 are to go. In order a0..a7, b0..b2 would free 34 exactly.
    scores = scores_of({groups[0]: [0, 1, 2, 3, 4, 5, 6, 7, 30, 31], groups[1]: range(10, 20)})
    a, b = make_plan(groups, scores, HapConfig(per_cost=False, target_params=(80 - 33) / 80))
    # 33 are to go, so the last of b overshoots by 1, and no unit fits back.
    assert (a.actions, b.actions) == ("p" * 8 + "kk", "ppp" + "k" * 7)


def test_the_most_sensitive_cut_units_that_fit_come_back():
    groups = [ffn_group("a", 10, hidden=1, bias=False), ffn_group("b", 10, hidden=9, bias=False)]
    # Costs of 2 and 18 a unit, 200 in all. In order a0..a4 and b0 free 28 where 20 would do: four units of a fit back.
    scores = scores_of({groups[0]: [4, 3, 2, 1, 0, 30, 31, 32, 33, 34], groups[1]: range(10, 20)})
    a, b = make_plan(groups, scores, HapConfig(target_params=0.9))
    assert (a.actions, b.actions) == ("kkkkpkkkkk", "p" + "k" * 9)


def test_small_units_fill_the_gap_that_a_large_one_leaves():
    heads, ffn = heads_group("a", 4, width=16, hidden=64), ffn_group("a", 400, hidden=64)
    # Every head is 5% or so of the whole and less sensitive than any neuron.
    scores = scores_of({heads: range(4), ffn: range(10, 410)})
    plan = make_plan([heads, ffn], scores, HapConfig(target_params=0.9))
    assert 0.89 <= kept_share(plan, "target_params") <= 0.9
    assert [g.actions.count("p") > 0 for g in plan] == [True, True]


def test_a_cap_holds_where_small_units_fill_a_gap(caplog):
    heads, ffn = heads_group("a", 4, width=16, hidden=64), ffn_group("a", 16, hidden=64)
    # With 4144 and 129 a unit, nine neurons would do in place of the second head, but no more than eight may go.
    scores = scores_of({heads: range(4), ffn: range(10, 26)})
    plan = make_plan([heads, ffn], scores, HapConfig(target_params=0.72, max_group_ratio=0.5))
    assert [g.actions for g in plan] == ["ppkk", "k" * 16]
    assert "because single units are larger than that" in caplog.text


def test_implants_are_kept_again_where_nothing_was_removed_that_could_come_back():
    heads, ffn = heads_group("a", 8, width=16, hidden=64), ffn_group("a", 100, hidden=64)
    # All neurons become implants before the first head does; a head is several per cent of the whole.
    scores = scores_of({heads: range(200, 208), ffn: range(100)})
    config = HapConfig(per_cost=False, target_params=0.826, implant_ratio=1.0, max_group_ratio=1.0)
    plan = make_plan([heads, ffn], scores, config)
    assert 0.816 <= kept_share(plan, "target_params") <= 0.826
    assert [g.actions.count("i") > 0 for g in plan] == [True, True]


@pytest.mark.parametrize("implant_ratio", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(8))
def test_no_budget_leaves_an_implant_that_is_not_cheaper_than_what_it_replaces(implant_ratio, seed):
    groups = random_groups(seed)
    config = HapConfig(target_params=0.9, implant_ratio=implant_ratio)
    for g in make_plan(groups, random_scores(groups, seed), config):
        implanted = g.actions.count("i")
        assert bool(g.ranks) == bool(implanted)
        for s in g.group.slices:
            if s.tensor in g.ranks:
                rows, inputs = implanted * s.width, s.shape[1]
                assert g.ranks[s.tensor] * (rows + inputs) < rows * inputs


def test_implants_stay_where_keeping_one_would_leave_another_that_does_not_pay():
    heads = heads_group("a", 8, width=16, hidden=64)
    # One row of k alone has no cheaper factorisation, two have.
    slices = (
        Slice("q", (12, 64), 0, 0, 4, Role.PRODUCER),
        Slice("k", (3, 64), 0, 0, 1, Role.PRODUCER),
        Slice("o", (64, 12), 1, 0, 4, Role.CONSUMER),
    )
    uneven = Group("b:heads", Kind.HEADS, 3, slices)
    scores = scores_of({uneven: [0, 1, 100], heads: range(10, 18)})
    settings = {"implant_ratio": 1.0, "max_group_ratio": 1.0}
    cut = make_plan([heads, uneven], scores, HapConfig(prune_ratio=5.5 / 11, **settings))
    assert [g.actions.count("i") for g in cut] == [3, 2]
    # Room for one unit of b, 315 weights, but not for both, 502, nor for a head.
    target = (footprint(cut).params + 400) / (8 * 4144 + 3 * 576)
    plan = make_plan([heads, uneven], scores, HapConfig(target_params=target, **settings))
    assert [g.actions for g in plan] == [g.actions for g in cut]


def test_units_larger_than_the_tolerance_are_met_from_below_with_a_warning(caplog):
    heads = heads_group("a", 8)
    with caplog.at_level(logging.WARNING, logger="hap_hf"):
        plan = make_plan([heads], scores_of({heads: range(8)}), HapConfig(target_params=0.7))
    assert [g.actions for g in plan] == ["pppkkkkk"]
    assert "target_params=0.7: the plan keeps 0.6250 of the prunable part" in caplog.text


def test_a_budget_that_units_meet_exactly_gives_no_warning(caplog):
    heads = heads_group("a", 8)
    plan = make_plan([heads], scores_of({heads: range(8)}), HapConfig(target_params=0.625))
    assert [g.actions for g in plan] == ["pppkkkkk"]
    assert not caplog.records


@pytest.mark.parametrize("settings", [{}, {"implant_ratio": 0.5}, {"round_to": 8}])
def test_the_smallest_share_that_an_unreachable_budget_names_can_be_reached(settings):
    groups = [heads_group("a", 10), ffn_group("a", 100)]
    scores = random_scores(groups, 0)
    with pytest.raises(ConfigError, match=r"target_params=0.05 cannot be reached: with max_group_ratio=0.8") as caught:
        make_plan(groups, scores, HapConfig(target_params=0.05, max_group_ratio=0.8, **settings))
    smallest = float(str(caught.value).split("prunable part is ")[1].split(";")[0])
    plan = make_plan(groups, scores, HapConfig(target_params=smallest, max_group_ratio=0.8, **settings))
    assert kept_share(plan, "target_params") <= smallest
    with pytest.raises(ConfigError, match="cannot be reached"):
        make_plan(groups, scores, HapConfig(target_params=smallest - 2e-4, max_group_ratio=0.8, **settings))


def test_a_budget_in_macs_needs_groups_with_macs():
    whole = ffn_group("a", 10)
    slices = tuple(Slice(s.tensor, s.shape, s.dim, s.offset, s.width, s.role) for s in whole.slices)
    group = Group(whole.name, whole.kind, 10, slices)
    with pytest.raises(ConfigError, match=r"target_macs=0.5 needs groups that cost some macs, got 1 groups with none"):
        make_plan([group], scores_of({group: range(10)}), HapConfig(target_macs=0.5))


def test_macs_and_parameters_are_different_budgets():
    # The same slices, but attention products make heads dear in MACs only.
    groups = [heads_group("a", 50, core_macs=50_000.0), ffn_group("a", 500)]
    scores = random_scores(groups, 1)
    params = make_plan(groups, scores, HapConfig(target_params=0.5))
    macs = make_plan(groups, scores, HapConfig(target_macs=0.5))
    assert kept_share(macs, "target_macs") <= 0.5 < kept_share(params, "target_macs") + 0.4
    assert [g.actions for g in params] != [g.actions for g in macs]


def test_the_threshold_is_the_sensitivity_at_the_cut():
    ffn = ffn_group("a", 200)
    plan = make_plan([ffn], scores_of({ffn: range(200)}), HapConfig(per_cost=False, target_params=0.5))
    assert plan.provenance[0]["threshold"] == pytest.approx(100.0, abs=0)


@pytest.mark.parametrize("settings", [{}, {"implant_ratio": 0.3}, {"implant_ratio": 1.0}, {"round_to": 8}])
def test_fifty_thousand_units_take_seconds(settings):
    groups = [g for i in range(16) for g in (heads_group(f"l{i}", 16), ffn_group(f"l{i}", 3072))]
    scores = random_scores(groups[:2], 0)
    scores = scores_of({g: scores.sensitivity[groups[i % 2].name].tolist() for i, g in enumerate(groups)})
    start = time.perf_counter()
    plan = make_plan(groups, scores, HapConfig(target_params=0.75, **settings))
    assert time.perf_counter() - start < 10
    assert 0.74 <= kept_share(plan, "target_params") <= 0.75


@pytest.mark.parametrize(("setting", "per"), [("target_params", Params()), ("target_macs", Macs())])
def test_units_may_compete_by_sensitivity_per_cost(setting: str, per: Currency) -> None:
    """Every unit is as sensitive as it is large, but for one group that gives less for its size."""
    groups = [heads_group("a", 12), ffn_group("a", 60), ffn_group("b", 60)]
    cost = {g.name: g.params_per_unit if setting == "target_params" else g.macs_per_unit for g in groups}
    assert {g.name: per.unit_cost(g) for g in groups} == cost
    noise = random_scores(groups, 0)
    scores = scores_of({
        g: (cost[g.name] * (0.5 if g is groups[2] else 1) * (1 + noise.sensitivity[g.name] / 100)).tolist()
        for g in groups
    })
    by_value = HapConfig(**{setting: 0.9}, per_cost=False, max_group_ratio=1)
    by_cost = HapConfig(**{setting: 0.9}, per_cost=True, max_group_ratio=1)
    plain, dense = (make_plan(groups, scores, settings) for settings in (by_value, by_cost))
    assert [bool(g.units("p")) for g in dense] == [False, False, True]
    assert not any(g.units("p") for g in plain if g.group.kind == "heads")
    assert by_value.per is None
    assert by_cost.per == per
    assert [p.provenance[0]["settings"]["per_cost"] for p in (plain, dense)] == [False, True]
    # The threshold is that of the least sensitive unit that stays, in the same measure.
    b = next(g for g in dense if g.group is groups[2])
    kept = scores.sensitivity[groups[2].name][b.units("k")].min() / cost[groups[2].name]
    assert dense.provenance[0]["threshold"] == pytest.approx(kept.item())


def test_by_default_only_the_mask_of_the_gauss_newton_matrix_competes_by_cost() -> None:
    assert HapConfig(target_params=0.5).per == Params()
    assert HapConfig(target_macs=0.5).per == Macs()
    assert HapConfig(prune_ratio=0.5).per is None
    assert HapConfig(target_macs=0.5, method="hessian").per is None
    assert HapConfig(target_macs=0.5, method="hessian", per_cost=True).per == Macs()
    assert HapConfig(target_macs=0.5, per_cost=False).per is None


def test_by_cost_without_a_budget_to_count_costs_by_is_an_error() -> None:
    with pytest.raises(ConfigError, match="per_cost=True needs a budget to count costs by, got prune_ratio"):
        HapConfig(prune_ratio=0.5, per_cost=True)
