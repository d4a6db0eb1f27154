"""Amounts by part, multiples for shards, and equal widths: what each group keeps, in every currency."""

from dataclasses import replace

import pytest
import torch
from decisions import texts
from synthetic_groups import ffn_group, heads_group, random_scores
from trainings import tiny_bert

from hap_hf import ConfigError, HapConfig, HessianPruner, make_plan, plan_of, prune
from hap_hf.names.outcome import footprint, whole
from hap_hf.selection.make import choose
from hap_hf.selection.members import portions

pytestmark = pytest.mark.fast

GROUPS = [
    *(g for n in ("vision.0", "vision.1") for g in (heads_group(n, 8), ffn_group(n, 48))),
    *(g for n in ("text.0", "text.1") for g in (heads_group(n, 8), ffn_group(n, 64))),
]
AMOUNTS = {"prune_ratio": 0.5, "target_params": 0.5, "target_macs": 0.5}


def share_of(plans, setting):
    """Return the share of what some groups cost that is left, counted anew."""
    if setting == "prune_ratio":
        return sum(len(g.actions) - g.actions.count("p") for g in plans) / sum(len(g.actions) for g in plans)
    full, left = footprint(whole(g.group for g in plans)), footprint(plans)
    return left.params / full.params if setting == "target_params" else left.macs / full.macs


def stage_of(setting, parts=None, **settings):
    config = HapConfig(**{setting: AMOUNTS[setting]}, parts=parts, max_group_ratio=1.0, **settings)
    (stage,) = make_plan(GROUPS, random_scores(GROUPS, 0), config).stages
    return stage


@pytest.mark.parametrize("setting", AMOUNTS)
def test_each_part_keeps_its_own_share_and_the_rest_that_of_the_amount(setting):
    stage = stage_of(setting, {"vision*:ffn": 0.75, "heads": 0.25})
    keep = {0.75: 0.25, 0.25: 0.75} if setting == "prune_ratio" else {0.75: 0.75, 0.25: 0.25}
    members = {
        keep[0.75]: [g for g in stage if g.group.name.startswith("vision") and g.group.kind == "ffn"],
        keep[0.25]: [g for g in stage if g.group.kind == "heads"],
        0.5: [g for g in stage if g.group.name.startswith("text") and g.group.kind == "ffn"],
    }
    assert sum(map(len, members.values())) == len(stage)
    for wanted, plans in members.items():
        room = max(1 / sum(len(g.actions) for g in plans), 0.02)
        assert wanted - room <= share_of(plans, setting) <= wanted + 1e-9
    assert share_of(stage_of(setting), setting) != share_of(stage, setting)  # the control: one amount for all


def test_parts_stay_whole_where_all_is_kept_and_the_first_that_fits_counts():
    stage = stage_of("target_params", {"text*": 1.0, "ffn": 0.3})
    assert all(set(g.actions) == {"k"} for g in stage if g.group.name.startswith("text"))
    config = HapConfig(target_params=0.5, parts={"text*": 0.9, "ffn": 0.3})
    assert [(name, amount.keep, len(found)) for name, amount, found in portions(GROUPS, config)] == [
        ("", 0.5, 2),
        ("text*", 0.9, 4),
        ("ffn", 0.3, 2),
    ]


def test_a_part_that_is_too_small_to_lose_a_unit_is_noted_and_one_that_cannot_be_met_is_an_error():
    config, scores = HapConfig(prune_ratio=0.5, parts={"vision.0:heads": 0.01}), random_scores(GROUPS, 0)
    choice = choose(GROUPS, scores, config)
    assert any("for vision.0:heads" in note for _, note in choice.notes)
    reason = choose(GROUPS, scores, HapConfig(target_params=0.5, parts={"heads": 0.001}))
    assert reason.startswith("target_params=0.001 cannot be reached")
    assert reason.endswith("for heads")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"heads": 1.5}, r"parts\['heads'\] must lie in \(0, 1\]"),
        ({"heads": True}, r"parts\['heads'\] must be a number"),
        ({3: 0.5}, "got the key 3"),
        (["heads"], "parts must map kinds or patterns to shares"),
    ],
)
def test_parts_that_are_no_shares_are_refused(parts, message):
    with pytest.raises(ConfigError, match=message):
        HapConfig(target_params=0.5, parts=parts)


def test_a_pattern_that_matches_nothing_and_several_rounds_are_refused():
    with pytest.raises(ConfigError, match=r"parts \['visoin\*'\] match no kind, no group"):
        stage_of("target_params", {"visoin*": 0.5})
    with pytest.raises(ConfigError, match="takes one round, got num_rounds=2"):
        HessianPruner(HapConfig(target_params=0.5, parts={"ffn": 0.4}), num_rounds=2)


def test_settings_of_parts_survive_json():
    config = HapConfig(target_params=0.5, parts={"vision*": 0.8}, shards=2, equal_widths=True)
    assert HapConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("shards", [2, 4])
@pytest.mark.parametrize("setting", AMOUNTS)
def test_every_group_keeps_a_multiple_of_the_shards(setting, shards):
    stage = stage_of(setting, shards=shards, round_to=3)
    assert {g.survivors % shards for g in stage} == {0}
    assert {g.survivors % 3 for g in stage if g.group.kind == "ffn" and g.pruned} == {0}
    assert any(g.pruned for g in stage if g.group.kind == "heads")
    assert {g.survivors % shards for g in stage_of(setting)} != {0}  # the control


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("setting", AMOUNTS)
def test_layers_of_one_size_stay_of_one_size(setting, passes):
    scores = random_scores(GROUPS, 0)
    gone = {g.name: torch.arange(g.num_units) % passes for g in GROUPS}
    config = HapConfig(**{setting: 0.5}, equal_widths=True, max_group_ratio=1.0)
    (stage,) = make_plan(GROUPS, replace(scores, gone_in=gone) if passes > 1 else scores, config).stages
    widths = {}
    for g in stage:
        widths.setdefault((g.group.kind, g.group.num_units), set()).add(g.survivors)
    assert all(len(found) == 1 for found in widths.values())
    assert 0.4 <= share_of(stage, setting) <= 0.5 + 1e-9
    for g in stage if passes == 1 else ():  # the least sensitive ones of each group
        values = scores.sensitivity[g.group.name]
        assert values[g.units("p")].max() <= values[g.units("k")].min()
    assert len({g.survivors for g in stage_of(setting) if g.group.kind == "ffn"}) > 1  # the control


def test_a_model_is_pruned_by_parts_in_passes():
    model = tiny_bert(intermediate_size=24)
    config = HapConfig(target_params=0.6, parts={"*layer.0*": 0.9}, num_passes=2, max_batches=1, progress=False)
    report = prune(model, texts(), config)
    assert "parts={'*layer.0*': 0.9}" in str(report)
    (stage,) = plan_of(model).stages
    first = [g for g in stage if "layer.0" in g.group.name]
    assert 0.8 < share_of(first, "target_params") <= 0.9
    rest = [g for g in stage if "layer.0" not in g.group.name]
    assert share_of(rest, "target_params") <= 0.6
