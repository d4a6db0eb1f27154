"""Reduced-rank regression against gradient descent on the factors, and planted paths."""

from itertools import pairwise

import pytest
import torch

from hap_hf.reconstruction.low_rank import fit_low_rank
from hap_hf.reconstruction.ridge import RIDGES, Moments


def samples(number, *, rank=2, noise=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    true = torch.Generator().manual_seed(99)
    down, up = (torch.randn(*s, generator=true, dtype=torch.float64) for s in ((rank, 7), (5, rank)))
    mixing, own = (torch.randn(*s, generator=true, dtype=torch.float64) for s in ((7, 4), (4, 5)))
    x = normal(number, 7)
    a = x @ mixing * 0.3 + normal(number, 4)
    r = a @ own + x @ down.T @ up.T + noise * normal(number, 5)
    return torch.cat([torch.ones(number, 1, dtype=torch.float64), a], 1), x, r, down, up


def moments(a, x, r):
    return Moments.of(torch.cat([a, x], 1), r)


def objective(a, x, r, solution, down, up, scale, ridge):
    """Return what is minimised, written out."""
    total = (((r - a @ solution - x @ down.T @ up.T) ** 2) * scale).sum()
    sizes = [(m**2).sum(0).mean() for m in (a[:, 1:], x)]
    total = total + ridge * sizes[0] * ((solution[1:] ** 2) * scale).sum()
    return total + ridge * sizes[1] * (((up @ down) ** 2) * scale[:, None]).sum()


@pytest.mark.parametrize("rank", [1, 3])
def test_gradient_descent_on_the_factors_never_beats_it(rank):
    a, x, r, *_ = samples(60)
    scale = torch.tensor([1.0, 0.5, 2.0, 0.1, 1.0], dtype=torch.float64)
    both, nothing = moments(a, x, r), moments(a[:0], x[:0], r[:0])
    fit = fit_low_rank(both, nothing, beside=7, rank=rank, free=1, scale=scale, start=1e-1)
    # Nothing is held out, so that no strength is better than the first.
    assert fit.ridge == 1e-1
    found = objective(a, x, r, fit.solution, fit.down, fit.up, scale, fit.ridge).item()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        factors = [
            torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_()
            for s in (fit.solution.shape, fit.down.shape, fit.up.shape)
        ]
        optimizer = torch.optim.LBFGS(factors, max_iter=300, line_search_fn="strong_wolfe")

        def closure(factors=factors, optimizer=optimizer):
            optimizer.zero_grad()
            value = objective(a, x, r, *factors, scale, fit.ridge)
            value.backward()
            return value

        optimizer.step(closure)
        reached = objective(a, x, r, *factors, scale, fit.ridge).item()
        assert reached >= found * (1 - 1e-9)
    assert reached < 1.5 * found  # descent came near, so that this was a comparison


def test_a_planted_path_is_found_and_one_of_lower_rank_is_not_enough():
    a, x, r, down, up = samples(80, noise=0.0)
    whole, nothing = moments(a, x, r), moments(a[:0], x[:0], r[:0])
    fits = [
        fit_low_rank(
            whole, nothing, beside=7, rank=k, free=1, scale=torch.ones(5, dtype=torch.float64), start=RIDGES[-1]
        )
        for k in (1, 2)
    ]
    errors = [((r - a @ f.solution - x @ f.down.T @ f.up.T) ** 2).sum() / (r**2).sum() for f in fits]
    torch.testing.assert_close(fits[1].up @ fits[1].down, up @ down, rtol=1e-2, atol=1e-2)
    assert errors[1] < 1e-6 < 1e-2 < errors[0]


def test_gains_are_the_differences_of_the_errors_on_samples_held_out():
    train, test = samples(60), samples(40, seed=1)
    scale = torch.tensor([1.0, 0.5, 2.0, 0.1, 1.0], dtype=torch.float64)
    fit = fit_low_rank(moments(*train[:3]), moments(*test[:3]), beside=7, rank=4, free=1, scale=scale, start=1e-2)
    a, x, r, *_ = test
    errors = []
    for rank in range(5):
        # Of the samples to fit alone, at the strength that was chosen.
        own = fit_low_rank(
            moments(*train[:3]),
            moments(a[:0], x[:0], r[:0]),
            beside=7,
            rank=max(rank, 1),
            free=1,
            scale=scale,
            start=fit.ridge,
        )
        if rank == 0:
            solution = moments(*train[:3])
            system = solution.inputs[:5, :5].clone()
            system.diagonal()[1:] += fit.ridge * system.diagonal()[1:].mean()
            errors.append((((r - a @ torch.linalg.solve(system, solution.across[:5])) ** 2) * scale).sum())
        else:
            errors.append((((r - a @ own.solution - x @ own.down.T @ own.up.T) ** 2) * scale).sum())
    gains = torch.stack([before - after for before, after in pairwise(errors)])
    torch.testing.assert_close(fit.gains, gains, rtol=1e-6, atol=1e-6)
    # Two directions were planted: the others explain what the samples to fit happen to be.
    assert fit.gains[1] > 10 * fit.gains[2:].abs().max()


def test_outputs_without_weight_are_left_alone_and_undetermined_fits_are_none():
    a, x, r, *_ = samples(60)
    scale = torch.tensor([1.0, 0, 1, 1, 1], dtype=torch.float64)
    fit = fit_low_rank(moments(a, x, r), moments(a, x, r), beside=7, rank=2, free=1, scale=scale, start=1e-2)
    assert fit.up[1].abs().max() == 0
    bad = moments(a, torch.full_like(x, torch.nan), r)
    assert fit_low_rank(bad, bad, beside=7, rank=2, free=1, scale=scale, start=1e-2) is None
