"""What the tests of compensation share: a batch of text, and what is measured on it."""

from typing import Any

import torch
from scored_models import config, text_batch
from torch import nn

from hap_hf import Compensation

TEXT = text_batch(rows=6, labels=torch.tensor([0, 1, 1, 0, 1, 0]))
EXACT = config(method="mask_ggn", num_output_probes=None)


def measured(model: nn.Module, groups: Any, batch: Any = None, **changes: Any) -> Compensation:
    """Return what is measured on one batch, with exact curvature unless ``changes`` say otherwise."""
    wanted = config(**{"method": "mask_ggn", "num_output_probes": None, **changes})
    return Compensation.measure(model, groups, [TEXT if batch is None else batch], wanted)
