"""How samples, batches and layers are put together must not change an estimate, and what goes wrong is said."""

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ggn_models import LABELS, TOKEN_LABELS, Net, X, batch, check, expected, net, run, tokens
from torch import Tensor, nn
from torch.nn import functional as F

from hap_hf.curvature import (
    SampleBatch,
    Wanted,
    estimate_fisher,
    sample_means,
    squared,
    times_weights,
)
from hap_hf.errors import BatchError, CurvatureError, UnsupportedModelError

pytestmark = pytest.mark.fast


def total(z: Tensor, y: Tensor) -> Tensor:
    """Return summed cross entropy."""
    return F.cross_entropy(z, y, reduction="sum")


@pytest.fixture
def _no_sample_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make sure that no sample is differentiated alone but to check the others."""
    monkeypatch.setattr(sample_means.SampleMeans, "_one_by_one", None)


@pytest.mark.usefixtures("_no_sample_alone")
def test_splitting_a_batch_changes_nothing() -> None:
    model = net(pooled=False)
    whole, one = run(model, [batch(model, tokens, X, TOKEN_LABELS)])
    split, other = run(model, [batch(model, tokens, X[i], TOKEN_LABELS[i]) for i in (slice(0, 2), slice(2, 5))])
    check(split, whole, 1e-12)
    torch.testing.assert_close(other.standard_error, one.standard_error)
    assert (one.num_batches, other.num_batches) == (1, 2)
    assert one.num_terms == other.num_terms
    assert one.num_samples == other.num_samples == 5


def test_the_standard_error_is_that_of_a_mean_of_samples() -> None:
    model = net()
    _, whole = run(model, [batch(model, F.cross_entropy, X, LABELS)])
    singles = torch.stack([
        run(model, [batch(model, F.cross_entropy, X[n : n + 1], LABELS[n : n + 1])])[1].mean for n in range(5)
    ])
    torch.testing.assert_close(whole.mean, singles.mean(0))
    torch.testing.assert_close(whole.standard_error, singles.std(0) / 5**0.5)


def test_a_single_sample_says_nothing_about_others() -> None:
    model = net()
    _, estimate = run(model, [batch(model, F.cross_entropy, X[:1], LABELS[:1])])
    assert (estimate.standard_error == torch.inf).all()


def test_batches_without_loss_terms_are_skipped() -> None:
    model = net(pooled=False)
    ignored = batch(model, tokens, X, torch.full_like(TOKEN_LABELS, -100))
    whole, _ = run(model, [batch(model, tokens, X, TOKEN_LABELS)])
    found, estimate = run(model, [ignored, batch(model, tokens, X, TOKEN_LABELS), ignored])
    check(found, whole, 1e-12)
    assert (estimate.num_batches, estimate.num_samples) == (1, 5)


@pytest.mark.usefixtures("_no_sample_alone")
@pytest.mark.parametrize("scale", [2.0**-3, 2.0**10])
def test_the_loss_scale_is_divided_out_of_squares_and_products(scale: float) -> None:
    model = net()
    for statistic in (squared, times_weights):
        plain, _ = run(model, [batch(model, F.cross_entropy, X, LABELS)], statistic=statistic)
        scaled, _ = run(model, [batch(model, F.cross_entropy, X, LABELS)], statistic=statistic, loss_scale=scale)
        for key in plain:
            torch.testing.assert_close(scaled[key], plain[key], rtol=1e-12, atol=1e-12)


def test_an_overflow_lowers_the_loss_scale_for_good() -> None:
    model = net().float()
    truth, _ = run(model, [batch(model, F.cross_entropy, X.float(), LABELS)])
    found, _ = run(model, [batch(model, F.cross_entropy, X.float(), LABELS)] * 2, loss_scale=2.0**66)
    check(found, truth, 1e-5)


class Functional(Net):
    """The net, which uses a weight once more outside its layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs."""
        return super().forward(x) + 0.1 * F.linear(torch.tanh(x), self.up.weight)[..., :3].mean(1)


class ScaleAsView(nn.Module):
    """Multiplies with a weight and returns a view of the product."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size))

    def forward(self, x: Tensor) -> Tensor:
        """Return the view."""
        return (x * self.weight).flatten(0, 1).view(x.shape)


class OverwrittenView(Net):
    """The net, with a layer of another kind whose output, a view, is overwritten in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = ScaleAsView(4)

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs."""
        return self.down(self.norm(self.up(x)).tanh_().mean(1))


