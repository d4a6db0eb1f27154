r"""Which criterion prunes best: accuracy right after the same share of units is removed, without any training.

A dense model is fine-tuned once a seed, or taken as it is (``--num_train_epochs 0`` or ``--epochs 0``). Every criterion
scores its units on the same training batches; the same share of heads, of FFN neurons and of channels is removed by
each, the least sensitive of each kind in the whole model, and what is left is evaluated, with batch norm statistics
estimated anew where there are any.

A criterion is a value of ``--method``. It may name a coupling, and a number of passes in which the share rises in equal
steps, each scored on what is left; a plus sign adds compensation: ``ggn:joint``, ``mask_ggn@4+``, ``magnitude+``.
``tp_taylor`` and ``tp_hessian`` are those of Torch-Pruning, where it is installed: its own dependency graph, on images
its own choice of channels too, at the same share. All other flags are those of ``run_glue_hap.py``, or, with
``--images``, of ``run_cifar_hap.py``. Rows are written to ``WORK_DIR/rows.jsonl`` as they are done, and are not made
again.

    python examples/benchmarks/score_quality.py --work_dir runs/quality-mrpc --seeds 0 1 2 --shares 0.2 0.4 0.6 \
        --model_name_or_path ./my-bert --task_name mrpc --train_file mrpc_train.parquet \
        --validation_file mrpc_validation.parquet --num_train_epochs 3 --learning_rate 5e-5 --max_batches 32

    python examples/benchmarks/score_quality.py --work_dir runs/quality-resnet20 --images --model cifar_resnet20 \
        --weights resnet20.safetensors --dataset cifar10 --epochs 0
"""

import argparse
import copy
import dataclasses
import logging
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the example scripts and their modules are
sys.path.insert(0, str(Path(__file__).resolve().parent))
from rows import Row, Rows
from subjects import Subject, glue_subject, image_subject
from torch_pruning_peer import IMPORTANCES, prune_with_torch_pruning

from hap_hf import (
    Compensation,
    Group,
    Method,
    PruningPlan,
    apply_plan_,
    find_groups,
    make_plan,
    measure_size,
    recalibrate_batch_norms_,
    score_groups,
)
from hap_hf.model.masking import Units, masked
from hap_hf.names.plan import PRUNE, GroupPlan


