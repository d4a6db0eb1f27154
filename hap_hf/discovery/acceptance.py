"""Which candidates are accepted: all if all hold together, else what halving, coupling and trying alone lead to."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from hap_hf.discovery.families import Candidate, home
from hap_hf.discovery.runs import Run
from hap_hf.discovery.trial import Trial
from hap_hf.discovery.whole import LeftWhole
from hap_hf.errors import UnsupportedModelError
from hap_hf.model.state import preserved
from hap_hf.names.counters import Counts, counted_by
from hap_hf.names.group import Counter, Group, Kind, Role


def accept(
    model: nn.Module, runs: Sequence[Run], candidates: Sequence[Candidate], confirm: Sequence[Run] = ()
) -> tuple[list[Group], list[LeftWhole]]:
    """Return the groups that prove right on the model itself, which is left as found.

    Args:
        model: The model with its own weights; units are taken out of it and put back.
        runs: How the model is run.
        candidates: Groups to try.
        confirm: Other runs in which all that was accepted must hold.

    Returns:
        The groups that can be removed from, in the order given, and those that cannot.

    Raises:
        UnsupportedModelError: If the model's output holds NaN, or what was accepted does not hold in the other runs.
    """
    with preserved(model), torch.no_grad():
        trial = Trial(model, runs)
        # Candidates of a class come from equal code, so classes are halved and not candidates: the number of trials
        # does not grow with the number of layers.
        accepted = _accept(trial, [], list(_classes(candidates).values()))
        if len(accepted) < len(candidates):
            accepted += _alone(trial, accepted, [c for c in candidates if not _is_in(c, accepted)])
            accepted = _together(trial, accepted, candidates)
        if confirm and accepted:
            trial = Trial(model, confirm)
            if not trial.holds(accepted):
                raise UnsupportedModelError("what holds on few tokens does not on all of them")
        rejected = [
            LeftWhole(
                tuple(c.group.name for c in candidates if c.group.kind is kind and not _is_in(c, accepted)),
                "removing units there does not equal masking them",
                kind,
            )
            for kind in Kind
        ]
        # A convolution without channels does not run.
        empty = {
            key: members[0].group.kind is not Kind.CHANNELS and trial.holds_when_empty(members)
            for key, members in _classes(accepted).items()
        }
    # Merged candidates have the consumers of all their members, and a place among the others by the first of them.
    order = {n: i for i, c in enumerate(candidates) for n in c.consumers}
    accepted.sort(key=lambda c: order[c.consumers[0]])
    groups = [replace(c.group, may_be_empty=empty[c.shape_class]) for c in accepted]
    return groups, [entry for entry in rejected if entry.names]


def _classes(candidates: Sequence[Candidate]) -> dict[tuple[str, ...], list[Candidate]]:
    """Return the candidates by class: those of a class come from equal code."""
    result: dict[tuple[str, ...], list[Candidate]] = defaultdict(list)
    for c in candidates:
        result[c.shape_class].append(c)
    return result


def _accept(trial: Trial, accepted: list[Candidate], classes: Sequence[list[Candidate]]) -> list[Candidate]:
    """Return what holds of ``classes`` beside what was accepted before: all, or what halving leads to."""
    every = [c for members in classes for c in members]
    if not every or trial.holds([*accepted, *every]):
        return every
    if len(classes) > 1:
        middle = len(classes) // 2
        # The second half is tried beside what held of the first: both must hold together in the end.
        first = _accept(trial, accepted, classes[:middle])
        return first + _accept(trial, [*accepted, *first], classes[middle:])
    return _first_that_holds(trial, accepted, _variants(classes[0])[1:])


def _together(trial: Trial, accepted: list[Candidate], candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return what was accepted, with groups merged where unit u of one can only go together with unit u of others.

    Code that splits the outputs of a layer into equal parts needs the parts to stay equal: if one part was accepted
    alone, it is replaced by all parts together. Layers that share one bias for each head must lose the same heads.
    """
    taken = list(accepted)
    for sets in _mates(candidates):
        open_sets = [members for members in sets if not all(_is_in(c, taken) for c in members)]
        held = _replaced(trial, taken, open_sets)
        for members in open_sets if len(open_sets) > 1 and held is None else []:
            taken = _replaced(trial, taken, [members]) or taken
        taken = held or taken
    return taken


def _mates(candidates: Sequence[Candidate]) -> Iterator[list[list[Candidate]]]:
    """Yield sets of groups that may have to be merged, all sets that come from equal code at a time.

    First parts of the output of one layer, then all that shares layers, then layers of equal code. The groups of a set
    have equal numbers of units.
    """
    by_layer: dict[tuple[object, ...], list[Candidate]] = defaultdict(list)
    by_family: dict[tuple[object, ...], list[Candidate]] = defaultdict(list)
    for c in candidates:
        by_family[c.family, c.group.num_units].append(c)
        for tensor in {s.tensor for s in c.group.slices if s.role in {Role.PRODUCER, Role.FACTOR}}:
            by_layer[tensor, c.group.num_units].append(c)
    for sets in (by_layer, by_family):
        alike: dict[tuple[object, ...], list[list[Candidate]]] = defaultdict(list)
        for members in sets.values():
            if len(members) > 1:
                alike[tuple(c.shape_class for c in members)].append(members)
        yield from alike.values()
    yield from ([members] for members in _classes(candidates).values() if len(members) > 1)


