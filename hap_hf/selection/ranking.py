"""All units of all groups in one order of sensitivity, and what a cut through that order leaves of each group.

Within a group the pruned units are the least sensitive ones, the implanted ones come next and the kept ones are the
most sensitive, so two counts say everything about a group.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from hap_hf.config import HapConfig
from hap_hf.criteria import Scores
from hap_hf.errors import ConfigError, CurvatureError
from hap_hf.names.actions import IMPLANT, KEEP, PRUNE
from hap_hf.names.currencies import floor_share
from hap_hf.names.group import Group, ImplantShape, Kind
from hap_hf.names.plan import GroupPlan


class Split(NamedTuple):
    """How many units of a group go.

    Args:
        pruned: Number of units removed, the least sensitive ones.
        implanted: Number of units implanted, the least sensitive survivors.
    """

    pruned: int = 0
    implanted: int = 0


class Implant(NamedTuple):
    """An implant and what it replaces.

    Args:
        tensor: The producer's weight.
        shape: What it replaces.
        rank: Size of its bottleneck.
    """

    tensor: str
    shape: ImplantShape
    rank: int

    @property
    def weights(self) -> int:
        """Number of its weights."""
        return self.shape.weights(self.rank)

    @property
    def is_cheaper(self) -> bool:
        """Whether it has fewer weights than what it replaces."""
        return self.weights < self.shape.replaced


def implants(group: Group, implanted: int, cost: float) -> list[Implant]:
    """Return the implant of each producer of ``group`` that takes one.

    The rank of a linear layer's implant is the largest whose ``rank * (rows + inputs)`` weights are at most
    ``cost * rows * inputs``, but at least 1. It is never full, as ``rows * inputs / (rows + inputs)`` is below both.
    Among channels, convolutions with more than one tap take implants, and what is coupled to them stays as it is.

    Args:
        group: A group that is to be implanted in part.
        implanted: Number of implanted units, at least 1.
        cost: Size of an implant as a share of the weights it replaces.

    Returns:
        The implants.
    """
    result = []
    for tensor, shape in group.implant_shapes(implanted).items():
        rows, inputs, taps = shape
        if group.kind is not Kind.CHANNELS:
            rank = max(1, floor_share(cost * rows * inputs / max(rows + inputs, 1)))
            result.append(Implant(tensor, shape, rank))
        # A convolution of one tap is already as small as its implant.
        elif taps is not None and taps > 1:
            result.append(Implant(tensor, shape, 1))
    return result


@dataclass(frozen=True, eq=False)
class Ranking:
    """The units of some groups, least sensitive first; ties by order of the groups, then by index.

    Args:
        groups: The groups whose units compete.
        config: The limits of groups, ``round_to``, and how much is implanted.
        orders: Units of each group, least sensitive first.
        owners: Position in ``groups`` of each unit's group, least sensitive unit first, ``[total]``.
        values: Sensitivity of each unit, or sensitivity per cost, in that order, ``[total]``.
    """

    groups: tuple[Group, ...]
    config: HapConfig
    orders: tuple[tuple[int, ...], ...]
    owners: Tensor
    values: Tensor

    @classmethod
    def of(cls, groups: Sequence[Group], scores: Scores, config: HapConfig) -> "Ranking":
        """Rank the units of ``groups``.

        Args:
            groups: Groups whose units compete, at least one.
            scores: Sensitivities of at least these groups.
            config: The settings; ``per`` says by what sensitivities are divided before units are compared.

        Returns:
            The ranking.

        Raises:
            ConfigError: If the scores lack a group or hold another number of units.
            CurvatureError: If a sensitivity is not finite.
        """
        parts = []
        for g in groups:
            found = scores.sensitivity.get(g.name)
            if found is None or tuple(found.shape) != (g.num_units,):
                got = "none" if found is None else f"shape {list(found.shape)}"
                raise ConfigError(
                    f"expected a sensitivity for each of the {g.num_units} units of {g.name}, got {got}; "
                    "score the same groups that the plan is made for"
                )
            part = found.detach().to("cpu", torch.float64)
            bad = (~part.isfinite()).nonzero().flatten()
            if len(bad):
                u = int(bad[0])
                raise CurvatureError(
                    f"expected finite sensitivities, got {part[u].item()} for unit {u} of {g.name} and {len(bad) - 1} "
                    "others of the group; look for a loss or weights that overflow, or score with precision='fp32'"
                )
            # Knapsack: with a budget the best units are those that are worth most for what they cost.
            parts.append(part / (config.per.unit_cost(g) if config.per is not None else 1.0))
        passes = [_pass_of(scores, g) for g in groups]
        within = [_least_first(*pair) for pair in zip(parts, passes, strict=True)]
        order = _evenly(within) if config.equal_widths else _least_first(torch.cat(parts), torch.cat(passes))  # [total]
        owners = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([len(p) for p in parts]))[order]
        orders = tuple(tuple(w.tolist()) for w in within)
        return cls(tuple(groups), config, orders, owners, torch.cat(parts)[order])

    @property
    def total(self) -> int:
        """Number of units."""
        return len(self.values)

    @cached_property
    def ascending(self) -> list[tuple[int, int]]:
        """For each unit, least sensitive first, the position of its group and its own place within the group."""
        seen = [0] * len(self.groups)
        pairs = []
        for index in self.owners.tolist():
            pairs.append((index, seen[index]))
            seen[index] += 1
        return pairs

    def cap(self, index: int) -> int:
        """Return how many units of a group may be cut: the best one always stays.

        Args:
            index: Position of the group.

        Returns:
            The largest number of pruned and implanted units together.
        """
        n = self.groups[index].num_units
        return min(floor_share(self.config.max_group_ratio * n), n - 1)

    def rule(self, cut: int) -> list[Split]:
        """Return HAP's rule with the cap of each group: the ``cut`` least sensitive units go.

        Args:
            cut: Number of units below the threshold.

        Returns:
            How each group is split.
        """
        # Two cuts through the one order: below the first units are pruned, between the two they are implanted.
        removed = floor_share((1 - self.config.implant_ratio) * cut)
        gone, pruned = (
            torch.bincount(self.owners[:count], minlength=len(self.groups)).tolist() for count in (cut, removed)
        )
        if self.config.equal_widths:
            # A cut ends in the midst of groups of one size: all of them go as far as the first.
            sizes = [g.num_units for g in self.groups]
            gone, pruned = (
                [max(c for c, m in zip(counts, sizes, strict=True) if m == n) for n in sizes]
                for counts in (gone, pruned)
            )
        splits = []
        for index in range(len(self.groups)):
            capped = min(gone[index], self.cap(index))
            # A cap saves the most sensitive of the cut units, so it takes implants away before it takes pruned ones.
            low = min(pruned[index], capped)
            splits.append(Split(low, capped - low))
        return splits

    def settle(self, index: int, split: Split) -> Split:
        """Return ``split`` with implants only where they are cheaper, and a width that ``round_to`` allows.

        Args:
            index: Position of the group.
            split: What the rule says.

        Returns:
            What can be done.
        """
        pruned, implanted = split
        group = self.groups[index]
        # These units are below the threshold: without an implant they go.
        if implanted and not self.implants_pay(index, implanted):
            pruned, implanted = pruned + implanted, 0
        # Implanted units are outputs like others and count for the width; it is pruned ones that come back to fill it.
        survivors = self.width_above(index, group.num_units - pruned)
        return Split(group.num_units - survivors, implanted)

    def splits(self, cut: int) -> list[Split]:
        """Return how each group is split when the ``cut`` least sensitive units go.

        Args:
            cut: Number of units below the threshold.

        Returns:
            How each group is split, settled.
        """
        return [self.settle(index, split) for index, split in enumerate(self.rule(cut))]

    def implants_pay(self, index: int, implanted: int) -> bool:
        """Return whether the group can take implants for so many units, each cheaper than what it replaces."""
        made = implants(self.groups[index], implanted, self.config.implant_cost)
        return bool(made) and all(i.is_cheaper for i in made)

    def width_above(self, index: int, survivors: int) -> int:
        """Return the smallest number of survivors of at least ``survivors`` that ``round_to`` allows, or all units."""
        step = self._multiple(index)
        return min(-(-survivors // step) * step, self.groups[index].num_units)

    def width_below(self, index: int, survivors: int) -> int:
        """Return the largest number of survivors below ``survivors`` that ``round_to`` allows; 0 if there is none."""
        step = self._multiple(index)
        return (survivors - 1) // step * step

    def _multiple(self, index: int) -> int:
        """Return what the width of a group is a multiple of; round_to is for widths of matrices, not for heads."""
        own = 1 if self.groups[index].kind is Kind.HEADS else self.config.round_to
        return math.lcm(own, self.config.shards)

    def plan(self, index: int, split: Split) -> GroupPlan:
        """Return the plan of a group that is split like this.

        Args:
            index: Position of the group.
            split: How many of its units go.

        Returns:
            Its plan, ranks of the implants included.
        """
        group = self.groups[index]
        letters = PRUNE * split.pruned + IMPLANT * split.implanted
        letters += KEEP * (group.num_units - len(letters))
        actions = dict(zip(self.orders[index], letters, strict=True))
        made = implants(group, split.implanted, self.config.implant_cost) if split.implanted else []
        return GroupPlan(group, "".join(actions[u] for u in range(group.num_units)), {i.tensor: i.rank for i in made})


def _pass_of(scores: Scores, group: Group) -> Tensor:
    """Return the pass in which each unit went, those of the last one with the largest number."""
    passes = scores.gone_in.get(group.name)
    last = torch.iinfo(torch.long).max
    # 0 stands for the last pass, which comes after all others.
    return torch.full((group.num_units,), last) if passes is None else passes.where(passes > 0, last)


def _evenly(within: Sequence[Tensor]) -> Tensor:
    """Return the order in which an equal share of each group goes at any time, from the orders within the groups."""
    places = []
    for order in within:
        place = torch.empty(len(order), dtype=torch.float64)
        place[order] = (torch.arange(len(order), dtype=torch.float64) + 0.5) / len(order)
        places.append(place)
    return torch.argsort(torch.cat(places), stable=True)


def _least_first(sensitivity: Tensor, passes: Tensor) -> Tensor:
    """Return the order of units by pass, and within a pass by sensitivity."""
    # Two stable sorts, the less significant key first: ties stay in the order of the units.
    order = torch.argsort(sensitivity, stable=True)
    return order[torch.argsort(passes[order], stable=True)]
