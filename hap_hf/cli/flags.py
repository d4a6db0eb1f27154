"""The settings of a config as flags of a command."""

import dataclasses
import functools
import inspect
import shutil
import textwrap
from collections.abc import Callable
from typing import Any

import typer

from hap_hf.arguments import config_of, pruning_arguments
from hap_hf.config import HapConfig
from hap_hf.errors import ConfigError
from hap_hf.names.checks import share
from hap_hf.names.targets import AMOUNTS

Settings = Any
"""What the flags say, for :func:`config_from`."""


def _show_all(ctx: typer.Context, shown: bool) -> None:
    if shown:
        typer.echo(ctx.get_help())
        typer.echo("More flags:\n")
        width = min(shutil.get_terminal_size().columns, 100)
        for flag in ctx.command.params:
            if isinstance(flag, typer.core.TyperOption) and flag.hidden:
                # In a table the longest names would be cut.
                names = " / ".join([*flag.opts, *flag.secondary_opts])
                typer.echo(f"  {names} {flag.display_type(ctx)}")
                told = textwrap.wrap(flag.help or "", width, initial_indent=" " * 6, subsequent_indent=" " * 6)
                typer.echo("\n".join(told))
        raise typer.Exit


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command a flag for every setting of the config, and ``--help-all``, which lists them.

    Args:
        command: A command with an argument ``settings``.

    Returns:
        The command without that argument, and with the flags.
    """
    arguments = pruning_arguments("seed", "max_batches")
    own = [p for name, p in inspect.signature(command).parameters.items() if name != "settings"]
    flags = [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            # Hidden, as there are more than fit a screen. A flag of argparse doubles its per cent signs.
            default=typer.Option(None, help=f.metadata["help"].replace("%%", "%"), hidden=True),
            annotation=f.type,
        )
        for f in dataclasses.fields(arguments)
    ]
    flags.append(
        inspect.Parameter(
            "help_all",
            inspect.Parameter.KEYWORD_ONLY,
            default=typer.Option(False, "--help-all", callback=_show_all, is_eager=True, help="Show every setting."),
            annotation=bool,
        )
    )

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        del given["help_all"]
        settings = {flag.name: given.pop(flag.name) for flag in flags[:-1]}
        # A flag that may be repeated is empty where it was not given.
        settings = {name: None if value == [] else value for name, value in settings.items()}
        command(**given, settings=arguments(**settings))

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    vars(wrapped)["__signature__"] = inspect.Signature([*parameters, *flags])
    wrapped.__annotations__ = {p.name: p.annotation for p in (*parameters, *flags)}
    del wrapped.__wrapped__  # whose signature would count
    return wrapped


def amounts_given(settings: Settings) -> dict[str, float]:
    """Return the flags of settings that say how much, with their values.

    Args:
        settings: What the flags of :func:`with_settings` say.

    Returns:
        Values by flag, as in ``--target-macs``; of those that were given.
    """
    values = {name: getattr(settings, name, None) for name in AMOUNTS}
    return {f"--{name.replace('_', '-')}": value for name, value in values.items() if value is not None}


def config_from(settings: Settings, keep: float | None, *, seed: int, max_batches: int | None) -> HapConfig:
    """Return the config that the flags ask for.

    Args:
        settings: What the flags of :func:`with_settings` say.
        keep: Share of the prunable parameters to keep, where no other amount was given.
        seed: The seed.
        max_batches: How many batches to score on; 0 for all.

    Returns:
        The config.

    Raises:
        ConfigError: If several flags say how much, or one of them no share, or settings do not go together.
    """
    given = amounts_given(settings)
    for flag, value in {"--keep": keep, **given}.items():
        if value is not None:
            share(flag, value, "[0, 1)" if flag == "--prune-ratio" else "(0, 1)")
    told = [f"{flag} {value:g}" for flag, value in {"--keep": keep, **given}.items() if value is not None]
    if len(told) > 1:
        raise ConfigError(
            f"expected one flag that says how much is left, got {' and '.join(told)}; leave the others out"
        )
    chosen = {} if given and keep is None else {"target_params": 0.5 if keep is None else keep}
    return config_of(settings, **chosen, seed=seed, max_batches=max_batches or None)
