"""Meeting a budget in parameters or multiply-accumulates: how many units go, so that the rest just fits."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from hap_hf.errors import ConfigError
from hap_hf.names.footprint import Footprint, core_macs, cuts_by_tensor, footprint, tensor_footprint
from hap_hf.names.group import Slice
from hap_hf.names.plan import IMPLANT, KEEP, PRUNE, GroupPlan
from hap_hf.selection.ranking import Ranking, Split, implants

logger = logging.getLogger(__name__)

TOLERANCE = 0.01
"""Share of the prunable part by which a budget may be missed from below."""


@dataclass(frozen=True, eq=False)
class Budget:
    """A share of the prunable parameters or multiply-accumulates to keep.

    Args:
        ranking: The units that compete.
        setting: ``target_params`` or ``target_macs``.
        target: The share.
    """

    ranking: Ranking
    setting: str
    target: float

    @cached_property
    def _cuts(self) -> Mapping[str, list[tuple[Slice, int]]]:
        return cuts_by_tensor(self.ranking.groups)

    @property
    def whole(self) -> float:
        """What all groups cost before anything is cut."""
        return self.total([Split()] * len(self.ranking.groups))

    def _number(self, amount: Footprint) -> float:
        return amount.params if self.setting == "target_params" else amount.macs

    def _plan(self, index: int, split: Split) -> GroupPlan:
        group, config = self.ranking.groups[index], self.ranking.config
        # The cost does not depend on which units go, so no permutation is needed.
        letters = PRUNE * split.pruned + IMPLANT * split.implanted
        made = implants(group, split.implanted, config.implant_cost) if split.implanted else []
        return GroupPlan(group, letters + KEEP * (group.num_units - len(letters)), {i.tensor: i.rank for i in made})

    def change(self, splits: Sequence[Split], index: int, split: Split) -> float:
        """Return by how much the cost changes if one group is split otherwise and all others stay.

        Args:
            splits: How many units of each group go.
            index: Position of the group.
            split: How many of its units go then.

        Returns:
            Parameters, or multiply-accumulates per sample.
        """
        tensors = {s.tensor for s in self.ranking.groups[index].slices}
        new, old = self._plan(index, split), self._plan(index, splits[index])
        others = {i for t in tensors for _, i in self._cuts[t]} - {index}
        plans = {i: self._plan(i, splits[i]) for i in others}
        difference = 0.0
        for t in tensors:
            before, after = (
                self._number(tensor_footprint([(s, plans.get(i, own)) for s, i in self._cuts[t]])) for own in (old, new)
            )
            difference += after - before
        return difference + (core_macs(new) - core_macs(old) if self.setting == "target_macs" else 0.0)

    def total(self, splits: Sequence[Split]) -> float:
        """Return what all groups cost.

        Args:
            splits: How many units of each group go.

        Returns:
            Parameters, or multiply-accumulates per sample.
        """
        return self._number(footprint(self._plan(index, split) for index, split in enumerate(splits)))


def meet_budget(budget: Budget) -> tuple[int, list[Split]]:
    """Return the cut whose result is as large as the budget allows.

    Bisection finds the number of units to cut; then the most sensitive cut units come back one by one while they fit.

    Args:
        budget: The budget.

    Returns:
        Number of units below the threshold, and how each group is split.

    Raises:
        ConfigError: If the groups cost nothing, or even the largest cut leaves more than the budget.
    """
    ranking, whole = budget.ranking, budget.whole
    if not whole:
        raise ConfigError(
            f"{budget.setting}={budget.target} needs groups that carry MACs, got {len(ranking.groups)} groups with "
            "none; find them with an example batch that runs their layers"
        )
    limit = budget.target * whole
    low, high = 0, ranking.total - 1  # the most sensitive unit of all is the best of its group and always stays
    smallest = budget.total(ranking.splits(high))
    if smallest > limit:
        config = ranking.config
        raise ConfigError(
            f"{budget.setting}={budget.target} cannot be reached: with max_group_ratio={config.max_group_ratio}, "
            f"implant_ratio={config.implant_ratio} and round_to={config.round_to} the smallest share of the prunable "
            f"part is {math.ceil(1e4 * smallest / whole) / 1e4}; ask for no less, or loosen these settings"
        )
    while high - low > 1:
        middle = (low + high) // 2
        if budget.total(ranking.splits(middle)) > limit:
            low = middle
        else:
            high = middle
    splits = ranking.splits(high)
    _restore_pruned(budget, splits, limit - budget.total(splits))
    _restore_implanted(budget, splits, limit - budget.total(splits))
    if limit - budget.total(splits) > TOLERANCE * whole:
        _exchange(budget, splits, limit - budget.total(splits), TOLERANCE * whole)
    reached = budget.total(splits) / whole
    if budget.target - reached > TOLERANCE:
        logger.warning(
            "%s=%s: the plan keeps %.4f of the prunable part, over %s below, because single units are larger than that",
            budget.setting,
            budget.target,
            reached,
            TOLERANCE,
        )
    return high, splits


def _restore_pruned(budget: Budget, splits: list[Split], room: float) -> None:
    """Let pruned units survive while they fit, most sensitive first.

    The number of implants of a group stays, so a unit that comes back costs the same wherever the group stands.
    """
    ranking = budget.ranking
    full: set[int] = set()
    for index, place in reversed(ranking.ascending):
        pruned, implanted = splits[index]
        if place >= pruned or index in full:
            continue
        survivors = ranking.groups[index].num_units - pruned
        step = ranking.width_above(index, survivors + 1) - survivors
        split = Split(pruned - step, implanted)
        cost = budget.change(splits, index, split)
        if cost > room:
            full.add(index)
            continue
        splits[index] = split
        room -= cost


def _restore_implanted(budget: Budget, splits: list[Split], room: float) -> None:
    """Let implanted units be kept while they fit, most sensitive first."""
    ranking = budget.ranking
    full: set[int] = set()
    for index, place in reversed(ranking.ascending):
        pruned, implanted = splits[index]
        if not pruned <= place < pruned + implanted or index in full:
            continue
        fewer = implanted - 1
        # The last few may be too few for an implant that pays.
        split = Split(pruned, fewer if fewer and ranking.implants_pay(index, fewer) else 0)
        cost = budget.change(splits, index, split)
        if cost > room:
            full.add(index)
            continue
        splits[index] = split
        room -= cost


def _exchange(budget: Budget, splits: list[Split], room: float, largest: float) -> None:
    """Undo the smallest cut, which is too large to fit, and cut finer units of other groups in its place.

    Heads of a small model can each be more than the tolerance; FFN neurons fill the gap. Leaves ``splits`` as they are
    where that does not come out within the tolerance.
    """
    ranking = budget.ranking

    def grown(index: int) -> Split:
        n, (pruned, implanted) = ranking.groups[index].num_units, splits[index]
        return Split(n - ranking.width_above(index, n - pruned + 1), implanted)

    changes = {index: budget.change(splits, index, grown(index)) for index, split in enumerate(splits) if split.pruned}
    if not changes:
        return
    coarse = min(changes, key=changes.__getitem__)
    new = list(splits)
    new[coarse] = grown(coarse)
    over = changes[coarse] - room
    for index, place in ranking.ascending:
        if over <= 0:
            splits[:] = new
            return
        pruned, implanted = new[index]
        if place < pruned + implanted:
            continue
        survivors = ranking.groups[index].num_units - pruned
        step = survivors - ranking.width_below(index, survivors)
        split = Split(pruned + step, implanted)
        if pruned + implanted + step <= ranking.cap(index) and (saved := -budget.change(new, index, split)) <= largest:
            new[index] = split
            over -= saved
