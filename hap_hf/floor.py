"""As small as possible, with no more lost than is allowed."""

import copy
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hap_hf.config import HapConfig
from hap_hf.decision import Decision
from hap_hf.errors import ConfigError
from hap_hf.evidence.evidence import Evidence
from hap_hf.evidence.losses import LossFunction
from hap_hf.names.amount import Amount
from hap_hf.names.checks import at_least
from hap_hf.pipeline import carry_out_, decide, decide_again
from hap_hf.report import PruningReport

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FloorReport:
    """What came of a search for the smallest model above a floor.

    Args:
        report: What was removed from the model.
        dense: Score of the model before.
        score: Score of the pruned model.
        floor: The lowest score that was allowed.
        tried: Share kept and score of each amount that was tried, in that order.
    """

    report: PruningReport
    dense: float
    score: float
    floor: float
    tried: tuple[tuple[float, float], ...]

    def __str__(self) -> str:
        """Return the table of the report, and what was tried."""
        tried = ", ".join(f"{keep:.3g}: {score:.4g}" for keep, score in sorted(self.tried))
        return f"{self.report}\nscore {self.score:.4g} of {self.dense:.4g}, floor {self.floor:.4g}; tried {tried}"


def prune_to_floor(
    model: nn.Module,
    batches: Iterable[Any],
    evaluate: Callable[[nn.Module], float],
    config: HapConfig,
    *,
    drop: float,
    num_trials: int = 6,
    loss_fn: LossFunction | None = None,
    optimizer: Optimizer | None = None,
) -> FloorReport:
    """Prune ``model`` in place as far as its score stays within ``drop`` of what it was.

    The units are scored once, for the amount of the config, which is the most that may go. Then amounts between that
    and nothing are tried on copies of the model: the interval between the smallest share that was good enough and the
    largest that was not is halved each time. The model is pruned by what was good enough when it was tried, and never
    by a guess between two trials. It takes the memory of one copy.

    Reference: Xie et al., "Pruning with Compensation", 2021, who search layer by layer under a floor that falls.

    Args:
        model: A trained model.
        batches: What to score and repair on, as for :func:`~hap_hf.prune`; not what ``evaluate`` looks at.
        evaluate: Score of a model, the higher the better, such as its accuracy on validation data.
        config: How to prune; its amount is the smallest share that may be kept.
        drop: How much of the score may be lost, at least 0, in its own unit: 0.01 for a point of accuracy.
        num_trials: Number of amounts that are tried at most.
        loss_fn: As for :func:`~hap_hf.prune`.
        optimizer: As for :func:`~hap_hf.prune`.

    Returns:
        What was removed, and what was tried.

    Raises:
        ConfigError: If nothing that was tried is good enough, or a setting is out of range; the model is as it was.
    """
    check_search(config, drop, num_trials)
    evidence = config.evidence(model, batches, loss_fn=loss_fn)
    return search_floor(evidence, evaluate, config, drop=drop, num_trials=num_trials, optimizer=optimizer)


def check_search(config: HapConfig, drop: float, num_trials: int) -> None:
    """Check the settings of a search for the smallest model above a floor; see :func:`prune_to_floor`.

    Args:
        config: How to prune.
        drop: How much of the score may be lost.
        num_trials: Number of amounts that are tried at most.

    Raises:
        ConfigError: If one is out of range, or there are implants.
    """
    if isinstance(drop, bool) or not (isinstance(drop, (int, float)) and math.isfinite(drop) and drop >= 0):
        raise ConfigError(f"drop must be a finite number of at least 0, in the unit of the score, got {drop!r}")
    at_least("num_trials", num_trials, 1)
    if config.implant_ratio:
        raise ConfigError("a search changes how much goes, and implants would change with it: set implant_ratio=0")


def search_floor(
    evidence: Evidence,
    evaluate: Callable[[nn.Module], float],
    config: HapConfig,
    *,
    drop: float,
    num_trials: int,
    optimizer: Optimizer | None = None,
) -> FloorReport:
    """Do what :func:`prune_to_floor` does, with settings that were checked.

    Args:
        evidence: The model, and what to score and repair on.
        evaluate: Score of a model, the higher the better; the same in all processes.
        config: How to prune; its amount is the smallest share that may be kept.
        drop: How much of the score may be lost.
        num_trials: Number of amounts that are tried at most.
        optimizer: An optimizer of the model that shall go on.

    Returns:
        What was removed, and what was tried.

    Raises:
        ConfigError: If nothing that was tried is good enough; the model is as it was.
    """
    model = evidence.model
    dense = _score(evaluate, model)
    floor, tried = dense - drop, list[tuple[float, float]]()
    what, least = config.asked.what, config.asked.keep
    decision = decide(evidence, config)
    best: tuple[Decision, float] | None = None
    low, high, keep = least, 1.0, least
    while len(tried) < num_trials and high > least:
        if tried:
            keep = (low + high) / 2
            decision = decide_again(decision, config.with_amount(Amount(what, keep)))
        trial = copy.deepcopy(model)
        carry_out_(trial, decision)
        score = _score(evaluate, trial)
        tried.append((keep, score))
        logger.info("keeping %.3g of the %s: score %.4g, floor %.4g", keep, what.name, score, floor)
        if score >= floor:
            best, high = (decision, score), keep
        else:
            low = keep
    if best is None:
        keep, score = tried[-1]
        raise ConfigError(
            f"no amount is good enough: the score was {dense:.4g} and may fall to {floor:.4g}, and with {keep:.3g} "
            f"kept it is {score:.4g}; allow a larger drop, try more amounts (num_trials), or give more batches"
        )
    report = carry_out_(model, best[0], optimizer=optimizer)
    return FloorReport(report, dense, best[1], floor, tuple(tried))


def _score(evaluate: Callable[[nn.Module], float], model: nn.Module) -> float:
    """Return the score of a model, whose training mode is left as found."""
    training = model.training
    score = float(evaluate(model))
    model.train(training)
    if not math.isfinite(score):
        raise ConfigError(f"evaluate must return a finite number, the higher the better, got {score}")
    return score
