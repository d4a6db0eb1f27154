"""The rise of the loss against bytes, and the bits of each layer."""

from collections.abc import Sequence

from hap_hf.bits import Allocation, Sensitivity, bit_frontier
from hap_hf.plots.picture import DARK, LIGHT, SMALL, TEXT, Picture


def plot_bits(
    sensitivity: Sensitivity, chosen: Allocation | None = None, *, tied: Sequence[Sequence[str]] = ()
) -> Picture:
    """Draw the frontier of all choices of bits, and one of the choices layer by layer.

    Args:
        sensitivity: What :func:`~hap_hf.bit_sensitivity` returned; its ``activations`` can be drawn, too.
        chosen: A choice to mark with a star and to draw as bars.
        tied: Further layers that must have the same bits.

    Returns:
        The picture. Squares are the choices with the same bits for all layers.
    """
    frontier = bit_frontier(sensitivity, tied=tied)
    picture = Picture(3.2, "Expected rise of the loss against bytes")
    axes, *others = picture.subplots(1, 1 if chosen is None else 2, squeeze=False)[0]
    highest = max((a.rise for a in frontier), default=0.0)
    unit, letter = (1e-6, "MB") if max(a.weight_bytes for a in frontier) >= 1e6 else (1e-3, "kB")
    x, y = [a.weight_bytes * unit for a in frontier], [a.rise for a in frontier]
    axes.plot(x, y, color=DARK, linewidth=1, drawstyle="steps-post", zorder=1, label="best for its bytes")
    total = sum(sensitivity.sizes.values())
    menu = sorted(set.intersection(*(set(rises) for rises in sensitivity.rise.values())))
    same = [(bits, sum(max(rises[bits], 0.0) for rises in sensitivity.rise.values())) for bits in menu]
    axes.scatter(
        [total * bits / 8 * unit for bits, _ in same], [rise for _, rise in same], s=30, marker="s", color="white",
        edgecolors=DARK, zorder=2, label="the same for all layers",
    )  # fmt: skip
    for bits, rise in same:
        axes.annotate(f" {bits}", (total * bits / 8 * unit, rise), fontsize=SMALL, va="bottom")
    if chosen is not None:
        axes.scatter(
            [chosen.weight_bytes * unit], [chosen.rise], s=150, marker="*", color="0.6", edgecolors=DARK, zorder=3,
            label="chosen",
        )  # fmt: skip
    if highest > 0:  # rises differ by powers of ten, and those of 8 bits may be 0
        axes.set_yscale("symlog", linthresh=highest * 1e-4)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(letter, fontsize=TEXT)
    axes.set_ylabel("expected rise, nats", fontsize=TEXT)
    axes.legend(fontsize=SMALL, frameon=False)
    axes.grid(color="0.9", linewidth=0.6)
    axes.tick_params(labelsize=SMALL)
    if chosen is not None:
        bars = others[0]
        widths = [chosen.bits[name] for name in sensitivity.rise]
        bars.bar(range(len(widths)), widths, color=LIGHT, edgecolor=DARK, linewidth=0.5)
        bars.set_xlabel("layer", fontsize=TEXT)
        bars.set_ylabel("bits", fontsize=TEXT)
        bars.set_yticks(menu)
        bars.tick_params(labelsize=SMALL)
    return picture
