"""``hap-hf plot``: pictures of a pruned checkpoint or of a sweep."""

from pathlib import Path
from typing import Annotated

import typer

from hap_hf.cli import options
from hap_hf.cli.outputs import check_folder, path_given
from hap_hf.cli.pictures import draw_report, draw_sweep
from hap_hf.cli.sweep import PAGE_FILE
from hap_hf.cli.told import say, told
from hap_hf.errors import ConfigError
from hap_hf.page import write_page
from hap_hf.report import PruningReport
from hap_hf.tradeoff import SWEEP_FILE, Tradeoff


@told
def plot(
    folder: Annotated[Path, typer.Argument(help="What prune or sweep wrote, or the Trainer's output folder.")],
    out: Annotated[
        Path | None,
        typer.Option(parser=path_given, metavar="PATH", help="Folder to write to; the same by default."),
    ] = None,
    svg: Annotated[bool, typer.Option("--svg", help="Write SVG in place of PNG.")] = False,
    html: Annotated[
        bool, typer.Option("--html", help="Also write a sweep as sweep.html, with a slider, for a browser.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Draw sensitivities, widths, how sure the choice is, and accuracy against size and time."""
    target, suffix = out or folder, ".svg" if svg else ".png"
    report, sweep = folder / "pruning_report.json", folder / SWEEP_FILE
    if not report.is_file() and not sweep.is_file():
        raise ConfigError(f"{folder} has neither pruning_report.json nor {SWEEP_FILE}, which prune and sweep write")
    if html and not sweep.is_file():
        raise ConfigError(f"--html shows a sweep, and {folder} has no {SWEEP_FILE}; hap-hf sweep writes one")
    check_folder(target)
    told_of = PruningReport.load(folder) if report.is_file() else None
    found = Tradeoff.load(sweep) if sweep.is_file() else None
    target.mkdir(parents=True, exist_ok=True)
    files = []
    if told_of is not None:
        files += draw_report(told_of, target, suffix)
    if found is not None:
        files += draw_sweep(found, target, suffix)
        if html:
            files.append(target / PAGE_FILE)
            write_page(found, files[-1])
    if not files:
        raise ConfigError('nothing was drawn; pip install "hap_hf[plots]" if matplotlib is missing')
    say(as_json, [str(file) for file in files], "\n".join(map(str, files)))
