"""Elimination against least squares written out and all subsets, and the criterion that is made of it."""

import copy
from itertools import combinations

import pytest
import torch
from cases import batch_of, build
from reference import logits
from scored_models import bert, config, score, text_batch

import hap_hf.criteria.elimination
from hap_hf import HapConfig, Reconstruction, decide, find_groups, known_criteria, prune
from hap_hf.criteria.elimination import Reading, eliminate


def reading(units=6, width=1, outputs=4, seed=0, positions=60):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(units * width, units * width, generator=generator, dtype=torch.float64)
    x = torch.randn(positions, units * width, generator=generator, dtype=torch.float64) @ mixing
    return Reading(x.T @ x, torch.randn(outputs, units * width, generator=generator, dtype=torch.float64))


def lost(r, kept):
    """Return the squared error when only some inputs are kept and make up for the others, with the ridge."""
    ridge = hap_hf.criteria.elimination.RIDGE * r.moment.diagonal().mean()
    system = r.moment + ridge * torch.eye(len(r.moment), dtype=torch.float64)
    gone = [i for i in range(len(system)) if i not in set(kept)]
    schur = system[gone][:, gone]
    if kept:
        schur = schur - system[gone][:, kept] @ torch.linalg.solve(system[kept][:, kept], system[kept][:, gone])
    return torch.trace(r.columns[:, gone] @ schur @ r.columns[:, gone].T).item()


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
    own = sum(
        torch.trace(r.columns[:, i] @ r.moment[i][:, i] @ r.columns[:, i].T)
        for r in readings
        for i in [inputs_of([2], width)]
    )
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
    columns = r.columns[:, index].clone()
    columns[:, [1, 5]] *= 0.5
    twice = eliminate([Reading(r.moment[index][:, index], columns)], 6)
    alone = eliminate([r], 5)
    assert twice.order[0].item() in {1, 5}
    other = 6 - twice.order[0].item()
    assert twice.costs[twice.order[0]] < 0.05 * twice.own[1]
    assert twice.own[1].item() == pytest.approx(alone.own[1].item() / 4)
    assert twice.costs[other].item() == pytest.approx(alone.costs[1].item(), rel=0.05)


def test_sums_that_are_no_moments_any_more_and_layers_that_read_nothing_do_no_harm():
    good = reading()
    rounded = good.moment - 1.5 * torch.linalg.eigvalsh(good.moment)[-3] * torch.eye(6, dtype=torch.float64)
    assert torch.linalg.eigvalsh(rounded)[0] < 0
    found = eliminate([Reading(rounded, good.columns)], 6)
    assert found.costs.isfinite().all()
    assert sorted(found.order.tolist()) == list(range(6))
    silent = Reading(torch.zeros(6, 6, dtype=torch.float64), good.columns)
    torch.testing.assert_close(eliminate([good, silent], 6).costs, eliminate([good], 6).costs)
    assert not eliminate([silent], 6).costs.any()


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


def test_it_is_a_criterion_like_others_in_one_pass_with_compensation():
    assert known_criteria()["reconstruction"] is Reconstruction
    settings = HapConfig(target_params=0.5, method="reconstruction")
    assert (settings.passes, settings.compensates, settings.reconstructs) == (1, True, True)
    model = bert().eval()
    made = decide(settings.evidence(model, [text_batch()] * 3), HapConfig(**{**vars(settings), "progress": False}))
    cut = copy.deepcopy(model)
    hap_hf.carry_out_(cut, made)
    assert cut.num_parameters() < model.num_parameters()
    assert config(method="reconstruction").criterion == Reconstruction()
