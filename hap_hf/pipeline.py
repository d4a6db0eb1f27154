"""The stages in order: find, measure, score, plan, compensate, apply, recalibrate, report, record."""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hap_hf.checkpoint import check_recordable, record_plan
from hap_hf.compensation import Compensation
from hap_hf.config import HapConfig, ImplantInit
from hap_hf.discovery import find_groups
from hap_hf.errors import BatchError
from hap_hf.evidence.batches import as_mapping
from hap_hf.evidence.losses import LossFunction
from hap_hf.evidence.processes import ALONE, Processes
from hap_hf.model.change import TensorChange
from hap_hf.model.rollback import undone_on_error
from hap_hf.names.plan import IMPLANT
from hap_hf.report import PruningReport, make_report, measure_size
from hap_hf.selection import make_plan, score_in_passes, select_groups
from hap_hf.selection.rounds import Amounts, config_of_round
from hap_hf.surgery import apply_plan_, carry_optimizer_state_, collect_input_moments, recalibrate_batch_norms_

logger = logging.getLogger(__name__)

_NOT_IN_STEP = "load the same checkpoint in every process, and let nothing but the Trainer change its weights"
_NOT_ALIKE = "start every process with the same script, settings and data, on machines of the same kind"


@dataclass(frozen=True)
class Round:
    """One of several rounds.

    Args:
        number: Number of the round, from 1.
        total: Number of rounds.
        start: What could be pruned before the first round; None in the first.
    """

    number: int = 1
    total: int = 1
    start: Amounts | None = None


@dataclass(frozen=True)
class RoundResult:
    """What one round did.

    Args:
        report: What it cost and saved.
        start: What could be pruned before the first round.
    """

    report: PruningReport
    start: Amounts


def prune(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    config: HapConfig,
    *,
    loss_fn: LossFunction | None = None,
    optimizer: Optimizer | None = None,
) -> PruningReport:
    """Prune ``model`` in place: score its units on ``batches``, remove and implant the least sensitive ones.

    After an error or Ctrl-C the model and the optimizer are as they were. For a ``PreTrainedModel`` the plan is
    recorded in its config, so that ``save_pretrained`` writes it and ``from_pretrained`` rebuilds the structure.

    Args:
        model: A trained model, neither wrapped, compiled nor quantized.
        batches: Keyword arguments of the model's forward with labels, as a Hugging Face collator gives them, or pairs
            of inputs and labels; the first ``config.max_batches`` are used.
        config: How much to prune and how.
        loss_fn: Loss of a model on a batch, a scalar; by default ``model(**batch).loss``, or the cross-entropy of what
            returns logits alone.
        optimizer: An optimizer of the model that shall go on; its state follows the parameters.

    Returns:
        What was removed, what it cost and what it saved.

    Raises:
        BatchError: If there are no batches, or they hold no labels.
        ConfigError: If the settings ask for something impossible, or for nothing.
        CurvatureError: If a loss or a derivative is not finite, or does not depend on the weights.
        UnsupportedModelError: If the model cannot be analysed, or nothing in it can be removed.
    """
    return prune_round(model, batches, config, Round(), loss_fn=loss_fn, optimizer=optimizer).report


def prune_round(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    config: HapConfig,
    place: Round,
    *,
    loss_fn: LossFunction | None = None,
    optimizer: Optimizer | None = None,
    processes: Processes = ALONE,
) -> RoundResult:
    """Do one round of several; see :func:`prune`.

    Several processes with a copy of the model each prune it together: each is given its own share of the batches, and
    all end with the same plan and the same weights, which is checked.

    Args:
        model: The model.
        batches: Batches with labels.
        config: The settings for all rounds together.
        place: Which round this is.
        loss_fn: Loss of a model on a batch.
        optimizer: An optimizer of the model that shall go on.
        processes: The processes that prune together; ``batches`` are the share of this one.

    Returns:
        The report, and what the next round needs to know.
    """
    with undone_on_error(model, optimizer), processes.agreeing("pruning"):
        return _whole_round(model, batches, config, place, loss_fn, optimizer, processes)


