"""Elimination against least squares written out and all subsets, and the criterion that is made of it."""

import copy
from itertools import combinations
from unittest.mock import Mock

import pytest
import torch
from cases import batch_of, build
from channel_nets import Residual
from reference import logits
from scored_models import BATCH, FFN, bert, config, net, score, text_batch

import hap_hf.criteria.elimination
import hap_hf.criteria.reconstruction
from hap_hf import HapConfig, MaskGGN, Reconstruction, decide, find_groups, known_criteria, prune
from hap_hf.criteria.criterion import ScoringTask
from hap_hf.criteria.elimination import Reading, eliminate
from hap_hf.curvature import Watchable
from hap_hf.curvature.layers import NotPerSampleError
from hap_hf.curvature.sample_means import SampleMeans
from hap_hf.inputs.moments import Moments, measure_moments


def reading(units=6, width=1, outputs=4, seed=0, positions=60):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(units * width, units * width, generator=generator, dtype=torch.float64)
    x = torch.randn(positions, units * width, generator=generator, dtype=torch.float64) @ mixing
    columns = torch.randn(outputs, units * width, generator=generator, dtype=torch.float64)
    return Reading(x.T @ x, columns.T @ columns)


def lost(r, kept):
    """Return the squared error when only some inputs are kept and make up for the others, with the ridge."""
    ridge = hap_hf.criteria.elimination.RIDGE * r.moment.diagonal().mean()
    system = r.moment + ridge * torch.eye(len(r.moment), dtype=torch.float64)
    gone = [i for i in range(len(system)) if i not in set(kept)]
    schur = system[gone][:, gone]
    if kept:
        schur = schur - system[gone][:, kept] @ torch.linalg.solve(system[kept][:, kept], system[kept][:, gone])
    return torch.trace(r.price[gone][:, gone] @ schur).item()


def inputs_of(units, width):
    return [u * width + i for u in units for i in range(width)]


@pytest.mark.parametrize("pending", [1, 3, 64])
@pytest.mark.parametrize(("width", "num"), [(1, 1), (3, 1), (1, 2), (2, 2)])
def test_each_cost_is_the_rise_of_the_least_squares_error_and_the_least_there_is(width, num, pending, monkeypatch):
    monkeypatch.setattr(hap_hf.criteria.elimination, "_MOST_PENDING", pending)
    readings = [reading(width=width, seed=s) for s in range(num)]
    found = eliminate(readings, 6)
    left, before, most = list(range(6)), 0.0, 0.0
    for unit in found.order.tolist():
        rises = {
            u: sum(lost(r, inputs_of([k for k in left if k != u], width)) for r in readings) - before for u in left
        }
        assert min(rises, key=rises.get) == unit
        most = max(most, rises[unit])
        assert found.costs[unit].item() == pytest.approx(most, rel=1e-8)
        before += rises[unit]
        left.remove(unit)
    own = sum(torch.trace(r.price[i][:, i] @ r.moment[i][:, i]) for r in readings for i in [inputs_of([2], width)])
    assert found.own[2].item() == pytest.approx(own.item())


