"""Amounts that count the whole model, and in which terms a report says an amount."""

import re
from dataclasses import replace

import pytest
from decisions import assert_same_state, bert, texts
from synthetic_groups import ffn_group, random_scores
from trainings import tiny_bert

from hap_hf import (
    Amount,
    ConfigError,
    HapConfig,
    carry_out_,
    decide,
    decide_again,
    find_groups,
    make_plan,
    measure_size,
    prune,
)
from hap_hf.names.outcome import Footprint, footprint, whole
from hap_hf.pipeline import prune_round
from hap_hf.selection import Round

pytestmark = pytest.mark.fast

QUICK = {"method": "magnitude", "progress": False}


def sizes(model):
    return measure_size(model, texts()[0])


@pytest.mark.parametrize(
    ("setting", "number"), [("target_model_params", "params"), ("target_model_macs", "macs")], ids=lambda v: v
)
def test_the_whole_model_is_as_small_as_was_asked(setting, number):
    dense, model, other = sizes(bert()), bert(), bert()
    prune(model, texts(), HapConfig(**{setting: 0.8}, kinds="ffn", **QUICK))
    prune(other, texts(), HapConfig(**{setting.replace("model_", ""): 0.8}, kinds="ffn", **QUICK))
    left, control = (getattr(sizes(m), number) / getattr(dense, number) for m in (model, other))
    assert 0.78 <= left <= 0.8
    assert control > 0.85  # a share of the prunable part leaves more


def test_rounds_end_at_the_share_of_the_model_that_they_began_with():
    model, config, place = bert(), HapConfig(target_model_params=0.7, **QUICK), Round(1, 2)
    dense = sizes(model).params
    _, place = prune_round(config.evidence(model, texts()), config, place)
    halfway = sizes(model).params / dense
    prune_round(config.evidence(model, texts()), config, replace(place, number=2))
    assert 0.83 <= halfway <= 0.85
    assert 0.69 <= sizes(model).params / dense <= 0.7


def test_another_amount_of_the_same_scores_counts_the_same_model():
    config = HapConfig(target_params=0.6, **QUICK)
    model = bert()
    decision = decide(config.evidence(model, texts()), config)
    again = decide_again(decision, HapConfig(target_model_params=0.75, **QUICK))
    assert 0.74 <= carry_out_(model, again).after.params / decision.before.params <= 0.75


def test_where_embeddings_alone_are_more_the_least_share_is_said_and_nothing_is_changed():
    model, same = tiny_bert(vocab_size=4000), tiny_bert(vocab_size=4000)
    least = 1 - footprint(whole(find_groups(model, texts()[0]))).params / sizes(model).params
    with pytest.raises(ConfigError, match=r"target_model_params=0.5 cannot be reached: .* embeddings") as error:
        prune(model, texts(), HapConfig(target_model_params=0.5, **QUICK))
    said = float(re.search(r"more than ([\d.]+)$", str(error.value))[1])
    assert least <= said <= least + 1e-4
    assert_same_state(model, same)


@pytest.mark.parametrize(
    ("setting", "part"), [("target_model_params", "the whole model"), ("target_params", "the prunable part")]
)
def test_what_limits_of_groups_leave_is_refused_before_anything_is_scored(setting, part, monkeypatch):
    config = HapConfig(**{setting: 0.42 if "model" in setting else 0.02}, progress=False, max_group_ratio=0.8)
    model, scored = bert(), []
    monkeypatch.setattr("hap_hf.pipeline.measure_and_score", lambda *args: scored.append(args))
    with pytest.raises(ConfigError, match=f"the smallest share of {part} is") as error:
        decide(config.evidence(model, texts()), config)
    assert not scored
    monkeypatch.undo()
    # The share that it names can be had.
    least = float(re.search(r"is ([\d.]+); ask", str(error.value))[1])
    allowed = HapConfig(**{setting: least}, **QUICK, max_group_ratio=0.8)
    report = decide(allowed.evidence(model, texts()), allowed).expected
    both = (report.prunable_before, report.prunable_after) if "model" not in setting else (report.before, report.after)
    assert both[1].params / both[0].params == pytest.approx(least, abs=2e-4)


@pytest.mark.parametrize("config", [HapConfig(target_params=0.5, **QUICK), HapConfig(target_model_params=0.8, **QUICK)])
def test_a_report_says_an_amount_in_both_terms(config):
    report = prune(bert(), texts(), config)
    of_groups, of_model = (float(x) / 100 for x in re.findall(r"([\d.]+)%", report.asked))
    gone = report.before.params - (of_model * report.before.params)
    assert of_groups == pytest.approx(1 - gone / report.prunable_before.params, abs=2e-3)
    asked = config.target_params or config.target_model_params
    assert {of_groups, of_model} == {asked, of_groups if config.target_model_params else of_model}
    assert of_groups < of_model
    assert report.asked in report.summary
    assert report.asked in " ".join(str(report).split())  # which folds lines


def test_units_have_no_share_of_the_model():
    assert "%" not in prune(bert(), texts(), HapConfig(prune_ratio=0.3, **QUICK)).asked
    groups = [ffn_group("a", 8)]
    assert Amount("units", 0.5).in_both_terms(groups, Footprint(1000, 1000)) is None
    # 264 = 8 * (16 + 1 + 16) parameters of the group.
    assert Amount("params", 0.5).in_both_terms(groups, Footprint(1000, 1000)) == (0.5, 1 - 0.132)
    assert Amount("model_params", 0.868).in_both_terms(groups, Footprint(1000, 1000)) == pytest.approx((0.5, 0.868))


def test_it_survives_json_and_says_what_it_needs():
    config = HapConfig(target_model_params=0.5)
    assert HapConfig.from_dict(config.to_dict()) == config
    bound = config.in_model([ffn_group("a", 100)], Footprint(4000, 0))
    assert HapConfig.from_dict(bound.to_dict()) == bound != config
    assert str(bound.asked) == str(config.asked) == "target_model_params=0.5"
    groups = [ffn_group("a", 10)]
    with pytest.raises(ConfigError, match=r"counts the whole model, .* HapConfig.in_model\(groups, measure_size"):
        make_plan(groups, random_scores(groups, 0), config)
    with pytest.raises(ConfigError, match=r"parts are shares of what can be pruned, and target_model_params=0\.5"):
        HapConfig(target_model_params=0.5, parts={"heads": 0.9})
