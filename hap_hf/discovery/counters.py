"""Integer attributes of modules that must fall with the number of units."""

from collections.abc import Sequence

from torch import nn

from hap_hf.discovery.dependence import Partition
from hap_hf.group import COUNTER_NAMES, Counter, Kind

HEAD_COUNTS = frozenset(n for n in COUNTER_NAMES if ("head" in n and "size" not in n) or n == "num_key_value_groups")
SIZES = COUNTER_NAMES - HEAD_COUNTS


def counters_of(model: nn.Module, members: Sequence[Partition], kind: Kind, num_units: int) -> tuple[Counter, ...]:
    """Return the attributes that seem to count the units or their entries.

    They are found by name and value on the modules that directly hold the projections. Whether they do what their
    names say is settled by trying the group (:mod:`hap_hf.discovery.trial`).

    Args:
        model: The model.
        members: Partitions of the group's consumers.
        kind: What a unit is.
        num_units: Number of units in all.

    Returns:
        The counters, counts of heads first.
    """
    found: dict[str, Counter] = {}
    for p in members:
        sources = [n for n, codes in p.columns.items() if bool((codes >= 0).any())]
        sizes = {p.num_units * p.width} | {int((codes >= 0).sum()) for codes in p.columns.values()}
        for owner in {n.rpartition(".")[0] for n in [p.consumer, *sources]}:
            for name, value in vars(model.get_submodule(owner)).items():
                if type(value) is not int or value <= 0 or value % num_units:
                    continue
                counts = kind is Kind.HEADS and name in HEAD_COUNTS
                if name == "num_key_value_groups":
                    counts = p.shares_sources and value == num_units
                if counts or (name in SIZES and value in sizes):
                    attribute = f"{owner}.{name}" if owner else name
                    found[attribute] = Counter(attribute, value // num_units)
    return tuple(sorted(found.values(), key=lambda c: c.attribute.rpartition(".")[2] not in HEAD_COUNTS))
