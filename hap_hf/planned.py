"""Pruning a model as it was planned some time ago: here, or for another copy of it, whose plan was handed on."""

from dataclasses import replace

from torch import nn
from torch.optim import Optimizer

from hap_hf.admission import NOT_IN_STEP
from hap_hf.bypassing import with_given_bypasses
from hap_hf.checkpoint import check_recordable, record_plan
from hap_hf.compensation import Compensation
from hap_hf.config import HapConfig
from hap_hf.cut import around_cut, cut_
from hap_hf.discovery import check_equals_masked
from hap_hf.errors import PlanMismatchError
from hap_hf.evidence.evidence import Evidence
from hap_hf.evidence.mean import mean_loss
from hap_hf.model.bare import check_bare
from hap_hf.model.rollback import undone_on_error
from hap_hf.names.outcome import shapes_left
from hap_hf.names.plan import PruningPlan
from hap_hf.report import Clock, PruningReport, make_report, measure_size
from hap_hf.report.last import note_report
from hap_hf.selection import at_the_door
from hap_hf.surgery.check import stage_problems


def check_fits(model: nn.Module, plan: PruningPlan) -> None:
    """Check that a plan can be carried out on a model, now or after more training.

    Args:
        model: The model.
        plan: What shall be done to it. Of later stages it is checked that they continue the ones before.

    Raises:
        PlanMismatchError: If it cannot.
    """
    if not plan.stages:
        return
    problems = [*stage_problems(model, plan.stages[0], plan.bypasses[0]), *shapes_left(plan)[1]]
    if problems:
        raise PlanMismatchError(
            f"the plan does not fit this {type(model).__name__}: {'; '.join(problems[:3])}"
            f"{f'; and {len(problems) - 3} more' if len(problems) > 3 else ''}. It is that of a model with other "
            "layers or sizes, or goes on from one that was pruned before; give the plan of a model like this one"
        )


def check_planned(evidence: Evidence, config: HapConfig, plan: PruningPlan) -> None:
    """Raise what :func:`prune_by_plan` would raise before it changes anything, for those who prune later.

    Args:
        evidence: The model, and a few batches.
        config: The settings.
        plan: A plan of one stage.

    Raises:
        HapError: If the model, the loss or the plan do not allow it.
    """
    check_bare(evidence.model)
    check_recordable(evidence.model, plan)
    check_fits(evidence.model, plan)
    at_the_door(evidence, config)
    check_equals_masked(evidence.model, plan, evidence.example, evidence.others())


def prune_by_plan(
    evidence: Evidence,
    config: HapConfig,
    plan: PruningPlan,
    decided: PruningReport | None = None,
    optimizer: Optimizer | None = None,
) -> PruningReport:
    """Do to a model what a plan says, without scoring its units.

    Args:
        evidence: The model, and what to compensate, calibrate and compare its loss on.
        config: How it is done; the amount and what is excluded are not read.
        plan: A plan of one stage.
        decided: What is known of how it came about.
        optimizer: An optimizer of the model that shall go on.

    Returns:
        The report, with the loss right before and right after.

    Raises:
        PlanMismatchError: If the plan does not fit the model.
    """
    check_fits(evidence.model, plan)
    size = measure_size(evidence.model, evidence.example)
    known = decided or replace(make_report(plan, size, size), asked="what a given plan says")
    return prune_as_planned(evidence, config, replace(known, before=size, seconds={}), optimizer)


def prune_as_planned(
    evidence: Evidence, config: HapConfig, planned: PruningReport, optimizer: Optimizer | None = None
) -> PruningReport:
    """Do to a model what was planned for it earlier, since when its weights were trained.

    Args:
        evidence: The model, and what to compensate, calibrate and compare its loss on.
        config: The settings.
        planned: What :attr:`Decision.expected` said when it was planned.
        optimizer: An optimizer of the model that shall go on.

    Returns:
        The report, with the loss right before and right after.

    Raises:
        PlanMismatchError: If the plan does not fit the model.
    """
    model, clock, stage = evidence.model, Clock(planned.seconds), planned.plan.stages[0]
    with undone_on_error(model, optimizer), evidence.processes.agreeing("pruning"):
        check_bare(model)
        check_recordable(model, planned.plan)
        evidence.processes.check_same_tensors("weights before pruning", dict(model.named_parameters()), NOT_IN_STEP)
        evidence, config = at_the_door(evidence, config)
        before = mean_loss(evidence)
        compensation = None
        if config.compensates:
            # A plan from elsewhere may cut what these settings would leave whole.
            chosen = [g.group for g in stage if config.selects(g.group) or g.pruned]
            num_output_probes = getattr(config.criterion, "num_output_probes", 1)
            compensation = Compensation.measure(evidence, chosen, num_output_probes=num_output_probes)
            clock.lap("measuring")
        moments, repair = around_cut(evidence, config, stage, compensation, clock)
        if (given := planned.plan.bypasses[0]) and config.reconstructs:
            repair = with_given_bypasses(evidence, stage, given, repair, compensation)
            clock.lap("bypasses")
        after = cut_(evidence, config, planned.plan, repair, moments, optimizer, clock)
        loss = mean_loss(evidence)
        record_plan(model, planned.plan)
        report = replace(planned, after=after, seconds=clock.seconds, loss_before=before, loss_after=loss)
        note_report(model, report)
        return report
