"""Integer attributes of modules that must fall with the number of units."""

from collections.abc import Sequence

from torch import nn

from hap_hf.discovery.partition import Partition
from hap_hf.layers.norms import group_counter
from hap_hf.layers.projection import is_grouped, num_groups
from hap_hf.names.counters import Counts, counted_by
from hap_hf.names.group import Counter, Kind, Role, Slice


def counters_of(
    model: nn.Module, members: Sequence[Partition], kind: Kind, slices: Sequence[Slice], num_units: int
) -> tuple[Counter, ...]:
    """Return the attributes that seem to count the units or their entries.

    They are found by name and value on the modules around the layers, and on those beside the layers that have no
    parameters. Whether they do what their names say is settled by trying the group
    (:mod:`hap_hf.discovery.trial`).

    Args:
        model: The model that holds the units, with its attributes as they are.
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
    # All units of the consumers, and not those of the group: an attribute counts the ones that must stay as well.
    every = {p.num_units for p in members}
    shares = any(p.shares_sources for p in members)
    found: dict[str, Counter] = {}
    for owner in _holders(model, slices):
        for name, value in vars(model.get_submodule(owner)).items():
            counts = counted_by(name)
            if type(value) is not int or value <= 0 or counts is None:
                continue
            attribute = f"{owner}.{name}" if owner else name
            if counts is Counts.HEADS and kind is not Kind.FFN:
                # Under grouped queries a unit is a key head with its query heads, so counts of heads are multiples.
                total = next((n for n in sorted(every) if value % n == 0), None)
                # Query heads for each key head stay as many, unless one key head serves all and units are queries.
                if total and (name != "num_key_value_groups" or (shares and value == total)):
                    found[attribute] = Counter(attribute, value // total)
            if counts is Counts.ENTRIES and value in widths:
                found[attribute] = Counter(attribute, widths[value])
    return tuple(sorted(found.values(), key=lambda c: counted_by(c.attribute.rpartition(".")[2]) is not Counts.HEADS))


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
        model: The model that holds the units.
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
        elif (counter := group_counter(module)) is not None and leaf == "weight":
            name, in_one = counter, s.shape[0] // getattr(module, counter)
        else:
            continue
        attribute = f"{owner}.{name}"
        width = sum(t.width for t in slices if t.tensor == s.tensor)
        # Where a unit is less than a whole group, no number of groups fits what is left.
        if width % in_one == 0:
            result[attribute] = Counter(attribute, width // in_one)
    return tuple(result.values())
