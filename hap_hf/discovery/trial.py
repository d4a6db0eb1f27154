"""Trying candidates before they are believed: the pruned model must equal the masked one.

Dependences say which entries belong to a unit; they cannot say which Python attributes a forward pass reads, or that
a slope is computed from a head's number. So every candidate is applied for a moment, with different numbers of
units in neighbouring layers, and compared with the same model with these units zeroed where they are consumed.
What differs, or raises, is left whole.
"""

import logging
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hap_hf.batches import call
from hap_hf.config import ImplantInit
from hap_hf.curvature.state import preserved
from hap_hf.discovery.counters import HEAD_COUNTS, STRUCTURAL
from hap_hf.discovery.families import Candidate, home
from hap_hf.discovery.record import output_tensors
from hap_hf.errors import PlanMismatchError, UnsupportedModelError
from hap_hf.group import Counter, Group, Kind, Role
from hap_hf.plan import KEEP, PRUNE, GroupPlan, PruningPlan
from hap_hf.surgery.apply import apply_plan_undoable_, undo_
from hap_hf.surgery.projection import channel_dim, on_input

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference from the masked model, as a share of the largest value. A wrong mapping differs by far more."""


def accept(model: nn.Module, batch: Mapping[str, Any], candidates: Sequence[Candidate]) -> list[Group]:
    """Return the groups that prove right on the model itself, which is left as found.

    Args:
        model: The model.
        batch: Keyword arguments of its forward, on its device.
        candidates: Groups to try.

    Returns:
        The groups that can be removed from, in the order given.

    Raises:
        UnsupportedModelError: If the model's output holds NaN.
    """
    with preserved(model), torch.no_grad():
        trial = Trial(model, batch)
        accepted = _accept(trial, [], list(_classes(candidates).values()))
        left = [c for c in candidates if not _is_in(c, accepted)]
        accepted += _accept_together(trial, accepted, left)
        if whole := [c.group.name for c in left if not _is_in(c, accepted)]:
            logger.info("left whole: %s; removing units there does not equal masking", whole)
        # A convolution without channels does not run.
        empty = {
            key: members[0].group.kind is not Kind.CHANNELS and trial.holds_when_empty(members)
            for key, members in _classes(accepted).items()
        }
    order = {n: i for i, c in enumerate(candidates) for n in c.consumers}
    accepted.sort(key=lambda c: order[c.consumers[0]])
    return [replace(c.group, may_be_empty=empty[c.shape_class]) for c in accepted]


def _classes(candidates: Sequence[Candidate]) -> dict[tuple[str, ...], list[Candidate]]:
    result: dict[tuple[str, ...], list[Candidate]] = defaultdict(list)
    for c in candidates:
        result[c.shape_class].append(c)
    return result


def _accept(trial: "Trial", accepted: list[Candidate], classes: Sequence[list[Candidate]]) -> list[Candidate]:
    """Return what holds of ``classes`` beside what was accepted before: all, or what halving leads to."""
    every = [c for members in classes for c in members]
    if not every or trial.holds([*accepted, *every]):
        return every
    if len(classes) > 1:
        middle = len(classes) // 2
        first = _accept(trial, accepted, classes[:middle])
        return first + _accept(trial, [*accepted, *first], classes[middle:])
    members = classes[0]
    taken = _first_that_holds(trial, accepted, _variants(members)[1:])
    for member in members if len(members) > 1 and not taken else []:
        taken += _first_that_holds(trial, [*accepted, *taken], _variants([member]))
    return taken


def _accept_together(trial: "Trial", accepted: list[Candidate], left: Sequence[Candidate]) -> list[Candidate]:
    """Return what holds if unit u of one group only goes with unit u of another, as where a layer is split evenly."""
    together: dict[tuple[object, ...], list[Candidate]] = defaultdict(list)
    for c in left:
        together[c.family, c.group.num_units].append(c)
    taken: list[Candidate] = []
    for members in together.values():
        merged = [[m] for v in _variants(members) if (m := _merged(v))]
        taken += _first_that_holds(trial, [*accepted, *taken], merged)
    for members in _classes([c for c in left if not _is_in(c, taken)]).values():
        merged = [[m] for v in _variants(members) if (m := _merged(v))]
        taken += _first_that_holds(trial, [*accepted, *taken], merged)
    return taken


def _is_in(c: Candidate, taken: Sequence[Candidate]) -> bool:
    slices = {s for t in taken for s in t.group.slices}
    return slices.issuperset(c.group.slices)


def _first_that_holds(
    trial: "Trial", accepted: Sequence[Candidate], proposals: Sequence[list[Candidate]]
) -> list[Candidate]:
    return next((p for p in proposals if trial.holds([*accepted, *p])), [])


def _variants(members: Sequence[Candidate]) -> list[list[Candidate]]:
    """Return the members with all of their counters, with counts of heads only, with none, and with any single one."""
    names = sorted({n for c in members for x in c.group.counters if (n := _attribute(x)) not in HEAD_COUNTS})
    variants = [
        list(members),
        [_with_counters(c, HEAD_COUNTS.__contains__) for c in members],
        [_with_counters(c, lambda name: False) for c in members],
        *([_with_counters(c, name.__eq__) for c in members] for name in names),
    ]
    return [v for i, v in enumerate(variants) if v not in variants[:i]]


def _attribute(counter: Counter) -> str:
    return counter.attribute.rpartition(".")[2]


def _with_counters(c: Candidate, wanted: Callable[[str], bool]) -> Candidate:
    counters = tuple(x for x in c.group.counters if _attribute(x) in STRUCTURAL or wanted(_attribute(x)))
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
    widths: dict[str, int] = defaultdict(int)
    for c in counters:
        # A size of one of several equal parts falls once; groups of channels fall for each part.
        widths[c.attribute] = widths[c.attribute] + c.width if _attribute(c) in STRUCTURAL else c.width
    return tuple(Counter(attribute, width) for attribute, width in widths.items())


class Trial:
    """Compares removing with masking, on one batch.

    Args:
        model: The model, in eval mode.
        batch: Keyword arguments of its forward.

    Raises:
        UnsupportedModelError: If the model's output holds NaN.
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        self._model = model
        self._batch = batch
        if any(bool(t.isnan().any()) for t in self._run([], [])):
            raise UnsupportedModelError(
                f"the output of {type(model).__name__} on the batch holds NaN, so no removal could be verified; "
                "pass a batch like those it was trained on, with weights that are finite"
            )

    def holds(self, candidates: Sequence[Candidate]) -> bool:
        """Return whether removing units of ``candidates`` equals masking them.

        Args:
            candidates: Groups to try together.

        Returns:
            True if it does, for different choices of units and of layers.
        """
        rng = random.Random(0)
        position: dict[tuple[str, ...], int] = defaultdict(int)
        parity = []
        for c in candidates:
            parity.append(position[c.shape_class] % 2)
            position[c.shape_class] += 1
        # Every other layer, then the layers between, then all: neighbours must not have to agree on a number.
        for wanted in ({0}, {1}, {0, 1}):
            cut = [
                (c, rng.sample(range(c.group.num_units), rng.randint(1, c.group.num_units - 1)))
                for c, p in zip(candidates, parity, strict=True)
                if p in wanted and c.group.num_units > 1
            ]
            if cut and not self._equal(cut):
                return False
        return True

    def holds_when_empty(self, candidates: Sequence[Candidate]) -> bool:
        """Return whether the model runs, and equals the masked one, without any unit of ``candidates``.

        Args:
            candidates: Groups to empty.

        Returns:
            True if it does.
        """
        return self._equal([
            (replace(c, group=replace(c.group, may_be_empty=True)), list(range(c.group.num_units))) for c in candidates
        ])

    def _equal(self, cut: Sequence[tuple[Candidate, list[int]]]) -> bool:
        plan = PruningPlan((tuple(_plan(c.group, units) for c, units in cut),))
        watched = [n for c, _ in cut for n in c.consumers]
        masked = self._run(watched, [(c.group, units) for c, units in cut])
        try:
            _, undo = apply_plan_undoable_(self._model, plan, init=ImplantInit.ZERO, input_moments={})
        except PlanMismatchError as error:
            logger.debug("trial: %s", error)
            return False
        try:
            pruned = self._run(watched, [])
        except Exception as error:  # the model's own code, run with sizes it was not written for, may raise anything
            logger.debug("trial: %s: %s", type(error).__name__, error)
            return False
        finally:
            undo_(undo)
        return len(masked) == len(pruned) and all(map(_close, masked, pruned))

    def _run(self, watched: Sequence[str], mask: Sequence[tuple[Group, list[int]]]) -> list[Tensor]:
        seen: list[Tensor] = []
        made = _channels(mask, {Role.PRODUCER, Role.FACTOR})

        def watch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                # Outputs that other units of the mask make are gone in the pruned model.
                dim, gone = channel_dim(module), set(made.get(name, ()))
                left = torch.tensor([i for i in range(output.shape[dim]) if i not in gone], dtype=torch.long)
                # A copy in any case: an in-place activation may follow.
                seen.append(output.index_select(dim, left.to(output.device)))

            return hook

        handles = [self._model.get_submodule(n).register_forward_hook(watch(n)) for n in watched]
        handles += [
            on_input(m := self._model.get_submodule(name), _zeroing(indices, channel_dim(m)))
            for name, indices in _channels(mask, {Role.CONSUMER}).items()
        ]
        try:
            seen += output_tensors(call(self._model, self._batch))
        finally:
            for handle in handles:
                handle.remove()
        return [t for t in seen if t.is_floating_point()]


