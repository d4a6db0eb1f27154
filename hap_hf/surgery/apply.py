"""Applying a plan: check everything, then change everything, and put everything back if a later stage fails."""

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor, nn

from hap_hf.errors import PlanMismatchError
from hap_hf.layers.implants import Implanted
from hap_hf.layers.kind import kind_of
from hap_hf.layers.projection import has_implant, implant_tensors, input_dim, is_projection, known, output_dim
from hap_hf.model.change import TensorChange, memory_format_of
from hap_hf.model.stale import note_replaced
from hap_hf.model.state import renew_caches
from hap_hf.names.actions import KEEP
from hap_hf.names.group import Slice
from hap_hf.names.plan import GroupPlan, PruningPlan
from hap_hf.surgery.bypass import attach_bypasses_
from hap_hf.surgery.calibration import ImplantInit
from hap_hf.surgery.check import check_outcome, stage_problems
from hap_hf.surgery.order import Order
from hap_hf.surgery.sizes import segments_left, sync_sizes_
from hap_hf.surgery.undo import Undo, remember_, replace_, undo_

Stage = Sequence[GroupPlan]


def check_plan(model: nn.Module, plan: PruningPlan) -> None:
    """Check that ``plan`` fits ``model``, and change nothing.

    Args:
        model: The model the plan would be applied to.
        plan: Stages for this model; a plan for a dense model does not fit one that went through it.

    Raises:
        PlanMismatchError: If it does not fit; the message lists every mismatch of the first stage that has one.
    """
    # Later stages name tensors as earlier ones leave them, so they are tried on a copy without storage.
    # deepcopy takes its copies of tensors from the memo: none gets storage, and tied weights stay tied.
    tensors = [*model.parameters(), *model.buffers()]
    memo = {
        id(t): nn.Parameter(t.to("meta"), t.requires_grad) if isinstance(t, nn.Parameter) else t.to("meta")
        for t in tensors
    }
    apply_plan_(copy.deepcopy(model, memo), plan)


def apply_plan_(
    model: nn.Module,
    plan: PruningPlan,
    *,
    init: ImplantInit | str = ImplantInit.SVD,
    input_moments: Mapping[str, Tensor] | None = None,
    bypass_values: Mapping[str, Tensor] | None = None,
) -> tuple[TensorChange, ...]:
    """Make ``model`` smaller, in place.

    Tensors are replaced, never written to: whoever holds an old one keeps it unharmed.

    Args:
        model: The model; on the ``meta`` device only shapes change.
        plan: What to do with each unit.
        init: Initial weights of implants.
        input_moments: Second moments of layer inputs by weight name, for the initial weights of implants.
        bypass_values: Weights of bypasses by name, with the inputs and outputs that there are before the plan. Without
            them a bypass adds nothing at first.

    Returns:
        What changed, in order, for :func:`hap_hf.surgery.carry_optimizer_state_`.

    Raises:
        PlanMismatchError: If the plan does not fit; the model is then as it was.
    """
    changes, _ = apply_plan_undoable_(
        model, plan, init=ImplantInit(init), input_moments=input_moments or {}, bypass_values=bypass_values or {}
    )
    # Only after success: where a plan is taken back, optimizers still hold the right tensors.
    note_replaced(changes)
    return changes


def apply_plan_undoable_(
    model: nn.Module,
    plan: PruningPlan,
    *,
    init: ImplantInit,
    input_moments: Mapping[str, Tensor],
    bypass_values: Mapping[str, Tensor] = MappingProxyType({}),
) -> tuple[tuple[TensorChange, ...], Undo]:
    """Apply ``plan`` as :func:`apply_plan_` does, and also return the record with which :func:`undo_` takes it back."""
    changes: list[TensorChange] = []
    undo: Undo = []
    try:
        for number, stage in enumerate(plan.stages):
            problems = stage_problems(model, stage, plan.bypasses[number])
            if problems:
                listed = "\n  ".join(problems[:20]) + (
                    f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
                )
                raise PlanMismatchError(
                    f"the plan does not fit this {type(model).__name__} (stage {number + 1} of {len(plan.stages)}); "
                    f"apply it to the model it was made for:\n  {listed}"
                )
            made = _apply_stage(model, stage, init, input_moments, undo)
            changes += made + attach_bypasses_(model, plan.bypasses[number], made, bypass_values, undo)
    except BaseException:
        # Ctrl-C, too, must not leave a model of which some layers are cut and others are not.
        undo_(undo)
        raise
    renew_caches(model)
    return tuple(changes), undo


