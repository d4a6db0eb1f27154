"""Where a model keeps its plan, and models inside of models: a part that was pruned, a whole that is saved.

A model of transformers keeps its plan in its config, any other module in an attribute. A part has a plan of its own,
with the names that its tensors have inside of it. What was done to a part is done to the whole, and what was done to
the whole is done to its parts: so a whole takes in the plans of its parts when it is pruned or saved, and hands each
its share of its own.
"""

import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hap_hf.checkpoint.entry import QUANT_METHODS, HapPlanConfig
from hap_hf.checkpoint.headers import read_header
from hap_hf.checkpoint.host import forget_adapters_
from hap_hf.errors import ConfigError
from hap_hf.names.actions import IMPLANT, KEEP
from hap_hf.names.bits import BitPlan
from hap_hf.names.plan import GroupPlan, PruningPlan

_ATTRIBUTE = "pruned_by_hap_hf"
"""In which modules that have no config keep their plan."""


def plan_of(model: nn.Module | str | os.PathLike[str]) -> PruningPlan | None:
    """Return the plan that a model carries: one of transformers in its config, any other in an attribute.

    Args:
        model: Any model, or the folder or name of a checkpoint, of which no weights are read.

    Returns:
        Everything that was done to the model since it was dense, or None where nothing is recorded.

    Raises:
        ConfigError: If it is no model, or there is no such checkpoint.
        PlanFormatError: If the config carries something that is no plan.
    """
    if isinstance(model, (str, os.PathLike)):
        return read_header(model).plan
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"expected a model, or the folder or name of a checkpoint, got {type(model).__name__}; a pipeline has its "
            "model as pipe.model"
        )
    if not isinstance(model, PreTrainedModel):
        kept = vars(model).get(_ATTRIBUTE)
        if not isinstance(kept, PruningPlan) and callable(inner := getattr(model, "get_base_model", None)):
            return plan_of(inner())  # peft's wrapper around a model of transformers
        return kept if isinstance(kept, PruningPlan) else None
    entry = entry_of(model)
    if entry is None:
        return None
    plan: PruningPlan = entry.plan
    # A base model shares the config of the model around it, whose names begin with that of the base model.
    prefix, modules = model.base_model_prefix, {name for name, _ in model.named_modules()}
    owners = {s.tensor.rpartition(".")[0] for g in plan for s in g.group.slices}
    if prefix and owners.isdisjoint(modules) and any(n.removeprefix(f"{prefix}.") in modules for n in owners):
        return part_of_plan(plan, prefix)
    return plan


def entry_of(model: nn.Module) -> HapPlanConfig | None:
    """Return what the config of a model holds of pruning and quantizing, None where nothing is recorded."""
    slot = slot_of(model)
    if slot is None or method_of(slot) not in QUANT_METHODS:
        return None
    entry: HapPlanConfig = slot if isinstance(slot, HapPlanConfig) else HapPlanConfig.from_dict(slot)
    return entry


def bits_of(model: nn.Module) -> BitPlan | None:
    """Return the bits that the model's config carries.

    Args:
        model: Any model.

    Returns:
        Bits of its quantized layers, or None where nothing is recorded.
    """
    entry = entry_of(model)
    return None if entry is None else entry.bits


def whole_plan(model: nn.Module) -> PruningPlan | None:
    """Return the plan of a model with what was done to its parts since it was recorded.

    Args:
        model: Any model.

    Returns:
        The plan, or None where nothing was done.
    """
    plan = plan_of(model) or PruningPlan(())
    for prefix, part in parts_of(model):
        theirs = whole_plan(part)
        if theirs is not None:
            # What the whole knows came first: it hands the parts their share whenever it records a plan. A module
            # without a config that was loaded with the whole was handed none, and has only what came since.
            known = part_of_plan(plan, prefix).stages
            n = len(known) if theirs.stages[: len(known)] == known else 0
            plan = plan.then(theirs.since(n).renamed(f"{prefix}.".__add__))
    return plan if plan.stages else None


def store_plan_(model: nn.Module, plan: PruningPlan) -> None:
    """Record a plan on a model, and on each of its parts what the plan does to it.

    Args:
        model: The pruned model.
        plan: Everything that was done to it since it was dense.
    """
    if isinstance(model, PreTrainedModel):
        # A plan in a config that a dense model shares would make that one's checkpoints unreadable.
        give_own_config_(model)
        model.config.quantization_config = HapPlanConfig(plan).to_dict()
        forget_adapters_(model)
    else:
        setattr(model, _ATTRIBUTE, plan)
    share_with_parts_(model, plan)


def share_with_parts_(model: nn.Module, plan: PruningPlan) -> None:
    """Record on each part of a model what a plan does to it.

    Args:
        model: The pruned model.
        plan: Everything that was done to it since it was dense.
    """
    for prefix, part in parts_of(model):
        share = part_of_plan(plan, prefix)
        if share.stages and share != plan_of(part):
            store_plan_(part, share)
        elif not share.stages and isinstance(part, PreTrainedModel) and plan_of(part) is not None:
            # Models copy the config of the whole for their parts when they are built, plan and all.
            give_own_config_(part)
            del part.config.quantization_config
        if share.stages and isinstance(model, PreTrainedModel) and isinstance(part, PreTrainedModel):
            _put_inside_(model.config, part.config, prefix)


