"""What the stages of run_glue_hap.py work on when it is images, and what this example adds: latency and a summary."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from hap_hf import ModelSize, measure_size
from images.samples import Images, Preprocessing

Batch = Mapping[str, Tensor]
Collator = Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]


class ImageTrainer(Trainer):
    """A Trainer whose batches to train on are made otherwise than those to evaluate on.

    Args:
        *args: What a Trainer takes.
        training_collator: Makes the batches to train on, which are also those that pruning scores on.
        **kwargs: What a Trainer takes; ``data_collator`` makes the batches to evaluate on.
    """

    def __init__(self, *args: Any, training_collator: Collator, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._training_collator = training_collator

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the batches to train on.

        Returns:
            The loader.
        """
        evaluating, self.data_collator = self.data_collator, self._training_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = evaluating


@dataclass(frozen=True)
class ImageMaterial:
    """What every stage trains and evaluates with; has the methods of run_glue_hap.py's ``Material``.

    Args:
        images: ``test``, to evaluate on, and ``train``.
        preprocessing: Makes batches.
        processor: Image processor, saved with every model; None where its config says it all.
        optimizer: The Trainer's ``optimizer_cls_and_kwargs``, all but the learning rate.
        augment: Whether training images are augmented.
    """

    images: Mapping[str, Images]
    preprocessing: Preprocessing
    processor: Any
    optimizer: tuple[type[torch.optim.Optimizer], dict[str, Any]]
    augment: bool

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
        kind, options = self.optimizer
        return ImageTrainer(
            model=model,
            args=args,
            data_collator=self.preprocessing,
            train_dataset=self.images.get("train"),
            eval_dataset=self.images["test"],
            processing_class=self.processor,
            compute_metrics=_accuracy,
            optimizer_cls_and_kwargs=(kind, {"lr": args.learning_rate, **options}),
            callbacks=list(callbacks),
            training_collator=self.collate_training,
        )

    def collate_training(self, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return a batch as the training sees it.

        Scores, compensation and the statistics of batch norms come from such batches too: those of a network that was
        trained on shifted images describe shifted images, and it does worse by those of others.

        Args:
            samples: Samples of ``images``.

        Returns:
            The batch.
        """
        batch = self.preprocessing(samples)
        if self.augment:
            batch["pixel_values"] = self.preprocessing.augment(batch["pixel_values"])
        return batch

    def evaluate(self, trainer: Trainer, stage: str) -> dict[str, float]:
        """Return accuracy and loss on the images to evaluate on.

        Args:
            trainer: A Trainer with the model.
            stage: Prefix of the names.

        Returns:
            The metrics by name.
        """
        return trainer.evaluate(metric_key_prefix=stage)

    def size(self, trainer: Trainer) -> ModelSize:
        """Return parameters and multiply-accumulates an image.

        Args:
            trainer: A Trainer with the model.

        Returns:
            The size.
        """
        return measure_size(trainer.model, self.batch(1))

    def batch(self, most: int) -> dict[str, Tensor]:
        """Return the first images to evaluate on.

        Args:
            most: How many at most.

        Returns:
            A batch, on the CPU.
        """
        images = self.images["test"]
        return self.preprocessing([images[i] for i in range(min(most, len(images)))])


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    logits = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits  # some models return hidden states too
    return {"accuracy": float(np.mean(np.argmax(logits, axis=-1) == prediction.label_ids))}


def largest_difference(trained: PreTrainedModel, reloaded: PreTrainedModel, batch: Batch) -> float:
    """Return by how much the logits of two models differ at most, both in evaluation mode and without autocast.

    Args:
        trained: A model that a Trainer had.
        reloaded: The same model, read back from disk; moved to the device of ``trained``.
        batch: What to run both on.

    Returns:
        The largest absolute difference; 0 if they are equal bit for bit.
    """
    trained.__dict__.pop("forward", None)  # accelerate leaves its autocast around the forward of what it trained
    device = trained.device
    reloaded.to(device)
    with torch.no_grad():
        logits = [m.eval()(pixel_values=batch["pixel_values"].to(device)).logits for m in (trained, reloaded)]
    return (logits[0] - logits[1]).abs().max().item()


def latencies(models: Mapping[str, nn.Module], batch: Batch, *, repeats: int = 11) -> dict[str, float]:
    """Return the median time of a forward pass of each model, measured in turns on the same batch.

    Args:
        models: Models on one device, by name.
        batch: The batch.
        repeats: Number of passes of each model that count.

    Returns:
        Milliseconds by name.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(repeats + 2):
            for name, model in models.items():
                pixel_values = batch["pixel_values"].to(next(model.parameters()).device)
                _wait(pixel_values.device)
                start = time.perf_counter()
                model.eval()(pixel_values=pixel_values)
                _wait(pixel_values.device)
                if turn >= 2:  # the first turns warm caches up
                    times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(t) for name, t in times.items()}


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def summary(results: Mapping[str, float]) -> str:
    """Return the results of a pruning run as a table.

    Args:
        results: What ``all_results.json`` holds.

    Returns:
        The table in markdown.
    """
    rows = [["", "accuracy", "loss", "parameters", "MACs an image", "ms a batch"], ["---", *["---:"] * 5]]
    for name, stage, size in (
        ("dense", "dense", "dense"),
        ("right after pruning", "pruned", "pruned"),
        ("fine-tuned, reloaded", "eval", "pruned"),
    ):
        rows.append([
            name,
            f"{100 * results[f'{stage}_accuracy']:.2f}%",
            f"{results[f'{stage}_loss']:.4f}",
            f"{results[f'{size}_params']:,.0f}",
            f"{results[f'{size}_macs']:,.0f}",
            f"{results[f'{size}_milliseconds']:.2f}" if stage != "pruned" else "",
        ])
    shares = [
        f"{results[f'pruned_{what}'] / results[f'dense_{what}']:.1%}" for what in ("params", "macs", "milliseconds")
    ]
    rows.append(["left", "", "", *shares])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n"


def write_summary(results: Mapping[str, float], folder: Path) -> str:
    """Write the table to ``results.md``.

    Args:
        results: What ``all_results.json`` holds.
        folder: Where to write.

    Returns:
        The table in markdown.
    """
    text = summary(results)
    (folder / "results.md").write_text(text, encoding="utf-8")
    return text
