"""Resuming: the Trainer's model gets the structure of the checkpoint before its weights are loaded."""

import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import CONFIG_NAME

from hap_hf.card import let_trainer_add_card
from hap_hf.checkpoint import plan_of, record_bits, record_plan
from hap_hf.checkpoint.entry import QUANT_METHODS, HapPlanConfig
from hap_hf.errors import ConfigError
from hap_hf.model.quantizing import apply_bits_, quantized_layers
from hap_hf.model.rollback import undone_on_error
from hap_hf.names.bits import BitPlan
from hap_hf.names.plan import PruningPlan
from hap_hf.surgery import apply_plan_, carry_optimizer_state_
from hap_hf.surgery.calibration import ImplantInit
from hap_hf.trainer.host import wrap_loading_
from hap_hf.trainer.progress import is_described, progress_from_dict, saved_entries, stages_of

logger = logging.getLogger(__name__)


def rebuild_before_loading(trainer: Trainer, kind: type[TrainerCallback]) -> None:
    """Let ``trainer`` prune its model as the checkpoint's was, whenever it is about to load one to resume from.

    No event comes before the weights are loaded, and which checkpoint it will be is not known earlier. So the Trainer's
    method that loads it is wrapped, on this one Trainer.

    Args:
        trainer: The one Trainer to change.
        kind: The class of the callback whose rounds are in the checkpoint.
    """
    wrap_loading_(trainer, partial(_rebuild_and_load, trainer, kind))
    # Its other method that has to know of pruning, and there is no event for it either.
    let_trainer_add_card(trainer)


