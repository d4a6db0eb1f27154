"""Predicted and measured loss at each size."""

from typing import Any

from hap_hf.errors import ConfigError
from hap_hf.plots.picture import DARK, MIDDLE, SMALL, TEXT, Picture
from hap_hf.tradeoff import Tradeoff


def plot_losses(sweep: Tradeoff) -> Picture:
    """Draw the loss at each size beside the one that the scores of the units that went add up to.

    Where the lines meet the scores say what happens. Where the measured one is above, units that stood in for each
    other went together; where it is below, compensation made up for some of them.

    Args:
        sweep: What was measured.

    Returns:
        The picture.

    Raises:
        ConfigError: If no point has a prediction.
    """
    points = sorted((p for p in sweep.points if p.predicted is not None and p.keep < 1), key=lambda p: -p.keep)
    if not points:
        raise ConfigError("no point has a prediction: only scores that are an increase of the loss predict one")
    dense = sweep.dense.loss
    picture = Picture(3.2, "Predicted and measured loss")
    axes = picture.subplots()
    axes.axhline(dense, color=MIDDLE, linewidth=0.8, linestyle=(0, (1, 2)), label="dense model")
    kept = [100 * p.keep for p in points]
    predicted = [dense + (p.predicted or 0.0) for p in points]
    marks: dict[str, Any] = {"markersize": 5, "markerfacecolor": "white", "linewidth": 1}
    axes.plot(kept, predicted, color=MIDDLE, marker="s", linestyle="--", label="predicted by the scores", **marks)
    axes.plot(kept, [p.loss for p in points], color=DARK, marker="o", label="measured, nothing trained", **marks)
    axes.invert_xaxis()
    axes.set_xlabel("kept of the prunable part, %", fontsize=TEXT)
    axes.set_ylabel("loss", fontsize=TEXT)
    axes.grid(color="0.9", linewidth=0.6)
    axes.tick_params(labelsize=SMALL)
    axes.legend(fontsize=SMALL, frameon=False)
    return picture
