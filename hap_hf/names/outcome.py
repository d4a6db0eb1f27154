"""What is left of tensors after one stage of a plan: the one algebra that surgery, reports, budgets and loading share.

A tensor may be cut by several groups, along one dimension or along two; it is counted once. What an implant replaces
leaves the tensor and comes back as the implant's own, smaller weights.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from hap_hf.names.actions import KEEP
from hap_hf.names.bypass import BypassPlan
from hap_hf.names.group import Group, ImplantShape, Role, Slice
from hap_hf.names.plan import GroupPlan, PruningPlan

Cut = tuple[Slice, GroupPlan]
"""A slice and what happens to its units."""


@dataclass(frozen=True, slots=True)
class TensorOutcome:
    """What is left of one tensor.

    Args:
        shape: Shape of what keeps the tensor's name.
        implant: What an implant replaces, with the inputs that are left; None where there is none.
        rank: Rank of the implant, 0 where there is none.
        params: Parameters left in the slices, those of the implant included; 0 for statistics.
        macs: Multiply-accumulates per sample that these take.
    """

    shape: tuple[int, ...]
    implant: ImplantShape | None
    rank: int
    params: int
    macs: float

    @classmethod
    def of(cls, cuts: Sequence[Cut]) -> "TensorOutcome":
        """Return what is left of one tensor.

        Args:
            cuts: Every slice of the tensor, with the plan of its group.

        Returns:
            The outcome.
        """
        first = cuts[0][0]
        kept, inert = list(first.shape), list(first.shape)
        replaced: dict[int, int] = defaultdict(int)
        rank = 0
        for s, g in cuts:
            inert[s.dim] -= s.width * g.group.num_units
            kept[s.dim] -= s.width * g.pruned
            # Only a weight that gets an implant loses its implanted rows to it; everywhere else implanted units stay.
            if s.role is Role.PRODUCER and first.tensor in g.ranks:
                kept[s.dim] -= s.width * g.implanted
                replaced[s.dim] += s.width * g.implanted
                rank = max(rank, g.ranks[first.tensor])
        # Slices along two dimensions cross, and a sum over slices would count the entries in both twice. So count all
        # that is left, less the block of those that lie in no slice along any dimension, which belong to no unit.
        entries = prod(kept) - prod(inert)
        implant = None
        for dim, rows in replaced.items():
            if rows:
                taps = prod(first.shape[2:]) if len(first.shape) > 2 else None
                # An implant reads only inputs that are left, whichever group cut them.
                implant = ImplantShape(rows, kept[1 - dim], taps)
                entries += implant.weights(rank)
        counts = first.role is not Role.STATISTIC
        return cls(tuple(kept), implant, rank, entries if counts else 0, entries * max(s.uses for s, _ in cuts))


def outcomes(stage: Iterable[GroupPlan]) -> dict[str, TensorOutcome]:
    """Return what is left of every tensor that a stage names.

    Args:
        stage: Plans of groups of one stage.

    Returns:
        Outcomes by name of the tensor.
    """
    cuts: dict[str, list[Cut]] = defaultdict(list)
    for g in stage:
        for s in g.group.slices:
            cuts[s.tensor].append((s, g))
    return {name: TensorOutcome.of(pairs) for name, pairs in cuts.items()}


class Footprint(NamedTuple):
    """What some groups take together.

    Args:
        params: Number of parameters.
        macs: Multiply-accumulates per sample of the example batch, attention products included.
    """

    params: float
    macs: float

    def __sub__(self, other: "Footprint") -> "Footprint":
        """Return the difference of both numbers."""
        return Footprint(self.params - other.params, self.macs - other.macs)


def footprint(stage: Iterable[GroupPlan], bypasses: Sequence[BypassPlan] = ()) -> Footprint:
    """Return what some groups take together after a plan; entries that are in no slice do not count.

    Args:
        stage: Plans of groups of one stage.
        bypasses: The bypasses of the stage.

    Returns:
        Parameters and multiply-accumulates, implants, bypasses and attention products included.
    """
    plans = list(stage)
    each: list[TensorOutcome | BypassPlan] = [*outcomes(plans).values(), *bypasses]
    core = sum(g.group.core_macs * g.survivors for g in plans)
    return Footprint(sum(o.params for o in each), core + sum(o.macs for o in each))


def whole(groups: Iterable[Group]) -> tuple[GroupPlan, ...]:
    """Return the plans that keep all units of some groups.

    Args:
        groups: Groups of a model.

    Returns:
        A plan for each.
    """
    return tuple(GroupPlan(g, KEEP * g.num_units) for g in groups)


def shapes_left(plan: PruningPlan) -> tuple[Mapping[str, tuple[int, ...]], list[str]]:
    """Return the shapes that tensors have after a plan.

    Args:
        plan: Its stages name tensors as the one before left them.

    Returns:
        The shapes by name, and a sentence for each tensor that a stage expects in another shape than it was left in.
    """
    left: dict[str, tuple[int, ...]] = {}
    wrong = []
    for stage, bypasses in zip(plan.stages, plan.bypasses, strict=True):
        for name, shape in {s.tensor: s.shape for g in stage for s in g.group.slices}.items():
            # A tensor that no earlier stage named may have any shape: nothing is known of it here.
            if left.get(name, shape) != shape:
                wrong.append(f"{name}: expected shape {list(left[name])}, got {list(shape)}")
        left |= {name: o.shape for name, o in outcomes(stage).items()}
        left |= {name: shape for b in bypasses for name, shape in b.shapes.items()}
    return left, wrong
