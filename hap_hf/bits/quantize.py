"""Quantizing a trained model, without further training."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hap_hf.bits.config import BitConfig
from hap_hf.bits.ranges import Ranges, folded, observed_ranges, of_all_processes, set_ranges_
from hap_hf.bits.report import BitReport
from hap_hf.checkpoint import check_recordable, record_bits
from hap_hf.errors import BatchError, ConfigError, UnsupportedModelError
from hap_hf.evidence.batches import Batch, call, move_to_model
from hap_hf.evidence.evidence import Evidence
from hap_hf.evidence.processes import ALONE, Processes
from hap_hf.host import own_parameters
from hap_hf.layers.kind import kind_of
from hap_hf.layers.quantized import can_be_quantized, channel_dim, inputs_of, product_of, weight_names
from hap_hf.model.bare import check_bare
from hap_hf.model.quantizing import apply_bits_, file_bytes, quantized_layers, remove_bits_, saved_state
from hap_hf.model.state import preserved
from hap_hf.names.bits import BitPlan, LayerBits, Rounding, Stored
from hap_hf.surgery import Statistics, shift_statistics_, statistics_of

logger = logging.getLogger(__name__)


def quantize_(
    model: nn.Module,
    batches: Iterable[Any],
    config: BitConfig | Mapping[str, Any] | None = None,
    *,
    processes: Processes = ALONE,
) -> BitReport:
    """Quantize ``model`` in place: from now on it rounds its weights and what goes into its layers.

    It stays a model that trains, with gradients that go straight through the rounding. For a ``PreTrainedModel`` the
    bits are recorded in its config, so that ``save_pretrained`` writes integers and ``from_pretrained`` reads them.
    After an error the model is as it was.

    Args:
        model: A trained model in float32 or float64, pruned or not. Prune first: a pruned row leaves other scales.
        batches: Batches from which ranges of activations are taken; labels may be left out.
        config: Bits and how to round; a mapping is read by ``BitConfig.from_dict``.
        processes: The processes that quantize together; ``batches`` are the share of this one.

    Returns:
        What was quantized, what was not and why, and the size of the file.

    Raises:
        BatchError: If there are no batches, or an input of a layer is not finite.
        ConfigError: If the config leaves nothing to quantize.
        UnsupportedModelError: If the model is wrapped, quantized already, or in half precision.
    """
    begun = time.perf_counter()
    config = config if isinstance(config, BitConfig) else BitConfig.from_dict(config or {})
    check_quantizable(model)
    check_recordable(model)
    drawn = Evidence.of(model, batches, max_batches=config.max_batches, processes=processes).batches
    with processes.agreeing("quantizing"):
        if not drawn:
            raise BatchError(
                "expected at least one batch to take the ranges of activations from, got none; pass a few batches of "
                "training data"
            )
    before = file_bytes(model.state_dict())
    chosen, left = choose_layers(model, drawn, config, processes)
    if not chosen:
        raise ConfigError(
            f"no layer of this {type(model).__name__} is left to quantize: "
            + "; ".join(f"{name}: {why}" for name, why in list(left.items())[:3])
        )
    plan = BitPlan(chosen, Rounding(config.activations), Stored.CODES)
    statistics = _statistics(model, drawn, processes) if config.recalibrate else None
    apply_bits_(model, plan)
    try:
        with processes.agreeing("quantizing"):
            seen = observed_ranges(model, drawn)
        ranges = folded(of_all_processes(seen, processes), moving=config.ranges == "ema")
        _warn_of_constants(ranges)
        set_ranges_(model, ranges)
        if statistics:
            with processes.agreeing("recalibration"), _inputs_in_floating_point(model):
                shift_statistics_(model, drawn, statistics, processes=processes)
        record_bits(model, plan)
    except BaseException:
        remove_bits_(model)
        raise
    after = file_bytes(saved_state(model, model.state_dict(), Stored.CODES))
    return BitReport(plan, left, before, after, time.perf_counter() - begun)


def _statistics(model: nn.Module, batches: Sequence[Batch], processes: Processes) -> Statistics | None:
    """Return the statistics of batch norms before anything is rounded, or None where the batches do not allow it."""
    try:
        with processes.agreeing("recalibration"):
            return statistics_of(model, batches, processes=processes)
    except BatchError as error:
        logger.warning("batch norms keep the statistics from before the rounding: %s", error)
        return None


@contextmanager
def _inputs_in_floating_point(model: nn.Module) -> Iterator[None]:
    """Let quantized layers round their weights alone.

    While statistics are taken, batch norms normalise by the batch at hand, for which the ranges need not be made.
    """
    before = [(layer, layer.bits) for _, layer in quantized_layers(model)]
    try:
        for layer, bits in before:
            layer.bits = LayerBits(bits.weight, None)
        yield
    finally:
        for layer, bits in before:
            layer.bits = bits


def check_quantizable(model: nn.Module) -> None:
    """Check that a model can be quantized.

    Args:
        model: Any model.

    Raises:
        UnsupportedModelError: If it is wrapped, quantized already, has live adapters or is in half precision.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a model, a torch.nn.Module, got a {type(model).__name__}")
    check_bare(model, before="quantize")
    for name, parameter in model.named_parameters():
        if parameter.dtype not in {torch.float32, torch.float64}:
            raise UnsupportedModelError(
                f"expected weights in float32, got {parameter.dtype} in {name}, which holds fewer digits than rounded "
                "weights have; load the model with dtype=torch.float32 (training may still use bf16=True)"
            )


