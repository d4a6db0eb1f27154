r"""Accuracy of an image classifier against size, criterion, implants and what follows pruning.

One dense model, trained or, with ``--num_train_epochs 0``, taken from ``--weights`` or a checkpoint, is pruned to every
size given with ``--keep`` (shares of the prunable parameters that stay) by every method, by removal alone and with a
share of the cut units implanted at the same number of remaining parameters. Each time its accuracy is taken right after
the cut, once more with batch norm statistics estimated anew, and after ``--recovery_epochs``. A method of one pass
scores once a seed, and all sizes share its scores. Rows are written to ``WORK_DIR/rows.jsonl`` as they are done: what
was interrupted goes on where it stopped, and a row is made anew only if its flags changed.

    python examples/benchmarks/cifar_table.py --work_dir runs/table-resnet20 --model_name_or_path cifar_resnet20 \
        --weights resnet20.safetensors --dataset_name cifar10 --num_train_epochs 0 --augment --recovery_epochs 2 \
        --seeds 0 1 2
"""

import copy
import logging
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rows import Row, Rows
from subjects import Subject, benchmark_parser, make_subject
from transformers import set_seed

from hap_hf import (
    Decision,
    HapConfig,
    carry_out_,
    decide,
    decide_again,
    known_criteria,
    measure_size,
    recalibrate_batch_norms_,
)

logger = logging.getLogger("cifar_table")

STAGES = ("pruned", "recalibrated", "finetuned")
DENSE: Row = {"stage": "dense"}


def main(argv: Sequence[str] | None = None) -> str:
    """Make the rows that are missing and print the table.

    Args:
        argv: The arguments, by default the program's.

    Returns:
        The table in markdown, with the command that made it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = benchmark_parser(__doc__)
    parser.add_argument("--work_dir", type=Path, required=True, help="folder for the dense model and the results")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.7, 0.5, 0.3], help="shares of parameters to keep")
    parser.add_argument("--implant_ratio", type=float, default=0.3, help="implanted share of the cut units, 0 for none")
    parser.add_argument("--methods", nargs="+", default=[*known_criteria()], help="how to score")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of scores and fine-tuning")
    parser.add_argument("--recovery_epochs", type=float, default=10, help="epochs of fine-tuning after pruning")
    parser.add_argument("--recovery_learning_rate", type=float, default=0.01, help="its learning rate, at its start")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    own, flags = parser.parse_known_args(words)
    torch.set_num_threads(own.threads)
    recovery = {"num_train_epochs": own.recovery_epochs, "learning_rate": own.recovery_learning_rate}
    rows = Rows(own.work_dir / "rows.jsonl", [*flags, str(recovery)])
    ways = [{"keep": keep, "implant_ratio": ratio} for keep in own.keep for ratio in sorted({0.0, own.implant_ratio})]
    for seed in own.seeds:
        wanted = [{"method": method, "seed": seed, **way} for method in own.methods for way in ways]
        missing = [about for about in wanted if rows.find(about) is None]
        if missing or rows.find(DENSE) is None:
            folder = own.work_dir / "dense"
            if rows.find(DENSE) is None:
                (folder / "config.json").unlink(missing_ok=True)  # what is there was trained with other flags
            # The dense model is the same for all seeds; the batches that it is scored on are not.
            subject = make_subject(flags, folder, seed, on_images=True)
            if rows.find(DENSE) is None:
                size = measure_size(subject.model, subject.batches[0])
                results = {"accuracy": subject.accuracy(subject.model), "params": size.params, "macs": size.macs}
                rows.add(DENSE, results)
            for about, results in prune_in_each_way(subject, missing, recovery):
                rows.add(about, results)
    table = [
        [rows.find({"method": method, "seed": seed, **way}) for seed in own.seeds]
        for way in ways
        for method in own.methods
    ]
    text = to_markdown(rows.find(DENSE), table)
    text += f"\n```bash\npython examples/benchmarks/cifar_table.py {shlex.join(words)}\n```\n"
    (own.work_dir / "table.md").write_text(text, encoding="utf-8")
    print(text)
    return text


def prune_in_each_way(subject: Subject, wanted: Sequence[Row], recovery: Row) -> Iterator[tuple[Row, Row]]:
    """Prune copies of a model.

    Args:
        subject: The model, which is left as it is, and what it works on.
        wanted: Which rows to make, all of the same seed.
        recovery: Arguments of the Trainer for the fine-tuning.

    Yields:
        Which row it is, and its results.
    """
    known: dict[str, Decision] = {}
    for about in wanted:
        method, seed = about["method"], about["seed"]
        config = HapConfig(
            target_params=about["keep"],
            implant_ratio=about["implant_ratio"],
            method=method,
            max_batches=None,
            recalibrate=False,
            progress=False,
            seed=seed,
        )
        if method in known and config.passes == 1:  # a single pass is the same for all amounts
            decision = decide_again(known[method], config)
        else:
            decision = decide(config.evidence(subject.model, subject.batches), config)
        known[method] = decision
        model = copy.deepcopy(subject.model)
        report = carry_out_(model, decision)
        results = {
            "kept": report.prunable_after.params / report.prunable_before.params,
            "params": report.after.params,
            "macs": report.after.macs,
            "scoring_seconds": decision.scores.seconds,
            "pruned": subject.accuracy(model),
        }
        recalibrate_batch_norms_(model, subject.batches)
        results["recalibrated"] = subject.accuracy(model)
        set_seed(seed)
        subject.fine_tune_(model, seed=seed, **recovery)
        results["finetuned"] = subject.accuracy(model)
        yield about, results


def to_markdown(dense: Row, rows: Sequence[Sequence[Row]]) -> str:
    """Return the rows as a table.

    Args:
        dense: The row of the dense model.
        rows: For each line of the table, its rows, one a seed.

    Returns:
        The table in markdown, accuracies in percent, with their standard deviation where there are several seeds.
    """
    head = ["prunable parameters kept", "implants", "method", "right after pruning", "batch norm recalibrated"]
    head += ["fine-tuned", "parameters, k", "MACs an image, M", "scoring, s"]
    result = dense["results"]
    first = ["100% (dense)", "", "", f"{100 * result['accuracy']:.2f}", "", ""]
    lines = [head, ["---", "---", "---", *["---:"] * 6], [*first, *_size([result]), ""]]
    for members in rows:
        results = [row["results"] for row in members]
        implant_ratio = members[0]["implant_ratio"]
        lines.append([
            f"{100 * _mean(results, 'kept'):.1f}%",
            f"{implant_ratio:g} of the cut" if implant_ratio else "none",
            members[0]["method"],
            *(_percent(results, stage) for stage in STAGES),
            *_size(results),
            f"{_mean(results, 'scoring_seconds'):.0f}",
        ])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _mean(results: Sequence[Row], name: str) -> float:
    return statistics.fmean(result[name] for result in results)


def _percent(results: Sequence[Row], stage: str) -> str:
    mean = f"{100 * _mean(results, stage):.2f}"
    return mean if len(results) == 1 else f"{mean} ± {100 * statistics.stdev(r[stage] for r in results):.2f}"


def _size(results: Sequence[Row]) -> list[str]:
    return [f"{_mean(results, 'params') / 1e3:.1f}", f"{_mean(results, 'macs') / 1e6:.2f}"]


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    main()
