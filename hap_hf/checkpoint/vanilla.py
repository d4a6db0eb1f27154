"""Stock configs for pruned models, so that a checkpoint needs no hap_hf: possible where the layers are uniform."""

import copy
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hap_hf.errors import ConfigError
from hap_hf.host import attention_of, set_attention_
from hap_hf.names.actions import IMPLANT
from hap_hf.names.group import Kind, Role
from hap_hf.names.plan import PruningPlan

SETTINGS = {
    Kind.HEADS: (
        "num_attention_heads",
        "num_key_value_heads",
        "num_heads",
        "encoder_attention_heads",
        "decoder_attention_heads",
    ),
    Kind.FFN: (
        "intermediate_size",
        "hidden_dim",
        "ffn_dim",
        "ffn_hidden_size",
        "d_ff",
        "n_inner",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "mlp_ratio",
    ),
}
"""Settings of stock configs that count heads or FFN neurons. Which of them a config has, and what it does, is tried."""


_LARGER = (
    ": it has no head_dim, so that fewer heads would be larger heads, and no plain checkpoint can hold them; prune "
    "with HapConfig(..., kinds='ffn', equal_widths=True), or --kinds ffn --equal-widths, or save with vanilla=False"
)


def stock_config(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedConfig:
    """Return a config that builds a model of the pruned shapes without hap_hf.

    Args:
        model: The pruned model.
        plan: Everything that was done to it.

    Returns:
        A config without a plan, that was tried by building an empty model of it.

    Raises:
        ConfigError: If there is none, with the reason.
    """
    if any(IMPLANT in g.actions for g in plan):
        implanted = sorted({g.group.name for g in plan if IMPLANT in g.actions})
        raise ConfigError(
            f"a plain checkpoint cannot hold implants, and {_some(implanted)} have them; prune with implant_ratio=0, "
            "or save with vanilla=False"
        )
    if any(plan.bypasses):
        beside = sorted({b.exit for paths in plan.bypasses for b in paths})
        raise ConfigError(
            f"a plain checkpoint cannot hold bypasses, and {_some(beside)} have them; prune with implants='rows', or "
            "save with vanilla=False"
        )
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    widths = list(_widths(plan))
    name = type(config).__name__
    try:
        for kind, settings in SETTINGS.items():
            _change(config, settings, [w for w in widths if w.kind is kind])
        # Built as from_pretrained will build it: from JSON, whose checks are stricter than those of assignment.
        config = type(config).from_dict(json.loads(config.to_json_string()))
        set_attention_(config, attention_of(model.config))
        with torch.device("meta"):
            empty = type(model)(config)
    except ConfigError:
        raise
    except Exception as error:  # whatever a config or a constructor of transformers raises on numbers it does not like
        raise ConfigError(f"{name} does not accept the pruned sizes: {error}; save with vanilla=False") from error
    differing = list(_differences(model, empty, plan))
    if differing:
        tensors = {sentence.partition(":")[0] for sentence in differing}
        larger = _fewer_heads([w for w in widths if not tensors.isdisjoint(w.consumers)])
        raise ConfigError(
            f"no {name} describes the pruned {type(model).__name__}"
            + (_LARGER if larger else "; save with vanilla=False")
            + f": {'; '.join(differing[:3])}"
            + (f"; and {len(differing) - 3} more" if len(differing) > 3 else "")
        )
    return config


@dataclass(frozen=True)
class Width:
    """Units of a group before pruning and now.

    Args:
        place: Name of the group.
        kind: What one unit is.
        before: Units of the dense model.
        now: Units of the pruned model.
        consumers: The tensors that read the units, which tell the group from others, whatever stage it is named in.
    """

    place: str
    kind: Kind
    before: int
    now: int
    consumers: frozenset[str]


def _widths(plan: PruningPlan) -> Iterator[Width]:
    """Yield the width of every group that lost units."""
    # A group that is cut in several stages counts once: units before the first, and after the last.
    found: dict[tuple[Kind, frozenset[str]], Width] = {}
    for g in plan:
        consumers = frozenset(s.tensor for s in g.group.slices if s.role is Role.CONSUMER)
        first = found.get((g.group.kind, consumers))
        before = first.before if first else g.group.num_units
        now = g.survivors
        found[g.group.kind, consumers] = Width(g.group.name, g.group.kind, before, now, consumers)
    yield from found.values()


def _change(config: PreTrainedConfig, settings: Sequence[str], widths: Sequence[Width]) -> None:
    """Set those of ``settings`` that the config has, and that count what ``widths`` counts, to the new numbers.

    Args:
        config: The config to change.
        settings: Names to look for.
        widths: The groups of one kind.

    Raises:
        ConfigError: If one setting would have to be two numbers.
    """
    # Configs map common names to their own, and only the latter are stored.
    keys = {config.attribute_map.get(setting, setting) for setting in settings}
    if _fewer_heads(widths):
        heads: int = getattr(config, "num_attention_heads", 1)
        # Before the number of heads changes, from which models compute it where it is not set.
        config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    for key in sorted(k for k in keys if hasattr(config, k)):
        scope = key.partition("_")[0] if key.startswith(("encoder_", "decoder_")) else ""
        value = getattr(config, key)
        # A setting of one half of an encoder-decoder counts only groups that lie in it.
        counted = [
            w for w in widths if scope in {"", *w.place.replace(":", ".").split(".")} and _counts(config, key, w)
        ]
        if len({(w.before, w.now) for w in counted}) > 1:
            by_now = defaultdict(list)
            for w in counted:
                by_now[w.now].append(w.place)
            # Whether a model takes a head_dim shows only when one is built, which takes one number of heads.
            several = counted[0].kind is Kind.HEADS
            none = ", and kinds='ffn' where head_dim follows from the number of heads, as of BERT" if several else ""
            raise ConfigError(
                f"{type(config).__name__}.{key} is one number for all layers, and the plan leaves "
                + ", ".join(f"{now} in {_some(places)}" for now, places in sorted(by_now.items()))
                + f"; prune with HapConfig(..., equal_widths=True){none}, or save with vanilla=False"
            )
        for w in counted[:1]:
            if key == "mlp_ratio":
                ratio = w.now / config.hidden_size
                setattr(config, key, int(ratio) if ratio == int(ratio) else ratio)
            else:
                # Under grouped queries a unit has several query heads: as many as before.
                setattr(config, key, value // w.before * w.now if w.kind is Kind.HEADS else w.now)


def _fewer_heads(widths: Sequence[Width]) -> bool:
    return any(w.kind is Kind.HEADS and w.now < w.before for w in widths)


def _counts(config: PreTrainedConfig, key: str, width: Width) -> bool:
    """Return whether the setting ``key`` had the number that this group had."""
    value = getattr(config, key)
    if width.kind is Kind.HEADS:  # query heads are a multiple of the units under grouped queries
        return isinstance(value, int) and value % width.before == 0
    if key == "mlp_ratio":
        return isinstance(value, (int, float)) and int(config.hidden_size * value) == width.before
    return bool(width.before == (4 * config.hidden_size if value is None else value))


def _differences(model: nn.Module, empty: nn.Module, plan: PruningPlan) -> Iterator[str]:
    """Yield a sentence for every shape, factor or counter in which two models differ."""
    shapes, stock = (
        {n: list(t.shape) for n, t in [*m.named_parameters(remove_duplicate=False), *m.named_buffers()]}
        for m in (model, empty)
    )
    for name in sorted(shapes.keys() | stock.keys()):
        if shapes.get(name) != stock.get(name):
            yield f"{name}: shape {shapes.get(name)} in the model, {stock.get(name)} in the stock model"
    counters = {c.attribute for g in plan for c in g.group.counters}
    own = dict(model.named_modules())
    for path, module in empty.named_modules():
        for attribute, value in vars(module).items():
            # Factors such as an attention's scale follow from the size of a head and are stored nowhere else.
            if isinstance(value, float) or f"{path}.{attribute}" in counters:
                found = getattr(own.get(path), attribute, None)
                if found != value:
                    yield f"{path}.{attribute}: {found} in the model, {value} in the stock model"


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
