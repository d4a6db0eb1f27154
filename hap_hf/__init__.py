"""Hessian-aware structured pruning with neural implants for Hugging Face transformers.

One call prunes a trained model in place, and a callback does it inside the ``Trainer``:

    report = prune(model, batches, HapConfig(target_params=0.5))
    trainer = Trainer(..., callbacks=[HessianPruner(HapConfig(target_params=0.5))])

``prune`` is two halves. The first looks and changes nothing; what it returns can be printed, saved, kept for another
amount or thrown away. The second cuts:

    config = HapConfig(target_params=0.5)
    decision = decide(config.evidence(model, batches), config)
    report = carry_out_(model, decision)

Importing this package is what lets ``AutoModel….from_pretrained`` load pruned checkpoints.
"""

import importlib.util

from hap_hf.bits import (
    Allocation,
    BitConfig,
    BitReport,
    Sensitivity,
    allocate_bits,
    bit_frontier,
    bit_sensitivity,
    quantize_,
)
from hap_hf.checkpoint import load_pruned_, load_pruned_heads, plan_of, record_plan, save_pruned, wrap_timm
from hap_hf.compensation import Compensation
from hap_hf.config import HapConfig
from hap_hf.criteria import (
    GGN,
    Coupling,
    Criterion,
    EmpiricalFisher,
    GGNQuadratic,
    Hessian,
    HessianSplit,
    Hvp,
    Magnitude,
    MaskFisher,
    MaskGGN,
    Michel,
    Random,
    Reconstruction,
    Scores,
    ScoringTask,
    Taylor,
    known_criteria,
    register_criterion,
)
from hap_hf.decision import Decision
from hap_hf.discovery import Discovery, LeftWhole, discover, find_groups
from hap_hf.errors import (
    BatchError,
    ConfigError,
    CurvatureError,
    DistributedError,
    ExportError,
    HapError,
    PlanFormatError,
    PlanMismatchError,
    StaleOptimizerError,
    UnsupportedModelError,
)
from hap_hf.evidence.evidence import Evidence
from hap_hf.evidence.precision import Precision
from hap_hf.export import export
from hap_hf.file_size import BytesReport, prune_to_bytes
from hap_hf.floor import FloorReport, prune_to_floor
from hap_hf.layers.implant_conv import ImplantConv2d
from hap_hf.layers.implant_linear import ImplantLinear
from hap_hf.layers.kind import LayerKind, register_layer
from hap_hf.model.change import TensorChange
from hap_hf.names.amount import Amount
from hap_hf.names.counters import register_counter
from hap_hf.names.currencies import Currency, Macs, Params, Units, register_currency
from hap_hf.names.group import Counter, Group, Kind, Role, Slice
from hap_hf.names.plan import GroupPlan, PruningPlan
from hap_hf.pipeline import carry_out_, decide, decide_again, prune
from hap_hf.report import ModelSize, PruningReport, measure_size
from hap_hf.selection import make_plan, score_groups
from hap_hf.similarity import SimilarUnits, similar_units
from hap_hf.surgery import (
    ImplantInit,
    apply_plan_,
    carry_optimizer_state_,
    recalibrate_batch_norms_,
    train_only_implants_,
)
from hap_hf.trainer import Distill, Floor, GrowingReg, HessianPruner
from hap_hf.trainer.quantizing import QuantizeAware
from hap_hf.version import __version__

__all__ = [  # noqa: RUF022 (by stage, not by letter)
    "__version__",
    # the two ways to use it
    "HapConfig",
    "HessianPruner",
    "prune",
    "prune_to_floor",
    "similar_units",
    "SimilarUnits",
    "prune_to_bytes",
    # what helps a training to recover
    "Distill",
    "GrowingReg",
    # its two halves
    "Evidence",
    "Floor",
    "FloorReport",
    "BytesReport",
    "decide",
    "decide_again",
    "Decision",
    "carry_out_",
    # how much
    "Amount",
    "Currency",
    "Units",
    "Params",
    "Macs",
    "register_currency",
    # how it is scored
    "Criterion",
    "MaskGGN",
    "Reconstruction",
    "MaskFisher",
    "Michel",
    "GGN",
    "GGNQuadratic",
    "Hessian",
    "HessianSplit",
    "EmpiricalFisher",
    "Taylor",
    "Magnitude",
    "Random",
    "known_criteria",
    "register_criterion",
    "Scores",
    "ScoringTask",
    # fewer bits
    "BitConfig",
    "BitReport",
    "quantize_",
    "QuantizeAware",
    "bit_sensitivity",
    "allocate_bits",
    "bit_frontier",
    "Sensitivity",
    "Allocation",
    # files that run elsewhere
    "export",
    # choices
    "Coupling",
    "Hvp",
    "ImplantInit",
    "Kind",
    "Precision",
    # layers
    "ImplantConv2d",
    "ImplantLinear",
    "LayerKind",
    "register_layer",
    "register_counter",
    # single steps
    "discover",
    "find_groups",
    "Discovery",
    "LeftWhole",
    "score_groups",
    "Compensation",
    "make_plan",
    "apply_plan_",
    "carry_optimizer_state_",
    "recalibrate_batch_norms_",
    "train_only_implants_",
    # what they pass on
    "Counter",
    "Group",
    "GroupPlan",
    "ModelSize",
    "PruningPlan",
    "PruningReport",
    "Role",
    "Slice",
    "TensorChange",
    "measure_size",
    # checkpoints
    "load_pruned_",
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
    "ExportError",
    "HapError",
    "PlanFormatError",
    "PlanMismatchError",
    "StaleOptimizerError",
    "UnsupportedModelError",
]

if importlib.util.find_spec("timm") is not None:
    # So that the names of its models are known wherever checkpoints of them are loaded.
    from hap_hf import cifar as cifar
