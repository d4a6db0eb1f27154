"""Roots of a loss's Hessian at the model's outputs: S S^T against the Hessian itself, for every kind of loss."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hap_hf.curvature import output_root
from hap_hf.curvature.output_root import output_roots
from hap_hf.errors import UnsupportedModelError

Loss = Callable[[Tensor], Tensor]
LABELS = torch.tensor([2, 0, -100, 1])
WEIGHTS = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)


def huber(z: Tensor) -> Tensor:
    """Return a loss that is linear in the outputs of all but some."""
    return F.huber_loss(z, torch.zeros_like(z), reduction="sum")


SOFTMAX: dict[str, Loss] = {
    "cross_entropy_with_an_ignored_label": lambda z: F.cross_entropy(z, LABELS, reduction="sum"),
    "smoothed_labels": lambda z: F.cross_entropy(z, LABELS, label_smoothing=0.1),
    "weighted_classes": lambda z: F.cross_entropy(z, LABELS, weight=WEIGHTS),
    "soft_targets": lambda z: F.cross_entropy(z, torch.full((4, 3), 1 / 3, dtype=z.dtype)),
    "next_token": lambda z: F.cross_entropy(z.view(2, 2, 3)[:, :-1].flatten(0, 1), LABELS[:2]),
}
ELEMENTWISE: dict[str, Loss] = {
    "squared_error": lambda z: F.mse_loss(z, torch.ones_like(z)),
    "binary_cross_entropy": lambda z: F.binary_cross_entropy_with_logits(z, (z > 0).to(z.dtype)),
    "huber": huber,
}
OTHER: dict[str, Loss] = {
    "softmax_at_another_temperature": lambda z: F.cross_entropy(z / 3, LABELS),
    "distillation": lambda z: (
        F.cross_entropy(z, LABELS) + F.kl_div((z / 2).log_softmax(-1), WEIGHTS.expand(4, 3) / 3.5, reduction="sum")
    ),
    "squared_norm_of_differences": lambda z: (z[:, 0] - z[:, 1]).square().sum() + z[:, 2].exp().sum(),
}


def outputs(*shape: int) -> Tensor:
    """Return random outputs that are no leaf."""
    return torch.randn(shape, dtype=torch.float64, requires_grad=True) * 1.5


def roots_of(loss: Loss, z: Tensor) -> Tensor:
    """Return all columns of S, [outputs, columns], by asking for one after the other."""
    root = output_roots(loss(z), {"z": z})["z"]
    return torch.stack([column.flatten() for column in root.columns(1)], dim=1)


def hessian(loss: Loss, z: Tensor) -> Tensor:
    """Return the Hessian, [outputs, outputs]."""
    return torch.autograd.functional.hessian(lambda v: loss(v.view(z.shape)), z.detach().flatten())


@pytest.mark.parametrize("kind", {**SOFTMAX, **ELEMENTWISE, **OTHER})
def test_the_root_times_its_transpose_is_the_hessian(kind: str) -> None:
    loss, z = {**SOFTMAX, **ELEMENTWISE, **OTHER}[kind], outputs(4, 3)
    s = roots_of(loss, z)
    expected = hessian(loss, z)
    torch.testing.assert_close(s @ s.T, expected, rtol=0, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize("kind", SOFTMAX)
def test_many_classes_need_no_eigenvectors(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_root, "_MOST_EIGEN", 0)
    monkeypatch.setattr(output_root, "_eigen", None)
    loss, z = SOFTMAX[kind], outputs(4, 3)
    s = roots_of(loss, z)
    torch.testing.assert_close(s @ s.T, hessian(loss, z), rtol=0, atol=1e-9)


def test_the_mean_over_sampled_labels_is_the_same_matrix() -> None:
    z = outputs(1, 4)
    p = z.detach().softmax(-1)[0]
    scores = [torch.autograd.grad(z.log_softmax(-1)[0, y], z, retain_graph=True)[0][0] for y in range(4)]
    fisher = sum(p[y] * torch.outer(scores[y], scores[y]) for y in range(4))
    s = roots_of(lambda z: F.cross_entropy(z, torch.tensor([3])), z)
    torch.testing.assert_close(s @ s.T, fisher, rtol=0, atol=1e-12)


def test_two_classes_have_one_column() -> None:
    z = outputs(4, 2)
    assert roots_of(lambda z: F.cross_entropy(z, torch.tensor([0, 1, 1, 0])), z).shape == (8, 4)


def test_columns_of_all_samples_come_together() -> None:
    z = outputs(3, 2, 3)  # samples, positions, classes
    loss = F.cross_entropy(z.flatten(0, 1), torch.tensor([0, 1, 2, 0, 1, 2]), reduction="sum")
    columns = list(output_roots(loss, {"z": z})["z"].columns(3))
    assert len(columns) == 2 * 2  # positions of a sample, columns of a block
    p = z.detach().softmax(-1)
    for n, t in product(range(3), range(2)):
        block = sum(torch.outer(c[n, t], c[n, t]) for c in columns)
        expected = torch.diag(p[n, t]) - torch.outer(p[n, t], p[n, t])
        torch.testing.assert_close(block, expected, rtol=0, atol=1e-12)


def test_signs_average_to_the_hessian_over_all_of_them() -> None:
    z = outputs(1, 3)
    root = output_roots(F.cross_entropy(z, torch.tensor([1])), {"z": z})["z"]
    rank = root.coefficients.numel()
    vectors = [root.apply(torch.tensor([signs], dtype=z.dtype))[0] for signs in product((-1.0, 1.0), repeat=rank)]
    mean = sum(torch.outer(v, v) for v in vectors) / len(vectors)
    expected = hessian(lambda z: F.cross_entropy(z, torch.tensor([1])), z)
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-12)


def test_outputs_without_a_dimension_of_classes_are_single_numbers() -> None:
    z = outputs(5)
    s = roots_of(lambda z: F.mse_loss(z, torch.zeros_like(z)), z)
    torch.testing.assert_close(s, torch.eye(5, dtype=torch.float64) * (2 / 5) ** 0.5, rtol=0, atol=1e-12)


def test_two_outputs_have_a_root_each() -> None:
    start, end = outputs(3, 4), outputs(3, 5)
    labels = torch.tensor([0, 3, 1])
    roots = output_roots((F.cross_entropy(start, labels) + F.cross_entropy(end, labels)) / 2, {"a": start, "b": end})
    for root, z in ((roots["a"], start), (roots["b"], end)):
        s = torch.stack([c.flatten() for c in root.columns(1)], dim=1)
        expected = hessian(lambda z: F.cross_entropy(z, labels) / 2, z)
        torch.testing.assert_close(s @ s.T, expected, rtol=0, atol=1e-12)


def test_a_saturated_softmax_has_no_curvature_and_no_nan() -> None:
    z = torch.tensor([[900.0, 0.0, -900.0], [1.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True) * 1
    s = roots_of(lambda z: F.cross_entropy(z, torch.tensor([0, 1]), reduction="sum"), z)
    torch.testing.assert_close(
        s @ s.T, hessian(lambda z: F.cross_entropy(z, torch.tensor([0, 1]), reduction="sum"), z), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("num_classes", [3, 700])
def test_the_dtype_of_the_outputs_does_not_matter(dtype: torch.dtype, tolerance: float, num_classes: int) -> None:
    z = outputs(4, num_classes).to(dtype).detach().requires_grad_()
    root = output_roots(F.cross_entropy(z * 1, LABELS, reduction="sum"), {"z": z})["z"]
    p = z.detach().float().softmax(-1)
    diagonal = (p - p.square()) * (LABELS >= 0)[:, None]
    columns = torch.eye(root.coefficients.shape[-1])[:, None].expand(-1, 4, -1)
    found = sum(root.apply(column).square() for column in columns)
    torch.testing.assert_close(found, diagonal, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda z: (z * WEIGHTS).sum(), "linear in them"),
        (lambda z: -F.cross_entropy(z, LABELS), "convex"),
        (lambda z: -z.square().sum(), "convex"),
        (lambda z: F.cross_entropy(z @ z.T, LABELS), r"a sum of terms, each of one position of the outputs \[4, 3\]"),
        (lambda z: z.sum(0).square().sum(), "a sum of terms"),
    ],
    ids=["linear", "concave", "negative", "contrastive", "of_the_sum"],
)
def test_losses_without_such_a_root_are_an_error(loss: Loss, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        output_roots(loss(z := outputs(4, 3)), {"z": z})


def test_an_unknown_loss_of_many_classes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_root, "_MOST_EIGEN", 0)
    with pytest.raises(UnsupportedModelError, match="or of few classes; got another"):
        output_roots(OTHER["distillation"](z := outputs(4, 3)), {"z": z})


def test_a_loss_that_couples_two_outputs_is_an_error() -> None:
    one, other = outputs(4, 3), outputs(4, 3)
    with pytest.raises(UnsupportedModelError, match="a sum of terms"):
        output_roots((one * other).square().sum(), {"one": one, "other": other})
