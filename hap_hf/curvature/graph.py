"""Reading autograd's graph: which values a path crosses, and which tensor a view is one of."""

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from hap_hf.host import viewed


def not_a_view(output: Tensor) -> Tensor:
    """Return the tensor that ``output`` is a view of, where it holds the same values in the same order.

    Linear layers may return a view of the product. If that is overwritten in place, autograd derives the whole product
    anew and goes around the view that was there before.

    Args:
        output: What a layer returned.

    Returns:
        The product, or ``output`` itself where it is no such view.
    """
    base = viewed(output)
    if base is None or not base.requires_grad or base.numel() != output.numel():
        return output
    # Equal numbers of entries, both contiguous: the same values in the same order, only the shape differs.
    return base if base.is_contiguous() and output.is_contiguous() else output


def reached_otherwise(
    targets: Sequence[Tensor],
    weights: Mapping[str, Tensor],
    recorded: Iterable[tuple[GradientEdge, Collection[str]]],
) -> list[str]:
    """Return the names of the weights to which a path leads that does not cross a recorded output of their own.

    The gradients of samples are made from those at recorded outputs, so such a path would be missing in them. Paths are
    many and nodes few: for each node only the set of weights is kept whose outputs some path to it did not cross.

    Args:
        targets: Where the paths begin.
        weights: The weights by name.
        recorded: Outputs of layers, and the names of the weights that each was computed with.

    Returns:
        The names; none where every use of every weight was recorded.
    """
    names = list(weights)
    bits = {name: 1 << i for i, name in enumerate(names)}  # a set of weights is a number
    leaves = {id(t): bits[name] for name, t in weights.items()}
    crossed: dict[tuple[Node | None, int], int] = {}
    for output, own in recorded:
        edge = (output.node, output.output_nr)
        crossed[edge] = crossed.get(edge, 0) | sum(bits[name] for name in own)
    starts = [(t.grad_fn, t.output_nr) for t in targets]
    unseen: dict[Node, int] = {}  # by node, the weights whose outputs some path to it did not cross

    def walk(edges: Iterable[tuple[Node | None, int]], still: int) -> None:
        for node, number in edges:
            if node is not None:
                unseen[node] = unseen.get(node, 0) | still & ~crossed.get((node, number), 0)

    walk(starts, sum(bits.values()))
    missed = 0
    # Before a node's turn all edges into it have been walked, so its set is complete when it is passed on.
    for node in _topological(starts):
        missed |= unseen[node] & leaves.get(id(getattr(node, "variable", None)), 0)
        walk(node.next_functions, unseen[node])
    return [name for name in names if missed & bits[name]]


def _topological(starts: Iterable[tuple[Node | None, int]]) -> list[Node]:
    """Return the nodes of a graph, each before all that it leads to."""
    after: list[Node] = []
    visited: set[Node] = set()
    # Depth first: a node is put down twice, and is done at the second time, when all that it leads to is done.
    ahead = [(node, False) for node, _ in starts]
    while ahead:
        node, done = ahead.pop()
        if node is None or (node in visited and not done):
            continue
        if done:
            after.append(node)
        else:
            visited.add(node)
            ahead.append((node, True))
            ahead.extend((following, False) for following, _ in node.next_functions)
    return after[::-1]
