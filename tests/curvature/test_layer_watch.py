"""Which calls a watch sees, how it adds them up, and what it leaves behind."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sample_gradients import IMAGE, SAMPLES, SEQUENCE, STATISTICS, VECTOR, check, randomised, watched
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hap_hf.curvature.layers import NotPerSampleError

pytestmark = pytest.mark.fast


class Shared(nn.Module):
    """One layer called three times, and one that shares its weight under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.twin = nn.Linear(5, 5), nn.Linear(5, 5)
        self.twin.weight = self.layer.weight
        self.norm = nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        """Return what passes through all of them."""
        for _ in range(3):
            x = self.norm(torch.tanh(self.layer(x)))
        return self.twin(x)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_gradients_of_a_shared_weight_are_added_before_they_are_squared(statistic: str) -> None:
    check(randomised(Shared()), torch.randn(SEQUENCE, dtype=torch.float64), statistic)


class Tied(nn.Module):
    """An output layer that shares the embeddings, as language models have."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits."""
        return self.head(torch.tanh(self.embedding(ids)))


def test_a_weight_may_be_shared_by_layers_of_two_kinds() -> None:
    check(randomised(Tied()), torch.randint(0, 9, (SAMPLES, 6)), "squares")


IN_PLACE = [F.relu_, torch.Tensor.tanh_, lambda x: x.mul_(2), lambda x: x[:, :2].zero_(), lambda x: x.view(-1).tanh_()]
# GPT-2's layer returns a view of the product on every version of torch, nn.Linear on some.
LAYERS = {
    "Linear": (lambda: (nn.Linear(5, 6), nn.Linear(6, 4)), SEQUENCE),
    "Conv1D": (lambda: (Conv1D(6, 5), nn.Linear(6, 4)), SEQUENCE),
    "Conv2d": (lambda: (nn.Conv2d(4, 6, 3), nn.Conv2d(6, 2, 3)), IMAGE),
}


def overwriting(activation: Callable[[Tensor], Tensor], layer: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Return two layers, and a forward pass that overwrites the output of the first."""
    model = randomised(nn.Sequential(*LAYERS[layer][0]()))

    def forward(x: Tensor) -> Tensor:
        hidden = model[0](x)
        activation(hidden)
        return model[1](hidden)

    return model, forward


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("activation", IN_PLACE)
def test_an_output_that_is_overwritten_in_place_does_no_harm(
    activation: Callable[[Tensor], Tensor], layer: str
) -> None:
    model, forward = overwriting(activation, layer)
    check(model, torch.randn(LAYERS[layer][1], dtype=torch.float64), "squares", forward)


def test_an_output_that_is_used_and_then_overwritten_does_no_harm() -> None:
    model = randomised(nn.Sequential(Conv1D(6, 5), nn.Linear(6, 4)))

    def forward(x: Tensor) -> Tensor:
        hidden = model[0](x)
        twice = hidden * 2
        return model[1](hidden.relu_() + twice)

    check(model, torch.randn(SEQUENCE, dtype=torch.float64), "squares", forward)


def test_a_gradient_that_goes_around_the_hook_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hap_hf.curvature.layer_watch.not_a_view", lambda output: output)
    model, forward = overwriting(F.relu_, "Conv1D")
    x = torch.randn(SEQUENCE, dtype=torch.float64)
    with pytest.raises(NotPerSampleError, match=r"0\.weight, 0\.bias is used outside its layer, or .* overwritten"):
        watched(model, forward, x, "squares")
    monkeypatch.setattr("hap_hf.curvature.layer_watch.reached_otherwise", lambda *args: [])
    found, _ = watched(model, forward, x, "squares")
    assert not found["0.weight", 0].any()  # what it would be without both
    assert found["1.weight", 0].any()


def test_inputs_that_require_gradients_do_no_harm() -> None:
    model = randomised(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)))
    check(model, torch.randn(SEQUENCE, dtype=torch.float64), "squares", lambda x: model(x.clone().requires_grad_() * 2))


def test_layers_that_are_never_called_have_no_gradient() -> None:
    model = randomised(nn.ModuleList([nn.Linear(5, 4), nn.Linear(5, 4)]))
    found, _ = watched(model, model[0], torch.randn(VECTOR, dtype=torch.float64), "squares")
    assert found["0.weight", 0].sum() > 0
    assert torch.equal(found["1.weight", 1], torch.zeros(SAMPLES, 5, dtype=torch.float64))


def test_no_gradient_of_a_weight_is_computed_on_the_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomised(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)))
    asked: list[int] = []
    original = torch.autograd.grad

    def watching(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(len(inputs))
        assert not any(isinstance(x, nn.Parameter) for x in inputs)
        return original(outputs, inputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", watching)
    watched(model, model, torch.randn(VECTOR, dtype=torch.float64), "squares")
    assert asked == [1]  # the output of the first layer


def test_hooks_are_taken_down_also_after_an_exception() -> None:
    model = randomised(nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6)))
    with pytest.raises(ValueError, match="inside"):
        watched(model, lambda x: raising(model(x)), torch.randn(VECTOR, dtype=torch.float64), "squares")
    assert not any(m._forward_hooks for m in model.modules())


def raising(x: Tensor) -> Tensor:
    """Raise an error."""
    raise ValueError("inside")


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (nn.Linear(5, 4), (5,), r"a Linear was called with an input of shape \[5\]"),
        (nn.Conv2d(4, 6, 3), (4, 5, 5), r"a Conv2d was called with an input of shape \[4, 5, 5\]"),
        (nn.Linear(5, 4), (4, 5), "a Linear has 4 rows for 3 samples"),
        (nn.Bilinear(5, 5, 2), (3, 5), "a Bilinear was called with 2 tensors"),
        (nn.LSTM(5, 4), (3, 2, 5), "a LSTM returned something else than one tensor"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_what_cannot_be_split_into_samples_is_said(model: nn.Module, shape: tuple[int, ...], message: str) -> None:
    def forward(x: Tensor) -> Tensor:
        if isinstance(model, nn.LSTM):
            return model(x)[0]
        return model(x, x) if isinstance(model, nn.Bilinear) else model(x)

    with pytest.raises(NotPerSampleError, match=message):
        watched(model, forward, torch.randn(shape), "squares")
