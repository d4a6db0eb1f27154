"""Trace scores with the Hessian-vector products of other libraries, from the same probes as the library's own.

None of them knows units. What each computes is ``H v`` for a probe v, and the sums of ``v * H v`` over the units are
taken from it, for all units at once; only ``loop`` takes them one by one, as the code of HAP's paper does. Each is used
at its best: where a gradient's graph can be kept from one probe to the next, it is.
"""

import importlib.util
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hap_hf.criteria import UnitWeights
from hap_hf.criteria.units import Factors, roles_of
from hap_hf.evidence.batches import move_to_model
from hap_hf.evidence.losses import count_loss_terms, model_loss
from hap_hf.evidence.task import ScoringTask

Vector = Mapping[str, Tensor]
Product = Callable[[Vector], Vector]


class BatchLoss(nn.Module):
    """A model whose output is the mean loss of a batch, which is a form that all libraries take.

    Args:
        model: The model.
    """

    reduction = "mean"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the loss.

        Args:
            batch: Keyword arguments of the model's forward with labels.

        Returns:
            The scalar loss.
        """
        return model_loss(self.model, batch)


class Given(nn.Module):
    """A criterion for outputs that are losses already."""

    reduction = "mean"

    def forward(self, loss: Tensor, _: object = None) -> Tensor:
        """Return ``loss`` as it is."""
        return loss


def pyhessian_product(model: nn.Module, batch: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Product:
    """Return products of PyHessian, which keeps the graph of the gradient of one batch.

    Args:
        model: The model, of which only ``tensors`` require gradients.
        batch: Keyword arguments of its forward with labels, on its device.
        tensors: The weights, by name.

    Returns:
        The function that computes ``H v``.
    """
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using backward.. with create_graph")
        # On whichever device: its flag moves tensors that are there already.
        whole = hessian(BatchLoss(model), Given(), data=(batch, None), cuda=False)
    names = {id(t): name for name, t in tensors.items()}
    order = [names[id(p)] for p in whole.params]

    def product(vector: Vector) -> Vector:
        found = hessian_vector_product(whole.gradsH, whole.params, [vector[name] for name in order])
        return dict(zip(order, found, strict=True))

    return product


def curvlinops_product(model: nn.Module, batch: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Product:
    """Return products of curvlinops, forward over reverse with ``torch.func``; see :func:`pyhessian_product`."""
    from curvlinops import HessianLinearOperator

    operator = HessianLinearOperator(
        BatchLoss(model),
        Given(),
        list(tensors.values()),
        [(dict(batch), batch["labels"])],
        check_deterministic=False,
        num_data=1,
        batch_size_fn=lambda _: 1,
    )

    def product(vector: Vector) -> Vector:
        return dict(zip(tensors, operator @ [vector[name] for name in tensors], strict=True))

    return product


def eigenthings_product(model: nn.Module, batch: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Product:
    """Return products of hessian-eigenthings, double backward from the start; see :func:`pyhessian_product`."""
    from hessian_eigenthings import HessianOperator, select_parameters

    names = {id(t): name for name, t in tensors.items()}
    operator = HessianOperator(model, [batch], model_loss)
    order = [names[id(p)] for p in select_parameters(model).values()]
    sizes = [tensors[name].numel() for name in order]

    def product(vector: Vector) -> Vector:
        flat = operator.matvec(torch.cat([vector[name].flatten() for name in order]))
        parts = flat.split(sizes)
        return {name: part.view_as(tensors[name]) for name, part in zip(order, parts, strict=True)}

    return product


def loop_product(model: nn.Module, batch: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Product:
    """Return products by double backward, for the loop over units; see :func:`pyhessian_product`."""
    gradient = torch.autograd.grad(model_loss(model, batch), list(tensors.values()), create_graph=True)

    def product(vector: Vector) -> Vector:
        along = [vector[name] for name in tensors]
        found = torch.autograd.grad(gradient, list(tensors.values()), along, retain_graph=True)
        return dict(zip(tensors, found, strict=True))

    return product


PEERS: Mapping[str, tuple[str | None, Callable[..., Product]]] = {
    "loop": (None, loop_product),
    "PyHessian": ("pyhessian", pyhessian_product),
    "curvlinops": ("curvlinops", curvlinops_product),
    "hessian-eigenthings": ("hessian_eigenthings", eigenthings_product),
}
"""The package that a peer comes from, None for none, and what makes its products."""


def is_installed(peer: str) -> bool:
    """Return whether a peer can be imported.

    Args:
        peer: One of ``PEERS``.

    Returns:
        Whether its package is there.
    """
    package = PEERS[peer][0]
    return package is None or importlib.util.find_spec(package) is not None


def by_peer(peer: str, task: ScoringTask) -> Tensor:
    """Score by the relative Hessian trace with the products of a peer, from the probes of the method ``hessian``.

    Args:
        peer: One of ``PEERS``.
        task: What to score, on what and how.

    Returns:
        Sensitivity of each unit, ``[num_units of all groups]``, float64 on the CPU.
    """
    units = UnitWeights.of(task.model, task.groups, roles_of(task.config.coupling))
    factors = units.trace_factors(task.config.coupling)
    sums = one_by_one if peer == "loop" else at_once
    total, num_terms = torch.zeros((), dtype=torch.float64), 0
    with task.ready(units.tensors, peer, "probe", task.config.num_probes) as tick:
        for index, batch in enumerate(task.batches):
            moved = move_to_model(task.model, batch)
            terms = count_loss_terms(moved)
            product = PEERS[peer][1](task.model, moved, units.tensors)
            for probe in range(task.config.num_probes):
                vector = task.signs(units.tensors, index, probe)
                total = total + terms * sums(units, factors, vector, product(vector)).cpu().double()
                tick()
            num_terms += terms
            for tensor in units.tensors.values():
                tensor.grad = None  # PyHessian leaves the gradient there, and with it the graph of the batch
    return total / num_terms / task.config.num_probes


def at_once(units: UnitWeights, factors: Factors, vector: Vector, product: Vector) -> Tensor:
    """Return the sums of ``v * H v`` over all units, times the factors of their slices.

    Args:
        units: The units.
        factors: For each group and each of its slices a factor for each unit, ``[num_units]``.
        vector: The probe v, by name.
        product: ``H v``, by name.

    Returns:
        The sums, ``[num_units of all groups]``.
    """
    return units.totals(units.marginals({name: vector[name] * product[name] for name in vector}), factors)


def one_by_one(units: UnitWeights, factors: Factors, vector: Vector, product: Vector) -> Tensor:
    """Return the sums of :func:`at_once` with a dot product for each slice of each unit.

    Reference: the code of Yu et al., "Hessian-Aware Pruning and Optimal Neural Implant", WACV 2022, which goes through
    the channels of each layer in Python after each probe.

    Args:
        units: The units.
        factors: For each group and each of its slices a factor for each unit, ``[num_units]``.
        vector: The probe v, by name.
        product: ``H v``, by name.

    Returns:
        The sums, ``[num_units of all groups]``.
    """
    sums = []
    for group, slices, of_group in zip(units.groups, units.slices, factors, strict=True):
        for unit in range(group.num_units):
            found = 0.0
            for s, factor in zip(slices, of_group, strict=True):
                name, start = units.names[s.tensor], s.offset + unit * s.width
                v, hv = (t[name].narrow(s.dim, start, s.width).reshape(-1) for t in (vector, product))
                found += torch.dot(v, hv).item() * factor[unit].item()
            sums.append(found)
    return torch.tensor(sums, dtype=torch.float64)
