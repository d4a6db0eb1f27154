"""Hessian-vector products by differentiating twice."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from hap_hf.errors import CurvatureError

# What autograd says of a backward pass without a derivative: fused kernels, compiled modules, custom operators.
_NOT_TWICE = ("is not implemented", "double backward", "no autograd formula")
_ADVICE = (
    "use method='mask_fisher', which takes gradients alone, or set hvp='finite_difference' in the criterion; where it "
    "is the attention, load the model with attn_implementation='sdpa' or 'eager'; compile a model after scoring"
)


def plain_gradient(
    loss: Tensor, tensors: Mapping[str, Tensor], scale: float = 1.0, *, create_graph: bool = False
) -> dict[str, Tensor]:
    """Return the gradient of ``scale * loss``.

    Args:
        loss: Scalar loss with its graph.
        tensors: What to differentiate with respect to, by name.
        scale: Constant loss scale, so that float16 gradients do not vanish.
        create_graph: Whether to keep the graph of the loss and make one of the gradient.

    Returns:
        Scaled gradients by name, in the dtype of the tensors, without the tensors that the loss does not use.

    Raises:
        CurvatureError: If the loss uses none of the tensors.
    """
    # Widened first: a loss in float16 times its scale overflows.
    scaled = loss.to(accumulation_dtype(loss.dtype)) * scale
    # grad() and not backward(create_graph=True): nothing is stored in .grad, so there is no reference cycle
    found = torch.autograd.grad(scaled, list(tensors.values()), create_graph=create_graph, allow_unused=True)
    gradient = {name: g for name, g in zip(tensors, found, strict=True) if g is not None}
    if not gradient:
        raise CurvatureError(
            f"expected a loss that depends on the scored weights, got one that uses none of {listed(list(tensors))}"
        )
    return gradient


def differentiable_gradient(loss: Tensor, tensors: Mapping[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
    """Return the gradient of ``scale * loss`` as a function that can be differentiated again.

    Args:
        loss: Scalar loss with its graph, which is kept.
        tensors: What to differentiate with respect to, by name.
        scale: Constant loss scale, so that float16 gradients do not vanish.

    Returns:
        Scaled gradients by name, in the dtype of the tensors, without the tensors that the loss does not use.

    Raises:
        CurvatureError: If the loss uses none of the tensors, or a part of the model has no second derivative.
    """
    gradient = plain_gradient(loss, tensors, scale, create_graph=True)
    if not _twice_differentiable(gradient.values()):
        raise CurvatureError(f"a custom autograd function in the model is differentiable only once; {_ADVICE}")
    return gradient


def _twice_differentiable(gradient: Iterable[Tensor]) -> bool:
    """Return whether no function on the way to the gradient is marked ``once_differentiable``.

    Such a function leaves an error node that is tied to no weight. A second backward pass that is asked for weights
    only never gets there, and would lose the function's curvature in silence.
    """
    seen: set[Node] = set()
    ahead: list[Node | None] = [g.grad_fn for g in gradient]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            if node.name() == "torch::autograd::Error":
                return False
            seen.add(node)
            ahead.extend(following for following, _ in node.next_functions)
    return True


def hvp(
    gradient: Mapping[str, Tensor], tensors: Mapping[str, Tensor], vector: Mapping[str, Tensor], scale: float = 1.0
) -> dict[str, Tensor]:
    r"""Return ``H v`` for all tensors at once, by one backward pass through the gradient.

    With ``g = scale * grad L``, the vector-Jacobian product ``v^T dg/dw`` is ``scale * H v``, as H is symmetric. It is
    linear in the loss scale, which therefore is divided out exactly once.

    Args:
        gradient: What :func:`differentiable_gradient` returned for the same tensors and scale; its graph is kept.
        tensors: The tensors, by name.
        vector: The vector, by name, in the shapes and dtypes of the tensors.
        scale: The loss scale of ``gradient``.

    Returns:
        ``H v`` by name, unscaled, in float32 (float64 for float64 tensors); zero where it vanishes identically.

    Raises:
        CurvatureError: If a part of the model has no second derivative.
        RuntimeError: If the backward pass fails for another reason.
    """
    # A gradient without a graph is constant, as where the loss is linear in a weight: its rows of H are zero.
    curved = [name for name, g in gradient.items() if g.requires_grad]
    products: tuple[Tensor | None, ...] = (None,) * len(tensors)
    if curved:
        try:
            products = torch.autograd.grad(
                [gradient[name] for name in curved],
                list(tensors.values()),
                [vector[name] for name in curved],
                retain_graph=True,
                allow_unused=True,
            )
        except RuntimeError as error:
            if not any(text in str(error) for text in _NOT_TWICE):
                raise
            raise CurvatureError(f"a part of the model cannot be differentiated twice: {error}; {_ADVICE}") from error
    return unscaled(dict(zip(tensors, products, strict=True)), tensors, scale)


def unscaled(
    found: Mapping[str, Tensor | None], tensors: Mapping[str, Tensor], scale: float = 1.0
) -> dict[str, Tensor]:
    """Return derivatives without their loss scale, in the dtype to accumulate them in.

    Args:
        found: Scaled derivatives by name; missing or None where they vanish identically.
        tensors: What they are derivatives with respect to, by name.
        scale: The loss scale.

    Returns:
        The derivatives of all tensors, in float32 (float64 for float64 tensors).
    """
    result = {}
    for name, t in tensors.items():
        derivative = found.get(name)
        wide = torch.zeros_like(t).detach() if derivative is None else derivative
        # The scale lifts small values above float16's smallest; it may only be taken out of the wider dtype.
        wide = wide.to(accumulation_dtype(t.dtype))
        result[name] = wide if scale == 1 else wide / scale
    return result


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for products and sums of values of ``dtype``: float64 for float64, else float32.

    Args:
        dtype: A floating-point dtype.

    Returns:
        The dtype.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return the first few names and how many more there are, for messages.

    Args:
        names: The names, all of them.
        most: How many to spell out.

    Returns:
        The names, separated by commas.
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
