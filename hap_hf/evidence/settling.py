"""The loss where none was given: the model's own, one that fits the labels, or agreement with the dense model."""

import inspect
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hap_hf.evidence.batches import OWN_OUTPUTS, call, move_to_model, raise_does_not_run, unknown_names
from hap_hf.evidence.evidence import Evidence
from hap_hf.evidence.losses import loss_in, model_loss
from hap_hf.evidence.samples import LABEL_NAMES
from hap_hf.host import tree_map_only
from hap_hf.model.state import preserved, restart_random_numbers

logger = logging.getLogger(__name__)

_BETWEEN = ("hidden_state", "attention", "embedding", "past", "cache")
"""Parts of names of outputs that are no answers of a model with logits."""


def with_default_loss(evidence: Evidence) -> Evidence:
    """Return evidence with the loss that its batches call for, where none was given.

    With floating-point labels of a model that returns logits alone: all labels of all batches tell whether a sample has
    shares of the classes, or several of them. Without labels, where the model computes no loss of its own accord, the
    dense model's outputs are the targets, see :func:`agreement`; they are computed here, and stay with the batches.

    Args:
        evidence: What to measure on.

    Returns:
        The evidence with its loss.

    Raises:
        BatchError: If the model does not run on a batch.
    """
    if evidence.loss_fn is not model_loss or evidence.facts.own_outputs:
        return evidence
    model, batches = evidence.model, evidence.batches
    dropped = sorted({name for batch in batches for name in unknown_names(model, batch)} - {"labels"})
    taken = inspect.signature(model.forward).parameters
    near = [n for batch in batches for n in batch if (n in LABEL_NAMES or "label" in n) and n not in {"labels", *taken}]
    kinds = {_kind(batch.get("labels")) for batch in batches}
    unlabelled = not near and any("labels" not in batch for batch in batches[:1]) and not _has_loss(evidence)
    everyone = evidence.processes.gather("labels", (kinds, unlabelled))
    if dropped and not near:
        logger.warning("%s takes no %s, which the batches hold: left out", type(model).__name__, ", ".join(dropped))
    if any(without for _, without in everyone):
        logger.warning("the batches hold no labels: scored by agreement with the dense model's own outputs")
        return replace(
            evidence,
            batches=[{**batch, OWN_OUTPUTS: _outputs(evidence, batch)} for batch in batches],
            loss_fn=agreement,
            facts=replace(evidence.facts, own_outputs=True),
        )
    found = set[str]().union(*(kinds for kinds, _ in everyone)) - {"none"}
    # A sample with one class out of several, written as zeros and a one, fits both.
    if found <= {"one", "several"}:
        return replace(evidence, loss_fn=partial(model_loss, several="several" in found)) if found else evidence
    return replace(evidence, loss_fn=partial(model_loss, several=False)) if found <= {"one", "shares"} else evidence


def agreement(model: Any, batch: Mapping[str, Any]) -> Tensor:
    r"""Return how far a model's outputs are from those of the dense model: zero for that itself.

    Of logits it is the Kullback-Leibler divergence ``KL(p || q)`` from the dense model's distribution p, in the mean
    over positions, without those that an attention mask leaves out; of everything else the mean squared difference. Its
    Gauss-Newton matrix at the dense model is the Fisher matrix, which needs no labels.

    Reference: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, at temperature 1, with the model as
    its own teacher.

    Args:
        model: The model, dense or with units silenced.
        batch: Keyword arguments of its forward, with the dense model's outputs.

    Returns:
        The loss, a mean over samples.
    """
    found, wanted = _answers(call(model, batch)), batch[OWN_OUTPUTS]
    mask = batch.get("attention_mask")
    return torch.stack([_distance(name, found[name], wanted[name], mask) for name in wanted]).sum()


def _distance(name: str, found: Tensor, wanted: Tensor, mask: Any) -> Tensor:
    """Return the mean distance of one output from the dense model's."""
    # Dense predictions have their classes in the second dimension, all others in the last one.
    dim = 1 if found.dim() == 4 else -1
    wanted = wanted.to(found.dtype)
    if "logits" in name and found.shape[dim] > 1:
        each = functional.kl_div(
            found.log_softmax(dim), wanted.log_softmax(dim), reduction="none", log_target=True
        ).sum(dim)
    else:
        each = (
            (found - wanted).square().flatten(found.dim() - 1).mean(-1)
            if found.dim() > 1
            else (found - wanted).square()
        )
    if isinstance(mask, Tensor) and mask.dim() == 2 and each.shape == mask.shape:
        counted = mask.to(each.dtype)
        return ((each * counted).sum(1) / counted.sum(1).clamp_min(1)).mean()
    return each.mean()


def _answers(output: Any) -> dict[str, Tensor]:
    """Return what a model says, by name: its floating-point outputs, without what lies between where there are logits.

    Args:
        output: Whatever it returned.
    """
    if isinstance(output, Tensor):
        return {"output": output}
    named = dict(output) if isinstance(output, Mapping) else vars(output) if hasattr(output, "__dict__") else None
    if named is None:
        named = {f"output {i}": t for i, t in enumerate(output)} if isinstance(output, (tuple, list)) else {}
    tensors = {n: t for n, t in named.items() if isinstance(t, Tensor) and t.is_floating_point() and t.dim()}
    if any("logits" in name for name in tensors):
        return {n: t for n, t in tensors.items() if not any(word in n for word in _BETWEEN)}
    return tensors


def _outputs(evidence: Evidence, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what the dense model says of a batch, on the device of the batch."""
    model = evidence.model
    device = next(t.device for t in batch.values() if isinstance(t, Tensor))
    with preserved(model, plain_attention=False), torch.no_grad():
        restart_random_numbers(model, evidence.seed)
        found = _answers(call(model, move_to_model(model, batch)))
    kept: dict[str, Tensor] = tree_map_only(Tensor, lambda t: t.to(device), found)
    return kept


def _has_loss(evidence: Evidence) -> bool:
    """Return whether a model computes a loss on the first batch, which holds nothing called labels."""
    model, batch = evidence.model, evidence.batches[0]
    try:
        with preserved(model, plain_attention=False), torch.no_grad():
            restart_random_numbers(model, evidence.seed)
            return loss_in(call(model, move_to_model(model, batch)), None) is not None
    except Exception as error:  # the model's own code
        raise_does_not_run(model, batch, error)


def _kind(labels: Any) -> str:
    """Return what floating-point labels may be: one class a sample, several of them, shares of them, or other numbers.

    Returns:
        ``"one"``, ``"several"``, ``"shares"`` or ``"other"``; ``"none"`` for labels that are no such numbers.
    """
    if not isinstance(labels, Tensor) or not labels.is_floating_point() or labels.dim() != 2:
        return "none"
    whole = bool(((labels == 0) | (labels == 1)).all())
    # Half-precision shares add up to 1 only nearly.
    sums_to_one = bool(((labels.double().sum(1) - 1).abs() < 1e-2).all()) and bool((labels >= 0).all())
    if whole:
        return "one" if sums_to_one else "several"
    return "shares" if sums_to_one else "other"
