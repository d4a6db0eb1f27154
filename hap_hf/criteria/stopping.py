"""When there have been enough probes: few units are left whose place beside the threshold noise could change."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hap_hf.config import HapConfig
from hap_hf.names.amount import floor_share
from hap_hf.names.footprint import footprint
from hap_hf.names.group import Group
from hap_hf.names.plan import KEEP, PRUNE, GroupPlan


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


def expected_threshold(groups: Sequence[Group], values: Tensor, config: HapConfig) -> float:
    """Return the sensitivity of the least sensitive unit above the cut, as far as scores alone tell.

    All units are ranked together. For ``prune_ratio`` this is the threshold of the plan. For ``target_params`` and
    ``target_macs`` it is that of removing the least sensitive units one by one until the rest fits; limits of groups,
    ``round_to`` and the cost of implants are left to the plan.

    Args:
        groups: The groups whose units compete.
        values: Sensitivity of each unit, or that per cost, group after group, ``[num_units of all groups]``.
        config: How much to cut.

    Returns:
        The threshold.
    """
    ordered, order = torch.sort(values, stable=True)
    if config.prune_ratio is not None:
        cut = floor_share(config.prune_ratio * len(values))
        return ordered[min(cut, len(values) - 1)].item()
    owners = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor([g.num_units for g in groups]))[order]

    def left(cut: int) -> float:
        gone = torch.bincount(owners[:cut], minlength=len(groups)).tolist()
        plans = (GroupPlan(g, PRUNE * n + KEEP * (g.num_units - n)) for g, n in zip(groups, gone, strict=True))
        rest = footprint(plans)
        return rest.macs if config.target_params is None else rest.params

    limit = (config.target_params or config.target_macs or 0.0) * left(0)
    low, high = 0, len(values) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if left(middle) > limit else (low, middle)
    return ordered[high].item()


def few_undecided(groups: Sequence[Group], config: HapConfig) -> Callable[[Tensor, Tensor], bool] | None:
    """Return the stop rule of ``config``.

    Args:
        groups: The groups whose units compete.
        config: How much to cut, and ``stop_share``.

    Returns:
        Whether less than ``stop_share`` of the units are undecided, given their sensitivities and standard errors; None
        where there is no such rule.
    """
    share = config.stop_share
    if share is None:
        return None
    costs = torch.tensor([g.unit_cost(config.per) for g in groups for _ in range(g.num_units)], dtype=torch.float64)

    def decided(values: Tensor, errors: Tensor) -> bool:
        values, errors = values / costs, errors / costs
        near = near_threshold(values, errors, expected_threshold(groups, values, config))
        return near.double().mean().item() < share

    return decided
