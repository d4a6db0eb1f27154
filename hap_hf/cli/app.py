"""All commands under one name."""

import logging
from typing import Annotated

import typer

from hap_hf.cli.export import export
from hap_hf.cli.inspect import inspect
from hap_hf.cli.plot import plot
from hap_hf.cli.prune import prune
from hap_hf.cli.sweep import sweep
from hap_hf.cli.vanilla import vanilla
from hap_hf.version import __version__

app = typer.Typer(
    name="hap-hf",
    help="Prune trained models of transformers and timm by what their loss can do without.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (prune, inspect, sweep, plot, export, vanilla):
    app.command()(command)


def _version(shown: bool) -> None:
    if shown:
        typer.echo(f"hap_hf {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what is done and why.")] = False,
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s: %(message)s")


def main() -> None:
    """Run the command line."""
    app()
