"""How sensitive the loss is to each unit: HAP's relative Hessian trace, and the criteria it has to beat."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from hap_hf.config import HapConfig, Method, Precision
from hap_hf.curvature import accumulation_dtype, estimate_traces, preserved, rademacher, seeded_generator
from hap_hf.errors import UnsupportedModelError
from hap_hf.group import Group
from hap_hf.losses import LossFunction, batch_losses, model_loss

_FP16_LOSS_SCALE = 2.0**16


@dataclass(frozen=True)
class Scores:
    """How sensitive the loss is to the removal of each unit.

    Args:
        sensitivity: For each group, by name, the sensitivity of its units, ``[num_units]``, float64 on the CPU.
        standard_error: Standard error of each sensitivity, ``[num_units]``; zero where the method is exact.
        method: How the sensitivities were estimated.
        num_probes: Hutchinson probes for each batch; 0 where the method has none.
        num_batches: Batches that were used.
        num_loss_terms: Loss terms in these batches.
        seconds: Wall-clock time.
    """

    sensitivity: Mapping[str, Tensor]
    standard_error: Mapping[str, Tensor]
    method: str
    num_probes: int
    num_batches: int
    num_loss_terms: int
    seconds: float

    @property
    def negative_share(self) -> float:
        """Share of all units whose sensitivity is negative: noise of the probes, or a loss that is not at a minimum."""
        every = torch.cat(list(self.sensitivity.values()))
        return (every < 0).double().mean().item()


def unit_sensitivity(trace: Tensor, squared_norm: Tensor, num_entries: int) -> Tensor:
    r"""Return HAP's sensitivity of each unit, tr(H_uu) ||w_u||^2 / (2 n_u).

    The second-order loss increase w_u^T H_uu w_u / 2 of removing unit u, with H_uu replaced by its mean eigenvalue.
    Assumes a gradient near zero, drops the cross terms to other units, and is negative where the trace is. Linear in
    the trace, so that a standard error of the trace becomes one of the sensitivity.

    Reference: Yu et al., "Hessian-Aware Pruning and Optimal Neural Implant", WACV 2022. The reference code leaves out
    the 1/2.

    Args:
        trace: Hessian trace over each unit's entries, ``[num_units]``, in loss per squared weight.
        squared_norm: Squared Euclidean norm of each unit's weights, ``[num_units]``.
        num_entries: Number of weight entries a unit has.

    Returns:
        Sensitivity of each unit, ``[num_units]``, in units of the loss.

    Example:
        >>> unit_sensitivity(torch.tensor([4.0, -1.0]), torch.tensor([3.0, 6.0]), num_entries=6)
        tensor([ 1.0000, -0.5000])
    """
    return trace * squared_norm / (2 * num_entries)


def score_groups(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Iterable[Mapping[str, Any]],
    config: HapConfig,
    *,
    loss_fn: LossFunction | None = None,
) -> Scores:
    """Return the sensitivity of every unit by ``config.method``; the model is left exactly as found.

    Args:
        model: The model that the groups were found in.
        groups: Units to score.
        batches: Keyword arguments of the model's forward with labels; the first ``config.max_batches`` are used. Each
            counts by its number of loss terms, see :func:`~hap_hf.losses.count_loss_terms`. Only the Hessian method
            needs any.
        config: Method, number of probes, precision and seed.
        loss_fn: Mean loss of a model over a batch's loss terms; ``model(**batch).loss`` by default.

    Returns:
        Sensitivities with their standard errors.

    Raises:
        BatchError: If there are no batches, or they hold no labels or no loss terms.
        CurvatureError: If a loss or a derivative is not finite, or does not depend on the weights.
        UnsupportedModelError: If there are no groups, or they do not fit the model.
    """
    start = time.perf_counter()
    scores = METHODS[config.method](UnitWeights.of(model, groups), model, batches, config, loss_fn or model_loss)
    return replace(scores, seconds=time.perf_counter() - start)


@dataclass(frozen=True)
class UnitWeights:
    """The weight matrices that hold the units of some groups.

    Args:
        groups: The groups, in the order of every vector over all their units, ``[num_units of all groups]``.
        tensors: The matrices, each under one name.
        names: That name for each name that a slice uses; they differ where weights are tied.
    """

    groups: tuple[Group, ...]
    tensors: Mapping[str, Tensor]
    names: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module, groups: Sequence[Group]) -> "UnitWeights":
        """Return the weights of ``groups`` in ``model``.

        Args:
            model: The model.
            groups: Its groups.

        Returns:
            The weights.

        Raises:
            UnsupportedModelError: If there are no groups, or they do not fit the model.
        """
        if not groups:
            raise UnsupportedModelError("expected at least one group to score, got none; nothing could be removed")
        parameters = dict(model.named_parameters(remove_duplicate=False))
        first = {id(p): name for name, p in reversed(parameters.items())}
        tensors, names = {}, {}
        for group in groups:
            slices = list(group.scored_slices())
            if not slices:
                raise UnsupportedModelError(f"{group.name} has no weight matrix, so its units cannot be scored")
            for s in slices:
                parameter = parameters.get(s.tensor)
                if parameter is None or tuple(parameter.shape) != s.shape or not parameter.is_floating_point():
                    got = "none" if parameter is None else f"{list(parameter.shape)} of {parameter.dtype}"
                    raise UnsupportedModelError(
                        f"{group.name}: expected a floating-point parameter {s.tensor} of shape {list(s.shape)} in "
                        f"{type(model).__name__}, got {got}; find the groups again in this model"
                    )
                names[s.tensor] = first[id(parameter)]
                tensors[names[s.tensor]] = parameter
        return cls(tuple(groups), tensors, names)

    def sums(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the sums of a value for each weight over the units.

        Args:
            values: A tensor for each of the matrices, in its shape.

        Returns:
            Sum for each unit of each group, ``[num_units of all groups]``.
        """
        device = next(iter(values.values())).device
        marginals: dict[tuple[str, int], Tensor] = {}  # fused projections hold several slices of one tensor
        totals = []
        for group in self.groups:
            total = torch.zeros(group.num_units, device=device)
            for s in group.scored_slices():
                key = self.names[s.tensor], s.dim
                if key not in marginals:
                    value = values[key[0]]
                    marginals[key] = value.sum([d for d in range(value.dim()) if d != s.dim])  # [shape[dim]]
                entries = marginals[key].narrow(0, s.offset, group.num_units * s.width)
                total = total + entries.view(group.num_units, s.width).sum(1).to(device)
            totals.append(total)
        return torch.cat(totals)

    def by_group(self, vector: Tensor) -> dict[str, Tensor]:
        """Return the part of a vector over all units that belongs to each group.

        Args:
            vector: A value for each unit, ``[num_units of all groups]``.

        Returns:
            Values by group name, ``[num_units]``, float64 on the CPU.
        """
        parts = torch.split(vector.cpu().double(), [g.num_units for g in self.groups])
        return {group.name: part.clone() for group, part in zip(self.groups, parts, strict=True)}

    def num_entries(self) -> dict[str, int]:
        """Return the number of weight entries of one unit for each group.

        Returns:
            The numbers by group name.
        """
        return {g.name: sum(s.entries_per_unit for s in g.scored_slices()) for g in self.groups}

    def squared_norms(self) -> dict[str, Tensor]:
        """Return the squared Euclidean norm of every unit's weights.

        Returns:
            Squared norms by group name, ``[num_units]``.
        """
        squares = {n: t.detach().to(accumulation_dtype(t.dtype)).square() for n, t in self.tensors.items()}
        return self.by_group(self.sums(squares))


