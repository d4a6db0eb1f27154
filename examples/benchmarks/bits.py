r"""What fewer bits cost, and how much smaller the files are: pruned, pruned and quantized, with and without training.

A dense model is fine-tuned, or taken as it is (``--num_train_epochs 0``), pruned to ``--keep`` of its prunable
parameters and trained for ``--recovery_epochs``. That model is quantized to 8 bits, to 4 and to 3, the same for all
layers or by :func:`hap_hf.allocate_bits` on average, and each once without training (PTQ) and once with
``--qat_epochs`` of training with rounding (QAT). "Trained on" is the pruned model after as much training without
rounding. Activations have 8 bits. Sensitivities of layers are measured on ``--held_out`` training samples that nothing
here is trained on. Accuracies are those of the whole evaluation data; bytes are those of ``model.safetensors``; 8-bit
models are also written as ONNX and evaluated as ONNX Runtime executes them, in integers.

Each row is made in a process of its own and written to ``WORK_DIR/rows.jsonl``; what is there is not made again.

    python examples/benchmarks/bits.py --work_dir runs/bits-resnet20 --images --num_train_epochs 0 \
        --model_name_or_path cifar_resnet20 --weights resnet20.safetensors --dataset_name cifar10 --augment

    python examples/benchmarks/bits.py --work_dir runs/bits-mrpc --num_train_epochs 3 --learning_rate 5e-5 \
        --model_name_or_path ./my-bert --train_file mrpc_train.parquet --validation_file mrpc_validation.parquet
"""

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import torch
from rows import Row, Rows, made_in_processes
from subjects import Subject, benchmark_parser, make_subject
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from hap_hf import (
    BitConfig,
    HapConfig,
    QuantizeAware,
    allocate_bits,
    bit_sensitivity,
    export,
    prune,
    quantize_,
)


@dataclass(frozen=True)
class Version:
    """How a row's model is made of the pruned one.

    Args:
        bits: Bits of a weight; None where nothing is rounded.
        mixed: Whether that is the mean, and each layer has its own.
        trained: Whether it is trained once more.
    """

    bits: int | None = None
    mixed: bool = False
    trained: bool = False


VERSIONS = {
    "dense": Version(),
    "pruned": Version(),
    "int8 PTQ": Version(8),
    "int8 QAT": Version(8, trained=True),
    "trained on": Version(trained=True),
    "4 PTQ": Version(4),
    "4 mixed PTQ": Version(4, mixed=True),
    "4 QAT": Version(4, trained=True),
    "4 mixed QAT": Version(4, mixed=True, trained=True),
    "3 PTQ": Version(3),
    "3 mixed PTQ": Version(3, mixed=True),
    "3 QAT": Version(3, trained=True),
    "3 mixed QAT": Version(3, mixed=True, trained=True),
}


