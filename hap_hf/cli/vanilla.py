"""``hap-hf vanilla``: a checkpoint that needs no hap_hf."""

from typing import Annotated

import transformers
import typer

from hap_hf.checkpoint import save_pruned
from hap_hf.cli import options
from hap_hf.cli.setup import config_of
from hap_hf.cli.tasks import task_of
from hap_hf.cli.told import told


@told
def vanilla(
    model: Annotated[str, typer.Argument(help="A pruned checkpoint: a folder, or a name on the Hub.")],
    out: options.Out,
    task: options.Task = None,
) -> None:
    """Save a pruned checkpoint so that it loads without hap_hf, if a stock config can describe it."""
    loaded = task_of(config_of(model), task).auto.from_pretrained(model)
    save_pruned(loaded, out, vanilla=True)
    for auto in (transformers.AutoTokenizer, transformers.AutoImageProcessor):
        try:
            auto.from_pretrained(model).save_pretrained(out)
        except (OSError, ValueError, KeyError):  # a model has one or the other, or none
            continue
    typer.echo(f"written to {out}")
