"""``hap-hf sweep``: what is left at which size, with one scoring."""

import dataclasses
from typing import Annotated

import typer

from hap_hf import tradeoff
from hap_hf.cli import options
from hap_hf.cli.flags import Settings, amounts_given, config_from, with_settings
from hap_hf.cli.outputs import check_folder
from hap_hf.cli.pictures import draw_sweep
from hap_hf.cli.setup import Given, set_up
from hap_hf.cli.told import say, told
from hap_hf.errors import ConfigError
from hap_hf.names.checks import share
from hap_hf.page import write_page
from hap_hf.report.tables import plain_text

PAGE_FILE = "sweep.html"
KEEPS = "0.9,0.8,0.7,0.6,0.5,0.4,0.3"


@with_settings
@told
def sweep(
    model: options.Model,
    data: options.Data,
    out: options.Out,
    keeps: Annotated[str, typer.Option("--keep", help="Shares of the prunable parameters to keep.")] = KEEPS,
    task: options.Task = None,
    text_column: options.TextColumn = None,
    label_column: options.LabelColumn = None,
    image_column: options.ImageColumn = None,
    held_out: options.HeldOut = None,
    max_length: options.MaxLength = None,
    batch_size: options.BatchSize = 8,
    max_batches: options.MaxBatches = 8,
    eval_samples: options.EvalSamples = 500,
    seed: options.Seed = 0,
    html: Annotated[
        bool, typer.Option("--html", help="Also write sweep.html: curves and heads with a slider, for a browser.")
    ] = False,
    as_json: options.Json = False,
    *,
    settings: Settings,
) -> None:
    """Measure accuracy against size and time for several amounts, without training; the model stays as it is."""
    shares = _shares(keeps)
    if others := amounts_given(settings):
        raise ConfigError(f"sweep tries the shares of parameters that --keep names; leave out {', '.join(others)}")
    config = config_from(settings, shares[0], seed=seed, max_batches=max_batches)
    check_folder(out)
    columns = (text_column or [], label_column, image_column, held_out, max_length)
    setup = set_up(Given(model, data, task, *columns, batch_size, max_batches, eval_samples, seed))
    found = tradeoff.measure_tradeoff(
        setup.model, setup.batches, config, shares, evaluate=setup.judge, metric=setup.task.metric
    )
    found = dataclasses.replace(found, subject=model)
    out.mkdir(parents=True, exist_ok=True)
    found.save(out / tradeoff.SWEEP_FILE)
    files = draw_sweep(found, out)
    if html:
        files.append(out / PAGE_FILE)
        write_page(found, files[-1])
    say(as_json, found.to_dict(), "\n".join([table(found), *map(str, [out / tradeoff.SWEEP_FILE, *files])]))


def _shares(keeps: str) -> list[float]:
    try:
        found = [float(word) for word in keeps.split(",")]
    except ValueError as error:
        raise ConfigError(f"--keep takes shares with commas, as in {KEEPS}, got {keeps!r}") from error
    for each in found:
        share("--keep", each)
    return found


def table(found: tradeoff.Tradeoff) -> str:
    """Return a sweep as a table for a terminal.

    Args:
        found: The sweep.

    Returns:
        The text; the smallest model that is nearly as good as the dense one has a star.
    """
    chosen = found.chosen()
    rows = [
        (
            ("dense" if point is found.dense else f"{point.keep:.0%}") + (" *" if point is chosen else ""),
            f"{point.params:,}",
            f"{point.macs:,.0f}",
            "" if point.milliseconds is None else f"{point.milliseconds:.1f}",
            f"{point.loss:.4g}",
            f"{point.value:.4f}" if found.higher_is_better else f"{point.value:.4g}",
        )
        for point in found.points
    ]
    share = "" if chosen is None else f"smallest that loses at most 2% of the dense model's {found.metric}"
    facts = [("*", share), ("times", found.machine)]
    head = ("prunable part kept", "parameters", "MACs per sample", "ms per batch", "loss", found.metric)
    return plain_text([(name, text) for name, text in facts if text], head, rows)
