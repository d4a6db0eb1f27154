"""Plans in ``config.json``: what lets ``save_pretrained`` write a pruned model that ``from_pretrained`` can read."""

import copy
import os
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hap_hf.checkpoint.host import forget_adapters_, prepare_at_saving
from hap_hf.checkpoint.loading import QUANT_METHODS, HapPlanConfig
from hap_hf.checkpoint.vanilla import stock_config
from hap_hf.errors import ConfigError, PlanMismatchError, UnsupportedModelError
from hap_hf.model.adapters import check_no_adapters
from hap_hf.model.quantizing import quantized_layers, saved_state
from hap_hf.names.bits import BitPlan
from hap_hf.names.outcome import shapes_left
from hap_hf.names.plan import PruningPlan


def record_plan(model: nn.Module, plan: PruningPlan) -> None:
    """Store ``plan``, which was just applied, in the model's config, so that ``save_pretrained`` writes it.

    A plan already there is kept and composed with the new one. Models that are no ``PreTrainedModel`` have no config
    that is saved with them; for those nothing is stored, and the caller keeps the plan.

    A model whose adapters were merged by hand may still be marked as one with adapters, of which ``save_pretrained``
    would write nothing but the adapters; the mark is taken off.

    Args:
        model: The pruned model.
        plan: What was done to it since the last recorded plan.

    Raises:
        ConfigError: If the config's ``quantization_config`` is taken by something else.
        PlanFormatError: If the composed plan is larger than a checkpoint may carry.
        PlanMismatchError: If the composed plan does not describe the model.
        UnsupportedModelError: If the model has adapters.
    """
    if not isinstance(model, PreTrainedModel):
        return
    composed = _compose(model, plan)
    check_described(model, composed)
    # A plan in a config that a dense model shares would make that one's checkpoints unreadable.
    _give_own_config_(model)
    model.config.quantization_config = HapPlanConfig(composed).to_dict()
    forget_adapters_(model)


def record_bits(model: nn.Module, bits: BitPlan) -> None:
    """Store in the model's config which of its layers are quantized, and what a file shall hold of their weights.

    Models that are no ``PreTrainedModel`` have no config that is saved with them; for those nothing is stored.

    Args:
        model: The quantized model.
        bits: Bits of its layers.
    """
    if not isinstance(model, PreTrainedModel):
        return
    plan = plan_of(model) or PruningPlan(())
    _give_own_config_(model)
    model.config.quantization_config = HapPlanConfig(plan, bits).to_dict()
    forget_adapters_(model)


def bits_of(model: nn.Module) -> BitPlan | None:
    """Return the bits that the model's config carries.

    Args:
        model: Any model.

    Returns:
        Bits of its quantized layers, or None where nothing is recorded.
    """
    entry = _entry_of(model)
    return None if entry is None else entry.bits


def _give_own_config_(model: PreTrainedModel) -> None:
    """Give a model, and all that shares its config, a copy of it: transformers lets several models hold one object."""
    # The memo holds the copy of each object by the id of the original, also of parts of the config that submodules
    # hold.
    copied: dict[int, Any] = {}
    copy.deepcopy(model.config, copied)
    for module in model.modules():
        own = vars(module).get("config")
        if isinstance(own, PreTrainedConfig) and id(own) in copied:
            module.config = copied[id(own)]


def check_recordable(model: nn.Module, plan: PruningPlan | None = None) -> None:
    """Check that ``plan`` can be recorded, before anything is done.

    Args:
        model: The model, pruned before or not.
        plan: What would be done to it next; nothing by default.

    Raises:
        ConfigError: If the config's ``quantization_config`` is taken by something else.
        PlanFormatError: If the composed plan is larger than a checkpoint may carry.
        PlanMismatchError: If the model is not what the plan recorded so far describes.
        UnsupportedModelError: If the model has adapters, whose layers have other names than the plan's.
    """
    _compose(model, plan or PruningPlan(()))
    before = plan_of(model)
    if before is not None:
        check_described(model, before)


def plan_of(model: nn.Module) -> PruningPlan | None:
    """Return the plan that the model's config carries.

    Args:
        model: Any model.

    Returns:
        Everything that was done to the model since it was dense, or None where nothing is recorded.

    Raises:
        PlanFormatError: If the config carries something that is no plan.
    """
    entry = _entry_of(model)
    return None if entry is None else entry.plan


def _entry_of(model: nn.Module) -> HapPlanConfig | None:
    slot = _slot_of(model)
    if slot is None or _method_of(slot) not in QUANT_METHODS:
        return None
    entry: HapPlanConfig = slot if isinstance(slot, HapPlanConfig) else HapPlanConfig.from_dict(slot)
    return entry


