"""Plans in ``config.json``: what lets ``save_pretrained`` write a pruned model that ``from_pretrained`` can read."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hap_hf.checkpoint.entry import HapPlanConfig
from hap_hf.checkpoint.host import forget_adapters_, prepare_at_saving
from hap_hf.checkpoint.parts import bits_of, check_slot, entry_of, give_own_config_, plan_of, store_plan_, whole_plan
from hap_hf.checkpoint.plain import save_plain
from hap_hf.checkpoint.vanilla import stock_config
from hap_hf.errors import ConfigError, PlanMismatchError, UnsupportedModelError
from hap_hf.model.adapters import check_no_adapters
from hap_hf.model.quantizing import quantized_layers, saved_state
from hap_hf.names.bits import BitPlan
from hap_hf.names.outcome import shapes_left
from hap_hf.names.plan import PruningPlan

logger = logging.getLogger(__name__)

_AS_PLAIN: list[nn.Module] = []
"""Models that are being saved with a stock config, which takes in no plans of their parts."""


def record_plan(model: nn.Module, plan: PruningPlan) -> None:
    """Store ``plan``, which was just applied, with the model: in its config, so that ``save_pretrained`` writes it.

    A plan already there is kept and composed with the new one. A module that is no ``PreTrainedModel`` keeps it in an
    attribute, for :func:`save_pruned`. Models of transformers inside the model get their share, so that each can be
    saved and loaded alone.

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
    composed = _compose(model, plan)
    if not isinstance(model, PreTrainedModel) and not _describes(composed, model):
        # Changed by hand since an earlier pruning, as by another head: what came before describes nothing any more.
        composed = plan
    check_described(model, composed)
    store_plan_(model, composed)


def record_bits(model: nn.Module, bits: BitPlan) -> None:
    """Store in the model's config which of its layers are quantized, and what a file shall hold of their weights.

    Models that are no ``PreTrainedModel`` have no config that is saved with them; for those nothing is stored.

    Args:
        model: The quantized model.
        bits: Bits of its layers.
    """
    if not isinstance(model, PreTrainedModel):
        return
    plan = whole_plan(model) or PruningPlan(())
    give_own_config_(model)
    model.config.quantization_config = HapPlanConfig(plan, bits).to_dict()
    forget_adapters_(model)


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
    before = whole_plan(model)
    if before is None or _describes(before, model):
        return
    if isinstance(model, PreTrainedModel):
        check_described(model, before)
    logger.warning(
        "%s has other shapes than earlier pruning left it with, so that only what is pruned from now on is recorded",
        type(model).__name__,
    )


def save_pruned(
    model: nn.Module, directory: str | os.PathLike[str], *, vanilla: bool = False, **save_pretrained_kwargs: Any
) -> None:
    """Save a pruned model as ``model.save_pretrained`` does, or as a plain checkpoint that needs no hap_hf.

    A module that is no model of transformers is saved to ``model.safetensors`` and ``plan.json``, which
    :func:`load_pruned_` reads.

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
        UnsupportedModelError: If the model has adapters, which ``save_pretrained`` would save alone, or is none of
            transformers and a plain checkpoint is asked for.
        PlanMismatchError: If the plan does not describe the model.
        ConfigError: If no plan is recorded, or if no stock config expresses the pruned shapes; the message says why.
    """
    check_no_adapters(model)
    plan = whole_plan(model)
    if plan is None:
        raise ConfigError(
            f"this {type(model).__name__} carries no plan, so it was not pruned by hap_hf; call "
            f"{'model.save_pretrained' if isinstance(model, PreTrainedModel) else 'safetensors.torch.save_model'}"
        )
    if not isinstance(model, PreTrainedModel):
        if vanilla or save_pretrained_kwargs:
            raise UnsupportedModelError(
                f"vanilla and arguments of save_pretrained are for models of transformers, got a {type(model).__name__}"
            )
        check_described(model, plan)
        if any(quantized_layers(model)):
            raise UnsupportedModelError(
                f"expected a {type(model).__name__} without quantized layers; save it before hap_hf.quantize_"
            )
        save_plain(model, plan, Path(directory))
        return
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
    _AS_PLAIN.append(model)
    try:
        model.save_pretrained(directory, **save_pretrained_kwargs)
    finally:
        _AS_PLAIN.pop()
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
    if getattr(model, "hf_quantizer", None) is not None or any(m is model for m in _AS_PLAIN):
        return state_dict
    entry = entry_of(model)
    recorded, own = set(entry.bits.layers if entry and entry.bits else ()), dict(quantized_layers(model))
    if recorded != own.keys():
        raise PlanMismatchError(
            f"{len(own)} layers of this {type(model).__name__} are quantized, and its config names {len(recorded)}: "
            f"{min(recorded ^ own.keys())} is in one of both alone, and it could not be loaded again; quantize it with "
            "hap_hf.quantize_, or take the entry off a float model: del model.config.quantization_config"
        )
    plan = whole_plan(model)
    # What was pruned since as a part is written with the whole.
    if plan is not None and plan != plan_of(model):
        check_slot(model)
        check_described(model, plan)
        store_plan_(model, plan)
        entry = entry_of(model)
    if entry is None:
        return state_dict
    plan = plan_of(model) or PruningPlan(())
    # Only shapes are compared, at every save: that the stages fit each other was checked when they were recorded.
    left, _ = shapes_left(plan)
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
    check_slot(model)
    before = whole_plan(model)
    # The stages of `plan` name tensors as the recorded ones left them, so they come behind.
    composed = plan if before is None else before.then(plan)
    return PruningPlan.from_dict(composed.to_dict())  # what could not be read back must not be written


def _describes(plan: PruningPlan, model: nn.Module) -> bool:
    """Return whether every tensor has the shape that a plan leaves it with."""
    try:
        check_described(model, plan)
    except PlanMismatchError:
        return False
    return True


def check_described(model: nn.Module, plan: PruningPlan) -> None:
    """Check that every tensor has the shape that ``plan`` leaves it with.

    Args:
        model: The model, after everything in ``plan``.
        plan: Everything that was done to it since it was dense.

    Raises:
        PlanMismatchError: If one has not, or if a stage expects other shapes than the one before left.
    """
    left, wrong = shapes_left(plan)
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
