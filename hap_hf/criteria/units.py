"""The weights that make up the units of some groups, and sums over them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import reduce

import torch
from torch import Tensor, nn

from hap_hf.criteria.sensitivity import unit_sensitivity
from hap_hf.curvature import Marginals, accumulation_dtype
from hap_hf.errors import UnsupportedModelError
from hap_hf.names.group import Group, Role, Slice

EVERY_ROLE = frozenset(Role)
PRODUCING = frozenset({Role.PRODUCER, Role.FACTOR})
CONSUMING = frozenset({Role.CONSUMER})


class Coupling(StrEnum):
    """How a trace and a squared norm are combined where a unit has slices of several tensors."""

    JOINT = "joint"
    """All its weights are one vector: the trace times the norm of all, over the number of all."""
    SUM = "sum"
    """Each slice by itself, and the results added up: no slice's norm meets another's trace."""
    FILTER = "filter"
    """The paper's: as ``sum``, but only of the rows that produce the unit, not of what reads it."""


Factors = Sequence[Sequence[Tensor]]
"""For each group and each of its slices a factor on the sum over each unit, ``[num_units]``."""


@dataclass(frozen=True)
class UnitWeights:
    """The weight matrices that hold the units of some groups.

    Args:
        groups: The groups, in the order of every vector over all their units, ``[num_units of all groups]``.
        slices: The slices of each group that count.
        tensors: The matrices, each under one name.
        names: That name for each name that a slice uses; they differ where weights are tied.
    """

    groups: tuple[Group, ...]
    slices: tuple[tuple[Slice, ...], ...]
    tensors: Mapping[str, Tensor]
    names: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module, groups: Sequence[Group], roles: Collection[Role] = EVERY_ROLE) -> "UnitWeights":
        """Return the weights of ``groups`` in ``model``.

        Args:
            model: The model that holds the weights.
            groups: Groups that were found in it.
            roles: Which of their matrices count.

        Returns:
            The weights.

        Raises:
            UnsupportedModelError: If there are no groups, or they do not fit the model.
        """
        if not groups:
            raise UnsupportedModelError("expected at least one group to score, got none; nothing could be removed")
        parameters = dict(model.named_parameters(remove_duplicate=False))
        # Backwards, so that of the names of a tied weight the first one is left.
        first = {id(p): name for name, p in reversed(parameters.items())}
        tensors, names, every = {}, {}, []
        for group in groups:
            slices = tuple(s for s in group.scored_slices() if s.role in roles)
            if not slices:
                which = "" if roles == EVERY_ROLE else " that is a " + " or ".join(sorted(r.value for r in roles))
                raise UnsupportedModelError(f"{group.name} has no weight matrix{which}, so its units cannot be scored")
            for s in slices:
                parameter = parameters.get(s.tensor)
                # Groups outlive the model they were found in: once it is pruned, they fit it no more.
                if parameter is None or tuple(parameter.shape) != s.shape or not parameter.is_floating_point():
                    got = "none" if parameter is None else f"{list(parameter.shape)} of {parameter.dtype}"
                    raise UnsupportedModelError(
                        f"{group.name}: expected a floating-point parameter {s.tensor} of shape {list(s.shape)} in "
                        f"{type(model).__name__}, got {got}; find the groups again in this model"
                    )
                names[s.tensor] = first[id(parameter)]
                tensors[names[s.tensor]] = parameter
            every.append(slices)
        return cls(tuple(groups), tuple(every), tensors, names)

    def dims(self) -> dict[str, tuple[int, ...]]:
        """Return the dimensions of each matrix along which units lie.

        Returns:
            The dimensions by the matrix's name.
        """
        pairs = {(self.names[s.tensor], s.dim) for slices in self.slices for s in slices}
        return {name: tuple(sorted(d for n, d in pairs if n == name)) for name in self.tensors}

    def marginals(self, values: Mapping[str, Tensor]) -> Marginals:
        """Return the sums of a value for each weight along all dimensions but those of the units.

        Args:
            values: A tensor for each of the matrices, in its shape.

        Returns:
            The sums by the matrix's name and the dimension left, ``[size]``.
        """
        # Units lie one beside the other along their dimension: one sum over the others serves all units of all groups.
        return {
            (name, dim): values[name].sum([d for d in range(values[name].dim()) if d != dim])
            for name, dims in self.dims().items()
            for dim in dims
        }

    def slice_sums(self, marginals: Marginals) -> list[list[Tensor]]:
        """Return the sums over each unit in each slice.

        Args:
            marginals: Sums by matrix and dimension, ``[..., size]``.

        Returns:
            For each group and each of its slices the sums, ``[..., num_units]``.
        """
        found = []
        for group, slices in zip(self.groups, self.slices, strict=True):
            parts = []
            for s in slices:
                marginal = marginals[self.names[s.tensor], s.dim]  # [..., size]
                entries = marginal.narrow(-1, s.offset, group.num_units * s.width)
                parts.append(entries.reshape(*entries.shape[:-1], group.num_units, s.width).sum(-1))  # [..., num_units]
            found.append(parts)
        return found

    def totals(self, marginals: Marginals, factors: Factors | None = None) -> Tensor:
        """Return the sums over each unit in all of its slices.

        Args:
            marginals: Sums by matrix and dimension, ``[..., size]``.
            factors: Factors on the sums of each slice; 1 by default.

        Returns:
            Sum for each unit of each group, ``[..., num_units of all groups]``.
        """
        # Layers of one model may lie on several devices.
        device = next(iter(marginals.values())).device
        totals = []
        for index, parts in enumerate(self.slice_sums(marginals)):
            if factors is not None:
                parts = [part * factor.to(part) for part, factor in zip(parts, factors[index], strict=True)]
            totals.append(reduce(torch.add, [part.to(device) for part in parts]))
        return torch.cat(totals, dim=-1)

    def by_group(self, vector: Tensor) -> dict[str, Tensor]:
        """Return the part of a vector over all units that belongs to each group.

        Args:
            vector: A value for each unit, ``[num_units of all groups]``.

        Returns:
            Values by group name, ``[num_units]``, float64 on the CPU.
        """
        parts = torch.split(vector.cpu().double(), [g.num_units for g in self.groups])
        return {group.name: part.clone() for group, part in zip(self.groups, parts, strict=True)}

    def num_entries(self) -> dict[str, int]:
        """Return the number of weight entries of one unit for each group.

        Returns:
            The numbers by group name.
        """
        return {
            g.name: sum(s.entries_per_unit for s in slices) for g, slices in zip(self.groups, self.slices, strict=True)
        }

    def squared_norms(self) -> list[list[Tensor]]:
        """Return the squared Euclidean norm of every unit's weights in each slice.

        Returns:
            For each group and each of its slices the squared norms, ``[num_units]``, float64 on the CPU.
        """
        # Squares of small float16 weights would be zero.
        squares = {n: t.detach().to(accumulation_dtype(t.dtype)).square() for n, t in self.tensors.items()}
        return [[part.cpu().double() for part in parts] for parts in self.slice_sums(self.marginals(squares))]

    def trace_factors(self, coupling: Coupling) -> list[list[Tensor]]:
        """Return what the traces over each slice are multiplied with to give sensitivities.

        Args:
            coupling: Whether the norms of all slices count for each of them.

        Returns:
            For each group and each of its slices the factors, ``[num_units]``, float64 on the CPU.
        """
        factors = []
        for group, slices, norms in zip(self.groups, self.slices, self.squared_norms(), strict=True):
            entries = [s.entries_per_unit for s in slices]
            if coupling is Coupling.JOINT:
                # The same factor for all slices: added up, their traces become the trace over the whole unit.
                norms = [torch.stack(norms).sum(0)] * len(slices)
                entries = [self.num_entries()[group.name]] * len(slices)
            # The formula is linear in the trace, so that its value at 1 is the factor.
            one = torch.ones((), dtype=torch.float64, device="cpu")
            factors.append([unit_sensitivity(one, norm, n) for norm, n in zip(norms, entries, strict=True)])
        return factors


def roles_of(coupling: Coupling) -> frozenset[Role]:
    """Return which matrices of a unit count.

    Args:
        coupling: How they are combined.

    Returns:
        Their roles.
    """
    return PRODUCING if coupling is Coupling.FILTER else EVERY_ROLE
