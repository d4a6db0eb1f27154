"""Products of weights and gradients, taken at the inputs of the layers, without any gradient of a weight."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from sample_gradients import SAMPLES, alone, randomised
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hap_hf.curvature import Wanted, squared, times_weights
from hap_hf.curvature.layer_watch import LayerWatch
from hap_hf.curvature.layers import MatrixCall
from hap_hf.curvature.replay import ReplayedCall
from hap_hf.layers.projection import input_dim
from hap_hf.model.state import preserved

pytestmark = pytest.mark.fast


class Called(nn.Module):
    """A layer behind an activation, called as often as it is told."""

    def __init__(self, layer: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the last call."""
        for _ in range(self.times):
            x = self.layer(torch.tanh(x))
        return x


def conv(*sizes: int, **how: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(*sizes, **how)


LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (SAMPLES, 7, 5)),
    "vectors": (lambda: nn.Linear(5, 4), (SAMPLES, 5)),
    "several rows a sample": (lambda: nn.Linear(5, 4), (2 * SAMPLES, 3, 5)),
    "transposed": (lambda: Conv1D(4, 5), (SAMPLES, 7, 5)),
    "sequence": (lambda: nn.Conv1d(3, 4, 3, padding=1), (SAMPLES, 3, 8)),
    "image": (conv(3, 4, 3, stride=2, padding=1, dilation=2), (SAMPLES, 3, 9, 8)),
    "circular": (conv(3, 4, 3, padding=1, padding_mode="circular"), (SAMPLES, 3, 6, 6)),
    "volume": (lambda: nn.Conv3d(2, 3, 2), (SAMPLES, 2, 4, 4, 4)),
}


def at_inputs(
    model: nn.Module, x: Tensor, statistic: Callable[[Tensor, Tensor], Tensor] = times_weights
) -> tuple[dict[tuple[str, int], Tensor], Tensor]:
    """Return what a watch makes of one backward pass for the columns of the layer, and the vector it started from."""
    tensors = {"layer.weight": model.get_parameter("layer.weight")}
    dim = 1 if getattr(model.layer, "groups", 1) > 1 else input_dim(model.layer)
    wanted = Wanted(tensors, {"layer.weight": (dim,)}, statistic)
    with preserved(model, tensors), LayerWatch(model, wanted) as watch, torch.enable_grad():
        with watch.recording():
            z = model(x)
        v = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(4))
        return watch.marginals(SAMPLES, [z], [v]), v


def no_gradient_of_a_weight() -> Any:
    """Return a context in which every other way to the products fails."""
    return mock.patch.multiple(MatrixCall, marginals=None, sample_gradients=None), mock.patch.object(
        ReplayedCall, "sample_gradients", None
    )


@pytest.mark.parametrize("which", LAYERS)
@pytest.mark.parametrize("reads_graph", [False, True])
def test_products_at_the_input_are_those_of_the_weights(which: str, reads_graph: bool) -> None:
    make, shape = LAYERS[which]
    model, x = randomised(Called(make())), torch.randn(shape, dtype=torch.float64)
    matrix, replay = no_gradient_of_a_weight()
    with matrix, replay:
        found, v = at_inputs(model, x.requires_grad_(reads_graph))
    ((key, value),) = found.items()
    expected = alone(model, model, x, v, "products")[key]
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    assert expected.abs().sum() > 0


def test_several_calls_of_one_layer_add_up() -> None:
    model, x = randomised(Called(nn.Linear(5, 5), times=3)), torch.randn(SAMPLES, 2, 5, dtype=torch.float64)
    found, v = at_inputs(model, x)
    ((key, value),) = found.items()
    torch.testing.assert_close(value, alone(model, model, x, v, "products")[key], rtol=1e-9, atol=1e-9)


class TwoKinds(nn.Module):
    """A weight that is read by a linear layer, and looked up in by an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(5, 5), nn.Linear(5, 5, bias=False)
        self.layer.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Return what both make."""
        return self.layer(torch.tanh(self.embedding(ids)))


def test_a_weight_that_a_layer_of_another_kind_shares_counts_both_uses() -> None:
    model, ids = randomised(TwoKinds()), torch.randint(0, 5, (SAMPLES, 4))
    tensors = {"embedding.weight": model.embedding.weight}
    wanted = Wanted(tensors, {"embedding.weight": (1,)}, times_weights)
    with preserved(model, tensors), LayerWatch(model, wanted) as watch, torch.enable_grad():
        with watch.recording():
            z = model(ids)
        v = torch.randn(z.shape, dtype=z.dtype)
        found = watch.marginals(SAMPLES, [z], [v])
    expected = alone(model, model, ids, v, "products")
    torch.testing.assert_close(found["embedding.weight", 1], expected["embedding.weight", 1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "shape", "statistic"),
    [
        (conv(4, 4, 3, groups=2), (SAMPLES, 4, 6, 6), times_weights),
        (lambda: nn.Linear(5, 4), (SAMPLES, 7, 5), squared),
    ],
    ids=["grouped", "squares"],
)
def test_other_questions_are_not_answered_at_the_input(
    make: Callable[[], nn.Module], shape: tuple[int, ...], statistic: Any
) -> None:
    model, x = randomised(Called(make())), torch.randn(shape, dtype=torch.float64)
    matrix, replay = no_gradient_of_a_weight()
    with matrix, replay, pytest.raises(TypeError, match="not callable"):
        at_inputs(model, x, statistic)
    found, v = at_inputs(model, x, statistic)
    name = "products" if statistic is times_weights else "squares"
    ((key, value),) = found.items()
    torch.testing.assert_close(value, alone(model, model, x, v, name)[key], rtol=1e-9, atol=1e-9)
