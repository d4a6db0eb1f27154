"""Ridge regression from moments, against explicit least squares."""

import math

import pytest
import torch

from hap_hf.reconstruction.ridge import RIDGES, Moments, fit_held_out


def data(positions=60, inputs=7, outputs=3, noise=0.5):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(positions, inputs, generator=generator, dtype=torch.float64)
    a[:, 0] = 1
    weights = torch.randn(inputs, outputs, generator=generator, dtype=torch.float64)
    r = a @ weights + noise * torch.randn(positions, outputs, generator=generator, dtype=torch.float64)
    return a, r, torch.rand(positions, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("free", [0, 1])
def test_solution_is_that_of_least_squares_on_extended_data(free):
    a, r, w = data()
    moments = Moments.of(a, r, w)
    root = w.sqrt()[:, None]
    mean_square = (w[:, None] * a[:, free:].square()).sum(0).mean()
    penalty = (0.1 * mean_square).sqrt() * torch.eye(a.shape[1], dtype=a.dtype)[free:]
    expected = torch.linalg.lstsq(
        torch.cat([root * a, penalty]), torch.cat([root * r, torch.zeros(len(penalty), 3)])
    ).solution
    torch.testing.assert_close(moments.solution(0.1, free), expected)
    assert not torch.allclose(moments.solution(0.1, 1 - free), expected)


def test_error_is_that_of_the_data():
    a, r, w = data()
    solution, scale = torch.ones(7, 3, dtype=torch.float64), torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    expected = (w[:, None] * scale * (r - a @ solution).square()).sum().item()
    assert Moments.of(a, r, w).error(solution, scale) == pytest.approx(expected)
    halves = Moments.of(a[:20], r[:20], w[:20]) + Moments.of(a[20:], r[20:], w[20:])
    assert halves.error(solution, scale) == pytest.approx(expected)


@pytest.mark.parametrize("start", RIDGES)
def test_the_strength_with_the_least_error_on_what_was_held_out_is_chosen(start):
    a, r, _ = data(positions=24, inputs=16, noise=3.0)
    train, test = Moments.of(a[:18], r[:18]), Moments.of(a[18:], r[18:])
    errors = {ridge: test.error(train.solution(ridge, 1)) for ridge in RIDGES}
    fit = fit_held_out(train, test, free=1, start=start)
    assert fit.ridge == min(errors, key=errors.get)
    torch.testing.assert_close(fit.solution, (train + test).solution(fit.ridge, 1))
    assert fit.left == pytest.approx(errors[fit.ridge] / r[18:].square().sum().item())


def test_nothing_changes_where_nothing_is_predictable_or_nothing_is_lacking():
    generator = torch.Generator().manual_seed(1)
    a, r = (torch.randn(12, n, generator=generator, dtype=torch.float64) for n in (8, 2))
    alone = fit_held_out(Moments.of(a[:9], r[:9]), Moments.of(a[9:], r[9:]))
    right = fit_held_out(Moments.of(a[:9], 0 * r[:9]), Moments.of(a[9:], 0 * r[9:]))
    assert math.isinf(right.ridge)
    assert not right.solution.any()
    assert alone.left <= 1.0
    if math.isinf(alone.ridge):
        assert not alone.solution.any()
