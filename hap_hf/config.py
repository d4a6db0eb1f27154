"""Every choice a user can make, checked when it is made."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, TypeVar

from hap_hf.errors import ConfigError
from hap_hf.names.group import Kind

_E = TypeVar("_E", bound=StrEnum)


class Method(StrEnum):
    """How sensitivities are estimated."""

    HESSIAN = "hessian"
    """Relative Hessian trace by Hutchinson's estimator (Yu et al., WACV 2022)."""
    HESSIAN_SPLIT = "hessian_split"
    """The same trace as that of G (see ``ggn``) and Hutchinson's of H - G alone: less noise where that is small."""
    GGN = "ggn"
    """The same with the generalised Gauss-Newton matrix G for the Hessian: no cross terms, never negative."""
    GGN_QUADRATIC = "ggn_quadratic"
    """w_u^T G w_u / 2 instead of the mean eigenvalue: the curvature along the unit's own weights."""
    EMPIRICAL_FISHER = "empirical_fisher"
    """The same as ``ggn`` with the squared gradients of the labels at hand."""
    TAYLOR = "taylor"
    """First-order change of the loss (Molchanov et al., CVPR 2019)."""
    MASK_GGN = "mask_ggn"
    """Curvature along a mask on what is read of the unit, by the generalised Gauss-Newton matrix."""
    MASK_FISHER = "mask_fisher"
    """Squared gradients of a mask on what is read of the unit (Kwon et al., NeurIPS 2022)."""
    MICHEL = "michel"
    """Absolute gradients of that mask, normalised in each group (Michel et al., NeurIPS 2019)."""
    MAGNITUDE = "magnitude"
    """Squared norm over number of entries; needs no batch."""
    RANDOM = "random"
    """Uniform random numbers; the floor that a criterion must beat."""


class Coupling(StrEnum):
    """How a trace and a squared norm are combined where a unit has slices of several tensors.

    For ``hessian``, ``hessian_split``, ``ggn``, ``empirical_fisher`` and ``magnitude``; others have no such choice.
    """

    JOINT = "joint"
    """All its weights are one vector: the trace times the norm of all, over the number of all."""
    SUM = "sum"
    """Each slice by itself, and the results added up: no slice's norm meets another's trace."""
    FILTER = "filter"
    """The paper's: as ``sum``, but only of the rows that produce the unit, not of what reads it."""


class Precision(StrEnum):
    """Arithmetic of the forward pass and its derivatives while scoring."""

    FP32 = "fp32"
    """The model's own dtype, no autocast."""
    BF16 = "bf16"
    """bfloat16 autocast."""
    FP16 = "fp16"
    """float16 autocast with a constant loss scale (Chong et al., 2023, with the scale divided out again)."""


class Hvp(StrEnum):
    """How the products with the Hessian of ``hessian`` and ``hessian_split`` are computed."""

    DOUBLE_BACKWARD = "double_backward"
    """A backward pass through the gradient's graph: exact; attention must be eager or SDPA."""
    FORWARD_OVER_REVERSE = "forward_over_reverse"
    """The gradient in dual numbers: as exact and slower, without that graph; attention must be eager or SDPA."""
    FINITE_DIFFERENCE = "finite_difference"
    """Differences of gradients: approximate; any attention kernel, checkpointed activations."""


class ImplantInit(StrEnum):
    """Initial weights of an implant."""

    SVD = "svd"
    """Best approximation of the replaced rows at the implant's rank, on calibration inputs when there are batches."""
    ZERO = "zero"
    """Silent at first, as in the paper's code: the columns that read the implanted units are zero and learn first."""


