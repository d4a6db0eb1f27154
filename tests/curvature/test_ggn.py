"""Traces of the Gauss-Newton matrix against Jacobians written out."""

from collections.abc import Mapping
from functools import partial

import pytest
import torch
from ggn_models import CASES, LABELS, TOKEN_LABELS, X, batch, check, expected, net, next_tokens, run, tokens
from reference_curvature import dense_hessian, split_like
from reference_ggn import along_each_dimension, gradient
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from hap_hf.curvature import SampleBatch, Wanted, estimate_fisher, squared
from hap_hf.model.state import preserved


@pytest.mark.parametrize("case", CASES)
def test_the_exact_trace_is_that_of_the_matrix_written_out(case: str) -> None:
    build, loss, loss_sum, y, terms = CASES[case]
    model = build()
    found, estimate = run(model, [batch(model, loss, X, y)])
    check(found, expected(model, loss_sum, X, y, terms))
    assert (estimate.num_batches, estimate.num_terms, estimate.num_samples) == (1, terms, 5)


def test_a_loss_of_next_tokens_counts_the_positions_that_it_has() -> None:
    model = net(pooled=False)

    def shifted(x: Tensor, y: Tensor) -> SampleBatch:
        return SampleBatch(
            lambda: next_tokens(model(x), y),
            int((y[:, 1:] != -100).sum()),
            len(x),
            lambda n: shifted(x[n : n + 1], y[n : n + 1]),
        )

    found, estimate = run(model, [shifted(X, TOKEN_LABELS)])
    check(found, expected(model, partial(next_tokens, reduction="sum"), X, TOKEN_LABELS, estimate.num_terms))


def test_for_softmax_regression_it_is_the_trace_of_the_hessian() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 3)).double()
    tensors = dict(model.named_parameters())
    hessian = dense_hessian(lambda w: F.cross_entropy(functional_call(model, w, (X,)), LABELS), tensors)
    found, _ = run(model, [batch(model, F.cross_entropy, X, LABELS)])
    check(found, along_each_dimension(split_like(hessian.diagonal(), tensors)))


def every_sign(like: Mapping[str, Tensor], batch: int, probe: int) -> dict[str, Tensor]:
    """Return the same combination of signs for each sample, one of all of them a probe."""
    ((name, coefficients),) = like.items()
    per_sample = coefficients[0].numel()
    signs = torch.tensor([1.0 if probe >> i & 1 else -1.0 for i in range(per_sample)], dtype=coefficients.dtype)
    return {name: signs.view(coefficients[0].shape).expand_as(coefficients)}


def test_the_mean_over_all_signs_is_exact() -> None:
    model = net()
    found, _ = run(model, [batch(model, F.cross_entropy, X, LABELS)], num_probes=2**2, signs=every_sign)
    check(found, expected(model, lambda z, y: F.cross_entropy(z, y, reduction="sum"), X, LABELS, 5), 1e-12)


def test_the_mean_over_all_signs_of_several_positions_is_exact() -> None:
    model, x, y = net(pooled=False), X[:, :2], TOKEN_LABELS[:, :2]
    found, estimate = run(model, [batch(model, tokens, x, y)], num_probes=2 ** (2 * 2), signs=every_sign)
    check(found, expected(model, partial(tokens, reduction="sum"), x, y, estimate.num_terms), 1e-12)


def test_one_sign_alone_is_not_exact_for_three_classes() -> None:
    model = net()
    one, _ = run(model, [batch(model, F.cross_entropy, X, LABELS)], num_probes=1, signs=every_sign)
    exact, _ = run(model, [batch(model, F.cross_entropy, X, LABELS)])
    assert max((one[k] - exact[k]).abs().max() for k in exact) > 1e-3


def test_for_two_classes_and_for_one_output_a_single_backward_pass_is_exact() -> None:
    for case in ("two_classes", "regression"):
        build, loss, _, y, _ = CASES[case]
        model = build()
        exact, _ = run(model, [batch(model, loss, X, y)])
        check(run(model, [batch(model, loss, X, y)], num_probes=1)[0], exact, 1e-12)


def test_the_empirical_fisher_has_the_squared_gradients_of_each_samples_own_loss() -> None:
    model = net(pooled=False)
    tensors = dict(model.named_parameters())
    keys = [(n, d) for n, t in tensors.items() for d in range(t.dim())]
    wanted = Wanted(tensors, {n: tuple(range(t.dim())) for n, t in tensors.items()}, squared)
    with preserved(model, tensors):
        estimate = estimate_fisher(
            model, [batch(model, tokens, X, TOKEN_LABELS)], wanted, lambda sums: torch.cat([sums[k] for k in keys], 1)
        )
    total = {n: torch.zeros_like(t) for n, t in tensors.items()}
    for n in range(5):
        loss = tokens(model(X[n : n + 1]), TOKEN_LABELS[n : n + 1], reduction="sum")
        total = {name: total[name] + g.square() / 25 for name, g in gradient(loss, tensors).items()}
    truth = along_each_dimension(total)
    check(dict(zip(keys, estimate.mean.split([len(truth[k]) for k in keys]), strict=True)), truth)


def test_curvlinops_has_the_same_matrix() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    model = net()
    tensors = dict(model.named_parameters())
    operator = curvlinops.GGNLinearOperator(model, nn.CrossEntropyLoss(), list(tensors.values()), [(X, LABELS)])
    diagonal = (operator @ torch.eye(operator.shape[1], dtype=torch.float64)).diagonal()
    found, _ = run(model, [batch(model, F.cross_entropy, X, LABELS)])
    check(found, along_each_dimension(split_like(diagonal, tensors)))
