"""Layers that no run reaches, and the units that they may read or make all the same."""

from collections.abc import Collection, Sequence
from math import prod

from torch import nn

from hap_hf.discovery.dependence import reached
from hap_hf.discovery.families import Candidate, home
from hap_hf.discovery.record import Recording
from hap_hf.discovery.whole import LeftWhole
from hap_hf.host import own_parameters
from hap_hf.layers.projection import input_dim, is_projection, output_dim, spatial_dims
from hap_hf.names.group import Kind, Role


def out_of_reach(
    model: nn.Module, recording: Recording, candidates: Sequence[Candidate], unrun: Collection[str]
) -> tuple[list[Candidate], list[LeftWhole]]:
    """Return the candidates that no layer can touch which was not run, and the others with the reason.

    A layer that nobody calls, as an auxiliary head for training, may read the units of a group or feed what reads
    them; pruned, the first step of training would fail. It can if it has a dimension of the group's size, and if its
    code can see the group: channels go from module to module, and heads and neurons stay within the module that holds
    all of their layers.

    Args:
        model: The model that was recorded.
        recording: Its cut-open forward passes.
        candidates: What could be removed.
        unrun: Modules with parameters that nothing calls.

    Returns:
        The candidates that are left, and what stays whole.
    """
    # Code may take a layer's weight without calling the layer, as torch's attention does.
    behind = {id(t): n for n, t in recording.parameters.items()}
    outputs = [*recording.outputs, *(x for inputs in recording.inputs.values() for x in inputs)]
    used = {n.rpartition(".")[0] for n in reached(behind, outputs)}
    never = [n for n, _ in model.named_modules() if n in unrun and n not in used]
    left, stay = [], []
    for candidate in candidates:
        by = sorted(n for n in never if _touches(model, recording, n, candidate, never))
        if not by:
            left.append(candidate)
            continue
        name = candidate.group.name
        reason = (
            f"{_listed(by)} did not run, neither in training mode nor on another batch, and may read or make units of "
            "it; pass batches that run it"
        )
        stay.append(LeftWhole((name,), reason, candidate.group.kind))
    return left, stay


def _touches(model: nn.Module, recording: Recording, name: str, candidate: Candidate, never: Sequence[str]) -> bool:
    """Return whether a layer that was not run may read or make units of a candidate."""
    group = candidate.group
    holder = home([s.tensor.rpartition(".")[0] for s in group.slices if s.role is not Role.ALIGNED])
    if group.kind is not Kind.CHANNELS and holder and not f"{name}.".startswith(f"{holder}."):
        return False
    sides = {Role.PRODUCER, Role.FACTOR, Role.CONSUMER}
    widths = {n for s in group.slices if s.role in sides for n in (s.shape[s.dim], group.num_units * s.width)}
    sources = {s.tensor.rpartition(".")[0] for s in group.slices if s.role is Role.PRODUCER}
    layer = model.get_submodule(name)
    inputs, outputs = _sizes(layer)
    # Two layers that were not run, one behind the other in one module, have what is between them to themselves.
    beside = [n for n in never if n.rpartition(".")[0] == name.rpartition(".")[0]]
    place = beside.index(name)
    inputs -= {n for other in beside[:place] for n in _sizes(model.get_submodule(other))[1]}
    outputs -= {n for other in beside[place + 1 :] for n in _sizes(model.get_submodule(other))[0]}
    if (inputs | outputs) & widths:
        return True
    # A linear layer may read the channels of an image position by position.
    made = [recording.leaves[n][0] for n in sources if spatial_dims(model.get_submodule(n))]
    return any(n == w * prod(leaf.shape[2:]) for n in inputs for w in widths for leaf in made)


def _sizes(layer: nn.Module) -> tuple[set[int], set[int]]:
    """Return the sizes that the inputs and the outputs of a layer may have, read off its parameters."""
    own = [p for p in own_parameters(layer).values() if p is not None]
    if is_projection(layer):
        weight = layer.get_parameter("weight")
        return {weight.shape[input_dim(layer)]}, {weight.shape[output_dim(layer)]}
    every = {n for p in own for n in p.shape if n > 1}
    return set(every), set(every)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
