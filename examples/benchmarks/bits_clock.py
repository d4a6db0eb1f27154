r"""What a clock says of pruned and quantized models: eager, compiled, ONNX Runtime and OpenVINO, in integers or not.

It reads the models that ``bits.py`` has left in a folder: dense, pruned, and the pruned one with 8 bits. For each batch
size and number of threads all of them run in turns in one process (dense, pruned, ..., dense, ...), in every runtime,
so that a machine that speeds up or slows down does so for all. A run's time is divided by that of the dense model in
floating point of the same runtime and the same turn; the table shows the medians of times and of these ratios, with
quartiles. OpenVINO is left out where it is not installed.

Each batch size and number of threads is a row, made in a process of its own and written to ``WORK_DIR/clock.jsonl``;
what is there is not made again.

    python examples/benchmarks/bits_clock.py --work_dir runs/bits-resnet20
    python examples/benchmarks/bits_clock.py --work_dir runs/bits-mrpc --tokens 64
"""

import argparse
import importlib
import importlib.util
import logging
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from latency import in_turns
from rows import Rows, made_in_processes
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification

from hap_hf import export

Batch = dict[str, Tensor]
MODELS = {"dense": "dense", "pruned": "pruned", "pruned, int8": "int8-QAT"}
"""Folders of ``bits.py``, by what is in them."""
RUNTIMES = ["eager", "compiled", "ONNX Runtime", "OpenVINO"]


def main(argv: Sequence[str] | None = None) -> str:
    """Make the rows that are missing and print the table.

    Args:
        argv: The arguments, by default the program's.

    Returns:
        The table in markdown, with what it was measured on and the command that made it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--work_dir", type=Path, required=True, help="folder of bits.py with its models")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=RUNTIMES)
    parser.add_argument("--tokens", type=int, default=64, help="length of texts")
    parser.add_argument("--runs", type=int, default=200, help="turns at most")
    parser.add_argument("--seconds", type=float, default=30, help="no new turn after these")
    parser.add_argument("--warmup", type=int, default=3, help="turns that are not counted")
    parser.add_argument("--row", help="batch size and threads, as 32x1: make this row alone and print no table")
    own = parser.parse_args(words)
    rows = Rows(own.work_dir / "clock.jsonl", [*own.runtimes, f"tokens={own.tokens}"])
    if own.row is not None:
        batch_size, threads = map(int, own.row.split("x"))
        rows.add({"batch_size": batch_size, "threads": threads}, measure(own, batch_size, threads))
        return ""
    wanted = [{"batch_size": size, "threads": count} for size in own.batch_sizes for count in own.threads]
    missing = ["{batch_size}x{threads}".format(**about) for about in wanted if rows.find(about) is None]
    made_in_processes(__file__, words, missing)
    rows.read()
    lines = []
    for about in wanted:
        row = rows.find(about)
        lines += lines_of(row["results"]["seconds"], [*map(str, about.values())]) if row is not None else []
    command = f"```bash\npython examples/benchmarks/bits_clock.py {shlex.join(words)}\n```\n"
    text = f"{to_markdown(lines)}\n{describe()}\n\n{command}"
    print(text)
    return text


def measure(own: argparse.Namespace, batch_size: int, threads: int) -> dict[str, Any]:
    """Return the seconds of every run, by runtime and model.

    Args:
        own: The command line.
        batch_size: Number of samples.
        threads: CPU threads.

    Returns:
        The seconds under the names of the runtime and the model.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    files = own.work_dir / "onnx"
    files.mkdir(exist_ok=True)
    for name, folder in MODELS.items():
        on_images = not hasattr(AutoConfig.from_pretrained(own.work_dir / folder), "vocab_size")
        kind = AutoModelForImageClassification if on_images else AutoModelForSequenceClassification
        model = kind.from_pretrained(own.work_dir / folder).eval()
        batch = make_batch(model.config, batch_size, own.tokens)
        is_float = "int8" not in name
        file = files / f"{folder}.onnx"
        if not file.exists() and {"ONNX Runtime", "OpenVINO"} & {*own.runtimes}:
            example = make_batch(model.config, 2, own.tokens)
            extra = {} if is_float else {"round_sums": on_images}
            export(model, example, file, "onnx" if is_float else "onnx-int8", **extra)
        # What rounds in floating point is no runtime for 8 bits: torch shows what the rest is compared with.
        if is_float and "eager" in own.runtimes:
            calls["eager", name] = partial(model, **batch)
        if is_float and "compiled" in own.runtimes:
            calls["compiled", name] = partial(torch.compile(model, fullgraph=True, dynamic=False), **batch)
        if "ONNX Runtime" in own.runtimes:
            calls["ONNX Runtime", name] = onnx_call(file, batch, threads)
        if "OpenVINO" in own.runtimes and importlib.util.find_spec("openvino") is not None:
            calls["OpenVINO", name] = openvino_call(file, batch, threads)
    with torch.no_grad():
        in_turns([*calls.values()], lambda: None, runs=own.warmup)
        times = in_turns([*calls.values()], lambda: None, runs=own.runs, seconds=own.seconds)
    seconds: dict[str, dict[str, list[float]]] = {}
    for (runtime, name), mine in zip(calls, times, strict=True):
        seconds.setdefault(runtime, {})[name] = mine
    return {"seconds": seconds}


