"""Units and bits out of one budget: a file of at most so many bytes."""

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hap_hf.bits import Allocation, BitConfig, BitReport, Sensitivity, allocate_bits, bit_sensitivity, quantize_
from hap_hf.config import HapConfig
from hap_hf.criteria import Magnitude, Random
from hap_hf.decision import Decision
from hap_hf.errors import ConfigError
from hap_hf.evidence.losses import LossFunction
from hap_hf.layers.quantized import weight_names
from hap_hf.model.quantizing import apply_bits_, file_bytes, saved_state
from hap_hf.model.rollback import undone_on_error
from hap_hf.names.actions import PRUNE
from hap_hf.names.amount import Amount
from hap_hf.names.bits import BitPlan, LayerBits, Rounding, Stored
from hap_hf.names.checks import at_least
from hap_hf.pipeline import carry_out_, decide, decide_again
from hap_hf.report import PruningReport
from hap_hf.surgery import apply_plan_

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A share of the units, and what bits could do with the rest.

    Args:
        keep: Share that is kept, in the currency of the config; 1 where nothing goes.
        removed: Expected rise of the loss by the units that go.
        sensitivity: Expected rises by fewer bits, of what is left of the layers.
        shapes: Rows and columns of the weights of each layer, as they are packed; a shared one under its first name.
        fixed: Bytes of a file beside the packed weights.
    """

    keep: float
    removed: float
    sensitivity: Sensitivity
    shapes: Mapping[str, Sequence[tuple[int, int]]]
    fixed: int

    def num_bytes(self, bits: Mapping[str, int]) -> int:
        """Return the bytes of a file with so many bits for each layer: each row is packed by itself."""
        return self.fixed + sum(
            rows * -(-columns * bits[name] // 8) for name, own in self.shapes.items() for rows, columns in own
        )

    def within(self, target_bytes: int) -> Allocation | None:
        """Return the best bits with which a file has at most so many bytes, or None if none are few enough."""
        limit = float(target_bytes - self.fixed)
        while limit > 0:
            try:
                found = allocate_bits(self.sensitivity, weight_bytes=limit)
            except ConfigError:  # even the fewest bits of the menu take more
                return None
            excess = self.num_bytes(found.bits) - target_bytes
            if excess <= 0:
                return found
            limit = min(limit, found.weight_bytes) - excess  # what the ends of rows take
        return None


@dataclass(frozen=True)
class BytesReport:
    """What came of a search for the best model in so many bytes.

    Args:
        pruning: What was removed; None where nothing was.
        bits: What was quantized, with the bytes of the file.
        keep: Share of the units that was kept, in the currency of the config.
        rise: Expected rise of the loss, by units and bits together.
        tried: Share and expected rise of each candidate that fits.
    """

    pruning: PruningReport | None
    bits: BitReport
    keep: float
    rise: float
    tried: tuple[tuple[float, float], ...]

    def __str__(self) -> str:
        """Return both tables, and what was tried."""
        tried = ", ".join(f"{keep:.3g}: {rise:.3g}" for keep, rise in sorted(self.tried))
        text = f"{self.bits}\nkept {self.keep:.3g}, expected rise of the loss {self.rise:.3g}; rises by share: {tried}"
        return text if self.pruning is None else f"{self.pruning}\n{text}"


def prune_to_bytes(
    model: nn.Module,
    batches: Iterable[Any],
    target_bytes: int,
    config: HapConfig,
    bits: BitConfig | None = None,
    *,
    held_out: Iterable[Any] | None = None,
    menu: Sequence[int] = (3, 4, 6, 8),
    num_shares: int = 12,
    loss_fn: LossFunction | None = None,
) -> BytesReport:
    """Prune and quantize ``model`` in place, so that its file has at most ``target_bytes`` at the least expected loss.

    A unit that goes has 0 bits: its sensitivity and the rise by rounding are rises of the same loss, and are added.
    Units and bits are scored once. For each of some shares the least sensitive units are taken to be gone, and what is
    left of the budget is given to the layers exactly (:func:`~hap_hf.allocate_bits`), the rise of a layer's bits in
    proportion to the weights that are left of it. The share with the smallest sum is carried out.

    Args:
        model: A trained model in float32, neither pruned with implants nor quantized.
        batches: What to score and repair on, as for :func:`~hap_hf.prune`, and to take ranges of activations from.
        target_bytes: Bytes of the tensors in its file.
        config: How to prune; its amount is the smallest share that may be kept.
        bits: How to round; its ``weight_bits`` are chosen here.
        held_out: Batches with labels to measure the rise by rounding on, best of samples that the model was not trained
            on; ``batches`` by default.
        menu: Numbers of bits to choose from.
        num_shares: Number of shares that are compared, from the smallest to 1.
        loss_fn: As for :func:`~hap_hf.prune`.

    Returns:
        What was removed, the bits, and what was compared.

    Raises:
        ConfigError: If no share and no bits of the menu are small enough, or a setting is out of range; the model is as
            it was.
    """
    at_least("target_bytes", target_bytes, 1)
    at_least("num_shares", num_shares, 2)
    if config.implant_ratio:
        raise ConfigError("the sum of bytes is made for units that go: set implant_ratio=0")
    if isinstance(config.criterion, (Magnitude, Random)):
        raise ConfigError(
            f"{config.criterion} says nothing of the loss, to which the rise by rounding could be added; use the "
            "default criterion"
        )
    own, drawn = bits if bits is not None else BitConfig(), list(batches)
    sensitivity = bit_sensitivity(
        model, drawn if held_out is None else held_out, own, menu=menu, loss_fn=loss_fn, progress=config.progress
    )
    evidence = config.evidence(model, drawn, loss_fn=loss_fn)
    decision = decide(evidence, config)
    least, what = config.asked.keep, config.asked.what
    shares = torch.linspace(least, 1, num_shares, dtype=torch.float64).tolist()[:-1]
    candidates = [candidate_of(model, None, 1.0, sensitivity)]
    for keep in shares:
        less = config.with_amount(Amount(what, keep), compensate=False, reconstruct=False)
        candidates.append(candidate_of(model, decide_again(decision, less), keep, sensitivity))
    fitting = [(c, found) for c in candidates if (found := c.within(target_bytes)) is not None]
    if not fitting:
        fewest = dict.fromkeys(sensitivity.rise, min(menu))
        smallest = min(candidates, key=lambda c: c.num_bytes(fewest))
        raise ConfigError(
            f"no choice fits into {target_bytes:,} bytes: with {smallest.keep:.3g} kept and {min(menu)} bits the file "
            f"has {smallest.num_bytes(fewest):,}; ask for more, keep less, or allow fewer bits"
        )
    best, allocation = min(fitting, key=lambda pair: pair[0].removed + pair[1].rise)
    tried = tuple((c.keep, c.removed + found.rise) for c, found in fitting)
    logger.info("keeping %.3g, expected rise %.3g", best.keep, best.removed + allocation.rise)
    with undone_on_error(model):
        pruning = None
        if best.keep < 1:
            again = decide_again(decision, config.with_amount(Amount(what, best.keep)))
            pruning = carry_out_(model, again)
        report = quantize_(model, drawn, own.with_weight_bits(allocation.bits))
    return BytesReport(pruning, report, best.keep, best.removed + allocation.rise, tried)


def candidate_of(model: nn.Module, decision: Decision | None, keep: float, sensitivity: Sensitivity) -> Candidate:
    """Return what bits could do with what a decision leaves of a model.

    Args:
        model: The model; left as it is. A copy of it is made for as long as this takes.
        decision: Which units go; None for none.
        keep: The share that it keeps.
        sensitivity: The rises of the layers of the whole model.

    Returns:
        The candidate.
    """
    copied, removed = copy.deepcopy(model), 0.0
    if decision is not None:
        apply_plan_(copied, decision.plan)
        for plan in decision.stage:
            scores = decision.scores.sensitivity[plan.group.name].tolist()
            removed += sum(max(s, 0.0) for s, action in zip(scores, plan.actions, strict=True) if action == PRUNE)
    rise: dict[str, dict[int, float]] = {}
    sizes: dict[str, int] = {}
    shapes: dict[str, list[tuple[int, int]]] = {}
    seen: set[int] = set()
    for name, rises in sensitivity.rise.items():
        layer, before = copied.get_submodule(name), model.get_submodule(name)
        weights = {w: layer.get_parameter(w) for w in weight_names(layer)}
        left = sum(w.numel() for w in weights.values())
        share = left / max(sum(before.get_parameter(w).numel() for w in weights), 1)
        rise[name] = {b: share * r for b, r in rises.items()}
        new = [w for w in weights.values() if id(w) not in seen]
        seen |= {id(w) for w in new}
        sizes[name], shapes[name] = sum(w.numel() for w in new), [(w.shape[0], w.shape[1:].numel()) for w in new]
    apply_bits_(copied, BitPlan({name: LayerBits(8, 8) for name in rise}, Rounding.ASYMMETRIC, Stored.CODES))
    whole = file_bytes(saved_state(copied, copied.state_dict(), Stored.CODES))
    return Candidate(keep, removed, Sensitivity(rise, {}, sizes, sensitivity.tied), shapes, whole - sum(sizes.values()))
