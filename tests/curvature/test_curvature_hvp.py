"""Hessian-vector products against dense Hessians and closed forms."""

from collections.abc import Callable

import pytest
import torch
from reference_curvature import dense_hessian, linear_regression_hessian, softmax_regression_hessian, split_like
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hap_hf.curvature import differentiable_gradient, hvp
from hap_hf.errors import CurvatureError

pytestmark = pytest.mark.fast

X = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 1, 0, 3])


def network_loss(w: dict[str, Tensor]) -> Tensor:
    """Return the cross entropy of a network with one hidden layer."""
    return F.cross_entropy(torch.tanh(X @ w["up"].T) @ w["down"].T, LABELS)


def network_weights(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Return random weights of that network."""
    generator = torch.Generator().manual_seed(2)
    shapes = {"up": (5, 3), "down": (4, 5)}
    return {
        n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for n, s in shapes.items()
    }


def vector_like(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a random vector."""
    generator = torch.Generator().manual_seed(3)
    return {n: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for n, t in tensors.items()}


def flat(parts: dict[str, Tensor]) -> Tensor:
    """Return all entries one after the other."""
    return torch.cat([p.detach().flatten() for p in parts.values()])


def test_product_equals_dense_hessian_times_vector() -> None:
    w = network_weights()
    v = vector_like(w)
    expected = dense_hessian(network_loss, w) @ flat(v)
    result = hvp(differentiable_gradient(network_loss(w), w), w, v)
    torch.testing.assert_close(flat(result), expected, rtol=0, atol=1e-9)


def test_one_gradient_serves_many_products() -> None:
    w = network_weights()
    gradient = differentiable_gradient(network_loss(w), w)
    hessian = dense_hessian(network_loss, w)
    columns = [flat(hvp(gradient, w, split_like(e, w))) for e in torch.eye(len(hessian), dtype=torch.float64)]
    torch.testing.assert_close(torch.stack(columns), hessian, rtol=0, atol=1e-9)


def linear_regression(w: dict[str, Tensor]) -> Tensor:
    """Return a mean squared error."""
    return F.mse_loss(X @ w["w"].T, X.flip(0)[:, :2])


def softmax_regression(w: dict[str, Tensor]) -> Tensor:
    """Return a mean cross entropy."""
    return F.cross_entropy(X @ w["w"].T, LABELS)


@pytest.mark.parametrize(
    ("loss", "outputs", "closed_form"),
    [
        (linear_regression, 2, lambda w: linear_regression_hessian(X, 2)),
        (softmax_regression, 4, lambda w: softmax_regression_hessian(X, w)),
    ],
    ids=["linear", "softmax"],
)
def test_product_equals_the_closed_form(
    loss: Callable[[dict[str, Tensor]], Tensor], outputs: int, closed_form: Callable[[Tensor], Tensor]
) -> None:
    w = {"w": torch.randn(outputs, 3, dtype=torch.float64, requires_grad=True)}
    v = vector_like(w)
    result = hvp(differentiable_gradient(loss(w), w), w, v)
    torch.testing.assert_close(flat(result), closed_form(w["w"].detach()) @ flat(v), rtol=0, atol=1e-9)


def test_the_loss_scale_is_divided_out_exactly_once() -> None:
    w = network_weights()
    v = vector_like(w)
    plain = hvp(differentiable_gradient(network_loss(w), w), w, v)
    scaled = hvp(differentiable_gradient(network_loss(w), w, scale=2.0**16), w, v, scale=2.0**16)
    assert torch.equal(flat(scaled), flat(plain))  # a power of two changes exponents only
    forgotten = hvp(differentiable_gradient(network_loss(w), w, scale=2.0**16), w, v)
    assert torch.equal(flat(forgotten), 2.0**16 * flat(plain))


def test_a_tensor_that_the_loss_ignores_has_no_curvature() -> None:
    w = network_weights() | {"other": torch.ones(2, 2, dtype=torch.float64, requires_grad=True)}
    result = hvp(differentiable_gradient(network_loss(w), w), w, vector_like(w))
    assert torch.equal(result["other"], torch.zeros(2, 2, dtype=torch.float64))
    assert result["up"].abs().sum() > 0


def test_a_loss_that_is_linear_in_the_weights_has_no_curvature() -> None:
    w = network_weights()
    loss = w["up"].sum() + (w["down"] * 2).sum()
    result = hvp(differentiable_gradient(loss, w), w, vector_like(w))
    assert torch.equal(flat(result), torch.zeros(35, dtype=torch.float64))


def test_nothing_is_stored_in_grad() -> None:
    w = network_weights()
    hvp(differentiable_gradient(network_loss(w), w), w, vector_like(w))
    assert all(t.grad is None for t in w.values())


@pytest.mark.parametrize(
    ("stored", "returned"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_products_are_at_least_float32(stored: torch.dtype, returned: torch.dtype) -> None:
    w = {"w": torch.ones(3, 3, dtype=stored, requires_grad=True)}
    result = hvp(differentiable_gradient(w["w"].square().sum(), w), w, vector_like(w))
    assert result["w"].dtype is returned


def test_a_loss_that_uses_no_tensor_is_an_error() -> None:
    other = torch.ones(2, requires_grad=True)
    with pytest.raises(CurvatureError, match=r"uses none of up, down$"):
        differentiable_gradient(other.sum(), network_weights())


class OnlyOnce(torch.autograd.Function):
    """A square whose backward pass has no derivative, like a fused kernel."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        """Return the square."""
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        """Return the derivative."""
        (x,) = ctx.saved_tensors
        return 2 * x * grad


def test_a_function_that_is_differentiable_only_once_is_an_error_and_not_a_lost_term() -> None:
    w = network_weights()
    loss = OnlyOnce.apply(w["up"]).square().sum() + w["up"].pow(3).sum()
    with pytest.raises(CurvatureError, match=r"differentiable only once; .* attn_implementation='sdpa'"):
        differentiable_gradient(loss, w)


def test_a_kernel_without_second_derivative_is_named() -> None:
    w = {"w": torch.randn(1, 2, 5, 4, requires_grad=True)}
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        gradient = differentiable_gradient(F.scaled_dot_product_attention(w["w"], w["w"], w["w"]).square().sum(), w)
    with pytest.raises(
        CurvatureError, match=r"twice: .*flash_attention.*; use method=.mask_fisher.*load the model with"
    ):
        hvp(gradient, w, vector_like(w))


def test_other_failures_of_the_backward_pass_are_not_disguised() -> None:
    w = network_weights()
    gradient = differentiable_gradient(network_loss(w), w)
    wrong = {n: v[:1] for n, v in vector_like(w).items()}
    with pytest.raises(RuntimeError, match="Mismatch in shape"):
        hvp(gradient, w, wrong)
