"""Several amounts from one scoring: what accuracy is left at which size."""

from hap_hf.tradeoff.measure import measure_tradeoff, milliseconds
from hap_hf.tradeoff.values import LOSS, SWEEP_FILE, Tradeoff, TradeoffGroup, TradeoffPoint

__all__ = [
    "LOSS",
    "SWEEP_FILE",
    "Tradeoff",
    "TradeoffGroup",
    "TradeoffPoint",
    "measure_tradeoff",
    "milliseconds",
]
