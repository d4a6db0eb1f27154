"""Trying a loss on its batches before anything is done with it: at the door, where a refusal costs nothing."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from hap_hf.curvature import Forward, SampleBatch, Wanted, squared
from hap_hf.errors import BatchError, CurvatureError, HapError
from hap_hf.evidence.batches import OWN_OUTPUTS, Batch, raise_does_not_run
from hap_hf.evidence.evidence import Evidence
from hap_hf.evidence.losses import Terms, num_terms
from hap_hf.evidence.memory import is_out_of_memory
from hap_hf.evidence.precision import Precision
from hap_hf.evidence.samples import num_samples, part_of
from hap_hf.evidence.settling import with_default_loss
from hap_hf.layers.projection import is_projection

logger = logging.getLogger(__name__)

_TOLERANCE = {False: 1e-3, True: 3e-2}
"""Largest difference between the loss of a batch and that of its pieces, as a share of it; in half precision."""


def rehearsed(evidence: Evidence) -> Evidence:
    """Return the same evidence with what trying its loss on each batch told; see :class:`~hap_hf.evidence.facts.Facts`.

    Whether samples have losses of their own is not guessed from the form of a batch. A batch is cut into its first
    sample, its last one and those between, and the losses of the pieces must add up to that of the whole, as a mean
    over the labels that count, as a mean over samples or as a sum, by the same rule for all batches. Where they do not,
    as for losses that compare the samples of a batch, or with targets that were not cut along, batches stay whole.

    Args:
        evidence: What to measure on. Where it was tried before, nothing happens.

    Returns:
        The evidence to score with.

    Raises:
        BatchError: If the loss cannot be computed, or the batches hold no labels that a loss could be made of.
        CurvatureError: If a loss is not finite, no scalar, or does not depend on the weights.
    """
    evidence = with_default_loss(evidence)
    if evidence.facts.tried:
        return evidence
    weights = projection_weights(evidence.model)
    why: str | None = None
    wholes: list[tuple[Any, Tensor]] = []
    with evidence.ready(weights, "looking at the loss", "batch") as tick:
        for index, batch in enumerate(evidence.batches):
            found = _whole(evidence, batch, index, Wanted(weights, {}, squared), look=why is None)
            if found is not None:
                why = why or found[2]
                wholes.append(_apart(evidence, found[0]) if evidence.facts.own_outputs else found[:2])
            tick()
        for multiples in (False, True):
            holding = set(Terms)
            for batch, loss in wholes:
                holding &= _terms_that_hold(evidence, batch, loss, holding, multiples=multiples)
            everyone = evidence.processes.gather("how batches fall into samples", (holding, why))
            # In the order of the enumeration, the same in all processes.
            kinds = [kind for kind in Terms if all(kind in held for held, _ in everyone)]
            if kinds:
                break
    why = next((reason for _, reason in everyone if reason is not None), None)
    terms = kinds[0] if kinds else Terms.COUNTED
    if not kinds:
        logger.warning(
            "the loss of a batch is not made up of those of its samples, so that gradients of whole batches stand in "
            "for those of samples"
        )
    facts = replace(
        evidence.facts,
        tried=True,
        adds_up=bool(kinds),
        terms=terms,
        multiples=multiples and bool(kinds),
        no_curvature=why,
    )
    return replace(evidence, facts=facts)


def projection_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return what a loss is differentiated by before it is known which units there are.

    Args:
        model: Any model.

    Returns:
        The parameters of its linear layers and convolutions by name; all of them where it has none.
    """
    found = {
        f"{path}.{name}" if path else name: p
        for path, module in model.named_modules()
        if is_projection(module)
        for name, p in module.named_parameters(recurse=False)
    }
    return dict(found or model.named_parameters())


