"""How much each weight matters to the loss: derivatives of any torch model. Knows no groups and no families."""

from hap_hf.curvature.finite_difference import FiniteDifference
from hap_hf.curvature.forward import Directions, Forward, SampleBatch
from hap_hf.curvature.forward_over_reverse import ForwardOverReverse
from hap_hf.curvature.ggn import estimate_fisher, estimate_ggn, ggn_directions, loss_gradient
from hap_hf.curvature.hutchinson import CurvatureOf, DoubleBackward, TraceEstimate, estimate_traces
from hap_hf.curvature.hvp import accumulation_dtype, differentiable_gradient, hvp
from hap_hf.curvature.input_watch import InputListener, ReadInput
from hap_hf.curvature.marginals import Marginals, Statistic, Wanted, squared, times_weights
from hap_hf.curvature.probes import ProbeSource, rademacher, seeded_generator
from hap_hf.curvature.remainder import LinearisedLosses, Losses
from hap_hf.curvature.sample_means import ReduceSamples, SampleEstimate, Watchable
from hap_hf.model.state import preserved, renew_caches

__all__ = [
    "CurvatureOf",
    "Directions",
    "DoubleBackward",
    "FiniteDifference",
    "Forward",
    "ForwardOverReverse",
    "InputListener",
    "LinearisedLosses",
    "Losses",
    "Marginals",
    "ProbeSource",
    "ReadInput",
    "ReduceSamples",
    "SampleBatch",
    "SampleEstimate",
    "Statistic",
    "TraceEstimate",
    "Wanted",
    "Watchable",
    "accumulation_dtype",
    "differentiable_gradient",
    "estimate_fisher",
    "estimate_ggn",
    "estimate_traces",
    "ggn_directions",
    "hvp",
    "loss_gradient",
    "preserved",
    "rademacher",
    "renew_caches",
    "seeded_generator",
    "squared",
    "times_weights",
]
