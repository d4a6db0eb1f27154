"""Hessian-aware structured pruning with neural implants for Hugging Face transformers.

A model and some batches become groups of units; groups and curvature become scores; scores and a budget become a plan;
the plan, alone, makes the model smaller, now or later inside ``from_pretrained``:

    groups = find_groups(model, batch)              # attention heads, FFN neurons, convolution channels
    compensation = Compensation.measure(model, groups, batches, config)
    scores = score_in_passes(model, groups, batches, config, compensation=compensation)
    plan = make_plan(groups, scores, config)
    compensation.apply_best_(plan, batches, config)  # what stays makes up for what goes
    apply_plan_(model, plan)

``prune`` does all of it, and ``HessianPruner`` does it inside the ``Trainer``. Importing this package is what lets
``AutoModel….from_pretrained`` load pruned checkpoints.
"""

import importlib.util

from hap_hf.checkpoint import load_pruned_heads, plan_of, record_plan, save_pruned, wrap_timm
from hap_hf.compensation import Compensation
from hap_hf.config import Coupling, HapConfig, ImplantInit, Method, Precision
from hap_hf.criteria import Scores, score_groups
from hap_hf.discovery import find_groups
from hap_hf.errors import (
    BatchError,
    ConfigError,
    CurvatureError,
    DistributedError,
    HapError,
    PlanFormatError,
    PlanMismatchError,
    UnsupportedModelError,
)
from hap_hf.layers.implant_conv import ImplantConv2d
from hap_hf.layers.implant_linear import ImplantLinear
from hap_hf.model.change import TensorChange
from hap_hf.names.group import Counter, Group, Kind, Role, Slice
from hap_hf.names.plan import GroupPlan, PruningPlan
from hap_hf.pipeline import prune
from hap_hf.report import ModelSize, PruningReport, measure_size
from hap_hf.selection import make_plan, score_in_passes
from hap_hf.surgery import (
    apply_plan_,
    carry_optimizer_state_,
    check_plan,
    recalibrate_batch_norms_,
    train_only_implants_,
)
from hap_hf.trainer import HessianPruner
from hap_hf.version import __version__

__all__ = [  # noqa: RUF022 (by stage, not by letter)
    "__version__",
    # the two ways to use it
    "HapConfig",
    "HessianPruner",
    "prune",
    # choices
    "Coupling",
    "ImplantInit",
    "Kind",
    "Method",
    "Precision",
    # stages
    "find_groups",
    "score_groups",
    "score_in_passes",
    "make_plan",
    "check_plan",
    "apply_plan_",
    "Compensation",
    "recalibrate_batch_norms_",
    "carry_optimizer_state_",
    "train_only_implants_",
    # what they pass on
    "Counter",
    "Group",
    "GroupPlan",
    "ImplantConv2d",
    "ImplantLinear",
    "ModelSize",
    "PruningPlan",
    "PruningReport",
    "Role",
    "Scores",
    "Slice",
    "TensorChange",
    "measure_size",
    # checkpoints
    "load_pruned_heads",
    "plan_of",
    "record_plan",
    "save_pruned",
    "wrap_timm",
    # errors
    "BatchError",
    "ConfigError",
    "CurvatureError",
    "DistributedError",
    "HapError",
    "PlanFormatError",
    "PlanMismatchError",
    "UnsupportedModelError",
]

if importlib.util.find_spec("timm") is not None:
    # So that the names of its models are known wherever checkpoints of them are loaded.
    from hap_hf import cifar as cifar
