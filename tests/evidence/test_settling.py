"""The loss where none was given: of plain models with labels of any kind, and without labels."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from documented import bert, causal_batches, llama, text_batches
from torch import Tensor, nn
from torch.nn import functional as F

from hap_hf import HapConfig, find_groups, prune, score_groups
from hap_hf.errors import BatchError
from hap_hf.evidence.batches import OWN_OUTPUTS
from hap_hf.evidence.evidence import Evidence
from hap_hf.evidence.rehearsal import rehearsed
from hap_hf.evidence.settling import agreement, with_default_loss

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(4, 3, 6, 6, generator=GENERATOR)
ONE = F.one_hot(torch.tensor([0, 2, 1, 1]), 5).float()
SEVERAL = (torch.rand(4, 5, generator=GENERATOR) > 0.5).float()
SHARES = torch.rand(4, 5, generator=GENERATOR).softmax(-1)


class Net(nn.Module):
    """Two convolutions, pooled or with an answer at each position."""

    def __init__(self, answer: Any = lambda z: z.mean((2, 3))) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.answer = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 3, padding=1), answer

    def forward(self, x: Tensor) -> Any:
        """Return logits."""
        return self.answer(self.b(self.a(x).relu()))


def loss_of(model: nn.Module, *batches: Any) -> Tensor:
    """Return the loss of the first of some batches."""
    evidence = with_default_loss(Evidence.of(model, batches, progress=False))
    return evidence.loss_fn(model, evidence.batches[0])


def positions(z: Tensor) -> Tensor:
    return z


MASKS = torch.randint(0, 5, (4, 6, 6), generator=GENERATOR)


@pytest.mark.parametrize(
    ("answer", "labels", "expected"),
    [
        (positions, MASKS, lambda z: F.cross_entropy(z, MASKS)),
        (lambda z: {"out": z}, MASKS, lambda z: F.cross_entropy(z, MASKS)),
        (lambda z: z.permute(0, 2, 3, 1), MASKS, lambda z: F.cross_entropy(z, MASKS)),
        (lambda z: z.mean((2, 3)), SEVERAL, lambda z: F.binary_cross_entropy_with_logits(z.mean((2, 3)), SEVERAL)),
        (lambda z: z.mean((2, 3)), SHARES, lambda z: F.cross_entropy(z.mean((2, 3)), SHARES)),
        (lambda z: z.mean((2, 3)), ONE, lambda z: F.cross_entropy(z.mean((2, 3)), ONE)),
    ],
    ids=["segmentation", "torchvision", "classes_last", "several", "shares", "one"],
)
def test_labels_say_which_cross_entropy_it_is(answer: Any, labels: Tensor, expected: Any) -> None:
    model = Net(answer)
    plain = Net(positions)
    torch.testing.assert_close(loss_of(model, (X, labels)), expected(plain(X)))


def test_all_batches_say_whether_a_sample_may_have_several_classes() -> None:
    model = Net()
    both = loss_of(model, (X, ONE), (X, SEVERAL))
    torch.testing.assert_close(both, F.binary_cross_entropy_with_logits(model(X), ONE))
    assert not torch.allclose(both, loss_of(model, (X, ONE)))


@pytest.mark.parametrize(
    ("answer", "labels"),
    [
        (lambda z: z.mean((2, 3)), torch.randn(4, 5)),  # numbers may be anything
        (lambda z: z[:, :, :5, 0], torch.zeros(4, 5, dtype=torch.long)),  # classes first and last fit alike
        (positions, torch.zeros(4, dtype=torch.long)),
    ],
    ids=["numbers", "either_dimension", "too_few"],
)
def test_labels_that_do_not_say_it_are_an_error_that_asks_for_a_loss(answer: Any, labels: Tensor) -> None:
    with pytest.raises(BatchError, match=r"which loss compares that with .* is not known; pass loss_fn=lambda"):
        loss_of(Net(answer), (X, labels))


def test_a_model_may_return_its_loss_and_its_logits() -> None:
    class Both(Net):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            z = super().forward(x)
            return z if labels is None else (F.cross_entropy(z, labels), z)

    labels = torch.tensor([0, 1, 2, 3])
    torch.testing.assert_close(loss_of(Both(), (X, labels)), F.cross_entropy(Net()(X), labels))


def test_what_forward_does_not_take_is_named_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="hap_hf"):
        loss_of(Net(), {"x": X, "labels": torch.tensor([0, 1, 2, 3]), "file": ["a"] * 4})
    assert "Net takes no file, which the batches hold: left out" in caplog.text


def unlabelled(batch: Any) -> dict[str, Tensor]:
    return {k: v for k, v in batch.items() if k != "labels"}


@pytest.mark.parametrize(
    ("model", "batch"), [(bert, text_batches()[0]), (llama, causal_batches()[0])], ids=["bert", "llama"]
)
def test_without_labels_curvature_is_that_of_any_labels(model: Any, batch: Any) -> None:
    """The Gauss-Newton matrix of cross-entropy does not depend on labels, so it is that of the divergence."""
    dense = model().double().eval()
    groups = find_groups(dense, batch)
    config = HapConfig(prune_ratio=0.5, method={"name": "mask_ggn", "num_output_probes": None}, progress=False)
    if model is llama:
        config = HapConfig(prune_ratio=0.5, method="mask_ggn", progress=False)
        evidence = rehearsed(config.evidence(dense, [unlabelled(batch)]))
        assert (evidence.facts.own_outputs, evidence.facts.adds_up, evidence.facts.no_curvature) == (True, True, None)
        assert score_groups(evidence, groups, config).sensitivity
        return
    plain, labelled = (
        score_groups(config.evidence(dense, [b]), groups, config).sensitivity for b in (unlabelled(batch), batch)
    )
    for name, x in labelled.items():
        torch.testing.assert_close(plain[name], x, rtol=1e-6, atol=1e-15)


def test_padding_does_not_count() -> None:
    z, teacher = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    answer = lambda attention_mask: {"logits": z, "last_hidden_state": z}  # ruff: ignore[lambda-assignment]
    model = SimpleNamespace(forward=answer, __call__=answer)

    class Fixed(nn.Module):
        def forward(self, attention_mask: Tensor) -> Any:
            return model.forward(attention_mask)

    found = agreement(Fixed(), {"attention_mask": mask, OWN_OUTPUTS: {"logits": teacher}})
    p = teacher.softmax(-1)
    each = (p * (p.log() - z.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(found, (each[0, :2].mean() + each[1].mean()) / 2)


def test_other_outputs_are_compared_by_squares_and_logits_of_one_class_too() -> None:
    for answer in (lambda z: z, lambda z: {"logits": z.mean((1, 2, 3))[:, None]}):
        model = Net(answer)
        evidence = with_default_loss(Evidence.of(model, [X], progress=False))
        (key,) = evidence.batches[0][OWN_OUTPUTS]
        assert evidence.loss_fn(model, evidence.batches[0]) == 0
        with torch.no_grad():
            model.b.bias += 0.5
        torch.testing.assert_close(evidence.loss_fn(model, evidence.batches[0]), torch.tensor(0.25))
        assert key in {"output", "logits"}


@pytest.mark.parametrize("method", ["mask_ggn", "hessian", "ggn", "magnitude"])
def test_unlabelled_batches_prune(method: str, caplog: pytest.LogCaptureFixture) -> None:
    model = bert()
    with caplog.at_level(logging.WARNING, logger="hap_hf"):
        report = prune(
            model, map(unlabelled, text_batches()), HapConfig(target_params=0.6, method=method, progress=False)
        )
    assert report.after.params < report.before.params
    assert ("scored by agreement with the dense model's own outputs" in caplog.text) is (method != "magnitude")


def test_a_base_model_prunes_without_a_task() -> None:
    base = bert().bert
    report = prune(base, [unlabelled(b) for b in text_batches()], HapConfig(target_params=0.6, progress=False))
    assert report.after.params < report.before.params


@pytest.mark.parametrize("method", ["taylor", "mask_fisher", "michel", "empirical_fisher"])
def test_gradients_of_labels_need_labels(method: str) -> None:
    config = HapConfig(target_params=0.6, method=method, progress=False)
    with pytest.raises(BatchError, match=f"every gradient that {method} is made of is zero; use the default"):
        prune(bert(), [unlabelled(b) for b in text_batches()], config)
