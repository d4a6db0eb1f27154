"""The tensors through which a model's weights reach the loss."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node

from hap_hf.errors import UnsupportedModelError
from hap_hf.host import tree_map_only


@contextmanager
def recorded_outputs(model: nn.Module) -> Generator[list[Tensor], None, None]:
    """Collect the tensors that every call of ``model`` inside the block returns.

    What is returned are views of them, of which none is computed from another: a loss of all hidden states then reaches
    each of them on a path of its own, and not through the later ones.

    Args:
        model: The model; calls of modules inside it do not count.

    Yields:
        A list that grows with every call, of the views and of what a loss inside of the model is computed from.
    """
    found: list[Tensor] = []

    def record(module: nn.Module, args: object, output: object) -> object:
        seen = [t for t in _tensors_in(output) if t.grad_fn is not None and t.dim()]
        views = {id(t): t.view_as(t) for t in seen}
        found.extend([*views.values(), *seen])
        return tree_map_only(Tensor, lambda t: views.get(id(t), t), output)

    handle = model.register_forward_hook(record)
    try:
        yield found
    finally:
        handle.remove()


def _tensors_in(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors_in(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors_in(value)
    elif hasattr(output, "__dict__"):  # dataclasses and namespaces
        yield from (value for value in vars(output).values() if isinstance(value, Tensor))


def last_before_loss(loss: Tensor, candidates: Sequence[Tensor], weights: Mapping[str, Tensor]) -> list[Tensor]:
    """Return those candidates that the loss is computed from: on each path of its graph the one nearest to it.

    So the logits, and not the hidden states that a model may return beside them.

    Args:
        loss: The loss with its graph.
        candidates: Tensors that the model returned. Scalars, such as the loss itself, do not count.
        weights: The weights that gradients are asked for, by name.

    Returns:
        The tensors, in the order of ``candidates``.

    Raises:
        UnsupportedModelError: If the loss depends on a weight in another way too, or on no candidate.
    """
    ends: dict[tuple[Node | None, int], int] = {
        (t.grad_fn, t.output_nr): i for i, t in enumerate(candidates) if t.grad_fn is not None and t.dim()
    }
    names = {id(weight): name for name, weight in weights.items()}
    hits: set[int] = set()
    seen: set[Node] = set()
    ahead: list[tuple[Node | None, int]] = [(loss.grad_fn, 0)]
    while ahead:
        node, number = ahead.pop()
        # A path ends at the first candidate that it meets, so hidden states behind the logits are not hit.
        if (node, number) in ends:
            hits.add(ends[node, number])
        elif node is not None and node not in seen:
            seen.add(node)
            leaf = getattr(node, "variable", None)  # only where the graph ends in a leaf
            if id(leaf) in names:
                raise UnsupportedModelError(
                    f"expected a loss that is computed from the model's outputs alone, got one that {names[id(leaf)]} "
                    "reaches in another way; let the model return the outputs that the loss is computed from"
                )
            ahead.extend(node.next_functions)
    if not hits:
        raise UnsupportedModelError(
            "expected a loss that is computed from tensors that the model returns, got none; let the model return its "
            "logits"
        )
    return [candidates[i] for i in sorted(hits)]
