"""The door: what a loss and its batches do not have is found out before anything else is done with a model."""

import logging
from dataclasses import replace

from hap_hf.config import HapConfig
from hap_hf.evidence.evidence import Evidence
from hap_hf.evidence.rehearsal import rehearsed
from hap_hf.evidence.settling import with_default_loss

logger = logging.getLogger(__name__)


def at_the_door(evidence: Evidence, config: HapConfig) -> tuple[Evidence, HapConfig]:
    """Return what to measure on and the settings to score with, once the loss was tried on the batches.

    Args:
        evidence: What to measure on, as it came.
        config: The settings.

    Returns:
        The evidence with what is known of its loss, and the settings; where another criterion stands in for theirs,
        with everything that theirs says.

    Raises:
        BatchError: If the loss cannot be computed, or there are no labels and the criterion needs them.
        ConfigError: If the evidence was made with another precision or seed than the config's.
        CurvatureError: If the loss is not finite, does not depend on the weights, or lacks derivatives that are needed.
        UnsupportedModelError: If the loss has no curvature in the model's outputs, and the criterion needs it.
    """
    evidence.check_made_with(config.precision, config.seed)
    criterion = config.criterion
    if not criterion.needs_batches and not config.compensates:
        return evidence, config
    evidence = rehearsed(evidence) if criterion.by_samples or config.compensates else with_default_loss(evidence)
    suited = criterion.suited(evidence)
    why = evidence.facts.no_curvature
    stands_in = ["scored by squared gradients (mask_fisher)"] if suited != criterion else []
    stands_in += ["compensated by gradients"] if config.compensates else []
    if why is not None and stands_in:
        logger.warning("%s, without curvature of the loss in the model's outputs: %s", " and ".join(stands_in), why)
    if suited == criterion:
        return evidence, config
    # What the criterion that was asked for says where the settings leave it to it stays: only the scores are others.
    per_cost = True if config.per is not None else None
    return evidence, replace(
        config, method=suited, num_passes=config.passes, per_cost=per_cost, compensate=config.compensates
    )
