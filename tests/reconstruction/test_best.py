"""Which repair is taken, and that batch norms with new statistics compute what they computed."""

import copy
from unittest.mock import Mock

import pytest
import torch
from channel_nets import Residual
from scored_models import bert, config
from test_walk import pictures, texts

import hap_hf.compensation.compensation
import hap_hf.reconstruction.best
from hap_hf import Compensation, HapConfig, find_groups, prune, recalibrate_batch_norms_
from hap_hf.names.plan import GroupPlan
from hap_hf.reconstruction import best_repair
from hap_hf.surgery import renew_statistics_


def stage_of(model, evidence):
    groups = find_groups(model, evidence.example)
    return groups, [GroupPlan(g, ("p" + "k" * (g.num_units - 1))) for g in groups]


@pytest.mark.parametrize(("losses", "taken"), [([0.5, 1.0], True), ([1.0, 1.0], False), ([float("inf"), 1.0], False)])
def test_reconstruction_is_taken_where_it_lowers_the_loss(losses, taken, monkeypatch):
    model = bert().eval()
    evidence = config(max_batches=None).evidence(model, texts())
    monkeypatch.setattr(hap_hf.reconstruction.best, "mean_loss", Mock(side_effect=losses))
    repair = best_repair(evidence, stage_of(model, evidence)[1], None, reconstruct=True)
    assert repair.reconstructed is taken
    assert bool(repair.values) is taken


def test_compensation_stands_in_where_reconstruction_does_not_help_or_is_not_wanted(monkeypatch):
    model = bert().eval()
    evidence = config(method="mask_ggn", max_batches=None).evidence(model, texts())
    groups, stage = stage_of(model, evidence)
    compensation = Compensation.measure(evidence, groups)
    # Of no compensation and of three strengths, twice.
    monkeypatch.setattr(hap_hf.compensation.compensation, "mean_loss", Mock(side_effect=[3.0, 1.0, 2.0, 2.0] * 2))
    wanted = best_repair(evidence, stage, compensation, reconstruct=False)
    monkeypatch.setattr(hap_hf.reconstruction.best, "mean_loss", Mock(side_effect=[1.0, 0.0]))
    found = best_repair(evidence, stage, compensation, reconstruct=True)
    assert not found.reconstructed
    assert found.values.keys() == wanted.values.keys() != set()
    assert all(torch.equal(v, wanted.values[n]) for n, v in found.values.items())


def test_reconstruction_needs_no_compensation_and_follows_it_by_default():
    assert HapConfig(prune_ratio=0.5).reconstructs
    assert not HapConfig(prune_ratio=0.5, compensate=False).reconstructs
    assert not HapConfig(prune_ratio=0.5, method="magnitude").reconstructs
    models = [bert().eval() for _ in range(2)]
    for model, wanted in zip(models, (True, False), strict=True):
        prune(model, texts(), config(prune_ratio=0.4, method="magnitude", reconstruct=wanted, max_batches=None))
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in models]
    assert shapes[0] == shapes[1]


def test_new_statistics_are_those_of_the_batches_and_change_no_output():
    torch.manual_seed(0)
    model, batches = Residual().double().eval(), [{"x": x} for x, _ in pictures()]
    with torch.no_grad():
        before = [model(**b) for b in batches]
    recalibrated = copy.deepcopy(model)
    changes = renew_statistics_(model, batches)
    with torch.no_grad():
        for batch, expected in zip(batches, before, strict=True):
            torch.testing.assert_close(model(**batch), expected, rtol=1e-10, atol=1e-12)
        seen = []
        model.bn.register_forward_hook(lambda module, args, out: seen.append(args[0]))
        for batch in batches:
            model(**batch)
    values = torch.cat(seen).movedim(1, 0).flatten(1)
    torch.testing.assert_close(model.bn.running_mean, values.mean(1))
    torch.testing.assert_close(model.bn.running_var, values.var(1), rtol=0.02, atol=0)  # within batches, not over all
    assert {c.name for c in changes} == {
        f"{n}.{leaf}" for n in ("bn", "bn1", "bn2", "bn3") for leaf in ("weight", "bias")
    }
    recalibrate_batch_norms_(recalibrated, batches)
    with torch.no_grad():
        assert not torch.allclose(recalibrated(**batches[0]), before[0], rtol=1e-3)
