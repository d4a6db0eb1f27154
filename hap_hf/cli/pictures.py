"""Pictures beside a checkpoint, where matplotlib is installed."""

import importlib.util
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hap_hf.errors import ConfigError
from hap_hf.report import PruningReport
from hap_hf.tradeoff import Tradeoff

logger = logging.getLogger(__name__)


def draw_report(report: PruningReport, folder: Path, suffix: str = ".png") -> list[Path]:
    """Draw what a report shows.

    Args:
        report: The report.
        folder: Where to write.
        suffix: ``.png`` or ``.svg``.

    Returns:
        The files; none without matplotlib.
    """
    if not _can_draw():
        return []
    from hap_hf.plots import pictures_of

    return _saved(pictures_of(report), folder, suffix)


def draw_sweep(sweep: Tradeoff, folder: Path, suffix: str = ".png") -> list[Path]:
    """Draw what a sweep shows.

    Args:
        sweep: The sweep.
        folder: Where to write.
        suffix: ``.png`` or ``.svg``.

    Returns:
        The files; none without matplotlib.
    """
    if not _can_draw():
        return []
    from hap_hf import plots

    return _drawn(
        {"sweep": lambda: plots.plot_tradeoff(sweep), "losses": lambda: plots.plot_losses(sweep)}, folder, suffix
    )


def _can_draw() -> bool:
    """Return whether matplotlib is there, and say so where it is not."""
    found = importlib.util.find_spec("matplotlib") is not None
    if not found:
        logger.warning('no pictures without matplotlib: pip install "hap_hf[plots]"')
    return found


def _drawn(drawings: dict[str, Callable[[], Any]], folder: Path, suffix: str) -> list[Path]:
    pictures = {}
    for name, draw in drawings.items():
        try:
            picture = draw()
        except ConfigError as error:  # a report without a threshold, scores that predict no loss
            logger.info("no picture of %s: %s", name, error)
            continue
        pictures[name] = picture
    return _saved(pictures, folder, suffix)


def _saved(pictures: Mapping[str, Any], folder: Path, suffix: str) -> list[Path]:
    files = [folder / f"{name}{suffix}" for name in pictures]
    for file, picture in zip(files, pictures.values(), strict=True):
        picture.save(file)
    return files
