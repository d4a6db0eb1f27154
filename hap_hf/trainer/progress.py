"""What a checkpoint keeps of the rounds done, so that a resumed training goes on with the next one."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import Trainer, TrainerCallback, TrainerState

from hap_hf.checkpoint import plan_of
from hap_hf.checkpoint.record import check_described
from hap_hf.errors import ConfigError, PlanMismatchError
from hap_hf.names.plan import PruningPlan
from hap_hf.report import PruningReport

logger = logging.getLogger(__name__)


def progress_to_dict(reports: Iterable[PruningReport], start: float | None) -> dict[str, Any]:
    """Return the rounds done as plain JSON values.

    Args:
        reports: The report of each round.
        start: What could be pruned before the first round; None before it.

    Returns:
        The values.
    """
    return {"start": start, "reports": [report.to_dict(with_plan=True) for report in reports]}


def progress_from_dict(saved: Mapping[str, Any]) -> tuple[list[PruningReport], float | None]:
    """Return what :func:`progress_to_dict` was given.

    Args:
        saved: Values from a checkpoint or from ``HessianPruner.progress``.

    Returns:
        The report of each round, and what could be pruned before the first.
    """
    return [PruningReport.from_dict(values) for values in saved["reports"]], saved["start"]


def saved_progress(trainer: Trainer, callback: TrainerCallback, state: TrainerState) -> Mapping[str, Any] | None:
    """Return what the Trainer's state holds of the rounds of ``callback``.

    Args:
        trainer: The Trainer that calls the callback.
        callback: One of its callbacks.
        state: Its state, new or read from a checkpoint.

    Returns:
        What :func:`progress_to_dict` returned when it was saved, or None where nothing was.
    """
    # Of several callbacks of a class the Trainer saves a list in their order, without names.
    same = [c for c in trainer.callback_handler.callbacks if type(c) is type(callback)]
    entries = saved_entries(type(callback), len(same), state)
    position = same.index(callback)
    return entries[position] if position < len(entries) else None


def saved_entries(kind: type[TrainerCallback], count: int, state: TrainerState) -> list[Mapping[str, Any]]:
    """Return what the Trainer's state holds of all callbacks of one kind.

    Args:
        kind: Their class.
        count: How many there are.
        state: The Trainer's state.

    Returns:
        What was saved last, in the order of the callbacks.
    """
    by_kind: Any = state.stateful_callbacks
    saved = by_kind.get(kind.__name__, [])
    # Of several of a kind the Trainer keeps a list, to which it adds one each at every save.
    entries = saved[-count:] if isinstance(saved, list) else [saved]
    return [entry["attributes"]["progress"] for entry in entries]


def stages_of(reports: Iterable[PruningReport]) -> PruningPlan:
    """Return the plan that all rounds make together.

    Args:
        reports: The report of each round.

    Returns:
        Their plans, one after the other.
    """
    together = PruningPlan(())
    for report in reports:
        together = together.then(report.plan)
    return together


def is_result_of(reports: Sequence[PruningReport], model: nn.Module) -> bool:
    """Return whether ``model`` went through the rounds of ``reports``.

    Args:
        reports: The report of each round.
        model: The model that a training begins with.

    Returns:
        True if its recorded plan holds them, or, where none is recorded, if it has the shapes that they leave.
    """
    recorded, done = plan_of(model), stages_of(reports)
    if recorded is None:
        return is_described(model, done)
    # Stages are compared by value; the model may have been pruned before, in between or since.
    return all(stage in recorded.stages for stage in done.stages)


def is_described(model: nn.Module, plan: PruningPlan) -> bool:
    """Return whether every tensor of ``model`` has the shape that ``plan`` leaves it with.

    Args:
        model: Any model, dense or pruned.
        plan: What may have been done to it.

    Returns:
        True if all tensors that the plan names are there, in these shapes.
    """
    try:
        check_described(model, plan)
    except PlanMismatchError:
        return False
    return True


def check_given(before: Iterable[str], now: Iterable[str]) -> None:
    """Check that rounds go on with what no checkpoint carries.

    Args:
        before: What the rounds so far were done with, of ``batches`` and ``loss_fn``.
        now: What there is now.

    Raises:
        ConfigError: If something is missing.
    """
    lost = sorted(set(before) - set(now))
    if lost:
        raise ConfigError(
            f"the rounds so far were done with {' and '.join(lost)}, which no checkpoint carries: pass the same to "
            "HessianPruner again, and leave restore_callback_states_from_checkpoint at False, as it would make a "
            "callback without; HessianPruner goes on where it was anyway"
        )


def write_report(report: PruningReport, folder: Path, number: int | None) -> None:
    """Write the report of a round, and say in a line what it did: the Trainer's log is a dictionary of numbers.

    Args:
        report: The report.
        folder: The Trainer's output folder.
        number: Number of the round, under which it is written once more; None with one round.
    """
    tqdm.write(report.summary)
    try:
        report.save(folder)
        if number is not None:
            report.save(folder / f"pruning_round_{number}")
    except OSError as error:  # a full disk must not cost the training, and the log and checkpoints have it all
        logger.warning("the pruning report could not be written to %s: %s; it is in reports", folder, error)
