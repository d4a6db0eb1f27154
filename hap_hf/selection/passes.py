"""Scoring in several passes, each on what the one before left."""

import logging
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from hap_hf.compensation import Compensation
from hap_hf.compensation.compensation import FLOORS
from hap_hf.config import HapConfig
from hap_hf.criteria import Scores, ScoringTask
from hap_hf.curvature import InputListener, Watchable
from hap_hf.errors import CurvatureError, HapError
from hap_hf.evidence.evidence import Evidence
from hap_hf.evidence.memory import in_batches_that_fit, is_out_of_memory
from hap_hf.model.masking import masked
from hap_hf.names.actions import PRUNE
from hap_hf.names.group import Group
from hap_hf.names.plan import GroupPlan
from hap_hf.selection.door import at_the_door
from hap_hf.selection.make import choose
from hap_hf.selection.members import select_groups

logger = logging.getLogger(__name__)


def measure_and_score(
    evidence: Evidence, groups: Sequence[Group], config: HapConfig, watchable: Watchable
) -> tuple[Compensation, Scores | None]:
    """Measure what compensation needs, in the backward passes of the first scores if the criterion has the same.

    Args:
        evidence: What to measure on.
        groups: The groups that may go.
        config: The criterion.
        watchable: What is found out about the model's layers goes here.

    Returns:
        The compensation, and the scores of the first pass; None where they take passes of their own.
    """
    if not config.criterion.listened_to:
        num_output_probes = getattr(config.criterion, "num_output_probes", 1)
        return Compensation.measure(evidence, groups, num_output_probes=num_output_probes), None
    start = time.perf_counter()

    def score(fitting: Evidence, listener: InputListener) -> Scores:
        task = ScoringTask(fitting, tuple(groups), config.asked, config.per, watchable, listener)
        return config.criterion.score(task)

    with _named(evidence, config):
        compensation, scores = Compensation.while_scoring(evidence, groups, score)
    return compensation, replace(_that_differ(scores, config), seconds=time.perf_counter() - start)


def score_in_passes(
    evidence: Evidence,
    groups: Sequence[Group],
    config: HapConfig,
    *,
    compensation: Compensation | None = None,
    first: Scores | None = None,
    watchable: Watchable | None = None,
) -> Scores:
    """Score, silence the least sensitive units, and score the others anew, until the share that goes is reached.

    A score says what the removal of one unit would cost while all others are there. Where one layer's units all stand
    in for each other, each of them alone looks dispensable, and all of them go: whole layers collapse. So the share
    rises in ``config.passes`` equal steps, and each step takes what is least sensitive without the units of the
    steps before, which are zeroed where they are read. With a compensation, what reads the others makes up for them, so
    that the next step sees what compensation cannot do. The model is left as found.

    Reference: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, who prune and score in
    turns; here without training in between.

    Args:
        evidence: What to score on.
        groups: The groups of the model; those that ``config`` selects are scored.
        config: How much goes, in how many passes, and how to score.
        compensation: What makes up for the units that are gone; nothing by default.
        first: The scores of the first pass, where they are known.
        watchable: What was found out about the model's layers.

    Returns:
        The scores, each unit's from the pass in which it went, or from the last one. Times are added up.

    Raises:
        BatchError: If there are no batches, or they hold no labels or no loss terms.
        CurvatureError: If a derivative is not finite.
        UnsupportedModelError: If the groups do not fit the model.
    """
    chosen = select_groups(groups, config)
    watchable = watchable or Watchable()
    scores = first or _scored(evidence, chosen, config, watchable)
    if not config.criterion.needs_batches:  # what looks at the weights alone would come out as before
        return scores
    silenced = partial(masked, evidence.model) if compensation is None else compensation.applied
    for number in range(1, config.passes):
        # Units of earlier passes come first in the ranking, so each choice contains the one before: nothing comes back.
        choice = choose(groups, scores, config, number / config.passes)
        if isinstance(choice, str):  # so small a share may take no unit at all
            logger.debug("pass %d of %d takes nothing: %s", number, config.passes, choice)
            continue
        gone = [(g.group, g.units(PRUNE)) for g in choice.stage]
        # Silenced units get a score in here, too, which means nothing: `_merged` keeps the one with which they went.
        with silenced(gone):
            scores = _merged(scores, _scored(evidence, chosen, config, watchable), choice.stage, number)
    return scores


