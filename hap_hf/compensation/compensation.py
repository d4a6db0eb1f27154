"""Making up for units that go, in the weights that read those that stay."""

import logging
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from hap_hf.compensation.fit import Fit, fit_removed
from hap_hf.criteria import Scores
from hap_hf.curvature import InputListener
from hap_hf.evidence.evidence import Evidence
from hap_hf.evidence.mean import mean_loss
from hap_hf.evidence.memory import in_batches_that_fit
from hap_hf.evidence.processes import ALONE, Processes
from hap_hf.evidence.rehearsal import rehearsed
from hap_hf.inputs.moments import Moments, weighted_moments
from hap_hf.inputs.readers import Reader, readers_of
from hap_hf.model.masking import Units, channels, masked
from hap_hf.model.values import replaced_values
from hap_hf.names.actions import PRUNE
from hap_hf.names.group import Group, Role
from hap_hf.names.plan import GroupPlan

logger = logging.getLogger(__name__)

FLOORS = (10.0, 1.0, 0.0)
"""Weakest regularisations that are tried on the whole model."""


@dataclass(frozen=True)
class Compensation:
    """What is known of the inputs of the layers that read units, and the weights that follow when some units go.

    A layer that reads what is left can give back much of what it read of the others, as far as that can be told from
    what is left: :func:`~hap_hf.compensation.fit.fit_removed` says how. Layers are treated one by one, on the inputs
    that they have in the model with all its units. No shape changes, so that checkpoints are those of any pruned model.

    Args:
        model: The model with all its units.
        readers: The layers that read units.
        moments: The second moments of their inputs by name of the layer, see
            :func:`~hap_hf.inputs.moments.weighted_moments`.
        processes: The processes that prune together.
    """

    model: nn.Module
    readers: Sequence[Reader]
    moments: Mapping[str, Tensor]
    processes: Processes = ALONE

    @classmethod
    def measure(cls, evidence: Evidence, groups: Sequence[Group], *, num_output_probes: int | None = 1) -> Self:
        """Measure what the layers of a model read.

        Args:
            evidence: What to measure on; the model is left exactly as found.
            groups: Groups whose units may go.
            num_output_probes: Backward passes per batch, each from random signs at the model's outputs; None for as
                many as there are outputs, which is exact.

        Returns:
            What was measured. It takes ``8 n^2`` bytes (16 for float64 models) for each layer that reads n features.

        Raises:
            BatchError: If there are no batches, or they hold no loss terms.
            CurvatureError: If a loss or a derivative is not finite.
            UnsupportedModelError: If the loss is not computed from the model's outputs, or of unknown kind.
        """
        readers = readers_of(evidence.model, groups)
        if not readers:  # every layer that reads units makes its weight anew in each pass, or shares it
            return cls(evidence.model, readers, {}, evidence.processes)
        evidence = rehearsed(evidence)
        paths = [reader.path for reader in readers]
        moments = in_batches_that_fit(
            partial(weighted_moments, paths=paths, num_output_probes=num_output_probes), evidence
        )
        return cls._measured(evidence, readers, moments)

    @classmethod
    def while_scoring(
        cls, evidence: Evidence, groups: Sequence[Group], score: Callable[[Evidence, InputListener], Scores]
    ) -> tuple[Self, Scores]:
        """Measure what :meth:`measure` does in the backward passes of scores, where their criterion allows it.

        Args:
            evidence: What to measure on; the model is left exactly as found.
            groups: Groups whose units may go.
            score: Scores on some evidence, and tells what layers read.

        Returns:
            What was measured, and the scores.
        """
        readers = readers_of(evidence.model, groups)
        paths = [reader.path for reader in readers]

        def both(fitting: Evidence) -> tuple[Scores, Moments]:
            heard = Moments(paths, fitting.processes)
            return score(fitting, heard), heard

        scores, heard = in_batches_that_fit(both, evidence)
        moments, num_batches = heard.total()
        # Not told of all batches, as where each sample is differentiated alone.
        complete = num_batches == scores.num_batches and all(m.isfinite().all() for m in moments.values())
        if not complete:
            return cls.measure(evidence, groups, num_output_probes=scores.num_probes or None), scores
        return cls._measured(evidence, readers, moments), scores

    @classmethod
    def _measured(cls, evidence: Evidence, readers: Sequence[Reader], moments: Mapping[str, Tensor]) -> Self:
        """Return the compensation, and say what it cannot do."""
        # [-1, -1] is the summed weight of the positions: zero where no sample of this half reaches the loss.
        halves_missing = [path for path, halves in moments.items() if not all(half[-1, -1] > 0 for half in halves)]
        if halves_missing:
            logger.warning(
                "%d of %d layers, %s among them, are not compensated: it takes two samples that reach the loss to tell "
                "what is predictable; pass more samples",
                len(halves_missing),
                len(moments),
                halves_missing[0],
            )
        return cls(evidence.model, readers, moments, evidence.processes)

    @classmethod
    def of(cls, model: nn.Module, groups: Sequence[Group], moments: Mapping[str, Tensor]) -> Self:
        """Return the compensation of a model of which the moments are known.

        Args:
            model: The model, or a copy of the one that was measured.
            groups: Its groups, as they were measured.
            moments: What was measured.

        Returns:
            The compensation.
        """
        return cls(model, readers_of(model, groups), moments)

    def values(self, gone: Units) -> dict[str, Tensor]:
        """Return the weights and biases that make up for units.

        Args:
            gone: All units that go from the model with all its units.

        Returns:
            New values by name of the parameter, for the layers that read some of these units. The columns that read
            them are as they were.
        """
        (values,) = self._values_by_floor(gone, [0.0])
        return self._adopted(values)

    def _adopted(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the first process's values: solvers round differently, and copies of a model must stay equal."""
        self.processes.adopt_first_("compensated weights", values.values())
        return values

    def _values_by_floor(self, gone: Units, floors: Sequence[float]) -> list[dict[str, Tensor]]:
        """Return the values where no layer may choose a weaker regularisation than each of some floors."""
        removed = channels(gone, {Role.CONSUMER})
        values: list[dict[str, Tensor]] = [{} for _ in floors]
        left = []
        for reader in self.readers:
            if reader.path not in self.moments or not removed.get(reader.path):
                continue
            halves = self.moments[reader.path]
            # A layer with an implant reads its input with several weights; as outputs they are fitted together.
            rows = torch.cat([_rows(self.model.get_parameter(n), dim) for n, dim in reader.inputs.items()])
            index = torch.tensor(sorted(set(removed[reader.path])), device=halves.device)
            fits = fit_removed(halves, index, rows, constant=reader.takes_constant, floors=floors)
            for some, fit in zip(values, fits, strict=True):
                some |= self._values(reader, fit)
            left.append(1.0 if fits[-1] is None else fits[-1].unexplained)
        if left:
            share = 100 * sum(left) / len(left)
            logger.debug("compensation of %d layers: %.0f%% of what they lose is left on average", len(left), share)
        return values

    def _values(self, reader: Reader, fit: Fit | None) -> dict[str, Tensor]:
        """Return the weights and the bias of a layer with a fit added, or as they are where there is none."""
        values, start = {}, 0
        for name, dim in reader.inputs.items():
            values[name] = self.model.get_parameter(name).detach().clone()
            columns = values[name].movedim(dim, -1)  # [..., inputs], a view: what is written to it lands in the value
            number = columns[..., 0].numel()
            if fit is not None:
                added = fit.weights[start : start + number].to(columns.device)
                # Added in float64 and rounded once. A convolution's taps are outputs of their own, see _rows.
                wide = columns.double().flatten(0, -2).index_add(1, fit.kept.to(columns.device), added)
                columns.copy_(wide.view_as(columns))
            start += number
        if reader.takes_constant:
            bias = self.model.get_parameter(reader.bias).detach()
            values[reader.bias] = bias if fit is None else (bias + fit.constants.to(bias.device)).to(bias.dtype)
        return values

    @contextmanager
    def applied(self, gone: Units) -> Generator[None]:
        """Silence units and make up for them inside the block.

        Args:
            gone: All units that are gone by then.

        Yields:
            Nothing; the model computes as if it had been pruned, in its full shapes.
        """
        units = [(group, list(indices)) for group, indices in gone]
        with replaced_values(self.model, self.values(units)), masked(self.model, units):
            yield

    def best_values(self, stage: Sequence[GroupPlan], evidence: Evidence) -> dict[str, Tensor]:
        """Return the weights and biases that make up for pruned units so that the whole model loses least.

        What a layer chooses for itself is right for the inputs that it has in the model with all its units. The more
        goes, the less they are those that it will have, and a layer that lives on small differences between them
        amplifies what the layers before it got wrong. So the loss decides whether all layers choose freely, or only
        among stronger regularisations, or are left as they are. It takes a forward pass of every batch for each.

        Args:
            stage: What happens to the units; not applied yet.
            evidence: What to compute the loss on: the batches that were measured, or others.

        Returns:
            New values by name of the parameter; none where nothing helps.

        Raises:
            BatchError: If there are no batches, or they hold no loss terms.
        """
        gone = [(g.group, g.units(PRUNE)) for g in stage]
        evidence = rehearsed(
            evidence
        )  # with no units silenced: without labels, the dense model's outputs are the targets
        losses = {}
        # Without any compensation first, so that it wins where nothing else is better.
        choices = {math.inf: {}, **dict(zip(FLOORS, self._values_by_floor(gone, FLOORS), strict=True))}
        for floor, values in choices.items():
            # The columns that read the units are as they were, so the units must be silent.
            with replaced_values(self.model, values), masked(self.model, gone):
                losses[floor] = in_batches_that_fit(mean_loss, evidence)
        best = min(losses, key=lambda floor: losses[floor])
        logger.info(
            "compensation regularised by %g and more: loss %.4g, %.4g without any",
            best,
            losses[best],
            losses[math.inf],
        )
        return self._adopted(choices[best])


def _rows(weight: Tensor, dim: int) -> Tensor:
    """Return a weight as a matrix with a column for each input, ``[outputs * taps, inputs]``."""
    return weight.detach().movedim(dim, -1).flatten(0, -2)
