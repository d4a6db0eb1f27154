"""Numbers of a report for a tracker: what each kind and each group lost, and how sensitive it is."""

import math

from hap_hf.names.group import Kind
from hap_hf.report.report import PruningReport


def details_of(report: PruningReport) -> dict[str, float]:
    """Return what a tracker shows beside the main numbers, under names that begin with ``hap/``.

    Args:
        report: What one round did.

    Returns:
        The share of units kept (implants are not) of each kind and of each group, the mean and the least sensitivity
        of each scored group, the loss right before and after the cut, and the seconds of each step.
    """
    values: dict[str, float | None] = {"hap/loss/before": report.loss_before, "hap/loss/after": report.loss_after}
    for kind in Kind:
        units, kept, _ = report.units(kind)
        if units:
            values[f"hap/kept/{kind.value}"] = kept / units
    scores = {} if report.scores is None else report.scores.sensitivity
    for group in report.groups:
        # As folders, in which trackers sort what they show; a colon is none of the characters that TensorBoard keeps.
        name = group.name.replace(":", "/")
        values[f"hap/kept/{name}"] = group.kept / group.units
        if group.name in scores:
            values[f"hap/sensitivity/{name}/mean"] = scores[group.name].mean().item()
            values[f"hap/sensitivity/{name}/least"] = scores[group.name].min().item()
    values |= {f"hap/seconds/{step}": seconds for step, seconds in report.seconds.items()}
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