def main(argv: Sequence[str] | None = None) -> str:
    """Make the rows that are missing and print the table.

    Args:
        argv: The arguments, by default the program's.

    Returns:
        The table in markdown, with the command that made it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--work_dir", type=Path, required=True, help="folder for the dense models and the results")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.35, 0.5, 0.65], help="shares to remove")
    parser.add_argument(
        "--criteria", nargs="+", default=["mask_ggn@4+", *(m.value for m in Method)], help="how to score"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of fine-tuning and scores")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument(
        "--images", action="store_true", help="flags are those of run_cifar_hap.py, not run_glue_hap.py"
    )
    own, flags = parser.parse_known_args(words)
    own.flags = flags
    torch.set_num_threads(own.threads)
    rows = Rows(own.work_dir / "rows.jsonl", own.flags)
    make = image_subject if own.images else glue_subject
    for seed in own.seeds:
        missing = [
            about
            for criterion in ("dense", *own.criteria)
            for share in (own.shares if criterion != "dense" else [0.0])
            if rows.find(about := _about(criterion, share, seed)) is None
        ]
        if missing:
            subject = make(own.flags, own.work_dir / f"dense-{seed}", seed)
            for about, results in measure(subject, missing):
                rows.add(about, results)
    text = to_markdown(rows, own)
    text += f"\n```bash\npython examples/benchmarks/score_quality.py {shlex.join(words)}\n```\n"
    (own.work_dir / "table.md").write_text(text, encoding="utf-8")
    print(text)
    return text


def _about(criterion: str, share: float, seed: int) -> Row:
    return {"criterion": criterion, "share": share, "seed": seed}


def measure(subject: Subject, wanted: Sequence[Row]) -> Iterator[tuple[Row, Row]]:
    """Prune copies of a model by several criteria.

    Args:
        subject: The model and what it works on; left as it is.
        wanted: Which rows to make.

    Yields:
        Which row it is, and its results.
    """
    groups = find_groups(subject.model, subject.batches[0])
    known: dict[str, Any] = {}  # the same for all shares and numbers of passes
    for about in wanted:
        if about["criterion"] == "dense":
            model = subject.model
        elif about["criterion"] in IMPORTANCES:
            try:
                model = prune_with_torch_pruning(subject, groups, about["criterion"], about["share"])
                model(**subject.batches[0])
            except Exception as error:  # a peer that fails is a result
                yield about, {"error": f"{type(error).__name__}: {error}"}
                continue
        else:
            model = prune_in_passes(subject, groups, about["criterion"], about["share"], known)
        size = measure_size(model, subject.batches[0])
        accuracy = subject.accuracy(model)
        if recalibrate_batch_norms_(model := copy.deepcopy(model), subject.batches):
            accuracy = subject.accuracy(model)
        yield about, {"accuracy": accuracy, "params": size.params, "macs": size.macs}


def prune_in_passes(
    subject: Subject, groups: Sequence[Group], criterion: str, share: float, known: dict[str, Any]
) -> PreTrainedModel:
    """Return a copy of a model without a share of its units, in each kind those that a criterion puts last.

    Args:
        subject: The model and what it works on.
        groups: The model's groups.
        criterion: How to score, in how many passes, with or without compensation.
        share: Share of the units of each kind to remove.
        known: Scores of the dense model by criterion, and what compensation needs; what is missing is added.

    Returns:
        The pruned model.
    """
    name, _, passes = criterion.removesuffix("+").partition("@")
    method, _, coupling = name.partition(":")
    num_passes = int(passes or 1)
    config = dataclasses.replace(subject.config, method=method, implant_ratio=0.0, progress=False)
    if coupling:
        config = dataclasses.replace(config, coupling=coupling)
    silenced: Callable[[Units], AbstractContextManager[None]] = partial(masked, subject.model)
    if criterion.endswith("+"):
        if "moments" not in known:
            known["moments"] = Compensation.measure(subject.model, groups, subject.batches, config).moments
        compensation = Compensation.of(subject.model, groups, known["moments"])
        silenced = compensation.applied
    if name not in known:
        known[name] = score_groups(subject.model, groups, subject.batches, config)
    scores = dataclasses.replace(known[name], gone_in={g.name: torch.zeros(g.num_units) for g in groups})
    for number in range(1, num_passes + 1):
        config = dataclasses.replace(config, prune_ratio=share * number / num_passes)
        chosen = {
            plan.group.name: plan
            for kind in sorted({group.kind for group in groups})
            for plan in make_plan(groups, scores, dataclasses.replace(config, kinds=(kind,)))
            if plan.group.kind is kind
        }
        if number < num_passes:
            with silenced([(plan.group, plan.units(PRUNE)) for plan in chosen.values()]):
                now = score_groups(subject.model, groups, subject.batches, config)
            scores = dataclasses.replace(now, gone_in=_gone_in(scores.gone_in, chosen.values(), number))
    plan = PruningPlan((tuple(chosen[group.name] for group in groups),), {})
    model = copy.deepcopy(subject.model)
    if criterion.endswith("+"):
        Compensation.of(model, groups, known["moments"]).apply_best_(plan, subject.batches, config)
    apply_plan_(model, plan)
    return model


def _gone_in(before: Mapping[str, Tensor], chosen: Iterable[GroupPlan], number: int) -> dict[str, Tensor]:
    gone_in = {name: passes.clone() for name, passes in before.items()}
    for plan in chosen:
        passes = gone_in[plan.group.name]
        passes[[u for u in plan.units(PRUNE) if not passes[u]]] = number
    return gone_in


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
