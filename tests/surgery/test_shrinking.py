"""Steps that shrink units: what they do to weights, written out, and that a unit that is gone is worth nothing."""

import copy

import pytest
import torch
from reference import logits, masked
from trainings import exact_model, samples

from hap_hf import Role, find_groups
from hap_hf.surgery.shrinking import Shrunk, add_penalty_, mean_sizes, shrink_

BATCH = {k: torch.stack([s[k] for s in samples(8)]) for k in ("input_ids", "attention_mask", "labels")}
INPUTS = {k: v for k, v in BATCH.items() if k != "labels"}


@pytest.fixture(scope="module")
def found():
    model = exact_model()
    return model, find_groups(model, BATCH)


@pytest.mark.parametrize("on", Shrunk)
def test_entries_of_each_unit_are_multiplied_by_its_factor_and_no_others(found, on):
    model, groups = copy.deepcopy(found[0]), found[1]
    wanted = {Role.CONSUMER} if on is Shrunk.READ else {Role.PRODUCER, Role.FACTOR, Role.ALIGNED}
    for group in groups:
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        penalties = torch.linspace(0, 5, group.num_units, dtype=torch.float64)
        shrink_(model, group, penalties, on, lambda p: 0.1)
        for s in group.slices:
            if s.role in wanted:
                for u in range(group.num_units):
                    for i in s.indices(u):
                        part = before[s.tensor].select(s.dim, i)
                        part.mul_(1 - 0.1 * penalties[u])
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]), name


def test_a_unit_that_is_read_no_more_equals_a_masked_one(found):
    model, groups = copy.deepcopy(found[0]), found[1]
    for group in groups:
        gone = torch.arange(group.num_units) % 2 == 0
        shrink_(model, group, gone.double(), Shrunk.READ, lambda p: 1.0)
    with masked(found[0], {g: range(0, g.num_units, 2) for g in groups}):
        expected = logits(found[0], INPUTS)
    torch.testing.assert_close(logits(model, INPUTS), expected, rtol=0, atol=1e-12)
    assert (logits(found[0], INPUTS) - expected).abs().max() > 1e-3


def test_a_step_too_far_stops_at_zero(found):
    model, group = copy.deepcopy(found[0]), found[1][0]
    shrink_(model, group, torch.full((group.num_units,), 30.0, dtype=torch.float64), Shrunk.READ, lambda p: 0.1)
    assert mean_sizes(model, group, Shrunk.READ, torch.ones(group.num_units, dtype=torch.bool))[0] == 0


def test_the_gradient_that_is_added_is_that_of_the_penalty(found):
    model, groups = copy.deepcopy(found[0]), found[1]
    model(**BATCH).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    penalty = 0
    for group in groups:
        penalties = torch.linspace(0, 2, group.num_units, dtype=torch.float64)
        add_penalty_(model, group, penalties, Shrunk.ROWS)
        for s in group.slices:
            if s.role is not Role.CONSUMER:
                for u in range(group.num_units):
                    rows = model.get_parameter(s.tensor).index_select(s.dim, torch.tensor(s.indices(u)))
                    penalty = penalty + penalties[u] / 2 * rows.square().sum()
    named = {n: p for n, p in model.named_parameters() if n in expected}
    for (name, p), added in zip(
        named.items(), torch.autograd.grad(penalty, list(named.values()), allow_unused=True), strict=True
    ):
        torch.testing.assert_close(p.grad, expected[name] + (0 if added is None else added), rtol=0, atol=1e-12)


def test_sizes_are_means_of_absolute_values(found):
    model, group = found[0], found[1][0]
    chosen = torch.arange(group.num_units) < 2
    entries = [
        model.get_parameter(s.tensor).detach().movedim(s.dim, 0)[list(s.indices(u))]
        for s in group.slices
        if s.role is Role.CONSUMER
        for u in range(2)
    ]
    small, large = mean_sizes(model, group, Shrunk.READ, chosen)
    assert small == pytest.approx(torch.cat([e.flatten() for e in entries]).abs().mean().item())
    assert large != pytest.approx(small)
    assert torch.tensor(mean_sizes(model, group, Shrunk.READ, ~chosen & False)[0]).isnan()
