"""Units and scores that a report carries and its files keep."""

import json

import pytest
import torch
from documented import bert, text_batches

from hap_hf import ConfigError, HapConfig, PruningReport, prune
from hap_hf.report.scores import SCORES_FILE, load_scores


@pytest.fixture(scope="module")
def report():
    return prune(bert(), text_batches(), HapConfig(target_params=0.5, implant_ratio=0.4, progress=False, num_passes=2))


def test_units_are_those_of_the_plan(report):
    for group, planned in zip(report.groups, report.plan, strict=True):
        assert group.kept_units == planned.units("k")
        assert group.implanted_units == planned.units("i")
        assert group.removed_units == planned.units("p")
        assert len(group.removed_units) == group.removed


def test_scores_and_units_are_read_back(report, tmp_path):
    report.save(tmp_path)
    again = PruningReport.load(tmp_path)
    assert again.groups == report.groups
    assert (again.loss_before, again.loss_after) == (report.loss_before, report.loss_after)
    for part in ("sensitivity", "standard_error", "gone_in"):
        mine, read = getattr(report.scores, part), getattr(again.scores, part)
        assert mine.keys() == read.keys()
        assert all(torch.equal(mine[name], read[name]) for name in mine)
    assert again.scores.method == "reconstruction"


def test_a_report_without_scores_takes_old_ones_away(report, tmp_path):
    report.save(tmp_path)
    assert (tmp_path / SCORES_FILE).is_file()
    PruningReport.from_dict(report.to_dict()).save(tmp_path)
    assert not (tmp_path / SCORES_FILE).exists()


def test_reports_of_earlier_versions_have_numbers_only(report):
    values = json.loads(json.dumps(report.to_dict()))
    for group in values["groups"]:
        del group["actions"], group["limit"]
    del values["loss_before"], values["loss_after"]
    old = PruningReport.from_dict(values)
    assert old.loss_after is None
    with pytest.raises(ConfigError, match="numbers only, by an earlier version"):
        old.groups[0].removed_units  # noqa: B018


def test_other_files_are_no_scores(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / SCORES_FILE)
    with pytest.raises(ConfigError, match="expected scores in"):
        load_scores(tmp_path / SCORES_FILE)


def test_the_summary_is_one_line_with_both_shares(report):
    assert report.summary.startswith("pruned to ")
    assert "\n" not in report.summary
    left = report.prunable_after.params / report.prunable_before.params
    assert f"{left:.1%} of the prunable ones" in report.summary
    assert f"({report.after.params / report.before.params:.1%}) parameters" in report.summary
