"""The cut of a model and what belongs right before and behind it: implants, repair, optimizer, batch norms."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hap_hf.admission import NOT_ALIKE
from hap_hf.compensation import Compensation
from hap_hf.config import HapConfig
from hap_hf.discovery import check_equals_masked
from hap_hf.errors import BatchError
from hap_hf.evidence.evidence import Evidence
from hap_hf.host import BatchNorm
from hap_hf.model.change import TensorChange
from hap_hf.model.stale import note_replaced
from hap_hf.model.values import replace_values_
from hap_hf.names.bypass import Implants
from hap_hf.names.plan import GroupPlan, PruningPlan
from hap_hf.reconstruction import Repair, best_repair
from hap_hf.report import Clock, ModelSize, measure_size
from hap_hf.surgery import (
    ImplantInit,
    apply_plan_,
    carry_optimizer_state_,
    collect_input_moments,
    recalibrate_batch_norms_,
    renew_statistics_,
)

logger = logging.getLogger(__name__)


def around_cut(
    evidence: Evidence, config: HapConfig, stage: Sequence[GroupPlan], compensation: Compensation | None, clock: Clock
) -> tuple[Mapping[str, Any], Repair]:
    """Return what implants are fitted with, if they are not silent, and the weights that make up for what goes."""
    implanted = {t for g in stage if g.implanted for t in g.ranks}
    wanted = implanted if config.implant_init is ImplantInit.SVD else set()
    model, processes = evidence.model, evidence.processes
    moments: Mapping[str, Any] = {}
    if wanted:
        moments = collect_input_moments(model, wanted, list(evidence.inputs()), processes=processes)
    clock.lap("calibration")
    if not (config.reconstructs or config.compensates):
        return moments, Repair()
    measured = compensation if config.compensates else None
    silent = config.implant_init is ImplantInit.ZERO
    repair = best_repair(
        evidence,
        stage,
        measured,
        reconstruct=config.reconstructs,
        silent_implants=silent,
        look_beside=config.implants is Implants.AUTO,
    )
    clock.lap("repair")
    return moments, repair


def cut_(
    evidence: Evidence,
    config: HapConfig,
    plan: PruningPlan,
    repair: Repair,
    moments: Mapping[str, Any],
    optimizer: Optimizer | None,
    clock: Clock,
) -> ModelSize:
    """Cut the model and return its size; its plan is not recorded, and whoever calls this undoes it if it fails."""
    model, processes = evidence.model, evidence.processes
    # Before surgery: these values have the shapes of the dense model and are cut with everything else.
    changes: tuple[TensorChange, ...] = replace_values_(model, repair.values)
    note_replaced(changes)
    check_equals_masked(model, plan, evidence.example, evidence.others())
    changes += apply_plan_(model, plan, init=config.implant_init, input_moments=moments, bypass_values=repair.paths)
    # The same decomposition may differ in its last bits from one machine to the next.
    processes.adopt_first_("implants", [c.new for c in changes if c.old is None])
    clock.lap("surgery")
    if config.recalibrate:
        changes += _recalibrate(model, evidence, keep_outputs=repair.reconstructed)
        clock.lap("recalibration")
    if optimizer is not None:
        carry_optimizer_state_(optimizer, changes)
    size = measure_size(model, evidence.example)
    processes.check_same_tensors("weights after pruning", dict(model.named_parameters()), NOT_ALIKE)
    return size


def _recalibrate(model: nn.Module, evidence: Evidence, *, keep_outputs: bool) -> tuple[TensorChange, ...]:
    """Estimate the statistics of batch norms anew, or keep the old ones where the batches do not allow it."""
    if not any(isinstance(module, BatchNorm) for module in model.modules()):
        return ()
    # All of them first: finding out what a loss calls the model with runs it, and would be counted in.
    batches, processes = list(evidence.inputs()), evidence.processes
    try:
        with processes.agreeing("recalibration"):
            if keep_outputs:
                return renew_statistics_(model, batches, processes=processes)
            recalibrate_batch_norms_(model, batches, processes=processes)
    except BatchError as error:
        # The model is right without; statistics of an unfit batch would be worse than the old ones.
        logger.warning("batch norms keep the statistics from before pruning: %s", error)
    return ()
