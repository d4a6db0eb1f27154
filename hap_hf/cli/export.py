"""``hap-hf export``: a file that runs without hap_hf."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hap_hf.bits import quantize_
from hap_hf.cli import options
from hap_hf.cli.example import example_batch
from hap_hf.cli.loading import load
from hap_hf.cli.outputs import check_file, path_given
from hap_hf.cli.setup import Given, set_up
from hap_hf.cli.told import say, told
from hap_hf.errors import ConfigError
from hap_hf.export import Format, check_installed
from hap_hf.export import export as write_file
from hap_hf.model.quantizing import quantized_layers

SUFFIX = {Format.ONNX: ".onnx", Format.ONNX_INT8: ".onnx", Format.PT2: ".pt2"}


@told
def export(
    model: options.Model,
    out: Annotated[Path, typer.Option(parser=path_given, metavar="PATH", help="File to write, .onnx or .pt2.")],
    format: Annotated[
        Format, typer.Option(help="onnx: floating point; onnx-int8: integers; pt2: a program of torch.export.")
    ] = Format.ONNX,
    data: Annotated[
        str | None,
        typer.Option(help="As for prune; onnx-int8 takes the ranges of activations from some of it, and is judged."),
    ] = None,
    round_sums: Annotated[
        bool, typer.Option("--round-sums", help="onnx-int8: also round what residual convolutions add.")
    ] = False,
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
) -> None:
    """Write a model, pruned or not, as a file for other runtimes, and compare what the file computes with the model."""
    _check(out, format)
    values: dict[str, Any] = {"file": str(out), "format": format.value}
    if data is None:
        loaded = load(model, task)
        subject, batch = loaded.model, example_batch(loaded)
        if format is Format.ONNX_INT8 and not dict(quantized_layers(subject)):
            raise ConfigError(
                f"{model} is in floating point, and --format onnx-int8 needs some data to see in which range the "
                "inputs of its layers lie: give it by --data, or export a checkpoint that quantize_ made"
            )
    else:
        columns = (text_column or [], label_column, image_column, held_out, max_length)
        setup = set_up(Given(model, data, task, *columns, batch_size, max_batches, eval_samples, seed))
        subject, batch = setup.model, setup.batches[0]
        if format is Format.ONNX_INT8 and not dict(quantized_layers(subject)):
            before = None if setup.judge is None else setup.judge(subject)
            quantize_(subject, setup.batches)
            if setup.judge is not None:
                values |= {"metric": setup.task.metric, "before": before, "rounded": setup.judge(subject)}
    if format is not Format.PT2:
        subject.float()  # what runtimes compute in
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(subject, batch, out, format, round_sums=round_sums)
    values["bytes"] = out.stat().st_size
    lines = [f"written to {out}, {values['bytes'] / 1e6:,.2f} MB; it computes what the model does"]
    if "rounded" in values:
        lines.insert(0, f"{values['metric']}: {values['before']:.1%}, with integers {values['rounded']:.1%}")
    say(as_json, values, "\n".join(lines))


def _check(out: Path, format: Format) -> None:
    """Check what can be checked before anything is loaded."""
    check_file(out, Path(f"model{SUFFIX[format]}"))
    if out.suffix != SUFFIX[format]:
        raise ConfigError(f"--out {out}: a file of --format {format.value} ends in {SUFFIX[format]}")
    check_installed(format)
