"""How much the loss would rise if one layer had fewer bits, for all layers and numbers of bits from the same passes."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hap_hf.bits.allocate import Sensitivity
from hap_hf.bits.config import BitConfig
from hap_hf.bits.quantize import check_quantizable, choose_layers
from hap_hf.bits.rounding_watch import RoundingWatch
from hap_hf.bits.ties import added_up, shared
from hap_hf.curvature import Forward, SampleBatch, Wanted, estimate_ggn, ggn_directions, squared
from hap_hf.curvature.batch_loss import check_counts
from hap_hf.curvature.layers import NotPerSampleError
from hap_hf.curvature.sample_means import rows_of_sample
from hap_hf.errors import ConfigError, CurvatureError
from hap_hf.evidence.evidence import Evidence
from hap_hf.evidence.losses import LossFunction
from hap_hf.layers.grid import round_weight
from hap_hf.layers.quantized import channel_dim, weight_names
from hap_hf.names.bits import FEWEST, MOST, Rounding
from hap_hf.names.checks import member

logger = logging.getLogger(__name__)


class Formula(StrEnum):
    """What the loss is expected to rise by."""

    QUADRATIC = "quadratic"
    TRACE = "trace"


def bit_sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    config: BitConfig | Mapping[str, Any] | None = None,
    *,
    menu: Sequence[int] = (3, 4, 6, 8),
    formula: Formula | str = Formula.QUADRATIC,
    loss_fn: LossFunction | None = None,
    num_output_probes: int = 1,
    activations: bool = False,
    tie_sums: bool = False,
    progress: bool = True,
) -> Sensitivity:
    r"""Return by how much the loss would rise if the weights of one layer were rounded, for all layers and bits.

    With delta the actual rounding error of a layer's weights, and per-sample gradients ``g_n`` whose second moment is
    the generalised Gauss-Newton matrix G (see :func:`~hap_hf.curvature.ggn.estimate_ggn`), the quadratic form is

        rise(b) = 1/2 delta^T G delta = 1/2 E (g_n . delta_b)^2.

    ``g_n . delta`` is the product of the gradient of the layer's output and what rounding changes there, so that one
    pass serves all layers and bits. ``formula="trace"`` is the published one, ``1/2 tr(G_i) / n_i ||delta||^2``, as if
    the error had no direction. Measure on samples that the model was not trained on: on those that it knows by heart
    the loss is too flat, by a factor of ten.

    With ``activations=True`` the result's ``activations`` say the same of the inputs of layers: delta is then what
    rounding the input changes at the layer's output, with the range that the input has in its batch.

    Reference: Dong et al., "HAWQ-V2: Hessian aware trace-weighted quantization of neural networks", NeurIPS 2020.

    Args:
        model: A trained model, not quantized; it stays as it is.
        batches: Batches with labels, of samples that were held out.
        config: Which layers may be quantized; its bits are not looked at. ``max_batches`` and ``seed`` are.
        menu: Numbers of bits to try, 2 to 8. Rounding to 2 bits is outside of what a quadratic form describes.
        formula: ``"quadratic"`` or ``"trace"``.
        loss_fn: Loss of a model on a batch; the model's own by default.
        num_output_probes: Backward passes for each batch.
        activations: Whether to look at the inputs of layers, too, rounded as the config says. Layers that read the
            same input are tied, as it is rounded once.
        tie_sums: Whether convolutions whose outputs are added get the same bits, as HAWQ-V3 has it. The files that
            :func:`~hap_hf.export` writes do not need it.
        progress: Whether to show a progress bar.

    Returns:
        The rises with their standard errors, for :func:`~hap_hf.allocate_bits`.

    Raises:
        BatchError: If there are no batches, or no labels in them.
        ConfigError: If the menu is empty or holds other than 2 to 8, no layer is left, or inputs are asked for by the
            trace.
        CurvatureError: If a gradient is not finite.
        UnsupportedModelError: If the model cannot be quantized.
    """
    kind = member(Formula, "formula", formula)
    if not menu or any(isinstance(b, bool) or not isinstance(b, int) or not FEWEST <= b <= MOST for b in menu):
        raise ConfigError(f"menu must hold integers from {FEWEST} to {MOST}, got {menu!r}")
    if activations and kind is Formula.TRACE:
        raise ConfigError("activations=True needs formula='quadratic': the trace is that of weights alone")
    config = config if isinstance(config, BitConfig) else BitConfig.from_dict(config or {})
    check_quantizable(model)
    evidence = Evidence.of(
        model, batches, loss_fn=loss_fn, seed=config.seed, max_batches=config.max_batches, progress=progress
    )
    check_counts(len(evidence.batches), 1)
    chosen, _ = choose_layers(model, evidence.batches, config)
    if not chosen:
        raise ConfigError(f"no layer of this {type(model).__name__} is left to quantize")
    layers = {name: model.get_submodule(name) for name in chosen}
    tied = shared(layers)
    bits = tuple(sorted(set(menu)))
    inputs: Sensitivity | None = None
    if kind is Formula.TRACE:
        rise, error = _by_trace(evidence, layers, bits, num_output_probes)
    else:
        watch = RoundingWatch(layers, bits, Rounding(config.activations) if activations else None)
        (rise, error), *of_inputs = _by_quadratic_form(evidence, watch, num_output_probes)
        if of_inputs:
            read, readers = watch.inputs()
            (input_rise, input_error), *_ = of_inputs
            inputs = Sensitivity(
                {name: input_rise[name] for name in read},
                {name: input_error[name] for name in read},
                _once(read, readers),
                readers,
            )
    sizes = {name: sum(layer.get_parameter(w).numel() for w in weight_names(layer)) for name, layer in layers.items()}
    sums = added_up(model, evidence.batches[0], layers) if tie_sums else []
    return Sensitivity(rise, error, _once(sizes, tied), [*tied, *sums], inputs)


def _once(sizes: Mapping[str, int], tied: Sequence[Sequence[str]]) -> dict[str, int]:
    """Return sizes in which those that share something have it once."""
    return {**sizes, **{name: 0 for names in tied for name in names[1:]}}


Table = dict[str, dict[int, float]]


def _by_quadratic_form(evidence: Evidence, watch: RoundingWatch, num_probes: int) -> list[tuple[Table, Table]]:
    """Return half the mean squared products of gradients and rounding errors, with standard errors.

    Args:
        evidence: What to measure on.
        watch: What is rounded.
        num_probes: Backward passes for each batch.

    Returns:
        Rises and standard errors, of weights and, where the watch looks at them, of inputs.

    Raises:
        CurvatureError: If a gradient is not finite.
    """
    layers = watch.layers
    tensors = {f"{name}.{w}": layer.get_parameter(w) for name, layer in layers.items() for w in weight_names(layer)}
    unique = {id(t): (name, t) for name, t in reversed(tensors.items())}
    wanted = Wanted(dict(unique.values()), {}, squared)
    directions = ggn_directions(evidence.signs, num_probes)
    rows: list[Tensor] = []
    num_terms = 0
    together: bool | None = None
    with evidence.ready(wanted.tensors, "bits", "batch") as tick:
        for index, batch in enumerate(evidence.samples()):
            if batch.num_terms:
                num_terms += batch.num_terms
                measured = partial(_products, evidence.model, watch, wanted, directions)
                if together is None:
                    together = _told_apart(evidence.model, watch, wanted, directions, batch, index)
                    if not together:
                        logger.warning("every sample is differentiated alone, which is slow: they are mixed in a batch")
                rows.append(measured(batch, index) if together else _one_by_one(measured, batch, index))
            tick()
    check_counts(len(evidence.batches), num_terms)
    values = torch.cat(rows)  # [samples, layers * columns]
    if not bool(values.isfinite().all()):
        raise CurvatureError("expected finite gradients, got NaN or infinities; look for extreme weights or inputs")
    count = len(values)
    mean = values.sum(0) / num_terms
    spread = values.std(0, correction=1) * count**0.5 / num_terms if count > 1 else torch.full_like(mean, torch.inf)

    def table(numbers: Tensor, start: int) -> Table:
        found = numbers.view(len(layers), watch.columns)[:, start : start + len(watch.bits)].tolist()
        return {name: dict(zip(watch.bits, own, strict=True)) for name, own in zip(layers, found, strict=True)}

    return [(table(mean, start), table(spread, start)) for start in range(0, watch.columns, len(watch.bits))]


def _products(
    model: nn.Module,
    watch: RoundingWatch,
    wanted: Wanted,
    directions: Any,
    batch: SampleBatch,
    index: int,
    sample: int = 0,
) -> Tensor:
    """Return half the squared products of each sample, ``[samples, layers * bits]``."""
    with watch.recording():
        forward = Forward(model, batch, wanted, index, sample)
    total = torch.zeros(())
    for factor, vectors in directions(forward):
        targets, starts = forward.pulled_back(vectors, 1.0)
        total = total + factor * watch.products(targets, starts, batch.num_samples).square() / 2
    return total


def _told_apart(
    model: nn.Module, watch: RoundingWatch, wanted: Wanted, directions: Any, batch: SampleBatch, index: int
) -> bool:
    """Return whether the samples of a batch have the products that they have alone, from the same starts."""
    with watch.recording():
        forward = Forward(model, batch, wanted, index)
    _, vectors = next(iter(directions(forward)))
    try:
        together = watch.of_weights(watch.products(*forward.pulled_back(vectors, 1.0), batch.num_samples))
        for n in range(min(2, batch.num_samples)):
            single = batch.single(n)
            if single.num_terms:
                with watch.recording():
                    alone = Forward(model, single, wanted, index, n)
                own = rows_of_sample(vectors, n, batch.num_samples, alone)
                row = watch.of_weights(watch.products(*alone.pulled_back(own, 1.0), 1))[0]
                if (row - together[n]).norm() > 1e-2 * row.norm():
                    return False
    except NotPerSampleError:
        return False
    return True


def _one_by_one(measured: Any, batch: SampleBatch, index: int) -> Tensor:
    singles = ((n, batch.single(n)) for n in range(batch.num_samples))
    return torch.cat([measured(single, index, n) for n, single in singles if single.num_terms])


def _by_trace(
    evidence: Evidence, layers: Mapping[str, nn.Module], bits: Sequence[int], num_probes: int
) -> tuple[Table, Table]:
    """Return half the mean curvature of a layer's weights times the squared length of their rounding error."""
    names = {f"{name}.{w}": (name, w) for name, layer in layers.items() for w in weight_names(layer)}
    tensors = {full: layers[name].get_parameter(w) for full, (name, w) in names.items()}
    unique = {full: t for full, t in tensors.items() if full == next(n for n, o in tensors.items() if o is t)}
    wanted = Wanted(unique, dict.fromkeys(unique, (0,)), squared)
    with evidence.ready(unique, "bits", "batch") as tick:
        estimate = estimate_ggn(
            evidence.model,
            evidence.samples(),
            wanted,
            lambda sums: torch.stack([sums[full, 0].sum(1) for full in unique], 1),
            evidence.signs,
            num_probes=num_probes,
            on_batch=tick,
        )
    found = {id(t): i for i, t in enumerate(unique.values())}
    rise: Table = {name: dict.fromkeys(bits, 0.0) for name in layers}
    error: Table = {name: dict.fromkeys(bits, 0.0) for name in layers}
    for full, (name, w) in names.items():
        weight, i = tensors[full].detach(), found[id(tensors[full])]
        for b in bits:
            rounded = round_weight(weight, b, channel_dim(layers[name], w))
            factor = (rounded - weight).double().square().sum().item() / max(weight.numel(), 1) / 2
            rise[name][b] += factor * estimate.mean[i].item()
            error[name][b] += factor * estimate.standard_error[i].item()
    return rise, error
