"""Flags that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

from hap_hf.cli.outputs import path_given

Model = Annotated[str, typer.Argument(help="A folder with a trained model, or its name on the Hub.")]
Data = Annotated[
    str,
    typer.Option(
        help="A csv, json, parquet or text file, a folder, a name on the Hub (NAME:CONFIG), or digits, which "
        "scikit-learn ships."
    ),
]
Task = Annotated[
    str | None,
    typer.Option(
        help="text-classification, token-classification, question-answering, image-classification or "
        "text-generation; read from the model by default."
    ),
]
TextColumn = Annotated[list[str] | None, typer.Option(help="Column with text; twice for a pair.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column with labels.")]
ImageColumn = Annotated[str | None, typer.Option(help="Column with images.", hidden=True)]
HeldOut = Annotated[
    str | None, typer.Option(help="Split to judge by; validation, test or a fifth of the rows by default.", hidden=True)
]
MaxLength = Annotated[int | None, typer.Option(min=2, help="Most tokens of a text.", hidden=True)]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples of a batch.")]
MaxBatches = Annotated[int, typer.Option(min=0, help="Batches to score on; 0 for all.")]
EvalSamples = Annotated[int, typer.Option(min=1, help="Rows to judge by.", hidden=True)]
Seed = Annotated[int, typer.Option(min=0, help="Seed of data, probes and training.", hidden=True)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Out = Annotated[Path, typer.Option(parser=path_given, metavar="PATH", help="Folder to write to.")]
