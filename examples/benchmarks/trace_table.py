"""How well estimators rank units, as a table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor
from trace_runs import SAME_PROBES

Row = dict[str, Any]


@dataclass(frozen=True)
class Reference:
    """Scores that others are compared with.

    Args:
        values: Sensitivity of each unit, ``[num_units of all groups]``.
        errors: Their standard errors by the noise of the probes, ``[num_units of all groups]``.
        num_probes: Probes for each batch; 0 if there is no noise.
    """

    values: Tensor
    errors: Tensor
    num_probes: int

    @classmethod
    def of(cls, parts: Sequence[Row]) -> "Reference":
        """Return the mean of independent parts, each counting by its number of probes."""
        numbers = torch.tensor([[part["num_probes"]] for part in parts], dtype=torch.float64)
        values, errors = (
            torch.tensor([p[key] for p in parts], dtype=torch.float64) for key in ("sensitivity", "error")
        )
        shares = numbers / numbers.sum()
        return cls((shares * values).sum(0), (shares * errors).square().sum(0).sqrt(), int(numbers.sum()))

    @property
    def relative_error(self) -> float:
        """Median of the standard errors, each relative to its score; a unit without curvature has none."""
        return (self.errors / self.values.abs()).nan_to_num(0.0, posinf=math.inf).median().item()


def to_markdown(rows: Sequence[Row], groups: Sequence[tuple[str, int]], reference: Reference, method: str) -> str:
    """Return the comparison as a table, and below it what it was made with.

    Args:
        rows: Rows of all estimators.
        groups: Kind and number of units of each group.
        reference: What the scores are compared with.
        method: How that was estimated.

    Returns:
        The text in markdown.
    """
    owners = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor([count for _, count in groups]))
    kinds = {kind: torch.tensor([k == kind for k, _ in groups])[owners] for kind in sorted({k for k, _ in groups})}
    good = [row for row in rows if "failed" not in row]
    ggn = next((row["seconds"] for row in good if row["estimator"] == "ggn"), math.nan)
    same = {row["num_probes"]: row["sensitivity"] for row in good if row["estimator"] == "hessian"}
    head = ["estimator", "probes", "time, s", "CPU time, s", "times ggn", "s a probe", "memory, MiB", "Spearman"]
    head += [*(kinds if len(kinds) > 1 else ()), "half found", "off by"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in rows:
        if "failed" in row:
            lines.append([row["estimator"], row["failed"].replace("|", "/"), *[""] * (len(head) - 2)])
            continue
        number, values = row["num_probes"], torch.tensor(row["sensitivity"], dtype=torch.float64)
        cells = [row["estimator"], str(number or "all"), f"{row['seconds']:.2f}", f"{row['cpu_seconds']:.2f}"]
        cells += [f"{row['seconds'] / ggn:.1f}", f"{row['seconds'] / number:.3f}" if number else ""]
        cells += [f"{row['mebibytes']:.0f}", _correlation(values, reference.values)]
        if len(kinds) > 1:
            cells += [_correlation(values[mask], reference.values[mask]) for mask in kinds.values()]
        cells.append(f"{half_found(values, reference.values):.3f}")
        known = row["estimator"] in SAME_PROBES and number in same
        cells.append(f"{largest_difference(values, torch.tensor(same[number]), owners):.0e}" if known else "")
        lines.append(cells)
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n\n"
    counted = " and ".join(f"{int(mask.sum())} {kind}" for kind, mask in kinds.items())
    text += f"{counted}. Reference: {method}, {reference.num_probes or 'no'} probes; median standard error "
    negative = (reference.values < 0).double().mean()
    text += f"{reference.relative_error:.1%} of the score; {negative:.1%} of the scores negative.\n"
    times = {row["num_probes"]: row["seconds"] for row in good if row["estimator"] == "hessian"}
    if times and not math.isnan(ggn):
        text += f"{max(times)} probes of hessian take {times[max(times)] / ggn:.1f} times as long as ggn.\n"
    return text


def half_found(values: Tensor, truth: Tensor) -> float:
    """Return which share of the half of the units that ``truth`` puts last is in the half that ``values`` puts last."""
    half = len(truth) // 2
    last = [set(torch.argsort(scores, stable=True)[:half].tolist()) for scores in (values, truth)]
    return len(last[0] & last[1]) / half


def largest_difference(values: Tensor, truth: Tensor, owners: Tensor) -> float:
    """Return the largest difference between two scores of a unit, relative to the largest score of its group.

    Args:
        values: Scores, ``[num_units of all groups]``.
        truth: The scores that they should be.
        owners: Index of the group of each unit.

    Returns:
        The difference.
    """
    largest = torch.zeros(int(owners.max()) + 1, dtype=torch.float64)
    largest = largest.scatter_reduce(0, owners, truth.abs().double(), "amax")
    return ((values - truth).abs() / largest[owners]).max().item()


def _correlation(values: Tensor, truth: Tensor) -> str:
    return f"{spearmanr(values.numpy(), truth.numpy()).statistic:.3f}"
