"""Layers that must have the same bits."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from hap_hf.discovery import discover
from hap_hf.names.group import Kind, Role


def shared(layers: Mapping[str, nn.Module]) -> list[list[str]]:
    """Return the layers that share a weight, which is stored once.

    Args:
        layers: The layers by name.

    Returns:
        The names that go together.
    """
    owners: dict[int, list[str]] = {}
    for name, layer in layers.items():
        owners.setdefault(id(layer.get_parameter("weight")), []).append(name)
    return [names for names in owners.values() if len(names) > 1]


def added_up(model: nn.Module, batch: Any, layers: Mapping[str, nn.Module]) -> list[list[str]]:
    """Return the convolutions whose outputs are added: those that make the channels of one group.

    Args:
        model: The model, not quantized.
        batch: An example of its inputs.
        layers: The layers by name.

    Returns:
        The names that go together.
    """
    result = []
    for group in discover(model, batch).groups:
        if group.kind is Kind.CHANNELS:
            made = [s.tensor.rpartition(".") for s in group.slices if s.role is Role.PRODUCER]
            names = dict.fromkeys(name for name, _, leaf in made if leaf == "weight" and name in layers)
            if len(names) > 1:
                result.append(list(names))
    return result
