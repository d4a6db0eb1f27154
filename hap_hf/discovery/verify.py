"""A plan as a whole, compared with masking on the model that it is about to be applied to."""

import copy
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hap_hf.discovery.find import example_of
from hap_hf.discovery.runs import Run, runs_of
from hap_hf.discovery.trial import Trial
from hap_hf.errors import UnsupportedModelError
from hap_hf.host import tree_map_only
from hap_hf.model.state import preserved
from hap_hf.names.actions import KEEP
from hap_hf.names.plan import GroupPlan, PruningPlan
from hap_hf.surgery.check import stage_problems

logger = logging.getLogger(__name__)


def check_equals_masked(model: nn.Module, plan: PruningPlan, batch: Any, others: Iterable[Any] = ()) -> None:
    """Check that a model without what a plan removes computes what it computes with that masked.

    Groups were tried when they were found, with a few choices of units. This is the choice that counts. Units with an
    implant are compared with silent ones, since an implant is another function on purpose.

    Args:
        model: The model before surgery, which is left as found.
        plan: What happens to its groups, in one stage.
        batch: As for :func:`hap_hf.discovery.find.discover`.
        others: Likewise.

    Raises:
        UnsupportedModelError: If the two differ; the message names the groups that are at fault.
    """
    (stage,) = plan.stages
    if stage_problems(model, stage):
        return  # surgery refuses it, and says why
    cut = [g for g in stage if set(g.actions) != {KEEP}]
    runs, _ = runs_of(model, example_of(model, batch), (example_of(model, other) for other in others))
    if _holds(model, runs, cut):
        return
    # Rounding is told from a wrong model in double precision.
    if next(model.parameters()).dtype is not torch.float64 and _holds_in_double(model, runs, cut):
        return
    guilty = [g.group.name for g in cut if not _holds(model, runs, [g])] or [g.group.name for g in cut]
    listed = ", ".join(guilty[:5]) + (f" and {len(guilty) - 5} more" if len(guilty) > 5 else "")
    raise UnsupportedModelError(
        f"without the units of this plan {type(model).__name__} computes something else than with them masked, so "
        f"that nothing was changed; the groups at fault are {listed}. Leave them whole: exclude={guilty[:5]}"
    )


def _holds(model: nn.Module, runs: Sequence[Run], stage: Sequence[GroupPlan]) -> bool:
    with preserved(model), torch.no_grad():
        return Trial(model, runs).holds_for(stage)


def _holds_in_double(model: nn.Module, runs: Sequence[Run], stage: Sequence[GroupPlan]) -> bool:
    def doubled(t: Tensor) -> Tensor:
        return t.double() if t.is_floating_point() else t

    try:
        return _holds(
            copy.deepcopy(model).double(),
            [Run(tree_map_only(Tensor, doubled, dict(run.batch)), run.training) for run in runs],
            stage,
        )
    except Exception as error:  # models may hold to a dtype of their own
        logger.debug("not in double precision: %s: %s", type(error).__name__, error)
        return False
