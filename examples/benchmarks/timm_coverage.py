r"""Which models can be pruned, how much of each, and whether the pruned model is right.

From every module of timm the model with the fewest parameters is taken, timm's own test models aside, and with
``--transformers`` small convolutional networks of transformers too. No weights are downloaded: matrices are random,
batch norms are calibrated on noise and then disturbed, and everything else is disturbed as well, so that no zero hides
a mistake. Each model runs in a process of its own, with limits on time and memory, and gives one row:

* **groups** and seconds that :func:`hap_hf.find_groups` took, in float32, on two images;
* **parameters prunable**: the share of parameters that go if all units of all groups go, those of biases and norms
  included;
* **MACs prunable**: the share of multiply-accumulates in layers whose weight has a producer, factor or consumer slice
  in some group, and in the attention products of the groups of heads; all that torch counts is the whole;
* **equal**: 15 to 45% of the units of each group, chosen at random, are removed, and in float64 the logits differ from
  those of the dense model with these channels zeroed where they are read by less than 1e-8 of the largest, while the
  zeroed model differs from the dense one by more;
* **reloaded**: logits after ``save_pretrained`` and ``from_pretrained`` are those before, bit for bit. timm models are
  loaded through transformers' wrapper for them; where the wrapper does not work the column says so;
* **error**: where it stopped, if it did.

With ``--peer``, Torch-Pruning prunes each timm model at 30% by the recipe of its README, under the same limits.
``--log`` keeps rows as they are done: what was interrupted goes on where it stopped.

    python examples/benchmarks/timm_coverage.py --log runs/coverage.jsonl --transformers --peer
"""

import argparse
import json
import logging
import multiprocessing
import resource
import shlex
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from one_model import TRANSFORMERS, Row, build_timm, build_transformers, examine, run_peer
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers.utils.logging import disable_progress_bar


def main(argv: Sequence[str] | None = None) -> str:
    """Make the rows that are missing and print the table.

    Args:
        argv: The arguments, by default the program's.

    Returns:
        The table in markdown, a summary, and the command that made them.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="names or globs of timm models, instead of one a module")
    parser.add_argument("--transformers", action="store_true", help="also small models of transformers")
    parser.add_argument("--peer", action="store_true", help="also Torch-Pruning, which must be installed")
    parser.add_argument("--log", type=Path, help="JSON lines of the rows, read first and written to")
    parser.add_argument("--side", type=int, default=224, help="largest image side where a model takes any")
    parser.add_argument("--seconds", type=int, default=300, help="time limit of one model")
    parser.add_argument("--memory", type=float, default=12, help="memory limit of one model, GiB")
    own = parser.parse_args(words)
    rows: list[Row] = []
    if own.log and own.log.exists():
        rows = [json.loads(line) for line in own.log.read_text(encoding="utf-8").splitlines()]
    table: list[Row] = []
    for family, name, source in _wanted(own.models, own.transformers, rows):
        row = _row(rows, own, {"family": family, "model": name, "how": source})
        if own.peer and source == "timm":
            row = {**row, "peer": _row(rows, own, {"family": family, "model": name, "how": "peer"})}
        table.append(row)
    command = shlex.join(["python", "examples/benchmarks/timm_coverage.py", *words])
    text = f"{to_markdown(table, own.peer)}\n{summary(table, own.peer)}\n\n    {command}\n"
    print(text)
    return text


def _wanted(models: Sequence[str] | None, transformers: bool, rows: Sequence[Row]) -> Iterator[tuple[str, str, str]]:
    """Yield family, name and source of each model."""
    if models:
        names = dict.fromkeys(n for pattern in models for n in timm.list_models(pattern))
        yield from ((timm.models.model_entrypoint(n).__module__.rpartition(".")[2], n, "timm") for n in names)
    else:
        known = {row["family"]: row["model"] for row in rows if row["how"] == "timm"}
        yield from ((f, known.get(f) or smallest(f), "timm") for f in timm.list_modules() if timm_models(f))
    if transformers:
        yield from ((f"transformers {name}", name, "transformers") for name in TRANSFORMERS)


def timm_models(family: str) -> list[str]:
    """Return the models of a module, without timm's own test models and those that others have registered."""
    names = timm.list_models(module=family, exclude_filters="test_*")
    return [n for n in names if timm.model_entrypoint(n).__module__.startswith("timm.")]


