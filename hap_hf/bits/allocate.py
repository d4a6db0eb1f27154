"""Bits for each layer at the lowest rise of the loss within a budget: exactly, by a dynamic programme."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hap_hf.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sensitivity:
    """What each number of bits would cost each layer, in its weights or in its inputs.

    Args:
        rise: Expected rise of the loss, by layer and bits.
        error: Standard error of each.
        sizes: Number of weights of each layer.
        tied: Layers that must have the same bits.
        activations: The same of the inputs of the layers, whose sizes are numbers of values for a sample; None where
            that was not asked.
    """

    rise: Mapping[str, Mapping[int, float]]
    error: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    tied: Sequence[Sequence[str]] = ()
    activations: "Sensitivity | None" = None


@dataclass(frozen=True)
class Allocation:
    """Bits for each layer.

    Args:
        bits: The bits, by layer.
        weight_bytes: Bytes of all weights with them.
        rise: Sum of the expected rises of the loss.
    """

    bits: Mapping[str, int]
    weight_bytes: float
    rise: float


@dataclass(frozen=True)
class _State:
    """Choices for the first layers: their bits in all, their rise, and how they came about."""

    cost: int
    rise: float
    choice: int
    before: "_State | None"


def allocate_bits(
    sensitivity: Sensitivity,
    *,
    average_bits: float | None = None,
    weight_bytes: float | None = None,
    tied: Sequence[Sequence[str]] = (),
) -> Allocation:
    """Return the bits with the lowest expected rise of the loss that fit into a budget, which is met from below.

    The rises of layers are added, as HAWQ-V2 does. Its published search goes through assignments whose bits grow with
    the mean trace alone, and misses the best one more often than not; here no assignment is left out: layers are added
    one by one, and of the sums that cost as much or more and rise as much or more than another one none can be part of
    the best.

    Reference: Dong et al., "HAWQ-V2: Hessian aware trace-weighted quantization of neural networks", NeurIPS 2020.

    Args:
        sensitivity: What :func:`~hap_hf.bit_sensitivity` returned.
        average_bits: Mean bits of a weight.
        weight_bytes: Bytes of all weights.
        tied: Further layers that must have the same bits, such as convolutions whose outputs are added.

    Returns:
        The bits; ``config.with_weight_bits(allocation.bits)`` takes them over.

    Raises:
        ConfigError: If not exactly one budget is given, or none of the assignments fits.
    """
    if (average_bits is None) == (weight_bytes is None):
        raise ConfigError("expected one of average_bits and weight_bytes, got " + ("both" if weight_bytes else "none"))
    budget = average_bits if average_bits is not None else weight_bytes
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not math.isfinite(budget):
        raise ConfigError(f"expected a number as budget, got {budget!r}")
    total = sum(sensitivity.sizes.values())
    limit = budget * total if average_bits is not None else budget * 8
    units, options = _options(sensitivity, tied)
    states = _pareto(options, math.floor(limit + 1e-6))
    if not states:
        least = sum(min(cost for cost, _ in entries.values()) for entries in options) / 8
        raise ConfigError(
            f"no assignment fits into {limit / 8:.0f} bytes: with the fewest bits of the menu the weights take "
            f"{least:.0f}; ask for more, or allow fewer bits"
        )
    return _allocation(states[-1], units)


def bit_frontier(sensitivity: Sensitivity, *, tied: Sequence[Sequence[str]] = ()) -> list[Allocation]:
    """Return all allocations that no other one beats in both size and rise, the smallest first.

    Args:
        sensitivity: What :func:`~hap_hf.bit_sensitivity` returned.
        tied: Further layers that must have the same bits.

    Returns:
        The allocations. The number of them grows with the number of different layer sizes.
    """
    units, options = _options(sensitivity, tied)
    return [_allocation(state, units) for state in _pareto(options, None)]


Options = list[dict[int, tuple[int, float]]]


def _options(sensitivity: Sensitivity, tied: Sequence[Sequence[str]]) -> tuple[list[list[str]], Options]:
    """Return which layers are decided together, and the cost in bits and the rise of each choice."""
    joined = {name: [name] for name in sensitivity.rise}
    for names in [*sensitivity.tied, *tied]:
        unknown = [name for name in names if name not in joined]
        if unknown:
            raise ConfigError(f"tied names {unknown[0]!r}, which is no layer of the sensitivity")
        together = list(dict.fromkeys(each for name in names for each in joined[name]))
        for each in together:
            joined[each] = together
    units = list({id(names): names for names in joined.values()}.values())
    options: Options = []
    negative = 0
    for names in units:
        menu = set.intersection(*(set(sensitivity.rise[name]) for name in names))
        if not menu:
            raise ConfigError(f"{' and '.join(names)} are tied and have no number of bits in common")
        size = sum(sensitivity.sizes[name] for name in names)
        entries = {}
        for bits in sorted(menu):
            rises = [sensitivity.rise[name][bits] for name in names]
            if not all(map(math.isfinite, rises)):
                raise ConfigError(f"the rise of {names[0]} at {bits} bits is not finite; measure it anew")
            negative += sum(rise < 0 for rise in rises)
            entries[bits] = (size * bits, sum(max(rise, 0.0) for rise in rises))
        options.append(entries)
    if negative:
        logger.warning("%d expected rises are below 0, as estimates of a trace can be; they count as 0", negative)
    return units, options


def _pareto(options: Options, limit: int | None) -> list[_State]:
    """Return the sums that no other one beats, by rising cost and falling rise, and none above a limit."""
    # The layers that follow need at least so much, and cannot rise by less.
    least = [min(cost for cost, _ in entries.values()) for entries in options]
    states = [_State(0, 0.0, 0, None)]
    for i, entries in enumerate(options):
        rest = sum(least[i + 1 :])
        extended = [
            _State(state.cost + cost, state.rise + rise, bits, state)
            for bits, (cost, rise) in entries.items()
            for state in states
            if limit is None or state.cost + cost + rest <= limit
        ]
        extended.sort(key=lambda state: (state.cost, state.rise))
        states, best = [], math.inf
        for state in extended:
            if state.rise < best:
                states.append(state)
                best = state.rise
    return states


def _allocation(state: _State, units: list[list[str]]) -> Allocation:
    bits: dict[str, int] = {}
    last: _State | None = state
    for names in reversed(units):
        assert last is not None
        bits |= dict.fromkeys(names, last.choice)
        last = last.before
    return Allocation(bits, state.cost / 8, state.rise)
