"""Pictures of what was measured and done; needs matplotlib, ``pip install "hap_hf[plots]"``.

Each function returns a :class:`Picture`, which a notebook shows and ``save`` writes as PNG or SVG. They are made to be
read in black and white and at a width of 600 pixels.
"""

from hap_hf.plots.bits import plot_bits
from hap_hf.plots.losses import plot_losses
from hap_hf.plots.of_report import pictures_of
from hap_hf.plots.picture import Picture
from hap_hf.plots.sensitivity import plot_sensitivity
from hap_hf.plots.threshold import plot_threshold
from hap_hf.plots.tradeoff import plot_tradeoff
from hap_hf.plots.widths import plot_widths

__all__ = [
    "Picture",
    "pictures_of",
    "plot_bits",
    "plot_losses",
    "plot_sensitivity",
    "plot_threshold",
    "plot_tradeoff",
    "plot_widths",
]
