"""Carrying an optimizer over a change of parameters."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hap_hf.errors import UnsupportedModelError
from hap_hf.model.change import TensorChange

State = dict[str, Any]
"""What an optimizer remembers of one parameter, by name."""


@torch.no_grad()
def carry_optimizer_state_(optimizer: Optimizer, changes: Iterable[TensorChange]) -> None:
    """Make ``optimizer`` train the new parameters, with the state of the entries that remain.

    A parameter swapped behind an optimizer's back is never trained again: the optimizer still holds the old tensor.
    State tensors of the parameter's shape (moments, momentum buffers) are cut like the parameter, and so are factored
    ones, of its shape without one dimension or with 1 there. Step counts and other single numbers are kept. Implant
    weights join the parameter group of the weight they stand in for, right behind it, and start without state.

    Factors as Adafactor's stand for ``row column^T / mean(row)``, where both are means over the other's entries. Cut
    alone they would stand for something else, so what is left of them is scaled to stand for the same as before.

    Reference: Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", ICML 2018.

    Args:
        optimizer: A torch optimizer, not a wrapper around one.
        changes: What surgery changed, in order.

    Raises:
        UnsupportedModelError: If the state of a changed parameter cannot be cut; the optimizer is then as it was.
    """
    changes = tuple(changes)
    # All states are cut before the optimizer is touched, so that one that cannot be cut leaves it as it was.
    states: dict[Tensor, State] = {}
    for change in changes:
        old = change.old
        # A later stage may cut what an earlier one made: the state is then here already, and moves on.
        if old is not None and (state := states.pop(old, None) or optimizer.state.get(old)):
            states[change.new] = _cut_state(optimizer, state, old, change)
    for change in changes:
        old = change.old if change.old is not None else change.beside
        for group in optimizer.param_groups:
            params: list[Tensor] = group["params"]
            position = next((i for i, p in enumerate(params) if p is old), None)
            if position is None:
                continue
            if change.old is not None:
                params[position] = change.new
                continue
            # Where a fresh optimizer over the pruned model would have it: saved states go by position.
            params.insert(position + 1, change.new)
            if "param_names" in group:
                group["param_names"].insert(position + 1, change.name)
            states |= _state_at_construction(optimizer, group, change.new)
    for change in changes:
        if change.old is not None:
            optimizer.state.pop(change.old, None)
    optimizer.state.update(states)


def _state_at_construction(optimizer: Optimizer, group: Mapping[str, Any], new: Tensor) -> dict[Tensor, State]:
    """Return the state that a new parameter must have before its first step, for optimizers that do not make it then.

    Args:
        optimizer: The optimizer that is carried over.
        group: The parameter group that the parameter joined.
        new: An implant's weight.

    Returns:
        The state by parameter; empty for most optimizers.
    """
    if not isinstance(optimizer, torch.optim.Adagrad):
        return {}
    # A throw-away optimizer makes the state as torch does, whatever that is in the version at hand.
    options = {k: v for k, v in group.items() if k not in {"params", "param_names"}}
    start = optimizer.defaults["initial_accumulator_value"]
    return dict(torch.optim.Adagrad([{**options, "params": [new]}], initial_accumulator_value=start).state)


def _cut_state(optimizer: Optimizer, state: State, old: Tensor, change: TensorChange) -> State:
    """Return what is left of the state of one parameter; an entry that cannot be cut is named in the error."""
    cut = {}
    for name, value in state.items():
        try:
            cut[name] = _cut(name, value, old.shape, change.index, change.new)
        except _UncuttableError as error:
            raise UnsupportedModelError(
                f"{type(optimizer).__name__} remembers {error} of {change.name}, {_sizes(old)}, as {name!r}, which "
                "cannot be cut with it; expected tensors of the parameter's shape, factors of it or single numbers: "
                "prune before the first step, or train with AdamW, SGD or Adafactor"
            ) from None
    for row in _row_factors(state, old.shape):
        _rescale_factors_(cut, state, row, old.shape, change.index)
    return cut


class _UncuttableError(Exception):
    """Says what it is that cannot be cut."""


def _cut(name: str, value: Any, whole: torch.Size, index: Mapping[int, Tensor], like: Tensor | None = None) -> Any:
    """Return what is left of one entry of a parameter's state.

    Args:
        name: Its name.
        value: A tensor, or anything else.
        whole: Shape of the parameter before.
        index: For each dimension of it that is cut, the old indices in their new order.
        like: The parameter after, for where a tensor of its shape lies in memory.

    Returns:
        The entry of the new parameter.

    Raises:
        _UncuttableError: If that is not known.
    """
    if not isinstance(value, Tensor):
        if _holds_tensors(value):
            raise _UncuttableError(f"a {type(value).__name__} with tensors")
        return value
    if type(value) not in {Tensor, nn.Parameter}:  # what is quantized or in parts only looks like a tensor
        raise _UncuttableError(f"a {type(value).__name__}")
    places = _places(name, value.shape, whole, set(index))
    if places is None:
        if value.numel() == 1:
            return value
        raise _UncuttableError(f"a tensor {_sizes(value)}")
    for dim, place in places.items():
        value = value.index_select(place, index[dim].to(value.device))
    if like is None or value.shape != like.shape:
        return value.clone()
    # Fused kernels want a parameter and its state to lie in memory alike.
    return torch.empty_like(like, dtype=value.dtype, device=value.device, requires_grad=False).copy_(value)


def _places(name: str, shape: torch.Size, whole: torch.Size, cut: set[int]) -> dict[int, int] | None:
    """Return where in a state tensor those dimensions of its parameter are that are cut.

    Args:
        name: Name of the tensor, which tells rows from columns where its shape does not.
        shape: Its shape.
        whole: The parameter's.
        cut: The dimensions of the parameter that are cut.

    Returns:
        For each of them that the tensor has, its dimension; None where the tensor has none of the shapes expected.
    """
    # The parameter's shape, or with 1 along some dimensions, over which a mean was taken.
    if len(shape) == len(whole) and all(size in {1, full} for size, full in zip(shape, whole, strict=True)):
        return {dim: dim for dim in sorted(cut) if shape[dim] == whole[dim]}
    # The parameter's shape without one dimension; of a square matrix it could be either.
    missing = [m for m in range(len(whole)) if shape == whole[:m] + whole[m + 1 :]]
    found = [{dim: dim - (dim > m) for dim in sorted(cut) if dim != m} for m in missing]
    if not found or all(places == found[0] for places in found):
        return found[0] if found else None
    # Row factors are means over the last dimension, column factors over the one before.
    named = len(whole) - 1 if "row" in name else len(whole) - 2 if "col" in name else -1
    return found[missing.index(named)] if named in missing else None


def _row_factors(state: State, whole: torch.Size) -> Iterator[str]:
    """Yield the names of the entries that are row factors of matrices and have a column factor beside them."""
    rows, columns = whole[:-1], whole[:-2] + whole[-1:]
    kept = (torch.Size([*rows, 1]), torch.Size([*whole[:-2], 1, *whole[-1:]]))
    tensors = (
        {name: value.shape for name, value in state.items() if isinstance(value, Tensor)} if len(whole) > 1 else {}
    )
    for name, shape in tensors.items():
        if "row" in name and (shape, tensors.get(name.replace("row", "col"))) in {(rows, columns), kept}:
            yield name


def _rescale_factors_(cut: State, state: State, row: str, whole: torch.Size, index: Mapping[int, Tensor]) -> None:
    """Scale what is left of a row and a column factor, so that the two stand for the same matrix as before."""
    # Entry ij stands for r_i c_j / mean(r). With what is left of the factors, r' and c', and s_r = mean(r') / mean(r),
    # it does so again as (r'_i s_c) (c'_j s_r) / mean(r' s_c). Both are scaled, each by the other's share, so that
    # they stay what the next update takes them for: means over each other's entries.
    column, ndim = row.replace("row", "col"), len(whole)
    stacked = {dim: i for dim, i in index.items() if dim < ndim - 2}  # whole matrices that are cut
    shares = []
    for name, dim in ((row, -2), (column, -1)):
        place = dim if state[name].dim() == ndim else -1
        before = _cut(name, state[name], whole, stacked).mean(place, keepdim=True)
        shares.append(torch.where(before > 0, cut[name].mean(place, keepdim=True) / before, 1))
    cut[column], cut[row] = cut[column] * shares[0], cut[row] * shares[1]


def _holds_tensors(value: Any) -> bool:
    """Return whether a container holds a tensor, however deep."""
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple, set)):
        return False
    return any(isinstance(item, Tensor) or _holds_tensors(item) for item in value)


def _sizes(tensor: Tensor) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"