def _by_hessian(
    units: UnitWeights,
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    config: HapConfig,
    loss_fn: LossFunction,
) -> Scores:
    _check_attention(model)
    half = config.precision is Precision.FP16 or any(t.dtype == torch.float16 for t in units.tensors.values())
    device = next(model.parameters()).device.type
    num_batches = min(length_hint(batches), config.max_batches or length_hint(batches))
    total = num_batches * config.num_probes or None
    with (
        preserved(model, units.tensors),
        torch.autocast(device, enabled=False),  # the caller's must not reach into the derivatives
        tqdm(total=total, desc="Hessian trace", unit="probe", disable=not config.progress) as bar,
    ):
        estimate = estimate_traces(
            batch_losses(model, islice(batches, config.max_batches), loss_fn, config.precision),
            units.tensors,
            units.sums,
            partial(rademacher, units.tensors, config.seed),
            num_probes=config.num_probes,
            loss_scale=_FP16_LOSS_SCALE if half else 1.0,
            on_probe=bar.update,
        )
    norms, entries = units.squared_norms(), units.num_entries()
    sensitivity, standard_error = (
        {name: unit_sensitivity(x, norms[name], entries[name]) for name, x in units.by_group(vector).items()}
        for vector in (estimate.trace, estimate.standard_error)
    )
    return Scores(
        sensitivity,
        standard_error,
        config.method.value,
        num_probes=config.num_probes,
        num_batches=estimate.num_batches,
        num_loss_terms=estimate.num_terms,
        seconds=0.0,
    )


def _check_attention(model: nn.Module) -> None:
    # Foreign kernels return gradients without a graph: their curvature would be missing, and nothing would tell.
    for module in model.modules():
        attention = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if attention not in {None, "eager", "sdpa"}:
            raise UnsupportedModelError(
                f"{type(module).__name__} uses attention {attention!r}, which may not be differentiable twice; call "
                "model.set_attn_implementation('sdpa') or load the model with attn_implementation='sdpa'"
            )


def _by_magnitude(
    units: UnitWeights, model: nn.Module, batches: object, config: HapConfig, loss_fn: LossFunction
) -> Scores:
    entries = units.num_entries()
    return _exact({name: norm / entries[name] for name, norm in units.squared_norms().items()}, config)


def _by_chance(
    units: UnitWeights, model: nn.Module, batches: object, config: HapConfig, loss_fn: LossFunction
) -> Scores:
    return _exact(
        {
            g.name: torch.rand(
                g.num_units, generator=seeded_generator(config.seed, g.name), dtype=torch.float64, device="cpu"
            )
            for g in units.groups
        },
        config,
    )


def _exact(sensitivity: Mapping[str, Tensor], config: HapConfig) -> Scores:
    zeros = {name: torch.zeros_like(x) for name, x in sensitivity.items()}
    return Scores(sensitivity, zeros, config.method.value, num_probes=0, num_batches=0, num_loss_terms=0, seconds=0.0)


METHODS: Mapping[Method, Callable[..., Scores]] = {
    Method.HESSIAN: _by_hessian,
    Method.MAGNITUDE: _by_magnitude,
    Method.RANDOM: _by_chance,
}
"""How to score, for each method: from weights, model, batches, config and loss to scores without their time."""
