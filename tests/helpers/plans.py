"""Hand-made plans for tests."""

from collections.abc import Mapping, Sequence

from hap_hf.names.group import Group, Role
from hap_hf.names.plan import GroupPlan, PruningPlan


def plan_of(
    removed: Mapping[Group, Sequence[int]],
    implanted: Mapping[Group, Sequence[int]] | None = None,
    rank: int | None = None,
) -> PruningPlan:
    """Return a one-stage plan; the rank of implants is 1 unless given."""
    implanted = implanted or {}
    entries = []
    for group in dict.fromkeys([*removed, *implanted]):
        gone, some = removed.get(group, ()), implanted.get(group, ())
        actions = "".join("p" if u in gone else "i" if u in some else "k" for u in range(group.num_units))
        producers = {s.tensor for s in group.slices if s.role is Role.PRODUCER}
        entries.append(GroupPlan(group, actions, dict.fromkeys(producers, rank or 1) if some else {}))
    return PruningPlan((tuple(entries),))
