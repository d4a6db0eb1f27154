"""Whether samples have losses of their own is found out by numbers, and so is what a loss has no derivatives for."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hap_hf import HapConfig, Taylor, decide, score_groups
from hap_hf.errors import BatchError, CurvatureError, UnsupportedModelError
from hap_hf.evidence.evidence import Evidence
from hap_hf.evidence.facts import Facts
from hap_hf.evidence.losses import Terms
from hap_hf.evidence.rehearsal import rehearsed
from hap_hf.names.group import Group, Kind, Role, Slice

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(6, 3, dtype=torch.float64, generator=GENERATOR)
Y = torch.tensor([0, 1, 2, 1, 0, 2])
TOKENS = torch.tensor([[0, 1], [2, -100], [-100, -100], [1, 1], [0, -100], [2, 2]])
UNITS = Group(
    "units",
    Kind.FFN,
    5,
    (Slice("a.weight", (5, 3), 0, 0, 1, Role.PRODUCER), Slice("b.weight", (3, 5), 1, 0, 1, Role.CONSUMER)),
)


class Net(nn.Module):
    """One hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 5, bias=False), nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.b(torch.tanh(self.a(x)))


def each(reduce: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Any], Tensor]:
    """Return a loss that goes through a list of targets."""
    return lambda m, b: reduce(
        torch.stack([F.cross_entropy(z[None], t[None]) for z, t in zip(m(b["x"]), b["t"], strict=False)])
    )


def of_tokens(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]).repeat_interleave(2, 0), batch["labels"].flatten())


def of_samples(model: nn.Module, batch: Any) -> Tensor:
    z = model(batch["x"])[:, None].expand(-1, 2, -1)
    losses = F.cross_entropy(z.transpose(1, 2), batch["labels"], reduction="none")
    return (losses.sum(1) / (batch["labels"] >= 0).sum(1).clamp_min(1)).mean()


def in_batch(model: nn.Module, batch: Any) -> Tensor:
    e = F.normalize(model(batch["x"]), dim=-1)
    return F.cross_entropy(5 * e @ e.T, torch.arange(len(e)).flip(0))


def neighbours(model: nn.Module, batch: Any) -> Tensor:
    z = model(batch["x"])
    return (z[::2] - z[1::2]).square().mean()


def crops(model: nn.Module, batch: Any) -> Tensor:
    z = model(batch["x"]).view(len(batch["labels"]), -1, 3).mean(1)
    return F.cross_entropy(z, batch["labels"])


def facts_of(loss: Any, *batches: Any) -> Facts:
    return rehearsed(Evidence.of(Net().double(), batches, loss_fn=loss, progress=False)).facts


LISTS = {"x": X, "t": list(Y)}


@pytest.mark.parametrize(
    ("loss", "batch", "terms"),
    [
        (each(torch.mean), LISTS, Terms.COUNTED),
        (each(torch.sum), LISTS, Terms.ONE),
        (of_tokens, {"x": X, "labels": TOKENS}, Terms.COUNTED),
        (of_samples, {"x": X, "labels": TOKENS}, Terms.SAMPLES),
        (crops, {"x": X, "labels": Y[:3]}, Terms.COUNTED),
        (lambda m, b: F.cross_entropy(m(b[0]), b[1]), (X, Y), Terms.COUNTED),
        (lambda m, b: F.cross_entropy(m(b["x"]), b["target"]), {"x": X, "target": Y}, Terms.COUNTED),
    ],
    ids=["list", "sum", "tokens", "samples", "crops", "pair", "other_name"],
)
def test_what_a_loss_is_a_mean_over_is_told_by_numbers(loss: Any, batch: Any, terms: Terms) -> None:
    facts = facts_of(loss, batch)
    assert (facts.adds_up, facts.terms) == (True, terms)
    assert facts.multiples is (loss is crops)


@pytest.mark.parametrize(
    ("loss", "batch"),
    [
        (in_batch, {"x": X}),
        (neighbours, {"x": X}),
        (lambda m, b: each(torch.mean)(m, {**b, "t": list(Y)}), {"x": X}),
        (lambda m, b: F.cross_entropy(m(b["x"]), Y), {"x": X}),
        (lambda m, b: m(b["x"]).square().mean().sqrt(), {"x": X}),
    ],
    ids=["contrastive", "pairs", "targets_beside", "of_one_size", "root"],
)
def test_losses_that_are_not_those_of_samples_go_batch_by_batch(
    loss: Any, batch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="hap_hf"):
        assert not facts_of(loss, batch).adds_up
    assert caplog.text.count("gradients of whole batches stand in for those of samples") == 1