def _whole(
    evidence: Evidence, batch: Any, index: int, wanted: Wanted, *, look: bool
) -> tuple[Any, Tensor, str | None] | None:
    """Return the batch, or as much of it as fits in memory, its loss, and why that has no curvature in the outputs.

    Returns:
        None where there is nothing to look at: no loss terms, or not enough memory for a single sample.

    Raises:
        HapError: If there is no loss to go on with.
    """
    while True:
        loss, terms = _loss_of(evidence, batch)
        if not terms:
            return None
        try:
            forward = Forward(evidence.model, SampleBatch(loss, 1, 1, _never), wanted, index)
            _differentiate(evidence, forward)
            return batch, forward.loss.detach(), _no_curvature(forward) if look else None
        except HapError:
            raise
        except Exception as error:  # whatever the model's and the user's own code raises
            if not is_out_of_memory(error):
                _fail(evidence, batch, index, error)
            if num_samples(batch) < 2:  # scoring says what to do about it
                return None
            batch = part_of(batch, slice(0, (num_samples(batch) + 1) // 2))


def _differentiate(evidence: Evidence, forward: Forward) -> None:
    """Go back through the first batch once: in-place operations and the like only show there."""
    if forward.index:
        return
    weights = list(forward.wanted.tensors.values())
    try:
        torch.autograd.grad(forward.loss, weights, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise CurvatureError(
            f"the loss of {type(evidence.model).__name__} cannot be differentiated: {error}; method='magnitude' looks "
            "at the weights alone"
        ) from error


def _never(n: int) -> SampleBatch:
    """Stand in for the samples of a batch that is looked at as a whole."""
    raise AssertionError(n)


def _apart(evidence: Evidence, batch: Batch) -> tuple[Batch, Tensor]:
    """Return a batch with other targets than the dense model's outputs, and its loss, which is not zero with these."""
    batch = {**batch, OWN_OUTPUTS: {name: torch.zeros_like(t) for name, t in batch[OWN_OUTPUTS].items()}}
    with torch.no_grad():
        return batch, _loss_of(evidence, batch)[0]()


def _no_curvature(forward: Forward) -> str | None:
    """Return why the Hessian of a loss with respect to the model's outputs has no root that is known."""
    try:
        _ = forward.roots
    except HapError as error:
        return str(error).partition("; ")[0]  # without the advice for whoever asked for it
    except Exception as error:  # autograd's own words, as for a loss without second derivatives
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {error}"
    return None


def _terms_that_hold(
    evidence: Evidence, batch: Any, whole: Tensor, asked: Collection[Terms], *, multiples: bool
) -> set[Terms]:
    """Return over what a loss may be a mean: with which of the weights asked for those of pieces add up to it."""
    size = num_samples(batch)
    if size < 2 or not asked:
        return set(asked)
    sums, sizes = dict.fromkeys(asked, 0.0), dict.fromkeys(asked, 0.0)
    try:
        for part in (part_of(batch, rows, multiples=multiples) for rows in _pieces(size)):
            loss, counted = _loss_of(evidence, part)
            # With a graph, as a loss may look at gradients itself. A mean over nothing is no number.
            with torch.enable_grad():
                value = loss().item() if counted else 0.0
            for kind in asked:
                weighted = value * (counted if kind is Terms.COUNTED else num_terms(part, kind))
                sums[kind], sizes[kind] = sums[kind] + weighted, sizes[kind] + abs(weighted)
    except Exception as error:  # a loss that takes no other number of samples
        logger.debug("a piece of a batch has no loss: %s: %s", type(error).__name__, error)
        return set()
    dtype = next(evidence.model.parameters()).dtype
    half = evidence.precision is not Precision.FP32 or dtype in {torch.float16, torch.bfloat16}
    counted = _loss_of(evidence, batch)[1]
    weights = {kind: counted if kind is Terms.COUNTED else num_terms(batch, kind) for kind in asked}
    # False for NaN, as of a piece for which the loss is not defined.
    return {k for k in asked if abs(sums[k] - weights[k] * whole.item()) <= _TOLERANCE[half] * sizes[k] + 1e-30}


def _loss_of(evidence: Evidence, batch: Any) -> tuple[Callable[[], Tensor], int]:
    """Return the loss of one batch, and its number of terms."""
    ((loss, terms),) = replace(evidence, batches=[batch]).losses()
    return loss, terms


def _fail(evidence: Evidence, batch: Any, index: int, error: Exception) -> NoReturn:
    """Raise the error that says that a loss could not be computed."""
    if not evidence.given_loss:
        raise_does_not_run(evidence.model, batch, error)
    got = f"a mapping with {sorted(map(str, batch))}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
    kind = CurvatureError if isinstance(error, RuntimeError) else BatchError  # as a caller who catches it expects
    raise kind(
        f"loss_fn failed on batch {index}, {got}: {type(error).__name__}: {error}; it is called with the model and "
        "each batch as the loader gives it, as in loss_fn=lambda model, batch: model(**batch).loss"
    ) from error


def _pieces(size: int) -> Iterator[slice]:
    """Yield the first sample, those between and the last one: pairs and triples of neighbours fall apart."""
    for start, stop in ((0, 1), (1, size - 1), (size - 1, size)):
        if start < stop:
            yield slice(start, stop)
