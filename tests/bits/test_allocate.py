"""Bits within a budget: against all assignments there are, from below, and for layers that are tied."""

import itertools
import random

import pytest

from hap_hf import ConfigError, Sensitivity, allocate_bits, bit_frontier

MENU = (3, 4, 6, 8)


def instance(seed, layers=6):
    draw = random.Random(seed)
    rise = {}
    for i in range(layers):
        scale = 10 ** draw.uniform(-4, 0)
        rise[f"l{i}"] = {b: scale * 4.0**-b * draw.uniform(0.2, 5) for b in MENU}  # not monotone everywhere
    return Sensitivity(rise, {}, {name: draw.randint(1, 400) for name in rise})


def every(sensitivity):
    names = list(sensitivity.rise)
    for choice in itertools.product(MENU, repeat=len(names)):
        bits = dict(zip(names, choice, strict=True))
        cost = sum(sensitivity.sizes[n] * b for n, b in bits.items())
        yield bits, cost, sum(sensitivity.rise[n][b] for n, b in bits.items())


@pytest.mark.parametrize("seed", range(12))
def test_no_assignment_within_the_budget_is_better(seed):
    sensitivity = instance(seed, layers=5)
    total = sum(sensitivity.sizes.values())
    assignments = list(every(sensitivity))
    for average in (3, 3.3, 4, 5.7, 8):
        found = allocate_bits(sensitivity, average_bits=average)
        best = min(rise for _, cost, rise in assignments if cost <= average * total)
        assert found.rise == pytest.approx(best, rel=1e-12)
        assert found.weight_bytes * 8 <= average * total
        assert sum(sensitivity.rise[n][b] for n, b in found.bits.items()) == pytest.approx(found.rise)
        assert allocate_bits(sensitivity, weight_bytes=average * total / 8) == found
    # The monotone assignments of HAWQ-V2 are a part of all, and the best of them is often another one.
    front = bit_frontier(sensitivity)
    undominated = [
        (cost, rise)
        for _, cost, rise in assignments
        if not any((c < cost and r <= rise) or (c <= cost and r < rise) for _, c, r in assignments)
    ]
    assert [(a.weight_bytes * 8, pytest.approx(a.rise)) for a in front] == sorted(set(undominated))


def test_the_order_of_the_layers_does_not_matter_and_ties_are_kept():
    sensitivity = instance(3)
    names = list(sensitivity.rise)
    turned = Sensitivity({n: sensitivity.rise[n] for n in reversed(names)}, {}, sensitivity.sizes)
    assert dict(allocate_bits(turned, average_bits=4).bits) == dict(allocate_bits(sensitivity, average_bits=4).bits)
    tied = [names[:3], [names[2], names[5]]]
    found = allocate_bits(sensitivity, average_bits=4.5, tied=tied)
    assert len({found.bits[n] for n in (*names[:3], names[5])}) == 1
    total = sum(sensitivity.sizes.values())
    alike = [e for e in every(sensitivity) if len({e[0][n] for n in (*names[:3], names[5])}) == 1]
    assert found.rise == pytest.approx(min(rise for _, cost, rise in alike if cost <= 4.5 * total))
    free = allocate_bits(sensitivity, average_bits=4.5)
    assert free.rise < found.rise


def test_hundreds_of_layers_take_no_search_through_all():
    sensitivity = instance(0, layers=120)
    sizes = {name: 256 * (1 + i % 4) for i, name in enumerate(sensitivity.sizes)}
    found = allocate_bits(Sensitivity(sensitivity.rise, {}, sizes), average_bits=4)
    assert 3.9 < found.weight_bytes * 8 / sum(sizes.values()) <= 4


def test_budgets_and_numbers_that_mean_nothing_are_refused(caplog):
    sensitivity = instance(1)
    for settings, words in (
        ({}, "one of average_bits and weight_bytes"),
        ({"average_bits": 4, "weight_bytes": 9}, "got both"),
        ({"average_bits": 2.5}, "no assignment fits"),
        ({"average_bits": True}, "expected a number"),
        ({"average_bits": float("nan")}, "expected a number"),
        ({"average_bits": 4, "tied": [["l0", "x"]]}, "'x', which is no layer"),
    ):
        with pytest.raises(ConfigError, match=words):
            allocate_bits(sensitivity, **settings)
    rise = {**sensitivity.rise, "l0": dict.fromkeys(MENU, float("nan"))}
    with pytest.raises(ConfigError, match="not finite"):
        allocate_bits(Sensitivity(rise, {}, sensitivity.sizes), average_bits=4)
    rise["l0"] = dict.fromkeys(MENU, -1.0)
    assert allocate_bits(Sensitivity(rise, {}, sensitivity.sizes), average_bits=8).rise >= 0
    assert "below 0" in caplog.text