def _apply_stage(
    model: nn.Module, stage: Stage, init: ImplantInit, moments: Mapping[str, Tensor], undo: Undo
) -> list[TensorChange]:
    """Cut every tensor of a stage, each once, and let counters and sizes follow."""
    # By tensor, as groups may share one, along one dimension or along two. Groups that stay whole are left out: their
    # tensors remain the same objects, and nobody who holds them need be told.
    cuts: dict[str, dict[int, list[tuple[Slice, GroupPlan]]]] = defaultdict(lambda: defaultdict(list))
    for g in stage:
        for s in g.group.slices if set(g.actions) != {KEEP} else ():
            cuts[s.tensor][s.dim].append((s, g))
    owners = {name.rpartition(".")[0] for name in cuts}
    counters = [(c, g) for g in stage if g.pruned for c in g.group.counters]
    # Before anything is cut: standardised over fewer inputs, the same weights would give other kernels.
    changes = [c for name in sorted(owners) for c in _made_plain_(model, name, undo)]
    for name in sorted(owners | {c.attribute.rpartition(".")[0] for c, _ in counters}):
        remember_(model.get_submodule(name), undo)
    changes += [c for name, by_dim in cuts.items() for c in _cut(model, name, by_dim, init, moments, undo)]
    for counter, g in counters:
        owner, _, attribute = counter.attribute.rpartition(".")
        module = model.get_submodule(owner)
        # Only pruned units count: implanted ones are outputs of the layer as before.
        setattr(module, attribute, getattr(module, attribute) - counter.width * g.pruned)
    added = {c.name for c in changes if c.old is None}
    for name in owners:
        module = model.get_submodule(name)
        if not has_implant(module):
            sync_sizes_(module)
        # An implant of this stage was built with its sizes; one from before lost units in some of its segments.
        elif f"{name}.{known(module).makes[1]}" not in added:
            cast(Implanted, module).sync_sizes(segments_left(module, name, cuts))
    check_outcome(stage, changes)
    return changes


def _made_plain_(model: nn.Module, path: str, undo: Undo) -> list[TensorChange]:
    """Put a layer whose weight can be cut in the place of one whose weight cannot."""
    module = model.get_submodule(path)
    kind = kind_of(module)
    plain = module if kind is None else kind.plain(module)
    if plain is module:
        return []
    replace_(model, path, plain, undo)
    # Whoever trains the old weight must go on with the new one.
    return [TensorChange(f"{path}.weight", module.get_parameter("weight"), plain.get_parameter("weight"))]


def _cut(
    model: nn.Module,
    name: str,
    by_dim: Mapping[int, Sequence[tuple[Slice, GroupPlan]]],
    init: ImplantInit,
    moments: Mapping[str, Tensor],
    undo: Undo,
) -> list[TensorChange]:
    """Cut one tensor along all its dimensions, and put an implant into its layer where the plan wants one."""
    parts = {dim: Order(pairs, _size(model, name, dim)) for dim, pairs in by_dim.items()}
    module = model.get_submodule(name.rpartition(".")[0])
    # Only the output rows of a projection are factored; its other tensors follow the units' new order.
    out = output_dim(module) if is_projection(module) and name.endswith("weight") else None
    if out in parts and len(parts[out].factored) and any(name in g.ranks for _, g in by_dim[out]):
        return _implant(model, name, by_dim[out], parts, init, moments, undo)
    return [_resize(module, name, parts, init)]


def _size(model: nn.Module, name: str, dim: int) -> int:
    owner, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(owner), leaf)
    return tensor.shape[dim]