def choose_layers(
    model: nn.Module, batches: Sequence[Batch], config: BitConfig, processes: Processes = ALONE
) -> tuple[dict[str, LayerBits], dict[str, str]]:
    """Return which layers can be quantized.

    Args:
        model: The model, not quantized.
        batches: Batches to see which layers are called.
        config: Bits, and what is excluded.
        processes: The processes that choose together.

    Returns:
        The bits of layers by name, and why other layers stay in floating point.
    """
    chosen, left = _chosen(model, config)
    called, other = _called(model, batches, chosen)
    called = set().union(*map(set, processes.gather("layers that are called", sorted(called))))
    for name, reason in other.items():
        left[name] = reason
        del chosen[name]
    _leave_ties_(model, chosen, left, called)
    return chosen, left


def _chosen(model: nn.Module, config: BitConfig) -> tuple[dict[str, LayerBits], dict[str, str]]:
    """Return the bits of the layers that may be quantized, and why others may not."""
    chosen: dict[str, LayerBits] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        is_layer = isinstance(module, nn.Embedding) or kind_of(module) is not None
        bits = config.of_layer(name)
        if not is_layer:
            continue
        if bits is None:
            left[name] = "excluded"
        elif isinstance(module, nn.Embedding) and not config.embeddings:
            left[name] = "embeddings=False"
        elif not can_be_quantized(module):
            left[name] = f"no known way to quantize a {type(module).__name__}"
        elif module.get_parameter("weight").numel() == 0:
            left[name] = "no weights"
        else:
            chosen[name] = bits if inputs_of(module) else LayerBits(bits.weight, None)
    return chosen, left


def _leave_ties_(model: nn.Module, chosen: dict[str, LayerBits], left: dict[str, str], called: set[str]) -> None:
    """Take layers out of the choice that are never called, or that share a weight with one that is not rounded alike.

    A shared weight is stored once. A table that is never read itself may be the one under whose name it is.
    """
    modules, owners = dict(model.named_modules()), dict[int, list[str]]()
    for name, module in modules.items():
        for parameter in own_parameters(module).values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    for names in owners.values():
        used = not called.isdisjoint(names)
        for name in names:
            if name in chosen and name not in called and (inputs_of(modules[name]) or not used):
                left[name] = "never called on the batches"
                del chosen[name]
        shared = [name for name in names if name in chosen]
        rounded = {(chosen[n].weight, channel_dim(modules[n], "weight")) for n in shared}
        if len(rounded) > 1 or (shared and len(shared) < len(names)):
            for name in shared:
                left[name] = "its weight is also that of a layer that is not quantized alike"
                del chosen[name]


def _called(
    model: nn.Module, batches: Sequence[Batch], chosen: Mapping[str, LayerBits]
) -> tuple[set[str], dict[str, str]]:
    """Return which layers are called, and which compute something else than their kind says."""
    names = {id(module): name for name, module in model.named_modules() if name in chosen}
    called: set[str] = set()
    other: dict[str, str] = {}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        name = names[id(module)]
        if name in called:
            return
        called.add(name)
        if isinstance(module, nn.Embedding):
            return
        x = args[0] if args else next(iter(kwargs.values()))
        weights = {n: module.get_parameter(n) for n in weight_names(module)}
        again = product_of(module, x, weights)
        if again.shape != output.shape or not torch.allclose(again, output, rtol=1e-3, atol=1e-5, equal_nan=True):
            other[name] = f"a {type(module).__name__} that computes something else than its kind"

    handles = [
        module.register_forward_hook(look, with_kwargs=True) for module in model.modules() if id(module) in names
    ]
    try:
        with preserved(model, plain_attention=False, without_checkpointing=False), torch.no_grad():
            for batch in batches:
                if len(called) < len(names):
                    call(model, move_to_model(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    return called, other


def _warn_of_constants(ranges: Ranges) -> None:
    dead: Iterator[str] = (name for (name, _), r in ranges.items() if not bool(r.any()))
    names = sorted(set(dead))
    if names:
        logger.warning(
            "the input of %s was 0 in all batches (%d layers), and will be rounded to 0; pass more batches if that is "
            "not what it always is",
            names[0],
            len(names),
        )
