"""How much each weight matters to the loss: second derivatives of any torch model. Knows no groups and no families."""

from hap_hf.curvature.hutchinson import TraceEstimate, estimate_traces
from hap_hf.curvature.hvp import accumulation_dtype, differentiable_gradient, hvp
from hap_hf.curvature.probes import ProbeSource, rademacher, seeded_generator
from hap_hf.curvature.state import preserved

__all__ = [
    "ProbeSource",
    "TraceEstimate",
    "accumulation_dtype",
    "differentiable_gradient",
    "estimate_traces",
    "hvp",
    "preserved",
    "rademacher",
    "seeded_generator",
]
