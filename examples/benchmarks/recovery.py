r"""Accuracy after pruning and recovery, by what helps: distillation, growing regularisation, rounds, other criteria.

A dense model, from ``--weights`` with ``--num_train_epochs 0``, is pruned to each share of its prunable parameters
(``--keep``) in each way (``--ways``), and trained for ``--recovery_epochs`` as a whole, whatever happens in them.
Accuracy is that on all evaluation data after the last epoch, never the best. Each row is a process of its own, writes
to ``WORK_DIR/rows.jsonl`` when it is done and goes on from its last epoch when it was interrupted, so that a long table
may be made over days: start the command again. Rows that were not made stand in the table as such.

    python examples/benchmarks/recovery.py --work_dir runs/recovery --model_name_or_path cifar_resnet20 \
        --weights resnet20.safetensors --dataset_name cifar10 --augment --num_train_epochs 0 \
        --keep 0.5 0.3 --recovery_epochs 20 --weight_decay 5e-4
"""

import argparse
import copy
import dataclasses
import json
import logging
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rows import Row, Rows
from subjects import Subject, benchmark_parser, make_subject
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hap_hf import Distill, HapConfig, HessianPruner, carry_out_, decide, find_groups, measure_size

logger = logging.getLogger("recovery")

WAYS = {
    "default": "pruned at the beginning, the default's scores and compensation",
    "distill": "the same, learning from the dense model",
    "hessian": "the paper's score (relative Hessian trace), no compensation",
    "magnitude": "magnitude, no compensation",
    "torch_pruning": "Torch-Pruning, group Taylor importance, at the default's multiply-accumulates",
    "scratch": "the default's architecture with new weights, at the learning rate of --scratch_learning_rate",
}


class Curve(TrainerCallback):
    """Takes the accuracy after each epoch, and keeps it in a file, for rows that are interrupted."""

    def __init__(self, subject: Subject, file: Path) -> None:
        self.subject = subject
        self.file = file
        self.points: list[dict[str, float]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        self.start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Take it right after pruning, too; pruners must come before this callback."""
        self.points = [point for point in self.points if point["epoch"] <= (state.epoch or 0)]
        self._add(state.epoch or 0, model, 0.0) if not self.points else None
        self.start = time.perf_counter() - self.points[-1]["seconds"]

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Take it, and leave the time that it took out of the count."""
        self._add(round(state.epoch), model, time.perf_counter() - self.start)
        self.start = time.perf_counter() - self.points[-1]["seconds"]

    def _add(self, epoch: float, model: PreTrainedModel, seconds: float) -> None:
        self.points.append({"epoch": epoch, "seconds": seconds, "accuracy": self.subject.accuracy(model)})
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.points), encoding="utf-8")
        logger.info("%s: %s", self.file.parent.name, self.points[-1])


def main(argv: Sequence[str] | None = None) -> str:
    """Make the rows that are missing, each in a process of its own, and print the table.

    Args:
        argv: The arguments, by default the program's.

    Returns:
        The table in markdown, with the command that made it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    own, flags = parser_of().parse_known_args(words)
    torch.set_num_threads(own.threads)
    settings = {n: getattr(own, n) for n in ("recovery_epochs", "recovery_learning_rate", "scratch_learning_rate")}
    rows = Rows(own.work_dir / "rows.jsonl", [*flags, str(settings)])
    if own.row is not None:
        make_row(json.loads(own.row), own, flags, rows)
        return ""
    wanted = [{"way": way, "keep": keep, "seed": seed} for seed in own.seeds for keep in own.keep for way in own.ways]
    dense: Row = {"way": "dense"}
    for about in [dense, *wanted]:
        if not own.only_print and rows.find(about) is None:
            done = subprocess.run([sys.executable, __file__, *words, "--row", json.dumps(about)], check=False)
            logger.info("%s: %s", about, "done" if done.returncode == 0 else "failed, see above")
            rows = Rows(own.work_dir / "rows.jsonl", [*flags, str(settings)])
    text = to_markdown(rows.find(dense), [(about, rows.find(about)) for about in wanted])
    text += f"\n```bash\npython examples/benchmarks/recovery.py {shlex.join(words)}\n```\n"
    own.work_dir.mkdir(parents=True, exist_ok=True)
    (own.work_dir / "table.md").write_text(text, encoding="utf-8")
    print(text)
    return text


def parser_of() -> argparse.ArgumentParser:
    """Return the parser of what is not the subject's."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--work_dir", type=Path, required=True, help="folder for the dense model and the results")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.3], help="shares of parameters to keep")
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=[*WAYS], help="; ".join(map(": ".join, WAYS.items()))
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of scores and training")
    parser.add_argument("--recovery_epochs", type=float, default=20.0, help="epochs from the dense model to the end")
    parser.add_argument("--recovery_learning_rate", type=float, default=0.01, help="learning rate at their beginning")
    parser.add_argument("--scratch_learning_rate", type=float, default=0.1, help="the same for new weights")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--only_print", action="store_true", help="make no rows, print those that there are")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    return parser