def _whole_round(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    config: HapConfig,
    place: Round,
    loss_fn: LossFunction | None,
    optimizer: Optimizer | None,
    processes: Processes,
) -> RoundResult:
    check_recordable(model)
    used = [as_mapping(model, batch) for batch in islice(batches, config.max_batches)]
    processes.check_same_tensors("weights before pruning", dict(model.named_parameters()), _NOT_IN_STEP)
    example = processes.first("example", used[0] if used else None)
    if example is None:
        raise BatchError("expected at least one batch to score on, got none; pass batches with labels")
    clock = Clock()
    groups = find_groups(model, example)
    processes.check_same("groups", {g.name: g for g in groups}, _NOT_ALIKE)
    start = place.start or Amounts.of(select_groups(groups, config))
    now = config_of_round(config, place.number, place.total, start, Amounts.of(select_groups(groups, config)))
    before = measure_size(model, example)
    clock.lap("discovery")
    compensation = None
    if now.compensates:
        chosen = select_groups(groups, now)
        compensation = Compensation.measure(model, chosen, used, now, loss_fn=loss_fn, processes=processes)
        clock.lap("measuring")
    scores = score_in_passes(model, groups, used, now, loss_fn=loss_fn, compensation=compensation, processes=processes)
    clock.lap("scoring")
    plan = make_plan(groups, scores, now)
    plan = replace(plan, provenance={**plan.provenance, **_place(place, start)})
    processes.check_same("plan", {**plan.provenance, **{g.group.name: (g.actions, g.ranks) for g in plan}}, _NOT_ALIKE)
    clock.lap("selection")
    implanted = {t for g in plan if IMPLANT in g.actions for t in g.ranks}
    wanted = implanted if now.implant_init is ImplantInit.SVD else set()
    moments = collect_input_moments(model, wanted, used, processes=processes) if wanted else {}
    clock.lap("calibration")
    check_recordable(model, plan)
    changes: tuple[TensorChange, ...] = ()
    if compensation is not None:
        changes = compensation.apply_best_(plan, used, now, loss_fn=loss_fn)
        clock.lap("compensation")
    changes += apply_plan_(model, plan, init=now.implant_init, input_moments=moments)
    # The same decomposition may differ in its last bits from one machine to the next.
    processes.adopt_first_("implants", [c.new for c in changes if c.old is None])
    if optimizer is not None:
        carry_optimizer_state_(optimizer, changes)
    clock.lap("surgery")
    if now.recalibrate:
        _recalibrate(model, used, processes)
        clock.lap("recalibration")
    after = measure_size(model, example)
    report = make_report(plan, scores, before, after, clock.seconds)
    processes.check_same_tensors("weights after pruning", dict(model.named_parameters()), _NOT_ALIKE)
    record_plan(model, plan)  # comes last: with nothing behind it that could fail, it need not be undone
    return RoundResult(report, start)


def _recalibrate(model: nn.Module, batches: Sequence[Mapping[str, Any]], processes: Processes) -> None:
    try:
        with processes.agreeing("recalibration"):
            recalibrate_batch_norms_(model, batches, processes=processes)
    except BatchError as error:
        # The model is right without; statistics of an unfit batch would be worse than the old ones.
        logger.warning("batch norms keep the statistics from before pruning: %s", error)


def _place(place: Round, start: Amounts) -> dict[str, int | float]:
    """Return what a resumed training needs to go on with the next round."""
    return {
        "round": place.number,
        "num_rounds": place.total,
        "start_units": start.units,
        "start_params": start.params,
        "start_macs": start.macs,
    }


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Book the time since the last lap under ``stage``.

        Args:
            stage: Name of the stage that just ended.
        """
        now = time.perf_counter()
        self.seconds[stage] = now - self._last
        self._last = now
