"""Finding the groups of a model."""

import inspect
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hap_hf.discovery.acceptance import accept
from hap_hf.discovery.counting import Counts, count
from hap_hf.discovery.families import find_candidates
from hap_hf.discovery.record import record
from hap_hf.discovery.runs import Run, on_few_tokens, runs_of
from hap_hf.discovery.unrun import out_of_reach
from hap_hf.discovery.whole import LeftWhole
from hap_hf.errors import HapError, UnsupportedModelError
from hap_hf.evidence.batches import Batch, as_batch, few_samples, move_to_model, raise_does_not_run
from hap_hf.model.bare import check_bare
from hap_hf.names.group import Group, Kind

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Discovery:
    """What was found in a model.

    Args:
        groups: What can be removed from, in the order in which the model runs.
        left_whole: What cannot, and why.
    """

    groups: tuple[Group, ...]
    left_whole: tuple[LeftWhole, ...] = ()

    def missing(self, kinds: Sequence[Kind]) -> list[LeftWhole]:
        """Return what was left whole among the kinds of which no group was found.

        Args:
            kinds: The kinds that are wanted.

        Returns:
            The entries.
        """
        absent = set(kinds) - {g.kind for g in self.groups}
        return [entry for entry in self.left_whole if entry.kind in absent]


def find_groups(model: nn.Module, batch: Any) -> tuple[Group, ...]:
    """Return every attention head, FFN neuron and convolution channel that can be removed from ``model``.

    A unit is what shares no weight with its neighbours: under grouped queries a key/value head with its query heads,
    with a relative position table shared by all layers the same head of every layer, with residual additions the same
    channel of every convolution that is added up, with grouped convolutions a group of channels. Anything whose removal
    would not equal masking it, to the precision of the model's dtype, is left whole; :func:`discover` says what and
    why.

    Args:
        model: The model, which is left as found. It must not be wrapped, compiled or quantized, nor hold adapters.
        batch: Keyword arguments of its forward, as a collator gives them, or a pair of inputs and labels; two samples
            are used.

    Returns:
        The groups in the order in which the model runs.

    Raises:
        UnsupportedModelError: If the model is wrapped, compiled, quantized, with adapters or on ``meta``, or nothing is
            found.
        BatchError: If ``batch`` holds no tensors, or the model does not run on it.
    """
    return discover(model, batch).groups


def discover(model: nn.Module, batch: Any, *, others: Iterable[Any] = ()) -> Discovery:
    """Return what can be removed from ``model`` and what cannot; see :func:`find_groups`.

    What belongs together does not depend on how long a text is, and finding out takes time and memory that grow with
    it. So the first tokens are looked at, and what was found is tried once more at the full length, at which everything
    is counted. Where the two disagree, or the model does not run on few tokens, the whole example is looked at.

    Where the model behaves otherwise in training, beside dropout, it is looked at there, too. What no run reaches, as
    an auxiliary head behind an argument, may read units of groups: these stay whole, and the layer is named.

    Args:
        model: The model, which is left as found.
        batch: As for :func:`find_groups`.
        others: Further batches, looked at while there are layers that nothing else has called.

    Returns:
        What was found.

    Raises:
        HapError: Others of these, of whatever kind.
        UnsupportedModelError: If the model cannot be looked at, or nothing is found.
        BatchError: If ``batch`` holds no tensors, or the model does not run on it.
    """
    check_bare(model)
    given = as_batch(model, batch)
    example = example_of(model, given)
    try:
        counts = count(model, example)
    except Exception as error:  # the model's own code may raise anything
        raise_does_not_run(model, given, error)
    runs, unrun = runs_of(model, example, (example_of(model, other) for other in others))
    few = on_few_tokens(runs)
    found = None if few is None else _on_few(model, few, runs, counts, unrun)
    try:
        return found or _on(model, runs, counts, unrun)
    except HapError:
        raise
    except Exception as error:  # the model's own code, with its layers cut open, and what autograd says of it
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be looked at, as its code fails once its layers are cut open for "
            f"gradients: {type(error).__name__}: {error}; it stays as it is"
        ) from error


def example_of(model: nn.Module, batch: Any) -> Batch:
    """Return two samples of a batch on the model's device, to be run without a cache.

    Args:
        model: The model.
        batch: As for :func:`find_groups`.

    Returns:
        Keyword arguments of its forward.
    """
    example = few_samples(move_to_model(model, as_batch(model, batch)))
    if "use_cache" in inspect.signature(model.forward).parameters:
        example["use_cache"] = False
    return example


def _on_few(
    model: nn.Module, few: Sequence[Run], runs: Sequence[Run], counts: Counts, unrun: frozenset[str]
) -> Discovery | None:
    """Return what a few tokens tell, if it also holds on all of them."""
    try:
        return _on(model, few, counts, unrun, confirm=runs)
    except HapError as error:
        logger.debug("few tokens do not tell: %s", error)
    except Exception as error:  # the model's own code, run on fewer tokens than it may have been written for
        logger.debug("not on few tokens: %s: %s", type(error).__name__, error)
    return None


def _on(
    model: nn.Module, runs: Sequence[Run], counts: Counts, unrun: frozenset[str], confirm: Sequence[Run] = ()
) -> Discovery:
    """Return what some runs tell, and has been confirmed by others if these are given."""
    # The trial runs with the model's own weights, so the recording must have ended.
    with record(model, runs) as recording:
        candidates = find_candidates(model, recording, counts)
        candidates, touched = out_of_reach(model, recording, candidates, unrun)
    groups, rejected = accept(model, runs, candidates, confirm)
    left_whole = [*recording.left_whole, *touched, *rejected]
    if not groups:
        raise UnsupportedModelError(
            f"found nothing to remove in {type(model).__name__}: looked for attention heads (query, key, "
            "value and output projections whose channels fall into two heads or more), FFN neurons (two linear "
            "layers with only elementwise operations between them) and convolution channels (likewise, batch norms, "
            "depthwise convolutions, additions and concatenations included) among "
            f"{len(recording.projections)} linear layers and convolutions, and had "
            f"{len(candidates)} candidates, none of which gave the masked model's output when removed"
            + "".join(f"\n  left whole: {entry}" for entry in left_whole[:10])
        )
    # Every layer appears somewhere: in a group, with a reason of its own, or here.
    held = {s.tensor.rpartition(".")[0] for g in groups for s in g.slices}
    named = {name for entry in left_whole for name in entry.names}
    tried = {s.tensor.rpartition(".")[0] for c in candidates for s in c.group.slices}
    outside = tuple(sorted(set(recording.projections) - held - named - tried))
    if outside:
        left_whole.append(LeftWhole(outside, "what they read and make is needed whole elsewhere"))
    for entry in left_whole:
        logger.info("left whole: %s", entry)
    return Discovery(tuple(_with_unique_names(groups)), tuple(left_whole))


def _with_unique_names(groups: Sequence[Group]) -> Iterator[Group]:
    """Yield the groups with a number behind names that come again, as a plan finds its groups by name."""
    seen: dict[str, int] = defaultdict(int)
    for group in groups:
        seen[group.name] += 1
        yield replace(group, name=f"{group.name}#{seen[group.name]}") if seen[group.name] > 1 else group
