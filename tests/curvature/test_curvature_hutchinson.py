"""The trace estimator against exact traces, all sign vectors, and its own standard errors."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import combinations
from typing import Any

import pytest
import torch
from reference_curvature import dense_hessian, every_sign_vector, hadamard, split_like
from torch import Tensor
from torch.nn import functional as F

from hap_hf.curvature import TraceEstimate, estimate_traces, rademacher
from hap_hf.errors import BatchError, CurvatureError

Weights = dict[str, Tensor]
X = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 1, 1, 0, 0])


def weights(hidden: int = 4, seed: int = 2) -> Weights:
    """Return random weights of a network with one hidden layer, [hidden, 3] and [2, hidden]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"up": (hidden, 3), "down": (2, hidden)}
    return {n: torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for n, s in shapes.items()}


def network_loss(w: Weights, rows: slice = slice(None)) -> Tensor:
    """Return its mean cross entropy on some rows."""
    return F.cross_entropy(torch.tanh(X[rows] @ w["up"].T) @ w["down"].T, LABELS[rows])


def neurons(values: Mapping[str, Tensor]) -> Tensor:
    """Sum over each hidden neuron: its row of ``up`` and its column of ``down``."""
    return values["up"].sum(1) + values["down"].sum(0)


def neuron_indices(hidden: int = 4) -> list[list[int]]:
    """Return each neuron's entries in the long vector of all weights."""
    return [[3 * u + i for i in range(3)] + [3 * hidden + u, 4 * hidden + u] for u in range(hidden)]


def exact_traces(w: Weights, rows: slice = slice(None)) -> Tensor:
    """Return the traces of all neurons, from the dense Hessian."""
    diagonal = dense_hessian(partial(network_loss, rows=rows), w).diagonal()
    return torch.stack([diagonal[i].sum() for i in neuron_indices(len(w["up"]))])


def exact_probes(w: Weights) -> Callable[[int, int], Weights]:
    """Return a source of Hadamard probes, whose mean has no off-diagonal terms."""
    matrix = hadamard(32)
    return lambda batch, probe: split_like(matrix[probe], w)


def estimate(w: Weights, losses: Iterable[tuple[Any, int]] | None = None, **settings: Any) -> TraceEstimate:
    """Run the estimator, on one batch and with exact probes unless told otherwise."""
    settings = {"probes": exact_probes(w), "num_probes": 32, "reduce": neurons, **settings}
    return estimate_traces([(lambda: network_loss(w), 6)] if losses is None else losses, w, **settings)


def test_hadamard_probes_give_the_exact_trace_of_every_block() -> None:
    w = weights()
    torch.testing.assert_close(estimate(w).trace, exact_traces(w), rtol=0, atol=1e-8)


def test_hadamard_probes_give_the_exact_diagonal() -> None:
    w = weights()
    result = estimate(w, reduce=lambda values: torch.cat([v.flatten() for v in values.values()]))
    torch.testing.assert_close(result.trace, dense_hessian(network_loss, w).diagonal(), rtol=0, atol=1e-8)


def test_too_few_hadamard_probes_are_not_exact() -> None:
    w = weights()
    assert (estimate(w, num_probes=16).trace - exact_traces(w)).abs().max() > 1e-3


def test_over_all_sign_vectors_the_mean_is_the_trace_and_the_variance_is_that_of_the_docstring() -> None:
    w = weights(hidden=2)  # 10 weights
    signs = list(every_sign_vector(10))
    result = estimate(w, probes=lambda batch, probe: split_like(signs[probe], w), num_probes=len(signs))
    torch.testing.assert_close(result.trace, exact_traces(w), rtol=0, atol=1e-12)

    squares = dense_hessian(network_loss, w).square()
    expected = []
    for unit in neuron_indices(hidden=2):
        others = [i for i in range(10) if i not in unit]
        inside = 2 * sum(squares[i, j] for i, j in combinations(unit, 2))
        expected.append(2 * inside + squares[unit][:, others].sum())
    sample_variance = result.standard_error.square() * len(signs)
    torch.testing.assert_close(
        sample_variance * (len(signs) - 1) / len(signs), torch.stack(expected), rtol=0, atol=1e-12
    )