def main(argv: Sequence[str] | None = None) -> str:
    """Make the rows that are missing and print the table.

    Args:
        argv: The arguments, by default the program's.

    Returns:
        The table in markdown, with the command that made it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = benchmark_parser(__doc__)
    parser.add_argument("--work_dir", type=Path, required=True, help="folder for models and results")
    parser.add_argument("--versions", nargs="+", choices=VERSIONS, default=[*VERSIONS], help="which rows")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the prunable parameters to keep")
    parser.add_argument("--round_to", type=int, default=8, help="numbers of channels and neurons are multiples of this")
    parser.add_argument("--recovery_epochs", type=float, default=1.0, help="epochs of training after pruning")
    parser.add_argument("--qat_epochs", type=float, default=1.0, help="epochs of training with rounding")
    parser.add_argument("--recovery_rate", type=float, default=None, help="learning rate of both (default: the same)")
    parser.add_argument("--held_out", type=int, default=256, help="training samples for sensitivities alone")
    parser.add_argument("--seed", type=int, default=0, help="seed of fine-tuning and scores")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--images", action="store_true", help="the model classifies images, not texts")
    parser.add_argument("--row", choices=VERSIONS, help="make this row alone, in this process, and print no table")
    own, flags = parser.parse_known_args(words)
    torch.set_num_threads(own.threads)
    same = ("keep", "round_to", "recovery_epochs", "qat_epochs", "recovery_rate", "held_out", "seed")
    rows = Rows(own.work_dir / "rows.jsonl", [*flags, *(f"{name}={getattr(own, name)}" for name in same)])
    if own.row is not None:
        subject = make_subject(flags, own.work_dir / "dense", own.seed, on_images=own.images, num_held_out=own.held_out)
        rows.add({"version": own.row}, measure(subject, own.row, own))
        return ""
    missing = [name for name in own.versions if rows.find({"version": name}) is None]
    made_in_processes(__file__, words, missing)
    rows.read()
    text = to_markdown(rows, own.versions)
    text += f"\n```bash\npython examples/benchmarks/bits.py {shlex.join(words)}\n```\n"
    (own.work_dir / "table.md").write_text(text, encoding="utf-8")
    print(text)
    return text


def measure(subject: Subject, name: str, own: argparse.Namespace) -> Row:
    """Make one version of a model, keep it in a folder of its name, and evaluate it.

    Args:
        subject: The dense model and what it works on.
        name: Which version.
        own: The settings.

    Returns:
        Its accuracy and size.
    """
    version = VERSIONS[name]
    results: Row = {}
    training = {"num_train_epochs": own.qat_epochs}
    if own.recovery_rate is not None:
        training["learning_rate"] = own.recovery_rate
    model = subject.model if name == "dense" else pruned(subject, own)
    if version.bits is not None:
        config = BitConfig(weight_bits=version.bits, max_batches=None)
        if version.mixed:
            # With 2 bits there is something to trade for more than 3 elsewhere.
            menu = (3, 4, 6, 8) if version.bits > 3 else (2, 3, 4, 6, 8)
            sensitivity = bit_sensitivity(model, subject.held_out, config, menu=menu, progress=False)
            allocation = allocate_bits(sensitivity, average_bits=version.bits)
            config = config.with_weight_bits(allocation.bits)
            results |= {"bits": dict(allocation.bits), "expected_rise": allocation.rise}
        quantize_(model, subject.batches, config)
        if version.trained:
            # With few bits statistics move while the training makes up for the rounding; gradients are large at first.
            rounding = QuantizeAware(config, freeze_batch_norms=version.bits == 8)
            subject.fine_tune_(model, [rounding], **training, max_grad_norm=1.0)
    elif version.trained:
        subject.fine_tune_(model, **training, max_grad_norm=1.0)
    folder = own.work_dir / name.replace(" ", "-")
    model.save_pretrained(folder)
    results |= {"accuracy": subject.accuracy(model), "bytes": (folder / "model.safetensors").stat().st_size}
    if version.bits == 8:
        file = export(model, subject.batches[0], folder / "model.onnx", "onnx-int8", round_sums=subject.on_images)
        results |= {"onnx_accuracy": accuracy_of_file(file, subject), "onnx_bytes": file.stat().st_size}
    return results


def pruned(subject: Subject, own: argparse.Namespace) -> PreTrainedModel:
    """Return the pruned and recovered model, made once and kept in a folder."""
    folder = own.work_dir / "pruned-once"
    if not (folder / "model.safetensors").is_file():
        model = subject.model
        prune(
            model,
            subject.batches,
            HapConfig(target_params=own.keep, round_to=own.round_to, max_batches=None, seed=own.seed, progress=False),
        )
        rate = {} if own.recovery_rate is None else {"learning_rate": own.recovery_rate}
        subject.fine_tune_(model, num_train_epochs=own.recovery_epochs, **rate)
        model.save_pretrained(folder)
    return type(subject.model).from_pretrained(folder)


def accuracy_of_file(file: Path, subject: Subject) -> float:
    """Return the share of right answers of an ONNX file on the evaluation data."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names, right = {entry.name for entry in session.get_inputs()}, 0
    material = subject.material
    for batch in DataLoader(material.evaluation, subject.args.per_device_eval_batch_size, collate_fn=material.collate):
        logits = session.run(None, {name: value.numpy() for name, value in batch.items() if name in names})[0]
        right += int((logits.argmax(-1) == batch["labels"].numpy()).sum())
    return right / len(material.evaluation)


def to_markdown(rows: Rows, versions: Sequence[str]) -> str:
    """Return the results as a table.

    Args:
        rows: What was measured.
        versions: Which rows; one that was not made has no cells.

    Returns:
        The table in markdown.
    """
    dense = rows.find({"version": "dense"})
    whole = dense["results"]["bytes"] if dense is not None else float("nan")
    lines = [["version", "accuracy, %", "in ONNX Runtime, %", "bytes", "of dense"], ["---", *["---:"] * 4]]
    for name in versions:
        row = rows.find({"version": name})
        if row is None:
            lines.append([name, *[""] * 4])
            continue
        own = row["results"]
        executed = f"{100 * own['onnx_accuracy']:.2f}" if "onnx_accuracy" in own else ""
        share = f"{own['bytes'] / whole:.3f}"
        lines.append([name, f"{100 * own['accuracy']:.2f}", executed, f"{own['bytes']:,}", share])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    for noisy in ("onnxscript", "onnx_ir"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    main()