def save_pruned(
    model: nn.Module, directory: str | os.PathLike[str], *, vanilla: bool = False, **save_pretrained_kwargs: Any
) -> None:
    """Save a pruned model as ``model.save_pretrained`` does, or as a plain checkpoint that needs no hap_hf.

    A plain checkpoint is possible where there are no implants and every layer has as many heads and neurons as every
    other, if the config has settings for these numbers: most have one for the width of the FFN; heads can be fewer
    where the model reads a ``head_dim`` and does not compute it from their number. What a config can do is found out by
    building an empty model of it. The model in memory, its config included, stays as it is.

    Args:
        model: The pruned model.
        directory: Where to save.
        vanilla: Save a plain checkpoint.
        **save_pretrained_kwargs: Passed on.

    Raises:
        UnsupportedModelError: If the model has no ``save_pretrained`` of transformers, or adapters, which that would
            save alone.
        ConfigError: If no plan is recorded, or if no stock config expresses the pruned shapes; the message says why.
    """
    check_no_adapters(model)
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"expected a transformers PreTrainedModel, got {type(model).__name__}; save its state_dict and the plan"
        )
    plan = plan_of(model)
    if plan is None:
        raise ConfigError(
            f"this {type(model).__name__} carries no plan, so it was not pruned by hap_hf; call model.save_pretrained"
        )
    if not vanilla:
        model.save_pretrained(directory, **save_pretrained_kwargs)
        return
    if bits_of(model) is not None:
        raise ConfigError(
            "a plain checkpoint cannot hold the bits of a quantized model; save with vanilla=False, or hap_hf.export it"
        )
    # save_pretrained writes whatever config the model has at that moment.
    stock, own = stock_config(model, plan), model.config
    model.config = stock
    try:
        model.save_pretrained(directory, **save_pretrained_kwargs)
    finally:
        model.config = own


def _to_be_saved(model: PreTrainedModel, state_dict: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return the weights of a model that is about to be saved as its file holds them, after checking them.

    A dense model that was built from the config of a pruned one carries a plan that it never went through, and its
    checkpoint could not be read again.

    Args:
        model: A model that is about to be saved, pruned or not.
        state_dict: The weights that are saved in place of its own, if any.

    Returns:
        The weights in the place of its own or the given ones; of a quantized model codes and scales.

    Raises:
        PlanMismatchError: If a weight has another shape than the plan leaves it with, or the layers are others than
            those that the config names as quantized.
    """
    entry = _entry_of(model)
    if getattr(model, "hf_quantizer", None) is not None:
        return state_dict
    recorded, own = set(entry.bits.layers if entry and entry.bits else ()), dict(quantized_layers(model))
    if recorded != own.keys():
        raise PlanMismatchError(
            f"{len(own)} layers of this {type(model).__name__} are quantized, and its config names {len(recorded)}: "
            f"{min(recorded ^ own.keys())} is in one of both alone, and it could not be loaded again; quantize it with "
            "hap_hf.quantize_, or take the entry off a float model: del model.config.quantization_config"
        )
    if entry is None:
        return state_dict
    plan = entry.plan
    # Only shapes are compared, at every save: that the stages fit each other was checked when they were recorded.
    left, _ = shapes_left(plan.stages)
    saved = dict(model.state_dict() if state_dict is None else state_dict)
    shapes = {name: tuple(saved[name].shape) for name in left if name in saved}
    wrong = [name for name, shape in shapes.items() if shape != left[name]]
    if wrong:
        raise PlanMismatchError(
            f"the config of this {type(model).__name__} carries the plan of a pruned model, and {len(wrong)} of its "
            f"weights are others: {wrong[0]} has shape {list(shapes[wrong[0]])}, the plan leaves "
            f"{list(left[wrong[0]])}; it could not be loaded again. For a dense model take the plan off: "
            "del model.config.quantization_config"
        )
    return state_dict if entry.bits is None else saved_state(model, saved, entry.bits.stored)


prepare_at_saving(_to_be_saved)


def _compose(model: nn.Module, plan: PruningPlan) -> PruningPlan:
    """Return the plan recorded so far followed by ``plan``.

    Args:
        model: The model, pruned before or not; without adapters.
        plan: The next stages.

    Returns:
        The composed plan.

    Raises:
        ConfigError: If the config's ``quantization_config`` is taken by something else.
    """
    check_no_adapters(model)
    slot = _slot_of(model)
    if slot is not None and _method_of(slot) not in QUANT_METHODS:
        raise ConfigError(
            f"expected a model without quantization, got a {type(model).__name__} whose config.quantization_config has "
            f"quant_method {str(_method_of(slot))!r}; a checkpoint has room for one, so prune first and quantize a copy"
        )
    if bits_of(model) is not None:
        raise ConfigError(
            f"expected a model without quantization, got a {type(model).__name__} that hap_hf quantized; prune first, "
            "then quantize"
        )
    before = plan_of(model)
    # The stages of `plan` name tensors as the recorded ones left them, so they come behind.
    composed = plan if before is None else before.then(plan)
    return PruningPlan.from_dict(composed.to_dict())  # what could not be read back must not be written


def check_described(model: nn.Module, plan: PruningPlan) -> None:
    """Check that every tensor has the shape that ``plan`` leaves it with.

    Args:
        model: The model, after everything in ``plan``.
        plan: Everything that was done to it since it was dense.

    Raises:
        PlanMismatchError: If one has not, or if a stage expects other shapes than the one before left.
    """
    left, wrong = shapes_left(plan.stages)
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for name, shape in left.items():
        got = tuple(tensors[name].shape) if name in tensors else None
        if got != shape:
            wrong.append(f"{name}: expected shape {list(shape)}, got {None if got is None else list(got)}")
    if wrong:
        raise PlanMismatchError(
            f"the recorded plan does not describe this {type(model).__name__}; record a plan right after applying it, "
            "and build new models from a config without the quantization_config of a pruned one:\n  "
            + "\n  ".join(wrong[:3])
            + (f"\n  and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        )


def _slot_of(model: nn.Module) -> Any:
    return getattr(getattr(model, "config", None), "quantization_config", None)


def _method_of(slot: Any) -> object:
    return slot.get("quant_method") if isinstance(slot, Mapping) else getattr(slot, "quant_method", None)
