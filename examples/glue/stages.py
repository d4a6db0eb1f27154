"""The stages of a run: fine-tune, prune and recover, reload, evaluate, predict."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from glue.settings import PruningArguments
from hap_hf import HapConfig, HessianPruner, Kind, ModelSize, PruningReport, measure_size


@dataclass(frozen=True)
class Material:
    """What every stage trains and evaluates with.

    Args:
        splits: Tokenized splits.
        tokenizer: The tokenizer, saved with every model.
        metric: Turns predictions into metrics.
        names: Names of the labels in the model's order; none for regression.
        padded: Whether the samples are padded already.
    """

    splits: Mapping[str, Dataset]
    tokenizer: PreTrainedTokenizerBase
    metric: Callable[[EvalPrediction], dict[str, float]]
    names: tuple[str, ...]
    padded: bool

    def trainer(
        self, model: PreTrainedModel, args: TrainingArguments, callbacks: tuple[TrainerCallback, ...] = ()
    ) -> Trainer:
        """Return a Trainer of ``model`` on this material.

        Args:
            model: The model.
            args: The Trainer's arguments.
            callbacks: Callbacks beside the Trainer's own.

        Returns:
            The Trainer.
        """
        return Trainer(
            model=model,
            args=args,
            data_collator=default_data_collator if self.padded else DataCollatorWithPadding(self.tokenizer),
            train_dataset=self.splits.get("train"),
            eval_dataset=self.splits.get("validation"),
            processing_class=self.tokenizer,
            compute_metrics=self.metric,
            callbacks=list(callbacks),
        )

    def evaluate(self, trainer: Trainer, stage: str) -> dict[str, float]:
        """Return the metrics on the validation data, MNLI's mismatched part with the suffix ``_mm``.

        Args:
            trainer: A Trainer with the model.
            stage: Prefix of the names.

        Returns:
            The metrics by name; none without validation data.
        """
        result: dict[str, float] = {}
        for split, suffix in (("validation", ""), ("validation_mismatched", "_mm")):
            if split in self.splits:
                metrics = trainer.evaluate(self.splits[split], metric_key_prefix=stage)
                result |= {f"{name}{suffix}": v for name, v in metrics.items() if name.startswith(f"{stage}_")}
        return result

    def size(self, trainer: Trainer) -> ModelSize:
        """Return parameters and multiply-accumulates per sample, on the first batch of the evaluation data.

        Args:
            trainer: A Trainer with the model.

        Returns:
            The size.
        """
        dataset = self.splits.get("validation", next(iter(self.splits.values())))
        batch = next(iter(trainer.get_eval_dataloader(dataset)))
        return measure_size(trainer.model, batch)


class _AfterPruning(TrainerCallback):
    """Calls ``action`` once, right after the last round of ``pruner``."""

    def __init__(self, pruner: HessianPruner, action: Callable[[], None]) -> None:
        self.pruner = pruner
        self.action: Callable[[], None] | None = action

    def _check(self, *_: Any, **__: Any) -> None:
        if self.action is not None and len(self.pruner.reports) == self.pruner.num_rounds:
            action, self.action = self.action, None
            action()

    on_train_begin = on_step_end = on_epoch_end = _check


def fine_tune(model: PreTrainedModel, args: TrainingArguments, material: Material) -> dict[str, float]:
    """Train ``model`` and save it to ``args.output_dir``.

    Args:
        model: The model, trained in place.
        args: The Trainer's arguments.
        material: Data, tokenizer and metric.

    Returns:
        The Trainer's metrics of the training, ``train_runtime`` in seconds among them.
    """
    trainer = material.trainer(model, args)
    outcome = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    if args.push_to_hub:
        trainer.push_to_hub()
    return {name: value for name, value in outcome.metrics.items() if name.startswith("train_")}


def prune_and_recover(
    model: PreTrainedModel,
    args: TrainingArguments,
    material: Material,
    config: HapConfig,
    pruning: PruningArguments,
) -> dict[str, float]:
    """Prune ``model`` in a training of ``pruning.recovery_epochs`` epochs and save it to ``args.output_dir``.

    Args:
        model: A fine-tuned model, pruned and trained in place.
        args: The Trainer's arguments; epochs and learning rate are taken from ``pruning``.
        material: Data, tokenizer and metric.
        config: How much to prune and how.
        pruning: When to prune and how long to train.

    Returns:
        Metrics and sizes: ``dense_*`` before, ``pruned_*`` after pruning and ``recovered_*`` after the
        training; what is left of heads and neurons; seconds.
    """
    args = dataclasses.replace(
        args,
        num_train_epochs=pruning.recovery_epochs,
        max_steps=-1,
        learning_rate=pruning.recovery_learning_rate or args.learning_rate,
        resume_from_checkpoint=None,
    )
    results: dict[str, float] = {}
    pruner = HessianPruner(
        config,
        step=pruning.prune_step,
        epoch=pruning.prune_epoch,
        num_rounds=pruning.num_rounds,
        interval=pruning.round_interval,
    )
    after = _AfterPruning(pruner, lambda: results.update(material.evaluate(trainer, "pruned")))
    trainer = material.trainer(model, args, (pruner, after))
    results |= material.evaluate(trainer, "dense") | _named(material.size(trainer), "dense")
    outcome = trainer.train()
    results["recovery_runtime"] = outcome.metrics["train_runtime"]
    results |= _pruned(pruner.reports)
    results |= material.evaluate(trainer, "recovered") | _named(material.size(trainer), "pruned")
    trainer.save_model()
    trainer.save_state()
    if args.push_to_hub:
        trainer.push_to_hub()
    return results


def _pruned(reports: Sequence[PruningReport]) -> dict[str, float]:
    """Return what all rounds together did to heads and neurons, and how long scoring took."""
    first, last = reports[0], reports[-1]
    result: dict[str, float] = {
        "scoring_seconds": sum(report.seconds["scoring"] for report in reports),
        "prunable_params_kept": last.prunable_after.params / first.prunable_before.params,
    }
    for kind in Kind:
        before, (_, kept, implanted) = first.units(kind)[0], last.units(kind)
        groups = sum(g.kind is kind for g in last.groups)
        if groups:
            result |= {f"{kind}_groups": groups, f"{kind}_before": before, f"{kind}_kept": kept}
            result[f"{kind}_implanted"] = implanted
    return result


def _named(size: ModelSize, stage: str) -> dict[str, float]:
    return {f"{stage}_params": size.params, f"{stage}_macs": size.macs}


def predict(model: PreTrainedModel, args: TrainingArguments, material: Material, task_name: str | None) -> list[Path]:
    """Write the predictions for the test data, one row a sample, as run_glue.py does.

    Args:
        model: The model.
        args: The Trainer's arguments.
        material: Data, tokenizer and metric.
        task_name: Part of the files' names.

    Returns:
        The files, one a test split.
    """
    trainer = material.trainer(model, args)
    files = []
    for split, suffix in (("test", ""), ("test_mismatched", "-mm")):
        if split not in material.splits:
            continue
        logits = trainer.predict(material.splits[split], metric_key_prefix="predict").predictions
        logits = logits[0] if isinstance(logits, tuple) else logits
        if material.names:
            answers = [material.names[i] for i in np.argmax(logits, axis=-1)]
        else:
            answers = [f"{value:.3f}" for value in np.squeeze(logits, axis=-1)]
        file = Path(args.output_dir) / f"predict_results_{task_name or 'text'}{suffix}.txt"
        rows = [f"{i}\t{answer}" for i, answer in enumerate(answers)]
        file.write_text("\n".join(["index\tprediction", *rows]) + "\n", encoding="utf-8")
        files.append(file)
    return files
