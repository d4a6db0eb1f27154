"""The settings as flags of a command line, made from what their fields say of themselves."""

import dataclasses
from dataclasses import field, make_dataclass
from typing import Any

from hap_hf.config import HapConfig
from hap_hf.criteria import known_criteria
from hap_hf.errors import ConfigError

_NO_FLAG = ("amount", "parts")
_ZERO_IS_NONE = ("max_batches", "num_output_probes", "stop_share")
_OPTIONAL: dict[type, Any] = {bool: bool | None, int: int | None, float: float | None, str: str | None}


def settings_of_criteria() -> dict[str, dict[str, "dataclasses.Field[Any]"]]:
    """Return the settings that criteria have, by their name and then by the criterion's.

    Returns:
        The fields.
    """
    found: dict[str, dict[str, dataclasses.Field[Any]]] = {}
    for name, criterion in known_criteria().items():
        for each in dataclasses.fields(criterion):
            found.setdefault(each.name, {})[name] = each
    return found


def pruning_arguments(*leave_out: str) -> type[Any]:
    """Return a dataclass with a field for every setting of :class:`~hap_hf.config.HapConfig` and of its criteria.

    ``transformers.HfArgumentParser`` makes flags of it. A field that was not given is None, so that defaults stay where
    they belong; its help says them.

    Args:
        *leave_out: Settings that have no flag of their own, such as ``"seed"``.

    Returns:
        The class; :func:`config_of` makes a config of its objects.

    Example:
        >>> flags = pruning_arguments("seed")(target_params=0.5, method="hessian", num_probes=4)
        >>> config_of(flags, seed=3).criterion.num_probes
        4
    """
    fields = [
        _flag(f.name, _kind(f.type, f.default), f"{f.metadata['help']}{_word(f.default)}")
        for f in dataclasses.fields(HapConfig)
        if f.name not in (*_NO_FLAG, *leave_out)
    ]
    # A setting that several criteria have is one flag, with the type and the default of the first.
    for name, by_criterion in settings_of_criteria().items():
        first = next(iter(by_criterion.values()))
        owners = ", ".join(by_criterion)
        fields.append(
            _flag(
                name,
                _kind(first.type, first.default),
                f"{first.metadata['help']} For {owners}.{_word(first.default)}",
            )
        )
    fields = [_naming_criteria(f) if f[0] == "method" else f for f in fields]
    return make_dataclass("PruningArguments", fields, kw_only=True)


def config_of(arguments: Any, **settings: Any) -> HapConfig:
    """Return the config that flags ask for.

    Args:
        arguments: An object of the class that :func:`pruning_arguments` made, or of one derived from it.
        **settings: Settings that had no flag.

    Returns:
        The config, with the defaults of what no flag gave.

    Raises:
        ConfigError: If a value is out of range, or a setting of another criterion than the chosen one was given.
    """
    given = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(arguments)}
    given = {name: _given(name, value) for name, value in given.items() if value is not None} | settings
    own = {f.name for f in dataclasses.fields(HapConfig)}
    name = given.get("method", HapConfig.__dataclass_fields__["method"].default.name)
    of_criterion = {n: given[n] for n in settings_of_criteria() if n in given and n not in own}
    for setting in of_criterion:
        owners = settings_of_criteria()[setting]
        # A method that does not exist is left to the config, whose message lists those that do.
        if name not in owners and name in known_criteria():
            raise ConfigError(f"--{setting} belongs to --method {' or '.join(owners)}, got --method {name}")
    if of_criterion:
        given["method"] = {"name": name, **of_criterion}
    return HapConfig(**{n: value for n, value in given.items() if n in own})


def asks_for_pruning(arguments: Any) -> bool:
    """Return whether any flag of :func:`pruning_arguments` was given.

    Args:
        arguments: An object of that class, or of one derived from it.

    Returns:
        Whether one is not None.
    """
    names = {f.name for f in dataclasses.fields(HapConfig)} | set(settings_of_criteria())
    return any(getattr(arguments, name, None) is not None for name in names)


def _naming_criteria(flag: tuple[str, Any, Any]) -> tuple[str, Any, Any]:
    """Return the flag of the criterion with the names that there are, of those from outside the package, too."""
    name, kind, setting = flag
    return _flag(name, kind, f"{setting.metadata['help']} One of {', '.join(sorted(known_criteria()))}.")


def _flag(name: str, kind: Any, text: str) -> tuple[str, Any, Any]:
    # argparse reads a per cent sign as the beginning of a placeholder, and a command line has no word for None.
    text = text.replace("%", "%%").replace("None for", "0 for")
    return name, kind, field(default=None, metadata={"help": text})


def _given(name: str, value: Any) -> Any:
    return None if name in _ZERO_IS_NONE and value == 0 else value


def _kind(annotation: Any, default: Any) -> Any:
    """Return the type of a flag: what a command line can express of a field's own."""
    if isinstance(default, tuple):
        return list[str] | None
    for plain, optional in _OPTIONAL.items():
        if annotation in {plain, optional}:
            return optional
    return str | None


def _word(default: Any) -> str:
    """Return a sentence about a default, if it says anything."""
    if default is None or default == ():
        return ""
    word = " ".join(map(str, default)) if isinstance(default, tuple) else getattr(default, "name", default)
    return f" Default: {getattr(default, 'value', word)}."
