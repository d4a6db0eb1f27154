"""Rescue of checkpoints whose attention heads were pruned by transformers 4.

transformers 4 could remove attention heads (``model.prune_heads``), saved the smaller weights and noted the heads in
``config.pruned_heads``. transformers 5 ignores that note, builds every head and then refuses the weights.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hap_hf.checkpoint.entry import HapPlanConfig
from hap_hf.discovery import find_groups
from hap_hf.errors import ConfigError, PlanFormatError, PlanMismatchError, UnsupportedModelError
from hap_hf.host import set_attention_
from hap_hf.names.actions import KEEP, PRUNE
from hap_hf.names.group import Group, Kind
from hap_hf.names.plan import GroupPlan, PruningPlan

HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
    "code_revision",
)
"""Arguments that the config and the weights are both read with."""


def load_pruned_heads(auto_class: Any, checkpoint: Any, **from_pretrained_kwargs: Any) -> PreTrainedModel:
    """Load a transformers 4 checkpoint with ``pruned_heads`` in its config.

    The result carries its plan: saved again, it is an ordinary checkpoint of hap_hf. To find out which rows belong to
    which head, a dense model of the config is built once with random float32 weights and dropped before the weights are
    read; so much memory is needed. Nothing but ``checkpoint`` is read, and of it no pickle: weights in
    ``pytorch_model.bin`` are to be saved as ``model.safetensors`` first.

    Args:
        auto_class: The class to load with, ``AutoModelForSequenceClassification`` or a model's own.
        checkpoint: A directory or a name on the Hub.
        **from_pretrained_kwargs: As for ``auto_class.from_pretrained``.

    Returns:
        The pruned model, with its plan in the config.

    Raises:
        ConfigError: If the checkpoint has no pruned heads, or also a ``quantization_config``, or if
            ``use_safetensors=False``.
        PlanFormatError: If ``pruned_heads`` is malformed.
        PlanMismatchError: If it names layers or heads that the model does not have, or others than the weights lack.
        UnsupportedModelError: If the model's heads cannot be told apart layer by layer.
    """
    if from_pretrained_kwargs.get("use_safetensors") is False:
        raise ConfigError("expected use_safetensors=True, got False; save the weights as safetensors first")
    config, model_kwargs = _read_config(auto_class, checkpoint, {**from_pretrained_kwargs, "use_safetensors": True})
    pruned = _check(getattr(config, "pruned_heads", None))
    if not pruned:
        raise ConfigError(
            f"expected pruned_heads in the config of {str(checkpoint)!r}, found none; load it with "
            f"{auto_class.__name__}.from_pretrained"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"the config of {str(checkpoint)!r} has both pruned_heads and a quantization_config; remove the one that "
            "does not describe the weights"
        )
    # The plan says it from now on.
    config.__dict__.pop("pruned_heads")
    layers = _attention_layers(auto_class, config)
    config.quantization_config = HapPlanConfig(_make_plan(layers, pruned)).to_dict()
    model: PreTrainedModel = auto_class.from_pretrained(checkpoint, config=config, **model_kwargs)
    return model


def _read_config(
    auto_class: Any, checkpoint: Any, kwargs: Mapping[str, Any]
) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """Return the config, changed by those of ``kwargs`` that are settings, and the other arguments."""
    if isinstance(kwargs.get("config"), PreTrainedConfig):
        others = {name: value for name, value in kwargs.items() if name != "config"}
        return copy.deepcopy(kwargs["config"]), others
    config_class = getattr(auto_class, "config_class", None) or AutoConfig
    config, unused = config_class.from_pretrained(checkpoint, return_unused_kwargs=True, **kwargs)
    # AutoConfig uses these up, and the weights are to be read with them as well.
    again = {name: kwargs[name] for name in (*HUB_ARGUMENTS, "dtype", "torch_dtype") if name in kwargs}
    return config, unused | again


def _check(pruned_heads: object) -> dict[int, frozenset[int]]:
    """Return the pruned heads of each layer.

    Args:
        pruned_heads: What ``config.json`` says, from a source that need not be trusted.

    Returns:
        Head numbers by layer number; layers without any are left out.

    Raises:
        PlanFormatError: If it is no mapping from layer numbers to lists of head numbers.
    """
    if pruned_heads is None:
        return {}
    if not isinstance(pruned_heads, Mapping):
        raise PlanFormatError(f"pruned_heads must map layer numbers to lists, got {type(pruned_heads).__name__}")
    result: dict[int, frozenset[int]] = {}
    for key, heads in pruned_heads.items():
        text = str(key)[:40]
        if isinstance(key, bool) or not text.isdecimal() or int(text) in result:
            raise PlanFormatError(f"pruned_heads must name each layer once by its number, got {text!r}")
        if not isinstance(heads, Sequence) or any(type(h) is not int or h < 0 for h in heads):
            raise PlanFormatError(f"pruned_heads[{text}] must be a list of head numbers, got {str(heads)[:60]}")
        if len(set(heads)) < len(heads):
            raise PlanFormatError(f"pruned_heads[{text}] names a head twice: {str(heads)[:60]}")
        result[int(text)] = frozenset(heads)
    return {layer: heads for layer, heads in result.items() if heads}


def _attention_layers(auto_class: Any, config: PreTrainedConfig) -> list[Group]:
    """Return the groups of heads of a dense model, one for each layer in order.

    Args:
        auto_class: The class to load with.
        config: The config of the dense model.

    Returns:
        The groups.

    Raises:
        UnsupportedModelError: If there is not one group for each layer.
    """
    dense_config = copy.deepcopy(config)
    # Discovery compares outputs, in a dtype and with an attention that every family has.
    dense_config.dtype = torch.float32
    set_attention_(dense_config, "eager")
    build = getattr(auto_class, "from_config", auto_class)
    with torch.random.fork_rng(devices=[]):  # the model is dropped, and should not move random numbers
        dense = build(dense_config).eval()
    layers = [g for g in find_groups(dense, _example(dense)) if g.kind is Kind.HEADS]
    # ALBERT numbers its few distinct layers, not the times they are run.
    distinct = getattr(config, "num_hidden_groups", None)
    expected = distinct * config.inner_group_num if distinct else config.num_hidden_layers
    if config.is_encoder_decoder or len(layers) != expected:
        raise UnsupportedModelError(
            f"expected one set of heads for each of the {expected} layers of {type(dense).__name__}, found "
            f"{len(layers)}: {[g.name for g in layers][:8]}; only a single stack of layers can be matched with them"
        )
    return layers


def _example(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return one small input.

    Args:
        model: A dense model of the checkpoint's config.

    Returns:
        Token ids or an image.

    Raises:
        UnsupportedModelError: If the model takes neither.
    """
    config, name = model.config, model.main_input_name
    if name == "input_ids":
        return {name: torch.arange(4)[None] % config.vocab_size}
    if name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {name: torch.linspace(-1, 1, config.num_channels * height * width).reshape(1, -1, height, width)}
    raise UnsupportedModelError(f"expected a model of text or images, got {type(model).__name__}, which takes {name!r}")


def _make_plan(layers: Sequence[Group], pruned: Mapping[int, frozenset[int]]) -> PruningPlan:
    """Return the plan that removes the heads.

    Args:
        layers: The groups of heads, in the order of the layers.
        pruned: Head numbers by layer number.

    Returns:
        A plan of one stage, without the layers that keep all their heads.

    Raises:
        PlanMismatchError: If a layer or a head does not exist.
    """
    # transformers 4 numbered the heads of the dense model, whatever it removed first: one stage says it all.
    stage = []
    for layer, heads in sorted(pruned.items()):
        if layer >= len(layers):
            raise PlanMismatchError(f"pruned_heads names layer {layer}, and the model has {len(layers)} layers")
        group = layers[layer]
        if max(heads) >= group.num_units:
            raise PlanMismatchError(
                f"pruned_heads[{layer}] names head {max(heads)}, and {group.name} has {group.num_units} heads"
            )
        stage.append(GroupPlan(group, "".join(PRUNE if u in heads else KEEP for u in range(group.num_units))))
    return PruningPlan((tuple(stage),), ({"method": "transformers 4 pruned_heads"},))
