"""Widths before and after."""

from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from hap_hf.errors import ConfigError
from hap_hf.names.group import Kind
from hap_hf.names.shortened import short_names
from hap_hf.plots.picture import DARK, SMALL, TEXT, Picture
from hap_hf.report import PruningReport

_MOST = 60
"""Rows that fit a picture."""


def plot_widths(report: PruningReport) -> Picture:
    """Draw how many units of each group are kept (dark), implanted (hatched) and removed (white).

    Args:
        report: Any report.

    Returns:
        The picture, with a column for each kind of units.

    Raises:
        ConfigError: If the report names no group.
    """
    kinds = [kind for kind in Kind if report.units(kind)[0]]
    if not kinds:
        raise ConfigError("the report names no group, so there are no widths to draw")
    rows = min(max(sum(g.kind is kind for g in report.groups) for kind in kinds), _MOST)
    picture = Picture(min(1.1 + 0.2 * rows, 12), "Widths before and after")
    for axes, kind in zip(picture.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        groups = [g for g in report.groups if g.kind is kind]
        shown = groups[:_MOST]
        places = range(len(shown))
        survivors = [g.kept + g.implanted for g in shown]
        axes.barh(places, [g.units for g in shown], color="white", edgecolor=DARK, linewidth=0.6)
        axes.barh(places, survivors, color="white", edgecolor=DARK, linewidth=0.6, hatch="//////")
        axes.barh(places, [g.kept for g in shown], color="0.35", edgecolor=DARK, linewidth=0.6)
        for place, group in zip(places, shown, strict=True):
            left = f"{group.kept:,}" + (f"+{group.implanted:,}" if group.implanted else "")
            axes.text(group.units * 1.02, place, f"{left}/{group.units:,}", va="center", fontsize=SMALL)
        units, kept_in_all, implants = report.units(kind)
        added = f" + {implants:,} implants" if implants else ""
        more = f", first {_MOST} of {len(groups)}" if len(groups) > _MOST else ""
        axes.set_title(f"{kind.value}: {kept_in_all:,}{added} of {units:,}{more}", fontsize=TEXT)
        axes.set_yticks(places, short_names([g.name for g in shown]), fontsize=SMALL)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlim(0, max(g.units for g in shown) * 1.4)
        axes.tick_params(axis="x", labelsize=SMALL)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    looks = [("kept", "0.35", None), ("implant", "white", "//////"), ("removed", "white", None)]
    handles = [
        Patch(facecolor=face, edgecolor=DARK, linewidth=0.6, hatch=hatch, label=word)
        for word, face, hatch in looks
        if word != "implant" or any(g.implanted for g in report.groups)
    ]
    picture.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=SMALL, frameon=False)
    return picture
