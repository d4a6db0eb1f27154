"""Ranges of activations: observed while batches go through, and shared by processes."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hap_hf.errors import BatchError
from hap_hf.evidence.batches import call, move_to_model
from hap_hf.evidence.processes import ALONE, Processes
from hap_hf.layers.quantized import Quantized, range_name
from hap_hf.model.quantizing import quantized_layers
from hap_hf.model.state import preserved

KEPT = 0.99
"""What remains of a range at each step of a moving mean, as in EHAP's code."""

Ranges = dict[tuple[str, str], Tensor]
"""Smallest and largest value, ``[2]``, by the name of the layer and of its input."""


def observed_ranges(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> list[Ranges]:
    """Return what goes into the quantized layers of a model, for each batch; nothing is rounded meanwhile.

    Args:
        model: The model.
        batches: Keyword arguments of its forward.

    Returns:
        The ranges of each batch. A layer that was not called is not among them.

    Raises:
        BatchError: If an input is nowhere finite.
    """
    layers = dict(quantized_layers(model))
    found = []
    try:
        with preserved(model, plain_attention=False, without_checkpointing=False), torch.no_grad():
            for number, batch in enumerate(batches):
                for layer in layers.values():
                    layer.rounds, layer.observed = False, {}
                call(model, move_to_model(model, batch))
                found.append(taken(layers))
                for (name, which), range_ in found[-1].items():
                    if not bool(range_.isfinite().all()):
                        raise BatchError(
                            f"batch {number}: the {which} of {name} holds NaN or infinities, of which no range can be "
                            "taken; look for extreme weights or inputs"
                        )
    finally:
        for layer in layers.values():
            layer.rounds, layer.observed = True, None
    return found


def taken(layers: Mapping[str, Quantized]) -> Ranges:
    """Return what layers have observed, and let them begin anew."""
    result: Ranges = {}
    for name, layer in layers.items():
        result |= {(name, which): seen for which, seen in (layer.observed or {}).items()}
        if layer.observed is not None:
            layer.observed = {}
    return result


def folded(seen: Iterable[Ranges], *, moving: bool) -> Ranges:
    """Return one range of those of several batches.

    Args:
        seen: The ranges of each batch, in order.
        moving: Whether it is a moving mean, or holds them all.

    Returns:
        The ranges.
    """
    result: Ranges = {}
    for ranges in seen:
        for key, new in ranges.items():
            old = result.get(key)
            if old is None:
                result[key] = new
            elif moving:
                result[key] = KEPT * old + (1 - KEPT) * new
            else:
                result[key] = torch.stack([torch.minimum(old[0], new[0]), torch.maximum(old[1], new[1])])
    return result


def of_all_processes(seen: list[Ranges], processes: Processes = ALONE) -> list[Ranges]:
    """Return the ranges of the batches of all processes, in the order that one process alone would have."""
    plain = [{key: value.cpu() for key, value in ranges.items()} for ranges in seen]
    shares = processes.gather("ranges of activations", plain)
    longest = max(map(len, shares))
    return [share[i] for i in range(longest) for share in shares if i < len(share)]


def set_ranges_(model: nn.Module, ranges: Ranges) -> None:
    """Give quantized layers their ranges, stretched to hold 0."""
    layers = dict(quantized_layers(model))
    for (name, which), (low, high) in ranges.items():
        buffer = getattr(layers[name], range_name(which), None)
        if buffer is not None:
            buffer.copy_(torch.stack([low.clamp_max(0), high.clamp_min(0)]))


def move_ranges_(model: nn.Module, seen: Ranges) -> None:
    """Let ranges follow those of a step by a hundredth.

    Args:
        model: The model.
        seen: What was observed.
    """
    layers = dict(quantized_layers(model))
    for (name, which), new in seen.items():
        buffer = getattr(layers[name], range_name(which), None)
        if buffer is not None and bool(new.isfinite().all()):
            held = torch.stack([new[0].clamp_max(0), new[1].clamp_min(0)]).to(buffer)
            buffer.mul_(KEPT).add_(held, alpha=1 - KEPT)