def _channels(mask: Sequence[tuple[Group, list[int]]], roles: set[Role]) -> dict[str, list[int]]:
    """Return the input channels through which units are consumed, or the output channels that they make."""
    result: dict[str, list[int]] = defaultdict(list)
    for group, units in mask:
        for s in group.slices:
            if s.role in roles and s.tensor.endswith("weight"):
                result[s.tensor.rpartition(".")[0]] += [i for u in units for i in s.indices(u)]
    return result


def _zeroing(indices: list[int], dim: int) -> Callable[[Tensor], Tensor]:
    def zero(x: Tensor) -> Tensor:
        keep = torch.ones(x.shape[dim], dtype=x.dtype, device=x.device)
        keep[indices] = 0
        return x * keep.view(-1, *[1] * (-1 - dim))

    return zero


def _plan(group: Group, units: Sequence[int]) -> GroupPlan:
    gone = set(units)
    return GroupPlan(group, "".join(PRUNE if u in gone else KEEP for u in range(group.num_units)))


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    limit = (
        TOLERANCE.get(a.dtype, 1e-4) * float(torch.nan_to_num(a, posinf=0, neginf=0).abs().max()) if a.numel() else 0.0
    )
    return torch.allclose(a, b, rtol=0, atol=limit + 1e-30)
