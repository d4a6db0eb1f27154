"""How sensitive the loss is to each unit: HAP's relative Hessian trace, and the criteria it has to beat.

One file a criterion: a frozen dataclass that holds its settings and facts and scores, registered by name.
"""

from hap_hf.criteria.chance import Random
from hap_hf.criteria.criterion import (
    Criterion,
    ScoringTask,
    criterion_of,
    hint_at,
    known_criteria,
    register_criterion,
)
from hap_hf.criteria.empirical_fisher import EmpiricalFisher
from hap_hf.criteria.ggn import GGN
from hap_hf.criteria.ggn_quadratic import GGNQuadratic
from hap_hf.criteria.hessian import Hessian
from hap_hf.criteria.hessian_split import HessianSplit
from hap_hf.criteria.magnitude import Magnitude
from hap_hf.criteria.mask_fisher import MaskFisher
from hap_hf.criteria.mask_ggn import MaskGGN
from hap_hf.criteria.michel import Michel
from hap_hf.criteria.probes import Hvp
from hap_hf.criteria.reconstruction import Reconstruction
from hap_hf.criteria.scores import Scores
from hap_hf.criteria.sensitivity import unit_sensitivity
from hap_hf.criteria.taylor import Taylor
from hap_hf.criteria.units import Coupling, UnitWeights, roles_of

__all__ = [
    "GGN",
    "Coupling",
    "Criterion",
    "EmpiricalFisher",
    "GGNQuadratic",
    "Hessian",
    "HessianSplit",
    "Hvp",
    "Magnitude",
    "MaskFisher",
    "MaskGGN",
    "Michel",
    "Random",
    "Reconstruction",
    "Scores",
    "ScoringTask",
    "Taylor",
    "UnitWeights",
    "criterion_of",
    "hint_at",
    "known_criteria",
    "register_criterion",
    "roles_of",
    "unit_sensitivity",
]
