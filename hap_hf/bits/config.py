"""Every choice about bits, checked when it is made."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Self

from hap_hf.errors import ConfigError
from hap_hf.names.bits import FEWEST, MOST, LayerBits, Rounding
from hap_hf.names.checks import at_least, boolean, member, of_settings, plain_json, strings


@dataclass(frozen=True, kw_only=True)
class BitConfig:
    """How many bits weights and activations get, and how activations are rounded.

    Weights are rounded symmetrically, with a scale for each output channel. A number of bits may be given for all
    layers, or by glob patterns of their names; of several that match, the last counts, and a layer that none matches
    has 8.

    Args:
        weight_bits: Bits of a weight, 2 to 8; a number, or numbers by pattern.
        activation_bits: Bits of the input of a layer, 2 to 8; a number, numbers by pattern, or None for floating point.
        activations: ``"asymmetric"``: one range for all inputs of a layer, with a zero point; ``"symmetric"``: without
            one; ``"per_token"``: with a zero point and a range of its own for each position of a text or each image,
            taken when it is there.
        ranges: ``"ema"``: a range is a moving mean of the smallest and the largest value of each batch; ``"minmax"``:
            it holds them all.
        exclude: Glob patterns of layers that stay in floating point.
        embeddings: Whether the rows of embeddings are rounded, too.
        recalibrate: Whether statistics of batch norms follow what the rounding does to their inputs.
        max_batches: Use at most this many batches; None for all.
        seed: Seed of the order in which training data is drawn.

    Raises:
        ConfigError: If a value is out of range.
    """

    weight_bits: int | Mapping[str, int] = 8
    activation_bits: int | Mapping[str, int | None] | None = 8
    activations: Rounding | str = Rounding.ASYMMETRIC
    ranges: str = "ema"
    exclude: Sequence[str] = ()
    embeddings: bool = True
    recalibrate: bool = True
    max_batches: int | None = 16
    seed: int = field(default=0)

    def __post_init__(self) -> None:
        """Check every value."""
        object.__setattr__(self, "activations", member(Rounding, "activations", self.activations))
        object.__setattr__(self, "exclude", strings("exclude", self.exclude))
        for name, none in (("weight_bits", False), ("activation_bits", True)):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                object.__setattr__(self, name, {str(key): _bits(name, bits, none=none) for key, bits in value.items()})
            else:
                _bits(name, value, none=none)
        if self.ranges not in {"ema", "minmax"}:
            raise ConfigError(f"ranges must be one of ['ema', 'minmax'], got {self.ranges!r}")
        boolean("embeddings", self.embeddings)
        boolean("recalibrate", self.recalibrate)
        if self.max_batches is not None:
            at_least("max_batches", self.max_batches, 1)
        at_least("seed", self.seed, 0)

    def of_layer(self, name: str) -> LayerBits | None:
        """Return the bits of a layer.

        Args:
            name: Dotted name of the module.

        Returns:
            The bits, or None where it stays in floating point.
        """
        if any(fnmatchcase(name, pattern) for pattern in self.exclude):
            return None
        weight = _of(self.weight_bits, name)
        assert weight is not None
        return LayerBits(weight, _of(self.activation_bits, name))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        settings: dict[str, Any] = plain_json(asdict(self))
        return settings

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """Return the config that ``to_dict`` described.

        Args:
            settings: Values by name; the rest are defaults.

        Returns:
            The config.

        Raises:
            ConfigError: If a name is unknown, or a value out of range.
        """
        return of_settings(cls, settings)

    def with_weight_bits(self, bits: Mapping[str, int]) -> Self:
        """Return the same config with bits for some layers by name, as ``allocate_bits`` gives them."""
        return replace(self, weight_bits={"*": 8, **bits})

    def with_activation_bits(self, bits: Mapping[str, int]) -> Self:
        """Return the same config with bits for the inputs of some layers by name."""
        return replace(self, activation_bits={"*": 8, **bits})


def _of(value: Any, name: str) -> int | None:
    if not isinstance(value, Mapping):
        return None if value is None else int(value)
    matching = [bits for pattern, bits in value.items() if fnmatchcase(name, pattern)]
    return matching[-1] if matching else MOST


def _bits(name: str, value: Any, *, none: bool) -> int | None:
    if value is None and none:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not FEWEST <= value <= MOST:
        raise ConfigError(
            f"{name} must be an integer from {FEWEST} to {MOST}{', or None' if none else ''}, got {value!r}"
        )
    return value