class TimeFirst(Net):
    """The net, in which positions come before samples."""

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs."""
        hidden = self.norm(torch.tanh(self.up(x.transpose(0, 1))))
        return self.down(hidden.mean(0))


class Broadcast(Net):
    """The net, which calls a layer on something that all samples share."""

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs."""
        return super().forward(x + self.up(torch.ones(1, 1, 3, dtype=x.dtype))[..., :3])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Functional, "up.weight is used outside its layer"),
        (OverwrittenView, "norm.weight is used outside its layer, or that layer's output was overwritten in place"),
        (TimeFirst, "a Linear has 6 rows for 5 samples"),
        (Broadcast, "a Linear has 1 rows for 5 samples"),
    ],
)
def test_what_layers_cannot_tell_apart_is_differentiated_sample_by_sample_and_logged(
    kind: type[Net], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = kind().double()
    with caplog.at_level(logging.WARNING, logger="hap_hf"):
        found, _ = run(model, [batch(model, F.cross_entropy, X, LABELS)] * 2)
    check(found, expected(model, total, X, LABELS, 5))
    assert len(caplog.records) == 1
    assert reason in caplog.text


def test_positions_that_pass_for_samples_are_found_out(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, x = TimeFirst().double(), X[:, :5]  # as many positions as samples: all sizes fit
    found, _ = run(model, [batch(model, F.cross_entropy, x, LABELS)])
    check(found, expected(model, total, x, LABELS, 5))
    assert "has another gradient for a sample in a batch" in caplog.text


def test_samples_without_labels_that_count_weigh_nothing_sample_by_sample() -> None:
    torch.manual_seed(0)
    model = TimeFirst().double()
    labels = LABELS.clone()
    labels[2] = -100
    found, estimate = run(model, [batch(model, F.cross_entropy, X, labels)])
    check(found, expected(model, total, X[labels >= 0], labels[labels >= 0], 4))
    assert (estimate.num_terms, estimate.num_samples) == (4, 5)


class Talkative(Net):
    """The net, which returns more than its logits."""

    def forward(self, x: Tensor) -> Any:
        """Return logits, hidden states and the loss of nothing."""
        hidden = self.norm(torch.tanh(self.up(x)))
        logits = self.down(hidden.mean(1))
        return SimpleNamespace(hidden=hidden, logits=logits, unused=hidden * 2, loss=logits.sum(), name="net")


@pytest.mark.usefixtures("_no_sample_alone")
@pytest.mark.parametrize(
    "wrap", [lambda o: o, vars, lambda o: (o.hidden, o.logits), lambda o: {"all": [o.hidden, o.logits]}]
)
def test_the_outputs_nearest_to_the_loss_are_found_in_whatever_the_model_returns(wrap: Callable[[Any], Any]) -> None:
    class Wrapped(Talkative):
        def forward(self, x: Tensor) -> Any:
            self.output = super().forward(x)
            return wrap(self.output)

    torch.manual_seed(0)
    model = Wrapped().double()
    plain = net()
    plain.load_state_dict(model.state_dict())

    def one(x: Tensor, y: Tensor) -> SampleBatch:
        def loss() -> Tensor:
            model(x)
            return F.cross_entropy(model.output.logits, y)

        return SampleBatch(loss, len(y), len(y), lambda n: one(x[n : n + 1], y[n : n + 1]))

    found, _ = run(model, [one(X, LABELS)])
    check(found, expected(plain, total, X, LABELS, 5))


def failing(loss: Callable[[Net], Tensor], **settings: Any) -> None:
    """Estimate on a loss of the net."""
    model = net()
    one = SampleBatch(lambda: loss(model), 5, 5, lambda n: pytest.fail("no sample should be needed"))
    run(model, [one], **settings)


def test_a_loss_that_reads_the_weights_past_the_outputs_is_an_error() -> None:
    with pytest.raises(UnsupportedModelError, match=r"from the model's outputs alone, got one that up.weight reaches"):
        failing(lambda model: F.cross_entropy(model(X), LABELS) + model.up.weight.square().sum())


def test_a_loss_that_reads_no_output_is_an_error() -> None:
    def loss(model: Net) -> Tensor:
        hidden = torch.tanh(model.up(X))
        return F.cross_entropy(model.down(model.norm(hidden)).mean(1), LABELS)

    with pytest.raises(UnsupportedModelError, match=r"another way|tensors that the model returns, got none"):
        failing(loss)


def test_an_exact_trace_of_very_many_outputs_is_an_error() -> None:
    torch.manual_seed(0)
    model = Net(64, pooled=False).double()
    x, y = torch.randn(2, 70, 3, dtype=torch.float64), torch.zeros(2, 70, dtype=torch.long)
    with pytest.raises(UnsupportedModelError, match=r"each of a sample's 4410 outputs.* set num_output_probes"):
        run(model, [batch(model, tokens, x, y)])


def test_no_batches_and_no_terms_are_errors() -> None:
    model = net()
    with pytest.raises(BatchError, match="expected at least one batch, got none"):
        run(model, [])
    with pytest.raises(BatchError, match="expected loss terms in the batches, got 1 with none"):
        run(model, [batch(model, F.cross_entropy, X, torch.full((5,), -100))])


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(CurvatureError, match="batch 0: expected a finite loss, got nan"):
        failing(lambda model: F.cross_entropy(model(X * float("nan")), LABELS))


def test_squares_that_overflow_are_an_error() -> None:
    model = net().float()
    wanted = Wanted({"up.weight": model.up.weight}, {"up.weight": (0,)}, squared)
    steep = batch(model, lambda z, y: 1e21 * F.cross_entropy(z, y), X.float(), LABELS)
    with pytest.raises(CurvatureError, match=r"batch 0: expected finite gradients, got NaN or infinities in up.weight"):
        estimate_fisher(model, [steep], wanted, lambda sums: sums["up.weight", 0])
