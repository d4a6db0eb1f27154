r"""Accuracy of an image classifier against size, criterion, implants and what follows pruning.

One dense model, trained with ``--epochs`` or taken from ``--weights`` or a checkpoint with ``--epochs 0``, is pruned to
every size given with ``--keep`` (shares of the prunable parameters that stay) by every method, by removal alone and
with a share of the cut units implanted at the same number of remaining parameters. Each time its accuracy is taken
right after the cut, once more with batch norm statistics estimated anew, and after ``--finetune_epochs``. A method of
one pass scores once a seed, and all sizes share its scores. All flags of ``run_cifar_hap.py`` but amounts and method
are accepted here. Rows are written to ``WORK_DIR/rows.jsonl`` as they are done: what was interrupted goes on where it
stopped, and a row is made anew only if its flags changed.

    python examples/benchmarks/cifar_table.py --work_dir runs/table-resnet20 --model cifar_resnet20 \
        --weights resnet20.safetensors --dataset cifar10 --epochs 0 --augment --finetune_epochs 2 --seeds 0 1 2
"""

import argparse
import copy
import dataclasses
import logging
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForImageClassification, PreTrainedModel, TrainingArguments, set_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where run_cifar_hap.py and its modules are
sys.path.insert(0, str(Path(__file__).resolve().parent))
from glue.stages import fine_tune
from images.settings import Settings, parse
from images.stages import Batch, ImageMaterial
from rows import Row, Rows
from run_cifar_hap import prepare
from subjects import accuracy_of

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
    score_in_passes,
)
from hap_hf.config import ImplantInit
from hap_hf.report import make_report
from hap_hf.surgery import collect_input_moments
from hap_hf.trainer.scoring import scoring_batches

logger = logging.getLogger("cifar_table")

STAGES = ("pruned", "recalibrated", "finetuned")


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
    parser.add_argument("--work_dir", type=Path, required=True, help="folder for the dense model and the results")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.7, 0.5, 0.3], help="shares of parameters to keep")
    parser.add_argument(
        "--implant_ratio",
        type=float,
        default=0.3,
        help="implanted share of the cut units, 0 for none",
    )
    parser.add_argument("--methods", nargs="+", default=[m.value for m in Method], help="how to score")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of scores and fine-tuning")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    own, flags = parser.parse_known_args(words)
    torch.set_num_threads(own.threads)
    # Any amount will do: each row sets its own.
    settings = parse([*flags, "--target_params", "0.5", "--output_dir", str(own.work_dir)])
    rows = Rows(own.work_dir / "rows.jsonl", flags)
    model, material = make_dense(settings, own.work_dir / "dense", rows)
    ways = [{"keep": keep, "implant_ratio": ratio} for keep in own.keep for ratio in sorted({0.0, own.implant_ratio})]
    groups: tuple[Group, ...] = ()
    for seed in own.seeds:
        for method in own.methods:
            missing = [about for way in ways if rows.find(about := {"method": method, "seed": seed, **way}) is None]
            if missing:
                groups = groups or find_groups(model, material.batch(2))
                for about, results in prune_in_each_way(model, groups, material, settings, missing):
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


DENSE: Row = {"stage": "dense"}


def make_dense(settings: Settings, folder: Path, rows: Rows) -> tuple[PreTrainedModel, ImageMaterial]:
    """Train the dense model, or read back the one of an earlier run.

    Args:
        settings: The command line.
        folder: Where the model is kept.
        rows: Rows that are done; one for the dense model is added.

    Returns:
        The model, on the device that it is to run on, and what it works on.
    """
    set_seed(settings.training.seed)
    model, material = prepare(settings)
    args = _arguments(settings, folder)
    if rows.find(DENSE) is not None and folder.is_dir():
        model = AutoModelForImageClassification.from_pretrained(folder)
    else:
        if settings.training.epochs > 0:
            fine_tune(model, args, material)
            model = AutoModelForImageClassification.from_pretrained(folder)
        else:
            model.save_pretrained(folder)
        size = measure_size(model, material.batch(1))
        rows.add(DENSE, {"accuracy": accuracy_of(model, material, args), "params": size.params, "macs": size.macs})
    return model.to(args.device), material


def prune_in_each_way(
    dense: PreTrainedModel,
    groups: Sequence[Group],
    material: ImageMaterial,
    settings: Settings,
    wanted: Sequence[Row],
) -> Iterator[tuple[Row, Row]]:
    """Prune copies of a model by one method with one seed.

    Args:
        dense: The model; left as it is.
        groups: Its groups.
        material: What it works on.
        settings: The command line.
        wanted: Which rows to make, all of the same method and seed.

    Yields:
        Which row it is, and its results.
    """
    config = dataclasses.replace(settings.config, method=wanted[0]["method"], seed=wanted[0]["seed"])
    loader = scoring_batches(material.images["train"], material.collate_training, settings.training.batch_size, config)
    batches = list(loader)
    before = measure_size(dense, material.batch(1))
    scores = compensation = None
    if config.compensates:
        compensation = Compensation.measure(dense, groups, batches, config)
    args = dataclasses.replace(
        _arguments(settings, settings.training.output_dir),
        seed=config.seed,
        num_train_epochs=settings.training.finetune_epochs,
        learning_rate=settings.training.finetune_learning_rate,
    )
    for about in wanted:
        model = copy.deepcopy(dense)
        now = dataclasses.replace(config, target_params=about["keep"], implant_ratio=about["implant_ratio"])
        if scores is None or now.passes > 1:  # a single pass is the same for all amounts
            scores = score_in_passes(dense, groups, batches, now, compensation=compensation)
        plan = make_plan(groups, scores, now)
        if compensation is not None:
            Compensation.of(model, groups, compensation.moments).apply_best_(plan, batches, now)
        _cut(model, plan, now.implant_init, batches)
        report = make_report(plan, scores, before, measure_size(model, material.batch(1)), {})
        results = {
            "kept": report.prunable_after.params / report.prunable_before.params,
            "params": report.after.params,
            "macs": report.after.macs,
            "scoring_seconds": scores.seconds,
            "pruned": accuracy_of(model, material, args),
        }
        recalibrate_batch_norms_(model, batches)
        results["recalibrated"] = accuracy_of(model, material, args)
        set_seed(config.seed)
        trainer = material.trainer(model, args)
        if args.num_train_epochs > 0:
            trainer.train()
        results["finetuned"] = material.evaluate(trainer, "eval")["eval_accuracy"]
        yield about, results


def _cut(model: PreTrainedModel, plan: PruningPlan, init: ImplantInit, batches: Sequence[Batch]) -> None:
    """Apply a plan as ``hap_hf.prune`` does, but leave batch norms as they are."""
    implanted = {tensor for group in plan for tensor in group.ranks}
    moments = collect_input_moments(model, implanted, batches) if implanted and init is ImplantInit.SVD else {}
    apply_plan_(model, plan, init=init, input_moments=moments)


def _arguments(settings: Settings, folder: str | Path) -> TrainingArguments:
    args = settings.training.to_training_arguments(progress=settings.pruning.progress)
    return dataclasses.replace(args, output_dir=str(folder))


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