def test_mean_and_standard_error_are_those_of_the_stored_samples() -> None:
    w = weights()
    samples = torch.stack([
        estimate(w, probes=lambda b, p, i=i: rademacher(w, 0, 0, i), num_probes=2).trace for i in range(20)
    ])  # both probes of a pair are the same
    result = estimate(w, probes=partial(rademacher, w, 0), num_probes=20)
    torch.testing.assert_close(result.trace, samples.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.standard_error, samples.std(0) / 20**0.5, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_splitting_a_batch_changes_nothing(cut: int) -> None:
    w = weights()
    parts = [(partial(network_loss, w, slice(0, cut)), cut), (partial(network_loss, w, slice(cut, 6)), 6 - cut)]
    split = estimate(w, parts)
    torch.testing.assert_close(split.trace, estimate(w).trace, rtol=0, atol=1e-12)
    assert (split.num_batches, split.num_terms) == (2, 6)


def test_equal_weights_for_unequal_batches_would_change_the_trace() -> None:
    w = weights()
    parts = [(partial(network_loss, w, slice(0, 1)), 1), (partial(network_loss, w, slice(1, 6)), 1)]
    assert (estimate(w, parts).trace - estimate(w).trace).abs().max() > 1e-2


def test_standard_errors_of_batches_add_up_with_squared_weights() -> None:
    w = weights()
    parts = [(partial(network_loss, w, slice(0, 2)), 2), (partial(network_loss, w, slice(2, 6)), 4)]
    random = partial(rademacher, w, 0)
    first, second = (
        estimate(w, [part], probes=lambda b, p, i=i: random(i, p), num_probes=8).standard_error
        for i, part in enumerate(parts)
    )
    both = estimate(w, parts, probes=random, num_probes=8).standard_error
    expected = ((first / 3).square() + (second * 2 / 3).square()).sqrt()
    torch.testing.assert_close(both, expected, rtol=1e-12, atol=0)


def test_standard_errors_shrink_with_the_root_of_the_number_of_probes() -> None:
    w = weights()
    few, many = (estimate(w, probes=partial(rademacher, w, 5), num_probes=n).standard_error for n in (64, 1024))
    ratio = (few / many).mean().item()
    assert ratio == pytest.approx(4, rel=0.2)


def test_two_standard_errors_cover_the_exact_trace_most_of_the_time() -> None:
    w = weights()
    truth = exact_traces(w)
    within = []
    for seed in range(40):
        result = estimate(w, probes=partial(rademacher, w, seed), num_probes=24)
        within.append((result.trace - truth).abs() < 2 * result.standard_error)
    assert 0.88 < torch.stack(within).double().mean() < 0.99


def test_negative_traces_keep_their_sign() -> None:
    w = {"w": torch.ones(2, 2, dtype=torch.float64, requires_grad=True)}
    result = estimate_traces(
        [(lambda: -3 * w["w"].square().sum(), 1)],
        w,
        lambda values: values["w"].sum(1),
        partial(rademacher, w, 0),
        num_probes=2,
    )
    assert torch.equal(result.trace, torch.tensor([-12.0, -12.0], dtype=torch.float64))
    assert torch.equal(result.standard_error, torch.zeros(2, dtype=torch.float64))


def test_each_loss_is_computed_once_and_each_probe_is_one_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    w, calls, passes = weights(), [], []
    original = torch.autograd.grad

    def counting(*args: Any, **kwargs: Any) -> Any:
        passes.append(kwargs.get("create_graph", False))
        return original(*args, **kwargs)

    def loss() -> Tensor:
        calls.append(1)
        return network_loss(w)

    monkeypatch.setattr(torch.autograd, "grad", counting)
    estimate(w, [(loss, 6)] * 3, num_probes=5)
    assert len(calls) == 3
    assert passes == [True, *[False] * 5] * 3


def test_every_probe_is_reported() -> None:
    ticks: list[int] = []
    w = weights()
    estimate(w, [(lambda: network_loss(w), 6)] * 2, num_probes=3, on_probe=lambda: ticks.append(1))
    assert len(ticks) == 6


def test_the_callers_no_grad_does_not_matter() -> None:
    w = weights()
    with torch.no_grad():
        result = estimate(w)
    torch.testing.assert_close(result.trace, exact_traces(w), rtol=0, atol=1e-8)


def test_batches_without_terms_are_skipped_and_their_loss_is_not_computed() -> None:
    w = weights()
    result = estimate(w, [(lambda: torch.tensor(float("nan")), 0), (lambda: network_loss(w), 6)])
    torch.testing.assert_close(result.trace, exact_traces(w), rtol=0, atol=1e-8)
    assert (result.num_batches, result.num_terms) == (1, 6)


def test_no_batches_are_an_error() -> None:
    with pytest.raises(BatchError, match="expected at least one batch, got none; was the iterator used up"):
        estimate(weights(), [])


def test_batches_without_any_terms_are_an_error() -> None:
    with pytest.raises(BatchError, match="expected loss terms in the batches, got 2 with none"):
        estimate(weights(), [(lambda: torch.tensor(0.0), 0)] * 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_an_error_with_the_batch(value: float) -> None:
    w = weights()
    losses = [(lambda: network_loss(w), 6), (lambda: network_loss(w) * value, 6)]
    with pytest.raises(CurvatureError, match=f"batch 1: expected a finite loss, got {value}"):
        estimate(w, losses)


def test_a_loss_without_graph_is_an_error_with_the_batch() -> None:
    w = weights()
    with pytest.raises(CurvatureError, match="batch 0: expected a loss that depends on the weights, got one without"):
        estimate(w, [(lambda: network_loss(w).detach(), 6)])


def test_a_loss_of_other_weights_is_an_error_with_the_batch() -> None:
    other = torch.ones(1, requires_grad=True)
    with pytest.raises(CurvatureError, match=r"batch 0: expected a loss .* uses none of up, down"):
        estimate(weights(), [(lambda: other.sum(), 6)])


@pytest.mark.parametrize(("loss", "got"), [(torch.ones(3), r"shape \[3\]"), (1.5, "float")])
def test_a_loss_that_is_no_scalar_is_an_error_with_the_batch(loss: object, got: str) -> None:
    with pytest.raises(CurvatureError, match=f"batch 0: expected the loss to be a scalar tensor, got {got}"):
        estimate(weights(), [(lambda: loss, 6)])


def test_a_second_derivative_that_is_not_finite_is_an_error_with_batch_and_tensor() -> None:
    w = {
        "good": torch.ones(2, dtype=torch.float64, requires_grad=True),
        "bad": torch.zeros(2, dtype=torch.float64, requires_grad=True),
    }
    loss = lambda: w["good"].square().sum() + w["bad"].abs().pow(1.5).sum()  # ruff: ignore[lambda-assignment]
    with pytest.raises(
        CurvatureError, match="batch 0: expected finite second derivatives, got NaN or infinities in bad;"
    ):
        estimate_traces(
            [(loss, 1)],
            w,
            lambda v: torch.stack([v["good"].sum(), v["bad"].sum()]),
            partial(rademacher, w, 0),
            num_probes=2,
        )
