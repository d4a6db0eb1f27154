"""Patterns of groups: what is included, what is excluded, and what is said of a pattern that matches nothing."""

import pytest
from synthetic_groups import ffn_group, heads_group, random_scores

from hap_hf import ConfigError, HapConfig, make_plan
from hap_hf.arguments import config_of, pruning_arguments
from hap_hf.selection import select_groups

pytestmark = pytest.mark.fast

GROUPS = [g for n in range(4) for g in (heads_group(f"enc.layer.{n}", 8), ffn_group(f"enc.layer.{n}", 48))]


def names(**settings):
    return [g.name for g in select_groups(GROUPS, HapConfig(target_params=0.5, **settings))]


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"include": "*layer.3*"}, ["enc.layer.3:heads", "enc.layer.3:ffn"]),
        ({"include": ["*layer.3*", "*layer.1*"], "kinds": "ffn"}, ["enc.layer.1:ffn", "enc.layer.3:ffn"]),
        ({"include": "*.3.up.weight"}, ["enc.layer.3:ffn"]),  # by the name of a tensor
        ({"include": "*:ffn", "exclude": ["*layer.[0-2]*"]}, ["enc.layer.3:ffn"]),
    ],
)
def test_what_is_included_less_what_is_excluded_may_go(settings, left):
    assert names(**settings) == left


def test_without_patterns_all_may_go_and_the_others_stay_whole_with_one():
    assert names() == [g.name for g in GROUPS]
    plan = make_plan(GROUPS, random_scores(GROUPS, 0), HapConfig(target_params=0.5, include="*layer.3*"))
    touched = {g.group.name for g in plan if "p" in g.actions}
    assert touched == {"enc.layer.3:heads", "enc.layer.3:ffn"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"include": "layer.3"},
            r"include patterns \['layer.3'\] match no group.*'\*layer.3\*' matches ",
        ),
        ({"exclude": "enc.layer.9:ffn"}, r"exclude patterns .* near names are \['enc.layer.\d:ffn', "),
        ({"exclude": ["*:ffn", "qqq"]}, r"exclude patterns \['qqq'\] match no group .* groups are .* and so on"),
        ({"include": "*layer.3*", "exclude": "*.3*"}, r"include=.* and exclude=.* leave none of 8 groups"),
        ({"include": "*:heads", "kinds": "ffn"}, r"include=\['\*:heads'\] leaves none of 4 groups of the kinds"),
        ({"parts": {"layer.3": 0.9}}, r"parts \['layer.3'\] match no kind, no group .* '\*layer.3\*' matches"),
    ],
)
def test_a_pattern_that_matches_nothing_names_what_is_near(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(GROUPS, random_scores(GROUPS, 0), HapConfig(target_params=0.5, **settings))


def test_include_is_a_setting_that_survives_json_and_a_flag():
    config = HapConfig(target_params=0.5, include="*layer.3*")
    assert HapConfig.from_dict(config.to_dict()) == config
    assert HapConfig(target_params=0.5).to_dict() != config.to_dict()
    assert config_of(pruning_arguments()(target_params=0.5, include=["*layer.3*"])) == config
    with pytest.raises(ConfigError, match="include must hold strings"):
        HapConfig(target_params=0.5, include=[3])
