"""Which layers can be fitted, and where their outputs meet a residual stream."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hap_hf.evidence.batches import call, move_to_model
from hap_hf.evidence.evidence import Evidence
from hap_hf.host import own_parameters
from hap_hf.layers.projection import channel_dim, is_projection, known, output_dim
from hap_hf.reconstruction.stream import Following, Way

_MOST_OUTPUTS = 8
"""Layers with more than so many times as many outputs as inputs stay as they are: vocabularies, whose fit is dear."""


def fitted_layers(model: nn.Module) -> list[str]:
    """Return the layers that can be fitted: those whose input and output tell what their weight does.

    Args:
        model: Any model.

    Returns:
        Names of linear layers and convolutions that have their weights for themselves and compute what these say.
    """
    # By module and not by name: one module under two paths has one input and one answer.
    users = Counter(id(p) for module in model.modules() for p in own_parameters(module).values() if p is not None)
    return [
        path
        for path, module in model.named_modules()
        if is_projection(module) and known(module).fixed and known(module).knows_rows(module)
        if all(users[id(p)] == 1 for p in own_parameters(module).values() if p is not None)
        if _is_worth_it(module)
    ]


def _is_worth_it(module: nn.Module) -> bool:
    weight = module.get_parameter("weight")
    out = output_dim(module)
    return weight.shape[out] <= _MOST_OUTPUTS * weight.shape[1 - out]


def stations(evidence: Evidence, paths: Sequence[str]) -> dict[str, int]:
    """Return where the outputs of layers meet a residual stream, in the order in which the model calls the layers.

    Args:
        evidence: The model and batches, of which the example is computed once.
        paths: Names of the layers in question.

    Returns:
        For each layer that is called exactly once the number of operations from its output to the last addition of a
        stream; 0 where none is added.
    """
    model, calls, met = evidence.model, list[str](), dict[str, int]()

    def note(way: Way) -> None:
        met[calls[-1]] = way.steps

    following = Following(note)

    def began(path: str, module: nn.Module, args: Any, out: Tensor) -> None:
        calls.append(path)
        following.way = Way.of(out, channel_dim(module))

    handles = [model.get_submodule(path).register_forward_hook(partial(began, path)) for path in paths]
    try:
        with evidence.ready({}, "repair", "batch"), torch.no_grad(), following:
            call(model, move_to_model(model, evidence.example))
    finally:
        for handle in handles:
            handle.remove()
    return {path: met.get(path, 0) for path in calls if calls.count(path) == 1}