def smallest(family: str) -> str:
    """Return the model with the fewest parameters that a module of timm defines, its test models aside."""
    best, least, count = "", sys.maxsize, 0

    def stop_when_larger(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += 0 if parameter is None else parameter.numel()
        if count >= least:
            raise OverflowError

    handle = register_module_parameter_registration_hook(stop_when_larger)
    try:
        for name in timm_models(family):
            count = 0
            try:
                with torch.device("meta"):
                    best, least = name, sum(p.numel() for p in timm.create_model(name).parameters())
            except OverflowError:
                continue
    finally:
        handle.remove()
    return best


def _row(rows: list[Row], own: argparse.Namespace, about: Row) -> Row:
    """Return the row of a model, from the log if it is there, else from a process of its own."""
    for row in rows:
        if about.items() <= row.items():
            return row
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        start = time.perf_counter()
        process = multiprocessing.get_context("fork").Process(
            target=run_one, args=(about["how"], about["model"], file, own.side, int(own.memory * 2**30))
        )
        process.start()
        process.join(own.seconds)
        failure = f"exit code {process.exitcode}" if process.exitcode else ""
        if process.exitcode is None:
            failure = f"more than {own.seconds} s"
            process.kill()
            process.join()
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"stage": "start"}
    row = {**about, **found, "total_seconds": round(time.perf_counter() - start, 1)}
    if failure and "error" not in row:
        row["error"] = f"{row['stage']}: {failure}"
    if own.log:
        with own.log.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
    print(f"{about['how']:12} {about['model']:40} {row['total_seconds']:6} s  {row.get('error', '')}", file=sys.stderr)
    return row


def run_one(how: str, name: str, file: Path, side: int, memory: int) -> None:
    """Examine one model, writing what is known to ``file`` after each stage."""
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    row: Row = {}

    def note(**facts: Any) -> None:
        row.update(facts)
        file.write_text(json.dumps(row), encoding="utf-8")

    messages: list[str] = []
    listener = logging.Handler(logging.DEBUG)
    listener.emit = lambda record: messages.append(record.getMessage()[:2000])  # type: ignore[method-assign]
    logging.getLogger("hap_hf").addHandler(listener)
    logging.getLogger("hap_hf").setLevel(logging.DEBUG)
    disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    note(stage="construction")
    try:
        if how == "peer":
            run_peer(name, side, note)
        else:
            examine(*(build_timm if how == "timm" else build_transformers)(name, side, note), note)
    except Exception as error:  # whatever a model raises is its row
        frames = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)[-6:]]
        note(error=f"{row['stage']}: {type(error).__name__}: {str(error)[:500]}", frames=frames)
    finally:
        note(log=messages[:300] + messages[300:][-20:])


def to_markdown(rows: Sequence[Row], peer: bool) -> str:
    """Return the rows as a table."""
    head = ["family", "model", "parameters, M", "groups", "parameters prunable", "MACs prunable", "equal", "reloaded"]
    head += ["discovery, s", "error", *(["Torch-Pruning", "Torch-Pruning, s"] if peer else [])]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [row["family"], row["model"], f"{row['params'] / 1e6:.1f}" if "params" in row else ""]
        cells.append(str(row.get("groups", "")))
        cells += [f"{100 * row[k]:.0f}%" if k in row else "" for k in ("params_prunable", "macs_prunable")]
        cells.append(f"{'yes' if row['equal'] else 'NO'}, {row['difference']:.0e}" if "equal" in row else "")
        cells += [row.get("reloaded", ""), str(row.get("seconds", "")), row.get("error", "")]
        if peer:
            other = row.get("peer", {})
            cells += [_verdict(other) if other else "", str(other.get("seconds", ""))]
        lines.append([c.replace("|", "/").replace("\n", " ")[:120] for c in cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _verdict(row: Row) -> str:
    if "error" in row:
        return f"failed at {row['error']}"
    return "ran" if row["params_after"] < row["params"] else "removed nothing"


def summary(rows: Sequence[Row], peer: bool) -> str:
    """Return the numbers of families for which each thing holds."""
    counts = {
        "without error": sum("error" not in r for r in rows),
        "equal to the masked model": sum(r.get("equal", False) for r in rows),
        "wrong": sum(not r.get("equal", True) for r in rows),
        "reloaded bit for bit": sum(r.get("reloaded") == "yes" for r in rows),
        "at least half of the MACs prunable": sum(r.get("macs_prunable", 0) >= 0.5 for r in rows),
    }
    if peer:
        counts["Torch-Pruning ran"] = sum(_verdict(r["peer"]) == "ran" for r in rows if "peer" in r)
    shares = [r.get("macs_prunable", 0.0) for r in rows]
    text = "".join(f"* {what}: {n} of {len(rows)}\n" for what, n in counts.items())
    return text + (f"* median share of MACs prunable: {100 * statistics.median(shares):.0f}%\n" if shares else "")


if __name__ == "__main__":
    main()
