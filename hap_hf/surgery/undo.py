"""A record of modules as they were, to put them back."""

from typing import Any

from torch import nn

from hap_hf.host import CONTAINERS, HOOKS
from hap_hf.layers.bypass import carry_over_
from hap_hf.model.placement import take_over_placement_

Undo = list[tuple[nn.Module, dict[str, Any], list[tuple[dict[int, Any], dict[int, Any]]]]]
"""Modules, their attributes, and their dictionaries of hooks with what was in them; oldest first."""


def undo_(undo: Undo) -> None:
    """Put back what :func:`~hap_hf.surgery.apply.apply_plan_undoable_` changed.

    Args:
        undo: The record it returned.
    """
    # Newest first: of a module that was recorded twice, the oldest state must be put back last.
    for module, state, hooks in reversed(undo):
        module.__dict__.clear()
        module.__dict__.update(state)
        # In place: whoever registered a hook before removes it from this very dictionary.
        for own, content in hooks:
            own.clear()
            own.update(content)


def remember_(module: nn.Module, undo: Undo) -> None:
    """Record the attributes of a module, for :func:`undo_`."""
    # Shallow, as tensors are replaced and never written to; but the dictionaries that hold them change in place.
    state = dict(module.__dict__)
    for key in CONTAINERS:
        state[key] = dict(state[key])
    undo.append((module, state, [(state[key], state[key].copy()) for key in HOOKS]))


def replace_(model: nn.Module, path: str, new: nn.Module, undo: Undo) -> None:
    """Put a new layer in the place of an old one, with its device hook, and record the parent."""
    parent_path, _, leaf = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    old = parent.get_submodule(leaf)
    take_over_placement_(new, old)
    carry_over_(old, new)
    remember_(parent, undo)
    setattr(parent, leaf, new)
