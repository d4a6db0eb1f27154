"""How sure the choice is: units near the threshold."""

import torch

from hap_hf.criteria.stopping import near_threshold
from hap_hf.errors import ConfigError
from hap_hf.plots.picture import DARK, LIGHT, MIDDLE, SMALL, TEXT, Picture
from hap_hf.report import PruningReport

_MANY = 1000


def plot_threshold(report: PruningReport) -> Picture:
    """Draw all units in the order of their sensitivity, and which of them lie within two standard errors of the cut.

    Sensitivities are divided by that at which their group is cut, so that the cut is at 1 for all. Units that went in
    an earlier pass were cut before this threshold was found, and are left out.

    Args:
        report: A report with scores.

    Returns:
        The picture.

    Raises:
        ConfigError: If the report has no scores, or no threshold.
    """
    scores = report.scores
    if scores is None:
        raise ConfigError("the report has no scores; keep pruning_scores.safetensors beside pruning_report.json")
    values, errors = [], []
    for group in report.groups:
        if group.limit is not None and group.limit > 0 and group.name in scores.sensitivity:
            gone = scores.gone_in.get(group.name)
            last = torch.ones(group.units, dtype=torch.bool) if gone is None else gone == 0
            values.append(scores.sensitivity[group.name][last] / group.limit)
            errors.append(scores.standard_error[group.name][last] / group.limit)
    if not values:
        raise ConfigError("the report has no threshold above 0, so there is no cut to draw")
    value, error = torch.cat(values), torch.cat(errors)
    order = value.argsort()
    value, error = value[order], error[order]
    near = near_threshold(value, error, 1.0)
    picture = Picture(3.2, "How sure the choice is")
    axes = picture.subplots()
    rank = torch.arange(len(value))
    low = (value - 2 * error).clamp(min=1e-3)
    axes.fill_between(rank, low, value + 2 * error, color=LIGHT, step="mid", linewidth=0, label="± 2 standard errors")
    # Of thousands, marks of the usual size would hide each other.
    small, large, larger = (5, 12, 1) if len(value) < _MANY else (2, 3, 2)
    axes.scatter(rank[~near], value[~near].clamp(min=1e-3), s=small, color=MIDDLE, label="decided")
    axes.scatter(
        rank[near], value[near], s=large, marker="D", color=DARK, label="within two standard errors of the cut"
    )
    axes.axhline(1, color=DARK, linestyle=(0, (3, 1)), linewidth=1.2, label="cut")
    axes.set_yscale("log")
    # Far from the cut nothing is decided.
    axes.set_ylim(max(value[value > 0].min().item() / 2, 1e-3) if (value > 0).any() else 1e-3, None)
    axes.set_xlabel("units, the least sensitive first", fontsize=TEXT)
    axes.set_ylabel("sensitivity / sensitivity at the cut", fontsize=TEXT)
    axes.set_title(f"{int(near.sum()):,} of {len(value):,} units lie within two standard errors", fontsize=TEXT)
    axes.tick_params(labelsize=SMALL)
    picture.legend(loc="outside lower center", ncols=4, fontsize=SMALL, frameon=False, markerscale=larger)
    return picture
