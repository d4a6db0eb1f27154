"""HAP's rule against a brute-force sort, and what each group has to say about it."""

import json
import logging
import math
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from synthetic_groups import ffn_group, heads_group, random_scores, scores_of

from hap_hf.config import HapConfig
from hap_hf.criteria import Hessian
from hap_hf.errors import ConfigError, CurvatureError
from hap_hf.names.amount import Amount
from hap_hf.names.group import Group, Kind, Role, Slice
from hap_hf.names.outcome import footprint
from hap_hf.names.plan import PruningPlan
from hap_hf.selection import make_plan, select_groups
from hap_hf.version import __version__

pytestmark = pytest.mark.fast


def actions_of(plan: PruningPlan) -> dict[str, str]:
    return {g.group.name: g.actions for g in plan}


def brute_force(groups, scores, cut, removed):
    """Return the letters of each group by the global order; only the best unit of each group stays in any case."""
    units = sorted(
        (scores.sensitivity[g.name][u].item(), i, u) for i, g in enumerate(groups) for u in range(g.num_units)
    )
    letters = {g.name: ["k"] * g.num_units for g in groups}
    for rank, (_, i, u) in enumerate(units):
        is_best = all(j != i for _, j, _ in units[rank + 1 :])
        if rank < cut and not is_best:
            letters[groups[i].name][u] = "p" if rank < removed else "i"
    return {name: "".join(row) for name, row in letters.items()}


def cut_units(plan: PruningPlan) -> set[tuple[str, int]]:
    return {(g.group.name, u) for g in plan for u, a in enumerate(g.actions) if a != "k"}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ratio", [0.1, 0.29, 0.5, 0.7])
def test_without_implants_the_cut_is_that_of_a_brute_force_sort(seed, ratio):
    groups = [heads_group("a", 12), ffn_group("a", 50), heads_group("b", 12), ffn_group("b", 26)]
    scores = random_scores(groups, seed)
    plan = make_plan(groups, scores, HapConfig(prune_ratio=ratio, max_group_ratio=1.0))
    cut = round(ratio * 100)
    assert actions_of(plan) == brute_force(groups, scores, cut, cut)


@pytest.mark.parametrize(("ratio", "implant_ratio", "cut", "removed"), [(0.5, 0.2, 20, 16), (0.6, 0.5, 24, 12)])
def test_implants_are_the_most_sensitive_of_the_cut_units(ratio, implant_ratio, cut, removed):
    groups = [heads_group("a", 20), heads_group("b", 20)]
    # Interleaved, so that both groups are cut alike and each has implants that pay.
    scores = scores_of({groups[0]: range(0, 40, 2), groups[1]: range(1, 40, 2)})
    config = HapConfig(prune_ratio=ratio, implant_ratio=implant_ratio)
    assert actions_of(make_plan(groups, scores, config)) == brute_force(groups, scores, cut, removed)


def test_the_number_of_implants_is_what_the_reference_code_leaves_over():
    group = heads_group("a", 10)
    plan = make_plan([group], scores_of({group: range(10)}), HapConfig(prune_ratio=0.75, implant_ratio=0.25))
    # int(7.5) = 7 are cut, int(0.75 * 7) = 5 removed.
    assert actions_of(plan)["a:heads"] == "pppppiikkk"


def test_ties_are_broken_by_group_and_then_by_index():
    groups = [ffn_group("b", 4), ffn_group("a", 4)]
    scores = scores_of({groups[0]: [2, 1, 2, 1], groups[1]: [2, 2, 1, 2]})
    plan = make_plan(groups, scores, HapConfig(prune_ratio=0.5))
    assert actions_of(plan) == {"b:ffn": "ppkp", "a:ffn": "kkpk"}


def test_a_share_that_is_a_whole_number_of_units_is_not_lost_to_rounding():
    group = ffn_group("a", 100)
    plan = make_plan([group], scores_of({group: range(100)}), HapConfig(prune_ratio=0.29))
    assert int(0.29 * 100) == 28
    assert actions_of(plan)["a:ffn"].count("p") == 29


@pytest.mark.parametrize("seed", range(5))
def test_a_larger_ratio_cuts_what_a_smaller_one_cuts(seed):
    groups = [heads_group("a", 8), ffn_group("a", 40), ffn_group("b", 30)]
    scores = random_scores(groups, seed)
    cuts = [cut_units(make_plan(groups, scores, HapConfig(prune_ratio=r))) for r in (0.1, 0.3, 0.5, 0.8, 0.95)]
    for smaller, larger in pairwise(cuts):
        assert smaller < larger


