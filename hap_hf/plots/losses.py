"""Predicted against measured loss."""

from hap_hf.errors import ConfigError
from hap_hf.plots.picture import DARK, MIDDLE, SMALL, TEXT, Picture
from hap_hf.tradeoff import Tradeoff


def plot_losses(sweep: Tradeoff) -> Picture:
    """Draw how much the loss rose against what the scores of the units that went add up to.

    On the diagonal the scores say what happens. Above it, units that stood in for each other went together; below it,
    compensation made up for some of them.

    Args:
        sweep: What was measured.

    Returns:
        The picture.

    Raises:
        ConfigError: If no point has a prediction.
    """
    points = [p for p in sweep.points if p.predicted is not None and p.keep < 1]
    if not points:
        raise ConfigError("no point has a prediction: only scores that are an increase of the loss predict one")
    picture = Picture(3.6, "Predicted and measured increase of the loss")
    axes = picture.subplots()
    predicted = [p.predicted or 0.0 for p in points]
    measured = [p.loss - sweep.dense.loss for p in points]
    least = min((v for v in [*predicted, *measured] if v > 0), default=1e-6)
    most = max([*predicted, *measured, 2 * least])
    axes.plot([least / 2, most * 2], [least / 2, most * 2], color=MIDDLE, linestyle=(0, (3, 1)), label="as predicted")
    for rose, marker, word in ((True, "o", "loss rose"), (False, "v", "loss fell or stayed, drawn at the bottom")):
        chosen = [(x, max(y, least / 2)) for x, y in zip(predicted, measured, strict=True) if (y > 0) == rose]
        if chosen:
            x, y = zip(*chosen, strict=True)
            axes.scatter(x, y, s=26, marker=marker, color="white", edgecolors=DARK, zorder=2, label=word)
    for point, at, rise in zip(points, predicted, measured, strict=True):
        axes.annotate(
            f"{point.keep:.0%}", (at, max(rise, least / 2)), (5, -3), textcoords="offset points", fontsize=SMALL
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("sum of the sensitivities of what went", fontsize=TEXT)
    axes.set_ylabel("measured increase", fontsize=TEXT)
    axes.set_title("share of the prunable part that is kept beside each point", fontsize=TEXT)
    axes.tick_params(labelsize=SMALL)
    axes.legend(fontsize=SMALL, frameon=False)
    return picture