def make_batch(config: Any, batch_size: int, tokens: int) -> Batch:
    """Return random inputs of a model."""
    if hasattr(config, "vocab_size"):
        ids = torch.randint(config.vocab_size, (batch_size, tokens))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {"pixel_values": torch.randn(batch_size, *config.pretrained_cfg["input_size"])}


def onnx_call(file: Path, batch: Batch, threads: int) -> Callable[[], object]:
    """Return a run of an ONNX file by ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    known = {entry.name for entry in session.get_inputs()}
    return partial(session.run, None, {name: value.numpy() for name, value in batch.items() if name in known})


def openvino_call(file: Path, batch: Batch, threads: int) -> Callable[[], object]:
    """Return a run of an ONNX file by OpenVINO, at this shape, in the arithmetic of the file."""
    openvino: Any = importlib.import_module("openvino")
    core = openvino.Core()
    read = core.read_model(file)
    known = {entry.any_name for entry in read.inputs}
    feeds = {name: value.numpy() for name, value in batch.items() if name in known}
    read.reshape({name: list(value.shape) for name, value in feeds.items()})
    hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    return partial(core.compile_model(read, "CPU", hints).create_infer_request().infer, feeds)


def lines_of(seconds: dict[str, dict[str, list[float]]], about: Sequence[str]) -> list[list[str]]:
    """Return the lines of one batch size and number of threads.

    Args:
        seconds: Seconds of runs by runtime and model.
        about: The first cells of each line.

    Returns:
        The cells.
    """
    lines = []
    for runtime, models in seconds.items():
        for name, mine in models.items():
            ratios = [own / dense for own, dense in zip(mine, models["dense"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            spread = f"{low:.2f} to {high:.2f}"
            cells = [f"{1e3 * statistics.median(mine):.2f}", f"{middle:.2f}", spread, str(len(mine))]
            lines.append([*about, runtime, name, *cells])
    return lines


def to_markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return the lines as a table."""
    head = ["batch", "threads", "runtime", "model", "median, ms", "of dense", "quartiles", "runs"]
    rule = ["---:", "---:", "---", "---", *["---:"] * 4]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *lines))


def describe() -> str:
    """Return what the times were measured on, and whether it multiplies integers in one instruction."""
    file = Path("/proc/cpuinfo")
    flags = set(file.read_text(encoding="utf-8").split()) if file.exists() else set()
    found = sorted(flags & {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"})
    versions = f"torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}"
    return f"{versions}, {torch.backends.cpu.get_cpu_capability()}, integer instructions: {', '.join(found) or 'none'}"


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    for noisy in ("onnxscript", "onnx_ir"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    main()
