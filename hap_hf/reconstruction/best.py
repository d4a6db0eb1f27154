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
from hap_hf.names.bypass import BypassPlan
from hap_hf.names.plan import GroupPlan
from hap_hf.reconstruction.blocks import Block, PathGains, blocks
from hap_hf.reconstruction.implanted import implanted_rows
from hap_hf.reconstruction.stations import fitted_layers
from hap_hf.reconstruction.walk import Walk
from hap_hf.surgery import bypassed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Repair:
    """Weights that make up for units that go.

    Args:
        values: New values by name of the parameter, in the shapes of the dense model.
        reconstructed: Whether each layer was fitted to the statistics of batch norms as they are, which new ones
            would undo.
        loss: Mean loss of the whole model with them; None where it was not looked at.
        paths: Weights of bypasses by name, with the inputs and outputs of the dense model.
        bypasses: The bypasses, likewise.
        gains: What bypasses would win beside the blocks.
    """

    values: Mapping[str, Tensor] = field(default_factory=dict)
    reconstructed: bool = False
    loss: float | None = None
    paths: Mapping[str, Tensor] = field(default_factory=dict)
    bypasses: tuple[BypassPlan, ...] = ()
    gains: tuple[PathGains, ...] = ()


def best_repair(
    evidence: Evidence,
    stage: Sequence[GroupPlan],
    compensation: Compensation | None,
    *,
    reconstruct: bool,
    silent_implants: bool = False,
    look_beside: bool = False,
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
        look_beside: Whether to find out what bypasses would win.

    Returns:
        The repair.

    Raises:
        BatchError: If there are no batches, or they hold no loss terms.
    """
    if reconstruct:
        fitting = _Fitting(evidence, stage, compensation, silent_implants)
        walk, values = fitting.run(fitting.blocks() if look_beside else {}, None)
        found, without = fitting.loss(values) if values else math.inf, fitting.loss({})
        logger.info("reconstruction of %d weights: loss %.4g, %.4g without any", len(values), found, without)
        if found < without:
            return Repair(values, reconstructed=True, loss=found, gains=tuple(walk.gains))
    return Repair({} if compensation is None else compensation.best_values(stage, evidence))


def bypassed_repair(
    evidence: Evidence, stage: Sequence[GroupPlan], compensation: Compensation | None, ranks: Mapping[str, int]
) -> Repair:
    """Return the weights that make up for pruned units together with low-rank paths beside blocks.

    Args:
        evidence: What to fit to, and to compute the loss on.
        stage: What happens to the units; not applied yet.
        compensation: What was measured for compensation; None to do without.
        ranks: Of the paths, by the name of the last layer of the block.

    Returns:
        The repair; without bypasses where there is no room in memory for it.
    """
    fitting = _Fitting(evidence, stage, compensation, silent_implants=False)
    walk, values = fitting.run(found := fitting.blocks(), ranks)
    if not walk.paths:
        return Repair()
    plans = tuple(found[name].path(evidence.model, len(down)) for name, (down, _) in walk.paths.items())
    weights = {
        leaf: w.view(shape)
        for plan in plans
        for (leaf, shape), w in zip(plan.shapes.items(), walk.paths[plan.exit], strict=True)
    }
    return Repair(values, True, fitting.loss(values, plans, weights), weights, plans)


class _Fitting:
    """The layers of a model and what is fitted to them, in one way or another.

    Args:
        evidence: What to fit to, and to compute the loss on.
        stage: What happens to the units.
        compensation: For layers that cannot be fitted one by one; None to leave them as they are.
        silent_implants: Whether implants compute nothing at first.
    """

    def __init__(
        self,
        evidence: Evidence,
        stage: Sequence[GroupPlan],
        compensation: Compensation | None,
        silent_implants: bool,
    ) -> None:
        self._evidence, self._stage, self._compensation = evidence, stage, compensation
        self._gone = [(g.group, g.units(PRUNE) + (g.units(IMPLANT) if silent_implants else [])) for g in stage]
        self._implanted = {} if silent_implants else implanted_rows(stage)

    def blocks(self) -> dict[str, Block]:
        """Return the blocks that paths may lie beside."""
        return blocks(self._evidence, self._stage, fitted_layers(self._evidence.model))

    def run(self, beside: Mapping[str, Block], ranks: Mapping[str, int] | None) -> tuple[Walk, dict[str, Tensor]]:
        """Return a walk that was gone, and the values that it found."""
        walk = Walk(self._evidence, self._gone, self._implanted, beside, ranks)
        compensation, others = self._compensation, dict[str, Tensor]()
        # Layers that are called several times have no one place at which they could be fitted.
        left = [] if compensation is None else [r for r in compensation.readers if r.path not in walk.layers]
        if compensation is not None and left:
            others = replace(compensation, readers=left).values(self._gone)
        return walk, _run(walk, others, self._evidence.processes)

    def loss(
        self,
        values: Mapping[str, Tensor],
        paths: Sequence[BypassPlan] = (),
        weights: Mapping[str, Tensor] | None = None,
    ) -> float:
        """Return the mean loss of the whole model with some values."""
        model = self._evidence.model
        # The columns that read the units are as they were, so the units must be silent.
        with replaced_values(model, values), masked(model, self._gone), bypassed(model, paths, weights or {}):
            return in_batches_that_fit(mean_loss, self._evidence)


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
