"""One round of a training: scores and a cut, or a cut that was chosen earlier."""

from dataclasses import replace

from torch.optim import Optimizer
from transformers import Trainer

from hap_hf.config import HapConfig
from hap_hf.evidence.evidence import Evidence
from hap_hf.pipeline import prune_round
from hap_hf.planned import prune_as_planned, prune_by_plan
from hap_hf.report import PruningReport
from hap_hf.selection import Round
from hap_hf.trainer.floor import Floor
from hap_hf.trainer.given import GivenPlan
from hap_hf.trainer.growth import Growth


def do_round(
    trainer: Trainer,
    evidence: Evidence,
    config: HapConfig,
    place: Round,
    optimizer: Optimizer | None,
    *,
    growth: Growth | None,
    plan: GivenPlan | None,
    floor: Floor | None,
) -> tuple[PruningReport, Round]:
    """Do a round in the way that the settings of the training ask for.

    Args:
        trainer: The Trainer.
        evidence: Its model, and what to score on.
        config: How to prune.
        place: Which round it is.
        optimizer: The Trainer's.
        growth: The growth of penalties at whose end the round is, if there was one.
        plan: A plan that was given.
        floor: What the round must not fall below.

    Returns:
        The report, and the round with what could be pruned before the first one.
    """
    if growth is not None and growth.planned is not None:
        return prune_as_planned(evidence, config, growth.planned, optimizer), replace(place, start=growth.start)
    if plan is not None:
        return prune_by_plan(evidence, config, plan.stage(place.number), plan.decided, optimizer), place
    if floor is not None:
        return floor.prune(trainer, evidence, config, optimizer), place
    return prune_round(evidence, config, place, optimizer)