def test_every_batch_is_looked_at() -> None:
    """Equal numbers of labels hide that the second batch counts otherwise."""
    equal = {"x": X, "labels": torch.stack([Y, Y], 1)}
    assert facts_of(of_samples, equal).terms is Terms.COUNTED
    assert facts_of(of_samples, equal, {"x": X, "labels": TOKENS}).terms is Terms.SAMPLES


@pytest.mark.parametrize("method", ["taylor", "mask_fisher", "michel", "empirical_fisher", "mask_ggn"])
def test_a_list_of_targets_gives_the_scores_of_the_same_targets_in_a_tensor(method: str) -> None:
    config = HapConfig(prune_ratio=0.5, method=method, progress=False)
    whole, listed = (
        score_groups(config.evidence(Net().double(), [b], loss_fn=each(torch.mean)), [UNITS], config)
        for b in ({"x": X, "t": Y}, LISTS)
    )
    torch.testing.assert_close(listed.sensitivity["units"], whole.sensitivity["units"], rtol=1e-12, atol=0)
    swapped = config.evidence(Net().double(), [{"x": X, "t": list(Y.flip(0))}], loss_fn=each(torch.mean))
    differs = not torch.allclose(
        score_groups(swapped, [UNITS], config).sensitivity["units"], whole.sensitivity["units"]
    )
    assert differs is (method != "mask_ggn")  # which does not depend on labels


def test_batch_by_batch_a_score_is_made_of_the_gradient_of_each_batch() -> None:
    model, batches = Net().double(), [{"x": X}, {"x": 2 * X[:5]}]
    config = HapConfig(prune_ratio=0.5, method="mask_fisher", progress=False)
    scores = score_groups(config.evidence(model, batches, loss_fn=in_batch), [UNITS], config)
    expected = torch.zeros(5, dtype=torch.float64)
    for batch in batches:
        (gradient,) = torch.autograd.grad(len(batch["x"]) * in_batch(model, batch), model.b.weight)
        expected += (gradient * model.b.weight).sum(0).square() / 2
    torch.testing.assert_close(scores.sensitivity["units"], expected.detach() / 11)


def test_hidden_states_are_each_compared_with_a_teachers() -> None:
    """The Gauss-Newton matrix of squared errors is that of the Jacobians, of each state by itself."""

    class States(Net):
        def forward(self, x: Tensor) -> list[Tensor]:
            first = self.b(torch.tanh(self.a(x)))
            return [first, torch.tanh(first)]

    model = States().double()
    loss = lambda m, b: sum(z.square().mean(1).mean() for z in m(b["x"]))  # ruff: ignore[lambda-assignment]
    config = HapConfig(prune_ratio=0.5, method={"name": "mask_ggn", "num_output_probes": None}, progress=False)
    evidence = config.evidence(model, [{"x": X}], loss_fn=loss)
    assert rehearsed(evidence).facts.no_curvature is None
    found = score_groups(evidence, [UNITS], config).sensitivity["units"]
    expected = torch.zeros(5, dtype=torch.float64)
    masks = torch.ones(5, dtype=torch.float64)
    for x in X:
        for state in range(2):

            def run(mask: Tensor, x: Tensor = x, state: int = state) -> Tensor:
                z = model.b(torch.tanh(model.a(x)) * mask)
                return [z, torch.tanh(z)][state]

            jacobian = torch.autograd.functional.jacobian(run, masks)
            expected += jacobian.square().sum(0) * 2 / 3 / 2
    torch.testing.assert_close(found, expected / 6)


def test_a_criterion_that_needs_curvature_is_refused_before_discovery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hap_hf.admission.discover", None)
    for method, kind in (("ggn", UnsupportedModelError), ("hessian_split", UnsupportedModelError)):
        config = HapConfig(prune_ratio=0.5, method=method, progress=False)
        with pytest.raises(kind, match="use method='mask_fisher', which takes the gradients of any loss"):
            decide(config.evidence(Net(), [{"x": X.float()}], loss_fn=in_batch), config)


def test_a_loss_that_fails_is_an_error_that_says_what_it_got() -> None:
    with pytest.raises(
        BatchError, match=r"loss_fn failed on batch 0, a mapping with \['x'\]: KeyError: 'image'; it is"
    ):
        facts_of(lambda m, b: m(b["image"]).sum(), {"x": X})


def test_scores_that_are_all_zero_are_an_error() -> None:
    config = HapConfig(prune_ratio=0.5, method=Taylor(), progress=False)
    constant = lambda m, b: 0 * m(b["x"]).sum()  # ruff: ignore[lambda-assignment]
    with pytest.raises(CurvatureError, match="all 5 scores of taylor are zero, so that nothing tells which units"):
        score_groups(config.evidence(Net().double(), [{"x": X}], loss_fn=constant), [UNITS], config)
