"""Meeting a budget in any currency: how many units go, so that the rest just fits."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from hap_hf.names.actions import IMPLANT, KEEP, PRUNE
from hap_hf.names.amount import Amount, fewest_cut
from hap_hf.names.outcome import whole
from hap_hf.names.plan import GroupPlan
from hap_hf.selection.ranking import Ranking, Split, implants

TOLERANCE = 0.01
"""Share of the prunable part by which a budget may be missed from below."""


@dataclass(frozen=True, eq=False)
class Budget:
    """A share to keep of what the units that compete cost, in any currency.

    Args:
        ranking: The units that compete.
        amount: The share, and the currency.
    """

    ranking: Ranking
    amount: Amount

    @cached_property
    def whole(self) -> float:
        """What all groups cost before anything is cut."""
        return self.amount.what.cost(whole(self.ranking.groups))

    @cached_property
    def _neighbours(self) -> list[list[int]]:
        """For each group the positions of the others that cut the same tensors."""
        # What a tensor costs is a product where two groups cut it along two dimensions: a unit of one costs less the
        # more of the other are gone. So groups that share tensors are always counted together, and no others need be.
        holders: dict[str, set[int]] = defaultdict(set)
        for index, group in enumerate(self.ranking.groups):
            for s in group.slices:
                holders[s.tensor].add(index)
        return [
            sorted({other for s in group.slices for other in holders[s.tensor]} - {index})
            for index, group in enumerate(self.ranking.groups)
        ]

    def _plan(self, index: int, split: Split) -> GroupPlan:
        """Return a plan of a group that costs as much as one with this split."""
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
            The difference, in the currency of the amount.
        """
        # What the neighbours cost elsewhere is the same before and after.
        others = [self._plan(i, splits[i]) for i in self._neighbours[index]]
        before, after = (self.amount.what.cost([self._plan(index, s), *others]) for s in (splits[index], split))
        return after - before

    def total(self, splits: Sequence[Split]) -> float:
        """Return what all groups cost.

        Args:
            splits: How many units of each group go.

        Returns:
            The cost, in the currency of the amount.
        """
        return self.amount.what.cost([self._plan(index, split) for index, split in enumerate(splits)])


@dataclass(frozen=True)
class Met:
    """How a budget is met.

    Args:
        cut: Number of units below the threshold.
        splits: How each group is split.
        notes: What people should know about it.
    """

    cut: int
    splits: list[Split]
    notes: tuple[str, ...] = ()


def out_of_reach(budget: Budget) -> str | None:
    """Return why a budget cannot be met, if even the largest cut leaves more.

    Args:
        budget: The units that compete, and what may be left of them.

    Returns:
        The message, or None.
    """
    ranking, amount, config = budget.ranking, budget.amount, budget.ranking.config
    # The most sensitive unit of all is the best of its group and always stays.
    smallest = budget.total(ranking.splits(ranking.total - 1))
    if smallest <= amount.keep * budget.whole:
        return None
    return (
        f"{amount} cannot be reached: with max_group_ratio={config.max_group_ratio}, "
        f"implant_ratio={config.implant_ratio} and round_to={config.round_to} the smallest share of {amount.what.part} "
        f"is {math.ceil(1e4 * smallest / budget.whole) / 1e4}; ask for no less, or loosen these settings"
    )


def meet_budget(budget: Budget) -> Met | str:
    """Return the cut whose result is as large as the budget allows.

    Bisection finds the number of units to cut; then the most sensitive cut units come back one by one while they fit.

    Args:
        budget: The units that compete, and what may be left of them.

    Returns:
        How it is met, or why it cannot be: the groups cost nothing, or even the largest cut leaves more.
    """
    ranking, amount, all_of_it = budget.ranking, budget.amount, budget.whole
    if not all_of_it:
        return (
            f"{amount} needs groups that cost some {amount.what.name}, got {len(ranking.groups)} groups with none; "
            "find them with an example batch that runs their layers"
        )
    limit, most = amount.keep * all_of_it, ranking.total - 1
    if too_little := out_of_reach(budget):
        return too_little
    # The cost may rise where one more cut unit makes an implant worth its weights. What bisection returns fits all the
    # same, and if it cuts too much, that comes back below.
    cut = fewest_cut(lambda number: budget.total(ranking.splits(number)), limit, most)
    splits = ranking.splits(cut)
    if ranking.config.equal_widths:  # what came back would make one layer wider than the others
        return Met(cut, splits)
    # Pruned units first, although implanted ones are more sensitive: these still have their implant.
    _restore_pruned(budget, splits, limit - budget.total(splits))
    _restore_implanted(budget, splits, limit - budget.total(splits))
    if limit - budget.total(splits) > TOLERANCE * all_of_it:
        _exchange(budget, splits, limit - budget.total(splits), TOLERANCE * all_of_it)
    reached = budget.total(splits) / all_of_it
    if amount.keep - reached <= TOLERANCE:
        return Met(cut, splits)
    note = (
        f"{amount}: the plan keeps {reached:.4f} of {amount.what.part}, over {TOLERANCE} below, because single "
        "units are larger than that"
    )
    return Met(cut, splits, (note,))


def _restore_pruned(budget: Budget, splits: list[Split], room: float) -> None:
    """Let pruned units survive while they fit, most sensitive first.

    The number of implants of a group stays, so a unit that comes back costs the same wherever the group stands.
    """
    ranking = budget.ranking
    full: set[int] = set()
    for index, place in reversed(ranking.ascending):
        pruned, implanted = splits[index]
        # The first `pruned` places of a group are its pruned units: any other is there already.
        if place >= pruned or index in full:
            continue
        survivors = ranking.groups[index].num_units - pruned
        # As many at a time as `round_to` asks for.
        step = ranking.width_above(index, survivors + 1) - survivors
        split = Split(pruned - step, implanted)
        cost = budget.change(splits, index, split)
        if cost > room:
            # The next unit of the group costs as much, and room only shrinks.
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
        """Return the split of a group after the smallest step back: one unit, or as many as ``round_to`` asks for."""
        n, (pruned, implanted) = ranking.groups[index].num_units, splits[index]
        return Split(n - ranking.width_above(index, n - pruned + 1), implanted)

    changes = {index: budget.change(splits, index, grown(index)) for index, split in enumerate(splits) if split.pruned}
    if not changes:
        return
    coarse = min(changes, key=changes.__getitem__)
    new = list(splits)
    new[coarse] = grown(coarse)
    # The unit that came back is not cut again below: it did not fit into the room, which is more than `largest`.
    over = changes[coarse] - room
    for index, place in ranking.ascending:
        if over <= 0:
            splits[:] = new
            return
        pruned, implanted = new[index]
        # Counts decide which units go: one that is above the cut stands for the next one of its group.
        if place < pruned + implanted:
            continue
        survivors = ranking.groups[index].num_units - pruned
        step = survivors - ranking.width_below(index, survivors)
        split = Split(pruned + step, implanted)
        if pruned + implanted + step <= ranking.cap(index) and (saved := -budget.change(new, index, split)) <= largest:
            new[index] = split
            over -= saved