def _replaced(trial: Trial, accepted: list[Candidate], sets: Sequence[list[Candidate]]) -> list[Candidate] | None:
    """Return what was accepted with one group for each of the sets in place of its members, if that holds."""
    # By slices and not by name, as a member may have been accepted with other counters, or merged already.
    inside = {s for members in sets for c in members for s in c.group.slices}
    others = [c for c in accepted if not inside.intersection(c.group.slices)]
    each = [[m for v in _variants(members) if (m := _merged(v))] for members in sets]
    # Sets of equal code want the same counters, so the i-th variants of all sets make one proposal.
    proposals = [list(proposal) for proposal in zip(*each, strict=False)]
    found = _first_that_holds(trial, others, proposals)
    return others + found if found else None


# What comes from equal code fails for the same reason, and every failure costs several runs of the model.
_MOST_FAILURES = 2


def _alone(trial: Trial, accepted: Sequence[Candidate], left: Sequence[Candidate]) -> list[Candidate]:
    """Return what holds of each class one by one; a class of which some fail in turn is given up."""
    taken: list[Candidate] = []
    for members in _classes(left).values():
        failures = 0
        for member in members if len(members) > 1 else []:
            found = _first_that_holds(trial, [*accepted, *taken], _variants([member]))
            taken += found
            failures = 0 if found else failures + 1
            if failures == _MOST_FAILURES:
                break
    return taken


def _is_in(c: Candidate, taken: Sequence[Candidate]) -> bool:
    """Return whether the units of a candidate are taken, with whatever counters and in whatever merged group."""
    slices = {s for t in taken for s in t.group.slices}
    return slices.issuperset(c.group.slices)


def _first_that_holds(
    trial: Trial, accepted: Sequence[Candidate], proposals: Sequence[list[Candidate]]
) -> list[Candidate]:
    """Return the first proposal that holds beside what was accepted, empty if none does."""
    return next((p for p in proposals if trial.holds([*accepted, *p])), [])


def _variants(members: Sequence[Candidate]) -> list[list[Candidate]]:
    """Return the members with all of their counters, with counts of heads only, with none, and with any single one."""
    # A counter that was found by name and value may hold something else that is as large by chance. Lowering it would
    # break the model, so variants leave counters out, the likeliest variants first.
    names = sorted({n for c in members for x in c.group.counters if counted_by(n := _attribute(x)) is not Counts.HEADS})
    variants = [
        list(members),
        [_with_counters(c, lambda name: counted_by(name) is Counts.HEADS) for c in members],
        [_with_counters(c, lambda name: False) for c in members],
        *([_with_counters(c, name.__eq__) for c in members] for name in names),
    ]
    return [v for i, v in enumerate(variants) if v not in variants[:i]]


def _attribute(counter: Counter) -> str:
    return counter.attribute.rpartition(".")[2]


def _is_structural(counter: Counter) -> bool:
    """Return whether torch's own layer needs the counter to run: a number of groups, never left out."""
    return counted_by(_attribute(counter)) is Counts.GROUPS


def _with_counters(c: Candidate, wanted: Callable[[str], bool]) -> Candidate:
    """Return a candidate with the counters whose names are wanted, and all structural ones."""
    counters = tuple(x for x in c.group.counters if _is_structural(x) or wanted(_attribute(x)))
    return replace(c, group=replace(c.group, counters=counters))


def _merged(members: Sequence[Candidate]) -> Candidate | None:
    """Return one group whose unit u is unit u of every member, as where layers share one bias for each head."""
    groups = [c.group for c in members]
    if len(groups) < 2 or len({g.num_units for g in groups}) > 1:
        return None
    consumers = tuple(dict.fromkeys(n for c in members for n in c.consumers))
    group = replace(
        groups[0],
        name=groups[0].name if groups[0].kind is Kind.CHANNELS else f"{home(consumers)}:{groups[0].kind.value}",
        slices=tuple(s for g in groups for s in g.slices),
        counters=_added(c for g in groups for c in g.counters),
        core_macs=sum(g.core_macs for g in groups),
    )
    return replace(members[0], group=group, consumers=consumers)


def _added(counters: Iterable[Counter]) -> tuple[Counter, ...]:
    """Return the counters of a merged group, each attribute once."""
    widths: dict[str, int] = defaultdict(int)
    for c in counters:
        # An attribute that holds the size of one of several equal parts falls once for all parts; a number of groups
        # of channels counts those of all parts, and falls for each.
        widths[c.attribute] = widths[c.attribute] + c.width if _is_structural(c) else c.width
    return tuple(Counter(attribute, width) for attribute, width in widths.items())
