"""Which repair the whole model is best with: reconstruction, compensation, or none."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from hap_hf.compensation import Compensation
from hap_hf.evidence.evidence import Evidence
from hap_hf.evidence.mean import mean_loss
from hap_hf.evidence.memory import in_batches_that_fit, is_out_of_memory
from hap_hf.evidence.processes import Processes
from hap_hf.model.masking import masked
from hap_hf.model.values import replaced_values
from hap_hf.names.actions import IMPLANT, PRUNE
from hap_hf.names.plan import GroupPlan
from hap_hf.reconstruction.implanted import implanted_rows
from hap_hf.reconstruction.walk import Walk

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Repair:
    """Weights that make up for units that go.

    Args:
        values: New values by name of the parameter, in the shapes of the dense model.
        reconstructed: Whether each layer was fitted to the statistics of batch norms as they are, which new ones
            would undo.
    """

    values: Mapping[str, Tensor] = field(default_factory=dict)
    reconstructed: bool = False


def best_repair(
    evidence: Evidence,
    stage: Sequence[GroupPlan],
    compensation: Compensation | None,
    *,
    reconstruct: bool,
    silent_implants: bool = False,
) -> Repair:
    """Return the weights that make up for pruned units, those with which the whole model loses least.

    Reconstruction is taken where the loss is lower with it than without any repair. Where it is not, as with few
    samples that say little about the others, the loss decides between weaker and weaker compensations, and nothing.

    Args:
        evidence: What to fit to, and to compute the loss on.
        stage: What happens to the units; not applied yet.
        compensation: What was measured for compensation; None to do without.
        reconstruct: Whether reconstruction is tried.
        silent_implants: Whether implants compute nothing at first, so that what stays makes up for those units, too.

    Returns:
        The repair.

    Raises:
        BatchError: If there are no batches, or they hold no loss terms.
    """
    gone = [(g.group, g.units(PRUNE) + (g.units(IMPLANT) if silent_implants else [])) for g in stage]

    def loss(values: Mapping[str, Tensor]) -> float:
        # The columns that read the units are as they were, so the units must be silent.
        with replaced_values(evidence.model, values), masked(evidence.model, gone):
            return in_batches_that_fit(mean_loss, evidence)

    if reconstruct:
        implanted = {} if silent_implants else implanted_rows(stage)
        walk, others = Walk(evidence, gone, implanted), dict[str, Tensor]()
        # Layers that are called several times have no one place at which they could be fitted.
        left = [] if compensation is None else [r for r in compensation.readers if r.path not in walk.layers]
        if compensation is not None and left:
            others = replace(compensation, readers=left).values(gone)
        values = _run(walk, others, evidence.processes)
        found, without = loss(values) if values else math.inf, loss({})
        logger.info("reconstruction of %d weights: loss %.4g, %.4g without any", len(values), found, without)
        if found < without:
            return Repair(values, reconstructed=True)
    return Repair({} if compensation is None else compensation.best_values(stage, evidence))


def _run(walk: Walk, others: Mapping[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Return what a walk finds; nothing where the activations of all batches do not fit into memory together."""
    try:
        return walk.run(others)
    except (RuntimeError, MemoryError) as error:
        # Other processes would wait for this one at the next layer.
        if not is_out_of_memory(error) or processes.size > 1:
            raise
        logger.warning("out of memory while layers were reconstructed; compensation stands in: give fewer batches")
        return {}