def _put_inside_(config: PreTrainedConfig, inner: PreTrainedConfig, prefix: str) -> None:
    """Let the config of a whole hold that of its part with the plan, as the part's class reads it from there."""

    def plain(c: PreTrainedConfig) -> dict[str, Any]:
        return {k: v for k, v in c.to_dict().items() if k != "quantization_config"}

    held = {k: v for k, v in vars(config).items() if type(v) is type(inner)}
    alike = [k for k, v in held.items() if v is inner or plain(v) == plain(inner)]
    # Two towers may have equal configs: vision_config is that of vision_model, encoder that of encoder.
    named = [k for k in alike if prefix.rpartition(".")[2].startswith(k.removesuffix("_config"))]
    if len(alike) == 1 or len(named) == 1:
        setattr(config, (named or alike)[0], inner)


def parts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost modules inside a model that keep a plan of their own.

    These are models of transformers with a config of their own, and whatever was pruned by itself.

    Args:
        model: Any model.

    Yields:
        The name of each, and the module.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        if not name or any(name.startswith(f"{outer}.") for outer in found):
            continue
        is_model = isinstance(module, PreTrainedModel) and module.config is not getattr(model, "config", None)
        if is_model or _ATTRIBUTE in vars(module):
            found.append(name)
            yield name, module


def part_of_plan(plan: PruningPlan, prefix: str) -> PruningPlan:
    """Return what a plan does to one module, with the names that tensors have inside of it.

    Args:
        plan: The plan of the model that holds the module.
        prefix: Name of the module.

    Returns:
        The stages that touch it. Of a group that lies in other modules too it has the slices inside.
    """
    stages, origins, paths = [], [], []
    for stage, origin, bypasses in zip(plan.stages, plan.provenance, plan.bypasses, strict=True):
        groups = tuple(inside for g in stage if (inside := _inside(g, f"{prefix}.")) is not None)
        # A block lies in a part or outside of it, and so does the path beside it.
        own = tuple(b.renamed(lambda n: n.removeprefix(f"{prefix}.")) for b in bypasses if b.is_inside(f"{prefix}."))
        if groups or own:
            stages.append(groups)
            origins.append(origin)
            paths.append(own)
    return PruningPlan(tuple(stages), tuple(origins), tuple(paths))


def _inside(g: GroupPlan, prefix: str) -> GroupPlan | None:
    """Return what a group's plan does to tensors whose names begin with a prefix; None for nothing."""
    slices = tuple(
        replace(s, tensor=s.tensor.removeprefix(prefix)) for s in g.group.slices if s.tensor.startswith(prefix)
    )
    if not slices:
        return None
    counters = tuple(
        replace(c, attribute=c.attribute.removeprefix(prefix))
        for c in g.group.counters
        if c.attribute.startswith(prefix)
    )
    ranks = {name.removeprefix(prefix): rank for name, rank in g.ranks.items() if name.startswith(prefix)}
    # Where the implants lie elsewhere, the units are ordinary ones here: as many, in an order that shapes do not tell.
    actions = g.actions if ranks else g.actions.replace(IMPLANT, KEEP)
    group = replace(g.group, name=g.group.name.removeprefix(prefix), slices=slices, counters=counters)
    return GroupPlan(group, actions, ranks)


def check_slot(model: nn.Module) -> None:
    """Check that nothing but a plan takes the one place where a model's config could carry one.

    Args:
        model: Any model; its parts are looked at, too.

    Raises:
        ConfigError: If something else does.
    """
    slot = slot_of(model)
    if slot is not None and method_of(slot) not in QUANT_METHODS:
        raise ConfigError(
            f"expected a model without quantization, got a {type(model).__name__} whose config.quantization_config has "
            f"quant_method {str(method_of(slot))!r}; a checkpoint has room for one, so prune first and quantize a copy"
        )
    if bits_of(model) is not None:
        raise ConfigError(
            f"expected a model without quantization, got a {type(model).__name__} that hap_hf quantized; prune first, "
            "then quantize"
        )
    for _, part in parts_of(model):
        check_slot(part)


def slot_of(model: nn.Module) -> Any:
    """Return the ``quantization_config`` of a model's config, None where there is none."""
    return getattr(getattr(model, "config", None), "quantization_config", None)


def method_of(slot: Any) -> object:
    """Return the method that such an entry names."""
    return slot.get("quant_method") if isinstance(slot, Mapping) else getattr(slot, "quant_method", None)


def give_own_config_(model: PreTrainedModel) -> None:
    """Give a model, and all that shares its config, a copy of it: transformers lets several models hold one object.

    Args:
        model: The model.
    """
    # The memo holds the copy of each object by the id of the original, also of parts of the config that submodules
    # hold.
    copied: dict[int, Any] = {}
    copy.deepcopy(model.config, copied)
    for module in model.modules():
        own = vars(module).get("config")
        if isinstance(own, PreTrainedConfig) and id(own) in copied:
            module.config = copied[id(own)]
