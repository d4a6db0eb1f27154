"""Scoring in several passes, each on what the one before left."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn

from hap_hf.compensation import Compensation
from hap_hf.config import HapConfig
from hap_hf.criteria import Scores, score_groups
from hap_hf.errors import ConfigError
from hap_hf.evidence.losses import LossFunction
from hap_hf.evidence.processes import ALONE, Processes
from hap_hf.model.masking import masked
from hap_hf.names.group import Group
from hap_hf.names.plan import PRUNE, PruningPlan
from hap_hf.selection.make import make_plan, select_groups

logger = logging.getLogger(__name__)


def score_in_passes(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Iterable[Mapping[str, Any]],
    config: HapConfig,
    *,
    loss_fn: LossFunction | None = None,
    compensation: Compensation | None = None,
    processes: Processes = ALONE,
) -> Scores:
    """Score, silence the least sensitive units, and score the others anew, until the share that goes is reached.

    A score says what the removal of one unit would cost while all others are there. Where one layer's units all stand
    in for each other, each of them alone looks dispensable, and all of them go: whole layers collapse. So the share
    rises in ``config.passes`` equal steps, and each step takes what is least sensitive without the units of the
    steps before, which are zeroed where they are read. With ``config.compensates`` what reads the others makes up for
    them, so that the next step sees what compensation cannot do. The model is left as found.

    Reference: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, who prune and score in
    turns; here without training in between.

    Args:
        model: The model that the groups were found in.
        groups: Its groups; those that ``config`` selects are scored.
        batches: As for :func:`~hap_hf.criteria.score_groups`.
        config: How much goes, in how many passes, and how to score.
        loss_fn: As for :func:`~hap_hf.criteria.score_groups`.
        compensation: What is known of the model's layers; measured on the same batches where it is needed and missing.
        processes: As for :func:`~hap_hf.criteria.score_groups`.

    Returns:
        The scores, each unit's from the pass in which it went, or from the last one. Times are added up.

    Raises:
        BatchError: As :func:`~hap_hf.criteria.score_groups`, and so are all others.
        CurvatureError: If a derivative is not finite.
        UnsupportedModelError: If the groups do not fit the model.
    """
    used = list(islice(batches, config.max_batches))
    chosen = select_groups(groups, config)
    score = partial(score_groups, model, chosen, used, config, loss_fn=loss_fn, processes=processes)
    scores = score()
    if not scores.num_batches:  # what looks at the weights alone would come out as before
        return scores
    if config.compensates and config.passes > 1 and compensation is None:
        compensation = Compensation.measure(model, chosen, used, config, loss_fn=loss_fn, processes=processes)
    silenced = partial(masked, model) if compensation is None else compensation.applied
    for number in range(1, config.passes):
        try:
            plan = make_plan(groups, scores, _config_of_pass(config, number))
        except ConfigError as reason:  # so small a share may take no unit at all
            logger.debug("pass %d of %d takes nothing: %s", number, config.passes, reason)
            continue
        gone = [(g.group, g.units(PRUNE)) for g in plan]
        with silenced(gone):
            scores = _merged(scores, score(), plan, number)
    return scores


def _config_of_pass(config: HapConfig, number: int) -> HapConfig:
    share = number / config.passes
    if config.prune_ratio is not None:
        return replace(config, prune_ratio=config.prune_ratio * share, implant_ratio=0.0)
    if config.target_params is not None:
        return replace(config, target_params=1 - (1 - config.target_params) * share, implant_ratio=0.0)
    return replace(config, target_macs=1 - (1 - (config.target_macs or 0.0)) * share, implant_ratio=0.0)


def _merged(before: Scores, now: Scores, plan: PruningPlan, number: int) -> Scores:
    """Return the scores of now, and for the units that are gone by then those they went with."""
    sensitivity, error, gone_in = dict(now.sensitivity), dict(now.standard_error), {}
    for group in plan:
        name = group.group.name
        if name not in sensitivity:
            continue
        passes = before.gone_in.get(name, torch.zeros(group.group.num_units, dtype=torch.long))
        out = torch.zeros_like(passes, dtype=torch.bool)
        out[group.units(PRUNE)] = True
        gone_in[name] = torch.where(out & (passes == 0), number, passes)
        sensitivity[name] = torch.where(gone_in[name] > 0, before.sensitivity[name], sensitivity[name])
        error[name] = torch.where(gone_in[name] > 0, before.standard_error[name], error[name])
    return replace(
        now, sensitivity=sensitivity, standard_error=error, gone_in=gone_in, seconds=before.seconds + now.seconds
    )
