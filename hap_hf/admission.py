"""Everything that is known of a model and a loss before anything is scored, and can be refused by then."""

from dataclasses import dataclass, replace

from hap_hf.checkpoint import check_recordable
from hap_hf.config import HapConfig
from hap_hf.discovery import Discovery, discover
from hap_hf.evidence.evidence import Evidence
from hap_hf.model.bare import check_bare
from hap_hf.names.group import Group
from hap_hf.names.outcome import whole
from hap_hf.report import Clock, ModelSize, measure_size
from hap_hf.selection import Round, at_the_door, check_reachable, config_of_round, select_groups
from hap_hf.selection.make import check_takes_implants

NOT_IN_STEP = "load the same checkpoint in every process, and let nothing but the Trainer change its weights"
NOT_ALIKE = "start every process with the same script, settings and data, on machines of the same kind"
"""What to do where processes do not agree."""


@dataclass(frozen=True, eq=False)
class Admitted:
    """A model that nothing speaks against pruning, as far as that can be told without scores.

    Args:
        evidence: What to score on, with what is known of its loss.
        config: The settings of the round.
        found: All groups, and what could not be removed.
        chosen: The groups that may lose units.
        place: The round, with what could be pruned before the first one.
        size: Size of the model.
    """

    evidence: Evidence
    config: HapConfig
    found: Discovery
    chosen: tuple[Group, ...]
    place: Round
    size: ModelSize


def check_prunable(evidence: Evidence, config: HapConfig, place: Round) -> None:
    """Raise what pruning would raise before it scores, for those who prune later.

    Args:
        evidence: The model, and a few batches.
        config: How much to prune and how.
        place: Which round it will be.

    Raises:
        HapError: As for :func:`~hap_hf.pipeline.decide`.
    """
    admitted(evidence, config, place, Clock())


def admitted(evidence: Evidence, config: HapConfig, place: Round, clock: Clock) -> Admitted:
    """Return what scoring begins with, once nothing speaks against it. The model is left as found.

    Args:
        evidence: The model, and what to score on, as it came.
        config: How much to prune and how.
        place: Which round it is.
        clock: Told of each step.

    Returns:
        The evidence with what is known of its loss, settings that fit it and the round, and the groups.

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
    chosen, size = select_groups(found.groups, config), measure_size(model, evidence.example)
    config = config.in_model(chosen, size)
    # What a round asks for is relative to what there is at its beginning, as rounds before did not meet theirs exactly.
    now = config.asked.what.cost(whole(chosen))
    place = replace(place, start=now if place.start is None else place.start)
    config = config_of_round(config, place, now)
    check_takes_implants(chosen, config)
    check_reachable(chosen, config)
    clock.lap("discovery")
    return Admitted(evidence, config, found, chosen, place, size)
