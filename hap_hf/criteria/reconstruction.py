"""What the next layer could not make up for: elimination on what layers read."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from hap_hf.criteria.criterion import ScoringTask, register_criterion
from hap_hf.criteria.elimination import Reading, eliminate
from hap_hf.criteria.mask_ggn import MaskGGN
from hap_hf.criteria.scores import Scores
from hap_hf.inputs.moments import Moments, weighted_moments
from hap_hf.inputs.readers import Reader, readers_of
from hap_hf.names.group import Group, Role


@register_criterion
@dataclass(frozen=True, kw_only=True)
class Reconstruction(MaskGGN):
    r"""Score by the loss increase that is left when the units that stay make up for one that goes.

    Units of a group go one after the other in thought, each time the one that what stays can make up for best, see
    :func:`~hap_hf.criteria.elimination.eliminate`. The squared error of what the next layer makes of them, weighted by
    the curvature at its inputs, is turned into loss at the rate of ``mask_ggn``: by the sum of its scores over what the
    units add by themselves. Of two units that repeat each other one is free and the other one stands for both, where
    ``mask_ggn`` finds each of them half as important, and may take both.

    One pass suffices, as each unit is scored with those before it gone. Units of which no reader is known keep the
    score of ``mask_ggn``.

    References: those of ``mask_ggn`` and of the elimination; Qin et al., "Functionality-Oriented Convolutional Filter
    Pruning", 2018, for what magnitudes and gradients miss.
    """

    name: ClassVar[str] = "reconstruction"
    passes: ClassVar[int] = 1

    def score(self, task: ScoringTask) -> Scores:
        """Return the scores; see the class."""
        model, processes = task.evidence.model, task.evidence.processes
        readers = {reader.path: reader for reader in readers_of(model, task.groups)}
        # Compensation wants the same of the same layers, and these products are dear.
        heard = task.listener if isinstance(task.listener, Moments) else Moments(list(readers), processes)
        scores = super().score(replace(task, listener=heard))
        moments, num_batches = heard.total()
        # Not told of all batches where each sample is differentiated alone.
        if num_batches != scores.num_batches and readers:
            moments = weighted_moments(task.evidence, list(readers), self.num_output_probes)
        sensitivity, errors = dict(scores.sensitivity), dict(scores.standard_error)
        for group in task.groups:
            found = _readings(model, group, readers, moments)
            if not found or group.num_units < 2:
                continue
            went = eliminate(found, group.num_units)
            total, lost = went.own.sum(), sensitivity[group.name].clamp_min(0).sum()
            if not (total > 0 and lost > 0):
                continue
            rate = (lost / total).to(went.costs.dtype)
            # Units of equal cost go in the order of the elimination.
            place = went.order.argsort()
            costs = went.costs * (1 + 1e-9 * place / group.num_units)
            sensitivity[group.name] = (costs * rate).to(sensitivity[group.name])
            if group.name in errors:
                share = (went.costs / went.own.clamp_min(torch.finfo(went.own.dtype).tiny)).clamp(max=1)
                errors[group.name] = errors[group.name] * share.to(errors[group.name])
        return replace(scores, sensitivity=sensitivity, standard_error=errors)


def _readings(
    model: nn.Module, group: Group, readers: Mapping[str, Reader], moments: Mapping[str, Tensor]
) -> list[Reading]:
    """Return the layers that read a group, as far as all of them are known; none otherwise."""
    result = []
    for s in group.slices:
        path = s.tensor.rpartition(".")[0]
        if s.role is not Role.CONSUMER:
            continue
        if path not in moments or s.tensor != f"{path}.weight":
            return []
        moment = moments[path].sum(0).double()
        if readers[path].takes_constant:
            # What units are on average goes into the bias.
            moment = moment - torch.outer(moment[:, -1], moment[-1]) / moment[-1, -1].clamp_min(1e-300)
        span = slice(s.offset, s.offset + group.num_units * s.width)
        weight = model.get_parameter(s.tensor).detach().double().movedim(s.dim, -1).flatten(0, -2)  # [outputs, inputs]
        result.append(Reading(moment[span, span], weight[:, span].to(moment.device)))
    return result
