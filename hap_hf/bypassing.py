"""Low-rank paths beside blocks: which of them pay, and what is cut to pay for them."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from hap_hf.compensation import Compensation
from hap_hf.config import HapConfig
from hap_hf.criteria import Scores
from hap_hf.evidence.evidence import Evidence
from hap_hf.layers.projection import input_dim, output_dim
from hap_hf.names.amount import Amount
from hap_hf.names.bypass import BypassPlan
from hap_hf.names.currencies import Currency
from hap_hf.names.group import Group
from hap_hf.names.outcome import outcomes, whole
from hap_hf.names.plan import GroupPlan
from hap_hf.reconstruction import PathGains, Repair, bypassed_repair
from hap_hf.selection import select_groups
from hap_hf.selection.make import Choice, choose

logger = logging.getLogger(__name__)

_MOST_SHARE = 0.5
"""Paths may take at most this share of what is to be left."""

_DISCOUNTS = (1.0, 0.3, 0.1)
"""Of the price, one after the other, as long as the loss falls."""


@dataclass(frozen=True)
class Bypassed:
    """A choice of units with paths beside their blocks.

    Args:
        choice: The units.
        repair: The weights of what stays and of the paths.
        bypasses: The paths, with the inputs and outputs that are left after the cut.
    """

    choice: Choice
    repair: Repair
    bypasses: tuple[BypassPlan, ...]


def with_bypasses(
    evidence: Evidence,
    groups: Sequence[Group],
    scores: Scores,
    config: HapConfig,
    choice: Choice,
    repair: Repair,
    compensation: Compensation | None,
) -> Bypassed | None:
    """Return another choice within the same amount, which leaves room for paths beside blocks, if it is better.

    A direction of a path is worth what it wins of the loss, and costs its inputs and outputs. Both are compared with a
    unit's: it is taken where it wins more for its cost than the least sensitive unit that stays. What the directions
    cost is then taken from what units may cost, units are chosen again, and everything is fitted once more. The loss of
    the whole model decides, also whether lower prices, and with them more directions, are better still: scores say what
    a unit is worth before everything is fitted to its absence, and then it is worth less.

    Args:
        evidence: What to fit to, and to compute the loss on.
        groups: The groups of the model.
        scores: Sensitivities of the units.
        config: How much to cut.
        choice: The choice without paths.
        repair: The repair without, with what paths would win.
        compensation: What was measured for layers that are not fitted one by one.

    Returns:
        The choice with paths; None where none pays, or the loss with them is not lower.
    """
    best: Bypassed | None = None
    lowest = repair.loss
    for discount in _DISCOUNTS:
        found = _at_price(evidence, groups, scores, config, discount * max(choice.threshold, 0.0), repair, compensation)
        if found is None:
            continue
        loss = found.repair.loss
        if loss is None or lowest is None or not loss < lowest:
            break
        best, lowest = found, loss
    return best


def with_given_bypasses(
    evidence: Evidence,
    stage: Sequence[GroupPlan],
    bypasses: Sequence[BypassPlan],
    repair: Repair,
    compensation: Compensation | None,
) -> Repair:
    """Return a repair with weights for paths that are part of a plan, if it is better than with silent ones.

    Args:
        evidence: What to fit to, and to compute the loss on.
        stage: What happens to the units.
        bypasses: The paths.
        repair: The repair without.
        compensation: What was measured for layers that are not fitted one by one.

    Returns:
        The better one. Without weights for them, paths add nothing until they are trained.
    """
    wanted = {b.exit: b.rank for b in bypasses}
    found = bypassed_repair(evidence, stage, compensation, wanted)
    fitted = {b.exit: b.rank for b in found.bypasses} == wanted
    if fitted and found.loss is not None and (repair.loss is None or found.loss < repair.loss):
        return found
    logger.info("%d bypasses of the plan begin silent: %s", len(wanted), found.loss if fitted else "cannot be fitted")
    return repair


def _at_price(
    evidence: Evidence,
    groups: Sequence[Group],
    scores: Scores,
    config: HapConfig,
    price: float,
    repair: Repair,
    compensation: Compensation | None,
) -> Bypassed | None:
    """Return the choice with the directions that pay at a price; None where there are none."""
    what, keep, model = config.asked.what, config.asked.keep, evidence.model
    chosen = what.cost(whole(select_groups(groups, config)))
    ranks, cost = _within(repair.gains, scores, price, what, model, _MOST_SHARE * keep * chosen)
    less = config.with_amount(Amount(what, keep - cost / chosen))
    other = choose(groups, scores, less) if ranks else "no direction wins more than the units that would pay for it"
    if isinstance(other, str):
        logger.info("no bypasses at a price of %.3g: %s", price, other)
        return None
    found = bypassed_repair(evidence, other.stage, compensation, ranks)
    numbers = sorted(ranks.values())
    logger.info(
        "%d bypasses of rank %d to %d: loss %s, %s without",
        len(ranks),
        numbers[0],
        numbers[-1],
        found.loss,
        repair.loss,
    )
    return Bypassed(other, found, tuple(_after(b, other.stage, model) for b in found.bypasses))


def _within(
    gains: Sequence[PathGains], scores: Scores, price: float, what: Currency, model: nn.Module, most: float
) -> tuple[dict[str, int], float]:
    """Return the ranks that pay and what they cost together, at most as much as allowed."""
    while True:
        ranks = ranks_that_pay(gains, scores.sensitivity, price, what, model)
        paths = [g.block.path(model, ranks[g.block.exit]) for g in gains if g.block.exit in ranks]
        cost = sum(what.path_cost(path) or 0.0 for path in paths)
        if cost <= most:
            return ranks, cost
        price = 2 * price if price else 1e-12


def ranks_that_pay(
    gains: Sequence[PathGains], sensitivity: Mapping[str, Tensor], price: float, what: Currency, model: nn.Module
) -> dict[str, int]:
    """Return how many directions each path should have.

    The squared error of the stream behind a block is turned into loss at the rate at which the units that go do it:
    their sensitivities, which are increases of the loss, over what they add to the stream.

    Args:
        gains: What directions win of the squared error.
        sensitivity: Of the units, by the name of the group.
        price: Loss for each unit of cost.
        what: What costs are counted in.
        model: The model that the paths are for.

    Returns:
        The ranks by the name of the last layer of the block; without those where no direction pays.
    """
    ranks = {}
    for g in gains:
        lost = sensitivity[g.block.group][list(g.block.removed)].double().clamp_min(0).sum().item()
        cost = what.path_cost(g.block.path(model, 1))
        if cost is None or not (lost > 0 and g.energy > 0):
            continue
        # Of what a unit that goes took along, too, only this share would be left.
        net = (g.gains.double() * (lost / g.energy) - g.left * price * cost).cumsum(0)
        best = int(net.argmax())
        if net[best] > 0:
            ranks[g.block.exit] = best + 1
    return ranks


def _after(b: BypassPlan, stage: Sequence[GroupPlan], model: nn.Module) -> BypassPlan:
    """Return a path with the inputs and outputs that a cut leaves."""
    left = outcomes(stage)
    first, last = left.get(f"{b.entry}.weight"), left.get(f"{b.exit}.weight")
    inputs = b.inputs if first is None else first.shape[input_dim(model.get_submodule(b.entry))]
    outputs = b.outputs if last is None else last.shape[output_dim(model.get_submodule(b.exit))]
    return replace(b, inputs=inputs, outputs=outputs)
