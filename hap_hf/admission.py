"""Everything that is known of a model and a loss before anything is scored, and can be refused by then."""

from hap_hf.checkpoint import check_recordable
from hap_hf.config import HapConfig
from hap_hf.discovery import Discovery, discover
from hap_hf.evidence.evidence import Evidence
from hap_hf.model.bare import check_bare
from hap_hf.names.group import Group
from hap_hf.report import Clock
from hap_hf.selection import at_the_door, select_groups

NOT_IN_STEP = "load the same checkpoint in every process, and let nothing but the Trainer change its weights"
NOT_ALIKE = "start every process with the same script, settings and data, on machines of the same kind"
"""What to do where processes do not agree."""


def check_prunable(evidence: Evidence, config: HapConfig) -> None:
    """Raise what pruning would raise before it scores, for those who prune later.

    Args:
        evidence: The model, and a few batches.
        config: How much to prune and how.

    Raises:
        HapError: As for :func:`~hap_hf.pipeline.decide`.
    """
    admitted(evidence, config, Clock())


def admitted(
    evidence: Evidence, config: HapConfig, clock: Clock
) -> tuple[Evidence, HapConfig, Discovery, tuple[Group, ...]]:
    """Return what scoring begins with, once nothing speaks against it. The model is left as found.

    Args:
        evidence: The model, and what to score on, as it came.
        config: How much to prune and how.
        clock: Told of each step.

    Returns:
        The evidence with what is known of its loss, settings that fit it, all groups, and those that may lose units.

    Raises:
        HapError: If the model, the loss or the settings do not allow it.
    """
    model, processes = evidence.model, evidence.processes
    check_bare(model)
    check_recordable(model)
    processes.check_same_tensors("weights before pruning", dict(model.named_parameters()), NOT_IN_STEP)
    evidence, config = at_the_door(evidence, config)
    config.criterion.try_out(evidence)
    clock.lap("looking at the loss")
    found = discover(model, evidence.example, others=evidence.others())
    processes.check_same("groups", {g.name: g for g in found.groups}, NOT_ALIKE)
    return evidence, config, found, select_groups(found.groups, config)
