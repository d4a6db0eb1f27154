"""What the tests of compensation share: a batch of text, what is measured on it, and making up for a plan."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from scored_models import config, text_batch
from torch import nn

from hap_hf import Compensation, Evidence
from hap_hf.evidence.losses import LossFunction
from hap_hf.model.values import replace_values_
from hap_hf.names.actions import PRUNE
from hap_hf.names.group import Group
from hap_hf.names.plan import GroupPlan

TEXT = text_batch(rows=6, labels=torch.tensor([0, 1, 1, 0, 1, 0]))
EXACT = config(method="mask_ggn", num_output_probes=None)


def evidence_of(
    model: nn.Module, batches: Iterable[Any] = (TEXT,), loss_fn: LossFunction | None = None, **changes: Any
) -> Evidence:
    """Return what is measured on, with the settings of :data:`EXACT` unless ``changes`` say otherwise."""
    wanted = config(**{"method": "mask_ggn", "num_output_probes": None, **changes})
    return wanted.evidence(model, batches, loss_fn=loss_fn)


def measured(
    model: nn.Module, groups: Sequence[Group], batch: Any = None, loss_fn: LossFunction | None = None, **changes: Any
) -> Compensation:
    """Return what is measured on one batch, with exact curvature unless ``changes`` say otherwise."""
    evidence = evidence_of(model, [TEXT if batch is None else batch], loss_fn, **changes)
    return Compensation.measure(evidence, groups, num_output_probes=changes.get("num_output_probes"))


def make_up_for_(compensation: Compensation, plan: Iterable[GroupPlan]) -> None:
    """Give the model of a compensation the weights that make up for what a plan is about to prune."""
    replace_values_(compensation.model, compensation.values([(g.group, g.units(PRUNE)) for g in plan]))