def test_the_best_unit_of_a_group_stays_and_not_the_first():
    groups = [heads_group("a", 4), ffn_group("b", 100)]
    scores = scores_of({groups[0]: [0.0, 3.0, 1.0, 2.0], groups[1]: range(10, 110)})
    plan = make_plan(groups, scores, HapConfig(prune_ratio=0.5, max_group_ratio=1.0))
    assert actions_of(plan)["a:heads"] == "pkpp"


def test_no_more_than_the_cap_of_a_group_is_cut_and_the_best_come_back():
    groups = [heads_group("a", 10), ffn_group("b", 100)]
    scores = scores_of({groups[0]: [9, 0, 8, 1, 7, 2, 6, 3, 5, 4], groups[1]: range(10, 110)})
    plan = make_plan(groups, scores, HapConfig(prune_ratio=0.5, max_group_ratio=0.6))
    assert actions_of(plan)["a:heads"] == "kpkpkpkppp"


def test_implants_are_the_first_that_the_cap_gives_back():
    groups = [heads_group("a", 10), ffn_group("b", 10)]
    scores = scores_of({groups[0]: range(10), groups[1]: range(10, 20)})
    config = HapConfig(prune_ratio=0.5, implant_ratio=0.5, max_group_ratio=0.7)
    assert actions_of(make_plan(groups, scores, config))["a:heads"] == "pppppiikkk"


@pytest.mark.parametrize(
    ("num_units", "ratio", "survivors"), [(40, 0.5, 24), (40, 0.6, 16), (37, 0.1, 37), (37, 0.5, 24)]
)
def test_ffn_widths_are_rounded_up_to_a_multiple(num_units, ratio, survivors):
    # The heads are out of reach, and take the ratio's rest.
    group, heads = ffn_group("a", num_units), heads_group("b", 10)
    total = num_units + 10
    scores = scores_of({group: range(num_units), heads: range(100, 110)})
    config = HapConfig(prune_ratio=(ratio * num_units + 0.01) / total, round_to=8)
    if survivors == num_units:
        with pytest.raises(ConfigError, match="round_to=8 brings back 3"):
            make_plan([group, heads], scores, config)
    else:
        actions = actions_of(make_plan([group, heads], scores, config))
        assert actions["a:ffn"] == "p" * (num_units - survivors) + "k" * survivors


def test_rounding_leaves_heads_alone():
    group = heads_group("a", 12)
    plan = make_plan([group], scores_of({group: range(12)}), HapConfig(prune_ratio=0.5, round_to=8))
    assert actions_of(plan)["a:heads"].count("p") == 6


def test_rounding_keeps_the_number_of_implants_and_makes_them_the_least_sensitive_survivors():
    group = ffn_group("a", 40)
    config = HapConfig(prune_ratio=0.5, implant_ratio=0.4, round_to=16)
    # 12 are removed and 8 implanted; 28 survivors are rounded up to 32.
    assert (
        actions_of(make_plan([group], scores_of({group: range(40)}), config))["a:ffn"] == "p" * 8 + "i" * 8 + "k" * 24
    )


def test_ranks_are_those_worked_out_by_hand():
    group = heads_group("a", 8, width=4, hidden=16)
    plan = make_plan([group], scores_of({group: range(8)}), HapConfig(prune_ratio=0.75, implant_ratio=0.5))
    (only,) = plan
    # 3 heads of 4 rows and 16 inputs: 0.25 * 12 * 16 / (12 + 16) = 1.7.
    assert only.actions == "pppiiikk"
    assert dict(only.ranks) == {"a.q.weight": 1, "a.k.weight": 1, "a.v.weight": 1}


def test_a_fused_projection_has_one_rank_for_all_its_rows():
    slices = [Slice("c.weight", (16, 96), 1, third * 32, 4, Role.PRODUCER, 1.0) for third in range(3)]
    group = Group("c:heads", Kind.HEADS, 8, (*slices, Slice("o.weight", (32, 16), 0, 0, 4, Role.CONSUMER, 1.0)))
    plan = make_plan(
        [group], scores_of({group: range(8)}), HapConfig(prune_ratio=0.5, implant_ratio=1, implant_cost=0.5)
    )
    (only,) = plan
    # 4 heads of 3 * 4 rows and 16 inputs: 0.5 * 48 * 16 / (48 + 16) = 6.
    assert dict(only.ranks) == {"c.weight": 6}
    # 4 kept heads of 4 * 4 * 16 weights; implants keep their 4 * 16 consuming ones and get 6 * (48 + 16).
    assert footprint([only]).params == 4 * 256 + 4 * 64 + 6 * 64


