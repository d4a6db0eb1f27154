"""Several amounts from one scoring."""

import copy
import io
import sys

import pytest
import torch
from documented import bert, text_batches

from hap_hf import ConfigError, HapConfig, measure_size, prune
from hap_hf.evidence.evidence import Evidence
from hap_hf.evidence.mean import mean_loss
from hap_hf.tradeoff import Tradeoff, measure, measure_tradeoff

CONFIG = HapConfig(target_params=0.5, method="taylor", progress=False)


def test_each_point_is_what_pruning_alone_would_leave():
    model, batches = bert(), text_batches()
    before = copy.deepcopy(model.state_dict())
    found = measure_tradeoff(model, batches, CONFIG, (0.8, 0.5), timed=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    for point in found.points[1:]:
        alone = copy.deepcopy(model)
        prune(alone, batches, HapConfig(target_params=point.keep, method="taylor", progress=False))
        size = measure_size(alone, batches[0])
        assert (point.params, point.macs) == (size.params, size.macs)
        assert point.loss == pytest.approx(mean_loss(Evidence.of(alone, batches, progress=False)), rel=1e-12)
        assert point.value == point.loss
    assert found.dense.loss == pytest.approx(mean_loss(Evidence.of(model, batches, progress=False)), rel=1e-12)


def test_the_metric_is_of_the_pruned_models_and_the_prediction_of_the_scores():
    model, sizes = bert(), []
    found = measure_tradeoff(
        model, text_batches(), CONFIG, (0.5, 0.9), evaluate=lambda m: sizes.append(m.num_parameters()) or 1.0
    )
    assert sizes == [p.params for p in found.points]
    assert [p.keep for p in found.points] == [1.0, 0.9, 0.5]
    assert found.dense.predicted is None
    assert found.points[1].predicted < found.points[2].predicted
    assert all(p.milliseconds > 0 for p in found.points)


def test_a_slow_stretch_of_the_machine_slows_no_point(monkeypatch):
    pairs = iter([[10.0, 8.0], [40.0, 20.0]])  # four times slower at the second
    monkeypatch.setattr(measure, "milliseconds", lambda models, batch: next(pairs))
    found = measure_tradeoff(bert(), text_batches(), CONFIG, (0.9, 0.5))
    assert [p.milliseconds for p in found.points] == [10.0, 8.0, 5.0]


def test_all_of_it_is_one_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    shown = HapConfig(target_params=0.5, method="taylor")
    measure_tradeoff(bert(), text_batches(), shown, (0.9, 0.5), evaluate=lambda m: 1.0, timed=False)
    assert terminal.getvalue().count("\n") == 1
    assert "judging (" in terminal.getvalue()


def test_it_is_read_back(tmp_path):
    found = measure_tradeoff(bert(), text_batches(), CONFIG, (0.5,), timed=False)
    found.save(tmp_path / "sweep.json")
    assert Tradeoff.load(tmp_path / "sweep.json") == found
    for broken in ({}, {"format": 1}, {"format": 1, "points": [{}]}, {"format": 2, "points": []}):
        with pytest.raises(ConfigError, match="expected"):
            Tradeoff.from_dict(broken)


@pytest.mark.parametrize("keeps", [(), (1.0,), (0.5, 0)])
def test_shares_out_of_range_are_refused_before_anything_is_scored(keeps):
    with pytest.raises(ConfigError, match=r"expected shares to keep in \(0, 1\)"):
        measure_tradeoff(bert(), None, CONFIG, keeps)
