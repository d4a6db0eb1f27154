"""Sensitivity of every unit by layer, with standard errors."""

import math

from hap_hf.errors import ConfigError
from hap_hf.names.group import Kind
from hap_hf.names.shortened import short_names
from hap_hf.plots.picture import DARK, LIGHT, MIDDLE, SMALL, TEXT, Picture
from hap_hf.report import PruningReport

_SHOWN = 64
"""Units of a group that can be told apart in a row; of more only the outermost have room."""


def plot_sensitivity(report: PruningReport, kind: Kind | str = Kind.HEADS) -> Picture:
    """Draw the sensitivity of every unit of a kind, a band for each layer and a mark for each unit.

    A full circle is kept, a square is an implant, a cross is gone. The line through a mark reaches two standard errors
    to either side. A short upright line in a band is where that layer's units are cut.

    Args:
        report: A report with scores.
        kind: Which units; heads have room for one mark each, of wider groups the marks overlap.

    Returns:
        The picture.

    Raises:
        ConfigError: If the report has no scores, or nothing of the kind was scored.
    """
    scores, kind = report.scores, Kind(kind)
    if scores is None:
        raise ConfigError("the report has no scores; keep pruning_scores.safetensors beside pruning_report.json")
    groups = [g for g in report.groups if g.kind is kind and g.name in scores.sensitivity and g.actions]
    if not groups:
        known = sorted({g.kind.value for g in report.groups if g.name in scores.sensitivity})
        raise ConfigError(f"no {kind.value} were scored, only {known}")
    picture = Picture(min(1.0 + 0.42 * len(groups), 12), f"Sensitivity of {kind.value} by layer")
    axes = picture.subplots()
    for row, group in enumerate(groups):
        values, errors = scores.sensitivity[group.name], scores.standard_error[group.name]
        step = 0.8 / max(group.units - 1, 1)
        heights = [row - 0.4 + unit * step for unit in range(group.units)]
        if row % 2:
            axes.axhspan(row - 0.5, row + 0.5, color="0.95", zorder=0)
        if group.units <= _SHOWN:
            axes.hlines(heights, values - 2 * errors, values + 2 * errors, color=MIDDLE, linewidth=0.8, zorder=1)
        for letter, marker, face in (("k", "o", DARK), ("i", "s", LIGHT), ("p", "x", DARK)):
            chosen = [unit for unit, action in enumerate(group.actions) if action == letter]
            if chosen:
                axes.scatter(
                    values[chosen],
                    [heights[unit] for unit in chosen],
                    s=14 if group.units <= _SHOWN else 3,
                    marker=marker,
                    c=face,
                    edgecolors=None if marker == "x" else DARK,
                    linewidths=0.8,
                    zorder=2,
                )
        if group.limit is not None:
            axes.vlines(group.limit, row - 0.5, row + 0.5, color=DARK, linewidth=1.2, linestyle=(0, (3, 1)), zorder=3)
    for marker, face, word in (("o", DARK, "kept"), ("s", LIGHT, "implant"), ("x", DARK, "removed")):
        if word != "implant" or any(g.implanted for g in groups):
            axes.scatter([], [], s=14, marker=marker, c=face, edgecolors=None if marker == "x" else DARK, label=word)
    axes.plot([], [], color=DARK, linewidth=1.2, linestyle=(0, (3, 1)), label="cut")
    axes.plot([], [], color=MIDDLE, linewidth=0.8, label="± 2 standard errors")
    # Sensitivities span decades, and noise makes some of them negative.
    every = [scores.sensitivity[g.name].abs() for g in groups]
    typical = sorted(float(v) for values in every for v in values if v > 0)
    if typical:
        # A power of ten, or the mark of the one below would lie upon that of zero.
        linear = 10.0 ** math.ceil(math.log10(typical[len(typical) // 10]))
        axes.set_xscale("symlog", linthresh=linear)
        # Lines that reach far below zero say no more than that they do.
        lowest = min(float(scores.sensitivity[g.name].min()) for g in groups)
        axes.set_xlim(left=min(-0.5 * linear, 2 * lowest))
    axes.set_yticks(range(len(groups)), short_names([g.name for g in groups]), fontsize=SMALL)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=SMALL)
    axes.set_xlabel(f"increase of the loss without the unit ({scores.method})", fontsize=TEXT)
    picture.legend(loc="outside lower center", ncols=5, fontsize=SMALL, frameon=False)
    return picture
