"""``hap-hf vanilla``: a checkpoint that needs no hap_hf."""

from typing import Annotated

import typer

from hap_hf.checkpoint import save_pruned
from hap_hf.cli import options
from hap_hf.cli.loading import config_of, model_of, processor_of
from hap_hf.cli.outputs import check_folder
from hap_hf.cli.tasks import task_of
from hap_hf.cli.told import told
from hap_hf.errors import ConfigError


@told
def vanilla(
    model: Annotated[str, typer.Argument(help="A pruned checkpoint: a folder, or a name on the Hub.")],
    out: options.Out,
    task: options.Task = None,
) -> None:
    """Save a pruned checkpoint so that it loads without hap_hf, if a stock config can describe it."""
    check_folder(out, model)
    found = task_of(config_of(model), task)
    loaded = model_of(model, found)
    save_pruned(loaded, out, vanilla=True)
    try:
        processor = processor_of(model, found)
    except (OSError, ConfigError):  # the weights are all that was asked for
        processor = None
    if processor is not None:
        processor.save_pretrained(out)
    typer.echo(f"written to {out}")
