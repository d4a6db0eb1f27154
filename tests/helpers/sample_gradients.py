"""Per-sample gradients twice: from a watch on the layers, and from one plain backward pass a sample."""

from collections.abc import Callable

import torch
from reference_ggn import along_each_dimension, gradient
from torch import Tensor, nn

from hap_hf.curvature import Wanted, squared, times_weights
from hap_hf.curvature.layer_watch import LayerWatch
from hap_hf.model.state import preserved

SAMPLES = 3
STATISTICS = {"squares": squared, "products": times_weights}
VECTOR, SEQUENCE, IMAGE = (SAMPLES, 5), (SAMPLES, 7, 5), (SAMPLES, 4, 8, 7)


def randomised(module: nn.Module) -> nn.Module:
    """Return a module in float64 with random parameters."""
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    return module


def watched(
    model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, statistic: str, num_dims: int = 2
) -> tuple[dict[tuple[str, int], Tensor], Tensor]:
    """Return what a watch makes of one backward pass from a random vector, along the first dimensions, and it."""
    tensors = dict(model.named_parameters())
    dims = {n: tuple(range(min(t.dim(), num_dims))) for n, t in tensors.items()}
    wanted = Wanted(tensors, dims, STATISTICS[statistic])
    with preserved(model, tensors), LayerWatch(model, wanted) as watch, torch.enable_grad():
        with watch.recording():
            z = forward(x)
        v = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(4))
        return watch.marginals(SAMPLES, [z], [v]), v


def alone(
    model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, statistic: str
) -> dict[tuple[str, int], Tensor]:
    """Return the same from one plain backward pass a sample."""
    tensors = dict(model.named_parameters())
    rows, stacks = x.shape[0] // SAMPLES, []
    for n in range(SAMPLES):
        z = forward(x[n * rows : (n + 1) * rows])
        g = gradient((z * v.view(SAMPLES, -1)[n].view(z.shape)).sum(), tensors)
        values = {k: g[k].square() if statistic == "squares" else g[k] * tensors[k].detach() for k in g}
        stacks.append(along_each_dimension(values))
    return {key: torch.stack([s[key] for s in stacks]) for key in stacks[0]}


def check(
    model: nn.Module,
    x: Tensor,
    statistic: str,
    forward: Callable[[Tensor], Tensor] | None = None,
    num_dims: int = 2,
) -> None:
    """Compare the two."""
    forward = forward or model
    found, v = watched(model, forward, x, statistic, num_dims)
    expected = alone(model, forward, x, v, statistic)
    assert found.keys() == {(n, d) for n, p in model.named_parameters() for d in range(min(p.dim(), num_dims))}
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")
    assert all(x.abs().sum() > 0 for x in expected.values())
