"""Accuracy against size and time."""

from hap_hf.plots.picture import DARK, SMALL, TEXT, Picture
from hap_hf.tradeoff import Tradeoff, TradeoffPoint


def plot_tradeoff(sweep: Tradeoff, chosen: TradeoffPoint | None = None) -> Picture:
    """Draw what is left of the accuracy, or the loss, against parameters, multiply-accumulates and milliseconds.

    Args:
        sweep: What was measured; the dense model, a square, is its first point.
        chosen: A point to mark with a star; by default ``sweep.chosen()``.

    Returns:
        The picture, with a column for each of the three that was measured.
    """
    chosen = chosen or sweep.chosen()
    size, letter = (1e-6, "M") if sweep.dense.params >= 1e6 else (1e-3, "k")
    measured = [("params", size, f"{letter} parameters"), ("macs", 1e-6, "M MACs"), ("milliseconds", 1, "milliseconds")]
    columns = [c for c in measured if all(getattr(p, c[0]) is not None for p in sweep.points)]
    picture = Picture(2.9, f"{sweep.metric.capitalize()} against size and time")
    every = picture.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, (name, scale, label) in zip(every, columns, strict=True):
        points = sorted(sweep.points, key=lambda p: -p.keep)
        x, y = [getattr(p, name) * scale for p in points], [p.value for p in points]
        axes.plot(x, y, color=DARK, linewidth=1, zorder=1)
        axes.scatter(x[1:], y[1:], s=18, color="white", edgecolors=DARK, zorder=2, label="pruned")
        axes.scatter(x[:1], y[:1], s=34, marker="s", color=DARK, zorder=2, label="dense")
        if chosen is not None:
            axes.scatter(
                [getattr(chosen, name) * scale], [chosen.value], s=150, marker="*", color="0.6", edgecolors=DARK,
                zorder=3, label=f"chosen: keeps {chosen.keep:.0%} of the prunable part",
            )  # fmt: skip
        axes.set_xlabel(label, fontsize=TEXT)
        axes.set_xlim(0, max(x) * 1.08)
        axes.grid(color="0.9", linewidth=0.6)
        axes.tick_params(labelsize=SMALL)
        handles = axes.get_legend_handles_labels()
    # Without a least range, noise in the last digit would look like a cliff.
    values = [p.value for p in sweep.points]
    room = max(max(values) - min(values), 0.1 * abs(sweep.dense.value), 1e-6) * 0.6
    middle = (max(values) + min(values)) / 2
    every[0].set_ylim(middle - room, middle + room)
    every[0].set_ylabel(sweep.metric, fontsize=TEXT)
    picture.legend(*handles, loc="outside lower center", ncols=3, fontsize=SMALL, frameon=False)
    return picture
