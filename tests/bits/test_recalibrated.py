"""Batch norms behind rounded layers: statistics that follow, and those that cannot be taken."""

import copy

import torch
from torch import nn

from hap_hf import BitConfig, quantize_, recalibrate_batch_norms_
from hap_hf.surgery import shift_statistics_, statistics_of


def normed(num_samples):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
    x = torch.randn(num_samples, 3, 9, 9)
    recalibrate_batch_norms_(model.eval(), [{"input": x}])
    return model, x


def test_batch_norms_follow_what_rounding_does_to_their_inputs():
    model, x = normed(64)
    exact = copy.deepcopy(model)
    expected, distances, means = model(x).detach(), {}, {}
    for recalibrate in (True, False):
        rounded = copy.deepcopy(model)
        quantize_(rounded, [{"input": x}], BitConfig(weight_bits=2, recalibrate=recalibrate))
        out = rounded(x).detach()
        distances[recalibrate] = float((out - expected).norm() / expected.norm())
        means[recalibrate] = out.mean((0, 2, 3)).abs().max().item()
    assert distances[True] < 0.9 * distances[False]
    assert means[True] < 0.1 < means[False]
    # Without a change nothing moves, however few the samples.
    few = statistics_of(model, [{"input": x[:2]}])
    shift_statistics_(model, [{"input": x[:2]}], few)
    for (name, after), before in zip(model.state_dict().items(), exact.state_dict().values(), strict=True):
        torch.testing.assert_close(after, before, msg=name)


def test_statistics_that_cannot_be_taken_stay_as_they_were(caplog):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    nn.init.normal_(model[1].running_mean)
    before = model[1].running_mean.clone()
    quantize_(model, [{"input": torch.randn(1, 3)}], BitConfig(weight_bits=3))
    assert torch.equal(model[1].running_mean, before)
    assert "takes at least 2 values for each channel" in caplog.text
    quantize_(other := nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval(), [{"input": torch.randn(5, 3)}])
    assert other[1].running_mean.any()
