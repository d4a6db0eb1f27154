"""What the report says, against numbers worked out by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic_groups import ffn_group, heads_group, scores_of

from hap_hf.config import HapConfig
from hap_hf.criteria import Scores
from hap_hf.discovery import LeftWhole
from hap_hf.errors import ConfigError
from hap_hf.names.group import Group, Kind
from hap_hf.names.plan import GroupPlan, PruningPlan
from hap_hf.report import ModelSize, PruningReport, make_report
from hap_hf.selection import make_plan

BEFORE, AFTER = ModelSize(10_000, 2e6), ModelSize(9_000, 1.5e6)


def example() -> PruningReport:
    """Return a report of heads and neurons of which two heads and six neurons are below the threshold of 10."""
    heads, ffn, other = heads_group("l.0", 6), ffn_group("l.0", 12), ffn_group("l.1", 5)
    scores = scores_of(
        {heads: [30, 1, 31, 32, 2, 33], ffn: [-1, -2, 3, 4, 5, 9, 10, 11, 12, 13, 14, 15], other: [10] * 5},
        {heads: [1] * 6, ffn: [0.4] * 5 + [0.5, 0.5, 0.5, 0.5, 1, 0, 0], other: [1] * 5},
    )
    config = HapConfig(prune_ratio=8 / 18, implant_ratio=0.5, implant_cost=0.5, exclude="l.1.*")
    whole = LeftWhole(("l.2.attention:heads",), "removing units there does not equal masking them", Kind.HEADS)
    return reported([heads, ffn, other], scores, config, left_whole=[whole], seconds={"scoring": 1.5, "surgery": 0.25})


def reported(groups: list[Group], scores: Scores, config: HapConfig, **others: Any) -> PruningReport:
    """Return the report of the plan that follows from scores."""
    plan = make_plan(groups, scores, config)
    threshold = plan.provenance[0]["threshold"]
    return make_report(plan, BEFORE, AFTER, config=config, scores=scores, threshold=threshold, **others)


def test_the_rows_count_units():
    # 8 are cut and 4 of them removed: neurons 0 and 1, heads 1 and 4.
    heads, ffn, other = example().groups
    assert (heads.units, heads.kept, heads.implanted, heads.removed) == (6, 4, 0, 2)
    assert (ffn.units, ffn.kept, ffn.implanted, ffn.removed) == (12, 6, 4, 2)
    assert (other.units, other.kept, other.implanted, other.removed) == (5, 5, 0, 0)
    assert [g.kind for g in example().groups] == [Kind.HEADS, Kind.FFN, Kind.FFN]


def test_the_rows_count_parameters_and_macs():
    heads, ffn, other = example().groups
    # A head has 4 * 4 * 16 weights and 12 biases; 50 MACs of attention products, the others 10 a weight.
    assert (heads.before, heads.after) == (ModelSize(1608, 15660), ModelSize(1072, 10440))
    # Rank 0.5 * 4 * 16 / 20 = 1 for four rows of 16.
    assert ffn.before == ModelSize(12 * 33, 12 * 320)
    assert ffn.after == ModelSize(6 * 16 + 20 + 10 + 10 * 16, 10 * (6 * 16 + 20 + 10 * 16))
    assert other.before == other.after


def test_units_near_the_threshold_are_uncertain_and_exact_ones_are_not():
    heads, ffn, other = example().groups
    assert example().threshold == pytest.approx(10)
    # 9, 10 and 11 lie within 2 * 0.5, 12 does not, 13 not within 2 * 1; excluded groups had nothing to decide.
    assert (heads.uncertain, ffn.uncertain, other.uncertain) == (0, 3, None)
    assert example().uncertain_units == 3


def test_an_exact_method_is_never_uncertain():
    group = ffn_group("a", 10)
    scores = scores_of({group: range(10)})
    report = reported([group], scores, HapConfig(prune_ratio=0.5))
    assert report.uncertain_units == 0


def test_negative_sensitivities_are_counted():
    assert [g.negative for g in example().groups] == [0, 2, None]
    assert example().negative_share == pytest.approx(2 / 23)


def test_the_prunable_part_leaves_out_what_was_excluded():
    report = example()
    heads, ffn, _ = report.groups
    assert report.prunable_before == ModelSize(1608 + 396, 15660 + 3840)
    assert report.prunable_after.params == heads.after.params + ffn.after.params
    assert report.prunable_after.macs == pytest.approx(heads.after.macs + ffn.after.macs)


@pytest.mark.parametrize("setting", ["target_params", "target_macs"])
def test_the_kept_share_of_the_prunable_part_is_that_of_the_budget(setting):
    groups = [heads_group("a", 8), ffn_group("a", 400), ffn_group("b", 300)]
    scores = scores_of({g: range(g.num_units) for g in groups})
    log = reported(groups, scores, HapConfig(**{setting: 0.5}, exclude="b*")).to_log()
    key = {"target_params": "prune_prunable_params_kept", "target_macs": "prune_prunable_macs_kept"}[setting]
    assert 0.49 <= log[key] <= 0.5


def test_uneven_layers_can_be_read():
    heads = GroupPlan(heads_group("a", 12), "k" * 7 + "ii" + "ppp", {f"a.{p}.weight": 1 for p in "qkv"})
    ffn = GroupPlan(ffn_group("a", 3072), "k" * 1536 + "p" * 1535 + "i", {"a.up.weight": 1})
    report = make_report(PruningPlan(((heads, ffn),)), BEFORE, AFTER)
    assert [g.summary for g in report.groups] == ["heads 12 -> 7 (+2 implants)", "ffn 3,072 -> 1,536 (+1 implant)"]


def test_the_dict_is_strict_json_and_holds_everything():
    data = json.loads(json.dumps(example().to_dict(), allow_nan=False))
    assert data["before"] == {"params": 10_000, "macs": 2e6}
    assert data["after"] == {"params": 9_000, "macs": 1.5e6}
    assert data["groups"][1]["summary"] == "ffn 12 -> 6 (+4 implants)"
    assert data["groups"][1]["kind"] == "ffn"
    assert data["uncertain_units"] == 3
    assert data["seconds"] == {"scoring": 1.5, "surgery": 0.25}
    assert data["asked"] == "prune_ratio=0.444444, implant_ratio=0.5, implant_cost=0.5, implant_init=svd"
    assert data["method"] == "hessian, 8 probes, 3 batches"
    assert [entry["names"] for entry in data["left_whole"]] == [["l.2.attention:heads"]]
    assert [entry["kind"] for entry in data["left_whole"]] == ["heads"]
    assert [origin["settings"]["implant_ratio"] for origin in data["provenance"]] == [pytest.approx(0.5)]
    assert "plan" not in data


def test_the_dict_holds_the_plan_where_that_is_wanted():
    data = json.loads(json.dumps(example().to_dict(with_plan=True), allow_nan=False))
    assert PruningPlan.from_dict(data["plan"]) == example().plan
    assert PruningReport.from_dict(data) == example()


def test_numbers_that_are_not_finite_never_reach_json_or_a_log():
    group = ffn_group("a", 4)
    plan = PruningPlan(((GroupPlan(group, "kkkp"),),), ({"threshold": math.nan},))
    report = make_report(plan, ModelSize(5, math.inf), AFTER, threshold=math.nan, seconds={"scoring": math.nan})
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (data["threshold"], data["before"]["macs"], data["seconds"]["scoring"]) == (None, None, None)
    assert data["provenance"] == [{"threshold": None}]
    assert all(math.isfinite(v) for v in report.to_log().values())


def test_the_log_is_flat_numbers():
    log = example().to_log()
    assert all(type(v) in {int, float} for v in log.values())
    assert (log["prune_params_before"], log["prune_params"], log["prune_seconds"]) == (10_000, 9_000, 1.75)
    assert (log["prune_heads_kept"], log["prune_ffn_kept"], log["prune_ffn_implanted"]) == (4, 11, 4)


def test_the_markdown_holds_totals_and_every_group():
    text = example().to_markdown()
    assert "- parameters: 10,000 -> 9,000 (90.0%)" in text
    assert "- MACs per sample: 2,000,000 -> 1,500,000 (75.0%)" in text
    assert "| l.0:heads | heads 6 -> 4 | 1.07 k (66.7%) | 10.44 k (66.7%) | 0 |" in text
    assert "| whole model |  | 9.00 k (90.0%) | 1.50 M (75.0%) |  |" in text
    assert "- units of these groups: heads 6 -> 4, ffn 17 -> 11 (+4 implants)" in text
    assert "threshold: 10\n" in text
    assert "- method: hessian, 8 probes, 3 batches\n" in text
    assert "- asked for: prune_ratio=0.444444, implant_ratio=0.5, implant_cost=0.5, implant_init=svd\n" in text
    assert "- left whole: l.2.attention:heads: removing units there does not equal masking them\n" in text


def test_the_markdown_table_is_rectangular():
    lines = [line for line in example().to_markdown().splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3 + 2
    assert {line.count("|") for line in lines} == {6}


def test_the_text_is_plain_and_fits_a_terminal():
    text = str(example())
    assert text.isascii()
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 120
    assert "heads 6 -> 4" in text
    assert "10,000 -> 9,000 (90.0%)" in text


def test_names_from_strangers_break_out_of_nothing():
    name = "a|b\n# x [red]y[/red] <script> \x1b[31m"
    group = ffn_group("a", 4)
    hostile = Group(name, group.kind, 4, group.slices)
    plan = PruningPlan(((GroupPlan(hostile, "kkkp"),),), ({"method": "m\n- fake: 1"},))
    left_whole = [LeftWhole((f"{name}\n- fake: 1",), "r\n- fake: 1")]
    report = make_report(plan, BEFORE, AFTER, left_whole=left_whole, seconds={"s\n- fake: 1": 1.0})
    report = replace(report, asked="a\n- fake: 1", method="m\n- fake: 1")  # as from a file
    assert "| a\\|b?# x \\[red\\]y\\[/red\\] &lt;script> ?\\[31m |" in report.to_markdown()
    assert "\n- fake" not in report.to_markdown()
    assert "\n- fake" not in str(report)
    assert "\x1b" not in str(report)
    assert "[red]" in str(report)


def test_a_plan_from_disk_is_reported_without_scores():
    plan = PruningPlan.from_dict(PruningPlan(((GroupPlan(ffn_group("a", 4), "kkpp"),),)).to_dict())
    report = make_report(plan, BEFORE, AFTER)
    assert (report.threshold, report.uncertain_units, report.negative_share) == (None, None, None)
    assert (report.asked, report.method) == ("", "")
    assert "asked for" not in report.to_markdown()
    assert report.prunable_after == ModelSize(66, 640)
    assert "threshold" not in report.to_markdown()
    assert "ffn 4 -> 2" in str(report)


def test_a_report_is_about_one_stage():
    first = PruningPlan(((GroupPlan(ffn_group("a", 10), "kkkkkkkkpp"),),))
    second = PruningPlan(((GroupPlan(ffn_group("a", 8), "kkkkkkpp"),),))
    with pytest.raises(ConfigError, match="one stage, got a plan of 2"):
        make_report(first.then(second), BEFORE, AFTER)


def test_an_empty_plan_can_be_reported():
    report = make_report(PruningPlan(()), BEFORE, BEFORE)
    assert report.to_log()["prune_params"] == 10_000
    assert "whole model" in str(report)


def test_saving_writes_both_files_in_utf_8(tmp_path):
    folder = tmp_path / "new" / "folder"
    group = ffn_group("a", 4)
    named = Group("größe:ffn", group.kind, 4, group.slices)
    report = make_report(PruningPlan(((GroupPlan(named, "kkkp"),),)), BEFORE, AFTER)
    report.save(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["pruning_report.json", "pruning_report.md"]
    assert json.loads((folder / "pruning_report.json").read_text("utf-8")) == report.to_dict()
    assert (folder / "pruning_report.md").read_text("utf-8") == report.to_markdown()
    assert "größe".encode() in (folder / "pruning_report.json").read_bytes()


def test_a_saved_report_is_loaded_with_everything_but_its_plan(tmp_path):
    example().save(tmp_path)
    loaded = PruningReport.load(tmp_path)
    assert loaded == replace(example(), plan=PruningPlan(()))
    assert (loaded.to_markdown(), str(loaded)) == (example().to_markdown(), str(example()))
    assert loaded.to_log() == example().to_log()
    assert loaded.to_dict() == {**example().to_dict(), "provenance": []}


def test_a_loaded_report_of_numbers_that_are_not_finite_can_be_shown_and_logged(tmp_path):
    plan = PruningPlan(((GroupPlan(ffn_group("a", 4), "kkkp"),),))
    report = make_report(plan, ModelSize(5, math.inf), AFTER, threshold=math.nan, seconds={"scoring": math.nan})
    report.save(tmp_path)
    loaded = PruningReport.load(tmp_path)
    assert loaded.to_dict() == {**report.to_dict(), "provenance": []}
    assert all(math.isfinite(v) for v in loaded.to_log().values())
    assert "ffn 4 -> 3" in loaded.to_markdown()
    assert "ffn 4 -> 3" in str(loaded)


@pytest.mark.parametrize("values", [{}, [], {"groups": 3}, {"groups": [{}]}, {"groups": [], "before": {"params": 1}}])
def test_what_is_no_report_is_refused(values):
    with pytest.raises(ConfigError, match="expected the values of a pruning report"):
        PruningReport.from_dict(values)


@pytest.mark.parametrize("missing", ["groups", "before", "prunable_after", "threshold", "negative_share", "seconds"])
def test_a_report_that_lacks_something_is_refused_by_its_name(missing):
    values = example().to_dict()
    del values[missing]
    with pytest.raises(ConfigError, match=f"expected the values of a pruning report, got some without '{missing}'"):
        PruningReport.from_dict(values)


@pytest.mark.parametrize("failing", [1, 2])
def test_a_save_that_fails_leaves_no_half_file_and_no_draft(failing, tmp_path, monkeypatch):
    old, new = example(), make_report(PruningPlan(()), BEFORE, AFTER)
    old.save(str(tmp_path))
    write, calls = Path.write_text, []

    def fail_once(self, data, **kwargs):
        calls.append(self)
        if len(calls) == failing:
            write(self, data[: len(data) // 2], **kwargs)
            raise OSError("disk full")
        return write(self, data, **kwargs)

    monkeypatch.setattr(Path, "write_text", fail_once)
    with pytest.raises(OSError, match="disk full"):
        new.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pruning_report.json", "pruning_report.md"]
    assert json.loads((tmp_path / "pruning_report.json").read_text("utf-8")) in (old.to_dict(), new.to_dict())
    assert (tmp_path / "pruning_report.md").read_text("utf-8") == old.to_markdown()