def score_groups(evidence: Evidence, groups: Sequence[Group], config: HapConfig) -> Scores:
    """Return the sensitivity of every unit by ``config.method``; the model is left exactly as found.

    What the loss and the batches are like is tried first, see :func:`~hap_hf.selection.door.at_the_door`. When memory
    runs out, a warning says so and scoring starts anew with batches cut in halves.

    Args:
        evidence: What to score on. Criteria that look at the weights alone need no batches.
        groups: Units to score.
        config: The criterion, and how much will go, for criteria that stop once that is settled.

    Returns:
        Sensitivities with their standard errors.

    Raises:
        BatchError: If there are no batches, they hold no labels or no loss terms, or a single sample does not fit.
        ConfigError: If the evidence was made with another precision or seed than the config's.
        CurvatureError: If a loss or a derivative is not finite, or does not depend on the weights, all scores are zero,
            or the model's own code fails while it is differentiated.
        UnsupportedModelError: If there are no groups, they do not fit the model, or the method does not fit the loss.
    """
    evidence, config = at_the_door(evidence, config)
    return _scored(evidence, groups, config, Watchable())


def _scored(evidence: Evidence, groups: Sequence[Group], config: HapConfig, watchable: Watchable) -> Scores:
    """Return the scores on evidence that came through the door."""
    start = time.perf_counter()

    def score(fitting: Evidence) -> Scores:
        return config.criterion.score(ScoringTask(fitting, tuple(groups), config.asked, config.per, watchable))

    with _named(evidence, config):
        scores = in_batches_that_fit(score, evidence)
    return replace(_that_differ(scores, config), seconds=time.perf_counter() - start)


@contextmanager
def _named(evidence: Evidence, config: HapConfig) -> Generator[None]:
    """Let what autograd says of the model's own code be an error that names what was done."""
    try:
        yield
    except HapError:
        raise
    except RuntimeError as error:
        if is_out_of_memory(error):  # says nothing of the model
            raise
        raise CurvatureError(
            f"{type(evidence.model).__name__} cannot be scored by {config.criterion.name}: {type(error).__name__}: "
            f"{error}; method='magnitude' looks at the weights alone"
        ) from error


def _that_differ(scores: Scores, config: HapConfig) -> Scores:
    """Return the scores if they are not all zero."""
    every = torch.cat(list(scores.sensitivity.values()))
    if config.criterion.needs_batches and not every.any():
        raise CurvatureError(
            f"all {len(every)} scores of {config.criterion.name} are zero, so that nothing tells which units matter: "
            "the model is certain of every sample of these batches, or their loss does not depend on what could be "
            "removed; pass batches of which it is less certain, or use method='magnitude'"
        )
    return scores


def _merged(before: Scores, now: Scores, plan: Sequence[GroupPlan], number: int) -> Scores:
    """Return the scores of now, but of each unit that is silenced by now the score and the pass with which it went."""
    sensitivity, error, gone_in = dict(now.sensitivity), dict(now.standard_error), {}
    for group in plan:
        name = group.group.name
        if name not in sensitivity:
            continue
        passes = before.gone_in.get(name, torch.zeros(group.group.num_units, dtype=torch.long))
        # A unit that went in an earlier pass is in this choice as well, and keeps the number of that pass.
        out = torch.zeros_like(passes, dtype=torch.bool)
        out[group.units(PRUNE)] = True
        gone_in[name] = torch.where(out & (passes == 0), number, passes)
        sensitivity[name] = torch.where(gone_in[name] > 0, before.sensitivity[name], sensitivity[name])
        error[name] = torch.where(gone_in[name] > 0, before.standard_error[name], error[name])
    return replace(
        now, sensitivity=sensitivity, standard_error=error, gone_in=gone_in, seconds=before.seconds + now.seconds
    )


def num_parts(config: HapConfig) -> int:
    """Return how many things are measured until a model is pruned, each of them on all batches.

    Args:
        config: The settings.

    Returns:
        The passes, the losses before and after, and those by which compensation is chosen.
    """
    return config.passes + 2 * config.criterion.needs_batches + (1 + len(FLOORS)) * config.compensates
