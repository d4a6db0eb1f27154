"""Finding the groups of a model."""

import inspect
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hap_hf.discovery.acceptance import accept
from hap_hf.discovery.families import find_candidates
from hap_hf.discovery.record import record
from hap_hf.errors import BatchError, UnsupportedModelError
from hap_hf.evidence.batches import batch_size, call, few_samples, move_to_model
from hap_hf.layers.projection import is_grouped, is_projection
from hap_hf.model.bare import check_bare
from hap_hf.model.state import preserved
from hap_hf.names.group import Group

logger = logging.getLogger(__name__)


def find_groups(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Group, ...]:
    """Return every attention head, FFN neuron and convolution channel that can be removed from ``model``.

    A unit is what shares no weight with its neighbours: under grouped queries a key/value head with its query heads,
    with a relative position table shared by all layers the same head of every layer, with residual additions the same
    channel of every convolution that is added up, with grouped convolutions a group of channels. Anything
    whose removal would not equal masking it, to the precision of the model's dtype, is left whole and named in a log
    line.

    Args:
        model: The model, which is left as found. It must not be wrapped, compiled or quantized, nor hold adapters.
        batch: Keyword arguments of its forward, as a collator gives them; two samples are used.

    Returns:
        The groups in the order in which the model runs.

    Raises:
        UnsupportedModelError: If the model is wrapped, compiled, quantized, with adapters or on ``meta``, or nothing is
            found.
        BatchError: If ``batch`` is no mapping with tensors, or the model does not run on it.
    """
    check_bare(model)
    if not isinstance(batch, Mapping) or not any(isinstance(v, Tensor) for v in batch.values()):
        raise BatchError(
            "expected a batch as a mapping of argument names to tensors, as a Hugging Face collator gives it, "
            f"got {type(batch)}"
        )
    example = few_samples(move_to_model(model, batch))
    if "use_cache" in inspect.signature(model.forward).parameters:
        example["use_cache"] = False
    try:
        core_macs = _macs_outside_projections(model, example)
    except Exception as error:  # the model's own code may raise anything
        shapes = {k: list(v.shape) for k, v in batch.items() if isinstance(v, Tensor)}
        raise BatchError(
            f"{type(model).__name__} does not run on the first batch, {shapes}: {error}; pass batches like those it "
            "was trained on"
        ) from error
    with record(model, example) as recording:
        candidates = find_candidates(model, recording, core_macs)
    groups = accept(model, example, candidates)
    if not groups:
        raise UnsupportedModelError(
            f"found nothing to remove in {type(model).__name__}: looked for attention heads (query, key, "
            "value and output projections whose channels fall into two heads or more), FFN neurons (two linear "
            "layers with only elementwise operations between them) and convolution channels (likewise, batch norms, "
            "depthwise convolutions, additions and concatenations included) among "
            f"{len(recording.projections)} linear layers and convolutions, and had "
            f"{len(candidates)} candidates, none of which gave the masked model's output when removed; "
            "logging.getLogger('hap_hf') at level INFO names each"
        )
    held = {s.tensor.rpartition(".")[0] for g in groups for s in g.slices}
    whole = sorted(set(recording.projections) - held)
    if whole:
        logger.info("left whole: %d layers outside of any group: %s", len(whole), ", ".join(whole))
    return tuple(_with_unique_names(groups))


def _with_unique_names(groups: Sequence[Group]) -> Iterator[Group]:
    seen: dict[str, int] = defaultdict(int)
    for group in groups:
        seen[group.name] += 1
        yield replace(group, name=f"{group.name}#{seen[group.name]}") if seen[group.name] > 1 else group


def _macs_outside_projections(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, float]:
    """Return for each module the multiply-accumulates per sample that its projections do not account for."""
    counter = FlopCounterMode(display=False)
    # The math kernel, so that attention products are matrix products and get counted.
    with preserved(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        call(model, batch)
    totals = {key: sum(ops.values()) for key, ops in counter.get_flop_counts().items()}
    root = type(model).__name__
    result = {}
    projections = [n for n, m in model.named_modules() if is_projection(m) or is_grouped(m)]
    for name, _ in model.named_modules():
        inside = sum(totals.get(f"{root}.{p}", 0) for p in projections if p.startswith(f"{name}." if name else ""))
        total = totals.get(f"{root}.{name}" if name else root, 0)
        result[name] = (total - inside) / 2 / batch_size(batch)
    return result