def _select(tensor: Tensor, index: Mapping[int, Tensor]) -> Tensor:
    """Return the wanted entries along each dimension, in a tensor of their own that lies in memory as the old one."""
    value = tensor.detach()
    for dim, i in index.items():
        value = value.index_select(dim, i.to(value.device))
    return value.clone(memory_format=memory_format_of(tensor))


def _resize(module: nn.Module, name: str, parts: Mapping[int, Order], init: ImplantInit) -> TensorChange:
    """Put what survives of a tensor in its place, its gradient included."""
    leaf = name.rpartition(".")[2]
    old: Tensor = getattr(module, leaf)
    index = {dim: part.survivors for dim, part in parts.items()}
    new = _select(old, index)
    if init is ImplantInit.ZERO:
        # Silent implants: the columns that read them are zero. With zeros inside the implants, products of two of them
        # (query and key, gate and up) would never get a gradient.
        for dim, part in parts.items():
            _silence(new, dim, part)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
        if old.grad is not None:
            new.grad = _select(old.grad, index)
    setattr(module, leaf, new)
    return TensorChange(name, old, new, index)


def _silence(tensor: Tensor, dim: int, part: Order) -> None:
    """Zero what reads implanted units."""
    silent = torch.isin(part.survivors, part.read_from_implants).nonzero().flatten()
    tensor.index_fill_(dim, silent.to(tensor.device), 0)


def _implant(
    model: nn.Module,
    name: str,
    pairs: Sequence[tuple[Slice, GroupPlan]],
    parts: Mapping[int, Order],
    init: ImplantInit,
    moments: Mapping[str, Tensor],
    undo: Undo,
) -> list[TensorChange]:
    """Put a layer with an implant in the place of the one that makes these units."""
    path = name.rpartition(".")[0]
    module = model.get_submodule(path)
    old: nn.Parameter = module.get_parameter("weight")
    out, inp = output_dim(module), input_dim(module)
    inputs = parts[inp].survivors if inp in parts else torch.arange(old.shape[inp])
    index = {out: parts[out].kept} | ({inp: inputs} if inp in parts else {})
    kind = known(module)
    # All slices of a weight share its implant; of several ranks the largest counts, as in names/outcome.py.
    rank = max(g.ranks[name] for _, g in pairs if name in g.ranks)
    implant = cast(Implanted, kind.implanted(module, len(inputs), parts[out].segments, rank))
    if not old.is_meta:
        implant.weight.data = _select(old, index)
        rows = _select(old, {out: parts[out].factored, inp: inputs})  # [implanted, inputs, *kernel]
        values = kind.fitted(rows.T if out == 1 else rows, implant, _part(moments.get(name), inputs))
        for leaf, value in values.items():
            implant.get_parameter(leaf).data.copy_(value)
        if init is ImplantInit.ZERO and inp in parts:
            # As in _resize: this layer may itself read implants of others.
            for leaf in known(implant).reads:
                _silence(implant.get_parameter(leaf).data, inp if leaf == "weight" else 1, parts[inp])
    # The bias, still whole or already cut, is taken over as it is: its own slices decide about it.
    implant.bias = module.bias if isinstance(module.bias, nn.Parameter) else None
    added = implant_tensors(implant)
    for leaf in ("weight", *added):
        implant.get_parameter(leaf).requires_grad_(old.requires_grad)
    if old.grad is not None:
        implant.weight.grad = _select(old.grad, index)
    replace_(model, path, implant, undo)
    changes = [TensorChange(name, old, implant.weight, index)]
    # Each behind the one before it, which is where an optimizer over the finished model would have it.
    for leaf in added:
        new = implant.get_parameter(leaf)
        changes.append(TensorChange(f"{path}.{leaf}", None, new, beside=changes[-1].new))
    return changes


def _part(moment: Tensor | None, inputs: Tensor) -> Tensor | None:
    """Return a moment of layer inputs, ``[in * taps, in]``, for the inputs that are left."""
    if moment is None:
        return None
    whole = moment.view(moment.shape[1], -1, moment.shape[1])  # [in, taps, in]
    return _select(whole, {0: inputs, 2: inputs}).flatten(0, 1)