def make_row(about: Row, own: argparse.Namespace, flags: Sequence[str], rows: Rows) -> None:
    """Make one row, or go on with it, and write it.

    Args:
        about: Which row.
        own: Flags of the table.
        flags: Flags of the subject.
        rows: Where it is written.
    """
    seed = about.get("seed", 0)
    on_images = "--task_name" not in flags
    subject = make_subject(flags, own.work_dir / "dense", seed, on_images=on_images)
    size = measure_size(subject.model, subject.batches[0])
    if about["way"] == "dense":
        rows.add(about, {"accuracy": subject.accuracy(subject.model), "params": size.params, "macs": size.macs})
        return
    folder = own.work_dir / "_".join(str(value) for value in about.values())
    set_seed(seed)
    model, callbacks = prepared(subject, about["way"], about["keep"], seed)
    if on_images:
        model = model.to(memory_format=torch.channels_last)
    scratch = about["way"] == "scratch"
    args = dataclasses.replace(
        subject.args,
        output_dir=str(folder),
        num_train_epochs=own.recovery_epochs,
        learning_rate=own.scratch_learning_rate if scratch else own.recovery_learning_rate,
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=50,
    )
    curve = Curve(subject, folder / "curve.json")
    trainer = Trainer(
        model,
        args,
        train_dataset=subject.material.train,
        data_collator=subject.material.collate_training,
        callbacks=[*callbacks, curve],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    left = measure_size(trainer.model, subject.batches[0])
    seconds = curve.points[-1]["seconds"]
    rows.add(
        about,
        {
            "params": left.params,
            "macs": left.macs,
            "share_params": left.params / size.params,
            "share_macs": left.macs / size.macs,
            "seconds": seconds,
            "samples_per_second": own.recovery_epochs * len(subject.material.train) / seconds,
            "curve": curve.points,
            "pruned": curve.points[0]["accuracy"],
            "accuracy": curve.points[-1]["accuracy"],
        },
    )


def prepared(subject: Subject, way: str, keep: float, seed: int) -> tuple[PreTrainedModel, list[TrainerCallback]]:
    """Return the model that a training starts with, and what prunes it and helps it.

    Args:
        subject: The dense model, which is left as it is.
        way: One of ``WAYS``.
        keep: Share of the prunable parameters to keep.
        seed: Seed of the scores.

    Returns:
        The model and the callbacks.
    """
    model = copy.deepcopy(subject.model)
    method = {"hessian": "hessian", "magnitude": "magnitude"}.get(way, "mask_ggn")
    config = HapConfig(target_params=keep, method=method, max_batches=None, progress=False, seed=seed)
    if way in {"scratch", "torch_pruning"}:
        carry_out_(model, decide(config.evidence(model, subject.batches), config))
        if way == "torch_pruning":
            return as_large_by_torch_pruning(subject, measure_size(model, subject.batches[0]).macs), []
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        return model, []
    pruner = HessianPruner(config, batches=subject.batches)
    return model, [pruner, Distill()] if way == "distill" else [pruner]


def as_large_by_torch_pruning(subject: Subject, macs: float) -> PreTrainedModel:
    """Return the dense model pruned by Torch-Pruning to at least so many multiply-accumulates, and hardly more.

    Args:
        subject: The dense model.
        macs: Multiply-accumulates a sample.

    Returns:
        The smallest model found that has as many.
    """
    from torch_pruning_peer import prune_with_torch_pruning

    groups = find_groups(subject.model, subject.batches[0])
    low, high, best = 0.0, 0.95, copy.deepcopy(subject.model)
    for _ in range(7):
        share = (low + high) / 2
        found = prune_with_torch_pruning(subject, groups, "tp_taylor", share)
        enough = measure_size(found, subject.batches[0]).macs >= macs
        low, high, best = (share, high, found) if enough else (low, share, best)
    best.zero_grad()
    return best


def to_markdown(dense: Row | None, rows: Sequence[tuple[Row, Row | None]]) -> str:
    """Return the rows as a table.

    Args:
        dense: The row of the dense model, if it was made.
        rows: What each line is about, and its row, if it was made.

    Returns:
        The table in markdown, accuracies in percent.
    """
    head = ["prunable parameters kept", "way", "seed", "of all parameters", "of all MACs", "right after pruning"]
    head += ["after each epoch", "at the end", "points lost", "training, s", "samples a second"]
    lines = [head, ["---:", "---", *["---:"] * 4, "---", *["---:"] * 4]]
    whole = dense["results"]["accuracy"] if dense is not None else float("nan")
    lines.append(["100%", "dense", "", "100%", "100%", "", "", f"{100 * whole:.2f}", "", "", ""])
    for about, row in rows:
        name = [f"{about['keep']:.0%}", about["way"], str(about["seed"])]
        if row is None:
            lines.append([*name, *["not run"] * 8])
            continue
        found = row["results"]
        numbers = [f"{found['share_params']:.1%}", f"{found['share_macs']:.1%}", f"{100 * found['pruned']:.2f}"]
        numbers += [", ".join(f"{100 * point['accuracy']:.2f}" for point in found["curve"][1:])]
        numbers += [f"{100 * found['accuracy']:.2f}", f"{100 * (whole - found['accuracy']):.2f}"]
        lines.append([*name, *numbers, f"{found['seconds']:.0f}", f"{found['samples_per_second']:.0f}"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    main()
