r"""Accuracy against size on one GLUE task: with and without implants, recovered and read back from disk.

The dense model is fine-tuned once. From it every size given with ``--keep`` (shares of the prunable parameters, those
of heads and feed-forward neurons, that stay) is made twice: by removal alone, and with a share of the cut units
implanted at the same number of remaining parameters. Each row is one run of ``run_glue_hap.py``, whose flags are all
accepted here, and its accuracy is that of the reloaded model. Rows are written to ``WORK_DIR/rows.jsonl`` as they are
done: what was interrupted goes on where it stopped, and a row is made anew only if its flags changed.

    python examples/benchmarks/glue_table.py --work_dir runs/table-mrpc --model_name_or_path ./my-bert \
        --task_name mrpc --train_file mrpc_train.parquet --validation_file mrpc_validation.parquet \
        --per_device_train_batch_size 16 --learning_rate 5e-5 --num_train_epochs 3 --recovery_epochs 1 --max_batches 8
"""

import argparse
import json
import logging
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

from hap_hf.arguments import pruning_arguments

logger = logging.getLogger("glue_table")

Row = dict[str, Any]
SCRIPT = runpy.run_path(str(Path(__file__).resolve().parents[1] / "run_glue_hap.py"))
SCHEDULE = ("prune_step", "prune_epoch", "num_rounds", "round_interval", "recovery_epochs", "recovery_learning_rate")
"""Its flags about pruning that are no settings of it."""


def main(argv: Sequence[str] | None = None) -> str:
    """Make the rows that are missing and print the table.

    Args:
        argv: The arguments, by default the program's.

    Returns:
        The table in markdown.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="folder for models and results")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.7, 0.5, 0.3], help="shares of parameters to keep")
    parser.add_argument("--implant_ratio", type=float, default=0.2, help="implanted share of the cut units")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    own, flags = parser.parse_known_args(argv)
    torch.set_num_threads(own.threads)
    flags += ["--do_train", "--do_eval", "--save_strategy", "no"]
    dense_dir = own.work_dir / "dense"
    # A dense run takes every flag but those about pruning.
    about_pruning = HfArgumentParser(pruning_arguments("seed"), allow_abbrev=False, add_help=False)
    for name in SCHEDULE:
        about_pruning.add_argument(f"--{name}")
    _, dense_flags = about_pruning.parse_known_args(flags)
    rows = _read(own.work_dir / "rows.jsonl")
    dense = [*dense_flags, "--output_dir", str(dense_dir)]
    table = [_row(own.work_dir, rows, dense, {"name": "dense"})]
    for keep in own.keep:
        for implant_ratio in (0.0, own.implant_ratio):
            name = f"keep{keep:g}-implant{implant_ratio:g}"
            changes = {
                "--model_name_or_path": str(dense_dir),
                "--num_train_epochs": "0",
                "--max_steps": "-1",
                "--target_params": str(keep),
                "--implant_ratio": str(implant_ratio),
                "--output_dir": str(own.work_dir / name),
            }
            # The last of two equal flags counts.
            command = [*flags, *(word for flag in changes.items() for word in flag)]
            about = {"name": name, "keep": keep, "implant_ratio": implant_ratio, "dense": dense}
            table.append(_row(own.work_dir, rows, command, about))
    task = flags[flags.index("--task_name") + 1].lower() if "--task_name" in flags else None
    text = to_markdown(table, SCRIPT["TASK_TO_METRICS"].get(task, ("accuracy",)))
    (own.work_dir / "table.md").write_text(text, encoding="utf-8")
    print(text)
    return text


def _read(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def _row(work_dir: Path, rows: list[Row], command: list[str], about: Row) -> Row:
    """Return the row of ``command``, from an earlier run if there is one."""
    wanted = {**about, "command": command}
    for row in rows:
        if all(row.get(key) == value for key, value in wanted.items()):
            logger.info("%s: done before", about["name"])
            return row
    row = {**wanted, "results": SCRIPT["main"](command)}
    with (work_dir / "rows.jsonl").open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")
    return row


def to_markdown(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """Return the rows as a table.

    Args:
        rows: The dense row and the pruned ones.
        metrics: Names of the metrics to show, as percentages.

    Returns:
        The table in markdown.
    """
    names = " / ".join(metrics)
    head = [
        "prunable parameters kept",
        "implants",
        f"{names} after pruning",
        f"{names} after recovery, reloaded",
        "parameters, M",
        "MACs a sample, M",
        "scoring, s",
        "heads",
        "mean FFN width",
    ]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        results = row["results"]

        def scores(stage: str, results: Row = results) -> str:
            return " / ".join(f"{100 * results[f'{stage}_{name}']:.1f}" for name in metrics)

        if "keep" not in row:
            pruned = next((r["results"] for r in rows if "keep" in r), None)
            size = ["", ""]
            if pruned:
                size = [f"{pruned['dense_params'] / 1e6:.2f}", f"{pruned['dense_macs'] / 1e6:.0f}"]
            lines.append(["100% (dense)", "", "", scores("eval"), *size, "", "", ""])
            continue
        lines.append([
            f"{100 * results['prunable_params_kept']:.1f}%",
            f"{row['implant_ratio']:g} of the cut" if row["implant_ratio"] else "none",
            scores("pruned"),
            scores("eval"),
            f"{results['pruned_params'] / 1e6:.2f}",
            f"{results['pruned_macs'] / 1e6:.0f}",
            f"{results['scoring_seconds']:.0f}",
            _units(results, "heads", 1),
            _units(results, "ffn", results.get("ffn_groups", 1)),
        ])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _units(results: Row, kind: str, groups: int) -> str:
    if f"{kind}_kept" not in results:
        return ""
    kept, implanted, before = (results[f"{kind}_{what}"] / groups for what in ("kept", "implanted", "before"))
    return f"{kept:.0f}{f' + {implanted:.0f} implanted' if implanted else ''} of {before:.0f}"


if __name__ == "__main__":
    main()