def _rebuild_and_load(
    trainer: Trainer,
    kind: type[TrainerCallback],
    load: Callable[..., None],
    resume_from_checkpoint: str,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Do the rounds that the Trainer's model lacks of the checkpoint's, then load the weights."""
    model, folder = cast(nn.Module, trainer.model), Path(resume_from_checkpoint)
    state = _read_state(folder)
    bits = _bits_in(folder, state, trainer)
    _check_bits(model, bits, folder)
    missing = _missing_rounds(model, _plan_in(folder, kind, state, trainer), folder)
    if missing.stages:
        if args or kwargs:  # a model that is already wrapped, as with FSDP, holds its parameters elsewhere
            raise ConfigError(
                f"{str(folder)!r} holds a pruned model, and the Trainer has wrapped its own, which can no longer be "
                f"pruned alike; make a new Trainer around the checkpoint's: {_loading(model, folder)}"
            )
        # accelerate wraps an optimizer, after a first training; before it, only one of the user's exists.
        _prune_alike(model, missing, getattr(trainer.optimizer, "optimizer", trainer.optimizer))
    if bits is not None and next(quantized_layers(model), None) is None:
        apply_bits_(model, bits)
        record_bits(model, bits)
    # Now shapes agree, and so does the optimizer's list of parameters, whose state is loaded by position.
    load(resume_from_checkpoint, *args, **kwargs)


def _prune_alike(model: nn.Module, missing: PruningPlan, optimizer: Optimizer | None) -> None:
    """Apply to the Trainer's model, and to its optimizer if there is one, what the checkpoint's went through."""
    before = sum(p.numel() for p in model.parameters())
    with undone_on_error(model, optimizer):
        changes = apply_plan_(model, missing, init=ImplantInit.ZERO)  # all weights are loaded in a moment
        if optimizer is not None:
            carry_optimizer_state_(optimizer, changes)
        record_plan(model, missing)
    after = sum(p.numel() for p in model.parameters())
    logger.info("pruned the model like the checkpoint's: %d -> %d parameters", before, after)


def _read_state(folder: Path) -> TrainerState:
    """Return the Trainer's state in a checkpoint.

    The Trainer writes it last, so without it the checkpoint is what a full disk or a kill left behind.

    Args:
        folder: A checkpoint of the Trainer.

    Returns:
        The state, with what the callbacks saved.

    Raises:
        ConfigError: If there is none, or half of one.
    """
    try:
        return cast(TrainerState, TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)))
    except (OSError, json.JSONDecodeError) as error:
        advice = "start anew"
        for other in sorted(folder.parent.glob("checkpoint-*"), key=lambda f: f.stat().st_mtime, reverse=True):
            if other != folder and _is_whole(other / TRAINER_STATE_NAME):
                advice = f"resume from a whole one: trainer.train(resume_from_checkpoint={str(other)!r})"
                break
        raise ConfigError(
            f"the checkpoint {str(folder)!r} is not complete: expected {TRAINER_STATE_NAME}, which is written last, "
            f"got {type(error).__name__}; was the training killed, or the disk full, while it was saved? Then {advice}"
        ) from error


def _is_whole(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _plan_in(folder: Path, kind: type[TrainerCallback], state: TrainerState, trainer: Trainer) -> PruningPlan:
    """Return what was done to the model of a checkpoint: its config says, or where it has none, the callback's state.

    Args:
        folder: A checkpoint of the Trainer.
        kind: The class of the callback.
        state: The Trainer's state in it.
        trainer: The Trainer that resumes.

    Returns:
        The plan, without stages for a dense model.
    """
    if isinstance(trainer.model, PreTrainedModel) and (folder / CONFIG_NAME).is_file():
        entry = _entry_in(folder)
        return PruningPlan(()) if entry is None else entry.plan
    count = sum(type(c) is kind for c in trainer.callback_handler.callbacks)
    entries = saved_entries(kind, count, state)
    return stages_of(report for entry in entries for report in progress_from_dict(entry)[0])


def _entry_in(folder: Path) -> HapPlanConfig | None:
    """Return what the config of a checkpoint says was done to its model."""
    slot = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")).get("quantization_config")
    if isinstance(slot, Mapping) and slot.get("quant_method") in QUANT_METHODS:
        entry: HapPlanConfig = HapPlanConfig.from_dict(slot)
        return entry
    return None


def _bits_in(folder: Path, state: TrainerState, trainer: Trainer) -> BitPlan | None:
    """Return the bits of the model of a checkpoint: its config says, or where it has none, a callback's state."""
    if isinstance(trainer.model, PreTrainedModel) and (folder / CONFIG_NAME).is_file():
        entry = _entry_in(folder)
        return None if entry is None else entry.bits
    by_kind: Any = state.stateful_callbacks
    saved = by_kind.get("QuantizeAware")
    bits = None if not isinstance(saved, Mapping) else saved["attributes"]["progress"]["bits"]
    return None if bits is None else BitPlan.from_dict(bits)


def _check_bits(model: nn.Module, bits: BitPlan | None, folder: Path) -> None:
    """Check that the Trainer's model is quantized like a checkpoint's, or not at all.

    Raises:
        ConfigError: If it is quantized otherwise.
    """
    own = {name: layer.bits for name, layer in quantized_layers(model)}
    if own and (bits is None or own != dict(bits.layers)):
        raise ConfigError(
            f"the Trainer's model is quantized, and {str(folder)!r} holds one that is "
            f"{'not' if bits is None else 'quantized otherwise'}; make a new Trainer around the checkpoint's: "
            f"{_loading(model, folder)}"
        )


def _missing_rounds(model: nn.Module, plan: PruningPlan, folder: Path) -> PruningPlan:
    """Return what ``plan`` does beyond what was done to ``model``.

    Args:
        model: The Trainer's model.
        plan: What was done to the checkpoint's.
        folder: The checkpoint, for messages.

    Returns:
        The stages that are left to do.

    Raises:
        ConfigError: If something else, or more, was done to the model.
    """
    own = plan_of(model)
    if not isinstance(model, PreTrainedModel) and is_described(model, plan):
        # Whoever loads another model by its state_dict records no plan: only shapes tell.
        own = plan
    done = () if own is None else own.stages
    if plan.stages[: len(done)] != done:
        raise ConfigError(
            f"{str(folder)!r} holds a model that was pruned {len(plan.stages)} times, and the Trainer's was pruned "
            f"{len(done)} times and otherwise, which cannot be taken back; make a new Trainer around the checkpoint's: "
            f"{_loading(model, folder)}"
        )
    return plan.since(len(done))


def _loading(model: nn.Module, folder: Path) -> str:
    return f"model = {type(model).__name__}.from_pretrained({str(folder)!r})"
