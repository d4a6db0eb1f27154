"""Integer attributes of modules that must fall with the number of units."""

from collections.abc import Sequence

from torch import nn

from hap_hf.discovery.partition import Partition
from hap_hf.layers.projection import is_grouped, num_groups
from hap_hf.names.group import COUNTER_NAMES, Counter, Kind, Role, Slice

STRUCTURAL = frozenset({"groups", "num_groups"})
"""Attributes of torch's own layers, whose meaning is known."""
HEAD_COUNTS = frozenset(n for n in COUNTER_NAMES if ("head" in n and "size" not in n) or n == "num_key_value_groups")
SIZES = COUNTER_NAMES - HEAD_COUNTS - STRUCTURAL


def counters_of(
    model: nn.Module, members: Sequence[Partition], kind: Kind, slices: Sequence[Slice], num_units: int
) -> tuple[Counter, ...]:
    """Return the attributes that seem to count the units or their entries.

    They are found by name and value on the modules around the layers, and on those beside the layers that have no
    parameters. Whether they do what their names say is settled by trying the group
    (:mod:`hap_hf.discovery.trial`).

    Args:
        model: The model.
        members: Partitions of the group's consumers.
        kind: What a unit is.
        slices: Where the units live.
        num_units: Number of units.

    Returns:
        The counters, counts of heads first.
    """
    per_tensor: dict[tuple[str, int], int] = {}
    for s in slices:
        per_tensor[s.tensor, s.dim] = per_tensor.get((s.tensor, s.dim), 0) + s.width
    # An attribute may hold the size of a whole layer, or of the part of it in which the units lie.
    widths = {s.shape[s.dim]: per_tensor[s.tensor, s.dim] for s in slices}
    widths |= {s.width * num_units: s.width for s in slices}
    widths |= {width * num_units: width for width in per_tensor.values()}
    every = {p.num_units for p in members}
    shares = any(p.shares_sources for p in members)
    found: dict[str, Counter] = {}
    for owner in _holders(model, slices):
        for name, value in vars(model.get_submodule(owner)).items():
            if type(value) is not int or value <= 0 or name not in COUNTER_NAMES:
                continue
            attribute = f"{owner}.{name}" if owner else name
            if name in HEAD_COUNTS and kind is not Kind.FFN:
                total = next((n for n in sorted(every) if value % n == 0), None)
                if total and (name != "num_key_value_groups" or (shares and value == total)):
                    found[attribute] = Counter(attribute, value // total)
            if name in SIZES and value in widths:
                found[attribute] = Counter(attribute, widths[value])
    return tuple(sorted(found.values(), key=lambda c: c.attribute.rpartition(".")[2] not in HEAD_COUNTS))


def _holders(model: nn.Module, slices: Sequence[Slice]) -> list[str]:
    """Return the modules around the layers, up to the one that holds them all, and those beside them."""
    layers = {s.tensor.rpartition(".")[0] for s in slices}
    parts = [n.split(".") for n in layers]
    shared = 0
    while all(len(p) > shared + 1 for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    holders = {n.rpartition(".")[0] for n in layers}
    holders |= {".".join(p[:i]) for p in parts for i in range(max(shared, 1), len(p))}
    beside = {
        f"{holder}.{name}" if holder else name
        for holder in holders
        for name, child in model.get_submodule(holder).named_children()
        if next(child.parameters(), None) is None
    }
    # A block may hold a parameter of its own beside its layers; a layer's own sizes follow its tensors.
    blocks = {n for n in layers if next(model.get_submodule(n).children(), None) is not None}
    return sorted(((holders | beside) - layers) | blocks)


def structural_counters(model: nn.Module, slices: Sequence[Slice]) -> tuple[Counter, ...]:
    """Return by how much the groups of grouped convolutions and of group norms fall.

    Args:
        model: The model.
        slices: Where the units live.

    Returns:
        The counters of the layers that lose whole groups with every unit.
    """
    result = {}
    for s in slices:
        owner, _, leaf = s.tensor.rpartition(".")
        module = model.get_submodule(owner)
        if is_grouped(module) and leaf == "weight" and s.role is Role.FACTOR:
            name, in_one = "groups", s.shape[0] // num_groups(module)
        elif isinstance(module, nn.GroupNorm) and leaf == "weight":
            name, in_one = "num_groups", s.shape[0] // module.num_groups
        else:
            continue
        attribute = f"{owner}.{name}"
        width = sum(t.width for t in slices if t.tensor == s.tensor)
        if width % in_one == 0:
            result[attribute] = Counter(attribute, width // in_one)
    return tuple(result.values())
