"""All pictures that a report has the numbers for."""

import logging
from collections.abc import Callable

from hap_hf.errors import ConfigError
from hap_hf.names.group import Kind
from hap_hf.plots.picture import Picture
from hap_hf.plots.sensitivity import plot_sensitivity
from hap_hf.plots.threshold import plot_threshold
from hap_hf.plots.widths import plot_widths
from hap_hf.report import PruningReport

logger = logging.getLogger(__name__)


def pictures_of(report: PruningReport) -> dict[str, Picture]:
    """Draw what a report shows: widths, and with scores how sure the choice is and the sensitivities of heads.

    Args:
        report: The report.

    Returns:
        The pictures by name, as files are called.
    """
    drawings: dict[str, Callable[[PruningReport], Picture]] = {"widths": plot_widths}
    if report.scores is not None:
        drawings["threshold"] = plot_threshold
        if report.units(Kind.HEADS)[0]:
            drawings["heads"] = plot_sensitivity
    pictures = {}
    for name, draw in drawings.items():
        try:
            pictures[name] = draw(report)
        except ConfigError as error:  # a report without a threshold, for example
            logger.info("no picture of %s: %s", name, error)
    return pictures
