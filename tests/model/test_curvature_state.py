"""Whatever happens inside the block, the model is left exactly as found."""

import copy

import pytest
import torch
from scored_models import snapshot
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from hap_hf.model.state import preserved

ENDINGS = [None, ValueError("loss failed"), KeyboardInterrupt()]


def model_in_an_uneven_state() -> nn.Module:
    """Return a model with mixed flags, a frozen weight, a stored gradient, and buffers."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model.train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[3].weight.grad = torch.ones(2, 4)
    model.register_buffer("none", None)
    return model


def disturb(model: nn.Module) -> None:
    """Change everything that a forward and a backward pass of a careless loss could change."""
    torch.rand(3)
    model.train()
    model(torch.randn(5, 3)).sum().backward()
    model[1].running_mean.add_(1)
    model[1].running_var = torch.zeros(4)
    model.register_buffer("late", torch.ones(1))
    model.none = torch.ones(1)


@pytest.mark.parametrize("ending", ENDINGS, ids=["normal", "exception", "interrupt"])
def test_flags_gradients_buffers_and_random_state_come_back(ending: BaseException | None) -> None:
    model = model_in_an_uneven_state()
    before = snapshot(model)

    def run() -> None:
        with preserved(model, {"0.weight": model[0].weight}):
            disturb(model)
            assert snapshot(model) != before
            if ending is not None:
                raise ending

    if ending is None:
        run()
    else:
        with pytest.raises(type(ending)):
            run()
    assert snapshot(model) == before


def test_inside_the_model_is_in_eval_mode_and_only_the_named_tensors_require_gradients() -> None:
    model = model_in_an_uneven_state()
    with preserved(model, {"0.bias": model[0].bias}):
        assert not any(m.training for m in model.modules())
        assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.bias"]
        assert all(p.grad is None for p in model.parameters())


def test_without_tensors_nothing_requires_gradients() -> None:
    model = model_in_an_uneven_state()
    with preserved(model):
        assert not any(p.requires_grad for p in model.parameters())


def test_attention_can_be_differentiated_twice_inside() -> None:
    query = torch.randn(1, 2, 5, 4, requires_grad=True)
    with preserved(nn.Linear(1, 1)):
        out = scaled_dot_product_attention(query, query, query).square().sum()
        (gradient,) = torch.autograd.grad(out, query, create_graph=True)
        (second,) = torch.autograd.grad(gradient.sum(), query)
    assert torch.isfinite(second).all()


class Checkpointed(nn.Module):
    """A layer that recomputes its activations, also in eval mode."""

    def __init__(self, flag: str) -> None:
        super().__init__()
        self.flag, self.inner = flag, nn.Linear(3, 3)
        setattr(self, flag, True)

    def forward(self, x: Tensor) -> Tensor:
        """Recompute under the flag."""
        if getattr(self, self.flag):
            return checkpoint(self.inner, x, use_reentrant=True)
        return self.inner(x)


@pytest.mark.parametrize("flag", ["gradient_checkpointing", "grad_checkpointing"])
def test_gradient_checkpointing_is_off_inside_and_on_again_after(flag: str) -> None:
    model = Checkpointed(flag)
    x = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(model(x).sum(), model.inner.weight)
    with preserved(model, {"weight": model.inner.weight}):
        torch.autograd.grad(model(x).sum(), model.inner.weight)
        assert getattr(model, flag) is False
    assert getattr(model, flag) is True


def test_an_undisturbed_model_keeps_the_versions_of_its_buffers() -> None:
    model = model_in_an_uneven_state()
    before = copy.copy(model[1].running_mean._version)
    with preserved(model):
        pass
    assert model[1].running_mean._version == before


@pytest.mark.parametrize("plain", [True, False])
def test_attention_can_be_left_on_the_kernel_that_it_has(plain: bool) -> None:
    enabled = torch.backends.cuda.flash_sdp_enabled()
    assert enabled
    with preserved(nn.Linear(1, 1), plain_attention=plain):
        assert torch.backends.cuda.flash_sdp_enabled() is not plain
        assert torch.backends.cuda.math_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() is enabled


@pytest.mark.parametrize("flag", ["gradient_checkpointing", "grad_checkpointing"])
def test_gradient_checkpointing_can_be_left_on_inside(flag: str) -> None:
    model = Checkpointed(flag)
    with preserved(model, {"weight": model.inner.weight}, without_checkpointing=False):
        assert getattr(model, flag) is True
        x = torch.randn(2, 3, requires_grad=True)
        with pytest.raises(RuntimeError, match="not have been used"):
            torch.autograd.grad(model(x).sum(), model.inner.weight)
    assert getattr(model, flag) is True
