"""What a criterion is: its settings, its facts, and a function from what is measured on to scores."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from hap_hf.criteria.scores import Scores
from hap_hf.curvature import InputListener, Watchable
from hap_hf.errors import ConfigError
from hap_hf.evidence.evidence import Evidence
from hap_hf.names.amount import Amount
from hap_hf.names.checks import meant, plain_json
from hap_hf.names.currencies import Currency
from hap_hf.names.group import Group

_C = TypeVar("_C", bound="type[Criterion]")


@dataclass(frozen=True)
class ScoringTask:
    """What a criterion is given.

    Args:
        evidence: What to score on.
        groups: Units to score.
        amount: How much will be cut, for criteria that stop once that is settled; None where it is not known.
        per: What sensitivities are divided by before units are compared; None where units are compared as they are.
        watchable: What earlier scores of the same model on the same batches found out about its layers.
        listener: Wants to be told what layers read, by criteria that have :attr:`Criterion.listened_to`.
    """

    evidence: Evidence
    groups: tuple[Group, ...]
    amount: Amount | None = None
    per: Currency | None = None
    watchable: Watchable = field(default_factory=Watchable)
    listener: InputListener | None = None


@dataclass(frozen=True, kw_only=True)
class Criterion(ABC):
    """How sensitivities are estimated: derive a frozen dataclass, and register it by :func:`register_criterion`.

    Attributes:
        name: Under which it is registered.
        passes: Passes in which units are chosen, unless the config says otherwise.
        per_cost: Whether units are ranked by sensitivity per cost where there is a budget, unless it says otherwise.
        compensates: Whether weights make up for units that go, unless it says otherwise.
        needs_batches: Whether the scores depend on batches, or on the weights alone.
        listened_to: Whether compensation can be measured in the same backward passes, from the outputs by the model's
            own prediction, of which there are ``num_output_probes`` for each batch: the criterion hands the task's
            listener on.
        by_samples: Whether they are made of the gradients of single samples.
    """

    name: ClassVar[str]
    passes: ClassVar[int] = 1
    per_cost: ClassVar[bool] = False
    compensates: ClassVar[bool] = False
    needs_batches: ClassVar[bool] = True
    listened_to: ClassVar[bool] = False
    by_samples: ClassVar[bool] = True

    def suited(self, evidence: Evidence) -> "Criterion":
        """Return the criterion that scores on some evidence: this one, unless it has a stand-in for what is missing.

        Called at the door, before anything else is done with the model.

        Args:
            evidence: What will be scored on, tried by :func:`~hap_hf.evidence.rehearsal.rehearsed`.

        Returns:
            The criterion.
        """
        return self

    def try_out(self, evidence: Evidence) -> None:
        """Raise what scoring would raise after other work was done, as for derivatives that the loss has not.

        Args:
            evidence: What will be scored on, tried.
        """
        return

    @abstractmethod
    def score(self, task: ScoringTask) -> Scores:
        """Return the sensitivity of every unit; the model is left exactly as found.

        Args:
            task: What to score, on what.

        Returns:
            The scores, without their time.
        """

    def to_dict(self) -> dict[str, Any]:
        """Return the name and the settings as plain JSON values."""
        return {"name": self.name, **{k: plain_json(v) for k, v in asdict(self).items()}}


_CRITERIA: dict[str, type[Criterion]] = {}


def register_criterion(criterion: _C) -> _C:
    """Make a criterion known by its name: a decorator.

    Args:
        criterion: A frozen dataclass derived from :class:`Criterion`, with a name of its own.

    Returns:
        The same class.

    Raises:
        ConfigError: If another criterion has the name.
    """
    # With two of one name, a saved config would mean whichever was imported first.
    other = _CRITERIA.setdefault(criterion.name, criterion)
    if other is not criterion:
        raise ConfigError(f"the name {criterion.name!r} is taken by {other.__qualname__}; choose another")
    return criterion


def known_criteria() -> Mapping[str, type[Criterion]]:
    """Return all registered criteria by name."""
    return dict(_CRITERIA)


def criterion_of(method: object) -> Criterion:
    """Return the criterion that a name, a mapping of its settings, or the criterion itself stands for.

    Args:
        method: ``"hessian"``, ``{"name": "hessian", "num_probes": 4}`` or ``Hessian(num_probes=4)``.

    Returns:
        The criterion, with its defaults where a setting was not given.

    Raises:
        ConfigError: If there is none of that name, or it has no such setting.
    """
    if isinstance(method, Criterion):
        return method
    settings = dict(method) if isinstance(method, Mapping) else {"name": method}
    name = settings.pop("name", None)
    # A slip that the message about names below would not explain.
    if isinstance(name, type) and issubclass(name, Criterion):
        raise ConfigError(f"method must be an object, got the class {name.__name__}; write method={name.__name__}()")
    if not isinstance(name, str) or name not in _CRITERIA:
        hint = meant(name, _CRITERIA) if isinstance(name, str) else ""
        raise ConfigError(f"method must be one of {list(_CRITERIA)} or a Criterion, got {name!r}{hint}")
    known = {f.name for f in fields(_CRITERIA[name])}
    unknown = sorted(map(str, set(settings) - known))
    if unknown:
        raise ConfigError(f"{name} has no setting {', '.join(unknown)}; it has {sorted(known) or 'none'}")
    return _CRITERIA[name](**settings)


def hint_at(setting: str, known: Iterable[str]) -> str:
    """Return the end of a message about a setting of a config that there is not.

    Args:
        setting: Its name.
        known: Names of the settings that there are.

    Returns:
        Which criterion it belongs to, or which setting was probably meant.
    """
    owners = [c for c in _CRITERIA.values() if setting in {f.name for f in fields(c)}]
    if not owners:
        return meant(setting, known)
    each = " or ".join(f"method={c.__name__}({setting}=...)" for c in owners)
    return f": it belongs to a criterion, write {each}"
