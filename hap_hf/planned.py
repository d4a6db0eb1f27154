"""Pruning a model as it was planned some time ago: units were chosen first, and shrunk since."""

from dataclasses import replace

from torch.optim import Optimizer

from hap_hf.admission import NOT_IN_STEP
from hap_hf.checkpoint import check_recordable, record_plan
from hap_hf.compensation import Compensation
from hap_hf.config import HapConfig
from hap_hf.cut import around_cut, cut_
from hap_hf.evidence.evidence import Evidence
from hap_hf.evidence.mean import mean_loss
from hap_hf.model.bare import check_bare
from hap_hf.model.rollback import undone_on_error
from hap_hf.report import Clock, PruningReport
from hap_hf.report.last import note_report
from hap_hf.selection import at_the_door


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
            chosen = [g.group for g in stage if config.selects(g.group)]
            num_output_probes = getattr(config.criterion, "num_output_probes", 1)
            compensation = Compensation.measure(evidence, chosen, num_output_probes=num_output_probes)
            clock.lap("measuring")
        moments, repair = around_cut(evidence, config, stage, compensation, clock)
        after = cut_(evidence, config, planned.plan, repair, moments, optimizer, clock)
        loss = mean_loss(evidence)
        record_plan(model, planned.plan)
        report = replace(planned, after=after, seconds=clock.seconds, loss_before=before, loss_after=loss)
        note_report(model, report)
        return report
