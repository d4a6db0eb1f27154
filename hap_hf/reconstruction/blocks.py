"""Blocks that a low-rank path can lie beside: where they begin and end, and what their units are worth."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hap_hf.evidence.batches import call, move_to_model
from hap_hf.evidence.evidence import Evidence
from hap_hf.layers.projection import input_dim, on_input, output_dim, spatial_dims
from hap_hf.names.actions import PRUNE
from hap_hf.names.bypass import BypassPlan
from hap_hf.names.group import Role
from hap_hf.names.plan import GroupPlan
from hap_hf.surgery import takes_bypass


@dataclass(frozen=True)
class Block:
    """A block from whose input to whose output a low-rank path can go.

    Args:
        group: Name of the group of its units.
        entry: Name of its first layer.
        exit: Name of its last one, which alone reads the units.
        stride: Of positions between the two.
        uses: Positions of the output for each sample of the example.
        units: Inputs of the last layer that each unit is, ``[units, width]``.
        removed: The units that go.
    """

    group: str
    entry: str
    exit: str
    stride: int
    uses: float
    units: Tensor
    removed: tuple[int, ...]

    def path(self, model: nn.Module, rank: int) -> BypassPlan:
        """Return a path beside the block of a model that has all its units.

        Args:
            model: The model.
            rank: Number of directions.

        Returns:
            The path, with the inputs and outputs that there are.
        """
        entry, exit_ = model.get_submodule(self.entry), model.get_submodule(self.exit)
        inputs = entry.get_parameter("weight").shape[input_dim(entry)]
        outputs = exit_.get_parameter("weight").shape[output_dim(exit_)]
        return BypassPlan(self.entry, self.exit, inputs, outputs, rank, self.stride, spatial_dims(exit_), self.uses)

    def aligned(self, x: Tensor) -> Tensor:
        """Return the input of the block at the positions of its output; of images every so many pixels."""
        return x if self.stride == 1 else x[..., :: self.stride, :: self.stride]


def blocks(evidence: Evidence, stage: Sequence[GroupPlan], fitted: Collection[str]) -> dict[str, Block]:
    """Return the blocks of which units go and that a path can lie beside.

    Args:
        evidence: The model and batches, of which the example is computed once.
        stage: What happens to the units.
        fitted: Names of the layers that reconstruction fits.

    Returns:
        The blocks by the name of their last layer.
    """
    found: dict[str, tuple[GroupPlan, list[str]]] = {}
    for g in stage:
        makers = list(dict.fromkeys(s.tensor.rpartition(".")[0] for s in g.group.slices if s.role is Role.PRODUCER))
        readers = {s.tensor.rpartition(".")[0] for s in g.group.slices if s.role is Role.CONSUMER}
        if not makers or len(readers) != 1 or not g.pruned or g.implanted:
            continue
        (reader,) = readers
        first, last = (evidence.model.get_submodule(path) for path in (makers[0], reader))
        if reader in fitted and reader not in found and takes_bypass(first, last):
            found[reader] = g, makers
    seen = _seen(evidence, {path for reader, (_, makers) in found.items() for path in (reader, *makers)})
    result = {}
    for reader, (g, makers) in found.items():
        stride = _stride([seen.get(path) for path in makers], seen.get(reader), evidence.model.get_submodule(reader))
        if stride is None:
            continue
        read = [s for s in g.group.slices if s.role is Role.CONSUMER and s.tensor == f"{reader}.weight"]
        units = torch.tensor([[i for s in read for i in s.indices(u)] for u in range(g.group.num_units)])
        uses = max(s.uses for s in read)
        result[reader] = Block(g.group.name, makers[0], reader, stride, uses, units, tuple(g.units(PRUNE)))
    return result


def _seen(evidence: Evidence, paths: Collection[str]) -> dict[str, tuple[Tensor, torch.Size]]:
    """Return the input of layers and the shape of their output, of those that the example calls once."""
    model = evidence.model
    calls: dict[str, list[Any]] = {path: [] for path in paths}

    def note(path: str, x: Tensor) -> None:
        calls[path].append(x)  # kept, so that no other tensor takes its place in memory

    def noted(path: str, module: nn.Module, args: Any, out: Tensor) -> None:
        calls[path].append(out.shape)

    handles = [on_input(model.get_submodule(path), partial(note, path)) for path in paths]
    handles += [model.get_submodule(path).register_forward_hook(partial(noted, path)) for path in paths]
    try:
        with evidence.ready({}, "blocks", "batch"), torch.no_grad():
            call(model, move_to_model(model, evidence.example))
    finally:
        for handle in handles:
            handle.remove()
    return {path: (found[0], found[1]) for path, found in calls.items() if len(found) == 2}


def _stride(
    makers: Sequence[tuple[Tensor, torch.Size] | None], reader: tuple[Tensor, torch.Size] | None, last: nn.Module
) -> int | None:
    """Return every how many positions of the input there is one of the output; None where no path can tell."""
    if reader is None or any(m is None for m in makers):
        return None
    inputs = [m[0] for m in makers if m is not None]
    x, shape = inputs[0], reader[1]
    # Keys and values of another sequence, as in cross-attention, are no block from one input to one output.
    if any(other.data_ptr() != x.data_ptr() or other.shape != x.shape for other in inputs):
        return None
    if not spatial_dims(last):
        return 1 if x.shape[:-1] == shape[:-1] else None
    if x.shape[:-3] != shape[:-3] or 0 in shape:
        return None
    strides = {-(-size // out) for size, out in zip(x.shape[-2:], shape[-2:], strict=True)}
    fits = len(strides) == 1 and all(
        -(-size // max(strides)) == out for size, out in zip(x.shape[-2:], shape[-2:], strict=True)
    )
    return strides.pop() if fits else None


@dataclass(frozen=True)
class PathGains:
    """What the directions of a path beside a block would win.

    Args:
        block: The block.
        gains: By how much each lowers the squared error of the stream on samples held out, ``[directions]``.
        energy: Of the units that go, what they add to the stream on these samples, squared, one by one.
        left: Share of what the stream lacks that is left when the layer is fitted without a path.
    """

    block: Block
    gains: Tensor
    energy: float
    left: float


class UnitEnergies:
    """What each unit adds to a stream, squared and summed over positions.

    Args:
        block: The block of the units.
        module: Its last layer.
    """

    def __init__(self, block: Block, module: nn.Module) -> None:
        self._units = block.units
        self._module = module

    def moments(self, rows: Tensor, weights: Tensor | None) -> Tensor:
        """Return the second moments of each unit's own entries.

        Args:
            rows: What the layer's weight is multiplied with in the dense model, ``[positions, inputs * taps]``.
            weights: Of the positions.

        Returns:
            ``[units, width * taps, width * taps]``, float64.
        """
        units = self._units.to(rows.device)
        inputs = self._module.get_parameter("weight").shape[1 - output_dim(self._module)]
        own = rows.reshape(len(rows), inputs, -1)[:, units.flatten()].reshape(len(rows), len(units), -1)
        weighted = own if weights is None else own * weights.to(own.dtype)[:, None, None]
        return torch.einsum("pui,puj->uij", weighted, own).double()

    def of(self, moments: Tensor, scale: Tensor) -> Tensor:
        """Return the energy of each unit.

        Args:
            moments: Sums of what :meth:`moments` returns.
            scale: Weights of the outputs, ``[outputs]``.

        Returns:
            ``[units]``, float64.
        """
        out = output_dim(self._module)
        weight = self._module.get_parameter("weight").detach().double().movedim(out, 0)
        weight = weight[:, self._units.to(weight.device).flatten()]  # [outputs, units * width, *taps]
        per_unit = weight.reshape(len(weight), len(self._units), -1)  # [outputs, units, width * taps]
        return torch.einsum("oui,uij,ouj,o->u", per_unit, moments, per_unit, scale.double())
