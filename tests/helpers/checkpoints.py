"""Pruned models for the tests of saving and loading, and their files with one thing changed."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import transformers
from cases import batch_of, build
from packaging.version import Version
from plans import plan_of
from reference import uneven_removal
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from hap_hf.checkpoint import record_plan
from hap_hf.discovery import find_groups
from hap_hf.names.group import Role
from hap_hf.surgery import apply_plan_

heads_may_change = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="before 5.23 transformers does not look at sizes where a config has a quantization_config",
)


def single(name: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Return a case's dense model and batch in float32, as models are trained and saved."""
    batch = {k: v.float() if v.is_floating_point() else v for k, v in batch_of(name).items()}
    return build(name).float(), batch


def prune_(model: PreTrainedModel, batch: Mapping[str, Tensor], *, seed: int = 0, implants: bool = True) -> None:
    """Remove and implant some units of every group, another number in each, and record it."""
    groups = [g for g in find_groups(model, batch) if g.num_units > 1]
    removed = {g: units[: max(1, g.num_units // 3)] for g, units in uneven_removal(groups, seed).items()}
    implanted = {}
    for g in groups if implants else ():
        left = [u for u in range(g.num_units) if u not in removed[g]]
        rows = min((s.width for s in g.slices if s.role is Role.PRODUCER), default=0) * (len(left) - 1)
        if rows > 2:
            implanted[g] = left[1:]
    plan = plan_of(removed, implanted)
    apply_plan_(model, plan)
    record_plan(model, plan)


def pruned(name: str, *, seed: int = 0, implants: bool = True) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Return a case's pruned model and its batch."""
    model, batch = single(name)
    prune_(model, batch, seed=seed, implants=implants)
    return model, batch


def edited(
    source: Path,
    target: Path,
    *,
    config: Callable[[dict[str, Any]], object] | None = None,
    tensors: Callable[[dict[str, Tensor]], object] | None = None,
) -> Path:
    """Return a copy of a checkpoint after ``config`` and ``tensors`` changed its config.json and its weights."""
    shutil.copytree(source, target)
    if config is not None:
        path = target / "config.json"
        values = json.loads(path.read_text())
        config(values)
        path.write_text(json.dumps(values))
    if tensors is not None:
        weights = load_file(target / "model.safetensors")
        tensors(weights)
        save_file({k: v.contiguous() for k, v in weights.items()}, target / "model.safetensors", {"format": "pt"})
    return target
