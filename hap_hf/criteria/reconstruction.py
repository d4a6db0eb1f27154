"""What the next layer could not make up for, by elimination on what layers read: the default."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from hap_hf.criteria.criterion import ScoringTask, register_criterion
from hap_hf.criteria.elimination import Reading, eliminate
from hap_hf.criteria.mask_ggn import MaskGGN
from hap_hf.criteria.scores import Scores
from hap_hf.inputs.moments import Moments, measure_moments
from hap_hf.inputs.readers import Reader, readers_of
from hap_hf.layers.projection import spatial_dims
from hap_hf.names.group import Group, Role


@register_criterion
@dataclass(frozen=True, kw_only=True)
class Reconstruction(MaskGGN):
    r"""Score by the loss increase that is left when the units that stay make up for one that goes.

    Units of a group go one after the other in thought, each time the one that what stays can make up for best, see
    :func:`~hap_hf.criteria.elimination.eliminate`. What cannot be made up for of the layer's inputs is an error, which
    has two prices, half of each: what the loss's curvature says at these inputs, as the moment of its gradients there,
    and the squared error of what the layer makes of it. The curvature knows which errors matter to the model as it is;
    the other half keeps those small that will matter once much has gone. The sum is turned into loss at the rate of
    ``mask_ggn``: by the sum of its scores over what the units cost by themselves. Of two units that repeat each other
    one is free and the other one stands for both, where ``mask_ggn`` finds each of them half as important, and may take
    both.

    Two passes suffice, as each unit is scored with those before it gone. Units that something else than linear layers
    reads keep the score of ``mask_ggn``, channels of convolutions among them.

    References: those of ``mask_ggn`` and of the elimination; Martens and Grosse, "Optimizing Neural Networks with
    Kronecker-factored Approximate Curvature", ICML 2015, for taking inputs and gradients apart; Qin et al.,
    "Functionality-Oriented Convolutional Filter Pruning", 2018, for what magnitudes and gradients miss.
    """

    name: ClassVar[str] = "reconstruction"
    passes: ClassVar[int] = 2

    def score(self, task: ScoringTask) -> Scores:
        """Return the scores; see the class."""
        model, processes = task.evidence.model, task.evidence.processes
        # Of a kernel's patch, moments over channels know the pixel in the middle alone.
        readers = {r.path: r for r in readers_of(model, task.groups) if not spatial_dims(model.get_submodule(r.path))}
        # Compensation wants the same of the same layers, and these products are dear.
        heard = task.listener if isinstance(task.listener, Moments) else Moments(list(readers), processes)
        heard.gradients_at = readers.keys()
        scores = super().score(replace(task, listener=heard))
        moments, num_batches = heard.total()
        # Not told of all batches where each sample is differentiated alone.
        if num_batches != scores.num_batches and readers:
            heard = Moments(list(readers), processes, list(readers))
            measure_moments(task.evidence, heard, self.num_output_probes)
            moments, _ = heard.total()
        gradients = heard.total_gradients()
        sensitivity, errors = dict(scores.sensitivity), dict(scores.standard_error)
        for group in task.groups:
            found = _readings(model, group, readers, moments, gradients)
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
    model: nn.Module,
    group: Group,
    readers: Mapping[str, Reader],
    moments: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
) -> list[Reading]:
    """Return the layers that read a group, as far as all of them are known; none otherwise."""
    result = []
    for s in group.slices:
        path = s.tensor.rpartition(".")[0]
        if s.role is not Role.CONSUMER:
            continue
        if path not in readers or path not in gradients or s.tensor != f"{path}.weight":
            return []
        moment = moments[path].sum(0).double()
        heard = moment[-1, -1].clamp_min(1e-300)
        if readers[path].takes_constant:
            # What units are on average goes into the bias.
            moment = moment - torch.outer(moment[:, -1], moment[-1]) / heard
        span = slice(s.offset, s.offset + group.num_units * s.width)
        weight = model.get_parameter(s.tensor).detach().double().movedim(s.dim, -1).flatten(0, -2)  # [outputs, inputs]
        columns, curvature = weight[:, span].to(moment.device), gradients[path].double()[span, span]
        plain = columns.T @ columns
        # Of the same size on average, so that half of each is half of the price.
        size = curvature.trace() / plain.trace().clamp_min(1e-300)
        result.append(Reading(moment[span, span] / heard, (curvature + size * plain) / 2))
    return result
