"""Carrying an optimizer over a change of parameters."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from hap_hf.surgery.apply import TensorChange


def carry_optimizer_state_(optimizer: Optimizer, changes: Iterable[TensorChange]) -> None:
    """Make ``optimizer`` train the new parameters, with the state of the entries that remain.

    A parameter swapped behind an optimizer's back is never trained again: the optimizer still holds the old tensor.
    State tensors of the parameter's shape (moments, momentum buffers) are cut like the parameter; everything else,
    such as the step count, is kept. Implant weights join the parameter group of the weight they stand in for, right
    behind it, and start without state.

    Args:
        optimizer: A torch optimizer, not a wrapper around one.
        changes: What surgery changed, in order.
    """
    for change in changes:
        old = change.old if change.old is not None else change.beside
        for group in optimizer.param_groups:
            params: list[Tensor] = group["params"]
            position = next((i for i, p in enumerate(params) if p is old), None)
            if position is None:
                continue
            if change.old is None:
                # Where a fresh optimizer over the pruned model would have it: saved states go by position.
                params.insert(position + 1, change.new)
            else:
                params[position] = change.new
        if change.old is not None and change.old in optimizer.state:
            state = optimizer.state.pop(change.old)
            optimizer.state[change.new] = {k: _cut(v, change.old, change) for k, v in state.items()}


def _cut(value: object, old: Tensor, change: TensorChange) -> object:
    if not isinstance(value, Tensor) or value.shape != old.shape or value.dim() == 0:
        return value
    for dim, index in change.index.items():
        value = value.index_select(dim, index.to(value.device))
    return value.clone(memory_format=torch.preserve_format)
