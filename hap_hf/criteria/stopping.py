"""When there have been enough probes: few units are left whose place beside the threshold noise could change."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hap_hf.names.actions import KEEP, PRUNE
from hap_hf.names.amount import Amount, fewest_cut
from hap_hf.names.currencies import Currency
from hap_hf.names.group import Group
from hap_hf.names.plan import GroupPlan


def near_threshold(values: Tensor, errors: Tensor, threshold: float) -> Tensor:
    """Return which units lie within two standard errors of the threshold; an exact score is never undecided.

    Args:
        values: Sensitivity of each unit, ``[num_units]``.
        errors: Their standard errors, ``[num_units]``.
        threshold: Sensitivity of the least sensitive unit above the cut.

    Returns:
        True for those units, ``[num_units]``.

    Example:
        >>> near_threshold(torch.tensor([0.0, 0.9, 1.5, 3.0]), torch.tensor([0.1, 0.1, 0.0, 1.0]), threshold=1.0)
        tensor([False,  True, False,  True])
    """
    return ((values - threshold).abs() <= 2 * errors) & (errors > 0)


def expected_threshold(groups: Sequence[Group], values: Tensor, amount: Amount) -> float:
    """Return the sensitivity of the least sensitive unit above the cut, as far as scores alone tell.

    All units are ranked together. For a share of the units this is the threshold of the plan. For a budget it is that
    of removing the least sensitive units one by one until the rest fits; limits of groups, ``round_to`` and the cost of
    implants are left to the plan.

    Args:
        groups: The groups whose units compete.
        values: Sensitivity of each unit, or that per cost, group after group, ``[num_units of all groups]``.
        amount: How much is to be left.

    Returns:
        The threshold.
    """
    # Stable, as the ranking of the plan is, so that ties fall alike.
    ordered, order = torch.sort(values, stable=True)
    last = len(values) - 1
    cut = amount.what.num_cut(amount.keep, len(values))
    if cut is None:
        owners = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor([g.num_units for g in groups]))[order]

        def left(cut: int) -> float:
            # Which of a group's units go makes no difference to what they cost, only how many.
            gone = torch.bincount(owners[:cut], minlength=len(groups)).tolist()
            plans = [GroupPlan(g, PRUNE * n + KEEP * (g.num_units - n)) for g, n in zip(groups, gone, strict=True)]
            return amount.what.cost(plans)

        cut = fewest_cut(left, amount.limit(groups), last)
    return ordered[min(cut, last)].item()


def few_undecided(
    groups: Sequence[Group], amount: Amount, per: Currency | None, most: float
) -> Callable[[Tensor, Tensor], bool]:
    """Return a stop rule.

    Args:
        groups: The groups whose units compete.
        amount: How much is to be left.
        per: What sensitivities are divided by before they are compared; None for nothing.
        most: Share of the units that may be undecided.

    Returns:
        Whether less than that share of the units are undecided, given their sensitivities and standard errors.
    """
    # [num_units of all groups]
    costs = torch.tensor([per.unit_cost(g) if per else 1.0 for g in groups for _ in range(g.num_units)]).double()

    def is_decided(values: Tensor, errors: Tensor) -> bool:
        values, errors = values / costs, errors / costs
        near = near_threshold(values, errors, expected_threshold(groups, values, amount))
        return near.double().mean().item() < most

    return is_decided
