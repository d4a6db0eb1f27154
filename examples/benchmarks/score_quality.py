r"""Which criterion prunes best: accuracy right after the same share of units is removed, without any training.

A dense model is fine-tuned once a seed, or taken as it is (``--num_train_epochs 0``). Every criterion scores its units
on the same training batches; the same share of heads, of FFN neurons and of channels is removed by each, the least
sensitive of each kind in the whole model, and what is left is evaluated, with batch norm statistics estimated anew
where there are any.

A criterion is a value of ``HapConfig.method``. It may name a coupling, and a number of passes in which the share rises
in equal steps, each scored on what is left; a plus sign adds compensation: ``ggn:joint``, ``mask_ggn@4+``,
``magnitude+``. ``tp_taylor`` and ``tp_hessian`` are those of Torch-Pruning, where it is installed: its own dependency
graph, on images its own choice of channels too, at the same share. Rows are written to ``WORK_DIR/rows.jsonl`` as they
are done, and are not made again.

    python examples/benchmarks/score_quality.py --work_dir runs/quality-mrpc --seeds 0 1 2 --shares 0.2 0.4 0.6 \
        --model_name_or_path ./my-bert --train_file mrpc_train.parquet --validation_file mrpc_validation.parquet \
        --num_train_epochs 3 --learning_rate 5e-5 --max_batches 32

    python examples/benchmarks/score_quality.py --work_dir runs/quality-resnet20 --images \
        --model_name_or_path cifar_resnet20 --weights resnet20.safetensors --dataset_name cifar10 --num_train_epochs 0
"""

import argparse
import copy
import dataclasses
import logging
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from rows import Row, Rows
from subjects import Subject, benchmark_parser, make_subject
from torch_pruning_peer import IMPORTANCES, prune_with_torch_pruning

from hap_hf import (
    Criterion,
    Decision,
    HapConfig,
    Scores,
    ScoringTask,
    carry_out_,
    decide,
    decide_again,
    find_groups,
    known_criteria,
    measure_size,
    recalibrate_batch_norms_,
)


@dataclass(frozen=True, kw_only=True)
class OfEachKind(Criterion):
    """Another criterion's order of the units of each kind, so that of each kind the same share goes.

    Args:
        of: The other criterion.
    """

    name: ClassVar[str] = "of_each_kind"

    of: Criterion

    @property
    def needs_batches(self) -> bool:
        """Whether the scores depend on batches, or on the weights alone."""
        return self.of.needs_batches

    def score(self, task: ScoringTask) -> Scores:
        """Return the place of each unit among those of its kind, in (0, 1); the lowest is the least sensitive."""
        scores, places = self.of.score(task), {}
        for kind in {group.kind for group in task.groups}:
            members = [group for group in task.groups if group.kind is kind]
            every = torch.cat([scores.sensitivity[group.name] for group in members])
            order = torch.empty_like(every)
            order[torch.argsort(every, stable=True)] = (torch.arange(len(every)) + 0.5).to(every) / len(every)
            parts = order.split([group.num_units for group in members])
            places |= dict(zip((group.name for group in members), parts, strict=True))
        zeros = {name: torch.zeros_like(place) for name, place in places.items()}
        return dataclasses.replace(scores, sensitivity=places, standard_error=zeros)


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
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.35, 0.5, 0.65], help="shares to remove")
    parser.add_argument("--criteria", nargs="+", default=["mask_ggn@4+", *known_criteria()], help="how to score")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of fine-tuning and scores")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--images", action="store_true", help="the model classifies images, not texts")
    own, flags = parser.parse_known_args(words)
    torch.set_num_threads(own.threads)
    rows = Rows(own.work_dir / "rows.jsonl", flags)
    for seed in own.seeds:
        missing = [
            about
            for criterion in ("dense", *own.criteria)
            for share in (own.shares if criterion != "dense" else [0.0])
            if rows.find(about := _about(criterion, share, seed)) is None
        ]
        if missing:
            subject = make_subject(flags, own.work_dir / f"dense-{seed}", seed, on_images=own.images)
            for about, results in measure(subject, missing, seed):
                rows.add(about, results)
    text = to_markdown(rows, own)
    text += f"\n```bash\npython examples/benchmarks/score_quality.py {shlex.join(words)}\n```\n"
    (own.work_dir / "table.md").write_text(text, encoding="utf-8")
    print(text)
    return text


def _about(criterion: str, share: float, seed: int) -> Row:
    return {"criterion": criterion, "share": share, "seed": seed}


def measure(subject: Subject, wanted: Sequence[Row], seed: int) -> Iterator[tuple[Row, Row]]:
    """Prune copies of a model by several criteria.

    Args:
        subject: The model and what it works on; left as it is.
        wanted: Which rows to make.
        seed: Seed of probes and random scores.

    Yields:
        Which row it is, and its results.
    """
    known: dict[str, Decision] = {}
    for about in wanted:
        criterion, share = about["criterion"], about["share"]
        model = copy.deepcopy(subject.model)
        if criterion in IMPORTANCES:
            try:
                groups = find_groups(subject.model, subject.batches[0])
                model = prune_with_torch_pruning(subject, groups, criterion, share)
                model(**subject.batches[0])
            except Exception as error:  # a peer that fails is a result
                yield about, {"error": f"{type(error).__name__}: {error}"}
                continue
        elif criterion != "dense":
            config = config_of(criterion, share, seed)
            if criterion in known and config.passes == 1:  # the same scores for all shares
                decision = decide_again(known[criterion], config)
            else:
                decision = decide(config.evidence(subject.model, subject.batches), config)
            known[criterion] = decision
            carry_out_(model, decision)
        size = measure_size(model, subject.batches[0])
        recalibrate_batch_norms_(model, subject.batches)
        yield about, {"accuracy": subject.accuracy(model), "params": size.params, "macs": size.macs}


def config_of(criterion: str, share: float, seed: int) -> HapConfig:
    """Return the settings that remove a share of the units of each kind.

    Args:
        criterion: How to score, in how many passes, with or without compensation.
        share: The share.
        seed: Seed of probes and random scores.

    Returns:
        The settings.
    """
    name, _, passes = criterion.removesuffix("+").partition("@")
    method, _, coupling = name.partition(":")
    return HapConfig(
        prune_ratio=share,
        method=OfEachKind(of=known_criteria()[method](**({"coupling": coupling} if coupling else {}))),
        num_passes=int(passes or 1),
        compensate=criterion.endswith("+"),
        max_batches=None,
        recalibrate=False,
        progress=False,
        seed=seed,
    )


def to_markdown(rows: Rows, own: argparse.Namespace) -> str:
    """Return the accuracies as a table, in percent, means over seeds with their standard deviation.

    Args:
        rows: Rows of all seeds.
        own: The settings.

    Returns:
        The table in markdown.
    """
    dense = [rows.find(_about("dense", 0.0, seed)) for seed in own.seeds]
    head = ["criterion", *(f"{100 * share:g}% removed" for share in own.shares)]
    lines = [head, ["---", *["---:"] * len(own.shares)]]
    lines.append(["dense", _percent(dense), *[""] * (len(own.shares) - 1)])
    for criterion in own.criteria:
        cells = ([rows.find(_about(criterion, share, seed)) for seed in own.seeds] for share in own.shares)
        lines.append([criterion, *map(_percent, cells)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _percent(rows: Sequence[Row | None]) -> str:
    values = [100 * row["results"]["accuracy"] for row in rows if row and "error" not in row["results"]]
    if not values:
        return "fails"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    main()