@dataclass(frozen=True, kw_only=True)
class HapConfig:
    """What to remove, how to score it and what to put in its place.

    Exactly one of ``prune_ratio``, ``target_params`` and ``target_macs`` says how much. With N units in all, the
    ``prune_ratio`` r of them with the lowest sensitivity are cut; of the cut ones the ``implant_ratio`` q with the
    highest sensitivity become implants and the rest is removed. So 1 - r is kept, q r implanted and (1 - q) r removed,
    as in the reference code of Yu et al., "Hessian-Aware Pruning and Optimal Neural Implant", WACV 2022.

    Args:
        prune_ratio: Share of all units below the threshold, in [0, 1).
        target_params: Share of the prunable parameters to keep, in (0, 1).
        target_macs: Share of the prunable multiply-accumulates to keep, in (0, 1).
        implant_ratio: Share of the cut units that is implanted instead of removed, in [0, 1].
        max_group_ratio: Largest share of a group's units that may be cut, in (0, 1]. The best unit always stays.
        round_to: Surviving numbers of neurons and of channels are a multiple of this.
        kinds: Which kinds of units to touch.
        exclude: Glob patterns; groups whose name, or one of whose tensors' names, matches stay whole.
        method: How sensitivities are estimated.
        coupling: How the slices of a unit are combined.
        num_probes: Hutchinson probes per batch, at least 2 so that a standard error exists; the most of ``stop_share``.
        stop_share: Draw 4, 8, 16 and so on probes per batch until less than this share of the units lies within two
            standard errors of the threshold, in (0, 1); None for always ``num_probes``.
        hvp: How products with the Hessian are computed.
        num_output_probes: Backward passes per batch of the ``ggn`` methods and for that part of ``hessian_split``, each
            from random signs at the model's outputs; None for as many as there are outputs, which is exact.
        num_passes: Passes in which units are chosen. Each takes its part of the amount and silences it; the next one
            scores what is left anew. None for 4 with ``mask_ggn`` and 1 with all others, as they were published.
        per_cost: With ``target_params`` and ``target_macs``, rank units by sensitivity per parameter or
            multiply-accumulate that they take. None for that with ``mask_ggn`` and not with all others, as they were
            published.
        compensate: Fit the weights that read what is left to what they lose, see
            :class:`~hap_hf.compensation.Compensation`. None for that with ``mask_ggn`` and not with all others, as they
            were published.
        max_batches: Use at most this many batches; None for all.
        precision: Arithmetic while scoring.
        seed: Seed of probes and random scores.
        implant_init: Initial weights of implants.
        implant_cost: Size of a linear layer's implant as a share of the weights it replaces, in (0, 1). That of a
            convolution is 1 x 1.
        recalibrate: Estimate the statistics of batch norms anew after surgery, on the batches given; no labels needed.
        progress: Show a progress bar while scoring.

    Raises:
        ConfigError: If a value is out of range or the amounts contradict each other.
    """

    prune_ratio: float | None = None
    target_params: float | None = None
    target_macs: float | None = None
    implant_ratio: float = 0.0
    max_group_ratio: float = 0.95
    round_to: int = 1
    kinds: tuple[Kind, ...] = (Kind.HEADS, Kind.FFN, Kind.CHANNELS)
    exclude: tuple[str, ...] = ()
    method: Method = Method.MASK_GGN
    coupling: Coupling = Coupling.SUM
    num_probes: int = 8
    stop_share: float | None = None
    hvp: Hvp = Hvp.DOUBLE_BACKWARD
    num_output_probes: int | None = 1
    num_passes: int | None = None
    per_cost: bool | None = None
    compensate: bool | None = None
    max_batches: int | None = 8
    precision: Precision = Precision.FP32
    seed: int = 0
    implant_init: ImplantInit = ImplantInit.SVD
    implant_cost: float = 0.25
    recalibrate: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        """Check every value and turn strings into enums.

        Raises:
            ConfigError: If a value is out of range or the amounts contradict each other.
        """
        self._set("kinds", tuple(_member(Kind, "kinds", k) for k in _sequence("kinds", self.kinds)))
        self._set("exclude", tuple(_sequence("exclude", self.exclude)))
        self._set("method", _member(Method, "method", self.method))
        self._set("coupling", _member(Coupling, "coupling", self.coupling))
        self._set("hvp", _member(Hvp, "hvp", self.hvp))
        self._set("precision", _member(Precision, "precision", self.precision))
        self._set("implant_init", _member(ImplantInit, "implant_init", self.implant_init))
        amounts = {
            name: getattr(self, name)
            for name in ("prune_ratio", "target_params", "target_macs")
            if getattr(self, name) is not None
        }
        if len(amounts) != 1:
            raise ConfigError(
                "expected exactly one of prune_ratio, target_params and target_macs, "
                f"got {amounts if amounts else 'none'}; for example HapConfig(prune_ratio=0.5)"
            )
        if self.prune_ratio is not None:
            _between("prune_ratio", self.prune_ratio, 0, 1, "[0, 1)", low_in=True)
        for name in ("target_params", "target_macs", "stop_share"):
            if getattr(self, name) is not None:
                _between(name, getattr(self, name), 0, 1, "(0, 1)")
        _between("implant_ratio", self.implant_ratio, 0, 1, "[0, 1]", low_in=True, high_in=True)
        _between("max_group_ratio", self.max_group_ratio, 0, 1, "(0, 1]", high_in=True)
        _between("implant_cost", self.implant_cost, 0, 1, "(0, 1)")
        _at_least("round_to", self.round_to, 1)
        _at_least("num_probes", self.num_probes, 2)
        for name in ("num_output_probes", "num_passes", "max_batches"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        _at_least("seed", self.seed, 0)
        if self.seed >= 2**63:
            raise ConfigError(f"seed must be below 2**63, the largest that torch.Generator takes, got {self.seed!r}")
        for name in ("per_cost", "compensate"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True, False or None, got {getattr(self, name)!r}")
        for name in ("recalibrate", "progress"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not self.kinds:
            raise ConfigError(f"kinds is empty: nothing could be removed; choose from {[k.value for k in Kind]}")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # frozen: the one moment at which a field may still change

    @property
    def passes(self) -> int:
        """Number of passes in which units are chosen."""
        return self.num_passes or (4 if self.method is Method.MASK_GGN else 1)

    @property
    def per(self) -> str | None:
        """What sensitivities are divided by before units are compared: ``params``, ``macs`` or nothing."""
        wanted = self.method is Method.MASK_GGN if self.per_cost is None else self.per_cost
        if not wanted or self.prune_ratio is not None:
            return None
        return "params" if self.target_params is not None else "macs"

    @property
    def compensates(self) -> bool:
        """Whether the weights that read what is left make up for what they lose."""
        return self.method is Method.MASK_GGN if self.compensate is None else self.compensate

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "HapConfig":
        """Return the config that ``to_dict`` described.

        Args:
            values: Field names and their values.

        Returns:
            The checked config.

        Raises:
            ConfigError: If ``values`` is no mapping, a name is unknown or a value is out of range.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"settings must be a mapping of names to values, got {type(values).__name__}")
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known, key=str)
        if unknown:
            raise ConfigError(f"unknown settings {unknown}; known are {sorted(known)}")
        return cls(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value.value if isinstance(value, StrEnum) else value


def _member(enum: type[_E], name: str, value: object) -> _E:
    try:
        return enum(str(value))
    except ValueError:
        raise ConfigError(f"{name} must be one of {[m.value for m in enum]}, got {value!r}") from None


def _sequence(name: str, value: object) -> tuple[Any, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, (tuple, list)):
        raise ConfigError(f"{name} must be a string or a sequence of strings, got {value!r}")
    for item in value:
        if not isinstance(item, str):
            raise ConfigError(f"{name} must hold strings, got {item!r}")
    return tuple(value)


def _between(
    name: str, value: object, low: float, high: float, interval: str, *, low_in: bool = False, high_in: bool = False
) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name} must be a number in {interval}, got {value!r}")
    above = value >= low if low_in else value > low
    below = value <= high if high_in else value < high
    if not (above and below):  # NaN fails both comparisons
        raise ConfigError(f"{name} must lie in {interval}, got {value!r}")


def _at_least(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name} must be an integer of at least {low}, got {value!r}")
