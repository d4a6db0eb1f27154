"""Compensation: weights that read what stays make up for what goes."""

from collections.abc import Iterator

import pytest
import torch
from compensations import TEXT, evidence_of, measured
from scored_models import BATCH, FFN, bert, net, snapshot
from torch import Tensor, nn

from hap_hf import (
    BatchError,
    Compensation,
    CurvatureError,
    find_groups,
)
from hap_hf.compensation.fit import RIDGES, fit_removed

pytestmark = pytest.mark.fast

# What is measured


def test_moments_are_weighted_by_the_curvature_at_each_input() -> None:
    model = net()
    (found,) = measured(model, [FFN], BATCH).moments.values()
    expected = torch.zeros_like(found)
    for n, x in enumerate(BATCH["x"]):
        hidden = torch.tanh(model.up(x)).detach()
        p = model.down(hidden).softmax(-1).detach()
        curvature = torch.diag(p) - torch.outer(p, p)
        block = model.down.weight.T @ curvature @ model.down.weight  # of the loss, with respect to what is read
        z = torch.cat([hidden, torch.ones(1)])
        expected[n % 2] += torch.trace(block).detach() * torch.outer(z, z)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_batches_add_up() -> None:
    model, groups = net(), [FFN]
    parts = [{k: v[i : i + 2] for k, v in BATCH.items()} for i in (0, 2, 4)]
    (whole,) = measured(model, groups, BATCH).moments.values()
    (sums,) = Compensation.measure(evidence_of(model, parts), groups, num_output_probes=None).moments.values()
    torch.testing.assert_close(sums, whole, rtol=1e-9, atol=1e-12)


def test_padding_weighs_nothing() -> None:
    model = bert().eval()
    groups = find_groups(model, TEXT)
    longer = {
        "input_ids": nn.functional.pad(TEXT["input_ids"], (0, 5), value=7),
        "attention_mask": nn.functional.pad(TEXT["attention_mask"], (0, 5)),
        "labels": TEXT["labels"],
    }
    short, long = measured(model, groups).moments, measured(model, groups, longer).moments
    assert len(short) == 4
    for name, moment in short.items():
        torch.testing.assert_close(long[name], moment, rtol=1e-9, atol=1e-12)


def test_random_signs_estimate_the_exact_weights() -> None:
    model = net()
    model.down = nn.Linear(4, 3).double()  # with two classes signs are exact
    (exact,) = measured(model, [FFN], BATCH).moments.values()
    (signs,) = measured(model, [FFN], BATCH, num_output_probes=4000).moments.values()
    assert not torch.equal(signs, exact)
    torch.testing.assert_close(signs, exact, rtol=0.1, atol=0.01)


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = bert().train()
    groups = find_groups(model, TEXT)
    before = snapshot(model)
    measured(model, groups)
    assert snapshot(model) == before


def test_batches_without_loss_terms_are_refused() -> None:
    with pytest.raises(BatchError, match="got none"):
        Compensation.measure(evidence_of(net(), []), [FFN])


def test_a_single_sample_to_tell_from_is_said_to_be_too_few(caplog: pytest.LogCaptureFixture) -> None:
    one, two = ({k: v[:n] for k, v in BATCH.items()} for n in (1, 2))
    measured(net(), [FFN], two)
    assert not caplog.records
    measured(net(), [FFN], one)
    assert "1 of 1 layers, down among them, are not compensated: it takes two samples" in caplog.text


def test_gradients_that_are_not_finite_name_the_layer() -> None:
    model = net()
    with torch.no_grad():  # the same outputs, and gradients of 1e310
        for p in (model.up.weight, model.up.bias):
            p *= 1e-80
        model.down.weight *= 1e80
    with pytest.raises(CurvatureError, match=r"batch 0: expected finite gradients, .* in the inputs of down; "):
        measured(model, [FFN], BATCH, loss_fn=lambda m, b: m(**b).loss * 1e150)


# What is fitted


def samples(seed: int, number: int = 40, inputs: int = 6) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield correlated inputs with weights, for each half."""
    torch.manual_seed(seed)
    mixing, shift = torch.randn(inputs, inputs).double(), torch.randn(inputs).double()
    for _ in range(2):
        yield torch.randn(number, inputs).double() @ mixing + shift, torch.rand(number).double()


def moment(x: Tensor, w: Tensor) -> Tensor:
    z = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    return (z * w[:, None]).T @ z


def ridge_regression(x: Tensor, w: Tensor, kept: Tensor, removed: Tensor, strength: float, constant: bool) -> Tensor:
    """Return the coefficients, the constant's last, by least squares with one more row for each coefficient."""
    a = torch.cat([x[:, kept], torch.ones(len(x), 1).double()], 1)[:, : len(kept) + constant]
    mean = (w[:, None] * x[:, kept].square()).sum(0).mean()
    penalty = torch.zeros(len(kept), a.shape[1]).double()
    penalty[:, : len(kept)] = torch.eye(len(kept)) * (strength * mean).sqrt()
    rows = torch.cat([a * w.sqrt()[:, None], penalty])
    targets = torch.cat([x[:, removed] * w.sqrt()[:, None], torch.zeros(len(kept), len(removed)).double()])
    return torch.linalg.lstsq(rows, targets).solution


