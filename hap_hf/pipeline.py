"""The two halves of pruning: decide looks and changes nothing, carry_out_ cuts. prune is the two in a row."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hap_hf.admission import NOT_ALIKE, admitted
from hap_hf.bypassing import with_bypasses
from hap_hf.checkpoint import check_recordable, record_plan
from hap_hf.config import HapConfig
from hap_hf.curvature import Watchable
from hap_hf.cut import around_cut, cut_
from hap_hf.decision import Decision, stamps_of
from hap_hf.errors import ConfigError
from hap_hf.evidence.evidence import Evidence
from hap_hf.evidence.guessing import loss_of_trained
from hap_hf.evidence.losses import LossFunction
from hap_hf.evidence.mean import mean_loss
from hap_hf.evidence.memory import in_batches_that_fit
from hap_hf.evidence.progress import job
from hap_hf.model.rollback import undone_on_error
from hap_hf.names.bypass import BypassPlan
from hap_hf.reconstruction import Repair
from hap_hf.report import Clock, PruningReport
from hap_hf.report.last import note_report
from hap_hf.selection import Round, at_the_door, measure_and_score, score_in_passes, select_groups
from hap_hf.selection.make import choose
from hap_hf.selection.passes import num_parts

logger = logging.getLogger(__name__)


def prune(
    model: nn.Module,
    batches: Iterable[Any],
    config: HapConfig | Mapping[str, Any],
    *,
    loss_fn: LossFunction | None = None,
    optimizer: Optimizer | None = None,
) -> PruningReport:
    """Prune ``model`` in place: score its units on ``batches``, remove and implant the least sensitive ones.

    After an error or Ctrl-C the model and the optimizer are as they were. For a ``PreTrainedModel`` the plan is
    recorded in its config, so that ``save_pretrained`` writes it and ``from_pretrained`` rebuilds the structure.

    Args:
        model: A trained model, neither wrapped, compiled nor quantized.
        batches: Keyword arguments of the model's forward with labels, as a Hugging Face collator gives them, pairs of
            inputs and labels, or inputs alone; with ``loss_fn`` whatever that takes. The first ``config.max_batches``
            are used.
        config: How much to prune and how; a mapping is read by ``HapConfig.from_dict``.
        loss_fn: Loss of a model on a batch as it came, a scalar; by default ``model(**batch).loss``, or the
            cross-entropy of what returns logits alone. Without labels units are scored by agreement with the dense
            model's own outputs.
        optimizer: An optimizer of the model that shall go on; its state follows the parameters. One that is made
            before and not passed here would train parameters that are no longer in the model, and raises at its next
            step.

    Returns:
        What was removed, what it cost and what it saved.

    Raises:
        BatchError: If there are no batches, or they hold no labels.
        ConfigError: If the settings ask for something impossible, or for nothing.
        CurvatureError: If a loss or a derivative is not finite, or does not depend on the weights.
        UnsupportedModelError: If the model cannot be analysed, or nothing in it can be removed.
    """
    config = config if isinstance(config, HapConfig) else HapConfig.from_dict(config)
    return prune_round(config.evidence(model, batches, loss_fn=loss_fn), config, Round(), optimizer)[0]


def prune_round(
    evidence: Evidence, config: HapConfig, place: Round, optimizer: Optimizer | None = None
) -> tuple[PruningReport, Round]:
    """Do one round of several; see :func:`prune`.

    Several processes with a copy of the model each prune it together: each has its own share of the batches, and all
    end with the same plan and the same weights, which is checked.

    Args:
        evidence: The model, and what to score on.
        config: The settings for all rounds together.
        place: Which round this is.
        optimizer: An optimizer of the model that shall go on.

    Returns:
        The report, and the round with what could be pruned before the first one.
    """
    # Inside out: all processes raise if one of them fails, and then each puts back its own model.
    with (
        undone_on_error(evidence.model, optimizer),
        evidence.processes.agreeing("pruning"),
        job("pruning", num_parts(config), shown=evidence.progress),
    ):
        decision = decide(evidence, config, place)
        return _carried_out(evidence.model, decision, optimizer), decision.place


def decide(evidence: Evidence, config: HapConfig, place: Round | None = None) -> Decision:
    """Decide what shall be done to a model, which is left as found.

    Args:
        evidence: The model, and what to score on; ``config.evidence(model, batches)`` makes it.
        config: How much to prune and how.
        place: Which of several rounds it is.

    Returns:
        The decision, for :func:`carry_out_`, for a look, or for another amount by :func:`decide_again`.

    Raises:
        BatchError: If there are no batches, or they hold no labels.
        ConfigError: If the settings ask for something impossible, or the evidence was made with others.
        CurvatureError: If a loss or a derivative is not finite, or does not depend on the weights.
        UnsupportedModelError: If the model cannot be analysed, or nothing in it can be removed.
    """
    with job("deciding", num_parts(config), shown=evidence.progress):
        return _decided(evidence, config, place or Round())


def _decided(evidence: Evidence, config: HapConfig, place: Round) -> Decision:
    """Return the decision; see :func:`decide`."""
    model, clock = evidence.model, Clock()
    ready = admitted(evidence, config, place, clock)
    evidence, config, found, chosen = ready.evidence, ready.config, ready.found, ready.chosen
    for entry in found.missing(config.kinds):
        logger.warning("no %s can be removed, left whole are %s", entry.kind, entry)
    # Other criteria may be given batches without labels.
    loss = loss_of_trained(evidence) if config.criterion.needs_batches else None
    clock.lap("loss")
    compensation, first, watchable = None, None, Watchable()
    # Before scoring: each pass silences the units of those before it, and what reads them makes up for it.
    if config.compensates:
        compensation, first = measure_and_score(evidence, chosen, config, watchable)
        clock.lap("measuring")
    scores = score_in_passes(
        evidence, found.groups, config, compensation=compensation, first=first, watchable=watchable
    )
    clock.lap("scoring")
    scored = stamps_of(model, dict.fromkeys(s.tensor for g in chosen for s in g.slices))
    draft = Decision(
        evidence, config, found, scores, (), 0.0, {}, {}, ready.size, ready.place, scored=scored, loss=loss
    )
    return _with_choice(replace(draft, compensation=compensation), config, clock)


def decide_again(decision: Decision, config: HapConfig) -> Decision:
    """Decide on another amount, or with other limits, without scoring again.

    Where units were chosen in passes, those that went in earlier passes still rank below all others, so that the plan
    may differ from that of scoring anew for the other amount. With one pass it is the same.

    Args:
        decision: What was decided before.
        config: Other settings; those of the criterion and of how to measure must be the same.

    Returns:
        The new decision.

    Raises:
        ConfigError: If the settings ask for other scores, or for something impossible.
    """
    config = at_the_door(decision.evidence, config)[1]
    if (config.criterion, config.passes) != (decision.config.criterion, decision.config.passes):
        raise ConfigError(
            f"the scores are those of {decision.config.criterion} in {decision.config.passes} passes, and the settings "
            f"ask for {config.criterion} in {config.passes}; decide(evidence, config) scores anew"
        )
    decision.evidence.check_made_with(config.precision, config.seed)
    decision.check_same_model()
    if config.compensates and decision.compensation is None:
        raise ConfigError(
            "the settings ask for compensation, and what it needs of the layers' inputs was not measured or not saved; "
            "set compensate=False, or decide(evidence, config) anew"
        )
    wanted = {g.name for g in select_groups(decision.discovery.groups, config)}
    if not wanted <= set(decision.scores.sensitivity):
        raise ConfigError("the settings select groups that were not scored; decide(evidence, config) scores anew")
    config = config.in_model(decision.discovery.groups, decision.before)
    return _with_choice(replace(decision, config=config), config, Clock())


def carry_out_(model: nn.Module, decision: Decision, *, optimizer: Optimizer | None = None) -> PruningReport:
    """Do to ``model`` what was decided, in place. After an error or Ctrl-C it is as it was, and so is the optimizer.

    Args:
        model: The model that the decision was made for, or a copy of it.
        decision: What :func:`decide` returned.
        optimizer: An optimizer of the model that shall go on; its state follows the parameters.

    Returns:
        What was removed, what it cost and what it saved.

    Raises:
        PlanMismatchError: If it is another model, or its weights have changed since.
    """
    with undone_on_error(model, optimizer), decision.evidence.processes.agreeing("pruning"):
        check_recordable(model)
        return _carried_out(model, decision, optimizer)


def _carried_out(model: nn.Module, decision: Decision, optimizer: Optimizer | None) -> PruningReport:
    """Cut the model as decided; whoever calls this puts everything back if it fails."""
    given, clock = decision.evidence, Clock(decision.seconds)
    evidence = given if model is given.model else replace(given, model=model)
    decision.check_fits(model)
    check_recordable(model, decision.plan)
    repair = Repair(decision.values, decision.reconstructed, paths=decision.paths)
    after = cut_(evidence, decision.config, decision.plan, repair, decision.moments, optimizer, clock)
    loss = None if decision.loss is None else in_batches_that_fit(mean_loss, evidence)
    clock.lap("loss after")
    report = decision.report(after, clock.seconds, loss)
    record_plan(model, decision.plan)  # comes last: with nothing behind it that could fail, it need not be undone
    note_report(model, report)
    return report


def _with_choice(draft: Decision, config: HapConfig, clock: Clock) -> Decision:
    """Return the decision with what follows from its scores."""
    evidence, choice = draft.evidence, choose(draft.discovery.groups, draft.scores, config)
    if isinstance(choice, str):
        raise ConfigError(choice)
    choice.log()
    actions = {g.group.name: (g.actions, g.ranks) for g in choice.stage}
    plain = {"threshold": choice.threshold, "round": draft.place, "actions": actions}
    evidence.processes.check_same("plan", plain, NOT_ALIKE)
    clock.lap("selection")
    moments, repair = around_cut(evidence, config, choice.stage, draft.compensation, clock)
    bypasses: tuple[BypassPlan, ...] = ()
    # In the last round only, so that no path is scored before it has been trained.
    if repair.gains and draft.place.number == draft.place.total:
        measured = draft.compensation if config.compensates else None
        found = with_bypasses(evidence, draft.discovery.groups, draft.scores, config, choice, repair, measured)
        if found is not None:
            choice, repair, bypasses = found.choice, found.repair, found.bypasses
        clock.lap("bypasses")
    return replace(
        draft,
        stage=choice.stage,
        threshold=choice.threshold,
        values=repair.values,
        moments=moments,
        stamps=stamps_of(evidence.model, repair.values),
        reconstructed=repair.reconstructed,
        bypasses=bypasses,
        paths=repair.paths,
        seconds={**draft.seconds, **clock.seconds},
    )
