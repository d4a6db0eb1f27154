"""Trying candidates before they are believed: the pruned model must equal the masked one.

Dependences say which entries belong to a unit; they cannot say which Python attributes a forward pass reads, or that
a slope is computed from a head's number. So every candidate is applied for a moment, with different numbers of
units in neighbouring layers, and compared with the same model with these units zeroed where they are consumed.
What differs, or raises, is left whole.
"""

import logging
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hap_hf.discovery.families import Candidate
from hap_hf.discovery.record import output_tensors
from hap_hf.discovery.runs import Run
from hap_hf.errors import PlanMismatchError, UnsupportedModelError
from hap_hf.layers.projection import channel_dim
from hap_hf.model.masking import channels, masked
from hap_hf.model.state import renew_caches
from hap_hf.names.actions import IMPLANT, KEEP, PRUNE
from hap_hf.names.group import Group, Role
from hap_hf.names.plan import GroupPlan, PruningPlan
from hap_hf.surgery.apply import apply_plan_undoable_
from hap_hf.surgery.calibration import ImplantInit
from hap_hf.surgery.undo import undo_

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference from the masked model, as a share of the largest value. A wrong mapping differs by far more."""


class Trial:
    """Compares removing with masking, in every way in which the model is run.

    Args:
        model: The model with its own weights, in eval mode.
        runs: How it is run.

    Raises:
        UnsupportedModelError: If the model's output holds NaN.
    """

    def __init__(self, model: nn.Module, runs: Sequence[Run]) -> None:
        self._model = model
        self._runs = runs
        if any(bool(t.isnan().any()) for t in self._run([], [])):
            raise UnsupportedModelError(
                f"the output of {type(model).__name__} on the batch holds NaN, so no removal could be verified; "
                "pass a batch like those it was trained on, with weights that are finite"
            )

    def holds(self, candidates: Sequence[Candidate]) -> bool:
        """Return whether removing units of ``candidates`` equals masking them.

        Args:
            candidates: Groups to try together.

        Returns:
            True if it does, for different choices of units and of layers.
        """
        rng = random.Random(0)
        position: dict[tuple[str, ...], int] = defaultdict(int)
        parity = []
        for c in candidates:
            parity.append(position[c.shape_class] % 2)
            position[c.shape_class] += 1
        # Every other layer of a class, then the layers between, then all, with random numbers of units: if all lost the
        # same number, code that takes the size of one layer from another would pass. A share of the channels that the
        # code computes may be right for random units by chance; it is wrong where one end goes.
        for of_even, of_odd in ((_any, None), (None, _any), (_low, _high), (_high, _low), (_nearly_all, _nearly_all)):
            cut = [
                (c, choose(rng, c.group.num_units))
                for c, p in zip(candidates, parity, strict=True)
                if (choose := (of_even, of_odd)[p]) is not None and c.group.num_units > 1
            ]
            if cut and not self._equal(cut):
                return False
        return True

    def holds_when_empty(self, candidates: Sequence[Candidate]) -> bool:
        """Return whether the model runs, and equals the masked one, without any unit of ``candidates``.

        Args:
            candidates: Groups to empty.

        Returns:
            True if it does.
        """
        return self._equal([
            (replace(c, group=replace(c.group, may_be_empty=True)), list(range(c.group.num_units))) for c in candidates
        ])

    def holds_for(self, stage: Sequence[GroupPlan]) -> bool:
        """Return whether what a plan does equals masking, with silent implants where it has some.

        Args:
            stage: What happens to the groups.

        Returns:
            True if it does.
        """
        silent = [(g.group, g.units(PRUNE) + g.units(IMPLANT)) for g in stage]
        readers = {s.tensor.rpartition(".")[0] for g in stage for s in g.group.slices if s.role is Role.CONSUMER}
        # A layer with an implant gives its outputs in another order, so that then only those of the model are compared.
        return self._equal_to(stage, silent, [] if any(g.implanted for g in stage) else sorted(readers))

    def _equal(self, cut: Sequence[tuple[Candidate, list[int]]]) -> bool:
        """Return whether the model without these units computes what it computes with them masked."""
        # The layers that read the units are compared too: the model's outputs alone may hide a difference, as behind a
        # saturated softmax or a branch that is scaled to nothing.
        watched = [n for c, _ in cut for n in c.consumers]
        return self._equal_to(
            [_plan(c.group, units) for c, units in cut], [(c.group, units) for c, units in cut], watched
        )

    def _equal_to(
        self, stage: Sequence[GroupPlan], mask: Sequence[tuple[Group, list[int]]], watched: Sequence[str]
    ) -> bool:
        """Return whether the model after ``stage`` computes what it computes with ``mask``."""
        plan = PruningPlan((tuple(stage),))
        expected = self._run(watched, mask)
        try:
            _, undo = apply_plan_undoable_(self._model, plan, init=ImplantInit.ZERO, input_moments={})
        except PlanMismatchError as error:
            logger.debug("trial: %s", error)
            return False
        try:
            pruned = self._run(watched, [])
        except Exception as error:  # the model's own code, run with sizes it was not written for, may raise anything
            logger.debug("trial: %s: %s", type(error).__name__, error)
            return False
        finally:
            undo_(undo)
        return len(expected) == len(pruned) and all(map(_close, expected, pruned))

    def _run(self, watched: Sequence[str], mask: Sequence[tuple[Group, list[int]]]) -> list[Tensor]:
        """Return the outputs of the watched layers and of the model, with some units masked."""
        renew_caches(self._model)  # filled with other sizes, before or by the last run
        seen: list[Tensor] = []
        made = channels(mask, {Role.PRODUCER, Role.FACTOR})

        def watch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                # Outputs that other units of the mask make are gone in the pruned model.
                dim, gone = channel_dim(module), set(made.get(name, ()))
                left = torch.tensor([i for i in range(output.shape[dim]) if i not in gone], dtype=torch.long)
                # A copy in any case: an in-place activation may follow.
                seen.append(output.index_select(dim, left.to(output.device)))

            return hook

        handles = [self._model.get_submodule(n).register_forward_hook(watch(n)) for n in watched]
        try:
            with masked(self._model, mask):
                for run in self._runs:
                    seen += output_tensors(run.output(self._model))
        finally:
            for handle in handles:
                handle.remove()
        return [t for t in seen if t.is_floating_point()]


def _any(rng: random.Random, n: int) -> list[int]:
    return rng.sample(range(n), rng.randint(1, n - 1))


def _low(rng: random.Random, n: int) -> list[int]:
    return list(range(rng.randint(n // 2, n - 1)))


def _high(rng: random.Random, n: int) -> list[int]:
    return list(range(rng.randint(1, n - n // 2), n))


def _nearly_all(rng: random.Random, n: int) -> list[int]:
    kept = rng.randrange(n)
    return [u for u in range(n) if u != kept]


def _plan(group: Group, units: Sequence[int]) -> GroupPlan:
    gone = set(units)
    return GroupPlan(group, "".join(PRUNE if u in gone else KEEP for u in range(group.num_units)))


def _close(a: Tensor, b: Tensor) -> bool:
    """Return whether two outputs are equal up to rounding, measured by the largest finite value of the first."""
    if a.shape != b.shape:
        return False
    # Entry by entry, a small value would be compared with rounding errors of the large ones it was computed from.
    # Infinities, as in masked logits, must be the same in both, and must not make the limit infinite.
    limit = (
        TOLERANCE.get(a.dtype, 1e-4) * float(torch.nan_to_num(a, posinf=0, neginf=0).abs().max()) if a.numel() else 0.0
    )
    return torch.allclose(a, b, rtol=0, atol=limit + 1e-30)  # false where either holds NaN