def test_implants_that_would_not_be_cheaper_are_removed_with_the_numbers(caplog):
    groups = [ffn_group("a", 10), heads_group("b", 10)]
    # The most sensitive cut unit of the FFN is one neuron: one row has no cheaper factorisation.
    scores = scores_of({groups[0]: [0, 1, 2, 3, 4.5, 20, 21, 22, 23, 24], groups[1]: [*range(4, 10), 30, 31, 32, 33]})
    with caplog.at_level(logging.INFO, logger="hap_hf"):
        plan = make_plan(groups, scores, HapConfig(prune_ratio=0.5, implant_ratio=0.6))
    assert actions_of(plan) == {"a:ffn": "pppppkkkkk", "b:heads": "iiiiikkkkk"}
    assert "a.up.weight: 1 rows of 16 inputs are 16 weights, rank 1 has 17" in caplog.text


def test_an_implant_of_equal_size_is_not_cheaper():
    group = ffn_group("a", 10, hidden=2)
    (only,) = make_plan([group], scores_of({group: range(10)}), HapConfig(prune_ratio=0.4, implant_ratio=0.5))
    # 2 rows of 2 inputs are 4 weights, and so is rank 1.
    assert only.actions == "pppp" + "k" * 6


def test_a_plan_without_the_implants_that_were_asked_for_warns_with_the_numbers(caplog):
    group = ffn_group("a", 20)
    plan = make_plan([group], scores_of({group: range(20)}), HapConfig(prune_ratio=0.5, implant_ratio=0.1))
    assert actions_of(plan)["a:ffn"] == "p" * 10 + "k" * 10
    assert "implant_ratio=0.1 of 10 cut units asks for 1 implants, and the plan has none" in caplog.text
    assert "16 weights, rank 1 has 17" in caplog.text


def test_a_layer_that_already_has_an_implant_gets_no_other():
    slices = (
        Slice("f.implant_up", (20, 3), 0, 0, 1, Role.FACTOR, 1.0),
        Slice("down.weight", (16, 20), 1, 0, 1, Role.CONSUMER, 1.0),
    )
    group = Group("f:ffn", Kind.FFN, 20, slices)
    (only,) = make_plan([group], scores_of({group: range(20)}), HapConfig(prune_ratio=0.5, implant_ratio=0.5))
    assert only.actions == "p" * 10 + "k" * 10
    assert not only.ranks


def test_groups_that_are_not_selected_stay_whole_and_do_not_count():
    groups = [heads_group("a", 4), ffn_group("a", 10), ffn_group("b", 10)]
    scores = scores_of({groups[1]: range(10)})
    config = HapConfig(prune_ratio=0.5, kinds="ffn", exclude="b.up*")
    assert actions_of(make_plan(groups, scores, config)) == {
        "a:heads": "kkkk",
        "a:ffn": "pppppkkkkk",
        "b:ffn": "kkkkkkkkkk",
    }


@pytest.mark.parametrize("pattern", ["b:ffn", "b*", "b.down.weight", "[b].down.?eight"])
def test_patterns_match_names_of_groups_and_tensors(pattern):
    groups = [ffn_group("a", 10), ffn_group("b", 10), ffn_group("B", 10)]
    left = select_groups(groups, HapConfig(prune_ratio=0.5, exclude=pattern))
    assert [g.name for g in left] == ["a:ffn", "B:ffn"]


def test_provenance_says_how_the_plan_came_about():
    group = heads_group("a", 10)
    method = Hessian(num_probes=8, stop_share=0.01)
    config = HapConfig(prune_ratio=0.4, implant_ratio=0.5, seed=7, precision="bf16", exclude=(), method=method)
    scores = replace(scores_of({group: [0.5 * u for u in range(10)]}), settled=True)
    (provenance,) = make_plan([group], scores, config).provenance
    assert provenance["threshold"] == pytest.approx(2.0, abs=0)
    assert {k: provenance[k] for k in ("num_probes", "settled", "num_batches", "num_loss_terms")} == {
        "num_probes": 8,
        "settled": True,
        "num_batches": 3,
        "num_loss_terms": 24,
    }
    settings = provenance["settings"]
    assert {k: settings[k] for k in ("hap_hf", "seed", "precision")} == {
        "hap_hf": __version__,
        "seed": 7,
        "precision": "bf16",
    }
    assert {k: settings["method"][k] for k in ("name", "num_probes", "stop_share")} == {
        "name": "hessian",
        "num_probes": 8,
        "stop_share": 0.01,
    }
    assert (settings["prune_ratio"], settings["target_params"], settings["implant_ratio"]) == (0.4, None, 0.5)
    assert HapConfig.from_dict(settings) == config


def assert_survives_json(groups, config):
    """Assert that a plan of the first two groups is the same after JSON, and its settings are those it was made by."""
    plan = make_plan(groups, random_scores(groups[:2], 0), config)
    assert PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict(), allow_nan=False))) == plan
    assert PruningPlan.from_dict(plan.to_dict()) == plan
    assert HapConfig.from_dict(plan.provenance[0]["settings"]) == config