@pytest.mark.parametrize("constant", [True, False])
def test_the_fit_is_the_ridge_regression_that_serves_the_other_half_best(constant: bool) -> None:
    kept, removed = torch.tensor([0, 2, 3, 5]), torch.tensor([1, 4])
    halves = list(samples(3, number=8))
    rows = torch.randn(3, 6).double()

    def error(solution: Tensor, x: Tensor, w: Tensor) -> Tensor:
        a = torch.cat([x[:, kept], torch.ones(len(x), 1).double()], 1)[:, : len(solution)]
        return (w * ((x[:, removed] - a @ solution) @ rows[:, removed].T).square().sum(1)).sum()

    def crossed(strength: float) -> Tensor:
        pairs = ((halves[0], halves[1]), (halves[1], halves[0]))
        return sum(error(ridge_regression(*own, kept, removed, strength, constant), *other) for own, other in pairs)

    best = min(RIDGES, key=crossed)
    x, w = (torch.cat(parts) for parts in zip(*halves, strict=True))
    expected = ridge_regression(x, w, kept, removed, best, constant)
    (fit,) = fit_removed(torch.stack([moment(*h) for h in halves]), removed, rows, constant=constant)
    assert fit is not None
    assert 0 < RIDGES.index(best) < len(RIDGES) - 1, "a case in which neither end is best"
    weights = rows[:, removed] @ expected.T
    torch.testing.assert_close(fit.weights, weights[:, :4], rtol=1e-7, atol=1e-9)
    constants = weights[:, 4] if constant else torch.zeros(3).double()
    torch.testing.assert_close(fit.constants, constants, rtol=1e-7, atol=1e-9)
    assert fit.unexplained == pytest.approx(
        float(crossed(best) / sum(error(torch.zeros(4, 2).double(), *h) for h in halves))
    )


def test_no_weaker_regularisation_than_the_floor_is_chosen() -> None:
    kept, removed, rows = torch.tensor([0, 2, 3, 5]), torch.tensor([1, 4]), torch.ones(3, 6).double()
    halves = list(samples(3))
    both = torch.stack([moment(*h) for h in halves])
    free, *others = fit_removed(both, removed, rows, constant=True, floors=[0.0, *RIDGES])
    x, w = (torch.cat(parts) for parts in zip(*halves, strict=True))
    for floor, fit in zip(RIDGES[:3], others, strict=False):
        expected = rows[:, removed] @ ridge_regression(x, w, kept, removed, floor, True).T
        assert fit is not None
        torch.testing.assert_close(fit.weights, expected[:, :4], rtol=1e-7, atol=1e-9)
    assert free is not None
    assert others[-1] is not None
    assert torch.equal(others[-1].weights, free.weights)


def test_many_outputs_are_fitted_like_each_alone_with_the_strength_that_serves_all() -> None:
    kept, removed = torch.tensor([0, 2, 3, 5]), torch.tensor([1, 4])
    halves = list(samples(3, number=8))
    both = torch.stack([moment(*h) for h in halves])
    rows = torch.randn(300, 6).double()
    few, many = (fit_removed(both, removed, r, constant=True)[0] for r in (rows[:3], rows))
    assert few is not None
    assert many is not None
    assert any(  # all outputs have the same strength
        torch.allclose(many.weights, rows[:, removed] @ ridge_regression(*each, kept, removed, r, True).T[:, :4])
        for r in RIDGES
        for each in [tuple(torch.cat(parts) for parts in zip(*halves, strict=True))]
    )
    assert many.unexplained == pytest.approx(few.unexplained, rel=0.5)


def test_inputs_that_tell_nothing_of_each_other_are_left_alone() -> None:
    torch.manual_seed(0)
    halves = torch.stack([moment(torch.randn(6, 5).double(), torch.ones(6).double()) for _ in range(2)])
    assert fit_removed(halves, torch.tensor([0]), torch.ones(1, 5).double(), constant=False) == [None]


@pytest.mark.parametrize("empty", [(0,), (1,), (0, 1)])
def test_nothing_is_fitted_without_samples_to_check_it_on(empty: tuple[int, ...]) -> None:
    halves = torch.stack([moment(*h) for h in samples(1)])
    halves[list(empty)] = 0
    assert fit_removed(halves, torch.tensor([1]), torch.ones(1, 6).double(), constant=True) == [None]


def test_all_units_can_go_and_the_bias_takes_their_mean() -> None:
    halves = list(samples(2))
    (fit,) = fit_removed(
        torch.stack([moment(*h) for h in halves]), torch.arange(6), torch.ones(1, 6).double(), constant=True
    )
    assert fit is None or fit.weights.shape == (1, 0)
