r"""What the repair after the choice is worth: the same units go, and only the weights of what stays differ.

A dense model is fine-tuned once a seed, or taken as it is (``--num_train_epochs 0``). For each share of the prunable
parameters to keep, each of ``--criteria`` chooses the units once. Then the model is cut without any repair, with
compensation, and with reconstruction, evaluated without training, and, with ``--recovery_epochs``, after training as
well. Beside the accuracy stand the loss and the divergence from the dense model's answers on the evaluation data, as
accuracies alone hide small differences, and the CPU time of the choice and of the repair. Rows are written to
``WORK_DIR/rows.jsonl`` as they are done, and are not made again.

    python examples/benchmarks/repair_quality.py --work_dir runs/repair-mrpc --seeds 0 1 2 --keep 0.5 0.3 0.15 0.08 \
        --model_name_or_path ./my-bert --train_file mrpc_train.parquet --validation_file mrpc_validation.parquet \
        --num_train_epochs 3 --learning_rate 5e-5 --max_batches 32

    python examples/benchmarks/repair_quality.py --work_dir runs/repair-resnet20 --images --keep 0.7 0.5 0.3 \
        --model_name_or_path cifar_resnet20 --weights resnet20.safetensors --dataset_name cifar10 --num_train_epochs 0
"""

import argparse
import copy
import logging
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rows import Row, Rows
from subjects import Subject, benchmark_parser, make_subject
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from hap_hf import HapConfig, carry_out_, decide, decide_again, known_criteria, measure_size

REPAIRS: dict[str, dict[str, Any]] = {
    "none": {"compensate": False},
    "compensation": {"reconstruct": False},
    "reconstruction": {},
    "bypasses": {"implants": "auto"},
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
    parser.add_argument("--work_dir", type=Path, required=True, help="folder for the dense models and the results")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.3, 0.15], help="shares of parameters to keep")
    parser.add_argument("--repairs", nargs="+", choices=REPAIRS, default=[*REPAIRS], help="what to do after the choice")
    parser.add_argument(
        "--criteria", nargs="+", choices=known_criteria(), default=["mask_ggn"], help="what chooses the units"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of fine-tuning and scores")
    parser.add_argument("--recovery_epochs", type=float, default=0.0, help="epochs of training after the cut")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--images", action="store_true", help="the model classifies images, not texts")
    own, flags = parser.parse_known_args(words)
    torch.set_num_threads(own.threads)
    rows = Rows(own.work_dir / "rows.jsonl", [*flags, f"recovery_epochs={own.recovery_epochs:g}"])
    for seed in own.seeds:
        wanted = [(keep, by, repair) for keep in own.keep for by in own.criteria for repair in own.repairs]
        missing = [each for each in wanted if rows.find(_about(*each, seed)) is None]
        if missing or rows.find(_about(1.0, "", "dense", seed)) is None:
            subject = make_subject(flags, own.work_dir / f"dense-{seed}", seed, on_images=own.images)
            for about, results in measure(subject, missing, seed, own.recovery_epochs):
                if rows.find(about) is None:
                    rows.add(about, results)
    text = to_markdown(rows, own)
    text += f"\n```bash\npython examples/benchmarks/repair_quality.py {shlex.join(words)}\n```\n"
    (own.work_dir / "table.md").write_text(text, encoding="utf-8")
    print(text)
    return text


def _about(keep: float, criterion: str, repair: str, seed: int) -> Row:
    return {"keep": keep, "criterion": criterion, "repair": repair, "seed": seed}


def measure(
    subject: Subject, wanted: Sequence[tuple[float, str, str]], seed: int, recovery_epochs: float
) -> Iterator[tuple[Row, Row]]:
    """Cut copies of a model and repair them in several ways.

    Args:
        subject: The model and what it works on; left as it is.
        wanted: Shares to keep, names of criteria and of repairs.
        seed: Seed of the scores.
        recovery_epochs: Epochs of training after the cut.

    Yields:
        Which row it is, and its results.
    """
    dense, labels = answers(subject, subject.model)
    yield _about(1.0, "", "dense", seed), quality(dense, dense, labels)
    for keep, criterion in dict.fromkeys((keep, criterion) for keep, criterion, _ in wanted):
        settings = {
            "target_params": keep,
            "method": criterion,
            "compensate": True,
            "per_cost": True,
            "max_batches": None,
            "progress": False,
            "seed": seed,
        }
        start = time.process_time()
        config = HapConfig(**settings, reconstruct=False)
        decision = decide(config.evidence(subject.model, subject.batches), config)
        chosen = time.process_time() - start
        for repair in (repair for *other, repair in wanted if other == [keep, criterion]):
            start = time.process_time()
            repaired = decide_again(decision, HapConfig(**{**settings, **REPAIRS[repair]}))
            model = copy.deepcopy(subject.model)
            carry_out_(model, repaired)
            seconds = time.process_time() - start
            results = quality(answers(subject, model)[0], dense, labels)
            results |= {
                "choice_s": chosen,
                "repair_s": seconds,
                "params": measure_size(model, subject.batches[0]).params,
            }
            if recovery_epochs:
                subject.fine_tune_(model, num_train_epochs=recovery_epochs)
                after = quality(answers(subject, model)[0], dense, labels)
                results |= {f"recovered_{name}": value for name, value in after.items()}
            yield _about(keep, criterion, repair, seed), results


def answers(subject: Subject, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of a model on the evaluation data, ``[samples, classes]``, and the right classes."""
    material, found, labels = subject.material, [], []
    model.eval()
    with torch.no_grad():
        for batch in DataLoader(
            material.evaluation, subject.args.per_device_eval_batch_size, collate_fn=material.collate
        ):
            found.append(model(**batch).logits.log_softmax(-1))
            labels.append(batch["labels"])
    return torch.cat(found), torch.cat(labels)


def quality(found: Tensor, dense: Tensor, labels: Tensor) -> dict[str, float]:
    """Return accuracy, loss and the mean divergence from the dense model's answers in nats."""
    return {
        "accuracy": (found.argmax(-1) == labels).double().mean().item(),
        "loss": F.nll_loss(found, labels).item(),
        "divergence": F.kl_div(found, dense, log_target=True, reduction="batchmean").item(),
    }


def to_markdown(rows: Rows, own: argparse.Namespace) -> str:
    """Return the results as a table, means over seeds.

    Args:
        rows: Rows of all seeds.
        own: The settings.

    Returns:
        The table in markdown.
    """
    shown = {"accuracy": (100, "accuracy, %", 1), "loss": (1, "loss", 3), "divergence": (1, "divergence, nats", 4)}
    if own.recovery_epochs:
        shown["recovered_accuracy"] = (100, "recovered, %", 1)
    shown |= {"choice_s": (1, "choice, CPU s", 0), "repair_s": (1, "repair, CPU s", 0)}
    head = ["kept", "chosen by", "repair", *(name for _, name, _ in shown.values())]
    lines = [head, ["---", "---", "---", *["---:"] * len(shown)]]
    for about in [(1.0, "", "dense"), *((k, c, r) for k in own.keep for c in own.criteria for r in own.repairs)]:
        keep, criterion, repair = about
        results = [r["results"] for seed in own.seeds if (r := rows.find(_about(*about, seed))) is not None]
        cells = []
        for name, (factor, _, digits) in shown.items():
            values = [factor * r[name] for r in results if name in r]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 and digits else ""
            cells.append(f"{statistics.fmean(values):.{digits}f}{spread}" if values else "")
        lines.append([f"{100 * keep:g}%", criterion, repair, *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    main()
