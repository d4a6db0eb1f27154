"""Attributes of modules that count units or their entries, and that surgery may lower.

A plan from a stranger must not reach any other attribute of a module.
"""

from enum import StrEnum

from hap_hf.errors import ConfigError


class Counts(StrEnum):
    """What an attribute counts."""

    HEADS = "heads"
    """Attention heads, or query heads for each key head."""
    GROUPS = "groups"
    """Groups of channels of torch's own layers, whose meaning is known."""
    ENTRIES = "entries"
    """Features or channels, of a layer or of a part of it."""


_HEADS = """attention_heads heads n_head n_heads n_kv_heads nhead num_attention_heads num_head num_heads
    num_key_value_groups num_key_value_heads num_kv_heads num_query_heads"""
_ENTRIES = """all_head_size attention_dim attn_dim channels_after channels_before d_ff d_inner dim dim_conv
    dim_feedforward dim_out dim_out_qk dim_out_v dim_qk dim_v embed_dim expand_chs ffn_dim ffn_hidden_size hidden_dim
    hidden_features hidden_size inner_dim intermediate_dim intermediate_size key_attn_dim kv_dim o_proj_inpdim
    out_channels out_chs pdim q_dim split_size val_attn_dim width"""

_COUNTERS = {
    **dict.fromkeys(_HEADS.split(), Counts.HEADS),
    **dict.fromkeys(("groups", "num_groups"), Counts.GROUPS),
    **dict.fromkeys(_ENTRIES.split(), Counts.ENTRIES),
}


def counted_by(attribute: str) -> Counts | None:
    """Return what an attribute of this name counts.

    Args:
        attribute: Name of the attribute, without its module's.

    Returns:
        What it counts; None where surgery may not touch it.
    """
    return _COUNTERS.get(attribute)


def register_counter(attribute: str, counts: Counts | str = Counts.HEADS) -> None:
    """Let surgery lower an attribute that a model's code reads, such as a head count of an unusual name.

    Discovery looks for it by name and value, and tries on the model whether it does what is said here.

    Args:
        attribute: Name of the attribute, without its module's.
        counts: ``"heads"`` or ``"entries"``.

    Raises:
        ConfigError: If the name is none, or known for something else.

    Example:
        >>> register_counter("attn_head_num", counts="heads")
    """
    if not attribute.isidentifier():
        raise ConfigError(f"expected the name of an attribute, got {attribute!r}")
    try:
        wanted = Counts(counts)
    except ValueError:
        raise ConfigError(f"counts must be 'heads' or 'entries', got {counts!r}") from None
    # How channels fall into groups is known of torch's own layers only.
    if wanted is Counts.GROUPS or _COUNTERS.setdefault(attribute, wanted) is not wanted:
        raise ConfigError(f"{attribute!r} cannot be registered as counting {wanted.value}; choose 'heads' or 'entries'")
