"""Trace scores with the Hessian-vector products of other libraries, from the same probes as the library's own.

None of them knows units. What each computes is ``H v`` for a probe v, and the sums of ``v * H v`` over the units are
taken from it, for all units at once; only ``loop`` takes them one by one, as the code of HAP's paper does. Each is used
at its best: where a gradient's graph can be kept from one probe to the next, it is.
"""

import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hap_hf import Criterion, Group, Scores, ScoringTask, Slice

Batch = Mapping[str, Any]
Vector = Mapping[str, Tensor]
Product = Callable[[Vector], Vector]


class UnitSums:
    """Sums over the weights of each unit, slice by slice.

    Args:
        model: The model.
        groups: Its groups.

    Attributes:
        tensors: The weights that hold units, each under one name.
        factors: For each group and each of its slices ``||w_u||^2 / (2 n_u)`` of each unit, ``[num_units]``; times a
            trace it is HAP's sensitivity.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        every = dict(model.named_parameters(remove_duplicate=False))
        first = {id(p): name for name, p in reversed(every.items())}  # tied weights count once
        self.groups = groups
        self.slices = [list(group.scored_slices()) for group in groups]
        self.names = {s.tensor: first[id(every[s.tensor])] for slices in self.slices for s in slices}
        self.tensors = {name: every[name] for name in dict.fromkeys(self.names.values())}
        squares = {name: tensor.detach().double().square() for name, tensor in self.tensors.items()}
        self.factors = [
            [self.of_slice(squares, group, s) / (2 * s.entries_per_unit) for s in slices]
            for group, slices in zip(groups, self.slices, strict=True)
        ]

    def of_slice(self, values: Vector, group: Group, s: Slice) -> Tensor:
        """Return the sum of a value for each weight over each unit's part of a slice, ``[num_units]``."""
        part = values[self.names[s.tensor]].narrow(s.dim, s.offset, s.width * group.num_units)
        return part.movedim(s.dim, 0).reshape(group.num_units, -1).sum(1)

    def at_once(self, vector: Vector, product: Vector) -> Tensor:
        """Return the sums of ``v * H v`` over all units, times the factors of their slices.

        Args:
            vector: The probe v, by name.
            product: ``H v``, by name.

        Returns:
            The sums, ``[num_units of all groups]``, float64 on the CPU.
        """
        values = {name: vector[name] * product[name] for name in vector}
        sums = [
            sum(self.of_slice(values, group, s) * factor for s, factor in zip(slices, factors, strict=True))
            for group, slices, factors in zip(self.groups, self.slices, self.factors, strict=True)
        ]
        return torch.cat(sums).double().cpu()

    def one_by_one(self, vector: Vector, product: Vector) -> Tensor:
        """Return the sums of :meth:`at_once` with a dot product for each slice of each unit.

        Reference: the code of Yu et al., "Hessian-Aware Pruning and Optimal Neural Implant", WACV 2022, which goes
        through the channels of each layer in Python after each probe.

        Args:
            vector: The probe v, by name.
            product: ``H v``, by name.

        Returns:
            The sums, ``[num_units of all groups]``, float64 on the CPU.
        """
        sums = []
        for group, slices, factors in zip(self.groups, self.slices, self.factors, strict=True):
            for unit in range(group.num_units):
                found = 0.0
                for s, factor in zip(slices, factors, strict=True):
                    name, start = self.names[s.tensor], s.offset + unit * s.width
                    v, hv = (t[name].narrow(s.dim, start, s.width).reshape(-1) for t in (vector, product))
                    found += torch.dot(v, hv).item() * factor[unit].item()
                sums.append(found)
        return torch.tensor(sums, dtype=torch.float64)


class BatchLoss(nn.Module):
    """A model whose output is the mean loss of a batch, which is a form that all libraries take.

    Args:
        model: The model.
    """

    reduction = "mean"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss.

        Args:
            batch: Keyword arguments of the model's forward with labels.

        Returns:
            The scalar loss.
        """
        return self.model(**batch).loss


class Given(nn.Module):
    """A criterion for outputs that are losses already."""

    reduction = "mean"

    def forward(self, loss: Tensor, _: object = None) -> Tensor:
        """Return ``loss`` as it is."""
        return loss


def pyhessian_product(model: nn.Module, batch: Batch, tensors: Vector) -> Product:
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


def curvlinops_product(model: nn.Module, batch: Batch, tensors: Vector) -> Product:
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


def eigenthings_product(model: nn.Module, batch: Batch, tensors: Vector) -> Product:
    """Return products of hessian-eigenthings, double backward from the start; see :func:`pyhessian_product`."""
    from hessian_eigenthings import HessianOperator, select_parameters

    names = {id(t): name for name, t in tensors.items()}
    operator = HessianOperator(model, [batch], lambda model, batch: model(**batch).loss)
    order = [names[id(p)] for p in select_parameters(model).values()]
    sizes = [tensors[name].numel() for name in order]

    def product(vector: Vector) -> Vector:
        flat = operator.matvec(torch.cat([vector[name].flatten() for name in order]))
        parts = flat.split(sizes)
        return {name: part.view_as(tensors[name]) for name, part in zip(order, parts, strict=True)}

    return product


def loop_product(model: nn.Module, batch: Batch, tensors: Vector) -> Product:
    """Return products by double backward, for the loop over units; see :func:`pyhessian_product`."""
    gradient = torch.autograd.grad(model(**batch).loss, list(tensors.values()), create_graph=True)

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


@dataclass(frozen=True, kw_only=True)
class OfPeer(Criterion):
    """The relative Hessian trace with the products of a peer, from the probes of :class:`hap_hf.Hessian`.

    Args:
        peer: One of ``PEERS``.
        num_probes: Probes per batch.
    """

    name: ClassVar[str] = "peer"

    peer: str
    num_probes: int

    def score(self, task: ScoringTask) -> Scores:
        """Return the scores; their standard errors are not known."""
        evidence, units = task.evidence, UnitSums(task.evidence.model, task.groups)
        total, num_terms = torch.zeros((), dtype=torch.float64), 0
        sums = units.one_by_one if self.peer == "loop" else units.at_once
        with evidence.ready(units.tensors, self.peer, "probe", self.num_probes, twice=True) as tick:
            for index, batch in enumerate(evidence.batches):
                moved = {name: value.to(evidence.model.device) for name, value in batch.items()}
                product = PEERS[self.peer][1](evidence.model, moved, units.tensors)
                terms = len(moved["labels"])
                for probe in range(self.num_probes):
                    vector = evidence.signs(units.tensors, index, probe)
                    total = total + terms * sums(vector, product(vector))
                    tick()
                num_terms += terms
                for tensor in units.tensors.values():
                    tensor.grad = None  # PyHessian leaves the gradient there, and with it the graph of the batch
        found = (total / num_terms / self.num_probes).split([group.num_units for group in task.groups])
        sensitivity = dict(zip((group.name for group in task.groups), found, strict=True))
        zeros = {name: torch.zeros_like(x) for name, x in sensitivity.items()}
        return Scores(sensitivity, zeros, self.peer, self.num_probes, len(evidence.batches), num_terms, seconds=0.0)
