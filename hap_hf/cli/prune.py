"""``hap-hf prune``: a trained model in, a smaller one out."""

import copy
import json
import math
import platform
from pathlib import Path
from typing import Annotated

import torch
import typer

from hap_hf import pipeline
from hap_hf.card import CardFacts, write_card
from hap_hf.cli import options
from hap_hf.cli.flags import Settings, config_from, with_settings
from hap_hf.cli.outputs import check_folder
from hap_hf.cli.pictures import draw_report
from hap_hf.cli.recovery import recover
from hap_hf.cli.setup import Given, Setup, set_up
from hap_hf.cli.told import say, told
from hap_hf.errors import ConfigError
from hap_hf.report import PruningReport
from hap_hf.tradeoff import milliseconds

Results = dict[str, float]


@with_settings
@told
def prune(
    model: options.Model,
    data: options.Data,
    out: options.Out,
    keep: Annotated[
        float | None, typer.Option(help="Share of the prunable parameters to keep, in (0, 1); half by default.")
    ] = None,
    epochs: Annotated[float, typer.Option(min=0, help="Epochs of training after pruning.")] = 0,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of that training.")] = 2e-5,
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
    as_json: options.Json = False,
    *,
    settings: Settings,
) -> None:
    """Prune a trained model, train it again if asked to, and save it with a report, pictures and a card."""
    # Before anything is loaded, which takes longer than to see a slip.
    config = config_from(settings, keep, seed=seed, max_batches=max_batches)
    check_folder(out, model)
    if not (math.isfinite(epochs) and 0 < learning_rate < math.inf):
        raise ConfigError(
            f"expected finite numbers for --epochs and --learning-rate, the latter above 0, got {epochs:g} and "
            f"{learning_rate:g}"
        )
    columns = (text_column or [], label_column, image_column, held_out, max_length)
    given = Given(model, data, task, *columns, batch_size, max_batches, eval_samples, seed)
    setup = set_up(given, train_on_all=epochs > 0)
    results = _judged(setup, "before")
    dense = copy.deepcopy(setup.model)
    report = pipeline.prune(setup.model, setup.batches, config)
    results |= _judged(setup, "after pruning")
    if epochs:
        recover(setup, epochs=epochs, learning_rate=learning_rate, batch_size=batch_size, seed=seed)
        results |= _judged(setup, "after training")
    before, after = milliseconds((dense, setup.model), setup.batches[0])
    latency = (before, after, f"of {batch_size} on {platform.machine()}, threads: {torch.get_num_threads()}")
    _save(setup, report, results, given, out, latency)
    metric = setup.task.metric
    table = "\n".join(f"{metric} {when}: {value:.1%}" for when, value in results.items())
    values = {**report.to_dict(), "metric": metric, "results": results}
    say(as_json, values, "\n".join(filter(None, [str(report), table, report.summary, f"written to {out}"])))


def _judged(setup: Setup, when: str) -> Results:
    return {} if setup.judge is None else {when: setup.judge(setup.model)}


def _save(
    setup: Setup, report: PruningReport, results: Results, given: Given, out: Path, latency: tuple[float, float, str]
) -> None:
    setup.model.save_pretrained(out)
    if setup.processor is not None:
        setup.processor.save_pretrained(out)
    report.save(out)
    pictures = [file.name for file in draw_report(report, out)]
    told = {"base": given.model, "task": setup.task.name, "data": given.data, "metric": setup.task.metric}
    facts = CardFacts.of(setup.model, report, **told, results=results, latency=latency, pictures=pictures)
    if facts is not None:
        write_card(facts, out)
    values = {**told, "results": results, "milliseconds": latency[:2], "machine": latency[2]}
    (out / "pruning_results.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
