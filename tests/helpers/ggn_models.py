"""A small model, batches whose samples can be told apart, losses, and their Gauss-Newton traces written out."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from reference_curvature import split_like
from reference_ggn import along_each_dimension, dense_ggn
from torch import Tensor, nn
from torch.nn import functional as F

from hap_hf.curvature import SampleBatch, SampleEstimate, Wanted, estimate_ggn, rademacher, squared
from hap_hf.model.state import preserved

GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(5, 6, 3, dtype=torch.float64, generator=GENERATOR)  # samples, positions, features
LABELS = torch.tensor([0, 2, 1, 1, 0])
TOKEN_LABELS = torch.randint(0, 3, (5, 6), generator=GENERATOR)
TOKEN_LABELS[1, 2:] = TOKEN_LABELS[3, 0] = -100
TARGETS = torch.randn(5, 3, dtype=torch.float64, generator=GENERATOR)

Loss = Callable[[Tensor, Tensor], Tensor]


class Net(nn.Module):
    """Two layers at every position, pooled or not."""

    def __init__(self, outputs: int = 3, *, pooled: bool = True) -> None:
        super().__init__()
        self.pooled = pooled
        self.up, self.norm, self.down = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs, [samples, outputs] or one row a position."""
        hidden = self.norm(torch.tanh(self.up(x)))
        return self.down(hidden.mean(1) if self.pooled else hidden)


def net(outputs: int = 3, **settings: Any) -> Net:
    """Return the net in float64 with a norm that does something."""
    torch.manual_seed(0)
    model = Net(outputs, **settings).double()
    nn.init.normal_(model.norm.weight)
    return model


def batch(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> SampleBatch:
    """Return a batch whose terms are the labels that count."""
    terms = int((y != -100).sum()) if y.dtype == torch.long else y.shape[0]
    return SampleBatch(
        lambda: loss(model(x), y), terms, x.shape[0], lambda n: batch(model, loss, x[n : n + 1], y[n : n + 1])
    )


def run(
    model: nn.Module,
    batches: Sequence[SampleBatch],
    *,
    num_probes: int | None = None,
    signs: Any = None,
    **settings: Any,
) -> tuple[dict[tuple[str, int], Tensor], SampleEstimate]:
    """Estimate the traces along every dimension of every parameter, exactly unless told otherwise."""
    tensors = dict(model.named_parameters())
    wanted = Wanted(tensors, {n: tuple(range(t.dim())) for n, t in tensors.items()}, settings.pop("statistic", squared))
    keys = [(n, d) for n, t in tensors.items() for d in range(t.dim())]
    with preserved(model, tensors):
        estimate = estimate_ggn(
            model,
            batches,
            wanted,
            settings.pop("reduce", lambda sums: torch.cat([sums[k] for k in keys], 1)),
            signs or (lambda like, batch, probe: rademacher(like, 0, batch, probe)),
            num_probes=num_probes,
            **settings,
        )
    sizes = [tensors[n].shape[d] for n, d in keys]
    return dict(zip(keys, estimate.mean.split(sizes), strict=True)), estimate


def expected(model: nn.Module, loss_sum: Loss, x: Tensor, y: Tensor, num_terms: int) -> dict[tuple[str, int], Tensor]:
    """Return the same from the dense matrix."""
    tensors = dict(model.named_parameters())
    outputs = [lambda n=n: [model(x[n : n + 1])] for n in range(len(x))]
    losses = [lambda z, n=n: loss_sum(z, y[n : n + 1]) for n in range(len(x))]
    matrix = dense_ggn(outputs, losses, tensors, num_terms)
    return along_each_dimension(split_like(matrix.diagonal(), tensors))


def check(found: Mapping[Any, Tensor], truth: Mapping[Any, Tensor], tolerance: float = 1e-9) -> None:
    """Compare by name and dimension."""
    assert found.keys() == truth.keys()
    for key, value in truth.items():
        torch.testing.assert_close(found[key], value, rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")
    assert sum(x.sum() for x in truth.values()) > 1e-3


def tokens(z: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    """Return cross entropy at every position whose label counts."""
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction=reduction)


def next_tokens(z: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    """Return cross entropy of each position's outputs with the next label."""
    return tokens(z[:, :-1], y[:, 1:], reduction)


def mean_over_samples(loss: Callable[..., Tensor]) -> tuple[Loss, Loss]:
    """Return a loss with its mean taken over samples, and with the sum."""
    return lambda z, y: loss(z, y, reduction="mean"), lambda z, y: loss(z, y, reduction="sum")


CASES: dict[str, tuple[Callable[[], Net], Loss, Loss, Tensor, int]] = {
    "classes": (net, *mean_over_samples(F.cross_entropy), LABELS, 5),
    "two_classes": (partial(net, 2), *mean_over_samples(F.cross_entropy), LABELS % 2, 5),
    "tokens": (partial(net, pooled=False), tokens, partial(tokens, reduction="sum"), TOKEN_LABELS, 25),
    "regression": (
        partial(net, 1),
        lambda z, y: F.mse_loss(z[:, 0], y),
        lambda z, y: (z[:, 0] - y).square().sum(),
        TARGETS[:, 0],
        5,
    ),
    "regression_of_several": (net, F.mse_loss, lambda z, y: (z - y).square().sum() / 3, TARGETS, 5),
    "several_labels": (
        net,
        F.binary_cross_entropy_with_logits,
        lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="sum") / 3,
        (TARGETS > 0).double(),
        5,
    ),
    "smoothed": (
        net,
        partial(F.cross_entropy, label_smoothing=0.2),
        partial(F.cross_entropy, label_smoothing=0.2, reduction="sum"),
        LABELS,
        5,
    ),
}