@pytest.mark.parametrize("amount", [{"target_macs": 0.6}, {"amount": Amount("params", 0.6)}], ids=["share", "amount"])
def test_a_plan_with_its_provenance_survives_json(amount):
    groups = [heads_group("a", 10), ffn_group("a", 40)]
    assert_survives_json(groups, HapConfig(**amount, implant_ratio=0.3, method=Hessian(num_probes=4)))


def test_a_plan_with_a_long_list_of_exclusions_survives_json():
    groups = [heads_group("a", 10), ffn_group("a", 40), *(ffn_group(f"b.{i}", 4) for i in range(300))]
    assert_survives_json(groups, HapConfig(prune_ratio=0.5, exclude=[g.name for g in groups[2:]]))


@dataclass(frozen=True, kw_only=True)
class Weighted(Hessian):
    """A criterion of a user with a setting of several values."""

    weights: tuple[float, ...] = (1.0, 0.5)


def test_a_plan_by_a_criterion_with_a_setting_of_several_values_can_be_recorded():
    group = ffn_group("a", 10)
    config = HapConfig(prune_ratio=0.5, method=Weighted())
    written = make_plan([group], scores_of({group: range(10)}), config).to_dict()
    # Recording reads it back without JSON in between.
    assert PruningPlan.from_dict(written) == PruningPlan.from_dict(json.loads(json.dumps(written)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_sensitivities_that_are_not_finite_are_an_error(bad):
    group = ffn_group("a", 4)
    with pytest.raises(CurvatureError, match=r"unit 2 of a:ffn and 0 others"):
        make_plan([group], scores_of({group: [0, 1, bad, 3]}), HapConfig(prune_ratio=0.5))


def test_scores_that_lack_a_group_are_an_error():
    groups = [ffn_group("a", 4), ffn_group("b", 4)]
    with pytest.raises(ConfigError, match="each of the 4 units of b:ffn, got none"):
        make_plan(groups, scores_of({groups[0]: range(4)}), HapConfig(prune_ratio=0.5))


def test_scores_of_another_length_are_an_error():
    group = ffn_group("a", 4)
    with pytest.raises(ConfigError, match=r"each of the 4 units of a:ffn, got shape \[5\]"):
        make_plan([group], scores_of({group: range(5)}), HapConfig(prune_ratio=0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prune_ratio": 0}, "prune_ratio=0 of 20 units is less than one unit"),
        ({"prune_ratio": 0.04}, "prune_ratio=0.04 of 20 units is less than one unit"),
        ({"prune_ratio": 0.2, "max_group_ratio": 0.05}, "cuts 4 of 20 units, of which max_group_ratio=0.05"),
        ({"prune_ratio": 0.5, "kinds": "heads"}, r"no groups of the kinds \['heads'\], only \['ffn'\]"),
        ({"prune_ratio": 0.5, "exclude": "a*"}, r"exclude=\['a\*'\] leaves none of 2 groups"),
        ({"prune_ratio": 0.2, "round_to": 64}, "round_to=64 brings back 4"),
    ],
)
def test_a_plan_that_would_change_nothing_is_an_error(settings, message):
    groups = [ffn_group("a", 10), ffn_group("aa", 10)]
    with pytest.raises(ConfigError, match=f"would change nothing: .*{message}"):
        make_plan(groups, scores_of({g: range(10) for g in groups}), HapConfig(**settings))


def test_no_groups_at_all_are_an_error():
    with pytest.raises(ConfigError, match="would change nothing: there are no groups"):
        make_plan([], scores_of({}), HapConfig(prune_ratio=0.5))


def test_a_pattern_that_matches_nothing_is_an_error():
    group = ffn_group("a", 10)
    with pytest.raises(ConfigError, match=r"exclude patterns \['layer.9\*'\] match no group"):
        make_plan([group], scores_of({group: range(10)}), HapConfig(prune_ratio=0.5, exclude=["layer.9*"]))


def test_two_groups_of_the_same_name_are_an_error():
    group = ffn_group("a", 10)
    with pytest.raises(ConfigError, match=r"must be unique, got \['a:ffn'\] twice"):
        make_plan([group, group], scores_of({group: range(10)}), HapConfig(prune_ratio=0.5))


def test_scores_in_half_precision_on_a_graph_are_taken_as_they_are():
    group = ffn_group("a", 4)
    scores = scores_of({group: range(4)})
    scores.sensitivity[group.name] = torch.arange(4.0, dtype=torch.bfloat16).requires_grad_()
    assert actions_of(make_plan([group], scores, HapConfig(prune_ratio=0.5)))["a:ffn"] == "ppkk"