def test_the_order_is_near_the_best_of_all_subsets():
    found, ratios = [], []
    for seed in range(5):
        r = reading(seed=seed)
        found = eliminate([r], 6)
        for number in (2, 3):
            gone = set(found.order[:number].tolist())
            mine = lost(r, [u for u in range(6) if u not in gone])
            best = min(lost(r, [u for u in range(6) if u not in set(c)]) for c in combinations(range(6), number))
            assert mine >= best * (1 - 1e-9)
            ratios.append(mine / best)
    assert sorted(ratios)[len(ratios) // 2] < 1.3


def test_one_of_two_copies_is_free_and_the_other_one_stands_for_both():
    r = reading(units=5)
    index = [0, 1, 2, 3, 4, 1]
    half = torch.tensor([1.0, 0.5, 1, 1, 1, 0.5], dtype=torch.float64)
    twice = eliminate([Reading(r.moment[index][:, index], r.price[index][:, index] * torch.outer(half, half))], 6)
    alone = eliminate([r], 5)
    assert twice.order[0].item() in {1, 5}
    other = 6 - twice.order[0].item()
    assert twice.costs[twice.order[0]] < 0.05 * twice.own[1]
    assert twice.own[1].item() == pytest.approx(alone.own[1].item() / 4)
    assert twice.costs[other].item() == pytest.approx(alone.costs[1].item(), rel=0.05)


@pytest.mark.parametrize("width", [1, 2])
def test_units_that_nothing_is_made_of_are_free_and_the_others_cost_what_they_do_without_them(width):
    whole, idle = reading(width=width), inputs_of([1, 4], width)
    price = whole.price.clone()
    price[idle], price[:, idle] = 0, 0
    found = eliminate([Reading(whole.moment, price)], 6)
    left = inputs_of([0, 2, 3, 5], width)
    alone = eliminate([Reading(whole.moment[left][:, left], whole.price[left][:, left])], 4)
    assert sorted(found.order[:2].tolist()) == [1, 4]
    assert found.order[2:].tolist() == [[0, 2, 3, 5][u] for u in alone.order]
    torch.testing.assert_close(found.costs[[0, 2, 3, 5]], alone.costs)
    torch.testing.assert_close(found.own[[0, 2, 3, 5]], alone.own)
    assert not found.costs[[1, 4]].any()
    none = eliminate([Reading(whole.moment, torch.zeros_like(price))], 6)
    assert not none.costs.any()
    assert sorted(none.order.tolist()) == list(range(6))


def test_sums_that_are_no_moments_any_more_and_layers_that_read_nothing_do_no_harm():
    good = reading()
    rounded = good.moment - 1.5 * torch.linalg.eigvalsh(good.moment)[-3] * torch.eye(6, dtype=torch.float64)
    assert torch.linalg.eigvalsh(rounded)[0] < 0
    found = eliminate([Reading(rounded, good.price)], 6)
    assert found.costs.isfinite().all()
    assert sorted(found.order.tolist()) == list(range(6))
    silent = Reading(torch.zeros(6, 6, dtype=torch.float64), good.price)
    torch.testing.assert_close(eliminate([good, silent], 6).costs, eliminate([good], 6).costs)
    assert not eliminate([silent], 6).costs.any()


def test_gradients_at_inputs_are_those_of_the_curvature_in_the_pass_of_the_scores_and_in_one_of_their_own():
    model, settings = net(), config(method="mask_ggn", num_output_probes=None)
    evidence = settings.evidence(model, [BATCH, BATCH])
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for x in BATCH["x"]:
        p = model.down(torch.tanh(model.up(x))).softmax(-1).detach()
        expected += 2 * model.down.weight.T @ (torch.diag(p) - torch.outer(p, p)) @ model.down.weight
    alone, along = (Moments(["down"], evidence.processes, ["down"]) for _ in range(2))
    measure_moments(evidence, alone, num_output_probes=None)
    settings.criterion.score(ScoringTask(evidence, (FFN,), listener=along))
    for found in (alone, along):
        torch.testing.assert_close(found.total_gradients()["down"], expected.detach(), rtol=1e-9, atol=1e-12)
    without = Moments(["down"], evidence.processes)
    measure_moments(evidence, without, num_output_probes=None)
    assert not without.total_gradients()
    assert torch.equal(without.total()[0]["down"], alone.total()[0]["down"])


@pytest.mark.parametrize("watched", [True, False])
def test_half_of_the_price_is_the_curvature_and_half_the_squared_error(watched, monkeypatch):
    model, settings = net(), config(method="reconstruction", num_output_probes=None)
    evidence = settings.evidence(model, [BATCH, BATCH])
    readings = []
    monkeypatch.setattr(
        hap_hf.criteria.reconstruction, "eliminate", lambda found, n: readings.extend(found) or eliminate(found, n)
    )
    found = settings.criterion.score(ScoringTask(evidence, (FFN,), watchable=Watchable(watched or None)))
    if not watched:
        monkeypatch.setattr(SampleMeans, "_together", Mock(side_effect=NotPerSampleError("by hand")))
        alone = settings.criterion.score(ScoringTask(evidence, (FFN,)))
        torch.testing.assert_close(alone.sensitivity[FFN.name], found.sensitivity[FFN.name])
    (r, *_) = readings
    heard = Moments(["down"], evidence.processes, ["down"])
    measure_moments(evidence, heard, num_output_probes=None)
    curvature, plain = heard.total_gradients()["down"], (model.down.weight.T @ model.down.weight).detach()
    expected = curvature / curvature.trace() + plain / plain.trace()
    torch.testing.assert_close(r.price / r.price.trace() * 2, expected)
    moment = heard.total()[0]["down"].sum(0)
    mean = moment[:-1, -1] / moment[-1, -1]
    torch.testing.assert_close(r.moment, moment[:-1, :-1] / moment[-1, -1] - torch.outer(mean, mean))
    # At the rate of mask_ggn: what units cost by themselves is what they are worth there.
    same = MaskGGN(num_output_probes=None).score(ScoringTask(evidence, (FFN,))).sensitivity[FFN.name]
    own = torch.diag(r.price) * torch.diag(r.moment)
    assert found.sensitivity[FFN.name].sum() < same.sum()
    went = eliminate([r], 4)
    torch.testing.assert_close(found.sensitivity[FFN.name], went.costs * same.sum() / own.sum(), rtol=1e-6, atol=0)


def split_into_copies(model):
    """Make each neuron of a Llama two copies, each of which has a part of the column that reads it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            half = layer.mlp.down_proj.in_features // 2
            for name in ("gate_proj", "up_proj"):
                getattr(layer.mlp, name).weight[half:] = getattr(layer.mlp, name).weight[:half]
            share = torch.rand(half, generator=generator, dtype=torch.float64) * 0.6 + 0.2
            layer.mlp.down_proj.weight[:, half:] = layer.mlp.down_proj.weight[:, :half] * (1 - share)
            layer.mlp.down_proj.weight[:, :half] *= share
    return model


@pytest.mark.parametrize(("method", "merges"), [("reconstruction", True), ("mask_ggn", False)])
def test_copies_go_without_loss(method, merges):
    model, batch = split_into_copies(build("llama")), batch_of("llama")
    dense = logits(model, batch)
    settings = {"target_params": 0.5, "kinds": ("ffn",), "progress": False, "max_group_ratio": 1.0}
    prune(model, [batch], HapConfig(method=method, **settings))
    change = (logits(model, batch) - dense).abs().max() / dense.abs().max()
    assert bool(change < 0.01) is merges


@pytest.mark.parametrize("family", ["bert", "llama", "vit", "t5"])
def test_all_units_have_scores_and_the_model_is_as_found(family):
    model, batch = build(family), batch_of(family)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    groups = find_groups(model, batch)
    settings = HapConfig(prune_ratio=0.5, method="reconstruction", progress=False)
    found = score(model, groups, [batch], settings)
    plain = score(model, groups, [batch], HapConfig(prune_ratio=0.5, method="mask_ggn", num_passes=1, progress=False))
    assert set(found.sensitivity) == {g.name for g in groups}
    assert all(x.isfinite().all() for x in found.sensitivity.values())
    assert any(not torch.allclose(found.sensitivity[n], plain.sensitivity[n], rtol=0.1) for n in found.sensitivity)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_it_is_a_criterion_like_others_in_two_passes_with_compensation():
    assert known_criteria()["reconstruction"] is Reconstruction
    settings = HapConfig(target_params=0.5, method="reconstruction")
    assert (settings.passes, settings.compensates, settings.reconstructs) == (2, True, True)
    model = bert().eval()
    made = decide(settings.evidence(model, [text_batch()] * 3), HapConfig(**{**vars(settings), "progress": False}))
    cut = copy.deepcopy(model)
    hap_hf.carry_out_(cut, made)
    assert cut.num_parameters() < model.num_parameters()
    assert config(method="reconstruction").criterion == Reconstruction()


def test_channels_that_convolutions_read_keep_the_scores_of_the_mask():
    torch.manual_seed(0)
    model = Residual().double().eval()
    batch = {"x": torch.randn(4, 3, 8, 8, dtype=torch.float64), "labels": torch.tensor([0, 1, 1, 0])}
    groups = find_groups(model, batch)
    found, plain = (
        score(model, groups, [batch], config(method=m, num_passes=1)).sensitivity
        for m in ("reconstruction", "mask_ggn")
    )
    assert found.keys() == plain.keys()
    by_kernels = [
        g.name
        for g in groups
        if any(model.get_parameter(s.tensor).dim() == 4 for s in g.slices if s.role == "consumer")
    ]
    assert by_kernels
    assert all(torch.equal(found[name], plain[name]) for name in by_kernels)
    assert any(not torch.equal(found[name], plain[name]) for name in found.keys() - set(by_kernels))
